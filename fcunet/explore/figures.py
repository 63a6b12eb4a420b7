"""The four drawings of an explorer, in Bokeh: map, pattern, profile, histogram.

Each keeps its data sources and exchanges only what has changed, so that a click on a large scan costs one
pattern and not a page.
"""

from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from bokeh.models import (  # type: ignore[attr-defined]
    ColorBar,
    ColumnDataSource,
    HoverTool,
    LinearColorMapper,
    Range1d,
)
from bokeh.plotting import figure
from numpy.typing import NDArray

from ..plot.patterns import near_lattice
from ..plot.scanmap import edges
from ..plot.style import BLUE, FRAME_COLOURS, ORANGE, RED, SKY, THEMES

Array = NDArray[np.float64]
_MISSING = "#b8b8b8"
_MAP_SIZE = (500, 420)
_MOST = 1400  # pixels of a map along one side that are sent to the browser
FONT = "Helvetica, Arial, sans-serif"  # of the machine: nothing is fetched


def palette(name: str) -> list[str]:
    """Colours of a map kind's palette."""
    if name == "category":
        return list(FRAME_COLOURS)
    names = {"strain": THEMES["light"].strain, "rotation": THEMES["light"].rotation}
    colours = mpl.colormaps[names.get(name, name)](np.linspace(0, 1, 256))
    return [mpl.colors.to_hex(c) for c in colours]


def _plain(name: str, width: int, height: int, **options: Any) -> Any:
    fig = figure(
        name=name,
        frame_width=width,
        frame_height=height,
        toolbar_location="above",
        active_drag=None,
        **options,
    )
    fig.toolbar.logo = None
    for axis in fig.axis:
        axis.major_label_text_font = axis.axis_label_text_font = FONT
        axis.axis_label_text_font_style = "normal"
    fig.title.text_font = FONT  # type: ignore[union-attr]
    return fig


class MapFigure:
    """A map of the scan, with the position, the reference region and the line of the profile on it."""

    def __init__(self, array: xr.DataArray) -> None:
        self.shape = array.sizes["scan_y"], array.sizes["scan_x"]
        self.x0, self.x1, unit_x = edges(array, "scan_x")
        self.y0, self.y1, unit_y = edges(array, "scan_y")
        if unit_x != unit_y:
            (self.y0, self.y1), (self.x0, self.x1) = (-0.5, self.shape[0] - 0.5), (-0.5, self.shape[1] - 0.5)
            unit_x = "px"
        self.unit = "position" if unit_x == "px" else unit_x
        ratio = abs((self.y1 - self.y0) / (self.x1 - self.x0))
        width = min(_MAP_SIZE[0], _MAP_SIZE[1] / ratio)
        height = width * ratio
        self.fig = _plain(
            "map",
            int(max(width, 90)),
            int(max(height, 90)),
            x_range=Range1d(start=self.x0, end=self.x1),
            y_range=Range1d(start=self.y1, end=self.y0),
            tools="wheel_zoom,reset,save",
            active_scroll="wheel_zoom",
            x_axis_label=f"scan_x ({self.unit})",
            y_axis_label=f"scan_y ({self.unit})",
        )
        self.fig.grid.visible = False
        self.mapper = LinearColorMapper(palette=palette("viridis"), low=0, high=1, nan_color=_MISSING)
        self.source = ColumnDataSource(data=self._columns(np.full((1, 1), np.nan)), name="map-data")
        self.fig.image(
            "image",
            x="x",
            y="y",
            dw="dw",
            dh="dh",
            source=self.source,
            color_mapper=self.mapper,
            level="image",
        )
        self.bar = ColorBar(color_mapper=self.mapper, width=12, title="", title_text_font=FONT, name="bar")
        self.fig.add_layout(self.bar, "right")
        self.cross = ColumnDataSource(data={"x": [], "y": []}, name="position")
        for colour, width_ in (("black", 4), ("white", 2)):
            self.fig.scatter(
                "x", "y", source=self.cross, marker="cross", size=22, line_color=colour, line_width=width_,
                fill_color=None,
            )  # fmt: skip
        self.box = ColumnDataSource(data={"left": [], "right": [], "top": [], "bottom": []}, name="reference")
        self.fig.quad(
            left="left", right="right", top="top", bottom="bottom", source=self.box, fill_color=None,
            line_color="black", line_width=2, line_dash="dashed",
        )  # fmt: skip
        self.line = ColumnDataSource(data={"x": [], "y": []}, name="line")
        self.fig.line("x", "y", source=self.line, line_color=ORANGE, line_width=2, line_alpha=0.8)

    def _columns(self, values: Any) -> dict[str, list[Any]]:
        # a falling range draws the first row at the top
        return {
            "image": [values],
            "x": [self.x0],
            "y": [self.y0],
            "dw": [self.x1 - self.x0],
            "dh": [self.y1 - self.y0],
        }

    def show(self, values: Array, *, title: str, unit: str, colours: str) -> None:
        """Another map; large ones are thinned to what a screen can show."""
        steps = [max(1, -(-n // _MOST)) for n in values.shape]
        self.source.data = self._columns(np.ascontiguousarray(values[:: steps[0], :: steps[1]], np.float32))
        self.mapper.palette = palette(colours)
        self.fig.title.text = title
        self.bar.title = unit

    def place(self, y: float, x: float) -> tuple[float, float]:
        """Coordinates (x, y) of the middle of a scan position."""
        return (
            self.x0 + (x + 0.5) * (self.x1 - self.x0) / self.shape[1],
            self.y0 + (y + 0.5) * (self.y1 - self.y0) / self.shape[0],
        )

    def index(self, x: float | None, y: float | None) -> tuple[int, int] | None:
        """Scan position (y, x) at coordinates, the nearest one beyond the edge."""
        if x is None or y is None:
            return None
        iy = int(np.floor((y - self.y0) / (self.y1 - self.y0) * self.shape[0]))
        ix = int(np.floor((x - self.x0) / (self.x1 - self.x0) * self.shape[1]))
        return min(max(iy, 0), self.shape[0] - 1), min(max(ix, 0), self.shape[1] - 1)

    def mark(self, position: tuple[int, int]) -> None:
        x, y = self.place(*position)
        self.cross.data = {"x": [x], "y": [y]}

    def mark_box(self, region: tuple[int, int, int, int] | None) -> None:
        if region is None:
            self.box.data = {"left": [], "right": [], "top": [], "bottom": []}
            return
        y0, y1, x0, x1 = region
        (left, top), (right, bottom) = self.place(y0 - 0.5, x0 - 0.5), self.place(y1 - 0.5, x1 - 0.5)
        self.box.data = {"left": [left], "right": [right], "top": [top], "bottom": [bottom]}

    def mark_line(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        points = [self.place(*start), self.place(*end)]
        self.line.data = {"x": [p[0] for p in points], "y": [p[1] for p in points]}


class PatternFigure:
    """A diffraction pattern with disks and lattice, or the mean pattern with the virtual detector."""

    def __init__(self, name: str, shape: tuple[int, int], size: int = 410) -> None:
        self.shape = shape
        height = int(size * min(1.0, shape[0] / shape[1]))
        width = int(size * min(1.0, shape[1] / shape[0]))
        self.fig = _plain(
            name, width, height, x_range=Range1d(start=-0.5, end=shape[1] - 0.5),
            y_range=Range1d(start=shape[0] - 0.5, end=-0.5),
            tools="wheel_zoom,reset,save", active_scroll="wheel_zoom",
        )  # fmt: skip
        self.fig.grid.visible = False
        self.fig.axis.visible = False
        self.fig.background_fill_color = "black"
        self.mapper = LinearColorMapper(palette=palette("gray"), low=0, high=1, nan_color=_MISSING)
        self.source = ColumnDataSource(data={"image": [np.zeros((1, 1), np.float32)]}, name=f"{name}-data")
        self.fig.image(
            "image", x=-0.5, y=-0.5, dw=shape[1], dh=shape[0], source=self.source, color_mapper=self.mapper
        )
        self.peaks = ColumnDataSource(data=_no_peaks(), name=f"{name}-peaks")
        self.disks = self.fig.circle(
            "x", "y", radius="r", source=self.peaks, fill_alpha=0, line_color="colour", line_alpha="alpha",
            line_width=1.5,
        )  # fmt: skip
        self.sites = ColumnDataSource(data={"x": [], "y": []}, name=f"{name}-sites")
        self.fig.scatter("x", "y", source=self.sites, marker="cross", size=7, line_color=RED)
        self.ring = ColumnDataSource(data={"x": [], "y": [], "inner": [], "outer": []}, name=f"{name}-ring")
        self.fig.annulus(
            "x", "y", inner_radius="inner", outer_radius="outer", source=self.ring, fill_color=SKY,
            fill_alpha=0.25, line_color=SKY, line_width=1.5,
        )  # fmt: skip
        self.fig.add_tools(
            HoverTool(
                renderers=[self.disks],
                tooltips=[("(h, k)", "@hk"), ("row, column", "@y{0.00}, @x{0.00} px"),
                          ("error", "@sigma{0.000} px"), ("strength", "@strength{0.000 a}")],
            )
        )  # fmt: skip

    def show(self, pattern: Array | None, *, power: float, title: str) -> None:
        """Another pattern, brightness compressed; black if there is none."""
        self.fig.title.text = title
        if pattern is None:
            self.source.data = {"image": [np.full((1, 1), np.nan, np.float32)]}
            return
        image = np.clip(pattern, 0, None) ** power
        finite = image[np.isfinite(image)]
        self.source.data = {"image": [image.astype(np.float32)]}
        top = float(np.percentile(finite, 99.9)) if finite.size else 1.0
        self.mapper.update(low=0.0, high=top if top > 0 else 1.0)

    def mark(
        self,
        peaks: dict[str, Array],
        strong: NDArray[np.bool_],
        origin: Array,
        g: Array,
        *,
        radius: float,
        reach: float | None,
    ) -> None:
        """Disks, those farther than `reach` px from a lattice site in another colour, and the sites."""
        y, x = peaks["peak_qy"], peaks["peak_qx"]
        on = near_lattice(y, x, origin, g, reach=reach)
        found = np.isfinite(g).all() and abs(np.linalg.det(g)) > 1e-9
        index = np.rint((np.stack([y, x], 1) - origin) @ np.linalg.inv(g)).astype(int) if found else None
        self.peaks.data = {
            "x": x,
            "y": y,
            "r": np.full(len(x), max(radius, 1.5)),
            "colour": [ORANGE if a else SKY for a in on],
            "alpha": np.where(strong, 1.0, 0.25),
            "hk": [f"{h}, {k}" if a else "-" for (h, k), a in zip(index, on, strict=True)]
            if index is not None
            else ["-"] * len(x),
            "sigma": peaks["peak_sigma"],
            "strength": peaks["peak_intensity"],
        }
        sites = lattice_sites(origin, g, self.shape) if found else np.empty((0, 2))
        self.sites.data = {"x": sites[:, 1], "y": sites[:, 0]}

    def mark_ring(self, centre: tuple[float, float] | None, inner: float = 0, outer: float = 0) -> None:
        """The virtual detector."""
        if centre is None:
            self.ring.data = {"x": [], "y": [], "inner": [], "outer": []}
        else:
            self.ring.data = {"x": [centre[1]], "y": [centre[0]], "inner": [inner], "outer": [outer]}


def _no_peaks() -> dict[str, list[Any]]:
    return {k: [] for k in ("x", "y", "r", "colour", "alpha", "hk", "sigma", "strength")}


def lattice_sites(origin: Array, g: Array, shape: tuple[int, int], most: int = 2000) -> Array:
    """Sites (n, 2) of a lattice on a detector of this shape; none if they are too many to see."""
    corners = np.array([(a, b) for a in (0, shape[0]) for b in (0, shape[1])])
    span = np.abs((corners - origin) @ np.linalg.inv(g)).max(0).round().astype(int) + 1
    if (2 * span + 1).prod() > 4 * most:
        return np.empty((0, 2))
    h, k = np.mgrid[-span[0] : span[0] + 1, -span[1] : span[1] + 1]
    sites = origin + np.stack([h.ravel(), k.ravel()], 1) @ g
    return sites[((sites > -0.5) & (sites < np.array(shape) - 0.5)).all(1)][:most]


class ProfileFigure:
    """A map along a line, with bands of one and two standard deviations."""

    def __init__(self) -> None:
        self.fig = _plain("profile", _MAP_SIZE[0], 150, tools="xwheel_zoom,reset,save")
        self.source = ColumnDataSource(data={"x": [], "y": []}, name="profile-data")
        self.bands = ColumnDataSource(
            data={k: [] for k in ("x", "l1", "u1", "l2", "u2")}, name="profile-bands"
        )
        for k, alpha in ((2, 0.15), (1, 0.3)):
            self.fig.varea("x", f"l{k}", f"u{k}", source=self.bands, fill_color=BLUE, fill_alpha=alpha)
        self.fig.line("x", "y", source=self.source, line_color=BLUE, line_width=1.5)

    def show(self, line: xr.Dataset, name: str, label: str) -> None:
        at, values = line["distance"].values, line[name].values
        self.source.data = {"x": at, "y": values}
        std = line[f"{name}_std"].values if f"{name}_std" in line else np.full(values.shape, np.nan)
        std = np.where(np.isfinite(std), std, 0.0)
        self.bands.data = {"x": at} | {
            f"{side}{k}": values + sign * k * std for k in (1, 2) for side, sign in (("l", -1), ("u", 1))
        }
        unit = line["distance"].attrs["units"]
        self.fig.xaxis.axis_label = f"distance ({'positions' if unit == 'px' else unit})"
        self.fig.yaxis.axis_label = label


class HistogramFigure:
    """How the values of a map are spread, with the colour range."""

    def __init__(self) -> None:
        self.fig = _plain("histogram", _MAP_SIZE[0], 90, tools="reset,save", x_range=Range1d(start=0, end=1))
        self.fig.min_border_left = 60  # as much as the axis takes, or the frame is moved out of sight
        self._reach = (0.0, 1.0)
        self.source = ColumnDataSource(data={"left": [], "right": [], "top": []}, name="histogram-data")
        self.fig.quad("left", "right", "top", 0, source=self.source, fill_color="#888888", line_color=None)
        self.marks = ColumnDataSource(data={"x": [], "colour": []}, name="histogram-marks")
        self.fig.vspan(x="x", source=self.marks, line_color="colour", line_width=2)
        self.fig.yaxis.axis_label = "positions"
        self.fig.yaxis.major_label_text_font_size = "0px"  # how many is in the shape
        self.fig.yaxis.major_tick_line_color = self.fig.yaxis.minor_tick_line_color = None
        self.fig.y_range.start = 0

    def show(self, values: Array, label: str) -> None:
        finite = values[np.isfinite(values)]
        if not finite.size:
            self.source.data = {"left": [], "right": [], "top": []}
            return
        low, high = (float(v) for v in np.percentile(finite, [0.2, 99.8]))
        counts, sides = np.histogram(finite, 100, (low, high) if high > low else (low - 0.5, high + 0.5))
        self.source.data = {"left": sides[:-1], "right": sides[1:], "top": counts}
        self._reach = float(sides[0]), float(sides[-1])
        self.fig.xaxis.axis_label = label

    def mark(self, limits: tuple[float, float], here: float) -> None:
        """The colour range in blue, the value at the position in orange; both in view."""
        self.marks.data = {"x": [*limits, here], "colour": [BLUE, BLUE, ORANGE]}
        low, high = min(self._reach[0], limits[0]), max(self._reach[1], limits[1])
        self.fig.x_range.update(start=low - 0.02 * (high - low), end=high + 0.02 * (high - low))

"""One map of the scan: colours, scale bar, colour bar; a line where the scan is one."""

import math

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from .. import schema
from .style import BLUE, SKY, round_down, say_missing, theme


def edges(array: xr.DataArray, dim: str) -> tuple[float, float, str]:
    """Outer edges of the pixels along `dim`, and their unit."""
    n = array.sizes[dim]
    if dim not in array.coords:
        return -0.5, n - 0.5, schema.UNIT_PIXEL
    value = array[dim].values.astype(float)
    step = (value[-1] - value[0]) / (n - 1) if n > 1 else 1.0
    step = step if math.isfinite(step) and step != 0 else 1.0
    return value[0] - step / 2, value[-1] + step / 2, str(array[dim].attrs.get("units", schema.UNIT_PIXEL))


def extent(array: xr.DataArray) -> tuple[tuple[float, float, float, float], str]:
    """Extent for imshow, rows downwards, and the unit of lengths; px where rows and columns disagree."""
    y0, y1, unit_y = edges(array, "scan_y")
    x0, x1, unit_x = edges(array, "scan_x")
    if unit_x != unit_y:
        ny, nx = array.sizes["scan_y"], array.sizes["scan_x"]
        return (-0.5, nx - 0.5, ny - 0.5, -0.5), schema.UNIT_PIXEL
    return (x0, x1, y1, y0), unit_x


def _aspect(array: xr.DataArray) -> float:
    """Height over width of the scan."""
    (x0, x1, y1, y0), _ = extent(array)
    return abs((y1 - y0) / (x1 - x0))


def is_line(array: xr.DataArray) -> bool:
    return min(array.sizes["scan_y"], array.sizes["scan_x"]) == 1


def scale_bar(ax: Axes, unit: str) -> None:
    """A bar of round length, about a fifth of the width, in the lower left corner."""
    x0, x1 = ax.get_xlim()
    y0, y1 = ax.get_ylim()
    width, height = abs(x1 - x0), abs(y1 - y0)
    length = round_down(0.28 * width)
    left, bottom = x0 + 0.04 * (x1 - x0), y0 + 0.06 * (y1 - y0)
    thick = 0.02 * max(height, 0.25 * width) * (1 if y1 > y0 else -1)
    ax.add_patch(
        Rectangle((left, bottom), math.copysign(length, x1 - x0), thick, fc="white", ec="black", lw=0.6)
    )
    name = unit if unit != schema.UNIT_PIXEL else "position" if length == 1 else "positions"
    ax.text(
        left,
        bottom + 1.6 * thick,
        f"{length:g} {name}",
        ha="left",
        va="bottom",
        color="white",
        fontsize="small",
        path_effects=[withStroke(linewidth=1.8, foreground="black")],
    )


def draw_map(
    ax: Axes,
    array: xr.DataArray,
    *,
    cmap: str | mpl.colors.Colormap,
    limits: tuple[float, float],
    label: str,
    bar: bool = True,
    colour_bar: bool = True,
    std: xr.DataArray | None = None,
) -> None:
    """One scan map with colour bar; a scan of one row or column as a line, with its error band."""
    values = np.asarray(array.values, dtype=float)
    if is_line(array):
        dim = "scan_x" if array.sizes["scan_y"] == 1 else "scan_y"
        low, high, unit = edges(array, dim)
        n = array.sizes[dim]
        at = np.linspace(low, high, 2 * n + 1)[1::2]
        if std is not None:
            band = np.asarray(std.values, dtype=float).ravel()
            ax.fill_between(at, values.ravel() - band, values.ravel() + band, color=SKY, alpha=0.35, lw=0)
        ax.plot(at, values.ravel(), ".-", color=BLUE, ms=4, lw=1)
        ax.axhline(0, color=theme().faint, lw=0.6, zorder=0)
        finite = values[np.isfinite(values)]
        if limits[0] < limits[1] and finite.size:  # the limits of a map leave out outliers; a line shows all
            bottom, top = min(limits[0], finite.min()), max(limits[1], finite.max())
            room = 0.04 * (top - bottom)
            ax.set_ylim(bottom - room * (finite.min() <= bottom), top + room * (finite.max() >= top))
        ax.set_xlim(low, high)
        ax.set_xlabel(f"{dim} ({'position' if unit == schema.UNIT_PIXEL else unit})")
        ax.set_ylabel(label)
        if not finite.size:
            say_missing(ax)
        return
    box, unit = extent(array)
    colours = mpl.colormaps.get_cmap(cmap).with_extremes(bad=theme().missing)
    image = ax.imshow(
        np.ma.masked_invalid(values),
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        extent=box,
        aspect="equal",
    )
    ax.set_xticks([])
    ax.set_yticks([])
    if not np.isfinite(values).any():
        say_missing(ax)
    if bar:
        scale_bar(ax, unit)
    if colour_bar:  # beside the map and as high, whatever the layout does to the map
        side = ax.inset_axes((1.02, 0.0, 0.035 * max(1.0, _aspect(array)), 1.0))
        drawn = ax.figure.colorbar(image, cax=side)
        side.set_title(label, fontsize="small", loc="left")
        drawn.outline.set_linewidth(0.5)  # type: ignore[operator]


def panel_size(array: xr.DataArray, width: float = 3.1) -> tuple[float, float]:
    """Width and height of one map with colour bar and title, inches."""
    if is_line(array):
        return width + 0.6, 2.1
    aspect = _aspect(array)
    if aspect > 1.3:  # tall scans: keep the height, give up width
        return max(1.3, 1.3 * width / aspect) + 0.9, 1.3 * width + 0.35
    return width + 0.9, max(0.9, width * aspect) + 0.35

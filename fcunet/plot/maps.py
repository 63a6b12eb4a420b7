"""Figures of scan maps: strain, its error bars, virtual images."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from ..schema import STRAIN_COMPONENTS
from .scanmap import draw_map, is_line, panel_size
from .style import (
    LABELS,
    RED,
    Figure,
    arrow,
    group_of,
    in_column,
    letter_points,
    need,
    new_figure,
    range_of,
    scale_of,
    styled,
    symmetric_limit,
    theme,
)

VIRTUAL_TITLES = {
    "bf": "bright field (counts)",
    "adf": "annular dark field (counts)",
    "total": "all electrons (counts)",
    "n_peaks": "Bragg peaks per pattern",
    "com_qy": "centre of mass, row (px)",
    "com_qx": "centre of mass, column (px)",
    "fit_error": "residual of the lattice fit (px)",
}


def _theta(strain: xr.Dataset, unit: str) -> tuple[float, str]:
    factors = {"degree": (math.degrees(1), "degrees"), "mrad": (1e3, "mrad")}
    if unit not in factors:
        raise ValueError(f"unit of theta is {unit!r}; choose degree or mrad")
    return factors[unit]


@styled
def strain(
    results: xr.DataTree | xr.Dataset,
    *,
    limit_percent: float | None = None,
    theta_limit: float | None = None,
    theta_unit: str = "degree",
    columns: int = 2,
    title: str | None = None,
) -> Figure:
    """The four-panel strain map, with scale bar, axes and lattice vectors.

    Parameters
    ----------
    results : DataTree or Dataset
        Results of a run, or its ``/strain``: `e_xx, e_yy, e_xy, theta` (scan_y, scan_x).
    limit_percent, theta_limit : float, optional
        Colour range is plus and minus this, in percent and in `theta_unit`; default the 98th percentile of
        the magnitudes, rounded up, shared by the three strains.
    theta_unit : {"degree", "mrad"}
    columns : int
        2 for a square of panels, 4 for a row.
    title : str, optional

    Returns
    -------
    Figure
        Missing positions grey. A scan of one row or column becomes lines with bands of one standard
        deviation.

    Raises
    ------
    ValueError
        If a component is missing, or a limit is not positive.
    """
    data = group_of(results, "strain")
    need(data, STRAIN_COMPONENTS, "strain")
    factor, theta_name = _theta(data, theta_unit)
    scaled = {c: data[c] * (factor if c == "theta" else 100.0) for c in STRAIN_COMPONENTS}
    stds = {
        c: data[f"{c}_std"] * (factor if c == "theta" else 100.0) if f"{c}_std" in data else None
        for c in STRAIN_COMPONENTS
    }
    limit = symmetric_limit([scaled[c].values for c in ("e_xx", "e_yy", "e_xy")], limit_percent)
    turn = symmetric_limit([scaled["theta"].values], theta_limit)
    width, height = panel_size(scaled["e_xx"])
    rows = math.ceil(4 / columns)
    natural = max(columns * width, 6.2)
    valid = float(np.isfinite(data["e_xx"].values).mean())
    word = "range" if is_line(data["e_xx"]) else "colour range"
    what = [
        rf"{word} $\pm${limit:g} % and $\pm${turn:g} {theta_name}",
        f"lattice at {100 * valid:.1f} % of the positions"
        + (", grey: none" if valid < 1 and not is_line(data["e_xx"]) else ""),
        f"frame: {data.attrs.get('frame', 'not known')}; "
        f"reference: {data.attrs.get('reference', 'not known')}",
    ]
    factor = scale_of(natural)
    points = letter_points(factor)
    room = int((0.75 * natural * factor) * 72 / (0.5 * points))  # letters per line
    what = [part for line in what for part in textwrap.wrap(line, room)]
    foot = max(0.9, len(what) * 1.5 * points / 72 / factor)
    figure = new_figure(natural, rows * height + foot + 0.05 + (0.3 if title else 0))
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[height] * rows + [foot])
    for i, component in enumerate(STRAIN_COMPONENTS):
        ax = figure.add_subplot(grid[divmod(i, columns)])
        is_theta = component == "theta"
        top = turn if is_theta else limit
        draw_map(
            ax,
            scaled[component],
            cmap=theme().rotation if is_theta else theme().strain,
            limits=(-top, top),
            label=theta_name if is_theta else "%",
            bar=i == 0,
            std=stds[component],
        )
        ax.set_title(LABELS[component])
    _legend(figure, grid[rows, :], data.attrs, what)
    if title:
        figure.suptitle(title)
    return figure


def _legend(figure: Figure, where: Any, attrs: Mapping[Any, Any], lines: list[str]) -> None:
    """Axes x and y, the lattice vectors, and some lines of text below the maps."""
    width = figure.get_figwidth()
    key = min(0.8, 0.16 * width)
    sub = where.subgridspec(1, 3, width_ratios=[key, key, width - 2 * key])
    axes, vectors, text = (figure.add_subplot(cell) for cell in sub)
    for ax in (axes, vectors, text):
        ax.set_axis_off()
    for ax in (axes, vectors):
        ax.set_xlim(-1.5, 1.5)
        ax.set_ylim(1.5, -1.5)
        ax.set_aspect("equal")
    for tip, name in (((1.0, 0.0), "x"), ((0.0, 1.0), "y")):
        _arrow(axes, (tip[0] - 0.5, tip[1] - 0.5), name, theme().ink, start=(-0.5, -0.5))
    reference = [attrs.get(f"g{i}_ref_px") for i in (1, 2)]
    if all(v is not None and np.all(np.isfinite(v)) for v in reference):
        longest = max(math.hypot(*v) for v in reference)  # type: ignore[misc]
        angle = math.radians(float(attrs.get("rotation_degree", 0.0)))
        for i, vector in enumerate(reference, 1):
            y, x = (float(c) / longest for c in vector)  # type: ignore[union-attr]
            # from detector to scan axes, which are turned by the angle from +x towards +y
            tip = (x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle))
            _arrow(vectors, tip, f"$g_{i}$", RED)
    text.set_xlim(0, 1)
    text.set_ylim(0, 1)
    text.text(0.0, 0.5, "\n".join(lines), va="center", fontsize="small", linespacing=1.4)


def _arrow(
    ax: Axes, tip: tuple[float, float], name: str, colour: str, start: tuple[float, float] = (0.0, 0.0)
) -> None:
    """A named arrow, points (x, y)."""
    arrow(ax, start[::-1], tip[::-1], colour, 1.2)
    dx, dy = tip[0] - start[0], tip[1] - start[1]
    further = 1 + 0.3 / max(math.hypot(dx, dy), 1e-9)
    ax.text(start[0] + further * dx, start[1] + further * dy, name, color=colour, ha="center", va="center")


@styled
def error_bars(results: xr.DataTree | xr.Dataset) -> Figure:
    """Maps of the standard deviation of each strain component, in units of 1e-3.

    Parameters
    ----------
    results : DataTree or Dataset
        Results of a run, or its ``/strain`` with `e_xx_std, ..., theta_std`.
    """
    data = group_of(results, "strain")
    names = [f"{c}_std" for c in STRAIN_COMPONENTS]
    need(data, names, "error_bars")
    scaled = [data[n] * 1e3 for n in names]
    pool = np.concatenate([np.asarray(s.values, dtype=float).ravel() for s in scaled])
    top = range_of(pool)[1]
    width, height = panel_size(scaled[0])
    figure = new_figure(2 * width, 2 * height)
    for i, (ax, component, array) in enumerate(
        zip(figure.subplots(2, 2).flat, STRAIN_COMPONENTS, scaled, strict=True)
    ):
        draw_map(
            ax, array, cmap="viridis", limits=(0.0, top), label="mrad" if i == 3 else r"$10^{-3}$", bar=i == 0
        )
        ax.set_title(f"error of {LABELS[component]}, median {_median_text(array.values)}")
    return figure


def _median_text(values: ArrayLike, digits: int = 2) -> str:
    array = np.asarray(values, dtype=float)
    return f"{np.nanmedian(array):.{digits}f}" if np.isfinite(array).any() else "none"


@styled
def scan_map(
    array: xr.DataArray,
    *,
    factor: float = 1.0,
    unit: str = "",
    title: str | None = None,
    limits: tuple[float, float] | None = None,
    symmetric: bool = False,
) -> Figure:
    """One map of the scan, with scale bar and colour bar.

    Parameters
    ----------
    array : DataArray (scan_y, scan_x)
    factor : float
        From the values to what is shown, such as 100 for percent.
    unit, title : str, optional
        Of what is shown; the title is the name of the array by default.
    limits : (float, float), optional
        Colour range in `unit`; default from the values.
    symmetric : bool
        The values have a sign: diverging colours, the same range on both sides of zero.
    """
    scaled = array.astype(float) * factor
    if limits is None:
        top = symmetric_limit([scaled.values], None) if symmetric else 0.0
        limits = (-top, top) if symmetric else range_of(np.asarray(scaled.values, dtype=float))
    width, height = panel_size(scaled, 4.2)
    figure = new_figure(width, height)
    ax = figure.add_subplot()
    turned = "theta" in str(array.name)
    diverging = theme().rotation if turned else theme().strain
    draw_map(ax, scaled, cmap=diverging if symmetric else "viridis", limits=limits, label=unit)
    ax.set_title(title if title is not None else str(array.name or ""))
    return figure


@styled
def virtual(results: xr.DataTree | xr.Dataset, names: Sequence[str] | None = None) -> Figure:
    """Virtual images and maps of the detection, as many as there are.

    Parameters
    ----------
    results : DataTree or Dataset
        Results or peaks of a run with some of `bf, adf, com_qy, com_qx, n_peaks, total` (scan_y, scan_x); of
        a tree, the residual of the lattice fit is shown as well.
    names : sequence of str, optional
        Which; default bright field, dark field, centre of mass and number of peaks.
    """
    data = group_of(results, "virtual")
    if names is None and isinstance(results, xr.DataTree) and "lattice" in results.children:
        lattice = results["lattice"].dataset
        data = data.assign(fit_error=lattice["fit_error"]) if "fit_error" in lattice else data
    wanted = list(names or ("bf", "adf", "n_peaks", "com_qy", "com_qx", "fit_error"))
    have = [n for n in wanted if n in data]
    if not have or names is not None:
        need(data, wanted, "virtual")
    columns = min(len(have), 2 if len(have) == 4 or in_column() else 3)
    rows = math.ceil(len(have) / columns)
    width, height = panel_size(data[have[0]])
    figure = new_figure(columns * width, rows * height)
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for i, (ax, name) in enumerate(zip(axes, have, strict=False)):
        array = data[name].astype(float)
        limits, cmap = range_of(array.values), "viridis"
        if name in ("bf", "adf", "total"):
            cmap = "gray"
        elif name.startswith("com"):
            middle = float(np.nanmedian(array.values)) if np.isfinite(array.values).any() else 0.0
            top = max(limits[1] - middle, middle - limits[0])
            limits, cmap = (middle - top, middle + top), "PuOr"
        draw_map(ax, array, cmap=cmap, limits=limits, label="", bar=i == 0)
        ax.set_title(VIRTUAL_TITLES.get(name, name))
    for ax in axes[len(have) :]:
        ax.set_axis_off()
    return figure

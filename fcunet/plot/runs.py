"""Two runs on one scan: their strain side by side, how far apart, and against their error bars."""

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from ..schema import STRAIN_COMPONENTS
from .compare import draw_profile
from .scanmap import draw_map, is_line, panel_size
from .style import (
    BLUE,
    LABELS,
    ORANGE,
    SKY,
    Array,
    Figure,
    group_of,
    in_column,
    need,
    new_figure,
    say_missing,
    styled,
    symmetric_limit,
    theme,
)

_PLACES = ("both", "A only", "B only", "neither")


@styled
def two_runs(
    a: xr.DataTree | xr.Dataset,
    b: xr.DataTree | xr.Dataset,
    *,
    components: Sequence[str] = STRAIN_COMPONENTS,
) -> Figure:
    """Strain of run A, of run B, and B minus A, one row per component.

    Parameters
    ----------
    a, b : DataTree or Dataset
        Results of two runs on one scan, or their ``/strain``: positions of the same shape.
    components : sequence of str

    Returns
    -------
    Figure
        A and B share a colour range; the difference has its own. Grey: one of them has no lattice there. A
        scan of one row or column becomes lines.

    Raises
    ------
    ValueError
        If the shapes disagree or a component is missing.
    """
    first, second = _pair(a, b, components, "two_runs")
    line = is_line(first[components[0]])
    width, height = panel_size(first[components[0]], 1.9 if in_column() else 2.5)
    row_height = 2.0 if line else height
    figure = new_figure(6.5 if line else 3 * width, len(components) * row_height)
    grid = figure.subplots(len(components), 1 if line else 3, squeeze=False)
    for number, (row, component) in enumerate(zip(grid, components, strict=True)):
        factor, unit = _shown(component)
        both = [d[component] * factor for d in (first, second)]
        if line:
            std = second[f"{component}_std"] * factor if f"{component}_std" in second else None
            draw_profile(row[0], both[0], both[1], std, unit, legend=number == 0, names=("B", "A"))
            row[0].set_title(LABELS[component], loc="left")
            continue
        difference = both[1] - both[0].values
        top = symmetric_limit([v.values for v in both], None)
        rest = symmetric_limit([difference.values], None)
        cmap = theme().rotation if component == "theta" else theme().strain
        for ax, array, limit, name in zip(
            row, (*both, difference), (top, top, rest), ("A", "B", "B - A"), strict=True
        ):
            first_map = number == 0 and name == "A"
            draw_map(ax, array, cmap=cmap, limits=(-limit, limit), label="", bar=first_map)
            if number == 0:
                ax.set_title(name)
        row[0].set_ylabel(f"{LABELS[component]} ({unit})")
    return figure


@styled
def difference(a: xr.DataTree | xr.Dataset, b: xr.DataTree | xr.Dataset) -> Figure:
    """How the differences of two runs are spread, and how far their error bars let them be.

    Parameters
    ----------
    a, b : DataTree or Dataset
        As for `two_runs`.

    Returns
    -------
    Figure
        Histograms of B minus A. Dashed: what the error bars of both predict if they were independent; two
        runs on the same patterns share their noise and should lie closer than that, unless a constant offset
        (another reference) or a true disagreement lies between them.

    Raises
    ------
    ValueError
        If the shapes disagree or a component is missing.
    """
    first, second = _pair(a, b, STRAIN_COMPONENTS, "difference")
    figure = new_figure(5.8, 4.8) if in_column() else new_figure(8.4, 4.4)
    for ax, component in zip(figure.subplots(2, 2).flat, STRAIN_COMPONENTS, strict=True):
        rest = 1e3 * np.asarray(second[component].values - first[component].values, dtype=float)
        names = [f"{component}_std"] * 2
        sigma = None
        if all(n in d for n, d in zip(names, (first, second), strict=True)):
            sigma = 1e3 * np.hypot(*(np.asarray(d[names[0]].values, float) for d in (first, second)))
        _spread(ax, rest, sigma)
        ax.set_xlabel(rf"{LABELS[component]}, B - A ({'mrad' if component == 'theta' else '$10^{-3}$'})")
    return figure


def _spread(ax: Axes, values: Array, sigma: Array | None) -> None:
    """Histogram of differences; the mean of the normal curves that their error bars stand for."""
    ax.set_yticks([])
    ax.spines[["left", "right", "top"]].set_visible(False)
    seen = np.isfinite(values)
    if not seen.any():
        say_missing(ax)
        return
    edge = max(float(np.percentile(np.abs(values[seen]), 99)) * 1.2, 1e-6)
    if sigma is not None and np.isfinite(sigma[seen]).any():
        edge = max(edge, 3 * float(np.nanmedian(sigma[seen])))
    counts, sides = np.histogram(values[seen], 60, (-edge, edge))
    ax.stairs(counts, sides, color=theme().line, fill=True, alpha=0.35)
    ax.stairs(counts, sides, color=theme().line, lw=1.1)
    ax.axvline(0, color=theme().faint, lw=0.6)
    ax.set_title(f"median {np.median(values[seen]):+.2f}", fontsize="small")
    if sigma is None:
        return
    widths = sigma[seen & np.isfinite(sigma) & (sigma > 0)]
    if widths.size:
        widths = widths[:: max(1, widths.size // 2000)]
        at = np.linspace(-edge, edge, 121)
        curve = (np.exp(-0.5 * (at[:, None] / widths) ** 2) / (math.sqrt(2 * math.pi) * widths)).mean(1)
        ax.plot(at, curve * seen.sum() * (sides[1] - sides[0]), "--", color=theme().ink, lw=0.9)


@styled
def where_found(a: xr.DataTree | xr.Dataset, b: xr.DataTree | xr.Dataset) -> Figure:
    """Where both runs, one, or none of them has a lattice.

    Parameters
    ----------
    a, b : DataTree or Dataset
        As for `two_runs`.

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    first, second = _pair(a, b, ("e_xx",), "where_found")
    one, two = (np.isfinite(d["e_xx"].values) for d in (first, second))
    place = np.where(one & two, 0, np.where(one, 1, np.where(two, 2, 3)))
    width, height = panel_size(first["e_xx"])
    below = in_column()
    figure = new_figure(width + (0 if below else 1.4), max(height, 1.4) + (0.7 if below else 0))
    ax = figure.add_subplot()
    colours = [SKY, ORANGE, BLUE, theme().missing]
    draw_map(
        ax,
        first["e_xx"].copy(data=np.where(place == 3, np.nan, place)),
        cmap=ListedColormap(colours),
        limits=(-0.5, 3.5),
        label="",
        colour_bar=False,
    )
    handles = [
        Patch(color=c, label=f"{name}: {100 * (place == i).mean():.1f} %")
        for i, (c, name) in enumerate(zip(colours, _PLACES, strict=True))
        if (place == i).any()
    ]
    where = {"loc": "upper left", "bbox_to_anchor": (0, -0.02), "ncols": 2} if below else {
        "loc": "center left", "bbox_to_anchor": (1.02, 0.5)}  # fmt: skip
    if not is_line(first["e_xx"]):
        ax.legend(handles=handles, frameon=False, **where)  # type: ignore[arg-type]
    ax.set_title("a lattice in")
    return figure


def _pair(
    a: xr.DataTree | xr.Dataset, b: xr.DataTree | xr.Dataset, components: Sequence[str], function: str
) -> tuple[xr.Dataset, xr.Dataset]:
    """The strain of both, of equal shape."""
    first, second = (group_of(results, "strain") for results in (a, b))
    for dataset in (first, second):
        need(dataset, components, function)
    shapes = [tuple(d.sizes[n] for n in ("scan_y", "scan_x")) for d in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"plot.{function} compares position by position, but A has {shapes[0][0]} x {shapes[0][1]} of "
            f"them and B {shapes[1][0]} x {shapes[1][1]}"
        )
    return first, second


def _shown(component: str) -> tuple[float, str]:
    """Factor and unit in which a component is shown."""
    return (math.degrees(1), "degrees") if component == "theta" else (100.0, "%")

"""Strain along a line, with its error band, and how lattices are oriented."""

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from .. import schema
from ..schema import STRAIN_COMPONENTS
from .scanmap import draw_map, extent, is_line, panel_size
from .style import (
    FRAME_COLOURS,
    LABELS,
    ORANGE,
    Array,
    Figure,
    group_of,
    in_column,
    need,
    new_figure,
    range_of,
    say_missing,
    styled,
    symmetric_limit,
    theme,
)

Position = tuple[float, float]


def along_line(
    dataset: xr.Dataset, names: Sequence[str], start: Position, end: Position, *, width: int = 1
) -> xr.Dataset:
    """Scan variables along a straight line, averaged across it.

    Parameters
    ----------
    dataset : Dataset
        Variables (scan_y, scan_x), with `NAME_std` where there are error bars.
    names : sequence of str
        Which variables.
    start, end : (float, float)
        Ends of the line as (y, x), in scan positions counted from 0.
    width : int
        Positions averaged across the line. The nearest position counts: nothing is interpolated, so that
        error bars keep their meaning.

    Returns
    -------
    Dataset
        `names` along `distance` (in the unit of the scan, from `start`), and `NAME_std`, that of the mean,
        for independent errors. NaN where no position has a value.
    """
    (y0, x0), (y1, x1) = start, end
    n = max(2, round(math.hypot(y1 - y0, x1 - x0)) + 1)
    sizes = dataset.sizes["scan_y"], dataset.sizes["scan_x"]
    run = np.linspace(0.0, 1.0, n)
    length = math.hypot(y1 - y0, x1 - x0) or 1.0
    normal = np.array([(x1 - x0) / length, -(y1 - y0) / length])
    across = (np.arange(width) - (width - 1) / 2)[:, None]
    y = np.rint(y0 + run * (y1 - y0) + across * normal[0]).astype(int)
    x = np.rint(x0 + run * (x1 - x0) + across * normal[1]).astype(int)
    inside = (y >= 0) & (y < sizes[0]) & (x >= 0) & (x < sizes[1])
    y, x = np.clip(y, 0, sizes[0] - 1), np.clip(x, 0, sizes[1] - 1)
    steps, unit = _steps(dataset[names[0]])
    distance = run * math.hypot((y1 - y0) * steps[0], (x1 - x0) * steps[1])
    out = {}
    for name in names:
        values = np.where(inside, np.asarray(dataset[name].values, dtype=float)[y, x], np.nan)
        seen = np.isfinite(values)
        count = np.maximum(seen.sum(0), 1)
        mean = np.where(seen.any(0), np.where(seen, values, 0).sum(0) / count, np.nan)
        out[name] = ("distance", mean, dict(dataset[name].attrs))
        if f"{name}_std" in dataset:
            std = np.asarray(dataset[f"{name}_std"].values, dtype=float)[y, x]
            error = np.sqrt(np.where(seen, np.nan_to_num(std) ** 2, 0).sum(0)) / count
            out[f"{name}_std"] = ("distance", np.where(seen.any(0), error, np.nan), {})
    return xr.Dataset(out, {"distance": ("distance", distance, {"units": unit})})


def _steps(array: xr.DataArray) -> tuple[tuple[float, float], str]:
    """Distance of neighbouring positions along both scan axes, and its unit; 1 px where they disagree."""
    steps, units = [], []
    for dim in schema.SCAN_DIMS:
        known = dim in array.coords and array.sizes[dim] > 1
        steps.append(float(array[dim].values[1] - array[dim].values[0]) if known else None)
        units.append(str(array[dim].attrs.get("units", schema.UNIT_PIXEL)) if dim in array.coords else "px")
    found = [s for s in steps if s is not None]
    if units[0] != units[1] or not found:
        return (1.0, 1.0), schema.UNIT_PIXEL
    return tuple(abs(s if s is not None else found[0]) for s in steps), units[0]  # type: ignore[return-value]


def default_line(dataset: xr.Dataset) -> tuple[Position, Position]:
    """Through the middle of the scan, along its longer axis."""
    ny, nx = dataset.sizes["scan_y"], dataset.sizes["scan_x"]
    if nx >= ny:
        return ((ny - 1) / 2, 0.0), ((ny - 1) / 2, nx - 1.0)
    return (0.0, (nx - 1) / 2), (ny - 1.0, (nx - 1) / 2)


@styled
def profile(
    results: xr.DataTree | xr.Dataset,
    start: Position | None = None,
    end: Position | None = None,
    *,
    width: int = 1,
    components: Sequence[str] = STRAIN_COMPONENTS,
) -> Figure:
    """Strain along a line with bands of one and two standard deviations, and where the line lies.

    Parameters
    ----------
    results : DataTree or Dataset
        Results of a run, or its ``/strain``. If the tree has ``/truth``, it is drawn as well.
    start, end : (float, float), optional
        Ends of the line as (y, x) in scan positions; default through the middle along the longer axis.
    width : int
        Positions averaged across the line; the bands are those of the mean.
    components : sequence of str
        One panel each.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If a component is missing.
    """
    data = group_of(results, "strain")
    need(data, components, "profile")
    if start is None or end is None:
        start, end = default_line(data)
    known = None
    if isinstance(results, xr.DataTree) and "truth" in results.children:
        known = results["truth"].dataset
    line = along_line(data, components, start, end, width=width)
    unit = line["distance"].attrs["units"]
    first = data[components[0]]
    beside = not is_line(first) and not in_column()
    map_width, map_height = panel_size(first, 2.4)
    rows = len(components)
    figure = new_figure(5.0 + (map_width + 0.2 if beside else 0), max(1.35 * rows + 0.4, map_height + 0.4))
    grid = figure.add_gridspec(rows, 2 if beside else 1, width_ratios=[map_width, 5.0] if beside else None)
    if beside:
        _draw_place(figure, grid[: max(1, rows // 2), 0], first, start, end, width, components[0])
    for i, component in enumerate(components):
        ax = figure.add_subplot(grid[i, -1])
        factor, name = (math.degrees(1), "degrees") if component == "theta" else (100.0, "%")
        at, values = line["distance"].values, line[component].values * factor
        if f"{component}_std" in line:
            std = line[f"{component}_std"].values * factor
            for k, alpha in ((2, 0.18), (1, 0.3)):
                label = f"{k} standard deviation{'s' if k > 1 else ''}"
                ax.fill_between(
                    at, values - k * std, values + k * std, color=theme().line, alpha=alpha, lw=0, label=label
                )
        ax.plot(at, values, color=theme().line, lw=1.1, label="measured")
        if known is not None:
            exact = along_line(known, [component], start, end, width=width)
            ax.plot(at, exact[component].values * factor, "--", color=theme().ink, lw=0.9, label="truth")
        ax.set_ylabel(f"{LABELS[component]} ({name})")
        ax.set_xlim(at[0], at[-1] or 1.0)
        ax.spines[["top", "right"]].set_visible(False)
        if not np.isfinite(values).any():
            say_missing(ax)
        if i < rows - 1:
            ax.tick_params(labelbottom=False)
        else:
            ax.set_xlabel(f"distance ({'positions' if unit == schema.UNIT_PIXEL else unit})")
        if i == 0:
            handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=2 if in_column() else 4, loc="outside upper right")
    return figure


def _draw_place(
    figure: Figure, cell: object, array: xr.DataArray, start: Position, end: Position, width: int, name: str
) -> None:
    """The first component, with the line on it."""
    ax = figure.add_subplot(cell)  # type: ignore[call-overload]
    factor, unit = (math.degrees(1), "degrees") if name == "theta" else (100.0, "%")
    scaled = array * factor
    limit = symmetric_limit([scaled.values], None)
    cmap = theme().rotation if name == "theta" else theme().strain
    draw_map(ax, scaled, cmap=cmap, limits=(-limit, limit), label=unit)
    (left, right, bottom, top), _ = extent(array)
    ny, nx = array.sizes["scan_y"], array.sizes["scan_x"]
    y, x = np.array([start[0], end[0]]), np.array([start[1], end[1]])
    ax.plot(
        left + (x + 0.5) * (right - left) / nx,
        top + (y + 0.5) * (bottom - top) / ny,
        color=ORANGE,
        lw=max(1.2, min(width, 6)),
        path_effects=[withStroke(linewidth=max(2.2, min(width, 6) + 1), foreground="black")],
        solid_capstyle="butt",
    )
    ax.set_title(LABELS[name])


@styled
def orientations(results: xr.DataTree | xr.Dataset, *, bins: int = 180) -> Figure:
    """Polar histogram of the direction of g1, grain by grain, and the spread of the rotation.

    Parameters
    ----------
    results : DataTree or Dataset
        Results of a run, or its ``/lattice`` (then without grains and in the detector frame).
    bins : int
        Of the full circle. A direction and its opposite are the same lattice: both are drawn.

    Returns
    -------
    Figure
        Angles from +x towards +y, clockwise on the page, in the frame of the strain. Right: the angle within
        each grain against its median.

    Raises
    ------
    ValueError
        If there is no lattice.
    """
    lattice = group_of(results, "lattice")
    need(lattice, ["g1_qy", "g1_qx"], "orientations")
    turn, grain, frame = 0.0, None, "detector"
    if isinstance(results, xr.DataTree) and "strain" in results.children:
        strain = results["strain"].dataset
        turn, frame = float(strain.attrs.get("rotation_degree", 0.0)), strain.attrs.get("frame", frame)
        grain = strain["grain"].values.ravel() if "grain" in strain else None
    angle = np.degrees(np.arctan2(lattice["g1_qy"].values, lattice["g1_qx"].values)).ravel() - turn
    good = np.isfinite(angle)
    labels = np.ones(angle.shape, int) if grain is None else grain
    if in_column():
        figure = new_figure(4.6, 7.0)
        grid = figure.add_gridspec(2, 1)
    else:
        figure = new_figure(7.4, 3.6)
        grid = figure.add_gridspec(1, 2, width_ratios=[1, 1.2])
    rose = figure.add_subplot(grid[0], projection="polar")
    rose.set_theta_direction(-1)  # type: ignore[attr-defined]
    rose.set_title(f"direction of $g_1$, {frame} frame")
    edges = np.linspace(0, 2 * np.pi, bins + 1)
    base = np.zeros(bins)
    spread = figure.add_subplot(grid[1])
    largest = _largest(labels[good])
    rest: list[Array] = []
    for number, label in enumerate(largest):
        mine = angle[good & (labels == label)]
        both = np.radians(np.concatenate([mine, mine + 180]) % 360)
        height = np.histogram(both, edges)[0].astype(float)
        colour = FRAME_COLOURS[number % len(FRAME_COLOURS)]
        rose.bar(edges[:-1], height, width=np.diff(edges), bottom=base, align="edge", color=colour, lw=0)
        base += height
        folded = (mine - _middle(mine) + 90) % 180 - 90
        rest.append(folded)
        name = f"grain {label}" if len(largest) > 1 else "all positions"
        _stairs(spread, folded, colour, f"{name}: {np.std(folded):.3f} degrees")
    rose.set_yticklabels([])
    spread.set_xlabel("angle against the median (degrees)")
    spread.set_ylabel("positions")
    spread.spines[["top", "right"]].set_visible(False)
    if rest:
        low, high = range_of(np.concatenate(rest), 0.5, 99.5)
        spread.set_xlim(low, high)
        spread.legend(
            frameon=False, title="standard deviation", loc="lower left", bbox_to_anchor=(0, 1.0), ncols=1
        )
    else:
        say_missing(spread)
    return figure


def _largest(labels: NDArray[np.integer], most: int = 6) -> list[int]:
    """Labels of the largest grains, 0 (none) left out."""
    values, counts = np.unique(labels[labels > 0], return_counts=True)
    return [int(v) for v in values[np.argsort(-counts)][:most]]


def _middle(degrees: Array) -> float:
    """Mean direction of axes, which repeat after 180 degrees."""
    doubled = np.radians(2 * degrees)
    return math.degrees(math.atan2(np.sin(doubled).mean(), np.cos(doubled).mean())) / 2


def _stairs(ax, values: Array, colour: str, label: str) -> None:
    low, high = range_of(values, 0.5, 99.5)
    counts, edges = np.histogram(values, 60, (low, high))
    ax.stairs(counts, edges, color=colour, lw=1.2, label=label)


@styled
def grains(results: xr.DataTree | xr.Dataset) -> Figure:
    """The grain of every position: its label in colour, its share of the scan in words.

    Parameters
    ----------
    results : DataTree or Dataset
        Results of a run, or its ``/strain`` with `grain` (scan_y, scan_x), 0 where there is no lattice.

    Returns
    -------
    Figure
        The six largest grains have colours of their own; smaller ones share a grey.

    Raises
    ------
    ValueError
        If there are no grain labels.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    data = group_of(results, "strain")
    need(data, ["grain"], "grains")
    labels = data["grain"]
    values = np.asarray(labels.values)
    largest = _largest(values.ravel())
    shown = np.full(values.shape, np.nan)
    shown[values > 0] = len(largest)
    for number, label in enumerate(largest):
        shown[values == label] = number
    width, height = panel_size(labels)
    figure = new_figure(width + 1.6, max(height, 1.6))
    ax = figure.add_subplot()
    colours = [*FRAME_COLOURS[: len(largest)], theme().faint]
    draw_map(
        ax,
        labels.copy(data=shown),
        cmap=ListedColormap(colours),
        limits=(-0.5, len(largest) + 0.5),
        label="",
        colour_bar=False,
    )
    total = max(1, values.size)
    handles = [
        Patch(color=c, label=f"grain {g}: {100 * (values == g).sum() / total:.1f} %")
        for g, c in zip(largest, colours, strict=False)
    ]
    others = int((values > 0).sum() - sum((values == g).sum() for g in largest))
    if others:
        handles.append(Patch(color=colours[-1], label=f"smaller ones: {100 * others / total:.1f} %"))
    none = int((values == 0).sum())
    if none:
        handles.append(Patch(color=theme().missing, label=f"no lattice: {100 * none / total:.1f} %"))
    if not is_line(labels):
        ax.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    n = len(np.unique(values[values > 0]))
    ax.set_title(f"{n} grain{'s' if n != 1 else ''}")
    return figure

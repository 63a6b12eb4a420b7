"""Figures that compare: measured strain with the truth, detectors with each other, and histograms."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from .. import schema
from ..schema import STRAIN_COMPONENTS
from .scanmap import draw_map, edges, is_line, panel_size
from .style import (
    BLUE,
    GREEN,
    LABELS,
    ORANGE,
    PINK,
    SKY,
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


def _line_of(array: xr.DataArray) -> tuple[str, str]:
    """Dimension to draw a profile along, and the one to average: the profile follows the larger change."""
    values = np.asarray(array.values, dtype=float)
    if min(values.shape) == 1:
        along = "scan_x" if array.sizes["scan_y"] == 1 else "scan_y"
    else:
        with np.errstate(invalid="ignore"):
            spread = [float(np.nanvar(np.nan_to_num(values.mean(axis=a)))) for a in (0, 1)]
        along = "scan_x" if spread[0] >= spread[1] else "scan_y"
    return along, "scan_y" if along == "scan_x" else "scan_x"


@styled
def truth(
    results: xr.DataTree | xr.Dataset,
    known: xr.Dataset | None = None,
    *,
    components: Sequence[str] = STRAIN_COMPONENTS,
) -> Figure:
    """Known strain, measured strain, their difference, and a profile with its error band, per component.

    Parameters
    ----------
    results : DataTree or Dataset
        Results of a run on simulated data, or their ``/strain``.
    known : Dataset, optional
        `e_xx, ...` (scan_y, scan_x) of the simulation; default ``/truth`` of the results.
    components : sequence of str
        One row each.

    Returns
    -------
    Figure
        The profile is the mean over the other scan axis, the band the mean standard deviation of one
        position. A constant offset between the two references (whole-scan medians) is left in.
    """
    data = group_of(results, "strain")
    known = group_of(results, "truth") if known is None else known
    need(data, components, "truth")
    need(known, components, "truth")
    data, known = xr.align(data, known, join="inner")
    line = is_line(data[components[0]])
    figure, grid = _truth_axes(data[components[0]], len(components))
    for number, (row, component) in enumerate(zip(grid, components, strict=True)):
        factor, unit = (math.degrees(1), "degrees") if component == "theta" else (100.0, "%")
        measured, exact = data[component] * factor, known[component] * factor
        difference = measured - exact.values
        std = data[f"{component}_std"] * factor if f"{component}_std" in data else None
        if not line:
            top = symmetric_limit([exact.values, measured.values], None)
            rest = symmetric_limit([difference.values], None)
            cmap = theme().rotation if component == "theta" else theme().strain
            for ax, array, limit, name in zip(
                row,
                (exact, measured, difference),
                (top, top, rest),
                ("truth", "measured", "difference"),
                strict=False,
            ):
                draw_map(
                    ax,
                    array,
                    cmap=cmap,
                    limits=(-limit, limit),
                    label="",
                    bar=number == 0 and name == "truth",
                )
                if number == 0:
                    ax.set_title(name)
            row[0].set_ylabel(f"{LABELS[component]} ({unit})")
            values = difference.values / factor
            if np.isfinite(values).any():
                rms = 1e3 * math.sqrt(np.nanmean(values**2))
                row[2].set_xlabel(rf"rms {rms:.2f}$\times10^{{-3}}$", loc="left", labelpad=1)
        draw_profile(row[-1], exact, measured, std, unit, legend=number == 0)
        if line:
            row[-1].set_title(LABELS[component], loc="left")
    return figure


def _truth_axes(array: xr.DataArray, n: int) -> tuple[Figure, list[list[Axes]]]:
    """A figure with the axes of each of `n` components: three maps and a profile, or the profile alone."""
    if is_line(array):
        figure = new_figure(6.5, 2.0 * n)
        return figure, [[ax] for ax in figure.subplots(n, 1, squeeze=False)[:, 0]]
    below = in_column()
    width, height = panel_size(array, 1.7 if below else 2.3)
    if below:
        figure = new_figure(3 * width, n * (height + 1.9))
        cells = figure.add_gridspec(2 * n, 3, height_ratios=[height, 1.9] * n)
        where = [[*(cells[2 * i, k] for k in range(3)), cells[2 * i + 1, :]] for i in range(n)]
    else:
        figure = new_figure(3 * width + 3.2, n * max(height, 1.6))
        cells = figure.add_gridspec(n, 4, width_ratios=[width, width, width, 3.2])
        where = [[cells[i, k] for k in range(4)] for i in range(n)]
    return figure, [[figure.add_subplot(cell) for cell in row] for row in where]


def draw_profile(
    ax: Axes,
    exact: xr.DataArray,
    measured: xr.DataArray,
    std: xr.DataArray | None,
    unit: str,
    *,
    legend: bool,
    names: tuple[str, str] = ("measured", "truth"),
) -> None:
    """Measurement and truth, or two measurements, along the scan; the band is that of the first."""
    along, across = _line_of(exact)
    low, high, length = edges(measured, along)
    n = measured.sizes[along]
    at = np.linspace(low, high, 2 * n + 1)[1::2]

    def mean(array: xr.DataArray) -> Array:
        values = np.moveaxis(np.asarray(array.values, dtype=float), 0 if across == "scan_y" else 1, 0)
        seen = np.isfinite(values)
        return np.where(seen.any(0), np.where(seen, values, 0).sum(0) / np.maximum(seen.sum(0), 1), np.nan)

    line = mean(measured)
    if std is not None:
        band = mean(std)
        ax.fill_between(at, line - band, line + band, color=SKY, alpha=0.4, lw=0, label="standard deviation")
    ax.plot(at, line, color=theme().line, lw=1.2, label=names[0])
    ax.plot(at, mean(exact), "--", color=theme().ink, lw=1, label=names[1])
    ax.set_xlim(low, high)
    ax.set_xlabel(f"{along} ({'position' if length == schema.UNIT_PIXEL else length})")
    ax.set_ylabel(unit)
    if legend:
        ax.legend(
            frameon=False,
            fontsize="x-small",
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=3,
            columnspacing=1,
        )


@styled
def methods(results: Mapping[str, xr.Dataset], known: xr.Dataset | None = None) -> Figure:
    """Strain of several detectors side by side, below the truth if it is known.

    Parameters
    ----------
    results : mapping of name to Dataset
        `e_xx, e_yy, e_xy, theta` (scan_y, scan_x) of each.
    known : Dataset, optional
        The same of the simulation; then each panel says its rms error.
    """
    if not results:
        raise ValueError("no results to compare; give a mapping of name to strain dataset")
    rows: dict[str, xr.Dataset] = ({} if known is None else {"truth": known}) | dict(results)
    for dataset in rows.values():
        need(dataset, STRAIN_COMPONENTS, "methods")
    base = known if known is not None else next(iter(results.values()))
    factors = {c: math.degrees(1) if c == "theta" else 100.0 for c in STRAIN_COMPONENTS}
    limit = symmetric_limit([base[c].values * factors[c] for c in STRAIN_COMPONENTS[:3]], None)
    turn = symmetric_limit([base["theta"].values * factors["theta"]], None)
    line = is_line(base["e_xx"])
    width, height = panel_size(base["e_xx"], 2.2)
    figure = new_figure(4 * width, len(rows) * (height + 0.1) + 0.2)
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for i, (name, dataset) in enumerate(rows.items()):
        for j, component in enumerate(STRAIN_COMPONENTS):
            is_theta = component == "theta"
            top = turn if is_theta else limit
            array = dataset[component] * factors[component]
            draw_map(
                grid[i, j],
                array,
                cmap=theme().rotation if is_theta else theme().strain,
                limits=(-top, top),
                label="degrees" if is_theta else "%",
                bar=i == j == 0,
                colour_bar=j >= 2,
                std=dataset[f"{component}_std"] * factors[component]
                if f"{component}_std" in dataset
                else None,
            )
            title = LABELS[component] if i == 0 else ""
            if known is not None and name != "truth":
                error = np.asarray(dataset[component].values - known[component].values, dtype=float)
                if np.isfinite(error).any():
                    title = rf"rms error {1e3 * math.sqrt(np.nanmean(error**2)):.2f}$\times10^{{-3}}$"
            grid[i, j].set_title(title)
        if line:
            grid[i, 0].set_ylabel(f"{name}\n{grid[i, 0].get_ylabel()}")
        else:
            grid[i, 0].set_ylabel(name, fontsize="large")
    return figure


@styled
def disagreement(results: xr.DataTree) -> Figure:
    """How far a second method is from the first, as a map, in error bars, and what was made of it.

    Parameters
    ----------
    results : DataTree
        Results of a run with a second opinion.

    Returns
    -------
    Figure
        Two or three panels; the third, if there is anything to show, marks patterns unlike those of the
        network's training, and where the second method was taken instead.
    """
    second, strain_ = group_of(results, "second"), group_of(results, "strain")
    need(second, ("disagreement", "disagreement_sigma"), "disagreement")
    apart = second["disagreement"] * 1e3
    top = max(1e-3, range_of(np.abs(apart.values), 2, 98)[1])
    maps = [
        (apart, (0.0, top), "difference of the strain", r"$10^{-3}$"),
        (second["disagreement_sigma"], (0.0, 5.0), "in error bars of both", ""),
    ]
    marked = xr.zeros_like(apart).where(strain_["valid"])
    if "outside_training" in strain_:
        marked = marked.where(strain_["outside_training"].values == 0, 1.0)
    if "source" in strain_:
        marked = marked.where(strain_["source"].values != 2, 2.0)
    if float(marked.max()) > 0:
        maps.append((marked, (0.0, 2.0), "1 unlike training, 2 second method", ""))
    width, height = panel_size(apart)
    line = is_line(apart)
    columns = 1 if line or in_column() else len(maps)
    rows = len(maps) // columns if columns > 1 else len(maps)
    figure = new_figure(columns * (6.5 if line else width + 0.6), rows * (2.0 if line else height + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, (array, limits, title, unit) in zip(axes.flat, maps, strict=True):
        draw_map(ax, array, cmap="cividis", limits=limits, label=unit, bar=ax is axes[0, 0])
        ax.set_title(title)
    return figure


@styled
def numbers(results: xr.DataTree) -> Figure:
    """Histograms over the scan: peaks found and indexed, residual of the fit, strain, error bars.

    Parameters
    ----------
    results : DataTree
        Results of a run.
    """
    strain_, lattice, virtual_ = (group_of(results, n) for n in ("strain", "lattice", "virtual"))
    figure = new_figure(5.8, 6.6) if in_column() else new_figure(8.4, 4.6)
    axes = list(figure.subplots(*((3, 2) if in_column() else (2, 3))).flat)
    counts = {"indexed": lattice["n_indexed"].values}
    if "n_peaks" in virtual_:
        counts = {"found": virtual_["n_peaks"].values} | counts
    top = max(1, int(max(float(np.nanmax(v)) for v in counts.values())))
    bins = np.arange(-0.5, top + 1.5, max(1, math.ceil(top / 60)))
    for (name, values), colour in zip(
        counts.items(), (SKY, BLUE) if len(counts) == 2 else (BLUE,), strict=True
    ):
        axes[0].hist(np.asarray(values, dtype=float).ravel(), bins, color=colour, alpha=0.75, label=name)
    axes[0].set_xlabel("peaks per pattern")
    axes[0].legend(frameon=False, loc="upper left")
    _histogram(axes[1], lattice["fit_error"].values, "residual of the fit (px)", theme().line)
    for ax, names, unit, factor in (
        (axes[2], ("e_xx", "e_yy", "e_xy"), "strain (%)", 100.0),
        (axes[4], ("e_xx_std", "e_yy_std", "e_xy_std"), r"error bars of the strain ($10^{-3}$)", 1e3),
    ):
        for name, colour, style in zip(names, (ORANGE, theme().line, GREEN), ("-", "--", ":"), strict=True):
            if name in strain_:
                _histogram(ax, strain_[name].values * factor, unit, colour, LABELS[name[:4]], style)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, loc="upper right")
    _histogram(axes[3], strain_["theta"].values * math.degrees(1), r"rotation $\theta$ (degrees)", PINK)
    if "theta_std" in strain_:
        _histogram(axes[5], strain_["theta_std"].values * 1e3, r"error bar of $\theta$ (mrad)", PINK)
    else:
        axes[5].set_axis_off()
    for ax in axes:
        ax.set_yticks([])
        ax.spines[["left", "right", "top"]].set_visible(False)
    figure.supylabel("positions", fontsize="medium")
    return figure


def _histogram(
    ax: Axes, values: ArrayLike, name: str, colour: str, label: str | None = None, style: str = "-"
) -> None:
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    ax.set_xlabel(name)
    if not array.size:
        say_missing(ax)
        return
    low, high = range_of(array, 0.5, 99.5)
    height, edges = np.histogram(array, 60, (low, high))
    ax.stairs(height, edges, color=colour, lw=1.2, ls=style, label=label, fill=False)
    if label is None:
        ax.stairs(height, edges, color=colour, alpha=0.35, fill=True)
        ax.set_title(f"median {np.median(array):.3g}", fontsize="small")

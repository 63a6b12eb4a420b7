"""Figures of diffraction patterns: detection, Bragg vector map, calibration."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray

from .. import schema
from .style import (
    FRAME_COLOURS,
    ORANGE,
    RED,
    SKY,
    Array,
    Figure,
    arrow,
    group_of,
    in_column,
    new_figure,
    styled,
    theme,
)


def show_pattern(ax: Axes, pattern: ArrayLike, *, power: float = 0.5, cmap: str = "gray") -> None:
    """One diffraction pattern, brightness compressed by a power, without the outermost values."""
    image = np.asarray(pattern, dtype=float)
    finite = image[np.isfinite(image)]
    low, high = (float(v) for v in np.percentile(finite, [1, 99.9])) if finite.size else (0.0, 1.0)
    scaled = np.clip(image - low, 0, None) ** power
    top = (high - low) ** power if high > low else 1.0
    colours = mpl.colormaps[cmap].with_extremes(bad=theme().missing)
    ax.imshow(np.ma.masked_invalid(scaled), cmap=colours, vmin=0, vmax=top)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlim(-0.5, image.shape[1] - 0.5)
    ax.set_ylim(image.shape[0] - 0.5, -0.5)


def draw_peaks(
    ax: Axes,
    qy: ArrayLike,
    qx: ArrayLike,
    *,
    radius_px: float,
    lattice: tuple[ArrayLike, ArrayLike] | None = None,
    on_lattice: ArrayLike | None = None,
) -> None:
    """Open circles at the peaks, dotted where they are off the lattice; a small cross at each lattice site.

    `lattice` is the origin (2,) and the vectors (2, 2), in px, (y, x).
    """
    y, x = (np.asarray(v, dtype=float).ravel() for v in (qy, qx))
    good = np.isfinite(y) & np.isfinite(x)
    on = np.ones(y.shape, dtype=bool) if on_lattice is None else np.asarray(on_lattice, dtype=bool).ravel()
    for py, px, fits in zip(y[good], x[good], on[good], strict=True):
        style: dict[str, Any] = (
            {"ec": ORANGE, "lw": 1.0} if fits else {"ec": SKY, "lw": 0.7, "ls": (0, (1, 1.5))}
        )
        ax.add_patch(Circle((px, py), max(radius_px, 1.5), fc="none", **style))
    if lattice is None:
        return
    origin, g = (np.asarray(v, dtype=float) for v in lattice)
    if not (np.isfinite(origin).all() and np.isfinite(g).all()) or abs(np.linalg.det(g)) < 1e-9:
        return
    y1, y0 = ax.get_ylim()
    x0, x1 = ax.get_xlim()
    corners = np.array([(a, b) for a in (y0, y1) for b in (x0, x1)])
    span = np.abs((corners - origin) @ np.linalg.inv(g)).max(0).round().astype(int) + 1
    if span.prod() > 4000:
        return
    h, k = np.mgrid[-span[0] : span[0] + 1, -span[1] : span[1] + 1]
    sites = origin + np.stack([h.ravel(), k.ravel()], axis=1) @ g
    inside = (sites > (y0, x0)).all(1) & (sites < (y1, x1)).all(1)
    ax.plot(sites[inside, 1], sites[inside, 0], "+", color=RED, ms=4, mew=0.7)


@styled
def detection(
    patterns: ArrayLike | xr.Dataset,
    peaks: xr.Dataset | Mapping[str, ArrayLike] | None = None,
    lattice: xr.Dataset | Mapping[str, ArrayLike] | None = None,
    *,
    at: Sequence[tuple[int, int]] | tuple[int, int] | None = None,
    radius_px: float = 4.0,
    max_peak_spacing: float | None = None,
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    power: float = 0.5,
) -> Figure:
    """Patterns with the detected disks, and the fitted lattice where there is one.

    Parameters
    ----------
    patterns : ndarray (n, qy, qx) or (qy, qx), or a datacube Dataset
        A datacube needs `at`; only those patterns are read.
    peaks : Dataset or mapping
        `peak_qy`, `peak_qx`: of the scan (scan_y, scan_x, peak) with `at`, else (n, peak). px, NaN-padded.
    lattice : Dataset or mapping, optional
        `origin_qy, origin_qx, g1_qy, ..., g2_qx` of the same positions, px.
    at : (scan_y, scan_x) or a sequence of such
        Positions to show.
    radius_px : float
        Radius of the circles: that of the disks.
    max_peak_spacing : float, optional
        A peak farther from its lattice site is dotted; default a sixth of the shorter vector.
    titles : sequence of str, optional
    columns : int, optional
        Patterns side by side; default 3, or 2 in a journal column.
    power : float
        Brightness is the counts to this power.

    Raises
    ------
    ValueError
        If the arrays do not fit together, or positions lie outside the scan.
    """
    positions = None if at is None else [tuple(p) for p in np.atleast_2d(np.asarray(at, dtype=int)).tolist()]
    images, py, px = _select(patterns, peaks, positions)
    fits = _select_lattice(lattice, positions, len(images))
    columns = min(columns or (2 if in_column() else 3), len(images))
    rows = math.ceil(len(images) / columns)
    aspect = images.shape[1] / images.shape[2]
    figure = new_figure(2.6 * columns, rows * (2.6 * aspect + 0.3))
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for i, (ax, image) in enumerate(zip(axes, images, strict=False)):
        show_pattern(ax, image, power=power)
        on = None
        if fits is not None:
            on = near_lattice(py[i], px[i], *fits[i], reach=max_peak_spacing)
        draw_peaks(
            ax, py[i], px[i], radius_px=radius_px, lattice=None if fits is None else fits[i], on_lattice=on
        )
        name = (
            titles[i]
            if titles
            else ("" if positions is None else f"scan {positions[i][0]}, {positions[i][1]}")
        )
        n = int(np.isfinite(py[i]).sum())
        ax.set_title(f"{name}: {n} peaks" if name else f"{n} peaks", fontsize="medium")
        for spine in ax.spines.values():
            spine.set(color=FRAME_COLOURS[i % len(FRAME_COLOURS)], linewidth=2)
    for ax in axes[len(images) :]:
        ax.set_axis_off()
    return figure


def near_lattice(
    qy: ArrayLike, qx: ArrayLike, origin: ArrayLike, g: ArrayLike, *, reach: float | None = None
) -> NDArray[np.bool_]:
    """Which peaks (P,) lie within `reach` px of a lattice site; default a sixth of the shorter vector."""
    points = np.stack([np.asarray(qy, dtype=float), np.asarray(qx, dtype=float)], axis=-1)
    origin, g = np.asarray(origin, dtype=float), np.asarray(g, dtype=float)
    if not (np.isfinite(origin).all() and np.isfinite(g).all()):
        return np.zeros(points.shape[:-1], dtype=bool)
    index = (points - origin) @ np.linalg.inv(g)
    distance = np.linalg.norm((index - np.rint(index)) @ g, axis=-1)
    return distance <= (np.linalg.norm(g, axis=1).min() / 6 if reach is None else reach)  # NaN compares False


def _select(patterns: Any, peaks: Any, positions: list[tuple[int, int]] | None) -> tuple[Array, Array, Array]:
    """Images (n, qy, qx) and peak positions (n, P) to draw."""
    if isinstance(patterns, xr.Dataset):
        if positions is None:
            raise ValueError("plot.detection of a datacube needs positions: at=(scan_y, scan_x)")
        ny, nx = patterns.sizes["scan_y"], patterns.sizes["scan_x"]
        outside = [p for p in positions if not (0 <= p[0] < ny and 0 <= p[1] < nx)]
        if outside:
            raise ValueError(f"position {outside[0]} is outside the scan of {ny} x {nx}; both count from 0")
        images = np.stack([patterns["intensity"].isel(scan_y=y, scan_x=x).values for y, x in positions])
    else:
        images = np.asarray(patterns, dtype=float)
        images = images[None] if images.ndim == 2 else images
    if images.ndim != 3:
        raise ValueError(f"patterns have shape {images.shape}, needed is (n, qy, qx) or (qy, qx)")
    if peaks is None:
        nothing = np.full((len(images), 0), np.nan)
        return images.astype(float), nothing, nothing
    y, x = (peaks[k] for k in ("peak_qy", "peak_qx"))
    if isinstance(y, xr.DataArray) and "scan_y" in y.dims and positions is not None:
        y, x = ([v.isel(scan_y=a, scan_x=b).values for a, b in positions] for v in (y, x))
    arrays = [np.atleast_2d(np.asarray(v, dtype=float)) for v in (y, x)]
    arrays = [a.reshape(-1, a.shape[-1]) for a in arrays]
    if len(arrays[0]) != len(images):
        raise ValueError(
            f"{len(images)} patterns, but peaks of {len(arrays[0])}; give both for the same positions"
        )
    return images.astype(float), arrays[0], arrays[1]


def _select_lattice(
    lattice: Any, positions: list[tuple[int, int]] | None, n: int
) -> list[tuple[Array, Array]] | None:
    if lattice is None:
        return None
    values = []
    for name in schema.LATTICE_PARAMETERS:
        v = lattice[name]
        if isinstance(v, xr.DataArray) and "scan_y" in v.dims and positions is not None:
            v = [float(v.isel(scan_y=a, scan_x=b)) for a, b in positions]
        values.append(np.asarray(v, dtype=float).ravel())
    table = np.stack(values, axis=-1)
    if len(table) != n:
        raise ValueError(f"{n} patterns, but {len(table)} lattices; give both for the same positions")
    return [(row[:2], row[2:].reshape(2, 2)) for row in table]


@styled
def bragg_vector_map(
    results: xr.DataTree | xr.Dataset | xr.DataArray,
    *,
    basis: ArrayLike | None = None,
    origin: ArrayLike | None = None,
) -> Figure:
    """Bragg vector map with the lattice vectors.

    Parameters
    ----------
    results : DataTree, Dataset or DataArray (qy, qx)
        Results of a run, its ``/diffraction``, or a map of `fcunet.bragg_vector_map`.
    basis : array_like, shape (2, 2), optional
        g1, g2 as (y, x) in px; default those of the run.
    origin : array_like, shape (2,), optional
        (y, x) px where the vectors start; default that of the run.
    """
    data = (
        results if isinstance(results, xr.DataArray) else group_of(results, "diffraction")["bragg_vector_map"]
    )
    name = "Bragg vector map"
    if isinstance(results, xr.DataTree) and "lattice" in results.children:
        attrs = results["lattice"].dataset.attrs
        prefix = "cepstral_" if "cepstral_basis_px" in attrs else ""
        name = "peaks of the cepstra" if prefix else name
        basis = attrs.get(prefix + "basis_px") if basis is None else basis
        origin = attrs.get(prefix + "origin_px") if origin is None else origin
    image = np.asarray(data.values, dtype=float)
    figure = new_figure(4.4, 4.4 * image.shape[0] / image.shape[1] + 0.3)
    ax = figure.add_subplot()
    show_pattern(ax, image, power=0.25, cmap="magma")
    ax.set_title(f"{name} (fourth root)")
    if basis is not None:
        g = np.asarray(basis, dtype=float)
        start = np.asarray(origin, dtype=float) if origin is not None else (np.array(image.shape) - 1) / 2
        if np.isfinite(g).all() and np.isfinite(start).all():
            for i, vector in enumerate(g, 1):
                tip = start + vector
                arrow(ax, start, tip, SKY, 1.6)
                beyond = tip + 0.25 * vector
                edge = [withStroke(linewidth=2, foreground="black")]
                look: dict[str, Any] = {"color": SKY, "ha": "center", "va": "center", "fontsize": "large"}
                ax.text(beyond[1], beyond[0], f"$g_{i}$", path_effects=edge, **look)
            lengths = np.linalg.norm(g, axis=1)
            ax.set_xlabel(
                f"$g_1$ {lengths[0]:.2f} px, $g_2$ {lengths[1]:.2f} px, {lattice_angle(g):.2f} degrees"
            )
    return figure


def lattice_angle(g: ArrayLike) -> float:
    """Acute angle between the rows of `g` (2, 2), degrees."""
    a, b = np.asarray(g, dtype=float)
    cosine = abs(float(a @ b)) / (np.linalg.norm(a) * np.linalg.norm(b))
    return math.degrees(math.acos(min(1.0, float(cosine))))


@styled
def calibration(measured: Any, mean: ArrayLike) -> Figure:
    """What was measured, drawn on the mean pattern: centre, disk radius, bad pixels; and the probe.

    Parameters
    ----------
    measured : Calibration
        From `fcunet.calibrate.calibrate`.
    mean : ndarray, shape (qy, qx)
        Mean pattern.
    """
    if in_column():
        figure = new_figure(5.8, 5.6)
        cells = figure.add_gridspec(2, 2)
        axes = [figure.add_subplot(cells[i]) for i in ((0, 0), (0, 1), (1, slice(None)))]
    else:
        figure = new_figure(8.6, 3.1)
        axes = list(figure.subplots(1, 3, width_ratios=[1, 1, 1.1]))
    draw_calibration(axes, measured, mean)
    return figure


def draw_calibration(axes: Sequence[Axes], measured: Any, mean: ArrayLike) -> None:
    """The three panels of `calibration`: mean pattern, probe, profile of the edge."""
    image = np.asarray(mean, dtype=float)
    radius = measured.probe_radius_px
    show_pattern(axes[0], image, power=0.3)
    cy, cx = measured.centre
    axes[0].add_patch(Circle((cx, cy), max(radius, 1.5), fc="none", ec=ORANGE, lw=1.2))
    axes[0].plot(cx, cy, "+", color=ORANGE, ms=5)
    faults = np.argwhere(measured.bad_pixels) if measured.n_hot + measured.n_dead <= 500 else np.empty((0, 2))
    if measured.n_masked == 0 and len(faults):
        axes[0].plot(faults[:, 1], faults[:, 0], "x", color=SKY, ms=4, mew=0.8)
    axes[0].set_title(f"mean pattern,\ncentre ({cy:.1f}, {cx:.1f}) px", fontsize="medium")
    probe = np.asarray(measured.probe, dtype=float)
    total = probe.sum()
    y, x = np.arange(probe.shape[0]), np.arange(probe.shape[1])
    py, px = float((probe.sum(1) * y).sum() / total), float((probe.sum(0) * x).sum() / total)
    reach = max(8.0, 2.2 * radius + 3)
    axes[1].imshow(probe, cmap="gray", vmin=0, vmax=probe.max())
    axes[1].set_xticks([])
    axes[1].set_yticks([])
    axes[1].add_patch(Circle((px, py), radius, fc="none", ec=ORANGE, lw=1.2))
    axes[1].set_xlim(px - reach, px + reach)
    axes[1].set_ylim(py + reach, py - reach)
    axes[1].set_title(f"probe ({measured.probe_source}),\nradius {radius:.2f} px", fontsize="medium")
    r = np.hypot(y[:, None] - py, x[None] - px)
    bins = np.arange(0, reach, 0.5)
    index = np.digitize(r.ravel(), bins) - 1
    near = index < len(bins) - 1
    count = np.bincount(index[near], minlength=len(bins))
    profile = np.bincount(index[near], probe.ravel()[near], minlength=len(bins)) / np.maximum(count, 1)
    seen = count > 0
    axes[2].plot(
        (bins + 0.25)[seen], profile[seen] / (profile.max() or 1.0), ".-", color=theme().line, ms=4, lw=1
    )
    axes[2].axvline(radius, color=ORANGE, lw=1)
    axes[2].axvspan(
        radius - measured.edge_sigma_px, radius + measured.edge_sigma_px, color=ORANGE, alpha=0.2, lw=0
    )
    axes[2].set_xlabel("distance from the middle (px)")
    axes[2].set_ylabel("intensity")
    axes[2].set_xlim(0, reach)
    axes[2].set_title(f"edge,\nstandard deviation {measured.edge_sigma_px:.2f} px", fontsize="medium")

"""The picture of ``fcunet calibrate``: what each number rests on; and of the descan after a run."""

import math
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse as EllipsePatch

from .. import schema
from ..kernels.ellipse import undistort
from .patterns import draw_calibration, show_pattern
from .scanmap import draw_map
from .style import (
    BLUE,
    ORANGE,
    RED,
    SKY,
    Array,
    Figure,
    in_column,
    new_figure,
    range_of,
    round_up,
    say_missing,
    styled,
    theme,
)


@styled
def calibration_evidence(measured: Any) -> Figure:
    """Beam, descan with its residuals, and whatever else was measured.

    Parameters
    ----------
    measured : fcunet.recalibrate.Measured
    """
    extra = [
        (measured.ring is not None, _draw_ring),
        (measured.crystal is not None, _draw_crystal),
        (measured.rotation is not None, _draw_rotation),
        (measured.templates is not None, _draw_templates),
    ]
    chosen = [draw for there, draw in extra if there]
    rows = 1 + (measured.origin is not None) + math.ceil(len(chosen) / 3)
    figure = new_figure(9.6, 3.0 * rows)
    grid = figure.add_gridspec(rows, 3)
    axes = [figure.add_subplot(grid[0, i]) for i in range(3)]
    draw_calibration(axes, measured.calibration, _mean(measured))
    row = 1
    if measured.origin is not None:
        _draw_origin([figure.add_subplot(grid[1, i]) for i in range(3)], measured.origin)
        row = 2
    for i, draw in enumerate(chosen):
        draw(figure.add_subplot(grid[row + i // 3, i % 3]), measured)
    return figure


def _mean(measured: Any) -> Array:
    from ..distortion import centred_mean

    return centred_mean(measured.sample, measured.calibration)[0]


def _draw_origin(axes: list[Axes], origin: Any) -> None:
    """The surface as arrows, the residual over the scan, and its distribution."""
    y, x = (origin[f"origin_{d}"].values for d in schema.PATTERN_DIMS)
    ry, rx = (origin[f"residual_{d}"].values for d in schema.PATTERN_DIMS)
    attrs, scan = origin.attrs, y.shape
    steps = [max(1, math.ceil(n / 12)) for n in scan]
    at = np.ix_(*(np.arange(s // 2, n, s) for n, s in zip(scan, steps, strict=True)))
    iy, ix = np.indices(scan)
    dy, dx = y - y.mean(), x - x.mean()
    _arrows(axes[0], ix[at], iy[at], dx[at], dy[at], BLUE)
    reach = float(np.hypot(np.ptp(y), np.ptp(x)))
    axes[0].set_title(
        f"descan ({attrs['model']}): {reach:.2f} px\nover the scan, by {attrs['method']}", fontsize=9
    )
    distance = np.hypot(ry, rx)
    seen = np.isfinite(distance)
    limit = max(round_up(float(np.percentile(distance[seen], 95))), 0.05)
    if seen.mean() > 0.5:
        image: Any = axes[1].imshow(np.ma.masked_invalid(distance), cmap="viridis", vmin=0, vmax=limit)
        axes[1].set_facecolor(theme().missing)
    else:
        image = axes[1].scatter(
            ix[seen], iy[seen], c=distance[seen], cmap="viridis", vmin=0, vmax=limit, s=14, marker="s", lw=0
        )
    axes[1].figure.colorbar(image, ax=axes[1], shrink=0.8, label="px")
    axes[1].set_title(f"measured minus surface,\n{attrs['n_measured']} positions", fontsize=9)
    for ax in axes[:2]:
        ax.set_xlim(-0.5, scan[1] - 0.5)
        ax.set_ylim(scan[0] - 0.5, -0.5)
        ax.set_aspect("equal" if 0.2 < scan[0] / scan[1] < 5 else "auto")
        ax.set_xlabel("scan_x")
        ax.set_ylabel("scan_y")
    edge = 3 * max(attrs["scatter_px"], 0.02)
    bins = np.linspace(-edge, edge, 31).tolist()
    for values, colour, name in ((ry[seen], ORANGE, "row"), (rx[seen], BLUE, "column")):
        axes[2].hist(np.clip(values, -edge, edge), bins, histtype="step", color=colour, label=name)
    axes[2].legend(frameon=False)
    axes[2].set_xlabel("residual (px)")
    axes[2].set_yticks([])
    axes[2].set_title(f"scatter {attrs['scatter_px']:.3f} px,\n{attrs['n_outliers']} outliers", fontsize=9)


def _draw_ring(ax: Axes, measured: Any) -> None:
    """The ring and the ellipse through it."""
    fit = measured.ring
    show_pattern(ax, measured.mean, power=0.3)
    ratio = math.sqrt(fit.ellipse.ratio)
    for size, colour, style in ((ratio, ORANGE, "-"), (1.0, SKY, ":")):
        ax.add_patch(
            EllipsePatch(
                (fit.centre[1], fit.centre[0]),
                2 * fit.radius_px * size,
                2 * fit.radius_px / size,
                angle=fit.ellipse.angle_degree,
                fc="none",
                ec=colour,
                ls=style,
                lw=1,
            )
        )
    ax.set_title(
        f"ring of {fit.radius_px:.1f} px, axis ratio\n{fit.ellipse.ratio:.4f} (dotted: circle)", fontsize=9
    )


def _draw_crystal(ax: Axes, measured: Any) -> None:
    """Lengths of the disks' vectors against the rings of the crystal."""
    fit = measured.crystal
    q = np.hypot(*undistort(measured.vectors, fit.ellipse).T) * fit.q_pixel
    top = float(np.percentile(q, 98))
    ax.hist(q, np.linspace(0, top * 1.05, 120).tolist(), color=BLUE, histtype="stepfilled")
    for ring in measured.rings[measured.rings < top * 1.05]:
        ax.axvline(ring, color=RED, lw=0.6, alpha=0.6)
    ax.set_xlabel("q (1/angstrom); red: the crystal")
    ax.set_yticks([])
    ax.set_title(f"{fit.q_pixel:.5f} 1/angstrom per px,\n{fit.n_used} of {fit.n_vectors} disks", fontsize=9)


def _draw_rotation(ax: Axes, measured: Any) -> None:
    """How much curl is left at each angle, for both cases of transposition."""
    found = measured.rotation
    degrees = np.linspace(-90, 90, 181)
    # the curl left is least^2 cos^2 + most^2 sin^2 of the angle from the best one, divergence 1
    for curl, angle, colour, name in (
        (found.curl, found.rotation_degree, ORANGE, "exchanged" if found.transposed else "as it is"),
        (found.curl_other, found.other_degree, SKY, "as it is" if found.transposed else "exchanged"),
    ):
        t = np.radians(degrees - angle)
        ax.plot(degrees, np.sqrt(curl**2 * np.cos(t) ** 2 + np.sin(t) ** 2), color=colour, label=name)
    ax.axvline(found.rotation_degree, color=ORANGE, lw=0.6, ls=":")
    ax.legend(frameon=False, title="detector matrix")
    ax.set_ylim(0, None)
    ax.set_xlabel("rotation (degrees)")
    ax.set_ylabel("curl left")
    known = found.angle_known and found.transposition_known
    ax.set_title(
        f"{found.rotation_degree:.1f} +- {found.std_degree:.1f} degrees\n"
        + ("(modulo 180)" if known else "cannot be decided"),
        fontsize=9,
    )


def _draw_templates(ax: Axes, measured: Any) -> None:
    """Radius of the disks in each region."""
    found = measured.templates
    image = ax.imshow(np.ma.masked_invalid(found.radius_px), cmap="viridis")
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label="px")
    ax.set_xlabel("region")
    ax.locator_params(integer=True)
    ax.set_title(f"disk radius, change\n{found.change_px:.2f} +- {found.change_std_px:.2f} px", fontsize=9)


@styled
def descan(calibration: Any, lattice: xr.Dataset) -> Figure:
    """Where the beam was expected in each pattern, and where the lattice fit found it.

    Parameters
    ----------
    calibration : fcunet.calibration.Calibration
        Of the run; its `origin` is what was expected.
    lattice : Dataset
        `origin_qy, origin_qx` (scan_y, scan_x) in px, fitted freely.

    Returns
    -------
    Figure
        The descan as arrows, how far the lattice lies from it, and the distribution of both components. The
        beam centre was measured before, from the direct beam alone: what is left is an independent check.

    Raises
    ------
    ValueError
        If the shapes disagree, or the origin was not fitted.
    """
    expected = np.asarray(calibration.origin, dtype=float)
    fitted = np.stack([np.asarray(lattice[n].values, dtype=float) for n in ("origin_qy", "origin_qx")], -1)
    if expected.shape != fitted.shape:
        raise ValueError(
            f"the calibration is of {expected.shape[:2]} positions, the lattice of {fitted.shape[:2]}"
        )
    if not lattice.attrs.get("fit_origin", True):
        raise ValueError("the origin was not fitted (fit_origin: false), so nothing is left to compare")
    rest = fitted - expected
    if in_column():
        figure = new_figure(4.2, 8.4)
        axes = list(figure.subplots(3, 1))
    else:
        figure = new_figure(9.6, 3.1)
        axes = list(figure.subplots(1, 3))
    moved = expected - expected.mean((0, 1))
    _draw_arrows(axes[0], moved)
    axes[0].set_title(f"descan: {calibration.descan_px:.2f} px over the scan")
    distance = lattice["origin_qy"].copy(data=np.hypot(*np.moveaxis(rest, -1, 0)))
    top = range_of(distance.values)[1]
    draw_map(axes[1], distance, cmap="viridis", limits=(0.0, top), label="px")
    finite = distance.values[np.isfinite(distance.values)]
    middle = f", median {np.median(finite):.3f} px" if finite.size else ""
    axes[1].set_title(f"lattice from there{middle}")
    for i, (colour, name) in enumerate(((ORANGE, "row"), (theme().line, "column"))):
        values = rest[..., i][np.isfinite(rest[..., i])]
        if values.size:
            counts, sides = np.histogram(values, 50, range_of(values, 0.5, 99.5))
            axes[2].stairs(counts, sides, color=colour, label=f"{name}: {values.mean():+.3f} px on average")
    if finite.size:
        axes[2].legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 1.28), handlelength=1.0)
    else:
        say_missing(axes[2])
    axes[2].set_xlabel("lattice minus expected beam (px)")
    axes[2].set_yticks([])
    axes[2].spines[["left", "right", "top"]].set_visible(False)
    return figure


def _arrows(ax: Axes, x: Array, y: Array, dx: Array, dy: Array, color: str) -> None:
    """Arrows as long as suits most of them; where none moves, none of them need be scaled."""
    moves = bool(np.nan_to_num(dx).any() or np.nan_to_num(dy).any())
    ax.quiver(x, y, dx, dy, angles="xy", color=color, pivot="middle", scale=None if moves else 1.0)


def _draw_arrows(ax: Axes, moved: Array) -> None:
    """Vectors (scan_y, scan_x, 2) as a dozen arrows along each side, as large as fits."""
    scan: tuple[int, ...] = moved.shape[:2]
    steps = [max(1, math.ceil(n / 12)) for n in scan]
    at = np.ix_(*(np.arange(s // 2, n, s) for n, s in zip(scan, steps, strict=True)))
    iy, ix = np.indices(scan).astype(float)
    _arrows(ax, ix[at], iy[at], moved[..., 1][at], moved[..., 0][at], theme().line)
    ax.set_xlim(-0.5, scan[1] - 0.5)
    ax.set_ylim(scan[0] - 0.5, -0.5)
    ax.set_aspect("equal" if 0.2 < scan[0] / scan[1] < 5 else "auto")
    ax.set_xticks([])
    ax.set_yticks([])

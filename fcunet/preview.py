"""``fcunet preview``: a few patterns with all that was measured, before the big run."""

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from . import schema
from .blocks import process_block
from .calibrate import calibrate
from .calibration import Calibration
from .cepstral import REAL_SPACE
from .config import Config, DetectionConfig
from .kernels.beam import aligned_mean
from .pipeline import fit_lattice
from .remote import Place
from .sample import Sample, read_sample
from .session import write_bytes
from .store import open_datacube

METHODS = {"fcunet": "FCU-Net", "correlation": "correlation", "cepstral": "cepstrum"}
N_DETECTED = 24  # patterns in which disks are looked for, those shown among them

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Found:
    """Peaks of some patterns, and the lattice if there is one; all (n, ...)."""

    qy: Array
    qx: Array
    intensity: Array
    bf: Array
    lattice: xr.Dataset | None
    why_not: str
    seconds: float
    truncated: int

    @property
    def lattices(self) -> list[tuple[Array, Array]] | None:
        """Origin and vectors of every pattern."""
        if self.lattice is None:
            return None
        table = np.stack([self.lattice[p].values.ravel() for p in schema.LATTICE_PARAMETERS], axis=-1)
        return [(row[:2], row[2:].reshape(2, 2)) for row in table]

    @property
    def on(self) -> NDArray[np.bool_]:
        """Which peaks sit on the lattice of their pattern."""
        from .plot.patterns import near_lattice

        fits = self.lattices
        if fits is None or self.lattice is None:
            return np.zeros(self.qy.shape, dtype=bool)
        reach = float(self.lattice.attrs["max_peak_spacing_px"])
        return np.stack(
            [near_lattice(y, x, *f, reach=reach) for y, x, f in zip(self.qy, self.qx, fits, strict=True)]
        )


def preview(
    store: str | Place | xr.Dataset,
    *,
    positions: Sequence[tuple[int, int]] | None = None,
    n: int = 6,
    config: Config | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Calibrate, find disks and the lattice in a few patterns; draw them, and say every measured number.

    Parameters
    ----------
    store : path, URL or Dataset
        The datacube.
    positions : sequence of (scan_y, scan_x), optional
        Which patterns to show; default some spread over the scan.
    n : int
        How many, without `positions`.
    config : Config, optional
        Its detection and lattice settings count.
    out : path, optional
        Where to write the figure, such as ``preview.png``; not drawn without.

    Returns
    -------
    dict
        ``lines`` of text to print; ``calibration`` (see `Calibration.to_dict`), ``positions``, ``n_peaks``
        and ``n_indexed`` per shown pattern, ``basis_px`` (2, 2), ``lengths_px``, ``angle_degree`` (acute),
        ``origin_px``, ``fit_error_px``, ``share_on_lattice``, ``patterns_per_s``, ``suggestion`` (text or
        None). Lattice numbers are None where no lattice was found, and ``why_not`` says why.

    Raises
    ------
    ValueError
        If a position is outside the scan, or nothing can be measured (see `calibrate`).
    """
    config = Config() if config is None else config
    datacube = store if isinstance(store, xr.Dataset) else open_datacube(store)
    schema.check_datacube(datacube)
    shown = _checked_positions(datacube, positions, n)
    sample = read_sample(datacube)
    measured = calibrate(datacube, sample=sample, **config.calibration.model_dump())
    patterns, at = _patterns(datacube, sample, shown, n)
    n_shown = len(shown) if shown is not None else min(n, len(at))
    found = _detect(patterns, at, measured, config)
    facts = _facts(found, measured, at[:n_shown], n_shown, patterns)
    name = "STORE" if isinstance(store, xr.Dataset) else shlex.quote(str(store))
    facts["suggestion"] = _suggestion(found, patterns, at, measured, config, name)
    facts["lines"] = _lines(datacube, measured, facts, found, config, name)
    if out is not None:
        from .plot import to_png

        figure = _draw(sample, measured, patterns, at, found, n_shown, datacube)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(Path(out), to_png(figure))
        facts["figure"] = str(out)
    return facts


def _checked_positions(
    datacube: xr.Dataset, positions: Sequence[tuple[int, int]] | None, n: int
) -> list[tuple[int, int]] | None:
    if positions is None:
        if n < 1:
            raise ValueError(f"{n} positions were asked for; show at least one: -n 6")
        return None
    ny, nx = datacube.sizes["scan_y"], datacube.sizes["scan_x"]
    for y, x in positions:
        if not (0 <= y < ny and 0 <= x < nx):
            raise ValueError(
                f"position {y},{x} is outside the scan of {ny} x {nx} (rows, columns, counted from 0); "
                f"use for example --at {ny // 2},{nx // 2}"
            )
    return [(int(y), int(x)) for y, x in positions]


def _patterns(
    datacube: xr.Dataset, sample: Sample, shown: list[tuple[int, int]] | None, n: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The patterns to show, then others of the sample: they make the basis sure."""
    count = len(sample.patterns)
    first = np.unique(np.linspace(0, count - 1, min(n if shown is None else 1, count)).round().astype(int))
    rest = np.setdiff1d(np.linspace(0, count - 1, min(N_DETECTED, count)).round().astype(int), first)
    if shown is None:
        chosen = np.concatenate([first, rest[: max(0, N_DETECTED - len(first))]])
        return sample.patterns[chosen], sample.position[chosen]
    own = [datacube["intensity"].isel(scan_y=y, scan_x=x).values.astype(np.float32) for y, x in shown]
    others = np.concatenate([first, rest])[: max(0, N_DETECTED - len(own))]
    return (
        np.concatenate([np.stack(own), sample.patterns[others]]),
        np.concatenate([np.asarray(shown, dtype=np.int64), sample.position[others]]),
    )


def _detect(patterns: NDArray, at: NDArray, measured: Calibration, config: Config) -> _Found:
    """Peaks as a run would find them, and the lattice as it would fit it."""
    origin = measured.origin[at[:, 0], at[:, 1]][None]
    index = None if measured.template_index is None else measured.template_index[at[:, 0], at[:, 1]][None]
    first = None if index is None else index[:, :1]
    process_block(  # loads the weights
        patterns[None, :1], config.detection, measured, origin=origin[:, :1], template_index=first
    )
    start = time.perf_counter()
    values = process_block(patterns[None], config.detection, measured, origin=origin, template_index=index)
    seconds = time.perf_counter() - start
    kept = (*schema.PEAK_VARIABLES, *schema.SHARED_DILATION)
    peaks = xr.Dataset({name: (schema.PEAKS[name].dims, values[name]) for name in kept})
    cepstral = config.detection.method == "cepstral"
    if cepstral:
        peaks.attrs = {"space": REAL_SPACE, "detector_shape": list(patterns.shape[1:])}
        for i, name in enumerate(("origin_qy", "origin_qx")):
            peaks[name] = (schema.SCAN_DIMS, origin[..., i])
    lattice, why = None, ""
    try:
        lattice = fit_lattice(peaks, **config.lattice.model_dump(exclude={"max_lattices"}))
    except ValueError as err:
        why = str(err)
    if lattice is not None and not np.isfinite(lattice["g1_qy"]).any():
        lattice, why = None, f"no pattern has {config.lattice.min_num_peaks} peaks on one lattice"
    qy, qx, height, bf = (values[k][0].astype(float) for k in ("peak_qy", "peak_qx", "peak_intensity", "bf"))
    if cepstral and lattice is not None:  # no disks to show: those that the lattice predicts stand for them
        qy, qx = _sites(lattice, patterns.shape[1:], qy.shape[1])
    return _Found(qy, qx, height, bf, lattice, why, seconds, int(values["truncated"].sum()))


def _sites(lattice: xr.Dataset, frame: tuple[int, ...], count: int) -> tuple[Array, Array]:
    """Sites (n, count) of each lattice within the frame, nearest to its origin first, NaN-padded."""
    h, k = (v.ravel() for v in np.mgrid[-6:7, -6:7])
    table = np.stack([lattice[p].values.ravel() for p in schema.LATTICE_PARAMETERS], axis=-1)
    at = table[:, None, :2] + h[:, None] * table[:, None, 2:4] + k[:, None] * table[:, None, 4:]
    inside = ((at >= 0) & (at <= np.array(frame) - 1)).all(-1)
    distance = np.where(inside, np.linalg.norm(at - table[:, None, :2], axis=-1), np.inf)
    order = np.argsort(distance, axis=1)[:, :count]
    chosen = np.take_along_axis(np.where(inside[..., None], at, np.nan), order[..., None], axis=1)
    pad = ((0, 0), (0, max(0, count - chosen.shape[1])), (0, 0))
    chosen = np.pad(chosen, pad, constant_values=np.nan)
    return chosen[..., 0], chosen[..., 1]


def _facts(
    found: _Found, measured: Calibration, at: NDArray, n_shown: int, patterns: NDArray
) -> dict[str, Any]:
    present = np.isfinite(found.qy)
    facts: dict[str, Any] = {
        "calibration": measured.to_dict(),
        "positions": [tuple(int(v) for v in p) for p in at],
        "n_peaks": present.sum(1)[:n_shown].tolist(),
        "n_truncated": found.truncated,
        "patterns_per_s": len(patterns) / found.seconds,
        "why_not": found.why_not,
    }
    lattice = dict.fromkeys(
        (
            "basis_px",
            "lengths_px",
            "angle_degree",
            "origin_px",
            "fit_error_px",
            "n_indexed",
            "share_on_lattice",
        )
    )
    if found.lattice is not None:
        from .plot.patterns import lattice_angle

        g = np.stack([fit[1] for fit in found.lattices or []])
        g = np.nanmedian(g[np.isfinite(g).all((1, 2))], axis=0)
        lattice |= {
            "basis_px": g.tolist(),
            "lengths_px": np.hypot(*g.T).tolist(),
            "angle_degree": lattice_angle(g),
            "origin_px": np.nanmedian(np.stack([fit[0] for fit in found.lattices or []]), axis=0).tolist(),
            "fit_error_px": float(found.lattice["fit_error"].median()),
            "n_indexed": found.lattice["n_indexed"].values.ravel()[:n_shown].tolist(),
            "share_on_lattice": float(found.on.sum() / max(present.sum(), 1)),
        }
    return facts | lattice


def _best_cut(found: _Found) -> tuple[float, int, int]:
    """Height, relative to the brightest peak, that best keeps peaks on the lattice and drops those off it.

    Returns the height and how many peaks on and off the lattice are above it.
    """
    present = np.isfinite(found.qy)
    relative = found.intensity / found.intensity[:, :1]
    on, off = (np.sort(relative[present & keep]) for keep in (found.on, ~found.on))
    heights = np.concatenate([[0.0], on])
    n_on = len(on) - np.searchsorted(on, heights)
    n_off = len(off) - np.searchsorted(off, heights)
    best = int(np.argmax(n_on - n_off))
    below = off[off < heights[best]]
    # in the middle of the gap, so that a slightly weaker disk elsewhere still passes
    cut = (heights[best] + (below[-1] if len(below) else 0.0)) / 2
    return float(cut), int(n_on[best]), int(n_off[best])


def _suggestion(
    found: _Found, patterns: NDArray, at: NDArray, measured: Calibration, config: Config, store: str
) -> str | None:
    """A command with settings that drop the peaks between the disks, if there are many; else None."""
    detection = config.detection
    on = int(found.on.sum())
    total = int(np.isfinite(found.qy).sum())
    if detection.method != "correlation" or total < 5 * len(found.qy) or on >= 0.7 * total:
        return None
    options: list[tuple[int, DetectionConfig, float]] = []
    for kernel in dict.fromkeys((detection.kernel, "gaussian")):
        tried = found
        changed = config
        if kernel != detection.kernel:
            changed = config.model_copy(update={"detection": detection.model_copy(update={"kernel": kernel})})
            tried = _detect(patterns, at, measured, changed)
        if tried.lattice is None:
            continue
        cut, n_on, n_off = _best_cut(tried)
        options.append((n_on - n_off, changed.detection, cut))
    if not options:
        return None
    score, chosen, cut = max(options, key=lambda o: o[0])
    if found.lattice is not None and score <= 2 * on - total:
        return None
    text = f"fcunet preview {store} --method correlation"
    if chosen.kernel != detection.kernel:
        text += f" --kernel {chosen.kernel}"
    if cut > detection.min_relative_intensity:
        text += f" --min-relative-intensity {float(f'{cut:.2g}'):g}"
    return text


def _lines(
    datacube: xr.Dataset,
    measured: Calibration,
    facts: dict[str, Any],
    found: _Found,
    config: Config,
    store: str,
) -> list[str]:
    """What the command prints."""
    intensity = datacube["intensity"]
    ny, nx, qy, qx = intensity.shape
    lines = [f"  data      {ny} x {nx} scan, {qy} x {qx} detector, {intensity.dtype}"]
    lines += [f"  measured  {line}" for line in measured.describe()]
    if geometry := _geometry(datacube):
        lines.append(f"  stored    {geometry}")
    if facts["basis_px"] is None:
        lines.append(f"  lattice   none: {found.why_not}")
    else:
        a, b = facts["lengths_px"]
        n_indexed = facts["n_indexed"]
        lines.append(
            f"  lattice   {a:.2f} and {b:.2f} px, {facts['angle_degree']:.2f} degrees, origin "
            f"({facts['origin_px'][0]:.1f}, {facts['origin_px'][1]:.1f}) px"
        )
        lines.append(
            f"  disks     {min(n_indexed)} to {max(n_indexed)} per pattern on the lattice, "
            f"median residual {facts['fit_error_px']:.3f} px; "
            f"{100 * facts['share_on_lattice']:.0f} % of all peaks are on it"
        )
    peaks = facts["n_peaks"]
    method = METHODS[config.detection.method]
    rate = facts["patterns_per_s"]
    lines.append(
        f"  detect    {method}: {min(peaks)} to {max(peaks)} peaks in {len(peaks)} patterns | "
        f"{rate:.3g} patterns/s in this process, the scan in about {_duration(ny * nx / rate)}"
    )
    if (
        config.detection.method == "cepstral"
        and measured.probe_radius_px > 0.25 * measured.nearest_spacing_px
    ):
        lines.append(
            "  note      the cepstrum wants disks smaller than a quarter of their distance; these are "
            f"{measured.probe_radius_px:.1f} px at {measured.nearest_spacing_px:.1f} px"
        )
    if facts["n_truncated"]:
        lines.append(
            f"  note      {facts['n_truncated']} of {len(found.qy)} patterns have more than "
            f"{config.detection.max_num_peaks} peaks: raise --max-num-peaks, or the threshold"
        )
    lines += [f"  note      {text}" for text in measured.warnings]
    if facts["suggestion"]:
        lines.append(f"  note      many peaks are no disks; try: {facts['suggestion']}")
    return lines


def _geometry(datacube: xr.Dataset) -> str:
    """What `fcunet calibrate`, or the microscope, said of the detector."""
    attrs, parts = datacube.attrs, []
    if datacube["qy"].attrs.get("units") == schema.UNIT_Q and datacube["qy"].size > 1:
        parts.append(f"pixel {abs(float(datacube['qy'][1] - datacube['qy'][0])):.5f} {schema.UNIT_Q}")
    if "ellipse_ratio" in attrs:
        ratio, angle = (float(attrs[k]) for k in ("ellipse_ratio", "ellipse_angle_degree"))
        parts.append(f"ellipse {ratio:.4f} at {angle:.0f} degrees")
    if "scan_rotation_degree" in attrs:
        swap = ", detector rows and columns exchanged" if attrs.get("scan_transposed") else ""
        parts.append(f"scan turned by {float(attrs['scan_rotation_degree']):.2f} degrees{swap}")
    if "origin_qy" in datacube:
        parts.append("beam centre of every position")
    return " | ".join(parts)


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(1, round(seconds))} s"


def _draw(
    sample: Sample,
    measured: Calibration,
    patterns: NDArray,
    at: NDArray,
    found: _Found,
    n_shown: int,
    datacube: xr.Dataset,
) -> Any:
    """Calibration above, patterns with disks and lattice below."""
    import matplotlib as mpl

    from .plot.patterns import draw_calibration, draw_peaks, show_pattern
    from .plot.style import FRAME_COLOURS, STYLE, new_figure

    with mpl.rc_context(STYLE):
        columns = 1 if n_shown == 1 else 2 if n_shown in (2, 4) else 3
        rows = math.ceil(n_shown / columns)
        panel = 9.6 / columns if columns > 1 else 6.0
        aspect = patterns.shape[1] / patterns.shape[2]
        height = panel * aspect + 0.3
        figure = new_figure(9.6, 2.8 + rows * height + 0.3)
        grid = figure.add_gridspec(1 + rows, 1, height_ratios=[2.8] + [height] * rows)
        scan = measured.scan_shape
        one = scan == (1, 1)
        top = grid[0].subgridspec(1, 3 if one else 4)
        axes = [figure.add_subplot(cell) for cell in top]  # type: ignore[attr-defined]
        shift = measured.centre - measured.origin[sample.position[:, 0], sample.position[:, 1]]
        draw_calibration(axes, measured, aligned_mean(sample.patterns, shift))
        if not one:
            _draw_positions(axes[3], scan, at, found.bf, n_shown)
        fits, on = found.lattices, found.on
        for row in range(rows):
            cells = grid[1 + row].subgridspec(1, columns)
            for column in range(columns):
                i = row * columns + column
                if i >= n_shown:
                    continue
                ax = figure.add_subplot(cells[column])
                show_pattern(ax, patterns[i], power=0.4)
                draw_peaks(
                    ax,
                    found.qy[i],
                    found.qx[i],
                    radius_px=measured.probe_radius_px,
                    lattice=fits[i] if fits else None,
                    on_lattice=on[i] if fits else None,
                )
                name = "" if one else f"scan {at[i][0]}, {at[i][1]}: "
                total, good = int(np.isfinite(found.qy[i]).sum()), int(on[i].sum())
                ax.set_title(
                    f"{name}{total} peaks" + (f", {good} on the lattice" if fits else ""), fontsize=9
                )
                for spine in ax.spines.values():
                    spine.set(color=FRAME_COLOURS[i % len(FRAME_COLOURS)], linewidth=2)
        key = "orange circles: peaks on the lattice; dotted blue: off it; red crosses: sites of the lattice"
        figure.supxlabel(key if fits else "orange circles: peaks; no lattice was found", fontsize=8)
        return figure


def _draw_positions(ax: Any, scan: tuple[int, int], at: NDArray, bf: Array, n_shown: int) -> None:
    """Where in the scan the patterns are, with their bright field."""
    from .plot.style import FRAME_COLOURS

    ax.scatter(at[:, 1], at[:, 0], c=bf, cmap="gray", marker="s", s=14, lw=0)
    colours = [FRAME_COLOURS[i % len(FRAME_COLOURS)] for i in range(n_shown)]
    ax.scatter(
        at[:n_shown, 1], at[:n_shown, 0], marker="s", s=60, facecolors="none", edgecolors=colours, lw=1.6
    )
    ax.set_facecolor("0.85")
    margin_y, margin_x = (0.5 + 0.04 * n for n in scan)
    ax.set_ylim(scan[0] - 1 + margin_y, -margin_y)
    ax.set_xlim(-margin_x, scan[1] - 1 + margin_x)
    ax.set_aspect("equal" if 0.2 < scan[0] / scan[1] < 5 else "auto")
    ax.locator_params(integer=True, nbins=4)
    ax.set_xlabel("scan_x")
    ax.set_ylabel("scan_y")
    ax.set_title("positions,\nbright field", fontsize=9)

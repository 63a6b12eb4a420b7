"""From a microscope's file to a datacube store: out of core, resumable, and without inventing a calibration.

The readers are in `fcunet.readers`. Patterns go shard by shard from the file to the store, so memory holds
two or three shards whatever the size of the scan. Counts are kept in the dtype of the file, or refused where
they do not fit the one asked for. NaN in float data stays NaN; a detector pixel that is NaN at every position
is bad, and ``detector_mask`` says so.
"""

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from . import schema, units
from .datacube import DatacubeWriter, coordinate, pixel_coordinate
from .layout import BlockGrid, Layout, pair, plan_layout
from .provenance import fingerprint, provenance
from .readers.base import Axis, Scan, Source
from .readers.detect import open_source
from .remote import local

log = logging.getLogger(__name__)

Flip = Literal["none", "rows", "columns", "both"]
Quantity = float | tuple[float, str]


@dataclass(frozen=True)
class Plan:
    """What a conversion would write; printed, it reads as a table."""

    source: Path
    dest: Path
    format: str
    reader: str
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    layout: Layout
    coords: dict[str, xr.DataArray]
    attrs: dict[str, Any]
    variables: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Size of the patterns before compression."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __str__(self) -> str:
        grid = BlockGrid(pair(self.shape), self.layout.shard)
        block = self.layout.shard[0] * self.layout.shard[1] * self.nbytes / np.prod(self.shape[:2]) / 2**20
        free = shutil.disk_usage(_existing_parent(self.dest)).free
        lines = [
            ("source", f"{self.source.name}: {self.format}, read by {self.reader}"),
            ("scan", "{} x {} positions".format(*self.shape[:2])),
            ("detector", "{} x {} px, {}".format(*self.shape[2:], self.dtype)),
            ("size", f"{self.nbytes / 1e9:.3g} GB before compression, {free / 1e9:.3g} GB free"),
            (
                "blocks",
                f"{len(grid)} of {self.layout.shard[0]} x {self.layout.shard[1]} patterns, {block:.3g} MiB "
                "each",
            ),
            *((dim, _axis_text(self.coords[dim])) for dim in schema.DATACUBE_DIMS),
            *((key, self.attrs[key]) for key in schema.DATACUBE_ATTRS[5:] if key in self.attrs),
            *([("with it", ", ".join(self.variables))] if self.variables else []),
            *(("note", note) for note in self.notes),
            ("store", str(self.dest)),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:{width}}  {text}" for name, text in lines)


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    scan_shape: tuple[int, int] | None = None,
    detector_shape: tuple[int, int] | None = None,
    dtype: Any = None,
    offset: int = 0,
    scan_step: Quantity | None = None,
    q_pixel: Quantity | None = None,
    beam_energy_keV: float | None = None,
    convergence_semiangle_mrad: float | None = None,
    scan_rotation_degree: float | None = None,
    probe: str | Path | np.ndarray | None = None,
    flip: Flip = "none",
    dataset: str | None = None,
    depth: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Path | Plan:
    """Convert a scan to a datacube store; the same call continues where an earlier one was interrupted.

    Parameters
    ----------
    source : path
        File, or folder of a Zarr store. Its format is told from its contents.
    dest : path
        Store to write, ``NAME.zarr``. It appears when complete; until then it is ``NAME.zarr.partial``.
    scan_shape : tuple of int, optional
        (y, x), where the file does not say or is wrong.
    detector_shape : tuple of int, optional
        (y, x) of the frames of a raw binary; makes any file one, and needs `dtype`.
    dtype : dtype-like, optional
        Of a raw binary; for other formats, of the counts in the store. Counts that would not fit are refused.
    offset : int
        Bytes before the first frame of a raw binary.
    scan_step : float or (float, str), optional
        Step of the scan, in nm or the unit given.
    q_pixel : float or (float, str), optional
        Step on the detector in 1/angstrom (q = 1/d, no 2 pi) or the unit given: ``(0.5, "mrad")``.
    beam_energy_keV, convergence_semiangle_mrad, scan_rotation_degree : float, optional
        Stored as root attributes; given values win over those of the file.
    probe : path or ndarray, optional
        Vacuum probe (qy, qx): an array, or any file with one pattern.
    flip : {"none", "rows", "columns", "both"}
        Mirror the detector after reading. The store's ``handedness`` says what was done to the rows.
    dataset : str, optional
        Path of the array in an HDF5 file or Zarr store, or number of the signal, where there are several.
    depth : int, optional
        Which exit depth of a simulated scan.
    overwrite : bool
        Replace an existing store.
    dry_run : bool
        Write nothing, and return a `Plan`.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    pathlib.Path or Plan
        The store; with `dry_run` what would be written, readable when printed.

    Raises
    ------
    FileNotFoundError, FileExistsError
        If `source` does not exist, or `dest` does.
    ValueError
        If the file is damaged, truncated or of no known format, or more must be known to read it.
    OSError
        If the disk is full; finished blocks are kept.

    Notes
    -----
    Calibration is carried over in nm and 1/angstrom, or left missing (units ``px``) and reported. Where the
    file has no zero of q, q counts from the middle of the detector; the beam's own centre is measured later.
    """
    source = local(source, "files are converted from a disk here; download it first")
    dest = local(dest, "datacubes are written here only; give a folder, and copy it there when done")
    if dest.exists() and not (overwrite or dry_run):
        raise FileExistsError(f"{dest} exists; choose another name, or replace it with --overwrite")
    opened = open_source(
        source,
        scan_shape=scan_shape,
        detector_shape=detector_shape,
        dtype=dtype,
        offset=offset,
        dataset=dataset,
        depth=depth,
    )
    scan = Scan(opened, scan_shape)
    _check_ends(opened, scan)
    target = _target_dtype(opened, scan.dtype, None if detector_shape else dtype)
    if flip not in ("none", "rows", "columns", "both"):
        raise ValueError(f"flip is {flip!r}; known are none, rows, columns, both")
    if probe is not None:
        opened.variables["probe"] = _load_probe(probe, pair(scan.shape[2:]))
    energy = beam_energy_keV or opened.attrs.get("beam_energy_keV")
    given = {dim: scan_step for dim in schema.SCAN_DIMS} | {dim: q_pixel for dim in schema.PATTERN_DIMS}
    for dim, quantity in given.items():
        if quantity is not None:
            default = schema.UNIT_SCAN if dim in schema.SCAN_DIMS else schema.UNIT_Q
            step, unit = quantity if isinstance(quantity, tuple) else (quantity, default)
            _convert_axis(
                dim, Axis(float(step), unit), energy
            )  # what is typed in may not be dropped silently
            old = opened.axes.get(dim)
            zero = old.offset / old.step if old and old.offset is not None else None
            opened.axes[dim] = Axis(float(step), unit, None if zero is None else zero * float(step))
    coords, notes = _coordinates(opened, scan.shape, energy, flip)
    attrs = _root_attrs(opened, flip) | {
        key: value
        for key, value in {
            "beam_energy_keV": beam_energy_keV,
            "convergence_semiangle_mrad": convergence_semiangle_mrad,
            "scan_rotation_degree": scan_rotation_degree,
        }.items()
        if value is not None
    }
    plan = Plan(
        source=opened.path,
        dest=dest,
        format=opened.format,
        reader=opened.reader,
        shape=scan.shape,
        dtype=target,
        layout=plan_layout(pair(scan.shape), pair(scan.shape[2:]), target),
        coords=coords,
        attrs=attrs,
        variables=tuple(opened.variables),
        notes=(*opened.notes, *notes),
    )
    if dry_run:
        return plan
    for note in plan.notes:
        log.warning("%s: %s", opened.path.name, note)
    return _write(plan, opened, scan, flip, overwrite, progress)


# ---- writing -----------------------------------------------------------------------------------------------


def _write(plan: Plan, source: Source, scan: Scan, flip: Flip, overwrite: bool, progress: bool) -> Path:
    attrs = provenance(**plan.attrs)
    with (
        DatacubeWriter(
            plan.dest,
            plan.shape,
            plan.dtype,
            coords=plan.coords,
            attrs=attrs,
            layout=plan.layout,
            overwrite=overwrite,
        ) as writer,
        ThreadPoolExecutor(1) as pool,
        _progress(plan, progress) as advance,
    ):
        done = writer.done
        todo = [block for block in writer.blocks if block not in done]
        advance(len(done))
        mask = source.variables.get("detector_mask")

        def read(block: tuple[int, int]) -> np.ndarray:
            patterns = scan[writer.blocks.slices(*block)]
            return np.ascontiguousarray(_flipped(_cast(patterns, plan.dtype, mask, block), flip))

        bad = _NaNCount(plan.shape[2:])
        is_float = plan.dtype.kind == "f"
        for block in done if is_float else ():
            bad.add(writer.read_block(*block))
        ahead = pool.submit(read, todo[0]) if todo else None
        for n, block in enumerate(todo):
            patterns = ahead.result()  # type: ignore[union-attr]
            ahead = pool.submit(read, todo[n + 1]) if n + 1 < len(todo) else None
            if is_float:
                bad.add(patterns)
            writer.write_block(*block, patterns)
            advance(1)
        variables = {name: _flip_variable(name, v, flip, plan.shape) for name, v in source.variables.items()}
        if bad.total:
            writer.update_attrs(n_nan=bad.total)
            good = ~bad.always
            variables["detector_mask"] = good & variables.get("detector_mask", True)
            log.warning(
                "%s: %d NaN kept as NaN; %d detector pixels are NaN at every position and masked",
                source.path.name,
                bad.total,
                int(bad.always.sum()),
            )
        for name, values in variables.items():
            writer.write_variable(name, values)
    return writer.path


class _NaNCount:
    """Counts NaN, and finds detector pixels that are NaN wherever the pattern has any number at all."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.total = 0
        self._nan, self._patterns = np.zeros(shape, np.int64), 0

    def add(self, patterns: np.ndarray) -> None:
        nan = np.isnan(patterns.reshape(-1, *patterns.shape[2:]))
        self.total += int(nan.sum())
        counted = nan[~nan.all(axis=(1, 2))]
        self._nan += counted.sum(axis=0)
        self._patterns += len(counted)

    @property
    def always(self) -> np.ndarray:
        return (self._nan == self._patterns) & (self._patterns > 0)


class _progress:
    """A progress bar on standard error; as a context it gives a function that counts blocks."""

    def __init__(self, plan: Plan, show: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        grid = BlockGrid(pair(plan.shape), plan.layout.shard)
        self._bar = Progress(
            TextColumn("convert"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} blocks"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not show,
            transient=True,
        )
        self._task = self._bar.add_task("convert", total=len(grid))

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda n: self._bar.advance(self._task, n)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


# ---- patterns ----------------------------------------------------------------------------------------------


def _check_ends(source: Source, scan: Scan) -> None:
    """Read the first and last pattern, so that a truncated file is found before anything is written."""
    ny, nx = scan.shape[:2]
    for y, x in ((0, 0), (ny - 1, nx - 1)):
        try:
            scan[slice(y, y + 1), slice(x, x + 1)]
        except Exception as err:  # libraries raise whatever a damaged file makes them raise
            raise ValueError(
                f"the pattern at scan position ({y}, {x}) of {source.path.name} ({source.format}, "
                f"{ny} x {nx} positions) cannot be read: {err}; is the file complete?"
            ) from err


def _target_dtype(source: Source, found: np.dtype, wanted: Any) -> np.dtype:
    dtype = np.dtype(wanted) if wanted is not None else np.dtype(np.uint8) if found.kind == "b" else found
    if found.kind not in "uifb":
        raise ValueError(f"{source.path.name} holds {found} values; patterns are integers or floats")
    if dtype.kind not in "uif":
        raise ValueError(f"the dtype asked for is {dtype}; patterns are integers or floats, such as uint16")
    return dtype.newbyteorder("=")


def _cast(
    patterns: np.ndarray, dtype: np.dtype, mask: np.ndarray | None, block: tuple[int, int]
) -> np.ndarray:
    """`patterns` in `dtype` if every used pixel fits; masked pixels, which hold marks, are clipped."""
    if patterns.dtype == dtype or np.can_cast(patterns.dtype, dtype, "safe") or dtype.kind == "f":
        return patterns.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    used = patterns if mask is None else patterns[..., mask]
    low, high = (used.min(), used.max()) if used.size else (0, 0)
    whole = patterns.dtype.kind != "f" or bool((used == np.floor(used)).all())
    if not (whole and low >= limits.min and high <= limits.max):
        raise ValueError(
            f"block {block} has values from {low} to {high}, "
            f"{'' if whole else 'not all whole numbers, '}which {dtype} cannot "
            f"hold; leave --dtype out to keep {patterns.dtype}"
        )
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(patterns).clip(limits.min, limits.max).astype(dtype)


def _flipped(patterns: np.ndarray, flip: Flip) -> np.ndarray:
    if flip in ("rows", "both"):
        patterns = patterns[..., ::-1, :]
    return patterns[..., ::-1] if flip in ("columns", "both") else patterns


def _flip_variable(name: str, values: np.ndarray, flip: Flip, shape: tuple[int, ...]) -> np.ndarray:
    if schema.DATACUBE[name].dims == schema.PATTERN_DIMS:
        return _flipped(np.asarray(values), flip)
    if name == "origin_qy" and flip in ("rows", "both"):
        return shape[2] - 1 - values
    return shape[3] - 1 - values if name == "origin_qx" and flip in ("columns", "both") else values


def _load_probe(probe: str | Path | np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    name, template = "the probe", probe
    if isinstance(probe, str | Path):
        name = f"the probe {Path(probe).name}"
        source = open_source(probe)
        if int(np.prod(source.data.shape[:-2])) != 1:
            raise ValueError(
                f"{name} must be one pattern, but the file holds an array of {tuple(source.data.shape)}"
            )
        template = Scan(source, (1, 1))[slice(0, 1), slice(0, 1)][0, 0]
    template = np.asarray(template)
    if template.shape != shape:
        raise ValueError(
            f"{name} is {template.shape} px, the patterns are {shape}; both must be of one detector setting"
        )
    return template.astype(np.float32)


# ---- calibration -------------------------------------------------------------------------------------------


def _coordinates(
    source: Source, shape: tuple[int, ...], energy: float | None, flip: Flip
) -> tuple[dict[str, xr.DataArray], list[str]]:
    """Coordinates in nm, 1/angstrom or px, and why an axis of the file was left out."""
    coords: dict[str, xr.DataArray] = {}
    dropped: dict[str, list[str]] = {}
    for dim, n in zip(schema.DATACUBE_DIMS, shape, strict=True):
        coords[dim] = pixel_coordinate(dim, n)
        if dim not in source.axes:
            continue
        try:
            step, zero, unit = _convert_axis(dim, source.axes[dim], energy)
        except ValueError as err:
            dropped[str(err)] = [*dropped.get(str(err), []), dim]
            continue
        if dim in schema.PATTERN_DIMS:
            zero = -step * (n // 2) if zero is None else zero
            if flip == "both" or flip == {"qy": "rows", "qx": "columns"}[dim]:
                zero = -(zero + step * (n - 1))
        coords[dim] = coordinate(dim, (zero or 0.0) + step * np.arange(n), unit)
    return coords, [f"{' and '.join(dims)} left uncalibrated: {why}" for why, dims in dropped.items()]


def _convert_axis(dim: str, axis: Axis, energy: float | None) -> tuple[float, float | None, str]:
    """Step, value at index 0 (None: unknown), and unit; ValueError for what cannot be true."""
    if dim in schema.SCAN_DIMS:
        factor, unit, (low, high) = units.to_nm(1.0, axis.units), schema.UNIT_SCAN, units.SCAN_STEP_NM
    else:
        factor, unit, (low, high) = (
            units.to_inverse_angstrom(1.0, axis.units, energy),
            schema.UNIT_Q,
            units.Q_STEP,
        )
    step = axis.step * factor
    if not low <= step <= high:
        raise ValueError(
            f"a step of {axis.step:.6g} {axis.units} makes no sense; give "
            f"--{'scan-step' if unit == 'nm' else 'q-pixel'}"
        )
    return step, None if axis.offset is None else axis.offset * factor, unit


def _root_attrs(source: Source, flip: Flip) -> dict[str, Any]:
    handedness = source.handedness
    if flip != "none":
        handedness += f"; then {'rows and columns' if flip == 'both' else flip} flipped on request"
    return {
        "title": source.path.name.split(".")[0],
        "source_file": source.path.name,
        "source_format": source.format,
        "source_fingerprint": fingerprint(source.path),
        "reader": source.reader,
        "handedness": handedness,
    } | {key: value for key, value in source.attrs.items() if value is not None and value == value}


def _axis_text(axis: xr.DataArray) -> str:
    if axis.attrs["units"] == schema.UNIT_PIXEL:
        return "not calibrated (px)"
    values = axis.values
    step = f"{(values[-1] - values[0]) / (len(values) - 1):.6g} " if len(values) > 1 else ""
    return f"{step}{axis.attrs['units']} per {'step' if axis.name in schema.SCAN_DIMS else 'px'}"


def _existing_parent(path: Path) -> Path:
    path = Path(os.path.abspath(path)).parent
    while not path.exists():
        path = path.parent
    return path

"""Vendors' formats through rosettasciio, an optional package under the GPL; nothing else imports it."""

import logging
import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..layout import pair, plan_layout
from ..schema import DATACUBE_DIMS
from .base import Axis, Source, find_item
from .zarrs import tem_attrs

_FORMATS = {
    "blockfile": "NanoMEGAS blockfile",
    "digitalmicrograph": "Gatan DigitalMicrograph",
    "emd": "Velox EMD",
    "mrc": "Direct Electron MRC",
    "topspin": "NanoMEGAS TopSpin",
    "tvips": "TVIPS",
}
_UNITS_LEFT_OUT = ("", "px", "pixel", "pixels", "<undefined>")


def read_rosetta(
    path: Path, kind: str, scan_shape: tuple[int, int] | None = None, dataset: str | None = None
) -> Source:
    """A file read by the rosettasciio reader `kind`, lazily, in chunks that suit the store to be.

    Raises
    ------
    ImportError
        If rosettasciio is not installed.
    ValueError
        If the reader refuses the file, or it holds several signals and `dataset` does not say which.
    """
    logging.getLogger("rsciio").setLevel(logging.ERROR)  # it announces missing optional accelerators
    try:
        module = import_module(f"rsciio.{kind}")
    except ImportError as err:
        raise ImportError(
            f"{path.name} is a {_FORMATS[kind]} file, read by rosettasciio, which is not fully installed "
            f"({err.name or err} is missing); install it with: pip install 'fcunet[io]'"
        ) from err
    options: dict[str, Any] = {"lazy": True}
    source = Source(path, _FORMATS[kind], None, reader=f"rosettasciio {metadata.version('rosettasciio')}")
    match kind:
        case "tvips":
            options["rechunking"] = False
        case "mrc":
            options["metadata_file"] = None
    number = None if kind == "mrc" else dataset
    signal = _pick(path, _call(module, path, options), number)
    stack_shape = signal["data"].shape
    if kind in ("digitalmicrograph", "blockfile", "mrc") and len(stack_shape) in (3, 4):
        # their own chunks may cut patterns apart, and one block would read the file many times
        scan = stack_shape[:2] if len(stack_shape) == 4 else scan_shape or (1, stack_shape[0])
        shard = plan_layout(pair(scan), pair(stack_shape[-2:]), signal["data"].dtype).shard
        chunks = shard if len(stack_shape) == 4 else shard[1:]
        options["chunks"] = (*chunks, *stack_shape[-2:])
        signal = _pick(path, _call(module, path, options), number)
    source.data, axes = _scan_axes_first(path, signal)
    for dim, axis in zip(reversed(DATACUBE_DIMS), reversed(axes), strict=False):
        units = str(axis.get("units") or "")
        if axis.get("scale") and units not in _UNITS_LEFT_OUT:
            source.axes[dim] = Axis(float(axis["scale"]), units, float(axis.get("offset") or 0.0) or None)
    tem = find_item(signal["metadata"], "Acquisition_instrument", "TEM")
    source.attrs |= tem_attrs(tem or {})
    dwell = find_item(signal["metadata"], "Acquisition_instrument", "dwell_time")
    source.attrs["dwell_time_us"] = 1e6 * dwell if dwell else None
    if kind == "mrc":
        source.axes.clear()  # the header's steps are placeholders, often negative
        _add_direct_electron(source, dataset, scan_shape)
    return source


def _call(module: Any, path: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return module.file_reader(str(path), **options)
    except Exception as err:  # readers raise whatever a damaged file makes them raise
        name = _FORMATS[module.__name__.split(".")[-1]]
        raise ValueError(
            f"{path.name} looks like {name}, but cannot be read: {err or type(err).__name__}; is the file "
            "complete?"
        ) from err


def _pick(path: Path, signals: list[dict[str, Any]], dataset: str | None) -> dict[str, Any]:
    """The signal asked for, or the only one of highest rank from 4 down to 2."""
    titles = [
        f"{n} {find_item(s['metadata'], 'General', 'title') or ''} {s['data'].shape}"
        for n, s in enumerate(signals)
    ]
    if dataset is not None:
        if not dataset.isdigit() or int(dataset) >= len(signals):
            raise ValueError(f"{path.name} has no signal {dataset!r}; it has {'; '.join(titles) or 'none'}")
        return signals[int(dataset)]
    for ndim in (4, 3, 2):
        found = [n for n, signal in enumerate(signals) if signal["data"].ndim == ndim]
        if len(found) == 1:
            return signals[found[0]]
        if found:
            listed = "; ".join(titles[n] for n in found)
            raise ValueError(f"{path.name} holds several signals; choose one with --dataset NUMBER: {listed}")
    raise ValueError(f"{path.name} holds no patterns, but {'; '.join(titles) or 'nothing'}")


def _scan_axes_first(path: Path, signal: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """Data and axes with the scan before the detector."""
    data = signal["data"]
    axes = [axis.get("axis", axis) if "scale" not in axis else axis for axis in signal["axes"]]
    if len(axes) != data.ndim or data.ndim != 4:
        return data, axes if len(axes) == data.ndim else []
    scan = [n for n, axis in enumerate(axes) if axis.get("navigate")]
    if len(scan) == 2 and scan != [0, 1]:
        order = scan + [n for n in range(4) if n not in scan]
        return data.transpose(order), [axes[n] for n in order]
    return data, axes


# ---- Direct Electron ---------------------------------------------------------------------------------------


class _Placed:
    """Frames at the positions of a scan list; positions never visited read as zeros."""

    def __init__(self, frames: Any, numbers: np.ndarray) -> None:
        self.frames, self.numbers = frames, numbers  # numbers: (scan_y, scan_x), -1 where there is no frame
        self.shape, self.dtype, self.ndim = (*numbers.shape, *frames.shape[1:]), frames.dtype, 4

    def __getitem__(self, key: Any) -> np.ndarray:
        numbers = self.numbers[key if isinstance(key, tuple) else (key,)]
        out = np.zeros((*numbers.shape, *self.shape[2:]), self.dtype)
        for index, number in np.ndenumerate(numbers):
            if number >= 0:
                out[index] = np.asarray(self.frames[int(number)])
        return out


def _add_direct_electron(source: Source, dataset: str | None, scan_shape: tuple[int, int] | None) -> None:
    """Scan, steps and energy from the text file and scan list written beside ``NAME_movie.mrc``.

    The reader of rosettasciio sets every step to 1 when it finds that file, so it is read here.
    """
    stem = source.path.stem.removesuffix("_movie")
    info = source.path.with_name(f"{stem}_info.txt")
    if not info.is_file():
        source.notes.append(f"{info.name} is missing, so scan shape and calibration are not known")
        return
    lines = (line.partition("=") for line in info.read_text(errors="replace").splitlines())
    found = {key.strip(): value.strip() for key, _, value in lines}
    for dim, name in zip(DATACUBE_DIMS, ("Y (nanometers)", "X (nanometers)", "Y", "X"), strict=True):
        kind, units = ("Specimen", "nm") if "nano" in name else ("Diffraction", "1/nm")
        step = _number(found.get(f"{kind} Pixel Size {name}"))
        if step is not None and step > 0:
            source.axes[dim] = Axis(step, units)
    volt = _number(found.get("Instrument Accelerating Voltage (V)"))
    source.attrs["beam_energy_keV"] = volt / 1e3 if volt and volt > 0 else None
    source.attrs["detector"] = found.get("Camera Model")
    if found.get("Scan - Enable") != "Enable" or scan_shape is not None:
        return
    if found.get("Scan - Type", "Raster") == "Raster":
        part = "ROI Size" if found.get("Scan - ROI Enable") == "Enable" else "Size"
        size = [_number(found.get(f"Scan - {part} {axis}")) or 0 for axis in "YX"]
        source.scan_shape = (int(size[0]), int(size[1])) if min(size) >= 1 else None
        return
    coordinates = source.path.with_name(f"{stem}_scan_coordinates.csv")
    if not coordinates.is_file():
        source.notes.append(f"the scan follows a list, and {coordinates.name} is missing")
        return
    source.data = _place(source, np.loadtxt(coordinates, delimiter=",", dtype=int, ndmin=2)[:, ::-1], dataset)


def _place(source: Source, positions: np.ndarray, dataset: str | None) -> _Placed:
    """Frames at their `positions` (n, 2) as (y, x); of several passes the one named by `dataset`."""
    frames = source.data
    if len(positions) != frames.shape[0]:
        raise ValueError(
            f"the scan list of {source.path.name} has {len(positions)} positions, but the file holds "
            f"{frames.shape[0]} frames"
        )
    shape = pair(positions.max(axis=0) + 1)
    passes: list[np.ndarray] = []
    count = np.zeros(shape, int)
    for number, (y, x) in enumerate(positions):
        if count[y, x] == len(passes):
            passes.append(np.full(shape, -1))
        passes[count[y, x]][y, x] = number
        count[y, x] += 1
    if len(passes) > 1 and (dataset is None or not dataset.isdigit() or int(dataset) >= len(passes)):
        raise ValueError(
            f"{source.path.name} visits its positions up to {len(passes)} times, five dimensions in all; "
            "say which pass to "
            f"convert: --dataset 0 to --dataset {len(passes) - 1}"
        )
    numbers = passes[int(dataset or 0)]
    if missing := int((numbers < 0).sum()):
        source.notes.append(
            f"{missing} of {numbers.size} scan positions were not visited and hold zero counts"
        )
    return _Placed(frames, numbers)


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None

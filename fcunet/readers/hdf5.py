"""HDF5 files, told apart by their structure: py4DSTEM EMD, DECTRIS Arina, stempy, HyperSpy, any array."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from ..schema import DATACUBE_DIMS, GEOMETRY_ATTRS
from .base import Axis, Source, Stacked
from .bragg import geometry_from_py4dstem
from .zarrs import apply_hyperspy_axes, choose, tem_attrs

try:
    import h5py
    import hdf5plugin  # noqa: F401  its import registers the codecs of Arina files
except ImportError as err:  # pragma: no cover
    raise ImportError(
        f"{err.name} is needed to read HDF5 files; install it with: pip install 'fcunet[io]'"
    ) from err

# py4DSTEM's x is the first axis, the rows: R_Nx, R_Ny, Q_Nx, Q_Ny are scan_y, scan_x, qy, qx
_PY4DSTEM_ATTRS = {
    "QR_rotation": "py4dstem_QR_rotation_rad",
    "QR_rotation_degrees": "py4dstem_QR_rotation_degree",
    "QR_flip": "py4dstem_QR_flip",
    "a": "py4dstem_ellipse_a",
    "b": "py4dstem_ellipse_b",
    "theta": "py4dstem_ellipse_theta_rad",
    "qx0_mean": "origin_mean_qy_px",
    "qy0_mean": "origin_mean_qx_px",
}


def read_hdf5(path: Path, dataset: str | None = None, depth: int | None = None) -> Source:
    """An HDF5 file; the reader is chosen by what is in it.

    Raises
    ------
    ValueError
        If it holds no patterns, or more than one scan and neither `dataset` nor `depth` says which.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as err:
        raise ValueError(
            f"{path.name} is an HDF5 file that cannot be opened ({err}); is it complete?"
        ) from err
    if dataset is not None:
        if not isinstance(file.get(dataset), h5py.Dataset):
            raise ValueError(
                f"{path.name} has no array {dataset!r}; it has {', '.join(_datasets(file)) or 'none'}"
            )
        return _plain(path, file[dataset])
    if {"frames", "scan_positions"} <= set(file.get("electron_events", ())):
        from .events import read_events

        return read_events(path, file["electron_events"])
    if "entry/instrument/detector" in file and "entry/data" in file:
        return _read_arina(path, file)
    if "Experiments" in file and _text(file.attrs.get("file_format")) == "HyperSpy":
        return _read_hspy(path, file["Experiments"])
    if found := _find_class(file, "DataCube"):
        return _read_py4dstem(path, file, found)
    if "Metadata" in file and "Thumbnail" in file and "Version" in file:
        return _rosetta(path, "topspin")
    if "Data/Image" in file and "Version" in file:
        return _rosetta(path, "emd")
    if set(file) == {"STEM Metadata"} or ("STEM Metadata" in file and not _datasets(file, ndim=4)):
        master = path.with_name(f"{path.stem}_master.h5")
        raise ValueError(
            f"{path.name} holds the metadata of an Arina scan; convert the master file, {master.name}"
        )
    return _read_plain(path, file, depth)


# ---- py4DSTEM ----------------------------------------------------------------------------------------------


def _read_py4dstem(path: Path, file: h5py.File, cubes: dict[str, h5py.Group]) -> Source:
    name = choose(path, {f"{name}/data": group["data"].shape for name, group in cubes.items()})
    group = cubes[name.removesuffix("/data")]
    source = Source(path, "py4DSTEM EMD", group["data"], axes=_axes_from_dims(group))
    root = file[name.split("/")[0]]
    # EMD 1.0 keeps one calibration for the file, version 0.13 one in every datacube
    calibration = _calibration(root.get("metadatabundle/calibration", group.get("calibration")))
    # dims may hold a mean origin and are what is left where the calibration has no step
    for dims, key in ((DATACUBE_DIMS[:2], "R"), (DATACUBE_DIMS[2:], "Q")):
        step, units = calibration.get(f"{key}_pixel_size"), calibration.get(f"{key}_pixel_units")
        for dim in dims:
            if isinstance(step, float) and isinstance(units, str) and units not in ("pixels", "pixel"):
                old = source.axes.get(dim)
                source.axes[dim] = Axis(step, units, old.offset if old else None)
    for theirs, ours in (("qx0", "origin_qy"), ("qy0", "origin_qx")):
        if theirs in calibration and np.shape(calibration[theirs]) == source.data.shape[:2]:
            source.variables[ours] = calibration[theirs]
    source.attrs = {ours: calibration[key] for key, ours in _PY4DSTEM_ATTRS.items() if key in calibration}
    source.attrs |= geometry_from_py4dstem(calibration)
    if any(name in source.attrs for name in GEOMETRY_ATTRS):
        source.notes.append(
            "rotation, flip and ellipse are those of the file; strain will be corrected for them"
        )
    probes = [probe["data"] for probe in _find_class(file, "Probe").values() if "data" in probe]
    for data in probes[:1]:
        template = data[0] if data.ndim == 3 else data[()]
        if template.shape == source.data.shape[2:]:
            source.variables["probe"] = template
    return source


def _calibration(group: h5py.Group | None) -> dict[str, Any]:
    """Items of a py4DSTEM Calibration: numbers, strings, flags and arrays."""
    items: dict[str, Any] = {}
    for key, item in group.items() if group is not None else ():
        if not isinstance(item, h5py.Dataset):
            continue
        value = item[()]
        if isinstance(value, bytes | str):
            items[key] = _text(value)
        elif np.ndim(value):
            items[key] = value
        else:
            items[key] = bool(value) if item.dtype.kind == "b" else float(value)
    return items


# ---- DECTRIS Arina -----------------------------------------------------------------------------------------


def _read_arina(path: Path, file: h5py.File) -> Source:
    group = file["entry/data"]
    names = sorted(name for name in group if name.startswith("data_"))
    if not names:
        master = re.sub(r"_data_\d+$", "_master", path.stem)
        raise ValueError(f"{path.name} is no Arina master file; convert {master}.h5")
    missing = []
    for name in names:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink) and not path.with_name(Path(link.filename).name).is_file():
            missing.append(Path(link.filename).name)
    if missing:
        raise ValueError(
            f"{path.name} only describes a scan whose data file {missing[0]} is missing"
            + (f" ({len(missing)} of {len(names)} are)" if len(names) > 1 else "")
            + f"; put it into {path.parent}"
        )
    try:
        stacks = [group[name] for name in names]
    except (KeyError, OSError) as err:
        raise ValueError(f"a data file of {path.name} cannot be opened ({err}); is it complete?") from err
    # the dtype is kept: a pixel counts beyond 65535 in long exposures, and wraps without a word in uint16
    data = Stacked(stacks)
    detector = file["entry/instrument/detector"]
    source = Source(path, "DECTRIS Arina", data)
    source.attrs["detector"] = _text(_value(detector, "description"))
    source.attrs["dwell_time_us"] = 1e6 * _value(detector, "frame_time", np.nan)
    specific = detector.get("detectorSpecific", {})
    source.attrs["beam_energy_keV"] = _value(specific, "photon_energy", 0) / 1e3 or None
    if "pixel_mask" in specific:
        source.variables["detector_mask"] = specific["pixel_mask"][()] == 0
    announced = int(_value(specific, "nimages", 0)) * int(_value(specific, "ntrigger", 0))
    n = data.shape[0]
    if announced > n:
        source.incomplete = f"the master announces {announced} frames"
    companion = path.with_name(f"{path.stem.removesuffix('_master')}.h5")
    if companion != path and companion.is_file():
        _add_stem_metadata(source, companion)
    side = round(n**0.5)
    if source.scan_shape is None and side * side == n:
        source.scan_shape = (side, side)
        source.notes.append(f"the scan is taken as square, {side} x {side}; if it is not, give --scan-shape")
    return source


def _add_stem_metadata(source: Source, companion: Path) -> None:
    """Scan shape, step and microscope settings from the file beside the master."""
    with h5py.File(companion, "r") as file:
        found = dict(file["STEM Metadata"].attrs) if "STEM Metadata" in file else {}
    facts = {
        key: float(np.ravel(value)[0])
        for key, value in found.items()
        if np.asarray(value).dtype.kind in "iuf"
    }
    shape = int(facts.get("NumPixelsY", 0)), int(facts.get("NumPixelsX", 0))
    if shape[0] * shape[1] == source.data.shape[0]:
        source.scan_shape = shape
    if facts.get("Pixel Size", 0) > 0:
        source.axes |= {dim: Axis(facts["Pixel Size"], "nm") for dim in DATACUBE_DIMS[:2]}
        if not facts.get("IsPixelSizeCalibrated", 1):
            source.notes.append("the scan step is as the microscope gave it, flagged as not calibrated")
    source.attrs["camera_length_mm"] = 1e3 * facts.get("Camera Length", 0) or None
    source.attrs["beam_energy_keV"] = facts.get("High Tension", 0) / 1e3 or source.attrs["beam_energy_keV"]


# ---- HyperSpy ----------------------------------------------------------------------------------------------


def _read_hspy(path: Path, experiments: h5py.Group) -> Source:
    signals = {name: group for name, group in experiments.items() if "data" in group}
    name = choose(path, {name: group["data"].shape for name, group in signals.items()})
    group = signals[name]
    source = Source(path, "HyperSpy hspy", group["data"])
    axes = [
        {key: _text(value) if isinstance(value, bytes) else value for key, value in group[key].attrs.items()}
        for key in sorted(group)
        if key.startswith("axis-")
    ]
    apply_hyperspy_axes(source, axes)
    tem = group.get("metadata/Acquisition_instrument/TEM")
    source.attrs |= tem_attrs(dict(tem.attrs) if tem is not None else {})
    return source


# ---- anything else -----------------------------------------------------------------------------------------


def _read_plain(path: Path, file: h5py.File, depth: int | None) -> Source:
    for ndim in (4, 3, 2):
        found = _datasets(file, ndim)
        layers = {m[1]: name for name in found if (m := re.search(r"_depth(\d+)(?=/|$)", name))}
        if len(layers) > 1 and len(layers) == len(found):
            return _plain(path, file[_pick_depth(path, layers, depth)], depth)
        if found:
            break
    name = choose(path, {name: file[name].shape for name in found or _datasets(file)})
    master = path.with_name(re.sub(r"_data_\d+$", "_master", path.stem) + path.suffix)
    if master != path and master.is_file():
        raise ValueError(f"{path.name} holds part of a DECTRIS scan; convert the master file, {master.name}")
    if file[name].dtype.kind == "b" and file[name].ndim == 2:
        raise ValueError(f"{path.name} holds a mask ({name}, {file[name].shape}), not patterns")
    return _plain(path, file[name])


def _pick_depth(path: Path, layers: dict[str, str], depth: int | None) -> str:
    names = [layers[key] for key in sorted(layers)]
    if depth is None:
        raise ValueError(
            f"{path.name} holds a scan at each of {len(names)} depths of the sample, five dimensions in all; "
            f"say which to convert: --depth 0 to --depth {len(names) - 1}"
        )
    if not 0 <= depth < len(names):
        raise ValueError(f"{path.name} has depths 0 to {len(names) - 1}, not {depth}")
    return names[depth]


def _plain(path: Path, data: h5py.Dataset, depth: int | None = None) -> Source:
    source = Source(path, "HDF5", data, axes=_axes_from_dims(data.parent) if data.ndim == 4 else {})
    if depth is not None:
        source.attrs["depth_index"] = depth
    return source


def _axes_from_dims(group: h5py.Group) -> dict[str, Axis]:
    """Axes of the EMD convention: ``dim0``.. or ``dim1``.. beside the data."""
    first = 0 if "dim0" in group else 1
    axes = {}
    for n, dim in enumerate(DATACUBE_DIMS):
        values = group.get(f"dim{n + first}")
        if values is None or values.shape[0] < 2:
            continue
        units = _text(values.attrs.get("units")).replace("[", "").replace("]", "").replace("_", "")
        start, second = (float(v) for v in values[:2])
        if units and units not in ("pixels", "pixel", "px"):
            axes[dim] = Axis(second - start, units, start or None)
    return axes


def _find_class(file: h5py.File, name: str) -> dict[str, h5py.Group]:
    """Groups that say they hold a py4DSTEM object of this class, by path."""
    found = {}

    def look(path: str, item: Any) -> None:
        if not isinstance(item, h5py.Group) or "data" not in item:
            return
        if name in (_text(item.attrs.get(key)) for key in ("python_class", "py4dstem_class")):
            found[path] = item

    file.visititems(look)
    return found


def _datasets(file: h5py.File, ndim: int | None = None) -> list[str]:
    """Paths of numeric arrays."""
    found = []

    def look(path: str, item: Any) -> None:
        if (
            isinstance(item, h5py.Dataset)
            and item.dtype.kind in "uifb"
            and ndim in (None, item.ndim)
            and item.ndim
        ):
            found.append(path)

    file.visititems(look)
    return found


def _rosetta(path: Path, kind: str) -> Source:
    from .rosetta import read_rosetta

    return read_rosetta(path, kind)


def _value(group: Any, name: str, default: Any = None) -> Any:
    return group[name][()] if name in group else default


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else "" if value is None else str(value)

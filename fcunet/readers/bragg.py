"""Bragg peaks found by other programs: py4DSTEM files of all its formats since 0.12, and tables.

py4DSTEM's x is the first array axis (rows, our y) and its y the second (columns, our x). Positions are kept
in raw detector px; what the file says of origin, pixel sizes, ellipse, rotation and flip goes along.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .. import schema
from ..units import to_inverse_angstrom, to_nm

_HDF5 = b"\x89HDF\r\n\x1a\n"
_PARQUET = b"PAR1"
_CALIBRATIONS = ("Calibration", "Coordinates")
# columns of a table, by the names that are understood
_COLUMNS = {
    "row": ("row", "scan_row", "rx"),
    "column": ("column", "col", "scan_column", "scan_col", "ry"),
    "peak_qy": ("peak_qy_px", "peak_qy", "q_row", "qy_px", "qy"),
    "peak_qx": ("peak_qx_px", "peak_qx", "q_col", "qx_px", "qx"),
    "peak_intensity": ("peak_intensity_v", "peak_intensity", "intensity"),
    "peak_sigma": ("peak_sigma_px", "peak_sigma", "sigma"),
}


def read_peaks(path: str | Path, dataset: str | None = None) -> xr.Dataset:
    """Bragg peaks from a file of another program, to fit lattices and strain to.

    Parameters
    ----------
    path : path
        HDF5 file of py4DSTEM 0.12 or newer with Bragg vectors; or a table, CSV or parquet, with a line per
        peak and columns `row`, `column` (scan position from 0), `peak_qy`, `peak_qx` (px), and if known
        `peak_intensity`, `peak_sigma` (px), with or without the unit that `fcunet export` adds.
    dataset : str, optional
        Path of the Bragg vectors inside the file, where it holds several.

    Returns
    -------
    Dataset
        `peak_qy`, `peak_qx`, `peak_intensity` and, from tables, `peak_sigma` (scan_y, scan_x, peak) float32,
        raw detector px, NaN-padded, brightest first; `n_peaks`, `truncated`; `origin_qy`, `origin_qx` if the
        file has origins. Step of the scan in the coordinates (nm, or px). Attributes, each if known:
        ``detector_shape``, ``q_pixel_size`` (1/angstrom per px), ``scan_rotation_degree``,
        ``scan_transposed``, ``ellipse_ratio``, ``ellipse_angle_degree``; ``source_format``.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, no peaks in it, or several and no `dataset`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as stream:
        head = stream.read(8)
    if head == _HDF5:
        return _read_py4dstem(path, dataset)
    if head[:4] == _PARQUET or path.suffix.lower() in (".csv", ".tsv", ".txt"):
        return _read_table(path, parquet=head[:4] == _PARQUET)
    raise ValueError(
        f"{path.name} is neither an HDF5 file, as py4DSTEM writes Bragg vectors, nor a table of peaks "
        "(CSV or parquet)"
    )


# ---- py4DSTEM ----------------------------------------------------------------------------------------------


def _read_py4dstem(path: Path, dataset: str | None) -> xr.Dataset:
    import h5py

    with h5py.File(path, "r") as file:
        records = _choose(path, _bragg_vectors(file), dataset)
        arrays, counts = _padded(records)
        place = records.parent.parent if records.parent.name.endswith("_v_uncal") else records.parent
        facts = _facts(file, place.name)
        shape = facts.get("Qshape") or _shape_of_cube(file) or _extent(arrays)
        source_format = _format_of(file, place)
    peaks = _dataset(dict(zip(("peak_qy", "peak_qx", "peak_intensity"), arrays, strict=True)), counts)
    peaks.attrs = {"detector_shape": shape, "source_format": source_format}
    _add_calibration(peaks, facts)
    return peaks


def _bragg_vectors(file: Any) -> dict[str, Any]:
    """Arrays of peak lists by path: two-dimensional, of records with qx, qy and intensity, uncalibrated."""
    import h5py

    found: dict[str, Any] = {}

    def look(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.ndim == 2 and not name.endswith("_v_cal/data"):
            record = h5py.check_vlen_dtype(node.dtype)
            if record is not None and {"qx", "qy", "intensity"} <= set(record.names or ()):
                found[name.removesuffix("/data").removesuffix("/_v_uncal")] = node

    file.visititems(look)
    return found


def _choose(path: Path, found: Mapping[str, Any], dataset: str | None) -> Any:
    """The Bragg vectors asked for, the only ones, or the raw ones beside corrected copies (0.12)."""
    if not found:
        raise ValueError(
            f"{path.name} holds no Bragg vectors; save them in py4DSTEM: py4DSTEM.save(path, braggvectors)"
        )
    if dataset is not None:
        wanted = dataset.strip("/")
        if wanted not in found:
            raise ValueError(f"{path.name} has no Bragg vectors {wanted!r}; it has {', '.join(found)}")
        return found[wanted]
    raw = [name for name in found if name.endswith("_raw")]
    names = raw if len(raw) == 1 else list(found)
    if len(names) > 1:
        raise ValueError(
            f"{path.name} holds several sets of Bragg vectors: {', '.join(names)}; choose one with --dataset"
        )
    return found[names[0]]


def _padded(records: Any) -> tuple[np.ndarray, np.ndarray]:
    """Row, column, intensity as (3, scan_y, scan_x, peak) float32, brightest first, and the counts."""
    rows = [records[iy] for iy in range(records.shape[0])]
    longest = max((len(record) for row in rows for record in row), default=0)
    arrays = np.full((3, *records.shape, max(longest, 1)), np.nan, np.float32)
    counts = np.zeros(records.shape, np.int16)
    for iy, row in enumerate(rows):
        for ix, record in enumerate(row):
            if not len(record):  # also an empty slot of no type
                continue
            record = record[np.argsort(-record["intensity"], kind="stable")]
            counts[iy, ix] = len(record)
            for array, name in zip(arrays, ("qx", "qy", "intensity"), strict=True):
                array[iy, ix, : len(record)] = record[name]
    return arrays, counts


def _facts(file: Any, place: str) -> dict[str, Any]:
    """Calibration nearest to the Bragg vectors at `place`, and the shape of the detector, as spelt there."""
    import h5py

    calibrations: dict[str, Any] = {}
    facts: dict[str, Any] = {}

    def look(name: str, node: Any) -> None:
        if isinstance(node, h5py.Group):
            kind = _text(node.attrs.get("python_class", node.attrs.get("py4dstem_class", "")))
            if kind in _CALIBRATIONS or "/coordinates/" in name or name.endswith("/calibration"):
                calibrations[f"/{name}"] = node
        elif name.endswith("/Qshape") and f"/{name}".startswith(place):
            facts["Qshape"] = [int(n) for n in node[()]]

    file.visititems(look)
    near = [name for name, node in calibrations.items() if any(hasattr(v, "dtype") for v in node.values())]
    if near:
        best = max(near, key=lambda name: _common_parts(name, place))
        node = calibrations[best]
        facts |= {key: item[()] for key, item in node.items() if isinstance(item, h5py.Dataset)}
        if "Q_Nx" in facts and "Qshape" not in facts:
            facts["Qshape"] = [int(facts["Q_Nx"]), int(facts["Q_Ny"])]
    return facts


def _common_parts(a: str, b: str) -> int:
    return sum(1 for x, y in zip(a.split("/"), b.split("/"), strict=False) if x == y)


def _shape_of_cube(file: Any) -> list[int] | None:
    """Detector shape of a datacube in the same file."""
    import h5py

    found: list[list[int]] = []

    def look(_: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.ndim == 4:
            found.append([int(n) for n in node.shape[2:]])

    file.visititems(look)
    return found[0] if found else None


def _extent(arrays: np.ndarray) -> list[int]:
    """A shape that just holds all peaks, where the file does not tell."""
    return [int(np.nanmax(a)) + 2 if np.isfinite(a).any() else 1 for a in arrays[:2]]


def _format_of(file: Any, place: Any) -> str:
    for node in (place, *(file[name] for name in file)):
        if "version_minor" in node.attrs:
            version = ".".join(_text(node.attrs[f"version_{part}"]) for part in ("major", "minor"))
            return f"py4DSTEM {version} Bragg vectors"
    return "py4DSTEM BraggVectors (EMD 1.0)"


def _add_calibration(peaks: xr.Dataset, facts: Mapping[str, Any]) -> None:
    """Origins, steps, and how the detector lies against the scan, from py4DSTEM's calibration."""
    ny, nx = peaks.sizes["scan_y"], peaks.sizes["scan_x"]
    for ours, theirs in (("origin_qy", "qx0"), ("origin_qx", "qy0")):
        origin = np.asarray(facts.get(theirs, facts.get(f"{theirs}_mean", "")))
        if origin.shape in ((), (ny, nx)) and origin.dtype.kind in "fiu":
            full = np.broadcast_to(origin.astype(np.float64), (ny, nx)).copy()
            peaks[ours] = (schema.SCAN_DIMS, full, schema.DATACUBE[ours].attrs)
    if step := _step(facts, "R", to_nm):
        for dim, n in zip(schema.SCAN_DIMS, (ny, nx), strict=True):
            peaks[dim] = (dim, np.arange(n) * step, {"units": schema.UNIT_SCAN})
    if q_step := _step(facts, "Q", to_inverse_angstrom):
        peaks.attrs |= {"q_pixel_size": q_step, "q_pixel_units": schema.UNIT_Q}
    peaks.attrs |= geometry_from_py4dstem(facts)


def _step(facts: Mapping[str, Any], space: str, convert: Callable[[float, str], float]) -> float | None:
    """Pixel size of a space, R or Q, in our unit; None where it is not calibrated."""
    size = _number(facts.get(f"{space}_pixel_size"))
    try:
        return convert(size, _text(facts.get(f"{space}_pixel_units", ""))) if size and size > 0 else None
    except ValueError:  # "pixels", or an angle without the beam energy
        return None


def geometry_from_py4dstem(facts: Mapping[str, Any]) -> dict[str, float]:
    """Rotation, flip and ellipse of a py4DSTEM calibration as the attributes of a datacube or of peaks.

    py4DSTEM shrinks vectors by b / a along the direction at `theta` from its x (rows) towards its y
    (columns), exchanges x and y if `QR_flip`, and turns them by `QR_rotation` from x towards y. Our angle of
    the ellipse runs from columns towards rows; the rotation is the same number.
    """
    geometry: dict[str, float] = {}
    rotation, flip = _number(facts.get("QR_rotation")), facts.get("QR_flip")
    if rotation is not None:
        geometry["scan_rotation_degree"] = float(np.rad2deg(rotation))
    if isinstance(flip, bool | np.bool_) and flip:
        geometry["scan_transposed"] = 1.0
    a, b, theta = (_number(facts.get(name)) for name in ("a", "b", "theta"))
    if a and b and theta is not None and a != b:
        angle = 90.0 - np.rad2deg(theta) + (0.0 if a > b else 90.0)
        geometry |= {"ellipse_ratio": max(a, b) / min(a, b), "ellipse_angle_degree": float(angle % 180)}
    return geometry


# ---- tables ------------------------------------------------------------------------------------------------


def _read_table(path: Path, *, parquet: bool) -> xr.Dataset:
    import pandas as pd

    try:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        table = pd.read_parquet(path) if parquet else pd.read_csv(path, sep=separator, comment="#")
    except ImportError as err:
        raise ImportError('parquet needs one more package: pip install "fcunet[tables]"') from err
    except (ValueError, OSError) as err:
        raise ValueError(f"{path.name} cannot be read as a table: {err}") from err
    by_name = {str(name).strip().lower(): name for name in table.columns}
    columns = {
        ours: table[by_name[next(n for n in names if n in by_name)]].to_numpy()
        for ours, names in _COLUMNS.items()
        if any(n in by_name for n in names)
    }
    if missing := [name for name in ("row", "column", "peak_qy", "peak_qx") if name not in columns]:
        raise ValueError(
            f"{path.name} lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns))}. A table "
            "of peaks has a line per peak: row, column (scan position, from 0), peak_qy, peak_qx (px), and "
            "if known peak_intensity, peak_sigma"
        )
    peaks = _from_columns(path, columns)
    for dim, index in (("scan_y", "row"), ("scan_x", "column")):
        if f"{dim}_nm" in by_name:
            _add_step(peaks, dim, columns[index], table[by_name[f"{dim}_nm"]].to_numpy(float))
    return peaks


def _from_columns(path: Path, columns: Mapping[str, np.ndarray]) -> xr.Dataset:
    """Lines of a table sorted into (scan_y, scan_x, peak)."""
    row, column = (np.asarray(columns[name]) for name in ("row", "column"))
    whole = [np.all(np.isfinite(v.astype(float))) and np.all(v == np.floor(v)) for v in (row, column)]
    if not len(row) or not all(whole) or min(row.min(), column.min()) < 0:
        raise ValueError(f"row and column of {path.name} must be whole numbers from 0, one line per peak")
    row, column = row.astype(int), column.astype(int)
    shape = int(row.max()) + 1, int(column.max()) + 1
    strength = np.asarray(columns.get("peak_intensity", np.ones(len(row))), dtype=float)
    order = np.lexsort((-strength, column, row))
    flat = (row * shape[1] + column)[order]
    counts = np.bincount(flat, minlength=shape[0] * shape[1])
    slot = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    values = {}
    for name in ("peak_qy", "peak_qx", "peak_intensity", "peak_sigma"):
        if name in columns or name == "peak_intensity":
            source = strength if name == "peak_intensity" else np.asarray(columns[name], dtype=float)
            array = np.full((shape[0] * shape[1], int(counts.max())), np.nan, np.float32)
            array[flat, slot] = source[order]
            values[name] = array.reshape(*shape, -1)
    peaks = _dataset(values, counts.reshape(shape).astype(np.int16))
    peaks.attrs = {
        "detector_shape": _extent(np.stack([values["peak_qy"], values["peak_qx"]])),
        "source_format": "table of peaks",
    }
    return peaks


def _add_step(peaks: xr.Dataset, dim: str, index: np.ndarray, position: np.ndarray) -> None:
    """Scan coordinate in nm from the positions of the lines, if they lie on one straight line."""
    if len(np.unique(index)) < 2 or not np.isfinite(position).all():
        return
    step, first = np.polyfit(index.astype(float), position, 1)
    if step > 0:
        peaks[dim] = (dim, first + step * np.arange(peaks.sizes[dim]), {"units": schema.UNIT_SCAN})


# ---- both --------------------------------------------------------------------------------------------------


def _dataset(values: Mapping[str, np.ndarray], counts: np.ndarray) -> xr.Dataset:
    """Labelled peaks with pixel coordinates."""
    peaks = xr.Dataset(
        {name: (schema.PEAK_DIMS, value, schema.PEAKS[name].attrs) for name, value in values.items()}
    )
    peaks["n_peaks"] = (schema.SCAN_DIMS, counts, schema.PEAKS["n_peaks"].attrs)
    peaks["truncated"] = (schema.SCAN_DIMS, np.zeros(counts.shape, bool), schema.PEAKS["truncated"].attrs)
    for dim, n in zip(schema.SCAN_DIMS, counts.shape, strict=True):
        peaks[dim] = (dim, np.arange(n, dtype=float), {"units": schema.UNIT_PIXEL})
    return peaks


def _number(value: Any) -> float | None:
    """A finite number, or None: py4DSTEM writes what it does not know as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

"""Where a calibration is kept: in the datacube, beside the patterns, which are never touched.

What is kept: the beam centre per position (`origin_qy`, `origin_qx`), probe templates, the mask of a beam
stop, the detector axes in 1/angstrom, and attributes: ``scan_rotation_degree``, ``scan_transposed``,
``ellipse_ratio``, ``ellipse_angle_degree``, and ``calibration``: how each was measured and what was there
before. A run reads all this from the scan and applies it in the pass that finds the disks, and after.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from . import schema
from .kernels.descan import surface_at
from .provenance import to_json
from .recalibrate import Measured
from .session import write_text
from .store import open_datacube
from .zarrfolder import put_array, replace_folder, root_attrs

__all__ = ["apply_from", "reset", "save"]

_RECORD = "calibration"
_ARRAYS = ("origin_qy", "origin_qx", "templates", "template_index", "detector_mask", "probe", "qy", "qx")
_KEPT = "before_calibration"  # folder of the arrays that were replaced


def save(path: str | Path, measured: Measured) -> None:
    """Keep what was measured with the scan; the patterns are not touched, and what was there is remembered.

    Each array appears complete or not at all; the attributes, which name them all, come last.

    Raises
    ------
    OSError
        If the store cannot be written.
    """
    _write(Path(path), measured.variables, measured.attrs, measured.record)


def _write(path: Path, variables: xr.Dataset, attrs: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    if not (path / "zarr.json").exists():
        raise ValueError(
            f"{path} is in Zarr format 2, beside which nothing of format 3 can be kept; convert it first: "
            f"fcunet convert {path} {path.stem}-3.zarr"
        )
    had = root_attrs(path)
    earlier = dict(had.get(_RECORD) or {})
    before = dict(earlier.get("before") or {})
    before_attrs = dict(before.get("attrs") or {})
    new_attrs = set(before.get("new_attrs", []))
    for name in attrs:
        if name not in had:
            new_attrs.add(name)
        elif name not in new_attrs:
            before_attrs.setdefault(name, had[name])
    draft = path / f"calibration.partial.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        group = zarr.create_group(draft, zarr_format=3)
        names = [name for name in _ARRAYS if name in variables]
        for name in names:
            values = variables[name]
            table = schema.DATACUBE[name].attrs if name in schema.DATACUBE else {}
            put_array(group, name, values.values, tuple(map(str, values.dims)), table | values.attrs)
        kept = path / _KEPT
        for name in names:
            if (path / name).exists() and not (kept / name).exists() and name not in before.get("made", []):
                zarr.open_group(kept, mode="a", zarr_format=3)
                shutil.copytree(path / name, kept / name)
        made = sorted({*before.get("made", []), *(n for n in names if not (kept / n).exists())})
        for name in names:
            replace_folder(draft / name, path / name)
        whole = (
            earlier
            | dict(record)
            | {"before": {"attrs": before_attrs, "new_attrs": sorted(new_attrs), "made": made}}
        )
        zarr.open_group(path, mode="r+", use_consolidated=False).attrs.update(
            to_json(dict(attrs) | {_RECORD: whole})
        )
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def reset(path: str | Path) -> list[str]:
    """Put back what the scan said before it was calibrated; the names of what was put back or taken away.

    Raises
    ------
    ValueError
        If the scan was not calibrated.
    """
    path = Path(path)
    had = root_attrs(path)
    if _RECORD not in had:
        raise ValueError(f"{path} holds no calibration to take back; make one with: fcunet calibrate {path}")
    before = dict(dict(had[_RECORD]).get("before") or {})
    names = list(before.get("made", []))
    for name in names:
        shutil.rmtree(path / name, ignore_errors=True)
    kept = path / _KEPT
    for folder in sorted(f for f in kept.iterdir() if f.is_dir()) if kept.is_dir() else []:
        replace_folder(folder, path / folder.name)
        names.append(folder.name)
    shutil.rmtree(kept, ignore_errors=True)
    metadata = json.loads((path / "zarr.json").read_text())
    attrs = metadata["attributes"]
    old = dict(before.get("attrs") or {})
    new = list(before.get("new_attrs", []))
    for name in new:
        attrs.pop(name, None)
    attrs |= old
    names += [*new, *old]
    attrs.pop(_RECORD)
    write_text(path / "zarr.json", json.dumps(metadata, indent=2))  # zarr itself can only add attributes
    return names


def apply_from(path: str | Path, other: str | Path, *, dry_run: bool = False) -> list[str]:
    """Apply one scan's calibration to another, recorded on the same instrument with the same settings.

    Ellipse, pixel size, rotation, mask and templates are taken over; so is a recorded vacuum probe if the
    scan has none. The descan is taken over as its surface: in nm from the middle of the scan where both scans
    have steps in nm, else position by position for scans of equal shape.

    Parameters
    ----------
    path : path
        The datacube to calibrate.
    other : path
        A calibrated datacube.
    dry_run : bool
        Say what would be written, and write nothing.

    Returns
    -------
    list of str
        What was taken over, and warnings, to print.

    Raises
    ------
    ValueError
        If `other` was not calibrated, or has another detector or beam energy.
    """
    source, target = open_datacube(other), open_datacube(path)
    record = source.attrs.get(_RECORD)
    if not record:
        raise ValueError(f"{other} is not calibrated; do that first: fcunet calibrate {other}")
    record = dict(record)
    shapes = [tuple(d.sizes[n] for n in schema.PATTERN_DIMS) for d in (source, target)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{other} has a detector of {shapes[0]}, {path} one of {shapes[1]}: calibrate this scan by "
            f"itself: fcunet calibrate {path}"
        )
    lines = []
    for name, unit in (("beam_energy_keV", "keV"), ("camera_length_mm", "mm")):
        a, b = source.attrs.get(name), target.attrs.get(name)
        if a is not None and b is not None and not math.isclose(float(a), float(b), rel_tol=0.01):
            raise ValueError(
                f"{name} is {a} {unit} in {other} and {b} in {path}: a calibration holds for one setting only"
            )
    variables: dict[str, xr.DataArray] = {}
    attrs = {
        n: source.attrs[n] for n in schema.GEOMETRY_ATTRS if n in source.attrs and n in _measured(record)
    }
    if attrs:
        lines.append("taken over: " + ", ".join(f"{k} {float(v):.5g}" for k, v in attrs.items()))
    if "q_pixel" in record:
        for dim in schema.PATTERN_DIMS:
            variables[dim] = source[dim].reset_coords(drop=True)
        lines.append(f"pixel {record['q_pixel']['value']:.6f} 1/angstrom")
    if "detector_mask" in source and "detector_mask" not in target:
        variables["detector_mask"] = source["detector_mask"].drop_vars(schema.PATTERN_DIMS, errors="ignore")
        lines.append("detector mask")
    if "probe" in source and "probe" not in target:
        variables["probe"] = source["probe"].drop_vars(schema.PATTERN_DIMS, errors="ignore")
        lines.append("vacuum probe")
    if "origin" in record:
        origin, how = _carried_origin(record["origin"], source, target)
        for i, name in enumerate(("origin_qy", "origin_qx")):
            variables[name] = xr.DataArray(origin[..., i].astype(np.float32), dims=schema.SCAN_DIMS)
        lines.append(f"descan {how}: {float(np.hypot(*np.ptp(origin, axis=(0, 1)))):.2f} px over this scan")
    if "templates" in source:
        index, scan = source["template_index"].values, (target.sizes["scan_y"], target.sizes["scan_x"])
        grid = [((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(scan, index.shape, strict=True)]
        variables["templates"] = xr.DataArray(
            source["templates"].values, dims=("template", *schema.PATTERN_DIMS)
        )
        variables["template_index"] = xr.DataArray(index[np.ix_(*grid)], dims=schema.SCAN_DIMS)
        lines.append(f"{len(source['templates'])} templates")
    taken = {k: v for k, v in record.items() if k != "before"}
    taken["from"] = str(source.attrs.get("title") or Path(other).stem)
    if not dry_run:
        _write(Path(path), xr.Dataset(variables), attrs, taken)
    return lines


def _measured(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the attributes that a record speaks of."""
    names: tuple[str, ...] = ()
    if "ellipse" in record:
        names += ("ellipse_ratio", "ellipse_angle_degree")
    if "rotation" in record and record["rotation"].get("kept"):
        names += ("scan_rotation_degree", "scan_transposed")
    return names


def _carried_origin(
    facts: Mapping[str, Any], source: xr.Dataset, target: xr.Dataset
) -> tuple[NDArray[np.float64], str]:
    """Beam centre (scan_y, scan_x, 2) of `target` from the surface measured in `source`."""
    surface = np.asarray(facts["coefficients"], dtype=float)
    shapes = [np.array([d.sizes[n] for n in schema.SCAN_DIMS]) for d in (source, target)]
    steps = [
        [float(d[n][1] - d[n][0]) if d.sizes[n] > 1 else math.nan for n in schema.SCAN_DIMS]
        for d in (source, target)
    ]
    in_nm = all(
        d[n].attrs.get("units") == schema.UNIT_SCAN for d in (source, target) for n in schema.SCAN_DIMS
    )
    y, x = np.mgrid[: shapes[1][0], : shapes[1][1]]
    position = np.stack([y, x], axis=-1).astype(float)
    if in_nm and np.isfinite(steps).all():
        ratio = np.array(steps[1]) / np.array(steps[0])
        position = (position - (shapes[1] - 1) / 2) * ratio + (shapes[0] - 1) / 2
        return surface_at(surface, position), "by distance from the middle of the scan"
    if (shapes[0] == shapes[1]).all():
        return surface_at(surface, position), "position by position"
    raise ValueError(
        f"the scans have {tuple(shapes[0])} and {tuple(shapes[1])} positions and no step in nm: the descan "
        "cannot be carried over; convert with --scan-step, or measure it here first: fcunet calibrate SCAN"
    )

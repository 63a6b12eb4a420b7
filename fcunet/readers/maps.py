"""Maps of a scan that py4DSTEM wrote: RealSlice stacks such as strain, as labelled data with our names."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .. import schema
from ..units import to_nm

# py4DSTEM's x is the first axis (rows, our y)
_STRAIN = {"e_xx": "e_yy", "e_yy": "e_xx", "e_xy": "e_xy", "theta": "theta"}
_STRAIN |= {f"{theirs}_std": f"{ours}_std" for theirs, ours in _STRAIN.items()}
_CLASSES = ("RealSlice", "VirtualImage", "StrainMap")


def read_maps(path: str | Path, dataset: str | None = None) -> xr.Dataset:
    """Scan-shaped maps of a py4DSTEM file (EMD 1.0), to compare with results of ours.

    Parameters
    ----------
    path : path
        HDF5 file with a RealSlice, such as `fcunet export --to py4dstem` or ``py4DSTEM.save`` writes.
    dataset : str, optional
        Path of the RealSlice inside the file, where it holds several.

    Returns
    -------
    Dataset
        A variable per slice (scan_y, scan_x). Strain has our names and axes (their e_xx, along rows, is
        `e_yy`) but their definition, as ``convention="py4dstem"``, said in the attributes; NaN, not 1, where
        their mask is 0, which becomes `valid`. Step of the scan in nm, or px.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, no RealSlice in it, or several and no `dataset`.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path.name} is not an HDF5 file; needed is one written by py4DSTEM.save()")
    with h5py.File(path, "r") as file:
        found: dict[str, Any] = {}

        def look(name: str, node: Any) -> None:
            if _text(node.attrs.get("python_class", "")) in _CLASSES and "data" in node:
                found[name] = node

        file.visititems(look)
        names = [dataset.strip("/")] if dataset is not None else list(found)
        if len(names) != 1 or names[0] not in found:
            held = ", ".join(found) or "no RealSlice"
            raise ValueError(f"{path.name} holds {held}" + ("; choose one with dataset=" if found else ""))
        node = found[names[0]]
        data = node["data"][()]
        labels = [_text(v) for v in node["dim2"][()]] if data.ndim == 3 else [names[0].split("/")[-1]]
        axes = {dim: _axis(node, n, dim, data.shape[n - 2]) for n, dim in enumerate(schema.SCAN_DIMS)}
    slices = dict(zip(labels, data if data.ndim == 3 else data[None], strict=True))
    return _labelled(slices, axes).assign_attrs(source_format=f"py4DSTEM {names[0].split('/')[-1]}")


def _labelled(slices: dict[str, np.ndarray], axes: dict[str, xr.DataArray]) -> xr.Dataset:
    """The maps with coordinates; strain under our names, masked."""
    maps = xr.Dataset(coords=axes)
    is_strain = {"e_xx", "e_yy", "e_xy", "theta"} <= set(slices)
    mask = slices.pop("mask") > 0 if is_strain and "mask" in slices else None
    for label, values in slices.items():
        if is_strain and label == "error":  # py4DSTEM never fills it: uninitialised memory
            continue
        name = _STRAIN.get(label, label) if is_strain else label
        values = np.asarray(values, dtype=np.float64)
        if mask is not None and name in schema.STRAIN:
            values = np.where(mask, values, np.nan)
        maps[name] = (schema.SCAN_DIMS, values, schema.STRAIN[name].attrs if name in schema.STRAIN else {})
    if mask is not None:
        maps["valid"] = (schema.SCAN_DIMS, mask, schema.STRAIN["valid"].attrs)
    if is_strain:
        maps.attrs["convention"] = "py4dstem"
    return maps


def _axis(node: Any, number: int, dim: str, size: int) -> xr.DataArray:
    """Scan coordinate from the first two values of a dim, in nm, or in px if it is not calibrated."""
    scale, unit = 1.0, schema.UNIT_PIXEL
    if f"dim{number}" in node and node[f"dim{number}"].shape[0] > 1:
        first, second = (float(v) for v in node[f"dim{number}"][:2])
        with contextlib.suppress(ValueError):  # "pixels"
            scale = to_nm(second - first, _text(node[f"dim{number}"].attrs.get("units")))
            unit = schema.UNIT_SCAN
    return xr.DataArray(scale * np.arange(size), dims=(dim,), attrs={"units": unit})


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

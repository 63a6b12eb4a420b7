"""Scans and maps as HyperSpy and pyxem keep them: ``.zspy``, a layout of Zarr format 2."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask
import numcodecs
import numpy as np
import xarray as xr
import zarr

from . import __version__, schema
from .datacube import block_grid
from .provenance import to_json

_FILE = {"file_format": "ZSpy", "file_format_version": "3.3"}
_TEM = {
    "beam_energy_keV": "beam_energy",
    "camera_length_mm": "camera_length",
    "convergence_semiangle_mrad": "convergence_angle",
}
_NAMES = {"scan_y": "y", "scan_x": "x", "qy": "ky", "qx": "kx"}
_UNKNOWN = "_None_"  # HyperSpy's word for None


def write_cube(path: Path, cube: xr.Dataset) -> None:
    """Write a datacube as one signal of HyperSpy (pyxem's `electron_diffraction`), block by block.

    The order of the axes is kept: HyperSpy shows the last scan axis first. Steps and units are those of the
    coordinates; what is not calibrated has scale 1 and no unit. Attributes go to ``original_metadata``.
    """
    intensity = cube["intensity"].transpose(*schema.DATACUBE_DIMS)
    grid = block_grid(intensity)
    shape = (*grid.block_shape, *intensity.shape[2:])
    group = _signal(path, str(cube.attrs.get("title") or path.stem), "electron_diffraction", cube.attrs)
    data = _data(group, intensity.shape, shape, intensity.dtype)
    for at in np.ndindex(*grid.n_blocks):  # one block in memory at a time
        region = grid.slices(*at)
        data[region] = dask.compute(intensity[region].data, scheduler="threads")[0]
    for number, dim in enumerate(schema.DATACUBE_DIMS):
        _axis(group, number, cube, dim, intensity.sizes[dim], navigate=dim in schema.SCAN_DIMS)


def write_maps(path: Path, results: xr.DataTree) -> None:
    """Write the scan-shaped variables of results, one signal each, named as in the results."""
    zarr.create_group(path, zarr_format=2, attributes=_FILE)
    for part in ("strain", "lattice", "virtual"):
        if part not in results.children:
            continue
        dataset = results[part].dataset
        for name, variable in dataset.data_vars.items():
            if variable.dims != schema.SCAN_DIMS:
                continue
            values = variable.values
            facts = dict(dataset.attrs) | dict(variable.attrs)
            group = _signal(path, str(name), "", facts, variable.attrs.get("units"))
            _data(group, values.shape, values.shape, values.dtype)[...] = values
            for number, dim in enumerate(schema.SCAN_DIMS):
                _axis(group, number, dataset, dim, variable.sizes[dim], navigate=False)


def _signal(
    path: Path, title: str, kind: str, facts: Mapping[Any, Any], quantity: str | None = None
) -> zarr.Group:
    """An empty signal with its metadata, in a store that is made if need be."""
    root = zarr.open_group(path, mode="a", zarr_format=2)
    root.attrs.update(_FILE)
    name = title.replace("/", "-") or "signal"
    group = root.require_group("Experiments").create_group(name)
    group.attrs.update({"package": "fcunet", "package_version": __version__})
    group.create_group("attributes").attrs.update({"_lazy": False, "ragged": False})
    metadata = group.create_group("metadata")
    metadata.create_group("General").attrs["title"] = title
    signal = metadata.create_group("Signal")
    signal.attrs["signal_type"] = kind
    if quantity and quantity != "1":
        signal.attrs["quantity"] = f"{title} ({quantity})"
    tem = {theirs: float(facts[ours]) for ours, theirs in _TEM.items() if ours in facts}
    if tem:
        metadata.create_group("Acquisition_instrument").create_group("TEM").attrs.update(tem)
    kept = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in to_json(facts).items()}
    group.create_group("original_metadata").create_group("fcunet").attrs.update(kept)
    group.create_group("learning_results")
    return group


def _data(group: zarr.Group, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any) -> zarr.Array:
    return group.create_array(
        "data",
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        compressors=numcodecs.Blosc(cname="zstd", clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE),
        chunk_key_encoding={"name": "v2", "separator": "/"},
        fill_value=0,
    )


def _axis(
    group: zarr.Group, number: int, dataset: xr.Dataset, dim: str, size: int, *, navigate: bool
) -> None:
    scale, offset, units = 1.0, 0.0, _UNKNOWN
    if dim in dataset.coords and dataset[dim].attrs.get("units") != schema.UNIT_PIXEL and size > 1:
        values = dataset[dim].values
        scale, offset = float(values[-1] - values[0]) / (size - 1), float(values[0])
        units = str(dataset[dim].attrs.get("units", _UNKNOWN)).replace("1/angstrom", "1/Å")
    group.create_group(f"axis-{number}").attrs.update(
        {
            "_type": "UniformDataAxis",
            "name": _NAMES[dim],
            "units": units,
            "scale": scale,
            "offset": offset,
            "size": int(size),
            "navigate": navigate,
            "is_binned": False,
        }
    )

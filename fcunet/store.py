"""The three Zarr stores of a run: datacube in, peaks between, results out.

One rule is enforced on every read and write: **one Dask block is one shard**. Two tasks that write into one
shard overwrite each other's patterns without any error (zarr-python issue 3682), and a task that reads half a
shard decompresses what its neighbour decompresses again. So blocks are addressed by index, (iy, ix), and only
whole ones are written. Both detector axes lie whole in every block.

Nothing half written is ever found under its final name: datacubes grow under ``NAME.zarr.partial`` and
results in a temporary folder, and both are renamed when complete. Zarr itself writes a shard to a temporary
file and renames it, so a process killed at any moment leaves whole shards only.

Datacubes live in `fcunet.datacube`; their functions are imported here, so that this is the one place to look.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from . import accessor, schema
from .calibration import Calibration
from .datacube import (
    DatacubeWriter,
    block_grid,
    coordinate,
    open_datacube,
    open_truth,
    pixel_coordinate,
    read_block,
    write_datacube,
)
from .layout import BlockGrid, Layout, check_blocks, plan_layout
from .provenance import to_json
from .remote import Place, Remote, local, place
from .shards import DamagedBlockError
from .zarrfolder import FLOAT_CODEC, existing, has_array, open_array, put_array, replace_folder, root_attrs

_ = accessor  # importing it puts .fcunet on datasets and trees

__all__ = [
    "BlockGrid",
    "DamagedBlockError",
    "DatacubeWriter",
    "Layout",
    "block_grid",
    "check_blocks",
    "coordinate",
    "create_peaks",
    "describe",
    "open_datacube",
    "open_peaks",
    "open_region",
    "open_results",
    "open_truth",
    "pixel_coordinate",
    "plan_layout",
    "read_block",
    "read_status",
    "set_status",
    "write_datacube",
    "write_peaks_block",
    "write_results",
]

RUNS_ARE_HERE = "only datacubes are read from there; copy the run directory to this machine first"
_PEAK_DTYPES = {"f": np.float32, "b": bool, "iu": np.int16}


def open_region(
    path: str | Place, region: tuple[int, int, int, int] | None = None
) -> tuple[xr.Dataset, BlockGrid]:
    """A datacube, lazy, or the part of it with rows y0 to y1 and columns x0 to x1, and the blocks of a run.

    The blocks of a region begin at its corner, so they are not those of the store.

    Raises
    ------
    FileNotFoundError, ValueError
        As `open_datacube`; also for a region that reaches beyond the scan.
    """
    datacube, grid = open_datacube(path), block_grid(path)
    if region is None:
        return datacube, grid
    y0, y1, x0, x1 = region
    ny, nx = grid.scan_shape
    if y1 > ny or x1 > nx:
        raise ValueError(
            f"the region {y0}:{y1},{x0}:{x1} reaches beyond the scan of {ny} x {nx}; "
            f"use at most 0:{ny},0:{nx}"
        )
    by, bx = grid.block_shape
    grid = BlockGrid((y1 - y0, x1 - x0), (min(by, y1 - y0), min(bx, x1 - x0)))
    return datacube.isel(scan_y=slice(y0, y1), scan_x=slice(x0, x1)), grid


def create_peaks(
    path: str | Path,
    *,
    scan_shape: tuple[int, int],
    block_shape: tuple[int, int],
    max_num_peaks: int,
    detector_shape: tuple[int, int],
    coords: Mapping[str, xr.DataArray] | None = None,
    attrs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Make an empty peaks store whose chunks are the datacube's blocks; it appears complete or not at all.

    Parameters
    ----------
    path : path
        The store to be, usually ``RUN/peaks.zarr``.
    scan_shape, block_shape : tuple of int
        (y, x), of the scan and of one block (`block_grid` of the datacube).
    max_num_peaks : int
        Length of the dimension `peak`.
    detector_shape : tuple of int
        (qy, qx), kept as an attribute: it bounds the positions.
    coords : mapping, optional
        `scan_y` and `scan_x` of the datacube (others are ignored); those missing are counted in pixels.
    attrs : mapping, optional
        Provenance and settings. ``intensity_meaning`` and ``intensity_units`` describe `peak_intensity`.
    overwrite : bool
        Replace an existing store.

    Raises
    ------
    FileExistsError
        If `path` exists, unless `overwrite`.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; open it to go on, or give overwrite=True to start anew")
    grid = BlockGrid((int(scan_shape[0]), int(scan_shape[1])), (int(block_shape[0]), int(block_shape[1])))
    sizes = dict(zip(schema.SCAN_DIMS, grid.scan_shape, strict=True)) | {"peak": int(max_num_peaks)}
    chunks = dict(zip(schema.SCAN_DIMS, grid.block_shape, strict=True)) | {"peak": int(max_num_peaks)}
    nascent = path.with_name(f"{path.name}.partial.{os.getpid()}")
    shutil.rmtree(nascent, ignore_errors=True)
    root = schema.format_attrs("peaks") | {
        "detector_shape": list(detector_shape),
        "block_shape": list(grid.block_shape),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        group = zarr.create_group(nascent, zarr_format=3, attributes=root | to_json(attrs or {}))
        for name, variable in schema.PEAKS.items():
            dtype = np.dtype(np.uint8 if name == "status" else _PEAK_DTYPES[variable.kinds])
            is_status = variable.dims == schema.BLOCK_DIMS
            group.create_array(
                name,
                shape=grid.n_blocks if is_status else tuple(sizes[d] for d in variable.dims),
                chunks=(1, 1) if is_status else tuple(chunks[d] for d in variable.dims),
                dtype=dtype,
                fill_value=np.nan if dtype.kind == "f" else 0,
                compressors=None if is_status else FLOAT_CODEC,
                dimension_names=variable.dims,
                attributes=dict(variable.attrs),
            )
        for dim, n in zip(schema.SCAN_DIMS, grid.scan_shape, strict=True):
            coordinate = (coords or {}).get(dim, pixel_coordinate(dim, n))
            put_array(group, dim, coordinate.values.astype(float), (dim,), coordinate.attrs)
        replace_folder(nascent, path)
    except BaseException:
        shutil.rmtree(nascent, ignore_errors=True)
        raise
    return path


def open_peaks(path: str | Place) -> xr.Dataset:
    """Open a peaks store lazily: Dask blocks are the datacube's scan blocks, `status` is in memory.

    Blocks not done yet read as NaN, with `n_peaks` 0; `status` tells them apart from empty patterns.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such store, or it is none of ours, or a newer one.
    """
    path = existing(local(path, RUNS_ARE_HERE))
    schema.check_format(root_attrs(path), "peaks", str(path))
    grid = block_grid(path)
    chunks = {
        d: min(b, n) for d, b, n in zip(schema.SCAN_DIMS, grid.block_shape, grid.scan_shape, strict=True)
    }
    dataset = xr.open_zarr(
        path, chunks=chunks, consolidated=False, mask_and_scale=False, drop_variables="status"
    )
    dataset["status"] = (schema.BLOCK_DIMS, read_status(path), schema.PEAKS["status"].attrs)
    dataset = dataset.assign_coords({dim: dataset[dim].load() for dim in schema.SCAN_DIMS})
    schema.check_peaks(dataset, str(path))
    return dataset


def write_peaks_block(path: str | Path, iy: int, ix: int, values: Mapping[str, np.ndarray]) -> None:
    """Write the results of block (iy, ix); call `set_status` after it, which alone says that it is done.

    Parameters
    ----------
    path : path
        A peaks store.
    iy, ix : int
        Block index, as in `block_grid`.
    values : mapping of str to ndarray
        Every variable of `schema.PEAKS` but `status`, shape (by, bx) or (by, bx, peak). Others are ignored.

    Raises
    ------
    ValueError
        If a variable is missing or does not fill exactly this block.
    """
    grid = block_grid(path)
    region, shape = grid.slices(iy, ix), grid.shape(iy, ix)
    names = [name for name in schema.PEAKS if name != "status"]
    if missing := [name for name in names if name not in values]:
        raise ValueError(
            f"block ({iy}, {ix}) lacks {', '.join(missing)}; give every variable of schema.PEAKS"
        )
    arrays = {name: open_array(path, name, mode="r+") for name in names}
    for name, array in arrays.items():  # all are checked before the first is written
        needed = (*shape, *array.shape[2:])
        if np.shape(values[name]) != needed:
            rows, columns = region
            raise ValueError(
                f"{name!r} of block ({iy}, {ix}) has shape {np.shape(values[name])}, needed is {needed}: "
                f"exactly one block; compute the scan region [{rows.start}:{rows.stop}, "
                f"{columns.start}:{columns.stop}] in one go"
            )
    for name, array in arrays.items():
        array[region] = np.asarray(values[name]).astype(array.dtype, copy=False)


def set_status(path: str | Path, iy: int, ix: int, status: int) -> None:
    """Mark block (iy, ix) with a ``schema.STATUS_*`` value."""
    array = open_array(path, "status", mode="r+")
    if not (0 <= iy < array.shape[0] and 0 <= ix < array.shape[1]):
        raise ValueError(
            f"there is no block ({iy}, {ix}) in {path}: it has {array.shape} blocks, from (0, 0)"
        )
    array[iy, ix] = status


def read_status(path: str | Path) -> np.ndarray:
    """Status of every block, uint8 (ny, nx): ``schema.STATUS_TODO``, ``STATUS_DONE`` or ``STATUS_FAILED``."""
    return np.asarray(open_array(path, "status")[:])


def load_calibration(peaks: str | Path) -> Calibration:
    """What `fcunet.tiles.save_calibration` kept with the peaks of a run."""
    folder = Path(peaks, "calibration")
    values: dict[str, Any] = dict(zarr.open_group(folder, mode="r", use_consolidated=False).attrs)
    bad = np.flatnonzero(open_array(folder, "bad_pixels")[:])
    origin = np.asarray(open_array(folder, "origin")[:]) if has_array(folder, "origin") else None
    templates, index = (
        np.asarray(open_array(folder, name)[:]) if has_array(folder, name) else None
        for name in ("templates", "template_index")
    )
    return Calibration.from_dict(
        values | {"bad_pixels": bad},
        probe=np.asarray(open_array(folder, "probe")[:]),
        origin=origin,
        templates=templates,
        template_index=index,
    )


def write_results(path: str | Path, tree: xr.DataTree) -> Path:
    """Write a results tree, replacing an earlier one, so that a reader finds the old or the new one, whole.

    Parameters
    ----------
    path : path
        Usually ``RUN/strain.zarr``.
    tree : xarray.DataTree
        Groups ``/strain``, ``/lattice`` and what else is there; root attributes hold the provenance.

    Raises
    ------
    ValueError
        If a group does not follow the schema.
    """
    schema.check_results(tree)
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    nascent = path.with_name(f"{path.name}.partial.{os.getpid()}")
    shutil.rmtree(nascent, ignore_errors=True)
    tree = tree.map_over_datasets(lambda dataset: dataset.drop_encoding())
    tree.attrs = schema.format_attrs("results") | to_json({str(k): v for k, v in tree.attrs.items()})
    try:
        tree.to_zarr(nascent, zarr_format=3, consolidated=False)
        replace_folder(nascent, path)
    except BaseException:
        shutil.rmtree(nascent, ignore_errors=True)
        raise
    return path


_STORES_OF_A_RUN = ("peaks.zarr", "strain.zarr")


def open_results(path: str | Place) -> xr.DataTree:
    """Open the results of a run lazily, given its folder or one of the stores in it.

    Raises
    ------
    FileNotFoundError, ValueError
        If there are no results, or they are none of ours, or newer ones.
    """
    path = local(path, RUNS_ARE_HERE)
    folder = path.parent if path.name in _STORES_OF_A_RUN else path
    if path.name in _STORES_OF_A_RUN or not (path / "zarr.json").exists():
        path = folder / "strain.zarr"
    if not path.exists():
        raise FileNotFoundError(_why_no_results(folder))
    path = existing(path)
    attrs = root_attrs(path)
    if attrs.get("fcunet_format") == "datacube":
        raise ValueError(f"{path} is a scan, not the results of one; make them with: fcunet run {path}")
    schema.check_format(attrs, "results", str(path))
    tree = xr.open_datatree(path, engine="zarr", consolidated=False, chunks=None)
    schema.check_results(tree, str(path))
    return tree


def _why_no_results(folder: Path) -> str:
    """What to do about a run without results: begun, not begun, or not there at all."""
    if not folder.is_dir():
        return f"there is no folder {folder}; a run makes one: fcunet run STORE.zarr --out {folder}"
    if (folder / "peaks.zarr" / "status").is_dir():
        status = read_status(folder / "peaks.zarr")
        ended = int((status != schema.STATUS_TODO).sum())
        return (
            f"there are no results in {folder} yet: the run ended after {ended} of {status.size} blocks; it "
            f"goes on with: fcunet run STORE.zarr --out {folder}"
        )
    runs = sorted(p.parent.name for p in folder.glob("*/strain.zarr"))
    if runs:
        return f"{folder} is not a run but holds some: {', '.join(runs[:8])}; name one: {folder / runs[0]}"
    return f"there are no results in {folder} yet; make them with: fcunet run STORE.zarr --out {folder}"


def describe(path: str | Place, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a datacube, peaks store, results or run folder holds, as a flat mapping for ``fcunet info``.

    At a URL only a datacube is read.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is nothing of ours at `path`.
    """
    path = place(path, storage_options)
    markers = ("zarr.json", ".zgroup")
    if isinstance(path, Path) and path.is_dir() and not any((path / name).exists() for name in markers):
        held = [name for name in ("peaks.zarr", "strain.zarr") if (path / name).is_dir()]
        if not held:
            raise ValueError(
                f"{path} is neither a store nor the folder of a run; it holds no peaks.zarr, strain.zarr"
            )
        return {
            f"{name.removesuffix('.zarr')} {k}": v for name in held for k, v in describe(path / name).items()
        }
    path = existing(path)
    attrs = root_attrs(path)
    kind = attrs.get("fcunet_format")
    facts: dict[str, Any] = {"format": kind, "name": path.name}
    if kind == "results":
        tree = open_results(path)
        facts["groups"] = ", ".join(
            f"{name} ({', '.join(sorted(map(str, node.data_vars)))})"
            for name, node in sorted(tree.children.items())
        )
    elif kind == "peaks":
        peaks, grid = open_peaks(path), block_grid(path)
        facts |= _axes(peaks, schema.SCAN_DIMS)
        facts |= {"peaks per pattern": f"at most {peaks.sizes['peak']}"}
        facts["blocks done"] = f"{int((peaks.status == schema.STATUS_DONE).sum())} of {len(grid)}"
        if failed := int((peaks.status == schema.STATUS_FAILED).sum()):
            facts["blocks failed"] = failed
    else:
        datacube, grid = open_datacube(path), block_grid(path)
        intensity = datacube["intensity"]
        stored = _stored_bytes(path)
        facts |= {
            "scan": "{} x {}".format(*grid.scan_shape),
            "detector": "{} x {}".format(*intensity.shape[2:]),
        }
        facts |= {
            "dtype": str(intensity.dtype),
            "size": f"{intensity.nbytes / 1e9:.3g} GB"
            + (f", {stored / 1e9:.3g} GB stored" if stored is not None else ""),
        }
        facts["blocks"] = f"{len(grid)} of {grid.block_shape[0]} x {grid.block_shape[1]} patterns"
        facts |= _axes(datacube, schema.DATACUBE_DIMS)
        facts["also"] = (
            ", ".join(n for n in schema.DATACUBE if n != "intensity" and n in datacube) or "nothing"
        )
        if open_truth(path) is not None:
            facts["also"] += ", truth"
    return {k: v for k, v in facts.items() if v is not None} | {
        k: v for k, v in attrs.items() if k != "fcunet_format"
    }


def _stored_bytes(path: Place) -> int | None:
    """Compressed size of the patterns; None where that cannot be known."""
    if isinstance(path, Remote):
        return path.stored_bytes()
    return sum(file.stat().st_size for file in (path / "intensity").rglob("*") if file.is_file())


def _axes(dataset: xr.Dataset, dims: tuple[str, ...]) -> dict[str, str]:
    """Length, step and unit of each axis, in words."""
    words = {}
    for dim in dims:
        values, units = dataset[dim].values, dataset[dim].attrs.get("units", "?")
        calibrated = units != schema.UNIT_PIXEL
        step = (
            f", step {(values[-1] - values[0]) / (len(values) - 1):.6g} {units}"
            if len(values) > 1
            else f", {units}"
        )
        words[dim] = f"{len(values)}" + (step if calibrated else ", not calibrated")
    return words

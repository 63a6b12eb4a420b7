"""The datacube store: read and written by whole blocks, one Dask block being one shard.

Use it through `fcunet.store`, which says why.
"""

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import dask.array as da
import numpy as np
import xarray as xr
import zarr

from . import schema
from .layout import BlockGrid, Layout, check_blocks, inner_chunk, pair, plan_layout
from .provenance import to_json
from .remote import Place, Remote, local, place
from .shards import EVERY_SHARD, Cube
from .zarrfolder import (
    COUNT_CODEC,
    block_shape_of,
    existing,
    has_array,
    open_array,
    put_array,
    replace_folder,
    root_attrs,
    zarr_location,
)

# without this, a shard of zeros would leave no file, and could not be told from one never written or lost
_WRITE_EMPTY: Any = {"write_empty_chunks": True}


def block_grid(source: str | Place | xr.Dataset | xr.DataArray) -> BlockGrid:
    """Blocks of a datacube or peaks store, or of an opened dataset.

    Raises
    ------
    ValueError
        If an opened dataset is not cut into regular blocks of whole patterns; the message has the call.
    """
    if isinstance(source, str | Path | Remote):
        for name in ("intensity", "n_peaks"):
            if has_array(source, name):
                stored = open_array(source, name)
                return BlockGrid(pair(stored.shape), pair(block_shape_of(stored)))
        raise ValueError(f"{source} holds neither 'intensity' nor 'n_peaks', so it has no blocks")
    array = source if isinstance(source, xr.DataArray) else source[_main_variable(source)]
    check_blocks(array)
    block_shape = [sizes[0] for sizes in array.chunks] if array.chunks else array.shape
    return BlockGrid(pair(array.shape), pair(block_shape))


def open_datacube(
    path: str | Place, *, check: bool = True, storage_options: Mapping[str, Any] | None = None
) -> xr.Dataset:
    """Open a datacube lazily: `intensity` as Dask blocks that are its shards, everything else in memory.

    Parameters
    ----------
    path : path or URL
        Of a ``NAME.zarr`` datacube. One in Zarr format 2 is read too; its blocks are its chunks. A URL, such
        as ``"s3://bucket/NAME.zarr"`` or ``"https://host/NAME.zarr"``, is read through fsspec.
    check : bool
        Check format, version and schema.
    storage_options : mapping, optional
        Of a URL, for fsspec: ``{"anon": True}``, ``{"endpoint_url": ...}``. Dask workers get them too.

    Returns
    -------
    xarray.Dataset
        Dimensions (scan_y, scan_x, qy, qx); `intensity` in its stored dtype, zeros included
        (nothing is masked or scaled). Simulated data carry the truth beside it: see `open_truth`.

    Raises
    ------
    FileNotFoundError
        If there is no such store.
    ValueError
        If it is no datacube, was written by a newer fcunet, or its chunks split the detector.
    ConnectionError, PermissionError, ImportError
        If a URL cannot be reached, may not be read, or its protocol needs another package.
    """
    path = existing(place(path, storage_options))
    attrs = root_attrs(path)
    if check:
        schema.check_format(attrs, "datacube", str(path))
    if not has_array(path, "intensity"):
        raise ValueError(
            f"{path} has no array 'intensity'; make a datacube with: fcunet convert {path} OUT.zarr"
        )
    cube = Cube(path)
    by, bx, *pattern = cube.block_shape
    if check and any(c < n for c, n in zip(pattern, cube.shape[2:], strict=True)):
        raise ValueError(
            f"{path} splits each pattern of {cube.shape[2:]} px into chunks of {tuple(pattern)}, but one "
            f"pattern must lie in one chunk; write it anew: fcunet convert {path} OUT.zarr"
        )
    dataset = _small_variables(path)
    blocks = tuple(min(b, n) for b, n in zip((by, bx), cube.shape[:2], strict=True))
    intensity = da.from_array(
        cube, chunks=(*blocks, *cube.shape[2:]), meta=np.empty((0,) * 4, cube.dtype), inline_array=True
    )
    dataset["intensity"] = (schema.DATACUBE_DIMS, intensity, cube.attrs)
    for dim in schema.DATACUBE_DIMS:
        if dim not in dataset.coords:
            dataset.coords[dim] = pixel_coordinate(dim, dataset.sizes[dim])
    dataset.attrs = attrs
    dataset.encoding["source"] = str(path)
    if check:
        schema.check_datacube(dataset, str(path))
    return dataset


def _small_variables(path: Place) -> xr.Dataset:
    """All but `intensity`: known names at a URL, where folders may not be listed; else whatever is there."""
    if not isinstance(path, Remote):
        dataset = xr.open_zarr(
            path, chunks=None, consolidated=False, mask_and_scale=False, drop_variables="intensity"
        )
        return dataset.assign({n: dataset[n].load() for n in schema.DATACUBE if n in dataset}).copy()
    path.check_ranges("intensity/zarr.json" if path.has("intensity/zarr.json") else "intensity/.zarray")
    names = [*(n for n in schema.DATACUBE if n != "intensity"), *schema.DATACUBE_DIMS]
    found = path.read_all(f"{name}/{meta}" for name in names for meta in ("zarr.json", ".zarray"))
    dataset = xr.Dataset()
    for name in dict.fromkeys(key.split("/")[0] for key in found):
        array = zarr.open_array(zarr_location(path), path=name, mode="r")
        attrs = dict(array.attrs)
        dims = attrs.pop("_ARRAY_DIMENSIONS", None) or array.metadata.dimension_names  # type: ignore[union-attr]
        dataset[name] = (dims, np.asarray(array[...]), attrs)
    return dataset


def open_truth(path: str | Place) -> xr.Dataset | None:
    """The true strain of a simulated datacube (its group ``/truth``), in memory; None for measured data.

    Also None at a URL whose server does not list folders.
    """
    path = existing(path)
    if isinstance(path, Remote):
        if not path.has("truth/zarr.json"):
            return None
        truth = xr.open_zarr(zarr_location(path), group="truth", chunks=None, consolidated=False).load()
        return truth if truth.variables else None
    if not (path / "truth" / "zarr.json").exists():
        return None
    return xr.open_zarr(path, group="truth", chunks=None, consolidated=False).load()


def read_block(path: str | Place, iy: int, ix: int) -> np.ndarray:
    """Patterns of block (iy, ix), shape (by, bx, qy, qx), in the stored dtype; fewer at the far edges.

    The open array is kept for the life of the process, so a call costs the reading only.

    Raises
    ------
    DamagedBlockError
        If the shard is missing or does not decode; block and file are named.
    """
    cube = Cube(place(path))
    return cube[BlockGrid(pair(cube.shape), pair(cube.block_shape)).slices(iy, ix)]


def read_region(path: str | Place, ys: slice, xs: slice) -> np.ndarray:
    """Patterns of any scan region, shape (y, x, qy, qx), in the stored dtype; errors as in `read_block`."""
    return Cube(place(path))[ys, xs]


class DatacubeWriter:
    """Writes a datacube block by block, resumes where it was stopped, and names it only when it is complete.

    The blocks go to ``PATH.partial``. A block counts as done when its shard exists, and Zarr makes a shard
    appear in one step, so a process killed at any moment loses the block in hand and nothing else. Used as a
    context manager, a clean end calls `close`; an error leaves the partial store for the next attempt.

    Parameters
    ----------
    path : path
        The store to be, ``NAME.zarr``.
    shape : tuple of int
        (scan_y, scan_x, qy, qx).
    dtype : dtype-like
        Of `intensity`: integer or float, stored as it is.
    coords : mapping, optional
        Per dimension a 1-D DataArray with ``attrs["units"]``; those missing are counted in pixels.
    attrs : mapping, optional
        Root attributes; None and NaN are left out.
    units : str
        Of `intensity`.
    layout : Layout, optional
        Default: `plan_layout`.
    overwrite : bool
        Replace an existing `path`, once the new one is complete.

    Raises
    ------
    FileExistsError
        If `path` exists, unless `overwrite`.
    ValueError
        If ``PATH.partial`` is the beginning of another conversion.
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int, int, int],
        dtype: Any,
        *,
        coords: Mapping[str, xr.DataArray] | None = None,
        attrs: Mapping[str, Any] | None = None,
        units: str = "counts",
        layout: Layout | None = None,
        overwrite: bool = False,
    ) -> None:
        path = local(path, "datacubes are written here only; give a folder, and copy it there when done")
        self.path = Path(os.path.abspath(path))
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.dtype = np.dtype(dtype).newbyteorder("=")
        if self.dtype.kind not in schema.DATACUBE["intensity"].kinds:
            raise ValueError(
                f"intensity of dtype {self.dtype} cannot be stored; give an integer or float dtype"
            )
        self.shape = tuple(int(n) for n in shape)
        self.layout = layout or plan_layout(pair(self.shape), pair(self.shape[2:]), self.dtype)
        self.blocks = BlockGrid(pair(self.shape), self.layout.shard)
        self._overwrite = overwrite
        if self.path.exists() and not overwrite:
            raise FileExistsError(f"{self.path} exists; choose another name, or replace it with --overwrite")
        attrs = schema.format_attrs("datacube") | to_json(attrs or {})
        self.resumed = self.partial.exists()
        try:
            if self.resumed:
                self._check_partial(attrs)
            else:
                self._create(attrs, coords or {}, units)
        except OSError as err:
            raise self._explain(err) from err
        with zarr.config.set(
            {"array.write_empty_chunks": True}
        ):  # `config=` is ignored for an existing array
            self._array = zarr.open_array(self.partial / "intensity", mode="r+")

    def _create(self, attrs: dict[str, Any], coords: Mapping[str, xr.DataArray], units: str) -> None:
        # made under yet another name, so that a partial store always has all of its metadata
        nascent = self.partial.with_name(f"{self.partial.name}.{os.getpid()}")
        shutil.rmtree(nascent, ignore_errors=True)
        try:
            group = zarr.create_group(nascent, zarr_format=3, attributes=attrs)
            group.create_array(
                "intensity",
                shape=self.shape,
                dtype=self.dtype,
                chunks=(*self.layout.chunk, *self.shape[2:]),
                shards=(*self.layout.shard, *self.shape[2:]),
                compressors=COUNT_CODEC,
                fill_value=0,
                dimension_names=schema.DATACUBE_DIMS,
                attributes=schema.DATACUBE["intensity"].attrs | {"units": units, EVERY_SHARD: True},
                config=_WRITE_EMPTY,
            )
            for dim, n in zip(schema.DATACUBE_DIMS, self.shape, strict=True):
                coordinate = coords.get(dim, pixel_coordinate(dim, n))
                if coordinate.shape != (n,):
                    raise ValueError(
                        f"coordinate {dim!r} has shape {coordinate.shape}, the datacube needs ({n},)"
                    )
                put_array(group, dim, coordinate.values.astype(float), (dim,), coordinate.attrs)
            nascent.rename(self.partial)
        except BaseException:
            shutil.rmtree(nascent, ignore_errors=True)
            raise

    def _check_partial(self, attrs: dict[str, Any]) -> None:
        array = zarr.open_array(self.partial / "intensity", mode="r")
        volatile = ("created", "fcunet_commit", "slurm_job_id")
        had, has = (
            {k: v for k, v in a.items() if k not in volatile} for a in (root_attrs(self.partial), attrs)
        )
        wanted = (self.shape, self.dtype, (*self.layout.shard, *self.shape[2:]))
        if (array.shape, array.dtype, array.shards) != wanted or had != has:
            differ = [k for k in {**had, **has} if had.get(k) != has.get(k)] or ["shape, dtype or shards"]
            raise ValueError(
                f"{self.partial} is the beginning of another conversion (it differs in {', '.join(differ)}); "
                f"finish that one, or delete it: rm -r '{self.partial}'"
            )
        for leftover in self.partial.rglob("*.partial"):  # of a writer killed in the middle of a shard
            leftover.unlink(missing_ok=True)

    @property
    def done(self) -> set[tuple[int, int]]:
        """Indices of the blocks already on disk."""
        encode = self._array.metadata.encode_chunk_key
        return {
            (iy, ix)
            for iy, ix in self.blocks
            if (self.partial / "intensity" / encode((iy, ix, 0, 0))).exists()
        }

    def write_block(self, iy: int, ix: int, patterns: np.ndarray) -> None:
        """Write block (iy, ix): `patterns` of shape (by, bx, qy, qx) and the dtype of the store.

        Different blocks may be written from different threads or processes; one block by one at a time.
        """
        ys, xs = self.blocks.slices(iy, ix)
        needed = (*self.blocks.shape(iy, ix), *self.shape[2:])
        if patterns.shape != needed:
            raise ValueError(
                f"block ({iy}, {ix}) is {needed}, one whole shard, but an array of {patterns.shape} came; "
                f"write the region [{ys.start}:{ys.stop}, {xs.start}:{xs.stop}] of the scan in one call"
            )
        if patterns.dtype.newbyteorder("=") != self.dtype:
            raise ValueError(
                f"patterns are {patterns.dtype}, the store is {self.dtype}; cast them before: .astype(...)"
            )
        try:
            self._array[ys, xs] = patterns
        except OSError as err:
            raise self._explain(err, f"block ({iy}, {ix})") from err

    def read_block(self, iy: int, ix: int) -> np.ndarray:
        """A block written before, from the partial store."""
        return np.asarray(self._array[self.blocks.slices(iy, ix)])

    def write_variable(self, name: str, values: np.ndarray, **attrs: Any) -> None:
        """Write `probe`, `detector_mask`, `origin_qy` or `origin_qx`, with extra attributes."""
        variable = schema.DATACUBE[name]
        needed = tuple(dict(zip(schema.DATACUBE_DIMS, self.shape, strict=True))[dim] for dim in variable.dims)
        values = np.asarray(values)
        if values.shape != needed:
            raise ValueError(
                f"{name!r} has shape {values.shape}, this datacube needs {needed} for {variable.dims}"
            )
        values = values.astype(np.float32 if variable.kinds == "f" else bool)
        try:
            group = zarr.open_group(self.partial, mode="r+")
            put_array(group, name, values, variable.dims, variable.attrs | to_json(attrs))
        except OSError as err:
            raise self._explain(err, repr(name)) from err

    def write_truth(self, truth: xr.Dataset) -> None:
        """Write the group ``/truth`` of simulated data: true strain and anything else on the scan."""
        truth.drop_encoding().to_zarr(
            self.partial, group="truth", mode="w", zarr_format=3, consolidated=False
        )

    def update_attrs(self, **attrs: Any) -> None:
        """Add attributes of `intensity` that are known only at the end, such as the number of NaN."""
        self._array.attrs.update(to_json(attrs))

    def close(self) -> Path:
        """Give the complete store its name.

        Raises
        ------
        ValueError
            If blocks are missing; the partial store stays.
        """
        missing = (
            [block for block in self.blocks if block not in self.done]
            if len(self.done) < len(self.blocks)
            else []
        )
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.blocks)} blocks are not written yet, the first is "
                f"{missing[0]}; {self.partial} is kept"
            )
        replace_folder(self.partial, self.path)
        return self.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def _explain(self, err: OSError, what: str = "the first metadata") -> OSError:
        # EFBIG and EDQUOT: limits on the size of files and of a user's share
        if err.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return err
        free = shutil.disk_usage(self.path.parent).free / 1e9
        whole = float(np.prod(self.shape)) * self.dtype.itemsize / 1e9
        return OSError(
            err.errno,
            f"no room for {what} of {self.path.name} ({free:.2f} GB free, the scan is {whole:.2f} GB before "
            f"compression): {os.strerror(err.errno or 0)}. The input is untouched, finished blocks are kept "
            f"in {self.partial.name}; make room and run the same command again, or delete that folder",
        )


def write_datacube(
    path: str | Path,
    dataset: xr.Dataset,
    truth: xr.Dataset | None = None,
    *,
    layout: Layout | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a whole datacube, block by block, as `open_datacube` gives it back.

    Parameters
    ----------
    path : path
        The store to be, ``NAME.zarr``.
    dataset : xarray.Dataset
        With `intensity` (scan_y, scan_x, qy, qx) in memory or as Dask blocks, which then are the shards.
    truth : xarray.Dataset, optional
        What is known of simulated data, on the scan.
    layout : Layout, optional
        Default: the blocks of a Dask array, else `plan_layout`.
    overwrite : bool
        Replace an existing store.

    Raises
    ------
    FileExistsError
        If `path` exists, unless `overwrite`.
    ValueError
        If a Dask array splits patterns or is cut unevenly; the message has the rechunk call.
    """
    schema.check_datacube(dataset)
    intensity = dataset["intensity"]
    if layout is None and intensity.chunks is not None:
        shard = block_grid(intensity).block_shape
        layout = Layout(shard, inner_chunk(shard, pair(intensity.shape[2:]), intensity.dtype))
    elif layout is not None:
        check_blocks(intensity, layout.shard)
    coords = {dim: dataset.coords[dim] for dim in schema.DATACUBE_DIMS if dim in dataset.coords}
    units = intensity.attrs.get("units", "counts")
    with DatacubeWriter(
        path,
        intensity.shape,  # type: ignore[arg-type]
        intensity.dtype,
        coords=coords,
        attrs=dataset.attrs,
        units=units,
        layout=layout,
        overwrite=overwrite,
    ) as writer:
        for iy, ix in writer.blocks:
            if (iy, ix) not in writer.done:
                writer.write_block(iy, ix, np.asarray(intensity[writer.blocks.slices(iy, ix)].data))
        for name, variable in schema.DATACUBE.items():
            if name != "intensity" and name in dataset:
                extra = {k: v for k, v in dataset[name].attrs.items() if k not in variable.attrs}
                writer.write_variable(name, dataset[name].values, **extra)
        if truth is not None:
            writer.write_truth(truth)
    return writer.path


def pixel_coordinate(dim: str, n: int) -> xr.DataArray:
    """Coordinate of an uncalibrated axis: 0, 1, ... in px."""
    return coordinate(dim, np.arange(n, dtype=float), schema.UNIT_PIXEL)


def coordinate(dim: str, values: np.ndarray, units: str) -> xr.DataArray:
    """A coordinate of a datacube with its unit (nm, 1/angstrom or px) and meaning."""
    meaning = "probe position" if dim in schema.SCAN_DIMS else "scattering vector, q = 1/d"
    attrs = {"units": units, "long_name": f"{meaning}, {'rows' if dim.endswith('y') else 'columns'}"}
    return xr.DataArray(np.asarray(values, dtype=float), dims=(dim,), name=dim, attrs=attrs)


def _main_variable(dataset: xr.Dataset) -> str:
    for name in ("intensity", "n_peaks"):
        if name in dataset:
            return name
    raise ValueError(
        f"the dataset has neither 'intensity' nor 'n_peaks', only {', '.join(map(str, dataset)) or 'nothing'}"
    )

"""Results and scans for other programs: tables, NetCDF, EMD files that py4DSTEM opens, HyperSpy's zspy.

A file appears whole or not at all, and replaces nothing unless told to.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from . import schema
from .emd import py4dstem_strain, write_emd
from .provenance import to_json
from .remote import Remote, place
from .store import open_datacube, open_peaks, open_results
from .zarrfolder import replace_folder, root_attrs

__all__ = ["FORMATS", "export", "py4dstem_strain"]

FORMATS = ("csv", "parquet", "netcdf", "py4dstem", "zspy")
_KNOWN = schema.PEAKS | schema.VIRTUAL | schema.LATTICE | schema.STRAIN
_ROWS = 16  # scan rows held in memory while a table is written

Source = xr.DataTree | xr.Dataset | str | Path


def export(
    source: Source, path: str | Path, to: str | None = None, *, what: str = "strain", overwrite: bool = False
) -> Path:
    """Write results, peaks or a datacube as a file for other programs.

    Parameters
    ----------
    source : DataTree, Dataset or path
        Results, peaks, a run directory with both, or a datacube, which may be at a URL.
    path : path
        File to write; its folder must exist.
    to : str, optional
        None: what the ending of `path` says, .csv, .parquet, .nc, .h5 or .emd (py4DSTEM), .zspy.
        ``"csv"``, ``"parquet"``: a tidy table, one line per scan position, or per peak; empty where a value
        is missing; units in the names. ``"netcdf"``: the groups of the results, labels and units kept,
        readable with ``xarray.open_datatree``; or the peaks. ``"py4dstem"``: EMD 1.0 with ``braggvectors``
        and ``strain`` (as RealSlice), each if it is at hand, or with ``datacube`` and ``probe``. ``"zspy"``:
        the folder that HyperSpy and pyxem open, with a signal per map, or the datacube.
    what : str
        ``"strain"`` or ``"peaks"``, for tables and NetCDF of a run directory.
    overwrite : bool
        Replace an existing file.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    FileExistsError
        If there is such a file, unless `overwrite`.
    FileNotFoundError
        If `source` or the folder of `path` does not exist.
    ValueError
        For an unknown format, or a source that lacks what is asked for.
    """
    path = Path(path)
    to = _format_of(path) if to is None else to
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; choose one of {', '.join(FORMATS)}")
    if what not in ("strain", "peaks"):
        raise ValueError(f"what is {what!r}; choose strain or peaks")
    _check_target(path, to, overwrite)
    cube, peaks, results = _contents(source, with_peaks=to == "py4dstem" or what == "peaks")
    if cube is not None and to not in ("py4dstem", "zspy"):
        raise ValueError(f"a datacube cannot be written as {to}; choose py4dstem or zspy")
    if to == "py4dstem":
        _atomically(path, lambda partial: write_emd(partial, peaks, results, cube))
    elif to == "zspy":
        if cube is None and results is None:
            raise ValueError("zspy holds datacubes and maps, not peaks; give the run directory or a datacube")
        _atomically(path, lambda partial: _write_zspy(partial, path, cube, results))
    else:
        wanted = peaks if what == "peaks" or results is None else results
        if wanted is None:
            raise ValueError(f"the source has no {what}; give the run directory")
        write = {"csv": _write_csv, "parquet": _write_parquet, "netcdf": _write_netcdf}[to]
        _atomically(path, lambda partial: write(partial, wanted))
    return path


def _format_of(path: Path) -> str:
    """The format that an ending stands for."""
    endings = {f".{ending}": name for name, ending in _SUFFIX.items()}
    endings |= {".emd": "py4dstem", ".hdf5": "py4dstem"}
    found = endings.get(path.suffix.lower(), "csv" if path.is_dir() else None)  # a folder is refused later
    if found is None:
        raise ValueError(
            f"the ending of {path} stands for no format; use one of {', '.join(endings)}, or name the "
            f"format: --to {', '.join(FORMATS)}"
        )
    return found


_SUFFIX = {"csv": "csv", "parquet": "parquet", "netcdf": "nc", "py4dstem": "h5", "zspy": "zspy"}


def _check_target(path: Path, to: str, overwrite: bool) -> None:
    """Refuse a target in the way of something else, before any work."""
    if path.is_dir() and not (to == "zspy" and (path / ".zgroup").exists()):
        raise FileExistsError(
            f"{path} is a folder; name a file in it, such as {path / ('strain.' + _SUFFIX[to])}"
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists; choose another name, or replace it with --overwrite (overwrite=True)"
        )
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path.parent} to write {path.name} to; make it: mkdir -p {path.parent}"
        )


def _contents(
    source: Source, *, with_peaks: bool
) -> tuple[xr.Dataset | None, xr.Dataset | None, xr.DataTree | None]:
    """Datacube, peaks and results of a source, None for what it lacks."""
    if isinstance(source, xr.DataTree):
        schema.check_results(source)
        return None, None, source
    if isinstance(source, xr.Dataset):
        if "intensity" in source:
            schema.check_datacube(source)
            return source, None, None
        schema.check_peaks(source)
        return None, source, None
    folder = place(source)
    if isinstance(folder, Remote):
        return open_datacube(folder), None, None
    if (folder / "zarr.json").is_file() and root_attrs(folder).get("fcunet_format") == "datacube":
        return open_datacube(folder), None, None
    results = open_results(folder)
    run = folder if (folder / "strain.zarr").is_dir() else folder.parent
    stored = run / "peaks.zarr"
    return None, open_peaks(stored) if with_peaks and stored.is_dir() else None, results


def _atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside `path`, then move into place; nothing is left behind if that fails."""
    partial = path.with_name(f".{path.name}.partial.{os.getpid()}")
    try:
        write(partial)
        if partial.is_dir():
            replace_folder(partial, path)
        else:
            os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def _write_zspy(partial: Path, path: Path, cube: xr.Dataset | None, results: xr.DataTree | None) -> None:
    from .zspy import write_cube, write_maps

    if cube is not None:
        titled = cube if cube.attrs.get("title") else cube.assign_attrs(title=path.stem)
        write_cube(partial, titled)
    else:
        assert results is not None
        write_maps(partial, results)


def _write_csv(path: Path, source: xr.DataTree | xr.Dataset) -> None:
    with path.open("w", newline="") as file:
        for number, frame in enumerate(_frames(source)):
            frame.to_csv(file, index=False, header=number == 0, float_format="%.8g", lineterminator="\n")


def _write_parquet(path: Path, source: xr.DataTree | xr.Dataset) -> None:
    """The same table with its types; the attributes of strain or peaks as JSON under ``fcunet``."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as err:
        raise ImportError('parquet needs one more package: pip install "fcunet[tables]"') from err
    attrs = source["strain"].attrs if isinstance(source, xr.DataTree) else source.attrs
    facts = {"fcunet": json.dumps(to_json(attrs))}
    writer = None
    try:
        for frame in _frames(source):
            part = pa.Table.from_pandas(frame, preserve_index=False)
            if writer is None:
                schema_of_file = part.schema.with_metadata({**(part.schema.metadata or {}), **facts})
                writer = pq.ParquetWriter(path, schema_of_file, compression="zstd")
            writer.write_table(part.cast(writer.schema))
    finally:
        if writer is not None:
            writer.close()


def _frames(source: xr.DataTree | xr.Dataset) -> Iterator[Any]:
    """The table, some scan rows at a time."""
    if isinstance(source, xr.DataTree):
        table = xr.Dataset(coords=source["strain"].dataset.coords)
        for group in ("strain", "lattice", "virtual"):
            if group in source.children:
                variables = source[group].dataset.data_vars
                table = table.assign({n: v for n, v in variables.items() if v.dims == schema.SCAN_DIMS})
    else:
        table = source[[name for name in schema.PEAK_VARIABLES if name in source]]
    for start in range(0, table.sizes["scan_y"], _ROWS):
        part = table.isel(scan_y=slice(start, start + _ROWS)).compute()
        frame = _frame(part, start)
        if not isinstance(source, xr.DataTree):
            frame = frame[np.isfinite(part["peak_qy"].transpose(*schema.PEAK_DIMS).values.ravel())]
        yield frame


def _frame(part: xr.Dataset, first_row: int) -> Any:
    """Columns row, column, scan_y, scan_x, [peak], then the variables, with units in the names."""
    import pandas as pd

    dims = schema.PEAK_DIMS if "peak" in part.sizes else schema.SCAN_DIMS
    shape = tuple(part.sizes[d] for d in dims)
    index = dict(zip(dims, np.indices(shape), strict=True))
    columns = {"row": index["scan_y"] + first_row, "column": index["scan_x"]}
    for dim in schema.SCAN_DIMS:
        if dim in part.coords:
            columns[_with_unit(dim, part[dim].attrs)] = part[dim].values[index[dim]]
    if "peak" in index:
        columns["peak"] = index["peak"]
    for name in map(str, part.data_vars):
        array = part[name]
        values = array.transpose(*dims).values
        known = _KNOWN[name].attrs if name in _KNOWN else {}
        columns[_with_unit(name, known | array.attrs)] = (
            values.astype(int) if values.dtype == bool else values
        )
    return pd.DataFrame({name: values.ravel() for name, values in columns.items()})


def _with_unit(name: str, attrs: Mapping[str, Any]) -> str:
    """``scan_y_nm``, ``theta_rad``; nothing for dimensionless numbers."""
    unit = str(attrs.get("units", "1")).replace("1/", "per_").replace("^", "")
    return name if unit == "1" else f"{name}_{unit}"


def _write_netcdf(path: Path, source: xr.DataTree | xr.Dataset) -> None:
    """All groups, with attributes reduced to what NetCDF can hold."""
    try:
        import netCDF4  # noqa: F401
    except ImportError as err:
        raise ImportError('NetCDF needs one more package: pip install "fcunet[io]"') from err
    if isinstance(source, xr.DataTree):
        flat = {name: _flat(node.dataset) for name, node in source.subtree_with_keys}
        encoding = {f"/{name}" if name != "." else "/": _compressed(ds) for name, ds in flat.items()}
        tree = xr.DataTree.from_dict({name if name != "." else "/": ds for name, ds in flat.items()})
        tree.to_netcdf(path, engine="netcdf4", encoding=encoding)
    else:
        flattened = _flat(source)
        flattened.to_netcdf(path, engine="netcdf4", encoding=_compressed(flattened))


def _flat(dataset: xr.Dataset) -> xr.Dataset:
    """Without encodings of the store, and with attributes that are numbers, strings or plain lists."""
    dataset = dataset.drop_encoding().copy()
    dataset.attrs = _attributes(dataset.attrs)
    for name in dataset.variables:
        dataset[name].attrs = _attributes(dataset[name].attrs)
    return dataset


def _attributes(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): _attribute(value) for key, value in attrs.items() if value is not None}


def _attribute(value: Any) -> Any:
    """Numbers, strings and flat lists of numbers as they are, the rest as JSON."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, int | float | str | np.number):
        return value
    if np.ndim(value) == 1 and np.asarray(value).dtype.kind in "iuf":
        return np.asarray(value)
    return json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))


def _compressed(dataset: xr.Dataset) -> dict[str, dict[str, Any]]:
    return {str(name): {"zlib": True, "complevel": 1} for name, v in dataset.data_vars.items() if v.ndim}

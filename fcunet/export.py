"""Results for other programs: tables (CSV), NetCDF, and EMD files that py4DSTEM opens.

A file appears whole or not at all, and replaces nothing unless told to.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from . import schema
from .emd import py4dstem_strain, read_py4dstem_peaks, write_emd
from .store import open_peaks, open_results

__all__ = ["FORMATS", "export", "py4dstem_strain", "read_py4dstem_peaks"]

FORMATS = ("csv", "netcdf", "py4dstem")
_KNOWN = schema.PEAKS | schema.VIRTUAL | schema.LATTICE | schema.STRAIN
_ROWS = 16  # scan rows held in memory while a table is written

Source = xr.DataTree | xr.Dataset | str | Path


def export(
    source: Source, path: str | Path, to: str = "csv", *, what: str = "strain", overwrite: bool = False
) -> Path:
    """Write results or peaks as a file for other programs.

    Parameters
    ----------
    source : DataTree, Dataset or path
        Results, peaks, or a run directory with both.
    path : path
        File to write; its folder must exist.
    to : str
        ``"csv"``: one line per scan position, or per peak; empty where a value is missing; units in the
        names. ``"netcdf"``: the groups of the results, labels and units kept, readable with
        ``xarray.open_datatree``; or the peaks. ``"py4dstem"``: EMD 1.0 with ``braggvectors`` and ``strain``
        (as RealSlice), each if it is at hand.
    what : str
        ``"strain"`` or ``"peaks"``, for CSV and NetCDF of a run directory.
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
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; choose one of {', '.join(FORMATS)}")
    if what not in ("strain", "peaks"):
        raise ValueError(f"what is {what!r}; choose strain or peaks")
    if path.is_dir():
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
    results, peaks = _contents(source, with_peaks=to == "py4dstem" or what == "peaks")
    if to == "py4dstem":
        _atomically(path, lambda partial: write_emd(partial, peaks, results))
    else:
        if isinstance(source, xr.Dataset):
            what = "peaks"
        wanted = peaks if what == "peaks" else results
        if wanted is None:
            raise ValueError(f"the source has no {what}; give the run directory")
        write = _write_csv if to == "csv" else _write_netcdf
        _atomically(path, lambda partial: write(partial, wanted))
    return path


_SUFFIX = {"csv": "csv", "netcdf": "nc", "py4dstem": "h5"}


def _contents(source: Source, *, with_peaks: bool) -> tuple[xr.DataTree | None, xr.Dataset | None]:
    """Results and peaks of a source, None for what it lacks."""
    if isinstance(source, xr.DataTree):
        schema.check_results(source)
        return source, None
    if isinstance(source, xr.Dataset):
        schema.check_peaks(source)
        return None, source
    folder = Path(source)
    results = open_results(folder)
    run = folder if (folder / "strain.zarr").is_dir() else folder.parent
    stored = run / "peaks.zarr"
    return results, open_peaks(stored) if with_peaks and stored.is_dir() else None


def _atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside `path`, then move into place; nothing is left behind if that fails."""
    partial = path.with_name(f".{path.name}.partial.{os.getpid()}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_csv(path: Path, source: xr.DataTree | xr.Dataset) -> None:
    """A table, some scan rows at a time."""
    if isinstance(source, xr.DataTree):
        table = xr.Dataset(coords=source["strain"].dataset.coords)
        for group in ("strain", "lattice", "virtual"):
            if group in source.children:
                variables = source[group].dataset.data_vars
                table = table.assign({n: v for n, v in variables.items() if v.dims == schema.SCAN_DIMS})
    else:
        table = source[[name for name in schema.PEAK_VARIABLES if name in source]]
    per_peak = not isinstance(source, xr.DataTree)
    with path.open("w", newline="") as file:
        for start in range(0, table.sizes["scan_y"], _ROWS):
            part = table.isel(scan_y=slice(start, start + _ROWS)).compute()
            frame = _frame(part, start)
            if per_peak:
                frame = frame[np.isfinite(part["peak_qy"].transpose(*schema.PEAK_DIMS).values.ravel())]
            frame.to_csv(file, index=False, header=start == 0, float_format="%.8g", lineterminator="\n")


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

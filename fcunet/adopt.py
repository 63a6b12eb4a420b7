"""A run directory for peaks that another program found, so that all later steps take them like our own."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from . import schema
from .provenance import fingerprint, provenance
from .readers.bragg import read_peaks
from .runner import rerun_strain
from .zarrfolder import replace_folder, root_attrs

_BLOCK = 64  # scan positions along the side of a block
_NOT_FOUND_HERE = "peaks_from"


def strain_from_file(
    source: str | Path,
    *,
    out: str | Path | None = None,
    dataset: str | None = None,
    restart: bool = False,
    config: str | Path | None = None,
    **overrides: Any,
) -> xr.DataTree:
    """Lattices and strain from the peaks in a file of another program.

    Parameters
    ----------
    source : path
        Bragg vectors of py4DSTEM or a table, as for :func:`fcunet.readers.bragg.read_peaks`.
    out : path, optional
        Run directory to make; the default is ``runs/NAME``. One made from the same file is used again.
    dataset : str, optional
        Which Bragg vectors, where the file holds several.
    restart : bool
        Replace the peaks of another source in `out`.
    config, **overrides
        As for :func:`fcunet.runner.rerun_strain`.

    Returns
    -------
    xarray.DataTree
        The results, as a run of our own has them; report and figures are in `out`.

    Raises
    ------
    FileNotFoundError, FileExistsError, ValueError
        If the file holds no peaks, or `out` a run of another source.
    """
    source = Path(source)
    out = Path("runs") / source.stem if out is None else Path(out)
    adopt_peaks(source, out, dataset=dataset, restart=restart)
    return rerun_strain(out, config=config, **overrides)


def adopt_peaks(
    source: str | Path, out: str | Path, *, dataset: str | None = None, restart: bool = False
) -> Path:
    """Write the peaks in `source` as the peaks store of the run directory `out`, whole or not at all.

    Nothing is done if they are there already. Parameters and errors as for :func:`strain_from_file`.
    """
    source, store = Path(source), Path(os.path.abspath(Path(out) / "peaks.zarr"))
    peaks = read_peaks(source, dataset)  # first: no folder is made for a file that holds none
    origin = {
        _NOT_FOUND_HERE: source.name,
        "input_fingerprint": fingerprint(source),
        "dataset": dataset or "",
    }
    if store.exists() and not restart:
        found = root_attrs(store)
        if all(found.get(name, "") == value for name, value in origin.items()):
            return store
        raise FileExistsError(
            f"{out} holds a run of {found.get(_NOT_FOUND_HERE) or found.get('input_title', 'another scan')}; "
            f"keep both with another run directory, --out {out}-2, or replace it with --restart"
        )
    if restart:
        shutil.rmtree(store.with_name("strain.zarr"), ignore_errors=True)
    shape, step = peaks.attrs.pop("detector_shape"), peaks.attrs.pop("q_pixel_size", None)
    axis = {"first": 0.0, "step": step or 1.0, "units": schema.UNIT_Q if step else schema.UNIT_PIXEL}
    blocks = {dim: min(peaks.sizes[dim], _BLOCK) for dim in schema.SCAN_DIMS}
    status = np.full([-(-peaks.sizes[dim] // blocks[dim]) for dim in schema.SCAN_DIMS], schema.STATUS_DONE)
    peaks["status"] = (schema.BLOCK_DIMS, status.astype(np.uint8), schema.PEAKS["status"].attrs)
    facts = {
        "input_title": source.name,
        "intensity_meaning": "as in the file",
        "qy": axis,
        "qx": axis,
        "detector_shape": shape,
        "block_shape": list(blocks.values()),
        **peaks.attrs,
        **origin,
    }
    peaks.attrs = schema.format_attrs("peaks") | provenance(**facts)
    # without the attribute _FillValue, which labels made from these would inherit
    encoding: dict[Any, dict[str, Any]] = {name: {"_FillValue": None} for name in peaks.variables}
    for name, array in peaks.data_vars.items():
        encoding[name]["chunks"] = tuple(blocks.get(str(dim), n) for dim, n in array.sizes.items())
    encoding["status"]["chunks"] = (1, 1)
    store.parent.mkdir(parents=True, exist_ok=True)
    nascent = store.with_name(f"{store.name}.partial.{os.getpid()}")
    try:
        peaks.to_zarr(nascent, zarr_format=3, consolidated=False, encoding=encoding)
        replace_folder(nascent, store)
    finally:
        shutil.rmtree(nascent, ignore_errors=True)
    return store

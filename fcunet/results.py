"""The second, light pass of a run: from the stored peaks to the results. Seconds, no GPU, no datacube."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import xarray as xr

from . import schema
from .cepstral import in_real_space
from .config import Config, StrainConfig
from .datacube import coordinate
from .kernels.lattice import NoLatticeError
from .pipeline import bragg_vector_map, compute_strain, fit_lattice
from .provenance import provenance
from .store import open_peaks, open_results, write_results
from .tiles import finish_patterns, load_calibration
from .zarrfolder import root_attrs

logger = logging.getLogger(__name__)

PEAKS, RESULTS = "peaks.zarr", "strain.zarr"


def analyse(out: Path, config: Config, say: Callable[[str], None], device: str | None = None) -> xr.DataTree:
    """Lattice and strain from the peaks of the run in `out`, written to ``strain.zarr`` and opened again.

    Parameters
    ----------
    out : path
        Run directory with a complete peaks store.
    config : Config
        The settings of lattice and strain count.
    say : callable
        Where a line about the outcome goes.
    device : str, optional
        What the peaks were found on, for the provenance.
    """
    peaks = open_peaks(out / PEAKS)
    attrs = root_attrs(out / PEAKS)
    found_here = "peaks_from" not in attrs  # otherwise there were no patterns to measure
    patterns = dict(zip(("mean", "maximum"), finish_patterns(out / PEAKS), strict=True)) if found_here else {}
    status = peaks["status"].values
    calibration = load_calibration(out / PEAKS) if found_here else None
    if calibration is not None and (
        calibration.origin_stored is not None or calibration.descan_px > 1 or in_real_space(peaks)
    ):
        for i, name in enumerate(("origin_qy", "origin_qx")):
            peaks[name] = (schema.SCAN_DIMS, calibration.origin[..., i])
    with dask.config.set(
        scheduler="threads"
    ):  # the cluster is for patterns: peaks are few, and it may be gone
        settings = config.strain
        try:
            lattice = fit_lattice(peaks, **config.lattice.model_dump()).compute()
        except NoLatticeError as err:
            logger.warning("no strain: %s", err)
            lattice, settings = _no_lattice(peaks), _UNIT_REFERENCE
        strain = compute_strain(lattice, **settings.model_dump()).compute()
        vector_map = bragg_vector_map(peaks).compute()
        virtual = peaks[[n for n in (*schema.VIRTUAL, "n_peaks", "truncated") if n in peaks]].compute()
    lattice, strain = lattice.assign(F=strain["F"]), strain.drop_vars("F")
    patterns["bragg_vector_map"] = np.asarray(vector_map.values, np.float32)
    diffraction = xr.Dataset(
        {
            name: (schema.PATTERN_DIMS, pattern, schema.DIFFRACTION[name].attrs)
            for name, pattern in patterns.items()
        },
        coords={
            dim: _coordinate(dim, attrs[dim], n)
            for dim, n in zip(schema.PATTERN_DIMS, vector_map.shape, strict=True)
        },
    )
    diffraction["bragg_vector_map"].attrs |= vector_map.attrs
    groups = {
        "/strain": strain,
        "/lattice": lattice,
        "/virtual": virtual.drop_attrs(deep=False),
        "/diffraction": diffraction,
    }
    truth_group = out / PEAKS / "truth"
    if truth_group.exists():
        groups["/truth"] = xr.open_zarr(truth_group, consolidated=False, chunks=None).load()
    kept = ["input_title", "input_fingerprint", "weights_name", "weights_sha256", "science_sha256", "region"]
    kept += ["peaks_from", "source_format"]
    tree = xr.DataTree.from_dict({name: dataset.drop_encoding() for name, dataset in groups.items()})
    tree.attrs = provenance(
        config_json=json.dumps(public_settings(config)),
        config_sha256=hashlib.sha256(json.dumps(public_settings(config)).encode()).hexdigest(),
        **{k: attrs.get(k) for k in kept},
        datacube=attrs.get("datacube"),
        calibration=calibration.to_dict() | {"bad_pixels": None} if calibration else None,
        device=device,
        n_blocks=int(status.size),
        n_blocks_failed=int((status == schema.STATUS_FAILED).sum()),
    )
    write_results(out / RESULTS, tree)
    valid = groups["/strain"]["valid"].values
    error = groups["/lattice"]["fit_error"].values
    n, share = int(valid.sum()), 100 * valid.mean()
    median = f", median residual {np.nanmedian(error):.3f} px" if np.isfinite(error).any() else ""
    say(f"  strain    {n:,} of {valid.size:,} positions have a lattice ({share:.1f} %){median}")
    if share < 50:
        logger.warning("only %.0f %% of the positions have a lattice; look at: fcunet preview STORE", share)
    return open_results(out)


_UNIT_REFERENCE = StrainConfig(reference=((1.0, 0.0), (0.0, 1.0)))  # of nothing: every strain is NaN


def _no_lattice(peaks: xr.Dataset) -> xr.Dataset:
    """A lattice dataset without any lattice: NaN everywhere, because no pattern can have enough peaks."""
    nothing = peaks.assign({name: xr.full_like(peaks[name], np.nan) for name in ("peak_qy", "peak_qx")})
    return fit_lattice(nothing, basis=_UNIT_REFERENCE.reference, origin=(0.0, 0.0)).compute()


def public_settings(config: Config) -> dict[str, Any]:
    """The settings that shape the results: no paths, no machine."""
    settings = json.loads(config.model_dump_json(exclude={"store", "out", "cluster"}))
    settings["detection"]["weights"] = Path(settings["detection"]["weights"]).name
    return settings


def _coordinate(dim: str, axis: dict[str, Any], n: int) -> xr.DataArray:
    return coordinate(dim, axis["first"] + axis["step"] * np.arange(n), axis["units"])

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

from . import schema, second
from .calibration import Calibration
from .cepstral import in_real_space
from .config import Config, StrainConfig
from .datacube import coordinate
from .kernels.lattice import NoLatticeError
from .nn.range import MEANINGS, TrainingRange, outside_training
from .pipeline import bragg_vector_map, compute_strain, fit_lattice, fit_lattices
from .provenance import provenance
from .store import open_peaks, open_results, write_results
from .systematic import systematic_errors
from .tiles import finish_patterns, load_calibration
from .zarrfolder import root_attrs

logger = logging.getLogger(__name__)

PEAKS, RESULTS = "peaks.zarr", "strain.zarr"
_BAND = 2**15  # positions done at a time


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
    peaks, calibration = _open(out)
    attrs = root_attrs(out / PEAKS)
    found_here = "peaks_from" not in attrs  # otherwise there were no patterns to measure
    patterns = dict(zip(("mean", "maximum"), finish_patterns(out / PEAKS), strict=True)) if found_here else {}
    status = peaks["status"].values
    with dask.config.set(
        scheduler="threads"
    ):  # the cluster is for patterns: peaks are few, and it may be gone
        (lattice, strain), *more = _fit(peaks, config)
        flag = _flag(peaks, lattice, attrs, calibration)
        lattice, strain, other = _second_opinion(out, config, lattice, strain, flag, say)
        vector_map = bragg_vector_map(peaks).compute()
        virtual = peaks[[n for n in (*schema.VIRTUAL, "n_peaks", "truncated") if n in peaks]].compute()
    if flag is not None:
        strain["outside_training"] = flag
    absolute = config.strain.crystal is not None
    strain.attrs |= systematic_errors(lattice, strain["theta"].values, absolute=absolute)
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
    for number, (own, its_strain) in enumerate(more, 2):
        groups |= {f"/lattice_{number}": own.assign(F=its_strain["F"])}
        groups |= {f"/strain_{number}": its_strain.drop_vars("F")}
        share = 100 * float(its_strain["valid"].mean())
        say(f"  lattice   number {number} at {share:.1f} % of the positions")
    if other is not None:
        groups["/second"] = other
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


def _open(out: Path) -> tuple[xr.Dataset, Calibration | None]:
    """The peaks of a run, with the origin where it moves, and the calibration, if they were found here."""
    peaks = open_peaks(out / PEAKS)
    if "peaks_from" in root_attrs(out / PEAKS):
        return peaks, None
    calibration = load_calibration(out / PEAKS)
    if np.isfinite(calibration.origin_std_px):
        peaks.attrs["origin_std_px"] = float(calibration.origin_std_px)
    if calibration.origin_stored is not None or calibration.descan_px > 1 or in_real_space(peaks):
        for i, name in enumerate(("origin_qy", "origin_qx")):
            peaks[name] = (schema.SCAN_DIMS, calibration.origin[..., i])
    return peaks, calibration


def _fit(peaks: xr.Dataset, config: Config, basis: list | None = None) -> list[tuple[xr.Dataset, xr.Dataset]]:
    """Lattice and strain as the settings say, in memory, of up to three lattices per position.

    All NaN where no lattice is found at all; of the second and third, only those that occur.
    """
    settings = config.strain.model_dump()
    given = config.lattice.model_dump() | ({"basis": basis} if basis is not None else {})
    try:
        lattices = _computed(fit_lattices(peaks, **given))
    except NoLatticeError as err:
        logger.warning("no strain: %s", err)
        lattice = _no_lattice(peaks)
        return [(lattice, _no_strain(lattice))]
    first = lattices[0]
    out = [(first, _computed([compute_strain(_in_bands(first), peaks=peaks, **settings)])[0])]
    for other in lattices[1:]:
        if (other["n_indexed"] > 0).any():
            try:
                strain = compute_strain(_in_bands(other), among=first, peaks=peaks, **settings)
            except ValueError:  # another crystal: what is said of the first does not hold for it
                strain = compute_strain(
                    _in_bands(other), among=first, peaks=peaks, measure=settings["measure"]
                )
            out.append((other, _computed([strain])[0]))
    return out


def _computed(datasets: list[xr.Dataset]) -> list[xr.Dataset]:
    """Lazy maps of one scan, computed together in bands of rows, each put in its place at once.

    Left to itself, Dask holds all blocks twice while it joins them, and computes for each dataset anew what
    they share.
    """
    lazy = [[name for name, array in one.data_vars.items() if array.chunks is not None] for one in datasets]
    if not any(lazy):
        return datasets
    whole = [one.drop_vars(names).compute() for one, names in zip(datasets, lazy, strict=True)]
    for own, one, names in zip(whole, datasets, lazy, strict=True):
        for name in names:
            array = one[name].transpose(*schema.SCAN_DIMS, ...)
            own[name] = (array.dims, np.empty(array.shape, array.dtype), array.attrs)
    edges = np.cumsum((0, *datasets[0].chunksizes[schema.SCAN_DIMS[0]]))
    rows = max(1, _BAND // max(1, datasets[0].sizes[schema.SCAN_DIMS[1]]))
    start = 0
    for stop in edges[1:]:
        if stop - start < rows and stop < edges[-1]:
            continue
        band = {schema.SCAN_DIMS[0]: slice(start, stop)}
        # arrays: of a dataset whose variables share blocks, dask.compute may lose some (dask 2026.8)
        parts = dask.compute(
            *(
                {name: one[name].isel(band).transpose(*schema.SCAN_DIMS, ...).data for name in names}
                for one, names in zip(datasets, lazy, strict=True)
            )
        )
        for own, part in zip(whole, parts, strict=True):
            for name, values in part.items():
                own[name].values[start:stop] = values
        start = stop
    return [own[list(one.data_vars)] for own, one in zip(whole, datasets, strict=True)]


def _in_bands(lattice: xr.Dataset) -> xr.Dataset:
    """The same in bands of rows, done one after another: what strain needs on the way is ten times a map."""
    rows = max(1, _BAND // max(1, lattice.sizes["scan_x"]))
    return lattice if rows >= lattice.sizes["scan_y"] else lattice.chunk(scan_y=rows, scan_x=-1)


def _flag(
    peaks: xr.Dataset, lattice: xr.Dataset, attrs: dict[str, Any], calibration: Calibration | None
) -> xr.DataArray | None:
    """Which patterns are unlike those the network was trained on; None if it was not the network."""
    if not attrs.get("weights_sha256") or calibration is None:
        return None
    limits = TrainingRange(**{k: _tuple(v) for k, v in attrs.get("training_range", {}).items()})
    vectors = np.stack([lattice[name].values for name in schema.LATTICE_PARAMETERS[2:]], -1)
    shortest = np.hypot(vectors[..., ::2], vectors[..., 1::2]).min(-1)
    flag = outside_training(
        peaks["total"].values,
        shortest,
        radius_px=calibration.probe_radius_px,
        edge_sigma_px=calibration.edge_sigma_px,
        limits=limits,
    )
    named = {"flag_masks": list(MEANINGS), "flag_meanings": " ".join(MEANINGS.values())}
    return xr.DataArray(flag, dims=schema.SCAN_DIMS, attrs=schema.TRUST["outside_training"].attrs | named)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _second_opinion(
    out: Path,
    config: Config,
    lattice: xr.Dataset,
    strain: xr.Dataset,
    flag: xr.DataArray | None,
    say: Callable[[str], None],
) -> tuple[xr.Dataset, xr.Dataset, xr.Dataset | None]:
    """Lattice and strain, of the second method where wanted, and the comparison; None without one."""
    if (detection := config.second_detection()) is None:
        return lattice, strain, None
    method = detection.method
    folder = out / second.FOLDER
    if not (folder / PEAKS).is_dir() or (open_peaks(folder / PEAKS)["status"] == schema.STATUS_TODO).any():
        logger.warning("no second opinion: its peaks were not found yet; fcunet run with --second-opinion")
        return lattice, strain, None
    peaks, _ = _open(folder)
    found = root_attrs(folder / PEAKS).get("method")
    if found != method:
        logger.warning("no second opinion by %s: %s holds that by %s; use --restart", method, folder, found)
        return lattice, strain, None
    bases = lattice.attrs["bases_px"] if strain["valid"].any() and not in_real_space(peaks) else None
    others, *_ = _fit(peaks, config, bases)
    compared = second.compare_opinions(strain, others[1])
    compared.attrs["method"] = method
    numbers = compared.attrs
    if numbers["positions"]:
        say(
            f"  second    {method}: {1e3 * numbers['disagreement_rms']:.2f}e-3 rms apart, median "
            f"{numbers.get('disagreement_sigma_median', np.nan):.1f} error bars, "
            f"{100 * numbers.get('disagreement_share', np.nan):.1f} % of the positions beyond 3"
        )
    if config.second.fall_back:
        doubt = xr.zeros_like(strain["valid"]) if flag is None else flag > 0
        lattice, strain = second.fall_back((lattice, strain), others, doubt)
        taken = int((strain["source"] == second.SECOND).sum())
        say(f"  fall-back {taken:,} positions are those of the second opinion")
    return lattice, strain, compared


_UNIT_REFERENCE = StrainConfig(reference=((1.0, 0.0), (0.0, 1.0)))  # of nothing: every strain is NaN


def _no_lattice(peaks: xr.Dataset) -> xr.Dataset:
    """A lattice dataset without any lattice: NaN everywhere, because no pattern can have enough peaks."""
    nothing = peaks.assign({name: xr.full_like(peaks[name], np.nan) for name in ("peak_qy", "peak_qx")})
    lattice = fit_lattice(nothing, basis=_UNIT_REFERENCE.reference, origin=(0.0, 0.0)).compute()
    return _without(lattice, "basis_px", "bases_px", "basis_source", "origin_px", "max_peak_spacing_px")


def _no_strain(lattice: xr.Dataset) -> xr.Dataset:
    """The strain of no lattice: NaN everywhere."""
    strain = compute_strain(lattice, **_UNIT_REFERENCE.model_dump()).compute()
    strain.attrs["reference"] = "none, for no position has a lattice"
    return _without(strain, "g1_ref_px", "g2_ref_px")


def _without(dataset: xr.Dataset, *names: str) -> xr.Dataset:
    """Without attributes that would say what was never measured."""
    return dataset.drop_attrs(deep=False).assign_attrs(
        {k: v for k, v in dataset.attrs.items() if k not in names}
    )


def public_settings(config: Config) -> dict[str, Any]:
    """The settings that shape the results: no paths, no machine."""
    settings = json.loads(config.model_dump_json(exclude={"store", "storage_options", "out", "cluster"}))
    settings["detection"]["weights"] = Path(settings["detection"]["weights"]).name
    return settings


def _coordinate(dim: str, axis: dict[str, Any], n: int) -> xr.DataArray:
    return coordinate(dim, axis["first"] + axis["step"] * np.arange(n), axis["units"])

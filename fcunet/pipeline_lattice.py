"""From labelled peaks to the lattice of every position; import it from :mod:`fcunet.pipeline`.

Lazy in, lazy out. Only what the common lattice needs is read at once, a sample of the peaks. The arithmetic
is in :mod:`fcunet.kernels.lattice_fit` and :mod:`fcunet.kernels.lattice_several`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from . import cepstral, schema
from .kernels import lattice as kernel
from .kernels.lattice_several import find_lattices
from .kernels.lattice_several import fit_lattices as kernel_lattices
from .kernels.residuals import ScatterPrior, SigmaCurve, fit_scatter_prior, fit_sigma_curve
from .layout import check_whole_peaks
from .systematic import calibration_residuals

Array = NDArray[np.float64]

_SAMPLE_BLOCKS, _SAMPLE_PATTERNS = 36, 2048
_CURVE_PATTERNS, _CURVE_ROUNDS = 128, 2


def fit_lattice(
    peaks: xr.Dataset,
    *,
    basis: ArrayLike | None = None,
    origin: ArrayLike | None = None,
    weighting: kernel.Weighting = "sigma",
    robust: bool = True,
    fit_origin: bool = True,
    max_peak_spacing: float | None = None,
    min_num_peaks: int = 5,
    max_strain: float = 0.1,
    max_rotation_degree: float = 10.0,
    max_orientations: int = 12,
    sigma_from_scan: bool = True,
) -> xr.Dataset:
    """Lattice of every scan position.

    Parameters
    ----------
    peaks : Dataset
        `peak_qy`, `peak_qx` (scan_y, scan_x, peak), and if there `peak_intensity`, `peak_sigma`, and
        `origin_qy`, `origin_qx` (scan_y, scan_x), the measured beam centre. In memory or lazy.
        `shared_dilation_std` (scan_y, scan_x), a strain, is what `peak_sigma` leaves out: an error that all
        peaks of a pattern share, and `shared_dilation` the part of it with a known sign; handed on where
        `weighting` is "sigma".
    basis : array_like, shape (2, 2) or (n, 2, 2), optional
        Approximate g1, g2 as (y, x) in px, of one lattice or of each that may occur. None: found from a
        sample of the peaks.
    origin : array_like, shape (2,), optional
        Approximate (y, x) of the direct beam in px, to half a lattice vector. None: `origin_qy`, `origin_qx`
        of `peaks`, else the site with most intensity in a sample of the peaks.
    weighting, robust, fit_origin, max_peak_spacing, min_num_peaks, max_strain, max_rotation_degree
        As for :func:`fcunet.kernels.lattice.fit_lattice`.
    max_orientations : int
        Without `basis`, at most so many different lattices (grains, phases) are looked for; each position
        gets the one that describes its peaks best, numbered in `lattice_id`. 1: a single crystal.
    sigma_from_scan : bool
        Learn errors from how far the peaks of this scan scatter about their lattices, in a sample of it:
        correct `peak_sigma` before it weighs them (:func:`fcunet.kernels.residuals.fit_sigma_curve`; kept in
        ``attrs["sigma_stated_px"]`` and ``attrs["sigma_factor"]``), and let the common scatter count beside
        that of each position (:func:`fcunet.kernels.residuals.fit_scatter_prior`; kept in
        ``attrs["scatter_prior"]``; of a robust fit only, any other has outliers in it). Not with weights by
        intensity. The sample is of few blocks: another chunking may change error bars by some percent.

    Returns
    -------
    Dataset
        `origin_qy, origin_qx, g1_qy, g1_qx, g2_qy, g2_qx` (scan_y, scan_x) float64 px, their `covariance`
        (.., parameter, parameter2) px^2, `fit_error` px, `n_indexed`, `score` and `lattice_id`;
        `shared_dilation_std` and `shared_dilation` of the peaks, which are not part of `covariance`: most of
        them cancels against a reference in the same crystal, see :func:`compute_strain`.
        NaN, and 0, where there is no lattice. What was chosen or found is in the attributes.

    Raises
    ------
    ValueError
        If `peak` is split into chunks, if no common lattice is found, or for unusable options.
    """
    return fit_lattices(
        peaks,
        max_lattices=1,
        basis=basis,
        origin=origin,
        weighting=weighting,
        robust=robust,
        fit_origin=fit_origin,
        max_peak_spacing=max_peak_spacing,
        min_num_peaks=min_num_peaks,
        max_strain=max_strain,
        max_rotation_degree=max_rotation_degree,
        max_orientations=max_orientations,
        sigma_from_scan=sigma_from_scan,
    )[0]


def fit_lattices(
    peaks: xr.Dataset,
    *,
    max_lattices: int = 2,
    basis: ArrayLike | None = None,
    origin: ArrayLike | None = None,
    min_num_peaks: int = 5,
    max_orientations: int = 12,
    weighting: kernel.Weighting = "sigma",
    sigma_from_scan: bool = True,
    **options: Any,
) -> list[xr.Dataset]:
    """The one to three lattices of every scan position: overlapping grains, a film and its substrate.

    Parameters
    ----------
    peaks, basis, origin, min_num_peaks, max_orientations, weighting, sigma_from_scan
        As for :func:`fit_lattice`. With several lattices in `basis` and room for all, each has its own place:
        the i-th dataset is the i-th crystal, wherever it was found.
    max_lattices : int
        At most so many per position, 1 to 3.
    **options
        The other options of :func:`fit_lattice`.

    Returns
    -------
    list of Dataset
        Each as from :func:`fit_lattice`: the best lattice of each position, the second best (found in the
        peaks that the first leaves), the third; or, with known crystals, one for each. `score` and
        `lattice_id` say how good it is, and which.

    Raises
    ------
    ValueError
        As :func:`fit_lattice`.
    """
    schema.check_variables(peaks, schema.PEAK_VARIABLES, required=["peak_qy", "peak_qx"], where="peaks")
    check_whole_peaks(peaks)
    if cepstral.in_real_space(peaks):
        options["sigma_from_scan"] = sigma_from_scan
        return [_fit_cepstral(peaks, basis, min_num_peaks, weighting, options)]
    learns = sigma_from_scan and not weighting.startswith("intensity")
    sample = _sample(peaks) if learns or basis is None or origin is None else None
    bases = _common_lattices(sample, basis, origin, max_orientations, int(min_num_peaks))
    found = bases[0]
    arrays = [peaks["peak_qy"], peaks["peak_qx"]]
    optional = [name for name in ("peak_sigma", "peak_intensity") if name in peaks]
    arrays += [peaks[name] for name in optional]
    core = [["peak"]] * len(arrays)
    shared = [name for name in schema.SHARED_DILATION if weighting == "sigma" and name in peaks]
    for name in shared:
        arrays.append(peaks[name])
        core, optional = [*core, []], [*optional, name]
    if origin is None and {"origin_qy", "origin_qx"} <= set(peaks):
        arrays += [peaks["origin_qy"].astype(float), peaks["origin_qx"].astype(float)]
        core = [*core, [], []]
        optional = [*optional, "origin"]
    options |= {"weighting": weighting, "min_num_peaks": int(min_num_peaks)}
    # the options are checked now, not when the first block is computed
    nothing = np.full((1, 1), np.nan)
    has: dict[str, Any] = {name: nothing for name in ("sigma", "intensity") if f"peak_{name}" in optional}
    kernel.fit_lattice(nothing, nothing, g=found.g, origin=found.origin, **has, **options)
    known = basis is not None and 1 < len(bases) <= max_lattices
    places = {"max_lattices": int(max_lattices), "in_order": known}
    curve = prior = None
    if learns and sample is not None:
        if origin is not None:
            sample = sample.drop_vars(["origin_qy", "origin_qx"], errors="ignore")
        best = places if known else {"max_lattices": 1, "in_order": False}
        curve, prior = _scatter_of_scan(sample, bases, options | best)
    options["scatter_prior"] = prior
    results = xr.apply_ufunc(
        _fit_block,
        *arrays,
        kwargs={"optional": optional, "bases": bases, "options": options | places, "curve": curve},
        input_core_dims=core,
        output_core_dims=([[]] * 6 + [["parameter", "parameter2"]] + [[]] * (4 + len(shared))) * max_lattices,
        dask="parallelized",
        output_dtypes=(
            [np.float64] * 6
            + [np.float32, np.float32, np.int16, np.float32, np.uint8]
            + [np.float32] * len(shared)
        )
        * max_lattices,
        dask_gufunc_kwargs={"output_sizes": {"parameter": 6, "parameter2": 6}},
    )
    spacing = options.get("max_peak_spacing")
    attrs = {
        "basis_px": found.g.tolist(),
        "bases_px": [one.g.tolist() for one in bases],
        "basis_source": "found from the peaks" if basis is None else "given",
        "origin_px": found.origin.tolist(),
        "weighting": weighting if weighting != "sigma" or "peak_sigma" in peaks else "uniform",
        "robust": int(options.get("robust", True)),
        "fit_origin": int(options.get("fit_origin", True)),
        "max_peak_spacing_px": float(
            spacing or kernel.DEFAULT_SPACING * np.hypot(*kernel.reduce_basis(found.g)[0].T).min()
        ),
        "min_num_peaks": int(min_num_peaks),
    }
    if curve is not None:
        attrs |= {"sigma_stated_px": curve.sigma.tolist(), "sigma_factor": curve.factor.tolist()}
    if prior is not None:
        attrs["scatter_prior"] = list(prior)
    if shared and peaks.attrs.get("shared_dilation_floor"):
        attrs["shared_dilation_floor"] = float(peaks.attrs["shared_dilation_floor"])
    attrs |= _geometry(peaks)
    names = (
        *schema.LATTICE_PARAMETERS,
        "covariance",
        "fit_error",
        "n_indexed",
        "score",
        "lattice_id",
        *shared,
    )
    lattices = []
    for place in range(max_lattices):
        own = results[place * len(names) : (place + 1) * len(names)]
        lattice = xr.Dataset(
            {
                name: array.assign_attrs(schema.LATTICE[name].attrs)
                for name, array in zip(names, own, strict=True)
            }
        )
        lattice = lattice.assign_coords(schema.scan_coords(peaks))
        lattice["covariance"].attrs["parameters"] = " ".join(schema.LATTICE_PARAMETERS)
        which = bases[place].g.tolist() if known and place < len(bases) else attrs["basis_px"]
        lattice.attrs = attrs | {"basis_px": which}
        lattices.append(lattice)
    return lattices


def _fit_cepstral(
    peaks: xr.Dataset, basis: ArrayLike | None, min_num_peaks: int, weighting: kernel.Weighting, options: dict
) -> xr.Dataset:
    """The lattice of vectors of real space, as one in detector px."""
    side, middle = cepstral.cepstral_frame(peaks.attrs["detector_shape"])
    fitted = fit_lattice(
        cepstral.as_fitted(peaks),
        basis=None if basis is None else cepstral.other_lattice(np.reshape(basis, (-1, 2, 2))[0], side),
        origin=middle,
        weighting=weighting,
        robust=options.get("robust", True),
        min_num_peaks=min_num_peaks,
        sigma_from_scan=options["sigma_from_scan"],
    )
    return cepstral.to_reciprocal(fitted, peaks)


def _fit_block(
    qy: Array,
    qx: Array,
    *rest: Array,
    optional: Sequence[str],
    bases: list[kernel.Basis],
    options: dict,
    curve: SigmaCurve | None = None,
):
    """Plain arrays in, the variables of a lattice out, in the order of :func:`fit_lattice`."""
    given = dict(zip(optional, rest, strict=False))
    if curve is not None:
        given["peak_sigma"] = curve.applied(given["peak_sigma"])
    basis = bases[0]
    origin = np.stack(rest[-2:], -1) if "origin" in optional else basis.origin
    if "origin" in optional:
        origin = np.where(np.isfinite(origin), origin, basis.origin)
    several = kernel_lattices(
        qy,
        qx,
        g=[one.g for one in bases],
        origin=origin,
        sigma=given.get("peak_sigma"),
        intensity=given.get("peak_intensity"),
        **options,
    )
    out: list[Array] = []
    for fit, number in zip(several.fits, several.lattice_id, strict=True):
        out += [
            fit.origin[..., 0],
            fit.origin[..., 1],
            *(fit.g[..., i, j] for i in (0, 1) for j in (0, 1)),
            fit.covariance.astype(np.float32),
            fit.fit_error.astype(np.float32),
            fit.n_indexed.astype(np.int16),
            fit.score.astype(np.float32),
            number.astype(np.uint8),
        ]
        known = np.isfinite(fit.g).all((-1, -2))
        for name in schema.SHARED_DILATION:
            if name in given:
                out.append(np.where(known, given[name], np.nan).astype(np.float32))
    return tuple(out)


def _common_lattices(
    sample: xr.Dataset | None,
    basis: ArrayLike | None,
    origin: ArrayLike | None,
    most: int,
    min_num_peaks: int,
) -> list[kernel.Basis]:
    """Basis and origin as given, else all that are found in a sample of the peaks."""
    if origin is not None and np.shape(origin) != (2,):
        raise ValueError(
            f"origin has shape {np.shape(origin)}, needed is (y, x) in px; per position: origin_qy, origin_qx"
        )
    given = None if basis is None else np.asarray(basis, dtype=np.float64).reshape(-1, 2, 2)
    if given is not None and origin is not None:
        return [kernel.Basis(np.asarray(origin, dtype=np.float64), g) for g in given]
    assert sample is not None
    intensity = sample["peak_intensity"].values if "peak_intensity" in sample else None
    if origin is None and {"origin_qy", "origin_qx"} <= set(sample):
        origin = [float(sample[name].median()) for name in ("origin_qy", "origin_qx")]
        origin = origin if np.isfinite(origin).all() else None
    y, x = sample["peak_qy"].values, sample["peak_qx"].values
    if given is not None:
        share = {"min_share": 0.02} if len(given) > 1 else {}
        first = kernel.find_basis(y, x, intensity, origin=origin, g=given[0], **share)
        return [kernel.Basis(first.origin, g) for g in given]
    return find_lattices(
        y, x, intensity, origin=origin, max_orientations=int(most), min_num_peaks=min_num_peaks
    )


def _scatter_of_scan(
    sample: xr.Dataset, bases: list[kernel.Basis], options: dict
) -> tuple[SigmaCurve | None, ScatterPrior | None]:
    """How far the peaks of a sample scatter, and how alike its patterns are in that; None if too few tell."""
    if not sample["peak_qy"].size:
        return None, None
    sample = sample.stack(position=schema.SCAN_DIMS).transpose("position", ...)
    n = sample.sizes["position"]
    # at random: equal steps would fall on few columns of the scan
    chosen = np.sort(np.random.default_rng(0).permutation(n)[:_CURVE_PATTERNS])
    sample = sample.isel(position=chosen)
    qy, qx = sample["peak_qy"].values, sample["peak_qx"].values
    optional = [name for name in ("peak_sigma", "peak_intensity") if name in sample]
    rest = [sample[name].values for name in optional]
    if {"origin_qy", "origin_qx"} <= set(sample):
        optional.append("origin")
        rest += [sample[name].values.astype(float) for name in ("origin_qy", "origin_qx")]
    places, curve = int(options["max_lattices"]), None
    y, x = (np.tile(v, (places, 1)) for v in (qy, qx))
    stated = options["weighting"] == "sigma" and "peak_sigma" in sample
    sigma = np.tile(sample["peak_sigma"].values, (places, 1)) if stated else None
    for _ in range(_CURVE_ROUNDS if stated else 1):
        found = _fit_block(qy, qx, *rest, optional=optional, bases=bases, options=options, curve=curve)
        step = len(found) // places
        vectors = [np.stack(found[i * step : i * step + 6], -1) for i in range(places)]  # (n, 6) each
        origin, g = np.split(np.concatenate(vectors), [2], axis=1)
        lattices: dict[str, Any] = {
            "g": g.reshape(-1, 2, 2),
            "origin": origin,
            "fit_origin": bool(options.get("fit_origin", True)),
        }
        if sigma is not None:
            curve = fit_sigma_curve(y, x, sigma, curve=curve, **lattices)
    if not options.get("robust", True):
        return curve, None
    corrected = sigma if sigma is None or curve is None else curve.applied(sigma)
    return curve, fit_scatter_prior(y, x, sigma=corrected, **lattices)


def _sample(peaks: xr.Dataset) -> xr.Dataset:
    """Some patterns spread over the scan, in memory, reading few blocks of a lazy dataset."""
    names = ("peak_qy", "peak_qx", "peak_intensity", "peak_sigma", "origin_qy", "origin_qx")
    peaks = peaks[[name for name in names if name in peaks]].reset_coords(drop=True)
    index = []
    for axis, dim in enumerate(schema.SCAN_DIMS):
        size, chunks = peaks.sizes[dim], peaks["peak_qy"].chunks
        edges = np.cumsum((0, *(chunks[axis] if chunks else (size,))))
        few = round(_SAMPLE_BLOCKS**0.5)
        blocks = np.unique(np.linspace(0, len(edges) - 2, min(few, len(edges) - 1)).round().astype(int))
        rows = np.concatenate([np.arange(edges[b], edges[b + 1]) for b in blocks]) if size else np.arange(0)
        index.append(rows)
    # both axes thinned alike until about the wanted number is left; the kernel takes an even choice of those
    thin = max(1, int((len(index[0]) * len(index[1]) / (4 * _SAMPLE_PATTERNS)) ** 0.5))
    return peaks.isel(scan_y=index[0][::thin], scan_x=index[1][::thin]).compute()


def _geometry(peaks: xr.Dataset) -> dict[str, float]:
    """How the detector lies against the scan, and its distortion, as the peaks or their datacube say."""
    source = peaks.attrs.get("datacube")
    attrs = (dict(source) if isinstance(source, dict) else {}) | peaks.attrs
    found = {name: attrs[name] for name in schema.GEOMETRY_ATTRS if attrs.get(name) is not None}
    geometry = {name: float(value) for name, value in found.items() if np.isfinite(float(value))}
    geometry |= calibration_residuals(attrs)
    axis = attrs.get("qy")
    if isinstance(axis, dict) and axis.get("units") == schema.UNIT_Q:
        geometry["q_pixel"] = abs(float(axis["step"]))
    return geometry

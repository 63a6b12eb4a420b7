"""From labelled peaks to labelled lattice, strain, Bragg vector map; import it from :mod:`fcunet.pipeline`.

Lazy in, lazy out. Only what one number for the whole scan needs is read at once: a sample of the peaks for
the common lattice, g1 and g2 for the reference. The arithmetic is in :mod:`fcunet.kernels.lattice` and
:mod:`fcunet.kernels.strain`.
"""

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from . import cepstral, schema
from .crystal import Crystal
from .kernels import lattice as kernel
from .kernels.ellipse import Ellipse, undistort_lattice
from .kernels.lattice_fit import with_shared_dilation
from .kernels.lattice_several import find_lattices
from .kernels.lattice_several import fit_lattices as kernel_lattices
from .kernels.strain import (
    COMPONENTS,
    Convention,
    Measure,
    deformation_gradient,
    principal_strains,
    rotate_frame,
    strain_from_F,
    strain_std,
)
from .pipeline_reference import (
    axis_angle,
    axis_in_lattice,
    find_grains,
    find_references,
    lattice_numbers,
    onto_crystal,
)
from .systematic import calibration_residuals

Array = NDArray[np.float64]

_SAMPLE_BLOCKS, _SAMPLE_PATTERNS = 36, 2048
_VECTORS = schema.LATTICE_PARAMETERS[2:]  # g1_qy, g1_qx, g2_qy, g2_qx
_PRINCIPAL = ("e_1", "e_2", "principal_angle", "dilation", "max_shear")


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
) -> xr.Dataset:
    """Lattice of every scan position.

    Parameters
    ----------
    peaks : Dataset
        `peak_qy`, `peak_qx` (scan_y, scan_x, peak), and if there `peak_intensity`, `peak_sigma`, and
        `origin_qy`, `origin_qx` (scan_y, scan_x), the measured beam centre. In memory or lazy. The attribute
        ``shared_dilation_std``, a strain, is what `peak_sigma` leaves out: an error that all peaks of a
        pattern share. It goes into `covariance` where `weighting` is "sigma".
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

    Returns
    -------
    Dataset
        `origin_qy, origin_qx, g1_qy, g1_qx, g2_qy, g2_qx` (scan_y, scan_x) float64 px, their `covariance`
        (.., parameter, parameter2) px^2, `fit_error` px, `n_indexed`, `score` and `lattice_id`.
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
    **options: Any,
) -> list[xr.Dataset]:
    """The one to three lattices of every scan position: overlapping grains, a film and its substrate.

    Parameters
    ----------
    peaks, basis, origin, min_num_peaks, max_orientations, weighting
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
    _check_whole(peaks)
    if cepstral.in_real_space(peaks):
        return [_fit_cepstral(peaks, basis, min_num_peaks, weighting, options)]
    bases = _common_lattices(peaks, basis, origin, max_orientations, int(min_num_peaks))
    found = bases[0]
    arrays = [peaks["peak_qy"], peaks["peak_qx"]]
    optional = [name for name in ("peak_sigma", "peak_intensity") if name in peaks]
    arrays += [peaks[name] for name in optional]
    core = [["peak"]] * len(arrays)
    if origin is None and {"origin_qy", "origin_qx"} <= set(peaks):
        arrays += [peaks["origin_qy"].astype(float), peaks["origin_qx"].astype(float)]
        core = [*core, [], []]
        optional = [*optional, "origin"]
    options |= {"weighting": weighting, "min_num_peaks": int(min_num_peaks)}
    # the options are checked now, not when the first block is computed
    nothing = np.full((1, 1), np.nan)
    has: dict[str, Any] = {name: nothing for name in ("sigma", "intensity") if f"peak_{name}" in optional}
    kernel.fit_lattice(nothing, nothing, g=found.g, origin=found.origin, **has, **options)
    shared = float(peaks.attrs.get("shared_dilation_std") or 0.0) if weighting == "sigma" else 0.0
    known = basis is not None and 1 < len(bases) <= max_lattices
    places = {"max_lattices": int(max_lattices), "in_order": known}
    results = xr.apply_ufunc(
        _fit_block,
        *arrays,
        kwargs={"optional": optional, "bases": bases, "options": options | places, "shared_dilation": shared},
        input_core_dims=core,
        output_core_dims=([[]] * 6 + [["parameter", "parameter2"], [], [], [], []]) * max_lattices,
        dask="parallelized",
        output_dtypes=([np.float64] * 6 + [np.float32, np.float32, np.int16, np.float32, np.uint8])
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
    if shared:
        attrs["shared_dilation_std"] = shared
    attrs |= _geometry(peaks)
    names = (*schema.LATTICE_PARAMETERS, "covariance", "fit_error", "n_indexed", "score", "lattice_id")
    lattices = []
    for place in range(max_lattices):
        own = results[place * len(names) : (place + 1) * len(names)]
        lattice = xr.Dataset(
            {
                name: array.assign_attrs(schema.LATTICE[name].attrs)
                for name, array in zip(names, own, strict=True)
            }
        )
        lattice = _with_coordinates_of(peaks, lattice)
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
    )
    return cepstral.to_reciprocal(fitted, peaks)


def compute_strain(
    lattice: xr.Dataset,
    *,
    reference: str | ArrayLike = "median",
    crystal: str | Crystal | None = None,
    zone: ArrayLike | None = None,
    miller: ArrayLike | None = None,
    q_pixel: float | None = None,
    axis: str | Sequence[int] | None = None,
    measure: Measure = "infinitesimal",
    convention: Convention = "fcunet",
    rotation_degree: float | None = None,
    transpose: bool | None = None,
    among: xr.Dataset | None = None,
) -> xr.Dataset:
    """Strain of every scan position against a reference lattice, with error bars.

    An elliptical distortion of the detector (``ellipse_ratio``, ``ellipse_angle_degree`` of the data) is
    taken out of g1 and g2, of the reference as well.

    Parameters
    ----------
    lattice : Dataset
        From :func:`fit_lattice`. In memory or lazy; g1 and g2 are read now unless `reference` holds vectors.
    reference : str, 4 integers, or array_like of shape (2, 2)
        ``"median"``: median of stretch and of rotation over all positions of a lattice;
        ``"robust_median"``: the same without positions more than three standard deviations off it, again and
        again; ``"weighted_median"``: each position counts by the inverse of its variance; ``"grain"``: of
        each grain on its own (NaN where a grain has fewer than 4 positions); (y0, y1, x0, x1): over that part
        of the scan, or all positions of a lattice that is not there;
        ((g1_y, g1_x), (g2_y, g2_x)): any two vectors of a known lattice in px, taken
        as exact.
    crystal : str or Crystal, optional
        Absolute strain, against an ideal crystal: its cell or CIF file, as for
        :func:`fcunet.crystal.read_crystal`. It is turned in the plane onto the lattice that `reference` says,
        of each grain with ``"grain"``, so rotation stays relative to that. Strain is as good as the pixel
        size: an error of 1 % there is a dilation of 1 % here.
    zone : array_like of 3 int, optional
        Zone axis of the crystal along the beam, where the lattice alone does not tell.
    miller : array_like of int, shape (2, 3), optional
        Indices of g1 and g2 (of ``attrs["basis_px"]``). None: those that fit their lengths and angle.
    q_pixel : float, optional
        Pixel size in 1/angstrom, for `crystal`. None: that of the data.
    axis : "g1", "g2", 2 or 3 integers, optional
        Strain along the axes of the crystal: +x lies along this reciprocal lattice vector of the reference,
        as its indices in (g1, g2), or, with `crystal`, (h, k, l). Goes before `rotation_degree`.
    measure, convention
        As for :func:`fcunet.kernels.strain.strain_from_F`.
    rotation_degree : float, optional
        By how much the scan's +x axis is turned from the detector's, from +x towards +y. None:
        ``scan_rotation_degree`` of the data; without it, strain stays in the detector frame.
    transpose : bool, optional
        Detector rows and columns are exchanged relative to the scan (undone before the rotation). None:
        ``scan_transposed`` of the data, else no.
    among : Dataset, optional
        Where the reference of each `lattice_id` is taken from, if it occurs there: the first of
        :func:`fit_lattices` when `lattice` is the second. Default: `lattice` itself.

    Returns
    -------
    Dataset
        `e_xx, e_yy, e_xy` (tensor shear), `theta` (rad) (scan_y, scan_x) float64, each with `_std` float32;
        `valid`; `grain`, connected regions of valid positions; and `F` (.., row, column), detector frame. NaN
        where there is no lattice. ``attrs["frame"]`` is ``"scan"``, ``"detector"`` or ``"crystal"``.

    Raises
    ------
    ValueError
        If the reference has no valid position, no area, or is another lattice; for unknown options.
    """
    schema.check_variables(lattice, schema.LATTICE, required=_VECTORS, where="lattice")
    grain = find_grains(lattice)
    by_grain = isinstance(reference, str) and reference == "grain"
    member = grain if by_grain else lattice_numbers(lattice)
    references = find_references(lattice, reference, member)
    if among is not None and not by_grain:
        elsewhere = find_references(among, reference, lattice_numbers(among))
        references |= {number: elsewhere[number] for number in references if number in elsewhere}
    ellipse = Ellipse(
        float(lattice.attrs.get("ellipse_ratio", 1.0)), float(lattice.attrs.get("ellipse_angle_degree", 0.0))
    )
    measured_ref, _, description = references[min(references)]
    flat = {
        number: undistort_lattice(vectors, covariance, ellipse)
        for number, (vectors, covariance, _) in references.items()
    }
    indices = None
    if crystal is not None:
        scale = lattice.attrs.get("q_pixel") if q_pixel is None else q_pixel
        flat, indices, note = onto_crystal(flat, crystal, scale, zone=zone, miller=miller)
        measured_ref, description = flat[min(flat)][0], f"{note}, turned onto {description}"
    if transpose is None:
        transpose = bool(lattice.attrs.get("scan_transposed", False))
    frame = "detector" if rotation_degree is None and not transpose else "scan"
    if rotation_degree is None and "scan_rotation_degree" in lattice.attrs:
        rotation_degree, frame = float(lattice.attrs["scan_rotation_degree"]), "scan"
    options: dict[str, Any] = {
        "measure": measure,
        "convention": convention,
        "rotation_degree": float(rotation_degree or 0.0),
        "transpose": bool(transpose),
    }
    rotations = dict.fromkeys(flat, options["rotation_degree"])
    if axis is not None:
        along = axis_in_lattice(axis, indices)
        rotations = {number: axis_angle(along @ flat[number][0], bool(transpose)) for number in flat}
        frame, options["rotation_degree"] = "crystal", rotations[min(flat)]
    strain_from_F(np.eye(2), measure, convention)  # refuses unknown names before the first block is computed
    for vectors, _ in flat.values():
        deformation_gradient(vectors, vectors)
    covariance = lattice.get("covariance")
    if lattice["g1_qy"].chunks is not None:
        member = member.chunk(dict(zip(schema.SCAN_DIMS, lattice["g1_qy"].chunks, strict=True)))
    arrays = [*(lattice[name] for name in _VECTORS), member] + ([] if covariance is None else [covariance])
    results = xr.apply_ufunc(
        _strain_block,
        *arrays,
        kwargs={
            "references": flat,
            "rotations": rotations,
            "options": options,
            "ellipse": ellipse,
        },
        input_core_dims=[[]] * 5 + ([] if covariance is None else [["parameter", "parameter2"]]),
        output_core_dims=[[]] * 13 + [["row", "column"]],
        dask="parallelized",
        output_dtypes=[np.float64] * 4 + [np.float32] * 9 + [np.float64],
        dask_gufunc_kwargs={"output_sizes": {"row": 2, "column": 2}},
    )
    names = (*COMPONENTS, *(f"{name}_std" for name in COMPONENTS), *_PRINCIPAL)
    strain = xr.Dataset(
        {
            name: array.assign_attrs(schema.STRAIN[name].attrs)
            for name, array in zip(names, results, strict=False)
        }
    )
    strain = _with_coordinates_of(lattice, strain)
    strain["valid"] = strain["e_xx"].notnull().assign_attrs(schema.STRAIN["valid"].attrs)
    strain["grain"] = grain.where(strain["valid"] | by_grain, 0).astype(np.int32)
    strain["grain"].attrs = schema.STRAIN["grain"].attrs | {
        "method": "connected positions of one lattice, neighbours within 2 degrees; the largest is 1"
    }
    strain["F"] = results[-1].assign_attrs(schema.LATTICE["F"].attrs | {"frame": "detector"})
    if convention in ("quantem", "pyxem"):
        strain["theta"].attrs["long_name"] = f"lattice rotation, sign as in {convention}: from +y towards +x"
    if convention == "pyxem":
        strain["e_xy"].attrs["long_name"] = "shear strain, sign as in pyxem: that of the reciprocal lattice"
    strain.attrs = {
        **({} if axis is None else {"axis": axis if isinstance(axis, str) else list(axis)}),
        **({} if indices is None else {"miller": indices.tolist()}),
        "measure": measure,
        "convention": convention,
        "frame": frame,
        "rotation_degree": options["rotation_degree"],
        "transposed": int(transpose),
        "ellipse_ratio": ellipse.ratio,
        "ellipse_angle_degree": ellipse.angle_degree,
        "axes": "x along columns, y along rows; rotation positive from +x towards +y",
        "reference": description,
        "g1_ref_px": measured_ref[0].tolist(),
        "g2_ref_px": measured_ref[1].tolist(),
    }
    return strain


def bragg_vector_map(
    peaks: xr.Dataset,
    *,
    lattice: xr.Dataset | None = None,
    shape: tuple[int, int] | None = None,
    sampling: float = 1.0,
    weighted: bool = True,
) -> xr.DataArray:
    """Histogram of all Bragg peaks of a scan on the detector, each shared bilinearly among four pixels.

    Parameters
    ----------
    peaks : Dataset
        `peak_qy`, `peak_qx` and, if `weighted`, `peak_intensity` (scan_y, scan_x, peak). Lazy in, lazy out.
    lattice : Dataset, optional
        With `origin_qy`, `origin_qx` (scan_y, scan_x): every pattern is shifted so that its origin falls on
        their mean, which takes out the descan. Positions without an origin are left out.
    shape : (int, int), optional
        Detector shape. None: ``peaks.attrs["detector_shape"]``, else just large enough.
    sampling : float
        Pixels of the map per detector pixel.
    weighted : bool
        Weight by intensity, else count.

    Returns
    -------
    DataArray
        (qy, qx) float64 with pixel coordinates.

    Raises
    ------
    ValueError
        If `peak` is split into chunks, or `sampling` is not above 0.
    """
    needed = ["peak_qy", "peak_qx", *(["peak_intensity"] if weighted else [])]
    schema.check_variables(peaks, schema.PEAK_VARIABLES, required=needed, where="peaks")
    _check_whole(peaks)
    if not sampling > 0:
        raise ValueError(f"sampling is {sampling}, needed are pixels of the map per detector pixel, above 0")
    arrays = {name: peaks[name] for name in needed}
    centre = None
    if lattice is not None:
        for axis in ("qy", "qx"):
            origin = lattice[f"origin_{axis}"]
            mean = float(origin.mean())
            centre = [*(centre or []), mean]
            arrays[f"peak_{axis}"] = arrays[f"peak_{axis}"] - origin + mean
    if shape is None:
        shape = peaks.attrs.get("detector_shape")
    if shape is None:
        extent = (float(arrays[f"peak_{axis}"].max()) for axis in schema.PATTERN_DIMS)
        shape = tuple(int(np.nan_to_num(value)) + 2 for value in extent)  # type: ignore[assignment]
    assert shape is not None
    rows, columns = int(shape[0]), int(shape[1])
    chunked = peaks["peak_qy"].chunks
    data = [array.transpose(*schema.PEAK_DIMS).data for array in arrays.values()]
    options: dict[str, Any] = {"shape": (rows, columns), "sampling": float(sampling)}
    if chunked is None:
        image = _splat_block(*(np.asarray(d) for d in data), **options)[0, 0]
    else:
        size = _splat_block(*(np.empty((1, 1, 0)) for _ in data), **options).shape[2:]
        image = da.map_blocks(
            _splat_block,
            *(da.asarray(d).rechunk(chunked) for d in data),
            **options,
            drop_axis=2,
            new_axis=(2, 3),
            chunks=(*((1,) * len(c) for c in chunked[:2]), *((n,) for n in size)),
            dtype=np.float64,
            meta=np.empty((0, 0, 0, 0)),
        ).sum(axis=(0, 1))
    coords = {
        dim: (dim, np.arange(n) / sampling, {"units": schema.UNIT_PIXEL})
        for dim, n in zip(schema.PATTERN_DIMS, image.shape, strict=True)
    }
    attrs = dict(schema.DIFFRACTION["bragg_vector_map"].attrs)
    if centre is not None:
        attrs["origin_px"] = centre  # type: ignore[assignment]
    return xr.DataArray(image, coords, schema.PATTERN_DIMS, "bragg_vector_map", attrs)


def compare_with_truth(strain: xr.Dataset, truth: xr.Dataset) -> dict[str, dict[str, float]]:
    """Errors of strain maps whose true values are known, over the positions where both have one.

    Parameters
    ----------
    strain, truth : Dataset
        `e_xx, e_yy, e_xy, theta` (scan_y, scan_x), against the same reference and in the same frame; `strain`
        may have `_std`. Aligned by their scan coordinates.

    Returns
    -------
    dict
        ``{component: {...}}`` with ``rms`` and ``bias`` (mean of found - true), ``slope`` of found against
        true (1 is right, less is a pull towards the reference; NaN for a constant truth), ``within_1`` and
        ``within_2``, the shares of true values inside one and two error bars (0.68 and 0.95 are right; NaN
        without), and ``n``.

    Raises
    ------
    ValueError
        If they have no scan position in common.
    """
    found, true = xr.align(strain, truth, join="inner")
    if not found["e_xx"].size:
        raise ValueError("strain and truth have no scan position in common: their scan_y, scan_x differ")
    errors = {}
    for name in COMPONENTS:
        f, t = (np.asarray(d[name].values, dtype=np.float64).ravel() for d in (found, true))
        known = f"{name}_std" in found
        std = (
            np.asarray(found[f"{name}_std"].values, np.float64).ravel() if known else np.full(f.shape, np.nan)
        )
        both = np.isfinite(f) & np.isfinite(t)
        f, t, std = f[both], t[both], std[both]
        with np.errstate(divide="ignore", invalid="ignore"):
            difference, spread = f - t, t - (t.mean() if t.size else np.nan)
            ratio = np.abs(difference[np.isfinite(std)]) / std[np.isfinite(std)]
            errors[name] = {
                "rms": float(np.sqrt(np.mean(difference**2))) if t.size else np.nan,
                "bias": float(difference.mean()) if t.size else np.nan,
                "slope": float((spread @ f) / (spread @ spread)) if spread @ spread > 1e-18 else np.nan,
                "within_1": float((ratio < 1).mean()) if ratio.size else np.nan,
                "within_2": float((ratio < 2).mean()) if ratio.size else np.nan,
                "n": int(t.size),
            }
    return errors


def _fit_block(
    qy: Array,
    qx: Array,
    *rest: Array,
    optional: Sequence[str],
    bases: list[kernel.Basis],
    options: dict,
    shared_dilation: float,
):
    """Plain arrays in, the variables of a lattice out, in the order of :func:`fit_lattice`."""
    given = dict(zip(optional, rest, strict=False))
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
        covariance = fit.covariance
        if shared_dilation:
            covariance = with_shared_dilation(covariance, fit.g, shared_dilation)
        out += [
            fit.origin[..., 0],
            fit.origin[..., 1],
            *(fit.g[..., i, j] for i in (0, 1) for j in (0, 1)),
            covariance.astype(np.float32),
            fit.fit_error.astype(np.float32),
            fit.n_indexed.astype(np.int16),
            fit.score.astype(np.float32),
            number.astype(np.uint8),
        ]
    return tuple(out)


def _strain_block(*arrays: Array, references: dict, rotations: dict, options: dict, ellipse: Ellipse):
    """Vector components, number of the reference, maybe covariance in; variables of the strain and F out."""
    lead = arrays[0].shape
    g = np.stack(arrays[:4], -1).astype(np.float64).reshape(*lead, 2, 2)
    g, covariance = undistort_lattice(g, arrays[5] if len(arrays) == 6 else None, ellipse)
    member = np.asarray(arrays[4])
    F, turned = (np.full((*lead, 2, 2), np.nan) for _ in range(2))
    std = {f"{name}_std": np.full(lead, np.nan) for name in COMPONENTS}
    for number in np.unique(member):
        if number not in references:
            continue
        here = member == number
        g_ref, of_reference = references[number]
        frame = {"rotation_degree": rotations[number], "transpose": options["transpose"]}
        F[here] = deformation_gradient(g[here], g_ref)
        turned[here] = rotate_frame(F[here], **frame)
        if covariance is not None:
            given = options | frame
            own = strain_std(g[here], g_ref, covariance[here], reference_covariance=of_reference, **given)
            for name, values in own.items():
                std[name][here] = values
    strain = strain_from_F(turned, options["measure"], options["convention"])
    e = strain_from_F(turned, options["measure"])  # principal strains are the same in every convention
    principal = principal_strains(e["e_xx"], e["e_yy"], e["e_xy"])
    rest = (v.astype(np.float32) for v in (*std.values(), *principal.values()))
    return *strain.values(), *rest, F


def _splat_block(
    qy: Array, qx: Array, weight: Array | None = None, *, shape: tuple[int, int], sampling: float
) -> Array:
    """Map of one block of peaks, with two leading axes of length one."""
    return kernel.splat_peaks(qy, qx, weight, shape, sampling=sampling)[None, None]


def _common_lattices(
    peaks: xr.Dataset, basis: ArrayLike | None, origin: ArrayLike | None, most: int, min_num_peaks: int
) -> list[kernel.Basis]:
    """Basis and origin as given, else all that are found in a sample of the peaks."""
    if origin is not None and np.shape(origin) != (2,):
        raise ValueError(
            f"origin has shape {np.shape(origin)}, needed is (y, x) in px; per position: origin_qy, origin_qx"
        )
    given = None if basis is None else np.asarray(basis, dtype=np.float64).reshape(-1, 2, 2)
    if given is not None and origin is not None:
        return [kernel.Basis(np.asarray(origin, dtype=np.float64), g) for g in given]
    sample = _sample(peaks)
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


def _sample(peaks: xr.Dataset) -> xr.Dataset:
    """Some patterns spread over the scan, in memory, reading few blocks of a lazy dataset."""
    names = ("peak_qy", "peak_qx", "peak_intensity", "origin_qy", "origin_qx")
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


def _with_coordinates_of(source: xr.Dataset, target: xr.Dataset) -> xr.Dataset:
    """`target` with the scan coordinates of `source`, units and all."""
    return target.assign_coords({dim: source[dim] for dim in schema.SCAN_DIMS if dim in source.coords})


def _check_whole(peaks: xr.Dataset) -> None:
    """Refuse a dataset whose peaks of one pattern lie in several blocks."""
    chunks = peaks["peak_qy"].chunks
    if chunks is not None and len(chunks[2]) > 1:
        raise ValueError(
            f"'peak' is split into {len(chunks[2])} chunks, but the peaks of one pattern must lie in one; "
            "rechunk first: peaks.chunk(peak=-1)"
        )


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

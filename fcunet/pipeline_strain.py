"""From labelled lattices to strain with error bars; import it from :mod:`fcunet.pipeline`.

Lazy in, lazy out. Only what one number for the whole scan needs is read at once: g1 and g2 for the reference
(:mod:`fcunet.pipeline_reference`). The arithmetic is in :mod:`fcunet.kernels.strain`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from . import schema
from .crystal import Crystal
from .kernels.ellipse import Ellipse, undistort_lattice
from .kernels.residuals import residual_ratio
from .kernels.strain import (
    COMPONENTS,
    Convention,
    Measure,
    deformation_gradient,
    principal_strains,
    rotate_frame,
    shared_dilation_left,
    strain_from_F,
    strain_std,
    with_shared_strain,
)
from .layout import check_whole_peaks
from .pipeline_reference import (
    ORIGIN,
    VECTORS,
    Reference,
    axis_angle,
    axis_in_lattice,
    find_grains,
    find_references,
    lattice_numbers,
    onto_crystal,
    peak_arrays,
    residuals_tell,
)

Array = NDArray[np.float64]

_PRINCIPAL = ("e_1", "e_2", "principal_angle", "dilation", "max_shear")


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
    peaks: xr.Dataset | None = None,
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
        ((g1_y, g1_x), (g2_y, g2_x)): any two vectors of a known lattice in px, taken as exact; of another
        crystal of the scan, on which they do not lie, the median.
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
    peaks : Dataset, optional
        What `lattice` was fitted to. Against a reference in the scan the error bars then hold only what the
        errors of a position and of its reference do not have in common, as the residuals of their peaks tell:
        `residual_ratio`, see :func:`fcunet.kernels.residuals.residual_ratio`. Without, position errors count
        as independent, and shared dilations as alike (:func:`fcunet.kernels.strain.shared_dilation_left`).

    Returns
    -------
    Dataset
        `e_xx, e_yy, e_xy` (tensor shear), `theta` (rad) (scan_y, scan_x) float64, each with `_std` float32;
        `valid`; `grain`, connected regions of valid positions; and `F` (.., row, column), detector frame. NaN
        where there is no lattice. With `peaks`, `residual_ratio` where the reference is in the scan.
        ``attrs["frame"]`` is ``"scan"``, ``"detector"`` or ``"crystal"``.

    Raises
    ------
    ValueError
        If the reference has no valid position, no area, or is another lattice; for unknown options; if
        `peaks` are of another scan.
    """
    schema.check_variables(lattice, schema.LATTICE, required=VECTORS, where="lattice")
    peaks = _checked_peaks(peaks, lattice)
    grain = find_grains(lattice)
    by_grain = isinstance(reference, str) and reference == "grain"
    member = grain if by_grain else lattice_numbers(lattice)
    references = find_references(lattice, reference, member, peaks)
    if among is not None and not by_grain:
        elsewhere = find_references(among, reference, lattice_numbers(among), peaks)
        references |= {n: elsewhere[n] for n in references if n in elsewhere and not elsewhere[n].instead}
    ellipse = Ellipse(
        float(lattice.attrs.get("ellipse_ratio", 1.0)), float(lattice.attrs.get("ellipse_angle_degree", 0.0))
    )
    asked_for = [number for number in references if not references[number].instead]
    first = references[min(asked_for)]
    measured_ref, description = first.g, first.origin
    flat = {}
    for number, own in references.items():
        g, of_g = undistort_lattice(own.g, own.covariance, ellipse)
        flat[number] = own._replace(g=g, covariance=of_g)
    indices = None
    if crystal is not None:
        scale = lattice.attrs.get("q_pixel") if q_pixel is None else q_pixel
        flat, indices, note = onto_crystal(flat, crystal, scale, zone=zone, miller=miller)
        measured_ref, description = flat[min(flat)].g, f"{note}, turned onto {description}"
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
        rotations = {number: axis_angle(along @ flat[number].g, bool(transpose)) for number in flat}
        frame, options["rotation_degree"] = "crystal", rotations[min(flat)]
    strain_from_F(np.eye(2), measure, convention)  # refuses unknown names before the first block is computed
    for one in flat.values():
        deformation_gradient(one.g, one.g)
    errors = [name for name in ("covariance", *schema.SHARED_DILATION) if name in lattice]
    arrays = [*(lattice[name] for name in VECTORS), member, *(lattice[name] for name in errors)]
    matrix = ["parameter", "parameter2"]
    core: list[list[str]] = [[]] * 5 + [matrix if name == "covariance" else [] for name in errors]
    measured = any(one.residuals is not None for one in flat.values())
    if measured and peaks is not None:
        of_peaks = peak_arrays(peaks, lattice.attrs)
        arrays += [*(lattice[name] for name in ORIGIN), *of_peaks]
        core += [[]] * len(ORIGIN) + [["peak"]] * len(of_peaks)
    lazy = next((a.chunksizes for a in arrays if a.chunks is not None), None)
    if lazy is not None:
        blocks = {d: lazy[d] for d in schema.SCAN_DIMS}
        arrays = [a.chunk(blocks) for a in arrays]
    results = xr.apply_ufunc(
        _strain_block,
        *arrays,
        kwargs={
            "errors": errors,
            "references": flat,
            "rotations": rotations,
            "options": options,
            "ellipse": ellipse,
            "floor": float(lattice.attrs.get("shared_dilation_floor", 0.0)),
            "fit_origin": bool(lattice.attrs.get("fit_origin", True)),
        },
        input_core_dims=core,
        output_core_dims=[[]] * 14 + [["row", "column"]],
        dask="parallelized",
        output_dtypes=[np.float64] * 4 + [np.float32] * 10 + [np.float64],
        dask_gufunc_kwargs={"output_sizes": {"row": 2, "column": 2}},
    )
    names = (*COMPONENTS, *(f"{name}_std" for name in COMPONENTS), *_PRINCIPAL, "residual_ratio")
    strain = xr.Dataset(
        {
            name: array.assign_attrs((schema.STRAIN | schema.TRUST)[name].attrs)
            for name, array in zip(names, results, strict=False)
        }
    )
    strain = strain.assign_coords(schema.scan_coords(lattice))
    if not measured:
        strain = strain.drop_vars("residual_ratio")
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
        **(
            {}
            if first.dilation is None or crystal is not None
            else {"shared_dilation_ref": list(first.dilation)}
        ),
    }
    return strain


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


def _checked_peaks(peaks: xr.Dataset | None, lattice: xr.Dataset) -> xr.Dataset | None:
    """Peaks that go with `lattice`; None where their residuals tell nothing."""
    if peaks is None or not residuals_tell(peaks, lattice.attrs):
        return None
    schema.check_variables(peaks, schema.PEAK_VARIABLES, required=["peak_qy", "peak_qx"], where="peaks")
    schema.check_variables(lattice, schema.LATTICE, required=ORIGIN, where="lattice")
    check_whole_peaks(peaks)
    sizes = [tuple(one.sizes[d] for d in schema.SCAN_DIMS) for one in (peaks, lattice)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the peaks are of a scan of {sizes[0]} positions and the lattices of {sizes[1]}; "
            "give the peaks that the lattices were fitted to"
        )
    return peaks


def _strain_block(
    *arrays: Array,
    errors: Sequence[str],
    references: dict[int, Reference],
    rotations: dict,
    options: dict,
    ellipse: Ellipse,
    floor: float,
    fit_origin: bool,
):
    """Vector components, number of the reference, `errors`, and where residuals count the origin and peaks.

    Out come the variables of the strain and F.
    """
    lead = arrays[0].shape
    measured = np.stack(arrays[:4], -1).astype(np.float64).reshape(*lead, 2, 2)
    given = dict(zip(errors, arrays[5:], strict=False))
    spots = arrays[5 + len(errors) :]
    g, covariance = undistort_lattice(measured, given.get("covariance"), ellipse)
    shared = given.get("shared_dilation_std")
    signed = given.get("shared_dilation", np.zeros(lead))
    member = np.asarray(arrays[4])
    F, turned = (np.full((*lead, 2, 2), np.nan) for _ in range(2))
    std = {f"{name}_std": np.full(lead, np.nan) for name in COMPONENTS}
    ratio = np.full(lead, np.nan)
    for number in np.unique(member):
        if number not in references:
            continue
        here = member == number
        reference = references[number]
        frame = {"rotation_degree": rotations[number], "transpose": options["transpose"]}
        F[here] = deformation_gradient(g[here], reference.g)
        turned[here] = rotate_frame(F[here], **frame)
        if reference.residuals is not None:
            oy, ox, qy, qx, *sigma = (np.asarray(v)[here] for v in spots)
            ratio[here] = residual_ratio(
                qy,
                qx,
                reference.residuals,
                g=measured[here],
                origin=np.stack([oy, ox], -1),
                sigma=sigma[0] if sigma else None,
                fit_origin=fit_origin,
            )
        if covariance is not None:
            alone = np.where(np.isfinite(ratio[here]), ratio[here], 1.0)[:, None, None] ** 2
            of_g, of_reference = covariance[here] * alone, reference.covariance
            if of_reference is not None:
                of_reference = of_reference * alone
            if shared is not None:
                left = shared_dilation_left(
                    shared[here], signed[here], reference.dilation, ratio[here], floor=floor
                )
                of_g = with_shared_strain(of_g, g[here], left, signed[here])
            own = strain_std(g[here], reference.g, of_g, reference_covariance=of_reference, **options | frame)
            for name, values in own.items():
                std[name][here] = values
    strain = strain_from_F(turned, options["measure"], options["convention"])
    e = strain_from_F(turned, options["measure"])  # principal strains are the same in every convention
    principal = principal_strains(e["e_xx"], e["e_yy"], e["e_xy"])
    rest = (v.astype(np.float32) for v in (*std.values(), *principal.values(), ratio))
    return *strain.values(), *rest, F

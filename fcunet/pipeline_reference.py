"""What strain is relative to: the reference lattices of a scan, and its grains."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from . import schema
from .cepstral import in_real_space
from .crystal import Crystal, read_crystal
from .kernels.grains import label_grains
from .kernels.residuals import SigmaCurve, SiteResiduals, mean_residuals
from .kernels.strain import COMPONENTS, deformation_gradient, strain_from_F

Array = NDArray[np.float64]

WORDS = ("median", "robust_median", "weighted_median", "grain")
VECTORS = schema.LATTICE_PARAMETERS[2:]  # g1_qy, g1_qx, g2_qy, g2_qx
ORIGIN = schema.LATTICE_PARAMETERS[:2]
_PART = 2**16  # positions at a time
_SAMPLE, _LEAST_SAMPLE = 2**11, 16  # positions whose peaks tell what is usual in all references, and in each
_SMALLEST_GRAIN = 4  # positions that a grain needs to be a reference for itself


class Reference(NamedTuple):
    """What the strain of some positions is relative to."""

    g: Array  # (2, 2) px, rows g1, g2
    covariance: Array | None  # (6, 6) px^2; None: exact
    dilation: tuple[float, float] | None  # medians of the shared one and its signed part; None: not measured
    origin: str  # in words
    used: NDArray[np.bool_] | None = None  # (scan_y, scan_x) positions it was taken from
    residuals: SiteResiduals | None = None  # of its peaks; None: not known
    instead: bool = False  # the median, for a crystal that is not where the reference was asked for


def lattice_numbers(lattice: xr.Dataset) -> xr.DataArray:
    """`lattice_id`, in memory; 1 where there is a lattice in a dataset without it."""
    if "lattice_id" in lattice:
        return lattice["lattice_id"].compute()
    return lattice["g1_qy"].notnull().compute().astype(np.uint8)


def find_grains(lattice: xr.Dataset) -> xr.DataArray:
    """Label of the grain of each position, in memory: see :func:`fcunet.kernels.grains.label_grains`."""
    number = lattice_numbers(lattice)
    g = np.stack([lattice[name].values for name in VECTORS], -1).reshape(*number.shape, 2, 2)
    F = np.full(g.shape, np.nan)
    for kind in np.unique(number.values[number.values > 0]):
        here = number.values == kind
        F[here] = np.linalg.inv(g[here]) @ np.nanmedian(g[here], axis=0)
    return number.copy(data=label_grains(F, number.values)).drop_attrs()


def find_references(
    lattice: xr.Dataset, reference: str | ArrayLike, member: xr.DataArray, peaks: xr.Dataset | None = None
) -> dict[int, Reference]:
    """Reference of each group of positions.

    Parameters
    ----------
    lattice : Dataset
        From :func:`fcunet.fit_lattice`.
    reference
        As for :func:`fcunet.compute_strain`.
    member : DataArray of int
        Group of each position: its lattice, or its grain; 0 for none.
    peaks : Dataset, optional
        What `lattice` was fitted to; read now, of a few thousand positions at most.

    Raises
    ------
    ValueError
        If no group has such a reference, or `reference` cannot be understood.
    """
    if isinstance(reference, str) and reference not in WORDS:
        raise ValueError(
            f"reference is {reference!r}; use 'median', a region (y0, y1, x0, x1), "
            "or vectors ((g1_y, g1_x), (g2_y, g2_x)) in px; the words are " + ", ".join(WORDS)
        )
    names = [n for n in (*VECTORS, "covariance", *schema.SHARED_DILATION) if n in lattice]
    names += list(ORIGIN) if peaks is not None else []
    whole = lattice[names].compute()
    numbers = [int(n) for n in np.unique(member.values) if n > 0]
    found: dict[int, Reference] = {}
    refused: list[ValueError] = []
    label = np.zeros(member.shape, dtype=np.int64)
    for number in numbers or [1]:
        group = member == number
        if isinstance(reference, str) and reference == "grain" and int(group.sum()) < _SMALLEST_GRAIN:
            continue
        own: Any = whole.where(group) if len(numbers) > 1 else whole
        own.attrs = dict(lattice.attrs)
        bases = lattice.attrs.get("bases_px", [])
        if number <= len(bases):
            own.attrs["basis_px"] = bases[number - 1]
        try:
            found[number] = _reference(own, reference)
        except ValueError as error:
            refused.append(error)
            if isinstance(reference, str) or len(refused) == max(len(numbers), 1):
                raise refused[0] from None
            found[number] = _reference(own, "median")._replace(instead=True)
        if found[number].used is not None:
            label[found[number].used] = number
            found[number] = found[number]._replace(used=None)
    if not found:
        raise ValueError(
            f"no grain has {_SMALLEST_GRAIN} positions, so none can be its own reference; "
            "use reference='median'"
        )
    return found if peaks is None else _with_residuals(found, label, whole, peaks)


def residuals_tell(peaks: xr.Dataset, attrs: dict[str, Any]) -> bool:
    """Whether residuals of these peaks say how alike patterns are, for lattices with these attributes.

    Not those of vectors of real space, nor of fits whose weights are not known any more.
    """
    by_intensity = str(attrs.get("weighting", "sigma")).startswith("intensity")
    return not (in_real_space(peaks) or by_intensity)


def peak_arrays(peaks: xr.Dataset, attrs: dict[str, Any]) -> list[xr.DataArray]:
    """`peak_qy`, `peak_qx`, and `peak_sigma` as the lattices with these attributes were fitted with it."""
    arrays = [peaks[name].reset_coords(drop=True) for name in ("peak_qy", "peak_qx")]
    if "peak_sigma" in peaks and attrs.get("weighting", "sigma") == "sigma":
        sigma = xr.apply_ufunc(
            corrected_sigma,
            peaks["peak_sigma"].reset_coords(drop=True),
            kwargs={"attrs": attrs},
            dask="parallelized",
            output_dtypes=[np.float64],
        )
        arrays.append(sigma)
    return arrays


def corrected_sigma(sigma: ArrayLike, attrs: dict[str, Any]) -> Array:
    """`peak_sigma`, corrected as the lattices with these attributes were fitted: `sigma_from_scan`."""
    knots, factors = (np.atleast_1d(attrs.get(name, [])) for name in ("sigma_stated_px", "sigma_factor"))
    if not knots.size:
        return np.asarray(sigma, dtype=np.float64)
    return SigmaCurve(knots.astype(float), factors.astype(float)).applied(sigma)


def _with_residuals(
    references: dict[int, Reference], label: NDArray[np.int64], lattice: xr.Dataset, peaks: xr.Dataset
) -> dict[int, Reference]:
    """The same references with the residuals of their peaks, at some of the positions of each.

    `label` (scan_y, scan_x) says of which reference a position is part, 0 of none; `lattice` is in memory.
    """
    numbers = [int(n) for n in np.unique(label) if n > 0]
    each = max(_SAMPLE // max(len(numbers), 1), _LEAST_SAMPLE)
    rng, places = np.random.default_rng(0), np.flatnonzero(label)
    places = places[np.argsort(rng.permutation(len(places)))]  # any order, the same every time
    places = places[np.argsort(label.flat[places], kind="stable")]
    starts = np.searchsorted(label.flat[places], numbers)
    chosen = [np.sort(part[:each]) for part in np.split(places, starts[1:])] if numbers else []
    if not chosen:
        return references
    at = np.unravel_index(np.concatenate(chosen), label.shape)
    index = {dim: ("position", lines) for dim, lines in zip(schema.SCAN_DIMS, at, strict=True)}
    spots = peaks[[name for name in schema.PEAK_VARIABLES if name in peaks]].isel(index).compute()
    values = [a.transpose("position", "peak").values for a in peak_arrays(spots, lattice.attrs)]
    origin, g = (np.stack([lattice[name].values[at] for name in names], -1) for names in (ORIGIN, VECTORS))
    found, start = dict(references), 0
    for number, part in zip(numbers, chosen, strict=True):
        here = slice(start, start + len(part))
        start += len(part)
        qy, qx, *sigma = (v[here] for v in values)
        residuals = mean_residuals(
            qy, qx, g=g[here].reshape(-1, 2, 2), origin=origin[here], sigma=sigma[0] if sigma else None
        )
        found[number] = references[number]._replace(residuals=residuals)
    return found


def _middle(g: Array, covariance: Array | None, word: str) -> tuple[Array, Array | None, NDArray[np.bool_]]:
    """Median of vectors (n, 4) in one of the senses of `word`, its covariance, and which were used.

    Medians are taken of stretch and rotation against a first guess, the median of the components: that alone
    would be no lattice of the crystal where it is turned here and there, but a sheared and shrunken one (by
    half an error bar at 2 degrees), and would depend on the axes.
    """
    first = np.nanmedian(g, axis=0).reshape(2, 2)
    parts = strain_from_F(deformation_gradient(g.reshape(-1, 2, 2), first), "biot")
    values = np.stack([parts[name] for name in COMPONENTS], -1)
    kept = np.asarray(np.isfinite(values).all(1))
    middle = np.median(values[kept], axis=0)
    if word == "robust_median":
        for _ in range(20):
            scale = 1.4826 * np.median(np.abs(values[kept] - middle), axis=0)
            with np.errstate(invalid="ignore"):
                near = (np.abs(values - middle) <= 3 * np.maximum(scale, 1e-12)).all(1)
            if not near.any() or (near == kept).all():
                break
            kept, middle = np.asarray(near), np.median(values[near], axis=0)
    n = int(kept.sum())
    if covariance is None:
        return _deformed(first, middle), None, kept
    factor = _median_variance(n)
    mean, variance = _mean_covariance(covariance, kept)
    if word == "weighted_median":
        weight = 1 / np.where(variance > 0, variance, np.nan)
        if np.isfinite(weight).all():
            middle = np.array([_weighted_median(values[kept, i], weight) for i in range(4)])
            mean = mean / (np.nanmean(variance) * np.nanmean(weight))
    return _deformed(first, middle), mean * factor, kept


def _median_variance(n: int) -> float:
    """Variance of the median of `n` normal values, in units of theirs, to 2 %: pi / 2 n for many."""
    return 1 / n if n < 3 else np.pi / 2 / (n + (np.pi / 2 - 1 if n % 2 else 1.3))


def _mean_covariance(covariance: Array, kept: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Mean (6, 6) of those that are kept and known, and the trace (n,) of g1 and g2 of those kept.

    Part by part: a scan of a million positions has 144 MB of covariances, and copies would be the most
    that the driver of a run ever holds.
    """
    total, known, traces = np.zeros((6, 6)), 0, []
    for start in range(0, len(covariance), _PART):
        own = covariance[start : start + _PART][kept[start : start + _PART]].astype(np.float64)
        traces.append(np.einsum("nii->n", own[:, 2:, 2:]))
        finite = np.isfinite(own).all((1, 2))
        total, known = total + own[finite].sum(axis=0), known + int(finite.sum())
    return total / max(known, 1), np.concatenate(traces) if traces else np.zeros(0)


def _deformed(g: Array, parts: Array) -> Array:
    """The lattice `g` of a crystal after stretch and rotation (e_xx, e_yy, e_xy, theta; Biot)."""
    e_xx, e_yy, e_xy, theta = parts
    c, s = np.cos(theta), np.sin(theta)
    stretch, back = np.array([[1 + e_yy, e_xy], [e_xy, 1 + e_xx]]), np.array([[c, -s], [s, c]])
    return g @ np.linalg.inv(stretch) @ back


def _weighted_median(values: Array, weight: Array) -> float:
    """The value with half of the weight on either side."""
    order = np.argsort(values)
    total = np.cumsum(weight[order]) - weight[order] / 2
    return float(np.interp(total[-1] / 2 + weight[order][-1] / 4, total, values[order]))


def _reference(lattice: xr.Dataset, reference: str | ArrayLike) -> Reference:
    """Reference of the lattices of one crystal."""
    if not isinstance(reference, str) and np.shape(reference) == (2, 2):
        vectors = np.asarray(reference, dtype=np.float64)
        basis = np.asarray(lattice.attrs.get("basis_px", vectors), dtype=np.float64)
        indices = np.rint(vectors @ np.linalg.inv(basis))  # the same lattice may be given by other vectors
        off = np.abs(vectors @ np.linalg.inv(basis) - indices).max()
        if not off < 0.25 or abs(np.linalg.det(indices)) < 0.5:
            raise ValueError(
                f"the reference {vectors.tolist()} px is not the lattice that was fitted, "
                f"{np.round(basis, 2).tolist()} px, strained; give vectors of that lattice, or fit with "
                "basis= the reference"
            )
        return Reference(np.linalg.inv(indices) @ vectors, None, None, "given vectors")
    part, where, region = lattice, "all positions", (slice(None), slice(None))
    if not isinstance(reference, str):
        if np.shape(reference) != (4,):
            raise ValueError(
                f"reference has shape {np.shape(reference)}; use (y0, y1, x0, x1), "
                "or ((g1_y, g1_x), (g2_y, g2_x))"
            )
        y0, y1, x0, x1 = (int(v) for v in np.asarray(reference))
        ny, nx = lattice.sizes["scan_y"], lattice.sizes["scan_x"]
        if not (0 <= y0 < y1 <= ny and 0 <= x0 < x1 <= nx):
            raise ValueError(
                f"reference region {y0}:{y1},{x0}:{x1} is not inside the scan of {ny} x {nx} positions"
            )
        region, where = (slice(y0, y1), slice(x0, x1)), f"region {y0}:{y1},{x0}:{x1}"
        part = lattice.isel(dict(zip(schema.SCAN_DIMS, region, strict=True)))
    g = np.stack([part[name].values for name in VECTORS], -1).reshape(-1, 4)
    n = int(np.isfinite(g).all(1).sum())
    if not n and not lattice["g1_qy"].notnull().any():
        raise ValueError(
            "no position of the scan has a lattice, so there is no strain; see what is found in some "
            "patterns, and with which settings more is: fcunet preview SCAN.zarr"
        )
    if not n:
        raise ValueError(
            f"no position of the reference ({where}) has a lattice; choose another region: "
            "reference=(y0, y1, x0, x1)"
        )
    covariance = None
    if "covariance" in part:
        covariance = part["covariance"].values.reshape(-1, 6, 6)
    middle, of_middle, used = _middle(g, covariance, reference if isinstance(reference, str) else "median")
    shared = None
    if "shared_dilation_std" in part:
        own = [np.nan_to_num(part[n].values.ravel()[used]) for n in schema.SHARED_DILATION if n in part]
        shared = float(np.median(own[0])), float(np.median(own[1])) if len(own) > 1 else 0.0
    name = reference.replace("_", " ") if isinstance(reference, str) and reference != "grain" else "median"
    text = f"{name} of {int(used.sum())} of {len(g)} positions, {where}"
    taken = np.zeros([lattice.sizes[d] for d in schema.SCAN_DIMS], dtype=bool)
    taken[region] = used.reshape(taken[region].shape)
    return Reference(middle, of_middle, shared, text, taken)


def onto_crystal(
    references: dict[int, Reference],
    crystal: str | Crystal,
    q_pixel: float | None,
    *,
    zone: ArrayLike | None = None,
    miller: ArrayLike | None = None,
) -> tuple[dict[int, Reference], NDArray[np.int64], str]:
    """Ideal lattices instead of measured references, turned onto them; indices of g1, g2, and a name.

    Parameters
    ----------
    references : dict
        Number: what was measured, on an undistorted detector.
    crystal, q_pixel, zone, miller
        As for :func:`fcunet.compute_strain`.

    Raises
    ------
    ValueError
        If the pixel size is not known, or the first lattice is not of this crystal; a later one that is not
        keeps its measured reference.
    """
    if q_pixel is None or not q_pixel > 0:
        raise ValueError(
            "absolute strain needs the pixel size of the detector, which these data do not have: measure it "
            "with fcunet calibrate --crystal, or give it in 1/angstrom: q_pixel=0.01"
        )
    known = read_crystal(crystal) if isinstance(crystal, str) else crystal
    ideal, indices = dict(references), None
    for number in sorted(references):
        try:
            vectors, own = known.lattice(references[number].g, q_pixel, zone=zone, miller=miller)
        except ValueError:
            if indices is None:
                raise
            continue
        ideal[number] = Reference(vectors, None, None, references[number].origin)
        indices = own if indices is None else indices
    assert indices is not None
    name = " and ".join("({} {} {})".format(*row) for row in indices)
    return ideal, indices, f"ideal {known.name}, g1 and g2 = {name}"


def axis_in_lattice(axis: str | Sequence[int], indices: NDArray[np.int64] | None) -> Array:
    """A direction as coefficients of g1 and g2.

    Raises
    ------
    ValueError
        If it is none, or not in the plane of the pattern.
    """
    words = {"g1": (1.0, 0.0), "g2": (0.0, 1.0)}
    if isinstance(axis, str) and axis in words:
        return np.array(words[axis])
    values = np.asarray([] if isinstance(axis, str) else axis, dtype=np.float64)
    if values.shape == (2,) and values.any():
        return values
    if values.shape != (3,) or not values.any():
        raise ValueError(
            f"axis is {axis!r}; use 'g1', 'g2', two integers (combination of g1 and g2), or with a crystal "
            "three, (h, k, l)"
        )
    if indices is None:
        raise ValueError(f"axis {list(axis)} are Miller indices, which need a crystal: crystal='F 5.4309'")
    mix, *_ = np.linalg.lstsq(indices.T.astype(np.float64), values, rcond=None)
    if np.abs(mix @ indices - values).max() > 1e-6:
        raise ValueError(
            f"axis {list(axis)} is not in the plane of the pattern, which (h k l) = {indices.tolist()} span"
        )
    return np.asarray(mix, dtype=np.float64)


def axis_angle(vector: Array, transpose: bool) -> float:
    """Direction of a vector (y, x) from +x towards +y, degrees, after rows and columns are exchanged."""
    y, x = vector[::-1] if transpose else vector
    return float(np.degrees(np.arctan2(y, x)))

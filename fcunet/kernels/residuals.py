"""What the residuals of a scan, peak less lattice site, tell of the errors of its peaks (NumPy).

How large they are. What a detector states of a peak holds on average over many crystals; in one crystal weak
disks may scatter by twice as much and strong ones by half, which shows in the residuals of many patterns
(:func:`fit_sigma_curve`). Weights and error bars are right only where that is known.

How much that differs from one pattern to the next. The scatter about one lattice has chance in it: 40 disks
tell their error to a tenth. Where the patterns of a scan differ by no more than chance, their common scatter
is the better figure for each (:func:`fit_scatter_prior`).

And how much two patterns have in common. A disk lit unevenly is found beside its middle, in every pattern
like this one by the same amount: no error of a strain between two such patterns, although it is one of each
lattice. Two patterns tell how alike they are by their residuals, reflection by reflection
(:func:`residual_ratio`). Their difference is the scatter that counts for the difference of the lattices;
noise, which is never alike, is part of it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import digamma, polygamma

from .lattice_fit import TUKEY
from .lattice_index import (
    DEFAULT_SPACING,
    invert_symmetric,
    nearest_site,
    normal_equations,
    residuals,
    right_sides,
    row_median,
    well_posed,
)

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

_PRIOR_DOF = 1.0  # keeps residuals that agree by chance, where there are few, from meaning too much
_FEWEST = 0.25  # of the patterns of a reference must show a reflection, else its mean is left out
_LEAST_CHI2 = 1e-12  # reduced; that of exact vectors has no logarithm
_CHUNK = 2**16  # peaks at a time: arrays of half a MB
_BIN, _MOST_BINS = 100, 8  # peaks that one factor of a curve is fitted to, at least; and how many of those
_FREE = 0.8  # a peak that decides the fit by more than this has no residual worth the name
_FAR = 12.0  # times the median: squared residuals beyond count as that
_FACTORS = (0.25, 4.0)  # what a scan may correct stated errors by
_FEWEST_PATTERNS = 8  # that say how much scatter differs between patterns
_PRIOR_DEGREES = np.geomspace(4.0, 1000.0, 100)  # that scatter in common may count for


class SigmaCurve(NamedTuple):
    """By what to multiply stated standard deviations; between the knots linear in both logarithms."""

    sigma: Array  # (m,) px, ascending
    factor: Array  # (m,)

    def applied(self, sigma: ArrayLike) -> Array:
        """Corrected standard deviations, of any shape; beyond the knots the factor is that of the last."""
        sigma = np.asarray(sigma, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = np.exp(np.interp(np.log(sigma), np.log(self.sigma), np.log(self.factor)))
        return np.asarray(sigma * factor)


class ScatterPrior(NamedTuple):
    """Scatter that the patterns of a scan have in common."""

    scale: float  # reduced chi^2; px^2 where no standard deviations were stated
    degrees: float  # of freedom that it counts for: many where patterns differ by chance alone


class SiteResiduals(NamedTuple):
    """Mean residuals of some patterns of one crystal."""

    hk: IntArray  # (m, 2) indices of the reflections
    mean: Array  # (m, 2) peak less site (y, x), px
    n_patterns: IntArray  # (m,) patterns it is the mean of


class _Members(NamedTuple):
    """Peaks (n, P) of n lattices, relative to their sites; weight 0 where a peak is not part of the fit."""

    h: Array  # whole numbers
    k: Array
    ry: Array
    rx: Array
    weight: Array


def fit_sigma_curve(
    qy: ArrayLike,
    qx: ArrayLike,
    sigma: ArrayLike,
    *,
    g: ArrayLike,
    origin: ArrayLike,
    curve: SigmaCurve | None = None,
    fit_origin: bool = True,
) -> SigmaCurve | None:
    """How far peaks scatter about their lattices, by what is stated of them.

    Parameters
    ----------
    qy, qx, sigma : array_like, shape (n, P)
        Peaks of n patterns and their stated standard deviations, px, NaN-padded.
    g, origin : array_like, shape (n, 2, 2) and (n, 2)
        Lattices that were fitted to them, px; NaN where there is none.
    curve : SigmaCurve, optional
        The correction that the lattices were fitted with. None: `sigma` as it is.
    fit_origin : bool
        The origin was fitted as well.

    Returns
    -------
    SigmaCurve or None
        Up to 8 knots with about as many peaks each, at least 100; None if there are fewer. Factors are root
        mean squares of the residuals over `sigma`, each peak's divided by sqrt(1 - h), with h the share by
        which it decides the fit (leverage; MacKinnon and White, doi:10.1016/0304-4076(85)90158-7).
    """
    stated = np.asarray(sigma, dtype=np.float64)
    used = stated if curve is None else curve.applied(stated)
    columns = []
    for members, rows in _members(qy, qx, g, origin, used):
        a = np.stack([np.ones_like(members.ry), members.h, members.k], -1)
        normal, _ = normal_equations(members.weight, members.h, members.k, members.ry, members.rx)
        solvable, inverse = _inverse(normal, fit_origin)
        share = members.weight * np.einsum("npi,nij,npj->np", a, inverse, a, optimize=True)
        kept = (members.weight > 0) & (share < _FREE) & solvable[:, None]
        own = stated[rows][kept]
        squared = (members.ry**2 + members.rx**2)[kept] / (2 * (1 - share[kept])) / own**2
        columns.append(np.stack([own, squared]))
    own, squared = np.concatenate(columns, axis=1) if columns else np.zeros((2, 0))
    bins = min(len(own) // _BIN, _MOST_BINS)
    if not bins:
        return None
    edges = np.unique(np.quantile(own, np.linspace(0, 1, bins + 1)))[1:-1]
    bin_of = np.searchsorted(edges, own, side="right")  # equal values are in one
    knots, factors = [], []
    for part in (bin_of == i for i in np.unique(bin_of)):
        values = np.minimum(squared[part], _FAR * np.median(squared[part]))
        knots.append(np.exp(np.log(own[part]).mean()))
        factors.append(np.clip(np.sqrt(values.mean()), *_FACTORS))
    return SigmaCurve(np.array(knots), np.array(factors))


def fit_scatter_prior(
    qy: ArrayLike,
    qx: ArrayLike,
    *,
    g: ArrayLike,
    origin: ArrayLike,
    sigma: ArrayLike | None = None,
    fit_origin: bool = True,
) -> ScatterPrior | None:
    """What is known of the scatter about a lattice before its pattern is seen, from patterns of its scan.

    Parameters
    ----------
    qy, qx : array_like, shape (n, P)
        Peaks of n patterns, px, NaN-padded.
    g, origin : array_like, shape (n, 2, 2) and (n, 2)
        Lattices that were fitted to them, px; NaN where there is none.
    sigma : array_like, shape (n, P), optional
        Standard deviations that weighted the fit, px. None: all alike.
    fit_origin : bool
        The origin was fitted as well.

    Returns
    -------
    ScatterPrior or None
        None with less than 8 lattices.

    Notes
    -----
    Reduced chi^2 of patterns with the same errors scatter by chance alone: their logarithms by trigamma(d/2),
    with d degrees of freedom. What they scatter more is how much the patterns differ: trigamma of half the
    degrees of freedom of the prior (Smyth, doi:10.2202/1544-6115.1027, section 6.2).
    """
    chi2, freedom = [], []
    for members, _ in _members(qy, qx, g, origin, sigma):
        (own,) = _chi2(members, (members.ry, members.rx), fit_origin=fit_origin)
        chi2.append(own.left)
        freedom.append(2.0 * (members.weight > 0).sum(1) - (6 if fit_origin else 4))
    left, d = (np.concatenate(v) if v else np.zeros(0) for v in (chi2, freedom))
    known = np.isfinite(left) & (d > 0)
    left, d = left[known], d[known]
    if len(d) < _FEWEST_PATTERNS:
        return None
    fall = digamma(d / 2) - np.log(d / 2)  # of the mean logarithm below that of the mean, by chance
    level = np.log(np.maximum(left / d, _LEAST_CHI2)) - fall
    variance, chance = level.var(ddof=1), polygamma(1, d / 2).mean()
    degrees = float(np.interp(chance - variance, -polygamma(1, _PRIOR_DEGREES / 2), _PRIOR_DEGREES))
    # residuals that are the same in all patterns scatter by less than chance
    mean = level.mean() + (1 - min(1.0, variance / chance)) * fall.mean()
    scale = float(np.exp(mean + digamma(degrees / 2) - np.log(degrees / 2)))
    if sigma is not None:
        limited = float(np.clip(scale, *np.square(_FACTORS)))
        if limited != scale:  # neither what was stated nor the common scatter is to be trusted much
            return ScatterPrior(limited, float(_PRIOR_DEGREES[0]))
    return ScatterPrior(scale, degrees)


def mean_residuals(
    qy: ArrayLike, qx: ArrayLike, *, g: ArrayLike, origin: ArrayLike, sigma: ArrayLike | None = None
) -> SiteResiduals | None:
    """Residuals of every reflection, averaged over patterns.

    Parameters
    ----------
    qy, qx : array_like, shape (n, P)
        Peaks of n patterns, px, NaN-padded.
    g, origin : array_like, shape (n, 2, 2) and (n, 2)
        Their lattices, px; NaN where there is none.
    sigma : array_like, shape (n, P), optional
        Standard deviations, px: the mean is weighted by their inverse squares. None: all alike.

    Returns
    -------
    SiteResiduals or None
        Of the reflections that a quarter of the patterns show; None if there are none.
    """
    lattices, columns = 0, []
    for members, rows in _members(qy, qx, g, origin, sigma):
        inside = members.weight > 0
        lattices += len(rows)
        columns.append(np.stack([v[inside] for v in members]))  # (5, k): h, k, ry, rx, weight
    found = np.concatenate(columns, axis=1) if columns else np.zeros((5, 0))
    if not found.size:
        return None
    low = found[:2].min(1).astype(np.int64)
    h, k = found[:2].astype(np.int64) - low[:, None]
    shape = (int(h.max()) + 1, int(k.max()) + 1)
    place, size = h * shape[1] + k, shape[0] * shape[1]
    count = np.bincount(place, minlength=size)
    often = np.flatnonzero(count >= max(1.0, _FEWEST * lattices))
    if not len(often):
        return None
    total, *sums = (np.bincount(place, found[4] * r, size)[often] for r in (1.0, found[2], found[3]))
    hk = np.stack(np.unravel_index(often, shape), -1) + low
    return SiteResiduals(hk, np.stack(sums, -1) / total[:, None], count[often])


def residual_ratio(
    qy: ArrayLike,
    qx: ArrayLike,
    reference: SiteResiduals,
    *,
    g: ArrayLike,
    origin: ArrayLike,
    sigma: ArrayLike | None = None,
    fit_origin: bool = True,
) -> Array:
    """Scatter of peaks about those of a reference, in units of their scatter about the lattice.

    Parameters
    ----------
    qy, qx, g, origin, sigma
        As for :func:`mean_residuals`, of n patterns.
    reference : SiteResiduals
        From :func:`mean_residuals`.
    fit_origin : bool
        The origins were fitted as well.

    Returns
    -------
    ndarray, shape (n,)
        By what the standard deviations of a lattice, and of the reference, are to be multiplied for their
        difference: next to 0 where the disks lie beside their sites alike, 1 where nothing is in common, more
        where the reference is the steadier of the two. NaN without a lattice, and where too few reflections
        are in both to tell.

    Notes
    -----
    With chi^2 of the residuals over the reflections that both have, and chi_d^2 of their differences, less
    the n-th part that the mean of n patterns adds, it is ``sqrt((1 + chi_d^2) / (1 + chi^2))``. A pattern
    that shows other reflections than the reference, or weighs them differently, mistakes part of what the
    reference leaves for a lattice: that part, per degree of freedom, is added to chi_d^2.
    """
    ratio = np.full(np.shape(qy)[0], np.nan)
    for members, rows in _members(qy, qx, g, origin, sigma):
        mean_y, mean_x, count = _look_up(reference, members)
        both = count > 0
        unknowns = 6.0 if fit_origin else 4.0
        degrees = 2.0 * both.sum(1) - unknowns
        share = np.sqrt(count / (count + 1))
        own, mean, difference = _chi2(
            members._replace(weight=members.weight * both),
            (members.ry, members.rx),
            (mean_y, mean_x),
            (share * (members.ry - mean_y), share * (members.rx - mean_x)),
            fit_origin=fit_origin,
        )
        whole, left = own.left, difference.left + mean.taken * degrees / unknowns
        with np.errstate(divide="ignore", invalid="ignore"):
            if sigma is None:  # the scatter itself says how large an error is
                whole, left = degrees, degrees * left / whole
            found = np.sqrt((_PRIOR_DOF + left) / (_PRIOR_DOF + whole))
        ratio[rows] = np.where(degrees > 0, found, np.nan)
    return ratio


def _members(
    qy: ArrayLike, qx: ArrayLike, g: ArrayLike, origin: ArrayLike, sigma: ArrayLike | None
) -> Iterator[tuple[_Members, IntArray]]:
    """Peaks of the patterns that have a lattice, and which those are, some at a time."""
    qy, qx, g, origin = (np.asarray(v, dtype=np.float64) for v in (qy, qx, g, origin))
    known = np.flatnonzero(np.isfinite(g).all((1, 2)) & np.isfinite(origin).all(1))
    step = max(1, _CHUNK // max(qy.shape[1], 1))
    for start in range(0, len(known), step):
        rows = known[start : start + step]
        y, x, own_g, own_origin = qy[rows], qx[rows], g[rows], origin[rows]
        near = np.isfinite(y) & np.isfinite(x)
        variance = np.ones_like(y) if sigma is None else np.asarray(sigma, np.float64)[rows] ** 2
        near &= np.isfinite(variance) & (variance > 0)
        y, x = np.where(near, y, own_origin[:, :1]), np.where(near, x, own_origin[:, 1:])
        h, k, distance2 = nearest_site(y, x, own_origin, own_g)
        near &= distance2 <= DEFAULT_SPACING**2 * (own_g**2).sum(-1).min(-1)[:, None]
        ry, rx = (r * near for r in residuals(y, x, h, k, own_origin, own_g))
        weight = near / np.where(near, variance, 1.0)
        squared = weight * (ry**2 + rx**2)
        scale = row_median(squared, near) / (2 * np.log(2))
        if sigma is not None:
            scale = np.maximum(scale, 1.0)
        weight = weight * (squared <= TUKEY**2 * np.nan_to_num(scale)[:, None])
        yield _Members(h, k, ry, rx, weight), rows


def _look_up(reference: SiteResiduals, members: _Members) -> tuple[Array, Array, Array]:
    """Mean residual (y, x) of each peak's reflection, and of how many patterns, 0 if none; (n, P) each."""
    low, high = reference.hk.min(0), reference.hk.max(0)
    rows, columns = high - low + 1
    table = np.zeros((3, rows * columns + 1))  # the last is that of no reflection
    at = (reference.hk - low) @ (columns, 1)
    table[:, at] = np.vstack([reference.mean.T, reference.n_patterns])
    inside = (members.weight > 0) & (members.h >= low[0]) & (members.h <= high[0])
    inside &= (members.k >= low[1]) & (members.k <= high[1])
    place = np.where(inside, (members.h - low[0]) * columns + (members.k - low[1]), rows * columns)
    mean_y, mean_x, count = table[:, place.astype(np.intp)]
    return mean_y, mean_x, count


class _Chi2(NamedTuple):
    """Weighted sums of squares (n,), NaN where the peaks span no lattice."""

    left: Array  # that no lattice can take up
    taken: Array  # that one can


def _inverse(normal: Array, fit_origin: bool) -> tuple[NDArray[np.bool_], Array]:
    """Where the peaks span a lattice, and the inverse of the normal equations (n, 3, 3), there."""
    solvable = well_posed(normal)
    normal = np.where(solvable[:, None, None], normal, np.eye(3))
    if not fit_origin:
        normal[:, 0, 1:] = normal[:, 1:, 0] = 0
    inverse = invert_symmetric(normal)
    if not fit_origin:
        inverse[:, 0, 0] = 0
    return solvable, inverse


def _chi2(members: _Members, *vectors: tuple[Array, Array], fit_origin: bool) -> list[_Chi2]:
    """Of vectors (y, x), (n, P) each, at the sites of the peaks."""
    weight, h, k = members.weight, members.h, members.k
    normal, _ = normal_equations(weight, h, k, *vectors[0])
    solvable, inverse = _inverse(normal, fit_origin)
    inverse[~solvable] = np.nan
    rows, out = (weight, weight * h, weight * k), []
    for y, x in vectors:
        right = right_sides(rows, y, x)
        taken = np.einsum("nai,nab,nbi->n", right, inverse, right, optimize=True)
        whole = np.einsum("np,np,np->n", weight, y, y) + np.einsum("np,np,np->n", weight, x, x)
        out.append(_Chi2(np.maximum(whole - taken, 0.0), taken))
    return out

"""Lattices from Bragg peaks: index and fit, many positions at once (NumPy, no loop over positions).

Positions and vectors are (y, x) in detector pixels. A lattice `g` has rows g1, g2; a peak with indices (h, k)
lies at ``origin + h * g1 + k * g2``. Peaks are padded with NaN along the last axis, in any order. The vectors
common to a scan are found in :mod:`fcunet.kernels.lattice`, which also exports what is here.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Weighting = Literal["sigma", "uniform", "intensity", "intensity_squared"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

DEFAULT_SPACING = 0.3  # max_peak_spacing in units of the shortest lattice vector
_MIN_EVIDENCE = 12.0  # smallest gain in log-likelihood of a lattice over unrelated peaks
_CHUNK = 1 << 17  # peaks worked on at once: about 20 arrays of 1 MB
_GROWTH = 1.7  # each round of indexing reaches this much further out
_RIDGE = 0.5  # pull towards the given lattice while indexing, in peaks
_TUKEY = 4.685  # cut of the biweight in standard deviations: 95 % efficiency per axis
_MIN_SIGMA, _MIN_SCALE = 1e-3, 0.01  # px; no peak is better known than that, no scatter taken to be smaller
_PRIOR_DOF = 4.0  # weight of the stated sigmas against the scatter of the residuals, in degrees of freedom


class LatticeFit(NamedTuple):
    """One lattice per position; the leading shape is that of the peaks without their last axis."""

    origin: Array  # (..., 2) px
    g: Array  # (..., 2, 2) px, rows g1, g2
    covariance: Array  # (..., 6, 6) px^2 of (origin_y, origin_x, g1_y, g1_x, g2_y, g2_x)
    fit_error: Array  # (...) px, rms distance of the fitted peaks from their sites
    n_indexed: IntArray  # (...) peaks in the fit, 0 where there is no lattice


def index_peaks(
    qy: ArrayLike, qx: ArrayLike, *, g: ArrayLike, origin: ArrayLike, max_peak_spacing: float | None = None
) -> tuple[IntArray, IntArray, BoolArray]:
    """Integer indices of the lattice site nearest to every peak, at most one peak per site.

    Parameters
    ----------
    qy, qx : array_like, shape (..., P)
        Peak positions in px, padded with NaN.
    g : array_like, shape (2, 2) or (..., 2, 2)
        Rows g1, g2 in px.
    origin : array_like, shape (2,) or (..., 2)
        Position of the site (0, 0) in px.
    max_peak_spacing : float, optional
        Largest distance of a peak from its site in px. None: 0.3 times the shortest lattice vector.

    Returns
    -------
    h, k : ndarray of int64, shape (..., P)
        Indices; 0 where not indexed.
    indexed : ndarray of bool, shape (..., P)
        True for peaks close enough to a site, and closest to it of all peaks.
    """
    qy, qx = _peaks(qy, qx)
    lead, shape = qy.shape[:-1], (-1, qy.shape[-1])
    g, origin = check_basis(g), _broadcast(origin, (*lead, 2), "origin").reshape(-1, 2)
    spacing = _spacing(max_peak_spacing, g)
    g = np.broadcast_to(g, (*lead, 2, 2)).reshape(-1, 2, 2)
    y, x = qy.reshape(shape) - origin[:, :1], qx.reshape(shape) - origin[:, 1:]
    present = np.isfinite(y) & np.isfinite(x)
    y, x = np.where(present, y, 0), np.where(present, x, 0)
    h, k, distance = _nearest_site(y, x, np.zeros((len(y), 2)), g)
    indexed = _one_per_site(h, k, distance, present & (distance <= spacing**2))
    h, k = (np.where(indexed, i, 0).astype(np.int64).reshape(qy.shape) for i in (h, k))
    return h, k, indexed.reshape(qy.shape)


def fit_lattice(
    qy: ArrayLike,
    qx: ArrayLike,
    *,
    g: ArrayLike,
    origin: ArrayLike,
    sigma: ArrayLike | None = None,
    intensity: ArrayLike | None = None,
    weighting: Weighting = "sigma",
    robust: bool = True,
    max_peak_spacing: float | None = None,
    min_num_peaks: int = 5,
) -> LatticeFit:
    """Fit origin, g1 and g2 to the peaks of every position.

    Parameters
    ----------
    qy, qx : array_like, shape (..., P)
        Peak positions in px, padded with NaN, in any order.
    g : array_like, shape (2, 2)
        Approximate lattice in px. Positions strained by 3 % and turned by 3 degrees from it are indexed
        safely.
    origin : array_like, shape (2,) or (..., 2)
        Approximate position of the direct beam in px, to half a lattice vector; NaN takes the median of the
        rest.
    sigma : array_like, shape (..., P), optional
        Standard deviation of each position per axis, px. A missing one is replaced by the median of its
        pattern; with none at all, the pattern is fitted with uniform weights.
    intensity : array_like, shape (..., P), optional
        Needed by the two weightings of that name; steadies the start of every other.
    weighting : str
        Weights of the squared residuals: ``"sigma"`` 1 / sigma^2, ``"uniform"``, ``"intensity"`` (as
        quantem), ``"intensity_squared"`` (as py4DSTEM, which multiplies the rows by intensity).
    robust : bool
        Down-weight outliers by iterated Tukey weights, then leave them out; see Notes.
    max_peak_spacing : float, optional
        Largest distance of a peak from its site, px. None: 0.3 times the shortest lattice vector.
    min_num_peaks : int
        Positions with fewer fitted peaks have no lattice. At least 3.

    Returns
    -------
    LatticeFit
        NaN, and `n_indexed` 0, where there are too few peaks, all on one line, or no better described by a
        lattice than by chance (a gain of less than 12 in log-likelihood).

    Raises
    ------
    ValueError
        For shapes that do not fit, parallel vectors, an unknown weighting, or missing intensities.

    Notes
    -----
    The lattice is grown from the direct beam outwards: peaks near it are indexed with the given lattice, the
    lattice is refitted, and the reach extended, so that high orders are counted right although strain moves
    them by more than half a vector. Then all peaks are indexed, one per site, and the weighted least-squares
    fit is iterated with Tukey's biweight (cut 4.685 scaled standard deviations; the scale is the median
    residual, for ``"sigma"`` at least 1, so that a peak within its own error bar is never lost; the cut is
    widened by sqrt(n / (n - 3)) for n peaks, whose residuals are no fair sample when they are few). A last
    fit takes the peaks inside the cut at full weight.

    Covariance: for ``"sigma"`` inv(A^T W A), scaled by (4 + chi^2) / (4 + degrees of freedom): with few peaks
    the stated sigmas count, with many the scatter actually seen. For ``"uniform"`` scaled by the residual
    variance; for the intensity weightings, which are no inverse variances, the heteroscedasticity-consistent
    estimate HC2 (MacKinnon and White, J. Econometrics 29, 305 (1985), doi:10.1016/0304-4076(85)90158-7). NaN
    if there are no degrees of freedom.
    """
    qy, qx = _peaks(qy, qx)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
    if min_num_peaks < 3:
        raise ValueError(
            f"min_num_peaks is {min_num_peaks}, but a lattice has six unknowns: at least 3 peaks"
        )
    if weighting.startswith("intensity") and intensity is None:
        raise ValueError(f"weighting={weighting!r} needs the intensities of the peaks: pass intensity=")
    given = check_basis(g)
    if given.shape != (2, 2):
        raise ValueError(
            f"g has shape {given.shape}, needed is (2, 2): one approximate lattice for all positions"
        )
    reduced, mix = reduce_basis(given)  # reduced = mix @ given
    spacing = _spacing(max_peak_spacing, reduced)

    lead, n_slots = qy.shape[:-1], qy.shape[-1]
    n = int(np.prod(lead, dtype=np.int64))
    qy, qx = qy.reshape(n, n_slots), qx.reshape(n, n_slots)
    start = _broadcast(origin, (*lead, 2), "origin").reshape(n, 2)
    start = np.where(np.isfinite(start), start, _median_origin(start))
    if sigma is not None:
        sigma = _broadcast(sigma, (*lead, n_slots), "sigma").reshape(n, n_slots)
    if intensity is not None:
        intensity = _broadcast(intensity, (*lead, n_slots), "intensity").reshape(n, n_slots)

    fit = LatticeFit(
        np.full((n, 2), np.nan),
        np.full((n, 2, 2), np.nan),
        np.full((n, 6, 6), np.nan),
        np.full(n, np.nan),
        np.zeros(n, np.int64),
    )
    for first in range(0, n, max(1, _CHUNK // max(n_slots, 1))):
        part = slice(first, first + max(1, _CHUNK // max(n_slots, 1)))
        block = _Block(
            qy[part],
            qx[part],
            start[part],
            None if sigma is None else sigma[part],
            None if intensity is None else intensity[part],
            weighting,
        )
        block.grow(reduced)
        block.refine(reduced, spacing, robust)
        block.store(fit, part, reduced, mix, min_num_peaks)
    return LatticeFit(
        fit.origin.reshape(*lead, 2),
        fit.g.reshape(*lead, 2, 2),
        fit.covariance.reshape(*lead, 6, 6),
        fit.fit_error.reshape(lead),
        fit.n_indexed.reshape(lead),
    )


def reduce_basis(g: ArrayLike) -> tuple[Array, Array]:
    """Shortest vectors of a lattice (Lagrange-Gauss reduction).

    Parameters
    ----------
    g : array_like, shape (2, 2)
        Rows g1, g2, any unit.

    Returns
    -------
    reduced : ndarray, shape (2, 2)
        Rows ordered by length; the second is at most half of the first along it.
    mix : ndarray, shape (2, 2)
        Integers, determinant 1 or -1, with ``reduced = mix @ g``.
    """
    reduced, mix = np.array(g, dtype=np.float64), np.eye(2)
    for _ in range(1000):
        if reduced[0] @ reduced[0] > reduced[1] @ reduced[1]:
            reduced, mix = reduced[::-1].copy(), mix[::-1].copy()
        times = np.rint(reduced[1] @ reduced[0] / (reduced[0] @ reduced[0]))
        if times == 0:
            break
        reduced[1] -= times * reduced[0]
        mix[1] -= times * mix[0]
    return reduced, mix


class _Block:
    """Peaks of some positions on their way to a fit: arrays (n, P), relative to the origin guess."""

    def __init__(self, qy, qx, start, sigma, intensity, weighting):
        self.start = start
        present = np.isfinite(qy) & np.isfinite(qx)
        if weighting.startswith("intensity"):
            present &= intensity > 0
        self.present = present
        self.y = np.where(present, qy - start[:, :1], 0.0)
        self.x = np.where(present, qx - start[:, 1:], 0.0)
        self.radius2 = self.y**2 + self.x**2
        self.weighting = weighting
        self.has_sigma = np.zeros(len(qy), bool)
        self.sigma = np.ones_like(self.y)
        self.weight = present.astype(np.float64)
        if weighting == "sigma" and sigma is not None:
            known = present & (sigma > 0) & np.isfinite(sigma)
            self.has_sigma = known.any(1)
            typical = _row_median(sigma, known)
            self.sigma = np.where(known, sigma, np.where(self.has_sigma, typical, 1.0)[:, None])
            self.sigma = np.maximum(self.sigma, _MIN_SIGMA)
            self.weight = present / self.sigma**2
        elif weighting.startswith("intensity"):
            relative = (
                np.where(present, intensity, 0)
                / np.maximum(np.max(intensity, axis=1, where=present, initial=0), 1e-300)[:, None]
            )
            self.weight = relative if weighting == "intensity" else relative**2
        self.brightness = present.astype(np.float64)
        if (
            intensity is not None
        ):  # weak strays and weak forbidden spots shall not decide where the lattice starts
            bright = present & (intensity > 0)
            level = np.where(bright.any(1), _row_median(intensity, bright), 1.0)[:, None]
            self.brightness = np.where(bright, np.minimum(intensity / level, 1.0), 0.0)

    def grow(self, g_start):
        """Index from the origin outwards; leaves `origin` (relative) and `g` per position."""
        n, longest = len(self.y), np.sqrt((g_start**2).sum(1).max())
        shortest = np.sqrt((g_start**2).sum(1).min())
        near = self.brightness * (self.radius2 <= (2.2 * longest) ** 2)
        h, k = _fractional(self.y, self.x, np.linalg.inv(g_start))
        # mean phase of the peaks around the guess = where the nearest site lies
        phase = [np.angle((near * np.exp(2j * np.pi * i)).sum(1)) / (2 * np.pi) for i in (h, k)]
        self.origin = seed = np.stack(phase, 1) @ g_start
        self.g = np.broadcast_to(g_start, (n, 2, 2))
        reach, farthest = 1.5 * longest, np.sqrt(self.radius2.max(initial=0.0))
        while True:
            h, k, distance2 = _nearest_site(self.y, self.x, self.origin, self.g)
            soft = np.maximum(1 - distance2 / (DEFAULT_SPACING * shortest) ** 2, 0) ** 2
            weight = soft * self.present * (self.radius2 <= reach**2)
            ry, rx = _residuals(self.y, self.x, h, k, seed, g_start)
            normal, right = _normal_equations(weight, h, k, ry, rx)
            step = np.linalg.solve(normal + _RIDGE * np.eye(3), right)
            self.origin, self.g = seed + step[:, 0], g_start + step[:, 1:]
            if reach > farthest:
                return
            reach *= _GROWTH

    def refine(self, g_start, spacing, robust):
        """Robust weighted fit of all peaks; leaves `used`, `h`, `k` and the last residuals."""
        for rounds in (4, 4) if robust else (1, 1):
            self.h, self.k, distance2 = _nearest_site(self.y, self.x, self.origin, self.g)
            self.used = _one_per_site(self.h, self.k, distance2, self.present & (distance2 <= spacing**2))
            if robust:
                for _ in range(rounds):
                    scaled = self._scaled_residuals()
                    self._solve(self.weight * np.maximum(1 - scaled, 0) ** 2 * self.used)
            else:
                self._solve(self.weight * self.used)
        if robust:
            self.used &= self._scaled_residuals() < 1
        for _ in range(2):  # the second removes the rounding error of the first
            self._solve(self.weight * self.used)

    def _scaled_residuals(self):
        """Squared residuals in units of the Tukey cut."""
        ry, rx = _residuals(self.y, self.x, self.h, self.k, self.origin, self.g)
        squared = (ry**2 + rx**2) / self.sigma**2
        count = self.used.sum(1)
        # median of chi-squared with two degrees of freedom: 2 ln 2; three of `count` points are absorbed by
        # the fit
        share = np.maximum(count, 1) / np.maximum(count - 3, 0.5)
        scale2 = _row_median(squared, self.used) / (2 * np.log(2)) * share
        floor = np.where(self.has_sigma, 1.0, _MIN_SCALE**2)
        return squared / (_TUKEY**2 * np.maximum(np.nan_to_num(scale2), floor) * share)[:, None]

    def _solve(self, weight):
        """One weighted least-squares step from the present lattice, none where it has no solution."""
        ry, rx = _residuals(self.y, self.x, self.h, self.k, self.origin, self.g)
        normal, right = _normal_equations(weight, self.h, self.k, ry, rx)
        self.solvable = _well_posed(normal)
        normal[~self.solvable], right[~self.solvable] = np.eye(3), 0
        total = normal[:, :1, :1].copy()  # robust weights can be all but zero
        self.inverse = np.linalg.inv(normal / total) / total
        step = self.inverse @ right
        self.origin, self.g = self.origin + step[:, 0], self.g + step[:, 1:]

    def store(self, fit, part, g_start, mix, min_num_peaks):
        """Write what was found into `fit`, in the basis the caller gave."""
        ry, rx = _residuals(self.y, self.x, self.h, self.k, self.origin, self.g)
        squared = (ry**2 + rx**2) * self.used
        count = self.used.sum(1)
        error = np.sqrt(squared.sum(1) / np.maximum(count, 1))
        same_hand = np.linalg.det(self.g) * np.linalg.det(g_start) > 0
        spread, _ = _normal_equations(self.used.astype(np.float64), self.h, self.k, ry, rx)
        found = self.solvable & _well_posed(spread) & (count >= min_num_peaks) & same_hand
        found &= (count <= 3) | (self._evidence(squared.sum(1), count, g_start) > _MIN_EVIDENCE)

        back = np.eye(3)
        back[1:, 1:] = np.linalg.inv(mix)  # given = inv(mix) @ reduced
        covariance = np.einsum("nab,ij->naibj", back @ self._covariance(squared, count) @ back.T, np.eye(2))
        fit.origin[part] = np.where(found[:, None], self.origin + self.start, np.nan)
        fit.g[part] = np.where(found[:, None, None], back[1:, 1:] @ self.g, np.nan)
        fit.covariance[part] = np.where(found[:, None, None], covariance.reshape(-1, 6, 6), np.nan)
        fit.fit_error[part] = np.where(found, error, np.nan)
        fit.n_indexed[part] = np.where(found, count, 0)

    def _evidence(self, chi2, count, g_start):
        """Gain in log-likelihood of `count` peaks at lattice sites over all peaks anywhere in the cell."""
        area = np.abs(np.linalg.det(g_start))
        variance = np.maximum(chi2 / np.maximum(2 * count - 6, 1), 1e-6 * area)  # per axis
        rest = self.present.sum(1) - count
        share = count / np.maximum(count + rest, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside = count * (np.log(share * area / (2 * np.pi * variance)) - 1)
            return inside + np.where(rest > 0, rest * np.log1p(-share), 0)

    def _covariance(self, squared, count):
        """Covariance (n, 3, 3) of one axis of (origin, g1, g2)."""
        dof = 2.0 * count - 6
        if self.weighting.startswith("intensity"):
            a = np.stack([np.ones_like(self.h), self.h, self.k], -1)
            leverage = self.weight * np.einsum("npa,nab,npb->np", a, self.inverse, a, optimize=True)
            variance = squared / 2 / np.maximum(1 - leverage, 0.01)
            middle, _ = _normal_equations(
                self.weight**2 * variance * self.used, self.h, self.k, self.y, self.x
            )
            covariance = self.inverse @ middle @ self.inverse
            return np.where((dof > 0)[:, None, None], covariance, np.nan)
        chi2 = (squared / self.sigma**2).sum(1)
        prior = np.where(self.has_sigma, _PRIOR_DOF, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where(prior + dof > 0, (prior + chi2) / (prior + dof), np.nan)
        return self.inverse * scale[:, None, None]


def _fractional(y, x, inverse):
    """Real-valued indices of positions; `inverse` is inv(g), (2, 2) or (n, 2, 2)."""
    inverse = inverse[..., None]
    return (
        y * inverse[..., 0, 0, :] + x * inverse[..., 1, 0, :],
        y * inverse[..., 0, 1, :] + x * inverse[..., 1, 1, :],
    )


def _nearest_site(y, x, origin, g):
    """Indices (as floats) of the nearest sites, and squared distances from them; g reduced, (n, 2, 2)."""
    y, x = y - origin[:, :1], x - origin[:, 1:]
    h, k = (np.rint(i) for i in _fractional(y, x, _inverse(g)))
    ry = y - h * g[:, 0, 0, None] - k * g[:, 1, 0, None]
    rx = x - h * g[:, 0, 1, None] - k * g[:, 1, 1, None]
    return h, k, ry**2 + rx**2


def _inverse(g):
    """inv(g) for g (n, 2, 2), zero where g is singular."""
    determinant = g[:, 0, 0] * g[:, 1, 1] - g[:, 0, 1] * g[:, 1, 0]
    singular = np.abs(determinant) <= 1e-9 * (g**2).sum((1, 2))
    scale = np.where(singular, 0, 1 / np.where(singular, 1, determinant))
    adjugate = np.stack([g[:, 1, 1], -g[:, 0, 1], -g[:, 1, 0], g[:, 0, 0]], -1)
    return (adjugate * scale[:, None]).reshape(-1, 2, 2)


def _one_per_site(h, k, distance2, candidates):
    """`candidates` without those that have a closer one at the same site."""
    if not candidates.size:
        return candidates
    h_low, k_low = h.min(), k.min()
    width = k.max() - k_low + 1
    site = (h - h_low) * width + (k - k_low)
    last = (h.max() - h_low + 1) * width
    closeness = distance2 / (distance2.max(initial=0, where=candidates) * (1 + 1e-9) + 1e-300)
    # one key sorts by site, then by distance; what is not indexed goes last
    order = np.argsort(np.where(candidates, site + closeness, last), axis=1, kind="stable")
    ordered = np.take_along_axis(np.where(candidates, site, last), order, 1)
    first = np.ones_like(candidates)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    keep = np.empty_like(candidates)
    np.put_along_axis(keep, order, first, 1)
    return keep & candidates


def _residuals(y, x, h, k, origin, g):
    """Peak minus site, g (2, 2) or (n, 2, 2)."""
    g = g[..., None]
    return (
        y - origin[:, :1] - h * g[..., 0, 0, :] - k * g[..., 1, 0, :],
        x - origin[:, 1:] - h * g[..., 0, 1, :] - k * g[..., 1, 1, :],
    )


def _normal_equations(w, h, k, ry, rx):
    """A^T W A (n, 3, 3) and A^T W r (n, 3, 2) for rows A = (1, h, k)."""

    def total(a, b):
        return np.einsum("np,np->n", a, b)

    wh, wk = w * h, w * k
    s, sh, sk, hh, hk, kk = w.sum(1), wh.sum(1), wk.sum(1), total(wh, h), total(wh, k), total(wk, k)
    normal = np.stack([s, sh, sk, sh, hh, hk, sk, hk, kk], -1).reshape(-1, 3, 3)
    right = np.stack([total(a, r) for a in (w, wh, wk) for r in (ry, rx)], -1).reshape(-1, 3, 2)
    return normal, right


def _well_posed(normal):
    """True where the sites span the plane: neither too few nor all on one line."""
    total = normal[:, 0, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = normal[:, 0, 1:] / total[:, None]
        moments = normal[:, 1:, 1:] / total[:, None, None] - mean[:, :, None] * mean[:, None, :]
    trace = moments[:, 0, 0] + moments[:, 1, 1]
    determinant = moments[:, 0, 0] * moments[:, 1, 1] - moments[:, 0, 1] ** 2
    # smaller spreads and areas than these are rounding errors, not sites
    return (trace > 1e-10 * (1 + (mean**2).sum(1))) & (determinant > 1e-9 * trace**2)


def _row_median(values, where):
    """Median of each row over `where`; NaN if there is none."""
    count = where.sum(1)
    ordered = np.sort(np.where(where, values, np.inf), axis=1)
    last = max(values.shape[1] - 1, 0)
    low, high = np.clip((count - 1) // 2, 0, last), np.clip(count // 2, 0, last)
    if not values.shape[1]:
        return np.full(len(values), np.nan)
    middle = (
        np.take_along_axis(ordered, low[:, None], 1) + np.take_along_axis(ordered, high[:, None], 1)
    ) / 2
    return np.where(count > 0, middle[:, 0], np.nan)


def _peaks(qy, qx) -> tuple[Array, Array]:
    """Both coordinates as float64 of one shape."""
    qy, qx = np.asarray(qy, dtype=np.float64), np.asarray(qx, dtype=np.float64)
    if qy.shape != qx.shape or qy.ndim < 1:
        raise ValueError(
            f"qy has shape {qy.shape} and qx {qx.shape}; needed are two arrays (..., n_peaks) of one shape"
        )
    return qy, qx


def check_basis(g) -> Array:
    """Lattice vectors (..., 2, 2) that are finite and not parallel."""
    g = np.asarray(g, dtype=np.float64)
    if g.shape[-2:] != (2, 2):
        raise ValueError(f"g has shape {g.shape}, needed is (2, 2): rows g1, g2 and columns (y, x)")
    if not np.isfinite(g).all() or (np.abs(np.linalg.det(g)) < 1e-6 * (g**2).sum((-1, -2))).any():
        raise ValueError(
            f"lattice vectors {g.tolist()} are missing or parallel; give two independent ones (y, x) in px"
        )
    return g


def _spacing(value: float | None, g: Array) -> float:
    """Checked `max_peak_spacing`."""
    if value is None:
        return DEFAULT_SPACING * float(np.sqrt((g**2).sum(-1).min()))
    if not value > 0:
        raise ValueError(
            f"max_peak_spacing is {value}, needed is a distance in px above 0, or None for the default"
        )
    return float(value)


def _broadcast(values, shape, name) -> Array:
    """As float64 of `shape`."""
    array = np.asarray(values, dtype=np.float64)
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name} has shape {array.shape}, which does not fit {shape}") from None


def _median_origin(origin: Array) -> Array:
    """Median over the positions where the origin is known."""
    known = origin[np.isfinite(origin).all(1)]
    if len(origin) and not len(known):
        raise ValueError("the origin is missing (NaN) everywhere; give its position (y, x) in px")
    return np.median(known, axis=0) if len(known) else np.zeros(2)

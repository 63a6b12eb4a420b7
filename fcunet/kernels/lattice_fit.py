"""One lattice per position, fitted to its Bragg peaks: many positions at once (NumPy, no loops).

Positions and vectors are (y, x) in detector pixels. A lattice `g` has rows g1, g2; a peak with indices (h, k)
lies at ``origin + h * g1 + k * g2``. Peaks are padded with NaN along the last axis, in any order. The vectors
common to a scan are found in :mod:`fcunet.kernels.lattice`, several lattices in
:mod:`fcunet.kernels.lattice_several`.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from .lattice_index import (
    DEFAULT_SPACING,
    Array,
    BoolArray,
    IntArray,
    as_peaks,
    broadcast,
    check_basis,
    checked_spacing,
    fractional,
    invert_symmetric,
    nearest_site,
    normal_equations,
    one_per_site,
    reduce_basis,
    residuals,
    row_median,
    well_posed,
)

Weighting = Literal["sigma", "uniform", "intensity", "intensity_squared"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)

# smallest gain in log-likelihood of a lattice over unrelated peaks: reached by 5 to 30 random ones in at most
# 0.06 % of patterns, by 6 peaks of a lattice known to 0.5 px always
_MIN_EVIDENCE = 18.0
_CHUNK = 1 << 16  # peaks worked on at once: about 20 arrays of half a MB
_GROWTH = 1.7  # each round of indexing reaches this much further out
_RIDGE = 0.5  # pull towards the given lattice while indexing, in peaks
TUKEY = 4.685  # cut of the biweight in standard deviations: 95 % efficiency per axis
_MIN_SIGMA, _MIN_SCALE = 1e-3, 0.01  # px; no peak is better known than that, no scatter taken to be smaller
_USUAL_STRAIN = 0.04  # standard deviation of strain and rotation that the score expects; breaks ties
_PRIOR_DOF = 4.0  # weight of the stated sigmas against the scatter of the residuals, in degrees of freedom
_BEYOND_CHANCE = 1.5  # standard deviations by which chance may make a pattern look worse than its scan


class LatticeFit(NamedTuple):
    """One lattice per position; the leading shape is that of the peaks without their last axis."""

    origin: Array  # (..., 2) px
    g: Array  # (..., 2, 2) px, rows g1, g2
    covariance: Array  # (..., 6, 6) px^2 of (origin_y, origin_x, g1_y, g1_x, g2_y, g2_x)
    fit_error: Array  # (...) px, rms distance of the fitted peaks from their sites
    n_indexed: IntArray  # (...) peaks in the fit, 0 where there is no lattice
    score: Array  # (...) gain in log-likelihood over unrelated peaks


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
    fit_origin: bool = True,
    max_peak_spacing: float | None = None,
    min_num_peaks: int = 5,
    max_strain: float = 0.1,
    max_rotation_degree: float = 10.0,
    scatter_prior: tuple[float, float] | None = None,
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
    fit_origin : bool
        Fit the origin of each position along with g1 and g2; False holds it at `origin`, without an error.
    max_peak_spacing : float, optional
        Largest distance of a peak from its site, px. None: 0.3 times the shortest lattice vector.
    min_num_peaks : int
        Positions with fewer fitted peaks have no lattice. At least 3.
    max_strain, max_rotation_degree : float
        A lattice that is stretched or turned by more than this against `g` is taken for another one: none.
    scatter_prior : tuple of 2 float, optional
        Reduced chi^2 that the patterns have in common, px^2 without `sigma`, and the degrees of freedom that
        it counts for: :func:`fcunet.kernels.residuals.fit_scatter_prior`. None: 1 and 4 with `sigma`, without
        that nothing is known in advance.

    Returns
    -------
    LatticeFit
        NaN, and `n_indexed` 0, where there are too few peaks, all on one line, or no better described by a
        lattice than by chance (a gain of less than 18 in log-likelihood).

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
    variance. With `scatter_prior` (s, n) either is scaled by (n s + chi^2) / (n + degrees of freedom), but by
    no less than the reduced chi^2 without 1.5 standard deviations of chance: a pattern clearly worse than the
    rest of its scan keeps error bars that say so (limited translation: Efron and Morris,
    doi:10.1080/01621459.1972.10481215). For the intensity weightings, which are no inverse variances, the
    heteroscedasticity-consistent estimate HC2 (MacKinnon and White, J. Econometrics 29, 305 (1985),
    doi:10.1016/0304-4076(85)90158-7). NaN if there are no degrees of freedom and nothing is known in advance.
    """
    fit, _ = fit_and_members(
        qy,
        qx,
        g=g,
        origin=origin,
        sigma=sigma,
        intensity=intensity,
        weighting=weighting,
        robust=robust,
        fit_origin=fit_origin,
        max_peak_spacing=max_peak_spacing,
        min_num_peaks=min_num_peaks,
        max_strain=max_strain,
        max_rotation_degree=max_rotation_degree,
        scatter_prior=scatter_prior,
    )
    return fit


def fit_and_members(
    qy: ArrayLike,
    qx: ArrayLike,
    *,
    g: ArrayLike,
    origin: ArrayLike,
    sigma: ArrayLike | None = None,
    intensity: ArrayLike | None = None,
    weighting: Weighting = "sigma",
    robust: bool = True,
    fit_origin: bool = True,
    max_peak_spacing: float | None = None,
    min_num_peaks: int = 5,
    max_strain: float = 0.1,
    max_rotation_degree: float = 10.0,
    scatter_prior: tuple[float, float] | None = None,
) -> tuple[LatticeFit, BoolArray]:
    """What :func:`fit_lattice` returns, and which peaks (..., P) are in the fit: a bool array."""
    qy, qx = as_peaks(qy, qx)
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
    spacing = checked_spacing(max_peak_spacing, reduced)
    for name, limit in (("max_strain", max_strain), ("max_rotation_degree", max_rotation_degree)):
        if not limit > 0:
            raise ValueError(f"{name} is {limit}, needed is a number above 0")

    lead, n_slots = qy.shape[:-1], qy.shape[-1]
    n = int(np.prod(lead, dtype=np.int64))
    qy, qx = qy.reshape(n, n_slots), qx.reshape(n, n_slots)
    start = broadcast(origin, (*lead, 2), "origin").reshape(n, 2)
    start = np.where(np.isfinite(start), start, _median_origin(start))
    if sigma is not None:
        sigma = broadcast(sigma, (*lead, n_slots), "sigma").reshape(n, n_slots)
    if intensity is not None:
        intensity = broadcast(intensity, (*lead, n_slots), "intensity").reshape(n, n_slots)

    fit = LatticeFit(
        np.full((n, 2), np.nan),
        np.full((n, 2, 2), np.nan),
        np.full((n, 6, 6), np.nan),
        np.full(n, np.nan),
        np.zeros(n, np.int64),
        np.full(n, np.nan),
    )
    members = np.zeros((n, n_slots), bool)
    for first in range(0, n, max(1, _CHUNK // max(n_slots, 1))):
        part = slice(first, first + max(1, _CHUNK // max(n_slots, 1)))
        block = _Block(
            qy[part],
            qx[part],
            start[part],
            None if sigma is None else sigma[part],
            None if intensity is None else intensity[part],
            weighting,
            fit_origin,
            scatter_prior,
        )
        block.grow(reduced)
        block.refine(spacing, robust)
        found = block.accept(reduced, min_num_peaks, max_strain, np.deg2rad(max_rotation_degree))
        block.store(fit, part, mix, found)
        members[part] = block.used & found[:, None]
    shaped = LatticeFit(
        fit.origin.reshape(*lead, 2),
        fit.g.reshape(*lead, 2, 2),
        fit.covariance.reshape(*lead, 6, 6),
        fit.fit_error.reshape(lead),
        fit.n_indexed.reshape(lead),
        fit.score.reshape(lead),
    )
    return shaped, members.reshape(*lead, n_slots)


class _Block:
    """Peaks of some positions on their way to a fit: arrays (n, P), relative to the origin guess."""

    def __init__(self, qy, qx, start, sigma, intensity, weighting, fit_origin, scatter_prior):
        self.start, self.fit_origin, self.scatter_prior = start, fit_origin, scatter_prior
        present = np.isfinite(qy) & np.isfinite(qx)
        if weighting.startswith("intensity"):
            present &= intensity > 0
        self.present = present
        self.y = np.where(present, qy - start[:, :1], 0.0)
        self.x = np.where(present, qx - start[:, 1:], 0.0)
        self.radius2 = self.y**2 + self.x**2
        self.weighting = weighting
        self.stated = weighting == "sigma" and sigma is not None
        self.has_sigma = np.zeros(len(qy), bool)
        self.sigma = np.ones_like(self.y)
        self.weight = present.astype(np.float64)
        if self.stated:
            known = present & (sigma > 0) & np.isfinite(sigma)
            self.has_sigma = known.any(1)
            typical = row_median(sigma, known)
            self.sigma = np.where(known, sigma, np.where(self.has_sigma, typical, 1.0)[:, None])
            self.sigma = np.maximum(self.sigma, _MIN_SIGMA)
            self.weight = present / self.sigma**2
        elif weighting.startswith("intensity"):
            relative = (
                np.where(present, intensity, 0)
                / np.maximum(np.max(intensity, axis=1, where=present, initial=0), 1e-300)[:, None]
            )
            self.weight = relative if weighting == "intensity" else relative**2
        self.variance = self.sigma**2
        self.brightness = present.astype(np.float64)
        if (
            intensity is not None
        ):  # weak strays and weak forbidden spots shall not decide where the lattice starts
            bright = present & (intensity > 0)
            level = np.where(bright.any(1), row_median(intensity, bright), 1.0)[:, None]
            self.brightness = np.where(bright, np.minimum(intensity / level, 1.0), 0.0)

    def grow(self, g_start):
        """Index from the origin outwards; leaves `origin` (relative) and `g` per position."""
        n, longest = len(self.y), np.sqrt((g_start**2).sum(1).max())
        shortest = np.sqrt((g_start**2).sum(1).min())
        self.origin = np.zeros((n, 2))
        if self.fit_origin:
            near = self.brightness * (self.radius2 <= (2.2 * longest) ** 2)
            h, k = fractional(self.y, self.x, np.linalg.inv(g_start))
            # mean phase of the peaks around the guess = where the nearest site lies
            turns = 2 * np.pi * np.stack([h, k])
            sine, cosine = ((near * wave(turns)).sum(-1) for wave in (np.sin, np.cos))
            phase = np.arctan2(sine, cosine) / (2 * np.pi)
            self.origin = phase.T @ g_start
        seed = self.origin
        self.g = np.broadcast_to(g_start, (n, 2, 2))
        reach, farthest = 1.5 * longest, np.sqrt(self.radius2.max(initial=0.0))
        while True:
            h, k, distance2 = nearest_site(self.y, self.x, self.origin, self.g)
            soft = np.maximum(1 - distance2 / (DEFAULT_SPACING * shortest) ** 2, 0) ** 2
            weight = soft * self.present * (self.radius2 <= reach**2)
            ry, rx = residuals(self.y, self.x, h, k, seed, g_start)
            normal, right = self._equations(weight, h, k, ry, rx)
            step = np.linalg.solve(normal + _RIDGE * np.eye(3), right)
            self.origin, self.g = seed + step[:, 0], g_start + step[:, 1:]
            if reach > farthest:
                return
            reach *= _GROWTH

    def refine(self, spacing, robust):
        """Robust weighted fit of all peaks; leaves `used`, `h`, `k` and the last residuals."""
        for rounds in (4, 4) if robust else (1, 1):
            self.h, self.k, distance2 = nearest_site(self.y, self.x, self.origin, self.g)
            self.used = one_per_site(self.h, self.k, distance2, self.present & (distance2 <= spacing**2))
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
        ry, rx = residuals(self.y, self.x, self.h, self.k, self.origin, self.g)
        ry *= ry
        rx *= rx
        ry += rx
        squared = np.divide(ry, self.variance, out=ry)
        count = self.used.sum(1)
        # median of chi-squared with two degrees of freedom: 2 ln 2; three of `count` points are absorbed by
        # the fit
        share = np.maximum(count, 1) / np.maximum(count - 3, 0.5)
        scale2 = row_median(squared, self.used) / (2 * np.log(2)) * share
        floor = np.where(self.has_sigma, 1.0, _MIN_SCALE**2)
        return squared / (TUKEY**2 * np.maximum(np.nan_to_num(scale2), floor) * share)[:, None]

    def _solve(self, weight):
        """One weighted least-squares step from the present lattice, none where it has no solution."""
        ry, rx = residuals(self.y, self.x, self.h, self.k, self.origin, self.g)
        normal, right = self._equations(weight, self.h, self.k, ry, rx)
        self.solvable = well_posed(normal)
        normal[~self.solvable], right[~self.solvable] = np.eye(3), 0
        total = normal[:, :1, :1].copy()  # robust weights can be all but zero
        self.inverse = invert_symmetric(normal / total) / total
        step = self.inverse @ right
        if not self.fit_origin:
            self.inverse[:, 0, 0] = 0
        self.origin, self.g = self.origin + step[:, 0], self.g + step[:, 1:]

    def _equations(self, weight, h, k, ry, rx):
        """Normal equations of (origin, g1, g2); a fixed origin takes no part in them."""
        normal, right = normal_equations(weight, h, k, ry, rx)
        if not self.fit_origin:
            normal[:, 0, 1:] = normal[:, 1:, 0] = right[:, 0] = 0
        return normal, right

    def accept(self, g_start, min_num_peaks, max_strain, max_rotation):
        """True where the fit is a lattice, and one near `g_start`; leaves its `score`."""
        ry, rx = residuals(self.y, self.x, self.h, self.k, self.origin, self.g)
        self.squared = (ry**2 + rx**2) * self.used
        self.count = self.used.sum(1)
        spread, _ = self._equations(self.used.astype(np.float64), self.h, self.k, ry, rx)
        stretch, turn = _distance_from(self.g, g_start)
        self.score = self._evidence(g_start) - (stretch**2 + turn**2) / (2 * _USUAL_STRAIN**2)
        found = self.solvable & well_posed(spread) & (self.count >= min_num_peaks)
        found &= (stretch <= max_strain) & (turn <= max_rotation)
        return found & ((self.count <= 3) | (self.score > _MIN_EVIDENCE))

    def store(self, fit, part, mix, found):
        """Write what was found into `fit`, in the basis the caller gave."""
        error = np.sqrt(self.squared.sum(1) / np.maximum(self.count, 1))
        back = np.eye(3)
        back[1:, 1:] = np.linalg.inv(mix)  # given = inv(mix) @ reduced
        covariance = np.einsum("nab,ij->naibj", back @ self._covariance() @ back.T, np.eye(2))
        fit.origin[part] = np.where(found[:, None], self.origin + self.start, np.nan)
        fit.g[part] = np.where(found[:, None, None], back[1:, 1:] @ self.g, np.nan)
        fit.covariance[part] = np.where(found[:, None, None], covariance.reshape(-1, 6, 6), np.nan)
        fit.fit_error[part] = np.where(found, error, np.nan)
        fit.n_indexed[part] = np.where(found, self.count, 0)
        fit.score[part] = np.where(found, self.score, np.nan)

    def _evidence(self, g_start):
        """Gain in log-likelihood of peaks at lattice sites over all peaks anywhere in the cell."""
        count, area = self.count, np.abs(np.linalg.det(g_start))
        freedom = 2 * count - (6 if self.fit_origin else 4)
        variance = np.maximum(self.squared.sum(1) / np.maximum(freedom, 1), 1e-6 * area)  # per axis
        rest = self.present.sum(1) - count
        share = count / np.maximum(count + rest, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside = count * (np.log(share * area / (2 * np.pi * variance)) - 1)
            return np.where(count > 0, inside, 0) + np.where(rest > 0, rest * np.log1p(-share), 0)

    def _covariance(self):
        """Covariance (n, 3, 3) of one axis of (origin, g1, g2)."""
        squared, dof = self.squared, 2.0 * self.count - (6 if self.fit_origin else 4)
        if self.weighting.startswith("intensity"):
            a = np.stack([np.ones_like(self.h), self.h, self.k], -1)
            leverage = self.weight * np.einsum("npa,nab,npb->np", a, self.inverse, a, optimize=True)
            variance = squared / 2 / np.maximum(1 - leverage, 0.01)
            middle, _ = normal_equations(
                self.weight**2 * variance * self.used, self.h, self.k, self.y, self.x
            )
            covariance = self.inverse @ middle @ self.inverse
            return np.where((dof > 0)[:, None, None], covariance, np.nan)
        chi2 = (squared / self.variance).sum(1)
        usual, degrees = self.scatter_prior or (1.0, _PRIOR_DOF if self.stated else 0.0)
        prior = np.where(self.has_sigma | (not self.stated), degrees, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where(prior + dof > 0, (prior * usual + chi2) / (prior + dof), np.nan)
            if self.scatter_prior is not None:
                chance = np.sqrt(2 / dof + 2 / dof**2)  # of the logarithm of chi^2
                scale = np.fmax(scale, chi2 / dof * np.exp(-_BEYOND_CHANCE * chance))
        return self.inverse * scale[:, None, None]


def _distance_from(g, g_start):
    """Largest principal strain and rotation (rad) of lattices against `g_start`; inf if mirrored or NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        F = np.linalg.inv(g_start) @ g  # its inverse would do as well
        same = np.hypot(F[:, 0, 0] + F[:, 1, 1], F[:, 0, 1] - F[:, 1, 0]) / 2
        mirrored = np.hypot(F[:, 0, 0] - F[:, 1, 1], F[:, 0, 1] + F[:, 1, 0]) / 2
        stretch = np.maximum(same + mirrored - 1, 1 - (same - mirrored))
        turn = np.abs(np.arctan2(F[:, 0, 1] - F[:, 1, 0], F[:, 0, 0] + F[:, 1, 1]))
    wrong = ~(same > mirrored)
    return np.where(wrong, np.inf, stretch), np.where(wrong, np.inf, turn)


def _median_origin(origin: Array) -> Array:
    """Median over the positions where the origin is known."""
    known = origin[np.isfinite(origin).all(1)]
    if len(origin) and not len(known):
        raise ValueError("the origin is missing (NaN) everywhere; give its position (y, x) in px")
    return np.median(known, axis=0) if len(known) else np.zeros(2)

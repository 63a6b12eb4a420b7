"""Elliptical distortion and pixel size of a detector, from a ring or from the rings of a known crystal.

The distortion is a matrix D of determinant 1 and without rotation, so that it leaves the mean pixel size and
the scan rotation alone: ``measured = D @ true`` for vectors (y, x) from the beam centre. It has two
parameters, ``D = exp([[-a, b], [b, a]])``: lengths along +x grow by the factor exp(a), along +y by exp(-a),
along the diagonal +x+y by exp(b). An ellipse of axis ratio r, long axis turned by phi from +x towards +y,
has ``a + ib = ln(r) / 2 * exp(2 i phi)``.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage as ndi
from scipy.optimize import least_squares

Array = NDArray[np.float64]


class Ellipse(NamedTuple):
    """Axis ratio (long over short, at least 1) and direction of the long axis, degrees from +x towards +y."""

    ratio: float
    angle_degree: float

    @property
    def terms(self) -> tuple[float, float]:
        """(a, b) of the module's first lines."""
        size, phi = 0.5 * math.log(self.ratio), math.radians(self.angle_degree)
        return size * math.cos(2 * phi), size * math.sin(2 * phi)

    @property
    def matrix(self) -> Array:
        """D, shape (2, 2), axes (y, x): ``measured = D @ true``."""
        return distortion_matrix(*self.terms)

    @classmethod
    def from_terms(cls, a: float, b: float) -> "Ellipse":
        """The ellipse of the two parameters."""
        return cls(math.exp(2 * math.hypot(a, b)), math.degrees(0.5 * math.atan2(b, a)) % 180)


class RingFit(NamedTuple):
    """An elliptical ring fitted to an image; lengths in px."""

    ellipse: Ellipse
    centre: tuple[float, float]
    radius_px: float  # geometric mean of the half axes
    width_px: float
    terms: tuple[float, float]
    terms_std: float  # of a and of b
    contrast: float  # height of the ring over the noise of its residual


class CrystalFit(NamedTuple):
    """Pixel size and ellipse from disks on the rings of a known crystal."""

    q_pixel: float  # 1/angstrom per px
    q_pixel_std: float
    ellipse: Ellipse
    terms: tuple[float, float]
    terms_std: float  # of a and of b; NaN where the ellipse was not fitted
    scatter: float  # robust relative spread of the radii about their rings
    n_used: int
    n_vectors: int
    ambiguity: float  # score of the best other pixel size over that of this one, 0 to 1
    rings: NDArray[np.bool_]  # which rings were seen


def distortion_matrix(a: float, b: float) -> Array:
    """``exp([[-a, b], [b, a]])``, shape (2, 2), axes (y, x)."""
    size = math.hypot(a, b)
    slope = math.sinh(size) / size if size > 1e-12 else 1.0
    return math.cosh(size) * np.eye(2) + slope * np.array([[-a, b], [b, a]])


def undistort(vectors: ArrayLike, ellipse: Ellipse) -> Array:
    """Measured vectors (..., 2) from the beam centre as they would be without the distortion."""
    return np.asarray(vectors, dtype=float) @ np.linalg.inv(ellipse.matrix).T


def undistort_lattice(
    g: NDArray, covariance: NDArray | None, ellipse: Ellipse
) -> tuple[Array, NDArray | None]:
    """Lattice vectors without the distortion, and their covariance.

    Parameters
    ----------
    g : ndarray, shape (..., 2, 2)
        Rows g1, g2 as measured, (y, x).
    covariance : ndarray, shape (..., 6, 6), optional
        Of origin, g1, g2, each (y, x).
    ellipse : Ellipse
    """
    inverse = np.linalg.inv(ellipse.matrix)
    if covariance is not None:
        # vector by vector: where the origin is unknown, g1 and g2 need not be
        blocks = np.asarray(covariance, dtype=float).reshape(*np.shape(covariance)[:-2], 3, 2, 3, 2)
        blocks = np.einsum("ik,...akbl,jl->...aibj", inverse, blocks, inverse)
        covariance = blocks.reshape(np.shape(covariance))
    return np.asarray(g, dtype=float) @ inverse.T, covariance


def _radial_profile(image: Array, centre: tuple[float, float], step: float = 1.0) -> tuple[Array, Array]:
    """Radii and median intensity of rings about a centre; NaN where under half a ring is seen."""
    y, x = np.indices(image.shape)
    r = np.hypot(y - centre[0], x - centre[1])
    index = (r / step).astype(int)
    n = index.max() + 1
    seen = np.isfinite(image)
    count = np.bincount(index[seen], minlength=n)
    full = 2 * math.pi * (np.arange(n) + 0.5) * step**2
    median = ndi.median(np.where(seen, image, np.nan), np.where(seen, index, -1), np.arange(n))
    return (np.arange(n) + 0.5) * step, np.where(count > 0.5 * full, median, np.nan)


def find_ring(image: NDArray, centre: tuple[float, float], *, inner_px: float) -> float:
    """Radius of the ring that stands out most from the smooth decay around it; NaN without one."""
    r, profile = _radial_profile(np.asarray(image, dtype=float), centre)
    use = np.isfinite(profile) & (r > inner_px)
    if use.sum() < 8:
        return math.nan
    r, value = r[use], np.sqrt(np.clip(profile[use], 0, None))
    value = ndi.gaussian_filter1d(value, 1.0)
    from scipy.signal import find_peaks  # slow to import

    peaks, facts = find_peaks(value, prominence=1e-6 * float(np.ptp(value) or 1.0))
    if not len(peaks):
        return math.nan
    return float(r[peaks[int(np.argmax(facts["prominences"] * np.sqrt(r[peaks])))]])


def fit_ring(
    image: NDArray, centre: tuple[float, float], radius_px: float, *, width_px: float | None = None
) -> RingFit | None:
    """An elliptical ring with Gaussian flanks, inside and outside each its own, on a sloping background.

    Background and height are solved for exactly at each step (variable projection), the rest by least squares
    with a robust loss, so that single bright grains on the ring do not pull it.

    Parameters
    ----------
    image : ndarray, shape (qy, qx)
        Mean of many patterns with the descan taken out; NaN = do not use.
    centre : tuple of float
        (y, x) of the beam, px; fitted with the rest.
    radius_px : float
        Where to look, to a tenth.
    width_px : float, optional
        Standard deviation to start with; default 4 % of the radius.

    Returns
    -------
    RingFit or None
        None where no bright ring is found near the start.
    """
    image = np.asarray(image, dtype=float)
    width = max(1.0, 0.04 * radius_px) if width_px is None else width_px
    reach = max(5 * width, 0.15 * radius_px)
    y, x = (v.astype(float) for v in np.indices(image.shape))
    r = np.hypot(y - centre[0], x - centre[1])
    use = np.isfinite(image) & (np.abs(r - radius_px) < reach)
    if use.sum() < 200:
        return None
    thin = max(1, int(use.sum() // 20000))
    y, x, value = y[use][::thin], x[use][::thin], image[use][::thin]
    scale = float(np.percentile(value, 99) - np.percentile(value, 1))
    if scale <= 0:
        return None
    value = value / scale
    noise = 1.4826 * float(np.median(np.abs(value - np.median(value)))) or 1e-6

    def design(p: Array) -> Array:
        inverse = distortion_matrix(-p[3], -p[4])
        dy, dx = y - p[0], x - p[1]
        rho = np.hypot(inverse[0, 0] * dy + inverse[0, 1] * dx, inverse[1, 0] * dy + inverse[1, 1] * dx)
        t = (rho - p[2]) / np.where(rho < p[2], p[5], p[6])
        u = (rho - radius_px) / reach
        return np.stack([np.ones_like(u), u, u * u, np.exp(-0.5 * t * t)], axis=1)

    def solve(p: Array) -> tuple[Array, Array]:
        terms = design(p)
        c, *_ = np.linalg.lstsq(terms, value, rcond=None)
        return c, (terms @ c - value) / noise

    slack = 0.5 * reach
    low = [centre[0] - slack, centre[1] - slack, radius_px - slack, -0.15, -0.15, 0.3, 0.3]
    high = [centre[0] + slack, centre[1] + slack, radius_px + slack, 0.15, 0.15, reach, reach]
    first = np.array([*centre, radius_px, 0.0, 0.0, width, width])
    fit = least_squares(lambda p: solve(p)[1], first, bounds=(low, high), loss="soft_l1", max_nfev=80)
    c, residual = solve(fit.x)
    p = fit.x
    if c[3] <= 0 or np.any(np.isclose(p[:5], low[:5], atol=1e-4) | np.isclose(p[:5], high[:5], atol=1e-4)):
        return None
    spread = 1.4826 * float(np.median(np.abs(residual)))
    normal = fit.jac.T @ fit.jac
    try:
        covariance = np.linalg.inv(normal) * max(spread, 1e-9) ** 2
    except np.linalg.LinAlgError:
        return None
    return RingFit(
        Ellipse.from_terms(float(p[3]), float(p[4])),
        (float(p[0]), float(p[1])),
        float(p[2]),
        float(np.sqrt(p[5] * p[6])),
        (float(p[3]), float(p[4])),
        float(np.sqrt(max(covariance[3, 3], covariance[4, 4]))),
        float(c[3] / noise / max(spread, 1e-9)),
    )


def fit_crystal(
    vectors: NDArray,
    rings: NDArray,
    q_pixel: float | None = None,
    *,
    weights: NDArray | None = None,
    slack: float = 0.2,
    fit_ellipse: bool = True,
    rounds: int = 3,
) -> CrystalFit | None:
    """Pixel size and elliptical distortion from disks that must lie on known rings.

    Works for many grains and for one alike: only the lengths of the vectors count. Pixel sizes within `slack`
    of the start are tried, with a few ellipses; each is scored by how many vectors lie on a ring, less what
    chance would put there. The best are refined by least squares on the logarithm of the length, which is
    linear in ``ln(q_pixel)``, a and b, with Tukey weights that narrow from round to round.

    Parameters
    ----------
    vectors : ndarray, shape (n, 2)
        Disks from the beam centre, px (y, x); NaN is left out.
    rings : ndarray, shape (m,)
        Allowed 1/d of the crystal, 1/angstrom.
    q_pixel : float, optional
        Pixel size to start from, 1/angstrom per px; without it, all that put the innermost disks on one of
        the first rings are tried.
    weights : ndarray, shape (n,), optional
        Trust in each vector.
    slack : float
        How far the start may be off.
    fit_ellipse : bool
        False: pixel size only.
    rounds : int
        Refinements, each with narrower weights.

    Returns
    -------
    CrystalFit or None
        None with fewer than 8 vectors, or if no pixel size puts more on the rings than chance would.
    """
    vectors = np.asarray(vectors, dtype=float)
    rings = np.unique(np.asarray(rings, dtype=float))
    good = np.isfinite(vectors).all(1) & (np.hypot(*vectors.T) > 0)
    weight = np.ones(len(vectors)) if weights is None else np.asarray(weights, dtype=float)
    v, weight = vectors[good], weight[good]
    if len(v) < 8 or len(rings) < 1:
        return None
    length = np.hypot(*v.T)
    if q_pixel is None:
        inner = float(np.percentile(length, 3))
        low, high = 0.85 * rings[0] / inner, 1.15 * rings[min(4, len(rings) - 1)] / inner
    else:
        low, high = q_pixel * (1 - slack), q_pixel * (1 + slack)
    candidates = _candidates(v, weight, rings, low, high, fit_ellipse)
    refined = [_refine(v, weight, rings, start, fit_ellipse, rounds) for start in candidates]
    fits = [f for f in refined if f is not None]
    if not fits:
        return None
    fits.sort(key=lambda f: -f[0])
    score, p, scatter, used, nearest, std = fits[0]
    others = [f[0] for f in fits[1:] if abs(f[1][0] - p[0]) > 0.01]
    seen = np.zeros(len(rings), dtype=bool)
    seen[np.unique(nearest[used])] = True
    pixel = math.exp(p[0])
    return CrystalFit(
        pixel,
        pixel * float(std[0]),
        Ellipse.from_terms(float(p[1]), float(p[2])),
        (float(p[1]), float(p[2])),
        float(max(std[1:])) if fit_ellipse else math.nan,
        scatter,
        int(used.sum()),
        len(v),
        max([o / score for o in others], default=0.0),
        seen,
    )


def _log_lengths(v: Array, a: float, b: float) -> Array:
    """ln |D^-1 v| of measured vectors."""
    return np.log(np.hypot(*(v @ distortion_matrix(-a, -b).T).T))


def _nearest(log_q: Array, log_rings: Array) -> NDArray[np.int64]:
    """Index of the ring nearest to each length."""
    i = np.searchsorted(log_rings, log_q).clip(1, max(len(log_rings) - 1, 1))
    if len(log_rings) == 1:
        return np.zeros(np.shape(log_q), dtype=np.int64)
    return i - (log_q - log_rings[i - 1] < log_rings[i] - log_q)


def _chance(log_rings: Array, width: float) -> Array:
    """Mean of the score over the cell of each ring, were lengths spread evenly: what chance gives."""
    middle = (log_rings[1:] + log_rings[:-1]) / 2
    cell = np.diff(np.concatenate([[log_rings[0] - 0.1], middle, [log_rings[-1] + 0.1]]))
    return np.minimum(width * math.sqrt(2 * math.pi) / cell, 1.0)


def _score(log_q: Array, log_rings: Array, weight: Array, width: float) -> Array:
    """Vectors on rings, less chance, each counted by how telling its ring is; log_q (..., n)."""
    near = _nearest(log_q, log_rings)
    chance = _chance(log_rings, width)[near]
    hit = np.exp(-0.5 * ((log_q - log_rings[near]) / width) ** 2)
    beyond = log_q > log_rings[-1] + 3 * width
    return np.sum(np.where(beyond, 0.0, (hit - chance) * (1 - chance)) * weight, axis=-1)


def _candidates(
    v: Array, weight: Array, rings: Array, low: float, high: float, fit_ellipse: bool, count: int = 8
) -> list[Array]:
    """Starts (ln q_pixel, a, b): the best of a coarse search, far enough apart."""
    if len(v) > 400:  # the innermost say most, but not only they
        order = np.argsort(np.hypot(*v.T))
        pick = order[np.unique(np.linspace(0, len(v) - 1, 400).astype(int))]
        v, weight = v[pick], weight[pick]
    width = 0.01
    grid = np.arange(math.log(low), math.log(high) + width / 3, width / 3)
    log_rings = np.log(rings)
    steps = np.arange(-0.03, 0.031, 0.01) if fit_ellipse else np.zeros(1)
    found: list[tuple[float, Array]] = []
    for a in steps:
        for b in steps:
            score = _score(_log_lengths(v, a, b) + grid[:, None], log_rings, weight, width)
            for i in np.argsort(-score)[:5]:
                found.append((float(score[i]), np.array([grid[i], a, b])))
    found.sort(key=lambda f: -f[0])
    kept: list[Array] = []
    for _, start in found:
        if all(abs(start[0] - k[0]) > 0.012 for k in kept):
            kept.append(start)
        if len(kept) == count:
            break
    return kept


def _refine(
    v: Array, weight: Array, rings: Array, start: Array, fit_ellipse: bool, rounds: int
) -> tuple[float, Array, float, NDArray[np.bool_], NDArray[np.int64], Array] | None:
    """Score, parameters, scatter, vectors used, their rings and standard deviations; None if it fails."""
    log_rings = np.log(rings)
    p = start.copy()
    width = 0.03
    phi = np.arctan2(v[:, 0], v[:, 1])
    # r = q (1 + a cos 2 phi + b sin 2 phi) to first order; iterated, so to all
    design = np.stack([np.ones_like(phi), -np.cos(2 * phi), -np.sin(2 * phi)], axis=1)
    design = design if fit_ellipse else design[:, :1]
    for _ in range(max(1, rounds)):
        for _ in range(6):
            log_q = _log_lengths(v, p[1], p[2]) + p[0]
            near = _nearest(log_q, log_rings)
            residual = log_q - log_rings[near]
            tukey = np.clip(1 - (residual / width) ** 2, 0, None) ** 2 * (
                1 - _chance(log_rings, width / 2)[near]
            )
            w = weight * tukey
            if np.count_nonzero(w > 0) < 2 * design.shape[1]:
                return None
            normal = design.T @ (w[:, None] * design)
            step = -np.linalg.lstsq(normal, design.T @ (w * residual), rcond=1e-10)[0]
            p[: len(step)] += step
        near_enough = np.abs(residual) < width
        scatter = 1.4826 * float(np.median(np.abs(residual[near_enough])))
        width = float(np.clip(4 * scatter, 1e-4, width))
    log_q = _log_lengths(v, p[1], p[2]) + p[0]
    near = _nearest(log_q, log_rings)
    residual = log_q - log_rings[near]
    used = np.abs(residual) < width
    score = float(_score(log_q, log_rings, weight, max(scatter, 0.002)))
    if used.sum() < 2 * design.shape[1] or score <= 0:
        return None
    # sandwich of an M estimator (Huber 1981, section 7.6): slope of the influence outside, its square inside
    u2 = np.clip((residual / width) ** 2, 0, 1)
    trust = weight * (1 - _chance(log_rings, width / 2)[near])
    influence = trust * residual * (1 - u2) ** 2
    bread = np.linalg.pinv(design.T @ ((trust * (1 - u2) * (1 - 5 * u2))[:, None] * design))
    covariance = bread @ (design.T @ (influence[:, None] ** 2 * design)) @ bread
    return score, p, scatter, used, near, np.sqrt(np.diag(covariance))

"""The lattice common to the Bragg peaks of a scan, found from the peaks alone (NumPy).

Differences of positions within a pattern do not depend on where its centre is, and every pair of neighbouring
sites votes for the same few vectors, so their histogram over many patterns shows the lattice through missing
and stray peaks, descan and strain. All pairs of strong short differences are tried as a basis; the coarsest
lattice that explains nearly as much as the best one wins. Fitting a lattice to each position is in
:mod:`fcunet.kernels.lattice_fit`; its functions can be imported from here.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from .lattice_fit import WEIGHTINGS, LatticeFit, Weighting, fit_lattice
from .lattice_index import DEFAULT_SPACING, check_basis, index_peaks, reduce_basis

__all__ = [
    "DEFAULT_SPACING",
    "WEIGHTINGS",
    "Basis",
    "LatticeFit",
    "NoLatticeError",
    "Weighting",
    "find_basis",
    "fit_lattice",
    "index_peaks",
    "orient_basis",
    "reduce_basis",
    "splat_peaks",
]

Array = NDArray[np.float64]

_MAX_PATTERNS, _MAX_PEAKS = 2048, 48
_MIN_SHARE = 0.3  # of the peaks must lie on the lattice found
_DIRECTION = np.deg2rad(
    10.5
)  # g1 is the vector nearest to this one: no tie in crystals aligned with the detector
_NEARLY = 1.08  # lengths within 8 % count as equal when g1 and g2 are named


class Basis(NamedTuple):
    """Lattice common to a scan."""

    origin: Array  # (2,) px, (y, x) of the direct beam
    g: Array  # (2, 2) px, rows g1, g2


class NoLatticeError(ValueError):
    """The peaks of a scan show no lattice."""


def find_basis(
    qy: ArrayLike,
    qx: ArrayLike,
    intensity: ArrayLike | None = None,
    *,
    origin: ArrayLike | None = None,
    g: ArrayLike | None = None,
    min_share: float = _MIN_SHARE,
) -> Basis:
    """Lattice vectors and origin that describe most Bragg peaks of a scan.

    Parameters
    ----------
    qy, qx : array_like, shape (..., P)
        Peak positions in px, padded with NaN, in any order. At most 2048 patterns, evenly spread, are used.
    intensity : array_like, shape (..., P), optional
        Strength of the peaks: weak ones count less, and the strongest site becomes the origin.
    origin : array_like, shape (2,), optional
        Position of the direct beam in px, if known.
    g : array_like, shape (2, 2), optional
        Lattice vectors in px, if known; they are returned unchanged.
    min_share : float
        The least share of all peaks that has to lie on the lattice.

    Returns
    -------
    Basis
        Shortest vectors of the lattice, g1 to g2 turning from +x towards +y. Among vectors equal within 8 %,
        g1 is the one nearest to +x (10.5 degrees towards +y) and g2 the one at the smaller angle, so that
        noise does not exchange them between runs. Without `origin`, the site with the largest summed
        intensity, or, without intensities, the one nearest to the mean position; any other site would give
        the same strain.

    Raises
    ------
    ValueError
        If no pattern has three peaks, or the peaks do not share a lattice.
    """
    qy, qx = np.asarray(qy, dtype=np.float64), np.asarray(qx, dtype=np.float64)
    if qy.shape != qx.shape or qy.ndim < 1:
        raise ValueError(
            f"qy has shape {qy.shape} and qx {qx.shape}; needed are two arrays (..., n_peaks) of one shape"
        )
    y, x, strength = _sample(qy, qx, intensity)
    given = None if g is None else np.asarray(g, dtype=np.float64)
    if given is None:
        spacing = _neighbour_distance(y, x)
        vectors, votes = _frequent_differences(y, x, _clipped(strength), spacing)
        g = orient_basis(_consensus(vectors, votes, spacing))
    else:
        g = check_basis(given)
    centre = _origin(y, x, strength, g) if origin is None else np.asarray(origin, dtype=np.float64).reshape(2)
    fit = fit_lattice(y, x, g=g, origin=centre, intensity=strength, weighting="uniform", min_num_peaks=3)
    valid = np.isfinite(fit.fit_error)
    indexed, present = int(fit.n_indexed.sum()), int(np.isfinite(y).sum())
    if indexed < min_share * present:
        raise NoLatticeError(
            f"no lattice describes these peaks: the best, {np.round(g, 1).tolist()} px, holds {indexed} "
            f"of {present}; raise the detection threshold, choose a region with one crystal, or give the "
            "vectors: basis=((g1_y, g1_x), (g2_y, g2_x))"
        )
    if not valid.any():
        raise NoLatticeError("no pattern has a lattice of its own; give basis=((g1_y, g1_x), (g2_y, g2_x))")
    if origin is None:
        centre = np.median(fit.origin[valid], axis=0)
    return Basis(centre, orient_basis(np.median(fit.g[valid], axis=0)) if given is None else given)


def orient_basis(g: ArrayLike) -> Array:
    """Shortest vectors of a lattice (2, 2), named and signed in a way that small changes do not alter."""
    reduced, _ = reduce_basis(g)
    steps = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)])
    candidates = steps @ reduced
    length = np.hypot(*candidates.T)
    direction = np.array([np.sin(_DIRECTION), np.cos(_DIRECTION)])
    g1 = _first(candidates, length, candidates @ direction / length)
    cross = g1[1] * candidates[:, 0] - g1[0] * candidates[:, 1]  # > 0: turns from +x towards +y
    area = np.abs(np.linalg.det(reduced))
    rest = np.abs(cross - area) < 1e-6 * area
    g2 = _first(candidates[rest], length[rest], candidates[rest] @ g1 / length[rest])
    return np.array([g1, g2])


def splat_peaks(
    qy: ArrayLike, qx: ArrayLike, weight: ArrayLike | None, shape: tuple[int, int], *, sampling: float = 1.0
) -> Array:
    """Histogram of peak positions on a detector grid, every peak shared bilinearly among four pixels.

    Parameters
    ----------
    qy, qx : array_like, any one shape
        Positions in px; NaN is left out.
    weight : array_like, same shape, optional
        Weight of each peak, usually its intensity; None or NaN weight: 1 and left out, respectively.
    shape : (int, int)
        Detector shape (rows, columns) in px.
    sampling : float
        Pixels of the result per detector pixel.

    Returns
    -------
    ndarray, shape (round(rows * sampling), round(columns * sampling))
        Sum of weights. Shares that fall outside are lost.
    """
    y, x = (np.asarray(q, dtype=np.float64).ravel() * sampling for q in (qy, qx))
    w = np.ones_like(y) if weight is None else np.asarray(weight, dtype=np.float64).ravel()
    ny, nx = (max(1, round(s * sampling)) for s in shape)
    keep = np.isfinite(y) & np.isfinite(x) & np.isfinite(w)
    keep &= (np.abs(np.where(keep, y, 0)) < 2 * ny + 2) & (np.abs(np.where(keep, x, 0)) < 2 * nx + 2)
    y, x, w = y[keep], x[keep], w[keep]
    y0, x0 = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    fy, fx = y - y0, x - x0
    image = np.zeros(ny * nx)
    for dy, wy in ((0, 1 - fy), (1, fy)):
        for dx, wx in ((0, 1 - fx), (1, fx)):
            row, column = y0 + dy, x0 + dx
            inside = (row >= 0) & (row < ny) & (column >= 0) & (column < nx)
            image += np.bincount((row * nx + column)[inside], (w * wy * wx)[inside], ny * nx)
    return image.reshape(ny, nx)


def _first(vectors: Array, length: Array, preference: Array) -> Array:
    """The preferred one among the vectors that are nearly shortest."""
    return vectors[np.argmax(np.where(length <= _NEARLY * length.min(), preference, -np.inf))]


def _sample(qy: Array, qx: Array, intensity: ArrayLike | None) -> tuple[Array, Array, Array]:
    """Evenly spread patterns of at least three peaks, the brightest peaks of each; NaN-padded (n, P)."""
    n_slots = qy.shape[-1]
    present = np.isfinite(qy) & np.isfinite(qx)
    strength = np.ones_like(qy) if intensity is None else np.asarray(intensity, dtype=np.float64)
    if strength.shape != qy.shape:
        raise ValueError(f"intensity has shape {strength.shape}, the positions {qy.shape}")
    usable = np.flatnonzero(present.reshape(-1, n_slots).sum(1) >= 3)
    if not len(usable):
        raise NoLatticeError(
            f"none of the {present[..., 0].size} patterns has three peaks, so there is no lattice to find; "
            "lower the detection threshold (min_relative_intensity, or threshold of the network)"
        )
    rows = usable[np.unique(np.linspace(0, len(usable) - 1, min(_MAX_PATTERNS, len(usable))).astype(int))]
    y, x, w = (np.where(present, a, np.nan).reshape(-1, n_slots)[rows] for a in (qy, qx, strength))
    w = np.where(np.isfinite(y), np.maximum(np.nan_to_num(w), 0), np.nan)
    order = np.argsort(np.where(np.isfinite(w), -w, np.inf), axis=1, kind="stable")[:, :_MAX_PEAKS]
    return tuple(np.take_along_axis(a, order, 1) for a in (y, x, w))  # type: ignore[return-value]


def _neighbour_distance(y: Array, x: Array) -> float:
    """Typical distance of a peak from its nearest neighbour, px."""
    squared = (y[:, :, None] - y[:, None]) ** 2 + (x[:, :, None] - x[:, None]) ** 2
    squared[:, np.arange(y.shape[1]), np.arange(y.shape[1])] = np.nan
    nearest = np.min(np.where(np.isfinite(squared), squared, np.inf), axis=2)
    spacing = float(np.sqrt(np.median(nearest[np.isfinite(nearest)])))
    if spacing < 1e-3:
        raise NoLatticeError(
            "the peaks lie on top of each other; set min_peak_spacing to about the disk diameter"
        )
    return spacing


def _clipped(strength: Array) -> Array:
    """Weights 0 to 1: the stronger quarter of each pattern counts fully, no bright beam decides alone."""
    ordered, count = np.sort(strength, axis=1), np.isfinite(strength).sum(1)  # NaN last; 100 x nanquantile
    place = 0.75 * np.maximum(count - 1, 0)
    low = place.astype(int)[:, None]
    high = np.minimum(low + 1, np.maximum(count - 1, 0)[:, None])
    below, above = np.take_along_axis(ordered, low, 1), np.take_along_axis(ordered, high, 1)
    level = below + (place[:, None] - low) * (above - below)
    return np.minimum(strength / np.where(level > 0, level, 1), 1)


def _frequent_differences(y: Array, x: Array, weight: Array, spacing: float) -> tuple[Array, Array]:
    """Recurring vectors (y, x) between peaks, one of each pair +v, -v, and their excess over chance."""
    blur = float(np.clip(0.05 * spacing, 0.5, 3.0))  # px
    half = max(np.nanmax(y) - np.nanmin(y), np.nanmax(x) - np.nanmin(x)) + 3 * blur
    scale = max(blur / 1.5, half / 600)  # px per bin
    n = int(np.ceil(half / scale))
    histogram = np.zeros((2 * n + 1, 2 * n + 1))
    i, j = np.triu_indices(y.shape[1], 1)
    for start in range(0, len(y), 128):
        part = slice(start, start + 128)
        dy, dx, w = y[part, i] - y[part, j], x[part, i] - x[part, j], weight[part, i] * weight[part, j]
        histogram += splat_peaks(dy / scale + n, dx / scale + n, w, histogram.shape)
    histogram += histogram[::-1, ::-1].copy()  # every pair counts in both directions
    smooth = ndimage.gaussian_filter(histogram, blur / scale, mode="constant")
    window = 2 * int(0.35 * spacing / scale) + 1
    excess = smooth - ndimage.uniform_filter(smooth, 2 * window + 1, mode="constant")
    peak = (ndimage.maximum_filter(smooth, window, mode="constant") == smooth) & (excess > 0)
    rows, columns = np.nonzero(peak)
    v = np.stack([rows - n, columns - n], 1).astype(np.float64)
    keep = ((v[:, 0] > 0) | ((v[:, 0] == 0) & (v[:, 1] > 0))) & (np.hypot(*v.T) * scale > 0.4 * spacing)
    v, votes = v[keep], excess[rows[keep], columns[keep]]
    order = np.lexsort((v[:, 1], v[:, 0], -votes))[:60]
    order = order[votes[order] > 0.03 * votes.max(initial=0)]
    v, votes = v[order], votes[order]
    reach = max(1, int(2 * blur / scale))
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    for index, (row, column) in enumerate(
        (v + n).astype(int)
    ):  # centre of mass around each of at most 60 maxima
        around = histogram[np.clip(row + dy, 0, 2 * n), np.clip(column + dx, 0, 2 * n)]
        if around.sum() > 0:
            v[index] += (around * dy).sum() / around.sum(), (around * dx).sum() / around.sum()
    return v * scale, votes


def _consensus(vectors: Array, votes: Array, spacing: float) -> Array:
    """The coarsest lattice that explains nearly as many votes as the best one."""
    length = np.hypot(*vectors.T)
    choice = sorted(set(np.argsort(length, kind="stable")[:12]) | set(range(min(12, len(vectors)))))
    found: list[tuple[float, float, Array]] = []
    for a in choice:
        for b in choice:
            g = np.array([vectors[a], vectors[b]])
            area = abs(np.linalg.det(g))
            if b <= a or area < 0.15 * spacing**2 or area < 0.1 * length[a] * length[b]:
                continue
            g = _refine(reduce_basis(g)[0], vectors, votes)
            area = abs(np.linalg.det(g))
            tolerance = np.minimum(np.maximum(1.5, 0.04 * length), 0.2 * np.hypot(*g.T).min())
            distance = _distance(vectors, g)
            chance = np.pi * tolerance**2 / max(area, 1e-9)
            found.append((float((votes * ((distance <= tolerance) - chance)).sum()), float(area), g))
    if not found:
        raise NoLatticeError(
            "the peaks do not span a plane: all patterns show one row of reflections or too few; lower the "
            "detection threshold, or give the vectors: basis=((g1_y, g1_x), (g2_y, g2_x))"
        )
    best = max(score for score, _, _ in found)
    good = [entry for entry in found if entry[0] >= 0.9 * best]
    coarsest = max(area for _, area, _ in good)
    return max((entry for entry in good if entry[1] > 0.8 * coarsest), key=lambda entry: entry[0])[2]


def _distance(vectors: Array, g: Array) -> Array:
    """Distance of each vector from the nearest lattice vector."""
    return np.hypot(*(vectors - np.rint(vectors @ np.linalg.inv(g)) @ g).T)


def _refine(g: Array, vectors: Array, votes: Array) -> Array:
    """Least-squares lattice through the difference vectors near its sites, short ones first."""
    longest = np.hypot(*g.T).max()
    length = np.hypot(*vectors.T)
    for reach in (1.5, 2.6, 4.0):
        index = np.rint(vectors @ np.linalg.inv(g))
        near = (length <= reach * longest) & (_distance(vectors, g) < 0.2 * np.hypot(*g.T).min())
        weight = votes * near
        normal = (index * weight[:, None]).T @ index
        if np.linalg.det(normal) > 1e-6 * np.trace(normal) ** 2:
            g = np.linalg.solve(normal, (index * weight[:, None]).T @ vectors)
    return g


def _origin(y: Array, x: Array, strength: Array, g: Array) -> Array:
    """The lattice site that carries most intensity over the scan."""
    centre = np.array([np.nanmedian(y), np.nanmedian(x)])
    inverse = np.linalg.inv(g)
    h, k = (np.stack([y, x], -1) - centre) @ inverse[:, 0], (np.stack([y, x], -1) - centre) @ inverse[:, 1]
    near = np.where(h**2 + k**2 < 3**2, np.nan_to_num(_clipped(strength)), 0)
    offset = [np.angle((near * np.exp(2j * np.pi * np.nan_to_num(i))).sum()) / (2 * np.pi) for i in (h, k)]
    h, k = h - offset[0], k - offset[1]
    site = np.stack([np.rint(h), np.rint(k)], -1)
    close = np.isfinite(h) & ((h - site[..., 0]) ** 2 + (k - site[..., 1]) ** 2 < 0.25**2)
    if not close.any():
        return centre
    sites, member = np.unique(site[close], axis=0, return_inverse=True)
    total = np.bincount(member.ravel(), strength[close])
    likely = np.flatnonzero(total >= 0.98 * total.max())
    chosen = likely[np.argmin(np.hypot(*((sites[likely] + offset) @ g).T))]
    here = close & (site == sites[chosen]).all(-1)
    return np.array([np.median(y[here]), np.median(x[here])])

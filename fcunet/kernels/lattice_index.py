"""Peaks and lattice sites: which site a peak belongs to, and the linear algebra of many small fits (NumPy).

Positions and vectors are (y, x) in detector pixels. A lattice `g` has rows g1, g2; a peak with indices (h, k)
lies at ``origin + h * g1 + k * g2``. Peaks are padded with NaN along the last axis, in any order.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

DEFAULT_SPACING = 0.3  # max_peak_spacing in units of the shortest lattice vector


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
    qy, qx = as_peaks(qy, qx)
    lead, shape = qy.shape[:-1], (-1, qy.shape[-1])
    g, origin = check_basis(g), broadcast(origin, (*lead, 2), "origin").reshape(-1, 2)
    spacing = checked_spacing(max_peak_spacing, g)
    g = np.broadcast_to(g, (*lead, 2, 2)).reshape(-1, 2, 2)
    y, x = qy.reshape(shape) - origin[:, :1], qx.reshape(shape) - origin[:, 1:]
    present = np.isfinite(y) & np.isfinite(x)
    y, x = np.where(present, y, 0), np.where(present, x, 0)
    h, k, distance = nearest_site(y, x, np.zeros((len(y), 2)), g)
    indexed = one_per_site(h, k, distance, present & (distance <= spacing**2))
    h, k = (np.where(indexed, i, 0).astype(np.int64).reshape(qy.shape) for i in (h, k))
    return h, k, indexed.reshape(qy.shape)


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


def as_peaks(qy, qx) -> tuple[Array, Array]:
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


def checked_spacing(value: float | None, g: Array) -> float:
    """Checked `max_peak_spacing`."""
    if value is None:
        return DEFAULT_SPACING * float(np.sqrt((g**2).sum(-1).min()))
    if not value > 0:
        raise ValueError(
            f"max_peak_spacing is {value}, needed is a distance in px above 0, or None for the default"
        )
    return float(value)


def broadcast(values, shape, name) -> Array:
    """As float64 of `shape`."""
    array = np.asarray(values, dtype=np.float64)
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name} has shape {array.shape}, which does not fit {shape}") from None


def fractional(y, x, inverse):
    """Real-valued indices of positions; `inverse` is inv(g), (2, 2) or (n, 2, 2)."""
    inverse = inverse[..., None]
    return (
        y * inverse[..., 0, 0, :] + x * inverse[..., 1, 0, :],
        y * inverse[..., 0, 1, :] + x * inverse[..., 1, 1, :],
    )


def nearest_site(y, x, origin, g):
    """Indices (as floats) of the nearest sites, and squared distances from them; g reduced, (n, 2, 2)."""
    h, k = fractional(y - origin[:, :1], x - origin[:, 1:], invert(g))
    h, k = np.rint(h, out=h), np.rint(k, out=k)
    ry, rx = residuals(y, x, h, k, origin, g)
    ry *= ry
    rx *= rx
    ry += rx
    return h, k, ry


def invert(g):
    """inv(g) for g (n, 2, 2), zero where g is singular."""
    determinant = g[:, 0, 0] * g[:, 1, 1] - g[:, 0, 1] * g[:, 1, 0]
    singular = np.abs(determinant) <= 1e-9 * (g**2).sum((1, 2))
    scale = np.where(singular, 0, 1 / np.where(singular, 1, determinant))
    adjugate = np.stack([g[:, 1, 1], -g[:, 0, 1], -g[:, 1, 0], g[:, 0, 0]], -1)
    return (adjugate * scale[:, None]).reshape(-1, 2, 2)


def one_per_site(h, k, distance2, candidates):
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


def residuals(y, x, h, k, origin, g):
    """Peak minus site, g (2, 2) or (n, 2, 2)."""
    g, out = g[..., None], []
    for i, v in enumerate((y, x)):  # in place: arrays made anew take most of the time
        site = h * g[..., 0, i, :]
        site += k * g[..., 1, i, :]
        site += origin[:, i, None]
        out.append(np.subtract(v, site, out=site))
    return out[0], out[1]


def normal_equations(w, h, k, ry, rx):
    """A^T W A (n, 3, 3) and A^T W r (n, 3, 2) for rows A = (1, h, k)."""

    def total(a, b):
        return np.einsum("np,np->n", a, b)

    wh, wk = w * h, w * k
    s, sh, sk, hh, hk, kk = w.sum(1), wh.sum(1), wk.sum(1), total(wh, h), total(wh, k), total(wk, k)
    normal = np.stack([s, sh, sk, sh, hh, hk, sk, hk, kk], -1).reshape(-1, 3, 3)
    return normal, right_sides((w, wh, wk), ry, rx)


def right_sides(rows, ry, rx):
    """A^T W r (n, 3, 2) for the weighted rows (w, w h, w k), (n, P) each."""
    columns = [np.einsum("np,np->n", a, r) for a in rows for r in (ry, rx)]
    return np.stack(columns, -1).reshape(-1, 3, 2)


def invert_symmetric(matrix):
    """Inverses of symmetric matrices (n, 3, 3) from their cofactors: a third of the time of LAPACK's."""
    a, b, c, d, e, f = (matrix[:, i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)))
    first = d * f - e * e, c * e - b * f, b * e - c * d
    rest = a * f - c * c, b * c - a * e, a * d - b * b
    cofactors = np.stack([*first, first[1], *rest[:2], first[2], *rest[1:]], -1)
    determinant = a * first[0] + b * first[1] + c * first[2]
    return (cofactors / determinant[:, None]).reshape(-1, 3, 3)


def well_posed(normal):
    """True where the sites span the plane: neither too few nor all on one line."""
    total = normal[:, 0, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = normal[:, 0, 1:] / total[:, None]
        moments = normal[:, 1:, 1:] / total[:, None, None] - mean[:, :, None] * mean[:, None, :]
    trace = moments[:, 0, 0] + moments[:, 1, 1]
    determinant = moments[:, 0, 0] * moments[:, 1, 1] - moments[:, 0, 1] ** 2
    # smaller spreads and areas than these are rounding errors, not sites
    return (trace > 1e-10 * (1 + (mean**2).sum(1))) & (determinant > 1e-9 * trace**2)


def row_median(values, where):
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

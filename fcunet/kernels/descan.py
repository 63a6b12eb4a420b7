"""The beam centre over the scan: ways to find it in a pattern, and smooth surfaces through what was found.

NumPy and SciPy; positions (y, x) in px, pixel centres at integers, missing = NaN.
"""

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import fft as sfft
from scipy import ndimage as ndi

from .beam import fill, peak_near
from .probe import edge_response, response_noise, stabilise

Array = NDArray[np.float64]
Model = Literal["constant", "plane", "parabola"]
Method = Literal["disk", "brightest", "mass", "friedel"]

METHODS, MODELS = get_args(Method), get_args(Model)
N_TERMS: dict[str, int] = {"constant": 1, "plane": 3, "parabola": 6}
_MIN_POINTS = {"constant": 1, "plane": 8, "parabola": 18}
_TRIES = 400


def surface_terms(position: NDArray, n_terms: int) -> Array:
    """``1, y, x, y^2, yx, x^2`` of positions (..., 2), the first `n_terms` of them: (..., n_terms)."""
    y, x = np.moveaxis(np.asarray(position, dtype=float), -1, 0)
    return np.stack([np.ones_like(y), y, x, y * y, y * x, x * x][:n_terms], axis=-1)


def surface_at(coefficients: NDArray, position: NDArray) -> Array:
    """Surfaces (2, n_terms) as of `fit_surface` at scan positions (..., 2): (..., 2)."""
    return surface_terms(position, coefficients.shape[1]) @ coefficients.T


def surface_map(coefficients: NDArray, shape: tuple[int, int]) -> Array:
    """Surfaces (2, n_terms) as of `fit_surface` at every position of a scan, (scan_y, scan_x, 2)."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return surface_at(coefficients, np.stack([y, x], axis=-1))


def fit_surface(
    position: NDArray,
    value: NDArray,
    *,
    model: Model = "plane",
    robust: bool = True,
    slack_px: float = 0.3,
) -> tuple[Array, NDArray[np.bool_]]:
    """Smooth surfaces through measured beam centres.

    Least median of squares over random subsets, then least squares over the inliers; of least norm, so that a
    scan of one row has no slope along y.

    Parameters
    ----------
    position : ndarray, shape (n, 2)
        Scan positions.
    value : ndarray, shape (n, 2)
        Centres in px; NaN = not found.
    model : {"plane", "parabola", "constant"}
        With too few points (8 for a plane, 18 for a parabola) the next simpler one is fitted.
    robust : bool
        Leave outliers out: those beyond three robust standard deviations, and beyond `slack_px`.
    slack_px : float
        A point closer to the surface than this is never an outlier.

    Returns
    -------
    coefficients : ndarray, shape (2, n_terms)
        Per axis of the centre, of ``1, y, x, y^2, yx, x^2``: 3 columns, or 6 for a parabola. NaN without a
        value.
    inlier : ndarray of bool, shape (n,)
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r} of the descan; use one of {', '.join(MODELS)}")
    n_out = 6 if model == "parabola" else 3
    good = np.isfinite(value).all(1)
    if not good.any():
        return np.full((2, n_out), np.nan), good
    p, v = position[good].astype(float), value[good]
    order = MODELS.index(model)
    while len(p) < _MIN_POINTS[MODELS[order]]:
        order -= 1
    middle, scale = p.mean(0), np.maximum(np.ptp(p, axis=0) / 2, 1.0)
    n_terms = N_TERMS[MODELS[order]]
    terms = surface_terms((p - middle) / scale, n_terms)
    best = np.zeros((2, n_terms))
    best[:, 0] = np.median(v, axis=0)
    inlier = np.ones(len(p), dtype=bool)
    if robust and n_terms > 1:
        rng = np.random.default_rng(0)
        best_error = math.inf
        for _ in range(_TRIES):
            pick = rng.choice(len(p), n_terms, replace=False)
            surface = np.linalg.lstsq(terms[pick], v[pick], rcond=1e-6)[0].T
            error = float(np.median(np.sum((terms @ surface.T - v) ** 2, axis=1)))
            if error < best_error:
                best, best_error = surface, error
    for _ in range(3 if robust else 1):
        if robust:
            distance = np.linalg.norm(terms @ best.T - v, axis=1)
            inlier = distance <= max(slack_px, 3 * 1.4826 * float(np.median(distance)))
        best = np.linalg.lstsq(terms[inlier], v[inlier], rcond=1e-6)[0].T
    keep = good.copy()
    keep[good] = inlier
    return _uncentred(best, middle, scale, n_out), keep


def _uncentred(c: Array, middle: Array, scale: Array, n_out: int) -> Array:
    """Coefficients in ``(p - middle) / scale`` as coefficients in p, (2, n_out)."""
    full = np.zeros((2, 6))
    full[:, : c.shape[1]] = c
    (sy, sx), (my, mx) = 1 / scale, middle / scale
    a, b, d, e, f, g = full.T
    out = np.stack(
        [
            a - b * my - d * mx + e * my * my + f * my * mx + g * mx * mx,
            (b - 2 * e * my - f * mx) * sy,
            (d - 2 * g * mx - f * my) * sx,
            e * sy * sy,
            f * sy * sx,
            g * sx * sx,
        ],
        axis=1,
    )
    return out[:, :n_out]


def find_centres(
    patterns: NDArray,
    predicted: NDArray,
    *,
    method: Method = "disk",
    radius_px: float,
    reach_px: float,
    mask: NDArray[np.bool_] | None = None,
    width_px: float | None = None,
) -> Array:
    """Beam centre in every pattern.

    Parameters
    ----------
    patterns : ndarray, shape (n, qy, qx)
        NaN where a pixel is bad.
    predicted : ndarray, shape (n, 2)
        Where to look.
    method : {"disk", "brightest", "mass", "friedel"}
        "disk": the round edge nearest to the prediction; "brightest": the edge of the disk of most electrons
        within reach; "mass": centre of mass of the direct beam, quick, but pulled by its texture and
        by other disks; "friedel": the point about which the pattern is most symmetric, which needs no direct
        beam and so works with a beam stop.
    radius_px : float
        Radius of the disks.
    reach_px : float
        Largest distance from the prediction.
    mask : ndarray of bool, shape (qy, qx), optional
        True = do not use, such as a beam stop; for "friedel".
    width_px : float, optional
        Width of the edge, for "disk" and "brightest"; see `fcunet.kernels.probe.edge_response`.

    Returns
    -------
    ndarray, shape (n, 2)
        NaN where nothing is found within reach.
    """
    out = np.full((len(patterns), 2), np.nan)
    for first in range(0, len(patterns), 8):
        some = slice(first, first + 8)
        block, near = np.asarray(patterns[some], dtype=float), predicted[some]
        if method == "friedel":
            out[some] = friedel_centres(block, near, reach_px=reach_px, mask=mask)
        elif method == "mass":
            out[some] = [
                centre_of_beam(fill(p), s, radius_px, reach_px) for p, s in zip(block, near, strict=True)
            ]
        elif method in ("disk", "brightest"):
            if method == "brightest":
                near = np.stack(
                    [
                        brightest_disk(fill(p), s, radius_px, reach_px)
                        for p, s in zip(block, near, strict=True)
                    ]
                )
            images = np.stack([stabilise(p) for p in block])
            response = edge_response(images, np.array([radius_px]), width_px=width_px)[0]
            reach = min(reach_px, radius_px + 2) if method == "brightest" else reach_px
            out[some] = [
                peak_near(r, s, reach, 4 * response_noise(r)) if np.isfinite(s).all() else np.full(2, np.nan)
                for r, s in zip(response, near, strict=True)
            ]
        else:
            raise ValueError(f"unknown method {method!r} for the beam centre; use {', '.join(METHODS)}")
    return out


def brightest_disk(pattern: NDArray, start: NDArray, radius_px: float, reach_px: float) -> Array:
    """Middle, to a pixel, of the circle that holds most electrons within reach; NaN in an empty pattern."""
    if not np.isfinite(start).all() or not pattern.max() > 0:
        return np.full(2, np.nan)
    # three box filters come near a disk of the same variance and cost nothing
    smooth = ndi.gaussian_filter(pattern, radius_px / 2, mode="constant")
    y, x = np.indices(pattern.shape)
    near = np.hypot(y - start[0], x - start[1]) <= reach_px
    if not near.any():
        return np.full(2, np.nan)
    at = np.argmax(np.where(near, smooth, -np.inf))
    return np.array(np.unravel_index(at, pattern.shape), dtype=float)


def centre_of_beam(pattern: NDArray, start: NDArray, radius_px: float, reach_px: float) -> Array:
    """Centre of mass of the direct beam: within 1.3 radii of itself, above the median of what is around."""
    at = brightest_disk(pattern, start, radius_px, reach_px)
    if np.isnan(at).any():
        return at
    y, x = np.indices(pattern.shape)
    reach = 1.3 * radius_px + 1
    for _ in range(6):
        r = np.hypot(y - at[0], x - at[1])
        ring = (r > reach) & (r <= reach + 2)
        level = float(np.median(pattern[ring])) if ring.any() else 0.0
        # a soft rim: the sum must not jump when a pixel enters
        weight = np.clip(pattern - level, 0, None) * np.clip(reach + 0.5 - r, 0, 1)
        total = weight.sum()
        if not total > 0:
            return np.full(2, np.nan)
        new = np.array([(weight * y).sum(), (weight * x).sum()]) / total
        moved = float(np.hypot(*(new - at)))
        at = new
        if moved < 1e-3:
            break
    return at if np.hypot(*(at - start)) <= reach_px + radius_px else np.full(2, np.nan)


def friedel_centres(
    patterns: NDArray, predicted: NDArray, *, reach_px: float, mask: NDArray[np.bool_] | None = None
) -> Array:
    """Point about which each pattern is most symmetric under inversion.

    The disks of g and -g lie on either side of the centre at equal distance, whatever their intensities. The
    pattern is correlated with its own inversion over the pixels that both see; the correlation coefficient is
    highest at twice the centre. Under a beam stop there are no such pixels, and none are needed.

    Parameters
    ----------
    patterns : ndarray, shape (n, qy, qx)
        NaN where a pixel is bad.
    predicted : ndarray, shape (n, 2)
    reach_px : float
        Less than half the distance of two disks: the middle between two disks is nearly a centre as well.
    mask : ndarray of bool, shape (qy, qx), optional
        True = do not use.

    Returns
    -------
    ndarray, shape (n, 2)
        NaN where the pattern is empty or has no maximum within reach.
    """
    n, rows, columns = patterns.shape
    seen = np.isfinite(patterns)
    if mask is not None:
        seen &= ~mask
    image = np.stack([stabilise(np.where(s, p, np.nan)) for p, s in zip(patterns, seen, strict=True)])
    level = np.array([v[s].mean() if s.any() else 0.0 for v, s in zip(image, seen, strict=True)])
    image = np.where(seen, image - level[:, None, None], 0.0)
    shape = tuple(sfft.next_fast_len(2 * k, True) for k in (rows, columns))
    m, f, f2 = (sfft.rfft2(v, shape) for v in (seen.astype(float), image, image**2))

    def back(product: NDArray) -> Array:
        return sfft.irfft2(product, shape)[:, : 2 * rows - 1, : 2 * columns - 1]

    pairs = np.maximum(back(m * m), 1.0)  # number of pixels seen on both sides, (n, 2 qy - 1, 2 qx - 1)
    first, second = back(f * m), back(f2 * m)
    variance = second - first**2 / pairs
    usable = (pairs > 0.2 * rows * columns) & (variance > 1e-9 * second.max(initial=1e-30))
    score = np.where(usable, (back(f * f) - first**2 / pairs) / np.where(usable, variance, 1.0), -1.0)
    return np.stack(
        [peak_near(s, 2 * c, 2 * reach_px) / 2 for s, c in zip(score, np.asarray(predicted), strict=True)]
    )


def find_beam_stop(mean: NDArray, *, grow_px: int = 2) -> NDArray[np.bool_]:
    """Shadow of a beam stop in a mean pattern: the largest connected region darker than its own radius.

    A pixel is in the shadow where it holds under a quarter of the median at the same distance from the middle
    of the detector. Nothing is a beam stop that does not reach a border and cover the middle third of the
    detector in part.

    Parameters
    ----------
    mean : ndarray, shape (qy, qx)
        NaN = bad pixel.
    grow_px : int
        By how much the shadow is widened, for its soft rim.

    Returns
    -------
    ndarray of bool, shape (qy, qx)
        True = in the shadow; all False without a beam stop.
    """
    image = ndi.gaussian_filter(fill(mean), 1.0)
    rows, columns = image.shape
    y, x = np.indices(image.shape)
    ring = np.hypot(y - (rows - 1) / 2, x - (columns - 1) / 2).astype(int)
    usual = ndi.median(image, ring, np.arange(ring.max() + 1))
    # in the middle the stop itself may be the usual: the brightest ring further out stands for it
    usual = np.maximum.accumulate(usual[::-1])[::-1][ring]
    dark = image < 0.25 * usual
    label, n = ndi.label(dark)
    nothing = np.zeros(image.shape, dtype=bool)
    if not n:
        return nothing
    size = ndi.sum_labels(dark, label, np.arange(1, n + 1))
    stop = label == 1 + int(np.argmax(size))
    inner = stop[rows // 3 : rows - rows // 3, columns // 3 : columns - columns // 3]
    rim = stop[0].any() or stop[-1].any() or stop[:, 0].any() or stop[:, -1].any()
    if not rim or inner.mean() < 0.02:
        return nothing
    return ndi.binary_dilation(stop, iterations=grow_px) if grow_px > 0 else stop

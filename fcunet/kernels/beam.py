"""Helpers on stacks of patterns for calibration: bad pixels, aligned means, a peak near a point.

NumPy and SciPy; positions and shifts are (y, x) in px, pixel centres at integers, missing = NaN.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage as ndi


def find_bad_pixels(patterns: NDArray) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Hot and dead pixels: those unlike all their neighbours in most patterns.

    A pixel is hot where the mean over the patterns (without the highest value, which may be a cosmic ray)
    is over three times its third-highest neighbour, dead where it is under a tenth of its third-lowest
    one, and in both cases when that is far outside the noise. Even a disk of 1 px radius has brighter
    neighbours than that, so the direct beam is not taken for a fault.

    Parameters
    ----------
    patterns : ndarray, shape (n, qy, qx)
        NaN = known to be bad.

    Returns
    -------
    hot, dead : ndarray of bool, shape (qy, qx)
        A pixel that is NaN in every pattern is dead.
    """
    n = len(patterns)
    value = np.asarray(patterns, dtype=float)
    blind = np.isnan(value).all(0)
    if blind.all():
        return np.zeros_like(blind), blind
    value = np.where(np.isnan(value), 0, value)
    total = value.sum(0)
    mean = (total - value.max(0)) / (n - 1) if n >= 3 else total / n
    low = float(np.percentile(mean[~blind], 1))
    mean = np.clip(mean - min(low, 0.0), 0, None)
    footprint = np.ones((3, 3), dtype=bool)
    footprint[1, 1] = False
    high = ndi.rank_filter(np.where(blind, 0, mean), 5, footprint=footprint, mode="reflect")
    least = ndi.rank_filter(np.where(blind, np.inf, mean), 2, footprint=footprint, mode="reflect")
    around = ndi.median_filter(mean, footprint=footprint, mode="reflect")
    # the noise grows with the level; in units of what one pattern can add it is that of counts at least
    root = np.sqrt(n * mean + 0.375) - np.sqrt(n * around + 0.375)
    noise = max(1.4826 * float(np.median(np.abs(root[~blind]))), 0.5 if np.any(value % 1 == 0) else 0.0)
    hot = (mean > 3 * high) & (root > 8 * noise) & ~blind
    dead = (mean < 0.1 * least) & (root < -8 * noise) & ~blind
    return hot, dead | blind


def aligned_mean(patterns: NDArray, shift: NDArray) -> NDArray[np.float64]:
    """Mean of patterns moved by whole pixels; NaN where none reaches."""
    total = np.zeros(patterns.shape[-2:])
    count = np.zeros(patterns.shape[1:])
    ny, nx = patterns.shape[-2:]
    for pattern, (dy, dx) in zip(patterns, np.rint(shift).astype(int), strict=True):
        to = slice(max(0, dy), min(ny, ny + dy)), slice(max(0, dx), min(nx, nx + dx))
        of = slice(max(0, -dy), min(ny, ny - dy)), slice(max(0, -dx), min(nx, nx - dx))
        good = np.isfinite(pattern[of])
        total[to] += np.where(good, pattern[of], 0)
        count[to] += good
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def fill(pattern: NDArray) -> NDArray[np.float64]:
    """A pattern with its NaN replaced by the nearest good pixel."""
    bad = np.isnan(pattern)
    if not bad.any():
        return pattern.astype(float)
    if bad.all():
        return np.zeros(pattern.shape)
    index = ndi.distance_transform_edt(bad, return_distances=False, return_indices=True)
    return pattern[tuple(index)].astype(float)


def peak_near(response: NDArray, start: NDArray, reach: float, floor: float = 0.0) -> NDArray[np.float64]:
    """Sub-pixel maximum of a map within `reach` of `start`; NaN if it is below `floor` or on the rim."""
    ny, nx = response.shape
    y0, y1 = max(0, math.ceil(start[0] - reach)), min(ny, math.floor(start[0] + reach) + 1)
    x0, x1 = max(0, math.ceil(start[1] - reach)), min(nx, math.floor(start[1] + reach) + 1)
    if y0 >= y1 or x0 >= x1:
        return np.full(2, np.nan)
    y, x = np.mgrid[y0:y1, x0:x1]
    part = np.where(np.hypot(y - start[0], x - start[1]) <= reach, response[y0:y1, x0:x1], -np.inf)
    iy, ix = np.unravel_index(part.argmax(), part.shape)
    py, px = int(iy) + y0, int(ix) + x0
    around = response[max(0, py - 1) : py + 2, max(0, px - 1) : px + 2]
    if response[py, px] <= floor or around.max() > response[py, px]:
        return np.full(2, np.nan)
    point = np.array([py, px], dtype=float)
    for axis, n in enumerate((ny, nx)):
        p = (py, px)[axis]
        if 0 < p < n - 1:
            line = response[py - 1 : py + 2, px] if axis == 0 else response[py, px - 1 : px + 2]
            bend = line[0] - 2 * line[1] + line[2]
            if bend < 0:
                point[axis] += float(np.clip(0.5 * (line[0] - line[2]) / bend, -0.5, 0.5))
    return point

"""How the scan is turned against the detector, from the centre of mass of the patterns.

Where patterns are moved by the gradient of a potential (or of a thickness), the centre of mass is a field
without curl in the axes of the scan. In those of the detector it has one, unless the two agree. With c the
curl and d the divergence of the field as measured, a turn by phi has the curl ``c cos phi - d sin phi``, so
that the best angle is an eigenvector of the 2 x 2 matrix of the sums of c c, c d and d d: no search. An angle
and its opposite, 180 degrees further, have the same curl; strain, a tensor, is the same for both.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class ScanRotation(NamedTuple):
    """Turn of the scan's +x from the detector's +x, towards +y, degrees, -90 to 90: known modulo 180."""

    rotation_degree: float
    transposed: bool
    std_degree: float
    curl: float  # curl left over divergence, 0 to 1, of the better case
    curl_other: float  # the same for the other case of transposition
    other_degree: float  # its best angle
    p_transposed: float  # share of resampled scans in which the matrix is transposed
    angle_known: bool
    transposition_known: bool


def curl_and_divergence(field: NDArray, step: tuple[float, float] = (1.0, 1.0)) -> tuple[Array, Array]:
    """Curl ``d field_y / dx - d field_x / dy`` and divergence of a field (y, x, 2) in (y, x), cell by cell.

    Finite differences over cells of 2 x 2 positions, shape (y - 1, x - 1); NaN where one of the four is.
    """
    f = np.asarray(field, dtype=float)
    dy = (f[1:, :-1] + f[1:, 1:] - f[:-1, :-1] - f[:-1, 1:]) / (2 * step[0])
    dx = (f[:-1, 1:] + f[1:, 1:] - f[:-1, :-1] - f[1:, :-1]) / (2 * step[1])
    return dx[..., 0] - dy[..., 1], dy[..., 0] + dx[..., 1]


def find_scan_rotation(
    patches: list[NDArray], *, step: tuple[float, float] = (1.0, 1.0), n_resampled: int = 200, seed: int = 0
) -> ScanRotation:
    """Angle and transposition with the least curl.

    Parameters
    ----------
    patches : list of ndarray, each of shape (y, x, 2)
        Centres of mass (y, x) of connected parts of the scan, detector px, descan taken out; NaN = unknown.
    step : tuple of float
        Scan step along y and x, in any one unit.
    n_resampled : int
        Bootstrap samples, of tiles of cells, for the uncertainty.
    seed : int

    Returns
    -------
    ScanRotation
        `angle_known` is False where the standard deviation is above 5 degrees or curl and divergence hardly
        differ, `transposition_known` where under 95 % of the resampled scans agree. NaN without a cell.
    """
    tables = [_sums_of_tiles(patches, step, swap) for swap in (False, True)]
    whole = [t.sum(0) for t in tables]
    n = len(tables[0])
    if not n or not all(w[0] + w[2] > 0 for w in whole):
        return ScanRotation(math.nan, False, *(math.nan,) * 5, False, False)
    curl = [_least_curl(w)[1] for w in whole]
    swap = bool(curl[1] < curl[0])
    angle = _least_curl(whole[swap])[0]
    rng = np.random.default_rng(seed)
    turns, swapped = [], 0
    for _ in range(n_resampled):
        pick = rng.integers(0, n, n)
        sums = [t[pick].sum(0) for t in tables]
        least = [_least_curl(s) for s in sums]
        swapped += least[1][1] < least[0][1]
        turns.append(least[swap][0])
    # an axis, not an arrow: angles are doubled before they are averaged
    away = np.angle(np.exp(2j * (np.array(turns) - angle))) / 2
    std = math.degrees(float(np.sqrt(np.mean(away**2))))
    share = swapped / n_resampled
    agreed = share if swap else 1 - share
    return ScanRotation(
        math.degrees(angle),
        swap,
        std,
        float(curl[swap]),
        float(curl[not swap]),
        math.degrees(_least_curl(whole[not swap])[0]),
        share,
        bool(n >= 4 and std < 5 and curl[swap] < 0.8),
        bool(n >= 4 and agreed >= 0.95),
    )


def _sums_of_tiles(patches: list[NDArray], step: tuple[float, float], swap: bool, side: int = 4) -> Array:
    """Sums of c c, c d, d d over tiles of `side` x `side` cells, (tiles, 3)."""
    out = []
    for patch in patches:
        field = np.asarray(patch, dtype=float)
        field = field[..., ::-1] if swap else field
        c, d = curl_and_divergence(field, step)
        for y in range(0, c.shape[0], side):
            for x in range(0, c.shape[1], side):
                cell = slice(y, y + side), slice(x, x + side)
                good = np.isfinite(c[cell]) & np.isfinite(d[cell])
                if good.any():
                    cc, dd = c[cell][good], d[cell][good]
                    out.append([cc @ cc, cc @ dd, dd @ dd])
    return np.array(out, dtype=float).reshape(-1, 3)


def _least_curl(sums: Array) -> tuple[float, float]:
    """Angle (rad, -pi/2 to pi/2) of the scan that leaves least curl, and that over the divergence left."""
    cc, cd, dd = sums
    # the field in scan axes is R(-angle) field: its curl is c cos(angle) - d sin(angle)
    angle = 0.5 * math.atan2(2 * cd, dd - cc)
    spread = math.hypot((cc - dd) / 2, cd)
    least = max((cc + dd) / 2 - spread, 0.0)
    return angle, math.sqrt(least / max((cc + dd) / 2 + spread, 1e-300))

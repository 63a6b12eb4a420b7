"""Read some patterns of a scan, few shards at a time."""

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from . import schema
from .shards import DamagedBlockError

N_PATTERNS = 64
PATCH = 2  # the sample is read in patches of PATCH x PATCH neighbouring positions
SAMPLE_BYTES = 512 * 2**20


@dataclass(frozen=True, eq=False)
class Sample:
    """Some patterns of a scan.

    `patterns` (n, qy, qx) float32, bad or missing pixels NaN; `position` (n, 2) scan indices; `patch`
    (n,) number of the patch of neighbouring positions; `saturated` (qy, qx) share of the patterns in
    which a pixel sits at the top of the range.
    """

    patterns: NDArray[np.float32]
    position: NDArray[np.int64]
    patch: NDArray[np.int64]
    saturated: NDArray[np.float64]


def _patches(intensity: xr.DataArray, n_patterns: int, seed: int) -> list[tuple[slice, slice]]:
    """Slices of the scan to read: all of a small one, else patches spread over it, aligned with PATCH."""
    ny, nx = intensity.shape[:2]
    if ny * nx <= n_patterns:
        return [
            (slice(y, min(y + PATCH, ny)), slice(x, min(x + PATCH, nx)))
            for y in range(0, ny, PATCH)
            for x in range(0, nx, PATCH)
        ]
    py, px = min(PATCH, ny), min(PATCH, nx)
    wanted = max(1, n_patterns // (py * px))
    rows = min(max(1, round(math.sqrt(wanted * ny / nx))), math.ceil(ny / py), wanted)
    columns = min(max(1, wanted // rows), math.ceil(nx / px))
    rng = np.random.default_rng(seed)

    def starts(n: int, size: int, count: int) -> NDArray[np.int64]:
        edges = np.linspace(0, n, count + 1)
        middle = edges[:-1] + np.diff(edges) * rng.uniform(0.25, 0.75, count)
        return np.clip((middle / size).astype(int) * size, 0, n - size)

    return [
        (slice(y, y + py), slice(x, x + px))
        for y in np.unique(starts(ny, py, rows)).tolist()
        for x in np.unique(starts(nx, px, columns)).tolist()
    ]


def read_sample(datacube: xr.Dataset, *, n_patterns: int = N_PATTERNS, seed: int = 0) -> Sample:
    """Read about `n_patterns` patterns, in patches spread over the scan; at most 512 MiB of them.

    Parameters
    ----------
    datacube : Dataset
        `intensity` (scan_y, scan_x, qy, qx), lazy or not; `detector_mask` is honoured.
    n_patterns : int
        Patterns wanted.
    seed : int
        Of the choice of positions.

    Raises
    ------
    ValueError
        If the dataset is no datacube, or no pixel of the detector may be used.
    """
    schema.check_datacube(datacube)
    if n_patterns < 1:
        raise ValueError(f"n_patterns is {n_patterns}, but at least one pattern is needed")
    intensity = datacube["intensity"]
    if 0 in intensity.shape:
        raise ValueError(f"the scan is empty: intensity has the shape {intensity.shape}")
    detector = intensity.shape[2:]
    n_patterns = max(4, min(n_patterns, SAMPLE_BYTES // (8 * math.prod(detector))))
    use = datacube["detector_mask"].values if "detector_mask" in datacube else np.ones(detector, dtype=bool)
    if not use.any():
        raise ValueError(
            "detector_mask is False everywhere: no pixel to use; check the mask given to fcunet convert"
        )
    patterns, position, patch = [], [], []
    top = -math.inf
    damaged: DamagedBlockError | None = None
    for i, (sy, sx) in enumerate(_patches(intensity, n_patterns, seed)):
        try:
            block = intensity.isel(scan_y=sy, scan_x=sx).values
        except DamagedBlockError as err:  # one bad shard must not stop a run that can leave it out
            damaged = err
            continue
        flat = block.reshape(-1, *detector)
        patterns.append(flat)
        y, x = np.mgrid[sy, sx]
        position.append(np.stack([y.ravel(), x.ravel()], axis=1))
        patch.append(np.full(len(flat), i))
        if np.isfinite(flat[:, use]).any():
            top = max(top, float(np.nanmax(flat[:, use])))
    if not patterns:
        raise ValueError(f"no pattern of the sample can be read: {damaged}")
    raw = np.concatenate(patterns)
    at_top = (raw >= top) & use
    # a clipped detector shows its largest value again and again; a count of three or four is nothing of
    # the kind
    often = top > 15 and at_top.sum() >= 5 * len(raw)
    saturated = at_top.mean(0) if often else np.zeros(detector)
    out = raw.astype(np.float32)
    out[:, ~use] = np.nan
    out[~np.isfinite(out)] = np.nan
    return Sample(out, np.concatenate(position), np.concatenate(patch), saturated)

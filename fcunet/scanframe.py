"""How a scan is turned against its detector, from the centres of mass of connected parts of it."""

import math

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from . import schema
from .calibration import Calibration
from .datacube import block_grid
from .kernels.descan import fit_surface, surface_at
from .kernels.scanframe import ScanRotation, find_scan_rotation
from .shards import DamagedBlockError

__all__ = ["centres_of_mass", "measure_scan_rotation"]

_BYTES = 512 * 2**20
_PATCHES = 16


def centres_of_mass(patterns: NDArray, bad: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Centres of mass (..., 2), (y, x) px, of patterns (..., qy, qx) without their bad pixels."""
    use = ~bad
    rows, columns = np.indices(bad.shape)
    flat = np.nan_to_num(np.asarray(patterns, dtype=np.float64)).reshape(-1, bad.size)
    weights = np.stack([use.ravel(), (use * rows).ravel(), (use * columns).ravel()], axis=1).astype(float)
    total, y, x = (flat @ weights).T
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.where(total > 0, np.stack([y, x]) / total, np.nan).T
    return centre.reshape(*np.shape(patterns)[:-2], 2)


def _patches(datacube: xr.Dataset) -> list[tuple[slice, slice]]:
    """Connected parts of the scan, each within one block, spread over it; all of a small scan."""
    intensity = datacube["intensity"]
    ny, nx = intensity.shape[:2]
    pattern_bytes = math.prod(intensity.shape[2:]) * 8
    if ny * nx * pattern_bytes <= _BYTES:
        return [(slice(0, ny), slice(0, nx))]
    grid = block_grid(intensity)
    side = max(4, int(math.sqrt(_BYTES / _PATCHES / pattern_bytes)))
    chosen = np.unique(np.linspace(0, len(grid) - 1, min(_PATCHES, len(grid))).round().astype(int))
    out = []
    for block in chosen:
        ys, xs = grid.slices(*(int(v) for v in np.unravel_index(block, grid.n_blocks)))
        out.append(
            (
                slice(ys.start, min(ys.stop, ys.start + side)),
                slice(xs.start, min(xs.stop, xs.start + side)),
            )
        )
    return out


def measure_scan_rotation(datacube: xr.Dataset, measured: Calibration) -> ScanRotation:
    """Rotation and transposition that leave the field of the centre of mass without curl.

    Connected parts of the scan are read, at most 512 MiB of patterns at once. The descan, a plane through the
    centres of mass themselves, is taken out.

    Parameters
    ----------
    datacube : Dataset
    measured : Calibration
        For the bad pixels.

    Returns
    -------
    ScanRotation
        Known modulo 180 degrees, which strain does not see; `angle_known` and `transposition_known` say
        whether the data decide.
    """
    fields, positions = [], []
    for ys, xs in _patches(datacube):
        try:
            block = datacube["intensity"].isel(scan_y=ys, scan_x=xs).values
        except DamagedBlockError:
            continue
        # a row at a time in float
        fields.append(np.stack([centres_of_mass(row, measured.bad_pixels) for row in block]))
        positions.append(np.moveaxis(np.mgrid[ys, xs], 0, -1))
    if not fields:
        raise ValueError("no connected part of the scan can be read; look at: fcunet info STORE")
    everywhere = np.concatenate([p.reshape(-1, 2) for p in positions])
    plane = fit_surface(everywhere, np.concatenate([f.reshape(-1, 2) for f in fields]), robust=False)[0]
    flat = [f - surface_at(plane, p) for f, p in zip(fields, positions, strict=True)]
    step = []
    for dim in schema.SCAN_DIMS:
        values = datacube[dim].values if dim in datacube.coords else np.arange(datacube.sizes[dim])
        step.append(abs(float(values[1] - values[0])) if len(values) > 1 else 1.0)
    return find_scan_rotation(flat, step=(step[0], step[1]))

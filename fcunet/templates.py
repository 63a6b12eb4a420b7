"""A probe template that follows the optics: one per region of the scan, where the disks change over it."""

import math
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .calibrate import RadiusFit, refine_radius, vacuum_probe
from .calibration import Calibration
from .kernels.beam import aligned_mean
from .kernels.descan import find_centres
from .kernels.ellipse import Ellipse
from .kernels.probe import synthetic_probe
from .sample import Sample
from .shards import DamagedBlockError

__all__ = ["Templates", "measure_templates"]

_SIDE = 4  # patterns read per region: a square of this side in its middle
MAX_TEMPLATES = 16


class Templates(NamedTuple):
    """Probe templates (k, qy, qx), which to use at each position (scan_y, scan_x), and their grounds."""

    probes: NDArray[np.float32]
    template_index: NDArray[np.uint8]
    radius_px: NDArray[np.float64]  # (rows, columns) of the regions, as measured
    edge_sigma_px: NDArray[np.float64]
    source: str  # "vacuum" or "synthetic"
    change_px: float  # of the radius (or the edge, if that changes more) over the scan
    change_std_px: float

    @property
    def significant(self) -> bool:
        """Whether the disks change by more than three standard deviations, and more than 0.05 px."""
        return self.change_px > max(3 * self.change_std_px, 0.05)


def measure_templates(
    datacube: xr.Dataset,
    measured: Calibration,
    *,
    regions: tuple[int, int] = (3, 3),
    ellipse: Ellipse | None = None,
) -> Templates:
    """Radius and edge of the disks in each region of the scan, and a template for each.

    Over a vacuum (a separate scan, or one without a sample) the templates are the recorded beam itself. Else
    planes are fitted through radius and edge of the regions, and the template of a region is drawn from them.

    Parameters
    ----------
    datacube : Dataset
    measured : Calibration
        Beam centres, radius and edge of the whole scan.
    regions : tuple of int
        Rows and columns of regions, 16 in all at most.
    ellipse : Ellipse, optional
        Distortion of the detector, which makes round disks elliptical as well.

    Raises
    ------
    ValueError
        For more regions than positions, or more than 16.
    """
    scan = (datacube.sizes["scan_y"], datacube.sizes["scan_x"])
    if not (
        1 <= regions[0] <= scan[0] and 1 <= regions[1] <= scan[1] and math.prod(regions) <= MAX_TEMPLATES
    ):
        raise ValueError(
            f"{regions[0]} x {regions[1]} regions for templates; needed are at most {MAX_TEMPLATES}, and no "
            f"more than the scan of {scan[0]} x {scan[1]} has positions"
        )
    edges = [np.linspace(0, n, k + 1).round().astype(int) for n, k in zip(scan, regions, strict=True)]
    index = np.zeros(scan, dtype=np.uint8)
    fits: list[RadiusFit] = []
    vacuum: list[NDArray | None] = []
    middles = []
    for i, (y0, y1) in enumerate(zip(edges[0][:-1], edges[0][1:], strict=True)):
        for j, (x0, x1) in enumerate(zip(edges[1][:-1], edges[1][1:], strict=True)):
            index[y0:y1, x0:x1] = i * regions[1] + j
            middles.append([(y0 + y1 - 1) / 2, (x0 + x1 - 1) / 2])
            fit, probe = _of_region(datacube, measured, (int(y0), int(y1)), (int(x0), int(x1)))
            fits.append(fit)
            vacuum.append(probe)
    radius, edge, std = (np.array([getattr(f, k) for f in fits]) for k in ("radius", "edge", "std"))
    found = np.array([f.n_disks > 0 for f in fits])
    table = np.where(found[:, None], np.stack([radius, edge], axis=1), np.nan)
    smooth = np.maximum(_plane_through(np.array(middles), table, measured), [1.0, 0.3])
    spread = np.ptp(smooth, axis=0)
    known = std[np.isfinite(std) & found]
    scatter = float(np.median(known)) if known.size else math.nan
    # the ends of a plane through n points of this scatter, each a standard deviation of about 2 / sqrt(n)
    change_std = 2 * scatter * math.sqrt(2 / max(found.sum(), 1)) if np.isfinite(scatter) else math.inf
    detector = measured.bad_pixels.shape
    distortion = None if ellipse is None else ellipse.matrix
    if all(v is not None for v in vacuum):
        probes, source = np.stack([v for v in vacuum if v is not None]), "vacuum"
    else:
        probes = np.stack([synthetic_probe(detector, r, e, distortion=distortion) for r, e in smooth])
        source = "synthetic"
    return Templates(
        probes.astype(np.float32),
        index,
        table[:, 0].reshape(regions),
        table[:, 1].reshape(regions),
        source,
        float(spread.max()),
        change_std,
    )


def _plane_through(middles: NDArray, table: NDArray, measured: Calibration) -> NDArray[np.float64]:
    """Radius and edge (k, 2) on planes through those of the regions; of least slope where free."""
    good = np.isfinite(table).all(1)
    if not good.any():
        return np.tile([measured.probe_radius_px, measured.edge_sigma_px], (len(table), 1))
    mean = table[good].mean(0)
    offset = middles - middles[good].mean(0)
    slope = np.linalg.lstsq(offset[good], table[good] - mean, rcond=1e-6)[0]
    return mean + offset @ slope


def _of_region(
    datacube: xr.Dataset, measured: Calibration, rows: tuple[int, int], columns: tuple[int, int]
) -> tuple[RadiusFit, NDArray | None]:
    """Radius of the disks in the middle of a region, and the beam itself where that is all there is."""
    ys, xs = (
        slice(max(a, (a + b) // 2 - _SIDE // 2), min(b, max(a, (a + b) // 2 - _SIDE // 2) + _SIDE))
        for a, b in (rows, columns)
    )
    radius = measured.probe_radius_px
    try:
        block = datacube["intensity"].isel(scan_y=ys, scan_x=xs).values
    except DamagedBlockError:
        return RadiusFit(radius, measured.edge_sigma_px, math.nan, 0, math.nan), None
    patterns = np.where(measured.bad_pixels, np.nan, block.reshape(-1, *block.shape[2:]).astype(np.float32))
    position = np.moveaxis(np.mgrid[ys, xs], 0, -1).reshape(-1, 2)
    centres = measured.origin[tuple(position.T)]
    shift = np.rint(centres.mean(0)) - centres
    images = np.concatenate([aligned_mean(patterns, shift)[None] * len(patterns), patterns])
    fit = refine_radius(images, radius, np.zeros(measured.bad_pixels.shape, dtype=bool))
    sample = Sample(patterns, position, np.zeros(len(patterns), dtype=np.int64), np.zeros(block.shape[2:]))
    # the template is as sharp as its alignment: centres of the patterns themselves, where the beam is alone
    own = find_centres(patterns, centres, radius_px=radius, reach_px=radius + 2)
    probe, n = vacuum_probe(sample, patterns, np.where(np.isfinite(own), own, centres), radius, fit.edge)
    return fit, probe if n == len(patterns) else None

"""Elliptical distortion and pixel size of a scan's detector, from a ring in it or from a known crystal."""

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from . import schema
from .blocks import process_block
from .calibration import Calibration
from .config import DetectionConfig
from .kernels.beam import aligned_mean, fill
from .kernels.ellipse import CrystalFit, Ellipse, RingFit, find_ring, fit_crystal, fit_ring, undistort
from .sample import Sample

__all__ = ["disk_vectors", "measure_crystal", "measure_ring"]

N_DETECTED = 64


def centred_mean(sample: Sample, measured: Calibration) -> tuple[NDArray, tuple[float, float]]:
    """Mean pattern of the sample without descan (to a pixel), bad pixels NaN; and its beam centre."""
    patterns = np.where(measured.bad_pixels, np.nan, sample.patterns)
    centres = measured.origin[tuple(sample.position.T)]
    middle = np.rint(np.median(centres, axis=0))
    shift = np.rint(middle - centres)
    left_over = (centres + shift).mean(0)
    return aligned_mean(patterns, shift), (float(left_over[0]), float(left_over[1]))


def measure_ring(
    sample: Sample, measured: Calibration, *, radius_px: float | None = None
) -> tuple[RingFit, NDArray]:
    """Ellipse of a ring, of an amorphous film or of a powder, in the mean pattern.

    Parameters
    ----------
    sample : Sample
    measured : Calibration
        Beam centres, disk radius and bad pixels.
    radius_px : float, optional
        Radius of the ring; the most prominent one if not given.

    Returns
    -------
    RingFit
    ndarray, shape (qy, qx)
        The mean pattern it was fitted to.

    Raises
    ------
    ValueError
        If there is no ring.
    """
    mean, centre = centred_mean(sample, measured)
    inner = 2 * measured.probe_radius_px + 3
    start = find_ring(mean, centre, inner_px=inner) if radius_px is None else float(radius_px)
    fit = fit_ring(mean, centre, start) if np.isfinite(start) else None
    if fit is None or fit.contrast < 3:
        found = "no ring stands out" if fit is None else f"the ring at {fit.radius_px:.0f} px is too faint"
        raise ValueError(
            f"{found} in the mean of {len(sample.patterns)} patterns; give its radius (--ring-px R), or "
            "calibrate with a known crystal: --ellipse crystal --crystal Au"
        )
    return fit, mean


def disk_vectors(
    sample: Sample, measured: Calibration, *, detection: DetectionConfig | None = None
) -> NDArray[np.float64]:
    """Bragg disks of the sample as seen from the beam centre, (n, 2) px; the direct beam is left out.

    By default the network finds them, in 64 patterns at most. In crystals of some 10 nm near a zone axis
    disks are brighter on the side of the beam, and correlation (or an edge) puts them too far in: by 2 % on
    simulated silicon of 20 nm, where the network is right to 0.1 %.
    """
    config = detection or DetectionConfig(method="fcunet")
    n = len(sample.patterns)
    some = np.unique(np.linspace(0, n - 1, min(n, N_DETECTED)).round().astype(int))
    origin = measured.origin[tuple(sample.position[some].T)][None]
    filled = np.stack([fill(np.where(measured.bad_pixels, np.nan, sample.patterns[i])) for i in some])
    values = process_block(filled[None].astype(np.float32), config, measured, origin=origin)
    at = np.stack([values["peak_qy"][0], values["peak_qx"][0]], axis=-1) - origin[0][:, None]
    vectors = at.reshape(-1, 2).astype(float)
    length = np.hypot(*vectors.T)
    nearest = measured.nearest_spacing_px
    beam = max(measured.probe_radius_px, 0.5 * nearest if np.isfinite(nearest) else 0.0)
    return vectors[np.isfinite(length) & (length > beam)]


def measure_crystal(
    datacube: xr.Dataset,
    sample: Sample,
    measured: Calibration,
    rings: NDArray,
    *,
    q_pixel: float | None = None,
    fit_ellipse: bool = True,
    known: Ellipse | None = None,
    detection: DetectionConfig | None = None,
) -> tuple[CrystalFit, NDArray]:
    """Pixel size, and ellipse, from the Bragg disks of a known crystal: one grain or many.

    Parameters
    ----------
    datacube : Dataset
        Its pixel size serves as a start, to 20 %.
    sample : Sample
    measured : Calibration
    rings : ndarray, shape (m,)
        1/d of the crystal's reflections, 1/angstrom.
    q_pixel : float, optional
        Another start, 1/angstrom per px.
    fit_ellipse : bool
    known : Ellipse, optional
        An ellipse to take out first.
    detection : DetectionConfig, optional
        How disks are found; by the network if not given.

    Returns
    -------
    CrystalFit
    ndarray, shape (n, 2)
        The disks used, px from the beam centre.

    Raises
    ------
    ValueError
        If the disks do not lie on rings of the crystal.
    """
    vectors = disk_vectors(sample, measured, detection=detection)
    if known is not None:
        vectors = undistort(vectors, known)
    start = q_pixel
    if start is None and datacube["qy"].attrs.get("units") == schema.UNIT_Q and datacube["qy"].size > 1:
        start = abs(float(datacube["qy"][1] - datacube["qy"][0]))
    if start is None and np.isfinite(measured.q_pixel_expected):
        start = measured.q_pixel_expected
    fit = fit_crystal(vectors, rings, start, fit_ellipse=fit_ellipse)
    if fit is None or fit.n_used < 0.4 * fit.n_vectors:
        many = "" if fit is None else f" (only {fit.n_used} lie on its rings)"
        raise ValueError(
            f"{len(vectors)} disks of {len(sample.patterns)} patterns do not fit this crystal{many}; is it "
            "the right one? A pixel size to start from may help: --q-pixel 0.0123 (1/angstrom)"
        )
    return fit, vectors

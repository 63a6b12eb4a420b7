"""Errors of the strain that all positions share, from what calibration could not determine.

Error bars say how far a position may be off by itself. A distortion of the detector that was not taken out
quite, a beam centre that was held where it is not, a pixel size known to so much: these move whole maps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from . import schema

# attributes of a lattice that carry what calibration left, by their name
RESIDUALS = ("ellipse_std", "origin_std_px", "q_pixel_std")


def calibration_residuals(attrs: Mapping[str, Any]) -> dict[str, float]:
    """What the calibration kept with a scan says of its own errors; what it does not say is left out.

    Parameters
    ----------
    attrs : mapping
        Attributes of peaks or of their datacube.

    Returns
    -------
    dict
        ``ellipse_std``, standard deviation of the distortion, a strain; ``origin_std_px``, scatter of the
        measured beam centres about the descan surface; ``q_pixel_std`` in 1/angstrom.
    """
    record = attrs.get("calibration")
    record = record if isinstance(record, Mapping) else {}
    found = {
        "ellipse_std": _entry(record, "ellipse", "terms_std"),
        "origin_std_px": _entry(record, "origin", "scatter_px", attrs.get("origin_std_px")),
        "q_pixel_std": _entry(record, "q_pixel", "std"),
    }
    return {name: value for name, value in found.items() if value is not None and np.isfinite(value)}


def _entry(record: Mapping[str, Any], part: str, name: str, default: Any = None) -> float | None:
    inner = record.get(part)
    value = inner.get(name, default) if isinstance(inner, Mapping) else default
    return None if value is None else float(value)


def systematic_errors(lattice: xr.Dataset, theta: np.ndarray, *, absolute: bool) -> dict[str, float]:
    """Systematic part of the strain, one standard deviation of a component over the scan.

    Parameters
    ----------
    lattice : Dataset
        From :func:`fcunet.fit_lattice`, with what the calibration left in its attributes.
    theta : ndarray
        Rotation against the reference, rad; NaN where there is no lattice.
    absolute : bool
        Strain against an ideal crystal, which the detector has not distorted, instead of a part of the scan.

    Returns
    -------
    dict
        ``systematic_ellipse``: a distortion of d left in the data cancels against a reference of the same
        scan, up to 2 theta d where the lattice is turned by theta (rms of the scan); against an ideal crystal
        it is d itself. ``systematic_descan``: 0 with the origin fitted; with a fixed one, at most its scatter
        over the mean distance of the peaks, for patterns with all disks on one side. ``systematic_pixel``,
        for absolute strain: the relative error of the pixel size, a dilation. What is not known is left out.
    """
    attrs = lattice.attrs
    out: dict[str, float] = {}
    known = np.isfinite(theta)
    turn = float(np.sqrt((theta[known] ** 2).mean())) if known.any() else np.nan
    if "ellipse_std" in attrs:
        out["systematic_ellipse"] = attrs["ellipse_std"] * (1.0 if absolute else min(1.0, 2 * turn))
    if attrs.get("fit_origin", 1):
        out["systematic_descan"] = 0.0
    elif "origin_std_px" in attrs:
        out["systematic_descan"] = attrs["origin_std_px"] / _mean_distance(lattice)
    if absolute and "q_pixel_std" in attrs and attrs.get("q_pixel"):
        out["systematic_pixel"] = attrs["q_pixel_std"] / attrs["q_pixel"]
    return {name: float(value) for name, value in out.items() if np.isfinite(value)}


def _mean_distance(lattice: xr.Dataset) -> float:
    """Of the fitted peaks from the origin, px, as if they filled a disk: from their number and the cell."""
    g = np.stack([lattice[name].values for name in schema.LATTICE_PARAMETERS[2:]], -1)
    count = lattice["n_indexed"].values
    seen = np.isfinite(g).all(-1) & (count > 0)
    if not seen.any():
        return np.nan
    area = np.abs(g[..., 0] * g[..., 3] - g[..., 1] * g[..., 2])[seen]
    return float(np.median(2 / 3 * np.sqrt(count[seen] * area / np.pi)))

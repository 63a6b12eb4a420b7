"""``fcunet calibrate``: measure how a scan was recorded: descan, ellipse, pixel size, rotation, templates.

Nothing is written here; `fcunet.calibration_store` keeps it with the scan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from . import schema
from .calibrate import calibrate
from .calibration import Calibration
from .config import DetectionConfig
from .descan import measure_origin
from .distortion import measure_crystal, measure_ring
from .kernels.beam import aligned_mean
from .kernels.descan import find_beam_stop
from .kernels.ellipse import CrystalFit, Ellipse, RingFit
from .kernels.scanframe import ScanRotation
from .sample import Sample, read_sample
from .scanframe import measure_scan_rotation
from .templates import Templates, measure_templates

__all__ = ["Measured", "measure"]


@dataclass(eq=False)
class Measured:
    """What `measure` found; whatever is None was not asked for, or not found.

    Attributes
    ----------
    variables : Dataset
        What goes into the store beside the patterns.
    attrs : dict
        What goes into its attributes.
    record : dict
        How each was measured, for people and for ``--from``.
    lines, warnings : list of str
        The outcome, to print.
    """

    calibration: Calibration
    sample: Sample
    variables: xr.Dataset = field(default_factory=xr.Dataset)
    attrs: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    origin: xr.Dataset | None = None
    ring: RingFit | None = None
    mean: NDArray | None = None
    crystal: CrystalFit | None = None
    vectors: NDArray | None = None
    rings: NDArray | None = None
    rotation: ScanRotation | None = None
    templates: Templates | None = None


def measure(
    datacube: xr.Dataset,
    *,
    origin: str = "disk",
    origin_model: str = "plane",
    every_position: bool = False,
    ellipse: str | Ellipse = "none",
    ring_px: float | None = None,
    rings: NDArray | None = None,
    q_pixel: float | None = None,
    rotation: str | float = "measure",
    transposed: bool | None = None,
    regions: tuple[int, int] | None = None,
    n_patterns: int = 256,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    detection: DetectionConfig | None = None,
) -> Measured:
    """Measure how a scan was recorded; nothing is written.

    Parameters
    ----------
    datacube : Dataset
        From `fcunet.open`.
    origin, origin_model, every_position
        As `method`, `model` ("none": every position by itself) and `every_position` of
        `fcunet.descan.measure_origin`; ``origin="none"`` leaves the beam centre as it is.
    ellipse : {"none", "ring", "crystal"} or Ellipse
        From a ring, from the disks of the crystal of `rings`, or known.
    ring_px : float, optional
        Radius of the ring to take.
    rings : ndarray, optional
        1/d of the known crystal, 1/angstrom: the pixel size is fitted to it.
    q_pixel : float, optional
        Pixel size to start from, 1/angstrom.
    rotation : {"measure", "none"} or float
        Turn of the scan's +x from the detector's +x, degrees.
    transposed : bool, optional
        Whether detector rows and columns are exchanged; None: measured with the rotation.
    regions : tuple of int, optional
        Rows and columns of regions with a probe template of their own.
    n_patterns, seed : int
        Size and choice of the sample.
    settings : mapping, optional
        Arguments of `fcunet.calibrate.calibrate`.
    detection : DetectionConfig, optional
        How the disks of the crystal are found; by the network if not given.

    Returns
    -------
    Measured

    Raises
    ------
    ValueError
        If something asked for cannot be measured.
    """
    settings = dict(settings or {})
    _check(ellipse, rings, rotation)
    sample = read_sample(datacube, n_patterns=n_patterns, seed=seed)
    bare = datacube.drop_vars(["origin_qy", "origin_qx"], errors="ignore")
    known = bare
    found: dict[str, Any] = {}
    if origin != "none":
        surface = measure_origin(
            bare,
            method=origin,  # type: ignore[arg-type]
            model=None if origin_model == "none" else origin_model,  # type: ignore[arg-type]
            radius_px=settings.get("probe_radius_px"),
            centre=settings.get("centre"),
            every_position=every_position,
            sample=sample,
        )
        found = {
            name: surface[name].astype(np.float32).reset_coords(drop=True)
            for name in ("origin_qy", "origin_qx")
        }
        known = bare.assign(found)
        if origin == "friedel":
            stop = _beam_stop(sample)
            if stop is not None:
                use = datacube["detector_mask"].values if "detector_mask" in datacube else True
                found["detector_mask"] = xr.DataArray(~stop & use, dims=schema.PATTERN_DIMS)
                known = known.assign(detector_mask=found["detector_mask"])
                sample = read_sample(known, n_patterns=n_patterns, seed=seed)
    elif {"origin_qy", "origin_qx"} <= set(datacube):
        known = datacube
    measured = calibrate(known, sample=sample, **settings)
    result = Measured(measured, sample, variables=xr.Dataset(found))
    result.lines += measured.describe()
    result.warnings += list(measured.warnings)
    if origin != "none":
        _note_origin(result, surface)
    _measure_ellipse(result, datacube, ellipse, ring_px, rings, q_pixel, detection)
    _measure_rotation(result, known, rotation, transposed)
    if regions is not None:
        _measure_templates(result, known, regions)
    return result


def _check(ellipse: str | Ellipse, rings: NDArray | None, rotation: str | float) -> None:
    """Refuse what cannot be done before anything is read."""
    if isinstance(ellipse, str) and ellipse not in ("none", "ring", "crystal"):
        raise ValueError(f"ellipse is {ellipse!r}; use none, ring, crystal, or RATIO,ANGLE such as 1.03,25")
    if ellipse == "crystal" and rings is None:
        raise ValueError("an ellipse from a crystal needs the crystal: --ellipse crystal --crystal Au")
    if isinstance(rotation, str) and rotation not in ("measure", "none"):
        raise ValueError(f"rotation is {rotation!r}; use measure, none, or degrees such as -12.5")


def _beam_stop(sample: Sample) -> NDArray[np.bool_] | None:
    stop = find_beam_stop(aligned_mean(sample.patterns, np.zeros((len(sample.patterns), 2))))
    return stop if stop.any() else None


def _note_origin(result: Measured, surface: xr.Dataset) -> None:
    result.origin = surface
    facts = surface.attrs
    result.record["origin"] = dict(facts)
    result.lines.append(
        f"origin by {facts['method']}, {facts['model']} through {facts['n_measured']} positions, scatter "
        f"{facts['scatter_px']:.3f} px, {facts['n_outliers']} outliers"
    )
    if "detector_mask" in result.variables:
        hidden = int((~result.variables["detector_mask"].values).sum())
        result.lines.append(f"beam stop masked: {hidden} px")
    if facts["n_outliers"] > 0.2 * facts["n_measured"]:
        result.warnings.append(
            f"{facts['n_outliers']} of {facts['n_measured']} beam centres lie off the {facts['model']}: "
            "another method (--origin), or a parabola (--origin-model parabola), may suit better"
        )


def _measure_ellipse(
    result: Measured,
    datacube: xr.Dataset,
    ellipse: str | Ellipse,
    ring_px: float | None,
    rings: NDArray | None,
    q_pixel: float | None,
    detection: DetectionConfig | None,
) -> None:
    found: Ellipse | None = None
    if isinstance(ellipse, Ellipse):
        found = ellipse
        result.record["ellipse"] = {"method": "given"}
    elif ellipse == "ring":
        result.ring, result.mean = measure_ring(result.sample, result.calibration, radius_px=ring_px)
        found = result.ring.ellipse
        result.record["ellipse"] = {
            "method": "ring",
            "ring_px": result.ring.radius_px,
            "terms": list(result.ring.terms),
            "terms_std": result.ring.terms_std,
        }
    if rings is not None:
        fit, vectors = measure_crystal(
            datacube,
            result.sample,
            result.calibration,
            rings,
            q_pixel=q_pixel,
            fit_ellipse=ellipse == "crystal",
            known=found,
            detection=detection,
        )
        result.crystal, result.vectors, result.rings = fit, vectors, rings
        if ellipse == "crystal":
            found = fit.ellipse
            result.record["ellipse"] = {
                "method": "crystal",
                "terms": list(fit.terms),
                "terms_std": fit.terms_std,
            }
        _note_pixel(result, datacube, fit)
    if found is None:
        return
    result.attrs |= {"ellipse_ratio": found.ratio, "ellipse_angle_degree": found.angle_degree}
    std = result.record["ellipse"].get("terms_std")
    bar = "" if std is None or not np.isfinite(std) else f" +- {2 * std:.4f}"
    result.lines.append(
        f"ellipse {found.ratio:.4f}{bar}, long axis {found.angle_degree:.1f} degrees from +x towards +y"
    )
    if found.ratio > 1.15:
        result.warnings.append(f"an axis ratio of {found.ratio:.2f} is more than lenses do: is it that ring?")


def _note_pixel(result: Measured, datacube: xr.Dataset, fit: CrystalFit) -> None:
    result.record["q_pixel"] = {
        "value": fit.q_pixel,
        "std": fit.q_pixel_std,
        "scatter": fit.scatter,
        "n_used": fit.n_used,
        "n_disks": fit.n_vectors,
        "ambiguity": fit.ambiguity,
    }
    centre = result.calibration.centre
    for dim, middle in zip(schema.PATTERN_DIMS, centre, strict=True):
        q = (np.arange(datacube.sizes[dim]) - middle) * fit.q_pixel
        result.variables[dim] = xr.DataArray(q, dims=(dim,), attrs={"units": schema.UNIT_Q})
    result.lines.append(
        f"pixel {fit.q_pixel:.6f} +- {fit.q_pixel_std:.6f} 1/angstrom: {fit.n_used} of {fit.n_vectors} disks "
        f"on {int(fit.rings.sum())} rings, to {100 * fit.scatter:.2f} %"
    )
    if fit.ambiguity > 0.8:
        result.warnings.append(
            "another pixel size fits the crystal nearly as well; give one to start from: --q-pixel 0.0123"
        )
    expected = result.calibration.q_pixel_expected
    if np.isfinite(expected) and abs(fit.q_pixel / expected - 1) > 0.1:
        result.warnings.append(
            f"convergence angle and disk radius give {expected:.5f} 1/angstrom per px, the crystal "
            f"{fit.q_pixel:.5f}: one of them is wrong"
        )


def _measure_rotation(
    result: Measured, datacube: xr.Dataset, rotation: str | float, transposed: bool | None
) -> None:
    if not isinstance(rotation, str):
        result.attrs |= {"scan_rotation_degree": float(rotation), "scan_transposed": int(bool(transposed))}
        result.record["rotation"] = {"method": "given", "kept": True}
        result.lines.append(f"scan turned by {float(rotation):.2f} degrees, as given")
        return
    if rotation == "none":
        if transposed is not None:
            result.attrs["scan_transposed"] = int(transposed)
        return
    if min(datacube.sizes["scan_y"], datacube.sizes["scan_x"]) < 2:
        result.warnings.append("a scan of one row or column says nothing of its rotation")
        return
    found = measure_scan_rotation(datacube, result.calibration)
    result.rotation = found
    swap = found.transposed if transposed is None else transposed
    result.record["rotation"] = {"method": "curl", "kept": False} | found._asdict()
    if not found.angle_known or (not found.transposition_known and transposed is None):
        what = "rotation" if not found.angle_known else "transposition"
        result.warnings.append(
            f"the centre of mass cannot decide the scan {what} ({found.rotation_degree:.0f} +- "
            f"{found.std_degree:.0f} degrees, curl left {found.curl:.2f}, with the matrix exchanged "
            f"{found.curl_other:.2f}): nothing is kept; if you know it: --rotation DEGREES"
        )
        return
    if transposed is not None and transposed != found.transposed:
        result.warnings.append(
            "the centre of mass has less curl with the other transposition than the one given"
        )
    stored = datacube.attrs.get("scan_rotation_degree")
    if stored is not None and abs((found.rotation_degree - float(stored) + 90) % 180 - 90) > max(
        3 * found.std_degree, 3.0
    ):
        result.warnings.append(
            f"the scan says its rotation is {float(stored):.1f} degrees, the centre of mass "
            f"{found.rotation_degree:.1f} +- {found.std_degree:.1f} (modulo 180); what was stored is kept: "
            "--rotation DEGREES changes it"
        )
        return
    if stored is not None:
        result.lines.append(f"scan rotation as stored, {float(stored):.2f} degrees, agrees with the curl")
        return
    result.attrs |= {"scan_rotation_degree": found.rotation_degree, "scan_transposed": int(swap)}
    result.record["rotation"]["kept"] = True
    exchanged = ", detector rows and columns exchanged" if swap else ""
    result.lines.append(
        f"scan turned by {found.rotation_degree:.2f} +- {found.std_degree:.2f} degrees (modulo 180, which "
        f"strain does not see){exchanged}; curl left {found.curl:.3f}"
    )


def _measure_templates(result: Measured, datacube: xr.Dataset, regions: tuple[int, int]) -> None:
    ellipse = (
        Ellipse(result.attrs["ellipse_ratio"], result.attrs["ellipse_angle_degree"])
        if "ellipse_ratio" in result.attrs
        else None
    )
    found = measure_templates(datacube, result.calibration, regions=regions, ellipse=ellipse)
    result.templates = found
    result.record["templates"] = {
        "regions": list(regions),
        "source": found.source,
        "change_px": found.change_px,
        "change_std_px": found.change_std_px,
    }
    change = f"the disks change by {found.change_px:.2f} +- {found.change_std_px:.2f} px over the scan"
    if not (found.significant or found.source == "vacuum"):
        result.lines.append(f"{change}: one probe serves all of it")
        return
    dims = ("template", *schema.PATTERN_DIMS)
    result.variables["templates"] = xr.DataArray(found.probes, dims=dims)
    result.variables["template_index"] = xr.DataArray(found.template_index, dims=schema.SCAN_DIMS)
    result.lines.append(f"{change}: {len(found.probes)} templates ({found.source})")

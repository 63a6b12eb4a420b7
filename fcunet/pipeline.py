"""The whole path on labelled arrays: peaks, virtual images, lattice and strain, lazy where the input is lazy.

Labels, laziness and metadata only. What is done to the patterns is in `fcunet.blocks`, the arithmetic on
peaks and lattices in `fcunet.kernels`.
"""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from . import accessor, schema
from .cepstral import REAL_SPACE
from .config import Config, DetectionConfig
from .layout import check_blocks
from .pipeline_lattice import fit_lattice, fit_lattices
from .pipeline_map import bragg_vector_map
from .pipeline_strain import compare_with_truth, compute_strain

if TYPE_CHECKING:
    from .blocks import BlockCalibration

_ = accessor  # importing it puts .fcunet on datasets and trees

__all__ = [
    "bragg_vector_map",
    "compare_with_truth",
    "compute_strain",
    "find_peaks",
    "fit_lattice",
    "fit_lattices",
    "virtual_image",
]


# what `peak_intensity` is, by method
INTENSITY_ATTRS = {
    "fcunet": {"meaning": "structure factor magnitude |V_g|", "units": "V"},
    "correlation": {"meaning": "height of the correlation"},
    "cepstral": {"meaning": "height in the cepstrum; positions are vectors of real space"},
}


def find_peaks(
    datacube: xr.Dataset,
    config: DetectionConfig | str | None = None,
    *,
    calibration: "BlockCalibration | None" = None,
    **settings: Any,
) -> xr.Dataset:
    """Bragg peaks and virtual images of every position.

    Parameters
    ----------
    datacube : Dataset
        `intensity` (scan_y, scan_x, qy, qx). Lazy in, lazy out; in memory, computed at once.
    config : DetectionConfig or str, optional
        Detection settings, or just the method: ``"fcunet"`` (default) or ``"correlation"``.
    calibration : Calibration, optional
        From `fcunet.calibrate.calibrate`; default is to measure it now, which reads some 64 patterns.
    **settings
        Single detection settings, such as ``threshold=0.3`` or ``min_peak_spacing=12``; they win over
        `config`.

    Returns
    -------
    Dataset
        The variables of a peaks store: ``peak_qy, peak_qx`` in raw detector px, ``peak_intensity,
        peak_sigma`` (scan_y, scan_x, peak), NaN-padded, brightest first; ``n_peaks``, ``truncated``; ``bf,
        adf, total, com_qy, com_qx``. What is computed does not depend on the blocks.

    Raises
    ------
    ValueError
        If a pattern is split between blocks (the message has the rechunk call), if a setting is unknown or
        does not fit, or if `calibration` is of another scan.
    """
    schema.check_datacube(datacube)
    intensity = datacube["intensity"]
    check_blocks(intensity)
    chosen = _detection(config, settings)
    if calibration is None:
        from .calibrate import calibrate

        calibration = calibrate(datacube)
    frame = tuple(intensity.shape[2:])
    if np.shape(calibration.probe) != frame:
        raise ValueError(
            f"the calibration is for a detector of {np.shape(calibration.probe)}, the datacube has {frame}; "
            "measure it on this scan: calibration=fcunet.calibrate.calibrate(datacube)"
        )
    origin = np.asarray(calibration.origin, float)
    if origin.shape != (*intensity.shape[:2], 2):
        raise ValueError(
            f"the calibration is for a scan of {origin.shape[:2]}, the datacube has {intensity.shape[:2]}; "
            "measure it on this scan: calibration=fcunet.calibrate.calibrate(datacube)"
        )
    # the arrays of the calibration travel as one task each, and not once with every block
    block = intensity.to_dataset(name="intensity").drop_vars(schema.PATTERN_DIMS, errors="ignore")
    block["probe"] = (schema.PATTERN_DIMS, calibration.probe)
    block["bad_pixels"] = (schema.PATTERN_DIMS, np.asarray(calibration.bad_pixels))
    block["origin"] = ((*schema.SCAN_DIMS, "axis"), origin)
    if calibration.templates is not None:
        block["templates"] = (("template", *schema.PATTERN_DIMS), calibration.templates)
        block["template_index"] = (schema.SCAN_DIMS, np.asarray(calibration.template_index))
    numbers = {
        name: getattr(calibration, name)
        for name in (
            "centre",
            "probe_radius_px",
            "edge_sigma_px",
            "min_peak_spacing",
            "edge_boundary",
            "nearest_spacing_px",
            "beam_energy_keV",
            "aperture_radius",
        )
    }
    if intensity.chunks is None:
        peaks = _peaks_of_block(block, config=chosen, numbers=numbers)
    else:
        whole: dict[str, Any] = dict.fromkeys((*schema.PATTERN_DIMS, "axis"), -1)
        if "templates" in block:
            whole["template"] = -1
        block = block.chunk(whole | dict(zip(schema.SCAN_DIMS, intensity.chunks[:2], strict=True)))
        peaks = xr.map_blocks(
            _peaks_of_block,
            block,
            kwargs={"config": chosen, "numbers": numbers},
            template=_peaks_template(intensity, chosen.max_num_peaks),
        )
    peaks["peak_intensity"].attrs |= INTENSITY_ATTRS[chosen.method]
    peaks.attrs = {k: v for k, v in datacube.attrs.items() if not k.startswith("fcunet_format")} | {
        "detector_shape": list(frame),
        "centre": list(map(float, calibration.centre)),
    }
    if chosen.method == "fcunet":
        from .nn.weights import least_shared_dilation

        peaks.attrs["shared_dilation_floor"] = least_shared_dilation(chosen.weights)
    if np.isfinite(scatter := float(getattr(calibration, "origin_std_px", np.nan))):
        peaks.attrs["origin_std_px"] = scatter
    if datacube.sizes["qy"] > 1 and "qy" in datacube.coords:
        first, second = datacube["qy"].values[:2]
        peaks.attrs["qy"] = {
            "first": float(first),
            "step": float(second - first),
            "units": datacube["qy"].attrs.get("units", schema.UNIT_PIXEL),
        }
    if chosen.method == "cepstral":
        peaks.attrs["space"] = REAL_SPACE
        for i, name in enumerate(("origin_qy", "origin_qx")):
            peaks[name] = (schema.SCAN_DIMS, origin[..., i])
    return peaks


def virtual_image(
    datacube: xr.Dataset,
    detector: str | ArrayLike = "bf",
    *,
    inner: float | None = None,
    outer: float | None = None,
    centre: tuple[float, float] | None = None,
    calibration: "BlockCalibration | None" = None,
    shift: ArrayLike | None = None,
) -> xr.DataArray:
    """Sum of every pattern over a part of the detector.

    Parameters
    ----------
    datacube : Dataset
        `intensity` (scan_y, scan_x, qy, qx). Lazy in, lazy out.
    detector : {"bf", "adf"} or array of bool or float, shape (qy, qx)
        Inside or outside the direct beam, or the weights of a virtual detector.
    inner, outer : float, optional
        Radii of an annulus in px, ``inner <= r < outer``; given one of them, `detector` is ignored.
    centre : tuple of float, optional
        (y, x) of the annulus in px; default is that of `calibration`.
    calibration : Calibration, optional
        Where centre and radius come from; default is to measure it now. Not needed for an array, nor with
        `centre` and a radius given.
    shift : array, shape (scan_y, scan_x, 2), optional
        How far the virtual detector moves at each position, (y, x) in px, to the nearest pixel: it follows
        the descan with ``calibration.origin - calibration.centre``. Default: it stays.

    Returns
    -------
    DataArray
        (scan_y, scan_x), float32, counts. NaN where a pattern holds NaN within the virtual detector.

    Raises
    ------
    ValueError
        For an unknown name, a mask or shifts of another shape, or radii out of order.
    """
    from .blocks import weighted_sums  # torch comes with it, which those who look at results do not need

    schema.check_datacube(datacube)
    intensity = datacube["intensity"]
    check_blocks(intensity)
    frame = tuple(intensity.shape[2:])
    moved = _moves(intensity, shift)
    if isinstance(detector, str) and detector not in ("bf", "adf"):
        raise ValueError(
            f"unknown virtual detector {detector!r}; use 'bf', 'adf', radii (inner=, outer=) or a mask"
        )
    if inner is None and outer is None and not isinstance(detector, str):
        weights = np.asarray(detector, np.float64)
        if weights.shape != frame:
            raise ValueError(
                f"the mask has shape {weights.shape}, the detector {frame}; give one value per pixel"
            )
        name = "virtual"
    else:
        by_radius = inner is not None or outer is not None
        if calibration is None and not (by_radius and centre is not None):
            from .calibrate import calibrate

            calibration = calibrate(datacube)
        if by_radius:
            low, high, name = inner or 0.0, math.inf if outer is None else outer, "virtual"
            if not 0 <= low < high:
                raise ValueError(
                    f"radii are {low:g} and {high:g} px; give inner < outer, such as inner=20, outer=60"
                )
        else:
            assert calibration is not None
            reach = calibration.probe_radius_px + 2 * calibration.edge_sigma_px
            low, high, name = (0.0, reach, "bf") if detector == "bf" else (reach, math.inf, "adf")
        y0, x0 = calibration.centre if centre is None else centre  # type: ignore[union-attr]
        r = np.hypot(np.arange(frame[0])[:, None] - y0, np.arange(frame[1]) - x0)
        weights = ((low <= r) & (r < high)).astype(np.float64)
    mask = datacube["detector_mask"].values if "detector_mask" in datacube else None
    image = xr.apply_ufunc(
        weighted_sums,
        intensity,
        *moved,
        kwargs={"weights": weights, "mask": mask},
        input_core_dims=[schema.PATTERN_DIMS, *[("yx",) for _ in moved]],
        dask="parallelized",
        output_dtypes=[np.float32],
    )
    image.attrs = {
        "units": "counts",
        "long_name": schema.VIRTUAL[name].long_name if name in schema.VIRTUAL else "virtual image",
    }
    return image.rename(name)


def _moves(intensity: xr.DataArray, shift: ArrayLike | None) -> list[xr.DataArray]:
    """`shift` in the blocks of `intensity`, if there is one."""
    if shift is None:
        return []
    values, needed = np.asarray(shift, np.float32), (*intensity.shape[:2], 2)
    if values.shape != needed:
        raise ValueError(f"shift has shape {values.shape}, needed is {needed}: (y, x) for each position")
    array = xr.DataArray(values, dims=(*schema.SCAN_DIMS, "yx"))
    if intensity.chunks is None:
        return [array]
    return [array.chunk({d: intensity.chunksizes[d] for d in schema.SCAN_DIMS})]


def _detection(config: DetectionConfig | str | None, settings: Mapping[str, Any]) -> DetectionConfig:
    if isinstance(config, str):
        settings, config = {"method": config, **settings}, None
    known = (config or DetectionConfig()).model_dump()
    return Config.load(detection=known | dict(settings)).detection


def _peaks_template(intensity: xr.DataArray, max_num_peaks: int) -> xr.Dataset:
    """What :func:`_peaks_of_block` makes of the whole scan, without values."""
    assert intensity.chunks is not None
    sizes = dict(zip(schema.SCAN_DIMS, intensity.shape[:2], strict=True)) | {"peak": max_num_peaks}
    chunks = dict(zip(schema.SCAN_DIMS, intensity.chunks[:2], strict=True)) | {"peak": (max_num_peaks,)}
    variables = {
        name: (
            variable.dims,
            da.zeros(
                [sizes[d] for d in variable.dims],
                chunks=tuple(chunks[d] for d in variable.dims),
                dtype={"f": np.float32, "iu": np.int16, "b": bool}[variable.kinds],
            ),
            variable.attrs,
        )
        for name, variable in schema.PEAKS.items()
        if name != "status"
    }
    return xr.Dataset(variables, coords=schema.scan_coords(intensity))


def _peaks_of_block(block: xr.Dataset, *, config: DetectionConfig, numbers: dict[str, Any]) -> xr.Dataset:
    """The labelled form of :func:`fcunet.blocks.process_block`."""
    from .blocks import process_block

    calibration = SimpleNamespace(
        probe=block["probe"].values,
        bad_pixels=block["bad_pixels"].values,
        templates=block["templates"].values if "templates" in block else None,
        **numbers,
    )
    values = process_block(
        block["intensity"].values,
        config,
        calibration,
        origin=block["origin"].values,
        template_index=block["template_index"].values if "template_index" in block else None,
    )
    return xr.Dataset(
        {name: (v.dims, values[name], v.attrs) for name, v in schema.PEAKS.items() if name != "status"},
        coords=schema.scan_coords(block),
    )

"""How the beam centre moves over the scan: measured on a sample or everywhere, with a smooth surface."""

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from . import schema
from .calibrate import direct_beam_centres, require_counts, summed_patches, survey_radius
from .kernels.beam import aligned_mean, find_bad_pixels
from .kernels.descan import (
    METHODS,
    MODELS,
    Method,
    Model,
    find_beam_stop,
    find_centres,
    fit_surface,
    friedel_centres,
    surface_at,
    surface_map,
)
from .layout import check_blocks
from .sample import N_PATTERNS, Sample, read_sample

__all__ = ["measure_origin"]


def measure_origin(
    datacube: xr.Dataset,
    *,
    method: Method = "disk",
    model: Model | None = "plane",
    robust: bool = True,
    radius_px: float | None = None,
    centre: tuple[float, float] | None = None,
    every_position: bool = False,
    n_patterns: int = N_PATTERNS,
    seed: int = 0,
    sample: Sample | None = None,
) -> xr.Dataset:
    """Centre of the direct beam over the scan.

    Parameters
    ----------
    datacube : Dataset
        `intensity` (scan_y, scan_x, qy, qx); `detector_mask` is honoured.
    method : {"disk", "brightest", "mass", "friedel"}
        How the centre is found in a pattern, see `fcunet.kernels.descan.find_centres`. "friedel" needs no
        direct beam: for scans with a beam stop, whose shadow is looked for and left out.
    model : {"plane", "parabola", "constant"} or None
        Surface fitted through the centres. None: the centres themselves, outliers and gaps taken from the
        plane; this measures every position.
    robust : bool
        Leave outliers out of the fit.
    radius_px : float, optional
        Radius of the disks; measured if not given.
    centre : tuple of float, optional
        (y, x) px near which to look; needed where a Bragg disk outshines the direct beam.
    every_position : bool
        Measure in every pattern of the scan, block by block, rather than in a sample.
    n_patterns, seed, sample
        As in `fcunet.sample.read_sample`.

    Returns
    -------
    Dataset
        `origin_qy`, `origin_qx` (scan_y, scan_x) px, the surfaces; `residual_qy`, `residual_qx`, measured
        minus surface, NaN where nothing was measured or found; `outlier` (scan_y, scan_x). Attributes:
        `method`, `model`, `coefficients` (of ``1, y, x, y^2, yx, x^2``, scan positions counted from 0),
        `scatter_px` (robust, per axis), `n_measured`, `n_outliers`.

    Raises
    ------
    ValueError
        For unknown names, or if no beam centre is found in any pattern, or none within reach of `centre`.
    """
    if method not in METHODS or model not in (*MODELS, None):
        raise ValueError(
            f"origin method {method!r} with model {model!r}; methods are {', '.join(METHODS)}, "
            f"models {', '.join(MODELS)}, or none for every position by itself"
        )
    sample = sample or read_sample(datacube, n_patterns=n_patterns, seed=seed)
    hot, dead = find_bad_pixels(sample.patterns)
    patterns = np.where(hot | dead, np.nan, sample.patterns)
    require_counts(patterns)
    sums = summed_patches(sample, patterns)
    radius = survey_radius(patterns, sums) if radius_px is None else float(radius_px)
    stop = None
    if method == "friedel":
        stop = find_beam_stop(aligned_mean(patterns, np.zeros((len(patterns), 2))))
        rough = _symmetric_plane(sample, sums, stop, radius, centre)
    else:
        rough = direct_beam_centres(sample, patterns, sums, radius, centre)[1]
    if np.isnan(rough).any():
        where = "in the sampled patterns" if centre is None else f"near {tuple(centre)}"
        raise ValueError(
            f"no disk of radius {radius:.1f} px {where}; give its position: --centre Y,X (px), or for a scan "
            "with a beam stop: --origin friedel"
        )
    reach = radius + 2
    find = {"method": method, "radius_px": radius, "reach_px": reach}
    shape = (datacube.sizes["scan_y"], datacube.sizes["scan_x"])
    if every_position or model is None:
        found = _everywhere(datacube, surface_map(rough, shape), hot | dead, stop, find)
    else:
        found = np.full((*shape, 2), np.nan)
        at = tuple(sample.position.T)
        found[at] = find_centres(patterns, surface_at(rough, sample.position), mask=stop, **find)  # type: ignore[arg-type]
    return _fitted(datacube, found, method, model, robust)


def _symmetric_plane(
    sample: Sample,
    sums: NDArray,
    stop: NDArray[np.bool_],
    radius: float,
    centre: tuple[float, float] | None,
) -> NDArray[np.float64]:
    """Rough centre over the scan from the symmetry of the patches: first of all together, then of each."""
    middle = (np.array(sums.shape[1:]) - 1) / 2 if centre is None else np.asarray(centre, dtype=float)
    reach = 0.2 * min(sums.shape[1:]) if centre is None else 1.5 * radius + 3
    total = aligned_mean(sums, np.zeros((len(sums), 2)))
    start = friedel_centres(total[None], middle[None], reach_px=reach, mask=stop)
    if np.isnan(start).any():
        return np.full((2, 3), np.nan)
    found = friedel_centres(sums, np.repeat(start, len(sums), 0), reach_px=radius + 2, mask=stop)
    position = np.stack([sample.position[sample.patch == p].mean(0) for p in np.unique(sample.patch)])
    plane = fit_surface(position, found, slack_px=0.5 * radius)[0]
    if np.isnan(plane).any():
        plane = np.array([[start[0, 0], 0, 0], [start[0, 1], 0, 0]])
    return plane


def _everywhere(
    datacube: xr.Dataset,
    predicted: NDArray,
    bad: NDArray[np.bool_],
    stop: NDArray[np.bool_] | None,
    find: dict,
) -> NDArray[np.float64]:
    """Centres in every pattern, (scan_y, scan_x, 2), block by block."""
    intensity = datacube["intensity"].drop_vars(schema.PATTERN_DIMS, errors="ignore")
    check_blocks(intensity)
    if "detector_mask" in datacube:
        bad = bad | ~datacube["detector_mask"].values
    guess = xr.DataArray(predicted, dims=(*schema.SCAN_DIMS, "axis"))
    if intensity.chunks is not None:
        guess = guess.chunk(dict(zip(schema.SCAN_DIMS, intensity.chunks[:2], strict=True)))

    def of_block(block: NDArray, near: NDArray) -> NDArray:
        flat = np.where(bad, np.nan, block.reshape(-1, *block.shape[2:]).astype(np.float32))
        return find_centres(flat, near.reshape(-1, 2), mask=stop, **find).reshape(near.shape)

    centres = xr.apply_ufunc(
        of_block,
        intensity,
        guess,
        input_core_dims=[schema.PATTERN_DIMS, ["axis"]],
        output_core_dims=[["axis"]],
        dask="parallelized",
        output_dtypes=[np.float64],
    )
    return np.asarray(centres.compute().values)


def _fitted(
    datacube: xr.Dataset, found: NDArray, method: Method, model: Model | None, robust: bool
) -> xr.Dataset:
    """The dataset of `measure_origin` from centres (scan_y, scan_x, 2), NaN where none was found."""
    shape = found.shape[:2]
    measured = np.isfinite(found).all(-1)
    if not measured.any():
        raise ValueError(
            "the beam centre was found in none of the patterns; give its position: --centre Y,X (px)"
        )
    position = np.argwhere(measured)
    surface, inlier = fit_surface(position, found[measured], model=model or "plane", robust=robust)
    origin = surface_map(surface, shape)
    residual = np.where(measured[..., None], found - origin, np.nan)
    outlier = np.zeros(shape, dtype=bool)
    outlier[tuple(position.T)] = ~inlier
    scatter = 1.4826 * float(np.median(np.abs(residual[measured])))
    if model is None:
        keep = measured & ~outlier
        origin = np.where(keep[..., None], found, origin)
    px = {"units": schema.UNIT_PIXEL}
    variables = {f"origin_{d}": (schema.SCAN_DIMS, origin[..., i], px) for i, d in enumerate(("qy", "qx"))}
    variables |= {
        f"residual_{d}": (schema.SCAN_DIMS, residual[..., i], px) for i, d in enumerate(("qy", "qx"))
    }
    coords = {d: datacube[d] for d in schema.SCAN_DIMS if d in datacube.coords}
    return xr.Dataset(
        variables | {"outlier": (schema.SCAN_DIMS, outlier)},  # type: ignore[arg-type]
        coords=coords,
        attrs={
            "method": method,
            "model": model or "none",
            "coefficients": surface.tolist(),
            "scatter_px": scatter,
            "n_measured": int(measured.sum()),
            "n_outliers": int(outlier.sum()),
        },
    )

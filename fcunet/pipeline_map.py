"""The Bragg vector map of labelled peaks; import it from :mod:`fcunet.pipeline`.

The arithmetic is in :func:`fcunet.kernels.lattice.splat_peaks`.
"""

from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from . import schema
from .kernels.lattice import splat_peaks
from .layout import check_whole_peaks

Array = NDArray[np.float64]


def bragg_vector_map(
    peaks: xr.Dataset,
    *,
    lattice: xr.Dataset | None = None,
    shape: tuple[int, int] | None = None,
    sampling: float = 1.0,
    weighted: bool = True,
) -> xr.DataArray:
    """Histogram of all Bragg peaks of a scan on the detector, each shared bilinearly among four pixels.

    Parameters
    ----------
    peaks : Dataset
        `peak_qy`, `peak_qx` and, if `weighted`, `peak_intensity` (scan_y, scan_x, peak). Lazy in, lazy out.
    lattice : Dataset, optional
        With `origin_qy`, `origin_qx` (scan_y, scan_x): every pattern is shifted so that its origin falls on
        their mean, which takes out the descan. Positions without an origin are left out.
    shape : (int, int), optional
        Detector shape. None: ``peaks.attrs["detector_shape"]``, else just large enough.
    sampling : float
        Pixels of the map per detector pixel.
    weighted : bool
        Weight by intensity, else count.

    Returns
    -------
    DataArray
        (qy, qx) float64 with pixel coordinates.

    Raises
    ------
    ValueError
        If `peak` is split into chunks, or `sampling` is not above 0.
    """
    needed = ["peak_qy", "peak_qx", *(["peak_intensity"] if weighted else [])]
    schema.check_variables(peaks, schema.PEAK_VARIABLES, required=needed, where="peaks")
    check_whole_peaks(peaks)
    if not sampling > 0:
        raise ValueError(f"sampling is {sampling}, needed are pixels of the map per detector pixel, above 0")
    arrays = {name: peaks[name] for name in needed}
    centre = None
    if lattice is not None:
        for axis in ("qy", "qx"):
            origin = lattice[f"origin_{axis}"]
            mean = float(origin.mean())
            centre = [*(centre or []), mean]
            arrays[f"peak_{axis}"] = arrays[f"peak_{axis}"] - origin + mean
    if shape is None:
        shape = peaks.attrs.get("detector_shape")
    if shape is None:
        extent = (float(arrays[f"peak_{axis}"].max()) for axis in schema.PATTERN_DIMS)
        shape = tuple(int(np.nan_to_num(value)) + 2 for value in extent)  # type: ignore[assignment]
    assert shape is not None
    rows, columns = int(shape[0]), int(shape[1])
    chunked = peaks["peak_qy"].chunks
    data = [array.transpose(*schema.PEAK_DIMS).data for array in arrays.values()]
    options: dict[str, Any] = {"shape": (rows, columns), "sampling": float(sampling)}
    if chunked is None:
        image = _splat_block(*(np.asarray(d) for d in data), **options)[0, 0]
    else:
        size = _splat_block(*(np.empty((1, 1, 0)) for _ in data), **options).shape[2:]
        image = da.map_blocks(
            _splat_block,
            *(da.asarray(d).rechunk(chunked) for d in data),
            **options,
            drop_axis=2,
            new_axis=(2, 3),
            chunks=(*((1,) * len(c) for c in chunked[:2]), *((n,) for n in size)),
            dtype=np.float64,
            meta=np.empty((0, 0, 0, 0)),
        ).sum(axis=(0, 1))
    coords = {
        dim: (dim, np.arange(n) / sampling, {"units": schema.UNIT_PIXEL})
        for dim, n in zip(schema.PATTERN_DIMS, image.shape, strict=True)
    }
    attrs = dict(schema.DIFFRACTION["bragg_vector_map"].attrs)
    if centre is not None:
        attrs["origin_px"] = centre  # type: ignore[assignment]
    return xr.DataArray(image, coords, schema.PATTERN_DIMS, "bragg_vector_map", attrs)


def _splat_block(
    qy: Array, qx: Array, weight: Array | None = None, *, shape: tuple[int, int], sampling: float
) -> Array:
    """Map of one block of peaks, with two leading axes of length one."""
    return splat_peaks(qy, qx, weight, shape, sampling=sampling)[None, None]

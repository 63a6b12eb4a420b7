"""From the peaks of cepstra, which lie in real space, to the lattice of the detector that all others give."""

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from . import schema

REAL_SPACE = "real"  # value of the attribute `space` of peaks found in cepstra

Array = NDArray[np.float64]


def in_real_space(peaks: xr.Dataset) -> bool:
    """Whether these peaks were found in cepstra, and so are vectors of real space."""
    return peaks.attrs.get("space") == REAL_SPACE


def cepstral_frame(detector_shape: ArrayLike) -> tuple[int, tuple[float, float]]:
    """Side M in px of which a cepstral px is one cycle, and where zero is, (y, x) px."""
    rows, columns = (int(v) for v in np.asarray(detector_shape))
    return max(rows, columns), (float(rows // 2), float(columns // 2))


def other_lattice(vectors: ArrayLike, side: int) -> Array:
    """Real vectors (cepstral px) of reciprocal ones (detector px), or the reverse; rows (.., 2, 2)."""
    return side * np.linalg.inv(np.asarray(vectors, dtype=float)).swapaxes(-1, -2)


def as_fitted(peaks: xr.Dataset) -> xr.Dataset:
    """Cepstral peaks as a lattice fit takes them: nothing but vectors about one origin."""
    plain = peaks.drop_vars(["origin_qy", "origin_qx"], errors="ignore")
    return plain.assign_attrs(space="")


def to_reciprocal(lattice: xr.Dataset, peaks: xr.Dataset) -> xr.Dataset:
    """The lattice fitted to cepstral peaks as one in detector px, and its covariance to first order.

    The origin is `origin_qy`, `origin_qx` of `peaks`, NaN without: a cepstrum does not know where it is.
    Each peak of a cepstrum is fitted together with its opposite; the covariance is scaled for the degrees of
    freedom that are really there, and `n_indexed` counts pairs.
    """
    side, _ = cepstral_frame(peaks.attrs["detector_shape"])
    names = list(schema.LATTICE_PARAMETERS[2:])
    results = xr.apply_ufunc(
        _convert,
        *(lattice[name] for name in names),
        lattice["covariance"],
        lattice["n_indexed"],
        kwargs={"side": side},
        input_core_dims=[[]] * 4 + [["parameter", "parameter2"], []],
        output_core_dims=[[]] * 4 + [["parameter", "parameter2"], []],
        dask="parallelized",
        output_dtypes=[np.float64] * 4 + [np.float32, np.int16],
    )
    out = lattice.copy()
    for name, values in zip([*names, "covariance", "n_indexed"], results, strict=True):
        out[name] = values.assign_attrs(lattice[name].attrs)
    for name in schema.LATTICE_PARAMETERS[:2]:
        found = peaks[name] if name in peaks else xr.full_like(lattice[name], np.nan)
        out[name] = found.where(lattice["g1_qy"].notnull()).assign_attrs(lattice[name].attrs)
    out["fit_error"].attrs["note"] = (
        "of the peaks in cepstral px: one cycle over the longer side of the detector"
    )
    basis = other_lattice(lattice.attrs["basis_px"], side)
    kept: dict[str, Any] = {
        "cepstral_basis_px": lattice.attrs["basis_px"],
        "cepstral_origin_px": lattice.attrs["origin_px"],
        "basis_px": basis.tolist(),
        "bases_px": [basis.tolist()],
    }
    if "origin_qy" in peaks:
        kept["origin_px"] = [float(peaks[name].mean()) for name in schema.LATTICE_PARAMETERS[:2]]
    out.attrs = lattice.attrs | kept
    return out


def _convert(*arrays: NDArray, side: int) -> tuple[NDArray, ...]:
    """Vectors, covariance and number of peaks of a real lattice as those of the reciprocal one."""
    a = np.stack(arrays[:4], -1).astype(np.float64).reshape(*arrays[0].shape, 2, 2)
    covariance, n = np.asarray(arrays[4], dtype=np.float64), np.asarray(arrays[5])
    known: NDArray = np.asarray(np.isfinite(a).all((-1, -2)))
    b = np.linalg.inv(np.where(known[..., None, None], a, np.eye(2)))
    g = np.where(known[..., None, None], side * b.swapaxes(-1, -2), np.nan)
    # d g_ij = - side * b_jk d a_kl b_li
    jacobian = -side * np.einsum("...jk,...li->...ijkl", b, b).reshape(*known.shape, 4, 4)
    # 2 n coordinates of n peaks are fitted as if independent, though half of them repeat the rest
    repeat = (2.0 * n - 2) / np.maximum(n, 1)
    out = np.full(covariance.shape, np.nan, dtype=np.float32)
    block = jacobian @ covariance[..., 2:, 2:] @ jacobian.swapaxes(-1, -2) * repeat[..., None, None]
    out[..., 2:, 2:] = np.where(known[..., None, None], block, np.nan)
    return (*(g[..., i, j] for i in (0, 1) for j in (0, 1)), out, (n // 2).astype(np.int16))

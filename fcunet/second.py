"""A second opinion: the strain that another detector finds in the same scan, and how far the two agree.

Two methods that share nothing but the counts seldom err alike. Where they agree within their error bars there
is reason to trust both; where they do not, one of them is wrong, and only a look at the patterns tells which.
The second method runs as a run of its own in ``RUN/second``; here the two are put side by side.
"""

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from . import schema

Array = NDArray[np.float64]

FOLDER = "second"  # of the run directory
FIRST, SECOND = 1, 2  # values of `source`
_COMPARED = ("e_xx", "e_yy", "e_xy")
_FAR = 3.0  # so many error bars apart, two results contradict each other


def compare_opinions(first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
    """How far two strain maps of one scan are apart.

    Parameters
    ----------
    first, second : Dataset
        From :func:`fcunet.compute_strain`, on the same scan positions, in the same measure and frame.

    Returns
    -------
    Dataset
        The components of `second`, their `_std` and `valid`; `disagreement`, the root of the mean squared
        difference of e_xx, e_yy, e_xy; `disagreement_sigma`, the same with each difference in units of its
        error bar (of both, in quadrature): about 1 where both are right. NaN where either has no lattice. In
        the attributes `disagreement_rms` and `disagreement_sigma_median` over the scan, `disagreement_share`,
        the share of positions more than 3 error bars apart, `difference_mean` of each component, and
        `positions` compared.

    Raises
    ------
    ValueError
        If the two are of different scans, measures, conventions or frames.
    """
    for name in ("measure", "convention", "frame"):
        if first.attrs.get(name) != second.attrs.get(name):
            raise ValueError(
                f"the two results differ in {name}: {first.attrs.get(name)!r} and "
                f"{second.attrs.get(name)!r}; compute both with the same settings"
            )
    if first["e_xx"].shape != second["e_xx"].shape:
        raise ValueError(
            f"one result has {first['e_xx'].shape} positions, the other {second['e_xx'].shape}; "
            "compare two of the same region"
        )
    names = [c + end for c in schema.STRAIN_COMPONENTS for end in ("", "_std")]
    both = second[[name for name in (*names, "valid") if name in second]].copy()
    difference = np.stack([first[c].values - second[c].values for c in _COMPARED]).astype(np.float64)
    apart = np.sqrt((difference**2).mean(0))
    sigma = _in_error_bars(difference, first, second)
    for name, values in (("disagreement", apart), ("disagreement_sigma", sigma)):
        both[name] = (schema.SCAN_DIMS, values.astype(np.float32), schema.SECOND[name].attrs)
    both.attrs = {k: v for k, v in second.attrs.items()} | _numbers(difference, apart, sigma)
    return both


def _in_error_bars(difference: Array, first: xr.Dataset, second: xr.Dataset) -> Array:
    """Root mean square over components of the differences in units of their error bars; NaN without."""
    if any(f"{c}_std" not in d for c in _COMPARED for d in (first, second)):
        return np.full(difference.shape[1:], np.nan)
    bars = np.stack(
        [np.hypot(first[f"{c}_std"].values, second[f"{c}_std"].values) for c in _COMPARED]
    ).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(((difference / bars) ** 2).mean(0))


def _numbers(difference: Array, apart: Array, sigma: Array) -> dict[str, Any]:
    """The map in a few numbers; those that cannot be had are left out."""
    known, compared = np.isfinite(apart), np.isfinite(sigma)
    numbers: dict[str, Any] = {"positions": int(known.sum())}
    if known.any():
        numbers["disagreement_rms"] = float(np.sqrt((apart[known] ** 2).mean()))
        means = difference[:, known].mean(1)
        numbers["difference_mean"] = {c: float(m) for c, m in zip(_COMPARED, means, strict=True)}
    if compared.any():
        numbers["disagreement_sigma_median"] = float(np.median(sigma[compared]))
        numbers["disagreement_share"] = float((sigma[compared] > _FAR).mean())
    return numbers


def fall_back(
    first: tuple[xr.Dataset, xr.Dataset], second: tuple[xr.Dataset, xr.Dataset], doubtful: xr.DataArray
) -> tuple[xr.Dataset, xr.Dataset]:
    """Lattice and strain of the first method, of the second where the first has none or is in doubt.

    Parameters
    ----------
    first, second : (Dataset, Dataset)
        Lattice and strain of each method.
    doubtful : DataArray of bool (scan_y, scan_x)
        Where the first is not to be trusted, such as outside the training range of a network.

    Returns
    -------
    lattice, strain : Dataset
        Strain with `source`: 1 the first, 2 the second, 0 none. A position is taken as a whole, lattice,
        error bars and grain; one in doubt that the second method does not know either keeps the first.
    """
    lattice, strain = first
    instead = second[1]["valid"].values & (~strain["valid"].values | doubtful.values)
    chosen = xr.DataArray(instead, dims=schema.SCAN_DIMS)
    merged = []
    for own, other in ((lattice, second[0]), (strain, second[1])):
        whole = own.copy()
        for name in own.data_vars:
            if name in other and set(schema.SCAN_DIMS) <= set(own[name].dims):
                values = xr.where(chosen, other[name].variable, own[name].variable)
                values = values.transpose(*own[name].dims)
                whole[name] = (own[name].dims, values.values.astype(own[name].dtype), own[name].attrs)
        merged.append(whole)
    if "residual_ratio" in merged[1] and "residual_ratio" not in second[1]:  # that of the first says nothing
        merged[1]["residual_ratio"] = merged[1]["residual_ratio"].where(~chosen)
    source = np.where(instead, SECOND, np.where(strain["valid"].values, FIRST, 0))
    merged[1]["source"] = (schema.SCAN_DIMS, source.astype(np.uint8), schema.TRUST["source"].attrs)
    return merged[0], merged[1]

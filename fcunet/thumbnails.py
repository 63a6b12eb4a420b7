"""Small pictures of finished blocks, for the live map: bright field, number of peaks, provisional strain.

The strain is provisional: against a lattice found in the first block with disks, without robust weights, at
8 x 8 positions of a block at most, and fewer where there are thousands of blocks: the map as a whole stays
within some 512 x 512 pixels, however large the scan. It shows a run going wrong hours before its end; no
result uses it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernels.lattice import NoLatticeError, find_basis, fit_lattice
from .kernels.strain import COMPONENTS, deformation_gradient, strain_from_F
from .layout import BlockGrid
from .zarrfolder import open_array

SIDE = 8
_MAP_PIXELS = 2**18
Thumbnails = dict[str, list[list[float | None]]]
Array = NDArray[np.float64]
_PEAKS = ("peak_qy", "peak_qx", "peak_intensity", "peak_sigma")


@dataclass(frozen=True)
class ProvisionalBasis:
    """Lattice vectors g1, g2 as (y, x) in px; plain numbers, for they travel with every task."""

    g: tuple[tuple[float, float], tuple[float, float]]


def picture_side(n_blocks: int) -> int:
    """Length (px) of the pictures in a scan of so many blocks: 8, less beyond 4096 blocks."""
    return max(1, min(SIDE, int((_MAP_PIXELS / max(n_blocks, 1)) ** 0.5)))


def thumbnail(image: np.ndarray, side: int = SIDE) -> list[list[float]]:
    """`image` (y, x) reduced to at most `side` x `side` means."""
    steps = [max(1, -(-n // side)) for n in image.shape]
    edges = [np.arange(0, n, step) for n, step in zip(image.shape, steps, strict=True)]
    filled = np.nan_to_num(image.astype(float))
    sums = np.add.reduceat(np.add.reduceat(filled, edges[0], axis=0), edges[1], axis=1)
    counts = np.diff([*edges[0], image.shape[0]])[:, None] * np.diff([*edges[1], image.shape[1]])
    return (sums / counts).tolist()


def thumbnails(
    values: Mapping[str, np.ndarray], origin: Array, basis: ProvisionalBasis | None, *, side: int = SIDE
) -> Thumbnails:
    """Pictures of one block.

    Parameters
    ----------
    values : mapping
        `bf`, `n_peaks` (by, bx) and the peaks (by, bx, peak), as `blocks.process_block` returns them.
    origin : ndarray, shape (by, bx, 2)
        Beam centre (y, x) in px.
    basis : ProvisionalBasis, optional
        Without it there is no strain.
    side : int
        Length of the pictures, px: :func:`picture_side`.

    Returns
    -------
    dict
        ``bf``, ``n_peaks`` and, with a basis, ``e_xx, e_yy, e_xy, theta`` (detector frame), at most `side` x
        `side` each; None where there is no lattice.
    """
    found: dict[str, Any] = {
        name: thumbnail(values[name], side) for name in ("bf", "n_peaks") if name in values
    }
    return found | (_strain(values, origin, basis, side) if basis is not None else {})


def _strain(
    values: Mapping[str, np.ndarray], origin: Array, basis: ProvisionalBasis, side: int
) -> Thumbnails:
    sub = tuple(slice(None, None, max(1, -(-n // side))) for n in values["peak_qy"].shape[:2])
    qy, qx, _, sigma = (np.asarray(values[name][sub], dtype=float) for name in _PEAKS)
    start = np.asarray(origin, dtype=float)[sub]
    g_ref = np.array(basis.g)
    weights: dict[str, Any] = (
        {"sigma": sigma, "weighting": "sigma"} if np.isfinite(sigma).any() else {"weighting": "uniform"}
    )
    fit = fit_lattice(qy, qx, g=g_ref, origin=start, robust=False, **weights)
    strain = strain_from_F(deformation_gradient(fit.g, g_ref))
    return {
        name: [[round(v, 5) if np.isfinite(v) else None for v in row] for row in strain[name].tolist()]
        for name in COMPONENTS
    }


def find_provisional_basis(
    peaks: str | Path, grid: BlockGrid, block: tuple[int, int]
) -> ProvisionalBasis | None:
    """The lattice of one finished block of a peaks store; None if it has none."""
    values = _read(peaks, grid, block)
    flat = {name: values[name].reshape(-1, values[name].shape[-1]) for name in _PEAKS[:3]}
    try:
        found = find_basis(flat["peak_qy"], flat["peak_qx"], flat["peak_intensity"])
    except NoLatticeError:
        return None
    g = np.asarray(found.g, dtype=float)
    return ProvisionalBasis(((g[0, 0], g[0, 1]), (g[1, 0], g[1, 1])))


def stored_thumbnails(
    peaks: str | Path, grid: BlockGrid, block: tuple[int, int], origin: Array, basis: ProvisionalBasis | None
) -> Thumbnails:
    """Pictures of a block that was finished earlier, from the peaks store."""
    return thumbnails(_read(peaks, grid, block), origin, basis, side=picture_side(len(grid)))


def _read(peaks: str | Path, grid: BlockGrid, block: tuple[int, int]) -> dict[str, np.ndarray]:
    region = grid.slices(*block)
    return {name: np.asarray(open_array(peaks, name)[region]) for name in ("bf", "n_peaks", *_PEAKS)}

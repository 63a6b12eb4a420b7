"""Grains of a scan: connected positions of one lattice whose orientation changes little between them."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def label_grains(
    F: ArrayLike, lattice_id: ArrayLike, *, max_angle_degree: float = 2.0, max_strain: float = 0.03
) -> NDArray[np.int32]:
    """Number the grains of a scan, the largest first.

    Parameters
    ----------
    F : array_like, shape (rows, columns, 2, 2)
        Deformation of each position's lattice against a lattice common to all with its `lattice_id`; NaN
        where there is none.
    lattice_id : array_like of int, shape (rows, columns)
        Which lattice; 0 for none.
    max_angle_degree, max_strain : float
        Neighbours (sharing a side) that differ by more in orientation, or in a component of F once turned
        alike, belong to different grains. A crystal that bends slowly stays one grain.

    Returns
    -------
    ndarray of int32, shape (rows, columns)
        1 for the largest grain; 0 where there is no lattice.
    """
    F, kind = np.asarray(F, dtype=np.float64), np.asarray(lattice_id)
    ny, nx = kind.shape
    here = (kind > 0) & np.isfinite(F).all((2, 3))
    angle = np.arctan2(F[..., 0, 1] - F[..., 1, 0], F[..., 0, 0] + F[..., 1, 1])
    metric = np.swapaxes(F, -1, -2) @ F / 2  # of the stretch alone
    index = np.arange(ny * nx).reshape(ny, nx)
    pairs = []
    for a, b in (
        ((slice(None, -1), slice(None)), (slice(1, None), slice(None))),
        ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
    ):
        turn = np.abs(np.angle(np.exp(1j * (angle[a] - angle[b]))))
        alike = here[a] & here[b] & (kind[a] == kind[b]) & (turn <= np.deg2rad(max_angle_degree))
        alike &= np.abs(metric[a] - metric[b]).max((2, 3), initial=0) <= max_strain
        pairs.append((index[a][alike], index[b][alike]))
    rows, columns = (np.concatenate(side) for side in zip(*pairs, strict=True))
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(ny * nx, ny * nx))
    _, label = connected_components(graph, directed=False)
    label = np.where(here.ravel(), label, -1)
    names, first, size = np.unique(label[label >= 0], return_index=True, return_counts=True)
    number = np.zeros(label.max(initial=0) + 1, np.int32)
    number[names[np.lexsort((first, -size))]] = np.arange(1, len(names) + 1)
    return np.where(label >= 0, number[label], 0).astype(np.int32).reshape(ny, nx)

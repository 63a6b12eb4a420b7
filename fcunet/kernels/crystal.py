"""An ideal crystal on the detector: which reflections g1 and g2 are, and where they would lie (NumPy).

Reciprocal vectors are in 1/angstrom without 2 pi, lattices on the detector (2, 2) with rows g1, g2 and
columns (y, x).
"""

import itertools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .strain import deformation_gradient, strain_from_F

Array = NDArray[np.float64]

# rows: primitive vectors in units of the conventional ones
PRIMITIVE = {
    "P": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "I": ((-0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.5, 0.5, -0.5)),
    "F": ((0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)),
    "C": ((0.5, 0.5, 0), (-0.5, 0.5, 0), (0, 0, 1)),
    "R": ((2 / 3, 1 / 3, 1 / 3), (-1 / 3, 1 / 3, 1 / 3), (-1 / 3, -2 / 3, 1 / 3)),
}
_ALIKE = 2e-3  # two readings of a lattice whose strains differ by less are one


def cell_from_parameters(a: float, b: float, c: float, alpha: float, beta: float, gamma: float) -> Array:
    """Rows a, b, c (a along x, b in the xy plane) from lengths and angles in degrees: shape (3, 3)."""
    cos = np.cos(np.radians([alpha, beta, gamma]))
    sin_gamma = np.sin(np.radians(gamma))
    cy = (cos[0] - cos[1] * cos[2]) / sin_gamma
    cz = np.sqrt(1 - cos[1] ** 2 - cy**2)
    return np.array([[a, 0, 0], [b * cos[2], b * sin_gamma, 0], [c * cos[1], c * cy, c * cz]])


def cell_from_numbers(numbers: list[float]) -> Array:
    """Cell (3, 3) from 1 (cubic a), 2 (hexagonal a, c), 3 (a, b, c at right angles) or all 6 parameters.

    Raises
    ------
    ValueError
        For another number of them, or a cell without volume.
    """
    if len(numbers) == 1:
        parameters = [numbers[0]] * 3 + [90.0] * 3
    elif len(numbers) == 2:
        parameters = [numbers[0], numbers[0], numbers[1], 90.0, 90.0, 120.0]
    elif len(numbers) == 3:
        parameters = [*numbers, 90.0, 90.0, 90.0]
    elif len(numbers) == 6:
        parameters = list(numbers)
    else:
        raise ValueError(
            f"{len(numbers)} cell parameters; needed are 1 (cubic a), 2 (hexagonal a,c), 3 (a,b,c) or all 6"
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        cell = cell_from_parameters(*parameters)
    if min(parameters[:3]) <= 0 or not np.isfinite(cell).all() or not abs(np.linalg.det(cell)) > 0:
        raise ValueError(f"{parameters} is no cell: lengths must be positive and the angles fit together")
    return cell


def index_lattice(
    g: ArrayLike,
    cell: ArrayLike,
    *,
    centring: str = "P",
    zone: ArrayLike | None = None,
    tolerance: float = 0.08,
) -> NDArray[np.int64]:
    """The reflections of a crystal that two measured lattice vectors are.

    Parameters
    ----------
    g : array_like, shape (2, 2)
        Measured g1, g2 in 1/angstrom.
    cell : array_like, shape (3, 3)
        Rows a, b, c in angstrom.
    centring : str
        P, I, F, C or R: leaves out the reflections that it extinguishes.
    zone : array_like of 3 int, optional
        Zone axis [u v w]; default is any.
    tolerance : float
        Largest strain and shear of the measured against the ideal lattice.

    Returns
    -------
    ndarray of int, shape (2, 3)
        Miller indices of g1 and g2; of equivalent choices any, for all give one lattice.

    Raises
    ------
    ValueError
        If no pair of reflections fits, or several that are not equivalent fit about as well.
    """
    g, cell = np.asarray(g, dtype=np.float64), np.asarray(cell, dtype=np.float64)
    length, limit = np.hypot(*g.T), 1 + tolerance
    hkl = _reflections(cell, centring, float(length.max() * limit))
    if zone is not None:
        axis = np.asarray(zone, dtype=np.int64)
        hkl = hkl[hkl @ axis == 0]
    q: Array = hkl.astype(np.float64) @ np.linalg.inv(cell).T
    size = np.linalg.norm(q, axis=1)
    first, second = (np.flatnonzero(np.abs(size / one - 1) < tolerance) for one in length)
    found: list[tuple[float, NDArray[np.int64]]] = []
    for i, j in itertools.product(first, second):
        ideal = _flat(q[[i, j]], g)
        if ideal is None:
            continue
        stretch = strain_from_F(deformation_gradient(g, ideal), "biot")
        off = float(np.sqrt(stretch["e_xx"] ** 2 + stretch["e_yy"] ** 2 + 2 * stretch["e_xy"] ** 2))
        if off < tolerance:
            found.append((off, hkl[[i, j]]))
    where = "any zone" if zone is None else f"the zone {np.asarray(zone).tolist()}"
    lengths = " and ".join(f"{v:.4f}" for v in length)
    if not found:
        raise ValueError(
            f"no two reflections of the crystal in {where} have the lengths {lengths} 1/angstrom and the "
            f"angle of the measured lattice within {100 * tolerance:.0f} %; check the cell and the pixel "
            "size, or give the zone axis or the indices of g1 and g2 (zone, miller)"
        )
    found.sort(key=lambda entry: entry[0])
    rivals = [h for off, h in found if off < 3 * found[0][0] + 0.01]
    best = found[0][1]
    for other in rivals[1:]:
        if not _same_shape(best, other, cell):
            raise ValueError(
                f"g1 and g2 of {lengths} 1/angstrom may be {best.tolist()} or {other.tolist()}, which are "
                "not equivalent; give the zone axis, or the indices (miller)"
            )
    return best


def ideal_lattice(miller: ArrayLike, cell: ArrayLike, g: ArrayLike) -> Array:
    """The undeformed lattice of a crystal, turned in the plane of the detector onto a measured one.

    Parameters
    ----------
    miller : array_like of int, shape (2, 3)
        Indices of g1 and g2.
    cell : array_like, shape (3, 3)
        Rows a, b, c in angstrom.
    g : array_like, shape (2, 2)
        Measured lattice in 1/angstrom: it gives direction and handedness, nothing else.

    Returns
    -------
    ndarray, shape (2, 2)
        g1, g2 in 1/angstrom. Against it the measured lattice has no rotation (in the polar sense).

    Raises
    ------
    ValueError
        If the indices are parallel.
    """
    q = np.asarray(miller, dtype=np.float64) @ np.linalg.inv(np.asarray(cell, dtype=np.float64)).T
    flat = _flat(q, np.asarray(g, dtype=np.float64))
    if flat is None:
        raise ValueError(
            f"the reflections {np.asarray(miller).tolist()} are parallel or zero; give two others"
        )
    return flat


def _flat(q: Array, g: Array) -> Array | None:
    """Two vectors (2, 3) of a plane as (2, 2), turned and mirrored onto `g`; None where they are parallel."""
    x = q[0] / max(np.linalg.norm(q[0]), 1e-300)
    along = q @ x
    across = np.linalg.norm(q[1] - along[1] * x)
    if not across > 1e-9 * (np.linalg.norm(q[1]) + 1e-300) or not np.linalg.norm(q[0]) > 0:
        return None
    ideal = np.array([[0.0, along[0]], [across, along[1]]])  # (y, x)
    if np.linalg.det(ideal) * np.linalg.det(g) < 0:
        ideal[:, 0] *= -1
    # twice: the polar angle of F is exact only where F is near a rotation
    for _ in range(2):
        angle = float(strain_from_F(deformation_gradient(g, ideal), "biot")["theta"])
        c, s = np.cos(angle), np.sin(angle)
        ideal = ideal @ np.array([[c, -s], [s, c]])
    return ideal


def _reflections(cell: Array, centring: str, q_max: float) -> NDArray[np.int64]:
    """Indices (n, 3) of all reflections up to q_max that the centring allows, without (0, 0, 0)."""
    if centring not in PRIMITIVE:
        raise ValueError(f"centring is {centring!r}; known are {', '.join(PRIMITIVE)}")
    reach = np.floor(q_max * np.linalg.norm(cell, axis=1)).astype(int)
    axes = [np.arange(-n, n + 1) for n in reach]
    hkl = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    allowed = np.abs((hkl @ np.array(PRIMITIVE[centring]).T + 0.5) % 1 - 0.5).max(1) < 1e-6
    q = np.linalg.norm(hkl @ np.linalg.inv(cell).T, axis=1)
    return hkl[allowed & (q > 0) & (q <= q_max)]


def _same_shape(one: NDArray[np.int64], other: NDArray[np.int64], cell: Array) -> bool:
    """Whether two pairs of reflections have the same lengths and angle."""
    q = [h @ np.linalg.inv(cell).T for h in (one, other)]
    gram = [v @ v.T for v in q]
    return bool(np.abs(gram[0] - gram[1]).max() < _ALIKE * np.abs(gram[0]).max())

"""A known crystal as the reference of strain: from lattice parameters or a CIF file, to vectors in px."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .kernels.crystal import PRIMITIVE, cell_from_numbers, ideal_lattice, index_lattice

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Crystal:
    """Cell (3, 3), rows a, b, c in angstrom, its centring, and what it was made from."""

    cell: Array
    centring: str
    name: str

    def lattice(
        self,
        g: ArrayLike,
        q_pixel: float,
        *,
        zone: ArrayLike | None = None,
        miller: ArrayLike | None = None,
    ) -> tuple[Array, NDArray[np.int64]]:
        """The ideal lattice on the detector, px, turned onto a measured one, and the indices of g1, g2.

        Parameters
        ----------
        g : array_like, shape (2, 2)
            Measured g1, g2 in px.
        q_pixel : float
            1/angstrom per px.
        zone : array_like of 3 int, optional
            Zone axis; narrows the search for the indices.
        miller : array_like of int, shape (2, 3), optional
            Indices of g1 and g2. None: found from their lengths and angle.

        Raises
        ------
        ValueError
            If the crystal has no such lattice, or several.
        """
        measured = np.asarray(g, dtype=np.float64) * q_pixel
        if miller is None:
            miller = index_lattice(measured, self.cell, centring=self.centring, zone=zone)
        indices = np.asarray(miller, dtype=np.int64).reshape(2, 3)
        return ideal_lattice(indices, self.cell, measured) / q_pixel, indices


def read_crystal(text: str) -> Crystal:
    """A crystal from its cell or a CIF file.

    Parameters
    ----------
    text : str
        Centring (P if left out) and cell, lengths in angstrom and angles in degrees: "F 5.4309" cubic,
        "2.9505,4.6855" hexagonal, "a,b,c" at right angles, "a,b,c,alpha,beta,gamma"; or the path of a
        ``.cif`` file (needs ``pip install ase``).

    Raises
    ------
    ValueError, FileNotFoundError, ImportError
        If it is neither, or ase is missing.
    """
    if text.lower().endswith(".cif"):
        return _from_cif(Path(text))
    found = re.fullmatch(rf"(?:([{''.join(PRIMITIVE)}])[ :]+)?([-+0-9.,e ]+)", text.strip())
    if not found:
        raise ValueError(
            f"{text!r} is no crystal; give lattice parameters in angstrom and degrees such as 'F 5.4309' "
            "(cubic), '2.9505,4.6855' (hexagonal a,c), a,b,c or all six, or a .cif file"
        )
    try:
        numbers = [float(v) for v in found[2].split(",")]
        return Crystal(cell_from_numbers(numbers), found[1] or "P", text.strip())
    except ValueError as err:
        raise ValueError(f"{text!r} is no crystal: {err}") from None


def read_cif(path: str | Path) -> tuple[Array, tuple[str, ...], Array]:
    """Cell (3, 3) in angstrom of a CIF file, and element and fractional coordinates (n, 3) of all atoms.

    Raises
    ------
    FileNotFoundError, ImportError
        If there is no such file, or ase is missing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such CIF file: {path}")
    try:
        from ase.io import read
    except ImportError:
        raise ImportError(
            "reading CIF files needs ase: pip install 'fcunet[simulation]'; or give centring and cell, such "
            "as 'F 5.4309'"
        ) from None
    atoms: Any = read(path)  # a list of them only where several are asked for
    return (
        np.asarray(atoms.cell, dtype=np.float64),
        tuple(atoms.get_chemical_symbols()),
        np.asarray(atoms.get_scaled_positions(), dtype=np.float64),
    )


def _from_cif(path: Path) -> Crystal:
    cell, symbols, positions = read_cif(path)
    return Crystal(cell, _centring(np.array(symbols), positions), path.name)


def _centring(species: NDArray, place: Array) -> str:
    """The centring under which all atoms of a cell repeat; P where there is none."""
    for name, vectors in PRIMITIVE.items():
        if name == "P":
            continue
        shifts = [v for v in np.asarray(vectors) if (np.abs(v % 1) > 1e-6).any()]
        if all(_repeats(species, place, shift) for shift in shifts):
            return name
    return "P"


def _repeats(species: NDArray, place: Array, shift: Array) -> bool:
    """Whether every atom has a like one at `shift` from it."""
    apart = (place[:, None] + shift - place[None] + 0.5) % 1 - 0.5
    return bool(((np.abs(apart).max(-1) < 1e-3) & (species[:, None] == species)).any(1).all())

"""Rings that a powder of a known crystal gives: what a detector is calibrated with."""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..crystal import read_cif, read_crystal
from ..kernels.crystal import PRIMITIVE
from .crystals import Crystal, default_u_rms, load_crystal
from .library import load_library
from .scattering import StructureFactors

Array = NDArray[np.float64]


def find_crystal(text: str) -> Crystal:
    """A crystal by name, by its cell, or from a CIF file.

    Parameters
    ----------
    text : str
        A name ("Au", "Si", or of the library: "AlN-wurtzite..."); centring and cell, lengths in angstrom and
        angles in degrees, as for :func:`fcunet.crystal.read_crystal` ("F 4.0782" cubic, "P 2.9505,4.6855"
        hexagonal); or the path of a ``.cif`` file (needs ``pip install ase``).

    Raises
    ------
    ValueError, FileNotFoundError, ImportError
        If it is none of these, or ase is missing.
    """
    if text.lower().endswith(".cif"):
        return _from_cif(Path(text))
    if re.fullmatch(rf"[{''.join(PRIMITIVE)}][ :]+[-+0-9.,e ]+", text.strip()):
        return _from_cell(text)
    try:
        return load_crystal(text)
    except ValueError:
        library = load_library()
        if text in library:
            return library[text]
    raise ValueError(
        f"unknown crystal {text!r}; give a name such as Au or Si, centring and cell such as 'F 4.0782' or "
        "'P 2.9505,4.6855' (hexagonal a,c), six cell parameters, or a .cif file"
    )


def powder_rings(
    crystal: Crystal, q_max: float, *, least: float = 1e-3, resolution: float = 1e-6
) -> tuple[Array, Array]:
    """Radii (1/angstrom) and intensities (multiplicity times |V_g|^2, strongest 1) of the rings to `q_max`.

    Rings weaker than `least` are left out, the forbidden ones with them; multiple scattering may fill those
    in single crystals, for which ``least=0`` keeps all that the centring allows.
    """
    factors = StructureFactors(crystal, g_max=q_max)
    axes = [np.arange(-n, n + 1) for n in factors.half]
    hkl = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    q = np.linalg.norm(hkl @ factors.reciprocal.cpu().numpy(), axis=1)
    strength = np.abs(factors.v.cpu().numpy().reshape(-1)).astype(float) ** 2
    use = (q > 1e-9) & (q <= q_max)
    label = np.rint(q[use] / resolution).astype(np.int64)
    values, index = np.unique(label, return_inverse=True)
    total = np.bincount(index, strength[use]).astype(float)
    intensity = total / (total.max(initial=0.0) or 1.0)
    keep = intensity > least if least > 0 else np.ones(len(values), dtype=bool)
    return values[keep] * resolution, intensity[keep]


def _from_cif(path: Path) -> Crystal:
    cell, symbols, positions = read_cif(path)
    u_rms = np.array([default_u_rms(s) for s in symbols])
    return Crystal(path.stem, path.stem, "", cell, "P", symbols, positions, u_rms)


def _from_cell(text: str) -> Crystal:
    """One atom per lattice point: the centring alone decides which rings there are."""
    known = read_crystal(text)
    return Crystal(text, text, "", known.cell, known.centring, ("Au",), np.zeros((1, 3)), np.array([0.08]))

"""Rings that a powder of a known crystal gives: what a detector is calibrated with."""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .crystals import PRIMITIVE, Crystal, cell_from_parameters, default_u_rms, load_crystal
from .library import load_library
from .scattering import StructureFactors

Array = NDArray[np.float64]


def find_crystal(text: str) -> Crystal:
    """A crystal by name, by its cell, or from a CIF file.

    Parameters
    ----------
    text : str
        A name ("Au", "Si", or of the library: "AlN-wurtzite..."); centring and cell, lengths in angstrom and
        angles in degrees ("F 4.0782" cubic, "P 2.9505,4.6855" hexagonal, "C a,b,c,alpha,beta,gamma"); or the
        path of a ``.cif`` file (needs ``pip install ase``).

    Raises
    ------
    ValueError, FileNotFoundError
        If it is none of these.
    """
    if text.lower().endswith(".cif"):
        return _from_cif(Path(text))
    cell = re.fullmatch(rf"([{''.join(PRIMITIVE)}])[ :]+([-+0-9.,e ]+)", text.strip())
    if cell:
        return _from_cell(text, cell[1], [float(v) for v in cell[2].split(",")])
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


def _from_cell(name: str, centring: str, numbers: list[float]) -> Crystal:
    """One atom per lattice point: the centring alone decides which rings there are."""
    if len(numbers) == 1:
        parameters = [numbers[0]] * 3 + [90.0] * 3
    elif len(numbers) == 2:
        parameters = [numbers[0], numbers[0], numbers[1], 90.0, 90.0, 120.0]
    elif len(numbers) == 6:
        parameters = numbers
    else:
        raise ValueError(
            f"{name!r} has {len(numbers)} cell parameters; needed are 1 (cubic a), 2 (hexagonal a,c) or all 6"
        )
    cell = cell_from_parameters(*parameters)
    if min(parameters[:3]) <= 0 or not np.isfinite(cell).all():
        raise ValueError(f"{name!r} is no cell: lengths must be positive and the angles fit together")
    return Crystal(name, name, "", cell, centring, ("Au",), np.zeros((1, 3)), np.array([0.08]))


def _from_cif(path: Path) -> Crystal:
    if not path.is_file():
        raise FileNotFoundError(f"no such CIF file: {path}")
    try:
        from ase.io import read
    except ImportError:
        raise ImportError(
            "reading CIF files needs ase: pip install 'fcunet[simulation]'; or give centring and cell, such "
            "as --crystal 'F 4.0782'"
        ) from None
    atoms = read(path)
    symbols = tuple(atoms.get_chemical_symbols())
    return Crystal(
        path.stem,
        path.stem,
        "",
        np.asarray(atoms.cell),
        "P",
        symbols,
        np.asarray(atoms.get_scaled_positions()),
        np.array([default_u_rms(s) for s in symbols]),
    )

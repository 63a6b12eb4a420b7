"""Crystals to scatter from: published structures, their scattering factors, and random relatives of them.

`crystals.json` holds 119 structures of 59 prototypes, `lobato.json` the electron scattering factors
(provenance inside both). The split into train, validation and test is by prototype, so that a test crystal's
whole structure family is unknown to a network trained on the train split.
"""

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from ..kernels.crystal import PRIMITIVE, cell_from_parameters

DATA = Path(__file__).parent / "data"

# One-dimensional rms displacement at room temperature, angstrom; other elements 0.08 (light ones vibrate
# more, refractory metals less: International Tables C, 4.3 and compilations of B = 8 pi^2 u^2).
_U_DEFAULT = 0.08
_U_RMS = {
    "Li": 0.11, "B": 0.065, "C": 0.055, "N": 0.075, "O": 0.085, "F": 0.10, "Na": 0.12, "Mg": 0.10,
    "Al": 0.09, "Si": 0.078, "P": 0.08, "S": 0.085, "Cl": 0.12, "K": 0.12, "Ca": 0.085, "Ti": 0.078,
    "V": 0.075, "Cr": 0.065, "Mn": 0.075, "Fe": 0.068, "Co": 0.068, "Ni": 0.068, "Cu": 0.082,
    "Zn": 0.10, "Ga": 0.085, "Ge": 0.083, "As": 0.085, "Se": 0.09, "Sr": 0.085, "Y": 0.08, "Zr": 0.075,
    "Nb": 0.072, "Mo": 0.055, "Ru": 0.055, "Ag": 0.095, "Cd": 0.115, "In": 0.11, "Sn": 0.10, "Sb": 0.10,
    "Te": 0.11, "Cs": 0.12, "Ba": 0.085, "Gd": 0.085, "Hf": 0.068, "Ta": 0.06, "W": 0.05, "Re": 0.055,
    "Pt": 0.062, "Au": 0.085, "Pb": 0.12, "Bi": 0.11, "U": 0.065,
}  # fmt: skip


@dataclass(frozen=True)
class Crystal:
    """A crystal structure: conventional cell, and the sites that belong to one lattice point.

    Attributes
    ----------
    cell : ndarray, shape (3, 3)
        Rows a, b, c of the conventional cell, Cartesian, angstrom.
    centring : str
        P, I, F, C or R (hexagonal axes, obverse).
    symbols : tuple of str
        Element of every site.
    positions : ndarray, shape (n, 3)
        Fractional coordinates in the conventional cell.
    u_rms : ndarray, shape (n,)
        One-dimensional rms thermal displacement, angstrom.
    occupancy : ndarray, shape (n,)
        Share of the site held by the element: below 1 in an alloy, where several entries share one position.
    """

    name: str
    prototype: str
    split: str
    cell: np.ndarray
    centring: str
    symbols: tuple[str, ...]
    positions: np.ndarray
    u_rms: np.ndarray
    occupancy: np.ndarray = field(default_factory=lambda: np.ones(1))

    def __post_init__(self) -> None:
        if self.centring not in PRIMITIVE:
            raise ValueError(
                f"centring {self.centring!r} of {self.name} is not one of {', '.join(PRIMITIVE)}"
            )
        n = len(self.symbols)
        object.__setattr__(self, "occupancy", np.broadcast_to(np.asarray(self.occupancy, float), n).copy())
        object.__setattr__(self, "u_rms", np.broadcast_to(np.asarray(self.u_rms, float), n).copy())
        if np.shape(self.cell) != (3, 3) or np.shape(self.positions) != (n, 3):
            raise ValueError(
                f"{self.name}: cell has shape {np.shape(self.cell)}, positions {np.shape(self.positions)}; "
                f"needed are (3, 3) and ({n}, 3)"
            )

    @property
    def primitive_cell(self) -> np.ndarray:
        """Rows of a primitive cell, Cartesian, angstrom: shape (3, 3)."""
        return np.asarray(PRIMITIVE[self.centring]) @ self.cell

    @property
    def primitive_positions(self) -> np.ndarray:
        """Sites in fractional coordinates of `primitive_cell`: shape (n, 3)."""
        return self.positions @ np.linalg.inv(np.asarray(PRIMITIVE[self.centring]))

    @property
    def volume(self) -> float:
        """Volume of the primitive cell, cubic angstrom."""
        return float(abs(np.linalg.det(self.primitive_cell)))


@cache
def _table() -> dict[str, Crystal]:
    entries = json.loads((DATA / "crystals.json").read_text())["crystals"]
    return {
        e["name"]: Crystal(
            name=e["name"],
            prototype=e["prototype"],
            split=e["split"],
            cell=cell_from_parameters(*e["cell"]),
            centring=e["centring"],
            symbols=tuple(s[0] for s in e["sites"]),
            positions=np.array([s[1:] for s in e["sites"]], float),
            u_rms=np.array([default_u_rms(s[0]) for s in e["sites"]]),
        )
        for e in entries
    }


@cache
def lobato_parameters() -> dict[str, np.ndarray]:
    """Coefficients of the Lobato-Van Dyck scattering factors: element -> ndarray (2, 5), rows a and b."""
    elements = json.loads((DATA / "lobato.json").read_text())["elements"]
    return {symbol: np.array(rows, float) for symbol, rows in elements.items()}


@cache
def atomic_number(symbol: str) -> int:
    """Atomic number of an element (the table of scattering factors runs from hydrogen to lawrencium in
    order)."""
    return list(lobato_parameters()).index(symbol) + 1


def default_u_rms(symbol: str) -> float:
    """One-dimensional rms thermal displacement of an element at room temperature, angstrom."""
    return _U_RMS.get(symbol, _U_DEFAULT)


def load_crystals(split: str | None = None) -> list[Crystal]:
    """All crystals, or those of one split: "train", "validation" or "test"."""
    crystals = list(_table().values())
    if split is None:
        return crystals
    chosen = [c for c in crystals if c.split == split]
    if not chosen:
        raise ValueError(f"unknown split {split!r}; known: train, validation, test, or None for all crystals")
    return chosen


def load_crystal(name: str) -> Crystal:
    """One crystal by its name, for example "Si" or "TiO2-anatase"."""
    if name not in _table():
        raise ValueError(f"unknown crystal {name!r}; known: {', '.join(_table())}")
    return _table()[name]


def alloy(first: Crystal, second: Crystal, fraction: float) -> Crystal:
    """Virtual crystal between two of one prototype: `fraction` of the second, cell after Vegard's law.

    Every site is shared by both elements with their occupancies (the mean potential; no diffuse scattering).
    """
    if first.prototype != second.prototype or first.positions.shape != second.positions.shape:
        raise ValueError(
            f"{first.name} ({first.prototype}) and {second.name} ({second.prototype}) cannot be alloyed"
        )
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie between 0 and 1, not {fraction}")
    return Crystal(
        name=f"{first.name}{1 - fraction:.2f}{second.name}{fraction:.2f}",
        prototype=first.prototype,
        split=first.split,
        cell=(1 - fraction) * first.cell + fraction * second.cell,
        centring=first.centring,
        symbols=first.symbols + second.symbols,
        positions=np.concatenate([first.positions, second.positions]),
        u_rms=np.concatenate([first.u_rms, second.u_rms]),
        occupancy=np.concatenate([(1 - fraction) * first.occupancy, fraction * second.occupancy]),
    )


def vary(
    crystal: Crystal,
    rng: np.random.Generator,
    *,
    volume: float = 0.06,
    shear: float = 0.01,
    u_range: tuple[float, float] = (0.75, 1.35),
    substitute: float = 0.0,
) -> Crystal:
    """A random relative: cell volume within +-`volume`, random strain of rms `shear`, other thermal
    displacements.

    With probability `substitute` the elements are replaced by random others (one for one, so the symmetry and
    with it every forbidden reflection stays), which gives amplitudes no list of real compounds would. A
    network trained on such relatives cannot learn lattice constants or compositions by heart.
    """
    strain = rng.normal(0.0, shear, (3, 3))
    strain = (strain + strain.T) / 2
    strain -= np.eye(3) * np.trace(strain) / 3
    scale = (1 + rng.uniform(-volume, volume)) ** (1 / 3)
    cell = scale * crystal.cell @ (np.eye(3) + strain)
    symbols, u_rms = crystal.symbols, crystal.u_rms
    if rng.random() < substitute:
        pool = list(_U_RMS)
        kinds = sorted(set(symbols))
        new = dict(zip(kinds, rng.choice(pool, len(kinds), replace=False), strict=True))
        symbols = tuple(str(new[s]) for s in symbols)
        u_rms = np.array([default_u_rms(s) for s in symbols])
    u_rms = np.clip(u_rms * rng.uniform(*u_range), 0.05, 0.13)
    return replace(crystal, cell=cell, symbols=symbols, u_rms=u_rms)

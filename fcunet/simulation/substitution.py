"""Rules that turn a prototype and a choice of elements into a crystal with sensible bond lengths.

Used when the crystal library is built, never when it is read. The geometry of a prototype is fixed (cell
shape and fractional positions); the elements decide whether the compound is plausible and how large its cell
is:

* **ionic** (N, O, S, Se, Te or a halogen present, compounds of non-metals, tetrahedral semiconductors):
  oxidation states must add up to zero. A bond is as long as the Shannon radii of its two ions at their
  coordination numbers (Acta Cryst. A32 (1976) 751); where the cation has at most four neighbours and the
  anion is neither O nor F, as their tetrahedral covalent radii (Pauling, The Nature of the Chemical Bond, 3rd
  ed., table 7-13).
* **covalent** (non-metallic elements): covalent radii.
* **metallic** (metals, with or without B, C, Si, Ge, P, As, Sb): Goldschmidt radii, 3 % shorter at
  coordination 8 and below, combined with additive atomic volumes (Zen's law), because contacts alone say
  little where atoms of different sizes are packed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

# fmt: off
METALS = (
    "Li", "Na", "K", "Rb", "Cs", "Be", "Mg", "Ca", "Sr", "Ba", "Sc", "Y", "La", "Ce", "Pr", "Nd", "Sm",
    "Gd", "Tb", "Dy", "Ho", "Er", "Yb", "Lu", "Ti", "Zr", "Hf", "V", "Nb", "Ta", "Cr", "Mo", "W", "Mn",
    "Re", "Fe", "Ru", "Os", "Co", "Rh", "Ir", "Ni", "Pd", "Pt", "Cu", "Ag", "Au", "Zn", "Cd", "Hg", "Al",
    "Ga", "In", "Tl", "Sn", "Pb", "Bi", "Th", "U",
)
# fmt: on
NON_METALS = ("B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Ge", "As", "Se", "Br", "Sb", "Te", "I")
METALLOIDS = frozenset({"B", "C", "Si", "Ge", "P", "As", "Sb"})
# Elements that exist as covalent networks, layers or chains, not as molecules with the shape of one noble
# bond.
COVALENT_ELEMENTS = ("B", "C", "Si", "P", "S", "Ge", "As", "Se", "Sn", "Sb", "Te", "I")

OXIDATION_STATES: dict[str, tuple[int, ...]] = {
    "Li": (1,), "Na": (1,), "K": (1,), "Rb": (1,), "Cs": (1,), "Be": (2,), "Mg": (2,), "Ca": (2,),
    "Sr": (2,), "Ba": (2,), "Sc": (3,), "Y": (3,), "La": (3,), "Ce": (3, 4), "Pr": (3,), "Nd": (3,),
    "Sm": (3,), "Gd": (3,), "Tb": (3,), "Dy": (3,), "Ho": (3,), "Er": (3,), "Yb": (2, 3), "Lu": (3,),
    "Ti": (2, 3, 4), "Zr": (4,), "Hf": (4,), "V": (2, 3, 4, 5), "Nb": (3, 4, 5), "Ta": (4, 5),
    "Cr": (2, 3, 6), "Mo": (4, 6), "W": (4, 6), "Mn": (2, 3, 4), "Re": (4, 6, 7), "Fe": (2, 3),
    "Ru": (3, 4), "Os": (4,), "Co": (2, 3), "Rh": (3,), "Ir": (3, 4), "Ni": (2, 3), "Pd": (2, 4),
    "Pt": (2, 4), "Cu": (1, 2), "Ag": (1,), "Au": (1, 3), "Zn": (2,), "Cd": (2,), "Hg": (2,), "Al": (3,),
    "Ga": (3,), "In": (3,), "Tl": (1, 3), "Sn": (2, 4), "Pb": (2, 4), "Bi": (3,), "Th": (4,), "U": (4, 6),
    "B": (3, -3), "C": (4, -4), "N": (-3, 5), "O": (-2,), "F": (-1,), "Si": (4, -4), "P": (-3, 5),
    "S": (-2, 4, 6), "Cl": (-1, 7), "Ge": (4, 2, -4), "As": (-3, 3, 5), "Se": (-2, 4, 6), "Br": (-1,),
    "Sb": (-3, 3, 5), "Te": (-2, 4, 6), "I": (-1, 5),
}  # fmt: skip

TETRAHEDRAL_RADIUS = {
    "Be": 1.06, "B": 0.88, "C": 0.77, "N": 0.70, "O": 0.66, "F": 0.64, "Mg": 1.40, "Al": 1.26, "Si": 1.17,
    "P": 1.10, "S": 1.04, "Cl": 0.99, "Cu": 1.35, "Zn": 1.31, "Ga": 1.26, "Ge": 1.22, "As": 1.18,
    "Se": 1.14, "Br": 1.11, "Ag": 1.52, "Cd": 1.48, "In": 1.44, "Sn": 1.40, "Sb": 1.36, "Te": 1.32,
    "I": 1.28, "Hg": 1.48,
}  # fmt: skip

# Volume that a metalloid adds to a compound with metals, cubic angstrom: what remains of the cells of TiB2,
# NbC, MoSi2, FeSi, TiSi2, FeP, MnP, NiAs and CoSb when the volumes of their metals are subtracted.
_METALLOID_VOLUME = {"B": 4.5, "C": 4.5, "Si": 12.0, "Ge": 15.0, "P": 11.0, "As": 17.0, "Sb": 21.5}

SHELL = 1.25  # neighbours up to this multiple of the shortest distance count as coordinated
TIGHTEST, LOOSEST = 0.75, 1.4  # of the expected bond length
TIGHTEST_ANIONS = 0.9  # of a covalent bond: closest approach of two non-metals of the same charge
VOLUME_PER_ATOM = (5.0, 45.0)  # cubic angstrom


@dataclass(frozen=True)
class ElementData:
    """Radii of one element in angstrom; `shannon` maps oxidation state -> coordination number -> radius."""

    number: int
    electronegativity: float
    metallic_radius: float
    covalent_radius: float
    shannon: Mapping[int, Mapping[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Geometry:
    """A prototype: cell rows in angstrom, fractional positions (n, 3), species per site (n,), neighbours.

    `pairs` holds site indices i, j and distances d of all contacts up to 2.2 times the cube root of the
    volume per atom (the nearest neighbours of a close packing lie at 1.12), each contact in both directions.
    """

    cell: np.ndarray
    positions: np.ndarray
    species: np.ndarray
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, cell: np.ndarray, positions: np.ndarray, species: Sequence[int]) -> "Geometry":
        cell, positions = np.asarray(cell, float), np.asarray(positions, float)
        volume = abs(np.linalg.det(cell))
        cutoff = 2.2 * (volume / len(positions)) ** (1 / 3)
        # planes of constant fractional coordinate are 1/|reciprocal vector| apart; positions differ by less
        # than 1
        reach = np.ceil(cutoff * np.linalg.norm(np.linalg.inv(cell), axis=0)).astype(int) + 1
        shifts = np.array(list(product(*(range(-n, n + 1) for n in reach))), float)
        delta = positions[None, :, None] - positions[:, None, None] + shifts[None, None]
        distance = np.linalg.norm(delta @ cell, axis=-1)
        i, j, k = np.nonzero((distance > 1e-3) & (distance < cutoff))
        return cls(cell, positions, np.asarray(species, int), (i, j, distance[i, j, k]))

    @property
    def volume(self) -> float:
        """Volume of the cell, cubic angstrom."""
        return float(abs(np.linalg.det(self.cell)))

    def coordination(self, bonded: np.ndarray | None = None) -> np.ndarray:
        """Neighbours within `SHELL` of the shortest (bonded) contact of every site: shape (n,)."""
        i, _, d = self.pairs
        bonded = np.ones(len(d), bool) if bonded is None else bonded
        nearest = np.full(len(self.positions), np.inf)
        np.minimum.at(nearest, i[bonded], d[bonded])
        return np.bincount(i[bonded & (d < SHELL * nearest[i])], minlength=len(nearest))


def charges(
    elements: Sequence[str], counts: Sequence[int], data: Mapping[str, ElementData]
) -> tuple[int, ...] | None:
    """Oxidation states that add up to zero, the smallest such set; None if there is none.

    Metals are positive, and every negative element is more electronegative than every positive one.
    """
    balanced = []
    for states in product(*(OXIDATION_STATES[e] for e in elements)):
        if sum(s * n for s, n in zip(states, counts, strict=True)):
            continue
        cations = [data[e].electronegativity for e, s in zip(elements, states, strict=True) if s > 0]
        anions = [data[e].electronegativity for e, s in zip(elements, states, strict=True) if s < 0]
        if cations and anions and max(cations) < min(anions):
            balanced.append(states)
    return min(balanced, key=lambda s: (sum(map(abs, s)), s), default=None)


def bonding(elements: Sequence[str], geometry: Geometry) -> str:
    """Which of the rules of this module applies: "ionic", "covalent" or "metallic"."""
    metals = [e in METALS for e in elements]
    if all(e in METALLOIDS | {"Sn", "S", "Se", "Te", "I"} for e in elements) and len(elements) == 1:
        return "metallic" if elements[0] == "Sn" and geometry.coordination().min() > 4 else "covalent"
    if all(metals):
        return "metallic"
    if all(m or e in METALLOIDS for m, e in zip(metals, elements, strict=True)):
        tetrahedral = geometry.coordination().max() <= 4 and all(e in TETRAHEDRAL_RADIUS for e in elements)
        return "ionic" if tetrahedral or not any(metals) else "metallic"
    return "ionic"


def _shannon(element: ElementData, state: int, coordination: int) -> float:
    """Ionic radius at the nearest tabulated coordination number; NaN if the ion is not tabulated."""
    table = element.shannon.get(state, {})
    if not table:
        return np.nan
    return table[min(table, key=lambda n: (abs(n - coordination), n))]


def _covalent(symbol: str, data: Mapping[str, ElementData]) -> float:
    return TETRAHEDRAL_RADIUS.get(symbol, data[symbol].covalent_radius)


def fit_volume(geometry: Geometry, elements: Sequence[str], data: Mapping[str, ElementData]) -> float | str:
    """Cell volume (cubic angstrom) of the prototype with these elements, or the reason why there is none.

    Parameters
    ----------
    geometry : Geometry
        The prototype, at any scale.
    elements : sequence of str
        One element per species of `geometry`.

    Returns
    -------
    float or str
        The volume of `geometry.cell` that brings the median site to its expected bond length; or "charge",
        "contact" or "volume" if no oxidation states balance, if a contact is shorter than `TIGHTEST` or a
        site looser than `LOOSEST` times the expected one, or if the volume per atom lies outside
        `VOLUME_PER_ATOM`.
    """
    i, j, d = geometry.pairs
    n = len(geometry.positions)
    kind = bonding(elements, geometry)
    state: tuple[int, ...] = (0,) * len(elements)
    bonded = np.ones(len(d), bool)
    if kind == "ionic":
        balanced = charges(elements, np.bincount(geometry.species).tolist(), data)
        if balanced is None:
            return "charge"
        state = balanced
        states = np.array(state)[geometry.species]
        bonded = states[i] * states[j] < 0
    coordination = geometry.coordination(bonded)
    # bond lengths depend on the kind of site only: species and coordination number
    kinds, of_site = np.unique(np.stack([geometry.species, coordination]), axis=1, return_inverse=True)
    table = np.empty((kinds.shape[1],) * 2)
    for (p, (sp, cp)), (q, (sq, cq)) in product(enumerate(kinds.T), repeat=2):
        table[p, q] = _expected(kind, (elements[sp], elements[sq]), (state[sp], state[sq]), (cp, cq), data)
    of_site = of_site.reshape(-1)
    expected = table[of_site[i], of_site[j]]
    ratio = d / expected

    shortest = np.full(n, np.inf)
    np.minimum.at(shortest, i[bonded], ratio[bonded])
    if kind != "ionic":
        site = shortest
    else:  # the mean over the coordination shell: radii are means over distorted polyhedra, too
        nearest = np.full(n, np.inf)
        np.minimum.at(nearest, i[bonded], d[bonded])
        shell = bonded & (d < SHELL * nearest[i])
        count = np.bincount(i[shell], minlength=n)
        site = np.full(n, np.inf)
        total = np.bincount(i[shell], weights=ratio[shell], minlength=n)
        np.divide(total, count, out=site, where=count > 0)
    site = site[np.isfinite(site)]
    if not len(site):
        return "contact"
    scale = 1 / np.median(site)
    if kind == "metallic" and len(elements) > 1:
        additive = sum(
            _METALLOID_VOLUME.get(e) or 4 * np.sqrt(2) * data[e].metallic_radius ** 3
            for e in (elements[s] for s in geometry.species)
        )  # fcc volume per atom of spheres that touch: 4 sqrt(2) r^3
        scale = np.sqrt(scale * (additive / geometry.volume) ** (1 / 3))

    like = np.array([[_like_charges(a, b, data) for b in elements] for a in elements])
    crowded = ~bonded & (d * scale < like[geometry.species[i], geometry.species[j]])
    if shortest.min() * scale < TIGHTEST or site.max() * scale > LOOSEST or crowded.any():
        return "contact"
    volume = geometry.volume * scale**3
    if not VOLUME_PER_ATOM[0] <= volume / n <= VOLUME_PER_ATOM[1]:
        return "volume"
    return float(volume)


def _like_charges(a: str, b: str, data: Mapping[str, ElementData]) -> float:
    """Closest approach of two ions of the same sign, angstrom."""
    tightest = TIGHTEST if a in METALS or b in METALS else TIGHTEST_ANIONS
    return tightest * (_covalent(a, data) + _covalent(b, data))


def _expected(
    kind: str,
    symbols: tuple[str, str],
    states: tuple[int, int],
    coordinations: tuple[int, int],
    data: Mapping[str, ElementData],
) -> float:
    """Expected distance of two neighbours, angstrom; infinite for ions of like charge, which set no scale."""
    if kind == "metallic":
        radii = [data[e].metallic_radius if e in METALS else _covalent(e, data) for e in symbols]
        return sum(radii) * (0.97 if min(coordinations) <= 8 and all(e in METALS for e in symbols) else 1.0)
    # sp2 carbon and boron nitride: 1.42 and 1.45 instead of 1.54 and 1.58 angstrom
    planar = max(coordinations) <= 3 and set(symbols) <= {"B", "C", "N"}
    covalent = sum(_covalent(e, data) for e in symbols) * (0.92 if planar else 1.0)
    if kind == "covalent":
        return covalent
    if states[0] * states[1] >= 0:
        return np.inf
    cation, anion = (0, 1) if states[0] > 0 else (1, 0)
    if (
        symbols[cation] in TETRAHEDRAL_RADIUS
        and coordinations[cation] <= 4
        and symbols[anion] not in ("O", "F")
    ):
        return covalent
    ionic = sum(_shannon(data[symbols[s]], states[s], coordinations[s]) for s in (cation, anion))
    if np.isfinite(ionic):
        return ionic
    radius = (
        data[symbols[cation]].metallic_radius
        if symbols[cation] in METALS
        else _covalent(symbols[cation], data)
    )
    return radius + _covalent(symbols[anion], data)


def draw_elements(
    rng: np.random.Generator, originals: Sequence[str], data: Mapping[str, ElementData]
) -> tuple[str, ...]:
    """Random distinct elements in place of those of a prototype, of the same kind.

    Metals replace metals and non-metals (hydrogen among them) non-metals. One in seven compounds of both
    kinds is inverted (antifluorite), and in a compound of non-metals only, all but the most electronegative
    may be metals.
    """
    metal = [e != "H" and e not in NON_METALS for e in originals]
    if len(originals) == 1:
        pool = METALS if metal[0] else COVALENT_ELEMENTS
        return (str(rng.choice(pool)),)
    if any(metal) and not all(metal):
        if rng.random() < 1 / 7:
            metal = [not m for m in metal]
    elif not any(metal):
        last = max(range(len(originals)), key=lambda k: data[originals[k]].electronegativity)
        metal = [k != last and rng.random() < 0.7 for k in range(len(originals))]
    chosen = iter(rng.permutation(METALS)), iter(rng.permutation(NON_METALS))
    return tuple(str(next(chosen[0 if m else 1])) for m in metal)

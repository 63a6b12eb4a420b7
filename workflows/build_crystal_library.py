"""Build fcunet/simulation/data/library.json: 2000 and more plausible crystals of over 200 prototypes.

    pip install -e .[library]
    python workflows/build_crystal_library.py

The prototypes are those of the AFLOW encyclopedia (M. J. Mehl et al., Comput. Mater. Sci. 136 (2017) S1) as
shipped with pymatgen-core (MIT). Each is reduced to a Niggli-reduced primitive cell and occupied with other
elements of the same kind, metals for metals and non-metals for non-metals (sometimes the two exchanged, or a
metal for the less electronegative of two non-metals); `fcunet.simulation.substitution` tells whether
oxidation states balance, how large the cell must be for sensible bond lengths, and refuses contacts too
short, cages too wide and volumes out of range. Nobody claims that these compounds exist: they have the
geometry, the composition and the distances of real ones.

Prototypes that StructureMatcher finds alike, whatever their label, form one family, and so do those of the
published ones of crystals.json. A family belongs to one split. Where a training prototype would become a
held-out one if its elements could not be told apart (zincblende and diamond), elements of similar atomic
number are refused.

Nothing depends on the order of a set or on a global random state: the same versions write the same bytes.
"""

import argparse
import gzip
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import numpy as np
import pymatgen.analysis.prototypes as aflow
from monty.serialization import loadfn
from pymatgen.analysis.molecule_structure_comparator import CovalentRadius
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Element, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from fcunet.simulation import library, substitution
from fcunet.simulation.crystals import load_crystals

ROMAN = {"I": 1, "II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6, "VII": 7, "VIII": 8, "IX": 9, "X": 10}
ROMAN |= {"XI": 11, "XII": 12, "XIV": 14}
MAX_SITES, MAX_SPECIES, MAX_VOLUME = 24, 4, 300.0
PER_PROTOTYPE = {1: 6, 2: 12, 3: 15, 4: 8}  # crystals kept, by the number of species
ATTEMPTS = 600
CONTRAST = 0.1  # (Z1 - Z2) / (Z1 + Z2) below which two elements count as one
SEED = 20
# Entries that are not what their label says: impossible bond lengths at the volume that comes with them
EXCLUDED = {"A2B_tI12_141_e_a", "AB_tP4_131_c_e"}  # anatase, PtS
ALIKE = 0.15  # rms displacement over the cube root of the volume per atom: half of StructureMatcher's default

rejected: Counter = Counter()


def element_data() -> dict[str, substitution.ElementData]:
    """Radii of all elements the library may use, from pymatgen; Goldschmidt radii for Sn, Pb, Bi added."""
    missing = {"Sn": 1.58, "Pb": 1.75, "Bi": 1.70}
    estimates = {"Sn": {2: {8: 1.22}}}  # not in the table of 1976
    data = {}
    for symbol in (*substitution.METALS, *substitution.NON_METALS, "H"):
        element = Element(symbol)
        shannon: dict[int, dict[int, float]] = dict(estimates.get(symbol, {}))
        for state, environments in element.data.get("Shannon radii", {}).items():
            ions = shannon.setdefault(int(state), {})
            for roman, spins in sorted(environments.items(), key=lambda item: len(item[0])):
                if (coordination := ROMAN.get(roman.removesuffix("PY"))) is not None:  # square sites left out
                    radius = (spins.get("") or spins.get("High Spin") or spins["Low Spin"])["ionic_radius"]
                    ions.setdefault(coordination, radius)
        radius = element.data.get("Metallic radius") or missing.get(symbol, np.nan)
        data[symbol] = substitution.ElementData(
            element.Z, element.X, float(radius), CovalentRadius.radius[symbol], shannon
        )
    return data


def read_prototypes() -> tuple[list[dict], str]:
    """Small AFLOW prototypes (label, Structure, origin), and the SHA-256 of the file they come from."""
    path = Path(aflow.__file__).with_name("aflow_prototypes.json.gz")
    found, seen = [], Counter()
    for entry in loadfn(path):
        analyzer = SpacegroupAnalyzer(entry["snl"].structure, symprec=0.01)
        structure = analyzer.find_primitive().get_reduced_structure("niggli").get_sorted_structure()
        if len(structure) > MAX_SITES or len(structure.composition) > MAX_SPECIES:
            continue
        tags = entry["tags"]
        if tags["aflow"] in EXCLUDED:
            continue
        seen[tags["aflow"]] += 1
        label = tags["aflow"] + (f"-{seen[tags['aflow']]}" if seen[tags["aflow"]] > 1 else "")
        words = (structure.composition.reduced_formula, tags["strukturbericht"], tags["mineral"])
        origin = ", ".join(w for w in words if w not in ("", "None"))
        found.append(
            {
                "label": label,
                "structure": structure,
                "origin": origin,
                "space_group": analyzer.get_space_group_symbol(),
            }
        )
    return found, hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()


def published() -> list[dict]:
    """The prototypes of crystals.json, each by its first crystal."""
    first: dict[str, dict] = {}
    for c in load_crystals():
        structure = Structure(c.primitive_cell, c.symbols, c.primitive_positions)
        structure = structure.get_reduced_structure("niggli").get_sorted_structure()
        entry = {
            "label": c.prototype,
            "structure": structure,
            "split": c.split,
            "origin": f"{c.name}, published",
        }
        if len(structure) <= MAX_SITES:
            first.setdefault(c.prototype, entry | {"space_group": structure.get_space_group_info()[0]})
    return list(first.values())


def alike(structures: list[Structure], splits: Sequence[str | None]) -> list[int]:
    """Index of the first member of the family of each structure; elements may be exchanged, not merged.

    The most similar pairs are joined first, and never families bound to different splits: CaCl2 is a
    distorted rutile and, a little farther away, a distorted marcasite.
    """
    matcher = StructureMatcher(ltol=0.1, angle_tol=4, primitive_cell=True, scale=True)
    keys = [(len(s), s.composition.anonymized_formula) for s in structures]
    pairs = []
    for a, b in combinations(range(len(structures)), 2):
        if (
            keys[a] == keys[b]
            and (rms := matcher.get_rms_anonymous(structures[a], structures[b])[0]) is not None
        ):
            pairs.append((round(rms, 4), a, b))
    family = list(range(len(structures)))
    bound = list(splits)
    for rms, a, b in sorted(pairs):
        first, second = sorted((family[a], family[b]))
        if (
            rms < ALIKE
            and first != second
            and (None in (bound[first], bound[second]) or bound[first] == bound[second])
        ):
            bound[first] = bound[first] or bound[second]
            family = [first if f == second else f for f in family]
    return family


def one_element(structure: Structure) -> Structure:
    """The same sites, all of one element, reduced to the primitive cell of that lattice."""
    same = Structure(structure.lattice, ["Si"] * len(structure), structure.frac_coords)
    return same.get_primitive_structure(tolerance=0.1)


def assign_splits(entries: list[dict], hand: list[dict]) -> None:
    """Add family, split and whether elements must differ (`contrast`) to every prototype, in place."""
    everything = hand + entries
    families = alike([e["structure"] for e in everything], [e.get("split") for e in everything])
    fixed = {family: h["split"] for h, family in zip(hand, families, strict=False)}
    for family in set(families) - set(fixed):  # by a hash, so that new prototypes do not move the others
        digest = hashlib.sha256(everything[family]["label"].encode()).digest()
        fixed[family] = {0: "validation", 1: "test"}.get(digest[0] % 10, "train")
    for entry, family in zip(everything, families, strict=True):
        entry |= {"family": everything[family]["label"], "split": fixed[family]}

    bare = alike([one_element(e["structure"]) for e in everything], [None] * len(everything))
    held_out = {b for b, e in zip(bare, everything, strict=True) if e["split"] != "train"}
    for entry, b in zip(everything, bare, strict=True):
        entry["contrast"] = (
            entry["split"] == "train" and b in held_out and len(entry["structure"].composition) > 1
        )


def contrast(elements: tuple[str, ...], data: dict[str, substitution.ElementData]) -> float:
    """Largest difference of atomic numbers over their sum between any two elements."""
    z = np.array([data[e].number for e in elements], float)
    return float(np.max((z[:, None] - z) / (z[:, None] + z)))


def occupy(
    entry: dict, data: dict[str, substitution.ElementData], known: list[tuple[str, ...]]
) -> list[list]:
    """Crystals of one prototype, [elements..., volume]: the known ones first, then random ones."""
    structure = entry["structure"]
    originals = [e.symbol for e in structure.composition.elements]
    species = [originals.index(site.specie.symbol) for site in structure]
    geometry = substitution.Geometry.of(structure.lattice.matrix, structure.frac_coords, species)
    rng = np.random.default_rng([SEED, int(hashlib.sha256(entry["label"].encode()).hexdigest()[:8], 16)])
    kept: dict[tuple[str, ...], float] = {}
    for attempt in range(ATTEMPTS):
        elements = (
            known[attempt] if attempt < len(known) else substitution.draw_elements(rng, originals, data)
        )
        if elements in kept or not all(e in data and e != "H" for e in elements):
            continue
        if entry["contrast"] and contrast(elements, data) < CONTRAST:
            rejected["contrast"] += 1
            continue
        volume = substitution.fit_volume(geometry, elements, data)
        if isinstance(volume, str) or volume > MAX_VOLUME:
            rejected[volume if isinstance(volume, str) else "large"] += 1
            continue
        if any(set(k) == set(elements) and abs(v - volume) < 0.02 for k, v in kept.items()):
            continue  # AuCu is CuAu
        kept[elements] = round(volume, 2)
        if len(kept) == PER_PROTOTYPE[len(originals)]:
            break
    entry |= {"species": species, "elements": originals}
    return [[*elements, volume] for elements, volume in kept.items()]


def known_compositions(entry: dict) -> list[tuple[str, ...]]:
    """The elements of the prototype itself and of published crystals of its family, in its species order."""
    structure, matcher = entry["structure"], StructureMatcher(primitive_cell=True, scale=True)
    known = [tuple(e.symbol for e in structure.composition.elements)]
    for c in load_crystals():
        other = Structure(c.primitive_cell, c.symbols, c.primitive_positions)
        if len(other) == len(structure) and len(other.composition) == len(structure.composition):
            mapping = matcher.get_best_electronegativity_anonymous_mapping(structure, other)
            if mapping:
                known.append(tuple(mapping[e].symbol for e in structure.composition.elements))
    return known


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=library.LIBRARY_FILE)
    output = parser.parse_args().output
    warnings.simplefilter("ignore")
    data = element_data()
    entries, digest = read_prototypes()
    hand = published()
    assign_splits(entries, hand)
    entries += [h for h in hand if h["family"] not in {e["family"] for e in entries}]
    lines, n_crystals = [], 0
    for entry in sorted(entries, key=lambda e: e["label"]):
        crystals = occupy(entry, data, known_compositions(entry))
        if not crystals:
            continue
        structure = entry["structure"]
        record = {
            "prototype": entry["label"],
            "family": entry["family"],
            "split": entry["split"],
            "space_group": entry["space_group"],
            "origin": entry["origin"],
            "cell": [round(float(v), 5) for v in structure.lattice.parameters],
            "species": entry["species"],
            "positions": [round(float(v) % 1, 5) % 1 for v in structure.frac_coords.ravel()],
            "crystals": crystals,
        }
        lines.append(json.dumps(record, separators=(",", ":")))
        n_crystals += len(crystals)
    provenance = {
        "prototypes": "AFLOW encyclopedia (Comput. Mater. Sci. 136 (2017) S1) as in pymatgen-core "
        f"{version('pymatgen-core')} (MIT), aflow_prototypes.json sha256 {digest}; crystals.json",
        "volumes": "bond lengths after fcunet.simulation.substitution; not all of these compounds exist",
        "built_by": f"workflows/build_crystal_library.py, seed {SEED}, spglib {version('spglib')}",
        "layout": "cell: a, b, c, alpha, beta, gamma of a primitive cell, to be scaled to the volume (cubic "
        "angstrom) behind the elements of each crystal; positions: fractional x, y, z of every site in turn",
    }
    head = json.dumps({"provenance": provenance}, indent=1)[:-2]
    output.write_text(head + ',\n "prototypes": [\n' + ",\n".join(lines) + "\n]}\n")
    print(f"{n_crystals} crystals of {len(lines)} prototypes; compositions rejected: {dict(rejected)}")


if __name__ == "__main__":
    main()

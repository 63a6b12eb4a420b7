import json
from collections import Counter

import numpy as np
import pytest

from fcunet.simulation.crystals import atomic_number, cell_from_parameters, load_crystal, load_crystals
from fcunet.simulation.library import LIBRARY_FILE, library_provenance, load_library
from fcunet.simulation.substitution import (
    COVALENT_ELEMENTS,
    METALS,
    NON_METALS,
    ElementData,
    Geometry,
    charges,
    draw_elements,
    fit_volume,
)

# number, Pauling electronegativity, Goldschmidt and covalent radius, ionic radii (Shannon 1976)
DATA = {
    "Na": ElementData(11, 0.93, 1.86, 1.66, {1: {6: 1.02}}),
    "Cl": ElementData(17, 3.16, np.nan, 1.02, {-1: {6: 1.81}}),
    "Cu": ElementData(29, 1.90, 1.28, 1.32, {}),
    "Fe": ElementData(26, 1.83, 1.26, 1.42, {2: {6: 0.78}, 3: {6: 0.645}}),
    "Si": ElementData(14, 1.90, np.nan, 1.11, {4: {4: 0.26}}),
    "O": ElementData(8, 3.44, np.nan, 0.66, {-2: {2: 1.35, 6: 1.40}}),
}
FCC = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
ROCKSALT = Geometry.of(FCC, np.array([[0, 0, 0], [0.5, 0.5, 0.5]]), [0, 1])


def entries():
    return json.loads(LIBRARY_FILE.read_text())["prototypes"]


def geometry(entry):
    cell = cell_from_parameters(*entry["cell"])
    return Geometry.of(cell, np.reshape(entry["positions"], (-1, 3)), entry["species"])


def distances(shape: Geometry):
    """Sorted contacts of every site over the cube root of the volume per atom."""
    i, _, d = shape.pairs
    unit = (shape.volume / len(shape.positions)) ** (1 / 3)
    return [np.sort(d[i == k] / unit)[:24] for k in range(len(shape.positions))]


def same(first: Geometry, second: Geometry, tolerance=0.004) -> bool:
    """Whether each site of one has the surroundings of a site of the other, elements disregarded."""
    if len(first.positions) != len(second.positions):
        return False
    theirs = distances(second)
    return all(
        any(len(a) == len(b) and np.abs(a - b).max() < tolerance for b in theirs) for a in distances(first)
    )


def test_library__holds_over_2000_crystals_of_over_200_prototypes():
    crystals = load_library(published=False)
    assert len(crystals) > 2000
    assert len({c.prototype for c in crystals.values()}) > 200
    assert LIBRARY_FILE.stat().st_size < 1_000_000


def test_library__no_crystal_is_lost_to_a_name_used_twice():
    assert len(load_library(published=False)) == sum(len(e["crystals"]) for e in entries())


def test_load_library__prefers_published_lattice_constants():
    everything = load_library()
    assert all(np.array_equal(everything[c.name].cell, c.cell) for c in load_crystals())


def test_library__cells_are_small_and_atoms_of_usual_size():
    crystals = load_library(published=False).values()
    volume = np.array([c.volume for c in crystals])
    per_atom = volume / np.array([len(c.symbols) for c in crystals])
    assert volume.max() <= 300.1
    assert per_atom.min() >= 4.99
    assert per_atom.max() <= 45.01


def test_library__no_contact_is_shorter_than_the_shortest_real_bonds():
    for entry in entries():
        shape = geometry(entry)
        smallest = min(volume for *_, volume in entry["crystals"])
        shortest = shape.pairs[2].min() * (smallest / shape.volume) ** (1 / 3)
        assert shortest > 1.05, entry["prototype"]  # angstrom; carbon monoxide: 1.13


def test_library__cells_are_right_handed():
    assert all(np.linalg.det(c.cell) > 0 for c in load_library().values())


def test_library__every_element_has_scattering_factors():
    known = {"H", *METALS, *NON_METALS}
    assert {s for c in load_library(published=False).values() for s in c.symbols} <= known


def test_library__splits_do_not_share_a_prototype():
    split_of = {}
    for crystal in load_library().values():
        assert split_of.setdefault(crystal.prototype, crystal.split) == crystal.split


def test_library__splits_follow_those_of_the_published_crystals():
    published = {c.prototype: c.split for c in load_crystals()}
    library = {e["family"]: e["split"] for e in entries()}
    shared = published.keys() & library.keys()
    assert {"diamond", "rutile", "wurtzite", "fluorite"} <= shared
    assert {p: published[p] for p in shared} == {p: library[p] for p in shared}


def test_library__each_split_is_a_fair_share():
    families = Counter({e["family"]: e["split"] for e in entries()}.values())
    assert min(families["validation"], families["test"]) >= 15
    assert families["train"] > 150


def test_library__no_training_crystal_looks_like_a_held_out_prototype():
    # an independent check of the families: compares surroundings of sites, elements disregarded
    shapes = [(e, geometry(e)) for e in entries()]
    for train, a in shapes:
        if train["split"] != "train":
            continue
        for held_out, b in shapes:
            if held_out["split"] == "train" or not same(a, b):
                continue
            # the lattice is that of a held-out structure: different elements must tell them apart
            assert len(train["crystals"][0]) > len(held_out["crystals"][0]), (train["prototype"], held_out)
            for *elements, _ in train["crystals"]:
                z = np.array([atomic_number(e) for e in elements], float)
                assert np.max((z[:, None] - z) / (z[:, None] + z)) >= 0.1, (train["prototype"], elements)


@pytest.mark.parametrize(
    "name",
    ["Si", "C", "InP", "ZnS", "SiC", "MgO", "NaCl", "TiN", "Cu", "W", "Ti", "GaN", "ZnO", "SrTiO3",
     "CaF2", "CeO2", "MgAl2O4", "CsCl", "NiAl", "Al2O3", "MgB2", "Nb3Sn", "Cu2O", "SiO2-quartz", "MoSi2",
     "Bi2Te3", "ZrSiO4"],
)  # fmt: skip
def test_library__lattice_constants_are_near_the_published_ones(name):
    published = load_crystal(name)
    alike = [
        c
        for c in load_library(published=False).values()
        if c.prototype == published.prototype and Counter(c.symbols) == Counter(published.symbols)
    ]
    assert alike, f"{name} is not in the library"
    assert min(abs((c.volume / published.volume) ** (1 / 3) - 1) for c in alike) < 0.06


def test_load_library__returns_one_split_only():
    assert {c.split for c in load_library("validation").values()} == {"validation"}


def test_load_library__names_the_splits_it_knows():
    with pytest.raises(ValueError, match="train, validation, test"):
        load_library("holdout")


def test_library_provenance__names_source_and_licence():
    assert "AFLOW" in library_provenance()["prototypes"]
    assert "MIT" in library_provenance()["prototypes"]


def test_fit_volume__touching_ions_in_rocksalt():
    volume = fit_volume(ROCKSALT, ["Na", "Cl"], DATA)
    assert volume == pytest.approx(
        (2 * (1.02 + 1.81)) ** 3 / 4
    )  # a = 2 (r+ + r-), four formula units per cell


def test_fit_volume__does_not_depend_on_the_scale_of_the_prototype():
    larger = Geometry.of(7.3 * FCC, ROCKSALT.positions, [0, 1])
    assert fit_volume(larger, ["Na", "Cl"], DATA) == pytest.approx(fit_volume(ROCKSALT, ["Na", "Cl"], DATA))


def test_fit_volume__touching_spheres_in_a_metal():
    fcc = Geometry.of(FCC, np.zeros((1, 3)), [0])
    assert fit_volume(fcc, ["Cu"], DATA) == pytest.approx(4 * np.sqrt(2) * 1.28**3)


def test_fit_volume__refuses_charges_that_do_not_balance():
    assert fit_volume(ROCKSALT, ["Na", "O"], DATA) == "charge"


def test_geometry__finds_the_neighbours_of_rocksalt():
    i, j, d = ROCKSALT.pairs
    unlike = ROCKSALT.species[i] != ROCKSALT.species[j]
    assert ROCKSALT.coordination(unlike).tolist() == [6, 6]
    assert d[unlike].min() == pytest.approx(0.5)


def test_charges__takes_the_smallest_balanced_set():
    assert charges(["Fe", "O"], [2, 3], DATA) == (3, -2)
    assert charges(["Fe", "O"], [1, 1], DATA) == (2, -2)


def test_charges__anions_are_the_more_electronegative_elements():
    assert charges(["Si", "O"], [1, 2], DATA) == (4, -2)
    assert charges(["Na", "Cu"], [1, 1], DATA) is None


def test_draw_elements__puts_distinct_elements_of_the_same_kind():
    rng = np.random.default_rng(5)
    drawn = [draw_elements(rng, ["Cu", "Fe"], DATA) for _ in range(50)]
    assert all(set(pair) <= set(METALS) and len(set(pair)) == 2 for pair in drawn)
    assert {draw_elements(rng, ["Si"], DATA)[0] for _ in range(50)} <= set(COVALENT_ELEMENTS)

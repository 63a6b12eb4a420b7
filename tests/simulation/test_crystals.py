"""The crystal list: symmetry that survived expansion, splits, scattering factors."""

import numpy as np
import pytest

from fcunet.simulation.crystals import (
    PRIMITIVE,
    alloy,
    atomic_number,
    load_crystal,
    load_crystals,
    lobato_parameters,
    vary,
)
from fcunet.simulation.scattering import StructureFactors


def structure_factor(crystal, hkl):
    """|V_g| of conventional indices `hkl`, by direct summation."""
    factors = StructureFactors(crystal, g_max=2.0)
    g = np.asarray(hkl) @ np.linalg.inv(crystal.cell).T
    index = np.rint(g @ crystal.primitive_cell.T).astype(int)
    import torch

    return abs(complex(factors.v[factors.flat_index(torch.tensor(index))]))


def test_load_crystals__has_at_least_fifty_of_fifteen_prototypes():
    crystals = load_crystals()
    assert len(crystals) >= 50
    assert len({c.prototype for c in crystals}) >= 15
    assert len({c.name for c in crystals}) == len(crystals)


def test_splits__share_no_prototype():
    prototypes = {s: {c.prototype for c in load_crystals(s)} for s in ("train", "validation", "test")}
    assert not prototypes["train"] & prototypes["validation"]
    assert not prototypes["train"] & prototypes["test"]
    assert not prototypes["validation"] & prototypes["test"]


def test_splits__keep_diamond_out_of_training():
    assert load_crystal("Si").split == load_crystal("Ge").split == load_crystal("C").split == "test"


def test_crystals__have_sane_atomic_volumes_and_contacts():
    for crystal in load_crystals():
        assert 5.5 < crystal.volume / len(crystal.symbols) < 36, crystal.name
        shifts = np.array(list(np.ndindex(3, 3, 3))) - 1
        cell, positions = crystal.primitive_cell, crystal.primitive_positions
        difference = positions[:, None, None] - positions[None, :, None] + shifts
        distance = np.linalg.norm(difference @ cell, axis=-1)
        assert distance[distance > 1e-6].min() > 1.2, crystal.name


def test_primitive_cells__hold_one_lattice_point():
    points = {"P": 1, "I": 2, "F": 4, "C": 2, "R": 3}
    for centring, rows in PRIMITIVE.items():
        assert np.linalg.det(np.array(rows)) == pytest.approx(1 / points[centring])


@pytest.mark.parametrize(
    ("name", "forbidden", "allowed"),
    [
        ("Si", (0, 0, 2), (0, 0, 4)),  # d glide of diamond
        ("Ti", (0, 0, 1), (0, 0, 2)),  # 6_3 screw
        ("TiO2-rutile", (1, 0, 0), (2, 0, 0)),  # n glide
        ("FeS2-pyrite", (0, 1, 0), (0, 2, 0)),  # 2_1 screw
        ("Nb3Sn", (1, 1, 1), (2, 1, 0)),  # n glide
        ("SiO2-quartz", (0, 0, 1), (0, 0, 3)),  # 3_2 screw
        ("ZrO2-monoclinic", (0, 1, 0), (0, 2, 0)),  # 2_1 screw
        ("Al2O3", (0, 0, 3), (0, 0, 6)),  # c glide
    ],
)
def test_structure_factors__vanish_where_glides_and_screws_say(name, forbidden, allowed):
    crystal = load_crystal(name)
    assert structure_factor(crystal, forbidden) < 1e-3 * structure_factor(crystal, allowed)


def test_structure_factor__of_silicon_111_is_the_published_one():
    # 5.51 V at rest (48.87 / 5.431^3 * ...; any table), times the Debye-Waller factor of u = 0.078 angstrom
    rest = 5.51
    factor = np.exp(-2 * np.pi**2 * 0.078**2 * 3 / 5.431**2)
    assert structure_factor(load_crystal("Si"), (1, 1, 1)) == pytest.approx(rest * factor, rel=2e-3)


def test_lobato_table__covers_the_elements_in_order():
    assert len(lobato_parameters()) == 103
    assert (atomic_number("H"), atomic_number("Si"), atomic_number("U")) == (1, 14, 92)


def test_vary__keeps_forbidden_reflections_forbidden():
    rng = np.random.default_rng(3)
    silicon = load_crystal("Si")
    for _ in range(5):
        other = vary(silicon, rng, substitute=1.0)
        assert structure_factor(other, (0, 0, 2)) < 1e-3 * structure_factor(other, (0, 0, 4))
        assert abs(other.volume / silicon.volume - 1) < 0.065


def test_alloy__interpolates_cell_and_potential():
    silicon, germanium = load_crystal("Si"), load_crystal("Ge")
    half = alloy(silicon, germanium, 0.5)
    assert half.cell[0, 0] == pytest.approx((silicon.cell[0, 0] + germanium.cell[0, 0]) / 2)
    ends = [structure_factor(c, (2, 2, 0)) * c.volume for c in (silicon, germanium)]
    assert structure_factor(half, (2, 2, 0)) * half.volume == pytest.approx(np.mean(ends), rel=0.02)


def test_alloy__refuses_different_prototypes():
    with pytest.raises(ValueError, match="cannot be alloyed"):
        alloy(load_crystal("Si"), load_crystal("Cu"), 0.5)


def test_load_crystal__names_the_known_ones():
    with pytest.raises(ValueError, match="known: .*GaAs"):
        load_crystal("Kryptonite")

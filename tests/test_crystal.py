"""An ideal crystal as the reference: its cell, the reflections found, absolute strain, crystal axes."""

import numpy as np
import pytest
from test_pipeline_strain import SHAPE, make_peaks

from fcunet.crystal import read_crystal
from fcunet.kernels.crystal import ideal_lattice, index_lattice
from fcunet.pipeline import compute_strain, fit_lattice

A, PX = 5.4309, 0.0066  # silicon, angstrom; 1/angstrom per px
# [110]: (1 -1 1) and (-1 1 1), with [001] along +x
SILICON = np.array([[np.sqrt(2), 1.0], [-np.sqrt(2), 1.0]]) / (A * PX)


def turned(degrees):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s], [s, c]])


def lattice_of(F, degrees=0.0, g=SILICON):
    """A scan of one deformation, fitted; the crystal turned by `degrees` on the detector."""
    turn = turned(degrees)
    # the deformation is that of the crystal before it is turned
    peaks = make_peaks(F=np.tile(turn.T @ F @ turn, (*SHAPE, 1, 1)), g=g @ turn)
    return fit_lattice(
        peaks.assign_attrs(qy={"first": 0.0, "step": PX, "units": "1/angstrom"}), basis=g @ turn
    )


@pytest.mark.parametrize(
    ("text", "cell", "centring"),
    [
        ("F 5.4309", np.eye(3) * A, "F"),
        ("5.4309", np.eye(3) * A, "P"),
        ("1,2,3", np.diag([1.0, 2.0, 3.0]), "P"),
        ("I 1,2,3,90,90,90", np.diag([1.0, 2.0, 3.0]), "I"),
        ("2.9505,4.6855", [[2.9505, 0, 0], [-1.47525, 2.9505 * np.sqrt(0.75), 0], [0, 0, 4.6855]], "P"),
    ],
)
def test_read_crystal__takes_lattice_parameters_by_hand(text, cell, centring):
    crystal = read_crystal(text)
    np.testing.assert_allclose(crystal.cell, cell, atol=1e-12)
    assert crystal.centring == centring


@pytest.mark.parametrize("text", ["silly", "F 1,2,3,4", "F -3", "5,5,5,10,10,170"])
def test_read_crystal__says_what_it_needs(text):
    with pytest.raises(ValueError, match="is no crystal"):
        read_crystal(text)


def test_read_crystal__from_a_cif_file_with_its_centring(tmp_path):
    from ase.build import bulk

    path = tmp_path / "si.cif"
    bulk("Si", "diamond", a=A, cubic=True).write(path)
    crystal = read_crystal(str(path))
    np.testing.assert_allclose(crystal.cell, np.eye(3) * A, atol=1e-6)
    assert crystal.centring == "F"
    with pytest.raises(FileNotFoundError, match="no such CIF"):
        read_crystal(str(tmp_path / "other.cif"))


def test_index_lattice__finds_the_reflections_with_and_without_the_zone():
    g = SILICON * PX @ turned(37.0) * 1.02  # 2 % off, any direction
    for zone in (None, (1, 1, 0), (0, 1, -1)):
        miller = index_lattice(g, np.eye(3) * A, centring="F", zone=zone)
        assert (np.abs(miller) == 1).all()  # {111}
        np.testing.assert_array_equal(np.cross(*miller)[np.abs(np.cross(*miller)) > 0] % 2, 0)
        ideal = ideal_lattice(miller, np.eye(3) * A, g)
        np.testing.assert_allclose(ideal, SILICON * PX @ turned(37.0), atol=1e-12)


def test_index_lattice__keeps_the_handedness_of_the_pattern():
    for g in (SILICON * PX, SILICON[::-1] * PX):
        miller = index_lattice(g, np.eye(3) * A, centring="F")
        np.testing.assert_allclose(ideal_lattice(miller, np.eye(3) * A, g), g, atol=1e-12)


def test_index_lattice__refuses_another_crystal_and_a_choice_it_cannot_make():
    with pytest.raises(ValueError, match="no two reflections"):
        index_lattice(SILICON * PX * 1.3, np.eye(3) * A, centring="F")
    # with a and b 0.6 % apart, a side between them may be either
    g, cell = np.diag([1 / 5.015, 1 / 9.0]), np.diag([5.0, 5.03, 9.0])
    with pytest.raises(ValueError, match="not equivalent; give the zone axis"):
        index_lattice(g, cell)
    assert (index_lattice(g, cell, zone=(0, 1, 0))[:, 1] == 0).all()


def test_compute_strain__against_an_ideal_crystal_is_absolute():
    F = np.array([[0.99, 0.004], [0.004, 1.015]])  # everywhere: no part of the scan is unstrained
    lattice = lattice_of(F, degrees=20.0)
    strain = compute_strain(lattice, crystal="F 5.4309", zone=(1, 1, 0), measure="biot", axis=(0, 0, 1))
    for name, expected in (("e_xx", 0.015), ("e_yy", -0.01), ("e_xy", 0.004)):
        np.testing.assert_allclose(strain[name], expected, atol=1e-9)
    np.testing.assert_allclose(strain["theta"], 0, atol=1e-9)
    assert strain.attrs["frame"] == "crystal"
    assert strain.attrs["reference"].startswith("ideal F 5.4309, g1 and g2 = (")
    own = compute_strain(lattice, measure="biot")  # its own median: nothing
    assert float(np.abs(own["e_xx"]).max()) < 1e-9


def test_compute_strain__given_indices_and_pixel_size_win():
    lattice = lattice_of(np.eye(2))
    miller = ((1, -1, 1), (-1, 1, 1))
    strain = compute_strain(lattice, crystal="5.4309", miller=miller, q_pixel=1.01 * PX)
    # pixels taken for 1 % larger: reciprocal vectors too long, the crystal too small
    np.testing.assert_allclose(strain["e_xx"], 1 / 1.01 - 1, atol=1e-9)
    assert strain.attrs["miller"] == [[1, -1, 1], [-1, 1, 1]]


def test_compute_strain__along_crystal_axes_does_not_depend_on_the_detector():
    F = np.array([[1.0, 0.0], [0.0, 1.01]])  # along [001]
    for degrees in (0.0, 33.0):
        for transpose in (False, True):
            lattice = lattice_of(F, degrees)
            reference = SILICON @ turned(degrees)
            strain = compute_strain(lattice, reference=reference, axis=(1, 1), transpose=transpose)  # (0 0 2)
            np.testing.assert_allclose(strain["e_xx"], 0.01, atol=1e-9)
            np.testing.assert_allclose(strain["e_yy"], 0, atol=1e-9)
            np.testing.assert_allclose(strain["principal_angle"], 0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crystal": "F 5.4309", "q_pixel": 0.0}, "needs the pixel size"),
        ({"axis": (1, 1, 1)}, "need a crystal"),
        ({"axis": "g3"}, "axis is 'g3'"),
        ({"crystal": "F 5.4309", "zone": (1, 1, 0), "axis": (1, 1, 0)}, "not in the plane"),
        ({"crystal": "F 4.05", "zone": (0, 0, 1)}, "no two reflections"),
    ],
)
def test_compute_strain__says_what_a_crystal_lacks(options, message):
    with pytest.raises(ValueError, match=message):
        compute_strain(lattice_of(np.eye(2)), **options)

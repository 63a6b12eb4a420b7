"""The atoms of the multislice benchmark: density, period, deformation (abTEM itself is not needed)."""

import numpy as np
import pytest

from benchmarks.abtem_scan import atoms_of_one_period, exact_slices, random_deformations
from fcunet.simulation.crystals import load_crystal


@pytest.mark.parametrize(
    ("name", "zone", "period"),
    [("Si", (1, 1, 0), 5.431 / np.sqrt(2)), ("SnO2-rutile", (0, 0, 1), 3.1864), ("Cu", (1, 0, 0), 3.6149)],
)
def test_atoms_of_one_period__fill_the_box_over_the_shortest_period(name, zone, period):
    crystal = load_crystal(name)
    box = (40.0, 36.0)
    sites, positions, found = atoms_of_one_period(crystal, zone, box, np.eye(2))
    assert found == pytest.approx(period, rel=1e-6)
    expected = box[0] * box[1] * period / crystal.volume * len(crystal.symbols)
    assert len(sites) == pytest.approx(expected, rel=0.08)
    assert (positions[:, 2] > -1e-5).all()
    assert (positions[:, 2] < period).all()


def test_exact_slices__of_a_deformed_crystal_diffract_at_the_inverse_transpose():
    crystal = load_crystal("Cu")
    F = np.array([[1.02, 0.01], [-0.005, 0.985]])
    box = (120.0, 120.0)
    sites, positions, period = atoms_of_one_period(crystal, (1, 0, 0), box, F)
    weight = np.hanning(256)[:, None] * np.hanning(256)[None]  # box edges leave no streaks
    potential = exact_slices(crystal, sites, positions, period, box, 256, 10.0)[0] * weight
    spectrum = np.abs(np.fft.fftshift(np.fft.fft2(potential, s=(2048, 2048)))) ** 2
    _, _, straight = atoms_of_one_period(crystal, (1, 0, 0), (8.0, 8.0), np.eye(2))
    assert straight == period
    q = np.fft.fftshift(np.fft.fftfreq(2048, 120 / 256))
    for g in np.array([[2.0, 0.0], [0.0, 2.0]]) / crystal.cell[0, 0]:
        expected = np.linalg.inv(F).T @ g
        near = (np.abs(q - expected[0]) < 0.05)[:, None] & (np.abs(q - expected[1]) < 0.05)[None]
        row, column = np.unravel_index((spectrum * near).argmax(), spectrum.shape)
        # the transform is padded to 1/960 angstrom
        assert [q[row], q[column]] == pytest.approx(list(expected), abs=1.1e-3)


def test_random_deformations__start_with_the_reference():
    F = random_deformations(4, np.random.default_rng(0))
    assert np.array_equal(F[0], np.eye(2))
    assert np.abs(F[1:] - np.eye(2)).max() < 0.03

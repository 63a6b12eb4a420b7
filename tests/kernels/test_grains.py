"""Grains: connected positions of one lattice that are turned alike."""

import numpy as np

from fcunet.kernels.grains import label_grains


def turned(degrees):
    """Rotations (..., 2, 2), axes (y, x)."""
    a = np.deg2rad(np.asarray(degrees, dtype=float))
    return np.stack([np.stack([np.cos(a), np.sin(a)], -1), np.stack([-np.sin(a), np.cos(a)], -1)], -2)


def label(degrees, lattice_id=None, **options):
    degrees = np.asarray(degrees, dtype=float)
    kind = np.ones(degrees.shape, int) if lattice_id is None else lattice_id
    return label_grains(turned(degrees), kind, **options)


def test_label_grains__a_step_in_orientation_is_a_boundary_and_the_largest_comes_first():
    degrees = np.zeros((4, 10))
    degrees[:, :3] = 5.0
    np.testing.assert_array_equal(label(degrees)[0], [2] * 3 + [1] * 7)
    assert (label(degrees, max_angle_degree=6) == 1).all()


def test_label_grains__a_crystal_that_bends_slowly_stays_one():
    degrees = np.tile(np.linspace(0, 30, 31), (3, 1))  # 1 degree per step, 30 in all
    assert (label(degrees) == 1).all()


def test_label_grains__turns_of_a_whole_circle_are_none():
    assert (label([[179.5, -179.5, 179.8]]) == 1).all()


def test_label_grains__lattices_and_gaps_part_what_is_turned_alike():
    kind = np.array([[1, 1, 2, 2, 0, 1]])
    np.testing.assert_array_equal(label(np.zeros((1, 6)), kind), [[1, 1, 2, 2, 0, 3]])
    F = turned(np.zeros((1, 5)))
    F[0, 2] = np.nan
    np.testing.assert_array_equal(label_grains(F, np.ones((1, 5), int)), [[1, 1, 0, 2, 2]])


def test_label_grains__corners_do_not_touch():
    degrees = np.where(np.indices((2, 2)).sum(0) % 2, 10.0, 0.0)
    assert len(np.unique(label(degrees))) == 4


def test_label_grains__a_jump_of_strain_is_a_boundary_whatever_the_rotation():
    F = turned(np.zeros((2, 6)))
    F[:, 3:] = turned(1.0) @ np.diag([1.0, 1.05])
    np.testing.assert_array_equal(label_grains(F, np.ones((2, 6), int))[0], [1, 1, 1, 2, 2, 2])
    assert (label_grains(F, np.ones((2, 6), int), max_strain=0.06) == 1).all()


def test_label_grains__without_any_lattice_is_all_zero():
    assert (label_grains(np.full((3, 4, 2, 2), np.nan), np.zeros((3, 4), int)) == 0).all()

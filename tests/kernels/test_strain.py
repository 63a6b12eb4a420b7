"""Strain definitions: exact recovery, signs, the peers' conventions, error bars to first order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcunet.kernels.strain import (
    COMPONENTS,
    CONVENTIONS,
    MEASURES,
    deformation_gradient,
    gradient_covariance,
    principal_strains,
    rotate_frame,
    shared_dilation_left,
    shared_shear,
    strain_from_F,
    strain_std,
    with_shared_strain,
)

G_REF = np.array([[1.5, 31.0], [27.0, 4.0]])  # (y, x), px

small = st.floats(-0.05, 0.05, allow_nan=False)
gradients = st.tuples(small, small, small, small).map(lambda v: np.eye(2) + np.reshape(v, (2, 2)))
angles = st.floats(-180, 180, allow_nan=False)


def gradient(xx=0.0, yy=0.0, xy=0.0, yx=0.0):
    """1 + grad u with axes (y, x); `yx` is du_y/dx."""
    return np.array([[1 + yy, yx], [xy, 1 + xx]])


def turn(radian):
    """Rotation of vectors (y, x) from +x towards +y."""
    c, s = np.cos(radian), np.sin(radian)
    return np.array([[c, s], [-s, c]])


def deform(g_ref, F):
    """Reciprocal rows after real space was deformed by F: the dual basis of the deformed direct lattice."""
    direct = np.linalg.inv(g_ref).T  # rows a1, a2
    return np.linalg.inv(direct @ F.T).T


@given(F=gradients)
def test_deformation_gradient__is_recovered_exactly(F):
    assert np.abs(deformation_gradient(deform(G_REF, F), G_REF) - F).max() < 1e-12


def test_deformation_gradient__of_random_fields_gives_strain_and_rotation():  # S2
    F = np.eye(2) + 0.01 * np.random.default_rng(0).normal(size=(4, 5, 2, 2))
    g = np.linalg.inv(np.linalg.inv(G_REF).T @ np.swapaxes(F, -1, -2)).swapaxes(-1, -2)
    e = strain_from_F(deformation_gradient(g, G_REF))
    np.testing.assert_allclose(e["e_xx"], F[..., 1, 1] - 1, atol=1e-12)
    np.testing.assert_allclose(e["e_yy"], F[..., 0, 0] - 1, atol=1e-12)
    np.testing.assert_allclose(e["e_xy"], (F[..., 0, 1] + F[..., 1, 0]) / 2, atol=1e-12)
    np.testing.assert_allclose(e["theta"], (F[..., 0, 1] - F[..., 1, 0]) / 2, atol=1e-12)


def test_deformation_gradient__tension_along_x_brings_spots_closer_along_x():
    g = G_REF / [1, 1.02]  # reciprocal x components shrink by the stretch
    e = strain_from_F(deformation_gradient(g, G_REF))
    assert e["e_xx"] == pytest.approx(0.02, abs=1e-12)
    assert abs(e["e_yy"]) < 1e-12
    assert abs(e["e_xy"]) < 1e-12


def test_deformation_gradient__does_not_depend_on_the_basis():  # S6
    F = gradient(0.01, -0.02, 0.005, 0.013)
    bases = [[[0, 1], [1, 0]], [[1, 1], [-1.2, 1]], [[30, 2], [31, 29]]]  # the second is left-handed
    for basis in np.array(bases, dtype=float):
        np.testing.assert_allclose(deformation_gradient(deform(basis, F), basis), F, atol=1e-12)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (np.eye(2), (0, 0, 0, 0)),
        (turn(np.deg2rad(3.0)), (0, 0, 0, np.deg2rad(3.0))),
        (turn(np.deg2rad(-3.0)), (0, 0, 0, np.deg2rad(-3.0))),
        (1.1 * np.eye(2), (-1 / 11, -1 / 11, 0, 0)),
        (np.diag([1.0, 1.1]), (-1 / 11, 0, 0, 0)),
    ],
)
def test_strain__is_one_tensor_from_every_set_of_vectors(pattern, expected):  # S6
    sets = [[[1, 0], [0, 1]], [[1, 1], [1, -1.2]], [[1, 0], [0, 1], [1, 1], [1, -1.2]]]
    for vectors in (np.array(v, dtype=float) for v in sets):
        # more than two: the linear map between them by least squares, from which any two follow
        linear = np.linalg.lstsq(vectors, vectors @ pattern.T, rcond=None)[0]
        e = strain_from_F(deformation_gradient(vectors[:2] @ linear, vectors[:2]), "biot")
        np.testing.assert_allclose([e[c] for c in COMPONENTS], expected, atol=1e-10)


@pytest.mark.parametrize(("scale", "expected"), [(1.1, -1 / 11), (0.9, 1 / 9)])
def test_deformation_gradient__of_a_magnified_pattern(scale, expected):  # S6
    e = strain_from_F(deformation_gradient(scale * G_REF, G_REF))
    assert e["e_xx"] == pytest.approx(expected, abs=1e-12)
    assert e["e_yy"] == pytest.approx(expected, abs=1e-12)
    assert abs(e["e_xy"]) < 1e-12


def test_deformation_gradient__is_nan_where_there_is_no_lattice():
    g = np.stack([G_REF, np.full((2, 2), np.nan), np.array([[1.0, 2], [2, 4]])])
    F = deformation_gradient(g, G_REF)
    assert np.isfinite(F[0]).all()
    assert np.isnan(F[1:]).all()


def test_deformation_gradient__refuses_a_reference_without_area():
    with pytest.raises(ValueError, match="no area"):
        deformation_gradient(G_REF, [[1, 2], [2, 4]])
    with pytest.raises(ValueError, match="no area"):
        deformation_gradient(G_REF, np.full((2, 2), np.nan))


@pytest.mark.parametrize("degree", [0.5, -3.0])
def test_theta__is_positive_from_x_towards_y(degree):  # S3
    g = G_REF @ turn(np.deg2rad(degree)).T  # reciprocal vectors turn with the crystal
    for measure in MEASURES:
        e = strain_from_F(deformation_gradient(g, G_REF), measure)
        expected = np.sin(np.deg2rad(degree)) if measure == "infinitesimal" else np.deg2rad(degree)
        assert e["theta"] == pytest.approx(expected, abs=1e-12)
        assert abs(e["e_xy"]) < 1e-12


@pytest.mark.parametrize("measure", ["biot", "green_lagrange", "hencky"])
@given(F=gradients, degree=angles)
def test_finite_measures__do_not_see_a_rotation_after_the_stretch(measure, F, degree):
    before, after = strain_from_F(F, measure), strain_from_F(turn(np.deg2rad(degree)) @ F, measure)
    for name in ("e_xx", "e_yy", "e_xy"):
        assert after[name] == pytest.approx(float(before[name]), abs=1e-12)


def test_finite_measures__of_a_stretch_have_their_closed_forms():
    F = turn(0.2) @ gradient(xx=0.05, yy=-0.02)
    for measure, of in {
        "biot": lambda u: u - 1,
        "green_lagrange": lambda u: (u**2 - 1) / 2,
        "hencky": np.log,
    }.items():
        e = strain_from_F(F, measure)
        assert e["e_xx"] == pytest.approx(of(1.05), abs=1e-12)
        assert e["e_yy"] == pytest.approx(of(0.98), abs=1e-12)
        assert abs(e["e_xy"]) < 1e-12
        assert e["theta"] == pytest.approx(0.2, abs=1e-12)


def test_hencky__is_the_matrix_logarithm_of_the_stretch():
    F = gradient(0.04, -0.03, 0.02, 0.015)
    values, vectors = np.linalg.eigh(F.T @ F)
    expected = vectors @ np.diag(np.log(values) / 2) @ vectors.T
    e = strain_from_F(F, "hencky")
    np.testing.assert_allclose([e["e_yy"], e["e_xy"], e["e_xx"]], expected[[0, 0, 1], [0, 1, 1]], atol=1e-12)


def test_hencky__of_a_uniform_expansion_is_finite():
    e = strain_from_F(1.02 * np.eye(2), "hencky")
    assert e["e_xx"] == pytest.approx(np.log(1.02), abs=1e-15)


# Peers' numbers for four deformations; first axis rows, second columns; percent, theta in mrad.
_PEERS = {
    "py4dstem": [
        (1.961, 0, 0, 0),
        (-0.010, -0.010, 1.000, 0),
        (0.045, 0.045, 0, -30.0),
        (4.805, 0.045, 0.071, -29.3),
    ],
    "quantem": [(2.000, 0, 0, 0), (0, 0, 1.000, 0), (-0.045, -0.045, 0, 30.0), (4.953, -0.045, 0.075, 30.7)],
    "pyxem": [(2.000, 0, 0, 0), (-0.010, -0.010, -1.000, 0), (0, 0, 0, 30.0), (4.995, 0.004, -0.143, 30.0)],
}
_ROWS_TO_COLUMNS = turn(-0.03)  # +30 mrad from rows towards columns
_DEFORMATIONS = [
    gradient(yy=0.02),
    gradient(xy=0.01, yx=0.01),
    _ROWS_TO_COLUMNS,
    _ROWS_TO_COLUMNS @ gradient(yy=0.05),
]


@pytest.mark.parametrize("convention", _PEERS)
@pytest.mark.parametrize("case", range(4))
def test_conventions__give_the_peers_numbers(convention, case):
    e = strain_from_F(deformation_gradient(deform(G_REF, _DEFORMATIONS[case]), G_REF), convention=convention)
    found = 100 * e["e_yy"], 100 * e["e_xx"], 100 * e["e_xy"], 1000 * e["theta"]
    # the table is rounded: half of its last digit
    np.testing.assert_allclose(found[:3], _PEERS[convention][case][:3], atol=0.00051)
    assert found[3] == pytest.approx(_PEERS[convention][case][3], abs=0.051)


@given(F=gradients)
def test_conventions__agree_to_first_order(F):
    ours = strain_from_F(F)
    size = np.abs(F - np.eye(2)).max()
    for convention in CONVENTIONS:
        e = strain_from_F(F, convention=convention)
        shear = -1 if convention == "pyxem" else 1
        spin = -1 if convention in ("pyxem", "quantem") else 1
        for name, sign in zip(COMPONENTS, (1, 1, shear, spin), strict=True):
            assert abs(sign * e[name] - ours[name]) < 4 * size**2 + 1e-15


@pytest.mark.parametrize(("options", "message"), [
    ({"measure": "engineering"}, "unknown measure 'engineering'; choose one of infinitesimal"),
    ({"convention": "strainpp"}, "unknown convention"),
    ({"convention": "py4dstem", "measure": "hencky"}, "leave measure='infinitesimal'"),
])  # fmt: skip
def test_strain_from_F__refuses_unknown_and_contradictory_choices(options, message):
    with pytest.raises(ValueError, match=message):
        strain_from_F(np.eye(2), **options)


def test_rotate_frame__moves_a_stretch_from_rows_to_columns():  # S4
    F = gradient(yy=0.01)
    for options in ({"rotation_degree": 90}, {"transpose": True}):
        e = strain_from_F(rotate_frame(F, **options))
        assert e["e_xx"] == pytest.approx(0.01, abs=1e-12)
        assert abs(e["e_yy"]) < 1e-12


def test_rotate_frame__gives_the_stretch_along_the_turned_x_axis():
    a = np.deg2rad(30)
    F = gradient(0.02, -0.01, 0.004, 0.004)
    along = np.array([np.sin(a), np.cos(a)])  # new +x in old (y, x)
    e = strain_from_F(rotate_frame(F, 30))
    assert e["e_xx"] == pytest.approx(along @ (F - np.eye(2)) @ along, abs=1e-12)


@given(F=gradients, first=angles, second=angles)
def test_rotate_frame__direct_equals_by_way_of_another_frame(F, first, second):  # S8
    direct, via = rotate_frame(F, second), rotate_frame(rotate_frame(F, first), second - first)
    np.testing.assert_allclose(direct, via, atol=1e-12)
    e, turned = strain_from_F(F), strain_from_F(direct)
    assert e["e_xx"] + e["e_yy"] == pytest.approx(float(turned["e_xx"] + turned["e_yy"]), abs=1e-12)
    assert e["theta"] == pytest.approx(float(turned["theta"]), abs=1e-12)


def test_rotate_frame__transpose_changes_the_sign_of_theta():
    assert strain_from_F(rotate_frame(turn(0.02), transpose=True))["theta"] == pytest.approx(-np.sin(0.02))


def _covariance(rng, n=4):
    root = rng.normal(size=(n, n)) * 0.02
    return root @ root.T


def _scatter(F, covariance, reference_covariance, rng, n=200_000):
    """Sample covariance of F from many draws of both lattices."""
    g = deform(G_REF, F) + rng.multivariate_normal(np.zeros(4), covariance, n).reshape(-1, 2, 2)
    draws = rng.multivariate_normal(np.zeros(4), reference_covariance, n).reshape(-1, 2, 2)
    return np.linalg.inv(g) @ (G_REF + draws)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_strain_std__is_the_scatter_of_many_draws(convention):
    rng = np.random.default_rng(3)
    covariance, reference_covariance = _covariance(rng), _covariance(rng)
    F = turn(0.02) @ gradient(0.03, -0.01, 0.01, 0.0)
    drawn = strain_from_F(
        rotate_frame(_scatter(F, covariance, reference_covariance, rng), 25), convention=convention
    )
    std = strain_std(
        deform(G_REF, F), G_REF, covariance,
        reference_covariance=reference_covariance, convention=convention, rotation_degree=25,
    )  # fmt: skip
    for name in COMPONENTS:  # relative error of a standard deviation from n draws: 1 / sqrt(2 n) = 0.0016
        assert std[f"{name}_std"] == pytest.approx(drawn[name].std(), rel=0.01)


@pytest.mark.parametrize("measure", MEASURES)
def test_strain_std__is_nearly_the_same_for_every_measure(measure):
    F = turn(0.02) @ gradient(0.01, -0.01)
    g, covariance = deform(G_REF, F), _covariance(np.random.default_rng(5), 6)
    for name, value in strain_std(g, G_REF, covariance, measure=measure).items():
        assert value == pytest.approx(float(strain_std(g, G_REF, covariance)[name]), rel=0.06)


def test_strain_std__takes_the_lattice_part_of_a_six_by_six_covariance():
    covariance = _covariance(np.random.default_rng(6), 6)
    whole = gradient_covariance(G_REF, G_REF, covariance)
    np.testing.assert_array_equal(whole, gradient_covariance(G_REF, G_REF, covariance[2:, 2:]))


def test_strain_std__is_nan_where_there_is_no_lattice_and_zero_without_error():
    g = np.stack([G_REF, np.full((2, 2), np.nan)])
    std = strain_std(g, G_REF, np.zeros((2, 4, 4)))
    for values in std.values():
        assert values[0] == 0
        assert np.isnan(values[1])


def test_strain_std__of_many_positions_does_not_depend_on_internal_chunks(monkeypatch):
    rng = np.random.default_rng(7)
    g, covariance = G_REF + rng.normal(size=(5, 7, 2, 2)), _covariance(rng)
    whole = strain_std(g, G_REF, covariance)
    monkeypatch.setattr("fcunet.kernels.strain._CHUNK", 4)
    for name, values in strain_std(g, G_REF, covariance).items():
        np.testing.assert_array_equal(values, whole[name])


@given(F=gradients, degree=angles)
def test_principal_strains__do_not_depend_on_the_frame(F, degree):
    def principal(tensor):
        e = strain_from_F(tensor)
        return principal_strains(e["e_xx"], e["e_yy"], e["e_xy"])

    here, there = principal(F), principal(rotate_frame(F, degree))
    for name in ("e_1", "e_2", "dilation", "max_shear"):
        assert here[name] == pytest.approx(float(there[name]), abs=1e-12)


def test_principal_strains__direction_is_that_of_the_largest_stretch():
    e = strain_from_F(rotate_frame(gradient(xx=0.02), -20))  # stretched along +x turned by 20 deg towards +y
    p = principal_strains(e["e_xx"], e["e_yy"], e["e_xy"])
    assert np.rad2deg(p["angle"]) == pytest.approx(20)
    assert p["e_1"] == pytest.approx(0.02)


def test_shared_dilation_left__of_one_without_a_sign_follows_how_unlike_the_patterns_are():
    std = np.array([3e-4, 4e-4, np.nan])
    left = shared_dilation_left(std, np.zeros(3), (4e-4, 0.0), [1.0, 0.5, 0.5])
    np.testing.assert_allclose(left, [np.hypot(3, 4) / 2**0.5 * 1e-4, 0.25 * 4e-4, 0.25 * 4e-4 / 2**0.5])
    apart = shared_dilation_left([3e-4], np.zeros(1), (4e-4, 0.0), [9.0])
    np.testing.assert_allclose(apart, 5e-4)  # two errors without anything in common
    unknown = shared_dilation_left(std[:2], np.zeros(2), (4e-4, 0.0), [np.nan, np.nan])
    np.testing.assert_allclose(unknown, shared_dilation_left(std[:2], np.zeros(2), (4e-4, 0.0)))
    # against exact vectors all of it counts, whatever else
    np.testing.assert_allclose(
        shared_dilation_left(std[:2], np.zeros(2), None, [0.1, 0.1], floor=2e-4), std[:2]
    )


def test_shared_dilation_left__what_is_the_same_in_every_pattern_is_not_left():
    left = shared_dilation_left([5e-5, 1.3e-4], np.zeros(2), (5e-5, 0.0), [1.0, 1.0], floor=5e-5)
    np.testing.assert_allclose(left, [0, 1.2e-4 / 2**0.5], atol=1e-12)


def test_shared_dilation_left__of_known_sign_is_the_difference_whatever_the_ratio():
    left = shared_dilation_left(np.array([2, 3]) * 1e-3, np.array([2, 2]) * 1e-3, (2e-3, 2e-3), [1.0, 1.0])
    np.testing.assert_allclose(left, [0, 5**0.5 * 1e-3], atol=1e-12)


@pytest.mark.parametrize("signed", [0.0, -1e-3])
def test_with_shared_strain__is_a_dilation_and_two_shears_of_the_whole_lattice(signed):
    rng = np.random.default_rng(5)
    g = np.array([[20.0, 3.0], [-2.0, 25.0]])
    covariance = with_shared_strain(np.zeros((6, 6)), g, 2e-3, signed)
    sizes = 2e-3 * np.array([1, shared_shear(signed), shared_shear(signed)])
    dilation, pure, shear = sizes[:, None] * rng.normal(size=(3, 200_000))
    strain = np.moveaxis(np.array([[dilation - pure, shear], [shear, dilation + pure]]), -1, 0)
    drawn = (g @ strain).reshape(-1, 4)
    np.testing.assert_allclose(covariance[2:, 2:], np.cov(drawn.T), atol=3e-5)
    assert not covariance[:2].any()

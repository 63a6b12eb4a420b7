"""Basis, indexing and fit of Bragg lattices: exact cases, strays, gaps, strain, weights, error bars."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcunet.kernels.lattice import (
    find_basis,
    fit_lattice,
    index_peaks,
    orient_basis,
    reduce_basis,
    splat_peaks,
)
from fcunet.kernels.strain import COMPONENTS, deformation_gradient, strain_from_F, strain_std

G = np.array([[1.5, 31.0], [27.0, 4.0]])  # (y, x), px
ORIGIN = np.array([127.0, 130.0])
SITES = np.array(list(itertools.product(range(-8, 9), repeat=2)))
NOISE = 0.3  # px


def deformations(rng, n, strain=0.03, degrees=3.0):
    """Random F within +-strain per component, and turned by up to +-degrees."""
    F = np.eye(2) + rng.uniform(-strain, strain, (n, 2, 2))
    a = np.deg2rad(rng.uniform(-degrees, degrees, n))
    turn = np.stack([np.stack([np.cos(a), np.sin(a)], -1), np.stack([-np.sin(a), np.cos(a)], -1)], -2)
    return turn @ F


def scan(n=60, *, seed=0, g=G, noise=NOISE, missing=0.0, strays=0.0, strain=0.03, degrees=3.0, descan=3.0):
    """Peaks (n, P, 2) NaN-padded, intensities, true g, F and origins of strained patterns on 256 px."""
    rng = np.random.default_rng(seed)
    F = deformations(rng, n, strain, degrees)
    true = g @ np.linalg.inv(F)
    origin = ORIGIN + rng.uniform(-descan, descan, (n, 2))
    q = origin[:, None] + SITES @ true
    kept = (np.abs(q - 128) < 118).all(-1) & (rng.uniform(size=q.shape[:2]) >= missing)
    intensity = rng.exponential(1, kept.shape) * np.exp(-(SITES**2).sum(1) / 20)
    intensity[:, len(SITES) // 2] = 20  # direct beam
    q = np.where(kept[..., None], q + noise * rng.normal(size=q.shape), np.nan)
    n_strays = round(strays * np.median(kept.sum(1)))
    q = np.concatenate([q, rng.uniform(10, 246, (n, n_strays, 2))], 1)
    intensity = np.concatenate([intensity, rng.exponential(0.1, (n, n_strays))], 1)
    intensity[np.isnan(q[..., 0])] = np.nan
    order = np.argsort(-np.nan_to_num(intensity, nan=-1), axis=1)[:, : np.isfinite(intensity).sum(1).max()]
    return (
        np.take_along_axis(q, order[..., None], 1),
        np.take_along_axis(intensity, order, 1),
        true,
        F,
        origin,
    )


def fit(q, **options):
    return fit_lattice(q[..., 0], q[..., 1], **({"g": G, "origin": ORIGIN} | options))


# --- the basis of a scan
# ------------------------------------------------------------------------------------------


def same_lattice(a, b, tolerance):
    """True if the rows of `a` are integer combinations of those of `b` with determinant 1, within px."""
    mix = np.rint(a @ np.linalg.inv(b))
    return abs(abs(np.linalg.det(mix)) - 1) < 1e-9 and np.abs(a - mix @ b).max() < tolerance


@pytest.mark.parametrize(
    "g", [G, [[0, 30], [30, 0]], [[0, 30], [26, 15]], [[3, 60], [22, -4]], [[12, 0], [0, 12]]]
)
def test_find_basis__of_strained_patterns_with_gaps_and_strays(g):
    q, intensity, *_ = scan(g=np.array(g, float), missing=0.3, strays=0.2)
    basis = find_basis(q[..., 0], q[..., 1], intensity)
    assert same_lattice(basis.g, np.array(g, float), 0.02 * np.abs(g).max())
    assert np.abs(basis.origin - ORIGIN).max() < 1.5


def test_find_basis__of_one_pattern():
    q, intensity, true, _, origin = scan(1, missing=0.3, strays=0.1, seed=3)
    basis = find_basis(q[..., 0], q[..., 1], intensity)
    assert same_lattice(basis.g, true[0], 0.5)
    np.testing.assert_allclose(basis.origin, origin[0], atol=0.5)


def test_find_basis__of_a_perfect_grid_with_two_strays():  # S11
    grid = np.array(list(itertools.product(range(10), repeat=2))) @ np.array([[9.0, 1.0], [-1.5, 11.0]]) + 20
    q = np.concatenate([grid, [[31.7, 44.4], [57.1, 99.3]]])
    basis = find_basis(q[:, 0], q[:, 1])
    assert same_lattice(basis.g, np.array([[9.0, 1.0], [-1.5, 11.0]]), 1e-6)
    indexed = index_peaks(q[:, 0], q[:, 1], g=basis.g, origin=basis.origin, max_peak_spacing=0.1)[2]
    np.testing.assert_array_equal(np.flatnonzero(~indexed), [100, 101])


@pytest.mark.parametrize("height", [0.02, 0.4, 1.0])
def test_find_basis__weak_forbidden_reflections_do_not_spoil_it(height):
    """Sites with odd h + k are forbidden: the lattice is either that of the allowed ones or of all."""
    rng = np.random.default_rng(5)
    allowed = SITES.sum(1) % 2 == 0
    inside = (np.abs(SITES @ [[0, 20.0], [20.0, 0]]) < 110).all(1)
    q = ORIGIN + SITES @ np.array([[0, 20.0], [20.0, 0]]) + NOISE * rng.normal(size=(40, len(SITES), 2))
    seen = inside & (allowed | (rng.uniform(size=(40, len(SITES))) < 0.4))
    q = np.where(seen[..., None], q, np.nan)
    intensity = np.where(seen, np.where(allowed, 1.0, height) * rng.uniform(0.5, 1.5, seen.shape), np.nan)
    basis = find_basis(q[..., 0], q[..., 1], intensity)
    coarse, fine = [[20.0, 20.0], [20.0, -20.0]], [[0, 20.0], [20.0, 0]]
    assert same_lattice(basis.g, np.array(coarse), 0.2) or same_lattice(basis.g, np.array(fine), 0.2)
    if height == 0.02:
        assert same_lattice(basis.g, np.array(coarse), 0.2)
    if height == 1.0:
        assert same_lattice(basis.g, np.array(fine), 0.2)


@pytest.mark.parametrize("g", [[[0, 30], [30, 0]], [[0, 30], [26, 15]], [[21, 21], [-21, 21]]])
def test_find_basis__names_the_same_vectors_in_every_run(g):
    found = []
    for seed in range(4):
        q, intensity, *_ = scan(
            20, seed=seed, g=np.array(g, float), missing=0.3, strays=0.2, strain=0.01, degrees=0.5
        )
        found.append(find_basis(q[..., 0], q[..., 1], intensity).g)
    assert np.ptp(found, axis=0).max() < 0.5


@given(q=st.floats(0, 6.283), ratio=st.floats(0.5, 2), gamma=st.floats(0.8, 2.3), mix=st.integers(0, 5))
def test_orient_basis__is_right_handed_reduced_and_independent_of_the_naming(q, ratio, gamma, mix):
    g = 30 * np.array([[np.sin(q), np.cos(q)], [ratio * np.sin(q + gamma), ratio * np.cos(q + gamma)]])
    named = orient_basis(g)
    other = orient_basis(np.array([[1, mix], [0, 1]]) @ g * [[1], [-1]])
    np.testing.assert_allclose(other, named, atol=1e-9)
    assert named[0, 1] * named[1, 0] - named[0, 0] * named[1, 1] > 0  # g1 turns towards g2 as +x towards +y
    assert np.hypot(*named.T).max() <= 1.09 * np.hypot(*reduce_basis(g)[0].T).max()


def test_find_basis__without_intensities_takes_a_central_site():
    q, _, true, _, origin = scan(1, noise=0)
    basis = find_basis(q[..., 0], q[..., 1])
    np.testing.assert_allclose(basis.origin, origin[0], atol=1e-6)
    assert same_lattice(basis.g, true[0], 1e-6)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.full((4, 5, 2), np.nan), "none of the 4 patterns has three peaks"),
        ([[[10, 10], [20, 20], [np.nan, np.nan]]], "none of the 1 patterns has three peaks"),
        (np.stack([np.full(9, 5.0), 10.0 * np.arange(9)], -1)[None], "do not span a plane"),
        (np.full((3, 6, 2), 40.0), "lie on top of each other"),
        (np.random.default_rng(0).uniform(10, 246, (200, 40, 2)), "no lattice describes these peaks"),
    ],
)  # fmt: skip
def test_find_basis__says_why_there_is_none(points, message):
    points = np.asarray(points)
    with pytest.raises(ValueError, match=message):
        find_basis(points[..., 0], points[..., 1])


# --- indexing
# -----------------------------------------------------------------------------------------------------


def test_index_peaks__gives_the_indices_of_every_site():
    q = ORIGIN + SITES @ G
    h, k, indexed = index_peaks(q[:, 0], q[:, 1], g=G, origin=ORIGIN)
    assert indexed.all()
    np.testing.assert_array_equal(np.stack([h, k], 1), SITES)


def test_index_peaks__keeps_the_nearest_of_two_at_one_site():
    q = np.array([[130.0, 132.0], [128.0, 130.5], [128.0, 161.0], [np.nan, np.nan]])
    h, k, indexed = index_peaks(q[:, 0], q[:, 1], g=G, origin=ORIGIN)
    np.testing.assert_array_equal(indexed, [False, True, True, False])
    np.testing.assert_array_equal([h[2], k[2]], [1, 0])


def test_index_peaks__leaves_out_what_is_too_far():
    q = ORIGIN + np.array([[0, 0], [0, 9.0], [0, 7.0]])
    assert index_peaks(q[:, 0], q[:, 1], g=G, origin=ORIGIN, max_peak_spacing=8)[2].tolist() == [
        True,
        False,
        False,
    ]


# --- the fit
# ------------------------------------------------------------------------------------------------------


def test_fit_lattice__is_exact_without_noise_and_its_error_bars_vanish():
    q, intensity, true, F, origin = scan(noise=0)
    for weighting in ("uniform", "intensity", "intensity_squared"):
        found = fit(q, intensity=intensity, weighting=weighting)
        np.testing.assert_allclose(found.g, true, atol=1e-10)
        np.testing.assert_allclose(found.origin, origin, atol=1e-10)
        assert found.fit_error.max() < 1e-10
        assert np.abs(found.covariance).max() < 1e-18
        np.testing.assert_allclose(deformation_gradient(found.g, G), F, atol=1e-12)


def test_fit_lattice__of_a_magnified_pattern():  # S1
    sites = np.array(list(itertools.product(range(-2, 3), repeat=2)))
    g = np.array([[9.0, 1.0], [-1.5, 11.0]])
    scale = 1 + 0.002 * np.arange(8)[:, None] * np.ones((8, 6))
    q = 32 + scale[..., None, None] * (sites @ g)
    found = fit(q, g=g, origin=(32, 32))
    np.testing.assert_allclose(found.g, scale[..., None, None] * g, atol=1e-10)
    e = strain_from_F(deformation_gradient(found.g, g))
    np.testing.assert_allclose(e["e_xx"], 1 / scale - 1, atol=1e-12)
    np.testing.assert_allclose(e["e_yy"], 1 / scale - 1, atol=1e-12)
    assert max(np.abs(e["e_xy"]).max(), np.abs(e["theta"]).max()) < 1e-12


def test_fit_lattice__of_an_affine_map():  # S12
    sites = np.array(list(itertools.product(range(-3, 4), repeat=2)))
    q = (sites @ G) * [3, 7] + [-2, -3]
    found = fit(q, g=G * [3, 7], origin=(0, 0))
    np.testing.assert_allclose(found.origin, [-2, -3], atol=1e-9)
    np.testing.assert_allclose(found.g, G * [3, 7], atol=1e-9)


def test_fit_lattice__counts_high_orders_right_in_strained_and_turned_patterns():
    q, intensity, true, F, origin = scan(400, g=np.array([[0.5, 12.0], [13.0, 1.0]]), strain=0.03, degrees=3)
    found = fit(q, g=np.array([[0.5, 12.0], [13.0, 1.0]]), intensity=intensity)
    # a single miscounted high order moves g by more than 12 px / 10; the noise by less than 0.03 px
    assert np.abs(found.g - true).max() < 0.1
    assert np.abs(found.origin - origin).max() < 0.5


def test_fit_lattice__survives_strays_and_gaps():
    q, intensity, true, F, _ = scan(500, missing=0.3, strays=0.2)
    found = fit(q, intensity=intensity, sigma=np.full(q.shape[:-1], NOISE))
    clean = fit(scan(500, missing=0.3)[0], sigma=np.full(scan(500, missing=0.3)[0].shape[:-1], NOISE))
    error = np.sqrt(np.mean((found.g - true) ** 2))
    assert np.isfinite(found.fit_error).all()
    assert np.abs(found.g - true).max() < 0.3
    assert error < 1.1 * np.sqrt(np.mean((clean.g - true) ** 2))


def test_fit_lattice__robust_ignores_a_misplaced_peak_that_the_plain_fit_follows():
    q, _, true, *_ = scan(1, noise=0.0, descan=0)
    q[0, 5] += [4.0, -3.0]
    assert np.abs(fit(q).g - true).max() < 1e-9
    assert np.abs(fit(q, robust=False).g - true).max() > 0.01
    assert fit(q).n_indexed == fit(q, robust=False).n_indexed - 1


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_fit_lattice__does_not_depend_on_the_order_of_peaks_and_positions(seed):
    q, intensity, *_ = scan(12, missing=0.3, strays=0.2)
    sigma = np.where(np.isfinite(intensity), 0.2 + 0.1 / (0.1 + intensity), np.nan)
    rng = np.random.default_rng(seed)
    peaks, positions = rng.permutation(q.shape[1]), rng.permutation(12)
    one = fit(q, sigma=sigma, intensity=intensity)
    two = fit(
        q[positions][:, peaks], sigma=sigma[positions][:, peaks], intensity=intensity[positions][:, peaks]
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(b, a[positions], rtol=1e-9, atol=1e-9)


@settings(max_examples=10)
@given(degree=st.floats(-180, 180))
def test_fit_lattice__turning_the_pattern_turns_the_lattice(degree):
    q, intensity, *_ = scan(8, missing=0.2, strays=0.1)
    c, s = np.cos(np.deg2rad(degree)), np.sin(np.deg2rad(degree))
    turn = np.array([[c, s], [-s, c]])
    straight, turned = (
        fit(q, intensity=intensity),
        fit(q @ turn.T, g=G @ turn.T, origin=turn @ ORIGIN, intensity=intensity),
    )
    np.testing.assert_allclose(turned.g, straight.g @ turn.T, atol=1e-8)
    np.testing.assert_allclose(turned.fit_error, straight.fit_error, atol=1e-8)


@settings(max_examples=10)
@given(scale=st.floats(0.5, 4))
def test_fit_lattice__scaling_the_pattern_scales_the_lattice(scale):
    q, intensity, *_ = scan(8, missing=0.2, strays=0.1)
    one = fit(q, intensity=intensity)
    many = fit(q * scale, g=G * scale, origin=ORIGIN * scale, intensity=intensity)
    np.testing.assert_allclose(many.g, scale * one.g, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(many.covariance, scale**2 * one.covariance, rtol=1e-6, atol=1e-12)


def test_fit_lattice__may_be_given_other_vectors_of_the_same_lattice():
    q, intensity, *_ = scan(20, missing=0.2, strays=0.1)
    mix = np.array([[2.0, 1.0], [1.0, 1.0]])
    one, other = fit(q, intensity=intensity), fit(q, g=mix @ G, intensity=intensity)
    np.testing.assert_allclose(other.g, mix @ one.g, atol=1e-9)
    whole = np.kron(np.block([[np.eye(1), np.zeros((1, 2))], [np.zeros((2, 1)), mix]]), np.eye(2))
    np.testing.assert_allclose(other.covariance, whole @ one.covariance @ whole.T, atol=1e-9)


def test_fit_lattice__does_not_depend_on_internal_chunks(monkeypatch):
    q, intensity, *_ = scan(20, missing=0.2, strays=0.1)
    whole = fit(q, intensity=intensity)
    monkeypatch.setattr("fcunet.kernels.lattice_fit._CHUNK", 3 * q.shape[1])
    for a, b in zip(whole, fit(q, intensity=intensity), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12)


def test_fit_lattice__keeps_leading_dimensions():
    q, *_ = scan(12)
    found = fit(q.reshape(3, 4, -1, 2))
    assert [a.shape for a in found] == [(3, 4, 2), (3, 4, 2, 2), (3, 4, 6, 6), (3, 4), (3, 4), (3, 4)]
    assert [a.shape for a in fit(q[:0])] == [(0, 2), (0, 2, 2), (0, 6, 6), (0,), (0,), (0,)]


def test_fit_lattice__finds_an_origin_off_by_a_third_of_a_vector_and_one_per_position():
    q, intensity, true, _, origin = scan(30)
    off = fit(q, origin=ORIGIN + [7.0, -8.0], intensity=intensity)
    np.testing.assert_allclose(off.g, fit(q, intensity=intensity).g, atol=1e-9)
    guesses = origin + 5 * np.random.default_rng(1).uniform(-1, 1, (30, 2))
    guesses[4] = np.nan
    np.testing.assert_allclose(fit(q, origin=guesses, intensity=intensity).origin, off.origin, atol=1e-9)


# --- weights
# ------------------------------------------------------------------------------------------------------


def naive_fit(q, h, k, w):
    """Weighted least squares of one position, the plain way."""
    design = np.stack([np.ones(len(h)), h, k], 1) * np.sqrt(w)[:, None]
    return np.linalg.lstsq(design, q * np.sqrt(w)[:, None], rcond=None)[0]


@pytest.mark.parametrize("weighting", ["sigma", "uniform", "intensity", "intensity_squared"])
def test_fit_lattice__equals_weighted_least_squares_one_position_at_a_time(weighting):
    q, intensity, *_ = scan(5)
    sigma = 0.2 + 0.5 * np.random.default_rng(1).uniform(size=intensity.shape)
    found = fit(q, sigma=sigma, intensity=intensity, weighting=weighting, robust=False)
    w = {
        "sigma": sigma**-2,
        "uniform": np.ones_like(sigma),
        "intensity": intensity,
        "intensity_squared": intensity**2,
    }
    for i in range(5):
        h, k, used = index_peaks(q[i, :, 0], q[i, :, 1], g=found.g[i], origin=found.origin[i])
        expected = naive_fit(q[i, used], h[used], k[used], w[weighting][i, used])
        np.testing.assert_allclose(found.origin[i], expected[0], atol=1e-9)
        np.testing.assert_allclose(found.g[i], expected[1:], atol=1e-9)


def test_fit_lattice__weighs_two_families_by_their_stated_error():  # S7
    """Rows of sites at 1 % and 2 % compression along x; the second counts with a quarter of the variance."""
    h, k = np.array([-1, 1, -1, 1, -1, 1, -1, 1]), np.array([-1, -1, 1, 1, -1, -1, 1, 1])
    compression = np.repeat([1.01, 1.02], 4)
    q = np.stack([30.0 * k, 30.0 * h * compression], 1) + 100
    sigma = np.repeat([0.2, 0.1], 4)
    expected = naive_fit(q, h, k, sigma**-2)[1, 1] / 30
    assert expected == pytest.approx(1.018)
    # two peaks at one site are more than a lattice has, so the sites are moved apart by whole vectors
    far = np.where(np.arange(8) < 4, 0, 8)
    q = np.stack([30.0 * (k + far), 30.0 * h * compression], 1) + 100
    found = fit(q[None], g=[[0, 30.4], [30, 0]], origin=(100, 100), sigma=sigma[None], max_peak_spacing=5)
    assert found.n_indexed == 8
    assert 1 / (found.g[0, 0, 1] / 30) - 1 == pytest.approx(1 / 1.018 - 1, abs=1e-4)


def test_fit_lattice__weights_one_and_two_give_the_weighted_mean():  # S7
    """Sites at 1 % with weight 1, at 2 % with weight 2: 1.667 % in the formula linear in the pattern."""
    h, k = np.array([-1, 1, -1, 1] * 2), np.array([-1, -1, 1, 1] * 2)
    far = np.repeat([0, 8], 4)
    q = np.stack([30.0 * (k + far), 30.0 * h * np.repeat([1.01, 1.02], 4)], 1) + 100
    sigma = 0.2 * np.repeat([1.0, 0.5**0.5], 4)
    found = fit(q[None], g=[[0, 30.4], [30, 0]], origin=(100, 100), sigma=sigma[None], max_peak_spacing=5)
    F = deformation_gradient(found.g, [[0, 30], [30, 0]])
    assert strain_from_F(F, convention="py4dstem")["e_xx"] == pytest.approx(-0.05 / 3, abs=1e-4)
    assert strain_from_F(F)["e_xx"] == pytest.approx(1 / (1 + 0.05 / 3) - 1, abs=1e-4)


def test_fit_lattice__a_false_vector_has_no_lattice():  # S11
    grid = np.array(list(itertools.product(range(10), repeat=2))) @ np.array([[9.0, 1.0], [-1.5, 11.0]]) + 20
    q, middle = grid[None], grid[44]
    true = fit(q, g=[[9.0, 1.0], [-1.5, 11.0]], origin=middle, max_peak_spacing=0.1)
    false = fit(q, g=[[9.0, 1.0], [3.3, 7.1]], origin=middle, max_peak_spacing=0.1)
    assert true.n_indexed == 100
    assert false.n_indexed == 0
    assert np.isnan(false.g).all()


def test_fit_lattice__a_peak_of_tiny_weight_does_not_matter():  # S11
    q, *_ = scan(1, noise=0.1, descan=0)
    sigma = np.full(q.shape[:-1], 0.1)
    q[0, 7] += [0, 2.0]
    sigma[0, 7] = 100.0
    without = np.delete(q, 7, axis=1)
    np.testing.assert_allclose(fit(q, sigma=sigma).g, fit(without, sigma=np.delete(sigma, 7, 1)).g, atol=1e-5)


def test_fit_lattice__missing_sigmas_fall_back():
    q, intensity, *_ = scan(6)
    sigma = np.full(intensity.shape, NOISE)
    uniform = fit(q, weighting="uniform", robust=False)
    np.testing.assert_allclose(fit(q, sigma=None, robust=False).covariance, uniform.covariance)
    np.testing.assert_allclose(fit(q, sigma=np.full_like(sigma, np.nan), robust=False).g, uniform.g)
    some = np.where(np.arange(sigma.shape[1]) % 3 == 0, np.nan, sigma)
    np.testing.assert_allclose(fit(q, sigma=some).g, fit(q, sigma=sigma).g, atol=1e-12)


# --- no lattice
# ---------------------------------------------------------------------------------------------------


def test_fit_lattice__is_nan_where_there_are_too_few_peaks_or_only_one_line():
    q = np.full((5, 9, 2), np.nan)
    q[1, :1] = ORIGIN
    q[2, :4] = ORIGIN + [[0, 0], G[0], G[1], -G[0]]
    q[3] = ORIGIN + np.arange(-4, 5)[:, None] * G[0]
    q[4, :5] = ORIGIN + [[0, 0], G[0], G[1], -G[0], -G[1]]
    found = fit(q)
    np.testing.assert_array_equal(found.n_indexed, [0, 0, 0, 0, 5])
    for values in found[:4]:
        assert np.isnan(values[:4]).all()
        assert np.isfinite(values[4]).all()
    assert fit(q, min_num_peaks=4).n_indexed[2] == 4


def test_fit_lattice__finds_hardly_any_lattice_in_random_peaks():
    rng = np.random.default_rng(0)
    for n_peaks in (6, 12, 20, 60):
        found = fit(rng.uniform(10, 246, (500, n_peaks, 2)), origin=(128, 128))
        assert np.isfinite(found.fit_error).mean() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "counts"}, "unknown weighting 'counts'; choose one of sigma"),
        ({"weighting": "intensity"}, "needs the intensities"),
        ({"min_num_peaks": 2}, "at least 3 peaks"),
        ({"g": [[1, 2], [2, 4]]}, "missing or parallel"),
        ({"max_peak_spacing": 0}, "above 0"),
        ({"origin": (np.nan, 1.0)}, "origin is missing"),
        ({"sigma": np.ones((2, 3))}, "does not fit"),
    ],
)
def test_fit_lattice__refuses_what_it_cannot_use(options, message):
    with pytest.raises(ValueError, match=message):
        fit(scan(2)[0], **options)


# --- error bars
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["sigma", "uniform", "intensity"])
def test_fit_lattice__error_bars_cover_the_true_strain(weighting):
    """1500 positions, four components: the counted shares are known to 0.6 (68 %) and 0.3 (95 %) points."""
    q, intensity, _, F, _ = scan(1500, missing=0.3, strays=0.1, noise=0.0)
    rng = np.random.default_rng(7)
    sigma = rng.uniform(0.1, 0.5, q.shape[:-1]) if weighting == "sigma" else np.full(q.shape[:-1], NOISE)
    q = q + sigma[..., None] * rng.normal(size=q.shape)
    found = fit(q, sigma=sigma, intensity=intensity, weighting=weighting)
    strain, true = strain_from_F(deformation_gradient(found.g, G)), strain_from_F(F)
    std = strain_std(found.g, G, found.covariance)
    ratio = np.concatenate([np.abs(strain[c] - true[c]) / std[f"{c}_std"] for c in COMPONENTS])
    assert (ratio < 1).mean() == pytest.approx(0.683, abs=0.03)
    assert (ratio < 2).mean() == pytest.approx(0.954, abs=0.03)


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_fit_lattice__error_bars_correct_sigmas_that_are_wrong_by_a_factor(wrong):
    q, intensity, true, *_ = scan(400)
    found = fit(q, sigma=np.full(q.shape[:-1], wrong * NOISE), intensity=intensity)
    std = np.sqrt(np.einsum("nii->ni", found.covariance)[:, 2:])
    ratio = np.sqrt(np.mean(((found.g - true).reshape(-1, 4) / std) ** 2))
    assert ratio == pytest.approx(1, abs=0.1)


def test_fit_lattice__weights_from_sigma_reach_the_smallest_possible_error():
    """Sigmas spread over a factor ten: the scatter of g equals inv(A^T W A), and uniform weights do worse."""
    q, intensity, true, *_ = scan(800, noise=0.0)
    rng = np.random.default_rng(8)
    sigma = 0.1 * 10 ** rng.uniform(0, 1, q.shape[:-1])
    q = q + sigma[..., None] * rng.normal(size=q.shape)
    best, uniform = fit(q, sigma=sigma), fit(q, weighting="uniform")
    scatter = np.mean((best.g - true) ** 2)
    assert scatter == pytest.approx(np.mean(np.einsum("nii->ni", best.covariance)[:, 2:]), rel=0.1)
    assert np.mean((uniform.g - true) ** 2) > 2 * scatter


# --- histogram
# ----------------------------------------------------------------------------------------------------


def test_splat_peaks__shares_a_peak_among_four_pixels():
    image = splat_peaks([1.25, np.nan], [2.5, 1.0], [4.0, 7.0], (4, 5))
    expected = np.zeros((4, 5))
    expected[1:3, 2:4] = [[1.5, 1.5], [0.5, 0.5]]
    np.testing.assert_allclose(image, expected)


def test_splat_peaks__keeps_weight_and_centre_of_mass():
    rng = np.random.default_rng(2)
    y, x, w = rng.uniform(1, 20, 50), rng.uniform(1, 30, 50), rng.uniform(size=50)
    for sampling in (1.0, 2.0):
        image = splat_peaks(y, x, w, (24, 34), sampling=sampling)
        assert image.sum() == pytest.approx(w.sum())
        assert (image.sum(1) @ np.arange(image.shape[0])) / sampling == pytest.approx(w @ y)


def test_splat_peaks__drops_what_lies_outside():
    assert splat_peaks([-5.0, 1e9, -0.5], [2.0, 2.0, 2.0], None, (4, 4)).sum() == pytest.approx(0.5)

"""What residuals tell: how large errors are, and how much of them two patterns have in common."""

import itertools

import numpy as np
import pytest

from fcunet.kernels.lattice import fit_lattice
from fcunet.kernels.residuals import (
    SigmaCurve,
    fit_scatter_prior,
    fit_sigma_curve,
    mean_residuals,
    residual_ratio,
)

G = np.array([[20.0, 1.0], [-1.0, 22.0]])
ORIGIN = np.array([128.0, 127.0])
SITES = np.array(list(itertools.product(range(-3, 4), repeat=2)))


def draw(n, std, seed=0):
    return std * np.random.default_rng(seed).normal(size=(n, len(SITES), 2))


def patterns(errors, missing=0.0, stated=0.1):
    """Peaks with errors (n, P, 2) px, some of them missing, their sigma, and the lattices fitted to them."""
    rng = np.random.default_rng(9)
    q = ORIGIN + SITES @ G + errors
    q[rng.random(q.shape[:2]) < missing] = np.nan
    sigma = np.where(np.isfinite(q[..., 0]), stated, np.nan)
    fit = fit_lattice(q[..., 0], q[..., 1], g=G, origin=ORIGIN, sigma=sigma)
    return {"qy": q[..., 0], "qx": q[..., 1], "sigma": sigma, "g": fit.g, "origin": fit.origin}


def variance_beside_a_lattice(texture):
    rows = np.column_stack([np.ones(len(SITES)), SITES])
    left = texture - rows @ np.linalg.lstsq(rows, texture, rcond=None)[0]
    return (left**2).sum() / (2 * len(SITES) - 6)


def part(of, rows):
    return {k: v[rows] for k, v in of.items()}


def ratio_to(reference, found):
    qy, qx = found["qy"], found["qx"]
    rest = {k: v for k, v in found.items() if k not in ("qy", "qx")}
    return residual_ratio(qy, qx, mean_residuals(**reference), **rest)


@pytest.mark.parametrize("n", [1, 3, 200])  # patterns of the reference
@pytest.mark.parametrize("alike", [0.0, 0.7, 1.0])
def test_residual_ratio__is_what_differences_scatter_by(alike, n):
    texture, own = draw(1, 0.1, seed=1), draw(400, 0.1, seed=2)
    errors = np.sqrt(alike) * texture + np.sqrt(1 - alike) * own + draw(400, 0.05, seed=3)
    found = patterns(errors)
    ratio = ratio_to(part(found, slice(0, n)), part(found, slice(200, None)))
    differs = (1 - alike) * 0.1**2 + 0.05**2
    expected = differs / (alike * variance_beside_a_lattice(texture[0]) + differs)
    assert np.sqrt(np.mean(ratio**2)) == pytest.approx(np.sqrt(expected), rel=0.08)


# with reflections missing, another lattice comes of the same texture
@pytest.mark.parametrize("missing", [0.0, pytest.param(0.1, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize("alike", [0.0, 0.5, 0.95])
def test_residual_ratio__makes_error_bars_of_differences_right(alike, missing):
    texture = draw(60, 0.1, seed=1)[:, None]  # 60 crystals, 20 patterns each
    own, electrons = (draw(1200, std, seed=2).reshape(60, 20, -1, 2) for std in (0.1, 0.03))
    errors = np.sqrt(alike) * texture + np.sqrt(1 - alike) * own + electrons[::-1]
    z = []
    for crystal in errors:
        found = patterns(crystal, missing, stated=np.hypot(0.1, 0.03))
        fit = fit_lattice(found["qy"], found["qx"], g=G, origin=ORIGIN, sigma=found["sigma"])
        ratio = ratio_to(part(found, slice(0, 10)), part(found, slice(10, None)))
        difference = fit.g[10:] - fit.g[:10].mean(0)
        variance = 1.1 * fit.covariance[10:, 2:, 2:].diagonal(axis1=1, axis2=2)  # with the mean of 10
        z.append(difference.reshape(-1, 4) / np.sqrt(variance) / ratio[:, None])
    assert np.sqrt(np.mean(np.square(z))) == pytest.approx(1, abs=0.1)  # 60 references: 5 % or so


def test_residual_ratio__is_unknown_without_lattice_or_common_reflections():
    found = patterns(draw(4, 0.1))
    reference = mean_residuals(**part(found, slice(0, 2)))
    lost = {k: v.copy() for k, v in found.items()}
    lost["g"][0] = np.nan
    lost["qy"][1, 3:] = np.nan  # three peaks span a lattice and leave nothing
    ratio = residual_ratio(lost.pop("qy"), lost.pop("qx"), reference, **lost)
    assert np.isnan(ratio[:2]).all()
    assert np.isfinite(ratio[2:]).all()
    far = reference._replace(hk=reference.hk + 100)
    rest = {k: v for k, v in found.items() if k not in ("qy", "qx")}
    assert np.isnan(residual_ratio(found["qy"], found["qx"], far, **rest)).all()


def test_residual_ratio__needs_no_sigma():
    texture = draw(1, 0.1, seed=1)
    found = patterns(texture + draw(300, 0.05, seed=3))
    del found["sigma"]
    ratio = ratio_to(part(found, slice(0, 100)), part(found, slice(100, None)))
    expected = 0.05**2 / (variance_beside_a_lattice(texture[0]) + 0.05**2)
    assert np.median(ratio) == pytest.approx(np.sqrt(expected), rel=0.08)


def test_residual_ratio__does_not_mind_a_peak_that_is_no_disk():
    errors = draw(1, 0.1, seed=1) + draw(300, 0.05, seed=3)
    clean = ratio_to(part(patterns(errors), slice(0, 100)), patterns(errors))
    errors[:, 10] += 3.0  # px: nearest to this site, and no disk of this lattice
    spoilt = ratio_to(part(patterns(errors), slice(0, 100)), patterns(errors))
    assert np.median(spoilt) == pytest.approx(np.median(clean), rel=0.05)


def test_mean_residuals__are_those_of_the_reflections_that_many_patterns_show():
    texture = draw(1, 0.2, seed=5)
    found = patterns(texture + draw(400, 0.02, seed=6))
    found["qy"][:320, 7] = np.nan  # shown by one in five
    mean = mean_residuals(**found)
    assert len(mean.hk) == len(SITES) - 1
    assert (mean.n_patterns == 400).all()
    place = {tuple(hk): m for hk, m in zip(mean.hk, mean.mean, strict=True)}
    rows = np.column_stack([np.ones(len(SITES)), SITES])
    left = texture[0] - rows @ np.linalg.lstsq(rows, texture[0], rcond=None)[0]  # what is no lattice
    measured = [place[tuple(hk)] for hk in mean.hk]
    np.testing.assert_allclose(measured, left[np.arange(len(SITES)) != 7], atol=0.03)
    assert mean_residuals(**{k: np.full_like(v, np.nan) for k, v in found.items()}) is None


def test_fit_sigma_curve__finds_by_how_much_stated_errors_are_wrong():
    stated = np.geomspace(0.02, 0.5, len(SITES))
    true = stated * np.interp(np.log(stated), np.log([0.02, 0.5]), [0.6, 1.8])
    found = patterns(draw(300, 1.0) * true[:, None], stated=stated)
    qy, qx, sigma = (found[k] for k in ("qy", "qx", "sigma"))
    curve = None
    for _ in range(2):
        used = sigma if curve is None else curve.applied(sigma)
        fit = fit_lattice(qy, qx, g=G, origin=ORIGIN, sigma=used)
        curve = fit_sigma_curve(qy, qx, sigma, g=fit.g, origin=fit.origin, curve=curve)
    assert len(curve.sigma) == 8
    np.testing.assert_allclose(curve.applied(stated)[3:-3], true[3:-3], rtol=0.08)
    assert np.isnan(curve.applied(np.nan))
    assert curve.applied(1e-9) == pytest.approx(1e-9 * curve.factor[0])


def test_fit_sigma_curve__is_robust_and_modest():
    errors = draw(300, 0.1)
    errors[np.random.default_rng(1).random(errors.shape[:2]) < 0.02] += 2.0  # px
    found = patterns(errors)
    qy, qx, sigma = (found.pop(k) for k in ("qy", "qx", "sigma"))
    np.testing.assert_allclose(fit_sigma_curve(qy, qx, sigma, **found).factor, 1, atol=0.1)
    for factor in (1e-6, 1e3):  # exact peaks; errors stated a thousandfold too small
        curve = fit_sigma_curve(qy, qx, sigma / factor, **found)
        assert set(curve.factor) <= {0.25, 4.0}


def test_fit_sigma_curve__of_few_peaks_is_none():
    found = patterns(draw(2, 0.1))
    qy, qx, sigma = (found.pop(k) for k in ("qy", "qx", "sigma"))
    assert fit_sigma_curve(qy, qx, sigma, **found) is None


def test_sigma_curve__is_linear_in_the_logarithms():
    curve = SigmaCurve(np.array([0.1, 0.4]), np.array([1.0, 4.0]))
    np.testing.assert_allclose(curve.applied([0.05, 0.1, 0.2, 0.4, 0.8]), [0.05, 0.1, 0.4, 1.6, 3.2])


def test_fit_sigma_curve__of_equal_errors_is_one_factor():
    found = patterns(draw(200, 0.1) * np.where(np.arange(200) < 100, 1.0, 2.0)[:, None, None])
    qy, qx, sigma = (found.pop(k) for k in ("qy", "qx", "sigma"))
    curve = fit_sigma_curve(qy, qx, sigma, **found)
    assert len(curve.factor) == 1
    assert curve.factor[0] == pytest.approx(np.sqrt((1 + 4) / 2), rel=0.05)


def scattering(n, level, *, seed=3):
    """Patterns (n of them) whose errors are `level` (n,) times 0.1 px, stated as 0.1 px."""
    return patterns(level[:, None, None] * draw(n, 0.1, seed=seed))


def test_scatter_prior__counts_for_much_where_patterns_differ_by_chance_alone():
    prior = fit_scatter_prior(**scattering(400, np.ones(400)))
    assert prior.scale == pytest.approx(1, abs=0.02)
    assert prior.degrees > 500  # a pattern has 92
    found = scattering(400, np.full(400, 0.7))
    found.pop("sigma")  # then in px^2
    assert fit_scatter_prior(**found).scale == pytest.approx(0.07**2, rel=0.03)


@pytest.mark.parametrize("degrees", [10, 40])
def test_scatter_prior__counts_for_as_much_as_patterns_are_alike(degrees):
    variance = 2 * degrees / np.random.default_rng(5).chisquare(degrees, 1500)
    prior = fit_scatter_prior(**scattering(1500, np.sqrt(variance)))
    assert prior.degrees == pytest.approx(degrees, rel=0.25)
    assert prior.scale == pytest.approx(2, rel=0.05)


def test_scatter_prior__is_of_eight_patterns_at_least():
    found = scattering(8, np.ones(8))
    assert fit_scatter_prior(**found) is not None
    assert fit_scatter_prior(**part(found, slice(0, 7))) is None
    found["g"][3] = np.nan
    assert fit_scatter_prior(**found) is None


def test_scatter_prior__of_exact_vectors_is_next_to_nothing():
    found = scattering(20, np.zeros(20))
    found.pop("sigma")
    assert 0 <= fit_scatter_prior(**found).scale < 1e-9


def test_scatter_prior__far_from_what_was_stated_counts_for_little():
    found = scattering(100, np.ones(100))
    found["sigma"] = found["sigma"] / 50  # stated 0.002 px
    assert fit_scatter_prior(**found) == (16.0, 4.0)


def z_of(fit):
    """Errors of g1 and g2 in units of their error bars."""
    std = np.sqrt(fit.covariance[:, 2:, 2:].diagonal(axis1=1, axis2=2))
    return (fit.g - G).reshape(-1, 4) / std


def test_fit_lattice__with_a_scatter_prior_few_peaks_have_fair_error_bars():
    q = ORIGIN + SITES @ G + draw(3000, 0.1)
    qy, qx = np.moveaxis(q[:, [8, 16, 24, 25, 31]], -1, 0)  # five peaks: four degrees of freedom
    given = {"g": G, "origin": ORIGIN, "weighting": "uniform", "robust": False}
    alone, together = (fit_lattice(qy, qx, **given, scatter_prior=p) for p in (None, (0.1**2, 500.0)))
    np.testing.assert_array_equal(alone.g, together.g)
    shares = [[(np.abs(z_of(f)) < k).mean() for k in (1, 2)] for f in (alone, together)]
    assert shares[0][0] < 0.65
    assert shares[0][1] < 0.90
    np.testing.assert_allclose(shares[1], (0.683, 0.954), atol=0.02)


def test_fit_lattice__a_pattern_worse_than_its_scan_keeps_wide_error_bars():
    level = np.r_[np.ones(200), np.full(200, 4.0)]
    found = scattering(400, level)
    given = {"g": G, "origin": ORIGIN, "sigma": found["sigma"], "scatter_prior": (1.0, 1000.0)}
    z = z_of(fit_lattice(found["qy"], found["qx"], **given))
    assert np.std(z[:200]) == pytest.approx(1, abs=0.08)
    assert 1.05 < np.std(z[200:]) < 1.25  # 2.6 if they were taken for the rest

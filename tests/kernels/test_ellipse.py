"""Ellipse and pixel size from drawn rings and from disks of known crystals."""

import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fcunet.kernels.ellipse import (
    Ellipse,
    distortion_matrix,
    find_ring,
    fit_crystal,
    fit_ring,
    undistort,
)

PIXEL, TERMS = 0.0123, (0.012, -0.008)


def hexagonal(q_max):
    """Reciprocal lattice of titanium (a 2.9505, c 4.6855), Cartesian 1/angstrom, without 00l, l odd."""
    a, c = 2.9505, 4.6855
    n = np.arange(-8, 9)
    hkl = np.stack(np.meshgrid(n, n, n, indexing="ij"), -1).reshape(-1, 3)
    h, k, m = hkl.T
    allowed = ~(((h - k) % 3 == 0) & (m % 2 == 1)) & hkl.any(1)
    g = np.stack([h / a, (h + 2 * k) / (a * math.sqrt(3)), m / c], -1)[allowed]
    return g[np.linalg.norm(g, axis=1) < q_max]


def cubic_rings(a, q_max):
    n = np.arange(0, 12)
    hkl = np.stack(np.meshgrid(n, n, n, indexing="ij"), -1).reshape(-1, 3)[1:]
    fcc = (hkl % 2 == hkl[:, :1] % 2).all(1)
    q = np.unique(np.round(np.linalg.norm(hkl[fcc], axis=1) / a, 9))
    return q[q < q_max]


def polycrystal(n_grains, *, noise, seed=0, wavelength=0.0197, thickness=60.0):
    """Disks (n, 2) px of grains turned at random, those within 1/thickness of the Ewald sphere."""
    rng = np.random.default_rng(seed)
    g = hexagonal(1.2)
    out = []
    for turn in Rotation.random(n_grains, rng):
        v = turn.apply(g)
        error = v[:, 2] + 0.5 * wavelength * (v[:, :2] ** 2).sum(1)
        v = v[np.abs(error) < 1.0 / thickness, :2]
        out.append(v + rng.normal(0, noise, v.shape))
    return np.concatenate(out) @ distortion_matrix(*TERMS).T / PIXEL


def test_ellipse__terms_and_axes_are_one_thing():
    for ellipse in (Ellipse(1.05, 30.0), Ellipse(1.2, 170.0), Ellipse(1.01, 90.0)):
        assert Ellipse.from_terms(*ellipse.terms) == pytest.approx(ellipse)
        phi = math.radians(ellipse.angle_degree)
        along, across = np.array([math.sin(phi), math.cos(phi)]), np.array([math.cos(phi), -math.sin(phi)])
        np.testing.assert_allclose(ellipse.matrix @ along, along * math.sqrt(ellipse.ratio))
        np.testing.assert_allclose(ellipse.matrix @ across, across / math.sqrt(ellipse.ratio))
        assert np.linalg.det(ellipse.matrix) == pytest.approx(1)


def test_undistort__is_the_inverse():
    v = np.random.default_rng(0).normal(size=(5, 2))
    ellipse = Ellipse(1.08, 25.0)
    np.testing.assert_allclose(undistort(v @ ellipse.matrix.T, ellipse), v, atol=1e-12)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_fit_crystal__titanium_powder(rounds):  # S13
    # 60 orientations, start 10 % off; the published case asks 0.2 % and 0.0015
    rings = np.unique(np.round(np.linalg.norm(hexagonal(1.2), axis=1), 6))
    fit = fit_crystal(polycrystal(60, noise=0.002), rings, 0.011, rounds=rounds)
    assert fit.q_pixel == pytest.approx(PIXEL, rel=1e-3)
    np.testing.assert_allclose(fit.terms, TERMS, atol=1e-3)


def test_fit_crystal__error_bars_cover():
    rings = np.unique(np.round(np.linalg.norm(hexagonal(1.2), axis=1), 6))
    pulls = []
    for seed in range(12):
        fit = fit_crystal(polycrystal(25, noise=0.002, seed=seed), rings, 0.0123)
        pulls.append((fit.q_pixel - PIXEL) / fit.q_pixel_std)
    # 12 pulls of standard deviation 1: their rms lies in 0.5..1.6 with 99.5 %
    assert 0.5 < np.sqrt(np.mean(np.square(pulls))) < 1.6


def test_fit_crystal__one_grain_needs_no_start():
    # silicon [110]: fcc rings without 200 (diamond), one zone, no pixel size given
    a = 5.431
    h, k = np.mgrid[-4:5, -4:5]
    hkl = np.stack([h, h, 0 * h], -1) + np.stack([0 * k, 0 * k, k], -1)
    hkl = hkl.reshape(-1, 3)
    total = hkl.sum(1)
    diamond = (hkl % 2 == hkl[:, :1] % 2).all(1) & ((hkl % 2 == 1).all(1) | (total % 4 == 0)) & hkl.any(1)
    hkl = hkl[diamond]
    flat = np.stack([hkl[:, 2], (hkl[:, 0] + hkl[:, 1]) / math.sqrt(2)], -1) / a
    px = flat @ distortion_matrix(0.01, 0.004).T / 0.02
    px = px + np.random.default_rng(1).normal(0, 0.1, px.shape)
    rings = np.unique(np.round(np.linalg.norm(flat, axis=1), 9))
    fit = fit_crystal(px, rings)
    assert fit.q_pixel == pytest.approx(0.02, rel=2e-3)
    np.testing.assert_allclose(fit.terms, (0.01, 0.004), atol=2e-3)


def test_fit_crystal__a_third_of_strangers_does_no_harm():
    rng = np.random.default_rng(3)
    disks = polycrystal(40, noise=0.002)
    strangers = rng.uniform(-95, 95, (len(disks) // 2, 2))
    rings = np.unique(np.round(np.linalg.norm(hexagonal(1.2), axis=1), 6))
    fit = fit_crystal(np.concatenate([disks, strangers]), rings, 0.0125)
    assert fit.q_pixel == pytest.approx(PIXEL, rel=2e-3)


def test_fit_crystal__noise_or_too_few_vectors_are_no_crystal():
    rings = cubic_rings(4.0, 1.2)
    assert fit_crystal(np.zeros((5, 2)), rings, 0.02) is None
    fit = fit_crystal(np.random.default_rng(2).uniform(-60, 60, (300, 2)), rings, 0.02)
    assert fit is None or fit.ambiguity > 0.5  # another pixel size would do nearly as well


@pytest.mark.parametrize("electrons", [3, 300])
def test_fit_ring__ellipse_of_an_amorphous_ring(electrons):
    rng = np.random.default_rng(7)
    ellipse, centre, radius = Ellipse(1.03, 60.0), np.array([63.2, 60.9]), 40.0
    y, x = np.indices((128, 124))
    rho = np.hypot(*np.moveaxis(undistort(np.stack([y, x], -1) - centre, ellipse), -1, 0))
    image = electrons * (np.exp(-0.5 * ((rho - radius) / 4) ** 2) + 2 * np.exp(-rho / 25) + 0.1)
    image = rng.poisson(image).astype(float)
    image[100:104, 20:24] = np.nan
    start = find_ring(image, (63.0, 61.0), inner_px=12)
    assert start == pytest.approx(radius, abs=3)
    fit = fit_ring(image, (63.0, 61.0), start)
    # the fit's own error bar, four of them, and pixels
    np.testing.assert_allclose(fit.terms, ellipse.terms, atol=4 * fit.terms_std + 2e-4)
    assert fit.terms_std < (5e-3 if electrons == 3 else 5e-4)
    np.testing.assert_allclose(fit.centre, centre, atol=0.3 if electrons == 3 else 0.05)
    assert fit.radius_px == pytest.approx(radius, rel=0.01)


def test_fit_ring__no_ring_is_none():
    rng = np.random.default_rng(5)
    y, x = np.indices((96, 96))
    image = rng.poisson(100 * np.exp(-np.hypot(y - 47.5, x - 47.5) / 30)).astype(float)
    fit = fit_ring(image, (47.5, 47.5), 30.0)
    assert fit is None or fit.contrast < 3

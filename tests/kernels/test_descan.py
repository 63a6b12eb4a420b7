"""Beam centres of single patterns, the shadow of a beam stop, and surfaces through centres."""

import numpy as np
import pytest
from scipy import ndimage as ndi
from scipy.special import erfc

from fcunet.kernels.descan import find_beam_stop, find_centres, fit_surface, surface_at, surface_map

CENTRE = np.array([33.4, 30.7])


def draw(centre, *, shape=(66, 62), radius=3.0, dose=3e4, seed=0, direct=1.0):
    """Counts of a lattice of disks whose Friedel mates differ in intensity, as in a tilted crystal."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = np.full(shape, 1e-3)
    for h in range(-2, 3):
        for k in range(-2, 3):
            p = centre + h * np.array([11.2, 1.0]) + k * np.array([-1.3, 12.1])
            height = direct if h == k == 0 else np.exp(-0.4 * (h * h + k * k)) * rng.uniform(0.4, 1.0)
            image += height * erfc((np.hypot(y - p[0], x - p[1]) - radius) / 0.9) / 2
    return rng.poisson(dose * image / image.sum()).astype(float)


def stop_mask(shape=(66, 62)):
    mask = np.zeros(shape, dtype=bool)
    mask[28:39, :36] = True
    return mask


def line_up(model, n_terms):
    y, x = np.mgrid[:7, :9]
    position = np.stack([y.ravel(), x.ravel()], axis=1)
    truth = np.random.default_rng(1).normal(size=(2, 6)) * [30, 0.3, 0.2, 0.02, 0.03, 0.01]
    truth[:, n_terms:] = 0
    return position, truth, surface_at(truth, position)


@pytest.mark.parametrize(("model", "n_terms"), [("constant", 1), ("plane", 3), ("parabola", 6)])
def test_fit_surface__ignores_a_third_of_outliers(model, n_terms):
    position, truth, value = line_up(model, n_terms)
    value[::3] += 15
    value[1] = np.nan
    found, inlier = fit_surface(position, value, model=model)
    np.testing.assert_allclose(found, truth[:, : found.shape[1]], atol=1e-9)
    assert not inlier[::3].any()
    np.testing.assert_allclose(surface_map(found, (7, 9)).reshape(-1, 2), surface_at(truth, position))


def test_fit_surface__not_robust_is_least_squares():
    position, _, value = line_up("plane", 3)
    value[::5] += 2
    found, inlier = fit_surface(position, value, robust=False)
    terms = np.concatenate([np.ones((len(position), 1)), position], axis=1)
    np.testing.assert_allclose(found, np.linalg.lstsq(terms, value, rcond=None)[0].T, atol=1e-9)
    assert inlier.all()


def test_fit_surface__too_few_points_give_a_constant():
    found, _ = fit_surface(np.array([[0, 0], [0, 1], [3, 2]]), np.array([[1.0, 2], [1, 2], [4, 5]]))
    np.testing.assert_allclose(found[:, 1:], 0, atol=1e-12)


@pytest.mark.parametrize(("method", "tolerance"), [("disk", 0.15), ("brightest", 0.15), ("mass", 0.15)])
def test_find_centres__find_the_direct_beam(method, tolerance):
    # 1.2e4 electrons in a disk of radius 3: the counting error of its centre is 0.02 px; pixels do the rest
    centres = [CENTRE + d for d in ((0, 0), (0.3, -0.4), (-0.5, 0.25))]
    patterns = np.stack([draw(c, seed=i) for i, c in enumerate(centres)])
    found = find_centres(patterns, np.repeat(CENTRE[None], 3, 0), method=method, radius_px=3.0, reach_px=5.0)
    np.testing.assert_allclose(found, centres, atol=tolerance)


def test_find_centres__friedel_pairs_need_no_direct_beam():
    centres = [CENTRE + d for d in ((0, 0), (0.3, -0.4), (-0.5, 0.25))]
    patterns = np.stack([draw(c, seed=i, direct=0.0) for i, c in enumerate(centres)])
    mask = stop_mask()
    patterns[:, mask] = 0
    predicted = np.repeat(np.rint(CENTRE)[None], 3, 0)
    found = find_centres(patterns, predicted, method="friedel", radius_px=3.0, reach_px=4.0, mask=mask)
    np.testing.assert_allclose(found, centres, atol=0.2)


@pytest.mark.parametrize("method", ["disk", "brightest", "mass", "friedel"])
def test_find_centres__an_empty_pattern_has_none(method):
    found = find_centres(
        np.zeros((1, 32, 32)), np.array([[15.0, 16.0]]), method=method, radius_px=3.0, reach_px=4.0
    )
    assert np.isnan(found).all()


def test_find_centres__refuses_an_unknown_method():
    with pytest.raises(ValueError, match="unknown method 'sum'.*friedel"):
        find_centres(np.ones((1, 8, 8)), np.zeros((1, 2)), method="sum", radius_px=1.0, reach_px=1.0)


def test_find_beam_stop__finds_the_shadow_and_nothing_else():
    sparse = sum(draw(CENTRE + d, seed=i, dose=1e5) for i, d in enumerate(((0, 0), (0.2, 0.1))))
    for mean in (sparse, sparse + 20.0):
        assert not find_beam_stop(mean).any()
    stop = stop_mask()
    found = find_beam_stop(np.where(stop, 0.3, sparse + 20.0), grow_px=0)
    assert (found & stop).sum() > 0.8 * stop.sum()
    assert not (found & ~ndi.binary_dilation(stop, iterations=2)).any()  # its rim is blurred

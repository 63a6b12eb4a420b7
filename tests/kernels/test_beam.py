"""Bad pixels and the plane through the beam centres."""

import numpy as np

from fcunet.kernels.beam import find_bad_pixels, fit_plane


def test_find_bad_pixels__a_cosmic_ray_is_not_a_hot_pixel():
    patterns = np.random.default_rng(4).poisson(4.0, (9, 32, 32)).astype(float)
    patterns[3, 8, 8] = 5000
    hot, dead = find_bad_pixels(patterns)
    assert not hot.any()
    assert not dead.any()


def test_fit_plane__ignores_a_third_of_outliers():
    y, x = np.mgrid[:5, :6]
    position = np.stack([y.ravel(), x.ravel()], axis=1)
    truth = np.array([[30.0, 0.2, -0.1], [40.0, 0.0, 0.3]])
    value = np.concatenate([np.ones((30, 1)), position], axis=1) @ truth.T
    value[::3] += 15
    value[1] = np.nan
    plane, inlier = fit_plane(position, value)
    np.testing.assert_allclose(plane, truth, atol=1e-9)
    assert not inlier[::3].any()

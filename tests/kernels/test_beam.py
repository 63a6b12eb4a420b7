"""Bad pixels."""

import numpy as np

from fcunet.kernels.beam import find_bad_pixels


def test_find_bad_pixels__a_cosmic_ray_is_not_a_hot_pixel():
    patterns = np.random.default_rng(4).poisson(4.0, (9, 32, 32)).astype(float)
    patterns[3, 8, 8] = 5000
    hot, dead = find_bad_pixels(patterns)
    assert not hot.any()
    assert not dead.any()

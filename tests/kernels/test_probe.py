"""Disks recognised by their edge, against drawn ones."""

import numpy as np
import pytest

from fcunet.kernels.probe import edge_response, find_disks_of_any_size, fit_disk, synthetic_probe, vote_radius


@pytest.mark.parametrize(
    ("radius", "centre"), [(2.5, (20.3, 22.7)), (6.0, (20.0, 22.0)), (12.0, (23.4, 21.1))]
)
def test_fit_disk__is_exact_on_its_own_model(radius, centre):
    image = 40 + 1e4 * synthetic_probe((45, 44), radius, 0.8, centre)
    fit = fit_disk(image, (22, 22), radius * 1.1)
    assert fit.centre == pytest.approx(centre, abs=1e-3)
    assert fit.radius_px == pytest.approx(radius, abs=0.05)


def test_edge_response__is_the_step_height_at_the_centre_of_a_disk():
    y, x = np.mgrid[:64, :64]
    disk = 7.0 * (np.hypot(y - 30, x - 33) <= 10) + 100
    response = edge_response(disk[None], np.array([10.0]))[0, 0]
    assert np.unravel_index(response.argmax(), response.shape) == (30, 33)
    assert response.max() == pytest.approx(7.0, rel=0.2)


def test_edge_response__does_not_see_masked_pixels():
    image = np.zeros((1, 40, 40))
    image[0, 12:15, 12:15] = np.nan
    assert not edge_response(image, np.array([3.0])).any()


@pytest.mark.parametrize("radius", [3.0, 9.0, 25.0])
def test_find_disks_of_any_size__knows_the_radius_roughly(radius):
    disks = 2e4 * synthetic_probe((160, 150), radius, 0.8, (50, 60))
    disks = disks + 1e4 * synthetic_probe((160, 150), radius, 0.8, (105, 95))
    image = np.random.default_rng(0).poisson(disks + 0.5).astype(float)
    found, significance = vote_radius(find_disks_of_any_size(image[None]))
    assert found == pytest.approx(radius, rel=0.25)  # the first guess; small radii are worst
    assert significance > 6


def test_synthetic_probe__refuses_what_is_no_disk():
    with pytest.raises(ValueError, match="positive radius"):
        synthetic_probe((32, 32), 0.0, 0.5)
    with pytest.raises(ValueError, match="outside a detector"):
        synthetic_probe((32, 32), 2.0, 0.5, (500, 500))

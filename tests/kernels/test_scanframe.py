"""Scan rotation and transposition from fields whose potential is known."""

import numpy as np
import pytest
from scipy import ndimage as ndi

from fcunet.kernels.scanframe import curl_and_divergence, find_scan_rotation


def gradient_field(shape, seed=0):
    """Gradient (y, x) of a smooth random potential, in scan axes, rms 1."""
    rng = np.random.default_rng(seed)
    potential = ndi.gaussian_filter(rng.normal(size=(shape[0] + 8, shape[1] + 8)), 2.0)[4:-4, 4:-4]
    field = np.stack(np.gradient(potential), axis=-1)
    return field / np.sqrt((field**2).mean())


def on_detector(field, degree, transposed=False):
    """The field as a detector sees it whose x axis the scan's is turned from by `degree`, +x towards +y."""
    c, s = np.cos(np.radians(degree)), np.sin(np.radians(degree))
    y, x = field[..., 0], field[..., 1]
    seen = np.stack([s * x + c * y, c * x - s * y], axis=-1)
    return seen[..., ::-1] if transposed else seen


def difference(a, b):
    """Degrees between two axes."""
    return abs((a - b + 90) % 180 - 90)


def test_curl_and_divergence__of_a_turn_and_of_a_stretch():
    y, x = np.mgrid[:4, :5].astype(float)
    curl, divergence = curl_and_divergence(np.stack([x, -y], -1))
    np.testing.assert_allclose(curl, 2)
    np.testing.assert_allclose(divergence, 0)
    curl, divergence = curl_and_divergence(np.stack([y, x], -1), step=(2.0, 0.5))
    np.testing.assert_allclose(curl, 0)
    np.testing.assert_allclose(divergence, 2.5)


@pytest.mark.parametrize("degree", [0, 30, 125, 210, -77])
@pytest.mark.parametrize("transposed", [False, True])
def test_find_scan_rotation__recovers_angle_and_transposition(degree, transposed):
    field = gradient_field((16, 16)) + np.random.default_rng(1).normal(0, 0.02, (16, 16, 2))
    found = find_scan_rotation([on_detector(field, degree, transposed)])
    assert difference(found.rotation_degree, degree) < 1
    assert found.transposed is transposed
    assert found.angle_known
    assert found.transposition_known


def test_find_scan_rotation__patches_of_one_scan_count_together():
    fields = [on_detector(gradient_field((6, 6), seed), 40.0) for seed in range(8)]
    assert difference(find_scan_rotation(fields).rotation_degree, 40.0) < 1


def test_find_scan_rotation__error_bar_covers():
    pulls = []
    for seed in range(30):
        noise = np.random.default_rng(seed).normal(0, 0.25, (24, 24, 2))
        found = find_scan_rotation([on_detector(gradient_field((24, 24), seed), 30.0) + noise])
        pulls.append(((found.rotation_degree - 30 + 90) % 180 - 90) / found.std_degree)
    # 30 pulls: their rms lies in 0.7..1.4 with 98 %; tiles of the bootstrap share no cells, but potentials
    assert 0.6 < np.sqrt(np.mean(np.square(pulls))) < 1.6


def test_find_scan_rotation__noise_decides_nothing():
    found = find_scan_rotation([np.random.default_rng(2).normal(size=(20, 20, 2))])
    assert not found.angle_known
    assert not found.transposition_known


def test_find_scan_rotation__a_field_of_one_direction_cannot_tell_transposition():
    # layers along one axis, as in a multilayer: grad along x only, turned by 45 degrees and its mirror alike
    x = np.sin(np.arange(24) / 2.0)
    field = np.stack([np.zeros((24, 24)), np.broadcast_to(x, (24, 24))], -1)
    field = field + np.random.default_rng(3).normal(0, 0.02, field.shape)
    found = find_scan_rotation([on_detector(field, 20.0)])
    assert not found.transposition_known


def test_find_scan_rotation__nothing_measured_is_nan():
    assert np.isnan(find_scan_rotation([np.full((4, 4, 2), np.nan)]).rotation_degree)
    assert np.isnan(find_scan_rotation([np.zeros((1, 1, 2))]).rotation_degree)

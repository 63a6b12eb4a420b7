"""Error bars of positions: against a closed form, and by counting how often the truth lies inside them."""

import numpy as np
import pytest
import torch
from scipy.special import erfc

from fcunet.kernels.correlation import find_disks, make_kernel
from fcunet.kernels.precision import (
    _response,
    describe_disk,
    disk_light,
    measure_contrast,
    position_sigma,
)

RADIUS, EDGE, SIZE = 7.0, 0.7, 128


def disk(shape, centre, radius=RADIUS, edge=EDGE):
    y, x = np.indices(shape, sparse=True)
    return 0.5 * erfc((np.hypot(y - centre[0], x - centre[1]) - radius) / (edge * np.sqrt(2)))


def grid_of_disks(rng, n, electrons, *, texture=0.0, background=0.0):
    """Noisy patterns of 3 x 3 separate disks of random brightness: counts and positions (n, 9, 2)."""
    sites = np.array([(32 + 32 * i, 32 + 32 * j) for i in range(3) for j in range(3)])
    positions = sites + rng.uniform(-2, 2, (n, 9, 2))
    y, x = np.indices((25, 25))
    patterns = np.full((n, SIZE, SIZE), float(background))
    for i, k in np.ndindex(n, 9):
        corner = sites[k] - 12
        v, u = (y + corner[0] - positions[i, k, 0]) / RADIUS, (x + corner[1] - positions[i, k, 1]) / RADIUS
        a, b, c = texture * rng.uniform(-0.75, 0.75, 3)
        turn, phase = rng.uniform(0, 2 * np.pi, 2)
        wave = np.cos(rng.uniform(2, 5) * (v * np.cos(turn) + u * np.sin(turn)) + phase)
        contrast = 1 + a * v + b * u + c * v * u + texture * rng.uniform(0.1, 0.5) * wave
        spot = disk((25, 25), positions[i, k] - corner) * np.maximum(contrast, 0.05)
        window = (slice(corner[0], corner[0] + 25), slice(corner[1], corner[1] + 25))
        patterns[i][window] += spot / spot.sum() * electrons * rng.uniform(0.3, 1)
    return rng.poisson(patterns).astype(np.float32), positions


def normalised_errors(patterns, positions, **options):
    kernel = make_kernel(disk((SIZE, SIZE), (SIZE // 2, SIZE // 2)))
    options = {
        "sigma_cc": 1.0,
        "min_relative_intensity": 0.02,
        "min_peak_spacing": 16.0,
        "edge_boundary": 12,
    } | options
    peaks = find_disks(torch.from_numpy(patterns), kernel, **options)
    found = torch.stack([peaks.qy, peaks.qx], -1).numpy()[:, None]
    distance = np.nan_to_num(np.linalg.norm(found - positions[:, :, None], axis=-1), nan=np.inf)
    nearest = distance.argmin(-1)
    assert (distance.min(-1) < 5).mean() > 0.97
    picked = np.take_along_axis(found[:, 0], nearest[..., None], 1)
    sigma = np.take_along_axis(peaks.sigma.numpy(), nearest, 1)
    keep = distance.min(-1) < 5
    return ((picked - positions) / sigma[..., None])[keep]


@pytest.mark.parametrize(
    ("electrons", "background", "options"),
    [
        (300, 0.0, {}),
        (300, 0.2, {"transform": "sqrt"}),
        (300, 0.0, {"transform": "log"}),
        (30_000, 0.0, {}),
        (30_000, 2.0, {"transform": "log"}),
        (30_000, 0.0, {"subpixel": "parabola"}),
        (3000, 0.1, {"sigma_dp": 1.0}),
    ],
)
def test_find_disks__has_the_truth_within_one_and_two_error_bars(electrons, background, options):
    patterns, positions = grid_of_disks(np.random.default_rng(21), 24, electrons, background=background)
    z = np.abs(normalised_errors(patterns, positions, **options))
    # 432 values, 68 % and 95 %: 3 standard errors are 7 % and 3 %; a little caution is allowed for
    assert 0.61 < (z < 1).mean() < 0.80
    assert (z < 2).mean() > 0.92


@pytest.mark.parametrize("transform", ["none", "sqrt", "log"])
@pytest.mark.parametrize("texture", [0.4, 1.0])
def test_find_disks__widens_the_error_bar_of_uneven_disks(transform, texture):
    patterns, positions = grid_of_disks(np.random.default_rng(22), 24, 30_000, texture=texture)
    z = np.abs(normalised_errors(patterns, positions, transform=transform))
    assert 0.5 < (z < 1).mean() < 0.85
    assert (z < 2).mean() > 0.85


def test_find_disks__adds_the_rounding_to_whole_pixels():
    patterns, positions = grid_of_disks(np.random.default_rng(23), 8, 30_000)
    z = normalised_errors(patterns, positions, subpixel="pixel")
    assert np.sqrt(np.mean(z**2)) == pytest.approx(1, abs=0.15)


def sigma_of(patterns, at, kernel):
    """Error of one disk per pattern, at row and column `at`."""
    model, which = describe_disk(kernel, kernel), torch.arange(len(patterns))
    contrast = measure_contrast(disk_light(patterns, which, at, at, model), model)
    return position_sigma(contrast, which, len(patterns), model)


def test_position_sigma__of_a_plain_correlation_is_its_closed_form():
    kernel = make_kernel(disk((SIZE, SIZE), (64, 64)))
    electrons = 5000.0
    pattern = torch.from_numpy(disk((SIZE, SIZE), (64, 64)))[None].float()
    pattern *= electrons / pattern.sum()
    at = torch.tensor([64])
    sigma = sigma_of(pattern, at, kernel)
    expected = np.sqrt(np.sqrt(np.pi) * RADIUS * EDGE / electrons)
    # an even disk without noise has less variance than Poisson: no texture
    assert float(sigma) == pytest.approx(expected, rel=0.03)


def test_position_sigma__falls_with_the_square_root_of_the_dose():
    kernel = make_kernel(disk((SIZE, SIZE), (64, 64)))
    pattern = torch.from_numpy(disk((SIZE, SIZE), (64, 64))).float()
    patterns = torch.stack([pattern * 2, pattern * 200])
    at = torch.tensor([64, 64])
    sigma = sigma_of(patterns, at, kernel)
    assert float(sigma[0] / sigma[1]) == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize("transform", ["sqrt", "log"])
def test_response__equals_simulated_counts(transform):
    rng = np.random.default_rng(4)
    rate = np.array([0.02, 0.3, 2.0, 12.0, 40.0, 300.0])
    function = np.sqrt if transform == "sqrt" else np.log1p
    values = function(rng.poisson(rate, (400_000, len(rate))))
    mean, gain, variance = (v.numpy() for v in _response(torch.from_numpy(rate), transform))
    np.testing.assert_allclose(mean, values.mean(0), rtol=0.03)
    np.testing.assert_allclose(variance, values.var(0), rtol=0.05)
    step = 0.05 * rate
    above, below = (_response(torch.from_numpy(rate + s), transform)[0].numpy() for s in (step, -step))
    np.testing.assert_allclose(gain, (above - below) / (2 * step), rtol=0.02)

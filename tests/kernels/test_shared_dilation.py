"""The dilation that uneven disks give to all positions of a pattern: stated where it is, and only there."""

import numpy as np
import pytest
import torch
from scipy.special import erfc

from fcunet.kernels.correlation import find_disks, make_kernel
from fcunet.kernels.shared_dilation import DILATION_SCALES
from fcunet.kernels.strain import shared_dilation_left

RADIUS, EDGE, SIZE, CENTRE = 7.0, 0.7, 160, 80.0
OPTIONS = {"sigma_cc": 1.0, "min_relative_intensity": 0.02, "min_peak_spacing": 16.0, "edge_boundary": 12}
PROBE = 0.5 * erfc((np.hypot(*(np.indices((SIZE, SIZE)) - SIZE // 2)) - RADIUS) / (EDGE * np.sqrt(2)))


def crystal(n, electrons, contrast, *, lattice=28.0, seed=1):
    """Patterns (n, y, x) of 5 x 5 disks with a linear contrast along the outward direction, and positions."""
    rng = np.random.default_rng(seed)
    steps = lattice * (np.arange(5) - 2)
    sites = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    positions = CENTRE + sites + rng.uniform(-0.5, 0.5, (n, 1, 2))
    outward = sites / np.maximum(np.hypot(*sites.T), 1)[:, None]
    corner = np.floor(positions).astype(int) - 11  # (n, 25, 2) of a window around each disk
    steps = np.arange(24)
    y = (corner[..., :1] + steps - positions[..., :1])[..., :, None]  # (n, 25, 24, 1)
    x = (corner[..., 1:] + steps - positions[..., 1:])[..., None, :]
    disks = 0.5 * erfc((np.hypot(y, x) - RADIUS) / (EDGE * np.sqrt(2)))
    tilt = contrast / RADIUS * (outward[:, 0, None, None] * y + outward[:, 1, None, None] * x)
    light = electrons * rng.uniform(0.3, 1, (n, len(sites), 1, 1)) / (np.pi * RADIUS**2)
    disks = light * disks * (1 + tilt).clip(0.05)
    patterns = np.zeros((n, SIZE + 48, SIZE + 48))
    for i, j in np.ndindex(n, len(sites)):
        a, b = corner[i, j] + 24
        patterns[i, a : a + 24, b : b + 24] += disks[i, j]
    counts = rng.poisson(patterns[:, 24:-24, 24:-24])
    return torch.from_numpy(counts.astype(np.float32)), positions


def read(patterns, positions, **options):
    """Stated standard deviation, true dilation of the positions, and its error bar by `sigma` alone; (n,)."""
    peaks = find_disks(patterns, make_kernel(PROBE), **OPTIONS | options)
    found = torch.stack([peaks.qy, peaks.qx], -1).numpy()
    dilation, bar = [], []
    for spots, true, sigma in zip(found, positions, peaks.sigma.numpy(), strict=True):
        distance = np.linalg.norm(spots[:, None] - true, axis=-1)
        keep = np.nan_to_num(distance.min(1), nan=99) < 3
        at = true[distance[keep].argmin(1)]
        weight = 1 / sigma[keep, None] ** 2
        q = at - (weight * at).sum(0) / weight.sum()
        error = spots[keep] - at
        error = error - (weight * error).sum(0) / weight.sum()
        moment = (weight * q**2).sum()
        dilation.append((weight * q * error).sum() / moment)
        bar.append(moment**-0.5)
    return peaks.dilation_std.numpy(), np.array(dilation), np.array(bar), peaks.dilation.numpy()


def assert_next_to_nothing(stated, bar):
    """Of 64 patterns, whose error bars without it are given."""
    assert np.median(stated) < 0.1 * np.median(bar)
    # chance lets one pattern in ten state something; the spread in error bars falls by less than 5 % for all
    # that, of e_xx and e_yy (64 patterns: give or take 2 %), and less for the rest
    assert np.mean(1 / (1 + (stated / bar) ** 2)) > 0.95**2 - 0.04


@pytest.mark.parametrize("transform", ["none", "sqrt", "log"])
@pytest.mark.parametrize("electrons", [60, 2000, 200_000])
def test_even_disks__state_next_to_nothing(transform, electrons):
    stated, _, bar, signed = read(*crystal(64, electrons, 0.0), transform=transform)
    # with 60 electrons it cannot be seen that they are even: what is stated cancels against their like
    left = shared_dilation_left(stated, signed, (np.median(stated), np.median(signed)))
    assert_next_to_nothing(left, bar)
    if electrons > 60:
        assert_next_to_nothing(stated, bar)


@pytest.mark.parametrize("contrast", [0.0, -0.1, 0.05])
def test_few_electrons__state_what_crystals_usually_have(contrast):
    stated, _, bar, signed = read(*crystal(64, 60, contrast), transform="log")
    usual = DILATION_SCALES["log"][0] * 1.3e-3
    assert usual * 0.8 < np.median(stated) < usual * 1.3
    assert np.mean(signed < 0) > 0.8  # inwards: what 60 electrons seem to say otherwise is chance
    assert np.median(stated) < 2 * np.median(bar)


@pytest.mark.parametrize("transform", ["none", "sqrt", "log"])
@pytest.mark.parametrize("contrast", [-0.4, -0.2, 0.3])
def test_uneven_disks__state_the_dilation_they_make(transform, contrast):
    stated, dilation, bar, signed = read(*crystal(8, 200_000, contrast), transform=transform)
    assert np.all(np.sign(dilation) == np.sign(contrast))  # brighter inside: read too far in
    assert np.all(np.sign(signed) == np.sign(contrast))
    assert np.all(np.abs(signed) <= stated)
    assert np.all(np.abs(dilation) > 2 * bar)
    # a linear contrast is what the prediction is exact for, but for the logarithm's curvature
    ratio = stated / np.abs(dilation) / DILATION_SCALES[transform][0]
    assert 0.75 < ratio.mean() < 1.35
    assert ratio.std() < 0.1


def test_uneven_disks__state_it_at_low_dose_too():
    stated, dilation, _, signed = read(*crystal(24, 2000, -0.4), transform="log")
    assert np.all(signed <= 0)
    # each pattern tells it to a third or so; a bar holds two in three
    assert 0.5 < (np.abs(dilation) < stated).mean() <= 1
    assert np.median(stated) < 3 * np.median(np.abs(dilation))


def test_cut_disks__do_not_count():
    patterns, _ = crystal(4, 200_000, 0.0, lattice=37.0)  # the outer ones reach over the border
    peaks = find_disks(patterns, make_kernel(PROBE), **OPTIONS | {"edge_boundary": 1})
    assert (peaks.n_peaks > 9).all()
    assert float(peaks.dilation_std.max()) < 3e-4


def test_patterns_without_disks__state_nothing():
    patterns, _ = crystal(1, 2000, -0.4)
    lone = torch.zeros(SIZE, SIZE)
    lone[60:100, 60:100] = patterns[0, 60:100, 60:100]
    holed = patterns[0].clone()
    holed[3, 3] = torch.nan
    batch = torch.stack([torch.zeros(SIZE, SIZE), torch.full((SIZE, SIZE), 3.0), holed, patterns[0], lone])
    peaks = find_disks(batch, make_kernel(PROBE), **OPTIONS)
    assert peaks.dilation_std[:3].tolist() == [0, 0, 0]
    assert float(peaks.dilation_std[3]) > 0
    assert float(peaks.dilation[3]) < 0
    assert torch.isfinite(peaks.dilation_std).all()


def test_one_pattern__states_the_same_beside_others():
    patterns, _ = crystal(5, 2000, -0.3)
    together = find_disks(patterns, make_kernel(PROBE), **OPTIONS).dilation_std
    alone = torch.cat([find_disks(p[None], make_kernel(PROBE), **OPTIONS).dilation_std for p in patterns])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-7)

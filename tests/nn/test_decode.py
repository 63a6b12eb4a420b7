import math

import pytest
import torch

from fcunet.nn.decode import decode
from fcunet.nn.model import AMPLITUDE_UNIT_V, NetworkOutput


def make_maps(points, shape=(32, 32), *, volts=3.0, offset=(0.0, 0.0), sigma=0.1, stride=1, heights=None):
    """Gaussian blobs at `points` (y, x of map pixels), everything else constant."""
    y, x = (torch.arange(s, dtype=torch.float32) for s in shape)
    image = torch.zeros(1, *shape)
    for i, (py, px) in enumerate(points):
        height = 0.9 if heights is None else heights[i]
        blob = height * torch.exp(-((y[:, None] - py).square() + (x - px).square()) / (2 * 1.2**2))
        image[0] = torch.maximum(image[0], blob)
    return NetworkOutput(
        bragg_map=image,
        root_amplitude=torch.full_like(image, math.sqrt(volts / AMPLITUDE_UNIT_V)),
        offset=torch.tensor(offset)[None, :, None, None].expand(1, 2, *shape).clone(),
        log_sigma=torch.full_like(image, math.log(sigma)),
        stride=stride,
        frame=(shape[0] * stride, shape[1] * stride),
    )


def positions(peaks):
    return {
        (round(float(y), 3), round(float(x), 3))
        for y, x in zip(peaks.qy[0], peaks.qx[0], strict=True)
        if y == y
    }


def test_decode__finds_two_blobs_with_their_intensity():
    peaks = decode(make_maps([(10, 12), (22, 20)]))
    assert positions(peaks) == {(10, 12), (22, 20)}
    assert peaks.n_peaks.tolist() == [2]
    torch.testing.assert_close(peaks.intensity[0, :2], torch.full((2,), 3.0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(peaks.sigma[0, :2], torch.full((2,), 0.1), rtol=1e-6, atol=1e-6)
    assert bool(torch.isnan(peaks.qy[0, 2:]).all())


def test_decode__finds_nothing_in_an_empty_map():
    peaks = decode(make_maps([]))
    assert peaks.n_peaks.tolist() == [0]
    assert bool(torch.isnan(peaks.intensity).all())
    assert peaks.truncated.tolist() == [False]


def test_decode__adds_offset_and_map_geometry():
    peaks = decode(make_maps([(10, 12)], stride=2, offset=(0.25, -0.5)))
    assert positions(peaks) == {(2 * 10 + 0.5 + 0.25, 2 * 12 + 0.5 - 0.5)}


def test_decode__keeps_a_peak_on_the_border_of_the_frame():
    assert positions(decode(make_maps([(0, 5), (31, 31)]))) == {(0, 5), (31, 31)}


def test_decode__edge_boundary_drops_peaks_near_the_border():
    assert positions(decode(make_maps([(2, 15), (15, 15)]), edge_boundary=4)) == {(15, 15)}


def test_decode__spacing_drops_the_lower_of_two():
    maps = make_maps([(10, 10), (10, 15)], heights=[0.6, 0.8])
    assert positions(decode(maps, min_peak_spacing=7)) == {(10, 15)}
    assert len(positions(decode(maps, min_peak_spacing=3))) == 2


def test_decode__brightest_first_and_relative_criterion():
    maps = make_maps([(5, 5), (20, 20), (5, 20)])
    for (y, x), volts in zip([(5, 5), (20, 20), (5, 20)], (1.0, 9.0, 4.0), strict=True):
        maps.root_amplitude[0, y, x] = math.sqrt(volts / AMPLITUDE_UNIT_V)
    assert decode(maps).intensity[0, :3].tolist() == pytest.approx([9, 4, 1])
    assert decode(maps, min_relative_intensity=0.3).intensity[0, :3].tolist() == pytest.approx(
        [9, 4, math.nan], nan_ok=True
    )
    assert decode(maps, min_absolute_intensity=5).n_peaks.tolist() == [1]


def test_decode__says_when_slots_ran_out():
    peaks = decode(make_maps([(5, 5), (20, 20), (5, 20)], heights=[0.9, 0.8, 0.7]), max_num_peaks=2)
    assert peaks.qy.shape == (1, 2)
    assert peaks.truncated.tolist() == [True]
    assert positions(peaks) == {(5, 5), (20, 20)}

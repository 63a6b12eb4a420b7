import dataclasses
import json
import math

import pytest
import torch

from fcunet.kernels.peaks import Peaks
from fcunet.nn.decode import decode
from fcunet.nn.detect import detect, structure_factor_image
from fcunet.nn.disks import (
    CELLS,
    CURVE_COUNTS,
    CURVE_OCTAVES,
    HALF_WIDTH,
    DiskReader,
    cut_disks,
    in_groups,
    rotary_code,
    straighten,
)
from fcunet.nn.model import FCUNet, FCUNetConfig, brightness, disk_radius


def disks(positions, radius, shape=(96, 96), heights=None):
    """Soft-edged uniform disks; (n, H, W)."""
    y, x = (torch.arange(s, dtype=torch.float32) for s in shape)
    image = torch.zeros(1, *shape)
    for i, (py, px) in enumerate(positions):
        distance = torch.hypot(y[:, None] - py, x - px)
        image[0] += (1.0 if heights is None else heights[i]) * torch.sigmoid((radius - distance) * 3)
    return image


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = FCUNetConfig(reader_width=32, reader_layers=2, reader_heads=2, reader_channels=(4, 4, 8, 8))
    return FCUNet(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(1)
    reader = DiskReader(width=32, layers=2, heads=2, channels=(4, 4, 8, 8)).eval().requires_grad_(False)
    for parameter in reader.parameters():  # outputs of order one, so that differences show
        parameter.copy_(torch.randn_like(parameter) / math.sqrt(max(parameter.shape[-1], 8)))
    return reader


POSITIONS = [(48.0, 48.0), (48.0, 70.0), (26.0, 48.0), (70.0, 26.0)]


def as_slots(positions, slots=None):
    p = torch.full((1, slots or len(positions), 2), torch.nan)
    p[0, : len(positions)] = torch.tensor(positions).reshape(-1, 2)
    return p[..., 0], p[..., 1]


def read(reader, positions, *, slots=None, pattern=None, radius=6.0, optics=None):
    pattern = disks(POSITIONS, 6.0, heights=[1.0, 0.5, 0.3, 0.2]) if pattern is None else pattern
    probe = disks([(pattern.shape[-2] // 2, pattern.shape[-1] // 2)], radius, tuple(pattern.shape[-2:]))
    pattern = pattern / brightness(pattern)[:, None, None]
    return reader(pattern, probe, *as_slots(positions, slots), torch.tensor([radius]), optics)


def test_cut_disks__cells_hold_the_image_at_their_place():
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    cut = cut_disks(torch.stack((y, x))[None], *as_slots([(20.3, 24.6)]), torch.tensor([7.0]))
    steps = ((torch.arange(CELLS) + 0.5) / CELLS * 2 - 1) * HALF_WIDTH * 7.0
    torch.testing.assert_close(cut[0, 0, 0], (20.3 + steps)[:, None].expand(CELLS, CELLS), rtol=0, atol=1e-4)
    torch.testing.assert_close(cut[0, 0, 1], (24.6 + steps)[None].expand(CELLS, CELLS), rtol=0, atol=1e-4)


def test_cut_disks__a_disk_looks_the_same_at_twice_the_camera_length():
    small = cut_disks(disks([(40.0, 41.0)], 6.0)[:, None], *as_slots([(40.0, 41.0)]), torch.tensor([6.0]))
    y, x = (torch.arange(192.0) for _ in range(2))
    distance = torch.hypot(y[:, None] - 80.0, x - 82.0)
    image = torch.sigmoid((12.0 - distance) * 1.5)[None, None]
    large = cut_disks(image, *as_slots([(80.0, 82.0)]), torch.tensor([12.0]))
    assert float((small - large).abs().max()) < 0.06  # half a pixel of the smaller one at the edge


def test_cut_disks__is_zero_outside_the_frame_and_in_empty_slots():
    cut = cut_disks(torch.ones(1, 1, 40, 40), *as_slots([(0.0, 20.0)], slots=2), torch.tensor([6.0]))
    assert float(cut[0, 0, 0, : CELLS // 2 - 1].abs().max()) == 0
    assert float(cut[0, 0, 0, CELLS // 2 + 1 :].min()) == 1
    assert float(cut[0, 1].abs().max()) == 0


def test_disk_reader__empty_slots_change_nothing(reader):
    few, many = read(reader, POSITIONS), read(reader, POSITIONS, slots=9)
    for a, b in zip(few, many, strict=True):
        torch.testing.assert_close(a, b[:, :4] if b.ndim > 1 else b, rtol=1e-5, atol=1e-6)


def test_disk_reader__the_order_of_disks_does_not_matter(reader):
    a, b = read(reader, POSITIONS), read(reader, POSITIONS[::-1])
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other.flip(1) if other.ndim > 1 else other, rtol=1e-4, atol=1e-5)


def test_disk_reader__a_shifted_pattern_reads_the_same(reader):
    pattern = disks(POSITIONS, 6.0, heights=[1.0, 0.5, 0.3, 0.2])
    a = read(reader, POSITIONS)
    moved = [(y + 5, x - 7) for y, x in POSITIONS]
    b = read(reader, moved, pattern=torch.roll(pattern, (5, -7), dims=(1, 2)))
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_disk_reader__a_disk_is_read_in_the_light_of_the_others(reader):
    alone, together = read(reader, POSITIONS[:1]), read(reader, POSITIONS)
    assert abs(float(alone.root_amplitude[0, 0] - together.root_amplitude[0, 0])) > 1e-3


def test_disk_reader__optics_matter_and_may_be_unknown(reader):
    unknown = read(reader, POSITIONS, optics=torch.tensor([[torch.nan, torch.nan]]))
    known = read(reader, POSITIONS, optics=torch.tensor([[200.0, 0.1]]))
    torch.testing.assert_close(unknown.root_amplitude, read(reader, POSITIONS).root_amplitude)
    assert float((known.root_amplitude - unknown.root_amplitude).abs().max()) > 1e-3


def test_disk_reader__no_disks_no_garbage(reader):
    out = reader(
        torch.zeros(1, 64, 64), disks([(32, 32)], 5.0, (64, 64)), *as_slots([], 3), torch.tensor([5.0])
    )
    assert all(bool(torch.isfinite(v).all()) for v in out)


def test_disk_attention__without_empty_slots_gives_the_same(reader):
    generator = torch.Generator().manual_seed(4)
    present = torch.zeros(3, 9, dtype=torch.bool)
    present[0, :5] = present[2, 3:] = True  # one pattern is empty
    t = torch.randn(int(present.sum()), 32, generator=generator)
    code = rotary_code(*torch.randn(2, 3, 9, generator=generator), 16)
    block = reader.blocks[0]
    with torch.enable_grad():
        expected = block(t, code, present)
    with torch.no_grad():
        torch.testing.assert_close(block(t, code, present), expected, rtol=1e-5, atol=1e-5)


def test_in_groups__gives_what_the_function_gives():
    layer = torch.nn.Linear(5, 3).requires_grad_(False)
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(in_groups(layer, rows), layer(rows))


def test_detect__companions_in_a_batch_do_not_change_a_result(network):
    generator = torch.Generator().manual_seed(3)
    probe = disks([(48, 48)], 6.0)[0]
    one = torch.poisson(200 * disks(POSITIONS, 6.0), generator=generator)
    others = torch.poisson(200 * disks([(30, 30), (60, 61)], 6.0).expand(3, -1, -1), generator=generator)
    with torch.no_grad():
        a = detect(network, torch.cat((one, others)), probe, threshold=0.005)
        b = detect(network, torch.cat((others, one)), probe, threshold=0.005)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x[0].nan_to_num(), y[3].nan_to_num())


def test_detect__without_a_second_stage_is_decode():
    torch.manual_seed(0)
    plain = FCUNet(FCUNetConfig()).eval().requires_grad_(False)
    x, probe = 200 * disks(POSITIONS, 6.0), disks([(48, 48)], 6.0)[0]
    with torch.no_grad():
        expected = decode(plain(x, probe), threshold=0.01)
        found = detect(plain, x, probe, threshold=0.01)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_read_disks__works_on_binned_frames_in_detector_pixels(network):
    """A frame at three times the scale is binned by three; its offsets come back three times as large."""
    small, probe = disks(POSITIONS, 6.0), disks([(48, 48)], 6.0)[0]
    large = small.repeat_interleave(3, 1).repeat_interleave(3, 2)
    large_probe = torch.roll(
        probe.repeat_interleave(3, 0).repeat_interleave(3, 1), (-1, -1), dims=(0, 1)
    )  # centred at 144
    y, x = as_slots(POSITIONS)
    a = network.read_disks(small, probe, y, x)
    b = network.read_disks(large, large_probe, 3 * y + 1, 3 * x + 1, binning=3)
    torch.testing.assert_close(b.offset, 3 * a.offset, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.log_sigma, a.log_sigma + math.log(3), rtol=1e-4, atol=1e-4)


def test_straighten__has_its_factors_where_it_says():
    few, many = (0.5, 0.7, 0.9, 1.0, 1.1, 1.2), (0.5, 0.7, 0.9, 1.0, 1.1, 4.8)
    octaves = torch.tensor([*CURVE_OCTAVES, -20.0, 2.0, -8.0]).expand(5, -1)
    counts = torch.tensor([3, CURVE_COUNTS[0], CURVE_COUNTS[1], 500, 27.713])
    factors = (straighten(octaves * math.log(2), counts, (few, many)) - octaves * math.log(2)).exp()
    for row, last in zip(factors, (1.2, 1.2, 4.8, 4.8, 2.4), strict=True):
        expected = torch.tensor([*few[:5], last, 0.5, last, math.sqrt(0.5 * 0.7)])
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=0)
    assert straighten(octaves, counts, ()) is octaves
    assert straighten(torch.full((1, 1), torch.nan), counts[:1], (few, many)).isnan().all()


def test_read_disks__straightens_its_sigma_in_radii(network):
    config = dataclasses.replace(network.config, sigma_curve=((1.0, 1.0, 1.0, 1.0, 2.0, 3.0),) * 2)
    straight = FCUNet(config).eval().requires_grad_(False)
    straight.load_state_dict(network.state_dict())
    assert FCUNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    x, probe = disks(POSITIONS, 6.0), disks([(48, 48)], 6.0)[0]
    y = as_slots(POSITIONS, 6)
    before, after = (n.read_disks(x, probe, *y) for n in (network, straight))
    radius = disk_radius(probe[None])[0]
    expected = straighten(before.log_sigma - radius.log(), torch.tensor([4]), config.sigma_curve)
    torch.testing.assert_close(after.log_sigma, expected + radius.log())
    assert float((after.log_sigma - before.log_sigma)[:, :4].min()) > 0.1
    torch.testing.assert_close(after.offset, before.offset)


def test_structure_factor_image__spots_have_their_height_and_place():
    nan = torch.nan
    peaks = Peaks(
        qy=torch.tensor([[20.3, 40.0], [nan, nan]]),
        qx=torch.tensor([[30.0, 10.6], [nan, nan]]),
        intensity=torch.tensor([[5.0, 2.0], [nan, nan]]),
        sigma=torch.full((2, 2), 0.1),
        n_peaks=torch.tensor([2, 0]),
        truncated=torch.zeros(2, dtype=torch.bool),
        dilation_std=torch.zeros(2),
        dilation=torch.zeros(2),
    )
    image = structure_factor_image(peaks, (64, 48))
    assert image.shape == (2, 64, 48)
    assert float(image[1].abs().max()) == 0
    upper = image[0, :30]
    y = torch.arange(30.0)[:, None]
    assert float((upper * y).sum() / upper.sum()) == pytest.approx(20.3, abs=1e-4)
    assert float(image[0, 40].max()) == pytest.approx(2.0 * math.exp(-0.5 * (0.4 / 1.2) ** 2), rel=1e-4)

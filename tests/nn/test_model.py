import dataclasses

import pytest
import torch

from fcunet.nn.model import FCUNet, FCUNetConfig, bin_frame, brightness, disk_radius, roll_to_origin

SMALL = FCUNetConfig(widths=(8, 8, 8, 8), attention_layers=1, attention_heads=2, n_radial=6)


def disks(shape, centres, radius=4.0):
    y, x = (torch.arange(s, dtype=torch.float32) for s in shape)
    image = torch.zeros(shape)
    for cy, cx in centres:
        image += (radius + 0.5 - torch.hypot(y[:, None] - cy, x - cx)).clamp(0, 1)
    return image


def probe(shape, radius=4.0):
    return disks(shape, [(shape[0] // 2, shape[1] // 2)], radius)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = FCUNet(SMALL)
    net.train()
    for _ in range(3):  # batch statistics that are not those of the start
        net(torch.rand(4, 64, 64) * 50, probe((64, 64)))
    return net.eval().requires_grad_(False)


def patterns(n, shape, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 100


@pytest.mark.parametrize("shape", [(64, 64), (65, 47), (33, 128), (17, 16)])
def test_model__takes_any_size(model, shape):
    out = model(patterns(2, shape), probe(shape))
    height, width = (-(-s // 16) * 8 for s in shape)
    assert out.bragg_map.shape == out.log_sigma.shape == out.root_amplitude.shape == (2, height, width)
    assert out.offset.shape == (2, 2, height, width)
    assert (out.stride, out.frame) == (2, shape)


def assert_same(a, b, tolerance):
    for name in ("bragg_map", "offset", "log_sigma", "root_amplitude"):
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance, msg=name
        )


def test_model__does_not_see_the_intensity_scale_of_pattern_or_probe(model):
    x, p = patterns(2, (64, 64)), probe((64, 64))
    assert_same(model(x, p), model(x * 1e-6, p * 300), 1e-3)


def test_model__does_not_see_the_rest_of_the_batch(model):
    x, p = patterns(5, (64, 64)), probe((64, 64))
    whole = model(x, p)
    single = model(x[3:4], p.expand(1, 64, 64))
    assert_same(
        single, whole._replace(**{k: v[3:4] for k, v in whole._asdict().items() if torch.is_tensor(v)}), 1e-4
    )


def test_model__moves_with_the_pattern(model):
    shape = (128, 128)
    x = disks(shape, [(60, 60), (60, 76), (76, 60)])[None] * 40
    a, b = model(x, probe(shape)).bragg_map, model(torch.roll(x, (16, 32), (1, 2)), probe(shape)).bragg_map
    torch.testing.assert_close(
        torch.roll(a, (8, 16), (1, 2))[:, 24:48, 36:56], b[:, 24:48, 36:56], rtol=0, atol=1e-3
    )


def test_model__bins_frames_with_large_disks(model):
    shape = (128, 128)
    out = model(disks(shape, [(64, 64)], 20.0)[None], probe(shape, 20.0))
    assert out.stride == 4
    assert out.bragg_map.shape == (1, 32, 32)


def test_model__refuses_probes_that_need_different_binning(model):
    probes = torch.stack((probe((64, 64), 4.0), probe((64, 64), 20.0)))
    with pytest.raises(ValueError, match="separate batches"):
        model(patterns(2, (64, 64)), probes)


def test_model__refuses_an_empty_probe(model):
    with pytest.raises(ValueError, match="probe is empty"):
        model(patterns(1, (32, 32)), torch.zeros(32, 32))


def test_model__refuses_a_probe_of_another_size(model):
    with pytest.raises(ValueError, match=r"64, 64\).*\(32, 32\)"):
        model(patterns(1, (64, 64)), probe((32, 32)))


def test_model__finds_nothing_in_an_empty_pattern(model):
    out = model(torch.zeros(1, 64, 64), probe((64, 64)))
    assert float(out.bragg_map.max()) == 0
    assert all(bool(torch.isfinite(t).all()) for t in out if torch.is_tensor(t))


def test_model__fused_gives_the_same_maps(model):
    fused = FCUNet(SMALL)
    fused.load_state_dict(model.state_dict())
    x, p = patterns(2, (64, 64)), probe((64, 64))
    assert_same(fused.eval().fuse()(x, p), model(x, p), 1e-4)


def test_model__calibrates_its_position_errors(model):
    calibrated = FCUNet(dataclasses.replace(SMALL, sigma_scale=2.0, sigma_floor_px=0.1)).eval()
    calibrated.load_state_dict(model.state_dict())
    x, p = patterns(1, (64, 64)), probe((64, 64))
    expected = torch.hypot(2 * model(x, p).log_sigma.exp(), torch.tensor(0.1))
    torch.testing.assert_close(calibrated(x, p).log_sigma.exp(), expected, rtol=1e-4, atol=1e-6)


def test_model__default_size_is_as_documented():
    assert 0.5e6 < sum(p.numel() for p in FCUNet().parameters()) < 0.8e6


def test_config__names_the_nearest_known_key():
    with pytest.raises(ValueError, match="did you mean 'widths'"):
        FCUNetConfig.from_dict({"width": [8, 8, 8, 8]})


def test_config__survives_json_types():
    assert (
        FCUNetConfig.from_dict(
            {k: list(v) if isinstance(v, tuple) else v for k, v in SMALL.to_dict().items()}
        )
        == SMALL
    )


def test_disk_radius__of_a_disk():
    assert float(disk_radius(probe((64, 64), 7.0)[None])) == pytest.approx(
        7.2, rel=0.01
    )  # half a pixel of soft edge


def test_brightness__is_the_level_of_the_disk():
    image = 50 * disks((64, 64), [(30, 30), (40, 20)], 6.0)[None]
    assert float(brightness(image)) == pytest.approx(50, rel=0.2)


@pytest.mark.parametrize("size", [31, 32])
@pytest.mark.parametrize("binning", [2, 3])
def test_bin_frame__leaves_a_wrapped_probe_centred(size, binning):
    wrapped = roll_to_origin(probe((size, size), 7.0)[None])
    binned = bin_frame(wrapped, binning, wrapped=True)[0]
    k = torch.fft.fftfreq(len(binned), 1 / len(binned))
    assert float((binned.sum(1) * k).sum() / binned.sum()) == pytest.approx(0, abs=1e-4)
    assert float(binned.sum()) == pytest.approx(float(wrapped.sum()), rel=1e-6)

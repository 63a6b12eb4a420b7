"""Disk detection: against a naive float64 version, known positions, peers' cases, and doubtful input."""

import numpy as np
import pytest
import torch
from naive_disks import naive_disks
from scipy.special import erfc

from fcunet.kernels import correlation
from fcunet.kernels.correlation import centre_probe, disk_radius, find_disks, make_kernel

OPTIONS = {
    "corr_power": 1.0,
    "sigma_cc": 2.0,
    "sigma_dp": 0.0,
    "transform": "none",
    "subpixel": "upsampled",
    "upsample_factor": 16,
    "min_absolute_intensity": 0.0,
    "min_relative_intensity": 0.01,
    "relative_to_peak": 0,
    "min_peak_spacing": 8.0,
    "edge_boundary": 10,
    "max_num_peaks": 40,
}


def disk(shape, centre, radius, edge=0.7):
    y, x = np.indices(shape, sparse=True)
    return 0.5 * erfc((np.hypot(y - centre[0], x - centre[1]) - radius) / (edge * np.sqrt(2)))


def pattern_of(shape, radius, *spots, edge=0.7):
    """Sum of disks (y, x, height)."""
    return sum(height * disk(shape, (y, x), radius, edge) for y, x, height in spots)


def peaks_of(pattern, kernel, **options):
    """Peaks of one pattern as rows (y, x, intensity)."""
    found = find_disks(torch.as_tensor(np.asarray(pattern))[None], kernel, **OPTIONS | options)
    n = int(found.n_peaks[0])
    return torch.stack([found.qy, found.qx, found.intensity], -1)[0, :n].numpy()


def fourier_shift(image, dy, dx):
    fy, fx = np.fft.fftfreq(image.shape[0])[:, None], np.fft.fftfreq(image.shape[1])
    return np.fft.ifft2(np.fft.fft2(image) * np.exp(-2j * np.pi * (fy * dy + fx * dx))).real


@pytest.fixture(scope="module")
def noisy_pattern():
    rng = np.random.default_rng(3)
    sites = [(48 + 15.3 * i + 2.2 * j, 51 - 1.7 * i + 14.1 * j) for i in range(-2, 3) for j in range(-2, 3)]
    spots = [(y, x, 40 * rng.uniform(0.1, 1)) for y, x in sites]
    return rng.poisson(0.3 + pattern_of((96, 103), 5.0, *spots)).astype(np.float32)


@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        ("flat", {}),
        ("flat", {"subpixel": "pixel", "sigma_cc": 0.0}),
        ("flat", {"subpixel": "parabola", "sigma_cc": 1.3}),
        ("flat", {"upsample_factor": 5, "transform": "sqrt"}),
        ("flat", {"transform": "log", "relative_to_peak": 3, "min_relative_intensity": 0.4}),
        ("flat", {"sigma_dp": 1.5, "subpixel": "parabola"}),
        ("flat", {"corr_power": 0.8, "min_absolute_intensity": 2.0}),
        ("sigmoid", {"max_num_peaks": 7}),
        ("sigmoid", {"corr_power": 0.9, "subpixel": "parabola"}),
        ("gaussian", {"sigma_cc": 1.0}),
    ],
)
def test_find_disks__equals_the_naive_version(noisy_pattern, kernel, changes):
    weights = make_kernel(disk(noisy_pattern.shape, (48.3, 51.6), 5.0), kernel=kernel)
    options = OPTIONS | changes
    found = peaks_of(noisy_pattern, weights, **changes)
    expected = naive_disks(noisy_pattern, weights.double().numpy(), **options)
    assert len(found) == len(expected) > 5
    np.testing.assert_allclose(found[:, 2], expected[:, 2], rtol=1e-4)
    # parabola: rounding of float32; upsampling: interpolation of the noise from 17 pixels
    np.testing.assert_allclose(
        found[:, :2], expected[:, :2], atol=5e-4 if options["subpixel"] != "upsampled" else 0.05
    )


@pytest.mark.parametrize("shape", [(64, 64), (61, 67), (57, 60), (63, 72)])
@pytest.mark.parametrize("factor", [10, 25])
def test_find_disks__follows_a_shifted_binary_disk_in_odd_and_even_frames(shape, factor):
    centre = np.array(shape) // 2
    y, x = np.indices(shape)
    still = (np.hypot(y - centre[0], x - centre[1]) < 13).astype(float)
    kernel = make_kernel(still)
    for shift in [(0.0, 0.0), (-3.7, 4.2), (6.7, 8.1), (0.2, 9.7)]:
        moved = fourier_shift(still, *shift)
        options = {"upsample_factor": factor, "edge_boundary": 5, "min_relative_intensity": 0.5}
        found = peaks_of(moved, kernel, **options)
        np.testing.assert_allclose(found[0, :2] - centre, shift, atol=1 / factor)


def test_find_disks__locates_every_disk_of_an_oblique_lattice():
    rng = np.random.default_rng(11)
    zero, a, b = rng.uniform(63, 65, 2), rng.uniform(-1, 1, 2) + (34.3, 0), rng.uniform(-1, 1, 2) + (0, 42.19)
    sites = np.array([zero + i * a + j * b for i in range(-2, 3) for j in range(-2, 3)])
    sites = sites[((sites > 10) & (sites < 117)).all(1)]
    spots = [(*site, height) for site, height in zip(sites, rng.uniform(4, 20, len(sites)), strict=True)]
    pattern = pattern_of((128, 128), 8.0, *spots)
    for kernel in ("flat", "gaussian", "sigmoid"):
        weights = make_kernel(disk((128, 128), (64, 64), 8.0), kernel=kernel, radii=(4, 16))
        found = peaks_of(pattern, weights, min_peak_spacing=20, min_relative_intensity=0.02)
        assert len(found) == len(sites)
        distance = np.linalg.norm(found[:, None, :2] - sites, axis=2).min(1)
        assert distance.max() < 0.1


@pytest.mark.parametrize("subpixel", ["parabola", "upsampled"])
def test_find_disks__keeps_rows_and_columns_and_signs_apart(subpixel):
    shape, options = (80, 120), {"subpixel": subpixel, "min_relative_intensity": 0.5}
    kernel = make_kernel(disk(shape, (40, 60), 4.0))
    start = peaks_of(disk(shape, (30, 90), 4.0), kernel, **options)[0, :2]
    np.testing.assert_allclose(start, (30, 90), atol=1e-3)
    for shift in [(0, 3), (2, 0), (4, 0), (-4, 0), (0, -0.4)]:
        moved = peaks_of(disk(shape, (30 + shift[0], 90 + shift[1]), 4.0), kernel, **options)[0, :2]
        np.testing.assert_allclose(moved - start, shift, atol=0.02)


@pytest.mark.parametrize("changes", [{"corr_power": 0.5}, {"transform": "log"}])
def test_find_disks__reaches_over_three_decades_of_brightness(changes):
    rng = np.random.default_rng(0)
    spots = [(32, 32, 1000), (32, 44, 60), (20, 32, 12), (44, 20, 4)]
    y, x = np.indices((64, 64))
    halo = 30 * np.exp(-((y - 32) ** 2 + (x - 32) ** 2) / (2 * 25**2))
    pattern = pattern_of((64, 64), 3.0, *spots) + halo + rng.normal(0, 0.5, (64, 64))
    kernel = make_kernel(disk((64, 64), (32, 32), 3.0), kernel="sigmoid", radii=(0, 9))
    options = {"sigma_cc": 1.0, "edge_boundary": 4, "min_relative_intensity": 1e-3} | changes
    found = peaks_of(pattern, kernel, **options)
    for row, column, _ in spots:
        assert np.linalg.norm(found[:, :2] - (row, column), axis=1).min() < 1.5
    plain = peaks_of(pattern, make_kernel(disk((64, 64), (32, 32), 3.0)), sigma_cc=1.0, edge_boundary=4)
    assert np.linalg.norm(plain[:, :2] - (44, 20), axis=1).min() > 1.5


@pytest.mark.parametrize("changes", [{}, {"corr_power": 0.7, "transform": "sqrt"}, {"subpixel": "parabola"}])
def test_find_disks__does_not_depend_on_the_batch(noisy_pattern, monkeypatch, changes):
    rng = np.random.default_rng(5)
    patterns = torch.from_numpy(
        rng.poisson(noisy_pattern + 0.1, (7, *noisy_pattern.shape)).astype(np.float32)
    )
    kernel = make_kernel(disk(noisy_pattern.shape, (48, 51), 5.0))
    together = find_disks(patterns, kernel, **OPTIONS | changes)
    singles = [find_disks(p[None], kernel, **OPTIONS | changes) for p in patterns]
    monkeypatch.setattr(correlation, "_CPU_PIXELS", 3 * noisy_pattern.size)
    in_threes = find_disks(patterns, kernel, **OPTIONS | changes)
    for name in together._fields:
        whole = getattr(together, name)
        assert torch.equal(torch.nan_to_num(whole), torch.nan_to_num(getattr(in_threes, name)))
        one_by_one = torch.cat([getattr(s, name) for s in singles])
        torch.testing.assert_close(whole, one_by_one, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_find_disks__returns_nothing_for_patterns_without_a_disk(noisy_pattern):
    patterns = torch.from_numpy(np.stack([noisy_pattern] * 5))
    patterns[1] = 0
    patterns[2] = 7
    patterns[3, 40, 40] = torch.nan
    patterns[4, 40, 40] = torch.inf
    kernel = make_kernel(disk(noisy_pattern.shape, (48, 51), 5.0))
    for transform in ("none", "sqrt", "log"):
        found = find_disks(patterns, kernel, **OPTIONS | {"transform": transform})
        assert found.n_peaks[0] > 5
        assert found.n_peaks[1:].tolist() == [0, 0, 0, 0]
        assert torch.isnan(found.qy[1:]).all()
        assert torch.isnan(found.sigma[1:]).all()
        assert not found.truncated[1:].any()


def test_find_disks__pads_with_nan_and_sorts_by_intensity(noisy_pattern):
    kernel = make_kernel(disk(noisy_pattern.shape, (48, 51), 5.0))
    found = find_disks(torch.from_numpy(noisy_pattern)[None], kernel, **OPTIONS)
    n = int(found.n_peaks[0])
    assert 0 < n < 40
    for values in (found.qy, found.qx, found.intensity, found.sigma):
        assert values.shape == (1, 40)
        assert values.dtype == torch.float32
        assert torch.isfinite(values[0, :n]).all()
        assert torch.isnan(values[0, n:]).all()
    assert (found.intensity[0, : n - 1] >= found.intensity[0, 1:n]).all()
    assert (found.sigma[0, :n] > 0).all()


def test_find_disks__says_when_slots_run_out(noisy_pattern):
    kernel = make_kernel(disk(noisy_pattern.shape, (48, 51), 5.0))
    pattern = torch.from_numpy(noisy_pattern)[None]
    all_of_them = int(find_disks(pattern, kernel, **OPTIONS).n_peaks)
    exact = find_disks(pattern, kernel, **OPTIONS | {"max_num_peaks": all_of_them})
    short = find_disks(pattern, kernel, **OPTIONS | {"max_num_peaks": all_of_them - 1})
    assert not exact.truncated.item()
    assert short.truncated.item()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.float64])
def test_find_disks__takes_counts_of_any_type(noisy_pattern, dtype):
    kernel = make_kernel(disk(noisy_pattern.shape, (48, 51), 5.0))
    pattern = torch.from_numpy(noisy_pattern)[None]
    expected = find_disks(pattern, kernel, **OPTIONS)
    found = find_disks(pattern.to(dtype), kernel, **OPTIONS)
    assert torch.equal(torch.nan_to_num(found.qy), torch.nan_to_num(expected.qy))


def test_find_disks__takes_no_patterns():
    found = find_disks(torch.zeros(0, 32, 32), make_kernel(disk((32, 32), (16, 16), 4.0)), **OPTIONS)
    assert found.qy.shape == (0, 40)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"corr_power": 0.8}, {"transform": "log", "subpixel": "parabola"}])
def test_find_disks__gives_the_same_on_a_gpu(noisy_pattern, changes):
    kernel = make_kernel(disk(noisy_pattern.shape, (48, 51), 5.0))
    patterns = torch.from_numpy(np.stack([noisy_pattern, noisy_pattern[::-1].copy()]))
    expected = find_disks(patterns, kernel, **OPTIONS | changes)
    found = find_disks(patterns.cuda(), kernel, **OPTIONS | changes)
    for name in found._fields:
        torch.testing.assert_close(
            getattr(found, name).cpu(), getattr(expected, name), rtol=1e-3, atol=1e-3, equal_nan=True
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corr_power": 1.5}, "corr_power is 1.5"),
        ({"transform": "log10"}, "choose none, sqrt, log"),
        ({"subpixel": "poly"}, "choose pixel, parabola or upsampled"),
        ({"upsample_factor": 2}, "at least 3"),
        ({"max_num_peaks": 0}, "at least 1"),
    ],
)
def test_find_disks__names_a_wrong_option(changes, message):
    kernel = make_kernel(disk((32, 32), (16, 16), 4.0))
    with pytest.raises(ValueError, match=message):
        find_disks(torch.rand(1, 32, 32), kernel, **OPTIONS | changes)


def test_find_disks__refuses_shapes_that_do_not_fit():
    kernel = make_kernel(disk((32, 32), (16, 16), 4.0))
    with pytest.raises(ValueError, match=r"pattern\[None\]"):
        find_disks(torch.rand(32, 32), kernel)
    with pytest.raises(ValueError, match="same detector"):
        find_disks(torch.rand(1, 32, 33), kernel)
    with pytest.raises(ValueError, match="all zero"):
        find_disks(torch.rand(1, 32, 32), torch.zeros(32, 32))


@pytest.mark.parametrize("shape", [(64, 64), (61, 67)])
def test_centre_probe__moves_the_disk_to_the_middle_with_unit_sum(shape):
    centred = centre_probe(500 * disk(shape, (20.3, 40.8), 9.0) + 0.5)
    assert centred.dtype == torch.float32
    assert float(centred.sum()) == pytest.approx(1, abs=1e-5)
    bright = np.where(centred > centred.max() / 2, centred, 0)
    y, x = np.indices(shape)
    middle = (y * bright).sum() / bright.sum(), (x * bright).sum() / bright.sum()
    np.testing.assert_allclose(middle, (shape[0] // 2, shape[1] // 2), atol=0.02)


@pytest.mark.parametrize("make", [centre_probe, make_kernel])
def test_probe__empty_or_unusable_is_refused(make):
    with pytest.raises(ValueError, match="empty"):
        make(np.zeros((16, 16)))
    with pytest.raises(ValueError, match="NaN"):
        make(np.full((16, 16), np.nan))
    with pytest.raises(ValueError, match=r"probe.mean\(0\)"):
        make(np.ones((3, 16, 16)))


@pytest.mark.parametrize(("kernel", "total"), [("flat", 1.0), ("gaussian", 0.0), ("sigmoid", 0.0)])
def test_make_kernel__has_its_sum_and_its_centre_in_the_corner(kernel, total):
    weights = make_kernel(disk((61, 64), (24.4, 30.7), 6.0), kernel=kernel)
    assert float(weights.sum()) == pytest.approx(total, abs=1e-5)
    mirrored = torch.roll(weights.flip(0, 1), (1, 1), (0, 1))
    torch.testing.assert_close(weights, mirrored, atol=2e-4, rtol=0)
    assert weights[0, 0] > 0.8 * weights.max()


def test_make_kernel__subtracts_a_cosine_ramp_between_the_radii():
    probe = disk((64, 64), (32, 32), 6.0)
    weights = make_kernel(probe, kernel="sigmoid", radii=(8, 16))
    ring = weights - make_kernel(probe)
    assert float(ring[0, 16]) == pytest.approx(0, abs=1e-9)
    assert float(ring[0, 12] / ring[0, 8]) == pytest.approx(0.5, abs=1e-3)
    torch.testing.assert_close(ring[0, 3], ring[0, 8])


def test_make_kernel__refuses_unknown_names_and_radii_out_of_order():
    probe = disk((32, 32), (16, 16), 4.0)
    with pytest.raises(ValueError, match="flat, gaussian or sigmoid"):
        make_kernel(probe, kernel="edge")
    with pytest.raises(ValueError, match="inner one first"):
        make_kernel(probe, kernel="sigmoid", radii=(9, 4))


def test_disk_radius__of_a_dim_off_centre_disk_on_a_background():
    image = 0.1 + 3 * disk((64, 64), (20, 25), 7.0)
    assert disk_radius(torch.from_numpy(image)) == pytest.approx(7, abs=0.15)

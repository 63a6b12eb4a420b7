"""Sub-pixel positions against formulas that are known exactly, and against the Fourier sum over the frame."""

import numpy as np
import pytest
import torch
from naive_disks import fourier_upsample

from fcunet.kernels.subpixel import crops, interpolation_weights, oversample, parabola, upsample


def band_limited_noise(rng, shape, width):
    """Smooth periodic noise (float64) with a Gaussian spectrum, and its power along rows and columns."""
    fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])
    transfer = np.exp(-(fy**2 + fx**2) / (2 * width**2))
    image = np.fft.ifft2(np.fft.fft2(rng.normal(size=shape)) * transfer).real
    power = transfer**2
    return image, torch.from_numpy(power.mean(1)), torch.from_numpy(power.mean(0))


def test_parabola__is_exact_for_a_paraboloid():
    y, x = np.mgrid[-1:2, -1:2]
    patch = torch.tensor(10 - 2 * (y - 0.3) ** 2 - 0.5 * (x + 0.45) ** 2)[None]
    dy, dx, _ = parabola(patch)
    torch.testing.assert_close(dy, torch.tensor([0.3], dtype=torch.float64))
    torch.testing.assert_close(dx, torch.tensor([-0.45], dtype=torch.float64))


def test_parabola__reads_the_height_bilinearly():
    patch = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 4.0, 2.0], [0.0, 3.0, 1.0]]])
    dy, dx, height = parabola(patch)
    fy, fx = float(dy), float(dx)
    expected = (1 - fy) * ((1 - fx) * 4 + fx * 2) + fy * ((1 - fx) * 3 + fx * 1)
    assert float(height) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(64, 64), (61, 67), (72, 57)])
@pytest.mark.parametrize("factor", [3, 10, 16, 25])
def test_upsample__equals_the_fourier_sum(shape, factor):
    rng = np.random.default_rng(7)
    image, rows, columns = band_limited_noise(rng, shape, 0.1)
    neighbours = [np.roll(image, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    y, x = np.nonzero(image >= np.max(neighbours, axis=0))
    y, x = y[:40], x[:40]
    start = rng.uniform(-0.5, 0.5, (2, len(y)))
    weights = interpolation_weights(rows, factor), interpolation_weights(columns, factor)
    dy, dx = upsample(
        torch.from_numpy(image)[None],
        torch.zeros(len(y), dtype=torch.int64),
        torch.from_numpy(y),
        torch.from_numpy(x),
        torch.from_numpy(start[0]),
        torch.from_numpy(start[1]),
        weights=weights,
        factor=factor,
    )
    spectrum = np.fft.fft2(image)
    starts = np.stack([y, x], 1) + start.T
    expected = np.array([fourier_upsample(spectrum, s, factor) for s in starts])
    found = np.stack([y + dy.numpy(), x + dx.numpy()], 1)
    np.testing.assert_allclose(found, expected, atol=0.003)


def test_interpolation_weights__leave_a_pixel_unchanged():
    weights = interpolation_weights(torch.ones(64), 16)
    middle = weights[len(weights) // 2]
    torch.testing.assert_close(middle, torch.eye(17)[8])


def test_interpolation_weights__refuse_a_factor_of_two():
    with pytest.raises(ValueError, match="at least 3"):
        interpolation_weights(torch.ones(64), 2)


def test_crops__continue_on_the_other_side_of_the_frame():
    image = torch.arange(2 * 5 * 6, dtype=torch.float32).view(2, 5, 6)
    which, y, x = torch.tensor([0, 1]), torch.tensor([0, 4]), torch.tensor([0, 3])
    cut = crops(image, which, y, x, 3)
    for i in range(2):
        expected = torch.roll(image[which[i]], (1 - int(y[i]), 1 - int(x[i])), (0, 1))[:3, :3]
        assert torch.equal(cut[i], expected)


@pytest.mark.parametrize("shape", [(16, 18), (15, 16), (18, 15), (13, 17)])
def test_oversample__adds_the_values_of_the_fourier_series_between_pixels(shape):
    spectrum = np.fft.fft2(np.random.default_rng(2).normal(size=shape))
    for axis, n in enumerate(shape):
        if n % 2 == 0:  # the sign of the highest frequency is not defined
            spectrum[(slice(None),) * axis + (n // 2,)] = 0
    image = torch.from_numpy(np.fft.ifft2(spectrum).real)
    axes = [np.exp(2j * np.pi * np.outer(np.arange(2 * n) / 2, np.fft.fftfreq(n))) / n for n in shape]
    expected = (axes[0] @ spectrum @ axes[1].T).real
    fine = oversample(torch.fft.rfft2(image)[None], shape)
    np.testing.assert_allclose(fine[0].numpy(), expected, atol=1e-12)


def test_oversample__keeps_the_pixels_of_any_image():
    image = torch.from_numpy(np.random.default_rng(3).normal(size=(2, 14, 16)))
    fine = oversample(torch.fft.rfft2(image), (14, 16))
    torch.testing.assert_close(fine[:, ::2, ::2], image)

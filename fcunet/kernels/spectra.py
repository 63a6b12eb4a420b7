"""Real Fourier transforms of a batch of images, the fastest way that torch has on each device.

Spectra are stored column by column, (n, W // 2 + 1, H). On a CPU the second transform then runs along
contiguous memory; torch's own two-dimensional transforms leave the transposition to a strided copy, which
misses the cache at nearly every step where the height is a power of two.
"""

import torch
from torch import Tensor

_LINE = 1024  # bytes; memory at distances that are multiples of this competes for the same lines of the cache


def to_columns(images: Tensor) -> Tensor:
    """Real FFT of images (n, H, W): complex (n, W // 2 + 1, H)."""
    if images.device.type != "cpu":
        return torch.fft.rfft2(images).transpose(1, 2)
    return torch.fft.fft(torch.fft.rfft(images).transpose(1, 2).contiguous())


def from_columns(spectrum: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (n, H, W) from what :func:`to_columns` gives; `size` is (H, W)."""
    if spectrum.device.type != "cpu":
        return torch.fft.irfft2(spectrum.transpose(1, 2), s=size)
    columns = torch.fft.ifft(spectrum)
    if columns.shape[2] * columns.element_size() % _LINE == 0:
        n, half, height = columns.shape
        spread = columns.new_empty((n, half, height + 8))[:, :, :height]  # at distances that do not compete
        columns = spread.copy_(columns)
    return torch.fft.irfft(columns.transpose(1, 2).contiguous(), n=size[1])

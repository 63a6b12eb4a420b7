"""Lattice vectors of real space straight from a pattern, without any disk: the exit-wave power cepstrum.

The Fourier transform of the logarithm of a diffraction pattern has a peak at every projected lattice vector
(Padgett et al., Ultramicroscopy 214 (2020) 112994, doi:10.1016/j.ultramic.2020.112994). A pattern is a
lattice of disks; so its transform is a lattice of peaks times the transform of one disk. Nothing is shared
with correlation or the network but the counts, which makes it a second opinion. Disks must be small against
their distance (radius a quarter of it at most): beyond the first zero of the transform of a disk there is
little to see.

Positions are in cepstral px: one cycle over M detector px, M the longer side; zero at (rows, columns) // 2.
"""

import math

import torch
from torch import Tensor

from .peaks import Peaks, find_maxima

WINDOW = 1 / 6  # standard deviation of the Gaussian window over the longer side: 3 of them to the border
LOBE_PX = 1 / (2 * math.pi * WINDOW)  # and of the peak it makes, cepstral px
_CENTRE_PX = 4 * LOBE_PX  # diffuse scattering lies within
_PAD = 2
_LEAST_DISK = 0.12  # where the transform of a disk is below this share of its middle, nothing can be seen
_CONTRAST = 0.03  # counts of this share of the mean are where the logarithm sets in


def find_cepstral_peaks(
    patterns: Tensor,
    *,
    radius_px: float,
    edge_sigma_px: float,
    nearest_spacing_px: float = math.nan,
    max_num_peaks: int = 64,
    min_significance: float = 5.0,
    min_relative_intensity: float = 0.02,
) -> Peaks:
    """Peaks of the cepstrum of each pattern, at projected lattice vectors of real space and their opposites.

    Parameters
    ----------
    patterns : Tensor, shape (n, qy, qx), float32
        Counts.
    radius_px, edge_sigma_px : float
        Radius and edge of the disks: their transform is divided out, or it would pull every peak inwards.
    nearest_spacing_px : float
        Distance of neighbouring disks, if known: no lattice vector is much shorter than its inverse.
    max_num_peaks : int
    min_significance : float
        Least height, in standard deviations of the noise far out.
    min_relative_intensity : float
        Least share of the highest peak.

    Returns
    -------
    Peaks
        In cepstral px. `sigma` is larger by sqrt(2) than the error of a peak: each comes with its opposite,
        which says the same.
    """
    n, rows, columns = patterns.shape
    side = max(rows, columns)
    image = _windowed(patterns, side)
    padded = _PAD * side
    spectrum = torch.fft.fft2(image, s=(padded, padded)).abs()
    reach = side // 2 * _PAD - 1
    spectrum = torch.fft.fftshift(spectrum, dim=(1, 2))
    middle = padded // 2
    part = slice(middle - reach, middle + reach + 1)
    spectrum = spectrum[:, part, part]  # (n, 2 reach + 1, 2 reach + 1), zero in the middle
    offset = (torch.arange(-reach, reach + 1, device=patterns.device) / _PAD).float()
    r = torch.hypot(offset[:, None], offset)
    disk = _disk_transform(r / side, radius_px, edge_sigma_px)
    nearest = _CENTRE_PX
    if math.isfinite(nearest_spacing_px):
        nearest = max(nearest, 0.55 * side / nearest_spacing_px)
    usable = (disk > _LEAST_DISK) & (r > nearest)
    outer = (r > 0.35 * side) & (r < 0.48 * side)
    noise = spectrum[:, outer].median(1).values / 1.1774  # of a Rayleigh distribution
    maxima = find_maxima(
        torch.where(usable, spectrum, torch.zeros_like(spectrum)),
        edge_boundary=2,
        min_relative_intensity=min_relative_intensity,
        min_peak_spacing=2.5 * LOBE_PX * _PAD,
        max_num_peaks=max_num_peaks,
    )
    there = (maxima.y > 0) & (maxima.value > min_significance * noise[:, None])
    # peak of a Gaussian window times transform of a disk: without the latter, its logarithm is a parabola
    flat = torch.log(spectrum.clamp_min(1e-30)) - torch.log(disk.clamp_min(1e-6))
    qy, qx = _parabola(flat, maxima.y.clamp_min(1), maxima.x.clamp_min(1))
    nothing = torch.full_like(maxima.value, torch.nan)
    sigma = LOBE_PX * noise[:, None] / maxima.value
    order = torch.argsort((~there).int(), dim=1, stable=True)

    def packed(values: Tensor) -> Tensor:
        return torch.where(there, values, nothing).gather(1, order).float()

    return Peaks(
        packed((qy - reach) / _PAD + rows // 2),
        packed((qx - reach) / _PAD + columns // 2),
        packed(maxima.value / padded),
        packed(sigma),
        there.sum(1),
        maxima.truncated,
        torch.zeros(len(there), device=there.device),
        torch.zeros(len(there), device=there.device),
    )


def _windowed(patterns: Tensor, side: int) -> Tensor:
    """Logarithm of the counts without its mean, times a Gaussian window."""
    _, rows, columns = patterns.shape
    level = patterns.mean((1, 2), keepdim=True).clamp_min(1e-12) * _CONTRAST
    image = torch.log1p(patterns.clamp_min(0) / level)
    y, x = (torch.arange(k, device=patterns.device) - (k - 1) / 2 for k in (rows, columns))
    window = torch.exp(-0.5 * (y[:, None] ** 2 + x**2) / (WINDOW * side) ** 2)
    return (image - (image * window).sum((1, 2), keepdim=True) / window.sum()) * window


def _disk_transform(frequency: Tensor, radius_px: float, edge_sigma_px: float) -> Tensor:
    """Magnitude of the transform of a blurred disk, 1 at zero, at frequencies in cycles per px."""
    x = 2 * math.pi * radius_px * frequency
    airy = torch.where(x > 1e-4, 2 * torch.special.bessel_j1(x) / x.clamp_min(1e-4), torch.ones_like(x))
    return airy.abs() * torch.exp(-2 * (math.pi * edge_sigma_px * frequency) ** 2)


def _parabola(image: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sub-pixel maximum near integer maxima (n, P), three points per axis."""
    n, height, width = image.shape
    index = torch.arange(n, device=image.device)[:, None]
    y, x = y.clamp(1, height - 2), x.clamp(1, width - 2)
    middle = image[index, y, x]
    out = []
    for dy, dx, start in ((1, 0, y), (0, 1, x)):
        below, above = image[index, y - dy, x - dx], image[index, y + dy, x + dx]
        bend = below - 2 * middle + above
        step = torch.where(bend < 0, 0.5 * (below - above) / bend.clamp_max(-1e-12), torch.zeros_like(bend))
        out.append(start + step.clamp(-1, 1))
    return out[0], out[1]

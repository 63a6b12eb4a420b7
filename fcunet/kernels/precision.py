"""How well a disk position found by correlation is known: counting noise and uneven disks.

What uneven disks do to all positions of a pattern alike is in :mod:`fcunet.kernels.shared_dilation`.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .subpixel import crops

CONTRAST_SPREAD = 0.02  # variance of the squared contrast among the disks of a pattern, roughly
_LEVELS = 32
# Contrast along the rim of a disk, relative to what a linear contrast inside predicts: fitted to simulated
# disks, with linear, quadratic and fringe contrast, and dynamical ones; radius 3 to 12 px, edge 0.4 to 1.6
# px.
_PULL = 0.95


class DiskModel(NamedTuple):
    """What the error model takes from a kernel; `pixels` are those of a flat square around its centre."""

    size: int  # side of that square
    radius: float
    masks: Tensor  # (4, pixels): disk, ring of background around it; y and x (px) in the inner part, else 0
    share: Tensor  # part of the electrons of a disk that lies within the first mask
    inner: Tensor  # mean of the probe over the inner part
    level: Tensor  # (_LEVELS,) the probe, in classes of brightness
    slope_squared: (
        Tensor  # (_LEVELS,) sum over each class of the squared slope of the kernel, mean of y and x
    )
    bend: Tensor  # (_LEVELS,) of minus its second derivative
    rim: Tensor  # (_LEVELS,) of the probe times the inward slope of the kernel, per axis


def disk_light(counts: Tensor, which: Tensor, y: Tensor, x: Tensor, disk: DiskModel) -> Tensor:
    """Sums of raw counts (n, H, W) over the masks of `disk` around m positions, (m, 4)."""
    squares = crops(counts, which, y, x, disk.size).flatten(1)
    if len(squares) == 1:  # a single row would be added up in another order than one of many
        squares = squares.expand(2, -1)
    # a plain product with four columns takes five times as long on a CPU
    return torch.nn.functional.linear(squares, disk.masks)[: len(which)]


class Contrast(NamedTuple):
    """How uneven m disks are, and what that does to their positions."""

    counting: Tensor  # (m,) px^2, variance of a position by counting noise, per axis
    pull: Tensor  # (m,) px by which a linear contrast of 1 shifts a position
    tilt: Tensor  # (2, m) linear contrast along y and x inside the disk: brightness 1 + tilt . (y, x) / R
    squared: Tensor  # (m,) mean of its square over the axes, less what counting noise adds to it
    noise: Tensor  # (m,) that: variance of a tilt by counting noise, per axis


def measure_contrast(light: Tensor, disk: DiskModel, *, transform: str = "none") -> Contrast:
    """Contrast of disks, and the response of their positions to it and to counting noise.

    Parameters
    ----------
    light : Tensor, shape (m, 4)
        From :func:`disk_light`, of counts in electrons. Where one electron gives several counts, divide
        first.
    disk : DiskModel
        From :func:`describe_disk`.
    transform : {"none", "sqrt", "log"}
        What was done to the counts before the correlation.

    Returns
    -------
    Contrast
        See :func:`position_sigma` for the formulae.
    """
    in_disk, in_ring = light.T[:2]
    tilt_y, tilt_x = light.T[2:] / disk.radius
    n_disk, n_ring = disk.masks[:2].sum(1)
    background = (in_ring / n_ring.clamp(min=1)).clamp(min=0)
    electrons = ((in_disk - background * n_disk) / disk.share).clamp(min=1)

    rate = electrons[:, None] * disk.level + background[:, None]
    mean, gain, variance = _response(rate, transform)
    stiffness = _dot(mean, disk.bend).clamp(min=1e-20)
    counting = _dot(variance, disk.slope_squared) / stiffness**2

    signal = electrons * disk.inner  # per pixel
    lever = (disk.masks[2] ** 2).sum() / disk.radius**2
    noise = (signal + background) / (signal**2 * lever)
    squared = (tilt_y**2 + tilt_x**2) / (2 * (signal * lever) ** 2) - noise
    pull = _PULL * electrons * _dot(gain, disk.rim) / stiffness
    return Contrast(counting, pull, torch.stack([tilt_y, tilt_x]) / (signal * lever), squared, noise)


def position_sigma(
    contrast: Contrast, which: Tensor, n: int, disk: DiskModel, *, rounded: bool = False
) -> Tensor:
    """Standard deviation of disk positions that maximise the correlation of transformed counts with a kernel.

    Parameters
    ----------
    contrast : Contrast
        Of m disks, from :func:`measure_contrast`.
    which : Tensor, shape (m,), int64
        Pattern of each of m disks.
    n : int
        Number of patterns.
    disk : DiskModel
        From :func:`describe_disk`.
    rounded : bool
        Positions are whole pixels: adds their variance, 1/12.

    Returns
    -------
    Tensor, shape (m,), float32
        One standard deviation per axis, px: counting noise and texture, added in quadrature; at most the
        radius of the disk, beyond which the peak is none.

    Notes
    -----
    *Counting noise.* A disk of N electrons (measured in the raw counts within half its height, less the mean
    of a ring around it, b per pixel) has the rate N p + b with the probe p of unit sum. The position that
    maximises sum(f(I) k) has, to first order, the variance ::

        sum(v(N p + b) (dk)^2) / sum(m(N p + b) d2k)^2

    with the derivatives dk, d2k along the axis and the mean m and variance v of transformed Poisson counts
    f(I). For the plain cross-correlation of a flat disk of radius R and Gaussian edge s without background
    this is sqrt(pi) R s / N, in the standard deviation 1.27 times the Cramer-Rao bound sqrt(R s / (0.9032
    N)).

    *Texture.* Dynamical contrast that makes one side of a disk brighter pulls it there, at any dose. A
    contrast a cos(phi) along the rim shifts it by a S with S = -N sum(m' p k_r) / (2 sum(m d2k)), k_r the
    slope along the radius; S is sqrt(pi) s for the plain cross-correlation, about two thirds of it for the
    logarithm. `a` is the linear contrast measured inside the disk, less what counting adds to its square:
    half that of the disk itself, as far as its dose lets it be known, and for the rest the mean of the
    pattern. It serves as an error bar, not as a correction, because contrast at the rim need not continue
    that inside.

    Both need the disks to be separate, and `corr_power` = 1; for hybrid correlation they are indicative.
    """
    # beyond a contrast of 1, one side would be negative
    contrast2 = _pool(contrast.squared.clamp(max=1), contrast.noise**2, which, n)
    sigma2 = contrast.counting + contrast2 * contrast.pull**2 + (1 / 12 if rounded else 0.0)
    return sigma2.sqrt().clamp(max=disk.radius)


def _dot(rows: Tensor, weights: Tensor) -> Tensor:
    """``rows @ weights`` (m, p), (p,), row by row: a matrix product rounds by the number of its rows."""
    return (rows * weights).sum(1)


def _pool(estimate: Tensor, variance: Tensor, which: Tensor, n: int) -> Tensor:
    """Each disk's squared contrast, drawn towards the mean of its pattern where its own is uncertain."""
    weight = 1 / (variance + CONTRAST_SPREAD)
    sums = estimate.new_zeros((2, n)).index_add_(1, which, torch.stack([weight * estimate, weight]))
    mean = (sums[0] / sums[1]).clamp(min=0)[which]
    share = 0.5 * mean**2 / (mean**2 + variance).clamp(min=1e-12)
    return torch.lerp(mean, estimate, share).clamp(min=0)


_LOWEST, _HIGHEST = 1e-3, 30.0  # electrons per pixel, where the table of _response begins and ends


def _response(rate: Tensor, transform: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of transformed Poisson counts, its derivative with respect to the rate, and their variance."""
    if transform == "none":
        return rate, torch.ones_like(rate), rate
    table = _response_table(transform).to(rate)
    steps = table.shape[1] - 1
    place = (rate.clamp(_LOWEST, _HIGHEST) / _LOWEST).log_() * (steps / math.log(_HIGHEST / _LOWEST))
    left = place.long().clamp(max=steps - 1)
    low = torch.lerp(table[:, left], table[:, left + 1], place - left)
    low[0] = torch.where(rate < _LOWEST, low[0] * (rate / _LOWEST), low[0])
    low[2] = torch.where(rate < _LOWEST, low[2] * (rate / _LOWEST), low[2])
    if transform == "sqrt":
        root = rate.sqrt()
        high = torch.stack([root - 0.125 / root, 0.5 / root, torch.full_like(rate, 0.25)])
    else:
        variance = rate / (1 + rate) ** 2
        high = torch.stack([rate.log1p() - variance / 2, 1 / (1 + rate), variance])
    mean, gain, variance = torch.where(rate < _HIGHEST, low, high)
    return mean, gain, variance


@functools.cache
def _response_table(transform: str) -> Tensor:
    """What :func:`_response` returns, as sums over the Poisson distribution, for rates in equal ratios."""
    rate = torch.logspace(math.log10(_LOWEST), math.log10(_HIGHEST), 65, dtype=torch.float64)[:, None]
    counts = torch.arange(100, dtype=torch.float64)
    probability = torch.exp(counts * rate.log() - rate - torch.lgamma(counts + 1))
    value = counts.sqrt() if transform == "sqrt" else counts.log1p()
    mean = probability @ value
    gain = (probability * (counts / rate - 1)) @ value
    return torch.stack([mean, gain, probability @ value**2 - mean**2])


def describe_disk(kernel: Tensor, effective: Tensor) -> DiskModel:
    """Masks and edge statistics that the error of a position depends on.

    Parameters
    ----------
    kernel : Tensor, shape (H, W)
        Centre at [0, 0]. Its positive part stands for the probe.
    effective : Tensor, shape (H, W)
        The kernel including every blur that affects the position.
    """
    height, width = kernel.shape
    probe = kernel.clamp(min=0)
    probe = probe / probe.sum()
    plateau = probe[probe > 0.2 * probe.max()].median()
    radius = math.sqrt(int((probe > 0.5 * plateau).sum()) / math.pi)
    half = min(math.ceil(radius) + 4, (min(height, width) - 1) // 2)
    origin = torch.zeros(1, dtype=torch.int64, device=kernel.device)
    profile = crops(probe[None], origin, origin, origin, 2 * half + 1)[0]
    steps = torch.arange(-half, half + 1, device=kernel.device)
    distance = torch.hypot(steps[:, None].float(), steps.float())
    disk = profile > 0.5 * plateau
    ring = (distance >= radius + 2) & (distance <= radius + 4)
    inner = distance <= max(0.75 * radius - 0.5, 1.0)
    across = inner * steps[:, None].float()  # whole numbers: sums of counts are exact in any order

    slopes, bend = _derivatives(effective)
    y = torch.fft.fftfreq(height, 1 / height, device=kernel.device)[:, None]
    x = torch.fft.fftfreq(width, 1 / width, device=kernel.device)
    inward = -(y * slopes[0] + x * slopes[1]) / torch.hypot(y, x).clamp(min=1)
    per_pixel = torch.stack(
        [
            probe,
            (slopes[0] ** 2 + slopes[1] ** 2) / 2,
            bend,
            probe * inward / 2,
        ]
    )
    # fine classes near 0 and near 1: where the disk meets the background, and where most of its pixels are
    share = (probe / plateau).clamp(1e-4, 0.9999)
    brightness = (
        ((share / (1 - share)).log() / 9.3 + 1).mul(_LEVELS / 2).long().clamp(0, _LEVELS - 1).flatten()
    )
    sums = kernel.new_zeros((4, _LEVELS)).index_add_(1, brightness, per_pixel.flatten(1))
    return DiskModel(
        size=2 * half + 1,
        radius=radius,
        masks=torch.stack([disk, ring, inner * across, inner * across.T]).flatten(1),
        share=profile[disk].sum(),
        inner=profile[inner].mean(),
        level=sums[0] / torch.bincount(brightness, minlength=_LEVELS).clamp(min=1),
        slope_squared=sums[1],
        bend=sums[2],
        rim=sums[3],
    )


def _derivatives(image: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Of a periodic, band-limited image: slopes along y and x, and minus the mean second derivative."""
    size = image.shape
    spectrum = torch.fft.rfft2(image)
    along_y = 2 * torch.pi * torch.fft.fftfreq(size[0], device=image.device)[:, None]
    along_x = 2 * torch.pi * torch.fft.rfftfreq(size[1], device=image.device)
    slopes = (
        torch.fft.irfft2(1j * along_y * spectrum, s=size),
        torch.fft.irfft2(1j * along_x * spectrum, s=size),
    )
    return slopes, torch.fft.irfft2((along_y**2 + along_x**2) / 2 * spectrum, s=size)

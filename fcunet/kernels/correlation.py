"""Bragg disks by correlation with the vacuum probe, in batches, with the options and defaults of py4DSTEM."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .peaks import Peaks, find_maxima
from .precision import DiskModel, describe_disk, disk_light, measure_contrast, position_sigma
from .shared_dilation import DILATION_SCALES, shared_dilation
from .spectra import from_columns, to_columns
from .subpixel import TAPS, crops, interpolation_weights, oversample, parabola, upsample_crops

KernelName = Literal["flat", "gaussian", "sigmoid"]
TransformName = Literal["none", "sqrt", "log"]
SubpixelName = Literal["pixel", "parabola", "upsampled"]


def centre_probe(probe: Tensor | np.ndarray) -> Tensor:
    """Vacuum probe shifted so that its centre is at (H // 2, W // 2), with unit sum.

    Parameters
    ----------
    probe : array, shape (H, W)
        Image of the probe over vacuum, any unit.

    Returns
    -------
    Tensor, shape (H, W), float32
        Shifted periodically, by fractions of a pixel in Fourier space. The centre is the centre of mass of
        what exceeds a quarter of the plateau, so that a weak background does not draw it to the middle.

    Raises
    ------
    ValueError
        If the probe is not one image, holds NaN or infinity, or has no positive total.
    """
    shifted = _shift_to_corner(probe)
    height, width = shifted.shape
    return torch.roll(shifted, (height // 2, width // 2), (0, 1)).float()


def make_kernel(
    probe: Tensor | np.ndarray,
    *,
    kernel: KernelName = "flat",
    radii: tuple[float, float] | None = None,
    sigma: float = 2.0,
) -> Tensor:
    """Correlation kernel from the vacuum probe, as py4DSTEM defines it.

    Parameters
    ----------
    probe : array, shape (H, W)
        Image of the probe over vacuum; its centre is measured as in :func:`centre_probe`.
    kernel : {"flat", "gaussian", "sigmoid"}
        ``flat`` is the probe with unit sum. The other two subtract from it, with unit sum too, a Gaussian or
        a disk that falls from 1 to 0 as cos^2 between two radii: edges then count more than plateaus.
    radii : (inner, outer), optional
        Of ``sigmoid``, px. Default (0, 4 R) with the radius R of the probe, as in py4DSTEM's tutorials.
    sigma : float
        Of ``gaussian``, in units of the probe's own root-mean-square radius.

    Returns
    -------
    Tensor, shape (H, W), float32
        Centre at [0, 0], periodic. Sum 1 (flat) or 0 (others).

    Raises
    ------
    ValueError
        As :func:`centre_probe`; also for an unknown `kernel` or radii out of order.
    """
    centred = _shift_to_corner(probe)
    if kernel == "flat":
        return centred.float()
    radius2 = _squared_radius(centred)
    if kernel == "gaussian":
        if not sigma > 0:
            raise ValueError(f"sigma of the gaussian kernel is {sigma}, but must be positive")
        mean_square = (radius2 * centred).sum()
        surround = torch.exp(-radius2 / (2 * mean_square * sigma**2))
    elif kernel == "sigmoid":
        inner, outer = (0.0, 4 * disk_radius(centred)) if radii is None else radii
        if not 0 <= inner < outer:
            raise ValueError(
                f"radii are {inner:g}, {outer:g}; give the inner one first, such as radii=(0, 40)"
            )
        ramp = ((radius2.sqrt() - inner) / (outer - inner)).clamp(0, 1)
        surround = torch.cos(torch.pi / 2 * ramp) ** 2
    else:
        raise ValueError(f"unknown kernel {kernel!r}; choose flat, gaussian or sigmoid")
    return (centred - surround / surround.sum()).float()


def disk_radius(probe: Tensor) -> float:
    """Radius (px) of a round disk with the area where `probe` exceeds half its plateau; any position."""
    return math.sqrt(int((probe > 0.5 * _plateau(probe)).sum()) / math.pi)


def find_disks(
    patterns: Tensor,
    kernel: Tensor,
    *,
    corr_power: float = 1.0,
    sigma_cc: float = 2.0,
    sigma_dp: float = 0.0,
    transform: TransformName = "none",
    subpixel: SubpixelName = "upsampled",
    upsample_factor: int = 16,
    min_absolute_intensity: float = 0.0,
    min_relative_intensity: float = 0.005,
    relative_to_peak: int = 0,
    min_peak_spacing: float = 60.0,
    edge_boundary: int = 20,
    max_num_peaks: int = 70,
) -> Peaks:
    """Bragg disks of a batch of patterns: maxima of the correlation with a kernel.

    Parameters
    ----------
    patterns : Tensor, shape (n, H, W)
        Raw counts, any dtype; computed in float32 on the device of this tensor. A constant pattern has no
        peaks, nor has one with NaN or infinity: replace missing pixels first.
    kernel : Tensor, shape (H, W)
        From :func:`make_kernel`, centre at [0, 0].
    corr_power : float
        Exponent p of the magnitude of the cross spectrum: 1 cross-correlation, 0 phase correlation, between
        them hybrid.
    sigma_cc, sigma_dp : float
        Gaussian blur (std, px, cut at 4 std) of the correlation and of the pattern. As in py4DSTEM,
        `sigma_cc` affects which maxima are found, their heights and the parabola, but not the upsampling.
    transform : {"none", "sqrt", "log"}
        Applied to the counts first; ``log`` is log(1 + counts). ``sqrt`` and ``log`` take negative counts as
        0. On disks with dynamical contrast the logarithm is several times more accurate.
    subpixel : {"pixel", "parabola", "upsampled"}
        Position between pixels: none, three-point parabola, or band-limited interpolation on a grid of
        1 / `upsample_factor` px and a parabola there (``pixel``, ``poly``, ``multicorr`` of py4DSTEM).
    min_absolute_intensity, min_relative_intensity, relative_to_peak
    min_peak_spacing, edge_boundary, max_num_peaks
        See :func:`~fcunet.kernels.peaks.find_maxima`; they act on whole pixels, before the refinement.

    Returns
    -------
    Peaks
        `intensity` is the height of the (smoothed) correlation; `sigma` is described in
        :func:`~fcunet.kernels.precision.position_sigma`, the dilation in
        :func:`~fcunet.kernels.shared_dilation.shared_dilation`. `max_num_peaks` slots.

    Raises
    ------
    ValueError
        For shapes that do not fit together, an all-zero kernel, or an option out of range.

    Notes
    -----
    With m = FFT(I) conj(FFT(K)), the correlation is C = max(Re IFFT(|m|^p exp(i arg m)), 0), p =
    `corr_power`, smoothed by `sigma_cc`. Where C is not negative anyway, that is for p = 1 and a kernel
    without negative surround, the smoothing is folded into the spectrum. Blurs are periodic, where py4DSTEM
    reflects: within 4 std of the border the two differ.

    Memory on a GPU: about 40 bytes per pixel of the batch (2.6 MB per pattern of 256 x 256), 15 kB per peak.
    On a CPU the batch is worked off in groups of half a million pixels, so that 50 MB suffice for any batch;
    give it at least 32 patterns to make light of what is computed once per call.
    """
    return DiskFinder(
        kernel.to(patterns.device),
        corr_power=corr_power,
        sigma_cc=sigma_cc,
        sigma_dp=sigma_dp,
        transform=transform,
        subpixel=subpixel,
        upsample_factor=upsample_factor,
        min_absolute_intensity=min_absolute_intensity,
        min_relative_intensity=min_relative_intensity,
        relative_to_peak=relative_to_peak,
        min_peak_spacing=min_peak_spacing,
        edge_boundary=edge_boundary,
        max_num_peaks=max_num_peaks,
    )(patterns)


class DiskFinder:
    """:func:`find_disks` for many batches: what depends on the kernel and the options is computed once.

    Parameters
    ----------
    kernel, ...
        As for :func:`find_disks`; the batches must lie on the device of `kernel`.
    """

    def __init__(
        self,
        kernel: Tensor,
        *,
        corr_power: float = 1.0,
        sigma_cc: float = 2.0,
        sigma_dp: float = 0.0,
        transform: TransformName = "none",
        subpixel: SubpixelName = "upsampled",
        upsample_factor: int = 16,
        **criteria: Any,
    ) -> None:
        _check(kernel, corr_power, transform, subpixel)
        self.plan = _plan(
            kernel.float(),
            corr_power,
            sigma_cc,
            sigma_dp,
            transform,
            subpixel,
            upsample_factor,
            int(criteria["max_num_peaks"]),
        )
        self.criteria = criteria
        self.shape = (kernel.shape[0], kernel.shape[1])

    def __call__(self, patterns: Tensor) -> Peaks:
        """Peaks of patterns (n, H, W)."""
        if patterns.ndim != 3:
            raise ValueError(
                f"patterns are {tuple(patterns.shape)}, but (n, qy, qx) is needed; for one pattern: "
                "pattern[None]"
            )
        if tuple(patterns.shape[1:]) != self.shape:
            raise ValueError(
                f"the kernel is {self.shape} and the patterns are {tuple(patterns.shape[1:])}; "
                "make the kernel from a probe on the same detector"
            )
        if not len(patterns):
            empty = patterns.new_empty((0, self.plan.slots), dtype=torch.float32)
            count = empty.new_empty(0, dtype=torch.int64)
            return Peaks(empty, empty, empty, empty, count, count.bool(), empty[:, 0], empty[:, 0])
        at_once = len(patterns)
        if patterns.device.type == "cpu":
            at_once = max(_CPU_PIXELS // (self.shape[0] * self.shape[1]), 1)
        parts = [_search(group, self.plan, self.criteria) for group in patterns.split(at_once)]
        offsets = range(0, len(patterns), at_once)
        found = _Found(
            torch.cat([part.which + n for part, n in zip(parts, offsets, strict=True)]),
            *(torch.cat(column) for column in list(zip(*parts, strict=True))[1:]),
        )
        return _refine(found, len(patterns), self.plan)


# Intermediate images of one group stay in the cache of a CPU core: twice as fast as whole batches.
_CPU_PIXELS = 2**19

_TRANSFORMS = {
    "none": lambda counts: counts,
    "sqrt": lambda counts: counts.clamp(min=0).sqrt_(),
    "log": lambda counts: counts.clamp(min=0).log1p_(),
}


class _Plan(NamedTuple):
    """What all patterns of a call share."""

    template: Tensor  # (W // 2 + 1, H) spectrum to multiply with
    smoothing: Tensor  # (W // 2 + 1, H) or (1, 1), transfer function of the blur of the correlation
    foldable: bool  # smoothing may come before clipping
    corr_power: float
    transform: TransformName
    subpixel: SubpixelName
    factor: int
    oversampling: int  # of the correlation that is interpolated
    slots: int
    weights: tuple[Tensor, Tensor]  # of interpolation along rows and columns
    disk: DiskModel
    dilation_scales: tuple[float, float]
    shape: tuple[int, int]


def _plan(
    kernel: Tensor,
    corr_power: float,
    sigma_cc: float,
    sigma_dp: float,
    transform: TransformName,
    subpixel: SubpixelName,
    factor: int,
    slots: int,
) -> _Plan:
    height, width = kernel.shape
    template = torch.fft.rfft2(kernel).conj() * _gaussian_spectrum(sigma_dp, height, width, kernel.device)
    smoothing = _gaussian_spectrum(sigma_cc, height, width, kernel.device)
    power = template.abs() ** (2 * corr_power)
    # whitening leaves more of the high frequencies that interpolation from a few pixels cannot follow
    oversampling = 1 if corr_power == 1 or subpixel != "upsampled" else 2
    weights = (
        interpolation_weights(power.mean(1), factor, oversampling).to(kernel.device),
        interpolation_weights(_unfold(power.mean(0), width), factor, oversampling).to(kernel.device),
    )
    decisive = template.conj() * (1 if subpixel == "upsampled" else smoothing)
    return _Plan(
        template.T.contiguous(),
        smoothing.T.contiguous(),
        foldable=corr_power == 1 and _is_positive(kernel),
        corr_power=corr_power,
        transform=transform,
        subpixel=subpixel,
        factor=factor,
        oversampling=oversampling,
        slots=slots,
        weights=weights,
        disk=describe_disk(kernel, torch.fft.irfft2(decisive, s=(height, width))),
        dilation_scales=DILATION_SCALES[transform],
        shape=(height, width),
    )


class _Found(NamedTuple):
    """Maxima of a group of patterns, m in all, and what is needed of the images around them."""

    which: Tensor  # (m,) pattern
    slot: Tensor  # (m,) rank
    y: Tensor  # (m,)
    x: Tensor
    value: Tensor
    patch: Tensor  # (m, 3, 3) of the smooth correlation; (m, 0) if nobody needs it
    square: Tensor  # (m, taps, taps) of what is interpolated, or (m, 0)
    light: Tensor  # (m, 4) sums of the counts, for the error
    n_peaks: Tensor  # (n,)
    truncated: Tensor  # (n,)


def _search(patterns: Tensor, plan: _Plan, criteria: dict[str, Any]) -> _Found:
    """Maxima of patterns that fit into memory, or into the cache, at once."""
    counts = patterns.float().contiguous()
    usable = counts.amax((1, 2)) > counts.amin((1, 2))  # not constant, not NaN
    sharp, smooth = _correlate(_TRANSFORMS[plan.transform](counts), plan)
    maxima = find_maxima(smooth, **criteria)
    found = (maxima.y >= 0) & usable[:, None]
    which, slot = found.nonzero(as_tuple=True)
    y, x = maxima.y[found], maxima.x[found]
    nothing = counts.new_empty((len(y), 0))
    patch = nothing if plan.subpixel == "pixel" else crops(smooth, which, y, x, 3)
    square = nothing
    if plan.subpixel == "upsampled":
        square = crops(sharp, which, y * plan.oversampling, x * plan.oversampling, TAPS)
    light = disk_light(counts, which, y, x, plan.disk)
    truncated = maxima.truncated & usable
    return _Found(which, slot, y, x, maxima.value[found], patch, square, light, found.sum(1), truncated)


def _refine(found: _Found, n: int, plan: _Plan) -> Peaks:
    """Positions between pixels, heights and errors of the maxima of `n` patterns, brightest first."""
    intensity = found.value
    dy = dx = torch.zeros_like(intensity)
    if plan.subpixel != "pixel":
        dy, dx, intensity = parabola(found.patch)
    if plan.subpixel == "upsampled":
        dy, dx = upsample_crops(
            found.square, found.y, found.x, dy, dx, weights=plan.weights, factor=plan.factor
        )
    contrast = measure_contrast(found.light, plan.disk, transform=plan.transform)
    sigma = position_sigma(contrast, found.which, n, plan.disk, rounded=plan.subpixel == "pixel")
    y, x = found.y + dy, found.x + dx
    dilation_std, dilation = shared_dilation(
        contrast, y, x, sigma, found.which, n, plan.disk, shape=plan.shape, scales=plan.dilation_scales
    )
    padded = intensity.new_full((4, n, plan.slots), torch.nan)
    padded[:, found.which, found.slot] = torch.stack([y, x, intensity, sigma])
    order = padded[2].nan_to_num(nan=-torch.inf).sort(dim=1, descending=True, stable=True).indices
    qy, qx, intensity, sigma = padded.gather(2, order.expand_as(padded))
    return Peaks(qy, qx, intensity, sigma, found.n_peaks, found.truncated, dilation_std, dilation)


def _correlate(images: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """What is interpolated, oversampled as planned (empty if nothing is), and what has the maxima."""
    size = (images.shape[1], images.shape[2])
    spectrum = to_columns(images).mul_(plan.template)
    if plan.corr_power != 1:
        magnitude = spectrum.abs()
        spectrum *= torch.where(magnitude > 0, magnitude ** (plan.corr_power - 1), 0.0)
    blurred = plan.smoothing.numel() > 1
    if blurred and plan.foldable:
        sharp = images.new_empty(0)
        if plan.subpixel == "upsampled":
            sharp = from_columns(spectrum, size)
        return sharp, from_columns(spectrum.mul_(plan.smoothing), size).clamp_(min=0)
    step = plan.oversampling
    sharp = from_columns(spectrum, size) if step == 1 else oversample(spectrum.transpose(1, 2), size)
    smooth = sharp[:, ::step, ::step].clamp(min=0)
    if blurred:
        smooth = from_columns(to_columns(smooth).mul_(plan.smoothing), size)
    return sharp, smooth


def _gaussian_spectrum(sigma: float, height: int, width: int, device: torch.device) -> Tensor:
    """Transfer function (H, W // 2 + 1) of a sampled Gaussian cut at 4 std; one 1 where there is no blur."""
    if sigma <= 0:
        return torch.ones((1, 1), device=device)
    reach = int(4 * sigma + 0.5)
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    profile = torch.exp(-0.5 * (steps / sigma) ** 2)
    profile /= profile.sum()
    rows = torch.cos(2 * torch.pi * torch.fft.fftfreq(height, dtype=torch.float64)[:, None] * steps) @ profile
    columns = (
        torch.cos(2 * torch.pi * torch.fft.rfftfreq(width, dtype=torch.float64)[:, None] * steps) @ profile
    )
    return (rows[:, None] * columns).float().to(device)


def _is_positive(kernel: Tensor) -> bool:
    """Whether a kernel has no negative surround; the ripples of a shifted sharp edge do not count."""
    return bool(kernel.sum() > 0.5 * kernel.abs().sum())


def _unfold(half: Tensor, size: int) -> Tensor:
    """All `size` values of an even function of frequency from those of a real FFT."""
    return torch.cat([half, half[1 : (size + 1) // 2].flip(0)])


def _shift_to_corner(probe: Tensor | np.ndarray) -> Tensor:
    """The probe with unit sum and its centre at [0, 0], float64."""
    image = torch.as_tensor(probe).double()
    if image.ndim != 2:
        raise ValueError(
            f"a probe of shape (H, W) is needed, got {tuple(image.shape)}; average a stack: probe.mean(0)"
        )
    if not torch.isfinite(image).all():
        raise ValueError(
            "the probe holds NaN or infinity; replace those pixels, for example by their neighbours' mean"
        )
    if not (image.sum() > 0 and image.max() > 0):
        raise ValueError(
            f"the probe is empty (sum {float(image.sum()):g}): it needs a bright disk; "
            "leave it out to have one made from the measured radius"
        )
    height, width = image.shape
    mass = (image - 0.25 * _plateau(image)).clamp(min=0)  # continuous, so that no pixel jumps in or out
    y = float(mass.sum(1) @ torch.arange(height, dtype=image.dtype, device=image.device) / mass.sum())
    x = float(mass.sum(0) @ torch.arange(width, dtype=image.dtype, device=image.device) / mass.sum())
    return _shift(image / image.sum(), -y, -x)


def _shift(image: Tensor, dy: float, dx: float) -> Tensor:
    """Periodic shift (px); whole pixels are moved exactly, fractions in Fourier space."""
    image = torch.roll(image, (round(dy), round(dx)), (0, 1))
    dy, dx = dy - round(dy), dx - round(dx)
    if max(abs(dy), abs(dx)) < 1e-6:
        return image
    height, width = image.shape
    fy = torch.fft.fftfreq(height, dtype=image.dtype, device=image.device)[:, None]
    fx = torch.fft.rfftfreq(width, dtype=image.dtype, device=image.device)
    phase = torch.polar(torch.ones_like(fy * fx), -2 * torch.pi * (fy * dy + fx * dx))
    return torch.fft.irfft2(torch.fft.rfft2(image) * phase, s=(height, width))


def _plateau(probe: Tensor) -> Tensor:
    """Typical brightness of the disk: the median of what exceeds a fifth of the maximum."""
    return probe[probe > 0.2 * probe.max()].median()


def _squared_radius(image: Tensor) -> Tensor:
    """Squared distance (px) from pixel [0, 0] of a periodic frame."""
    height, width = image.shape
    y = torch.fft.fftfreq(height, 1 / height, dtype=image.dtype, device=image.device)
    x = torch.fft.fftfreq(width, 1 / width, dtype=image.dtype, device=image.device)
    return y[:, None] ** 2 + x**2


def _check(kernel: Tensor, corr_power: float, transform: str, subpixel: str) -> None:
    if kernel.ndim != 2:
        raise ValueError(f"the kernel is {tuple(kernel.shape)}, but (qy, qx) is needed")
    if not (torch.isfinite(kernel).all() and kernel.any()):
        raise ValueError("the kernel is all zero or not finite; make it with make_kernel(probe)")
    if not 0 <= corr_power <= 1:
        raise ValueError(
            f"corr_power is {corr_power}, but must lie between 0 (phase) and 1 (cross-correlation)"
        )
    if transform not in _TRANSFORMS:
        raise ValueError(f"unknown transform {transform!r}; choose {', '.join(_TRANSFORMS)}")
    if subpixel not in ("pixel", "parabola", "upsampled"):
        raise ValueError(f"unknown subpixel method {subpixel!r}; choose pixel, parabola or upsampled")

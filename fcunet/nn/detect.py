"""From patterns to Bragg peaks: both stages of a network, one after the other."""

import torch
from torch import Tensor

from ..kernels.peaks import Peaks
from .decode import decode, select_peaks
from .model import AMPLITUDE_UNIT_V, FCUNet, Network, PreparedProbe


def detect(
    model: Network,
    patterns: Tensor,
    probes: Tensor | PreparedProbe,
    *,
    optics: Tensor | None = None,
    threshold: float | None = None,
    min_peak_spacing: float | None = None,
    edge_boundary: float = 0.0,
    max_num_peaks: int = 128,
    min_absolute_intensity: float = 0.0,
    min_relative_intensity: float = 0.0,
    relative_to_peak: int = 0,
    binning: int | None = None,
) -> Peaks:
    """Bragg peaks of a batch of patterns.

    Parameters
    ----------
    model : Network
        In eval mode, on the device of `patterns`.
    patterns : Tensor, shape (n, H, W)
        Counts.
    probes : Tensor, shape (n, H, W) or (H, W), or PreparedProbe
        Vacuum probe, centred at (H // 2, W // 2); for many batches of one scan, what
        :meth:`~fcunet.nn.model.FCUNet.prepare` makes of it.
    optics : Tensor, shape (n or 1, 2), optional
        Beam energy in keV and radius of the aperture in 1/angstrom, NaN where unknown; for |V_g| only.
    threshold : float, optional
        Smallest height of the Bragg map; default ``model.config.threshold``.
    min_peak_spacing, edge_boundary, max_num_peaks, min_absolute_intensity, min_relative_intensity, \
    relative_to_peak
        See :func:`fcunet.nn.decode.decode`.
    binning : int, optional
        Detector pixels binned before the network. Default: what the disk radius asks for.

    Returns
    -------
    Peaks
        Positions and sigma in detector px, intensity = |V_g| in volts, largest first; empty slots NaN.
    """
    threshold = model.config.threshold if threshold is None else threshold
    with_reader = isinstance(model, FCUNet) and model.reader is not None
    if isinstance(model, FCUNet):
        probes = model.prepare(patterns, probes, binning=binning)
    maps = model(patterns, probes, binning=binning)
    found = decode(
        maps,
        threshold=threshold,
        min_peak_spacing=min_peak_spacing,
        edge_boundary=edge_boundary,
        max_num_peaks=max_num_peaks,
        min_absolute_intensity=0.0 if with_reader else min_absolute_intensity,
        min_relative_intensity=0.0 if with_reader else min_relative_intensity,
        relative_to_peak=relative_to_peak,
    )
    if not with_reader:
        return found._replace(dilation_std=found.dilation_std + model.config.dilation_floor)
    assert isinstance(model, FCUNet)
    y, x = found.qy, found.qx
    reading = model.read_disks(patterns, probes, y, x, optics=optics, binning=binning, level=maps.level)
    return select_peaks(
        y + reading.offset[..., 0],
        x + reading.offset[..., 1],
        AMPLITUDE_UNIT_V * reading.root_amplitude.clamp_min(0).square(),
        reading.log_sigma.exp(),
        torch.isfinite(y),
        found.truncated,
        reading.log_dilation_std.exp(),
        frame=(patterns.shape[-2], patterns.shape[-1]),
        slots=max_num_peaks,
        edge_boundary=edge_boundary,
        min_absolute_intensity=min_absolute_intensity,
        min_relative_intensity=min_relative_intensity,
        relative_to_peak=relative_to_peak,
    )


def structure_factor_image(peaks: Peaks, frame: tuple[int, int], *, sigma_px: float = 1.2) -> Tensor:
    """The pattern as a person would like it: a Gaussian spot of height |V_g| at every peak, nothing else.

    Parameters
    ----------
    peaks : Peaks
        Of n patterns, from :func:`detect`.
    frame : tuple of int
        (H, W) of the image, px.
    sigma_px : float
        Width of the spots; from 1 px on their centroids are exact to 1e-7 px.

    Returns
    -------
    Tensor, shape (n, H, W)
        Volts; where spots overlap, the higher one. Zero without peaks.
    """
    n, slots = peaks.qy.shape
    image = peaks.qy.new_zeros(n, frame[0], frame[1])
    y, x = (torch.arange(size, device=image.device, dtype=image.dtype) for size in frame)
    for k in range(slots):
        present = torch.isfinite(peaks.qy[:, k])
        if not bool(present.any()):
            break  # found come first
        along_y = torch.exp(-0.5 * ((y - peaks.qy[:, k, None]) / sigma_px).square())  # (n, H)
        along_x = torch.exp(-0.5 * ((x - peaks.qx[:, k, None]) / sigma_px).square())  # (n, W)
        spot = (peaks.intensity[:, k, None] * along_y)[:, :, None] * along_x[:, None]
        image = torch.where(present[:, None, None], torch.maximum(image, torch.nan_to_num(spot)), image)
    return image

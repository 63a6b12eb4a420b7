"""From the maps of the network to lists of Bragg peaks, batched, on whatever device the maps are."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.peaks import Peaks, find_maxima
from .model import NetworkOutput


def decode(
    output: NetworkOutput,
    *,
    threshold: float = 0.3,
    min_peak_spacing: float | None = None,
    edge_boundary: float = 0.0,
    max_num_peaks: int = 128,
    min_absolute_intensity: float = 0.0,
    min_relative_intensity: float = 0.0,
    relative_to_peak: int = 0,
) -> Peaks:
    """Bragg peaks from the maps of a batch.

    Maxima of the Bragg map above `threshold` are spaced out, highest first; each is moved by the predicted
    offset of its map pixel and takes its amplitude and position error from there.

    Parameters
    ----------
    output : NetworkOutput
        Maps of n patterns.
    threshold : float
        Smallest height of the Bragg map, 0 to 1; ``model.config.threshold`` is the value tuned with the
        weights.
    min_peak_spacing : float, optional
        Of two peaks closer than this, detector px, the one with the lower Bragg map goes. Default: two map
        pixels.
    edge_boundary : float
        Peaks lie at least this far from the border of the detector, px; 0 keeps every centre on the detector.
    max_num_peaks : int
        Slots per pattern, P. With more peaks than slots the highest on the Bragg map stay, and `truncated` is
        set.
    min_absolute_intensity : float
        Drop peaks of smaller |V_g|, volts. 0 keeps all, reflections lit by multiple scattering alone (about 0
        V) included: they too lie on the lattice.
    min_relative_intensity, relative_to_peak : float, int
        Drop peaks with less than this share of the |V_g| of the peak of that rank (0 = largest).

    Returns
    -------
    Peaks
        Positions and sigma in detector px, intensity = |V_g| in volts, largest first; empty slots NaN.
    """
    stride, (height, width) = output.stride, output.frame
    spacing = 2.0 if min_peak_spacing is None else max(min_peak_spacing / stride, 1.5)
    # a rim of -1 lets a maximum sit on the border of the map
    padded = F.pad(output.bragg_map.float(), (1, 1, 1, 1), value=-1.0)  # (n, h + 2, w + 2)
    maxima = find_maxima(
        padded,
        edge_boundary=1,
        min_absolute_intensity=max(threshold, 1e-6),
        min_relative_intensity=0.0,
        min_peak_spacing=spacing,
        max_num_peaks=max_num_peaks,
    )
    found = maxima.y >= 0  # (n, P)
    y, x = (maxima.y - 1).clamp_min(0), (maxima.x - 1).clamp_min(0)  # map pixels
    where = y * output.bragg_map.shape[2] + x  # (n, P)

    def at(image: Tensor) -> Tensor:
        return image.float().flatten(1).gather(1, where)  # (n, P)

    qy = stride * y + (stride - 1) / 2 + at(output.offset[:, 0])
    qx = stride * x + (stride - 1) / 2 + at(output.offset[:, 1])
    intensity, sigma = at(output.amplitude), at(output.log_sigma).exp()

    return select_peaks(
        qy,
        qx,
        intensity,
        sigma,
        found,
        maxima.truncated,
        torch.zeros_like(qy[:, 0]),
        frame=(height, width),
        slots=found.shape[1],
        edge_boundary=edge_boundary,
        min_absolute_intensity=min_absolute_intensity,
        min_relative_intensity=min_relative_intensity,
        relative_to_peak=relative_to_peak,
    )


def select_peaks(
    qy: Tensor,
    qx: Tensor,
    intensity: Tensor,
    sigma: Tensor,
    found: Tensor,
    truncated: Tensor,
    dilation_std: Tensor,
    *,
    frame: tuple[int, int],
    slots: int,
    edge_boundary: float,
    min_absolute_intensity: float,
    min_relative_intensity: float,
    relative_to_peak: int,
) -> Peaks:
    """Peaks (n, `slots`) from candidates (n, P <= slots): those wanted, largest intensity first, then NaN."""
    height, width = frame
    edge = max(edge_boundary, 0.0)
    keep = (
        found
        & (qy >= edge - 0.5)
        & (qy < height - edge - 0.5)
        & (qx >= edge - 0.5)
        & (qx < width - edge - 0.5)
    )
    keep &= intensity >= min_absolute_intensity
    ranked = torch.where(keep, intensity, -torch.inf).sort(dim=1, descending=True, stable=True)
    if min_relative_intensity > 0 and relative_to_peak < ranked.values.shape[1]:
        reference = ranked.values[:, relative_to_peak, None]
        kept = (ranked.values > -torch.inf) & (
            (ranked.values >= min_relative_intensity * reference) | reference.isinf()
        )
    else:
        kept = ranked.values > -torch.inf

    def order(values: Tensor) -> Tensor:
        values = torch.where(kept, values.gather(1, ranked.indices), torch.nan)
        return F.pad(values, (0, slots - values.shape[1]), value=torch.nan)

    return Peaks(
        qy=order(qy),
        qx=order(qx),
        intensity=order(intensity),
        sigma=order(sigma),
        n_peaks=kept.sum(1),
        truncated=truncated,
        dilation_std=dilation_std,
        dilation=torch.zeros_like(dilation_std),
    )

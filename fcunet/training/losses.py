"""What the network is asked for: spots on visible disks, their centres with an honest error, their |V_g|.

All terms are read at the map pixels around each true spot; only the Bragg map is also judged in between.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nn.model import AMPLITUDE_UNIT_V, NetworkOutput


@dataclass(frozen=True)
class LossConfig:
    """Weights and widths of the three terms.

    Parameters
    ----------
    bragg_weight, position_weight, amplitude_weight : float
        Weights of the terms, each a mean over visible spots.
    spot_sigma : float
        Gaussian width of the target spots, map pixels.
    half_visible_electrons : float
        A disk of N electrons is visible to the degree N / (N + this).
    beta : float
        0 is the plain Gaussian likelihood, whose gradients (1 / sigma^2) let the sharpest spots swamp
        everything else; 1 is least squares (M. Seitzer et al., beta-NLL, ICLR 2022, arXiv:2203.09168).
    amplitude_softness : float
        Charbonnier width in units of sqrt(|V_g| / 4 V). The term is close to the absolute error, whose
        optimum, the median, is the same for sqrt(|V_g|) and |V_g|.
    """

    bragg_weight: float = 1.0
    position_weight: float = 1.0
    amplitude_weight: float = 2.0
    spot_sigma: float = 1.2
    half_visible_electrons: float = 20.0
    beta: float = 0.5
    amplitude_softness: float = 0.03


class Losses(NamedTuple):
    """The weighted sum and its parts, scalars."""

    total: Tensor
    bragg: Tensor
    position: Tensor
    amplitude: Tensor


class SpotPatches(NamedTuple):
    """Map pixels around every true spot: n patterns, S spots, K pixels each."""

    place: Tensor  # (n, S, K) flat map pixel
    weight: Tensor  # (n, S, K) Gaussian height there, 0 outside the map and in empty slots
    dy: Tensor  # (n, S, K) from the map pixel to the spot, detector px
    dx: Tensor


def spot_patches(
    position: Tensor, *, map_shape: tuple[int, int], stride: int, spot_sigma: float, reach: int
) -> SpotPatches:
    """The (2 reach + 1)^2 map pixels around each spot.

    Parameters
    ----------
    position : Tensor, shape (n, S, 2)
        (y, x) in detector px, NaN in empty slots.
    map_shape : tuple of int
        (h, w).
    stride : int
        Detector pixels per map pixel.
    spot_sigma : float
        Width of the Gaussian weight, map pixels.
    reach : int
        Half-width of the patch, map pixels.
    """
    h, w = map_shape
    valid = torch.isfinite(position).all(dim=-1)  # (n, S)
    grid = (torch.nan_to_num(position) - (stride - 1) / 2) / stride  # map px
    step = torch.arange(-reach, reach + 1, device=position.device)
    sy, sx = (s.flatten() for s in torch.meshgrid(step, step, indexing="ij"))  # (K,)
    y = grid[..., 0, None].round() + sy  # (n, S, K)
    x = grid[..., 1, None].round() + sx
    dy, dx = grid[..., 0, None] - y, grid[..., 1, None] - x
    inside = valid[..., None] & (y >= 0) & (y < h) & (x >= 0) & (x < w)
    weight = torch.exp(-(dy.square() + dx.square()) / (2 * spot_sigma**2)) * inside
    index = (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).long()
    return SpotPatches(index, weight, dy * stride, dx * stride)


def render_spots(height: Tensor, patches: SpotPatches, map_shape: tuple[int, int]) -> Tensor:
    """Image (n, h, w) of Gaussian spots of the given heights (n, S); where they overlap the higher counts."""
    values = (height[..., None] * patches.weight).flatten(1)  # (n, S K)
    image = values.new_zeros(len(values), map_shape[0] * map_shape[1])
    return image.scatter_reduce(1, patches.place.flatten(1), values, "amax").view(-1, *map_shape)


def compute_losses(
    output: NetworkOutput,
    position: Tensor,
    amplitude: Tensor,
    electrons: Tensor,
    config: LossConfig | None = None,
) -> Losses:
    """Losses of a batch.

    Parameters
    ----------
    output : NetworkOutput
        Maps of n patterns.
    position : Tensor, shape (n, S, 2)
        True centres (y, x), detector px; NaN in empty slots. Spots beyond the frame may be included.
    amplitude : Tensor, shape (n, S)
        |V_g| in volts; 0 for a reflection lit by multiple scattering alone.
    electrons : Tensor, shape (n, S)
        Expected electrons in each disk.
    """
    config = config or LossConfig()
    h, w = output.bragg_map.shape[1:]
    patches = spot_patches(
        position, map_shape=(h, w), stride=output.stride, spot_sigma=config.spot_sigma, reach=3
    )
    electrons = torch.nan_to_num(electrons)
    visible = electrons / (electrons + config.half_visible_electrons)  # (n, S)

    target = render_spots(visible, patches, (h, w))
    probability = output.bragg_map.clamp(1e-6, 1 - 1e-6)
    # cross-entropy with a soft target, less its own entropy: zero when the map is right
    bragg = F.binary_cross_entropy(probability, target, reduction="sum") - _entropy(target).sum()

    core = patches.weight * (patches.weight > 0.25) * visible[..., None]  # (n, S, K)
    total = core.sum().clamp_min(1e-6)
    n_spots = visible.sum().clamp_min(1.0)

    def at(image: Tensor) -> Tensor:
        return image.flatten(1).gather(1, patches.place.flatten(1)).view_as(core)

    log_sigma = at(output.log_sigma)
    miss = (at(output.offset[:, 0]) - patches.dy).square() + (at(output.offset[:, 1]) - patches.dx).square()
    nll = 0.5 * miss * torch.exp(-2 * log_sigma) + 2 * log_sigma
    position_loss = (core * nll * (2 * config.beta * log_sigma.detach()).exp()).sum() / total

    root = torch.sqrt(torch.nan_to_num(amplitude) / AMPLITUDE_UNIT_V)[..., None]  # (n, S, 1)
    soft = config.amplitude_softness
    # below zero counts as zero for a forbidden reflection, but must still be pulled up for an allowed one
    predicted = torch.where(root > 0, at(output.root_amplitude), at(output.root_amplitude).clamp_min(0))
    amplitude_loss = (core * (torch.sqrt((predicted - root).square() + soft**2) - soft)).sum() / total

    losses = (bragg / n_spots, position_loss, amplitude_loss)
    weights = (config.bragg_weight, config.position_weight, config.amplitude_weight)
    return Losses(
        sum((k * v for k, v in zip(weights, losses, strict=True)), losses[0].new_zeros(())), *losses
    )


def image_losses(
    output: NetworkOutput,
    position: Tensor,
    amplitude: Tensor,
    electrons: Tensor,
    config: LossConfig | None = None,
) -> Losses:
    """For the published networks, same interface: squared error of the image of |V_g| spots."""
    config = config or LossConfig()
    h, w = output.bragg_map.shape[1:]
    patches = spot_patches(position, map_shape=(h, w), stride=1, spot_sigma=config.spot_sigma, reach=4)
    electrons = torch.nan_to_num(electrons)
    visible = electrons / (electrons + config.half_visible_electrons)  # (n, S)
    target = render_spots(visible * torch.nan_to_num(amplitude) / AMPLITUDE_UNIT_V, patches, (h, w))
    error = (output.bragg_map - target).square().sum() / visible.sum().clamp_min(1.0)
    return Losses(error, error, error.new_zeros(()), error.new_zeros(()))


def _entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())

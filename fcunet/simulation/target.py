"""What the network should answer: the reflections near the Ewald sphere, where they are and how strong.

The target of reflection g is |V_g| exp(-s_g^2 / (2 sigma_s^2)) in volts at its exact position. It depends on
the crystal and its orientation but not on thickness or on multiple scattering; the taper, far wider than the
inverse thickness, only says which reflections count. Forbidden reflections (V_g = 0) that double diffraction
lights up are listed with amplitude 0, so that a loss can ask for nothing where there is light.
"""

import math

import torch
from torch import Tensor

from .scattering import Beams

SIGMA_S = 0.03  # 1/angstrom
FORBIDDEN_BELOW = 1e-3  # of the strongest reflection


def reflection_amplitudes(beams: Beams, *, sigma_s: float = SIGMA_S) -> Tensor:
    """Target amplitudes |V_g| exp(-s_g^2/(2 sigma_s^2)) in volts: shape (n,), float32.

    Amplitudes below `FORBIDDEN_BELOW` of the strongest are 0. The direct beam, whose V_0 cannot be observed,
    gets the largest of the others.
    """
    amplitude = beams.v.abs() * torch.exp(-(beams.s**2) / (2 * sigma_s**2))
    if len(amplitude) > 1:
        amplitude[0] = amplitude[1:].max()
    return torch.where(amplitude < FORBIDDEN_BELOW * amplitude[0], 0.0, amplitude)


def coincident_groups(position: Tensor, strength: Tensor, distance: float) -> Tensor:
    """Index of the strongest member within `distance` for every reflection (itself where it is alone): (n,),
    int64.

    Reflections of different Laue zones may project onto one spot; only the strongest of such a group is
    listed.
    """
    order = torch.argsort(strength, descending=True, stable=True)
    close = torch.cdist(position[order].double(), position[order].double()) < distance
    leader = order[
        close.int().argmax(1)
    ]  # first, hence strongest, neighbour; chains are shorter than the spacing
    groups = torch.empty_like(leader)
    groups[order] = leader
    return groups


def render_spots(
    position: Tensor, amplitude: Tensor, shape: tuple[int, int], *, sigma_px: float = 1.2, reach: float = 5.0
) -> Tensor:
    """Structure-factor image: a Gaussian of integral `amplitude` at every position.

    Parameters
    ----------
    position : Tensor, shape (n, s, 2)
        (y, x) in px, pixel centres at integers; NaN where there is no spot.
    amplitude : Tensor, shape (n, s)
        Volts.
    sigma_px : float
        At least 1 for a point-sampled Gaussian to keep centroid and integral (to 1e-7 px and 1e-8).
    reach : float
        Gaussians are cut at this many sigma.

    Returns
    -------
    Tensor, shape (n, *shape), volt per px
    """
    n = position.shape[0]
    height, width = shape
    r = math.ceil(reach * sigma_px)
    span = torch.arange(-r, r + 1, device=position.device)
    inside = (position > -r).all(-1) & (position < position.new_tensor([height + r, width + r])).all(-1)
    sample, spot = torch.nonzero(inside & (amplitude > 0), as_tuple=True)
    centre = position[sample, spot]
    base = centre.round().long()
    y, x = base[:, :1] + span, base[:, 1:] + span  # (m, 2 r + 1)
    gy = torch.exp(-((y - centre[:, :1]) ** 2) / (2 * sigma_px**2)) * ((y >= 0) & (y < height))
    gx = torch.exp(-((x - centre[:, 1:]) ** 2) / (2 * sigma_px**2)) * ((x >= 0) & (x < width))
    values = (
        (amplitude[sample, spot] / (2 * math.pi * sigma_px**2))[:, None, None]
        * gy[:, :, None]
        * gx[:, None, :]
    )
    flat = (sample[:, None, None] * height + y.clamp(0, height - 1)[:, :, None]) * width
    flat = flat + x.clamp(0, width - 1)[:, None, :]
    image = position.new_zeros(n * height * width)
    image.index_add_(0, flat.reshape(-1), values.reshape(-1))
    return image.reshape(n, height, width)

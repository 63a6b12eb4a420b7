"""Training of the second stage: positions as the first might give them, and what is asked at each.

The maps need not run for it: true positions are displaced at random, weak disks are left out as they would
be, and a few places without a disk are put in.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn.disks import DiskReading
from ..nn.model import AMPLITUDE_UNIT_V, FCUNet, disk_radius
from .evaluate import Batch
from .losses import Losses

_DISPLACED = (0.02, 0.25)  # radii: standard deviation, log-uniform over patterns
_SHIFTED, _STRAINED = 0.08, 0.25  # radii: shared by a pattern's disks, the latter at its border
_NOTICED_ELECTRONS = 8.0  # a disk of N electrons is proposed with probability N / (N + this)
_FALSE_SLOTS, _FALSE_SHARE = 3, 0.2  # per pattern: places without a disk
_OPTICS_UNKNOWN = 0.25  # share of the patterns
_WEIGHT_FLOOR_PX, _STRAIN_UNIT, _LEAST_DISKS = 0.06, 3e-4, 6  # of the strain loss


@dataclass(frozen=True)
class DiskLossConfig:
    """Weights of the second stage.

    Parameters
    ----------
    position_weight, amplitude_weight : float
        Of the offset's likelihood and of the two amplitude terms.
    beta : float
        Weighting of the likelihood by sigma, see :class:`fcunet.training.losses.LossConfig`.
    absolute_weight : float
        Of the amplitude in volts beside the amplitude with the best scale for its pattern: a thin crystal
        shows thickness times potential alone, and there volts cannot be told.
    forbidden_weight : float
        Of a lit forbidden reflection beside an allowed one.
    half_visible_electrons : float
        The amplitude of a disk of N electrons counts N / (N + this).
    strain_weight : float
        Of the strain that a lattice fit would make of the position errors, see :func:`strain_losses`.
    dilation_weight : float
        Of the likelihood of the dilation that is part of it.
    """

    position_weight: float = 1.0
    amplitude_weight: float = 2.0
    beta: float = 0.25
    absolute_weight: float = 0.2
    forbidden_weight: float = 2.0
    half_visible_electrons: float = 20.0
    strain_weight: float = 0.5
    dilation_weight: float = 0.05


class Proposals(NamedTuple):
    """Places to look at, and what is there; n patterns, P places."""

    position: Tensor  # (n, P, 2) px, NaN-padded: what the first stage would have said
    truth: Tensor  # (n, P, 2) px, NaN where there is no disk
    amplitude: Tensor  # (n, P) volts
    electrons: Tensor  # (n, P)
    direct: Tensor  # (n, P) bool: the direct beam

    @property
    def real(self) -> Tensor:
        """(n, P): a disk was proposed here, and is here."""
        return torch.isfinite(self.position).all(-1) & torch.isfinite(self.truth).all(-1)


def propose(batch: Batch) -> Proposals:
    """Positions as a first stage might give them.

    Each is displaced by itself, and all of a pattern by a shift and a strain of their own: were errors only
    independent, the second stage would learn to believe what the proposals have in common, and a dilation of
    the first stage would survive it.
    """
    electrons = torch.nan_to_num(batch.spot_electrons)
    truth, device = batch.spot_position, electrons.device
    n = len(electrons)
    frame = torch.tensor(batch.pattern.shape[-2:], device=device)
    radius = disk_radius(batch.probe)[:, None, None]
    inside = ((truth > -0.5) & (truth < frame - 0.5)).all(-1)  # False for NaN
    noticed = electrons / (electrons + _NOTICED_ELECTRONS)
    taken = (torch.rand(electrons.shape, device=device) < noticed) & inside
    low, high = _DISPLACED
    spread = low * (high / low) ** torch.rand(n, 1, 1, device=device)
    weak = (30 / (electrons + 1)).clamp(0, 1).sqrt()[..., None]
    moved = torch.randn(truth.shape, device=device).clamp(-2, 2) * (spread + 0.1 * weak) * radius
    moved = moved + _shared_displacement(truth - batch.origin[:, None], frame) * radius
    position = torch.where(taken[..., None], truth + moved, torch.nan)
    width = max(1, int(taken.sum(1).max()))
    order = torch.argsort(taken.float(), dim=1, descending=True, stable=True)[:, :width]
    pair = order[..., None].expand(-1, -1, 2)

    empty = torch.rand(n, _FALSE_SLOTS, 2, device=device) * (frame - 1)
    some = torch.rand(n, _FALSE_SLOTS, 1, device=device) < _FALSE_SHARE
    nothing = torch.full((n, _FALSE_SLOTS), torch.nan, device=device)
    direct = (truth - batch.origin[:, None]).square().sum(-1) < 4  # px^2
    return Proposals(
        position=torch.cat((position.gather(1, pair), torch.where(some, empty, torch.nan)), dim=1),
        truth=torch.cat((truth.gather(1, pair), nothing[..., None].expand(-1, -1, 2)), dim=1),
        amplitude=torch.cat((batch.spot_amplitude.gather(1, order), nothing), dim=1),
        electrons=torch.cat((batch.spot_electrons.gather(1, order), nothing), dim=1),
        direct=torch.cat((direct.gather(1, order), torch.zeros_like(nothing, dtype=torch.bool)), dim=1),
    )


def _shared_displacement(q: Tensor, frame: Tensor) -> Tensor:
    """Shift and strain (dilation above all) of the spots q (n, S, 2) px of each pattern, in radii."""
    n, device = len(q), q.device
    shift = _SHIFTED * torch.randn(n, 1, 2, device=device)
    dilation = torch.randn(n, 1, 1, device=device) * torch.eye(2, device=device)
    strain = (dilation + 0.4 * torch.randn(n, 2, 2, device=device)) * torch.rand(n, 1, 1, device=device)
    return shift + _STRAINED * (2 * q / frame) @ strain


class DiskStage(nn.Module):
    """The second stage of `model` alone, as a module for the optimiser and for several devices."""

    def __init__(self, model: FCUNet):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, proposals: Proposals) -> DiskReading:
        """What the second stage says at the proposed places; the optics are hidden now and then."""
        optics = batch.optics.clone()
        optics[torch.rand(len(optics), device=optics.device) < _OPTICS_UNKNOWN] = torch.nan
        y, x = proposals.position.unbind(-1)
        return self.model.read_disks(batch.pattern, batch.probe, y, x, optics=optics, binning=1)


def disk_losses(
    reading: DiskReading, proposals: Proposals, radius: Tensor, config: DiskLossConfig | None = None
) -> Losses:
    """Losses of a batch.

    Parameters
    ----------
    reading : DiskReading
        px, as from :meth:`fcunet.nn.model.FCUNet.read_disks`.
    proposals : Proposals
    radius : Tensor, shape (n,)
        Disk radius, px. Offsets are judged in radii, so that every camera length counts alike.

    Notes
    -----
    The amplitude is judged as |V_g| in units of the mean of its pattern, absolute error, which is the R
    factor; and as its square root (Charbonnier), whose gradient does not vanish at 0. Both with the best
    scale for each pattern, the direct beam left out, and to a smaller part as they are.
    """
    config = config or DiskLossConfig()
    real = proposals.real
    if not bool(real.any()):
        zero = sum((values.sum() for values in reading), reading.offset.new_zeros(())) * 0.0
        return Losses(zero, zero.detach(), zero.detach(), zero.detach())
    n, p = real.shape
    unit = radius[:, None].expand(n, p)
    error = ((reading.offset - (proposals.truth - proposals.position)) / unit[..., None])[real]  # (k, 2)
    log_sigma = (reading.log_sigma - unit.log())[real]
    likelihood = (0.5 * error.square() * torch.exp(-2 * log_sigma)[:, None] + log_sigma[:, None]).sum(-1)
    weight = torch.exp(log_sigma.detach()) ** (2 * config.beta)
    position = (likelihood * weight).sum() / weight.sum()

    electrons = proposals.electrons[real]
    truth = proposals.amplitude[real] / AMPLITUDE_UNIT_V
    root = reading.root_amplitude[real]
    owner = torch.arange(n, device=real.device)[:, None].expand(n, p)[real]

    def per_pattern(values: Tensor) -> Tensor:
        return values.new_zeros(n).index_add_(0, owner, values)[owner]

    weight = electrons / (electrons + config.half_visible_electrons)
    weight = weight * torch.where(truth == 0, config.forbidden_weight, 1.0)
    scattered = (~proposals.direct[real]).to(weight)
    guess = root.clamp_min(0).square()
    power = per_pattern(weight * scattered * guess.square())
    scale = (per_pattern(weight * scattered * guess * truth) + 1e-3) / (power + 1e-3)
    scale = scale.clamp(0.2, 5.0)
    mean = per_pattern(truth * scattered) / per_pattern(scattered).clamp_min(1) + 0.05
    guess = guess + 0.2 * root.clamp_max(0)  # below 0: a slope that leads back

    def judge(factor: Tensor, weight: Tensor) -> Tensor:
        relative = (factor * guess - truth).abs() / mean
        rooted = ((factor.sqrt() * root - truth.sqrt()).square() + 1e-3).sqrt()
        return ((relative + rooted) * weight).sum() / weight.sum().clamp_min(1e-6)

    amplitude = judge(scale, weight * scattered)
    amplitude = amplitude + config.absolute_weight * judge(torch.ones_like(scale), weight)
    strain, dilation = strain_losses(reading, proposals)
    total = config.position_weight * position + config.amplitude_weight * amplitude
    total = total + config.strain_weight * strain + config.dilation_weight * dilation
    return Losses(total, torch.zeros_like(total).detach(), position.detach(), amplitude.detach())


def strain_losses(reading: DiskReading, proposals: Proposals) -> tuple[Tensor, Tensor]:
    """What a weighted lattice fit would take the position errors of one pattern for, as strain.

    A dilation that all disks of a pattern share hardly shows in the error of each, and wholly in the strain.
    The affine part of the errors is fitted with the weights of the fit that follows. Means over the patterns
    with at least 6 disks; 0 if none has.

    Parameters
    ----------
    reading : DiskReading
        px.
    proposals : Proposals

    Returns
    -------
    strain : Tensor
        Each of the four components in units of hypot(standard deviation that independent errors would give
        it, 3e-4), with a gradient that saturates beyond one unit.
    dilation : Tensor
        Negative log-likelihood of the mean of e_xx and e_yy, whose variance is that of independent errors
        plus the square of the shared one that the network states; by Student's t with 4 degrees of freedom,
        because now and then a pattern is lost. Its gradient reaches the stated error alone.
    """
    real = proposals.real
    weight = 1 / (reading.log_sigma.detach().exp().square() + _WEIGHT_FLOOR_PX**2)
    weight = torch.where(real, weight, 0.0)  # (n, P)
    enough = real.sum(1) >= _LEAST_DISKS
    total = weight.sum(1).clamp_min(1e-12)[:, None, None]

    def centred(v: Tensor) -> Tensor:
        v = torch.where(real[..., None], v, 0.0)
        return v - (weight[..., None] * v).sum(1, keepdim=True) / total

    q = centred(proposals.truth)  # (n, P, 2)
    error = centred(reading.offset - (proposals.truth - proposals.position))
    q_weighted = weight[..., None] * q
    normal = q_weighted.transpose(1, 2) @ q  # (n, 2, 2)
    scale = normal.diagonal(dim1=1, dim2=2).mean(1)
    enough = enough & (torch.linalg.det(normal) > 1e-3 * scale.square())  # not all in a row
    if not bool(enough.any()):
        nothing = error.sum() * 0.0
        return nothing, nothing + reading.log_dilation_std.sum() * 0.0
    inverse = torch.linalg.inv(normal[enough])
    strain = (error.transpose(1, 2) @ q_weighted)[enough] @ inverse  # (m, 2, 2): error of y, x by q of y, x
    variance = inverse.diagonal(dim1=1, dim2=2)  # (m, 2)
    unit = (variance[:, None] + _STRAIN_UNIT**2).sqrt()
    judged = ((strain / unit).square() + 1).sqrt().sub(1).mean()

    dilation = strain.detach().diagonal(dim1=1, dim2=2).mean(1)  # (m,)
    variance = variance.sum(1) / 4 + (2 * reading.log_dilation_std[enough]).exp()
    likelihood = 2.5 * torch.log1p(dilation.square() / (4 * variance)) + 0.5 * variance.log()
    return judged, likelihood.mean()

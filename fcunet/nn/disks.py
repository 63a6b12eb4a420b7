"""The second stage: a closer look at every disk the maps have found, in the light of all others.

The first stage (:class:`fcunet.nn.model.FCUNet`) says where disks are. Here each is cut out on a grid in
units of its own radius, so that camera length and sampling drop out; a small convolutional network makes a
token of it, and a transformer lets the disks of one pattern inform each other, because the intensity of every
beam depends on all of them. Out come a correction of the position, its standard deviation, and |V_g|.

n counts patterns, P disks per pattern (padded), D all disks of the batch, C channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import ReLU

CELLS = 16  # a cut-out disk has CELLS x CELLS cells
HALF_WIDTH = 1.4  # and reaches that many radii from its centre
_SAMPLES = 2  # bilinear samples per cell and axis: a cell of a large disk still counts all its pixels
_POSITION_STEP = 0.25  # radii: what attention knows of positions is rounded to this, see DiskReader
_WAVELENGTHS = (3.0, 200.0)  # radii: shortest and longest of the rotary position code
_GROUP = 128  # disks that go through a layer together
_SIGMA_RANGE = (-6.5, -0.3)  # natural log of radii: 0.0015 to 0.74
CURVE_OCTAVES = (-8.5, -7.5, -6.5, -5.5, -4.5, -3.5)  # log2 of radii: where `straighten` has its factors
CURVE_COUNTS = (12, 64)  # and for how many disks
_DILATION_RANGE = (-11.0, -4.5)  # natural log of a strain: 1.7e-5 to 1.1e-2


class DiskReading(NamedTuple):
    """What the second stage says of each disk; garbage where no disk was given.

    Attributes
    ----------
    offset : Tensor, shape (n, P, 2)
        (y, x) from the given position to the centre of the disk, units of the disk radius.
    log_sigma : Tensor, shape (n, P)
        Natural log of the standard deviation of that, per axis, units of the disk radius.
    root_amplitude : Tensor, shape (n, P)
        sqrt(|V_g| / 4 V); 0 or less at reflections lit by multiple scattering alone.
    log_dilation_std : Tensor, shape (n,)
        Natural log of the standard deviation of a dilation that all positions of the pattern share beside
        their own errors, a strain.
    """

    offset: Tensor
    log_sigma: Tensor
    root_amplitude: Tensor
    log_dilation_std: Tensor


def cut_disks(images: Tensor, y: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """Square cut-outs around disks, on a grid in units of the disk radius.

    Parameters
    ----------
    images : Tensor, shape (n, C, H, W)
    y, x : Tensor, shape (n, P)
        Centres in px; NaN becomes a cut-out of zeros.
    radius : Tensor, shape (n,) or (1,)
        Disk radius in px.

    Returns
    -------
    Tensor, shape (n, P, C, 16, 16)
        Averages over cells of 0.175 radii; outside the frame zero.
    """
    n, slots = y.shape
    owner = torch.arange(n, device=y.device).repeat_interleave(slots)
    cut = _cut(images, owner, y.reshape(-1), x.reshape(-1), radius.expand(n)[owner])
    return cut.unflatten(0, (n, slots))


def _cut(images: Tensor, owner: Tensor, y: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """:func:`cut_disks` of a list of disks (D,), each in the image `owner`: (D, C, 16, 16)."""
    (rows, along_y), (columns, along_x) = (
        _cells(centre, radius, size) for centre, size in zip((y, x), images.shape[2:], strict=True)
    )
    n, channels, height, width = images.shape
    row = (owner[:, None] * (channels * height) + rows) * width  # (D, S), of the first channel
    channel = torch.arange(channels, device=y.device) * (height * width)
    place = (row[:, None, :, None] + channel[:, None, None] + columns[:, None, None]).flatten()
    squares = images.reshape(-1).index_select(0, place).view(len(y), channels, *row.shape[1:], -1)
    return along_y[:, None] @ squares @ along_x[:, None].transpose(-1, -2)


def _inside(y: Tensor, x: Tensor, radius: Tensor, frame: tuple[int, int]) -> Tensor:
    """Share of each cell around disks (D,) that lies inside the frame (H, W): (D, 16, 16)."""
    along_y, along_x = (
        _cells(centre, radius, size)[1].sum(-1) for centre, size in zip((y, x), frame, strict=True)
    )
    return along_y[:, :, None] * along_x[:, None]


def _cells(centre: Tensor, radius: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pixels that 16 cells around `centre` (D,) take in along one axis, and with what weight.

    Bilinear samples on a grid factor into rows and columns, and so does their mean over a cell.

    Returns
    -------
    pixels : Tensor of int, shape (D, S)
        Clamped to the frame.
    weights : Tensor, shape (D, 16, S)
        Zero outside the frame, and for NaN.
    """
    points = CELLS * _SAMPLES
    steps = ((torch.arange(points, device=centre.device) + 0.5) / points * 2 - 1) * HALF_WIDTH
    places = torch.nan_to_num(centre, nan=-1e6)[:, None] + steps * radius[:, None]  # (D, 32)
    first = places[:, :1].detach().floor()
    span = torch.arange(int(2 * HALF_WIDTH * float(radius.max())) + 3, device=centre.device)  # (S,)
    weights = 1 - ((places - first)[..., None] - span).abs_()  # (D, 32, S)
    weights = weights.clamp_min(0).unflatten(1, (CELLS, _SAMPLES)).mean(2)
    pixels = first.long() + span
    outside = (pixels < 0) | (pixels >= size)
    return pixels.clamp(0, size - 1), weights.masked_fill(outside[:, None], 0.0)


def rotary_code(y: Tensor, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n, P, width / 2) of positions (n, P) in radii: half for y, half for x."""
    k = width // 4
    ratio = (_WAVELENGTHS[1] / _WAVELENGTHS[0]) ** (torch.arange(k, device=y.device) / max(k - 1, 1))
    frequency = 2 * math.pi / (_WAVELENGTHS[0] * ratio)
    angle = torch.cat((y[..., None] * frequency, x[..., None] * frequency), dim=-1)  # (n, P, width / 2)
    return angle.cos(), angle.sin()


def _turn(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position code (J. Su et al., arXiv:2104.09864): scalar products depend on differences alone."""
    a, b = t.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def in_groups(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Apply `function` to rows (D, ...); on a CPU without gradients always to so many at a time.

    Matrix products of other sizes round differently there, and no disk's result may depend on how many
    others share its batch.
    """
    d = len(rows[0])
    if torch.is_grad_enabled() or rows[0].device.type != "cpu":
        return function(*rows)
    padded = [F.pad(r, (0, 0) * (r.ndim - 1) + (0, -d % _GROUP)) for r in rows]
    parts = [function(*(r[i : i + _GROUP] for r in padded)) for i in range(0, d, _GROUP)]
    return torch.cat(parts)[:d]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention (..., heads, P, C) to the slots of `mask` (n, P), or to all.

    Written out: on CPUs the fused kernel's backward pass is several times slower for so few tokens.
    """
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])  # (..., heads, P, P)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return scores.softmax(-1).to(v) @ v


class DiskAttention(nn.Module):
    """Pre-norm transformer block over the disks of a pattern; positions enter as rotations of q and k."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, t: Tensor, code: tuple[Tensor, Tensor], present: Tensor) -> Tensor:
        """Tokens (D, C) of the disks `present` (n, P); position code (n, P, C / heads / 2) -> (D, C)."""
        packed = in_groups(lambda v: self.qkv(self.norm1(v)), t)  # (D, 3 C)
        if torch.is_grad_enabled() or t.device.type != "cpu":
            a = self._attend_in_slots(packed, code, present)
        else:
            a = self._attend_one_by_one(packed, code, present)
        return in_groups(self.mix, t, a)

    def _attend_in_slots(self, packed: Tensor, code: tuple[Tensor, Tensor], present: Tensor) -> Tensor:
        """Attention of all patterns at once, empty slots included; (D, 3 C) -> (D, C)."""
        n, p = present.shape
        qkv = packed.new_zeros(n, p, packed.shape[-1])
        qkv[present] = packed
        split = qkv.view(n, p, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (_turn(v, *(a[:, None].to(v) for a in code)) for v in (split[0], split[1]))
        mask = present | ~present.any(1, keepdim=True)  # an empty pattern attends anywhere
        a = _attend(q, k, split[2], mask)  # (n, heads, P, C / heads)
        return a.transpose(1, 2).reshape(n, p, -1)[present]

    def _attend_one_by_one(self, packed: Tensor, code: tuple[Tensor, Tensor], present: Tensor) -> Tensor:
        """The same without the empty slots: less work, and no result depends on the patterns beside it."""
        d = len(packed)
        qkv = packed.view(d, 3, self.heads, -1)
        cos, sin = (a[present].to(packed)[:, None, None] for a in code)  # (D, 1, 1, C / heads / 2)
        qk = _turn(qkv[:, :2], cos, sin)  # (D, 2, heads, C / heads)
        counts = present.sum(1).tolist()
        parts = []
        for one, values in zip(qk.split(counts), qkv[:, 2].split(counts), strict=True):
            q, k = one.permute(1, 2, 0, 3)  # (heads, p, C / heads)
            a = _attend(q, k, values.transpose(0, 1))
            parts.append(a.transpose(0, 1).flatten(1))
        return torch.cat(parts)

    def mix(self, t: Tensor, a: Tensor) -> Tensor:
        """What follows attention, disk by disk."""
        t = t + self.out(a)
        return t + self.mlp(self.norm2(t))


class DiskReader(nn.Module):
    """Corrects positions and reads |V_g| of disks found before.

    What attention knows of positions is rounded to a quarter of the disk radius: enough to see the lattice,
    too coarse to fit it. So the position error of one disk stays independent of the others', as the
    lattice fit that follows takes for granted.

    Parameters
    ----------
    width, layers, heads : int
        Of the transformer.
    channels : tuple of int
        Of the convolutions at 16 x 16, 8 x 8, 8 x 8 and 4 x 4 cells.
    """

    def __init__(
        self,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        channels: tuple[int, int, int, int] = (16, 32, 48, 64),
    ):
        super().__init__()
        self.heads = heads
        c0, c1, c2, c3 = channels
        self.disk = nn.Sequential(
            nn.Conv2d(5, c0, 3, padding=1), ReLU(),  # (D, 16, 16, 16)
            nn.Conv2d(c0, c1, 3, 2, padding=1), ReLU(),  # (D, 32, 8, 8)
            nn.Conv2d(c1, c2, 3, padding=1), ReLU(),  # (D, 48, 8, 8)
            nn.Conv2d(c2, c3, 3, 2, padding=1), ReLU(),  # (D, 64, 4, 4)
            nn.Flatten(),
            nn.Linear(16 * c3, width),
        )  # fmt: skip
        self.scalars = nn.Sequential(nn.Linear(2 + 2 + 16 + 4, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiskAttention(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.position = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 3))
        self.amplitude = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 1))
        self.dilation = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 1))
        starts = ((self.position, (0.0, 0.0, 1.0)), (self.amplitude, (0.6,)), (self.dilation, (0.8,)))
        with torch.no_grad():
            for head, start in starts:
                last = head[-1]
                assert isinstance(last, nn.Linear)
                last.weight.mul_(0.1)
                last.bias.copy_(torch.tensor(start))

    def forward(
        self,
        patterns: Tensor,
        probes: Tensor,
        y: Tensor,
        x: Tensor,
        radius: Tensor,
        optics: Tensor | None = None,
        *,
        bf16: bool = False,
    ) -> DiskReading:
        """Read all disks of a batch.

        Parameters
        ----------
        patterns : Tensor, shape (n, H, W)
            In units of the brightest disk (:func:`fcunet.nn.model.brightness`).
        probes : Tensor, shape (n or 1, H, W)
            Centred at (H // 2, W // 2), any scale.
        y, x : Tensor, shape (n, P)
            Positions of the first stage, px, NaN-padded.
        radius : Tensor, shape (n,) or (1,)
            Disk radius, px.
        optics : Tensor, shape (n or 1, 2), optional
            Beam energy in keV and radius of the aperture in 1/angstrom; NaN where unknown.
        """
        n, slots = y.shape
        present = torch.isfinite(y)
        if slots == 0 or not bool(present.any()):
            nothing = patterns.new_zeros(n, slots)
            return DiskReading(
                nothing[..., None].expand(n, slots, 2),
                nothing,
                nothing,
                patterns.new_full((n,), _DILATION_RANGE[1]),
            )
        radius = radius.expand(n)
        owner = torch.arange(n, device=y.device)[:, None].expand(n, slots)[present]  # (D,)
        disk_y, disk_x, disk_radius = y[present], x[present], radius[owner]
        cut = _cut(patterns[:, None], owner, disk_y, disk_x, disk_radius)[:, 0]  # (D, 16, 16)
        inside = _inside(disk_y, disk_x, disk_radius, (patterns.shape[1], patterns.shape[2]))
        middle_y, middle_x = (
            patterns.new_full((len(probes), 1), float(size // 2)) for size in probes.shape[-2:]
        )
        probe = cut_disks(probes[:, None], middle_y, middle_x, radius[: len(probes)])[
            :, 0, 0
        ]  # (n|1, 16, 16)
        probe = probe / probe.flatten(1).amax(1).clamp_min(1e-30)[:, None, None]
        probe = probe[owner] if len(probe) > 1 else probe.expand(len(cut), CELLS, CELLS)
        light = (cut * probe).sum((-2, -1)) / (probe * inside).sum((-2, -1)).clamp_min(1e-3)  # (D,)
        local = (cut / (light + 1e-7)[:, None, None]).clamp(0, 25)
        images = torch.stack(
            (cut.sqrt(), torch.log1p(300 * cut) / 5.7, local.sqrt() / 2, probe, inside), dim=1
        )  # (D, 5, 16, 16)

        # positions relative to the centre of brightness, rounded: see the class
        strength = torch.zeros_like(y)
        strength[present] = light
        total = strength.sum(1, keepdim=True).clamp_min(1e-30)

        def rounded(v: Tensor) -> Tensor:
            v = torch.nan_to_num(v)
            v = (v - (v * strength).sum(1, keepdim=True) / total) / radius[:, None]
            return torch.round(v / _POSITION_STEP) * _POSITION_STEP

        py, px = rounded(y), rounded(x)  # (n, P) radii
        far = torch.stack(rotary_code(py, px, 16), dim=-1).flatten(2)  # (n, P, 16)
        scalars = torch.cat(
            (
                torch.stack(((light + 1e-7).log() / 4 + 1, light.sqrt()), dim=-1),  # (D, 2)
                torch.stack((radius.log() - 1.8, py.new_zeros(n)), dim=-1)[owner],
                far[present],
                _optics_features(optics, n, y)[owner],
            ),
            dim=-1,
        )
        with torch.autocast(patterns.device.type, dtype=torch.bfloat16, enabled=bf16):
            images = images.contiguous(memory_format=torch.channels_last)
            disks = in_groups(lambda a, b: self.disk(a) + self.scalars(b), images, scalars)  # (D, C)
            code = rotary_code(py, px, disks.shape[-1] // self.heads)
            t = disks
            for block in self.blocks:
                t = block(t, code, present)
            t = in_groups(lambda a, b: torch.cat((self.norm(a), b), dim=-1), t, disks)  # (D, 2 C)
            heads = in_groups(lambda v: torch.cat((self.position(v), self.amplitude(v)), dim=-1), t)  # (D, 4)
            count = present.sum(1, keepdim=True).clamp_min(1)  # (n, 1)
            mean = t.new_zeros(n, t.shape[-1], dtype=torch.float32).index_add_(0, owner, t.float()) / count
            dilation = in_groups(self.dilation, mean)[:, 0].float()  # (n,)
        out = patterns.new_zeros(n, slots, 4)
        out[present] = heads.float()
        return DiskReading(
            out[..., :2],
            within(_SIGMA_RANGE, out[..., 2]),
            out[..., 3],
            torch.where(present.any(1), within(_DILATION_RANGE, dilation), _DILATION_RANGE[1]),
        )


def straighten(log_sigma: Tensor, count: Tensor, curve: Sequence[Sequence[float]]) -> Tensor:
    """Standard deviations that hold what they say on held-out patterns, whatever their size.

    Parameters
    ----------
    log_sigma : Tensor, shape (n, P)
        Natural log of radii.
    count : Tensor, shape (n,)
        Disks of each pattern.
    curve : two sequences of 6 floats
        Factors at 2^-8.5, 2^-7.5 ... 2^-3.5 radii, of patterns with 12 disks and with 64. Between all these
        the logarithm of the factor is linear in that of sigma and of the count, beyond them constant. Empty:
        all are 1.

    Returns
    -------
    Tensor, shape (n, P)
        Natural log of radii.
    """
    if not curve:
        return log_sigma
    factors = log_sigma.new_tensor(curve).log()  # (2, 6)
    place = (log_sigma / math.log(2) - CURVE_OCTAVES[0]).clamp(0, len(CURVE_OCTAVES) - 1)
    left = place.nan_to_num().long().clamp(max=len(CURVE_OCTAVES) - 2)  # NaN stays NaN
    share = (count / CURVE_COUNTS[0]).clamp_min(1).log() / math.log(CURVE_COUNTS[1] / CURVE_COUNTS[0])
    few, many = torch.lerp(factors[:, left], factors[:, left + 1], place - left)  # (n, P) each
    return log_sigma + torch.lerp(few, many, share.clamp(max=1)[:, None])


def least_dilation(scale: float, floor: float) -> float:
    """The smallest shared dilation that is stated with this calibration: so much is alike in all patterns."""
    return math.hypot(scale * math.exp(_DILATION_RANGE[0]), floor)


def within(bounds: tuple[float, float], value: Tensor) -> Tensor:
    """Any number as one within `bounds`, approached smoothly: a hard clamp would stop the gradient."""
    low, high = bounds
    return low + (high - low) * torch.sigmoid(value)


def _optics_features(optics: Tensor | None, n: int, like: Tensor) -> Tensor:
    """(n, 4): log energy, log aperture, and whether each is known."""
    if optics is None:
        return like.new_zeros(n, 4)
    known = torch.isfinite(optics) & (optics > 0)
    reference = torch.tensor([200.0, 0.08], device=like.device, dtype=like.dtype)
    values = torch.where(known, (optics.to(like) / reference).clamp_min(1e-6).log(), 0.0)
    return torch.cat((values, known.to(like)), dim=-1).expand(n, 4)

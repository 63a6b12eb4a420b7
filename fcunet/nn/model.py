"""The networks, read from top to bottom: configuration, output, the default member.

Two images go in, a diffraction pattern and the vacuum probe; maps come out, from which
:mod:`fcunet.nn.decode` reads Bragg peaks. n counts patterns; (H, W) is the frame, (h, w) the frame padded to
a multiple of 16 and, for large disks, binned.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .disks import DiskReader, DiskReading, straighten, within
from .layers import ProbeFilters, ReLU, TokenAttention

AMPLITUDE_UNIT_V = 4.0  # the amplitude head predicts sqrt(|V_g| / 4 V): numbers of order one
LOG_SIGMA_RANGE = (-5.0, 0.5)  # natural log of px of the binned frame: 0.007 to 1.6 px
FLOAT32_LAYERS = ("position_head", "amplitude_head")  # whatever the precision of the rest
KINDS = ("default", "paper", "paired")
MULTIPLE = 16  # frames are padded to a multiple of this


@dataclass(frozen=True)
class FCUNetConfig:
    """Architecture and decision thresholds; stored with the weights.

    Parameters
    ----------
    kind : {"default", "paper", "paired"}
        The network below, the published FCU-Net, or its corrected twin (:mod:`fcunet.nn.published`).
    widths : tuple of int
        Channels at 1/2, 1/4, 1/8 and 1/16 of the frame.
    filter_orders : tuple of int
        Angular order of each learned Fourier filter, see :class:`fcunet.nn.layers.ProbeFilters`.
    n_radial : int
        Basis functions of the filters' radial profiles.
    attention_layers, attention_heads : int
        Transformer blocks on the coarsest map.
    max_radius_px : float
        Frames with larger disks are binned by 2, 3, ... first, so that the trunk sees radii it was trained
        on.
    filters, convs_per_block, levels, dropout : int, int, int, float
        Of the published networks only: complex filters of the first block, convolutions per block, poolings,
        and the rate of dropout, which stays on at inference in "paper".
    reader_width, reader_layers, reader_heads, reader_channels : int, int, int, tuple of int
        Second stage, see :class:`fcunet.nn.disks.DiskReader`; width 0 = none.
    threshold : float
        Smallest height of the Bragg map that is a peak: 0 to 1, for the published networks in units of 4 V.
    sigma_scale, sigma_floor_px : float
        Calibration of the position error on held-out prototypes: ``sqrt((scale sigma)^2 + floor^2)``.
    sigma_curve : tuple of 2 tuples of float, or ()
        Factors that the second stage's sigma gets before that, see :func:`fcunet.nn.disks.straighten`.
    dilation_scale, dilation_floor : float
        The same for the standard deviation of the dilation that all positions of a pattern share beside their
        own errors, a strain.
    """

    kind: str = "default"
    widths: tuple[int, int, int, int] = (24, 40, 64, 96)
    filter_orders: tuple[int, ...] = (0, 0, 1, 2)
    n_radial: int = 12
    attention_layers: int = 2
    attention_heads: int = 4
    max_radius_px: float = 13.0
    filters: int = 8
    convs_per_block: int = 1
    levels: int = 7
    dropout: float = 0.1
    reader_width: int = 0
    reader_layers: int = 5
    reader_heads: int = 6
    reader_channels: tuple[int, int, int, int] = (24, 48, 64, 64)
    threshold: float = 0.3
    sigma_scale: float = 1.0
    sigma_floor_px: float = 0.0
    sigma_curve: tuple[tuple[float, ...], ...] = ()
    dilation_scale: float = 1.0
    dilation_floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of network is {self.kind!r}; choose one of {', '.join(KINDS)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FCUNetConfig":
        """Configuration from JSON or YAML values.

        Raises
        ------
        ValueError
            For an unknown key; the nearest known one is suggested.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = (
                    f"; did you mean {near[0]!r}?"
                    if near
                    else ": was it written by a newer fcunet? Then upgrade"
                )
                raise ValueError(f"unknown key {key!r} in the configuration of a network{hint}")
        return cls(**{key: _as_tuples(value) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _as_tuples(value: Any) -> Any:
    """Lists, as JSON and YAML have them, as tuples."""
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list) else value


class NetworkOutput(NamedTuple):
    """Maps at the network's own sampling; map pixel i lies at detector pixel ``stride i + (stride - 1) / 2``.

    Attributes
    ----------
    bragg_map : Tensor, shape (n, h, w)
        Visibility of a Bragg disk centred here: a Gaussian spot of height up to 1 per disk, 0 elsewhere.
    root_amplitude : Tensor, shape (n, h, w)
        sqrt(|V_g| / 4 V), meaningful on spots only; 0 or less at reflections lit by multiple scattering
        alone. All zero in a network whose second stage reads the amplitudes.
    offset : Tensor, shape (n, 2, h, w)
        (y, x) from the map pixel to the centre of the disk, detector px.
    log_sigma : Tensor, shape (n, h, w)
        Natural log of the standard deviation of the offset, per axis, detector px.
    stride : int
        Detector pixels per map pixel.
    frame : tuple of int
        (H, W) of the detector; the maps may reach past it.
    level : Tensor, shape (n,), optional
        :func:`brightness` of the patterns, for a second stage.
    """

    bragg_map: Tensor
    root_amplitude: Tensor
    offset: Tensor
    log_sigma: Tensor
    stride: int
    frame: tuple[int, int]
    level: Tensor | None = None

    @property
    def amplitude(self) -> Tensor:
        """|V_g| in volts, shape (n, h, w), meaningful on spots only."""
        return AMPLITUDE_UNIT_V * self.root_amplitude.clamp_min(0).square()


class PreparedProbe(NamedTuple):
    """What both stages need of the probes of a batch, the same for all batches of a scan.

    Attributes
    ----------
    frame : tuple of int
        (H, W) of the detector.
    radius : Tensor, shape (n or 1,)
        Disk radius, detector px.
    binning : int
        Detector pixels binned before the network.
    response : Tensor, shape (n or 1, 2 K, h / 2, w / 4 + 1), complex
        Of the Fourier filters.
    centred : Tensor, shape (n or 1, h, w)
        Binned probe, centred at (h // 2, w // 2).
    """

    frame: tuple[int, int]
    radius: Tensor
    binning: int
    response: Tensor
    centred: Tensor


class ConvBlock(nn.Sequential):
    """Two 3x3 convolutions with batch norm and ReLU; the first may halve the sampling."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            ReLU(),
        )


class UpBlock(nn.Module):
    """Narrow, double the sampling, add the skip, convolve. Adding costs half of concatenating."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.narrow = nn.Conv2d(in_channels, out_channels, 1)
        self.block = ConvBlock(out_channels, out_channels)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        """(n, C_in, h, w), (n, C_out, 2h, 2w) -> (n, C_out, 2h, 2w)."""
        up = F.interpolate(self.narrow(coarse), scale_factor=2, mode="nearest")
        return self.block(up + skip)


class Network(nn.Module):
    """What all members share: a configuration, the arithmetic of the trunk, and the origin of the weights."""

    def __init__(self, config: FCUNetConfig):
        super().__init__()
        self.config = config
        self.precision = "fp32"  # or "bf16"
        self.info: Any = None  # set by load_model

    def channels_last(self) -> Self:
        """Store convolution weights with channels last (in place), which is faster on every device."""
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def fuse(self) -> Self:
        """Fold batch norms into the convolutions before them (in place): the same maps, sooner."""
        for block in self.modules():
            if isinstance(block, ConvBlock):
                for i in (0, 3):
                    conv, norm = block[i], block[i + 1]
                    assert isinstance(conv, nn.Conv2d)
                    assert isinstance(norm, nn.BatchNorm2d)
                    block[i] = fuse_conv_bn_eval(conv, norm)
                    block[i + 1] = nn.Identity()
        return self

    def store_bf16(self) -> Self:
        """Keep weights that compute in bf16 in bf16 (in place), instead of rounding them for every batch."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and name not in FLOAT32_LAYERS:
                layer.to(torch.bfloat16)
        return self

    def binning(self, radius: Tensor) -> int:
        """Detector pixels to bin together, one number for all `radius` (px) of a batch."""
        bins = torch.ceil(radius / self.config.max_radius_px).clamp_min(1)
        if bool((bins != bins[0]).any()):
            raise ValueError(
                f"probes of {float(radius.min()):.1f} to {float(radius.max()):.1f} px radius need different "
                f"binning (above {self.config.max_radius_px:g} px); put them in separate batches"
            )
        return int(bins[0])

    def calibrated_log_sigma(self, sigma: Tensor, binning: int) -> Tensor:
        """Log of the position error in detector px, from the network's own `sigma` in binned px."""
        sigma = sigma * self.config.sigma_scale * binning
        if self.config.sigma_floor_px:
            sigma = torch.hypot(sigma, torch.as_tensor(self.config.sigma_floor_px).to(sigma))
        return sigma.log()


class FCUNet(Network):
    """Finds Bragg disks, their centres to a fraction of a pixel, and |V_g|, whatever multiple scattering did.

    The intensity scale of either image does not matter. Everything is a convolution, in real or in Fourier
    space, apart from attention between coarse tokens: any frame size will do, and the beam need not be
    centred.

    Notes
    -----
    ``precision`` ("fp32" or "bf16") is the arithmetic of the trunk; the Fourier front end and the heads' last
    layers are always float32. It is set by :func:`fcunet.nn.weights.load_model` and by the training loop.
    """

    def __init__(self, config: FCUNetConfig | None = None):
        config = config or FCUNetConfig()
        super().__init__(config)
        c0, c1, c2, c3 = config.widths
        self.filters = ProbeFilters(2, orders=config.filter_orders, n_radial=config.n_radial)
        n_in = 2 * 4 + self.filters.out_channels + 1
        self.input_norm = nn.BatchNorm2d(n_in)
        self.enc0 = ConvBlock(n_in, c0)
        self.enc1 = ConvBlock(c0, c1, stride=2)
        self.enc2 = ConvBlock(c1, c2, stride=2)
        self.enc3 = ConvBlock(c2, c3, stride=2)
        self.context = nn.Sequential(
            *(TokenAttention(c3, heads=config.attention_heads) for _ in range(config.attention_layers))
        )
        # positions and amplitudes ask different questions of the same features: a decoder each
        self.dec2, self.dec1, self.dec0 = UpBlock(c3, c2), UpBlock(c2, c1), UpBlock(c1, c0)
        self.position_hidden = nn.Sequential(nn.Conv2d(c0, 32, 3, padding=1), ReLU())
        self.position_head = nn.Conv2d(32, 4, 1)
        with torch.no_grad():
            self.position_head.weight.mul_(0.1)
            # empty map, no offset, 0.6 px
            self.position_head.bias = nn.Parameter(torch.tensor([-4.0, 0.0, 0.0, 1.0]))
        self.reader: DiskReader | None = None
        if config.reader_width:
            self.reader = DiskReader(
                config.reader_width, config.reader_layers, config.reader_heads, config.reader_channels
            )
            return
        self.amp2, self.amp1 = UpBlock(c3, c2), UpBlock(c2, c1)
        self.amplitude_hidden = nn.Sequential(nn.Conv2d(c1, c1, 3, padding=1), ReLU())
        self.amplitude_head = nn.Conv2d(c1, 4, 1)
        with torch.no_grad():
            self.amplitude_head.weight.mul_(0.1)
            self.amplitude_head.bias = nn.Parameter(torch.full((4,), 0.5))

    def prepare(
        self, patterns: Tensor, probes: Tensor | PreparedProbe, *, binning: int | None = None
    ) -> PreparedProbe:
        """What depends on the probes alone; give it to :meth:`forward` and :meth:`read_disks` in their place.

        Raises
        ------
        ValueError
            As :meth:`forward`.
        """
        if isinstance(probes, PreparedProbe):
            return probes
        frame, probes, radius = check_inputs(patterns, probes)
        binning = binning or self.binning(radius)
        at_origin = bin_frame(roll_to_origin(probes), binning, wrapped=True)  # (n|1, h, w)
        with torch.autocast(probes.device.type, enabled=False):
            unit = at_origin / at_origin.sum(dim=(-2, -1), keepdim=True)
            response = self.filters.response(unit, radius / binning)
        return PreparedProbe(frame, radius, binning, response, torch.fft.fftshift(at_origin, dim=(-2, -1)))

    def forward(
        self, patterns: Tensor, probes: Tensor | PreparedProbe, *, binning: int | None = None
    ) -> NetworkOutput:
        """Maps of a batch of patterns.

        Parameters
        ----------
        patterns : Tensor, shape (n, H, W)
            Counts, or anything proportional to them; negative values count as zero. Must be finite.
        probes : Tensor, shape (n, H, W) or (H, W), or PreparedProbe
            Vacuum probe, centred at pixel (H // 2, W // 2), any scale.
        binning : int, optional
            Detector pixels binned before the network. Default: what the disk radius asks for.

        Returns
        -------
        NetworkOutput
            float32.

        Raises
        ------
        ValueError
            If shapes disagree, a probe is empty, or the probes of one batch differ so much in radius that
            they need different binning.
        """
        frame, radius, binning, response, _ = self.prepare(patterns, probes, binning=binning)
        x = bin_frame(patterns.float().clamp_min(0), binning)  # (n, h, w)

        with torch.autocast(x.device.type, enabled=False):
            level = brightness(x)  # (n,) counts
            x = x / level[:, None, None].clamp_min(1e-30)  # the brightest disk is about 1
            x = torch.stack((x.sqrt(), torch.log1p(300 * x) / 5.7), dim=1)  # (n, 2, h, w)
            filtered = self.filters.filtered(x, response)  # (n, 8, h/2, w/2)
        size = (radius / binning / 5).log()[:, None, None, None].expand(len(x), 1, *filtered.shape[-2:])
        x = torch.cat((F.pixel_unshuffle(x, 2), filtered, size), dim=1)  # (n, 17, h/2, w/2)
        kind = torch.bfloat16 if self.precision == "bf16" else x.dtype
        # both at once take twice as long on a CPU
        x = self.input_norm(x).to(kind).contiguous(memory_format=torch.channels_last)

        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            x0 = self.enc0(x)  # (n, 24, h/2, w/2)
            x1 = self.enc1(x0)  # (n, 40, h/4, w/4)
            x2 = self.enc2(x1)  # (n, 64, h/8, w/8)
            x3 = self.context(self.enc3(x2))  # (n, 96, h/16, w/16)
            d0 = self.dec0(self.dec1(self.dec2(x3, x2), x1), x0)  # (n, 24, h/2, w/2)
            d0 = self.position_hidden(d0)  # (n, 32, h/2, w/2)
            if self.reader is None:
                a1 = self.amplitude_hidden(self.amp1(self.amp2(x3, x2), x1))  # (n, 40, h/4, w/4)
        heads = self.position_head(d0.float())  # (n, 4, h/2, w/2)
        if self.reader is None:
            root = F.pixel_shuffle(self.amplitude_head(a1.float()), 2)[
                :, 0
            ]  # (n, h/2, w/2) sqrt(|V_g| / 4 V)
        else:
            root = torch.zeros_like(heads[:, 0])
        return self._output(heads, root, level, binning, frame)

    def read_disks(
        self,
        patterns: Tensor,
        probes: Tensor | PreparedProbe,
        y: Tensor,
        x: Tensor,
        *,
        optics: Tensor | None = None,
        binning: int | None = None,
        level: Tensor | None = None,
    ) -> DiskReading:
        """The second stage at given positions; offset and sigma in detector px, error bars calibrated.

        Parameters
        ----------
        patterns, probes, binning
            As for :meth:`forward`.
        y, x : Tensor, shape (n, P)
            Detector px, NaN-padded.
        optics : Tensor, shape (n or 1, 2), optional
            Beam energy in keV and radius of the aperture in 1/angstrom, NaN where unknown. Without them the
            scale of |V_g| is a guess; positions do not depend on it.
        level : Tensor, shape (n,), optional
            That of :class:`NetworkOutput`, where the maps have measured it.
        """
        assert self.reader is not None
        _, radius, b, _, probe = self.prepare(patterns, probes, binning=binning)
        image = bin_frame(patterns.float().clamp_min(0), b)
        level = brightness(image) if level is None else level
        image = image / level[:, None, None].clamp_min(1e-30)
        inner = (b - 1) / 2  # detector px of the centre of a binned pixel
        found = self.reader(
            image,
            probe,
            (y - inner) / b,
            (x - inner) / b,
            radius / b,
            optics,
            bf16=self.precision == "bf16",
        )
        scale = radius[:, None].expand(len(y), 1)  # (n, 1) detector px per radius
        count = torch.isfinite(y).sum(1)
        sigma = straighten(found.log_sigma, count, self.config.sigma_curve).exp()
        log_sigma = self.calibrated_log_sigma(sigma * scale / b, b)
        dilation = self.config.dilation_scale * found.log_dilation_std.exp()
        dilation = torch.hypot(dilation, torch.as_tensor(self.config.dilation_floor).to(dilation))
        return DiskReading(
            found.offset * scale[..., None], log_sigma, found.root_amplitude, dilation.clamp_min(1e-7).log()
        )

    def _output(
        self, heads: Tensor, root: Tensor, level: Tensor, binning: int, frame: tuple[int, int]
    ) -> NetworkOutput:
        lit = (level > 0).to(heads)[:, None, None]  # an empty pattern has no spots
        sigma = within(LOG_SIGMA_RANGE, heads[:, 3]).exp()
        return NetworkOutput(
            bragg_map=torch.sigmoid(heads[:, 0]) * lit,
            root_amplitude=root,
            offset=heads[:, 1:3] * binning,
            log_sigma=self.calibrated_log_sigma(sigma, binning),
            stride=2 * binning,
            frame=frame,
            level=level,
        )


def check_inputs(patterns: Tensor, probes: Tensor) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Frame (H, W), probes as float (n or 1, H, W), their radii (n or 1,); refuses what does not fit."""
    frame = (patterns.shape[-2], patterns.shape[-1])
    if patterns.ndim != 3 or probes.shape[-2:] != patterns.shape[-2:] or probes.ndim not in (2, 3):
        raise ValueError(
            f"patterns have shape {tuple(patterns.shape)} and the probe {tuple(probes.shape)}; "
            "needed are (n, H, W) and (H, W) or (n, H, W) with the same H, W"
        )
    probes = probes.float().clamp_min(0).reshape(-1, *frame)
    radius = disk_radius(probes)
    if not bool(torch.isfinite(radius).all()):
        raise ValueError("the probe is empty (all zero or NaN); measure one or make one from the disk radius")
    return frame, probes, radius


def disk_radius(probes: Tensor) -> Tensor:
    """Radius (n,) in px of the uniform disk with the same effective area as each probe (n, H, W).

    The area is (sum P)^2 / sum P^2, which noise in the surroundings hardly changes. NaN for an empty probe.
    """
    area = probes.sum(dim=(-2, -1)).square() / probes.square().sum(dim=(-2, -1))
    return (area / torch.pi).sqrt()


def brightness(patterns: Tensor) -> Tensor:
    """Intensity scale (n,) of patterns (n, h, w): the mean intensity an average electron meets, 3x3 smoothed.

    Close to the level of the brightest disk, independent of frame size and position, and hardly moved by a
    hot pixel.
    """
    framed = F.pad(patterns, (1, 1, 1, 1))  # sums of shifted images: avg_pool2d takes 5 ms for 256 x 256
    lines = framed[:, :-2] + framed[:, 1:-1] + framed[:, 2:]
    smooth = (lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]) / 9
    return smooth.square().sum(dim=(-2, -1)) / smooth.sum(dim=(-2, -1)).clamp_min(1e-30)


def roll_to_origin(probes: Tensor) -> Tensor:
    """Move the centre (H // 2, W // 2) of probes (n, H, W) to pixel [0, 0], wrapped."""
    return torch.roll(probes, (-(probes.shape[-2] // 2), -(probes.shape[-1] // 2)), dims=(-2, -1))


def bin_frame(images: Tensor, binning: int, *, wrapped: bool = False) -> Tensor:
    """Pad (n, H, W) to a multiple of 16 `binning` with zeros and sum blocks of `binning`: (n, h, w).

    Zeros go to the end, or to the middle of a `wrapped` image, whose negative coordinates sit at the end. A
    wrapped image is binned about its pixel [0, 0], so that it stays centred there.
    """
    height, width = images.shape[-2:]
    step = MULTIPLE * binning
    pad_y, pad_x = -height % step, -width % step
    if wrapped:
        half_y, half_x = (height + 1) // 2, (width + 1) // 2  # pixels at coordinates >= 0
        rows = torch.cat(
            (images[:, :half_y], images.new_zeros(len(images), pad_y, width), images[:, half_y:]), dim=1
        )
        images = torch.cat(
            (rows[..., :half_x], rows.new_zeros(*rows.shape[:2], pad_x), rows[..., half_x:]), dim=2
        )
        if binning > 1 and binning % 2 == 0:
            # an even block cannot be centred on a pixel: average the two that straddle it
            images = (images + torch.roll(images, (-1, -1), dims=(-2, -1))) / 2
        images = torch.roll(images, (binning // 2, binning // 2), dims=(-2, -1))
    else:
        images = F.pad(images, (0, pad_x, 0, pad_y))
    if binning == 1:
        return images
    return F.avg_pool2d(images[:, None], binning)[:, 0] * binning**2

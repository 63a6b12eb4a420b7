"""The published FCU-Net and its corrected twin, to measure what each change of the default network buys.

"paper" follows the authors' public code for J. Munshi et al., npj Comput. Mater. 8:254 (2022), doi
10.1038/s41524-022-00939-9: spectrum with zero frequency in the corner and zero padding, batch norm, ReLU,
max-pooling and dropout on real and imaginary parts separately, dropout on at inference too, and skips
concatenated so that real and imaginary channels get mixed up. "paired" is the same topology with complex
algebra kept: shifted spectrum, circular padding, paired skips, norm and activation on the modulus, mean
pooling, dropout only while training.

Both give one image, spots of height |V_g|; positions come from a parabola through its maxima. Pattern and
probe must be centred alike. Frames are padded to a multiple of 2^levels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import ComplexConv2d, ComplexNorm2d, FourierCorrelation, ModReLU, concat_complex, unstack_complex
from .model import FCUNet, FCUNetConfig, Network, NetworkOutput, check_inputs

MAX_FILTERS = 256
SIGMA_PX = 0.3  # no error is predicted: a constant, to be calibrated


class AlwaysDropout(nn.Module):
    """Dropout that stays on at inference ("Monte Carlo")."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return F.dropout(x, self.rate, training=True)


def complex_block(in_channels: int, out_channels: int, config: FCUNetConfig) -> nn.Sequential:
    """Norm, then repeatedly complex convolution, norm, activation, dropout; channel counts are complex."""
    paper = config.kind == "paper"

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(2 * channels) if paper else ComplexNorm2d(channels)

    layers = [norm(in_channels)]
    for i in range(config.convs_per_block):
        layers += [
            ComplexConv2d(
                out_channels if i else in_channels,
                out_channels,
                padding_mode="zeros" if paper else "circular",
            ),
            norm(out_channels),
            nn.ReLU() if paper else ModReLU(out_channels),
            AlwaysDropout(config.dropout) if paper else nn.Dropout(config.dropout),
        ]
    return nn.Sequential(*layers)


def real_block(channels: int, config: FCUNetConfig) -> nn.Sequential:
    """The same on real channels, width kept."""
    layers: list[nn.Module] = [nn.BatchNorm2d(channels)]
    for _ in range(config.convs_per_block):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        layers.append(AlwaysDropout(config.dropout) if config.kind == "paper" else nn.Dropout(config.dropout))
    return nn.Sequential(*layers)


class PublishedFCUNet(Network):
    """Complex U-Net over the spectrum of the cross-correlation, then back to an image; see the module."""

    def __init__(self, config: FCUNetConfig):
        super().__init__(config)
        f, paper = config.filters, config.kind == "paper"
        widths = [min(f * 2**k, MAX_FILTERS) for k in range(config.levels + 1)]
        self.correlation = FourierCorrelation(shifted=not paper)
        self.stem = complex_block(1, f, config)
        self.encoder = nn.ModuleList(
            complex_block(f if k == 0 else widths[k - 1], widths[k], config) for k in range(config.levels)
        )
        # block k works one level below skip k, on what comes from further below
        self.decoder = nn.ModuleList()
        for k in range(config.levels):
            below = (
                widths[k] if k == config.levels - 1 else widths[k + 1] + min(f * 2 ** (k + 2), MAX_FILTERS)
            )
            self.decoder.append(complex_block(below, widths[k + 1], config))
        self.head = complex_block(widths[0] + widths[1], f, config)
        self.real_head = real_block(f, config)
        self.output = nn.Conv2d(f, 1, 3, padding=1)

    def forward(self, patterns: Tensor, probes: Tensor, *, binning: int | None = None) -> NetworkOutput:
        """As :meth:`fcunet.nn.model.FCUNet.forward`; frames are not binned."""
        frame, probes, _ = check_inputs(patterns, probes)
        before, size = zip(*(_padding(s, 2**self.config.levels) for s in frame), strict=True)
        after = [s - b - n for s, b, n in zip(size, before, frame, strict=True)]
        pad = (before[1], after[1], before[0], after[0])
        x = F.pad(patterns.float().clamp_min(0)[:, None], pad)  # (n, 1, h, w)
        p = F.pad(probes[:, None], pad)  # (n|1, 1, h, w)
        z = self.stem(
            self.correlation(x, p) * x[0, 0].numel() ** 0.5
        )  # (n, 2 f, h, w), rms 1 before the stem
        skips = []
        for block in self.encoder:
            z = block(z)  # (n, 2 f 2^k, h / 2^k, w / 2^k)
            skips.append(z)
            z = F.max_pool2d(z, 2) if self.config.kind == "paper" else F.avg_pool2d(z, 2)
        for block, skip in zip(reversed(self.decoder), reversed(skips), strict=True):
            z = F.interpolate(block(z), scale_factor=2, mode="nearest")
            z = torch.cat((skip, z), dim=1) if self.config.kind == "paper" else concat_complex(skip, z)
        spectrum = unstack_complex(self.head(z))  # (n, f, h, w) complex
        if self.config.kind == "paired":
            spectrum = torch.fft.ifftshift(spectrum, dim=(-2, -1))
        image = (
            torch.fft.fftshift(torch.fft.ifft2(spectrum), dim=(-2, -1)).real * spectrum[0, 0].numel() ** 0.5
        )
        image = self.output(self.real_head(image))[:, 0]  # (n, h, w), |V_g| in units of 4 V
        image = image[:, before[0] : before[0] + frame[0], before[1] : before[1] + frame[1]]
        sigma = torch.full_like(image, SIGMA_PX)
        return NetworkOutput(
            bragg_map=image,
            root_amplitude=image.clamp_min(0).sqrt(),
            offset=parabola_offset(image),
            log_sigma=self.calibrated_log_sigma(sigma, 1),
            stride=1,
            frame=frame,
        )


def parabola_offset(image: Tensor) -> Tensor:
    """Vertex of the parabola through each pixel and its neighbours, along y and x: (n, H, W) -> (n, 2, H, W).

    Within half a pixel, and 0 where the pixel is no maximum along that axis.
    """
    padded = F.pad(image[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    offsets = []
    for low, high in (
        (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1]),
        (padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]),
    ):
        curvature = 2 * image - low - high
        maximum = (image >= low) & (image >= high) & (curvature > 0)
        offsets.append(
            torch.where(maximum, (high - low) / (2 * curvature.clamp_min(1e-12)), 0.0).clamp(-0.5, 0.5)
        )
    return torch.stack(offsets, dim=1)


def _padding(size: int, multiple: int) -> tuple[int, int]:
    """Zeros before, and padded size, that take the centre size // 2 to the centre of the padded frame."""
    padded = size + -size % multiple
    return padded // 2 - size // 2, padded


def build_network(config: FCUNetConfig) -> Network:
    """The member of the family that `config` describes, untrained."""
    return FCUNet(config) if config.kind == "default" else PublishedFCUNet(config)

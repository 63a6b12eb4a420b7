"""Layers that work in Fourier space, and complex arithmetic on stacked real channels.

A complex image of C channels is stored as 2 C real channels ``[Re | Im]``. A complex convolution is then an
ordinary real one whose weight is the block matrix ``[[A, -B], [B, A]]``, which every backend runs fast and in
any precision (C. Trabelsi et al., Deep Complex Networks, ICLR 2018, arXiv:1705.09792).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def stack_complex(z: Tensor) -> Tensor:
    """Complex (n, C, H, W) as real (n, 2 C, H, W), ordered ``[Re | Im]``."""
    return torch.cat((z.real, z.imag), dim=1)


def unstack_complex(x: Tensor) -> Tensor:
    """Inverse of :func:`stack_complex`."""
    re, im = x.chunk(2, dim=1)
    return torch.complex(re.contiguous(), im.contiguous())


def concat_complex(*parts: Tensor) -> Tensor:
    """Concatenate stacked complex tensors so that real parts stay beside real parts."""
    re, im = zip(*(p.chunk(2, dim=1) for p in parts), strict=True)
    return torch.cat((*re, *im), dim=1)


class ComplexConv2d(nn.Module):
    """Complex convolution on stacked real channels, size preserved.

    Parameters
    ----------
    in_channels, out_channels : int
        Numbers of *complex* channels.
    kernel_size : int
        Odd; the image is padded by half of it.
    padding_mode : {"zeros", "circular"}
        Circular suits a spectrum, which is periodic.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, padding_mode: str = "zeros"
    ):
        super().__init__()
        self.padding, self.padding_mode = kernel_size // 2, padding_mode
        bound = 1 / math.sqrt(
            in_channels * kernel_size**2
        )  # unit gain for |z|^2: Re and Im share the variance
        shape = (2, out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(2 * out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 2 C_in, H, W) -> (n, 2 C_out, H, W)."""
        a, b = self.weight
        block = torch.cat((torch.cat((a, -b), dim=1), torch.cat((b, a), dim=1)))  # (2 C_out, 2 C_in, k, k)
        if self.padding_mode == "circular":
            x = F.pad(x, (self.padding,) * 4, mode="circular")
            return F.conv2d(x, block, self.bias)
        return F.conv2d(x, block, self.bias, padding=self.padding)


class ModReLU(nn.Module):
    """Shrinks the modulus, keeps the phase: ``relu(|z| + b) z / |z|`` (M. Arjovsky, arXiv:1511.06464)."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.full((channels,), -0.1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 2 C, H, W) -> the same shape."""
        re, im = x.chunk(2, dim=1)
        modulus = torch.sqrt(re * re + im * im + 1e-12)
        gain = F.relu(modulus + self.bias[:, None, None]) / modulus  # (n, C, H, W)
        return x * torch.cat((gain, gain), dim=1)


class ComplexNorm2d(nn.Module):
    """Divides by the rms modulus of each complex channel (running value in eval mode); the phase is kept."""

    def __init__(self, channels: int, *, momentum: float = 0.1):
        super().__init__()
        self.momentum = momentum
        self.gain = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_power", torch.ones(channels))
        self.running_power: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(n, 2 C, H, W) -> the same shape."""
        re, im = x.chunk(2, dim=1)
        power = self.running_power
        if self.training:
            power = (re.float().square() + im.float().square()).mean(dim=(0, 2, 3))  # (C,)
            with torch.no_grad():
                self.running_power.lerp_(power.to(self.running_power), self.momentum)
        scale = (self.gain * torch.rsqrt(power + 1e-8)).to(x.dtype)[:, None, None]
        return x * torch.cat((scale, scale))


class FourierCorrelation(nn.Module):
    """Spectrum of the cross-correlation of pattern and probe, unit L2 norm per pattern; no weights.

    The first layer of the published FCU-Net (Munshi et al., npj Comput. Mater. 8:254, 2022). Both images are
    taken as centred. The norm removes the intensity scale of both.
    """

    def __init__(self, *, shifted: bool):
        super().__init__()
        self.shifted = shifted

    def forward(self, patterns: Tensor, probes: Tensor) -> Tensor:
        """Patterns and probes (n, 1, H, W) -> (n, 2, H, W); zero frequency in the middle if `shifted`."""
        z = torch.fft.fft2(torch.fft.ifftshift(patterns, dim=(-2, -1)))  # (n, 1, H, W) complex
        z = z * torch.fft.fft2(torch.fft.ifftshift(probes, dim=(-2, -1))).conj()  # cross-correlation
        z = z / torch.linalg.vector_norm(z, dim=(-2, -1), keepdim=True).clamp_min(1e-20)
        return stack_complex(torch.fft.fftshift(z, dim=(-2, -1)) if self.shifted else z)


class ProbeFilters(nn.Module):
    """Learned complex filters of the spectrum, conditioned on the probe, returned at half the sampling.

    Filter k multiplies the spectrum of the pattern by

        W_k(q) = conj(P) / (|P|^2 + eps_k)^p_k  *  R_k(|q| r)  *  (i e^{i theta})^m_k

    with P the spectrum of the probe (P(0) = 1) and r the radius of its disk. p = 0 is cross-correlation, 1/2
    phase correlation, 1 Wiener deconvolution; anything between is hybrid correlation. eps, p and the complex
    radial profile R are learned. The order m is fixed: 0 gives two isotropic filters (real and imaginary part
    of R), 1 the derivatives across x and y, 2 the second derivatives (circular harmonics; M. Felsberg and G.
    Sommer, IEEE Trans. Signal Process. 49 (2001) 3136, for m = 1). All output images are real; radii are in
    units of the disk, so a filter learned at one camera length serves another, and image size does not
    matter.

    The spectrum is cropped to its inner half before the inverse transform: the outputs come band-limited at
    half the sampling, at a quarter of the cost.

    Parameters
    ----------
    in_channels : int
        Real input images, mixed linearly for each filter.
    orders : sequence of int
        m of each filter; its length is the number of filters.
    n_radial : int
        Gaussian basis functions of R, spread over 0 <= |q| r <= 3.
    """

    def __init__(self, in_channels: int, *, orders: Sequence[int] = (0, 0, 1, 2), n_radial: int = 12):
        super().__init__()
        self.orders, n = tuple(orders), len(orders)
        self.mix = nn.Parameter(torch.zeros(n, in_channels))
        self.power = nn.Parameter(
            torch.linspace(-2.0, 1.0, n)
        )  # p = sigmoid: cross-correlation to near-Wiener
        self.log_eps = nn.Parameter(torch.full((n,), math.log(0.02)))
        self.radial = nn.Parameter(torch.zeros(n, n_radial, 2))  # complex R on the basis
        self.register_buffer("nodes", torch.linspace(0, 3, n_radial), persistent=False)
        # i^m keeps the filtered image real: the spectrum of a derivative is imaginary
        unit = torch.tensor([1j ** (m % 4) for m in self.orders])[:, None, None]
        self.register_buffer("unit", unit, persistent=False)
        self.nodes: Tensor
        self.unit: Tensor
        with torch.no_grad():
            self.mix[torch.arange(n), torch.arange(n) % in_channels] = 1.0
            self.radial[:, :, 0] = 0.5  # a flat profile: the basis functions overlap to about 2
            self.radial[:, :, 1] = 0.5 * torch.cos(2.0 * self.nodes)  # second filter of each: an edge

    @property
    def out_channels(self) -> int:
        """Real images returned: two per filter."""
        return 2 * len(self.orders)

    def forward(self, x: Tensor, probes: Tensor, radius: Tensor) -> Tensor:
        """Filtered images at half the sampling.

        Parameters
        ----------
        x : Tensor, shape (n, C, H, W)
            Real; H and W multiples of 4.
        probes, radius
            As for :meth:`response`.

        Returns
        -------
        Tensor, shape (n, 2 K, H / 2, W / 2)
            Real float32. Pixel i lies at ``2 i + 0.5`` of the input.
        """
        return self.filtered(x, self.response(probes, radius))

    def filtered(self, x: Tensor, response: Tensor) -> Tensor:
        """:meth:`forward` with what :meth:`response` gave."""
        height, width = x.shape[-2:]
        z = _inner_spectrum(x)  # (n, C, H/2, W/4+1) complex
        mixed = torch.einsum("kc,ncyx->nkyx", self.mix.to(z.dtype), z)  # (n, K, ...)
        return torch.fft.irfft2(torch.cat((mixed, mixed), dim=1) * response, s=(height // 2, width // 2))

    def response(self, probes: Tensor, radius: Tensor) -> Tensor:
        """What the filters multiply the spectrum with.

        Parameters
        ----------
        probes : Tensor, shape (n or 1, H, W)
            Unit sum, centre at pixel [0, 0] (wrapped).
        radius : Tensor, shape (n or 1,)
            Disk radius, px.

        Returns
        -------
        Tensor, shape (n or 1, 2 K, H / 2, W / 4 + 1), complex
        """
        height, width = probes.shape[-2:]
        ky = torch.fft.fftfreq(height, device=probes.device)
        ky = torch.cat((ky[: height // 4], ky[height - height // 4 :]))  # (H/2,) inner half
        kx = torch.fft.rfftfreq(width, device=probes.device)[: width // 4 + 1]  # (W/4 + 1,)
        p = _inner_spectrum(probes)[:, None]  # (n|1, 1, H/2, W/4+1) complex
        # half a pixel of phase: the coarse pixel grid sits between the fine pixels
        shift = torch.exp(1j * math.pi * (ky[:, None] + kx)) / 4  # 1/4: fewer points in the inverse transform
        q = torch.hypot(ky[:, None], kx)  # (H/2, W/4+1) cycles per px
        spacing = self.nodes[1]  # of the Gaussians, and their width
        basis = torch.exp(-((q * radius[:, None, None] - self.nodes[:, None, None, None]) / spacing).square())
        profile = torch.einsum("knc,nbyx->bckyx", self.radial, basis)  # (n|1, 2, K, H/2, W/4+1)
        modulus = (p.real.square() + p.imag.square() + self.log_eps.exp()[:, None, None]).log()
        wiener = (
            p.conj() * torch.exp(-torch.sigmoid(self.power)[:, None, None] * modulus) * shift
        )  # (n|1, K, ...)
        theta = torch.atan2(ky[:, None].expand_as(q), kx.expand_as(q))
        m = torch.tensor(self.orders, device=probes.device)[:, None, None]
        cos, sin = torch.cos(m * theta), torch.sin(m * theta)  # (K, H/2, W/4+1)
        even, odd = profile.unbind(1)
        turned = torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=1)  # (n|1, 2 K, H/2, W/4+1)
        wiener = wiener * self.unit
        return torch.cat((wiener, wiener), dim=1) * turned


def _inner_spectrum(images: Tensor) -> Tensor:
    """Real FFT of images (..., H, W), the inner half of it: (..., H / 2, W / 4 + 1) complex."""
    height, width = images.shape[-2:]
    z = torch.fft.rfft2(images)[..., : width // 4 + 1]
    return torch.cat((z[..., : height // 4, :], z[..., height - height // 4 :, :]), dim=-2)


class ReLU(nn.Module):
    """max(x, 0), in place.

    In bf16 on a CPU, negative numbers are those that are negative as integers of 16 bits: the same result in
    a quarter of the time (torch 2.13 goes through float32; NaN may become 0).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same tensor."""
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled():
            x.view(torch.int16).clamp_min_(0)
            return x
        return F.relu_(x)


class TokenAttention(nn.Module):
    """Every position of a coarse map attends to every other: the pattern as a whole informs each amplitude.

    A pre-norm transformer block without positional code, so it keeps translation equivariance; where a token
    lies is in its features.
    """

    def __init__(self, channels: int, *, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> the same shape."""
        n, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)  # (n, H W, C)
        qkv = self.qkv(self.norm1(t)).view(n, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])  # (n, heads, H W, C / heads)
        t = t + self.out(a.transpose(1, 2).reshape(n, h * w, c))
        t = t + self.mlp(self.norm2(t))
        return t.transpose(1, 2).view(n, c, h, w)

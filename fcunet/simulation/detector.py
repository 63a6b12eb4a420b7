"""Drawing diffraction patterns on a pixel detector, and the faults of microscopes and detectors.

Everything works on batches of frames (n, H, W) in expected electrons, on any device. The order in which a
real experiment suffers: disks, inelastic redistribution, diffuse and amorphous background, point spread,
counting noise, detector faults. Ranges given with each function are those used for training, with what they
rest on.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .scattering import DEGREE, DISK_MARGIN, _degrees, chebyshev_1d, disk_basis, tilt_points

# half widths of the boxes in which disks are drawn; a batch is split by radius
_HALF_WIDTHS = (4, 5, 6, 7, 8, 10, 12, 15, 19, 24, 30, 38, 48, 60, 80, 110, 160)
_CHUNK = 400_000  # pixels drawn at once: temporaries stay in the cache of one CPU core
_CHUNK_GPU = 40_000_000
_MIN_BLUR = 0.05  # half width in px of the narrowest box filter; keeps float32 differences exact to 1e-5


def _polynomial_change(matrix: Tensor) -> Tensor:
    """(n, 45, 45) maps: coefficients of p(matrix @ w) in w from those of p(v), for matrices (n, 2, 2)."""
    samples, solve = (values.to(matrix.device) for values in _samples_and_fit())
    moved = torch.einsum("nij,pj->npi", matrix.double(), samples)
    return torch.einsum("kp,npl->nkl", solve, disk_basis(moved))


@cache
def _samples_and_fit() -> tuple[Tensor, Tensor]:
    """Points (120, 2) of the unit square, and what turns values there into coefficients, (45, 120)."""
    samples = tilt_points(120) / DISK_MARGIN
    return samples, torch.linalg.pinv(disk_basis(samples))


def mean_over_aperture(fraction: Tensor) -> Tensor:
    """Weights (n, 45): their product with disk coefficients is the mean intensity within `fraction` (n,)."""
    powers = fraction[:, None] ** torch.arange(0, DEGREE + 1, 2, device=fraction.device)
    return powers @ _aperture_moments().to(powers)


@cache
def _aperture_moments() -> Tensor:
    """(5, 45): the mean over a disk of radius f is an even polynomial of degree 8 in f."""
    nodes = torch.linspace(0.2, 1.0, DEGREE // 2 + 1, dtype=torch.float64)
    # Gauss-Legendre in r^2, trapezoid in angle: exact for this degree
    x, w = np.polynomial.legendre.leggauss(8)
    r = torch.as_tensor(np.sqrt((x + 1) / 2))
    angle = torch.arange(24, dtype=torch.float64) * (2 * math.pi / 24)
    points = torch.stack([r[:, None] * torch.sin(angle), r[:, None] * torch.cos(angle)], -1) / DISK_MARGIN
    weight = torch.as_tensor(w)[:, None].expand(-1, 24) / (2 * 24)
    means = torch.stack([(disk_basis(points * f) * weight[..., None]).sum((0, 1)) for f in nodes])
    return torch.linalg.solve(nodes[:, None] ** torch.arange(0, DEGREE + 1, 2), means)


def disk_coverage(oy: Tensor, ox: Tensor, matrix: Tensor, blur_px: Tensor) -> Tensor:
    """Share of each pixel inside an elliptical disk, edge blurred by a box filter.

    The edge is a straight line within one pixel, shifted for its curvature so that area is conserved;
    centroids are those of an exactly cut disk within 4e-3 px at a radius of 3 px, 1e-3 px at 8 px.

    Parameters
    ----------
    oy, ox : Tensor, shape (m, b)
        Pixel rows and columns relative to the disk centre, px.
    matrix : Tensor, shape (m, 2, 2)
        Takes an offset (y, x) in px to aperture units, where the disk has radius 1.
    blur_px : Tensor, shape (m,)
        Standard deviation of the edge blur.
    """
    m00, m01, m10, m11 = (matrix[:, i, j, None, None] for i in (0, 1) for j in (0, 1))
    oy, ox = oy[:, :, None], ox[:, None, :]
    u0 = m00 * oy + m01 * ox
    u1 = m10 * oy + m11 * ox
    rho = (u0 * u0 + u1 * u1).sqrt_().clamp_(min=1e-6)
    ny = (m00 * u0 + m10 * u1).abs_()  # gradient of rho, times rho
    nx = (m01 * u0 + m11 * u1).abs_()
    slope = (ny * ny + nx * nx).sqrt_().clamp_(min=1e-9)
    radius = torch.linalg.det(matrix).abs()[:, None, None].rsqrt()
    # px, positive inside; blur and pixel of variance w shift the edge of a disk inwards by w / (2 r)
    shift = (blur_px**2 + 1 / 12)[:, None, None] / (2 * radius)
    distance = ((1 - rho) * rho).div_(slope).sub_(shift)
    a = ny.div_(slope).mul_(0.5).clamp_(min=_MIN_BLUR)
    b = nx.div_(slope).mul_(0.5).clamp_(min=_MIN_BLUR)
    c = (blur_px * math.sqrt(3.0)).clamp(min=_MIN_BLUR)[:, None, None]
    reach = a + b + c
    distance = torch.minimum(torch.maximum(distance, -reach), reach)
    # a step, filtered by three boxes of half widths a, b, c: third difference of x^3 / 6
    total = torch.zeros_like(distance)
    for p in (1, -1):
        for q in (1, -1):
            inner = distance + p * a + q * b
            plus = (inner + c).clamp_(min=0)
            minus = (inner - c).clamp_(min=0)
            total.add_(plus * plus * plus - minus * minus * minus, alpha=p * q)
    return total.div_(48 * a * b * c).clamp_(0, 1)


def render_disks(
    coefficients: Tensor,
    position: Tensor,
    matrix: Tensor,
    fraction: Tensor,
    shape: tuple[int, int],
    *,
    electrons: Tensor | None = None,
    edge_blur_px: Tensor | None = None,
    illumination: Tensor | None = None,
    transmission: Tensor | None = None,
    threshold: float = 0.02,
) -> Tensor:
    """Draw every disk at its exact place with its intensity texture.

    Parameters
    ----------
    coefficients : Tensor, shape (n, k, 45)
        Disk polynomials as `scattering.scatter` gives them.
    position : Tensor, shape (n, k, 2)
        Disk centres (y, x), px; NaN for none. Disks may lie partly or wholly outside the frame.
    matrix : Tensor, shape (n, 2, 2)
        Takes an offset (y, x) in detector px to aperture units: rotation, mirror, ellipse and scale in one.
    fraction : Tensor, shape (n,)
        Aperture drawn over aperture the polynomials were fitted on, at most 1.
    electrons : Tensor, shape (n,), optional
        Electrons in the incident probe (default 1): a disk of intensity I holds electrons * I.
    edge_blur_px : Tensor, shape (n,), optional
        Standard deviation of the blur of the aperture's edge alone, 0 to 1.5 px.
    illumination : Tensor, shape (n, 2), optional
        Gradient of the illumination across the aperture, per aperture radius.
    transmission : Tensor, shape (n, K, K), optional
        Transmission of a patterned aperture over the square from -1 to 1 aperture radii, in the orientation
        of the aperture; see :func:`bullseye`. Averaged over nine points per pixel.
    threshold : float
        Disks with fewer expected electrons are not drawn (with `electrons` given).

    Returns
    -------
    Tensor, shape (n, H, W), float32, expected electrons per pixel
    """
    n, k, _ = coefficients.shape
    height, width = shape
    device = coefficients.device
    dose = coefficients.new_ones(n) if electrons is None else electrons
    blur = coefficients.new_zeros(n) if edge_blur_px is None else edge_blur_px
    det = torch.linalg.det(matrix).abs()
    radius = det.rsqrt()  # of a circle with the disk's area, px
    square = matrix.square().sum((1, 2)) / 2
    largest = (square + (square.square() - det.square()).clamp_min(0).sqrt()).sqrt()  # singular value
    reach = largest / det  # longest half axis, px
    # polynomials over a square of half width `scale` px in detector orientation: then rows and columns
    # separate
    scale = DISK_MARGIN * radius
    change = _polynomial_change(matrix * (fraction * scale / DISK_MARGIN)[:, None, None]).to(torch.float32)
    local = torch.bmm(coefficients, change.transpose(1, 2))
    half = torch.ceil(reach + 0.71 + math.sqrt(3.0) * blur.clamp(min=_MIN_BLUR)).long()
    widths = torch.tensor(_HALF_WIDTHS, device=device)
    bucket = torch.searchsorted(widths, half)
    if int(bucket.max()) >= len(_HALF_WIDTHS):
        raise ValueError(f"a disk of radius {float(reach.max()):.0f} px is larger than {_HALF_WIDTHS[-1]} px")
    mean = (coefficients * mean_over_aperture(fraction)[:, None]).sum(-1)
    bright = mean * dose[:, None] > (threshold if electrons is not None else 0.0)
    margin = half[:, None].to(position.dtype)
    inside = (position > -margin[..., None]).all(-1)
    inside &= (position[..., 0] < height - 1 + margin) & (position[..., 1] < width - 1 + margin)
    visible = bright & inside
    triangle = torch.tensor([i * (DEGREE + 1) + j for i, j in _degrees()], device=device)
    patterned = None if transmission is None else (transmission != 1).flatten(1).any(1)  # (n,)
    frames = coefficients.new_zeros(n, height, width)
    for index in torch.unique(bucket).tolist():
        h = _HALF_WIDTHS[index]
        pad = 2 * h + 1
        members = torch.nonzero(bucket == index).squeeze(1)
        canvas_shape = (len(members), height + 2 * pad, width + 2 * pad)
        canvas = coefficients.new_zeros(canvas_shape)
        row, spot = torch.nonzero(visible[members], as_tuple=True)
        step = max(1, (_CHUNK if device.type == "cpu" else _CHUNK_GPU) // (2 * h + 1) ** 2)
        span = torch.arange(-h, h + 1, device=device)
        for start in range(0, len(row), step):
            r, j = row[start : start + step], spot[start : start + step]
            sample = members[r]
            centre = position[sample, j]
            base = centre.round().long()
            oy = span - (centre[:, :1] - base[:, :1])  # (m, b)
            ox = span - (centre[:, 1:] - base[:, 1:])
            inverse = 1 / scale[sample, None]
            ty = chebyshev_1d((oy * inverse).clamp_(-1.02, 1.02))  # (m, b, 9)
            tx = chebyshev_1d((ox * inverse).clamp_(-1.02, 1.02))
            grid = coefficients.new_zeros(len(r), (DEGREE + 1) ** 2)
            grid[:, triangle] = local[sample, j]
            grid = grid.reshape(-1, DEGREE + 1, DEGREE + 1)
            value = torch.bmm(torch.bmm(ty, grid), tx.transpose(1, 2)).clamp_(min=0)
            value *= disk_coverage(oy, ox, matrix[sample], blur[sample])
            value *= (dose * det / math.pi)[sample, None, None]
            if illumination is not None:
                slope = torch.einsum("mi,mij->mj", illumination[sample], matrix[sample])
                value *= 1 + slope[:, :1, None] * oy[:, :, None] + slope[:, 1:, None] * ox[:, None, :]
            if transmission is not None and patterned is not None and bool(patterned[sample].any()):
                some = patterned[sample]
                value[some] *= _pixel_transmission(
                    transmission[sample[some]], oy[some], ox[some], matrix[sample[some]]
                )
            corner = (r * canvas_shape[1] + base[:, 0] + pad - h) * canvas_shape[2] + base[:, 1] + pad - h
            box = span[:, None] * canvas_shape[2] + span + h * (canvas_shape[2] + 1)
            canvas.view(-1).index_add_(0, (corner[:, None, None] + box).reshape(-1), value.reshape(-1))
        frames[members] = canvas[:, pad:-pad, pad:-pad]
    return frames


def _pixel_transmission(transmission: Tensor, oy: Tensor, ox: Tensor, matrix: Tensor) -> Tensor:
    """Transmissions (m, K, K) averaged over pixels (m, b, b), nine points each: rings have sharp edges."""
    total = oy.new_zeros(len(oy), oy.shape[1], ox.shape[1])
    for dy in (-1 / 3, 0.0, 1 / 3):
        for dx in (-1 / 3, 0.0, 1 / 3):
            offset = torch.stack(torch.broadcast_tensors(oy[:, :, None] + dy, ox[:, None, :] + dx), dim=-1)
            place = torch.einsum("mij,mabj->mabi", matrix, offset)  # aperture units (y, x)
            total += F.grid_sample(
                transmission[:, None], place.flip(-1), padding_mode="border", align_corners=True
            )[:, 0]
    return total / 9


def blur_frames(
    frames: Tensor,
    *,
    psf_px: Tensor | None = None,
    tail: Tensor | None = None,
    tail_px: Tensor | None = None,
    loss: Tensor | None = None,
    loss_px: Tensor | None = None,
    cutoff_px: Tensor | None = None,
) -> Tensor:
    """Point spread of the detector and angular spread by inelastic scattering, one pass through Fourier
    space.

    Frames are taken as periodic: draw them with a margin of some PSF widths and cut it off afterwards.

    Parameters
    ----------
    psf_px : Tensor, shape (n,), optional
        Gaussian standard deviation, 0 to 1.5 px. A Timepix-type detector has 0.5 px at 100 keV and 1.0 px at
        200 keV beside the pixel itself, from its MTF at Nyquist of 0.16 and 0.005 (arXiv 2411.16258).
    tail, tail_px : Tensor, shape (n,), optional
        Share 0 to 0.1 of the signal in an exponential tail of 3 to 8 px: scintillator cameras.
    loss, loss_px, cutoff_px : Tensor, shape (n,), optional
        Share of electrons (0 to 0.4) spread by a Lorentzian 1/(q^2 + loss_px^2) cut off at `cutoff_px`:
        plasmons (theta_E 0.05 mrad at 200 kV; Beyer et al., Sci. Rep. 10 (2020) 17890) or, with 0.02 to 0.3
        1/angstrom, multiple losses.
    """
    height, width = frames.shape[-2:]
    transfer: Tensor | float = 1.0
    if loss is not None or tail is not None:
        y = torch.fft.fftfreq(height, 1 / height, device=frames.device)[:, None]
        x = torch.fft.fftfreq(width, 1 / width, device=frames.device)[None, :]
        r2 = y * y + x * x  # periodic distance from pixel 0, px^2
    if loss is not None:
        assert loss_px is not None
        assert cutoff_px is not None
        lorentz = 1 / (r2 + (loss_px**2)[:, None, None] + 1 / 12)  # 1/12: a pixel's own variance
        lorentz = lorentz * torch.exp(-((r2 / (cutoff_px**2)[:, None, None]) ** 2))
        transfer = _mix(lorentz, loss)
    if tail is not None:
        assert tail_px is not None
        transfer = transfer * _mix(torch.exp(-r2.sqrt() / tail_px[:, None, None]), tail)
    if psf_px is not None:
        fy = torch.fft.fftfreq(height, device=frames.device)
        fx = torch.fft.rfftfreq(width, device=frames.device)
        transfer = (
            transfer * _gaussian_transfer(fy, psf_px)[:, :, None] * _gaussian_transfer(fx, psf_px)[:, None, :]
        )
    return torch.fft.irfft2(torch.fft.rfft2(frames) * transfer, s=(height, width)).clamp_(min=0)


def _mix(kernel: Tensor, share: Tensor) -> Tensor:
    """Transfer function that spreads `share` (n,) by a sampled `kernel` (n, H, W)."""
    spread = torch.fft.rfft2(kernel / kernel.sum((1, 2), keepdim=True))
    return 1 + share[:, None, None] * (spread - 1)


def _gaussian_transfer(frequency: Tensor, sigma_px: Tensor) -> Tensor:
    """Transform of a sampled, hence positive, Gaussian: (n, f). Its aliases make it 1 for tiny sigma."""
    alias = torch.arange(-3, 4, device=frequency.device)
    exponent = -2 * math.pi**2 * (sigma_px**2)[:, None, None]
    series = torch.exp(exponent * (frequency[:, None] + alias) ** 2).sum(-1)
    return series / torch.exp(exponent[..., 0] * alias**2).sum(-1, keepdim=True)


def squared_distance(origin: Tensor, shape: tuple[int, int]) -> Tensor:
    """Squared distance of every pixel from `origin` (n, 2), px^2: shape (n, H, W)."""
    y = torch.arange(shape[0], device=origin.device) - origin[:, :1]
    x = torch.arange(shape[1], device=origin.device) - origin[:, 1:]
    return (y * y)[:, :, None] + (x * x)[:, None, :]


def thermal_background(distance2: Tensor, width_px: Tensor) -> Tensor:
    """Thermal diffuse scattering: a broad Gaussian of unit sum over the plane, shape (n, H, W).

    Width 0.6 to 1.1 1/angstrom, 1 to 10 % of the dose: frozen-phonon simulations of 20 nm Si [110] are fitted
    by 0.88 1/angstrom within 14 % between the disks and hold 3 % of the dose.
    """
    variance = (width_px**2)[:, None, None]
    return torch.exp(-distance2 / (2 * variance)) / (2 * math.pi * variance)


def lorentzian_background(distance2: Tensor, width_px: Tensor, cutoff_px: Tensor) -> Tensor:
    """Background 1/(q^2 + w^2) within `cutoff_px`, unit sum, width 0.02 to 0.3 1/angstrom: multiple diffuse
    losses."""
    w2, c2 = (width_px**2)[:, None, None], (cutoff_px**2)[:, None, None]
    profile = torch.where(distance2 < c2, 1 / (distance2 + w2), 0.0)
    return profile / (math.pi * torch.log1p(c2 / w2))


def amorphous_rings(
    distance2: Tensor,
    radius_px: Tensor,
    width_px: Tensor,
    generator: torch.Generator | None = None,
    speckle: float = 0.3,
) -> Tensor:
    """Halo of an amorphous layer, unit sum over the plane, with gamma-distributed speckle of relative rms
    `speckle`.

    Carbon films ring at 0.48 and 0.83 1/angstrom, silica at 0.25 to 0.3, widths 0.04 to 0.1; up to 15 % of
    the dose.
    """
    n, height, width = distance2.shape
    radius, spread = radius_px[:, None, None], width_px[:, None, None]
    ring = torch.exp(-((distance2.sqrt() - radius) ** 2) / (2 * spread**2))
    ring = ring / (2 * math.pi * math.sqrt(2 * math.pi) * radius * spread)
    if speckle > 0:
        coarse = torch.randn(n, 1, max(2, height // 6), max(2, width // 6), generator=generator).to(
            ring.device
        )
        smooth = torch.nn.functional.interpolate(
            coarse, size=(height, width), mode="bilinear", align_corners=False
        )
        ring = ring * torch.exp(speckle * smooth[:, 0] - speckle**2 / 4)
    return ring


def count_electrons(expected: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Poisson counts from expected electrons."""
    return torch.poisson(expected, generator=generator)


def add_hot_pixels(
    frames: Tensor, number: int, level: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Set `number` random pixels of each frame to up to `level` (n,) counts; 0 to 20 pixels, 1 to 100 times a
    disk."""
    n, height, width = frames.shape
    index = torch.randint(height * width, (n, number), generator=generator).to(frames.device)
    value = torch.rand(n, number, generator=generator).to(frames.device) * level[:, None]
    return frames.reshape(n, -1).scatter(1, index, value.round()).reshape(frames.shape)


def kill_pixels(frames: Tensor, fraction: float, generator: torch.Generator | None = None) -> Tensor:
    """Set a random `fraction` of the pixels, the same in all frames of a detector, to 0 (dead; up to
    1e-3)."""
    alive = torch.rand(frames.shape[-2:], generator=generator).to(frames.device) >= fraction
    return frames * alive


def saturate(frames: Tensor, ceiling: Tensor) -> Tensor:
    """Clip at `ceiling` (n,) counts: 5 to 100 % of the direct beam's peak, for cameras with few bits."""
    return torch.minimum(frames, ceiling[:, None, None])


def beam_stop(
    frames: Tensor, origin: Tensor, width_px: Tensor, angle: Tensor, transmission: Tensor
) -> Tensor:
    """A bar from the frame's edge to the direct beam: 1.2 to 3 disk diameters wide, 0 to 5 % transmission."""
    n, height, width = frames.shape
    y = torch.arange(height, device=frames.device)[None, :, None] - origin[:, 0, None, None]
    x = torch.arange(width, device=frames.device)[None, None, :] - origin[:, 1, None, None]
    sin, cos = torch.sin(angle)[:, None, None], torch.cos(angle)[:, None, None]
    along, across = y * sin + x * cos, (y * cos - x * sin).abs()
    half = width_px[:, None, None] / 2
    covered = (across < half) & ((along > 0) | (along**2 + across**2 < half**2))
    return torch.where(covered, frames * transmission[:, None, None], frames)


def bullseye(n_rings: int, *, fill: float = 0.5, size: int = 64, spokes: int = 0) -> Tensor:
    """Transmission (size, size) of a bullseye aperture: a central disk and rings, mean 1 over the aperture.

    For training: one to four rings, a twentieth of the samples (S. E. Zeltmann et al., Ultramicroscopy 209,
    112890 (2020), doi:10.1016/j.ultramic.2019.112890).

    Parameters
    ----------
    n_rings : int
        Opaque rings between centre and rim.
    fill : float
        Open share of each period along the radius.
    spokes : int
        Opaque bars that hold the rings, 0.08 radii wide.
    """
    grid = torch.linspace(-1, 1, size)
    y, x = grid[:, None], grid[None, :]
    rho = torch.hypot(y, x)
    period = 1 / (n_rings + fill / 2)  # the outermost ring ends at the rim
    soft = 2 / size  # a pixel of this image
    inner = rho.clamp(max=1 - fill * period / 4)  # open beyond the rim, so that it is cut by the disk alone
    phase = torch.remainder(inner + fill * period / 2, period) - fill * period / 2
    open_ = torch.sigmoid((fill * period / 2 - phase.abs()) / (0.5 * soft))
    for k in range(spokes):
        angle = math.pi * k / max(spokes, 1)
        across = (y * math.cos(angle) - x * math.sin(angle)).abs()
        open_ = open_ * torch.sigmoid((across - 0.04) / (0.5 * soft))
    return open_ / open_[rho <= 1].mean()


def module_gaps(frames: Tensor, first: Tensor, width: Tensor, axis: Tensor) -> Tensor:
    """Zero a band across each frame, as between the modules of a hybrid pixel detector.

    For training: 2 to 4 px wide, anywhere, a twentieth of the samples.

    Parameters
    ----------
    frames : Tensor, shape (n, H, W)
    first, width : Tensor, shape (n,)
        First row or column and number of them, px.
    axis : Tensor, shape (n,)
        0: rows, 1: columns.
    """
    height, width_px = frames.shape[1:]
    rows = torch.arange(height, device=frames.device)[None, :, None]
    columns = torch.arange(width_px, device=frames.device)[None, None, :]
    place = torch.where(axis[:, None, None] == 0, rows, columns)
    start = first[:, None, None]
    return torch.where((place >= start) & (place < start + width[:, None, None]), 0.0, frames)


def spread_counts(
    counts: Tensor, share: Tensor, generator: torch.Generator | None = None, *, binary: bool = False
) -> Tensor:
    """Let electrons trigger neighbouring pixels as well, as in thin counting detectors.

    For training: 0.2 to 0.6 of the electrons at 200 to 300 kV, patterns of at most 5e4 electrons.

    Parameters
    ----------
    counts : Tensor, shape (n, H, W)
        Whole numbers.
    share : Tensor, shape (n,)
        Mean number of neighbours an electron also triggers, 0 to 1; to the four sides alike.
    binary : bool
        Count a pixel at most once per frame.
    """
    out = counts.clone()
    for shift, axis in ((1, 1), (-1, 1), (1, 2), (-1, 2)):
        chance = (share / 4).clamp(0, 1)[:, None, None].expand_as(counts)
        side = torch.binomial(counts, chance, generator=generator)
        side = torch.roll(side, shift, dims=axis)
        side.select(axis, 0 if shift == 1 else -1).zero_()  # nothing comes in from the other border
        out += side
    return out.clamp(max=1) if binary else out


def change_contrast(frames: Tensor, gamma: Tensor) -> Tensor:
    """Raise intensities to a power (n,), keeping the brightest pixel; rounded: files saved for display.

    For training: powers of 0.25 to 1, a thirtieth of the samples.
    """
    top = frames.flatten(1).amax(1).clamp_min(1e-30)[:, None, None]
    return (top * (frames.clamp_min(0) / top) ** gamma[:, None, None]).round()

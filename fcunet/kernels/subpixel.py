"""Positions of correlation maxima between pixels: parabola, and upsampling of a band-limited image."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TAPS = 17
_WINDOW = 9  # points per axis looked at first
_RIDGE = 1e-9  # relative variance of the rounding of float32, which keeps the weights bounded


def parabola(patch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Vertex of a parabola through three points along each axis, and the height there.

    Parameters
    ----------
    patch : Tensor, shape (m, 3, 3)
        Neighbourhoods of m maxima, each higher than its two neighbours on at least one side of each axis.

    Returns
    -------
    dy, dx : Tensor, shape (m,)
        Offset of the vertex from the central pixel, -0.5 to 0.5 px.
    height : Tensor, shape (m,)
        Bilinear interpolation of the patch at that offset, which is how py4DSTEM defines the intensity.
    """
    centre = patch[:, 1, 1]
    dy = _vertex(patch[:, 0, 1], centre, patch[:, 2, 1])
    dx = _vertex(patch[:, 1, 0], centre, patch[:, 1, 2])
    m = torch.arange(len(patch), device=patch.device)
    y, x = 1 + dy.sign().long(), 1 + dx.sign().long()
    fy, fx = dy.abs(), dx.abs()
    height = (1 - fy) * ((1 - fx) * centre + fx * patch[m, 1, x])
    height += fy * ((1 - fx) * patch[m, y, 1] + fx * patch[m, y, x])
    return dy, dx, height


def interpolation_weights(power: Tensor, factor: int, oversampling: int = 1) -> Tensor:
    """Best linear interpolation between the pixels of a row, for images of known power spectrum.

    Weights with the least mean squared error, c = A^-1 b with the autocorrelation A between the pixels and b
    between them and the point: simple kriging. For the smooth correlation with a disk, 17 pixels are then
    as good as the Fourier sum over the whole frame; a windowed sinc of that length is ten times worse.

    Parameters
    ----------
    power : Tensor, shape (N,)
        Power spectrum along the axis, in the order of an FFT; any scale.
    factor : int
        Points per pixel, at least 3.
    oversampling : int
        Samples per pixel of the image that the weights are for.

    Returns
    -------
    Tensor, shape (points, taps), float32
        Row k is for the point (k - points // 2) / factor px from the central one of `taps` pixels, as far out
        as :func:`upsample` needs.
    """
    if factor < 3:
        raise ValueError(
            f"upsample_factor is {factor}, but must be at least 3; for less use subpixel='parabola'"
        )
    power = power.double().cpu()
    frequency = torch.fft.fftfreq(power.shape[0], dtype=torch.float64)
    last, taps = _last_point(factor), torch.arange(TAPS) - TAPS // 2
    # every distance is a whole number of these steps
    steps = torch.arange(TAPS * factor + last * oversampling, dtype=torch.float64)[:, None]
    cosines = torch.cos(2 * torch.pi / (factor * oversampling) * steps * frequency)
    autocorrelation = cosines @ (power / power.sum())

    between_taps = autocorrelation[(taps[:, None] - taps).abs() * factor]
    between_taps += _RIDGE * torch.eye(TAPS, dtype=torch.float64)
    points = torch.arange(-last, last + 1)
    to_points = autocorrelation[(taps[:, None] * factor - points * oversampling).abs()]
    return torch.linalg.solve(between_taps, to_points).T.float()


def upsample(
    image: Tensor,
    which: Tensor,
    y: Tensor,
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    *,
    weights: tuple[Tensor, Tensor],
    factor: int = 16,
    oversampling: int = 1,
) -> tuple[Tensor, Tensor]:
    """Highest point of periodic, band-limited images near given points, on a grid of 1 / `factor` px.

    The definition is that of Guizar-Sicairos, Thurman and Fienup, Opt. Lett. 33, 156 (2008),
    DOI 10.1364/OL.33.000156, as py4DSTEM applies it: around the start rounded to half a pixel, the image is
    evaluated on ceil(1.5 factor) points per axis, and a parabola through the highest point and its neighbours
    is added unless it lies on the border of that grid. The values are interpolated from the pixels around;
    py4DSTEM sums the Fourier series of the whole frame, which is fifty times the arithmetic.

    Parameters
    ----------
    image : Tensor, shape (n, H * oversampling, W * oversampling)
        Neither smoothed nor clipped.
    which, y, x : Tensor, shape (m,), int64
        Image, row and column of m maxima.
    dy, dx : Tensor, shape (m,)
        Where to start, relative to (y, x): -0.5 to 0.5 px.
    weights : pair of Tensor
        :func:`interpolation_weights` along y and along x, for the same factor and oversampling.
    factor : int
        Points per pixel, at least 3.
    oversampling : int
        Samples of `image` per pixel.

    Returns
    -------
    dy, dx : Tensor, shape (m,)
        Refined offset from (y, x), px.
    """
    square = crops(image, which, y * oversampling, x * oversampling, TAPS)
    return upsample_crops(square, y, x, dy, dx, weights=weights, factor=factor)


def upsample_crops(
    square: Tensor,
    y: Tensor,
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    *,
    weights: tuple[Tensor, Tensor],
    factor: int,
) -> tuple[Tensor, Tensor]:
    """:func:`upsample` from the pixels around each maximum, (m, taps, taps)."""
    size = math.ceil(1.5 * factor)
    first_y, first_x = _grid_start(y, dy, factor), _grid_start(x, dx, factor)
    # The image is smooth and the start is good: the highest point is looked for nearby, and in the whole grid
    # only where it turns out to lie on the border of this window.
    if len(square) == 0:
        return dy, dx
    near = min(_WINDOW, size)
    from_y = ((dy * factor).round().long() - first_y - near // 2).clamp(0, size - near)
    from_x = ((dx * factor).round().long() - first_x - near // 2).clamp(0, size - near)
    fine_y, fine_x, cut = _highest(square, first_y + from_y, first_x + from_x, near, weights, factor)
    if near < size and (cut := cut.nonzero()[:, 0]).numel():
        fine_y[cut], fine_x[cut], _ = _highest(square[cut], first_y[cut], first_x[cut], size, weights, factor)
    return fine_y, fine_x


def _highest(
    square: Tensor, first_y: Tensor, first_x: Tensor, size: int, weights: tuple[Tensor, Tensor], factor: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Highest of `size` x `size` points, refined by a parabola, and whether it lies on their border."""
    # two products with all points that may be needed, for all peaks at once, then a choice among their
    # columns: each peak is added up in the same order whatever its place in the batch
    last, m, taps = _last_point(factor), square.shape[0], square.shape[1]
    reach = min(math.ceil(factor / 2) + (last if size > _WINDOW else _WINDOW // 2), last)
    by_row, by_column = (w.to(square)[last - reach : last + reach + 1] for w in weights)
    steps = torch.arange(size, device=square.device) + reach
    along_x = F.linear(square.reshape(m * taps, taps), by_column).view(m, taps, 2 * reach + 1)
    chosen = (first_x[:, None] + steps)[:, None].expand(m, taps, size)
    lines = along_x.gather(2, chosen).transpose(1, 2).reshape(m * size, taps)
    along_y = F.linear(lines, by_row).view(m, size, 2 * reach + 1)
    chosen = (first_y[:, None] + steps)[:, None].expand(m, size, size)
    grid = along_y.gather(2, chosen).transpose(1, 2)  # (m, size, size)
    best = grid.flatten(1).argmax(1)
    iy, ix = best // size, best % size
    inside = (iy > 0) & (iy < size - 1) & (ix > 0) & (ix < size - 1)
    n = torch.arange(m, device=grid.device)
    jy, jx = iy.clamp(1, size - 2), ix.clamp(1, size - 2)
    vertex_y = _vertex(grid[n, jy - 1, jx], grid[n, jy, jx], grid[n, jy + 1, jx])
    vertex_x = _vertex(grid[n, jy, jx - 1], grid[n, jy, jx], grid[n, jy, jx + 1])
    fine_y = (first_y + iy + torch.where(inside, vertex_y, 0.0)) / factor
    fine_x = (first_x + ix + torch.where(inside, vertex_x, 0.0)) / factor
    return fine_y, fine_x, ~inside


def oversample(spectrum: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (n, 2 H, 2 W) with the values between the pixels, from the real FFT of images (n, H, W)."""
    height, width = size
    n, _, columns = spectrum.shape
    above, below = (height + 1) // 2, height // 2
    padded = spectrum.new_zeros((n, 2 * height, width + 1))
    padded[:, :above, :columns] = spectrum[:, :above]
    padded[:, -below:, :columns] = spectrum[:, -below:]
    if height % 2 == 0:  # the highest frequency stands for both signs
        padded[:, below, :columns] = padded[:, -below, :columns] / 2
        padded[:, -below, :columns] /= 2
    if width % 2 == 0:
        padded[:, :, columns - 1] /= 2
    padded.mul_(4)
    if padded.device.type != "cpu":
        return torch.fft.irfft2(padded, s=(2 * height, 2 * width))
    # one by one: how MKL rounds along columns depends on how many transforms it does at once
    return torch.stack([torch.fft.irfft2(one, s=(2 * height, 2 * width)) for one in padded])


def crops(image: Tensor, which: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """Squares of `size` (odd) pixels around (y, x), cut from periodic images (n, H, W): (m, size, size)."""
    width, half = image.shape[2], size // 2
    if image.device.type != "cpu" or not image.is_contiguous() or width < size:
        return _wrapped_crops(image, which, y, x, size)
    # line by line, three times as fast as pixel by pixel, where no line runs over the border
    wraps = (x < half) | (x >= width - half)
    if not wraps.any():
        return _whole_lines(image, which, y, x, size)
    out = image.new_empty((len(x), size, size))
    out[~wraps] = _whole_lines(image, which[~wraps], y[~wraps], x[~wraps], size)
    out[wraps] = _wrapped_crops(image, which[wraps], y[wraps], x[wraps], size)
    return out


def _whole_lines(image: Tensor, which: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    _, height, width = image.shape
    rows = (y[:, None] + torch.arange(-(size // 2), size - size // 2)) % height + which[:, None] * height
    first = rows * width + (x - size // 2)[:, None]
    lines = image.view(-1).unfold(0, size, 1)  # (n H W - size + 1, size), no copy
    return lines.index_select(0, first.flatten()).view(-1, size, size)


def _wrapped_crops(image: Tensor, which: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    _, height, width = image.shape
    steps = torch.arange(size, device=image.device) - size // 2
    rows = (y[:, None] + steps) % height + which[:, None] * height
    columns = (x[:, None] + steps) % width
    kind = torch.int32 if image.numel() < 2**31 else torch.int64  # the short one is twice as fast
    pixel = (rows * width).to(kind)[:, :, None] + columns.to(kind)[:, None, :]
    return image.reshape(-1).index_select(0, pixel.flatten()).view(pixel.shape)


def _vertex(before: Tensor, at: Tensor, after: Tensor) -> Tensor:
    """Offset of the vertex of the parabola through three points; 0 where they lie on a line."""
    bend = 4 * at - 2 * after - 2 * before
    return torch.where(bend > 0, (after - before) / bend, 0.0)


def _grid_start(position: Tensor, offset: Tensor, factor: int) -> Tensor:
    """First grid point, in steps of 1 / factor px from the pixel `position`; rounding as py4DSTEM does it."""
    half_pixel = (2 * (position + offset.double())).round() / 2
    return (half_pixel * factor).round().long() - position * factor - math.ceil(1.5 * factor) // 2


def _last_point(factor: int) -> int:
    """Outermost grid point on either side of a pixel, in steps of 1 / factor px."""
    return math.ceil(factor / 2) + math.ceil(1.5 * factor) // 2

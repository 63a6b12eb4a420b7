"""py4DSTEM's definition of disk detection, spelt out pixel by pixel for one pattern in float64."""

import math

import numpy as np
from scipy.ndimage import gaussian_filter


def naive_maxima(
    image,
    *,
    edge_boundary,
    min_absolute_intensity,
    min_relative_intensity,
    relative_to_peak,
    min_peak_spacing,
    max_num_peaks,
):
    """Maxima of one image, pixel by pixel: (row, column, height), highest first."""
    b = max(edge_boundary, 1)
    found = []
    for y in range(b, image.shape[0] - b):
        for x in range(b, image.shape[1] - b):
            value = image[y, x]
            before = [image[y - 1, x], image[y - 1, x - 1], image[y, x - 1], image[y + 1, x - 1]]
            after = [image[y + 1, x], image[y + 1, x + 1], image[y, x + 1], image[y - 1, x + 1]]
            if all(value > v for v in before) and all(value >= v for v in after):
                found.append((value, y, x))
    found.sort(reverse=True)
    if min_absolute_intensity > 0:
        found = [f for f in found if f[0] >= min_absolute_intensity]
    if min_relative_intensity > 0 and len(found) > relative_to_peak:
        reference = found[relative_to_peak][0]
        found = [f for f in found if f[0] / reference >= min_relative_intensity]
    kept = []
    for f in found:
        if all((f[1] - k[1]) ** 2 + (f[2] - k[2]) ** 2 >= min_peak_spacing**2 for k in kept):
            kept.append(f)
    return [(y, x, value) for value, y, x in kept[:max_num_peaks]]


def vertex(low, mid, high):
    """Offset of the vertex of a parabola through three points."""
    return (high - low) / (4 * mid - 2 * low - 2 * high)


def fourier_upsample(spectrum, start, factor):
    """Highest point of the Fourier series of `spectrum` near `start`, on a grid of 1 / factor px."""
    size = math.ceil(1.5 * factor)
    axes, first = [], []
    for n, position in zip(spectrum.shape, start, strict=True):
        first.append(np.round(np.round(2 * position) / 2 * factor) - size // 2)
        points = (first[-1] + np.arange(size)) / factor
        axes.append(np.exp(2j * np.pi * np.outer(points, np.fft.fftfreq(n))) / n)
    grid = (axes[0] @ spectrum @ axes[1].T).real
    best = np.array(np.unravel_index(grid.argmax(), grid.shape))
    shift = np.zeros(2)
    if ((best > 0) & (best < size - 1)).all():
        for axis in (0, 1):
            step = np.eye(2, dtype=int)[axis]
            shift[axis] = vertex(*(grid[tuple(best + s * step)] for s in (-1, 0, 1)))
    return (first + best + shift) / factor


def naive_disks(
    pattern, kernel, *, corr_power, sigma_cc, sigma_dp, transform, subpixel, upsample_factor, **criteria
):
    """Peaks of one pattern as rows (y, x, intensity), brightest first."""
    image = {"none": lambda v: v, "sqrt": np.sqrt, "log": np.log1p}[transform](pattern.astype(float))
    if sigma_dp > 0:
        image = gaussian_filter(image, sigma_dp)
    m = np.fft.fft2(image) * np.conj(np.fft.fft2(kernel))
    m = np.abs(m) ** corr_power * np.exp(1j * np.angle(m))
    smooth = np.maximum(np.fft.ifft2(m).real, 0)
    if sigma_cc > 0:
        smooth = gaussian_filter(smooth, sigma_cc)
    peaks = []
    for y, x, height in naive_maxima(smooth, **criteria):
        position = np.array([y, x], float)
        if subpixel != "pixel":
            position[0] += vertex(smooth[y - 1, x], smooth[y, x], smooth[y + 1, x])
            position[1] += vertex(smooth[y, x - 1], smooth[y, x], smooth[y, x + 1])
            (y0, x0), (fy, fx) = np.floor(position).astype(int), position - np.floor(position)
            rows = (1 - fy) * smooth[y0] + fy * smooth[y0 + 1]
            height = (1 - fx) * rows[x0] + fx * rows[x0 + 1]
        if subpixel == "upsampled":
            position = fourier_upsample(m, position, upsample_factor)
        peaks.append((*position, height))
    return np.array(sorted(peaks, key=lambda p: -p[2])).reshape(-1, 3)

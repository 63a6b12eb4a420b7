"""Shape of the diffraction disks: find round disks of unknown size, fit radius and edge, draw a probe.

NumPy and SciPy on single images; positions are (y, x) in px, pixel centres at integers. Disks are recognised
by their edge, never by their interior, which dynamical scattering fills with bright rims and dark cores.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft as sfft
from scipy import ndimage as ndi
from scipy.optimize import least_squares
from scipy.special import erfc

Array = NDArray[np.float64]

MIN_RADIUS_PX = 1.0
PIXEL_SIGMA = 1 / math.sqrt(12)  # standard deviation of a square pixel: no measured edge is sharper


class Disks(NamedTuple):
    """Disks of one image, strongest edge first; `position` (n, 2) and the rest (n,)."""

    position: Array
    response: Array  # mean inside the edge minus mean outside, in the image's own scale
    intensity: Array  # sum over the disk above its surroundings, in the image's own scale


class SizedDisks(NamedTuple):
    """Disks of unknown size in one image, strongest first; `position` (n, 2) to a pixel, the rest (n,)."""

    position: Array
    radius: Array
    score: Array  # clearness of the edge all around, in the stabilised scale
    significance: Array  # response over its noise


class DiskFit(NamedTuple):
    """One blurred disk fitted to an image."""

    centre: tuple[float, float]
    radius_px: float
    edge_sigma_px: float
    amplitude: float  # mean height just inside the edge, above the background
    background: float
    snr: float  # amplitude over the standard deviation of the residual


def synthetic_probe(
    shape: tuple[int, int],
    radius_px: float,
    edge_sigma_px: float,
    centre: tuple[float, float] | None = None,
    distortion: NDArray | None = None,
) -> NDArray[np.float32]:
    """A round disk with a Gaussian-blurred edge, the probe to use where none was recorded.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns of the detector.
    radius_px, edge_sigma_px : float
        Radius where the intensity is half, and standard deviation of the blur, px.
    centre : tuple of float, optional
        (y, x) of the disk; default ``(rows // 2, columns // 2)``.
    distortion : ndarray, shape (2, 2), optional
        What the detector makes of a round disk, axes (y, x): ``measured = distortion @ true``.

    Returns
    -------
    ndarray, shape `shape`, float32
        Sum 1, peak in the middle; ``erfc((r - R) / (sigma sqrt 2)) / 2``.

    Raises
    ------
    ValueError
        If the radius or the edge is not a positive number, or the disk misses the frame.
    """
    if not (
        math.isfinite(radius_px) and radius_px > 0 and math.isfinite(edge_sigma_px) and edge_sigma_px > 0
    ):
        raise ValueError(
            f"a probe needs a positive radius and edge, got radius {radius_px}, edge {edge_sigma_px} px"
        )
    cy, cx = (shape[0] // 2, shape[1] // 2) if centre is None else centre
    y, x = np.arange(shape[0])[:, None] - cy, np.arange(shape[1])[None] - cx
    (a, b), (c, d) = np.eye(2) if distortion is None else np.linalg.inv(distortion)
    r = np.hypot(a * y + b * x, c * y + d * x)
    probe = erfc((r - radius_px) / (edge_sigma_px * math.sqrt(2))) / 2
    total = probe.sum()
    if total <= 0:
        raise ValueError(
            f"a disk of radius {radius_px} px at {(cy, cx)} lies outside a detector of {shape} px"
        )
    return (probe / total).astype(np.float32)


def stabilise(image: NDArray) -> Array:
    """Square root above a noise floor: makes the noise of counts even, so that weak disks count as well."""
    image = np.asarray(image, dtype=float)
    value = image[np.isfinite(image)]
    if not value.size:
        return image
    low = min(0.0, float(np.percentile(value, 1)))
    step = np.diff(image, axis=-1)
    noise = 1.4826 * float(np.median(np.abs(step[np.isfinite(step)]))) / math.sqrt(2) if step.size else 0.0
    floor = max(noise, 1e-6 * float(np.ptp(value))) or 1.0
    return np.sqrt(np.clip(image - low, 0, None) + floor)


def _edge_kernels(shape: tuple[int, int], radius: float, width: float) -> tuple[Array, Array]:
    """Transforms of two rings of weights, sum 1, centred at [0, 0]: inside a circle, and outside it."""
    r = np.hypot(sfft.fftfreq(shape[0], 1 / shape[0])[:, None], sfft.fftfreq(shape[1], 1 / shape[1])[None])
    t = (r - radius) / width
    k = -t * np.exp(-0.5 * t * t)
    inside, outside = np.clip(k, 0, None), np.clip(-k, 0, None)
    return sfft.rfft2(inside / inside.sum()).conj(), sfft.rfft2(outside / outside.sum()).conj()


def edge_response(images: NDArray, radii_px: Array, *, width_px: float | None = None) -> Array:
    """Mean just inside a circle minus mean just outside, about every pixel.

    Parameters
    ----------
    images : ndarray, shape (n, qy, qx)
        Pixels that are NaN are left out of the means.
    radii_px : ndarray, shape (m,)
        Radii of the circles.
    width_px : float, optional
        Width of the two rings; default a fifth of the radius, at least 0.7 px. The width of the edge
        is best for an accurate centre, a wider one for a disk whose radius is not known yet.

    Returns
    -------
    ndarray, shape (m, n, qy, qx)
        In the scale of `images`; zero for a flat image and where less than half of a ring is seen,
        and the height of the step at the centre of a disk.
    """
    images = np.asarray(images, dtype=float)
    seen = np.isfinite(images)
    same = bool((seen == seen[:1]).all())  # one mask for all patterns is the rule: bad pixels
    level = np.array([np.median(v[s]) if s.any() else 0.0 for v, s in zip(images, seen, strict=True)])
    level = level[:, None, None]
    rows, columns = images.shape[1:]
    pad = math.ceil(2 * float(np.max(radii_px)))
    shape = (sfft.next_fast_len(rows + pad, True), sfft.next_fast_len(columns + pad, True))
    image = sfft.rfft2(np.where(seen, images - level, 0.0), shape)
    mask = sfft.rfft2((seen[:1] if same else seen).astype(float), shape)
    out = np.empty((len(radii_px), *images.shape))
    for i, radius in enumerate(radii_px):
        width = max(0.7, 0.2 * radius) if width_px is None else width_px
        means, weights = [], []
        for kernel in _edge_kernels(shape, radius, width):
            weight = sfft.irfft2(mask * kernel, shape)[:, :rows, :columns]
            total = sfft.irfft2(image * kernel, shape)[:, :rows, :columns]
            means.append(total / np.maximum(weight, 0.1))
            weights.append(weight)
        out[i] = np.where(np.minimum(*weights) > 0.5, means[0] - means[1], 0.0)
    return out


def _edge_of_sectors(
    image: Array, centre: tuple[float, float], radii: Array, n_angles: int = 24
) -> tuple[float, float]:
    """Radius with the clearest edge all around `centre`, and its score (a low quantile over the angles)."""
    step = 0.5
    r = np.arange(0, 1.25 * radii[-1] + 2, step)
    phi = np.arange(n_angles)[:, None] * (2 * math.pi / n_angles)
    where = np.stack([centre[0] + r * np.sin(phi), centre[1] + r * np.cos(phi)])
    polar = ndi.map_coordinates(image, where, order=1, mode="constant", cval=np.nan)  # (angle, r)
    # running sums: the mean over any piece of a ray is one difference; NaN beyond the border spreads outwards
    total = np.concatenate([np.zeros((n_angles, 1)), np.cumsum(polar, axis=1)], axis=1)
    width = np.maximum(1.0, 0.2 * radii)
    i0, i1, i2 = (
        np.clip(np.rint(v / step).astype(int), 0, len(r) - 2) for v in (radii - width, radii, radii + width)
    )
    inner = (total[:, i1] - total[:, i0]) / np.maximum(i1 - i0, 1)
    outer = (total[:, i2 + 1] - total[:, i1 + 1]) / np.maximum(i2 - i1, 1)
    drop = inner - outer  # (angle, radius)
    seen = np.isfinite(drop).sum(0)
    low = np.sort(drop, axis=0)[
        (0.3 * np.maximum(seen - 1, 0)).astype(int), np.arange(len(radii))
    ]  # NaN sort last
    score = np.where(seen >= 0.6 * n_angles, low * np.sqrt(radii), -math.inf)
    best = int(score.argmax())
    return float(radii[best]), float(score[best])


def response_noise(response: Array) -> float:
    """Robust spread of a response map; with a floor, for sparse counts most of whose responses are equal."""
    value = response[response != 0]
    if not value.size:
        return 1e-12
    return max(1.4826 * float(np.median(np.abs(value - np.median(value)))), 0.33 * float(value.std()), 1e-12)


# large circles are looked for in binned images: (binning, radii from, to)
_LEVELS = ((1, 0.0, 8.0), (2, 8.0, 20.0), (4, 20.0, math.inf))


def _binned(images: Array, step: int) -> Array:
    """Mean over squares of `step` px, NaN left out; what does not fill a square is cut off."""
    if step == 1:
        return images
    n, rows, columns = images.shape
    squares = images[:, : rows // step * step, : columns // step * step]
    squares = squares.reshape(n, rows // step, step, columns // step, step)
    seen = np.isfinite(squares)
    count = seen.sum((2, 4))
    return np.where(count > 0, np.where(seen, squares, 0).sum((2, 4)) / np.maximum(count, 1), np.nan)


def _strong_edges(
    images: Array, radii: Array, step: int, count: int
) -> list[list[tuple[float, float, float, float]]]:
    """Per image the strongest circles of each radius: height, y, x (px before binning), height over noise."""
    response = edge_response(images, radii / step) * np.sqrt(radii)[:, None, None, None]
    out: list[list[tuple[float, float, float, float]]] = [[] for _ in images]
    for layers, radius in zip(response, radii, strict=True):
        size = 2 * max(1, round(0.5 * radius / step)) + 1
        for layer, found in zip(layers, out, strict=True):
            noise = response_noise(layer)
            y, x = np.nonzero((layer == ndi.maximum_filter(layer, size)) & (layer > 5 * noise))
            for j in np.argsort(-layer[y, x])[:count]:
                height = float(layer[y[j], x[j]])
                at = [float(step * v[j] + (step - 1) / 2) for v in (y, x)]
                found.append((height, at[0], at[1], height / noise))
    return out


def find_disks_of_any_size(images: NDArray, *, max_disks: int = 12) -> list[SizedDisks]:
    """Round disks of unknown radius in each image.

    Circles of all sizes are tried about every pixel; the strongest edges, weighted by the square root of the
    radius (the signal to noise ratio of an edge of that length), are looked at again sector by sector, so
    that a halo, or a ring of disks, does not pass for a disk.

    Parameters
    ----------
    images : ndarray, shape (n, qy, qx)
        Patterns or, better, sums of similar ones; NaN where a pixel is bad.
    max_disks : int
        Per image.

    Returns
    -------
    list of SizedDisks
        One per image, strongest first, radii to 10 % (25 % below 4 px); none overlaps a stronger one.
    """
    images = np.stack([stabilise(image) for image in images])
    largest = max(min(images.shape[1:]) / 3, 1.5)
    radii = np.geomspace(1.3, largest, max(4, math.ceil(math.log(largest / 1.3) / 0.13)))
    levels = [
        (step, _binned(images, step), radii[(radii >= low) & (radii < high)]) for step, low, high in _LEVELS
    ]
    found_at = [_strong_edges(binned, some, step, max_disks) for step, binned, some in levels if len(some)]
    out = []
    for n, image in enumerate(images):
        candidates = [c for level in found_at for c in level[n]]
        candidates.sort(reverse=True)
        filled = np.where(np.isfinite(image), image, np.nanmedian(image))
        found = []
        for _, y0, x0, z in candidates[: 4 * max_disks]:
            radius, score = _edge_of_sectors(filled, (y0, x0), radii)
            if score > 0:
                found.append((score, radius, y0, x0, z))
        found.sort(reverse=True)
        kept: list[tuple[float, float, float, float, float]] = []
        for disk in found:
            if all(math.hypot(disk[2] - k[2], disk[3] - k[3]) > 1.2 * max(disk[1], k[1]) for k in kept):
                kept.append(disk)
        table = np.array(kept[:max_disks], dtype=float).reshape(-1, 5)
        out.append(SizedDisks(table[:, 2:4], table[:, 1], table[:, 0], table[:, 4]))
    return out


def vote_radius(disks: list[SizedDisks]) -> tuple[float, float]:
    """The radius most disks have, weighted by their strength squared, and how clear the clearest is.

    NaN and 0 if there is no disk.
    """
    radius = np.concatenate([d.radius for d in disks])
    score = np.concatenate([d.score for d in disks])
    if not len(radius):
        return math.nan, 0.0
    strong = score >= 0.3 * score.max()
    significance = float(np.concatenate([d.significance for d in disks])[strong].max())
    return weighted_quantile(radius[strong], score[strong] ** 2, 0.5), significance


def weighted_quantile(values: Array, weights: Array, q: float) -> float:
    """The value below which the share `q` of the weight lies."""
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][min(np.searchsorted(cumulative, q * cumulative[-1]), len(values) - 1)])


def find_disks_by_edge(
    image: NDArray,
    radius_px: float,
    *,
    response: NDArray | None = None,
    max_disks: int = 40,
    threshold: float = 6.0,
) -> Disks:
    """Disks of a known radius, by their edge, to a few tenths of a px: for calibration, not for strain.

    Parameters
    ----------
    image : ndarray, shape (qy, qx)
        One pattern, finite.
    radius_px : float
        Radius of the disks.
    response : ndarray, shape (qy, qx), optional
        Its `edge_response` after `stabilise`, if at hand.
    max_disks : int
        At most so many, strongest first.
    threshold : float
        Least response, in robust standard deviations of the response map.
    """
    image = np.asarray(image, dtype=float)
    if response is None:
        response = edge_response(stabilise(image)[None], np.array([radius_px]))[0, 0]
    size = 2 * max(1, math.floor(0.75 * radius_px)) + 1
    peak = (response == ndi.maximum_filter(response, size)) & (
        response > threshold * response_noise(response)
    )
    y, x = np.nonzero(peak)
    order = np.argsort(-response[y, x])[:max_disks]
    y, x = y[order], x[order]
    position = np.stack([y, x], axis=1) + _parabola(response, y, x)
    intensity = np.array([disk_sum(image, (p[0], p[1]), radius_px) for p in position])
    return Disks(position.astype(float), response[y, x], intensity)


def _parabola(image: Array, y: NDArray, x: NDArray) -> Array:
    """Sub-pixel offset of each maximum, three points per axis; zero at the border."""
    offset = np.zeros((len(y), 2))
    for axis, (p, n) in enumerate(((y, image.shape[0]), (x, image.shape[1]))):
        inner = (p > 0) & (p < n - 1)
        step = (1, 0) if axis == 0 else (0, 1)
        a = image[y[inner] - step[0], x[inner] - step[1]]
        b = image[y[inner], x[inner]]
        c = image[y[inner] + step[0], x[inner] + step[1]]
        bend = a - 2 * b + c
        offset[inner, axis] = np.where(bend < 0, 0.5 * (a - c) / np.where(bend < 0, bend, -1), 0).clip(
            -0.5, 0.5
        )
    return offset


def _window(shape: tuple[int, ...], centre: tuple[float, float], reach: float) -> tuple[slice, slice]:
    rows, columns = (
        slice(max(0, math.floor(c - reach)), min(n, math.ceil(c + reach) + 1))
        for c, n in zip(centre, shape, strict=True)
    )
    return rows, columns


def disk_sum(image: NDArray, centre: tuple[float, float], radius_px: float) -> float:
    """Sum inside the disk above the median of a ring around it; NaN if the frame holds none of the ring."""
    window = _window(image.shape, centre, 1.8 * radius_px + 3)
    y, x = np.mgrid[window]
    r = np.hypot(y - centre[0], x - centre[1])
    part = np.asarray(image[window], dtype=float)
    inside, ring = r <= radius_px + 0.5, (r > 1.2 * radius_px + 1) & (r <= 1.8 * radius_px + 3)
    if not ring.any() or not inside.any():
        return math.nan
    return float((part[inside] - np.median(part[ring])).sum())


def fit_disk(
    image: NDArray,
    centre: tuple[float, float],
    radius_px: float,
    *,
    mask: NDArray[np.bool_] | None = None,
    reach_px: float | None = None,
) -> DiskFit | None:
    """Fit centre, radius and edge width of one disk.

    The model is a disk with a Gaussian-blurred edge times a smooth interior (a quadratic in the position,
    so that a bright rim, a dark core or a slope does not move the edge) on a background that falls off
    linearly with the distance. The linear parameters are solved for exactly at each step (variable
    projection), the four others by least squares with a robust loss; pixels near the edge weigh most.

    Parameters
    ----------
    image : ndarray, shape (qy, qx)
    centre, radius_px : starting values, px
    mask : ndarray of bool, shape (qy, qx), optional
        True = do not use (bad or saturated pixels).
    reach_px : float, optional
        Use pixels to this distance from the centre; give half the distance to the next disk or so.

    Returns
    -------
    DiskFit or None
        None where the fit does not converge to a bright disk near the start.
    """
    reach = min(reach_px or math.inf, 1.7 * radius_px + 3)
    window = _window(image.shape, centre, reach)
    y, x = (v.astype(float) for v in np.mgrid[window])
    use = (np.hypot(y - centre[0], x - centre[1]) <= reach) & np.isfinite(image[window])
    if mask is not None:
        use &= ~mask[window]
    y, x, value = y[use], x[use], np.asarray(image[window], dtype=float)[use]
    scale = float(np.ptp(value)) if value.size else 0.0
    if value.size < 16 or scale <= 0:
        return None
    value = value / scale
    start = np.hypot(y - centre[0], x - centre[1])
    weight = np.exp(-0.5 * ((start - radius_px) / max(1.5, 0.4 * radius_px)) ** 2) + 0.05
    textured = radius_px >= 4

    def design(p: Array) -> Array:
        dy, dx = y - p[0], x - p[1]
        r = np.hypot(dy, dx)
        disk = erfc((r - p[2]) / (p[3] * math.sqrt(2))) / 2
        u = (r / p[2]) ** 2
        columns = [np.ones_like(r), r / reach, disk, disk * (u - 1)]
        if textured:
            ny, nx = dy / p[2], dx / p[2]
            columns += [disk * ny, disk * nx, disk * ny * nx, disk * (ny**2 - nx**2)]
        return np.stack(columns, axis=1)

    def solve(p: Array) -> tuple[Array, Array]:
        a = design(p)
        coefficients, *_ = np.linalg.lstsq(a * weight[:, None], value * weight, rcond=None)
        return coefficients, (a @ coefficients - value) * weight

    slack = 0.5 * radius_px + 1
    low = np.array([centre[0] - slack, centre[1] - slack, 0.5 * radius_px, PIXEL_SIGMA])
    high = np.array([centre[0] + slack, centre[1] + slack, 1.6 * radius_px + 0.5, max(1.5, 0.4 * radius_px)])
    first = np.array([*centre, radius_px, min(0.7, float(high[3]) / 2)])
    fit = least_squares(
        lambda p: solve(p)[1], first, bounds=(low, high), loss="soft_l1", f_scale=0.1, max_nfev=60
    )
    coefficients, residual = solve(fit.x)
    amplitude = float(coefficients[2])
    on_bound = np.any(np.isclose(fit.x[:3], low[:3], atol=1e-3) | np.isclose(fit.x[:3], high[:3], atol=1e-3))
    if not fit.success or amplitude <= 0 or on_bound:
        return None
    noise = float(np.sqrt(np.sum(residual**2) / np.sum(weight**2))) or 1e-9
    return DiskFit(
        (float(fit.x[0]), float(fit.x[1])),
        float(fit.x[2]),
        float(fit.x[3]),
        amplitude * scale,
        float(coefficients[0]) * scale,
        amplitude / noise,
    )


def disk_profiles(
    image: NDArray,
    positions: NDArray,
    radius_px: float,
    *,
    mask: NDArray[np.bool_] | None = None,
    step: float = 0.25,
) -> tuple[Array, Array]:
    """Mean intensity about each disk against the distance from its centre, background 0 and mean height 1.

    Returns
    -------
    profile, count : ndarray, shape (n, bins)
        Bin i covers ``[i, i + 1) * step`` px; `profile` is 0 where `count` (pixels) is 0. Disks that
        do not stand out of their surroundings have no counts.
    """
    reach = 1.7 * radius_px + 3
    bins = math.ceil(reach / step)
    profile, count = np.zeros((len(positions), bins)), np.zeros((len(positions), bins))
    for i, (cy, cx) in enumerate(positions):
        window = _window(image.shape, (cy, cx), reach)
        y, x = np.mgrid[window]
        r = np.hypot(y - cy, x - cx)
        use = (r < reach) & np.isfinite(image[window])
        if mask is not None:
            use &= ~mask[window]
        r, value = r[use], np.asarray(image[window], dtype=float)[use]
        ring, inside = r > 1.3 * radius_px + 1.5, r < radius_px
        if not ring.any() or not inside.any():
            continue
        background = float(np.median(value[ring]))
        height = float(value[inside].mean()) - background
        if height <= 0:
            continue
        index = np.minimum((r / step).astype(int), bins - 1)
        count[i] = np.bincount(index, minlength=bins)
        profile[i] = np.bincount(index, (value - background) / height, minlength=bins)
        profile[i] /= np.maximum(count[i], 1)
    return profile, count


def fit_profile(profile: Array, count: Array, radius_px: float, *, step: float = 0.25) -> tuple[float, float]:
    """Radius and edge width, px, of a flat disk with blurred edge on a sloping background, from a profile.

    The interior is taken as flat: the mean over many disks, each dark somewhere else, nearly is.
    """
    good = count > 0
    r = ((np.arange(len(profile)) + 0.5) * step)[good]
    value = profile[good]
    weight = np.sqrt(count[good]) * (np.exp(-0.5 * ((r - radius_px) / max(1.5, 0.4 * radius_px)) ** 2) + 0.05)

    def residual(p: Array) -> Array:
        disk = erfc((r - p[0]) / (p[1] * math.sqrt(2))) / 2
        a = np.stack([np.ones_like(r), r, disk], axis=1) * weight[:, None]
        return a @ np.linalg.lstsq(a, value * weight, rcond=None)[0] - value * weight

    bounds = ([0.4 * radius_px, PIXEL_SIGMA], [1.7 * radius_px, max(0.8, 0.4 * radius_px)])
    fit = least_squares(residual, [radius_px, min(0.7, bounds[1][1] / 2)], bounds=bounds)
    return float(fit.x[0]), float(fit.x[1])

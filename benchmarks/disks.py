"""Flat disks on a strained lattice, with exact truth: the case in which all detectors should agree."""

from typing import NamedTuple

import numpy as np
from scipy.special import erfc


class DiskScan(NamedTuple):
    """A simulated scan; vectors are (y, x), px."""

    patterns: np.ndarray  # (scan_y, scan_x, qy, qx) float32 counts
    probe: np.ndarray  # (qy, qx) float32, centred at size // 2
    positions: np.ndarray  # (scan_y, scan_x, disks, 2), NaN where a disk would leave the frame
    F: np.ndarray  # (scan_y, scan_x, 2, 2) deformation gradient, axes (y, x)
    g_ref: np.ndarray  # (2, 2) rows g1, g2
    electrons: np.ndarray  # (scan_y, scan_x, disks) expected in each disk, NaN where it would leave the frame


def disk(shape, centre, radius_px, edge_px):
    """Disk of height 1 with a Gaussian-blurred edge (standard deviation `edge_px`)."""
    y, x = np.indices(shape, sparse=True)
    distance = np.hypot(y - centre[0], x - centre[1])
    return 0.5 * erfc((distance - radius_px) / (edge_px * np.sqrt(2)))


def simulate_disks(
    scan=(6, 8),
    size=(256, 256),
    *,
    radius_px=9.0,
    edge_px=0.8,
    spacing_px=30.5,
    max_strain=0.02,
    electrons=1e5,
    background=0.0,
    noise=True,
    seed=0,
) -> DiskScan:
    """Patterns of an oblique lattice; strain components and rotation vary smoothly up to `max_strain`.

    The first two columns of the scan are unstrained. Brightness falls over three decades from the direct beam
    outwards. `electrons` is the sum of a pattern without `background` (electrons per px).
    """
    rng = np.random.default_rng(seed)
    angle = np.deg2rad(11.0)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    g_ref = spacing_px * np.array([[0.05, 1.0], [1.12, 0.1]]) @ turn
    h, k = (a.ravel() for a in np.mgrid[-12:13, -12:13])
    order = np.hypot(h, k)
    brightness = np.where(order == 0, 3.0, np.exp(-order / 1.2) * rng.lognormal(0, 0.6, order.shape))
    brightness = np.maximum(brightness, 3e-3)

    y, x = np.meshgrid(np.linspace(0, 1, scan[0]), np.linspace(0, 1, scan[1]), indexing="ij")
    waves = [np.sin(2 * np.pi * (a * y + b * x) + c) for a, b, c in rng.uniform(0.3, 1.0, (4, 3))]
    F = np.eye(2) + max_strain * np.stack(waves, -1).reshape(*scan, 2, 2)
    F[:, :2] = np.eye(2)
    origin = (np.array(size) // 2) + rng.uniform(-0.5, 0.5, (*scan, 1, 2))
    positions = origin + np.stack([h, k], 1) @ (g_ref @ np.linalg.inv(F))

    reach = int(np.ceil(radius_px + 5 * edge_px)) + 1
    patterns = np.zeros((*scan, *size))
    inside = ((positions > reach) & (positions < np.array(size) - 1 - reach)).all(-1)
    positions[~inside] = np.nan
    square = (2 * reach + 1, 2 * reach + 1)
    for i, j, n in np.argwhere(inside):
        corner = np.round(positions[i, j, n]).astype(int) - reach
        window = (slice(corner[0], corner[0] + square[0]), slice(corner[1], corner[1] + square[1]))
        patterns[i, j][window] += brightness[n] * disk(
            square, positions[i, j, n] - corner, radius_px, edge_px
        )
    share = np.where(inside, brightness, np.nan)
    share /= np.nansum(share, axis=-1, keepdims=True)
    patterns *= electrons / patterns.sum((2, 3), keepdims=True)
    patterns += background
    if noise:
        patterns = rng.poisson(patterns)
    probe = disk(size, (size[0] // 2, size[1] // 2), radius_px, edge_px)
    images = patterns.astype(np.float32), probe.astype(np.float32)
    return DiskScan(*images, positions, F, g_ref, electrons * share)

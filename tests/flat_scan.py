"""A tiny scan of flat disks on a strained square lattice, drawn without physics, to test the plumbing."""

import numpy as np
import xarray as xr

SCAN, FRAME, RADIUS, SPACING = (6, 10), 64, 3.0, 12.0


def draw_probe(frame: int = FRAME) -> np.ndarray:
    """One disk with a soft edge at (frame // 2, frame // 2)."""
    return _disk(frame, frame // 2, frame // 2).astype(np.float32)


def _disk(frame, cy, cx):
    y, x = np.mgrid[:frame, :frame]
    return 1 / (1 + np.exp((np.hypot(y - cy, x - cx) - RADIUS) / 0.4))


def draw_datacube(scan=SCAN, frame: int = FRAME, *, seed: int = 0, dtype=np.uint16) -> xr.Dataset:
    """Counts (scan_y, scan_x, qy, qx); strained by up to 2 % along the scan's x, position (0, 0) is empty."""
    rng = np.random.default_rng(seed)
    patterns = np.zeros((*scan, frame, frame))
    middle = frame / 2 - 0.3
    for iy, ix in np.ndindex(*scan):
        spacing = SPACING * (1 - 0.02 * ix / max(scan[1] - 1, 1))
        for h in range(-2, 3):
            for k in range(-2, 3):
                height = 40 * np.exp(-(h * h + k * k) / 6)
                patterns[iy, ix] += height * _disk(frame, middle + h * SPACING, middle + k * spacing)
    counts = rng.poisson(patterns).astype(dtype)
    counts[0, 0] = 0
    return xr.Dataset(
        {
            "intensity": (("scan_y", "scan_x", "qy", "qx"), counts, {"units": "counts"}),
            "probe": (("qy", "qx"), draw_probe(frame)),
        },
        coords={
            "scan_y": ("scan_y", np.arange(scan[0]) * 2.0, {"units": "nm"}),
            "scan_x": ("scan_x", np.arange(scan[1]) * 2.0, {"units": "nm"}),
            "qy": ("qy", np.arange(frame, dtype=float), {"units": "px"}),
            "qx": ("qx", np.arange(frame, dtype=float), {"units": "px"}),
        },
        attrs={"title": "flat disks"},
    )

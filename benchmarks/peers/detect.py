"""Bragg disks found by other programs, each in its own environment, with one call.

    from benchmarks.peers.detect import detect
    peaks, cpu_seconds = detect("py4dstem", patterns, probe, "log")

Settings named "tutorial" are what the program's own examples use, "tuned" and the others the best that were
found on simulated disks whose true positions are known, so they favour the peer. A claim that holds only
against "tutorial" is worth nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .environment import run_worker

# lengths are in units of the disk radius; everything else as the peer spells it
_IN_RADII = {"minPeakSpacing", "edgeBoundary", "radii", "min_spacing", "edge_boundary"}
_IN_RADII |= {"search", "blur", "square_size", "min_distance"}
_PY4DSTEM = {
    "kernel": "flat",
    "corrPower": 1.0,
    "sigma_cc": 1.0,
    "minRelativeIntensity": 0.02,  # 0.002 is better from 1e6 electrons per pattern on
    "minPeakSpacing": 2.0,
    "edgeBoundary": 1.0,
    "maxNumPeaks": 200,
    "subpixel": "multicorr",
    "upsample_factor": 16,
}
_QUANTEM = {
    "min_relative_intensity": 0.02,
    "min_spacing": 2.0,
    "edge_boundary": 1.0,
    "sigma_cc": 1.0,
    "subpixel": "upsample",
    "upsample_factor": 16,
    "max_num_peaks": 200,
}
_LIBERTEM = {"template": "probe", "search": 5 / 3, "upsample": 20, "min_weight": 0.1, "num_peaks": 60}
_PYXEM = {"threshold": 0.5, "min_distance": 1.0, "refine": "center-of-mass", "square_size": 2.4, "blur": 0.0}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "py4dstem": {
        "tutorial": _PY4DSTEM
        | {"kernel": "sigmoid", "radii": (0.0, 4.0), "sigma_cc": 2.0, "minRelativeIntensity": 0.005}
        | {"subpixel": "poly"},
        "poly": _PY4DSTEM | {"subpixel": "poly"},
        "tuned": _PY4DSTEM,
        "log": _PY4DSTEM | {"transform": "log", "minRelativeIntensity": 0.1},
        "sqrt": _PY4DSTEM | {"transform": "sqrt", "minRelativeIntensity": 0.1},
    },
    "libertem": {
        "tutorial": _LIBERTEM | {"template": "background", "upsample": False},
        "fast": _LIBERTEM | {"upsample": False},
        "tuned": _LIBERTEM,
        "background": _LIBERTEM | {"template": "background"},
        "gradient": _LIBERTEM | {"template": "gradient"},
        "gradient_background": _LIBERTEM | {"template": "gradient_background"},
    },
    "pyxem": {
        "tutorial": _PYXEM | {"refine": None},
        "tuned": _PYXEM,
        "low_dose": _PYXEM | {"refine": None, "blur": 0.17},
        "cross_correlation": _PYXEM | {"refine": "cross-correlation"},
    },
    "quantem": {
        "tutorial": _QUANTEM | {"sigma_cc": None},
        "parabolic": _QUANTEM | {"subpixel": "parabolic"},
        "tuned": _QUANTEM,
        "log": _QUANTEM | {"transform": "log", "min_relative_intensity": 0.1},
    },
}


def settings(package: str, name: str, radius_px: float) -> dict[str, Any]:
    """Options of a peer in its own words, for disks of `radius_px`; to be changed and handed to `detect`."""
    found = dict(SETTINGS[package][name])
    for key in _IN_RADII & set(found):
        value = found[key]
        if value is not None:
            found[key] = [v * radius_px for v in value] if isinstance(value, tuple) else value * radius_px
    for key in ("edgeBoundary", "edge_boundary", "square_size", "min_distance"):
        if key in found:
            found[key] = int(np.ceil(found[key]))
    return found


def detect(
    package: str,
    patterns: np.ndarray | Path,
    probe: np.ndarray,
    options: str | Mapping[str, Any] = "tuned",
    *,
    repeats: int = 1,
) -> tuple[dict[str, np.ndarray], float]:
    """Find the Bragg disks of a scan with another program.

    Parameters
    ----------
    package : str
        "py4dstem", "libertem", "pyxem" or "quantem"; installed on first use.
    patterns : ndarray or Path
        (scan_y, scan_x, qy, qx), or (n, qy, qx) for a scan of one row, counts; or a .npy file with them,
        which is not copied. LiberTEM looks for the lattice in the mean pattern, so all
        patterns must be of one lattice, slightly strained.
    probe : ndarray, shape (qy, qx)
        Vacuum probe, anywhere in the frame.
    options : str or mapping
        Name in ``SETTINGS[package]``, or options such as those from `settings`.
    repeats : int
        Time so many runs and return the fastest.

    Returns
    -------
    peaks : dict of ndarray
        ``qy``, ``qx`` (px, row and column), ``intensity`` (what the peer calls so), each (scan_y, scan_x,
        peak), NaN-padded, brightest first; LiberTEM also ``lattice`` (scan_y, scan_x, 2, 2), rows a, b, and
        ``origin``.
    cpu_seconds : float
        CPU time of detection alone, one thread, after a warm-up: no import, no start, no file.
    """
    probe = np.asarray(probe, dtype=np.float32)
    weight = np.where(probe > probe.max() / 2, 1.0, 0.0)
    radius_px = float(np.sqrt(weight.sum() / np.pi))
    origin = [float((weight * axis).sum() / weight.sum()) for axis in np.indices(probe.shape)]
    chosen = settings(package, options, radius_px) if isinstance(options, str) else dict(options)
    if isinstance(patterns, np.ndarray) and patterns.ndim == 3:
        patterns = patterns[None]
    found = run_worker(
        package,
        f"{package}_worker.py",
        "detect",
        patterns=patterns,
        probe=probe,
        origin=origin,
        radius_px=radius_px,
        options=json.dumps(chosen),
        repeats=repeats,
    )
    seconds = float(found.pop("cpu_seconds"))
    return found, seconds

"""Whether a Bragg vector file of py4DSTEM 0.14.18 gives here what it gives there.

    python -m benchmarks.peers.py4dstem_bragg_vectors

Peaks of a strained lattice, with noise, unequal strength, descan and, in the second case, an elliptical
distortion, a rotation and an exchange of rows and columns, are saved by py4DSTEM. It reads the file again and
maps the strain with all its calibrations; we read the file and map it with the same kind of fit, as `fcunet
strain` does. The reference is given, for a median of components depends on the axes in which it is taken:
what that makes is printed as well. Exits with 1 if any strain differs by more than 1e-4.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.peers.environment import run_worker
from fcunet.pipeline import compute_strain, fit_lattice
from fcunet.readers.bragg import read_peaks

TOLERANCE = 1e-4
REFERENCE = np.array([[3.0, 29.0], [33.0, -2.0]])  # without distortion, in the frame of the detector
CASES = {
    "origin": {},
    "origin, ellipse, rotation": {"rotation": 0.3, "flip": False, "ellipse": (1.03, 1.0, 0.4)},
    "origin, ellipse, rotation, flip": {"rotation": -0.2, "flip": True, "ellipse": (0.98, 1.0, -0.3)},
}


def shrink(a: float, b: float, theta: float) -> np.ndarray:
    """py4DSTEM's correction of an ellipse, symmetric, on vectors (row, column)."""
    n = np.array([np.cos(theta), np.sin(theta)])
    return np.eye(2) - (1 - b / a) * np.outer(n, n)


def make_peaks(ellipse=(1.0, 1.0, 0.0), noise_px: float = 0.05, seed: int = 0) -> dict[str, np.ndarray]:
    """Peaks and origins as detector px, (scan_y, scan_x, peak), of a lattice strained by up to 2 %."""
    rng = np.random.default_rng(seed)
    shape = (8, 9)
    y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    waves = [np.sin(2 * np.pi * (a * y + b * x) + c) for a, b, c in rng.uniform(0.3, 1.0, (4, 3))]
    F = np.eye(2) + 0.01 * np.stack(waves, -1).reshape(*shape, 2, 2)
    h, k = (a.ravel() for a in np.mgrid[-3:4, -3:4])
    q = np.stack([h, k], -1) @ (REFERENCE @ np.linalg.inv(F)) @ np.linalg.inv(shrink(*ellipse))
    origin = np.stack([127 + 2 * y - x, 129 + y + x], -1)
    q = q + origin[:, :, None] + rng.normal(0, noise_px, q.shape)
    intensity = np.exp(-np.hypot(h, k) / 1.5) * rng.uniform(0.7, 1.3, q.shape[:-1])
    lost = rng.random(intensity.shape) < 0.1
    lost[..., len(h) // 2] = False
    q[lost] = np.nan
    return {
        "qy": q[..., 0],
        "qx": q[..., 1],
        "intensity": intensity,
        "origin_qy": origin[..., 0],
        "origin_qx": origin[..., 1],
    }


def compare(case: dict) -> tuple[dict[str, float], float]:
    """Largest difference of each component with the same reference, and of all with both medians."""
    ellipse, rotation, flip = (
        case.get(n, v) for n, v in (("ellipse", (1, 1, 0)), ("rotation", 0), ("flip", 0))
    )
    c, s = np.cos(rotation), np.sin(rotation)
    turned = (REFERENCE[:, ::-1] if flip else REFERENCE) @ np.array([[c, s], [-s, c]])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "braggvectors.h5")
        theirs = run_worker(
            "py4dstem",
            "py4dstem_worker.py",
            "saved_strain",
            **make_peaks(ellipse),
            **case,
            path=str(path),
            detector_shape=(256, 256),
            max_peak_spacing=8.0,
            reference=turned,
        )
        peaks = read_peaks(path)
    lattice = fit_lattice(peaks, weighting="intensity_squared", robust=False, max_peak_spacing=8.0)
    given = compute_strain(
        lattice, reference=REFERENCE @ np.linalg.inv(shrink(*ellipse)), convention="py4dstem"
    )
    median = compute_strain(lattice, convention="py4dstem")
    assert (theirs["mask"] > 0).all()
    pairs = {"rows": "e_yy", "columns": "e_xx", "shear": "e_xy", "theta": "theta"}
    difference = {a: float(np.abs(theirs[a] - given[b].values).max()) for a, b in pairs.items()}
    medians = max(float(np.abs(theirs[f"median_{a}"] - median[b].values).max()) for a, b in pairs.items())
    return difference, medians


def main() -> int:
    worst = 0.0
    print(f"{'calibration in the file':34} {'rows':>8} {'columns':>8} {'shear':>8} {'theta':>8}  medians")
    for name, case in CASES.items():
        found, medians = compare(case)
        print(f"{name:34} " + " ".join(f"{v:8.1e}" for v in found.values()) + f" {medians:8.1e}")
        worst = max(worst, *found.values())
    verdict = "within" if worst <= TOLERANCE else "BEYOND"
    print(f"\nlargest difference in strain {worst:.1e}, {verdict} {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())

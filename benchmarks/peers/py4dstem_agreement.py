"""Peaks and strain against py4DSTEM 0.14.18 on the same patterns.

    python -m benchmarks.peers.py4dstem_agreement

Simulates disks on a strained lattice, runs both programs with the same kernel and options, fits both lattices
the way py4DSTEM does (intensity-squared weights, no outlier rejection, median reference, its strain formula),
and prints the differences. Exits with 1 if the strain of any case differs by more than 1e-4 anywhere.
"""

import json
import sys

import numpy as np
import torch

from benchmarks.disks import simulate_disks
from benchmarks.peers.environment import run_worker
from fcunet.kernels.correlation import find_disks, make_kernel
from fcunet.kernels.lattice_fit import fit_lattice
from fcunet.kernels.strain import deformation_gradient, strain_from_F

TOLERANCE = 1e-4
COMMON = {"min_peak_spacing": 18.0, "edge_boundary": 12, "max_num_peaks": 120}
# kernel, and what differs from py4DSTEM's defaults apart from COMMON
CASES = [
    ("flat", {}),
    ("flat", {"subpixel": "parabola"}),
    ("flat", {"subpixel": "pixel"}),
    ("flat", {"sigma_cc": 0.0, "upsample_factor": 8}),
    ("flat", {"transform": "log", "sigma_cc": 1.0, "min_relative_intensity": 0.15}),
    ("flat", {"transform": "sqrt", "min_relative_intensity": 0.15}),
    ("flat", {"sigma_dp": 1.0}),
    ("flat", {"corr_power": 0.8}),
    ("gaussian", {}),
    ("sigmoid", {}),
    ("sigmoid", {"subpixel": "parabola", "corr_power": 0.9}),
]
_NAMES = {
    "corr_power": "corrPower",
    "min_absolute_intensity": "minAbsoluteIntensity",
    "min_relative_intensity": "minRelativeIntensity",
    "relative_to_peak": "relativeToPeak",
    "min_peak_spacing": "minPeakSpacing",
    "edge_boundary": "edgeBoundary",
    "max_num_peaks": "maxNumPeaks",
}
_SUBPIXEL = {"pixel": "pixel", "parabola": "poly", "upsampled": "multicorr"}


def to_py4dstem(options: dict) -> dict:
    """Our option names as py4DSTEM's."""
    renamed = {_NAMES.get(name, name): value for name, value in options.items()}
    return renamed | {"subpixel": _SUBPIXEL[options.get("subpixel", "upsampled")]}


def compare(scan, *, min_relative_intensity: float, max_peak_spacing: float = 6.0, cases=CASES) -> list[dict]:
    """One row of differences per case.

    `min_relative_intensity` has to keep peaks of noise out: py4DSTEM indexes them by the nearest maximum of
    the Bragg vector map, we by the nearest lattice site, and with weights like these a few such peaks decide.
    """
    shape = scan.patterns.shape
    options = [COMMON | {"min_relative_intensity": min_relative_intensity} | extra for _, extra in cases]
    kernels = [make_kernel(scan.probe, kernel=name) for name, _ in cases]
    origin = np.array(shape[2:]) // 2
    theirs = run_worker(
        "py4dstem",
        "py4dstem_worker.py",
        "agreement",
        patterns=scan.patterns,
        origin=origin,
        max_peak_spacing=max_peak_spacing,
        options=json.dumps([to_py4dstem(o) for o in options]),
        **{f"kernel_{n}": kernel.numpy() for n, kernel in enumerate(kernels)},
    )
    patterns = torch.from_numpy(scan.patterns.reshape(-1, *shape[2:]))
    rows = []
    for n, (case, kernel) in enumerate(zip(options, kernels, strict=True)):
        peaks = find_disks(patterns, kernel, **case)
        qy, qx, intensity = (
            t.numpy().astype(float).reshape(*shape[:2], -1) for t in (peaks.qy, peaks.qx, peaks.intensity)
        )
        fit = fit_lattice(
            qy,
            qx,
            g=theirs[f"basis_{n}"],
            origin=origin,
            intensity=intensity,
            weighting="intensity_squared",
            robust=False,
            max_peak_spacing=max_peak_spacing,
        )
        F = deformation_gradient(fit.g, np.nanmedian(fit.g.reshape(-1, 2, 2), 0))
        ours = strain_from_F(F, convention="py4dstem")
        mask = theirs[f"mask_{n}"] > 0
        pairs = {"e_yy": "rows", "e_xx": "columns", "e_xy": "shear", "theta": "theta"}
        difference = np.stack([(ours[a] - theirs[f"{b}_{n}"])[mask] for a, b in pairs.items()])
        name, extra = cases[n]
        rows.append(
            {
                "case": ", ".join(
                    [name, *(f"{k} {v}" for k, v in extra.items() if k != "min_relative_intensity")]
                ),
                **_peak_differences(
                    qy, qx, intensity, *(theirs[f"{k}_{n}"] for k in ("qy", "qx", "intensity"))
                ),
                "positions": int(mask.sum()),
                "strain_rms": float(np.sqrt(np.mean(difference**2))),
                "strain_max": float(np.abs(difference).max()),
            }
        )
    return rows


def _peak_differences(qy, qx, intensity, qy_p, qx_p, intensity_p) -> dict:
    """Peaks of either list without a partner within 1 px, and differences of the pairs."""
    distance = np.hypot(qy[..., :, None] - qy_p[..., None, :], qx[..., :, None] - qx_p[..., None, :])
    distance = np.where(np.isnan(distance), np.inf, distance)
    partner = distance.argmin(-1)
    nearest = distance.min(-1)
    paired = nearest < 1
    ratio = intensity / np.take_along_axis(intensity_p, partner, -1) - 1
    return {
        "peaks": int(np.isfinite(qy_p).sum()),
        "unpaired": int(np.isfinite(qy).sum() + np.isfinite(qy_p).sum() - 2 * paired.sum()),
        "position_rms": float(np.sqrt(np.mean(nearest[paired] ** 2))),
        "position_max": float(nearest[paired].max()),
        "intensity_max": float(np.abs(ratio[paired]).max()),
    }


def main() -> int:
    scans = {
        "256 x 256, 1e6 electrons": (simulate_disks(electrons=1e6), 0.01),
        "256 x 256, 3e4 electrons, background": (
            simulate_disks(electrons=3e4, background=0.05, seed=1),
            0.03,
        ),
        "161 x 190 (odd), 1e5 electrons, radius 5 px": (
            simulate_disks(
                size=(161, 190), electrons=1e5, radius_px=5.0, edge_px=0.6, spacing_px=22.0, seed=2
            ),
            0.01,
        ),
    }
    worst = 0.0
    for title, (scan, threshold) in scans.items():
        print(f"\n{title}: {scan.patterns.shape[0]} x {scan.patterns.shape[1]} positions")
        print(
            f"{'case':46} {'peaks':>6} {'unpaired':>8} {'|dq| rms':>9} {'max px':>8} {'dI/I max':>9}", end=" "
        )
        print(f"{'de rms':>8} {'de max':>8}")
        for row in compare(scan, min_relative_intensity=threshold):
            print(
                f"{row['case']:46} {row['peaks']:6d} {row['unpaired']:8d} {row['position_rms']:9.1e}", end=" "
            )
            print(f"{row['position_max']:8.1e} {row['intensity_max']:9.1e}", end=" ")
            print(f"{row['strain_rms']:8.1e} {row['strain_max']:8.1e}", flush=True)
            worst = max(worst, row["strain_max"])
    verdict = "within" if worst <= TOLERANCE else "BEYOND"
    print(f"\nlargest difference in strain {worst:.1e}, {verdict} {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())

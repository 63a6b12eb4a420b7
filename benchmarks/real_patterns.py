"""What the network marks on patterns recorded by others: to be looked at, the disks and nothing else.

    FCUNET_TEST_DATA=/where/they/are python -m benchmarks.real_patterns [--out runs/real]

The files are named in the README beside them: a nanobeam pattern with dark cores in its disks (dm3),
precession patterns with a saturated beam (blo), and off-centre beams with flares and no sample (mib). One PNG
per file.
"""

import argparse
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

import fcunet
from fcunet.calibrate import calibrate
from fcunet.plot.patterns import draw_peaks, show_pattern

FILES = {
    "nbed": ("nbed/dd020.dm3", [(0, 0)]),
    "sped": ("sped/test1.blo", [(0, 0), (2, 1)]),
    "merlin": ("merlin/Merlin_navigation4x2_ROI.zip", [(0, 0), (1, 3)]),
}


def overlay(source: Path, positions: list[tuple[int, int]], out: Path, weights: str) -> list[str]:
    """Draw some positions of a file; returns a line of figures for each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        if source.suffix == ".zip":
            with zipfile.ZipFile(source) as packed:
                packed.extractall(folder)
            source = min(Path(folder).glob("*.mib"))
        fcunet.convert(source, Path(folder, "scan.zarr"), progress=False)
        datacube = fcunet.open(Path(folder, "scan.zarr")).load()
        measured = calibrate(datacube)
        fig, axes = plt.subplots(1, len(positions), figsize=(6.4 * len(positions), 6.4), squeeze=False)
        peaks = fcunet.find_peaks(datacube, "fcunet", calibration=measured, weights=weights)
        for ax, (y, x) in zip(axes[0], positions, strict=True):
            here = peaks.isel(scan_y=y, scan_x=x)
            qy, qx = here["peak_qy"].values, here["peak_qx"].values
            show_pattern(ax, datacube["intensity"].values[y, x].clip(0), power=0.25)
            draw_peaks(ax, qy, qx, radius_px=measured.probe_radius_px)
            lines.append(f"{source.name} ({y}, {x}): {int(np.isfinite(qy).sum())} disks")
            ax.set_title(f"{source.name} ({y}, {x}), radius {measured.probe_radius_px:.1f} px")
        fig.tight_layout()
        fig.savefig(out, dpi=80)
        plt.close(fig)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--weights", default="default")
    options = parser.parse_args()
    where = os.environ.get("FCUNET_TEST_DATA")
    if not where:
        parser.error("set FCUNET_TEST_DATA to the folder with nbed/, sped/ and merlin/")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (file, positions) in FILES.items():
        for line in overlay(Path(where, file), positions, options.out / f"{name}.png", options.weights):
            print(line, flush=True)


if __name__ == "__main__":
    main()

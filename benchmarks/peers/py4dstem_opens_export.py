"""Whether py4DSTEM 0.14.18 opens what `fcunet export --to py4dstem` writes, and finds the same strain.

    python -m benchmarks.peers.py4dstem_opens_export

Simulates disks on a strained lattice, runs the whole path with the correlation detector, exports the run, and
opens the file in py4DSTEM: classes, labels, peaks and strain must be there, and the strain that py4DSTEM fits
to those peaks must agree with the exported one to 1e-4. Exits with 1 otherwise.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import xarray as xr

import fcunet
from benchmarks.disks import simulate_disks
from benchmarks.peers.environment import run_worker
from fcunet.datacube import pixel_coordinate, write_datacube
from fcunet.export import export
from fcunet.store import open_peaks

TOLERANCE = 1e-4


def run_and_export(folder: Path) -> tuple[Path, xr.DataTree, xr.Dataset]:
    """The exported file, the results and the peaks of a small simulated scan."""
    scan = simulate_disks(electrons=1e6)
    dims = ("scan_y", "scan_x", "qy", "qx")
    cube = xr.Dataset(
        {"intensity": (dims, scan.patterns.astype(np.uint16)), "probe": (dims[2:], scan.probe)},
        coords={dim: pixel_coordinate(dim, n) for dim, n in zip(dims, scan.patterns.shape, strict=True)},
    )
    store = write_datacube(folder / "disks.zarr", cube)
    config = fcunet.Config.load(
        store=store,
        out=folder / "run",
        method="correlation",
        weighting="intensity_squared",
        robust=False,
        max_peak_spacing=6.0,
        min_relative_intensity=0.02,
        workers=1,
    )
    results = fcunet.run(config, progress=False).load()
    file = export(folder / "run", folder / "disks.h5", to="py4dstem")
    return file, results, open_peaks(folder / "run" / "peaks.zarr").load()


def check() -> list[tuple[str, bool, str]]:
    """Name, verdict and detail of each thing that is checked."""
    with tempfile.TemporaryDirectory() as name:
        file, results, peaks = run_and_export(Path(name))
        strain = results["strain"].dataset
        reference = np.array([strain.attrs["g1_ref_px"], strain.attrs["g2_ref_px"]])
        theirs = run_worker(
            "py4dstem",
            "py4dstem_worker.py",
            "opens",
            path=str(file),
            reference=reference,
            max_peak_spacing=6.0,
        )
    labels = [str(label) for label in theirs["labels"]]
    verdicts = [
        ("classes", list(theirs["classes"]) == ["BraggVectors", "RealSlice"], ", ".join(theirs["classes"])),
        ("labels of the strain", labels[:5] == ["e_xx", "e_yy", "e_xy", "theta", "mask"], ", ".join(labels)),
    ]
    for ours, other in (("peak_qy", "qy"), ("peak_qx", "qx"), ("peak_intensity", "intensity")):
        expected = peaks[ours].transpose("scan_y", "scan_x", "peak").values
        found = np.full(expected.shape, np.nan)
        found[..., : theirs[other].shape[2]] = theirs[other]
        equal = np.array_equal(found.astype(np.float32), expected, equal_nan=True)
        verdicts.append((f"{ours} unchanged", equal, f"{np.isfinite(found).sum()} values"))
    mask = theirs["mask"] > 0
    for name in ("rows", "columns", "shear", "theta"):
        stored, refitted = theirs[f"stored_{name}"], theirs[name]
        worst = float(np.abs(stored - refitted)[mask].max())
        verdicts.append((f"strain {name}: exported against refitted", worst <= TOLERANCE, f"{worst:.1e}"))
    verdicts.append(("positions with a lattice", bool(mask.all()), f"{int(mask.sum())} of {mask.size}"))
    return verdicts


def main() -> int:
    verdicts = check()
    for name, good, detail in verdicts:
        print(f"{'ok  ' if good else 'FAIL'} {name}: {detail}")
    return int(not all(good for _, good, _ in verdicts))


if __name__ == "__main__":
    sys.exit(main())

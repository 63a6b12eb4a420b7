"""Whether py4DSTEM and HyperSpy open what `fcunet export` writes, and py4DSTEM finds the same strain.

    python -m benchmarks.peers.py4dstem_opens_export

Simulates disks on a strained lattice, runs the whole path with the correlation detector, exports the run, and
opens the file in py4DSTEM 0.14.18: classes, labels, peaks and strain must be there, and the strain that
py4DSTEM fits to those peaks must agree with the exported one to 1e-4. A datacube with every kind of
calibration is opened in py4DSTEM, and the zspy of both in HyperSpy (with pyxem 0.21). Exits with 1 otherwise.
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


def make_cube() -> xr.Dataset:
    """A small simulated scan."""
    scan = simulate_disks(electrons=1e6)
    dims = ("scan_y", "scan_x", "qy", "qx")
    return xr.Dataset(
        {"intensity": (dims, scan.patterns.astype(np.uint16)), "probe": (dims[2:], scan.probe)},
        coords={dim: pixel_coordinate(dim, n) for dim, n in zip(dims, scan.patterns.shape, strict=True)},
    )


def run_and_export(folder: Path, cube: xr.Dataset) -> tuple[Path, xr.DataTree, xr.Dataset]:
    """The exported file, the results and the peaks of a scan."""
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


def check(*, zspy: bool = True) -> list[tuple[str, bool, str]]:
    """Name, verdict and detail of each thing that is checked; `zspy` needs the environment of pyxem."""
    cube = make_cube()
    with tempfile.TemporaryDirectory() as name:
        file, results, peaks = run_and_export(Path(name), cube)
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
        verdicts = check_cube(Path(name), cube)
        verdicts += check_zspy(Path(name), results, cube) if zspy else []
    labels = [str(label) for label in theirs["labels"]]
    verdicts += [
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


def check_cube(folder: Path, cube: xr.Dataset) -> list[tuple[str, bool, str]]:
    """A datacube with all calibrations, opened in py4DSTEM."""
    cube = calibrated(cube)
    file = export(cube, folder / "cube.h5", to="py4dstem")
    theirs = run_worker("py4dstem", "py4dstem_worker.py", "opens_cube", path=str(file))
    classes = list(theirs["classes"])
    facts = [*theirs["pixels"], *theirs["ellipse"], float(theirs["rotation"])]
    expected = [0.02, 2.0, 1.03, 1.0, np.deg2rad(90 - 25.0), np.deg2rad(30.0)]
    same = np.allclose(facts, expected) and bool(theirs["flip"]) and list(theirs["units"]) == ["A^-1", "nm"]
    origin = np.allclose(theirs["qx0"], cube["origin_qy"]) and np.allclose(theirs["qy0"], cube["origin_qx"])
    return [
        ("classes of the datacube", classes == ["DataCube", "Probe"], ", ".join(classes)),
        ("counts unchanged", np.array_equal(theirs["data"], cube["intensity"]), str(theirs["data"].dtype)),
        ("probe unchanged", np.allclose(theirs["probe"], cube["probe"]), str(theirs["probe"].shape)),
        ("origin at every position", bool(origin), str(theirs["qx0"].shape)),
        ("pixel sizes, ellipse, rotation, flip", same, " ".join(f"{v:.4g}" for v in facts)),
    ]


def calibrated(cube: xr.Dataset) -> xr.Dataset:
    """`cube` with pixel sizes, origins, ellipse, rotation and exchanged rows and columns."""
    steps = {
        "scan_y": (2.0, "nm"),
        "scan_x": (2.0, "nm"),
        "qy": (0.02, "1/angstrom"),
        "qx": (0.02, "1/angstrom"),
    }
    coords = {d: (d, step * np.arange(cube.sizes[d]), {"units": unit}) for d, (step, unit) in steps.items()}
    cube = cube.assign_coords(coords)
    shape = cube["intensity"].shape[:2]
    for name, mean in (("origin_qy", 127.0), ("origin_qx", 129.0)):
        cube[name] = (("scan_y", "scan_x"), mean + np.arange(np.prod(shape)).reshape(shape) / 10)
    geometry = {"scan_rotation_degree": 30.0, "scan_transposed": 1}
    return cube.assign_attrs(geometry | {"ellipse_ratio": 1.03, "ellipse_angle_degree": 25.0})


def check_zspy(folder: Path, results: xr.DataTree, cube: xr.Dataset) -> list[tuple[str, bool, str]]:
    """The zspy of a datacube and of results, opened in HyperSpy."""
    cube = calibrated(cube)
    files = {
        "cube": str(export(cube, folder / "cube.zspy", to="zspy")),
        "maps": str(export(results, folder / "maps.zspy", to="zspy")),
    }
    theirs = run_worker("pyxem", "pyxem_worker.py", "opens", **files)
    axes = list(theirs["scales"]), list(theirs["units"])
    return [
        ("zspy: class in HyperSpy", "ElectronDiffraction2D" in str(theirs["kind"]), str(theirs["kind"])),
        (
            "zspy: counts unchanged",
            np.array_equal(theirs["data"], cube["intensity"]),
            str(theirs["data"].shape),
        ),
        (
            "zspy: axes",
            np.allclose(axes[0], [2, 2, 0.02, 0.02]) and int(theirs["navigation"]) == 2,
            str(axes),
        ),
        ("zspy: strain unchanged", np.array_equal(theirs["e_xx"], results["strain/e_xx"]), "e_xx"),
    ]


def main() -> int:
    verdicts = check()
    for name, good, detail in verdicts:
        print(f"{'ok  ' if good else 'FAIL'} {name}: {detail}")
    return int(not all(good for _, good, _ in verdicts))


if __name__ == "__main__":
    sys.exit(main())

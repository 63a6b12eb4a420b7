"""How long a result of 1024 x 1024 positions takes to open, and a click to answer; all data are generated.

    python -m benchmarks.explore FOLDER [--side 1024] [--out benchmarks/results/explore.json]

Writes results, peaks and a datacube (one shard, linked to all places) into FOLDER, opens the explorer on it
as ``fcunet.explore`` does, and moves about at random. Needs the extra ``notebooks``, and no browser: to send
an answer to one is not in the times. On a machine with other work the seconds of computing count.
"""

import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path

import numpy as np
import xarray as xr

from fcunet import schema
from fcunet.config import Config
from fcunet.store import Layout, create_peaks, write_datacube, write_peaks_block, write_results

FRAME, BLOCK, PEAKS = 128, 32, 64


def make(folder: Path, side: int, seed: int = 0) -> None:
    """A run directory and its scan, without a run."""
    rng = np.random.default_rng(seed)
    scan = np.arange(side) * 1.0
    coords = {d: (d, scan, {"units": "nm"}) for d in schema.SCAN_DIMS}
    shape = (side, side)
    wave = np.sin(np.linspace(0, 12, side))
    strain = {
        c: 0.01 * wave[None] * wave[:, None] + 1e-3 * rng.normal(size=shape) for c in schema.STRAIN_COMPONENTS
    }
    groups = {"/strain": xr.Dataset({c: (schema.SCAN_DIMS, v) for c, v in strain.items()}, coords)}
    for c in schema.STRAIN_COMPONENTS:
        groups["/strain"][f"{c}_std"] = (schema.SCAN_DIMS, rng.gamma(4, 2e-4, shape).astype(np.float32))
    groups["/strain"]["valid"] = (schema.SCAN_DIMS, np.ones(shape, bool))
    groups["/strain"]["grain"] = (schema.SCAN_DIMS, np.ones(shape, np.int32))
    groups["/strain"].attrs = {"frame": "scan", "g1_ref_px": [0.0, 15.0], "g2_ref_px": [15.0, 0.0]}
    start = dict(zip(schema.LATTICE_PARAMETERS, (64, 64, 0, 15, 15, 0), strict=True))
    lattice = {n: (schema.SCAN_DIMS, v + 0.05 * rng.normal(size=shape)) for n, v in start.items()}
    lattice["covariance"] = (
        (*schema.SCAN_DIMS, "parameter", "parameter2"),
        np.broadcast_to(np.float32(1e-4) * np.eye(6, dtype=np.float32), (*shape, 6, 6)),
    )
    lattice["fit_error"] = (schema.SCAN_DIMS, rng.gamma(4, 0.02, shape).astype(np.float32))
    lattice["n_indexed"] = (schema.SCAN_DIMS, rng.poisson(40, shape).astype(np.int16))
    groups["/lattice"] = xr.Dataset(lattice, coords, {"basis_px": [[0, 15], [15, 0]]})
    virtual = {n: (schema.SCAN_DIMS, rng.gamma(50, 20, shape).astype(np.float32)) for n in ("bf", "adf")}
    groups["/virtual"] = xr.Dataset(virtual | {"n_peaks": lattice["n_indexed"]}, coords)
    mean = rng.gamma(2, 2, (FRAME, FRAME)).astype(np.float32)
    groups["/diffraction"] = xr.Dataset({"mean": (schema.PATTERN_DIMS, mean)})
    write_results(folder / "run" / "strain.zarr", xr.DataTree.from_dict(groups))
    _make_peaks(folder / "run" / "peaks.zarr", side, rng)
    _make_scan(folder / "scan.zarr", side, rng)
    config = Config.load(store=(folder / "scan.zarr").resolve(), method="correlation")
    (folder / "run" / "config.yaml").write_text(config.to_yaml())


def _make_peaks(path: Path, side: int, rng: np.random.Generator) -> None:
    create_peaks(path, scan_shape=(side, side), block_shape=(BLOCK, BLOCK), max_num_peaks=PEAKS,
                 detector_shape=(FRAME, FRAME))  # fmt: skip
    block = {
        n: rng.uniform(0, FRAME, (BLOCK, BLOCK, PEAKS)).astype(np.float32) for n in schema.PEAK_VARIABLES
    }
    for name, variable in schema.PEAKS.items():
        if variable.dims == schema.SCAN_DIMS:
            block[name] = np.full((BLOCK, BLOCK), PEAKS if name == "n_peaks" else 0, np.int16)
    write_peaks_block(path, 0, 0, block)
    _link_all(path, side // BLOCK, ("intensity",))


def _make_scan(path: Path, side: int, rng: np.random.Generator) -> None:
    patterns = rng.poisson(20, (BLOCK, BLOCK, FRAME, FRAME)).astype(np.uint16)
    small = xr.Dataset({"intensity": (schema.DATACUBE_DIMS, patterns)})
    write_datacube(path, small, layout=Layout((BLOCK, BLOCK), (4, 4)))
    for name, shape in (("intensity", [side, side, FRAME, FRAME]), ("scan_y", [side]), ("scan_x", [side])):
        file = path / name / "zarr.json"
        if file.is_file():
            facts = json.loads(file.read_text())
            facts["shape"] = shape
            file.write_text(json.dumps(facts))
    for dim in schema.SCAN_DIMS:  # longer axes, anew
        shutil.rmtree(path / dim, ignore_errors=True)
    _link_all(path, side // BLOCK, ())


def _link_all(path: Path, n: int, skipped: tuple[str, ...]) -> None:
    """The chunk of block (0, 0) of every array stands for all others."""
    for array in path.iterdir():
        first = array / "c" / "0" / "0"
        if array.name in skipped or not first.exists() or array.name == "status":
            continue
        files = [first] if first.is_file() else [f for f in first.rglob("*") if f.is_file()]
        for iy in range(n):
            for ix in range(n):
                for file in files:
                    target = array / "c" / str(iy) / str(ix) / file.relative_to(first)
                    if first.is_file():
                        target = array / "c" / str(iy) / str(ix)
                    if not target.exists():
                        target.parent.mkdir(parents=True, exist_ok=True)
                        os.link(file, target)


def _timed(function) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(folder: Path, clicks: int = 30) -> dict[str, dict[str, float]]:
    """Seconds on the clock and of computing: opening, a click, another map, another reference."""
    from fcunet.explore import Explorer, find_sources

    windows = []
    opening = [_timed(lambda: windows.append(Explorer(find_sources(folder / "run")))) for _ in range(3)]
    window = windows[-1]
    side = window.sources.shape[0]
    rng = np.random.default_rng(1)
    places = [tuple(int(v) for v in rng.integers(0, side, 2)) for _ in range(clicks)]
    click = [_timed(lambda p=p: window.update(position=p)) for p in places]
    maps = [_timed(lambda n=n: window.update(shown=n)) for n in ("theta", "n_peaks", "e_xx_std", "e_xx")]
    third = side // 3
    regions = [(0, third, 0, third), (third, side, 0, third), (0, side, third, side)]
    reference = [_timed(lambda r=r: window.update(reference=r)) for r in regions]
    out = {}
    for name, times in (("open", opening), ("click", click), ("map", maps), ("reference", reference)):
        wall, cpu = np.array(times).T
        out[name] = {
            "best_s": wall.min(),
            "median_s": float(np.median(wall)),
            "median_cpu_s": float(np.median(cpu)),
        }
    return {k: {n: round(float(v), 4) for n, v in d.items()} for k, d in out.items()}


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=1024, help="positions along each side of the scan")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if not (options.folder / "run" / "config.yaml").exists():
        make(options.folder, options.side)
    result = measure(options.folder)
    for name, times in result.items():
        print(f"{name:10} best {times['best_s']:.3f} s, median {times['median_s']:.3f} s, "
              f"of computing {times['median_cpu_s']:.3f} s")  # fmt: skip
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    facts = {"side": options.side, "machine": machine, "date": time.strftime("%Y-%m-%d"), "seconds": result}
    if options.out:
        options.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()

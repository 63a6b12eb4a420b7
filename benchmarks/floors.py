"""Each stage of a pattern's way: bytes, operations, the time they imply on this machine, the time taken.

    python -m benchmarks.floors              # a minute on one core

What the machine can do is measured first: copying memory, multiplying matrices in fp32 and bf16. A floor is
bytes over the one plus operations over the other; CPU time of one thread, best of several.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import zarr

from benchmarks.disks import simulate_disks
from benchmarks.gpu import operations
from benchmarks.speed import OPTIONS, RADIUS, cpu_seconds, made_peaks
from fcunet.datacube import DatacubeWriter, read_region
from fcunet.kernels import correlation, peaks
from fcunet.kernels.correlation import DiskFinder, centre_probe, make_kernel
from fcunet.layout import Layout
from fcunet.memory import keep_freed_memory
from fcunet.nn.decode import decode
from fcunet.nn.weights import load_model
from fcunet.pipeline import compute_strain, fit_lattice
from fcunet.zarrfolder import FLOAT_CODEC

RESULTS = Path(__file__).with_name("results")
SIZE, SIDE = 256, 8
PIXELS, PATTERNS = SIZE**2, SIDE**2


def machine() -> dict[str, float]:
    """Bytes per second copied (read and written count), operations per second of matrix products."""
    block = np.zeros(4 << 20, np.float32)
    other = np.empty_like(block)
    found = {"bytes": 2 * block.nbytes / cpu_seconds(lambda: np.copyto(other, block))}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.rand(512, 512).to(kind)
        found[name] = 2 * 512**3 / cpu_seconds(lambda a=a: a @ a)
    return found


def rows() -> list[tuple[str, float, float, str, float]]:
    """Stage, bytes, operations, their kind, seconds taken; per pattern."""
    scan = simulate_disks((SIDE, SIDE), (SIZE, SIZE), radius_px=RADIUS, spacing_px=30.5, electrons=1e5)
    counts = scan.patterns.astype(np.uint16)
    patterns = torch.from_numpy(scan.patterns.reshape(-1, SIZE, SIZE))
    found: list[tuple[str, float, float, str, float]] = []

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "scan.zarr")
        layout = Layout((SIDE, SIDE), (4, 4))
        with DatacubeWriter(path, counts.shape, np.uint16, layout=layout, attrs={}) as writer:
            writer.write_block(0, 0, counts)
        (shard,) = (f for f in (path / "intensity" / "c").rglob("*") if f.is_file())
        stored = shard.stat().st_size / PATTERNS
        read = cpu_seconds(shard.read_bytes) / PATTERNS
        whole = cpu_seconds(lambda: read_region(path, slice(0, SIDE), slice(0, SIDE))) / PATTERNS
    found.append(("read the shard (in the page cache)", stored, 0, "fp32", read))
    found.append(("decompress", stored + 2 * PIXELS, 0, "fp32", whole - read))
    convert = cpu_seconds(lambda: counts.astype(np.float32)) / PATTERNS
    found.append(("copy to float32", 6 * PIXELS, 0, "fp32", convert))

    finder = DiskFinder(make_kernel(scan.probe), **OPTIONS)
    group, plan = patterns[:16], finder.plan
    transform = 2.5 * PIXELS * np.log2(PIXELS)  # of real data, textbook count
    sharp, smooth = correlation._correlate(group, plan)
    taken = cpu_seconds(lambda: correlation._correlate(group, plan)) / len(group)
    found.append(("three real FFTs", 3 * 8 * PIXELS, 3 * transform, "fp32", taken))
    taken = cpu_seconds(lambda: peaks.find_maxima(smooth, **finder.criteria)) / len(group)
    found.append(("maxima", 5 * 4 * PIXELS, 0, "fp32", taken))
    parts = correlation._search(group, plan, finder.criteria)
    taken = cpu_seconds(lambda: correlation._refine(parts, len(group), plan)) / len(group)
    n_peaks = len(parts.y) / len(group)
    found.append(("refine positions, error bars", n_peaks * 4e3, n_peaks * 2.4e4, "fp32", taken))
    taken = cpu_seconds(lambda: finder(patterns)) / PATTERNS
    detector_floor = (31 * 8 * PIXELS / 8, 3 * transform + n_peaks * 2.4e4)
    found.append(("correlation detector in all", *detector_floor, "fp32", taken))

    work, probe, some = operations(SIZE), centre_probe(scan.probe), patterns[:4]
    for precision in ("fp32", "bf16"):
        model = load_model("default", device="cpu", precision=precision)
        prepared = model.prepare(some, probe)
        maps = cpu_seconds(lambda m=model, p=prepared: m(some, p)) / len(some)
        at = decode(model(some, prepared), threshold=model.config.threshold)
        disks = cpu_seconds(lambda m=model, p=prepared, a=at: m.read_disks(some, p, a.qy, a.qx)) / len(some)
        share = float(at.n_peaks.float().mean()) / 51
        found.append((f"network, maps, {precision}", 4 * PIXELS, work["maps"], precision, maps))
        found.append((f"network, disks, {precision}", 4 * PIXELS, work["disks"] * share, precision, disks))

    table, basis = made_peaks(32)
    fit = cpu_seconds(
        lambda: compute_strain(fit_lattice(table, basis=basis, origin=(128.0, 128.0)), peaks=table).compute()
    )
    each = table.sizes["peak"]
    found.append(("lattice and strain, 49 peaks", 20 * 8 * each, 12 * 40 * each, "fp32", fit / 32**2))

    values = np.full((32, 32, 128), np.nan, np.float32)
    values[..., :each] = table["peak_qy"].values

    def write() -> None:
        store = zarr.storage.MemoryStore()
        zarr.create_array(store, data=values, chunks=values.shape, compressors=FLOAT_CODEC)

    found.append(
        ("write four variables of 128 peaks", 4 * 2 * 512, 0, "fp32", 4 * cpu_seconds(write) / 32**2)
    )
    return found


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    able = machine()
    head = ", ".join(f"{k} {v / 1e9:.0f} G/s" for k, v in able.items())
    lines = [f"One core, measured: {head}; per pattern of {SIZE} x {SIZE} uint16.", ""]
    lines += [
        "| stage | kB | Mflop | floor, ms | taken, ms | times |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with torch.inference_mode():
        for name, n_bytes, flop, kind, taken in rows():
            floor = n_bytes / able["bytes"] + flop / able[kind]
            lines.append(
                f"| {name} | {n_bytes / 1e3:.0f} | {flop / 1e6:.1f} | {1e3 * floor:.3f} | "
                f"{1e3 * taken:.3f} | {taken / floor:.1f} |"
            )
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "floors.md").write_text(text)


if __name__ == "__main__":
    main()

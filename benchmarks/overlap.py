"""Reading, computing and writing of one worker side by side: what its threads gain when reads are slow.

    python -m benchmarks.overlap

One process does the blocks of a generated store as a worker does, with 1, 2 and 3 threads, one of which at a
time computes, as on a GPU. Every read is held up for as long as a block takes to compute, as on a busy file
system, and once more by four times that. Waiting needs no core, so the figure is one of order, not of this
machine; wall time counts here, and other work on the machine enters all rows alike.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.million import build_store
from fcunet import blocks, schema, tiles
from fcunet.calibrate import calibrate
from fcunet.config import DetectionConfig
from fcunet.store import block_grid, create_peaks, open_datacube, open_peaks

RESULTS = Path(__file__).with_name("results")
DETECTION = DetectionConfig(method="correlation", device="cpu", max_num_peaks=32)


def new_run(store: Path, peaks: Path) -> tiles.TileJob:
    """An empty peaks store for `store`, as a run makes it."""
    shutil.rmtree(peaks, ignore_errors=True)
    datacube, grid = open_datacube(store), block_grid(store)
    shape = datacube["intensity"].shape
    create_peaks(
        peaks, scan_shape=shape[:2], block_shape=grid.block_shape, max_num_peaks=DETECTION.max_num_peaks,
        detector_shape=shape[2:], attrs={"run_id": "overlap"},
    )  # fmt: skip
    tiles.save_calibration(peaks, calibrate(datacube))
    tiles.create_patterns(peaks, grid.n_blocks, shape[2:])
    return tiles.TileJob(str(store), str(peaks), (0, 0), DETECTION, None, "overlap")


@contextmanager
def like_a_gpu(delay_s: float):
    """One thread at a time computes, and every read takes `delay_s` more."""
    before = blocks._one_core_each, tiles.read_region

    def read(*where):
        time.sleep(delay_s)
        return before[1](*where)

    @contextmanager
    def permit():
        with blocks._DEVICE_PERMIT, before[0]():
            yield

    blocks._one_core_each, tiles.read_region = permit, read
    try:
        yield
    finally:
        blocks._one_core_each, tiles.read_region = before


def run(store: Path, peaks: Path, threads: int, delay_s: float) -> tuple[float, list[dict]]:
    """Wall time of all blocks, and what each block says of itself."""
    job, grid = new_run(store, peaks), block_grid(store)
    with like_a_gpu(delay_s), ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        done = list(pool.map(lambda block: tiles.process_tile(job, *block), grid))
        return time.perf_counter() - start, done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scan", type=int, default=160, help="positions per side")
    args = parser.parse_args()
    lines = ["| reads held up by | threads | wall, s | computing, s | times faster | peaks |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        store, peaks = Path(folder, "scan.zarr"), Path(folder, "peaks.zarr")
        build_store(store, args.scan)
        _, done = run(store, peaks, 1, 0.0)
        compute = statistics.median(one["seconds"]["detect"] for one in done)
        reference = open_peaks(peaks).compute()
        for times in (1, 4):
            alone = 0.0
            for threads in (1, 2, 3):
                wall, _ = run(store, peaks, threads, times * compute)
                alone = alone or wall
                found = open_peaks(peaks).compute()
                same = all(
                    np.array_equal(found[k], reference[k], equal_nan=found[k].dtype.kind == "f")
                    for k in schema.PEAKS
                )
                lines.append(
                    f"| {times} x computing | {threads} | {wall:.1f} | {compute * len(done):.1f} | "
                    f"{alone / wall:.2f} | {'the same' if same else 'DIFFER'} |"
                )
    text = "\n".join(lines)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overlap.md").write_text(
        f"{len(done)} blocks; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n\n{text}\n"
    )


if __name__ == "__main__":
    main()

"""What a datacube costs on disk and in time: codecs and chunks, at three doses.

    python -m benchmarks.storage

One shard of 16 x 16 patterns of 256 x 256 uint16 in memory, written and read through Zarr: size, and CPU
seconds of one thread, best of three. The first row is what `fcunet convert` writes.
"""

from pathlib import Path

import numpy as np
import torch
import zarr
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

from benchmarks.disks import simulate_disks
from benchmarks.speed import cpu_seconds

RESULTS = Path(__file__).with_name("results")
SIDE, SIZE = 16, 256


def blosc(name: str, level: int, shuffle: str) -> BloscCodec:
    """A Blosc codec."""
    return BloscCodec(cname=name, clevel=level, shuffle=shuffle)  # type: ignore[arg-type]


CASES = {
    "blosc zstd 1, bitshuffle, chunks 4 x 4": (blosc("zstd", 1, "bitshuffle"), 4),
    "blosc zstd 1, bitshuffle, chunks 2 x 2": (blosc("zstd", 1, "bitshuffle"), 2),
    "blosc zstd 1, bitshuffle, chunks 16 x 16": (blosc("zstd", 1, "bitshuffle"), 16),
    "blosc zstd 1, byte shuffle": (blosc("zstd", 1, "shuffle"), 4),
    "blosc zstd 5, bitshuffle": (blosc("zstd", 5, "bitshuffle"), 4),
    "blosc lz4 5, bitshuffle": (blosc("lz4", 5, "bitshuffle"), 4),
    "zstd 1, no shuffle": (ZstdCodec(level=1), 4),
    "gzip 1": (GzipCodec(level=1), 4),
    "none": (None, 4),
}


def measure(counts: np.ndarray, codec: object, chunk: int) -> tuple[float, float, float]:
    """Ratio, and MB of patterns per CPU second written and read."""
    made: list[zarr.Array] = []

    def write() -> None:
        made[:] = [
            zarr.create_array(
                zarr.storage.MemoryStore(), data=counts, shards=counts.shape,
                chunks=(chunk, chunk, SIZE, SIZE), compressors=codec, fill_value=0,
            )
        ]  # fmt: skip

    written = cpu_seconds(write, 3)
    read = cpu_seconds(lambda: made[0][:], 3)
    return counts.nbytes / made[0].nbytes_stored(), counts.nbytes / written / 1e6, counts.nbytes / read / 1e6


def main() -> None:
    torch.set_num_threads(1)
    zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1})
    lines = ["| codec | electrons | ratio | write, MB per CPU s | read, MB per CPU s |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for electrons in (1e3, 1e4, 1e6):
        scan = simulate_disks((SIDE, SIDE), (SIZE, SIZE), electrons=electrons)
        counts = scan.patterns.astype(np.uint16)
        for name, (codec, chunk) in CASES.items():
            ratio, written, read = measure(counts, codec, chunk)
            lines.append(f"| {name} | {electrons:.0e} | {ratio:.1f} | {written:.0f} | {read:.0f} |")
            print(lines[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "storage.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""What a datacube costs on disk and in time: codecs and chunks, the Rust codecs, `fcunet convert`.

    python -m benchmarks.storage [codecs pipelines convert]

Codecs: one shard of 16 x 16 patterns of 256 x 256 uint16 in memory, at three doses, written and read through
Zarr. Pipelines: a shard of 32 x 32 on the disk (in the page cache), by Zarr's own codecs and by zarrs.
Conversion: `benchmarks.storage_convert`. Always CPU seconds, of one thread but for the conversions, best of
several. The first row of the codecs is what `fcunet convert` writes.
"""

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import zarr
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

from benchmarks.disks import simulate_disks
from benchmarks.speed import cpu_seconds
from fcunet.zarrfolder import COUNT_CODEC, ZARRS

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


def codecs() -> Iterator[str]:
    """Size and speed of each codec at each dose."""
    yield "| codec | electrons | ratio | write, MB per CPU s | read, MB per CPU s |"
    yield "| --- | --- | --- | --- | --- |"
    for electrons in (1e3, 1e4, 1e6):
        scan = simulate_disks((SIDE, SIDE), (SIZE, SIZE), electrons=electrons)
        counts = scan.patterns.astype(np.uint16)
        for name, (codec, chunk) in CASES.items():
            ratio, written, read = measure(counts, codec, chunk)
            yield f"| {name} | {electrons:.0e} | {ratio:.1f} | {written:.0f} | {read:.0f} |"


def pipelines() -> Iterator[str]:
    """Zarr's own codec pipeline beside that of zarrs, by turns in one run, on files."""
    yield "| codecs by | electrons | write, MB per CPU s | read, MB per CPU s | one pattern, CPU ms |"
    yield "| --- | --- | --- | --- | --- |"
    own = str(zarr.config.get("codec_pipeline.path"))
    names = {f"zarr {version('zarr')}": own}
    if find_spec("zarrs") is not None:
        names |= {f"zarrs {version('zarrs')}": ZARRS}
    for electrons in (1e3, 1e4, 1e6):
        part = simulate_disks((SIDE, SIDE), (SIZE, SIZE), electrons=electrons).patterns.astype(np.uint16)
        counts = np.tile(part, (2, 2, 1, 1))
        best: dict[str, list[float]] = {name: [np.inf] * 3 for name in names}
        for _ in range(3):
            for name, pipeline in names.items():
                best[name] = [*map(min, best[name], _read_and_write(counts, pipeline))]
        for name, (written, read, one) in best.items():
            rates = f"{counts.nbytes / written / 1e6:.0f} | {counts.nbytes / read / 1e6:.0f}"
            yield f"| {name} | {electrons:.0e} | {rates} | {1e3 * one:.1f} |"


def _read_and_write(counts: np.ndarray, pipeline: str) -> tuple[float, float, float]:
    """CPU seconds to write a shard, to read it, and to read one pattern of it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        zarr.config.set({"codec_pipeline.path": pipeline}),
    ):
        array = zarr.create_array(
            Path(folder, "a.zarr"), shape=counts.shape, dtype=counts.dtype, shards=counts.shape,
            chunks=(4, 4, SIZE, SIZE), compressors=COUNT_CODEC, fill_value=0,
        )  # fmt: skip

        def write() -> None:
            array[...] = counts

        written = cpu_seconds(write, 1)
        if not np.array_equal(array[...], counts):
            raise RuntimeError(f"{pipeline} gives back other counts than were written")
        return written, cpu_seconds(lambda: array[...], 2), cpu_seconds(lambda: array[5, 7], 4)


def conversions() -> Iterator[str]:
    """`fcunet convert` by format, by shard, and of counted data; MB per CPU s of patterns as uint16."""
    from benchmarks import storage_convert

    counts = storage_convert.scan_of_disks()
    with tempfile.TemporaryDirectory() as folder:
        for title, table in (
            ("by format", storage_convert.formats(Path(folder), counts)),
            ("by shard, from the NumPy file", storage_convert.shards(Path(folder), counts)),
            ("counted data (stempy), 576 x 576 px, 1000 electrons", storage_convert.events(Path(folder))),
        ):
            yield f"{title}:\n"
            yield from table
            yield ""


PARTS = {"codecs": codecs, "pipelines": pipelines, "convert": conversions}


def main() -> None:
    chosen = sys.argv[1:] or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise SystemExit(f"unknown: {', '.join(unknown)}; known are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    for name in chosen:
        lines = [f"## {name}", "", _machine(), ""]
        one_thread = {"async.concurrency": 1, "threading.max_workers": 1}
        with zarr.config.set({} if name == "convert" else one_thread):
            for line in PARTS[name]():
                lines.append(line)
                print(line, flush=True)
        _keep(name, lines)


def _machine() -> str:
    load = os.getloadavg()[0]
    return f"{platform.machine()}, {os.cpu_count()} cores, load {load:.0f}, {date.today().isoformat()}."


def _keep(name: str, lines: list[str]) -> None:
    """Put a part into ``results/storage.md``, leaving the others as they are."""
    path = RESULTS / "storage.md"
    old = path.read_text().split("## ")[1:] if path.exists() else []
    kept = {part.split("\n", 1)[0]: part for part in old} | {name: "\n".join(lines).removeprefix("## ")}
    parts = [f"## {kept[part].rstrip()}" for part in PARTS if part in kept]
    path.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()

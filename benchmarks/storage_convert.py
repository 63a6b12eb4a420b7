"""How fast `fcunet convert` is, beside a plain copy, and what memory it takes; by file format and by shard.

Part of ``python -m benchmarks.storage``. The scans lie in the page cache as far as the machine allows; CPU
seconds of the whole process count, threads of codecs included.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import h5py
import hdf5plugin
import numpy as np

from benchmarks.disks import simulate_disks
from fcunet.convert import convert
from fcunet.datacube import read_region
from fcunet.layout import BlockGrid, Layout, inner_chunk, plan_layout
from fcunet.memory import peak_rss, reset_peak_rss, rss
from fcunet.readers.base import Scan
from fcunet.readers.detect import open_source

SCAN, SIZE, ELECTRONS = (48, 64), 256, 1e4
EVENT_FRAME, EVENT_ELECTRONS = 576, 1000
SHARDS = (8, 16, 32, 48)
_PIECE = 8 * 2**20


def spent(work: Callable[[], object], repeats: int = 2) -> tuple[float, float, int]:
    """Least CPU and wall seconds of one call, and the most memory that one added, in bytes."""
    cpu, wall, memory = [], [], []
    for _ in range(repeats):
        base = rss()
        reset_peak_rss()
        began, on_clock = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - began)
        wall.append(time.perf_counter() - on_clock)
        memory.append(peak_rss() - base)
    return min(cpu), min(wall), max(memory)


def copy(source: Path, dest: Path) -> None:
    """Read and write a file, piece by piece."""
    with source.open("rb") as stream, dest.open("wb") as out:
        while piece := stream.read(_PIECE):
            out.write(piece)


def read_all(source: Path, scan_shape: tuple[int, int], dtype: type = np.uint16) -> None:
    """Read a scan block by block, as a conversion does, and throw it away."""
    scan = Scan(open_source(source), scan_shape)
    layout = plan_layout(scan_shape, (scan.shape[2], scan.shape[3]), dtype)
    grid = BlockGrid(scan_shape, layout.shard)
    for block in grid:
        scan[grid.slices(*block)]


def write_sources(folder: Path, counts: np.ndarray) -> dict[str, Path]:
    """The same scan in the formats to be compared."""
    frames = counts.reshape(-1, SIZE, SIZE)
    np.save(folder / "scan.npy", counts)
    with h5py.File(folder / "plain.h5", "w") as file:
        file.create_dataset("data", data=counts)
    with h5py.File(folder / "chunked.h5", "w") as file:
        codec = hdf5plugin.Bitshuffle(cname="lz4")  # as DECTRIS Arina writes
        file.create_dataset("data", data=frames, chunks=(1, SIZE, SIZE), **codec)
    return {
        "NumPy, as raw binaries": folder / "scan.npy",
        "HDF5, not compressed (py4DSTEM EMD)": folder / "plain.h5",
        "HDF5, a chunk per frame, bitshuffle and lz4 (Arina)": folder / "chunked.h5",
    }


def write_events(path: Path, scan: tuple[int, int], rng: np.random.Generator) -> int:
    """A counted scan in the layout of stempy; returns the size of the dense cube in bytes."""
    n, pixels = scan[0] * scan[1], EVENT_FRAME**2
    lists = [np.sort(rng.integers(0, pixels, k, np.uint32)) for k in rng.poisson(EVENT_ELECTRONS, n)]
    with h5py.File(path, "w") as file:
        group = file.create_group("electron_events")
        frames = group.create_dataset("frames", (n,), h5py.vlen_dtype(np.uint32))
        for i, events in enumerate(lists):
            frames[i] = events
        positions = group.create_dataset("scan_positions", data=np.arange(n, dtype=np.uint32))
        for item, (nx, ny) in ((positions, scan[::-1]), (frames, (EVENT_FRAME, EVENT_FRAME))):
            item.attrs["Nx"], item.attrs["Ny"] = nx, ny
    return n * pixels * 2


def formats(folder: Path, counts: np.ndarray) -> Iterator[str]:
    """Copy, read and convert each format."""
    yield "| from | file, MB | read | convert | ms per pattern | times the copy | memory, MB |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    n, sources = int(np.prod(SCAN)), write_sources(folder, counts)
    copied, _, _ = spent(lambda: copy(folder / "scan.npy", folder / "copy"), 3)
    size, rate = counts.nbytes / 1e6, counts.nbytes / copied / 1e6
    yield f"| plain copy of the first: the floor | {size:.0f} | | {rate:.0f} | | 1.0 | |"
    for name, source in sources.items():
        read, _, _ = spent(lambda source=source: read_all(source, SCAN))
        made, _, memory = spent(
            lambda source=source: convert(
                source, folder / "a.zarr", scan_shape=SCAN, overwrite=True, progress=False
            )
        )
        rates = " | ".join(f"{counts.nbytes / seconds / 1e6:.0f}" for seconds in (read, made))
        yield (
            f"| {name} | {source.stat().st_size / 1e6:.0f} | {rates} | {1e3 * made / n:.2f} | "
            f"{made / copied:.1f} | {memory / 1e6:.0f} |"
        )


def shards(folder: Path, counts: np.ndarray) -> Iterator[str]:
    """Convert with shards of several sizes, and read one of them and one pattern."""
    yield "| shard, patterns | MB | files | convert | read a shard | one pattern, ms | memory, MB |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    source, store = folder / "scan.npy", folder / "shards.zarr"
    for side in SHARDS:
        shard = (side, side)
        layout = Layout(shard, inner_chunk(shard, (SIZE, SIZE), counts.dtype))
        with patch("fcunet.convert.plan_layout", lambda *_, layout=layout: layout):
            made, _, memory = spent(
                lambda: convert(source, store, scan_shape=SCAN, overwrite=True, progress=False)
            )
        region = slice(0, side), slice(0, side)
        size = side * side * SIZE * SIZE * 2
        read, _, _ = spent(lambda region=region: read_region(store, *region), 4)
        one, _, _ = spent(lambda: read_region(store, slice(5, 6), slice(6, 7)), 10)
        name = f"{side} x {side}" + " (by convert, in a large scan)" * (shard == _usual())
        rates = f"{counts.nbytes / made / 1e6:.0f} | {size / read / 1e6:.0f} | {1e3 * one:.1f}"
        yield (
            f"| {name} | {size / 1e6:.0f} | {len(BlockGrid(SCAN, shard))} | {rates} | {memory / 1e6:.0f} |"
        )


def _usual() -> tuple[int, int]:
    return plan_layout((1024, 1024), (SIZE, SIZE), np.uint16).shard


def events(folder: Path) -> Iterator[str]:
    """Convert counted scans of two sizes: does the memory grow with the scan?"""
    yield "| scan | file, MB | dense, MB | datacube, MB | positions per CPU s | dense MB/CPU s | memory, MB |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    rng = np.random.default_rng(4)
    for scan in ((32, 64), (64, 64)):
        source, store = folder / "events.h5", folder / "events.zarr"
        dense = write_events(source, scan, rng)
        made, _, memory = spent(lambda: convert(source, store, overwrite=True, progress=False), 1)  # noqa: B023
        stored = sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
        sizes = " | ".join(f"{n / 1e6:.0f}" for n in (source.stat().st_size, dense, stored))
        rates = f"{scan[0] * scan[1] / made:.0f} | {dense / made / 1e6:.0f}"
        yield f"| {scan[0]} x {scan[1]} | {sizes} | {rates} | {memory / 1e6:.0f} |"


def scan_of_disks() -> np.ndarray:
    """Counts (scan_y, scan_x, qy, qx): one shard of simulated disks, repeated."""
    tile = simulate_disks((16, 16), (SIZE, SIZE), electrons=ELECTRONS).patterns.astype(np.uint16)
    return np.tile(tile, (SCAN[0] // 16, SCAN[1] // 16, 1, 1))

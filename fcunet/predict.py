"""What a run will take, before it starts: memory per worker, device memory, time and size of the output.

Measured, not guessed: a fresh process does what a worker will do with the first block of the store, for some
ten seconds, and says how much memory and time that took. A process of its own, because the memory of this one
is not a worker's, and because one that runs out of memory must not take the command with it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import schema
from .calibration import Calibration
from .cluster import WorkerPlan, plan_workers
from .config import Config, DetectionConfig
from .layout import BlockGrid
from .progress import duration
from .remote import Place, Remote, place, scan_of

MARGIN = 1.25  # the bound: what allocators and a busy machine may add to the measured peak
_EFFICIENCY = 0.9  # of several workers side by side; docs/performance.md measures it
_ANALYSE_S = 0.6e-3  # lattice, strain and grains per position, one core; `python -m benchmarks.speed`
_START_S = 15.0  # workers, calibration, report
_WAIT_S = 300.0  # how long the measurement may take beyond the seconds it was given
_GIB = 2**30


class MeasurementError(RuntimeError):
    """The measuring process failed; the message says how, and the end of what it said."""


@dataclass(frozen=True)
class Measurement:
    """What one thread of one worker took for the first block.

    Attributes
    ----------
    base_bytes : int
        Resident memory of the process with everything loaded and nothing in hand.
    block_bytes : int
        What one block in hand added at most.
    read_s, detect_s, write_s : float
        Seconds per pattern: to read and decompress; repair, detect, virtual images; compress the results.
    stored_bytes : float
        Compressed results per pattern, of the peaks store.
    peaks : float
        Mean number of peaks of a pattern.
    device : str
        "CPU", or the model of the GPU.
    device_bytes, device_total : int
        Peak of what torch reserved on the GPU, and what the GPU has; 0 on a CPU.
    """

    base_bytes: int
    block_bytes: int
    read_s: float
    detect_s: float
    write_s: float
    stored_bytes: float
    peaks: float
    device: str
    device_bytes: int
    device_total: int


@dataclass(frozen=True)
class Prediction:
    """A run in numbers; :meth:`lines` to print, :attr:`problems` to refuse.

    Attributes
    ----------
    measured : Measurement
    workers : WorkerPlan
        How many, how many threads, what memory each may use, and whether they have a GPU.
    patterns, blocks : int
        Of the region to process.
    pixels, itemsize : int
        Of one pattern, and of one pixel as stored.
    max_num_peaks : int
    disk_free : int
        Bytes where the results go.
    second : Measurement, optional
        The same by the second method, where a second opinion is asked for: the same workers do its blocks
        after those of the first.
    """

    measured: Measurement
    workers: WorkerPlan
    patterns: int
    blocks: int
    pixels: int
    itemsize: int
    max_num_peaks: int
    disk_free: int
    second: Measurement | None = None

    @property
    def stages(self) -> list[Measurement]:
        """What is measured of each method, in the order they run."""
        return [self.measured] if self.second is None else [self.measured, self.second]

    @property
    def base_bytes(self) -> int:
        """Memory of a worker with nothing in hand, of the method that takes more."""
        return max(m.base_bytes for m in self.stages)

    @property
    def block_bytes(self) -> int:
        """What a block in hand adds at most, of the method that takes more."""
        return max(m.block_bytes for m in self.stages)

    @property
    def worker_bytes(self) -> int:
        """Peak memory of a worker process, each of its threads with a block in hand."""
        return self.base_bytes + self.workers.threads * self.block_bytes

    @property
    def worker_bound(self) -> int:
        """What no worker should exceed; this much must be allowed."""
        return int(MARGIN * self.worker_bytes)

    @property
    def transferable(self) -> bool:
        """Whether time was measured on the kind of device the workers have."""
        return self.workers.gpu == (self.measured.device != "CPU")

    def rate(self, measured: Measurement) -> float:
        """Patterns per second of all workers together by one of the methods, all stages included."""
        m, w = measured, self.workers
        if w.gpu:  # the threads of a worker read and write while one computes
            each = min(1 / m.detect_s, w.threads / (m.read_s + m.detect_s + m.write_s))
        else:
            each = w.threads / (m.read_s + m.detect_s + m.write_s)
        return each * w.count * (_EFFICIENCY if w.count * w.threads > 1 else 1.0)

    @property
    def seconds(self) -> float:
        """Wall time of the whole run, lattice and strain included."""
        return _START_S + sum(self.patterns * (1 / self.rate(m) + _ANALYSE_S) for m in self.stages)

    @property
    def peaks_bytes(self) -> int:
        """Size of the peaks stores, mean and maximum patterns of the blocks included while it runs."""
        patterns = 12 * self.pixels * self.blocks
        return sum(int(self.patterns * m.stored_bytes + patterns) for m in self.stages)

    @property
    def results_bytes(self) -> int:
        """Size of the results before compression."""
        each = results_bytes_per_position(second=self.second is not None)
        return self.patterns * each + 12 * self.pixels

    @property
    def output_bytes(self) -> int:
        """All that the run writes."""
        return self.peaks_bytes + self.results_bytes

    @property
    def problems(self) -> list[str]:
        """Why this run cannot fit, each with the numbers and what to do; empty if it can."""
        w, found = self.workers, []
        if w.memory is not None and self.worker_bytes > w.memory:
            threads = int((w.memory - MARGIN * self.base_bytes) / (MARGIN * self.block_bytes))
            fewer = (
                f"use {threads} thread{'s' * (threads > 1)} per worker (cores: {threads} in the profile)"
                if threads >= 1 and not w.local
                else f"start fewer workers: --workers {max(1, int(w.count * w.memory / self.worker_bound))}"
                if w.local and w.count > 1
                else f"ask for {gib(self.worker_bound)} (memory: in the profile), "
                "or convert the scan anew, whose blocks then are smaller"
            )
            found.append(
                f"a worker needs {gib(self.worker_bytes)} ({gib(self.base_bytes)} + {w.threads} x "
                f"{gib(self.block_bytes)} for a block in hand), but may use {gib(w.memory)}; {fewer}"
            )
        for m in self.stages:
            if m.device_bytes > m.device_total:
                found.append(f"{m.device} has {gib(m.device_total)}, a batch needs {gib(m.device_bytes)}")
        if self.output_bytes > self.disk_free:
            found.append(
                f"the results need up to {gib(self.output_bytes)}, but {gib(self.disk_free)} are free where "
                "they go; make room, or choose another place: --out DIR"
            )
        return found

    def lines(self) -> list[str]:
        """The prediction in lines of text."""
        m, w = self.measured, self.workers
        limit = f" of {gib(w.memory)}" if w.memory is not None else ""
        each = f"{w.count} worker{'s' * (w.count != 1)} x {w.threads} thread{'s' * (w.threads != 1)}"
        lines = [
            f"  memory    {gib(self.worker_bytes)} per worker, at most {gib(self.worker_bound)}{limit} "
            f"({gib(self.base_bytes)} + {gib(self.block_bytes)} per block in hand) | {each}"
        ]
        if m.device != "CPU":
            used = max(s.device_bytes for s in self.stages)
            lines.append(f"  device    {gib(used)} of {gib(m.device_total)} on {m.device}")
        if self.transferable:
            lines.append(
                f"  time      about {duration(self.seconds)}: {self.patterns:,} patterns at {self._speed(m)}"
            )
            if self.second is not None:
                lines.append(f"  second    counted in: the same patterns at {self._speed(self.second)}")
        else:
            lines.append(
                f"  time      not known: the workers have GPUs, this machine has none (here "
                f"{1 / m.detect_s:,.0f} patterns/s per core); run --dry-run on a node with a GPU"
            )
        peaks = " and ".join(f"{s.peaks:.0f}" for s in self.stages)
        lines.append(
            f"  output    {gib(self.output_bytes)} ({peaks} peaks per pattern) of {gib(self.disk_free)} free"
        )
        return lines

    def _speed(self, m: Measurement) -> str:
        return (
            f"{self.rate(m):,.0f}/s | each read {1e3 * m.read_s:.2f}, detect {1e3 * m.detect_s:.2f}, "
            f"write {1e3 * m.write_s:.2f} ms"
        )


def predict(
    config: Config,
    *,
    seconds: float = 10.0,
    calibration: Calibration | None = None,
    workers: WorkerPlan | None = None,
) -> Prediction:
    """What ``run(config)`` will take, measured on the first block of its store; nothing is written.

    A second opinion is tried as well, and counted in.

    Parameters
    ----------
    config : Config
        ``config.store`` is the datacube.
    seconds : float
        How long to detect for, with each method; reading one whole block comes before.
    calibration : Calibration, optional
        Default: measured, as the run does it.
    workers : WorkerPlan, optional
        Default: what ``config.cluster`` says.

    Raises
    ------
    ValueError
        If there is no store, or its patterns show no disk.
    MeasurementError
        If the measuring process died, most likely because one block does not fit into memory.
    """
    from .calibrate import calibrate
    from .store import open_region

    store = scan_of(config)
    datacube, grid = open_region(store, config.region)
    intensity = datacube["intensity"]
    if workers is None:
        cluster = config.cluster
        workers = plan_workers(cluster.cluster, cluster.workers, device=config.detection.device)
    if calibration is None:
        calibration = calibrate(datacube, **config.calibration.model_dump())
    out = Path(config.out) if config.out is not None else Path("runs")
    origin = (0, 0) if config.region is None else (config.region[0], config.region[2])
    trial = partial(measure_block, store, grid, calibration=calibration, origin=origin, seconds=seconds)
    second = config.second_detection()
    return Prediction(
        measured=trial(config.detection),
        second=None if second is None else trial(second),
        workers=workers,
        patterns=int(np.prod(grid.scan_shape)),
        blocks=len(grid),
        pixels=int(np.prod(intensity.shape[2:])),
        itemsize=intensity.dtype.itemsize,
        max_num_peaks=config.detection.max_num_peaks,
        disk_free=_free(out),
    )


def measure_block(
    store: str | Place,
    grid: BlockGrid,
    detection: DetectionConfig,
    calibration: Calibration,
    *,
    origin: tuple[int, int] = (0, 0),
    seconds: float = 10.0,
) -> Measurement:
    """Do the first block in a fresh process for `seconds`, and say what it took.

    Raises
    ------
    MeasurementError
        If that process dies.
    """
    block_shape = [min(b, n) for b, n in zip(grid.block_shape, grid.scan_shape, strict=True)]
    numeric = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as folder:
        values = calibration.to_dict()
        arrays: dict[str, np.ndarray] = {"probe": calibration.probe}
        if calibration.templates is not None and calibration.template_index is not None:
            arrays |= {"templates": calibration.templates, "template_index": calibration.template_index}
        np.savez(Path(folder, "probe.npz"), **arrays)  # type: ignore[arg-type]
        request = {
            "store": str(store) if isinstance(store, Remote) else str(Path(store).resolve()),
            "storage_options": store.options if isinstance(store, Remote) else {},
            "block_shape": block_shape,
            "origin": list(origin),
            "detection": detection.model_dump(mode="json"),
            "calibration": values,
            "probe": str(Path(folder, "probe.npz")),
            "seconds": seconds,
        }
        done = subprocess.run(
            [sys.executable, "-m", "fcunet.predict"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=seconds + _WAIT_S,
            env=os.environ | numeric | {"MALLOC_TRIM_THRESHOLD_": "65536"},  # as Dask's nannies set it
            check=False,
        )
    if done.returncode:
        reason = "was killed, most likely out of memory" if done.returncode < 0 else "failed"
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise MeasurementError(
            f"the trial with one block of {block_shape[0]} x {block_shape[1]} patterns {reason}: {last[0]}; "
            "for the whole story run it on a few patterns: fcunet preview STORE"
        )
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _measure(request: Mapping[str, Any]) -> Measurement:
    """In the fresh process: everything a worker loads, then one block."""
    import distributed.worker  # noqa: F401  (part of a worker's memory)
    import torch
    import zarr

    from . import memory
    from .blocks import device_name, pick_device, process_block
    from .datacube import read_region
    from .memory import peak_rss, reset_peak_rss, rss
    from .tiles import process_tile  # noqa: F401

    zarr.config.set({"async.concurrency": 4, "threading.max_workers": 4})
    torch.set_num_threads(1)
    detection = DetectionConfig(**request["detection"])
    with np.load(request["probe"]) as saved:
        templates, index = (saved.get(n) for n in ("templates", "template_index"))
        calibration = Calibration.from_dict(
            request["calibration"], probe=saved["probe"], templates=templates, template_index=index
        )
    (by, bx), (y0, x0) = request["block_shape"], request["origin"]
    cuda = pick_device(detection.device).type == "cuda"
    memory.KEEP_FREED = False  # what lies kept for later depends on chance, and is not in hand
    store = place(request["store"], request["storage_options"])
    one = read_region(store, slice(y0, y0 + 1), slice(x0, x0 + 1))
    process_block(one, detection, calibration)  # loads weights and libraries
    base = rss()
    reset_peak_rss()

    start = time.perf_counter()
    chunk = read_region(store, slice(y0, y0 + by), slice(x0, x0 + bx))
    read_s = (time.perf_counter() - start) / (by * bx)
    rows = by if cuda else max(1, -(-64 // bx))  # a GPU needs large batches, and is done soon
    process_block(chunk[:rows], detection, calibration)
    peak = peak_rss() - base
    memory.KEEP_FREED = True
    parts: list[dict[str, np.ndarray]] = []
    n, start = 0, time.perf_counter()
    while n < by and (not parts or time.perf_counter() - start < request["seconds"]):
        some = None if index is None else index[n : min(n + rows, by), :bx]
        parts.append(process_block(chunk[n : n + rows], detection, calibration, template_index=some))
        n = min(n + rows, by)
    detect_s = (time.perf_counter() - start) / (n * bx)
    results = {name: np.concatenate([p[name] for p in parts]) for name in schema.PEAKS if name != "status"}
    start = time.perf_counter()
    stored = sum(_stored_bytes(values) for values in results.values())
    write_s = (time.perf_counter() - start) / (n * bx)
    whole = {k: np.empty((by, bx, *v.shape[2:]), v.dtype) for k, v in results.items()}  # as a worker holds it
    block = max(peak, chunk.nbytes) + sum(v.nbytes for v in whole.values())
    return Measurement(
        base_bytes=base,
        block_bytes=block,
        read_s=read_s,
        detect_s=detect_s,
        write_s=write_s,
        stored_bytes=stored / (n * bx),
        peaks=float(results["n_peaks"].mean()),
        device=device_name(detection.device),
        device_bytes=torch.cuda.max_memory_reserved() if cuda else 0,
        device_total=torch.cuda.mem_get_info()[1] if cuda else 0,
    )


def _stored_bytes(values: np.ndarray) -> int:
    """Size of `values` as the peaks store compresses them."""
    import zarr

    from .zarrfolder import FLOAT_CODEC

    array = zarr.create_array(
        zarr.storage.MemoryStore(), data=values, chunks=values.shape, compressors=FLOAT_CODEC
    )
    return array.nbytes_stored()


def results_bytes_per_position(*, second: bool = False) -> int:
    """Uncompressed size of the results of one scan position, from the schema; with a second opinion."""
    lengths = {"parameter": len(schema.LATTICE_PARAMETERS), "row": 2, "column": 2}
    lengths["parameter2"] = lengths["parameter"]
    tables = [schema.STRAIN, schema.LATTICE, schema.VIRTUAL] + [schema.SECOND] * second
    return sum(
        4 * int(np.prod([lengths[d] for d in variable.dims if d not in schema.SCAN_DIMS]))
        for table in tables
        for variable in table.values()
    )


def _free(path: Path) -> int:
    """Bytes free on the disk where `path` is or will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def gib(n: float) -> str:
    """`n` bytes in words."""
    return f"{n / _GIB:.2f} GiB" if n >= 0.1 * _GIB else f"{n / 2**20:.1f} MiB"


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(json.load(sys.stdin)))))

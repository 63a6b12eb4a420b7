"""The blocks of a run as Dask tasks: each reads its shard, finds the peaks, writes its region, marks it done.

Why futures through a window, and not one lazy `map_blocks` graph over the block index: a worker that is lost
(walltime, node, memory) adds one death to the account of *every* task assigned to it, and a task with a few
deaths is given up as `KilledWorker`. A graph assigns the whole backlog at once, so a few lost jobs in a row
end the run (dask/distributed issues 5234, 9164). With two or three tasks per worker in flight only those are
at stake, the scheduler holds a few kilobytes however large the scan is, a stop takes effect within one block,
and a block that cannot be done is an event of its own and not the failure of a graph. What each task does is
the same function of (iy, ix) as in a `map_blocks` over the block index.
"""

import contextlib
import errno
import logging
import os
import queue
import shutil
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from distributed import Client, Future, KilledWorker
from distributed.comm import CommClosedError

from . import schema
from .calibration import Calibration
from .config import DetectionConfig
from .datacube import read_region
from .kernels.descan import surface_at
from .layout import BlockGrid
from .memory import peak_rss
from .remote import Remote
from .store import block_grid, load_calibration, read_status, set_status, write_peaks_block
from .thumbnails import ProvisionalBasis, picture_side, thumbnails
from .zarrfolder import FLOAT_CODEC, has_array, open_array, put_array, replace_folder

logger = logging.getLogger(__name__)

Block = tuple[int, int]

_RETRIES = 2  # intermittent decompression errors are known (zarr-developers/numcodecs issue 810)
_POLL_S = 0.25
_RESULT_TIMEOUT_S = 5.0
_DRAIN_S = 600.0  # how long a stop waits for the blocks in flight
_GONE = "the Dask scheduler is gone; run the same command again to continue"
_PARTIAL = "partial"  # group in the peaks store: what each block adds to the mean and maximum pattern


class StorageError(RuntimeError):
    """No block can be read or written: a full disk, a quota, a path that a node does not see."""


@dataclass(frozen=True)
class TileJob:
    """What all tiles of a run share; small, for it travels with every task.

    Attributes
    ----------
    store, peaks : str, or Remote for a datacube at a URL
        Paths of the datacube and of the peaks store, as the workers see them; the datacube may be at a URL.
    origin : tuple of int
        First row and column of the scan region.
    detection : DetectionConfig
    weights_sha256 : str or None
        Checksum the network's weights must have.
    run_id : str
        Changes when the peaks store is made anew; a task that outlived its run must not write into the next.
    basis : ProvisionalBasis, optional
        What the strain of the live map is computed with, once it is known; no result depends on it.
    """

    store: str | Remote
    peaks: str
    origin: tuple[int, int]
    detection: DetectionConfig
    weights_sha256: str | None
    run_id: str
    basis: ProvisionalBasis | None = None


@dataclass
class TileCounts:
    """How the tiles of a run ended."""

    done: int = 0
    failed: dict[Block, str] = field(default_factory=dict)


def scan_slices(grid: BlockGrid, origin: tuple[int, int], iy: int, ix: int) -> tuple[slice, slice]:
    """Where block (iy, ix) of a run over a scan region lies in the whole scan."""
    ys, xs = grid.slices(iy, ix)
    y0, x0 = origin
    return slice(ys.start + y0, ys.stop + y0), slice(xs.start + x0, xs.stop + x0)


def process_tile(job: TileJob, iy: int, ix: int) -> dict[str, Any]:
    """Read, process and store block (iy, ix); the only thing a worker does.

    Nothing but the mark in `status` says that a block is done, and it is set last. Doing a block twice, even
    at the same time, writes the same bytes twice.

    Returns
    -------
    dict
        Numbers for the progress: patterns, peaks, seconds per stage, peak memory in bytes, and the pictures
        of `fcunet.thumbnails` under ``maps``.
    """
    # the first block imports torch, a call stack too deep for Dask to weigh when it sends its profile
    logging.getLogger("distributed.sizeof").setLevel(logging.ERROR)
    import torch

    from .blocks import device_name, process_block

    # several torch threads add up in another order: the bytes would depend on the cores of the machine
    torch.set_num_threads(1)
    _check_sight(job)
    start = time.perf_counter()
    grid = block_grid(job.peaks)
    ys, xs = scan_slices(grid, job.origin, iy, ix)
    chunk = read_region(job.store, ys, xs)
    read = time.perf_counter()
    calibration = _calibration(job)
    origin = origin_of_block(calibration, *grid.slices(iy, ix))
    values = process_block(
        chunk,
        job.detection,
        calibration,
        origin=origin,
        template_index=None
        if calibration.template_index is None
        else calibration.template_index[grid.slices(iy, ix)],
        weights_sha256=job.weights_sha256,
    )
    computed = time.perf_counter()
    _check_run(job)
    with full_disk_is_named(job.peaks):
        write_peaks_block(job.peaks, iy, ix, values)
        for name in ("sum", "maximum"):
            open_array(Path(job.peaks, _PARTIAL), name, mode="r+")[iy, ix] = values[name]
        set_status(job.peaks, iy, ix, schema.STATUS_DONE)
    end = time.perf_counter()
    return {
        "patterns": int(values["n_peaks"].size),
        "peaks": int(values["n_peaks"].sum()),
        "truncated": int(values["truncated"].sum()),
        "empty": int((values["n_peaks"] == 0).sum()),
        "bytes": int(chunk.nbytes),
        "seconds": {"read": read - start, "detect": computed - read, "write": end - computed},
        "device": device_name(job.detection.device),
        "peak_rss": peak_rss(),
        "maps": thumbnails(values, origin, job.basis, side=picture_side(len(grid))),
    }


submitted = process_tile  # what goes to the workers


def mark_failed(job: TileJob, iy: int, ix: int) -> None:
    """Leave block (iy, ix) as NaN, without peaks, and say so in `status`."""
    grid = block_grid(job.peaks)
    for name in schema.PEAKS:
        if name != "status":
            array = open_array(job.peaks, name, mode="r+")
            array[grid.slices(iy, ix)] = array.fill_value
    for name in ("sum", "maximum"):
        array = open_array(Path(job.peaks, _PARTIAL), name, mode="r+")
        array[iy, ix] = array.fill_value
    set_status(job.peaks, iy, ix, schema.STATUS_FAILED)


def create_patterns(peaks: str | Path, n_blocks: tuple[int, int], detector_shape: tuple[int, int]) -> None:
    """Room for what each block adds to the mean and maximum pattern; an existing one is kept.

    About 1 % of the scan in size; :func:`finish_patterns` takes it away again.
    """
    folder = Path(peaks, _PARTIAL)
    group = zarr.open_group(folder, mode="a", zarr_format=3)
    for name, dtype, fill in (("sum", np.float64, 0.0), ("maximum", np.float32, np.nan)):
        if not has_array(folder, name):
            group.create_array(
                name,
                shape=(*n_blocks, *detector_shape),
                chunks=(1, 1, *detector_shape),
                dtype=dtype,
                fill_value=fill,
                compressors=FLOAT_CODEC,
                dimension_names=(*schema.BLOCK_DIMS, *schema.PATTERN_DIMS),
            )


def finish_patterns(peaks: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and maximum pattern of the run, float32 (qy, qx), from what the blocks left; kept with the peaks.

    The blocks are added in a fixed order, so that the result does not depend on which came first. What
    each block added stays while there are some that failed: these may be done again.
    """
    final, folder = Path(peaks, "diffraction"), Path(peaks, _PARTIAL)
    if not final.exists():
        sums, maxima = (open_array(folder, name) for name in ("sum", "maximum"))
        total, maximum = np.zeros(sums.shape[2:]), np.full(sums.shape[2:], np.nan, np.float32)
        for iy, ix in np.ndindex(*sums.shape[:2]):
            total += np.asarray(sums[iy, ix])
            maximum = np.fmax(maximum, np.asarray(maxima[iy, ix]))
        n = int(np.isfinite(open_array(peaks, "total")[:]).sum())  # failed and dark positions are NaN there
        mean = (total / n if n else np.full_like(total, np.nan)).astype(np.float32)
        with _nascent_group(final) as group:
            for name, pattern in (("mean", mean), ("maximum", maximum)):
                put_array(group, name, pattern, schema.PATTERN_DIMS, schema.DIFFRACTION[name].attrs)
    if (read_status(peaks) == schema.STATUS_DONE).all():
        shutil.rmtree(folder, ignore_errors=True)
    return np.asarray(open_array(final, "mean")[:]), np.asarray(open_array(final, "maximum")[:])


def reopen_patterns(peaks: str | Path) -> None:
    """Forget the mean and maximum pattern, because blocks that had failed are tried again."""
    shutil.rmtree(Path(peaks, "diffraction"), ignore_errors=True)


def save_calibration(peaks: str | Path, calibration: Calibration) -> None:
    """Keep what was measured in the peaks store, from where every worker reads it."""
    values = calibration.to_dict()
    values.pop("bad_pixels")
    with _nascent_group(Path(peaks, "calibration")) as group:
        group.attrs.update(values)
        put_array(group, "probe", calibration.probe, schema.PATTERN_DIMS, {})
        put_array(group, "bad_pixels", calibration.bad_pixels, schema.PATTERN_DIMS, {})
        if calibration.origin_stored is not None:
            put_array(group, "origin", calibration.origin_stored, (*schema.SCAN_DIMS, "axis"), {})
        if calibration.templates is not None and calibration.template_index is not None:
            put_array(group, "templates", calibration.templates, ("template", *schema.PATTERN_DIMS), {})
            put_array(group, "template_index", calibration.template_index, schema.SCAN_DIMS, {})


@contextlib.contextmanager
def _nascent_group(final: Path) -> Iterator[zarr.Group]:
    """A Zarr group that appears under its name only when it is complete."""
    draft = final.with_name(f"{final.name}.partial.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    yield zarr.create_group(draft, zarr_format=3)
    replace_folder(draft, final)


def run_tiles(
    client: Client,
    job: TileJob,
    tiles: Iterable[Block],
    *,
    on_done: Callable[[Block, dict[str, Any]], None],
    on_failed: Callable[[Block, str], None],
    on_tick: Callable[[int], None] = lambda workers: None,
    stop: threading.Event | None = None,
    basis: Callable[[], ProvisionalBasis | None] = lambda: None,
) -> TileCounts:
    """Feed `tiles` to the workers of `client`, two or three per worker at a time, and wait for them.

    A tile whose task raises is tried three times. One that was assigned to several workers as they died may
    be innocent: it is tried again at the end, one tile per worker, so that only a tile that itself kills
    workers is given up.

    Parameters
    ----------
    client : distributed.Client
    job : TileJob
    tiles : iterable of (iy, ix)
    on_done, on_failed : callable
        Called in this thread with the block and what the task returned, or the reason it failed.
    on_tick : callable
        Called a few times per second with the number of workers; may raise to end the run.
    stop : threading.Event, optional
        When set, no more tiles are submitted, and the call returns when those in flight are done.

    basis : callable, optional
        Gives the basis of the live map's strain, once it is known.

    Returns
    -------
    TileCounts
    """
    counts = TileCounts()
    stop = stop or threading.Event()
    suspects: deque[Block] = deque()
    window = _Window(client, job, basis)
    try:
        for todo, per_worker in ((deque(tiles), None), (suspects, 1)):
            window.drain(
                todo,
                per_worker,
                suspects if per_worker is None else None,
                counts,
                on_done,
                on_failed,
                on_tick,
                stop,
            )
    except CommClosedError as err:  # the scheduler died while it was asked
        raise ConnectionError(_GONE) from err
    finally:
        window.cancel()
    return counts


class _Window:
    """The tiles in flight."""

    def __init__(
        self, client: Client, job: TileJob, basis: Callable[[], ProvisionalBasis | None] = lambda: None
    ) -> None:
        self.client, self.job, self.basis = client, job, basis
        self.finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self.flying: dict[Future, Block] = {}
        self._workers, self._slots, self._asked = 0, 0, 0.0
        self._known: set[str] = set()
        self._marked: set[str] = set()
        self._need: dict[str, float] | None = None

    def drain(
        self,
        todo: deque[Block],
        per_worker: int | None,
        suspects: deque[Block] | None,
        counts: TileCounts,
        on_done: Callable[[Block, dict[str, Any]], None],
        on_failed: Callable[[Block, str], None],
        on_tick: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        stopping_since: float | None = None
        while self.flying or (todo and not stop.is_set()):
            if stop.is_set():
                stopping_since = stopping_since or time.monotonic()
                if not self._workers or time.monotonic() - stopping_since > _DRAIN_S:
                    return  # nobody is there to finish them
            self._fill(todo, per_worker, stop)
            on_tick(self._workers)
            try:
                future = self.finished.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            block = self.flying.pop(future)
            if future.status == "finished":
                try:
                    numbers = future.result(timeout=_RESULT_TIMEOUT_S)
                except TimeoutError:  # the worker died with the numbers in its memory
                    todo.append(block)
                    continue
                counts.done += 1
                on_done(block, numbers)
                continue
            if future.status != "error":  # cancelled or lost: the scheduler forgot it
                if self.client.status != "running":
                    raise ConnectionError(_GONE)
                todo.append(block)
                continue
            error = future.exception()
            if isinstance(error, StorageError):  # it would be the same with every other block
                raise error
            if isinstance(error, KilledWorker) and suspects is not None:
                logger.warning("block %s was on several workers that died; it is tried again alone", block)
                suspects.append(block)
                continue
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, KilledWorker):
                reason = "every worker that took it died, most likely out of memory"
            with full_disk_is_named(self.job.peaks):
                mark_failed(self.job, *block)
            counts.failed[block] = reason
            on_failed(block, reason)

    def cancel(self) -> None:
        if self.flying:
            with contextlib.suppress(Exception):  # the connection may be what broke
                self.client.cancel(list(self.flying), force=True)
        self.flying.clear()

    def _fill(self, todo: deque[Block], per_worker: int | None, stop: threading.Event) -> None:
        now = time.monotonic()
        if now - self._asked > 2 or not self._workers:
            try:
                threads = self._eligible(self.client.nthreads())
            except OSError as err:
                raise ConnectionError(_GONE) from err
            self._workers, self._slots, self._asked = len(threads), sum(threads.values()), now
        # one more per worker than it has threads: the next tile is there when one ends
        size = max(self._workers, 1) * per_worker if per_worker else max(self._slots + self._workers, 2)
        if self.job.basis is None and (found := self.basis()) is not None:
            self.job = replace(self.job, basis=found)
        while todo and len(self.flying) < size and not stop.is_set():
            block = todo.popleft()
            future = self.client.submit(
                submitted,
                self.job,
                *block,
                key=f"fcunet-tile-{block[0]}-{block[1]}-{uuid.uuid4().hex[:8]}",
                retries=_RETRIES,
                pure=False,
                resources=self._need,
            )
            self.flying[future] = block
            future.add_done_callback(self.finished.put)

    def _eligible(self, threads: Mapping[str, int]) -> dict[str, int]:
        """Threads of the workers that blocks go to: all, unless only some have a GPU and say so.

        That is a scheduler of the user's own, to which CPU workers have come too (``dask worker --resources
        GPU=1`` marks those with a GPU). The need is given with each task: annotations do not survive Dask's
        graph optimisation (dask/dask issue 7036).
        """
        if self.job.detection.device == "cpu":
            return dict(threads)
        if threads.keys() != self._known:
            infos = self.client.scheduler_info(n_workers=-1)["workers"]
            supply = {a: float(info["resources"].get("GPU", 0)) for a, info in infos.items()}
            self._marked = {a for a, gpus in supply.items() if gpus}
            shares = [supply[a] / infos[a]["nthreads"] for a in self._marked]  # its threads share a GPU
            self._need = {"GPU": min(shares)} if 0 < len(shares) < len(infos) else None
            self._known = set(threads)
        return {a: n for a, n in threads.items() if not self._need or a in self._marked}


_CALIBRATIONS: dict[str, Calibration] = {}


def _calibration(job: TileJob) -> Calibration:
    """The calibration of the run, read once per process."""
    found = _CALIBRATIONS.get(job.run_id)
    if found is None:
        found = load_calibration(job.peaks)
        _CALIBRATIONS.clear()
        _CALIBRATIONS[job.run_id] = found
    return found


def origin_of_block(calibration: Calibration, ys: slice, xs: slice) -> np.ndarray:
    """Beam centre (y, x) at the positions of a block."""
    if calibration.origin_stored is not None:
        return calibration.origin_stored[ys, xs]
    y, x = np.mgrid[ys, xs]
    return surface_at(calibration.origin_plane, np.stack([y, x], axis=-1))


def _check_sight(job: TileJob) -> None:
    """A node that does not see the stores says so, and not that each block is damaged."""
    if isinstance(job.store, Remote):
        _check_url(job.store)
    for path in (job.store, job.peaks):
        if not isinstance(path, Remote) and not os.path.isdir(path):
            raise StorageError(
                f"{_node()} does not see {path}; put the scan and the run directory (--out) on a file system "
                "that all nodes share, or keep away from that node (job-extra-directives: --exclude=NODE); "
                "then the same command continues"
            )


def _check_url(store: Remote) -> None:
    """A node that does not reach the scan, has no credentials, or lacks a package, says so."""
    try:
        reason = None if store.exists() else "there is no Zarr store"
    except (OSError, ImportError) as err:
        reason = str(err)
    if reason is not None:
        raise StorageError(
            f"{_node()} cannot read {store}: {reason}. Every worker reads the scan by itself, with the "
            "network, packages and credentials of its own node; then the same command continues"
        )


@contextlib.contextmanager
def full_disk_is_named(path: str | Path) -> Iterator[None]:
    """Turns "no space left" and "quota exceeded" into a :class:`StorageError` that says what to do."""
    try:
        yield
    except OSError as err:
        if err.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(
            f"{os.strerror(err.errno)}: {_node()} cannot write to {path}; make room there (df -h, quota -s), "
            "then the same command continues"
        ) from None


def _node() -> str:
    """This machine, by the name SLURM knows it by."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _check_run(job: TileJob) -> None:
    found = zarr.open_group(job.peaks, mode="r", use_consolidated=False).attrs.get("run_id")
    if found != job.run_id:
        raise RuntimeError(
            f"{os.path.basename(job.peaks)} belongs to another run by now; nothing was written"
        )

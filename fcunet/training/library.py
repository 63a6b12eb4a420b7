"""A training library on disk: scattered orientations, or finished patterns, in a sharded Zarr store.

``NAME.zarr/SPLIT`` holds one array per field of :class:`~fcunet.training.dataset.Pool` (contents
"coefficients": disk polynomials, drawn anew on every visit, 12 KB per pattern) or of
:class:`~fcunet.training.dataset.TrainingBatch` (contents "patterns"). A shard is a part; each Dask task makes
one part from its own random numbers, writes it, then marks it in `status`. So a stopped build continues with
the same call, and ends with what an undisturbed one would have written on the same kind of machine.
"""

import dataclasses
import logging
import math
import os
import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import zarr
from distributed import Client, Future

from ..provenance import to_json
from ..zarrfolder import FLOAT_CODEC, open_array
from .dataset import _SPLIT_SEEDS, PatternSource, TrainingBatch
from .orientations import N_SPOTS, Pool, empty_pool, make_orientations, training_crystals

logger = logging.getLogger(__name__)

FORMAT = "fcunet training library"
_TICK_S = 1.0
_DONE = 1
_CHUNK_BYTES = 2**20
_DRAWN_AT_ONCE = 16


@dataclass(frozen=True)
class LibraryPlan:
    """What a library holds; the same plan gives the same library.

    Attributes
    ----------
    split : str
        Crystals to scatter from: "train", "validation" or "test".
    contents : str
        "coefficients" (of orientations) or "patterns".
    n_patterns : int
        Patterns, or thicknesses times orientations.
    n_thicknesses : int
        Thicknesses per orientation.
    part : int
        Rows (orientations or patterns) per shard and task.
    size : int
        Frame edge of patterns, px.
    """

    split: str = "train"
    contents: Literal["coefficients", "patterns"] = "coefficients"
    n_patterns: int = 200_000
    n_thicknesses: int = 4
    part: int = 256
    size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in _SPLIT_SEEDS:
            raise ValueError(f"unknown split {self.split!r}; known: {', '.join(_SPLIT_SEEDS)}")
        if self.contents not in ("coefficients", "patterns"):
            raise ValueError(f"contents {self.contents!r} is not known; use 'coefficients' or 'patterns'")
        if min(self.n_patterns, self.n_thicknesses, self.part, self.size) < 1:
            raise ValueError("n_patterns, n_thicknesses, part and size must be 1 or more")

    @property
    def n_rows(self) -> int:
        """Orientations or patterns."""
        return -(-self.n_patterns // (self.n_thicknesses if self.contents == "coefficients" else 1))

    @property
    def n_parts(self) -> int:
        return -(-self.n_rows // self.part)

    def rows(self, k: int) -> slice:
        """Rows of part `k`."""
        return slice(k * self.part, min((k + 1) * self.part, self.n_rows))


def _template(plan: LibraryPlan) -> dict[str, np.ndarray]:
    """One array per field without rows, for shapes and dtypes."""
    if plan.contents == "coefficients":
        return {f.name: getattr(empty_pool(plan.n_thicknesses), f.name) for f in dataclasses.fields(Pool)}
    frame, spots = (plan.size, plan.size), (N_SPOTS,)
    shapes = {"pattern": frame, "probe": frame, "spot_position": (*spots, 2), "spot_amplitude": spots,
              "spot_electrons": spots, "origin": (2,), "optics": (2,)}  # fmt: skip
    return {
        f.name: np.empty((0, *shapes.get(f.name, ())), np.float32) for f in dataclasses.fields(TrainingBatch)
    }


def create_library(path: str | Path, plan: LibraryPlan) -> Path:
    """Make the empty arrays of ``PATH/SPLIT``, or check that those there follow the same plan.

    Returns
    -------
    Path
        The folder of the split.

    Raises
    ------
    ValueError
        If a library of another plan lies there.
    """
    folder = Path(path) / plan.split
    wanted = {"format": FORMAT, "plan": dataclasses.asdict(plan)}
    if (folder / "zarr.json").exists():
        if open_plan(folder) != plan:
            raise ValueError(
                f"{folder} follows another plan: {open_plan(folder)}; needed is {plan}. Use the same "
                "settings to continue it, or another output"
            )
        return folder
    zarr.open_group(path, mode="a")
    group = zarr.open_group(folder, mode="w")
    for name, empty in _template(plan).items():
        row = empty.shape[1:]
        dtype = empty.dtype if empty.dtype.kind != "U" else np.dtype(np.uint8)
        if empty.dtype.kind == "U":  # UTF-8, padded with zeros: Zarr has no settled type for short strings
            row = (empty.dtype.itemsize // 4,)
        fitting = max(1, _CHUNK_BYTES // max(1, int(np.prod(row)) * dtype.itemsize))
        chunk = max(d for d in range(1, plan.part + 1) if plan.part % d == 0 and d <= fitting)
        group.create_array(
            name,
            shape=(plan.n_rows, *row),
            chunks=(chunk, *row),
            shards=(plan.part, *row),
            dtype=dtype,
            fill_value=np.nan if dtype.kind == "f" else 0,
            compressors=FLOAT_CODEC,
        )
    group.create_array("status", shape=(plan.n_parts,), chunks=(1,), dtype=np.uint8, compressors=None)
    # last: a folder with these attributes is complete
    group.attrs.update(to_json(wanted))
    return folder


def open_plan(folder: str | Path) -> LibraryPlan:
    """The plan of the library in ``PATH/SPLIT``."""
    try:
        attrs = dict(zarr.open_group(folder, mode="r").attrs)
    except FileNotFoundError:
        attrs = {}
    if attrs.get("format") != FORMAT:
        raise ValueError(
            f"{os.fspath(folder)} is not a training library; make one with: "
            "python workflows/build_training_library.py NAME.zarr, and name the split: NAME.zarr/train"
        )
    return LibraryPlan(**attrs["plan"])  # type: ignore[arg-type]


def missing_parts(folder: str | Path) -> list[int]:
    """Numbers of the parts not written yet."""
    return np.flatnonzero(np.asarray(zarr.open_array(Path(folder) / "status", mode="r")[:]) != _DONE).tolist()


def make_part(plan: LibraryPlan, k: int, device: torch.device | str = "cpu") -> dict[str, np.ndarray]:
    """The rows of part `k`: one array per field."""
    n = plan.rows(k).stop - plan.rows(k).start
    rng = np.random.default_rng([plan.seed, _SPLIT_SEEDS[plan.split], k])
    orientations = n if plan.contents == "coefficients" else -(-n // plan.n_thicknesses)
    pool = make_orientations(
        training_crystals(plan.split), orientations, rng, n_thicknesses=plan.n_thicknesses, device=device
    )
    if plan.contents == "coefficients":
        return {f.name: getattr(pool, f.name) for f in dataclasses.fields(Pool)}
    source = PatternSource(plan.split, plan.size, device, int(rng.integers(2**31)), pool=pool)
    made: dict[str, list[np.ndarray]] = {f.name: [] for f in dataclasses.fields(TrainingBatch)}
    for start in range(0, n, _DRAWN_AT_ONCE):
        batch = source.batch(min(_DRAWN_AT_ONCE, n - start)).to("cpu")
        for name, values in made.items():
            array = getattr(batch, name).numpy()
            if name.startswith("spot_"):
                padded = np.full((len(array), N_SPOTS, *array.shape[2:]), np.nan, np.float32)
                padded[:, : array.shape[1]] = array
                array = padded
            values.append(array)
    return {name: np.concatenate(values) for name, values in made.items()}


def write_part(folder: str | Path, k: int, device: torch.device | str = "cpu") -> int:
    """Make part `k`, write it, mark it as done; what one Dask task does. Returns the number of its rows."""
    torch.set_num_threads(1)
    plan = open_plan(folder)
    rows = plan.rows(k)
    for name, values in make_part(plan, k, device).items():
        if values.dtype.kind == "U":
            width = values.dtype.itemsize // 4
            values = np.char.encode(values, "utf-8").astype(f"S{width}").view(np.uint8).reshape(-1, width)
        open_array(folder, name, "r+")[rows] = values
    zarr.open_array(Path(folder) / "status", mode="r+")[k] = _DONE
    return rows.stop - rows.start


def build_library(
    client: Client,
    path: str | Path,
    plan: LibraryPlan,
    *,
    device: torch.device | str = "cpu",
    on_part: Callable[[int, int], None] | None = None,
    on_tick: Callable[[int, int], None] = lambda workers, done: None,
) -> Path:
    """Write all missing parts with the workers of `client`, a few per worker at a time.

    Parameters
    ----------
    path : path
        ``NAME.zarr``, on a file system that all workers share.
    device : str
        "auto": the GPU of each worker if it has one.
    on_part : callable, optional
        Called with (parts done, parts in all) after each part.
    on_tick : callable
        Called every second with (workers, parts done); may raise to end the build, as
        `fcunet.cluster.report_health` does when jobs die.

    Raises
    ------
    RuntimeError
        If parts failed; all others are written by then.
    """
    folder = create_library(path, plan)
    todo = deque(missing_parts(folder))
    logger.info("%d of %d parts of %s are missing", len(todo), plan.n_parts, folder)
    done = plan.n_parts - len(todo)
    running: dict[Future, int] = {}
    finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
    failed: dict[int, BaseException] = {}
    threads: dict[str, int] = {}
    asked = -math.inf
    while todo or running:
        if time.monotonic() - asked > _TICK_S:  # workers come and go
            threads, asked = client.nthreads(), time.monotonic()
            on_tick(len(threads), done)
        while todo and len(running) < max(2, 2 * sum(threads.values())):
            k = todo.popleft()
            future = client.submit(_task, str(folder.resolve()), k, str(device), pure=False, retries=2)
            running[future] = k
            future.add_done_callback(finished.put)
        try:
            future = finished.get(timeout=_TICK_S)
        except queue.Empty:
            continue
        k = running.pop(future)
        if future.status == "finished":
            done += 1
            if on_part:
                on_part(done, plan.n_parts)
        else:
            failed[k] = (future.exception() if future.status == "error" else None) or RuntimeError(
                future.status
            )
    if failed:
        k, error = next(iter(failed.items()))
        raise RuntimeError(
            f"{len(failed)} of {plan.n_parts} parts failed, the first ({k}) with: {error!r}; "
            "the same command tries them again"
        ) from error
    return folder


def _task(folder: str, k: int, device: str) -> int:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return write_part(folder, k, device)


# --- reading ---


def _read(folder: Path, name: str, parts: list[slice]) -> np.ndarray:
    array = open_array(folder, name)
    return np.concatenate([np.asarray(array[rows]) for rows in parts])


def read_pool(folder: str | Path, *, max_orientations: int | None = None) -> Pool:
    """Orientations of a library, as a pool for :class:`PatternSource`; unfinished parts are left out.

    Parameters
    ----------
    folder : path
        ``NAME.zarr/SPLIT``.
    max_orientations : int, optional
        Read whole parts until there are so many (50 KB of memory each).
    """
    folder = Path(folder)
    plan = open_plan(folder)
    if plan.contents != "coefficients":
        raise ValueError(f"{folder} holds patterns, not coefficients; read it with LibrarySource")
    missing = set(missing_parts(folder))
    parts = [plan.rows(k) for k in range(plan.n_parts) if k not in missing]
    if max_orientations is not None:
        parts = parts[: -(-max_orientations // plan.part)]
    if not parts:
        raise ValueError(f"{folder} has no finished part yet; let workflows/build_training_library.py go on")
    arrays = {f.name: _read(folder, f.name, parts) for f in dataclasses.fields(Pool)}
    width = arrays["crystal"].shape[1]
    names = np.char.decode(np.ascontiguousarray(arrays["crystal"]).view(f"S{width}")[:, 0], "utf-8")
    return Pool(**{**arrays, "crystal": names.astype(f"U{width}")}).last(max_orientations or plan.n_rows)


class LibrarySource:
    """Training batches from a library: patterns drawn from its orientations, or stored ones in random order.

    Parameters
    ----------
    path : path
        ``NAME.zarr``; its group `split` is read.
    split, size, device, seed, **options
        As for :class:`~fcunet.training.dataset.PatternSource`; a library of patterns has a size of its own
        and no options.

    Raises
    ------
    ValueError
        If there is no library of that split, or its patterns have another size.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        size: int = 256,
        device: torch.device | str = "cpu",
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.folder = Path(path) / split
        self.plan = open_plan(self.folder)
        self.device = torch.device(device)
        self._source: PatternSource | None = None
        if self.plan.contents == "coefficients":
            options["refresh"] = 0.0  # nothing is scattered, nothing of the library is replaced
            self._source = PatternSource(split, size, device, seed, pool=self.folder, **options)
            return
        options.pop("refresh", None)
        if size != self.plan.size or options:
            raise ValueError(
                f"{self.folder} holds patterns of {self.plan.size} px as they are; asked for were {size} px "
                f"and the options {options or 'none'}; build it with --size {size}, or with --contents "
                "coefficients"
            )
        missing = set(missing_parts(self.folder))
        chunk = open_array(self.folder, "pattern").chunks[0]
        self._chunks = [
            slice(start, min(start + chunk, rows.stop))
            for rows in (self.plan.rows(k) for k in range(self.plan.n_parts) if k not in missing)
            for start in range(rows.start, rows.stop, chunk)
        ]
        if not self._chunks:
            raise ValueError(f"{self.folder} has no finished part yet")
        self._rng = np.random.default_rng([_SPLIT_SEEDS[split], seed])
        self._order: list[int] = []

    def batch(self, n: int) -> TrainingBatch:
        """`n` patterns; of stored ones, every chunk is visited once before any is visited again."""
        if self._source is not None:
            return self._source.batch(n)
        parts: list[slice] = []
        while sum(p.stop - p.start for p in parts) < n:
            if not self._order:
                self._order = self._rng.permutation(len(self._chunks)).tolist()
            parts.append(self._chunks[self._order.pop()])
        names = [f.name for f in dataclasses.fields(TrainingBatch)]
        read = {name: torch.from_numpy(_read(self.folder, name, parts)[:n]) for name in names}
        return TrainingBatch(**read).to(self.device)

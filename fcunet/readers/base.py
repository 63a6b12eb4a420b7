"""What every reader gives: frames on demand, calibration as the file has it, and how the rows lie."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROWS_AS_STORED = "rows as stored: row 0 is the first in the file"
ROWS_FLIPPED = "rows flipped by reader: row 0 is the last in the file"


@dataclass(frozen=True)
class Axis:
    """Step, unit as spelt in the file, and value at index 0, which is None where the file has none."""

    step: float
    units: str
    offset: float | None = None


@dataclass
class Source:
    """An opened file.

    `data` has `shape`, `dtype` and NumPy slicing, and is one pattern (qy, qx), a stack (n, qy, qx) or a scan
    (scan_y, scan_x, qy, qx). Slicing reads what is asked for, no more.
    """

    path: Path
    format: str
    data: Any
    handedness: str = ROWS_AS_STORED
    reader: str = "fcunet"
    scan_shape: tuple[int, int] | None = None  # of a stack, where the file says it
    axes: dict[str, Axis] = field(
        default_factory=dict
    )  # by dimension of the datacube; missing = uncalibrated
    attrs: dict[str, Any] = field(default_factory=dict)  # root attributes of the datacube
    variables: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # detector_mask, probe, origin_qy, origin_qx
    notes: list[str] = field(default_factory=list)  # what was dropped or assumed, for the user
    incomplete: str | None = None  # why fewer frames are there than announced


class Frames:
    """Frames of one file, as a stack (n, qy, qx); each read maps only what it copies, so memory stays small.

    Parameters
    ----------
    path : Path
        The file.
    frame : dtype
        Of one frame: a structured dtype with a field ``data``, all else of it being skipped.
    n, offset : int
        Number of frames, and bytes before the first.
    rows : slice
        Rows of a frame to keep, and their order.
    """

    ndim = 3

    def __init__(
        self, path: Path, frame: np.dtype, n: int, offset: int = 0, rows: slice = slice(None)
    ) -> None:
        self.path, self.frame, self.offset, self.rows = path, frame, offset, rows
        base, (qy, qx) = frame["data"].subdtype or (frame["data"], (1, 1))
        self.dtype, self.shape = base, (n, len(range(qy)[rows]), qx)

    def __getitem__(self, key: Any) -> np.ndarray:
        frames, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(frames, int | np.integer):
            frames = int(frames) % self.shape[0]
            return self[frames : frames + 1][0][tuple(rest)]
        start, stop, step = frames.indices(self.shape[0])
        n, offset = max(0, stop - start), self.offset + start * self.frame.itemsize
        if n == 0:
            return np.empty((0, *self.shape[1:]), self.dtype)
        mapped = np.memmap(self.path, self.frame, mode="r", offset=offset, shape=(n,))
        part = mapped["data"][::step, self.rows]
        return np.array(part[(slice(None), *rest)])


class Stacked:
    """Several stacks of frames, one after the other, as one: Arina writes a file per some thousand frames."""

    def __init__(self, stacks: list[Any]) -> None:
        self.stacks = stacks
        self.starts = np.cumsum([0] + [stack.shape[0] for stack in stacks])
        self.shape = (int(self.starts[-1]), *stacks[0].shape[1:])
        self.dtype, self.ndim = stacks[0].dtype, 3

    def __getitem__(self, key: Any) -> np.ndarray:
        frames, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(frames, int | np.integer):
            return self[frames : frames + 1][0][tuple(rest)]
        start, stop, step = frames.indices(self.shape[0])
        out = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        for stack, first in zip(self.stacks, self.starts[:-1], strict=True):
            low, high = max(start, int(first)), min(stop, int(first) + stack.shape[0])
            if low < high:
                out[low - start : high - start] = stack[low - int(first) : high - int(first)]
        return out[(slice(None, None, step), *rest)]


class Scan:
    """`data` of a source as a scan: ``scan[ys, xs]`` gives (by, bx, qy, qx), whatever the file holds.

    Parameters
    ----------
    source : Source
        With a pattern, a stack or a scan.
    scan_shape : tuple of int, optional
        (y, x); needed for a stack whose file does not tell.

    Raises
    ------
    ValueError
        If the shape is missing or does not fit the number of frames.
    """

    def __init__(self, source: Source, scan_shape: tuple[int, int] | None = None) -> None:
        self.data, ndim = source.data, len(source.data.shape)
        if ndim not in (2, 3, 4):
            raise ValueError(
                f"{source.path.name} holds an array of shape {tuple(source.data.shape)}; needed is one "
                "pattern (qy, qx), a "
                "stack (n, qy, qx) or a scan (scan_y, scan_x, qy, qx)"
            )
        n = math.prod(source.data.shape[:-2])
        wanted = scan_shape or source.scan_shape
        if ndim == 4 and scan_shape is None:
            wanted = source.data.shape[:2]
        elif ndim == 2 or (n == 1 and wanted is None):
            wanted = wanted or (1, 1)
        if wanted is None:
            why = f" ({source.incomplete})" if source.incomplete else ""
            raise ValueError(
                f"{source.path.name} holds a stack of {n} frames of {source.data.shape[-2]} x "
                f"{source.data.shape[-1]} px and "
                f"does not say how the scan is shaped{why}; give --scan-shape ROWS,COLUMNS, {_factors(n)}"
            )
        shape = (int(wanted[0]), int(wanted[1]))
        frames = shape[0] * shape[1]
        if min(shape) < 1 or frames > n or (frames < n and not source.incomplete):
            raise ValueError(
                f"a scan of {shape[0]} x {shape[1]} has {frames} positions, but {source.path.name} holds "
                f"{n} frames"
                + (f" ({source.incomplete})" if source.incomplete else "")
                + f"; give --scan-shape ROWS,COLUMNS, {_factors(n)}"
            )
        self.shape = (*shape, int(source.data.shape[-2]), int(source.data.shape[-1]))
        self.dtype = np.dtype(source.data.dtype)

    def __getitem__(self, region: tuple[slice, slice]) -> np.ndarray:
        ys, xs = region
        if tuple(self.data.shape) == self.shape:
            return _read(self.data, (ys, xs))
        if len(self.data.shape) == 2:
            return _read(self.data, ())[None, None]
        rows, (_, nx) = range(ys.start, ys.stop), self.shape[:2]
        if xs == slice(0, nx) and len(self.data.shape) == 3:  # whole rows lie together
            whole = _read(self.data, (slice(ys.start * nx, ys.stop * nx),))
            return whole.reshape(len(rows), nx, *self.shape[2:])
        return np.stack([self._frames(y * nx + xs.start, y * nx + xs.stop) for y in rows])

    def _frames(self, start: int, stop: int) -> np.ndarray:
        if len(self.data.shape) == 3:
            return _read(self.data, (slice(start, stop),))
        width = self.data.shape[1]  # a scan that is to be shaped anew
        return np.stack([_read(self.data, divmod(n, width)) for n in range(start, stop)])


def _read(data: Any, key: tuple[Any, ...]) -> np.ndarray:
    part = data[key]
    # threads, not the cluster that may be connected: the file is open here
    return np.asarray(part.compute(scheduler="threads") if hasattr(part, "compute") else part)


def _factors(n: int) -> str:
    """Ways to arrange `n` frames as rows and columns, the squarest first, in words."""
    pairs = [(d, n // d) for d in range(math.isqrt(n), 0, -1) if n % d == 0]
    shown = [f"{a},{b}" for a, b in pairs[:3]]
    return f"such as {' or '.join(shown)}"


def read_whole(value: Any) -> np.ndarray:
    """A small array in memory."""
    return _read(value, ())


def find_item(tree: Mapping[str, Any] | None, *keys: str) -> Any:
    """Item of nested mappings, None where a level is missing."""
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree

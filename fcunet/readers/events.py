"""Counted data of the 4D Camera (stempy): lists of electrons per frame, made dense only block by block."""

from pathlib import Path
from typing import Any

import numpy as np

from .base import Source


class Events:
    """Electron events of an HDF5 file as a stack (n, qy, qx) of counts; slicing reads those positions only.

    Parameters
    ----------
    frames : h5py.Dataset
        Variable-length flat pixel indices, (frames,) or (rows, frames per row).
    positions : ndarray of int, shape (frames,) or (rows,)
        Scan position of each frame or row, in any order; frames of one position are added up.
    n : int
        Number of scan positions; those without a frame are empty patterns.
    frame_shape : tuple of int
    """

    ndim = 3
    dtype = np.dtype(np.uint16)

    def __init__(self, frames: Any, positions: np.ndarray, n: int, frame_shape: tuple[int, int]) -> None:
        self.frames, self.shape = frames, (n, *frame_shape)
        self.order = np.argsort(positions, kind="stable")
        self.ordered = positions[self.order]

    def __getitem__(self, key: Any) -> np.ndarray:
        chosen, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(chosen, int | np.integer):
            first = int(chosen) % self.shape[0]
            return self[first : first + 1][0][tuple(rest)]
        start, stop, step = chosen.indices(self.shape[0])
        pixels = self.shape[1] * self.shape[2]
        counts = np.zeros((max(stop - start, 0), pixels), np.uint32)
        low, high = np.searchsorted(self.ordered, (start, stop))
        wanted = np.sort(self.order[low:high])  # HDF5 reads in rising order
        together = len(wanted) > 0 and wanted[-1] - wanted[0] + 1 == len(wanted)
        where = slice(wanted[0], wanted[-1] + 1) if together else wanted
        lists = self.frames[where] if len(wanted) else []
        place = dict(zip(self.order[low:high].tolist(), self.ordered[low:high].tolist(), strict=True))
        for row, found in zip(wanted.tolist(), lists, strict=True):
            pieces = found if self.frames.ndim == 2 else (found,)
            events = np.concatenate([np.asarray(one, np.int64) for one in pieces])
            if len(events) and events.max() >= pixels:
                raise ValueError(
                    f"an event of frame {row} lies at pixel {events.max()}, beyond the {pixels} of the "
                    "detector: the file is damaged"
                )
            counts[place[row] - start] += np.bincount(events, minlength=pixels).astype(np.uint32)
        dense = np.minimum(counts, 65535).astype(self.dtype).reshape(-1, *self.shape[1:])
        return dense[(slice(None, None, step), *rest)]


def read_events(path: Path, group: Any) -> Source:
    """The group ``electron_events`` of a stempy file.

    The scan is stored as (Nx, Ny) and reversed, as stempy does on reading. Columns of the flyback are kept.

    Raises
    ------
    ValueError
        If sizes are missing or positions lie outside the scan.
    """
    frames, positions = group["frames"], np.asarray(group["scan_positions"], np.int64).ravel()
    try:
        nx, ny = (int(group["scan_positions"].attrs[name]) for name in ("Nx", "Ny"))
        rows, columns = (int(frames.attrs[name]) for name in ("Nx", "Ny"))
    except KeyError as err:
        raise ValueError(
            f"{path.name} has electron events without the sizes of scan and frame (attributes Nx, Ny of "
            "scan_positions and frames); count the raw data anew with stempy"
        ) from err
    if len(positions) != frames.shape[0] or (len(positions) and not 0 <= positions.max() < nx * ny):
        raise ValueError(
            f"{path.name} has {frames.shape[0]} frames and {len(positions)} scan positions up to "
            f"{positions.max(initial=0)}, which do not fit a scan of {ny} x {nx}; is it complete?"
        )
    source = Source(path, "stempy electron events", Events(frames, positions, nx * ny, (rows, columns)))
    source.scan_shape, source.attrs["detector"] = (ny, nx), "4D Camera"
    missing = nx * ny - len(np.unique(positions))
    if missing:
        source.notes.append(f"{missing} scan positions have no frame and become empty patterns")
    return source

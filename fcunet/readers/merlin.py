"""Quantum Detectors Merlin ``.mib``: frames with a text header each, mapped into memory.

Rows are flipped, so that text painted on the detector's mask reads upright; rosettasciio does the same, while
py4DSTEM and LiberTEM keep the order of the file.
"""

import re
from pathlib import Path

import numpy as np

from .base import ROWS_FLIPPED, Frames, Source

_DTYPES = {"U08": np.dtype("u1"), "U16": np.dtype(">u2"), "U32": np.dtype(">u4")}
_TIMED_FRAMES = 10_000  # headers read to find the length of a scan row; each costs a disk access
_LONGER_NS = 1000  # clock jitter is tens of ns; recorded row ends are longer by 20 us and more
_TIME = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+)Z")


def read_merlin(path: Path, scan_shape: tuple[int, int] | None = None) -> Source:
    """A Merlin file, with the scan shape from its ``.hdr`` or from the pauses between scan rows.

    Raises
    ------
    ValueError
        If it holds raw counters, has a damaged header, or is incomplete and no `scan_shape` is given.
    """
    with path.open("rb") as stream:
        fields = stream.read(384).decode("ascii", "replace").split(",")
    try:
        header, width, height, kind = int(fields[2]), int(fields[4]), int(fields[5]), fields[6]
    except (IndexError, ValueError) as err:
        raise ValueError(f"{path.name} has a damaged Merlin header ({err})") from err
    if kind not in _DTYPES:
        raise ValueError(
            f"{path.name} holds raw counters ({kind}), not images; export processed frames (U08, U16 or "
            "U32) from the "
            "Merlin software"
        )
    frame = np.dtype([("header", "V", header), ("data", _DTYPES[kind], (height, width))])
    whole, rest = divmod(path.stat().st_size, frame.itemsize)
    settings = _settings(path.with_suffix(".hdr"))
    announced, per_trigger = (
        int(settings.get(f"Frames {name} (Number)", 0)) for name in ("in Acquisition", "per Trigger")
    )
    incomplete = f"its header announces {announced}" if announced > whole else None
    incomplete = f"it ends in the middle of frame {whole}" if rest else incomplete
    if incomplete and (scan_shape is None or not whole):
        raise ValueError(
            f"{path.name} is incomplete: it has {whole} whole frames, but {incomplete}; copy it anew, or "
            "convert the "
            "complete scan rows with --scan-shape ROWS,COLUMNS"
        )
    frames = np.memmap(path, frame, mode="r", shape=(whole,))
    data = Frames(path, frame, whole, rows=slice(None, None, -1))
    source = Source(path, "Merlin MIB", data, ROWS_FLIPPED, incomplete=incomplete)
    row = per_trigger if per_trigger > 1 else _row_length(frames)
    if row and whole % row == 0:
        source.scan_shape = (whole // row, row)
    exposure = re.search(rb",(\d+)ns,", frames[0]["header"].tobytes())
    source.attrs = {"detector": "Merlin", "dwell_time_us": int(exposure[1]) / 1e3 if exposure else None}
    return source


def _settings(path: Path) -> dict[str, str]:
    """Lines ``name:<tab>value`` of the header file beside the data; empty if there is none."""
    if not path.is_file():
        return {}
    lines = (line.partition(":\t") for line in path.read_text(errors="replace").splitlines())
    return {name: value.strip() for name, _, value in lines if value}


def _row_length(frames: np.memmap) -> int | None:
    """Frames per scan row, if a clearly longer pause follows each such number of frames and no other."""
    found = [_TIME.search(header.tobytes()) for header in frames["header"][:_TIMED_FRAMES]]
    times = [np.datetime64(match[1].decode(), "ns").astype(np.int64) for match in found if match]
    if len(times) != len(found) or len(times) < 4:
        return None
    pauses = np.diff(times)
    ordered = np.sort(pauses)
    step = int(np.argmax(np.diff(ordered)))
    gap, jitter = ordered[step + 1] - ordered[step], ordered[step] - ordered[0]
    if gap < max(_LONGER_NS, 5 * jitter):
        return None
    starts = np.flatnonzero(pauses > ordered[step]) + 1  # first frames of the rows after the first
    row = int(starts[0])
    return row if row > 1 and np.array_equal(starts, np.arange(row, len(times), row)) else None

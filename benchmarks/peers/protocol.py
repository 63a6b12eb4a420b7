"""What every worker script shares; runs inside the environments of the peers, so only NumPy is imported."""

import json
import sys
import time
from pathlib import Path

import numpy as np


def main(tasks) -> None:
    """``python WORKER.py TASK GIVEN RETURNED.npz``: arrays from a folder of npy files, results to one npz."""
    task, source, target = sys.argv[1:]
    given = {file.stem: np.load(file, mmap_mode="r") for file in sorted(Path(source).glob("*.npy"))}
    np.savez(target, **tasks[task](given))


def options_of(given) -> dict:
    """The options of a task, sent as JSON."""
    return json.loads(str(given["options"]))


def best_cpu_seconds(function, repeats=1, warm_up=None):
    """What `function` returns, and the CPU seconds of its fastest run; `warm_up` runs before, untimed."""
    if warm_up is not None:
        warm_up()
    seconds = np.inf
    for _ in range(max(1, int(repeats))):
        start = time.process_time()
        result = function()
        seconds = min(seconds, time.process_time() - start)
    return result, seconds


def padded(peaks, scan_shape):
    """Lists of (row, column, intensity) per position as arrays padded with NaN, brightest first."""
    longest = max((len(p) for p in peaks), default=0)
    out = np.full((3, len(peaks), max(longest, 1)), np.nan)
    for n, found in enumerate(peaks):
        found = np.asarray(found, dtype=float).reshape(-1, 3)
        out[:, n, : len(found)] = found[np.argsort(-found[:, 2], kind="stable")].T
    return {name: a.reshape(*scan_shape, -1) for name, a in zip(("qy", "qx", "intensity"), out, strict=True)}

"""How much memory this process has taken, as the kernel counts it."""

import ctypes
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
KEEP_FREED = True  # False while memory is measured, see keep_freed_memory


def peak_rss() -> int:
    """Largest resident memory of this process since its start or :func:`reset_peak_rss`, bytes.

    On Linux the high-water mark of the process itself. `getrusage` is no substitute there: what the parent
    held when it started the process counts in it.
    """
    found = _status("VmHWM")
    if found is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return found


def rss() -> int:
    """Resident memory of this process now, bytes; elsewhere than on Linux the peak."""
    found = _status("VmRSS")
    return peak_rss() if found is None else found


def reset_peak_rss() -> bool:
    """Start :func:`peak_rss` anew from what is resident now; False where the system does not allow it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def keep_freed_memory() -> bool:
    """Let this process keep up to 64 MiB of freed memory for its next arrays; False where glibc is not used,
    or `KEEP_FREED` is False.

    Dask starts its workers with ``MALLOC_TRIM_THRESHOLD_=65536``, with which every array over 128 kB is fresh
    memory from the kernel, to be cleared page by page: correlation then takes three times as long.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    if not KEEP_FREED:
        return False
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: whole blocks still go back at once
    return bool(mallopt(trim, 64 << 20) and mallopt(mmap, 32 << 20))


def _status(name: str) -> int | None:
    """A line of /proc/self/status, bytes; None where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None

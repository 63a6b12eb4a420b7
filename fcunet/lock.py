"""One run at a time in a run directory: a lock file that names its holder and is taken over when stale."""

import contextlib
import getpass
import json
import os
import socket
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HEARTBEAT_S = 10.0
STALE_S = 120.0  # a holder on another host that has not refreshed the file for so long is taken for dead


def make_run_folder(folder: Path) -> None:
    """Make the directory of a run, and those above it; ValueError where a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as err:
        taken = next(path for path in (folder, *folder.parents) if path.is_symlink() or path.exists())
        raise ValueError(
            f"{taken} is a file, but a folder is needed for the results; name another one: --out FOLDER"
        ) from err


class RunLockedError(RuntimeError):
    """Another run holds the directory."""


class RunLock:
    """Holds ``RUN/run.lock`` for the duration of a ``with`` block.

    The file names host, process and time. A holder on this host is alive if its process is; one elsewhere if
    it refreshed the file lately, by the clock of the file system (hosts may disagree on the time). The lock
    of a dead holder is taken over.

    Parameters
    ----------
    folder : path
        The run directory; made if it is missing.

    Raises
    ------
    RunLockedError
        On entering, if another run holds it; the message has the holder's host, process and start.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "run.lock"
        self._content = ""
        self._released = threading.Event()

    def __enter__(self) -> Self:
        make_run_folder(self.path.parent)
        for _ in range(5):  # several may find the same stale lock at once
            if self._create():
                threading.Thread(target=self._refresh, name="fcunet-lock", daemon=True).start()
                return self
            holder = self._holder()
            if holder is not None and self._alive(holder):
                job = f", SLURM job {holder['slurm_job_id']}" if holder.get("slurm_job_id") else ""
                raise RunLockedError(
                    f"{self.path.parent} is in use by process {holder['pid']} on {holder['host']} "
                    f"({holder.get('user')}{job}) since {holder['started']}; wait for it, or give another "
                    "run directory with --out"
                )
            self._remove_stale(holder)
        raise RunLockedError(f"{self.path} is taken again and again by other runs; try again later")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        try:
            if self.path.read_text() == self._content:  # not if somebody took it over meanwhile
                self.path.unlink()
        except FileNotFoundError:
            pass

    def _create(self) -> bool:
        facts = {
            "host": socket.gethostname(),
            "user": _user_name(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            "token": uuid.uuid4().hex,
        }
        self._content = json.dumps(facts)
        # written under another name and linked, so that nobody ever reads half a lock; link is atomic on NFS
        # too
        draft = self.path.with_name(f"run.lock.{facts['token']}")
        try:
            draft.write_text(self._content)
            os.link(draft, self.path)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _holder(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _alive(self, holder: dict[str, Any]) -> bool:
        if holder["host"] == socket.gethostname():
            start = _process_start(holder["pid"])
            return start is not None and start == holder["process_start"]
        job = os.environ.get("SLURM_JOB_ID")
        if job and job == holder.get("slurm_job_id") and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            return False  # this very job, before SLURM took it back into the queue
        try:
            return self._file_system_now() - self.path.stat().st_mtime < STALE_S
        except FileNotFoundError:
            return False

    def _file_system_now(self) -> float:
        probe = self.path.with_name(f"run.lock.{uuid.uuid4().hex}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _remove_stale(self, holder: dict[str, Any] | None) -> None:
        """Move the stale file away: of several that try, one succeeds."""
        aside = self.path.with_name(f"run.lock.{uuid.uuid4().hex}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        try:
            taken = json.loads(aside.read_text())
        except ValueError:
            taken = None
        if taken != holder:  # somebody was quicker, and this is his live lock: put it back
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()

    def _refresh(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                return


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container that does not know its user
        return f"user {os.getuid()}"


def _process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, for pids are used again; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self").exists() else _alive_without_proc(pid)
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _alive_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"

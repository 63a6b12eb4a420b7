"""What surrounds a run: its log file, its words on the terminal, its dashboard, signals, Dask's report."""

import getpass
import logging
import os
import signal
import socket
import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from distributed import Client, performance_report

logger = logging.getLogger(__name__)


class Speaker:
    """Prints a line and logs it."""

    def __init__(self, aloud: bool) -> None:
        self.aloud = aloud

    def __call__(self, text: str) -> None:
        logger.info(text.strip())
        if self.aloud:
            print(text, flush=True)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append what fcunet logs, here and on the workers, to a file; the root logger gets its due."""
    package = logging.getLogger("fcunet")
    level, propagate = package.level, package.propagate
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _File(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    onward = _Onward()
    package.addHandler(file)
    package.addHandler(onward)
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(file)
        package.removeHandler(onward)
        package.setLevel(level)
        package.propagate = propagate
        file.close()


class _File(logging.FileHandler):
    """A log that a full disk does not turn into pages of tracebacks: the run itself says what is wrong."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Onward(logging.Handler):
    """Hands records to the root logger by its own level: the file wants more than the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        if record.levelno >= root.level:
            root.handle(record)


def ways_to_dashboard(link: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """How to open `link` from where the user sits: an ssh tunnel, or the proxy of a JupyterHub.

    Parameters
    ----------
    link : str
        ``http://HOST:PORT/status``.
    environment : mapping
        Of this process: says whether it was reached by ssh, runs in a SLURM job, or under JupyterHub.

    Returns
    -------
    list of str
        None on a machine the user sits at.
    """
    address = urlsplit(link)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    lines = []
    prefix = environment.get("JUPYTERHUB_SERVICE_PREFIX")
    if prefix:
        target = f"{port}" if host in ("127.0.0.1", "localhost") else f"{host}:{port}"
        lines.append(f"  jupyter   {prefix}proxy/{target}/status   (jupyter-server-proxy)")
    job, login = environment.get("SLURM_JOB_ID"), environment.get("SLURM_SUBMIT_HOST")
    if not (job or environment.get("SSH_CONNECTION")):
        return lines
    user, here = getpass.getuser(), socket.gethostname()
    jump = f"-J {user}@{login} " if job and login and login != here else ""
    lines.append(
        f"  tunnel    ssh -N -L {port}:{host}:{port} {jump}{user}@{here}   (type it on your machine)"
    )
    return lines


@contextmanager
def dask_report(client: Client, path: Path) -> Iterator[None]:
    """Keep Dask's own report of what the workers did: one page that opens without a network.

    It must not take a run with it: without a scheduler, or with a full disk, there is none.
    """
    report = performance_report(filename=str(path), mode="inline")
    try:
        with client.as_current():
            report.__enter__()
    except Exception as err:
        logger.warning("no %s: %s", path.name, err)
        yield
        return
    try:
        yield
    finally:
        try:
            with client.as_current():
                report.__exit__(None, None, None)
        except Exception as err:
            logger.warning("no %s: %s", path.name, err)


@contextmanager
def draining() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second interrupts at once.

    Only the main thread may watch signals; in another one the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: types.FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        logger.warning(
            "%s: finishing the blocks in flight, then stopping; once more to stop at once",
            signal.Signals(number).name,
        )

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears complete or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it appears complete or not at all."""
    draft = path.with_name(f"{path.name}.partial.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)

"""What surrounds a run: its log file, its words on the terminal, and the signals that ask it to stop."""

import logging
import os
import signal
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    file = logging.FileHandler(path)
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


class _Onward(logging.Handler):
    """Hands records to the root logger by its own level: the file wants more than the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        if record.levelno >= root.level:
            root.handle(record)


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

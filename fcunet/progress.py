"""What a person sees of a run: a bar with patterns per second on a terminal, plain lines in a log."""

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

_LINE_EVERY_S = 30.0
_HISTORY_EVERY_S, _HISTORY_POINTS = 1.0, 300


class Progress:
    """Counts patterns and says how fast they go; use as a context manager.

    Parameters
    ----------
    total : int
        Patterns of the run.
    done : int
        Of these, done by an earlier call.
    show : bool
        False: count only.
    say : callable, optional
        Where plain lines go; default: stdout.
    """

    def __init__(
        self, total: int, done: int = 0, *, show: bool = True, say: Callable[[str], None] | None = None
    ) -> None:
        self.total, self.before, self.now, self.failed = total, done, 0, 0
        self._start = self._first = time.monotonic()
        self._last_line = self._start
        self._say = say or (lambda text: print(text, flush=True))
        self._noted = ""
        self.history: list[tuple[float, int]] = [(0.0, 0)]
        self._bar: Any = None
        self._task: Any = None
        self._show = show

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if self._show and sys.stdout.isatty():
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "peaks", total=self.total, completed=self.before, rate="", note=""
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def rate(self) -> float:
        """Patterns per second since the first of this call's blocks was waited for; 0 before one is done."""
        elapsed = time.monotonic() - self._start
        return self.now / elapsed if self.now and elapsed > 0 else 0.0

    @property
    def remaining_s(self) -> float | None:
        """Estimated seconds to go; None before the first block is done."""
        return (self.total - self.before - self.now - self.failed) / self.rate if self.rate else None

    def advance(self, patterns: int, *, failed: bool = False) -> None:
        """A block of so many patterns has ended."""
        if failed:
            self.failed += patterns
        else:
            self.now += patterns
        self._remember()
        self._update()

    def _remember(self) -> None:
        """Seconds since the start and patterns done then, thinned to a few hundred points."""
        now = time.monotonic() - self._start
        if now - self.history[-1][0] < _HISTORY_EVERY_S:
            return
        self.history.append((round(now, 2), self.now))
        if len(self.history) > _HISTORY_POINTS:
            self.history = self.history[::2]

    def note(self, text: str) -> None:
        """Something to show beside the bar, such as that workers are waited for."""
        if self._bar is not None:
            self._bar.update(self._task, note=text)
        elif text:  # what is waited for is said at once, and again as often as any other line
            if text != self._noted and self._show:
                self._last_line = -math.inf
            self._line(text)
        self._noted = text

    def _update(self) -> None:
        complete = self.before + self.now + self.failed
        if self._bar is not None:
            self._bar.update(
                self._task, completed=complete, rate=f"{self.rate:,.0f} patterns/s", note=self._failures()
            )
        elif self._show and complete < self.total:
            remaining = self.remaining_s
            eta = f", {duration(remaining)} left" if remaining is not None else ""
            share = f"{complete:,} of {self.total:,} patterns ({100 * complete / self.total:.0f} %)"
            self._line(f"{share}, {self.rate:,.0f} patterns/s{eta}{self._failures()}")

    def _failures(self) -> str:
        return f", {self.failed:,} failed" if self.failed else ""

    def _line(self, text: str) -> None:
        now = time.monotonic()
        if self._show and now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            self._say(text)


def duration(seconds: float) -> str:
    """``"45 s"``, ``"12 min"`` or ``"3 h 05 min"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"

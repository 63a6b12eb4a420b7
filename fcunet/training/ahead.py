"""Batches drawn ahead of the training, so that the device never waits for patterns."""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import multiprocessing

from .evaluate import Batch

_PATIENCE_S = 1.0  # between looks whether the other side is still alive
_MOST_LOST = 5  # batches in a row
# what receiving a tensor through the memory of another process may end in, by how far it has come
_NOT_HANDED_OVER = (OSError, EOFError, RuntimeError, multiprocessing.AuthenticationError)


class DrawnAhead:
    """Endless batches of `n` patterns from sources that live in processes of their own.

    Batches come in the order in which they are finished. Tensors stay where they were drawn: on a GPU its
    memory is shared between the processes, on a CPU the machine's.

    Parameters
    ----------
    makers : sequence of callable
        Each, called without arguments in a process of its own, makes a source; must be picklable.
    n : int
        Patterns per batch.
    ahead : int
        Batches that may wait.
    """

    def __init__(self, makers: Sequence[Callable[[], Any]], n: int, *, ahead: int = 4):
        context = multiprocessing.get_context("spawn")
        self.n = n
        self._queue: Any = context.Queue(maxsize=ahead)
        self._processes = [
            context.Process(target=_draw, args=(make, n, self._queue, os.getpid()), daemon=True)
            for make in makers
        ]
        for process in self._processes:
            process.start()

    def batch(self, n: int) -> Batch:
        """The next batch.

        Raises
        ------
        RuntimeError
            If a process failed; with its error.
        Exception
            If five batches in a row could not be received.
        """
        if n != self.n:
            raise ValueError(f"batches of {self.n} patterns are drawn ahead, asked for were {n}")
        lost = 0
        while True:
            try:
                item = self._queue.get(timeout=_PATIENCE_S)
            except _NOT_HANDED_OVER:  # the next one will do
                lost += 1
                if lost == _MOST_LOST:
                    raise
                continue
            except queue.Empty:
                gone = [p.exitcode for p in self._processes if not p.is_alive()]
                if gone:
                    raise RuntimeError(
                        f"a process that draws training patterns ended with exit code {gone[0]}; "
                        "set draw_processes: 0 to see why"
                    ) from None
                continue
            if isinstance(item, Exception):
                raise RuntimeError("a process that draws training patterns failed") from item
            return item

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        self._queue.cancel_join_thread()
        self._queue.close()


def _draw(make: Callable[[], Any], n: int, batches: Any, parent: int) -> None:
    torch.set_num_threads(1)
    try:
        source = make()
        while True:
            _put(batches, source.batch(n), parent)
    except Exception as err:
        _put(batches, err, parent)
        while os.getppid() == parent:  # batches that wait need the process that drew them
            time.sleep(_PATIENCE_S)


def _put(batches: Any, item: Any, parent: int) -> None:
    """Wait for room; end when the training has ended without a word."""
    while True:
        try:
            return batches.put(item, timeout=_PATIENCE_S)
        except queue.Full:
            if os.getppid() != parent:
                raise SystemExit(1) from None


class DrawnTogether:
    """Endless batches of `n` patterns, `times` of them drawn at once by a thread.

    On a GPU a draw is bound by its hundreds of small kernels, so many patterns take hardly longer than few;
    and processes of their own (:class:`DrawnAhead`) would have to take turns with the training.

    Parameters
    ----------
    make : callable
        Called without arguments in the thread, makes the source, whose batches can be sliced.
    n, times : int
        Patterns per batch, batches per draw.
    """

    def __init__(self, make: Callable[[], Any], n: int, times: int):
        self.n, self.times = n, times
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=2 * times)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._draw, args=(make,), daemon=True)
        self._thread.start()

    def batch(self, n: int) -> Batch:
        """The next batch.

        Raises
        ------
        RuntimeError
            If drawing failed; with its error.
        """
        if n != self.n:
            raise ValueError(f"batches of {self.n} patterns are drawn together, asked for were {n}")
        item = self._queue.get()
        if isinstance(item, Exception):
            self._put(item)  # whoever asks again is told again
            raise RuntimeError("the thread that draws training patterns failed") from item
        return item

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _draw(self, make: Callable[[], Any]) -> None:
        try:
            source = make()
            while not self._ended.is_set():
                drawn = source.batch(self.n * self.times)
                for k in range(self.times):
                    self._put(drawn[k * self.n : (k + 1) * self.n])
        except Exception as err:
            self._put(err)

    def _put(self, item: Any) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_PATIENCE_S)
                return

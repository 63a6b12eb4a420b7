"""Batches on their way to a GPU, one ahead: the next is copied while one is computed."""

import numpy as np
import torch
from torch import Tensor


class Staging:
    """Sends parts of a block to a device through two page-locked buffers that take turns.

    A copy from page-locked memory runs beside the arithmetic, on a stream of its own. The host needs two
    batches more, the device one, however large the block. On a CPU the same steps are taken without
    page-locked memory and streams, which is how they are tested where there is no GPU.

    Parameters
    ----------
    patterns : ndarray, shape (n, qy, qx)
        In their stored dtype, which is less to send than float32.
    device : torch.device
    """

    def __init__(self, patterns: np.ndarray, device: torch.device) -> None:
        self.patterns, self.device = patterns, device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffers: list[Tensor | None] = [None, None]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._ahead: tuple[tuple[int, int], Tensor, torch.cuda.Event | None] | None = None

    def take(self, start: int, stop: int, then: int) -> Tensor:
        """Patterns `start` to `stop` on the device; the next, up to `then`, are sent on their way.

        Valid until it is released like any tensor. Raises ``torch.cuda.OutOfMemoryError``; another part, or a
        smaller one, can be taken after that.
        """
        ahead = self._ahead if self._ahead and self._ahead[0] == (start, stop) else None
        self._ahead = None
        _, batch, sent = ahead or self._send(start, stop)
        if sent is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(sent)
            batch.record_stream(now)  # its memory is not given to the next copy before this stream is done
        if then > stop:
            self._ahead = self._send(stop, then)
        return batch

    def drop(self) -> None:
        """Give back the memory of what was sent ahead."""
        self._ahead = None

    def _send(self, start: int, stop: int) -> tuple[tuple[int, int], Tensor, torch.cuda.Event | None]:
        """Begin to copy patterns `start` to `stop`: where they will be, and the event that says they are."""
        turn, self._turn = self._turn, 1 - self._turn
        if (before := self._sent[turn]) is not None:
            before.synchronize()  # what the buffer held has left it
        raw = torch.from_numpy(np.ascontiguousarray(self.patterns[start:stop]))
        buffer = self._buffers[turn]
        if buffer is None or len(buffer) < len(raw):
            buffer = torch.empty(raw.shape, dtype=raw.dtype, pin_memory=self._cuda)
            self._buffers[turn] = buffer
        staged = buffer[: len(raw)]
        staged.copy_(raw)
        if self._stream is None:
            return (start, stop), staged.clone(), None
        with torch.cuda.stream(self._stream):
            batch = staged.to(self.device, non_blocking=True)
            sent = torch.cuda.Event()
            sent.record(self._stream)
        self._sent[turn] = sent
        return (start, stop), batch, sent

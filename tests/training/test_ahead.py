import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from fcunet.training.ahead import DrawnAhead, DrawnTogether


class Counting:
    """Batches that tell which process drew them, and as which."""

    def __init__(self, first: int, fail_at: int | None = None):
        self.next, self.fail_at = first, fail_at

    def batch(self, n: int) -> torch.Tensor:
        if self.next == self.fail_at:
            raise ValueError("no such crystal")
        self.next += 1
        return torch.tensor([self.next - 1, os.getpid()] + [0] * (n - 2))


def die() -> Counting:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_batch__comes_from_every_process_and_in_its_order():
    source = DrawnAhead([partial(Counting, 0), partial(Counting, 100)], 3)
    try:
        with pytest.raises(ValueError, match="batches of 3 patterns"):
            source.batch(2)
        drawn = [source.batch(3).tolist() for _ in range(40)]
    finally:
        source.close()
    processes = {d[1] for d in drawn}
    for pid in processes:
        numbers = [d[0] for d in drawn if d[1] == pid]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[0] in (0, 100)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert os.getpid() not in processes


def test_batch__passes_on_the_error_of_a_process():
    source = DrawnAhead([partial(Counting, 0, fail_at=2)], 2)
    try:
        source.batch(2)
        source.batch(2)
        with pytest.raises(RuntimeError, match="failed") as caught:
            source.batch(2)
        assert "no such crystal" in str(caught.value.__cause__)
    finally:
        source.close()


class Lost:
    """A batch whose memory cannot be handed over."""

    def __init__(self, error: type[Exception]):
        self.error = error

    def __reduce__(self):
        return _raise, (self.error,)


def _raise(error: type[Exception]):
    raise error("not handed over")


class Losing(Counting):
    """Loses the first `lost` batches."""

    def __init__(self, error: type[Exception], lost: int):
        super().__init__(0)
        self.error, self.lost = error, lost

    def batch(self, n: int):
        drawn = super().batch(n)
        return Lost(self.error) if drawn[0] < self.lost else drawn


@pytest.mark.slow
@pytest.mark.parametrize("error", [ConnectionRefusedError, EOFError, RuntimeError])
def test_batch__goes_on_with_the_next_one_where_some_are_lost(error):
    source = DrawnAhead([partial(Losing, error, 3)], 2)
    try:
        assert [int(source.batch(2)[0]) for _ in range(2)] == [3, 4]
    finally:
        source.close()


@pytest.mark.slow
def test_batch__gives_up_when_all_are_lost():
    source = DrawnAhead([partial(Losing, EOFError, 100)], 2)
    try:
        with pytest.raises(EOFError, match="not handed over"):
            source.batch(2)
    finally:
        source.close()


class Rows:
    """Batches of rows numbered on and on."""

    def __init__(self, fail_at: int | None = None):
        self.next, self.fail_at, self.asked = 0, fail_at, []

    def batch(self, n: int) -> torch.Tensor:
        if self.next == self.fail_at:
            raise ValueError("no such crystal")
        self.asked.append(n)
        self.next += n
        return torch.arange(self.next - n, self.next)


def test_drawn_together__hands_out_every_pattern_once_and_in_order():
    rows = Rows()
    source = DrawnTogether(lambda: rows, 3, 4)
    try:
        with pytest.raises(ValueError, match="batches of 3 patterns"):
            source.batch(2)
        drawn = [source.batch(3).tolist() for _ in range(9)]
    finally:
        source.close()
    assert sum(drawn, []) == list(range(27))
    assert set(rows.asked) == {12}
    assert len(rows.asked) <= 5  # no more than may wait


def test_drawn_together__passes_on_the_error_as_often_as_asked():
    source = DrawnTogether(lambda: Rows(fail_at=4), 2, 2)
    try:
        assert [source.batch(2).tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="failed") as caught:
                source.batch(2)
            assert "no such crystal" in str(caught.value.__cause__)
    finally:
        source.close()


@pytest.mark.slow
def test_batch__does_not_wait_for_a_process_that_was_killed():
    source = DrawnAhead([die], 2)
    try:
        with pytest.raises(RuntimeError, match="exit code -9"):
            source.batch(2)
    finally:
        source.close()


_ORPHAN = """
import os, sys
sys.path.insert(0, {folder!r})
from functools import partial
from test_ahead import Counting
from fcunet.training.ahead import DrawnAhead
if __name__ == "__main__":
    source = DrawnAhead([partial(Counting, 0)], 2, ahead=1)
    print(int(source.batch(2)[1]), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_training_killed_without_warning__takes_its_processes_along(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(_ORPHAN.format(folder=os.path.dirname(__file__)))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the process that draws patterns outlived its training")

import getpass
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from fcunet import lock
from fcunet.lock import RunLock, RunLockedError


def other_holder(path, **changes):
    """A lock as another process left it."""
    content = {
        "host": socket.gethostname(),
        "pid": os.getppid(),
        "process_start": lock._process_start(os.getppid()),
        "started": "2026-01-02T03:04:05+00:00",
        "token": "x",
    }
    path.mkdir(exist_ok=True)
    (path / "run.lock").write_text(json.dumps(content | changes))


def test_run_lock__is_gone_afterwards_and_leaves_nothing(tmp_path):
    with RunLock(tmp_path / "run"):
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.lock"]
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("below", ["", "run"])
def test_run_lock__needs_a_folder_and_says_so(tmp_path, below):
    (tmp_path / "taken").write_text("no folder")
    with pytest.raises(ValueError, match=r"taken is a file, but a folder is needed.*--out FOLDER"):
        RunLock(tmp_path / "taken" / below).__enter__()


def test_run_lock__refuses_a_second_holder_with_the_name_of_the_first(tmp_path):
    holder = rf"process {os.getpid()} on {socket.gethostname()} \({getpass.getuser()}.*\) since .*--out"
    with RunLock(tmp_path), pytest.raises(RunLockedError, match=holder), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass


def test_run_lock__respects_a_living_process(tmp_path):
    other_holder(tmp_path)
    with pytest.raises(RunLockedError, match="2026-01-02"), RunLock(tmp_path):
        pass


def test_run_lock__takes_over_from_a_killed_process(tmp_path):
    code = f"from fcunet.lock import RunLock; import os; RunLock({str(tmp_path)!r}).__enter__(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (tmp_path / "run.lock").exists()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_run_lock__is_not_fooled_by_a_pid_used_again(tmp_path):
    other_holder(tmp_path, process_start="1")
    with RunLock(tmp_path):
        pass


def test_run_lock__believes_a_holder_elsewhere_while_it_refreshes(tmp_path):
    other_holder(tmp_path, host="node17")
    with pytest.raises(RunLockedError, match="node17"), RunLock(tmp_path):
        pass
    old = time.time() - lock.STALE_S - 60
    os.utime(tmp_path / "run.lock", (old, old))
    with RunLock(tmp_path):
        pass


def test_run_lock__takes_over_from_its_own_job_before_it_was_requeued(tmp_path, monkeypatch):
    other_holder(tmp_path, host="node17", slurm_job_id="4711")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with pytest.raises(RunLockedError), RunLock(tmp_path):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock(tmp_path):
        pass


def test_run_lock__takes_over_half_a_file(tmp_path):
    (tmp_path / "run.lock").write_text('{"host": "no')
    with RunLock(tmp_path):
        pass


def test_run_lock__does_not_remove_the_lock_of_a_successor(tmp_path):
    with RunLock(tmp_path):
        other_holder(tmp_path)
    assert (tmp_path / "run.lock").exists()

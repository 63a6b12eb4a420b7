"""The real SLURM of `cluster/slurm-lab`, and the ways to break it: what to kill, to stop, to wait for."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from fcunet import schema
from fcunet.slurm import queue_states
from fcunet.store import read_status

ROOT = Path(__file__).parents[2]
LAB = ROOT / "cluster" / "slurm-lab" / "slurm-lab.sh"
FCUNET = str(Path(sys.executable).with_name("fcunet"))
SLOW = [sys.executable, str(Path(__file__).with_name("slow_fcunet.py"))]
PATIENCE = float(
    os.environ.get("FCUNET_TEST_PATIENCE", "1")
)  # more on a machine that is busy with other work
SETTINGS = {"method": "correlation", "device": "cpu", "max_num_peaks": 32}
OPTIONS = ["--method", "correlation", "--device", "cpu", "--max-num-peaks", "32"]
WALLTIME_JOB = "walltime"
JOBS = {
    "queue": "gpu",
    "walltime": "00:10:00",
    "job-extra-directives": ["--gres=gpu:1"],
    "cores": 1,
    "memory": "1500MiB",
    "interface": "lo",
    "local-directory": "/tmp",
}
# shorter than what is shipped, where waiting is all that a longer one would add to the tests
DASK = {
    "deploy": {"lost-worker-timeout": "3s"},
    "scheduler": {"worker-ttl": f"{20 * PATIENCE:.0f}s"},
}


def write_profile(path: Path, *, dask: dict | None = None, fcunet: dict | None = None, **jobs) -> Path:
    """A site profile for the lab; None removes a key."""
    slurm = {k: v for k, v in (JOBS | jobs).items() if v is not None}
    content = {
        "jobqueue": {"slurm": slurm},
        "distributed": DASK if dask is None else dask,
        "fcunet": {"workers": 2, "start_timeout_s": 120} | (fcunet or {}),
    }
    path.write_text(yaml.safe_dump(content))
    return path


def run_command(store, out, cluster, *options) -> list[str]:
    return [
        FCUNET, "run", str(store), "--out", str(out), "--cluster", str(cluster), *OPTIONS,
        "--dashboard-address", "127.0.0.1:0", *options,
    ]  # fmt: skip


def start(command: list[str], **settings) -> subprocess.Popen:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **settings
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """What a process said, all of it; it must end with `status`."""
    output, errors = process.communicate(timeout=400 * PATIENCE)
    assert process.returncode == status, output + errors
    return output + errors


def until(happened: Callable[[], object], what: str, seconds: float = 120.0, process=None):
    """Wait for an event and return it; `what` is said when it does not come, or `process` ends before."""
    seconds *= PATIENCE
    end = time.monotonic() + seconds
    while not (found := happened()):
        if process is not None and process.poll() is not None:
            raise AssertionError((f"ended before {what}", process.communicate()))
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return found


def jobs() -> dict[str, tuple[str, str]]:
    """State and reason of the jobs in the queue, but for those of the run that goes on beside the tests."""
    others = subprocess.run(
        ["squeue", "-h", "-o", "%i", "--name", WALLTIME_JOB], capture_output=True, text=True, check=True
    ).stdout.split()
    return {job: state for job, state in queue_states().items() if job not in others}


def blocks_done(out: Path) -> int:
    status = out / "peaks.zarr" / "status"
    return int((read_status(out / "peaks.zarr") == schema.STATUS_DONE).sum()) if status.exists() else 0


def stored_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of the arrays of a run: all but attributes, which hold the time and the job."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for name in ("peaks.zarr", "strain.zarr")
        for p in Path(folder, name).rglob("*")
        if p.is_file() and p.name != "zarr.json"
    }


def assert_same_bytes(out: Path, other: Path) -> None:
    first, second = stored_bytes(out), stored_bytes(other)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def assert_clean(out: Path) -> None:
    """No job, no half-written file, no lock, no key is left."""
    until(lambda: not jobs(), "an empty queue")
    passing = (".partial", "run.lock", ".dask-jobqueue", "tls-")
    assert [p for p in out.rglob("*") if any(word in p.name for word in passing)] == []


# processes, by what SLURM put into their environment


def processes(**environment: str) -> list[int]:
    """Processes whose environment has these variables."""
    wanted = {f"{k}={v}".encode() for k, v in environment.items()}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                    found.append(int(entry.name))
            except OSError:  # gone, or not ours
                continue
    return found


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def daemon(folder: Path, name: str) -> int | None:
    """Process id of one of the lab's daemons, such as "slurmd-gpu1"; None without one."""
    try:
        pid = int((folder / "run" / f"{name}.pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except (OSError, ValueError):
        return None
    return pid if name.partition("-")[0] in command else None


def stop_controller(folder: Path) -> None:
    kill([daemon(folder, "slurmctld") or 0] if daemon(folder, "slurmctld") else [])
    until(lambda: daemon(folder, "slurmctld") is None, "the end of slurmctld")


def start_controller(folder: Path) -> None:
    subprocess.run(["slurmctld", "-f", f"{folder}/etc/slurm.conf"], check=True)

    def answers():
        return subprocess.run(["timeout", "5", "sinfo", "-h"], capture_output=True).returncode == 0

    until(answers, "an answer of slurmctld")


def kill_node(folder: Path, node: str) -> None:
    """Power off: its daemon, the keepers of its jobs, and all their processes."""
    pid = daemon(folder, f"slurmd-{node}")
    keepers = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _is_keeper(entry, folder, node)
    ]
    kill(
        ([pid] if pid else [])
        + keepers
        + processes(SLURMD_NODENAME=node, SLURM_CONF=f"{folder}/etc/slurm.conf")
    )


def _is_keeper(entry: Path, folder: Path, node: str) -> bool:
    try:
        command = (entry / "cmdline").read_bytes()
        environment = (entry / "environ").read_bytes()
    except OSError:
        return False
    return command.startswith(b"slurmstepd") and f"{folder}/spool/{node}".encode() in environment


def start_node(folder: Path, node: str) -> None:
    subprocess.run(["slurmd", "-f", f"{folder}/etc/slurm.conf", "-N", node], check=True)
    until(lambda: daemon(folder, f"slurmd-{node}"), f"the daemon of {node}")


def wait_for_nodes(folder: Path) -> None:
    """Wait until no node is down or closing."""

    def all_idle_or_busy():
        answer = subprocess.run(
            ["timeout", "5", "sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True
        )
        return answer.returncode == 0 and set(answer.stdout.split()) <= {"idle", "mixed", "allocated"}

    try:
        until(all_idle_or_busy, "the return of the nodes")
    except AssertionError as err:
        nodes = subprocess.run(["scontrol", "show", "node"], capture_output=True, text=True).stdout
        logs = [path.read_text()[-3000:] for path in (folder / "log").glob("slurm*.log")]
        raise AssertionError("\n".join([str(err), nodes, *logs])) from None


def failed_blocks(out: Path) -> list[list[int]]:
    return [entry["block"] for entry in json.loads((out / "summary.json").read_text())["failed_blocks"]]

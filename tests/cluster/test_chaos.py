"""Two minutes of faults, one every few seconds, drawn by a seeded generator; nothing may remain of them."""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from lab import (
    PATIENCE,
    SETTINGS,
    SLOW,
    assert_clean,
    assert_same_bytes,
    blocks_done,
    daemon,
    kill,
    kill_node,
    processes,
    run_command,
    start_controller,
    start_node,
    stop_controller,
    until,
    wait_for_nodes,
    write_profile,
)

from fcunet import runner
from fcunet.config import Config
from fcunet.slurm import queue_states
from fcunet.store import Layout, open_datacube, write_datacube

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900 * PATIENCE)]

SECONDS, PAUSE_S = 120.0, (2.0, 5.0)
TILE_S = 1.2


class Chaos:
    """The run, and what is done to it."""

    def __init__(self, lab: Path, command: list[str], token: str, seed: int) -> None:
        self.lab, self.command, self.token = lab, command, token
        self.rng = np.random.default_rng(seed)
        self.log: list[str] = []
        self.driver: subprocess.Popen | None = None
        self.at_drivers = 0

    def start(self) -> None:
        self.driver = subprocess.Popen(
            self.command, env=os.environ | {"FCUNET_TEST_TOKEN": self.token}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def jobs(self) -> list[str]:
        try:
            return sorted(job for job, (state, _) in queue_states().items() if state == "RUNNING")
        except subprocess.SubprocessError:
            return []

    def members(self, job: str, part: bytes) -> list[int]:
        """Processes of a job whose command line has `part`."""
        found = []
        for pid in processes(SLURM_JOB_ID=job):
            try:
                if part in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
            except OSError:
                continue
        return found

    def strike(self) -> None:
        names = ["worker", "nanny", "stop", "cancel", "requeue", "node", "controller", "driver", "terminate"]
        name = str(self.rng.choice(names))
        jobs = self.jobs()
        job = str(self.rng.choice(jobs)) if jobs else None
        self.log.append(f"{name} {job}")
        self.at_drivers += name in ("driver", "terminate")
        if name == "driver":
            os.killpg(self.driver.pid, signal.SIGKILL)
        elif name == "terminate":
            self.driver.send_signal(signal.SIGTERM)
        elif name == "controller":
            stop_controller(self.lab)
            time.sleep(2)  # an outage, not an event
            start_controller(self.lab)
        elif name == "node":
            node = str(self.rng.choice(["gpu1", "gpu2"]))
            kill_node(self.lab, node)
            time.sleep(1)
            start_node(self.lab, node)
        elif job and name == "worker":
            kill(self.members(job, b"spawn_main"))
        elif job and name == "nanny":
            kill(self.members(job, b"dask_worker"))
        elif job and name == "stop":
            kill(self.members(job, b"spawn_main"), signal.SIGSTOP)
        elif job and name == "cancel":
            subprocess.run(["scancel", job], check=False)
        elif job and name == "requeue":
            subprocess.run(["scontrol", "update", f"JobId={job}", "Requeue=1"], check=False)
            subprocess.run(["scontrol", "requeue", job], check=False)


def test_run__survives_two_minutes_of_faults(slurm, store, tmp_path):
    part = open_datacube(store).load()
    part["intensity"] = part["intensity"].astype(np.uint16)
    counts = np.tile(part["intensity"].values[:20, :40], (2, 2, 1, 1))
    large = part.drop_vars(["intensity", "scan_y", "scan_x"]).assign(
        intensity=(part["intensity"].dims, counts, {"units": "counts"})
    )
    scan = write_datacube(tmp_path / "large.zarr", large, layout=Layout((4, 4), (2, 2)))
    whole, out, scratch = tmp_path / "whole", tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    here = {"workers": 1, "dashboard_address": "127.0.0.1:0"} | SETTINGS
    runner.run(Config.load(store=scan, out=whole, **here), progress=False)
    site = write_profile(tmp_path / "site.yaml", **{"job-name": "chaos", "local-directory": str(scratch)})
    token = f"chaos-{os.getpid()}"
    command = SLOW + run_command(scan, out, site, "--workers", "4")[1:]
    os.environ["FCUNET_TEST_TILE_S"] = str(TILE_S)
    chaos = Chaos(slurm, command, token, seed=4)
    try:
        chaos.start()
        until(lambda: blocks_done(out) >= 1, "the first block", process=chaos.driver)
        end = time.monotonic() + SECONDS
        ends = []  # what drivers said that did not finish
        while time.monotonic() < end and blocks_done(out) < 200:
            chaos.strike()
            next_strike = time.monotonic() + chaos.rng.uniform(*PAUSE_S)
            while time.monotonic() < next_strike:
                if chaos.driver.poll() not in (None, 0):
                    ends.append(chaos.driver.communicate()[0])
                    chaos.start()
                time.sleep(0.1)
        while chaos.driver.wait(timeout=300 * PATIENCE) != 0:
            ends.append(chaos.driver.communicate()[0])
            assert len(ends) <= chaos.at_drivers, (chaos.log, ends)
            chaos.start()
    finally:
        del os.environ["FCUNET_TEST_TILE_S"]
        if chaos.driver.poll() is None:
            os.killpg(chaos.driver.pid, signal.SIGKILL)
        chaos.driver.stdout.close()
    assert len(chaos.log) >= 20
    assert len(ends) <= chaos.at_drivers, (chaos.log, ends)  # what hits a job or SLURM ends no run
    assert_same_bytes(out, whole)
    wait_for_nodes(slurm)
    assert daemon(slurm, "slurmctld")
    assert_clean(out)
    until(lambda: not processes(FCUNET_TEST_TOKEN=token), "the end of all processes")
    until(lambda: not processes(SLURM_JOB_NAME="chaos"), "the end of all workers")
    assert [p for p in scratch.rglob("*") if p.is_file() and p.suffix not in ("", ".lock", ".dirlock")] == []

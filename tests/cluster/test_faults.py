"""A worker, its nanny, its job, its node, the controller: each killed or stopped in the middle of a run.

The run must end, with the bytes of an undisturbed one, and the lost worker must come back.
"""

import signal
import subprocess
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import slow_tile
from lab import (
    DASK,
    PATIENCE,
    SETTINGS,
    assert_same_bytes,
    blocks_done,
    failed_blocks,
    jobs,
    kill,
    kill_node,
    processes,
    start_controller,
    start_node,
    stop_controller,
    until,
    wait_for_nodes,
)

from fcunet import runner, schema, tiles
from fcunet.cluster import connect
from fcunet.config import Config
from fcunet.store import read_status

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600 * PATIENCE)]


@dataclass
class Victim:
    """One worker of the run, from the driver down to its node."""

    client: object
    worker: int  # process ids
    nanny: int
    job: str
    node: str
    lab: object  # folder

    def slurm(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)


def pick(client, lab) -> Victim:
    address = sorted(client.scheduler_info(n_workers=-1)["workers"])[0]
    worker, nanny, job, node = client.run(slow_tile.whereabouts, workers=[address])[address]
    return Victim(client, worker, nanny, job, node, lab)


def config(store, out, **settings):
    return Config.load(store=store, out=out, **(SETTINGS | settings))


def run_and_break(client, store, out, fault, victim, monkeypatch):
    """Run, and have `fault` done to `victim` after the fifth block, in a thread of its own."""
    monkeypatch.setattr(tiles, "submitted", slow_tile.slow_tile)
    trouble = []

    def strike():
        try:
            until(lambda: blocks_done(out) >= 5, "the fifth block")
            fault(victim)
        except BaseException as err:
            trouble.append(err)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        tree = runner.run(config(store, out), client=client, progress=False)
    finally:
        thread.join()
    assert trouble == []
    return tree


def stop_worker(victim):
    kill([victim.worker], signal.SIGSTOP)


def requeue(victim):
    victim.slurm("scontrol", "update", f"JobId={victim.job}", "Requeue=1")  # profiles say --no-requeue
    victim.slurm("scontrol", "requeue", victim.job)


FAULTS = {
    "the worker is killed": lambda v: kill([v.worker]),
    "the nanny is killed": lambda v: kill([v.nanny]),
    "the nanny and the worker are killed": lambda v: kill([v.nanny, v.worker]),
    "the nanny is told to end": lambda v: kill([v.nanny], signal.SIGTERM),
    "the job is cancelled": lambda v: v.slurm("scancel", v.job),
    "the job is killed": lambda v: v.slurm("scancel", "--signal=KILL", "--full", v.job),
    "the job is requeued": requeue,
    "the worker is stopped": stop_worker,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_run__ends_with_the_same_bytes_when(fault, slurm, site, store, serial, tmp_path, monkeypatch):
    site.wait_for_workers(3, timeout=120 * PATIENCE)
    victim = pick(site, slurm)
    out = tmp_path / "run"
    run_and_break(site, store, out, FAULTS[fault], victim, monkeypatch)
    assert_same_bytes(out, serial)
    # the worker process is gone, and another has taken its place, in the same job or in a new one
    until(lambda: victim.worker not in processes(SLURM_JOB_ID=victim.job), "the end of the worker")
    until(lambda: len(site.nthreads()) == 3, "the replacement")


def test_run__ends_with_the_same_bytes_when_a_node_is_lost(slurm, site, store, serial, tmp_path, monkeypatch):
    site.wait_for_workers(3, timeout=120 * PATIENCE)
    victim, out = pick(site, slurm), tmp_path / "run"
    try:
        run_and_break(site, store, out, lambda v: kill_node(v.lab, v.node), victim, monkeypatch)
        assert_same_bytes(out, serial)
    finally:  # SLURM holds the dead jobs' resources until the node is back; the next tests need it
        start_node(slurm, victim.node)
        wait_for_nodes(slurm)
    until(lambda: len(site.nthreads()) == 3, "the replacement")


def test_run__goes_on_while_the_controller_is_away(slurm, site, store, serial, tmp_path, monkeypatch):
    site.wait_for_workers(3, timeout=120 * PATIENCE)
    out = tmp_path / "run"

    def outage(victim):
        stop_controller(slurm)
        at = blocks_done(out)
        until(lambda: blocks_done(out) >= min(at + 10, 60), "ten blocks without a controller")
        start_controller(slurm)

    run_and_break(site, store, out, outage, pick(site, slurm), monkeypatch)
    assert_same_bytes(out, serial)
    until(lambda: len(jobs()) >= 3, "the recovered queue")


def test_run__submits_a_refused_job_again(slurm, site, store, serial, tmp_path, monkeypatch):
    site.wait_for_workers(3, timeout=120 * PATIENCE)
    out = tmp_path / "run"

    def close_partition(victim):
        victim.slurm("scontrol", "update", "PartitionName=gpu", "State=DRAIN")
        try:
            victim.slurm("scancel", victim.job)
            log = out / "run.log"
            until(lambda: "sbatch refused a job: " in log.read_text(), "the refusal")
        finally:
            victim.slurm("scontrol", "update", "PartitionName=gpu", "State=UP")

    site.run(slow_tile.set_pace, "1.0")  # the run must outlive the refusal
    try:
        run_and_break(site, store, out, close_partition, pick(site, slurm), monkeypatch)
    finally:
        site.run(slow_tile.set_pace, "0.15")
    assert_same_bytes(out, serial)
    until(lambda: len(site.nthreads()) == 3, "the replacement")


def test_run__gives_up_only_the_block_that_takes_all_memory(
    slurm, site, store, serial, tmp_path, monkeypatch
):
    site.wait_for_workers(3, timeout=120 * PATIENCE)
    monkeypatch.setattr(tiles, "submitted", slow_tile.hungry_tile)
    monkeypatch.setattr(site.cluster.scheduler, "allowed_failures", 1)
    finish_without_one_block(site, store, serial, tmp_path / "run", monkeypatch)


def test_run__gives_up_only_that_block_where_slurm_watches_the_memory(
    slurm, store, serial, profile, tmp_path, monkeypatch
):
    # Dask does not: each time the whole job is killed
    dask = DASK | {"scheduler": DASK["scheduler"] | {"allowed-failures": 1}}
    path = profile(dask=dask, **{"worker-extra-args": ["--memory-limit", "0"]})
    monkeypatch.setattr(tiles, "submitted", slow_tile.hungry_tile)
    with connect(str(path), 2, dashboard_address="127.0.0.1:0", log_directory=tmp_path / "jobs") as client:
        finish_without_one_block(client, store, serial, tmp_path / "run", monkeypatch)
    killed = [p for p in (tmp_path / "jobs").glob("*.err") if "exceeded memory limit" in p.read_text()]
    assert len(killed) == 4  # the first worker, a second, and alone two more


def finish_without_one_block(client, store, serial, out, monkeypatch):
    """Run with a block that takes all memory, then without."""
    tree = runner.run(config(store, out), client=client, progress=False)
    status = read_status(out / "peaks.zarr")
    assert np.argwhere(status == schema.STATUS_FAILED).tolist() == [[1, 1]]
    assert failed_blocks(out) == [[1, 1]]
    assert np.isnan(tree["strain/e_xx"][4:8, 4:8]).all()
    assert "memory" in (out / "summary.json").read_text()
    # the same command tries that block again
    monkeypatch.setattr(tiles, "submitted", tiles.process_tile)
    runner.run(config(store, out), client=client, progress=False)
    assert_same_bytes(out, serial)

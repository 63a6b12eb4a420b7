"""The other ways to get workers: whole nodes, one allocation, a running scheduler; and the other programs."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import slow_tile
import torch
from distributed import Client
from lab import (
    FCUNET,
    OPTIONS,
    PATIENCE,
    ROOT,
    SETTINGS,
    assert_clean,
    assert_same_bytes,
    blocks_done,
    finish,
    jobs,
    kill,
    start,
    until,
)

from fcunet import runner, tiles
from fcunet.cluster import connect
from fcunet.config import Config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600 * PATIENCE)]

CODE = [sys.executable, "-m"]


def config(store, out, **settings):
    return Config.load(store=store, out=out, **({"dashboard_address": "127.0.0.1:0"} | SETTINGS | settings))


def test_whole_node__has_a_worker_per_gpu_each_on_its_own(slurm, store, serial, profile, tmp_path):
    site = profile(
        fcunet={"gpus": 2}, cores=2, processes=2, memory="3GiB", **{"job-extra-directives": ["--gres=gpu:2"]}
    )
    with connect(str(site), 4, dashboard_address="127.0.0.1:0", log_directory=tmp_path / "jobs") as client:
        client.wait_for_workers(4, timeout=120 * PATIENCE)
        seen = client.run(slow_tile.devices)
        of_jobs = {job for job, _ in seen.values()}
        assert len(set(seen.values())) == 4
        assert sorted(job for job, _ in seen.values()) == sorted(2 * [*of_jobs])
        # each came up knowing its device, also one that replaces another
        client.run(slow_tile.end_process, workers=[next(iter(seen))], on_error="ignore")
        until(lambda: len(client.nthreads()) == 4 and set(client.nthreads()) != set(seen), "the replacement")
        assert sorted(client.run(slow_tile.devices).values()) == sorted(seen.values())
        runner.run(config(store, tmp_path / "run"), client=client, progress=False)
    assert_same_bytes(tmp_path / "run", serial)
    assert_clean(tmp_path)


def submit(tmp_path, script, *options):
    (tmp_path / "job.sh").write_text("#!/bin/bash\n" + script)
    answer = subprocess.run(
        ["sbatch", "--parsable", f"--chdir={tmp_path}", "--output=job.log", *options, "job.sh"],
        check=True, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    return answer.stdout.strip()


def test_allocation__gives_its_gpus_to_workers_only(slurm, store, serial, tmp_path):
    out, site = tmp_path / "run", tmp_path / "site.yaml"
    site.write_text(
        "jobqueue: {slurm: {cores: 1, memory: 1500MiB, interface: lo, local-directory: /tmp}}\n"
        "fcunet: {cluster: srun, gpus: 1}\n"
    )
    command = [FCUNET, "run", store, "--out", out, "--cluster", site, *OPTIONS, "--device", "auto"]
    job = submit(
        tmp_path, " ".join(map(str, command)) + "\n",
        "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem=4G", "--gres=gpu:2",
    )  # fmt: skip
    until(lambda: job not in jobs(), "the end of the job", seconds=200)
    log = (tmp_path / "job.log").read_text()
    assert (out / "report.html").exists(), log
    assert_same_bytes(out, serial)
    # four workers, named after node and number, each with a device of its own
    text = (out / "run.log").read_text()
    for worker, device in (("0-0", 0), ("0-1", 1), ("1-0", 0), ("1-1", 1)):
        assert f"worker worker-{worker} uses GPU {device}" in text
    assert_clean(out)


def test_allocation__outside_of_one_says_how_to_get_it(slurm, store, tmp_path):
    said = finish(start([FCUNET, "run", str(store), "--out", str(tmp_path), "--cluster", "srun"]), status=1)
    assert "salloc --nodes=2 --gres=gpu:4" in said


def test_slurm_runner__may_hand_its_client_to_a_run(slurm, store, serial, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "script.py").write_text(
        "from dask_jobqueue.slurm import SLURMRunner\n"
        "from distributed import Client\n"
        "from fcunet import Config, run\n"
        "options = {'interface': 'lo'}\n"
        "with SLURMRunner(scheduler_file='scheduler-{job_id}.json', scheduler_options=dict(options),\n"
        "                 worker_options=options | {'nthreads': 1}) as cluster, Client(cluster) as client:\n"
        "    client.wait_for_workers(cluster.n_workers)\n"
        f"    run(Config.load(store={str(store)!r}, out={str(out)!r}, **{SETTINGS!r}), client=client)\n"
    )
    # scheduler and driver get no GPU: they are a component of their own
    job = submit(
        tmp_path, f"srun --het-group=0,1 --mpi=none {sys.executable} script.py\n",
        "-p", "cpu", "-n2", "--mem=3G", ":", "-p", "gpu", "-n2", "--gres=gpu:2", "--mem=3G",
    )  # fmt: skip
    until(lambda: not any(j.startswith(job) for j in jobs()), "the end of the job", seconds=200)
    assert (out / "report.html").exists(), (tmp_path / "job.log").read_text()
    assert_same_bytes(out, serial)


@pytest.fixture
def scheduler(slurm, tmp_path):
    """Starts a scheduler of its own, and a worker for it in a SLURM job; knows their processes."""
    running = []

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def add_worker(file, *where):
        running.append(subprocess.Popen(
            ["srun", *where[:-1], "--mem=2G", *CODE, "distributed.cli.dask_worker",
             "--scheduler-file", str(file), "--nthreads", "2", "--local-directory", "/tmp",
             "--death-timeout", "30", *where[-1]], **quiet,
        ))  # fmt: skip

    def begin(name, mixed=False):
        file = tmp_path / f"{name}.json"
        running.append(subprocess.Popen(
            [*CODE, "distributed.cli.dask_scheduler", "--scheduler-file", str(file), "--host", "127.0.0.1",
             "--port", "0", "--dashboard-address", "127.0.0.1:0"], **quiet,
        ))  # fmt: skip
        until(file.exists, "the scheduler")
        scheduler = running[-1]
        add_worker(file, "-p", "gpu", "--gres=gpu:1", ["--resources", "GPU=1"] if mixed else [])
        if mixed:
            add_worker(file, "-p", "cpu", [])
        return json.loads(file.read_text())["address"], scheduler

    yield begin
    for process in reversed(running):
        process.terminate()
        process.wait(timeout=60)
    until(lambda: not jobs(), "an empty queue")


def test_scheduler_that_runs__is_used_and_its_death_is_named(scheduler, store, serial, tmp_path, monkeypatch):
    out = tmp_path / "run"
    address, process = scheduler("first")
    assert address.startswith("tcp://127.0.0.1:")
    monkeypatch.setattr(tiles, "submitted", slow_tile.slow_tile)

    def strike():
        until(lambda: blocks_done(out) >= 5, "five blocks")
        kill([process.pid], signal.SIGKILL)

    thread = threading.Thread(target=strike)
    thread.start()
    with pytest.raises(ConnectionError, match=r"scheduler is gone.*same command"):
        runner.run(config(store, out, cluster=address), progress=False)
    thread.join()
    assert 5 <= blocks_done(out) < 60
    monkeypatch.setattr(tiles, "submitted", tiles.process_tile)
    address, process = scheduler("second")
    runner.run(config(store, out, cluster=address), progress=False)
    assert_same_bytes(out, serial)
    assert process.poll() is None  # it is not ours to end


def test_scheduler_that_runs__gets_no_block_onto_workers_without_a_gpu(
    scheduler, store, serial, tmp_path, monkeypatch
):
    trace = tmp_path / "trace"
    trace.mkdir()
    monkeypatch.setenv("FCUNET_TEST_TRACE", str(trace))
    monkeypatch.setattr(tiles, "submitted", slow_tile.tracing_tile)
    address, _ = scheduler("mixed", mixed=True)
    with Client(address) as client:
        client.wait_for_workers(2, timeout=120 * PATIENCE)
        runner.run(config(store, tmp_path / "run", device="auto"), client=client, progress=False)
        assert len(client.nthreads()) == 2
    # every block, and device 0 of the one job with a GPU
    assert sorted(p.name for p in trace.iterdir()) == sorted(
        f"{iy}-{ix}-0" for iy in range(6) for ix in range(10)
    )
    assert_same_bytes(tmp_path / "run", serial)


def test_doctor__tries_a_job_and_names_what_differs(slurm, profile, tmp_path):
    site = profile(fcunet={"gpus": 0}, **{"job-extra-directives": []})
    said = finish(start([FCUNET, "doctor", "--cluster", str(site)], cwd=tmp_path))
    for line in (
        "ok   profile        site.yaml: queue gpu, walltime 00:10:00; 0 GPUs per job",
        "ok   slurm          slurm",
        "gpu (1-00:00:00, 2 nodes, gpu:8)",
        "interface: lo; here are lo 127.0.0.1",
        "ok   preflight ",
        "ok   job            a worker on gpu",
        "ok   node versions ",
        "ok   node GPU       torch sees none",
        "ok   shared disk ",
    ):
        assert line in said
    assert [p.name for p in tmp_path.iterdir()] == ["site.yaml"]
    # with a GPU asked for, its absence is red, and says what to do
    said = finish(start([FCUNET, "doctor", "--cluster", str(profile())], cwd=tmp_path), status=1)
    assert "BAD  node GPU       torch sees none (CUDA_VISIBLE_DEVICES=0)" in said
    assert "job-extra-directives" in said


def test_training_library__is_built_by_slurm_jobs(slurm, profile, tmp_path):
    import zarr

    site = profile(fcunet={"gpus": 0}, queue="cpu", **{"job-extra-directives": []})
    command = [
        sys.executable, str(ROOT / "workflows" / "build_training_library.py"), str(tmp_path / "library.zarr"),
        "--n-patterns", "32", "--part", "4", "--device", "cpu",
    ]  # fmt: skip
    finish(start([*command, "--cluster", str(site), "--workers", "2"], cwd=tmp_path))
    status = zarr.open_array(tmp_path / "library.zarr" / "train" / "status", mode="r")
    assert np.all(status[:] == 1)
    assert len(list((tmp_path / "library.zarr.jobs").glob("*.err"))) >= 1
    assert_clean(tmp_path)


def test_training__runs_on_two_nodes_and_goes_on_after_its_walltime(slurm, tmp_path):
    out, settings = tmp_path / "out", tmp_path / "train.yaml"
    settings.write_text(
        "{steps: 40, size: 64, validation_size: 64, validation_patterns: 4, validation_doses: [1.0e+4],\n"
        " selection_doses: [1.0e+4], batch: 2, precision: fp32, warmup_steps: 2, log_every: 1,\n"
        " checkpoint_every_s: 0, validate_every_s: 1.0e+9, source: {pool_size: 8, refresh: 0.0},\n"
        " network: {widths: [8, 8, 8, 8], attention_layers: 1, attention_heads: 2}}\n"
    )
    programs = f"FCUNET={FCUNET},TORCHRUN={Path(FCUNET).with_name('torchrun')},MEET_AT=127.0.0.1"
    answer = subprocess.run(
        ["sbatch", "--parsable", f"--chdir={tmp_path}", "--output=%j.log", "--nodes=2", "--gres=gpu:1",
         "--mem=3G", "--cpus-per-task=1", f"--export=ALL,{programs}",
         str(ROOT / "workflows" / "train_fcunet.sbatch"), "--config", str(settings), "--out", str(out)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    job = answer.stdout.strip()
    until(lambda: (out / "checkpoint.pt").exists() or job not in jobs(), "a checkpoint")
    # what SLURM sends three minutes before the end
    subprocess.run(["scancel", "--batch", "--signal=TERM", job], check=True)
    until(lambda: job not in jobs(), "the end of the job", seconds=300)
    log = (tmp_path / f"{job}.log").read_text()
    assert (out / "weights" / "model.safetensors").exists(), log
    assert "CANCELLED" in log  # the first part
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (saved["step"], saved["world"]) == (40, 2)
    assert_clean(out)

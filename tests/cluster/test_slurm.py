"""A run on a real SLURM: through the profile, and through what goes wrong on clusters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from flat_scan import draw_datacube

from fcunet import runner, schema
from fcunet.config import Config
from fcunet.slurm import ClusterError, queue_states
from fcunet.store import Layout, read_status, write_datacube

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SETTINGS = {"method": "correlation", "device": "cpu", "max_num_peaks": 32}
ROOT = Path(__file__).parents[2]
JOBS = {
    "queue": "gpu",
    "walltime": "00:10:00",
    "job-extra-directives": ["--gres=gpu:1"],
    "cores": 1,
    "memory": "1500MiB",
    "interface": "lo",
    "local-directory": "/tmp",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "scan.zarr"
    return write_datacube(path, draw_datacube((24, 40)), layout=Layout((4, 4), (2, 2)))


@pytest.fixture(scope="module")
def serial(store, tmp_path_factory):
    """The same scan on this machine, one worker."""
    out = tmp_path_factory.mktemp("serial") / "run"
    settings = {"workers": 1, "dashboard_address": "127.0.0.1:0"} | SETTINGS
    runner.run(Config.load(store=store, out=out, **settings), progress=False)
    return out


@pytest.fixture
def profile(tmp_path):
    def write(**jobs):
        path = tmp_path / "site.yaml"
        content = {"jobqueue": {"slurm": JOBS | jobs}, "fcunet": {"workers": 2, "start_timeout_s": 60}}
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def command(store, out, profile, workers=2):
    return [
        str(Path(sys.executable).with_name("fcunet")), "run", str(store), "--out", str(out),
        "--cluster", str(profile), "--workers", str(workers), "--method", "correlation", "--device", "cpu",
        "--max-num-peaks", "32", "--dashboard-address", "127.0.0.1:0",
    ]  # fmt: skip


def start(*arguments):
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    return output


def blocks_done(out):
    status = out / "peaks.zarr" / "status"
    return int((read_status(out / "peaks.zarr") == schema.STATUS_DONE).sum()) if status.exists() else 0


def wait_for_blocks(process, out, n):
    while blocks_done(out) < n:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def stored_bytes(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for name in ("peaks.zarr", "strain.zarr")
        for p in Path(folder, name).rglob("*")
        if p.is_file() and p.name != "zarr.json"
    }


def assert_same_bytes(out, serial):
    assert stored_bytes(out) == stored_bytes(serial)


def assert_no_job_is_left(seconds=60):
    end = time.monotonic() + seconds
    while queue_states():
        assert time.monotonic() < end, queue_states()
        time.sleep(0.5)


def test_run__on_slurm_ends_with_the_bytes_of_a_serial_run(slurm, store, serial, profile, tmp_path):
    out = tmp_path / "run"
    output = finish(start(store, out, profile(), 3))
    assert "dashboard http://127.0.0.1" in output
    assert_same_bytes(out, serial)
    assert json.loads((out / "summary.json").read_text())["n_blocks_failed"] == 0
    assert_no_job_is_left()


def test_run__a_cancelled_job_is_replaced(slurm, store, serial, profile, tmp_path):
    out = tmp_path / "run"
    process = start(store, out, profile())
    wait_for_blocks(process, out, 3)
    subprocess.run(["scancel", next(iter(queue_states()))], check=True)
    finish(process)
    assert_same_bytes(out, serial)


def test_run__a_killed_driver_leaves_no_job_and_the_same_command_goes_on(
    slurm, store, serial, profile, tmp_path
):
    out, site = tmp_path / "run", profile()
    process = start(store, out, site)
    wait_for_blocks(process, out, 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert_no_job_is_left()
    done = blocks_done(out)
    output = finish(start(store, out, site))
    assert f"{done} of 60 blocks are done already" in output
    assert_same_bytes(out, serial)


@pytest.mark.parametrize(
    ("jobs", "match"),
    [
        ({"queue": "nowhere"}, "(?i)partition"),
        ({"queue": "short", "walltime": "00:30:00"}, "(?i)time limit"),
        ({"job-extra-directives": ["--gres=gpu:9"]}, "(?i)not available|gres"),
    ],
)
def test_run__a_job_that_slurm_would_refuse_is_named_before_it_is_submitted(
    jobs, match, slurm, store, profile, tmp_path
):
    config = Config.load(store=store, out=tmp_path / "run", cluster=str(profile(**jobs)), **SETTINGS)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=match):
        runner.run(config, progress=False)
    assert time.monotonic() - began < 60
    assert queue_states() == {}
    assert not (tmp_path / "run" / "run.lock").exists()


def test_run__jobs_with_a_broken_environment_end_it_with_their_log(slurm, store, profile, tmp_path):
    site = profile(**{"job-script-prologue": ["echo module not found >&2", "exit 3"]})
    config = Config.load(store=store, out=tmp_path / "run", cluster=str(site), **SETTINGS)
    with pytest.raises(ClusterError, match=r"(?s)ended before.*ExitCode=3:0.*module not found"):
        runner.run(config, progress=False)
    assert_no_job_is_left()


def test_run__an_interface_that_does_not_exist_is_named(slurm, store, profile, tmp_path):
    config = Config.load(store=store, out=tmp_path / "run", cluster=str(profile(interface="ib9")), **SETTINGS)
    with pytest.raises(ValueError, match="ib9"):
        runner.run(config, progress=False)


@pytest.mark.slow
def test_run__outlives_the_walltime_of_its_jobs(slurm, profile, tmp_path):
    # jobs of one minute, and work for three: each is cut off in the middle of a block, twice or more
    small = draw_datacube((24, 40))
    counts = np.tile(small["intensity"].values, (6, 6, 1, 1))
    large = small.drop_vars(["intensity", "scan_y", "scan_x"]).assign(
        intensity=(("scan_y", "scan_x", "qy", "qx"), counts, {"units": "counts"})
    )
    path = write_datacube(tmp_path / "large.zarr", large, layout=Layout((8, 8), (4, 4)))
    out = tmp_path / "run"
    process = start(path, out, profile(queue="short", walltime="00:01:00"))
    jobs: set[str] = set()
    while process.poll() is None:
        jobs |= set(queue_states())
        time.sleep(1)
    finish(process)
    assert len(jobs) > 2
    whole = tmp_path / "whole"
    settings = {"workers": 2, "dashboard_address": "127.0.0.1:0"} | SETTINGS
    runner.run(Config.load(store=path, out=whole, **settings), progress=False)
    assert_same_bytes(out, whole)


def submit_driver(store, out, profile, tmp_path, *options):
    script = ROOT / "workflows" / "strain_mapping.sbatch"
    answer = subprocess.run(
        ["sbatch", "--parsable", "-p", "cpu", "--mem=2G", "--cpus-per-task=1", f"--chdir={tmp_path}",
         *options, f"--export=ALL,FCUNET={Path(sys.executable).with_name('fcunet')}",
         str(script), *command(store, out, profile())[2:]],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return answer.stdout.strip()


def wait_for_job(job, seconds=400):
    end = time.monotonic() + seconds
    while job in queue_states():
        assert time.monotonic() < end, queue_states()
        time.sleep(1)


def test_sbatch_script__runs_the_driver_as_a_job(slurm, store, serial, profile, tmp_path):
    out = tmp_path / "run"
    job = submit_driver(store, out, profile, tmp_path, "--time=00:30:00")
    wait_for_job(job)
    assert (out / "report.html").exists(), (tmp_path / f"fcunet-{job}.log").read_text()
    assert_same_bytes(out, serial)
    assert np.all(read_status(out / "peaks.zarr") == schema.STATUS_DONE)


def test_sbatch_script__goes_back_into_the_queue_in_time(slurm, store, serial, profile, tmp_path):
    out = tmp_path / "run"
    job = submit_driver(store, out, profile, tmp_path, "--time=00:30:00")
    end = time.monotonic() + 200
    while blocks_done(out) < 3:
        assert time.monotonic() < end
        time.sleep(0.05)
    # what SLURM sends ten minutes before the end
    subprocess.run(["scancel", "--batch", "--signal=TERM", job], check=True)
    wait_for_job(job)
    log = (tmp_path / f"fcunet-{job}.log").read_text()
    assert "the same command continues" in log
    assert "blocks are done already" in log
    assert_same_bytes(out, serial)

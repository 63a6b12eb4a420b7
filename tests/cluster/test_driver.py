"""The driver of a run on SLURM: the command, the script, the batch script; killed, told to stop, refused."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import xarray as xr
from lab import (
    PATIENCE,
    ROOT,
    SETTINGS,
    SLOW,
    assert_clean,
    assert_same_bytes,
    blocks_done,
    finish,
    jobs,
    run_command,
    start,
    until,
)

from fcunet import runner
from fcunet.config import Config
from fcunet.lock import RunLockedError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600 * PATIENCE)]


def slow(command):
    """The same command, with blocks that take a while."""
    return SLOW + command[1:]


def finish_here(store, out):
    """The same run again, on this machine."""
    settings = {"workers": 1, "dashboard_address": "127.0.0.1:0"} | SETTINGS
    return runner.run(Config.load(store=store, out=out, **settings), progress=False)


def test_run__on_slurm_ends_with_the_bytes_of_a_serial_run(slurm, store, serial, profile, tmp_path):
    out = tmp_path / "run"
    command = run_command(store, out, profile(), "--workers", "3")
    said = finish(start(command, env=os.environ | {"SSH_CONNECTION": "10.0.0.1 22 10.0.0.2 22"}))
    port = re.search(r"dashboard http://127.0.0.1:(\d+)/status", said)[1]
    assert f"ssh -N -L {port}:127.0.0.1:{port} " in said
    assert_same_bytes(out, serial)
    assert json.loads((out / "summary.json").read_text())["n_blocks_failed"] == 0
    assert (out / "report.html").exists()
    assert list((out / "jobs").glob("*.err"))
    # Dask's own report shows itself without a network
    report = (out / "dask-report.html").read_text()
    assert "Bokeh" in report
    assert re.findall(r'<(?:script|link rel="stylesheet")[^>]*(?:src|href)="http', report) == []
    assert_clean(out)
    secrets = [p for p in out.rglob("*") if p.is_file() and b"PRIVATE KEY" in p.read_bytes()]
    assert secrets == []


def test_run__of_a_killed_driver_leaves_no_job_and_goes_on(slurm, store, serial, profile, tmp_path):
    out, site = tmp_path / "run", profile()
    process = start(slow(run_command(store, out, site)))
    until(lambda: blocks_done(out) >= 5, "five blocks", process=process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    until(lambda: not jobs(), "the end of the jobs")  # by themselves: nobody is there to cancel them
    assert (out / "run.lock").exists()  # and it is recognised as stale
    done = blocks_done(out)
    said = finish(start(slow(run_command(store, out, site))))
    assert f"{done} of 60 blocks are done already" in said
    assert_same_bytes(out, serial)
    assert_clean(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_run__told_to_stop_drains_and_says_how_to_go_on(number, slurm, store, serial, profile, tmp_path):
    out = tmp_path / "run"
    process = start(slow(run_command(store, out, profile())))
    until(lambda: blocks_done(out) >= 5, "five blocks", process=process)
    with pytest.raises(RunLockedError, match=rf"in use by process {process.pid} on .* since 2\d\d\d-"):
        finish_here(store, out)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    said = finish(process, status=1)
    done = blocks_done(out)
    assert f"stopped with {done} of 60 blocks done; the same command continues: fcunet run {store}" in said
    assert "Traceback" not in said
    assert 5 <= done < 60
    assert_clean(out)
    finish_here(store, out)
    assert_same_bytes(out, serial)


def submit(tmp_path, *script, **options):
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    answer = subprocess.run(
        ["sbatch", "--parsable", f"--chdir={tmp_path}", "--output=%j.log", *given, *map(str, script)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return answer.stdout.strip()


def test_sbatch_script__goes_back_into_the_queue_before_its_walltime_ends(
    slurm, store, serial, profile, tmp_path
):
    out = tmp_path / "run"
    command = tmp_path / "fcunet"
    command.write_text(f'#!/bin/sh\nexec {" ".join(SLOW)} "$@"\n')
    command.chmod(0o755)
    job = submit(
        tmp_path, ROOT / "workflows" / "strain_mapping.sbatch", *run_command(store, out, profile())[2:],
        partition="cpu", mem="2G", cpus_per_task=1, time="00:30:00", export=f"ALL,FCUNET={command}",
    )  # fmt: skip
    log = tmp_path / f"{job}.log"
    until(lambda: blocks_done(out) >= 5, "five blocks")
    # what SLURM sends ten minutes before the end
    subprocess.run(["scancel", "--batch", "--signal=TERM", job], check=True)
    until(
        lambda: log.exists() and "the same command continues" in log.read_text(), "the end of the first part"
    )
    until(lambda: job not in jobs(), "the end of the job", seconds=300)
    text = log.read_text()
    assert "blocks are done already" in text
    assert "ssh -N -L" in text
    assert_same_bytes(out, serial)
    assert_clean(out)


def test_workflow_script__does_the_same(slurm, store, serial, profile, tmp_path):
    out = tmp_path / "run"
    settings = tmp_path / "settings.yaml"
    settings.write_text("detection: {device: cpu, max_num_peaks: 32}\n")
    said = finish(start([
        sys.executable, str(ROOT / "workflows" / "strain_mapping.py"), str(store), "--out", str(out),
        "--config", str(settings), "--method", "correlation", "--cluster", str(profile()), "--workers", "2",
    ], cwd=tmp_path))  # fmt: skip
    assert "e_xx" in said
    assert_same_bytes(out, serial)
    with xr.open_datatree(out / "strain.zarr", engine="zarr", consolidated=False) as tree:
        assert tree["strain/e_xx"].shape == (24, 40)

"""What goes wrong the first time on a cluster: answered within 30 s, with the reason and what to do."""

import importlib
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from lab import (
    PATIENCE,
    SETTINGS,
    SLOW,
    assert_clean,
    assert_same_bytes,
    blocks_done,
    jobs,
    run_command,
    start_controller,
    stop_controller,
    until,
    write_profile,
)

from fcunet import runner
from fcunet.config import Config
from fcunet.slurm import ClusterError, preflight
from fcunet.tiles import StorageError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300 * PATIENCE)]

# said within 30 s on an idle machine; the tests share theirs with others
LIMIT_S = 30 * PATIENCE

QUOTA = "640k"


@contextmanager
def answered_in_time():
    began = time.monotonic()
    yield
    assert time.monotonic() - began < LIMIT_S


def run(store, out, profile, **settings):
    settings = {"dashboard_address": "127.0.0.1:0"} | SETTINGS | settings
    return runner.run(Config.load(store=store, out=out, cluster=str(profile), **settings), progress=False)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"queue": "nowhere"}, r"(?s)Invalid partition.*Change queue .*sinfo -s.*#SBATCH -p nowhere"),
        ({"queue": "paid", "account": "chemistry"}, r"(?s)Invalid account.*Change account .*sacctmgr"),
        ({"queue": "short", "walltime": "00:30:00"}, r"(?s)time limit.*Change walltime .*sinfo"),
        ({"job-extra-directives": ["--gres=gpu:99"]}, r"(?s)not available.*Change job-extra-directives"),
        ({"job-mem": "900GiB"}, r"(?s)not available.*Change .*job-mem"),
    ],
    ids=["partition", "account", "walltime", "gpus", "memory"],
)
def test_run__names_what_slurm_would_refuse(keys, match, store, profile, tmp_path):
    with answered_in_time(), pytest.raises(ClusterError, match=match):
        run(store, tmp_path / "run", profile(**keys))
    assert jobs() == {}
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.fixture
def partition(slurm):
    """Closes the partition of the jobs to new ones, and opens it again."""

    def set_state(state):
        subprocess.run(["scontrol", "update", "PartitionName=gpu", f"State={state}"], check=True)

    yield set_state
    set_state("UP")


def test_run__ends_when_slurm_refuses_what_it_would_have_taken(
    partition, store, profile, tmp_path, monkeypatch
):
    # between the preflight and the first job
    module = importlib.import_module("fcunet.cluster")
    monkeypatch.setattr(module, "preflight", lambda script: (preflight(script), partition("DRAIN")))
    match = r"(?s)refuses all jobs of this run: .*partition not available.*Change queue in the profile"
    with answered_in_time(), pytest.raises(ClusterError, match=match):
        run(store, tmp_path / "run", profile())
    assert_clean(tmp_path / "run")


def test_run__waits_for_a_controller_that_is_away_but_not_for_long(slurm, store, profile, tmp_path):
    stop_controller(slurm)
    try:
        with answered_in_time(), pytest.raises(ClusterError, match="controller does not answer .*Try: sinfo"):
            run(store, tmp_path / "run", profile())
        assert not (tmp_path / "run" / "run.lock").exists()
    finally:
        start_controller(slurm)
    # it is back, and refuses everything until it has heard of its nodes
    run(store, tmp_path / "part", profile(), region="0:4,0:8", workers=1)


def test_run__names_an_interface_that_does_not_exist(store, profile, tmp_path):
    with answered_in_time(), pytest.raises(ValueError, match=r"'ib9' is not a valid network interface.*lo"):
        run(store, tmp_path / "run", profile(interface="ib9"))


def test_run__names_a_port_that_is_taken(store, profile, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        site = profile(**{"scheduler-options": {"port": taken.getsockname()[1]}})
        with answered_in_time(), pytest.raises(ValueError, match=r"in use.*another port below scheduler-opt"):
            run(store, tmp_path / "run", site)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (
            {"job-script-prologue": ["echo module not found: CUDA >&2", "exit 3"]},
            r"(?s)ended before its worker.*ExitCode=3:0.*module not found: CUDA.*job-script-prologue",
        ),
        (
            {"python": "/opt/nowhere/bin/python"},
            r"(?s)ended before its worker.*ExitCode=127:0.*/opt/nowhere/bin/python.*python and interface",
        ),
    ],
    ids=["prologue", "python"],
)
def test_run__ends_with_the_log_of_a_job_whose_environment_is_missing(keys, match, store, profile, tmp_path):
    with answered_in_time(), pytest.raises(ClusterError, match=match):
        run(store, tmp_path / "run", profile(**keys))
    assert_clean(tmp_path / "run")


def test_run__names_a_job_whose_worker_cannot_connect(store, profile, tmp_path):
    # a firewall: the job runs, and nothing is heard of it
    site = profile(fcunet={"start_timeout_s": 5}, **{"job-script-prologue": ["exec sleep 600"]})
    with answered_in_time(), pytest.raises(ClusterError, match=r"runs for .* has not connected.*RUNNING"):
        run(store, tmp_path / "run", site)
    assert_clean(tmp_path / "run")


def test_run__names_the_node_that_does_not_see_the_scan(store, serial, profile, tmp_path):
    # a node on which the disk is not mounted: an empty one lies over the folder of the scan
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\nexec unshare --mount sh -c "
        f"""'mount -t tmpfs none "{store.parent}" && exec {sys.executable} "$@"' sh "$@"\n"""
    )
    python.chmod(0o755)
    site = profile(python=str(python))
    match = rf"gpu\d does not see {store}; put the scan and the run directory \(--out\) on a file system"
    with answered_in_time(), pytest.raises(StorageError, match=match):
        run(store, tmp_path / "run", site)
    assert_clean(tmp_path / "run")
    assert blocks_done(tmp_path / "run") == 0
    run(store, tmp_path / "run", "local", workers=1)  # nothing was marked as failed
    assert_same_bytes(tmp_path / "run", serial)


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for half of a run; gives the folder, and what makes room in it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "none", str(folder)], check=True)
    yield folder, ["mount", "-o", "remount,size=64m", str(folder)]
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def quota(tmp_path):
    """A home with a quota, of which a run needs twice as much."""
    if not shutil.which("mkfs.btrfs"):
        pytest.skip("no file system with quotas here: apt-get install btrfs-progs")
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(2**27)
    subprocess.run(["mkfs.btrfs", "--quiet", str(image)], check=True, capture_output=True)
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system with quotas here: {mounted.stderr}")
    try:
        for command in (
            ["subvolume", "create", str(disk / "home")],
            ["quota", "enable", str(disk)],
            ["qgroup", "limit", QUOTA, str(disk / "home")],
        ):
            subprocess.run(["btrfs", *command], check=True, capture_output=True)
        yield disk / "home", ["btrfs", "qgroup", "limit", "none", str(disk / "home")]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize(
    ("disk", "reason"),
    [("small_disk", "No space left on device"), ("quota", "Disk quota exceeded")],
    ids=["full", "quota"],
)
def test_run__stops_when_there_is_no_room_and_goes_on_when_there_is(
    disk, reason, store, serial, profile, request, tmp_path
):
    folder, make_room = request.getfixturevalue(disk)
    out = folder / "run"
    site = write_profile(tmp_path / "site.yaml", **{"log-directory": str(tmp_path / "jobs")})
    with answered_in_time(), pytest.raises(StorageError, match=rf"{reason}: .*make room"):
        run(store, out, site)
    assert 0 < blocks_done(out) < 60
    subprocess.run(make_room, check=True)
    run(store, out, "local", workers=1)
    assert_same_bytes(out, serial)
    assert_clean(out)


def test_run__says_once_that_a_gpu_worker_has_no_gpu(store, profile, tmp_path):
    # the lab's GPUs are none, which is what a job sees that asked for them the wrong way
    run(store, tmp_path / "run", profile(), device="auto", workers=1, region="0:4,0:8")
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count("was to use a GPU but sees none (CUDA_VISIBLE_DEVICES=0)") == 1


def test_run__shows_that_jobs_wait(store, profile, tmp_path):
    # the nodes are taken for a while by somebody else
    other = subprocess.run(
        ["sbatch", "--parsable", "-p", "cpu", "-N1", "--exclusive", "--mem=1G", "-o", "/dev/null",
         "--wrap", "sleep 600"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    until(lambda: jobs().get(other, ("", ""))[0] == "RUNNING", "the other job")
    said = tmp_path / "said.txt"
    site = profile(queue="cpu", fcunet={"gpus": 0}, **{"job-extra-directives": []})
    command = SLOW + run_command(store, tmp_path / "run", site, "--region", "0:4,0:8", "--workers", "1")[1:]
    with said.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        until(lambda: "1 job waits in the queue (Resources)" in said.read_text(), "the news", process=process)
        subprocess.run(["scancel", other], check=True)
        assert process.wait(timeout=200 * PATIENCE) == 0, said.read_text()

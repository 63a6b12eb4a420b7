import json
import os
import urllib.request
from pathlib import Path

import dask
import numpy as np
import pytest

from fcunet import slurm
from fcunet.cluster import DASK_SETTINGS, connect, free_address, report_health, visible_device
from fcunet.dashboard import RunPageFeed
from fcunet.slurm import ClusterError, JobWatch, ProfileSettings, build_cluster, preflight, read_profile

PROFILES = Path(__file__).parents[1] / "cluster" / "profiles"


@pytest.fixture(scope="module")
def client():
    with connect(workers=1, dashboard_address="127.0.0.1:0") as client:
        yield client


def write(path, text):
    path.write_text(text)
    return path


def job_script(profile, tmp_path):
    """What would be submitted; nothing is."""
    with dask.config.set({"jobqueue.slurm.interface": "lo"}):
        one = build_cluster(profile, log_directory=tmp_path)
    try:
        return one.job_script()
    finally:
        one.close()


def test_connect__runs_each_worker_with_one_arithmetic_thread(client):
    def environment():
        import os

        return os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]

    assert set(client.run(environment).values()) == {("1", "1")}


def test_connect__listens_on_this_machine_only(client):
    assert client.scheduler.address.startswith("tcp://127.0.0.1:")
    assert client.dashboard_link.startswith("http://127.0.0.1:")


def test_connect__changes_settings_only_while_it_lasts(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dask.config.get("distributed.scheduler.allowed-failures")
    with connect(workers=1, dashboard_address="127.0.0.1:0") as one:
        assert dask.config.get("distributed.scheduler.worker-ttl") == "60s"
        assert one.nthreads()
        assert "OMP_NUM_THREADS" not in os.environ  # the nanny sets it for the workers, in this process
    assert dask.config.get("distributed.scheduler.allowed-failures") == before


def test_connect__to_a_running_scheduler_leaves_it_running(client):
    with connect(client.scheduler.address) as second:
        assert second.submit(sum, [1, 2]).result() == 3
    assert client.submit(sum, [3, 4]).result() == 7


def test_connect__says_what_can_be_named():
    with pytest.raises(ValueError, match=r"'slurm' is not known; use 'local'"), connect("slurm"):
        pass


def test_connect__says_that_no_scheduler_answers(monkeypatch):
    monkeypatch.setitem(DASK_SETTINGS, "distributed.comm.timeouts.connect", "300ms")
    with pytest.raises(TimeoutError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        connect("tcp://127.0.0.1:9").__enter__()


def test_report_health__of_a_sound_cluster_is_silent(client):
    assert report_health(client, 1) == ""
    assert report_health(client, 0) == "waiting for workers"


def test_free_address__moves_to_another_port_when_this_one_is_taken(client):
    taken = client.dashboard_link.removeprefix("http://").removesuffix("/status")
    assert free_address(taken) == "127.0.0.1:0"
    assert free_address("127.0.0.1:0") == "127.0.0.1:0"
    with pytest.raises(ValueError, match="HOST:PORT"):
        free_address("localhost")


@pytest.mark.parametrize(
    ("name", "visible", "device"),
    [
        ("SLURMCluster-3-2", "0,1,2,3", "2"),
        ("1", "4,7", "7"),
        ("w-5", "0,1,2,3", "1"),
        ("0", "GPU-ab,GPU-cd", "GPU-ab"),
    ],
)
def test_visible_device__goes_by_the_number_in_the_name(name, visible, device):
    assert visible_device(name, visible) == device


def test_visible_device__needs_a_number():
    with pytest.raises(ValueError, match="does not end in a number"):
        visible_device("worker", "0,1")


def test_page__shows_the_run_on_the_port_of_the_dashboard(client):
    feed = RunPageFeed(client, run="a", title="<b>scan</b>", status=np.zeros((2, 3), np.uint8))
    feed.done(0, 1, 1, thumbnail=[[1.0, 2.0]])
    feed.done(1, 2, 2, reason="it does not decode")
    feed.send(rate=123.4, remaining_s=5.0, workers=1)
    base = client.dashboard_link.removesuffix("/status")
    state = json.load(urllib.request.urlopen(f"{base}/fcunet.json"))
    assert state["status"] == "010002"
    assert state["tiles"] == {"0,1": [[1.0, 2.0]]}
    assert state["failed"] == {"1,2": "it does not decode"}
    page = urllib.request.urlopen(f"{base}/fcunet").read().decode()
    assert "fcunet.json" in page
    assert "<b>scan</b>" not in page  # a title comes as text, by the script


def test_page__a_new_run_begins_with_an_empty_map(client):
    feed = RunPageFeed(client, run="b", title="scan", status=np.zeros((1, 1), np.uint8))
    feed.send(rate=0.0, remaining_s=None, workers=1)
    base = client.dashboard_link.removesuffix("/status")
    assert json.load(urllib.request.urlopen(f"{base}/fcunet.json"))["tiles"] == {}


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda p: p.stem)
def test_read_profile__takes_the_shipped_ones(path):
    assert read_profile(path).settings.workers >= 1


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("fcunet: {worker: 3}", r"unknown key fcunet.worker in .*did you mean fcunet.workers\?"),
        ("jobqueue: {slurm: {quee: gpu}}", r"unknown key jobqueue.slurm.quee .*jobqueue.slurm.queue\?"),
        ("jobqueue: {pbs: {queue: gpu}}", "unknown key jobqueue.pbs"),
        ("slurm: {queue: gpu}", "unknown key slurm"),
        ("fcunet: {workers: many}", "fcunet.workers .* 'many', needed is a whole number"),
        ("fcunet: {cluster: pbs}", "choose slurm or local"),
        ("jobqueue: {slurm: {cores: 4}}", "lacks memory"),
        ("fcunet: [1]", "not keys and values"),
        ("fcunet: {", "not valid YAML"),
    ],
)
def test_read_profile__names_what_is_wrong(text, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        read_profile(write(tmp_path / "site.yaml", text))


def test_read_profile__of_a_missing_file_names_those_beside_it():
    with pytest.raises(FileNotFoundError, match=r"slurm-gpu\.yaml"):
        read_profile(PROFILES / "slurm-gpus.yaml")


def test_job_script__asks_for_one_gpu_and_one_worker(tmp_path):
    script = job_script(read_profile(PROFILES / "slurm-gpu.yaml"), tmp_path)
    for line in (
        "#SBATCH -p gpu",
        "#SBATCH --gres=gpu:1",
        "#SBATCH --no-requeue",
        "#SBATCH --cpus-per-task=8",
    ):
        assert line in script
    assert "#SBATCH --mem=32G" in script
    assert "--nthreads 4 " in script
    assert "--memory-limit 24.00GiB" in script
    assert "--nworkers" not in script
    assert "--tls-cert" in script


def test_job_script__of_a_whole_node_has_a_worker_per_gpu(tmp_path, monkeypatch):
    profile = read_profile(PROFILES / "slurm-whole-node.yaml")
    profile.jobs["interface"] = "lo"
    script = job_script(profile, tmp_path)
    assert "--nworkers 4" in script
    assert "--nthreads 4 " in script
    assert "#SBATCH --exclusive" in script


def test_import_jobqueue__leaves_the_users_configuration_alone(tmp_path):
    import subprocess
    import sys

    code = "from fcunet.slurm import import_jobqueue; import_jobqueue()"
    environment = os.environ | {"HOME": str(tmp_path), "DASK_CONFIG": str(tmp_path / "dask")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_preflight__without_slurm_says_where_to_go(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ClusterError, match="login node"):
        preflight("#!/bin/sh")


class _Cluster:
    """What JobWatch sees of a SLURMCluster with one job."""

    class _Job:
        job_id = "17"

    class _Scheduler:
        workers: dict = {}

    def __init__(self, folder):
        self.workers, self.scheduler = {"SLURMCluster-0": self._Job()}, self._Scheduler()
        self._dummy_job = type("Dummy", (), {"log_directory": folder})


@pytest.fixture
def watch(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm, "_ASK_EVERY_S", 0)
    monkeypatch.setattr(slurm, "_GRACE_S", -1)
    monkeypatch.setattr(slurm, "job_facts", lambda job_id: "SLURM says ExitCode=3:0.")
    return JobWatch(_Cluster(tmp_path), ProfileSettings(start_timeout_s=0))


def test_job_watch__says_that_jobs_wait_in_the_queue(watch, monkeypatch):
    monkeypatch.setattr(slurm, "queue_states", lambda: {"17": ("PENDING", "Priority")})
    assert watch.look(0) == "1 jobs wait in the queue (Priority)"


def test_job_watch__ends_the_run_with_the_log_of_a_job_that_ended_too_soon(watch, monkeypatch, tmp_path):
    monkeypatch.setattr(slurm, "queue_states", dict)
    (tmp_path / "dask-worker-17.err").write_text("ImportError: no module named fcunet\n")
    with pytest.raises(ClusterError, match=r"(?s)job 17 ended before.*ExitCode=3:0.*no module named fcunet"):
        watch.look(0)


def test_job_watch__ends_the_run_when_a_worker_cannot_connect(watch, monkeypatch):
    monkeypatch.setattr(slurm, "queue_states", lambda: {"17": ("RUNNING", "None")})
    watch.look(0)
    with pytest.raises(ClusterError, match="has not connected"):
        watch.look(0)


def test_job_watch__survives_a_controller_that_does_not_answer(watch, monkeypatch):
    def silent():
        raise OSError("no answer")

    monkeypatch.setattr(slurm, "queue_states", silent)
    assert watch.look(1) == "squeue does not answer"

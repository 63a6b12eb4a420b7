import json
import os
import re
import urllib.request
from pathlib import Path

import dask
import numpy as np
import pytest

from fcunet import slurm
from fcunet import watch as watch_module
from fcunet.allocation import step_command
from fcunet.cluster import (
    DASK_SETTINGS,
    connect,
    free_address,
    on_interface,
    report_health,
    visible_device,
)
from fcunet.dashboard import LivePage, RunPageFeed
from fcunet.progress import Progress
from fcunet.session import dask_report
from fcunet.slurm import ClusterError, ProfileSettings, build_cluster, preflight, read_profile
from fcunet.watch import JobWatch

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


def test_worker__keeps_few_profiles_however_long_it_lives(client):
    def kept(dask_worker):
        for _ in range(200):
            dask_worker.cycle_profile()
        histories = dask_worker.profile_history, dask_worker.profile_keys_history
        return max(map(len, histories)), dask_worker.periodic_callbacks["profile-cycle"].callback_time

    assert set(client.run(kept).values()) == {(20, 60_000)}


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
    feed.done(0, 1, 1, maps={"bf": [[1.0, 2.0]]})
    feed.done(1, 2, 2, reason="it does not decode")
    bar = Progress(600, show=False)
    bar.advance(100)
    bar.advance(100, failed=True)
    feed.send(bar, workers=1)
    base = client.dashboard_link.removesuffix("/status")
    state = json.load(urllib.request.urlopen(f"{base}/fcunet.json"))
    assert state["status"] == "010002"
    assert state["maps"] == {"0,1": {"bf": [[1.0, 2.0]]}}
    assert state["patterns"] == [200, 600]
    assert state["rate"] > 0
    assert state["remaining_s"] > 0
    assert json.load(urllib.request.urlopen(f"{base}/fcunet.json?since={state['count']}"))["maps"] == {}
    assert [m["name"] for m in state["machines"]] == ["0"]
    assert state["failed"] == {"1,2": "it does not decode"}
    page = urllib.request.urlopen(f"{base}/fcunet").read().decode()
    assert "fcunet.json" in page
    assert "<b>scan</b>" not in page  # a title comes as text, by the script


def test_page__a_new_run_begins_with_an_empty_map(client):
    feed = RunPageFeed(client, run="b", title="scan", status=np.zeros((1, 1), np.uint8))
    feed.send(Progress(1, show=False), workers=1)
    base = client.dashboard_link.removesuffix("/status")
    assert json.load(urllib.request.urlopen(f"{base}/fcunet.json"))["maps"] == {}


def test_page__counts_blocks_that_are_tried_again(client, tmp_path):
    feed = RunPageFeed(client, run="c", title="scan", status=np.zeros((1, 1), np.uint8))
    feed.send(Progress(1, show=False), workers=1)

    def fails_once(mark):
        if not mark.exists():
            mark.touch()
            raise OSError("intermittent")
        return 1

    key = "fcunet-tile-4-2-abc"
    assert client.submit(fails_once, tmp_path / "mark", key=key, retries=2, pure=False).result() == 1
    base = client.dashboard_link.removesuffix("/status")
    state = json.load(urllib.request.urlopen(f"{base}/fcunet.json"))
    assert state["retried"] == {"4,2": 1}
    assert state["active"] == []


def test_live_page__links_through_the_prefix_that_dask_is_told(client):
    with dask.config.set({"distributed.dashboard.link": "/user/me/proxy/{port}/status"}):
        shown = LivePage(client)
    port = client.dashboard_link.rpartition(":")[2].partition("/")[0]
    assert f'src="/user/me/proxy/{port}/fcunet"' in shown._repr_html_()


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
        ("fcunet: {cluster: pbs}", "choose slurm, srun or local"),
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
    assert "#SBATCH --mem=32G\n" in script
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
        allowed_failures = 0

    def __init__(self, folder):
        self.workers, self.scheduler = {"SLURMCluster-0": self._Job()}, self._Scheduler()
        self._dummy_job = type("Dummy", (), {"log_directory": folder})


@pytest.fixture
def watch(monkeypatch, tmp_path):
    monkeypatch.setattr(watch_module, "_ASK_EVERY_S", 0)
    monkeypatch.setattr(watch_module, "_GRACE_S", -1)
    monkeypatch.setattr(watch_module, "job_facts", lambda job_id: "SLURM says ExitCode=3:0.")
    return JobWatch(_Cluster(tmp_path), ProfileSettings(start_timeout_s=0))


def test_job_watch__says_that_jobs_wait_in_the_queue(watch, monkeypatch):
    monkeypatch.setattr(watch_module, "queue_states", lambda: {"17": ("PENDING", "Priority")})
    assert watch.look(0) == "1 job waits in the queue (Priority)"


def test_job_watch__ends_the_run_with_the_log_of_a_job_that_ended_too_soon(watch, monkeypatch, tmp_path):
    monkeypatch.setattr(watch_module, "queue_states", dict)
    (tmp_path / "dask-worker-17.err").write_text("ImportError: no module named fcunet\n")
    with pytest.raises(ClusterError, match=r"(?s)job 17 ended before.*ExitCode=3:0.*no module named fcunet"):
        watch.look(0)


def test_job_watch__ends_the_run_when_a_worker_cannot_connect(watch, monkeypatch):
    monkeypatch.setattr(watch_module, "queue_states", lambda: {"17": ("RUNNING", "None")})
    watch.look(0)
    with pytest.raises(ClusterError, match="has not connected"):
        watch.look(0)


def test_job_watch__survives_a_controller_that_does_not_answer(watch, monkeypatch):
    def silent():
        raise OSError("no answer")

    monkeypatch.setattr(watch_module, "queue_states", silent)
    assert watch.look(1) == "squeue does not answer"


def test_job_watch__ends_the_run_for_a_job_that_will_never_start(watch, monkeypatch):
    monkeypatch.setattr(watch_module, "queue_states", lambda: {"17": ("PENDING", "PartitionTimeLimit")})
    with pytest.raises(
        ClusterError, match="will never start: SLURM says PartitionTimeLimit. Change walltime"
    ):
        watch.look(0)


class _Worker:
    name = "SLURMCluster-0"


def come_and_go(watch, monkeypatch, number, progress):
    """Job `number` has its worker for a moment, then both are gone."""
    job = type("Job", (), {"job_id": str(number)})()
    watch.cluster.workers = {"SLURMCluster-0": job}
    monkeypatch.setattr(watch.cluster.scheduler, "workers", {"a": _Worker()}, raising=False)
    monkeypatch.setattr(watch_module, "queue_states", lambda: {str(number): ("RUNNING", "None")})
    watch.look(1, progress)
    watch.cluster.workers = {}
    monkeypatch.setattr(watch_module, "queue_states", dict)
    watch.look(0, progress)


def test_job_watch__ends_the_run_when_jobs_come_and_go_and_nothing_is_done(watch, monkeypatch):
    for number in range(3):
        come_and_go(watch, monkeypatch, number, progress=16)
    with pytest.raises(ClusterError, match="4 jobs in a row ended without having finished a block"):
        come_and_go(watch, monkeypatch, 9, progress=16)


def test_job_watch__bears_with_any_number_of_lost_jobs_while_work_is_done(watch, monkeypatch):
    for number in range(10):
        come_and_go(watch, monkeypatch, number, progress=16 * (number + 1))


def test_on_interface__gives_the_address_of_the_network():
    assert on_interface("127.0.0.1:8787", "lo") == "127.0.0.1:8787"
    assert on_interface("10.0.0.1:8787", "ib9") == "10.0.0.1:8787"  # an address that was given stays
    with pytest.raises(ValueError, match="'ib9' is not a valid network interface"):
        on_interface("127.0.0.1:8787", "ib9")


def test_step__starts_a_worker_per_gpu_named_after_node_and_number(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    command = step_command(read_profile(PROFILES / "slurm-allocation.yaml"), None, 2, "tls://10.0.0.1:1", [])
    assert command[:4] == ["srun", "--ntasks=8", "--nodes=2", "--ntasks-per-node=4"]
    assert '--name "worker-$SLURM_NODEID-$SLURM_LOCALID"' in command[-1]
    assert "export PYTORCH_ALLOC_CONF" in command[-1]
    with pytest.raises(ClusterError, match="at most --workers 8"):
        step_command(read_profile(PROFILES / "slurm-allocation.yaml"), 9, 2, "tls://10.0.0.1:1", [])


def test_step__without_gpus_says_how_to_get_some(monkeypatch):
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ClusterError, match="has no GPU.*gpus: 0"):
        step_command(read_profile(PROFILES / "slurm-allocation.yaml"), None, 1, "tls://10.0.0.1:1", [])


def test_job_script__opens_no_page_to_the_network(tmp_path):
    script = job_script(read_profile(PROFILES / "slurm-gpu.yaml"), tmp_path)
    assert "--dashboard-address 127.0.0.1:0" in script
    assert "PRIVATE KEY" not in script


def test_build_cluster__removes_the_keys_a_killed_driver_left(tmp_path):
    left = write(tmp_path / ".dask-jobqueue.worker.key.abc", "key")
    job_script(read_profile(PROFILES / "slurm-gpu.yaml"), tmp_path)
    assert not left.exists()


@pytest.mark.parametrize(
    ("refusal", "advice"),
    [
        ("allocation failure: Invalid partition name specified", "Change queue .*sinfo -s"),
        ("Invalid account or account/partition combination specified", "Change account .*sacctmgr"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "Change walltime "),
        ("Invalid qos specification", "Change job-extra-directives .*sacctmgr show qos"),
        ("Invalid generic resource (gres) specification", "Change job-extra-directives"),
        ("something nobody has heard of", "^$"),
    ],
)
def test_refusal__names_the_key_to_change(refusal, advice):
    assert re.search(advice, slurm.advice(refusal).strip())


def test_dask_report__opens_without_a_network_and_takes_no_run_with_it(client, tmp_path, caplog):
    with dask_report(client, tmp_path / "report.html"):
        assert client.submit(sum, [5, 6]).result() == 11
    text = (tmp_path / "report.html").read_text()
    assert "Bokeh" in text
    assert not re.findall(r'<(?:script|link rel="stylesheet")[^>]*(?:src|href)="http', text)
    with dask_report(client, tmp_path / "report.html" / "below a file"):
        pass
    assert "no below a file" in caplog.text


def test_import_jobqueue__leaves_ctrl_c_alone():
    import subprocess
    import sys

    code = (
        "import signal; before = signal.getsignal(signal.SIGINT)\n"
        "from fcunet.slurm import import_jobqueue; import_jobqueue()\n"
        "assert signal.getsignal(signal.SIGINT) is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_table_of_faults__names_tests_that_exist():
    root = Path(__file__).parents[1]
    named = re.findall(
        r"`(?:tests/)?(test_\w+\.py)::(\w+)`", (root / "cluster/slurm-lab/README.md").read_text()
    )
    assert len(named) > 25
    for file, test in set(named):
        [path] = (root / "tests").rglob(file)
        assert f"def {test}(" in path.read_text()

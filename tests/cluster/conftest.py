"""A real SLURM for the tests in this folder, up before the first and down after the last."""

import os
import shutil
import socket
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flat_scan import draw_datacube
from lab import LAB, SETTINGS, SLOW, WALLTIME_JOB, jobs, run_command, start, until, write_profile

from fcunet import runner
from fcunet.cluster import connect
from fcunet.config import Config
from fcunet.store import Layout, write_datacube

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


def free_ports(n: int = 16) -> int:
    """First of `n` ports in a row that are free on loopback."""
    for first in range(27000, 32000, 100):
        held: list[socket.socket] = []
        try:
            for port in range(first, first + n):
                held.append(socket.socket())
                held[-1].bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for one in held:
                one.close()
    raise RuntimeError("no free block of ports")


@pytest.fixture(scope="session")
def slurm():
    """SLURM_CONF points to a running lab; yields its folder. In CI its absence is a failure, not a skip."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        text = f"no SLURM here ({', '.join(missing)} missing); cluster/slurm-lab/slurm-lab.sh install gets it"
        pytest.fail(text) if os.environ.get("CI") else pytest.skip(text)
    # short and open: munged and unix sockets want that
    folder = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")
    os.chmod(folder, 0o755)
    environment = os.environ | {
        "SLURMLAB_DIR": folder,
        "SLURMLAB_PORT0": str(free_ports()),
        "SLURMLAB_GPUS_PER_NODE": "8",
        "SLURMLAB_CPUS_PER_NODE": "32",
        "SLURMLAB_MEM_MB": "64000",
    }
    subprocess.run([LAB, "up"], env=environment, check=True, timeout=60)
    changes = {
        "SLURM_CONF": f"{folder}/etc/slurm.conf",
        "OMP_NUM_THREADS": "1",
        # of the jobs: there are the slow blocks
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ |= changes
    try:
        yield Path(folder)
    finally:
        subprocess.run([LAB, "down"], env=environment, check=False, timeout=60)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """Runs in this process draw no figures, which are not the subject; those of commands do."""
    monkeypatch.setattr(runner, "_write_report", lambda out: out / "report.html")


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A scan of 60 blocks."""
    path = tmp_path_factory.mktemp("scan") / "scan.zarr"
    return write_datacube(path, draw_datacube((24, 40)), layout=Layout((4, 4), (2, 2)))


@pytest.fixture(scope="session")
def serial(store, tmp_path_factory):
    """The same scan on this machine, one worker, undisturbed."""
    out = tmp_path_factory.mktemp("serial") / "run"
    settings = {"workers": 1, "dashboard_address": "127.0.0.1:0"} | SETTINGS
    runner.run(Config.load(store=store, out=out, **settings), progress=False)
    return out


WAYS = {
    "plain": [],
    "resources": ["--resources", "GPU=1"],
    "lifetime": ["--resources", "GPU=1", "--lifetime", "40s", "--lifetime-stagger", "3s"],
    "staggered": ["--lifetime", "40s", "--lifetime-stagger", "12s"],
}


@pytest.fixture(scope="session", autouse=True)
def walltime_runs(request, tmp_path_factory):
    """Runs whose jobs end after a minute each; they take two, beside the other tests, and hardly compute."""
    ways = [way for way in WAYS for i in request.session.items if i.nodeid.endswith(f"jobs[{way}]")]
    if not ways:
        yield {}
        return
    slurm, store = request.getfixturevalue("slurm"), request.getfixturevalue("store")
    assert slurm
    folder = tmp_path_factory.mktemp("walltime")
    started: list[subprocess.Popen] = []
    environment = os.environ | {"FCUNET_TEST_TILE_S": "3"}

    def run(way):
        jobs = {"job-name": WALLTIME_JOB, "worker-extra-args": WAYS[way]}
        site = write_profile(folder / f"{way}.yaml", queue="short", walltime="00:01:00", **jobs)
        command = SLOW + run_command(store, folder / way, site, "--workers", "2")[1:]
        process = start(command, env=environment)
        started.append(process)
        said = process.communicate()
        return process.returncode, said

    pool = ThreadPoolExecutor(2)  # two at a time, for the others want to get on
    try:
        yield {way: (pool.submit(run, way), folder / way) for way in ways}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            if process.poll() is None:
                process.terminate()
        pool.shutdown()


def pytest_collection_modifyitems(items):
    """What runs beside the others is waited for last but one; chaos spares nothing, and comes last."""
    items.sort(key=lambda item: ("test_walltime" in item.nodeid) + 2 * ("test_chaos" in item.nodeid))


@pytest.fixture(scope="module")
def site(slurm, tmp_path_factory):
    """A client with three GPU jobs that outlive a test; one that breaks any waits for another."""
    folder = tmp_path_factory.mktemp("site")
    profile = write_profile(folder / "site.yaml")
    with connect(str(profile), 3, dashboard_address="127.0.0.1:0", log_directory=folder / "jobs") as client:
        yield client
    until(lambda: not jobs(), "the end of the jobs")


@pytest.fixture
def profile(slurm, tmp_path):
    """Writes a profile for the lab."""

    def write(**settings):
        return write_profile(tmp_path / "site.yaml", **settings)

    return write

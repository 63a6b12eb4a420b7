"""From the name of a cluster to a Dask `Client`: this machine, a running scheduler, or a site profile.

Knows nothing of diffraction. A profile is Dask's own jobqueue YAML plus a short ``fcunet:`` block, see
``cluster/README.md``. Settings live only as long as the connection: nothing is written to the user's own Dask
configuration.
"""

import logging
import os
import shutil
import signal
import socket
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
from dask.system import CPU_COUNT
from dask.utils import parse_bytes
from distributed import Client, LocalCluster, WorkerPlugin
from distributed.core import Status
from distributed.system import MEMORY_LIMIT
from distributed.utils import get_ip_interface

from .allocation import DEFAULT_JOBS, StepWatch, allocation_client
from .slurm import Profile, ProfileSettings, build_cluster, close_with_keys, preflight, read_profile
from .watch import JobWatch

logger = logging.getLogger(__name__)

# Why each differs from Dask's default is written beside it.
DASK_SETTINGS: dict[str, Any] = {
    # 15 s: a job is given up when its worker is gone for so long, and to start one anew in the same job takes
    # longer than that on a busy node or a cold file system
    "distributed.deploy.lost-worker-timeout": "45s",
    "distributed.scheduler.worker-ttl": "60s",  # 5 min: how long a hung worker keeps its tasks
    # 3: a walltime may end several workers in a row; blocks that still exceed it are tried again, alone
    "distributed.scheduler.allowed-failures": 5,
    "distributed.comm.timeouts.connect": "30s",
    "distributed.worker.memory.target": False,  # nothing is worth spilling: a task returns a few numbers
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": 0.85,
    "distributed.worker.memory.terminate": 0.95,
    "distributed.worker.use-file-locking": False,  # node-local scratch of our own, and no NFS locks
    "distributed.scheduler.dashboard.status.task-stream-length": 1000,
    "distributed.admin.low-level-log-length": 100,  # 1000 of each kind, for developers of Dask
}
ALLOCATION = Profile("srun", ProfileSettings(cluster="srun"), DEFAULT_JOBS)
_GPU_THREADS = 3  # one computes while two read and decompress
_PROFILE_CYCLE_S, _PROFILES_KEPT = 60, 20
_WORKER_BYTES = 1.5 * 2**30  # a block of 128 MiB as stored and as batches, torch, and room to spare


@dataclass(frozen=True)
class WorkerPlan:
    """The workers a run will have, as far as that is known before they start.

    Attributes
    ----------
    count, threads : int
        Worker processes, and blocks in hand of each.
    memory : int or None
        Bytes that each may use; None where a running scheduler knows.
    gpu : bool
        Whether each has a GPU.
    local : bool
        Whether they run on this machine.
    """

    count: int
    threads: int
    memory: int | None
    gpu: bool
    local: bool


class WorkerSetup(WorkerPlugin):
    """Prepares each worker process, also those that replace a lost one: signals, device, threads, logging."""

    name = "fcunet-setup"

    def __init__(
        self, *, pin_devices: bool = False, expect_gpu: bool = False, ignore_interrupt: bool = False
    ):
        self.pin_devices = pin_devices
        self.expect_gpu = expect_gpu
        self.ignore_interrupt = ignore_interrupt

    def setup(self, worker: Any) -> None:
        """Called by Dask in the worker process, before its first task."""
        if self.ignore_interrupt:
            # Ctrl-C in a terminal reaches the whole process group; the driver alone decides what to finish
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            # the scheduler goes with the driver, and what workers say of that is noise
            logging.getLogger("distributed.worker").setLevel(logging.CRITICAL)
        logging.getLogger("fcunet").setLevel(logging.INFO)
        import zarr

        # Dask threads times zarr's own concurrency (10 by default) would overrun the cores of the job
        zarr.config.set({"async.concurrency": 4, "threading.max_workers": 4})
        _thin_profiles(worker)
        news: list[tuple[int, str]] = []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if self.pin_devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_device(str(worker.name), visible)
            visible = os.environ["CUDA_VISIBLE_DEVICES"]
            news.append((logging.INFO, f"worker {worker.name} uses GPU {visible}"))
        if self.expect_gpu:
            import torch

            if not torch.cuda.is_available():
                text = (
                    f"worker {worker.name} on {socket.gethostname()} was to use a GPU but sees none "
                    f"(CUDA_VISIBLE_DEVICES={visible or 'not set'})"
                )
                news.append((logging.ERROR, text))
        _say_when_heard(worker, news)


def _thin_profiles(worker: Any) -> None:
    """Keep what Dask knows of the worker's threads by the minute, for its report, and not by the second.

    Left to itself it keeps 1000 profiles of one second, 90 kB each: a worker grows by 90 MB in 17 minutes.
    Set here, because workers in jobs do not see the settings of this process.
    """
    for name in ("profile_history", "profile_keys_history"):
        setattr(worker, name, deque(getattr(worker, name), maxlen=_PROFILES_KEPT))
    if (cycle := worker.periodic_callbacks.get("profile-cycle")) is not None:
        cycle.callback_time = 1e3 * _PROFILE_CYCLE_S


def _say_when_heard(worker: Any, news: list[tuple[int, str]], tries: int = 40) -> None:
    """Log as soon as what is logged here reaches the driver, which it does once the worker has registered."""
    if tries and news and not logging.getLogger("fcunet").handlers:
        worker.loop.call_later(0.25, _say_when_heard, worker, news, tries - 1)
        return
    for level, text in news:
        logger.log(level, text)


def visible_device(worker_name: str, visible: str | None) -> str:
    """The one GPU a worker may use, from the number its name ends in and CUDA_VISIBLE_DEVICES.

    Several workers of one job see the same GPUs; worker ``NAME-2`` (or ``2``) takes the third of them. Must
    be called before anything starts CUDA in the process.

    Raises
    ------
    ValueError
        If the name ends in no number.
    """
    digits = worker_name[len(worker_name.rstrip("0123456789")) :]
    if not digits:
        raise ValueError(f"cannot choose a GPU for worker {worker_name!r}: its name does not end in a number")
    devices = [d for d in (visible or "").split(",") if d] or [str(i) for i in range(max(count_gpus(), 1))]
    return devices[int(digits) % len(devices)]


def count_gpus() -> int:
    """NVIDIA GPUs this process may use, without starting CUDA or importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


@contextmanager
def connect(
    cluster: str = "local",
    workers: int | None = None,
    *,
    device: str = "auto",
    dashboard_address: str = "127.0.0.1:8787",
    log_directory: str | Path | None = None,
) -> Iterator[Client]:
    """A Dask client for the duration of a ``with`` block.

    Parameters
    ----------
    cluster : str
        ``"local"``: worker processes on this machine, one per GPU, or one per core without a GPU.
        ``"tcp://HOST:PORT"`` or ``"tls://HOST:PORT"``: a scheduler that runs already; it is left running.
        ``"srun"``: workers inside the SLURM allocation that this process runs in, one per GPU.
        ``"PROFILE.yaml"``: a site profile, see ``cluster/profiles``.
    workers : int, optional
        Worker processes to start; None = as many as make sense on this machine, or as the profile says.
    device : str
        ``"cpu"`` keeps local workers on the cores although there are GPUs.
    dashboard_address : str
        ``HOST:PORT`` of the dashboard. If the port is taken another one is used; ``client.dashboard_link``
        knows.

    log_directory : path, optional
        Where the logs of batch jobs go, unless the profile says; every node must see it.

    Yields
    ------
    distributed.Client

    Raises
    ------
    ValueError
        If `cluster` is none of these, or a profile has a wrong key.
    ClusterError
        If SLURM would refuse the jobs.
    TimeoutError
        If no scheduler answers at the address.
    """
    scratch = Path(tempfile.mkdtemp(prefix="fcunet-", dir=os.environ.get("SLURM_TMPDIR")))
    try:
        with dask.config.set(DASK_SETTINGS | {"temporary-directory": str(scratch)}):
            if cluster == "local":
                yield from _local(workers, device, dashboard_address, scratch)
            elif cluster.partition("://")[0] in ("tcp", "tls", "ucx"):
                yield from _existing(cluster)
            elif cluster == "srun" or Path(cluster).suffix in (".yaml", ".yml"):
                profile = ALLOCATION if cluster == "srun" else read_profile(cluster)
                yield from _profile(profile, workers, device, dashboard_address, scratch, log_directory)
            else:
                raise ValueError(
                    f"cluster {cluster!r} is not known; use 'local', 'srun' (inside an allocation), the "
                    "address of a scheduler (tcp://HOST:PORT), or a profile such as "
                    "cluster/profiles/slurm-gpu.yaml"
                )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def plan_workers(cluster: str = "local", workers: int | None = None, *, device: str = "auto") -> WorkerPlan:
    """The workers that :func:`connect` would start; nothing is started.

    For the address of a running scheduler, its workers as they are now.

    Raises
    ------
    ValueError, TimeoutError
        As :func:`connect`.
    """
    if cluster == "local":
        return _plan_local(workers, device)
    if cluster.partition("://")[0] in ("tcp", "tls", "ucx"):
        try:
            with Client(cluster, timeout=5) as client:
                infos = client.scheduler_info(n_workers=-1)["workers"].values()
        except OSError as err:
            raise TimeoutError(f"no Dask scheduler answers at {cluster}") from err
        memory = min((int(info["memory_limit"]) for info in infos), default=0)
        threads = max((int(info["nthreads"]) for info in infos), default=1)
        return WorkerPlan(max(len(infos), 1), threads, memory or None, gpu=device != "cpu", local=False)
    profile = ALLOCATION if cluster == "srun" else read_profile(cluster)
    if profile.settings.cluster == "local":
        return _plan_local(workers or profile.settings.workers, device)
    per_job = int(profile.jobs.get("processes") or max(1, profile.settings.gpus))
    return WorkerPlan(
        count=workers or profile.settings.workers,
        threads=max(1, int(profile.jobs["cores"]) // per_job),
        memory=parse_bytes(profile.jobs["memory"]) // per_job,
        gpu=profile.settings.gpus > 0 and device != "cpu",
        local=False,
    )


def _plan_local(workers: int | None, device: str) -> WorkerPlan:
    gpus = 0 if device == "cpu" else count_gpus()
    if gpus:
        count, threads = workers or gpus, _GPU_THREADS
    else:
        fits = max(1, min(CPU_COUNT, int(0.8 * MEMORY_LIMIT / _WORKER_BYTES)))
        count = workers or fits
        threads = max(1, fits // count)  # of few workers each does several blocks at once
    share = min(1.0, threads / CPU_COUNT) if not gpus else 1 / count
    memory = int(MEMORY_LIMIT * min(share, 1 / count))
    return WorkerPlan(count, threads, memory, gpu=gpus > 0, local=True)


def job_script(profile: str | Path, log_directory: str | Path) -> str:
    """The job script that a profile makes SLURM run for each job; nothing is submitted or written."""
    found = ALLOCATION if profile == "srun" else read_profile(profile)
    with tempfile.TemporaryDirectory() as folder:
        cluster = build_cluster(found, log_directory=folder)
        try:
            return cluster.job_script().replace(folder, str(Path(log_directory).resolve()))
        finally:
            close_with_keys(cluster)


def _local(workers: int | None, device: str, dashboard_address: str, scratch: Path) -> Iterator[Client]:
    plan = _plan_local(workers, device)
    numeric = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = dict(dask.config.get("distributed.nanny.pre-spawn-environ"))
    environment |= dict.fromkeys(numeric, 1)
    before = {name: os.environ.get(name) for name in environment}
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": environment}),
        LocalCluster(
            n_workers=plan.count,
            threads_per_worker=plan.threads,
            processes=True,
            host="127.0.0.1",
            dashboard_address=free_address(dashboard_address),
            local_directory=str(scratch),
        ) as local,
        Client(local) as client,
    ):
        for name, value in before.items():  # the nannies live in this process, and set them here too
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        client.register_plugin(WorkerSetup(pin_devices=plan.gpu, expect_gpu=plan.gpu, ignore_interrupt=True))
        try:
            yield client
        finally:
            logging.getLogger("distributed.nanny").setLevel(logging.ERROR)  # a slow end is no news


def _existing(address: str) -> Iterator[Client]:
    try:
        client = Client(address, timeout=dask.config.get("distributed.comm.timeouts.connect"))
    except OSError as err:
        raise TimeoutError(
            f"no Dask scheduler answers at {address}; start one with: dask scheduler, and workers with: "
            f"dask worker {address}"
        ) from err
    with client:
        client.register_plugin(WorkerSetup())
        yield client


def _profile(
    profile: Profile,
    workers: int | None,
    device: str,
    dashboard_address: str,
    scratch: Path,
    log_directory: str | Path | None,
) -> Iterator[Client]:
    settings = profile.settings
    with dask.config.set(profile.dask):
        if settings.cluster == "local":
            yield from _local(workers or settings.workers, device, dashboard_address, scratch)
            return
        address = free_address(on_interface(dashboard_address, settings.dashboard_interface))
        jobs = _allocation if settings.cluster == "srun" else _slurm
        with jobs(profile, workers, address, log_directory) as (client, watch):
            several = settings.gpus > 1 or (settings.gpus > 0 and settings.cluster == "srun")
            wants_gpu = settings.gpus > 0 and device != "cpu"
            client.register_plugin(WorkerSetup(pin_devices=several, expect_gpu=wants_gpu))
            _WATCHES[id(client)] = watch
            try:
                yield client
            finally:
                _WATCHES.pop(id(client), None)


_WATCHES: dict[int, JobWatch | StepWatch] = {}


@contextmanager
def _slurm(
    profile: Profile, workers: int | None, dashboard_address: str, log_directory: str | Path | None
) -> Iterator[tuple[Client, JobWatch]]:
    """Workers that are SLURM jobs, cancelled with the context."""
    cluster = build_cluster(profile, dashboard_address=dashboard_address, log_directory=log_directory)
    try:
        preflight(cluster.job_script())
        jobs = -(-(workers or profile.settings.workers) // max(1, profile.settings.gpus))
        # adapt, not scale: only adapt replaces a job that is lost later on
        cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)
        with Client(cluster) as client:
            yield client, JobWatch(cluster, profile.settings)
    finally:
        close_with_keys(cluster)


@contextmanager
def _allocation(
    profile: Profile, workers: int | None, dashboard_address: str, log_directory: str | Path | None
) -> Iterator[tuple[Client, StepWatch]]:
    """Workers inside the allocation of this job."""
    folder = Path(profile.jobs.get("log-directory") or log_directory or "fcunet-jobs").resolve()
    with allocation_client(
        profile, workers, dashboard_address=dashboard_address, log_directory=folder
    ) as parts:
        yield parts


def report_health(client: Client, workers: int, progress: int = 0) -> str:
    """One line on what a run is waiting for; empty when all is well. Called once per second by the driver.

    `progress` counts what the run has done so far.

    Raises
    ------
    ClusterError
        When jobs end or hang before their workers have registered, and no worker is left.
    """
    watch = _WATCHES.get(id(client))
    if watch is not None:
        return watch.look(workers, progress)
    if isinstance(client.cluster, LocalCluster):
        _revive(client.cluster)
    return "" if workers else "waiting for workers"


def _revive(cluster: LocalCluster) -> None:
    """Start workers that died while they were starting, or whose nanny gave up: Dask leaves it at that."""
    if len(cluster.workers) < len(cluster.worker_spec):
        assert cluster.loop is not None
        cluster.loop.add_callback(cluster._correct_state)
    for nanny in list(cluster.workers.values()):
        process = getattr(nanny, "process", None)
        if process is not None and (nanny.status, process.status) == (Status.running, Status.stopped):
            assert cluster.loop is not None
            cluster.loop.add_callback(nanny.instantiate)  # does nothing where it is under way already


def on_interface(address: str, interface: str) -> str:
    """`address` (HOST:PORT) on the network `interface` names, if its host is still the default.

    Raises
    ------
    ValueError
        If this machine has no such network; those it has are named.
    """
    host, _, port = address.rpartition(":")
    if interface == "lo" or host not in ("127.0.0.1", "localhost"):
        return address
    return f"{get_ip_interface(interface)}:{port}"


def free_address(address: str) -> str:
    """`address` (HOST:PORT) if that port is free on this machine, else the same host with any free port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
    except OSError:
        return f"{host}:0"
    except ValueError:
        raise ValueError(f"dashboard address {address!r} is not HOST:PORT, such as 127.0.0.1:8787") from None
    return address

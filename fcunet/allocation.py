"""Workers inside a SLURM allocation that exists already: ``--cluster srun``, or a profile that says so.

For sites that forbid many small jobs. The driver runs in the batch script (or the shell of ``salloc``) and
holds the scheduler; one ``srun`` step starts the workers on all nodes of the allocation, one per GPU. So no
GPU is given to a process that does not compute. Unlike with `dask_jobqueue.slurm.SLURMRunner`, workers have a
nanny, which starts them anew, and talk TLS. (``fcunet.run(config, client=Client(SLURMRunner()))`` works too.)
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed import Client, Scheduler, SpecCluster
from distributed.security import Security

from .slurm import ClusterError, Profile
from .watch import log_tail

logger = logging.getLogger(__name__)

_LOG = "workers-{job}.log"
_END_S = 20  # a worker that was told to end and does not is killed
DEFAULT_JOBS: dict[str, Any] = {"cores": 4, "memory": "24GiB"}


class StepWatch:
    """Says what an ``srun`` step of workers is doing."""

    def __init__(self, step: "subprocess.Popen[bytes]", log: Path) -> None:
        self.step, self.log = step, log

    def look(self, workers: int, progress: int = 0) -> str:
        """What the run is waiting for; empty when all is well.

        Raises
        ------
        ClusterError
            When the step has ended and no worker is left.
        """
        if workers:
            return ""
        status = self.step.poll()
        if status is None:
            return "workers are starting"
        raise ClusterError(
            f"srun ended with status {status}, and no worker is left."
            + log_tail(self.log.parent, self.log.name)
        )


@contextmanager
def allocation_client(
    profile: Profile, workers: int | None, *, dashboard_address: str, log_directory: Path
) -> Iterator[tuple[Client, StepWatch]]:
    """A client whose workers are one ``srun`` step of this allocation; they end with it.

    Raises
    ------
    ClusterError
        If this is no allocation, or it has no GPU although the profile wants some.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("srun") is None:
        raise ClusterError(
            "--cluster srun starts workers inside a SLURM allocation, and this is none; get one with sbatch "
            "or salloc, such as: salloc --nodes=2 --gres=gpu:4, or give a profile: --cluster PROFILE.yaml"
        )
    log_directory.mkdir(parents=True, exist_ok=True)
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    interface = profile.jobs.get("interface")
    where = {"interface": interface} if interface else {"host": "127.0.0.1"} if nodes == 1 else {}
    security = Security.temporary() if profile.settings.tls else None
    options = {
        "protocol": "tls://" if security else "tcp://",
        "security": security,
        "dashboard_address": dashboard_address,
        **where,
    }
    log = log_directory / _LOG.format(job=job)
    with (
        tempfile.TemporaryDirectory(prefix="tls-", dir=log_directory) as secrets,
        SpecCluster(
            workers={}, scheduler={"cls": Scheduler, "options": options}, security=security, name="allocation"
        ) as cluster,
        Client(cluster) as client,
        log.open("ab") as output,
    ):
        command = step_command(
            profile, workers, nodes, cluster.scheduler_address, _certificates(security, Path(secrets))
        )
        logger.info("workers: %s", shlex.join(command))
        step = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield client, StepWatch(step, log)
        finally:
            client.retire_workers(remove=True, close_workers=True) if client.nthreads() else None
            step.terminate()
            try:
                step.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                step.kill()
                step.wait()


def step_command(
    profile: Profile, workers: int | None, nodes: int, scheduler: str, certificates: list[str]
) -> list[str]:
    """The ``srun`` command that starts the workers; each is named after its node and its number there."""
    gpus = _gpus_per_node() if profile.settings.gpus else 0
    if profile.settings.gpus and not gpus:
        raise ClusterError(
            "this allocation has no GPU; ask for some (sbatch --gres=gpu:4), or compute on the CPU with a "
            "profile that says fcunet: {cluster: srun, gpus: 0}"
        )
    count = workers or (nodes * gpus if gpus else profile.settings.workers)
    per_node = max(1, -(-count // nodes))
    if gpus and per_node > gpus:
        raise ClusterError(
            f"{count} workers on {nodes} nodes need {per_node} GPUs per node, this allocation has {gpus}; "
            f"use at most --workers {nodes * gpus}"
        )
    jobs = DEFAULT_JOBS | profile.jobs
    worker = [
        str(jobs.get("python") or sys.executable), "-m", "distributed.cli.dask_worker", scheduler,
        "--nthreads", str(jobs["cores"]), "--memory-limit", str(jobs["memory"]), "--nworkers", "1",
        "--death-timeout", "300", "--dashboard-address", "127.0.0.1:0", *certificates,
    ]  # fmt: skip
    if jobs.get("interface"):
        worker += ["--interface", str(jobs["interface"])]
    prologue = list(jobs.get("job-script-prologue") or [])
    scratch = str(jobs.get("local-directory") or "${TMPDIR:-/tmp}")  # expanded on the node
    script = "\n".join(
        [
            *prologue,
            f'exec {shlex.join(worker)} --local-directory "{scratch}" '
            '--name "worker-$SLURM_NODEID-$SLURM_LOCALID"',
        ]
    )
    return [
        "srun", f"--ntasks={count}", f"--nodes={min(nodes, count)}", f"--ntasks-per-node={per_node}",
        *([f"--gres=gpu:{gpus}"] if gpus else []),
        "--overlap", "--mem=0", "--kill-on-bad-exit=0", "--wait=0", "--no-kill", "--mpi=none",
        "bash", "-c", script,
    ]  # fmt: skip


def _gpus_per_node() -> int:
    """GPUs on each node of this allocation, as SLURM says."""
    on_node = os.environ.get("SLURM_GPUS_ON_NODE")
    if on_node and on_node.isdigit():
        return int(on_node)
    ids = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("CUDA_VISIBLE_DEVICES") or ""
    return len([one for one in ids.split(",") if one])


def _certificates(security: Security | None, folder: Path) -> list[str]:
    """Arguments with which a worker authenticates; the files are readable by this user alone."""
    if security is None:
        return []
    arguments = []
    for option, attribute in (
        ("--tls-ca-file", "tls_ca_file"),
        ("--tls-cert", "tls_worker_cert"),
        ("--tls-key", "tls_worker_key"),
    ):
        content = getattr(security, attribute)
        file = folder / option.removeprefix("--tls-")
        file.touch(mode=0o600)
        file.write_text(str(content))
        arguments += [option, str(file.resolve())]
    return arguments

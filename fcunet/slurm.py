"""Site profiles, and what they make of SLURM: the jobs' script, a preflight, the queue.

dask-jobqueue submits the jobs. What it leaves out is here: a wrong key in a profile is named, and `sbatch` is
asked before anything is submitted whether it would take the job. What happens to jobs later is the subject of
`fcunet.watch`.
"""

import difflib
import errno
import getpass
import inspect
import json
import logging
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import dask
import yaml
from distributed.core import Status
from distributed.security import Security

logger = logging.getLogger(__name__)

_NOT_IN_PROFILES = ("self", "scheduler", "name", "base_class_kwargs", "config_name", "security", "protocol")
_SETTINGS = ("distributed", "jobqueue", "fcunet")
# what sbatch complains of: which key of the profile to change, and what shows the possible values
_REFUSALS = {
    "partition name|required partition": ("queue", "sinfo -s"),
    "account": ("account", "sacctmgr show assoc user=$USER format=account%30,partition,qos"),
    "time limit": ("walltime", "sinfo -o '%P %l'"),
    "qos": ("job-extra-directives", "sacctmgr show qos format=name,maxwall"),
    "gres|node configuration|feature|mem": (
        "job-extra-directives, job-cpu or job-mem",
        "sinfo -o '%P %G %c %m %f'",
    ),
}


# what clients say while the controller is away, and what sbatch says of nodes it has not heard of yet since
_AWAY = "unable to contact|timed out|connection refused|connect failure|zero bytes|does not answer"
_UNHEARD = "node configuration is not available"
_PATIENCE_S, _PAUSE_S = 25.0, 1.0  # with a controller that is away as a run starts


class ClusterError(RuntimeError):
    """The cluster cannot do the work; the message says why, as far as SLURM and the job's log know."""


@dataclass(frozen=True)
class ProfileSettings:
    """The ``fcunet:`` block of a profile.

    Attributes
    ----------
    cluster : str
        ``"slurm"``; ``"srun"`` for workers inside the allocation the command runs in; ``"local"`` for a
        profile of the machine itself.
    workers : int
        Worker processes when the command does not say.
    gpus : int
        GPUs per job. 0: the workers compute on the CPU. More than one: as many worker processes share a job,
        each on its own GPU.
    tls : bool
        Encrypt and authenticate between scheduler and workers, with certificates made for this run.
    start_timeout_s : float
        A job that runs for so long and has no worker is taken for broken.
    retries : int
        How many jobs may end before their worker came, while other workers are there.
    dashboard_interface : str
        Network whose address the dashboard listens on; ``"lo"``: this machine only, by way of an ssh tunnel.
    """

    cluster: str = "slurm"
    workers: int = 1
    gpus: int = 1
    tls: bool = True
    start_timeout_s: float = 300.0
    retries: int = 3
    dashboard_interface: str = "lo"


@dataclass(frozen=True)
class Profile:
    """A site profile as read: settings of ours, of the jobs, and of Dask."""

    name: str
    settings: ProfileSettings
    jobs: dict[str, Any] = field(default_factory=dict)
    dask: dict[str, Any] = field(default_factory=dict)


def read_profile(path: str | Path) -> Profile:
    """Read and check a profile.

    Raises
    ------
    FileNotFoundError
        If there is no such file; the profiles beside it are named.
    ValueError
        For a key or value that is not known, by name and with the nearest known one.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("[!.]*.yaml"))
        hint = f"; there are {', '.join(near)}" if near else "; see cluster/profiles for examples"
        raise FileNotFoundError(f"there is no profile {path}{hint}")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as err:
        raise ValueError(f"{path} is not valid YAML: {err}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings; see cluster/profiles for examples")
    _check_keys(content, _SETTINGS, path, "")
    ours = content.get("fcunet") or {}
    _check_keys(ours, [f.name for f in fields(ProfileSettings)], path, "fcunet.")
    for item in fields(ProfileSettings):
        value = ours.get(item.name, item.default)
        kind = type(item.default)
        if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
            raise ValueError(f"fcunet.{item.name} in {path} is {value!r}, needed is {_KINDS[kind]}")
    settings = ProfileSettings(**ours)
    if settings.cluster not in ("slurm", "srun", "local"):
        raise ValueError(f"fcunet.cluster in {path} is {settings.cluster!r}; choose slurm, srun or local")
    jobqueue = content.get("jobqueue") or {}
    _check_keys(jobqueue, ["slurm"], path, "jobqueue.")
    jobs = {str(k).replace("_", "-"): v for k, v in (jobqueue.get("slurm") or {}).items()}
    if settings.cluster != "local":
        _check_keys(jobs, known_job_keys(), path, "jobqueue.slurm.")
        missing = [k for k in ("cores", "memory") if jobs.get(k) is None]
        if missing:
            raise ValueError(
                f"{path} lacks {' and '.join(missing)} below jobqueue.slurm; "
                "give for example cores: 4, memory: 32GiB"
            )
    return Profile(path.name, settings, jobs, dict(_dotted("distributed", content.get("distributed") or {})))


def _dotted(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Nested settings as Dask's ``a.b.c``: setting a whole section would wipe the rest of it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _dotted(f"{name}.{key}", inner)
    else:
        yield name, value


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def known_job_keys() -> list[str]:
    """Keys a profile may have below ``jobqueue.slurm``: those of dask-jobqueue itself."""
    from_package = import_jobqueue().slurm.SLURMJob
    arguments = {
        name
        for kind in from_package.__mro__[:2]
        for name in inspect.signature(vars(kind)["__init__"]).parameters
        if name not in _NOT_IN_PROFILES
    }
    return sorted(set(dask.config.get("jobqueue.slurm")) | {a.replace("_", "-") for a in arguments})


def import_jobqueue() -> Any:
    """`dask_jobqueue`, without what importing it does: a file in the user's configuration, Ctrl-C its own.

    It would answer Ctrl-C with ``sys.exit()``, and nothing would be drained.
    """
    before, on_interrupt = dask.config.PATH, signal.getsignal(signal.SIGINT)
    with tempfile.TemporaryDirectory() as elsewhere:
        dask.config.PATH = elsewhere
        try:
            import dask_jobqueue
        finally:
            dask.config.PATH = before
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, on_interrupt)
    return dask_jobqueue


def build_cluster(
    profile: Profile, *, dashboard_address: str = "127.0.0.1:0", log_directory: str | Path | None = None
) -> Any:
    """The `SLURMCluster` of a profile; its scheduler runs in this process, no job is submitted yet."""
    jobqueue = import_jobqueue()
    arguments = {key.replace("-", "_"): value for key, value in profile.jobs.items()}
    gpus = profile.settings.gpus
    arguments.setdefault("processes", max(1, gpus))
    arguments.setdefault("log_directory", str(Path(log_directory or "fcunet-jobs").resolve()))
    arguments.setdefault("death_timeout", 300)
    if arguments.get("job_mem"):  # SLURM writes GiB as G
        arguments["job_mem"] = str(arguments["job_mem"]).removesuffix("iB")
    # pages and metrics of a worker: on its own node only, unless the profile says otherwise
    extra = list(arguments.get("worker_extra_args") or [])
    if not any("dashboard" in str(argument) for argument in extra):
        extra += ["--dashboard-address", "127.0.0.1:0"]
    arguments["worker_extra_args"] = extra
    arguments["scheduler_options"] = {"dashboard_address": dashboard_address} | (
        arguments.get("scheduler_options") or {}
    )
    if profile.settings.tls:
        arguments["security"] = Security.temporary()
        # the workers read their certificates there; the files are readable by this user alone
        arguments.setdefault("shared_temp_directory", arguments["log_directory"])
        keys = Path(arguments["shared_temp_directory"])
        keys.mkdir(parents=True, exist_ok=True)
        if "log_directory" not in profile.jobs and log_directory:  # a folder of this run alone
            for left in keys.glob(".dask-jobqueue.worker.*"):  # by a driver that was killed
                left.unlink(missing_ok=True)
    arguments.setdefault("job_extra_directives", [f"--gres=gpu:{gpus}"] if gpus else [])
    if "--no-requeue" not in arguments["job_extra_directives"]:  # lost jobs are submitted anew from here
        arguments["job_extra_directives"] = [*arguments["job_extra_directives"], "--no-requeue"]
    try:
        return jobqueue.SLURMCluster(job_cls=_job_class(jobqueue), **arguments)
    except (ValueError, RuntimeError) as err:
        raise ValueError(f"profile {profile.name}: {_first_cause(err)}") from err


def _job_class(jobqueue: Any) -> type:
    """The job of dask-jobqueue, with a memory of why it could not be submitted.

    Left to itself, dask-jobqueue logs a traceback, waits for ever for the worker of a job that is none,
    and cannot be closed. `fcunet.watch` submits such a job again, or ends the run with the reason.
    """

    class Job(jobqueue.slurm.SLURMJob):  # type: ignore[misc,name-defined]
        refusal, refused_at = "", 0.0

        async def start(self) -> None:
            try:
                await super().start()
            except (RuntimeError, ValueError) as err:
                said = str(err).rpartition("stderr:")[2].strip() or str(err)
                self.refusal, self.refused_at = said, time.monotonic()
                self.status = Status.running  # as far as dask-jobqueue is concerned

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed

    return Job


def close_with_keys(cluster: Any) -> None:
    """Close a cluster, and remove its keys on disk, which would last as long as the object."""
    cluster.close()
    for name, value in vars(cluster).items():
        if name.startswith("_job_") and hasattr(value, "close"):
            value.close()


def _first_cause(err: BaseException) -> str:
    """Dask wraps what went wrong (a port that is taken, say) in an error that does not say it."""
    chain = [err]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    taken = next((e for e in chain if isinstance(e, OSError) and e.errno == errno.EADDRINUSE), None)
    err = taken or chain[-1]
    if taken:
        return f"{err}; choose another port below scheduler-options, or none: any free one is taken then"
    return str(err)


def preflight(job_script: str) -> None:
    """Ask SLURM whether it would take this job, without submitting it.

    A controller that is away, or has just come back and not heard of its nodes yet, is given half a minute.

    Raises
    ------
    ClusterError
        With the answer of ``sbatch``: partition, account, walltime or resources that do not exist here.
    """
    if shutil.which("sbatch") is None:
        raise ClusterError(
            "there is no sbatch here; run this on a login node of the cluster, or use --cluster local"
        )
    end = time.monotonic() + _PATIENCE_S
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(job_script)
        file.flush()
        while refusal := _refusal(file.name, end - time.monotonic()):
            if not may_pass(refusal) or time.monotonic() + _PAUSE_S > end:
                break
            logger.warning("SLURM is not ready (%s); trying again", refusal)
            time.sleep(_PAUSE_S)
    if re.search(_AWAY, refusal, re.IGNORECASE):
        raise ClusterError(f"the SLURM controller does not answer ({refusal}); is it up? Try: sinfo")
    if refusal:
        directives = "\n".join(line for line in job_script.splitlines() if line.startswith("#SBATCH"))
        raise ClusterError(
            f"SLURM would refuse the jobs of this profile: {refusal}{advice(refusal)}\n{directives}"
        )


def _refusal(script: str, patience_s: float) -> str:
    """What sbatch has against a job script; empty when it would take it."""
    try:
        answer = ask_slurm("sbatch", "--test-only", script, timeout=max(patience_s, 1.0))
    except subprocess.CalledProcessError as err:
        return str(err.stderr).strip()
    except subprocess.TimeoutExpired:
        return "sbatch does not answer"
    logger.info("preflight: %s", answer.strip())
    return ""


def may_pass(refusal: str) -> bool:
    """Whether a refusal is of the moment: no controller, or one that has just come back without its nodes."""
    if re.search(_AWAY, refusal, re.IGNORECASE):
        return True
    if not re.search(_UNHEARD, refusal, re.IGNORECASE):
        return False
    try:
        return "unk" in ask_slurm("sinfo", "--noheader", "--format", "%T", timeout=5)
    except subprocess.SubprocessError:
        return True


def advice(refusal: str) -> str:
    """Which key of the profile to change, and the command that shows what it may be."""
    for words, (key, command) in _REFUSALS.items():
        if re.search(words, refusal, re.IGNORECASE):
            return f"\nChange {key} in the profile; what is possible: {command}"
    return ""


def queue_states() -> dict[str, tuple[str, str]]:
    """State and reason of each of our jobs that SLURM still knows as queued or running, by job id."""
    answer = ask_slurm("squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i|%T|%r")
    rows = (line.split("|", 2) for line in answer.splitlines() if line.count("|") == 2)
    return {job_id: (state, reason) for job_id, state, reason in rows}


def ask_slurm(*command: str, timeout: float = 20) -> str:
    """Output of a SLURM command; they block for minutes when the controller is gone, so not for long."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout).stdout


def _check_keys(found: Any, known: Any, path: Path, prefix: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(
            f"{prefix.rstrip('.') or 'the profile'} in {path} is {json.dumps(found)}, not keys and values"
        )
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"unknown key {prefix}{key} in {path}{hint}")

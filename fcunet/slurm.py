"""SLURM behind a Dask client: site profiles, a preflight, and a watch over jobs that die in silence.

dask-jobqueue submits the jobs. What it leaves out is here: a wrong key in a profile is named, `sbatch` is
asked before anything is submitted whether it would take the job, and jobs that end before their worker has
registered (a broken environment, a wrong interface) end the run with the tail of their log instead of a wait
without end.
"""

import difflib
import getpass
import inspect
import json
import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import dask
import yaml
from distributed import Client
from distributed.security import Security

logger = logging.getLogger(__name__)

_ASK_EVERY_S = 3.0
_GRACE_S = 5.0  # between the end of a job and the news of it
_NOT_IN_PROFILES = ("self", "scheduler", "name", "base_class_kwargs", "config_name", "security", "protocol")
_SETTINGS = ("distributed", "jobqueue", "fcunet")


class ClusterError(RuntimeError):
    """The cluster cannot do the work; the message says why, as far as SLURM and the job's log know."""


@dataclass(frozen=True)
class ProfileSettings:
    """The ``fcunet:`` block of a profile.

    Attributes
    ----------
    cluster : str
        ``"slurm"``, or ``"local"`` for a profile of the machine itself.
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
    """

    cluster: str = "slurm"
    workers: int = 1
    gpus: int = 1
    tls: bool = True
    start_timeout_s: float = 300.0
    retries: int = 3


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
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
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
    if settings.cluster not in ("slurm", "local"):
        raise ValueError(f"fcunet.cluster in {path} is {settings.cluster!r}; choose slurm or local")
    jobqueue = content.get("jobqueue") or {}
    _check_keys(jobqueue, ["slurm"], path, "jobqueue.")
    jobs = {str(k).replace("_", "-"): v for k, v in (jobqueue.get("slurm") or {}).items()}
    if settings.cluster == "slurm":
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
        if name
        not in ("self", "scheduler", "name", "base_class_kwargs", "config_name", "security", "protocol")
    }
    return sorted(set(dask.config.get("jobqueue.slurm")) | {a.replace("_", "-") for a in arguments})


def import_jobqueue() -> Any:
    """`dask_jobqueue`, without the file it would leave in the user's Dask configuration."""
    before = dask.config.PATH
    with tempfile.TemporaryDirectory() as elsewhere:
        dask.config.PATH = elsewhere
        try:
            import dask_jobqueue
        finally:
            dask.config.PATH = before
    return dask_jobqueue


@contextmanager
def slurm_client(
    profile: Profile, workers: int | None, *, dashboard_address: str, log_directory: str | Path | None = None
) -> Iterator[Client]:
    """A client whose workers are SLURM jobs, for the duration of a ``with`` block; the jobs end with it.

    Parameters
    ----------
    profile : Profile
    workers : int, optional
        Worker processes; default is what the profile says.
    dashboard_address : str
        HOST:PORT.
    log_directory : path, optional
        Where the jobs' logs go unless the profile says; every node must see it.

    Raises
    ------
    ClusterError
        If SLURM refuses such a job, or there is no SLURM here.
    """
    cluster = build_cluster(profile, dashboard_address=dashboard_address, log_directory=log_directory)
    try:
        preflight(cluster.job_script())
        wanted = workers or profile.settings.workers
        per_job = max(1, profile.settings.gpus)
        jobs = -(-wanted // per_job)
        # adapt, not scale: only adapt replaces a job that is lost later on
        cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)
        _WATCHES[id(cluster)] = JobWatch(cluster, profile.settings)
        with Client(cluster) as client:
            yield client
    finally:
        _WATCHES.pop(id(cluster), None)
        cluster.close()


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
    arguments["scheduler_options"] = {"dashboard_address": dashboard_address} | (
        arguments.get("scheduler_options") or {}
    )
    if profile.settings.tls:
        arguments["security"] = Security.temporary()
        # the workers read their certificates there; the files are readable by this user alone
        arguments.setdefault("shared_temp_directory", arguments["log_directory"])
        Path(arguments["shared_temp_directory"]).mkdir(parents=True, exist_ok=True)
    arguments.setdefault("job_extra_directives", [f"--gres=gpu:{gpus}"] if gpus else [])
    if "--no-requeue" not in arguments["job_extra_directives"]:  # lost jobs are submitted anew from here
        arguments["job_extra_directives"] = [*arguments["job_extra_directives"], "--no-requeue"]
    try:
        return jobqueue.SLURMCluster(**arguments)
    except (ValueError, RuntimeError) as err:
        raise ValueError(f"profile {profile.name}: {err}") from err


def preflight(job_script: str) -> None:
    """Ask SLURM whether it would take this job, without submitting it.

    Raises
    ------
    ClusterError
        With the answer of ``sbatch``: partition, account, walltime or resources that do not exist here.
    """
    if shutil.which("sbatch") is None:
        raise ClusterError(
            "there is no sbatch here; run this on a login node of the cluster, or use --cluster local"
        )
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(job_script)
        file.flush()
        try:
            answer = _ask("sbatch", "--test-only", file.name)
        except subprocess.CalledProcessError as err:
            directives = "\n".join(line for line in job_script.splitlines() if line.startswith("#SBATCH"))
            raise ClusterError(
                f"SLURM would refuse the jobs of this profile: {err.stderr.strip()}\n{directives}"
            ) from None
    logger.info("preflight: %s", answer.strip())


class JobWatch:
    """Compares our jobs in the queue with the workers that have registered.

    Parameters
    ----------
    cluster : SLURMCluster
    settings : ProfileSettings
    """

    def __init__(self, cluster: Any, settings: ProfileSettings) -> None:
        self.cluster, self.settings = cluster, settings
        self._asked = 0.0
        self._first_seen: dict[str, float] = {}
        self._running_since: dict[str, float] = {}
        self._registered: set[str] = set()
        self._note, self._deaths = "", 0

    def look(self, workers: int) -> str:
        """What the run is waiting for, in a few words; empty when all is well.

        Raises
        ------
        ClusterError
            When jobs end or hang before their workers register, and no worker is left.
        """
        now = time.monotonic()
        if now - self._asked < _ASK_EVERY_S:
            return self._note
        self._asked = now
        jobs = {
            job.job_id: name for name, job in self.cluster.workers.items() if getattr(job, "job_id", None)
        }
        names = {str(worker.name) for worker in list(self.cluster.scheduler.workers.values())}
        try:
            states = queue_states()
        except (OSError, subprocess.SubprocessError) as err:  # the controller may be restarting
            logger.warning("squeue does not answer: %s", err)
            self._note = "squeue does not answer"
            return self._note
        pending: list[str] = []
        for job_id, name in jobs.items():
            self._first_seen.setdefault(job_id, now)
            if any(n == str(name) or n.startswith(f"{name}-") for n in names):
                self._registered.add(job_id)
            if job_id in self._registered:
                continue
            state, reason = states.get(job_id, ("GONE", ""))
            if state in ("PENDING", "CONFIGURING"):
                pending.append(reason)
            elif state == "RUNNING":
                waited = now - self._running_since.setdefault(job_id, now)
                if waited > self.settings.start_timeout_s:
                    self._dead(
                        job_id, name, f"runs for {waited:.0f} s, but its worker has not connected", workers
                    )
            elif now - self._first_seen[job_id] > _GRACE_S:
                self._dead(job_id, name, "ended before its worker had connected", workers)
        waiting = (
            f"{len(pending)} jobs wait in the queue ({', '.join(sorted(set(pending)))})" if pending else ""
        )
        self._note = waiting or ("" if workers else "jobs are starting")
        return self._note

    def _dead(self, job_id: str, name: Any, what: str, workers: int) -> None:
        """Submit the job anew while there is hope, else give up."""
        self._deaths += 1
        tail = log_tail(self.cluster, job_id)
        message = f"job {job_id} {what}. {job_facts(job_id)}{tail}"
        if not workers or self._deaths > self.settings.retries:
            raise ClusterError(
                message + "\nCheck job-script-prologue, python and interface in the profile (fcunet doctor)."
            )
        logger.warning("%s; it is submitted anew", message)
        # dask-jobqueue waits for ever for such a worker; without the dead job it will start another
        self.cluster.workers.pop(name, None)
        self.cluster.loop.add_callback(self.cluster._correct_state)


_WATCHES: dict[int, JobWatch] = {}


def watch_of(client: Client) -> JobWatch | None:
    """The watch over the jobs behind `client`, if there are any."""
    return _WATCHES.get(id(client.cluster))


def queue_states() -> dict[str, tuple[str, str]]:
    """State and reason of each of our jobs that SLURM still knows as queued or running, by job id."""
    answer = _ask("squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i|%T|%r")
    rows = (line.split("|", 2) for line in answer.splitlines() if line.count("|") == 2)
    return {job_id: (state, reason) for job_id, state, reason in rows}


def job_facts(job_id: str) -> str:
    """State, exit code and node of a job as SLURM remembers it; empty where it does not."""
    try:
        answer = _ask("scontrol", "--oneliner", "show", "job", job_id)
    except (OSError, subprocess.SubprocessError):
        return ""
    facts = dict(item.partition("=")[::2] for item in answer.split())
    kept = {k: facts[k] for k in ("JobState", "Reason", "ExitCode", "NodeList") if facts.get(k)}
    return "SLURM says " + ", ".join(f"{k}={v}" for k, v in kept.items()) + "."


def log_tail(cluster: Any, job_id: str, lines: int = 15) -> str:
    """The last lines of what a job wrote."""
    folder = cluster._dummy_job.log_directory
    texts = []
    for file in sorted(Path(folder).glob(f"*-{job_id}.*")) if folder else []:
        text = file.read_text(errors="replace").strip()
        if text:
            texts.append(f"\n{file}:\n" + "\n".join(text.splitlines()[-lines:]))
    return "".join(texts)


def _ask(*command: str) -> str:
    """Output of a SLURM command; they block for minutes when the controller is gone, so not for long."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


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

"""Watching the jobs of a run: what it waits for, and why jobs end before their worker has registered.

dask-jobqueue waits for ever for the worker of a job that died in silence (a broken environment, a wrong
interface) or that SLURM will never start. `JobWatch` compares the queue with the workers, and ends the run
with the reason and the tail of the job's log.
"""

import logging
import queue
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from .slurm import ClusterError, ProfileSettings, advice, ask_slurm, may_pass, queue_states

logger = logging.getLogger(__name__)

_ASK_EVERY_S, _ANSWER_S = 3.0, 0.2
_GRACE_S = 5.0  # between the end of a job and the news of it
_SUBMIT_AGAIN_S = 4.0
_REFUSED_S = 15.0  # so long nothing but refusals, and the run ends
# reasons with which a job waits for ever, as sites without EnforcePartLimits accept it: what to change
_NEVER = {
    "PartitionTimeLimit": "walltime",
    "PartitionNodeLimit": "job-extra-directives",
    "AccountNotAllowed": "account",
    "InvalidAccount": "account",
    "InvalidQOS": "job-extra-directives",
    "BadConstraints": "job-extra-directives",
    "DependencyNeverSatisfied": "job-extra-directives",
    "JobHeldUser": "job-extra-directives",
    "JobHeldAdmin": "account",
    "QOSMaxWallDurationPerJobLimit": "walltime",
    "AssocMaxWallDurationPerJobLimit": "walltime",
}
# states of jobs whose end says nothing about the environment
_ENDED_BY_OTHERS = ("CANCELLED", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED")


class JobWatch:
    """Compares our jobs in the queue with the workers that have registered.

    Parameters
    ----------
    cluster : SLURMCluster
    settings : ProfileSettings
    """

    def __init__(self, cluster: Any, settings: ProfileSettings) -> None:
        self.cluster, self.settings = cluster, settings
        self._asked, self._asking = 0.0, False
        self._answers: queue.SimpleQueue[dict[str, tuple[str, str]] | Exception] = queue.SimpleQueue()
        self._first_seen: dict[str, float] = {}
        self._running_since: dict[str, float] = {}
        self._registered: set[str] = set()
        self._note, self._deaths = "", 0
        self._progress, self._lost, self._started = 0, 0, False
        self._refused_since: float | None = None
        self._refusals: set[str] = set()  # that were logged

    def look(self, workers: int, progress: int = 0) -> str:
        """What the run is waiting for, in a few words; empty when all is well.

        `progress` counts what has been done: jobs may end at any time, but not one after the other without
        having done anything.

        Raises
        ------
        ClusterError
            When jobs are refused, end or hang before their workers register, or will never start, and no
            worker is left; and when jobs come and go, and nothing is done.
        """
        if progress != self._progress:
            self._progress, self._lost = progress, 0
        now = time.monotonic()
        if not self._asking:
            if now - self._asked < _ASK_EVERY_S:
                return self._note
            self._asked, self._asking = now, True
            threading.Thread(target=self._ask, name="fcunet-squeue", daemon=True).start()
        try:
            states = self._answers.get(timeout=_ANSWER_S)
        except queue.Empty:  # without a controller squeue takes its time, and the work must go on meanwhile
            return self._note
        self._asking = False
        if isinstance(states, Exception):  # the controller may be restarting
            logger.warning("squeue does not answer: %s", states)
            self._note = "squeue does not answer"
            return self._note
        jobs = {
            job.job_id: name for name, job in self.cluster.workers.items() if getattr(job, "job_id", None)
        }
        names = {str(worker.name) for worker in list(self.cluster.scheduler.workers.values())}
        self._count_lost(set(jobs), states)
        pending: list[str] = []
        for job_id, name in jobs.items():
            self._first_seen.setdefault(job_id, now)
            if any(n == str(name) or n.startswith(f"{name}-") for n in names):
                self._registered.add(job_id)
                self._deaths, self._started = 0, True  # so jobs can start here; one that did not had bad luck
            if job_id in self._registered:
                continue
            state, reason = states.get(job_id, ("GONE", ""))
            if state in ("PENDING", "CONFIGURING"):
                pending.append(reason)
                if reason in _NEVER and not workers:
                    raise ClusterError(
                        f"job {job_id} will never start: SLURM says {reason}. "
                        f"Change {_NEVER[reason]} in the profile"
                    )
            elif state == "RUNNING":
                waited = now - self._running_since.setdefault(job_id, now)
                if waited > self.settings.start_timeout_s:
                    self._dead(
                        job_id, name, f"runs for {waited:.0f} s, but its worker has not connected", workers
                    )
            elif now - self._first_seen[job_id] > _GRACE_S:
                self._dead(job_id, name, "ended before its worker had connected", workers)
        refused = self._submit_again(now, bool(jobs))
        waiting = f"{_plural(len(pending), 'job')} in the queue ({', '.join(sorted(set(pending)))})"
        self._note = refused or (waiting if pending else ("" if workers else "jobs are starting"))
        return self._note

    def _ask(self) -> None:
        try:
            self._answers.put(queue_states())
        except (OSError, subprocess.SubprocessError) as err:
            self._answers.put(err)

    def _submit_again(self, now: float, some: bool) -> str:
        """Try once more with jobs that sbatch refused (a limit of the account, no controller); says so.

        With `some` other jobs queued or running the work goes on, else not for long.
        """
        refused = {name: job for name, job in self.cluster.workers.items() if getattr(job, "refusal", "")}
        if some:
            self._refused_since = None
        if not refused:
            return ""
        refusal = max(refused.values(), key=lambda job: job.refused_at).refusal
        if refusal not in self._refusals:
            self._refusals.add(refusal)
            logger.warning("sbatch refused a job: %s", refusal)
        if self._refused_since is None:
            self._refused_since = now
        limit = self.settings.start_timeout_s if may_pass(refusal) else _REFUSED_S
        if now - self._refused_since > limit:
            raise ClusterError(f"SLURM refuses all jobs of this run: {refusal}{advice(refusal)}")
        for name, job in refused.items():
            if time.monotonic() - job.refused_at > _SUBMIT_AGAIN_S:
                self._replace(name)
        return f"SLURM refused {len(refused)} job{'s' * (len(refused) > 1)} ({refusal.splitlines()[-1]})"

    def _replace(self, name: Any) -> None:
        """Have dask-jobqueue start another job; it does so for what is missing from its list."""
        self.cluster.workers.pop(name, None)
        self.cluster.loop.add_callback(self.cluster._correct_state)

    def _count_lost(self, wanted: set[str], states: dict[str, tuple[str, str]]) -> None:
        """Jobs whose workers came and went; too many in a row, and something is wrong with all of them."""
        lost = sorted(self._registered - wanted - set(states))
        self._registered -= set(lost)
        self._lost += len(lost)
        # a block that takes all memory may end as many jobs as Dask lets it, before it is given up
        bearable = self.settings.retries + self.cluster.scheduler.allowed_failures + len(wanted)
        if lost and self._lost > bearable:
            tail = log_tail(self.cluster._dummy_job.log_directory, f"*-{lost[-1]}.*")
            raise ClusterError(
                f"{self._lost} jobs in a row ended without having finished a block, the last with job "
                f"{lost[-1]}. {job_facts(lost[-1])}{tail}\nA walltime shorter than one block takes, memory, "
                "or an environment in which fcunet does not work (fcunet doctor --cluster PROFILE)."
            )

    def _dead(self, job_id: str, name: Any, what: str, workers: int) -> None:
        """Submit the job anew while there is hope, else give up."""
        self._deaths += 1
        tail = log_tail(self.cluster._dummy_job.log_directory, f"*-{job_id}.*")
        facts = job_facts(job_id)
        message = f"job {job_id} {what}. {facts}{tail}"
        innocent = any(f"JobState={state}" in facts for state in _ENDED_BY_OTHERS)
        if (not workers and not self._started and not innocent) or self._deaths > self.settings.retries:
            raise ClusterError(
                message + "\nCheck job-script-prologue, python and interface in the profile "
                "(fcunet doctor --cluster PROFILE tries one job)."
            )
        logger.warning("%s; it is submitted anew", message)
        self._replace(name)  # dask-jobqueue would wait for ever for such a worker


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun} waits" if n == 1 else f"{n} {noun}s wait"


def job_facts(job_id: str) -> str:
    """State, exit code and node of a job as SLURM remembers it; empty where it does not."""
    try:
        answer = ask_slurm("scontrol", "--oneliner", "show", "job", job_id)
    except (OSError, subprocess.SubprocessError):
        return ""
    facts = dict(item.partition("=")[::2] for item in answer.split())
    kept = {k: facts[k] for k in ("JobState", "Reason", "ExitCode", "NodeList") if facts.get(k)}
    return "SLURM says " + ", ".join(f"{k}={v}" for k, v in kept.items()) + "."


def log_tail(folder: str | Path | None, pattern: str, lines: int = 15) -> str:
    """The last lines of the log files in `folder` that match `pattern`, each below its name."""
    texts = []
    for file in sorted(Path(folder).glob(pattern)) if folder else []:
        text = file.read_text(errors="replace").strip()
        if text:
            texts.append(f"\n{file}:\n" + "\n".join(text.splitlines()[-lines:]))
    return "".join(texts)

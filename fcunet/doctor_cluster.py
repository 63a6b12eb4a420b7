"""``fcunet doctor --cluster PROFILE``: would a run get its workers there? Ends with one real job."""

import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import __version__
from .checks import Check, guarded

_MUST_AGREE = ("fcunet", "python", "dask", "distributed", "numpy", "zarr", "torch")
_LONGEST_WAIT_S = 3600.0  # in the queue


def examine_cluster(
    cluster: str, *, folder: str | Path = ".", say: Callable[[str], None] = lambda text: None
) -> Iterator[Check]:
    """Check a profile, or a scheduler's address, from the settings to one job; stops where it must.

    Parameters
    ----------
    cluster : str
        As for :func:`fcunet.cluster.connect`.
    folder : path
        Where a file goes there and back, and is taken away again; every node must see it.
    say : callable
        Told what is waited for.

    Yields
    ------
    Check
        One finding each, as soon as it is there.
    """
    if Path(cluster).suffix in (".yaml", ".yml"):
        yield (found := guarded("profile", lambda: _profile(cluster)))
        if not found.ok:
            return
        for name, check in (("slurm", _partitions), ("network", lambda: _network(cluster))):
            yield guarded(name, check)
        yield (found := guarded("preflight", lambda: _preflight(cluster, folder)))
        if not found.ok:
            return
    yield from _round_trip(cluster, Path(folder).resolve(), say)


def _profile(path: str) -> Check:
    from .slurm import read_profile

    found = read_profile(path)
    jobs = ", ".join(
        f"{key} {found.jobs[key]}" for key in ("queue", "account", "walltime") if found.jobs.get(key)
    )
    return Check("profile", True, f"{found.name}: {jobs}; {found.settings.gpus} GPUs per job")


def _partitions() -> Check:
    from .slurm import ask_slurm

    advice = "run this on a login node of the cluster"
    if shutil.which("sinfo") is None:
        return Check("slurm", False, "there is no sinfo here", advice)
    words = ask_slurm("sinfo", "--version").strip()
    rows = ask_slurm("sinfo", "--noheader", "--format", "%P|%l|%D|%G|%a").splitlines()
    listed = [
        f"{name.rstrip('*')} ({limit}, {nodes} nodes{'' if gres == '(null)' else ', ' + gres})"
        for name, limit, nodes, gres, state in (row.split("|") for row in rows if row.count("|") == 4)
        if state == "up"
    ]
    return Check("slurm", bool(listed), f"{words}: {', '.join(listed)}", "no partition is up; ask your site")


def _network(profile: str) -> Check:
    import psutil

    from .slurm import read_profile

    chosen = read_profile(profile).jobs.get("interface")
    here = {
        name: next(a.address for a in addresses if a.family == socket.AF_INET)
        for name, addresses in psutil.net_if_addrs().items()
        if any(a.family == socket.AF_INET for a in addresses)
    }
    listed = ", ".join(f"{name} {address}" for name, address in here.items())
    return Check(
        "network",
        chosen is None or chosen in here,
        f"interface: {chosen or 'not set: that of the default route'}; here are {listed}",
        "set interface in the profile to the network that this machine and the compute nodes share",
    )


def _preflight(profile: str, log_directory: str | Path) -> Check:
    from .cluster import job_script
    from .slurm import preflight

    preflight(job_script(profile, log_directory))
    return Check("preflight", True, "SLURM would take such a job")


def _round_trip(cluster: str, folder: Path, say: Callable[[str], None]) -> Iterator[Check]:
    """One job: its worker answers, agrees with this machine, and passes a file both ways."""
    from .cluster import connect, report_health

    began = time.monotonic()
    token = f"{socket.gethostname()} {os.getpid()} {began}"
    try:
        with (
            tempfile.TemporaryDirectory(
                prefix="fcunet-doctor-", dir=folder, ignore_cleanup_errors=True
            ) as shared,
            connect(
                cluster, 1, dashboard_address="127.0.0.1:0", log_directory=Path(shared, "jobs")
            ) as client,
        ):
            Path(shared, "question").write_text(token)
            told = ""
            while not client.nthreads():
                note = report_health(client, 0)
                if note != told:
                    say(note)
                told = note
                if time.monotonic() - began > _LONGEST_WAIT_S:
                    raise TimeoutError(f"no worker after {_LONGEST_WAIT_S:.0f} s: {note}")
                time.sleep(0.25)
            waited = time.monotonic() - began
            answer = client.submit(look_around, shared, pure=False).result(timeout=300)
            back = Path(shared, "answer")
            passed = answer["question"] == token and back.exists() and back.read_text() == token
    except Exception as err:  # whatever it is, it is the finding
        yield Check("job", False, f"{type(err).__name__}: {err}", "see the message; nothing was left running")
        return
    yield Check("job", True, f"a worker on {answer['node']} answered after {waited:.0f} s")
    yield _compare(answer["versions"])
    yield _gpu(cluster, answer)
    free = answer["scratch_gib"]
    yield Check(
        "node scratch", free >= 2, f"{answer['scratch']}: {free:.0f} GiB free",
        "set local-directory in the profile to a larger disk of the node",
    )  # fmt: skip
    yield Check(
        "shared disk", passed, f"{folder}: " + ("a file went there and back" if passed
        else "what is written here is not seen by the node"),
        "put scans and run directories on a file system that the compute nodes mount",
    )  # fmt: skip


def _compare(there: dict[str, str]) -> Check:
    here = versions()
    other = [f"{n} {here[n]} here, {there[n]} there" for n in _MUST_AGREE if here[n] != there[n]]
    text = (
        "; ".join(other)
        if other
        else f"fcunet {here['fcunet']}, Python {here['python']}: the same here and there"
    )
    return Check(
        "node versions", not other, text, "make the job use this environment: python, job-script-prologue"
    )


def _gpu(cluster: str, answer: dict[str, Any]) -> Check:
    from .slurm import read_profile

    wanted = Path(cluster).suffix in (".yaml", ".yml") and read_profile(cluster).settings.gpus > 0
    visible = f"CUDA_VISIBLE_DEVICES={answer['visible']}"
    if answer["gpu"]:
        return Check("node GPU", True, f"{answer['gpu']} ({visible})")
    return Check(
        "node GPU", not wanted, f"torch sees none ({visible})",
        "see job-extra-directives (how this site wants GPUs asked for), and that torch is built for CUDA; "
        "to compute on the CPU: fcunet: {gpus: 0} in the profile",
    )  # fmt: skip


def versions() -> dict[str, str]:
    """Of the packages that must agree between driver and workers; "missing" where one is not there."""
    found = {"fcunet": __version__, "python": platform.python_version()}
    for package in _MUST_AGREE[2:]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def look_around(shared: str) -> dict[str, Any]:
    """What a worker sees; runs there."""
    import torch
    from distributed import get_worker

    question = Path(shared, "question")
    text = question.read_text() if question.exists() else ""
    if text:
        Path(shared, "answer").write_text(text)
    scratch = get_worker().local_directory
    return {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "versions": versions(),
        "question": text,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "",
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES", "not set"),
        "scratch": scratch,
        "scratch_gib": shutil.disk_usage(scratch).free / 2**30,
    }

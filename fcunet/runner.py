"""A run: from a datacube to peaks, strain and report, in one directory, resumable at any moment.

::

    RUN/peaks.zarr     Bragg peaks of every position, written block by block by the workers, with a done mask
    RUN/strain.zarr    the results, an xarray.DataTree
    RUN/report.html    all figures in one file; strain.png and others beside it
    RUN/dask-report.html  what the workers did when, by Dask; RUN/jobs/ the logs of batch jobs
    RUN/config.yaml    the settings     RUN/run.log  what happened     RUN/summary.json  speed, memory,
    failures

The state of a run is the done mask alone, and a block is marked after its data. So the same command continues
a run that was killed at any moment, and ends with the same bytes.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from distributed import Client

from . import __version__, schema
from .calibration import Calibration
from .cluster import connect, job_script, report_health
from .config import Config, SecondConfig
from .dashboard import RunPageFeed, page_link
from .lock import RunLock
from .memory import peak_rss
from .preparation import PEAKS, PlannedRun, describe_run, plan_run, prepare, remove_partial, run_id_of
from .progress import Progress, duration
from .remote import Remote, local
from .results import analyse
from .second import FOLDER as SECOND
from .session import Speaker, dask_report, draining, log_to, ways_to_dashboard, write_text
from .slurm import read_profile
from .store import RUNS_ARE_HERE, open_results, read_status
from .thumbnails import ProvisionalBasis, find_provisional_basis, stored_thumbnails
from .tiles import (
    Block,
    TileJob,
    create_patterns,
    finish_patterns,
    full_disk_is_named,
    load_calibration,
    origin_of_block,
    reopen_patterns,
    run_tiles,
)

logger = logging.getLogger(__name__)

RESULTS, LOG, SUMMARY, CONFIG = "strain.zarr", "run.log", "summary.json", "config.yaml"
DASK_REPORT = "dask-report.html"
_PAGE_EVERY_S = 1.0
_CATCH_UP = 400  # blocks whose pictures the driver draws itself


class RunStopped(RuntimeError):
    """The run was asked to stop, and did; everything finished so far is in place."""


def run(
    config: Config, *, restart: bool = False, client: Client | None = None, progress: bool = True
) -> xr.DataTree:
    """Find the peaks of a whole scan, map its strain and write the report; continues what was begun.

    Parameters
    ----------
    config : Config
        ``config.store`` is the datacube, ``config.out`` the run directory (default ``runs/NAME``).
    restart : bool
        Forget what an earlier run left in the run directory.
    client : distributed.Client, optional
        Compute here; default is what ``config.cluster`` says.
    progress : bool
        Print what is going on.

    Returns
    -------
    xarray.DataTree
        The results, opened lazily from ``RUN/strain.zarr``. ``attrs["n_blocks_failed"]`` counts blocks of the
        scan that could not be read or processed; they are NaN, and named in ``RUN/summary.json``.

    Raises
    ------
    ValueError
        For settings or a store that do not fit, and if the run directory holds a run with other settings.
    RunLockedError
        If another process runs in the same directory.
    RunStopped
        After Ctrl-C or SIGTERM, when the blocks in flight are done; the message says how to go on.
    """
    plan = plan_run(config)
    say = Speaker(progress)
    with full_disk_is_named(plan.out), RunLock(plan.out), log_to(plan.out / LOG):
        begin = time.perf_counter()
        logger.info("fcunet %s, run in %s", __version__, plan.out)
        if restart:
            _forget(plan.out)
        calibration = prepare(plan)
        for line in describe_run(plan):
            say(line)
        for line in calibration.describe():
            say(f"  measured  {line}")
        for warning in calibration.warnings:
            say(f"  note      {warning}")
        write_text(plan.out / CONFIG, config.to_yaml())
        with _shared(plan, client) as connected:
            facts = _find_all_peaks(plan, connected, say, progress)
            _find_second_opinion(plan, calibration, connected, say, progress)
        peaks_end = time.perf_counter()
        tree = analyse(plan.out, config, say, device=facts.get("device"))
        plan.seconds["analyse"] = time.perf_counter() - peaks_end
        _write_summary(plan, facts)  # the report reads it
        report_start = time.perf_counter()
        report = _write_report(plan.out)
        plan.seconds["report"] = time.perf_counter() - report_start
        plan.seconds["total"] = time.perf_counter() - begin
        _write_summary(plan, facts)
        say(f"  wrote     {report}   ({duration(plan.seconds['total'])})")
        return tree


def _find_second_opinion(
    plan: PlannedRun, calibration: Calibration, client: Client | None, say: "Speaker", progress: bool
) -> None:
    """The peaks of another method, if one is asked for: a run of its own in a folder of this one."""
    if (second := _second_plan(plan)) is None:
        return
    say(f"  second    {second.config.detection.method}, for a second opinion")
    prepare(second, calibration)
    _find_all_peaks(second, client, say, progress)


def _second_plan(plan: PlannedRun) -> PlannedRun | None:
    """The run of the second method; None if there is none."""
    config = plan.config
    if (detection := config.second_detection()) is None:
        return None
    changes = {"detection": detection, "second": SecondConfig(), "out": plan.out / SECOND}
    return plan_run(config.model_copy(update=changes))


@contextmanager
def _shared(plan: PlannedRun, client: Client | None) -> Iterator[Client | None]:
    """One set of workers for both methods, where both have something left to do."""
    second = _second_plan(plan)
    if client is not None or second is None or not (_unfinished(plan) and _unfinished(second)):
        yield client
        return
    with _client(plan.config, plan.out, None) as connected:
        yield connected


def _unfinished(plan: PlannedRun) -> bool:
    return not plan.peaks.exists() or bool((read_status(plan.peaks) != schema.STATUS_DONE).any())


def plan(config: Config) -> list[str]:
    """What :func:`run` would do and take, in lines of text; nothing is written.

    Memory, time and output come from a trial with one block, some ten seconds: :mod:`fcunet.predict`.
    """
    from .predict import predict

    planned = plan_run(config)
    lines = describe_run(planned)
    prediction = predict(planned.config)
    lines += prediction.lines() + [f"  problem   {problem}" for problem in prediction.problems]
    if planned.peaks.exists():
        status = read_status(planned.peaks)
        done = int((status == schema.STATUS_DONE).sum())
        lines.append(f"  resume    {done} of {status.size} blocks are done already")
    where = planned.config.cluster.cluster
    if Path(where).suffix in (".yaml", ".yml") and read_profile(where).settings.cluster == "slurm":
        lines += ["  job       each of the jobs:", *job_script(where, planned.out / "jobs").splitlines()]
    return lines


def rerun_strain(run_dir: str | Path, *, config: str | Path | None = None, **overrides: Any) -> xr.DataTree:
    """Fit the lattices and compute the strain again from the peaks of a run; seconds, and no GPU.

    Parameters
    ----------
    run_dir : path
        The run directory, or a store in it.
    config : path, optional
        YAML file of settings; default is the run's own ``config.yaml``.
    **overrides
        Settings of the lattice and the strain, such as ``reference="0:16,0:64"``.

    Returns
    -------
    xarray.DataTree
        The new results; report and figures are written anew as well.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no run, or an override is no setting of the lattice or the strain.
    """
    out = _run_dir(run_dir)
    own = out / CONFIG
    loaded = Config.load(config or (own if own.exists() else None), **overrides)
    say = Speaker(True)
    with RunLock(out), log_to(out / LOG):
        begin = time.perf_counter()
        tree = analyse(out, loaded, say)
        write_text(own, loaded.to_yaml())
        report = _write_report(out)
        say(f"  wrote     {report}   ({duration(time.perf_counter() - begin)})")
    return tree


def rewrite_report(run_dir: str | Path) -> Path:
    """Write figures and report of a finished run again; returns the path of the report."""
    out = Path(run_dir)
    out = out.parent if out.name in (PEAKS, RESULTS) else out
    open_results(out)  # the peaks may be gone
    with RunLock(out):
        return _write_report(out)


def _write_report(out: Path) -> Path:
    from .report import write_report  # matplotlib, not needed before

    return Path(write_report(out))


def _find_all_peaks(
    plan: PlannedRun, client: Client | None, say: "Speaker", progress: bool
) -> dict[str, Any]:
    """Process every block that is not done yet; returns facts for the summary."""
    started = time.perf_counter()
    status = read_status(plan.peaks)
    todo: list[Block] = [(int(iy), int(ix)) for iy, ix in np.argwhere(status != schema.STATUS_DONE)]
    total = int(np.prod(plan.grid.scan_shape))
    done_before = total - sum(int(np.prod(plan.grid.shape(*block))) for block in todo)
    facts: dict[str, Any] = {"patterns": total, "patterns_before": done_before}
    if todo:
        if done_before:
            say(f"  resume    {status.size - len(todo)} of {status.size} blocks are done already")
        reopen_patterns(plan.peaks)
        create_patterns(
            plan.peaks, plan.grid.n_blocks, (plan.datacube.sizes["qy"], plan.datacube.sizes["qx"])
        )
        with draining() as stop, _client(plan.config, plan.out, client) as connected:
            facts |= _run_blocks(plan, connected, todo, status, total, done_before, say, progress, stop)
    plan.seconds["peaks"] = time.perf_counter() - started
    status = read_status(plan.peaks)
    failed = [(int(iy), int(ix)) for iy, ix in np.argwhere(status == schema.STATUS_FAILED)]
    ended = int((status != schema.STATUS_TODO).sum())
    if ended < status.size:
        raise RunStopped(
            f"stopped with {ended} of {status.size} blocks done; the same command continues: {plan.command}"
        )
    finish_patterns(plan.peaks)
    remove_partial(plan.peaks)
    if failed:
        say(
            f"  FAILED    {len(failed)} of {status.size} blocks, their positions are NaN (reasons in "
            f"{plan.out / SUMMARY}); once repaired, the same command does them again"
        )
    return facts | {"n_blocks": int(status.size), "n_blocks_failed": len(failed)}


def _run_blocks(
    plan: PlannedRun,
    client: Client,
    todo: list[Block],
    status: np.ndarray,
    total: int,
    done_before: int,
    say: "Speaker",
    progress: bool,
    stop: threading.Event,
) -> dict[str, Any]:
    job = TileJob(
        store=plan.store if isinstance(plan.store, Remote) else str(plan.store.resolve()),
        peaks=str(plan.peaks.resolve()),
        origin=plan.origin,
        detection=plan.config.detection.model_copy(
            update={"weights": str(plan.weights.resolve())} if plan.weights else {}
        ),
        weights_sha256=plan.identity["weights_sha256"] or None,
        run_id=run_id_of(plan),
    )
    say(f"  compute   {_describe_workers(client)}")
    say(f"  dashboard {client.dashboard_link}   strain page: {page_link(client)}")
    for line in ways_to_dashboard(client.dashboard_link):
        say(line)
    client.forward_logging("fcunet", level=logging.INFO)
    title = f"{plan.datacube.attrs.get('title') or plan.store.stem}"
    page = RunPageFeed(client, run=f"{job.run_id}-{os.getpid()}", title=title, status=status)
    live = _LiveMap(plan, page, status)
    seconds: dict[str, float] = {"read": 0.0, "detect": 0.0, "write": 0.0}
    seen = {"peak_rss": 0, "bytes": 0, "peaks": 0, "truncated": 0, "empty": 0}
    devices: set[str] = set()
    last_page = 0.0

    with (
        dask_report(client, plan.out / DASK_REPORT),
        Progress(total, done_before, show=progress, say=say) as bar,
    ):

        def on_done(block: Block, numbers: dict[str, Any]) -> None:
            for name, value in numbers["seconds"].items():
                seconds[name] += value
            for name in ("bytes", "peaks", "truncated", "empty"):
                seen[name] += numbers[name]
            seen["peak_rss"] = max(seen["peak_rss"], numbers["peak_rss"])
            devices.add(numbers["device"])
            live.done(block, numbers["maps"])
            bar.advance(numbers["patterns"])

        def on_failed(block: Block, reason: str) -> None:
            logger.error("block %s failed: %s", block, reason)
            page.done(*block, schema.STATUS_FAILED, reason=reason)
            bar.advance(int(np.prod(plan.grid.shape(*block))), failed=True)

        def on_tick(workers: int) -> None:
            nonlocal last_page
            now = time.monotonic()
            if now - last_page < _PAGE_EVERY_S:
                return
            last_page = now
            note = (
                "stopping: finishing the blocks in flight"
                if stop.is_set()
                else report_health(client, workers, bar.now + bar.failed)
            )
            bar.note(note)
            live.catch_up()
            page.send(bar, workers=workers, note=note)

        counts = run_tiles(
            client,
            job,
            todo,
            on_done=on_done,
            on_failed=on_failed,
            on_tick=on_tick,
            stop=stop,
            basis=lambda: live.basis,
        )
        rate = bar.rate
        live.finish()
        page.send(bar, workers=0, note="stopped" if stop.is_set() else "peaks done", ended=True)
    if counts.done:
        say(
            f"  detect    {bar.now:,} patterns, {seen['peaks'] / max(bar.now, 1):.1f} peaks each, "
            f"{rate:,.0f} patterns/s"
        )
    if seen["truncated"]:
        say(f"  note      {seen['truncated']:,} patterns had more than {job.detection.max_num_peaks} peaks")
    return {
        "patterns_now": bar.now,
        "patterns_per_s": round(rate, 1),
        "worker_seconds": {k: round(v, 3) for k, v in seconds.items()},
        "bytes_read": seen["bytes"],
        "peak_rss_worker": seen["peak_rss"],
        "device": ", ".join(sorted(devices)) or None,
        "failed_blocks": [{"block": list(b), "reason": r} for b, r in sorted(counts.failed.items())],
    }


class _LiveMap:
    """Hands pictures of finished blocks to the live page; finds the basis of their strain in the first."""

    def __init__(self, plan: PlannedRun, page: RunPageFeed, status: np.ndarray) -> None:
        self.plan, self.page, self.calibration = plan, page, load_calibration(plan.peaks)
        self.basis: ProvisionalBasis | None = None
        done = [(int(iy), int(ix)) for iy, ix in np.argwhere(status == schema.STATUS_DONE)]
        self._behind: deque[Block] = deque(done[:_CATCH_UP])  # of an earlier call: drawn one by one

    def done(self, block: Block, maps: dict[str, Any]) -> None:
        """A block has ended, with these pictures."""
        self.page.done(*block, schema.STATUS_DONE, maps=maps)
        if "e_xx" not in maps and len(self._behind) < _CATCH_UP:
            self._behind.append(block)

    def finish(self, seconds: float = 2.0) -> None:
        """Draw what is left, as far as it does not hold up the run."""
        end = time.monotonic() + seconds
        while self._behind and time.monotonic() < end:
            self.catch_up()

    def catch_up(self) -> None:
        """Draw the strain of one block that ended before the basis was known; called once a second."""
        if not self._behind:
            return
        block, peaks, grid = self._behind.popleft(), self.plan.peaks, self.plan.grid
        if self.basis is None:
            self.basis = find_provisional_basis(peaks, grid, block)
        origin = origin_of_block(self.calibration, *grid.slices(*block))
        maps = stored_thumbnails(peaks, grid, block, origin, self.basis)
        self.page.done(*block, schema.STATUS_DONE, maps=maps)


def _client(config: Config, out: Path, client: Client | None) -> AbstractContextManager[Client]:
    if client is not None:
        return nullcontext(client)
    where = config.cluster
    return connect(
        where.cluster,
        where.workers,
        device=config.detection.device,
        dashboard_address=where.dashboard_address,
        log_directory=out / "jobs",
    )


def _describe_workers(client: Client) -> str:
    threads = client.nthreads()
    if not threads:
        return "waiting for workers"
    per_worker = sorted(set(threads.values()))
    each = "-".join(map(str, {per_worker[0], per_worker[-1]})) if len(per_worker) > 1 else str(per_worker[0])
    return f"{len(threads)} workers x {each} thread{'' if each == '1' else 's'}"


def _forget(out: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    for name in (PEAKS, RESULTS, SECOND):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (SUMMARY, CONFIG, DASK_REPORT, "report.html"):
        (out / name).unlink(missing_ok=True)


def _run_dir(path: str | Path) -> Path:
    out = local(path, RUNS_ARE_HERE)
    if out.name in (PEAKS, RESULTS):
        out = out.parent
    if not (out / PEAKS / "zarr.json").is_file():
        raise FileNotFoundError(
            f"{out} holds no run (there is no {PEAKS} in it); make one with: fcunet run SCAN.zarr --out {out}"
        )
    return out


def _write_summary(plan: PlannedRun, facts: dict[str, Any]) -> None:
    text = json.dumps(
        facts
        | {
            "seconds": {name: round(value, 3) for name, value in plan.seconds.items()},
            "peak_rss_driver": peak_rss(),
            "fcunet_version": __version__,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        indent=2,
    )
    write_text(plan.out / SUMMARY, text + "\n")

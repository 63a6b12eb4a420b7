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

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dask
import numpy as np
import xarray as xr
from distributed import Client

from . import __version__, schema
from .calibrate import calibrate
from .calibration import Calibration
from .cepstral import REAL_SPACE
from .cluster import connect, job_script, report_health
from .config import Config, SecondConfig
from .dashboard import RunPageFeed, page_link
from .layout import BlockGrid
from .lock import RunLock
from .memory import peak_rss
from .nn.range import TrainingRange
from .nn.weights import resolve_weights, training_facts
from .pipeline import INTENSITY_ATTRS
from .progress import Progress, duration
from .provenance import input_fingerprint, provenance
from .remote import Place, Remote, scan_of
from .results import analyse, public_settings
from .second import FOLDER as SECOND
from .session import Speaker, dask_report, draining, log_to, ways_to_dashboard, write_text
from .shards import DamagedBlockError
from .slurm import read_profile
from .store import (
    create_peaks,
    open_region,
    open_results,
    open_truth,
    read_status,
)
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
    save_calibration,
)
from .zarrfolder import root_attrs

logger = logging.getLogger(__name__)

PEAKS, RESULTS, LOG, SUMMARY, CONFIG = "peaks.zarr", "strain.zarr", "run.log", "summary.json", "config.yaml"
DASK_REPORT = "dask-report.html"
_IDENTITY = ("science_sha256", "weights_sha256", "input_fingerprint")
_IDENTITY_WORDS = {
    "science_sha256": "the region or the detection settings",
    "weights_sha256": "the weights",
    "input_fingerprint": "the scan",
}
_PAGE_EVERY_S = 1.0
_CATCH_UP = 400  # blocks whose pictures the driver draws itself


class RunStopped(RuntimeError):
    """The run was asked to stop, and did; everything finished so far is in place."""


@dataclass
class _Run:
    """What is known about a run before its first block."""

    config: Config
    store: Place
    out: Path
    datacube: xr.Dataset  # the region to process, lazy
    grid: BlockGrid
    identity: dict[str, str]
    weights: Path | None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def peaks(self) -> Path:
        return self.out / PEAKS

    @property
    def command(self) -> str:
        """What to type to go on."""
        return f"fcunet run {self.store} --out {self.out}"

    @property
    def origin(self) -> tuple[int, int]:
        return self.config.region[::2] if self.config.region else (0, 0)  # type: ignore[return-value]


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
    plan = _plan(config)
    say = Speaker(progress)
    with full_disk_is_named(plan.out), RunLock(plan.out), log_to(plan.out / LOG):
        begin = time.perf_counter()
        logger.info("fcunet %s, run in %s", __version__, plan.out)
        if restart:
            _forget(plan.out)
        calibration = _prepare(plan)
        for line in _describe(plan):
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
    plan: _Run, calibration: Calibration, client: Client | None, say: "Speaker", progress: bool
) -> None:
    """The peaks of another method, if one is asked for: a run of its own in a folder of this one."""
    if (second := _second_plan(plan)) is None:
        return
    say(f"  second    {second.config.detection.method}, for a second opinion")
    _prepare(second, calibration)
    _find_all_peaks(second, client, say, progress)


def _second_plan(plan: _Run) -> _Run | None:
    """The run of the second method; None if there is none."""
    config = plan.config
    if (detection := config.second_detection()) is None:
        return None
    changes = {"detection": detection, "second": SecondConfig(), "out": plan.out / SECOND}
    return _plan(config.model_copy(update=changes))


@contextmanager
def _shared(plan: _Run, client: Client | None) -> Iterator[Client | None]:
    """One set of workers for both methods, where both have something left to do."""
    second = _second_plan(plan)
    if client is not None or second is None or not (_unfinished(plan) and _unfinished(second)):
        yield client
        return
    with _client(plan.config, plan.out, None) as connected:
        yield connected


def _unfinished(plan: _Run) -> bool:
    return not plan.peaks.exists() or bool((read_status(plan.peaks) != schema.STATUS_DONE).any())


def plan(config: Config) -> list[str]:
    """What :func:`run` would do and take, in lines of text; nothing is written.

    Memory, time and output come from a trial with one block, some ten seconds: :mod:`fcunet.predict`.
    """
    from .predict import predict

    planned = _plan(config)
    lines = _describe(planned)
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


def _plan(config: Config) -> _Run:
    """Everything that can be checked before anything is written."""
    store = scan_of(config)
    if config.second.second_opinion == config.detection.method:
        raise ValueError(
            f"the second opinion is {config.detection.method}, as the first method; ask another one: "
            "--second-opinion correlation, cepstral or fcunet"
        )
    datacube, grid = open_region(store, config.region)
    weights, sha256 = resolve_weights(config.detection.weights) if _uses_network(config) else (None, "")
    out = Path(config.out) if config.out is not None else Path("runs") / store.name.removesuffix(".zarr")
    if not isinstance(store, Remote) and out.resolve() == store.resolve():
        raise ValueError(
            f"the run directory is the datacube itself; give another one: --out runs/{store.stem}"
        )
    identity = {
        "science_sha256": config.science_hash(),
        "weights_sha256": sha256,
        "input_fingerprint": input_fingerprint(store),
    }
    return _Run(config, store, out, datacube, grid, identity, weights)


def _sample_digests(datacube: xr.Dataset) -> list[str]:
    """Digests of the four corner patterns and the middle one; empty where one cannot be read."""
    ny, nx = datacube["intensity"].shape[:2]
    digests = []
    for y, x in ((0, 0), (0, nx - 1), (ny - 1, 0), (ny - 1, nx - 1), (ny // 2, nx // 2)):
        try:
            pattern = datacube["intensity"][y, x].data.compute(scheduler="synchronous")
            digests.append(hashlib.sha256(pattern.tobytes()).hexdigest()[:12])
        except DamagedBlockError:
            digests.append("")
    return digests


def _prepare(plan: _Run, known: Calibration | None = None) -> Calibration:
    """The peaks store of this run, made or checked, with the calibration in it: `known`, else measured."""
    if plan.peaks.exists():
        _check_identity(plan)
        for left in plan.peaks.glob("*/c/**/*.partial"):  # a chunk that was being written at a kill
            left.unlink(missing_ok=True)
    else:
        started = time.perf_counter()
        calibration = known or _measure(plan)
        plan.seconds["calibrate"] = time.perf_counter() - started
        network = _uses_network(plan.config)
        facts = {
            "config_json": json.dumps(public_settings(plan.config)),
            "input_title": plan.datacube.attrs.get("title", plan.store.stem),
            "weights_name": plan.weights.name if plan.weights else None,
            "intensity_meaning": INTENSITY_ATTRS[plan.config.detection.method]["meaning"],
            "intensity_units": "V" if network else None,
            "method": plan.config.detection.method,
            "training_range": asdict(TrainingRange.of_weights(training_facts(plan.weights)))
            if plan.weights
            else None,
            "space": REAL_SPACE if plan.config.detection.method == "cepstral" else None,
            "run_id": _run_id(plan),
            "input_samples": _sample_digests(plan.datacube),
            "region": list(plan.config.region) if plan.config.region else None,
            "datacube": {k: v for k, v in plan.datacube.attrs.items() if not k.startswith("fcunet_format")},
            "qy": _axis(plan.datacube, "qy"),
            "qx": _axis(plan.datacube, "qx"),
            **plan.identity,
        }
        # the calibration goes in first, under a name of its own: the store appears with all it needs, or not
        # at all
        create_peaks(
            plan.peaks,
            scan_shape=plan.grid.scan_shape,
            block_shape=plan.grid.block_shape,
            max_num_peaks=plan.config.detection.max_num_peaks,
            detector_shape=(plan.datacube.sizes["qy"], plan.datacube.sizes["qx"]),
            coords={dim: plan.datacube[dim] for dim in schema.SCAN_DIMS},
            attrs=provenance(**facts),
        )
        save_calibration(plan.peaks, calibration)
    if not (plan.peaks / "calibration").exists():  # killed between the two
        save_calibration(plan.peaks, known or _measure(plan))
    if not (plan.peaks / "truth").exists() and (truth := open_truth(plan.store)) is not None:
        _save_truth(plan, truth)
    return load_calibration(plan.peaks)


def _measure(plan: _Run) -> Calibration:
    with dask.config.set(scheduler="threads"):  # a few patterns: not worth a cluster
        return calibrate(plan.datacube, **plan.config.calibration.model_dump())


def _check_identity(plan: _Run) -> None:
    found = root_attrs(plan.peaks)
    schema.check_format(found, "peaks", str(plan.peaks))
    other = [k for k in _IDENTITY if found.get(k, "") != plan.identity[k]]
    if not other and any(
        a and b and a != b
        for a, b in zip(found.get("input_samples", []), _sample_digests(plan.datacube), strict=False)
    ):
        other = ["input_fingerprint"]
    if other:
        what = " and ".join(_IDENTITY_WORDS[k] for k in other)
        raise ValueError(
            f"{plan.out} holds a run that differs in {what}, and peaks of two kinds must not mix; start anew "
            f"with --restart, or keep both with another run directory: --out {plan.out}-2"
        )


def _find_all_peaks(plan: _Run, client: Client | None, say: "Speaker", progress: bool) -> dict[str, Any]:
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
    if failed:
        say(
            f"  FAILED    {len(failed)} of {status.size} blocks, their positions are NaN (reasons in "
            f"{plan.out / SUMMARY}); once repaired, the same command does them again"
        )
    return facts | {"n_blocks": int(status.size), "n_blocks_failed": len(failed)}


def _run_blocks(
    plan: _Run,
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
        run_id=_run_id(plan),
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

    def __init__(self, plan: _Run, page: RunPageFeed, status: np.ndarray) -> None:
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


def _save_truth(plan: _Run, truth: xr.Dataset) -> None:
    """Keep the truth of a simulated scan with the peaks, cut to the region; later steps need no datacube."""
    if plan.config.region is not None:
        y0, y1, x0, x1 = plan.config.region
        truth = truth.isel(scan_y=slice(y0, y1), scan_x=slice(x0, x1))
    final = plan.peaks / "truth"
    draft = final.with_name(f"truth.partial.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    truth.load().drop_encoding().to_zarr(draft, zarr_format=3, consolidated=False)
    draft.rename(final)


def _run_id(plan: _Run) -> str:
    """The same for every run that writes the same peaks."""
    return hashlib.sha256(json.dumps(plan.identity, sort_keys=True).encode()).hexdigest()[:16]


def _uses_network(config: Config) -> bool:
    return config.detection.method == "fcunet"


def _axis(datacube: xr.Dataset, dim: str) -> dict[str, Any]:
    """A detector coordinate as first value, step and unit."""
    values = datacube[dim].values
    step = float(values[-1] - values[0]) / (len(values) - 1) if len(values) > 1 else 1.0
    return {
        "first": float(values[0]),
        "step": step,
        "units": datacube[dim].attrs.get("units", schema.UNIT_PIXEL),
    }


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


def _describe(plan: _Run) -> list[str]:
    ny, nx = plan.grid.scan_shape
    intensity = plan.datacube["intensity"]
    by, bx = plan.grid.block_shape
    region = (
        f" (region {':'.join(map(str, plan.config.region[:2]))},{':'.join(map(str, plan.config.region[2:]))})"
        if plan.config.region
        else ""
    )
    detection = plan.config.detection
    model = (
        f"{detection.weights} (sha256 {plan.identity['weights_sha256'][:8]}...)"
        if plan.weights
        else f"correlation, {detection.subpixel} positions"
    )
    return [
        f"  data      {plan.store.name}: {ny} x {nx} scan{region}, {intensity.shape[2]} x "
        f"{intensity.shape[3]} detector, {intensity.dtype}, {_bytes(intensity.nbytes)} "
        f"-> {len(plan.grid)} blocks of {by} x {bx}",
        f"  model     {model}",
    ]


def _describe_workers(client: Client) -> str:
    threads = client.nthreads()
    if not threads:
        return "waiting for workers"
    per_worker = sorted(set(threads.values()))
    each = "-".join(map(str, {per_worker[0], per_worker[-1]})) if len(per_worker) > 1 else str(per_worker[0])
    return f"{len(threads)} workers x {each} thread{'' if each == '1' else 's'}"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _forget(out: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    for name in (PEAKS, RESULTS, SECOND):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (SUMMARY, CONFIG, DASK_REPORT, "report.html"):
        (out / name).unlink(missing_ok=True)


def _run_dir(path: str | Path) -> Path:
    out = Path(path)
    if out.name in (PEAKS, RESULTS):
        out = out.parent
    if not (out / PEAKS / "zarr.json").is_file():
        raise FileNotFoundError(
            f"{out} holds no run (there is no {PEAKS} in it); make one with: fcunet run SCAN.zarr --out {out}"
        )
    return out


def _write_summary(plan: _Run, facts: dict[str, Any]) -> None:
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

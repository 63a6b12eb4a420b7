"""A million patterns end to end, killed in the middle and continued: overhead, memory, equality.

    python -m benchmarks.million            # 1024 x 1024 positions, a quarter of an hour on two idle cores
    python -m benchmarks.million --scan 128 --out /tmp/small

The store has as many blocks as a real scan of that size, but few distinct shards: the others are links to
them, so it fits any disk. Patterns are small and the detector is cheap (whole pixels), because what is
measured here is everything around the detector; what the detectors take is the business of
`benchmarks.speed`. One per cent of the scan is done with the real ones as well, correlation with upsampled
positions and the network, each in a run of its own. The run is a process of its own, killed with SIGKILL at a
third, and the same command is given again. Memory of the driver (the scheduler is part of it) and of every
worker is sampled each second, from outside.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

from benchmarks.disks import simulate_disks
from fcunet import schema
from fcunet.blocks import process_block
from fcunet.config import Config
from fcunet.datacube import DatacubeWriter, read_block
from fcunet.layout import BlockGrid, Layout
from fcunet.predict import predict
from fcunet.store import load_calibration, open_peaks, read_status

FRAME, RADIUS, SPACING, BLOCK, DISTINCT = 64, 3.0, 12.0, 32, 8
REAL = {
    "correlation": ["--method", "correlation", "--subpixel", "upsampled"],
    "network": ["--method", "fcunet"],
}
HERE = Path(__file__).resolve().parent
CHEAP = ["--method", "correlation", "--subpixel", "pixel", "--max-num-peaks", "32"]


def build_store(path: Path, side: int) -> None:
    """A datacube of `side` x `side` positions whose shards repeat."""
    if path.exists():
        return
    shape, layout = (side, side, FRAME, FRAME), Layout((BLOCK, BLOCK), (BLOCK // 2, BLOCK // 2))
    with DatacubeWriter(path, shape, np.uint16, layout=layout, attrs={"title": "million"}) as writer:
        blocks = list(writer.blocks)
        for n, block in enumerate(blocks[:DISTINCT]):
            scan = simulate_disks(
                (BLOCK, BLOCK), (FRAME, FRAME), radius_px=RADIUS, spacing_px=SPACING, electrons=2e4, seed=n
            )
            writer.write_block(*block, scan.patterns.astype(np.uint16))
        folder = writer.partial / "intensity" / "c"
        for n, (iy, ix) in enumerate(blocks[DISTINCT:], DISTINCT):
            target = folder / str(iy) / str(ix) / "0" / "0"
            target.parent.mkdir(parents=True, exist_ok=True)
            y, x = blocks[n % DISTINCT]
            os.link(folder / str(y) / str(x) / "0" / "0", target)
        writer.write_variable("probe", scan.probe)


class Sampler:
    """Resident memory of a process and its children, and finished blocks, once a second."""

    def __init__(self, process: psutil.Process, peaks: Path, start: float) -> None:
        self.process, self.peaks, self.start = process, peaks, start
        self.rows: list[dict] = []

    def look(self) -> int:
        """Take one sample; returns the number of finished blocks."""
        done = 0
        if (self.peaks / "status" / "c").is_dir():
            done = sum(1 for _ in (self.peaks / "status" / "c").glob("*/*"))
        workers = []
        for child in self.process.children(recursive=True):
            try:
                name = " ".join(child.cmdline())
                if "spawn_main" in name:
                    workers.append(child.memory_info().rss)
            except psutil.Error:
                continue
        row = {"s": time.time() - self.start, "driver": self.process.memory_info().rss, "workers": workers}
        self.rows.append(row | {"blocks": done})
        return done


def run_command(store: Path, out: Path, workers: int, settings: list[str]) -> list[str]:
    """The command a user would type."""
    program = [sys.executable, "-c", "from fcunet.cli import main; main()", "run", str(store)]
    program += ["--out", str(out), "--workers", str(workers), "--dashboard-address", "127.0.0.1:0"]
    return [*program, "--device", "cpu", *settings]


def run_real(store: Path, folder: Path, side: int, workers: int) -> dict[str, dict]:
    """One block in a hundred, in a row, with each of the real detectors: speed and memory."""
    blocks = max(1, round((side // BLOCK) ** 2 / 100))
    columns = min(blocks, side // BLOCK)
    found = {}
    for name, settings in REAL.items():
        out = folder / f"{name}{side}"
        shutil.rmtree(out, ignore_errors=True)
        command = run_command(store, out, workers, settings)
        command += ["--region", f"0:{BLOCK},0:{columns * BLOCK}"]
        run_until(command, out, None, time.time())
        summary = json.loads((out / "summary.json").read_text())
        found[name] = {
            "patterns": summary["patterns"],
            "detect_ms_per_pattern": 1e3 * summary["worker_seconds"]["detect"] / summary["patterns"],
            "peak_rss_worker": summary["peak_rss_worker"],
        }
    return found


def run_until(command: list[str], out: Path, kill_at: int | None, start: float) -> tuple[list[dict], int]:
    """Run `command`, sampling it; kill it with all its children once `kill_at` blocks are done."""
    with open(out.with_suffix(".log"), "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        sampler = Sampler(psutil.Process(process.pid), out / "peaks.zarr", start)
        while process.poll() is None:
            try:
                done = sampler.look()
            except psutil.NoSuchProcess:
                break
            if kill_at is not None and done >= kill_at:
                family = [*psutil.Process(process.pid).children(recursive=True)]
                process.send_signal(signal.SIGKILL)
                psutil.wait_procs(family, timeout=60)  # workers end by themselves when their driver is gone
                process.wait()
                return sampler.rows, int((read_status(out / "peaks.zarr") == schema.STATUS_DONE).sum())
            time.sleep(1)
    if process.wait():
        raise RuntimeError(f"the run failed:\n{out.with_suffix('.log').read_text()[-3000:]}")
    return sampler.rows, int((read_status(out / "peaks.zarr") == schema.STATUS_DONE).sum())


def equals_serial(store: Path, out: Path, config: Config) -> int:
    """Blocks whose peaks are, bit by bit, those of a serial pass over the distinct shards."""
    calibration, grid = load_calibration(out / "peaks.zarr"), None
    peaks = open_peaks(out / "peaks.zarr")
    grid = BlockGrid(tuple(peaks["n_peaks"].shape), (BLOCK, BLOCK))
    blocks = list(grid)
    names = ("peak_qy", "peak_qx", "peak_intensity", "peak_sigma", "n_peaks", "truncated", "total")
    serial = [
        process_block(read_block(store, *block), config.detection, calibration) for block in blocks[:DISTINCT]
    ]
    same = 0
    for n, block in enumerate(blocks):
        region = dict(zip(schema.SCAN_DIMS, grid.slices(*block), strict=True))
        part, reference = peaks[list(names)].isel(region).compute(), serial[n % DISTINCT]
        same += all(
            np.array_equal(part[k].values, reference[k], equal_nan=part[k].dtype.kind == "f") for k in names
        )
    return same


def growth(rows: list[dict], key: str) -> float:
    """Growth of memory (MiB) over the second half of the blocks of a run, from a straight line."""
    last = max(row["blocks"] for row in rows)
    first = min(row["blocks"] for row in rows)
    chosen = [r for r in rows if r["blocks"] >= (first + last) / 2 and r["blocks"] < last and r["workers"]]
    if len(chosen) < 3:
        return float("nan")
    t = np.array([r["s"] for r in chosen])
    m = np.array([r["driver"] if key == "driver" else max(r["workers"]) for r in chosen]) / 2**20
    return float(np.polyfit(t, m, 1)[0] * (t[-1] - t[0]))


def draw(rows: list[list[dict]], facts: dict, path: Path) -> None:
    """Memory and progress over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5.5), sharex=True, layout="constrained")
    for n, part in enumerate(rows):
        t = [r["s"] / 60 for r in part]
        label = None if n else "driver and scheduler"
        top.plot(t, [r["driver"] / 2**20 for r in part], color="C0", label=label)
        most = max((len(r["workers"]) for r in part), default=0)
        for k in range(most):
            m = [sorted(r["workers"])[k] / 2**20 if len(r["workers"]) > k else np.nan for r in part]
            top.plot(t, m, color=f"C{1 + k}", lw=0.8, label=None if n else f"worker {k + 1}")
        bottom.plot(t, [r["blocks"] * BLOCK**2 / 1e6 for r in part], color="C0")
    top.axhline(
        facts["predicted_worker_bound"] / 2**20, color="0.5", ls="--", label="predicted bound of a worker"
    )
    killed = rows[0][-1]["s"] / 60
    for axes in (top, bottom):
        axes.axvline(killed, color="C3", lw=1)
    bottom.annotate("SIGKILL", (killed, 0.05), color="C3", xytext=(4, 0), textcoords="offset points")
    top.set_ylabel("resident memory (MiB)")
    top.set_ylim(0)
    top.legend(fontsize=8, ncols=2, loc="upper left")
    bottom.set_ylabel("patterns done (million)")
    bottom.set_xlabel("time (min)")
    bottom.set_ylim(0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scan", type=int, default=1024, help="positions per side")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "million")
    parser.add_argument("--figure", type=Path, default=None)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    store, out = args.out / f"scan{args.scan}.zarr", args.out / f"run{args.scan}"
    build_store(store, args.scan)
    shutil.rmtree(out, ignore_errors=True)
    config = Config.load(
        store=store, out=out, method="correlation", subpixel="pixel", max_num_peaks=32, device="cpu",
        workers=args.workers,
    )  # fmt: skip
    predicted = predict(config, seconds=5.0)
    print("\n".join(predicted.lines()), flush=True)
    total = (args.scan // BLOCK) ** 2
    start = time.time()
    command = run_command(store, out, args.workers, CHEAP)
    before, done_at_kill = run_until(command, out, total // 3, start)
    print(f"killed with {done_at_kill} of {total} blocks done", flush=True)
    after, done = run_until(command, out, None, start)
    summary = json.loads((out / "summary.json").read_text())
    resumed = total - summary["patterns_before"] // BLOCK**2
    busy = sum(summary["worker_seconds"].values())
    working = [r for r in after if done_at_kill < r["blocks"] < total]
    span = working[-1]["s"] - working[0]["s"]
    share = (working[-1]["blocks"] - working[0]["blocks"]) / resumed  # of the blocks within that span
    threads = predicted.workers.count * predicted.workers.threads
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "patterns": args.scan**2,
        "blocks": total,
        "workers": args.workers,
        "seconds": summary["seconds"],
        "patterns_per_s": summary["patterns_per_s"],
        "worker_seconds": summary["worker_seconds"],
        "overhead": 1 - busy * share / (span * threads),
        "blocks_done_at_kill": done_at_kill,
        "blocks_done_again": resumed + done_at_kill - total,
        "blocks_equal_to_serial": equals_serial(store, out, config),
        "peak_rss_worker": summary["peak_rss_worker"],
        "predicted_worker": predicted.worker_bytes,
        "predicted_worker_bound": predicted.worker_bound,
        "growth_MiB_driver": growth(after, "driver"),
        "growth_MiB_worker": growth(after, "workers"),
        "peak_rss_driver": summary["peak_rss_driver"],
        "output_bytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()),
        "predicted_output": predicted.output_bytes,
    }
    (args.out / "samples.json").write_text(json.dumps([before, after]))
    draw([before, after], facts, args.figure or args.out / "million.png")
    (args.out / "million.json").write_text(json.dumps(facts, indent=1) + "\n")
    facts["real_detectors"] = run_real(store, args.out, args.scan, args.workers)
    (args.out / "million.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()

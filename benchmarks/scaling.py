"""From one worker to 512: what is measured here, and a simulation of larger pools that says what limits them.

    python -m benchmarks.scaling                     # seconds: the model alone, for 8, 64 and 512 GPUs
    python -m benchmarks.scaling --measure           # minutes: also 1 and 2 workers of this machine

The simulation plays a run block by block: a driver that hands out one task at a time, workers whose threads
read one after another through their share of the file system and decompress side by side, while one of them
computes, and a tail in which the last blocks leave most workers idle. `--measure` says what the driver takes
per task here; the other numbers are assumptions, printed with the table.
"""

import argparse
import heapq
import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Pool:
    """What a run is made of; times in s, sizes in bytes.

    Attributes
    ----------
    blocks, patterns : int
        Blocks of the scan, and patterns in each.
    stored : float
        Bytes per pattern as compressed, read from the file system.
    compute_s : float
        Per pattern, on one GPU or core; `spread` is its relative standard deviation between blocks.
    decode_s : float
        CPU time per pattern to decompress, in one of the `threads` of a worker.
    bandwidth, per_worker : float
        Of the file system in all, and of one client.
    dispatch_s : float
        Time the driver takes for one task, the scheduler included.
    start_s : float
        Between the start of one worker and the next.
    """

    workers: int
    blocks: int = 4096
    patterns: int = 1024
    stored: float = 20e3
    compute_s: float = 1e-4
    spread: float = 0.1
    decode_s: float = 1.5e-4
    threads: int = 4
    bandwidth: float = 20e9
    per_worker: float = 2e9
    dispatch_s: float = 3e-3
    start_s: float = 0.0


def simulate(pool: Pool, seed: int = 0) -> dict[str, float]:
    """Wall time of a run and the share of it in which the devices compute (efficiency)."""
    rng = np.random.default_rng(seed)
    factor = np.maximum(1 + pool.spread * rng.standard_normal(pool.blocks), 0.1)
    compute = pool.patterns * pool.compute_s * factor
    share = min(pool.per_worker, pool.bandwidth / pool.workers)
    read, decode = pool.patterns * pool.stored / share, pool.patterns * pool.decode_s
    ready = [(w * pool.start_s, w, t) for w in range(pool.workers) for t in range(pool.threads)]
    heapq.heapify(ready)  # threads that wait for a block
    device_free, link_free = np.zeros(pool.workers), np.zeros(pool.workers)
    driver_free, end = 0.0, 0.0
    for work in compute:
        at, worker, thread = heapq.heappop(ready)
        driver_free = max(driver_free, at) + pool.dispatch_s
        link_free[worker] = max(driver_free, link_free[worker]) + read
        begin = max(link_free[worker] + decode, device_free[worker])
        device_free[worker] = begin + work
        end = max(end, device_free[worker])
        heapq.heappush(ready, (device_free[worker], worker, thread))
    return {"seconds": float(end), "efficiency": float(compute.sum() / (end * pool.workers))}


def limits(pool: Pool) -> dict[str, float]:
    """Patterns per second that each part of the pool could do alone."""
    return {
        "devices": pool.workers / pool.compute_s,
        "decompression": pool.workers * pool.threads / pool.decode_s,
        "file system": min(pool.workers * pool.per_worker, pool.bandwidth) / pool.stored,
        "driver": pool.patterns / pool.dispatch_s,
    }


def table(pools: dict[str, Pool]) -> str:
    """Markdown: speed, efficiency, and which part is the next limit."""
    lines = ["| pool | patterns per s | efficiency | next limit | of which, patterns per s |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, pool in pools.items():
        found, ceilings = simulate(pool), limits(pool)
        rate = pool.blocks * pool.patterns / found["seconds"]
        rest = {k: v for k, v in ceilings.items() if k != "devices"}
        limit = min(rest, key=rest.__getitem__)
        lines.append(f"| {name} | {rate:,.0f} | {found['efficiency']:.2f} | {limit} | {rest[limit]:,.0f} |")
    return "\n".join(lines)


def measure_dispatch(tasks: int = 1000, in_flight: int = 4) -> float:
    """CPU seconds of driver and scheduler per task that does nothing; many at once share messages."""
    from dask.distributed import as_completed

    from fcunet.cluster import connect

    with connect("local", workers=1, dashboard_address="127.0.0.1:0") as client:
        client.submit(abs, 0, pure=False).result()
        start = time.process_time()
        waiting = as_completed([client.submit(abs, n, pure=False) for n in range(in_flight)])
        for n, _ in enumerate(waiting):
            if n + in_flight < tasks:
                waiting.add(client.submit(abs, n, pure=False))
        return (time.process_time() - start) / tasks


def _warm() -> None:
    """What a worker loads once."""
    import fcunet.blocks  # noqa: F401


def measure(side: int = 128, size: int = 256) -> dict[str, dict[str, float]]:
    """Runs over one store with one and two workers of one thread.

    The driver, and the scheduler in it, share the cores of the workers. With other work on the machine the
    wall clock says little: the CPU time of the workers per pattern shows what they cost one another.
    """
    import dask
    from distributed import Client, LocalCluster

    from benchmarks.disks import simulate_disks
    from fcunet import runner
    from fcunet.cluster import DASK_SETTINGS
    from fcunet.config import Config
    from fcunet.datacube import DatacubeWriter
    from fcunet.layout import Layout

    out: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "scan.zarr")
        some = simulate_disks((16, 16), (size, size), electrons=1e5)
        block = some.patterns.astype(np.uint16)
        layout = Layout((16, 16), (16, 16))
        with DatacubeWriter(path, (side, side, size, size), np.uint16, layout=layout, attrs={}) as writer:
            for at in writer.blocks:
                writer.write_block(*at, block)
            writer.write_variable("probe", some.probe)
        for workers in (1, 2):
            where = Path(folder, f"run{workers}")
            config = Config.load(store=path, out=where, method="correlation", device="cpu")
            with (
                dask.config.set(DASK_SETTINGS),
                LocalCluster(
                    n_workers=workers, threads_per_worker=1, dashboard_address="127.0.0.1:0"
                ) as cluster,
                Client(cluster) as client,
            ):
                client.run(_warm)
                before = sum(client.run(time.process_time).values())
                runner.run(config, client=client, progress=False)
                cpu = sum(client.run(time.process_time).values()) - before
            summary = json.loads((where / "summary.json").read_text())
            out[str(workers)] = {
                "patterns_per_s": summary["patterns_per_s"],
                "cpu_ms_per_pattern": 1e3 * cpu / summary["patterns"],
            }
    one, two = out["1"], out["2"]
    out["efficiency"] = {
        "wall": two["patterns_per_s"] / (2 * one["patterns_per_s"]),
        "cpu": one["cpu_ms_per_pattern"] / two["cpu_ms_per_pattern"],
    }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compute", type=float, default=1e-4, help="s per pattern on one GPU")
    parser.add_argument("--dispatch", type=float, default=Pool.dispatch_s, help="s of the driver per task")
    parser.add_argument("--bandwidth", type=float, default=Pool.bandwidth, help="of the file system, bytes/s")
    parser.add_argument("--measure", action="store_true", help="also run with 1 and 2 workers here")
    args = parser.parse_args()
    one = Pool(1, compute_s=args.compute, dispatch_s=args.dispatch, bandwidth=args.bandwidth)
    pools = {f"{n} GPUs, 4 million patterns": replace(one, workers=n) for n in (1, 8, 64, 512)}
    pools |= {f"{n} GPUs, 64 million patterns": replace(one, workers=n, blocks=65536) for n in (64, 512)}
    pools |= {"512 GPUs, dense data (stored 131 kB)": replace(one, workers=512, stored=131e3)}
    text = table(pools)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    assumed = ", ".join(f"{k} {v:g}" for k, v in vars(one).items())
    (RESULTS / "scaling.md").write_text(f"Simulated; of one worker: {assumed}\n\n{text}\n")
    if args.measure:
        found: dict = {
            "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
            "dispatch_ms": {str(n): round(1e3 * measure_dispatch(in_flight=n), 2) for n in (4, 64, 256)},
        }
        found |= measure()
        print(json.dumps(found, indent=1))
        (RESULTS / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

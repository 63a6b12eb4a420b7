"""Scatter a training library into a sharded Zarr store, on this machine or on a cluster.

    python workflows/build_training_library.py runs/library.zarr
    python workflows/build_training_library.py runs/library.zarr --split validation --n-patterns 8000
    python workflows/build_training_library.py /scratch/library.zarr --cluster cluster/profiles/slurm-cpu.yaml

Stopped at any moment, the same command continues. The default, 200 000 patterns as the disk polynomials of
50 000 orientations at four thicknesses, takes 2.3 GB and 1.2 core hours; training draws them on new detectors
each time (line ``pool: runs/library.zarr`` of the training settings). ``--contents patterns`` stores finished
patterns.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

from fcunet.cluster import connect, report_health
from fcunet.slurm import ClusterError
from fcunet.training.library import LibraryPlan, build_library


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan = LibraryPlan()
    parser.add_argument("output", help="NAME.zarr, where all workers can write")
    parser.add_argument("--split", default=plan.split, choices=("train", "validation", "test"))
    parser.add_argument("--contents", default=plan.contents, choices=("coefficients", "patterns"))
    parser.add_argument("--n-patterns", type=int, default=plan.n_patterns)
    parser.add_argument("--n-thicknesses", type=int, default=plan.n_thicknesses, help="per orientation")
    parser.add_argument("--part", type=int, default=plan.part, help="orientations or patterns per task")
    parser.add_argument("--size", type=int, default=plan.size, help="frame edge of patterns, px")
    parser.add_argument("--seed", type=int, default=plan.seed)
    parser.add_argument("--cluster", default="local", help="'local', tcp://HOST:PORT, or a profile (YAML)")
    parser.add_argument("--workers", type=int, help="worker processes; default: as many as make sense")
    parser.add_argument("--device", default="auto", help="'auto', 'cpu' or 'cuda'")
    options = vars(parser.parse_args())
    output, cluster, workers, device = (options.pop(k) for k in ("output", "cluster", "workers", "device"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    started, before, said = time.monotonic(), None, ""

    def report(done: int, total: int) -> None:
        nonlocal before
        before = done - 1 if before is None else before
        left = (time.monotonic() - started) / (done - before) * (total - done)
        logging.info("%d of %d parts, about %.0f min left", done, total, left / 60)

    def waiting(note: str) -> None:
        nonlocal said
        if note and note != said:
            logging.info(note)
        said = note

    try:
        jobs = Path(f"{output}.jobs")  # the logs of batch jobs
        with connect(cluster, workers, device=device, log_directory=jobs) as client:
            logging.info("dashboard: %s", client.dashboard_link)
            folder = build_library(
                client, output, LibraryPlan(**options), device=device, on_part=report,
                on_tick=lambda workers, done: waiting(report_health(client, workers, done)),
            )  # fmt: skip
    except ClusterError as err:
        sys.exit(str(err))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
    print(f"library in {folder}")


if __name__ == "__main__":
    main()

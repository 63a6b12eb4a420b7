"""From a raw scan to strain maps, as a script to read and to change.

On this machine, and on SLURM from a login node:

    python workflows/strain_mapping.py scan.zarr --out runs/scan
    python workflows/strain_mapping.py scan.zarr --cluster cluster/profiles/slurm-gpu.yaml --workers 16

It does what `fcunet run` does, step by step, and like it continues a run that was stopped at any moment.
"""

import argparse
from pathlib import Path

import fcunet
from fcunet.config import Config
from fcunet.remote import scan_of
from fcunet.runner import RunStopped, plan, rewrite_report, run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", help="datacube, NAME.zarr, or its URL (make one with: fcunet convert)")
    parser.add_argument("--out", type=Path, help="run directory [runs/NAME]")
    parser.add_argument("--config", type=Path, help="YAML file of settings, see workflows/configs")
    parser.add_argument("--method", default="fcunet", choices=["fcunet", "correlation"])
    parser.add_argument("--cluster", default="local", help="local, PROFILE.yaml, or tcp://scheduler:port")
    parser.add_argument("--workers", type=int, help="worker processes")
    parser.add_argument(
        "--reference", default="median", help="median, or Y0:Y1,X0:X1 of the unstrained region"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    arguments = parser.parse_args()

    # The settings of the run; every one of them has a default or is measured from the patterns.
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    settings_file, dry_run = given.pop("config", None), given.pop("dry_run")
    config = Config.load(settings_file, **given)
    print(*plan(config), sep="\n")
    if dry_run:
        return 0

    # Where the blocks are computed. The address of the dashboard is printed when the workers are there.
    cluster = config.cluster
    try:
        with fcunet.cluster(cluster.cluster, cluster.workers, device=config.detection.device) as client:
            # Peaks of every position, then lattice, strain and report; all in the run directory.
            results = run(config, client=client)
    except RunStopped as stopped:
        print(stopped)
        return 1

    # Results are a labelled tree: results["strain/e_xx"], results["lattice/g1_qy"], results["virtual/bf"]...
    strain = results["strain"].dataset
    for name in ("e_xx", "e_yy", "e_xy", "theta"):
        mean, spread = float(strain[name].mean()), float(strain[name].std())
        error = float(strain[f"{name}_std"].median())
        print(f"  {name:8}  mean {mean:+.2e}, spread {spread:.2e}, error bar {error:.1e}")

    # Change what follows, or do it in a notebook: everything is on disk.
    print(f"  report    {rewrite_report(Path(config.out or Path('runs') / scan_of(config).stem))}")
    return 1 if results.attrs["n_blocks_failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

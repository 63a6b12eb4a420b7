"""Train a network for your own microscope.

    python workflows/train_fcunet.py workflows/configs/train.yaml --out runs/mine
    torchrun --nproc-per-node 4 workflows/train_fcunet.py workflows/configs/train.yaml

Stopped at any moment, the same command continues. With ``--scatter N`` (in as many other processes as there
are free cores) it scatters N orientations into the folder `pool` of the settings instead, for the training to
draw from. With ``--calibrate WEIGHTS`` it only tunes thresholds and error bars of these weights again, on the
validation patterns of the settings.
"""

import argparse
import logging

from fcunet.nn.weights import resolve_weights
from fcunet.training.loop import recalibrate, train
from fcunet.training.pool import check_pool, fill_pool
from fcunet.training.settings import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, see workflows/configs/train.yaml")
    parser.add_argument("--out", help="folder for checkpoints, logs and weights")
    parser.add_argument("--scatter", type=int, metavar="N", help="only scatter N orientations into the pool")
    parser.add_argument("--calibrate", metavar="WEIGHTS", help="only tune thresholds and error bars of these")
    parser.add_argument("--seed", type=int, default=0, help="with --scatter: differs from process to process")
    parser.add_argument("--split", default="train", choices=("train", "validation"), help="with --scatter")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        config = TrainConfig.load(arguments.config, out=arguments.out)
        if arguments.calibrate:
            resolve_weights(arguments.calibrate)
        if config.pool is not None and not arguments.scatter:
            check_pool(
                config.pool, splits=("validation",) if arguments.calibrate else ("train", "validation")
            )
    except (FileNotFoundError, ValueError) as err:
        parser.error(str(err))
    if arguments.scatter:
        if config.pool is None:
            parser.error(f"{arguments.config} names no 'pool' to scatter into; add the line pool: runs/pool")
        fill_pool(config.pool, arguments.scatter, split=arguments.split, seed=arguments.seed)
    elif arguments.calibrate:
        print(f"weights in {recalibrate(config, arguments.calibrate)}")
    else:
        print(f"weights in {train(config)}")


if __name__ == "__main__":
    main()

"""Scattered orientations shared between processes: some scatter into a folder, others train from it."""

import os
from pathlib import Path

import numpy as np
import torch

from .dataset import (
    PatternSource,
    Pool,
    TrainingBatch,
    load_pool,
    make_orientations,
    save_pool,
    training_crystals,
)


def fill_pool(folder: str | Path, n: int, *, split: str = "train", part: int = 128, seed: int = 0) -> None:
    """Scatter `n` random orientations into `folder`, one file of `part` at a time.

    Several processes may fill one folder if their seeds differ. A file that exists is not made again, so a
    stopped process continues.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    crystals = training_crystals(split)
    for k in range(-(-n // part)):
        path = folder / f"{split}-{seed:04d}-{k:05d}.npz"
        if not path.exists():
            rng = np.random.default_rng([seed, k, 77])
            save_pool(make_orientations(crystals, min(part, n - k * part), rng), path)


def check_pool(folder: str | Path, *, splits: tuple[str, ...] = ("train", "validation")) -> None:
    """See that a folder to train from has all splits; a library (``NAME.zarr``) sees to that itself.

    Raises
    ------
    FileNotFoundError
        If a split is missing, which would show only when it is drawn from; with the command that fills it.
    """
    folder = Path(folder)
    if folder.suffix == ".zarr":
        return
    for split in splits:
        if not _finished(folder, split):
            command = "--scatter 4000" if split == "train" else f"--scatter 128 --split {split}"
            raise FileNotFoundError(
                f"the pool {os.fspath(folder)} holds no orientations of the {split!r} split; "
                f"scatter some: python workflows/train_fcunet.py SETTINGS.yaml {command}"
            )


def _finished(folder: Path, split: str) -> list[Path]:
    """Files of a pool that no process is still writing."""
    return [p for p in sorted(folder.glob(f"{split}-*.npz")) if ".partial" not in p.name]


class FolderSource:
    """Training batches from the pools of a folder; files that appear are taken up as training goes on.

    Parameters
    ----------
    folder : path
        Filled by :func:`fill_pool`.
    split, size, device, seed, **options
        As for :class:`fcunet.training.dataset.PatternSource`.
    every : int
        Batches between looks at the folder.

    Raises
    ------
    FileNotFoundError
        If the folder holds no pool of that split.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        size: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        every: int = 200,
        **options: object,
    ):
        check_pool(folder, splits=(split,))
        self.folder, self.split, self.every = Path(folder), split, every
        self._batches = 0
        self._seen: set[str] = set()
        first = Pool.concatenate(self._look())
        self._source = PatternSource(split, size, device, seed, pool=first, **options)  # type: ignore[arg-type]

    def batch(self, n: int) -> TrainingBatch:
        """The next n patterns."""
        self._batches += 1
        if self._batches % self.every == 0:
            for pool in self._look():
                self._source.extend(pool)
        return self._source.batch(n)

    def _look(self) -> list[Pool]:
        """Read the files not seen yet."""
        new = [p for p in _finished(self.folder, self.split) if p.name not in self._seen]
        self._seen.update(p.name for p in new)
        return [load_pool(p) for p in new]

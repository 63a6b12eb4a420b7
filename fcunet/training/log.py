"""What a training writes while it runs: CSV always, TensorBoard if installed, one line on a terminal."""

import csv
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .losses import Losses

LOG_NAME, VALIDATION_NAME = "log.csv", "validation.csv"


class Moment(NamedTuple):
    """Where a training stands."""

    step: int
    samples: int
    elapsed_s: float


class TrainingLog:
    """log.csv, validation.csv, TensorBoard if it is installed. Rows past the resumed step are dropped."""

    COLUMNS = ("step", "samples", "elapsed_s", "learning_rate", "loss", "bragg", "position", "amplitude")

    def __init__(self, folder: Path, step: int):
        self.log_path, self.validation_path = folder / LOG_NAME, folder / VALIDATION_NAME
        for path in (self.log_path, self.validation_path):
            _truncate_csv(path, step)
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        except ImportError:
            pass

    def losses(self, moment: Moment, rate: float, losses: Losses) -> None:
        """One row of losses."""
        values = [f"{float(v.detach()):.5f}" for v in losses]
        row = [moment.step, moment.samples, round(moment.elapsed_s, 1), f"{rate:.3e}", *values]
        _append_csv(self.log_path, self.COLUMNS, row)
        if self.board is not None:
            for name, value in zip(Losses._fields, losses, strict=True):
                self.board.add_scalar(f"loss/{name}", float(value.detach()), moment.step)

    def validation(self, moment: Moment, figures: Mapping[float, Mapping[str, float]], score: float) -> None:
        """One row per dose."""
        for dose, values in figures.items():
            columns = ("step", "samples", "elapsed_s", "dose", "score", *values)
            row = [moment.step, moment.samples, round(moment.elapsed_s, 1), f"{dose:g}", f"{score:.5g}"]
            _append_csv(self.validation_path, columns, row + [f"{v:.5g}" for v in values.values()])
            if self.board is not None:
                for name, value in values.items():
                    self.board.add_scalar(f"validation_{dose:g}/{name}", value, moment.step)


class ProgressLine:
    """One line on stderr, rewritten."""

    def __init__(self, shown: bool):
        self.shown = shown

    def show(self, done: float, moment: Moment, losses: Losses) -> None:
        """Share done, samples per second, losses, time left."""
        if not self.shown:
            return
        rate = moment.samples / max(moment.elapsed_s, 1e-9)
        left = moment.elapsed_s * (1 - done) / max(done, 1e-9)
        bar = "#" * round(20 * done)
        sys.stderr.write(
            f"\r[{bar:<20}] {done:5.1%}  {rate:6.0f} patterns/s  "
            f"loss {float(losses.total.detach()):7.3f}  {left / 60:5.1f} min left "
        )
        sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if self.shown:
            sys.stderr.write("\n")


def _append_csv(path: Path, columns: tuple[str, ...], row: list[Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(columns)
        writer.writerow(row)


def _truncate_csv(path: Path, step: int) -> None:
    """Drop rows past `step`, and a last line cut short by a kill."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    n_columns = lines[0].count(",") if lines else 0

    def kept(line: str) -> bool:
        first = line.split(",", 1)[0]
        return line.endswith("\n") and line.count(",") == n_columns and first.isdigit() and int(first) <= step

    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines[:1] + [line for line in lines[1:] if kept(line)]))
    os.replace(partial, path)

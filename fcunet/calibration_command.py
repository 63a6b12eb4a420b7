"""What ``fcunet calibrate`` does: measure, keep, draw; or carry over, or take back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .calibration_store import apply_from, reset, save
from .kernels.ellipse import Ellipse
from .recalibrate import measure
from .remote import local
from .session import write_bytes
from .store import open_datacube

__all__ = ["calibrate_store"]


def calibrate_store(
    store: str | Path,
    *,
    other: Path | None = None,
    undo: bool = False,
    figure: Path | None = None,
    dry_run: bool = False,
    options: Mapping[str, Any],
) -> list[str]:
    """Lines to print.

    Parameters
    ----------
    store : path
        The datacube.
    other : path, optional
        Take the calibration of this datacube.
    undo : bool
        Take an earlier calibration back.
    figure : path, optional
        Default ``NAME_calibration.png`` beside the store.
    dry_run : bool
        Keep nothing; the figure is drawn all the same.
    options : mapping
        Arguments of `fcunet.recalibrate.measure`; `ellipse` and `rotation` as text.
    """
    store = local(
        store,
        "a calibration is kept with the scan, and stores at URLs are only read; calibrate a copy here, then "
        "put it there",
    )
    if undo:
        return ["  put back  " + ", ".join(reset(store)), f"next: fcunet calibrate {store}"]
    if other is not None:
        lines = [f"  {line}" for line in apply_from(store, other, dry_run=dry_run)]
        done = "not kept (--dry-run)" if dry_run else f"kept in {store}   next: fcunet preview {store}"
        return [*lines, done]
    chosen = dict(options)
    chosen["ellipse"] = _ellipse(str(options.get("ellipse", "none")))
    chosen["rotation"] = _rotation(str(options.get("rotation", "measure")))
    datacube = open_datacube(store)
    measured = measure(datacube, **chosen)
    lines = [f"  measured  {line}" for line in measured.lines]
    lines += [f"  note      {text}" for text in measured.warnings]
    from .plot import calibration_evidence, to_png  # matplotlib, not needed before

    path = figure or store.with_name(store.stem + "_calibration.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, to_png(calibration_evidence(measured)))
    if dry_run:
        return [*lines, f"wrote     {path}   nothing kept (--dry-run)"]
    save(store, measured)
    return [*lines, f"wrote     {path}", f"kept in {store}   next: fcunet preview {store}"]


def _ellipse(text: str) -> str | Ellipse:
    if "," not in text:
        return text
    try:
        ratio, angle = (float(v) for v in text.split(","))
    except ValueError:
        raise ValueError(
            f"--ellipse is {text!r}; write none, ring, crystal, or RATIO,ANGLE such as --ellipse 1.03,25"
        ) from None
    if not 1 <= ratio < 2:
        raise ValueError(
            f"--ellipse has the axis ratio {ratio:g}; it is the long axis over the short, from 1"
        )
    return Ellipse(ratio, angle % 180)


def _rotation(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text

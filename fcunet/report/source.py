"""What is known of a finished run, for its report."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .. import schema
from ..calibration import Calibration
from ..config import Config
from ..pipeline import compare_with_truth
from ..schema import STRAIN_COMPONENTS
from ..store import load_calibration, open_results

_DETECTORS = {
    "fcunet": "FCU-Net",
    "correlation": "correlation",
    "cepstral": "cepstral, no disks",
}


@dataclass
class Run:
    """What is known of a finished run; parts that are missing are None or empty."""

    folder: Path
    tree: xr.DataTree
    config_text: str
    config: Config | None
    summary: dict[str, Any]
    calibration: Calibration | None
    errors: dict[str, dict[str, float]] | None
    notes: list[str] = field(default_factory=list)

    @property
    def strain(self) -> xr.Dataset:
        return self.tree["strain"].dataset

    @property
    def lattice(self) -> xr.Dataset:
        return self.tree["lattice"].dataset

    @property
    def virtual(self) -> xr.Dataset:
        """By-products of the pass that found the peaks; empty if there are none."""
        return self.tree["virtual"].dataset if "virtual" in self.tree.children else xr.Dataset()

    @property
    def attrs(self) -> Mapping[Any, Any]:
        return self.tree.attrs

    @property
    def title(self) -> str:
        return str(self.attrs.get("input_title") or self.folder.name)

    @property
    def found(self) -> np.ndarray:
        """True where there is a lattice (scan_y, scan_x)."""
        return np.isfinite(self.strain["e_xx"].values)

    @property
    def detector(self) -> str:
        """What found the peaks, in words; empty if that is not known."""
        if elsewhere := self.attrs.get("peaks_from"):
            return f"peaks from {elsewhere} ({self.attrs.get('source_format', 'found elsewhere')})"
        return _DETECTORS.get(self.config.detection.method, "") if self.config else ""


def load_run(folder: str | Path, tree: xr.DataTree | None = None) -> Run:
    """Read the results of a run and what lies beside them.

    Raises
    ------
    FileNotFoundError, ValueError
        If there are no results.
    """
    folder = Path(folder)
    tree = open_results(folder) if tree is None else tree
    schema.check_results(tree, str(folder))
    tree = tree.load()
    notes: list[str] = []
    config_path, summary_path, peaks = folder / "config.yaml", folder / "summary.json", folder / "peaks.zarr"
    text = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    config = None
    if text:
        try:
            config = Config.load(config_path)
        except ValueError as err:
            notes.append(f"config.yaml cannot be read: {err}")
    summary = json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.is_file() else {}
    calibration = load_calibration(peaks) if (peaks / "calibration").is_dir() else None
    errors = None
    if "truth" in tree.children:
        errors = compare_with_truth(tree["strain"].dataset, tree["truth"].dataset)
    return Run(folder, tree, text, config, summary, calibration, errors, notes)


def headline(run: Run) -> dict[str, str]:
    """The few numbers a reader wants first, in words."""
    found = run.found
    boxes = {
        "positions": f"{found.shape[0]} x {found.shape[1]}",
        "with a lattice": f"{100 * found.mean():.1f} %",
        "residual of the fit": number(median(run.lattice["fit_error"].values), ".3f", " px"),
    }
    stds = [run.strain[f"{c}_std"].values for c in STRAIN_COMPONENTS[:3] if f"{c}_std" in run.strain]
    if stds:
        boxes["error bar of the strain"] = number(1e3 * median(np.stack(stds)), ".2f", " x 1e-3")
    if run.errors:
        boxes["rms error of e_xx"] = number(1e3 * run.errors["e_xx"]["rms"], ".2f", " x 1e-3")
    return boxes


def median(values: Any) -> float:
    """Median of what is finite; NaN if nothing is."""
    array = np.asarray(values, dtype=float)
    return float(np.nanmedian(array)) if np.isfinite(array).any() else math.nan


def number(value: float, form: str = ".3g", unit: str = "") -> str:
    """A number with its unit; "none" for NaN."""
    return "none" if not math.isfinite(value) else f"{value:{form}}{unit}"

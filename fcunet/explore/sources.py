"""Where the numbers behind a result lie: maps in the tree, peaks and patterns read one position at a time."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .. import schema
from ..calibration import Calibration
from ..remote import Place, place
from ..store import load_calibration, open_datacube, open_peaks, open_results
from ..whereabouts import cut_to_region, find_scan, places, same_scan

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
_DEFAULT_RADIUS = 4.0


@dataclass
class Sources:
    """What an explorer reads from; parts may be missing, and `missing` says why.

    Attributes
    ----------
    tree : DataTree
        The results, lazy.
    folder : Path or None
        The run directory, if the results came from one.
    peaks, datacube : Dataset or None
        Lazy; the datacube is cut to the region of the run.
    calibration : Calibration or None
    missing : dict of str to str
        ``{"peaks" | "patterns": one sentence}``.
    """

    tree: xr.DataTree
    folder: Path | None = None
    scan: Place | None = None
    peaks: xr.Dataset | None = None
    datacube: xr.Dataset | None = None
    calibration: Calibration | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the scan."""
        sizes = self.tree["strain"].sizes
        return sizes["scan_y"], sizes["scan_x"]

    @property
    def radius_px(self) -> float:
        """Radius of the disks."""
        if self.calibration is not None:
            return float(self.calibration.probe_radius_px)
        stored = self.tree.attrs.get("calibration") or {}
        return float(stored.get("probe_radius_px", _DEFAULT_RADIUS))

    @property
    def title(self) -> str:
        return str(self.tree.attrs.get("input_title") or (self.folder.name if self.folder else "results"))

    def pattern(self, y: int, x: int) -> Array | None:
        """The diffraction pattern at a position (qy, qx), read now; None where it cannot be had."""
        if self.datacube is None:
            return None
        try:
            pattern = self.datacube["intensity"].isel(scan_y=y, scan_x=x).data
            pattern = pattern.compute(scheduler="synchronous") if hasattr(pattern, "compute") else pattern
        except (OSError, ValueError) as err:
            self.missing["patterns"] = f"The pattern at {y}, {x} cannot be read: {err}"
            return None
        return np.asarray(pattern, dtype=float)

    def mean_pattern(self) -> Array | None:
        """Mean pattern of the run (qy, qx), if it was kept."""
        group = self.tree.children.get("diffraction")
        if group is None or "mean" not in group.dataset:
            return None
        return np.asarray(group.dataset["mean"].values, dtype=float)

    def peaks_at(self, y: int, x: int) -> dict[str, Array]:
        """`peak_qy, peak_qx, peak_intensity, peak_sigma` of a position, without padding; empty if missing."""
        names = [n for n in schema.PEAK_VARIABLES if self.peaks is not None and n in self.peaks]
        if self.peaks is None or not names:
            return {n: np.empty(0) for n in schema.PEAK_VARIABLES}
        one = self.peaks[names].isel(scan_y=y, scan_x=x).compute(scheduler="synchronous")
        good = np.isfinite(one["peak_qy"].values)
        nothing = np.full(int(good.sum()), np.nan)
        found = {n: np.asarray(one[n].values, dtype=float)[good] for n in names}
        return {n: found.get(n, nothing) for n in schema.PEAK_VARIABLES}

    def shared_dilation_at(self, y: int, x: int) -> tuple[float, float]:
        """Standard deviation of the dilation that the peaks of a position share, and its signed part."""
        lattice = self.tree["lattice"].dataset
        std, signed = (float(lattice[n][y, x]) if n in lattice else 0.0 for n in schema.SHARED_DILATION)
        return std, signed

    def lattice_at(self, y: int, x: int) -> tuple[Array, Array, Array]:
        """Origin (2,), g (2, 2) and covariance (6, 6) at a position; NaN where there is no lattice."""
        lattice = self.tree["lattice"].dataset
        one = lattice.isel(scan_y=y, scan_x=x)
        values = np.array([float(one[name]) for name in schema.LATTICE_PARAMETERS])
        covariance = (
            np.asarray(one["covariance"].values, float) if "covariance" in one else np.full((6, 6), np.nan)
        )
        return values[:2], values[2:].reshape(2, 2), covariance


def find_sources(results: str | Path | xr.DataTree, scan: str | Place | xr.Dataset | None = None) -> Sources:
    """Everything that can be found of a result.

    Parameters
    ----------
    results : path or DataTree
        Run directory, its ``strain.zarr``, or the tree of `fcunet.open_results`.
    scan : path, URL or Dataset, optional
        The datacube; default is where the run found it, or beside the run directory under the same name.

    Raises
    ------
    FileNotFoundError, ValueError
        If there are no results, or `scan` is given and is another scan.
    """
    tree = results if isinstance(results, xr.DataTree) else open_results(results)
    schema.check_results(tree)
    source = tree.encoding.get("source") if isinstance(results, xr.DataTree) else str(results)
    folder = _run_folder(source)
    found = Sources(tree=tree, folder=folder)
    if 0 in found.shape:
        raise ValueError(
            f"these results hold a scan of {found.shape[0]} x {found.shape[1]} positions: nothing to explore"
        )
    if folder is not None and (folder / "peaks.zarr").is_dir():
        try:
            found.peaks = open_peaks(folder / "peaks.zarr")
            found.calibration = _calibration(folder / "peaks.zarr")
        except (OSError, ValueError) as err:
            found.missing["peaks"] = f"The peaks cannot be read: {err}"
    else:
        found.missing["peaks"] = "There is no peaks.zarr beside these results: disks cannot be marked."
    if found.peaks is not None and (found.peaks.sizes["scan_y"], found.peaks.sizes["scan_x"]) != found.shape:
        found.peaks = None
        found.missing["peaks"] = "The peaks beside these results are of another scan."
    _find_datacube(found, scan)
    return found


def _run_folder(source: Any) -> Path | None:
    """The run directory of a path to it or to something in it."""
    if not source:
        return None
    path = Path(source)
    while path.suffix == ".zarr" or (path.parent.suffix == ".zarr"):
        path = path.parent
    return path if path.is_dir() else None


def _calibration(peaks: Path) -> Calibration | None:
    return load_calibration(peaks) if (peaks / "calibration").is_dir() else None


def _find_datacube(found: Sources, scan: str | Place | xr.Dataset | None) -> None:
    if isinstance(scan, xr.Dataset):
        found.datacube = cut_to_region(found.tree, scan)
        if found.datacube is None:
            raise ValueError(
                f"the scan given has {scan.sizes['scan_y']} x {scan.sizes['scan_x']} positions, the results "
                f"{found.shape[0]} x {found.shape[1]}"
            )
        return
    if scan is not None:
        found.scan = place(scan)
        found.datacube = cut_to_region(found.tree, open_datacube(found.scan))
        if found.datacube is None or not same_scan(found.tree.attrs, found.scan):
            raise ValueError(f"{scan} is not the scan of these results; name the one they were made from")
        return
    known = find_scan(found.folder, found.tree)
    if known is not None:
        found.scan, found.datacube = known
        return
    before = places(found.folder)
    where = f" (it was {before[0].name})" if before else ""
    found.missing["patterns"] = (
        f"The scan is not where it was during the run{where}: maps and peaks still work, patterns do not. "
        "Name it: fcunet explore RUN --scan SCAN.zarr"
    )

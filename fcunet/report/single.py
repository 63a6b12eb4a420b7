"""The report of one run: what went in, how it was calibrated, what came out, and how much to trust it."""

import logging
import math
import shlex
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xarray as xr

from .. import plot, schema
from ..cepstral import in_real_space
from ..remote import scan_of
from ..schema import STRAIN_COMPONENTS
from ..store import open_peaks
from ..whereabouts import find_scan
from .opinion import doubts_of_method, residuals, second_opinion, systematic
from .page import boxes, grid, paragraph, picture, section, table, text, write_page
from .source import Run, headline, load_run, number

logger = logging.getLogger(__name__)

REPORT = "report.html"
N_SHOWN = 6  # patterns with their disks


def write_report(run_dir: str | Path, tree: xr.DataTree | None = None) -> Path:
    """Write ``report.html`` and the figures of a finished run.

    Parameters
    ----------
    run_dir : path
        The run directory, with ``strain.zarr``; ``peaks.zarr``, ``config.yaml``, ``summary.json`` and the
        scan are used if they are there.
    tree : DataTree, optional
        The results, if at hand.

    Returns
    -------
    Path
        Of ``report.html``, which needs nothing beside it. The figures are also written as PNG files.

    Raises
    ------
    FileNotFoundError, ValueError
        If there are no results to report.
    """
    run = load_run(run_dir, tree)
    sections = [
        section("What came out", _outcome(run)),
        section("How much to trust it", _trust(run)),
        section("What went in", _input(run)),
        section("How it was calibrated", _calibration(run)),
        section("How long it took, and on what", _effort(run)),
        section("How to repeat it", _repeat(run)),
    ]
    head = f'<p class="small">{text(_byline(run))}</p>{boxes(headline(run))}'
    path = run.folder / REPORT
    write_page(path, run.title, head, sections)
    return path


def _byline(run: Run) -> str:
    parts = [f"fcunet {run.attrs.get('fcunet_version', '')}".strip(), run.attrs.get("created", "")]
    if run.detector:
        parts.append(run.detector if run.attrs.get("peaks_from") else f"detector {run.detector}")
    return " | ".join(str(p) for p in parts if p)


def _outcome(run: Run) -> Iterable[str]:
    yield picture(
        "Strain: normal strains, tensor shear, and rotation (positive from +x towards +y, y down)",
        lambda **how: plot.strain(run.tree, **how),
        keep=run.folder / "strain.png",
    )
    rows = []
    for component in STRAIN_COMPONENTS:
        values = run.strain[component].values.astype(float)
        good = values[np.isfinite(values)]
        factor, unit = (math.degrees(1), "degrees") if component == "theta" else (100.0, "%")
        low, middle, high = np.percentile(good, [5, 50, 95]) * factor if good.size else (math.nan,) * 3
        rows.append([f"{component} ({unit})", *(number(v, "+.3f") for v in (low, middle, high))])
    yield grid(["", "5 % below", "median", "5 % above"], rows)
    yield table(
        {
            "reference": run.strain.attrs.get("reference"),
            "frame": run.strain.attrs.get("frame"),
            "measure": run.strain.attrs.get("measure"),
            "convention": run.strain.attrs.get("convention"),
        }
    )
    yield from _grains(run)
    if "virtual" in run.tree.children:
        yield picture(
            "Virtual images, number of peaks, residual of the fit",
            lambda **how: plot.virtual(run.tree, **how),
            keep=run.folder / "virtual.png",
        )
    if "diffraction" in run.tree.children:
        yield picture(
            "Bragg vector map: all peaks of the scan, with the lattice vectors",
            lambda **how: plot.bragg_vector_map(run.tree, **how),
            keep=run.folder / "bragg_vector_map.png",
            narrow=False,
        )


def _grains(run: Run) -> Iterable[str]:
    """The grains and how they lie, where there are several."""
    if "grain" not in run.strain or int(run.strain["grain"].values.max(initial=0)) < 2:
        return
    yield picture(
        "Grains: positions next to each other whose lattices agree",
        lambda **how: plot.grains(run.tree, **how),
        keep=run.folder / "grains.png",
        narrow=False,
    )
    yield picture(
        "Direction of g1 in each grain, and how it is spread there",
        lambda **how: plot.orientations(run.tree, **how),
        keep=run.folder / "orientations.png",
    )


def _trust(run: Run) -> Iterable[str]:
    yield from (paragraph(doubt, "note") for doubt in _doubts(run))
    if run.errors:
        yield paragraph(
            "This scan is simulated and its strain is known. Error bars are right if 68 % of the true values "
            "lie within one of them and 95 % within two."
        )
        rows = [
            [
                component,
                *(number(1e3 * error[k], form) for k, form in (("rms", ".2f"), ("bias", "+.2f"))),
                number(error["slope"], ".3f"),
                *(number(100 * error[k], ".0f", " %") for k in ("within_1", "within_2")),
            ]
            for component, error in run.errors.items()
        ]
        header = ["x 1e-3", "rms", "bias", "slope", "within 1", "within 2"]
        yield grid(header, rows)
        yield picture(
            "Truth, measurement and difference; the profile is averaged along the layers",
            lambda **how: plot.truth(run.tree, **how),
            keep=run.folder / "truth.png",
        )
    if all(f"{c}_std" in run.strain for c in STRAIN_COMPONENTS):
        yield picture(
            "One standard deviation of each component, from the errors of the peak positions",
            lambda **how: plot.error_bars(run.tree, **how),
            keep=run.folder / "error_bars.png",
        )
    yield from residuals(run)
    yield from systematic(run)
    yield from second_opinion(run)
    yield picture(
        "How the numbers are spread over the scan",
        lambda **how: plot.numbers(run.tree, **how),
        keep=run.folder / "numbers.png",
    )
    yield _detection(run)


def _doubts(run: Run) -> Iterable[str]:
    """What a careful reader should know first."""
    share = float(run.found.mean())
    if share < 0.9:
        yield (
            f"Only {100 * share:.0f} % of the positions have a lattice. Vacuum and other grains count among "
            "the rest; if it should be more, look at the patterns below and at: fcunet preview STORE"
        )
    failed = int(run.attrs.get("n_blocks_failed", 0))
    if failed:
        yield f"{failed} blocks of the scan could not be read or processed; their positions are grey."
    if "truncated" in run.virtual and (cut := float(run.virtual["truncated"].values.mean())) > 0.01:
        yield (
            f"{100 * cut:.0f} % of the patterns have more peaks than are kept: the threshold may be too low, "
            "or --max-num-peaks."
        )
    yield from doubts_of_method(run)
    yield from (run.calibration.warnings if run.calibration else ())
    yield from run.notes


def _detection(run: Run) -> str:
    """Some patterns with their disks and lattices, if the scan is still where it was."""
    peaks_path = run.folder / "peaks.zarr"
    if run.config is None or run.config.store is None or not peaks_path.is_dir():
        return ""
    known = find_scan(run.folder, run.tree)
    if known is None:
        return paragraph(
            f"The scan is not where it was during the run (it was {scan_of(run.config).name}): its patterns "
            "cannot be shown.", "small"
        )  # fmt: skip
    datacube = known[1]
    ny, nx = run.found.shape
    count = min(N_SHOWN, ny * nx)
    # spread over both axes: steps along the golden section
    at = sorted({(int((0.5 + k) * ny / count) % ny, int(nx * ((0.5 + 0.618 * k) % 1))) for k in range(count)})
    radius = run.calibration.probe_radius_px if run.calibration else 4.0
    peaks: xr.Dataset | None = open_peaks(peaks_path)
    if peaks is not None and in_real_space(peaks):
        peaks = None  # those are no disks
    reach = run.lattice.attrs.get("max_peak_spacing_px")
    return picture(
        "Patterns with the disks found: orange on the lattice, dotted blue off it, red crosses the lattice",
        lambda **how: plot.detection(
            datacube, peaks, run.lattice, at=at, radius_px=radius, max_peak_spacing=reach, **how
        ),
        keep=run.folder / "detection.png",
        narrow=False,
    )


def _input(run: Run) -> Iterable[str]:
    facts = run.attrs.get("datacube") or {}
    strain = run.strain
    steps = {}
    for dim in schema.SCAN_DIMS:
        if dim in strain.coords and strain.sizes[dim] > 1:
            step = float(strain[dim][1] - strain[dim][0])
            unit = strain[dim].attrs.get("units", schema.UNIT_PIXEL)
            steps[dim] = "not calibrated" if unit == schema.UNIT_PIXEL else f"{step:g} {unit}"
    detector = run.calibration.bad_pixels.shape if run.calibration else None
    region = run.attrs.get("region")
    known = {
        "title": run.attrs.get("input_title"),
        "scan": f"{strain.sizes['scan_y']} x {strain.sizes['scan_x']} positions",
        "step": ", ".join(dict.fromkeys(steps.values())),
        "region of the scan": "{}:{}, {}:{}".format(*region) if region else None,
        "detector": f"{detector[0]} x {detector[1]} px" if detector else None,
        "fingerprint": run.attrs.get("input_fingerprint"),
    }
    rest = {k: v for k, v in facts.items() if isinstance(v, str | int | float) and k != "title"}
    yield table(known | rest)


def _calibration(run: Run) -> Iterable[str]:
    if run.calibration is None:
        yield paragraph("No calibration is stored with this run.", "small")
        return
    yield from (paragraph(line) for line in run.calibration.describe())
    if "diffraction" in run.tree.children and "mean" in run.tree["diffraction"].dataset:
        mean = run.tree["diffraction"].dataset["mean"].values
        yield picture(
            "Mean pattern with the beam centre, the probe, and the profile of its edge",
            lambda **how: plot.calibration(run.calibration, mean, **how),
            keep=run.folder / "calibration.png",
        )
    same = run.calibration.origin.shape[:2] == run.found.shape
    if same and run.lattice.attrs.get("fit_origin", True):
        yield picture(
            "The beam as expected in each pattern, and how far from there the lattice fit found it: an "
            "independent check of the descan",
            lambda **how: plot.descan(run.calibration, run.lattice, **how),
            keep=run.folder / "descan.png",
        )


def _effort(run: Run) -> Iterable[str]:
    summary = run.summary
    if not summary:
        yield paragraph("summary.json is missing: times are not known.", "small")
    seconds = summary.get("seconds", {})
    patterns = summary.get("patterns")
    rows = {
        "patterns": f"{patterns:,}" if patterns else None,
        "rate of the detection": f"{summary['patterns_per_s']:,.0f} patterns/s"
        if summary.get("patterns_per_s")
        else None,
        "device": summary.get("device") or run.attrs.get("device"),
        "largest worker": f"{summary['peak_rss_worker'] / 2**30:.2f} GiB"
        if summary.get("peak_rss_worker")
        else None,
        **{
            f"time: {name}": f"{value:.1f} s"
            for name, value in seconds.items()
            if isinstance(value, int | float)
        },
        "job": run.attrs.get("slurm_job_id"),
        **{
            f"version of {p}": run.attrs.get(p)
            for p in ("python", "torch", "numpy", "xarray", "zarr", "dask")
        },
    }
    yield table(rows)


def _repeat(run: Run) -> Iterable[str]:
    store = run.config.store if run.config and run.config.store else "STORE.zarr"
    command = f"fcunet run {shlex.quote(str(store))}"
    if elsewhere := run.attrs.get("peaks_from"):
        command = f"fcunet strain {shlex.quote(str(elsewhere))}"
    yield f"<pre>{text(f'{command} --config config.yaml --out NEW_FOLDER')}</pre>"
    yield table(
        {
            "weights": run.attrs.get("weights_name"),
            "SHA-256 of the weights": run.attrs.get("weights_sha256"),
            "SHA-256 of the settings": run.attrs.get("config_sha256"),
            "commit": run.attrs.get("fcunet_commit"),
        }
    )
    if run.config_text:
        yield f"<details><summary>config.yaml</summary><pre>{text(run.config_text)}</pre></details>"

"""The report of a run: one HTML file that holds its figures, readable on a phone, without network."""

import base64
import html
import json
import logging
import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from . import plot, schema
from .calibration import Calibration
from .cepstral import in_real_space
from .config import Config
from .pipeline import compare_with_truth
from .preview import preview
from .schema import STRAIN_COMPONENTS
from .session import write_bytes, write_text
from .store import open_datacube, open_peaks, open_results
from .tiles import load_calibration

__all__ = ["preview", "write_report"]

logger = logging.getLogger(__name__)

REPORT = "report.html"
N_SHOWN = 6  # patterns with their disks

_CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #0072b2; --warn: #d55e00; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0.5rem 0 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; border-bottom: 1px solid var(--line); padding-bottom:
0.2rem; } p { margin: 0.5rem 0; } .small { opacity: 0.75; font-size: 0.9rem; } figure { margin: 1rem 0; }
figure img { background: #fff; border-radius: 6px; height: auto; max-width: 100%; } figcaption { font-size:
0.9rem; opacity: 0.8; } .numbers { display: grid; gap: 0.6rem; grid-template-columns: repeat(auto-fit,
minmax(9.5rem, 1fr)); margin: 1rem 0; } .numbers div { background: var(--soft); border-radius: 6px; padding:
0.5rem 0.7rem; } .numbers b { display: block; font-size: 1.25rem; } .wide { overflow-x: auto; } table {
border-collapse: collapse; font-size: 0.92rem; } td, th { border-bottom: 1px solid var(--line); padding:
0.2rem 0.9rem 0.2rem 0; text-align: left; vertical-align: top; } th { font-weight: 600; } .note { border-left:
4px solid var(--warn); padding-left: 0.7rem; } pre { background: var(--soft); border-radius: 6px; overflow-x:
auto; padding: 0.7rem; } nav a { color: var(--accent); margin-right: 0.9rem; }
"""


@dataclass
class _Run:
    """What is known of a finished run."""

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
    def attrs(self) -> Mapping[Any, Any]:
        return self.tree.attrs


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
    folder = Path(run_dir)
    run = _load(folder, open_results(folder) if tree is None else tree)
    sections = [
        _section("What came out", _outcome(run)),
        _section("How much to trust it", _trust(run)),
        _section("What went in", _input(run)),
        _section("How it was calibrated", _calibration(run)),
        _section("How long it took, and on what", _effort(run)),
        _section("How to repeat it", _repeat(run)),
    ]
    title = str(run.attrs.get("input_title") or folder.name)
    links = "".join(f'<a href="#{_anchor(name)}">{_text(name)}</a>' for name, _ in sections)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{_text(name)}</h2>{content}</section>'
        for name, content in sections
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}: strain</title><style>{_CSS}</style></head><body>"
        f'<h1>{_text(title)}</h1><p class="small">{_text(_byline(run))}</p>'
        f"{_headline(run)}<nav>{links}</nav>{body}</body></html>\n"
    )
    path = folder / REPORT
    write_text(path, page.encode("ascii", "xmlcharrefreplace").decode())  # reads right in any encoding
    return path


# --------------------------------------------------------------------------------------------------- reading


def _load(folder: Path, tree: xr.DataTree) -> _Run:
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
    return _Run(folder, tree, text, config, summary, calibration, errors, notes)


# --------------------------------------------------------------------------------------------------- writing


def _text(value: Any) -> str:
    return html.escape(str(value))


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _section(name: str, parts: Iterable[str]) -> tuple[str, str]:
    return name, "".join(parts)


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in rows.items() if v not in (None, "")
    )
    return f'<div class="wide"><table>{cells}</table></div>' if cells else ""


def _grid(header: list[str], rows: list[list[str]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{_text(c)}</th>" for c in header)
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'


def _paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{_text(text)}</p>' if kind else f"<p>{_text(text)}</p>"


def _picture(run: _Run, name: str, caption: str, draw: Callable[[], Any]) -> str:
    """A figure in the page and beside it; a note instead if the data for it are missing."""
    try:
        png = plot.to_png(draw())
    except (ValueError, KeyError) as err:
        logger.warning("no figure %s: %s", name, err)
        return _paragraph(f"{caption}: not drawn ({err})", "small")
    write_bytes(run.folder / f"{name}.png", png)
    code = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{code}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _median(values: Any) -> float:
    array = np.asarray(values, dtype=float)
    return float(np.nanmedian(array)) if np.isfinite(array).any() else math.nan


def _number(value: float, form: str = ".3g", unit: str = "") -> str:
    return "none" if not math.isfinite(value) else f"{value:{form}}{unit}"


# -------------------------------------------------------------------------------------------------- sections


def _byline(run: _Run) -> str:
    parts = [f"fcunet {run.attrs.get('fcunet_version', '')}".strip(), run.attrs.get("created", "")]
    method = run.config.detection.method if run.config else None
    found = {
        "fcunet": "detector FCU-Net",
        "correlation": "detector correlation",
        "cepstral": "cepstral, no disks",
    }.get(method or "", "")
    if elsewhere := run.attrs.get("peaks_from"):
        found = f"peaks from {elsewhere} ({run.attrs.get('source_format', 'found elsewhere')})"
    parts.append(found)
    return " | ".join(str(p) for p in parts if p)


def _headline(run: _Run) -> str:
    valid = np.isfinite(run.strain["e_xx"].values)
    boxes = {
        "positions": f"{valid.shape[0]} x {valid.shape[1]}",
        "with a lattice": f"{100 * valid.mean():.1f} %",
        "residual of the fit": _number(_median(run.lattice["fit_error"].values), ".3f", " px"),
    }
    stds = [run.strain[f"{c}_std"].values for c in STRAIN_COMPONENTS[:3] if f"{c}_std" in run.strain]
    if stds:
        boxes["error bar of the strain"] = _number(1e3 * _median(np.stack(stds)), ".2f", " x 1e-3")
    if run.errors:
        boxes["rms error of e_xx"] = _number(1e3 * run.errors["e_xx"]["rms"], ".2f", " x 1e-3")
    cells = "".join(f"<div><b>{_text(v)}</b>{_text(k)}</div>" for k, v in boxes.items())
    return f'<div class="numbers">{cells}</div>'


def _outcome(run: _Run) -> Iterable[str]:
    yield _picture(
        run,
        "strain",
        "Strain: normal strains, tensor shear, and rotation (positive from +x towards +y, y down)",
        lambda: plot.strain(run.tree),
    )
    rows = []
    for component in STRAIN_COMPONENTS:
        values = run.strain[component].values.astype(float)
        good = values[np.isfinite(values)]
        factor, unit = (math.degrees(1), "degrees") if component == "theta" else (100.0, "%")
        low, middle, high = np.percentile(good, [5, 50, 95]) * factor if good.size else (math.nan,) * 3
        rows.append([f"{component} ({unit})", *(_number(v, "+.3f") for v in (low, middle, high))])
    yield _grid(["component", "5 % are below", "median", "5 % are above"], rows)
    yield _table(
        {
            "reference": run.strain.attrs.get("reference"),
            "frame": run.strain.attrs.get("frame"),
            "measure": run.strain.attrs.get("measure"),
            "convention": run.strain.attrs.get("convention"),
        }
    )
    if "virtual" in run.tree.children:
        yield _picture(
            run,
            "virtual",
            "Virtual images, number of peaks, residual of the fit",
            lambda: plot.virtual(run.tree),
        )
    if "diffraction" in run.tree.children:
        yield _picture(
            run,
            "bragg_vector_map",
            "Bragg vector map: all peaks of the scan, with the lattice vectors",
            lambda: plot.bragg_vector_map(run.tree),
        )


def _trust(run: _Run) -> Iterable[str]:
    for text in _doubts(run):
        yield _paragraph(text, "note")
    if run.errors:
        yield _paragraph(
            "This scan is simulated and its strain is known. Error bars are right if 68 % of the true values "
            "lie within one of them and 95 % within two."
        )
        rows = [
            [
                component,
                *(_number(1e3 * error[k], form) for k, form in (("rms", ".2f"), ("bias", "+.2f"))),
                _number(error["slope"], ".3f"),
                *(_number(100 * error[k], ".0f", " %") for k in ("within_1", "within_2")),
            ]
            for component, error in run.errors.items()
        ]
        header = ["component", "rms x 1e-3", "bias x 1e-3", "slope", "within 1", "within 2"]
        yield _grid(header, rows)
        yield _picture(
            run,
            "truth",
            "Truth, measurement and difference; the profile is averaged along the layers",
            lambda: plot.truth(run.tree),
        )
    if all(f"{c}_std" in run.strain for c in STRAIN_COMPONENTS):
        yield _picture(
            run,
            "error_bars",
            "One standard deviation of each component, from the errors of the peak positions",
            lambda: plot.error_bars(run.tree),
        )
    yield _picture(run, "numbers", "How the numbers are spread over the scan", lambda: plot.numbers(run.tree))
    yield _detection(run)


def _doubts(run: _Run) -> Iterable[str]:
    """What a careful reader should know first."""
    share = float(np.isfinite(run.strain["e_xx"].values).mean())
    if share < 0.9:
        yield (
            f"Only {100 * share:.0f} % of the positions have a lattice. Vacuum and other grains count among "
            "the rest; if it should be more, look at the patterns below and at: fcunet preview STORE"
        )
    failed = int(run.attrs.get("n_blocks_failed", 0))
    if failed:
        yield f"{failed} blocks of the scan could not be read or processed; their positions are grey."
    virtual = run.tree["virtual"].dataset if "virtual" in run.tree.children else xr.Dataset()
    if "truncated" in virtual and (cut := float(virtual["truncated"].values.mean())) > 0.01:
        yield (
            f"{100 * cut:.0f} % of the patterns have more peaks than are kept: the threshold may be too low, "
            "or --max-num-peaks."
        )
    yield from (run.calibration.warnings if run.calibration else ())
    yield from run.notes


def _detection(run: _Run) -> str:
    """Some patterns with their disks and lattices, if the scan is still where it was."""
    store = run.config.store if run.config else None
    peaks_path = run.folder / "peaks.zarr"
    if store is None or not peaks_path.is_dir():
        return ""
    try:
        datacube = open_datacube(store)
    except (OSError, ValueError) as err:
        logger.info("patterns are not shown: %s", err)
        return _paragraph(
            "The scan is not where it was during the run: its patterns cannot be shown.", "small"
        )
    if run.config is not None and run.config.region is not None:
        y0, y1, x0, x1 = run.config.region
        datacube = datacube.isel(scan_y=slice(y0, y1), scan_x=slice(x0, x1))
    ny, nx = run.strain.sizes["scan_y"], run.strain.sizes["scan_x"]
    if (datacube.sizes["scan_y"], datacube.sizes["scan_x"]) != (ny, nx):
        return _paragraph("The scan at its place is another one: its patterns are not shown.", "small")
    count = min(N_SHOWN, ny * nx)
    # spread over both axes: steps along the golden section
    at = sorted({(int((0.5 + k) * ny / count) % ny, int(nx * ((0.5 + 0.618 * k) % 1))) for k in range(count)})
    radius = run.calibration.probe_radius_px if run.calibration else 4.0
    peaks: xr.Dataset | None = open_peaks(peaks_path)
    if peaks is not None and in_real_space(peaks):
        peaks = None  # those are no disks
    reach = run.lattice.attrs.get("max_peak_spacing_px")
    return _picture(
        run,
        "detection",
        "Patterns with the disks found: orange on the lattice, dotted blue off it, red crosses the lattice",
        lambda: plot.detection(datacube, peaks, run.lattice, at=at, radius_px=radius, max_peak_spacing=reach),
    )


def _input(run: _Run) -> Iterable[str]:
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
    yield _table(known | rest)


def _calibration(run: _Run) -> Iterable[str]:
    if run.calibration is None:
        yield _paragraph("No calibration is stored with this run.", "small")
        return
    yield from (_paragraph(line) for line in run.calibration.describe())
    if "diffraction" in run.tree.children and "mean" in run.tree["diffraction"].dataset:
        mean = run.tree["diffraction"].dataset["mean"].values
        yield _picture(
            run,
            "calibration",
            "Mean pattern with the beam centre, the probe, and the profile of its edge",
            lambda: plot.calibration(run.calibration, mean),
        )


def _effort(run: _Run) -> Iterable[str]:
    summary = run.summary
    if not summary:
        yield _paragraph("summary.json is missing: times are not known.", "small")
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
    yield _table(rows)


def _repeat(run: _Run) -> Iterable[str]:
    store = run.config.store if run.config and run.config.store else "STORE.zarr"
    command = f"fcunet run {shlex.quote(str(store))}"
    if elsewhere := run.attrs.get("peaks_from"):
        command = f"fcunet strain {shlex.quote(str(elsewhere))}"
    yield f"<pre>{_text(f'{command} --config config.yaml --out NEW_FOLDER')}</pre>"
    yield _table(
        {
            "weights": run.attrs.get("weights_name"),
            "SHA-256 of the weights": run.attrs.get("weights_sha256"),
            "SHA-256 of the settings": run.attrs.get("config_sha256"),
            "commit": run.attrs.get("fcunet_commit"),
        }
    )
    if run.config_text:
        yield f"<details><summary>config.yaml</summary><pre>{_text(run.config_text)}</pre></details>"

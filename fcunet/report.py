"""One self-contained HTML page per run: what went in, how it was calibrated, what came out, how far to trust it.

The page carries its figures inside, loads nothing from anywhere, and reads on a phone as on a wide screen, light or
dark. The figures also lie beside it as PNG files.
"""

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import yaml

from . import plot
from .pipeline import compare_with_truth
from .schema import STRAIN_COMPONENTS
from .session import write_text
from .store import open_peaks, open_results
from .tiles import load_calibration

NAME = "report.html"
_MANY_PERCENT, _FEW_PERCENT = 95, 50

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
table { border-collapse: collapse; font-size: .92rem; display: block; overflow-x: auto; }
td, th { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .85rem; border-radius: 4px; }
.note { border-left: 4px solid #e69f00; padding: .2rem .8rem; background: var(--soft); }
"""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` and its figures into a run directory with finished results.

    Parameters
    ----------
    run_dir : path
        As left by :func:`fcunet.run`.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    FileNotFoundError
        If the directory holds no results.
    """
    out = Path(run_dir)
    tree = open_results(out)
    peaks_path = out / "peaks.zarr"
    peaks = open_peaks(peaks_path)
    calibration = load_calibration(peaks_path)
    figures = {
        "strain": plot.strain(tree),
        "error_bars": plot.error_bars(tree),
        "virtual": plot.virtual(tree),
        "bragg_vector_map": plot.bragg_vector_map(tree),
        "calibration": plot.calibration(calibration, tree["diffraction/mean"].values),
        "numbers": plot.numbers(tree),
    }
    if "truth" in tree.children:
        figures["truth"] = plot.truth(tree)
    images = {name: plot.to_png(figure) for name, figure in figures.items()}
    for name, png in images.items():
        _write_bytes(out / f"{name}.png", png)
    write_text(out / NAME, _page(out, tree, peaks, calibration, images))
    return out / NAME


def _page(
    out: Path, tree: xr.DataTree, peaks: xr.Dataset, calibration: Any, images: Mapping[str, bytes]
) -> str:
    attrs, strain = tree.attrs, tree["strain"].to_dataset()
    title = str(attrs.get("input_title") or out.name)
    parts = [f"<h1>{escape(title)}</h1>", _verdict(tree)]

    parts += ["<h2>What went in</h2>", _table(_input_facts(attrs, peaks))]
    parts += ["<h2>How it was calibrated</h2>", _table(_pairs(calibration.describe()))]
    parts += [f"<p class='note'>{escape(text)}</p>" for text in calibration.warnings]
    parts += [
        _image(images, "calibration", "probe, mean pattern, descan"),
        _image(images, "bragg_vector_map", "Bragg vector map"),
    ]

    parts += ["<h2>What came out</h2>", _image(images, "strain", "strain"), _table(_strain_facts(strain))]
    parts += [_image(images, "virtual", "virtual images")]

    parts += [
        "<h2>How much to trust it</h2>",
        _image(images, "error_bars", "error bars"),
        _image(images, "numbers", "histograms"),
    ]
    if "truth" in images:
        parts += [
            "<h3>Against the truth of the simulation</h3>",
            _truth_table(tree),
            _image(images, "truth", "truth and difference"),
        ]

    parts += ["<h2>How long it took, and on what</h2>", _table(_cost(out, attrs))]
    parts += ["<h2>How to repeat it</h2>", _repeat(out, attrs)]
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
        f"content='width=device-width, initial-scale=1'><title>{escape(title)}: strain</title>"
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _verdict(tree: xr.DataTree) -> str:
    """One sentence on the share of positions with a lattice, and what to do when it is small."""
    valid = tree["strain/valid"].values
    share = 100 * float(valid.mean()) if valid.size else 0.0
    text = f"{int(valid.sum()):,} of {valid.size:,} positions have a lattice ({share:.1f} %)."
    failed = int(tree.attrs.get("n_blocks_failed", 0))
    if failed:
        text += f" {failed} of {tree.attrs.get('n_blocks')} blocks could not be processed and are empty; see summary.json."
    if share < _FEW_PERCENT:
        text += (
            " Most positions have none: look at a few patterns with fcunet preview before using these maps."
        )
    return f"<p class='{'note' if share < _MANY_PERCENT or failed else 'good'}'>{escape(text)}</p>"


def _input_facts(attrs: Mapping[Any, Any], peaks: xr.Dataset) -> dict[str, str]:
    cube = attrs.get("datacube") or {}
    facts = {
        "scan": f"{peaks.sizes['scan_y']} x {peaks.sizes['scan_x']} positions",
        "peaks": f"{int(peaks['n_peaks'].sum()):,} Bragg peaks, {float(peaks['n_peaks'].mean()):.1f} per pattern",
        "intensity of a peak": str(peaks["peak_intensity"].attrs.get("long_name", "")),
        "fingerprint": str(attrs.get("input_fingerprint", "")),
    }
    known = (
        "beam_energy_keV",
        "convergence_semiangle_mrad",
        "scan_rotation_degree",
        "detector",
        "source_file",
    )
    facts |= {k.replace("_", " "): str(cube[k]) for k in known if isinstance(cube, Mapping) and k in cube}
    return {k: v for k, v in facts.items() if v}


def _pairs(lines: list[str]) -> dict[str, str]:
    """``"centre (1, 2) px | disk radius 5 px"`` and the like, one entry per part."""
    parts = [part.strip() for line in lines for part in line.split("|")]
    return {str(i): text for i, text in enumerate(parts, start=1)}


def _strain_facts(strain: xr.Dataset) -> dict[str, str]:
    facts = {}
    for name in STRAIN_COMPONENTS:
        values, std = strain[name].values, strain[f"{name}_std"].values
        values, std = values[np.isfinite(values)], std[np.isfinite(std)]
        unit, scale = ("mrad", 1e3) if name == "theta" else ("%", 100)
        if values.size:
            low, middle, high = np.percentile(values, [2, 50, 98]) * scale
            bar = f", error bar {np.median(std) * scale:.3f}" if std.size else ""
            facts[name] = f"{middle:+.3f} {unit} (2 to 98 %: {low:+.3f} to {high:+.3f}{bar})"
        else:
            facts[name] = "no position has a lattice"
    kept = ("reference", "frame", "measure", "convention", "axes")
    return facts | {k: str(strain.attrs[k]) for k in kept if k in strain.attrs}


def _truth_table(tree: xr.DataTree) -> str:
    errors = compare_with_truth(tree["strain"].to_dataset(), tree["truth"].to_dataset())
    head = "".join(
        f"<th>{h}</th>" for h in ("", "rms x 1e-3", "bias x 1e-3", "slope", "in 1 error bar", "in 2")
    )
    rows = [f"<tr>{head}</tr>"]
    for name, e in errors.items():
        share = (f"{100 * e[k]:.0f} %" if k in e else "" for k in ("within_1", "within_2"))
        cells = (f"{1e3 * e['rms']:.2f}", f"{1e3 * e['bias']:+.2f}", f"{e['slope']:.3f}", *share)
        rows.append(
            f"<tr><td>{escape(name)}</td>" + "".join(f"<td class='n'>{c}</td>" for c in cells) + "</tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _cost(out: Path, attrs: Mapping[Any, Any]) -> dict[str, str]:
    facts = {}
    summary = out / "summary.json"
    if summary.is_file():
        found = json.loads(summary.read_text())
        facts = {k: str(v) for k, v in found.items() if isinstance(v, str | int | float)}
    kept = (
        "device",
        "weights_name",
        "weights_sha256",
        "fcunet_version",
        "fcunet_commit",
        "created",
        "python",
    )
    return facts | {
        k: str(attrs[k]) for k in (*kept, "torch", "numpy", "xarray", "zarr", "dask") if k in attrs
    }


def _repeat(out: Path, attrs: Mapping[Any, Any]) -> str:
    config = json.loads(attrs["config_json"]) if "config_json" in attrs else {}
    text = yaml.safe_dump(config, sort_keys=False)
    command = "fcunet run SCAN.zarr --config config.yaml"
    return f"<pre>{escape(command)}</pre><details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"


def _table(facts: Mapping[str, str]) -> str:
    rows = (
        f"<tr><td>{escape(str(v))}</td></tr>"
        if k.isdigit()
        else f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>"
        for k, v in facts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _image(images: Mapping[str, bytes], name: str, text: str) -> str:
    data = base64.b64encode(images[name]).decode()
    return f"<p><img alt='{escape(text)}' src='data:image/png;base64,{data}'></p>"


def _write_bytes(path: Path, payload: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(payload)
    partial.replace(path)

"""Two runs compared: what was set differently, how far their strain is apart, and if error bars allow it."""

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .. import plot
from ..schema import STRAIN_COMPONENTS
from .page import grid, paragraph, picture, section, text, write_page
from .source import Run, headline, load_run, median, number

NAMES = ("A", "B")


@dataclass(frozen=True)
class _Pair:
    """Two runs, and their strain at the positions they share; None where positions cannot be matched."""

    runs: tuple[Run, Run]
    strains: tuple[xr.Dataset, xr.Dataset] | None
    notes: tuple[str, ...]


def write_comparison(a: str | Path, b: str | Path, out: str | Path | None = None) -> Path:
    """Write a page that compares two runs, position by position where they are of one scan.

    Parameters
    ----------
    a, b : path
        Run directories with results; neither is changed.
    out : path, optional
        The HTML file; default ``A_against_B.html`` in the current folder.

    Returns
    -------
    Path
        Of the page, which needs nothing beside it.

    Raises
    ------
    FileNotFoundError, ValueError
        If one of them has no results, or both are the same.
    """
    folders = [_folder(path) for path in (a, b)]
    if folders[0].resolve() == folders[1].resolve():
        raise ValueError(f"{a} and {b} are the same run; name two: fcunet report RUN_A RUN_B")
    names = _short_names(*folders)
    path = Path(out) if out is not None else Path(f"{names[0]}_against_{names[1]}.html")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file to write: --out {path / 'comparison.html'}")
    pair = _match(load_run(folders[0]), load_run(folders[1]))
    sections = [
        section("Both in numbers", _numbers(pair)),
        section("What was set differently", _settings(pair)),
        section("Strain of both", _strain(pair)),
        section("How far apart", _apart(pair)),
        section("Where each found a lattice", _found(pair)),
        section("How to repeat them", _repeat(pair, path)),
    ]
    words = "; ".join(f"{n}: {name}" for n, name in zip(NAMES, names, strict=True))
    head = f'<p class="small">{text(words)}</p>' + "".join(paragraph(note, "note") for note in pair.notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, f"{pair.runs[0].title}: two runs", head, sections)
    return path


def _folder(path: str | Path) -> Path:
    """The run directory of a path to it or to one of its stores."""
    path = Path(path)
    return path.parent if path.name in ("peaks.zarr", "strain.zarr") else path


def _short_names(a: Path, b: Path) -> tuple[str, str]:
    """The last parts of both paths, as many as it takes to tell them apart."""
    parts = a.resolve().parts, b.resolve().parts
    n = next(n for n in range(1, 1 + max(map(len, parts))) if parts[0][-n:] != parts[1][-n:])
    return tuple("-".join(p.strip("/") for p in one[-n:]) for one in parts)  # type: ignore[return-value]


def _match(a: Run, b: Run) -> _Pair:
    """The positions that both runs hold."""
    notes: list[str] = []
    prints = [r.attrs.get("input_fingerprint") for r in (a, b)]
    titles = [r.attrs.get("input_title") for r in (a, b)]
    if titles[0] != titles[1]:
        notes.append(f"The titles of the scans differ: {titles[0] or 'none'} and {titles[1] or 'none'}.")
    elif None not in prints and prints[0] != prints[1]:
        notes.append(
            "The metadata of the scan changed between the runs: it was calibrated or converted anew, or "
            "these are two scans."
        )
    strains = _shared(a, b)
    if strains is None:
        sizes = [" x ".join(map(str, r.found.shape)) for r in (a, b)]
        notes.append(
            f"A has {sizes[0]} positions and B {sizes[1]}, and they cannot be matched: only summaries are "
            "compared."
        )
    else:
        frames = [s.attrs.get("frame") for s in strains]
        turns = [float(s.attrs.get("rotation_degree", 0.0)) for s in strains]
        if frames[0] != frames[1] or abs(turns[0] - turns[1]) > 0.01:
            notes.append(
                f"The strain is in different frames ({frames[0]}, {turns[0]:g} degrees, and {frames[1]}, "
                f"{turns[1]:g} degrees): its components are not the same quantities."
            )
        if strains[0].attrs.get("reference") != strains[1].attrs.get("reference"):
            notes.append("The references differ, so that a constant offset of the strain means nothing.")
    return _Pair((a, b), strains, tuple(notes))


def _shared(a: Run, b: Run) -> tuple[xr.Dataset, xr.Dataset] | None:
    """The strain of both where their regions overlap; None where they do not, or cannot be placed."""
    corners, ends = [], []
    for run in (a, b):
        region = run.attrs.get("region")
        y0, y1, x0, x1 = (int(v) for v in region or (0, run.found.shape[0], 0, run.found.shape[1]))
        corners.append((y0, y1, x0, x1))
        ends.append((y1, x1) if not region else (np.inf, np.inf))  # of the scan, as far as it is known
    (ay0, ay1, ax0, ax1), (by0, by1, bx0, bx1) = corners
    if any(y1 > end[0] or x1 > end[1] for _, y1, _, x1 in corners for end in ends):
        return None
    y0, y1, x0, x1 = max(ay0, by0), min(ay1, by1), max(ax0, bx0), min(ax1, bx1)
    if y1 <= y0 or x1 <= x0:
        return None
    cut = [
        run.strain.isel(scan_y=slice(y0 - c[0], y1 - c[0]), scan_x=slice(x0 - c[2], x1 - c[2]))
        for run, c in zip((a, b), corners, strict=True)
    ]
    return cut[0], cut[1]


# -------------------------------------------------------------------------------------------------- sections


def _numbers(pair: _Pair) -> Iterable[str]:
    columns = [_facts(run) for run in pair.runs]
    names = dict.fromkeys([*columns[0], *columns[1]])
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    yield grid(["", *NAMES], [row for row in rows if any(row[1:])])


def _facts(run: Run) -> dict[str, str]:
    """What is said of each run."""
    rate, seconds = run.summary.get("patterns_per_s"), run.summary.get("seconds", {})
    facts = {"peaks found by": run.detector} | headline(run)
    facts.pop("rms error of e_xx", None)
    if run.errors:
        facts |= {
            f"rms error of {c}": number(1e3 * error["rms"], ".2f", " x 1e-3")
            for c, error in run.errors.items()
        }
    if "n_peaks" in run.virtual:
        facts["peaks per pattern"] = number(median(run.virtual["n_peaks"].values), ".0f")
    facts |= {
        "peaks in the fit": number(median(run.lattice["n_indexed"].values), ".0f"),
        "reference": str(run.strain.attrs.get("reference", "")),
        "frame": str(run.strain.attrs.get("frame", "")),
        "blocks that failed": str(run.attrs.get("n_blocks_failed", "")),
        "patterns per second": number(rate, ",.0f") if rate else "",
        "time in all": number(seconds.get("total", math.nan), ".1f", " s") if seconds else "",
        "device": str(run.summary.get("device") or run.attrs.get("device") or ""),
        "weights": str(run.attrs.get("weights_name", "")),
        "version": str(run.attrs.get("fcunet_version", "")),
        "commit": str(run.attrs.get("fcunet_commit", "")),
        "made": str(run.attrs.get("created", "")),
    }
    return facts


def _settings(pair: _Pair) -> Iterable[str]:
    flat = [_flat(json.loads(run.attrs.get("config_json", "{}"))) for run in pair.runs]
    names = sorted(set(flat[0]) | set(flat[1]))
    rows = [
        [name, *(str(f.get(name, "")) for f in flat)]
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    ]
    if rows:
        yield grid(["setting", *NAMES], rows)
    elif flat[0]:
        yield paragraph("Nothing: both ran with the same settings.")
    else:
        yield paragraph("The settings are not stored with these results.", "small")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _strain(pair: _Pair) -> Iterable[str]:
    strains = pair.strains
    if strains is None:
        for name, run in zip(NAMES, pair.runs, strict=True):
            yield picture(f"Strain of {name}", lambda run=run, **how: plot.strain(run.tree, **how))
        return
    yield picture(
        "A, B, and B minus A, which has a colour range of its own; grey: no lattice",
        lambda **how: plot.two_runs(*strains, **how),
    )


def _apart(pair: _Pair) -> Iterable[str]:
    strains = pair.strains
    if strains is None:
        yield paragraph("Positions cannot be matched, so there are no differences.", "small")
        return
    rows = [_row(component, *strains) for component in STRAIN_COMPONENTS]
    yield grid(["x 1e-3", "median", "rms about it", "joint bar", "within 1", "within 2", "correl."], rows)
    yield paragraph(
        "B minus A; the joint bar is the median of the error bars of both, added in squares. If they were "
        "right and independent, 68 % of the differences would lie within one and 95 % within two, about the "
        "median. Two runs on the same "
        "patterns share their noise and should lie closer; fewer within it means that one of them, or both, "
        "is wrong by more than it says."
    )
    yield picture(
        "Differences of the two runs; dashed: as their error bars predict for independent errors",
        lambda **how: plot.difference(*strains, **how),
    )


def _row(component: str, a: xr.Dataset, b: xr.Dataset) -> list[str]:
    """One component: offset, spread, joint error bar, and how the two agree."""
    values = [np.asarray(d[component].values, dtype=float) for d in (a, b)]
    rest = values[1] - values[0]
    seen = np.isfinite(rest)
    if not seen.any():
        return [component, *["none"] * 6]
    offset = float(np.median(rest[seen]))
    about = rest - offset
    spread = math.sqrt(float(np.mean(about[seen] ** 2)))
    joint, within = math.nan, [math.nan, math.nan]
    if all(f"{component}_std" in d for d in (a, b)):
        sigma = np.hypot(*(np.asarray(d[f"{component}_std"].values, dtype=float) for d in (a, b)))
        known = seen & np.isfinite(sigma)
        if known.any():
            joint = float(np.median(sigma[known]))
            within = [float((np.abs(about[known]) <= k * sigma[known]).mean()) for k in (1, 2)]
    first, second = (v[seen] for v in values)
    varies = seen.sum() > 2 and first.std() > 0 and second.std() > 0
    correlation = float(np.corrcoef(first, second)[0, 1]) if varies else math.nan
    return [
        component,
        number(1e3 * offset, "+.2f"),
        number(1e3 * spread, ".2f"),
        number(1e3 * joint, ".2f"),
        *(number(100 * w, ".0f", " %") for w in within),
        number(correlation, ".3f"),
    ]


def _found(pair: _Pair) -> Iterable[str]:
    strains = pair.strains
    if strains is None:
        rows = [[n, f"{100 * r.found.mean():.1f} %"] for n, r in zip(NAMES, pair.runs, strict=True)]
        yield grid(["run", "positions with a lattice"], rows)
        return
    if all(np.isfinite(d["e_xx"].values).all() for d in strains):
        yield paragraph("Both have one at every position.")
        return
    yield picture(
        "Positions where both runs, one of them, or none has a lattice",
        lambda **how: plot.where_found(*strains, **how),
        narrow=False,
    )


def _repeat(pair: _Pair, path: Path) -> Iterable[str]:
    lines = []
    for name, run in zip(NAMES, pair.runs, strict=True):
        store = run.config.store if run.config and run.config.store else "STORE.zarr"
        config = shlex.quote(str(run.folder / "config.yaml"))
        lines.append(f"fcunet run {shlex.quote(str(store))} --config {config} --out NEW_{name}")
    both = " ".join(shlex.quote(str(run.folder)) for run in pair.runs)
    lines.append(f"fcunet report {both} --out {shlex.quote(str(path))}")
    yield f"<pre>{text(chr(10).join(lines))}</pre>"

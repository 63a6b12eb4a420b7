"""The table, the bars and the figures of the accuracy benchmark, from its rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .accuracy_scores import COMPONENTS

NETWORK = "FCU-Net"
ABTEM = ("abtem-sno2", "abtem-si")
_OWN = ("correlation", "radial-gradient")
Row = dict[str, Any]
HEADER = (
    "electrons", "method", "recall", "precision", "position rms px", "radial bias px", "R", "R smooth",
    "R sqrt I",
    "forbidden / allowed", "e_xx", "e_yy", "e_xy", "theta", "mean removed", "bias xx, yy", "slope xx, yy",
    "in 1 s, 2 s", "e_xx / bound", "lattices", "patterns / CPU s",
)  # fmt: skip
_ABOUT = {
    "abtem-sno2": "SnO2 [001], abTEM, 10 to 40 nm, mistilt to 6 mrad, disks of 6 px",
    "abtem-si": "Si [110], abTEM, 10 to 40 nm, mistilt to 6 mrad, disks of 6 px",
    "abtem-sno2-psf": "the same SnO2, point spread 0.8 px and 5 % background",
    "abtem-si-psf": "the same Si, point spread 0.8 px and 5 % background",
    "abtem-sno2-coarse": "SnO2 [001], pixels a third coarser, disks of 4.5 px",
    "abtem-si-coarse": "Si [110], pixels a third coarser, disks of 4.5 px",
    "abtem-sno2-all": "SnO2 [001], abTEM, 5 to 120 nm, mistilt to 20 mrad",
    "abtem-si-all": "Si [110], abTEM, 5 to 120 nm, mistilt to 20 mrad",
    "round": "zone axes of 16 crystals of held-out prototypes, round aperture",
    "ellipse": "the same, detector stretched by 3 % (known)",
    "bullseye": "the same, bullseye aperture",
    "flat": "evenly filled disks, 6 and 9 px",
    "prototypes": "single patterns of held-out prototypes, all artefacts of training",
}


def dose_name(dose: float | None) -> str:
    """As the table spells it."""
    return "no noise" if dose is None else f"{dose:.0e}".replace("e+0", "e")


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def table_row(row: Row) -> str:
    """One line of Markdown."""
    p, strain = row["peaks"], row["strain"]
    # what a template gives as intensity is no |V_g|
    amplitude = "FCU-Net" in row["method"] or "same budget" in row["method"]
    cells = [dose_name(row["dose"]), row["method"], _number(p["recall"]), _number(p["precision"])]
    cells += [_number(p["position_rms_px"], 3), _number(p["radial_bias_px"], 3)]
    cells += [_number(p[k]) if amplitude else "" for k in ("R", "R_blind", "R_sqrt_I", "forbidden_ratio")]
    if strain is None:
        cells += [""] * 10
    else:
        each = [strain[c] for c in COMPONENTS]
        cells += [_number(1e3 * e["rms"]) for e in each]
        cells.append(", ".join(_number(1e3 * e["rms_mean_removed"]) for e in each))
        cells.append(", ".join(f"{1e3 * e['bias']:+.2f}" for e in each[:2]))
        cells.append(", ".join(_number(e["slope"], 3) for e in each[:2]))
        cells.append(
            ", ".join(_number(float(np.mean([e[k] for e in each]))) for k in ("within_1", "within_2"))
        )
        cells.append(_number(each[0]["rms"] / row["bound"]["e_xx"], 1) if row["bound"] else "")
        cells.append(_number(each[0]["fitted"]))
    cells.append(_number(row["patterns_per_cpu_s"], 0))
    return "| " + " | ".join(cells) + " |"


def table(rows: list[Row]) -> str:
    """Everything, one block of rows per data set."""
    lines = []
    for name in dict.fromkeys(r["data"] for r in rows):
        lines += [
            "",
            f"**{name}**: {_ABOUT[name]}",
            "",
            "| " + " | ".join(HEADER) + " |",
            "|---" * len(HEADER) + "|",
        ]
        lines += [table_row(r) for r in rows if r["data"] == name]
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """The network beside the best of the others on the multislice scans, in Markdown; for the README."""
    names = [NETWORK, "best correlation, tuned", "best other program"]
    lines = ["| | electrons per pattern | | e_xx | e_yy | e_xy | theta | e_xx / bound |", "|" + " --- |" * 8]
    for data in (*ABTEM, *(f"{d}-psf" for d in ABTEM)):
        for dose in (None, 1e5, 1e4):
            ours = pick(rows, data, dose)
            peers = [r for r in rows if (r["data"], r["dose"]) == (data, dose) and "(" in r["method"]]
            others = [best_of(rows, data, dose, "e_xx"), min(peers, key=_e_xx, default=None)]
            for name, row in zip(names, [ours, *others], strict=True):
                if row is None:
                    continue
                label = name if row is ours else f"{name}: {row['method']}"
                first = _SHORT[data] if dose is None and row is ours else ""
                cells = [first, dose_name(dose) if row is ours else "", label]
                cells += [_number(1e3 * row["strain"][c]["rms"]) for c in COMPONENTS]
                cells.append(
                    _number(row["strain"]["e_xx"]["rms"] / row["bound"]["e_xx"], 1) if row["bound"] else ""
                )
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _e_xx(row: Row) -> float:
    value = row["strain"]["e_xx"]
    return value["rms"] if value["fitted"] > 0.9 else np.inf


_SHORT = {
    "abtem-sno2": "SnO2 [001]",
    "abtem-si": "Si [110]",
    "abtem-sno2-psf": "SnO2, point spread 0.8 px and 5 % background",
    "abtem-si-psf": "Si, the same",
}


INTRO = """# Accuracy

`{command}`, {date}, weights {sha}, {machine}. Strain in 1e-3: rms error against an exact
reference, then (mean removed) with the mean error of each crystal taken off, as a reference region would;
bias and slope for e_xx and e_yy; share of the true values inside one and two error bars, mean of the four
components; e_xx over the Cramer-Rao bound of evenly filled disks; share of the patterns in which the lattice
was found (within 2 %; the strain figures are of those). R is the R factor of |V_g| in volts over all lit
sites, forbidden ones included; beside it what a smooth fall-off and sqrt(I) reach, each with the best scale
for every single pattern. Recall and precision at 1 px, of disks wholly in the frame with at least 20
electrons. Every non-learned detector is tuned for each dose on crystals of other prototypes (`tuned.json`,
`python -m benchmarks.tune`); peers have the best of several settings and weights, chosen on these very data:
(settings) behind the name.
"""


def write_report(record: dict[str, Any], out: Path) -> None:
    """``accuracy.json``, ``accuracy.md``, ``bars.md`` and the figures."""
    from .accuracy_bars import bars
    from .accuracy_figures import draw_figures

    rows = record["rows"]
    (out / "accuracy.json").write_text(json.dumps(_rounded(record), separators=(",", ":")) + "\n")
    intro = INTRO.format(sha=record["weights"][:12], **{k: record[k] for k in ("command", "date", "machine")})
    short = "\n## In short\n\n" + summary(rows) + "\n\n## Everything\n"
    (out / "accuracy.md").write_text(intro + short + table(rows) + "\n")
    (out / "bars.md").write_text(bars(record, out))
    draw_figures(rows, out.parents[1] / "docs" / "images")


def _rounded(value: Any) -> Any:
    """Four significant digits: what a benchmark is good for, and a file that can be read."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value


def pick(rows: list[Row], data: str, dose: float | None, method: str = NETWORK) -> Row | None:
    """The row of a method, or None."""
    return next((r for r in rows if (r["data"], r["dose"], r["method"]) == (data, dose, method)), None)


def best_of(
    rows: list[Row], data: str, dose: float | None, component: str, *, peers: bool = False
) -> Row | None:
    """The non-learned detector (or peer) with the smallest rms in one component; lost lattices disqualify."""
    others = [
        r for r in rows
        if (r["data"], r["dose"]) == (data, dose)
        and (r["method"].startswith(_OWN) or (peers and "(" in r["method"]))
        and r["strain"] is not None and r["strain"][component]["fitted"] > 0.9
    ]  # fmt: skip
    return min(others, key=lambda r: r["strain"][component]["rms"], default=None)

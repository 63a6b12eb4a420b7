"""Best settings of every non-learned detector, dose by dose, on patterns of held-out prototypes.

    python -m benchmarks.tune

The patterns (`tuning` of `benchmarks.accuracy_data`) are of crystals of the validation split; the data sets
of the benchmark are not touched. One setting after the other is moved to its best value, twice round, judged
by the rms of e_xx and e_yy (geometric mean over the crystals; a lost lattice counts as an error of 2 %).
Writes ``benchmarks/results/tuned.json``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .accuracy_data import Scan, load
from .accuracy_methods import DEFAULT_OPTIONS, TUNED_FILE, VARIANTS, Method, find, fit_weights, with_weighting
from .accuracy_scores import strain_errors

WEIGHTINGS = ["sigma", "uniform", "intensity", "noise:0.02", "noise:0.1", "noise:0.3"]
GRID: dict[str, list[Any]] = {
    "min_relative_intensity": [0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4],
    "sigma_cc": [0.0, 1.0, 2.0],
    "sigma_dp": [0.0, 0.8],
    "corr_power": [1.0, 0.8],
}
OWN = {
    "none": {"kernel": ["flat", "sigmoid", "gaussian"]},
    "sqrt": {"kernel": ["flat", "sigmoid", "gaussian"]},
    "log": {"kernel": ["flat", "sigmoid", "gaussian"]},
    "power": {"kernel": ["flat", "sigmoid", "gaussian"]},
    "edges": {"base": ["none", "sqrt", "log", "power"]},
    "ring": {"base": ["none", "sqrt", "log", "power"]},
}
_LOST = 0.02


def judge(
    method: Method, scans: list[Scan], counts: list[torch.Tensor], weightings: list[str]
) -> list[float]:
    """Score of each weighting, 1e-3; all use the same detections."""
    each = np.zeros((len(scans), len(weightings)))
    for i, (scan, patterns) in enumerate(zip(scans, counts, strict=True)):
        optics = torch.tensor([[scan.energy_keV, scan.aperture]])
        peaks, _ = find(method, patterns, torch.as_tensor(scan.probe)[None], optics)
        for j, weighting in enumerate(weightings):
            weighted = with_weighting(method, weighting)
            chosen = fit_weights(weighted, peaks, patterns, scan.radius_px, scan.edge_px)
            error = strain_errors(scan, peaks, **chosen).error[:, :2]
            squared = np.minimum(np.nan_to_num(error, nan=_LOST) ** 2, _LOST**2)
            each[i, j] = np.log(np.sqrt(squared.mean()))
    return (1e3 * np.exp(each.mean(0))).tolist()


def tune(name: str, variant: str, scans: list[Scan], dose: float) -> dict[str, Any]:
    """Settings with the lowest score: options, score, and how many were tried."""
    counts = [torch.as_tensor(s.counts(dose)) for s in scans]
    weightings = WEIGHTINGS if variant in ("none", "sqrt", "log") else WEIGHTINGS[1:]
    grid = OWN[variant] | GRID
    options = {k: v for k, v in DEFAULT_OPTIONS.items() if k in grid} | {"variant": variant}
    known: dict[str, float] = {}

    def score(candidate: dict[str, Any], weighting: str) -> float:
        key = json.dumps([candidate, weighting], sort_keys=True)
        if key not in known:
            known[key] = judge(Method(name, "correlation", candidate), scans, counts, [weighting])[0]
        return known[key]

    best = untuned = np.inf
    weighting = weightings[0]
    for _ in range(2):
        before = best
        scores = judge(Method(name, "correlation", options), scans, counts, weightings)
        weighting = weightings[int(np.argmin(scores))]
        untuned = min(untuned, scores[0])
        for parameter, values in grid.items():
            options[parameter] = min(values, key=lambda v, p=parameter: score(options | {p: v}, weighting))
        best = score(options, weighting)
        if best > 0.97 * before:
            break
    return {
        "options": {k: v for k, v in options.items() if k in grid} | {"weighting": weighting},
        "score_1e-3": round(best, 3),
        "untuned_1e-3": round(untuned, 3),
        "tried": len(known),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=TUNED_FILE)
    parser.add_argument("--doses", default="inf,1e5,1e4,1e3", help="which; others stay as they are in --out")
    options = parser.parse_args()
    out: Path = options.out
    torch.set_num_threads(1)
    scans = [s.chosen(np.arange(len(s)) < 4) for s in load("tuning")[:10]]
    methods: dict[str, dict[str, Any]] = {name: {} for name in VARIANTS}
    if out.exists():
        methods |= json.loads(out.read_text())["methods"]
    record = {"command": "python -m benchmarks.tune", "data": "tuning", "patterns": sum(map(len, scans))}
    for dose in (float(d) for d in options.doses.split(",")):
        for name, variant in VARIANTS.items():
            found = tune(name, variant, scans, dose)
            methods[name][f"{min(dose, 1e7):g}"] = found
            print(f"{dose:8g} {name:26} {found['score_1e-3']:7.2f}  {found['options']}", flush=True)
        out.write_text(json.dumps(record | {"methods": methods}, indent=1) + "\n")


if __name__ == "__main__":
    main()

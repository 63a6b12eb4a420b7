"""Frame sizes and disk radii the network was not shown: recall, precision and position error of each.

    python -m benchmarks.frames [--weights default] [--patterns 32] [--dose 1e5]

Patterns of crystals of the test split, all artefacts of training included; JSON and a table go to
benchmarks/results/. Training saw frames of 128 and 256 px and radii of 2.5 to 25 px.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from fcunet.nn.weights import load_model
from fcunet.training.dataset import PatternSource, make_orientations, training_crystals
from fcunet.training.evaluate import evaluate, network_detector

# (frame, radius), px: every size at the usual radius, every radius at a usual frame
CASES = (
    (128, 6.0), (192, 6.0), (256, 6.0), (257, 6.0), (301, 6.0), (512, 6.0), (576, 6.0),
    (256, 2.0), (256, 3.0), (256, 4.0), (256, 9.0), (256, 12.5), (512, 13.5), (512, 18.0), (512, 25.0),
)  # fmt: skip
COLUMNS = ("recall", "precision", "position_median_px", "position_rms_px", "coverage_1", "coverage_2", "R")
SHARE = 1 / 6  # of the radius: recall and precision are given within 1 px, and within this


def measure(weights: str, n_patterns: int, dose: float, seed: int = 5) -> list[dict[str, float]]:
    """One row of figures per case."""
    model = load_model(weights, device="auto")
    pool = make_orientations(training_crystals("test"), 96, np.random.default_rng(seed))
    rows = []
    for size, radius in CASES:
        source = PatternSource("test", size, seed=seed, pool=pool, dose=(dose, dose), radius=(radius, radius))
        batches = [source.batch(min(8, n_patterns - i)) for i in range(0, n_patterns, 8)]
        detector = network_detector(model)
        found = {id(batch): detector(batch) for batch in batches}
        row = {"frame_px": size, "radius_px": radius}
        figures = evaluate(lambda batch, known=found: known[id(batch)], batches)
        row |= {k: figures[k] for k in COLUMNS}
        in_radii = evaluate(lambda batch, known=found: known[id(batch)], batches, match_px=SHARE * radius)
        row |= {f"{k}_within_sixth": in_radii[k] for k in ("recall", "precision")}
        rows.append(row)
    return rows


def table(rows: list[dict[str, float]]) -> str:
    """Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    return "\n".join(lines + ["| " + " | ".join(f"{row[k]:.3g}" for k in names) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="default")
    parser.add_argument("--patterns", type=int, default=32, help="per case")
    parser.add_argument("--dose", type=float, default=1e5, help="electrons per pattern")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "frames.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = measure(arguments.weights, arguments.patterns, arguments.dose)
    record = {"weights": load_model(arguments.weights).info.sha256, "dose": arguments.dose, "rows": rows}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

"""Detectors side by side: which finds disks, positions, strain and |V_g| how well, on data with exact truth.

    python -m benchmarks.accuracy

writes ``benchmarks/results/accuracy.md`` and ``.json`` (one table), ``bars.md`` (the targets, line by line)
and the figures ``docs/images/accuracy*.png``. What the data sets are is told in `benchmarks.accuracy_data`
(abTEM is needed once: ``pip install fcunet[validation]``), how the non-learned detectors were tuned in
`benchmarks.tune`. Data and detections are kept in ``runs/benchmark``, so that a second call takes a minute;
``--data`` and ``--methods`` narrow a run. Programs of `benchmarks.peers` that are installed
(``python -m benchmarks.accuracy --install-peers`` does it) and networks found in the folder ``--ablation``
(`docs/ablation.md`) are measured as well.

The reference of every strain is exact, so that errors common to a whole scan count; ``mean removed`` is what
is left of them where a reference region is used. Every non-learned detector and peer gets the lattice fit of
fcunet, and the weights that suit it: tuned as its other settings, or the best of three on the benchmark
itself for peers, which favours them.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fcunet.kernels.peaks import Peaks
from fcunet.nn.weights import load_model

from .accuracy_data import PROTOTYPES, Scan, data_folder, load, prototype_batches
from .accuracy_methods import RESULTS, VARIANTS, Method, find, fit_weights, tuned_methods, with_weighting
from .accuracy_scores import COMPONENTS, Strain, bounds, peak_figures, strain_errors
from .peers.environment import peer_python

INF = np.inf
# data set -> doses (electrons per pattern), which detectors
PLAN: dict[str, tuple[tuple[float, ...], tuple[str, ...]]] = {
    "abtem-sno2": (
        (INF, 1e6, 1e5, 1e4, 1e3),
        ("network", "maps", "tuned", "ablation", "peers", "weightings"),
    ),
    "abtem-si": ((INF, 1e6, 1e5, 1e4, 1e3), ("network", "maps", "tuned", "ablation", "peers", "weightings")),
    "abtem-sno2-psf": ((INF, 1e5, 1e4), ("network", "tuned")),
    "abtem-si-psf": ((INF, 1e5, 1e4), ("network", "tuned")),
    "abtem-sno2-coarse": ((INF, 1e5, 1e4), ("network", "tuned")),
    "abtem-si-coarse": ((INF, 1e5, 1e4), ("network", "tuned")),
    "abtem-sno2-all": ((INF, 1e5), ("network", "tuned")),
    "abtem-si-all": ((INF, 1e5), ("network", "tuned")),
    "round": ((INF, 1e5, 1e4), ("network", "tuned", "ablation")),
    "ellipse": ((INF, 1e5, 1e4), ("network", "tuned")),
    "bullseye": ((INF, 1e5, 1e4), ("network", "tuned")),
    "flat": ((1e6, 1e5, 1e4, 1e3), ("network", "tuned", "plain", "peers")),
    PROTOTYPES: ((1e7, 1e6, 1e5, 1e4, 1e3), ("network", "ablation")),
}
DEFAULT = Method("FCU-Net", "network", {"weights": "default"})
# detection of the package without any setting, and the textbook case that suits disks without texture
SHIPPED = Method("correlation, defaults", "correlation", {"variant": "log", "min_relative_intensity": 0.005})
PLAIN = Method("correlation, plain", "correlation", {"variant": "none", "min_relative_intensity": 0.002})
MAPS = Method("FCU-Net, first stage alone", "network", {"weights": "default", "stages": 1})
# program -> package, settings that compete: name in `benchmarks.peers.detect.SETTINGS`, changes to it
PEERS: dict[str, tuple[str, tuple[tuple[str, dict[str, Any]], ...]]] = {
    "py4DSTEM": ("py4dstem", (("tuned", {}), ("tuned", {"minRelativeIntensity": 0.002}), ("log", {}))),
    "LiberTEM-blobfinder": ("libertem", (("tuned", {}), ("gradient_background", {}))),
    "quantem": ("quantem", (("log", {}),)),
    "pyxem": ("pyxem", (("tuned", {}),)),
}
_PEER_DOSES = (INF, 1e6, 1e5, 1e4, 1e3)
_ABLATION_DOSES = (INF, 1e7, 1e5, 1e4)
_NETS, SAME_BUDGET = ("default", "paired", "paper"), ", same budget"


def scans_of(name: str) -> list[Scan]:
    """The patterns of a row of the plan: those in the range of the bars, or all with ``-all``."""
    if name.endswith("-all"):  # every thickness and mistilt, two of the five deformations
        return [s.chosen(np.isin(np.arange(len(s)) % 5, (1, 3))) for s in load(name.removesuffix("-all"))]
    scans = load(name)
    if name.startswith("abtem"):
        return [s.chosen(s.in_bars) for s in scans]
    return [s.chosen(np.arange(len(s)) < (32 if name == "flat" else 4)) for s in scans]


def methods_for(dose: float, wanted: tuple[str, ...], ablation: Path | None, only: str = "") -> list[Method]:
    """Detectors of one data set and dose; peers come apart, as several settings compete."""
    out = []
    if "network" in wanted:
        out.append(DEFAULT)
    if "maps" in wanted:
        out.append(MAPS)
    if "weightings" in wanted:
        out += [
            Method(f"FCU-Net, {w} weights", DEFAULT.kind, DEFAULT.options, w)
            for w in ("uniform", "intensity")
        ]
    if "tuned" in wanted:
        out.append(SHIPPED)
    if "plain" in wanted:
        out.append(PLAIN)
    if "tuned" in wanted and any(only in v.lower() for v in VARIANTS):
        out += tuned_methods(dose)
    if "ablation" in wanted and ablation is not None and dose in _ABLATION_DOSES:
        for kind in _NETS:
            folder = ablation / kind / "weights"
            if (folder / "config.json").exists():
                label = "default maps" if kind == "default" else kind
                for weighting in ("uniform",) if kind != "default" else ("sigma",):
                    out.append(
                        Method(f"{label}{SAME_BUDGET}", "network", {"weights": str(folder)}, weighting)
                    )
    return [m for m in out if only in m.name.lower()]


def _path(method: Method, data: str, dose: float, index: int) -> Path:
    return data_folder() / "peaks" / data / f"{method.kind}-{method.key}-{dose:g}-{index}.npz"


def _fingerprint(counts: torch.Tensor) -> float:
    return float(counts.double().sum() + 1e-3 * counts[0].double().square().sum())


def cached(
    method: Method, data: str, dose: float, index: int, counts: torch.Tensor
) -> tuple[Peaks, float] | None:
    """Peaks and CPU seconds of the last run, if neither the method nor the data changed."""
    path = _path(method, data, dose, index)
    if not path.exists():
        return None
    with np.load(path) as stored:
        if float(stored["fingerprint"]) != _fingerprint(counts):
            return None
        fields = {k: torch.as_tensor(stored[k]) for k in Peaks._fields if k in stored}
        for name in ("dilation_std", "dilation"):
            fields.setdefault(name, torch.zeros(len(fields["qy"])))
        return Peaks(**fields), float(stored["seconds"])


def keep(
    method: Method, data: str, dose: float, index: int, counts: torch.Tensor, peaks: Peaks, seconds: float
) -> None:
    """Store what `cached` returns."""
    path = _path(method, data, dose, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {k: getattr(peaks, k).numpy() for k in Peaks._fields}
    np.savez(path, seconds=seconds, fingerprint=_fingerprint(counts), **arrays)


def detections(
    method: Method, data: str, dose: float, index: int, counts, probes, optics
) -> tuple[Peaks, float]:
    """Peaks and CPU seconds, made or from the last run."""
    known = cached(method, data, dose, index, counts)
    if known is None:
        known = find(method, counts, probes, optics)
        keep(method, data, dose, index, counts, *known)
    return known


def score(method: Method, data: str, dose: float, scans: list[Scan]) -> dict[str, Any]:
    """One row: strain, peaks, speed; and the strain errors of every pattern."""
    found, batches, parts, seconds = [], [], [], 0.0
    for i, scan in enumerate(scans):
        counts = torch.as_tensor(scan.counts(dose))
        optics = torch.tensor([[scan.energy_keV, scan.aperture]])
        peaks, spent = detections(method, data, dose, i, counts, torch.as_tensor(scan.probe)[None], optics)
        weights = fit_weights(method, peaks, counts, scan.radius_px, scan.edge_px)
        parts.append(strain_errors(scan, peaks, **weights))
        found.append(peaks)
        batches.append(scan.batch(dose, counts.numpy()))
        seconds += spent
    strain = Strain.concatenate(parts)
    return {
        "data": data,
        "dose": None if np.isinf(dose) else dose,
        "method": method.name,
        "strain": strain.figures(),
        "peaks": peak_figures(found, batches),
        "patterns_per_cpu_s": len(strain.error) / max(seconds, 1e-9),
        "_errors": strain,
    }


def score_prototypes(method: Method, dose: float) -> dict[str, Any]:
    """The row of single patterns: no lattice, hence no strain."""
    batches = prototype_batches(dose)
    found, seconds = [], 0.0
    for i, batch in enumerate(batches):
        peaks, spent = detections(method, PROTOTYPES, dose, i, batch.pattern, batch.probe, batch.optics)
        found.append(peaks)
        seconds += spent
    n = sum(len(b) for b in batches)
    return {
        "data": PROTOTYPES,
        "dose": dose,
        "method": method.name,
        "strain": None,
        "peaks": peak_figures(found, batches),
        "patterns_per_cpu_s": n / max(seconds, 1e-9),
    }


def run_peer(
    name: str, data: str, doses: Sequence[float], scans: list[Scan], known_only: bool = False
) -> list[Method]:
    """Let a program detect all doses of a data set at once (it starts slowly); returns its methods."""
    package, choices = PEERS[name]
    methods = []
    for setting, changes in choices:
        options = {"package": package, "settings": setting, "changes": changes}
        method = Method(f"{name} ({', '.join([setting, *map(str, changes.values())])})", "peer", options)
        if known_only and not _path(method, data, doses[-1], len(scans) - 1).exists():
            continue
        methods.append(method)
        for i, scan in enumerate(scans):
            counts = [torch.as_tensor(scan.counts(d)) for d in doses]
            if all(cached(method, data, d, i, c) for d, c in zip(doses, counts, strict=True)):
                continue
            probe = torch.as_tensor(scan.probe)[None]
            peaks, seconds = find(method, torch.cat(counts), probe, torch.zeros(1, 2))
            for k, dose in enumerate(doses):
                part = Peaks(*(f[k * len(scan) : (k + 1) * len(scan)] for f in peaks))
                keep(method, data, dose, i, counts[k], part, seconds / len(doses))
    return methods


def best_of_peer(methods: list[Method], data: str, dose: float, scans: list[Scan]) -> dict[str, Any]:
    """The row of the best settings and weights, chosen on the benchmark itself."""
    weightings = ("uniform", "intensity", "noise:0.1")
    rows = [score(with_weighting(m, w), data, dose, scans) for m in methods for w in weightings]
    return min(rows, key=_badness)


def _badness(row: dict[str, Any]) -> float:
    values = [row["strain"][c] for c in ("e_xx", "e_yy")]
    lost = 1 - values[0]["fitted"]
    return (
        float(sum(v["rms"] ** 2 for v in values) + lost * 0.02**2) if np.isfinite(values[0]["rms"]) else INF
    )


def bound_of(scans: list[Scan], dose: float) -> dict[str, float] | None:
    """Cramer-Rao bound, rms over the patterns."""
    if np.isinf(dose):
        return None
    each = np.concatenate([bounds(s, dose) for s in scans])
    return {c: float(np.sqrt(np.nanmean(each[:, i] ** 2))) for i, c in enumerate(COMPONENTS)}


def by_condition(strain: Strain, scans: list[Scan]) -> list[dict[str, Any]]:
    """rms of all four components for each thickness and mistilt of the scan."""
    thickness = np.round(np.concatenate([s.thickness_nm for s in scans]), 0)
    mistilt = np.round(np.concatenate([s.mistilt_mrad for s in scans]), 1)
    out = []
    for t, m in sorted(set(zip(thickness.tolist(), mistilt.tolist(), strict=True))):
        figures = strain.chosen((thickness == t) & (mistilt == m)).figures()
        rms = {c: figures[c]["rms"] for c in COMPONENTS}
        out.append({"thickness_nm": t, "mistilt_mrad": m, "fitted": figures["e_xx"]["fitted"], **rms})
    return out


def measure(
    data: list[str],
    *,
    only: str = "",
    peers: Sequence[str] = (),
    ablation: Path | None = None,
    known_only: bool = False,
) -> list[dict[str, Any]]:
    """All rows of the data sets named; of detectors whose name holds `only`."""
    rows = []
    for name in data:
        doses, wanted = PLAN[name]
        scans = [] if name == PROTOTYPES else scans_of(name)
        shared = [d for d in doses if d in _PEER_DOSES] if "peers" in wanted else []
        others = [run_peer(p, name, shared, scans, known_only) for p in peers if only in p.lower() and shared]
        for dose in doses:
            limit = bound_of(scans, dose) if scans else None
            fresh = []
            for method in methods_for(dose, wanted, ablation, only):
                if known_only and not _path(method, name, dose, max(len(scans) - 1, 0)).exists():
                    continue
                fresh.append(score(method, name, dose, scans) if scans else score_prototypes(method, dose))
            if dose in _PEER_DOSES:
                fresh += [best_of_peer(m, name, dose, scans) for m in others if m]
            for row in fresh:
                strain = row.pop("_errors", None)
                row["bound"] = limit
                if strain is not None and name.endswith("-all"):
                    row["conditions"] = by_condition(strain, scans)
                rows.append(row)
                print(as_line(row), flush=True)
    return rows


def rows_kept(rows: list[dict[str, Any]], path: Path, data: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the last table that stay true: of networks of the ablation that are not at hand now."""
    if not path.exists():
        return []
    measured = {row["method"] for row in rows}
    before = json.loads(path.read_text())["rows"]
    return [
        r for r in before
        if r["method"].endswith(SAME_BUDGET) and r["method"] not in measured and r["data"] in data
    ]  # fmt: skip


def as_line(row: dict[str, Any]) -> str:
    """One row for the terminal: rms of the strain in 1e-3, recall, precision, R factor."""
    dose = "no noise" if row["dose"] is None else f"{row['dose']:g}"
    strain = row["strain"]
    rms = " ".join(f"{1e3 * strain[c]['rms']:6.2f}" for c in COMPONENTS) if strain else " " * 27
    p = row["peaks"]
    return (
        f"{row['data']:18} {dose:>8} {row['method']:30} {rms}  recall {p['recall']:.2f} precision "
        f"{p['precision']:.2f} position {p['position_rms_px']:.3f} R {p['R']:.2f} "
        f"{row['patterns_per_cpu_s']:.0f}/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help=f"data sets, with commas, of: {', '.join(PLAN)}")
    parser.add_argument("--methods", default="", help="only detectors whose name holds this")
    parser.add_argument("--known", action="store_true", help="only what was detected before: a table at once")
    parser.add_argument("--install-peers", action="store_true", help="install the other programs first")
    parser.add_argument(
        "--ablation", type=Path, default=Path("runs/ablation"), help="holds {default,paired,paper}/weights"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse_args()
    data = options.data.split(",") if options.data else list(PLAN)
    unknown = [d for d in data if d not in PLAN]
    if unknown:
        parser.error(f"no data set {', '.join(unknown)}; choose of: {', '.join(PLAN)}")
    torch.set_num_threads(1)
    installed = {p for p in PEERS if peer_python(PEERS[p][0], install=options.install_peers)}
    peers = [p for p in PEERS if p in installed]
    rows = measure(
        data, only=options.methods.lower(), peers=peers, ablation=options.ablation, known_only=options.known
    )
    record = {
        "command": "python -m benchmarks.accuracy",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, torch {torch.__version__}, one thread",
        "weights": load_model("default").info.sha256,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    if options.data or options.methods:  # part of the table: to be looked at, not to replace it
        (options.out / "accuracy-part.json").write_text(json.dumps(record, indent=1) + "\n")
        return
    from .accuracy_report import write_report

    rows += rows_kept(rows, options.out / "accuracy.json", data)
    record["rows"] = sorted(rows, key=lambda r: (data.index(r["data"]), -(r["dose"] or INF)))
    write_report(record, options.out)


if __name__ == "__main__":
    main()

"""How large a dilation the disks of one pattern share: the error bar that correlation states, and its scales.

    python -m benchmarks.shared_dilation                # fits and judges, five minutes on one core
    python -m benchmarks.shared_dilation --pool FOLDER  # orientations scattered before, see fill_pool

Crystals of the training prototypes, by thickness and dose, with the backgrounds and faults of the training
patterns, are searched by correlation. The two scales of each transform are those with which one and two
error bars of e_xx and e_yy hold 68.3 and 95.4 % of the true values, root mean square over groups of equal
dose and groups of similarly many disks. They are judged on the validation prototypes, and on evenly filled
disks, and belong into `fcunet.kernels.shared_dilation`. Writes ``benchmarks/results/shared_dilation.md``.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcunet.kernels.correlation import DiskFinder, disk_radius, make_kernel
from fcunet.kernels.peaks import Peaks
from fcunet.kernels.shared_dilation import DILATION_SCALES
from fcunet.training.calibration import miscoverage
from fcunet.training.dataset import PatternSource, Pool, TrainingBatch, load_pool
from fcunet.training.evaluate import affine_error, match_peaks
from fcunet.training.pool import fill_pool

RESULTS = Path(__file__).resolve().parent / "results"
DOSES = (1e3, 1e4, 1e5, 1e6, 1e7)
THICKNESSES = {"thin": (0.0, 12.0), "middling": (12.0, 45.0), "thick": (45.0, 200.0)}  # nm
ORIENTATIONS = {"train": 256, "validation": 128, "test": 256}
RADIAL = np.arange(0.0, 3.05, 0.1).round(2)
TEXTURE = np.arange(0.0, 0.37, 0.02).round(2)
DISKS = ((0, 12), (12, 25), (25, 50), (50, 1000))  # of a pattern, for the fit
_BATCH, _SIZE, _WRONG = 16, 256, 0.03  # a strain off by more is that of another lattice


class Set(NamedTuple):
    """Patterns of one thickness and dose."""

    kind: str
    electrons: float
    error: Tensor  # (k, 2) of e_yy and e_xx
    std: Tensor  # (k, 2) without a shared part
    parts: Tensor  # (k, 2) what the scales multiply
    disks: Tensor  # (k,) how many of a pattern were found


def orientations(folder: Path, split: str) -> Pool:
    """Scattered orientations of a split, one row for each thickness."""
    if not list(folder.glob(f"{split}-*.npz")):
        fill_pool(folder, ORIENTATIONS[split], split=split, part=32, seed=5)
    pool = Pool.concatenate([load_pool(path) for path in sorted(folder.glob(f"{split}-*.npz"))])
    n, series = pool.thickness.shape
    deep = ("coefficients", "scale", "thickness")
    rows = {
        f.name: getattr(pool, f.name).reshape(n * series, 1, *getattr(pool, f.name).shape[2:])
        if f.name in deep
        else np.repeat(getattr(pool, f.name), series, axis=0)
        for f in fields(Pool)
    }
    return Pool(**rows)


def between(pool: Pool, low_nm: float, high_nm: float) -> Pool:
    """The rows of such thicknesses."""
    nm = pool.thickness[:, 0] / 10
    chosen = (nm >= low_nm) & (nm < high_nm)
    return Pool(**{f.name: getattr(pool, f.name)[chosen] for f in fields(Pool)})


def finder_of(probe: Tensor, transform: str = "log") -> DiskFinder:
    """Correlation with the defaults of a run."""
    radius = disk_radius(probe)
    return DiskFinder(
        make_kernel(probe),
        sigma_cc=1.0,
        transform=transform,  # type: ignore[arg-type]
        min_peak_spacing=1.5 * radius,
        edge_boundary=int(np.ceil(radius)),
        max_num_peaks=128,
        min_absolute_intensity=0.0,
        min_relative_intensity=0.005,
        relative_to_peak=0,
    )


def join(found: list[Peaks]) -> Peaks:
    """Peaks of one batch after the other."""
    return Peaks(*(torch.cat(column) for column in zip(*found, strict=True)))


def correlate(batch: TrainingBatch) -> Peaks:
    """Peaks by correlation with the defaults of a run, each pattern by its own probe."""
    pairs = zip(batch.pattern, batch.probe, strict=True)
    return join([finder_of(probe)(pattern[None]) for pattern, probe in pairs])


def search(batch: TrainingBatch, transform: str) -> tuple[Peaks, Tensor]:
    """Peaks, each pattern by its own probe, and the size of both parts of the dilation."""
    found, parts = [], []
    for pattern, probe in zip(batch.pattern, batch.probe, strict=True):
        finder, each = finder_of(probe, transform), []
        for scales in ((1.0, 0.0), (0.0, 1.0)):
            finder.plan = finder.plan._replace(dilation_scales=scales)
            each.append(finder(pattern[None]))
        found.append(each[0])
        parts.append(torch.cat([peaks.dilation_std for peaks in each]))
    return join(found), torch.stack(parts)


def draw(source: PatternSource, n: int, kind: str, electrons: float, transform: str) -> Set:
    """What `n` patterns tell; those without a lattice are left out."""
    errors, stds, parts, disks = [], [], [], []
    for start in range(0, n, _BATCH):
        batch = source.batch(min(_BATCH, n - start))
        peaks, shared = search(batch, transform)
        matches = match_peaks(peaks, batch)
        fit = affine_error(matches, batch.spot_position)
        errors.append(fit.strain.diagonal(dim1=1, dim2=2))
        stds.append(fit.std)
        parts.append(shared)
        disks.append(matches.found.sum(1))
    error, std = torch.cat(errors), torch.cat(stds)
    kept = ((error.abs() < _WRONG) & torch.isfinite(std)).all(1)
    return Set(kind, electrons, error[kept], std[kept], torch.cat(parts)[kept], torch.cat(disks)[kept])


def crystals(pool: Pool, split: str, n: int, transform: str) -> Iterator[Set]:
    """All thicknesses and doses."""
    for kind, limits in THICKNESSES.items():
        for electrons in DOSES:
            source = PatternSource(
                split, _SIZE, pool=between(pool, *limits), dose=(electrons, electrons), flat=0.0
            )
            yield draw(source, n, kind, electrons, transform)


def flat_disks(pool: Pool, split: str, n: int, transform: str) -> Iterator[Set]:
    """Evenly filled disks without backgrounds or faults, apart from each other."""
    apart = Pool(**{f.name: getattr(pool, f.name)[pool.spacing > 2.4 * pool.aperture] for f in fields(Pool)})
    for electrons in DOSES:
        source = PatternSource(split, _SIZE, pool=apart, dose=(electrons, electrons), flat=1.0, clean=True)
        yield draw(source, n, "flat", electrons, transform)


def ratios(one: Set, scales: tuple[float, float]) -> Tensor:
    """Errors in units of error bars, (k, 2)."""
    shared = (one.parts * torch.tensor(scales)).square().sum(1)
    return one.error.abs() / (one.std.square() + shared[:, None]).sqrt()


def fit_scales(sets: list[Set]) -> tuple[float, float]:
    """The pair with the least squared miscoverage, summed over the sets and over numbers of disks."""
    groups = list(sets)
    for kind in THICKNESSES:
        same = [one for one in sets if one.kind == kind]
        error, std, parts, disks = (torch.cat(c) for c in list(zip(*same, strict=True))[2:])
        for low, high in DISKS:
            some = (disks >= low) & (disks < high)
            groups.append(Set(kind, 0.0, error[some], std[some], parts[some], disks[some]))
    groups = [group for group in groups if len(group.error)]
    pairs = [(float(a), float(b)) for a in RADIAL for b in TEXTURE]
    return min(pairs, key=lambda pair: sum(miscoverage(ratios(one, pair)) for one in groups))


def usual(sets: list[Set]) -> float:
    """Size of the predicted dilation, at the highest dose, that 68 % of the patterns stay below."""
    sizes = torch.cat([one.parts[:, 0] for one in sets if one.electrons == max(DOSES)])
    return float(sizes.quantile(0.6827))


def agreement(one: Set) -> float:
    """Rank correlation of the predicted size of the dilation with that of the error."""
    size, predicted = one.error.mean(1).abs(), one.parts[:, 0]
    ranks = torch.stack([size.argsort().argsort(), predicted.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def lines(sets: list[Set], scales: tuple[float, float]) -> list[str]:
    """Rows of a Markdown table."""
    out = []
    for one in sets:
        without, stated = ratios(one, (0.0, 0.0)), ratios(one, scales)
        share = [f"{float((r < k).double().mean()):.2f}" for r in (without, stated) for k in (1, 2)]
        middle = [float(v.median()) for v in (one.error.mean(1).abs(), one.std)]
        middle.append(float((one.parts * torch.tensor(scales)).norm(dim=1).median()))
        spread = f"{float(stated.square().clamp(max=25).mean().sqrt()):.2f}"
        cells = [one.kind, f"{one.electrons:.0e}".replace("e+0", "e"), str(len(one.error))]
        cells += [*(f"{1e3 * v:.2f}" for v in middle), f"{agreement(one):+.2f}"]
        cells += [f"{share[0]}, {share[1]}", f"{share[2]}, {share[3]}", spread]
        out.append(f"| {' | '.join(cells)} |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", type=Path, help="folder of orientations; scattered anew without it")
    parser.add_argument("--patterns", type=int, default=240, help="of each thickness and dose")
    parser.add_argument("--transforms", nargs="+", choices=list(DILATION_SCALES), default=["log"])
    parser.add_argument("--out", type=Path, default=RESULTS / "shared_dilation.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = [
        "# The dilation that the disks of a pattern share, as correlation states it",
        "",
        f"`python -m benchmarks.shared_dilation`, {options.patterns} patterns of each set (those without a",
        "lattice are left out). Scales are fitted to training prototypes, the tables are of validation",
        "prototypes. Errors of e_xx and e_yy of a lattice fit, strain in 1e-3: size of their mean, error bar",
        "without a shared part, the shared part (medians); rank correlation of the predicted size with the",
        "true one; shares within one and two error bars without and with the shared part (68.3 and 95.4 %",
        "are wanted); rms error in units of the error bar (each at most 5).",
    ]
    with tempfile.TemporaryDirectory() as empty:
        folder = options.pool or Path(empty)
        pools = {split: orientations(folder, split) for split in ("train", "validation")}
        for transform in options.transforms:
            packaged = DILATION_SCALES[transform]
            training = list(crystals(pools["train"], "train", options.patterns, transform))
            fitted, size = fit_scales(training), usual(training)
            known = "as packaged" if fitted == packaged else f"packaged are {packaged[0]:g}, {packaged[1]:g}"
            text += [
                "",
                f"## Transform {transform}: scales {fitted[0]:g}, {fitted[1]:g} ({known})",
                "",
                "Of what the contrast predicts in training crystals at 1e7 electrons, 68 % are below "
                f"{1e3 * size:.1f}.",
                "",
                "| disks | electrons | patterns | error | bar | shared | rank | without | with | rms |",
                "|---|---|---|---|---|---|---|---|---|---|",
            ]
            held_out = pools["validation"], "validation", options.patterns, transform
            text += lines([*crystals(*held_out), *flat_disks(*held_out)], fitted)
            print("\n".join(text[-25:]), flush=True)
    options.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()

"""What is left of the error bars, and of the errors, between two patterns of one crystal.

    python -m benchmarks.neighbours  # some ten minutes on one core

A scan is bent by some mrad and wedged by some percent: its reference is a neighbour, not the truth.
Crystals of the validation prototypes (``--split train``: those on which the rule of
`fcunet.kernels.strain.shared_dilation_left` was found) are scattered at a place and a few mrad or percent of
the thickness away from it, and drawn on the same detector; the strain that each pattern shows is compared
with the median of the near ones. Much of what displaces the disks is the same in both, and the residuals of
the peaks tell how much (`fcunet.kernels.residuals`). The same is done for alloys: the reference is one
crystal, the other place has up to half of its atoms replaced by those of another crystal of the same
prototype. Writes ``benchmarks/results/neighbours.md``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional as F

from fcunet import schema
from fcunet.kernels.lattice import NoLatticeError
from fcunet.kernels.lattice_index import reduce_basis
from fcunet.kernels.peaks import Peaks
from fcunet.nn.weights import least_shared_dilation, load_model, resolve_weights
from fcunet.pipeline import compute_strain, fit_lattice
from fcunet.simulation.crystals import Crystal, alloy
from fcunet.simulation.scattering import StructureFactors, couple_beams, scatter, tilt_rotation
from fcunet.training.dataset import PatternSource, Pool, TrainingBatch, training_crystals
from fcunet.training.evaluate import network_detector
from fcunet.training.orientations import draw_orientation, pack_orientations

from .shared_dilation import THICKNESSES, correlate

RESULTS = Path(__file__).resolve().parent / "results"
DOSES = (1e4, 1e5, 1e7)
TILTS = (0.0, 1.0, 2.0, 4.0)  # mrad
FACTORS = (1.0, 0.97, 1.03, 1.1)  # of the thickness
NEAR = np.array([tilt <= 2 and factor < 1.1 for tilt in TILTS for factor in FACTORS])
ALLOYS = ((0.0, 0.0), (0.0, 1.0), (0.0, -1.0), (0.1, 0.0), (0.25, 0.0), (0.5, 0.0))  # share, tilt in mrad
PURE = np.array([share == 0 for share, _ in ALLOYS])
MISMATCH = (0.005, 0.1)  # of the lengths of two crystals that are alloyed
LEAST_DILATION = {"FCU-Net": least_shared_dilation("default")}
_SIZE, _WRONG = 256, 0.03  # a strain off by more is that of another lattice


class Reading(NamedTuple):
    """Of n crystals in m states; NaN where there is no lattice."""

    error: np.ndarray  # (m, n, 4) against the reference, which is the median of some states
    std: np.ndarray  # (m, n, 4) as of a run
    plain: np.ndarray  # (m, n, 4) as if nobody had looked at the peaks
    absolute: np.ndarray  # (m, n, 4) against the truth
    absolute_std: np.ndarray  # (m, n, 4)
    ratio: np.ndarray  # (m, n)


def neighbourhoods(
    n: int,
    low_nm: float,
    high_nm: float,
    seed: int,
    split: str,
    places: Sequence[tuple[float, float]],
    factors: Sequence[float],
) -> Pool:
    """Crystals and their neighbours, (place, factor) along the axis of the thicknesses.

    A place has a share of the atoms of another crystal of the prototype, and a tilt. Disks lie where those of
    the pure crystal do: only what is in them is that of the alloy.
    """
    rng, crystals, pools = np.random.default_rng(seed), training_crystals(split), []
    mixed = any(share for share, _ in places)
    while len(pools) < n:
        crystal: Crystal = crystals[rng.integers(len(crystals))]
        partners = [c for c in crystals if _can_be_alloyed(crystal, c)] if mixed else [crystal]
        if not partners:
            continue
        partner = partners[rng.integers(len(partners))] if mixed else crystal
        absorption = rng.uniform(0.0, 0.12)
        pure = StructureFactors(crystal, g_max=4.8, absorption=absorption)
        centre = draw_orientation(pure, rng)
        if centre is None:
            continue
        angle, beams, coupled = rng.uniform(0, 2 * np.pi), centre.beams, []
        for share, tilt in places:
            matter = pure
            if share:
                matter = StructureFactors(alloy(crystal, partner, share), g_max=4.8, absorption=absorption)
            bend = tilt_rotation([tilt * np.sin(angle), tilt * np.cos(angle)]) @ centre.rotation
            coupled.append(couple_beams(matter, bend, beams.energy_keV, beams.hkl, beams.weak))
        thickness = np.tile(10 * rng.uniform(low_nm, high_nm) * np.array(factors), (len(places), 1))
        disks = scatter(coupled, [centre.semiangle_mrad] * len(places), thickness)
        pools.append(pack_orientations([centre], disks.flatten(0, 1)[None], thickness.reshape(1, -1)))
    return Pool.concatenate(pools)


def _can_be_alloyed(one: Crystal, other: Crystal) -> bool:
    """Whether both have the same sites, some of them the same elements, and about the same size."""
    if one.prototype != other.prototype or one.centring != other.centring:
        return False
    same_sites = np.shape(one.positions) == np.shape(other.positions) and np.allclose(
        one.positions, other.positions, atol=0.02
    )
    mismatch = abs((other.volume / one.volume) ** (1 / 3) - 1)
    related = len(set(one.symbols)) == 1 or bool(set(one.symbols) & set(other.symbols))
    return bool(same_sites and related and MISMATCH[0] < mismatch < MISMATCH[1])


class _InOrder(PatternSource):
    """Every orientation once, in order, whatever the pool."""

    def _choose_orientations(self, n: int) -> Tensor:
        return torch.arange(n)


def draw(pool: Pool, state: int, electrons: float) -> TrainingBatch:
    """A pattern of each crystal in one of its states: same detector, other electrons."""
    own = {name: getattr(pool, name)[:, state : state + 1] for name in ("coefficients", "scale", "thickness")}
    rest = {f.name: getattr(pool, f.name) for f in fields(Pool) if f.name not in own}
    source = _InOrder(
        "validation", _SIZE, pool=Pool(**own, **rest), dose=(electrons, electrons), flat=0.0, seed=1
    )
    source.reseed_noise(state)
    return source.batch(len(pool))


def true_lattice(batch: TrainingBatch, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Origin (2,) and g (2, 2) of a pattern, px, from where its disks lie."""
    spots = batch.spot_position[row].numpy().astype(float)
    spots = spots[np.isfinite(spots).all(1)]
    q = spots - batch.origin[row].numpy()
    q = q[np.argsort((q**2).sum(1))]
    q = q[(q**2).sum(1) > 4]  # px^2; the direct beam, and what other Laue zones bring near it
    aside = np.abs(q[:, 0] * q[0, 1] - q[:, 1] * q[0, 0]) > 0.1 * np.hypot(*q.T) * np.hypot(*q[0])
    if not aside.any():
        raise NoLatticeError("all disks lie on one line")
    g = np.stack([q[0], q[aside][0]])
    sixths = 6 * q @ np.linalg.inv(g)
    for one in q[np.abs(sixths - np.rint(sixths)).max(1) < 0.1]:  # the others are of other Laue zones
        place = one @ np.linalg.inv(g)
        while np.abs(place - np.rint(place)).max() > 0.1:  # between two others: g is not primitive
            pairs = [np.stack([(place - np.rint(place)) @ g, other]) for other in g]
            areas = np.abs(np.linalg.det(pairs))
            g, _ = reduce_basis(pairs[int(np.argmin(np.where(areas > 1, areas, np.inf)))])
            place = one @ np.linalg.inv(g)
    h, k = np.rint(q @ np.linalg.inv(g)).T
    near = np.abs(q - np.stack([h, k], 1) @ g).max(1) < 0.1
    fitted, *_ = np.linalg.lstsq(np.stack([h, k], 1)[near], q[near], rcond=None)
    return batch.origin[row].numpy(), fitted


def as_scan(found: list[Peaks], row: int, least_dilation: float) -> xr.Dataset:
    """The peaks of one crystal in all its states, as a scan of one line."""
    most = max(one.qy.shape[1] for one in found)
    names = {"peak_qy": "qy", "peak_qx": "qx", "peak_intensity": "intensity", "peak_sigma": "sigma"}
    peaks = xr.Dataset(attrs={"shared_dilation_floor": least_dilation})
    for name, field in names.items():
        values = [getattr(one, field)[row] for one in found]
        padded = [F.pad(v, (0, most - len(v)), value=torch.nan) for v in values]
        peaks[name] = (schema.PEAK_DIMS, torch.stack(padded).numpy()[None])
    for name, field in zip(schema.SHARED_DILATION, ("dilation_std", "dilation"), strict=True):
        peaks[name] = (schema.SCAN_DIMS, torch.stack([getattr(p, field)[row] for p in found]).numpy()[None])
    return peaks


def read(
    found: list[Peaks], batches: list[TrainingBatch], n_reference: int, least_dilation: float
) -> Reading:
    """Strain of every crystal, the way of a run: the first states are the reference."""
    rows = []
    for row in range(len(batches[0].pattern)):
        nothing = np.full((5, len(found), 4), np.nan), np.full(len(found), np.nan)
        try:
            origin, g = true_lattice(batches[0], row)
            peaks = as_scan(found, row, least_dilation)
            lattice = fit_lattice(peaks, basis=g, origin=origin)
            region = (0, 1, 0, n_reference)
            own, plain = (compute_strain(lattice, reference=region, peaks=p) for p in (peaks, None))
            exact = compute_strain(lattice, reference=g)
        except ValueError:  # no lattice in the reference
            rows.append(nothing)
            continue
        maps = ((own, ""), (own, "_std"), (plain, "_std"), (exact, ""), (exact, "_std"))
        values = [np.stack([m[c + end].values[0] for c in schema.STRAIN_COMPONENTS], -1) for m, end in maps]
        right = (np.abs(values[3]) < _WRONG).all(-1)
        enough = 2 * right[:n_reference].sum() > n_reference
        kept = np.where((right & enough)[:, None], np.stack(values), np.nan)
        rows.append((kept, own["residual_ratio"].values[0] if "residual_ratio" in own else nothing[1]))
    numbers, ratio = (np.stack(column, axis=-1) for column in zip(*rows, strict=True))  # (5, m, 4, n), (m, n)
    return Reading(*np.moveaxis(numbers, -1, 2), ratio)


def shares(error: np.ndarray, std: np.ndarray) -> list[float]:
    """Shares of the errors within one and two error bars."""
    ratio = (np.abs(error) / std)[np.isfinite(error) & np.isfinite(std)]
    return [float((ratio < k).mean()) for k in (1, 2)]


def table(
    detectors: dict[str, Any], pools: dict[str, Pool], reference: np.ndarray, others: dict[str, np.ndarray]
) -> list[str]:
    """Markdown, by thickness, dose and method; `reference` and `others` say which of the states."""
    order, n_reference = np.argsort(~reference, kind="stable"), int(reference.sum())
    titles = "method,disks,electrons,crystals,absolute,from,alike,difference,bar,without peaks,with"
    text = [f"| {titles.replace(',', ' | ')} |", "|---" * (titles.count(",") + 1) + "|"]
    for kind, pool in pools.items():
        for electrons in DOSES:
            batches = [draw(pool, int(state), electrons) for state in order]
            for method, find in detectors.items():
                least = LEAST_DILATION.get(method, 0.0)
                found = read([find(batch) for batch in batches], batches, n_reference, least)
                n = int(np.isfinite(found.error[:n_reference]).all(-1).any(0).sum())
                dose = f"{electrons:.0e}".replace("e+0", "e")
                for name, states in others.items():
                    which = states[order]
                    error, std = found.error[which], found.std[which]
                    cells = [method, kind, dose, str(n), pair(shares(found.absolute, found.absolute_std))]
                    cells += [name, f"{np.nanmedian(found.ratio[which]):.2f}"]
                    cells += [f"{1e3 * np.nanmedian(np.abs(v)):.2f}" for v in (error, std)]
                    cells += [pair(shares(error, v)) for v in (found.plain[which], std)]
                    text.append(f"| {' | '.join(cells)} |")
                    print(text[-1], flush=True)
    return text


def pair(values: list[float]) -> str:
    """As the table spells shares."""
    return ", ".join(f"{v:.2f}" for v in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crystals", type=int, default=48, help="of each thickness")
    parser.add_argument("--split", choices=("validation", "train"), default="validation", help="crystals")
    parser.add_argument("--out", type=Path, default=RESULTS / "neighbours.md")
    options = parser.parse_args()
    if options.crystals < 1:
        parser.error(f"--crystals is {options.crystals}; at least one is needed")
    torch.set_num_threads(1)
    model = load_model("default", device="cpu", precision="fp32")
    detectors = {"correlation": correlate, "FCU-Net": network_detector(model)}
    weights = resolve_weights("default")[1][:12]
    text = [
        "# Strain against a neighbour in the same crystal, and its error bar",
        "",
        f"`python -m benchmarks.neighbours`, weights {weights}, {options.crystals} crystals of",
        f"{options.split} prototypes per thickness. Near: at most 2 mrad and 3 % of the thickness from a",
        "place; far: 4 mrad, or 10 %. Differences of e_xx, e_yy, e_xy and theta from the median of the near",
        "ones: `residual_ratio`, size and error bar (medians, the latter in 1e-3); shares within one and two",
        "error bars, without a look at the peaks and with (68.3 and 95.4 % are wanted). Absolute: shares",
        "against the truth.",
        "",
    ]
    limits = {kind: (max(low, 3.0), min(high, 120.0)) for kind, (low, high) in THICKNESSES.items()}
    n, split = options.crystals, options.split
    bends = [(0.0, tilt) for tilt in TILTS]
    bent = {kind: neighbourhoods(n, *nm, len(kind), split, bends, FACTORS) for kind, nm in limits.items()}
    text += table(detectors, bent, NEAR, {"near": NEAR, "far": ~NEAR})
    text += [
        "",
        "## Where the composition changes",
        "",
        "The reference are three places of one crystal, 1 mrad apart; at the other place a tenth, a quarter",
        "or half of its atoms are those of another crystal of its prototype, whose lengths differ by 0.5 to",
        "10 %.",
        "",
    ]
    mixed = {kind: neighbourhoods(n, *nm, len(kind), split, ALLOYS, (1.0,)) for kind, nm in limits.items()}
    shares_of = {f"{100 * share:.0f} %": [s == share for s, _ in ALLOYS] for share, _ in ALLOYS if share}
    text += table(detectors, mixed, PURE, {k: np.array(v) for k, v in shares_of.items()})
    options.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()

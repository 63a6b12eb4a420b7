"""What is left of the error bars, and of the errors, between two patterns of one crystal.

    python -m benchmarks.neighbours  # some ten minutes on one core

A scan is bent by some mrad and wedged by some percent: its reference is a neighbour, not the truth.
Crystals of the validation prototypes (``--split train``: those on which `_ALIKE_UNSIGNED` of
`fcunet.kernels.strain` was chosen) are scattered at a place and a few mrad or percent of the thickness away
from it, and drawn on the same detector; the strain that each pattern shows is compared with the median of the
near ones. Most of the dilation that the disks of a pattern share is the same in both
(`fcunet.kernels.strain.shared_dilation_left`). The same is done for alloys: the reference is one crystal, the
other place has up to half of its atoms replaced by those of another crystal of the same prototype. Writes
``benchmarks/results/neighbours.md``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcunet.kernels.peaks import Peaks
from fcunet.kernels.strain import shared_dilation_left
from fcunet.nn.weights import load_model, resolve_weights
from fcunet.simulation.crystals import Crystal, alloy
from fcunet.simulation.scattering import StructureFactors, couple_beams, scatter, tilt_rotation
from fcunet.training.dataset import PatternSource, Pool, TrainingBatch, training_crystals
from fcunet.training.evaluate import affine_error, match_peaks, network_detector
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
_SIZE, _WRONG = 256, 0.03  # a strain off by more is that of another lattice


class Reading(NamedTuple):
    """What a detector makes of `n` patterns."""

    error: np.ndarray  # (n, 2) of e_yy and e_xx
    std: np.ndarray  # (n, 2) without a shared part
    shared: np.ndarray  # (n,)
    signed: np.ndarray  # (n,) the part of it with a known sign


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


def read(peaks: Peaks, batch: TrainingBatch) -> Reading:
    """Errors of the strain and what is said of them."""
    matches = match_peaks(peaks, batch)
    fit = affine_error(matches, batch.spot_position)
    error = fit.strain.diagonal(dim1=1, dim2=2)
    return Reading(error.numpy(), fit.std.numpy(), peaks.dilation_std.numpy(), peaks.dilation.numpy())


def shares(
    readings: list[Reading], reference_states: np.ndarray, others: dict[str, np.ndarray], fewest: int
) -> dict[str, Any]:
    """How many differences from a reference one and two error bars hold, and sizes in 1e-3.

    The reference is the median of some of the states, of which at least `fewest` must have a lattice.
    """
    error, std, shared, signed = (
        np.stack(column) for column in zip(*readings, strict=True)
    )  # (states, n, ..)
    known = (np.abs(error) < _WRONG).all(-1) & np.isfinite(std).all(-1)
    enough = known[reference_states].sum(0) >= fewest
    error, std = (np.where(known[..., None], v, np.nan)[:, enough] for v in (error, std))
    reference = np.nanmedian(error[reference_states], axis=0)
    of_reference = np.nanmean(std[reference_states] ** 2, axis=0) * np.pi / 2 / reference_states.sum()
    middle, middle_signed = (np.median(v[reference_states], axis=0) for v in (shared, signed))
    left = shared_dilation_left(shared, signed, (middle, middle_signed))[:, enough]
    out: dict[str, Any] = {"n": int(enough.sum())}
    for name, states in others.items():
        difference = np.abs(error - reference)[states]
        own = np.sqrt(std**2 + of_reference)[states]
        whole = np.hypot(own, left[states][..., None])
        out[name] = [1e3 * float(np.nanmedian(v)) for v in (difference, own, left[states])]
        for bar in (own, whole):
            ratio = (difference / bar)[np.isfinite(difference)]
            out[name] += [float((ratio < k).mean()) for k in (1, 2)]
    absolute = (np.abs(error) / np.hypot(std, shared[:, enough][..., None]))[np.isfinite(error)]
    out["absolute"] = [float((absolute < k).mean()) for k in (1, 2)]
    out["size"] = 1e3 * float(np.nanmedian(np.abs(error)))
    return out


def table(
    detectors: dict[str, Any],
    pools: dict[str, Pool],
    reference_states: np.ndarray,
    others: dict[str, np.ndarray],
    fewest: int,
) -> list[str]:
    """Markdown, by thickness, dose and method."""
    text = [
        "| method | disks | electrons | crystals | absolute | within | "
        "from | difference | bar | left | without | with |",
        "|---" * 12 + "|",
    ]
    for kind, pool in pools.items():
        for electrons in DOSES:
            batches = [draw(pool, state, electrons) for state in range(len(reference_states))]
            for method, find in detectors.items():
                readings = [read(find(batch), batch) for batch in batches]
                found = shares(readings, reference_states, others, fewest)
                dose = f"{electrons:.0e}".replace("e+0", "e")
                for name in others:
                    sizes, held = found[name][:3], found[name][3:]
                    cells = [method, kind, dose, str(found["n"]), f"{found['size']:.2f}"]
                    cells += [", ".join(f"{v:.2f}" for v in found["absolute"]), name]
                    cells += [*(f"{v:.2f}" for v in sizes)]
                    cells += [", ".join(f"{v:.2f}" for v in held[i : i + 2]) for i in (0, 2)]
                    text.append(f"| {' | '.join(cells)} |")
                    print(text[-1], flush=True)
    return text


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
        "place; far: 4 mrad, or 10 %. Differences of e_xx and e_yy from the median of the near ones:",
        "size, error bar without a shared dilation, what is left of that (medians, 1e-3); shares within one",
        "and two error bars without it and with it (68.3 and 95.4 % are wanted). Absolute: size of the",
        "error, and shares with the whole dilation.",
        "",
    ]
    limits = {kind: (max(low, 3.0), min(high, 120.0)) for kind, (low, high) in THICKNESSES.items()}
    n, split = options.crystals, options.split
    bends = [(0.0, tilt) for tilt in TILTS]
    bent = {kind: neighbourhoods(n, *nm, len(kind), split, bends, FACTORS) for kind, nm in limits.items()}
    text += table(detectors, bent, NEAR, {"near": NEAR, "far": ~NEAR}, 6)
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
    text += table(detectors, mixed, PURE, {k: np.array(v) for k, v in shares_of.items()}, 3)
    options.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()

"""Scattered orientations for training: drawn at random, kept as disk polynomials in a pool."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..simulation.crystals import Crystal, vary
from ..simulation.detector import mean_over_aperture
from ..simulation.library import load_library
from ..simulation.scattering import (
    N_COEFFICIENTS,
    Beams,
    StructureFactors,
    scatter,
    select_beams,
    tilt_rotation,
    wavelength,
    zone_rotation,
)
from ..simulation.target import coincident_groups, reflection_amplitudes

N_SPOTS = 128
_MAX_VOLUME = 260.0  # cubic angstrom per primitive cell: larger ones need more beams than are kept
_S_STRONG = 0.06  # 1/angstrom; a narrower spectrum takes fewer Chebyshev terms


@dataclass
class Pool:
    """Scattered orientations; arrays with one row per orientation.

    Attributes
    ----------
    position : ndarray, shape (p, S, 2), float32
        Detector-plane part of g as (y, x), 1/angstrom; NaN-padded, direct beam first.
    amplitude : ndarray, shape (p, S), float32
        Target amplitude, volts.
    leader : ndarray, shape (p, S), int16
        Strongest reflection at the same place.
    coefficients : ndarray, shape (p, Z, S, 45), float16
        Disk polynomials divided by `scale` (p, Z, S).
    thickness : ndarray, shape (p, Z)
        Angstrom.
    aperture, spacing : ndarray, shape (p,)
        Radius of the aperture the polynomials reach, and shortest distance of two spots, 1/angstrom.
    energy, mistilt : ndarray, shape (p,)
        keV, mrad (NaN for a general orientation).
    crystal : ndarray of str, shape (p,)
    """

    position: np.ndarray
    amplitude: np.ndarray
    leader: np.ndarray
    coefficients: np.ndarray
    scale: np.ndarray
    thickness: np.ndarray
    aperture: np.ndarray
    spacing: np.ndarray
    energy: np.ndarray
    mistilt: np.ndarray
    crystal: np.ndarray

    def __len__(self) -> int:
        return len(self.aperture)

    @staticmethod
    def concatenate(pools: Sequence["Pool"]) -> "Pool":
        """One pool after the other."""
        return Pool(**{f.name: np.concatenate([getattr(p, f.name) for p in pools]) for f in fields(Pool)})

    def last(self, n: int) -> "Pool":
        """The newest `n` orientations."""
        return Pool(**{f.name: getattr(self, f.name)[-n:] for f in fields(Pool)})


def save_pool(pool: Pool, path: str | Path) -> None:
    """Write a pool as .npz; a reader never sees half a file."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial.npz")
    np.savez(partial, **{f.name: getattr(pool, f.name) for f in fields(Pool)})
    partial.replace(path)


def load_pool(path: str | Path) -> Pool:
    """Read a pool written by `save_pool`, or the orientations of a training library (``NAME.zarr/SPLIT``)."""
    if Path(path).is_dir():
        from .library import read_pool

        return read_pool(path)
    with np.load(path) as stored:
        missing = [f.name for f in fields(Pool) if f.name not in stored]
        if missing:
            raise ValueError(f"{path} is not a pool of orientations: it lacks {', '.join(missing)}")
        return Pool(**{f.name: stored[f.name] for f in fields(Pool)})


def training_crystals(split: str) -> list[Crystal]:
    """Published and library crystals of one split with primitive cells small enough to scatter well."""
    return [c for c in load_library(split).values() if c.volume < _MAX_VOLUME]


@dataclass
class Orientation:
    """A crystal as the beam meets it."""

    crystal: str
    beams: Beams
    rotation: np.ndarray  # (3, 3) from the axes of the crystal to those of the lab
    semiangle_mrad: float
    spacing: float  # shortest distance of two spots, 1/angstrom
    mistilt: float  # mrad; NaN for a general orientation


def _random_rotation(rng: np.random.Generator) -> np.ndarray:
    q = rng.normal(size=4)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _low_index_zone(rng: np.random.Generator) -> np.ndarray:
    while True:
        zone = rng.integers(-3, 4, 3) if rng.random() < 0.3 else rng.integers(-1, 2, 3)
        if zone.any() and np.gcd.reduce(zone) == 1:
            return zone


def shortest_spacing(beams: Beams, *, n_strong: int = 40, s_max: float = 0.05) -> float:
    """Shortest distance in the detector plane between two of the strongest reflections, 1/angstrom; 0 if too
    few."""
    near = beams.s.abs() < s_max
    position = beams.position[near][:n_strong].double()
    if len(position) < 3:
        return 0.0
    distance = torch.pdist(position)
    apart = distance[distance > 5e-3]  # reflections of two Laue zones may coincide
    return float(apart.min()) if len(apart) else 0.0


def draw_orientation(
    factors: StructureFactors,
    rng: np.random.Generator,
    *,
    n_beams: int = 128,
) -> Orientation | None:
    """One random orientation, voltage and aperture; None where disks would overlap or spots be too few.

    Four in five orientations are zone axes [uvw], |u|, |v|, |w| <= 3 with a mistilt of 0 to 10 mrad, nearly
    half of them below 2 mrad where a few strong beams hold the dose; the rest are uniform over the sphere.
    Voltage 60 to 300 kV, semiangle 0.5 to 3.5 mrad: from two fifths of the angle where disks touch to just
    beyond it. Smaller semiangles come from drawing a part of the aperture only.
    """
    energy = (
        float(rng.choice([60.0, 80.0, 120.0, 200.0, 200.0, 300.0, 300.0]))
        if rng.random() < 0.7
        else rng.uniform(60, 300)
    )
    if rng.random() < 0.8:
        tilt = rng.uniform(0, 2) if rng.random() < 0.45 else rng.uniform(2, 10)
        angle = rng.uniform(0, 2 * np.pi)
        rotation = tilt_rotation([tilt * np.sin(angle), tilt * np.cos(angle)]) @ zone_rotation(
            factors.crystal, _low_index_zone(rng)
        )
    else:
        tilt = np.nan
        rotation = _random_rotation(rng)
    beams = select_beams(factors, rotation, energy, n_beams=n_beams, s_strong=_S_STRONG)
    amplitude = reflection_amplitudes(beams)
    if int(((beams.s.abs() < 0.012) & (amplitude > 0.04 * amplitude[0])).sum()) < 9:
        return None
    spacing = shortest_spacing(beams)
    # half the shortest distance, less a gap; one in ten may overlap a little
    share = 0.62 if rng.random() < 0.1 else 0.47
    cap = share * spacing * wavelength(energy) * 1e3
    semiangle = min(cap * rng.uniform(0.4, 1.0), 3.5)
    if semiangle < 0.5:
        return None
    return Orientation(factors.crystal.name, beams, rotation, semiangle, spacing, float(tilt))


def count_forbidden(beams: Beams, *, n_strong: int = 50) -> int:
    """Reflections with V_g = 0 among the most important beams."""
    amplitude = reflection_amplitudes(beams)
    near = (beams.s.abs() < 0.03)[:n_strong]
    return int(((amplitude[:n_strong] == 0) & near).sum())


def draw_thicknesses(rng: np.random.Generator, n: int, series: int) -> np.ndarray:
    """Thicknesses (n, series) in angstrom: three batches in four 5 to 80 nm, else 2 to 150 nm, log-uniform.

    One range for a whole batch, because the thickest crystal of a batch sets the work.
    """
    if rng.random() < 0.75:
        return rng.uniform(50, 800, (n, series))
    return np.exp(rng.uniform(np.log(20), np.log(1500), (n, series)))


def pack_orientations(
    orientations: Sequence[Orientation], coefficients: Tensor, thickness: np.ndarray
) -> Pool:
    """A pool of p orientations from disks (p, z, beams, 45), as `scatter` makes them, of z thicknesses."""
    p, z = thickness.shape
    out = Pool(
        position=np.full((p, N_SPOTS, 2), np.nan, np.float32),
        amplitude=np.zeros((p, N_SPOTS), np.float32),
        leader=np.zeros((p, N_SPOTS), np.int16),
        coefficients=np.zeros((p, z, N_SPOTS, N_COEFFICIENTS), np.float16),
        scale=np.zeros((p, z, N_SPOTS), np.float32),
        thickness=thickness.astype(np.float32),
        aperture=np.zeros(p, np.float32),
        spacing=np.array([o.spacing for o in orientations], np.float32),
        energy=np.array([o.beams.energy_keV for o in orientations], np.float32),
        mistilt=np.array([o.mistilt for o in orientations], np.float32),
        crystal=np.array([o.crystal for o in orientations], "U48"),
    )
    mean = mean_over_aperture(torch.ones(1, device=coefficients.device))[0]
    for i, o in enumerate(orientations):
        n = len(o.beams)
        amplitude = reflection_amplitudes(o.beams)
        light = (coefficients[i, :, :n] @ mean).clamp_min(0).amax(0)  # (n,)
        worth = torch.maximum(light / light.max(), (amplitude / amplitude[0]) ** 2)
        worth[0] = torch.inf
        kept = torch.argsort(worth, descending=True, stable=True)[:N_SPOTS]
        m = len(kept)
        aperture = o.semiangle_mrad * 1e-3 / wavelength(o.beams.energy_keV)
        position = o.beams.position[kept]
        chosen = coefficients[i][:, kept]
        scale = chosen.abs().amax(-1).clamp_min(1e-12)
        out.position[i, :m] = position.cpu().numpy()
        out.amplitude[i, :m] = amplitude[kept].cpu().numpy()
        strength = torch.maximum(amplitude[kept], 1e-3 * amplitude[0] * light[kept].sqrt())
        strength[0] = torch.inf
        out.leader[i, :m] = coincident_groups(position, strength, 0.12 * aperture).cpu().numpy()
        out.coefficients[i, :, :m] = (chosen / scale[..., None]).cpu().numpy()
        out.scale[i, :, :m] = scale.cpu().numpy()
        out.aperture[i] = aperture
    return out


def empty_pool(n_thicknesses: int) -> Pool:
    """A pool without orientations, for its shapes and dtypes."""
    return pack_orientations(
        [], torch.zeros(0, n_thicknesses, 1, N_COEFFICIENTS), np.zeros((0, n_thicknesses))
    )


def make_orientations(
    crystals: Sequence[Crystal],
    n: int,
    rng: np.random.Generator,
    *,
    n_thicknesses: int = 4,
    n_beams: int = 128,
    batch: int = 8,
    device: torch.device | str = "cpu",
    jitter: bool = True,
) -> Pool:
    """Scatter `n` random orientations of random crystals.

    Half of the orientations are wanted rich in forbidden reflections that double diffraction can light up (at
    least 4 among the 50 most important beams): others are dropped at random until that share is met.
    """
    waiting: list[Orientation] = []
    done: list[Pool] = []
    accepted = rich = 0
    prototypes = sorted({c.prototype for c in crystals})
    members = {p: [c for c in crystals if c.prototype == p] for p in prototypes}
    while accepted < n:
        # every prototype equally often, simple structures with many members not more
        family = members[prototypes[rng.integers(len(prototypes))]]
        crystal = family[rng.integers(len(family))]
        if jitter:
            crystal = vary(crystal, rng, substitute=0.35)
        factors = StructureFactors(crystal, g_max=4.8, absorption=rng.uniform(0.0, 0.12), device=device)
        taken = 0
        for _ in range(8):
            drawn = draw_orientation(factors, rng, n_beams=n_beams)
            if drawn is None:
                continue
            is_rich = count_forbidden(drawn.beams) >= 4
            if not is_rich and accepted - rich > 0.5 * (accepted + 1) and rng.random() < 0.7:
                continue
            waiting.append(drawn)
            accepted += 1
            rich += is_rich
            taken += 1
            if taken == 3 or accepted == n:
                break
        while len(waiting) >= batch or (waiting and accepted >= n):
            part, waiting = waiting[:batch], waiting[batch:]
            thickness = draw_thicknesses(rng, len(part), n_thicknesses)
            coefficients = scatter([o.beams for o in part], [o.semiangle_mrad for o in part], thickness)
            done.append(pack_orientations(part, coefficients, thickness))
    return Pool.concatenate(done)

"""Training data on the fly: a pool of scattered orientations, drawn over and over on random detectors.

Dynamical scattering is slow (some 15 orientations per second and core) and drawing is fast (hundreds of
patterns), so the pool keeps the disk polynomials of some hundred to thousand orientations at several
thicknesses, and every sample draws one of them anew: rotation, mirror, camera length, aperture, ellipse,
window, dose, blur, backgrounds and faults. New orientations replace the oldest as training goes on.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..simulation import detector
from ..simulation.scattering import N_COEFFICIENTS
from .orientations import Pool, load_pool, make_orientations, save_pool, training_crystals

__all__ = [
    "PatternSource",
    "Pool",
    "TrainingBatch",
    "load_pool",
    "make_orientations",
    "save_pool",
    "training_crystals",
]

# rings, open share, bars
_BULLSEYES = ((1, 0.5, 0), (2, 0.5, 0), (2, 0.6, 2), (3, 0.5, 2), (4, 0.5, 0))
_FFT_PLANS = 64  # kept on a GPU, the most recent ones
_SPLIT_SEEDS = {"train": 0, "validation": 1, "test": 2}


@dataclass
class TrainingBatch:
    """Patterns, probes and the spots they should be read as; torch tensors on one device.

    Attributes
    ----------
    pattern : Tensor, shape (n, H, W), float32
        Counts.
    probe : Tensor, shape (n, H, W), float32
        Vacuum probe in counts, centred at (H // 2, W // 2).
    spot_position : Tensor, shape (n, S, 2)
        (y, x) in px, NaN-padded; spots in a margin outside the frame are listed too.
    spot_amplitude : Tensor, shape (n, S)
        |V_g| with the taper of `simulation.target`, volts; 0 for a lit forbidden reflection, NaN-padded.
    spot_electrons : Tensor, shape (n, S)
        Expected elastic electrons in the whole disk (before detector faults), NaN-padded.
    radius, dose, origin : Tensor, shape (n,), (n,), (n, 2)
        Disk radius in px, electrons in the incident probe, position of the direct beam in px.
    optics : Tensor, shape (n, 2)
        Beam energy in keV and radius of the aperture in 1/angstrom.
    """

    pattern: Tensor
    probe: Tensor
    spot_position: Tensor
    spot_amplitude: Tensor
    spot_electrons: Tensor
    radius: Tensor
    dose: Tensor
    origin: Tensor
    optics: Tensor

    def to(self, device: torch.device | str) -> "TrainingBatch":
        """The same batch on another device."""
        return TrainingBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def __len__(self) -> int:
        return len(self.pattern)

    def __getitem__(self, rows: slice) -> "TrainingBatch":
        """Some of the patterns."""
        return TrainingBatch(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@cache
def _bullseye_apertures() -> Tensor:
    return torch.stack([detector.bullseye(rings, fill=fill, spokes=bars) for rings, fill, bars in _BULLSEYES])


def _log_uniform(u: Tensor, low: float, high: float) -> Tensor:
    return low * (high / low) ** u


class PatternSource:
    """An endless source of training batches.

    Parameters
    ----------
    split : {"train", "validation", "test"}
        Crystals to scatter from; prototypes do not cross splits.
    size : int
        Frame edge in px.
    device : torch.device or str
        Where patterns are scattered and drawn.
    seed : int
        Same seed, same device, same batches in the same order (unless `pool` differs).
    pool : Pool or path, optional
        Orientations computed before (`save_pool`); computed now if absent.
    pool_size : int
        Orientations kept; without `pool` a first `start_size` are made at once and the pool grows to this
        size.
    refresh : float
        New orientations per batch drawn: 0 freezes the pool (validation).
    dose : (low, high), optional
        Log-uniform electrons per pattern instead of the training distribution, for test sets.
    clean : bool
        No backgrounds, no blur beyond the pixel, no faults: only scattering, geometry and counting noise.
    flat : float
        Share of the samples with evenly filled disks, as very thin specimens show.
    bullseye : float
        Share of the samples taken through a patterned aperture (rings, some with bars).
    radius : (low, high), optional
        Log-uniform disk radius in px instead of the training distribution, for test sets.
    small : float
        Share of the samples with disks of 1.8 to 4 px radius that may lie as near to each other as 5 px.
    faint : float
        Share of the samples with 300 to 2000 electrons.
    bright : float
        Share of the samples with 1e7 to 1e9 electrons, where counting noise no longer hides what is left.

    Notes
    -----
    Distributions: disk radius 2.5 to 25 px (three in four 4 to 12), spots at least 10 px apart; half the
    frames are off-centre windows of a pattern twice as large; dose 2e3 to 1e7, three in five up to 1e5;
    Gaussian point spread to 1.5 px.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 128,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        pool: Pool | str | Path | None = None,
        pool_size: int = 2000,
        start_size: int = 64,
        refresh: float = 0.0,
        dose: tuple[float, float] | None = None,
        clean: bool = False,
        flat: float = 0.08,
        bullseye: float = 0.06,
        radius: tuple[float, float] | None = None,
        small: float = 0.0,
        faint: float = 0.0,
        bright: float = 0.0,
    ) -> None:
        self.crystals = training_crystals(split)
        self.size = size
        self.device = torch.device(device)
        if self.device.type == "cuda":  # parts of a batch differ in size: plans for each fill the memory
            place = torch.cuda.current_device() if self.device.index is None else self.device.index
            torch.backends.cuda.cufft_plan_cache[place].max_size = _FFT_PLANS
        self.pool_size = pool_size
        self.refresh = refresh
        self.dose = dose
        self.clean = clean
        self.flat = flat
        self.bullseye = bullseye
        self.radius = radius
        self.small = small
        self.faint = faint
        self.bright = bright
        self._rng = np.random.default_rng([_SPLIT_SEEDS[split], seed])
        self._generator = torch.Generator().manual_seed(int(self._rng.integers(2**62)))
        self._noise = torch.Generator(self.device).manual_seed(int(self._rng.integers(2**62)))
        if isinstance(pool, str | Path):
            pool = load_pool(pool)
        if pool is None:
            pool = make_orientations(self.crystals, start_size, self._rng, device=device)
        self._owed = 0.0
        self._pools: list[Pool] = []
        self._tensors: dict[str, Tensor] = {}
        self._rich = torch.empty(0, dtype=torch.int64)
        self.extend(pool)

    @property
    def pool(self) -> Pool:
        """The orientations drawn from, oldest first."""
        if len(self._pools) > 1:
            self._pools = [Pool.concatenate(self._pools)]
        return self._pools[0]

    def extend(self, pool: Pool) -> None:
        """Take up more orientations, beyond `pool_size` if need be; only they go to the device."""
        self._pools.append(pool)
        names = ("position", "amplitude", "leader", "coefficients", "scale", "aperture", "spacing", "energy")
        for name in names:
            values = torch.from_numpy(getattr(pool, name)).to(self.device)
            known = self._tensors.get(name)
            self._tensors[name] = values if known is None else torch.cat((known, values))
        t = self._tensors
        # light in the middle of the disk, rough but enough to tell what is lit
        light = (t["coefficients"][..., 0].float() * t["scale"]).amax(1)
        lit = (t["amplitude"] == 0) & (light > 5e-4)
        self._rich = torch.nonzero(lit.sum(1) >= 5).squeeze(1)

    def grow(self, n: int) -> None:
        """Scatter `n` new orientations; the oldest beyond `pool_size` are dropped."""
        series = self._tensors["coefficients"].shape[1]
        fresh = make_orientations(self.crystals, n, self._rng, n_thicknesses=series, device=self.device)
        kept = Pool.concatenate([*self._pools, fresh]).last(self.pool_size)
        self._pools, self._tensors = [], {}
        self.extend(kept)

    def reseed_noise(self, seed: int) -> None:
        """Other electrons and faults in the patterns to come; crystals and detector stay those of `seed`."""
        self._noise.manual_seed(seed)

    def __iter__(self) -> Iterator[TrainingBatch]:
        while True:
            yield self.batch(32)

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator).to(self.device)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device)

    def _randint(self, high: int, n: int) -> Tensor:
        return torch.randint(high, (n,), generator=self._generator).to(self.device)

    def batch(self, n: int) -> TrainingBatch:
        """Draw `n` new samples."""
        self._owed += self.refresh
        if self._owed >= 8:
            self.grow(int(self._owed))
            self._owed -= int(self._owed)
        return self._draw(n)

    def _draw(self, n: int) -> TrainingBatch:
        t = self._tensors
        which = self._choose_orientations(n)
        aperture, spacing = t["aperture"][which], t["spacing"][which]
        coefficients = self._choose_coefficients(which)
        fraction = torch.where(self._rand(n) < 0.3, 1.0, _log_uniform(self._rand(n), 0.6, 1.0))
        radius, px, affine = self._choose_camera(aperture * fraction, spacing)
        matrix = torch.linalg.inv(affine) / radius[:, None, None]  # px to aperture units
        origin = self._choose_origin(n)
        position = origin[:, None] + torch.einsum(
            "nij,nkj->nki", affine / px[:, None, None], t["position"][which]
        )
        dose = self._choose_dose(n)
        u = self._rand(n, 8)
        tds = torch.where(u[:, 0] < 0.8, 0.005 + 0.095 * u[:, 1], 0.0)
        lorentz = torch.where(u[:, 2] < 0.5, 0.15 * u[:, 3] ** 2, 0.0)
        glass = torch.where(u[:, 4] < 0.25, 0.12 * u[:, 5], 0.0)
        if self.clean:
            tds, lorentz, glass = tds * 0, lorentz * 0, glass * 0
        elastic = dose * (1 - tds - lorentz - glass)
        blur = 0.1 + 0.9 * self._rand(n) ** 2
        psf = torch.where(self._rand(n) < 0.3, 0.3 * self._rand(n), 0.3 + 1.2 * self._rand(n))
        if self.clean:
            blur, psf = blur * 0 + 0.3, psf * 0
        tilted = torch.where(self._rand(n, 1) < 0.3, 0.1 * self._randn(n, 2).clamp(-1, 1), 0.0)
        pattern_of_aperture = self._choose_aperture(n)
        pad = 16
        frames = detector.render_disks(
            coefficients, position + pad, matrix, fraction, (self.size + 2 * pad, self.size + 2 * pad),
            electrons=elastic, edge_blur_px=blur, illumination=tilted, transmission=pattern_of_aperture,
        )  # fmt: skip
        probe = self._draw_probe(matrix, fraction, radius, dose, blur, psf, tilted, pattern_of_aperture)
        frames = self._inelastic(frames, psf, px)[:, pad:-pad, pad:-pad]
        frames = self._add_backgrounds(frames, origin, px, dose * tds, dose * lorentz, dose * glass)
        frames = detector.count_electrons(frames, self._noise)
        if not self.clean:
            frames = self._add_faults(frames, origin, radius, dose)
        spots = self._list_spots(which, position, coefficients, fraction, elastic, radius)
        optics = torch.stack((t["energy"][which], aperture * fraction), dim=-1)
        return TrainingBatch(frames, probe, *spots, radius, dose, origin, optics)

    def _choose_orientations(self, n: int) -> Tensor:
        """Half of the samples from orientations rich in lit forbidden reflections, as far as there are
        any."""
        which = self._randint(len(self._tensors["aperture"]), n)
        if len(self._rich):
            rich = self._rich[self._randint(len(self._rich), n)]
            which = torch.where(self._rand(n) < 0.45, rich, which)
        return which

    def _choose_coefficients(self, which: Tensor) -> Tensor:
        """Disk polynomials of the chosen orientations; sometimes a mixture of two thicknesses (wedge), or
        flat disks."""
        t, n = self._tensors, len(which)
        z = t["coefficients"].shape[1]
        first, second = self._randint(z, n), self._randint(z, n)
        share = torch.where(self._rand(n) < 0.2, self._rand(n), 0.0)
        out = (
            t["coefficients"][which, first].float()
            * (t["scale"][which, first] * (1 - share[:, None]))[..., None]
        )
        mixed = torch.nonzero(share > 0).squeeze(1)
        if len(mixed):
            w, s = which[mixed], second[mixed]
            out[mixed] += t["coefficients"][w, s].float() * (t["scale"][w, s] * share[mixed, None])[..., None]
        flat = torch.nonzero(self._rand(n) < self.flat).squeeze(1)
        if len(flat):
            mean = out[flat] @ detector.mean_over_aperture(torch.ones(1, device=self.device))[0]
            out[flat] = 0.0
            out[flat, :, 0] = mean.clamp_min(0)
        return out

    def _choose_camera(self, aperture: Tensor, spacing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Disk radius (px), pixel size (1/angstrom) and the affine map (n, 2, 2) from g/px to detector px."""
        n = len(aperture)
        u = self._rand(n)
        radius = torch.where(self._rand(n) < 0.75, _log_uniform(u, 4.0, 12.0), _log_uniform(u, 2.5, 25.0))
        if self.radius is not None:
            radius = _log_uniform(u, *self.radius)
        smallest, nearest = torch.full_like(u, 2.5), torch.full_like(u, 10.0)
        if self.small:
            some = self._rand(n) < self.small
            radius = torch.where(some, _log_uniform(u, 1.8, 4.0), radius)
            smallest, nearest = torch.where(some, 1.8, smallest), torch.where(some, 5.0, nearest)
        ratio = spacing / aperture
        # a few spots at least: spacing below a fifth to a half of the frame
        spread = 0.15 + 0.35 * self._rand(n) ** 2
        if self.radius is None:
            radius = torch.minimum(
                torch.maximum(radius, nearest / ratio), spread * max(self.size, 128) / ratio
            )
            radius = torch.maximum(radius, smallest).clamp_max(25.0)
        angle = 2 * math.pi * self._rand(n)
        cos, sin = torch.cos(angle), torch.sin(angle)
        turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
        turn[:, :, 1] *= torch.where(self._rand(n) < 0.5, 1.0, -1.0)[:, None]
        u = self._rand(n)
        stretch = (
            torch.where(u < 0.3, 0.0, torch.where(u < 0.9, 0.03 * self._rand(n), 0.05 * self._rand(n))) / 2
        )
        axis = math.pi * self._rand(n)
        c2, s2 = torch.cos(2 * axis) * stretch, torch.sin(2 * axis) * stretch
        ellipse = torch.stack([torch.stack([1 + c2, s2], -1), torch.stack([s2, 1 - c2], -1)], -2)
        return radius, aperture / radius, ellipse @ turn

    def _choose_origin(self, n: int) -> Tensor:
        """Direct beam: half near the centre (descan), half anywhere such that a window of a larger pattern is
        seen."""
        centred = self.size // 2 + 8 * (2 * self._rand(n, 2) - 1)
        window = self.size * (1.5 * self._rand(n, 2) - 0.25)
        return torch.where(self._rand(n, 1) < 0.5, centred, window)

    def _choose_dose(self, n: int) -> Tensor:
        if self.dose is not None:
            return _log_uniform(self._rand(n), *self.dose)
        u, v = self._rand(n), self._rand(n)
        low = _log_uniform(v, 2e3, 1e5)
        dose = torch.where(
            u < 0.6, low, torch.where(u < 0.85, _log_uniform(v, 1e5, 1e6), _log_uniform(v, 1e6, 1e7))
        )
        if self.faint:
            dose = torch.where(self._rand(n) < self.faint, _log_uniform(v, 3e2, 2e3), dose)
        if self.bright:
            dose = torch.where(self._rand(n) < self.bright, _log_uniform(v, 1e7, 1e9), dose)
        return dose

    def _choose_aperture(self, n: int) -> Tensor | None:
        """Transmission (n, K, K) if any sample of the batch has a bullseye aperture."""
        some = self._rand(n) < (0.0 if self.clean else self.bullseye)
        if not bool(some.any()):
            return None
        which = self._randint(len(_BULLSEYES), n)
        patterns = _bullseye_apertures().to(self.device)
        return torch.where(some[:, None, None], patterns[which], torch.ones_like(patterns[:1]))

    def _draw_probe(
        self,
        matrix: Tensor,
        fraction: Tensor,
        radius: Tensor,
        dose: Tensor,
        blur: Tensor,
        psf: Tensor,
        tilted: Tensor,
        transmission: Tensor | None,
    ) -> Tensor:
        n = len(matrix)
        crop = min(self.size, 64 if float(radius.max()) < 24 else 96)
        disk = torch.zeros(n, 1, N_COEFFICIENTS, device=self.device)
        disk[..., 0] = 1.0
        centre = torch.full((n, 1, 2), float(crop // 2), device=self.device)
        electrons = (dose * _log_uniform(self._rand(n), 5.0, 100.0)).clamp_min(2e4)
        image = detector.render_disks(
            disk, centre, matrix, fraction, (crop, crop),
            electrons=electrons, edge_blur_px=blur, illumination=tilted, transmission=transmission,
        )  # fmt: skip
        image = detector.blur_frames(image, psf_px=psf)
        image = detector.count_electrons(image, self._noise)
        start = self.size // 2 - crop // 2
        probe = torch.zeros(n, self.size, self.size, device=self.device)
        probe[:, start : start + crop, start : start + crop] = image
        return probe

    def _inelastic(self, frames: Tensor, psf: Tensor, px: Tensor) -> Tensor:
        """Point spread for all; plasmon losses for a third, a scintillator's tail for a tenth."""
        if self.clean:
            return frames
        n = len(frames)
        u = self._rand(n)
        out = frames.clone()
        plain, lossy, tail = u < 0.57, u >= 0.67, (u >= 0.57) & (u < 0.67)
        if plain.any():
            out[plain] = detector.blur_frames(frames[plain], psf_px=psf[plain])
        if lossy.any():
            m = int(lossy.sum())
            out[lossy] = detector.blur_frames(
                frames[lossy],
                psf_px=psf[lossy],
                loss=0.4 * self._rand(m),
                loss_px=_log_uniform(self._rand(m), 0.0015, 0.1) / px[lossy],
                cutoff_px=(0.2 + 0.3 * self._rand(m)) / px[lossy],
            )
        if tail.any():
            m = int(tail.sum())
            out[tail] = detector.blur_frames(
                frames[tail], psf_px=psf[tail], tail=0.1 * self._rand(m), tail_px=3 + 5 * self._rand(m)
            )
        return out

    def _add_backgrounds(
        self, frames: Tensor, origin: Tensor, px: Tensor, tds: Tensor, lorentz: Tensor, glass: Tensor
    ) -> Tensor:
        if self.clean:
            return frames
        n, shape = len(frames), (self.size, self.size)
        distance2 = detector.squared_distance(origin, shape)
        frames = frames + tds[:, None, None] * detector.thermal_background(
            distance2, (0.6 + 0.5 * self._rand(n)) / px
        )
        some = lorentz > 0
        if some.any():
            m = int(some.sum())
            frames[some] += lorentz[some, None, None] * detector.lorentzian_background(
                distance2[some], _log_uniform(self._rand(m), 0.02, 0.3) / px[some], 1.5 / px[some]
            )
        some = glass > 0
        if some.any():
            m = int(some.sum())
            q = torch.where(self._rand(m) < 0.5, 0.25 + 0.1 * self._rand(m), 0.45 + 0.08 * self._rand(m))
            frames[some] += glass[some, None, None] * detector.amorphous_rings(
                distance2[some], q / px[some], (0.04 + 0.06 * self._rand(m)) / px[some], self._generator
            )
        return frames

    def _add_faults(self, frames: Tensor, origin: Tensor, radius: Tensor, dose: Tensor) -> Tensor:
        n = len(frames)
        some = (self._rand(n) < 0.2) & (dose <= 5e4)
        if some.any():
            share = 0.2 + 0.4 * self._rand(int(some.sum()))
            frames[some] = detector.spread_counts(
                frames[some], share, self._noise, binary=bool(self._rand(1) < 0.5)
            )
        peak = frames.flatten(1).amax(1)
        some = self._rand(n) < 0.12
        if some.any():
            frames[some] = detector.add_hot_pixels(
                frames[some],
                int(self._randint(12, 1)) + 1,
                peak[some] * 3 * self._rand(int(some.sum())),
                self._generator,
            )
        some = self._rand(n) < 0.1
        if some.any():
            frames[some] = detector.kill_pixels(frames[some], 1e-3 * float(self._rand(1)), self._generator)
        some = self._rand(n) < 0.08
        if some.any():
            ceiling = (peak[some] * (0.05 + 0.95 * self._rand(int(some.sum())))).clamp_min(3).round()
            frames[some] = detector.saturate(frames[some], ceiling)
        some = self._rand(n) < 0.05
        if some.any():
            m = int(some.sum())
            frames[some] = detector.beam_stop(
                frames[some], origin[some], radius[some] * (2.4 + 3.6 * self._rand(m)),
                2 * math.pi * self._rand(m), 0.05 * self._rand(m),
            ).round()  # fmt: skip
        some = self._rand(n) < 0.05
        if some.any():
            m = int(some.sum())
            frames[some] = detector.module_gaps(
                frames[some], self._randint(self.size, m), 2 + self._randint(3, m), self._randint(2, m)
            )
        some = self._rand(n) < 0.03
        if some.any():
            frames[some] = detector.change_contrast(frames[some], 0.25 + 0.75 * self._rand(int(some.sum())))
        return frames

    def _list_spots(
        self,
        which: Tensor,
        position: Tensor,
        coefficients: Tensor,
        fraction: Tensor,
        elastic: Tensor,
        radius: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, amplitudes and electrons; coincident reflections as one, spots far outside left out."""
        t = self._tensors
        light = (coefficients * detector.mean_over_aperture(fraction)[:, None]).sum(-1).clamp_min(0)
        leader = t["leader"][which].long()
        light = torch.zeros_like(light).scatter_add_(1, leader, light)
        electrons = light * elastic[:, None]
        amplitude = t["amplitude"][which]
        alone = leader == torch.arange(leader.shape[1], device=self.device)
        margin = (radius + 8)[:, None, None]
        near = ((position > -margin) & (position < self.size - 1 + margin)).all(-1)  # False where NaN
        known = (amplitude > 0) | (electrons > 0.3)
        listed = alone & near & known
        # brightest first, the rest as NaN
        order = torch.argsort(torch.where(listed, electrons, -1.0), dim=1, descending=True)
        listed = listed.gather(1, order)
        position = position.gather(1, order[..., None].expand(-1, -1, 2))
        position = torch.where(listed[..., None], position, torch.nan)
        amplitude = torch.where(listed, amplitude.gather(1, order), torch.nan)
        electrons = torch.where(listed, electrons.gather(1, order), torch.nan)
        width = max(1, int(listed.sum(1).max()))
        return position[:, :width], amplitude[:, :width], electrons[:, :width]

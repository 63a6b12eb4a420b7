"""The data sets of the accuracy benchmark: patterns without noise, exact truth, fixed seeds.

Made on first use and kept in ``runs/benchmark/data`` (or ``FCUNET_BENCHMARK``), minutes of CPU in all. None
is used in training or tuning, but for `tuning`, which exists for the latter:

``abtem-si, abtem-sno2``
    Si [110] and SnO2 [001] by abTEM, 200 kV, disks of 6 px radius, 5 to 120 nm, mistilt 0 to 20 mrad; both
    prototypes (diamond, rutile) were left out of training. The same with a point spread of 0.8 px and 5 %
    background (``-psf``), and with coarser pixels and smaller disks (``-coarse``).
``round, ellipse, bullseye``
    Zone axes of random crystals of the test split by the package's own scattering, 10 to 40 nm, mistilt to 6
    mrad: round aperture, the same patterns stretched by 3 % (known, as from a calibration), a bullseye
    aperture.
``tuning``
    The same with crystals of the validation split; half of the patterns blurred and with background.
``flat``
    Evenly filled disks: no dynamical scattering.
``prototypes``
    Single patterns of the test split with everything training simulates (frames, radii, faults), for recall,
    precision and |V_g|.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from fcunet.kernels.lattice import reduce_basis
from fcunet.simulation import detector
from fcunet.simulation.crystals import Crystal, load_crystal
from fcunet.simulation.scattering import (
    StructureFactors,
    excitation_error,
    scatter,
    select_beams,
    tilt_rotation,
    wavelength,
    zone_rotation,
)
from fcunet.simulation.target import FORBIDDEN_BELOW, SIGMA_S, coincident_groups, reflection_amplitudes
from fcunet.training.dataset import PatternSource, TrainingBatch, make_orientations, training_crystals
from fcunet.training.orientations import shortest_spacing

from .abtem_scan import random_deformations, simulate_scan
from .disks import simulate_disks

SEED = 20261125
RADIUS_PX, SIZE = 6.0, 256
PSF_PX, BACKGROUND = 0.8, 0.05
_TILTS = [(0.0, 0.0), (2.0, 1.0), (-4.0, 4.4), (8.0, -6.0), (-12.0, 16.0)]
_DEPTHS = [5.0, 10.0, 20.0, 30.0, 40.0, 60.0, 80.0, 120.0]


@dataclass
class Scan:
    """Patterns of one crystal with one probe; n patterns of H x W, S spots (NaN-padded), (y, x) in px.

    Attributes
    ----------
    patterns : ndarray, shape (n, H, W), float32
        Expected share of the incident electrons in each pixel.
    probe : ndarray, shape (H, W), float32
        Vacuum probe of the same point spread, centred at (H // 2, W // 2).
    g_ref : ndarray, shape (2, 2)
        Lattice of the undeformed crystal on an undistorted detector, rows g1, g2.
    F : ndarray, shape (n, 2, 2)
        Deformation gradient.
    distortion : ndarray, shape (2, 2)
        Detector position = origin + distortion @ undistorted position.
    spot_position, spot_amplitude, spot_share : ndarray, shape (n, S, 2), (n, S), (n, S)
        Centres, |V_g| in volts, share of the electrons in each disk.
    origin : ndarray, shape (n, 2)
    thickness_nm, mistilt_mrad : ndarray, shape (n,)
    radius_px, edge_px, energy_keV, aperture : float
        Disk radius, blur of its edge (px), beam energy, radius of the aperture in 1/angstrom.
    """

    crystal: str
    patterns: np.ndarray
    probe: np.ndarray
    g_ref: np.ndarray
    F: np.ndarray
    distortion: np.ndarray
    spot_position: np.ndarray
    spot_amplitude: np.ndarray
    spot_share: np.ndarray
    origin: np.ndarray
    thickness_nm: np.ndarray
    mistilt_mrad: np.ndarray
    radius_px: float
    edge_px: float
    energy_keV: float
    aperture: float

    def __len__(self) -> int:
        return len(self.patterns)

    def chosen(self, which: np.ndarray) -> "Scan":
        """Some of the patterns."""
        names = ("patterns", "F", "spot_position", "spot_amplitude", "spot_share", "origin")
        return replace(self, **{k: getattr(self, k)[which] for k in (*names, "thickness_nm", "mistilt_mrad")})

    @property
    def in_bars(self) -> np.ndarray:
        """Patterns that the bars on strain are about: 10 to 40 nm, mistilt to 6 mrad."""
        return (self.thickness_nm > 9) & (self.thickness_nm < 41) & (self.mistilt_mrad < 6.1)

    def counts(self, dose: float, draw: int = 0) -> np.ndarray:
        """Poisson counts at `dose` electrons per pattern, the same on every call; expectation if infinite.

        Other draws of the electrons have other numbers.
        """
        if np.isinf(dose):
            return self.patterns * np.float32(NOISE_FREE)
        rng = np.random.default_rng([SEED, int(dose), *([draw] if draw else [])])
        return rng.poisson(self.patterns * dose).astype(np.float32)

    def batch(self, dose: float, counts: np.ndarray) -> TrainingBatch:
        """As the evaluation of training takes it."""
        n = len(self)
        electrons = self.spot_share * (NOISE_FREE if np.isinf(dose) else dose)
        as_tensor = partial(torch.as_tensor, dtype=torch.float32)
        return TrainingBatch(
            torch.as_tensor(counts),
            torch.as_tensor(self.probe)[None],
            as_tensor(self.spot_position),
            as_tensor(self.spot_amplitude),
            as_tensor(electrons),
            torch.full((n,), self.radius_px),
            torch.full((n,), float(dose)),
            as_tensor(self.origin),
            torch.tensor([[self.energy_keV, self.aperture]]),
        )


NOISE_FREE = 1e7  # electrons per pattern that expectation values are scaled to


def in_plane(crystal: Crystal, zone: tuple[int, int, int], g_max: float) -> tuple[np.ndarray, np.ndarray]:
    """Primitive indices (m, 3) and vectors (m, 2), (y, x) in 1/angstrom, of the undeformed zone."""
    reciprocal = np.linalg.inv(crystal.primitive_cell).T @ zone_rotation(crystal, zone).T
    reach = np.ceil(g_max * np.linalg.norm(crystal.primitive_cell, axis=1)).astype(int)
    axes = [np.arange(-n, n + 1) for n in reach]
    hkl = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    g = hkl @ reciprocal
    flat = (np.abs(g[:, 2]) < 1e-6) & (np.hypot(g[:, 0], g[:, 1]) < g_max)
    return hkl[flat], g[flat][:, [1, 0]]


def shortest_basis(vectors: np.ndarray) -> np.ndarray:
    """Two shortest independent vectors (2, 2) of a lattice given by all its vectors (m, 2) near 0."""
    length = np.hypot(*vectors.T)
    v = vectors[np.argsort(length, kind="stable")][1:]
    cross = np.abs(v[0, 0] * v[:, 1] - v[0, 1] * v[:, 0])
    g, _ = reduce_basis(np.array([v[0], v[np.argmax(cross > 1e-6 * length.max() ** 2)]]))
    return g if np.linalg.det(g) < 0 else g[::-1]  # g1 to g2 turns from +x towards +y


def _abtem(crystal: str, zone: tuple[int, int, int], *, coarse: bool = False) -> list[Scan]:
    """One multislice scan."""
    structure, semiangle, energy = load_crystal(crystal), 1.88, 200.0
    box = 60.0 if coarse else 80.0
    made = simulate_scan(
        structure, zone, semiangle_mrad=semiangle, energy_keV=energy, crop=SIZE, seed=SEED,
        box=box, gpts=round(8 * box), columns=3 if coarse else 5,
        tilts_mrad=_TILTS[:3] if coarse else _TILTS, thickness_nm=[10.0, 20.0, 40.0] if coarse else _DEPTHS,
    )  # fmt: skip
    rows, columns = made["scan"].shape[:2]
    n = rows * columns
    F = made["F"].reshape(n, 2, 2)
    patterns = made["scan"].reshape(n, SIZE, SIZE)
    tilts = np.repeat(made["mistilt_mrad"], columns, 0)
    aperture = semiangle * 1e-3 / wavelength(energy)
    radius = aperture * box
    hkl, g = in_plane(structure, zone, 0.75 * SIZE / box)
    position = SIZE // 2 + np.einsum("mi,nij->nmj", g * box, np.linalg.inv(F))
    amplitude = np.stack([_amplitudes(structure, zone, hkl, tilt) for tilt in made["mistilt_mrad"]])
    amplitude = np.repeat(amplitude, columns, 0)
    share = _electrons(patterns, position, radius + 1)
    position, amplitude, share = _listed(position, amplitude, share, radius)
    scan = Scan(
        crystal=crystal, patterns=patterns, probe=made["probe"], g_ref=shortest_basis(g * box), F=F,
        distortion=np.eye(2), spot_position=position, spot_amplitude=amplitude, spot_share=share,
        origin=np.full((n, 2), SIZE / 2), thickness_nm=np.repeat(made["thickness_nm"], columns),
        mistilt_mrad=np.hypot(*tilts.T), radius_px=radius, edge_px=0.5, energy_keV=energy, aperture=aperture,
    )  # fmt: skip
    return [scan]


def _amplitudes(crystal: Crystal, zone: tuple, hkl: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    """|V_g| with the taper of the target, volts, for a beam tilted by (y, x) mrad."""
    factors = StructureFactors(crystal, g_max=4.0)
    index = torch.as_tensor(hkl)
    rotation = tilt_rotation([-t for t in tilt]) @ zone_rotation(crystal, zone)
    g = index.double() @ factors.reciprocal @ torch.as_tensor(rotation).T
    s = excitation_error(g.float(), torch.zeros(1, 2), wavelength(200.0))[:, 0]
    v = (factors.v[factors.flat_index(index)].abs() * torch.exp(-(s**2) / (2 * SIGMA_S**2))).numpy()
    direct = (hkl == 0).all(1)
    largest = v[~direct].max()
    return np.where(direct, largest, np.where(v < FORBIDDEN_BELOW * largest, 0.0, v))


def _electrons(patterns: np.ndarray, position: np.ndarray, radius: float) -> np.ndarray:
    """Share (n, m) of the electrons within `radius` px of each position (n, m, 2)."""
    y, x = np.mgrid[: patterns.shape[1], : patterns.shape[2]]
    out = np.zeros(position.shape[:2])
    for i, frame in enumerate(patterns):
        for j, (cy, cx) in enumerate(position[i]):
            r = int(radius) + 2
            rows = slice(max(int(cy) - r, 0), max(int(cy) + r + 1, 0))
            columns = slice(max(int(cx) - r, 0), max(int(cx) + r + 1, 0))
            inside = np.hypot(y[rows, columns] - cy, x[rows, columns] - cx) <= radius
            out[i, j] = frame[rows, columns][inside].sum()
    return out


def _listed(position: np.ndarray, amplitude: np.ndarray, share: np.ndarray, radius: float):
    """Spots near the frame that have electrons or an amplitude, brightest first, the rest NaN."""
    near = ((position > -radius - 8) & (position < SIZE - 1 + radius + 8)).all(-1)
    known = near & ((amplitude > 0) | (share > 1e-8))
    order = np.argsort(np.where(known, -share, np.inf), axis=1, kind="stable")[:, : int(known.sum(1).max())]
    known = np.take_along_axis(known, order, 1)
    position = np.take_along_axis(position, order[..., None], 1)
    amplitude, share = (np.take_along_axis(a, order, 1) for a in (amplitude, share))
    return (
        np.where(known[..., None], position, np.nan),
        *(np.where(known, a, np.nan) for a in (amplitude, share)),
    )


def blurred(scan: Scan, psf_px: float = PSF_PX, background: float = BACKGROUND) -> Scan:
    """The scan with a Gaussian point spread and a share of its intensity as a broad hump.

    The hump is a Gaussian about the middle, a third of the frame wide: thermal diffuse scattering.
    """
    frames = gaussian_filter(scan.patterns, psf_px, axes=(1, 2), mode="constant", truncate=6)
    height, width = frames.shape[1:]
    y, x = np.ogrid[:height, :width]
    hump = np.exp(-0.5 * (((y - height // 2) ** 2 + (x - width // 2) ** 2) / (width / 3) ** 2))
    total = frames.sum(axis=(1, 2), keepdims=True)
    frames = (1 - background) * frames + background * total * hump / hump.sum()
    return replace(
        scan,
        patterns=frames.astype(np.float32),
        probe=gaussian_filter(scan.probe, psf_px, mode="constant", truncate=6),
        spot_share=scan.spot_share * (1 - background),
        edge_px=float(np.hypot(scan.edge_px, psf_px)),
    )


def _zone_axes(
    split: str, n_scans: int, n_patterns: int, seed: int, *, stretch: float = 0.0, rings: int = 0
) -> list[Scan]:
    """Scans of random crystals on random zone axes; a crystal too coarse or too fine is drawn again."""
    rng = np.random.default_rng([SEED, seed])
    crystals = training_crystals(split)
    families = sorted({c.prototype for c in crystals})
    scans: list[Scan] = []
    while len(scans) < n_scans:
        family = [c for c in crystals if c.prototype == families[rng.integers(len(families))]]
        crystal = family[rng.integers(len(family))]
        zone = rng.integers(-1, 2, 3) if rng.random() < 0.7 else rng.integers(-2, 3, 3)
        state = rng.integers(2**32)
        if not zone.any() or np.gcd.reduce(zone) != 1:
            continue
        scan = _zone_axis(crystal, tuple(int(i) for i in zone), n_patterns, int(state), stretch, rings)
        if scan is not None:
            scans.append(scan)
    return scans


def _zone_axis(
    crystal: Crystal, zone: tuple[int, int, int], n: int, seed: int, stretch: float, rings: int
) -> Scan | None:
    """`n` patterns of one zone; None where disks of 6 px would be too few or overlap."""
    rng = np.random.default_rng(seed)
    energy = float(rng.choice([80.0, 200.0, 300.0]))
    factors = StructureFactors(crystal, g_max=4.8, absorption=0.06)
    base = zone_rotation(crystal, zone)
    centre = select_beams(factors, base, energy, n_beams=160)
    strength = reflection_amplitudes(centre)
    if int(((centre.s.abs() < 0.012) & (strength > 0.04 * strength[0])).sum()) < 13:
        return None
    aperture = 0.42 * shortest_spacing(centre)
    semiangle = aperture * wavelength(energy) * 1e3
    px = aperture / RADIUS_PX
    if not 0.5 < semiangle < 3.5 or not 0.5 < SIZE / 2 * px < 2.4:
        return None
    tilt = rng.uniform(0, 6, n) * np.where(np.arange(n) % 3 == 0, 0.0, 1.0)
    direction = rng.uniform(0, 2 * np.pi, n)
    depth = rng.uniform(100, 400, n)
    F = random_deformations(n + 1, rng)[1:]
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    axis = rng.uniform(0, np.pi)
    c2, s2 = np.cos(2 * axis) * stretch / 2, np.sin(2 * axis) * stretch / 2
    ellipse = np.array([[1 + c2, s2], [s2, 1 - c2]])
    vectors = in_plane(crystal, zone, 1.2)[1] @ turn.T / px
    origin = SIZE / 2 + rng.uniform(-2, 2, (n, 2))
    parts = [
        select_beams(factors, tilt_rotation((t * np.sin(a), t * np.cos(a))) @ base, energy, n_beams=160)
        for t, a in zip(tilt, direction, strict=True)
    ]
    coefficients = scatter(parts, [semiangle] * n, depth[:, None])[:, 0]  # (n, k, 45)
    k = coefficients.shape[1]
    position, amplitude = np.full((n, k, 2), np.nan), np.zeros((n, k))
    leader = np.tile(np.arange(k), (n, 1))
    share = (coefficients @ detector.mean_over_aperture(torch.ones(1))[0]).clamp_min(0).numpy()
    for i, beams in enumerate(parts):
        m = len(beams)
        flat = beams.hkl.double() @ factors.reciprocal @ torch.as_tensor(base).T  # a tilt turns no spot
        g = flat.numpy()[:, [1, 0]] @ turn.T / px
        position[i, :m] = origin[i] + (g @ np.linalg.inv(F[i])) @ ellipse.T
        amplitude[i, :m] = reflection_amplitudes(beams).numpy()
        weight = torch.as_tensor(share[i, :m]) + 1e-9
        leader[i, :m] = coincident_groups(torch.as_tensor(g), weight, 0.12 * RADIUS_PX).numpy()
    affine = torch.as_tensor(ellipse @ turn, dtype=torch.float32)
    matrix = (torch.linalg.inv(affine) / RADIUS_PX).expand(n + 1, 2, 2)
    holes = torch.ones(1, 64, 64) if not rings else detector.bullseye(rings)[None]
    edge, pad = 0.5, 16
    draw = partial(
        detector.render_disks, shape=(SIZE + 2 * pad,) * 2, threshold=0.0,
        transmission=holes.expand(n + 1, -1, -1) if rings else None,
        matrix=matrix, fraction=torch.ones(n + 1), edge_blur_px=torch.full((n + 1,), edge),
    )  # fmt: skip
    lit = torch.zeros(n + 1, k, 45)
    lit[:n] = coefficients
    lit[n, 0, 0] = 1.0
    places = np.full((n + 1, k, 2), np.nan)
    places[:n], places[n, 0] = position, SIZE // 2
    frames = draw(lit, torch.as_tensor(places + pad, dtype=torch.float32))[:, pad:-pad, pad:-pad].numpy()
    total = np.zeros_like(share)
    np.add.at(total, (np.arange(n)[:, None], leader), share)
    alone = leader == np.arange(k)
    position = np.where(alone[..., None], position, np.nan)
    position = np.where(np.isfinite(position), position, 1e6)
    position, amplitude, total = _listed(position, amplitude, total, RADIUS_PX)
    return Scan(
        crystal=f"{crystal.name} [{' '.join(map(str, zone))}] {energy:g} kV", patterns=frames[:n],
        probe=frames[n], g_ref=shortest_basis(vectors), F=F, distortion=ellipse, spot_position=position,
        spot_amplitude=amplitude, spot_share=total, origin=origin, thickness_nm=depth / 10, mistilt_mrad=tilt,
        radius_px=RADIUS_PX, edge_px=edge, energy_keV=energy, aperture=aperture,
    )  # fmt: skip


def _tuning() -> list[Scan]:
    scans = _zone_axes("validation", 16, 6, seed=1)
    return [blurred(s) if i % 2 else s for i, s in enumerate(scans)]


def _flat() -> list[Scan]:
    """Two scans of flat disks: 6 px sharp, 9 px as in older comparisons."""
    scans = []
    for seed, (radius, edge, spacing) in enumerate([(6.0, 0.5, 22.0), (9.0, 0.8, 30.5)]):
        made = simulate_disks(
            (6, 8), (SIZE, SIZE), radius_px=radius, edge_px=edge, spacing_px=spacing, electrons=1.0,
            noise=False, seed=seed,
        )  # fmt: skip
        n = 48
        position = made.positions.reshape(n, -1, 2)
        patterns = made.patterns.reshape(n, SIZE, SIZE)
        inside = np.isfinite(position[..., 0])
        share = np.where(
            inside, _electrons(patterns, np.where(inside[..., None], position, -99), radius + 3), np.nan
        )
        origin = np.nanmean(position, 1)
        scans.append(
            Scan(
                crystal=f"disks of {radius:g} px", patterns=patterns, probe=made.probe,
                g_ref=made.g_ref, F=made.F.reshape(n, 2, 2), distortion=np.eye(2), spot_position=position,
                spot_amplitude=np.where(inside, 1.0, np.nan), spot_share=share, origin=origin,
                thickness_nm=np.full(n, np.nan), mistilt_mrad=np.full(n, np.nan), radius_px=radius,
                edge_px=edge, energy_keV=200.0, aperture=0.05,
            )
        )  # fmt: skip
    return scans


DATA_SETS: dict[str, Callable[[], list[Scan]]] = {
    "abtem-sno2": partial(_abtem, "SnO2-rutile", (0, 0, 1)),
    "abtem-si": partial(_abtem, "Si", (1, 1, 0)),
    "abtem-sno2-coarse": partial(_abtem, "SnO2-rutile", (0, 0, 1), coarse=True),
    "abtem-si-coarse": partial(_abtem, "Si", (1, 1, 0), coarse=True),
    "round": partial(_zone_axes, "test", 16, 6, seed=2),
    "ellipse": partial(_zone_axes, "test", 16, 6, seed=2, stretch=0.03),
    "bullseye": partial(_zone_axes, "test", 16, 6, seed=2, rings=2),
    "flat": _flat,
    "tuning": _tuning,
}
DERIVED = {"abtem-sno2-psf": "abtem-sno2", "abtem-si-psf": "abtem-si"}
PROTOTYPES = "prototypes"


def data_folder() -> Path:
    """Where data sets and detections are kept."""
    return Path(
        os.environ.get("FCUNET_BENCHMARK", Path(__file__).resolve().parents[1] / "runs" / "benchmark")
    )


def load(name: str) -> list[Scan]:
    """The scans of a data set, made if need be."""
    if name in DERIVED:
        return [blurred(s.chosen(s.in_bars)) for s in load(DERIVED[name])]
    path = data_folder() / "data" / f"{name}.npz"
    if not path.exists():
        print(f"making data set {name}", flush=True)
        scans = DATA_SETS[name]()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial.npz")
        arrays = {f"{f.name}:{i}": getattr(s, f.name) for i, s in enumerate(scans) for f in fields(Scan)}
        np.savez(partial_path, count=len(scans), **arrays)
        partial_path.replace(path)
    with np.load(path) as stored:
        scans = []
        for i in range(int(stored["count"])):
            values = {f.name: stored[f"{f.name}:{i}"] for f in fields(Scan)}
            scans.append(Scan(**{k: v.item() if v.ndim == 0 else v for k, v in values.items()}))
    return scans


def prototype_batches(dose: float, n: int = 64, split: str = "test") -> list[TrainingBatch]:
    """Patterns of a split at one dose, in batches of 8, the same on every call."""
    path = data_folder() / "data" / f"{split}-orientations.npz"
    if not path.exists():
        from fcunet.training.orientations import save_pool

        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([SEED, 3])
        save_pool(make_orientations(training_crystals(split), 192, rng), path)
    source = PatternSource(split, SIZE, seed=SEED, pool=path, dose=(dose, dose))
    return [source.batch(8) for _ in range(n // 8)]

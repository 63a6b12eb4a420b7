"""Small strain scans from an independent multislice code (abTEM, GPL, optional) with exact truth.

Every column of a scan is one in-plane deformation, every row one mistilt and thickness. The crystal is
deformed atom by atom inside a box of fixed size, so that no cell is strained to fit and the pixel size is
exact; slices are exact Fourier sums over the atoms, the multislice is abTEM's (``pip install
fcunet[validation]``). About 12 ms of CPU per slice of 640 x 640. `benchmarks.accuracy_data` says which scans
there are, and keeps them.
"""

import numpy as np
import torch

from fcunet.simulation.crystals import Crystal
from fcunet.simulation.scattering import scattering_factor, zone_rotation

POTENTIAL = 47.878  # V angstrom^2


def atoms_of_one_period(
    crystal: Crystal, zone: tuple[int, int, int], box: tuple[float, float], F: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Site indices, positions (n, 3) as (y, x, z) and the period along the beam, all in angstrom.

    The in-plane deformation `F` (2, 2), axes (y, x), acts about the middle of the box.
    """
    rotation = zone_rotation(crystal, zone)
    cell = crystal.primitive_cell @ rotation.T  # rows, lab (x, y, z)
    direction = np.asarray(zone, float) @ np.linalg.inv(np.linalg.inv(crystal.cell) @ crystal.primitive_cell)
    direction = np.rint(direction * 12).astype(int)
    direction //= np.gcd.reduce(direction)  # shortest lattice vector along the beam
    period = float(np.linalg.norm(direction @ cell))
    reach = int(np.ceil((max(box) + period) * np.linalg.norm(np.linalg.inv(cell), axis=0).max())) + 1
    n = np.arange(-reach, reach + 1)
    sites, positions = [], []
    lattice = np.stack(np.meshgrid(n, n, n, indexing="ij"), -1).reshape(-1, 3) @ cell
    half = np.array(box) / 2
    for i, fractional in enumerate(crystal.primitive_positions):
        r = lattice + fractional @ cell
        z = r[:, 2] + 1e-6
        r = r[(z >= 0) & (z < period)]
        plane = r[:, [1, 0]] @ F.T
        kept = ((plane >= -half - 1e-6) & (plane < half - 1e-6)).all(1)
        positions.append(np.column_stack([plane[kept] + half, r[kept, 2]]))
        sites.append(np.full(int(kept.sum()), i))
    return np.concatenate(sites), np.concatenate(positions), period


def exact_slices(
    crystal: Crystal,
    sites: np.ndarray,
    positions: np.ndarray,
    period: float,
    box: tuple[float, float],
    gpts: int,
    thick: float,
) -> np.ndarray:
    """Projected potentials (slices, gpts, gpts) in volt angstrom, rows y, by Fourier sums over the atoms."""
    count = max(1, round(period / thick))
    ky, kx = (np.fft.fftfreq(gpts, side / gpts) for side in box)
    k2 = torch.tensor(ky[:, None] ** 2 + kx[None] ** 2)
    which = np.clip(((positions[:, 2] + 1e-6) / period * count).astype(int), 0, count - 1)
    out = np.zeros((count, gpts, gpts), np.float32)
    for s in range(count):
        spectrum = np.zeros((gpts, gpts), complex)
        for i, symbol in enumerate(crystal.symbols):
            chosen = positions[(which == s) & (sites == i)]
            if len(chosen) == 0:
                continue
            wave_y = np.exp(-2j * np.pi * ky[:, None] * chosen[:, 0])
            wave_x = np.exp(-2j * np.pi * chosen[:, 1, None] * kx)
            damping = torch.exp(-2 * np.pi**2 * crystal.u_rms[i] ** 2 * k2)
            factor = (scattering_factor(symbol, k2.sqrt()) * damping).numpy()
            spectrum += crystal.occupancy[i] * factor * (wave_y @ wave_x)
        # (1/area) sum_k V(k) exp(2 pi i k r), and ifft2 divides by gpts^2
        out[s] = np.fft.ifft2(spectrum).real * (POTENTIAL * gpts**2 / (box[0] * box[1]))
    return out


def multislice(
    slices: np.ndarray,
    period: float,
    box: tuple[float, float],
    repeats: list[int],
    *,
    energy_keV: float,
    semiangle_mrad: float,
    tilt_mrad: tuple[float, float] = (0.0, 0.0),
    crop: int = 256,
) -> np.ndarray:
    """Diffraction patterns after each number of `repeats` (ascending) of the period: (len(repeats), crop,
    crop).

    `tilt_mrad` (y, x) is the tilt of the incident beam; patterns are centred on the direct beam. Unit sum
    over the whole grid without absorption.
    """
    import abtem

    gpts = slices.shape[-1]
    abtem.config.set({"precision": "float32", "fft": "fftw", "num_threads": 1})
    unit = abtem.PotentialArray(slices, slice_thickness=period / len(slices), extent=box)
    planes = tuple(r * len(slices) - 1 for r in repeats)
    potential = abtem.CrystalPotential(unit, (1, 1, repeats[-1]), exit_planes=planes)
    probe = abtem.Probe(
        energy=energy_keV * 1e3,
        semiangle_cutoff=semiangle_mrad,
        extent=box,
        gpts=(gpts, gpts),
        tilt=tilt_mrad,
    )
    detector = abtem.PixelatedDetector(max_angle=None)
    scan = abtem.CustomScan([(box[0] / 2, box[1] / 2)])
    result = probe.multislice(potential, scan=scan, detectors=detector, lazy=False)
    patterns = np.asarray(result.array).reshape(len(repeats), *result.array.shape[-2:])
    start = patterns.shape[-1] // 2 - crop // 2
    return patterns[:, start : start + crop, start : start + crop].astype(np.float32)


def random_deformations(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 2, 2): the first is the identity, the others have strains up to 2 % and rotations up to 15 mrad."""
    F = np.tile(np.eye(2), (n, 1, 1))
    for i in range(1, n):
        e_yy, e_xx = rng.uniform(-0.02, 0.02, 2)
        e_xy, theta = rng.uniform(-0.01, 0.01), rng.uniform(-0.015, 0.015)
        F[i] += [[e_yy, e_xy + theta], [e_xy - theta, e_xx]]
    return F


def simulate_scan(
    crystal: Crystal,
    zone: tuple[int, int, int],
    *,
    tilts_mrad: list[tuple[float, float]],
    thickness_nm: list[float],
    columns: int,
    energy_keV: float = 200.0,
    semiangle_mrad: float = 1.88,
    box: float = 80.0,
    gpts: int = 640,
    crop: int = 256,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Patterns of one crystal: rows are (mistilt, thickness), columns deformations.

    Returns
    -------
    dict of ndarray
        ``scan`` (rows, columns, crop, crop) float32 shares of the incident electrons, ``probe`` (crop, crop),
        ``F`` (rows, columns, 2, 2), ``thickness_nm`` (rows,) as whole periods allow, ``mistilt_mrad``
        (rows, 2).
    """
    F = random_deformations(columns, np.random.default_rng(seed))
    beam = {"energy_keV": energy_keV, "semiangle_mrad": semiangle_mrad, "crop": crop}
    sides = (box, box)
    probe = multislice(np.zeros((1, gpts, gpts), np.float32), 1.0, sides, [1], **beam)[0]
    rows = [(tilt, depth) for tilt in tilts_mrad for depth in thickness_nm]
    scan = np.zeros((len(rows), columns, crop, crop), np.float32)
    reached = np.zeros(len(rows))
    for column, deformation in enumerate(F):
        sites, positions, period = atoms_of_one_period(crystal, zone, sides, deformation)
        slices = exact_slices(crystal, sites, positions, period, sides, gpts, 2.0)
        repeats = [max(1, round(10 * depth / period)) for depth in thickness_nm]
        for t, tilt in enumerate(tilts_mrad):
            part = slice(t * len(repeats), (t + 1) * len(repeats))
            scan[part, column] = multislice(slices, period, sides, repeats, tilt_mrad=tilt, **beam)
            reached[part] = np.array(repeats) * period / 10
        print(f"  {crystal.name}: column {column + 1} of {columns}", flush=True)
    return {
        "scan": scan,
        "probe": probe,
        "F": np.broadcast_to(F, (len(rows), *F.shape)).copy(),
        "thickness_nm": reached,
        "mistilt_mrad": np.array([tilt for tilt, _ in rows]),
    }

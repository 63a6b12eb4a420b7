"""Dynamical electron diffraction: a batched N-beam propagator in torch.

For one incident direction the amplitudes psi of N beams obey  d psi / dz = i [ U + diag(2 pi s_g) ] psi  with
the coupling U_gh = sigma (V_(g-h) + i V'_(g-h)). All directions inside a convergent probe share U; only the
excitation errors differ. So the amplitudes of all beams and all tilts are kept as one (beams, tilts) matrix,
and the propagator is expanded in Chebyshev polynomials of the Hamiltonian: one matrix product per term, exact
to rounding, and any number of thicknesses from one recurrence (H. Tal-Ezer, R. Kosloff, J. Chem. Phys. 81
(1984) 3967).

The intensity of every disk is then fitted with a polynomial over the aperture, so that patterns can be drawn
later on any detector, at exact sub-pixel positions, without scattering again.

Lab frame: beam along +z, Cartesian (x, y, z), angstrom; vectors of the detector plane are handed out as (y,
x).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .crystals import Crystal, atomic_number, lobato_parameters

DEGREE = 8
N_COEFFICIENTS = (DEGREE + 1) * (DEGREE + 2) // 2  # 45
# Tilts reach this far beyond the aperture edge, so that pixels cut by the edge are not extrapolated.
DISK_MARGIN = 1.15
N_TILTS = 72

# Weak beams: typical eigenvalue of the strong ones, and the least distance from it divided by; rad/A
_BETHE_ENERGY, _BETHE_FLOOR = 0.02, 0.04

_REST_ENERGY_KEV = 510.99895
_PLANCK = 12.3984198  # h c in keV angstrom
_POTENTIAL = 47.878  # V angstrom^2: h^2 / (2 pi m e), turns f/volume into volts


def wavelength(energy_keV: float) -> float:
    """Relativistic electron wavelength, angstrom (200 keV: 0.02508)."""
    return _PLANCK / math.sqrt(energy_keV * (2 * _REST_ENERGY_KEV + energy_keV))


def interaction_parameter(energy_keV: float) -> float:
    """Sigma, in rad per volt and angstrom (200 keV: 7.288e-4)."""
    energy = energy_keV * 1e3
    rest = _REST_ENERGY_KEV * 1e3
    return 2 * math.pi / (wavelength(energy_keV) * energy) * (rest + energy) / (2 * rest + energy)


def scattering_factor(symbol: str, g: Tensor) -> Tensor:
    """Lobato-Van Dyck electron scattering factor f(g) in angstrom, g in 1/angstrom (Acta Cryst. A70 (2014)
    636)."""
    a, b = lobato_parameters()[symbol]
    g2 = g * g
    total = torch.zeros_like(g)
    for ai, bi in zip(a.tolist(), b.tolist(), strict=True):
        total += ai * (2 + bi * g2) / (1 + bi * g2) ** 2
    return total


class StructureFactors:
    """Fourier coefficients of a crystal's potential on a table of primitive indices, ready for gathering.

    Parameters
    ----------
    crystal : Crystal
    g_max : float
        Table radius in 1/angstrom. Couplings need twice the radius of the beams.
    absorption : float
        Mean absorptive potential in volts from thermal diffuse scattering; 0.03 to 0.12 at 100 to 300 keV. It
        sits in Gaussians of rms width `absorption_width` angstrom on the atoms, with weight Z^2 u^2 (the
        scattering of an Einstein oscillator), so that channelled electrons are absorbed more strongly.

    Attributes
    ----------
    v, v_absorptive : Tensor, flat, complex64
        V_g and V'_g in volts, thermal motion included.
    reciprocal : Tensor, shape (3, 3), float64
        Rows are the primitive reciprocal vectors, Cartesian crystal frame, 1/angstrom.
    half : tuple of int
        The table runs from -half to +half along each index.
    """

    def __init__(
        self,
        crystal: Crystal,
        *,
        g_max: float = 6.0,
        absorption: float = 0.0,
        absorption_width: float = 0.12,
        device: torch.device | str = "cpu",
    ) -> None:
        cell = crystal.primitive_cell
        self.crystal = crystal
        self.g_max = g_max
        self.device = torch.device(device)
        self.reciprocal = torch.tensor(np.linalg.inv(cell).T, dtype=torch.float64, device=device)
        self.half: tuple[int, int, int] = tuple(int(math.ceil(g_max * np.linalg.norm(row))) for row in cell)  # type: ignore[assignment]
        axes = [torch.arange(-n, n + 1, dtype=torch.float64, device=device) for n in self.half]
        positions = torch.tensor(crystal.primitive_positions, dtype=torch.float64, device=device)
        # exp(-2 pi i h x) for every axis: (atoms, 2 half + 1)
        phases = [
            torch.exp(-2j * math.pi * positions[:, i, None] * axes[i]).to(torch.complex64) for i in range(3)
        ]
        gram = (self.reciprocal @ self.reciprocal.T).to(torch.float32)
        h, k, m = (axis.to(torch.float32) for axis in axes)
        g2 = (
            gram[0, 0] * h[:, None, None] ** 2
            + gram[1, 1] * k[None, :, None] ** 2
            + gram[2, 2] * m**2
            + 2 * gram[0, 1] * h[:, None, None] * k[None, :, None]
            + 2 * gram[0, 2] * h[:, None, None] * m
            + 2 * gram[1, 2] * k[None, :, None] * m
        ).clamp_min_(0.0)
        g = g2.sqrt()
        self.v = torch.zeros(g.shape, dtype=torch.complex64, device=device)
        self.v_absorptive = torch.zeros_like(self.v)
        weights = {}
        kinds = sorted({(s, float(u)) for s, u in zip(crystal.symbols, crystal.u_rms, strict=True)})
        for symbol, u in kinds:
            chosen = [
                i
                for i, (s, w) in enumerate(zip(crystal.symbols, crystal.u_rms, strict=True))
                if (s, w) == (symbol, u)
            ]
            share = torch.tensor(crystal.occupancy[chosen], dtype=torch.float32, device=device)
            p0, p1, p2 = (p[chosen] for p in phases)
            # sum over atoms of exp(-2 pi i g r): (h k, atoms) @ (atoms, l)
            plane = (p0 * share[:, None])[:, :, None] * p1[:, None, :]
            lattice_sum = (plane.reshape(len(chosen), -1).T @ p2).reshape(g.shape)
            factor = scattering_factor(symbol, g) * torch.exp(-2 * math.pi**2 * u**2 * g2)
            self.v += (_POTENTIAL / crystal.volume) * factor * lattice_sum
            weights[symbol, u] = (atomic_number(symbol) * u) ** 2 * float(share.sum())
            if absorption:
                spread = torch.exp(-2 * math.pi**2 * absorption_width**2 * g2)
                self.v_absorptive += (atomic_number(symbol) * u) ** 2 * spread * lattice_sum
        if absorption:
            self.v_absorptive *= absorption / sum(weights.values())
        self.v = self.v.reshape(-1)
        self.v_absorptive = self.v_absorptive.reshape(-1)
        self.g2 = g2.reshape(-1)

    def flat_index(self, hkl: Tensor) -> Tensor:
        """Index into `v` of primitive indices, shape (..., 3); the caller keeps inside the table."""
        a, b, c = self.half
        return ((hkl[..., 0] + a) * (2 * b + 1) + hkl[..., 1] + b) * (2 * c + 1) + hkl[..., 2] + c

    def candidates(self, g_max: float) -> Tensor:
        """Primitive indices of all reciprocal points within `g_max`: shape (m, 3), int64."""
        inside = torch.nonzero(self.g2 <= g_max**2).squeeze(1)
        _, b, c = self.half
        m = inside % (2 * c + 1) - c
        k = inside.div(2 * c + 1, rounding_mode="floor") % (2 * b + 1) - b
        h = inside.div((2 * c + 1) * (2 * b + 1), rounding_mode="floor") - self.half[0]
        return torch.stack([h, k, m], dim=1)


@dataclass
class Beams:
    """The beams of one orientation, direct beam first, then by falling importance.

    Attributes
    ----------
    hkl : Tensor, shape (n, 3)
        Indices on the primitive reciprocal cell.
    g : Tensor, shape (n, 3), float32
        Lab frame (x, y, z), 1/angstrom.
    s : Tensor, shape (n,)
        Excitation error for the central ray, 1/angstrom, positive inside the Ewald sphere.
    v : Tensor, shape (n,), complex64
        V_g in volts.
    coupling : Tensor, shape (n, n), complex64
        sigma (V_(g-h) + i V'_(g-h)) in rad/angstrom, the mean potential left out, weak beams folded in.
    energy_keV : float
    weak : Tensor, shape (m, 3)
        Indices of the weak beams.
    """

    hkl: Tensor
    g: Tensor
    s: Tensor
    v: Tensor
    coupling: Tensor
    energy_keV: float
    weak: Tensor

    def __len__(self) -> int:
        return len(self.s)

    @property
    def position(self) -> Tensor:
        """Detector-plane part of g as (y, x), 1/angstrom: shape (n, 2)."""
        return self.g[:, [1, 0]]


def excitation_error(g: Tensor, tilt: Tensor, wavelength_A: float) -> Tensor:
    """Excitation errors s_g(k), 1/angstrom, on the exact Ewald sphere.

    Parameters
    ----------
    g : Tensor, shape (n, 3)
        Lab frame (x, y, z), 1/angstrom.
    tilt : Tensor, shape (t, 2)
        Transverse wavevector (y, x) of the incident rays, 1/angstrom.

    Returns
    -------
    Tensor, shape (n, t)
        sqrt(1/lambda^2 - |k + g_t|^2) - sqrt(1/lambda^2 - k^2) - g_z, without cancellation.
    """
    k2 = wavelength_A**-2
    gt = g[:, [1, 0]]
    tilt2 = (tilt * tilt).sum(-1)
    step = (gt * gt).sum(-1)[:, None] + 2 * gt @ tilt.T  # |k + g|^2 - k^2
    incident = torch.sqrt(k2 - tilt2)
    scattered = torch.sqrt((k2 - tilt2 - step).clamp_min(0.0))
    return -step / (incident + scattered) - g[:, 2:3]


def select_beams(
    factors: StructureFactors,
    rotation: np.ndarray,
    energy_keV: float,
    *,
    n_beams: int = 256,
    n_weak: int = 320,
    g_max: float | None = None,
    s_max: float = 0.12,
    s_strong: float = 0.12,
    rank: str = "two_step",
) -> Beams:
    """Choose the beams that matter for one orientation, higher Laue zones by the same rule.

    All reflections with |g| < `g_max` (by default as far as the table of `factors` allows, half its radius)
    and |s_g| < `s_max` are ranked by the strength with which one intermediate reflection feeds them, w2 =
    sum_h |sigma V_(g-h)| w1_h / (2 pi |s_g| + 0.02) with w1 = |sigma V_g| / (2 pi |s_g| + 0.02) and w1 = 1
    for the direct beam. A forbidden reflection (V_g = 0) that is lit by double diffraction therefore ranks
    high.

    The first `n_beams` are propagated. The next `n_weak`, and those with |s_g| > `s_strong`, act on them
    through an effective coupling only (Bethe potentials: H. A. Bethe, Ann. Phys. 392 (1928) 55), U_gh - sum_w
    U_gw U_wh / (2 pi s_w - e). Against 420 propagated beams this leaves, for 23 random crystals up to 260
    cubic angstrom at 20 nm, a median error of the intensities of 3, 2 and 1 % with 128, 160 and 224 beams;
    20, 13 and 6 % without.

    Parameters
    ----------
    factors : StructureFactors
        With a table radius of at least 2 `g_max`.
    rotation : ndarray, shape (3, 3)
        Crystal frame to lab frame: v_lab = rotation @ v_crystal. Mistilt is part of it.
    rank : {"two_step", "radius"}
        "radius" keeps the shortest instead, the textbook cut-off (for comparisons with other codes).
    """
    g_max = factors.g_max / 2 if g_max is None else g_max
    if factors.g_max < 2 * g_max - 1e-9:
        raise ValueError(
            f"the table reaches {factors.g_max} 1/angstrom, but couplings need {2 * g_max}; raise g_max"
        )
    device = factors.device
    lam = wavelength(energy_keV)
    sigma = interaction_parameter(energy_keV)
    hkl = factors.candidates(g_max)
    g = _lab_vectors(factors, rotation, hkl)
    centre = torch.zeros(1, 2, device=device)
    s = excitation_error(g, centre, lam)[:, 0]
    near = s.abs() < s_max
    hkl, g, s = hkl[near], g[near], s[near]
    v = factors.v[factors.flat_index(hkl)]
    direct = (hkl == 0).all(1)
    if rank == "radius":
        weight = -(g * g).sum(1)
        weight[direct] = 1.0
    else:
        width = 2 * math.pi * s.abs() + 0.02
        w1 = sigma * v.abs() / width
        w1[direct] = 1.0
        w1, intermediate = torch.topk(w1, min(128, len(w1)))
        steps = hkl[:, None, :] - hkl[intermediate][None, :, :]
        weight = (sigma * factors.v[factors.flat_index(steps)].abs() @ w1) / width
        weight[direct] = torch.inf
    order = torch.topk(weight, min(n_beams + n_weak, len(weight))).indices
    near = s[order].abs() <= s_strong
    strong, weak = order[near], order[~near]
    weak = torch.cat([strong[n_beams:], weak]) if n_weak else weak[:0]
    return couple_beams(factors, rotation, energy_keV, hkl[strong[:n_beams]], hkl[weak])


def couple_beams(
    factors: StructureFactors, rotation: np.ndarray, energy_keV: float, hkl: Tensor, weak: Tensor
) -> Beams:
    """The beams with primitive indices `hkl` (n, 3), direct beam first, and `weak` ones (m, 3) folded in."""
    centre = torch.zeros(1, 2, device=hkl.device)
    sigma, lam = interaction_parameter(energy_keV), wavelength(energy_keV)
    g = _lab_vectors(factors, rotation, hkl)
    s = excitation_error(g, centre, lam)[:, 0]
    n = len(hkl)
    everything = torch.cat([hkl, weak])
    index = factors.flat_index(everything[:, None, :] - hkl[None, :, :])
    blocks = sigma * (factors.v[index] + 1j * factors.v_absorptive[index])  # (n + m, n)
    coupling = blocks[:n]
    coupling.diagonal().sub_(sigma * factors.v[factors.flat_index(torch.zeros_like(hkl[0]))])
    if len(weak):
        detuning = 2 * math.pi * excitation_error(_lab_vectors(factors, rotation, weak), centre, lam)[:, 0]
        detuning -= _BETHE_ENERGY
        detuning = torch.where(detuning < 0, -1.0, 1.0) * detuning.abs().clamp_min(_BETHE_FLOOR)
        back = factors.flat_index(hkl[:, None, :] - weak[None, :, :])
        back_coupling = sigma * (factors.v[back] + 1j * factors.v_absorptive[back])  # (n, m)
        coupling = coupling - (back_coupling / detuning) @ blocks[n:]
    return Beams(hkl, g, s, factors.v[factors.flat_index(hkl)], coupling, energy_keV, weak)


def _lab_vectors(factors: StructureFactors, rotation: np.ndarray, hkl: Tensor) -> Tensor:
    turn = torch.tensor(np.asarray(rotation), dtype=torch.float64, device=factors.device)
    return (hkl.to(torch.float64) @ (factors.reciprocal @ turn.T)).to(torch.float32)


def stack_beams(beams: Sequence[Beams], tilts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Couplings (b, n, n) and detunings 2 pi s (b, n, t) of several orientations, padded with uncoupled
    beams."""
    n = max(len(b) for b in beams)
    device = beams[0].s.device
    coupling = torch.zeros(len(beams), n, n, dtype=torch.complex64, device=device)
    detuning = torch.zeros(len(beams), n, len(tilts[0]), device=device)
    for i, (b, tilt) in enumerate(zip(beams, tilts, strict=True)):
        coupling[i, : len(b), : len(b)] = b.coupling
        detuning[i, : len(b)] = 2 * math.pi * excitation_error(b.g, tilt.to(b.g), wavelength(b.energy_keV))
    return coupling, detuning


def _spectral_bound(coupling: Tensor, iterations: int = 6) -> Tensor:
    """Upper bound of the spectral radius, shape (b,): Collatz and Wielandt on the matrix of absolute
    values."""
    absolute = coupling.abs()
    floor = 1e-3 * absolute.sum(-1).amax(-1, keepdim=True) + 1e-12
    w = absolute.sum(-1) + floor
    for _ in range(iterations):
        w = torch.bmm(absolute, w[..., None])[..., 0]
        w = w + 1e-3 * w.amax(-1, keepdim=True) + 1e-12
    return (torch.bmm(absolute, w[..., None])[..., 0] / w).amax(-1)


def _chebyshev_coefficients(x: np.ndarray, n_terms: int) -> np.ndarray:
    """(2 - delta_m0) i^m J_m(x): shape (*x.shape, n_terms), complex128, by the Jacobi-Anger expansion and an
    FFT."""
    n = 2 * n_terms
    wave = np.exp(1j * x[..., None] * np.cos(2 * np.pi * np.arange(n) / n))
    coefficients = np.fft.fft(wave, axis=-1)[..., :n_terms] * (2.0 / n)
    coefficients[..., 0] /= 2
    return coefficients


def propagate(
    coupling: Tensor, detuning: Tensor, thickness: Tensor | np.ndarray, *, tolerance: float = 1e-6
) -> Tensor:
    """Amplitudes of all beams behind crystals of several thicknesses.

    Parameters
    ----------
    coupling : Tensor, shape (b, n, n), complex
        U in rad/angstrom, beam 0 is the direct one.
    detuning : Tensor, shape (b, n, t)
        2 pi s_g for every tilt, rad/angstrom.
    thickness : Tensor or ndarray, shape (b, z)
        Angstrom, any order.
    tolerance : float
        Chebyshev terms are dropped where |J_m| is below it.

    Returns
    -------
    Tensor, shape (b, z, n, t), dtype of `coupling`
    """
    b, n, t = detuning.shape
    thickness = np.asarray(torch.as_tensor(thickness).cpu(), float)
    if thickness.shape[0] != b or np.any(thickness < 0):
        raise ValueError(
            f"thickness must be (batch, series) = ({b}, z) and not negative, not {thickness.shape}"
        )
    low, high = detuning.amin((1, 2)), detuning.amax((1, 2))
    centre = (low + high) / 2
    radius = 1.01 * ((high - low) / 2 + _spectral_bound(coupling)) + 1e-9
    phase = radius.double().cpu().numpy()[:, None] * thickness
    n_terms = int(phase.max() + 12 + 6 * phase.max() ** (1 / 3) + 1)
    series = _chebyshev_coefficients(phase, n_terms)  # (b, z, m)
    # the last term that matters for each thickness, over the batch
    last = np.array([
        np.nonzero(np.abs(series[:, z]).max(0) > tolerance)[0][-1] if thickness[:, z].any() else 0
        for z in range(thickness.shape[1])
    ])  # fmt: skip
    order = np.argsort(-last)
    series, last = series[:, order], last[order]
    terms = torch.as_tensor(series, dtype=coupling.dtype, device=coupling.device)
    u = coupling / radius[:, None, None]
    d = ((detuning - centre[:, None, None]) / radius[:, None, None]).to(u.real.dtype)
    older = torch.zeros(b, n, t, dtype=u.dtype, device=u.device)
    older[:, 0] = 1.0
    psi = terms[:, :, 0, None, None] * older[:, None]
    old = u[:, :, :1] + d * older
    u2, d2 = 2 * u, 2 * d
    for m in range(1, int(last[0]) + 1):
        for z in range(int((last >= m).sum())):
            psi[:, z] += terms[:, z, m, None, None] * old
        older = torch.baddbmm(torch.addcmul(older.neg_(), d2, old), u2, old)
        old, older = older, old
    total_phase = torch.as_tensor(thickness[:, order], device=u.device) * centre[:, None].double()
    psi *= torch.exp(1j * total_phase).to(psi.dtype)[:, :, None, None]
    return psi[:, torch.as_tensor(np.argsort(order), device=u.device)]


def tilt_points(n: int = N_TILTS) -> Tensor:
    """Points (y, x) of a sunflower spiral over a disk of radius `DISK_MARGIN`, in units of the aperture: (n,
    2)."""
    i = torch.arange(n, dtype=torch.float64)
    radius = DISK_MARGIN * torch.sqrt((i + 0.5) / n)
    # stretch so that the outermost point lies on the rim
    radius = radius * (DISK_MARGIN / radius[-1])
    angle = i * (math.pi * (3 - math.sqrt(5)))
    return torch.stack([radius * torch.sin(angle), radius * torch.cos(angle)], 1)


def chebyshev_1d(x: Tensor, degree: int = DEGREE) -> Tensor:
    """T_0 ... T_degree at x: shape (*x.shape, degree + 1)."""
    values = [torch.ones_like(x), x]
    for _ in range(degree - 1):
        values.append(2 * x * values[-1] - values[-2])
    return torch.stack(values, -1)


def _degrees() -> list[tuple[int, int]]:
    return [(i, j) for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)]


def disk_basis(points: Tensor) -> Tensor:
    """The 45 products T_i(y) T_j(x), i + j <= 8, at points (..., 2) in units of `DISK_MARGIN` apertures."""
    ty, tx = chebyshev_1d(points[..., 0]), chebyshev_1d(points[..., 1])
    return torch.stack([ty[..., i] * tx[..., j] for i, j in _degrees()], -1)


def fit_disks(intensity: Tensor) -> Tensor:
    """Polynomial coefficients of disks sampled at `tilt_points`: (..., t) to (..., 45), same dtype."""
    basis = disk_basis(tilt_points(intensity.shape[-1]) / DISK_MARGIN)
    solve = torch.linalg.pinv(basis).T.to(intensity)  # (t, 45)
    return intensity @ solve


def evaluate_disks(coefficients: Tensor, points: Tensor) -> Tensor:
    """Disk intensity at points (p, 2), (y, x) in units of the aperture radius: (..., 45) to (..., p)."""
    return coefficients @ disk_basis(points / DISK_MARGIN).to(coefficients).T


def scatter(
    beams: Sequence[Beams],
    semiangle_mrad: Sequence[float],
    thickness_A: np.ndarray,
    *,
    n_tilts: int = N_TILTS,
) -> Tensor:
    """Disk intensities of a batch of orientations as polynomials over the aperture.

    Parameters
    ----------
    beams : sequence of b Beams
    semiangle_mrad : sequence of b floats
        Half angle of the probe-forming aperture.
    thickness_A : ndarray, shape (b, z)

    Returns
    -------
    Tensor, shape (b, z, n, 45), float32
        For an incident intensity of 1 in every direction; padded beams are 0.
    """
    unit = tilt_points(n_tilts).to(torch.float32)
    tilts = [
        unit.to(b.g.device) * (angle * 1e-3 / wavelength(b.energy_keV))
        for b, angle in zip(beams, semiangle_mrad, strict=True)
    ]
    psi = propagate(*stack_beams(beams, tilts), thickness_A)
    return fit_disks(psi.real**2 + psi.imag**2)


def zone_rotation(
    crystal: Crystal, zone: Sequence[float] | np.ndarray, x_axis: Sequence[float] | np.ndarray | None = None
) -> np.ndarray:
    """Rotation that brings the direction [uvw] of the conventional cell onto the beam (+z).

    `x_axis`, another direction of the conventional cell, is turned into the half plane of +x; by default any.
    """
    z = np.asarray(zone, float) @ crystal.cell
    z /= np.linalg.norm(z)
    helper = (
        np.asarray(x_axis, float) @ crystal.cell if x_axis is not None else np.eye(3)[np.argmin(np.abs(z))]
    )
    x = helper - z * (helper @ z)
    if np.linalg.norm(x) < 1e-9:
        raise ValueError(f"x_axis {x_axis} is parallel to the zone axis {zone}; name a direction across it")
    x /= np.linalg.norm(x)
    return np.array([x, np.cross(z, x), z])


def tilt_rotation(tilt_mrad: Sequence[float]) -> np.ndarray:
    """Rotation that tilts the crystal so that its zone axis moves by (y, x) mrad away from the beam."""
    ty, tx = np.asarray(tilt_mrad, float) * 1e-3
    angle = math.hypot(ty, tx)
    if angle == 0:
        return np.eye(3)
    axis = np.array([-ty, tx, 0.0]) / angle  # z x (tx, ty, 0)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross

"""Simulated 4D-STEM scans of known strain: dynamical scattering, counting noise, descan, exact truth."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from .. import __version__, schema
from . import detector as detectors
from .crystals import Crystal, alloy, load_crystal
from .scattering import (
    N_COEFFICIENTS,
    StructureFactors,
    couple_beams,
    scatter,
    select_beams,
    tilt_rotation,
    wavelength,
    zone_rotation,
)

SAMPLES = ("sige", "uniform", "gradient", "flat", "none")
Array = NDArray[np.float64]

# Si1-xGex on Si [001]: Vegard's law, and tetragonal distortion 1 + 2 C12 / C11 with the elastic constants of
# Si
_MISFIT_GE = 0.0418
_TETRAGONAL = 1.77
_GE_MAX = 0.32
# layers along the growth direction: start, end (share of the scan width), germanium content
_LAYERS = ((0.26, 0.36, 0.14), (0.44, 0.50, 0.30), (0.58, 0.76, 0.20), (0.84, 0.90, 0.28))
_REFERENCE_SHARE = 0.17

# states in which the crystal is scattered; patterns are interpolated between them
_N_GERMANIUM, _N_BEND, _N_THICKNESS = 4, 5, 5
_N_KEPT = 100


@dataclass(frozen=True)
class _Sample:
    """What varies over the scan: F in scan axes, germanium content, bend and thickness in units of their
    range."""

    F: Array  # (sy, sx, 2, 2), axes (y, x)
    germanium: Array  # (sy, sx), 0 to _GE_MAX
    bend: Array  # (sy, sx), -1 to 1
    wedge: Array  # (sy, sx), -1 to 1


def _from_components(e_xx: Array, e_yy: Array, e_xy: Array, theta: Array) -> Array:
    """F = 1 + e + rotation, axes (y, x), so that e = sym(F) - 1 and theta = (F_yx - F_xy)/2 exactly."""
    rows = [np.stack([1 + e_yy, e_xy + theta], -1), np.stack([e_xy - theta, 1 + e_xx], -1)]
    return np.stack(rows, -2)


def _design(sample: str, shape: tuple[int, int]) -> _Sample:
    y, x = np.meshgrid(np.linspace(0, 1, shape[0]), np.linspace(0, 1, shape[1]), indexing="ij")
    zero = np.zeros(shape)
    grown = np.clip((x - _REFERENCE_SHARE) / (1 - _REFERENCE_SHARE), 0, 1)  # 0 in the reference region
    bend = 0.6 * np.sin(1.1 * np.pi * x + 0.4) + 0.4 * np.cos(np.pi * y)
    wedge = (x + y) - 1
    if sample in ("sige", "flat"):
        germanium = sum(
            (
                ge / 4 * (1 + np.tanh((x - a) / 0.008)) * (1 + np.tanh((b - x) / 0.008))
                for a, b, ge in _LAYERS
            ),
            zero,
        )
        germanium = np.where(x <= _REFERENCE_SHARE + 0.02, 0.0, germanium)
        # slow fields of a few 1e-3, as foils relax and bend
        slow = np.sin(np.pi * grown) ** 2
        F = _from_components(
            e_xx=_TETRAGONAL * _MISFIT_GE * germanium + 1.5e-3 * slow * np.cos(2 * np.pi * y),
            e_yy=0.1 * _MISFIT_GE * germanium * np.sin(np.pi * y) - 2e-3 * slow * y,
            e_xy=2.5e-3 * slow * np.sin(2 * np.pi * y),
            theta=6e-3 * slow * (y - 0.5),
        )
        return _Sample(F, germanium, bend, wedge)
    if sample == "uniform":
        on = (x > _REFERENCE_SHARE).astype(float)
        return _Sample(_from_components(0.012 * on, -0.006 * on, 0.004 * on, 0.008 * on), zero, bend, wedge)
    if sample == "gradient":
        F = _from_components(
            0.02 * grown, -0.015 * grown * y, 0.01 * grown * (1 - y), 0.02 * grown * (y - 0.3)
        )
        return _Sample(F, zero, bend, wedge)
    return _Sample(_from_components(zero, zero, zero, zero), zero, zero, zero)


def _linear_weights(value: Array, nodes: Array) -> tuple[NDArray[np.int64], Array]:
    """Index of the node below each value and the share of the node above."""
    index = np.clip(np.searchsorted(nodes, value, side="right") - 1, 0, len(nodes) - 2)
    return index, np.clip((value - nodes[index]) / (nodes[index + 1] - nodes[index]), 0, 1)


def _scatter_states(
    crystals: list[Crystal],
    rotation: np.ndarray,
    tilts_mrad: Array,
    thickness_A: Array,
    energy_keV: float,
    semiangle_mrad: float,
    *,
    absorption: float,
    device: torch.device,
    flat: bool,
) -> tuple[np.ndarray, torch.Tensor]:
    """g of the kept beams (k, 2), as (y, x), and their polynomials (crystal, tilt, thickness, k, 45).

    All states share one list of beams, chosen at the mean composition and tilt.
    """
    tables = [StructureFactors(c, absorption=absorption, device=device) for c in crystals]
    middle = tilt_rotation(tilts_mrad.mean(0)) @ rotation
    chosen = select_beams(tables[len(tables) // 2], middle, energy_keV, n_beams=160)
    states = [
        couple_beams(table, tilt_rotation(tilt) @ rotation, energy_keV, chosen.hkl, chosen.weak)
        for table in tables
        for tilt in tilts_mrad
    ]
    series = np.tile(thickness_A, (8, 1))
    out = []
    for i in range(0, len(states), 8):
        part = states[i : i + 8]
        out.append(scatter(part, [semiangle_mrad] * len(part), series[: len(part)]))
    coefficients = torch.cat(out).reshape(len(tables), len(tilts_mrad), len(thickness_A), -1, N_COEFFICIENTS)
    mean = coefficients @ detectors.mean_over_aperture(torch.ones(1, device=device))[0]
    kept = torch.argsort(mean.amax((0, 1, 2)), descending=True)[:_N_KEPT]
    coefficients = coefficients[..., kept, :]
    if flat:
        coefficients = torch.zeros_like(coefficients)
        coefficients[..., 0] = mean[..., kept].clamp_min(0)
    # positions of the untilted reference crystal: a tilt of mrad moves spots by 1e-5 only, but truth is exact
    g = chosen.hkl[kept].cpu().numpy() @ tables[0].reciprocal.cpu().numpy() @ rotation.T
    return g[:, [1, 0]], coefficients


def _on_one_thread(function: Callable) -> Callable:
    """Products this small gain nothing from threads, and wait minutes for each other on a busy machine."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return call


@_on_one_thread
def simulate(
    scan: tuple[int, int] = (24, 48),
    detector: int = 128,
    sample: str = "sige",
    *,
    dose: float = 1e5,
    thickness_nm: float = 25.0,
    seed: int = 0,
    energy_keV: float = 200.0,
    semiangle_mrad: float = 2.5,
    q_pixel: float | None = None,
    step_nm: float = 1.0,
    mistilt_mrad: tuple[float, float] = (1.5, 1.0),
    bend_mrad: float = 2.0,
    wedge: float = 0.08,
    descan_px: float = 1.5,
    scan_rotation_degree: float = 0.0,
    psf_px: float = 0.5,
    background: float = 0.03,
    device: torch.device | str = "cpu",
) -> tuple[xr.Dataset, xr.Dataset]:
    """A scan over a strained silicon foil along [110], and its exact strain.

    Parameters
    ----------
    scan : (int, int)
        Rows, columns.
    detector : int
        Side of the square detector, px.
    sample : str
        "sige": a Si/SiGe multilayer grown along x with slow strain, shear and rotation on top;
        "uniform": one strain right of an unstrained reference; "gradient": ramps of all components;
        "flat": the multilayer with evenly filled disks, for tests without dynamical texture;
        "none": no sample, the direct beam alone (the truth is NaN).
    dose : float
        Electrons in the probe per pattern.
    thickness_nm, wedge : float
        Mean foil thickness and its relative variation over the scan.
    energy_keV, semiangle_mrad : float
    q_pixel : float, optional
        1/angstrom per px; by default the detector covers 2.5 1/angstrom.
    step_nm : float
        Scan step.
    mistilt_mrad, bend_mrad : (float, float), float
        Mean mistilt (y, x) from the zone axis, and how far bending changes it either way.
    descan_px : float
        The pattern wanders by this much over the scan, with a jitter of a twentieth of it.
    scan_rotation_degree : float
        Direction of the scan's +x axis in the detector frame, from +x towards +y.
    psf_px, background : float
        Gaussian point spread, and share of electrons in diffuse background.

    Returns
    -------
    datacube : xarray.Dataset
        `intensity` uint16 counts and `probe` (vacuum, counts) with calibrated coordinates, as
        `schema.DATACUBE`.
    truth : xarray.Dataset
        `e_xx, e_yy, e_xy, theta` in the scan frame, relative to the silicon at the left edge, which is
        unstrained: ``attrs["reference_region"]``. Also `germanium`, `thickness_nm`, `origin_qy`, `origin_qx`.

    Raises
    ------
    ValueError
        For an unknown sample, or disks that would overlap or hold too few pixels.

    Notes
    -----
    Disks stand exactly at ``inv(F).T @ g + origin`` with g of the reference crystal. Their intensities come
    from the N-beam propagator for a grid of compositions, bends and thicknesses, between which they are
    interpolated; excitation errors are those of the unstrained lattice. Real-space vectors transform as a = F
    a_ref.
    """
    if sample not in SAMPLES:
        raise ValueError(f"unknown sample {sample!r}; known: {', '.join(SAMPLES)}")
    if dose <= 0 or thickness_nm <= 0 or min(scan) < 1:
        raise ValueError(
            f"dose {dose:g}, thickness_nm {thickness_nm:g} and scan {tuple(scan)} must all be positive"
        )
    device = torch.device(device)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    shape = (detector, detector)
    px = 2.5 / detector if q_pixel is None else q_pixel
    aperture = semiangle_mrad * 1e-3 / wavelength(energy_keV)
    radius_px = aperture / px
    silicon, germanium = load_crystal("Si"), load_crystal("Ge")
    spacing_px = np.sqrt(3) / silicon.cell[0, 0] / px
    if not 2.0 <= radius_px <= 0.52 * spacing_px:
        raise ValueError(
            f"disks would have a radius of {radius_px:.1f} px at a distance of {spacing_px:.1f} px; needed "
            f"are 2 px to half the distance: change semiangle_mrad ({semiangle_mrad:g}), q_pixel ({px:.4g}) "
            f"or detector ({detector})"
        )
    design = _design(sample, (scan[0], scan[1]))
    turn_angle = np.deg2rad(scan_rotation_degree)
    c, s = np.cos(turn_angle), np.sin(turn_angle)
    to_detector = np.array([[c, s], [-s, c]])  # (y, x) components of a vector: scan frame -> detector frame
    n = scan[0] * scan[1]
    y, x = np.meshgrid(np.linspace(-1, 1, scan[0]), np.linspace(-1, 1, scan[1]), indexing="ij")
    middle = np.array([detector // 2 + 0.37, detector // 2 - 0.61])
    drift = np.stack([0.7 * y + 0.3 * x, -0.5 * x + 0.2 * y**2], -1) * descan_px
    origin = middle + drift + rng.normal(0, 0.05 * descan_px, (*scan, 2))

    if sample == "none":
        g = np.zeros((1, 2))
        states = torch.zeros(1, 1, 1, 1, N_COEFFICIENTS, device=device)
        states[..., 0] = 1.0
        nodes = (np.array([0.0]),) * 3
    else:
        nodes = (
            np.linspace(0, _GE_MAX, _N_GERMANIUM) if design.germanium.any() else np.array([0.0]),
            np.linspace(-1, 1, _N_BEND) if bend_mrad else np.array([0.0]),
            thickness_nm * 10 * (1 + wedge * (np.linspace(-1, 1, _N_THICKNESS) if wedge else np.zeros(1))),
        )
        # growth direction [001] along +x of the scan, zone axis [110] along the beam, alloy on the cell of
        # silicon
        rotation = zone_rotation(silicon, (1, 1, 0), (0, 0, 1))
        crystals = [replace(alloy(silicon, germanium, float(ge)), cell=silicon.cell) for ge in nodes[0]]
        direction = np.array([0.6, 0.8])
        tilts = np.array(mistilt_mrad) + bend_mrad * nodes[1][:, None] * direction
        g, states = _scatter_states(
            crystals, rotation, tilts, nodes[2], energy_keV, semiangle_mrad,
            absorption=0.05, device=device, flat=sample == "flat",
        )  # fmt: skip
    inverse_transpose = np.linalg.inv(design.F).swapaxes(-1, -2).reshape(n, 1, 2, 2)
    moved = (inverse_transpose @ g[None, :, :, None])[..., 0]  # (n, k, 2), scan frame
    position = torch.tensor(
        moved @ to_detector.T / px + origin.reshape(n, 1, 2), dtype=torch.float32, device=device
    )

    thickness = thickness_nm * 10 * (1 + wedge * design.wedge)
    fields = (design.germanium.ravel(), design.bend.ravel(), thickness.ravel())
    # unit offsets in the detector frame are turned into the scan frame, in which the polynomials live
    matrix = torch.tensor(to_detector.T / radius_px, dtype=torch.float32, device=device)
    intensity = np.empty((n, *shape), np.uint16)
    width_px = 0.88 / px
    pad = 8
    for start in range(0, n, 64):
        part = slice(start, min(start + 64, n))
        m = part.stop - part.start
        coefficients = _interpolate(states, nodes, [f[part] for f in fields])
        frames = detectors.render_disks(
            coefficients,
            position[part] + pad,
            matrix.expand(m, 2, 2),
            torch.ones(m, device=device),
            (detector + 2 * pad, detector + 2 * pad),
            electrons=torch.full((m,), dose * (1 - background), device=device),
            edge_blur_px=torch.full((m,), 0.3, device=device),
            threshold=5e-3,
        )
        frames = detectors.blur_frames(frames, psf_px=torch.full((m,), psf_px, device=device))
        frames = frames[:, pad:-pad, pad:-pad]
        centre = torch.tensor(origin.reshape(n, 2)[part], dtype=torch.float32, device=device)
        distance2 = detectors.squared_distance(centre, shape)
        width = torch.full((m,), width_px, device=device)
        frames = frames + dose * background * detectors.thermal_background(distance2, width)
        counts = detectors.count_electrons(frames.cpu(), generator)
        intensity[part] = counts.clamp_(max=65535).numpy().astype(np.uint16)
    return _datasets(
        intensity.reshape(*scan, *shape),
        _vacuum_probe(middle, matrix, shape, psf_px, generator),
        design,
        origin,
        thickness if sample != "none" else np.full(scan, np.nan),
        sample=sample,
        px=px,
        step_nm=step_nm,
        attrs={
            "title": f"simulated {sample} scan, {dose:g} electrons per pattern",
            "beam_energy_keV": float(energy_keV),
            "convergence_semiangle_mrad": float(semiangle_mrad),
            "scan_rotation_degree": float(scan_rotation_degree),
            "detector": "simulated electron counter",
            "simulation": f"fcunet {__version__}: sample {sample}, {thickness_nm:g} nm Si [110], mistilt "
            f"{mistilt_mrad} mrad, bend {bend_mrad:g} mrad, dose {dose:g}, psf {psf_px:g} px, seed {seed}",
        },
    )


def _interpolate(states: torch.Tensor, nodes: tuple[Array, ...], values: list[Array]) -> torch.Tensor:
    """Multilinear interpolation of coefficients (a, b, c, k, 45) at values given per pattern: (n, k, 45)."""
    n = len(values[0])
    out = torch.zeros(n, *states.shape[3:], device=states.device)
    lower, share = [], []
    for axis_nodes, value in zip(nodes, values, strict=True):
        if len(axis_nodes) == 1:
            lower.append(np.zeros(n, np.int64))
            share.append(np.zeros(n))
        else:
            index, upper = _linear_weights(value, axis_nodes)
            lower.append(index)
            share.append(upper)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod([w if up else 1 - w for up, w in zip(corner, share, strict=True)], axis=0)
        used = np.nonzero(weight > 0)[0]
        if len(used) == 0:
            continue
        nodes_used = [i[used] + up for i, up in zip(lower, corner, strict=True)]
        corners = tuple(torch.from_numpy(i).to(states.device) for i in nodes_used)
        factor = torch.tensor(weight[used], dtype=torch.float32, device=states.device)
        out[torch.from_numpy(used).to(states.device)] += factor[:, None, None] * states[corners]
    return out


def _vacuum_probe(
    centre: Array, matrix: torch.Tensor, shape: tuple[int, int], psf_px: float, generator: torch.Generator
) -> np.ndarray:
    """The direct beam without sample, 1e7 electrons, in counts."""
    device = matrix.device
    disk = torch.zeros(1, 1, N_COEFFICIENTS, device=device)
    disk[..., 0] = 1.0
    image = detectors.render_disks(
        disk,
        torch.tensor(centre, dtype=torch.float32, device=device).reshape(1, 1, 2),
        matrix[None],
        torch.ones(1, device=device),
        shape,
        electrons=torch.full((1,), 1e7, device=device),
        edge_blur_px=torch.full((1,), 0.3, device=device),
    )
    image = detectors.blur_frames(image, psf_px=torch.full((1,), psf_px, device=device))
    return detectors.count_electrons(image.cpu(), generator)[0].numpy().astype(np.float32)


def _datasets(
    intensity: np.ndarray,
    probe: np.ndarray,
    design: _Sample,
    origin: Array,
    thickness_A: Array,
    *,
    sample: str,
    px: float,
    step_nm: float,
    attrs: dict[str, Any],
) -> tuple[xr.Dataset, xr.Dataset]:
    """Labels, units and attributes."""
    scan, detector = intensity.shape[:2], intensity.shape[2]
    q = (np.arange(detector) - detector // 2) * px
    coords: dict[str, Any] = {
        dim: (dim, np.arange(size) * step_nm, {"units": schema.UNIT_SCAN})
        for dim, size in zip(schema.SCAN_DIMS, scan, strict=True)
    }
    pattern_coords = {dim: (dim, q, {"units": schema.UNIT_Q}) for dim in schema.PATTERN_DIMS}
    datacube = xr.Dataset(
        {
            "intensity": (schema.DATACUBE_DIMS, intensity, schema.DATACUBE["intensity"].attrs),
            "probe": (schema.PATTERN_DIMS, probe, schema.DATACUBE["probe"].attrs),
        },
        coords=coords | pattern_coords,
        attrs=schema.format_attrs("datacube") | attrs,
    )
    empty = np.nan if sample == "none" else 0.0
    F = design.F + empty
    components = {
        "e_xx": F[..., 1, 1] - 1,
        "e_yy": F[..., 0, 0] - 1,
        "e_xy": (F[..., 0, 1] + F[..., 1, 0]) / 2,
        "theta": (F[..., 0, 1] - F[..., 1, 0]) / 2,
    }
    extra = {
        "germanium": (design.germanium, "1", "germanium content"),
        "thickness_nm": (thickness_A / 10, "nm", "foil thickness"),
        "origin_qy": (origin[..., 0], schema.UNIT_PIXEL, "row of the beam centre"),
        "origin_qx": (origin[..., 1], schema.UNIT_PIXEL, "column of the beam centre"),
    }
    columns = max(1, int((scan[1] - 1) * _REFERENCE_SHARE) + 1)
    truth = xr.Dataset(
        {name: (schema.SCAN_DIMS, value, schema.TRUTH[name].attrs) for name, value in components.items()}
        | {n: (schema.SCAN_DIMS, v, {"units": u, "long_name": text}) for n, (v, u, text) in extra.items()},
        coords=coords,
        attrs={"frame": "scan", "measure": "infinitesimal", "reference_region": f"0:{scan[0]},0:{columns}"},
    )
    return datacube, truth

"""The propagator against eigenvectors, limits of scattering theory, and published numbers."""

import math

import numpy as np
import pytest
import torch

from fcunet.simulation.crystals import load_crystal
from fcunet.simulation.scattering import (
    DISK_MARGIN,
    StructureFactors,
    evaluate_disks,
    excitation_error,
    fit_disks,
    interaction_parameter,
    propagate,
    scatter,
    select_beams,
    stack_beams,
    tilt_points,
    tilt_rotation,
    wavelength,
    zone_rotation,
)


def orientation(
    name="Si", zone=(1, 1, 0), tilt=(0.0, 0.0), n_beams=64, absorption=0.0, energy=200.0, **kwargs
):
    crystal = load_crystal(name)
    factors = StructureFactors(crystal, g_max=5.0, absorption=absorption)
    rotation = tilt_rotation(tilt) @ zone_rotation(crystal, zone)
    return select_beams(factors, rotation, energy, n_beams=n_beams, **kwargs)


@pytest.fixture(scope="module")
def gallium_arsenide():
    """GaAs [110], 1 mrad off, absorbing, with a handful of tilts of a 2 mrad probe."""
    beams = orientation("GaAs", tilt=(0.6, 0.8), absorption=0.1)
    tilts = tilt_points(12).float() * (2e-3 / wavelength(200))
    return beams, tilts


def test_constants__are_those_of_200_kv():
    assert wavelength(200) == pytest.approx(0.0250793, rel=1e-5)
    assert interaction_parameter(200) == pytest.approx(7.2884e-4, rel=1e-4)


def test_excitation_error__is_zero_on_the_ewald_sphere():
    k = 1 / wavelength(200)
    gy, gx = 0.7, -0.4
    gz = math.sqrt(k**2 - gy**2 - gx**2) - k
    s = excitation_error(torch.tensor([[gx, gy, gz]]), torch.zeros(1, 2), 1 / k)
    assert abs(s.item()) < 1e-6


def test_propagate__agrees_with_eigenvectors_in_double_precision(gallium_arsenide):
    beams, tilts = gallium_arsenide
    coupling, detuning = stack_beams([beams], [tilts])
    thickness = np.array([[40.0, 500.0, 900.0, 0.0]])
    psi = propagate(coupling, detuning, thickness)
    for t in (0, 7):
        hamiltonian = coupling[0].to(torch.complex128) + torch.diag(detuning[0, :, t].double()).to(
            torch.complex128
        )
        values, vectors = torch.linalg.eig(hamiltonian)
        start = torch.linalg.inv(vectors)[:, 0]
        for z, depth in enumerate(thickness[0]):
            exact = vectors @ (torch.exp(1j * values * depth) * start)
            assert (psi[0, z, :, t] - exact).abs().max() < 3e-5


def test_propagate__keeps_all_electrons_without_absorption():
    beams = orientation("Au", (1, 0, 0), n_beams=96)
    tilts = tilt_points(8).float() * 0.05
    psi = propagate(*stack_beams([beams], [tilts]), np.array([[100.0, 800.0]]))
    assert (psi.abs() ** 2).sum(2).sub(1).abs().max() < 1e-4


def test_propagate__loses_electrons_with_absorption_and_depth(gallium_arsenide):
    beams, tilts = gallium_arsenide
    psi = propagate(*stack_beams([beams], [tilts]), np.array([[100.0, 400.0, 800.0]]))
    left = (psi.abs() ** 2).sum(2)[0]
    assert (left < 1).all()
    assert (left[1:] < left[:-1]).all()


def test_propagate__of_a_thin_crystal_is_single_scattering():
    beams = orientation("Si", tilt=(3.0, -2.0), n_beams=48, n_weak=0)
    depth = 3.0
    psi = propagate(*stack_beams([beams], [torch.zeros(1, 2)]), np.array([[depth]]))[0, 0, :, 0]
    s = beams.s
    kinematic = interaction_parameter(200) * beams.v.abs() * depth * torch.sinc(s * depth).abs()
    strong = beams.v.abs() > 1.0
    strong[0] = False
    ratio = psi.abs()[strong] / kinematic[strong]
    # second-order terms are of the relative size sigma V t, here 3 %
    assert (ratio - 1).abs().max() < 0.05


def test_propagate__gives_each_orientation_of_a_batch_its_own_answer():
    one, two = orientation("Cu", n_beams=40), orientation("Si", n_beams=64)
    tilts = tilt_points(6).float() * 0.05
    depth = np.array([[200.0, 50.0], [80.0, 300.0]])
    both = propagate(*stack_beams([one, two], [tilts, tilts]), depth)
    alone = propagate(*stack_beams([one], [tilts]), depth[:1])
    assert (both[0, :, : len(one)] - alone[0]).abs().max() < 1e-5
    assert both[0, :, len(one) :].abs().max() == 0


def test_propagate__reproduces_bloch_waves_of_silicon_110():
    # abTEM's Bloch waves, the same 129 beams, u = 0.078 angstrom, 13, 52 and 130 unit cells (5, 20, 50 nm)
    beams = orientation("Si", n_beams=129, n_weak=0, g_max=2.0, rank="radius")
    repeat = load_crystal("Si").cell[0, 0] / math.sqrt(2)
    depth = np.array([[13, 52, 130]]) * repeat
    psi = propagate(*stack_beams([beams], [torch.zeros(1, 2)]), depth)
    direct = psi[0, :, 0, 0].abs() ** 2
    assert direct.tolist() == pytest.approx([0.71164, 0.38652, 0.44457], abs=3e-4)


def test_propagate__refuses_negative_thickness(gallium_arsenide):
    beams, tilts = gallium_arsenide
    with pytest.raises(ValueError, match="not negative"):
        propagate(*stack_beams([beams], [tilts]), np.array([[-5.0]]))


def test_select_beams__keeps_the_direct_beam_first():
    assert orientation().hkl[0].tolist() == [0, 0, 0]


def test_select_beams__keeps_forbidden_reflections_that_double_diffraction_lights():
    beams = orientation("Si", n_beams=40)
    g = beams.g.norm(dim=1)
    forbidden = (g - 2 / 5.431).abs() < 1e-3  # 002
    assert forbidden.sum() == 2
    assert beams.v[forbidden].abs().max() < 1e-3
    disks = scatter([beams], [1.0], np.array([[300.0]]))[0, 0]
    assert evaluate_disks(disks, torch.zeros(1, 2))[forbidden].min() > 1e-3


def test_select_beams__leaves_out_centring_extinctions():
    beams = orientation("Cu", (1, 0, 0), n_beams=60)
    assert (beams.v.abs() > 1e-3).all()


def test_select_beams__reaches_higher_laue_zones():
    beams = orientation("MoS2-2H", (0, 0, 1), n_beams=200, energy=80.0)
    first = beams.g[:, 2] < -0.9 / 12.295  # the layer one c* below
    assert first.any()
    assert beams.s[first].abs().min() < 0.02


def test_select_beams__folds_weak_beams_into_the_strong_ones():
    depth = np.array([[200.0]])
    light = {}
    for n_beams, n_weak in ((300, 0), (70, 0), (70, 300)):
        beams = orientation("InSb", (1, 1, 1), n_beams=n_beams, n_weak=n_weak)
        psi = propagate(*stack_beams([beams], [torch.zeros(1, 2)]), depth)[0, 0, :40, 0]
        light[n_beams, n_weak] = dict(zip(map(tuple, beams.hkl[:40].tolist()), psi.abs() ** 2, strict=True))
    exact = light[300, 0]
    plain, folded = (
        sum(abs(v - exact[hkl]) for hkl, v in light[key].items() if hkl in exact)
        for key in ((70, 0), (70, 300))
    )
    assert folded < 0.3 * plain


def test_select_beams__wants_a_large_enough_table():
    factors = StructureFactors(load_crystal("Si"), g_max=3.0)
    with pytest.raises(ValueError, match="raise g_max"):
        select_beams(factors, np.eye(3), 200.0, g_max=2.0)


def test_fit_disks__is_exact_for_polynomials_and_mild_at_the_rim():
    points = tilt_points()
    y, x = points[:, 0], points[:, 1]
    intensity = (1 + y - 0.5 * x**3 + 0.2 * (y * x) ** 4).float()
    coefficients = fit_disks(intensity)
    probe = torch.tensor([[0.3, -0.8], [DISK_MARGIN * 0.7, DISK_MARGIN * 0.7], [0.0, 1.0]])
    expected = 1 + probe[:, 0] - 0.5 * probe[:, 1] ** 3 + 0.2 * (probe[:, 0] * probe[:, 1]) ** 4
    assert (evaluate_disks(coefficients, probe) - expected).abs().max() < 1e-5


def test_scatter__reproduces_the_intensity_at_any_tilt_inside_the_disk():
    beams = orientation("Si", tilt=(1.0, 2.0), n_beams=64)
    fitted = scatter([beams], [2.0], np.array([[300.0]]))[0, 0]
    points = torch.tensor([[0.11, 0.52], [-0.6, 0.3], [0.2, -0.9]])
    tilts = points * (2e-3 / wavelength(200))
    psi = propagate(*stack_beams([beams], [tilts]), np.array([[300.0]]))[0, 0]
    assert (evaluate_disks(fitted, points) - psi.abs() ** 2).abs().max() < 1e-3


def test_tilt_rotation__moves_the_zone_axis_by_the_tilt():
    axis = tilt_rotation((3.0, -2.0)) @ np.array([0.0, 0.0, 1.0])
    assert axis[[1, 0]] * 1e3 == pytest.approx([3.0, -2.0], abs=1e-4)


def test_tilting_the_crystal__equals_tilting_the_probe_the_other_way():
    tilt = np.array([2.0, -1.0])
    straight, tilted = orientation(n_beams=48), orientation(tilt=tilt, n_beams=48)
    wavevector = torch.tensor(-tilt * 1e-3 / wavelength(200), dtype=torch.float32)[None]
    a = propagate(*stack_beams([straight], [wavevector]), np.array([[200.0]]))[0, 0, 0].abs() ** 2
    b = propagate(*stack_beams([tilted], [torch.zeros(1, 2)]), np.array([[200.0]]))[0, 0, 0].abs() ** 2
    assert a.item() == pytest.approx(b.item(), abs=2e-3)


def test_zone_rotation__refuses_a_parallel_x_axis():
    with pytest.raises(ValueError, match="parallel to the zone axis"):
        zone_rotation(load_crystal("Si"), (1, 1, 0), (2, 2, 0))


@pytest.mark.gpu
def test_propagate__gives_the_same_on_a_gpu(gallium_arsenide):
    beams, tilts = gallium_arsenide
    coupling, detuning = stack_beams([beams], [tilts])
    depth = np.array([[100.0, 700.0]])
    cpu, gpu = propagate(coupling, detuning, depth), propagate(coupling.cuda(), detuning.cuda(), depth)
    assert (cpu - gpu.cpu()).abs().max() < 3e-5

"""Target amplitudes and their rendering."""

import numpy as np
import pytest
import torch

from fcunet.simulation.crystals import load_crystal
from fcunet.simulation.scattering import StructureFactors, select_beams, zone_rotation
from fcunet.simulation.target import SIGMA_S, coincident_groups, reflection_amplitudes, render_spots


@pytest.fixture(scope="module")
def silicon():
    crystal = load_crystal("Si")
    return select_beams(StructureFactors(crystal), zone_rotation(crystal, (1, 1, 0)), 200.0, n_beams=80)


def test_amplitudes__are_structure_factors_tapered_by_the_excitation_error(silicon):
    amplitude = reflection_amplitudes(silicon)
    expected = silicon.v.abs() * torch.exp(-(silicon.s**2) / (2 * SIGMA_S**2))
    allowed = amplitude > 0
    allowed[0] = False
    assert torch.equal(amplitude[allowed], expected[allowed])


def test_amplitudes__of_forbidden_reflections_are_zero(silicon):
    two = (silicon.g.norm(dim=1) - 2 / 5.431).abs() < 1e-3
    assert two.sum() == 2
    assert (reflection_amplitudes(silicon)[two] == 0).all()


def test_amplitudes__give_the_direct_beam_the_largest_of_the_others(silicon):
    amplitude = reflection_amplitudes(silicon)
    assert amplitude[0] == amplitude[1:].max()


def test_coincident_groups__are_led_by_the_strongest():
    position = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.01, 1.0], [2.0, 0.0]])
    strength = torch.tensor([5.0, 0.1, 3.0, 1.0])
    assert coincident_groups(position, strength, 0.05).tolist() == [0, 2, 2, 3]


def test_render_spots__keeps_sub_pixel_centroid_and_integral():
    rng = np.random.default_rng(0)
    position = torch.tensor(rng.uniform(12, 20, (4, 1, 2)))
    amplitude = torch.tensor(rng.uniform(1, 6, (4, 1)))
    image = render_spots(position, amplitude, (32, 32))
    axis = torch.arange(32.0, dtype=torch.float64)
    total = image.sum((1, 2))
    centroid = torch.stack([(image.sum(2) @ axis) / total, (image.sum(1) @ axis) / total], -1)
    # cut at 5 sigma: what is lost is exp(-12.5) = 4e-6 of the integral
    assert total.tolist() == pytest.approx(amplitude[:, 0].tolist(), rel=1e-5)
    assert (centroid - position[:, 0]).abs().max() < 1e-5


def test_render_spots__ignores_padding_and_clips_at_the_edge():
    position = torch.tensor([[[0.0, 31.0], [torch.nan, torch.nan], [-100.0, 5.0]]])
    image = render_spots(position, torch.tensor([[1.0, torch.nan, 1.0]]), (32, 32))
    assert torch.isfinite(image).all()
    assert image[0].argmax() == 31

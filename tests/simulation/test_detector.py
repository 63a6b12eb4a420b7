"""Disks drawn at sub-pixel positions, and each artefact."""

import math

import pytest
import torch

from fcunet.simulation import detector
from fcunet.simulation.scattering import evaluate_disks


def flat_disks(*intensity):
    coefficients = torch.zeros(1, len(intensity), 45)
    coefficients[0, :, 0] = torch.tensor(intensity)
    return coefficients


def isotropic(radius, n=1):
    return (torch.eye(2) / radius).expand(n, 2, 2)


def centroid(image):
    image = image.double()
    y, x = torch.arange(image.shape[0]).double(), torch.arange(image.shape[1]).double()
    return torch.stack([(image.sum(1) * y).sum(), (image.sum(0) * x).sum()]) / image.sum()


@pytest.mark.parametrize("radius", [3.0, 4.5, 8.0, 13.0])
def test_render_disks__has_the_centroid_of_an_exactly_cut_disk(radius):
    centre = torch.tensor([20.31, 19.72])
    image = detector.render_disks(
        flat_disks(1.0), centre.view(1, 1, 2), isotropic(radius), torch.ones(1), (40, 40)
    )
    fine = (torch.arange(40 * 64) + 0.5) / 64 - 0.5
    inside = (fine - centre[0])[:, None] ** 2 + (fine - centre[1])[None] ** 2 < radius**2
    exact = inside.reshape(40, 64, 40, 64).float().mean((1, 3))
    assert (centroid(image[0]) - centroid(exact)).abs().max() < 5e-3
    assert (image[0] * math.pi * radius**2 - exact).abs().max() < 0.02


def test_render_disks__conserves_electrons_also_when_elliptical_and_blurred():
    matrix = torch.linalg.inv(torch.tensor([[6.2, 0.2], [0.2, 5.7]]))[None]
    image = detector.render_disks(
        flat_disks(0.4, 0.1),
        torch.tensor([[[20.3, 20.9], [41.0, 25.4]]]),
        matrix,
        torch.ones(1),
        (64, 48),
        electrons=torch.tensor([1000.0]),
        edge_blur_px=torch.tensor([0.7]),
    )
    assert image.sum().item() == pytest.approx(500.0, rel=2e-3)


def test_render_disks__turns_the_texture_with_the_pattern():
    torch.manual_seed(0)
    coefficients = torch.randn(1, 1, 45) * 0.03
    coefficients[..., 0] = 1.0
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    matrix = (turn / 9.0)[None]
    centre = torch.tensor([31.7, 32.2])
    fraction = torch.tensor([0.8])
    image = detector.render_disks(coefficients, centre.view(1, 1, 2), matrix, fraction, (64, 64))[0]
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    aperture = torch.stack([y, x], -1).sub(centre) @ matrix[0].T
    inside = aperture.norm(dim=-1) < 0.9
    texture = evaluate_disks(coefficients[0, 0], 0.8 * aperture[inside]) / (math.pi * 81)
    assert (image[inside] / texture - 1).abs().max() < 1e-4


def test_render_disks__cuts_disks_at_the_frame():
    image = detector.render_disks(
        flat_disks(1.0), torch.tensor([[[0.0, 15.5]]]), isotropic(5.0), torch.ones(1), (32, 32)
    )
    # the frame ends half a pixel above the centre row
    above = 0.5 - (0.5 * math.sqrt(1 - 0.01) * 0.1 + 0.5 * math.asin(0.1)) * 2 / math.pi
    assert image.sum().item() == pytest.approx(1 - above, abs=3e-3)


def test_render_disks__leaves_nan_positions_out():
    position = torch.tensor([[[16.0, 16.0], [torch.nan, torch.nan]]])
    image = detector.render_disks(flat_disks(1.0, 5.0), position, isotropic(4.0), torch.ones(1), (32, 32))
    assert image.sum().item() == pytest.approx(1.0, rel=2e-3)


def test_render_disks__draws_a_batch_of_different_radii_as_one_by_one():
    torch.manual_seed(1)
    coefficients = flat_disks(0.5, 0.2).repeat(3, 1, 1) + 0.01 * torch.randn(3, 2, 45)
    position = 12 + 40 * torch.rand(3, 2, 2)
    matrix = torch.stack([torch.eye(2) / r for r in (3.0, 7.0, 20.0)])
    fraction = torch.tensor([0.7, 1.0, 0.9])
    together = detector.render_disks(coefficients, position, matrix, fraction, (64, 64))
    for i in range(3):
        part = slice(i, i + 1)
        alone = detector.render_disks(
            coefficients[part], position[part], matrix[part], fraction[part], (64, 64)
        )
        assert torch.allclose(together[i], alone[0], atol=1e-7)


def test_render_disks__tilts_the_illumination():
    gradient = torch.tensor([[0.1, 0.0]])
    image = detector.render_disks(
        flat_disks(1.0),
        torch.tensor([[[16.0, 16.0]]]),
        isotropic(8.0),
        torch.ones(1),
        (32, 32),
        illumination=gradient,
    )[0]
    assert (image[20, 16] / image[12, 16]).item() == pytest.approx(1.05 / 0.95, rel=1e-3)


def test_mean_over_aperture__is_the_mean_intensity_of_the_part_drawn():
    torch.manual_seed(2)
    coefficients = torch.randn(45)
    fraction = torch.tensor([0.6])
    r = 0.6 * torch.sqrt((torch.arange(20000) + 0.5) / 20000)
    angle = torch.arange(20000) * 2.399963
    points = torch.stack([r * torch.sin(angle), r * torch.cos(angle)], 1)
    mean = evaluate_disks(coefficients, points).mean()
    assert (detector.mean_over_aperture(fraction)[0] @ coefficients).item() == pytest.approx(
        mean.item(), abs=2e-3
    )


def test_blur_frames__widens_a_point_by_the_psf_and_keeps_its_electrons():
    frames = torch.zeros(1, 48, 48)
    frames[0, 24, 24] = 100.0
    image = detector.blur_frames(frames, psf_px=torch.tensor([1.3]))[0]
    y = torch.arange(48.0) - 24
    assert image.sum().item() == pytest.approx(100, rel=1e-4)
    assert ((image.sum(1) * y**2).sum() / image.sum()).item() == pytest.approx(1.69, rel=1e-3)


def test_blur_frames__moves_the_lost_share_out_of_a_point():
    frames = torch.zeros(1, 96, 96)
    frames[0, 48, 48] = 1.0
    options = {"loss_px": torch.tensor([2.0]), "cutoff_px": torch.tensor([20.0])}
    image = detector.blur_frames(frames, loss=torch.tensor([0.3]), **options)[0]
    assert image.sum().item() == pytest.approx(1, rel=0.02)
    assert 0.69 < image[48, 48].item() < 0.78
    assert image[48, 58] < image[48, 52]


def test_blur_frames__with_a_tail_keeps_the_electrons():
    frames = torch.zeros(1, 96, 96)
    frames[0, 48, 48] = 1.0
    image = detector.blur_frames(
        frames, psf_px=torch.tensor([0.5]), tail=torch.tensor([0.1]), tail_px=torch.tensor([5.0])
    )
    assert image.sum().item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("kind", ["thermal", "lorentzian", "amorphous"])
def test_backgrounds__hold_one_electron_over_the_plane(kind):
    distance2 = detector.squared_distance(torch.tensor([[200.3, 199.1]]), (400, 400))
    width = torch.tensor([30.0])
    if kind == "thermal":
        image = detector.thermal_background(distance2, width)
    elif kind == "lorentzian":
        image = detector.lorentzian_background(distance2, width, torch.tensor([150.0]))
    else:
        image = detector.amorphous_rings(distance2, torch.tensor([80.0]), torch.tensor([8.0]), speckle=0.0)
    assert image.sum().item() == pytest.approx(1, rel=5e-3)


def test_count_electrons__has_poisson_mean_and_variance():
    generator = torch.Generator().manual_seed(4)
    counts = detector.count_electrons(torch.full((1, 200, 200), 7.0), generator)
    # standard errors: mean sqrt(7/4e4) = 0.013, variance sqrt(2) 7/200 = 0.05
    assert counts.mean().item() == pytest.approx(7, abs=0.06)
    assert counts.var().item() == pytest.approx(7, abs=0.25)


def test_add_hot_pixels__changes_at_most_the_number_asked_for():
    generator = torch.Generator().manual_seed(5)
    frames = detector.add_hot_pixels(torch.zeros(2, 32, 32), 6, torch.tensor([100.0, 100.0]), generator)
    assert 1 <= (frames[0] > 0).sum() <= 6


def test_kill_pixels__kills_the_same_pixels_in_all_frames():
    generator = torch.Generator().manual_seed(6)
    frames = detector.kill_pixels(torch.ones(3, 64, 64), 0.05, generator)
    assert torch.equal(frames[0], frames[2])
    assert (frames[0] == 0).float().mean().item() == pytest.approx(0.05, abs=0.02)


def test_saturate__clips_each_frame_at_its_ceiling():
    frames = detector.saturate(torch.full((2, 4, 4), 9.0), torch.tensor([5.0, 20.0]))
    assert frames.amax((1, 2)).tolist() == [5.0, 9.0]


def test_beam_stop__covers_the_direct_beam_and_leaves_the_far_side():
    origin = torch.tensor([[16.0, 16.0]])
    zero = torch.zeros(1)
    frames = detector.beam_stop(torch.ones(1, 32, 32), origin, torch.tensor([8.0]), zero, zero)[0]
    assert frames[16, 16] == 0
    assert frames[16, 31] == 0
    assert frames[16, 2] == 1


def test_bullseye__has_unit_mean_over_the_aperture_and_opaque_rings():
    image = detector.bullseye(3, fill=0.5, size=128)
    grid = torch.linspace(-1, 1, 128)
    rho = torch.hypot(grid[:, None], grid)
    assert image[rho <= 1].mean().item() == pytest.approx(1, abs=1e-5)
    assert image[64, 64] > 1.5
    opaque = (image < 0.1) & (rho <= 1)
    assert opaque.float().sum() / (rho <= 1).sum() == pytest.approx(0.40, abs=0.05)
    # from the centre to the rim: open, then three opaque rings
    line = (image[64, 64:] > 0.5 * image[64, 64]).int()
    assert int((line[:-1] - line[1:]).clamp_min(0).sum()) == 3


def test_render_disks__a_patterned_aperture_keeps_electrons_and_centre():
    image = detector.render_disks(
        flat_disks(1.0),
        torch.tensor([[[24.3, 23.8]]]),
        isotropic(12.0),
        torch.ones(1),
        (48, 48),
        transmission=detector.bullseye(2, size=64)[None],
    )[0]
    assert image.sum().item() == pytest.approx(1, rel=0.02)
    torch.testing.assert_close(centroid(image).float(), torch.tensor([24.3, 23.8]), atol=0.01, rtol=0)
    assert image[24, 24] > 5 * image[24, 27]  # first opaque ring: 1.3 to 4 px


def test_module_gaps__blank_a_band_and_nothing_else():
    frames = torch.ones(2, 16, 20)
    out = detector.module_gaps(frames, torch.tensor([3, 5]), torch.tensor([2, 4]), torch.tensor([0, 1]))
    assert float(out[0, 3:5].sum()) == 0
    assert float(out[1, :, 5:9].sum()) == 0
    assert float(out[0].sum()) == 320 - 40
    assert float(out[1].sum()) == 320 - 64


def test_spread_counts__adds_the_share_of_neighbours_and_keeps_the_centre():
    counts = torch.zeros(1, 41, 41)
    counts[0, 20, 20] = 40_000
    out = detector.spread_counts(counts, torch.tensor([0.4]), torch.Generator().manual_seed(0))
    assert out[0, 20, 20] == 40_000
    assert (out.sum() / 40_000).item() == pytest.approx(1.4, abs=0.01)
    for y, x in ((19, 20), (21, 20), (20, 19), (20, 21)):
        assert out[0, y, x].item() == pytest.approx(4000, abs=300)


def test_spread_counts__nothing_wraps_around_and_binary_counts_once():
    counts = torch.zeros(1, 8, 8)
    counts[0, 0, 0] = 1000
    out = detector.spread_counts(counts, torch.ones(1), torch.Generator().manual_seed(0), binary=True)
    assert float(out[0, -1].sum() + out[0, :, -1].sum()) == 0
    assert float(out.max()) == 1


def test_change_contrast__keeps_zero_and_the_maximum():
    frames = torch.tensor([[[0.0, 4.0], [16.0, 1.0]]])
    out = detector.change_contrast(frames, torch.tensor([0.5]))
    torch.testing.assert_close(out, torch.tensor([[[0.0, 8.0], [16.0, 4.0]]]))

import math

import pytest
import torch

from fcunet.nn.model import AMPLITUDE_UNIT_V, NetworkOutput
from fcunet.training.losses import LossConfig, compute_losses, render_spots, spot_patches

POSITION = torch.tensor([[[10.3, 12.9], [21.0, 5.5], [math.nan, math.nan]]])
AMPLITUDE = torch.tensor([[5.0, 0.0, math.nan]])  # the second is forbidden, yet lit
ELECTRONS = torch.tensor([[1e6, 1e6, math.nan]])
SHAPE, STRIDE = (16, 16), 2


def perfect(log_sigma=-2.0):
    """The maps that a perfect network would give."""
    patches = spot_patches(POSITION, map_shape=SHAPE, stride=STRIDE, spot_sigma=1.2, reach=3)
    grid = torch.arange(16.0) * STRIDE + (STRIDE - 1) / 2
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    near = (y - 10.3) ** 2 + (x - 12.9) ** 2 < (y - 21.0) ** 2 + (x - 5.5) ** 2
    offset = torch.stack((torch.where(near, 10.3, 21.0) - y, torch.where(near, 12.9, 5.5) - x))[None]
    return NetworkOutput(
        bragg_map=render_spots(torch.tensor([[1.0, 1.0, 0.0]]), patches, SHAPE),
        root_amplitude=torch.where(near, math.sqrt(5.0 / AMPLITUDE_UNIT_V), -0.3)[None],
        offset=offset,
        log_sigma=torch.full((1, *SHAPE), log_sigma),
        stride=STRIDE,
        frame=(32, 32),
    )


def losses(output, **config):
    return compute_losses(output, POSITION, AMPLITUDE, ELECTRONS, LossConfig(**config))


def test_losses__of_a_perfect_network_vanish():
    found = losses(perfect())
    assert float(found.bragg) == pytest.approx(0, abs=5e-3)  # maps are clamped at 1e-6
    assert float(found.amplitude) == pytest.approx(0, abs=1e-6)
    assert float(found.position) == pytest.approx(
        2 * -2.0 * math.exp(2 * 0.5 * -2.0), rel=1e-4
    )  # beta-NLL without error


def test_losses__position_error_costs_least_with_the_true_sigma():
    miss = 0.1
    output = perfect()
    output = output._replace(offset=output.offset + miss)  # the same error along y and x
    costs = {}
    for sigma in (0.05, 0.1, 0.2):
        log_sigma = torch.full_like(output.log_sigma, math.log(sigma))
        costs[sigma] = float(losses(output._replace(log_sigma=log_sigma), beta=0).position)
    assert min(costs, key=costs.get) == 0.1


def test_losses__amplitude_of_a_forbidden_reflection_counts():
    output = perfect()
    output = output._replace(root_amplitude=output.root_amplitude.clamp_min(0.5))
    assert float(losses(output).amplitude) > 0.1


def test_losses__spots_without_electrons_are_not_asked_for():
    output = perfect()._replace(
        root_amplitude=torch.full((1, *SHAPE), 9.0), offset=torch.full((1, 2, *SHAPE), 5.0)
    )
    found = compute_losses(output, POSITION, AMPLITUDE, torch.zeros(1, 3))
    assert float(found.amplitude) == 0
    assert float(found.position) == 0


def test_losses__have_finite_gradients_without_any_spot():
    output = perfect()._replace(root_amplitude=torch.full((1, *SHAPE), 0.1, requires_grad=True))
    nothing = torch.full((1, 3), math.nan)
    total = compute_losses(output, nothing[..., None].expand(1, 3, 2), nothing, nothing).total
    total.backward()
    assert bool(torch.isfinite(output.root_amplitude.grad).all())


def test_render_spots__puts_the_centroid_on_the_true_position():
    patches = spot_patches(POSITION[:, :1], map_shape=(32, 32), stride=1, spot_sigma=1.2, reach=6)
    image = render_spots(torch.ones(1, 1), patches, (32, 32))[0]
    grid = torch.arange(32.0)
    assert float((image.sum(1) * grid).sum() / image.sum()) == pytest.approx(10.3, abs=1e-3)
    assert float((image.sum(0) * grid).sum() / image.sum()) == pytest.approx(12.9, abs=1e-3)


def test_spot_patches__spots_beyond_the_map_have_no_weight():
    far = torch.tensor([[[200.0, 3.0], [-90.0, 4.0]]])
    assert float(spot_patches(far, map_shape=SHAPE, stride=2, spot_sigma=1.2, reach=2).weight.sum()) == 0

"""A tiny kinematic generator of training patterns: disks with a slope on a random lattice, Poisson noise."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor


class ToyBatch(NamedTuple):
    pattern: Tensor
    probe: Tensor
    spot_position: Tensor
    spot_amplitude: Tensor
    spot_electrons: Tensor
    origin: Tensor
    optics: Tensor

    def to(self, device: torch.device | str) -> "ToyBatch":
        return ToyBatch(*(t.to(device) for t in self))

    def __getitem__(self, rows: slice) -> "ToyBatch":  # type: ignore[override]
        return ToyBatch(*(t[rows] for t in tuple(self)))


class ToySource:
    """Same interface as PatternSource; its state can be saved, so that training resumes bit for bit."""

    def __init__(self, size: int = 64, seed: int = 0, dose: float | None = None):
        self.size, self.dose = size, dose
        self.generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Tensor]:
        return {"rng": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["rng"])

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def batch(self, n: int) -> ToyBatch:
        size, half = self.size, self.size // 2
        grid = torch.arange(size, dtype=torch.float32)
        radius = self._uniform(3, 5, n)
        length, angle = self._uniform(13, 20, n, 2), self._uniform(0, 3.14, n)
        turn = torch.stack((angle, angle + self._uniform(1.3, 1.8, n)), 1)
        g = length[..., None] * torch.stack((turn.sin(), turn.cos()), -1)  # (n, 2, 2)
        k = torch.arange(-4.0, 5.0)
        hk = torch.stack(torch.meshgrid(k, k, indexing="ij"), -1).reshape(-1, 2)  # (S, 2)
        origin = half + self._uniform(-3, 3, n, 2)
        position = origin[:, None] + hk @ g  # (n, S, 2)
        amplitude = self._uniform(0, 1, n, len(hk)).square() * 8
        amplitude[self._uniform(0, 1, n, len(hk)) < 0.1] = 0  # forbidden, yet lit
        intensity = amplitude.square() + 2 * self._uniform(0, 1, n, len(hk)).square()
        slope = self._uniform(-0.6, 0.6, n, len(hk), 2)
        dy = grid[None, None, :, None] - position[..., 0, None, None]
        dx = grid[None, None, None, :] - position[..., 1, None, None]
        disk = (radius[:, None, None, None] + 0.5 - torch.hypot(dy, dx)).clamp(0, 1)
        r = radius[:, None, None, None]
        texture = 1 + slope[..., 0, None, None] * dy / r + slope[..., 1, None, None] * dx / r
        expected = (intensity[..., None, None] * disk * texture.clamp_min(0)).sum(1)
        dose = torch.full((n,), self.dose) if self.dose else 10 ** self._uniform(3.5, 6, n)
        scale = dose / expected.sum(dim=(1, 2))
        electrons = intensity * scale[:, None] * torch.pi * radius[:, None] ** 2
        centre = (radius[:, None, None] + 0.5 - torch.hypot(grid[:, None] - half, grid - half)).clamp(0, 1)
        outside = ((position < -8) | (position > size + 8)).any(-1)
        position[outside] = torch.nan
        electrons[outside], amplitude[outside] = 0.0, 0.0
        pattern = torch.poisson(expected * scale[:, None, None], generator=self.generator)
        optics = torch.tensor([[200.0, 0.08]]).expand(n, 2)
        return ToyBatch(pattern, centre, position, amplitude, electrons, origin, optics)


@pytest.fixture
def toy_source() -> type[ToySource]:
    return ToySource

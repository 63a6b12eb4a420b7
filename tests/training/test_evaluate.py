import math

import numpy as np
import pytest
import torch

from fcunet.kernels.peaks import Peaks
from fcunet.kernels.strain import shared_shear
from fcunet.nn.disks import CURVE_OCTAVES, DiskReading, straighten
from fcunet.nn.weights import load_model
from fcunet.training.calibration import fit_curve, fit_dilation, fit_sigma
from fcunet.training.evaluate import (
    Matches,
    affine_error,
    component_errors,
    evaluate,
    match_peaks,
    surviving_dilation,
)


def peaks_at(position, intensity, sigma=0.1, slots=200):
    n = len(position)
    out = [torch.full((n, slots), math.nan) for _ in range(4)]
    count = torch.zeros(n, dtype=torch.int64)
    for i in range(n):
        ok = torch.isfinite(position[i, :, 0])
        k = int(ok.sum())
        for slot, values in zip(
            out, (position[i, ok, 0], position[i, ok, 1], intensity[i, ok], sigma), strict=True
        ):
            slot[i, :k] = values
        count[i] = k
    return Peaks(*out, count, torch.zeros(n, dtype=torch.bool), torch.zeros(n), torch.zeros(n))


@pytest.fixture
def batch(toy_source):
    return toy_source(128, seed=3, dose=1e6).batch(4)


def test_evaluate__of_the_truth_is_perfect(batch):
    figures = evaluate(lambda _: peaks_at(batch.spot_position, batch.spot_amplitude), [batch])
    assert figures["recall"] == pytest.approx(1)
    assert figures["precision"] > 0.98  # some true spots have less than an electron
    assert figures["position_rms_px"] == pytest.approx(0, abs=1e-5)
    assert figures["R"] == pytest.approx(0, abs=1e-6)
    assert figures["forbidden_ratio"] == pytest.approx(0)
    assert figures["R_blind"] > 0.3
    assert figures["forbidden_ratio_sqrt_I"] > 0.1


def test_evaluate__counts_a_missed_and_a_false_peak(batch):
    position = batch.spot_position.clone()
    electrons = torch.where(torch.isfinite(position[..., 0]), batch.spot_electrons, 0)
    row = int(electrons[0].argmax())
    position[0, row] += 6.0  # between the disks
    before = match_peaks(peaks_at(batch.spot_position, batch.spot_amplitude), batch)
    found = match_peaks(peaks_at(position, batch.spot_amplitude), batch)
    assert (found.n_false - before.n_false).tolist() == [1, 0, 0, 0]
    assert (before.found & ~found.found).nonzero().tolist() == [[0, row]]


def test_evaluate__a_constant_sigma_that_is_right_covers(batch):
    generator = torch.Generator().manual_seed(0)
    noisy = batch.spot_position + 0.1 * torch.randn(batch.spot_position.shape, generator=generator)
    figures = evaluate(lambda _: peaks_at(noisy, batch.spot_amplitude, 0.1), [batch])
    assert figures["coverage_1"] == pytest.approx(0.683, abs=0.06)
    assert figures["coverage_2"] == pytest.approx(0.954, abs=0.04)
    assert figures["position_rms_px"] == pytest.approx(0.1, rel=0.1)


def test_affine_error__recovers_a_strained_pattern(batch):
    strain = torch.tensor([[2e-3, -1e-3], [5e-4, -3e-3]])
    moved = batch.spot_position + (batch.spot_position - 64) @ strain.T + 0.2
    matches = match_peaks(peaks_at(moved, batch.spot_amplitude), batch)
    found = affine_error(matches, batch.spot_position).strain
    torch.testing.assert_close(found, strain.double().expand(4, 2, 2), rtol=0, atol=2e-5)


def test_affine_error__knows_its_own_spread(batch):
    generator = torch.Generator().manual_seed(2)
    ratios = []
    for _ in range(100):
        noisy = batch.spot_position + 0.1 * torch.randn(batch.spot_position.shape, generator=generator)
        matches = match_peaks(peaks_at(noisy, batch.spot_amplitude, 0.1), batch)
        found = affine_error(matches, batch.spot_position)
        ratios.append(found.strain / found.std[:, None])
    ratio = torch.cat(ratios)
    assert float(ratio.square().mean()) == pytest.approx(1, rel=0.1)  # 1600 values: 3.5 %


@pytest.mark.parametrize("signed", [0.0, -1e-3])
def test_component_errors__hold_independent_and_shared_errors(signed):
    generator = torch.Generator().manual_seed(3)
    n = 20_000
    q = torch.tensor([[20.0 * y, 30.0 * x] for y in range(-3, 4) for x in range(-3, 4)]).double()
    share = float(shared_shear(signed))
    size = 3e-3 * torch.tensor([[1.0], [share], [share]])
    dilation, pure, shear = size * torch.randn(3, n, generator=generator).double()
    shared = torch.stack((dilation - pure, shear, shear, dilation + pure), -1).view(n, 2, 2)
    error = q @ shared + 0.4 * torch.randn(n, len(q), 2, generator=generator)
    matches = Matches(
        *torch.ones(2, n, len(q), dtype=torch.bool), error, *torch.full((2, n, len(q)), 0.4),
        torch.full((n,), 3e-3), torch.full((n,), signed), *torch.zeros(2, n),
    )  # fmt: skip
    found, std = component_errors(affine_error(matches, q.expand(n, -1, -1)), matches)
    np.testing.assert_allclose((found / std).square().mean(0).sqrt(), 1.0, atol=0.02)
    e_xx = dilation + pure
    assert torch.corrcoef(torch.stack((found[:, 0], e_xx)))[0, 1] > 0.9
    assert torch.corrcoef(torch.stack((found[:, 2], shear)))[0, 1] > 0.5  # beside what is independent


def test_fit_dilation__finds_what_is_shared():
    generator = torch.Generator().manual_seed(1)
    sets = []
    for std in (1e-4, 5e-4):
        bars = torch.full((20_000, 2), std)
        stated = 2e-3 * torch.rand(20_000, generator=generator)
        shared = torch.hypot(0.5 * stated, torch.tensor(3e-4)) * torch.randn(20_000, generator=generator)
        shared = shared * (1 + float(shared_shear(0.0)) ** 2) ** 0.5  # of e_xx and e_yy
        error = shared[:, None] + bars * torch.randn(20_000, 2, generator=generator)
        sets.append((error, bars, stated))
    scale, floor = fit_dilation(sets)
    assert scale == pytest.approx(0.5, rel=0.1)  # its grid has steps of 7 %
    assert floor == pytest.approx(3e-4, abs=6e-5)  # and of 5e-5
    assert fit_dilation([]) == (1.0, 0.0)


def test_fit_curve__straightens_what_depends_on_size_and_number():
    generator = torch.Generator().manual_seed(2)
    sets, bent = [], {12: 1.3, 64: 1.0}
    for low, high in ((-9.0, -5.0), (-7.0, -3.5)):
        true = 2 ** (low + (high - low) * torch.rand(80_000, generator=generator))
        error = true[:, None] * torch.randn(80_000, 2, generator=generator)
        count = torch.tensor([12, 64]).repeat(40_000)
        power = torch.where(count == 12, 1 / bent[12], 1 / bent[64])
        sets.append((error, (true / 2**-6) ** power * 2**-6, count))  # small ones of few said too large
    curve = fit_curve(sets)
    assert [len(row) for row in curve] == [len(CURVE_OCTAVES)] * 2
    assert curve[1] == pytest.approx([1] * len(CURVE_OCTAVES), abs=0.03)
    for error, stated, count in sets:
        straight = straighten(stated[:, None].log(), count, curve)[:, 0].exp()
        for part in (straight < straight.median(), straight >= straight.median()):
            for some in (part & (count == 12), part & (count == 64)):
                ratio = error[some].abs() / straight[some, None]
                assert float((ratio < 1).float().mean()) == pytest.approx(0.683, abs=0.03)
    few = [(error[:60], stated[:60], count[:60]) for error, stated, count in sets]
    assert fit_curve(few) == fit_curve([]) == ()


def test_fit_curve__octaves_without_disks_take_the_nearest():
    sigma = torch.full((1000,), 2**-6.5)
    error = 2 * sigma[:, None] * torch.randn(1000, 2, generator=torch.Generator().manual_seed(3))
    few, many = fit_curve([(error, sigma, torch.full((1000,), 100))])
    assert few == many == (few[0],) * len(CURVE_OCTAVES)
    assert few[0] == pytest.approx(2, rel=0.06)


def test_fit_sigma__finds_scale_and_floor():
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for level in (0.01, 0.1):
        sigma = torch.full((20000,), level)
        error = torch.hypot(1.5 * sigma, torch.tensor(0.02))[:, None] * torch.randn(
            20000, 2, generator=generator
        )
        pairs.append((error, sigma))
    scale, floor = fit_sigma(pairs)
    assert scale == pytest.approx(1.5, rel=0.06)
    assert floor == pytest.approx(0.02, abs=0.006)


def test_fit_sigma__changes_nothing_without_data():
    assert fit_sigma([]) == (1.0, 0.0)


class Believer:
    """A second stage that leaves a share of what it is told, and looks up the rest."""

    def __init__(self, truth, share):
        self.truth, self.share = truth, share

    def read_disks(self, patterns, probes, y, x, *, optics=None):
        given = torch.stack((y, x), dim=-1)
        sigma = torch.full_like(y, 0.1)
        return DiskReading((1 - self.share) * (self.truth - given), sigma.log(), y, y[:, 0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_surviving_dilation__is_the_share_believed(toy_source, share):
    batch = toy_source(128, seed=5, dose=1e6).batch(3)
    found = surviving_dilation(Believer(batch.spot_position, share), batch)
    torch.testing.assert_close(found, torch.full((3,), share), rtol=0, atol=1e-3)


def test_surviving_dilation__the_packaged_second_stage_looks_for_itself(toy_source):
    batch = toy_source(128, seed=5, dose=1e6).batch(8)
    found = surviving_dilation(load_model("default", device="cpu", precision="fp32"), batch)
    assert float(found.abs().median()) < 0.035  # trained on independent displacements alone: 0.06

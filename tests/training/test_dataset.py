"""Training batches: what is listed is what is drawn."""

import numpy as np
import pytest
import torch

from fcunet.training.dataset import PatternSource
from fcunet.training.orientations import (
    Pool,
    draw_thicknesses,
    load_pool,
    make_orientations,
    save_pool,
    training_crystals,
)


@pytest.fixture(scope="module")
def pool():
    return make_orientations(
        training_crystals("train"), 10, np.random.default_rng(0), batch=5, n_thicknesses=2, n_beams=64
    )


@pytest.fixture
def source(pool):
    return PatternSource("train", 128, seed=3, pool=pool)


def test_batch__has_the_agreed_shapes_and_padding(source):
    batch = source.batch(5)
    spots = batch.spot_position.shape[1]
    assert batch.pattern.shape == batch.probe.shape == (5, 128, 128)
    assert batch.spot_position.shape == (5, spots, 2)
    assert batch.spot_amplitude.shape == batch.spot_electrons.shape == (5, spots)
    assert torch.equal(batch.spot_position.isnan().any(-1), batch.spot_amplitude.isnan())
    assert torch.equal(batch.spot_amplitude.isnan(), batch.spot_electrons.isnan())


def test_batch__holds_whole_counts(source):
    pattern = source.batch(8).pattern
    assert torch.equal(pattern, pattern.round())
    assert (pattern >= 0).all()


def test_batch__is_the_same_for_the_same_seed(pool):
    one, two = (PatternSource("train", 64, seed=9, pool=pool).batch(3) for _ in range(2))
    assert torch.equal(one.pattern, two.pattern)
    assert torch.equal(one.spot_electrons.nan_to_num(), two.spot_electrons.nan_to_num())


def test_batch__lists_spots_where_the_electrons_are(pool):
    source = PatternSource("train", 128, seed=4, pool=pool, dose=(1e7, 1e7), clean=True, flat=1.0)
    batch = source.batch(16)
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    checked = 0
    for i in range(16):
        r = float(batch.radius[i]) + 1.5
        position, electrons = batch.spot_position[i], batch.spot_electrons[i]
        for s in range(position.shape[0]):
            py, px = position[s].tolist()
            if not (r < py < 127 - r and r < px < 127 - r) or electrons[s] < 2e4:
                continue
            distance = (position - position[s]).norm(dim=-1)
            if (distance < 2.2 * r).sum() > 1:
                continue  # a touching neighbour
            mask = (y - py) ** 2 + (x - px) ** 2 < r**2
            counts = batch.pattern[i] * mask
            assert counts.sum().item() == pytest.approx(electrons[s].item(), rel=0.05)
            centroid = [float((counts * c).sum() / counts.sum()) for c in (y, x)]
            # illumination gradient (up to 10 %) moves a centroid by a fortieth of the radius at most
            assert centroid == pytest.approx([py, px], abs=0.03 * r + 0.05)
            checked += 1
    assert checked > 20


def test_batch__lists_lit_forbidden_reflections_with_amplitude_zero(pool):
    lit = total = 0
    source = PatternSource("train", 128, seed=5, pool=pool, dose=(1e6, 1e6))
    for _ in range(4):
        batch = source.batch(8)
        bright = batch.spot_electrons > 20
        total += int(bright.sum())
        lit += int((bright & (batch.spot_amplitude == 0)).sum())
    assert lit > 0.02 * total


def test_probe__sits_in_the_middle_and_has_the_radius(source):
    batch = source.batch(8)
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    for probe, radius in zip(batch.probe, batch.radius, strict=True):
        total = probe.sum()
        assert float((probe * y).sum() / total) == pytest.approx(64, abs=0.06 * float(radius))
        spread = float((probe * ((y - 64) ** 2 + (x - 64) ** 2)).sum() / total)
        # a uniform disk has mean square radius r^2 / 2; blur adds up to 2 (1.5^2 + 1)
        assert 0.9 * radius**2 / 2 < spread < 1.15 * radius**2 / 2 + 7


def test_validation__does_not_change_when_drawn_twice_with_one_seed_and_never_refreshes():
    pool = make_orientations(
        training_crystals("validation"), 4, np.random.default_rng(1), batch=4, n_thicknesses=1, n_beams=48
    )
    source = PatternSource("validation", 64, seed=0, pool=pool)
    source.batch(2)
    assert source.pool is pool


def test_grow__adds_new_orientations_and_drops_the_oldest(pool):
    source = PatternSource("train", 64, seed=0, pool=pool, pool_size=10)
    source.grow(1)
    assert len(source.pool) == 10
    assert np.array_equal(source.pool.aperture[:9], pool.aperture[1:])


def test_pool__survives_saving(tmp_path, pool):
    save_pool(pool, tmp_path / "pool.npz")
    again = load_pool(tmp_path / "pool.npz")
    assert len(again) == len(pool)
    assert np.array_equal(again.coefficients, pool.coefficients)
    assert len(Pool.concatenate([again, pool]).last(12)) == 12


def test_load_pool__refuses_another_file(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="not a pool of orientations"):
        load_pool(tmp_path / "other.npz")


def test_draw_thicknesses__spans_2_to_150_nm_with_weight_on_5_to_80():
    rng = np.random.default_rng(0)
    thickness = np.concatenate([draw_thicknesses(rng, 8, 4).ravel() for _ in range(300)]) / 10
    assert thickness.min() >= 2
    assert thickness.max() <= 150
    assert 0.8 < np.mean((thickness > 5) & (thickness < 80)) < 0.98


def test_small__brings_small_disks_near_to_each_other(pool):
    plain = PatternSource("train", 128, seed=1, pool=pool).batch(64)
    chosen = PatternSource("train", 128, seed=1, pool=pool, small=0.5).batch(64)
    assert float(plain.radius.min()) >= 2.5
    assert float(chosen.radius.min()) < 2.5
    assert 0.25 < float((chosen.radius < 4).float().mean()) < 0.75


def test_faint__brings_patterns_of_few_electrons(pool):
    batch = PatternSource("train", 64, seed=1, pool=pool, faint=0.5).batch(64)
    assert 0.3 < float((batch.dose < 2e3).float().mean()) < 0.7
    assert float(batch.dose.min()) >= 300


def test_bright__brings_patterns_of_many_electrons(pool):
    batch = PatternSource("train", 64, seed=1, pool=pool, bright=0.5).batch(64)
    assert 0.3 < float((batch.dose > 1e7).float().mean()) < 0.7
    assert float(batch.dose.max()) <= 1e9


def test_extend__takes_up_more_orientations(pool):
    source = PatternSource("train", 64, seed=0, pool=pool, pool_size=len(pool))
    source.extend(pool.last(3))
    assert len(source.pool) == len(pool) + 3
    assert np.array_equal(source.pool.aperture, np.concatenate([pool.aperture, pool.aperture[-3:]]))
    assert source.batch(32).pattern.sum() > 0


@pytest.mark.gpu
def test_batch__can_be_drawn_on_a_gpu(pool):
    batch = PatternSource("train", 128, device="cuda", seed=3, pool=pool).batch(4)
    assert batch.pattern.device.type == "cuda"
    assert batch.pattern.sum() > 0


def test_training_crystals__never_include_the_benchmark_families():
    assert not {"diamond", "rutile", "chalcopyrite"} & {c.prototype for c in training_crystals("train")}


def test_pattern_source__draws_the_radius_asked_for(source):
    chosen = PatternSource("train", 128, seed=1, pool=source.pool, radius=(2.0, 2.5)).batch(6)
    assert float(chosen.radius.min()) >= 2.0
    assert float(chosen.radius.max()) <= 2.5

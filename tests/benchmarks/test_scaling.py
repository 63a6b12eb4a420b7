"""The model of large pools in cases whose answer is known."""

from dataclasses import replace

import pytest

from benchmarks.scaling import Pool, limits, simulate

# one block: 1000 patterns of 1 ms; nothing else takes time
IDEAL = Pool(
    4, blocks=400, patterns=1000, stored=1e-9, compute_s=1e-3, spread=0.0, decode_s=1e-12, dispatch_s=1e-12
)


def test_simulate__without_any_overhead_is_work_over_workers():
    assert simulate(IDEAL)["seconds"] == pytest.approx(100.0)
    assert simulate(IDEAL)["efficiency"] == pytest.approx(1.0)


def test_simulate__five_blocks_on_four_workers_take_two_rounds():
    found = simulate(replace(IDEAL, blocks=5, threads=1))
    assert found["seconds"] == pytest.approx(2.0)
    assert found["efficiency"] == pytest.approx(5 / 8)


@pytest.mark.parametrize(
    ("part", "change"),
    [("driver", {"dispatch_s": 1.0}), ("file system", {"stored": 1e6, "bandwidth": 1e9, "per_worker": 1e9})],
)
def test_simulate__approaches_the_slowest_part(part, change):
    pool = replace(IDEAL, **change)  # 1000 patterns per s, where the devices could do 4000
    assert limits(pool)[part] == pytest.approx(1000)
    rate = pool.blocks * pool.patterns / simulate(pool)["seconds"]
    assert rate == pytest.approx(1000, rel=0.02)


def test_simulate__one_thread_cannot_read_and_compute_at_once():
    pool = replace(IDEAL, decode_s=1e-3, threads=1)
    assert simulate(pool)["efficiency"] == pytest.approx(0.5, rel=0.01)
    assert simulate(replace(pool, threads=2))["efficiency"] == pytest.approx(1.0, rel=0.02)

import dataclasses

import numpy as np
import pytest
import zarr
from distributed import Client

from fcunet.training import library
from fcunet.training.dataset import PatternSource, Pool, load_pool
from fcunet.training.library import (
    LibraryPlan,
    LibrarySource,
    build_library,
    create_library,
    make_part,
    missing_parts,
    open_plan,
    read_pool,
    write_part,
)

TINY = LibraryPlan(
    split="validation", n_patterns=6, n_thicknesses=2, part=2, size=64, seed=4
)  # 3 orientations


@pytest.fixture(scope="module")
def client():
    with Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as client:
        yield client


@pytest.fixture(scope="module")
def built(client, tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "tiny.zarr"
    build_library(client, path, TINY)
    return path


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_build_library__leaves_no_part_out(built):
    assert missing_parts(built / "validation") == []
    assert len(read_pool(built / "validation")) == 3


def test_build_library__stores_shards_of_one_part(built):
    coefficients = zarr.open_array(built / "validation" / "coefficients", mode="r")
    assert coefficients.shards[0] == TINY.part
    assert coefficients.metadata.zarr_format == 3


def test_read_pool__returns_what_was_scattered(built):
    pool, made = read_pool(built / "validation"), make_part(TINY, 1)
    for field in dataclasses.fields(Pool):
        np.testing.assert_array_equal(getattr(pool, field.name)[2:], made[field.name])


def test_read_pool__keeps_to_the_number_wanted(built):
    assert len(read_pool(built / "validation", max_orientations=1)) == 1


def test_load_pool__reads_a_library(built):
    assert (
        load_pool(built / "validation").crystal.tolist() == read_pool(built / "validation").crystal.tolist()
    )


def test_pattern_source__draws_from_a_library(built):
    batch = PatternSource("validation", 64, pool=built / "validation").batch(3)
    assert batch.pattern.shape == (3, 64, 64)
    assert batch.pattern.sum() > 0


def test_library_source__draws_from_the_split_it_is_told(built):
    source = LibrarySource(built, "validation", 64, seed=1, dose=(1e4, 1e4))
    assert source.batch(2).dose.tolist() == pytest.approx([1e4, 1e4])


def test_write_part__continues_with_the_same_bytes(built, tmp_path):
    folder = create_library(tmp_path / "again.zarr", TINY)
    write_part(folder, 1)
    assert missing_parts(folder) == [0]
    assert len(read_pool(folder)) == 1  # the last part is short
    write_part(create_library(tmp_path / "again.zarr", TINY), 0)
    assert contents(folder) == contents(built / "validation")


def test_build_library__does_nothing_twice(built, client, monkeypatch):
    monkeypatch.setattr(library, "write_part", lambda *_: pytest.fail("nothing was missing"))
    before = contents(built)
    build_library(client, built, TINY)
    assert contents(built) == before


def test_build_library__names_the_part_that_failed(client, tmp_path, monkeypatch):
    def fail_first(folder, k, device):
        if k == 0:
            raise OSError("disk full")
        return 1

    monkeypatch.setattr(library, "_task", fail_first)
    with pytest.raises(RuntimeError, match="1 of 2 parts failed, the first .0. with: OSError"):
        build_library(client, tmp_path / "failing.zarr", TINY)


def test_create_library__refuses_another_plan(built):
    with pytest.raises(ValueError, match="follows another plan"):
        create_library(built, dataclasses.replace(TINY, seed=5))


def test_open_plan__says_how_to_make_a_library(tmp_path):
    with pytest.raises(ValueError, match="build_training_library"):
        open_plan(tmp_path / "nothing")


def test_library_plan__counts_rows_and_parts():
    plan = LibraryPlan(n_patterns=1001, n_thicknesses=4, part=100)
    assert (plan.n_rows, plan.n_parts, plan.rows(2)) == (251, 3, slice(200, 251))
    assert dataclasses.replace(plan, contents="patterns").n_rows == 1001


def test_library_plan__names_the_splits():
    with pytest.raises(ValueError, match="train, validation, test"):
        LibraryPlan(split="all")


def test_library_source__returns_stored_patterns_once_per_round(client, tmp_path):
    plan = LibraryPlan("validation", "patterns", n_patterns=4, n_thicknesses=4, part=2, size=64)
    folder = build_library(client, tmp_path / "patterns.zarr", plan)
    stored = np.asarray(zarr.open_array(folder / "pattern", mode="r")[:])
    batch = LibrarySource(tmp_path / "patterns.zarr", "validation", 64).batch(4)
    assert sorted(batch.pattern.sum((1, 2)).tolist()) == sorted(stored.sum((1, 2)).tolist())
    assert (batch.spot_electrons.nan_to_num() > 0).any(1).all()


def test_library_source__refuses_another_size(tmp_path):
    plan = LibraryPlan("validation", "patterns", n_patterns=2, part=2, size=64)
    create_library(tmp_path / "patterns.zarr", plan)
    with pytest.raises(ValueError, match="--size 128"):
        LibrarySource(tmp_path / "patterns.zarr", "validation", 128)

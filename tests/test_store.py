"""The three stores: layout, the one-block-one-shard rule, laziness, damage, kills, and full disks."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

from fcunet import schema, store, zarrfolder
from fcunet.provenance import fingerprint, provenance

RNG = np.random.default_rng(20)


def cube(scan=(5, 7), detector=(6, 8), dtype=np.uint16, seed=1):
    counts = np.random.default_rng(seed).poisson(2.0, (*scan, *detector)).astype(dtype)
    dataset = xr.Dataset({"intensity": (schema.DATACUBE_DIMS, counts)}, attrs={"title": "test"})
    return dataset.assign_coords(
        scan_y=store.coordinate("scan_y", np.arange(scan[0]) * 0.5, "nm"),
        qx=store.coordinate("qx", np.arange(detector[1]) * 0.02, "1/angstrom"),
    )


@pytest.fixture
def path(tmp_path):
    return store.write_datacube(tmp_path / "a.zarr", cube())


def shards(path):
    return sorted(p for p in (path / "intensity" / "c").rglob("*") if p.is_file())


# ---- layout


@pytest.mark.parametrize(
    ("detector", "dtype", "shard", "chunk"),
    [
        ((128, 128), np.uint16, 64, 8),
        ((256, 256), np.uint16, 32, 4),
        ((512, 512), np.uint16, 16, 2),
        ((576, 576), np.uint16, 16, 2),
        (
            (128, 128),
            np.float32,
            32,
            4,
        ),  # EMPAD: 64 MiB, for 128 x 128 px of four bytes lie between two powers
        ((4096, 4096), np.uint16, 2, 1),
    ],
)
def test_plan_layout__gives_the_table_of_the_design(detector, dtype, shard, chunk):
    assert store.plan_layout((1024, 1024), detector, dtype) == store.Layout((shard, shard), (chunk, chunk))


@given(
    scan=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    detector=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    dtype=st.sampled_from(["u1", "u2", "u4", "f4"]),
)
def test_plan_layout__chunks_divide_shards_of_bounded_size(scan, detector, dtype):
    layout = store.plan_layout(scan, detector, dtype)
    pattern = detector[0] * detector[1] * np.dtype(dtype).itemsize
    assert all(s % c == 0 for s, c in zip(layout.shard, layout.chunk, strict=True))
    assert np.prod(layout.shard) * pattern <= 1.5 * 128 * 2**20
    grid = store.BlockGrid(scan, layout.shard)
    assert len(grid) >= min(8, scan[0] * scan[1]) or np.prod(layout.shard) == 1


def test_plan_layout__a_scan_of_one_row_gets_long_blocks():
    layout = store.plan_layout((1, 4096), (256, 256), np.uint16)
    assert layout.shard == (1, 512)


def test_plan_layout__refuses_an_empty_scan():
    with pytest.raises(ValueError, match="at least one pixel"):
        store.plan_layout((0, 4), (8, 8), np.uint8)


def test_block_grid__covers_every_position_once():
    grid = store.BlockGrid((5, 7), (2, 4))
    seen = np.zeros((5, 7), int)
    for iy, ix in grid:
        seen[grid.slices(iy, ix)] += 1
        assert seen[grid.slices(iy, ix)].shape == grid.shape(iy, ix)
    assert (seen == 1).all()
    assert grid.n_blocks == (3, 2)
    assert len(grid) == 6


def test_block_grid__names_the_blocks_there_are():
    with pytest.raises(ValueError, match=r"no block \(3, 0\).*\(3, 2\) blocks"):
        store.BlockGrid((5, 7), (2, 4)).slices(3, 0)


def test_block_grid__of_store_and_of_opened_dataset_agree(path):
    assert store.block_grid(path) == store.block_grid(store.open_datacube(path))


# ---- datacube


@pytest.mark.parametrize("package", ["zarrs", None])
def test_open_datacube__reads_the_same_with_and_without_the_rust_codecs(package, path, monkeypatch):
    if package is not None:
        pytest.importorskip(package)
    monkeypatch.setattr(zarrfolder, "find_spec", lambda name: package)
    zarrfolder._open_array_cached.cache_clear()
    expected, opened = cube().intensity.values, store.open_datacube(path).intensity
    np.testing.assert_array_equal(opened.values, expected)
    np.testing.assert_array_equal(opened[2, 3].values, expected[2, 3])
    np.testing.assert_array_equal(opened[[0, 4], 1:3].values, expected[[0, 4], 1:3])
    pipeline = type(zarrfolder.open_array(path, "intensity")._async_array.codec_pipeline).__name__
    assert pipeline == ("ZarrsCodecPipeline" if package else "BatchedCodecPipeline")
    writes = zarrfolder.open_array(path, "intensity", mode="r+")
    assert type(writes._async_array.codec_pipeline).__name__ == "BatchedCodecPipeline"
    shards(path)[1].write_bytes(b"nonsense" * 100)
    with pytest.raises(store.DamagedBlockError, match="does not decode"):
        store.open_datacube(path).intensity.values  # noqa: B018
    zarrfolder._open_array_cached.cache_clear()


def test_open_datacube__gives_back_what_was_written(path):
    opened = store.open_datacube(path)
    written = cube()
    assert opened.intensity.dims == schema.DATACUBE_DIMS
    np.testing.assert_array_equal(opened.intensity.values, written.intensity.values)
    assert opened.intensity.dtype == np.uint16
    assert opened.attrs["title"] == "test"
    np.testing.assert_array_equal(opened.scan_y, written.scan_y)
    assert [opened[d].attrs["units"] for d in schema.DATACUBE_DIMS] == ["nm", "px", "px", "1/angstrom"]


def test_open_datacube__is_lazy_and_its_dask_blocks_are_shards(path):
    opened = store.open_datacube(path)
    array = zarr.open_array(path / "intensity", mode="r")
    assert isinstance(opened.intensity.data, da.Array)
    assert tuple(sizes[0] for sizes in opened.intensity.chunks) == array.shards
    assert array.metadata.zarr_format == 3
    assert array.metadata.dimension_names == schema.DATACUBE_DIMS


def test_open_datacube__can_be_sent_to_a_worker(path):
    lazy = store.open_datacube(path).intensity
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(lazy)).values, cube().intensity.values)


def test_open_datacube__single_patterns_and_lists_come_out_right(path):
    lazy, whole = store.open_datacube(path).intensity, cube().intensity.values
    np.testing.assert_array_equal(lazy[4, 6].values, whole[4, 6])
    np.testing.assert_array_equal(lazy[[4, 0], :, 1].values, whole[[4, 0], :, 1])
    np.testing.assert_array_equal(lazy[::2, 3, 2:4].values, whole[::2, 3, 2:4])


def test_open_datacube__plain_xarray_reads_the_same(path):
    plain = xr.open_zarr(path, consolidated=False)
    xr.testing.assert_equal(plain.intensity.compute(), store.open_datacube(path).intensity.compute())


def test_open_datacube__zero_counts_of_format_2_stay_integers(tmp_path):
    dataset = cube().assign_attrs(schema.format_attrs("datacube"))
    dataset.to_zarr(tmp_path / "old.zarr", zarr_format=2, consolidated=False)
    opened = store.open_datacube(tmp_path / "old.zarr")
    assert opened.intensity.dtype == np.uint16
    np.testing.assert_array_equal(opened.intensity.values, dataset.intensity.values)


def test_open_datacube__refuses_a_newer_version(path):
    zarr.open_group(path, mode="r+").attrs["fcunet_format_version"] = 99
    with pytest.raises(ValueError, match=r"format version 99.*upgrade"):
        store.open_datacube(path)


def test_open_datacube__refuses_another_kind_of_store(path):
    zarr.open_group(path, mode="r+").attrs["fcunet_format"] = "peaks"
    with pytest.raises(ValueError, match="is an fcunet peaks store"):
        store.open_datacube(path)


def test_open_datacube__refuses_split_patterns(tmp_path):
    group = zarr.create_group(tmp_path / "split.zarr", attributes=schema.format_attrs("datacube"))
    group.create_array(
        "intensity", shape=(4, 4, 8, 8), chunks=(4, 4, 4, 8), dtype="u2", dimension_names=schema.DATACUBE_DIMS
    )
    with pytest.raises(ValueError, match="fcunet convert"):
        store.open_datacube(tmp_path / "split.zarr")


def test_open_datacube__says_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no store .*none\.zarr"):
        store.open_datacube(tmp_path / "none.zarr")
    (tmp_path / "some.zarr.partial").mkdir()
    with pytest.raises(FileNotFoundError, match="only some.zarr.partial is there"):
        store.open_datacube(tmp_path / "some.zarr")
    (tmp_path / "file.txt").write_text("no store")
    with pytest.raises(ValueError, match="not a Zarr store"):
        store.open_datacube(tmp_path / "file.txt")


def test_read_block__equals_the_region_of_the_scan(path):
    grid, whole = store.block_grid(path), cube().intensity.values
    for iy, ix in grid:
        np.testing.assert_array_equal(store.read_block(path, iy, ix), whole[grid.slices(iy, ix)])


def test_read_block__sees_a_store_written_anew(tmp_path):
    for seed in (1, 2):
        store.write_datacube(tmp_path / "a.zarr", cube(seed=seed), overwrite=True)
        grid = store.block_grid(tmp_path / "a.zarr")
        np.testing.assert_array_equal(
            store.read_block(tmp_path / "a.zarr", 0, 0), cube(seed=seed).intensity.values[grid.slices(0, 0)]
        )


def test_read_block__names_a_shard_that_does_not_decode(path):
    file = path / "intensity" / "c" / "1" / "0" / "0" / "0"
    damaged = bytearray(file.read_bytes())
    damaged[: len(damaged) // 2] = bytes(len(damaged) // 2)
    file.write_bytes(damaged)
    with pytest.raises(store.DamagedBlockError, match=r"block \(1, 0\) of a\.zarr .*intensity/c/1/0/0/0"):
        store.read_block(path, 1, 0)
    with pytest.raises(store.DamagedBlockError, match=r"block \(1, 0\)"):
        store.open_datacube(path).intensity.compute(scheduler="synchronous")
    store.read_block(path, 0, 0)


def test_read_block__names_a_truncated_shard(path):
    file = path / "intensity" / "c" / "1" / "0" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(store.DamagedBlockError, match=r"block \(1, 0\) of a\.zarr"):
        store.read_block(path, 1, 0)


def test_read_block__a_lost_shard_is_an_error_and_not_zero_counts(path):
    (path / "intensity" / "c" / "1" / "0" / "0" / "0").unlink()
    with pytest.raises(store.DamagedBlockError, match="the file is missing"):
        store.read_block(path, 1, 0)


def test_write_datacube__keeps_companions_and_truth(tmp_path):
    dataset = cube()
    dataset["probe"] = (schema.PATTERN_DIMS, RNG.random((6, 8)).astype(np.float32))
    dataset["detector_mask"] = (schema.PATTERN_DIMS, RNG.random((6, 8)) > 0.1)
    dataset["origin_qy"] = (schema.SCAN_DIMS, RNG.random((5, 7)).astype(np.float32))
    truth = xr.Dataset({"e_xx": (schema.SCAN_DIMS, RNG.random((5, 7)).astype(np.float32))})
    path = store.write_datacube(tmp_path / "a.zarr", dataset, truth)
    opened = store.open_datacube(path)
    for name in ("probe", "detector_mask", "origin_qy"):
        xr.testing.assert_equal(
            opened[name].drop_vars(opened[name].coords), dataset[name].drop_vars(dataset[name].coords)
        )
        assert opened[name].dtype == dataset[name].dtype
    xr.testing.assert_equal(store.open_truth(path), truth)


def test_open_truth__is_none_for_measured_data(path):
    assert store.open_truth(path) is None


def test_write_datacube__dask_blocks_become_the_shards(tmp_path):
    path = store.write_datacube(tmp_path / "a.zarr", cube().chunk(scan_y=3, scan_x=4))
    assert zarr.open_array(path / "intensity", mode="r").shards == (3, 4, 6, 8)
    np.testing.assert_array_equal(store.open_datacube(path).intensity.values, cube().intensity.values)


def test_write_datacube__refuses_blocks_that_are_not_shards(tmp_path):
    with pytest.raises(ValueError, match=r"'qy' is split into 2 chunks.*datacube\.chunk\(.*qy=-1, qx=-1\)"):
        store.write_datacube(tmp_path / "a.zarr", cube().chunk(qy=3))
    with pytest.raises(ValueError, match=r"'scan_x' is cut into \(3, 4\).*datacube\.chunk\("):
        store.write_datacube(tmp_path / "a.zarr", cube().chunk(scan_x=(3, 4)))
    with pytest.raises(
        ValueError, match=r"one shard of 4; rechunk first: datacube\.chunk\(scan_y=4, scan_x=4"
    ):
        store.write_datacube(
            tmp_path / "a.zarr", cube().chunk(scan_y=2, scan_x=4), layout=store.Layout((4, 4), (2, 2))
        )
    assert list(tmp_path.iterdir()) == []


def test_write_datacube__replaces_only_when_told(path):
    with pytest.raises(FileExistsError, match="--overwrite"):
        store.write_datacube(path, cube(seed=2))
    store.write_datacube(path, cube(seed=2), overwrite=True)
    np.testing.assert_array_equal(store.open_datacube(path).intensity.values, cube(seed=2).intensity.values)
    assert [p.name for p in path.parent.iterdir()] == ["a.zarr"]


def test_writer__refuses_part_of_a_block_and_another_dtype(tmp_path):
    writer = store.DatacubeWriter(
        tmp_path / "a.zarr", (5, 7, 6, 8), np.uint16, layout=store.Layout((4, 4), (2, 2))
    )
    with pytest.raises(ValueError, match=r"one whole shard.*\[4:5, 0:4\]"):
        writer.write_block(1, 0, np.zeros((4, 4, 6, 8), np.uint16))
    with pytest.raises(ValueError, match="cast them before"):
        writer.write_block(1, 0, np.zeros((1, 4, 6, 8), np.float32))


def test_writer__names_the_store_only_when_complete(tmp_path):
    writer = store.DatacubeWriter(tmp_path / "a.zarr", (5, 7, 6, 8), np.uint16)
    writer.write_block(0, 0, np.ones((*writer.blocks.shape(0, 0), 6, 8), np.uint16))
    with pytest.raises(ValueError, match="blocks are not written yet"):
        writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr.partial"]


def test_writer__a_block_of_zeros_counts_as_done(tmp_path):
    writer = store.DatacubeWriter(tmp_path / "a.zarr", (5, 7, 6, 8), np.uint16)
    writer.write_block(1, 1, np.zeros((*writer.blocks.shape(1, 1), 6, 8), np.uint16))
    assert store.DatacubeWriter(tmp_path / "a.zarr", (5, 7, 6, 8), np.uint16).done == {(1, 1)}


def test_writer__goes_on_after_an_error_and_ends_with_the_same_bytes(tmp_path):
    whole = cube().intensity.values
    options = {"shape": whole.shape, "dtype": whole.dtype, "attrs": {"title": "test"}}

    def fill(path, stop=None):
        with store.DatacubeWriter(path, **options) as writer:
            for n, block in enumerate(b for b in writer.blocks if b not in writer.done):
                if n == stop:
                    raise KeyboardInterrupt
                writer.write_block(*block, whole[writer.blocks.slices(*block)])
        return path

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "a.zarr", stop=3)
    assert not (tmp_path / "a.zarr").exists()
    fill(tmp_path / "a.zarr")
    fill(tmp_path / "b.zarr")
    assert [p.read_bytes() for p in shards(tmp_path / "a.zarr")] == [
        p.read_bytes() for p in shards(tmp_path / "b.zarr")
    ]


def test_writer__does_not_go_on_with_another_scan(tmp_path):
    for differ in ({"attrs": {"source_fingerprint": "2"}}, {"dtype": np.uint32}):
        options = {"shape": (2, 2, 6, 8), "dtype": np.uint16, "attrs": {"source_fingerprint": "1"}}
        store.DatacubeWriter(tmp_path / "a.zarr", **options)
        with pytest.raises(ValueError, match="beginning of another conversion"):
            store.DatacubeWriter(tmp_path / "a.zarr", **options | differ)
        shutil.rmtree(tmp_path / "a.zarr.partial")


KILLED = """
import sys, numpy as np
from fcunet import store
w = store.DatacubeWriter(sys.argv[1], (64, 64, 32, 32), np.uint16, layout=store.Layout((8, 8), (4, 4)))
print("start", flush=True)
for n, b in enumerate(x for x in w.blocks if x not in w.done):
    w.write_block(*b, np.random.default_rng(b).integers(0, 4000, (8, 8, 32, 32), dtype=np.uint16))
    print(n, flush=True)
w.close()
"""


def test_writer__survives_sigkill_in_the_middle_of_a_shard(tmp_path):
    path = tmp_path / "a.zarr"
    process = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "4":
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert not path.exists()
    subprocess.run([sys.executable, "-c", KILLED, path], check=True, capture_output=True)
    assert not list(path.rglob("*.partial"))
    for iy, ix in store.block_grid(path):
        expected = np.random.default_rng((iy, ix)).integers(0, 4000, (8, 8, 32, 32), dtype=np.uint16)
        np.testing.assert_array_equal(store.read_block(path, iy, ix), expected)


FULL = """
import resource, signal, sys, numpy as np
from fcunet import store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails with an error, as on a full disk
w = store.DatacubeWriter(sys.argv[1], (8, 8, 64, 64), np.uint16, layout=store.Layout((4, 4), (4, 4)))
w.write_block(0, 0, np.zeros((4, 4, 64, 64), np.uint16))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    w.write_block(0, 1, np.random.default_rng(0).integers(0, 60000, (4, 4, 64, 64), dtype=np.uint16))
except OSError as err:
    print(err)
print(w.done)
"""


def test_writer__a_full_disk_leaves_whole_blocks_and_says_so(tmp_path):
    path = tmp_path / "a.zarr"
    out = subprocess.run(
        [sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True
    ).stdout
    assert "no room for block (0, 1) of a.zarr" in out
    assert "run the same command again" in out
    assert "{(0, 0)}" in out
    assert not path.exists()
    assert not list(path.with_name("a.zarr.partial").rglob("*.partial"))


# ---- peaks


def peaks_store(tmp_path, **options):
    settings = {"scan_shape": (5, 7), "block_shape": (4, 4), "max_num_peaks": 3, "detector_shape": (6, 8)}
    return store.create_peaks(tmp_path / "peaks.zarr", **settings | options)


def block_values(shape, n=3, seed=0):
    rng = np.random.default_rng(seed)
    values = {}
    for name, variable in schema.PEAKS.items():
        if name != "status":
            values[name] = rng.random((*shape, n) if "peak" in variable.dims else shape) * 5
    return values


def test_peaks__a_new_store_is_empty_and_follows_the_schema(tmp_path):
    peaks = store.open_peaks(peaks_store(tmp_path, attrs={"intensity_meaning": "height"}))
    schema.check_variables(peaks, schema.PEAKS)
    assert np.isnan(peaks.peak_qy).all()
    assert (peaks.n_peaks == 0).all()
    assert (peaks.status == schema.STATUS_TODO).all()
    assert peaks.status.shape == (2, 2)
    assert peaks.n_peaks.dtype == np.int16
    assert peaks.truncated.dtype == bool
    assert peaks.attrs["intensity_meaning"] == "height"
    assert peaks.attrs["detector_shape"] == [6, 8]


def test_peaks__blocks_are_those_of_the_datacube_and_lazy(tmp_path):
    path = peaks_store(tmp_path)
    peaks = store.open_peaks(path)
    assert peaks.peak_qx.chunks == ((4, 1), (4, 3), (3,))
    assert store.block_grid(path) == store.block_grid(peaks) == store.BlockGrid((5, 7), (4, 4))


def test_peaks__a_block_comes_back_where_it_was_put(tmp_path):
    path = peaks_store(tmp_path)
    values = block_values((1, 3))
    store.write_peaks_block(path, 1, 1, values)
    store.set_status(path, 1, 1, schema.STATUS_DONE)
    peaks = store.open_peaks(path)
    np.testing.assert_array_equal(peaks.peak_sigma.values[4:, 4:], values["peak_sigma"].astype(np.float32))
    assert np.isnan(peaks.peak_sigma.values[:4]).all()
    np.testing.assert_array_equal(store.read_status(path), [[0, 0], [0, 1]])


def test_peaks__statuses_set_by_several_processes_do_not_collide(tmp_path):
    path = peaks_store(tmp_path)
    assert zarr.open_array(path / "status", mode="r").chunks == (1, 1)


def test_peaks__unaligned_writes_are_refused_and_change_nothing(tmp_path):
    path = peaks_store(tmp_path)
    with pytest.raises(ValueError, match=r"exactly one block; compute the scan region \[4:5, 4:7\]"):
        store.write_peaks_block(path, 1, 1, block_values((4, 4)))
    with pytest.raises(ValueError, match="lacks peak_qy"):
        store.write_peaks_block(path, 1, 1, {k: v for k, v in block_values((1, 3)).items() if k != "peak_qy"})
    assert np.isnan(store.open_peaks(path).peak_qx).all()


def test_peaks__a_block_written_twice_gives_the_same_bytes(tmp_path):
    path = peaks_store(tmp_path)
    store.write_peaks_block(path, 0, 0, block_values((4, 4)))
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    store.write_peaks_block(path, 0, 0, block_values((4, 4)))
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_peaks__an_existing_store_is_not_replaced_unasked(tmp_path):
    path = peaks_store(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        peaks_store(tmp_path)
    peaks_store(tmp_path, overwrite=True, max_num_peaks=9)
    assert store.open_peaks(path).sizes["peak"] == 9


def test_peaks__status_outside_the_grid_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no block \(2, 0\)"):
        store.set_status(peaks_store(tmp_path), 2, 0, schema.STATUS_DONE)


# ---- results


def results_tree(seed=0):
    rng = np.random.default_rng(seed)
    strain = {
        c: (schema.SCAN_DIMS, rng.normal(0, 1e-3, (4, 5)).astype(np.float32))
        for c in schema.STRAIN_COMPONENTS
    }
    strain["valid"] = (schema.SCAN_DIMS, rng.random((4, 5)) > 0.2)
    strain["e_xx"][1][0, 0] = np.nan
    lattice = {p: (schema.SCAN_DIMS, rng.random((4, 5))) for p in schema.LATTICE_PARAMETERS}
    lattice["n_indexed"] = (schema.SCAN_DIMS, rng.integers(0, 20, (4, 5)))
    coords = {"scan_y": store.coordinate("scan_y", np.arange(4), "nm")}
    tree = xr.DataTree.from_dict(
        {"strain": xr.Dataset(strain, coords), "lattice": xr.Dataset(lattice, coords)}
    )
    tree.attrs = provenance(
        weights_name="default", wall_time_s=np.float32(2.5), output=Path("/home/someone/out")
    )
    return tree


def test_results__come_back_with_labels_dtypes_and_provenance(tmp_path):
    store.write_results(tmp_path / "run" / "strain.zarr", results_tree())
    tree = store.open_results(tmp_path / "run")
    xr.testing.assert_equal(tree.strain.to_dataset(), results_tree().strain.to_dataset())
    assert tree.strain.valid.dtype == bool
    assert tree.lattice.n_indexed.dtype.kind == "i"
    assert tree.attrs["wall_time_s"] == 2.5
    assert tree.attrs["fcunet_format"] == "results"


def test_results__are_replaced_whole(tmp_path):
    store.write_results(tmp_path / "strain.zarr", results_tree(0))
    store.write_results(tmp_path / "strain.zarr", results_tree(1))
    tree = store.open_results(tmp_path / "strain.zarr")
    xr.testing.assert_equal(tree.strain.to_dataset(), results_tree(1).strain.to_dataset())
    assert [p.name for p in tmp_path.iterdir()] == ["strain.zarr"]


def test_results__a_failed_write_keeps_the_old_ones(tmp_path):
    store.write_results(tmp_path / "strain.zarr", results_tree(0))
    broken = results_tree(1)

    def fail(block):
        raise RuntimeError("computation failed")

    lazy = da.map_blocks(fail, da.zeros((4, 5)), dtype=float, meta=np.empty((0, 0)))
    broken["virtual"] = xr.DataTree(xr.Dataset({"bf": (schema.SCAN_DIMS, lazy)}))
    with pytest.raises(RuntimeError, match="computation failed"):
        store.write_results(tmp_path / "strain.zarr", broken)
    xr.testing.assert_equal(
        store.open_results(tmp_path / "strain.zarr").strain.to_dataset(), results_tree(0).strain.to_dataset()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["strain.zarr"]


def test_results__a_tree_without_lattice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks the group /lattice"):
        store.write_results(tmp_path / "strain.zarr", results_tree().drop_nodes("lattice"))


def test_results__a_folder_without_results_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="fcunet run"):
        store.open_results(tmp_path)


# ---- describe


def test_describe__datacube_peaks_results_and_run(tmp_path, path):
    facts = store.describe(path)
    assert (facts["scan"], facts["detector"], facts["dtype"]) == ("5 x 7", "6 x 8", "uint16")
    assert facts["scan_y"] == "5, step 0.5 nm"
    assert facts["scan_x"] == "7, not calibrated"
    run = tmp_path / "run"
    peaks = store.create_peaks(
        run / "peaks.zarr", scan_shape=(5, 7), block_shape=(4, 4), max_num_peaks=3, detector_shape=(6, 8)
    )
    store.set_status(peaks, 0, 1, schema.STATUS_DONE)
    assert store.describe(peaks)["blocks done"] == "1 of 4"
    store.write_results(run / "strain.zarr", results_tree())
    assert "strain (e_xx, e_xy, e_yy, theta, valid)" in store.describe(run)["strain groups"]
    with pytest.raises(ValueError, match="neither a store nor the folder of a run"):
        store.describe(tmp_path)


# ---- provenance


def test_provenance__has_no_paths_and_drops_what_is_unknown():
    facts = provenance(file=Path("/home/someone/a.dm4"), energy=float("nan"), nothing=None, n=np.int64(3))
    assert facts["file"] == "a.dm4"
    assert facts["n"] == 3
    assert not {"energy", "nothing"} & set(facts)
    assert {"fcunet_version", "created", "python", "zarr"} <= set(facts)


def test_fingerprint__tells_files_and_stores_apart(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_bytes(bytes(3_000_000))
    second.write_bytes(bytes(2_999_999) + b"\x01")
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(first) == fingerprint(shutil.copy(first, tmp_path / "3"))
    a = store.write_datacube(tmp_path / "a.zarr", cube(seed=1))
    before = fingerprint(a)
    store.write_datacube(a, cube(seed=1).assign_attrs(title="other"), overwrite=True)
    assert fingerprint(a) != before
    with pytest.raises(FileNotFoundError):
        fingerprint(tmp_path / "none")


def test_store__leaves_the_working_folder_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store.write_datacube("here.zarr", cube())
    assert os.listdir(tmp_path) == ["here.zarr"]

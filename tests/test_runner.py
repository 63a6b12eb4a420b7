import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import xarray as xr
import zarr
from flat_scan import draw_datacube

from fcunet import results, runner, schema, tiles
from fcunet.cluster import DASK_SETTINGS, connect
from fcunet.config import Config
from fcunet.lock import RunLock, RunLockedError
from fcunet.pipeline import compute_strain, find_peaks, fit_lattices
from fcunet.store import Layout, open_datacube, open_peaks, read_status, write_datacube
from fcunet.tiles import load_calibration

SETTINGS = {"method": "correlation", "device": "cpu", "max_num_peaks": 32}
SCAN = (12, 20)
BLOCK = (4, 4)


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "scan.zarr"
    return write_datacube(path, draw_datacube(SCAN), layout=Layout(BLOCK, (2, 2)))


@pytest.fixture(scope="module")
def client():
    with connect(workers=2, dashboard_address="127.0.0.1:0") as client:
        yield client


@pytest.fixture(scope="module")
def finished(store, client, tmp_path_factory):
    """An uninterrupted run, and its results."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_write_report", lambda out: out / "report.html")
        return out, runner.run(config(store, out), client=client, progress=False)


def config(store, out, **settings):
    return Config.load(store=store, out=out, **(SETTINGS | settings))


def stored_bytes(folder):
    """Every file of the arrays of a run: all but attributes, which hold the time and the job."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for name in ("peaks.zarr", "strain.zarr")
        for p in sorted(Path(folder, name).rglob("*"))
        if p.is_file() and p.name != "zarr.json"
    }


def assert_same_bytes(a, b):
    first, second = stored_bytes(a), stored_bytes(b)
    assert first.keys() == second.keys()
    assert [n for n in first if first[n] != second[n]] == []


def test_run__leaves_everything_in_the_run_directory(finished, small_run):
    out, tree = finished
    names = {p.name for p in out.iterdir()}
    assert {"peaks.zarr", "strain.zarr", "config.yaml", "run.log", "summary.json"} <= names
    assert {"report.html", "strain.png"} <= {p.name for p in small_run[1].iterdir()}
    assert "run.lock" not in names
    assert not [n for n in names if "partial" in n]
    assert set(tree.children) == {"strain", "lattice", "virtual", "diffraction"}
    schema.check_results(tree)


def test_run__finds_the_strain_that_was_drawn(finished):
    _, tree = finished
    e_xx = tree["strain/e_xx"].isel(scan_y=slice(1, None))
    slope = np.polyfit(np.arange(SCAN[1]), e_xx.median("scan_y"), 1)[0]
    # the spacing of the peaks shrinks by 2 % over the scan, so the crystal grows by as much
    assert slope * (SCAN[1] - 1) == pytest.approx(0.0204, abs=2e-3)


def test_run__knows_how_large_errors_are_in_this_scan_and_what_they_share_with_the_reference(finished):
    out, tree = finished
    strain, lattice = tree["strain"].to_dataset(), tree["lattice"].to_dataset()
    assert len(lattice.attrs["sigma_factor"]) == len(lattice.attrs["sigma_stated_px"]) > 0
    assert (strain["residual_ratio"].notnull() == strain["valid"]).mean() > 0.98
    # flat disks: nothing but noise, which no two patterns share
    assert float(strain["residual_ratio"].median()) == pytest.approx(1, abs=0.15)
    again = compute_strain(lattice, peaks=open_peaks(out / "peaks.zarr")).compute()
    for name in ("e_xx", "e_xy_std", "residual_ratio"):
        xr.testing.assert_allclose(strain[name], again[name], rtol=1e-4)


def test_run__gives_the_same_as_the_labelled_pipeline(finished, store):
    out, _ = finished
    peaks = open_peaks(out / "peaks.zarr").load()
    direct = find_peaks(
        open_datacube(store), "correlation", calibration=load_calibration(out / "peaks.zarr"),
        device="cpu", max_num_peaks=32,
    ).compute(scheduler="synchronous")  # fmt: skip
    for name in direct:
        np.testing.assert_array_equal(peaks[name], direct[name], err_msg=str(name))


def test_run__mean_and_maximum_pattern_are_those_of_the_scan(finished, store):
    _, tree = finished
    intensity = open_datacube(store)["intensity"].values
    np.testing.assert_array_equal(tree["diffraction/mean"], intensity.mean((0, 1)).astype(np.float32))
    np.testing.assert_array_equal(tree["diffraction/maximum"], intensity.max((0, 1)))


def test_run__keeps_provenance_without_paths(finished, store):
    out, tree = finished
    for attrs in (tree.attrs, open_peaks(out / "peaks.zarr").attrs):
        assert attrs["fcunet_version"]
        assert len(attrs["input_fingerprint"]) == 16
        assert json.loads(attrs["config_json"])["detection"]["method"] == "correlation"
        assert str(store.parent) not in json.dumps(attrs)
        assert str(Path.home()) not in json.dumps(attrs)
    assert tree.attrs["device"] == "CPU"


def test_run__sums_up_speed_and_memory(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert summary["patterns"] == summary["patterns_now"] == SCAN[0] * SCAN[1]
    assert summary["patterns_per_s"] > 0
    assert summary["n_blocks_failed"] == 0
    assert 1e8 < summary["peak_rss_worker"] < 1e9
    assert {"calibrate", "peaks", "analyse", "report", "total"} <= summary["seconds"].keys()


def test_run__a_second_time_does_no_block_again(finished, store, monkeypatch, capsys):
    out, tree = finished
    before = stored_bytes(out)
    monkeypatch.setattr(runner, "connect", lambda *a, **k: pytest.fail("a cluster was started for nothing"))
    again = runner.run(config(store, out))
    xr.testing.assert_equal(again, tree)
    assert stored_bytes(out) == before


def test_run__refuses_to_mix_settings_and_offers_two_ways_out(finished, store, client):
    out, _ = finished
    with pytest.raises(ValueError, match=r"detection settings.*--restart.*--out"):
        runner.run(config(store, out, corr_power=0.5), client=client, progress=False)
    with pytest.raises(ValueError, match="the region"):
        runner.run(config(store, out, region="0:4,0:8"), client=client, progress=False)


def test_run__refuses_to_mix_scans(finished, client, tmp_path):
    other = write_datacube(tmp_path / "scan.zarr", draw_datacube(SCAN, seed=1), layout=Layout(BLOCK, (2, 2)))
    with pytest.raises(ValueError, match="differs in the scan"):
        runner.run(config(other, finished[0]), client=client, progress=False)


def test_run__leaves_no_part_of_a_chunk_that_a_lost_node_was_writing(store, client, tmp_path, monkeypatch):
    out, run_blocks = tmp_path / "run", runner._run_blocks

    def lose_a_node(plan, *args):
        facts = run_blocks(plan, *args)
        (plan.peaks / "peak_sigma/c/0/0/0.597e.partial").write_bytes(b"half")
        return facts

    monkeypatch.setattr(runner, "_run_blocks", lose_a_node)
    runner.run(config(store, out, region="0:4,0:4"), client=client, progress=False)
    assert (out / "peaks.zarr/peak_sigma/c/0/0/0").is_file()
    assert not list(out.rglob("*.partial"))


def test_run__does_not_continue_what_an_older_version_began(finished, store, client, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "peaks.zarr" / "shared_dilation_std")
    again = runner.run(config(store, out), client=client, progress=False)  # complete: nothing to continue
    assert again["strain/valid"].any()
    status = zarr.open_group(out / "peaks.zarr")["status"]
    status[0, 0] = schema.STATUS_TODO
    with pytest.raises(ValueError, match=r"older fcunet.*lack shared_dilation_std.*--restart"):
        runner.run(config(store, out), client=client, progress=False)


def test_run__settings_of_strain_batch_and_workers_may_change(finished, store):
    out, tree = finished
    again = runner.run(config(store, out, batch=7, workers=3, reference="1:3,0:4"), progress=False)
    np.testing.assert_allclose(again["strain/e_xx"][1:3, :4].median(), 0, atol=1e-6)
    runner.run(config(store, out), progress=False)


def test_run__restart_begins_anew(store, client, tmp_path):
    out = tmp_path / "run"
    (out / "peaks.zarr").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    tree = runner.run(config(store, out, region="0:4,0:4"), restart=True, client=client, progress=False)
    assert tree["strain/valid"].shape == (4, 4)
    assert (out / "notes.txt").read_text() == "mine"


def test_run__a_region_gives_the_part_of_the_whole(finished, store, client, tmp_path):
    whole = open_peaks(finished[0] / "peaks.zarr").isel(scan_y=slice(2, 9), scan_x=slice(3, 14)).load()
    # the calibration is measured within the region, so settings that come from it are given
    calibration = load_calibration(finished[0] / "peaks.zarr")
    given = {"min_peak_spacing": calibration.min_peak_spacing, "edge_boundary": calibration.edge_boundary}
    runner.run(config(store, tmp_path / "run", region="2:9,3:14", **given), client=client, progress=False)
    part = open_peaks(tmp_path / "run" / "peaks.zarr").load()
    assert part.sizes["scan_y"] == 7
    for name in ("scan_x", "peak_qy", "peak_qx", "n_peaks", "total"):
        np.testing.assert_array_equal(part[name], whole[name], err_msg=name)


def test_run__isolates_a_shard_that_does_not_decode(store, client, tmp_path, capsys):
    damaged = tmp_path / "scan.zarr"
    subprocess.run(["cp", "-r", str(store), str(damaged)], check=True)
    shard = damaged / "intensity" / "c" / "1" / "2" / "0" / "0"
    good = shard.read_bytes()
    shard.write_bytes(good[: len(good) // 2])
    out = tmp_path / "run"
    tree = runner.run(config(damaged, out), client=client)
    assert tree.attrs["n_blocks_failed"] == 1
    assert "1 of 15 blocks" in capsys.readouterr().out
    status = read_status(out / "peaks.zarr")
    assert status[1, 2] == schema.STATUS_FAILED
    assert (status == schema.STATUS_DONE).sum() == 14
    assert np.isnan(tree["strain/e_xx"][4:8, 8:12]).all()
    assert tree["strain/valid"].sum() == SCAN[0] * SCAN[1] - 16 - 1
    failed = json.loads((out / "summary.json").read_text())["failed_blocks"]
    assert failed[0]["block"] == [1, 2]
    assert "decode" in failed[0]["reason"]
    # the file comes back from a backup, and the same command completes the map
    shard.write_bytes(good)
    again = runner.run(config(damaged, out), client=client, progress=False)
    assert again.attrs["n_blocks_failed"] == 0
    intensity = open_datacube(store)["intensity"].values
    np.testing.assert_array_equal(again["diffraction/mean"], intensity.mean((0, 1)).astype(np.float32))
    np.testing.assert_array_equal(again["diffraction/maximum"], intensity.max((0, 1)))
    assert again["strain/valid"].sum() == SCAN[0] * SCAN[1] - 1


def test_run__is_refused_while_another_holds_the_directory(finished, store):
    with RunLock(finished[0]), pytest.raises(RunLockedError, match="in use by process"):
        runner.run(config(store, finished[0]), progress=False)


def test_run__says_what_is_wrong_before_anything_is_written(store, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="no datacube was given"):
        runner.run(Config.load(out=out))
    with pytest.raises(FileNotFoundError):
        runner.run(config(tmp_path / "none.zarr", out))
    with pytest.raises(ValueError, match="beyond the scan of 12 x 20"):
        runner.run(config(store, out, region="0:4,0:99"))
    with pytest.raises(FileNotFoundError, match="no weights"):
        runner.run(config(store, out, method="fcunet", weights="nothing"))
    assert not out.exists()


def test_plan__says_what_would_be_done_and_writes_nothing(store, tmp_path):
    text = "\n".join(runner.plan(config(store, tmp_path / "run")))
    assert "12 x 20 scan" in text
    assert "15 blocks of 4 x 4" in text
    assert "per worker, at most" in text  # from a trial with one block
    assert "time      about" in text
    assert "output" in text
    assert not (tmp_path / "run").exists()


def test_rerun_strain__changes_the_reference_and_keeps_the_peaks(finished, capsys):
    out, tree = finished
    peaks = {k: v for k, v in stored_bytes(out).items() if k.startswith("peaks")}
    new = runner.rerun_strain(out, reference="1:12,0:2")
    assert abs(float(new["strain/e_xx"][1:, :2].median())) < 1e-6
    assert {k: v for k, v in stored_bytes(out).items() if k.startswith("peaks")} == peaks
    assert Config.load(out / "config.yaml").strain.reference == (1, 12, 0, 2)
    back = runner.rerun_strain(out / "peaks.zarr", reference="median")
    xr.testing.assert_equal(back["strain"].dataset, tree["strain"].dataset)


def test_rerun_strain__without_a_run_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="fcunet run"):
        runner.rerun_strain(tmp_path)


# a run in a process of its own, to be killed; it can be made to take some time for each block
_SCRIPT = """
import sys, time
from fcunet import runner, tiles
from fcunet.config import Config

def slow_tile(job, iy, ix):
    time.sleep(float(sys.argv[2]))
    return tiles.process_tile(job, iy, ix)

if __name__ == "__main__":
    runner._write_report = lambda out: out / "report.html"
    tiles.submitted = slow_tile
    try:
        runner.run(Config.load(sys.argv[1]))
    except runner.RunStopped as err:
        sys.exit(f"{err}")
"""


def start(store, out, tmp_path, wait=0.0):
    script, settings = tmp_path / "script.py", tmp_path / "config.yaml"
    script.write_text(_SCRIPT)
    chosen = config(store, out, workers=1, dashboard_address="127.0.0.1:0")
    settings.write_text(chosen.to_yaml())
    return subprocess.Popen(
        [sys.executable, str(script), str(settings), str(wait)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_blocks(process, out, n):
    """Until `n` blocks are done; False if the run ended before."""
    while process.poll() is None:
        if (out / "peaks.zarr" / "status").exists() and (read_status(out / "peaks.zarr") == 1).sum() >= n:
            return True
        time.sleep(0.005)
    return False


@pytest.mark.parametrize("kills", [pytest.param(1), pytest.param(12, marks=pytest.mark.slow)])
def test_run__killed_at_any_moment_ends_with_the_same_bytes(kills, finished, store, client, tmp_path):
    out = tmp_path / "run"
    rng = np.random.default_rng(kills)
    goals = np.sort(rng.integers(0, 15, kills))
    for goal in goals:
        process = start(store, out, tmp_path)
        reached = wait_for_blocks(process, out, goal)
        time.sleep(rng.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL) if reached else None
        process.communicate()
    runner.run(config(store, out), client=client, progress=False)
    assert_same_bytes(out, finished[0])
    assert not list(out.rglob("*.partial*"))


@pytest.mark.slow
def test_run__sigterm_drains_and_says_how_to_go_on(finished, store, client, tmp_path):
    out = tmp_path / "run"
    process = start(store, out, tmp_path, wait=0.3)
    assert wait_for_blocks(process, out, 1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"continues: fcunet run {store} --out {out}" in errors
    done = int((read_status(out / "peaks.zarr") == 1).sum())
    assert f"stopped with {done} of 15 blocks done" in errors
    assert not (out / "run.lock").exists()
    runner.run(config(store, out), client=client, progress=False)
    assert_same_bytes(out, finished[0])


@pytest.mark.slow
def test_run__ctrl_c_to_the_whole_group_drains_too(finished, store, tmp_path):
    out = tmp_path / "run"
    process = start(store, out, tmp_path, wait=0.3)
    assert wait_for_blocks(process, out, 1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "continues: fcunet run" in errors
    assert "Traceback" not in errors


def deadly_tile(job, iy, ix):
    if (iy, ix) == (1, 1):
        os._exit(1)
    return tiles.process_tile(job, iy, ix)


@pytest.mark.slow
def test_run__gives_up_only_the_tile_that_kills_its_workers(store, tmp_path, monkeypatch):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(tiles, "submitted", deadly_tile)
    monkeypatch.setitem(DASK_SETTINGS, "distributed.scheduler.allowed-failures", 1)
    out = tmp_path / "run"
    tree = runner.run(config(store, out, workers=2, dashboard_address="127.0.0.1:0"), progress=False)
    status = read_status(out / "peaks.zarr")
    assert np.argwhere(status == schema.STATUS_FAILED).tolist() == [[1, 1]]
    assert tree.attrs["n_blocks_failed"] == 1
    assert "died" in (out / "summary.json").read_text()


def test_computed__does_not_depend_on_the_bands(small_run, monkeypatch):
    peaks = open_peaks(small_run[1] / "peaks.zarr").chunk(scan_y=2, scan_x=5)
    lazy = fit_lattices(peaks, max_lattices=2)
    monkeypatch.setattr(results, "_BAND", 30)  # two rows of blocks, and what is left
    for banded, at_once in zip(results._computed(lazy), lazy, strict=True):
        xr.testing.assert_identical(banded, at_once.compute())

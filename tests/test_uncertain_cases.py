"""What a run makes of scans that are empty, poor, odd or damaged: NaN or a clear error, never nonsense."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr
from flat_scan import draw_datacube

from fcunet import runner, schema
from fcunet.cluster import connect
from fcunet.config import Config
from fcunet.emd import py4dstem_strain
from fcunet.store import Layout, open_peaks, read_status, write_datacube

METHODS = ("correlation", pytest.param("fcunet", marks=pytest.mark.slow))  # seconds each


@pytest.fixture(scope="module")
def client():
    with connect(workers=1, dashboard_address="127.0.0.1:0") as client:
        yield client


@pytest.fixture
def run(tmp_path, client, blank_pictures, request):
    """Write a dataset and run it, without a report unless one is asked for; returns the results."""

    def write_and_run(datacube, method="correlation", *, layout=None, damage=None, report=False, **settings):
        if not report:
            request.getfixturevalue("no_report")
        store = write_datacube(tmp_path / "scan.zarr", datacube, layout=layout)
        if damage is not None:
            damage(store)
        config = Config.load(store=store, out=tmp_path / "run", method=method, device="cpu", **settings)
        return runner.run(config, client=client, progress=False)

    return write_and_run


def assert_no_lattice_anywhere(tree):
    assert not tree["strain/valid"].values.any()
    for component in schema.STRAIN_COMPONENTS:
        assert np.isnan(tree[f"strain/{component}"].values).all()
    assert (tree["lattice/n_indexed"].values == 0).all()
    assert tree["strain"].attrs["reference"] == "none, for no position has a lattice"
    assert "g1_ref_px" not in tree["strain"].attrs  # nothing is said of what was never measured
    assert "basis_px" not in tree["lattice"].attrs
    assert np.isnan(py4dstem_strain(tree)["e_xx"]).all()


@pytest.mark.parametrize("method", METHODS)
def test_one_disk__is_no_lattice(run, method):
    datacube = draw_datacube((2, 4))
    probe = datacube["probe"].values
    rng = np.random.default_rng(1)
    datacube["intensity"].values[:] = rng.poisson(100 * probe, datacube["intensity"].shape)
    assert_no_lattice_anywhere(run(datacube, method, report=method == "correlation"))


def test_empty_patterns__stop_the_run_with_a_sentence(run):
    datacube = draw_datacube((2, 4))
    datacube["intensity"].values[:] = 0
    with pytest.raises(ValueError, match="no counts|empty|without counts"):
        run(datacube)


@pytest.mark.parametrize("method", METHODS)
def test_one_empty_pattern__is_nan_among_good_ones(run, method):
    tree = run(draw_datacube((2, 6)), method)  # position (0, 0) is empty
    assert not tree["strain/valid"].values[0, 0]
    assert tree["strain/valid"].values.ravel()[1:].all()


def test_zero_probe__is_refused(run):
    datacube = draw_datacube((2, 4))
    datacube["probe"].values[:] = 0
    with pytest.raises(ValueError, match="--no-use-stored-probe"):
        run(datacube)


def test_zero_probe__can_be_set_aside(run):
    datacube = draw_datacube((2, 4))
    datacube["probe"].values[:] = 0
    assert run(datacube, use_stored_probe=False)["strain/valid"].values.ravel()[1:].all()


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_float_data__costs_its_own_pixels_only(run, method):
    datacube = draw_datacube((2, 6), dtype=np.float32)
    datacube["intensity"].values[1, 2, 10:12, 10:12] = np.nan
    datacube["intensity"].values[1, 3] = np.nan
    tree = run(datacube, method)
    assert tree["strain/valid"].values[1, 2]
    assert not tree["strain/valid"].values[1, 3]
    assert np.isfinite(tree["diffraction/mean"].values).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("scan", "frame"), [((1, 6), 64), ((6, 1), 64), ((2, 3), 61)])
def test_one_row_one_column_or_an_odd_detector__goes_through(run, method, scan, frame):
    tree = run(draw_datacube(scan, frame), method, report=method == "correlation" and scan[0] == 1)
    valid = tree["strain/valid"].values.ravel()
    assert valid[1:].all()
    assert np.abs(tree["strain/e_xx"].values.ravel()[1:]).max() < 0.05


def test_a_shard_that_does_not_decode__leaves_the_rest_of_the_map(run, tmp_path):
    def damage(store):
        shard = store / "intensity" / "c" / "0" / "1" / "0" / "0"
        raw = bytearray(shard.read_bytes())
        raw[: len(raw) // 2] = b"\xff" * (len(raw) // 2)
        shard.write_bytes(bytes(raw))

    tree = run(draw_datacube((4, 8)), layout=Layout((4, 4), (2, 2)), damage=damage)
    valid = tree["strain/valid"].values
    assert not valid[:, 4:].any()
    assert valid[:, :4].sum() == 15
    assert tree.attrs["n_blocks_failed"] == 1
    status = open_peaks(tmp_path / "run" / "peaks.zarr")["status"].values
    assert status.tolist() == [[schema.STATUS_DONE, schema.STATUS_FAILED]]
    assert "intensity/c/0/1" in json.dumps(json.loads((tmp_path / "run" / "summary.json").read_text()))


def test_a_store_of_a_newer_version__asks_for_an_upgrade(run):
    def damage(store):
        zarr.open_group(store, mode="r+").attrs["fcunet_format_version"] = 99

    with pytest.raises(ValueError, match="pip install --upgrade fcunet"):
        run(draw_datacube((2, 4)), damage=damage)


@pytest.mark.slow
def test_a_full_disk__says_so_and_leaves_the_scan_alone(tmp_path):
    """A file-size limit of the operating system stands for the full disk: the same OSError path."""
    store = write_datacube(tmp_path / "scan.zarr", draw_datacube((4, 8)))
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    config = Config.load(store=store, out=tmp_path / "run", method="correlation", workers=1)
    code = f"""
import resource, signal, sys
from fcunet import runner
from fcunet.config import Config
if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
    runner.run(Config.load({str(tmp_path / "config.yaml")!r}))
"""
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    script = tmp_path / "run.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode != 0
    assert "File too large" in done.stderr or "disk" in done.stderr
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "run" / "strain.zarr").exists()
    assert (read_status(tmp_path / "run" / "peaks.zarr") == schema.STATUS_TODO).all()
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert runner.plan(config)  # nothing left that stands in the way

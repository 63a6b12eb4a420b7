"""What a run is predicted to take, held against a run."""

import dataclasses
import json

import numpy as np
import pytest
from flat_scan import draw_datacube

from fcunet import runner
from fcunet.calibrate import calibrate
from fcunet.cluster import WorkerPlan, plan_workers
from fcunet.config import Config
from fcunet.doctor import examine_scan
from fcunet.layout import Layout
from fcunet.memory import peak_rss, reset_peak_rss, rss
from fcunet.predict import MARGIN, Measurement, MeasurementError, Prediction, predict
from fcunet.store import open_results, write_datacube

GIB = 2**30
MEASURED = Measurement(GIB // 2, GIB // 4, 1e-3, 8e-3, 1e-3, 300.0, 40.0, "CPU", 0, 0)
WORKERS = WorkerPlan(count=2, threads=3, memory=2 * GIB, gpu=False, local=True)
PREDICTED = Prediction(MEASURED, WORKERS, 90_000, 100, 256 * 256, 2, 128, 100 * GIB)


def test_prediction__counts_one_block_per_thread():
    assert PREDICTED.worker_bytes == GIB // 2 + 3 * GIB // 4
    assert PREDICTED.worker_bound == MARGIN * PREDICTED.worker_bytes


def test_prediction__adds_the_stages_of_a_core_and_multiplies_by_the_cores():
    assert PREDICTED.rate(MEASURED) == pytest.approx(0.9 * 2 * 3 / 10e-3)
    assert PREDICTED.seconds > 90_000 / PREDICTED.rate(MEASURED)


def test_prediction__lets_a_gpu_compute_while_others_read():
    on_gpu = dataclasses.replace(
        PREDICTED,
        workers=dataclasses.replace(WORKERS, gpu=True, count=1),
        measured=dataclasses.replace(MEASURED, device="GPU", read_s=5e-3, detect_s=8e-3),
    )
    assert on_gpu.rate(on_gpu.measured) == pytest.approx(
        0.9 / 8e-3
    )  # three threads would read 600 per second


def test_prediction__counts_the_second_opinion_in():
    slower = dataclasses.replace(
        MEASURED, detect_s=28e-3, block_bytes=GIB // 2, stored_bytes=100.0, peaks=7.0
    )
    both = dataclasses.replace(PREDICTED, second=slower)
    alone = dataclasses.replace(PREDICTED, measured=slower)
    fixed = PREDICTED.seconds + alone.seconds - both.seconds  # workers start once
    assert 0 < fixed < 60
    assert both.peaks_bytes == PREDICTED.peaks_bytes + alone.peaks_bytes
    assert both.results_bytes > PREDICTED.results_bytes
    assert both.worker_bytes == alone.worker_bytes  # one after the other in the same workers
    text = "\n".join(both.lines())
    assert f"second    counted in: the same patterns at {0.9 * 6 / 30e-3:.0f}/s" in text
    assert "40 and 7 peaks" in text


def test_prediction__does_not_take_the_time_of_a_cpu_for_that_of_a_gpu():
    on_gpu = dataclasses.replace(PREDICTED, workers=dataclasses.replace(WORKERS, gpu=True))
    assert "not known" in "\n".join(on_gpu.lines())


def test_prediction__refuses_what_cannot_fit_with_the_numbers():
    assert PREDICTED.problems == []
    tight = dataclasses.replace(PREDICTED, workers=dataclasses.replace(WORKERS, memory=GIB), disk_free=2**20)
    memory, disk = tight.problems
    assert "1.25 GiB" in memory
    assert "may use 1.00 GiB" in memory
    assert "--workers 1" in memory
    assert "1.0 MiB are free" in disk


def test_plan_workers__knows_profiles_and_this_machine(tmp_path):
    profile = tmp_path / "site.yaml"
    profile.write_text(
        "jobqueue:\n  slurm:\n    cores: 16\n    processes: 4\n    memory: 240GiB\n"
        "fcunet:\n  workers: 8\n  gpus: 4\n"
    )
    assert plan_workers(str(profile)) == WorkerPlan(8, 4, 60 * GIB, gpu=True, local=False)
    here = plan_workers("local", 1, device="cpu")
    assert here.count == 1
    assert here.threads >= 1
    assert not here.gpu


def test_peak_rss__sees_memory_that_was_given_back():
    reset = reset_peak_rss()
    before = rss()
    block = np.ones(50 * 2**20 // 8)
    del block
    if reset:
        assert 40 * 2**20 < peak_rss() - before < 80 * 2**20


def test_predict__says_that_the_trial_failed(tmp_path):
    store = write_datacube(tmp_path / "scan.zarr", draw_datacube())
    for shard in (store / "intensity" / "c").rglob("0"):
        if shard.is_file():
            shard.write_bytes(shard.read_bytes()[:-100])
    config = Config.load(store=store, method="correlation", device="cpu")
    with pytest.raises(MeasurementError, match="cannot be read"):
        predict(config, calibration=calibrate(draw_datacube()))


def test_doctor__says_what_a_run_over_a_scan_will_take(tmp_path, monkeypatch):
    monkeypatch.setattr("fcunet.predict.predict", lambda config: PREDICTED)
    (good,) = examine_scan(tmp_path / "scan.zarr")
    assert good.ok
    for word in ("memory 1.25 GiB per worker", "time about", "output"):
        assert word in good.finding
    full = dataclasses.replace(PREDICTED, disk_free=2**20)
    monkeypatch.setattr("fcunet.predict.predict", lambda config: full)
    (bad,) = examine_scan(tmp_path / "scan.zarr")
    assert not bad.ok
    assert "1.0 MiB are free" in bad.advice


def test_doctor__says_that_there_is_no_such_scan(tmp_path):
    (missing,) = examine_scan(tmp_path / "scan.zarr")
    assert not missing.ok
    assert "scan.zarr" in missing.finding


@pytest.mark.slow
def test_predict__foretells_the_memory_of_a_worker_and_the_output_within_a_quarter(tmp_path):
    scan = draw_datacube((8, 16), frame=128)
    scan = scan.isel(scan_y=np.arange(64) % 7 + 1, scan_x=np.arange(64) % 16)  # two blocks of 64 MiB
    scan = scan.assign_coords(scan_y=np.arange(64.0), scan_x=np.arange(64.0))
    for dim in ("scan_y", "scan_x"):
        scan[dim].attrs["units"] = "nm"
    store = write_datacube(tmp_path / "scan.zarr", scan, layout=Layout((32, 64), (8, 8)))
    config = Config.load(store=store, out=tmp_path / "run", method="correlation", device="cpu", workers=1)
    predicted = predict(config, seconds=3.0)
    runner.run(config, progress=False)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["peak_rss_worker"] == pytest.approx(predicted.worker_bytes, rel=0.25)
    assert summary["peak_rss_worker"] < predicted.worker_bound
    written = sum(f.stat().st_size for f in (tmp_path / "run" / "peaks.zarr").rglob("*") if f.is_file())
    assert written < 1.25 * predicted.peaks_bytes
    assert open_results(tmp_path / "run")["strain/e_xx"].notnull().all()


@pytest.mark.slow
def test_plan__tries_the_second_opinion_as_well(tmp_path):
    store = write_datacube(tmp_path / "scan.zarr", draw_datacube())
    config = Config.load(
        store=store, out=tmp_path / "run", method="correlation", second_opinion="cepstral", device="cpu"
    )
    text = "\n".join(runner.plan(config))
    assert "second    counted in" in text
    assert " and " in text.partition("output")[2]  # the peaks per pattern of both
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_predict__tries_with_the_template_of_the_region(tmp_path):
    store = write_datacube(tmp_path / "scan.zarr", draw_datacube())
    known = calibrate(draw_datacube())
    dark = dataclasses.replace(
        known, templates=np.zeros((1, 64, 64), np.float32), template_index=np.zeros((6, 10), np.int64)
    )
    config = Config.load(store=store, method="correlation", device="cpu")
    # the probe itself is sound: only the template of the region can be refused
    with pytest.raises(MeasurementError, match="probe"):
        predict(config, calibration=dark)

import numpy as np
import pytest
import torch
from flat_scan import FRAME, SPACING, draw_datacube
from hypothesis import given, settings
from hypothesis import strategies as st

from fcunet import blocks
from fcunet.blocks import build_detector, pick_device, process_block, repair, virtual_signals, weighted_sums
from fcunet.calibrate import calibrate
from fcunet.config import DetectionConfig
from fcunet.staging import Staging

CONFIG = DetectionConfig(method="correlation", device="cpu", max_num_peaks=32)


@pytest.fixture(scope="module")
def scan():
    return draw_datacube()


@pytest.fixture(scope="module")
def chunk(scan):
    return scan["intensity"].values


@pytest.fixture(scope="module")
def calibration(scan):
    return calibrate(scan)


@pytest.fixture(scope="module")
def whole(chunk, calibration):
    return process_block(chunk, CONFIG, calibration)


def assert_same(a, b, names):
    for name in names:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_process_block__finds_every_disk_of_every_pattern(whole):
    assert (whole["n_peaks"].ravel()[1:] == 25).all()


def test_process_block__puts_the_disks_where_they_were_drawn(whole):
    middle = FRAME / 2 - 0.3
    qy = whole["peak_qy"][1, 0]
    sites = middle + SPACING * np.rint((qy - middle) / SPACING)
    # about 600 electrons per disk of radius 3 px: sqrt(pi R s / N) is 0.08 px
    assert np.nanstd(qy - sites) < 0.15


def test_process_block__pads_with_nan_brightest_first(whole):
    height = whole["peak_intensity"][1, 1]
    assert np.isnan(height[25:]).all()
    assert (np.diff(height[:25]) <= 0).all()


def test_process_block__gives_an_empty_pattern_no_peaks(whole):
    assert whole["n_peaks"][0, 0] == 0
    assert np.isnan(whole["peak_qy"][0, 0]).all()
    assert whole["total"][0, 0] == 0
    assert np.isnan(whole["com_qy"][0, 0])


def test_process_block__sums_and_maxima_are_exact(whole, chunk):
    np.testing.assert_array_equal(whole["sum"], chunk.sum((0, 1)))
    np.testing.assert_array_equal(whole["maximum"], chunk.max((0, 1)))
    np.testing.assert_array_equal(whole["total"], chunk.sum((2, 3)))
    np.testing.assert_allclose(whole["bf"] + whole["adf"], whole["total"], rtol=1e-6)


@settings(max_examples=8)
@given(size=st.integers(1, 70))
def test_process_block__does_not_depend_on_the_batch_size(size, chunk, calibration, whole):
    other = process_block(chunk, CONFIG.model_copy(update={"batch": size}), calibration)
    assert_same(other, whole, whole)


@settings(max_examples=8)
@given(y=st.integers(0, 5), x=st.integers(0, 9))
def test_process_block__does_not_depend_on_the_cut(y, x, chunk, calibration, whole):
    part = process_block(chunk[y:, x:], CONFIG, calibration)
    names = [n for n in whole if n not in ("sum", "maximum")]
    assert_same(part, {n: whole[n][y:, x:] for n in names}, names)


def test_process_block__does_not_depend_on_the_batch_size_for_floats(chunk, calibration):
    real = (chunk * np.float32(0.37))[:3]
    a = process_block(real, CONFIG.model_copy(update={"batch": 4}), calibration)
    b = process_block(real, CONFIG.model_copy(update={"batch": 7}), calibration)
    assert_same(a, b, a)


def test_process_block__of_the_network_does_not_depend_on_the_cut(chunk, calibration):
    network = DetectionConfig(device="cpu", max_num_peaks=32)
    whole = process_block(chunk[:3], network, calibration)
    part = process_block(chunk[1:3, 3:], network, calibration)
    names = [n for n in whole if n not in ("sum", "maximum")]
    assert_same(part, {n: whole[n][1:, 3:] for n in names}, names)
    assert (part["n_peaks"] > 9).all()


def test_process_block__a_pattern_of_nan_is_nan_and_spoils_no_other(chunk, calibration, whole):
    real = chunk.astype(np.float32)
    real[2, 3] = np.nan
    out = process_block(real, CONFIG, calibration)
    assert out["n_peaks"][2, 3] == 0
    assert np.isnan(out["total"][2, 3])
    np.testing.assert_array_equal(out["peak_qx"][2, 4], whole["peak_qx"][2, 4])
    np.testing.assert_allclose(out["sum"], whole["sum"] - chunk[2, 3])


def test_process_block__one_nan_pixel_costs_nothing_but_itself(chunk, calibration, whole):
    real = chunk.astype(np.float32)
    real[2, 3, 5, 5] = np.nan
    out = process_block(real, CONFIG, calibration)
    assert out["n_peaks"][2, 3] == 25
    assert np.isfinite(out["sum"]).all()


def test_process_block__leaves_its_input_alone(chunk, calibration):
    before = chunk.copy()
    process_block(chunk, CONFIG, calibration)
    np.testing.assert_array_equal(chunk, before)


def test_process_block__halves_the_batch_when_memory_runs_out(monkeypatch, chunk, calibration, whole):
    sizes = []

    def scarce(config, calibration, device, **kwargs):
        detector = build_detector(config, calibration, device, **kwargs)

        def detect(patterns):
            sizes.append(len(patterns))
            if len(patterns) > 8:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return detector(patterns)

        return detect

    monkeypatch.setattr(blocks, "build_detector", scarce)
    monkeypatch.setattr(blocks, "_DETECTORS", type(blocks._DETECTORS)())
    monkeypatch.setattr(blocks, "_BATCH_LIMIT", {})
    out = process_block(chunk, CONFIG, calibration)
    process_block(chunk[:2], CONFIG, calibration)
    assert sizes[:4] == [64, 32, 16, 8]
    assert max(sizes[4:]) == 8  # remembered by the process
    assert_same(out, whole, whole)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_process_block__sent_one_batch_ahead_gives_the_same(size, monkeypatch, chunk, calibration, whole):
    monkeypatch.setattr(blocks, "_STAGED", {"cpu"})
    out = process_block(chunk, CONFIG.model_copy(update={"batch": size}), calibration)
    assert_same(out, whole, whole)


def test_process_block__sent_ahead_halves_the_batch_as_well(monkeypatch, chunk, calibration, whole):
    monkeypatch.setattr(blocks, "_STAGED", {"cpu"})
    test_process_block__halves_the_batch_when_memory_runs_out(monkeypatch, chunk, calibration, whole)


@pytest.mark.gpu
def test_process_block__on_a_gpu_does_not_depend_on_what_is_sent_ahead(monkeypatch, chunk, calibration):
    config = CONFIG.model_copy(update={"device": "cuda", "batch": 8})
    ahead = process_block(chunk, config, calibration)
    monkeypatch.setattr(blocks, "_STAGED", set())
    at_once = process_block(chunk, config, calibration)
    assert_same(at_once, ahead, ahead.keys() - {"peak_sigma"})
    # the last bit of a sum over the pixels of a disk depends on where a pattern lies in the memory of a GPU
    np.testing.assert_allclose(at_once["peak_sigma"], ahead["peak_sigma"], rtol=2e-7)


def test_staging__keeps_a_batch_apart_from_those_sent_after_it():
    patterns = np.arange(40, dtype=np.uint16).reshape(10, 2, 2)
    staging = Staging(patterns, torch.device("cpu"))
    parts = [(0, 3, 6), (3, 6, 9), (6, 8, 10), (8, 10, 10), (2, 4, 6)]  # two of them other than was foreseen
    taken = [staging.take(*part) for part in parts]
    for (start, stop, _), batch in zip(parts, taken, strict=True):
        np.testing.assert_array_equal(batch.numpy(), patterns[start:stop])


def test_process_block__names_a_calibration_of_another_detector(chunk, calibration):
    with pytest.raises(ValueError, match="calibration has shape .*calibrate"):
        process_block(chunk[..., :-1], CONFIG, calibration)


def test_process_block__names_a_block_of_wrong_dimensions(chunk, calibration):
    with pytest.raises(ValueError, match="scan_y, scan_x, qy, qx"):
        process_block(chunk[0], CONFIG, calibration)


def test_repair__takes_the_median_of_the_nearest_good_pixels():
    patterns = torch.arange(25.0).reshape(1, 5, 5).repeat(2, 1, 1)
    patterns[:, 2, 2] = 999
    bad = np.zeros((5, 5), bool)
    bad[2, 2] = True
    assert repair(patterns, bad).all()
    assert (patterns[:, 2, 2] == 12).all()


def test_repair__reaches_across_a_gap_between_chips():
    patterns = torch.full((1, 12, 12), 7.0)
    bad = np.zeros((12, 12), bool)
    bad[4:8] = True
    patterns[:, 4:8] = 0
    repair(patterns, bad)
    assert (patterns == 7).all()


def test_repair__says_which_patterns_hold_nothing():
    patterns = torch.ones(3, 4, 4)
    patterns[1] = torch.nan
    good = repair(patterns, np.zeros((4, 4), bool))
    assert good.tolist() == [True, False, True]
    assert torch.isfinite(patterns).all()


def test_virtual_signals__follow_the_beam():
    patterns = torch.zeros(2, 20, 24)
    patterns[0, 5, 6] = patterns[1, 15, 17] = 10
    patterns[:, 0, 0] = 1
    out = virtual_signals(patterns, np.array([[5.2, 6.1], [14.8, 17.0]]), 2.0)
    assert out["bf"].tolist() == [10, 10]
    assert out["adf"].tolist() == [1, 1]
    assert out["com_qx"][1] == pytest.approx(17 * 10 / 11)


def test_virtual_signals__a_beam_off_the_detector_has_no_bright_field():
    out = virtual_signals(torch.ones(1, 8, 8), np.array([[np.nan, 3.0]]), 2.0)
    assert out["bf"][0] == 0


def test_weighted_sums__is_exact_for_counts(chunk):
    mask = np.zeros(chunk.shape[2:])
    mask[10:20] = 1
    np.testing.assert_array_equal(weighted_sums(chunk, weights=mask), chunk[:, :, 10:20].sum((2, 3)))


def test_pick_device__without_cuda_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="device='cpu'"):
        pick_device("cuda:0")

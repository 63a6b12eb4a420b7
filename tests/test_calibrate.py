"""Calibration against patterns drawn with known centre, radius and faults, and on recorded ones."""

import json
import math

import numpy as np
import pytest
import xarray as xr
from scipy import ndimage as ndi
from scipy.special import erfc

from fcunet.calibrate import calibrate
from fcunet.calibration import Calibration
from fcunet.kernels.probe import fit_disk, synthetic_probe
from fcunet.sample import read_sample

SLOPE = np.array([[0.3, -0.05], [0.1, -0.2]])  # px per scan position: rows (qy, qx), columns (scan_y, scan_x)


def draw_pattern(shape, centre, radius, rng, *, spacing=24.0, edge=0.7, texture=0.6, dose=5e4):
    """Counts of a square lattice of mottled disks, dimmer outwards."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = np.full(shape, 2e-4)
    for h in range(-4, 5):
        for k in range(-4, 5):
            p = np.array(centre) + spacing * np.array([h + 0.1 * k, k - 0.1 * h])
            r = np.hypot(y - p[0], x - p[1])
            if r.min() > radius:
                continue
            mottle = ndi.gaussian_filter(rng.normal(size=shape), 0.4 * radius)
            interior = np.clip(1 + texture * mottle / mottle.std(), 0.1, None)
            image += math.exp(-0.4 * math.hypot(h, k)) * interior * erfc((r - radius) / (edge * 2**0.5)) / 2
    return rng.poisson(dose * image / image.sum())


def cube_of(patterns, scan, **variables):
    array = np.asarray(patterns)
    array = array.reshape(*scan, *array.shape[-2:])
    return xr.Dataset({"intensity": (("scan_y", "scan_x", "qy", "qx"), array)} | variables)


def beam_centre(scan_y, scan_x):
    return np.array([50.3, 45.6]) + SLOPE @ np.array([scan_y, scan_x])


@pytest.fixture(scope="module")
def cube():
    rng = np.random.default_rng(5)
    patterns = [
        draw_pattern((96, 90), beam_centre(i, j), 5.0, rng).astype(np.uint16)
        for i in range(4)
        for j in range(5)
    ]
    return cube_of(patterns, (4, 5))


@pytest.fixture(scope="module")
def calibration(cube):
    return calibrate(cube)


def test_calibrate__measures_the_radius_to_three_percent(calibration):
    assert calibration.probe_radius_px == pytest.approx(5.0, rel=0.03)
    assert calibration.edge_sigma_px == pytest.approx(0.7, abs=0.25)


def test_calibrate__follows_the_descan(calibration):
    # the texture moves single centres by 0.2-0.3 px; 20 of them make the plane better than that
    truth = np.array([[beam_centre(i, j) for j in range(5)] for i in range(4)])
    np.testing.assert_allclose(calibration.origin, truth, atol=0.4)
    assert calibration.origin_std_px < 0.5


def test_calibrate__spacing_lies_between_a_radius_and_the_next_disk(calibration):
    spacing = 24 * math.hypot(1, 0.1)
    assert calibration.nearest_spacing_px == pytest.approx(spacing, rel=0.05)
    assert 5.0 < calibration.min_peak_spacing < spacing


def test_calibrate__synthetic_probe_has_the_measured_radius(calibration):
    assert calibration.probe_source == "synthetic"
    assert calibration.probe.shape == (96, 90)
    fit = fit_disk(calibration.probe, (48, 45), 5.0)
    assert fit.radius_px == pytest.approx(calibration.probe_radius_px, abs=0.05)


def test_calibration__survives_json(calibration):
    back = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict())), calibration.probe)
    assert back.to_dict() == calibration.to_dict()
    np.testing.assert_array_equal(back.bad_pixels, calibration.bad_pixels)
    np.testing.assert_allclose(back.origin, calibration.origin)


def test_calibration__describes_itself(calibration):
    text = "\n".join(calibration.describe())
    assert "centre (" in text
    assert "disk radius 5." in text or "disk radius 4.9" in text


def test_calibrate__numbers_given_by_hand_win(cube):
    given = calibrate(
        cube, probe_radius_px=6.0, edge_sigma_px=1.0, min_peak_spacing=9.0, edge_boundary=2, n_patterns=4
    )
    assert (given.probe_radius_px, given.edge_sigma_px) == (6.0, 1.0)
    assert (given.min_peak_spacing, given.edge_boundary) == (9.0, 2)


def test_calibrate__a_centre_given_selects_that_disk(cube):
    next_disk = beam_centre(1.5, 2) + 24 * np.array([0.1, 1.0])
    found = calibrate(cube, centre=tuple(next_disk), n_patterns=20)
    np.testing.assert_allclose(found.centre, next_disk, atol=0.5)


def test_calibrate__uses_the_stored_probe(cube):
    probe = synthetic_probe((96, 90), 5.2, 0.5, (40.25, 41.5))
    stored = calibrate(cube.assign(probe=(("qy", "qx"), probe)), n_patterns=4)
    assert stored.probe_source == "stored"
    assert stored.probe_radius_px == pytest.approx(5.2, abs=0.05)
    np.testing.assert_array_equal(stored.probe, probe)


def test_calibrate__warns_of_a_probe_of_another_size(cube):
    probe = synthetic_probe((96, 90), 8.0, 0.5)
    assert any("another camera length" in w for w in calibrate(cube, probe=probe).warnings)


def test_calibrate__refuses_an_empty_probe(cube):
    with pytest.raises(ValueError, match="probe is zero everywhere.*--no-use-stored-probe"):
        calibrate(cube, probe=np.zeros((96, 90)))


def test_calibrate__refuses_a_probe_of_another_shape(cube):
    with pytest.raises(ValueError, match=r"\(64, 64\).*\(96, 90\)"):
        calibrate(cube, probe=np.ones((64, 64)))


def test_calibrate__finds_hot_and_dead_pixels_but_not_the_beam(cube):
    spoilt = cube["intensity"].values.copy()
    spoilt[..., 7, 11] = 900
    spoilt[..., 70, 20:22] = 700
    spoilt[..., 50, 45] = 0
    found = calibrate(cube_of(spoilt, (4, 5)))
    hot = {(7, 11), (70, 20), (70, 21)}
    assert {tuple(p) for p in np.argwhere(found.bad_pixels)} == hot | {(50, 45)}
    assert (found.n_hot, found.n_dead) == (3, 1)
    assert found.probe_radius_px == pytest.approx(5.0, rel=0.04)


def test_calibrate__honours_the_detector_mask(cube):
    mask = np.ones((96, 90), dtype=bool)
    mask[:, 60:63] = False
    spoilt = cube.assign(detector_mask=(("qy", "qx"), mask))
    spoilt["intensity"] = cube["intensity"].where(mask, 60000)
    found = calibrate(spoilt)
    assert (found.n_masked, found.n_hot, found.n_dead) == (288, 0, 0)
    np.testing.assert_array_equal(found.bad_pixels, ~mask)
    assert found.probe_radius_px == pytest.approx(5.0, rel=0.05)


def test_calibrate__ignores_nan_in_float_data(cube):
    holes = cube["intensity"].values.astype(np.float32)
    holes[..., 10:12, :] = np.nan
    holes[0, 0] = np.nan
    found = calibrate(cube_of(holes, (4, 5)))
    assert found.n_dead == 180
    assert found.probe_radius_px == pytest.approx(5.0, rel=0.05)


def test_calibrate__scan_of_one_row_has_no_slope_across(cube):
    row = calibrate(cube.isel(scan_y=slice(1, 2)))
    assert row.origin.shape == (1, 5, 2)
    assert row.origin_plane[:, 1].tolist() == [0, 0]


def test_calibrate__takes_the_vacuum_beside_the_sample_as_probe():
    rng = np.random.default_rng(2)
    sample = [draw_pattern((64, 64), (31, 33), 4.0, rng, spacing=17) for _ in range(8)]
    vacuum = [rng.poisson(5e4 * synthetic_probe((64, 64), 4.0, 0.6, (31, 33))) for _ in range(4)]
    found = calibrate(cube_of(sample[:4] + vacuum + sample[4:], (3, 4)))
    assert found.probe_source == "vacuum"
    fit = fit_disk(found.probe, (32, 32), 4.0)
    assert fit.centre == pytest.approx((32, 32), abs=0.1)
    assert fit.radius_px == pytest.approx(4.0, abs=0.15)


def test_calibrate__one_disk_only_is_said():
    probe = 1e5 * synthetic_probe((61, 64), 6.0, 0.6, (28.4, 30.7))
    found = calibrate(cube_of(np.random.default_rng(0).poisson(probe), (1, 1)))
    assert found.centre == pytest.approx((28.4, 30.7), abs=0.1)
    assert math.isnan(found.nearest_spacing_px)
    assert any("only one disk" in w for w in found.warnings)


def test_calibrate__saturated_beam_is_said():
    rng = np.random.default_rng(1)
    clipped = np.minimum(draw_pattern((96, 96), (47, 50), 5.0, rng, dose=2e5, texture=0.2), 63).astype(
        np.uint8
    )
    assert any("saturated" in w for w in calibrate(cube_of(clipped, (1, 1))).warnings)


@pytest.mark.parametrize("fill", [0, np.nan])
def test_calibrate__refuses_patterns_without_counts(fill):
    with pytest.raises(ValueError, match="hold no counts"):
        calibrate(cube_of(np.full((4, 32, 32), fill, dtype=np.float32), (2, 2)))


def test_calibrate__refuses_noise_without_disks():
    noise = np.random.default_rng(3).poisson(3.0, (4, 64, 64))
    with pytest.raises(ValueError, match="no diffraction disk.*--probe-radius-px"):
        calibrate(cube_of(noise, (2, 2)))


def test_calibrate__refuses_a_mask_without_a_pixel(cube):
    with pytest.raises(ValueError, match="no pixel to use"):
        calibrate(cube.assign(detector_mask=(("qy", "qx"), np.zeros((96, 90), dtype=bool))))


def test_read_sample__is_bounded_spread_and_repeatable(cube):
    big = cube.isel(scan_y=np.arange(100) % 4, scan_x=np.arange(120) % 5)
    sample = read_sample(big, n_patterns=16)
    assert len(sample.patterns) == 16
    assert np.ptp(sample.position, axis=0).min() > 40
    np.testing.assert_array_equal(sample.position, read_sample(big, n_patterns=16).position)


def test_calibrate__recorded_pattern_with_bright_rims(test_data):
    dm = pytest.importorskip("rsciio.digitalmicrograph")
    pattern = dm.file_reader(str(test_data / "nbed" / "dd020.dm3"))[0]["data"]
    found = calibrate(cube_of(pattern, (1, 1)))
    # half of the height of the strongest disks lies 4.3 to 4.6 px from their centres, the foot at 5
    assert found.probe_radius_px == pytest.approx(4.5, abs=0.3)
    assert found.nearest_spacing_px == pytest.approx(29.9, abs=0.5)

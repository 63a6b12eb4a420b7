"""`fcunet calibrate`: a drawn scan with known descan, ellipse, pixel size; kept, carried over, taken back."""

import hashlib
import math

import numpy as np
import pytest
import xarray as xr
from scipy import ndimage as ndi
from scipy.special import erfc

from fcunet.calibrate import calibrate
from fcunet.calibration_command import calibrate_store
from fcunet.calibration_store import apply_from, reset, save
from fcunet.config import Config, DetectionConfig
from fcunet.datacube import open_datacube
from fcunet.kernels.ellipse import Ellipse, distortion_matrix, undistort
from fcunet.recalibrate import measure
from fcunet.scanframe import measure_scan_rotation
from fcunet.store import write_datacube
from fcunet.templates import measure_templates
from fcunet.tiles import load_calibration, save_calibration

SCAN, FRAME, PIXEL, TERMS = (4, 5), 96, 0.0245, (0.015, -0.01)
CORRELATION = DetectionConfig(method="correlation", min_relative_intensity=0.05)
GOLD = 4.0782
RINGS = np.sqrt([3, 4, 8, 11, 12, 16, 19, 20, 24]) / GOLD


def disk(centre, radius, edge=0.6, frame=FRAME, matrix=None):
    y, x = np.indices((frame, frame))
    offset = np.stack([y, x], -1) - centre
    r = np.hypot(*np.moveaxis(offset if matrix is None else offset @ np.linalg.inv(matrix).T, -1, 0))
    return erfc((r - radius) / (edge * math.sqrt(2))) / 2


def beam(at):
    return np.array([47.3 + 0.25 * at[0] - 0.1 * at[1], 46.6 + 0.2 * at[1]])


@pytest.fixture(scope="module")
def cube():
    """Gold along [001], turned by 20 degrees, on an elliptical detector."""
    rng = np.random.default_rng(4)
    D, turn = distortion_matrix(*TERMS), math.radians(20)
    R = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    hk = np.array([(h, k) for h in range(-4, 5) for k in range(-4, 5) if h % 2 == k % 2 == 0])
    sites = hk / GOLD / PIXEL @ R.T @ D.T
    patterns = np.empty((*SCAN, FRAME, FRAME), np.uint16)
    for at in np.ndindex(*SCAN):
        image = np.full((FRAME, FRAME), 0.3)
        for index, v in zip(hk, sites, strict=True):
            height = 60 if not index.any() else 25 * math.exp(-0.06 * (index**2).sum())
            image += height * disk(beam(at) + v, 4.0, matrix=D)
        patterns[at] = rng.poisson(image)
    dims = ("scan_y", "scan_x", "qy", "qx")
    coords = {d: (d, np.arange(n) * 2.0, {"units": "nm"}) for d, n in zip(dims, SCAN, strict=False)}
    coords |= {d: (d, np.arange(FRAME) * 1.0, {"units": "px"}) for d in dims[2:]}
    return xr.Dataset({"intensity": (dims, patterns)}, coords=coords, attrs={"title": "gold"})


@pytest.fixture(scope="module")
def found(cube):
    return measure(
        cube, ellipse="crystal", rings=RINGS, q_pixel=0.0225, rotation="none", detection=CORRELATION
    )


@pytest.fixture
def store(cube, tmp_path):
    return write_datacube(tmp_path / "gold.zarr", cube)


def shards(store):
    """Digest of all that holds patterns."""
    digest = hashlib.sha256()
    for file in sorted((store / "intensity").rglob("*")):
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def test_measure__finds_pixel_size_and_ellipse_of_a_known_crystal(found):
    # 20 disks to 0.1 px at 20-40 px in each of 20 patterns; start 8 % off
    assert found.crystal.q_pixel == pytest.approx(PIXEL, rel=2e-3)
    np.testing.assert_allclose(found.crystal.terms, TERMS, atol=1.5e-3)
    assert found.attrs["ellipse_ratio"] == pytest.approx(Ellipse.from_terms(*TERMS).ratio, abs=3e-3)
    assert float(found.variables["qy"][1] - found.variables["qy"][0]) == pytest.approx(PIXEL, rel=2e-3)


def test_measure__follows_the_beam(found):
    truth = np.array([[beam((i, j)) for j in range(SCAN[1])] for i in range(SCAN[0])])
    for i, name in enumerate(("origin_qy", "origin_qx")):
        np.testing.assert_allclose(found.variables[name], truth[..., i], atol=0.15)


def test_save__what_was_measured_is_there_after_and_the_patterns_are_untouched(store, found):
    before = shards(store)
    save(store, found)
    assert shards(store) == before
    again = open_datacube(store)
    assert again["qy"].attrs["units"] == "1/angstrom"
    assert again.attrs["ellipse_ratio"] == found.attrs["ellipse_ratio"]
    np.testing.assert_array_equal(again["origin_qx"], found.variables["origin_qx"])
    measured = calibrate(again, n_patterns=8)
    np.testing.assert_allclose(measured.origin[..., 1], again["origin_qx"])
    # the synthetic probe is as elliptical as the detector makes it
    weight = np.asarray(measured.probe, float)
    y, x = np.indices(weight.shape) - 48
    ratio = (weight * x * x).sum() / (weight * y * y).sum()
    assert ratio == pytest.approx(math.exp(4 * TERMS[0]), abs=0.01)


def test_reset__puts_back_what_was_there(store, cube, found):
    names = ("qy", "qx")
    before = open_datacube(store)
    save(store, found)
    save(store, found)  # twice: what is put back is what was there before the first
    assert {"origin_qy", "ellipse_ratio"} <= set(reset(store))
    after = open_datacube(store)
    xr.testing.assert_identical(after[list(names)].load(), before[list(names)].load())
    assert after.attrs == before.attrs
    assert "origin_qy" not in after
    with pytest.raises(ValueError, match="no calibration to take back"):
        reset(store)


def test_apply_from__carries_the_surface_by_distance(cube, found, store, tmp_path):
    save(store, found)
    # half the step, the same middle: the beam moves half as far
    fine = cube.assign_coords(scan_y=cube["scan_y"] / 2, scan_x=cube["scan_x"] / 2)
    other = write_datacube(tmp_path / "other.zarr", fine)
    lines = apply_from(other, store)
    a, b = open_datacube(store), open_datacube(other)
    for name in ("origin_qy", "origin_qx"):
        np.testing.assert_allclose(b[name].mean(), a[name].mean(), atol=1e-4)
        np.testing.assert_allclose(np.ptp(b[name].values), np.ptp(a[name].values) / 2, rtol=1e-3)
    np.testing.assert_array_equal(a["qy"], b["qy"])
    assert b.attrs["ellipse_angle_degree"] == a.attrs["ellipse_angle_degree"]
    assert any("descan" in line for line in lines)


def test_apply_from__refuses_what_does_not_fit(cube, found, store, tmp_path):
    plain = write_datacube(tmp_path / "plain.zarr", cube)
    with pytest.raises(ValueError, match="not calibrated.*fcunet calibrate"):
        apply_from(store, plain)
    save(store, found)
    cut = write_datacube(tmp_path / "cut.zarr", cube.isel(qy=slice(0, 80)))
    with pytest.raises(ValueError, match=r"\(96, 96\).*\(80, 96\)"):
        apply_from(cut, store)
    slow = write_datacube(tmp_path / "slow.zarr", cube.assign_attrs(beam_energy_keV=80.0))
    fast = write_datacube(tmp_path / "fast.zarr", cube.assign_attrs(beam_energy_keV=200.0))
    save(fast, found)
    with pytest.raises(ValueError, match="one setting only"):
        apply_from(slow, fast)


def test_calibrate_store__draws_its_evidence_and_a_dry_run_keeps_nothing(store):
    options = {"rotation": "none", "settings": Config().calibration.model_dump(), "n_patterns": 8}
    lines = calibrate_store(store, dry_run=True, options=options)
    assert (store.parent / "gold_calibration.png").stat().st_size > 20_000
    assert "nothing kept" in lines[-1]
    assert "origin_qy" not in open_datacube(store)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ellipse": "round"}, "none, ring, crystal"),
        ({"ellipse": "0.9,3"}, "from 1"),
        ({"rotation": "north"}, "measure, none, or degrees"),
        ({"ellipse": "crystal"}, "--crystal Au"),
        ({"origin": "edge"}, "disk, brightest, mass, friedel"),
    ],
)
def test_calibrate_store__says_what_it_needs(store, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate_store(store, options={"rotation": "none", **options})


def scan_of_moved_disks(degree, transposed=False, noise=True):
    """A beam moved by the gradient of a potential, on a detector turned against the scan (S14)."""
    rng = np.random.default_rng(6)
    potential = ndi.gaussian_filter(rng.normal(size=(24, 24)), 2.0)[4:-4, 4:-4]
    field = np.stack(np.gradient(potential), -1)
    field *= 1.5 / np.sqrt((field**2).mean())
    c, s = math.cos(math.radians(degree)), math.sin(math.radians(degree))
    seen = np.stack([s * field[..., 1] + c * field[..., 0], c * field[..., 1] - s * field[..., 0]], -1)
    seen = seen[..., ::-1] if transposed else seen
    images = np.stack([200 * disk(np.array([15.5, 15.5]) + v, 5.0, frame=32) for v in seen.reshape(-1, 2)])
    dims = ("scan_y", "scan_x", "qy", "qx")
    return xr.Dataset({"intensity": (dims, rng.poisson(images).reshape(16, 16, 32, 32).astype(np.uint16))})


@pytest.mark.parametrize(("degree", "transposed"), [(30, False), (210, False), (125, False), (125, True)])
def test_measure_scan_rotation__of_a_gradient_field(degree, transposed):  # S14
    cube = scan_of_moved_disks(degree, transposed)
    found = measure_scan_rotation(cube, calibrate(cube, n_patterns=16))
    assert abs((found.rotation_degree - degree + 90) % 180 - 90) < 1
    assert found.transposed is transposed
    assert found.angle_known
    assert found.transposition_known


def test_measure__an_undecided_rotation_is_said_and_not_kept(cube):
    result = measure(cube, n_patterns=16)
    assert any("cannot decide the scan" in w for w in result.warnings)
    assert "scan_rotation_degree" not in result.attrs


def test_measure__a_rotation_at_odds_with_the_stored_one_is_said():
    cube = scan_of_moved_disks(30).assign_attrs(scan_rotation_degree=80.0)
    result = measure(cube, n_patterns=16, settings={"probe_radius_px": 5.0})
    assert any("80.0 degrees" in w for w in result.warnings)
    assert measure(cube.drop_attrs(), n_patterns=16).attrs["scan_rotation_degree"] == pytest.approx(30, abs=1)


def growing_disks():
    """One disk whose radius grows from 4 to 6 px along the scan: a probe out of focus more and more."""
    rng = np.random.default_rng(9)
    images = [400 * disk((23.2, 24.4), 4.0 + 2 * j / 11, frame=48) for _ in range(4) for j in range(12)]
    counts = rng.poisson(np.stack(images)).reshape(4, 12, 48, 48).astype(np.uint16)
    return xr.Dataset({"intensity": (("scan_y", "scan_x", "qy", "qx"), counts)})


def test_measure_templates__follow_disks_that_change():
    cube = growing_disks()
    found = measure_templates(cube, calibrate(cube), regions=(1, 3))
    assert found.significant
    np.testing.assert_allclose(found.radius_px[0], [4.27, 5.0, 5.73], atol=0.15)
    sizes = [math.sqrt((p > 0.5 * p.max()).sum() / math.pi) for p in found.probes]
    np.testing.assert_allclose(sizes, [4.27, 5.0, 5.73], atol=0.3)
    assert found.template_index[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_measure_templates__refuse_more_regions_than_positions(cube):
    with pytest.raises(ValueError, match="7 x 1 regions"):
        measure_templates(cube, calibrate(cube, n_patterns=8), regions=(7, 1))


def test_process_block__uses_the_template_of_each_position(tmp_path):
    from dataclasses import replace

    from fcunet.blocks import process_block

    cube = growing_disks()
    measured = calibrate(cube)
    found = measure_templates(cube, measured, regions=(1, 3))
    local = replace(measured, templates=found.probes, template_index=found.template_index)
    (tmp_path / "peaks").mkdir()
    save_calibration(tmp_path / "peaks", local)
    local = load_calibration(tmp_path / "peaks")
    chunk = cube["intensity"].values
    together = process_block(chunk, CORRELATION, local, template_index=local.template_index)
    for k in range(3):
        alone = replace(measured, probe=found.probes[k])
        part = process_block(chunk[:, 4 * k : 4 * k + 4], CORRELATION, alone)
        for name in ("peak_qy", "peak_intensity", "bf", "n_peaks"):
            np.testing.assert_array_equal(together[name][:, 4 * k : 4 * k + 4], part[name])
    np.testing.assert_allclose(together["sum"], chunk.sum((0, 1)))
    np.testing.assert_array_equal(together["maximum"], chunk.max((0, 1)))


def test_measure__ellipse_of_a_ring_in_the_mean_pattern():
    rng = np.random.default_rng(2)
    ellipse, centre = Ellipse(1.04, 35.0), np.array([47.4, 48.1])
    y, x = np.indices((FRAME, FRAME))
    rho = np.hypot(*np.moveaxis(undistort(np.stack([y, x], -1) - centre, ellipse), -1, 0))
    image = 300 * disk(centre, 3.5) + 1.5 * np.exp(-0.5 * ((rho - 30) / 3) ** 2) + np.exp(-rho / 20)
    counts = rng.poisson(image, (4, 4, FRAME, FRAME)).astype(np.uint16)
    cube = xr.Dataset({"intensity": (("scan_y", "scan_x", "qy", "qx"), counts)})
    result = measure(cube, ellipse="ring", rotation="none")
    np.testing.assert_allclose(result.ring.terms, ellipse.terms, atol=4 * result.ring.terms_std)
    assert result.ring.terms_std < 2e-3

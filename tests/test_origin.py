"""The beam centre over a scan of drawn disks that move by a plane and a little more."""

import math

import numpy as np
import pytest
import xarray as xr
from scipy.special import erfc

from fcunet.calibrate import calibrate
from fcunet.descan import measure_origin

SCAN, FRAME = (6, 8), (60, 64)
SURFACE = np.array([[29.4, 0.3, -0.1, 0.0, 0.02, 0.03], [31.2, 0.1, 0.2, -0.04, 0.0, 0.01]])


def true_centres():
    y, x = np.mgrid[: SCAN[0], : SCAN[1]]
    return np.stack([np.ones_like(y), y, x, y * y, y * x, x * x], axis=-1) @ SURFACE.T


@pytest.fixture(scope="module")
def cube():
    rng = np.random.default_rng(8)
    y, x = np.mgrid[: FRAME[0], : FRAME[1]]
    patterns = np.empty((*SCAN, *FRAME), dtype=np.uint16)
    for at in np.ndindex(*SCAN):
        image = np.full(FRAME, 0.5)
        for h in range(-2, 3):
            for k in range(-2, 3):
                p = true_centres()[at] + 13 * np.array([h + 0.1 * k, k - 0.1 * h])
                height = 60 * math.exp(-0.5 * (h * h + k * k)) * (1 if h == k == 0 else rng.uniform(0.4, 1))
                image += height * erfc((np.hypot(y - p[0], x - p[1]) - 3.2) / 0.9) / 2
        patterns[at] = rng.poisson(image)
    patterns[2, 3] = 0  # one empty, one with a Bragg disk far brighter than the beam
    patterns[4, 5, 40:46, 44:50] += 300
    return xr.Dataset({"intensity": (("scan_y", "scan_x", "qy", "qx"), patterns)})


@pytest.mark.parametrize("method", ["disk", "brightest", "mass"])
def test_measure_origin__parabola_follows_the_beam(cube, method):
    origin = measure_origin(cube, method=method, model="parabola", n_patterns=48)
    found = np.stack([origin["origin_qy"], origin["origin_qx"]], axis=-1)
    # single centres scatter by 0.1 px (counting, pixels); 47 of them for six terms
    np.testing.assert_allclose(found, true_centres(), atol=0.15)
    assert np.isnan(origin["residual_qy"].values[2, 3])
    assert origin.attrs["model"] == "parabola"
    assert origin.attrs["scatter_px"] < 0.2


def test_measure_origin__plane_leaves_the_curvature_in_the_residual(cube):
    plane = measure_origin(cube, model="plane")
    parabola = measure_origin(cube, model="parabola")
    assert plane.attrs["scatter_px"] > 1.5 * parabola.attrs["scatter_px"]


def test_measure_origin__friedel_pairs_behind_a_beam_stop(cube):
    hidden = cube.copy(deep=True)
    hidden["intensity"][..., 24:38, :38] = 0
    origin = measure_origin(hidden, method="friedel", model="parabola", radius_px=3.2)
    found = np.stack([origin["origin_qy"], origin["origin_qx"]], axis=-1)
    np.testing.assert_allclose(found, true_centres(), atol=0.3)


def test_measure_origin__every_position_is_the_same_in_any_blocks(cube):
    whole = measure_origin(cube, model=None, radius_px=3.2)
    parts = measure_origin(cube.chunk(scan_y=4, scan_x=3), model=None, radius_px=3.2)
    xr.testing.assert_identical(whole, parts)
    assert np.isfinite(whole["origin_qy"]).all()  # the empty pattern is bridged
    assert int(whole.attrs["n_measured"]) == 47
    np.testing.assert_allclose(whole["origin_qx"], true_centres()[..., 1], atol=0.6)


def test_measure_origin__a_centre_far_from_any_disk_is_refused(cube):
    with pytest.raises(ValueError, match="near .*--centre"):
        measure_origin(cube.where(cube.qy > 20, 0), radius_px=3.2, centre=(6, 6))


def test_measure_origin__refuses_unknown_names(cube):
    with pytest.raises(ValueError, match="'edge'.*disk, brightest, mass, friedel"):
        measure_origin(cube, method="edge")


def test_calibrate__a_stored_origin_is_taken_for_granted(cube):
    dims = ("scan_y", "scan_x")
    known = cube.assign({f"origin_{d}": (dims, true_centres()[..., i]) for i, d in enumerate(("qy", "qx"))})
    found = calibrate(known)
    np.testing.assert_allclose(found.origin, true_centres())
    assert not any("direct beam" in w for w in found.warnings)

"""Simulated scans: truth and geometry agree, counts are counts, the schema holds."""

import numpy as np
import pytest

from fcunet import schema
from fcunet.kernels.strain import deformation_gradient, strain_from_F
from fcunet.simulation.scan import simulate


def centre_of_mass(pattern, near, radius):
    y, x = np.mgrid[: pattern.shape[0], : pattern.shape[1]]
    weight = pattern * ((y - near[0]) ** 2 + (x - near[1]) ** 2 < radius**2)
    return np.array([(weight * y).sum(), (weight * x).sum()]) / weight.sum()


@pytest.fixture(scope="module")
def flat_pair():
    """An unstrained and a strained pattern with flat disks, no background, many electrons; and the truth."""
    return simulate(
        scan=(1, 2), detector=256, sample="uniform", dose=3e8, background=0.0, psf_px=0.0, descan_px=0.0,
        semiangle_mrad=1.5, thickness_nm=5.0, wedge=0.0, mistilt_mrad=(0.0, 0.0), bend_mrad=0.0,
    )  # fmt: skip


def test_simulate__truth_agrees_with_the_disks_on_the_detector(flat_pair):
    datacube, truth = flat_pair
    patterns = datacube.intensity.values[0].astype(float)
    origin = np.array([truth.origin_qy.values[0, 0], truth.origin_qx.values[0, 0]])
    # 004 lies along the growth direction x, 2-20 along y; on axis opposite disks are mirror images, so that
    # half their difference is free of the slope of intensity within them
    g_ref = np.array([[0, 4 / 5.431], [2 * np.sqrt(2) / 5.431, 0]]) * 256 / 2.5
    measured = []
    for pattern in patterns:
        pair = [[centre_of_mass(pattern, origin + sign * g, 7.5) for sign in (1, -1)] for g in g_ref]
        measured.append([(plus - minus) / 2 for plus, minus in pair])
    F = deformation_gradient(np.array(measured[1]), np.array(measured[0]))
    found = strain_from_F(F)
    for name in schema.STRAIN_COMPONENTS:
        assert float(found[name]) == pytest.approx(float(truth[name].values[0, 1]), abs=6e-4), name


def test_simulate__without_a_sample_shows_the_direct_beam_alone():
    options = {
        "scan": (1, 1), "detector": 256, "sample": "none", "descan_px": 0.0, "dose": 1e6,
    }  # fmt: skip
    straight, truth = simulate(**options)
    assert np.isnan(truth.e_xx.values).all()
    com = centre_of_mass(straight.intensity.values[0, 0].astype(float), (128, 128), 40)
    assert com == pytest.approx([128.37, 127.39], abs=0.1)


@pytest.mark.parametrize("angle", [90.0, -30.0])
def test_simulate__places_the_growth_direction_by_the_scan_rotation(angle):
    datacube, truth = simulate(
        scan=(1, 1), detector=256, sample="flat", dose=1e8, scan_rotation_degree=angle, psf_px=0.0,
        background=0.0, thickness_nm=5.0,
        wedge=0.0, semiangle_mrad=1.5, mistilt_mrad=(0.0, 0.0), bend_mrad=0.0,
    )  # fmt: skip
    origin = np.array([truth.origin_qy.values[0, 0], truth.origin_qx.values[0, 0]])
    g = 4 / 5.431 * 256 / 2.5
    radians = np.radians(angle)
    expected = origin + g * np.array([np.sin(radians), np.cos(radians)])
    found = centre_of_mass(datacube.intensity.values[0, 0].astype(float), expected, 9)
    assert found == pytest.approx(expected, abs=0.03)
    assert datacube.attrs["scan_rotation_degree"] == angle


@pytest.mark.parametrize("sample", ["sige", "gradient", "none"])
def test_simulate__follows_the_schema(sample):
    datacube, truth = simulate(scan=(2, 3), detector=64, sample=sample, dose=1e4, bend_mrad=0.0)
    schema.check_datacube(datacube)
    schema.check_variables(truth, schema.TRUTH)
    schema.check_format(datacube.attrs, "datacube")
    assert datacube.intensity.dtype == np.uint16
    assert datacube.qx.attrs["units"] == schema.UNIT_Q
    assert datacube.scan_y.attrs["units"] == schema.UNIT_SCAN


def test_simulate__counts_the_electrons_asked_for():
    datacube, _ = simulate(scan=(2, 2), detector=128, sample="none", dose=2e4, background=0.0)
    totals = datacube.intensity.values.sum((2, 3))
    # Poisson: 2e4 +- 141
    assert totals == pytest.approx(np.full((2, 2), 2e4), abs=600)


def test_simulate__is_reproducible_by_its_seed():
    options = {"scan": (1, 3), "detector": 64, "dose": 1e4, "bend_mrad": 0.0}
    first, second, other = (simulate(**options, seed=s)[0].intensity.values for s in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_simulate__leaves_the_reference_region_unstrained():
    _, truth = simulate(scan=(3, 30), detector=64, dose=1e3, bend_mrad=0.0, wedge=0.0, thickness_nm=5.0)
    rows, columns = (slice(*map(int, part.split(":"))) for part in truth.attrs["reference_region"].split(","))
    for name in schema.STRAIN_COMPONENTS:
        assert np.abs(truth[name].values[rows, columns]).max() == 0
    assert float(truth.e_xx.max()) > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": "gold"}, "known: sige"),
        ({"semiangle_mrad": 6.0}, "change semiangle_mrad"),
        ({"dose": 0.0}, "must all be positive"),
    ],
)
def test_simulate__refuses_what_it_cannot_draw(options, message):
    with pytest.raises(ValueError, match=message):
        simulate(scan=(1, 1), **options)

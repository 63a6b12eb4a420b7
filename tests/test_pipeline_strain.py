"""Labelled lattice and strain: names, laziness, references, frames, truth."""

import itertools

import numpy as np
import pytest
import xarray as xr

from fcunet import pipeline_reference, schema
from fcunet.kernels.ellipse import Ellipse
from fcunet.kernels.strain import shared_shear
from fcunet.pipeline import (
    bragg_vector_map,
    compare_with_truth,
    compute_strain,
    fit_lattice,
    fit_lattices,
)

G = np.array([[1.5, 31.0], [27.0, 4.0]])  # (y, x), px
SITES = np.array(list(itertools.product(range(-4, 5), repeat=2)))
SHAPE = (8, 10)
DIMS = schema.PEAK_DIMS


def truth():
    """No strain in the first three columns, an inclusion with a given matrix from column 6 on (S9)."""
    F = np.tile(np.eye(2), (*SHAPE, 1, 1))
    F[:, 3:6] += np.array([[0.010, 0.004], [0.002, -0.006]])  # [[yy, yx], [xy, xx]]
    F[:, 6:] += np.array([[0.1, 0.05], [0.15, 0.2]]) / 5
    return F


def make_peaks(noise=0.0, seed=0, F=None, g=G):
    rng = np.random.default_rng(seed)
    F = truth() if F is None else F
    origin = np.array([127.0, 130.0]) + np.stack(
        np.meshgrid(np.arange(8) * 0.1, np.arange(10) * 0.2, indexing="ij"), -1
    )
    q = origin[..., None, :] + SITES @ (g @ np.linalg.inv(F))
    q = q + noise * rng.normal(size=q.shape)
    q = np.where((np.abs(q - 128) < 110).all(-1)[..., None], q, np.nan)
    intensity = np.where(np.isfinite(q[..., 0]), np.exp(-(SITES**2).sum(1) / 10.0), np.nan)
    order = np.argsort(-np.nan_to_num(intensity, nan=-1), axis=-1, kind="stable")
    values = {
        "peak_qy": np.take_along_axis(q[..., 0], order, -1),
        "peak_qx": np.take_along_axis(q[..., 1], order, -1),
        "peak_intensity": np.take_along_axis(intensity, order, -1),
        "peak_sigma": np.take_along_axis(
            np.where(np.isfinite(intensity), max(noise, 0.01), np.nan), order, -1
        ),
    }
    peaks = xr.Dataset({k: (DIMS, v) for k, v in values.items()}, attrs={"detector_shape": [256, 256]})
    peaks["n_peaks"] = peaks["peak_qy"].notnull().sum("peak").astype(np.int16)
    return peaks.assign_coords(scan_y=("scan_y", np.arange(8) * 2.0), scan_x=("scan_x", np.arange(10) * 2.0))


@pytest.fixture(scope="module")
def peaks():
    return make_peaks()


@pytest.fixture(scope="module")
def lattice(peaks):
    return fit_lattice(peaks)


def test_fit_lattice__follows_the_schema(lattice):
    required = [n for n in schema.LATTICE if n not in ("F", *schema.SHARED_DILATION)]
    schema.check_variables(lattice, schema.LATTICE, required=required)
    assert lattice["g1_qy"].attrs["units"] == "px"
    assert lattice.attrs["basis_source"] == "found from the peaks"
    assert list(lattice.coords) == ["scan_y", "scan_x"]


def test_fit_lattice__of_lazy_peaks_is_lazy_and_the_same(peaks, lattice):  # S10
    lazy = fit_lattice(peaks.chunk(scan_y=3, scan_x=4))
    assert lazy["g1_qy"].chunks == ((3, 3, 2), (4, 4, 2))
    xr.testing.assert_identical(lazy.compute(), lattice)


def test_fit_lattice__takes_a_basis_an_origin_and_origins_per_position(peaks, lattice):
    given = fit_lattice(peaks, basis=lattice.attrs["basis_px"], origin=(128, 131))
    np.testing.assert_allclose(given["g1_qx"], lattice["g1_qx"], atol=1e-9)
    assert given.attrs["basis_source"] == "given"
    measured = peaks.assign(
        origin_qy=lattice["origin_qy"] + 2.0, origin_qx=lattice["origin_qx"].where(lattice["origin_qx"] > 131)
    )
    np.testing.assert_allclose(fit_lattice(measured)["origin_qx"], lattice["origin_qx"], atol=1e-9)


def test_fit_lattice__works_without_intensity_and_sigma(peaks, lattice):
    bare = fit_lattice(peaks[["peak_qy", "peak_qx"]])
    assert bare.attrs["weighting"] == "uniform"
    np.testing.assert_allclose(compute_strain(bare)["e_xx"], compute_strain(lattice)["e_xx"], atol=1e-9)


def test_fit_lattice__is_nan_where_a_position_has_no_peaks(peaks):
    lattice = fit_lattice(peaks.where(peaks["scan_y"] > 0))
    strain = compute_strain(lattice)
    assert lattice["n_indexed"][0].values.tolist() == [0] * 10
    assert not strain["valid"][0].any()
    assert strain["valid"][1:].all()
    assert strain[["e_xx", "e_xx_std"]].isel(scan_y=0).to_array().isnull().all()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda p: p.chunk(peak=5), {}, r"peaks.chunk\(peak=-1\)"),
        (lambda p: p.drop_vars("peak_qx"), {}, "lacks peak_qx"),
        (lambda p: p, {"weighting": "counts"}, "unknown weighting"),
        (lambda p: p.drop_vars("peak_intensity"), {"weighting": "intensity"}, "needs the intensities"),
        (lambda p: p, {"origin": (1, 2, 3)}, "origin has shape"),
        (lambda p: p * np.nan, {}, "none of the 80 patterns has three peaks"),
    ],
)
def test_fit_lattice__refuses_before_anything_is_computed(peaks, change, options, message):
    with pytest.raises(ValueError, match=message):
        fit_lattice(change(peaks).chunk(scan_y=4) if "chunk" not in message else change(peaks), **options)


def test_compute_strain__recovers_the_matrix_of_an_inclusion_and_zero_outside(lattice):  # S9
    strain = compute_strain(lattice, reference=(0, 8, 0, 3))
    F = truth()
    np.testing.assert_allclose(strain["F"], F, atol=1e-9)
    np.testing.assert_allclose(strain["e_xx"], F[..., 1, 1] - 1, atol=1e-9)
    np.testing.assert_allclose(strain["theta"], (F[..., 0, 1] - F[..., 1, 0]) / 2, atol=1e-9)
    assert strain.attrs["reference"] == "median of 24 of 24 positions, region 0:8,0:3"


def test_compute_strain__recovers_an_inclusion_of_twenty_percent():  # S9
    F = np.tile(np.eye(2), (*SHAPE, 1, 1))
    y, x = np.mgrid[:8, :10]
    inside = ((y - 3.5) / 3) ** 2 + ((x - 6) / 3) ** 2 < 1
    F[inside] += np.array([[0.1, 0.05], [0.15, 0.2]])
    lattice = fit_lattice(make_peaks(F=F), basis=G, max_strain=0.35)
    strain = compute_strain(lattice, reference=G)
    np.testing.assert_allclose(strain["F"], F, atol=1e-9)


def test_compute_strain__follows_the_schema_and_is_lazy_on_demand(peaks, lattice):
    strain = compute_strain(lattice)
    schema.check_variables(strain, schema.STRAIN)
    lazy = compute_strain(fit_lattice(peaks.chunk(scan_y=3, scan_x=4)))
    assert lazy["e_xx"].chunks == ((3, 3, 2), (4, 4, 2))
    xr.testing.assert_identical(lazy.compute(), strain)


def test_compute_strain__median_reference_keeps_a_ramp(peaks):  # S5
    F = np.tile(np.eye(2), (*SHAPE, 1, 1))
    F[..., 1, 1] += 0.001 * np.arange(10)
    e_xx = compute_strain(fit_lattice(make_peaks(F=F)))["e_xx"].mean("scan_y")
    np.testing.assert_allclose(np.diff(e_xx), 0.001 / 1.0045, atol=1e-6)
    assert e_xx[4] < 0 < e_xx[5]


def test_compute_strain__takes_any_vectors_of_the_reference_lattice(lattice):
    expected = compute_strain(lattice, reference=(0, 8, 0, 3))["F"]
    for vectors in (G, G[::-1], np.array([[2.0, 1.0], [1.0, 1.0]]) @ G):
        np.testing.assert_allclose(compute_strain(lattice, reference=vectors)["F"], expected, atol=1e-9)


def test_compute_strain__is_turned_into_the_scan_frame(peaks, lattice):  # S4
    F = np.tile(np.diag([1.01, 1.0]), (*SHAPE, 1, 1))
    fitted = fit_lattice(make_peaks(F=F).assign_attrs(scan_rotation_degree=90.0))
    for options in ({}, {"rotation_degree": 90}, {"rotation_degree": 0, "transpose": True}):
        strain = compute_strain(fitted, reference=G, **options)
        assert strain.attrs["frame"] == "scan"
        np.testing.assert_allclose(strain["e_xx"], 0.01, atol=1e-9)
        np.testing.assert_allclose(strain["e_yy"], 0, atol=1e-9)
    assert compute_strain(lattice).attrs["frame"] == "detector"


def test_compute_strain__scan_rotation_is_found_among_the_datacube_attributes(peaks):
    fitted = fit_lattice(peaks.assign_attrs(datacube={"scan_rotation_degree": 30.0}))
    assert compute_strain(fitted).attrs["rotation_degree"] == 30.0


def test_compute_strain__numbers_connected_regions(peaks):
    strain = compute_strain(fit_lattice(peaks.where((peaks["scan_x"] != 8) & (peaks["scan_y"] > 0))))
    assert strain["grain"][0].values.tolist() == [0] * 10
    assert strain["grain"][3].values.tolist() == [
        1,
        1,
        1,
        1,
        0,
        3,
        2,
        2,
        2,
        2,
    ]  # the inclusion is turned and strained


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mean", "use 'median', a region"),
        ((0, 9, 0, 3), "not inside the scan of 8 x 10"),
        ((1, 2, 3), "reference has shape"),
        (((0, 40.0), (40.0, 0)), "not the lattice that was fitted"),
    ],
)
def test_compute_strain__refuses_a_reference_it_cannot_use(lattice, reference, message):
    with pytest.raises(ValueError, match=message):
        compute_strain(lattice, reference=reference)


def test_compute_strain__says_when_the_reference_has_no_lattice(peaks):
    fitted = fit_lattice(peaks.where(peaks["scan_x"] > 4))
    with pytest.raises(ValueError, match="no position of the reference"):
        compute_strain(fitted, reference=(0, 8, 0, 2))
    with pytest.raises(ValueError, match=r"no position of the scan has a lattice.*fcunet preview"):
        compute_strain(fitted.isel(scan_x=slice(0, 3)))


def test_compute_strain__error_bars_include_the_reference():
    lattice = fit_lattice(make_peaks(noise=0.3))
    one, many = (compute_strain(lattice, reference=(0, 1, 0, n)) for n in (1, 3))
    exact = compute_strain(lattice, reference=G)
    assert (one["e_xx_std"] > 1.3 * exact["e_xx_std"]).mean() > 0.9  # sqrt(2) for two equal errors
    assert (many["e_xx_std"] < one["e_xx_std"]).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 25])
def test_median_variance__is_that_of_medians(n):
    drawn = np.median(np.random.default_rng(n).normal(size=(200_000, n)), axis=1).var()
    assert pipeline_reference._median_variance(n) == pytest.approx(drawn, rel=0.03)


def test_compute_strain__error_bars_hold_a_dilation_shared_by_all_peaks(peaks):
    told = with_dilation(peaks, 4e-4)
    told["shared_dilation_std"][0, 0] = np.nan  # nothing known of it
    alone, shared = (compute_strain(fit_lattice(p), reference=G) for p in (peaks, told))
    shear = shared_shear(0.0)
    for name, share in (("e_xx_std", with_shear(0)), ("e_yy_std", with_shear(0)), ("e_xy_std", shear)):
        more = np.sqrt(shared[name] ** 2 - alone[name] ** 2)[:, :6]  # strained by 1 % at most
        np.testing.assert_allclose(more[1:], 4e-4 * share, rtol=0.02)
        assert more[0, 0] == 0
    np.testing.assert_allclose(shared["theta_std"][:, :3], alone["theta_std"][:, :3], rtol=1e-3)
    uniform, same = (fit_lattice(p, weighting="uniform")["covariance"] for p in (told, peaks))
    np.testing.assert_array_equal(uniform, same)  # those bars come from the residuals alone
    assert "shared_dilation_std" not in fit_lattice(told, weighting="uniform")


def with_shear(signed):
    """What e_xx and e_yy have of a shared dilation, with the shear that goes with it."""
    return np.hypot(1, shared_shear(signed))


def with_dilation(peaks, std, signed=0.0):
    """The same peaks, of which the detector says that they share a dilation."""
    one = xr.ones_like(peaks["peak_qy"][..., 0], dtype=np.float32)
    return peaks.assign(shared_dilation_std=std * one, shared_dilation=signed * one)


def test_compute_strain__a_shared_dilation_cancels_in_the_same_crystal(peaks):
    size = xr.where(peaks["scan_x"] > peaks["scan_x"][3], 3e-3, 4e-3)
    alone, shared = (fit_lattice(p) for p in (peaks, with_dilation(peaks, size)))
    schema.check_variables(shared, schema.LATTICE, required=list(schema.SHARED_DILATION))
    region = (0, 8, 0, 3)
    bars, wider = (compute_strain(one, reference=region) for one in (alone, shared))
    more = np.sqrt(wider["e_xx_std"] ** 2 - bars["e_xx_std"] ** 2)[:, :6]  # strained by 1 % at most
    # of errors alike to 0.8: sqrt(r^2 + s^2 - 1.6 r s)
    np.testing.assert_allclose(more[:, :3], with_shear(0) * np.sqrt(0.4) * 4e-3, rtol=0.02)
    np.testing.assert_allclose(more[:, 4:], with_shear(0) * np.sqrt(5.8) * 1e-3, rtol=0.02)
    assert wider.attrs["shared_dilation_ref"] == pytest.approx([4e-3, 0])
    assert "shared_dilation_ref" not in bars.attrs
    lazy = compute_strain(shared.chunk(scan_y=3), reference=region)
    xr.testing.assert_allclose(lazy.compute(), wider)


def test_compute_strain__a_shared_dilation_of_known_sign_cancels_wholly(peaks):
    size = xr.where(peaks["scan_x"] > peaks["scan_x"][3], 3e-3, 4e-3)
    alone, shared = (fit_lattice(p) for p in (peaks, with_dilation(peaks, np.hypot(size, 1e-3), size)))
    bars, wider = (compute_strain(one, reference=(0, 8, 0, 3)) for one in (alone, shared))
    more = np.sqrt(wider["e_xx_std"] ** 2 - bars["e_xx_std"] ** 2)[:, :6]  # strained by 1 % at most
    np.testing.assert_allclose(more[:, :3], 0, atol=1e-5)
    np.testing.assert_allclose(more[:, 4:], with_shear(1e-3) * 1e-3, rtol=0.03)


def test_compute_strain__shared_dilations_of_opposite_sign_add_up(peaks):
    signed = xr.where(peaks["scan_x"] > peaks["scan_x"][3], 2e-3, -1e-3)
    alone, shared = (fit_lattice(p) for p in (peaks, with_dilation(peaks, np.hypot(signed, 3e-3), signed)))
    bars, wider = (compute_strain(one, reference=(0, 8, 0, 3))["e_xx_std"] for one in (alone, shared))
    more = np.sqrt(wider**2 - bars**2)[:, :6]
    np.testing.assert_allclose(more[:, :3], 0, atol=1e-5)
    np.testing.assert_allclose(more[:, 4:], with_shear(1e-3) * 3e-3, rtol=0.03)


def textured_peaks(alike, seed=0, electrons=0.03):
    """An unstrained scan of 24 x 24 whose disks lie beside their sites by 0.1 px, in part all alike."""
    rng = np.random.default_rng(seed)
    sites = SITES[(np.abs(SITES @ G) < 100).all(1)]
    texture, own = rng.normal(size=(1, len(sites), 2)), rng.normal(size=(576, len(sites), 2))
    errors = 0.1 * (np.sqrt(alike) * texture + np.sqrt(1 - alike) * own)
    errors = errors + electrons * rng.normal(size=own.shape)
    q = (np.array([127.0, 130.0]) + sites @ G + errors).reshape(24, 24, -1, 2)
    values = {"peak_qy": q[..., 0], "peak_qx": q[..., 1], "peak_sigma": np.full(q.shape[:3], 0.11)}
    return xr.Dataset({k: (DIMS, v) for k, v in values.items()}, attrs={"detector_shape": [256, 256]})


REGIONS = ["median", (4, 20, 3, 9)]


@pytest.mark.parametrize("reference", REGIONS)
@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9, 1.0])
def test_compute_strain__with_peaks_an_unstrained_scan_spreads_by_its_error_bars(alike, reference):
    peaks = textured_peaks(alike)
    strain = compute_strain(fit_lattice(peaks, basis=G), reference=reference, peaks=peaks)
    schema.check_variables(strain, schema.STRAIN | schema.TRUST, required=["residual_ratio"])
    z = [strain[c] / strain[f"{c}_std"] for c in schema.STRAIN_COMPONENTS]
    # where all is alike the prior of `residual_ratio` makes the bars 6 % too wide
    assert float(np.std(z)) == pytest.approx(1, abs=0.07)
    expected = np.sqrt(((1 - alike) * 0.1**2 + 0.03**2) / (0.1**2 + 0.03**2))
    assert float(strain["residual_ratio"].median()) == pytest.approx(expected, rel=0.12)


def test_compute_strain__without_peaks_the_bars_are_those_of_each_lattice():
    peaks = textured_peaks(0.9)
    lattice = fit_lattice(peaks, basis=G)
    plain, own = compute_strain(lattice), compute_strain(lattice, peaks=peaks)
    assert "residual_ratio" not in plain
    np.testing.assert_array_equal(plain["e_xx"], own["e_xx"])  # strain itself is the same
    ratio = (own["e_xx_std"] / plain["e_xx_std"]).values
    np.testing.assert_allclose(ratio, own["residual_ratio"], rtol=1e-4)
    assert "residual_ratio" not in compute_strain(lattice, reference=G, peaks=peaks)  # exact, of no pattern
    np.testing.assert_array_equal(
        compute_strain(lattice, reference=G, peaks=peaks)["e_xx_std"],
        compute_strain(lattice, reference=G)["e_xx_std"],
    )


@pytest.mark.parametrize("reference", [*REGIONS, "grain"])
def test_compute_strain__with_lazy_peaks_is_lazy_and_the_same(reference):
    peaks = textured_peaks(0.7)
    lattice = fit_lattice(peaks, basis=G)
    expected = compute_strain(lattice, reference=reference, peaks=peaks)
    chunked = (lattice, peaks.chunk(scan_y=7, scan_x=5)), (lattice.chunk(scan_y=10), peaks)
    for of_lattice, of_peaks in chunked:
        lazy = compute_strain(of_lattice, reference=reference, peaks=of_peaks)
        assert lazy["e_xx_std"].chunks is not None
        xr.testing.assert_allclose(lazy.compute(), expected, rtol=1e-6)


def test_compute_strain__sees_where_a_scan_is_unlike_its_reference():
    peaks = textured_peaks(1.0)
    other = textured_peaks(1.0, seed=7)  # another crystal, as far as the disks tell
    mixed = xr.where(peaks["scan_x"] < 12, peaks, other).transpose(*DIMS).assign_attrs(peaks.attrs)
    strain = compute_strain(fit_lattice(mixed, basis=G), reference=(0, 24, 0, 12), peaks=mixed)
    ratio = strain["residual_ratio"].median("scan_y")
    assert float(ratio[:12].max()) < 0.35
    assert float(ratio[12:].min()) > 1.2  # of two textures, and only one of them is that of the lattice


def test_compute_strain__takes_the_peaks_of_the_scan_and_no_others(peaks, lattice):
    with pytest.raises(ValueError, match=r"scan of \(8, 9\) positions and the lattices of \(8, 10\)"):
        compute_strain(lattice, peaks=peaks.isel(scan_x=slice(0, 9)))
    with pytest.raises(ValueError, match="peak_qx"):
        compute_strain(lattice, peaks=peaks.drop_vars("peak_qx"))
    with pytest.raises(ValueError, match="chunk"):
        compute_strain(lattice, peaks=peaks.chunk(peak=5))


def test_fit_lattice__corrects_sigma_by_the_scatter_of_the_scan():
    rng = np.random.default_rng(4)
    peaks = make_peaks(noise=0.0)
    stated = np.where(peaks["peak_qy"].notnull(), np.geomspace(0.02, 0.4, peaks.sizes["peak"]), np.nan)
    scatter = 0.08 * (stated / 0.08) ** 1.6  # weak disks are worse, and strong ones better, than they seem
    for name in ("peak_qy", "peak_qx"):
        peaks[name] = peaks[name] + scatter * rng.normal(size=stated.shape)
    peaks["peak_sigma"] = (DIMS, stated)
    lattice, plain = fit_lattice(peaks, basis=G), fit_lattice(peaks, basis=G, sigma_from_scan=False)
    knots, factors = np.array(lattice.attrs["sigma_stated_px"]), np.array(lattice.attrs["sigma_factor"])
    np.testing.assert_allclose(factors[1:-1], (knots / 0.08)[1:-1] ** 0.6, rtol=0.2)
    assert "sigma_factor" not in plain.attrs
    error, error_plain = (
        np.stack([compute_strain(one, reference=G)["F"].values - truth()]) for one in (lattice, plain)
    )
    assert np.sqrt((error**2).mean()) < 0.95 * np.sqrt((error_plain**2).mean())
    strain = compute_strain(lattice, reference=G)
    e_xx = error[0, ..., 1, 1] / strain["e_xx_std"].values
    assert np.std(e_xx) == pytest.approx(1, abs=0.2)  # 80 positions: 0.08


def test_fit_lattice__corrects_sigma_by_the_whole_scan_and_not_a_column_of_it():
    peaks = textured_peaks(0.0).isel(scan_x=np.arange(128) % 24, scan_y=np.arange(32) % 24)
    peaks = peaks.assign_coords(scan_x=np.arange(128.0), scan_y=np.arange(32.0))
    worse = 0.5 * np.random.default_rng(2).normal(size=peaks["peak_qy"].shape)
    worse[:, 1:] = 0
    peaks["peak_qy"] = peaks["peak_qy"] + worse
    np.testing.assert_allclose(fit_lattice(peaks, basis=G).attrs["sigma_factor"], 0.95, atol=0.15)


def test_fit_lattice__corrects_sigma_about_the_origin_it_uses():
    peaks = textured_peaks(0.0)
    beside = xr.full_like(peaks["peak_qy"][..., 0], 128.5)
    off = peaks.assign(origin_qy=beside, origin_qx=beside + 1.5)
    given = fit_lattice(off, basis=G, origin=(127, 130), fit_origin=False)
    np.testing.assert_allclose(given.attrs["sigma_factor"], 0.95, atol=0.15)


@pytest.mark.parametrize("weighting", ["sigma", "uniform"])
def test_fit_lattice__lets_the_scatter_of_the_scan_count(weighting):
    peaks = textured_peaks(0.0)
    lattice = fit_lattice(peaks, basis=G, weighting=weighting)
    scale, degrees = lattice.attrs["scatter_prior"]
    assert scale == pytest.approx(
        1.0 if weighting == "sigma" else 0.1**2 + 0.03**2, rel=0.1
    )  # 0.11 was stated
    assert degrees > 200
    alone = fit_lattice(peaks, basis=G, weighting=weighting, sigma_from_scan=False)
    assert "scatter_prior" not in alone.attrs
    spread = [float((one["covariance"][..., 2, 2] ** 0.5).std()) for one in (lattice, alone)]
    assert spread[0] < 0.5 * spread[1]
    lazy = fit_lattice(peaks.chunk(scan_y=5), basis=G, weighting=weighting)
    xr.testing.assert_allclose(lazy["covariance"].compute(), lattice["covariance"])
    fewer = fit_lattice(peaks.chunk(scan_y=2), basis=G, weighting=weighting)  # other patterns are the sample
    xr.testing.assert_allclose(fewer["covariance"].compute(), lattice["covariance"], rtol=0.15)
    with_outliers = fit_lattice(peaks, basis=G, weighting=weighting, robust=False)
    assert "scatter_prior" not in with_outliers.attrs
    nothing = fit_lattice(peaks.isel(peak=slice(0)), basis=G, origin=(127, 130), weighting=weighting)
    assert not nothing["n_indexed"].any()
    bright = peaks.assign(peak_intensity=xr.ones_like(peaks["peak_qy"]))
    assert "scatter_prior" not in fit_lattice(bright, basis=G, weighting="intensity").attrs


def test_fit_lattices__corrects_sigma_by_any_of_the_crystals():
    peaks = textured_peaks(0.0)
    absent = 1.37 * G @ np.array([[0.8, 0.6], [-0.6, 0.8]])
    _, second = fit_lattices(peaks, basis=[absent, G], origin=(127, 130), max_lattices=2)
    assert (second["lattice_id"] == 2).all()
    np.testing.assert_allclose(second.attrs["sigma_factor"], 0.95, atol=0.15)


@pytest.mark.parametrize("off", [0.0, 0.2])
def test_compute_strain__with_a_fixed_origin_an_offset_of_all_patterns_is_no_error(off):
    peaks = textured_peaks(0.5)
    lattice = fit_lattice(peaks, basis=G, origin=(127 + off, 130), fit_origin=False)
    strain = compute_strain(lattice, peaks=peaks)
    z = [strain[c] / strain[f"{c}_std"] for c in schema.STRAIN_COMPONENTS]
    assert float(np.std(z)) == pytest.approx(1, abs=0.08)


def test_compute_strain__knows_every_grain_by_a_fair_sample_of_its_patterns(monkeypatch):
    monkeypatch.setattr(pipeline_reference, "_SAMPLE", 64)
    peaks = textured_peaks(0.9)
    lattice = fit_lattice(peaks, basis=G)
    grains = np.add.outer(np.arange(24) // 6 * 4, np.arange(24) // 6) + 1  # 16 of 36 positions
    member = lattice["lattice_id"].copy(data=grains)
    references = pipeline_reference.find_references(lattice, "median", member, peaks)
    assert len(references) == 16
    assert all((one.residuals.n_patterns == 16).all() for one in references.values())


def test_compute_strain__takes_a_single_factor_as_netcdf_gives_it_back():
    peaks = textured_peaks(0.5).isel(scan_y=slice(0, 2), scan_x=slice(0, 2))  # few peaks
    lattice = fit_lattice(peaks, basis=G)
    names = ("sigma_factor", "sigma_stated_px")
    assert all(len(lattice.attrs[name]) == 1 for name in names)
    scalars = lattice.assign_attrs({name: lattice.attrs[name][0] for name in names})
    xr.testing.assert_identical(
        compute_strain(scalars, peaks=peaks)["residual_ratio"],
        compute_strain(lattice, peaks=peaks)["residual_ratio"],
    )


def test_compute_strain__of_weights_by_intensity_leaves_the_bars_alone(peaks):
    lattice = fit_lattice(peaks, weighting="intensity")
    assert "residual_ratio" not in compute_strain(lattice, peaks=peaks)


def test_compare_with_truth__counts_error_bars():
    F = truth()
    true = xr.Dataset(
        {
            "e_xx": (DIMS[:2], F[..., 1, 1] - 1),
            "e_yy": (DIMS[:2], F[..., 0, 0] - 1),
            "e_xy": (DIMS[:2], (F[..., 0, 1] + F[..., 1, 0]) / 2),
            "theta": (DIMS[:2], (F[..., 0, 1] - F[..., 1, 0]) / 2),
        },
        coords=make_peaks().coords,
    )
    strain = compute_strain(fit_lattice(make_peaks(noise=0.3)), reference=G)
    for errors in compare_with_truth(strain, true).values():
        assert errors["n"] == 80
        assert errors["rms"] < 0.0015
        assert abs(errors["slope"] - 1) < 0.05
        assert 0.5 < errors["within_1"] < 0.85  # 80 positions: one standard deviation is 5 points
        assert errors["within_2"] > 0.88
    perfect = compare_with_truth(true, true)["e_xx"]
    assert perfect["rms"] == perfect["bias"] == 0
    with pytest.raises(ValueError, match="no scan position in common"):
        compare_with_truth(strain, true.assign_coords(scan_y=true["scan_y"] + 1000))


def test_bragg_vector_map__sums_the_intensities_lazily_or_not(peaks):
    whole, parts = bragg_vector_map(peaks), bragg_vector_map(peaks.chunk(scan_y=3, scan_x=4))
    assert whole.shape == (256, 256)
    assert parts.chunks is not None
    assert float(whole.sum()) == pytest.approx(float(peaks["peak_intensity"].sum()))
    np.testing.assert_allclose(parts.compute(), whole, atol=1e-12)
    assert bragg_vector_map(peaks, sampling=2).shape == (512, 512)
    assert float(bragg_vector_map(peaks, weighted=False).sum()) == pytest.approx(int(peaks["n_peaks"].sum()))


def test_bragg_vector_map__takes_out_the_descan(peaks, lattice):
    raw, centred = bragg_vector_map(peaks), bragg_vector_map(peaks, lattice=lattice)
    y, x = (round(v) for v in centred.attrs["origin_px"])
    near = {"qy": slice(y - 2, y + 2), "qx": slice(x - 2, x + 2)}
    assert float(centred.sel(near).max()) > 1.5 * float(raw.sel(near).max())


def test_bragg_vector_map__without_a_known_detector_is_just_large_enough(peaks):
    image = bragg_vector_map(peaks.drop_attrs())
    assert image.shape == tuple(int(peaks[n].max()) + 2 for n in ("peak_qy", "peak_qx"))


def test_compute_strain__elliptical_distortion_is_taken_out():
    # a turn does not commute with the distortion: without the correction, strain is off by their product
    F = np.tile(np.array([[0.99, 0.018], [-0.02, 1.01]]), (*SHAPE, 1, 1))
    ellipse = Ellipse.from_terms(0.03, -0.02)
    plain = fit_lattice(make_peaks(F=F))
    names = list(schema.LATTICE_PARAMETERS[2:])
    g = np.stack([plain[n].values for n in names], -1).reshape(*SHAPE, 2, 2) @ ellipse.matrix.T
    bent = plain.assign({n: (schema.SCAN_DIMS, g.reshape(*SHAPE, 4)[..., i]) for i, n in enumerate(names)})
    reference = G @ ellipse.matrix.T
    wrong = compute_strain(bent, reference=reference)
    bent.attrs |= {"ellipse_ratio": ellipse.ratio, "ellipse_angle_degree": ellipse.angle_degree}
    found, expected = compute_strain(bent, reference=reference), compute_strain(plain, reference=G)
    for name in ("e_xx", "e_yy", "e_xy", "theta"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-12)
    assert float(np.abs(wrong["e_xx"] - expected["e_xx"]).max()) > 3e-4


def test_compute_strain__transposition_is_found_among_the_attributes(peaks):
    F = np.tile(np.diag([1.01, 1.0]), (*SHAPE, 1, 1))
    fitted = fit_lattice(make_peaks(F=F).assign_attrs(datacube={"scan_transposed": 1}))
    strain = compute_strain(fitted, reference=G)
    np.testing.assert_allclose(strain["e_xx"], 0.01, atol=1e-9)
    assert strain.attrs["frame"] == "scan"


def some_strained(share_columns, strain=0.01, seed=5):
    """Unstrained but for the last columns, 0.02 px of noise on every peak."""
    F = np.tile(np.eye(2), (*SHAPE, 1, 1))
    F[:, SHAPE[1] - share_columns :] *= 1 + strain
    return fit_lattice(make_peaks(noise=0.02, seed=seed, F=F))


def test_compute_strain__robust_median_leaves_the_strained_part_out():
    lattice = some_strained(share_columns=4)
    strain = compute_strain(lattice, reference="robust_median")
    flat = strain["e_xx"][:, :6]
    # 48 flat positions: their median is sure to 1.25 std / sqrt(48) = 0.18 std, and so is their mean
    assert abs(float(flat.mean())) < 4 * 0.25 * float(strain["e_xx_std"].median())
    plain = compute_strain(lattice, reference="median")["e_xx"][:, :6]
    assert abs(float(plain.mean())) > 2 * abs(float(flat.mean()))


def test_compute_strain__weighted_median_follows_the_sure_positions():
    lattice = some_strained(share_columns=6)
    unsure = xr.DataArray(np.arange(SHAPE[1]) >= SHAPE[1] - 6, dims="scan_x")
    lattice["covariance"] = lattice["covariance"] * xr.where(unsure, 1e4, 1.0)
    weighted = compute_strain(lattice, reference="weighted_median")["e_xx"][:, :4]
    assert abs(float(weighted.mean())) < 1e-4  # 0.02 px on 60 peaks: 1e-4 for one position, 32 of them
    assert float(compute_strain(lattice, reference="median")["e_xx"][:, :4].mean()) < -5e-3


def test_compute_strain__each_grain_is_its_own_reference():
    turn = np.deg2rad(17.0)
    F = np.tile(np.eye(2), (*SHAPE, 1, 1))
    F[:, 5:] = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    F[:, 5:] *= 1.005  # a constant strain of the second grain is no strain against itself
    lattice = fit_lattice(make_peaks(noise=0.01, seed=2, F=F))
    strain = compute_strain(lattice, reference="grain")
    assert sorted(np.unique(strain["grain"])) == [1, 2]
    for number in (1, 2):
        own = strain.where(strain["grain"] == number)
        for name in schema.STRAIN_COMPONENTS:
            assert abs(float(own[name].median())) < 1e-4


def test_compute_strain__median_reference_of_a_turning_crystal_is_an_unstrained_one():
    angle = np.deg2rad(np.random.default_rng(0).uniform(-3, 3, SHAPE))
    c, s = np.cos(angle), np.sin(angle)
    F = np.stack([np.stack([c, s], -1), np.stack([-s, c], -1)], -2)  # no strain anywhere
    lattice = fit_lattice(make_peaks(F=F), basis=G)
    # a lattice of the crystal at any angle: medians of components would be 2e-4 to 1e-3 off
    for reference in ("median", "robust_median", "weighted_median"):
        strain = compute_strain(lattice, reference=reference, measure="biot")
        for name in ("e_xx", "e_yy", "e_xy"):
            np.testing.assert_allclose(strain[name], 0, atol=1e-9)


FILM = np.array([[0.0, 26.0], [26.0, 0.0]])  # on a substrate with G


def film_on_substrate():
    """The substrate everywhere, unstrained; a film on the right half, strained by 1 % in its last columns."""
    F = np.tile(np.eye(2), (*SHAPE, 1, 1))
    film_F = F.copy()
    film_F[:, 8:, 1, 1] += 0.01
    below, above = make_peaks(noise=0.05, F=F), make_peaks(noise=0.05, seed=1, F=film_F, g=FILM)
    above = above.where(above["scan_x"] >= 10)
    beam = np.hypot(above["peak_qy"] - below["peak_qy"][..., 0], above["peak_qx"] - below["peak_qx"][..., 0])
    above = above.where(beam > 5)  # the direct beam is there once
    names = ["peak_qy", "peak_qx", "peak_intensity", "peak_sigma"]
    both = xr.concat([below[names], above[names]], "peak").assign_attrs(below.attrs)
    return both.assign_coords(below.coords)


def test_fit_lattices__film_and_substrate_each_have_their_place():
    substrate, film = fit_lattices(film_on_substrate(), basis=[G, FILM], max_lattices=2)
    assert (substrate["lattice_id"] == 1).all()
    np.testing.assert_array_equal(film["lattice_id"], np.tile(np.arange(10) >= 5, (8, 1)) * 2)
    assert (film["score"].where(film["lattice_id"] > 0) > 18).sum() == 40
    assert film.attrs["basis_px"] == FILM.tolist()
    strain = compute_strain(film, reference=(0, 8, 5, 8))
    # 0.05 px on about 60 peaks, 60 px away in the mean: 1e-4 per position
    np.testing.assert_allclose(strain["e_xx"][:, 8:], 0.01, atol=6e-4)
    assert np.isnan(strain["e_xx"][:, :5]).all()
    np.testing.assert_allclose(compute_strain(substrate)["e_xx"], 0, atol=6e-4)


def test_fit_lattices__without_knowing_them_the_best_comes_first():
    first, second = fit_lattices(film_on_substrate(), max_lattices=2)
    one = first.attrs["bases_px"]
    assert len(one) == 2
    both = np.stack([first["lattice_id"], second["lattice_id"]])
    np.testing.assert_array_equal(both[:, :, :5].max(0), both[0, 0, 0])  # the substrate alone
    np.testing.assert_array_equal(np.sort(both[:, :, 5:], axis=0)[:, 0, 0], [1, 2])
    assert (second["score"] <= first["score"])[:, 5:].all()
    strain = compute_strain(second, among=first)
    assert int(strain["valid"].sum()) == 40
    single = fit_lattice(film_on_substrate())
    xr.testing.assert_equal(single["g1_qy"], first["g1_qy"])


TURNED = 1.05 * G @ np.array([[0.88, 0.475], [-0.475, 0.88]])  # by 28 degrees


def two_crystals():
    """G on the left, TURNED on the right, whose last columns are strained by 1 %."""
    F = np.tile(np.eye(2), (*SHAPE, 1, 1))
    right_F = F.copy()
    right_F[:, 8:, 1, 1] += 0.01
    left, right = make_peaks(noise=0.05, F=F), make_peaks(noise=0.05, seed=1, F=right_F, g=TURNED)
    names = ["peak_qy", "peak_qx", "peak_intensity", "peak_sigma"]
    at = left["scan_x"]
    one = xr.concat([left[names].where(at < at[5]), right[names].where(at >= at[5])], "peak")
    return one.assign_attrs(left.attrs).assign_coords(left.coords)


@pytest.mark.parametrize("region", [(0, 8, 5, 8), (0, 8, 2, 8)])  # the left crystal is in the second only
def test_compute_strain__each_crystal_has_its_own_reference_in_a_region(region):
    lattice = fit_lattice(two_crystals(), basis=[G, TURNED])
    np.testing.assert_array_equal(lattice["lattice_id"], np.tile(1 + (np.arange(10) >= 5), (8, 1)))
    strain = compute_strain(lattice, reference=region)
    np.testing.assert_allclose(strain["e_xx"][:, :8], 0, atol=6e-4)
    np.testing.assert_allclose(strain["e_xx"][:, 8:], 0.01, atol=6e-4)
    y0, y1, x0, x1 = region
    assert f"region {y0}:{y1},{x0}:{x1}" in strain.attrs["reference"]
    np.testing.assert_allclose(strain.attrs["g1_ref_px"], (G if x0 < 5 else TURNED)[0], atol=0.05)


def test_compute_strain__against_vectors_another_crystal_keeps_its_median():
    lattice = fit_lattice(two_crystals(), basis=[G, TURNED])
    strain = compute_strain(lattice, reference=G * 1.01)
    np.testing.assert_allclose(strain["e_xx"][:, :5], 0.01, atol=6e-4)
    np.testing.assert_allclose(strain["e_xx"][:, 5:8], 0, atol=6e-4)
    strain = compute_strain(lattice, reference=TURNED * 1.01)
    np.testing.assert_allclose(strain["e_xx"][:, :5], 0, atol=6e-4)
    np.testing.assert_allclose(strain["e_xx"][:, 5:8], 0.01, atol=6e-4)
    assert strain.attrs["reference"] == "given vectors"
    with pytest.raises(ValueError, match="not the lattice that was fitted"):
        compute_strain(lattice, reference=0.6 * G)


def test_fit_lattices__are_the_same_lazily():
    peaks = film_on_substrate()
    whole = fit_lattices(peaks, basis=[G, FILM], max_lattices=2)
    parts = fit_lattices(peaks.chunk(scan_y=3, peak=-1), basis=[G, FILM], max_lattices=2)
    for one, other in zip(whole, parts, strict=True):
        assert other["g1_qy"].chunks is not None
        np.testing.assert_allclose(other["g1_qx"], one["g1_qx"], atol=1e-12)


def test_mean_covariance__does_not_depend_on_the_parts_and_leaves_out_the_unknown(monkeypatch):
    rng = np.random.default_rng(3)
    covariance = rng.integers(1, 100, (50, 6, 6)).astype(np.float32)  # whole numbers add up exactly
    covariance[7] = np.nan
    kept = np.arange(50) % 3 > 0
    expected = covariance[kept & (np.arange(50) != 7)].astype(float).mean(0)
    monkeypatch.setattr(pipeline_reference, "_PART", 8)
    mean, traces = pipeline_reference._mean_covariance(covariance, kept)
    np.testing.assert_array_equal(mean, expected)
    np.testing.assert_array_equal(traces, np.trace(covariance[kept][:, 2:, 2:], axis1=1, axis2=2))

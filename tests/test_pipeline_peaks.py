import dask
import numpy as np
import pytest
import xarray as xr
from flat_scan import FRAME, SCAN, SPACING, draw_datacube
from hypothesis import given, settings
from hypothesis import strategies as st

from fcunet import blocks, schema
from fcunet.calibrate import calibrate
from fcunet.pipeline import find_peaks, virtual_image

SETTINGS = {"device": "cpu", "max_num_peaks": 32}


@pytest.fixture(scope="module")
def datacube():
    return draw_datacube()


@pytest.fixture(scope="module")
def calibration(datacube):
    return calibrate(datacube)


@pytest.fixture(scope="module")
def eager(datacube, calibration):
    return find_peaks(datacube, "correlation", calibration=calibration, **SETTINGS)


def chunked(datacube, scan_y=3, scan_x=4):
    return datacube.chunk(scan_y=scan_y, scan_x=scan_x)


def compute(lazy):
    with dask.config.set(scheduler="synchronous"):
        return lazy.compute()


def test_find_peaks__on_arrays_in_memory_is_done_at_once(eager):
    assert eager.chunks == {}
    assert int(eager["n_peaks"].sum()) == 25 * (SCAN[0] * SCAN[1] - 1)


def test_find_peaks__follows_the_schema(eager):
    schema.check_variables(eager, schema.PEAKS, required=[v for v in schema.PEAKS if v != "status"])
    assert eager["peak_qy"].attrs["units"] == "px"
    assert eager["peak_intensity"].attrs["meaning"] == "height of the correlation"
    assert eager.attrs["title"] == "flat disks"


def test_find_peaks__lazy_in_lazy_out_without_touching_a_pattern(monkeypatch, datacube, calibration):
    calls = []
    real = blocks.process_block
    monkeypatch.setattr(blocks, "process_block", lambda *a, **k: calls.append(1) or real(*a, **k))
    lazy = find_peaks(chunked(datacube), "correlation", calibration=calibration, **SETTINGS)
    assert calls == []
    assert lazy["peak_qy"].chunks == ((3, 3), (4, 4, 2), (32,))
    compute(lazy)
    assert len(calls) == 6


@settings(max_examples=4)
@given(ny=st.integers(1, 6), nx=st.integers(1, 10))
def test_find_peaks__does_not_depend_on_the_blocks(ny, nx, datacube, calibration, eager):
    lazy = find_peaks(chunked(datacube, ny, nx), "correlation", calibration=calibration, **SETTINGS)
    xr.testing.assert_identical(compute(lazy), eager)


def test_find_peaks__one_variable_can_be_computed_alone(datacube, calibration, eager):
    lazy = find_peaks(chunked(datacube), "correlation", calibration=calibration, **SETTINGS)
    xr.testing.assert_identical(compute(lazy["bf"]), eager["bf"])


def test_find_peaks__keeps_the_arrays_of_the_calibration_once_in_the_graph(datacube, calibration):
    lazy = find_peaks(chunked(datacube, 1, 1), "correlation", calibration=calibration, **SETTINGS)
    from distributed.protocol import serialize  # what travels to a scheduler

    header, frames = serialize(dict(lazy.__dask_graph__()), serializers=["pickle"])
    patterns = datacube["intensity"].nbytes
    assert sum(memoryview(f).nbytes for f in frames) < patterns + 60 * 20_000


@pytest.mark.parametrize("dim", ["qy", "qx"])
def test_find_peaks__refuses_split_patterns_with_the_call_to_make(dim, datacube, calibration):
    with pytest.raises(ValueError, match=rf"'{dim}' is split .*datacube\.chunk\("):
        find_peaks(chunked(datacube).chunk({dim: 32}), "correlation", calibration=calibration)


def test_find_peaks__refuses_an_unknown_setting_by_name(datacube, calibration):
    with pytest.raises(ValueError, match="min_peak_spacin.*did you mean"):
        find_peaks(datacube, "correlation", calibration=calibration, min_peak_spacin=3)


def test_find_peaks__refuses_the_calibration_of_another_scan(datacube, calibration):
    with pytest.raises(ValueError, match=r"scan of .*calibrate"):
        find_peaks(datacube.isel(scan_y=slice(3)), "correlation", calibration=calibration)


def test_find_peaks__measures_the_calibration_where_none_is_given(datacube, eager):
    peaks = find_peaks(datacube, "correlation", **SETTINGS)
    np.testing.assert_array_equal(peaks["n_peaks"], eager["n_peaks"])


def test_find_peaks__takes_a_scan_of_one_row(datacube):
    peaks = find_peaks(datacube.isel(scan_y=[2]), "correlation", **SETTINGS)
    assert (peaks["n_peaks"] == 25).all()


def test_find_peaks__takes_a_detector_of_odd_size():
    odd = draw_datacube((2, 3), frame=61)
    peaks = find_peaks(odd, "correlation", **SETTINGS)
    assert (peaks["n_peaks"].values.ravel()[1:] == 25).all()


@pytest.mark.parametrize("lazily", [False, True])
def test_virtual_image__sums_an_annulus(lazily, datacube):
    cube = chunked(datacube) if lazily else datacube
    image = virtual_image(cube, inner=5, outer=20, centre=(32, 32))
    assert (image.chunks is not None) == lazily
    y, x = np.mgrid[:FRAME, :FRAME]
    r = np.hypot(y - 32, x - 32)
    expected = (datacube["intensity"] * ((r >= 5) & (r < 20))).sum(("qy", "qx"))
    np.testing.assert_array_equal(compute(image), expected)


def test_virtual_image__bright_and_dark_field_make_the_whole(datacube, calibration):
    parts = [virtual_image(datacube, name, calibration=calibration) for name in ("bf", "adf")]
    np.testing.assert_allclose(parts[0] + parts[1], datacube["intensity"].sum(("qy", "qx")))
    assert parts[0].name == "bf"


def test_virtual_image__takes_a_mask_and_honours_the_detector_mask(datacube):
    usable = np.ones((FRAME, FRAME), bool)
    usable[: FRAME // 2] = False
    cube = datacube.assign(detector_mask=(("qy", "qx"), usable))
    image = virtual_image(cube, np.ones((FRAME, FRAME)))
    np.testing.assert_array_equal(image, datacube["intensity"][..., FRAME // 2 :, :].sum(("qy", "qx")))


@pytest.mark.parametrize("lazily", [False, True])
def test_virtual_image__moves_with_the_beam_and_the_mask_does_not(lazily, datacube):
    usable = np.ones((FRAME, FRAME), bool)
    usable[30, 34] = False
    cube = datacube.assign(detector_mask=(("qy", "qx"), usable))
    ny, nx = datacube.sizes["scan_y"], datacube.sizes["scan_x"]
    shift = np.random.default_rng(4).uniform(-6, 6, (ny, nx, 2))
    image = virtual_image(chunked(cube) if lazily else cube, inner=2, outer=9, centre=(32, 32), shift=shift)
    y, x = np.mgrid[:FRAME, :FRAME]
    for at in np.ndindex(ny, nx):
        r = np.hypot(*(a - 32 - s for a, s in zip((y, x), np.rint(shift[at]), strict=True)))
        inside = (r >= 2) & (r < 9) & usable
        assert float(image[at]) == datacube["intensity"].values[at][inside].sum()


def test_virtual_image__beyond_the_detector_counts_nothing(datacube):
    ny, nx = datacube.sizes["scan_y"], datacube.sizes["scan_x"]
    away = np.full((ny, nx, 2), 10.0 * FRAME)
    assert not virtual_image(datacube, np.ones((FRAME, FRAME)), shift=away).values.any()


def test_virtual_image__says_what_is_wrong(datacube, calibration):
    with pytest.raises(ValueError, match="unknown virtual detector 'haadf'"):
        virtual_image(datacube, "haadf", calibration=calibration)
    with pytest.raises(ValueError, match="inner < outer"):
        virtual_image(datacube, inner=20, outer=10, calibration=calibration)
    with pytest.raises(ValueError, match="mask has shape"):
        virtual_image(datacube, np.ones((3, 3)))
    with pytest.raises(ValueError, match="shift has shape"):
        virtual_image(datacube, "bf", calibration=calibration, shift=np.zeros(2))
    assert SPACING > 0

"""Vendor files in: shapes, axis order, units, values, handedness; and what is refused, in which words."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from scipy import ndimage

from fcunet import store
from fcunet.convert import Plan, convert
from fcunet.readers import open_source
from fcunet.readers.base import Frames, Scan, Source, Stacked
from fcunet.units import to_inverse_angstrom, to_nm, wavelength

h5py = pytest.importorskip("h5py")
pytest.importorskip("rsciio")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.zarr"


def converted(source, out, **options):
    return store.open_datacube(convert(source, out, progress=False, **options))


def steps(dataset):
    """Step and unit of each axis with more than one point."""
    return {
        dim: (
            float(dataset[dim][1] - dataset[dim][0]) if dataset.sizes[dim] > 1 else None,
            dataset[dim].attrs["units"],
        )
        for dim in dataset.intensity.dims
    }


def assert_uncalibrated(dataset, *dims):
    for dim in dims:
        assert dataset[dim].attrs["units"] == "px"
        np.testing.assert_array_equal(dataset[dim], np.arange(dataset.sizes[dim]))


def scan_of(shape=(4, 6, 8, 10), dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


# ---- third-party files, in the order of their README


def test_dm3__one_pattern_becomes_a_scan_of_one_position(test_data, out):
    dataset = converted(test_data / "nbed/dd020.dm3", out)
    assert dataset.intensity.shape == (1, 1, 256, 256)
    assert dataset.intensity.dtype == np.int32
    assert (int(dataset.intensity.min()), int(dataset.intensity.max())) == (-91, 33056)
    assert_uncalibrated(dataset, "scan_y", "scan_x", "qy", "qx")
    assert dataset.attrs["source_format"] == "Gatan DigitalMicrograph"
    assert dataset.attrs["title"] == "dd020"
    assert "beam_energy_keV" not in dataset.attrs


def test_blockfile__scan_in_nm_and_detector_left_uncalibrated(test_data, out, caplog):
    dataset = converted(test_data / "sped/test1.blo", out)
    assert dataset.intensity.shape == (3, 2, 144, 144)
    assert dataset.intensity.dtype == np.uint8
    assert int(dataset.intensity.sum(dtype=np.int64)) == 5164570
    assert steps(dataset)["scan_y"] == (pytest.approx(12.8), "nm")
    assert steps(dataset)["scan_x"] == (pytest.approx(12.8), "nm")
    assert_uncalibrated(dataset, "qy", "qx")
    assert "'cm' is a length on the camera" in caplog.text


def test_blockfile__not_square_scan_keeps_rows_and_columns(test_data, out):
    assert converted(test_data / "formats/blockfile/test2.blo", out).intensity.shape == (2, 3, 5, 5)


@pytest.fixture(scope="session")
def merlin(test_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merlin")
    for archive in ("Merlin_Single_Quad.zip", "Merlin_navigation4x2_ROI.zip"):
        zipfile.ZipFile(test_data / "merlin" / archive).extractall(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "side", "dtype"),
    [
        ("Single_1_Frame_CounterDepth_1", 256, np.uint8),
        ("Single_1_Frame_CounterDepth_6", 256, np.uint8),
        ("Single_1_Frame_CounterDepth_12", 256, np.uint16),
        ("Single_1_Frame_CounterDepth_24", 256, np.uint32),
        ("Quad_1_Frame_CounterDepth_1", 512, np.uint8),
        ("Quad_1_Frame_CounterDepth_6", 512, np.uint8),
        ("Quad_1_Frame_CounterDepth_12", 512, np.uint16),
        ("Quad_1_Frame_CounterDepth_24", 512, np.uint32),
    ],
)
def test_merlin__every_counter_depth(merlin, out, name, side, dtype):
    dataset = converted(merlin / f"{name}_Rows_256.mib", out)
    assert dataset.intensity.shape == (1, 1, side, side)
    assert dataset.intensity.dtype == dtype
    assert_uncalibrated(dataset, "scan_y", "scan_x", "qy", "qx")
    assert dataset.attrs["dwell_time_us"] == 1000.0


def painted(image):
    """Pixels of the digit in `image`: the largest connected figure away from the labels at the edges."""
    labels, n = ndimage.label(image[40:-40, 20:-20] > 0, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())[1:]
    region = ndimage.find_objects(labels)[int(np.argmax(sizes))]
    return labels[region] == 1 + int(np.argmax(sizes))


def test_merlin__painted_digit_stands_upright(merlin, out):
    # a "1": its foot, the longest row of the digit, is at the bottom, and its beak points left from the top
    dataset = converted(merlin / "Single_1_Frame_CounterDepth_6_Rows_256.mib", out)
    digit = painted(dataset.intensity.values[0, 0])
    height = len(digit)
    assert np.argmax(digit.sum(axis=1)) > 0.8 * height
    left, right = digit[: height // 3, : digit.shape[1] // 2], digit[: height // 3, digit.shape[1] // 2 :]
    assert left.sum() > right.sum()
    assert dataset.attrs["handedness"] == "rows flipped by reader: row 0 is the last in the file"


def test_merlin__rows_are_those_of_the_file_in_reverse(merlin, out):
    path = merlin / "Quad_1_Frame_CounterDepth_12_Rows_256.mib"
    stored = np.frombuffer(path.read_bytes()[768:], ">u2").reshape(512, 512)
    np.testing.assert_array_equal(converted(path, out).intensity.values[0, 0], stored[::-1])


def test_merlin__flip_undoes_the_reader_and_says_so(merlin, out):
    path = merlin / "Single_1_Frame_CounterDepth_12_Rows_256.mib"
    stored = np.frombuffer(path.read_bytes()[384:], ">u2").reshape(256, 256)
    dataset = converted(path, out, flip="rows")
    np.testing.assert_array_equal(dataset.intensity.values[0, 0], stored)
    assert dataset.attrs["handedness"].endswith("then rows flipped on request")


def test_merlin__quadrants_lie_three_four_above_one_two(merlin, out):
    image = converted(merlin / "Quad_1_Frame_CounterDepth_6_Rows_256.mib", out).intensity.values[0, 0]
    digits = {(y, x): painted(image[256 * y :, 256 * x :][:256, :256]) for y in (0, 1) for x in (0, 1)}
    holes = {place: ndimage.binary_fill_holes(digit) & ~digit for place, digit in digits.items()}
    # of 1, 2, 3 and 4 only the 4 encloses a hole, above its middle; the 1 is narrowest
    assert [place for place, hole in holes.items() if hole.sum() > 50] == [(0, 1)]
    four = holes[0, 1]
    assert np.argwhere(four)[:, 0].mean() < len(four) / 2
    assert min(digits, key=lambda place: digits[place].sum()) == (1, 0)


@pytest.mark.parametrize(("name", "rows"), [("001_4x2_6bit", 256), ("002_4x2_6bit_roi128", 128)])
def test_merlin__scan_shape_from_the_pauses_between_rows(merlin, out, name, rows):
    dataset = converted(merlin / f"{name}.mib", out)
    assert dataset.intensity.shape == (2, 4, rows, 256)
    assert int(dataset.intensity.max()) == 63
    assert 0.02 < float((dataset.intensity == 63).mean()) < 0.07  # the beam
    raw = (
        np.frombuffer((merlin / f"{name}.mib").read_bytes(), np.uint8)
        .reshape(8, -1)[:, 384:]
        .reshape(8, rows, 256)
    )
    np.testing.assert_array_equal(dataset.intensity.values, raw[:, ::-1].reshape(2, 4, rows, 256))


def test_merlin__agrees_with_rosettasciio(merlin, out):
    from rsciio.quantumdetector import file_reader

    path = merlin / "001_4x2_6bit.mib"
    np.testing.assert_array_equal(converted(path, out).intensity.values, file_reader(str(path))[0]["data"])


def test_merlin__stack_without_rows_asks_for_the_shape(merlin, out):
    with pytest.raises(ValueError, match=r"stack of 9 frames of 512 x 512.*--scan-shape.*3,3 or 1,9"):
        convert(merlin / "Quad_9_Frame_CounterDepth_6_Rows_256.mib", out)
    dataset = converted(merlin / "Quad_9_Frame_CounterDepth_6_Rows_256.mib", out, scan_shape=(3, 3))
    assert dataset.intensity.shape == (3, 3, 512, 512)


def test_merlin__raw_counters_are_refused(merlin, out):
    with pytest.raises(ValueError, match=r"raw counters.*export processed frames"):
        convert(merlin / "Quad_1_Frame_CounterDepth_1_Rows_256RAW.mib", out)


def test_merlin__truncated_file_is_refused_or_cut_to_whole_rows(merlin, out, tmp_path):
    path = tmp_path / "cut.mib"
    path.write_bytes((merlin / "001_4x2_6bit.mib").read_bytes()[:-70_000])
    shutil.copy(merlin / "001_4x2_6bit.hdr", tmp_path / "cut.hdr")
    with pytest.raises(
        ValueError, match=r"incomplete: it has 6 whole frames, but it ends in the middle of frame 6"
    ):
        convert(path, out)
    assert converted(path, out, scan_shape=(1, 4)).intensity.shape == (1, 4, 256, 256)


def test_merlin__fewer_frames_than_announced(merlin, out, tmp_path):
    path = tmp_path / "cut.mib"
    path.write_bytes((merlin / "001_4x2_6bit.mib").read_bytes()[: 5 * (384 + 65536)])
    shutil.copy(merlin / "001_4x2_6bit.hdr", tmp_path / "cut.hdr")
    with pytest.raises(ValueError, match=r"5 whole frames, but its header announces 8"):
        convert(path, out)


def test_zip__is_to_be_unpacked(test_data, out):
    with pytest.raises(ValueError, match="zip archive of .* unpack it"):
        convert(test_data / "merlin/Merlin_Single_Quad.zip", out)


def test_mask_file__is_no_scan(test_data, out):
    with pytest.raises(ValueError, match=r"holds a mask \(data/mask"):
        convert(test_data / "merlin/29042024_12bitmask.h5", out)


def test_arina__master_gives_scan_step_energy_and_mask(test_data, out):
    dataset = converted(test_data / "formats/arina/test_00_master.h5", out)
    assert dataset.intensity.shape == (4, 4, 192, 192)
    assert dataset.intensity.dtype == np.uint32
    assert int(dataset.intensity.max()) == 0
    assert steps(dataset)["scan_x"] == (pytest.approx(0.139152, abs=1e-6), "nm")
    assert_uncalibrated(dataset, "qy", "qx")
    assert dataset.attrs["beam_energy_keV"] == 300.0
    assert dataset.attrs["detector"] == "Dectris ARINA CZT"
    assert dataset.detector_mask.values.all()


def test_arina__other_files_of_a_scan_name_the_master(test_data, out):
    for name in ("test_00.h5", "test_00_data_000001.h5"):
        with pytest.raises(ValueError, match="convert the master file, test_00_master.h5"):
            convert(test_data / "formats/arina" / name, out)


def test_arina__a_missing_data_file_is_named(test_data, out):
    with pytest.raises(ValueError, match=r"data file au_145mm_68kx_microprobe_01_data_000001\.h5 is missing"):
        convert(test_data / "formats/arina_no_data/au_145mm_68kx_microprobe_01_master.h5", out)
    assert list(out.parent.iterdir()) == []


def test_empad__ramp_is_cropped_and_in_order(test_data, out):
    dataset = converted(test_data / "formats/empad/map4x4.xml", out)
    assert dataset.intensity.shape == (4, 4, 128, 128)
    frame = np.arange(130 * 128, dtype=np.float32).reshape(130, 128)[:128]
    expected = np.arange(16)[:, None, None] * 130 * 128 + frame
    np.testing.assert_array_equal(dataset.intensity.values, expected.reshape(4, 4, 128, 128))
    assert dataset.attrs["beam_energy_keV"] == 300.0
    assert_uncalibrated(dataset, "scan_y", "scan_x", "qy", "qx")


def test_empad__raw_file_and_its_xml_are_the_same(test_data, out, tmp_path):
    first = converted(test_data / "formats/empad/scan_x4_y4.raw", out)
    shutil.copy(
        test_data / "formats/empad/scan_x4_y4.raw", tmp_path
    )  # without an XML: the shape is in the name
    second = converted(tmp_path / "scan_x4_y4.raw", tmp_path / "b.zarr")
    np.testing.assert_array_equal(first.intensity.values, second.intensity.values)


def test_empad__missing_raw_file_is_named(test_data, out):
    with pytest.raises(ValueError, match=r"scan_x32_y64\.raw, which is missing"):
        convert(test_data / "formats/empad/EMPAD_v1.2.2_x32_y64_size0.8.xml", out)


def test_empad__scan_that_is_not_square(test_data, out, tmp_path):
    shutil.copy(test_data / "formats/empad/EMPAD_v1.2.2_x32_y64_size0.8.xml", tmp_path / "a.xml")
    with (tmp_path / "scan_x32_y64.raw").open("wb") as stream:
        stream.truncate(64 * 32 * 130 * 128 * 4)  # sparse
    plan = convert(tmp_path / "a.xml", out, dry_run=True)
    assert plan.shape == (64, 32, 128, 128)


def test_topspin__angles_need_the_beam_energy(test_data, out, caplog):
    path = test_data / "formats/topspin/topspin_test_A.app5"
    dataset = converted(path, out)
    assert dataset.intensity.shape == (2, 5, 14, 12)
    assert dataset.intensity.dtype == np.float32
    assert steps(dataset)["scan_y"] == (pytest.approx(2.0), "nm")
    assert_uncalibrated(dataset, "qy", "qx")
    assert "needs the beam energy: --beam-energy-kev" in caplog.text
    dataset = converted(path, out, beam_energy_keV=200, overwrite=True)
    assert steps(dataset)["qx"] == (pytest.approx(2.13275792e-5 / 0.0250793, rel=1e-4), "1/angstrom")


def test_py4dstem__axis_order_and_units(test_data, out):
    dataset = converted(test_data / "formats/emd/py4DSTEM_size2x3x4x5.h5", out)
    with h5py.File(test_data / "formats/emd/py4DSTEM_size2x3x4x5.h5") as file:
        np.testing.assert_array_equal(dataset.intensity.values, file["datacube_root/datacube/data"][()])
    assert dataset.intensity.shape == (2, 3, 4, 5)
    found = steps(dataset)
    for dim in ("scan_y", "scan_x"):
        assert found[dim] == (pytest.approx(0.126796875), "nm")
    for dim in ("qy", "qx"):
        assert found[dim] == (pytest.approx(0.0442515666), "1/angstrom")
    # the file has no zero of q, so it is put into the middle of the detector
    assert float(dataset.qy[2]) == pytest.approx(0.0)


def test_py4dstem__calibration_group_is_carried_over(test_data, out):
    dataset = converted(test_data / "formats/emd/real_py4dstem.h5", out)
    assert steps(dataset)["scan_x"] == (pytest.approx(0.25), "nm")
    assert steps(dataset)["qx"] == (pytest.approx(0.0125), "1/angstrom")
    assert float(dataset.qy[0]) == pytest.approx(-31.5 * 0.0125)
    assert float(dataset.qx[0]) == pytest.approx(-32.25 * 0.0125)
    attrs = dataset.attrs
    assert (attrs["py4dstem_ellipse_a"], attrs["py4dstem_ellipse_b"]) == (1.02, 0.98)
    assert attrs["py4dstem_ellipse_theta_rad"] == 0.35
    assert attrs["py4dstem_QR_flip"] is True
    assert (attrs["origin_mean_qy_px"], attrs["origin_mean_qx_px"]) == (31.5, 32.25)


def test_prismatic__asks_for_the_depth(test_data, out):
    path = test_data / "formats/emd/Si100_4D.emd"
    with pytest.raises(ValueError, match=r"each of 2 depths.*--depth 0 to --depth 1"):
        convert(path, out)
    dataset = converted(path, out, depth=1)
    assert dataset.intensity.shape == (11, 11, 8, 8)
    assert steps(dataset)["scan_y"] == (pytest.approx(0.5), "nm")
    assert steps(dataset)["qy"] == (pytest.approx(0.018416205, abs=1e-8), "1/angstrom")
    with h5py.File(path) as file:
        stored = file["4DSTEM_simulation/data/datacubes/CBED_array_depth0001/datacube"][()]
    np.testing.assert_array_equal(dataset.intensity.values, stored)
    with pytest.raises(ValueError, match="depths 0 to 1, not 7"):
        convert(path, out, depth=7, overwrite=True)


def test_tvips__series_in_one_or_several_files(test_data, out):
    folder = test_data / "formats/tvips"
    with pytest.raises(ValueError, match=r"stack of 6 frames of 4 x 5.*2,3 or 1,6"):
        convert(folder / "test_tvips_2345_000.tvips", out)
    one = converted(folder / "test_tvips_2345_000.tvips", out, scan_shape=(2, 3))
    split = converted(folder / "test_tvips_2345_split_000.tvips", out.with_name("s.zarr"), scan_shape=(2, 3))
    np.testing.assert_array_equal(one.intensity.values.ravel(), np.arange(120))
    np.testing.assert_array_equal(split.intensity.values, one.intensity.values)
    assert one.attrs["beam_energy_keV"] == 200.0
    with pytest.raises(ValueError, match=r"later part.*test_tvips_2345_split_000\.tvips"):
        convert(folder / "test_tvips_2345_split_001.tvips", out, overwrite=True)


def test_direct_electron__raster_with_steps_of_its_text_file(test_data, out):
    dataset = converted(test_data / "formats/de_mrc/20241021_00405_movie.mrc", out)
    assert dataset.intensity.shape == (4, 8, 4, 8)
    np.testing.assert_array_equal(dataset.intensity.values[:, :, 0, 0].ravel(), np.arange(32))
    assert steps(dataset) == {
        "scan_y": (pytest.approx(0.2), "nm"),
        "scan_x": (pytest.approx(0.1), "nm"),
        "qy": (pytest.approx(0.01), "1/angstrom"),
        "qx": (pytest.approx(0.01), "1/angstrom"),
    }
    assert dataset.attrs["beam_energy_keV"] == 300.0


def test_direct_electron__frames_go_where_the_scan_list_says(test_data, out, caplog):
    path = test_data / "formats/de_mrc/Custom_movie.mrc"
    frames = np.frombuffer(path.read_bytes()[-30 * 16 * 16 * 2 :], np.uint16).reshape(30, 16, 16)
    with pytest.raises(ValueError, match=r"up to 2 times.*--dataset 0 to --dataset 1"):
        convert(path, out)
    dataset = converted(path, out, dataset="1")
    assert dataset.intensity.shape == (5, 5, 16, 16)
    # the list has x first: its second row is (0, 1), that is x = 0, y = 1
    np.testing.assert_array_equal(dataset.intensity.values[1, 0], frames[16])
    np.testing.assert_array_equal(dataset.intensity.values[4, 2], frames[24])
    assert (dataset.intensity.values[:, 1] == 0).all()
    assert "10 of 25 scan positions were not visited" in caplog.text


def test_zspy__a_signal_that_is_no_pattern_is_refused(test_data, out):
    for name in ("signal1d_10x10-ZipStore.zspy", "signal1d_10x10-NestedDirectoryStore.zspy"):
        with pytest.raises(ValueError, match="1 signal axes; diffraction patterns have two"):
            convert(test_data / "formats/zspy" / name, out)


# ---- HyperSpy, written here

AXES = [
    {"name": "y", "scale": 1.5, "offset": 3.0, "units": "nm", "navigate": True, "size": 4},
    {"name": "x", "scale": 0.5, "offset": 0.0, "units": "Å", "navigate": True, "size": 6},
    {"name": "ky", "scale": 0.02, "offset": -0.08, "units": "$A^{-1}$", "navigate": False, "size": 8},
    {"name": "kx", "scale": 0.3, "offset": -1.5, "units": "nm^-1", "navigate": False, "size": 10},
]


def assert_hyperspy(dataset, values):
    np.testing.assert_array_equal(dataset.intensity.values, values)
    assert dataset.intensity.dtype == values.dtype
    assert steps(dataset) == {
        "scan_y": (pytest.approx(1.5), "nm"),
        "scan_x": (pytest.approx(0.05), "nm"),
        "qy": (pytest.approx(0.02), "1/angstrom"),
        "qx": (pytest.approx(0.03), "1/angstrom"),
    }
    assert float(dataset.qy[0]) == pytest.approx(-0.08)
    assert float(dataset.qx[0]) == pytest.approx(-0.15)
    assert float(dataset.scan_y[0]) == pytest.approx(3.0)
    assert dataset.attrs["beam_energy_keV"] == 200.0


def zspy(path, values, axes=AXES):
    """A signal as HyperSpy lays it out in Zarr format 2: no names of dimensions, axes beside the data."""
    group = zarr.create_group(path, zarr_format=2, attributes={"file_format": "ZSpy"})
    signal = group.create_group("Experiments/__unnamed__")
    data = signal.create_array(
        "data", shape=values.shape, chunks=(2, 2, *values.shape[2:]), dtype=values.dtype, fill_value=0
    )
    data[...] = values
    for n, axis in enumerate(axes):
        signal.create_group(f"axis-{n}").attrs.update(axis)
    signal.create_group("metadata/Acquisition_instrument/TEM").attrs["beam_energy"] = 200.0
    return path


def test_zspy__folder_of_format_2_keeps_zero_counts_as_integers(tmp_path, out):
    values = scan_of()
    values[0] = 0
    assert_hyperspy(converted(zspy(tmp_path / "a.zspy", values), out), values)


def test_hspy__as_written_by_rosettasciio(tmp_path, out):
    from rsciio.hspy import file_writer

    values = scan_of()
    axes = [{**axis, "_type": "UniformDataAxis", "is_binned": False} for axis in AXES]
    metadata = {
        "General": {"title": "t"},
        "Signal": {"signal_type": ""},
        "Acquisition_instrument": {"TEM": {"beam_energy": 200.0}},
        "_HyperSpy": {},
    }
    file_writer(
        str(tmp_path / "a.hspy"),
        {
            "data": values,
            "axes": axes,
            "metadata": metadata,
            "original_metadata": {},
            "attributes": {"_lazy": False, "ragged": False},
            "learning_results": {},
            "models": {},
            "package_info": {"package": "hyperspy", "package_version": "2.0"},
            "tmp_parameters": {},
        },
    )
    assert_hyperspy(converted(tmp_path / "a.hspy", out), values)


# ---- py4DSTEM and Arina, written here


def py4dstem(path, values, calibration, probe=None):
    with h5py.File(path, "w") as file:
        root = file.create_group("datacube_root")
        group = root.create_group("datacube")
        group.attrs["python_class"] = "DataCube"
        group["data"] = values
        items = root.create_group("metadatabundle/calibration")
        for key, value in calibration.items():
            items[key] = value
        if probe is not None:
            node = group.create_group("probe")
            node.attrs["python_class"] = "Probe"
            node["data"] = probe
    return path


def test_py4dstem__datacube_of_version_0_13_keeps_its_calibration(tmp_path, out):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "old.h5", "w") as file:
        cube = file.create_group("4DSTEM/datacube")
        cube.attrs["py4dstem_class"] = "DataCube"
        cube["data"] = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
        facts = {"Q_pixel_size": 0.02, "Q_pixel_units": b"A^-1", "R_pixel_size": 2.5, "R_pixel_units": b"nm"}
        for key, value in (facts | {"qx0": np.full((2, 3), 1.5), "qy0": np.full((2, 3), 2.5)}).items():
            cube[f"calibration/{key}"] = value
    cube = store.open_datacube(convert(tmp_path / "old.h5", out, progress=False))
    assert float(cube["scan_x"][1]) == 2.5
    assert float(cube["qy"][1] - cube["qy"][0]) == pytest.approx(0.02)
    assert float(cube["origin_qy"][1, 2]) == 1.5


def test_py4dstem__origin_maps_and_probe_keep_rows_first(tmp_path, out):
    values, rng = scan_of(dtype=np.float32), np.random.default_rng(1)
    qx0, qy0 = rng.random((4, 6)), 5 + rng.random((4, 6))  # their x is the row
    probe = rng.random((2, 8, 10)).astype(np.float32)  # probe and kernel
    calibration = {
        "Q_pixel_size": 0.01,
        "Q_pixel_units": "A^-1",
        "R_pixel_units": "pixels",
        "qx0": qx0,
        "qy0": qy0,
    }
    dataset = converted(py4dstem(tmp_path / "a.h5", values, calibration, probe), out)
    np.testing.assert_allclose(dataset.origin_qy, qx0, rtol=1e-6)
    np.testing.assert_allclose(dataset.origin_qx, qy0, rtol=1e-6)
    np.testing.assert_array_equal(dataset.probe, probe[0])
    assert_uncalibrated(dataset, "scan_y", "scan_x")
    assert steps(dataset)["qy"] == (pytest.approx(0.01), "1/angstrom")


def test_flip__turns_patterns_probe_mask_origin_and_q_together(tmp_path, out):
    values = scan_of(dtype=np.float32)
    qx0 = np.full((4, 6), 2.25)
    probe = np.random.default_rng(1).random((8, 10)).astype(np.float32)
    calibration = {"Q_pixel_size": 0.01, "Q_pixel_units": "A^-1", "qx0": qx0, "qy0": qx0}
    path = py4dstem(tmp_path / "a.h5", values, calibration, probe)
    dataset = converted(path, out, flip="both")
    np.testing.assert_array_equal(dataset.intensity.values, values[..., ::-1, ::-1])
    np.testing.assert_array_equal(dataset.probe, probe[::-1, ::-1])
    np.testing.assert_allclose(dataset.origin_qy, 7 - 2.25)
    np.testing.assert_allclose(dataset.origin_qx, 9 - 2.25)
    assert float(dataset.qy[3]) == pytest.approx(0.0)  # the zero of q was in row 4 of 8
    assert "rows and columns flipped on request" in dataset.attrs["handedness"]
    with pytest.raises(ValueError, match="flip is 'sideways'"):
        convert(path, out, flip="sideways", overwrite=True)


def arina(folder, frames, mask=None, companion=None):
    """A master file with links to data files of at most ten frames."""
    folder.mkdir(exist_ok=True)
    for n in range(0, len(frames), 10):
        with h5py.File(folder / f"a_data_{n // 10 + 1:06d}.h5", "w") as file:
            file.create_dataset("entry/data/data", data=frames[n : n + 10], chunks=(1, *frames.shape[1:]))
    with h5py.File(folder / "a_master.h5", "w") as file:
        data = file.create_group("entry/data")
        for n in range(0, len(frames), 10):
            number = f"{n // 10 + 1:06d}"
            data[f"data_{number}"] = h5py.ExternalLink(f"a_data_{number}.h5", "/entry/data/data")
        specific = file.create_group("entry/instrument/detector/detectorSpecific")
        specific["pixel_mask"] = np.zeros(frames.shape[1:], np.uint32) if mask is None else mask
        specific["ntrigger"], specific["nimages"] = len(frames), 1
    if companion:
        with h5py.File(folder / "a.h5", "w") as file:
            file.create_group("STEM Metadata").attrs.update(companion)
    return folder / "a_master.h5"


def test_arina__counts_beyond_16_bits_do_not_wrap(tmp_path, out):
    frames = scan_of((16, 8, 8), np.uint32)
    frames[3, 2, 2] = 70_000
    path = arina(tmp_path / "a", frames)
    dataset = converted(path, out)
    np.testing.assert_array_equal(dataset.intensity.values, frames.reshape(4, 4, 8, 8))
    with pytest.raises(
        ValueError, match="values from .* to 70000, which uint16 cannot hold; leave --dtype out"
    ):
        convert(path, out, dtype="uint16", overwrite=True, progress=False)
    np.testing.assert_array_equal(store.open_datacube(out).intensity.values, frames.reshape(4, 4, 8, 8))


def test_arina__masked_pixels_are_masked_and_their_marks_do_not_count(tmp_path, out):
    frames = scan_of((16, 8, 8), np.uint32)
    frames[:, 1, 5] = 2**32 - 1
    mask = np.zeros((8, 8), np.uint32)
    mask[1, 5] = 16
    dataset = converted(arina(tmp_path / "a", frames, mask), out, dtype=np.uint16)
    assert dataset.intensity.dtype == np.uint16
    np.testing.assert_array_equal(~dataset.detector_mask, mask.astype(bool))
    good = dataset.detector_mask.values
    np.testing.assert_array_equal(dataset.intensity.values[..., good], frames.reshape(4, 4, 8, 8)[..., good])


def test_arina__frames_of_several_files_in_a_scan_that_is_not_square(tmp_path, out):
    frames = scan_of((24, 8, 8), np.uint32)
    path = arina(
        tmp_path / "a", frames, companion={"NumPixelsX": [8], "NumPixelsY": [3], "Pixel Size": [0.5]}
    )
    dataset = converted(path, out)
    np.testing.assert_array_equal(dataset.intensity.values, frames.reshape(3, 8, 8, 8))
    assert steps(dataset)["scan_x"] == (0.5, "nm")


def test_arina__a_square_is_assumed_aloud_or_asked_for(tmp_path, out, caplog):
    converted(arina(tmp_path / "a", scan_of((16, 8, 8), np.uint32)), out)
    assert "taken as square, 4 x 4" in caplog.text
    with pytest.raises(ValueError, match="stack of 15 frames"):
        convert(arina(tmp_path / "b", scan_of((15, 8, 8), np.uint32)), out, overwrite=True)


def test_hdf5__several_scans_are_listed_and_one_chosen(tmp_path, out):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["first/data"], file["second/data"] = scan_of(seed=1), scan_of(seed=2)
    with pytest.raises(ValueError, match=r"choose one with --dataset: first/data .*, second/data"):
        convert(tmp_path / "a.h5", out)
    with pytest.raises(ValueError, match="no array 'third'"):
        convert(tmp_path / "a.h5", out, dataset="third")
    dataset = converted(tmp_path / "a.h5", out, dataset="second/data")
    np.testing.assert_array_equal(dataset.intensity.values, scan_of(seed=2))


def test_hdf5__truncated_file(tmp_path, out):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = scan_of()
    data = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot be opened .*is it complete"):
        convert(tmp_path / "a.h5", out)


# ---- arrays


@pytest.mark.parametrize("dtype", ["u1", ">u2", "<u4", "i4", "f4", "f8", "?"])
def test_npy__every_dtype_keeps_its_values(tmp_path, out, dtype):
    values = (scan_of() % 2 if dtype == "?" else scan_of()).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    dataset = converted(tmp_path / "a.npy", out)
    np.testing.assert_array_equal(dataset.intensity.values, values)
    assert dataset.intensity.dtype == (np.uint8 if dtype == "?" else np.dtype(dtype).newbyteorder("="))


def test_npy__fortran_order_and_stack(tmp_path, out):
    np.save(tmp_path / "f.npy", np.asfortranarray(scan_of()))
    np.testing.assert_array_equal(converted(tmp_path / "f.npy", out).intensity.values, scan_of())
    np.save(tmp_path / "s.npy", scan_of().reshape(24, 8, 10))
    dataset = converted(tmp_path / "s.npy", out, scan_shape=(4, 6), overwrite=True)
    np.testing.assert_array_equal(dataset.intensity.values, scan_of())


def test_npy__truncated(tmp_path, out):
    np.save(tmp_path / "a.npy", scan_of())
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-100])
    with pytest.raises(ValueError, match="NumPy file that cannot be read .*is it complete"):
        convert(tmp_path / "a.npy", out)


def test_npy__five_dimensions_and_complex_values_are_refused(tmp_path, out):
    np.save(tmp_path / "a.npy", np.zeros((2, 2, 2, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"array of shape \(2, 2, 2, 4, 4\); needed is"):
        convert(tmp_path / "a.npy", out)
    np.save(tmp_path / "c.npy", np.zeros((2, 2, 4, 4), complex))
    with pytest.raises(ValueError, match="complex128 values"):
        convert(tmp_path / "c.npy", out)


def test_raw__shape_dtype_and_offset_are_given(tmp_path, out):
    values = scan_of(dtype=">u2")
    (tmp_path / "a.bin").write_bytes(b"header." + values.tobytes())
    layout = {"dtype": ">u2", "detector_shape": (8, 10), "offset": 7}
    dataset = converted(tmp_path / "a.bin", out, scan_shape=(4, 6), **layout)
    np.testing.assert_array_equal(dataset.intensity.values, values)
    with pytest.raises(ValueError, match=r"has 25 positions, but a.bin holds 24 frames"):
        convert(tmp_path / "a.bin", out, scan_shape=(5, 5), **layout, overwrite=True)
    with pytest.raises(ValueError, match="stack of 24 frames .*4,6 or 3,8 or 2,12"):
        convert(tmp_path / "a.bin", out, **layout, overwrite=True)


def test_raw__a_size_that_does_not_fit_is_refused(tmp_path, out):
    (tmp_path / "a.bin").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="not a whole number: it is truncated, or --dtype"):
        convert(tmp_path / "a.bin", out, dtype="u2", detector_shape=(8, 10))
    with pytest.raises(ValueError, match="give its dtype too"):
        convert(tmp_path / "a.bin", out, detector_shape=(8, 10))


def test_zarr__any_array_of_format_3_and_a_datacube(tmp_path, out):
    group = zarr.create_group(tmp_path / "a.zarr")
    array = group.create_array("scan/counts", shape=(4, 6, 8, 10), chunks=(1, 1, 4, 5), dtype="u2")
    array[...] = scan_of()
    first = converted(tmp_path / "a.zarr", out, scan_step=(2.0, "nm"), q_pixel=0.01, beam_energy_keV=120)
    np.testing.assert_array_equal(first.intensity.values, scan_of())
    second = converted(out, tmp_path / "again.zarr")
    np.testing.assert_array_equal(second.intensity.values, scan_of())
    assert steps(second) == steps(first)
    np.testing.assert_allclose(second.qy, first.qy, atol=1e-12)
    assert second.attrs["beam_energy_keV"] == 120


# ---- what is unknown, and what cannot be


@pytest.mark.parametrize("name", ["notes.txt", "empty.dm4", "none.mib"])
def test_unknown__is_refused_in_a_sentence(tmp_path, out, name):
    contents = {"notes.txt": "some words", "empty.dm4": "", "none.mib": "MQ1,broken"}
    (tmp_path / name).write_text(contents[name])
    with pytest.raises(ValueError, match="none of the known formats|is empty|damaged Merlin header"):
        convert(tmp_path / name, out)
    assert not out.exists()


def test_missing_source__is_said(tmp_path, out):
    with pytest.raises(FileNotFoundError, match="no file or folder .*none.dm4"):
        convert(tmp_path / "none.dm4", out)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "scan.mib").touch()
    with pytest.raises(ValueError, match=r"no Zarr store; give one of the files in it, such as scan\.mib"):
        convert(tmp_path / "folder", out)


def test_truncated_dm3__is_found_before_anything_is_written(test_data, tmp_path, out):
    data = (test_data / "nbed/dd020.dm3").read_bytes()
    (tmp_path / "cut.dm3").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.dm3 .*cannot be read.*is the file complete"):
        convert(tmp_path / "cut.dm3", out)
    assert [p.name for p in tmp_path.iterdir()] == ["cut.dm3"]


def test_without_rosettasciio__the_command_to_install_it_is_named(test_data, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "rsciio.digitalmicrograph", None)
    with pytest.raises(ImportError, match=r"pip install 'fcunet\[io\]'"):
        convert(test_data / "nbed/dd020.dm3", out)


def test_nan__is_kept_counted_and_dead_pixels_masked(tmp_path, out, caplog):
    values = scan_of(dtype=np.float32)
    values[:, :, 2, 3] = np.nan  # dead
    values[1, 1, 5, 5] = np.nan  # once
    values[3, 3] = np.nan  # a lost frame says nothing of the pixels
    np.save(tmp_path / "a.npy", values)
    dataset = converted(tmp_path / "a.npy", out)
    np.testing.assert_array_equal(dataset.intensity.values, values)
    assert dataset.intensity.attrs["n_nan"] == int(np.isnan(values).sum())
    assert np.argwhere(~dataset.detector_mask.values).tolist() == [[2, 3]]
    assert "1 detector pixels are NaN at every position" in caplog.text


def test_cast__refuses_fractions_and_negative_counts(tmp_path, out):
    for n, value in enumerate((0.5, -3)):
        values = scan_of(dtype=np.float32)
        values[0, 0, 0, 0] = value
        np.save(tmp_path / f"{n}.npy", values)
        with pytest.raises(ValueError, match="which uint16 cannot hold"):
            convert(tmp_path / f"{n}.npy", tmp_path / f"{n}.zarr", dtype="uint16", progress=False)
    np.save(tmp_path / "a.npy", scan_of(dtype=np.float32))
    assert converted(tmp_path / "a.npy", out, dtype="uint16").intensity.dtype == np.uint16


def test_given_calibration__wins_and_nonsense_is_refused(tmp_path, out):
    np.save(tmp_path / "a.npy", scan_of())
    dataset = converted(
        tmp_path / "a.npy",
        out,
        scan_step=(20.0, "angstrom"),
        q_pixel=(0.5, "mrad"),
        beam_energy_keV=300,
        convergence_semiangle_mrad=1.5,
    )
    assert steps(dataset)["scan_y"] == (pytest.approx(2.0), "nm")
    assert steps(dataset)["qx"] == (pytest.approx(0.5e-3 / 0.0196875, rel=1e-5), "1/angstrom")
    assert float(dataset.qx[5]) == pytest.approx(0)
    assert dataset.attrs["convergence_semiangle_mrad"] == 1.5
    for options, words in (
        ({"q_pixel": (0.5, "mrad")}, "needs the beam energy"),
        ({"scan_step": (1e17, "nm")}, "makes no sense"),
        ({"scan_step": -1.0}, "makes no sense"),
        ({"q_pixel": (1.0, "furlong")}, "neither an inverse length nor an angle"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(tmp_path / "a.npy", out, overwrite=True, **options)


def test_file_calibration__nonsense_is_left_out_and_reported(tmp_path, out, caplog):
    axes = [dict(axis) for axis in AXES]
    axes[2]["scale"] = axes[3]["scale"] = 1e17
    dataset = converted(zspy(tmp_path / "a.zspy", scan_of(), axes), out)
    assert_uncalibrated(dataset, "qy", "qx")
    assert steps(dataset)["scan_y"] == (pytest.approx(1.5), "nm")
    assert "makes no sense" in caplog.text


def test_probe__from_array_or_file_of_one_pattern(tmp_path, out, test_data):
    np.save(tmp_path / "a.npy", scan_of())
    probe = np.random.default_rng(0).random((8, 10)).astype(np.float32)
    np.save(tmp_path / "probe.npy", probe)
    np.testing.assert_array_equal(
        converted(tmp_path / "a.npy", out, probe=tmp_path / "probe.npy").probe, probe
    )
    with pytest.raises(ValueError, match=r"probe dd020.dm3 is \(256, 256\) px, the patterns are \(8, 10\)"):
        convert(tmp_path / "a.npy", out, probe=test_data / "nbed/dd020.dm3", overwrite=True)
    with pytest.raises(ValueError, match="must be one pattern"):
        convert(tmp_path / "a.npy", out, probe=tmp_path / "a.npy", overwrite=True)


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        ("$A^{-1}$", 1),
        ("1/nm", 0.1),
        ("nm^-1", 0.1),
        ("1 / Å", 1),
        ("Å⁻¹", 1),
        ("[nm^-1]", 0.1),
        ("1/angstrom", 1),
        ("1/pm", 100),
    ],
)
def test_units__inverse_lengths_as_vendors_spell_them(text, factor):
    assert to_inverse_angstrom(2.0, text) == pytest.approx(2.0 * factor)


@pytest.mark.parametrize(
    ("text", "factor"), [("nm", 1), ("µm", 1e3), ("um", 1e3), ("Å", 0.1), ("A", 0.1), ("m", 1e9)]
)
def test_units__lengths(text, factor):
    assert to_nm(2.0, text) == pytest.approx(2.0 * factor)
    with pytest.raises(ValueError, match="not a length"):
        to_nm(1.0, "1/" + text)


def test_units__wavelength_is_that_of_the_tables():
    # angstrom, e.g. Reimer & Kohl, Transmission Electron Microscopy, table 2.2
    for energy, expected in ((80, 0.041757), (200, 0.025079), (300, 0.019687)):
        assert wavelength(energy) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="must be positive"):
        wavelength(0)


# ---- plan, resume, memory


def test_dry_run__writes_nothing_and_reads_as_a_table(test_data, out):
    plan = convert(test_data / "sped/test1.blo", out, dry_run=True)
    assert isinstance(plan, Plan)
    assert list(out.parent.iterdir()) == []
    text = str(plan)
    for words in (
        "test1.blo: NanoMEGAS blockfile, read by rosettasciio",
        "3 x 2 positions",
        "144 x 144 px, uint8",
    ):
        assert words in text
    assert "12.8 nm per step" in text
    assert "not calibrated (px)" in text


def test_existing_store__is_kept_unless_told(tmp_path, out):
    np.save(tmp_path / "a.npy", scan_of(seed=1))
    convert(tmp_path / "a.npy", out, progress=False)
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(tmp_path / "a.npy", out, progress=False)
    np.save(tmp_path / "a.npy", scan_of(seed=2))
    dataset = converted(tmp_path / "a.npy", out, overwrite=True)
    np.testing.assert_array_equal(dataset.intensity.values, scan_of(seed=2))


def shards(path):
    return {p.relative_to(path): p.read_bytes() for p in (path / "intensity" / "c").rglob("*") if p.is_file()}


SLOW = """
import sys, time
from fcunet.readers.base import Scan
from fcunet.convert import convert
read = Scan.__getitem__
Scan.__getitem__ = lambda self, region: (time.sleep(0.2), read(self, region))[1]
convert(sys.argv[1], sys.argv[2], progress=False)
"""


def whole_shards(path):
    """Names of those that are not being written just now: until one is whole it has another name."""
    return [p for p in (path / "intensity" / "c").rglob("*") if p.is_file() and ".partial" not in p.suffixes]


def test_killed__goes_on_with_the_same_call_and_ends_with_the_same_bytes(tmp_path, out):
    values = scan_of((16, 16, 32, 32), np.float32)
    values[0, 0, 3, 3] = np.nan  # counted although its block was written before the kill
    np.save(tmp_path / "a.npy", values)
    process = subprocess.Popen([sys.executable, "-c", SLOW, tmp_path / "a.npy", out])
    partial = out.with_name("out.zarr.partial")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (partial.exists() and len(whole_shards(partial)) >= 2):
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {p.relative_to(partial): p.read_bytes() for p in whole_shards(partial)}
    assert 2 <= len(before) < 8
    assert not out.exists()
    dataset = converted(tmp_path / "a.npy", out)
    assert dataset.intensity.attrs["n_nan"] == 1
    convert(tmp_path / "a.npy", tmp_path / "whole.zarr", progress=False)
    after = shards(out)
    assert after == shards(tmp_path / "whole.zarr")
    assert all(after[name] == data for name, data in before.items())


def test_partial__of_a_changed_file_is_not_continued(tmp_path, out):
    np.save(tmp_path / "a.npy", scan_of(seed=1))
    plan = convert(tmp_path / "a.npy", out, dry_run=True)
    store.DatacubeWriter(out, plan.shape, plan.dtype, attrs={"source_fingerprint": "other"})
    with pytest.raises(ValueError, match="beginning of another conversion .*rm -r"):
        convert(tmp_path / "a.npy", out, progress=False)


PEAK = """
import resource, sys
from fcunet.convert import convert
convert(sys.argv[1], sys.argv[2], progress=False, scan_shape=(256, 64), detector_shape=(256, 256), dtype="u2")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory__does_not_grow_with_the_scan(tmp_path, out):
    tile = np.random.default_rng(0).integers(0, 4096, (64, 256, 256), dtype=np.uint16)
    with (tmp_path / "a.raw").open("wb") as stream:
        for _ in range(256):
            stream.write(tile.tobytes())  # 2.1 GB
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "a.raw", out], capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 1500  # MiB, of which the imports take about 300
    np.testing.assert_array_equal(store.open_datacube(out).intensity[200].values, tile)


# ---- readers, in parts


def test_stacked__is_one_stack():
    parts = [scan_of((n, 3, 4), seed=n) for n in (3, 1, 5)]
    stacked, whole = Stacked(parts), np.concatenate(parts)
    for key in (slice(0, 9), slice(2, 4), slice(3, 8, 2), slice(5, 5)):
        np.testing.assert_array_equal(stacked[key], whole[key])
    np.testing.assert_array_equal(stacked[8], whole[8])


def test_frames__read_what_is_asked(tmp_path):
    values = scan_of((7, 4, 5))
    (tmp_path / "a").write_bytes(b"xx" + values.tobytes())
    frame = np.dtype([("data", "u2", (4, 5))])
    frames = Frames(tmp_path / "a", frame, 7, offset=2, rows=slice(None, None, -1))
    np.testing.assert_array_equal(frames[2:6], values[2:6, ::-1])
    np.testing.assert_array_equal(frames[3], values[3, ::-1])
    np.testing.assert_array_equal(frames[-1], values[-1, ::-1])
    assert frames[4:4].shape == (0, 4, 5)


def test_scan__gives_the_same_regions_whatever_the_file_holds():
    values = scan_of()
    path = Path("a")
    scans = [
        Scan(Source(path, "f", values)),
        Scan(Source(path, "f", values.reshape(24, 8, 10)), (4, 6)),
        Scan(Source(path, "f", values.reshape(2, 12, 8, 10)), (4, 6)),
    ]
    for scan in scans:
        for region in ((slice(1, 3), slice(0, 6)), (slice(0, 4), slice(2, 5)), (slice(3, 4), slice(5, 6))):
            np.testing.assert_array_equal(scan[region], values[region])


def test_readers__say_how_the_rows_lie(test_data, merlin):
    flipped = open_source(merlin / "001_4x2_6bit.mib").handedness
    kept = open_source(test_data / "formats/emd/py4DSTEM_size2x3x4x5.h5").handedness
    assert flipped.startswith("rows flipped by reader")
    assert kept.startswith("rows as stored")


def test_attributes__are_plain_and_name_no_folder(test_data, out):
    dataset = converted(test_data / "sped/test1.blo", out)
    text = json.dumps(dataset.attrs)
    assert os.fspath(test_data) not in text
    assert dataset.attrs["source_file"] == "test1.blo"
    assert dataset.attrs["source_fingerprint"].startswith("128564-")


def test_notes__go_to_the_log_not_to_standard_output(test_data, out, capsys, caplog):
    with caplog.at_level(logging.WARNING):
        convert(test_data / "sped/test1.blo", out)
    assert capsys.readouterr().out == ""
    assert "test1.blo: qy and qx left uncalibrated" in caplog.text

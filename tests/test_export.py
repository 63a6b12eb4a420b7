"""Files for other programs: tables, NetCDF, py4DSTEM; whole or not at all."""

import json

import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from test_pipeline_strain import make_peaks

from fcunet import schema
from fcunet.export import export, py4dstem_strain
from fcunet.pipeline import compute_strain, fit_lattice
from fcunet.readers import open_source
from fcunet.readers.bragg import read_peaks
from fcunet.readers.maps import read_maps


@pytest.fixture(scope="module")
def peaks():
    peaks = make_peaks(noise=0.1)
    empty = peaks.where(peaks["scan_y"] > 0).assign(n_peaks=peaks["n_peaks"])  # no peaks in the first row
    return empty.assign_coords(
        {dim: peaks[dim].assign_attrs(units="nm") for dim in schema.SCAN_DIMS}
    ).assign_attrs(peaks.attrs)


@pytest.fixture(scope="module")
def results(peaks):
    lattice = fit_lattice(peaks)
    strain = compute_strain(lattice, reference=(1, 8, 0, 3), rotation_degree=20)
    q = np.arange(256) * 0.01
    coords = {dim: (dim, q, {"units": "1/angstrom"}) for dim in schema.PATTERN_DIMS}
    mean = xr.DataArray(np.zeros((256, 256), np.float32), coords, schema.PATTERN_DIMS)
    tree = xr.DataTree.from_dict(
        {
            "/strain": strain.drop_vars("F"),
            "/lattice": lattice.assign(F=strain["F"]),
            "/diffraction": xr.Dataset({"mean": mean}),
        }
    )
    tree.attrs = schema.format_attrs("results") | {
        "done": True,
        "config": {"a": [1, {"b": 2}]},
        "names": ["x", "y"],
    }
    return tree


def test_csv__has_a_line_per_position_with_units_and_empty_cells(tmp_path, results):
    path = export(results, tmp_path / "strain.csv")
    table = pd.read_csv(path)
    assert len(table) == 80
    assert list(table.columns[:8]) == [
        "row",
        "column",
        "scan_y_nm",
        "scan_x_nm",
        "e_xx",
        "e_yy",
        "e_xy",
        "theta_rad",
    ]
    assert table["e_xx"].isna().sum() == 10
    np.testing.assert_allclose(table["e_xx"].values.reshape(8, 10), results["strain/e_xx"], rtol=1e-6)
    last = table.iloc[-1]
    assert (last["row"], last["column"], last["scan_y_nm"], last["g1_qy_px"]) == (
        7, 9, 14.0, pytest.approx(float(results["lattice/g1_qy"][7, 9])),
    )  # fmt: skip


def test_csv__of_peaks_has_a_line_per_peak(tmp_path, peaks):
    table = pd.read_csv(export(peaks.chunk(scan_y=3), tmp_path / "peaks.csv"))
    assert len(table) == int(peaks["peak_qy"].notnull().sum())
    first = table.iloc[0]
    assert (first["row"], first["column"], first["peak"]) == (1, 0, 0)
    assert first["peak_qx_px"] == pytest.approx(float(peaks["peak_qx"][1, 0, 0]))


def test_netcdf__keeps_groups_values_units_and_missing_values(tmp_path, results):
    path = export(results, tmp_path / "strain.nc", to="netcdf")
    with xr.open_datatree(path) as found:
        for group in ("strain", "lattice"):
            xr.testing.assert_equal(found[group].dataset.load(), results[group].dataset)
        assert found["strain/theta"].attrs["units"] == "rad"
        assert found["strain"].dataset["valid"].dtype == bool
        assert found.attrs["done"] == 1
        assert json.loads(found.attrs["config"]) == {"a": [1, {"b": 2}]}


def test_py4dstem__layout_is_emd_1(tmp_path, results):
    h5py = pytest.importorskip("h5py")
    path = export(results, tmp_path / "strain.h5", to="py4dstem")
    with h5py.File(path) as file:
        assert file.attrs["emd_group_type"] == "file"
        assert (file.attrs["version_major"], file.attrs["version_minor"]) == (1, 0)
        node = file["fcunet_root/strain"]
        assert (node.attrs["emd_group_type"], node.attrs["python_class"]) == ("array", "RealSlice")
        assert node["data"].shape == (9, 8, 10)
        assert node["dim2"].attrs["name"] == "_labels_"
        labels = [label.decode() for label in node["dim2"][()]]
        assert labels[:5] == ["e_xx", "e_yy", "e_xy", "theta", "mask"]
        calibration = file["fcunet_root/metadatabundle/calibration"]
        assert calibration["R_pixel_size"][()] == 2.0
        assert calibration["R_pixel_units"][()] == b"nm"
        assert calibration["Q_pixel_size"][()] == pytest.approx(0.01)
        assert calibration["Q_pixel_units"][()] == b"A^-1"
        assert calibration["QR_rotation"][()] == pytest.approx(np.deg2rad(20))
        assert calibration["Q_pixel_size"].attrs["type"] == "number"
        np.testing.assert_allclose(calibration["qx0"][1:], results["lattice/origin_qy"][1:])


def test_py4dstem__strain_is_in_their_axes_and_definition(results):
    """Their x is our y; a stretch s along it is 1 - 1/s; their rotation is the same number."""
    F = np.tile(np.diag([1.02, 1.0]), (8, 10, 1, 1))
    lattice = fit_lattice(make_peaks(F=F))
    strain = compute_strain(lattice, reference=((1.5, 31.0), (27.0, 4.0)))
    slices = py4dstem_strain(xr.DataTree.from_dict({"strain": strain, "lattice": lattice}))
    np.testing.assert_allclose(slices["e_xx"], 1 - 1 / 1.02, atol=1e-9)
    np.testing.assert_allclose(slices["e_yy"], 0, atol=1e-9)
    np.testing.assert_array_equal(slices["e_xx_std"], strain["e_yy_std"])
    whole = py4dstem_strain(results)
    assert whole["mask"].sum() == 70
    np.testing.assert_allclose(whole["theta"], results["strain/theta"], atol=2e-3)  # to first order


def test_py4dstem__strain_is_free_of_the_distortion_of_the_detector():
    lattice = fit_lattice(make_peaks(F=np.tile(np.array([[1.0, 0.02], [-0.02, 1.0]]), (8, 10, 1, 1))))
    lattice.attrs |= {"ellipse_ratio": 1.06, "ellipse_angle_degree": 25.0}
    strain = compute_strain(lattice, reference=((1.5, 31.0), (27.0, 4.0)))
    slices = py4dstem_strain(xr.DataTree.from_dict({"strain": strain, "lattice": lattice}))
    # definitions differ to second order in 20 mrad, 4e-4; a distortion of 6 % left in would add 1e-3
    for theirs, ours in (("e_xx", "e_yy"), ("e_yy", "e_xx"), ("e_xy", "e_xy")):
        np.testing.assert_allclose(slices[theirs], strain[ours], atol=9e-4)


def test_py4dstem__peaks_come_back_as_they_were(tmp_path, peaks):
    pytest.importorskip("h5py")
    found = read_peaks(export(peaks.chunk(scan_y=3, scan_x=4), tmp_path / "peaks.h5", to="py4dstem"))
    schema.check_peaks(found)
    n = found.sizes["peak"]
    for name in ("peak_qy", "peak_qx", "peak_intensity"):
        np.testing.assert_allclose(found[name], peaks[name].values[..., :n].astype(np.float32))
    assert found["n_peaks"].values[0].tolist() == [0] * 10
    assert found.attrs["detector_shape"] == [256, 256]
    assert found["scan_x"].values[-1] == 18.0
    np.testing.assert_allclose(
        fit_lattice(found)["g1_qx"], fit_lattice(peaks, weighting="uniform")["g1_qx"], atol=0.2
    )


def test_export__replaces_nothing_unless_told_to(tmp_path, results):
    path = tmp_path / "strain.csv"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(results, path)
    assert path.read_text() == "mine"
    export(results, path, overwrite=True)
    assert path.read_text().startswith("row,column")


def test_export__leaves_nothing_behind_when_it_fails(tmp_path, results, monkeypatch):
    def full_disk(path, *_):
        path.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr("fcunet.export.write_emd", full_disk)
    (tmp_path / "old.h5").write_text("old")
    with pytest.raises(OSError, match="No space left"):
        export(results, tmp_path / "old.h5", to="py4dstem", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["old.h5"]
    assert (tmp_path / "old.h5").read_text() == "old"


def test_export__takes_the_format_from_the_ending(tmp_path, results):
    assert xr.open_datatree(export(results, tmp_path / "a.nc"))["strain/e_xx"].shape == (8, 10)
    assert h5py.is_hdf5(export(results, tmp_path / "a.EMD"))
    assert export(results, tmp_path / "a.csv").read_text().startswith("row,column")
    assert export(results, tmp_path / "a.table", to="csv").read_text().startswith("row,column")
    with pytest.raises(ValueError, match=r"a\.dat stands for no format; use one of \.csv, .*--to csv"):
        export(results, tmp_path / "a.dat")
    assert not (tmp_path / "a.dat").exists()


def test_export__says_what_is_wrong(tmp_path, results, peaks):
    with pytest.raises(ValueError, match="choose one of csv, parquet, netcdf, py4dstem, zspy"):
        export(results, tmp_path / "a.mat", to="matlab")
    with pytest.raises(FileNotFoundError, match="mkdir -p"):
        export(results, tmp_path / "missing" / "a.csv")
    with pytest.raises(FileExistsError, match="is a folder"):
        export(results, tmp_path)
    with pytest.raises(ValueError, match="has no peaks"):
        export(results, tmp_path / "a.csv", what="peaks")


@pytest.fixture(scope="module")
def cube():
    """A small calibrated scan, every side of another length, in blocks."""
    rng = np.random.default_rng(4)
    data = rng.poisson(3.0, (4, 6, 10, 12)).astype(np.uint16)
    steps = {
        "scan_y": (2.0, "nm"),
        "scan_x": (2.0, "nm"),
        "qy": (0.02, "1/angstrom"),
        "qx": (0.02, "1/angstrom"),
    }
    coords = {
        dim: (dim, step * np.arange(n), {"units": unit})
        for (dim, (step, unit)), n in zip(steps.items(), data.shape, strict=True)
    }
    cube = xr.Dataset({"intensity": (schema.DATACUBE_DIMS, data)}, coords)
    cube["probe"] = (schema.PATTERN_DIMS, rng.random((10, 12)).astype(np.float32))
    cube["origin_qy"] = (schema.SCAN_DIMS, rng.normal(5, 0.1, (4, 6)))
    cube["origin_qx"] = (schema.SCAN_DIMS, rng.normal(6, 0.1, (4, 6)))
    cube.attrs = {"title": "small", "beam_energy_keV": 200.0, "scan_rotation_degree": 30.0}
    cube.attrs |= {"ellipse_ratio": 1.02, "ellipse_angle_degree": 20.0, "scan_transposed": 1}
    return cube.chunk(scan_y=2, scan_x=3)


def test_py4dstem__datacube_comes_back_with_its_calibration(tmp_path, cube):
    pytest.importorskip("h5py")
    source = open_source(export(cube, tmp_path / "cube.h5", to="py4dstem"))
    np.testing.assert_array_equal(source.data[()], cube["intensity"])
    assert {dim: (axis.step, axis.units) for dim, axis in source.axes.items()} == {
        "scan_y": (2.0, "nm"), "scan_x": (2.0, "nm"), "qy": (0.02, "A^-1"), "qx": (0.02, "A^-1"),
    }  # fmt: skip
    np.testing.assert_allclose(source.variables["probe"], cube["probe"])
    np.testing.assert_allclose(source.variables["origin_qx"], cube["origin_qx"])
    for name in schema.GEOMETRY_ATTRS:
        assert source.attrs[name] == pytest.approx(cube.attrs[name])


def test_zspy__datacube_comes_back_and_hyperspy_reads_it(tmp_path, cube):
    reader = pytest.importorskip("rsciio.zspy").file_reader
    path = export(cube, tmp_path / "cube.zspy", to="zspy")
    source = open_source(path)
    np.testing.assert_array_equal(source.data[:], cube["intensity"])
    assert source.axes["qx"].step == pytest.approx(0.02)
    assert source.attrs["beam_energy_keV"] == 200
    (signal,) = reader(path, lazy=True)
    np.testing.assert_array_equal(np.asarray(signal["data"]), cube["intensity"])
    assert [axis["navigate"] for axis in signal["axes"]] == [True, True, False, False]
    assert [axis["name"] for axis in signal["axes"]] == ["y", "x", "ky", "kx"]
    assert signal["metadata"]["Signal"]["signal_type"] == "electron_diffraction"


def test_zspy__holds_a_signal_per_map(tmp_path, results):
    reader = pytest.importorskip("rsciio.zspy").file_reader
    path = export(results, tmp_path / "strain.zspy", to="zspy")
    found = {signal["metadata"]["General"]["title"]: signal for signal in reader(path)}
    np.testing.assert_array_equal(found["e_xx"]["data"], results["strain/e_xx"])
    assert found["theta"]["metadata"]["Signal"]["quantity"] == "theta (rad)"
    assert found["g1_qy"]["axes"][0]["scale"] == 2.0
    assert "covariance" not in found
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(results, path, to="zspy")
    export(results, path, to="zspy", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["strain.zspy"]


def test_parquet__is_the_table_with_types_and_attributes(tmp_path, results):
    pq = pytest.importorskip("pyarrow.parquet")
    path = export(results, tmp_path / "strain.parquet", to="parquet")
    table = pd.read_parquet(path)
    assert table.shape == pd.read_csv(export(results, tmp_path / "strain.csv")).shape
    np.testing.assert_array_equal(table["e_xx"].values.reshape(8, 10), results["strain/e_xx"])
    facts = json.loads(pq.read_schema(path).metadata[b"fcunet"])
    assert facts["reference"] == results["strain"].attrs["reference"]


def test_export__refuses_a_table_of_a_datacube(tmp_path, cube):
    with pytest.raises(ValueError, match="choose py4dstem or zspy"):
        export(cube, tmp_path / "a.csv")


def test_read_maps__brings_exported_strain_back_under_our_names(tmp_path, results):
    pytest.importorskip("h5py")
    found = read_maps(export(results, tmp_path / "strain.h5", to="py4dstem"))
    expected = compute_strain(
        results["lattice"].to_dataset(), reference=(1, 8, 0, 3), rotation_degree=20, convention="py4dstem"
    )
    for name in ("e_xx", "e_yy", "e_xy", "theta"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-12)
    np.testing.assert_array_equal(found["e_yy_std"], results["strain/e_yy_std"])
    np.testing.assert_array_equal(found["valid"], results["strain/valid"])
    assert found["scan_y"].values[1] == 2.0
    assert found.attrs["convention"] == "py4dstem"


def test_read_maps__masks_what_py4dstem_left_at_one_and_drops_its_error(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        node = file.create_group("strain_root/strain")
        node.attrs["python_class"] = "StrainMap"
        stack = np.ones((6, 2, 3))
        stack[4, 0, 1] = 0
        node["data"] = stack
        labels = [b"e_xx", b"e_yy", b"e_xy", b"theta", b"mask", b"error"]
        node.create_dataset("dim2", data=np.array(labels))
    found = read_maps(tmp_path / "theirs.h5")
    assert "error" not in found
    assert int(found["e_xx"].isnull().sum()) == 1
    assert found["scan_x"].attrs["units"] == "px"
    with pytest.raises(ValueError, match="strain_root/strain; choose one"):
        read_maps(tmp_path / "theirs.h5", "other")

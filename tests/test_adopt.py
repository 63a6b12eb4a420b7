"""Peaks found by other programs: py4DSTEM's formats, tables, and strain from them."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from test_pipeline_strain import make_peaks
from typer.testing import CliRunner

from fcunet import schema
from fcunet.adopt import adopt_peaks, strain_from_file
from fcunet.cli import app
from fcunet.export import export
from fcunet.kernels.ellipse import Ellipse, undistort
from fcunet.pipeline import compute_strain, fit_lattice
from fcunet.readers.bragg import geometry_from_py4dstem, read_peaks

h5py = pytest.importorskip("h5py")
RECORD = np.dtype([("qx", "f8"), ("qy", "f8"), ("intensity", "f8")])


@pytest.fixture(scope="module")
def peaks():
    """Strained peaks in the first rows of an otherwise empty scan; origins as in a descanned scan."""
    peaks = make_peaks(noise=0.05)
    return peaks.where(peaks["scan_y"] > 0).assign(n_peaks=peaks["n_peaks"]).assign_attrs(peaks.attrs)


def write_records(group, peaks):
    """Peaks as py4DSTEM of any version keeps them: records per scan position."""
    data = group.create_dataset("data", peaks["n_peaks"].shape, dtype=h5py.vlen_dtype(RECORD))
    values = [peaks[name].values for name in ("peak_qy", "peak_qx", "peak_intensity")]
    for at in np.ndindex(data.shape):
        kept = np.isfinite(values[0][at])
        record = np.empty(kept.sum(), RECORD)
        for name, value in zip(RECORD.names, values, strict=True):
            record[name] = value[at][kept]
        data[at] = record


def write_0_13(path, peaks):
    """The layout of py4DSTEM 0.13."""
    with h5py.File(path, "w") as file:
        root = file.create_group("4DSTEM")
        root.attrs.update(emd_group_type="root", version_major="0", version_minor="13", version_release="17")
        vectors = root.create_group("braggvectors")
        vectors.attrs.update(emd_group_type=4, py4dstem_class="BraggVectors")
        for name, shift in (("_v_uncal", 0.0), ("_v_cal", 99.0)):
            write_records(vectors.create_group(name), peaks.assign(peak_qy=peaks["peak_qy"] + shift))
        vectors["_metadata/braggvectors/Qshape"] = (256, 250)
        calibration = vectors.create_group("calibration")
        calibration.attrs["py4dstem_class"] = "Calibration"
        facts = {"Q_pixel_size": 0.2, "Q_pixel_units": b"1/nm", "R_pixel_size": 2.5, "R_pixel_units": b"nm"}
        facts |= {"qx0": np.full((8, 10), 127.0), "qy0_mean": 128.5, "QR_flip": b"_None"}
        for name, value in facts.items():
            calibration[name] = value


def write_0_12(path, peaks):
    """The layout of py4DSTEM 0.12: a raw list beside a corrected copy."""
    with h5py.File(path, "w") as file:
        root = file.create_group("4DSTEM_experiment")
        root.attrs.update(emd_group_type=2, version_major="0", version_minor="12", version_release="24")
        for name, shift in (("braggpeaks_raw", 0.0), ("braggpeaks_cal", 99.0)):
            group = root.create_group(f"data/pointlistarrays/{name}")
            write_records(group, peaks.assign(peak_qy=peaks["peak_qy"] + shift))
        place = root.create_group("data/coordinates/coordinates_0")
        facts = {"Q_Nx": 256, "Q_Ny": 250, "R_pixel_size": 25.0, "R_pixel_units": "A", "QR_rotation": 0.1}
        for name, value in (facts | {"QR_flip": True}).items():
            place[name] = value


@pytest.mark.parametrize("write", [write_0_13, write_0_12])
def test_read_peaks__knows_old_formats_of_py4dstem(tmp_path, peaks, write):
    write(tmp_path / "old.h5", peaks)
    found = read_peaks(tmp_path / "old.h5")
    schema.check_peaks(found)
    n = found.sizes["peak"]
    for name in ("peak_qy", "peak_qx", "peak_intensity"):
        np.testing.assert_array_equal(found[name], peaks[name].values[..., :n].astype(np.float32))
    assert found["n_peaks"].values[0].max() == 0
    assert found.attrs["detector_shape"] == [256, 250]
    assert found["scan_x"].values[1] == pytest.approx(2.5)
    if write is write_0_13:
        assert found.attrs["q_pixel_size"] == pytest.approx(0.02)
        assert found["origin_qy"].values[3, 4] == 127
        assert found["origin_qx"].values[3, 4] == 128.5
        assert "scan_transposed" not in found.attrs
    else:
        assert found.attrs["scan_rotation_degree"] == pytest.approx(np.rad2deg(0.1))
        assert found.attrs["scan_transposed"] == 1
        assert "q_pixel_size" not in found.attrs


def test_geometry_from_py4dstem__takes_out_the_same_ellipse():
    """Their shrinking of v by b/a along (cos theta, sin theta), axes (row, column), up to the scale."""
    v = np.random.default_rng(1).normal(size=(5, 2))
    for a, b, theta in ((1.03, 1.0, 0.3), (0.98, 1.0, -0.7)):
        n = np.array([np.cos(theta), np.sin(theta)])
        theirs = v @ (np.eye(2) - (1 - b / a) * np.outer(n, n))
        g = geometry_from_py4dstem({"a": a, "b": b, "theta": theta})
        ours = undistort(v, Ellipse(g["ellipse_ratio"], g["ellipse_angle_degree"]))
        np.testing.assert_allclose(ours, theirs * np.sqrt(a / b), rtol=1e-12)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_read_peaks__takes_the_table_that_export_writes(tmp_path, peaks, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    sigma = (schema.PEAK_DIMS, np.full(peaks["peak_qy"].shape, 0.1, np.float32))
    given = peaks.assign(peak_sigma=sigma).where(peaks["peak_qy"].notnull()).assign(n_peaks=peaks["n_peaks"])
    given = given.assign_coords(scan_x=("scan_x", 0.5 * np.arange(10), {"units": "nm"}))
    found = read_peaks(export(given, tmp_path / f"peaks.{suffix}", to=suffix))
    schema.check_peaks(found)
    for name in ("peak_qy", "peak_qx", "peak_sigma"):
        n = found.sizes["peak"]
        np.testing.assert_allclose(found[name], given[name].values[..., :n], rtol=1e-6)
    assert found["scan_x"].values[-1] == pytest.approx(4.5)
    assert found["scan_x"].attrs["units"] == "nm"


def test_strain_from_file__is_that_of_the_peaks(tmp_path, peaks, blank_pictures):
    write_0_13(tmp_path / "old.h5", peaks)
    runner = CliRunner()
    out = tmp_path / "run"
    result = runner.invoke(app, ["strain", str(tmp_path / "old.h5"), "--out", str(out), "--robust"])
    assert result.exit_code == 0, result.output
    assert (out / "report.html").is_file()
    found = xr.open_datatree(out / "strain.zarr", engine="zarr", consolidated=False)
    assert found.attrs["peaks_from"] == "old.h5"
    raw = read_peaks(tmp_path / "old.h5")
    expected = compute_strain(fit_lattice(raw))
    for name in ("e_xx", "e_yy", "e_xy", "theta"):
        np.testing.assert_allclose(found["strain"][name], expected[name], atol=1e-12)
    assert "peak_sigma" not in found["virtual"].dataset
    again = strain_from_file(tmp_path / "old.h5", out=out, reference=(1, 8, 0, 3))
    assert "region 1:8,0:3" in again["strain"].attrs["reference"]


def test_adopt_peaks__keeps_what_another_file_left(tmp_path, peaks):
    write_0_13(tmp_path / "a.h5", peaks)
    write_0_12(tmp_path / "b.h5", peaks)
    adopt_peaks(tmp_path / "a.h5", tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds a run of a.h5"):
        adopt_peaks(tmp_path / "b.h5", tmp_path / "run")
    adopt_peaks(tmp_path / "b.h5", tmp_path / "run", restart=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["peaks.zarr"]


def test_read_peaks__says_what_is_wrong(tmp_path, peaks):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_peaks(tmp_path / "missing.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(ValueError, match="neither an HDF5 file"):
        read_peaks(tmp_path / "text.h5")
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    with pytest.raises(ValueError, match="holds no Bragg vectors"):
        read_peaks(tmp_path / "empty.h5")
    with h5py.File(tmp_path / "two.h5", "w") as file:
        for name in ("a", "b"):
            write_records(file.create_group(name), peaks)
    with pytest.raises(ValueError, match="a, b; choose one with --dataset"):
        read_peaks(tmp_path / "two.h5")
    assert read_peaks(tmp_path / "two.h5", "b").sizes["scan_y"] == 8
    table = pd.DataFrame({"row": [0, 1], "column": [0, 0], "qy": [3.0, 4.0]})
    table.to_csv(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="lacks peak_qx"):
        read_peaks(tmp_path / "a.csv")
    table.assign(qx=1.0, row=[0.5, 1]).to_csv(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="whole numbers from 0"):
        read_peaks(tmp_path / "a.csv")

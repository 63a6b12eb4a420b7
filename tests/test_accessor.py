"""``.fcunet`` on datasets and trees says what the functions of the package say."""

import numpy as np
import pytest
import xarray as xr

import fcunet
from fcunet.store import open_peaks


@pytest.fixture(scope="module")
def tree(small_run):
    return fcunet.open_results(small_run[1])


def test_plot__suits_what_the_dataset_holds(tree, small_run):
    for dataset in (
        *(tree[g].to_dataset() for g in ("strain", "virtual", "diffraction")),
        fcunet.open(small_run[0]),
        open_peaks(small_run[1] / "peaks.zarr"),
    ):
        assert dataset.fcunet.plot().axes
    with pytest.raises(ValueError, match="no figure for a"):
        xr.Dataset({"a": 1}).fcunet.plot()


def test_at__gives_pattern_peaks_and_numbers_of_one_position(tree, small_run):
    cube, peaks = fcunet.open(small_run[0]), open_peaks(small_run[1] / "peaks.zarr")
    np.testing.assert_array_equal(cube.fcunet.at(2, 3), cube["intensity"][2, 3])
    assert peaks.fcunet.at(2, 3).sizes["peak"] == int(peaks["n_peaks"][2, 3])
    assert float(tree.fcunet.at(2, 3)["strain"]["e_xx"]) == float(tree["strain"]["e_xx"][2, 3])
    with pytest.raises(ValueError, match="outside the scan of 6 x 10"):
        peaks.fcunet.at(6, 0)


def test_results__show_numbers_and_strain_in_a_notebook(tree):
    shown = tree.fcunet._repr_html_()
    assert "98.3 %" in shown  # one of 60 positions is empty
    assert "data:image/png" in shown
    assert "6 x 10" in repr(tree.fcunet)


def test_to_py4dstem__writes_the_file_of_export(tree, tmp_path):
    pytest.importorskip("h5py")
    assert tree.fcunet.to_py4dstem(tmp_path / "a.h5").stat().st_size > 0

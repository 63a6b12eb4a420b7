"""Pictures for the live map: the provisional strain is that of the results but for its zero."""

import numpy as np

from fcunet.layout import BlockGrid
from fcunet.store import open_results
from fcunet.thumbnails import find_provisional_basis, picture_side, stored_thumbnails, thumbnail
from fcunet.tiles import load_calibration, origin_of_block


def test_thumbnail__is_a_mean_of_at_most_8_x_8():
    image = np.arange(20.0 * 10).reshape(20, 10)
    small = np.array(thumbnail(image))
    assert small.shape == (7, 5)
    assert small[0, 0] == image[:3, :2].mean()


def test_picture_side__keeps_the_live_map_small_however_large_the_scan():
    assert picture_side(1024) == 8
    for n in (1, 4096, 16384, 65536, 2**18):
        assert n * picture_side(n) ** 2 <= 2**18
    assert picture_side(10**6) == 1


def test_provisional_strain__is_that_of_the_run_but_for_its_zero(small_run):
    peaks = small_run[1] / "peaks.zarr"
    strain = open_results(small_run[1])["strain"]
    grid = BlockGrid((6, 10), (6, 10))
    basis = find_provisional_basis(peaks, grid, (0, 0))
    assert basis is not None
    origin = origin_of_block(load_calibration(peaks), slice(0, 6), slice(0, 10))
    maps = stored_thumbnails(peaks, grid, (0, 0), origin, basis)
    assert maps["e_xx"][0][0] is None  # that position is empty
    found = np.array(maps["e_xx"], dtype=float)
    true = strain["e_xx"].values[:, ::2]
    difference = found - true
    # rounding to 1e-5, second order of 2 % strain, and what robust weights change, against error bars of 1e-3
    assert np.nanstd(difference) < 5e-4
    assert np.isfinite(np.array(maps["n_peaks"])).all()

"""A second opinion: how far two methods are apart, what is flagged, and what is taken instead."""

import numpy as np
import pytest
import xarray as xr
from test_pipeline_strain import G, make_peaks

from fcunet import runner, schema
from fcunet.config import Config
from fcunet.nn.range import BLUR, RADIUS, SPACING, TOO_FEW, TOO_MANY, TrainingRange, outside_training
from fcunet.pipeline import compute_strain, fit_lattice
from fcunet.results import analyse
from fcunet.second import compare_opinions, fall_back


@pytest.fixture(scope="module")
def opinions():
    """Lattice and strain twice, from two sets of noisy peaks, error bars known."""
    lattices = [fit_lattice(make_peaks(noise=0.3, seed=seed), basis=G) for seed in (1, 2)]
    return [(lattice, compute_strain(lattice, reference=G)) for lattice in lattices]


def test_compare_opinions__of_two_that_are_both_right_is_one_error_bar(opinions):
    compared = compare_opinions(opinions[0][1], opinions[1][1])
    schema.check_variables(compared, schema.SECOND)
    # three independent differences in units of their error bars: mean square 1, to sqrt(2 / 240)
    assert abs(float((compared["disagreement_sigma"] ** 2).mean()) - 1) < 4 * np.sqrt(2 / 240)
    assert compared.attrs["disagreement_share"] == 0
    difference = opinions[0][1][["e_xx", "e_yy", "e_xy"]] - opinions[1][1]
    squares = sum((difference[c] ** 2).mean() for c in difference) / 3
    assert compared.attrs["disagreement_rms"] == pytest.approx(float(np.sqrt(squares)))
    assert compared.attrs["positions"] == 80


def test_compare_opinions__sees_where_one_of_them_is_wrong(opinions):
    first, second = (strain for _, strain in opinions)
    wrong = second.assign(e_xx=second["e_xx"].where(second["scan_x"] < 16, second["e_xx"] + 0.02))
    compared = compare_opinions(first, wrong)
    assert (compared["disagreement_sigma"][:, 8:] > 3).all()
    assert compared.attrs["disagreement_share"] == pytest.approx(0.2)
    np.testing.assert_allclose(compared.attrs["difference_mean"]["e_xx"], -0.004, atol=5e-4)


def test_compare_opinions__refuses_what_cannot_be_compared(opinions):
    first, second = (strain for _, strain in opinions)
    with pytest.raises(ValueError, match="differ in measure"):
        compare_opinions(first, second.assign_attrs(measure="biot"))
    with pytest.raises(ValueError, match="positions"):
        compare_opinions(first, second.isel(scan_y=slice(0, 3)))


def test_fall_back__takes_the_second_where_the_first_is_missing_or_in_doubt(opinions):
    (lattice, strain), second = opinions
    gone = strain["scan_x"] < 4
    lattice = lattice.where(~gone).assign(n_indexed=lattice["n_indexed"])
    strain = strain.where(~gone).assign(valid=strain["valid"] & ~gone, grain=strain["grain"])
    doubt = (strain["scan_y"] > 10) & xr.ones_like(strain["e_xx"], dtype=bool)
    strain["residual_ratio"] = xr.full_like(strain["e_xx_std"], 0.7)
    merged_lattice, merged = fall_back((lattice, strain), second, doubt)
    instead = (gone | doubt).transpose("scan_y", "scan_x").values
    np.testing.assert_array_equal(merged["source"], np.where(instead, 2, 1))
    for name in ("e_xx", "theta_std", "grain"):
        expected = np.where(instead, second[1][name], opinions[0][1][name])
        np.testing.assert_array_equal(merged[name], expected)
    np.testing.assert_array_equal(merged["residual_ratio"].isnull(), instead)  # the second knows none
    np.testing.assert_array_equal(merged_lattice["covariance"][0, 0], second[0]["covariance"][0, 0])
    assert merged["valid"].all()


def test_outside_training__says_in_what():
    total = [1e5, 100.0, 1e8, np.nan]
    flag = outside_training(total, [20.0, 20.0, 20.0, np.nan], radius_px=6.0, edge_sigma_px=0.6)
    np.testing.assert_array_equal(flag, [0, TOO_FEW, TOO_MANY, 0])
    flag = outside_training(1e5, 8.0, radius_px=2.0, edge_sigma_px=3.0)
    assert flag == RADIUS + SPACING + BLUR
    narrow = TrainingRange.of_weights({"range": {"electrons": [1e4, 1e5]}})
    assert outside_training(5e3, 20.0, radius_px=6.0, edge_sigma_px=0.6, limits=narrow) == TOO_FEW


@pytest.mark.slow
def test_run__keeps_both_methods_side_by_side_on_demand(small_run, tmp_path):
    from distributed import Client

    store, _ = small_run
    settings = {"store": store, "out": tmp_path / "run", "method": "fcunet"}
    config = Config.load(**settings, second_opinion="correlation")
    with Client(
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0"
    ) as client:
        tree = runner.run(config, client=client, progress=False)
    second, strain = tree["second"].to_dataset(), tree["strain"].to_dataset()
    assert second.attrs["method"] == "correlation"
    assert second.attrs["positions"] == 59  # one pattern of 60 is empty
    # flat disks, 17 000 electrons: the two agree to a few error bars
    assert second.attrs["disagreement_sigma_median"] < 2
    assert (strain["outside_training"] == TOO_FEW).sum() <= 1  # the empty one
    assert "Second opinion: strain from correlation" in (tmp_path / "run" / "report.html").read_text()
    # no part of what makes the peaks: a run can get a second opinion later
    assert config.science_hash() == Config.load(**settings).science_hash()
    later = Config.load(**settings, second_opinion="correlation", fall_back=True)
    again = analyse(tmp_path / "run", later, say=lambda line: None)
    assert int(again["strain"]["source"].max()) in (1, 2)


def test_settings__that_make_no_sense_are_refused(small_run, tmp_path):
    store, _ = small_run
    with pytest.raises(ValueError, match="nothing to fall back on"):
        Config.load(fall_back=True)
    config = Config.load(store=store, out=tmp_path, method="correlation", second_opinion="correlation")
    with pytest.raises(ValueError, match="as the first method"):
        runner.run(config, progress=False)

"""Figures: right labels and ranges, and no failure on scans that hold nothing or one row."""

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from fcunet import plot
from fcunet.plot.patterns import lattice_angle, near_lattice
from fcunet.plot.style import round_down, round_up
from fcunet.store import load_calibration

SCAN = ("scan_y", "scan_x")
COMPONENTS = ("e_xx", "e_yy", "e_xy", "theta")


def results(ny=6, nx=9, *, missing=False, units="nm"):
    """A tree as a run leaves it, with one position without a lattice, or all."""
    rng = np.random.default_rng(3)
    lost = np.ones((ny, nx), bool) if missing else np.arange(ny * nx).reshape(ny, nx) == 4
    coords = {d: (d, 2.0 * np.arange(n), {"units": units}) for d, n in zip(SCAN, (ny, nx), strict=True)}

    def scan(values):
        return SCAN, np.where(lost, np.nan, values)

    truth = {c: 0.01 * np.broadcast_to(np.linspace(-1, 1, nx), (ny, nx)) for c in COMPONENTS}
    noisy = {c: scan(v + 1e-3 * rng.normal(size=v.shape)) for c, v in truth.items()}
    stds = {f"{c}_std": scan(np.full((ny, nx), 1e-3)) for c in COMPONENTS}
    grain = np.where(lost, 0, 1 + (np.arange(nx) > nx / 2))
    strain = xr.Dataset(noisy | stds | {"valid": (SCAN, ~lost), "grain": (SCAN, grain)}, coords)
    strain.attrs = {
        "frame": "scan",
        "reference": "all positions",
        "g1_ref_px": [3.0, 15.0],
        "g2_ref_px": [14.0, -3.0],
    }
    names = ("origin_qy", "origin_qx", "g1_qy", "g1_qx", "g2_qy", "g2_qx")
    lattice = {n: scan(np.full((ny, nx), v)) for n, v in zip(names, (31, 33, 3, 15, 14, -3), strict=True)}
    lattice |= {
        "fit_error": scan(rng.gamma(4, 0.02, (ny, nx))),
        "n_indexed": (SCAN, rng.poisson(20, (ny, nx))),
    }
    counts = {n: (SCAN, rng.normal(100, 3, (ny, nx))) for n in ("bf", "adf", "total", "com_qy", "com_qx")}
    virtual = counts | {"n_peaks": (SCAN, rng.poisson(22, (ny, nx)))}
    groups = {
        "/strain": strain,
        "/lattice": xr.Dataset(lattice, coords, {"basis_px": [[3, 15], [14, -3]], "origin_px": [31, 33]}),
        "/virtual": xr.Dataset(virtual, coords),
        "/diffraction": xr.Dataset({"bragg_vector_map": (("qy", "qx"), rng.random((64, 66)))}),
        "/truth": xr.Dataset({c: (SCAN, v) for c, v in truth.items()}, coords),
    }
    return xr.DataTree.from_dict(groups)


def texts(figure):
    return " | ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


EVERY = (
    "strain", "error_bars", "virtual", "truth", "numbers", "bragg_vector_map",
    "profile", "orientations", "grains",
)  # fmt: skip
DRAWN = [(name, "missing") for name in EVERY]
DRAWN += [pytest.param(name, "row", marks=pytest.mark.slow) for name in EVERY]
DRAWN += [
    ("profile", "map"),
    ("grains", "map"),
    ("orientations", "map"),
    ("strain", "single"),
    ("virtual", "column"),
    ("truth", "map"),
]


@pytest.mark.parametrize(("name", "kind"), DRAWN)
def test_figures__are_drawn_for_every_kind_of_scan(name, kind):
    shape = {"row": (1, 9), "column": (7, 1), "single": (1, 1)}.get(kind, (6, 9))
    figure = getattr(plot, name)(results(*shape, missing=kind == "missing"))
    assert plot.to_png(figure, dpi=40).startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", [(6, 9), (1, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["two_runs", "difference", "where_found"])
def test_figures_of_two_runs__are_drawn_for_every_kind_of_scan(name, shape):
    figure = getattr(plot, name)(results(*shape), results(*shape, missing=shape[0] == 1))
    assert plot.to_png(figure, dpi=40).startswith(b"\x89PNG")


def test_line__shows_what_a_map_would_leave_to_the_end_of_its_colours():
    tree = results(1, 9)
    tree["virtual"] = tree["virtual"].dataset.assign(bf=(SCAN, np.array([[100.0] * 8 + [900.0]])))
    low, high = plot.virtual(tree).axes[0].get_ylim()
    assert low < 100
    assert high > 900


def test_two_runs__of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="A has 6 x 9 of them and B 1 x 9"):
        plot.two_runs(results(), results(1, 9))


def test_where_found__counts_the_places():
    assert "A only: 98.1 %" in texts(plot.where_found(results(), results(missing=True)))  # 53 of 54


def test_descan__needs_a_fitted_origin_of_the_same_scan(small_run):
    calibration = load_calibration(small_run[1] / "peaks.zarr")
    with pytest.raises(ValueError, match=r"of \(6, 10\) positions, the lattice of \(6, 9\)"):
        plot.descan(calibration, results()["lattice"].dataset)
    with pytest.raises(ValueError, match="not fitted"):
        plot.descan(calibration, results(6, 10)["lattice"].dataset.assign_attrs(fit_origin=False))


def test_strain__shares_one_symmetric_range_and_says_it():
    figure = plot.strain(results())
    limits = [
        image.get_clim()
        for image in figure.findobj(lambda a: hasattr(a, "get_clim") and hasattr(a, "get_extent"))
    ]
    assert limits[0] == limits[1] == limits[2]
    assert limits[0][0] == -limits[0][1]
    assert f"{limits[0][1]:g} %" in texts(figure)


def test_strain__labels_components_scale_and_lattice():
    text = texts(plot.strain(results()))
    for word in ("varepsilon_{xx}", "theta", "degrees", "5 nm", "g_1", "g_2", "frame: scan"):
        assert word in text


def test_strain__limits_may_be_given():
    figure = plot.strain(results(), limit_percent=3.0, theta_limit=20.0, theta_unit="mrad")
    assert r"$\pm$3 % and $\pm$20 mrad" in texts(figure)


def test_strain__refuses_a_dataset_without_strain():
    with pytest.raises(ValueError, match="needs e_xx.*open_results"):
        plot.strain(xr.Dataset({"bf": (SCAN, np.zeros((2, 2)))}))


def test_strain__refuses_an_unknown_unit():
    with pytest.raises(ValueError, match="degree or mrad"):
        plot.strain(results(), theta_unit="grad")


def test_figures__missing_group_is_named():
    tree = xr.DataTree.from_dict({"/strain": results()["strain"].dataset})
    with pytest.raises(ValueError, match="no group /virtual"):
        plot.virtual(tree)


def test_truth__says_the_rms_error():
    tree = results()
    error = tree["strain"]["e_xx"].values - tree["truth"]["e_xx"].values
    assert f"rms {1e3 * np.sqrt(np.nanmean(error**2)):.2f}" in texts(plot.truth(tree))


def test_methods__names_every_detector_and_its_error():
    tree = results()
    strain = tree["strain"].dataset
    text = texts(plot.methods({"network": strain, "correlation": strain}, tree["truth"].dataset))
    assert "network" in text
    assert "correlation" in text
    assert text.count("rms error") == 8


def test_detection__marks_peaks_on_and_off_the_lattice():
    pattern = np.zeros((64, 66))
    peaks = {"peak_qy": [[31.0, 34.0, 20.0, np.nan]], "peak_qx": [[33.0, 48.0, 20.0, np.nan]]}
    lattice = dict(
        zip(
            ("origin_qy", "origin_qx", "g1_qy", "g1_qx", "g2_qy", "g2_qx"),
            (31, 33, 3, 15, 14, -3),
            strict=True,
        )
    )
    figure = plot.detection(pattern, peaks, lattice, radius_px=3)
    circles = figure.axes[0].patches
    assert len(circles) == 3
    assert [c.get_linestyle() == "solid" for c in circles] == [True, True, False]
    assert "3 peaks" in texts(figure)


def test_detection__reads_only_the_positions_asked_for():
    cube = xr.Dataset({"intensity": (("scan_y", "scan_x", "qy", "qx"), np.ones((2, 3, 16, 16)))})
    peaks = xr.Dataset({n: ((*SCAN, "peak"), np.full((2, 3, 4), 8.0)) for n in ("peak_qy", "peak_qx")})
    figure = plot.detection(cube, peaks, at=[(0, 1), (1, 2)])
    assert "scan 1, 2: 4 peaks" in texts(figure)
    with pytest.raises(ValueError, match="outside the scan of 2 x 3"):
        plot.detection(cube, peaks, at=(2, 0))


def test_near_lattice__missing_peaks_and_lattices_are_not_near():
    g = np.array([[0.0, 10.0], [10.0, 0.0]])
    assert near_lattice([5, 15.5, np.nan], [5, 5, 5], [5, 5], g).tolist() == [True, True, False]
    assert not near_lattice([5.0], [5.0], [np.nan, 5], g).any()


def test_lattice_angle__is_the_acute_one():
    assert lattice_angle([[0, 1], [1, -0.1]]) == pytest.approx(84.289, abs=1e-3)


@pytest.mark.parametrize(
    ("value", "below", "above"), [(0.9, 0.5, 1.0), (37, 20, 37), (1.2, 1, 1.5), (0.013, 0.01, 0.02)]
)
def test_round__gives_round_numbers_on_the_right_side(value, below, above):
    assert round_down(value) == pytest.approx(below)
    assert round_up(value) == pytest.approx(above)


def test_figure__shows_itself_in_a_notebook():
    assert plot.virtual(results())._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(("size", "width"), [("column", 3.35), ("page", 7.1), ("slide", 12.3)])
def test_figures__have_the_width_asked_for_and_keep_it(size, width, tmp_path):
    figure = plot.virtual(results(), size=size, theme="dark")
    assert figure.get_figwidth() <= width + 1e-6
    figure.savefig(tmp_path / "a.png", dpi=100)
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == pytest.approx(100 * figure.get_figwidth(), abs=1)


def test_figures__too_wide_for_a_column_say_so():
    with pytest.raises(ValueError, match=r"cannot be read in a column.*page"):
        plot.methods({"a": results()["strain"].dataset}, size="column")


@pytest.mark.parametrize(("option", "match"), [("theme", "light or dark"), ("size", "column, page, slide")])
def test_figures__refuse_unknown_looks(option, match):
    with pytest.raises(ValueError, match=match):
        plot.strain(results(), **{option: "poster"})


def test_figures__dark_ones_leave_no_trace_on_the_next():
    assert plot.strain(results(), theme="dark").get_facecolor() != plot.strain(results()).get_facecolor()


def test_figures__svg_keeps_its_letters_and_is_the_same_each_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        plot.strain(results()).savefig(tmp_path / name, metadata={"Date": None})
    assert "colour range" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_along_line__a_row_is_that_row_and_its_error_bars():
    strain = results()["strain"].dataset
    line = plot.along_line(strain, ["e_xx"], (2, 0), (2, 8))
    np.testing.assert_array_equal(line["e_xx"], strain["e_xx"][2])
    np.testing.assert_array_equal(line["distance"], 2.0 * np.arange(9))
    np.testing.assert_allclose(line["e_xx_std"], strain["e_xx_std"][2])


def test_along_line__averages_across_and_leaves_out_what_is_missing():
    strain = results()["strain"].dataset
    line = plot.along_line(strain, ["e_xx"], (1, 0), (1, 8), width=3)
    rows = strain["e_xx"][:3]
    np.testing.assert_allclose(line["e_xx"], rows.mean("scan_y"))
    count = rows.notnull().sum("scan_y")  # independent errors of 1e-3 each
    np.testing.assert_allclose(line["e_xx_std"], 1e-3 / np.sqrt(count))


def test_orientations__of_two_grains_are_told_apart_and_turned_into_the_scan_frame():
    tree = results()
    tree["strain"].attrs["rotation_degree"] = 30.0
    figure = plot.orientations(tree)
    bars = [p for p in figure.axes[0].patches if p.get_height() > 0]
    found = {round(np.degrees(p.get_x() + p.get_width() / 2) % 180) for p in bars}
    assert found == {round((np.degrees(np.arctan2(3, 15)) - 30) % 180)}
    assert "grain 2" in texts(figure)


@pytest.mark.parametrize("flagged", [False, True])
def test_disagreement__shows_marks_where_there_are_any(flagged):
    tree = results()
    strain = tree["strain"].to_dataset()
    strain["valid"] = strain["e_xx"].notnull()
    second = strain[["e_xx"]].assign(
        disagreement=abs(strain["e_xx"]), disagreement_sigma=abs(strain["e_xx"]) * 100
    )
    if flagged:
        strain["outside_training"] = xr.ones_like(strain["e_xx"], dtype=np.uint8)
    tree["strain"], tree["second"] = xr.DataTree(strain), xr.DataTree(second)
    figure = plot.disagreement(tree)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert len(titles) == (3 if flagged else 2)
    assert plot.to_png(figure)

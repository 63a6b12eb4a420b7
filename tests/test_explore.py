"""The explorer without its window: what it reads, what it shows, and the code that repeats it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from flat_scan import draw_datacube

pytest.importorskip("panel", reason="panel is not installed: pip install -e '.[notebooks]'")

import fcunet
from fcunet import schema
from fcunet.explore import Detector, Explorer, Maps, View, find_sources
from fcunet.explore.recipe import code
from fcunet.pipeline import compute_strain
from fcunet.store import open_results, set_status, write_results


@pytest.fixture(scope="module")
def sources(small_run):
    return find_sources(small_run[1])


@pytest.fixture
def explorer(sources):
    return Explorer(sources)


def run_code(text):
    """Execute what the explorer offers; returns its names."""
    names = {}
    exec(text, names)
    return names


def test_find_sources__finds_scan_and_peaks_of_a_run(sources):
    assert sources.shape == (6, 10)
    assert sources.missing == {}
    np.testing.assert_array_equal(sources.pattern(2, 3), draw_datacube()["intensity"][2, 3])


def test_find_sources__from_a_tree_are_the_same(small_run):
    assert find_sources(open_results(small_run[1])).folder == small_run[1]


def test_find_sources__of_a_run_that_was_moved_with_its_scan(small_run, tmp_path):
    for path in small_run:
        shutil.copytree(path, tmp_path / "elsewhere" / path.name)
    config = tmp_path / "elsewhere" / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(small_run[0]), "/nowhere/scan.zarr"))
    found = find_sources(tmp_path / "elsewhere" / "run")
    assert found.scan == tmp_path / "elsewhere" / "scan.zarr"
    assert found.missing == {}


def test_find_sources__without_the_scan_maps_still_work(small_run, tmp_path):
    shutil.copytree(small_run[1], tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(small_run[0]), "/nowhere/scan.zarr"))
    window = Explorer(find_sources(tmp_path / "run"))
    window.update(position=(2, 3), shown="e_yy")
    window.panel()
    assert "it was scan.zarr" in window.notes.object
    assert "--scan SCAN.zarr" in window.notes.object
    assert len(window.pattern.peaks.data["x"]) > 4  # peaks are still marked


def test_find_sources__with_results_alone(small_run, tmp_path):
    shutil.copytree(small_run[1] / "strain.zarr", tmp_path / "strain.zarr")
    window = Explorer(find_sources(tmp_path))
    window.update(position=(1, 1), min_intensity=0.2)
    assert set(window.sources.missing) == {"peaks", "patterns"}


def test_find_sources__refuses_another_scan(small_run, tmp_path):
    store = fcunet.store.write_datacube(tmp_path / "other.zarr", draw_datacube((4, 4)))
    with pytest.raises(ValueError, match="is not the scan of these results"):
        find_sources(small_run[1], store)


def test_find_sources__of_a_run_that_did_not_end_says_how_to_go_on(small_run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no results in .* yet; make them with: fcunet run"):
        find_sources(tmp_path)
    shutil.copytree(small_run[1] / "peaks.zarr", tmp_path / "peaks.zarr")
    set_status(tmp_path / "peaks.zarr", 0, 0, 0)
    with pytest.raises(FileNotFoundError, match=r"ended after \d of \d blocks; it goes on with: fcunet run"):
        find_sources(tmp_path / "peaks.zarr")


def test_explorer__a_position_shows_its_pattern_peaks_and_numbers(explorer):
    explorer.update(position=(3, 7))
    shown = explorer.pattern.source.data["image"][0]
    pattern = draw_datacube()["intensity"][3, 7].values
    np.testing.assert_allclose(shown, pattern.astype(float) ** explorer.power.value, rtol=1e-6)
    assert "3, 7" in explorer.numbers.object
    e_xx = 100 * float(explorer.sources.tree["strain"]["e_xx"][3, 7])
    assert f"{e_xx:+.3f} &pm;" in explorer.numbers.object
    assert len(explorer.pattern.sites.data["x"]) > 20
    assert "0, 0" in explorer.pattern.peaks.data["hk"]


def test_explorer__reads_only_the_pattern_looked_at(explorer, monkeypatch):
    from fcunet import shards

    read = []
    monkeypatch.setattr(
        shards.Cube,
        "__getitem__",
        lambda self, key: read.append(key) or np.zeros((1, 1, 64, 64), np.uint16),
    )
    explorer.update(position=(4, 4))
    explorer.update(shown="theta", reference=(0, 3, 0, 3))
    assert len(read) == 1


def test_explorer__a_drawn_region_is_the_new_reference(explorer):
    explorer.update(reference=(1, 5, 2, 5))
    lattice = explorer.sources.tree["lattice"].to_dataset()
    expected = compute_strain(lattice, reference=(1, 5, 2, 5))
    np.testing.assert_allclose(explorer.map.source.data["image"][0], 100 * expected["e_xx"], atol=1e-4)
    assert abs(np.nanmedian(explorer._values[1:5, 2:5])) < 0.05  # percent: the region is the zero
    assert explorer.map.box.data["left"] == [3.0]  # coordinates in nm: the third column begins at 4 - 1


def test_explorer__a_region_without_a_lattice_changes_nothing_and_says_so(explorer):
    before = explorer.view
    explorer.update(reference=(0, 1, 0, 1))  # that position is empty
    assert explorer.view == before
    assert "reference" in explorer.notes.object


def test_explorer__thresholds_make_positions_grey(explorer):
    counts = explorer.sources.tree["lattice"]["n_indexed"].values
    explorer.update(min_indexed=int(np.median(counts)) + 1)
    np.testing.assert_array_equal(
        np.isfinite(explorer._values),
        (counts > np.median(counts)) & np.isfinite(explorer.maps.stored("e_xx")),
    )


def test_explorer__another_frame_turns_the_strain(explorer):
    before = explorer._values.copy()
    explorer.update(rotation_degree=90.0, shown="e_yy")
    np.testing.assert_allclose(explorer._values, before, atol=1e-4)


def test_explorer__without_weak_peaks_the_lattice_is_fitted_to_the_others(explorer):
    explorer.update(position=(3, 7))
    before = explorer.maps.strain_at(explorer.view)["e_xx"]
    explorer.update(min_intensity=0.7)
    value, std = explorer.maps.strain_at(explorer.view)["e_xx"]
    assert 0 < abs(value - before[0]) < 4 * std
    assert set(explorer.pattern.peaks.data["alpha"]) == {0.25, 1.0}


def test_explorer__error_bars_of_the_runs_own_reference_are_those_stored(sources):
    # the same numbers by the way that a drawn reference takes: only the reference's own error is not in it
    maps, view = Maps(sources), View(position=(3, 7))
    stored = maps.strain_at(view)
    again = maps.strain_at(view.changed(rotation_degree=0.0))
    for name, (value, std) in stored.items():
        assert again[name][0] == pytest.approx(value, abs=1e-9)
        assert again[name][1] == pytest.approx(std, rel=0.1)


def test_explorer__error_bars_against_a_drawn_region_hold_what_is_unlike_it(sources):
    maps, view = Maps(sources), View(position=(3, 7), reference=(0, 4, 0, 4))
    lattice = sources.tree["lattice"].to_dataset()
    strain = compute_strain(lattice, reference=view.reference, peaks=sources.peaks).compute()
    expected = strain.isel(scan_y=3, scan_x=7)
    assert maps.residual_ratio_at(view) == pytest.approx(float(expected["residual_ratio"]), rel=1e-5)
    for name, (value, std) in maps.strain_at(view).items():
        assert value == pytest.approx(float(expected[name]), abs=1e-9)
        assert std == pytest.approx(float(expected[f"{name}_std"]), rel=0.1)  # without that of the region
    assert maps.residual_ratio_at(View(position=(3, 7))) == pytest.approx(
        float(sources.tree["strain"]["residual_ratio"][3, 7])
    )
    sources.peaks = None
    assert np.isnan(Maps(sources).residual_ratio_at(view))
    assert all(np.isfinite(std) for _, std in Maps(sources).strain_at(view).values())


@pytest.mark.parametrize("changes", [{"rotation_degree": 0.0}, {"reference": (0, 4, 0, 4)}])
def test_explorer__a_dilation_shared_with_the_reference_cancels(small_run, changes):
    bars = []
    for size in (0.0, 5e-3):
        sources = find_sources(small_run[1])
        lattice = sources.tree["lattice"].dataset
        everywhere = {n: xr.full_like(lattice[n], size) for n in schema.SHARED_DILATION}
        sources.tree["lattice"] = xr.DataTree(lattice.assign(everywhere))
        sources.tree["strain"].attrs["shared_dilation_ref"] = [size, size]
        bars.append(Maps(sources).strain_at(View(position=(3, 7), **changes))["e_xx"][1])
    assert bars[1] == pytest.approx(bars[0], rel=1e-3)


def with_another_crystal(sources, reference):
    """The same results, as if the right half were another crystal and strain relative to `reference`."""
    lattice = sources.tree["lattice"].to_dataset().load()
    right, turn = np.arange(10) >= 5, 1.05 * np.array([[0.88, 0.475], [-0.475, 0.88]])  # by 28 degrees
    for i in (1, 2):
        g = np.stack([lattice[f"g{i}_{q}"] for q in ("qy", "qx")], -1)
        g = np.where(right[:, None], g @ turn, g)
        lattice[f"g{i}_qy"][:], lattice[f"g{i}_qx"][:] = g[..., 0], g[..., 1]
    lattice["lattice_id"][:, 5:] = 2
    basis = np.array(lattice.attrs["basis_px"])
    lattice.attrs["bases_px"] = [basis.tolist(), (basis @ turn).tolist()]
    strain = compute_strain(lattice, reference=reference)
    sources.tree["lattice"] = xr.DataTree(lattice.assign(F=strain["F"]))
    sources.tree["strain"] = xr.DataTree(strain.drop_vars("F"))
    sources.peaks = None
    return sources


@pytest.mark.parametrize("position", [(3, 2), (3, 7)])
@pytest.mark.parametrize("reference", ["median", "grain", (0, 6, 8, 10)])
@pytest.mark.parametrize("changes", [{}, {"rotation_degree": 0.0}, {"reference": (0, 6, 0, 7)}])
def test_explorer__reads_every_crystal_against_its_own_reference(small_run, reference, changes, position):
    maps = Maps(with_another_crystal(find_sources(small_run[1]), reference))
    view = View(position=position, **changes)
    expected = maps.stored if "reference" not in changes else maps.strain(view).__getitem__
    fitted_anew = view.changed(min_intensity=1e-6)  # from the same peaks, or from none
    for shown in (view, fitted_anew):
        for name, (value, std) in maps.strain_at(shown).items():
            assert value == pytest.approx(float(expected(name)[position]), abs=1e-9)
            assert value == pytest.approx(float(maps.strain(view)[name][position]), abs=1e-9)
            assert maps.strain(view)[name].attrs == maps.stored(name).attrs  # its own name and unit
            assert abs(value) < 0.02
            assert np.isfinite(std)


def test_explorer__takes_an_elliptical_distortion_out_of_the_position_shown(sources, small_run):
    distorted = find_sources(small_run[1])
    for group in ("lattice", "strain"):
        attrs = distorted.tree[group].attrs
        attrs["ellipse_ratio"], attrs["ellipse_angle_degree"] = 1.07, 20.0
    maps, view = Maps(distorted), View(position=(3, 7), rotation_degree=15.0)
    at_position = maps.strain_at(view)
    strain = maps.strain(view)
    assert strain.attrs["ellipse_ratio"] == 1.07
    for name, (value, _) in at_position.items():
        assert value == pytest.approx(float(strain[name][3, 7]), abs=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {"shown": "e_xy", "limits": (-1.0, 1.0)},
        {"shown": "theta", "reference": (1, 5, 2, 5), "rotation_degree": 30.0},
        {"shown": "e_1", "max_fit_error": 0.2, "min_indexed": 6},
        {"shown": "e_xx_std", "max_std": 5e-3},
        {"shown": "n_peaks"},
        {"shown": "dilation", "rotation_degree": 10.0},
    ],
    ids=lambda c: c["shown"],
)
def test_code__computes_what_is_shown(explorer, changes):
    explorer.update(**changes)
    names = run_code(code(explorer.maps, explorer.view))
    keep = explorer.maps.keep(explorer.view)
    expected = explorer.maps.raw(explorer.view, changes["shown"])
    expected = expected if keep is None else expected.where(keep)
    np.testing.assert_allclose(names["shown"].values, expected.values, atol=1e-12)
    assert explorer.code.value == code(explorer.maps, explorer.view)


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_figure__is_saved_as_asked(explorer, kind):
    explorer.format.value, explorer.size.value, explorer.theme.value = kind, "column", "dark"
    start = explorer._figure_file().read(5)
    assert start.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind])


def virtual_image_of(explorer, detector):
    explorer.update(detector=detector)
    explorer.compute_image().join(60)
    return explorer.maps.virtual.values


RING = Detector((31.7, 31.7), 0.0, 6.0)


def test_virtual_detector__gives_its_image_and_the_code_for_it(explorer):
    image = virtual_image_of(explorer, RING)
    patterns = draw_datacube()["intensity"].values
    np.testing.assert_array_equal(image, patterns[..., RING.mask((64, 64))].sum(-1))
    assert explorer.choose.value == "virtual detector"
    np.testing.assert_array_equal(run_code(explorer.code.value)["shown"], image)


def test_virtual_detector__follows_the_descan(small_run):
    window = Explorer(find_sources(small_run[1]))
    known = window.sources.calibration
    plane = np.array([[known.centre[0] - 5.0, 2.0, 0.0], [known.centre[1], 0.0, 0.0]])  # 2 px per row
    window.sources.calibration = replace(known, origin_plane=plane)
    image = virtual_image_of(window, RING)
    for row, move in enumerate(np.rint(2.0 * np.arange(6) - 5.0).astype(int)):
        moved = Detector((RING.centre[0] + move, RING.centre[1]), RING.inner, RING.outer)
        inside = moved.mask((64, 64))
        np.testing.assert_array_equal(image[row], draw_datacube()["intensity"].values[row][:, inside].sum(-1))
    assert "shift = calibration.origin - calibration.centre" in window.code.value
    exec(window.code.value, {})


def test_virtual_detector__is_computed_on_the_client_at_hand(explorer):
    from distributed import Client

    with Client(processes=False, dashboard_address=None, n_workers=1) as client:
        image = virtual_image_of(explorer, RING)
        assert "on 1 workers" in explorer.progress.object or explorer.progress.object == "done"
        assert client.scheduler_info()["workers"]
    assert image.shape == (6, 10)


def test_explorer__of_one_row_and_of_nothing(small_run, tmp_path):
    for name, change in (("row", lambda d: d.isel(scan_y=slice(2, 3))), ("none", lambda d: d * np.nan)):
        tree = open_results(small_run[1]).load()
        groups = {f"/{g}": tree[g].to_dataset() for g in ("strain", "lattice", "virtual")}
        changed = {
            g: d.assign(change(d[[n for n in d if d[n].dtype.kind == "f"]])) if name == "none" else change(d)
            for g, d in groups.items()
        }
        write_results(tmp_path / name / "strain.zarr", xr.DataTree.from_dict(changed))
        window = Explorer(find_sources(tmp_path / name))
        window.update(position=(0, 3), line="column")
        window.panel()
        assert window.figure()._repr_png_().startswith(b"\x89PNG")


def test_explore__shows_itself_in_a_notebook_without_the_network(small_run):
    shown = fcunet.explore(small_run[1])
    assert "6 x 10 positions" in repr(shown)
    bundle = shown._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "text/html" in data

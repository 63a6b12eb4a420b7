"""The report of a run and the preview of a scan."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr
from test_calibrate import cube_of, draw_pattern
from test_plot import results

from fcunet.config import Config
from fcunet.preview import preview
from fcunet.report import write_comparison, write_report
from fcunet.store import open_results, write_results

VOID = {"meta", "img", "br", "source"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects links and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory without the scan and the peaks, as after cleaning up."""
    folder = tmp_path_factory.mktemp("run")
    tree = results()
    ratio = xr.full_like(tree["strain"]["e_xx"], 0.63)
    ratio[0, :2] = 1.4
    tree["strain"] = tree["strain"].dataset.assign(
        valid=tree["strain"]["e_xx"].notnull(), residual_ratio=ratio.where(tree["strain"]["e_xx"].notnull())
    )
    tree["lattice"].attrs["sigma_factor"] = [0.71, 1.0, 1.62]
    tree.attrs = {
        "input_title": "SiGe <script>alert(1)</script> \u00e5",
        "fcunet_version": "0.1.0",
        "n_blocks_failed": 1,
    }
    write_results(folder / "strain.zarr", tree)
    (folder / "config.yaml").write_text(Config.load(method="correlation", store="scan.zarr").to_yaml())
    summary = {
        "patterns": 54,
        "patterns_per_s": 120.0,
        "seconds": {"peaks": 0.45, "total": 2.0},
        "device": "CPU",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def page(run_dir):
    return write_report(run_dir).read_text()


def test_report__needs_nothing_beside_it(page):
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in Page(page).sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_report__is_fit_for_phones_and_the_dark(page):
    assert 'name="viewport"' in page
    assert "color-scheme: light dark" in page


def test_report__escapes_what_comes_from_outside(page):
    assert "<script" not in page
    assert "SiGe &lt;script&gt;" in page


def test_report__answers_the_six_questions(page):
    words = " ".join(Page(page).words)
    for question in ("What went in", "calibrated", "What came out", "trust", "How long", "repeat"):
        assert question in words


def test_report__says_error_against_truth_time_and_settings(run_dir, page):
    words = " ".join(Page(page).words)
    for part in (
        "rms error of e_xx",
        "within 1",
        "120 patterns/s",
        "method: correlation",
        "1 blocks of the scan",
    ):
        assert part in words
    assert (run_dir / "strain.png").read_bytes().startswith(b"\x89PNG")


def test_report__says_what_the_residuals_tell(page):
    words = " ".join(Page(page).words)
    assert "scatter by 0.71 (the surest) to 1.62 (the least sure) times" in words
    assert "0.63 times as much as about their own lattice" in words
    assert "4 % of the positions are unlike the reference" in words


def test_report__has_a_smaller_figure_for_narrow_screens(page):
    assert page.count('<source media="(max-width: 40rem)"') >= 5


def test_report__shows_grains_and_how_they_lie(run_dir, page):
    assert "Direction of g1 in each grain" in page
    assert (run_dir / "grains.png").exists()


def test_report__checks_the_descan_against_the_origins_of_the_lattice(small_run):
    assert "independent check of the descan" in (small_run[1] / "report.html").read_text()
    assert (small_run[1] / "descan.png").exists()


def test_report__says_when_most_positions_have_no_lattice(tmp_path):
    tree = results(1, 3, missing=True)
    tree["strain"] = tree["strain"].dataset.assign(valid=tree["strain"]["e_xx"].notnull())
    write_results(tmp_path / "strain.zarr", tree)
    assert "Only 0 % of the positions have a lattice" in write_report(tmp_path).read_text()


def changed_run(run, folder, *, region=None, config=None, **components):
    """A copy of the results of `run` with other values, cut to a region."""
    tree = open_results(run).load()
    strain = tree["strain"].to_dataset()
    strain = strain.assign({name: strain[name] + shift for name, shift in components.items()})
    groups = {"/strain": strain} | {f"/{g}": tree[g].to_dataset() for g in ("lattice", "virtual")}
    if region:
        y0, y1, x0, x1 = region
        groups = {g: d.isel(scan_y=slice(y0, y1), scan_x=slice(x0, x1)) for g, d in groups.items()}
    other = xr.DataTree.from_dict(groups)
    settings = json.loads(tree.attrs["config_json"])
    settings["detection"] |= config or {}
    other.attrs = tree.attrs | {"config_json": json.dumps(settings)} | ({"region": region} if region else {})
    write_results(folder / "strain.zarr", other)
    return folder


def rows_of(path):
    """The cells of all table rows of a page, by their first."""
    rows = re.findall(r"<tr>(.*?)</tr>", path.read_text())
    cells = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in rows]
    return {row[0]: row[1:] for row in cells if row}


@pytest.fixture(scope="module")
def comparison(small_run, tmp_path_factory):
    """The small run against itself with e_xx 1e-3 larger, found with another setting."""
    folder = tmp_path_factory.mktemp("two")
    other = changed_run(small_run[1], folder / "other", e_xx=1e-3, config={"corr_power": 0.5})
    return write_comparison(small_run[1], other, folder / "new" / "two.html")


def test_comparison__needs_nothing_beside_it(comparison):
    page = Page(comparison.read_text())
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert len([s for s in page.sources if s.startswith("data:")]) >= 4


def test_comparison__says_how_far_apart_the_strain_is(comparison):
    rows = rows_of(comparison)
    assert rows["e_xx"] == ["+1.00", "0.00", rows["e_xx"][2], "100 %", "100 %", "1.000"]
    assert rows["e_yy"][:2] == ["+0.00", "0.00"]


def test_comparison__lists_the_settings_that_differ_and_no_others(comparison):
    rows = rows_of(comparison)
    assert rows["detection.corr_power"][1] == "0.5"
    assert "detection.method" not in rows


def test_comparison__of_a_region_takes_the_positions_both_have(small_run, tmp_path, blank_pictures):
    part = changed_run(small_run[1], tmp_path / "part", region=(2, 6, 3, 9))
    rows = rows_of(write_comparison(small_run[1], part, tmp_path / "two.html"))
    assert rows["e_xx"][:2] == ["+0.00", "0.00"]
    assert rows["positions"] == ["6 x 10", "4 x 6"]


def test_comparison__of_scans_of_other_shapes_compares_summaries(
    run_dir, small_run, tmp_path, blank_pictures
):
    path = write_comparison(run_dir, small_run[1], tmp_path / "two.html")
    words = " ".join(Page(path.read_text()).words)
    assert "A has 6 x 9 positions and B 6 x 10, and they cannot be matched" in words
    assert "titles of the scans differ" in words
    assert rows_of(path)["with a lattice"][1] == "98.3 %"


def test_comparison__refuses_what_cannot_be_compared(run_dir, small_run, tmp_path):
    with pytest.raises(ValueError, match="are the same run; name two: fcunet report RUN_A RUN_B"):
        write_comparison(run_dir, run_dir / "strain.zarr")
    with pytest.raises(FileNotFoundError, match="no results"):
        write_comparison(run_dir, tmp_path)
    with pytest.raises(ValueError, match="is a folder; name the file"):
        write_comparison(run_dir, small_run[1], tmp_path)


@pytest.fixture(scope="module")
def scan():
    rng = np.random.default_rng(1)
    return cube_of([draw_pattern((96, 96), (47, 46), 4.5, rng).astype(np.uint16) for _ in range(4)], (2, 2))


@pytest.fixture(scope="module")
def correlation():
    return Config.load(method="correlation", kernel="gaussian", min_relative_intensity=0.2)


def test_preview__finds_the_lattice_that_was_drawn(scan, correlation):
    facts = preview(scan, config=correlation)
    assert facts["lengths_px"] == pytest.approx([24 * np.hypot(1, 0.1)] * 2, rel=0.01)
    assert facts["angle_degree"] == pytest.approx(90, abs=0.3)
    assert facts["why_not"] == ""
    assert facts["share_on_lattice"] > 0.9


def test_preview__prints_every_number_and_draws(scan, correlation, tmp_path):
    figure = tmp_path / "new" / "preview.png"
    facts = preview(scan, config=correlation, positions=[(1, 0), (0, 1)], out=figure)
    text = "\n".join(facts["lines"])
    for word in ("2 x 2 scan, 96 x 96 detector", "disk radius", "probe synthetic", "lattice", "patterns/s"):
        assert word in text
    assert facts["positions"] == [(1, 0), (0, 1)]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_preview__refuses_a_position_outside_the_scan(scan, correlation):
    with pytest.raises(ValueError, match=r"position 2,0 is outside the scan of 2 x 2.*--at 1,1"):
        preview(scan, config=correlation, positions=[(2, 0)])


def test_preview__one_disk_has_no_lattice_and_says_why(correlation, tmp_path):
    y, x = np.mgrid[:64, :64]
    disk = np.random.default_rng(0).poisson(50.0 * (np.hypot(y - 30, x - 33) < 5) + 0.01)
    facts = preview(cube_of(disk, (1, 1)), config=correlation, out=tmp_path / "one.png")
    assert facts["basis_px"] is None
    assert any(line.startswith("  lattice   none: ") for line in facts["lines"])


def test_preview__suggests_a_threshold_when_noise_is_found(scan):
    noisy = scan + np.random.default_rng(2).poisson(3.0, scan["intensity"].shape)
    facts = preview(noisy, config=Config.load(method="correlation", kernel="flat"))
    words = facts["suggestion"].split()[3:]
    settings = {k[2:].replace("-", "_"): v for k, v in zip(words[::2], words[1::2], strict=True)}
    assert preview(noisy, config=Config.load(**settings))["share_on_lattice"] > 0.9


def test_preview__recorded_pattern_has_one_lattice_without_a_parameter(test_data):
    # 21 clear disks on 29.9 and 50.3 px at 89.04 degrees, found independently by two other programs, both by
    # correlation, whose vectors are some 0.5 % too short where disks are uneven (docs/concepts.md)
    dm = pytest.importorskip("rsciio.digitalmicrograph")
    pattern = dm.file_reader(str(test_data / "nbed" / "dd020.dm3"))[0]["data"]
    scan = xr.Dataset({"intensity": (("scan_y", "scan_x", "qy", "qx"), pattern[None, None])})
    for method in ("fcunet", "correlation"):
        facts = preview(scan, config=Config.load(method=method))
        assert facts["lengths_px"] == pytest.approx([29.9, 50.3], rel={"fcunet": 0.0055}.get(method, 0.005))
        if method == "fcunet":
            assert facts["lengths_px"][1] / facts["lengths_px"][0] == pytest.approx(50.3 / 29.9, rel=0.003)
        assert facts["angle_degree"] == pytest.approx(89.04, abs=0.3)
        assert facts["n_indexed"][0] >= 21

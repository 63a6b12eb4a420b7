"""What a new user runs into: nothing found, one row, moved and deleted files, no display, wrong arguments."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from flat_scan import draw_datacube
from test_cli import call
from test_notebooks import FOLDER, execute

import fcunet
from fcunet import runner
from fcunet.config import Config
from fcunet.report import write_comparison, write_report
from fcunet.store import write_datacube


def run_on(folder, datacube):
    """A run of its own on this machine, without a cluster's processes; the run directory."""
    from distributed import Client

    store = write_datacube(folder / "scan.zarr", datacube)
    config = Config.load(store=store, out=folder / "run", method="correlation", max_num_peaks=32)
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        runner.run(config, client=client, progress=False)
    return folder / "run"


@pytest.fixture(scope="module")
def one_row(tmp_path_factory):
    """A run on a scan of one row."""
    return run_on(tmp_path_factory.mktemp("row"), draw_datacube((1, 10)))


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A run on a scan that nothing scattered in: not one position has a lattice."""
    datacube = draw_datacube((2, 3))
    datacube["intensity"][:] = np.random.default_rng(0).poisson(0.02, datacube["intensity"].shape)
    datacube["intensity"][..., 30:35, 30:35] = 40  # the direct beam alone
    return run_on(tmp_path_factory.mktemp("empty"), datacube)


@pytest.fixture
def moved(small_run, tmp_path):
    """The small run in another folder, its scan gone."""
    shutil.copytree(small_run[1], tmp_path / "elsewhere")
    config = tmp_path / "elsewhere" / "config.yaml"
    config.write_text(config.read_text().replace(str(small_run[0]), "/nowhere/scan.zarr"))
    return tmp_path / "elsewhere"


@pytest.mark.slow
def test_one_row__has_a_report_figures_and_numbers(one_row):
    assert "1 x 10" in (one_row / "report.html").read_text()
    results = fcunet.open_results(one_row)
    assert "1 x 10" in results.fcunet._repr_html_()
    assert results.fcunet.plot().axes
    assert set(results.fcunet.at(0, 9)) >= {"strain", "lattice", "virtual"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the kernel is another process: only its errors count
@pytest.mark.parametrize("name", ["02_your_own_data", "06_conventions"])
def test_one_row__goes_through_the_notebooks(name, one_row, monkeypatch):
    assert execute(FOLDER / f"{name}.ipynb", one_row.parent / "scan.zarr", one_row, monkeypatch)


@pytest.mark.slow
def test_empty__says_so_everywhere(empty):
    page = (empty / "report.html").read_text()
    assert "Only 0 % of the positions have a lattice" in page
    assert "fcunet preview" in page
    results = fcunet.open_results(empty)
    assert "0.0 %" in results.fcunet._repr_html_()
    assert np.isnan(results.fcunet.at(1, 1)["strain"]["e_xx"])
    assert not fcunet.plot.bragg_vector_map(results).axes[0].get_xlabel()  # no vectors
    with pytest.raises(ValueError, match=r"no position of the scan has a lattice.*fcunet preview"):
        fcunet.compute_strain(results["lattice"].to_dataset(), reference=(0, 1, 0, 1))


@pytest.mark.slow
def test_comparison__of_an_empty_run_and_one_of_a_row(empty, one_row, tmp_path):
    text = write_comparison(empty, one_row, tmp_path / "two.html").read_text()
    assert "A has 2 x 3 positions and B 1 x 10, and they cannot be matched" in text


def test_moved__report_says_that_the_scan_is_gone_and_has_all_else(moved, blank_pictures):
    page = write_report(moved).read_text()
    assert "The scan is not where it was during the run" in page
    assert page.count("<figure>") >= 6


@pytest.mark.slow
def test_moved__with_its_scan_beside_it_shows_patterns_again(moved, small_run, blank_pictures):
    shutil.copytree(small_run[0], moved.parent / "scan.zarr")
    assert "Patterns with the disks found" in write_report(moved).read_text()


def test_peaks_gone__report_is_written_again(moved, blank_pictures):
    shutil.rmtree(moved / "peaks.zarr")
    assert runner.rewrite_report(moved).is_file()


def environment_without_display(folder) -> dict[str, str]:
    """As on a login node: no display, and a text browser that leaves a trace when it is started."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("www-browser", "lynx", "w3m", "links", "elinks", "xdg-open"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {folder}/started\n")
        (programs / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")}
    return kept | {"PATH": f"{programs}:{os.environ['PATH']}", "MPLBACKEND": "TkAgg"}


@pytest.mark.slow
def test_no_display__reports_are_drawn(small_run, tmp_path):
    shutil.copytree(small_run[1], tmp_path / "run")
    command = [Path(sys.executable).with_name("fcunet"), "report", tmp_path / "run"]
    done = subprocess.run(command, env=environment_without_display(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout


@pytest.mark.slow
def test_no_display__explorer_prints_its_address_and_starts_no_text_browser(small_run, tmp_path):
    pytest.importorskip("panel", reason="panel is not installed: pip install -e '.[notebooks]'")
    command = [Path(sys.executable).with_name("fcunet"), "explore", small_run[1]]
    environment = environment_without_display(tmp_path)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(3)]
        process.terminate()
    assert "http://127.0.0.1:" in lines[0]
    assert "ssh -L" in lines[1]
    assert "no display here" in lines[2]
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("explore", "{scan}"), "is a scan, not the results of one; make them with: fcunet run"),
        (("explore", "{above}"), "is not a run but holds some: run; name one"),
        (("explore", "{run}", "--port", "99999"), "port is 99999"),
        (("explore", "{run}", "--scan", "no.zarr"), "there is no store no.zarr"),
        (("report", "{scan}"), "is a scan, not the results of one"),
        (("report", "{run}", "{scan}"), "is a scan, not the results of one"),
        (("report", "{run}", "{run}"), "name two: fcunet report RUN_A RUN_B"),
        (("export", "{run}", "a.csv", "--to", "excel"), "csv, parquet"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, tuple) else "",
)
def test_wrong_arguments__get_one_sentence(arguments, words, small_run, monkeypatch, capsys, tmp_path):
    if "explore" in arguments:
        pytest.importorskip("panel", reason="panel is not installed: pip install -e '.[notebooks]'")
    monkeypatch.chdir(tmp_path)
    names = {"scan": small_run[0], "run": small_run[1], "above": small_run[1].parent}
    code, _, err = call(monkeypatch, capsys, *(a.format(**names) for a in arguments))
    assert code == 1
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["open", "open_results"])
def test_open__names_what_is_missing_or_of_another_kind(name, small_run, tmp_path):
    function = getattr(fcunet, name)
    with pytest.raises(FileNotFoundError, match=r"nothing"):
        function(tmp_path / "nothing.zarr")
    with pytest.raises(ValueError, match=r"is a scan|is an fcunet results store"):
        function(small_run[0] if name == "open_results" else small_run[1] / "strain.zarr")


@pytest.mark.slow
def test_accessor__outside_the_scan_and_of_a_foreign_dataset(one_row):
    with pytest.raises(ValueError, match="outside the scan of 1 x 10"):
        fcunet.open_results(one_row).fcunet.at(1, 0)
    with pytest.raises(ValueError, match="no figure for a"):
        xr.Dataset({"a": 1}).fcunet.plot()

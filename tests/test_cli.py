"""The command line: light to start, one source of options, errors in one sentence."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fcunet.cli import app, main
from fcunet.config import SECTIONS

COMMANDS = [
    "demo",
    "simulate",
    "convert",
    "info",
    "preview",
    "run",
    "strain",
    "report",
    "export",
    "train",
    "doctor",
]


def call(monkeypatch, capsys, *arguments):
    """Exit status, stdout and stderr of ``fcunet ARGUMENTS`` through the real entry point."""
    monkeypatch.setattr(sys, "argv", ["fcunet", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help__is_there_for_every_command(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_help__loads_nothing_heavy():
    heavy = {"torch", "dask", "xarray", "zarr", "numpy"}
    code = f"import sys, fcunet.cli; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_run__offers_every_setting_under_its_own_name():
    output = CliRunner().invoke(app, ["run", "--help"], terminal_width=200).output
    for section in SECTIONS.values():
        for name in section.model_fields:
            assert "--" + name.replace("_", "-") in output


def test_unknown_option__names_the_nearest(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "run", "scan.zarr", "--corr-pwer", "1")
    assert code == 2
    assert "--corr-power" in err


def test_value_out_of_range__is_one_sentence(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "run", "scan.zarr", "--corr-power", "3")
    assert code == 1
    assert "corr_power" in err
    assert "less than or equal to 1" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["info", "preview", "run", "strain", "report"])
def test_missing_input__is_named(command, monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, command, str(tmp_path / "nothing.zarr"))
    assert code == 1
    assert "nothing.zarr" in err
    assert "Traceback" not in err


def test_convert__names_a_missing_source(monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, "convert", str(tmp_path / "no.mib"), str(tmp_path / "out.zarr"))
    assert code == 1
    assert "no.mib" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("simulate", "x.zarr", "--scan", "4by4"), "--scan is '4by4'"),
        (("convert", "a", "b.zarr", "--scan-step", "two nm"), "--scan-step is 'two nm'"),
        (("convert", "a", "b.zarr", "--q-pixel", "0.02 furlong"), "furlong"),
        (("preview", "a.zarr", "--at", "3"), "--at is '3'"),
        (("run", "a.zarr", "--region", "5:2,0:9"), "region"),
        (("run", "a.zarr", "--reference", "somewhere"), "reference"),
        (("run", "a.zarr", "--config", "missing.yaml"), "missing.yaml"),
        (("report", "a", "--out", "b.html"), "fcunet report a OTHER --out b.html"),
        (("report", "a", "a"), "are the same run"),
        (("report", "a", "b"), "there is no folder a; a run makes one: fcunet run STORE.zarr --out a"),
        (("explore", "a"), "there is no folder a"),
    ],
)
def test_wrong_value__is_shown_with_what_was_needed(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 1
    assert words in err
    assert list(tmp_path.iterdir()) == []

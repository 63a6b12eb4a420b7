"""The demo, small: it goes through, the network is nearer to the truth, a second call computes nothing."""

import pytest

from fcunet.demo import run_demo
from fcunet.store import open_peaks


@pytest.mark.slow
def test_demo__shows_the_network_nearer_to_the_truth_and_runs_again(tmp_path, capsys):
    errors = run_demo(tmp_path, scan=(4, 24), detector=192, workers=1)
    for component in ("e_xx", "e_yy"):
        assert errors["fcunet"][component]["rms"] < 0.67 * errors["correlation"][component]["rms"]
    assert {"demo.png", "scan.zarr", "fcunet", "correlation"} <= {p.name for p in tmp_path.iterdir()}
    said = capsys.readouterr().out
    assert "strain error against the truth" in said
    assert "within one error bar" in said
    peaks = tmp_path / "fcunet" / "peaks.zarr" / "peak_qy"
    before = {p: p.stat().st_mtime_ns for p in peaks.rglob("*") if p.is_file()}
    assert run_demo(tmp_path, scan=(4, 24), detector=192, workers=1) == errors
    assert {p: p.stat().st_mtime_ns for p in peaks.rglob("*") if p.is_file()} == before
    assert int(open_peaks(tmp_path / "fcunet" / "peaks.zarr")["n_peaks"].min()) > 10


def test_demo__refuses_another_simulation_in_the_same_folder(tmp_path):
    (tmp_path / "scan.zarr").mkdir()
    (tmp_path / "simulation.txt").write_text("scan 2 x 2, detector 64, dose 1, seed 0")
    with pytest.raises(ValueError, match=r"choose another folder with --out"):
        run_demo(tmp_path, scan=(4, 24), detector=192)

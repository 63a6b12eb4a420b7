"""The GPU script on a CPU, in small: the same steps."""

import math

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_gpu__every_step_works_on_a_cpu(tmp_path):
    arguments = ["--device", "cpu", "--precision", "fp32", "--quick", "--sizes", "64"]
    facts = gpu.main([*arguments, "--out", str(tmp_path / "gpu.json")])
    assert (tmp_path / "gpu.json").is_file()
    assert facts["strain against CPU fp32"]["network, strain"] == 0  # the same device and precision
    assert all(rate > 0 for rate in facts["patterns per s"][64].values())
    assert facts["whole run"]["patterns_per_s"] > 0
    assert len(facts["memory, MiB"]) == 10
    assert "conv" in facts["profile"]


def test_operations__are_those_of_the_first_convolution_counted_by_hand(monkeypatch):
    small, large = gpu.operations(64), gpu.operations(128)
    assert large["maps"] == pytest.approx(4 * small["maps"], rel=0.05)  # all but nothing is per pixel
    assert large["disks"] == small["disks"]
    first = 2 * 17 * 24 * 9 * 32 * 32
    assert small["maps"] > first
    assert not math.isnan(small["disks"])

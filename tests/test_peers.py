"""Other programs get the same numbers; each runs in an environment of its own, made on first use by pip."""

import numpy as np
import pytest

from benchmarks.disks import disk, simulate_disks
from benchmarks.peers import py4dstem_agreement, py4dstem_opens_export
from benchmarks.peers.environment import run_worker
from fcunet.kernels.correlation import make_kernel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_py4dstem__finds_the_same_peaks_and_strain():
    rows = py4dstem_agreement.compare(simulate_disks(electrons=1e6), min_relative_intensity=0.01)
    assert len(rows) == len(py4dstem_agreement.CASES)
    for row in rows:
        assert row["unpaired"] == 0
        assert row["positions"] == 48
        assert row["position_rms"] < 2e-3
        assert row["strain_max"] < py4dstem_agreement.TOLERANCE


def test_py4dstem__makes_the_same_kernels():
    probe = disk((61, 64), (30, 33), 7.0, 0.8)
    theirs = run_worker(
        "py4dstem",
        "py4dstem_worker.py",
        "kernels",
        probe=probe,
        origin=(30, 33),
        sigma=1.7,
        radii=(5.0, 18.0),
    )
    for name, options in {"flat": {}, "gaussian": {"sigma": 1.7}, "sigmoid": {"radii": (5.0, 18.0)}}.items():
        ours = make_kernel(probe, kernel=name, **options).numpy()
        np.testing.assert_allclose(ours, theirs[name], atol=2e-6 * theirs[name].max() + 1e-8)


def test_py4dstem__opens_an_exported_run():
    verdicts = py4dstem_opens_export.check()
    assert len(verdicts) == 10
    assert [name for name, good, _ in verdicts if not good] == []

"""Other programs get the same numbers; each runs in an environment of its own, made on first use by pip."""

import os

import numpy as np
import pytest

from benchmarks.disks import disk, simulate_disks
from benchmarks.peers import conventions, py4dstem_agreement, py4dstem_bragg_vectors, py4dstem_opens_export
from benchmarks.peers.environment import peer_python, run_worker
from fcunet.kernels.correlation import make_kernel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def needs(*peers):
    """Skip without these environments, but not in CI: there a test makes those that are missing."""
    missing = [name for name in peers if peer_python(name, install=False) is None]
    command = f"python -m benchmarks.peers.environment {' '.join(missing)}"
    return pytest.mark.skipif(bool(missing) and not os.environ.get("CI"), reason=f"make it with: {command}")


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
    zspy = peer_python("pyxem", install=False) is not None
    verdicts = py4dstem_opens_export.check(zspy=zspy)
    assert len(verdicts) == (19 if zspy else 15)
    assert [name for name, good, _ in verdicts if not good] == []


def test_py4dstem__strain_of_its_bragg_vector_file_is_the_same_here():
    difference, _ = py4dstem_bragg_vectors.compare(
        py4dstem_bragg_vectors.CASES["origin, ellipse, rotation, flip"]
    )
    assert max(difference.values()) < py4dstem_bragg_vectors.TOLERANCE


@needs("quantem", "pyxem")
def test_peers__give_the_strain_of_the_convention_named_after_them():
    theirs, ours = conventions.from_lattices()
    assert set(theirs) == {"py4dstem", "quantem", "pyxem"}
    for name in theirs:
        assert conventions.largest_difference(theirs[name], ours[name]) < conventions.TOLERANCE


@needs("quantem")
def test_quantem__fits_the_same_lattice_to_noisy_peaks():
    assert conventions.quantem_from_peaks() < conventions.TOLERANCE

"""The accuracy benchmark on data small enough for a test: truth, tuning, scores."""

import numpy as np
import pytest
import torch

from benchmarks.accuracy_data import Scan, blurred, shortest_basis
from benchmarks.accuracy_methods import VARIANTS, Method, disk_electrons, find, fit_weights, ring_kernel
from benchmarks.accuracy_scores import Strain, bounds, peak_figures, strain_errors
from benchmarks.disks import simulate_disks
from fcunet.kernels.peaks import Peaks


@pytest.fixture(scope="module")
def scan():
    made = simulate_disks(
        (2, 4), (96, 96), radius_px=5.0, edge_px=0.5, spacing_px=18.0, electrons=1.0, noise=False
    )
    position = made.positions.reshape(8, -1, 2)
    inside = np.isfinite(position[..., 0])
    share = np.where(inside, 1 / inside.sum(1, keepdims=True), np.nan)
    return Scan(
        crystal="disks", patterns=made.patterns.reshape(8, 96, 96), probe=made.probe, g_ref=made.g_ref,
        F=made.F.reshape(8, 2, 2), distortion=np.eye(2), spot_position=position,
        spot_amplitude=np.where(inside, 1.0, np.nan), spot_share=share, origin=np.full((8, 2), 48.0),
        thickness_nm=np.full(8, 20.0), mistilt_mrad=np.zeros(8), radius_px=5.0, edge_px=0.5, energy_keV=200.0,
        aperture=0.05,
    )  # fmt: skip


def true_peaks(scan, distortion=None):
    at = (
        scan.spot_position
        if distortion is None
        else scan.origin[0] + (scan.spot_position - scan.origin[0]) @ distortion.T
    )
    y, x = (torch.as_tensor(at[..., i], dtype=torch.float32) for i in (0, 1))
    there = torch.isfinite(y)
    one = torch.where(there, 1.0, torch.nan)
    zero = torch.zeros(len(y))
    return Peaks(y, x, one, 0.01 * one, there.sum(1), zero.bool(), zero, zero)


def test_strain_errors__of_the_true_positions_are_zero(scan):
    peaks = true_peaks(scan)
    errors = strain_errors(scan, peaks, peaks.sigma.numpy(), "sigma")
    assert np.abs(errors.error).max() < 1e-6  # positions in float32: 4e-6 px of 50


def test_strain_errors__of_a_known_distortion_are_zero(scan):
    stretch = np.array([[1.02, 0.01], [0.01, 0.98]])
    peaks = true_peaks(scan, stretch)
    stretched = Scan(**{**vars(scan), "distortion": stretch})
    errors = strain_errors(stretched, peaks, peaks.sigma.numpy(), "uniform")
    assert np.abs(errors.error).max() < 1e-6


def test_strain_figures__tell_bias_and_slope_apart():
    truth = np.tile(np.linspace(-0.01, 0.01, 5)[:, None], (1, 4))
    strain = Strain(0.1 * truth + 1e-3, np.full((5, 4), 2e-3), truth, np.zeros(5, int))
    figures = strain.figures()["e_xx"]
    assert figures["bias"] == pytest.approx(1e-3)
    assert figures["slope"] == pytest.approx(1.1)
    assert figures["rms_mean_removed"] == pytest.approx(0.1 * truth[:, 0].std())


@pytest.mark.parametrize("variant", list(VARIANTS.values()))
def test_every_non_learned_detector_finds_flat_disks(scan, variant):
    least = 0.002 if variant == "none" else 0.2  # counts span three decades
    options = {"variant": variant, "min_relative_intensity": least}
    method = Method("x", "correlation", options, "noise:0.1")
    counts = torch.as_tensor(scan.counts(1e6))
    peaks, seconds = find(method, counts, torch.as_tensor(scan.probe)[None], torch.zeros(1, 2))
    assert seconds > 0
    figures = peak_figures([peaks], [scan.batch(1e6, counts.numpy())])
    assert figures["recall"] > 0.5
    assert figures["position_rms_px"] < 0.15
    errors = strain_errors(scan, peaks, **fit_weights(method, peaks, counts, scan.radius_px, scan.edge_px))
    assert np.isfinite(errors.error).all()
    assert np.abs(errors.error).max() < 5e-3


def test_disk_electrons__counts_what_the_disk_holds_without_background(scan):
    counts = torch.as_tensor(scan.patterns * 1e5 + 3.0)
    peaks = true_peaks(scan)
    found = disk_electrons(counts, peaks.qy, peaks.qx, 6.5)
    # disks of very different brightness stand 18 px apart, so that rings to 10.5 px stay clear of them
    assert float(found.nansum(1).mean()) == pytest.approx(1e5, rel=0.01)


def test_bounds__fall_with_the_square_root_of_the_dose(scan):
    assert bounds(scan, 1e4) / bounds(scan, 1e6) == pytest.approx(10.0)


def test_blurred__keeps_all_electrons_but_those_that_leave_the_frame(scan):
    assert blurred(scan).patterns.sum() == pytest.approx(scan.patterns.sum(), rel=1e-3)


def test_counts__are_the_same_on_every_call(scan):
    assert np.array_equal(scan.counts(1e3), scan.counts(1e3))


def test_shortest_basis__turns_from_x_towards_y():
    lattice = np.array([[0, 0], [0, 3.0], [2.0, 0], [2, 3], [0, -3], [-2, 0], [-2, -3]])
    g = shortest_basis(lattice)
    assert sorted(np.hypot(*g.T)) == pytest.approx([2, 3])
    assert g[0, 1] * g[1, 0] - g[0, 0] * g[1, 1] > 0


def test_ring_kernel__has_no_mean():
    assert float(ring_kernel((64, 64), 6.0).sum()) == pytest.approx(0.0, abs=1e-6)

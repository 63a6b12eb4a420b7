"""Strain from cepstra: flat disks of known strain, frames that are not square, blocks, the whole path."""

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.special import erfc

from fcunet import schema
from fcunet.calibrate import calibrate
from fcunet.cepstral import other_lattice
from fcunet.kernels.cepstrum import find_cepstral_peaks
from fcunet.pipeline import compute_strain, find_peaks, fit_lattice

G = np.array([[2.0, 14.0], [13.0, -1.5]])
RADIUS = 2.5


def true_F(shape):
    y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    F = np.tile(np.eye(2), (*shape, 1, 1))
    F[..., 0, 0] += 0.01 * x
    F[..., 1, 1] -= 0.008 * x
    F[..., 0, 1] += 0.005 * y + 0.006 * x
    F[..., 1, 0] += 0.005 * y - 0.006 * x
    return F


def draw(shape=(3, 8), frame=(128, 120), dose=3e5):
    rng = np.random.default_rng(3)
    y, x = np.indices(frame)
    h, k = (v.ravel() for v in np.mgrid[-5:6, -5:6])
    out = np.empty((*shape, *frame), np.uint16)
    F = true_F(shape)
    for at in np.ndindex(*shape):
        g = G @ np.linalg.inv(F[at])
        image = np.full(frame, 1e-3)
        for a, b in zip(h, k, strict=True):
            p = np.array([63.3, 60.4]) + a * g[0] + b * g[1]
            height = np.exp(-0.12 * (a * a + b * b)) * rng.uniform(0.3, 1)
            image += height * erfc((np.hypot(y - p[0], x - p[1]) - RADIUS) / 0.8) / 2
        out[at] = rng.poisson(dose * image / image.sum())
    return xr.Dataset({"intensity": (schema.DATACUBE_DIMS, out)})


@pytest.fixture(scope="module")
def cube():
    return draw()


@pytest.fixture(scope="module")
def measured(cube):
    return calibrate(cube)


def test_find_cepstral_peaks__lie_at_vectors_of_the_real_lattice():
    image = torch.from_numpy(draw((1, 1), (128, 128))["intensity"].values[0].astype(np.float32))
    peaks = find_cepstral_peaks(image, radius_px=RADIUS, edge_sigma_px=0.6, nearest_spacing_px=13.0)
    n = int(peaks.n_peaks[0])
    at = torch.stack([peaks.qy[0, :n], peaks.qx[0, :n]], -1).numpy() - 64
    real = other_lattice(G @ np.linalg.inv(true_F((1, 1))[0, 0]), 128)
    index = at @ np.linalg.inv(real)
    assert n >= 12
    assert torch.isnan(peaks.qy[0, n:]).all()
    # nearly all on the lattice, to a tenth of the width of a peak
    off = np.linalg.norm((index - np.rint(index)) @ real, axis=1)
    assert np.median(off) < 0.1
    # each with its opposite
    pairs = np.linalg.norm(at[:, None] + at[None], axis=-1).min(1)
    assert np.median(pairs) < 1e-3


def test_cepstral_strain__recovers_a_known_field(cube, measured):
    lattice = fit_lattice(find_peaks(cube, "cepstral", calibration=measured))
    found = compute_strain(lattice, reference=G)["F"].values
    truth = true_F((3, 8))
    error = found - truth - (found - truth).mean((0, 1))  # a constant is the reference's
    # 100 disks of random heights, 3e5 electrons: 0.33e-3 per component; a constant 3.7e-3 cancels
    assert np.sqrt((error**2).mean()) < 0.7e-3
    slope = np.sum((truth - np.eye(2)) * (found - np.eye(2))) / np.sum((truth - np.eye(2)) ** 2)
    assert slope == pytest.approx(1, abs=0.03)
    assert np.isfinite(lattice["origin_qy"]).all()


def test_cepstral_strain__does_not_depend_on_blocks(cube, measured):
    whole = find_peaks(cube, "cepstral", calibration=measured)
    parts = find_peaks(cube.chunk(scan_y=2, scan_x=3), "cepstral", calibration=measured).compute()
    xr.testing.assert_equal(whole, parts)


def test_cepstral_lattice__error_bars_are_of_the_right_size(cube, measured):
    lattice = fit_lattice(find_peaks(cube, "cepstral", calibration=measured))
    strain = compute_strain(lattice, reference=G)
    truth = true_F((3, 8))
    pulls = []
    for name, value in (("e_xx", truth[..., 1, 1] - 1), ("e_yy", truth[..., 0, 0] - 1)):
        error = strain[name].values - value
        pulls.append((error - error.mean()) / strain[f"{name}_std"].values)
    # heights of disks are drawn anew for each pattern: error bars see the scatter between peaks only
    assert 0.4 < np.sqrt(np.mean(np.square(pulls))) < 2.5


def test_find_peaks__says_that_cepstral_peaks_are_vectors_of_real_space(cube, measured):
    peaks = find_peaks(cube.isel(scan_y=slice(1), scan_x=slice(1)), "cepstral",
                       calibration=calibrate(cube.isel(scan_y=slice(1), scan_x=slice(1))))  # fmt: skip
    assert peaks.attrs["space"] == "real"
    assert "real space" in peaks["peak_intensity"].attrs["meaning"]

"""Systematic errors: what calibration leaves, as a strain."""

import numpy as np
import pytest
from test_pipeline_strain import SHAPE, G, make_peaks

from fcunet.kernels.ellipse import Ellipse
from fcunet.pipeline import compute_strain, fit_lattice
from fcunet.systematic import systematic_errors

RECORD = {
    "ellipse": {"method": "ring", "terms_std": 0.002},
    "origin": {"scatter_px": 0.3},
    "q_pixel": {"value": 0.01, "std": 1e-5},
}


def test_systematic_errors__are_taken_from_the_calibration_of_the_scan():
    axis = {"first": 0.0, "step": 0.01, "units": "1/angstrom"}
    peaks = make_peaks().assign_attrs(datacube={"calibration": RECORD}, qy=axis)
    theta = np.full(SHAPE, 0.02)
    free, held = (fit_lattice(peaks, basis=G, fit_origin=fit) for fit in (True, False))
    relative = systematic_errors(free, theta, absolute=False)
    assert relative == pytest.approx({"systematic_ellipse": 2 * 0.02 * 0.002, "systematic_descan": 0.0})
    absolute = systematic_errors(free, theta, absolute=True)
    assert absolute["systematic_ellipse"] == 0.002
    assert absolute["systematic_pixel"] == pytest.approx(1e-3)
    # some 50 peaks of 31 x 27 px: a disk of 116 px radius, mean distance 77 px
    assert systematic_errors(held, theta, absolute=False)["systematic_descan"] == pytest.approx(
        0.3 / 77, rel=0.1
    )


def test_systematic_errors__of_a_distortion_left_in_is_what_it_does():
    turn = 0.03
    F = np.tile(np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]), (*SHAPE, 1, 1))
    F[:, :3] = np.eye(2)
    bend = Ellipse.from_terms(0.002, 0.0).matrix
    plain = make_peaks(F=F)
    middle = np.array([127.0, 130.0])
    q = np.stack([plain["peak_qy"] - middle[0], plain["peak_qx"] - middle[1]], -1) @ bend.T + middle
    bent = plain.assign({n: (plain[n].dims, q[..., i]) for i, n in enumerate(("peak_qy", "peak_qx"))})
    lattice = fit_lattice(bent.assign_attrs(calibration=RECORD), basis=G)
    strain = compute_strain(lattice, reference=(0, 8, 0, 3), measure="biot")
    false = float(np.abs(strain["e_xy"][:, 3:]).max())
    here = systematic_errors(lattice, np.full(SHAPE, turn), absolute=False)
    assert false == pytest.approx(here["systematic_ellipse"], rel=0.05)


def test_systematic_errors__what_is_not_known_is_left_out():
    lattice = fit_lattice(make_peaks(), basis=G, fit_origin=False)
    assert systematic_errors(lattice, np.full(SHAPE, np.nan), absolute=True) == {}

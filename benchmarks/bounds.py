"""Cramer-Rao bounds: the smallest standard deviation that any unbiased method can reach at a given dose.

A disk of radius R px with N electrons, flat inside, its edge blurred by a Gaussian of standard deviation
s, on a background of b electrons per px, has the rate I0 h(r) + b, h(r) = erfc((r - R) / (s sqrt 2)) / 2,
with I0 = N / (pi R^2). Its Fisher information about the position along one axis is J = pi I0^2 int
h'(r)^2 / (I0 h + b) r dr, about 0.9032 N / (R s) for s << R without background. Flat interiors are
assumed: unknown texture can only make things worse.
"""

import numpy as np
from scipy.special import erfc


def disk_information(electrons, radius_px, edge_sigma_px, background=0.0):
    """Fisher information about one coordinate of a disk, in 1/px^2; the bound on its variance is the inverse.

    Parameters
    ----------
    electrons : array_like
        Electrons in the disk, any shape; 0 gives information 0.
    radius_px, edge_sigma_px : float
        Radius and standard deviation of the edge blur, px.
    background : float
        Electrons per px under the disk.

    Returns
    -------
    ndarray
        Information, shape of `electrons`.
    """
    electrons = np.asarray(electrons, float)
    r = np.linspace(max(1e-6, radius_px - 8 * edge_sigma_px), radius_px + 8 * edge_sigma_px, 4001)
    x = (r - radius_px) / (edge_sigma_px * np.sqrt(2))
    h = erfc(x) / 2
    slope = np.exp(-(x**2)) / (edge_sigma_px * np.sqrt(2 * np.pi))
    density = electrons[..., None] / (np.pi * radius_px**2)
    rate = density * h + background
    integrand = np.where(rate > 0, density**2 * slope**2 / np.where(rate > 0, rate, 1), 0) * r
    return np.pi * np.trapezoid(integrand, r, axis=-1)


def strain_bound(positions, electrons, radius_px, edge_sigma_px, background=0.0):
    """Cramer-Rao bound on the strain of one pattern, origin and lattice free.

    Parameters
    ----------
    positions : array_like, shape (P, 2)
        Disk centres relative to the direct beam, (y, x) in px.
    electrons : array_like, shape (P,)
        Electrons per disk.

    Returns
    -------
    dict
        Standard deviations of ``e_xx``, ``e_yy``, ``e_xy`` and ``theta`` (rad).
    """
    positions = np.asarray(positions, float)
    design = np.column_stack([np.ones(len(positions)), positions])
    information = disk_information(electrons, radius_px, edge_sigma_px, background)
    covariance = np.linalg.inv(np.einsum("p,pi,pj->ij", information, design, design))
    yy, xx = covariance[1, 1], covariance[2, 2]
    half = np.sqrt(xx + yy) / 2
    return {"e_xx": np.sqrt(xx), "e_yy": np.sqrt(yy), "e_xy": half, "theta": half}

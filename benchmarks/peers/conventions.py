"""Strain of the same lattices and peaks in py4DSTEM, quantem, pyxem, and here with ``convention=``.

    python -m benchmarks.peers.conventions

The other programs run their own released code, each in its environment. First they are given lattice vectors
of known deformations (those of the table in docs/concepts.md, and random ones), then noisy peaks to fit, on
which the weights of their fits count. Exits with 1 if any number differs by more than 1e-4.
"""

import sys
from importlib import metadata

import numpy as np

from benchmarks.peers.environment import PEERS, run_worker
from fcunet.kernels.lattice_fit import fit_lattice
from fcunet.kernels.strain import CONVENTIONS, deformation_gradient, strain_from_F

TOLERANCE = 1e-4
PACKAGES = ("py4dstem", "quantem", "pyxem")
_TURN = np.array([[np.cos(0.03), -np.sin(0.03)], [np.sin(0.03), np.cos(0.03)]])  # 30 mrad, rows to columns
CASES = {
    "stretch of 2 % along rows": np.diag([1.02, 1.0]),
    "shear of 1 %": np.array([[1.0, 0.01], [0.01, 1.0]]),
    "rotation of 30 mrad, rows to columns": _TURN,
    "5 % along rows, then 30 mrad": _TURN @ np.diag([1.05, 1.0]),
}
REFERENCE = np.array([[2.0, 30.5], [34.0, -3.0]])
_PAIRS = {"rows": "e_yy", "columns": "e_xx", "shear": "e_xy", "theta": "theta"}


def deformations(n_random: int = 4, seed: int = 0) -> np.ndarray:
    """The cases of the table, and as many rows of random F within a few percent: (rows, 4, 2, 2)."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [np.stack(list(CASES.values()))[None], np.eye(2) + rng.normal(0, 0.02, (n_random, 4, 2, 2))]
    )


def from_lattices() -> tuple[dict, dict]:
    """Strain of `deformations` by each package's own code, and by our formula of the same name."""
    F = deformations()
    lattice = REFERENCE @ np.linalg.inv(F)
    theirs = {
        name: run_worker(name, f"{name}_worker.py", "lattice_strain", lattice=lattice, reference=REFERENCE)
        for name in PACKAGES
    }
    F = deformation_gradient(lattice, REFERENCE)
    ours = {name: strain_from_F(F, convention=name) for name in CONVENTIONS}
    return theirs, ours


def largest_difference(theirs: dict, ours: dict) -> float:
    """Over all positions and components."""
    return max(float(np.abs(theirs[a] - ours[b]).max()) for a, b in _PAIRS.items())


def quantem_from_peaks(noise_px: float = 0.1, seed: int = 1) -> float:
    """Largest difference when quantem fits noisy peaks of unequal strength itself."""
    rng = np.random.default_rng(seed)
    F = np.eye(2) + rng.normal(0, 0.01, (4, 5, 2, 2))
    h, k = (a.ravel() for a in np.mgrid[-3:4, -3:4])
    q = 128 + np.stack([h, k], -1) @ (REFERENCE @ np.linalg.inv(F))
    q += rng.normal(0, noise_px, q.shape)
    intensity = np.exp(-np.hypot(h, k)) * rng.uniform(0.5, 1.5, q.shape[:-1])
    given = {"origin": np.array([128.0, 128.0]), "max_peak_spacing": 10.0}
    theirs = run_worker(
        "quantem",
        "quantem_worker.py",
        "fitted_strain",
        qy=q[..., 0],
        qx=q[..., 1],
        intensity=intensity,
        detector_shape=(256, 256),
        basis=REFERENCE,
        reference=REFERENCE,
        **given,
    )
    fit = fit_lattice(
        q[..., 0],
        q[..., 1],
        g=REFERENCE,
        intensity=intensity,
        weighting="intensity",
        robust=False,
        **given,
    )
    ours = strain_from_F(deformation_gradient(fit.g, REFERENCE), convention="quantem")
    return largest_difference(theirs, ours)


def main() -> int:
    packages = ", ".join(PEERS[name].package.replace("==", " ") for name in PACKAGES)
    print(f"{packages}; fcunet {metadata.version('fcunet')}\n")
    theirs, ours = from_lattices()
    print(f"{'rows, columns, shear (%), theta (mrad)':38}" + "".join(f"{name:>34}" for name in PACKAGES))
    scale = {"rows": 100, "columns": 100, "shear": 100, "theta": 1000}
    for n, case in enumerate(CASES):
        cells = [" ".join(f"{scale[c] * theirs[name][c][0, n]:+7.3f}" for c in _PAIRS) for name in PACKAGES]
        print(f"{case:38}" + "".join(f"{cell:>34}" for cell in cells))
    worst = 0.0
    print("\nlargest difference from convention= of the same name, over these and 16 random deformations:")
    for name in PACKAGES:
        difference = largest_difference(theirs[name], ours[name])
        worst = max(worst, difference)
        print(f"  {name:10} {difference:.1e}")
    difference = quantem_from_peaks()
    worst = max(worst, difference)
    print(f"\nquantem's own fit of noisy peaks against weighting=intensity, robust=False: {difference:.1e}")
    verdict = "within" if worst <= TOLERANCE else "BEYOND"
    print(f"\nlargest difference in strain {worst:.1e}, {verdict} {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())

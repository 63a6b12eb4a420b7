"""From peaks to figures: strain errors against the exact truth, matches of peaks with true spots, bounds."""

from dataclasses import dataclass

import numpy as np

from fcunet.kernels.lattice import fit_lattice
from fcunet.kernels.peaks import Peaks
from fcunet.kernels.residuals import fit_sigma_curve
from fcunet.kernels.strain import deformation_gradient, strain_from_F, strain_std, with_shared_strain
from fcunet.training.evaluate import Batch, Totals, match_peaks

from .accuracy_data import Scan
from .bounds import strain_bound

COMPONENTS = ("e_xx", "e_yy", "e_xy", "theta")
_WRONG = 0.02  # a lattice off by more is another lattice: not found, and counted as such


@dataclass
class Strain:
    """Strain of n patterns against the truth; (n, 4) in the order of `COMPONENTS`, NaN without a lattice."""

    error: np.ndarray
    std: np.ndarray
    truth: np.ndarray
    group: np.ndarray  # (n,) which crystal: what a reference region would have in common

    @staticmethod
    def concatenate(parts: list["Strain"]) -> "Strain":
        """One scan after the other."""
        return Strain(
            *(np.concatenate([getattr(p, k) for p in parts]) for k in ("error", "std", "truth")),
            np.concatenate([np.full(len(p.error), i) for i, p in enumerate(parts)]),
        )

    def chosen(self, which: np.ndarray) -> "Strain":
        """Some of the patterns."""
        return Strain(self.error[which], self.std[which], self.truth[which], self.group[which])

    def figures(self) -> dict[str, dict[str, float]]:
        """Per component: rms, mean-removed rms, bias, slope, shares within 1 and 2 error bars, patterns."""
        out = {}
        for i, name in enumerate(COMPONENTS):
            error, std, truth = self.error[:, i], self.std[:, i], self.truth[:, i]
            ok = np.isfinite(error)
            e, t, ratio = error[ok], truth[ok], np.abs(error[ok]) / std[ok]
            centred = e.copy()
            for g in np.unique(self.group[ok]):
                centred[self.group[ok] == g] -= e[self.group[ok] == g].mean()
            out[name] = {
                "rms": float(np.sqrt(np.mean(e**2))) if len(e) else np.nan,
                "rms_mean_removed": float(np.sqrt(np.mean(centred**2))) if len(e) else np.nan,
                "bias": float(e.mean()) if len(e) else np.nan,
                "slope": slope(t, e) if len(e) > 1 else np.nan,
                "within_1": float((ratio < 1).mean()) if len(e) else np.nan,
                "within_2": float((ratio < 2).mean()) if len(e) else np.nan,
                "fitted": float(ok.mean()),
            }
        return out


def slope(truth: np.ndarray, error: np.ndarray) -> float:
    """Of found against true strain: 1 is right, less flattens a profile."""
    spread = truth - truth.mean()
    return float(1 + np.nansum(spread * error) / (spread @ spread))


def strain_errors(
    scan: Scan,
    peaks: Peaks,
    sigma: np.ndarray,
    weighting: str,
    *,
    dilation_std: np.ndarray | float = 0.0,
    from_scan: bool = False,
) -> Strain:
    """Strain that the lattice fit finds in the peaks of a scan, less the truth; the reference is exact.

    With `from_scan`, sigma is corrected by the scatter of the scan, as a run does by itself.
    """
    distorted = scan.g_ref @ scan.distortion.T
    qy, qx, corrected, curve = peaks.qy.numpy(), peaks.qx.numpy(), sigma, None
    for rounds_left in (2, 1, 0) if from_scan else (0,):
        fit = fit_lattice(
            qy, qx, g=distorted, origin=scan.origin, sigma=corrected,
            intensity=np.maximum(np.nan_to_num(peaks.intensity.numpy()), 1e-12), weighting=weighting,
        )  # fmt: skip
        if rounds_left:
            curve = fit_sigma_curve(qy, qx, sigma, g=fit.g, origin=fit.origin, curve=curve)
            corrected = sigma if curve is None else curve.applied(sigma)
    F = deformation_gradient(fit.g, distorted)
    # both lattices are distorted alike: F in the frame of the undistorted detector
    A = scan.distortion
    F = A.T @ F @ np.linalg.inv(A.T)
    found, true = strain_from_F(F), strain_from_F(scan.F)
    covariance = with_shared_strain(fit.covariance, fit.g, dilation_std, peaks.dilation.numpy())
    std = strain_std(fit.g, distorted, covariance)
    error = np.stack([found[c] - true[c] for c in COMPONENTS], -1)
    error[~(np.abs(error) < _WRONG).all(-1)] = np.nan
    return Strain(
        error,
        np.stack([std[f"{c}_std"] for c in COMPONENTS], -1),
        np.stack([true[c] for c in COMPONENTS], -1),
        np.zeros(len(scan), int),
    )


def bounds(scan: Scan, dose: float) -> np.ndarray:
    """Cramer-Rao bound (n, 4) for evenly filled disks with the same electrons."""
    height, width = scan.patterns.shape[1:]
    margin = scan.radius_px + 1
    out = np.full((len(scan), 4), np.nan)
    for i in range(len(scan)):
        y, x = scan.spot_position[i].T
        ok = (y > margin) & (y < height - 1 - margin) & (x > margin) & (x < width - 1 - margin)
        n = scan.spot_share[i][ok] * dose
        if (n > 0).sum() >= 3:
            found = strain_bound(scan.spot_position[i][ok] - scan.origin[i], n, scan.radius_px, scan.edge_px)
            out[i] = [found[c] for c in COMPONENTS]
    return out


def peak_figures(peaks: list[Peaks], batches: list[Batch]) -> dict[str, float]:
    """Recall, precision, position error, radial bias, |V_g| with controls, coverage of `peak_sigma`."""
    totals = Totals()
    radial: list[np.ndarray] = []
    for found, batch in zip(peaks, batches, strict=True):
        margin = float(batch.radius.max()) + 1
        matches = match_peaks(found, batch, margin_px=margin)
        totals.add(matches, batch)
        outward = (batch.spot_position - batch.origin[:, None]).numpy()
        length = np.hypot(outward[..., 0], outward[..., 1])
        kept = (matches.found & matches.wanted).numpy() & (length > 2)
        error = matches.error.numpy()
        radial.append(((error * outward).sum(-1)[kept]) / length[kept])
    along = np.concatenate(radial)
    figures = totals.figures()
    truth, root = (np.concatenate([r[k].numpy() for r in totals.rows]) for k in ("truth", "root"))
    allowed = truth > 0
    figures["R_sqrt_I_allowed"] = float(np.abs(truth - root)[allowed].sum() / max(truth[allowed].sum(), 1e-9))
    figures["radial_bias_px"] = float(along.mean()) if len(along) else np.nan
    return figures

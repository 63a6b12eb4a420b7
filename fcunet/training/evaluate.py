"""How good a detector is on simulated patterns whose disks are known: positions, amplitudes, error bars.

Every figure is a plain number per set of patterns; sets differ in dose. Amplitudes are judged beside two
controls that know nothing of the crystal, each granted its best scale for every single pattern: the square
root of the disk intensity, and a smooth fall-off with distance from the direct beam, which itself is left
out.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from ..kernels.peaks import Peaks
from ..kernels.strain import shared_shear
from ..nn.detect import detect
from ..nn.model import FCUNet, Network, disk_radius

MATCH_PX = 1.0
VISIBLE_ELECTRONS = 20.0  # fewer electrons in a disk: not asked for
LIT_ELECTRONS = 1.0  # a peak on a disk with fewer is false


class Batch(Protocol):
    """What is needed of a training batch; see :class:`fcunet.training.dataset.TrainingBatch`."""

    pattern: Tensor
    probe: Tensor
    spot_position: Tensor
    spot_amplitude: Tensor
    spot_electrons: Tensor
    origin: Tensor
    optics: Tensor

    def to(self, device: torch.device | str, /) -> Self: ...


Detector = Callable[[Batch], Peaks]


class Matches(NamedTuple):
    """True spots, each with the peak that is mutually nearest within 1 px; n patterns, S spots."""

    found: Tensor  # (n, S) bool
    wanted: Tensor  # (n, S) bool: visible and wholly in the frame
    error: Tensor  # (n, S, 2) found - true (y, x) px, NaN if not found
    sigma: Tensor  # (n, S) px
    amplitude: Tensor  # (n, S) volts; NaN if not found
    dilation_std: Tensor  # (n,) a strain that the positions of a pattern share
    dilation: Tensor  # (n,) the part of it with a known sign
    n_false: Tensor  # (n,) peaks on no lit spot
    n_peaks: Tensor  # (n,)


def match_peaks(peaks: Peaks, batch: Batch, *, margin_px: float = 0.0, match_px: float = MATCH_PX) -> Matches:
    """Pair true spots with detected peaks.

    Parameters
    ----------
    peaks : Peaks
        Of the n patterns of `batch`.
    batch : Batch
        The truth.
    margin_px : float
        Spots nearer to the border are not asked for (their disks are cut).
    match_px : float
        Largest distance of a pair, px.
    """
    height, width = batch.pattern.shape[-2:]
    true = batch.spot_position  # (n, S, 2)
    electrons = torch.nan_to_num(batch.spot_electrons)
    found = torch.stack((peaks.qy, peaks.qx), dim=-1).to(true)  # (n, P, 2)
    distance = torch.nan_to_num(
        (true[:, :, None] - found[:, None]).square().sum(-1).sqrt(), nan=1e9
    )  # (n, S, P)
    lit = electrons >= LIT_ELECTRONS
    distance = torch.where(lit[:, :, None], distance, 1e9)
    near, peak = distance.min(dim=2)  # (n, S)
    spot = distance.argmin(dim=1)  # (n, P)
    mutual = spot.gather(1, peak) == torch.arange(true.shape[1], device=true.device)
    ok = (near < match_px) & mutual

    def of(values: Tensor) -> Tensor:
        return torch.where(ok, values.gather(1, peak), torch.nan)

    error = torch.stack((of(found[..., 0]) - true[..., 0], of(found[..., 1]) - true[..., 1]), dim=-1)
    y, x = true.unbind(-1)
    inside = (
        (y >= margin_px) & (y <= height - 1 - margin_px) & (x >= margin_px) & (x <= width - 1 - margin_px)
    )
    real = torch.isfinite(peaks.qy)
    false = real & (distance.min(dim=1).values > match_px)
    return Matches(
        found=ok,
        wanted=inside & (electrons >= VISIBLE_ELECTRONS),
        error=error,
        sigma=of(peaks.sigma),
        amplitude=of(peaks.intensity),
        dilation_std=peaks.dilation_std,
        dilation=peaks.dilation,
        n_false=false.sum(1),
        n_peaks=real.sum(1),
    )


class AffineErrors(NamedTuple):
    """What the position errors of each pattern would be taken for, and how far a fit would trust it."""

    strain: Tensor  # (n, 2, 2): error of (y, x) per px of (y, x); NaN with too few spots
    std: Tensor  # (n, 2): standard deviation of the elements along y and along x, if errors are independent


def affine_error(
    matches: Matches, position: Tensor, *, weighted: bool = True, min_spots: int = 6
) -> AffineErrors:
    """Strain that the position errors of each pattern would be taken for.

    The errors are fitted by an origin shift and a 2 x 2 matrix times the true position, by least squares with
    weights 1 / sigma^2: to first order what a lattice fit would make of them. Its standard deviation is that
    of :func:`fcunet.kernels.lattice_fit.fit_lattice`, scaled by (4 + chi^2) / (4 + degrees of freedom).
    """
    use = matches.found
    sigma = torch.nan_to_num(matches.sigma, nan=1.0) if weighted else torch.ones_like(matches.sigma)
    w = (use / sigma.clamp_min(1e-3).square()).double()  # (n, S)
    total = w.sum(1).clamp_min(1e-12)

    def centred(v: Tensor) -> Tensor:
        v = torch.nan_to_num(v).double()
        return v - ((w[..., None] * v).sum(1) / total[:, None])[:, None]

    p, e = centred(position), centred(matches.error)
    a = torch.einsum("ns,nsi,nsj->nij", w, p, p)
    b = torch.einsum("ns,nsi,nsj->nij", w, e, p)
    count = use.sum(1)
    good = (count >= min_spots) & (torch.linalg.det(a) > 1e-9 * torch.linalg.matrix_norm(a).square())
    a = torch.where(good[:, None, None], a, torch.eye(2, dtype=a.dtype, device=a.device))
    inverse = torch.linalg.inv(a)
    strain = b @ inverse
    rest = e - torch.einsum("nij,nsj->nsi", strain, p)
    scale = (4 + (w * rest.square().sum(-1)).sum(1)) / (4 + 2 * count - 6)
    std = (inverse.diagonal(dim1=1, dim2=2) * scale[:, None]).clamp_min(0).sqrt()
    return AffineErrors(
        torch.where(good[:, None, None], strain, torch.nan), torch.where(good[:, None], std, torch.nan)
    )


def component_errors(fit: AffineErrors, matches: Matches) -> tuple[Tensor, Tensor]:
    """Errors of e_xx, e_yy, e_xy and theta, and what a run would state for them; (n, 4) each.

    The latter hold the dilation that all peaks of a pattern share and what goes with it, as in
    :func:`fcunet.kernels.strain.with_shared_strain`; its NaN counts as 0.
    """
    (yy, yx), (xy, xx) = (row.unbind(-1) for row in fit.strain.unbind(1))
    error = torch.stack((xx, yy, (xy + yx) / 2, (xy - yx) / 2), dim=1)
    along_y, along_x = fit.std.unbind(1)
    turned = torch.hypot(along_y, along_x) / 2
    independent = torch.stack((along_x, along_y, turned, turned), dim=1)
    dilation = torch.nan_to_num(matches.dilation_std).to(independent)
    shear = dilation * torch.as_tensor(shared_shear(matches.dilation.numpy()))
    both = torch.hypot(dilation, shear)
    shared = torch.stack((both, both, shear, torch.zeros_like(both)), dim=1)
    return error, torch.hypot(independent, shared)


class Totals:
    """Gathers matches over batches; :meth:`figures` condenses them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Tensor]] = []

    def add(self, matches: Matches, batch: Batch) -> None:
        """Keep what the figures need of one batch."""
        affine, uniform = (affine_error(matches, batch.spot_position, weighted=w) for w in (True, False))
        error, std = component_errors(affine, matches)
        electrons = torch.nan_to_num(batch.spot_electrons)
        radius2 = torch.nan_to_num((batch.spot_position - batch.origin[:, None]).square().sum(-1), nan=0.0)
        keep = matches.found & matches.wanted
        beams = keep & (radius2 > 4)  # px: the direct beam has no |V_g|, and would decide every scale
        truth = torch.nan_to_num(batch.spot_amplitude)
        controls = _controls(truth, electrons, radius2, beams)
        scale = _best_scale(truth, matches.amplitude.nan_to_num(), beams)
        self.rows.append(
            {
                "wanted": matches.wanted.sum(1),
                "found": keep.sum(1),
                "n_peaks": matches.n_peaks,
                "n_false": matches.n_false,
                "error": matches.error[keep],
                "sigma": matches.sigma[keep],
                "strain": affine.strain.flatten(1),
                "in_bars": error.abs()[:, :2] / std[:, :2],  # of e_xx and e_yy
                "strain_uniform": uniform.strain.flatten(1),
                "truth": truth[beams],
                "predicted": matches.amplitude[beams],
                "rescaled": (scale * matches.amplitude)[beams],
                "root": controls[0][beams],
                "blind": controls[1][beams],
                "suppression": _forbidden_ratio(matches.amplitude, truth, electrons, beams),
                "suppression_input": _forbidden_ratio(electrons.sqrt(), truth, electrons, beams),
            }
        )

    def figures(self) -> dict[str, float]:
        """All figures of merit, as plain numbers; NaN where there was nothing to judge."""
        t = {k: torch.cat([row[k] for row in self.rows]) for k in self.rows[0]}
        squared = t["error"].square()
        ratio = (t["error"].abs() / t["sigma"][:, None]).flatten()
        allowed = t["truth"] > 0

        def r_factor(name: str, mask: Tensor | None = None) -> float:
            a, b = (t["truth"], t[name]) if mask is None else (t["truth"][mask], t[name][mask])
            return _number((a - b).abs().sum() / a.sum().clamp_min(1e-9))

        strain = t["strain"][torch.isfinite(t["strain"]).all(1)]
        in_bars = t["in_bars"][torch.isfinite(t["in_bars"])]
        uniform = t["strain_uniform"][torch.isfinite(t["strain_uniform"]).all(1)]
        return {
            "recall": _number(t["found"].sum() / t["wanted"].sum().clamp_min(1)),
            "precision": _number(1 - t["n_false"].sum() / t["n_peaks"].sum().clamp_min(1)),
            "position_rms_px": _number(squared.mean().sqrt()),
            "position_median_px": _number(squared.mean(1).sqrt().median()) if len(squared) else torch.nan,
            "strain_rms_1e-3": 1e3 * _trimmed_rms(strain),
            "strain_uniform_rms_1e-3": 1e3 * _trimmed_rms(uniform),
            "strain_bias_1e-3": 1e3 * _number(strain[:, [0, 3]].median()) if len(strain) else torch.nan,
            "strain_coverage_1": _number((in_bars < 1).float().mean()),
            "strain_coverage_2": _number((in_bars < 2).float().mean()),
            "coverage_1": _number((ratio < 1).float().mean()),
            "coverage_2": _number((ratio < 2).float().mean()),
            "sigma_68": _number(ratio.quantile(0.6827)) if 0 < len(ratio) < 10_000_000 else torch.nan,
            "R": r_factor("predicted"),
            "R_scaled": r_factor("rescaled"),
            "R_allowed": r_factor("predicted", allowed),
            "R_scaled_allowed": r_factor("rescaled", allowed),
            "R_sqrt_I": r_factor("root"),
            "R_blind": r_factor("blind"),
            "R_blind_allowed": r_factor("blind", allowed),
            "forbidden_ratio": _number(t["suppression"].nanmedian()) if len(t["suppression"]) else torch.nan,
            "forbidden_ratio_sqrt_I": _number(t["suppression_input"].nanmedian())
            if len(t["suppression"])
            else torch.nan,
            "n_spots": float(len(t["truth"])),
            "n_forbidden": float((~allowed).sum()),
        }


def network_detector(model: Network, *, threshold: float | None = None, max_num_peaks: int = 200) -> Detector:
    """`model` as a detector, in the mode (train or eval) it is in; its peaks are on the CPU.

    Patterns that need different binning, which a real scan never mixes, go through apart.
    """
    device = next(model.parameters()).device

    def find(batch: Batch) -> Peaks:
        bins = torch.ceil(disk_radius(batch.probe) / model.config.max_radius_px).clamp_min(1)
        groups = [(bins == k).nonzero()[:, 0] for k in bins.unique()]
        order = torch.cat(groups).argsort()
        with torch.no_grad():
            parts = [
                detect(
                    model,
                    batch.pattern[rows].to(device),
                    batch.probe[rows].to(device),
                    optics=batch.optics[rows].to(device),
                    threshold=threshold,
                    max_num_peaks=max_num_peaks,
                )
                for rows in groups
            ]
        return Peaks(*(torch.cat(fields).cpu()[order] for fields in zip(*parts, strict=True)))

    return find


def evaluate(
    detector: Detector,
    batches: Iterable[Batch],
    *,
    margin_px: float | None = None,
    match_px: float = MATCH_PX,
) -> dict[str, float]:
    """Figures of merit of `detector` on `batches`.

    Parameters
    ----------
    detector : callable
        Batch -> Peaks.
    batches : iterable of Batch
        Patterns and truth of one dose, say.
    margin_px : float, optional
        Disks nearer to the border are not asked for. Default: the largest disk radius of each batch.
    match_px : float
        As for :func:`match_peaks`.
    """
    totals = Totals()
    for batch in batches:
        margin = float(disk_radius(batch.probe).max()) if margin_px is None else margin_px
        totals.add(match_peaks(detector(batch), batch, margin_px=margin, match_px=match_px), batch)
    if not totals.rows:
        raise ValueError("no batches to evaluate on; give at least one")
    return totals.figures()


def surviving_dilation(model: FCUNet, batch: Batch, *, dilation: float = 3e-3) -> Tensor:
    """Share of a dilation of the positions it is given that the second stage leaves in, per pattern.

    The true positions are put outwards, then inwards, by `dilation`, a strain, and read; the two answers are
    compared. 0: it looks for itself; 1: it believes what it is told, errors of the first stage included.

    Returns
    -------
    Tensor, shape (n,)
        NaN where fewer than two disks can be seen.
    """
    lit = (torch.nan_to_num(batch.spot_electrons) >= VISIBLE_ELECTRONS)[..., None]  # (n, S, 1)
    q = torch.where(lit, batch.spot_position - batch.origin[:, None], torch.nan)
    read, sigma = [], q[..., 0]
    for factor in (1 + dilation, 1 - dilation):
        given = batch.origin[:, None] + factor * q  # (n, S, 2)
        with torch.no_grad():
            found = model.read_disks(
                batch.pattern, batch.probe, given[..., 0], given[..., 1], optics=batch.optics
            )
        read.append(given + found.offset)
        sigma = found.log_sigma.exp()
    weight = torch.where(lit[..., 0] & torch.isfinite(q[..., 0]), sigma**-2, 0.0)[..., None]
    q, moved = torch.nan_to_num(q), torch.nan_to_num(read[0] - read[1])
    q = q - (weight * q).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1e-12)
    left = (weight * moved * q).sum((1, 2)) / (weight * q.square()).sum((1, 2)).clamp_min(1e-12)
    return torch.where((weight[..., 0] > 0).sum(1) > 1, left / (2 * dilation), torch.nan)


def _best_scale(truth: Tensor, guess: Tensor, keep: Tensor) -> Tensor:
    """Least-squares factor (n, 1) that takes `guess` to `truth` on the spots kept."""
    k = keep.to(truth)
    return ((k * truth * guess).sum(1) / (k * guess.square()).sum(1).clamp_min(1e-12))[:, None]


def _controls(truth: Tensor, electrons: Tensor, radius2: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(I), and the best of 24 Gaussian fall-offs, scaled to the truth of each pattern; both (n, S)."""
    root = electrons.sqrt()
    root = _best_scale(truth, root, keep) * root
    span = torch.where(keep, radius2, 0).amax(1, keepdim=True).clamp_min(1.0)
    best, best_cost = torch.zeros_like(truth), torch.full_like(truth[:, :1], torch.inf)
    for steepness in torch.linspace(0, 6, 24):
        guess = torch.exp(-steepness * radius2 / span)
        guess = _best_scale(truth, guess, keep) * guess
        cost = ((truth - guess).abs() * keep).sum(1, keepdim=True)
        best = torch.where(cost < best_cost, guess, best)
        best_cost = torch.minimum(best_cost, cost)
    return root, best


def _forbidden_ratio(amplitude: Tensor, truth: Tensor, electrons: Tensor, keep: Tensor) -> Tensor:
    """Per pattern: median amplitude on lit forbidden spots over that on allowed ones; NaN without either."""
    lit = keep & (electrons >= 5 * VISIBLE_ELECTRONS)
    forbidden = torch.where(lit & (truth == 0), amplitude, torch.nan).nanmedian(1).values
    allowed = torch.where(lit & (truth > 0), amplitude, torch.nan).nanmedian(1).values
    return forbidden / allowed


def _trimmed_rms(strain: Tensor, share: float = 0.95) -> float:
    """rms of the elements over the best 95 % of the patterns: one lost lattice must not hide all else."""
    if not len(strain):
        return float("nan")
    power = strain.square().mean(1).sort().values
    return _number(power[: max(int(share * len(power)), 1)].mean().sqrt())


def _number(value: Tensor) -> float:
    return float(value)

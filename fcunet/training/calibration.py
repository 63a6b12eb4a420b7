"""Thresholds and error bars, tuned on validation patterns after training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.strain import shared_shear
from ..nn.disks import CURVE_COUNTS, CURVE_OCTAVES
from ..nn.model import Network, disk_radius
from ..nn.published import build_network
from .evaluate import Batch, Detector, affine_error, evaluate, match_peaks, network_detector

THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
_FEWEST = 50  # disks of one size, from which their errors are judged
FLOORS_PX = (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06)
DILATION_SCALES = (0.0, *(round(0.25 * 1.07**k, 3) for k in range(50)))
# Held-out patterns allow none at all, but in a single crystal the network errs alike everywhere by some 5e-5.
DILATION_FLOORS = tuple(round(5e-5 * k, 6) for k in range(1, 21))


def calibrate(model: Network, sets: Mapping[float, Sequence[Batch]]) -> Network:
    """A copy of `model` (eval mode) with threshold and position errors tuned on `sets` (dose -> batches).

    The threshold maximises the mean over doses of F2, of recall and precision at 1 px, where recall counts
    more: a lattice fit leaves out false peaks, and cannot invent those that are missing. The position error
    of the second stage is straightened (:func:`fit_curve`): small ones are smaller, and large ones larger,
    than it says. That of maps alone becomes ``sqrt((scale sigma)^2 + floor^2)``, with the pair that brings
    the coverage of 1 and 2 sigma nearest to 68.3 and 95.4 % at every dose, root mean square; the shared
    dilation is treated likewise, for e_xx and e_yy of a lattice fit.
    """
    model = _with(
        model,
        sigma_curve=(),
        sigma_scale=1.0,
        sigma_floor_px=0.0,
        dilation_scale=1.0,
        dilation_floor=0.0,
    )

    def f2(threshold: float) -> float:
        detector = network_detector(model, threshold=threshold)
        return sum(_f2(evaluate(detector, batches)) for batches in sets.values())

    threshold = max(THRESHOLDS, key=f2)
    model = _with(model, threshold=threshold)
    found = [_errors(network_detector(model), batches) for batches in sets.values()]
    if model.config.reader_width:
        curve = fit_curve([(e / radius[:, None], s / radius, count) for e, s, radius, count in found])
        model = _with(model, sigma_curve=curve)
    else:
        scale, floor = fit_sigma([(error, sigma) for error, sigma, *_ in found if len(error)])
        model = _with(model, sigma_scale=scale, sigma_floor_px=floor)
    detector = network_detector(model)
    strains = [_strains(detector, batches) for batches in sets.values()]
    scale, floor = fit_dilation([s for s in strains if len(s[0])])
    return _with(model, dilation_scale=scale, dilation_floor=floor)


def fit_curve(sets: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[tuple[float, ...], ...]:
    """Factors for standard deviations of the second stage, by their size and by the number of disks.

    Parameters
    ----------
    sets : list of (Tensor (k, 2), Tensor (k,), Tensor (k,))
        Position errors and predicted sigma, both in disk radii, and how many disks the pattern has; one
        triple per set, all sets count alike.

    Returns
    -------
    tuple of 2 tuples of float
        For :func:`fcunet.nn.disks.straighten`, few disks first: in each octave the size of the errors, in
        units of sigma, that 68.3 % stay below, mean over the sets that have enough of them; where none has,
        that of the nearest octave. Empty if there is nothing to fit.
    """
    between = (CURVE_COUNTS[0] * CURVE_COUNTS[1]) ** 0.5
    rows = []
    for many in (False, True):
        factors: dict[int, float] = {}
        for i in range(len(CURVE_OCTAVES)):
            sizes = []
            for error, sigma, count in sets:
                octave = (sigma.log2() - CURVE_OCTAVES[0]).round().clamp(0, len(CURVE_OCTAVES) - 1)
                here = (octave == i) & ((count >= between) == many)
                if int(here.sum()) >= _FEWEST:
                    sizes.append(float((error[here].abs() / sigma[here, None]).quantile(0.6827)))
            if sizes:
                factors[i] = round(sum(sizes) / len(sizes), 3)
        if factors:
            near = (min(factors, key=lambda j: abs(j - i)) for i in range(len(CURVE_OCTAVES)))
            rows.append(tuple(factors[i] for i in near))
    return (rows[0], rows[-1]) if rows else ()


def fit_sigma(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Scale and floor of predicted standard deviations.

    Parameters
    ----------
    pairs : list of (Tensor (k, 2), Tensor (k,))
        Position errors and predicted sigma, px; one pair per set, all sets count alike.

    Returns
    -------
    scale, floor_px : float
        1 and 0 if there is nothing to fit.
    """
    best, answer = float("inf"), (1.0, 0.0)
    for floor in FLOORS_PX:
        for scale in torch.logspace(-0.7, 0.7, 57).tolist():  # 5 % steps
            cost = 0.0
            for error, sigma in pairs:
                cost += miscoverage(error.abs() / torch.hypot(scale * sigma, torch.tensor(floor))[:, None])
            if pairs and cost < best:
                best, answer = cost, (round(scale, 4), floor)
    return answer


def fit_dilation(sets: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """Scale and floor of the standard deviation of the dilation that all peaks of a pattern share.

    Parameters
    ----------
    sets : list of (Tensor (k, 2), Tensor (k, 2), Tensor (k,))
        Errors of e_yy and e_xx, their standard deviations without a shared part, and the predicted shared
        part; all sets count alike.

    Returns
    -------
    scale, floor : float
        The latter a strain. 1 and 0 if there is nothing to fit.
    """
    with_shear = 1 + float(shared_shear(0.0)) ** 2
    best, answer = float("inf"), (1.0, 0.0)
    for floor in DILATION_FLOORS:
        for scale in DILATION_SCALES:
            cost = 0.0
            for error, std, predicted in sets:
                shared = with_shear * ((scale * predicted).square() + floor**2)
                cost += miscoverage(error.abs() / (std.square() + shared[:, None]).sqrt())
            if sets and cost < best:
                best, answer = cost, (scale, floor)
    return answer


def miscoverage(ratio: Tensor) -> float:
    """Squared distance of the shares of errors within 1 and 2 error bars from 68.3 and 95.4 %."""
    shares = ((1, 0.6827), (2, 0.9545))
    return sum((float((ratio < k).float().mean()) - share) ** 2 for k, share in shares)


def _f2(figures: Mapping[str, float]) -> float:
    """Weighted harmonic mean, recall four times (C. J. van Rijsbergen, Information Retrieval, 1979)."""
    recall, precision = figures["recall"], figures["precision"]
    return 5 * recall * precision / max(recall + 4 * precision, 1e-9)


def _errors(detector: Detector, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position errors (k, 2), predicted sigma (k,) and disk radius (k,) of the spots found, px.

    The last are the numbers (k,) of peaks of their patterns.
    """
    errors, sigmas, radii, counts = [], [], [], []
    for batch in batches:
        radius = disk_radius(batch.probe)
        matches = match_peaks(detector(batch), batch, margin_px=float(radius.max()))
        keep = matches.found & matches.wanted
        errors.append(matches.error[keep])
        sigmas.append(matches.sigma[keep])
        radii.append(radius[:, None].expand(keep.shape)[keep])
        counts.append(matches.n_peaks[:, None].expand(keep.shape)[keep])
    return torch.cat(errors), torch.cat(sigmas), torch.cat(radii), torch.cat(counts)


def _strains(detector: Detector, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`fit_dilation` takes, of patterns with enough spots."""
    errors, stds, shared = [], [], []
    for batch in batches:
        matches = match_peaks(detector(batch), batch, margin_px=float(disk_radius(batch.probe).max()))
        found = affine_error(matches, batch.spot_position)
        errors.append(found.strain.diagonal(dim1=1, dim2=2))
        stds.append(found.std)
        shared.append(matches.dilation_std)
    error, std = torch.cat(errors), torch.cat(stds)
    known = (torch.isfinite(error) & torch.isfinite(std)).all(1)
    return error[known], std[known], torch.cat(shared)[known]


def _with(model: Network, **changes: float | tuple[tuple[float, ...], ...]) -> Network:
    """The same network with other thresholds."""
    copy = build_network(replace(model.config, **changes))  # type: ignore[arg-type]
    copy.load_state_dict(model.state_dict())
    copy.precision = model.precision
    return copy.to(next(model.parameters()).device).eval()

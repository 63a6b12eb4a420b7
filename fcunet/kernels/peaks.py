"""Padded lists of Bragg peaks, and the integer maxima of a batch of images that they start from."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Peaks(NamedTuple):
    """Bragg peaks of n patterns in P slots each; empty slots hold NaN, the brightest peak comes first.

    Attributes
    ----------
    qy, qx : Tensor, shape (n, P), float32
        Position in px; pixel centres are at integers.
    intensity : Tensor, shape (n, P), float32
        Strength of the peak, in the unit of the detector that found it.
    sigma : Tensor, shape (n, P), float32
        One standard deviation of the position along each axis, px.
    n_peaks : Tensor, shape (n,), int64
        Number of peaks kept.
    truncated : Tensor, shape (n,), bool
        True where more peaks passed all criteria than there are slots.
    dilation_std : Tensor, shape (n,), float32
        Standard deviation of a dilation, a strain, that all positions of the pattern share beside `sigma`;
        0 where the detector states none.
    dilation : Tensor, shape (n,), float32
        The part of it whose direction is known, negative where positions are expected too far in; else 0.
    """

    qy: Tensor
    qx: Tensor
    intensity: Tensor
    sigma: Tensor
    n_peaks: Tensor
    truncated: Tensor
    dilation_std: Tensor
    dilation: Tensor


class Maxima(NamedTuple):
    """Integer maxima of n images in P slots each, highest first; empty slots hold -1 (NaN in `value`).

    Attributes
    ----------
    y, x : Tensor, shape (n, P), int64
        Row and column.
    value : Tensor, shape (n, P)
        Height, in the dtype of the image.
    n_peaks : Tensor, shape (n,), int64
    truncated : Tensor, shape (n,), bool
        True where more maxima passed all criteria than there are slots.
    """

    y: Tensor
    x: Tensor
    value: Tensor
    n_peaks: Tensor
    truncated: Tensor


def find_maxima(
    image: Tensor,
    *,
    edge_boundary: int = 20,
    min_absolute_intensity: float = 0.0,
    min_relative_intensity: float = 0.005,
    relative_to_peak: int = 0,
    min_peak_spacing: float = 60.0,
    max_num_peaks: int = 70,
) -> Maxima:
    """Local maxima of a batch of images, with the peak parameters of py4DSTEM in the order of its CPU code.

    A pixel is a maximum if it is at least as high as the four neighbours after it and higher than the four
    before it, in the sense of the table below (o at least as high, x higher), so that a ridge of two equal
    pixels counts once::

        x x o
        x . o
        x o o

    Then, in this order: `edge_boundary`, sort by height, `min_absolute_intensity`, `min_relative_intensity`,
    `min_peak_spacing`, `max_num_peaks`.

    Parameters
    ----------
    image : Tensor, shape (n, H, W), floating point
        A pixel that is NaN, or touches one, is no maximum.
    edge_boundary : int
        Maxima lie at b <= index < size - b on both axes; 0 counts as 1, because a maximum needs neighbours.
    min_absolute_intensity : float
        Drop maxima lower than this; 0 switches the criterion off.
    min_relative_intensity : float
        Drop maxima lower than this share of the one named by `relative_to_peak`; 0 switches it off.
    relative_to_peak : int
        Rank of the reference maximum (0 = highest) among those that passed `min_absolute_intensity`. Images
        with fewer maxima skip the relative criterion.
    min_peak_spacing : float
        From the highest down, a kept maximum drops all lower ones whose distance is less than this, px.
    max_num_peaks : int
        Number of slots P.

    Returns
    -------
    Maxima
        Highest first; of equal ones the larger row, then the larger column, comes first.
    """
    if image.ndim != 3 or not image.is_floating_point():
        raise ValueError(
            f"images are {tuple(image.shape)} {image.dtype}, but (n, H, W) of a floating type is needed; "
            "for a single image pass image[None].float()"
        )
    if max_num_peaks < 1:
        raise ValueError(f"max_num_peaks is {max_num_peaks}, but must be at least 1")
    y, x, value = _sorted_candidates(
        image, max(int(edge_boundary), 1), min_absolute_intensity, min_relative_intensity, relative_to_peak
    )
    alive = value > -torch.inf
    if min_absolute_intensity > 0:
        alive &= value >= min_absolute_intensity
    if min_relative_intensity > 0 and relative_to_peak < value.shape[1]:
        reference = value[:, relative_to_peak, None]  # sorted, so the absolute criterion left ranks unchanged
        alive &= ~(value / reference < min_relative_intensity) | ~alive[:, relative_to_peak, None]
    if min_peak_spacing > 0:
        alive = _space_out(y, x, alive, min_peak_spacing, max_num_peaks)
    slot, kept, truncated = _first(alive, max_num_peaks)
    return Maxima(
        torch.where(kept, y.gather(1, slot), -1),
        torch.where(kept, x.gather(1, slot), -1),
        torch.where(kept, value.gather(1, slot), torch.nan),
        kept.sum(1),
        truncated,
    )


def _sorted_candidates(
    image: Tensor, edge: int, min_absolute: float, min_relative: float, relative_to_peak: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All maxima at least `edge` from the border: rows, columns, heights, each (n, K), padded with -inf.

    Those that could not pass the intensity criteria are left out early where that is certain.
    """
    n, height, width = image.shape
    if n == 0 or min(height, width) <= 2 * edge:
        nothing = image.new_zeros((n, 1), dtype=torch.int64)
        return nothing, nothing, image.new_full((n, 1), -torch.inf)
    frame = image[:, edge - 1 : height - edge + 1, edge - 1 : width - edge + 1]
    centre = frame[:, 1:-1, 1:-1]
    line = torch.maximum(frame[:, :, :-2], frame[:, :, 2:])
    torch.maximum(line, frame[:, :, 1:-1], out=line)  # in place: fresh memory costs as much as the arithmetic
    highest = torch.maximum(line[:, :-2], line[:, 2:])
    torch.maximum(highest, line[:, 1:-1], out=highest)

    # Nothing as low as the lowest pixel is a maximum, which rules out flat ground. The highest pixel of the
    # region is nearly always one, and then all others are measured against it: most candidates go at once.
    # Where it turns out not to be one, this is done again without the short cut.
    ground = torch.nextafter(frame.amin((1, 2)), image.new_tensor(torch.inf)).nan_to_num(nan=-torch.inf)
    floor = ground.clamp(min=min_absolute) if min_absolute > 0 else ground
    top = centre.amax((1, 2))
    relative = min_relative * (1 - 1e-6) if relative_to_peak == 0 else 0.0
    bound = torch.where((top > 0) & (relative > 0), top * relative, floor).maximum(floor)
    which, y, x, value = _genuine(image, centre, highest, bound, edge)
    best = torch.full_like(top, -torch.inf).scatter_reduce_(0, which, value, "amax")
    wrong = (best < top) & (bound > floor)
    if wrong.any():
        bound = torch.where(wrong, floor, bound)
        which, y, x, value = _genuine(image, centre, highest, bound, edge)

    count = torch.bincount(which, minlength=n)
    slots = max(int(count.max()), 1)
    # filled from the last candidate to the first: a stable sort then leaves ties as py4DSTEM orders them
    slot = count.cumsum(0)[which] - 1 - torch.arange(len(which), device=image.device)
    heights = image.new_full((n, slots), -torch.inf)
    heights[which, slot] = value
    place = torch.zeros((n, slots), dtype=torch.int64, device=image.device)
    place[which, slot] = y * width + x
    heights, order = heights.sort(dim=1, descending=True, stable=True)
    place = place.gather(1, order)
    return place // width, place % width, heights


def _genuine(
    image: Tensor, centre: Tensor, highest: Tensor, bound: Tensor, edge: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels equal to the highest around them, not below `bound`, above the four neighbours before them.

    Returns image, row, column, height.
    """
    which, y, x = _where_equal(centre, torch.maximum(highest, bound[:, None, None]))
    y, x = y + edge, x + edge
    value = image[which, y, x]
    above = value > image[which, y - 1, x]
    for dy in (-1, 0, 1):
        above &= value > image[which, y + dy, x - 1]
    return which[above], y[above], x[above], value[above]


def _where_equal(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the equal elements of two images (n, h, w)."""
    if a.device.type != "cpu":
        return (a == b).nonzero(as_tuple=True)  # type: ignore[return-value]
    # NumPy writes and searches truth values three times as fast
    flat = torch.from_numpy(np.flatnonzero(np.equal(a.numpy(), b.numpy())))
    _, height, width = a.shape
    row = flat // width
    return row // height, row % height, flat % width


def _space_out(y: Tensor, x: Tensor, alive: Tensor, spacing: float, enough: int) -> Tensor:
    """Greedy choice among points (n, K), highest first: True where kept, right for the first `enough` + 1.

    Works on 256 points at a time. Of those, all that have no higher undecided rival are kept at once and drop
    their lower rivals, until nothing is undecided: a few rounds instead of one step per peak.
    """
    y, x = y.float(), x.float()
    kept = torch.zeros_like(alive)
    for start in range(0, alive.shape[1], 256):
        stop = min(start + 256, alive.shape[1])
        undecided = alive[:, start:stop]
        distance2 = (y[:, start:stop, None] - y[:, None, :stop]) ** 2
        distance2 += (x[:, start:stop, None] - x[:, None, :stop]) ** 2
        rival = (distance2 < spacing**2).tril_(start - 1)  # of each point, the higher ones that are too close
        if start:
            undecided = undecided & ~(rival[:, :, :start] & kept[:, None, :start]).any(2)
            rival = rival[:, :, start:]
        while undecided.any():
            safe = undecided & ~(rival & undecided[:, None]).any(2)
            kept[:, start:stop] |= safe
            undecided = undecided & ~safe & ~(rival & safe[:, None]).any(2)
        if (kept.sum(1) > enough).all():
            break
    return kept


def _first(alive: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `slots` True of every row: columns (n, slots), if filled, if more were left (n,)."""
    n_alive = alive.sum(1)
    order = (~alive).to(torch.uint8).sort(dim=1, stable=True).indices[:, :slots]
    slot = torch.nn.functional.pad(order, (0, max(slots - order.shape[1], 0)))
    kept = torch.arange(slots, device=alive.device) < n_alive[:, None]
    return slot, kept, n_alive > slots

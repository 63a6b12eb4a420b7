"""What patterns the packaged network was trained on, and which patterns of a scan are unlike them.

A network answers outside of what it has seen, too, and says nothing of it. The limits are those of the
training set (`fcunet.training.dataset.PatternSource`); weights can bring their own in ``config.json``, under
``training: {range: {...}}``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# bits of the flag, and what they mean
TOO_FEW, TOO_MANY, RADIUS, SPACING, BLUR = 1, 2, 4, 8, 16
MEANINGS = {
    TOO_FEW: "fewer_electrons_than_trained",
    TOO_MANY: "more_electrons_than_trained",
    RADIUS: "disk_radius_outside_training",
    SPACING: "disks_closer_than_trained",
    BLUR: "edges_more_blurred_than_trained",
}


@dataclass(frozen=True)
class TrainingRange:
    """Limits of the training patterns.

    Attributes
    ----------
    electrons : (float, float)
        Counts of a pattern.
    radius_px : (float, float)
        Disk radius.
    least_spacing_px : float
        Distance of neighbouring disks.
    edge_sigma_px : float
        Largest blur of the edge of a disk, of the point spread and of the pixels together.
    """

    electrons: tuple[float, float] = (2e3, 1e7)
    radius_px: tuple[float, float] = (2.5, 25.0)
    least_spacing_px: float = 10.0
    edge_sigma_px: float = 1.8

    @classmethod
    def of_weights(cls, training: Mapping[str, Any]) -> "TrainingRange":
        """That which the weights say of themselves, else the range of the packaged ones."""
        own = training.get("range") or {}
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in own.items() if k in known
        }
        return cls(**values)


def outside_training(
    total: ArrayLike,
    nearest_spacing: ArrayLike,
    *,
    radius_px: float,
    edge_sigma_px: float,
    limits: TrainingRange | None = None,
) -> NDArray[np.uint8]:
    """Flag the patterns that are unlike those of training.

    Parameters
    ----------
    total : array_like, shape (...)
        Electrons of each pattern (counts, where one electron is one count); NaN: a pattern that is missing.
    nearest_spacing : array_like, shape (...)
        Length of the shortest lattice vector, px; NaN where it is not known.
    radius_px, edge_sigma_px : float
        Of the disks; NaN where not known.
    limits : TrainingRange, optional

    Returns
    -------
    ndarray of uint8, shape (...)
        Sum of the bits of `MEANINGS`; 0 inside, and where nothing is known.
    """
    limits = TrainingRange() if limits is None else limits
    total, spacing = np.asarray(total, dtype=np.float64), np.asarray(nearest_spacing, dtype=np.float64)
    flag = np.zeros(np.broadcast_shapes(total.shape, spacing.shape), np.uint8)
    with np.errstate(invalid="ignore"):
        for bit, wrong in (
            (TOO_FEW, total < limits.electrons[0]),
            (TOO_MANY, total > limits.electrons[1]),
            (RADIUS, (radius_px < limits.radius_px[0]) | (radius_px > limits.radius_px[1])),
            (SPACING, spacing < limits.least_spacing_px),
            (BLUR, edge_sigma_px > limits.edge_sigma_px),
        ):
            flag[np.broadcast_to(wrong, flag.shape)] |= np.uint8(bit)
    return flag

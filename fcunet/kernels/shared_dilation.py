"""The error that uneven disks give to all positions of a pattern alike: how large it may be.

In a crystal the disks are brighter on the side of the direct beam more often than not, because the Ewald
sphere curves away from the outer one. Correlation then reads all of them too far in, and the lattice too
small in reciprocal space by up to 1 or 2 %: no residual of the lattice fit shows it, and no number of disks
averages it out.
"""

import torch
from torch import Tensor

from .precision import CONTRAST_SPREAD, Contrast, DiskModel

# Of the dilation that the measured contrast predicts, and of the one that a contrast of 1 in every disk would
# make if all pointed outwards. Fitted for the logarithm to simulated crystals of 2 to 150 nm at 1e3 to 1e7
# electrons by `python -m benchmarks.shared_dilation`, which also shows how they fare on prototypes that were
# not used for it; the others have the same, because what a contrast does to the position is in the pull.
# _NOISE, _DOUBT, _HALF and the power of v below were chosen on the same crystals, and so that evenly filled
# disks stay out of it.
DILATION_SCALES = {"none": (1.7, 0.2), "sqrt": (1.7, 0.2), "log": (1.7, 0.2)}
# Of the dilation that the measured contrast predicts in those crystals at 1e7 electrons, where nothing hides
# it, 68 % are smaller, thin and thick ones alike to 10 %.
_USUAL = 1.3e-3
_NOISE = 3.0  # of the square of that, so many variances by counting noise count as nothing
_DOUBT = 3.0  # of the squared contrast, so many standard deviations
_HALF = 0.3  # squared contrast from which on the latter grows no more, roughly
_MOST_NOISE = 0.25  # variance of a tilt that cannot exceed 1
_MIN_SIGMA = 1e-3  # px, as in the lattice fit


def shared_dilation(
    contrast: Contrast,
    y: Tensor,
    x: Tensor,
    sigma: Tensor,
    which: Tensor,
    n: int,
    disk: DiskModel,
    *,
    shape: tuple[int, int],
    scales: tuple[float, float] = DILATION_SCALES["none"],
) -> Tensor:
    """Standard deviation of a dilation that all positions of a pattern share beside `sigma`.

    Parameters
    ----------
    contrast : Contrast
        Of m disks, from :func:`~fcunet.kernels.precision.measure_contrast`.
    y, x : Tensor, shape (m,)
        Their positions, px.
    sigma : Tensor, shape (m,)
        One standard deviation of each position, px, by which a lattice fit will weight it.
    which : Tensor, shape (m,), int64
        Pattern of each disk.
    n : int
        Number of patterns.
    disk : DiskModel
        From :func:`~fcunet.kernels.precision.describe_disk`.
    shape : (int, int)
        Of the frame. Disks that it cuts do not count: their contrast is that of the cut.
    scales : (float, float)
        Factors of the two parts, of :data:`DILATION_SCALES` by the transform of the counts.

    Returns
    -------
    Tensor, shape (2, n), float32
        The standard deviation, a strain; next to 0 where counting noise is small and the disks are even, and
        0 where there are none. Then the part of it whose direction is known: negative where the disks are
        brighter inside, so that their positions are read too far in, and where noise hides whether they are.

    Notes
    -----
    Disk j with the linear contrast t_j is shifted by about ``P_j t_j``
    (:func:`~fcunet.kernels.precision.position_sigma`). A lattice fit with weights w_j = 1 / sigma_j^2 takes
    such shifts for the dilation ::

        d = sum(w_j P_j q_j . t_j) / sum(w_j q_j^2)

    with q_j from the weighted mean of the positions. Counting noise in the tilts gives d the variance v =
    sum((w_j P_j)^2 q_j^2 noise_j) / sum(w_j q_j^2)^2. On crystals of other prototypes d agrees with the true
    error in sign and, roughly, in size, but not well enough to correct it: contrast at the rim need not
    continue that inside. So it states an error, with the variance ::

        a^2 (max(d^2 - 3 v, 0) + u^2 v^5 / (u^10 + v^5))
            + b^2 (sum(w_j |P_j| |q_j|) / sum(w_j q_j^2))^2 T / (T + 0.3)

    The first bracket has the sign of d, which tells two patterns that err alike from two that do not
    (:func:`~fcunet.kernels.strain.shared_dilation_left`). Its second part is what counting noise may hide: u
    is the usual size of d in crystals, stated wholly where v is much larger, as below some 1e4 electrons, and
    inwards unless d says otherwise, as it is in crystals on average. The last term is for tilts that cancel
    inside the disks, which those at the rims need not do: T is the mean squared contrast of the disks less
    three standard deviations by counting noise, at least 0, and the bracket what a contrast of 1 pointing
    outwards everywhere would do.
    """
    reach = 0.75 * disk.radius  # half the side of what the contrast is measured in
    whole = (y >= reach) & (y <= shape[0] - 1 - reach) & (x >= reach) & (x <= shape[1] - 1 - reach)
    weight = whole / sigma.clamp(min=_MIN_SIGMA) ** 2
    first = y.new_zeros((3, n)).index_add_(1, which, torch.stack([weight, weight * y, weight * x]))
    centre = first[1:] / first[0].clamp(min=1e-12)
    q = torch.stack([y, x]) - centre[:, which]  # (2, m) px
    q2 = q.square().sum(0)

    length = contrast.tilt.norm(dim=0).clamp(min=1)  # beyond 1, one side would be negative
    pull = contrast.pull.clamp(-disk.radius, disk.radius)
    lever = weight * pull
    trust = whole / (contrast.noise**2 + CONTRAST_SPREAD)
    sums = y.new_zeros((7, n)).index_add_(
        1,
        which,
        torch.stack(
            [
                weight * q2,
                lever * (q * contrast.tilt).sum(0) / length,
                lever**2 * q2 * contrast.noise.clamp(max=_MOST_NOISE),
                lever.abs() * q2.sqrt(),
                trust,
                trust * contrast.squared.clamp(max=1),
                (trust * contrast.noise) ** 2,
            ]
        ),
    )
    moment, trusted = sums[0].clamp(min=1e-12), sums[4].clamp(min=1e-12)
    noise = sums[2] / moment**2
    seen = ((sums[1] / moment) ** 2 - _NOISE * noise).clamp(min=0)
    unseen = (noise / _USUAL**2) ** 5
    hidden = _USUAL**2 * unseen / (1 + unseen)
    squared = (sums[5] / trusted - _DOUBT * sums[6].sqrt() / trusted).clamp(min=0)
    textured = (squared / (squared + _HALF)).sqrt()
    size = scales[0] * (seen + hidden).sqrt()
    total = torch.hypot(size, scales[1] * textured * sums[3] / moment)
    return torch.stack([total, torch.where((seen > 0) & (sums[1] > 0), size, -size)])

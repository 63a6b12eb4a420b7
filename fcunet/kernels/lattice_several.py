"""Several lattices in one scan: found from the peaks, and each position given those that it has (NumPy).

Neighbouring grains, a film on its substrate, a precipitate in a matrix. A lattice is proposed by all peaks
that no lattice has yet explained, or by those of one pattern, and kept if enough patterns agree. At each
position the lattices compete by the likelihood of its peaks; the next one has to live on the peaks that those
before it leave.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .lattice import Basis, NoLatticeError, find_basis, orient_basis
from .lattice_fit import LatticeFit, fit_and_members
from .lattice_index import Array, BoolArray, IntArray, as_peaks

MAX_PER_POSITION = 3
_MIN_PATTERNS, _MIN_SHARE = 4, 0.01  # a further lattice needs so many patterns, and this share of them
_CLEARLY = 5.0  # by this much in log-likelihood a lattice has to be the better one
_MANY = 0.4  # so many patterns have to agree that a lattice is too fine: it may span two coarser ones
_TRIALS = 4  # single patterns that may propose, for each lattice
_MAX_PATTERNS = 384  # in which proposals are tried


_Peaks = tuple[Array, Array, Array | None]  # y, x, intensity

# every lattice that has a half or a third of the sites of another
_COARSER = [
    np.array(mix, dtype=np.float64)
    for mix in (
        ((2, 0), (0, 1)), ((1, 0), (0, 2)), ((2, 0), (1, 1)),
        ((3, 0), (0, 1)), ((1, 0), (0, 3)), ((3, 0), (1, 1)), ((3, 0), (2, 1)),
    )
]  # fmt: skip


class SeveralFits(NamedTuple):
    """Up to three lattices per position: the best first, or, on request, each at its own place."""

    fits: tuple[LatticeFit, ...]
    lattice_id: tuple[IntArray, ...]  # one array (...) per fit: 1 for the first basis, 0 where there is none


def find_lattices(
    qy: ArrayLike,
    qx: ArrayLike,
    intensity: ArrayLike | None = None,
    *,
    origin: ArrayLike | None = None,
    max_orientations: int = 12,
    min_num_peaks: int = 5,
) -> list[Basis]:
    """The different lattices of a scan, the most common first.

    Parameters
    ----------
    qy, qx, intensity, origin
        As for :func:`fcunet.kernels.lattice.find_basis`. At most 384 patterns, evenly spread, decide.
    max_orientations : int
        No more lattices than that are looked for; 1 is :func:`fcunet.kernels.lattice.find_basis`.
    min_num_peaks : int
        Patterns with fewer peaks do not count.

    Returns
    -------
    list of Basis
        With one common origin. A lattice that differs from an earlier one by less than 10 % of strain and 10
        degrees counts as the earlier one, unless it lies better by far.

    Raises
    ------
    ValueError
        If the peaks share no lattice at all.
    """
    y, x = as_peaks(qy, qx)
    y, x = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    strength = None if intensity is None else np.asarray(intensity, dtype=np.float64).reshape(y.shape)
    if max_orientations == 1:
        return [find_basis(y, x, strength, origin=origin)]
    n_peaks = (np.isfinite(y) & np.isfinite(x)).sum(1)
    if not (n_peaks >= min_num_peaks).any():
        return [find_basis(y, x, strength, origin=origin)]
    rows = np.flatnonzero(n_peaks >= min_num_peaks)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MAX_PATTERNS)).astype(int))]
    search = _Search(y[rows], x[rows], None if strength is None else strength[rows], min_num_peaks)
    search.first((y, x, strength), origin)
    while len(search.found) < max_orientations and search.another():
        pass
    return search.found


def fit_lattices(
    qy: ArrayLike,
    qx: ArrayLike,
    *,
    g: ArrayLike,
    origin: ArrayLike,
    max_lattices: int = 1,
    in_order: bool = False,
    **options: Any,
) -> SeveralFits:
    """Fit to every position the best of several lattices, and on request those that overlap with it.

    Parameters
    ----------
    qy, qx, origin
        As for :func:`fcunet.kernels.lattice_fit.fit_lattice`.
    g : array_like, shape (2, 2) or (n, 2, 2)
        The lattices a position may have, px.
    max_lattices : int
        At most so many per position, 1 to 3.
    in_order : bool
        The i-th fit is that of the i-th lattice (a known film on a known substrate), not the i-th best.
    **options
        As for :func:`fcunet.kernels.lattice_fit.fit_lattice`: `sigma`, `intensity`, `weighting` and the rest.

    Returns
    -------
    SeveralFits
        `max_lattices` fits. The first takes whatever peaks lie on it; the next has to be found in the peaks
        that are left (and the direct beam, which is common to all). Its score is the gain in log-likelihood
        over unrelated peaks, less (strain^2 + rotation^2) / (2 x 0.04^2), which decides between lattices that
        describe the peaks alike.

    Raises
    ------
    ValueError
        For an unusable number of lattices, and as :func:`fcunet.kernels.lattice_fit.fit_lattice`.
    """
    qy, qx = as_peaks(qy, qx)
    bases = np.asarray(g, dtype=np.float64).reshape(-1, 2, 2)
    if not 1 <= max_lattices <= MAX_PER_POSITION:
        raise ValueError(f"max_lattices is {max_lattices}; a position can have 1 to {MAX_PER_POSITION}")
    if in_order and len(bases) > max_lattices:
        raise ValueError(f"{len(bases)} lattices cannot each have a place among max_lattices={max_lattices}")
    taken = np.zeros(qy.shape, bool)
    fits: list[LatticeFit] = []
    ids: list[IntArray] = []
    for rank in range(max_lattices):
        if rank == 0:
            fit, which, members = _best(qy, qx, bases, origin, options)
        else:
            open_ = _worth_another(qy, taken, ids[-1], len(bases), int(options.get("min_num_peaks", 5)))
            fit, which, members = _best_of_rest(qy, qx, taken, open_, bases, origin, ids, fits[0], options)
        fits.append(fit)
        ids.append(which)
        taken |= members & ~_direct_beam(qy, qx, fit)
    if in_order:
        return _by_lattice(fits, ids, max_lattices)
    return SeveralFits(tuple(fits), tuple(ids))


class _Search:
    """Lattices found so far in a sample of patterns, and how well each pattern is described by them."""

    def __init__(self, y: Array, x: Array, strength: Array | None, min_num_peaks: int):
        self.y, self.x, self.strength, self.min_num_peaks = y, x, strength, min_num_peaks
        self.found: list[Basis] = []
        self.score = np.full(len(y), -np.inf)
        self.left = np.isfinite(y) & np.isfinite(x)
        self.asked = np.zeros(len(y), bool)
        self.centre: ArrayLike | None = None
        self.needed = max(_MIN_PATTERNS, int(np.ceil(_MIN_SHARE * len(y))))

    def first(self, everything: _Peaks, origin: ArrayLike | None) -> None:
        """The lattice that describes the whole best: that of all peaks, unless a pattern knows better."""
        proposals = [self._propose(everything, origin)]
        known = origin if origin is not None or proposals[0] is None else proposals[0].origin
        count = self.left.sum(1)
        likely = np.argsort(-count, kind="stable")[: max(1, len(count) // 2)]
        for row in likely[np.linspace(0, len(likely) - 1, min(len(likely), _TRIALS)).astype(int)]:
            proposals.append(self._propose(self._peaks(slice(row, row + 1), self.left), known))
        gains = []
        for basis in proposals:
            if basis is None:
                gains.append(-np.inf)
                continue
            fit, _ = self._fit(basis, slice(None, None, max(1, len(self.y) // 100)))
            gains.append(np.nansum(fit.score))
        if not max(gains) > 0:
            find_basis(everything[0], everything[1], everything[2], origin=origin)  # says what is wrong
            raise NoLatticeError(
                "no pattern has a lattice; lower the detection threshold, or give the vectors: "
                "basis=((g1_y, g1_x), (g2_y, g2_x))"
            )
        best = int(np.argmax(gains))
        best = 0 if gains[0] > 0.95 * gains[best] else best
        chosen = proposals[best]
        assert chosen is not None
        self.centre = chosen.origin
        chosen = self._coarser(chosen)
        self._keep(chosen, self._fit(chosen))

    def another(self) -> bool:
        """Look for one more lattice in the peaks that are left; False if there is none."""
        count = self.left.sum(1)
        if (count >= self.min_num_peaks).sum() < self.needed:
            return False
        if self._try(slice(None)):
            return True
        order = np.argsort(-np.where(self.asked, 0, count), kind="stable")
        for row in order[:_TRIALS]:
            if self.asked[row] or count[row] < self.min_num_peaks:
                return False
            self.asked[row] = True
            if self._try(slice(row, row + 1)):
                return True
        return False

    def _coarser(self, basis: Basis) -> Basis:
        """`basis`, or the lattice within it that describes the peaks better with fewer sites."""
        fit, members = self._fit(basis)
        site = np.stack([self.y, self.x], -1) - fit.origin[:, None]
        site = np.rint(np.where(members[..., None], site @ np.linalg.inv(_filled(fit.g, basis.g)), 0))
        count, fitted = members.sum(1), np.isfinite(fit.score)
        if not fitted.any():
            return basis
        for mix in _COARSER:
            inside = (np.abs(site @ np.linalg.inv(mix) % 1 - 0.5) > 0.49).all(-1) & members
            # peaks off the coarser lattice cost more than its fewer sites gain, unless they are few
            if (inside.sum(1) >= 0.8 * count)[fitted].mean() < _MANY:
                continue
            other = Basis(basis.origin, orient_basis(mix @ basis.g))
            if (self._fit(other)[0].score > fit.score + _CLEARLY)[fitted].mean() > _MANY:
                return self._coarser(other)
        return basis

    def _try(self, rows: slice) -> bool:
        basis = self._propose(self._peaks(rows, self.left), self.centre)
        if basis is None:
            return False
        basis = self._coarser(basis)
        if any(_akin(basis.g, other.g) for other in self.found):
            return False
        fit, members = self._fit(basis)
        better = np.nan_to_num(fit.score, nan=-np.inf) > self.score + _CLEARLY
        alone = self.left & members  # on what the others leave it must be a lattice, too
        enough = better | (alone.sum(1) >= np.maximum(self.min_num_peaks, 0.5 * members.sum(1)))
        if (enough & np.isfinite(fit.score)).sum() < self.needed:
            return False
        self._keep(basis, (fit, members))
        return True

    def _keep(self, basis: Basis, fitted: tuple[LatticeFit, BoolArray]) -> None:
        fit, members = fitted
        self.found.append(Basis(np.asarray(self.centre, dtype=np.float64), basis.g))
        score = np.nan_to_num(fit.score, nan=-np.inf)
        # a lattice that is beaten here has explained nothing: its peaks are those of the better one
        self.left &= ~(members & (score > 0)[:, None])
        self.score = np.maximum(self.score, score)

    def _propose(self, peaks: _Peaks, origin: ArrayLike | None) -> Basis | None:
        y, x, strength = peaks
        try:
            return find_basis(y, x, strength, origin=origin, min_share=0.02)
        except NoLatticeError:
            return None

    def _peaks(self, rows: slice, where: BoolArray) -> _Peaks:
        y, x = (np.where(where, q, np.nan)[rows] for q in (self.y, self.x))
        return y, x, None if self.strength is None else self.strength[rows]

    def _fit(self, basis: Basis, rows: slice = slice(None)) -> tuple[LatticeFit, BoolArray]:
        centre = basis.origin if self.centre is None else self.centre
        return fit_and_members(
            self.y[rows],
            self.x[rows],
            g=basis.g,
            origin=centre,
            intensity=None if self.strength is None else self.strength[rows],
            weighting="uniform",
            min_num_peaks=self.min_num_peaks,
        )


def _filled(g: Array, instead: Array) -> Array:
    """`g` with `instead` where it is missing."""
    return np.where(np.isfinite(g), g, instead)


def _akin(g: Array, other: Array) -> bool:
    """Whether each vector of `g` is, within 3 %, one of the lattice `other`, or the other way round."""
    for a, b in ((g, other), (other, g)):
        mix = np.rint(a @ np.linalg.inv(b))
        length = np.maximum(np.hypot(*a.T), np.hypot(*b.T).min())
        if (np.hypot(*(a - mix @ b).T) < 0.03 * length).all() and np.abs(mix).max() <= 3:
            return True
    return False


def _best(qy, qx, bases, origin, options) -> tuple[LatticeFit, IntArray, BoolArray]:
    """The lattice of highest score at each position, its number, and its peaks."""
    chosen, members = fit_and_members(qy, qx, g=bases[0], origin=origin, **options)
    which = np.where(chosen.n_indexed > 0, 1, 0)
    for number, g in enumerate(bases[1:], 2):
        fit, own = fit_and_members(qy, qx, g=g, origin=origin, **options)
        better = np.nan_to_num(fit.score, nan=-np.inf) > np.nan_to_num(chosen.score, nan=-np.inf)
        chosen = LatticeFit(*(_where(better, a, b) for a, b in zip(fit, chosen, strict=True)))
        which, members = np.where(better, number, which), _where(better, own, members)
    return chosen, which, members


def _best_of_rest(qy, qx, taken, open_, bases, origin, ids, first, options):
    """As :func:`_best`, in the peaks that are left, of lattices that a position does not have yet."""
    chosen = LatticeFit(*(np.full_like(a, 0 if a.dtype.kind == "i" else np.nan) for a in first))
    which, members = np.zeros(open_.shape, np.int64), np.zeros(qy.shape, bool)
    at = np.nonzero(open_)
    if not len(at[0]):
        return chosen, which, members
    y, x = (np.where(taken[at], np.nan, q[at]) for q in (qy, qx))
    centre = first.origin[at]
    some: dict[str, Any] = {
        name: np.broadcast_to(value, qy.shape)[at] if name in ("sigma", "intensity") and value is not None
        else value
        for name, value in options.items()
    }  # fmt: skip
    best = np.full(len(y), -np.inf)
    for number, g in enumerate(bases, 1):
        has = np.any([i[at] == number for i in ids], axis=0)
        fit, own = fit_and_members(y, x, g=g, origin=centre, **some)
        better = ~has & (np.nan_to_num(fit.score, nan=-np.inf) > best)
        for target, value in zip(chosen, fit, strict=True):
            target[tuple(a[better] for a in at)] = value[better]
        which[tuple(a[better] for a in at)] = number
        members[tuple(a[better] for a in at)] = own[better]
        best = np.where(better, fit.score, best)
    return chosen, which, members


def _worth_another(qy, taken, last, n_bases, min_num_peaks) -> BoolArray:
    """Positions that have a lattice, and peaks enough for one more."""
    left = (np.isfinite(qy) & ~taken).sum(-1)
    return (last > 0) & (left >= min_num_peaks) & (n_bases > 1)


def _direct_beam(qy, qx, fit: LatticeFit) -> BoolArray:
    """Peaks at the origin of a lattice."""
    away = np.hypot(qy - fit.origin[..., :1], qx - fit.origin[..., 1:])
    return away < 0.25 * np.sqrt((fit.g**2).sum(-1).min(-1))[..., None]


def _by_lattice(fits, ids, n: int) -> SeveralFits:
    """Fits moved from their rank to the place of their lattice."""
    placed, numbers = [], []
    for number in range(1, n + 1):
        fit = LatticeFit(*(np.full_like(a, 0 if a.dtype.kind == "i" else np.nan) for a in fits[0]))
        here = np.zeros_like(ids[0])
        for source, which in zip(fits, ids, strict=True):
            own = which == number
            fit = LatticeFit(*(_where(own, a, b) for a, b in zip(source, fit, strict=True)))
            here = np.where(own, number, here)
        placed.append(fit)
        numbers.append(here)
    return SeveralFits(tuple(placed), tuple(numbers))


def _where(condition: BoolArray, a, b):
    """``np.where`` over the leading axes."""
    return np.where(condition.reshape(condition.shape + (1,) * (np.ndim(a) - condition.ndim)), a, b)

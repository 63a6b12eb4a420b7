"""Several lattices in one scan: grains side by side, crystals that overlap, vacuum, strays, gaps."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcunet.kernels.lattice_fit import fit_lattice
from fcunet.kernels.lattice_several import find_lattices, fit_lattices

SITES = np.array([s for s in itertools.product(range(-9, 10), repeat=2) if s != (0, 0)])
A = np.array([[2.0, 27.0], [25.0, -3.0]])  # (y, x), px
B = np.array([[12.0, 21.0], [30.0, -19.0]])
NOISE = 0.2


def turned(rng, n, strain):
    """Random deformations, up to `strain` in every component and 2 degrees."""
    a = np.deg2rad(rng.uniform(-2, 2, n))
    turn = np.stack([np.stack([np.cos(a), np.sin(a)], -1), np.stack([-np.sin(a), np.cos(a)], -1)], -2)
    return turn @ (np.eye(2) + rng.uniform(-strain, strain, (n, 2, 2)))


def scan(lattices=(A, B), where=None, *, strain=0.02, missing=0.3, strays=0.2, seed=0):
    """Peaks (n, P, 2), intensities (n, P), and the true g (lattices, n, 2, 2), NaN where there is none.

    `where` (lattices, n) says which position has which; default: A on two thirds, B on the last, and neither
    in the first tenth, where six peaks are strays.
    """
    rng = np.random.default_rng(seed)
    if where is None:
        n = 100
        crystal = np.arange(n) % 10 > 0
        where = np.array([crystal & (np.arange(n) < 67), crystal & (np.arange(n) >= 67)])
    n = where.shape[1]
    origin = 128 + rng.uniform(-2, 2, (n, 1, 2))
    q, intensity = [origin], [np.full((n, 1), 20.0)]
    true = np.full((len(lattices), n, 2, 2), np.nan)
    for number, (g, here) in enumerate(zip(lattices, where, strict=True)):
        own = g @ np.linalg.inv(turned(rng, n, strain))
        true[number][here] = own[here]
        peaks = origin + SITES @ own
        seen = (np.abs(peaks - 128) < 120).all(-1) & (rng.uniform(size=peaks.shape[:2]) > missing)
        seen &= here[:, None]
        q.append(np.where(seen[..., None], peaks, np.nan))
        intensity.append(np.where(seen, rng.exponential(1.0, seen.shape) + 0.02, np.nan))
    count = np.isfinite(np.concatenate(intensity, 1)).sum(1)
    n_strays = np.where(where.any(0), np.round(strays * count), 6)
    extra = rng.uniform(8, 248, (n, int(n_strays.max()), 2))
    extra[np.arange(extra.shape[1]) >= n_strays[:, None]] = np.nan
    q = np.concatenate([*q, extra], 1)
    intensity.append(np.where(np.isfinite(extra[..., 0]), 0.3, np.nan))
    return q + NOISE * rng.normal(size=q.shape), np.concatenate(intensity, 1), true


def right(found, true):
    """Positions where a fitted lattice is one of the true ones: same lattice, to 0.3 px of g."""
    good = np.zeros(len(found), bool)
    for own in true:
        known = np.isfinite(own).all((1, 2)) & np.isfinite(found).all((1, 2))
        mix = np.rint(found[known] @ np.linalg.inv(own[known]))
        same = np.abs(np.abs(np.linalg.det(mix)) - 1) < 1e-6
        good[known] |= same & (np.abs(found[known] - mix @ own[known]).max((1, 2)) < 0.3)
    return good


def search(q, intensity, **options):
    bases = find_lattices(q[..., 0], q[..., 1], intensity)
    vectors = np.array([basis.g for basis in bases])
    origin = bases[0].origin
    found = fit_lattices(q[..., 0], q[..., 1], g=vectors, origin=origin, intensity=intensity, **options)
    return vectors, origin, found


# FCUNET_EXAMPLES=30 pytest --timeout 0 tests/kernels/test_lattice_several.py -k strays: the wide search
@settings(max_examples=int(os.environ.get("FCUNET_EXAMPLES", "3")))
@given(
    length=st.floats(18, 34),
    ratio=st.floats(1.0, 1.6),
    angle=st.floats(65, 115),
    degrees=st.floats(0, 360),
    strain=st.floats(0, 0.03),
    chunk=st.integers(1, 100),
    seed=st.integers(0, 1000),
)
def test_lattices__are_found_through_strays_gaps_and_a_second_crystal(
    length, ratio, angle, degrees, strain, chunk, seed
):
    a, b = np.deg2rad(degrees), np.deg2rad(degrees + angle)
    one = length * np.array([[np.sin(a), np.cos(a)], [ratio * np.sin(b), ratio * np.cos(b)]])
    c = np.deg2rad(17.0)  # the second grain: the same crystal, turned
    other = one @ np.array([[np.cos(c), -np.sin(c)], [np.sin(c), np.cos(c)]])
    q, intensity, true = scan((one, other), strain=strain, seed=seed)
    vectors, origin, found = search(q, intensity)
    crystal = np.isfinite(true).all((2, 3)).any(0)
    assert right(found.fits[0].g, true)[crystal].mean() >= 0.99
    # 10 positions without a crystal: none of them may look like one
    assert np.isnan(found.fits[0].g[~crystal]).all()
    part = slice(0, chunk)
    again = fit_lattices(
        q[part, :, 0],
        q[part, :, 1],
        g=vectors,
        origin=origin,
        intensity=intensity[part],
    )
    np.testing.assert_allclose(again.fits[0].g, found.fits[0].g[part], rtol=1e-9)


def test_fit_lattices__finds_both_of_two_crystals_that_overlap():
    q, intensity, true = scan(where=np.ones((2, 60), bool))
    *_, found = search(q, intensity, max_lattices=2)
    assert right(found.fits[0].g, true).mean() >= 0.98
    assert right(found.fits[1].g, true).mean() >= 0.98
    assert (found.lattice_id[0] != found.lattice_id[1]).all()


def test_fit_lattices__keeps_known_crystals_in_their_places():
    where = np.array([np.arange(60) < 50, np.arange(60) >= 10])
    q, intensity, true = scan(where=where)
    found = fit_lattices(
        q[..., 0],
        q[..., 1],
        g=[A, B],
        origin=(128, 128),
        intensity=intensity,
        max_lattices=2,
        in_order=True,
    )
    for number in (0, 1):
        np.testing.assert_array_equal(found.lattice_id[number] == number + 1, where[number])
        assert right(found.fits[number].g, true[number : number + 1])[where[number]].all()


def test_fit_lattices__peaks_of_the_other_crystal_do_not_pull():
    """The error of A where B overlaps is at most a tenth larger than with A alone."""
    both, intensity, true = scan(where=np.ones((2, 300), bool), missing=0, strays=0)
    alone, bare, true_alone = scan((A,), np.ones((1, 300), bool), missing=0, strays=0)
    errors = [
        np.sqrt(
            np.mean((fit_lattice(q[..., 0], q[..., 1], g=A, origin=(128, 128), intensity=i).g - t[0]) ** 2)
        )
        for q, i, t in ((both, intensity, true), (alone, bare, true_alone))
    ]
    assert errors[0] < 1.1 * errors[1]


def test_fit_lattices__refuses_more_than_three_and_places_that_do_not_exist():
    with pytest.raises(ValueError, match="1 to 3"):
        fit_lattices([np.nan], [np.nan], g=A, origin=(0, 0), max_lattices=4)
    with pytest.raises(ValueError, match="cannot each have a place"):
        fit_lattices([np.nan], [np.nan], g=[A, B], origin=(0, 0), in_order=True)


def test_fit_lattice__with_a_fixed_origin_is_exact_and_better_known():
    q, intensity, true = scan((A,), np.ones((1, 40), bool), missing=0, strays=0)
    origin = q[:, 0].copy()
    q += (origin - q[:, 0])[:, None]
    free = fit_lattice(q[..., 0], q[..., 1], g=A, origin=origin)
    fixed = fit_lattice(q[..., 0], q[..., 1], g=A, origin=origin, fit_origin=False)
    np.testing.assert_array_equal(fixed.origin, origin)
    assert (fixed.covariance[:, :2] == 0).all()
    few = slice(0, 6)  # sites on one side: there a known origin helps most
    one = fit_lattice(q[:, few, 0], q[:, few, 1], g=A, origin=origin)
    other = fit_lattice(q[:, few, 0], q[:, few, 1], g=A, origin=origin, fit_origin=False)
    known = np.isfinite(one.fit_error) & np.isfinite(other.fit_error)
    assert (other.covariance[known, 2, 2] < one.covariance[known, 2, 2] * 1.5).all()
    assert np.abs(free.g - fixed.g).max() < 0.2


def test_fit_lattice__of_another_lattice_is_none():
    q, *_ = scan((A,), np.ones((1, 20), bool), strain=0)
    a = np.deg2rad(8.0)
    off = A @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    loose = fit_lattice(q[..., 0], q[..., 1], g=off, origin=(128, 128))
    tight = fit_lattice(q[..., 0], q[..., 1], g=off, origin=(128, 128), max_rotation_degree=5)
    assert np.isfinite(loose.fit_error).mean() > 0.5
    assert np.isnan(tight.fit_error).all()

"""Integer maxima: py4DSTEM's definition, criteria and order, against a naive loop and on hand-made arrays."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_disks import naive_maxima

from fcunet.kernels.peaks import find_maxima

OFF = {
    "edge_boundary": 1,
    "min_absolute_intensity": 0.0,
    "min_relative_intensity": 0.0,
    "relative_to_peak": 0,
    "min_peak_spacing": 0.0,
    "max_num_peaks": 1000,
}


def as_list(maxima, i=0):
    n = int(maxima.n_peaks[i])
    return [(int(maxima.y[i, k]), int(maxima.x[i, k]), float(maxima.value[i, k])) for k in range(n)]


def image_with(shape, *points):
    image = torch.zeros((1, *shape), dtype=torch.float64)
    for y, x, value in points:
        image[0, y, x] = value
    return image


@given(
    seed=st.integers(0, 10_000),
    levels=st.integers(2, 400),
    edge=st.integers(0, 4),
    absolute=st.sampled_from([0.0, 0.4]),
    relative=st.sampled_from([0.0, 0.3, 0.9]),
    rank=st.sampled_from([0, 3, 500]),
    spacing=st.sampled_from([0.0, 2.0, 5.0]),
    slots=st.sampled_from([1, 5, 200]),
)
def test_find_maxima__equals_a_naive_loop(seed, levels, edge, absolute, relative, rank, spacing, slots):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, levels, (3, 19, 24)) / levels  # few levels: many ties and plateaus
    options = {
        "edge_boundary": edge,
        "min_absolute_intensity": absolute,
        "min_relative_intensity": relative,
        "relative_to_peak": rank,
        "min_peak_spacing": spacing,
        "max_num_peaks": slots,
    }
    maxima = find_maxima(torch.from_numpy(images), **options)
    assert maxima.y.shape == (3, slots)
    for i, image in enumerate(images):
        expected = naive_maxima(image, **options)
        assert as_list(maxima, i) == expected
        unlimited = naive_maxima(image, **options | {"max_num_peaks": 10_000})
        assert bool(maxima.truncated[i]) == (len(unlimited) > slots)


def test_find_maxima__fills_empty_slots_with_minus_one_and_nan():
    maxima = find_maxima(image_with((9, 9), (4, 5, 1.0)), **OFF | {"max_num_peaks": 3})
    assert maxima.y.tolist() == [[4, -1, -1]]
    assert maxima.x.tolist() == [[5, -1, -1]]
    assert math.isnan(maxima.value[0, 1])
    assert maxima.n_peaks.tolist() == [1]


def test_find_maxima__counts_a_flat_top_once_at_its_first_pixel():
    maxima = find_maxima(image_with((9, 9), (4, 4, 2.0), (4, 5, 2.0)), **OFF)
    assert as_list(maxima) == [(4, 4, 2.0)]
    maxima = find_maxima(image_with((9, 9), (4, 4, 2.0), (5, 3, 2.0)), **OFF)
    assert as_list(maxima) == [(5, 3, 2.0)]


def test_find_maxima__puts_the_larger_row_first_among_equals():
    maxima = find_maxima(image_with((12, 12), (3, 8, 1.0), (8, 3, 1.0), (8, 8, 1.0)), **OFF)
    assert [p[:2] for p in as_list(maxima)] == [(8, 8), (8, 3), (3, 8)]


def test_find_maxima__keeps_the_first_row_inside_the_edge():
    image = image_with(
        (12, 13), (2, 9, 2.0), (9, 3, 4.0), (3, 10, 6.0), (3, 6, 1.0), (8, 6, 3.0), (6, 9, 5.0)
    )
    found = {p[:2] for p in as_list(find_maxima(image, **OFF | {"edge_boundary": 3}))}
    assert found == {(3, 6), (8, 6), (6, 9)}


def test_find_maxima__treats_edge_zero_as_one():
    image = image_with((8, 8), (0, 4, 9.0), (1, 1, 1.0))
    assert as_list(find_maxima(image, **OFF | {"edge_boundary": 0})) == [(1, 1, 1.0)]


def test_find_maxima__drops_only_what_is_closer_than_the_spacing():
    image = image_with((20, 20), (5, 5, 3.0), (5, 10, 2.0), (9, 5, 1.0))
    found = as_list(find_maxima(image, **OFF | {"min_peak_spacing": 5.0}))
    assert [p[:2] for p in found] == [(5, 5), (5, 10)]


def test_find_maxima__a_dropped_peak_shields_nothing():
    image = image_with((20, 20), (5, 4, 3.0), (5, 8, 2.0), (5, 12, 1.0))
    found = as_list(find_maxima(image, **OFF | {"min_peak_spacing": 6.0}))
    assert [p[:2] for p in found] == [(5, 4), (5, 12)]


def test_find_maxima__counts_the_reference_rank_after_the_absolute_cut():
    image = image_with((20, 20), (5, 5, 8.0), (5, 10, 4.0), (9, 5, 2.1), (15, 15, 1.9), (15, 5, 0.5))
    options = OFF | {"min_absolute_intensity": 1.0, "min_relative_intensity": 0.5, "relative_to_peak": 1}
    assert [p[2] for p in as_list(find_maxima(image, **options))] == [8.0, 4.0, 2.1]
    # a rank that no longer exists after the cut: the relative criterion is skipped
    options = OFF | {"min_absolute_intensity": 3.0, "min_relative_intensity": 0.9, "relative_to_peak": 3}
    assert [p[2] for p in as_list(find_maxima(image, **options))] == [8.0, 4.0]


@pytest.mark.parametrize("fill", [0.0, 3.0, float("nan")])
def test_find_maxima__finds_nothing_in_a_constant_or_missing_image(fill):
    maxima = find_maxima(torch.full((2, 16, 16), fill), **OFF)
    assert maxima.n_peaks.tolist() == [0, 0]
    assert not maxima.truncated.any()


def test_find_maxima__takes_no_images_and_images_smaller_than_the_edge():
    assert find_maxima(torch.zeros(0, 16, 16), **OFF).y.shape == (0, 1000)
    assert find_maxima(torch.rand(1, 8, 8), **OFF | {"edge_boundary": 4}).n_peaks.tolist() == [0]


def test_find_maxima__refuses_a_single_image():
    with pytest.raises(ValueError, match=r"image\[None\]"):
        find_maxima(torch.zeros(16, 16), **OFF)

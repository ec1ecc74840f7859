"""Boxes and levels, against brute force."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideflow_ray import geometry
from slideflow_ray.geometry import (
    Level,
    achieved_mpp,
    best_level,
    cells_along,
    level_downsample,
    origins_px0,
    scale_of,
    size_on_level,
    to_level,
)

PYRAMID = tuple(Level((w, h), (d, d)) for w, h, d in ((2221, 2967, 1.0), (1110, 1483, 2.0), (277, 370, 8.0)))

scales = st.floats(0.81, 40, allow_nan=False)
strides = st.integers(8, 600)


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(geometry).failed == 0


def test_a_grid_at_an_odd_scale_does_not_drift():
    """The field's bug: k * int(stride * scale) is 200 px off by tile 219 at 0.2462 um/px."""
    scale = scale_of(0.5, 0.2462)
    origins = origins_px0(220, 256, scale)
    assert origins.dtype == np.int64
    assert origins[219] == round(219 * 256 * scale)
    assert abs(int(origins[219]) - 219 * int(256 * scale)) > 100


@settings(deadline=None)
@given(st.integers(1, 60_000), strides, scales)
def test_cells_are_the_origins_inside_the_axis(length, stride, scale):
    n = cells_along(length, stride, scale)
    brute = 0
    while round(brute * (stride * scale)) < length:
        brute += 1
    assert n == max(brute, 1)
    assert origins_px0(n, stride, scale)[-1] < length <= origins_px0(n + 1, stride, scale)[-1]


@settings(deadline=None)
@given(st.integers(1, 300), strides, scales)
def test_origins_are_within_half_a_pixel_of_where_they_belong(n, stride, scale):
    origins = origins_px0(n, stride, scale)
    assert np.abs(origins - np.arange(n) * stride * scale).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("scale", "level"), [(0.8, 0), (1.0, 0), (1.999, 0), (1.9999999, 1), (2.0, 1), (7.99, 1), (8.0, 2), (500, 2)]
)
def test_the_best_level_is_the_coarsest_that_is_fine_enough(scale, level):
    assert best_level(PYRAMID, scale) == level


@settings(deadline=None)
@given(st.integers(64, 9000), st.integers(64, 9000), st.sampled_from([2, 3, 4, 8, 16]), st.booleans())
def test_writers_that_round_up_or_down_have_whole_downsamples(w, h, n, up):
    size = tuple(math.ceil(side / n) if up else side // n for side in (w, h))
    found = level_downsample((w, h), size)
    assert found[0] == pytest.approx(n, rel=n / min(w, h) * 2)
    if min(w, h) > 8 * n * n:
        assert found == (n, n)


def test_x_and_y_are_not_swapped():
    level = Level((500, 1000), (2.0, 3.0))
    np.testing.assert_array_equal(to_level(np.array([[100, 300]]), level), [[50, 100]])
    assert size_on_level((120, 60), 2.0, level) == (120, 40)
    assert achieved_mpp(0.5, level, (120, 40), 60) == pytest.approx(0.5 * (2 * 120 / 60 + 3 * 40 / 60) / 2)


@settings(deadline=None)
@given(st.integers(8, 1024), scales)
def test_the_achieved_scale_is_within_half_a_level_pixel(tile_px, scale):
    level = PYRAMID[best_level(PYRAMID, scale)]
    size = size_on_level((tile_px, tile_px), scale, level)
    wanted = tile_px * scale / level.downsample[0]
    assert abs(size[0] - wanted) <= 0.5 + 1e-6
    assert achieved_mpp(0.25, level, size, tile_px) == pytest.approx(0.25 * scale, rel=0.51 / wanted)

"""Objects: each exactly once, with exact outlines, whole or block by block."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage
from shapely.geometry import box

from slideflow_ray.errors import ConfigError
from slideflow_ray.objects import Object, boxes_to_grid, find_objects, rings

SCALE = (1.0, 1.0)
ODD = (3.5, 2.25)
"""A pixel that is not square, whose products are exact in binary."""


def discs(shape: tuple[int, int], *which: tuple[float, float, float], value: int = 2) -> np.ndarray:
    """A plane of zeros with discs (row, col, radius) of one class."""
    rows, cols = np.indices(shape)
    plane = np.zeros(shape, np.uint8)
    for row, col, radius in which:
        plane[(rows - row) ** 2 + (cols - col) ** 2 <= radius**2] = value
    return plane


def pixels_of(thing: Object, shape: tuple[int, int], scale: tuple[float, float] = SCALE) -> np.ndarray:
    """Draw an object's polygon by asking which pixel centres it covers."""
    rows, cols = np.indices(shape)
    return shapely.contains_xy(thing.polygon, (cols + 0.5) * scale[0], (rows + 0.5) * scale[1])


def same(one: tuple[Object, ...], other: tuple[Object, ...]) -> bool:
    return [repr(thing) for thing in one] == [repr(thing) for thing in other]


PHANTOM = discs((190, 260), (60, 60, 25), (60, 102, 25), (130, 128, 20), (150, 10, 22), (30, 210, 14))
"""Two discs that touch, one across the border of tiles of 64 (both ways), one cut by the edge, one alone."""
CENTRES = [(60, 60), (60, 102), (130, 128), (150, 10), (30, 210)]


# Exactly once


@pytest.mark.parametrize("block", [None, 64, 50, 7])
def test_touching_crossing_and_cut_objects_are_found_once_each(block: int | None) -> None:
    found = find_objects(PHANTOM, 2, px0_per_px=SCALE, split=True, min_distance_px=10, block=block)
    assert len(found) == len(CENTRES)
    for row, col in CENTRES:
        assert [thing.polygon.covers(shapely.Point(col + 0.5, row + 0.5)) for thing in found].count(True) == 1
    drawn = np.stack([pixels_of(thing, PHANTOM.shape) for thing in found])
    assert (drawn.sum(0) == (PHANTOM == 2)).all()  # each pixel in one object
    assert [thing.touches_edge for thing in found] == [thing.box_px0[0] == 0 for thing in found]
    assert sum(thing.touches_edge for thing in found) == 1


def test_the_cut_between_two_discs_is_their_common_chord() -> None:
    left, right = find_objects(discs((80, 120), (40, 40, 20), (40, 74, 20)), 2, px0_per_px=SCALE, split=True)
    assert left.centroid_px0[0] < right.centroid_px0[0]
    assert abs(left.polygon.bounds[2] - 57.5) <= 1.5
    assert abs(left.area_px0 - right.area_px0) <= 41  # at most a column of pixels


@pytest.mark.parametrize("distance", [16, 26, 32, 39])
def test_equal_discs_are_told_apart_when_their_neck_is_narrow(distance: int) -> None:
    plane = discs((80, 140), (40, 40, 20), (40, 40 + distance, 20))
    assert len(find_objects(plane, 2, px0_per_px=SCALE, split=True)) == (2 if distance > 1.05 * 20 else 1)


@pytest.mark.parametrize("angle", [0, 20, 45, 77])
def test_a_long_rough_object_is_not_cut(angle: int) -> None:
    rows, cols = np.indices((200, 200)) - 100
    turn = np.deg2rad(angle)
    along, across = cols * np.cos(turn) + rows * np.sin(turn), rows * np.cos(turn) - cols * np.sin(turn)
    rough = 12 + np.random.default_rng(0).uniform(-0.7, 0.7, (200, 200))
    plane = ((np.abs(along) < 80) & (np.abs(across) < rough)).astype(np.uint8)
    found = find_objects(plane, 1, px0_per_px=SCALE, split=True, min_area_px=20)
    assert len(found) == 1


def test_pieces_nearer_than_asked_stay_one() -> None:
    plane = discs((60, 120), (30, 30, 15), (30, 58, 15))
    assert len(find_objects(plane, 2, px0_per_px=SCALE, split=True, min_distance_px=25)) == 2
    assert len(find_objects(plane, 2, px0_per_px=SCALE, split=True, min_distance_px=32)) == 1


def test_splitting_measures_in_the_planes_own_scale() -> None:
    """Discs in px0 are ellipses on a plane of other pixels; they are told apart all the same."""
    rows, cols = np.indices((160, 80))
    plane = np.zeros((160, 80), np.uint8)
    for x in (40, 76):
        plane[((rows + 0.5) * 1.0 - 60) ** 2 + ((cols + 0.5) * 2.0 - x) ** 2 <= 20**2] = 1
    found = find_objects(plane, 1, px0_per_px=(2.0, 1.0), split=True)
    assert len(found) == 2
    assert abs(found[0].area_px0 / (np.pi * 400) - 1) < 0.05


# Against scipy


@settings(max_examples=60, deadline=None)
@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=st.integers(0, 1)))
def test_every_component_is_one_valid_exact_object(plane: np.ndarray) -> None:
    labels, n = ndimage.label(plane == 1)
    found = find_objects(plane, 1, px0_per_px=ODD)
    assert len(found) == n
    pixel = ODD[0] * ODD[1]
    seen = set()
    for thing in found:
        assert thing.polygon.is_valid
        drawn = pixels_of(thing, plane.shape, ODD)
        (label,) = np.unique(labels[drawn])
        seen.add(int(label))
        assert (drawn == (labels == label)).all()
        assert thing.area_px0 == thing.polygon.area == drawn.sum() * pixel
        rows, cols = np.nonzero(drawn)
        assert thing.centroid_px0 == pytest.approx(((cols.mean() + 0.5) * ODD[0], (rows.mean() + 0.5) * ODD[1]))
        assert thing.centroid_px0 == pytest.approx(thing.polygon.centroid.coords[0])
        edge = rows.min() == 0 or cols.min() == 0 or rows.max() + 1 == len(plane) or cols.max() + 1 == len(plane[0])
        assert thing.touches_edge == edge
    assert len(seen) == n
    corners = [(thing.box_px0[1], thing.box_px0[0]) for thing in found]
    assert corners == sorted(corners)


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=st.integers(0, 1)),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
)
def test_block_by_block_gives_the_same_objects(plane: np.ndarray, block: int, fill: bool, split: bool) -> None:
    whole = find_objects(plane, 1, px0_per_px=ODD, fill_holes=fill, split=split)
    assert same(whole, find_objects(plane, 1, px0_per_px=ODD, fill_holes=fill, split=split, block=block))


@pytest.mark.parametrize("block", [None, 37])
def test_a_large_plane_against_scipy(block: int | None) -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(300, 410)), 3)
    plane = np.digitize(noise, [-0.05, 0.05]).astype(np.uint8)
    labels, n = ndimage.label(plane == 2)
    areas = np.sort(np.bincount(labels.ravel())[1:])
    found = find_objects(plane, 2, px0_per_px=SCALE, block=block)
    assert len(found) == n
    assert sorted(thing.area_px0 for thing in found) == areas.tolist()
    least = find_objects(plane, 2, px0_per_px=SCALE, block=block, min_area_px=100)
    assert sorted(thing.area_px0 for thing in least) == [a for a in areas.tolist() if a >= 100]


# Holes


NESTED = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 0],
        [1, 0, 0, 0, 0, 0, 1, 0],
        [1, 0, 1, 1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1, 0, 1, 0],
        [1, 0, 1, 1, 1, 0, 1, 0],
        [1, 0, 0, 0, 0, 0, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ],
    np.uint8,
)


@pytest.mark.parametrize("block", [None, 3])
def test_holes_are_kept_in_the_outline_or_filled_with_what_is_in_them(block: int | None) -> None:
    outer, inner = find_objects(NESTED, 1, px0_per_px=SCALE, block=block)
    assert (outer.area_px0, inner.area_px0) == (25, 8)
    assert [ring.bounds for ring in outer.polygon.interiors] == [(1, 1, 6, 6)]
    (filled,) = find_objects(NESTED, 1, px0_per_px=SCALE, fill_holes=True, block=block)
    assert filled.area_px0 == 50
    assert not filled.polygon.interiors


def test_a_hole_is_open_at_the_edge_and_at_a_corner() -> None:
    at_the_edge = np.array([[1, 0, 1], [1, 1, 1]], np.uint8)
    (found,) = find_objects(at_the_edge, 1, px0_per_px=SCALE, fill_holes=True)
    assert found.area_px0 == 5
    at_a_corner = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], np.uint8)
    (found,) = find_objects(at_a_corner, 1, px0_per_px=SCALE, fill_holes=True)
    assert found.area_px0 == 11
    assert found.polygon.is_valid
    assert len(found.polygon.interiors) == 1


@settings(max_examples=60, deadline=None)
@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=st.integers(0, 1)))
def test_filling_equals_filling_the_whole_plane(plane: np.ndarray) -> None:
    outside, _ = ndimage.label(np.pad(plane == 0, 1, constant_values=True), structure=np.ones((3, 3)))
    labels, n = ndimage.label(outside[1:-1, 1:-1] != outside[0, 0])
    found = find_objects(plane, 1, px0_per_px=SCALE, fill_holes=True)
    assert sorted(thing.area_px0 for thing in found) == sorted(np.bincount(labels.ravel())[1:].tolist())
    assert all(thing.polygon.is_valid for thing in found)
    assert len(found) == n


# Frames


def test_pixels_become_px0_along_each_axis_by_its_own_scale() -> None:
    plane = np.zeros((9, 12), np.uint8)
    plane[2:5, 7:8] = 3
    (thing,) = find_objects(plane, 3, px0_per_px=(4.0, 8.0), origin_px0=(1000, -16))
    assert thing.box_px0 == (1028, 0, 4, 24)
    assert thing.polygon.equals(box(1028, 0, 1032, 24))
    assert thing.area_px0 == 96
    assert thing.centroid_px0 == (1030, 12)
    assert not thing.touches_edge
    assert thing.class_index == 3


def test_boxes_hold_their_outline_in_whole_px0() -> None:
    plane = np.zeros((40, 40), np.uint8)
    plane[3:6, 10:25] = 1
    (thing,) = find_objects(plane, 1, px0_per_px=(0.28, 1.1))
    assert thing.polygon.bounds[2] == 7.000000000000001
    assert thing.box_px0 == (2, 3, 5, 4)  # 2.8 to 7, and 3.3 to 6.6
    assert box(2, 3, 7, 7).buffer(1e-9).covers(thing.polygon)


def test_an_objects_outline_has_corners_only() -> None:
    (ring,) = rings(np.ones((5, 9), np.bool_))
    assert sorted(map(tuple, ring.tolist())) == [(0, 0), (0, 5), (9, 0), (9, 5)]


def test_other_classes_and_what_was_not_scored_are_no_objects() -> None:
    plane = np.full((6, 6), 255, np.uint8)
    plane[1, 1], plane[3, 3] = 1, 2
    assert [thing.box_px0 for thing in find_objects(plane, 2, px0_per_px=SCALE)] == [(3, 3, 1, 1)]
    assert find_objects(plane, 4, px0_per_px=SCALE) == ()
    assert find_objects(np.zeros((0, 5), np.uint8), 1, px0_per_px=SCALE) == ()


def test_square_boxes_for_the_next_model() -> None:
    plane = np.zeros((50, 60), np.uint8)
    plane[10:14, 20:40] = 1
    plane[40:41, 0:1] = 1
    objects = find_objects(plane, 1, px0_per_px=(2.0, 2.0))
    xy, wh = boxes_to_grid(np.array([thing.box_px0 for thing in objects]), margin=0.25)
    assert (xy.dtype, wh.dtype) == (np.int64, np.int32)
    assert wh.tolist() == [[60, 60], [3, 3]]
    assert xy.tolist() == [[60 - 30, 24 - 30], [0, 80]]
    none, sizes = boxes_to_grid(np.empty((0, 4), np.int64))
    assert none.shape == sizes.shape == (0, 2)


@pytest.mark.parametrize(
    "settings",
    [{"px0_per_px": (0.0, 1.0)}, {"px0_per_px": (1.0, float("nan"))}, {"min_area_px": 0}, {"block": 0}],
)
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        find_objects(np.zeros((4, 4), np.uint8), 1, **{"px0_per_px": SCALE, **settings})


def test_a_volume_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(2, 3, 4\)"):
        find_objects(np.zeros((2, 3, 4), np.uint8), 1, px0_per_px=SCALE)

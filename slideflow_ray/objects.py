"""Plane of classes -> objects: components, split where they only touch, with exact outlines and boxes in px0.

The plane is the whole slide's, so an object that crosses tiles is one component. It may be any
array that slices to NumPy (a zarr array too): with `block` it is labelled piece by piece, and
what is in memory at a time is one block, one object, and a table of the components.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from shapely import Polygon

from slideflow_ray.errors import ConfigError
from slideflow_ray.geometry import plane_to_px0

NECK = 0.85
"""Two halves are two objects where the neck between them is narrower than this share of the smaller half.

A scale-free rule, on half widths: two equal discs are told apart from a distance of 1.05 radii on,
and the ripples of a drawn outline do not cut an object.
"""

NEAR = 1e-6
"""Boxes are widened to whole px0, but not for a rounding error."""

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Plane(Protocol):
    """A plane of class indices, uint8, that slices like an array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns)."""

    def __getitem__(self, window: Any, /) -> Any:
        """Return a window as an array."""


@dataclass(frozen=True)
class Object:
    """One object in px0.

    box_px0 : (x, y, w, h), whole px0 around the outline; polygon : the outline along pixel edges, with its holes.
    area_px0 : that of its pixels, as of the polygon; centroid_px0 : (x, y), mean of its pixels' centres.
    touches_edge : it reaches the plane's edge, so a part of it may lie outside.
    """

    class_index: int
    box_px0: tuple[int, int, int, int]
    polygon: Polygon
    area_px0: float
    centroid_px0: tuple[float, float]
    touches_edge: bool


def find_objects(
    plane: Plane,
    class_index: int,
    *,
    px0_per_px: tuple[float, float],
    origin_px0: tuple[int, int] = (0, 0),
    min_area_px: int = 1,
    fill_holes: bool = False,
    split: bool = False,
    min_distance_px: float = 0.0,
    block: int | None = None,
) -> tuple[Object, ...]:
    """Return the objects of one class, by the upper left corner of their boxes: top to bottom, then left to right.

    plane : uint8, shape (h, w), class of each pixel; one pixel covers `px0_per_px` (x, y) px0, the plane
    begins at `origin_px0`.
    Pixels are connected by their edges. `fill_holes` fills what an object encloses, other
    objects too; a hole that meets the outside at a corner, or the plane's edge, is open. `split` then
    cuts objects at narrow necks (see NECK), never into pieces whose centres (deepest points) are nearer than
    `min_distance_px`. Objects of fewer than `min_area_px` pixels are left out last.
    `block` : side in px of the windows that are labelled one by one; the objects are the same.

    Raises ConfigError for a plane that is not 2-D, or a setting out of range.
    """
    _check(plane, px0_per_px, min_area_px, block)
    found = []
    for component in _components(plane, class_index, block or max(*plane.shape, 1), min_area_px, fill_holes):
        for piece in _split(component, min_distance_px, px0_per_px) if split else [component]:
            if np.count_nonzero(piece.mask) >= min_area_px:
                found.append(piece)
    found.sort(key=lambda piece: (piece.row, piece.col, piece.first))
    height, width = plane.shape
    return tuple(_object(piece, class_index, px0_per_px, origin_px0, (height, width)) for piece in found)


def _check(plane: Plane, px0_per_px: tuple[float, float], min_area_px: int, block: int | None) -> None:
    if len(plane.shape) != 2:
        raise ConfigError(f"A plane of classes has rows and columns, got shape {plane.shape}.")
    if not all(math.isfinite(scale) and scale > 0 for scale in px0_per_px):
        raise ConfigError(f"px0_per_px must be above 0 along x and y, got {px0_per_px}.")
    if min_area_px < 1 or (block is not None and block < 1):
        raise ConfigError(f"min_area_px and block must be at least 1, got {min_area_px} and {block}.")


def boxes_to_grid(
    boxes_px0: npt.NDArray[np.int64], margin: float = 0.0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return a square box around each object, for a model that reads each at its own scale.

    The side is the longer side of the object's box, and `margin` of it more on each side; the centre is the box's.
    boxes_px0 : (x, y, w, h) of the objects, int64, shape (N, 4)
    returns : upper left corners, int64, shape (N, 2), which may lie outside the slide; (width, height), int32
    """
    boxes = np.asarray(boxes_px0, np.float64).reshape(-1, 4)
    side = np.ceil(boxes[:, 2:].max(axis=1, initial=1) * (1 + 2 * margin))
    corner = np.rint(boxes[:, :2] + boxes[:, 2:] / 2 - side[:, None] / 2)
    return corner.astype(np.int64), np.repeat(side[:, None], 2, axis=1).astype(np.int32)


# components


@dataclass(frozen=True)
class _Piece:
    """Pixels of one object: its mask, without empty rows or columns at the rim, at (row, col) of the plane."""

    row: int
    col: int
    mask: Bools

    @property
    def first(self) -> int:
        """Column of the first pixel of the first row: tells objects with one corner apart."""
        return self.col + int(self.mask[0].argmax())


@dataclass(frozen=True)
class _Table:
    """Components of a plane in the order of their first pixels: box (r0, c0, r1, c1), first pixel (row, col)."""

    box: Ints
    first: Ints


def _components(plane: Plane, class_index: int, block: int, min_area: int, fill_holes: bool) -> Iterator[_Piece]:
    """Yield each component alone; those inside a filled hole have become part of it."""
    table = _label(plane, class_index, block)
    absorbed = np.zeros(len(table.box), np.bool_)
    for i, ((r0, c0, r1, c1), (row, col)) in enumerate(zip(table.box.tolist(), table.first.tolist(), strict=True)):
        if absorbed[i] or (r1 - r0) * (c1 - c0) < min_area:
            continue
        mask = _alone(np.asarray(plane[r0:r1, c0:c1]) == class_index, (row - r0, col - c0))
        if fill_holes and (filled := _filled(mask)).sum() > mask.sum():
            mask = filled
            low, high = np.searchsorted(table.first[:, 0], (r0, r1))  # rows rise in the table
            at = table.first[low:high] - (r0, c0)
            inside = np.flatnonzero(((at >= 0) & (at < mask.shape)).all(axis=1))
            absorbed[low + inside] |= mask[at[inside, 0], at[inside, 1]]
        yield _Piece(r0, c0, mask)


def _alone(mask: Bools, at: tuple[int, int]) -> Bools:
    """Return the component of one pixel; the labels, of four bytes each, go before anything else is made."""
    labels, _ = ndimage.label(mask)
    alone: Bools = labels == labels[at]
    return alone


def _filled(mask: Bools) -> Bools:
    """Fill what the mask encloses; outside is what reaches the rim by edges or corners."""
    outside, _ = ndimage.label(np.pad(~mask, 1, constant_values=True), structure=np.ones((3, 3)))
    filled: Bools = outside[1:-1, 1:-1] != outside[0, 0]
    return filled


def _label(plane: Plane, class_index: int, block: int) -> _Table:
    """Label block by block, and join across borders what touches there."""
    height, width = cast(tuple[int, int], plane.shape)
    above = np.zeros(width, np.int64)  # labels of the row above, of the column to the left; 0 is none
    parts: list[Ints] = []
    pairs: list[Ints] = []
    count = 0
    for r0 in range(0, height, block):
        left = np.zeros(min(block, height - r0), np.int64)
        for c0 in range(0, width, block):
            local, n = ndimage.label(np.asarray(plane[r0 : r0 + block, c0 : c0 + block]) == class_index)
            labels = np.where(local > 0, local.astype(np.int64) + count, 0)
            here = slice(c0, c0 + labels.shape[1])
            pairs += [_pairs(above[here], labels[0]), _pairs(left, labels[:, 0])]
            parts.append(_parts(local, n, r0, c0))
            above[here], left = labels[-1], labels[:, -1]
            count += n
    return _joined(np.concatenate([np.empty((0, 6), np.int64), *parts]), np.concatenate([_NO_PAIRS, *pairs]))


_NO_PAIRS = np.empty((0, 2), np.int64)


def _pairs(one: Ints, other: Ints) -> Ints:
    both = (one > 0) & (other > 0)
    pairs: Ints = np.unique(np.column_stack([one[both], other[both]]), axis=0) if both.any() else _NO_PAIRS
    return pairs


def _parts(labels: npt.NDArray[Any], n: int, row: int, col: int) -> Ints:
    """Return (r0, c0, r1, c1, first row, first column) of a block's components in the plane, shape (n, 6)."""
    if n == 0:
        return np.empty((0, 6), np.int64)
    slices = cast(list[tuple[slice, slice]], ndimage.find_objects(labels))
    boxes = np.array([(r.start, c.start, r.stop, c.stop) for r, c in slices], np.int64)
    flat = labels.ravel()
    pixels = np.flatnonzero(flat)[::-1]
    place = np.zeros(n + 1, np.int64)
    place[flat[pixels]] = pixels  # backwards, for of several values the last one stays
    first = np.column_stack(np.divmod(place[1:], labels.shape[1]))
    parts: Ints = np.hstack([boxes, first]) + np.array([row, col, row, col, row, col])
    return parts


def _joined(parts: Ints, pairs: Ints) -> _Table:
    n = len(parts)
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0] - 1, pairs[:, 1] - 1)), shape=(n, n))
    components, whose = connected_components(graph, directed=False) if n else (0, np.empty(0, np.int64))
    order = np.lexsort((parts[:, 5], parts[:, 4], whose))  # within each component, its first pixel comes first
    starts = np.searchsorted(whose[order], np.arange(components))
    ordered = parts[order]
    low = np.minimum.reduceat(ordered[:, :2], starts, axis=0) if n else ordered[:, :2]
    high = np.maximum.reduceat(ordered[:, 2:4], starts, axis=0) if n else ordered[:, 2:4]
    first = ordered[starts, 4:]
    sequence = np.lexsort((first[:, 1], first[:, 0]))
    return _Table(np.hstack([low, high])[sequence], first[sequence])


# splitting


def _split(piece: _Piece, min_distance_px: float, px0_per_px: tuple[float, float]) -> list[_Piece]:
    """Cut an object at its necks: a watershed of the depth below its outline, with shallow basins joined.

    Each pixel climbs to its deepest neighbour until it can climb no more; the tops are the basins. Where two
    meet, the deepest pixel of their border is half the neck's width; the deepest borders come first.
    """
    mean = math.sqrt(px0_per_px[0] * px0_per_px[1])
    spacing = (px0_per_px[1] / mean, px0_per_px[0] / mean)
    depth = ndimage.distance_transform_edt(np.pad(piece.mask, 1), sampling=spacing)
    tops = _climbed(depth)
    basins, basin = np.unique(tops[depth > 0], return_inverse=True)
    if len(basins) == 1:
        return [piece]
    labels = np.full(depth.shape, -1, np.int64)
    labels[depth > 0] = basin
    place = np.column_stack(np.unravel_index(basins, depth.shape)).astype(np.float64) * spacing
    whose = _merged(_borders(labels, depth), depth.ravel()[basins], place, min_distance_px)
    if len(set(whose)) == 1:
        return [piece]
    final = np.where(labels >= 0, np.array(whose)[labels] + 1, 0)[1:-1, 1:-1]
    return [
        _Piece(piece.row + rows.start, piece.col + cols.start, final[rows, cols] == label)
        for label, (rows, cols) in _boxes(final)
    ]


def _boxes(labels: Ints) -> Iterator[tuple[int, tuple[slice, slice]]]:
    for label, window in enumerate(ndimage.find_objects(labels), 1):
        if window is not None:
            yield label, (window[0], window[1])


def _climbed(depth: Floats) -> Ints:
    """Return for each pixel the flat index of the top it climbs to; of equal neighbours the first is higher."""
    index = np.arange(depth.size).reshape(depth.shape)
    best, height = index.copy(), depth.copy()
    for axis in (0, 1):
        for step in (1, -1):
            # the padded rim is 0 deep, so what np.roll brings around is never higher
            near, other = np.roll(depth, step, axis), np.roll(index, step, axis)
            higher = (near > height) | ((near == height) & (other < best))
            best, height = np.where(higher, other, best), np.where(higher, near, height)
    flat: Ints = best.ravel()
    while True:
        further = flat[flat]
        if (further == flat).all():
            return flat.reshape(depth.shape)
        flat = further


def _borders(labels: Ints, depth: Floats) -> list[tuple[float, int, int]]:
    """Return (half the neck's width, basin, basin) for each two basins that meet, widest first."""
    found: list[npt.NDArray[Any]] = []
    for one, other in ((np.s_[:-1, :], np.s_[1:, :]), (np.s_[:, :-1], np.s_[:, 1:])):
        a, b = labels[one], labels[other]
        meet = (a != b) & (a >= 0) & (b >= 0)
        neck = np.minimum(depth[one][meet], depth[other][meet])
        found.append(np.column_stack([neck, np.minimum(a[meet], b[meet]), np.maximum(a[meet], b[meet])]))
    rows = np.concatenate(found)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], -rows[:, 0]))]
    _, first = np.unique(rows[:, 1:], axis=0, return_index=True)
    return [(neck, int(a), int(b)) for neck, a, b in rows[np.sort(first)].tolist()]


def _merged(
    borders: list[tuple[float, int, int]],
    depth: Floats,
    place: Floats,
    min_distance: float,
) -> list[int]:
    """Return for each basin the one it belongs to: the deepest of those that no neck keeps apart."""
    parent = list(range(len(depth)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for neck, a, b in borders:
        deep, shallow = sorted((root(a), root(b)), key=lambda i: (-depth[i], i))
        apart = float(np.hypot(*(place[deep] - place[shallow])))
        if deep != shallow and (neck >= NECK * depth[shallow] or apart < min_distance):
            parent[shallow] = deep
    return [root(i) for i in range(len(depth))]


# outlines


def _object(
    piece: _Piece,
    class_index: int,
    px0_per_px: tuple[float, float],
    origin_px0: tuple[int, int],
    shape: tuple[int, int],
) -> Object:
    def place(xy: npt.NDArray[Any]) -> Floats:
        return plane_to_px0(xy + np.array([piece.col, piece.row]), px0_per_px, origin_px0)

    h, w = piece.mask.shape
    rows, cols = np.nonzero(piece.mask)
    centre = place(np.array([cols.mean() + 0.5, rows.mean() + 0.5]))
    low, high = np.floor(place(np.array([0, 0])) + NEAR), np.ceil(place(np.array([w, h])) - NEAR)
    x, y, right, bottom = (int(v) for v in (*low, *high))
    shell, *holes = rings(piece.mask)
    return Object(
        class_index=class_index,
        box_px0=(x, y, right - x, bottom - y),
        polygon=Polygon(place(shell), [place(hole) for hole in holes]),
        area_px0=len(rows) * px0_per_px[0] * px0_per_px[1],
        centroid_px0=(float(centre[0]), float(centre[1])),
        touches_edge=0 in (piece.row, piece.col) or piece.row + h == shape[0] or piece.col + w == shape[1],
    )


STEPS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
"""Right, down, left, up: a turn to the left is one less."""


def rings(mask: Bools) -> list[npt.NDArray[np.int64]]:
    """Return the outline of one component as rings of corners (x, y), the shell first, then its holes.

    mask : bool, shape (h, w), pixels connected by their edges
    returns : int64, shape (k, 2) each, pixel (row, col) being the square from (col, row) to (col + 1, row + 1)

    Each edge between a pixel and what is not one is walked once, pixels on the right hand. Where two edges leave
    a corner the walk turns left, along the background: so a hole that meets the outside, or
    another hole, at a corner is a ring of its own, and the polygon is valid.
    """
    starts, ways = _edges(mask)
    follow = _followers(starts, ways, mask.shape[1] + 3)
    before = np.empty_like(follow)
    before[follow] = np.arange(len(follow))
    corner = ways != ways[before]
    found = [walk[corner[walk]] for walk in _walks(follow)]
    outlines = [starts[walk] - 1 for walk in found]
    outlines.sort(key=lambda ring: _area(ring) < 0)  # the shell runs clockwise on the screen, holes do not
    return outlines


def _edges(mask: Bools) -> tuple[Ints, Ints]:
    """Return where each edge starts, (x, y) of the mask padded by 1, and its way (see STEPS), in raster order."""
    padded = np.pad(mask, 1)
    inner = padded[1:-1, 1:-1]
    # an edge lies between a pixel and a neighbour that is none; it starts at one of the pixel's four corners
    sides = [((-1, 0), (0, 0)), ((0, 1), (1, 0)), ((1, 0), (1, 1)), ((0, -1), (0, 1))]
    h, w = mask.shape
    starts, ways = [], []
    for way, ((down, right), (x, y)) in enumerate(sides):
        rows, cols = np.nonzero(inner & ~padded[1 + down : 1 + down + h, 1 + right : 1 + right + w])
        starts.append(np.column_stack([cols + 1 + x, rows + 1 + y]))
        ways.append(np.full(len(rows), way, np.int64))
    start, along = np.concatenate(starts), np.concatenate(ways)
    order = np.lexsort((along, start[:, 0], start[:, 1]))
    return start[order], along[order]


def _followers(starts: Ints, ways: Ints, width: int) -> Ints:
    """Return the edge that follows each: of those that start where it ends, the one most to the left."""
    keys = (starts[:, 1] * width + starts[:, 0]) * 4 + ways  # ascending, as the edges are in raster order
    ends = starts + STEPS[ways]
    corners = (ends[:, 1] * width + ends[:, 0]) * 4
    follow = np.full(len(keys), -1, np.int64)
    for turn in (1, 0, -1):  # the last that exists wins: left
        wanted = corners + (ways + turn) % 4
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        follow = np.where(keys[at] == wanted, at, follow)
    return follow


def _walks(follow: Ints) -> Iterator[Ints]:
    after = follow.tolist()
    seen = bytearray(len(after))
    for begin in range(len(after)):
        walk = []
        at = begin
        while not seen[at]:
            seen[at] = 1
            walk.append(at)
            at = after[at]
        if walk:
            yield np.array(walk, np.int64)


def _area(ring: Ints) -> int:
    x, y = ring.T
    return int((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())

"""A segmentation's rows as one plane per slide (OME-Zarr 0.5 labels), the area of each class, and its objects.

The plane has one pixel per pixel of the cores, at the bundle's um per pixel; 255 is not
scored: off the tissue.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from slideflow_ray.errors import ConfigError
from slideflow_ray.geometry import scale_of
from slideflow_ray.objects import Object, find_objects
from slideflow_ray.specs import ObjectSpec
from slideflow_ray.store import SlideStore

BLOCK = 16
"""Cells of one block each way: the grid's own block order, so a block's rows lie together in the table."""
LEVELS = 5
"""Levels of a plane, each every second pixel of the one before: 16 cores halve four times without a rest."""
NOT_SCORED = 255
IN_MEMORY = 2**28
"""Pixels up to which a plane is labelled in one piece; a larger one is read block by block, for the same objects."""
LABEL_BLOCK = 2048

Plane = npt.NDArray[np.uint8]


# planes


@dataclass(frozen=True)
class _Frame:
    """How a plane lies: side of a core in px, cells (rows, cols), size (h, w) in px, um per pixel, px0 per pixel.

    keep : the first row and the one after the last that are picture; around them a micrograph has burnt-in furniture.
    """

    core: int
    cells: tuple[int, int]
    shape: tuple[int, int]
    mpp: float
    mpp0: float
    keep: tuple[int, int]

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> _Frame:
        determines = about["determines"]
        tile, mpp0 = determines["tile"], float(determines["mpp0"])
        core = int(tile["tile_px"]) - 2 * int(tile["halo_px"])
        rows, cols = about["shape"]
        width, height = (math.ceil(side / scale_of(tile["mpp"], mpp0) - 1e-6) for side in determines["size_px0"])
        shape = min(height, rows * core), min(width, cols * core)
        y0, y1 = determines.get("micrograph", {}).get("keep_px0", (0, 0, 0, math.inf))[1::2]
        scale = scale_of(tile["mpp"], mpp0)
        keep = tuple(math.ceil(min(y / scale - 0.5, shape[0])) for y in (y0, y1))  # those whose centre lies in it
        return cls(core, (rows, cols), shape, float(tile["mpp"]), mpp0, (keep[0], keep[1]))


def write_plane(store: SlideStore, grid: str, model: str, classes: Sequence[str]) -> None:
    """Write and commit ``planes/<grid>/<model>`` from the rows of ``masks/<grid>/<model>``; do nothing if it is there.

    Its attributes hold `area_um2` of each class. Memory is one block of 16 x 16 cores.
    Raises CorruptStore.
    """
    node = f"planes/{grid}/{model}"
    if store.committed(node):
        return
    frame = _Frame.of(store.node_attrs(f"grids/{grid}"))
    side = frame.core * BLOCK
    store.make_group(node, {})
    for level in range(LEVELS):
        height, width = (-(-length // 2**level) for length in frame.shape)
        chunk = frame.core if level == 0 else side >> level
        store.create_plane(f"{node}/{level}", (height, width), chunk, side >> level, fill=NOT_SCORED)
    counts = np.zeros(256, np.int64)
    for (row, col), block in _blocks(store, grid, model, frame):
        counts += np.bincount(block.ravel(), minlength=256)
        for level in range(LEVELS):
            at = (row * side >> level, col * side >> level)
            store.write_block(f"{node}/{level}", at, block[:: 2**level, :: 2**level])
    area = {name: int(counts[i]) * frame.mpp**2 for i, name in enumerate(classes)}
    store.make_group(node, {"ome": _labels(model, frame, classes), "area_um2": area})
    store.commit(node)


def _blocks(store: SlideStore, grid: str, model: str, frame: _Frame) -> Iterator[tuple[tuple[int, int], Plane]]:
    """Yield ((block row, block col), plane of that block), only where there are tiles; cut at the slide's edge."""
    core, cells = frame.core, store.read(f"grids/{grid}/rowcol")
    keys = cells // BLOCK
    starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
    for start, stop in zip(starts, [*starts[1:], len(cells)], strict=True):
        row, col = keys[start].tolist()
        block = np.full((BLOCK * core, BLOCK * core), NOT_SCORED, np.uint8)
        masks = store.read_rows(f"masks/{grid}/{model}", int(start), int(stop))
        for mask, (r, c) in zip(masks, (cells[start:stop] - [row * BLOCK, col * BLOCK]) * core, strict=True):
            block[r : r + core, c : c + core] = mask
        first, last = (max(0, y - row * BLOCK * core) for y in frame.keep)
        block[:first] = block[last:] = NOT_SCORED
        height, width = frame.shape[0] - row * BLOCK * core, frame.shape[1] - col * BLOCK * core
        yield (row, col), block[: max(0, height), : max(0, width)]


def _labels(name: str, frame: _Frame, classes: Sequence[str]) -> dict[str, Any]:
    """OME-Zarr 0.5 metadata of a label image; 0 is the centre of px0 (0, 0), as in heatmaps."""
    shift = (frame.mpp - frame.mpp0) / 2  # every level keeps the first pixel of each pair
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [frame.mpp * 2**level] * 2},
                {"type": "translation", "translation": [shift, shift]},
            ],
        }
        for level in range(LEVELS)
    ]
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    properties = [{"label-value": i, "class": text} for i, text in enumerate(classes)]
    return {
        "version": "0.5",
        "multiscales": [{"name": name, "axes": axes, "datasets": datasets, "type": "nearest"}],
        "image-label": {"properties": properties},
    }


def read_areas(store: SlideStore, grid: str, model: str) -> dict[str, float]:
    """Return the area of each class in um2, from a committed plane."""
    areas: dict[str, float] = store.node_attrs(f"planes/{grid}/{model}")["area_um2"]
    return areas


# objects


@dataclass(frozen=True)
class Objects:
    """The objects of one segmentation on one slide, N of them, row for row with the grid of boxes around them.

    box_px0 : int64 (N, 4), x, y, w, h. centroid_px0 : float64 (N, 2). area_um2 : float64 (N,).
    class_index : uint8 (N,), of `classes`. touches_edge : bool (N,), it reaches the slide's edge.
    polygons : shapely polygons in px0, (N,) object.
    """

    classes: tuple[str, ...]
    box_px0: npt.NDArray[np.int64]
    centroid_px0: npt.NDArray[np.float64]
    area_um2: npt.NDArray[np.float64]
    class_index: npt.NDArray[np.uint8]
    touches_edge: npt.NDArray[np.bool_]
    polygons: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.box_px0)


def objects_node(grid: str, model: str, spec: ObjectSpec) -> str:
    """Return the node of a segmentation's objects; how they are found is in its name."""
    return f"objects/{grid}/{model}-{spec.digest()}"


def write_objects(store: SlideStore, grid: str, model: str, classes: Sequence[str], spec: ObjectSpec) -> None:
    """Find the objects in a committed plane, write and commit them; do nothing if they are there.

    Raises ConfigError for a class that the model does not have.
    """
    node = objects_node(grid, model, spec)
    if store.committed(node):
        return
    frame = _Frame.of(store.node_attrs(f"grids/{grid}"))
    wanted = check_classes(spec, classes)
    scale = scale_of(frame.mpp, frame.mpp0)
    plane, block = _labelled(store, f"planes/{grid}/{model}/0", frame)
    found = [
        thing
        for index in wanted
        for thing in find_objects(
            plane,
            index,
            px0_per_px=(scale, scale),
            min_area_px=max(1, math.ceil(spec.min_area_um2 / frame.mpp**2)),
            fill_holes=spec.fill_holes,
            split=spec.split,
            min_distance_px=spec.min_distance_um / frame.mpp,
            block=block,
        )
    ]
    store.make_group(node, {"classes": list(classes), "spec": spec.model_dump(mode="json")})
    for name, values in _arrays(found, frame.mpp0).items():
        store.write_array(f"{node}/{name}", values)
    store.commit(node)


def check_classes(spec: ObjectSpec, classes: Sequence[str]) -> list[int]:
    """Return the indices of the classes that make objects. Raises ConfigError for one that is not there."""
    if unknown := sorted(set(spec.classes) - set(classes)):
        raise ConfigError(f"objects.classes names {', '.join(unknown)}; the model has {', '.join(classes)}.")
    return [classes.index(name) for name in spec.classes] or list(range(1, len(classes)))


def _labelled(store: SlideStore, node: str, frame: _Frame) -> tuple[Any, int | None]:
    if frame.shape[0] * frame.shape[1] <= IN_MEMORY:
        return store.read_plane(node), None
    return store.open_plane(node), LABEL_BLOCK


def _arrays(found: Sequence[Object], mpp0: float) -> dict[str, npt.NDArray[Any]]:
    _, outline, offsets = shapely.to_ragged_array([thing.polygon for thing in found] or [shapely.Polygon()])
    points, rings = offsets if found else (np.zeros(1, np.int64), np.zeros(1, np.int64))
    return {
        "box_px0": np.array([thing.box_px0 for thing in found], np.int64).reshape(-1, 4),
        "centroid_px0": np.array([thing.centroid_px0 for thing in found], np.float64).reshape(-1, 2),
        "area_um2": np.array([thing.area_px0 * mpp0**2 for thing in found], np.float64),
        "class_index": np.array([thing.class_index for thing in found], np.uint8),
        "touches_edge": np.array([thing.touches_edge for thing in found], np.bool_),
        "outline_px0": np.asarray(outline, np.float64).reshape(-1, 2) if found else np.empty((0, 2)),
        "outline_points": np.asarray(points, np.int64),  # where each ring begins in outline_px0, and the end
        "outline_rings": np.asarray(rings, np.int64),  # where each object's rings begin in outline_points, and the end
    }


def read_objects(store: SlideStore, node: str) -> Objects:
    """Return committed objects. Raises StoreError, CorruptStore."""
    about = store.node_attrs(node)
    names = ("box_px0", "centroid_px0", "area_um2", "class_index", "touches_edge")
    values = {name: store.read(f"{node}/{name}") for name in names}
    offsets = tuple(store.read(f"{node}/outline_{name}") for name in ("points", "rings"))
    polygons = np.empty(0, object)
    if len(values["box_px0"]):
        outline = store.read(f"{node}/outline_px0")
        polygons = shapely.from_ragged_array(shapely.GeometryType.POLYGON, outline, offsets)
    return Objects(classes=tuple(about["classes"]), polygons=polygons, **values)

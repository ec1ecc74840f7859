"""A segmentation's rows as one plane per slide (OME-Zarr 0.5 labels), and the area of each class.

The plane has one pixel per pixel of the cores, at the bundle's um per pixel; 255 is not
scored: off the tissue, or beyond the slide's edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from slideflow_ray.geometry import scale_of
from slideflow_ray.store import SlideStore

BLOCK = 16
"""Cells of one block each way: the grid's own block order, so a block's rows lie together in the table."""
NOT_SCORED = 255

Plane = npt.NDArray[np.uint8]


def write_plane(store: SlideStore, grid: str, model: str, classes: Sequence[str]) -> None:
    """Write and commit ``planes/<grid>/<model>`` from the rows of ``masks/<grid>/<model>``; do nothing if it is there.

    Its attributes hold `area_um2` of each class. Memory is one block of 16 x 16 cores.
    Raises CorruptStore.
    """
    node = f"planes/{grid}/{model}"
    if store.committed(node):
        return
    about = store.node_attrs(f"grids/{grid}")
    tile, mpp0 = about["determines"]["tile"], about["determines"]["mpp0"]
    core = int(tile["tile_px"]) - 2 * int(tile["halo_px"])
    rows, cols = about["shape"]
    store.make_group(node, {})
    store.create_plane(f"{node}/0", (rows * core, cols * core), core, core * BLOCK, fill=NOT_SCORED)
    counts = np.zeros(256, np.int64)
    limits = [math.ceil(side / scale_of(tile["mpp"], mpp0)) for side in about["determines"]["size_px0"]]
    for (row, col), block in _blocks(store, grid, model, core, (rows, cols)):
        y, x = row * core * BLOCK, col * core * BLOCK
        block[max(0, limits[1] - y) :] = NOT_SCORED
        block[:, max(0, limits[0] - x) :] = NOT_SCORED
        counts += np.bincount(block.ravel(), minlength=256)
        store.write_block(f"{node}/0", (y, x), block)
    um2 = float(tile["mpp"]) ** 2
    area = {name: int(counts[i]) * um2 for i, name in enumerate(classes)}
    store.make_group(node, {"ome": _labels(model, float(tile["mpp"]), mpp0, classes), "area_um2": area})
    store.commit(node)


def _blocks(store: SlideStore, grid: str, model: str, core: int, shape: tuple[int, int]) -> Any:
    """Yield ((block row, block col), plane of that block), only where there are tiles; cut at the plane's edge."""
    cells = store.read(f"grids/{grid}/rowcol")
    keys = cells // BLOCK
    starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)]) if len(cells) else []
    for start, stop in zip(starts, [*starts[1:], len(cells)], strict=True):
        row, col = keys[start].tolist()
        height, width = (min(BLOCK, n - BLOCK * at) * core for n, at in zip(shape, (row, col), strict=True))
        block = np.full((height, width), NOT_SCORED, np.uint8)
        masks = store.read_rows(f"masks/{grid}/{model}", int(start), int(stop))
        for mask, (r, c) in zip(masks, (cells[start:stop] - [row * BLOCK, col * BLOCK]) * core, strict=True):
            block[r : r + core, c : c + core] = mask
        yield (row, col), block


def _labels(name: str, mpp: float, mpp0: float, classes: Sequence[str]) -> dict[str, Any]:
    """OME-Zarr 0.5 metadata of a label image; 0 is the centre of px0 (0, 0), as in heatmaps."""
    shift = (mpp - mpp0) / 2
    transform = [{"type": "scale", "scale": [mpp, mpp]}, {"type": "translation", "translation": [shift, shift]}]
    image = {
        "name": name,
        "axes": [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"],
        "datasets": [{"path": "0", "coordinateTransformations": transform}],
    }
    properties = [{"label-value": i, "class": text} for i, text in enumerate(classes)]
    return {"version": "0.5", "multiscales": [image], "image-label": {"properties": properties}}

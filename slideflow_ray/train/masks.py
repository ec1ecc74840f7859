"""What a segmentation learns from: the annotations' polygons as a class for each pixel of each stored tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from slideflow_ray.annotations import Region, class_of, even_odd, named, read_annotation
from slideflow_ray.cohort import Item
from slideflow_ray.identity import file_sha256
from slideflow_ray.models.bundle import NOT_SCORED
from slideflow_ray.remote import at_hand
from slideflow_ray.specs import LabelSpec, StoreSpec, digest
from slideflow_ray.store import SlideStore

METHOD = 1
"""Part of the digest of masks: changed when the rules below make other masks."""

Masks = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]


def mask_slide(
    store: SlideStore, grid: str, item: Item, classes: Sequence[str], spec: LabelSpec, keep: StoreSpec, tile_px: int
) -> str | None:
    """Write a slide's masks by tile, if they are not there yet; return their node, None where nothing is known.

    The node is uint8 (N, T, T), 255 unknown, in chunks as the tiles'. What no polygon covers is of the first class. A
    slide without an annotation is known where its label is the first class: then nothing else is in it.
    Raises AnnotationError for a name that means no class.
    """
    clean = class_of(item.label or "", classes, spec.names) == classes[0]
    if not item.annotation and not clean:
        return None
    xy, wh = (store.read(f"grids/{grid}/{name}") for name in ("xy_px0", "wh_px0"))
    rows = keep.rows(tile_px)
    determines = {
        "annotation": file_sha256(at_hand(item.annotation)) if item.annotation else None,
        "names": spec.names,
        "classes": list(classes),
        "rows": rows,
        "method": METHOD,
    }
    node = f"labels/{grid}/masks-{digest(determines)}"
    if store.committed(node):
        return node
    regions = named(read_annotation(item.annotation), classes, spec.names, item.annotation) if item.annotation else ()
    width, height = store.attrs["size_px0"]
    kept = store.attrs.get("micrograph", {}).get("keep_px0", (0, 0, width, height))
    store.create_rows(node, (len(xy), tile_px, tile_px), np.uint8, rows, fill=NOT_SCORED, sharded=True)
    for chunk in range(-(-len(xy) // rows)):
        here = slice(chunk * rows, (chunk + 1) * rows)
        store.write_chunk(node, chunk, draw(regions, classes, xy[here], wh[here], tile_px, (width, height), kept))
    store.commit(node)
    return node


def draw(
    regions: Sequence[Region],
    classes: Sequence[str],
    xy_px0: npt.NDArray[np.int64],
    wh_px0: npt.NDArray[np.int32],
    tile_px: int,
    size_px0: tuple[int, int],
    kept_px0: Sequence[int] | None = None,
) -> Masks:
    """Return the class of each pixel's centre, uint8 (n, T, T), 255 outside the slide.

    kept_px0 : x0, y0, x1, y1 of a micrograph's picture; 255 outside it.

    regions : under the names of `classes`; where they overlap, the class that stands later in `classes` wins.
    """
    masks = np.zeros((len(xy_px0), tile_px, tile_px), np.uint8)
    boxes: Any = shapely.box(*xy_px0.T, *(xy_px0 + wh_px0).T)
    for region in sorted(regions, key=lambda region: classes.index(region.name)):
        parts = shapely.get_parts(region.geometry)
        part, tile = shapely.STRtree(boxes).query(parts, predicate="intersects") if len(boxes) else ((), ())
        for p, i in zip(part, tile, strict=True):
            px0 = float(wh_px0[i, 0]) / tile_px
            corner = (float(xy_px0[i, 1]) / px0, float(xy_px0[i, 0]) / px0)
            masks[i][even_odd(parts[p], corner, (tile_px, tile_px), px0)] = classes.index(region.name)
    kept = kept_px0 or (0, 0, *size_px0)
    for axis in (2, 1):
        at = 2 - axis  # x stands first in xy_px0
        centre = xy_px0[:, at, None] + (np.arange(tile_px) + 0.5) * (wh_px0[:, at, None] / tile_px)
        outside = (centre < kept[at]) | (centre >= kept[at + 2])
        masks[np.broadcast_to(np.expand_dims(outside, 3 - axis), masks.shape)] = NOT_SCORED
    return masks


def areas_of(masks: Masks, n_classes: int) -> Counts:
    """Return the pixels of each class in each mask, int64 (n, K); what is unknown counts for none."""
    shifted = masks.reshape(len(masks), -1).astype(np.int64)
    known = shifted < n_classes
    row = np.broadcast_to(np.arange(len(masks))[:, None], shifted.shape)
    flat = np.bincount((row * n_classes + np.where(known, shifted, 0))[known], minlength=len(masks) * n_classes)
    return flat.reshape(len(masks), n_classes).astype(np.int64)


def shown_by(areas: Counts) -> Counts:
    """Return what a tile shows, int64 (n,): the last class that has a pixel in it, -1 where all is unknown.

    By that a tile is thinned or repeated: of the first class is what holds nothing else.
    """
    last = areas.shape[1] - 1 - np.argmax(areas[:, ::-1] > 0, axis=1)
    return np.where(areas.any(axis=1), last, -1).astype(np.int64)

"""Laying grids into stores: tissue, tiles on it, images of a pack, boxes around objects; each committed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slideflow_ray.cohort import Item
from slideflow_ray.focus import focus, sample, stain_density
from slideflow_ray.geometry import Level, achieved_mpp, best_level, size_on_level
from slideflow_ray.grid import Grid, checked_scale, make_grid
from slideflow_ray.identity import check_same
from slideflow_ray.objects import boxes_to_grid
from slideflow_ray.packs import Pack, size_px0
from slideflow_ray.slides import SlideReader
from slideflow_ray.slides.base import about_micrograph
from slideflow_ray.specs import BoxSpec, StoreSpec, TileSpec, TissueSpec, WholeSpec, digest
from slideflow_ray.store import SlideStore
from slideflow_ray.tissue import METHOD, TissueMask, find_tissue, mask_identity

PIXELS = "nearest-level, whole-pixel box, pillow bilinear, 1"
"""How a tile's pixels come about; part of every grid's digest, so a new rule makes new grids."""

GRID_ARRAYS = ("xy_px0", "wh_px0", "rowcol", "tissue", "item")

MICROGRAPH = 1
"""Part of the digest of packs of micrographs: changed when they are cropped or shown otherwise."""

SHEET_COLS = 32
"""Boxes in one row of the contact sheet of a pack, or of a slide's objects: their cells in `rowcol`."""


def pack_grid(store: SlideStore, keep: StoreSpec, whole: WholeSpec, pack: Pack, stains: str | None = None) -> str:
    """Lay one box for each image of a pack; return the grid's node.

    `stains` is the node of the images' fits where models want them: rows without a fit fail there, and there only.
    """
    rows = keep.rows(whole.tile_px)
    determines = {"identity": pack.identity, "whole": whole.model_dump(), "rows": rows, "pixels": PIXELS}
    determines |= {"stains": stains} if stains else {}
    determines |= {"micrograph": MICROGRAPH} if pack.example.modality == "tem" else {}
    node = f"{whole.tile_px}px-whole-{digest(determines)}"
    if store.committed(f"grids/{node}"):
        return node
    sizes = np.array([size_px0(row) for row in pack.rows], np.int32)
    attributes = {"determines": determines, "level": 0, "mpp_achieved": 0.0}
    _write_boxes(store, node, attributes, np.zeros((len(sizes), 2), np.int64), sizes, np.arange(len(sizes)))
    store.commit(f"grids/{node}")
    return node


def object_grid(store: SlideStore, keep: StoreSpec, spec: BoxSpec, objects: str, about: Mapping[str, Any]) -> str:
    """Lay a square around each object of the committed node `objects`, row for row; return the grid's node."""
    rows = keep.rows(spec.tile_px)
    boxes = {key: value for key, value in spec.model_dump().items() if key != "of"}
    determines = {**pixels_of(about), "objects": objects, "boxes": boxes, "rows": rows, "pixels": PIXELS}
    node = f"{spec.tile_px}px-objects-{digest(determines)}"
    if store.committed(f"grids/{node}"):
        return node
    boxes_px0, mpp0 = store.read(f"{objects}/box_px0"), float(about["mpp0"])
    xy, wh = boxes_to_grid(boxes_px0, spec.margin)
    attributes: dict[str, Any] = {"determines": determines, "level": 0, "mpp_achieved": 0.0}  # each its own
    if spec.mpp is not None:
        scale = checked_scale(spec.mpp, mpp0)
        side = max(1, round(spec.tile_px * scale))
        xy = np.rint(boxes_px0[:, :2] + boxes_px0[:, 2:] / 2 - side / 2).astype(np.int64)
        wh = np.full(xy.shape, side, np.int32)
        levels = [Level((w, h), (dx, dy)) for w, h, dx, dy in about["levels"]]
        level = best_level(levels, scale)
        size = size_on_level((spec.tile_px, spec.tile_px), scale, levels[level])
        attributes |= {"level": level, "mpp_achieved": achieved_mpp(mpp0, levels[level], size, spec.tile_px)}
    attributes["reason"] = "" if len(xy) else f"{spec.of} found no object"
    _write_boxes(store, node, attributes, xy, wh, np.zeros(len(xy)))
    store.commit(f"grids/{node}", "done" if len(xy) else "no_objects")
    return node


def _write_boxes(
    store: SlideStore,
    node: str,
    attributes: Mapping[str, Any],
    xy_px0: npt.NDArray[np.int64],
    wh_px0: npt.NDArray[np.int32],
    items: npt.NDArray[Any],
) -> None:
    """Write a grid without rows and columns of its own: its cells are those of a contact sheet."""
    n = len(xy_px0)
    cells = np.stack(np.divmod(np.arange(n), SHEET_COLS), axis=1).astype(np.int32)
    store.make_group(f"grids/{node}", {**attributes, "shape": [-(-n // SHEET_COLS), SHEET_COLS]})
    arrays: dict[str, npt.NDArray[Any]] = {
        "xy_px0": xy_px0,
        "wh_px0": wh_px0,
        "rowcol": cells,
        "tissue": np.ones(n, np.float32),
        "item": items.astype(np.int32),
    }
    for name, values in arrays.items():
        store.write_array(f"grids/{node}/{name}", values)


def about_slide(reader: SlideReader, item: Item, found: str) -> dict[str, Any]:
    """Return what a slide is: the attributes of its store."""
    return {
        "uri": item.uri,
        "identity": found,
        "size_px0": list(reader.size_px0),
        "mpp0": reader.mpp0,
        "mpp_source": reader.mpp_source,
        "levels": [[*level.size, *level.downsample] for level in reader.levels],
        "reader": reader.name,
        **about_micrograph(reader),
    }


def keep_items(store: SlideStore, rows: Sequence[dict[str, Any]]) -> str:
    """Write and commit the items of a store; return their node."""
    node = f"items/rows-{digest(rows)}"
    if not store.committed(node):
        store.make_group(node, {"rows": list(rows)})
        store.commit(node)
    return node


def tissue_mask(
    store: SlideStore, spec: TissueSpec, cache: Path, reader: SlideReader, item: Item, about: Mapping[str, Any]
) -> tuple[str, TissueMask]:
    """Find tissue, or read what was found; return its node and mask."""
    determines = {**pixels_of(about), "spec": spec.model_dump(), "modality": item.modality, "method": METHOD}
    if item.mask:
        determines["mask"] = mask_identity(item.mask, cache)
    node = f"tissue/{item.modality}-{digest(determines)}"
    if store.committed(node):
        return node, read_tissue(store, node)
    found = find_tissue(reader, spec, item.modality, item.mask)
    tiles = sample(reader, found)
    check_same(item.uri, cache)
    attributes = {
        "px0_per_px": list(found.px0_per_px),
        "rule": found.rule,
        "reason": found.reason,
        "focus": float(np.median(focus(tiles))) if len(tiles) else None,
        "stain": stain_density(tiles),
        "determines": determines,
    }
    store.write_array(f"{node}/mask", found.mask, attributes)
    store.commit(node)
    return node, found


def read_tissue(store: SlideStore, node: str) -> TissueMask:
    """Return a committed tissue mask."""
    attributes = store.node_attrs(f"{node}/mask")
    x, y = attributes["px0_per_px"]
    return TissueMask(store.read(f"{node}/mask"), (float(x), float(y)), attributes["rule"], attributes["reason"])


def pixels_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What determines a slide's pixels and scale; its path and who told the scale do not."""
    return {key: value for key, value in about.items() if key not in ("uri", "mpp_source")}


def tile_grid(
    store: SlideStore,
    keep: StoreSpec,
    tile: TileSpec,
    reader: SlideReader,
    tissue: TissueMask,
    about: Mapping[str, Any],
) -> str:
    """Lay tiles on tissue; return the grid's node. Raises BadMpp."""
    rows = keep.rows(tile.tile_px)
    determines = {**pixels_of(about), "tile": tile.model_dump(), "rows": rows, "pixels": PIXELS}
    node = f"{tile.tile_px}px-{tile.mpp:g}um-{digest(determines)}"
    if store.committed(f"grids/{node}"):
        return node
    grid = make_grid(reader.size_px0, reader.mpp0, reader.levels, tile, tissue)
    attributes = {
        "determines": determines,
        "shape": list(grid.shape),
        "level": grid.level,
        "mpp_achieved": grid.mpp_achieved,
        "reason": "" if len(grid) else tissue.reason or f"no tile of {tile.tile_px} px is {tile.min_tissue:.0%} tissue",
    }
    store.make_group(f"grids/{node}", attributes)
    for name in GRID_ARRAYS:
        store.write_array(f"grids/{node}/{name}", getattr(grid, name))
    store.commit(f"grids/{node}", "done" if len(grid.xy_px0) else "no_tissue")
    return node


def read_grid(store: SlideStore, node: str) -> Grid:
    """Return a committed grid."""
    attributes = store.node_attrs(f"grids/{node}")
    arrays = {name: store.read(f"grids/{node}/{name}") for name in GRID_ARRAYS}
    rows, cols = attributes["shape"]
    return Grid(
        **arrays,
        shape=(rows, cols),
        level=attributes["level"],
        mpp_achieved=attributes["mpp_achieved"],
    )

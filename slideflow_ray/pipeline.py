"""The path as a table of contents: plan_slide, read_chunk, score_chunk, derive.

Each stage asks the store what is there, adds what is missing and returns a small
value; each may be killed anywhere and run again. Pixels leave a slide only through
`read_chunk`, for scoring and for training alike. No Ray here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slideflow_ray.cohort import Item
from slideflow_ray.errors import DiskFull, ReadError
from slideflow_ray.focus import slide_focus
from slideflow_ray.grid import Grid, make_grid
from slideflow_ray.identity import identity
from slideflow_ray.profile import ComputeProfile
from slideflow_ray.slides import SlideReader, open_slide, read_tiles
from slideflow_ray.specs import ModelSpec, StoreSpec, TileSpec, TissueSpec, digest
from slideflow_ray.store import SlideStore
from slideflow_ray.tissue import METHOD, TissueMask, find_tissue, mask_identity

PIXELS = "nearest-level, whole-pixel box, pillow bilinear, 1"
"""How a tile's pixels come about; part of every grid's digest, so a new rule makes new grids."""

LOSSLESS_SHARE = 0.65
"""Stored bytes per raw byte of H&E tiles (zstd level 1), for the estimate of disk space."""

GRID_ARRAYS = ("xy_px0", "wh_px0", "rowcol", "tissue", "item")

Pixels = npt.NDArray[np.uint8]


class Scorer(Protocol):
    """A loaded model."""

    def margins(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return margins, float32 (n, C), of tiles, uint8 (n, T, T, 3)."""


@dataclass(frozen=True)
class RunModel:
    """A bundle as a run needs it; `node` is its name in the store, digest of weights and profile included."""

    name: str
    node: str
    spec: ModelSpec
    tile: TileSpec
    task: str
    classes: tuple[str, ...]

    def applies_to(self, item: Item) -> bool:
        """Return whether the model's `where` matches the item's columns."""
        return all(getattr(item, column) == value for column, value in self.spec.where.items())


@dataclass(frozen=True)
class Context:
    """What every stage of a run knows; small, frozen, sent to each worker once.

    `tiles` are grids to lay and store without a model. `profile` is None where nothing is scored.
    """

    out: str
    models: tuple[RunModel, ...]
    tissue: TissueSpec
    store: StoreSpec
    tiles: tuple[TileSpec, ...] = ()
    profile: ComputeProfile | None = None


@dataclass(frozen=True)
class Chunk:
    """One task: B rows of a grid, and the models whose scores are still missing there."""

    item: Item
    grid: str
    tile: TileSpec
    index: int
    tiles: int
    models: tuple[str, ...]


@dataclass(frozen=True)
class GridPlan:
    """A committed grid, and the chunks of it that are still to do."""

    grid: str
    tile: TileSpec
    tiles: int
    chunks: int
    models: tuple[str, ...]
    todo: tuple[Chunk, ...]


@dataclass(frozen=True)
class SlidePlan:
    """What a slide costs and what of it is left."""

    item: Item
    identity: str
    grids: tuple[GridPlan, ...]
    complete: bool

    @property
    def tiles(self) -> int:
        """Tiles over all grids."""
        return sum(grid.tiles for grid in self.grids)

    @property
    def todo(self) -> tuple[Chunk, ...]:
        """Chunks left, over all grids."""
        return tuple(chunk for grid in self.grids for chunk in grid.todo)


# plan


def plan_slide(context: Context, item: Item) -> SlidePlan:
    """Find tissue, lay the grids, make room for the scores; return what is left to do.

    Raises SlideError (no scale, unreadable, ...), DiskFull.
    """
    found = identity(item.uri, Path(context.out) / ".cache" / "identity")
    if item.sha256 and found != f"sha256:{item.sha256.lower()}":
        raise ReadError(f"{item.uri} has {found}, the cohort says sha256:{item.sha256.lower()}.")
    store = SlideStore(context.out, item.slide_id)
    models = [model for model in context.models if model.applies_to(item)]
    with open_slide(item.uri, mpp=item.mpp, modality=item.modality) as reader:
        about = _about(reader, item, found)
        store.describe(about)
        _keep_item(store, item)
        tissue_node, tissue = _tissue(store, context, reader, item, about)
        grids = []
        for tile in dict.fromkeys([*(model.tile for model in models), *context.tiles]):
            users = tuple(model for model in models if model.tile == tile)
            node = _grid(store, context.store, tile, reader, tissue, {**about, "tissue": tissue_node})
            grids.append(_plan_grid(context, store, item, node, tile, users))
    complete = all(store.committed(node) for grid in grids for node in _results(context, grid))
    return SlidePlan(item, found, tuple(grids), complete)


def _results(context: Context, grid: GridPlan) -> list[str]:
    """The nodes of a grid that are committed once all its chunks are done."""
    if grid.tiles == 0:
        return []
    kept = [f"grids/{grid.grid}/tiles"] if context.store.tiles == "lossless" else []
    return [*kept, *(f"scores/{grid.grid}/{model}" for model in grid.models)]


def _about(reader: SlideReader, item: Item, found: str) -> dict[str, Any]:
    return {
        "uri": item.uri,
        "identity": found,
        "size_px0": list(reader.size_px0),
        "mpp0": reader.mpp0,
        "mpp_source": reader.mpp_source,
        "levels": [[*level.size, *level.downsample] for level in reader.levels],
        "reader": reader.name,
    }


def _keep_item(store: SlideStore, item: Item) -> None:
    row = item.model_dump(mode="json", exclude_none=True)
    node = f"items/row-{digest(row)}"
    if not store.committed(node):
        store.make_group(node, {"rows": [row]})
        store.commit(node)


def _tissue(
    store: SlideStore, context: Context, reader: SlideReader, item: Item, about: Mapping[str, Any]
) -> tuple[str, TissueMask]:
    determines = {**_pixels_of(about), "spec": context.tissue.model_dump(), "modality": item.modality, "method": METHOD}
    if item.mask:
        determines["mask"] = mask_identity(item.mask, Path(context.out) / ".cache" / "identity")
    node = f"tissue/{item.modality}-{digest(determines)}"
    if store.committed(node):
        return node, read_tissue(store, node)
    found = find_tissue(reader, context.tissue, item.modality, item.mask)
    attributes = {
        "px0_per_px": list(found.px0_per_px),
        "rule": found.rule,
        "reason": found.reason,
        "focus": slide_focus(reader, found),
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


def _pixels_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What determines a slide's pixels and scale; its path and who told the scale do not."""
    return {key: value for key, value in about.items() if key not in ("uri", "mpp_source")}


def _grid(
    store: SlideStore,
    keep: StoreSpec,
    tile: TileSpec,
    reader: SlideReader,
    tissue: TissueMask,
    about: Mapping[str, Any],
) -> str:
    rows = keep.rows(tile.tile_px)
    determines = {**_pixels_of(about), "tile": tile.model_dump(), "rows": rows, "pixels": PIXELS}
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


def _plan_grid(
    context: Context, store: SlideStore, item: Item, node: str, tile: TileSpec, models: tuple[RunModel, ...]
) -> GridPlan:
    n = len(store.read(f"grids/{node}/item"))
    rows = context.store.rows(tile.tile_px)
    names = tuple(model.node for model in models)
    if n == 0:
        return GridPlan(node, tile, 0, 0, names, ())
    missing: dict[int, list[str]] = {}
    for model in models:
        scores = f"scores/{node}/{model.node}"
        if not store.committed(scores):
            store.create_rows(scores, (n, len(model.classes)), np.float32, rows, fill=float("nan"))
            for i in store.chunks_todo(scores):
                missing.setdefault(i, []).append(model.node)
    for i in _tiles_todo(context, store, node, tile, n, rows):
        missing.setdefault(i, [])
    todo = tuple(
        Chunk(item, node, tile, i, min(rows, n - i * rows), tuple(users)) for i, users in sorted(missing.items())
    )
    return GridPlan(node, tile, n, -(-n // rows), names, todo)


def _tiles_todo(context: Context, store: SlideStore, node: str, tile: TileSpec, n: int, rows: int) -> list[int]:
    tiles = f"grids/{node}/tiles"
    if context.store.tiles == "none" or store.committed(tiles):
        return []
    store.create_rows(tiles, (n, tile.tile_px, tile.tile_px, 3), np.uint8, rows, fill=0, sharded=True)
    todo = store.chunks_todo(tiles)
    need = len(todo) * rows * tile.tile_px**2 * 3 * LOSSLESS_SHARE
    free = shutil.disk_usage(context.out).free
    if need > free:
        raise DiskFull(f"{store.slide_id}: the tiles need about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free.")
    return todo


# chunk


class OpenSlides:
    """The slides that one thread of a worker has open, the latest few; readers are never shared."""

    def __init__(self, limit: int = 2) -> None:
        self._limit = limit
        self._open: dict[tuple[str, float | None, str], SlideReader] = {}

    def get(self, item: Item) -> SlideReader:
        """Return the item's reader, opening it if need be."""
        key = (item.uri, item.mpp, item.modality)
        reader = self._open.pop(key, None) or open_slide(item.uri, mpp=item.mpp, modality=item.modality)
        self._open[key] = reader  # the latest used stands last
        while len(self._open) > self._limit:
            self._open.pop(next(iter(self._open))).close()
        return reader

    def forget(self) -> None:
        """Close what is open: a handle that met one bad tile may fail on good ones."""
        while self._open:
            self._open.popitem()[1].close()


def read_chunk(context: Context, chunk: Chunk, slides: OpenSlides) -> Pixels:
    """Return the chunk's tiles, uint8 (n, T, T, 3): from the store where they are kept, else from the slide.

    Tiles read from the slide are written to the store as one whole shard when they are kept.
    Raises ReadError, CorruptStore.
    """
    store = SlideStore(context.out, chunk.item.slide_id)
    node = f"grids/{chunk.grid}/tiles"
    if store.has_chunk(node, chunk.index, ndim=4):
        return store.read(node, chunk.index)
    boxes = _boxes(context.out, chunk.item.slide_id, chunk.grid)
    rows = context.store.rows(chunk.tile.tile_px)
    xy_px0 = boxes[chunk.index * rows : chunk.index * rows + chunk.tiles]
    try:
        pixels = read_tiles(slides.get(chunk.item), xy_px0, tile_px=chunk.tile.tile_px, mpp=chunk.tile.mpp)
    except Exception:
        slides.forget()
        raise
    if context.store.tiles == "lossless":
        store.write_chunk(node, chunk.index, pixels)
    return pixels


@lru_cache(maxsize=8)
def _boxes(out: str, slide_id: str, grid: str) -> npt.NDArray[np.int64]:
    return SlideStore(out, slide_id).read(f"grids/{grid}/xy_px0")


def score_chunk(context: Context, chunk: Chunk, pixels: Pixels, scorer: Callable[[str], Scorer]) -> int:
    """Give the chunk's tiles to every model that lacks them and write whole chunks of margins; return n.

    Raises NanScore.
    """
    store = SlideStore(context.out, chunk.item.slide_id)
    for model in chunk.models:
        store.write_chunk(f"scores/{chunk.grid}/{model}", chunk.index, scorer(model).margins(pixels))
    return len(pixels)


# derive


def derive(context: Context, plan: SlidePlan) -> str:
    """Commit what the chunks have written; return 'scored', 'no_tissue' or 'no_model' (no model applies)."""
    store = SlideStore(context.out, plan.item.slide_id)
    for grid in plan.grids:
        for node in _results(context, grid):
            store.commit(node)
    if not plan.grids:
        return "no_model"
    return "scored" if plan.tiles else "no_tissue"

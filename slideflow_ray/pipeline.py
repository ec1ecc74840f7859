"""The path as a table of contents: plan_slide, read_chunk, score_chunk, derive.

Each stage asks the store what is there, adds what is missing and returns a small
value; each may be killed anywhere and run again. Pixels leave a slide only through
`read_chunk`, for scoring and for training alike. No Ray here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slideflow_ray import storage
from slideflow_ray.cohort import Item
from slideflow_ray.errors import DiskFull, SlideflowError
from slideflow_ray.focus import slide_focus
from slideflow_ray.grid import Grid, make_grid
from slideflow_ray.identity import identity
from slideflow_ray.packs import Pack, read_image, size_px0
from slideflow_ray.planes import NOT_SCORED, write_plane
from slideflow_ray.profile import ComputeProfile
from slideflow_ray.slides import SlideReader, open_slide, read_tiles
from slideflow_ray.specs import ModelSpec, StoreSpec, TileSpec, TissueSpec, WholeSpec, digest
from slideflow_ray.store import SlideStore
from slideflow_ray.tissue import METHOD, TissueMask, find_tissue, mask_identity

PIXELS = "nearest-level, whole-pixel box, pillow bilinear, 1"
"""How a tile's pixels come about; part of every grid's digest, so a new rule makes new grids."""

LOSSLESS_SHARE = 0.65
"""Stored bytes per raw byte of H&E tiles (zstd level 1), for the estimate of disk space."""

GRID_ARRAYS = ("xy_px0", "wh_px0", "rowcol", "tissue", "item")

Pixels = npt.NDArray[np.uint8]
AnyTile = TileSpec | WholeSpec


class Scorer(Protocol):
    """A loaded model."""

    def margins(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return margins, float32 (n, C), of tiles, uint8 (n, T, T, 3)."""

    def masks(self, pixels: Pixels) -> Pixels:
        """Return classes of the tiles' cores, uint8 (n, core, core), of tiles, uint8 (n, T, T, 3)."""


@dataclass(frozen=True)
class RunModel:
    """A bundle as a run needs it; `node` is its name in the store, digest of weights and profile included."""

    name: str
    node: str
    spec: ModelSpec
    tile: AnyTile
    task: str
    classes: tuple[str, ...]

    def applies_to(self, item: Item) -> bool:
        """Return whether the model's `where` matches the item's columns."""
        return all(getattr(item, column) == value for column, value in self.spec.where.items())

    @property
    def whole(self) -> bool:
        """Whether the model takes images in one piece."""
        return isinstance(self.tile, WholeSpec)

    def result(self, grid: str) -> str:
        """The node of what the model gives on a grid."""
        return f"{'masks' if self.task == 'segment' else 'scores'}/{grid}/{self.node}"

    def make_room(self, store: SlideStore, grid: str, n: int, rows: int) -> None:
        """Create the node of `result`, all of it not scored."""
        if self.task == "segment" and isinstance(self.tile, TileSpec):
            core = self.tile.core_px
            store.create_rows(self.result(grid), (n, core, core), np.uint8, rows, fill=NOT_SCORED, sharded=True)
        else:
            store.create_rows(self.result(grid), (n, len(self.classes)), np.float32, rows, fill=float("nan"))


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

    def model(self, node: str) -> RunModel:
        """Return the model of that node."""
        return next(model for model in self.models if model.node == node)


@dataclass(frozen=True)
class Chunk:
    """One task: B rows of a grid, and the models whose scores are still missing there."""

    item: Item | Pack
    grid: str
    tile: AnyTile
    index: int
    tiles: int
    models: tuple[str, ...]


@dataclass(frozen=True)
class GridPlan:
    """A committed grid, and the chunks of it that are still to do."""

    grid: str
    tile: AnyTile
    tiles: int
    chunks: int
    models: tuple[str, ...]
    todo: tuple[Chunk, ...]


@dataclass(frozen=True)
class SlidePlan:
    """What a slide costs and what of it is left."""

    item: Item | Pack
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
    found = identity(item.uri, Path(context.out) / ".cache" / "identity", item.sha256)
    store = SlideStore(context.out, item.slide_id)
    models = [model for model in context.models if model.applies_to(item) and not model.whole]
    with open_slide(item.uri, mpp=item.mpp, modality=item.modality) as reader:
        about = _about(reader, item, found)
        store.describe(about)
        _keep_items(store, [item.model_dump(mode="json", exclude_none=True)])
        tissue_node, tissue = _tissue(store, context, reader, item, about)
        grids = []
        wanted = [model.tile for model in models if isinstance(model.tile, TileSpec)]
        for tile in dict.fromkeys([*wanted, *context.tiles]):
            users = tuple(model for model in models if model.tile == tile)
            node = _grid(store, context.store, tile, reader, tissue, {**about, "tissue": tissue_node})
            grids.append(_plan_grid(context, store, item, node, tile, users))
    return _planned(context, store, item, found, grids)


def plan_pack(context: Context, pack: Pack) -> SlidePlan:
    """Lay the grids of a pack, one row an image, and make room for the scores; return what is left to do.

    An image whose header cannot be read has size (0, 0); why comes out when it is read.
    """
    store = SlideStore(context.out, pack.slide_id)
    store.describe({"kind": "pack", "identity": pack.identity})
    _keep_items(store, [{"slide_id": r.item.slide_id, "identity": r.identity, "mpp": r.item.mpp} for r in pack.rows])
    models = [model for model in context.models if model.whole and model.applies_to(pack.example)]
    grids = []
    for whole in dict.fromkeys(model.tile for model in models):
        users = tuple(model for model in models if model.tile == whole)
        node = _pack_grid(store, context.store, whole, pack)
        grids.append(_plan_grid(context, store, pack, node, whole, users))
    return _planned(context, store, pack, pack.identity, grids)


def _planned(
    context: Context, store: SlideStore, item: Item | Pack, found: str, grids: Sequence[GridPlan]
) -> SlidePlan:
    complete = all(store.committed(node) for grid in grids for node in _results(context, grid))
    return SlidePlan(item, found, tuple(grids), complete)


def _results(context: Context, grid: GridPlan) -> list[str]:
    """The nodes of a grid that are committed once all its chunks are done."""
    if grid.tiles == 0:
        return []
    kept = [f"grids/{grid.grid}/tiles"] if context.store.tiles == "lossless" else []
    ends = [f"outcomes/{grid.grid}"] if isinstance(grid.tile, WholeSpec) else []
    return [*kept, *ends, *(context.model(name).result(grid.grid) for name in grid.models)]


PACK_COLS = 32
"""Images of a pack in one row of its contact sheet: their cells in `rowcol`."""


def _pack_grid(store: SlideStore, keep: StoreSpec, whole: AnyTile, pack: Pack) -> str:
    rows = keep.rows(whole.tile_px)
    determines = {"identity": pack.identity, "whole": whole.model_dump(), "rows": rows, "pixels": PIXELS}
    node = f"{whole.tile_px}px-whole-{digest(determines)}"
    if store.committed(f"grids/{node}"):
        return node
    n = len(pack.rows)
    cells = np.stack(np.divmod(np.arange(n), PACK_COLS), axis=1).astype(np.int32)
    shape = [-(-n // PACK_COLS), PACK_COLS]
    store.make_group(f"grids/{node}", {"determines": determines, "shape": shape, "level": 0, "mpp_achieved": 0.0})
    arrays: dict[str, npt.NDArray[Any]] = {
        "xy_px0": np.zeros((n, 2), np.int64),
        "wh_px0": np.array([size_px0(row) for row in pack.rows], np.int32),
        "rowcol": cells,
        "tissue": np.ones(n, np.float32),
        "item": np.arange(n, dtype=np.int32),
    }
    for name, values in arrays.items():
        store.write_array(f"grids/{node}/{name}", values)
    store.commit(f"grids/{node}")
    return node


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


def _keep_items(store: SlideStore, rows: Sequence[dict[str, Any]]) -> None:
    node = f"items/rows-{digest(rows)}"
    if not store.committed(node):
        store.make_group(node, {"rows": list(rows)})
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
    context: Context, store: SlideStore, item: Item | Pack, node: str, tile: AnyTile, models: tuple[RunModel, ...]
) -> GridPlan:
    n = len(store.read(f"grids/{node}/item"))
    rows = context.store.rows(tile.tile_px)
    names = tuple(model.node for model in models)
    if n == 0:
        return GridPlan(node, tile, 0, 0, names, ())
    missing: dict[int, list[str]] = {}
    for model in models:
        if not store.committed(model.result(node)):
            model.make_room(store, node, n, rows)
            for i in store.chunks_todo(model.result(node)):
                missing.setdefault(i, []).append(model.node)
    for i in _tiles_todo(context, store, node, tile, n, rows):
        missing.setdefault(i, [])
    todo = tuple(
        Chunk(item, node, tile, i, min(rows, n - i * rows), tuple(users)) for i, users in sorted(missing.items())
    )
    return GridPlan(node, tile, n, -(-n // rows), names, todo)


def _tiles_todo(context: Context, store: SlideStore, node: str, tile: AnyTile, n: int, rows: int) -> list[int]:
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
    read = _read_images if isinstance(chunk.item, Pack) else _read_boxes
    pixels = read(context, chunk, slides)
    if context.store.tiles == "lossless":
        store.write_chunk(node, chunk.index, pixels)
    return pixels


def _read_boxes(context: Context, chunk: Chunk, slides: OpenSlides) -> Pixels:
    boxes = _boxes(context.out, chunk.item.slide_id, chunk.grid)
    rows = context.store.rows(chunk.tile.tile_px)
    xy_px0 = boxes[chunk.index * rows : chunk.index * rows + chunk.tiles]
    if not isinstance(chunk.item, Item) or not isinstance(chunk.tile, TileSpec):
        raise TypeError("Boxes are read from a slide.")
    try:
        return read_tiles(slides.get(chunk.item), xy_px0, tile_px=chunk.tile.tile_px, mpp=chunk.tile.mpp)
    except Exception:
        slides.forget()
        raise


def _read_images(context: Context, chunk: Chunk, slides: OpenSlides) -> Pixels:
    """Read a pack's rows, each by itself: one that cannot be read is black and stands in `outcomes`."""
    if not isinstance(chunk.item, Pack) or not isinstance(chunk.tile, WholeSpec):
        raise TypeError("Whole images are read from a pack.")
    rows = context.store.rows(chunk.tile.tile_px)
    start = chunk.index * rows
    pixels = np.zeros((chunk.tiles, chunk.tile.tile_px, chunk.tile.tile_px, 3), np.uint8)
    broken: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(chunk.item.rows[start : start + chunk.tiles]):
        try:
            pixels[i] = read_image(row, chunk.tile)
        except SlideflowError as error:
            status = "refused" if error.refused else "failed"
            why = {"status": status, "code": error.code, "message": error.message, "next_step": error.step}
            broken[str(start + i)] = why
    path = SlideStore(context.out, chunk.item.slide_id).root / f"outcomes/{chunk.grid}/{chunk.index}.json"
    storage.write_atomic(path, storage.to_json(broken))
    return pixels


def broken_rows(store: SlideStore, grid: str, chunk: int | None = None) -> dict[int, dict[str, Any]]:
    """Return the rows of a pack that could not be read, in one chunk or in all: status, code, message, next_step."""
    folder = store.root / "outcomes" / grid
    paths = [folder / f"{chunk}.json"] if chunk is not None else sorted(folder.glob("*.json"))
    found = [storage.read_json(path) or {} for path in paths]
    return {int(row): why for record in found for row, why in record.items()}


@lru_cache(maxsize=8)
def _boxes(out: str, slide_id: str, grid: str) -> npt.NDArray[np.int64]:
    return SlideStore(out, slide_id).read(f"grids/{grid}/xy_px0")


def score_chunk(context: Context, chunk: Chunk, pixels: Pixels, scorer: Callable[[str], Scorer]) -> int:
    """Give the chunk's tiles to every model that lacks them and write whole chunks of margins; return n.

    Raises NanScore.
    """
    store = SlideStore(context.out, chunk.item.slide_id)
    good = np.ones(len(pixels), bool)
    if isinstance(chunk.item, Pack):
        start = chunk.index * context.store.rows(chunk.tile.tile_px)
        good[[row - start for row in broken_rows(store, chunk.grid, chunk.index)]] = False
    for name in chunk.models:
        model = context.model(name)
        result = _apply(model, scorer(name), pixels, good)
        store.write_chunk(model.result(chunk.grid), chunk.index, result)
    return len(pixels)


def _apply(model: RunModel, scorer: Scorer, pixels: Pixels, good: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Give a model the rows that could be read; the others are NaN."""
    if model.task == "segment":
        return scorer.masks(pixels)
    margins = np.full((len(pixels), len(model.classes)), np.nan, np.float32)
    if good.any():
        margins[good] = scorer.margins(pixels if good.all() else pixels[good])
    return margins


# derive


def derive(context: Context, plan: SlidePlan) -> str:
    """Commit what the chunks have written; return 'scored', 'no_tissue' or 'no_model' (no model applies)."""
    store = SlideStore(context.out, plan.item.slide_id)
    for grid in plan.grids:
        for node in _results(context, grid):
            store.commit(node)
        for model in (context.model(name) for name in grid.models):
            if model.task == "segment" and grid.tiles:
                write_plane(store, grid.grid, model.node, model.classes)
    if not plan.grids:
        return "no_model"
    return "scored" if plan.tiles else "no_tissue"

"""The path as a table of contents: plan_slide, read_chunk, score_chunk, derive.

Each stage asks the store what is there, adds what is missing and returns a small
value; each may be killed anywhere and run again. Pixels leave a slide only through
`read_chunk`, for scoring and for training alike. No Ray here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slideflow_ray import storage
from slideflow_ray.changes import why_anew
from slideflow_ray.cohort import Item
from slideflow_ray.errors import DiskFull, SourceChanged, StainError, as_slideflow_error
from slideflow_ray.focus import focus
from slideflow_ray.identity import AGAIN, check_same, identity, source
from slideflow_ray.layout import about_slide, keep_items, object_grid, pack_grid, tile_grid, tissue_mask
from slideflow_ray.packs import GONE, Pack, broken_rows, read_image
from slideflow_ray.planes import NOT_SCORED, objects_node, write_objects, write_plane
from slideflow_ray.profile import ComputeProfile
from slideflow_ray.slides import SlideReader, open_slide, read_tiles
from slideflow_ray.sparse import is_sparse
from slideflow_ray.specs import BoxSpec, ModelSpec, StoreSpec, TileSpec, TissueSpec, WholeSpec
from slideflow_ray.stain import Stained, StainFit, StainTarget, stain_name, target_of
from slideflow_ray.staining import FitError, Fits, Want, pack_fits, read_fits, slide_fits
from slideflow_ray.store import SlideStore
from slideflow_ray.thickness import thickness_node, write_thickness
from slideflow_ray.tissue import TissueMask

LOSSLESS_SHARE = 0.65
"""Stored bytes per raw byte of H&E tiles (zstd level 1), for the estimate of disk space."""

Pixels = npt.NDArray[np.uint8]
AnyTile = TileSpec | WholeSpec | BoxSpec


class Scorer(Protocol):
    """A loaded model; `stained` is how the tiles are stained, for one that has stain targets."""

    def margins(self, pixels: Pixels, stained: Stained | None = None) -> npt.NDArray[np.float32]:
        """Return margins, float32 (n, C), of tiles, uint8 (n, T, T, 3)."""

    def masks(self, pixels: Pixels, stained: Stained | None = None) -> Pixels:
        """Return classes of the tiles' cores, uint8 (n, core, core), of tiles, uint8 (n, T, T, 3)."""

    def features(self, pixels: Pixels, stained: Stained | None = None) -> npt.NDArray[np.float16]:
        """Return features, float16 (n, D), of tiles, uint8 (n, T, T, 3)."""


@dataclass(frozen=True)
class Result:
    """What a model gives for each row: `kind` is scores, masks or features; `shape` and `dtype` are a row's."""

    kind: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nothing(self) -> float:
        """What stands where nothing was scored."""
        return NOT_SCORED if self.kind == "masks" else float("nan")

    def of(self, scorer: Scorer, pixels: Pixels, stained: Stained | None = None) -> npt.NDArray[Any]:
        """Ask a model for it."""
        if self.kind == "masks":
            return scorer.masks(pixels, stained)
        return scorer.features(pixels, stained) if self.kind == "features" else scorer.margins(pixels, stained)


@dataclass(frozen=True)
class RunModel:
    """A bundle as a run needs it; `node` is its name in the store, digest of weights and profile included.

    `results` are what it gives: margins of a classifier, masks of a segmentation, features where they are wanted.
    `digest` is the bundle's forward digest, for the record. `stain` are its targets, where it has some.
    """

    name: str
    node: str
    spec: ModelSpec
    tile: AnyTile
    task: str
    classes: tuple[str, ...]
    results: tuple[Result, ...]
    digest: str = ""
    stain: Mapping[str, StainTarget] | None = None

    def applies_to(self, item: Item) -> bool:
        """Return whether the model's `where` matches the item's columns."""
        return all(getattr(item, column) == value for column, value in self.spec.where.items())

    @property
    def whole(self) -> bool:
        """Whether the model takes images in one piece."""
        return isinstance(self.tile, WholeSpec)

    def target(self, item: Item) -> StainTarget | None:
        """Return what the item is to look like, None where its colours stay. Raises StainError without a target."""
        return target_of(self.stain, stain_name(item.stain, item.modality), self.name) if self.stain else None

    def nodes(self, grid: str) -> tuple[str, ...]:
        """Return the nodes of what the model gives on a grid."""
        return tuple(f"{result.kind}/{grid}/{self.node}" for result in self.results)


@dataclass(frozen=True)
class Context:
    """What every stage of a run knows; small, frozen, sent to each worker once.

    `tiles` are grids to lay and store without a model, `wholes` images in one piece. `profile` is None where nothing is
    scored.
    """

    out: str
    models: tuple[RunModel, ...]
    tissue: TissueSpec
    store: StoreSpec
    tiles: tuple[TileSpec, ...] = ()
    profile: ComputeProfile | None = None
    wholes: tuple[WholeSpec, ...] = ()

    @property
    def cache(self) -> Path:
        """Where identities are remembered."""
        return storage.place(self.out) / ".cache" / "identity"

    def model(self, node: str) -> RunModel:
        """Return the model of that node."""
        return next(model for model in self.models if model.node == node)

    def segmentation(self, model: RunModel) -> RunModel | None:
        """Return the segmentation on whose objects `model` runs, if it runs on objects."""
        of = model.tile.of if isinstance(model.tile, BoxSpec) else None
        return next((m for m in self.models if m.name == of and m.task == "segment"), None)


@dataclass(frozen=True)
class Chunk:
    """One task: B rows of a grid, and the models whose results are still missing there.

    `stains` has the node of the fits for each model that normalises.
    """

    item: Item | Pack
    grid: str
    tile: AnyTile
    index: int
    tiles: int
    models: tuple[str, ...]
    stains: tuple[tuple[str, str], ...] = ()


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
    """What a slide costs and what of it is left.

    `again`: objects have yet to be found, so once what is left is derived the slide is planned again.
    `nodes`: what is committed once the slide is done. `why`: what changed since its models gave results on it before,
    one sentence each.
    """

    item: Item | Pack
    identity: str
    grids: tuple[GridPlan, ...]
    complete: bool
    again: bool = False
    nodes: tuple[str, ...] = ()
    why: tuple[str, ...] = ()

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
    """Find tissue, lay the grids, make room for the results; return what is left to do.

    Raises SlideError (no scale, unreadable, ...), DiskFull.
    """
    store = SlideStore(context.out, item.slide_id)
    models = [model for model in context.models if model.applies_to(item)]
    wanted = dict.fromkeys([*(model.tile for model in models if isinstance(model.tile, TileSpec)), *context.tiles])
    sparse = partial(is_sparse, item=item, tissue=context.tissue, tiles=wanted)
    found = identity(item.uri, context.cache, item.sha256, sparse)
    with open_item(context, item) as reader:
        about = about_slide(reader, item, found)
        store.describe(about)
        items = keep_items(store, [item.model_dump(mode="json", exclude_none=True)])
        tissue_node, tissue = tissue_mask(store, context.tissue, context.cache, reader, item, about)
        laid = {
            tile: tile_grid(store, context.store, tile, reader, tissue, {**about, "tissue": tissue_node})
            for tile in wanted
        }
        stains = {}
        if any(len(store.read(f"grids/{node}/item")) for node in laid.values()):
            stains = _fit_slide(store, item, models, about, (tissue_node, tissue), reader)
    users = {tile: tuple(model for model in models if model.tile == tile) for tile in wanted}
    grids = [_plan_grid(context, store, item, node, tile, users[tile], stains) for tile, node in laid.items()]
    boxed, again = _plan_objects(context, store, item, models, grids, about, stains)
    nodes = (items, tissue_node, *dict.fromkeys(stains.values()))
    return _planned(context, store, item, found, [*grids, *boxed], nodes, again)


def _fit_slide(
    store: SlideStore,
    item: Item,
    models: Sequence[RunModel],
    about: Mapping[str, Any],
    tissue: tuple[str, TissueMask],
    reader: SlideReader,
) -> dict[str, str]:
    """Fit the slide's stains as its models want them; return the node of the fit by that of the model."""
    targets = {model.node: target for model in models if (target := model.target(item))}
    return {name: slide_fits(store, item, (t.method, t.lam), about, tissue, reader) for name, t in targets.items()}


def open_item(context: Context, item: Item) -> SlideReader:
    """Open a slide that has its identity: a remote one from the copy or by blocks, as was decided then."""
    at_hand = source(item.uri, context.cache)
    return open_slide(item.uri, mpp=item.mpp, modality=item.modality, source=at_hand)


def _plan_objects(
    context: Context,
    store: SlideStore,
    item: Item,
    models: Sequence[RunModel],
    grids: Sequence[GridPlan],
    about: Mapping[str, Any],
    stains: Mapping[str, str],
) -> tuple[list[GridPlan], bool]:
    """Lay the grids of the objects that are known; return them, and whether others have yet to be found."""
    users: dict[tuple[BoxSpec, str], list[RunModel]] = {}
    again = False
    for model in models:
        source = context.segmentation(model)
        if source is None or not isinstance(model.tile, BoxSpec):
            continue
        for grid in (grid for grid in grids if source.node in grid.models and grid.tiles):
            node = objects_node(grid.grid, source.node, source.spec.objects)
            if store.committed(node):
                users.setdefault((model.tile, node), []).append(model)
            else:
                again = True
    found = []
    for (boxes, node), several in users.items():
        grid_node = object_grid(store, context.store, boxes, node, about)
        found.append(_plan_grid(context, store, item, grid_node, boxes, tuple(several), stains))
    return found, again


def fit_stains(context: Context, item: Item | Pack, want: Want) -> Fits:
    """Fit the stains of a slide or a pack that is planned, without a model, as training does; return the fits.

    Raises StainError, ReadError.
    """
    store = SlideStore(context.out, item.slide_id)
    if isinstance(item, Pack):
        return read_fits(context.out, item.slide_id, pack_fits(store, item, want))
    found = identity(item.uri, context.cache, item.sha256)
    with open_item(context, item) as reader:
        about = about_slide(reader, item, found)
        tissue = tissue_mask(store, context.tissue, context.cache, reader, item, about)
        node = slide_fits(store, item, want, about, tissue, reader)
    return read_fits(context.out, item.slide_id, node)


def plan_pack(context: Context, pack: Pack) -> SlidePlan:
    """Lay the grids of a pack, one row an image, and make room for the results; return what is left to do.

    An image whose header cannot be read has size (0, 0); why comes out when it is read.
    """
    store = SlideStore(context.out, pack.slide_id)
    store.describe({"kind": "pack", "identity": pack.identity})
    items = keep_items(
        store, [{"slide_id": r.item.slide_id, "identity": r.identity, "mpp": r.item.mpp} for r in pack.rows]
    )
    models = [model for model in context.models if model.whole and model.applies_to(pack.example)]
    stains = {m.node: pack_fits(store, pack, (t.method, t.lam)) for m in models if (t := m.target(pack.example))}
    users: dict[tuple[WholeSpec, str | None], list[RunModel]] = {(whole, None): [] for whole in context.wholes}
    for model in models:
        if isinstance(model.tile, WholeSpec):
            users.setdefault((model.tile, stains.get(model.node)), []).append(model)
    grids = []
    for (whole, fits), several in users.items():
        node = pack_grid(store, context.store, whole, pack, fits)
        grids.append(_plan_grid(context, store, pack, node, whole, tuple(several), stains))
    return _planned(context, store, pack, pack.identity, grids, (items, *dict.fromkeys(stains.values())))


def _planned(
    context: Context,
    store: SlideStore,
    item: Item | Pack,
    found: str,
    grids: Sequence[GridPlan],
    laid: Sequence[str],
    again: bool = False,
) -> SlidePlan:
    """`laid` are nodes that the plan has committed besides the grids."""
    nodes = [node for grid in grids for node in [*_results(context, grid), *_derived(context, grid)]]
    complete = not again and all(store.committed(node) for node in nodes)
    said = [item.why] if isinstance(item, Pack) and item.why else []
    if not complete:
        said += [why for grid in grids for name in grid.models for why in _why(context, store, name, grid)]
    every = (*laid, *(f"grids/{grid.grid}" for grid in grids), *nodes)
    return SlidePlan(item, found, tuple(grids), complete, again, every, tuple(dict.fromkeys(said)))


def _why(context: Context, store: SlideStore, name: str, grid: GridPlan) -> tuple[str, ...]:
    return why_anew(store, context.model(name), grid.grid) if grid.tiles else ()


def _results(context: Context, grid: GridPlan) -> list[str]:
    """The nodes of a grid that are committed once all its chunks are done."""
    if grid.tiles == 0:
        return []
    kept = [f"grids/{grid.grid}/tiles"] if context.store.tiles == "lossless" else []
    ends = [f"outcomes/{grid.grid}"] if isinstance(grid.tile, WholeSpec) else []
    sharp = [f"focus/{grid.grid}"] if isinstance(grid.tile, TileSpec) else []
    return [*kept, *ends, *sharp, *(node for name in grid.models for node in context.model(name).nodes(grid.grid))]


def _derived(context: Context, grid: GridPlan) -> list[str]:
    """The nodes that are made from a grid's rows, and committed by themselves."""
    found = []
    for model in (context.model(name) for name in grid.models if grid.tiles):
        if model.task == "segment":
            found += [f"planes/{grid.grid}/{model.node}", objects_node(grid.grid, model.node, model.spec.objects)]
            if model.spec.thickness is not None:
                found.append(thickness_node(grid.grid, model.node, model.spec.thickness))
    return found


def _plan_grid(
    context: Context,
    store: SlideStore,
    item: Item | Pack,
    node: str,
    tile: AnyTile,
    models: tuple[RunModel, ...],
    stains: Mapping[str, str],
) -> GridPlan:
    n = len(store.read(f"grids/{node}/item"))
    rows = context.store.rows(tile.tile_px)
    names = tuple(model.node for model in models)
    if n == 0:
        return GridPlan(node, tile, 0, 0, names, ())
    missing: dict[int, list[str]] = {}
    for model in models:
        for i in _model_todo(store, node, model, n, rows):
            missing.setdefault(i, []).append(model.node)
    kept = _tiles_todo(context, store, node, tile, n, rows)
    for i in [*kept, *_focus_todo(store, node, tile, n, rows), *_outcomes_todo(store, node, tile, n, rows)]:
        missing.setdefault(i, [])
    fits = tuple((name, stains[name]) for name in names if name in stains)
    todo = tuple(
        Chunk(item, node, tile, i, min(rows, n - i * rows), tuple(users), fits) for i, users in sorted(missing.items())
    )
    return GridPlan(node, tile, n, -(-n // rows), names, todo)


def _model_todo(store: SlideStore, grid: str, model: RunModel, n: int, rows: int) -> list[int]:
    """Make room for what a model gives; return the chunks in which some of it is missing."""
    todo: set[int] = set()
    for result, node in zip(model.results, model.nodes(grid), strict=True):
        if not store.committed(node):
            options: dict[str, Any] = {"fill": result.nothing, "sharded": result.kind == "masks"}
            options["attributes"] = {"model": model.name, "digest": model.digest}
            store.create_rows(node, (n, *result.shape), np.dtype(result.dtype), rows, **options)
            todo.update(store.chunks_todo(node))
    return sorted(todo)


def _focus_todo(store: SlideStore, grid: str, tile: AnyTile, n: int, rows: int) -> list[int]:
    if not isinstance(tile, TileSpec) or store.committed(f"focus/{grid}"):
        return []
    store.create_rows(f"focus/{grid}", (n,), np.float32, rows, fill=float("nan"))
    return store.chunks_todo(f"focus/{grid}")


def _outcomes_todo(store: SlideStore, grid: str, tile: AnyTile, n: int, rows: int) -> list[int]:
    if not isinstance(tile, WholeSpec) or store.committed(f"outcomes/{grid}"):
        return []
    return [i for i in range(-(-n // rows)) if not store.has(f"outcomes/{grid}/{i}.json")]


def _tiles_todo(context: Context, store: SlideStore, node: str, tile: AnyTile, n: int, rows: int) -> list[int]:
    tiles = f"grids/{node}/tiles"
    if context.store.tiles == "none" or store.committed(tiles):
        return []
    store.create_rows(tiles, (n, tile.tile_px, tile.tile_px, 3), np.uint8, rows, fill=0, sharded=True)
    todo = store.chunks_todo(tiles)
    need = len(todo) * rows * tile.tile_px**2 * 3 * LOSSLESS_SHARE
    free = storage.free_bytes(storage.place(context.out))
    if need > free:
        raise DiskFull(f"{store.slide_id}: the tiles need about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free.")
    return todo


# chunk


class OpenSlides:
    """The slides that one thread of a worker has open, the latest few; readers are never shared."""

    def __init__(self, limit: int = 2) -> None:
        self._limit = limit
        self._open: dict[tuple[str, float | None, str, str], SlideReader] = {}

    def get(self, context: Context, item: Item) -> SlideReader:
        """Return the item's reader, opening it if need be."""
        key = (item.uri, item.mpp, item.modality, check_same(item.uri, context.cache))
        reader = self._open.pop(key, None) or open_item(context, item)
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

    Tiles read from the slide are written to the store as one whole shard when they are kept, and
    beside them how sharp each is.
    Raises ReadError, CorruptStore.
    """
    store = SlideStore(context.out, chunk.item.slide_id)
    node = f"grids/{chunk.grid}/tiles"
    told = not isinstance(chunk.tile, WholeSpec) or store.has(f"outcomes/{chunk.grid}/{chunk.index}.json")
    if told and store.has_chunk(node, chunk.index, ndim=4):
        pixels = store.read(node, chunk.index)
    else:
        read = _read_images if isinstance(chunk.item, Pack) else _read_boxes
        pixels = read(context, chunk, slides)
        if context.store.tiles == "lossless":
            store.write_chunk(node, chunk.index, pixels)
    sharp = f"focus/{chunk.grid}"
    if store.has(f"{sharp}/zarr.json") and not store.has_chunk(sharp, chunk.index, ndim=1):
        store.write_chunk(sharp, chunk.index, focus(pixels))
    return pixels


def _read_boxes(context: Context, chunk: Chunk, slides: OpenSlides) -> Pixels:
    if not isinstance(chunk.item, Item) or isinstance(chunk.tile, WholeSpec):
        raise TypeError("Boxes are read from a slide.")
    rows = context.store.rows(chunk.tile.tile_px)
    here = slice(chunk.index * rows, chunk.index * rows + chunk.tiles)
    xy, wh = (_boxes(context.out, chunk.item.slide_id, chunk.grid, name)[here] for name in ("xy_px0", "wh_px0"))
    try:
        reader = slides.get(context, chunk.item)
        if isinstance(chunk.tile, TileSpec):
            pixels = read_tiles(reader, xy, tile_px=chunk.tile.tile_px, mpp=chunk.tile.mpp)
        else:
            pixels = _read_squares(reader, xy, wh[:, 0], chunk.tile.tile_px)
        check_same(chunk.item.uri, context.cache)
        return pixels
    except Exception:
        slides.forget()
        raise


def _read_squares(
    reader: SlideReader, xy_px0: npt.NDArray[np.int64], side_px0: npt.NDArray[np.int32], tile_px: int
) -> Pixels:
    """Read squares of any size, each at the scale at which it has `tile_px` pixels."""
    out = np.empty((len(xy_px0), tile_px, tile_px, 3), np.uint8)
    for side in np.unique(side_px0).tolist():
        alike = side_px0 == side
        out[alike] = read_tiles(reader, xy_px0[alike], tile_px=tile_px, mpp=reader.mpp0 * side / tile_px)
    return out


def _read_images(context: Context, chunk: Chunk, slides: OpenSlides) -> Pixels:
    """Read a pack's rows, each by itself: one that cannot be read is black and stands in `outcomes`."""
    if not isinstance(chunk.item, Pack) or not isinstance(chunk.tile, WholeSpec):
        raise TypeError("Whole images are read from a pack.")
    rows = context.store.rows(chunk.tile.tile_px)
    start = chunk.index * rows
    pixels = np.zeros((chunk.tiles, chunk.tile.tile_px, chunk.tile.tile_px, 3), np.uint8)
    broken: dict[str, dict[str, Any]] = {}
    unfit = _unfit_rows(context, chunk)
    for i, row in enumerate(chunk.item.rows[start : start + chunk.tiles]):
        if row.item.uri == GONE:
            broken[str(start + i)] = {"status": "failed", "code": GONE, "message": "", "next_step": ""}
            continue
        try:
            pixels[i] = read_image(row, chunk.tile)
            if identity(row.item.uri) != row.identity:
                raise SourceChanged(f"{row.item.uri} changed after its pack was formed.", next_step=AGAIN)
            if why := unfit.get(start + i):
                raise StainError(why["message"], next_step=why["next_step"])
        except Exception as error:  # noqa: BLE001 - whatever one image raises must not end the others
            ours = as_slideflow_error(error, f"reading {row.item.uri}")
            status = "refused" if ours.refused else "failed"
            broken[str(start + i)] = {
                "status": status,
                "code": ours.code,
                "message": ours.message,
                "next_step": ours.step,
            }
            pixels[i] = 0
    path = SlideStore(context.out, chunk.item.slide_id).root / f"outcomes/{chunk.grid}/{chunk.index}.json"
    storage.write_atomic(path, storage.to_json(broken))
    return pixels


def _unfit_rows(context: Context, chunk: Chunk) -> dict[int, FitError]:
    """The rows of a pack whose stains could not be told, and why; its grid is that of one node of fits."""
    nodes = dict.fromkeys(node for _, node in chunk.stains)
    return {k: v for node in nodes for k, v in read_fits(context.out, chunk.item.slide_id, node).broken.items()}


def stained_of(context: Context, chunk: Chunk, model: str, good: npt.NDArray[np.bool_]) -> Stained | None:
    """Return how the chunk's good rows are stained, for the model of that node; None where it does not normalise."""
    node = dict(chunk.stains).get(model)
    if node is None:
        return None
    fits = read_fits(context.out, chunk.item.slide_id, node)
    rows = fits.rows
    if isinstance(chunk.item, Pack):
        start = chunk.index * context.store.rows(chunk.tile.tile_px)
        rows = tuple(rows[start + i] for i in np.flatnonzero(good).tolist())
    return Stained(fits.stain, tuple(fit for fit in rows if isinstance(fit, StainFit)))


@lru_cache(maxsize=16)
def _boxes(out: str, slide_id: str, grid: str, name: str) -> npt.NDArray[Any]:
    return SlideStore(out, slide_id).read(f"grids/{grid}/{name}")


def score_chunk(context: Context, chunk: Chunk, pixels: Pixels, scorer: Callable[[str], Scorer]) -> int:
    """Give the chunk's tiles to every model that lacks them and write whole chunks of results; return n.

    Rows that could not be read stay empty. Raises NanScore.
    """
    store = SlideStore(context.out, chunk.item.slide_id)
    good = np.ones(len(pixels), bool)
    if isinstance(chunk.item, Pack):
        start = chunk.index * context.store.rows(chunk.tile.tile_px)
        good[[row - start for row in broken_rows(store, chunk.grid, chunk.index)]] = False
    for name in chunk.models:
        model = context.model(name)
        for result, node in zip(model.results, model.nodes(chunk.grid), strict=True):
            if store.has_chunk(node, chunk.index, ndim=1 + len(result.shape)):
                continue
            rows = np.full((len(pixels), *result.shape), result.nothing, result.dtype)
            if good.any():
                stained = stained_of(context, chunk, name, good)
                rows[good] = result.of(scorer(name), pixels if good.all() else pixels[good], stained)
            store.write_chunk(node, chunk.index, rows)
    return len(pixels)


# derive


def derive(context: Context, plan: SlidePlan) -> str:
    """Commit what the chunks have written, and derive planes and objects of what is segmented.

    Returns 'scored', 'no_tissue' or 'no_model' (no model applies).
    """
    store = SlideStore(context.out, plan.item.slide_id)
    for grid in plan.grids:
        for node in _results(context, grid):
            store.commit(node)
        for model in (context.model(name) for name in grid.models):
            if model.task == "segment" and grid.tiles:
                write_plane(store, grid.grid, model.node, model.classes)
                write_objects(store, grid.grid, model.node, model.classes, model.spec.objects)
                write_thickness(store, grid.grid, model.node, model.classes, model.spec.thickness)
    if not plan.grids:
        return "no_model"
    return "scored" if plan.tiles else "no_tissue"

"""Stored tiles as a source of training batches, shuffled across slides through a bounded buffer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError
from slideflow_ray.packs import Pack
from slideflow_ray.pipeline import Chunk, Context, OpenSlides, Pixels, read_chunk
from slideflow_ray.prepare import restained
from slideflow_ray.stain import Stained, StainTarget
from slideflow_ray.store import SlideStore
from slideflow_ray.train.augment import augment, augment_both, augmentation, mix, seed_of
from slideflow_ray.train.spec import TrainSpec

Labels = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]
BUFFER_BYTES = 512 * 2**20


class Batch(NamedTuple):
    """Tiles, uint8 (b, T, T, 3), their labels, and for each the number of its stain, int64 (b,), where it is known."""

    pixels: Pixels
    labels: Labels
    stains: Counts | None = None


class TileSource(Protocol):
    """Tiles with labels, in batches; `len` is the number of tiles in an epoch.

    `batches` yields a Batch, or its first two parts: uint8 (b, T, T, 3) with int64 (b,) class indices (classify) or
    float (b, K) of 0 and 1, where a negative or NaN entry means unknown (multilabel), or uint8 (b, T, T), 255 unknown
    (segment). Equal arguments give equal
    batches; training asks for every epoch in another order, validation always for epoch 0.
    """

    def batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


@runtime_checkable
class LabelledSource(TileSource, Protocol):
    """A source that knows its labels without reading a tile, which spares `fit` one pass for counting."""

    def labels(self) -> Labels: ...


@runtime_checkable
class SharedSource(TileSource, Protocol):
    """A source that can be worked off by several, each with a share of its own."""

    def share(self, index: int, of: int, *, even: bool) -> TileSource: ...


def class_indices(labels: npt.NDArray[np.int8]) -> Counts:
    """Return the class of each tile, int64 (n,), from labels int8 (n, K) with one 1 a row; -1 where unknown."""
    return np.where((labels == 1).any(axis=1), labels.argmax(axis=1), -1).astype(np.int64)


@dataclass(frozen=True)
class LabelledChunk:
    """A chunk and the class of each of its tiles, int64 (n,), or of several classes int8 (n, K) of 0 and 1.

    labels : -1 is unknown; a tile of which nothing is known is left out.
    times : how often a tile comes in an epoch, float (n,), 1 if None; of a broken number the rest is a chance.
    stain : a number for the slide's stain. colours : how it is stained and what it is to look like, if it is.
    start : the chunk's first row in its grid.
    masks : for a segmentation the node of the tiles' masks, and areas : their pixels by class, int64 (n, K); then
    `labels` is what a tile shows (see `masks.shown_by`).
    """

    chunk: Chunk
    labels: Labels
    times: npt.NDArray[np.float64] | None = None
    stain: int = 0
    start: int = 0
    masks: str | None = None
    areas: Counts | None = None
    colours: tuple[Stained, StainTarget] | None = None

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Of which tiles something is known, bool (n,)."""
        known: npt.NDArray[np.bool_] = (self.labels.reshape(len(self.labels), -1) >= 0).any(axis=1)
        return known

    @property
    def used(self) -> npt.NDArray[np.bool_]:
        """Which tiles can come at all, bool (n,)."""
        return self.known if self.times is None else self.known & (self.times > 0)

    @property
    def rows_of(self) -> dict[str, slice]:
        """The rows of each slide_id: all of a slide's chunk, one for each image of a pack."""
        if not isinstance(self.chunk.item, Pack):
            return {self.chunk.item.slide_id: slice(None)}
        here = self.chunk.item.rows[self.start : self.start + len(self.labels)]
        return {row.item.slide_id: slice(i, i + 1) for i, row in enumerate(here)}

    @property
    def items(self) -> tuple[Item, ...]:
        """The rows of the cohort that are in it: the slide, or the images of a pack of which something is known."""
        if not isinstance(self.chunk.item, Pack):
            return (self.chunk.item,)
        here = self.chunk.item.rows[self.start : self.start + len(self.labels)]
        return tuple(row.item for row, known in zip(here, self.known, strict=True) if known)

    @property
    def item_of_row(self) -> tuple[Item, ...]:
        """The row of the cohort that each row is of: the slide, or an image of a pack."""
        if not isinstance(self.chunk.item, Pack):
            return (self.chunk.item,) * len(self.labels)
        return tuple(row.item for row in self.chunk.item.rows[self.start : self.start + len(self.labels)])

    def without(self, patients: Collection[str]) -> LabelledChunk:
        """Return the chunk with nothing known of some patients."""
        labels = self.labels.copy()
        labels[[item.patient in patients for item in self.item_of_row]] = -1
        return replace(self, labels=labels)

    def rows(self, epoch: int, seed: int) -> Counts:
        """Return the rows of one epoch, each as often as it comes."""
        if self.times is None:
            return np.flatnonzero(self.known)
        where = f"{self.chunk.item.slide_id} {self.chunk.grid} {self.chunk.index}"
        rng = np.random.default_rng(seed_of(seed, epoch, where))
        times = np.where(self.known, self.times, 0.0)
        whole = np.floor(times)
        often = whole + (rng.random(len(times)) < times - whole)
        return np.repeat(np.arange(len(times)), often.astype(np.int64))


@dataclass
class ChunkTiles:
    """Batches of labelled tiles, read through `pipeline.read_chunk`, the path that scoring takes.

    A few chunks of different slides are held at a time and mixed, so their pixels stay below `buffer_bytes` whatever
    the size of the cohort. A cohort whose pixels fit into half of that is read once and kept besides: a store a
    micrograph, opened anew in each epoch, took as long as a small network's steps. The order depends on
    (seed, epoch) alone.

    part : (index, of) when several share the work. Chunks are dealt out anew in each epoch, the largest first to
    whoever has fewest tiles. even : each gives as many batches as the one with most tiles, beginning again where its
    own are used up, so that data-parallel workers take the same number of steps.
    """

    context: Context
    chunks: Sequence[LabelledChunk]
    buffer_bytes: int = BUFFER_BYTES
    part: tuple[int, int] = (0, 1)
    even: bool = False
    _slides: OpenSlides = field(default_factory=OpenSlides, repr=False)
    _kept: dict[int, tuple[Pixels, Labels]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.chunks = tuple(c for c in self.chunks if c.used.any())

    def __len__(self) -> int:
        """Return how many tiles an epoch shows, over all parts."""
        return round(sum(_weight(c) for c in self.chunks))

    def __getstate__(self) -> dict[str, Any]:
        """Leave open slides behind when sent to another process."""
        return {**self.__dict__, "_slides": None, "_kept": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open slides anew."""
        self.__dict__.update(state, _slides=OpenSlides())

    def labels(self) -> Labels:
        """Return the class of every tile that an epoch may show, int64 (n,) or int8 (n, K), each once.

        For a segmentation the pixels of each class in it, int64 (n, K).
        """
        found = [(c.labels if c.areas is None else c.areas)[c.used] for c in self.chunks]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def share(self, index: int, of: int, *, even: bool) -> ChunkTiles:
        """Return the part of one of several workers."""
        inner, outer = self.part
        return replace(self, part=(inner * of + index, outer * of), even=even, _slides=OpenSlides())

    def batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield batches; every labelled tile as often as it should come, the last batch may be short."""
        parts = self._deal(epoch, seed)
        mine = parts[self.part[0]]
        if not self.even:
            yield from self._mixed(mine, epoch, 0, batch_size, seed)
            return
        most = max(sum(len(rows) for _, rows in part) for part in parts)
        rounds = (self._mixed(mine, epoch, again, batch_size, seed) for again in itertools.count())
        yield from _exactly(most, batch_size, itertools.chain.from_iterable(rounds))

    def in_order(self, batch_size: int) -> Iterator[tuple[Pixels, Labels, list[Item]]]:
        """Yield (pixels, labels, rows of the cohort) of every labelled tile once, in the order of the chunks."""
        for c in self.chunks:
            rows, items = np.flatnonzero(c.known), c.item_of_row
            batch = self._load(c, rows)
            for at in range(0, len(rows), batch_size):
                part = slice(at, at + batch_size)
                yield batch.pixels[part], batch.labels[part], [items[i] for i in rows[part]]

    def _deal(self, epoch: int, seed: int) -> list[list[tuple[LabelledChunk, Counts]]]:
        """The chunks of each part with the rows of this epoch, in a new order each epoch."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self.chunks))
        drawn = [(self.chunks[i], self.chunks[i].rows(epoch, seed)) for i in order]
        _, of = self.part
        parts: list[list[tuple[LabelledChunk, Counts]]] = [[] for _ in range(of)]
        load = [0] * of
        if of == 1:
            return [drawn]
        if self.even:
            drawn = _enough(drawn, of)
        place = {id(c): i for i, (c, _) in enumerate(drawn)}
        for c, rows in sorted(drawn, key=lambda pair: (-len(pair[1]), place[id(pair[0])])):
            lightest = load.index(min(load))
            parts[lightest].append((c, rows))
            load[lightest] += len(rows)
        return [sorted(parts[i], key=lambda pair: place[id(pair[0])]) for i in rng.permutation(of)]

    def _mixed(
        self, mine: Sequence[tuple[LabelledChunk, Counts]], epoch: int, again: int, batch_size: int, seed: int
    ) -> Iterator[Batch]:
        """One pass over the chunks of a part: a few in the buffer, mixed, cut into batches."""
        rng = np.random.default_rng([seed, epoch, again, *self.part])
        rest: Batch | None = None
        for window in self._windows(mine):
            held = _join([*([rest] if rest else []), *(self._load(c, rows) for c, rows in window)])
            mixed = rng.permutation(len(held.labels))
            whole = len(mixed) - len(mixed) % batch_size
            for at in range(0, whole, batch_size):
                yield _take(held, mixed[at : at + batch_size])
            rest = _take(held, mixed[whole:])
        if rest is not None and len(rest.labels):
            yield rest

    def _windows(
        self, mine: Sequence[tuple[LabelledChunk, Counts]]
    ) -> Iterator[Sequence[tuple[LabelledChunk, Counts]]]:
        """Runs of chunks whose tiles fit the buffer together; one chunk at least."""
        window: list[tuple[LabelledChunk, Counts]] = []
        size = 0
        for c, rows in mine:
            more = max(len(rows) * c.chunk.tile.tile_px**2 * 3, _bytes(c))
            if window and size + more > self.buffer_bytes:
                yield window
                window, size = [], 0
            window.append((c, rows))
            size += more
        if window:
            yield window

    @cached_property
    def _keeps(self) -> bool:
        return sum(_bytes(c) for c in self.chunks) <= self.buffer_bytes / 2

    def _load(self, c: LabelledChunk, rows: Counts) -> Batch:
        found = self._kept.get(id(c)) or self._read(c)
        if self._keeps:
            self._kept[id(c)] = found
        pixels, labels = found
        return Batch(pixels[rows], labels[rows], np.full(len(rows), c.stain, np.int64))

    def _read(self, c: LabelledChunk) -> tuple[Pixels, Labels]:
        """All tiles of a chunk, in the colours they are to have, and their labels or masks."""
        pixels = read_chunk(self.context, c.chunk, self._slides)
        pixels = restained(pixels, *c.colours) if c.colours else pixels
        if c.masks is None:
            return pixels, c.labels
        return pixels, SlideStore(self.context.out, c.chunk.item.slide_id).read(c.masks, c.chunk.index)


def _bytes(c: LabelledChunk) -> int:
    return int(c.chunk.tiles * c.chunk.tile.tile_px**2 * 3)


def _weight(c: LabelledChunk) -> float:
    return float(c.used.sum() if c.times is None else c.times[c.known].sum())


def _take(batch: Batch, rows: Counts) -> Batch:
    return Batch(batch.pixels[rows], batch.labels[rows], None if batch.stains is None else batch.stains[rows])


def _join(parts: Sequence[Batch]) -> Batch:
    stains = [part.stains for part in parts if part.stains is not None]
    return Batch(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate(stains) if len(stains) == len(parts) else None,
    )


def _enough(drawn: list[tuple[LabelledChunk, Counts]], of: int) -> list[tuple[LabelledChunk, Counts]]:
    """Halve the largest chunks until each of `of` workers has one: one without tiles would keep the others waiting.

    Raises ConfigError where there are fewer tiles than workers.
    """
    found = [(c, rows) for c, rows in drawn if len(rows)]
    if sum(len(rows) for _, rows in found) < of:
        raise ConfigError(f"{of} workers cannot share fewer than {of} tiles.", next_step="Train with fewer workers.")
    while len(found) < of:
        i = max(range(len(found)), key=lambda i: len(found[i][1]))
        c, rows = found[i]
        found[i : i + 1] = [(c, rows[0::2]), (c, rows[1::2])]
    return found


def _exactly(tiles: int, batch_size: int, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches of `batch_size`, the last of what is left, until `tiles` have come; short ones are filled up."""
    given = 0
    waiting: list[Batch] = []
    for _ in range(math.ceil(tiles / batch_size)):
        want = min(batch_size, tiles - given)
        while sum(len(b.labels) for b in waiting) < want:
            waiting.append(next(batches))
        joined = _join(waiting)
        yield _take(joined, np.arange(want))
        given += want
        waiting = [_take(joined, np.arange(want, len(joined.labels)))]


class Prepared:
    """The batches of a training epoch as the network sees them: mixed and augmented, each draw seeded.

    `stream` tells apart those who share the work, so that no two of them draw alike.
    """

    def __init__(self, source: TileSource, spec: TrainSpec, stream: int = 0) -> None:
        self.source, self.spec, self.stream = source, spec, stream

    def batches(self, epoch: int, batch_size: int) -> Iterator[tuple[Pixels, Labels]]:
        """Yield (uint8 (b, T, T, 3), labels)."""
        spec = self.spec
        transform = augmentation(spec.augment)
        for step, found in enumerate(self.source.batches(epoch, batch_size, spec.seed)):
            batch = Batch(*found)
            pixels = batch.pixels
            where = f"{step}" if not self.stream else f"{step} of {self.stream}"
            if spec.augment.mixup:
                pixels = mix(pixels, _kinds(batch), spec.augment.mixup, seed_of(spec.seed, epoch, f"mix {where}"))
            labels = batch.labels
            seed = seed_of(spec.seed, epoch, f"augment {where}")
            if transform and labels.ndim == 3:
                pixels, labels = augment_both(pixels, labels, transform, seed)
            elif transform:
                pixels = augment(pixels, transform, seed)
            yield pixels, labels


def _kinds(batch: Batch) -> npt.NDArray[Any]:
    labels = batch.labels.reshape(len(batch.labels), -1)
    return labels if batch.stains is None else np.column_stack([labels, batch.stains])

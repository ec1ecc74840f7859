"""Stored tiles as a source of training batches, shuffled across slides through a bounded buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slideflow_ray.pipeline import Chunk, Context, OpenSlides, Pixels, read_chunk

Labels = npt.NDArray[np.int64]
BUFFER_BYTES = 512 * 2**20


def class_indices(labels: npt.NDArray[np.int8]) -> Labels:
    """Return the class of each tile, int64 (n,), from labels int8 (n, K) with one 1 a row; -1 where unknown."""
    return np.where((labels == 1).any(axis=1), labels.argmax(axis=1), -1).astype(np.int64)


@dataclass(frozen=True)
class LabelledChunk:
    """A chunk and the class of each of its tiles, int64 (n,); -1 is unknown and left out."""

    chunk: Chunk
    labels: Labels


class ChunkTiles:
    """Batches of labelled tiles, read through `pipeline.read_chunk`, the path that scoring takes.

    A few chunks of different slides are held at a time and mixed, so memory stays below
    `buffer_bytes` whatever the size of the cohort. The order depends on (seed, epoch) alone.
    """

    def __init__(self, context: Context, chunks: Sequence[LabelledChunk], buffer_bytes: int = BUFFER_BYTES) -> None:
        self.context = context
        self.chunks = tuple(c for c in chunks if (c.labels >= 0).any())
        self.buffer_bytes = buffer_bytes
        self._slides = OpenSlides()

    def __len__(self) -> int:
        """Return how many labelled tiles there are."""
        return int(sum((c.labels >= 0).sum() for c in self.chunks))

    def labels(self) -> Labels:
        """Return the class of every labelled tile, int64 (len(self),)."""
        return np.concatenate([np.empty(0, np.int64), *(c.labels[c.labels >= 0] for c in self.chunks)])

    def batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[tuple[Pixels, Labels]]:
        """Yield (uint8 (b, T, T, 3), int64 (b,)); every labelled tile once, the last batch may be short."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self.chunks))
        rest: tuple[Pixels, Labels] | None = None
        for start in range(0, len(order), self._held()):
            pixels, labels = self._load([self.chunks[i] for i in order[start : start + self._held()]], rest)
            mixed = rng.permutation(len(labels))
            whole = len(mixed) - len(mixed) % batch_size
            for at in range(0, whole, batch_size):
                rows = mixed[at : at + batch_size]
                yield pixels[rows], labels[rows]
            rest = (pixels[mixed[whole:]], labels[mixed[whole:]])
        if rest is not None and len(rest[1]):
            yield rest

    def _held(self) -> int:
        """Chunks in the buffer."""
        if not self.chunks:
            return 1
        largest = max(c.chunk.tiles * c.chunk.tile.tile_px**2 * 3 for c in self.chunks)
        return int(max(1, self.buffer_bytes // largest))

    def _load(self, chunks: Sequence[LabelledChunk], rest: tuple[Pixels, Labels] | None) -> tuple[Pixels, Labels]:
        parts = [] if rest is None else [rest]
        for c in chunks:
            known = c.labels >= 0
            parts.append((read_chunk(self.context, c.chunk, self._slides)[known], c.labels[known]))
        return np.concatenate([p for p, _ in parts]), np.concatenate([y for _, y in parts])

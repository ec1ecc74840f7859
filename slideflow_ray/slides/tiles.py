"""Exact tiles: a tile is resize(crop(level, integer box)), each tile by itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from slideflow_ray.geometry import best_level, scale_of, size_on_level, to_level
from slideflow_ray.slides.base import Pixels, SlideReader

DENSE = 0.5
"""A superblock is read at once where its tiles cover at least this part of their bounding box."""


def read_tiles(
    reader: SlideReader, xy_px0: npt.NDArray[np.int64], *, tile_px: int, mpp: float, superblock: int = 2048
) -> Pixels:
    """Return tiles of `tile_px` pixels at `mpp` um per pixel, uint8, shape (n, tile_px, tile_px, 3).

    `xy_px0` : int64, shape (n, 2), upper left corners in px0.

    Pixels come from the coarsest level that is fine enough: the integer box of that
    level nearest to the tile, resized by antialiased bilinear (Pillow), and not at all
    where it has `tile_px` pixels already. Neighbours are fetched together, in squares
    of `superblock` level pixels, which changes the speed and no pixel. Beyond the edge
    is white. Memory stays below (superblock + tile)^2 pixels besides the result.
    Raises ReadError.
    """
    scale = scale_of(mpp, reader.mpp0)
    index = best_level(reader.levels, scale)
    size = size_on_level((tile_px, tile_px), scale, reader.levels[index])
    corners = to_level(np.asarray(xy_px0, np.int64).reshape(-1, 2), reader.levels[index])
    out: Pixels = np.empty((len(corners), tile_px, tile_px, 3), np.uint8)
    for rows in _groups(corners, superblock):
        for part in _dense(corners, rows, size, superblock):
            _fill(out, reader, index, corners, part, size)
    return out


def _groups(corners: npt.NDArray[np.int64], superblock: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the rows of `corners` that lie in the same superblock, superblock by superblock."""
    if not len(corners):
        return
    block = corners // superblock
    order = np.lexsort((block[:, 0], block[:, 1])).astype(np.int64)
    cuts = np.flatnonzero(np.any(np.diff(block[order], axis=0) != 0, axis=1)) + 1
    yield from np.split(order, cuts)


def _dense(
    corners: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], size: tuple[int, int], superblock: int
) -> list[npt.NDArray[np.int64]]:
    """Return the rows together, or one by one where a bounding box would mostly hold pixels that nobody wants."""
    span = np.ptp(corners[rows], axis=0) + size
    wanted = len(rows) * size[0] * size[1]
    if len(rows) > 1 and max(size) <= superblock and wanted >= DENSE * int(np.prod(span)):
        return [rows]
    return list(rows.reshape(-1, 1))


def _fill(
    out: Pixels,
    reader: SlideReader,
    level: int,
    corners: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    size: tuple[int, int],
) -> None:
    """Read the bounding box of the tiles `rows` once and cut them out of it."""
    left, top = (int(v) for v in corners[rows].min(axis=0))
    right, bottom = (int(v) for v in corners[rows].max(axis=0))
    block = reader.read(level, (left, top), (right - left + size[0], bottom - top + size[1]))
    for row in rows:
        x, y = int(corners[row, 0]) - left, int(corners[row, 1]) - top
        out[row] = resized(block[y : y + size[1], x : x + size[0]], out.shape[1])


def resized(tile: Pixels, tile_px: int) -> Pixels:
    """Return one tile at `tile_px` pixels: antialiased bilinear, or untouched where it has that size."""
    if tile.shape[:2] == (tile_px, tile_px):
        return tile
    image = Image.fromarray(np.ascontiguousarray(tile))
    return np.asarray(image.resize((tile_px, tile_px), Image.Resampling.BILINEAR))

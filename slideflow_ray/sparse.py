"""Whether a remote slide is read block by block, or copied whole: by how much of it is wanted.

The overview is read by blocks and tissue found; the blocks that the wanted tiles lie in, over the file's bytes,
decide. What was decided is remembered with the slide's identity (`identity`), which is its ETag and size when it
is read by blocks, as nobody has read it whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

from slideflow_ray.blocks import BLOCK, Blocks, NoRanges, blocks_of
from slideflow_ray.cohort import Item
from slideflow_ray.errors import NotASlide
from slideflow_ray.geometry import scale_of, size_on_level, to_level
from slideflow_ray.grid import Grid, make_grid
from slideflow_ray.remote import Seen
from slideflow_ray.slides import open_slide
from slideflow_ray.slides.base import is_micrograph
from slideflow_ray.specs import TileSpec, TissueSpec
from slideflow_ray.tissue import LEVEL0_PX, find_tissue

if TYPE_CHECKING:
    from slideflow_ray.slides.tiff import TiffReader

MOST = 0.3
"""Above this share of a slide's bytes it is copied.

Measured by benchmarks/remote.py (30 ms an answer, 50 MB/s a connection, one reader; blocks over copy):
share 0.08: 0.37 of the time and 0.10 of the bytes; 0.23 and 0.24: 0.90 and 0.77 of the time, 0.27 of the bytes;
0.41: 1.3 times the time, 0.52 of the bytes; 0.65: 1.2 to 1.8 times the time, 0.7 of the bytes.
Glass costs bytes too: of 5 % tissue at full scale the share is 0.41 already, so what gains is a model that reads a
coarser level, or a mask that leaves most tissue out.
"""


def is_sparse(seen: Seen, item: Item, tissue: TissueSpec, tiles: Iterable[TileSpec]) -> bool:
    """Return whether a remote slide is to be read by blocks.

    Never where requests cannot name one version of it or parts of it, where it is no TIFF that tiffslide reads, and
    where it is so small that its tissue is found on level 0. Raises SlideError as `open_slide` does.
    """
    if not seen.fixed:
        return False
    try:
        with open_slide(item.uri, mpp=item.mpp, modality=item.modality, source=Blocks(seen)) as reader:
            if is_micrograph(reader):  # its window needs every pixel
                return False
            if item.mask is None and reader.size_px0[0] * reader.size_px0[1] <= LEVEL0_PX:
                return False
            mask = find_tissue(reader, tissue, item.modality, item.mask)
            grids = [(make_grid(reader.size_px0, reader.mpp0, reader.levels, tile, mask), tile) for tile in tiles]
            return share(cast("TiffReader", reader), grids, seen.size) <= MOST
    except (NotASlide, NoRanges):
        return False


def share(reader: TiffReader, grids: Sequence[tuple[Grid, TileSpec]], size: int) -> float:
    """Return which part of a slide of `size` bytes the tiles of all grids need, in whole blocks."""
    wanted: set[int] = set()
    for grid, tile in grids:
        level = reader.levels[grid.level]
        side = size_on_level((tile.tile_px, tile.tile_px), scale_of(tile.mpp, reader.mpp0), level)
        for x, y in to_level(grid.xy_px0, level).tolist():
            wanted.update(blocks_of(reader.pieces(grid.level, (x, y), side)))
    return min(1.0, len(wanted) * BLOCK / size)

"""TileSpec + slide + tissue mask -> Grid: the table of boxes that a model sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slideflow_ray.errors import BadMpp
from slideflow_ray.geometry import (
    EXACT,
    Level,
    achieved_mpp,
    best_level,
    cells_along,
    origins_px0,
    scale_of,
    size_on_level,
)
from slideflow_ray.specs import TileSpec
from slideflow_ray.tissue import TissueMask, fraction_in

MAX_ENLARGING = 1.25
"""How much finer than its level 0 a slide may be asked for; beyond, a model would see interpolated detail.

Scanners called "20x" make 0.44 to 0.55 um per pixel, so models for 0.5 must pass; a
model for 0.25 on a slide of 0.5 must not.
"""


@dataclass(frozen=True)
class Grid:
    """N boxes in px0 with their cells in a heatmap of `shape` (rows, cols).

    xy_px0 : int64, shape (N, 2), upper left corners; wh_px0 : int32, shape (N, 2), (width, height).
    rowcol : int32, shape (N, 2), cell in the heatmap. tissue : float32, shape (N,), fraction of the box.
    item : int32, shape (N,), row of the store's items (0 for a slide). `level` is read, at `mpp_achieved`.
    """

    xy_px0: npt.NDArray[np.int64]
    wh_px0: npt.NDArray[np.int32]
    rowcol: npt.NDArray[np.int32]
    tissue: npt.NDArray[np.float32]
    item: npt.NDArray[np.int32]
    shape: tuple[int, int]
    level: int
    mpp_achieved: float

    def __len__(self) -> int:
        return len(self.xy_px0)


def make_grid(
    size_px0: tuple[int, int],
    mpp0: float,
    levels: Sequence[Level],
    spec: TileSpec,
    tissue: TissueMask,
    block: int = 16,
) -> Grid:
    """Lay regular tiles over a slide and keep those on tissue.

    Cell k of an axis begins at round(k * step * scale) px0, so the grid cannot drift;
    cells begin inside the slide, and those that reach over its edge are kept (reading
    makes the rest white, and no tissue). A tile is kept when its tissue fraction is at
    least `spec.min_tissue` and above 0. Tiles come block by block, `block` x `block`
    cells, row by row inside and between, so that neighbours in the table are
    neighbours on the slide. All boxes have the size round(tile_px * scale), so between
    two neighbours a gap or overlap of one px0 may remain; tissue in such a gap is in no
    box. With a halo, cells are cores and boxes reach `halo_px` beyond them on each side.
    Raises BadMpp where `spec.mpp` is more than 1.25 times
    finer than level 0.
    """
    scale = checked_scale(spec.mpp, mpp0)
    cols, rows = (cells_along(length, spec.step_px, scale) for length in size_px0)
    rowcol = blocked_cells(rows, cols, block)
    cores = np.column_stack(
        [origins_px0(cols, spec.step_px, scale)[rowcol[:, 1]], origins_px0(rows, spec.step_px, scale)[rowcol[:, 0]]]
    )
    side, core = (max(1, round(px * scale)) for px in (spec.tile_px, spec.core_px))
    fraction = fraction_in(tissue, cores, np.broadcast_to(np.int32(core), cores.shape))
    xy = cores - round(spec.halo_px * scale)
    keep = (fraction >= np.float32(spec.min_tissue)) & (fraction > 0)
    level = best_level(levels, scale)
    size = size_on_level((spec.tile_px, spec.tile_px), scale, levels[level])
    n = int(np.count_nonzero(keep))
    return Grid(
        xy_px0=xy[keep],
        wh_px0=np.full((n, 2), side, np.int32),
        rowcol=rowcol[keep],
        tissue=fraction[keep],
        item=np.zeros(n, np.int32),
        shape=(rows, cols),
        level=level,
        mpp_achieved=achieved_mpp(mpp0, levels[level], size, spec.tile_px),
    )


def checked_scale(mpp: float, mpp0: float) -> float:
    """Return px0 per pixel at `mpp`. Raises BadMpp where that is too fine for the slide."""
    scale = scale_of(mpp, mpp0)
    if scale * MAX_ENLARGING < 1 - EXACT:
        raise BadMpp(
            f"Tiles at {mpp:g} um per pixel were asked of a slide scanned at {mpp0:g}: enlarging "
            f"{1 / scale:.2f} times would invent detail (up to {MAX_ENLARGING:g} is allowed).",
            next_step=f"Use a model for {mpp0:g} um per pixel or coarser, or correct the cohort's column `mpp`.",
        )
    return scale


def blocked_cells(rows: int, cols: int, block: int) -> npt.NDArray[np.int32]:
    """Return every (row, col) of a table, int32, shape (rows * cols, 2), block by block.

    >>> blocked_cells(2, 3, 2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [1, 2]]
    """
    row, col = np.divmod(np.arange(rows * cols, dtype=np.int64), cols)
    across = -(-cols // block)
    place = ((row // block) * across + col // block) * block * block + (row % block) * block + col % block
    order = np.argsort(place, kind="stable")
    return np.column_stack([row[order], col[order]]).astype(np.int32)

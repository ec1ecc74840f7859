"""Grids: no drift, no gaps, block order, and what is kept."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slideflow_ray import grid as grid_module
from slideflow_ray.errors import BadMpp
from slideflow_ray.geometry import Level
from slideflow_ray.grid import blocked_cells, make_grid
from slideflow_ray.specs import TileSpec
from slideflow_ray.tissue import TissueMask, fraction_in

LEVELS = (Level((3001, 2003), (1.0, 1.0)), Level((1500, 1001), (2.0, 2.0)), Level((375, 250), (8.0, 8.0)))
SIZE = LEVELS[0].size


def tissue_of(mask, size=SIZE):
    return TissueMask(mask, (size[0] / mask.shape[1], size[1] / mask.shape[0]), "he")


def everything(size=SIZE):
    return tissue_of(np.ones((50, 75), bool), size)


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(grid_module).failed == 0


def test_types_and_shapes():
    grid = make_grid(SIZE, 0.5, LEVELS, TileSpec(tile_px=64, mpp=1.3), everything())
    n = len(grid)
    assert n == len(grid.xy_px0) > 0
    assert (grid.xy_px0.dtype, grid.xy_px0.shape) == (np.int64, (n, 2))
    assert (grid.wh_px0.dtype, grid.wh_px0.shape) == (np.int32, (n, 2))
    assert (grid.rowcol.dtype, grid.rowcol.shape) == (np.int32, (n, 2))
    assert (grid.tissue.dtype, grid.tissue.shape) == (np.float32, (n,))
    assert (grid.item.dtype, grid.item.shape) == (np.int32, (n,))
    assert grid.shape == (13, 19)  # rows, cols of 166.4 px0 on 3001 x 2003
    assert (grid.wh_px0 == 166).all()
    assert grid.level == 1
    assert grid.mpp_achieved == pytest.approx(1.3, rel=0.01)


specs = st.builds(
    TileSpec,
    tile_px=st.integers(24, 300),
    mpp=st.floats(0.45, 6),
    stride_px=st.none() | st.integers(20, 300),
    min_tissue=st.just(0.0),
)


@settings(deadline=None, max_examples=60)
@given(specs)
def test_cells_stand_where_their_row_and_column_say(spec):
    grid = make_grid(SIZE, 0.5, LEVELS, spec, everything())
    step = spec.step_px * spec.mpp / 0.5
    assert len(grid) == grid.shape[0] * grid.shape[1]
    assert len(np.unique(grid.rowcol, axis=0)) == len(grid)
    for axis in (0, 1):
        cell = grid.rowcol[:, 1 - axis]
        np.testing.assert_array_equal(grid.xy_px0[:, axis], np.rint(cell * step))
        assert grid.xy_px0[:, axis].max() < SIZE[axis]
        assert (grid.shape[1 - axis]) * step >= SIZE[axis] - 0.5


def covered_by(xy, wh):
    """Return which px0 lie in a box, bool, shape (height, width) of the slide."""
    out = np.zeros((SIZE[1], SIZE[0]), bool)
    for (x, y), (w, h) in zip(xy.tolist(), wh.tolist(), strict=True):
        out[y : y + h, x : x + w] = True
    return out


@settings(deadline=None, max_examples=60)
@given(specs, st.integers(0, 2**32 - 1), st.floats(0.01, 0.4))
@example(TileSpec(tile_px=167, mpp=0.45, min_tissue=0.0), 0, 0.25)  # 150.3 px0: tissue begins in a gap
def test_min_tissue_zero_loses_no_tissue_that_any_cell_holds(spec, seed, density):
    """With min_tissue = 0, a px0 of tissue that lies in the box of any cell lies in a kept box. Exactly."""
    mask = np.random.default_rng(seed).random((40, 61)) < density
    tissue = tissue_of(mask)
    grid = make_grid(SIZE, 0.5, LEVELS, spec, tissue)
    cells = make_grid(SIZE, 0.5, LEVELS, spec, everything())
    row = (np.arange(SIZE[1]) + 0.5) / tissue.px0_per_px[1]
    col = (np.arange(SIZE[0]) + 0.5) / tissue.px0_per_px[0]
    stained = mask[row.astype(int)[:, None], col.astype(int)]
    kept = covered_by(grid.xy_px0, grid.wh_px0)
    np.testing.assert_array_equal(stained & kept, stained & covered_by(cells.xy_px0, cells.wh_px0))
    assert (grid.tissue > 0).all()


@settings(deadline=None, max_examples=60)
@given(specs)
@example(TileSpec(tile_px=167, mpp=0.45, min_tissue=0.0))
def test_tiles_without_stride_leave_gaps_of_at_most_one_px0(spec):
    """Boxes have one rounded size and origins are rounded one by one, so a gap or overlap of one px0 remains."""
    spec = spec.model_copy(update={"stride_px": None})
    grid = make_grid(SIZE, 0.5, LEVELS, spec, everything())
    for axis in (0, 1):
        origins = np.unique(grid.xy_px0[:, axis])
        gaps = origins[1:] - (origins[:-1] + grid.wh_px0[0, axis])
        assert np.abs(gaps).max(initial=0) <= 1


def test_min_tissue_is_a_floor_and_zero_tissue_is_never_kept():
    mask = np.zeros((40, 61), bool)
    mask[5:20, 7:31] = True
    tissue = tissue_of(mask)
    whole = make_grid(SIZE, 0.5, LEVELS, TileSpec(tile_px=100, mpp=0.9, min_tissue=0), everything())
    fraction = fraction_in(tissue, whole.xy_px0, whole.wh_px0)
    for floor in (0.0, 0.05, 0.5, 1.0):
        grid = make_grid(SIZE, 0.5, LEVELS, TileSpec(tile_px=100, mpp=0.9, min_tissue=floor), tissue)
        keep = (fraction >= np.float32(floor)) & (fraction > 0)
        assert 0 < keep.sum() < len(whole)
        np.testing.assert_array_equal(grid.xy_px0, whole.xy_px0[keep])
        np.testing.assert_array_equal(grid.tissue, fraction[keep])
    empty = make_grid(SIZE, 0.5, LEVELS, TileSpec(tile_px=100, mpp=0.9, min_tissue=0), tissue_of(mask & False))
    assert len(empty) == 0
    assert empty.xy_px0.shape == empty.rowcol.shape == (0, 2)
    assert empty.shape == whole.shape


def test_tiles_over_the_edge_are_kept():
    grid = make_grid(
        (250, 130), 0.5, (Level((250, 130), (1.0, 1.0)),), TileSpec(tile_px=100, mpp=0.5), everything((250, 130))
    )
    assert sorted(map(tuple, grid.xy_px0.tolist())) == [(x, y) for x in (0, 100, 200) for y in (0, 100)]
    assert (grid.wh_px0 == 100).all()
    corner = grid.tissue[(grid.xy_px0 == (200, 100)).all(axis=1)]
    np.testing.assert_allclose(corner, 0.5 * 0.3)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20))
def test_cells_come_block_by_block(rows, cols, block):
    expected = [
        (r, c)
        for top in range(0, rows, block)
        for left in range(0, cols, block)
        for r in range(top, min(top + block, rows))
        for c in range(left, min(left + block, cols))
    ]
    assert list(map(tuple, blocked_cells(rows, cols, block).tolist())) == expected


def test_a_chunk_touches_few_superblocks():
    size = (60_000, 40_000)
    grid = make_grid(size, 0.25, (Level(size, (1.0, 1.0)),), TileSpec(tile_px=256, mpp=0.25), everything(size))
    touched = [len(np.unique(grid.xy_px0[i : i + 256] // 2048, axis=0)) for i in range(0, len(grid), 256)]
    assert np.mean(touched) < 6


def test_a_slide_is_not_enlarged_beyond_a_quarter():
    levels = (Level((1000, 800), (1.0, 1.0)),)
    for mpp0, mpp in ((0.499, 0.5), (0.5, 0.499), (0.55, 0.5), (0.5, 0.4)):
        assert len(make_grid((1000, 800), mpp0, levels, TileSpec(tile_px=64, mpp=mpp), everything((1000, 800))))
    for mpp0, mpp in ((0.499, 0.25), (28.97, 1.0), (0.5, 0.39)):
        with pytest.raises(BadMpp, match=f"at {mpp0:g}: enlarging"):
            make_grid((1000, 800), mpp0, levels, TileSpec(tile_px=64, mpp=mpp), everything((1000, 800)))


def test_a_large_slide_is_laid_out():
    size = (200_000, 100_000)
    levels = (Level(size, (1.0, 1.0)), Level((50_000, 25_000), (4.0, 4.0)))
    tissue = tissue_of(np.ones((3125, 6250), bool), size)
    grid = make_grid(size, 0.25, levels, TileSpec(tile_px=256, mpp=0.5), tissue)
    assert grid.shape == (196, 391)
    assert len(grid) == 196 * 391

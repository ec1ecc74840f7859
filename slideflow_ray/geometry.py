"""Boxes, levels, and px0 <-> level <-> um: the only place where a coordinate meets a scale.

Frames: *px0* are pixels of level 0, *level pixels* those of one pyramid level,
*mpp* is um per pixel. Points are (x, y), sizes are (width, height), arrays are
[row, col].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

EXACT = 1e-6
"""Two scales closer than this (relative) are the same scale."""


@dataclass(frozen=True)
class Level:
    """One pyramid level: its size in its own pixels, and px0 per level pixel along x and y."""

    size: tuple[int, int]
    downsample: tuple[float, float]


def level_downsample(size_px0: tuple[int, int], size_level: tuple[int, int]) -> tuple[float, float]:
    """Return px0 per level pixel along x and y.

    Pyramid writers halve with rounding down or up, so the ratio of the sizes is off
    by up to a pixel; where one whole number explains both axes it is the downsample.

    >>> level_downsample((2220, 2967), (1110, 1483))
    (2.0, 2.0)
    >>> level_downsample((1000, 500), (400, 200))
    (2.5, 2.5)
    """
    ratios = [whole / part for whole, part in zip(size_px0, size_level, strict=True)]
    n = round(sum(ratios) / 2)
    if n >= 1 and all(abs(part * n - whole) < n for whole, part in zip(size_px0, size_level, strict=True)):
        return (float(n), float(n))
    return (ratios[0], ratios[1])


def scale_of(mpp: float, mpp0: float) -> float:
    """Return px0 per pixel at `mpp`, given level 0's um per pixel."""
    return mpp / mpp0


def best_level(levels: Sequence[Level], scale: float) -> int:
    """Return the coarsest level that is at least as fine as `scale` px0 per pixel (level 0 if none is).

    >>> levels = [Level((100, 100), (1.0, 1.0)), Level((50, 50), (2.0, 2.0)), Level((25, 25), (4.0, 4.0))]
    >>> best_level(levels, 3.9), best_level(levels, 4.0), best_level(levels, 0.5)
    (1, 2, 0)
    """
    fine = [i for i, level in enumerate(levels) if max(level.downsample) <= scale * (1 + EXACT)]
    return max(fine, key=lambda i: levels[i].downsample, default=0)


def origins_px0(n: int, stride_px: float, scale: float) -> npt.NDArray[np.int64]:
    """Return the first `n` grid origins along one axis: round(k * stride * scale), which cannot drift.

    >>> origins_px0(3, 10, 0.25).tolist()
    [0, 2, 5]
    """
    return np.rint(np.arange(n) * (stride_px * scale)).astype(np.int64)


def plane_to_px0(
    xy_px: npt.NDArray[Any], px0_per_px: tuple[float, float], origin_px0: tuple[int, int] = (0, 0)
) -> npt.NDArray[np.float64]:
    """Return points (x, y) of a plane whose pixels cover `px0_per_px` (x, y) px0 in px0, float64, same shape.

    >>> plane_to_px0(np.array([[3, 2]]), (4.0, 8.0), (100, 0)).tolist()
    [[112.0, 16.0]]
    """
    points: npt.NDArray[np.float64] = xy_px * np.asarray(px0_per_px, np.float64) + np.asarray(origin_px0)
    return points


def cells_along(length_px0: int, stride_px: float, scale: float) -> int:
    """Return how many grid origins lie inside an axis of `length_px0` pixels."""
    n = max(1, math.ceil(length_px0 / (stride_px * scale)) + 1)
    return int(np.count_nonzero(origins_px0(n, stride_px, scale) < length_px0))


def to_level(xy_px0: npt.NDArray[np.int64], level: Level) -> npt.NDArray[np.int64]:
    """Return points given in px0, shape (n, 2), as whole level pixels (nearest)."""
    points: npt.NDArray[np.int64] = np.rint(xy_px0 / np.asarray(level.downsample)).astype(np.int64)
    return points


def size_on_level(size_px: tuple[int, int], scale: float, level: Level) -> tuple[int, int]:
    """Return the (width, height) in level pixels of a tile of `size_px` pixels at `scale` px0 per pixel."""
    w, h = (max(1, round(s * scale / d)) for s, d in zip(size_px, level.downsample, strict=True))
    return (w, h)


def achieved_mpp(mpp0: float, level: Level, size_level: tuple[int, int], tile_px: int) -> float:
    """Return the um per pixel that a tile really has after whole-pixel boxes (mean over both axes)."""
    x, y = (d * s / tile_px for d, s in zip(level.downsample, size_level, strict=True))
    return mpp0 * (x + y) / 2

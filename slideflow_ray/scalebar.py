"""What microscopes burn into a micrograph: scale bar, its text, labels on white. Found, so that no model reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Grey = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

BAND = 0.2
"""Furniture lies within this share of the height from the top or the bottom."""
DARK, BRIGHT = 12, 243
"""Burnt-in pixels are at the ends of the range; JPEG moves them by a few values."""

STRAIGHT, LETTERED = 0.97, 0.003
"""A label fills so much of its box, holes aside, and so much of the box is text (or a bar) of the other ink."""


@dataclass(frozen=True)
class Furniture:
    """What was found, boxes as (x, y, width, height) in pixels.

    bar : the scale bar, if there is one; strips : rows to leave out, (first, last + 1) each
    keep : the picture without them
    """

    bar: Box | None
    strips: tuple[tuple[int, int], ...]
    keep: Box

    @property
    def bar_px(self) -> int | None:
        """Length of the bar: the length that its text states, divided by it, is the pixel's size."""
        return self.bar[2] if self.bar else None


def find_furniture(grey: Grey) -> Furniture:
    """Find scale bar, text and labels at the top and the bottom of a micrograph, uint8 (h, w).

    A bar is a filled rectangle at one end of the grey range, at least a twentieth as wide as the image and eight times
    as wide as high. A label is a rectangle of white or black, with straight edges, around text of the other: an
    overexposed lumen is ragged, holds no black, or goes on towards the middle. Rows from the innermost of them to the
    edge are left out. Without any, all is kept.
    """
    height, width = grey.shape
    depth = max(1, int(BAND * height))
    found = [_in_band(grey[:depth][::-1]), _in_band(grey[height - depth :])]  # from the middle of the image outwards
    bars, strips = [], []
    for top, (bar, first) in zip((True, False), found, strict=True):
        if first is None:
            continue
        strips.append((0, depth - first) if top else (height - depth + first, height))
        if bar is not None:
            x, y, w, h = bar
            bars.append((x, depth - y - h, w, h) if top else (x, height - depth + y, w, h))
    low = max((end for start, end in strips if start == 0), default=0)
    high = min((start for start, end in strips if end == height), default=height)
    best = max(bars, key=lambda box: box[2], default=None)
    return Furniture(best, tuple(strips), (0, low, width, high - low))


def _in_band(band: Grey) -> tuple[Box | None, int | None]:
    """Return the bar in a band whose last row is the image's edge, and the first row of all furniture in it."""
    height, width = band.shape
    bar: Box | None = None
    first: int | None = None
    dark, bright = band <= DARK, band >= BRIGHT
    for mask, other in ((dark, bright), (bright, dark)):
        for box, _, solid in _rectangles(
            ndimage.binary_opening(mask, np.ones((3, 12), np.bool_))
        ):  # grains may cling to a bar
            _, y, w, h = box
            if solid >= 0.95 and 0.05 * width <= w < 0.9 * width and w >= 8 * h and h <= 0.12 * height:
                bar = box if bar is None or w > bar[2] else bar
                first = min(y, height if first is None else first)
        for (x, y, w, h), filled, _ in _rectangles(mask):
            label = h >= 0.05 * height and (0.05 * width <= w < 0.98 * width or y + h == height) and y > 0
            if label and filled >= STRAIGHT and other[y : y + h, x : x + w].mean() >= LETTERED:
                first = min(y, height if first is None else first)
    if bar is not None and first is not None:
        first = min(first, _text_above(band, bar))
    return bar, None if first is None else max(0, first - max(2, height // 50))


def _rectangles(mask: npt.NDArray[np.bool_]) -> list[tuple[Box, float, float]]:
    """Components with their boxes, and the share of the box that they fill, with holes (text) and without."""
    labels, _ = ndimage.label(mask)
    found: list[tuple[Box, float, float]] = []
    for number, window in enumerate(ndimage.find_objects(labels), 1):
        if window is None:
            continue
        rows, cols = window
        h, w = rows.stop - rows.start, cols.stop - cols.start
        if w * h < 64 or w < 12:
            continue
        piece: npt.NDArray[Any] = labels[window] == number
        filled = float(ndimage.binary_fill_holes(piece).mean())
        found.append(((cols.start, rows.start, w, h), filled, float(piece.mean())))
    return found


def _text_above(band: Grey, bar: Box) -> int:
    """Return the first row of glyphs that stand over the bar, at most a third of the band away; else the bar's own."""
    height = band.shape[0]
    x, y, w, _ = bar
    top = max(0, y - height // 3)
    over = band[top:y, max(0, x) : x + w]
    first = y
    for mask in (over <= DARK, over >= BRIGHT):
        labels, n = ndimage.label(mask)
        for window in ndimage.find_objects(labels) if n else []:
            if window is None:
                continue
            h, wide = window[0].stop - window[0].start, window[1].stop - window[1].start
            # glyphs: as high as letters are, and no larger; grains of the picture are smaller
            if 0.06 * height <= h <= 0.25 * height and wide <= 2 * h and window[0].start > 0:
                first = min(first, top + window[0].start)
    return first

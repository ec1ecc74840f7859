"""Electron micrographs: any image whose modality is "tem", as the models are to see it.

Coordinates are those of the stored file. Rows with what the microscope burnt in (`scalebar.find_furniture`) are as
what lies beyond the edge: white, no tissue, never scored. The rest is grey, through one linear window from the 0.5th
to the 99.5th percentile of the pixels that are kept, in three equal channels. A coloured picture is no micrograph,
whatever its row says, and is left as it is. All of it depends on nothing but the file: the histogram is exact and
streamed, in blocks of whole rows, so a montage of any size takes little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from slideflow_ray.blocks import Blocks
from slideflow_ray.errors import NoMpp, ReadError, SlideflowError
from slideflow_ray.scalebar import Furniture, find_furniture
from slideflow_ray.slides.base import (
    WHITE,
    Box,
    MppSource,
    Opened,
    Pixels,
    SlideReader,
    Stored,
    describe,
    inside,
    luma,
    on_level,
)

METHOD: Final = 1
"""In the digests of masks and grids: changed when the rules below make other pixels."""

WINDOW: Final = (0.5, 99.5)
"""Percentiles of the pixels that are kept, which become 0 and 255."""

FURNITURE_PX: Final = 4096
"""Furniture is looked for on a copy whose longer side is at most this: each pixel the mean of a whole square."""

BLOCK_PIXELS: Final = 2**24
"""What is read at once when the whole picture is gone through."""

KEYS: Final = 2**16

SAMPLE_PX: Final = 2048
CHROMA: Final = 8
COLOURED: Final = 0.01
"""A grey picture has no chroma but what JPEG leaves and an arrow or two; one with more is no electron micrograph."""

MAX_TONES: Final = 4096

Key = tuple[object, ...]


@runtime_checkable
class HasStored(Protocol):
    """A reader that also gives its pixels as they are stored."""

    def stored(self, level: int, box: Box) -> Stored:
        """Return the values of a box (x0, y0, x1, y1) inside a level, (h, w) or (h, w, 1 to 4), of any real dtype."""
        ...


@dataclass(frozen=True)
class Tone:
    """What was found of a micrograph: its furniture in px0, and the stored values that become 0 and 255."""

    furniture: Furniture
    window: tuple[float, float]


_TONES: dict[Key, Tone] = {}
"""What this process has found of files, by path, time, size and inode."""


class Micrograph(Opened):
    """A SlideReader over the reader of a micrograph."""

    def __init__(self, reader: SlideReader, source: Path | Blocks, mpp_source: MppSource | None = None) -> None:
        self._reader = reader
        self._key = _key(source)
        self._tone: Tone | None = None
        self._grey: bool | None = None
        self.name, self.uri = reader.name, reader.uri
        self.size_px0, self.levels = reader.size_px0, reader.levels
        self.mpp0, self.mpp_source = reader.mpp0, mpp_source or reader.mpp_source

    @property
    def is_grey(self) -> bool:
        """Whether the picture is grey, as a sample says; a coloured one is left as it is. Raises ReadError."""
        if self._grey is None:
            self._grey = not _coloured(self._reader)
        return self._grey

    @property
    def tone(self) -> Tone:
        """The furniture and the window; found once for each file in a process. Raises ReadError."""
        if self._tone is None:
            known = _TONES.get(self._key) or find_tone(self._reader)
            while len(_TONES) >= MAX_TONES:
                _TONES.pop(next(iter(_TONES)), None)
            self._tone = _TONES[self._key] = known
        return self._tone

    @property
    def keep_px0(self) -> Box:
        """What is picture, (x0, y0, x1, y1). Raises ReadError."""
        x, y, w, h = self.tone.furniture.keep
        return x, y, x + w, y + h

    @property
    def about(self) -> dict[str, object]:
        """What is written into stores: `keep_px0`, `window`, `bar_px`, the length of the bar, and the `method`."""
        bar = self.tone.furniture.bar_px
        found = {"keep_px0": list(self.keep_px0), "window": list(self.tone.window), "bar_px": bar}
        return {**found, "method": METHOD}

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """Return a box of a level, grey; see SlideReader.read. Furniture is white, as is what lies outside."""
        if not self.is_grey:
            return self._reader.read(level, xy, size)
        out: Pixels = np.full((size[1], size[0], 3), WHITE, np.uint8)
        x0, y0, x1, y1 = inside(self.levels[level].size, xy, size)
        _, top, _, bottom = on_level(self.keep_px0, self.levels[level])
        y0, y1 = max(y0, top), min(y1, bottom)
        if x1 <= x0 or y1 <= y0:
            return out
        grey = shown(grey_of(self._reader, level, (x0, y0, x1, y1)), self.tone.window)
        out[y0 - xy[1] : y1 - xy[1], x0 - xy[0] : x1 - xy[0]] = grey[..., None]
        return out

    def close(self) -> None:
        """Close the file; reading afterwards raises ReadError."""
        self._reader.close()


def _key(source: Path | Blocks) -> Key:
    """What a file is to this process."""
    if isinstance(source, Blocks):
        return (source.seen.name,)
    about = source.stat()
    return str(source), about.st_mtime_ns, about.st_size, about.st_ino


def no_scale(reader: Micrograph, cause: SlideflowError) -> NoMpp:
    """Return the error of a micrograph of which nothing says the scale: it names the scale bar, if there is one."""
    bar = reader.tone.furniture.bar
    if bar is None:
        return NoMpp(f"{cause.message} No scale bar was found in it.", next_step=NO_BAR)
    x, y, w, _ = bar
    text = f"{cause.message} Its scale bar is {w} pixels long (x {x} to {x + w}, row {y})."
    return NoMpp(
        text, next_step=f"Divide the nm that the bar stands for by {w}: that goes into the cohort as nm_per_px."
    )


NO_BAR: Final = "Add a column `nm_per_px` (or `mpp`, in um) to the cohort and run with --retry."

# grey


def _coloured(reader: SlideReader) -> bool:
    """Whether more than COLOURED of a sample has channels that differ by more than CHROMA of 255."""
    level = len(reader.levels) - 1
    w, h = reader.levels[level].size
    x, y = max(0, (w - SAMPLE_PX) // 2), max(0, (h - SAMPLE_PX) // 2)
    pixels = _stored(reader, level, (x, y, min(w, x + SAMPLE_PX), min(h, y + SAMPLE_PX)))
    if pixels.ndim == 2 or pixels.shape[2] < 3:
        return False
    unit = np.iinfo(pixels.dtype).max / 255 if pixels.dtype.kind in "iu" else float(np.nanmax(pixels)) / 255
    return float((np.ptp(pixels[..., :3], axis=2) > CHROMA * unit).mean()) > COLOURED


def grey_of(reader: SlideReader, level: int, box: Box) -> Stored:
    """Return a box (x0, y0, x1, y1) inside a level in grey, (h, w): as stored where the reader knows. Raises ReadError.

    Colours become luma (ITU-R BT.601), which leaves equal channels as they are.
    """
    return luma(_stored(reader, level, box))


def _stored(reader: SlideReader, level: int, box: Box) -> Stored:
    xy, size = (box[0], box[1]), (box[2] - box[0], box[3] - box[1])
    if not isinstance(reader, HasStored):
        return reader.read(level, xy, size)
    try:
        return reader.stored(level, box)
    except (SlideflowError, MemoryError):
        raise
    except Exception as error:  # codecs raise anything; the cause goes into ours
        raise ReadError(f"{describe(reader.uri, level, xy, size)}: {type(error).__name__}: {error}.") from error


def shown(grey: Stored, window: tuple[float, float]) -> Pixels:
    """Return stored values, (h, w), as uint8 through a window; what is not finite is black.

    >>> shown(np.array([[-5, 0, 10, 30]], np.int16), (0, 20)).tolist()
    [[0, 0, 128, 255]]
    """
    if grey.dtype.itemsize <= 2 and grey.dtype.kind in "iu":
        every = np.arange(2 ** (8 * grey.dtype.itemsize)) + np.iinfo(grey.dtype).min
        table = _scaled(every, window)
        return table[grey.astype(np.int64) - np.iinfo(grey.dtype).min]
    return _scaled(np.where(np.isfinite(grey), grey, window[0]), window)


def _scaled(values: Stored, window: tuple[float, float]) -> Pixels:
    low, high = window
    share = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    pixels: Pixels = np.floor(share * 255 + 0.5).astype(np.uint8)
    return pixels


# furniture and window


def find_tone(reader: SlideReader) -> Tone:
    """Go through a picture once for its range, once for its furniture and once for its window. Raises ReadError."""
    size = reader.size_px0
    furniture = _furniture(reader)
    _, top, _, rows = furniture.keep
    low, high = percentiles(lambda: (grey_of(reader, 0, box) for box in _bands(size, (top, top + rows))), WINDOW)
    return Tone(furniture, (low, high if high > low else low + 1))


def _bands(size: tuple[int, int], rows: tuple[int, int], multiple: int = 1) -> Iterator[Box]:
    """Boxes of whole rows, each about BLOCK_PIXELS, a `multiple` of rows but for the last."""
    step = max(1, BLOCK_PIXELS // (size[0] * multiple)) * multiple
    return ((0, y, size[0], min(y + step, rows[1])) for y in range(rows[0], rows[1], step))


def _furniture(reader: SlideReader) -> Furniture:
    """Find furniture on a copy of at most FURNITURE_PX a side; boxes are in px0."""
    w, h = reader.size_px0
    factor = -(-max(w, h) // FURNITURE_PX)
    ends = _ends(reader)
    rows = []
    for box in _bands((w, h), (0, h), factor):
        rows.append(_means(_ends_shown(grey_of(reader, 0, box), ends), factor))
    found = find_furniture(np.concatenate(rows))
    if factor == 1:
        return found
    strips = tuple((start * factor, min(end * factor, h)) for start, end in found.strips)
    top = max((end for start, end in strips if start == 0), default=0)
    bottom = min((start for start, end in strips if end == h), default=h)
    bar = None if found.bar is None else tuple(v * factor for v in found.bar)
    return Furniture(cast("Box | None", bar), strips, (0, top, w, bottom - top))


def _ends(reader: SlideReader) -> tuple[float, float] | None:
    """The smallest and the largest stored value, which are those of what is burnt in; None for 8 bit, as it is."""
    w, h = reader.size_px0
    low, high = float("inf"), float("-inf")
    for box in _bands((w, h), (0, h)):
        grey = grey_of(reader, 0, box)
        if grey.dtype == np.uint8:
            return None
        grey = grey[np.isfinite(grey)] if grey.dtype.kind == "f" else grey
        if grey.size:
            low, high = min(low, float(grey.min())), max(high, float(grey.max()))
    return low, high


def _ends_shown(grey: Stored, ends: tuple[float, float] | None) -> Pixels:
    """Return 8 bit for the search: as stored, or black and white where a value is at the ends of the range."""
    if ends is None:
        return grey
    out: Pixels = np.full(grey.shape, 128, np.uint8)
    out[grey <= ends[0]] = 0
    out[grey >= ends[1]] = WHITE
    return out


def _means(grey: Pixels, factor: int) -> Pixels:
    """Return the mean of each square of `factor` x `factor` pixels, uint8; at the edges of what there is of it."""
    if factor == 1:
        return grey
    sums = grey.astype(np.uint32)
    counts = np.ones((1, 1), np.uint32)
    for axis in (0, 1):
        starts = np.arange(0, grey.shape[axis], factor)
        sums = np.add.reduceat(sums, starts, axis=axis)
        counts = counts * np.expand_dims(np.diff(np.r_[starts, grey.shape[axis]]), 1 - axis)
    means: Pixels = ((sums + counts // 2) // counts).astype(np.uint8)
    return means


def percentiles(parts: Callable[[], Iterable[Stored]], shares: Sequence[float]) -> tuple[float, ...]:
    """Return for each share (in %) the smallest value at or below which that share of the finite values lies.

    `parts` gives the values anew, piece by piece: once for whole numbers of 8 or 16 bit, twice for others, first
    by the upper and then by the lower half of a 32-bit number that is ordered as they are (float64 is rounded to
    float32). The counts are exact. Without any value all are 0.
    """
    upper = np.zeros(KEYS, np.int64)
    dtype = np.dtype(np.uint8)
    for part in parts():
        dtype = part.dtype
        upper += np.bincount(_upper(part), minlength=KEYS)
    total = int(upper.sum())
    if not total:
        return tuple(0.0 for _ in shares)
    below = np.cumsum(upper)
    ranks = [max(1, math.ceil(total * share / 100)) for share in shares]
    heads = [int(np.searchsorted(below, rank)) for rank in ranks]
    if dtype.kind in "iu" and dtype.itemsize <= 2:
        return tuple(float(head + np.iinfo(dtype).min) for head in heads)
    lower = {head: np.zeros(KEYS, np.int64) for head in heads}
    for part in parts():
        keys = _ordered(part)
        for head, counts in lower.items():
            counts += np.bincount((keys[keys >> 16 == head] & 0xFFFF).astype(np.intp), minlength=KEYS)
    before = [rank - int(below[head] - upper[head]) for rank, head in zip(ranks, heads, strict=True)]
    tails = [int(np.searchsorted(np.cumsum(lower[head]), rank)) for rank, head in zip(before, heads, strict=True)]
    return tuple(float(_value((head << 16) + tail, dtype)) for head, tail in zip(heads, tails, strict=True))


def _upper(values: Stored) -> npt.NDArray[np.intp]:
    """Return the number of each finite value's bin, (n,): the value itself of 8 and 16 bit, else 16 bits of its key."""
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:
        return values.ravel().astype(np.intp) - np.intp(np.iinfo(values.dtype).min)
    return (_ordered(values) >> 16).astype(np.intp)


def _ordered(values: Stored) -> npt.NDArray[np.uint32]:
    """Return numbers in the order of the finite values, uint32 (n,)."""
    flat = values.ravel()
    if flat.dtype.kind == "f":
        bits = flat[np.isfinite(flat)].astype(np.float32).view(np.uint32)
        return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (flat.astype(np.int64) - np.iinfo(flat.dtype).min).astype(np.uint32)


def _value(key: int, dtype: np.dtype[Any]) -> float:
    """Return the value that has a key."""
    if dtype.kind == "f":
        bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
        return float(np.uint32(bits).view(np.float32))
    return float(key + int(np.iinfo(dtype).min))

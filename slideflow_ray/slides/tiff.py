"""TIFF slides: tiffslide finds the pyramid and its scale, and the native tiles are decoded directly.

tiffslide's `read_region` goes through zarr's event loop, which costs more than the
decoding itself; the same pages, decoded one native tile at a time by the same codec,
give the same pixels at 0.9 of the codec's own speed (`benchmarks/`).
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from tiffslide import TiffSlide

from slideflow_ray.blocks import Blocks
from slideflow_ray.errors import BadDimensions, ReadError, SlideflowError, TruncatedSlide
from slideflow_ray.geometry import Level
from slideflow_ray.slides.base import (
    WHITE,
    Box,
    Opened,
    Pixels,
    Unsupported,
    check_size,
    checked_mpp,
    describe,
    inside,
    ome_mpp,
    on_white,
    pyramid,
)
from slideflow_ray.slides.codestream import KNOWN, check_piece

ELSEWHERE = ("is_ndpi", "is_bif", "is_scn", "is_philips")
"""Formats whose geometry tiffslide knows only in part; OpenSlide reads them."""

MAX_SEGMENT_BYTES = 2**26
"""The largest piece that one read may have to decode."""

RGB, GREY, YCBCR = 2, 1, 6
JPEG_CODECS = (6, 7)
ALPHA = (1, 2)
"""What ExtraSamples says of a fourth channel that is alpha, associated or not; another one means nothing to us."""
APERIO_YCBCR = 33003


class TiffReader(Opened):
    """A SlideReader for tiled TIFF (generic, Aperio, OME, ...) of 8-bit RGB, RGBA or grey pixels."""

    name = "tiffslide"

    def __init__(self, uri: str, source: Path | Blocks, mpp: float | None, modality: str | None = None) -> None:
        self.uri = uri
        self._slide = TiffSlide(source if isinstance(source, Blocks) else str(source))
        self._file: LocalFile | Blocks | None = None
        try:
            self._open(source if isinstance(source, Blocks) else LocalFile(source), mpp, modality)
        except BaseException:
            self.close()
            raise

    def _open(self, file: LocalFile | Blocks, mpp: float | None, modality: str | None) -> None:
        self._file = file
        tiff = self._slide.ts_tifffile
        if any(getattr(tiff, name) for name in ELSEWHERE):
            raise Unsupported("its format is only partly known to tiffslide")
        found = self._slide.properties
        self.size_px0: tuple[int, int] = self._slide.dimensions
        check_size(self.uri, self.size_px0, file.size)
        ends = ome_mpp(tiff.ome_metadata or "") or (found.get("tiffslide.mpp-x"), found.get("tiffslide.mpp-y"))
        power = found.get("tiffslide.objective-power")
        self.mpp0, self.mpp_source = checked_mpp(self.uri, mpp, ends, objective=power, modality=modality)
        series = tiff.series[found["tiffslide.series-index"]]
        kept = pyramid(self._slide.level_dimensions)
        self.levels: tuple[Level, ...] = tuple(kept.values())
        self._pages = tuple(_Page(self.uri, series.levels[index], file.size) for index in kept)

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """Return a box of a level; see SlideReader.read."""
        box = inside(self.levels[level].size, xy, size)
        whole = (box[2] - box[0], box[3] - box[1]) == size
        out: Pixels = np.empty((size[1], size[0], 3), np.uint8)
        if not whole:
            out[:] = WHITE
        if box[2] <= box[0] or box[3] <= box[1]:
            return out
        try:
            if self._file is None:
                raise ValueError("the slide is closed")
            if isinstance(self._file, Blocks):
                self._file.want(self._pages[level].pieces(box))
            self._pages[level].read_into(out, xy, box, self._file)
        except (SlideflowError, MemoryError):
            raise
        except Exception as error:  # codecs raise anything; the cause goes into ours
            text = f"{describe(self.uri, level, xy, size)}: {type(error).__name__}: {error}."
            raise ReadError(text) from error
        return out

    def close(self) -> None:
        """Close the file; reading afterwards raises ReadError."""
        self._slide.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def pieces(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (offset, bytes) of the native tiles that a box of a level needs."""
        box = inside(self.levels[level].size, xy, size)
        return self._pages[level].pieces(box) if box[2] > box[0] and box[3] > box[1] else []


class LocalFile(io.FileIO):
    """A local file that is also read at an offset, as `Blocks` are."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.size = os.fstat(self.fileno()).st_size

    def pread(self, count: int, offset: int) -> bytes:
        """Return `count` bytes from `offset` on, fewer at the end of the file."""
        return os.pread(self.fileno(), count, offset)


class _Page:
    """One level's native tiles (or strips): where they stand in the file and how they decode."""

    def __init__(self, uri: str, level: Any, file_bytes: int) -> None:
        if len(level.pages) != 1:
            raise Unsupported(f"a level of it is spread over {len(level.pages)} pages")
        page = level.pages[0]
        frame = page.keyframe
        _check_pixels(frame)
        self._decode, self._compression = frame.decode, int(frame.compression)
        self._tables = page.jpegtables
        self._alpha = any(int(extra) in ALPHA for extra in frame.extrasamples[:1])
        w, h = frame.imagewidth, frame.imagelength
        self._tile = (frame.tilewidth, frame.tilelength) if frame.is_tiled else (w, min(frame.rowsperstrip, h))
        self._across = math.ceil(w / self._tile[0])
        self._offsets, self._counts = page.dataoffsets, page.databytecounts
        needed = self._across * math.ceil(h / self._tile[1])
        if len(self._offsets) < needed or len(self._counts) < needed:
            raise BadDimensions(f"{uri}: a level of {w:,} x {h:,} pixels needs {needed:,} tiles, its table has fewer.")
        if self._tile[0] * self._tile[1] * frame.samplesperpixel > MAX_SEGMENT_BYTES:
            raise Unsupported(f"a level of it is one piece of {self._tile[0]:,} x {self._tile[1]:,} pixels")
        offsets, counts = np.asarray(self._offsets, np.uint64), np.asarray(self._counts, np.uint64)
        beyond = np.maximum(offsets, counts) > file_bytes  # before they are added: sums wrap around
        if beyond.any() or int((offsets + counts).max(initial=0)) > file_bytes:
            raise TruncatedSlide(f"{uri} has {file_bytes:,} bytes, but its tiles reach beyond them.")

    def pieces(self, box: Box) -> list[tuple[int, int]]:
        """Return (offset, bytes) of the native tiles in a box (level pixels, inside the level)."""
        tw, th = self._tile
        rows, cols = range(box[1] // th, (box[3] - 1) // th + 1), range(box[0] // tw, (box[2] - 1) // tw + 1)
        indices = [row * self._across + col for row in rows for col in cols]
        return [(int(self._offsets[i]), int(self._counts[i])) for i in indices]

    def read_into(self, out: Pixels, xy: tuple[int, int], box: Box, file: LocalFile | Blocks) -> None:
        """Copy the pixels of `box` (level pixels, inside the level) to `out`, whose corner stands at `xy`."""
        tw, th = self._tile
        for row in range(box[1] // th, (box[3] - 1) // th + 1):
            for col in range(box[0] // tw, (box[2] - 1) // tw + 1):
                x0, y0 = max(box[0], col * tw), max(box[1], row * th)
                x1, y1 = min(box[2], col * tw + tw), min(box[3], row * th + th)
                target = out[y0 - xy[1] : y1 - xy[1], x0 - xy[0] : x1 - xy[0]]
                tile = self._native(row * self._across + col, file)
                if tile is None:
                    target[:] = WHITE
                else:
                    target[:] = tile[y0 - row * th : y1 - row * th, x0 - col * tw : x1 - col * tw]

    def _native(self, index: int, file: LocalFile | Blocks) -> Pixels | None:
        offset, count = self._offsets[index], self._counts[index]
        if not offset or not count:
            return None
        data = file.pread(count, offset)
        if len(data) != count:
            raise EOFError(f"native tile {index} has {len(data)} of {count} bytes")
        check_piece(data, self._compression, self._tile)
        tile: Pixels = self._decode(data, index, jpegtables=self._tables)[0][0]
        if tile.shape[2] == 4:
            return on_white(tile) if self._alpha else np.ascontiguousarray(tile[..., :3])
        return tile


def _check_pixels(frame: Any) -> None:
    """Raise Unsupported unless the level holds 8-bit RGB, RGBA or grey pixels that decode to RGB."""
    if frame.dtype != np.uint8 or frame.bitspersample != 8:
        raise Unsupported(f"its pixels are {frame.bitspersample}-bit {frame.dtype}, not 8-bit colour")
    if frame.samplesperpixel not in (1, 3, 4) or (frame.planarconfig != 1 and frame.samplesperpixel > 1):
        raise Unsupported(f"its {frame.samplesperpixel} channels are not RGB side by side")
    jpeg = frame.photometric == YCBCR and frame.compression in JPEG_CODECS
    if frame.photometric not in (RGB, GREY) and not jpeg:
        raise Unsupported(f"its colours are stored as {frame.photometric!s}")
    if int(frame.compression) not in KNOWN:
        raise Unsupported(f"its compression ({int(frame.compression)}) is not known")
    if frame.compression == APERIO_YCBCR:
        raise Unsupported("its JPEG 2000 tiles hold YCbCr")

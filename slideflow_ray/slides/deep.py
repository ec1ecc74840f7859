"""TIFF of any real values, read piece by piece as it is stored: montages of 16 bit, and real numbers of any size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import tifffile

from slideflow_ray.errors import BadDimensions, ReadError, TruncatedSlide
from slideflow_ray.geometry import Level
from slideflow_ray.slides.base import Box, Opened, Pixels, Stored, Unsupported, check_size, checked_mpp
from slideflow_ray.slides.codestream import KNOWN, check_piece

MAX_PIECE_BYTES: Final = 2**26
"""The largest piece that one read may have to decode; a strip of all rows is above it."""

GREY: Final = 1


class DeepReader(Opened):
    """A SlideReader over one grey page of 16 or 32 bit; its values are read with `stored`. Raises Unsupported."""

    name = "tifffile"

    def __init__(self, uri: str, path: Path, mpp: float | None, found: tuple[object, object]) -> None:
        self.uri = uri
        self._tiff = tifffile.TiffFile(path)
        try:
            self._open(path, mpp, found)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, mpp: float | None, found: tuple[object, object]) -> None:
        page: Any = self._tiff.pages[0]
        _check(page, len(self._tiff.series[0].pages))
        w, h = int(page.imagewidth), int(page.imagelength)
        size = path.stat().st_size
        check_size(self.uri, (w, h), size)
        tile = (page.tilewidth, page.tilelength) if page.is_tiled else (w, min(page.rowsperstrip, h))
        if tile[0] * tile[1] * page.dtype.itemsize > MAX_PIECE_BYTES:
            raise Unsupported(f"it is stored in pieces of {tile[0]:,} x {tile[1]:,} pixels")
        needed = math.ceil(w / tile[0]) * math.ceil(h / tile[1])
        offsets, counts = page.dataoffsets, page.databytecounts
        if min(len(offsets), len(counts)) < needed:
            raise BadDimensions(f"{self.uri}: {w:,} x {h:,} pixels need {needed:,} pieces, its table has fewer.")
        if max(a + b for a, b in zip(offsets, counts, strict=False)) > size:
            raise TruncatedSlide(f"{self.uri} has {size:,} bytes, but its pieces reach beyond them.")
        self._page, self._piece, self._across = page, tile, math.ceil(w / tile[0])
        self.size_px0 = (w, h)
        self.mpp0, self.mpp_source = checked_mpp(self.uri, mpp, found, modality="tem")
        self.levels: tuple[Level, ...] = (Level(self.size_px0, (1.0, 1.0)),)

    def stored(self, level: int, box: Box) -> Stored:
        """Return the values of a box (x0, y0, x1, y1), (h, w)."""
        out: Stored = np.empty((box[3] - box[1], box[2] - box[0]), self._page.dtype)
        tw, th = self._piece
        for row in range(box[1] // th, (box[3] - 1) // th + 1):
            for col in range(box[0] // tw, (box[2] - 1) // tw + 1):
                x0, y0 = max(box[0], col * tw), max(box[1], row * th)
                x1, y1 = min(box[2], col * tw + tw), min(box[3], row * th + th)
                piece = self._decoded(row * self._across + col)
                part = piece[y0 - row * th : y1 - row * th, x0 - col * tw : x1 - col * tw]
                out[y0 - box[1] : y1 - box[1], x0 - box[0] : x1 - box[0]] = part
        inverted = self._page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        return np.iinfo(out.dtype).max - out if inverted and out.dtype.kind == "u" else out

    def _decoded(self, index: int) -> Stored:
        offset, count = self._page.dataoffsets[index], self._page.databytecounts[index]
        if not offset or not count:
            return np.zeros(self._piece[::-1], self._page.dtype)
        handle = self._tiff.filehandle
        handle.seek(offset)
        data = handle.read(count)
        if len(data) != count:
            raise EOFError(f"piece {index} has {len(data)} of {count} bytes")
        check_piece(data, int(self._page.compression), self._piece)
        values: Stored = self._page.decode(data, index, jpegtables=self._page.jpegtables)[0]
        return values.reshape(values.shape[-3:-1])

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """Raise ReadError: without a window there are no pixels."""
        raise ReadError(f"{self.uri} is read as a micrograph alone.")

    def close(self) -> None:
        """Close the file; reading afterwards raises ReadError."""
        self._tiff.close()


def _check(page: Any, pages: int) -> None:
    """Raise Unsupported for what is no single grey page of 16 or 32 bit."""
    if pages != 1 or page.imagedepth > 1:
        raise Unsupported(f"it is a stack of {pages} pages")
    deep = (
        page.dtype is not None
        and page.dtype.kind in "iuf"
        and page.dtype.itemsize in (1, 2, 4, 8 * (page.dtype.kind == "f"))
    )
    if not deep or page.bitspersample != 8 * page.dtype.itemsize:
        raise Unsupported(f"its pixels are {page.bitspersample}-bit {page.dtype}")
    if page.samplesperpixel != 1 or int(page.photometric) not in (0, GREY):
        raise Unsupported(f"its {page.samplesperpixel} channels are {page.photometric!s}")
    if int(page.compression) not in KNOWN:
        raise Unsupported(f"its compression ({int(page.compression)}) is not known")

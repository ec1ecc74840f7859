"""The size that a compressed piece says it has, read from its header: a decoder would allocate it first."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

JPEG, JPEG_2000, WEBP = frozenset((6, 7)), frozenset((33003, 33005, 34712)), frozenset((50001,))
"""TIFF's numbers of the compressions whose pieces bring a size of their own."""

KNOWN = frozenset((1, 5, 8, 32773, 32946, 50000)) | JPEG | JPEG_2000 | WEBP
"""None, LZW, deflate, PackBits and zstd besides: they decode into a buffer of the tile's size."""

JPEG_SIZE = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG after which its size stands."""

HEAD = 2**16


def jpeg_size(data: bytes, segments: int = 10_000) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG's frame header, walking at most so many segments; None where there is none."""
    at = 2
    for _ in range(segments):
        while data[at : at + 2] == b"\xff\xff":  # padding
            at += 1
        if at + 9 > len(data) or data[at] != 0xFF:
            return None
        if data[at + 1] in JPEG_SIZE:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return int(width), int(height)
        at += 2 + max(2, struct.unpack_from(">H", data, at + 2)[0])
    return None


def coded_size(data: bytes, compression: int) -> tuple[int, int] | None:
    """Return (width, height) that a JPEG, JPEG 2000 or WebP piece says it has; None where it does not."""
    if compression in JPEG:
        return jpeg_size(data)
    if compression in JPEG_2000:
        return _jpeg_2000_size(data)
    return _webp_size(data) if compression in WEBP else None


def check_piece(data: bytes, compression: int, most: tuple[int, int]) -> None:
    """Raise ValueError where a piece would decode to more than `most` (width, height) pixels, or says no size."""
    if compression not in JPEG | JPEG_2000 | WEBP:
        return
    size = coded_size(data, compression)
    if size is None:
        raise ValueError("a compressed tile does not say its size")
    if min(size) < 1 or size[0] > most[0] or size[1] > most[1]:
        raise ValueError(f"a tile of {most[0]} x {most[1]} pixels says that it has {size[0]:,} x {size[1]:,}")


def check_pieces(path: Path, page: Any, most: tuple[int, int]) -> None:
    """Raise ValueError where a piece of one of tifffile's pages is none that it says it is; see `check_piece`."""
    compression = int(page.compression)
    if compression not in KNOWN:
        raise ValueError(f"its compression ({compression}) is not known")
    if compression in JPEG | JPEG_2000 | WEBP:
        with path.open("rb") as file:
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
                if offset and count:
                    file.seek(offset)
                    check_piece(file.read(min(count, HEAD)), compression, most)


def _jpeg_2000_size(data: bytes) -> tuple[int, int] | None:
    """SIZ stands first in a code stream (ITU-T T.800, A.5.1): its far corner less its offset."""
    at = data.find(b"\xff\x4f\xff\x51", 0, HEAD)
    if at < 0 or len(data) < at + 24:
        return None
    right, bottom, left, top = struct.unpack_from(">IIII", data, at + 8)
    return right - left, bottom - top


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """The three kinds of a first chunk: lossy, lossless, extended (RFC 9649)."""
    kind, body = data[12:16], data[20:30]
    if data[:4] != b"RIFF" or len(body) < 10:
        return None
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    return None

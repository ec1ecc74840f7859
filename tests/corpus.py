"""Malformed and hostile files, each a base with a small change, and the code of the error that each must end in.

Nothing binary is kept: `CASES` says how each file is made. `Worker` opens them in a process of limited memory
(`corpus_worker.py`) that handles one file after the other, measures each, and is replaced when it dies.
"""

from __future__ import annotations

import io
import json
import math
import os
import resource
import select
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
Make = Callable[[Path], Path]
OK = "ok"


@dataclass(frozen=True)
class Case:
    """One file: `kind` is what reads it, `code` how that must end ("ok": it is read, and does no harm)."""

    name: str
    kind: str
    code: str
    make: Make


CASES: list[Case] = []


def add(kind: str, name: str, code: str, make: Make) -> None:
    CASES.append(Case(f"{kind}-{name}", kind, code, make))


def content(name: str, data: bytes | str | Callable[[], bytes | str]) -> Make:
    def make(folder: Path) -> Path:
        said = data() if callable(data) else data
        (folder / name).write_bytes(said.encode() if isinstance(said, str) else said)
        return folder / name

    return make


# TIFF

FORMATS = {1: "B", 2: "c", 3: "H", 4: "I", 5: "I", 7: "B", 11: "f", 12: "d", 13: "I", 16: "Q"}
Tag = tuple[int, Any]
Page = dict[int, Tag]
"""Tag number -> (type, values); a value of bytes is written as it is. `OFFSETS` and COUNTS follow from TILES."""

TILES = -1
W, H, DESCRIPTION, SOFTWARE = 256, 257, 270, 305
COMPRESSION, PHOTOMETRIC, SAMPLES, BITS, PLANAR = 259, 262, 277, 258, 284
XRES, YRES, UNIT, TW, TH, OFFSETS, COUNTS, SUBIFDS, JPEGTABLES = 282, 283, 296, 322, 323, 324, 325, 330, 347
SIDE = 256


def page(w: int = 512, h: int = 512, tile: bytes | None = None, **more: Any) -> Page:
    """One directory of a sound slide: grey-noise RGB tiles of 256 x 256, deflate, 0.5 um per pixel."""
    n = math.ceil(w / SIDE) * math.ceil(h / SIDE)
    rng = np.random.default_rng(0)
    data = zlib.compress(rng.integers(0, 9, (SIDE, SIDE, 3), np.uint8).tobytes(), 1) if tile is None else tile
    return {
        W: (4, [w]),
        H: (4, [h]),
        BITS: (3, [8, 8, 8]),
        COMPRESSION: (3, [8]),
        PHOTOMETRIC: (3, [2]),
        SAMPLES: (3, [3]),
        XRES: (5, [20000, 1]),
        YRES: (5, [20000, 1]),
        PLANAR: (3, [1]),
        UNIT: (3, [3]),
        TW: (3, [SIDE]),
        TH: (3, [SIDE]),
        TILES: (0, [data] * n),
    }


def tiff(*pages: Page, big: bool = False, link: Mapping[int, int] | None = None) -> bytes:
    """Return a TIFF of these directories; `link` sets where directory i says the next one stands (an offset)."""
    out = bytearray(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if big else struct.pack("<2sHI", b"II", 42, 0))
    field = 8 if big else 4
    at = len(out) - field
    for index, given in enumerate(pages):
        tags = dict(given)
        _, tiles = tags.pop(TILES, (0, []))
        offsets, seen = [], {}
        for tile in tiles:
            if tile not in seen:
                seen[tile] = len(out)
                out += tile
            offsets.append(seen[tile])
        if tiles:
            tags.setdefault(OFFSETS, (16 if big else 4, offsets))
            tags.setdefault(COUNTS, (16 if big else 4, [len(t) for t in tiles]))
        entries = []
        for tag, (kind, values) in sorted(tags.items()):
            count, blob = _packed(kind, values)
            if len(blob) > field:
                place, blob = len(out), blob + b"\0" * (len(blob) % 2)
                out += blob
                blob = struct.pack("<Q" if big else "<I", place)
            entries.append(struct.pack("<HHQ" if big else "<HHI", tag, kind, count) + blob.ljust(field, b"\0"))
        struct.pack_into("<Q" if big else "<I", out, at, (link or {}).get(-1, len(out)) if index == 0 else len(out))
        if link and index - 1 in link:
            struct.pack_into("<Q" if big else "<I", out, at, link[index - 1])
        out += struct.pack("<Q" if big else "<H", len(entries)) + b"".join(entries)
        at = len(out)
        out += b"\0" * field
    if link and len(pages) - 1 in link:
        struct.pack_into("<Q" if big else "<I", out, at, link[len(pages) - 1])
    return bytes(out)


def _packed(kind: int, values: Any) -> tuple[int, bytes]:
    """(count, bytes); a tuple (count, bytes) is taken as it is, so a header may claim what is not there."""
    if isinstance(values, tuple):
        return values
    if isinstance(values, bytes):
        return len(values), values
    blob = struct.pack(f"<{len(values)}{FORMATS[kind]}", *values)
    return len(values) // (2 if kind == 5 else 1), blob


def base() -> bytes:
    return tiff(page(), page(256, 256))


def changed(first: Mapping[int, Tag | None], *, big: bool = False, tile: bytes | None = None) -> Callable[[], bytes]:
    """A slide whose first directory has other tags; None leaves a tag out."""

    def make() -> bytes:
        tags = {**page(tile=tile), **first}
        return tiff({k: v for k, v in tags.items() if v is not None}, page(256, 256, tile=tile), big=big)

    return make


def _slide(name: str, code: str, data: bytes | Callable[[], bytes], suffix: str = ".tif") -> None:
    add("slide", name, code, content(f"slide{suffix}", data))


def _noise(side: int = SIDE) -> bytes:
    return np.random.default_rng(1).integers(0, 255, (side, side, 3), np.uint8).tobytes()


def _jpeg(w: int = SIDE, h: int = SIDE) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE, 3), 90, np.uint8)).save(buffer, "JPEG", dpi=(50800, 50800))
    data = bytearray(buffer.getvalue())
    where = data.find(b"\xff\xc0")
    data[where + 5 : where + 9] = struct.pack(">HH", h, w)
    return bytes(data)


def _png(w: int = 64, h: int = 64, *, dpi: int = 50800, body: bytes | None = None, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"".join(b"\0" + b"\x60" * (3 * w) for _ in range(h)), 9) if body is None else body
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    scale = chunk(b"pHYs", struct.pack(">IIB", round(dpi / 0.0254), round(dpi / 0.0254), 1))
    return b"\x89PNG\r\n\x1a\n" + head + scale + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _text_bomb() -> bytes:
    """A compressed text chunk of a PNG that becomes 200 MB."""
    data = b"k\0\0" + zlib.compress(b"a" * 200_000_000, 9)
    return struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))


def _many_directories(n: int) -> bytes:
    out = bytearray(base())
    one = struct.pack("<HHHII", 1, 254, 4, 1, 0)
    size = len(one) + 4
    last = _chain_end(out)
    start = len(out)
    struct.pack_into("<I", out, last, start)
    body = np.zeros((n, size), np.uint8)
    body[:, : len(one)] = np.frombuffer(one, np.uint8)
    nexts = (start + size * np.arange(1, n + 1)).astype("<u4")
    nexts[-1] = 0
    body[:, len(one) :] = nexts.view(np.uint8).reshape(n, 4)
    return bytes(out) + body.tobytes()


def _chain_end(data: bytes) -> int:
    (at,) = struct.unpack_from("<I", data, 4)
    while True:
        (n,) = struct.unpack_from("<H", data, at)
        end = at + 2 + 12 * n
        (at,) = struct.unpack_from("<I", data, end)
        if not at:
            return end


def _looped(back: int) -> bytes:
    data = bytearray(base())
    first = struct.unpack_from("<I", data, 4)[0]
    end = _chain_end(data)
    struct.pack_into("<I", data, end, [first, end - 2 - 12 * 14][back])
    return bytes(data)


def _subifds(n: int) -> bytes:
    """A directory that is its own child, n times."""
    at = struct.unpack_from("<I", tiff({**page(), SUBIFDS: (13, [0] * n)}), 4)[0]
    return tiff({**page(), SUBIFDS: (13, [at] * n)})


def _many_tags(n: int) -> bytes:
    data = bytearray(base())
    at = struct.unpack_from("<I", data, 4)[0]
    struct.pack_into("<H", data, at, n)
    return bytes(data) + b"\0" * (12 * n if n < 10_000 else 0)


def _cut(share: float) -> bytes:
    """The directories first, as a scanner's file ends in them: here the whole file is cut."""
    data = base()
    return data[: max(9, round(len(data) * share))]


def _sparse(size: int) -> Make:
    def make(folder: Path) -> Path:
        path = folder / "sparse.tif"
        with path.open("wb") as file:
            file.write(b"II*\0\x08\0\0\0")
            file.truncate(size)
        return path

    return make


HUGE = 2**31 - 1


def slides() -> None:
    for share in (0.01, 0.1, 0.25, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999):
        _slide(f"cut-{share}", "E_TRUNCATED", lambda share=share: _cut(share))
    _slide("empty", "E_NOT_A_SLIDE", b"")
    _slide("eight-bytes", "E_TRUNCATED", b"II*\0\x08\0\0\0")
    _slide("two-bytes", "E_NOT_A_SLIDE", b"II")
    _slide("no-directory", "E_NOT_A_SLIDE", b"II*\0\0\0\0\0" + b"\0" * 100)
    _slide("random", "E_NOT_A_SLIDE", lambda: np.random.default_rng(2).bytes(70_000), ".svs")
    _slide("text", "E_NOT_A_SLIDE", b"not a slide\n" * 50, ".svs")
    _slide("random-after-header", "E_TRUNCATED", lambda: b"II*\0\x08\0\0\0" + np.random.default_rng(3).bytes(9000))
    for i in range(2):
        _slide(f"loop-{i}", "E_DIMENSIONS", lambda i=i: _looped(i))
    _slide("loop-subifds", "E_DIMENSIONS", lambda: _subifds(1))
    _slide("subifds-many", "E_DIMENSIONS", lambda: _subifds(100_000))
    _slide("subifds-beyond", "E_TRUNCATED", changed({SUBIFDS: (13, [2**31])}))
    _slide("directories-million", "E_DIMENSIONS", lambda: _many_directories(1_000_000))
    _slide("directories-5000", "E_DIMENSIONS", lambda: _many_directories(5_000))
    _slide("directory-of-65535-tags", "E_TRUNCATED", lambda: _many_tags(65_535))
    _slide("directory-of-5000-tags", "E_DIMENSIONS", lambda: _many_tags(5_000))
    _slide("next-directory-beyond", "E_TRUNCATED", lambda: tiff(page(), link={0: 2**31}))
    for name, tags in {
        "width-0": {W: (4, [0])},
        "height-0": {H: (4, [0])},
        "width-huge": {W: (4, [HUGE])},
        "height-huge": {H: (4, [2**32 - 1])},
        "both-million": {W: (4, [10**6]), H: (4, [10**6])},
        "both-65535": {W: (3, [65535]), H: (3, [65535])},
        "wide-million": {W: (4, [999_999])},
        "tile-0": {TW: (3, [0])},
        "tile-height-0": {TH: (3, [0])},
        "tile-both-0": {TW: (3, [0]), TH: (3, [0])},
        "tile-huge": {TW: (4, [HUGE]), TH: (4, [HUGE])},
        "tile-60000": {TW: (4, [60_000]), TH: (4, [60_000])},
        "tile-wide": {TW: (4, [2**30])},
        "tile-1": {TW: (3, [1]), TH: (3, [1])},
        "tile-16000": {TW: (4, [16_000]), TH: (4, [16_000])},
        "samples-65535": {SAMPLES: (3, [65535])},
        "samples-0": {SAMPLES: (3, [0])},
    }.items():
        _slide(name, "E_DIMENSIONS", changed(tags))
    far = 10**9
    for name, tags in {
        "offsets-beyond": {OFFSETS: (4, [far] * 4)},
        "one-offset-beyond": {OFFSETS: (4, [8, 8, 8, far])},
        "counts-beyond": {COUNTS: (4, [far] * 4)},
        "offset-4g": {OFFSETS: (4, [2**32 - 1] * 4)},
    }.items():
        _slide(name, "E_TRUNCATED", changed(tags))
    for name, tags in {
        "counts-2^63": {COUNTS: (16, [2**63] * 4)},
        "counts-2^64-1": {COUNTS: (16, [2**64 - 1] * 4)},
        "offsets-2^63": {OFFSETS: (16, [2**63] * 4)},
        "both-wrap-around": {OFFSETS: (16, [2**63] * 4), COUNTS: (16, [2**63] * 4)},
        "sum-wraps": {OFFSETS: (16, [2**64 - 100] * 4), COUNTS: (16, [200] * 4)},
        "tag-count-2^63": {OFFSETS: (16, (2**63, struct.pack("<Q", 16)))},
        "description-2^62": {DESCRIPTION: (2, (2**62, struct.pack("<Q", 16)))},
    }.items():
        _slide(f"big-{name}", "E_TRUNCATED", changed(tags, big=True))
    _slide("tag-count-2^32", "E_TRUNCATED", changed({OFFSETS: (4, (2**32 - 1, struct.pack("<I", 8)))}))
    _slide("description-beyond", "E_TRUNCATED", changed({DESCRIPTION: (2, (2**30, struct.pack("<I", 8)))}))
    _slide("description-60mb", "E_DIMENSIONS", changed({DESCRIPTION: (2, letters(60_000_000))}))
    _slide("offsets-too-few", "E_DIMENSIONS", changed({OFFSETS: (4, [8]), COUNTS: (4, [8])}))
    _slide("offsets-million", "E_DIMENSIONS", changed({OFFSETS: (4, [8] * 10**6), COUNTS: (4, [8] * 10**6)}))
    _slide("no-offsets", "E_DIMENSIONS", lambda: tiff({k: v for k, v in page().items() if k != TILES}))
    _slide("offsets-0", OK, changed({OFFSETS: (4, [0] * 4), COUNTS: (4, [0] * 4)}))
    for name, value, code in (
        ("none", 1, "E_READ"),
        ("lzw", 5, "E_READ"),
        ("jpeg", 7, "E_READ"),
        ("jp2", 33005, "E_READ"),
        ("packbits", 32773, "E_READ"),
        ("zstd", 50000, "E_READ"),
        ("webp", 50001, "E_READ"),
        ("unknown", 12345, "E_READ"),
        ("65535", 65535, "E_READ"),
        ("fax", 4, "E_READ"),
    ):
        _slide(f"compression-{name}", code, changed({COMPRESSION: (3, [value])}))
    _slide("bits-16-says-8", "E_READ", changed({BITS: (3, [16, 16, 16])}))
    _slide("bits-0", "E_NOT_A_SLIDE", changed({BITS: (3, [0, 0, 0])}))
    _slide("bits-65535", "E_READ", changed({BITS: (3, [65535] * 3)}))
    _slide("photometric-unknown", "E_READ", changed({PHOTOMETRIC: (3, [999])}))
    for name, w, h in (("larger", 1024, 1024), ("equal", 512, 512), ("absurd", 3, 500), ("tiny", 1, 1)):
        _slide(f"level-{name}", OK, lambda w=w, h=h: tiff(page(), page(w, h)))
    _slide("level-huge", "E_DIMENSIONS", lambda: tiff(page(), {**page(256, 256), W: (4, [HUGE]), H: (4, [HUGE])}))
    _slide("level-tile-0", "E_DIMENSIONS", lambda: tiff(page(), {**page(256, 256), TW: (3, [0])}))
    _slide("levels-200", OK, lambda: tiff(page(), *(page(256, 256) for _ in range(200))))
    add("slide", "sparse-4gb", "E_DIMENSIONS", _sparse(2**32))
    bombs()
    scales()


def letters(n: int) -> bytes:
    return b"a" * n


def bombs() -> None:
    zeros = 600_000_000
    _slide("bomb-deflate", "E_READ", lambda: changed({}, tile=zlib.compress(b"\0" * zeros, 9))())
    _slide("bomb-lzw", "E_READ", lambda: changed({COMPRESSION: (3, [5])}, tile=_lzw_zeros(80_000_000))())
    _slide("bomb-packbits", "E_READ", changed({COMPRESSION: (3, [32773])}, tile=b"\x81\0" * 3_000_000))
    for w, h in ((65500, 65500), (65500, 1), (8192, 8192), (255, 256), (0, 0)):
        tags = {COMPRESSION: (3, [7]), PHOTOMETRIC: (3, [6])}
        _slide(f"bomb-jpeg-{w}x{h}", "E_READ", lambda w=w, h=h, tags=tags: changed(tags, tile=_jpeg(w, h))())
    _slide("bomb-zstd", "E_READ", lambda: changed({COMPRESSION: (3, [50000])}, tile=_zstd(zeros))())
    _slide("bomb-jp2", "E_READ", lambda: changed({COMPRESSION: (3, [33005])}, tile=_jp2(60_000))())
    _slide("bomb-webp", "E_READ", lambda: changed({COMPRESSION: (3, [50001])}, tile=_webp(16_000))())
    _slide("deflate-short", "E_READ", changed({}, tile=zlib.compress(b"\0" * 100)))
    _slide("deflate-garbage", "E_READ", changed({}, tile=b"\x78\x9c" + b"\xff" * 500))
    _slide("deflate-empty-tile", "E_READ", changed({}, tile=b"\x78"))


def _lzw_zeros(n: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.lzw_encode(bytes(n)))


def _zstd(n: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.zstd_encode(bytes(n)))


def _jp2(side: int) -> bytes:
    import imagecodecs

    data = bytearray(imagecodecs.jpeg2k_encode(np.zeros((64, 64, 3), np.uint8), codecformat="j2k"))
    at = data.find(b"\xff\x51")
    for offset in (6, 10, 22, 26):
        struct.pack_into(">I", data, at + offset, side)
    return bytes(data)


def _webp(side: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.webp_encode(np.zeros((side, side, 3), np.uint8), lossless=True, level=0))


def scales() -> None:
    half = {
        "no-unit": ({UNIT: (3, [1])}, "E_NO_MPP"),
        "no-resolution": ({XRES: None, YRES: None}, "E_NO_MPP"),
        "only-x": ({YRES: None}, "E_NO_MPP"),
        "unknown-unit": ({UNIT: (3, [77])}, "E_NO_MPP"),
        "72dpi": ({XRES: (5, [72, 1]), YRES: (5, [72, 1]), UNIT: (3, [2])}, "E_BAD_MPP"),
        "zero": ({XRES: (5, [0, 1]), YRES: (5, [0, 1])}, "E_NO_MPP"),
        "by-zero": ({XRES: (5, [1, 0]), YRES: (5, [1, 0])}, "E_NO_MPP"),
        "zero-by-zero": ({XRES: (5, [0, 0]), YRES: (5, [0, 0])}, "E_NO_MPP"),
        "tiny-cm": ({XRES: (5, [2**32 - 1, 1]), YRES: (5, [2**32 - 1, 1])}, "E_BAD_MPP"),
        "huge-cm": ({XRES: (5, [1, 2**32 - 1]), YRES: (5, [1, 2**32 - 1])}, "E_BAD_MPP"),
        "tiny-inch": ({XRES: (5, [2**32 - 1, 1]), YRES: (5, [2**32 - 1, 1]), UNIT: (3, [2])}, "E_BAD_MPP"),
        "x-is-not-y": ({YRES: (5, [40000, 1])}, "E_BAD_MPP"),
        "float-nan": ({XRES: (11, [math.nan]), YRES: (11, [math.nan])}, "E_BAD_MPP"),
        "float-inf": ({XRES: (12, [math.inf]), YRES: (12, [math.inf])}, "E_BAD_MPP"),
        "text": ({XRES: (2, b"many\0"), YRES: (2, b"many\0")}, "E_NO_MPP"),
    }
    for name, (tags, code) in half.items():
        _slide(f"mpp-{name}", code, changed(tags))
    for name, said, code in (
        ("aperio-nan", "nan", "E_BAD_MPP"),
        ("aperio-inf", "inf", "E_BAD_MPP"),
        ("aperio-minus", "-0.5", "E_BAD_MPP"),
        ("aperio-zero", "0", "E_BAD_MPP"),
        ("aperio-1e308", "1e308", "E_BAD_MPP"),
        ("aperio-words", "a lot", "E_BAD_MPP"),
        ("aperio-digits", "9" * 5000, "E_BAD_MPP"),
    ):
        text = f"Aperio Image Library v11\r\n512x512 [0,0 512x512] (256x256)|AppMag = 20|MPP = {said}\0"
        _slide(f"mpp-{name}", code, changed({DESCRIPTION: (2, text.encode())}), ".svs")
    for unit, size in (("km", "1"), ("pixel", "1"), ("m", "0.5"), ("nm", "1e-9"), ("\u00b5m", "NaN"), ("mm", "INF")):
        code = "E_BAD_MPP"
        _slide(f"mpp-ome-{ascii(unit)[1:-1]}-{size}", code, changed({DESCRIPTION: (2, _ome(size, unit))}), ".ome.tif")


def _ome(size: str, unit: str, pixels: str = "") -> bytes:
    said = "".join(f'PhysicalSize{a}="{size}" PhysicalSize{a}Unit="{unit}" ' for a in "XY")
    return (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="512" SizeY="512" '
        f'SizeC="3" SizeZ="1" SizeT="1" {said}{pixels}><Channel ID="Channel:0:0" SamplesPerPixel="3"/>'
        '<TiffData IFD="0"/></Pixels></Image></OME>\0'
    ).encode()


LAUGHS = "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(12))
BILLION = f'<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY a0 "ha">{LAUGHS}]>'


def xml_slides() -> None:
    bomb = BILLION + _ome("0.5", "um").decode().split("?>", 1)[1].replace("Channel:0:0", "&a12;")
    outside = '<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    outside += _ome("0.5", "um").decode().split("?>", 1)[1].replace("Channel:0:0", "&x;")
    deep = "<OME>" * 200_000 + "</OME>" * 200_000
    wide = _ome("0.5", "um").decode().replace('SizeT="1"', 'SizeT="100000000"')
    _slide("ome-billion-laughs", "E_NOT_A_SLIDE", changed({DESCRIPTION: (2, bomb.encode())}), ".ome.tif")
    _slide("ome-external-entity", "E_NOT_A_SLIDE", changed({DESCRIPTION: (2, outside.encode())}), ".ome.tif")
    _slide("ome-deep", "E_NO_MPP", changed({DESCRIPTION: (2, deep.encode()), UNIT: (3, [1])}), ".ome.tif")
    _slide("ome-time-points", "E_NOT_A_SLIDE", changed({DESCRIPTION: (2, wide.encode())}), ".ome.tif")
    laughs = BILLION.replace("DOCTYPE OME", "DOCTYPE DataObject") + "<DataObject>&a12;</DataObject>"
    philips = {DESCRIPTION: (2, laughs.encode()), SOFTWARE: (2, b"Philips DP v1.0\0")}
    _slide("philips-billion-laughs", "E_NOT_A_SLIDE", changed(philips))


# DICOM, MIRAX, Hamamatsu


def other_slides() -> None:
    head = b"\0" * 128 + b"DICM"
    meta = b"\x02\x00\x00\x00UL\x04\x00" + struct.pack("<I", 10)
    for name, data in {
        "head-only": head,
        "meta-cut": head + meta[:9],
        "length-huge": head + meta[:8] + struct.pack("<I", 2**32 - 1),
        "sequence-undefined": head + meta + b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff" * 50_000,
        "element-4gb": head + meta + b"\x08\x00\x16\x00UT\0\0" + struct.pack("<I", 2**32 - 2),
        "random": head + np.random.default_rng(4).bytes(50_000),
    }.items():
        _slide(f"dicom-{name}", "E_NOT_A_SLIDE", data, ".dcm")
    _slide("zip-empty", "E_NOT_A_SLIDE", _zip({"readme.txt": b"nothing"}), ".zip")
    _slide("zip-cut", "E_TRUNCATED", _zip({"zarr.json": b"{}"})[:60], ".zip")
    add("slide", "fifo", "E_NOT_A_SLIDE", _fifo)
    add("slide", "device", "E_NOT_A_SLIDE", lambda folder: Path("/dev/zero"))
    add("slide", "missing", "E_NOT_FOUND", lambda folder: folder / "missing.svs")
    add("slide", "empty-folder", "E_NOT_A_SLIDE", lambda folder: _folder(folder / "empty"))
    add("slide", "link-loop", "E_NOT_FOUND", _link_loop)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "slide.svs")
    return folder / "slide.svs"


def _link_loop(folder: Path) -> Path:
    (folder / "a.svs").symlink_to(folder / "b.svs")
    (folder / "b.svs").symlink_to(folder / "a.svs")
    return folder / "a.svs"


def _zip(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


# PNG and JPEG


def images() -> None:
    for name, code, data in (
        ("png-bomb-dimensions", "E_DIMENSIONS", lambda: _png(2**31 - 1, 2**31 - 1, body=b"")),
        ("png-bomb-30000", "E_DIMENSIONS", lambda: _png(30_000, 30_000, body=zlib.compress(b"\0" * 3_000_000))),
        ("png-0", "E_DIMENSIONS", lambda: _png(0, 0, body=b"")),
        ("png-body-bomb", "E_READ", lambda: _png(64, 64, body=b"\0" * 100)),
        ("png-more-rows", OK, lambda: _png(64, 64, body=zlib.compress(b"\0" * 300_000_000, 9))),
        ("png-text-bomb", "E_NOT_A_SLIDE", lambda: _png(extra=_text_bomb())),
        ("png-claims-9000", "E_DIMENSIONS", lambda: _png(9000, 9000, body=zlib.compress(b"\0" * 10_000))),
        ("png-cut-header", "E_NOT_A_SLIDE", lambda: _png()[:20]),
        ("png-cut-data", "E_READ", lambda: _png()[:90]),
        ("png-72dpi", "E_BAD_MPP", lambda: _png(dpi=72)),
        ("png-no-scale", "E_NO_MPP", lambda: _png(dpi=0)),
        ("png-random", "E_NOT_A_SLIDE", lambda: b"\x89PNG\r\n\x1a\n" + np.random.default_rng(5).bytes(999)),
    ):
        _slide(name, code, data, ".png")
    for name, code, data in (
        ("jpeg-bomb-65500", "E_DIMENSIONS", lambda: _jpeg(65500, 65500)),
        ("jpeg-claims-3000", OK, lambda: _jpeg(3000, 3000)),
        ("jpeg-0", "E_DIMENSIONS", lambda: _jpeg(0, 0)),
        ("jpeg-head", "E_NOT_A_SLIDE", lambda: b"\xff\xd8\xff\xe0"),
        ("jpeg-cut", "E_READ", lambda: _jpeg()[:700]),
        ("jpeg-padding", "E_NOT_A_SLIDE", lambda: b"\xff\xd8" + b"\xff" * 5_000_000),
        ("jpeg-zero-segments", "E_NOT_A_SLIDE", lambda: b"\xff\xd8" + b"\xff\xe0\0\0" * 10),
        ("jpeg-million-segments", "E_NOT_A_SLIDE", lambda: b"\xff\xd8" + b"\xff\xe1\0\x02" * 2_000_000),
    ):
        _slide(name, code, data, ".jpg")


# OME-Zarr


def _zarr_base(folder: Path) -> Path:
    import zarr

    root = folder / "slide.zarr"
    group = zarr.open_group(root, mode="w", zarr_format=3)
    for name, side in (("0", 512), ("1", 256)):
        array = group.create_array(name, shape=(side, side, 3), chunks=(256, 256, 3), dtype="uint8")
        array[:] = 90
    axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "yx"] + [{"name": "c", "type": "channel"}]
    sets = [
        {"path": name, "coordinateTransformations": [{"type": "scale", "scale": [s, s, 1.0]}]}
        for name, s in (("0", 0.5), ("1", 1.0))
    ]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": sets}]}
    return root


def _zarr(name: str, code: str, change: Callable[[Path], object]) -> None:
    def make(folder: Path) -> Path:
        root = _zarr_base(folder)
        change(root)
        return root

    add("slide", f"zarr-{name}", code, make)


def _edit(root: Path, where: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / where / "zarr.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _ome_edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda root: _edit(root, "", lambda v: change(v["attributes"]["ome"]["multiscales"][0]))


def _array_edit(**values: Any) -> Callable[[Path], None]:
    return lambda root: _edit(root, "0", lambda v: v.update(values))


def _chunked(side: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": [side, side, 3]}}


def _deep(n: int) -> str:
    return "[" * n + "]" * n


def zarrs() -> None:
    bad = "E_NOT_A_SLIDE"
    _zarr("json-cut", bad, lambda r: (r / "zarr.json").write_text('{"zarr_format": 3'))
    _zarr("json-deep", bad, lambda r: (r / "zarr.json").write_text(_deep(200_000)))
    _zarr("json-deep-attribute", bad, lambda r: (r / "zarr.json").write_text(_deep_attribute(100_000)))
    _zarr("json-100mb", "E_DIMENSIONS", lambda r: (r / "zarr.json").write_bytes(b" " * 100_000_000))
    _zarr("json-array-100mb", "E_DIMENSIONS", lambda r: (r / "0" / "zarr.json").write_bytes(b"[0," * 30_000_000))
    _zarr("json-binary", bad, lambda r: (r / "zarr.json").write_bytes(b"\xff\xfe\0"))
    _zarr("json-list", bad, lambda r: (r / "zarr.json").write_text("[]"))
    _zarr("no-axes", bad, _ome_edit(lambda m: m.pop("axes")))
    _zarr("axes-number", bad, _ome_edit(lambda m: m.update(axes=5)))
    _zarr("axes-many", "E_DIMENSIONS", _ome_edit(lambda m: m.update(axes=[{"name": f"a{i}"} for i in range(10**5)])))
    _zarr("no-datasets", bad, _ome_edit(lambda m: m.update(datasets=[])))
    _zarr("datasets-many", "E_DIMENSIONS", _ome_edit(lambda m: m.update(datasets=m["datasets"] * 50_000)))
    for i, path in enumerate(
        ("../other", "/etc", "../../../../etc", "0/../../x", "..\\x", "", ".", "s3://b/k", "a\0b")
    ):
        _zarr(f"path-{i}", bad, _ome_edit(lambda m, path=path: m["datasets"][0].update(path=path)))
    _zarr("path-number", bad, _ome_edit(lambda m: m["datasets"][0].update(path=7)))
    _zarr("missing-level", bad, _ome_edit(lambda m: m["datasets"][1].update(path="9")))
    _zarr("missing-chunks", OK, lambda r: [p.unlink() for p in (r / "0" / "c").rglob("*") if p.is_file()])
    _zarr("chunk-cut", "E_READ", lambda r: _rewrite(_chunk(r), lambda b: b[: len(b) // 2]))
    _zarr("chunk-garbage", "E_READ", lambda r: _rewrite(_chunk(r), lambda b: b"\xff" * len(b)))
    _zarr("chunk-empty", "E_READ", lambda r: _rewrite(_chunk(r), lambda b: b""))
    _zarr("chunk-folder", OK, lambda r: (_chunk(r).unlink(), _chunk(r).mkdir()))
    _zarr("chunk-shape-huge", "E_DIMENSIONS", _array_edit(chunk_grid=_chunked(2**31)))
    _zarr("chunk-shape-0", "E_DIMENSIONS", _array_edit(chunk_grid=_chunked(0)))
    _zarr("chunk-shape-minus", bad, _array_edit(chunk_grid=_chunked(-5)))
    _zarr("chunk-shape-1", bad, _array_edit(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1]}}))
    _zarr("shape-huge", "E_DIMENSIONS", _array_edit(shape=[2**40, 2**40, 3]))
    _zarr("shape-minus", bad, _array_edit(shape=[-512, -512, 3]))
    _zarr("shape-0", "E_DIMENSIONS", _array_edit(shape=[0, 0, 3]))
    _zarr("dtype-object", bad, _array_edit(data_type="object"))
    _zarr("dtype-float", bad, _array_edit(data_type="float64"))
    _zarr("codec-unknown", bad, _array_edit(codecs=[{"name": "bytes"}, {"name": "run-me"}]))
    _zarr("codec-pickle", bad, _array_edit(codecs=[{"name": "bytes"}, {"name": "numcodecs.pickle"}]))
    _zarr("bomb-zstd", "E_READ", lambda r: _rewrite(_chunk(r), lambda b: _zstd(600_000_000)))
    _zarr("bomb-gzip", "E_READ", _gzip_bomb)
    _zarr("chunk-large", "E_DIMENSIONS", lambda r: os.truncate(_chunk(r), 2**30))
    for name, scale in (
        ("nan", "NaN"),
        ("zero", "0"),
        ("minus", "-0.5"),
        ("huge", "1e300"),
        ("word", '"x"'),
        ("short", None),
    ):
        _zarr(f"scale-{name}", bad if name in ("word", "short") else "E_BAD_MPP", lambda r, s=scale: _scaled(r, s))
    _zarr("no-unit", "E_NO_MPP", _ome_edit(lambda m: [axis.pop("unit", None) for axis in m["axes"]]))
    _zarr("link-chunk", bad, lambda r: _linked(_chunk(r), Path("/etc/passwd")))
    _zarr("link-array", bad, lambda r: _linked_array(r))
    _zarr("link-metadata", bad, lambda r: _linked(r / "0" / "zarr.json", Path("/etc/hostname")))
    add("slide", "zarr-v2-pickle", bad, _v2_pickle)
    add("slide", "zarr-zip-bomb", "E_DIMENSIONS", lambda f: content("z.ome.zarr.zip", _zip_bomb)(f))
    add("slide", "zarr-zip-million", "E_DIMENSIONS", lambda f: content("z.ome.zarr.zip", _zip_many)(f))
    add("slide", "zarr-zip-traversal", bad, content("z.zip", lambda: _zip({"../../x/zarr.json": b"{}", "a/b": b""})))


def _deep_attribute(n: int) -> str:
    return f'{{"zarr_format": 3, "node_type": "group", "attributes": {{"ome": {_deep(n)}}}}}'


def _chunk(root: Path) -> Path:
    return root / "0" / "c" / "0" / "0" / "0"


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _scaled(root: Path, scale: str | None) -> None:
    path = root / "zarr.json"
    values = json.loads(path.read_text())
    step = values["attributes"]["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]
    step["scale"] = [] if scale is None else ["@", "@", 1.0]
    path.write_text(json.dumps(values).replace('"@"', scale or ""))


def _gzip_bomb(root: Path) -> None:
    import gzip

    _edit(root, "0", lambda v: v.update(codecs=[{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 9}}]))
    _chunk(root).write_bytes(gzip.compress(b"\0" * 600_000_000))


def _linked(path: Path, to: Path) -> None:
    path.unlink()
    path.symlink_to(to)


def _linked_array(root: Path) -> None:
    other = root.parent / "elsewhere"
    (root / "0").rename(other)
    (root / "0").symlink_to(other)


def _v2_pickle(folder: Path) -> Path:
    import pickle

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "PICKLE_RAN"),)

    root = _folder(folder / "v2.zarr")
    axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "yx"]
    sets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [0.5, 0.5]}]}]
    (root / ".zgroup").write_text('{"zarr_format": 2}')
    (root / ".zattrs").write_text(json.dumps({"multiscales": [{"version": "0.4", "axes": axes, "datasets": sets}]}))
    array = {
        "zarr_format": 2,
        "shape": [256, 256],
        "chunks": [256, 256],
        "dtype": "|u1",
        "compressor": None,
        "filters": [{"id": "pickle", "protocol": 5}],
        "fill_value": 0,
        "order": "C",
    }
    _folder(root / "0")
    (root / "0" / ".zarray").write_text(json.dumps(array))
    (root / "0" / "0.0").write_bytes(pickle.dumps(Touch()))
    return root


def _zip_bomb() -> bytes:
    return _zip({"zarr.json": b"{}", "0/c/0/0/0": b"\0" * 300_000_000})


def _zip_many() -> bytes:
    """A directory of a million entries, made by hand: one empty file, named a million times."""
    names = [b"c/%06d" % i for i in range(1_000_000)]
    entry = struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0)
    head = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0, 0, 0, 0, 8, 0) + b"c/000000"
    table = b"".join(entry + name for name in names)
    large = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, len(names), len(names), len(table), len(head))
    where = struct.pack("<IIQI", 0x07064B50, 0, len(head) + len(table), 1)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return head + table + large + where + end


# annotations


def _ring(*points: Any) -> str:
    return json.dumps({"type": "Polygon", "coordinates": [list(points)]})


def annotations() -> None:
    def say(name: str, data: bytes | str | Callable[[], bytes | str], code: str = "E_ANNOTATION") -> None:
        add("annotation", name, code, content("a.json", data))

    square = [[0, 0], [0, 9], [9, 9], [9, 0], [0, 0]]
    say("xml-billion-laughs", BILLION.replace("OME", "ASAP_Annotations") + "<ASAP_Annotations>&a12;</ASAP_Annotations>")
    say("xml-quadratic", '<!DOCTYPE x [<!ENTITY a "' + "a" * 100_000 + '">]><x>' + "&a;" * 10_000 + "</x>")
    say(
        "xml-external", '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><ASAP_Annotations>&a;</ASAP_Annotations>'
    )
    say("xml-external-dtd", '<!DOCTYPE x SYSTEM "http://169.254.169.254/latest"><ASAP_Annotations/>')
    say("xml-parameter-entity", '<!DOCTYPE x [<!ENTITY % a SYSTEM "file:///etc/passwd"> %a;]><ASAP_Annotations/>')
    say("xml-deep", lambda: "<ASAP_Annotations>" + "<a>" * 1_000_000)
    say("xml-deep-closed", lambda: "<ASAP_Annotations>" + "<a>" * 200_000 + "</a>" * 200_000 + "</ASAP_Annotations>")
    say("xml-cut", '<ASAP_Annotations><Annotations><Annotation Name="')
    say("xml-attributes", lambda: "<ASAP_Annotations " + " ".join(f'a{i}="1"' for i in range(200_000)))
    say("xml-wrong-root", "<html><script>alert(1)</script></html>")
    say("xml-encoding", '<?xml version="1.0" encoding="utf-7"?><ASAP_Annotations/>')
    for name, x in (("nan", "NaN"), ("inf", "inf"), ("huge", "1e300"), ("word", "x")):
        corners = "".join(f'<Coordinate X="{v}" Y="{w}"/>' for v, w in ((x, 0), (9, 0), (9, 9)))
        say(f"xml-{name}", f'<ASAP_Annotations><Annotation Type="Polygon">{corners}</Annotation></ASAP_Annotations>')
    say("empty", "")
    say("binary", lambda: np.random.default_rng(6).bytes(10_000))
    say("deep", lambda: _deep(1_000_000))
    say("deep-objects", lambda: '{"a":' * 100_000)
    say("deep-coordinates", lambda: '{"type": "Polygon", "coordinates": ' + _deep(900) + "}")
    say("deep-collection", lambda: '{"type":"GeometryCollection","geometries":[' * 900 + "]}" * 900)
    say("nan", _ring([math.nan, 0], *square[1:]))
    say("infinity", '{"type": "Polygon", "coordinates": [[[Infinity,0],[0,9],[9,9],[0,0]]]}')
    say("huge", _ring([1e300, 0], [0, 9], [9, 9], [1e300, 0]))
    say("huge-integer", lambda: '{"type": "Polygon", "coordinates": [[[' + "9" * 100_000 + ",0],[0,9],[9,9],[0,0]]]}")
    say("unclosed", _ring(*square[:-1]))
    say("two-points", _ring([0, 0], [1, 1]))
    say("no-area", _ring([0, 0], [1, 1], [2, 2], [0, 0]))
    say("coordinates-words", _ring(["a", "b"], ["c", "d"]))
    say("coordinates-object", '{"type": "Polygon", "coordinates": {"a": 1}}')
    say("type-unknown", '{"type": "Circle"}')
    say("features-number", '{"type": "FeatureCollection", "features": 5}')
    say("feature-number", '{"type": "FeatureCollection", "features": [5]}')
    say("multi-empty", '{"type": "MultiPolygon", "coordinates": []}')
    say("hole-outside", json.dumps({"type": "Polygon", "coordinates": [square, [[x + 99, y] for x, y in square]]}), OK)
    say("name-control", json.dumps(_feature("\x00\x1b[31mred")), OK)
    say("name-long", lambda: json.dumps(_feature("a" * 10_000_000)), OK)
    add("annotation", "2gb", "E_ANNOTATION", _sparse(2**31))
    add("annotation", "folder", "E_ANNOTATION", lambda folder: _folder(folder / "x"))
    add("annotation", "missing", "E_ANNOTATION", lambda folder: folder / "missing.json")
    add("annotation", "fifo", "E_ANNOTATION", _fifo)
    add("annotation", "device", "E_ANNOTATION", lambda folder: Path("/dev/zero"))


def _feature(name: str) -> dict[str, Any]:
    shape = {"type": "Polygon", "coordinates": [[[0, 0], [0, 9], [9, 9], [9, 0], [0, 0]]]}
    return {"type": "Feature", "geometry": shape, "properties": {"name": name}}


# cohort.csv


def cohorts() -> None:
    def say(name: str, data: bytes | str | Callable[[], bytes | str], code: str = "E_COHORT") -> None:
        add("cohort", name, code, content("cohort.csv", data))

    def slide_id(name: str, value: str, code: str = "E_COHORT") -> None:
        say(f"id-{name}", f'slide_id,uri\n"{value}",a.svs\n', code)

    def uri(name: str, value: str) -> None:
        say(f"uri-{name}", f'slide_id,uri\na,"{value}"\n')

    say("empty", "")
    say("header-only", "slide_id,uri\n")
    say("binary", lambda: np.random.default_rng(7).bytes(5000))
    say("utf-16", "slide_id,uri\na,b\n".encode("utf-16"))
    say("nul", b"slide_id,uri\na\0b,c.svs\n")
    say("columns-million", lambda: "slide_id,uri," + ",".join(f"c{i}" for i in range(10**6)) + "\na,b\n")
    say("cells-million", lambda: "slide_id,uri\na,b" + ",x" * 10**6 + "\n")
    say("cell-huge", lambda: "slide_id,uri\na," + "x" * 10_000_000 + "\n")
    say("rows-40-million-bytes", lambda: "slide_id,uri\n" + "\n" * 300_000_000)
    say("quote-open", 'slide_id,uri\n"a,b.svs\n')
    say("double-column", "slide_id,uri,slide_id\na,b,c\n")
    say("double-id", "slide_id,uri\na,b\na,c\n")
    say("more-cells", "slide_id,uri\na,b,c\n")
    say("unknown-column", "slide_id,uri,colour\na,b,c\n")
    for name, value in (
        ("traversal", "../../etc/passwd"),
        ("dots", ".."),
        ("dot", "."),
        ("absolute", "/etc/passwd"),
        ("backslash", "..\\..\\x"),
        ("drive", "C:\\x"),
        ("formula", '=HYPERLINK(""http://x"")'),
        ("plus", "+1+cmd|' /C calc'!A0"),
        ("at", "@SUM(1)"),
        ("newline", "a\nb"),
        ("tab", "a\tb"),
        ("escape", "a\x1b[31mb"),
        ("bell", "a\x07"),
        ("bidi", "a\u202egpj.svs"),
        ("zero-width", "a\u200bb"),
        ("long", "a" * 300),
    ):
        slide_id(name, value, "E_COHORT")
    slide_id("script", "<script>alert(1)</script>", OK)
    slide_id("quotes", '""><img src=x onerror=alert(1)>', OK)
    slide_id("template", "{{ 7*7 }}{% for x in y %}", OK)
    for name, value in (
        ("ftp", "ftp://host/a.svs"),
        ("javascript", "javascript://a/%0aalert(1)"),
        ("data", "data://text/plain,x"),
        ("chained", "simplecache::http://host/a.svs"),
        ("chained-zip", "zip://a.svs::file:///tmp/x.zip"),
        ("chained-file", "filecache::s3://b/k"),
        ("link-local", "http://169.254.169.254/latest/meta-data"),
        ("link-local-https", "https://169.254.169.254/a.svs"),
        ("link-local-number", "https://2852039166/a.svs"),
        ("link-local-hex", "https://0xA9FEA9FE/a.svs"),
        ("link-local-octal", "https://0251.0376.0251.0376/a.svs"),
        ("link-local-v6", "https://[fe80::1]/a.svs"),
        ("link-local-mapped", "https://[::ffff:169.254.169.254]/a.svs"),
        ("metadata-name", "https://metadata.google.internal/a.svs"),
        ("aws-v6", "https://[fd00:ec2::254]/a.svs"),
        ("credentials", "https://user:secret@host/a.svs"),
        ("credentials-s3", "s3://key:secret@bucket/a.svs"),
        ("control", "a\x01b.svs"),
        ("newline", "a\nb.svs"),
        ("file-host", "file://otherhost/a.svs"),
        ("nothing-after", "s3://"),
        ("traversal-encoded", "s3://bucket/%2e%2e/%2e%2e/a.svs"),
        ("traversal-s3", "s3://bucket/../other/a.svs"),
        ("long", "a/" * 5000),
        ("memory", "memory://a.svs"),
        ("github", "github://a:b@main/a.svs"),
    ):
        uri(name, value)
    for column, value in (
        ("mpp", "nan"),
        ("mpp", "inf"),
        ("mpp", "-1"),
        ("mpp", "1e400"),
        ("mpp", "0"),
        ("modality", "xray"),
        ("split", "holdout"),
        ("sha256", "xyz"),
        ("patient_id", "p\x1b[0m"),
        ("label", "a\u202eb"),
        ("annotation", "simplecache::http://host/a.json"),
        ("mask", "http://169.254.169.254/m.png"),
    ):
        say(f"{column}-{ascii(value)[1:-1]}"[:40], f"slide_id,uri,{column}\na,b.svs,{value}\n")


# TOML


def tomls() -> None:
    model = '[[model]]\npath = "m"\n'
    for kind, sound in (("run", f'cohort = "c.csv"\nout = "o"\n{model}'), ("train", 'cohort = "c.csv"\nout = "o"\n')):

        def say(name: str, data: bytes | str | Callable[[], bytes | str], kind: str = kind) -> None:
            add(kind, name, "E_CONFIG", content(f"{kind}.toml", data))

        say("deep-list", lambda s=sound: f"x = {_deep(100_000)}\n{s}")
        say("deep-table", lambda s=sound: s + "[" + ".".join("a" * 20_000) + "]\nx = 1\n")
        say("deep-inline", lambda s=sound: "x = " + "{a=" * 50_000 + "1" + "}" * 50_000 + "\n" + s)
        say("deep-key", lambda s=sound: ".".join("a" * 50_000) + " = 1\n" + s)
        say("100mb", lambda: b"#" * 100_000_000)
        say("binary", b"\xff\xfe\0\0")
        say("cut", 'cohort = "c')
        say("int-huge", lambda s=sound: "x = " + "9" * 100_000 + "\n" + s)
        say("stride-huge", f"stride_px = {'9' * 400}\n{sound}")
        say("cohort-number", "cohort = 5\nout = 6\n")
        say("cohort-list", 'cohort = ["a"]\nout = {a = 1}\n')
        say("float-nan", f"min_tissue = nan\n{sound}")
        say("tissue-nan", f"{sound}[tissue]\nmpp = nan\n")
        say("tissue-inf", f"{sound}[tissue]\nmpp = inf\nmin_area_um2 = inf\n")
        say("unknown", f"colour = 1\n{sound}")
        say("model-string", 'cohort = "c"\nout = "o"\nmodel = "m"\n')
        say("folder-none", "")
        add(kind, "directory", "E_CONFIG", lambda folder: _folder(folder / "x"))
        add(kind, "missing", "E_CONFIG", lambda folder: folder / "missing.toml")
        add(kind, "device", "E_CONFIG", lambda folder: Path("/dev/zero"))
        add(kind, "fifo", "E_CONFIG", _fifo)


# bundles


CARD = {
    "schema": 1,
    "name": "m",
    "task": "classify",
    "architecture": "small-cnn",
    "classes": ["a", "b"],
    "tile_px": 64,
    "mpp": 0.5,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
}


def _tensors(header: Any, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(begin: int, end: int, shape: Iterable[int] = (4,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


def _bundle(name: str, card: Any = CARD, weights: bytes | Callable[[], bytes] | None = None) -> None:
    def make(folder: Path) -> Path:
        root = _folder(folder / "bundle")
        said = card() if callable(card) else card
        text = said if isinstance(said, str | bytes) else json.dumps(said)
        (root / "bundle.json").write_bytes(text.encode() if isinstance(text, str) else text)
        data = weights() if callable(weights) else weights
        (root / "weights.safetensors").write_bytes(
            _tensors({"a": _tensor(0, 16)}, b"\0" * 16) if data is None else data
        )
        return root

    add("bundle", name, "E_BUNDLE", make)


def _pickled(folder: Path = Path("/nowhere")) -> bytes:
    import pickle

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "PICKLE_RAN"),)

    return pickle.dumps(Touch())


def bundles() -> None:
    _bundle("card-deep", lambda: _deep(500_000))
    _bundle("card-deep-arguments", lambda: json.dumps(CARD)[:-1] + ', "arguments": {"a": ' + _deep(900) + "}}")
    _bundle("card-100mb", lambda: b" " * 100_000_000)
    _bundle("card-cut", json.dumps(CARD)[:40])
    _bundle("card-list", [1, 2])
    _bundle("card-binary", b"\xff\0")
    for key, value in (
        ("tile_px", -64),
        ("tile_px", 0),
        ("tile_px", 10**9),
        ("tile_px", 1e308),
        ("mpp", math.nan),
        ("mpp", -1),
        ("mean", [math.nan] * 3),
        ("mean", [math.inf] * 3),
        ("std", [0, 0, 0]),
        ("std", [math.nan] * 3),
        ("std", [math.inf] * 3),
        ("std", [-1, 1, 1]),
        ("name", "../../etc"),
        ("name", "a/b"),
        ("name", "<script>"),
        ("name", ""),
        ("classes", ["a"] * 2),
        ("classes", []),
        ("classes", [f"c{i}" for i in range(200_000)]),
        ("classes", ["a\x1b[0m", "b"]),
        ("classes", ["a" * 100_000, "b"]),
        ("architecture", "os:system"),
        ("architecture", "timm:hf-hub:someone/something"),
        ("architecture", "timm:local-dir:/tmp/x"),
        ("architecture", "torchvision:../../x"),
        ("architecture", "__import__"),
        ("arguments", {"pretrained": True}),
        ("arguments", {"checkpoint_path": "/etc/passwd"}),
        ("schema", 99),
        ("licence", "x" * 1_000_000),
        ("halo", 10**18),
    ):
        _bundle(f"card-{key}-{ascii(value)[:24]}", {**CARD, key: value})
    _bundle("weights-pickle", weights=_pickled)
    _bundle("weights-empty", weights=b"")
    _bundle("weights-zip", weights=lambda: _zip({"archive/data.pkl": _pickled()}))
    _bundle("weights-header-gb", weights=_tensors({}, length=10**9))
    _bundle("weights-header-2^63", weights=_tensors({}, length=2**63))
    _bundle("weights-header-90mb", weights=lambda: _tensors(b"{" + b" " * 90_000_000 + b"}"))
    _bundle("weights-header-no-json", weights=_tensors(b"not json"))
    _bundle("weights-header-deep", weights=lambda: _tensors(_deep(200_000).encode()))
    _bundle("weights-overlap", weights=_tensors({"a": _tensor(0, 16), "b": _tensor(8, 24)}))
    _bundle("weights-gap", weights=_tensors({"a": _tensor(16, 32)}))
    _bundle("weights-beyond", weights=_tensors({"a": _tensor(0, 10**12, (250_000_000_000,))}))
    _bundle("weights-backwards", weights=_tensors({"a": _tensor(16, 0)}))
    _bundle("weights-shape-huge", weights=_tensors({"a": _tensor(0, 16, (2**62, 2**62))}))
    _bundle("weights-cut", weights=_tensors({"a": _tensor(0, 16)}, b"\0" * 8))
    _bundle("weights-million", weights=lambda: _tensors({f"t{i}": _tensor(0, 0, (0,)) for i in range(300_000)}, b""))
    add("bundle", "missing", "E_BUNDLE", lambda folder: folder / "missing")
    add("bundle", "weights-link", "E_BUNDLE", _linked_weights)


def _linked_weights(folder: Path) -> Path:
    root = _folder(folder / "bundle")
    (root / "bundle.json").write_text(json.dumps(CARD))
    (root / "weights.safetensors").symlink_to("/dev/zero")
    return root


for _fill in (slides, xml_slides, other_slides, images, zarrs, annotations, cohorts, tomls, bundles):
    _fill()


# the worker


@dataclass(frozen=True)
class Outcome:
    """How a file ended: a code, "ok", "died" or "hung"; the seconds it took, and MB above the idle worker."""

    code: str
    seconds: float = math.inf
    mb: float = math.inf
    message: str = ""


class Worker:
    """A process that opens one file after the other, and is replaced when it dies or hangs."""

    def __init__(self, deadline: float = 60) -> None:
        self._deadline = deadline
        self._process: subprocess.Popen[str] | None = None
        self.deaths = 0

    def open(self, kind: str, path: Path) -> Outcome:
        process = self._alive()
        assert process.stdin
        process.stdin.write(json.dumps([kind, str(path)]) + "\n")
        process.stdin.flush()
        line = self._line(process)
        if line is None or not line:
            self.deaths += 1
            self.close()
            return Outcome("hung" if line is None else "died")
        return Outcome(**json.loads(line))

    def _alive(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "corpus_worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
            )
            if not self._line(self._process):
                raise RuntimeError("the worker did not start")
        return self._process

    def _line(self, process: subprocess.Popen[str]) -> str | None:
        """The next line; "" when the process is dead, None when it says nothing in time."""
        assert process.stdout
        ready, _, _ = select.select([process.stdout], [], [], self._deadline)
        return process.stdout.readline() if ready else None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def check(worker: Worker, case: Case, folder: Path) -> Outcome:
    """Make one file, open it, remove it."""
    import shutil

    folder.mkdir()
    try:
        outcome = worker.open(case.kind, case.make(folder))
        assert not list(folder.rglob("PICKLE_RAN")), f"{case.name} ran what it was given"
        return outcome
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":  # a look at everything: python tests/corpus.py [part of a name]
    import tempfile

    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    worker = Worker(20)
    wrong = 0
    with tempfile.TemporaryDirectory() as top:
        for number, case in enumerate(c for c in CASES if wanted in c.name):
            got = check(worker, case, Path(top) / str(number))
            bad = got.code != case.code or got.seconds > 1 or got.mb > 300
            wrong += bad
            if bad or wanted:
                print(
                    f"{case.name:45} {case.code:15} {got.code:15} {got.seconds:6.2f} s {got.mb:6.0f} MB "
                    f"{got.message[:200]!r}",
                    flush=True,
                )
    worker.close()
    print(len(CASES), "cases,", wrong, "wrong,", worker.deaths, "deaths")

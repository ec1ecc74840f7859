"""TIFF's directories, walked with nothing but struct: what no slide claims is refused before a library allocates.

Tags and types: TIFF 6.0 (Adobe, 1992) and BigTIFF (8-byte counts and offsets).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from slideflow_ray.errors import BadDimensions, NotASlide, TruncatedSlide

MAX_DIRECTORIES = 1000
"""Slides have about ten; a stack of planes, which is refused later and by its name, has hundreds."""

MAX_TAGS = 1000
MAX_TEXT_BYTES = 2**24
"""Of one description: OME-XML of a slide has a few kB, with annotations a few MB."""

MAX_PLANES = 10_000
DESCRIPTION = 270

MAX_TILES = 10**7
"""Of one level: 4 * 10**11 pixels in tiles of 256 x 256 are 6 million."""

MAX_TILE_BYTES = 2**26
"""Of one tile, decoded: 4,096 x 4,096 RGBA."""

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}

WIDTH, LENGTH, SAMPLES, TILE_WIDTH, TILE_LENGTH, SUBIFDS = 256, 257, 277, 322, 323, 330
TABLES = {273: "strip offsets", 279: "strip sizes", 324: "tile offsets", 325: "tile sizes"}
TEXTS = {270, 305, 306, 315, 316, 700, 34675, 65420, 65449}
"""Description, software, date, artist, host, XMP, colour profile, and Hamamatsu's."""


@dataclass(frozen=True)
class _Form:
    """Byte order, and the struct formats of counts and offsets, of a classic or a big TIFF."""

    order: str
    count: str
    offset: str
    entry: int

    @property
    def field(self) -> int:
        return struct.calcsize(self.offset)


@dataclass(frozen=True)
class _Tag:
    kind: int
    count: int
    at: int

    @property
    def bytes(self) -> int:
        return self.count * SIZES.get(self.kind, 1)


def check_directories(name: str, file: BinaryIO, size: int) -> None:
    """Check each directory of an open TIFF of `size` bytes, and those below it; `name` is for errors.

    Raises TruncatedSlide (a directory, or a table of one, lies beyond the end) and BadDimensions (a loop, more
    directories, tags, tiles or text than a slide has, sides of 0, tiles above MAX_TILE_BYTES).
    """
    file.seek(0)
    head = file.read(16)
    if len(head) < 16:
        raise TruncatedSlide(f"{name} has {size:,} bytes, but a TIFF begins with more.")
    order, big = ("<" if head[:2] == b"II" else ">"), b"+" in head[2:4]
    form = _Form(order, f"{order}Q", f"{order}Q", 20) if big else _Form(order, f"{order}H", f"{order}I", 12)
    (first,) = struct.unpack_from(form.offset, head, 8 if big else 4)
    seen: set[int] = set()
    below = [first]
    while below:
        for offset, tags in _chain(name, file, size, form, below.pop(), seen):
            _check_tags(name, file, size, form, offset, tags)
            _check_description(name, file, tags)
            children = _below(file, form, tags)
            if len(children) > MAX_DIRECTORIES or seen & set(children):
                raise BadDimensions(f"{name}: the directory at byte {offset:,} stands below itself.")
            below += children


def _chain(
    name: str, file: BinaryIO, size: int, form: _Form, offset: int, seen: set[int]
) -> Iterator[tuple[int, Mapping[int, _Tag]]]:
    """Yield (offset, tags) of a directory and those that follow it."""
    mine: set[int] = set()
    while offset and (offset not in seen or offset in mine):  # children may stand in a chain and in a list
        if offset in mine or len(seen) >= MAX_DIRECTORIES:
            what = "a directory of it follows itself" if offset in mine else "it has more directories than any slide"
            raise BadDimensions(f"{name}: {what}.")
        seen.add(offset)
        mine.add(offset)
        tags, end = _directory(name, file, size, form, offset)
        yield offset, tags
        file.seek(end - form.field)
        (offset,) = struct.unpack(form.offset, file.read(form.field))


def _directory(name: str, file: BinaryIO, size: int, form: _Form, offset: int) -> tuple[dict[int, _Tag], int]:
    end = offset + struct.calcsize(form.count)
    if end <= size:
        file.seek(offset)
        (entries,) = struct.unpack(form.count, file.read(struct.calcsize(form.count)))
        end += entries * form.entry + form.field
    if end > size:
        raise TruncatedSlide(f"{name} has {size:,} bytes, but a directory of it stands at byte {offset:,}.")
    if entries > MAX_TAGS:
        raise BadDimensions(f"{name}: a directory of it has {entries:,} tags.")
    data = file.read(entries * form.entry)
    tags: dict[int, _Tag] = {}
    for index in range(entries):
        at = index * form.entry
        number, kind = struct.unpack_from(f"{form.order}HH", data, at)
        (count,) = struct.unpack_from(form.offset, data, at + 4)
        place = offset + struct.calcsize(form.count) + at + 4 + form.field
        tag = _Tag(kind, count, place)
        if tag.bytes > form.field:
            (place,) = struct.unpack_from(form.offset, data, at + 4 + form.field)
        tags.setdefault(number, _Tag(kind, count, place))
    return tags, end


def _check_tags(name: str, file: BinaryIO, size: int, form: _Form, offset: int, tags: Mapping[int, _Tag]) -> None:
    where = f"{name}: the directory at byte {offset:,}"
    for number, tag in tags.items():
        known = number in TABLES or number in TEXTS or number in (WIDTH, LENGTH)
        if tag.bytes > size or (known and tag.at + tag.bytes > size):
            raise TruncatedSlide(f"{where} has a tag ({number}) that reaches beyond the file's {size:,} bytes.")
        if number in TEXTS and tag.bytes > MAX_TEXT_BYTES:
            raise BadDimensions(f"{where} has a text ({number}) of {tag.bytes:,} bytes.")
        if tag.count > MAX_TILES and number in TABLES:
            raise BadDimensions(f"{where} has {tag.count:,} {TABLES[number]}.")
    sides = (WIDTH, LENGTH, TILE_WIDTH, TILE_LENGTH, SAMPLES)
    _check_sides(where, {n: _integer(file, form, tags[n]) for n in sides if n in tags})
    tile = [_integer(file, form, tags[n]) for n in (TILE_WIDTH, TILE_LENGTH, SAMPLES) if n in tags]
    samples = tile[2] if len(tile) == 3 else 1
    if len(tile) >= 2 and {TILE_WIDTH, TILE_LENGTH} <= set(tags):
        _check_tiles(where, file, form, tags, (tile[0], tile[1], samples))


def _check_sides(where: str, sides: Mapping[int, int]) -> None:
    if bad := [value for value in sides.values() if value < 1]:
        raise BadDimensions(f"{where} has a side, or channels, of {bad[0]}.")


def _check_tiles(where: str, file: BinaryIO, form: _Form, tags: Mapping[int, _Tag], tile: tuple[int, int, int]) -> None:
    if tile[0] * tile[1] * max(tile[2], 1) > MAX_TILE_BYTES:
        raise BadDimensions(f"{where} has tiles of {tile[0]:,} x {tile[1]:,} pixels in {tile[2]:,} channels.")
    if not {WIDTH, LENGTH} <= set(tags):
        return
    w, h = (_integer(file, form, tags[n]) for n in (WIDTH, LENGTH))
    needed = -(-w // tile[0]) * -(-h // tile[1])
    for number in (n for n in (324, 325) if n in tags):
        if not needed <= tags[number].count <= needed * max(tile[2], 1):
            fewer = "fewer" if tags[number].count < needed else "more"
            raise BadDimensions(
                f"{where}: a level of {w:,} x {h:,} pixels needs {needed:,} tiles, its table has {fewer}."
            )


def _check_description(name: str, file: BinaryIO, tags: Mapping[int, _Tag]) -> None:
    """Look into the description before tifffile and tiffslide give it to an XML parser.

    Raises NotASlide: entities, millions of planes (an array of them is made), pieces in a file elsewhere.
    """
    if (tag := tags.get(DESCRIPTION)) is None or tag.bytes <= 8:
        return
    file.seek(tag.at)
    text = file.read(tag.bytes)
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise NotASlide(f"{name}: its description declares XML entities, which no scanner does.")
    if b"<OME" in text or b":OME" in text:
        planes = math.prod(int(n) for _, n in re.findall(rb'\bSize([ZCT])\s*=\s*["\'](\d{1,18})["\']', text)[:3])
        if planes > MAX_PLANES:
            raise NotASlide(f"{name}: its description claims {planes:,} planes.")
        if re.search(rb'\bFileName\s*=\s*["\'][^"\']*[/\\\\]', text):
            raise NotASlide(f"{name}: its description names a file in another folder.")


def _integer(file: BinaryIO, form: _Form, tag: _Tag) -> int:
    """Return the first value of an integer tag; 0 where it is none."""
    if tag.kind not in INTEGERS or not tag.count:
        return 0
    file.seek(tag.at)
    data = file.read(SIZES[tag.kind])
    return int(struct.unpack(f"{form.order}{INTEGERS[tag.kind]}", data)[0]) if len(data) == SIZES[tag.kind] else 0


def _below(file: BinaryIO, form: _Form, tags: Mapping[int, _Tag]) -> list[int]:
    """Return the offsets of a directory's children (OME's pyramids): one more than are allowed at most."""
    tag = tags.get(SUBIFDS)
    if tag is None or tag.kind not in INTEGERS:
        return []
    size = SIZES[tag.kind]
    file.seek(tag.at)
    data = file.read(min(tag.count, MAX_DIRECTORIES + 1) * size)
    return list(struct.unpack(f"{form.order}{len(data) // size}{INTEGERS[tag.kind]}", data[: len(data) // size * size]))

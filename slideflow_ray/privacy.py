"""Whether a result tree holds given words: file names, texts, compressed texts, tables, Zarr's arrays, PNG's texts."""

from __future__ import annotations

import gzip
import html
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slideflow_ray.errors import ConfigError
from slideflow_ray.tables import texts

MAX_PIECE = 2**28
"""Of what a compressed part may become before the rest of it is passed over."""

PIECE = 2**22
MIN_WORD = 3


@dataclass(frozen=True)
class Leak:
    """A word and where it stands: a path below the tree, and the part of the file."""

    word: str
    path: str
    part: str


def read_words(words: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Return the words to look for: those given, and the lines of a file. Raises ConfigError for none or short ones."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as text: {error}.") from error
    found = tuple(dict.fromkeys(word.strip() for word in (*words, *lines) if word.strip()))
    if not found:
        raise ConfigError("There is no word to look for.", next_step="Give --string WORD, or --strings FILE.")
    if short := [word for word in found if len(word) < MIN_WORD]:
        raise ConfigError(f"{short[0]!r} is too short: it would be found everywhere.")
    return found


def search(tree: Path, words: Sequence[str]) -> tuple[Leak, ...]:
    """Return where in a tree of results the words stand, compared without case; what is a link is not followed.

    Words are sought as they are, as JSON and HTML write them, in UTF-8 and UTF-16; in what gzip, zlib, zip, zstd
    (tables, Zarr's chunks) hide too. Raises ConfigError where there is no such tree.
    """
    if not tree.exists():
        raise ConfigError(f"There is no {tree}.")
    forms = {word: _forms(word) for word in words}
    found: list[Leak] = []
    files = [tree] if tree.is_file() else sorted(path for path in tree.rglob("*"))
    for path in files:
        name = str(path.relative_to(tree)) if path != tree else path.name
        found += [Leak(word, name, "file name") for word in _in(path.name.encode(errors="surrogateescape"), forms)]
        if path.is_file() and not path.is_symlink():
            seen = {(word, part): None for part, data in _parts(path) for word in _in(data, forms)}
            found += [Leak(word, name, part) for word, part in seen]
        elif path.is_symlink():
            found += [Leak(word, name, "link") for word in _in(os.readlink(path).encode(), forms)]
    return tuple(found)


def _forms(word: str) -> tuple[bytes, ...]:
    """How a word may be written: plain, in JSON's escapes, in HTML's, in two bytes a letter."""
    from urllib.parse import quote

    low = word.lower()
    plain = {low, json.dumps(low)[1:-1], html.escape(low), quote(low).lower()}
    return tuple({text.encode() for text in plain} | {low.encode("utf-16-le"), low.encode("utf-16-be")})


def _in(data: bytes, forms: dict[str, tuple[bytes, ...]]) -> list[str]:
    low = (
        data.lower()
        if data.isascii()
        else data.decode("utf-8", "surrogateescape").lower().encode("utf-8", "surrogateescape")
    )
    return [word for word, ways in forms.items() if any(way in low for way in ways)]


def _parts(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (what it is, bytes) of a file: its bytes in pieces that overlap, and what is packed in it."""
    with path.open("rb") as file:
        head = file.read(16)
        file.seek(0)
        last = b""
        while piece := file.read(PIECE):
            yield "bytes", last + piece
            last = piece[-4096:]
    if path.stat().st_size <= MAX_PIECE:
        yield from _unpacked(path, head)


def _unpacked(path: Path, head: bytes) -> Iterator[tuple[str, bytes]]:
    data = path.read_bytes()
    if head.startswith(b"\x89PNG"):
        yield from (("PNG text", text) for text in _png_texts(data))
    elif head.startswith(b"PAR1"):
        yield from (("table", text.encode()) for text in texts(path))
    elif head.startswith(b"PK\3\4"):
        yield from _members(data)
    elif head.startswith(b"\x1f\x8b"):
        yield from _tried("gzip", lambda: gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_PIECE))
    elif b"\x28\xb5\x2f\xfd" in data[: 2**16] and ".zarr" in str(path):
        yield from (("chunk", part) for part in _zstd_frames(data))
    if path.suffix in (".html", ".svg", ".xml"):
        yield "entities", html.unescape(data.decode("utf-8", "replace")).encode()
    if path.suffix in (".html", ".svg", ".json", ".geojson"):
        yield from (("data: uri", part) for part in _data_uris(data))


def _tried(what: str, read: Any) -> Iterator[tuple[str, bytes]]:
    try:
        yield what, read()
    except (OSError, EOFError, ValueError, zlib.error):
        return


def _png_texts(data: bytes) -> Iterator[bytes]:
    """Yield the text chunks of a PNG (tEXt, zTXt, iTXt, eXIf), unpacked."""
    at = 8
    while at + 12 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        if kind in (b"tEXt", b"iTXt", b"eXIf", b"zTXt"):
            yield body
            yield from _inflated(body)
        at += 12 + size


def _inflated(body: bytes) -> Iterator[bytes]:
    """Yield what deflate streams in a text chunk become; they begin behind keywords of unknown length."""
    for start in (m.start() for m in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", body)):
        try:
            yield zlib.decompressobj().decompress(body[start:], MAX_PIECE)
        except zlib.error:
            continue


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            for entry in file.infolist():
                yield entry.filename, entry.filename.encode() + b"\n" + entry.comment
                with file.open(entry) as member:
                    yield entry.filename, member.read(MAX_PIECE)
    except (zipfile.BadZipFile, OSError, ValueError, zlib.error, NotImplementedError):
        return


def _zstd_frames(data: bytes) -> Iterable[bytes]:
    """Yield what the zstd frames in a chunk, or a shard of chunks, unpack to."""
    from numcodecs.zstd import Zstd

    starts = [m.start() for m in re.finditer(rb"\x28\xb5\x2f\xfd", data)]
    for begin, end in zip(starts, [*starts[1:], len(data)], strict=True):
        for part in (data[begin:end], data[begin : end - 4]):  # a checksum may stand behind a frame
            try:
                yield bytes(Zstd().decode(part))
                break
            except (RuntimeError, ValueError):
                continue


def _data_uris(data: bytes) -> Iterator[bytes]:
    import base64
    import binascii

    for found in re.finditer(rb"base64,([A-Za-z0-9+/=]{8,})", data):
        try:
            picture = base64.b64decode(found[1])
        except (binascii.Error, ValueError):
            continue
        yield picture
        yield from _png_texts(picture) if picture.startswith(b"\x89PNG") else ()

"""Zarr stores that keep to their folder and their sizes: no link leads out, no chunk becomes more than it may."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, ZipStore

from slideflow_ray.errors import BadDimensions, NotASlide

METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
MAX_METADATA_BYTES = 2**20
MAX_FILE_BYTES = 2**28
MAX_ENTRIES = 100_000
"""Of a zip file: its directory is read whole."""

CODECS = frozenset(("bytes", "blosc", "zstd", "gzip", "zlib", "lz4", "crc32c", "transpose", "sharding_indexed"))
"""What may stand between a file and its pixels. Zarr knows others by name, some of which run code (pickle)."""


class Limits:
    """How large the decoded chunks of each array are, by its path in the store, and their codecs."""

    def __init__(self) -> None:
        self._arrays: dict[str, tuple[int, frozenset[str]]] = {}

    def add(self, path: str, raw_bytes: int, codecs: Iterable[str]) -> None:
        """Note an array whose chunks have `raw_bytes` when decoded."""
        self._arrays[path.strip("/")] = (raw_bytes, frozenset(codecs))

    def check(self, key: str, data: bytes, part: bool) -> None:
        """Raise ValueError where a chunk would become larger than its array says, a part of a shard likewise."""
        path = max((p for p in self._arrays if key.startswith(f"{p}/")), key=len, default=None)
        if path is None:
            return
        raw, codecs = self._arrays[path]
        if "sharding_indexed" not in codecs and len(data) > 2 * raw + 2**16:
            raise ValueError(f"{key} has {len(data):,} bytes, its chunk {raw:,}")
        if decoded_bytes(data, codecs, raw + 64) > raw + 64 and ("sharding_indexed" not in codecs or part):
            raise ValueError(f"{key} becomes more than the {raw:,} bytes of its chunk")


def decoded_bytes(data: bytes, codecs: Iterable[str], enough: int) -> int:
    """Return how many bytes `data` says it becomes, or, for deflate, becomes (counted up to `enough`); 0: unknown."""
    sizes: dict[str, Callable[[], int]] = {
        "zstd": lambda: _zstd_bytes(data),
        "blosc": lambda: struct.unpack_from("<I", data, 4)[0] if _is_blosc(data) else 0,
        "lz4": lambda: struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0,
        "gzip": lambda: _inflated(data, enough),
        "zlib": lambda: _inflated(data, enough),
    }
    return max((sizes[name]() for name in codecs if name in sizes), default=0)


def _is_blosc(data: bytes) -> bool:
    return len(data) >= 16 and bool(struct.unpack_from("<I", data, 12)[0] == len(data))


def _zstd_bytes(data: bytes) -> int:
    """RFC 8878, 3.1.1: the frame header's content size; 0 where it has none."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 18:
        return 0
    said = data[4]
    single, flag, ids = said >> 5 & 1, said >> 6, (0, 1, 2, 4)[said & 3]
    size = (1 if single else 0, 2, 4, 8)[flag]
    at = 5 + (not single) + ids
    return int.from_bytes(data[at : at + size], "little") + (256 if size == 2 else 0)


def _inflated(data: bytes, enough: int) -> int:
    total, rest = 0, data
    while rest and total <= enough:
        stream = zlib.decompressobj(wbits=47)
        try:
            while not stream.eof and total <= enough and rest:
                total += len(stream.decompress(rest, 2**20))
                rest = stream.unconsumed_tail
        except zlib.error:
            return total
        rest = stream.unused_data
    return total


class GuardedFolder(LocalStore):
    """A folder that is only read: what links lead out of is refused, and so are files beyond their limits."""

    def __init__(self, root: Path | str, *, read_only: bool = True) -> None:
        super().__init__(root, read_only=read_only)
        self.limits = Limits()
        self._real = Path(root).resolve()

    def _check(self, key: str, byte_range: ByteRequest | None) -> None:
        path = self.root / key
        if not path.resolve().is_relative_to(self._real):
            raise NotASlide(f"{path} leads out of the slide's folder.")
        if byte_range is None and path.is_file():
            _check_bytes(key, path.stat().st_size)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return what a file holds; see Store.get. Raises NotASlide, BadDimensions and ValueError beyond limits."""
        self._check(key, byte_range)
        found = await super().get(key, prototype, byte_range)
        _check_chunk(self.limits, key, found, byte_range)
        return found

    def get_sync(self, key: str, *, prototype: Any = None, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return what a file holds, as `get` does."""
        self._check(key, byte_range)
        found = super().get_sync(key, prototype=prototype, byte_range=byte_range)
        _check_chunk(self.limits, key, found, byte_range)
        return found


class GuardedZip(ZipStore):
    """A zip file that is only read, its chunks within their limits."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="r")
        self.limits = Limits()

    def _get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        found = super()._get(key, prototype, byte_range)
        _check_chunk(self.limits, key, found, byte_range)
        return found


def _check_bytes(key: str, size: int) -> None:
    most = MAX_METADATA_BYTES if key.rpartition("/")[2] in METADATA else MAX_FILE_BYTES
    if size > most:
        raise BadDimensions(f"{key} has {size:,} bytes; up to {most:,} are read.")


def _check_chunk(limits: Limits, key: str, found: Buffer | None, byte_range: ByteRequest | None) -> None:
    if found is not None and key.rpartition("/")[2] not in METADATA and not isinstance(byte_range, SuffixByteRequest):
        limits.check(key, found.to_bytes(), byte_range is not None)


def check_zip(uri: str, path: Path) -> None:
    """Raise BadDimensions where a zip file's end says that its directory has more than MAX_ENTRIES entries."""
    with path.open("rb") as file:
        size = path.stat().st_size
        file.seek(max(0, size - 2**16 - 22))
        tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + 22:
        return
    (entries,) = struct.unpack_from("<H", tail, at + 10)
    large = tail.rfind(b"PK\6\6", 0, at)
    if entries == 0xFFFF and large >= 0 and len(tail) >= large + 40:
        (entries,) = struct.unpack_from("<Q", tail, large + 32)
    if entries > MAX_ENTRIES:
        raise BadDimensions(f"{uri} has {entries:,} entries; up to {MAX_ENTRIES:,} are read.")


def check_entries(uri: str, entries: Iterable[zipfile.ZipInfo]) -> None:
    """Raise BadDimensions for a file in a zip that becomes too large."""
    for entry in entries:
        most = MAX_METADATA_BYTES if entry.filename.rpartition("/")[2] in METADATA else MAX_FILE_BYTES
        if entry.file_size > most:
            raise BadDimensions(f"{uri}: {entry.filename} has {entry.file_size:,} bytes; up to {most:,} are read.")

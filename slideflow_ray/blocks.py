"""A remote object as a file that is fetched block by block: what is not read is not fetched.

For slides of which little is wanted. Blocks lie in the machine's cache beside the whole copies, each a file that
appears whole, so processes share them. Each request names the ETag that was seen first, as downloads do.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from slideflow_ray import storage
from slideflow_ray.cache import cache_folder, room
from slideflow_ray.errors import ReadError
from slideflow_ray.remote import Seen, check_unchanged, speaking_of

BLOCK = 2**18
"""Bytes of a block, a multiple of what a native tile of 256 px has (5 to 40 kB)."""
RUN = 64
"""The most blocks that one request asks for: 16 MiB."""
REQUESTS = 8
"""How many requests one process has under way at a time."""


class NoRanges(ReadError):
    """The server cannot be asked for a part of an object."""

    next_step = "Nothing: such an object is fetched whole."


class Blocks(io.RawIOBase):
    """A file-like object over what was seen; not for several threads at once. Raises SourceChanged, ReadError."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen, self.size = seen, seen.size
        self.name = PurePosixPath(seen.uri).name
        self._folder = cache_folder() / f"{seen.name}.blocks"
        self._at = 0
        self._last: tuple[int, bytes] = (-1, b"")
        self._folder.mkdir(exist_ok=True)
        os.utime(self._folder)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte, as files do."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from here on; return how many bytes there were."""
        data = self.pread(len(buffer), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def pread(self, count: int, offset: int) -> bytes:
        """Return `count` bytes from `offset` on, fewer at the end of the object."""
        stop = min(offset + count, self.size)
        if stop <= offset:
            return b""
        wanted = range(offset // BLOCK, (stop - 1) // BLOCK + 1)
        there = {index: data for index in wanted if (data := self._read(index)) is not None}
        there |= self._fetch([index for index in wanted if index not in there])
        self._last = (wanted[-1], there[wanted[-1]])
        whole = b"".join(there[index] for index in wanted)
        return whole[offset - wanted[0] * BLOCK :][: stop - offset]

    def want(self, pieces: Iterable[tuple[int, int]]) -> None:
        """Fetch the blocks of (offset, count) pieces that will be read next, several at a time."""
        missing = [index for index in blocks_of(pieces) if not (self._folder / str(index)).exists()]
        if missing:
            self._fetch(missing)

    def _read(self, index: int) -> bytes | None:
        if self._last[0] == index:
            return self._last[1]
        data = storage.read_bytes(self._folder / str(index))
        return data if data is not None and len(data) == self._length(index, index + 1) else None

    def _length(self, first: int, stop: int) -> int:
        return min(stop * BLOCK, self.size) - first * BLOCK

    def _fetch(self, missing: Sequence[int]) -> dict[int, bytes]:
        """Fetch blocks (in order), keep them, and return them too: the cache may lose them at once."""
        if not missing:
            return {}
        total = sum(self._length(i, i + 1) for i in missing)
        found: dict[int, bytes] = {}
        with room(self.seen.uri, total) as scratch, ThreadPoolExecutor(REQUESTS) as pool:
            runs = runs_of(missing)
            for (first, stop), data in zip(runs, pool.map(self._ask, runs), strict=True):
                for index in range(first, stop):
                    found[index] = data[(index - first) * BLOCK :][:BLOCK]
                    self._keep(index, found[index], scratch)
        return found

    def _keep(self, index: int, data: bytes, scratch: Path) -> None:
        with speaking_of(self.seen.uri):
            (scratch / str(index)).write_bytes(data)
        with contextlib.suppress(FileNotFoundError):  # the entry was evicted
            self._folder.mkdir(exist_ok=True)
            os.replace(scratch / str(index), self._folder / str(index))

    def _ask(self, run: tuple[int, int]) -> bytes:
        """Return the bytes of blocks `run`, by one request. Raises SourceChanged, NoRanges, ReadError."""
        from obstore.exceptions import NotSupportedError

        from slideflow_ray.bucket import get, tried

        (part,) = self.seen.parts
        store, _ = storage.split_uri(self.seen.uri)
        options: Any = {"range": (run[0] * BLOCK, min(run[1] * BLOCK, self.size)), "if_match": part.e_tag}

        def ask() -> bytes:
            got = get(store, part.key, options)
            check_unchanged(self.seen, part, got.meta)
            return bytes(got.bytes())

        try:
            with speaking_of(self.seen.uri):
                data = tried(ask)
        except ReadError as error:
            if isinstance(error.__cause__, NotSupportedError):
                raise NoRanges(f"{self.seen.uri}: its server gives no parts of it.") from error
            raise
        if len(data) != self._length(*run):
            raise ReadError(f"{self.seen.uri}: {self._length(*run):,} bytes were asked for and {len(data):,} came.")
        return data


def blocks_of(pieces: Iterable[tuple[int, int]]) -> list[int]:
    """Return the numbers of the blocks that (offset, count) pieces lie in, in order.

    >>> blocks_of([(0, 10), (BLOCK - 1, 2), (5 * BLOCK, 0)])
    [0, 1]
    """
    pieces = [(offset, count) for offset, count in pieces if count > 0]
    return sorted({i for offset, count in pieces for i in range(offset // BLOCK, (offset + count - 1) // BLOCK + 1)})


def runs_of(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return ordered numbers as (first, stop) of neighbours, at most RUN in one.

    >>> runs_of([1, 2, 3, 7])
    [(1, 4), (7, 8)]
    """
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == runs[-1][1] and index - runs[-1][0] < RUN:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs

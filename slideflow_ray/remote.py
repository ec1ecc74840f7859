"""Slides, masks, annotations and bundles that lie in an object store or on the web: a copy on this machine.

Libraries that decode slides want files, so a remote object is fetched once to a cache of
bounded size that the processes of one machine share, and read there at the speed of a disk.
What was fetched is what was asked for: the request names the ETag that was seen first, so
an object that changes while it is read is an error, as is one of another length.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from slideflow_ray import storage
from slideflow_ray.cache import cache_folder, room
from slideflow_ray.errors import DiskFull, ReadError, SlideError, SlideNotFound, SourceChanged
from slideflow_ray.uris import WEB

if TYPE_CHECKING:
    from obstore.store import ObjectStore

MAX_PARTS = 200_000
"""The most objects below one uri: a slide in many files, or an OME-Zarr."""
TRIES = 4
"""How often a download that breaks off is begun again; single requests are repeated by obstore besides."""


@dataclass(frozen=True)
class Part:
    """One object as it was seen: its key, length in bytes and ETag; where there is none, when it was last modified."""

    key: str
    size: int
    e_tag: str
    modified: str = ""

    @property
    def strong(self) -> bool:
        """Whether requests can name it: a weak ETag matches nothing (RFC 9110, 13.1.1)."""
        return bool(self.e_tag) and not self.e_tag.startswith("W/")


@dataclass(frozen=True)
class Seen:
    """What a remote uri names: one object, or the objects below it."""

    uri: str
    parts: tuple[Part, ...]
    single: bool

    @property
    def size(self) -> int:
        """Bytes over all parts."""
        return sum(part.size for part in self.parts)

    @property
    def identity(self) -> str:
        """ETags and sizes as one text, which tells whether anything changed without reading it again."""
        lines = "".join(f"{part.e_tag or part.modified} {part.size} {part.key}\n" for part in self.parts)
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def name(self) -> str:
        """The name of its entry in the cache."""
        return hashlib.sha256(f"{self.uri}\n{self.identity}".encode()).hexdigest()[:24]

    @property
    def fixed(self) -> bool:
        """Whether it is one object that requests can name by a strong ETag, so that parts of it belong together."""
        return self.single and self.parts[0].strong


def look(uri: str) -> Seen:
    """Return what a remote uri names now. Raises SlideNotFound, ReadError (no access, or no answer in two minutes)."""
    from slideflow_ray.bucket import head

    store, key = storage.split_uri(uri)
    with speaking_of(uri):
        try:
            return Seen(uri, (_part(head(store, key)),), True)
        except FileNotFoundError:
            if storage.scheme_of(uri) in WEB:
                raise SlideNotFound(f"{uri} does not exist.") from None
        parts = _listed(uri, cast("ObjectStore", store), key)
    if not parts:
        raise SlideNotFound(f"{uri} does not exist.")
    return Seen(uri, tuple(sorted(parts, key=lambda part: part.key)), False)


def _listed(uri: str, store: ObjectStore, key: str) -> list[Part]:
    """The objects below a key; a listing that breaks off is begun again."""
    import obstore

    from slideflow_ray.bucket import tried

    def ask() -> list[Part]:
        parts: list[Part] = []
        for batch in obstore.list(store, prefix=key.rstrip("/") + "/"):
            parts += [_part(about) for about in batch]
            if len(parts) > MAX_PARTS:
                raise ReadError(f"{uri} holds more than {MAX_PARTS:,} objects.")
        return parts

    return tried(ask)


def _part(about: Any) -> Part:
    """What was said of an object. Raises ReadError where nothing tells one version of it from another."""
    part = Part(about["path"], int(about["size"]), about["e_tag"] or "", str(about.get("last_modified") or ""))
    if not (part.e_tag or part.modified):
        said = f"{part.key} has neither ETag nor Last-Modified, so nobody could tell when it changes."
        raise ReadError(said, next_step="Serve it from where it has one (any bucket, most web servers), or copy it.")
    return part


def at_hand(uri: str | Path) -> Path:
    """Return a local path with what `uri` names: itself where it is local, else its copy in the cache.

    Raises SlideNotFound, ReadError, SourceChanged, DiskFull.
    """
    return fetched(look(str(uri))) if storage.is_remote(uri) else storage.local_path(uri)


def fetched(seen: Seen) -> Path:
    """Return the path of the copy of what was seen, fetching it first if it is not in the cache."""
    with storage.alone(cache_folder() / f"{seen.name}.lock"):
        if goal := copied(seen):
            return goal
        goal = _goal(seen)
        with room(seen.uri, seen.size) as scratch:
            new = scratch / "new"
            for part in seen.parts:
                _download(seen, part, new / goal.name if seen.single else new / goal.name / _below(seen, part))
            shutil.rmtree(goal.parent, ignore_errors=True)  # of one that was half evicted
            os.replace(new, goal.parent)
    return goal


def copied(seen: Seen) -> Path | None:
    """Return the path of the copy if it is in the cache, and whole."""
    goal = _goal(seen)
    try:
        os.utime(goal.parent)
        held = sum(p.stat().st_size for p in ([goal] if goal.is_file() else goal.rglob("*")) if p.is_file())
    except FileNotFoundError:
        return None
    return goal if goal.exists() and held == seen.size else None


def _goal(seen: Seen) -> Path:
    return cache_folder() / seen.name / (PurePosixPath(seen.uri.rstrip("/")).name or "object")


def _below(seen: Seen, part: Part) -> str:
    """The part's path below the uri, made only of names that stay below it. Raises ReadError."""
    _, key = storage.split_uri(seen.uri)
    names = part.key[len(key.rstrip("/")) + 1 :].split("/")
    if any(name in ("", ".", "..") for name in names):
        raise ReadError(f"{seen.uri} holds an object named {part.key!r}.")
    return "/".join(names)


def _download(seen: Seen, part: Part, path: Path) -> None:
    """Fetch one object; a transfer that breaks off is begun again. Raises SourceChanged, ReadError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, TRIES + 1):
        try:
            with speaking_of(seen.uri):
                _stream(seen, part, path)
            return
        except SourceChanged:
            raise
        except ReadError:
            if attempt == TRIES:
                raise


def _stream(seen: Seen, part: Part, path: Path) -> None:
    from slideflow_ray.bucket import get

    store, _ = storage.split_uri(seen.uri)
    got = get(store, part.key, {"if_match": part.e_tag} if part.strong else {})
    check_unchanged(seen, part, got.meta)
    length = 0
    with path.open("wb") as file:
        for piece in got.stream(min_chunk_size=8 * 2**20):
            length += len(piece)
            file.write(piece)
    if length != part.size:
        raise ReadError(f"{seen.uri}: {part.key} has {part.size:,} bytes and {length:,} came.")


def check_unchanged(seen: Seen, part: Part, about: Any) -> None:
    """Raise SourceChanged where an answer is of another version: not every server knows conditional requests."""
    modified = "" if part.e_tag else str(about.get("last_modified") or "")
    if (about["e_tag"] or "").strip('"') != part.e_tag.strip('"') or (modified and modified != part.modified):
        raise SourceChanged(f"{seen.uri} changed while it was read.")


@contextlib.contextmanager
def speaking_of(uri: str) -> Iterator[None]:
    """Name the uri, and not the request with its headers, in what an object store complains of."""
    from obstore.exceptions import BaseError, PreconditionError

    try:
        yield
    except PreconditionError as error:
        raise SourceChanged(f"{uri} changed while it was read.") from error
    except (FileNotFoundError, SlideError):
        raise
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise DiskFull(f"No space left while fetching {uri}.") from error
        raise ReadError(f"{uri} cannot be fetched: {storage.first_line(error)}.") from error
    except BaseError as error:
        raise ReadError(f"{uri} cannot be fetched: {storage.first_line(error)}.") from error

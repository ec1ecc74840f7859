"""What a file is: its SHA-256, remembered between runs by size and modification time.

Of a remote slide that is read block by block it is ETag and size (``etag:...``), as nobody has read it whole; so the
identity also remembers how the slide is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slideflow_ray import storage
from slideflow_ray.blocks import Blocks
from slideflow_ray.errors import NotASlide, ReadError, SlideNotFound, SourceChanged
from slideflow_ray.remote import Seen, copied, fetched, look

Sparse = Callable[[Seen], bool]
"""Says whether a remote slide is to be read by blocks; asked once, when it is met for the first time."""

ETAG = "etag:"
AGAIN = "Run again: it is planned anew."


class Identities:
    """Identities of many files, remembered in one note.

    A file whose size and modification time are those of the last look is not hashed again.
    """

    def __init__(self, note: Path | None = None) -> None:
        self._note = note
        self._known: dict[str, dict[str, Any]] = (storage.read_json(note) if note else None) or {}
        self._new = False

    def of(self, uri: str, sha256: str | None = None, sparse: Sparse | None = None) -> str:
        """Return ``sha256:<64 hex>`` of a local file; for a folder (a multi-file slide) that of its files.

        Of a remote one ``etag:<ETag>:<size>`` where it is `sparse`, and no `sha256` is to be compared.
        Raises SlideNotFound, and ReadError when `sha256` is given and is another.
        """
        if storage.is_remote(uri):
            return self._remote(uri, sha256, sparse)
        path = storage.local_path(uri)
        seen = _seen(uri, path)
        known = self._known.get(str(path.absolute()))
        if known is None or known["seen"] != seen:
            known = {"seen": seen, "identity": f"sha256:{_hash(_files(path), path)}"}
            if _seen(uri, path) != seen:
                raise SourceChanged(f"{uri} changed while it was read.")
            self._known[str(path.absolute())] = known
            self._new = True
        return _checked(uri, str(known["identity"]), sha256)

    def _remote(self, uri: str, sha256: str | None, sparse: Sparse | None) -> str:
        """The same of a remote object, by its copy; one whose ETag and size are known is not fetched for it."""
        now = look(uri)
        known = self._known.get(uri)
        if known is None or known["seen"] != _mark(now) or (sha256 and known["identity"].startswith(ETAG)):
            known = {"seen": _mark(now), "identity": _identity(now, None if sha256 else sparse)}
            self._known[uri] = known
            self._new = True
        return _checked(uri, str(known["identity"]), sha256)

    def source(self, uri: str) -> Path | Blocks:
        """Return where a slide's bytes are at hand, as it was decided when its identity was found.

        A path, or a file that is fetched block by block. Raises SlideNotFound, ReadError, DiskFull, and SourceChanged
        where a slide is not what it was then.
        """
        if not storage.is_remote(uri):
            return self.same(uri)
        now, known = look(uri), self._known.get(uri)
        if known is not None and known["seen"] != _mark(now):
            raise SourceChanged(f"{uri} changed after its tiles were laid.", next_step=AGAIN)
        if known is not None and known["identity"].startswith(ETAG):
            return copied(now) or Blocks(now)
        return fetched(now)

    def same(self, uri: str) -> Path:
        """Return a local slide's path. Raises SourceChanged where it is not what was hashed, SlideNotFound."""
        path = storage.local_path(uri)
        known = self._known.get(str(path.absolute()))
        if known is not None and known["seen"] != _seen(uri, path):
            raise SourceChanged(f"{uri} changed after its tiles were laid.", next_step=AGAIN)
        return path

    def remembered(self, uri: str) -> str:
        """Return the identity that was found, "" where none was."""
        where = uri if storage.is_remote(uri) else str(storage.local_path(uri).absolute())
        return str(self._known.get(where, {}).get("identity", ""))

    def save(self) -> None:
        """Write the note, if anything was hashed."""
        if self._note and self._new:
            storage.write_atomic(self._note, storage.to_json(self._known))
            self._new = False


def identity(uri: str, cache: Path | None = None, sha256: str | None = None, sparse: Sparse | None = None) -> str:
    """Return the identity of one file, remembered in a note of its own below the folder `cache`.

    Raises SlideNotFound, ReadError (see `Identities.of`).
    """
    known = Identities(_note(uri, cache) if cache else None)
    found = known.of(uri, sha256, sparse)
    known.save()
    return found


def source(uri: str, cache: Path) -> Path | Blocks:
    """Return where a slide's bytes are at hand, by the note that `identity` left (see `Identities.source`)."""
    return Identities(_note(uri, cache)).source(uri)


def check_same(uri: str, cache: Path) -> str:
    """Return the identity that `identity` found. Raises SourceChanged where a local slide is no longer that.

    By size and time; called when pixels have been read and are not yet written. Of remote ones each request says
    it itself.
    """
    known = Identities(_note(uri, cache))
    if not storage.is_remote(uri):
        known.same(uri)
    return known.remembered(uri)


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _seen(uri: str, path: Path) -> list[list[Any]]:
    """Sizes and modification times of a slide's files. Raises SlideNotFound, NotASlide for a pipe or a device."""
    if not path.exists():
        raise SlideNotFound(f"{uri} does not exist.")
    if not path.is_file() and not path.is_dir():
        raise NotASlide(f"{uri} is no file, but a pipe, a socket or a device.")
    try:
        return [[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in _files(path)]
    except FileNotFoundError as error:
        raise SourceChanged(f"{uri} changed while it was looked at.") from error


def _note(uri: str, cache: Path) -> Path:
    where = uri if storage.is_remote(uri) else str(storage.local_path(uri).absolute())
    return cache / f"{hashlib.sha256(where.encode()).hexdigest()[:24]}.json"


def _mark(seen: Seen) -> list[Any]:
    return [seen.identity, seen.size]


def _identity(seen: Seen, sparse: Sparse | None) -> str:
    if sparse is not None and sparse(seen):
        e_tag = seen.parts[0].e_tag.strip('"')
        return f"{ETAG}{e_tag}:{seen.size}"
    copy = fetched(seen)
    return f"sha256:{_hash(_files(copy), copy)}"


def _checked(uri: str, found: str, sha256: str | None) -> str:
    if sha256 and found != f"sha256:{sha256.lower()}":
        raise ReadError(f"{uri} has {found}, the cohort says sha256:{sha256.lower()}.")
    return found


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of one file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(files: list[Path], root: Path) -> str:
    if files == [root]:
        return file_sha256(root)
    lines = "".join(f"{file_sha256(p)}  {p.relative_to(root).as_posix()}\n" for p in files)
    return hashlib.sha256(lines.encode()).hexdigest()

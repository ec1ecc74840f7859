"""What a file is: its SHA-256, remembered between runs by size and modification time."""

from __future__ import annotations

import hashlib
from pathlib import Path

from slideflow_ray import storage
from slideflow_ray.errors import SlideNotFound


def identity(uri: str, cache: Path | None = None) -> str:
    """Return ``sha256:<64 hex>`` of a local file; for a folder (a multi-file slide) that of its files.

    A file whose size and modification time are those of the last look is not hashed
    again when `cache` is a folder to remember in.
    Raises SlideNotFound.
    """
    path = storage.local_path(uri)
    if not path.exists():
        raise SlideNotFound(f"{uri} does not exist.")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    seen = [[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    note = cache / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.json" if cache else None
    known = storage.read_json(note) if note else None
    if known and known["seen"] == seen:
        return str(known["identity"])
    found = f"sha256:{_hash(files, path)}"
    if note:
        storage.write_atomic(note, storage.to_json({"seen": seen, "identity": found}))
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

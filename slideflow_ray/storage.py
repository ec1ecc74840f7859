"""Where bytes live: allowed uris, atomic and conditional writes.

Only local paths and ``file://`` are opened for now; other schemes are refused by
name rather than handed to a library that resolves whatever a string asks for.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from slideflow_ray.errors import ConfigError, CorruptStore, DiskFull

SCHEMES = ("file",)


def local_path(uri: str) -> Path:
    """Return the local path that `uri` names.

    Raises ConfigError for a scheme that is not allowed.

    >>> local_path("file:///data/a%20slide.svs").as_posix()
    '/data/a slide.svs'
    """
    if "://" not in uri:
        return Path(uri)
    parts = urlsplit(uri)
    if parts.scheme not in SCHEMES:
        raise ConfigError(f"{uri} has the scheme {parts.scheme!r}; allowed are local paths and file://.")
    return Path(unquote(parts.path))


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old bytes or all of the new ones."""
    with _temporary(path, data) as temporary:
        os.replace(temporary, path)


def create(path: Path, data: bytes) -> bool:
    """Write `data` if `path` does not exist yet; return whether it was written (conditional put)."""
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        return True


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        yield name
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise DiskFull(f"No space left while writing {path}.") from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def to_json(value: object) -> bytes:
    """Return `value` as JSON that is the same bytes for the same value, one key a line."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, or None where there is no such file. Raises CorruptStore when it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptStore(f"{path} is not the JSON that was written: {error}.") from error

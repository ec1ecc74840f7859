"""Where bytes live: allowed uris, atomic and conditional writes, on disk or in an object store.

A place is a local path or an object store's uri (``s3://bucket/key``, ``gs://...``). Both
have the interface of pathlib (universal_pathlib over obstore for the second), and what
differs between them is in this file: a put is atomic by itself, and `create` is a
conditional put. Schemes that are not on the list are refused by name rather than handed
to a library that resolves whatever a string asks for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from slideflow_ray.errors import ConfigError, CorruptStore, DiskFull, InfrastructureError
from slideflow_ray.uris import WEB, check_uri

if TYPE_CHECKING:
    from obstore.store import ObjectStore
    from zarr.abc.store import Store

    from slideflow_ray.website import Website

COLLAPSED = re.compile(r"(?:^|/)(?:s3|gs|https?):/.*")
ALLOW = "SLIDEFLOW_RAY_ALLOW"
"""Names the environment variable with the schemes of `uris.WEB` that are opened too, with a comma between them."""


def scheme_of(uri: str) -> str:
    """Return the scheme of a uri, "" for a plain path. Raises ConfigError for one that is not allowed.

    >>> scheme_of("s3://bucket/a.svs"), scheme_of("/data/a.svs")
    ('s3', '')
    """
    if "://" not in uri:
        if lost := COLLAPSED.search(uri):  # pathlib makes one slash of two: never a folder named "s3:"
            raise ConfigError(f"{lost[0]}... is taken for a local path here.", next_step="Name a local path.")
        return ""
    try:
        check_uri(uri)
    except ValueError as error:
        raise ConfigError(f"{uri.split('@')[-1].split('?')[0]} {error}.") from error
    scheme = uri.split("://", 1)[0]
    if scheme in WEB and scheme not in allowed_web():
        step = f"Set {ALLOW}={scheme} in the environment of every process to allow it."
        raise ConfigError(f"{uri} lies on the web, which is not opened.", next_step=step)
    return scheme


def allowed_web() -> tuple[str, ...]:
    """Return the schemes of the web that this process opens."""
    return tuple(name for text in os.environ.get(ALLOW, "").split(",") if (name := text.strip()) in WEB)


def is_remote(place: str | Path) -> bool:
    """Return whether a uri or a place lies in an object store or on the web. Raises ConfigError (see `scheme_of`)."""
    return scheme_of(str(place)) not in ("", "file")


def local_path(uri: str | Path) -> Path:
    """Return the local path that `uri` names.

    Raises ConfigError for a scheme that is not allowed, or is not local.

    >>> local_path("file:///data/a%20slide.svs").as_posix()
    '/data/a slide.svs'
    """
    scheme = scheme_of(str(uri))
    if scheme not in ("", "file"):
        raise ConfigError(f"{uri} is no local file.")
    return Path(unquote(urlsplit(str(uri)).path)) if scheme else Path(uri)


def place(uri: str | Path) -> Path:
    """Return a path for a local uri, and for an object store's what has the interface of one.

    Raises ConfigError for a scheme that is not allowed, and for results on the web.
    """
    scheme = scheme_of(str(uri))
    if scheme in ("", "file"):
        return local_path(uri)
    if scheme in WEB:
        raise ConfigError(f"{uri}: nothing can be written to the web.", next_step="Name a folder, s3:// or gs://.")
    from upath import UPath

    from slideflow_ray import bucket

    bucket.register(scheme)
    return cast(Path, UPath(str(uri).rstrip("/")))


def split_uri(uri: str) -> tuple[ObjectStore | Website, str]:
    """Return the object store (or web server) of a remote uri, and the key in it."""
    from slideflow_ray.bucket import opened
    from slideflow_ray.website import Website

    parts = urlsplit(uri)
    root = f"{parts.scheme}://{parts.netloc}"
    store = Website(root, allowed_web()) if parts.scheme in WEB else opened(root)
    return store, uri.split("://", 1)[1].partition("/")[2]


def zarr_store(root: Path) -> Path | Store:
    """Return what zarr opens for a place: a local path, or a store over the bucket."""
    if not is_remote(root):
        return root
    return _zarr_store(str(root))


@lru_cache(maxsize=256)
def _zarr_store(uri: str) -> Store:
    from slideflow_ray.bucket import ZarrBucket, opened

    root, _, key = uri.partition("://")[2].partition("/")
    return ZarrBucket(opened(f"{scheme_of(uri)}://{root}", key))


def free_bytes(folder: Path) -> float:
    """Return the free bytes where `folder` is; an object store has no end."""
    return float("inf") if is_remote(folder) else shutil.disk_usage(folder).free


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old bytes or all of the new ones."""
    if is_remote(path):
        _put(path, data)
        return
    with _temporary(path, data) as temporary:
        os.replace(temporary, path)


def create(path: Path, data: bytes) -> bool:
    """Write `data` if `path` does not exist yet; return whether it was written (conditional put)."""
    if is_remote(path):
        from obstore.exceptions import AlreadyExistsError

        try:
            _put(path, data, "create")
        except AlreadyExistsError:
            return path.read_bytes() == data  # ours after all, where an answer got lost and the put was repeated
        return True
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        return True


def swap(path: Path, old: bytes | None, data: bytes) -> bool:
    """Replace what holds `old` (None: nothing) by `data`, in one step; return False where it holds something else.

    Compare and swap. On disk under a lock that others of this function take, as far as the file system has locks; an
    object store compares the ETag. The file is young again even where `data` is `old`.
    """
    if is_remote(path):
        return create(path, data) if old is None else _swapped(path, old, data)
    with alone(_lock_of(path)):
        if read_bytes(path) != old:
            return False
        write_atomic(path, data)
        return True


def discard(path: Path, old: bytes) -> None:
    """Delete a file that holds `old`. An object store cannot compare and delete in one step: there it is two."""
    with contextlib.nullcontext() if is_remote(path) else alone(_lock_of(path)):
        if read_bytes(path) == old:
            path.unlink(missing_ok=True)


def read_bytes(path: Path) -> bytes | None:
    """Return what a file holds, None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time, of all that come by this local file."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_of(path: Path) -> Path:
    return path.parent / ".cache" / f"{path.stem}.lock"


def _swapped(path: Path, old: bytes, data: bytes) -> bool:
    from obstore.exceptions import BaseError, PreconditionError

    from slideflow_ray.bucket import versioned

    try:
        there, e_tag = versioned(*split_uri(str(path)))
        if there != old:
            return False
        _put(path, data, {"e_tag": e_tag})
    except FileNotFoundError:
        return False
    except PreconditionError:
        return read_bytes(path) == data  # ours after all, where an answer got lost and the put was repeated
    except BaseError as error:
        raise InfrastructureError(f"{path} cannot be read: {first_line(error)}.") from error
    return True


def _put(path: Path, data: bytes, mode: Any = "overwrite") -> None:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

    store, key = split_uri(str(path))
    try:
        obstore.put(cast("ObjectStore", store), key, data, mode=mode)
    except (AlreadyExistsError, PreconditionError, FileNotFoundError):
        raise
    except BaseError as error:
        raise InfrastructureError(f"{path} cannot be written: {first_line(error)}.") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without what may follow of requests and answers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(". ")


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


def copy_tree(folder: Path, goal: Path) -> None:
    """Copy the files below a folder of zarr to another place, replacing what is there.

    On disk the whole folder appears at once. An object store renames nothing: there the folder's own zarr.json goes
    first and comes last, so that what is half there is no group.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    names = sorted(files, key=lambda name: (name == "zarr.json", name))
    if is_remote(goal):
        (goal / "zarr.json").unlink(missing_ok=True)
        for old in [path for path in goal.rglob("*") if path.is_file()]:
            old.unlink(missing_ok=True)
        for name in names:
            write_atomic(goal / name, files[name].read_bytes())
        return
    with tempfile.TemporaryDirectory(prefix=".copy.", dir=goal.parent) as scratch:
        new = Path(scratch) / "new"
        for name in names:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(files[name].read_bytes())
        if goal.exists():
            os.rename(goal, Path(scratch) / "old")
        os.rename(new, goal)


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

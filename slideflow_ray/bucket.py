"""A bucket as fsspec and zarr see it, which asks again where an answer breaks off.

obstore repeats requests that fail (503, 429, a connection that is reset); an answer whose
body ends too early it hands on as an error. Reading is idempotent, so it is done again.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any

import fsspec
import obstore
from obstore.exceptions import GenericError
from obstore.fsspec import FsspecStore
from obstore.store import GCSStore, ObjectStore, S3Store
from zarr.storage import ObjectStore as ZarrObjectStore

from slideflow_ray.website import Website

TRIES = 6
PAUSE_S = 0.1

_RETRY: Any = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=15), "base": 2},
}


@lru_cache(maxsize=256)
def opened(root: str, prefix: str = "") -> ObjectStore:
    """Return the object store of ``s3://bucket`` or ``gs://bucket``, or what lies below a prefix.

    Requests are repeated with growing pauses, for two minutes. Credentials and endpoint come from the
    environment (AWS_..., GOOGLE_...), and are written nowhere.
    """
    scheme, _, name = root.partition("://")
    if scheme == "s3":
        return S3Store(name, prefix=prefix or None, retry_config=_RETRY)
    return GCSStore(name, prefix=prefix or None, retry_config=_RETRY)


async def again[T](ask: Callable[[], Awaitable[T]]) -> T:
    """Return what `ask` gives, asking again with growing pauses where an answer breaks off."""
    for attempt in range(TRIES - 1):
        try:
            return await ask()
        except GenericError:
            await asyncio.sleep(PAUSE_S * 2**attempt)
    return await ask()


def tried[T](ask: Callable[[], T]) -> T:
    """Return what `ask` gives, asking again as `again` does."""
    for attempt in range(TRIES - 1):
        try:
            return ask()
        except GenericError:
            time.sleep(PAUSE_S * 2**attempt)
    return ask()


def head(store: ObjectStore | Website, key: str) -> Any:
    """Return what is known of an object, with its path, size and e_tag."""
    return tried(lambda: store.head(key) if isinstance(store, Website) else obstore.head(store, key))


def get(store: ObjectStore | Website, key: str, options: Any = None) -> Any:
    """Return an object that is still to be read: see obstore.get."""
    return store.get(key, options or {}) if isinstance(store, Website) else obstore.get(store, key, options=options)


def versioned(store: ObjectStore | Website, key: str) -> tuple[bytes, str]:
    """Return an object's bytes and the ETag that belongs to them. Raises FileNotFoundError."""

    def ask() -> tuple[bytes, str]:
        got = get(store, key)
        return bytes(got.bytes()), got.meta["e_tag"] or ""

    return tried(ask)


class _Files(FsspecStore):
    """fsspec's view; an object is read in one piece, as our files are at most a shard."""

    asynchronous = False

    def _construct_store(self, bucket: str) -> Any:
        return opened(f"{self.protocol}://{bucket}")

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return await again(lambda: FsspecStore._info(self, path, **kwargs))

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        ls: Any = FsspecStore._ls
        return await again(lambda: ls(self, path, detail=detail, **kwargs))

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        return await again(lambda: FsspecStore._cat_file(self, path, start=start, end=end, **kwargs))

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        if mode == "rb":
            return io.BytesIO(self.cat_file(path))
        return super()._open(path, mode, *args, **kwargs)


@lru_cache
def register(scheme: str) -> None:
    """Make fsspec (and so universal_pathlib) open a scheme by us, in this process."""
    made = type(f"Bucket_{scheme}", (_Files,), {"protocol": scheme})
    fsspec.register_implementation(scheme, made, clobber=True)


class ZarrBucket(ZarrObjectStore[Any]):
    """zarr's view."""

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        """Return a key's bytes, or None."""
        return await again(lambda: ZarrObjectStore.get(self, *args, **kwargs))

    async def get_partial_values(self, *args: Any, **kwargs: Any) -> Any:
        """Return parts of keys' bytes."""
        return await again(lambda: ZarrObjectStore.get_partial_values(self, *args, **kwargs))

    async def exists(self, key: str) -> bool:
        """Return whether a key is there."""
        return await again(lambda: ZarrObjectStore.exists(self, key))

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """Give the names below a prefix."""

        async def names() -> list[str]:
            return [name async for name in ZarrObjectStore.list_dir(self, prefix)]

        for name in await again(names):
            yield name

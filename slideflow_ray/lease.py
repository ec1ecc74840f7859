"""The lease of an output folder: it only keeps a second run out, and holds no truth."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from slideflow_ray import storage
from slideflow_ray.errors import LeaseError, SlideNotFound
from slideflow_ray.remote import look

EXPIRES_S = 60.0
BEAT_S = 15.0


@contextlib.contextmanager
def lease(out: Path) -> Iterator[None]:
    """Hold ``<out>/lease.json`` while the block runs; sweep half-written files of those that died.

    The lease of a process that is known to be gone, or that was silent for a minute where
    that cannot be known, is taken over. Raises LeaseError while another run holds it.
    """
    path = out / "lease.json"
    owner = uuid.uuid4().hex
    _take(path, {"owner": owner, **_process()})
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, owner, stop), daemon=True)
    beat.start()
    try:
        sweep(out)
        yield
        sweep(out)  # of workers that died in this run
    finally:
        stop.set()
        beat.join()
        with _alone(path):
            if (storage.read_json(path) or {}).get("owner") == owner:
                path.unlink(missing_ok=True)


def _take(path: Path, record: dict[str, Any]) -> None:
    """Write the lease, in one step with the look at the one that is there. Raises LeaseError."""
    with _alone(path):
        seen = _seen(path)
        there = storage.read_json(path)
        if there is not None and _alive(path, there):
            raise LeaseError(f"{path.parent} is in use by process {there.get('pid')} on {there.get('host')}.")
        data = storage.to_json(record)
        if not storage.is_remote(path):
            storage.write_atomic(path, data)
        elif not (storage.swap(path, seen, data) if seen else storage.create(path, data)):
            raise LeaseError(f"{path.parent} was taken by another run at the same moment.")


def _seen(path: Path) -> str:
    """The ETag of a remote lease, "" where there is none (or it is a local file, which has a lock)."""
    if not storage.is_remote(path):
        return ""
    try:
        return look(str(path)).parts[0].e_tag
    except SlideNotFound:
        return ""


def held(out: Path) -> bool:
    """Return whether a live run holds the lease of `out`; the lease of a killed run does not count."""
    path = out / "lease.json"
    there = storage.read_json(path)
    return there is not None and _alive(path, there)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Look at the lease and change it as one step, against others that do the same.

    An object store has no locks: there the change itself is conditional.
    """
    if storage.is_remote(path):
        yield
        return
    lock = path.parent / ".cache" / "lease.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _process() -> dict[str, Any]:
    """What tells this process from every other: also from one of its number in another container or boot."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "space": _space(),
    }


def _space() -> str:
    """The boot and the process-number space that a pid belongs to, "" where that cannot be known."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _alive(path: Path, there: dict[str, Any]) -> bool:
    if there.get("space") and there["space"] == _space():
        try:
            return bool(psutil.Process(there["pid"]).create_time() == there["started"])
        except psutil.NoSuchProcess:
            return False
    return _fresh(path)


def _fresh(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < EXPIRES_S
    except FileNotFoundError:
        return False


def _beat(path: Path, owner: str, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        with contextlib.suppress(FileNotFoundError), _alone(path):
            if (storage.read_json(path) or {}).get("owner") != owner:
                return
            _touch(path)


def _touch(path: Path) -> None:
    """Make the lease young again; writing the same bytes is how an object store does it."""
    if storage.is_remote(path):
        storage.write_atomic(path, path.read_bytes())
    else:
        os.utime(path)


def sweep(out: Path) -> int:
    """Delete the ``*.partial`` files that killed writers left; only the lease's holder may. Return how many."""
    if storage.is_remote(out):
        return 0  # a put is whole or is not there
    found = [p for folder in ("slides", "commits") for p in (out / folder).rglob("*.partial") if p.is_file()]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)

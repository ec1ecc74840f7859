"""The lease of an output folder: it only keeps a second run out, and holds no truth."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from slideflow_ray import storage
from slideflow_ray.errors import LeaseError

EXPIRES_S = 60.0
BEAT_S = 15.0


@contextlib.contextmanager
def lease(out: Path) -> Iterator[None]:
    """Hold ``<out>/lease.json`` while the block runs; sweep half-written files of a run that died.

    The lease of a process that is gone (same machine) or silent for a minute is taken over.
    Raises LeaseError while another run holds it.
    """
    path = out / "lease.json"
    owner = uuid.uuid4().hex
    record = storage.to_json({"owner": owner, "host": socket.gethostname(), "pid": os.getpid()})
    if not storage.create(path, record):
        _take_over(path, record)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    beat.start()
    try:
        sweep(out)
        yield
    finally:
        stop.set()
        beat.join()
        if (storage.read_json(path) or {}).get("owner") == owner:
            path.unlink(missing_ok=True)


def held(out: Path) -> bool:
    """Return whether a live run holds the lease of `out`; the lease of a killed run does not count."""
    path = out / "lease.json"
    there = storage.read_json(path)
    return there is not None and _alive(path, there)


def _take_over(path: Path, record: bytes) -> None:
    there = storage.read_json(path) or {}
    if _alive(path, there):
        raise LeaseError(f"{path.parent} is in use by process {there.get('pid')} on {there.get('host')}.")
    path.unlink(missing_ok=True)
    if not storage.create(path, record):
        raise LeaseError(f"{path.parent} was just taken by another run.")


def _alive(path: Path, there: dict[str, object]) -> bool:
    if there.get("host") == socket.gethostname():
        return Path(f"/proc/{there.get('pid')}").exists() if Path("/proc").exists() else _fresh(path)
    return _fresh(path)


def _fresh(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < EXPIRES_S
    except FileNotFoundError:
        return False


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)


def sweep(out: Path) -> int:
    """Delete the ``*.partial`` files that killed writers left; only the lease's holder may. Return how many."""
    found = [p for folder in ("slides", "commits") for p in (out / folder).rglob("*.partial")]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)

"""The lease of an output folder: it only keeps a second run out, and holds no truth."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from slideflow_ray import storage
from slideflow_ray.errors import ConfigError, CorruptStore, InfrastructureError, LeaseError

EXPIRES_S = 60.0
BEAT_S = 15.0


@contextlib.contextmanager
def lease(out: Path) -> Iterator[Callable[[], None]]:
    """Hold ``<out>/lease.json`` while the block runs; sweep half-written files of those that died.

    The lease of a process that is known to be gone, or that was silent for a minute where
    that cannot be known, is taken over. What is yielded raises LeaseError once another has taken this one over, as
    the end of the block does. Raises LeaseError while another run holds it, ConfigError where it cannot be written.
    """
    path = out / "lease.json"
    mine = storage.to_json({"owner": uuid.uuid4().hex, **_process()})
    try:
        _take(path, mine)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written: {error}.", next_step="Choose another folder, or free it."
        ) from error
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, mine, stop), daemon=True)
    beat.start()
    try:
        sweep(out)
        yield lambda: _check_mine(path, mine)
        _check_mine(path, mine)
        sweep(out)  # of workers that died in this run
    finally:
        stop.set()
        beat.join()
        storage.discard(path, mine)


def _take(path: Path, mine: bytes) -> None:
    """Write the lease in the place of the one that was looked at. Raises LeaseError."""
    before = storage.read_bytes(path)
    there = _read(path)
    if there is not None and _alive(path, there):
        raise LeaseError(f"{path.parent} is in use by process {there.get('pid')} on {there.get('host')}.")
    if not storage.swap(path, before, mine):
        raise LeaseError(f"{path.parent} was taken by another run at the same moment.")


def _check_mine(path: Path, mine: bytes) -> None:
    if storage.read_bytes(path) != mine:
        said = f"{path.parent} was taken over by another run, as this one had been silent for {EXPIRES_S:.0f} s."
        raise LeaseError(said)


def _read(path: Path) -> dict[str, Any] | None:
    """What the lease says; of one that cannot be read only its age counts."""
    try:
        there = storage.read_json(path)
    except CorruptStore:
        return {}
    return there if there is None or isinstance(there, dict) else {}


def held(out: Path) -> bool:
    """Return whether a live run holds the lease of `out`; the lease of a killed run does not count."""
    path = out / "lease.json"
    there = _read(path)
    return there is not None and _alive(path, there)


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


def _beat(path: Path, mine: bytes, stop: threading.Event) -> None:
    """Keep the lease young, until it is another's."""
    while not stop.wait(BEAT_S):
        with contextlib.suppress(OSError, InfrastructureError):  # the next beat may get through
            if not storage.swap(path, mine, mine):
                return


def sweep(out: Path) -> int:
    """Delete the ``*.partial`` files that killed writers left; only the lease's holder may. Return how many."""
    if storage.is_remote(out):
        return 0  # a put is whole or is not there
    found = [p for folder in ("slides", "commits") for p in (out / folder).rglob("*.partial") if p.is_file()]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)

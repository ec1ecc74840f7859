"""The cache of a machine: copies and blocks of remote objects, bounded, shared by its processes.

An entry is a folder. Room is reserved before a byte is written, under one lock, so that the cache stays
within its bound however many processes fill it; those not asked for longest go first.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slideflow_ray.errors import DiskFull
from slideflow_ray.storage import alone

CACHE = "SLIDEFLOW_RAY_CACHE"
"""Names the environment variable with the cache's folder; default: one of this user's below the temporary folder."""
CACHE_GB = "SLIDEFLOW_RAY_CACHE_GB"
"""Names the environment variable with the cache's bound; default: 100, and never the last tenth of the disk."""

PARTIAL = ".partial-"
OWNER = "owner"


def cache_folder() -> Path:
    """Return the folder of this machine's copies, made if need be, readable by this user only."""
    named = os.environ.get(CACHE)
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"slideflow-ray-{getpass.getuser()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def room(what: str, size: int) -> Iterator[Path]:
    """Give a folder of one's own for `size` bytes, to be moved to an entry; what is left in it goes with the block.

    Entries that were not asked for longest are deleted until it fits; a file that a process has open is read to its
    end all the same, as files are. Raises DiskFull where it cannot fit.
    """
    cache = cache_folder()
    with alone(cache / "room.lock"):
        _make(cache, what, size)
        scratch = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{size}-", dir=cache))
        owner = (scratch / OWNER).open("w")  # locked while its process lives
        fcntl.flock(owner, fcntl.LOCK_EX)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        owner.close()


def _make(cache: Path, what: str, size: int) -> None:
    there = _entries(cache)
    reserved = _reserved(cache)
    held = sum(bytes_ for _, bytes_, _ in there)
    disk = shutil.disk_usage(cache)
    bound = min(float(os.environ.get(CACHE_GB, "100")) * 1e9, held + disk.free - disk.total / 10)
    if size + reserved > bound:
        others = f", of which {reserved / 1e9:.2f} GB are being fetched to" if reserved else ""
        raise DiskFull(
            f"{what} needs {size / 1e9:.2f} GB; the cache {cache} may hold {max(bound, 0) / 1e9:.2f} GB{others}.",
            next_step=f"Set {CACHE} to a folder on a larger disk, or {CACHE_GB} to more.",
        )
    for _, bytes_, entry in there:
        if held + reserved + size <= bound:
            break
        shutil.rmtree(entry, ignore_errors=True)
        held -= bytes_


def _reserved(cache: Path) -> int:
    """Return the bytes that living processes have reserved; what dead ones left is deleted."""
    total = 0
    for scratch in cache.glob(f"{PARTIAL}*"):
        with contextlib.suppress(FileNotFoundError), (scratch / OWNER).open("a") as owner:
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                total += int(scratch.name.split("-")[1])
            else:
                shutil.rmtree(scratch, ignore_errors=True)
    return total


def _entries(cache: Path) -> list[tuple[float, int, Path]]:
    """Return when each entry was last asked for, its bytes and its folder, the oldest first."""
    found = []
    for entry in cache.iterdir():
        if entry.is_dir() and not entry.name.startswith("."):
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.stat().st_mtime, _bytes(entry), entry))
    return sorted(found)


def _bytes(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(_bytes(Path(e)) if e.is_dir(follow_symlinks=False) else e.stat().st_size for e in entries)

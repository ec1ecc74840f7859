"""What the source holds tonight: rows of a growing cohort, slides below folders and prefixes; sizes and times only."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from slideflow_ray import storage
from slideflow_ray.cohort import Item, read_cohort
from slideflow_ray.collect import SUFFIXES, places, slide_ids
from slideflow_ray.errors import ConfigError, ReadError, SlideNotFound
from slideflow_ray.nightly.spec import NightlySpec
from slideflow_ray.remote import look

FORMULA = "=+-@"
"""What no slide_id begins with: a table would take it for a formula."""


@dataclass(frozen=True)
class Source:
    """A slide as the source has it: where, how many bytes, and its modification time or ETag.

    name : its path below the watched folder. item : the cohort's row, None where none names it. waits : why it is
    left for another night. problem : why it cannot even be looked at.
    """

    uri: str
    name: str
    size: int = -1
    stamp: str = ""
    item: Item | None = None
    waits: str = ""
    problem: str = ""

    @property
    def seen(self) -> list[Any]:
        """What tells, without reading it, whether it is as it was."""
        return [self.size, self.stamp]


@dataclass(frozen=True)
class Listing:
    """What the source holds: slides by uri (a local one's real path), how many files are none, and which cannot be."""

    slides: Mapping[str, Source]
    others: int
    unusable: Mapping[str, str] = field(default_factory=dict)


def list_sources(spec: NightlySpec, known: Mapping[str, list[Any]]) -> Listing:
    """Return what there is, each slide once; `known` has the size and stamp by uri that an earlier night saw.

    Raises ConfigError for a folder or a cohort that is not there.
    """
    found: dict[str, Source] = {}
    unusable: dict[str, str] = {}
    others = 0
    for item in read_cohort(spec.cohort) if spec.cohort else ():
        found[_key(item.uri)] = _row(item)
    for uri in spec.watch:
        slides, more = _in_bucket(uri) if storage.is_remote(uri) else _in_folder(uri)
        others += more
        top = _key(uri)
        if not slides and not spec.may_empty and any(seen.startswith(f"{top.rstrip('/')}/") for seen in known):
            said = f"{uri} held slides and holds none now; were it not mounted, every slide would count as removed."
            raise ConfigError(said, next_step="Mount it; or set `may_empty = true` where its slides are really gone.")
        for source in slides:
            if _is_utf8(source.uri):
                found.setdefault(_key(source.uri), source)
            else:
                unusable[ascii(source.name)] = "its name is not UTF-8, so no cohort can hold it; rename it"
    now = time.time()
    settled = {uri: _settled(s, known.get(uri), spec.settle_s, now) for uri, s in found.items()}
    return Listing(settled, others, unusable)


def _key(uri: str) -> str:
    return uri if storage.is_remote(uri) else os.path.realpath(storage.local_path(uri))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _row(item: Item) -> Source:
    name = PurePosixPath(item.uri).name
    try:
        if storage.is_remote(item.uri):
            seen = look(item.uri)
            return Source(item.uri, name, seen.size, seen.identity[:16], item)
        size, stamp = _extent(storage.local_path(item.uri))
    except (SlideNotFound, FileNotFoundError):
        return Source(item.uri, name, item=item, problem="it is not there")
    except (ReadError, OSError) as error:
        return Source(item.uri, name, item=item, problem=str(getattr(error, "message", error)))
    return Source(item.uri, name, size, stamp, item)


def _in_folder(uri: str) -> tuple[list[Source], int]:
    folder = storage.local_path(uri).absolute()
    if not folder.is_dir():
        raise ConfigError(f"{folder}, which is watched, is not a folder.", next_step="Mount it, or correct `watch`.")
    slides, others = [], 0
    for path, files in places(folder):
        if path is None:
            others += files
            continue
        name = path.relative_to(folder).as_posix()
        try:
            slides.append(Source(str(path), name, *_extent(path)))
        except OSError as error:
            slides.append(Source(str(path), name, problem=str(error)))
    return slides, others


def _extent(path: Path) -> tuple[int, str]:
    """Bytes, and the latest modification time in ns, of a slide with all its files."""
    beside = path.with_suffix("") if path.suffix.lower() == ".mrxs" else None
    files = [path, *(beside.rglob("*") if beside and beside.is_dir() else ())]
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file()]
    seen = [p.stat() for p in files]
    return sum(s.st_size for s in seen), str(max((s.st_mtime_ns for s in seen), default=0))


def _in_bucket(uri: str) -> tuple[list[Source], int]:
    """Slides of one object each, by what their names end in; a prefix without objects is an empty one."""
    try:
        parts = look(uri).parts
    except SlideNotFound:
        return [], 0
    root = "/".join(uri.split("/", 3)[:3])
    top = uri.split("/", 3)[3].rstrip("/") if uri.count("/") > 2 else ""
    slides = [
        Source(f"{root}/{p.key}", p.key[len(top) :].lstrip("/"), p.size, p.e_tag)
        for p in parts
        if PurePosixPath(p.key).suffix.lower() in SUFFIXES
    ]
    return slides, len(parts) - len(slides)


def _settled(source: Source, known: list[Any] | None, settle_s: float, now: float) -> Source:
    """Leave a file that has just changed for another night; one that an earlier night saw as it is has settled."""
    if source.problem or not source.stamp.isdigit() or "://" in source.uri or known == source.seen:
        return source
    age = now - int(source.stamp) / 1e9
    if age >= settle_s:
        return source
    return Source(
        source.uri, source.name, source.size, source.stamp, source.item, f"it changed {max(age, 0):.0f} s ago"
    )


def look_again(source: Source) -> bool:
    """Return whether a local slide still has the size and time that were listed."""
    if storage.is_remote(source.uri):
        return True  # what changes while it is fetched is an error there
    try:
        return list(_extent(storage.local_path(source.uri))) == source.seen
    except OSError:
        return False


def name_new(sources: Iterable[Source], taken: set[str]) -> dict[str, str]:
    """Return a slide_id for each new slide by uri: its row's, else its stem, or as much more as nobody has.

    Ids that were given stay: a later file of the same stem gets a longer one.
    """
    ids: dict[str, str] = {}
    loose = []
    for source in sources:
        if source.item is not None:
            ids[source.uri] = source.item.slide_id
        else:
            loose.append(source)
    used = {slide_id.casefold() for slide_id in taken | set(ids.values())}
    for source, slide_id in zip(loose, slide_ids([s.name for s in loose]), strict=True):
        slide_id = slide_id if slide_id[0] not in FORMULA else f"_{slide_id}"
        names = [slide_id, source.name.replace("/", "_"), *(f"{slide_id}-{n}" for n in range(2, 10_000))]
        ids[source.uri] = next(name for name in names if name.casefold() not in used)
        used.add(ids[source.uri].casefold())
    return ids

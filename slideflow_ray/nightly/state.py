"""What a nightly job remembers of each slide, and how tonight's source differs from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slideflow_ray import storage
from slideflow_ray.cohort import Item
from slideflow_ray.collect import patient_of
from slideflow_ray.errors import ConfigError, SlideflowError
from slideflow_ray.identity import identity
from slideflow_ray.nightly.sources import Listing, Source, look_again, name_new
from slideflow_ray.nightly.spec import RESULTS, NightlySpec

SCHEMA = 1
KINDS = ("new", "changed", "renamed", "unchanged", "duplicate", "waiting")
"""What a slide of the source may be tonight; each is exactly one."""


@dataclass
class Entry:
    """A slide that was there on some night.

    seen : its size and stamp then. since : the night it came, or last changed. how : digest of bundles and settings
    that scored it. failures : nights on which it did not end well, in a row.
    """

    slide_id: str
    seen: list[Any]
    identity: str
    since: str
    status: str = ""
    code: str = ""
    message: str = ""
    how: str = ""
    failures: int = 0


@dataclass
class State:
    """All that a nightly job remembers: entries by uri, the names of its nights, the latest last, and what waits.

    Uris of local slides are real paths, so that one file is one slide by whatever way it is reached.
    """

    slides: dict[str, Entry] = field(default_factory=dict)
    nights: list[str] = field(default_factory=list)
    waiting: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, out: Path) -> State:
        """Return what `write` wrote, or nothing where there is no night yet. Raises CorruptStore, ConfigError."""
        record = storage.read_json(out / "state.json")
        if record is None:
            return cls()
        if record.get("schema") != SCHEMA:
            raise ConfigError(f"{out / 'state.json'} has schema {record.get('schema')}; this version reads {SCHEMA}.")
        return cls(
            {uri: Entry(**entry) for uri, entry in record["slides"].items()}, record["nights"], record["waiting"]
        )

    def write(self, out: Path) -> None:
        """Keep it, whole or not at all."""
        slides = {uri: vars(entry) for uri, entry in self.slides.items()}
        record = {"schema": SCHEMA, "slides": slides, "nights": self.nights, "waiting": self.waiting}
        storage.write_atomic(out / "state.json", storage.to_json(record))


@dataclass(frozen=True)
class Tonight:
    """The source against what is remembered.

    kinds : uri -> one of KINDS. why : uri -> why it waits, or whose duplicate it is. items : what a run takes, by uri.
    entries : what will be remembered of each item. removed : entries whose slides are gone.
    """

    kinds: Mapping[str, str]
    why: Mapping[str, str]
    items: Mapping[str, Item]
    entries: Mapping[str, Entry]
    removed: Mapping[str, Entry]

    @property
    def counts(self) -> dict[str, int]:
        """Slides by kind; they add up to what the source holds."""
        found = Counter(self.kinds.values())
        return {kind: found[kind] for kind in KINDS}


def compare(spec: NightlySpec, state: State, listing: Listing, night: str) -> Tonight:
    """Say of each slide of the source what it is tonight.

    Size and stamp decide what is hashed, and the content's identity what is new: a file that was only touched is
    unchanged, one that moved keeps its id, a second copy is a duplicate.
    """
    kinds, why, found = {}, {}, {}
    for uri, source in sorted(listing.slides.items()):
        waits, known = source.waits, ""
        if not waits:
            known, waits = _identity(spec, state.slides.get(uri), source)
        if waits:
            kinds[uri], why[uri] = "waiting", waits
        else:
            found[uri] = known
    gone = {uri: entry for uri, entry in state.slides.items() if uri not in listing.slides}
    sorter = _Sorter(state, found, gone)
    rows = {uri for uri, source in listing.slides.items() if source.item is not None}
    for uri, known in sorted(found.items(), key=lambda pair: (pair[0] not in state.slides, pair[0] not in rows)):
        kinds[uri], why[uri] = sorter.kind(uri, known)
    entries, items = _entries(spec, state, listing, kinds, why, found, sorter.moved, night)
    removed = {uri: entry for uri, entry in gone.items() if uri not in sorter.moved.values()}
    return Tonight(kinds, {uri: text for uri, text in why.items() if text}, items, entries, removed)


def _identity(spec: NightlySpec, entry: Entry | None, source: Source) -> tuple[str, str]:
    """Return what a file is ("" where it cannot be read, which its run will say), or why it waits."""
    if source.problem:
        return "", ""
    if entry is not None and entry.seen == source.seen and entry.identity:
        return entry.identity, ""
    cache = storage.place(spec.out) / RESULTS / ".cache" / "identity"
    try:
        known = identity(source.uri, cache)
    except SlideflowError:
        return "", ""
    return (known, "") if look_again(source) else ("", "it changed while it was read")


class _Sorter:
    """Tells the new from the changed, the moved and the doubled."""

    def __init__(self, state: State, found: Mapping[str, str], gone: Mapping[str, Entry]) -> None:
        self._state = state
        self._left = {entry.identity: uri for uri, entry in gone.items() if entry.identity}
        self._holders: dict[str, str] = {}
        self._found = found
        self.moved: dict[str, str] = {}

    def kind(self, uri: str, known: str) -> tuple[str, str]:
        """Return one of KINDS, and whose duplicate it is."""
        if known and known in self._holders:
            return "duplicate", f"it has the bytes of {self._holders[known]}"
        self._holders[known] = uri
        entry = self._state.slides.get(uri)
        if entry is not None:
            return ("unchanged" if entry.identity == known else "changed"), ""
        if known and known in self._left:
            self.moved[uri] = self._left.pop(known)
            return "renamed", f"it was {self.moved[uri]}"
        return "new", ""


def _entries(
    spec: NightlySpec,
    state: State,
    listing: Listing,
    kinds: dict[str, str],
    why: dict[str, str],
    found: Mapping[str, str],
    moved: Mapping[str, str],
    night: str,
) -> tuple[dict[str, Entry], dict[str, Item]]:
    here = {uri: listing.slides[uri] for uri, kind in kinds.items() if kind not in ("duplicate", "waiting")}
    before = {uri: state.slides.get(moved.get(uri, uri)) for uri in here}
    taken = {entry.slide_id for entry in state.slides.values()}
    ids = name_new((source for uri, source in here.items() if before[uri] is None), taken)
    entries, items = {}, {}
    for uri, source in here.items():
        old = before[uri]
        if other := _taken(source, uri, here, before):
            kinds[uri], why[uri] = "waiting", f"its slide_id in the cohort is that of {other}"
            continue
        slide_id = source.item.slide_id if source.item else old.slide_id if old else ids[uri]
        same = old is not None and old.slide_id == slide_id and old.identity == found[uri]
        entries[uri] = Entry(slide_id, source.seen, found[uri], night)
        if same and old is not None:
            entries[uri] = Entry(**{**vars(old), "seen": source.seen})
        items[uri] = source.item or _item(spec, slide_id, source)
    return entries, items


def _taken(source: Source, uri: str, here: Mapping[str, Source], before: Mapping[str, Entry | None]) -> str:
    """Return the slide that has had the id which the cohort now gives to another one, "" where there is none."""
    if source.item is None:
        return ""
    named = source.item.slide_id
    held = (u for u, old in before.items() if u != uri and old is not None and old.slide_id == named)
    return next((u for u in held if (item := here[u].item) is None or item.slide_id == named), "")


def _item(spec: NightlySpec, slide_id: str, source: Source) -> Item:
    patient = patient_of(spec.patient_pattern, source.name)
    values = {"slide_id": slide_id, "uri": source.uri, "patient_id": patient}
    values |= {"modality": spec.modality} if "modality" in spec.model_fields_set else {}
    return Item.parse({key: value for key, value in values.items() if value}, source.uri)

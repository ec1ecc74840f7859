"""Packs: a folder of 13,000 crops is a handful of stores of up to 1,024 images each, formed once.

A pack's rows never change, so an added image changes no existing pack: it goes into a new
one. An edited image (another identity) leaves its old row behind, unread, and goes into a
new pack too. ``<out>/packs/<pack>.json`` is created once and names the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slideflow_ray import storage
from slideflow_ray.changes import FILE
from slideflow_ray.cohort import Item
from slideflow_ray.errors import BadDimensions, SlideflowError
from slideflow_ray.identity import Identities
from slideflow_ray.slides import SlideReader, open_slide
from slideflow_ray.slides.base import kept_px0, on_level
from slideflow_ray.slides.tiles import resized
from slideflow_ray.specs import ROUTES, WholeSpec, digest
from slideflow_ray.store import SlideStore

GONE = "gone:"
"""The uri, and the code in `outcomes`, of a row whose image the cohort no longer names."""
ROWS = 1024
"""Images of one pack at most: few files for many images, and little to redo for one."""


@dataclass(frozen=True)
class Row:
    """One image of a pack, with what shapes its pixels."""

    item: Item
    identity: str


@dataclass(frozen=True)
class Pack:
    """Images that share a store. `slide_id` is the pack's own, by which the store is found.

    `why`: what made a new pack of images that another one holds as they were.
    """

    slide_id: str
    rows: tuple[Row, ...]
    why: str = ""

    @property
    def example(self) -> Item:
        """An image of the pack: all agree in the columns that route models."""
        return self.rows[0].item

    @property
    def identity(self) -> str:
        """What the pack's pixels are: the identities of its images, in order."""
        return f"pack:{digest([[row.item.slide_id, row.identity, row.item.mpp] for row in self.rows])}"


@dataclass(frozen=True)
class Packed:
    """Where every image of a cohort is: the packs, in which row of which each one lies, and which could not be read.

    `why` has those that lay in a pack already, as something else, and what changed.
    """

    packs: tuple[Pack, ...]
    places: Mapping[str, tuple[str, int]]
    identities: Mapping[str, str]
    errors: Mapping[str, SlideflowError]
    why: Mapping[str, str]


def pack_items(out: Path, items: Sequence[Item], again: Collection[str] = ()) -> Packed:
    """Return the packs that hold `items`, forming new ones for those that are in none.

    `again` names items to be read anew, in new packs. Raises nothing for an image that is
    missing: it is in `errors`.
    """
    known = Identities(out / ".cache" / "identities.json")
    identities: dict[str, str] = {}
    errors: dict[str, SlideflowError] = {}
    for item in items:
        try:
            identities[item.slide_id] = known.of(item.uri, item.sha256)
        except SlideflowError as error:
            errors[item.slide_id] = error
    known.save()
    here = [Row(item, identities[item.slide_id]) for item in items if item.slide_id in identities]
    records = sorted(_records(out), key=lambda record: (record["attempt"], record["pack"]))
    attempts = {row[0]: record["attempt"] for record in records for row in record["rows"] if row[0] in again}
    places = _places(out, records, here, again)
    changed = _changed(records, [row for row in here if row.item.slide_id not in places], again)
    loose: dict[tuple[str | None, ...], list[Row]] = {}
    for row in here:
        if row.item.slide_id not in places:
            loose.setdefault(_routes(row.item), []).append(row)
    for rows in (part for alike in loose.values() for part in batched(alike, ROWS)):
        pack_id = _form(out, rows, 1 + max((attempts.get(row.item.slide_id, -1) for row in rows), default=-1))
        places |= {row.item.slide_id: (pack_id, i) for i, row in enumerate(rows)}
    by_id = {row.item.slide_id: row for row in here}
    wanted = dict.fromkeys(pack for pack, _ in places.values())
    packs = tuple(_read(out, pack_id, by_id, changed) for pack_id in wanted)
    return Packed(packs, places, identities, errors, changed)


def _changed(records: Sequence[dict[str, Any]], rows: Sequence[Row], again: Collection[str]) -> dict[str, str]:
    """What changed in images that are in no pack as they are now, and in one as they were."""
    before = {key[0]: key for record in records for key in record["rows"]}
    found = {}
    for row in rows:
        slide_id = row.item.slide_id
        if slide_id not in before or slide_id in again:
            continue
        names = ["slide_id", FILE, "its mpp changed", *(f"its {column} changed" for column in ROUTES)]
        said = [name for name, old, new in zip(names, before[slide_id], _key(row), strict=True) if old != new]
        found[slide_id] = "; ".join(said) or "it is back in the cohort"
    return found


_Key = tuple[str | float | None, ...]


def _key(row: Row) -> _Key:
    """What a row is, the columns that route models to it included: a changed one makes another row."""
    return row.item.slide_id, row.identity, row.item.mpp, *_routes(row.item)


def _routes(item: Item) -> tuple[str | None, ...]:
    return tuple(getattr(item, column) for column in ROUTES)


def _places(
    out: Path, records: Sequence[dict[str, Any]], rows: Sequence[Row], again: Collection[str]
) -> dict[str, tuple[str, int]]:
    """The row of each image in the packs that exist; the pack with the most attempts counts."""
    wanted = {_key(row): row.item.slide_id for row in rows if row.item.slide_id not in again}
    places: dict[str, tuple[str, int]] = {}
    for record in records:
        mine = {i: tuple(key) for i, key in enumerate(record["rows"]) if tuple(key) in wanted}
        gone = _gone_rows(out, record["pack"]) if mine else frozenset()
        places |= {wanted[key]: (record["pack"], i) for i, key in mine.items() if i not in gone}
    return places


def _gone_rows(out: Path, pack_id: str) -> frozenset[int]:
    """Rows that were passed over because the cohort did not name them then: an image that is back needs a new row."""
    store = SlideStore(out, pack_id)
    grids = [path.name for path in (store.root / "outcomes").glob("*")]
    return frozenset(row for grid in grids for row, why in broken_rows(store, grid).items() if why["code"] == GONE)


def broken_rows(store: SlideStore, grid: str, chunk: int | None = None) -> dict[int, dict[str, Any]]:
    """Return the rows of a pack that could not be read, in one chunk or in all: status, code, message, next_step."""
    folder = store.root / "outcomes" / grid
    paths = [folder / f"{chunk}.json"] if chunk is not None else sorted(folder.glob("*.json"))
    found = [storage.read_json(path) or {} for path in paths]
    return {int(row): why for record in found for row, why in record.items()}


def _records(out: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((out / "packs").glob("*.json")):
        yield storage.read_json(path)


def _form(out: Path, rows: Sequence[Row], attempt: int) -> str:
    table = [list(_key(row)) for row in rows]
    pack_id = f"pack-{digest([table, attempt])}"
    record = {"pack": pack_id, "attempt": attempt, "rows": table}
    storage.create(out / "packs" / f"{pack_id}.json", storage.to_json(record))
    return pack_id


def _read(out: Path, pack_id: str, by_id: Mapping[str, Row], changed: Mapping[str, str]) -> Pack:
    """Return a pack with all its rows; one that the cohort no longer has keeps its place, without a file."""
    record = storage.read_json(out / "packs" / f"{pack_id}.json")
    rows = []
    for key in record["rows"]:
        slide_id, found, mpp, *routes = key
        mine = by_id.get(slide_id)
        if mine is None or _key(mine) != tuple(key):
            mine = Row(Item(slide_id=slide_id, uri=GONE, mpp=mpp, **dict(zip(ROUTES, routes, strict=True))), found)
        rows.append(mine)
    here = {row.item.slide_id for row in rows if row.item.uri != GONE}
    said = sorted({changed[slide_id] for slide_id in here if slide_id in changed})
    return Pack(pack_id, tuple(rows), "; ".join(said))


# images

MAX_PIXELS = 89_000_000
"""The most pixels of an image in one piece, 270 MB: one of a pack's thousand must not take the others with it."""

UNSCALED = 1.0
"""What stands for the um per pixel of an image that is read in one piece and needs none."""


def size_px0(row: Row) -> tuple[int, int]:
    """Return an image's (width, height) from its header, (0, 0) where that cannot be read."""
    if row.item.uri == GONE:
        return (0, 0)
    try:
        with _open(row) as reader:
            return reader.size_px0
    except SlideflowError:
        return (0, 0)


def _open(row: Row) -> SlideReader:
    """Open an image; a micrograph as such, the others without asking whether their scale is credible."""
    micrograph = "tem" if row.item.modality == "tem" else None
    return open_slide(row.item.uri, mpp=row.item.mpp or UNSCALED, modality=micrograph)


def read_image(row: Row, whole: WholeSpec) -> npt.NDArray[np.uint8]:
    """Return an image in one piece, uint8 (T, T, 3), squashed or padded with white as `whole` says.

    A micrograph comes without the rows of its scale bar and labels. Level 0 is read, or of an image beyond MAX_PIXELS
    the finest level below. Raises SlideError, ReadError.
    """
    with _open(row) as reader:
        fit = [i for i, level in enumerate(reader.levels) if level.size[0] * level.size[1] <= MAX_PIXELS]
        if not fit:
            w, h = reader.size_px0
            raise BadDimensions(
                f"{row.item.uri} has {w:,} x {h:,} pixels and no level of at most {MAX_PIXELS:,} to read in one piece.",
                next_step="Score it in tiles, or make it smaller (vips tiffsave --tile --pyramid).",
            )
        x0, y0, x1, y1 = on_level(kept_px0(reader), reader.levels[fit[0]])
        image = reader.read(fit[0], (x0, y0), (x1 - x0, y1 - y0))
    h, w = image.shape[:2]
    if whole.fit == "pad" and h != w:
        side = max(h, w)
        square = np.full((side, side, 3), 255, np.uint8)
        square[(side - h) // 2 : (side - h) // 2 + h, (side - w) // 2 : (side - w) // 2 + w] = image
        image = square
    return resized(image, whole.tile_px)

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
from slideflow_ray.cohort import Item
from slideflow_ray.errors import SlideflowError
from slideflow_ray.identity import Identities
from slideflow_ray.slides import open_slide
from slideflow_ray.slides.tiles import resized
from slideflow_ray.specs import ROUTES, WholeSpec, digest

GONE = "gone"
"""The uri of a row whose image the cohort no longer names."""
ROWS = 1024
"""Images of one pack at most: few files for many images, and little to redo for one."""


@dataclass(frozen=True)
class Row:
    """One image of a pack, with what shapes its pixels."""

    item: Item
    identity: str


@dataclass(frozen=True)
class Pack:
    """Images that share a store. `slide_id` is the pack's own, by which the store is found."""

    slide_id: str
    rows: tuple[Row, ...]

    @property
    def example(self) -> Item:
        """An image of the pack that the cohort still has; all agree in the columns that route models."""
        return next((row.item for row in self.rows if row.item.uri != GONE), self.rows[0].item)

    @property
    def identity(self) -> str:
        """What the pack's pixels are: the identities of its images, in order."""
        return f"pack:{digest([[row.item.slide_id, row.identity, row.item.mpp] for row in self.rows])}"


@dataclass(frozen=True)
class Packed:
    """Where every image of a cohort is: the packs, in which row of which each one lies, and which could not be read."""

    packs: tuple[Pack, ...]
    places: Mapping[str, tuple[str, int]]
    identities: Mapping[str, str]
    errors: Mapping[str, SlideflowError]


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
    places = _places(records, here, again)
    loose: dict[tuple[str | None, ...], list[Row]] = {}
    for row in here:
        if row.item.slide_id not in places:
            loose.setdefault(tuple(getattr(row.item, column) for column in ROUTES), []).append(row)
    for rows in (part for alike in loose.values() for part in batched(alike, ROWS)):
        pack_id = _form(out, rows, 1 + max((attempts.get(row.item.slide_id, -1) for row in rows), default=-1))
        places |= {row.item.slide_id: (pack_id, i) for i, row in enumerate(rows)}
    by_id = {row.item.slide_id: row for row in here}
    wanted = dict.fromkeys(pack for pack, _ in places.values())
    return Packed(tuple(_read(out, pack_id, by_id) for pack_id in wanted), places, identities, errors)


def _key(row: Row) -> tuple[str, str, float | None]:
    return row.item.slide_id, row.identity, row.item.mpp


def _places(
    records: Sequence[dict[str, Any]], rows: Sequence[Row], again: Collection[str]
) -> dict[str, tuple[str, int]]:
    """The row of each image in the packs that exist; the pack with the most attempts counts."""
    wanted = {_key(row): row.item.slide_id for row in rows if row.item.slide_id not in again}
    places: dict[str, tuple[str, int]] = {}
    for record in records:
        for i, (slide_id, found, mpp) in enumerate(record["rows"]):
            if (slide_id, found, mpp) in wanted:
                places[slide_id] = (record["pack"], i)
    return places


def _records(out: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((out / "packs").glob("*.json")):
        yield storage.read_json(path)


def _form(out: Path, rows: Sequence[Row], attempt: int) -> str:
    table = [list(_key(row)) for row in rows]
    pack_id = f"pack-{digest([table, attempt])}"
    record = {"pack": pack_id, "attempt": attempt, "rows": table}
    storage.create(out / "packs" / f"{pack_id}.json", storage.to_json(record))
    return pack_id


def _read(out: Path, pack_id: str, by_id: Mapping[str, Row]) -> Pack:
    """Return a pack with all its rows; one that the cohort no longer has keeps its place, without a file."""
    record = storage.read_json(out / "packs" / f"{pack_id}.json")
    rows = []
    for slide_id, found, mpp in record["rows"]:
        mine = by_id.get(slide_id)
        if mine is None or _key(mine) != (slide_id, found, mpp):
            mine = Row(Item(slide_id=slide_id, uri=GONE, mpp=mpp), found)
        rows.append(mine)
    return Pack(pack_id, tuple(rows))


# images

UNSCALED = 1.0
"""What stands for the um per pixel of an image that is read in one piece and needs none."""


def size_px0(row: Row) -> tuple[int, int]:
    """Return an image's (width, height) from its header, (0, 0) where that cannot be read."""
    try:
        with open_slide(row.item.uri, mpp=row.item.mpp or UNSCALED) as reader:
            return reader.size_px0
    except SlideflowError:
        return (0, 0)


def read_image(row: Row, whole: WholeSpec) -> npt.NDArray[np.uint8]:
    """Return an image in one piece, uint8 (T, T, 3), squashed or padded with white as `whole` says.

    Raises SlideError, ReadError.
    """
    with open_slide(row.item.uri, mpp=row.item.mpp or UNSCALED) as reader:
        image = reader.read(0, (0, 0), reader.size_px0)
    h, w = image.shape[:2]
    if whole.fit == "pad" and h != w:
        side = max(h, w)
        square = np.full((side, side, 3), 255, np.uint8)
        square[(side - h) // 2 : (side - h) // 2 + h, (side - w) // 2 : (side - w) // 2 + w] = image
        image = square
    return resized(image, whole.tile_px)

"""cohort.csv -> items: unique ids, known columns, no patient and no identical file in two splits."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from slideflow_ray.errors import CohortError, ConfigError, SplitLeakError
from slideflow_ray.remote import at_hand
from slideflow_ray.specs import Modality, Spec, folder_of, relative_to
from slideflow_ray.texts import plain_cell
from slideflow_ray.uris import check_uri

Split = Literal["train", "val", "test"]


FILES = ("uri", "annotation", "mask", "original")
"""Columns that name a file."""


class Item(Spec):
    """What a row of the cohort names. Empty cells are None; `uri` is absolute or has a scheme.

    original : the image that a synthetic copy was made from, by which the copy's stains are told.
    """

    slide_id: Annotated[str, Field(min_length=1, max_length=255)]
    uri: Annotated[str, Field(min_length=1)]
    patient_id: str | None = None
    split: Split | None = None
    label: str | None = None
    annotation: str | None = None
    mpp: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    stain: str | None = None
    modality: Modality = "he"
    scanner: str | None = None
    site: str | None = None
    sequence: str | None = None
    section: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    mask: str | None = None
    original: str | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _stripped(cls, value: object, about: ValidationInfo) -> object:
        """`14-14134 ` and `14-14134` are one patient; ids are refused and uris are taken as they are."""
        if not isinstance(value, str) or about.field_name in ("slide_id", "uri"):
            return value
        return value.strip() or None

    @field_validator("slide_id")
    @classmethod
    def _name(cls, value: str) -> str:
        if not value.isprintable() or value.strip() != value:
            raise ValueError("must be printable and must not begin or end with a space")
        if value.startswith(("=", "+", "@", "/", "\\")) or value[1:3] == ":\\":
            raise ValueError("must not begin as a formula or a path does")
        if {".", ".."} & set(re.split(r"[/\\]", value)):
            raise ValueError("must not hold '.' or '..' as a folder")
        return value

    @field_validator("patient_id", "label", "stain", "scanner", "site", "sequence", "section")
    @classmethod
    def _printable(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise ValueError("must be printable")
        return value

    @field_validator(*FILES)
    @classmethod
    def _allowed(cls, value: str | None) -> str | None:
        return None if value is None else check_uri(value)

    @property
    def patient(self) -> str:
        """The patient, or the slide itself where the cohort names none."""
        return self.patient_id or self.slide_id

    @property
    def says_stain(self) -> bool:
        """Whether its row says how it is stained: its column `stain` or `modality`, blank cells saying nothing."""
        return self.stain is not None or "modality" in self.model_fields_set

    def written(self) -> dict[str, Any]:
        """Return the item as JSON; a modality that nobody gave is left out, so that who reads it knows that too."""
        return self.model_dump(mode="json", exclude=None if "modality" in self.model_fields_set else {"modality"})


COLUMNS = tuple(Item.model_fields)

NM_PER_PX = "nm_per_px"
"""A column that may stand in place of `mpp`: micrographs are measured in nm."""

MAX_BYTES = 2**27
MAX_LINES = 1_000_000
MAX_COLUMNS = 100


def read_cohort(path: str | Path, *, check: bool = True) -> tuple[Item, ...]:
    """Read a cohort.csv; uris, annotations and masks are relative to the file, blanks around a cell mean nothing.

    check : whether its splits must be sound, which does not matter to who makes new ones.

    Raises CohortError naming the row and column that cannot be used, SplitLeakError when
    one patient stands in two splits.
    """
    named, path = path, at_hand(str(path))
    _check_file(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            _check_columns(path, reader.fieldnames)
            rows = list(reader)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no cohort {path}.") from error
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as error:
        raise CohortError(f"{path} is not a UTF-8 CSV file: {error}.") from error
    if not rows:
        raise CohortError(f"{path} has no rows.")
    items = tuple(_item(named, number, row) for number, row in enumerate(rows, start=2))
    check_unique(items)
    if check:
        check_splits(items)
    return items


def _check_file(path: Path) -> None:
    """Raise CohortError for what is no file, is larger than any cohort or has more lines."""
    if not path.exists() or path.is_dir():
        return
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise CohortError(f"{path} is no file of at most {MAX_BYTES:,} bytes.")
    with path.open("rb") as file:
        lines = sum(piece.count(b"\n") for piece in iter(lambda: file.read(2**20), b""))
    if lines > MAX_LINES:
        raise CohortError(f"{path} has {lines:,} lines; at most {MAX_LINES:,} are read.")


def _check_columns(path: Path, named: Sequence[str]) -> None:
    if not named:
        raise CohortError(f"{path} has no rows.")
    if len(named) > MAX_COLUMNS or len(set(named)) < len(named):
        raise CohortError(f"{path} has {len(named):,} columns, some of them twice or without meaning.")
    missing = {"slide_id", "uri"} - set(named)
    unknown = set(named) - set(COLUMNS) - {NM_PER_PX}
    if missing or unknown:
        what = [f"lacks the column {name!r}" for name in sorted(missing)]
        what += [f"has an unknown column {name!r}" for name in sorted(unknown)]
        raise CohortError(f"{path} {' and '.join(what)}; the columns are {', '.join(COLUMNS)}.")


def _item(path: str | Path, number: int, row: Mapping[str | None, object]) -> Item:
    if None in row:
        raise CohortError(f"{path}, line {number}: more cells than columns.")
    cells = {str(key): plain_cell(cell.strip()) for key, cell in row.items() if isinstance(cell, str)}
    values = _in_um(f"{path}, line {number}", {key: cell for key, cell in cells.items() if cell})
    here = folder_of(path)
    for key in FILES:
        if key in values:
            values[key] = relative_to(here, values[key])
    try:
        return Item.parse(values, f"{path}, line {number}")
    except ConfigError as error:
        raise CohortError(error.message) from error


def _in_um(where: str, values: dict[str, str]) -> dict[str, str]:
    """Return the values with `nm_per_px` as `mpp`. Raises CohortError where both are given, or it is no number."""
    if NM_PER_PX not in values:
        return values
    if "mpp" in values:
        raise CohortError(f"{where}: mpp and {NM_PER_PX} are both given; one says it.")
    try:
        mpp = float(values.pop(NM_PER_PX)) / 1000
    except ValueError as error:
        raise CohortError(f"{where}: {NM_PER_PX} is no number.") from error
    return {**values, "mpp": repr(mpp)}


def single_slide(uri: str, mpp: float | None = None, modality: str | None = None) -> tuple[Item, ...]:
    """Return the cohort of one slide given on the command line; its id is the file's stem. Raises ConfigError."""
    uri = relative_to(Path.cwd(), uri)
    stem = PurePosixPath(uri).stem.strip() or "slide"
    values = {"slide_id": stem, "uri": uri, "mpp": mpp} | ({"modality": modality} if modality else {})
    return (Item.parse(values, f"slide {uri!r}"),)


def check_unique(items: Iterable[Item]) -> None:
    """Raise CohortError when a slide_id stands twice."""
    seen: set[str] = set()
    for item in items:
        if item.slide_id in seen:
            raise CohortError(f"slide_id {item.slide_id!r} stands twice in the cohort.")
        seen.add(item.slide_id)


def check_splits(items: Sequence[Item], identities: Mapping[str, str] | None = None) -> None:
    """Raise SplitLeakError when a patient, or a file, is in two splits.

    identities : slide_id -> what the file is; where it says nothing, the column sha256 holds. A slide without
    patient_id is a patient of its own (`splits.lone_note` says so to people).
    """
    _one_split_each((i.patient, i) for i in items if i.split)
    hashes = {i.slide_id: f"sha256:{i.sha256.lower()}" for i in items if i.sha256} | dict(identities or {})
    _one_split_each((f"file {hashes[i.slide_id]}", i) for i in items if i.split and i.slide_id in hashes)


def _one_split_each(pairs: Iterable[tuple[str, Item]]) -> None:
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for who, item in pairs:
        splits[who].setdefault(str(item.split), item.slide_id)
        if len(splits[who]) > 1:
            where = ", ".join(f"{split} ({slide})" for split, slide in splits[who].items())
            raise SplitLeakError(f"{who!r} stands in more than one split: {where}.")

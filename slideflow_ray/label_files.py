"""Label files of glomerulus crops: one-hot by image, as source 001 writes them (JSON), or as a table (CSV).

JSON is a list of objects, or one object after another with or without commas; each has `image_name` and 0 or 1 for
every class, by its Chinese or its English name. CSV has the same columns. Text is UTF-8, with or without a BOM.
A row of zeros is the judgement "none of these" in a file with images of several classes. In one-hot files each image
has one class, so that such a row says nothing: the image stays without a label, and is named.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final, Literal

from slideflow_ray.errors import ConfigError
from slideflow_ray.remote import at_hand
from slideflow_ray.texts import plain_cell, read_bytes

CHINESE: Final = {
    "Normal": "正常肾小球",
    "FSG": "节段性硬化",
    "MsPGN": "系膜细胞增生",
    "CGN": "新月体形成",
}
"""The classes of source 001 and what its labelling system calls them."""

NONE: Final = "none"
"""The label of an image that was judged to be of none of the classes; an empty one says that nobody judged it."""

NAME: Final = "image_name"
MAX_BYTES: Final = 2**28
MAX_ROWS: Final = 1_000_000
MAX_CLASSES: Final = 100
MAX_NAME: Final = 1024

Keys = Literal["english", "chinese"]


@dataclass(frozen=True)
class Labels:
    """What a label file says. `of` has for each image its classes, none of them too; `lines` where it stands."""

    path: str
    classes: tuple[str, ...]
    of: Mapping[str, tuple[str, ...]]
    lines: Mapping[str, int]

    @property
    def several(self) -> bool:
        """Whether it judges each class by itself, as some image is of several: then all zeros say "none of them"."""
        return any(len(classes) > 1 for classes in self.of.values())


def label_of(classes: Sequence[str]) -> str:
    """Return several classes as one label of a cohort.

    >>> label_of(["FSG", "CGN"]), label_of([])
    ('FSG+CGN', '')
    """
    return "+".join(classes)


def read_labels(path: str | Path, names: Mapping[str, str] | None = None) -> Labels:
    """Read a label file, JSON or CSV by its content. `names` are further keys -> the class they mean.

    Raises ConfigError with the line: an image twice or of a name that leaves the folder, an unknown or a missing key,
    a value that is neither 0 nor 1, more than MAX_ROWS rows; and for what is no such file.
    """
    text = _text(path)
    known = _known(names or {})
    rows = _json_rows if text.lstrip()[:1] in ("[", "{") else _csv_rows
    of: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    classes: tuple[str, ...] = ()
    for line, pairs in rows(str(path), text):
        where = f"{path}, line {line}"
        name, values = _row(where, pairs, known)
        classes = classes or tuple(values)
        if set(values) != set(classes):
            lost = ", ".join(sorted(set(values) ^ set(classes)))
            raise ConfigError(f"{where}: its classes are not those of the first row ({lost}).")
        if name in of:
            raise ConfigError(f"{where}: the image {name!r} has a row already, in line {lines[name]}.")
        if len(of) == MAX_ROWS:
            raise ConfigError(f"{path} has more than {MAX_ROWS:,} rows.")
        of[name], lines[name] = tuple(c for c in classes if values[c]), line
    if not of:
        raise ConfigError(f"{path} has no rows.")
    return Labels(str(path), classes, of, lines)


def _text(path: str | Path) -> str:
    try:
        return read_bytes(at_hand(str(path)), MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"There is no label file {path}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason}.", next_step="Save it as UTF-8.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error


def _known(names: Mapping[str, str]) -> dict[str, str]:
    """Every key that means a class, in lower case."""
    known = {key.casefold(): name for name, chinese in CHINESE.items() for key in (name, chinese)}
    for key, name in names.items():
        if "+" in name or not name.strip() or not name.isprintable() or name.strip().casefold() == NONE:
            raise ConfigError(f"{name!r} cannot be a class: labels join several with '+', and {NONE!r} is no class.")
        known[key.strip().casefold()] = name.strip()
    return known


def _row(where: str, pairs: Sequence[tuple[Any, Any]], known: Mapping[str, str]) -> tuple[str, dict[str, bool]]:
    """The image's name and whether it is of each class. Raises ConfigError."""
    name: str | None = None
    values: dict[str, bool] = {}
    if len(pairs) > MAX_CLASSES:
        raise ConfigError(f"{where}: {len(pairs):,} keys; at most {MAX_CLASSES} are read.")
    for key, value in pairs:
        text = str(key).strip()
        meant = known.get(text.casefold())
        if text == NAME and name is None:
            name = _image_name(where, value)
        elif meant is None or text == NAME:
            what = "stands twice" if text == NAME else "means no class"
            step = f"Keys are {NAME}, {', '.join(CHINESE)} and their Chinese names; --name KEY=CLASS maps others."
            raise ConfigError(f"{where}: the key {text!r} {what}.", next_step=step)
        elif meant in values:
            raise ConfigError(f"{where}: the class {meant} stands twice.")
        else:
            values[meant] = _one_hot(where, text, value)
    if name is None or not values:
        raise ConfigError(f"{where}: {NAME if name is None else 'a class'} is missing.")
    return name, values


def _one_hot(where: str, key: str, value: Any) -> bool:
    if type(value) is not int or value not in (0, 1):
        raise ConfigError(f"{where}: {key} is {_short(value)}; 0 or 1 would do.")
    return value == 1


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _image_name(where: str, value: Any) -> str:
    """Return a path below the images' folder, with '/'. Raises ConfigError for one that could lead out of it."""
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_NAME or not value.isprintable():
        raise ConfigError(f"{where}: {NAME} is {_short(value)}; a file's name would do.")
    name = value.strip()
    windows = PureWindowsPath(name)
    if windows.drive or windows.root or "://" in name or {"..", "."} & set(windows.parts):
        raise ConfigError(f"{where}: the image {_short(name)} would not lie below the folder of images.")
    return PurePosixPath(*windows.parts).as_posix()


# rows with their lines


_Rows = Iterator[tuple[int, Sequence[tuple[Any, Any]]]]


def _json_rows(path: str, text: str) -> _Rows:
    decoder = json.JSONDecoder(object_pairs_hook=_Pairs, parse_constant=_no_number)
    at, line, seen = len(text) - len(text.lstrip()), 1, 0
    listed = text[at] == "["
    at += listed
    while True:
        at = _past(text, at)
        line, seen = line + text.count("\n", seen, at), at
        if at == len(text) or text[at] == "]":
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            here = line + text.count("\n", seen, getattr(error, "pos", seen))
            raise ConfigError(f"{path}, line {here}: this is not JSON: {getattr(error, 'msg', error)}.") from error
        if not isinstance(value, _Pairs):
            raise ConfigError(f"{path}, line {line}: {_short(value)} is no object with {NAME} and classes.")
        yield line, value
    if listed != (at < len(text)) or text[at + 1 :].strip():
        what = "the list does not end" if at == len(text) else "something stands after the end of the list"
        raise ConfigError(f"{path}, line {line}: {what}.")


class _Pairs(list[tuple[Any, Any]]):
    """An object's keys and values, where a key may stand twice."""


def _no_number(text: str) -> float:
    return math.nan  # refused as a value, with its line


def _past(text: str, at: int) -> int:
    """Skip blanks and commas: the source's own files have none between rows."""
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at


def _csv_rows(path: str, text: str) -> _Rows:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if NAME not in header:
            raise ConfigError(f"{path} is neither JSON nor a CSV file with a column {NAME}.")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise ConfigError(f"{path}, line {reader.line_num}: {len(cells)} cells for {len(header)} columns.")
            yield reader.line_num, [(k, _cell(k, cell)) for k, cell in zip(header, cells, strict=True)]
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: this is not CSV: {error}.") from error


def _cell(column: str, cell: str) -> Any:
    if column == NAME:
        return plain_cell(cell)
    return {"0": 0, "1": 1}.get(cell.strip(), cell)


# writing


def label_lines(rows: Sequence[tuple[str, Sequence[str]]], classes: Sequence[str], keys: Keys = "english") -> str:
    """Return rows (image, its classes) as JSON, a list with an object a line, which `read_labels` reads.

    keys : "chinese" writes the classes of source 001 as it does; other classes keep their names.
    """
    named = {name: CHINESE.get(name, name) if keys == "chinese" else name for name in classes}
    lines = [
        json.dumps({NAME: image, **{named[c]: int(c in mine) for c in classes}}, ensure_ascii=False)
        for image, mine in rows
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"

"""Text that others wrote: files of a known kind and size, TOML of bounded depth, cells no spreadsheet computes."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_SETTINGS_BYTES = 2**20
"""Of a run.toml, train.toml or bundle.json: a few kB."""

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What makes a cell a formula, full-width forms included (OWASP, "CSV Injection")."""

_DEEP_KEY = re.compile(r"""(?<![\w"'-])(?:[\w"'-]++\s*+\.\s*+){32}""")


def read_bytes(path: Path, most: int = MAX_SETTINGS_BYTES) -> bytes:
    """Return a file's bytes. Raises OSError, and ValueError for what is no file (a pipe, a device) or is too large."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without it a pipe waits for its other end
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no file")
        if about.st_size > most:
            raise ValueError(f"it has {about.st_size:,} bytes; up to {most:,} are read")
        return file.read(most + 1)


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a TOML file says. Raises OSError, and ValueError (no TOML, too large, too deep)."""
    text = read_bytes(path).decode()
    if _DEEP_KEY.search(text):
        raise ValueError("a key of it has more than 32 parts")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is too deep") from error


def safe_cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: text that looks like one gets an apostrophe before it.

    >>> safe_cell("=1+1"), safe_cell("-0.5"), safe_cell(-3), safe_cell("a\\x1b[31m")
    ("'=1+1", '-0.5', -3, 'a?[31m')
    """
    if not isinstance(value, str):
        return value
    text = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in value)
    return f"'{text}" if value.startswith(FORMULA) and not _is_number(value) else text


def plain_cell(value: str) -> str:
    """Return what `safe_cell` was given, where it set an apostrophe.

    >>> plain_cell("'=1+1"), plain_cell("'quoted'")
    ('=1+1', "'quoted'")
    """
    return value[1:] if value[:1] == "'" and value[1:].startswith(FORMULA) else value


def safe_row(values: Iterable[Any]) -> list[Any]:
    """Return `safe_cell` of each value."""
    return [safe_cell(value) for value in values]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.strip() == text

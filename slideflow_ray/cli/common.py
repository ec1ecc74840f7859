"""What the commands share: exit codes, names, options."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from slideflow_ray.errors import ConfigError
from slideflow_ray.storage import place


class ExecutorName(StrEnum):
    """Where a run is worked off."""

    inline = "inline"
    ray = "ray"


class PrecisionName(StrEnum):
    """How the network computes."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class TilesName(StrEnum):
    """What becomes of the pixels."""

    lossless = "lossless"
    none = "none"


class DaskName(StrEnum):
    """What works off the aggregation."""

    threads = "threads"
    ray = "ray"


class SplitName(StrEnum):
    """A split of the cohort."""

    val = "val"
    test = "test"


Out = Annotated[Path, typer.Option("--out", "-o", parser=place, metavar="PATH", help="Output folder, or s3://.")]


OutArgument = Annotated[Path, typer.Argument(parser=place, metavar="OUT", help="Output folder of a run, or s3://.")]


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def pairs(given: list[str] | None, form: str) -> dict[str, str]:
    """Return the pairs of a repeated option, `form` being how one looks. Raises ConfigError."""
    parts = [text.partition("=") for text in given or []]
    if bad := [key for key, equals, value in parts if not (key and equals and value)]:
        raise ConfigError(f"--name {bad[0]} is not {form}.", next_step="Ask the command for --help.")
    return {key: value for key, _, value in parts}

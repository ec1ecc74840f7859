"""Do the night's work on a Ray cluster: score what is new or changed, aggregate the cohort so far, look for drift.

    ray job submit --working-dir . -- python jobs/nightly.py nightly.toml

The same line without ``ray job submit --working-dir . --`` works alone, and ``main(["nightly.toml"])`` in a notebook.
Paths are those that the cluster's nodes see. A night that was interrupted is gone on with.

Exit codes: 0 all done, 2 configuration, 3 some slides failed, 4 infrastructure (run again), 6 drift.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from slideflow_ray.exits import EXIT_DRIFT, ending
from slideflow_ray.nightly.night import run_night
from slideflow_ray.nightly.spec import load_nightly
from slideflow_ray.observe import say_failures
from slideflow_ray.progress import to_stderr


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("settings", help="nightly.toml")
    found.add_argument("--date", type=date.fromisoformat, help="the night's date, as 2026-11-21; default: today")
    return found


def night(given: argparse.Namespace) -> int:
    found = run_night(load_nightly(Path(given.settings), default="ray"), given.date, to_stderr())
    print(found.summary())
    code = say_failures(found.failures)
    return EXIT_DRIFT if found.drifted else code


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    return ending(lambda: night(given))


if __name__ == "__main__":
    sys.exit(main())

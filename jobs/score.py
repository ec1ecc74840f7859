"""Score a cohort on a Ray cluster, then evaluate it and write the report.

    ray job submit --working-dir . -- python jobs/score.py run.toml
    ray job submit --working-dir . -- python jobs/score.py --cohort COHORT.csv --model BUNDLE --out OUT

The same lines without ``ray job submit --working-dir . --`` work alone, and ``main(["run.toml"])`` in a notebook.
Paths are those that the cluster's nodes see. Run it again to resume.

Exit codes: 0 all done, 2 configuration, 3 finished with failures, 4 infrastructure (run again).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from slideflow_ray.evaluate import evaluate
from slideflow_ray.exits import ending
from slideflow_ray.observe import say_failures
from slideflow_ray.progress import to_stderr
from slideflow_ray.report import write_report
from slideflow_ray.run import run
from slideflow_ray.specs import given_run, worked_off


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("settings", nargs="?", help="run.toml; or give --cohort, --model and --out")
    found.add_argument("--cohort", help="cohort.csv")
    found.add_argument("--model", "-m", action="append", help="bundle; may be repeated")
    found.add_argument("--out", "-o", help="output folder, or s3://")
    found.add_argument("--workers", type=int, default=0, help="0: one for each core or GPU")
    found.add_argument("--retry", action="store_true", help="try refused slides again")
    return found


def score(given: argparse.Namespace) -> int:
    said = given_run(given.settings, given.cohort, given.model or (), given.out)
    spec = worked_off(said, workers=given.workers, default="ray")
    result = run(spec, listen=to_stderr(), retry=given.retry)
    if result.counts["done"]:
        print(evaluate(spec.out).summary())
        print(f"report {write_report(spec.out)}")
    print(f"counts {result.counts}")
    return say_failures((ended.code, ended.slide_id) for ended in result.ended if ended.status != "done")


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    return ending(lambda: score(given))


if __name__ == "__main__":
    sys.exit(main())

"""Evaluate what a run has scored, on a Ray cluster beside its stores, and write the report.

    ray job submit --working-dir . -- python jobs/evaluate.py OUT --rule sensitivity=0.95

The same line without ``ray job submit --working-dir . --`` works alone, and ``main(["OUT"])`` in a notebook.
OUT is a folder that the cluster's nodes see, or s3://.

Exit codes: 0 done, 2 configuration, 4 infrastructure (run again), 5 bytes that are not as they were written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from slideflow_ray.evaluate import evaluate
from slideflow_ray.exits import ending
from slideflow_ray.report import write_report


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("out", help="output folder of a run, or s3://")
    found.add_argument("--rule", default="youden", help="of the operating points, as in `slideflow-ray evaluate`")
    found.add_argument("--slide-score", choices=("max", "top10", "area"), default="max", help="what judges a slide")
    found.add_argument("--labels", help="how annotations label tiles: centre, or fraction=0.75")
    return found


def judge(given: argparse.Namespace) -> int:
    found = evaluate(given.out, rule=given.rule, slide_score=given.slide_score, labels=given.labels)
    print(found.summary())
    print(f"report {write_report(given.out)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    return ending(lambda: judge(given))


if __name__ == "__main__":
    sys.exit(main())

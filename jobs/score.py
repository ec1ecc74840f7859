"""Score a cohort on a Ray cluster, then evaluate it and write the report.

    ray job submit --working-dir . -- python jobs/score.py --cohort COHORT.csv --model BUNDLE --out OUT

The same line without ``ray job submit --working-dir . --`` works alone. Paths are those
that the cluster's nodes see. Run it again to resume.
"""

import argparse
import sys

from slideflow_ray.evaluate import evaluate
from slideflow_ray.progress import to_stderr
from slideflow_ray.report import write_report
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    spec = {
        "cohort": given.cohort,
        "out": given.out,
        "model": [{"path": path} for path in given.model],
        "executor": {"kind": "ray", "workers": given.workers},
    }
    result = run(RunSpec.parse(spec, "arguments"), listen=to_stderr())
    print(evaluate(given.out).summary())
    print(f"counts {result.counts}; report {write_report(given.out)}")
    return 0 if result.counts["done"] == len(result.ended) else 3


if __name__ == "__main__":
    sys.exit(main())

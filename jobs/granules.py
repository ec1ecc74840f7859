"""Train three models on repeated folds by patient and print them side by side: the granule paper's comparison.

    python jobs/granules.py train.toml
    ray job submit --working-dir . -- python jobs/granules.py train.toml

A is a fine-tuned ResNet, B a support vector machine on a frozen one, C joins both. train.toml as for
`slideflow-ray train` with `preset = "000"` (images of 512 px; a GPU), or fit.architecture = "two-models"; the cohort's
own split is not used. Writes `out`/repeated.json; the bundles of each fold stay below `work`/repeats. Run it again to
go on.

Exit codes: 0 done, 2 configuration, 3 a file cannot be trained on, or the loss is no number (the line says which),
4 infrastructure (run again).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from slideflow_ray.exits import ending
from slideflow_ray.progress import to_stderr
from slideflow_ray.train.repeat import Repeats, repeat
from slideflow_ray.train.spec import load_train, read_job


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("settings", help="train.toml")
    found.add_argument("--folds", type=int, default=5, help="folds by patient (default: 5)")
    found.add_argument("--seeds", type=int, default=3, help="repeats with other folds (default: 3)")
    found.add_argument(
        "--backbone",
        choices=["start", "first"],
        default="start",
        help="B's frozen network: as fit.weights says, or model A of the same fold (C is joined on val then)",
    )
    return found


def granules(given: argparse.Namespace) -> int:
    job, _ = read_job(load_train(Path(given.settings)), given.settings)
    found = repeat(job, Repeats(given.folds, given.seeds, given.backbone), to_stderr())
    print(found.summary())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    return ending(lambda: granules(given))


if __name__ == "__main__":
    sys.exit(main())

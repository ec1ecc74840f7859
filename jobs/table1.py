"""Train several architectures on one cohort and print them side by side: the glomerulus paper's Table 1.

    python jobs/table1.py train.toml --out table1
    ray job submit --working-dir . -- python jobs/table1.py train.toml --out table1

train.toml at full size: cohort, out, work, classes and `preset = "paper-final"` (crops of 224 px, 200 epochs; a GPU).
The bundle of lowest validation loss is written to `out`; all of them are scored on test, with parameters and size.
Run it again to go on.

Exit codes: 0 done, 2 configuration, 3 a file cannot be trained on, or the loss is no number (the line says which),
4 infrastructure (run again).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from slideflow_ray.compare import Settings, compare
from slideflow_ray.exits import ending
from slideflow_ray.progress import to_stderr
from slideflow_ray.train.choose import candidates, choose
from slideflow_ray.train.images import judged_cohort
from slideflow_ray.train.spec import load_train, read_job

ARCHITECTURES = "torchvision:vgg16,torchvision:inception_v3,torchvision:resnet50,se-resnet"


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("settings", help="train.toml")
    found.add_argument("--architectures", default=ARCHITECTURES, help=f"default: {ARCHITECTURES}")
    found.add_argument("--out", required=True, help="folder of the run that scores them on test")
    return found


def table(given: argparse.Namespace) -> int:
    job, _ = read_job(load_train(Path(given.settings)), given.settings)
    names = [name.strip() for name in given.architectures.split(",")]
    result, _ = choose(job, names, to_stderr())
    bundles = list(candidates(job, names).values())
    settings = Settings(split="test", executor=job.executor, labels=job.labels)
    found = compare(bundles, judged_cohort(job), given.out, settings, to_stderr())
    print(found.summary())
    print(result.summary())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    return ending(lambda: table(given))


if __name__ == "__main__":
    sys.exit(main())

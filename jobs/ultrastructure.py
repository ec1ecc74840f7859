"""What pre-training is worth to a segmentation: method against Dice, by share of the labels, over several seeds.

    python jobs/ultrastructure.py train.toml --out table
    ray job submit --working-dir . -- python jobs/ultrastructure.py train.toml --out table

train.toml is a segmentation's training (task = "segment"), with a table of what is compared:

    [transfer]
    methods = ["random", "usregcon", "simclr", "pixpro", "detcon"]         # "imagenet" where you have such weights
    shares = [1, 5, 10, 100]                                               # percent of train's labelled slides
    seeds = 5
    at_once = 2                                                            # trainings at a time
    cohort = "unlabelled.csv"                                              # to pre-train on; if left out, the same
    pretrain = {epochs = 100, lr = 1e-3, batch_size = 32}

Dice is that of slides of test. The table is printed and written to OUT as text, JSON and CSV. Run it again to go on:
what is pre-trained or trained already is not repeated.

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
from slideflow_ray.specs import folder_of, relative_to
from slideflow_ray.train.spec import load_train, read_job
from slideflow_ray.train.transfer import TransferSpec, transfer, write


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("settings", help="train.toml")
    found.add_argument("--out", required=True, help="folder of the table")
    return found


def table(given: argparse.Namespace) -> int:
    values = load_train(Path(given.settings))
    told = dict(values.pop("transfer", {}))
    if isinstance(told.get("cohort"), str):
        told["cohort"] = relative_to(folder_of(given.settings), told["cohort"])
    job, _ = read_job(values, given.settings)
    found = transfer(job, TransferSpec.parse(told, f"{given.settings}, transfer"), to_stderr())
    write(found, Path(given.out))
    print(found.summary())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    return ending(lambda: table(given))


if __name__ == "__main__":
    sys.exit(main())

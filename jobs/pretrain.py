"""Pre-train a segmentation network without labels on a Ray cluster: tile what is new, learn with Ray Train.

    ray job submit --working-dir . -- python jobs/pretrain.py pretrain.toml

The same line without ``ray job submit --working-dir . --`` works alone, and ``main(["pretrain.toml"])`` in a notebook.
Paths are those that the cluster's nodes see; `crew.storage` keeps the checkpoints (a shared folder, or
s3://BUCKET/PATH). Run it again to go on. `train` begins with what it leaves: fit.weights = "OUT/weights.safetensors".

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
from slideflow_ray.train.job import train
from slideflow_ray.train.spec import for_cluster, load_pretrain, read_job


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("settings", help="pretrain.toml")
    found.add_argument("--workers", type=int, default=0, help="0: one for each GPU, else one for each core but one")
    found.add_argument("--overwrite", action="store_true", help="replace the weights")
    return found


def pretrain(given: argparse.Namespace) -> int:
    values = for_cluster(load_pretrain(Path(given.settings)), given.workers, overwrite=given.overwrite)
    job, _ = read_job(values, given.settings)
    print(train(job, listen=to_stderr()).summary())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    return ending(lambda: pretrain(given))


if __name__ == "__main__":
    sys.exit(main())

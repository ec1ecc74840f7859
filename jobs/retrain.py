"""Retrain on a Ray cluster: tile what is new, train data-parallel with Ray Train, write the bundle.

    ray job submit --working-dir . -- python jobs/retrain.py train.toml

The same line without ``ray job submit --working-dir . --`` works alone. Paths are those that the cluster's nodes see;
`crew.storage` keeps the checkpoints (a shared folder, or s3://BUCKET/PATH). Run it again to go on.
"""

import argparse
import sys
from pathlib import Path

from slideflow_ray.progress import to_stderr
from slideflow_ray.train.job import train
from slideflow_ray.train.spec import load_train, read_job


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="train.toml")
    parser.add_argument("--workers", type=int, default=0, help="0: one for each GPU, else one for each core but one")
    parser.add_argument("--overwrite", action="store_true", help="replace the bundle")
    given = parser.parse_args()
    values = load_train(Path(given.settings))
    crew = {**values.get("crew", {}), "kind": "ray"} | ({"workers": given.workers} if given.workers else {})
    executor = {"kind": "ray", **values.get("executor", {})}
    values |= {"crew": crew, "executor": executor} | ({"overwrite": True} if given.overwrite else {})
    job, _ = read_job(values, given.settings)
    print(train(job, listen=to_stderr()).summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())

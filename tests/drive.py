"""A driver that tests may kill: it runs with a fault of slideflow_ray.testing installed, here and in its workers.

`python -m tests.drive SPEC.json`, with the fault's name in DRIVE_FAULT and the folder that counts its strikes in
DRIVE_FOLDER. multiprocessing imports this module in the readers too, and Ray calls `strike` in every worker process
that it starts for this driver, so the fault is installed there as well; nothing in the package knows of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from slideflow_ray.errors import SlideflowError
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec
from slideflow_ray.testing import install


def strike() -> None:
    """Install the fault that the environment names, if it names one."""
    if "DRIVE_FAULT" in os.environ:
        install(os.environ["DRIVE_FAULT"], Path(os.environ["DRIVE_FOLDER"]))


def join(address: str) -> None:
    """Join a Ray (or start one: "local") whose workers for this driver have the fault; the run then joins it too."""
    import ray

    own = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 150 * 2**20} if address == "local" else {}
    names = ("DRIVE_FAULT", "DRIVE_FOLDER", "PYTHONPATH", "SLIDEFLOW_RAY_TEST")
    env = {"env_vars": {name: os.environ[name] for name in names if name in os.environ}}
    runtime_env = {"worker_process_setup_hook": "tests.drive.strike", **env}
    ray.init(address=address, log_to_driver=False, logging_level="error", runtime_env=runtime_env, **own)


def main() -> int:
    """Run once; say how each slide ended."""
    spec = RunSpec.parse(json.loads(Path(sys.argv[1]).read_text()), "drive")
    if spec.executor.kind == "ray":
        join(spec.executor.address or "local")
    try:
        result = run(spec, listen=print)
    except SlideflowError as error:
        print(error, file=sys.stderr)
        return 4
    print(json.dumps({e.slide_id: [e.status, e.code, e.message] for e in result.ended}))
    return 0


if __name__ in ("__main__", "__mp_main__"):
    strike()

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    os._exit(code)

"""A driver that tests may kill: it runs with a fault of slideflow_ray.testing installed, here and in its readers.

`python -m tests.drive SPEC.json FAULT FOLDER`: multiprocessing imports this module in its children too, so the
fault is installed there as well; nothing in the package knows of it.
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

if len(sys.argv) == 4 and sys.argv[2] != "none":
    install(sys.argv[2], Path(sys.argv[3]))

if __name__ == "__main__":
    try:
        result = run(RunSpec.parse(json.loads(Path(sys.argv[1]).read_text()), "drive"), listen=print)
    except SlideflowError as error:
        print(error, file=sys.stderr)
        sys.exit(4)
    print(json.dumps({e.slide_id: [e.status, e.code, e.message] for e in result.ended}))
    sys.stdout.flush()
    os._exit(0)

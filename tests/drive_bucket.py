"""A driver of its own with a Ray of its own: run.json's spec on the command line, the environment from its parent.

Ray's workers have the environment of their node, and nobody passes credentials on: where the node has them, they do.
"""

from __future__ import annotations

import json
import sys

from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec

if __name__ == "__main__":
    found = run(RunSpec.parse(json.loads(sys.argv[1]), "test"))
    sys.stdout.write(json.dumps(found.counts))

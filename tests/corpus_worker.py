"""What opens the corpus: reads [kind, path] lines, answers each with a code, seconds and MB above the idle process."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path

ABOVE = 2 * 2**30
"""Address space beyond the idle process: twice seven times what is promised, so that a bomb ends and is seen."""


def slide(path: str) -> None:
    from slideflow_ray.slides import open_slide

    with open_slide(path) as reader:
        for level, size in enumerate(one.size for one in reader.levels):
            box = (min(size[0], 512), min(size[1], 512))
            reader.read(level, (0, 0), box)
            reader.read(level, (size[0] - box[0], size[1] - box[1]), box)


def annotation(path: str) -> None:
    from slideflow_ray.annotations import read_annotation

    read_annotation(path)


def cohort(path: str) -> None:
    from slideflow_ray.cohort import read_cohort

    read_cohort(path)


def run(path: str) -> None:
    from slideflow_ray.specs import load_run

    load_run(Path(path))


def train(path: str) -> None:
    from slideflow_ray.train.spec import load_train, read_job

    read_job(load_train(Path(path)), path)


def bundle(path: str) -> None:
    from slideflow_ray.models.bundle import load_weights, read_card

    read_card(path)
    load_weights(path)


READ = {"slide": slide, "annotation": annotation, "cohort": cohort, "run": run, "train": train, "bundle": bundle}


def status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def answer(kind: str, path: str) -> dict[str, object]:
    from slideflow_ray.errors import SlideflowError

    forget_peak()
    before, began = status("VmRSS"), time.perf_counter()
    try:
        READ[kind](path)
        code, message = "ok", ""
    except SlideflowError as error:
        code, message = error.code, str(error)
    except BaseException as error:  # noqa: BLE001 - what is not ours is what is looked for
        code, message = type(error).__name__, str(error)[:500]
    seconds = time.perf_counter() - began
    return {"code": code, "seconds": seconds, "mb": (status("VmHWM") - before) / 1e6, "message": message[:2000]}


def main() -> None:
    warnings.simplefilter("ignore")
    import imagecodecs  # noqa: F401 - what a worker has loaded before its first slide
    import openslide  # noqa: F401
    import safetensors.torch  # noqa: F401

    import slideflow_ray.annotations
    import slideflow_ray.models.bundle
    import slideflow_ray.slides.image
    import slideflow_ray.slides.omezarr
    import slideflow_ray.slides.openslide
    import slideflow_ray.slides.tiff
    import slideflow_ray.train.spec  # noqa: F401

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    limit = status("VmSize") + ABOVE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        kind, path = json.loads(line)
        print(json.dumps(answer(kind, path)), file=replies, flush=True)


if __name__ == "__main__":
    main()

"""Whole runs against the bare forward pass, one worker against two, Ray against inline: ratios within one run.

    python benchmarks/end_to_end.py [--architecture torchvision:resnet18] [--repeats 3] [--ray]

One generated slide of 60 megapixels (about 1,200 tiles of 224 px at 0.5 um), all of it tiled. Every figure is a
median over the repeats, taken in turn, so that a machine whose speed drifts does not favour one of them. Start-up
(imports, loading, Ray) is measured by a run with nothing left to do, and taken off.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slideflow_ray.cohort import Item
from slideflow_ray.events import ChunkScored
from slideflow_ray.run import run
from slideflow_ray.specs import ComputeSpec, RunSpec

TILE_PX = 224


def make_bundle(folder: Path, architecture: str) -> Path:
    import torch

    from slideflow_ray.models.bundle import BundleCard, write_bundle
    from slideflow_ray.models.networks import build

    torch.manual_seed(0)
    card = BundleCard(
        name="bench",
        task="classify",
        architecture=architecture,
        classes=("normal", "tumor"),
        tile_px=TILE_PX,
        mpp=0.5,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    return write_bundle(folder / "bundle", card, build(architecture, {}, 2).state_dict())


def bare_forward(bundle: Path, tiles: int, workers: int) -> float:
    """Seconds for `tiles` tiles that are in memory already: `workers` threads, nothing else."""
    from slideflow_ray.models.scorer import load_scorer, pin_threads
    from slideflow_ray.profile import resolve

    scorer = load_scorer(bundle, resolve(ComputeSpec()))
    share = np.random.default_rng(0).integers(0, 255, (tiles // workers, TILE_PX, TILE_PX, 3), np.uint8)

    def work() -> None:
        pin_threads()
        for start in range(0, len(share), 256):
            scorer.margins(share[start : start + 256])

    threads = [threading.Thread(target=work) for _ in range(workers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - began) * tiles / (workers * len(share))


def one_run(folder: Path, bundle: Path, slide: Path, tiles: str, executor: dict[str, Any]) -> tuple[float, int]:
    """Steady seconds (from the first chunk handed out to the end, start-up taken off) and tiles of a fresh run."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    values = {"cohort": "", "out": str(out), "model": [{"path": str(bundle)}], "executor": executor}
    spec = RunSpec.parse({**values, "store": {"tiles": tiles, "chunk_rows": 64}}, "benchmark")
    item = Item(slide_id="bench", uri=str(slide), modality="tem")
    stamps: list[tuple[float, int]] = []

    def listen(event: object) -> None:
        if isinstance(event, ChunkScored):
            stamps.append((time.perf_counter(), event.tiles))

    run(spec, [item], listen=listen)
    # the first chunks of all workers carry the loading of models; the steady state is what comes after them
    skip = 2 * max(1, executor.get("workers", 1))
    seconds = stamps[-1][0] - stamps[skip - 1][0]
    return seconds, sum(n for _, n in stamps[skip:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="torchvision:resnet18")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ray", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from slideflow_ray.phantoms import write_slide

        slide = folder / "slide.tif"
        write_slide(slide, size_px0=(9216, 6528), mpp0=0.5)
        bundle = make_bundle(folder, given.architecture)
        two, one = {"kind": "inline", "workers": 2}, {"kind": "inline", "workers": 1}
        cases: dict[str, Callable[[], tuple[float, int]]] = {
            "bare forward, 2 threads": lambda: (bare_forward(bundle, 1024, 2), 1024),
            "inline, 2 workers": lambda: one_run(folder, bundle, slide, "none", two),
            "inline, 1 worker": lambda: one_run(folder, bundle, slide, "none", one),
            "inline, 2 workers, tiles kept": lambda: one_run(folder, bundle, slide, "lossless", two),
        }
        if given.ray:
            cases["ray, 2 workers"] = lambda: one_run(folder, bundle, slide, "none", {"kind": "ray", "workers": 2})
        rates: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(given.repeats):
            for case, measure in cases.items():
                seconds, tiles = measure()
                rates[case].append(tiles / seconds)
        median = {case: statistics.median(values) for case, values in rates.items()}
        for case, value in median.items():
            spread = f"{min(rates[case]):.1f} to {max(rates[case]):.1f}"
            print(f"{case:32} {value:8.1f} tiles/s  ({spread})")
        base = median["inline, 2 workers"]
        ratios = {
            "end to end / bare forward": base / median["bare forward, 2 threads"],
            "2 workers / 1 worker": base / median["inline, 1 worker"],
            "tiles kept / not kept": median["inline, 2 workers, tiles kept"] / base,
        }
        if given.ray:
            ratios["ray / inline"] = median["ray, 2 workers"] / base
        print(json.dumps({"architecture": given.architecture, **{k: round(v, 3) for k, v in ratios.items()}}))


if __name__ == "__main__":
    main()

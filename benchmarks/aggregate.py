"""100 million tile scores to ROC, operating point and confusion: seconds and memory.

Writes stores with scores and labels (as a run leaves them), then reads them back the way
``evaluate`` does, on Dask's threads::

    python benchmarks/aggregate.py --tiles 100000000 --slides 200 --folder /tmp/aggregate

Target (DESIGN section 9): below 60 s and 1 GB on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path

import numpy as np

from slideflow_ray import aggregate, metrics
from slideflow_ray.store import SlideStore

GRID, NODE, LABELS = "grid-aaaaaaaaaaaa", "model-bbbbbbbbbbbb", "labels/grid-aaaaaaaaaaaa/centre-cccccccccccc"
ROWS = 256


def write(folder: Path, slides: int, tiles: int) -> None:
    """Write `slides` stores of `tiles` tiles each: two classes, one in ten tiles positive."""
    rng = np.random.default_rng(0)
    for i in range(slides):
        store = SlideStore(folder, f"slide_{i:05d}")
        truth = rng.random(tiles) < 0.1
        z = rng.normal(np.where(truth, 1.5, -1.5), 2).astype(np.float32)
        store.create_rows(f"scores/{GRID}/{NODE}", (tiles, 2), np.float32, min(tiles, 64 * ROWS), fill=float("nan"))
        margins = np.column_stack([-z, z])
        for chunk in range(-(-tiles // (64 * ROWS))):
            rows = margins[chunk * 64 * ROWS : (chunk + 1) * 64 * ROWS]
            store.write_chunk(f"scores/{GRID}/{NODE}", chunk, rows)
        store.write_array(LABELS, np.column_stack([~truth, truth]).astype(np.int8))


def read(folder: Path, slides: int, scheduler: aggregate.Scheduler) -> dict[str, float]:
    """Return what it took, and the AUC as proof of work."""
    parts = [
        aggregate.Part(str(folder), f"slide_{i:05d}", GRID, NODE, f"patient_{i // 2:05d}", LABELS)
        for i in range(slides)
    ]
    started = time.perf_counter()
    tiles = aggregate.read_tiles(parts, (1,), scheduler)
    cases = [classes[1] for classes in tiles.histograms.values()]
    pos, neg = metrics.together(p for p, _ in cases), metrics.together(n for _, n in cases)
    threshold = metrics.youden(pos, neg)
    area = metrics.auc(pos, neg)
    histograms = time.perf_counter() - started
    low, high = metrics.auc_interval([p for p, _ in cases], [n for _, n in cases]) or (np.nan, np.nan)
    interval = time.perf_counter() - started - histograms
    calls = aggregate.read_calls(parts, ("normal", "tumor"), {1: threshold}, False, scheduler)
    total = sum((counts[1] for counts in calls.counts.values()), metrics.Counts())
    return {
        "tiles": total.total,
        "slides": slides,
        "auc": round(area, 6),
        "interval": [round(low, 6), round(high, 6)],
        "sensitivity": round(total.sensitivity, 6),
        "histograms_s": round(histograms, 2),
        "interval_s": round(interval, 2),
        "confusion_s": round(time.perf_counter() - started - histograms - interval, 2),
        "total_s": round(time.perf_counter() - started, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    """Write, read, print JSON, tidy up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=10_000_000)
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/slideflow-aggregate"))
    parser.add_argument("--scheduler", choices=["threads", "ray"], default="threads")
    parser.add_argument("--step", choices=["all", "write", "read"], default="all")
    given = parser.parse_args()
    if given.step != "read":
        shutil.rmtree(given.folder, ignore_errors=True)
        write(given.folder, given.slides, given.tiles // given.slides)
    if given.step != "write":
        print(json.dumps(read(given.folder, given.slides, given.scheduler)))
    if given.step == "all":
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()

"""10,000 slides over 1 to 64 simulated GPUs: what the driver costs, what it holds, and how the last slides end.

    python benchmarks/schedule.py [--slides 10000] [--chunks 40] [--gpus 1 4 16 64] [--times FILE] [--faster 1]

The graph and the driver's loop are the real ones; the pool is simulated in virtual time, as on_ray.py's with a scorer
and four readers for each GPU. Task times are drawn from those of a small real run on this machine (a ResNet-18 on one
generated slide, a chunk of 64 tiles), printed, and kept with --times. `--faster` divides the forward passes by
so much, as a GPU would: no GPU's time was measured here. Each row runs in a process of its own.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from slideflow_ray import execute
from slideflow_ray.cohort import Item
from slideflow_ray.events import ChunkScored, Event, SlideDone
from slideflow_ray.execute import Done, Outcome, Task
from slideflow_ray.graph import RunGraph
from slideflow_ray.pipeline import Chunk, GridPlan, SlidePlan
from slideflow_ray.specs import RunSpec, TileSpec

AHEAD, READERS = 2, 4
"""As executor.readers_per_gpu and on_ray.AHEAD."""
TILE = TileSpec(tile_px=224, mpp=0.5)
ROWS = 64
KINDS = ("plan", "read", "forward", "derive")
Times = dict[str, list[float]]


def measured() -> Times:
    """Seconds of each task of a small real run."""
    from end_to_end import make_bundle

    from slideflow_ray.phantoms import write_slide
    from slideflow_ray.run import run

    times: Times = {kind: [] for kind in KINDS}

    def keep(outcome: Outcome) -> None:
        if isinstance(outcome, Done) and outcome.span is not None:
            stage = outcome.task.stage
            times["forward" if stage == "chunk" else stage].append(outcome.span.ended - outcome.span.began)
            if stage == "chunk":
                times["read"].append(outcome.span.read_s)

    told = RunGraph.told
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slides = [folder / f"{i}.tif" for i in range(2)]
        for seed, slide in enumerate(slides):
            write_slide(slide, size_px0=(4096, 4096), seed=seed)
        bundle = make_bundle(folder, "torchvision:resnet18")
        values = {"cohort": "", "out": str(folder / "out"), "model": [{"path": str(bundle)}]}
        spec = RunSpec.parse({**values, "store": {"tiles": "none", "chunk_rows": ROWS}}, "benchmark")
        items = [Item(slide_id=slide.stem, uri=str(slide), modality="tem") for slide in slides]
        with mock.patch.object(RunGraph, "told", lambda graph, outcome: (keep(outcome), told(graph, outcome))[1]):
            run(spec, items)
    return times


class Simulated:
    """A pool in virtual time: each GPU has a scorer and READERS readers; tasks go to the one that was free first."""

    def __init__(self, gpus: int, times: Times, chunks: list[int], seed: int = 0) -> None:
        self.workers, self.clock, self.own_s = gpus, 0.0, 0.0
        self.busy_s = self.work_s = 0.0
        self._rng, self._times, self._chunks = random.Random(seed), times, chunks
        self._readers = [[0.0] * READERS for _ in range(gpus)]
        self._scorer = [0.0] * gpus
        self._places = deque(range(gpus)) * (READERS + AHEAD)  # one for each task that a GPU may hold
        self.last_s = 0.0
        self._events: list[tuple[float, int, int, Task]] = []
        self._turn = itertools.count()

    @property
    def room(self) -> int:
        return self.workers * (READERS + AHEAD) - len(self._events)

    def _draw(self, kind: str) -> float:
        seconds = self._rng.choice(self._times[kind])
        self.work_s += seconds
        return seconds

    def submit(self, task: Task) -> None:
        began = time.perf_counter()
        gpu = self._places.popleft()
        end = max(self.clock, heapq.heappop(self._readers[gpu])) + self._draw(
            "read" if task.stage == "chunk" else task.stage
        )
        heapq.heappush(self._readers[gpu], end)
        if task.stage == "chunk":
            self.last_s = self.clock
            forward = self._draw("forward")
            self.busy_s += forward
            end = self._scorer[gpu] = max(end, self._scorer[gpu]) + forward
        heapq.heappush(self._events, (end, next(self._turn), gpu, task))
        self.own_s += time.perf_counter() - began

    def wait(self) -> list[Outcome]:
        began = time.perf_counter()
        self.clock, _, gpu, task = heapq.heappop(self._events)
        self._places.append(gpu)
        outcome = Done(task, self._value(task))
        self.own_s += time.perf_counter() - began
        return [outcome]

    def _value(self, task: Task) -> Any:
        if task.stage == "plan":
            n = self._chunks[int(task.slide_id)]
            todo = tuple(Chunk(task.payload, "g", TILE, i, ROWS, ("m",)) for i in range(n))
            grid = GridPlan("g", TILE, ROWS * n, n, ("m",), todo)
            return SlidePlan(task.payload, f"sha256:{task.slide_id}", (grid,), complete=False)
        return ROWS if task.stage == "chunk" else "scored"


def one(gpus: int, slides: int, chunks: int, times: Times) -> dict[str, Any]:
    """Work off a cohort; return what it cost. Chunks of a slide are log-normal about `chunks`, as tissue areas are."""
    rng = random.Random(1)
    counts = [max(1, round(rng.lognormvariate(0, 0.6) * chunks)) for _ in range(slides)]
    items = [Item(slide_id=str(i), uri=f"/slides/{i}.svs") for i in range(slides)]
    pool = Simulated(gpus, times, counts)
    planned: dict[str, float] = {}
    ends: list[float] = []
    longest = 0.0
    me = psutil.Process()
    peak = before = me.memory_info().rss

    def listen(event: Event) -> None:
        nonlocal longest, peak
        if isinstance(event, ChunkScored):
            planned.setdefault(event.slide_id, pool.clock)
        elif isinstance(event, SlideDone):
            ends.append(pool.clock)
            longest = max(longest, pool.clock - planned.pop(event.slide_id, pool.clock))
            if len(ends) % 100 == 0:
                peak = max(peak, me.memory_info().rss)

    graph = RunGraph(items, listen=listen)
    began = time.perf_counter()
    execute.run(graph, pool)  # type: ignore[arg-type]
    driver_s = time.perf_counter() - began - pool.own_s
    made = sum(counts)
    return {
        "gpus": gpus,
        "slides": slides,
        "chunks": made,
        "hours": pool.clock / 3600,
        "driver_s": driver_s,
        "us_per_chunk": 1e6 * driver_s / made,
        "of_work": driver_s / pool.work_s,
        "of_time": driver_s / pool.clock,
        "busy": pool.busy_s / (gpus * pool.clock),
        "grown_mb": (max(peak, me.memory_info().rss) - before) / 1e6,
        "tail_s": ends[-1] - ends[int(0.95 * len(ends))],
        "longest_s": longest,
        "drain_s": pool.clock - pool.last_s,
    }


def alone(*arguments: Any) -> dict[str, Any]:
    """`one` in a fresh process, so that memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(one, arguments)


ROW = (
    "{gpus:>4} GPUs {slides:>6} slides {chunks:>8} chunks {hours:8.2f} h | driver {driver_s:6.1f} s, "
    "{us_per_chunk:4.1f} us a chunk, {of_work:.5%} of the work, {of_time:.4%} of the time | scorers busy {busy:.1%} | "
    "driver's memory +{grown_mb:.0f} MB | last 5 % of slides {tail_s:.0f} s, longest slide {longest_s:.0f} s, "
    "no chunk left to hand out for the last {drain_s:.1f} s"
)


def main() -> None:
    """Print the measured times, then a row for each number of GPUs, and one for a tenth of the slides."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--times", type=Path)
    parser.add_argument("--faster", type=float, default=1.0)
    given = parser.parse_args()
    if given.times and given.times.exists():
        times = json.loads(given.times.read_text())
    else:
        times = measured()
        if given.times:
            given.times.write_text(json.dumps(times))
    for kind in KINDS:
        s = sorted(times[kind])
        print(f"{kind:8} n={len(s):3}  min {s[0]:.4f}  median {statistics.median(s):.4f}  max {s[-1]:.4f} s")
    times["forward"] = [seconds / given.faster for seconds in times["forward"]]
    rates = ROWS / statistics.mean(times["forward"]), ROWS / statistics.mean(times["read"])
    print(f"a scorer {rates[0]:.0f} tiles/s, a reader {rates[1]:.0f} tiles/s (chunks of {ROWS} tiles)")
    for gpus, slides in [(given.gpus[-1], given.slides // 10), *((gpus, given.slides) for gpus in given.gpus)]:
        print(ROW.format(**alone(gpus, slides, given.chunks, times)), flush=True)


if __name__ == "__main__":
    main()

"""graph.py: every item ends once, whatever order outcomes come in and whoever dies."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from slideflow_ray import execute
from slideflow_ray.cohort import Item
from slideflow_ray.errors import NoMpp, ReadError
from slideflow_ray.events import ChunkScored, SlideDone, SlideFailed, WorkerDied
from slideflow_ray.execute import Done, Failed, Lost, Task, inline
from slideflow_ray.graph import Queue, RunGraph
from slideflow_ray.pipeline import Chunk, GridPlan, SlidePlan
from slideflow_ray.specs import TileSpec

TILE = TileSpec(tile_px=64, mpp=0.5)


def item(name: str) -> Item:
    return Item(slide_id=name, uri=f"/{name}.svs")


def slide_plan(one: Item, chunks: int, complete: bool = False) -> SlidePlan:
    todo = () if complete else tuple(Chunk(one, "g", TILE, i, 10, ("m",)) for i in range(chunks))
    grid = GridPlan("g", TILE, 10 * chunks, chunks, ("m",), todo)
    return SlidePlan(one, f"sha256:{one.slide_id}", (grid,), complete)


class FakePool:
    """Performs tasks in random order; `killers` die with what they hold, `broken` fail when planned."""

    def __init__(self, seed: int, chunks: dict[str, int], killers: dict[str, int], broken: set[str], share: int = 3):
        self.workers, self.share = 2, share
        self.rng, self.chunks, self.killers, self.broken = random.Random(seed), chunks, dict(killers), broken
        self.flight: list[Task] = []
        self.performed: Counter[tuple[str, str, int]] = Counter()
        self.most = 0

    @property
    def room(self) -> int:
        return 6 - len(self.flight)

    def submit(self, task: Task) -> None:
        self.flight.append(task)
        self.most = max(self.most, len(self.flight))

    def wait(self) -> list[execute.Outcome]:
        assert self.flight, "a pool was asked to wait for nothing"
        task = self.flight.pop(self.rng.randrange(len(self.flight)))
        if task.stage == "chunk" and self.killers.get(task.slide_id, 0) > 0:
            self.killers[task.slide_id] -= 1
            beside = [] if task.alone else [t for t in self.flight if not t.alone][: self.share - 1]
            self.flight = [t for t in self.flight if t not in beside]
            return [Lost("w", (task, *beside), "killed")]
        return [self.outcome(task)]

    def outcome(self, task: Task) -> execute.Outcome:
        if task.slide_id in self.broken:
            return Failed(task, NoMpp("no scale") if task.slide_id.startswith("r") else ReadError("unreadable"))
        if task.stage == "plan":
            return Done(task, slide_plan(task.payload, self.chunks[task.slide_id]))
        if task.stage == "chunk":
            self.performed["chunk", task.slide_id, task.payload.index] += 1
            return Done(task, task.payload.tiles)
        return Done(task, "scored" if self.chunks[task.slide_id] else "no_tissue")


@pytest.mark.parametrize("seed", range(30))
def test_every_item_ends_once_and_every_chunk_is_scored(seed):
    rng = random.Random(seed)
    names = [f"{'r' if i % 7 == 3 else 's'}{i}" for i in range(20)]
    chunks = {name: rng.choice([0, 1, 3, 9]) for name in names}
    broken = {name for name in names if rng.random() < 0.2}
    killers = {name: rng.choice([1, 2, 50]) for name in names if rng.random() < 0.2}
    events = []
    graph = RunGraph([item(name) for name in names], listen=events.append)
    pool = FakePool(seed, chunks, killers, broken)
    execute.run(graph, pool)
    assert set(graph.ended) == set(names)
    ends = Counter(e.slide_id for e in events if isinstance(e, SlideDone | SlideFailed))
    assert ends == Counter(names)
    for name in names:
        ended = graph.ended[name]
        if name in broken:
            assert ended.status == ("refused" if name.startswith("r") else "failed")
        elif killers.get(name, 0) == 50 and chunks[name]:
            assert ended.code == "E_QUARANTINE"
        elif name not in killers:
            assert ended.status == "done"
            assert all(pool.performed["chunk", name, i] == 1 for i in range(chunks[name]))
    assert pool.most <= 6


def test_an_innocent_slide_beside_a_killer_is_done_and_tried_alone():
    pool = FakePool(0, {"bad": 2, "good": 4}, {"bad": 99}, set())
    events = []
    graph = RunGraph([item("bad"), item("good")], listen=events.append)
    execute.run(graph, pool)
    assert graph.ended["good"].status == "done"
    assert graph.ended["bad"].code == "E_QUARANTINE"
    assert "killed its worker 2 times while alone" in graph.ended["bad"].message
    assert sum(isinstance(e, WorkerDied) for e in events) <= 4


def test_one_death_in_company_is_forgiven():
    pool = FakePool(1, {"s": 6}, {"s": 1}, set())
    graph = RunGraph([item("s")])
    execute.run(graph, pool)
    assert graph.ended["s"].status == "done"


def test_a_complete_slide_is_unchanged_and_nothing_is_scored():
    graph = RunGraph([item("s")])
    (task,) = graph.ready(4)
    graph.told(Done(task, slide_plan(task.payload, 3, complete=True)))
    assert graph.finished
    assert graph.ended["s"].outcome == "unchanged"
    assert not graph.changed


def test_slides_are_planned_a_few_ahead_and_not_all_at_once():
    graph = RunGraph([item(f"s{i}") for i in range(1000)])
    assert len(graph.ready(8)) == 4
    planned = Counter()
    pool = FakePool(0, {f"s{i}": 5 for i in range(1000)}, {}, set())
    graph = RunGraph([item(f"s{i}") for i in range(300)], listen=lambda e: planned.update([type(e).__name__]))
    ahead = []
    while not graph.finished:
        for task in graph.ready(pool.room):
            pool.submit(task)
        for outcome in pool.wait():
            graph.told(outcome)
        ahead.append(len(graph._plans))
    assert planned["SlideDone"] == 300
    assert max(ahead) < 20
    assert planned[ChunkScored.__name__] == 1500


def test_a_failed_slide_is_not_handed_out_again():
    graph = RunGraph([item("s")])
    (task,) = graph.ready(4)
    graph.told(Done(task, slide_plan(task.payload, 5)))
    first, second, *_ = graph.ready(3)
    graph.told(Failed(first, ReadError("unreadable")))
    assert graph.ready(8) == []
    assert not graph.finished  # the others are still in flight
    graph.told(Done(second, 10))
    assert graph.ended["s"].code == "E_READ"


@pytest.mark.parametrize("blameless", [True, False])
def test_a_death_that_no_task_is_to_blame_for_is_not_counted(blameless):
    graph = RunGraph([item("s")])
    (task,) = graph.ready(4)
    for _ in range(5):
        graph.told(execute.Lost("w", (task,), "its node died", blameless=blameless))
        if graph.finished:
            break
        (task,) = graph.ready(4)
        assert task.alone is not blameless
    assert graph.finished is not blameless
    assert [e.code for e in graph.ended.values()] == ([] if blameless else ["E_QUARANTINE"])


def test_a_queue_goes_slide_by_slide_as_a_list_would():
    for seed in range(50):
        rng = random.Random(seed)
        queue, listed = Queue(), []  # the list: (slide, number), kept with each slide's together
        for number in range(60):
            slide = rng.choice("abcd")
            act = rng.choice(["add", "add", "pop", "drop", "first"])
            if act == "add":
                queue.add(Task("chunk", slide, number))
                order = list(dict.fromkeys([s for s, _ in listed] + [slide]))
                listed = sorted([*listed, (slide, number)], key=lambda one: order.index(one[0]))
            elif act == "pop" and listed:
                task = queue.pop()
                assert (task.slide_id, task.payload) == listed.pop(0)
            elif act == "drop":
                queue.drop(slide)
                listed = [one for one in listed if one[0] != slide]
            elif act == "first":
                queue.first(slide)
                listed.sort(key=lambda one: one[0] != slide)
            assert len(queue) == len(listed)


def test_a_scorer_that_raises_what_nobody_planned_for_still_answers():
    class Broken:
        def score(self, task: Task, read: object) -> None:
            raise SystemExit("no")

    outcome = inline._scored(Broken(), Task("chunk", "a", None), None)  # type: ignore[arg-type]
    assert isinstance(outcome, Failed)
    assert outcome.error.code == "E_BUG"

"""Parts of a chunk: every model once, one outcome for each task however its parts end."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from slideflow_ray.errors import NanScore
from slideflow_ray.execute import Done, Failed, Lost, Task
from slideflow_ray.execute.parts import Parts


@dataclass(frozen=True)
class FakeChunk:
    models: tuple[str, ...]


APART = [frozenset("a"), frozenset("bc")]


def chunk(models: str, slide: str = "s") -> Task:
    return Task("chunk", slide, FakeChunk(tuple(models)))


def test_each_model_is_in_one_part():
    parts = Parts(APART)
    assert [p.payload.models for p in parts.split(chunk("abc"))] == [("a",), ("b", "c")]
    assert [p.payload.models for p in parts.split(chunk("c"))] == [("c",)]


@pytest.mark.parametrize("together", [[], [frozenset("abc")] * 2])
def test_what_stands_together_is_not_split(together):
    task = chunk("abc")
    parts = Parts(together)
    assert parts.split(task) == [task]
    assert parts.join([Done(task, 3)]) == [Done(task, 3)]


def test_tasks_without_models_are_not_split():
    for task in (Task("plan", "s", None), chunk("")):
        assert Parts(APART).split(task) == [task]


def test_a_task_is_done_when_its_parts_are():
    parts, task = Parts(APART), chunk("abc")
    one, other = parts.split(task)
    assert parts.join([Done(other, 7)]) == []
    assert parts.join([Done(one, 7)]) == [Done(task, 7)]


@pytest.mark.parametrize("seed", range(20))
def test_every_task_has_exactly_one_outcome(seed):
    rng, parts = random.Random(seed), Parts(APART)
    tasks = [chunk(models, str(i)) for i, models in enumerate(["abc", "ab", "c", "abc", "b", "ac"])]
    flight = [part for task in tasks for part in parts.split(task)]
    rng.shuffle(flight)
    ended = []
    while flight:
        part = flight.pop()
        kind = rng.choice(["done", "done", "failed", "lost"])
        if kind == "done":
            found = parts.join([Done(part, 1)])
        elif kind == "failed":
            found = parts.join([Failed(part, NanScore("x"))])
        else:
            beside = [flight.pop() for _ in range(min(len(flight), rng.randrange(3)))]
            found = parts.join([Lost("w", (part, *beside), "x")])
        for outcome in found:
            ended += outcome.tasks if isinstance(outcome, Lost) else (outcome.task,)
    assert sorted(t.slide_id for t in ended) == sorted(t.slide_id for t in tasks)
    assert all(any(t is task for task in tasks) for t in ended)
    assert not parts._wholes

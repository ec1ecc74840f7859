"""Work off a graph of tasks: the same stages and the same loop over an inline or a Ray pool.

A graph hands out ready tasks and, when told of an outcome, may release more. A pool
performs them. Neither knows the other's business, so one suite tests both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from slideflow_ray.errors import SlideflowError
from slideflow_ray.pipeline import Context
from slideflow_ray.profile import ComputeProfile
from slideflow_ray.specs import ComputeSpec, ExecutorSpec

Stage = Literal["plan", "chunk", "derive"]


@dataclass(frozen=True)
class Task:
    """One call of a stage on one slide.

    `alone`: nothing else may be in flight on its worker, and its memory is limited. `fresh`: the worker must be new.
    """

    stage: Stage
    slide_id: str
    payload: Any
    alone: bool = False
    fresh: bool = False

    @property
    def loads_models(self) -> bool:
        """Whether the task needs a worker with models."""
        return self.stage == "chunk"


@dataclass(frozen=True)
class Span:
    """Who worked on a task, and from when to when, in seconds since the epoch; `read_s`: a chunk's reading before."""

    worker: str
    began: float
    ended: float
    read_s: float = 0.0


@dataclass(frozen=True)
class Done:
    """A task ended well; `value` is what its stage returned, `span` its last stretch (of a chunk: the scoring)."""

    task: Task
    value: Any
    span: Span | None = None


@dataclass(frozen=True)
class Failed:
    """A task ended with an error that belongs to its slide."""

    task: Task
    error: SlideflowError


@dataclass(frozen=True)
class Lost:
    """A worker died with these tasks in flight; `memory` where it is known that it had taken too much of it.

    `blameless`: none of the tasks had to do with it: the node died, or the worker while it came up.
    """

    worker: str
    tasks: tuple[Task, ...]
    cause: str
    memory: bool = False
    blameless: bool = False


@dataclass(frozen=True)
class Staffed:
    """The pool has another number of workers now, and no task has ended by that."""

    workers: int


Outcome = Done | Failed | Lost | Staffed


class Graph(Protocol):
    """What there is to do."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left, in flight or to come."""

    def ready(self, room: int) -> list[Task]:
        """Hand out at most `room` tasks."""

    def told(self, outcome: Outcome) -> None:
        """Learn how a task ended, and maybe release more."""


class Pool(Protocol):
    """Who does it. A pool is closed when its run ends, however it ends."""

    workers: int

    def profile(self, compute: ComputeSpec) -> ComputeProfile:
        """Return the compute profile of the machines that will score."""

    def load(self, context: Context) -> None:
        """Tell every worker the context, models included."""

    @property
    def room(self) -> int:
        """How many more tasks may be submitted now."""

    def submit(self, task: Task) -> None:
        """Take a task; it ends in exactly one outcome."""

    def wait(self) -> list[Outcome]:
        """Return the outcomes that have come in, waiting a while for one."""

    def close(self) -> None:
        """Stop the workers."""


def run(graph: Graph, pool: Pool) -> None:
    """Work the graph off.

    Raises InfrastructureError when the pool can no longer work.
    """
    while not graph.finished:
        if room := pool.room:
            for task in graph.ready(room):
                pool.submit(task)
        if not graph.finished:
            for outcome in pool.wait():
                graph.told(outcome)


def open_pool(spec: ExecutorSpec, compute: ComputeSpec) -> Pool:
    """Start the pool that `spec` names, on GPUs unless `compute` asks for the CPU, and waits for what it asks for."""
    if spec.kind == "ray":
        from slideflow_ray.execute.on_ray import RayPool

        return RayPool(spec, use_gpus=compute.device != "cpu", only_gpus=compute.device == "cuda")
    from slideflow_ray.execute.inline import InlinePool

    return InlinePool(spec)

"""The actors of a Ray pool: one that does everything on a core, a scorer on a GPU, a reader beside it."""

from __future__ import annotations

import threading
from typing import Any

import ray

from slideflow_ray.execute import Done, Failed, Task
from slideflow_ray.execute.worker import ModelScorer, Read, Reader
from slideflow_ray.pipeline import Context

PULSE: dict[str, Any] = {"concurrency_groups": {"pulse": 1}}
"""A thread of its own in every actor, so that one at work answers and one that is stopped does not."""


class Fused:
    """An actor on one core: its threads read ahead, one at a time scores."""

    def __init__(self, context: Context) -> None:
        self._reader = Reader(context)
        self._scorer = ModelScorer(context)
        self._turn = threading.Lock()

    def where(self) -> str:
        """Return the node, once alive."""
        return _node()

    def load(self) -> str:
        """Load the models; return the node. Raises ProfileError, BundleError."""
        self._scorer.load()
        return _node()

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> tuple[float, str]:
        """Return how long the longest reading has been under way, and which it is."""
        return self._reader.longest()

    def perform(self, task: Task) -> Done | Failed:
        """Do a whole task."""
        if not task.loads_models:
            return self._reader.perform(task)
        read = self._reader.read(task)
        if isinstance(read, Failed):
            return read
        with self._turn:
            self._scorer.pin()
            return self._scorer.score(task, read)


class GpuScorer:
    """An actor that owns a GPU (or a share of one) and the models on it."""

    def __init__(self, context: Context, models: frozenset[str] | None = None) -> None:
        self._scorer = ModelScorer(context, models)
        self._turn = threading.Lock()

    def where(self) -> str:
        """Return the node, once alive."""
        return _node()

    def load(self) -> str:
        """Load the models; return the node. Raises ProfileError, BundleError."""
        self._scorer.load()
        return _node()

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> tuple[float, str]:
        """Answer; scoring has no deadline."""
        return 0.0, ""

    def score(self, task: Task, read: Read | Failed) -> Done | Failed:
        """Score what a reader beside it has read."""
        if isinstance(read, Failed):
            return read
        with self._turn:
            self._scorer.pin()
            return self._scorer.score(task, read)


class RemoteReader:
    """An actor without GPU, on the node of the scorer it reads for."""

    def __init__(self, context: Context) -> None:
        self._reader = Reader(context)

    def where(self) -> str:
        """Return the node, once alive."""
        return _node()

    load = where

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> tuple[float, str]:
        """Return how long what is read has been under way, and which it is."""
        return self._reader.longest()

    def perform(self, task: Task) -> Done | Failed:
        """Do a whole task that needs no model."""
        return self._reader.perform(task)

    def read(self, task: Task) -> Read | Failed:
        """Read a chunk; the pixels stay in this node's object store."""
        return self._reader.read(task)


def _node() -> str:
    found: str = ray.get_runtime_context().get_node_id()
    return found

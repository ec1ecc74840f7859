"""What a worker does, wherever it lives: a thread, a process, an actor.

Errors become values here, once: a slide that fails is a result.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil

from slideflow_ray import pipeline, profile
from slideflow_ray.errors import BundleError, ProfileError, SlideflowError, UnexpectedError, as_slideflow_error
from slideflow_ray.execute import Done, Failed, Span, Task
from slideflow_ray.packs import Pack
from slideflow_ray.pipeline import Context, OpenSlides, Pixels, Scorer, SlidePlan

ALONE_SHARE = 0.8
"""Of the memory that is free, what a task that is tried alone may take before it meets a MemoryError."""


@dataclass(frozen=True)
class Read:
    """The pixels of a chunk, on their way from a reader to a scorer, and how long the reading took."""

    pixels: Pixels
    seconds: float


class Reader:
    """Plans, reads and derives; needs no models and no torch."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._slides = threading.local()
        self._began: dict[int, tuple[float, str]] = {}

    def longest(self) -> tuple[float, str]:
        """Return for how many seconds the longest of the tasks under way has been, and which that is."""
        now = time.monotonic()
        return max(((now - began, what) for began, what in list(self._began.values())), default=(0.0, ""))

    @contextlib.contextmanager
    def _at(self, task: Task) -> Iterator[None]:
        """Note when a task begins, and limit the memory of one that is alone."""
        self._began[threading.get_ident()] = (time.monotonic(), f"the {task.stage} of {task.slide_id}")
        try:
            with limited() if task.alone else contextlib.nullcontext():
                yield
        finally:
            self._began.pop(threading.get_ident(), None)

    @property
    def slides(self) -> OpenSlides:
        """This thread's open slides."""
        if not hasattr(self._slides, "open"):
            self._slides.open = OpenSlides()
        opened: OpenSlides = self._slides.open
        return opened

    def perform(self, task: Task) -> Done | Failed:
        """Do a whole task that needs no model."""
        if task.stage == "plan":
            plan: Callable[[Context, Any], SlidePlan] = (
                pipeline.plan_pack if isinstance(task.payload, Pack) else pipeline.plan_slide
            )
            with self._at(task):
                return attempt(task, lambda: plan(self.context, task.payload))
        with self._at(task):
            return attempt(task, lambda: pipeline.derive(self.context, task.payload))

    def read(self, task: Task) -> Read | Failed:
        """Read the chunk of a task, for a scorer."""
        began = time.monotonic()
        with self._at(task):
            outcome = attempt(task, lambda: pipeline.read_chunk(self.context, task.payload, self.slides))
        return outcome if isinstance(outcome, Failed) else Read(outcome.value, time.monotonic() - began)


class ModelScorer:
    """Scores chunks with models that it loads once each."""

    def __init__(self, context: Context, models: frozenset[str] | None = None) -> None:
        self.context = context
        self._models = frozenset(model.node for model in context.models) if models is None else models
        self._loaded: dict[str, Scorer] = {}
        self._loading = threading.Lock()

    def load(self) -> None:
        """Load the models of this place: all of the run, unless told which. Raises ProfileError, BundleError."""
        if self.context.profile is not None:
            profile.check(self.context.profile)
        for model in self.context.models:
            if model.node in self._models:
                self.scorer(model.node)

    def pin(self) -> None:
        """Give the calling thread one torch thread of its own, if there is anything to score."""
        if self.context.models:
            from slideflow_ray.models.scorer import pin_threads

            pin_threads()

    def scorer(self, node: str) -> Scorer:
        """Return the model of that node, loading it the first time."""
        from slideflow_ray.models.bundle import forward_digest
        from slideflow_ray.models.scorer import load_scorer

        with self._loading:
            if node not in self._loaded:
                model = next(m for m in self.context.models if m.node == node)
                if self.context.profile is None:
                    raise ProfileError(f"{model.name} cannot score without a compute profile.")
                loaded = load_scorer(model.spec.path, self.context.profile)
                if model.digest and (found := forward_digest(model.spec.path)) != model.digest:
                    said = f"{model.spec.path} changed after the run began, from {model.digest} to {found}."
                    raise BundleError(said, next_step="Run again: it takes the bundle as it is then.")
                self._loaded[node] = loaded
            return self._loaded[node]

    def renew(self) -> None:
        """Let go of the models and of the memory that they held, and load them again."""
        with self._loading:
            self._loaded.clear()
        gc.collect()
        if "torch" in sys.modules:
            import torch

            torch.cuda.empty_cache()
        self.load()

    def score_anew(self, task: Task, read: Read) -> Done | Failed:
        """Score the chunk of a task with models that are loaded for it."""
        renewed = attempt(task, self.renew)
        return renewed if isinstance(renewed, Failed) else self.score(task, read)

    def score(self, task: Task, read: Read) -> Done | Failed:
        """Score the chunk of a task."""
        outcome = attempt(task, lambda: pipeline.score_chunk(self.context, task.payload, read.pixels, self.scorer))
        if isinstance(outcome, Failed) or outcome.span is None:
            return outcome
        return replace(outcome, span=replace(outcome.span, read_s=read.seconds))


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Bound what this process may take beyond what it has by a share of what is free: then a MemoryError, no killer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    free = psutil.virtual_memory().available
    limit = psutil.Process().memory_info().data + int(ALONE_SHARE * free)
    most = limit if soft == resource.RLIM_INFINITY else min(soft, limit)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def attempt(task: Task, call: Any) -> Done | Failed:
    """Return Done with what `call` returns, or Failed with why it raised.

    Broad on purpose: whatever one slide raises must not end the others.
    """
    began = time.time()
    try:
        value = call()
        worker = f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}"
        return Done(task, value, Span(worker, began, time.time()))
    except SlideflowError as error:
        return Failed(task, error)
    except Exception as error:  # noqa: BLE001
        ours = as_slideflow_error(error, f"{task.stage} of {task.slide_id}")
        if isinstance(ours, UnexpectedError):
            ours = UnexpectedError(f"{ours.message}\n{traceback.format_exc()}")
        return Failed(task, ours)

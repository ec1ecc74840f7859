"""The graph of a run: slides on their way through plan, chunks and derive, with attempts and blame."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from slideflow_ray.accounting import Ended, failed
from slideflow_ray.cohort import Item
from slideflow_ray.errors import OutOfMemory, Quarantined, SlideflowError, UnexpectedError
from slideflow_ray.events import (
    ChunkScored,
    Listener,
    SlideDone,
    SlideFailed,
    SlidePlanned,
    TriedAgain,
    WorkerDied,
    WorkersChanged,
    silent,
)
from slideflow_ray.execute import Done, Failed, Lost, Outcome, Span, Staffed, Task
from slideflow_ray.packs import Pack
from slideflow_ray.pipeline import SlidePlan

LOOK_AHEAD_CHUNKS = 2
"""Chunks kept ready for each free place before another slide is planned."""
DEATHS_ALONE = 2
"""A slide that kills its worker this often while alone in it is quarantined."""


class Queue:
    """Tasks in order, slide by slide; whatever is done to it takes as long with 10 tasks as with a million."""

    def __init__(self) -> None:
        self._slides: OrderedDict[str, deque[Task]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, task: Task) -> None:
        """Add a task behind those of its slide, and of the slides that came before."""
        self._slides.setdefault(task.slide_id, deque()).append(task)
        self._count += 1

    def first(self, slide_id: str) -> None:
        """Let a slide's tasks go before the others."""
        if slide_id in self._slides:
            self._slides.move_to_end(slide_id, last=False)

    def pop(self) -> Task:
        """Take the first task. Raises StopIteration when there is none."""
        slide_id, tasks = next(iter(self._slides.items()))
        task = tasks.popleft()
        self._count -= 1
        if not tasks:
            del self._slides[slide_id]
        return task

    def drop(self, slide_id: str) -> None:
        """Forget the tasks of a slide."""
        self._count -= len(self._slides.pop(slide_id, ()))


class RunGraph:
    """Slides on their way through plan, chunks and derive, a few at a time.

    `before` are items that have ended already (refused in an earlier run); `note` is
    told how each of the others ends, before anyone else.
    """

    def __init__(
        self,
        items: Iterable[Item | Pack],
        before: Mapping[str, Ended] | None = None,
        listen: Listener = silent,
        note: Callable[[Ended], None] = lambda ended: None,
    ) -> None:
        self.ended: dict[str, Ended] = dict(before or {})
        self._items = deque(item for item in items if item.slide_id not in self.ended)
        self._listen = listen
        self._note = note
        self._again = Queue()
        self._chunks = Queue()
        self._plans: dict[str, SlidePlan] = {}
        self._left: Counter[str] = Counter()
        self._flight = 0
        self._planning = 0
        self._deaths: Counter[str] = Counter()
        self._starved: set[tuple[Any, ...]] = set()
        self._derived: set[str] = set()
        self.changed = False

    @property
    def finished(self) -> bool:
        """Whether every item has ended."""
        return not (self._items or self._again or self._chunks or self._plans or self._flight)

    def ready(self, room: int) -> list[Task]:
        """Hand out tasks: what must be repeated, then chunks, planning slides ahead of them."""
        tasks: list[Task] = []
        while len(tasks) < room and (task := self._next(room)):
            self._flight += 1
            self._planning += task.stage == "plan"
            tasks.append(task)
        return tasks

    def _next(self, room: int) -> Task | None:
        if self._again:
            return self._again.pop()
        hungry = len(self._chunks) < LOOK_AHEAD_CHUNKS * room and self._planning < max(1, room // 2)
        if self._items and hungry:
            item = self._items.popleft()
            return Task("plan", item.slide_id, item)
        return self._chunks.pop() if self._chunks else None

    def told(self, outcome: Outcome) -> None:
        """Learn how a task ended, or how many workers there are."""
        if isinstance(outcome, Staffed):
            self._listen(WorkersChanged(outcome.workers))
            return
        for task in outcome.tasks if isinstance(outcome, Lost) else (outcome.task,):
            self._flight -= 1
            self._planning -= task.stage == "plan"
        if isinstance(outcome, Lost):
            self._lost(outcome)
        elif outcome.task.slide_id not in self.ended:  # a failed slide's other chunks may still come in
            if isinstance(outcome, Failed):
                self._failed(outcome)
            else:
                self._done(outcome)

    def _done(self, done: Done) -> None:
        slide_id = done.task.slide_id
        if done.task.stage == "plan":
            self._planned(done.value)
        elif done.task.stage == "chunk":
            self.changed = True
            chunk, span = done.task.payload, done.span or Span("", 0.0, 0.0)
            when = (span.began, span.ended, span.read_s)
            self._listen(ChunkScored(slide_id, chunk.index, done.value, chunk.models, span.worker, *when))
            self._left[slide_id] -= 1
            self._derive_if_whole(slide_id)
        elif self._plans[slide_id].again:  # objects are known now, and with them further grids
            self._derived.add(slide_id)
            del self._plans[slide_id], self._left[slide_id]
            self._again.add(Task("plan", slide_id, done.task.payload.item))
        else:
            self.changed |= done.value == "scored"
            self._end(Ended(slide_id, "done", done.value, **_facts(self._plans[slide_id])))

    def _planned(self, plan: SlidePlan) -> None:
        slide_id, todo = plan.item.slide_id, plan.todo
        chunks = sum(grid.chunks for grid in plan.grids)
        left = sum(chunk.tiles for chunk in todo)
        self._listen(SlidePlanned(slide_id, plan.tiles, chunks, len(todo), left, plan.why))
        self._plans[slide_id] = plan
        if plan.complete and plan.tiles and slide_id not in self._derived:
            self._end(Ended(slide_id, "done", "unchanged", **_facts(plan)))
            return
        if plan.again and slide_id in self._derived:
            self._fail(slide_id, UnexpectedError(f"{slide_id}: objects were derived and are still not there."))
            return
        self._left[slide_id] = len(todo)
        for chunk in todo:
            self._chunks.add(Task("chunk", slide_id, chunk))
        if slide_id in self._derived:  # nearly done: it goes first
            self._chunks.first(slide_id)
        self._derive_if_whole(slide_id)

    def _derive_if_whole(self, slide_id: str) -> None:
        if self._left[slide_id] == 0:
            self._again.add(Task("derive", slide_id, self._plans[slide_id]))

    def _failed(self, outcome: Failed) -> None:
        """End the slide; what found no memory is tried once more, alone on a fresh worker, with the same geometry."""
        task, error = outcome.task, outcome.error
        key = (task.stage, task.slide_id, getattr(task.payload, "grid", ""), getattr(task.payload, "index", -1))
        if not isinstance(error, OutOfMemory) or key in self._starved:
            self._fail(task.slide_id, error)
            return
        self._starved.add(key)
        self._listen(TriedAgain(task.slide_id, error.code, error.message))
        self._again.add(Task(task.stage, task.slide_id, task.payload, alone=True, fresh=True))

    def _fail(self, slide_id: str, error: SlideflowError) -> None:
        self._end(failed(slide_id, error))

    def _end(self, ended: Ended) -> None:
        slide_id = ended.slide_id
        self._note(ended)
        self.ended[slide_id] = ended
        self._plans.pop(slide_id, None)
        self._left.pop(slide_id, None)
        self._chunks.drop(slide_id)
        self._again.drop(slide_id)
        if ended.status == "done":
            self._listen(SlideDone(slide_id, ended.outcome, ended.tiles))
        else:
            self._listen(SlideFailed(slide_id, ended.code, ended.message, ended.status == "refused"))

    def _lost(self, lost: Lost) -> None:
        """Repeat what a dead worker held, each task alone; a slide that dies twice alone is quarantined.

        Where no task is to blame (a node died), nothing is counted against any.
        """
        slides = tuple(dict.fromkeys(task.slide_id for task in lost.tasks))
        self._listen(WorkerDied(lost.worker, slides, lost.cause))
        alone = len(lost.tasks) == 1
        for task in lost.tasks:
            if task.slide_id in self.ended:
                continue
            if lost.blameless:
                self._again.add(task)
                continue
            self._deaths[task.slide_id] += alone
            if self._deaths[task.slide_id] >= DEATHS_ALONE:
                cause = f"{task.slide_id} killed its worker {DEATHS_ALONE} times while alone in it ({lost.cause})."
                self._fail(task.slide_id, OutOfMemory(cause) if lost.memory else Quarantined(cause))
            else:
                self._again.add(Task(task.stage, task.slide_id, task.payload, alone=True))


def _facts(plan: SlidePlan) -> dict[str, Any]:
    grids = tuple((grid.grid, model) for grid in plan.grids for model in grid.models)
    laid = tuple(grid.grid for grid in plan.grids)
    return {
        "tiles": plan.tiles,
        "identity": plan.identity,
        "laid": laid,
        "grids": grids,
        "why": plan.why,
        "nodes": plan.nodes,
    }

"""Models that have a GPU each: a chunk is read once and scored in parts, one for each scorer; its outcome is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slideflow_ray.execute import Done, Failed, Lost, Outcome, Staffed, Task


@dataclass
class Whole:
    """A task that was handed out in parts; `pixels` is what its parts share."""

    task: Task
    left: int
    closed: bool = False
    done: list[Done] = field(default_factory=list)
    pixels: Any = None


class Parts:
    """Splits chunks by which models stand together, and joins the outcomes of their parts.

    `together` names, for each place, the models that it has loaded; empty where every place has all.
    """

    def __init__(self, together: Sequence[frozenset[str]] = ()) -> None:
        self._together = tuple(dict.fromkeys(together))
        self._wholes: dict[int, tuple[Task, Whole]] = {}

    def split(self, task: Task) -> list[Task]:
        """Return the parts of a task: itself, unless its models stand in several places."""
        if not task.loads_models or not task.payload.models or len(self._together) < 2:
            return [task]
        several = [tuple(m for m in task.payload.models if m in models) for models in self._together]
        parts = [replace(task, payload=replace(task.payload, models=models)) for models in several if models]
        whole = Whole(task, len(parts))
        for part in parts:
            self._wholes[id(part)] = (part, whole)  # the part is kept, so that its id stays its own
        return parts

    def whole(self, part: Task) -> Whole | None:
        """Return what a part belongs to, None where it is whole itself."""
        found = self._wholes.get(id(part))
        return found[1] if found else None

    def join(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """Return the outcomes of whole tasks that are known now: one of each, done when every part is."""
        joined: list[Outcome] = []
        for outcome in outcomes:
            if isinstance(outcome, Lost):
                tasks = tuple(task for part in outcome.tasks if (task := self._close(part)) is not None)
                joined.append(replace(outcome, tasks=tasks))
            elif isinstance(outcome, Staffed):
                joined.append(outcome)
            elif (known := self._joined(outcome)) is not None:
                joined.append(known)
        return joined

    def _joined(self, outcome: Done | Failed) -> Outcome | None:
        whole = self.whole(outcome.task)
        if whole is None:
            return outcome
        if isinstance(outcome, Failed):
            task = self._close(outcome.task)
            return None if task is None else Failed(task, outcome.error)
        self._wholes.pop(id(outcome.task))
        whole.done.append(outcome)
        if whole.closed or len(whole.done) < whole.left:
            return None
        return Done(whole.task, outcome.value, outcome.span)

    def _close(self, part: Task) -> Task | None:
        """Return the task that a part ends, None where another part has ended it already."""
        whole = self.whole(part)
        if whole is None:
            return part
        self._wholes.pop(id(part))
        if whole.closed:
            return None
        whole.closed = True
        return whole.task

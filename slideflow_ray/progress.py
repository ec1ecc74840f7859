"""Progress of a run on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from slideflow_ray.events import (
    ChunkScored,
    EpochTrained,
    Event,
    Noted,
    RunFinished,
    RunStarted,
    SlideDone,
    SlideFailed,
    SlidePlanned,
    TriedAgain,
    VersionChosen,
    WorkerDied,
    WorkersChanged,
)

LINE_EVERY_S = 10.0


class RunProgress:
    """Counts what a run says. Rate and time left come from tiles really scored in this run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._begin(0, "scored")

    def _begin(self, slides: int, verb: str) -> None:
        """Count from zero: one listener may hear several runs."""
        self.slides, self.verb, self.workers = slides, verb, 0
        self.ended = self.tiles_known = self.tiles_done = self.planned = 0
        self._again: Counter[str] = Counter()
        self._start = self._said = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Listen to one event."""
        match event:
            case RunStarted():
                self._begin(event.slides, "scored" if event.models else "stored")
                self._announce(event)
            case SlidePlanned():
                if not self.planned:  # the rate leaves the start-up of workers out
                    self._start = time.monotonic()
                self.planned += 1
                self.tiles_known += event.tiles_todo
                self._say_why(event)
            case ChunkScored():
                self.tiles_done += event.tiles
            case SlideDone():
                self.ended += 1
            case SlideFailed():
                self.ended += 1
                word = "refused" if event.refused else "failed"
                self.say(f"{event.slide_id} {word}: {event.code} {event.message.splitlines()[0]}")
            case WorkersChanged():
                self._recount(event.workers)
            case EpochTrained() | VersionChosen() | Noted() | TriedAgain() | WorkerDied():
                self.say(_line(event))
            case RunFinished():
                self._finish(event)
                return
        self._show()

    def _announce(self, event: RunStarted) -> None:
        what = f"with {', '.join(event.models)}" if event.models else "without a model (tiles only)"
        self.workers = event.workers
        self.say(f"{event.slides} slides {what}, {event.executor}, {event.workers} workers")
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[rate]}"), console=self.console, transient=True)
            self._bar.add_task("slides", total=event.slides, rate="")
            self._bar.start()

    def _recount(self, workers: int) -> None:
        """Say how many workers there are where some joined or left; that those announced have come up is no news."""
        if workers != self.workers:
            went = "more have joined" if workers > self.workers else "some have left, or are not up yet"
            self.say(f"{workers} workers instead of {self.workers}: {went}")
        self.workers = workers

    def _say_why(self, event: SlidePlanned) -> None:
        """Say why a slide is scored again; a reason that others share is said once, and counted."""
        reason = "; ".join(event.why)
        if not reason:
            return
        self._again[reason] += 1
        if self._again[reason] == 1:
            self.say(f"{event.slide_id} is scored again: {reason}")

    def _finish(self, event: RunFinished) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
        for reason, slides in self._again.items():
            if slides > 1:
                self.say(f"{slides} slides were scored again: {reason}")
        parts = f"done {event.done}, failed {event.failed}, refused {event.refused}"
        self.say(f"{parts} in {event.seconds:.1f} s; {self.tiles_done} tiles {self.verb}")
        self.slides = 0  # what is heard from here on, as a training's epochs, is no run's progress

    def say(self, line: str) -> None:
        """Print one line, above the bar where there is one."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show(self) -> None:
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.ended, rate=self.rate())
        elif self.slides and not self.console.is_terminal and time.monotonic() - self._said > LINE_EVERY_S:
            self._said = time.monotonic()
            self.say("; ".join(filter(None, [f"{self.ended} of {self.slides} slides", self.rate()])))

    def rate(self) -> str:
        """Tiles per second and an estimate of the time left, from the slides planned so far."""
        if not self.tiles_done:
            return ""
        per_second = self.tiles_done / (time.monotonic() - self._start)
        text = f"{self.tiles_done} tiles, {per_second:.0f} tiles/s"
        if self.planned:
            total = self.tiles_known / self.planned * self.slides
            left = max(0.0, total - self.tiles_done) / per_second
            text += f", about {_clock(left)} left"
        return text


def _line(event: EpochTrained | VersionChosen | Noted | TriedAgain | WorkerDied) -> str:
    if isinstance(event, Noted):
        return event.text
    if isinstance(event, WorkerDied):
        return f"{event.worker} died ({event.cause}); its tasks are tried again: {', '.join(event.slides)}"
    if isinstance(event, TriedAgain):
        return f"{event.slide_id}: {event.code} {event.message.splitlines()[0]} Tried again alone on a fresh worker."
    if isinstance(event, VersionChosen):
        return f"{event.model}: version {event.digest}, in service since {event.since}"
    line = f"epoch {event.epoch} of {event.epochs}: train loss {event.train_loss:.4f}"
    if event.val_loss is not None and event.val_dice is not None:
        line += f", val loss {event.val_loss:.4f}, val mean Dice {event.val_dice:.4f}"
    elif event.val_loss is not None and event.val_auc is not None:
        auc = "undefined" if math.isnan(event.val_auc) else f"{event.val_auc:.4f}"
        line += f", val loss {event.val_loss:.4f}, val AUC {auc}"
    elif event.val_loss is not None:
        line += f", val loss {event.val_loss:.4f}"
    return line


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def to_stderr() -> RunProgress:
    """Return a listener that writes to standard error."""
    return RunProgress(Console(stderr=True, file=sys.stderr))

"""What a run says, for machines: JSON lines in a log, and figures that Prometheus collects through Ray.

Both are listeners on the run's events. The figures exist where Ray is initialised; each node of the cluster serves
them on its metrics port (`ray start --metrics-export-port`), with the driver's among its own node's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slideflow_ray.errors import ConfigError
from slideflow_ray.events import (
    ChunkScored,
    Event,
    Listener,
    RunFinished,
    RunStarted,
    SlideDone,
    SlideFailed,
    SlidePlanned,
    WorkerDied,
    WorkersChanged,
)
from slideflow_ray.exits import EXIT_FAILURES, EXIT_OK

LOG_ENV = "SLIDEFLOW_RAY_LOG"
SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
"""Bounds of the histograms of seconds: a factor of about three from one to the next."""
WINDOW_S = 60.0
"""The share of time that scorers are busy is over the last minute."""
MOST_LINES = 6
"""Lines of grouped failures: Ray shows a failed job's last ten."""
METRICS = {
    "slideflow_ray_tiles": ("counter", "Tiles scored", ()),
    "slideflow_ray_slides": ("counter", "Slides that ended, by status", ("status",)),
    "slideflow_ray_failures": ("counter", "Slides that failed or were refused, by code", ("code",)),
    "slideflow_ray_worker_deaths": ("counter", "Workers lost", ()),
    "slideflow_ray_read_seconds": ("histogram", "Seconds of reading a chunk", ()),
    "slideflow_ray_forward_seconds": ("histogram", "Seconds of scoring a chunk and writing its results", ()),
    "slideflow_ray_reading_seconds": ("counter", "Seconds that readers read chunks", ()),
    "slideflow_ray_scoring_seconds": ("counter", "Seconds that scorers scored chunks", ()),
    "slideflow_ray_chunks_waiting": ("gauge", "Chunks of planned slides that are not scored yet: the queue", ()),
    "slideflow_ray_slides_left": ("gauge", "Slides of the run that have not ended", ()),
    "slideflow_ray_workers": ("gauge", "Scorers of the run", ()),
    "slideflow_ray_busy_share": ("gauge", "Share of the last minute in which scorers scored", ()),
}
"""Name: kind, what it is, tags beside `run`. Ray exports a counter as NAME_total.

The sum of a histogram is made of the middles of its bins in Ray's export, so seconds are counted beside them.
"""


# several listeners


def together(*listeners: Listener) -> Listener:
    """Return one listener that tells several."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


@contextlib.contextmanager
def observed(listen: Listener, log: Path | None = None, run: str = "") -> Iterator[Listener]:
    """Give a listener that tells `listen`, Ray's metrics, and the log where one is named (else by SLIDEFLOW_RAY_LOG).

    `run` names the run in both. Raises ConfigError when the log cannot be written.
    """
    run = run or uuid.uuid4().hex[:12]
    named = log or (Path(found) if (found := os.environ.get(LOG_ENV)) else None)
    listeners: list[Listener] = [listen, Metrics(run)]
    logged = LogLines(named, run) if named else None
    try:
        yield together(*listeners, *([logged] if logged else []))
    finally:
        if logged:
            logged.close()


# the log


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, and the fields of what happened."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        said = {"time": when, "level": record.levelname, "event": record.getMessage(), **getattr(record, "fields", {})}
        return json.dumps(said, default=str)


class LogLines:
    """Writes each event as a line of JSON with the run's id: slide_id, chunk, code, seconds, as the event has them."""

    def __init__(self, path: Path, run: str) -> None:
        self.run = run
        self._logger = logging.Logger("slideflow_ray.run")  # of its own: the root's handlers are the user's
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handler = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be the log: {error}.") from error
        self._handler.setFormatter(JsonLines())
        self._logger.addHandler(self._handler)

    def __call__(self, event: Event) -> None:
        """Write one event."""
        level = logging.WARNING if isinstance(event, SlideFailed | WorkerDied) else logging.INFO
        fields: dict[str, Any] = {"run": self.run, **asdict(event)}
        if isinstance(event, ChunkScored):
            fields["forward_s"] = event.ended - event.began
        self._logger.log(level, type(event).__name__, extra={"fields": fields})

    def close(self) -> None:
        """Close the file."""
        self._logger.removeHandler(self._handler)
        self._handler.close()


# failures


def grouped(failures: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each code of (code, slide_id), the most frequent first; [] without failures.

    They are for the end of a job's output: Ray shows a failed job's last ten lines as its message.
    """
    by_code: dict[str, list[str]] = {}
    for code, slide_id in failures:
        by_code.setdefault(code, []).append(slide_id)
    ordered = sorted(by_code.items(), key=lambda found: (-len(found[1]), found[0]))
    lines = [f"{len(slides):>6} x {code}: {_some(slides)}" for code, slides in ordered[:MOST_LINES]]
    if rest := sum(len(slides) for _, slides in ordered[MOST_LINES:]):
        lines.append(f"{rest:>6} x other codes")
    total = sum(map(len, by_code.values()))
    return [f"failures by code ({total} slides):", *lines] if lines else []


def say_failures(failures: Iterable[tuple[str, str]]) -> int:
    """Write failures by code to standard error, as the last that a job says; return the exit code that they make."""
    lines = grouped(failures)
    sys.stdout.flush()  # what was said before stands before
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    return EXIT_FAILURES if lines else EXIT_OK


def _some(slides: list[str], most: int = 5) -> str:
    return ", ".join(slides[:most]) + (f" and {len(slides) - most} more" if len(slides) > most else "")


# metrics


class Metrics:
    """Counts events into Ray's metrics, where Ray is initialised; elsewhere it only listens."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._made: dict[str, Any] = {}
        self._todo: Counter[str] = Counter()
        self._spans: list[tuple[float, float]] = []
        self._left = self._waiting = self._workers = 0

    def __call__(self, event: Event) -> None:
        """Listen to one event."""
        if not _ray_is_up():
            return
        match event:
            case RunStarted():
                self._left, self._waiting, self._workers = event.slides, 0, event.workers
                self._set("slideflow_ray_workers", event.workers)
            case WorkersChanged():
                self._workers = event.workers
                self._set("slideflow_ray_workers", event.workers)
            case SlidePlanned():
                self._todo[event.slide_id] += event.chunks_todo
                self._waiting += event.chunks_todo
            case ChunkScored():
                self._scored(event)
            case SlideDone():
                self._ended(event.slide_id, "done")
            case SlideFailed():
                self._ended(event.slide_id, "refused" if event.refused else "failed")
                self._metric("slideflow_ray_failures").inc(1, {"run": self.run, "code": event.code})
            case WorkerDied():
                self._metric("slideflow_ray_worker_deaths").inc(1, {"run": self.run})
            case RunFinished():
                self._set("slideflow_ray_busy_share", 0.0)
                self._set("slideflow_ray_workers", 0)
        self._set("slideflow_ray_chunks_waiting", self._waiting)
        self._set("slideflow_ray_slides_left", self._left)

    def _scored(self, event: ChunkScored) -> None:
        tags = {"run": self.run}
        self._todo[event.slide_id] -= 1
        self._waiting -= 1
        self._metric("slideflow_ray_tiles").inc(event.tiles, tags)
        if event.ended:
            for name, seconds in (("read", event.read_s), ("forward", event.ended - event.began)):
                self._metric(f"slideflow_ray_{name}_seconds").observe(seconds, tags)
            self._metric("slideflow_ray_reading_seconds").inc(event.read_s, tags)
            self._metric("slideflow_ray_scoring_seconds").inc(event.ended - event.began, tags)
            self._set("slideflow_ray_busy_share", self._busy(event))

    def _busy(self, event: ChunkScored) -> float:
        """Share of the last WINDOW_S that the scorers scored, by the clock of those who did."""
        self._spans.append((event.began, event.ended))
        first = event.ended - WINDOW_S
        self._spans = [span for span in self._spans if span[1] > first]
        since = max(first, min(began for began, _ in self._spans))
        scored = sum(ended - max(began, since) for began, ended in self._spans)
        return min(1.0, scored / max(1e-9, (event.ended - since) * max(1, self._workers)))

    def _ended(self, slide_id: str, status: str) -> None:
        self._left -= 1
        self._waiting -= self._todo.pop(slide_id, 0)
        self._metric("slideflow_ray_slides").inc(1, {"run": self.run, "status": status})

    def _set(self, name: str, value: float) -> None:
        self._metric(name).set(float(value), {"run": self.run})

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            from ray.util.metrics import Counter as RayCounter
            from ray.util.metrics import Gauge, Histogram

            kind, text, tags = METRICS[name]
            keys = ("run", *tags)
            if kind == "histogram":
                self._made[name] = Histogram(name, description=text, boundaries=SECONDS, tag_keys=keys)
            else:
                self._made[name] = (RayCounter if kind == "counter" else Gauge)(name, description=text, tag_keys=keys)
        return self._made[name]


def _ray_is_up() -> bool:
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())

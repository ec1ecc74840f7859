"""The pool of one machine: reader processes that may die, scorer threads; no Ray start-up.

Each reader process holds one task at a time, so a death names its slide. A scorer is
a thread with one torch thread of its own: as many scorers as cores give the same
bytes as one, faster than one scorer with as many torch threads.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from slideflow_ray.errors import InfrastructureError
from slideflow_ray.execute import Done, Failed, Lost, Outcome, Task
from slideflow_ray.execute.worker import ModelScorer, Reader
from slideflow_ray.pipeline import Context, Pixels
from slideflow_ray.profile import ComputeProfile, resolve
from slideflow_ray.specs import ComputeSpec, ExecutorSpec

MAX_STARTS_PER_READER = 8
_SPAWN = multiprocessing.get_context("spawn")


def cores() -> int:
    """Return the cores this process may use, which in a container or under Slurm is less than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ReaderProcess:
    """A process that reads for us, and the task that it holds."""

    def __init__(self, context: Context) -> None:
        ours, theirs = _SPAWN.Pipe()
        self.pipe: Connection = ours
        self.process: SpawnProcess = _SPAWN.Process(target=_serve, args=(theirs, context), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        """Send a task; the process must be idle. Raises OSError when it is dead."""
        self.pipe.send(task)
        self.task = task

    def take(self) -> tuple[Task, Done | Failed | Pixels]:
        """Receive what became of the task. Raises EOFError or OSError when the process is dead."""
        answer = self.pipe.recv()
        task, self.task = self.task, None
        if task is None:
            raise InfrastructureError("A reader answered without a task.")
        return task, answer

    def stop(self) -> None:
        """End the process now."""
        self.pipe.close()
        self.process.terminate()
        self.process.join(timeout=5)


def _serve(pipe: Connection, context: Context) -> None:
    """Answer tasks until the other end closes; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reader = Reader(context)
    while True:
        try:
            task: Task = pipe.recv()
        except (EOFError, OSError):
            return
        answer = reader.read(task) if task.stage == "chunk" else reader.perform(task)
        try:
            pipe.send(answer)
        except (BrokenPipeError, OSError):
            return


class InlinePool:
    """`spec.workers` scorer threads and as many reader processes (0: one for each core)."""

    def __init__(self, spec: ExecutorSpec) -> None:
        self.workers = spec.workers or cores()
        self._readers: list[ReaderProcess] = []
        self._starts = 0
        self._waiting: deque[Task] = deque()
        self._to_score: queue.SimpleQueue[tuple[Task, Pixels] | None] = queue.SimpleQueue()
        self._scoring = 0
        self._scored: queue.SimpleQueue[Done | Failed] = queue.SimpleQueue()
        self._wake_r, self._wake_w = _SPAWN.Pipe(duplex=False)
        self._threads: list[threading.Thread] = []
        self._context: Context | None = None

    def profile(self, compute: ComputeSpec) -> ComputeProfile:
        """Return this machine's compute profile."""
        return resolve(compute)

    def load(self, context: Context) -> None:
        """Start the readers; the models are loaded when the first chunk comes, so a run with nothing to do is quick."""
        self._context = context
        self._readers = [self._start_reader() for _ in range(self.workers)]

    def _start_scorers(self, context: Context) -> None:
        scorer = ModelScorer(context)
        scorer.load()
        self._threads = [threading.Thread(target=self._score_all, args=(scorer,), daemon=True) for _ in self._readers]
        for thread in self._threads:
            thread.start()

    def _start_reader(self) -> ReaderProcess:
        self._starts += 1
        if self._starts > MAX_STARTS_PER_READER * self.workers:
            raise InfrastructureError(f"Reader processes died {self._starts - self.workers} times; giving up.")
        if self._context is None:
            raise InfrastructureError("The pool is not loaded.")
        return ReaderProcess(self._context)

    def _score_all(self, scorer: ModelScorer) -> None:
        scorer.pin()
        while (work := self._to_score.get()) is not None:
            self._scored.put(scorer.score(*work))
            self._wake_w.send_bytes(b"x")

    @property
    def room(self) -> int:
        """A window that keeps every reader and scorer busy and bounds the pixels in memory."""
        busy = sum(reader.task is not None for reader in self._readers)
        return max(0, 2 * self.workers - busy - len(self._waiting) - max(0, self._scoring - self.workers))

    def submit(self, task: Task) -> None:
        """Take a task. Raises ProfileError or BundleError when it is the first chunk and a model does not load."""
        self._waiting.append(task)
        self._dispatch()
        if task.loads_models and not self._threads and self._context is not None:
            self._start_scorers(self._context)  # the readers are at work meanwhile

    def _dispatch(self) -> None:
        for index, reader in enumerate(self._readers):
            while reader.task is None and self._waiting and self._scoring <= 2 * self.workers:
                try:
                    reader.give(self._waiting[0])
                    self._waiting.popleft()
                except OSError:  # it died while idle, which is nobody's fault
                    self._replace(index)
                    reader = self._readers[index]

    def wait(self) -> list[Outcome]:
        """Return outcomes as readers answer, die, or chunks get scored."""
        outcomes: list[Outcome] = []
        while not outcomes:
            self._dispatch()
            pipes: list[Connection] = [r.pipe for r in self._readers if r.task is not None]
            if not pipes and not self._scoring:
                raise InfrastructureError("Nothing is in flight and nothing can be given out.")
            for pipe in wait([*pipes, self._wake_r]):
                if pipe is self._wake_r:
                    self._wake_r.recv_bytes()
                    self._scoring -= 1
                    outcomes.append(self._scored.get())
                else:
                    outcomes += self._answer(next(i for i, r in enumerate(self._readers) if r.pipe is pipe))
        self._dispatch()
        return outcomes

    def _answer(self, index: int) -> list[Outcome]:
        reader = self._readers[index]
        try:
            task, answer = reader.take()
        except (EOFError, OSError):
            return [self._replace(index)]
        self._starts = self.workers  # only deaths in a row are counted against it
        if isinstance(answer, Done | Failed):
            return [answer]
        self._scoring += 1
        self._to_score.put((task, answer))
        return []

    def _replace(self, index: int) -> Lost:
        reader = self._readers[index]
        reader.process.join(timeout=5)
        cause = f"exit code {reader.process.exitcode}"
        lost = Lost(f"reader {reader.process.pid}", (reader.task,) if reader.task else (), cause)
        reader.stop()
        self._readers[index] = self._start_reader()
        return lost

    def close(self) -> None:
        """End readers and scorers; chunks already given to a scorer are finished first."""
        for _ in self._threads:
            self._to_score.put(None)
        for reader in self._readers:
            reader.stop()
        for thread in self._threads:
            thread.join(timeout=60)
        self._wake_r.close()
        self._wake_w.close()

"""The pool of one machine: reader processes that may die, scorer threads; no Ray start-up.

Each reader process holds one task at a time, so a death names its slide. A scorer is
a thread with one torch thread of its own: as many scorers as cores give the same
bytes as one, faster than one scorer with as many torch threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import psutil

from slideflow_ray import processes, storage
from slideflow_ray.errors import InfrastructureError, as_slideflow_error
from slideflow_ray.execute import Done, Failed, Lost, Outcome, Task
from slideflow_ray.execute.worker import ModelScorer, Read, Reader
from slideflow_ray.pipeline import Context
from slideflow_ray.profile import ComputeProfile, resolve
from slideflow_ray.specs import ComputeSpec, ExecutorSpec

MAX_STARTS_PER_READER = 8
START_S = 300.0
"""How long a reader may take to start before it counts as hung; its task's deadline begins then."""
TICK_S = 1.0
"""How often the readers are looked at."""


def cores() -> int:
    """Return the cores this process may use, which in a container or under Slurm is less than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ReaderProcess:
    """A process that reads for us, and the task that it holds."""

    def __init__(self, context: Context) -> None:
        ours, theirs = multiprocessing.Pipe()
        self.pipe: Connection = ours
        self.process = processes.start(_serve, theirs, context)
        theirs.close()
        self.task: Task | None = None
        self.used = self.ready = False
        self.cause = ""
        self._at_work_s = self._stopped_s = 0.0

    def give(self, task: Task) -> None:
        """Send a task; the process must be idle. Raises OSError when it is dead."""
        self._at_work_s = 0.0
        self.pipe.send(task)
        self.task, self.used = task, True

    def look(self, passed_s: float, deadline_s: float, silence_s: float) -> None:
        """Kill the process when its task is overdue, or when it was stopped for too long; `passed_s` since the last."""
        task, stopped = self.task, _is_stopped(self.process)
        self._at_work_s = self._at_work_s + passed_s if task else 0.0
        self._stopped_s = self._stopped_s + passed_s if stopped else 0.0
        if silence_s and self._stopped_s > silence_s:
            self.cause = f"it was stopped for {silence_s:g} s"
        elif task and not self.ready and self._at_work_s > START_S:
            self.cause = f"it had not started after {START_S:g} s"
        elif task and self.ready and deadline_s and self._at_work_s > deadline_s:
            self.cause = f"the {task.stage} of {task.slide_id} had not ended after {deadline_s:g} s"
        if self.cause:
            self.process.kill()

    def take(self) -> tuple[Task, Done | Failed | Read] | None:
        """Receive what became of the task, None where the process says that it has started.

        Raises EOFError or OSError when it is dead.
        """
        answer = self.pipe.recv()
        if answer is None:
            self.ready, self._at_work_s = True, 0.0
            return None
        task, self.task = self.task, None
        if task is None:
            raise InfrastructureError("A reader answered without a task.")
        return task, answer

    def stop(self) -> None:
        """End the process now, also one that is stopped."""
        self.pipe.close()
        self.process.kill()
        self.process.join(timeout=5)


def _is_stopped(process: BaseProcess) -> bool:
    try:
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _serve(pipe: Connection, context: Context) -> None:
    """Answer tasks until the other end closes; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reader = Reader(context)
    with contextlib.suppress(BrokenPipeError, OSError):
        pipe.send(None)
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
        self._spec = spec
        self._readers: list[ReaderProcess] = []
        self._starts = 0
        self._last_cause = ""
        self._waiting: deque[Task] = deque()
        self._to_score: queue.SimpleQueue[tuple[Task, Read] | None] = queue.SimpleQueue()
        self._read: deque[tuple[Task, Read]] = deque()
        self._given: list[Task] = []
        self._scoring = 0
        self._scored: queue.SimpleQueue[Done | Failed] = queue.SimpleQueue()
        self._wake_r, self._wake_w = multiprocessing.Pipe(duplex=False)
        self._threads: list[threading.Thread] = []
        self._context: Context | None = None
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def profile(self, compute: ComputeSpec) -> ComputeProfile:
        """Return this machine's compute profile."""
        return resolve(compute)

    def load(self, context: Context) -> None:
        """Start the readers; the models are loaded when the first chunk comes, so a run with nothing to do is quick."""
        self._context = context
        self._readers = [self._start_reader() for _ in range(self.workers)]
        self._watch.start()

    def _look(self) -> None:
        """Look after the readers; time in which this process itself was stopped does not count against them."""
        deadline_s, silence_s = self._spec.task_deadline_s, self._spec.silence_s
        last = time.monotonic()
        while not self._closing.wait(TICK_S):
            now = time.monotonic()
            for reader in list(self._readers):
                reader.look(min(now - last, 2 * TICK_S), deadline_s, silence_s)
            last = now

    def _start_scorers(self, context: Context) -> None:
        scorer = ModelScorer(context)
        with _loading(context):
            scorer.load()
        self._threads = [threading.Thread(target=self._score_all, args=(scorer,), daemon=True) for _ in self._readers]
        for thread in self._threads:
            thread.start()

    def _start_reader(self) -> ReaderProcess:
        self._starts += 1
        if self._starts > MAX_STARTS_PER_READER * self.workers:
            died = self._starts - self.workers
            raise InfrastructureError(f"Reader processes died {died} times ({self._last_cause}); giving up.")
        if self._context is None:
            raise InfrastructureError("The pool is not loaded.")
        return ReaderProcess(self._context)

    def _score_all(self, scorer: ModelScorer) -> None:
        scorer.pin()
        while (work := self._to_score.get()) is not None:
            self._scored.put(_scored(scorer, *work))
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
                if self._waiting[0].fresh and reader.used:
                    self._replace(index)
                    reader = self._readers[index]
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
                    outcome = self._scored.get()
                    self._given.remove(outcome.task)
                    outcomes.append(outcome)
                    self._feed()
                else:
                    outcomes += self._answer(next(i for i, r in enumerate(self._readers) if r.pipe is pipe))
        self._dispatch()
        return outcomes

    def _answer(self, index: int) -> list[Outcome]:
        reader = self._readers[index]
        try:
            taken = reader.take()
        except (EOFError, OSError):
            return [self._replace(index)]
        if taken is None:
            return []
        task, answer = taken
        self._starts = self.workers  # only deaths in a row are counted against it
        if isinstance(answer, Done | Failed):
            return [answer]
        self._scoring += 1
        self._read.append((task, answer))
        self._feed()
        return []

    def _feed(self) -> None:
        """Give the scorers what is read; a task that wants fresh models waits until nothing else is scored."""
        while self._read and not any(task.fresh for task in self._given):
            if self._read[0][0].fresh and self._given:
                return
            task, read = self._read.popleft()
            self._given.append(task)
            self._to_score.put((task, read))

    def _replace(self, index: int) -> Lost:
        reader = self._readers[index]
        if reader.task is None:
            reader.process.kill()
        reader.process.join(timeout=5)
        cause = reader.cause or _how(reader.process.exitcode or 0)
        lost = Lost(f"reader {reader.process.pid}", (reader.task,) if reader.task else (), cause)
        reader.stop()
        self._last_cause = cause
        self._readers[index] = self._start_reader()
        return lost

    def close(self) -> None:
        """End readers and scorers; chunks already given to a scorer are finished first."""
        self._closing.set()
        for _ in self._threads:
            self._to_score.put(None)
        for reader in self._readers:
            reader.stop()
        for thread in self._threads:
            thread.join(timeout=60)
        self._wake_r.close()
        self._wake_w.close()


def _scored(scorer: ModelScorer, task: Task, read: Read) -> Done | Failed:
    """Score, and answer whatever happens: the run would wait for ever for a thread that has ended."""
    try:
        return scorer.score_anew(task, read) if task.fresh else scorer.score(task, read)
    except BaseException as error:  # noqa: BLE001
        return Failed(task, as_slideflow_error(error, f"scoring {task.slide_id}"))


# loading


@contextlib.contextmanager
def _loading(context: Context) -> Iterator[None]:
    """Load models in this process, unless one died of that before: then they are loaded by a child first.

    Raises InfrastructureError when the child dies too.
    """
    note = storage.place(context.out) / ".cache" / "loading.json"
    if storage.read_json(note) is not None:
        trial = processes.start(_try_loading, context)
        trial.join()
        if trial.exitcode:
            names = ", ".join(f"{model.name} ({model.spec.path})" for model in context.models)
            raise InfrastructureError(
                f"Loading {names} killed its process, now and in the run before: {_how(trial.exitcode)}.",
                next_step="Look at the bundle and at the memory of the machine; the next run tries a child first too.",
            )
    storage.write_atomic(note, storage.to_json([model.name for model in context.models]))
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def _try_loading(context: Context) -> None:
    with contextlib.suppress(Exception):  # an error is the parent's to meet; here only death counts
        ModelScorer(context).load()


def _how(exitcode: int) -> str:
    """Say how a process ended; the kernel ends one that takes too much memory by SIGKILL."""
    if exitcode >= 0:
        return f"exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"{name}, which is also how the system ends what takes too much memory" if name == "SIGKILL" else name

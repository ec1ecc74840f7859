"""The pool of a Ray cluster: fused actors on CPUs, scorers pinned to GPUs with readers beside them.

The driver sends coordinates, never pixels, and holds no truth. An actor that dies is
not restarted by Ray but replaced here, counted, so that neither a slide that kills its
worker nor a model that crashes while loading goes on for ever.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slideflow_ray.errors import InfrastructureError, SlideflowError
from slideflow_ray.execute import Failed, Lost, Outcome, Task
from slideflow_ray.execute.actors import PULSE, Fused, GpuScorer, RemoteReader
from slideflow_ray.execute.cluster import Head, asked, connect, first_line, is_gone, resources
from slideflow_ray.execute.parts import Parts
from slideflow_ray.pipeline import Context
from slideflow_ray.profile import ComputeProfile, resolve
from slideflow_ray.specs import ComputeSpec, ExecutorSpec

AHEAD = 2
"""Tasks in flight for each scorer beyond the one it scores: what it reads ahead."""
MAX_STARTS = 8
"""Starts of a worker in a row without a task done: a crash while loading must end some time."""
LOSSES = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError, ObjectLostError)
"""What Ray raises when a worker is gone; one that its memory monitor killed raises OutOfMemoryError ever after."""
START_TIMEOUT_S = 300
TICK_S = 1.0
"""How long the driver waits for an outcome before it looks after the workers."""
PULSE_S = 10.0
"""How often a worker with work is asked how long it has been at it."""
GIVEN_UP = "Look at the cause (a bundle that kills who loads it, too little memory), then run the same command again."
_NO_GPU = {"env_vars": {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}}


def _resolve(compute: ComputeSpec) -> ComputeProfile:
    return resolve(compute)


@dataclass
class Worker:
    """One place that takes tasks: a fused actor, or a scorer with its readers. `models` are those it has.

    `loading` are the answers that are still due until it is up, and it takes no task before; `waited_s` since the
    first was asked for, or since the last pulse. `used`: it has been given a task. `kept_for`: it is new for that one.
    """

    name: str
    index: int
    actors: list[Any] = field(default_factory=list)
    group: PlacementGroup | None = None
    flight: dict[Any, Task] = field(default_factory=dict)
    turn: int = 0
    starts: int = 0
    models: frozenset[str] | None = None
    loading: list[Any] = field(default_factory=list)
    pulses: list[Any] = field(default_factory=list)
    waited_s: float = 0.0
    node: str = ""
    used: bool = False
    kept_for: Task | None = None
    cause: str = ""

    def has(self, task: Task) -> bool:
        """Return whether the models of a task are here."""
        return self.models is None or not task.loads_models or self.models.issuperset(task.payload.models)

    @property
    def open(self) -> bool:
        """Whether it takes tasks: it is up, not kept for one, and none that must be alone is in flight."""
        return not self.loading and self.kept_for is None and not any(task.alone for task in self.flight.values())


class RayPool:
    """One worker for each core (or GPU) of the cluster, or `spec.workers` of them."""

    def __init__(self, spec: ExecutorSpec, use_gpus: bool = True) -> None:
        self.spec = spec
        self._started_ray = connect(spec)
        have = resources()
        self.gpus = int(have.get("GPU", 0)) if use_gpus else 0
        found = self.gpus or max(1, int(have.get("CPU", 1)))
        self.workers = min(spec.workers, found) if spec.workers and self.gpus else spec.workers or found
        cpus = have.get("CPU", 1.0) / self.workers
        self._cpus_each = min(1.0, cpus)
        self._share = min(1.0, math.floor(1e4 * cpus / (spec.readers_per_gpu + 1)) / 1e4)  # Ray counts in 1e-4
        self._workers: list[Worker] = []
        self._waiting: deque[Task] = deque()
        self._context: Any = None
        self._loaded = False
        self._parts = Parts()
        self._looked = time.monotonic()
        self._head = Head()

    def profile(self, compute: ComputeSpec) -> ComputeProfile:
        """Return the compute profile of a worker: the driver may be a laptop without the GPU."""
        options: dict[str, Any] = {"num_gpus": 1} if self.gpus else {"num_cpus": 1, "runtime_env": _NO_GPU}
        try:
            answer = ray.remote(**options)(_resolve).remote(compute)
            deadline = time.monotonic() + START_TIMEOUT_S
            while not ray.wait([answer], timeout=TICK_S)[0] and time.monotonic() < deadline:
                self._head.look()
            found: ComputeProfile = _get(answer, timeout_s=1)
        except (*LOSSES, GetTimeoutError) as error:
            raise InfrastructureError(f"No worker could say what it computes with: {first_line(error)}") from error
        return found

    def load(self, context: Context) -> None:
        """Start the actors; they load the models when the first chunk comes."""
        with asked():
            self._context = ray.put(context)
        shares = self._shares([model.node for model in context.models])
        self._parts = Parts([share for share in shares if share is not None])
        self._workers = [self._start(Worker(f"worker {i}", i, models=share)) for i, share in enumerate(shares)]

    def _shares(self, models: Sequence[str]) -> list[frozenset[str] | None]:
        """Return the models of each worker: all, or with "apart" one model on each GPU, in turn."""
        n = self.workers
        if self.spec.models == "together" or not self.gpus or len(models) < 2 or n < 2:
            return [None] * n
        if n >= len(models):
            return [frozenset([models[i % len(models)]]) for i in range(n)]
        return [frozenset(models[i::n]) for i in range(n)]

    # starting

    def _start(self, worker: Worker) -> Worker:
        worker.starts += 1
        if worker.starts > MAX_STARTS:
            said = (
                f"{worker.name} died {MAX_STARTS} times without doing a task; giving up. The last time: {worker.cause}"
            )
            raise InfrastructureError(said, next_step=GIVEN_UP)
        worker.actors = self._gpu_actors(worker) if self.gpus else [self._fused_actor()]
        worker.used, worker.node = False, ""
        self._load_on(worker)
        return worker

    def _load_on(self, worker: Worker) -> None:
        """Ask a worker to come up, with the models once there are chunks; `_settle` takes the answers."""
        worker.loading = [actor.load.remote() if self._loaded else actor.where.remote() for actor in worker.actors]
        worker.waited_s = 0.0

    def _fused_actor(self) -> Any:
        options = {"num_cpus": self._cpus_each, "max_concurrency": AHEAD + 1, "runtime_env": _NO_GPU}
        fused = ray.remote(**PULSE)(Fused)
        return fused.options(max_restarts=0, max_task_retries=0, **options).remote(self._context)

    def _gpu_actors(self, worker: Worker) -> list[Any]:
        """A placement group for each GPU, created singly, so that pixels never cross the network.

        One whose node is lost is placed anew by Ray when there is room; its actors wait for that, the run does not.
        """
        k, share = self.spec.readers_per_gpu, self._share
        group = worker.group
        if group is None:
            group = placement_group([{"GPU": 1, "CPU": share}, *[{"CPU": share}] * k], strategy="STRICT_PACK")
            worker.group = group
            if not group.wait(START_TIMEOUT_S):
                raise InfrastructureError("No node has a free GPU with the cores for its readers.")

        def start(kind: type, bundle: int, *arguments: Any, **options: Any) -> Any:
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            limits = {"max_restarts": 0, "max_task_retries": 0, "num_cpus": share, "scheduling_strategy": place}
            actor: Any = ray.remote(**PULSE)(kind)
            return actor.options(**limits, **options).remote(self._context, *arguments)

        scorer = start(GpuScorer, 0, worker.models, num_gpus=1, max_concurrency=AHEAD)
        return [scorer, *(start(RemoteReader, i, num_gpus=0, runtime_env=_NO_GPU) for i in range(1, k + 1))]

    def _settle(self, worker: Worker, passed_s: float) -> list[Outcome]:
        """Take the answers of a worker that comes up; start it anew when it died, go on without it when it never came.

        Raises the error of a model that does not load.
        """
        worker.waited_s += passed_s
        answered, worker.loading = ray.wait(worker.loading, num_returns=len(worker.loading), timeout=0)
        try:
            nodes = [str(_get(ref)) for ref in answered]
        except LOSSES as error:
            worker.loading = answered + worker.loading
            return self._replace(worker, first_line(error))
        worker.node = nodes[0] if nodes else worker.node
        if not worker.loading:
            worker.waited_s = 0.0
            return []
        return self._without(worker) if worker.waited_s > START_TIMEOUT_S else []

    def _without(self, worker: Worker) -> list[Outcome]:
        """Go on without a worker that found no place. Raises InfrastructureError when it was the last."""
        lost = self._bury(worker, "it found no place in the cluster")
        self._workers.remove(worker)
        if worker.group is not None:
            remove_placement_group(worker.group)
        if not self._workers:
            raise InfrastructureError(f"No worker started within {START_TIMEOUT_S} s.")
        return lost

    # working

    @property
    def limit(self) -> int:
        """Tasks in flight on one worker."""
        return self.spec.readers_per_gpu + AHEAD if self.gpus else AHEAD + 1

    @property
    def room(self) -> int:
        """How many more tasks find a free place."""
        flight = sum(len(worker.flight) for worker in self._workers)
        return max(0, self.limit * len(self._workers) - flight - len(self._waiting))

    def submit(self, task: Task) -> None:
        """Take a task; with the first chunk the models are loaded."""
        if task.loads_models and not self._loaded:
            self._loaded = True
            for worker in self._workers:
                self._load_on(worker)
        self._waiting.extend(self._parts.split(task))
        self._dispatch()

    def _dispatch(self) -> None:
        for _ in range(len(self._waiting)):
            task = self._waiting.popleft()
            worker = self._place_for(task)
            if worker is None:
                self._waiting.append(task)
            else:
                worker.flight[self._send(worker, task)] = task
                worker.used, worker.kept_for = True, None

    def _place_for(self, task: Task) -> Worker | None:
        """The least busy worker that may take the task. A task that must be alone has a worker kept free for it."""
        able = [w for w in self._workers if w.has(task)]
        if task.fresh:
            return self._fresh_place(task, able)
        free = [w for w in able if w.open]
        if task.alone:
            return next((w for w in free if not w.flight), None)
        alone = [t for t in self._waiting if t.alone and not t.fresh]
        kept = {next((w.index for w in self._workers if w.open and w.has(t)), -1) for t in alone}
        free = [w for w in free if len(w.flight) < self.limit and w.index not in kept]
        return min(free, key=lambda w: len(w.flight), default=None)

    def _fresh_place(self, task: Task, able: Sequence[Worker]) -> Worker | None:
        """A worker with actors that have done nothing yet: one is kept for the task, and started anew once idle."""
        kept = next((w for w in able if w.kept_for is task), None)
        if kept is None:
            kept = min((w for w in able if w.open), key=lambda w: len(w.flight), default=None)
            if kept is None:
                return None
            kept.kept_for = task
        if kept.flight or kept.loading:
            return None
        if kept.used:
            for actor in kept.actors:
                ray.kill(actor)
            self._start(kept)
            return None
        return kept

    def _send(self, worker: Worker, task: Task) -> Any:
        if not self.gpus:
            return worker.actors[0].perform.remote(task)
        worker.turn = worker.turn % (len(worker.actors) - 1) + 1
        reader = worker.actors[worker.turn]
        if not task.loads_models:
            return reader.perform.remote(task)
        whole = self._parts.whole(task)
        if whole is None:
            return worker.actors[0].score.remote(task, reader.read.remote(task))
        whole.pixels = whole.pixels or reader.read.remote(task)  # one reading for all its parts
        return worker.actors[0].score.remote(task, whole.pixels)

    def wait(self) -> list[Outcome]:
        """Return the outcomes that have come in, after a while none if need be."""
        self._dispatch()
        refs = {ref: worker for worker in self._workers for ref in worker.flight}
        due = [*refs, *(ref for worker in self._workers for ref in worker.loading)]
        if not due:
            raise InfrastructureError("Nothing is in flight and nothing can be placed.")
        ray.wait(due, num_returns=1, timeout=TICK_S)
        outcomes: list[Outcome] = []
        for ref in ray.wait(list(refs), num_returns=len(refs), timeout=0)[0] if refs else []:
            if ref in refs[ref].flight:  # a loss clears all that its worker held
                outcomes += self._outcome(refs[ref], ref)
        outcomes += self._look()
        self._dispatch()
        return self._parts.join(outcomes)

    def _outcome(self, worker: Worker, ref: Any) -> list[Outcome]:
        try:
            outcome: Outcome = ray.get(ref)
        except LOSSES as error:
            return self._replace(worker, first_line(error), memory=isinstance(error, OutOfMemoryError))
        except RayError as error:
            task = worker.flight.pop(ref)
            return [Failed(task, InfrastructureError(f"{task.stage} of {task.slide_id}: {error}"))]
        worker.flight.pop(ref)
        worker.starts = 0
        return [outcome]

    def _replace(self, worker: Worker, cause: str, memory: bool = False) -> list[Outcome]:
        lost = self._bury(worker, cause, memory)
        self._head.look(now=True)
        self._start(worker)
        return lost

    def _look(self) -> list[Outcome]:
        """Look after workers with work: replace one whose reading is overdue, and one that does not answer.

        Time in which the driver itself was stopped does not count against them. Raises InfrastructureError when the
        head is gone.
        """
        self._head.look()
        passed, self._looked = min(time.monotonic() - self._looked, 2 * TICK_S), time.monotonic()
        lost: list[Outcome] = []
        for worker in list(self._workers):
            if worker.loading:
                lost += self._settle(worker, passed)
            elif cause := self._overdue(worker, passed):
                lost += self._replace(worker, cause)
        return lost

    def _overdue(self, worker: Worker, passed_s: float) -> str:
        """Take a worker's pulse; return why it must go, "" while it need not."""
        if not worker.flight:
            worker.pulses, worker.waited_s = [], 0.0
            return ""
        worker.waited_s += passed_s
        deadline_s, silence_s = self.spec.task_deadline_s, self.spec.silence_s
        if not worker.pulses and worker.waited_s >= min(
            PULSE_S, (deadline_s or PULSE_S) / 2, (silence_s or PULSE_S) / 2
        ):
            worker.pulses, worker.waited_s = [actor.pulse.remote() for actor in worker.actors], 0.0
        answered = ray.wait(worker.pulses, num_returns=len(worker.pulses), timeout=0)[0] if worker.pulses else []
        worker.pulses = [ref for ref in worker.pulses if ref not in answered]
        for seconds, what in filter(None, map(_pulse, answered)):
            if deadline_s and seconds > deadline_s:
                return f"{what} had not ended after {deadline_s:g} s"
        if worker.pulses and silence_s and worker.waited_s > silence_s:
            return f"it did not answer for {silence_s:g} s"
        return ""

    def _bury(self, worker: Worker, cause: str, memory: bool = False) -> list[Outcome]:
        """Gather what had ended before a worker's death, and blame the rest; its actors are gone then."""
        worker.cause, worker.pulses, worker.waited_s = cause, [], 0.0
        for actor in worker.actors:
            ray.kill(actor)
        ended: list[Outcome] = []
        for ref in list(worker.flight):
            try:
                ended.append(ray.get(ref, timeout=5))
                worker.flight.pop(ref)
            except (RayError, GetTimeoutError):
                continue
        blameless = bool(worker.loading) or is_gone(worker.node)
        lost = Lost(worker.name, tuple(worker.flight.values()), cause, memory, blameless)
        worker.flight.clear()
        worker.loading = []
        return [*ended, lost]

    def close(self) -> None:
        """Let go of every actor and placement group, and of Ray if this pool started it."""
        for worker in self._workers:
            for actor in worker.actors:
                ray.kill(actor)
            if worker.group is not None:
                remove_placement_group(worker.group)
        self._workers = []
        if self._started_ray:
            ray.shutdown()


def _pulse(ref: Any) -> tuple[float, str] | None:
    """What an actor has answered, None when it is dead, which the tasks in flight tell."""
    try:
        found: tuple[float, str] = ray.get(ref)
    except RayError:
        return None
    return found


def _get(ref: Any, timeout_s: float = START_TIMEOUT_S) -> Any:
    """ray.get with our own errors raised as themselves; losses and time-outs stay what they are."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except (*LOSSES, GetTimeoutError):
        raise
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, SlideflowError):
            raise cause from None
        raise InfrastructureError(f"A worker did not start: {str(error).strip().splitlines()[-1]}") from error

"""The pool of a Ray cluster: fused actors on CPUs, scorers pinned to GPUs with readers beside them.

The driver sends coordinates, never pixels, and holds no truth. An actor that dies is
not restarted by Ray but replaced here, counted, so that neither a slide that kills its
worker nor a model that crashes while loading goes on for ever.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
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

from slideflow_ray.errors import InfrastructureError, ProfileError, SlideflowError
from slideflow_ray.execute import Failed, Lost, Outcome, Staffed, Task
from slideflow_ray.execute.actors import PULSE, Fused, GpuScorer, RemoteReader
from slideflow_ray.execute.cluster import Head, asked, connect, first_line, is_gone, nodes, resources
from slideflow_ray.execute.parts import Parts
from slideflow_ray.pipeline import Context
from slideflow_ray.profile import ComputeProfile, resolve
from slideflow_ray.specs import ComputeSpec, ExecutorSpec

AHEAD = 2
"""Tasks in flight for each scorer beyond the one it scores: what it reads ahead."""
GROW_S = 5.0
"""How often the driver looks whether the cluster has grown."""
SETTLE_S = 5.0
"""How long workers may be coming up before the number of the others is told."""
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
NO_PLACE = {
    True: "No worker started within {} s: no node has a free GPU with the cores for its readers.",
    False: "No worker started within {} s.",
}
NO_PLACE_NEXT = (
    "See what the cluster has free (`ray status`), lower executor.readers_per_gpu, and run again: it resumes."
)
_NO_GPU = {"env_vars": {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}}


def _resolve(compute: ComputeSpec) -> ComputeProfile:
    return resolve(compute)


def _reader_share(known: Sequence[Mapping[str, Any]], gpu_share: float, readers: int) -> float:
    """Return the cores of a scorer, and of each of its readers: at most one, less where a node with GPUs has fewer.

    The cores of other nodes do not count: a scorer and its readers stand on one.
    """
    have = [node["Resources"] for node in known if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    places = (r.get("CPU", 0.0) / (int(r["GPU"]) * int(1 / gpu_share + 1e-9) * (readers + 1)) for r in have)
    return min(1.0, math.floor(1e4 * min(places, default=1.0)) / 1e4)  # Ray counts in 1e-4


@dataclass
class Worker:
    """One place that takes tasks: a fused actor, or a scorer with its readers. `models` are those it has.

    `loading` are the answers that are still due until it is up, and it takes no task before; `waited_s` since the
    first was asked for, or since the last pulse. `used`: it has been given a task. `kept_for`: it is new for that one.
    `unfit`: it computes otherwise than the run; it gets no task, and keeps its place so that no other comes there.
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
    unfit: bool = False
    cause: str = ""

    def has(self, task: Task) -> bool:
        """Return whether the models of a task are here."""
        return self.models is None or not task.loads_models or self.models.issuperset(task.payload.models)

    @property
    def up(self) -> bool:
        """Whether it has come up, and computes as the run does."""
        return not self.loading and not self.unfit

    @property
    def open(self) -> bool:
        """Whether it takes tasks: it is up, not kept for one, and none that must be alone is in flight."""
        return self.up and self.kept_for is None and not any(task.alone for task in self.flight.values())


class RayPool:
    """One worker for each core (or share of a GPU) of the cluster, or `spec.workers` of them.

    Those that find no place wait for one, and the others go on: so a run on GPUs starts with what is there, and takes
    in nodes that join. With `spec.workers` = 0 there are more of them when the cluster has grown.
    """

    def __init__(self, spec: ExecutorSpec, use_gpus: bool = True, only_gpus: bool = False) -> None:
        self.spec = spec
        self._started_ray = connect(spec)
        have = resources()
        self.gpus = int(have.get("GPU", 0)) if use_gpus else 0
        if only_gpus and not self.gpus and (spec.address or os.environ.get("RAY_ADDRESS")):
            self.gpus, have = 1, {**have, "GPU": 1.0}  # a cluster that scales from none: the first is asked for
        found = self._found(have)
        self.workers = min(spec.workers, found) if spec.workers and self.gpus else spec.workers or found
        self._cpus_each = min(1.0, have.get("CPU", 0.0) / self.workers or 1.0)  # no core yet: nodes will join
        self._share = _reader_share(nodes(), self.gpu_share, spec.readers_per_gpu)
        self._grown = time.monotonic()
        self._told, self._next, self._given_up = self.workers, -1, 0
        self._models: list[frozenset[str] | None] = []
        self._workers: list[Worker] = []
        self._waiting: deque[Task] = deque()
        self._context: Any = None
        self._loaded = False
        self._parts = Parts()
        self._looked = time.monotonic()
        self._head = Head()

    def profile(self, compute: ComputeSpec) -> ComputeProfile:
        """Return the compute profile of a worker: the driver may be a laptop without the GPU."""
        options: dict[str, Any] = {"num_gpus": self.gpu_share} if self.gpus else {"num_cpus": 1, "runtime_env": _NO_GPU}
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
        self._models = self._shares([model.node for model in context.models])
        self._parts = Parts([share for share in self._models if share is not None])
        self._workers = []
        self._add(max(self.workers, self.spec.workers))

    def _found(self, have: Mapping[str, float]) -> int:
        """Return how many workers there is room for in a cluster that has this."""
        if self.gpus:
            return int(have.get("GPU", 0)) * int(1 / self.gpu_share + 1e-9)
        return max(1, int(have.get("CPU", 1)))

    @property
    def gpu_share(self) -> float:
        """Share of a GPU of each scorer."""
        return self.spec.gpu_share

    def _add(self, wanted: int) -> None:
        """Start workers until there are so many; those beyond the first have the models of the first, in turn."""
        for _ in range(len(self._workers) + self._given_up, wanted):
            i = self._next = self._next + 1
            models = self._models[i % len(self._models)]
            self._workers.append(self._start(Worker(f"worker {i}", i, models=models)))

    def _grow(self) -> None:
        """Start further workers where the cluster has grown, unless the run was told how many there are."""
        if self.spec.workers or time.monotonic() - self._grown < GROW_S:
            return
        self._grown = time.monotonic()
        self._head.look(now=True)
        if self._head.answers:
            self._add(self._found(resources()))

    def _staffed(self) -> list[Outcome]:
        """Say how many workers there are when that has changed; while none is there yet there is nothing to say."""
        up = sum(bool(worker.node) and not worker.unfit for worker in self._workers)
        if up in (0, self._told) or any(worker.loading and worker.waited_s < SETTLE_S for worker in self._workers):
            return []
        self._told = self.workers = up
        return [Staffed(up)]

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
        """A placement group for each scorer, created singly, so that pixels never cross the network.

        Its actors wait for it where there is no room yet, which is also how an autoscaler learns what is wanted. One
        whose node is lost is placed anew by Ray when there is room; its actors wait for that, the run does not.
        """
        k, share = self.spec.readers_per_gpu, self._share
        group = worker.group
        if group is None:
            scorer_needs = {"GPU": self.gpu_share, "CPU": share}
            worker.group = group = placement_group([scorer_needs, *[{"CPU": share}] * k], strategy="STRICT_PACK")

        def start(kind: type, bundle: int, *arguments: Any, **options: Any) -> Any:
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            limits = {"max_restarts": 0, "max_task_retries": 0, "num_cpus": share, "scheduling_strategy": place}
            actor: Any = ray.remote(**PULSE)(kind)
            return actor.options(**limits, **options).remote(self._context, *arguments)

        scorer = start(GpuScorer, 0, worker.models, num_gpus=self.gpu_share, max_concurrency=AHEAD)
        return [scorer, *(start(RemoteReader, i, num_gpus=0, runtime_env=_NO_GPU) for i in range(1, k + 1))]

    def _settle(self, worker: Worker, passed_s: float) -> list[Outcome]:
        """Take the answers of a worker that comes up; start it anew when it died, go on without it when it hangs.

        One that has found no place may find one later. Raises the error of a model that does not load.
        """
        worker.waited_s += passed_s
        answered, worker.loading = ray.wait(worker.loading, num_returns=len(worker.loading), timeout=0)
        try:
            nodes = [str(_get(ref)) for ref in answered]
        except LOSSES as error:
            worker.loading = answered + worker.loading
            return self._replace(worker, first_line(error))
        except ProfileError as error:
            return self._unfit(worker, error)
        worker.node = nodes[0] if nodes else worker.node
        if not worker.loading:
            worker.waited_s = 0.0
            return []
        if worker.waited_s <= START_TIMEOUT_S or (not worker.node and self._others(worker)):
            return []
        return self._without(worker)

    def _others(self, worker: Worker) -> list[Worker]:
        """Return the workers that are up and have the models of this one."""
        return [w for w in self._workers if w is not worker and w.up and w.models == worker.models]

    def _unfit(self, worker: Worker, error: ProfileError) -> list[Outcome]:
        """Keep a worker out that computes otherwise. Raises the error when no other is up or may come up."""
        worker.unfit = True
        if not any(w.models == worker.models and not w.unfit for w in self._workers):
            raise error
        return self._bury(worker, error.message, kill=False)

    def _without(self, worker: Worker) -> list[Outcome]:
        """Go on without a worker that did not come up. Raises InfrastructureError when no other has its models."""
        others, placed = self._others(worker), bool(worker.node)
        lost = self._bury(worker, "it did not come up" if placed else "it found no place in the cluster")
        self._workers.remove(worker)
        self._given_up += 1
        if worker.group is not None:
            remove_placement_group(worker.group)
        if not others:
            raise InfrastructureError(NO_PLACE[bool(self.gpus)].format(START_TIMEOUT_S), next_step=NO_PLACE_NEXT)
        return lost

    # working

    @property
    def limit(self) -> int:
        """Tasks in flight on one worker."""
        return self.spec.readers_per_gpu + AHEAD if self.gpus else AHEAD + 1

    @property
    def room(self) -> int:
        """How many more tasks find a free place."""
        free = sum(self.limit - len(worker.flight) for worker in self._workers if worker.up)
        return max(0, free - len(self._waiting))

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
        self._grow()
        outcomes += self._staffed()
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

    def _bury(self, worker: Worker, cause: str, memory: bool = False, kill: bool = True) -> list[Outcome]:
        """Gather what had ended before a worker's death, and blame the rest; its actors are gone then."""
        worker.cause, worker.pulses, worker.waited_s = cause, [], 0.0
        for actor in worker.actors if kill else ():
            ray.kill(actor)
        ended: list[Outcome] = []
        for ref in list(worker.flight):
            try:
                ended.append(ray.get(ref, timeout=5))
                worker.flight.pop(ref)
            except (RayError, GetTimeoutError):
                continue
        gone = is_gone(worker.node)
        worker.starts -= gone  # nodes may come and go as they like
        blameless = bool(worker.loading) or gone
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

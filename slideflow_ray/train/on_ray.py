"""The same loop by several workers: Ray Train starts them, makes their process group, and restarts what is lost."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from slideflow_ray.errors import ConfigError, DiskFull, InfrastructureError, NanScore, SlideflowError
from slideflow_ray.execute.cluster import connect
from slideflow_ray.models.bundle import BundleCard
from slideflow_ray.specs import ExecutorSpec
from slideflow_ray.train.checkpoint import read_checkpoint, write_checkpoint
from slideflow_ray.train.crew import Crew
from slideflow_ray.train.loop import EpochResult, Listen, Progress, State, Trained, fit
from slideflow_ray.train.spec import CrewSpec, TrainSpec
from slideflow_ray.train.tiles import ChunkTiles

POLL_S = 0.5


@dataclass(frozen=True)
class Task:
    """What every worker is told."""

    card: BundleCard
    spec: TrainSpec
    train: ChunkTiles
    val: ChunkTiles | None
    start: State | None
    loaders: int


class _Board:
    """An actor on which workers pin what has happened, and the driver reads it."""

    def __init__(self) -> None:
        self._results: list[EpochResult] = []
        self._error: SlideflowError | None = None

    def add(self, result: EpochResult) -> None:
        self._results.append(result)

    def fail(self, error: SlideflowError) -> None:
        self._error = error

    def since(self, n: int) -> list[EpochResult]:
        return self._results[n:]

    def error(self) -> SlideflowError | None:
        return self._error


@contextlib.contextmanager
def joined(crew: CrewSpec, spec: TrainSpec) -> Iterator[int]:
    """Be on the cluster while the block runs; yield how many workers there will be. Raises InfrastructureError."""
    started = connect(ExecutorSpec(kind="ray", address=crew.address))
    try:
        yield workers_of(crew, spec)
    finally:
        if started:
            ray.shutdown()


def fit_on_ray(task: Task, crew: CrewSpec, name: str, storage: str, listen: Listen) -> Trained:
    """Train with Ray Train and return what was trained; the same call again goes on from its last checkpoint.

    The process must be on the cluster (see `joined`). `name` must hold the digest of all that determines the
    training, for Ray Train goes on with whatever it finds under `storage`/`name`.

    Raises ConfigError when the cluster cannot hold the workers, InfrastructureError when they are lost too
    often, and what the loop raises.
    """
    from ray import train
    from ray.train.torch import TorchTrainer

    size = workers_of(crew, task.spec)
    Crew(0, size).share_of(task.spec.batch_size)
    board: Any = ray.remote(num_cpus=0)(_Board).remote()
    trainer = TorchTrainer(
        _work,
        train_loop_config={"task": ray.put(task), "board": board},
        scaling_config=_scaling(crew, task.spec, size),
        run_config=train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=train.FailureConfig(max_failures=crew.max_failures),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
        ),
    )
    with _heard(board, listen):
        result = _finish(trainer, board)
    if result.checkpoint is None:
        raise InfrastructureError(f"Ray Train left no checkpoint of {name}.")
    with result.checkpoint.as_directory() as folder:
        progress = read_checkpoint(Path(folder))
    return Trained(task.card, progress.best, progress.history, progress.best_epoch)


def workers_of(crew: CrewSpec, spec: TrainSpec) -> int:
    """Return how many workers a crew has on the cluster that is connected: one for each GPU, else each core but one."""
    if crew.workers:
        return crew.workers
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(have.get("GPU", 0)) if spec.device != "cpu" else 0
    return gpus or max(1, int(have.get("CPU", 1)) - 1)


def _scaling(crew: CrewSpec, spec: TrainSpec, size: int) -> Any:
    """Ray Train's scaling, which must leave a logical CPU free, or it waits for ever."""
    from ray.train import ScalingConfig

    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = have.get("GPU", 0) if spec.device != "cpu" else 0
    use_gpu = spec.device == "cuda" or (gpus >= size and _real_gpus())
    if use_gpu and gpus < size:
        raise ConfigError(f"{size} workers need a GPU each, the cluster has {gpus:g}.", next_step="Use fewer workers.")
    spare = have.get("CPU", 1) - 1
    cpus = min(crew.cpus_per_worker, spare / size)
    if cpus <= 0:
        raise ConfigError(
            f"The cluster has {have.get('CPU', 0):g} CPU; Ray Train needs one beside its {size} workers.",
            next_step='Use a cluster with a spare CPU, or crew.kind = "inline".',
        )
    need = {"CPU": cpus, "GPU": int(use_gpu)}
    return ScalingConfig(num_workers=size, use_gpu=use_gpu, resources_per_worker=need)


def _real_gpus() -> bool:
    """Whether this driver sees a GPU; pretended ones are for tests."""
    return torch.cuda.is_available()


@contextlib.contextmanager
def _heard(board: Any, listen: Listen) -> Iterator[None]:
    """Pass on what is pinned to the board, while the block runs and once more at its end."""
    over = threading.Event()
    heard = 0

    def catch_up() -> None:
        nonlocal heard
        for result in ray.get(board.since.remote(heard)):
            heard += 1
            listen(result)

    def follow() -> None:
        while not over.wait(POLL_S):
            with contextlib.suppress(ray.exceptions.RayError):
                catch_up()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(ray.exceptions.RayError):
            catch_up()


def _finish(trainer: Any, board: Any) -> Any:
    """Wait for the end; an error of ours comes back as it was raised."""
    from ray.train import TrainingFailedError

    try:
        result = trainer.fit()
        if (told := ray.get(board.error.remote())) is not None:
            raise told
        return result
    except TrainingFailedError as error:
        ours: SlideflowError | None = ray.get(board.error.remote())
        if ours is not None:
            raise ours from error
        if "No space left" in str(error):
            raise DiskFull("No space left for a checkpoint; the one before is whole.") from error
        cause = str(error).strip().splitlines()[-1]
        raise InfrastructureError(f"The training was lost: {cause}") from error


def _work(config: dict[str, Any]) -> None:
    """What each worker does: the loop, from the last checkpoint on."""
    board = config["board"]
    if ray.get(board.error.remote()) is not None:
        return  # what cannot succeed is not tried again; the driver raises it
    try:
        _loop(ray.get(config["task"]), board)
    except (ConfigError, NanScore) as error:  # all workers come to these together, so none waits for another
        ray.get(board.fail.remote(error))
    except SlideflowError as error:
        if not isinstance(error, InfrastructureError):
            ray.get(board.fail.remote(error))
        raise


def _loop(task: Task, board: Any) -> None:
    from ray import train
    from ray.train.torch import get_device

    if (device := get_device()).type == "cuda":
        torch.cuda.set_device(device)
    here = train.get_context()
    rank, size = here.get_world_rank(), here.get_world_size()
    spec = task.spec if task.spec.threads else task.spec.model_copy(update={"threads": 1})  # a worker for each core

    def save(progress: Progress) -> None:
        numbers = {"epoch": len(progress.history), "train_loss": progress.history[-1].train_loss}
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0:
                write_checkpoint(Path(folder), progress)
                checkpoint = train.Checkpoint.from_directory(folder)
            train.report(numbers, checkpoint=checkpoint)
        if rank == 0:
            ray.get(board.add.remote(progress.history[-1]))

    saved = None
    if (last := train.get_checkpoint()) is not None:
        with last.as_directory() as folder:
            saved = read_checkpoint(Path(folder))
    fit(
        task.card,
        spec,
        task.train,
        task.val,
        start=task.start,
        crew=Crew(rank, size, task.loaders),
        saved=saved,
        save=save,
    )

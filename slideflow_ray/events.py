"""What happens in a run, as small values; progress, logs and metrics listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class RunStarted:
    """A run has its cohort, models and executor."""

    slides: int
    models: tuple[str, ...]
    executor: str
    workers: int


@dataclass(frozen=True)
class VersionChosen:
    """A run was given a model's folder and takes the version that is in service now, `digest` at `path`."""

    model: str
    digest: str
    since: str
    path: str


@dataclass(frozen=True)
class SlidePlanned:
    """A slide's grid is committed; `todo` of its `tiles` still need a forward pass.

    `why`: what changed since it was scored before, one sentence each.
    """

    slide_id: str
    tiles: int
    chunks: int
    chunks_todo: int
    tiles_todo: int
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChunkScored:
    """One chunk of one slide has its results in the store.

    `models` gave them, on `worker`, from `began` to `ended` (seconds since the epoch); reading it took `read_s` before.
    """

    slide_id: str
    chunk: int
    tiles: int
    models: tuple[str, ...] = ()
    worker: str = ""
    began: float = 0.0
    ended: float = 0.0
    read_s: float = 0.0


@dataclass(frozen=True)
class SlideDone:
    """Every chunk of the slide is scored and committed. `outcome` is 'scored', 'no_tissue' or 'unchanged'."""

    slide_id: str
    outcome: str
    tiles: int


@dataclass(frozen=True)
class SlideFailed:
    """The slide ends with an error; the others go on."""

    slide_id: str
    code: str
    message: str
    refused: bool


@dataclass(frozen=True)
class WorkerDied:
    """A worker process or actor was lost; what it held is tried again."""

    worker: str
    slides: tuple[str, ...]
    cause: str


@dataclass(frozen=True)
class WorkersChanged:
    """The run has another number of workers now: some came up, or went with their node."""

    workers: int


@dataclass(frozen=True)
class TriedAgain:
    """A task of a slide failed in a way that a fresh worker may not: it is tried again there, alone and unchanged."""

    slide_id: str
    code: str
    message: str


@dataclass(frozen=True)
class EpochTrained:
    """An epoch of a training is over; `epoch` counts from 1, `val_loss` and `val_auc` are None without validation.

    A pre-training has no `val_auc`.
    """

    epoch: int
    epochs: int
    train_loss: float
    val_loss: float | None
    val_auc: float | None
    val_dice: float | None = None


@dataclass(frozen=True)
class Noted:
    """Something that a user should know, in one sentence."""

    text: str


@dataclass(frozen=True)
class RunFinished:
    """Every item has ended: the three counts add up to the cohort."""

    done: int
    failed: int
    refused: int
    seconds: float


Event = (
    RunStarted
    | VersionChosen
    | SlidePlanned
    | ChunkScored
    | SlideDone
    | SlideFailed
    | WorkerDied
    | WorkersChanged
    | TriedAgain
    | EpochTrained
    | Noted
    | RunFinished
)
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing."""

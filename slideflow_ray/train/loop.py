"""The training loop: epochs that can be run one by one (by `fit`, or by Ray Train) and give the same weights again.

An epoch depends on the weights, the optimiser, the seed and its own number, and on nothing else: no scheduler
and no generator carries state from one to the next, so a worker that dies repeats its epoch exactly.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field, JsonValue
from torch import nn

from slideflow_ray.errors import BundleError, ConfigError, NanScore
from slideflow_ray.models.bundle import BundleCard
from slideflow_ray.models.networks import build, find_head
from slideflow_ray.models.scorer import settle_gpu, to_margins
from slideflow_ray.prepare import to_input
from slideflow_ray.profile import has_bf16
from slideflow_ray.specs import Positive, Precision, Spec
from slideflow_ray.train.augment import augment, augmentation, seed_of

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[Any]
State = dict[str, torch.Tensor]


class TileSource(Protocol):
    """Tiles with labels, in batches; `len` is the number of tiles.

    `batches` yields uint8 (b, T, T, 3) with int64 (b,) class indices (classify) or float (b, K) of 0 and 1,
    where a negative or NaN entry means unknown (multilabel). Equal arguments give equal batches; training
    asks for every epoch in another order, validation always for epoch 0.
    """

    def batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[tuple[Pixels, Labels]]: ...

    def __len__(self) -> int: ...


@runtime_checkable
class LabelledSource(TileSource, Protocol):
    """A source that knows its labels without reading a tile, which spares `fit` one pass for counting."""

    def labels(self) -> Labels: ...


class TrainSpec(Spec):
    """How a network is trained.

    `device` "auto" takes a GPU where there is one; `threads` 0 leaves torch's choice. `precision` "auto" is bf16
    autocast where the hardware has bf16 (ResNet-18 trains 2.3 to 3.6 times as fast on such a CPU), else fp32;
    weights and optimiser stay in fp32 either way.
    """

    architecture: str = "small-cnn"
    arguments: dict[str, JsonValue] = Field(default={})
    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=2)] = 32
    lr: Positive = 1e-3
    optimiser: Literal["sgd", "rmsprop", "adam", "adamw"] = "adamw"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Literal["none", "cosine", "multistep", "onecycle"] = "cosine"
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    class_weights: Literal["balanced", "none"] = "balanced"
    augment: bool = True
    seed: Annotated[int, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "auto"


@dataclass(frozen=True)
class Validation:
    """Loss per tile, share of right answers, and the mean of the classes' one-against-rest AUC (NaN if undefined)."""

    loss: float
    accuracy: float
    auc: float


@dataclass(frozen=True)
class EpochResult:
    """What one epoch did; epochs count from 0, `lr` is that of its last step, `val` is None without a val source."""

    epoch: int
    train_loss: float
    lr: float
    val: Validation | None


@dataclass(frozen=True)
class Trained:
    """The weights of the best epoch (CPU, fp32) and what every epoch did."""

    card: BundleCard
    state_dict: State
    history: tuple[EpochResult, ...]
    best_epoch: int


@dataclass
class Trainer:
    """What the epochs share: a network and its optimiser (which change), and how to use them (which does not)."""

    card: BundleCard
    spec: TrainSpec
    net: nn.Module
    optimiser: torch.optim.Optimizer
    weights: torch.Tensor | None
    device: torch.device
    bf16: bool


Listen = Callable[[EpochResult], None]


def fit(
    card: BundleCard,
    spec: TrainSpec,
    train: TileSource,
    val: TileSource | None = None,
    listen: Listen | None = None,
    *,
    start: Mapping[str, torch.Tensor] | None = None,
) -> Trained:
    """Train a network and return the weights of its epoch of lowest validation loss (of its last without `val`).

    On one machine with the same threads, the same arguments give the same bytes. `start` holds weights to
    begin with (see `new_trainer`). Raises ConfigError when a class has no tiles or the spec contradicts
    the card, NanScore when the loss is no number any more.
    """
    with reproducible(spec.seed, spec.threads):
        trainer = new_trainer(card, spec, count_labels(card, train, spec), start)
        best: tuple[float, int, State] = (math.inf, -1, {})
        history: list[EpochResult] = []
        for epoch in range(spec.epochs):
            result = run_epoch(trainer, train, val, epoch)
            history.append(result)
            loss = result.val.loss if result.val else -epoch
            if loss < best[0]:
                best = (loss, epoch, snapshot(trainer.net))
            if listen:
                listen(result)
    return Trained(card, best[2], tuple(history), best[1])


def new_trainer(
    card: BundleCard, spec: TrainSpec, counts: npt.NDArray[np.int64], start: Mapping[str, torch.Tensor] | None = None
) -> Trainer:
    """Return a trainer with a new network, random by `spec.seed`.

    counts : int64, shape (2, n_classes), tiles with and without each class (see `count_labels`)
    start : a state dict to begin with; its head is left out where the number of classes differs

    Raises ConfigError when `spec` and `card` name different networks or `start` does not fit.
    """
    if (card.architecture, card.arguments) != (spec.architecture, spec.arguments):
        raise ConfigError(f"The card says {card.architecture} {card.arguments}, the training {spec.architecture}.")
    device = _device(spec)
    if device.type == "cuda":
        settle_gpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(spec.seed, 0, "weights"))
        net = build(card.architecture, card.arguments, card.n_classes, card.channels)
    if start is not None:
        _begin_with(net, start, card)
    net.to(device).to(memory_format=torch.channels_last)
    weights = _class_weights(card, spec, counts)
    if weights is not None:
        weights = weights.to(device)
    return Trainer(card, spec, net, _optimiser(spec, net), weights, device, _bf16(card, spec, device))


def run_epoch(trainer: Trainer, train: TileSource, val: TileSource | None, epoch: int) -> EpochResult:
    """Train one epoch, validate, and return the result: the unit that Ray Train repeats after a fault."""
    loss = train_epoch(trainer, train, epoch)
    return EpochResult(epoch, loss, trainer.optimiser.param_groups[0]["lr"], validate(trainer, val) if val else None)


def train_epoch(trainer: Trainer, source: TileSource, epoch: int) -> float:
    """Run one epoch of steps and return the mean loss per tile. Raises NanScore when the loss is not finite.

    A lone last tile is left out, for batch norm cannot learn from one.
    """
    spec, losses, tiles = trainer.spec, 0.0, 0
    steps = max(1, math.ceil(len(source) / spec.batch_size))
    transform = augmentation() if spec.augment else None
    trainer.net.train()
    with torch.random.fork_rng(devices=_devices(trainer.device)):
        torch.manual_seed(seed_of(spec.seed, epoch, "dropout"))
        for step, (pixels, labels) in enumerate(source.batches(epoch, spec.batch_size, spec.seed)):
            if len(labels) < 2:
                continue
            if transform:
                pixels = augment(pixels, transform, seed_of(spec.seed, epoch, f"augment {step}"))
            set_lr(trainer.optimiser, learning_rate(spec, epoch, step / steps))
            losses += _step(trainer, pixels, labels) * len(labels)
            tiles += len(labels)
    if not tiles:
        raise ConfigError("The training split has fewer than two tiles.")
    _check_loss(losses, epoch)
    return losses / tiles


def _step(trainer: Trainer, pixels: Pixels, labels: Labels) -> float:
    trainer.optimiser.zero_grad(set_to_none=True)
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.bf16):
        outputs = trainer.net(_input(trainer, pixels))
    targets = torch.from_numpy(np.array(labels)).to(trainer.device)
    value = sum(share * loss(trainer, out, targets) for share, out in _outputs(outputs))
    if not isinstance(value, torch.Tensor):
        raise BundleError(f"{trainer.card.architecture} returned no logits.")
    value.backward()  # type: ignore[no-untyped-call]
    trainer.optimiser.step()
    return float(value.detach())


def _outputs(outputs: Any) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield (share of the loss, logits): Inception gives a tuple in training, with auxiliary heads at 0.3 each.

    The share is that of GoogLeNet (Szegedy et al., CVPR 2015, section 5).
    """
    if isinstance(outputs, torch.Tensor):
        yield 1.0, outputs
        return
    logits = getattr(outputs, "logits", None)
    logits = outputs[0] if logits is None else logits
    yield 1.0, logits
    yield from ((0.3, out) for out in outputs if out is not None and out is not logits)


def validate(trainer: Trainer, source: TileSource) -> Validation:
    """Return loss, accuracy and AUC of a source, unaugmented, with the training's own criterion."""
    losses, tiles = 0.0, 0
    logits: list[npt.NDArray[np.float32]] = []
    truth: list[Labels] = []
    trainer.net.eval()
    with torch.inference_mode():
        for pixels, labels in source.batches(0, trainer.spec.batch_size, trainer.spec.seed):
            with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.bf16):
                out = trainer.net(_input(trainer, pixels)).float()
            losses += float(loss(trainer, out, torch.from_numpy(np.array(labels)).to(out.device))) * len(labels)
            tiles += len(labels)
            logits.append(out.cpu().numpy())
            truth.append(labels)
    if not tiles:
        raise ConfigError("The validation split has no tiles.")
    return Validation(losses / tiles, *_quality(trainer.card, np.concatenate(logits), np.concatenate(truth)))


def loss(trainer: Trainer, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of a batch in fp32: cross entropy, or its binary form over the known entries.

    With balanced class weights each tile counts by its class's weight; the mean is over tiles, not over
    weights, so that losses of batches add up.
    """
    logits = logits.float()
    if trainer.card.task == "classify":
        each = F.cross_entropy(logits, targets.long(), weight=trainer.weights, reduction="none")
        return each.mean()
    known = targets >= 0
    right = torch.where(known, targets, 0).float()
    each = F.binary_cross_entropy_with_logits(logits, right, pos_weight=trainer.weights, reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


def learning_rate(spec: TrainSpec, epoch: int, within: float = 0.0) -> float:
    """Return the rate at a point of the training: `epoch` counts from 0, `within` is the share of it done.

    cosine falls to 0 (Loshchilov and Hutter 2017); onecycle climbs from lr/25 over the first 30 % and falls to
    lr/250,000, both as cosines (Smith 2018); multistep is lr * gamma ** (milestones reached).

    >>> [round(learning_rate(TrainSpec(lr=1, epochs=4), epoch), 3) for epoch in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    done = (epoch + within) / spec.epochs
    if spec.schedule == "multistep":
        return spec.lr * float(spec.gamma ** bisect_right(sorted(spec.milestones), epoch))
    if spec.schedule == "cosine":
        return _anneal(spec.lr, 0.0, done)
    if spec.schedule == "onecycle":
        low, high, last = spec.lr / 25, spec.lr, spec.lr / 25e4
        return _anneal(low, high, done / 0.3) if done < 0.3 else _anneal(high, last, (done - 0.3) / 0.7)
    return spec.lr


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate `lr`."""
    for group in optimiser.param_groups:
        group["lr"] = lr


def snapshot(net: nn.Module) -> State:
    """Return a copy of the weights on the CPU, as plain contiguous tensors."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}


def count_labels(card: BundleCard, source: TileSource, spec: TrainSpec) -> npt.NDArray[np.int64]:
    """Return int64 (2, n_classes): the tiles with each class, and the known tiles without it.

    Raises ConfigError when a class has no tiles, or a label is no class of the card.
    """
    if isinstance(source, LabelledSource):
        labels = np.asarray(source.labels())
    else:
        found = [y for _, y in source.batches(0, spec.batch_size, spec.seed)]
        labels = np.concatenate(found) if found else np.empty(0)
    shape = (len(labels),) if card.task == "classify" else (len(labels), card.n_classes)
    if labels.shape != shape:
        raise ConfigError(f"A {card.task} model of {card.n_classes} classes needs labels {shape}, got {labels.shape}.")
    hot = _one_hot(card, labels) if card.task == "classify" else labels
    counts = np.stack([(hot > 0).sum(axis=0), (hot == 0).sum(axis=0)]).astype(np.int64)
    if empty := [name for name, n in zip(card.classes, counts[0], strict=True) if n == 0]:
        raise ConfigError(
            f"The training split has no tiles of {', '.join(empty)}.",
            next_step="Label some tiles of each class, or take the class out of the card.",
        )
    return counts


def _one_hot(card: BundleCard, labels: Labels) -> Labels:
    unknown = set(np.unique(labels).tolist()) - set(range(card.n_classes))
    if unknown:
        raise ConfigError(f"Labels {sorted(unknown)} are no classes; the card has 0 to {card.n_classes - 1}.")
    return np.eye(card.n_classes, dtype=np.int64)[labels.astype(np.int64)]


def _class_weights(card: BundleCard, spec: TrainSpec, counts: npt.NDArray[np.int64]) -> torch.Tensor | None:
    """Return N / (K * n_c) for classify (as scikit-learn's "balanced"), tiles without over with for multilabel."""
    if spec.class_weights == "none":
        return None
    have, lack = counts
    weights = have.sum() / (card.n_classes * have) if card.task == "classify" else np.maximum(lack, 1) / have
    return torch.from_numpy(weights.astype(np.float32))


def _quality(card: BundleCard, logits: npt.NDArray[np.float32], truth: Labels) -> tuple[float, float]:
    margins = to_margins(torch.from_numpy(logits), card.task).numpy()
    if card.task == "classify":
        accuracy = float((logits.argmax(axis=1) == truth).mean())
        known, hot = np.ones(margins.shape, bool), truth[:, None] == np.arange(card.n_classes)
    else:
        known, hot = truth >= 0, truth > 0
        accuracy = float(((margins > 0) == hot)[known].mean()) if known.any() else math.nan
    aucs = [_auc(margins[k, c], hot[k, c]) for c, k in enumerate(known.T)]
    defined = [auc for auc in aucs if not math.isnan(auc)]
    return accuracy, sum(defined) / len(defined) if defined else math.nan


def _auc(margins: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_]) -> float:
    """The exact AUC, NaN where one class is missing: early in training margins are too alike for histograms."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, margins)) if 0 < positive.sum() < len(positive) else math.nan


def _input(trainer: Trainer, pixels: Pixels) -> torch.Tensor:
    return to_input(pixels, trainer.card.mean, trainer.card.std, dtype=torch.float32, device=trainer.device)


def _optimiser(spec: TrainSpec, net: nn.Module) -> torch.optim.Optimizer:
    parameters, lr, decay = list(net.parameters()), spec.lr, spec.weight_decay
    if spec.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=spec.momentum, weight_decay=decay)
    if spec.optimiser == "rmsprop":
        return torch.optim.RMSprop(parameters, lr, alpha=0.99, weight_decay=decay)
    kind = torch.optim.Adam if spec.optimiser == "adam" else torch.optim.AdamW
    return kind(parameters, lr, weight_decay=decay)


def _begin_with(net: nn.Module, start: Mapping[str, torch.Tensor], card: BundleCard) -> None:
    """Load `start`, but for a head of another size: a head is what a new task learns first."""
    own = net.state_dict()
    head = find_head(net, card.n_classes)[0]
    strange = [k for k in own if k not in start or start[k].shape != own[k].shape]
    if wrong := [key for key in strange if not key.startswith(f"{head}.")]:
        raise ConfigError(f"The weights to start from do not fit {card.architecture}: {', '.join(wrong[:3])}.")
    net.load_state_dict({key: own[key] if key in strange else start[key] for key in own})


def _device(spec: TrainSpec) -> torch.device:
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('train.device = "cuda", and torch sees no GPU here; use "auto" or "cpu".')
    return torch.device("cuda" if spec.device != "cpu" and torch.cuda.is_available() else "cpu")


def _bf16(card: BundleCard, spec: TrainSpec, device: torch.device) -> bool:
    if spec.precision != "auto":
        return spec.precision == "bf16"
    return card.precision == "auto" and has_bf16("cuda" if device.type == "cuda" else "cpu")


def _devices(device: torch.device) -> list[int]:
    return [torch.cuda.current_device()] if device.type == "cuda" else []


def _check_loss(losses: float, epoch: int) -> None:
    if not math.isfinite(losses):
        raise NanScore(f"The training loss of epoch {epoch} is {losses}.", next_step="Train with a lower lr.")


@contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """Run the block with torch's generator seeded and its threads fixed; both are put back afterwards."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

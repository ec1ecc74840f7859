"""The training loop: epochs that can be run one by one, alone or by several workers, and give the same weights again.

An epoch depends on the weights, the optimiser, the seed and its own number, and on nothing else: no scheduler
and no generator carries state from one to the next, so a worker that dies repeats its epoch exactly.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from slideflow_ray.errors import BundleError, ConfigError, NanScore
from slideflow_ray.models.bundle import NOT_SCORED, BundleCard
from slideflow_ray.models.networks import AUXILIARY, build, find_head
from slideflow_ray.models.scorer import settle_gpu, to_margins
from slideflow_ray.models.seresnet import STEM, SeResNet
from slideflow_ray.prepare import to_input
from slideflow_ray.profile import has_bf16
from slideflow_ray.train.augment import seed_of
from slideflow_ray.train.crew import ALONE, Crew
from slideflow_ray.train.freeze import drop_before_head, freeze, trainable
from slideflow_ray.train.masks import areas_of
from slideflow_ray.train.pretrain import PretextNet, mean_parts, on_device, said_of, shown, views_of
from slideflow_ray.train.spec import Keep, TrainSpec
from slideflow_ray.train.tiles import LabelledSource, TileSource

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[Any]
State = dict[str, torch.Tensor]
_NO_LABELS = np.ones((2, 1), np.int64)


@dataclass(frozen=True)
class Validation:
    """Loss per tile, share of right answers, and the mean of the classes' one-against-rest AUC (NaN if undefined).

    dice : of a segmentation the mean Dice of its classes but the first, over all pixels of the tiles' cores.
    """

    loss: float
    accuracy: float
    auc: float
    dice: float | None = None

    def said(self) -> dict[str, float | None]:
        """Return the values by name; Dice is there for segmentations only."""
        return {key: value for key, value in vars(self).items() if key != "dice" or value is not None}


@dataclass(frozen=True)
class EpochResult:
    """What one epoch did; epochs count from 0, `lr` is that of its last step, `val` is None without a val source.

    `train_accuracy` is of the tiles as they were shown, augmented and while the network learnt; `tiles` were shown in
    `seconds`, by all workers together. `parts` are of a pre-training: parts of the loss, and how its regions stand.
    """

    epoch: int
    train_loss: float
    lr: float
    val: Validation | None
    train_accuracy: float = math.nan
    tiles: int = 0
    seconds: float = field(default=0.0, compare=False)
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """The weights of the best epoch (CPU, fp32) and what every epoch did."""

    card: BundleCard
    state_dict: State
    history: tuple[EpochResult, ...]
    best_epoch: int


@dataclass(frozen=True)
class Progress:
    """Where a training stands after an epoch: all that the next one needs, and the best weights so far."""

    history: tuple[EpochResult, ...]
    best_epoch: int
    best: State
    net: State
    optimiser: dict[str, Any]


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
    crew: Crew = ALONE


Listen = Callable[[EpochResult], None]
Save = Callable[[Progress], None]


def fit(
    card: BundleCard,
    spec: TrainSpec,
    train: TileSource,
    val: TileSource | None = None,
    listen: Listen | None = None,
    *,
    start: Mapping[str, torch.Tensor] | None = None,
    crew: Crew = ALONE,
    saved: Progress | None = None,
    save: Save | None = None,
) -> Trained:
    """Train a network and return the weights of its best epoch by `spec.keep` (of its last without `val`).

    On one machine with the same threads and workers, the same arguments give the same bytes, whether the training
    runs through or goes on from `saved`, which `save` was given after an epoch. `start` holds weights to
    begin with (see `new_trainer`). Raises ConfigError when a class has no tiles or the spec contradicts
    the card, NanScore when the loss is no number any more.
    """
    with reproducible(spec.seed, spec.threads):
        counts = _NO_LABELS if spec.pretext else count_labels(card, train, spec)
        trainer = new_trainer(card, spec, counts, start, crew)
        if saved:
            resume(trainer, saved)
        history = list(saved.history if saved else ())
        best_epoch, best = (saved.best_epoch, saved.best) if saved else (-1, {})
        while not is_over(spec, history):
            history.append(run_epoch(trainer, train, val, len(history)))
            if best_of(history, spec.keep) == len(history) - 1:
                best_epoch, best = len(history) - 1, snapshot(trainer.net)
            if save:
                save(Progress(tuple(history), best_epoch, best, snapshot(trainer.net), trainer.optimiser.state_dict()))
            if listen:
                listen(history[-1])
    return Trained(card, best, tuple(history), best_epoch)


def best_of(history: Sequence[EpochResult], keep: Keep = "loss") -> int:
    """Return the epoch to keep, the earlier of equals; the last one without validation.

    keep : "loss" is the lowest validation loss; "accuracy" the highest accuracy, "dice" the highest mean Dice, of
    equals the one of lower loss.
    """
    ranks = [rank(result.val, keep) if result.val else (-result.epoch, 0.0) for result in history]
    return ranks.index(min(ranks))


def rank(val: Validation, keep: Keep) -> tuple[float, float]:
    """Return what is lowest for the validation that `keep` prefers; what is not defined comes last."""
    if keep == "loss":
        return val.loss, 0.0
    value = val.accuracy if keep == "accuracy" else val.dice
    return (math.inf if value is None or math.isnan(value) else -value), val.loss


def is_over(spec: TrainSpec, history: list[EpochResult]) -> bool:
    """Return whether all epochs are done, or `patience` of them have brought no better one."""
    if len(history) >= spec.epochs:
        return True
    return bool(spec.patience and history and len(history) - 1 - best_of(history, spec.keep) >= spec.patience)


def resume(trainer: Trainer, saved: Progress) -> None:
    """Put a trainer where `saved` stood."""
    trainer.net.load_state_dict(saved.net)
    groups = trainer.optimiser.state_dict()["param_groups"]
    trainer.optimiser.load_state_dict({"state": saved.optimiser["state"], "param_groups": groups})


def new_trainer(
    card: BundleCard,
    spec: TrainSpec,
    counts: npt.NDArray[np.int64],
    start: Mapping[str, torch.Tensor] | None = None,
    crew: Crew = ALONE,
) -> Trainer:
    """Return a trainer with a new network, random by `spec.seed`.

    counts : int64, shape (2, n_classes), tiles with and without each class (see `count_labels`)
    start : a state dict to begin with; its head is left out where the number of classes differs

    Raises ConfigError when `spec` and `card` name different networks, `start` does not fit, or the batch cannot
    be shared by the crew.
    """
    if (card.architecture, card.arguments) != (spec.architecture, spec.arguments):
        raise ConfigError(f"The card says {card.architecture} {card.arguments}, the training {spec.architecture}.")
    crew.share_of(spec.batch_size)
    device = device_of(spec)
    if device.type == "cuda":
        settle_gpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(spec.seed, 0, "weights"))
        net = build(card.architecture, card.arguments, card.n_classes, card.channels)
    if start is not None:
        _begin_with(net, start, card)
    if spec.pretext:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(spec.seed, 0, "pretext"))
            net = PretextNet(net, spec.pretext, card.n_classes, card.channels)
    else:
        drop_before_head(net, card.n_classes, spec.dropout)
    net.to(device).to(memory_format=torch.channels_last)
    weights = _class_weights(card, spec, counts)
    if weights is not None:
        weights = weights.to(device)
    return Trainer(card, spec, net, _optimiser(spec, net), weights, device, _bf16(card, spec, device), crew)


def run_epoch(trainer: Trainer, train: TileSource, val: TileSource | None, epoch: int) -> EpochResult:
    """Train one epoch, validate, and return the result: the unit that is repeated after a fault."""
    began = time.monotonic()
    parts: dict[str, float] = {}
    if trainer.spec.pretext:
        found, parts, tiles = pretext_epoch(trainer, train, epoch)
        accuracy = math.nan
    else:
        found, accuracy, tiles = train_epoch(trainer, train, epoch)
    seconds = time.monotonic() - began
    lr = trainer.optimiser.param_groups[0]["lr"]
    return EpochResult(epoch, found, lr, validate(trainer, val) if val else None, accuracy, tiles, seconds, parts)


def train_epoch(trainer: Trainer, source: TileSource, epoch: int) -> tuple[float, float, int]:
    """Run one epoch of steps; return the mean loss and accuracy per tile, and the tiles shown.

    A lone last tile is left out, for batch norm cannot learn from one. Raises NanScore when the loss is not
    finite.
    """
    spec, crew = trainer.spec, trainer.crew
    sums = np.zeros(3)
    steps = max(1, math.ceil(len(source) / spec.batch_size))
    trainer.net.train()
    freeze(trainer.net, trainer.card.n_classes, 100.0 if epoch < spec.head_epochs else spec.freeze)
    net = crew.wrap(trainer.net)
    with torch.random.fork_rng(devices=_devices(trainer.device)):
        torch.manual_seed(seed_of(spec.seed, epoch, crew.stream("dropout")))
        for step, (pixels, labels) in enumerate(crew.batches(source, spec, epoch)):
            if len(labels) < 2:
                continue
            set_lr(trainer.optimiser, learning_rate(spec, epoch, min(step / steps, 1.0)))
            sums += len(labels) * np.array([*_step(trainer, net, pixels, labels), 1.0])
    losses, right, tiles = crew.total(sums)
    if not tiles:
        raise ConfigError("The training split has fewer than two tiles.")
    _check_loss(losses, epoch)
    crew.agree(trainer.net)
    return losses / tiles, right / tiles, int(tiles)


def pretext_epoch(trainer: Trainer, source: TileSource, epoch: int) -> tuple[float, dict[str, float], int]:
    """Run one epoch of pre-training; return the mean loss per tile, its parts, and the tiles shown.

    Views are drawn by seed, epoch, step and worker. Raises NanScore when the loss is not finite.
    """
    spec, crew = trainer.spec, trainer.crew
    steps = max(1, math.ceil(len(source) / spec.batch_size))
    trainer.net.train()
    net = crew.wrap(trainer.net)
    told: list[tuple[int, dict[str, float]]] = []
    for step, (pixels, _) in enumerate(crew.batches(source, spec, epoch)):
        if len(pixels) < 2:
            continue
        set_lr(trainer.optimiser, learning_rate(spec, epoch, min(step / steps, 1.0)))
        trainer.optimiser.zero_grad(set_to_none=True)
        value, parts = _pretext(trainer, net, pixels, seed_of(spec.seed, epoch, crew.stream(f"views {step}")))
        value.backward()  # type: ignore[no-untyped-call]
        if spec.clip:
            torch.nn.utils.clip_grad_norm_(trainable(trainer.net), spec.clip)
        trainer.optimiser.step()
        told.append((len(pixels), {"loss": float(value.detach()), **parts}))
    everyone = [part for several in crew.gather(told) for part in several]
    if not everyone:
        raise ConfigError("The training split has fewer than two tiles.")
    mean = mean_parts(everyone)
    _check_loss(mean["loss"], epoch)
    crew.agree(trainer.net)
    return mean.pop("loss"), mean, sum(n for n, _ in everyone)


def _pretext(trainer: Trainer, net: nn.Module, pixels: Pixels, seed: int) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss of a batch's two views, in fp32 but for the network itself, and what is said of it."""
    pretext = trainer.spec.pretext
    if pretext is None:
        raise ConfigError("This training has no pretext.")
    views = views_of(pixels, pretext, seed)
    one, two = shown(views, trainer.card.mean, trainer.card.std, trainer.device)
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.bf16), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        told = net(one, two, on_device(views, trainer.device))
    return told.loss, said_of(told)


def _step(trainer: Trainer, net: nn.Module, pixels: Pixels, labels: Labels) -> tuple[float, float]:
    """Take one step; return the batch's mean loss and share of right answers."""
    trainer.optimiser.zero_grad(set_to_none=True)
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.bf16):
        outputs = net(_input(trainer, pixels))
    targets = torch.from_numpy(np.array(labels)).to(trainer.device)
    parts = list(_outputs(outputs))
    if not parts:
        raise BundleError(f"{trainer.card.architecture} returned no logits.")
    value = torch.stack([share * loss(trainer, out, targets) for share, out in parts]).sum()
    value.backward()  # type: ignore[no-untyped-call]
    if trainer.spec.clip:
        torch.nn.utils.clip_grad_norm_(trainable(trainer.net), trainer.spec.clip)
    trainer.optimiser.step()
    return float(value.detach()), float(_right(trainer.card, parts[0][1].detach(), targets))


def _right(card: BundleCard, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if card.task == "classify":
        return (logits.argmax(1) == targets).float().mean()
    if card.task == "segment":
        known = targets != NOT_SCORED
        return (logits.argmax(1) == targets)[known].float().mean() if known.any() else torch.tensor(math.nan)
    known = targets >= 0
    return ((logits > 0) == (targets > 0))[known].float().mean() if known.any() else torch.tensor(math.nan)


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
    """Return loss, accuracy and AUC (or Dice) of a source, unaugmented, with the training's own criterion."""
    if trainer.spec.pretext:
        return _validate_pretext(trainer, source)
    if trainer.card.task == "segment":
        return _validate_masks(trainer, source)
    losses = 0.0
    logits: list[npt.NDArray[np.float32]] = []
    truth: list[Labels] = []
    spec, crew = trainer.spec, trainer.crew
    trainer.net.eval()
    with torch.inference_mode():
        for pixels, labels, *_ in crew.mine(source).batches(0, spec.batch_size, spec.seed):
            with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.bf16):
                out = trainer.net(_input(trainer, pixels)).float()
            losses += float(loss(trainer, out, torch.from_numpy(np.array(labels)).to(out.device))) * len(labels)
            logits.append(out.cpu().numpy())
            truth.append(labels)
    parts = crew.gather((losses, logits, truth))
    losses = sum(part[0] for part in parts)
    rows = [np.concatenate([x for part in parts for x in part[i]] or [np.empty(0)]) for i in (1, 2)]
    if not len(rows[1]):
        raise ConfigError("The validation split has no tiles.")
    if not math.isfinite(losses):
        raise NanScore(f"The validation loss is {losses}.", next_step="Train with a lower lr.")
    return Validation(losses / len(rows[1]), *_quality(trainer.card, *rows))


def _validate_pretext(trainer: Trainer, source: TileSource) -> Validation:
    """Return the loss on tiles that are not trained on, each time on the same views."""
    spec, sums = trainer.spec, np.zeros(2)
    trainer.net.eval()
    with torch.inference_mode():
        for step, (pixels, *_) in enumerate(trainer.crew.mine(source).batches(0, spec.batch_size, spec.seed)):
            value, _ = _pretext(trainer, trainer.net, pixels, seed_of(spec.seed, 0, f"views of val {step}"))
            sums += [float(value) * len(pixels), len(pixels)]
    losses, tiles = trainer.crew.total(sums)
    if not math.isfinite(losses):
        raise NanScore(f"The validation loss is {losses}.", next_step="Train with a lower lr.")
    return Validation(losses / tiles, math.nan, math.nan)


def _validate_masks(trainer: Trainer, source: TileSource) -> Validation:
    """Count right pixels and overlaps in the tiles' cores, which are what a run keeps."""
    spec, crew, k = trainer.spec, trainer.crew, trainer.card.n_classes
    table, sums = np.zeros((k, k), np.int64), np.zeros(2)
    halo = trainer.card.halo or 0
    trainer.net.eval()
    with torch.inference_mode():
        for pixels, masks, *_ in crew.mine(source).batches(0, spec.batch_size, spec.seed):
            with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.bf16):
                out = trainer.net(_input(trainer, pixels)).float()
            targets = torch.from_numpy(np.array(masks)).to(out.device)
            sums += [float(loss(trainer, out, targets)) * len(masks), len(masks)]
            core = slice(halo, masks.shape[1] - halo)
            called, truth = out.argmax(1).cpu().numpy()[:, core, core], masks[:, core, core]
            known = truth != NOT_SCORED
            table += np.bincount(truth[known] * np.int64(k) + called[known], minlength=k * k).reshape(k, k)
    losses, tiles = crew.total(sums)
    table = np.sum(crew.gather(table), axis=0)
    if not tiles:
        raise ConfigError("The validation split has no tiles.")
    if not math.isfinite(losses):
        raise NanScore(f"The validation loss is {losses}.", next_step="Train with a lower lr.")
    accuracy = float(np.trace(table) / table.sum()) if table.any() else math.nan
    return Validation(losses / tiles, accuracy, math.nan, mean_dice(table))


def mean_dice(table: npt.NDArray[np.int64]) -> float:
    """Return the mean over classes but the first of 2 |A and B| / (|A| + |B|); a class that is nowhere counts as 1.

    table : int64 (K, K), pixels by true class (rows) and called class
    """
    both = table.sum(axis=0) + table.sum(axis=1)
    dice = np.divide(2 * np.diagonal(table), both, out=np.ones(len(table)), where=both > 0)
    return float(dice[1:].mean())


def mask_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, unknown: int = NOT_SCORED
) -> torch.Tensor:
    """Return cross entropy plus 1 - Dice, in fp32, over the pixels that are known.

    logits : (n, K, H, W); targets : (n, H, W), `unknown` is left out; weights : of the classes in the cross entropy,
    whose mean is over pixels. Dice is (2 sum p g + 1) / (sum p + sum g + 1) over the batch, the mean of all classes
    (Milletari, Navab and Ahmadi, V-Net, 3DV 2016, with linear sums; smoothed by 1).
    """
    logits, known = logits.float(), targets != unknown
    each = F.cross_entropy(logits, targets.long(), weights, ignore_index=unknown, reduction="none")
    entropy = each.sum() / known.sum().clamp(min=1)
    hot = F.one_hot(torch.where(known, targets, 0).long(), logits.shape[1]).permute(0, 3, 1, 2) * known[:, None]
    p = logits.softmax(1) * known[:, None]
    overlap, total = (p * hot).sum((0, 2, 3)), p.sum((0, 2, 3)) + hot.sum((0, 2, 3))
    return entropy + 1 - ((2 * overlap + 1) / (total + 1)).mean()


def loss(trainer: Trainer, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of a batch in fp32: cross entropy, or its binary form over the known entries.

    With balanced class weights each tile counts by its class's weight; the mean is over tiles, not over
    weights, so that losses of batches add up. Of masks see `mask_loss`.
    """
    if trainer.card.task == "segment":
        return mask_loss(logits, targets, trainer.weights)
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
    lr/250,000, both as cosines (Smith 2018); multistep is lr * gamma ** (milestones reached). Epochs that train the
    head alone have its own rate; in `warmup` epochs the rate climbs from 0.

    >>> [round(learning_rate(TrainSpec(lr=1, epochs=4), epoch), 3) for epoch in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    if epoch < spec.head_epochs:
        return spec.head_lr
    if epoch < spec.warmup:
        return spec.lr * (epoch + within) / spec.warmup
    done = (epoch - spec.warmup + within) / max(1, spec.epochs - spec.warmup)
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
        found = [y for _, y, *_ in source.batches(0, spec.batch_size, spec.seed)]
        found = [areas_of(y, card.n_classes) for y in found] if card.task == "segment" else found
        labels = np.concatenate(found) if found else np.empty(0)
    shape = (len(labels),) if card.task == "classify" else (len(labels), card.n_classes)
    labels = labels if len(labels) else np.empty(shape)
    if labels.shape != shape:
        raise ConfigError(f"A {card.task} model of {card.n_classes} classes needs labels {shape}, got {labels.shape}.")
    hot = _one_hot(card, labels) if card.task == "classify" else labels
    if card.task == "segment":
        counts = np.stack([labels.sum(axis=0), labels.sum() - labels.sum(axis=0)]).astype(np.int64)
    else:
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
    """Return N / (K * n_c) as scikit-learn's "balanced" (of pixels for segment); for multilabel tiles without / with.

    Balanced sampling has made the classes equal already.
    """
    if spec.pretext or spec.class_weights == "none" or spec.sampling == "balanced":
        return None
    have, lack = counts
    weights = have.sum() / (card.n_classes * have) if card.task != "multilabel" else np.maximum(lack, 1) / have
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
        return torch.optim.SGD(parameters, lr, spec.momentum, weight_decay=decay, nesterov=spec.nesterov)
    if spec.optimiser == "rmsprop":
        return torch.optim.RMSprop(parameters, lr, alpha=spec.decay, weight_decay=decay)
    kind = torch.optim.Adam if spec.optimiser == "adam" else torch.optim.AdamW
    return kind(parameters, lr, weight_decay=decay)


ENCODER = "encoder."
CLASSIFIERS = ("fc.", "classifier.", "head.")
"""By what names classifiers' heads go in torchvision and timm."""


def _begin_with(net: nn.Module, start: Mapping[str, torch.Tensor], card: BundleCard) -> None:
    """Load `start`, but for heads of another size (auxiliary ones too): a head is what a new task learns first."""
    own = net.state_dict()
    head = find_head(net, card.n_classes)[0]
    if encoder := _encoder_of(net, own, start):  # a ResNet's: no weights exist for the decoder
        start = {**{k: own[k] for k in own if not k.startswith(ENCODER)}, **encoder}
    strange = [k for k in own if k not in start or start[k].shape != own[k].shape]
    if isinstance(net, SeResNet) and all(key.startswith(STEM) for key in start):
        head, strange = "", [k for k in strange if k.startswith(STEM)]  # no weights exist for its blocks
        start = {**own, **start}
    wrong = [key for key in strange if not (key.startswith(f"{head}.") or _is_head(own[key], start.get(key), card))]
    more = [key for key in start if key not in own and not key.startswith((f"{head}.", *AUXILIARY))]
    if wrong or more:
        left = f"{len(more)} of its tensors belong to another network ({', '.join(more[:3])})"
        raise ConfigError(
            f"The weights to start from do not fit {card.architecture}: {_few(own, start, wrong) if wrong else left}.",
            next_step="Take weights of this architecture, by the names that torchvision or timm gives them.",
        )
    net.load_state_dict({key: own[key] if key in strange else start[key] for key in own})


def _encoder_of(
    net: nn.Module, own: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a classifier's weights by the names of smp's encoder, without its head; empty if they are none of one."""
    if not hasattr(net, "segmentation_head") or any(key.startswith(ENCODER) for key in start):
        return {}
    inside = f"{ENCODER}model." if any(key.startswith(f"{ENCODER}model.") for key in own) else ENCODER
    return {f"{inside}{key}": value for key, value in start.items() if not key.startswith(CLASSIFIERS)}


def _is_head(own: torch.Tensor, other: torch.Tensor | None, card: BundleCard) -> bool:
    """Whether two tensors differ in nothing but the number of classes."""
    return other is not None and own.shape[:1] == (card.n_classes,) and own.shape[1:] == other.shape[1:]


def _few(own: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], keys: list[str]) -> str:
    said = [
        f"{key} is {tuple(start[key].shape)} instead of {tuple(own[key].shape)}"
        if key in start
        else f"{key} is missing"
        for key in keys[:3]
    ]
    return "; ".join(said[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def device_of(spec: TrainSpec) -> torch.device:
    """Return where a training computes. Raises ConfigError for a GPU that is not there."""
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('train.device = "cuda", and torch sees no GPU here; use "auto" or "cpu".')
    if spec.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


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

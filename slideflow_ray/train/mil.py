"""Training of slide classifiers on stored features, from slide labels alone: one slide, one bag of tiles."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field

from slideflow_ray import accounting, storage
from slideflow_ray.annotations import class_of
from slideflow_ray.cases import Run, read_run
from slideflow_ray.cohort import Item, check_splits
from slideflow_ray.errors import BundleError, ConfigError, NanScore
from slideflow_ray.events import EpochTrained, Listener, silent
from slideflow_ray.models.mil import CARD, Mil, MilCard, Pooling, mil_files
from slideflow_ray.specs import Positive, Spec, digest
from slideflow_ray.store import SlideStore
from slideflow_ray.train.augment import seed_of
from slideflow_ray.train.loop import reproducible
from slideflow_ray.train.record import RECORD, versions, write_folder

Features = npt.NDArray[np.float16]
TWO = "Name the labels of the cohort, the background first: --classes normal,tumor."


class MilSpec(Spec):
    """How a slide classifier is trained; the defaults are eva's protocol for frozen encoders (METHODS).

    AdamW at 1e-3, 32 bags a step, at most 100 epochs, of each bag at most `max_tiles` tiles drawn anew in every epoch.
    The epoch of lowest validation loss is kept; `patience` epochs without a lower one end the training.
    """

    pooling: Pooling = "attention"
    hidden: Annotated[int, Field(ge=1)] = 128
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    epochs: Annotated[int, Field(ge=1)] = 100
    patience: Annotated[int, Field(ge=1)] = 20
    batch: Annotated[int, Field(ge=1)] = 32
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_tiles: Annotated[int, Field(ge=1)] = 1000
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Bag:
    """A slide's tiles: where their features are, and the slide's class, -1 where it is not known."""

    item: Item
    out: str
    nodes: tuple[str, ...]
    label: int = -1

    def said(self) -> list[Any]:
        """Return what determines the bag: slide, class, and the checksums of its features as they were committed."""
        store = SlideStore(self.out, self.item.slide_id)
        commits = [store.committed(node) for node in self.nodes]
        return [self.item.slide_id, self.label, [sorted(c.keys.items()) for c in commits if c is not None]]

    def read(self) -> Features:
        """Return the features, float16 (n, D), of all grids, one after the other."""
        store = SlideStore(self.out, self.item.slide_id)
        return np.concatenate([store.read(node) for node in self.nodes])


@dataclass(frozen=True)
class MilTrained:
    """Where a slide classifier is, and how its training went."""

    bundle: Path
    best_epoch: int
    history: tuple[dict[str, Any], ...]
    bags: dict[str, int]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """Return a few lines for people."""
        best = self.history[self.best_epoch]
        counts = ", ".join(f"{n} {split} slides" for split, n in self.bags.items())
        line = f"trained on {counts}; best epoch {self.best_epoch + 1} of {len(self.history)}"
        if best["val_loss"] is not None:
            line += f": val loss {best['val_loss']:.4f}, accuracy {best['val_accuracy']:.3f}"
        return "\n".join([line, *self.notes, f"Slide classifier: {self.bundle}"])


def bags_of(run: Run, encoder: str | None = None, node: str | None = None) -> tuple[str, str, list[Bag]]:
    """Return the encoder's name, its node, and a bag for each slide that has its features.

    Raises ConfigError where the run keeps no features, or those of several models and none is named.
    """
    record = accounting.read_run(run.out)
    models = [m for m in record["models"] if _kept(run, m["node"])]
    found = [m for m in models if encoder in (None, m["name"]) and node in (None, m["node"])]
    if not models:
        raise ConfigError(
            f"The run in {run.out} keeps no features.",
            next_step='Score with [[model]] features = true (or an encoder of task "features"), and come back.',
        )
    if len(found) != 1:
        there = ", ".join(f"{m['name']} ({m['node']})" for m in models)
        wanted = encoder or node or "one"
        raise ConfigError(f"{len(found)} models of the run are {wanted}; features are kept of {there}.")
    name, own = found[0]["name"], found[0]["node"]
    nodes = {item.slide_id: _nodes(run, item.slide_id, own) for item in run.items}
    return name, own, [Bag(item, str(run.out), nodes[item.slide_id]) for item in run.items if nodes[item.slide_id]]


def _nodes(run: Run, slide_id: str, node: str) -> tuple[str, ...]:
    outcome = run.outcomes.get(slide_id, {})
    if outcome.get("status") != "done" or not outcome.get("tiles"):
        return ()
    store = SlideStore(str(run.out), slide_id)
    found = [f"features/{grid}/{own}" for grid, own in outcome["grids"] if own == node]
    return tuple(path for path in found if store.committed(path))


def _kept(run: Run, node: str) -> bool:
    return any(_nodes(run, item.slide_id, node) for item in run.items)


def train_mil(
    run_out: str | Path,
    out: str | Path,
    classes: Sequence[str],
    spec: MilSpec | None = None,
    *,
    encoder: str | None = None,
    names: Mapping[str, str] | None = None,
    overwrite: bool = False,
    listen: Listener = silent,
) -> MilTrained:
    """Train a slide classifier on the features that a run has kept, and write its bundle.

    Slides and their split and label are those of the run's cohort; test slides are not read. Memory holds one
    slide's features and `batch` bags of at most `max_tiles` tiles.

    Raises ConfigError (no features, fewer than two classes among the training slides), SplitLeakError, NanScore.
    """
    spec = spec or MilSpec()
    out = Path(out)
    if len(set(classes)) < 2:
        raise ConfigError(f"A slide classifier needs two classes, got {', '.join(classes)}.", next_step=TWO)
    _check_out(out, overwrite)
    run = read_run(Path(run_out), names or {})
    check_splits(run.items, run.identities)
    name, node, bags = bags_of(run, encoder)
    labelled = [_labelled(bag, classes, run.labels.names) for bag in bags if bag.item.split in ("train", "val")]
    sides = {split: [b for b in labelled if b.item.split == split and b.label >= 0] for split in ("train", "val")}
    _check_classes(sides["train"], classes)
    card = MilCard.parse(
        {
            "name": out.name,
            "classes": tuple(classes),
            "pooling": spec.pooling,
            "encoder": name,
            "node": node,
            "features": sides["train"][0].read().shape[1],
            "hidden": spec.hidden,
            "dropout": spec.dropout,
        },
        "the slide classifier to be written",
    )
    with reproducible(spec.seed, 1):
        state, history, best = _fit(card, spec, sides["train"], sides["val"], listen)
    left = sum(bag.label < 0 for bag in labelled)
    notes = (f"{left} slides without a label of {', '.join(classes)} were left out.",) if left else ()
    record = _record(card, spec, sides, history, best)
    write_folder(out, {**mil_files(card, state), RECORD: storage.to_json(record)})
    return MilTrained(out, best, tuple(history), {split: len(several) for split, several in sides.items()}, notes)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not (out / CARD).is_file():
        raise BundleError(f"{out} exists and is no slide classifier.", next_step="Choose another --out.")
    if out.exists() and not overwrite:
        raise BundleError(f"{out} exists already.", next_step="Choose another --out, or say --overwrite.")


def _labelled(bag: Bag, classes: Sequence[str], names: Mapping[str, str]) -> Bag:
    meant = class_of(bag.item.label, classes, names) if bag.item.label else None
    return Bag(bag.item, bag.out, bag.nodes, list(classes).index(meant) if meant else -1)


def _check_classes(train: Sequence[Bag], classes: Sequence[str]) -> None:
    counts = Counter(bag.label for bag in train)
    if missing := [name for i, name in enumerate(classes) if not counts[i]]:
        raise ConfigError(
            f"No training slide with features has the label {', '.join(missing)}.",
            next_step="Give labels in the cohort's column `label`, and score slides of every class.",
        )


def _fit(
    card: MilCard, spec: MilSpec, train: Sequence[Bag], val: Sequence[Bag], listen: Listener
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], int]:
    """Return the weights of the best epoch, what each epoch did, and which was best."""
    torch.manual_seed(seed_of(spec.seed, 0, "weights"))
    net = Mil(card)
    _standardise(net, train, spec)
    optimiser = torch.optim.AdamW(net.parameters(), spec.lr, weight_decay=spec.weight_decay)
    weights = _weights(train, len(card.classes))
    history: list[dict[str, Any]] = []
    best, least, state = -1, math.inf, {}
    for epoch in range(spec.epochs):
        train_loss = _epoch(net, optimiser, weights, spec, train, epoch)
        val_loss, accuracy = _validate(net, weights, val)
        if val_loss is not None and not math.isfinite(val_loss):
            raise NanScore(
                f"The validation loss of epoch {epoch} is {val_loss}.",
                next_step="Look for features that are not finite, or train with a lower lr.",
            )
        history.append({"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss, "val_accuracy": accuracy})
        loss = -float(epoch) if val_loss is None else val_loss
        if loss < least:
            best, least, state = epoch, loss, {k: v.detach().clone() for k, v in net.state_dict().items()}
        listen(EpochTrained(epoch + 1, spec.epochs, train_loss, val_loss, None))
        if epoch - best >= spec.patience:
            break
    return state, history, best


def _standardise(net: Mil, train: Sequence[Bag], spec: MilSpec) -> None:
    """Give the network each feature's mean and deviation over the training slides, all slides counting alike."""
    firsts, seconds = [], []
    for bag in train:
        h = _drawn(bag, spec, 0, "scale").double()
        firsts.append(h.mean(0))
        seconds.append((h**2).mean(0))
    mean = torch.stack(firsts).mean(0)
    std = (torch.stack(seconds).mean(0) - mean**2).clamp(min=0).sqrt()
    net.load_state_dict({**net.state_dict(), "mean": mean.float(), "std": torch.where(std > 1e-6, std, 1.0).float()})


def _drawn(bag: Bag, spec: MilSpec, epoch: int, what: str) -> torch.Tensor:
    """At most `max_tiles` of a bag's tiles, float32 (n, D), drawn by seed, epoch and slide."""
    features = bag.read()
    if len(features) > spec.max_tiles:
        rng = np.random.default_rng(seed_of(spec.seed, epoch, f"{what} {bag.item.slide_id}"))
        features = features[np.sort(rng.choice(len(features), spec.max_tiles, replace=False))]
    return torch.from_numpy(features.astype(np.float32))


def _weights(train: Sequence[Bag], k: int) -> torch.Tensor:
    """N / (K * n_c), as scikit-learn's "balanced"."""
    counts = np.bincount([bag.label for bag in train], minlength=k)
    return torch.from_numpy((counts.sum() / (k * counts)).astype(np.float32))


def _epoch(
    net: Mil, optimiser: torch.optim.Optimizer, weights: torch.Tensor, spec: MilSpec, train: Sequence[Bag], epoch: int
) -> float:
    net.train()
    torch.manual_seed(seed_of(spec.seed, epoch, "dropout"))
    total = 0.0
    for several in _steps(train, spec, epoch):
        optimiser.zero_grad(set_to_none=True)
        for bag in several:
            loss = _loss(net(_drawn(bag, spec, epoch, "tiles"))[0], bag.label, weights)
            (loss / len(several)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        optimiser.step()
    if not math.isfinite(total):
        raise NanScore(f"The training loss of epoch {epoch} is {total}.", next_step="Train with a lower lr.")
    return total / len(train)


def _steps(train: Sequence[Bag], spec: MilSpec, epoch: int) -> Iterator[list[Bag]]:
    order = np.random.default_rng([spec.seed, epoch]).permutation(len(train))
    for start in range(0, len(order), spec.batch):
        yield [train[i] for i in order[start : start + spec.batch]]


def _loss(logits: torch.Tensor, label: int, weights: torch.Tensor) -> torch.Tensor:
    return weights[label] * F.cross_entropy(logits[None], torch.tensor([label]))


def _validate(net: Mil, weights: torch.Tensor, val: Sequence[Bag]) -> tuple[float | None, float | None]:
    """Loss and accuracy over whole bags; None where there are none."""
    if not val:
        return None, None
    net.eval()
    losses, right = 0.0, 0
    with torch.inference_mode():
        for bag in val:
            logits, _ = net(torch.from_numpy(bag.read().astype(np.float32)))
            losses += float(_loss(logits, bag.label, weights))
            right += int(logits.argmax()) == bag.label
    return losses / len(val), right / len(val)


def _record(
    card: MilCard, spec: MilSpec, sides: Mapping[str, Sequence[Bag]], history: Sequence[Mapping[str, Any]], best: int
) -> dict[str, Any]:
    seen = {split: digest([bag.said() for bag in several]) for split, several in sides.items()}
    return {
        "schema": 1,
        "digest": digest([card.model_dump(mode="json"), spec.model_dump(mode="json"), versions(), seen]),
        "settings": spec.model_dump(mode="json"),
        "data": {
            "slide_ids": {split: sorted(bag.item.slide_id for bag in several) for split, several in sides.items()},
            "patients": {split: sorted({bag.item.patient for bag in several}) for split, several in sides.items()},
            "digest": seen,
        },
        "software": versions(),
        "best_epoch": best,
        "epochs": list(history),
    }

"""Training "skip-svm" and "two-models": features of frozen networks in one pass, machines, and the joining of two.

METHODS part 000. Nothing is chosen on rows whose patients the chosen part was fitted on, and nothing on test.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slideflow_ray import storage
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import Listener, Noted
from slideflow_ray.models.bundle import BundleCard, read_card
from slideflow_ray.models.networks import build, headless, load_network
from slideflow_ray.models.skip import SkipSvm, TwoModels, margin_of
from slideflow_ray.prepare import to_input
from slideflow_ray.train.augment import seed_of
from slideflow_ray.train.loop import EpochResult, State, Trained, Validation, device_of, reproducible
from slideflow_ray.train.spec import MachineSpec, TrainJob, TrainSpec
from slideflow_ray.train.svm import (
    Fitted,
    Floats,
    Ints,
    Joined,
    check_rows,
    fit_machine,
    fold_rows,
    join,
    joined_state,
    log_loss,
)
from slideflow_ray.train.tiles import ChunkTiles
from slideflow_ray.train.weights import familiar

if TYPE_CHECKING:
    from slideflow_ray.train.job import Data

MOST_ROWS = 50_000
"""A machine is fitted on so many rows at most: its time grows with their square."""

Train = Callable[[TrainJob, "Data"], Path]
"""Trains a job on given data, and returns its bundle."""


@dataclass(frozen=True, eq=False)
class Table:
    """What networks say of labelled images or tiles, in the order of their chunks.

    values : of each network float64 (n, D); labels : int64 (n,); patients : whose each row is; slide_ids : which
    """

    values: tuple[Floats, ...]
    labels: Ints
    patients: tuple[str, ...]
    slide_ids: tuple[str, ...]


def table_of(nets: Sequence[nn.Module], card: BundleCard, source: ChunkTiles, spec: TrainSpec) -> Table:
    """Return what each network gives for every labelled row of a source, in fp32, in one pass over the pixels."""
    device = device_of(spec)
    for net in nets:
        net.eval().to(device).to(memory_format=torch.channels_last)
    found: list[list[npt.NDArray[np.float32]]] = [[] for _ in nets]
    labels, patients, slides = [], [], []
    with torch.inference_mode():
        for pixels, known, items in source.in_order(spec.batch_size):
            x = to_input(pixels, card.mean, card.std, dtype=torch.float32, device=device)
            for net, rows in zip(nets, found, strict=True):
                rows.append(net(x).float().cpu().numpy())
            labels.append(known)
            patients += [item.patient for item in items]
            slides += [item.slide_id for item in items]
    if not labels:
        return Table(tuple(np.empty((0, 0)) for _ in nets), np.empty(0, np.int64), (), ())
    values = tuple(np.concatenate(rows).astype(np.float64) for rows in found)
    return Table(values, np.concatenate(labels).astype(np.int64), tuple(patients), tuple(slides))


# model B


def fit_skip_svm(
    card: BundleCard, job: TrainJob, data: Data, start: Mapping[str, torch.Tensor] | None, listen: Listener
) -> tuple[Trained, dict[str, Any]]:
    """Fit a machine on the features of a frozen backbone; return it and what the record says of it.

    A backbone that was trained on the same patients makes their features flatter than those of new ones: then all is
    chosen and calibrated on val. Raises ConfigError where there are too few patients, or too many rows.
    """
    began, spec = time.monotonic(), job.fit
    machine = spec.machine or MachineSpec()
    if card.arguments.get("support"):
        raise ConfigError("fit.arguments.support is found by fitting; leave it out.")
    with reproducible(spec.seed, spec.threads):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(spec.seed, 0, "weights"))
            net = build(card.architecture, card.arguments, card.n_classes)
        if not isinstance(net, SkipSvm):
            raise ConfigError(f"{card.architecture} has no machine.")
        if start is not None:
            begin_backbone(net.features.backbone, start)
        train = _rows_of(net.features, card, data.source("train"), spec)
        val = table_of([net.features], card, data.source("val"), spec)
        seen = _seen(job, data, listen)
        fitted = fit_machine(
            train.values[0],
            train.labels,
            train.patients,
            folds=machine.folds,
            seed=spec.seed,
            kernels=machine.kernels,
            components=net.machine.components,
            held=(val.values[0], val.labels, val.patients) if seen else None,
        )
        done = with_machine(card, net, fitted)
        judged = val if seen else train
        history = _history(fitted.oof, judged.labels, done[1], done[0], data, spec, began)
    said = {"machine": {**about(fitted), "judged": "val" if seen else "folds"}}
    return Trained(done[0], done[1], (history,), 0), said


def _seen(job: TrainJob, data: Data, listen: Listener) -> int:
    """How many of the training patients the weights to begin with have seen; said aloud: their folds judge kindly."""
    seen = familiar(job.fit.weights, data.people).trained
    if seen:
        listen(Noted(f"The backbone has seen {seen} of the training patients: all is chosen and calibrated on val."))
    return seen


def _rows_of(net: nn.Module, card: BundleCard, source: ChunkTiles, spec: TrainSpec) -> Table:
    if len(source) > MOST_ROWS:
        raise ConfigError(
            f"{len(source):,} rows are too many for a support vector machine, {MOST_ROWS:,} at most.",
            next_step="Thin the training split (sample.stride), or train a network.",
        )
    return table_of([net], card, source, spec)


def with_machine(card: BundleCard, net: SkipSvm, fitted: Fitted) -> tuple[BundleCard, State]:
    """Return the card and the state dict of a frozen network with its fitted machine."""
    arguments = {**card.arguments, "support": len(fitted.vectors)}
    state = {key: value.cpu() for key, value in net.state_dict().items() if not key.startswith("machine.")}
    return card.model_copy(update={"arguments": arguments}), {**state, **fitted.state()}


def begin_backbone(backbone: nn.Module, start: Mapping[str, torch.Tensor]) -> None:
    """Give a backbone the weights of a ResNet of its kind, with or without a head, or of a "skip-svm" bundle.

    Raises ConfigError where they do not fit.
    """
    inside = "features.backbone."
    own = backbone.state_dict()
    if any(key.startswith(inside) for key in start):
        start = {key.removeprefix(inside): value for key, value in start.items() if key.startswith(inside)}
    wrong = [key for key in own if key not in start or start[key].shape != own[key].shape]
    if wrong:
        raise ConfigError(
            f"The weights to start from do not fit the backbone: {len(wrong)} of its {len(own)} tensors "
            f"({', '.join(wrong[:3])}) are missing or of another shape.",
            next_step="Take weights, or a bundle, of the same ResNet (fit.arguments.backbone).",
        )
    backbone.load_state_dict({key: start[key] for key in own})


def about(fitted: Fitted) -> dict[str, Any]:
    """Return what the record says of a machine."""
    return {
        "kernel": fitted.kernel,
        "c": fitted.c,
        "gamma": fitted.gamma if fitted.kernel == "rbf" else None,
        "support_vectors": len(fitted.vectors) or None,
        "components": None if fitted.basis is None else len(fitted.basis),
        "auc_of_search": fitted.auc,
    }


# model C


def fit_two_models(
    card: BundleCard, job: TrainJob, data: Data, train: Train, listen: Listener
) -> tuple[Trained, dict[str, Any]]:
    """Train two models (or take those that are there), and join them by the rule that unseen patients speak for.

    Where the weights to begin with have seen the training patients, no fold of these is unseen: then it is val.
    Raises ConfigError where a bundle does not fit, or there are too few patients.
    """
    began, spec = time.monotonic(), job.fit
    machine = spec.machine or MachineSpec()
    by_folds = machine.judged == "folds" and not (machine.first or machine.second or _seen(job, data, listen))
    if by_folds or not machine.second:
        check_patients(data, "train", card.classes, machine.folds)
    if not by_folds:
        check_patients(data, "val", card.classes, 2)
    first, second = parts_of(card, job, data, train)
    _, net = load_network(first)
    own, other = load_network(second)
    if not isinstance(other, SkipSvm):
        raise ConfigError(f"{second} is no skip-svm.")
    with reproducible(spec.seed, spec.threads):
        nets = [Margin(net), Margin(other), nn.Sequential(_Both(headless(net, 2), other.features))]
        rows = table_of(nets, card, data.source("train"), spec)
        seen = _by_folds(card, job, data, train, other, rows) if by_folds else _by_val(nets, card, data, spec, rows)
        a, b = map(_sigmoid, seen.margins)
        oof = seen.joint.oof if seen.joint else None
        joined = join(a, b, seen.labels, seen.patients, oof, folds=machine.folds, rules=machine.rules)
        listen(Noted(sentence(joined)))
        done = _joined_network(card, read_card(first), own, (net, other), joined, seen.joint)
        history = _history(_chosen(joined, seen), seen.labels, done[1], done[0], data, spec, began)
    said: dict[str, Any] = {"join": {**_about_join(joined), "judged": seen.judged}}
    said["parts"] = {"first": read_card(first).name, "second": own.name}
    if joined.rule == "features" and seen.joint:
        said["machine"] = about(seen.joint)
    return Trained(done[0], done[1], (history,), 0), said


def check_patients(data: Data, split: str, classes: Sequence[str], folds: int) -> None:
    """Raise ConfigError where a split has not `folds` patients of each class: before hours of training, not after."""
    chunks = data.chunks[split]
    labels = np.concatenate([c.labels for c in chunks]) if chunks else np.empty(0, np.int64)
    check_rows(labels, [i.patient for c in chunks for i in c.item_of_row], folds, classes, f" in {split}")


class Margin(nn.Module):
    """A network of two classes as its margin of the second."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return margin_of(self.net(x))[:, None]


class _Both(nn.Module):
    """Features of two networks, side by side."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x).float(), self.other(x)], 1)


@dataclass(frozen=True, eq=False)
class _Unseen:
    """Predictions of both models for patients that they have not seen, float64 (n,) each, and a machine on both."""

    margins: tuple[Floats, Floats]
    labels: Ints
    patients: tuple[str, ...]
    joint: Fitted | None
    judged: str


def parts_of(card: BundleCard, job: TrainJob, data: Data, train: Train) -> tuple[Path, Path]:
    """Return the bundles of both models, training those that are not named. Raises ConfigError."""
    machine = job.fit.machine or MachineSpec()
    found = []
    for name, given in (("first", machine.first), ("second", machine.second)):
        if given:
            path = storage.local_path(given)
            _check_part(card, read_card(path), given)
            familiar(given, data.people)
        else:
            path = train(part_job(job, name), data)
        found.append(path)
    return found[0], found[1]


def part_job(job: TrainJob, name: str, fold: int | None = None) -> TrainJob:
    """Return the job of one of the two models, whose bundle stands below `work`/parts; of a fold if one is named."""
    told = dict(job.fit.arguments)
    if name == "first":
        architecture, arguments = told.get("first", "torchvision:resnet50"), told.get("first_arguments", {})
    else:
        architecture, arguments = "skip-svm", told.get("second", {})
    fit = job.fit.model_copy(update={"architecture": architecture, "arguments": arguments})
    if name == "first":
        fit = fit.model_copy(update={"machine": None})
    elif job.fit.machine:
        machine = job.fit.machine.model_copy(update={"first": None, "second": None})
        fit = fit.model_copy(update={"machine": machine})
    own = Path(job.out).name + f"-{name}" + ("" if fold is None else f"-{fold}")
    return job.model_copy(update={"fit": fit, "out": str(Path(job.work) / "parts" / own), "overwrite": True})


def _check_part(card: BundleCard, part: BundleCard, where: str) -> None:
    same = ("task", "classes", "tile_px", "mpp", "whole", "mean", "std", "stain")
    if wrong := [name for name in same if getattr(card, name) != getattr(part, name)]:
        raise ConfigError(
            f"{where} differs from this training in {', '.join(wrong)}.", next_step="Join models of the same images."
        )


def _by_folds(card: BundleCard, job: TrainJob, data: Data, train: Train, other: SkipSvm, rows: Table) -> _Unseen:
    """Predict each fold of the training patients by models that were not fitted on it."""
    spec, machine = job.fit, job.fit.machine or MachineSpec()
    a = np.empty(len(rows.labels))
    both, second = rows.values[2], rows.values[2][:, -other.features.dim :]
    crossed = []
    for k, (_, test) in enumerate(fold_rows(rows.labels, rows.patients, machine.folds, spec.seed)):
        away = {rows.patients[i] for i in test}
        net = load_network(train(part_job(job, "first", k), without(data, away)))[1]
        trunk = headless(net, 2)
        there = table_of([Margin(net), trunk], card, data.source("train"), spec)
        a[test] = there.values[0][test, 0]
        crossed.append(np.concatenate([there.values[1], second], 1))
    settings: dict[str, Any] = {"folds": machine.folds, "seed": spec.seed, "kernels": machine.kernels}
    components = other.machine.components
    alone = fit_machine(second, rows.labels, rows.patients, components=components, **settings)
    joint = None
    if "features" in machine.rules:
        joint = fit_machine(both, rows.labels, rows.patients, crossed=crossed, **settings)
    return _Unseen((a, _logit(alone.oof)), rows.labels, rows.patients, joint, "folds")


def _by_val(nets: Sequence[nn.Module], card: BundleCard, data: Data, spec: TrainSpec, rows: Table) -> _Unseen:
    """Predict the patients of val."""
    machine = spec.machine or MachineSpec()
    val = table_of(nets, card, data.source("val"), spec)
    if not len(val.labels):
        raise ConfigError("Two models are joined on val, and the cohort has no labelled rows there.")
    joint = None
    if "features" in machine.rules:
        held = (val.values[2], val.labels, val.patients)
        settings: dict[str, Any] = {"folds": machine.folds, "seed": spec.seed, "kernels": machine.kernels}
        joint = fit_machine(rows.values[2], rows.labels, rows.patients, held=held, **settings)
    return _Unseen((val.values[0][:, 0], val.values[1][:, 0]), val.labels, val.patients, joint, "val")


def without(data: Data, patients: set[str]) -> Data:
    """Return the data without some patients in train: their labels are unknown there."""
    return replace(data, chunks={**data.chunks, "train": [c.without(patients) for c in data.chunks["train"]]})


def _joined_network(
    card: BundleCard,
    a: BundleCard,
    b: BundleCard,
    nets: tuple[nn.Module, SkipSvm],
    joined: Joined,
    joint: Fitted | None,
) -> tuple[BundleCard, State]:
    arguments: dict[str, Any] = {
        "first": a.architecture,
        "first_arguments": a.arguments,
        "second": b.arguments,
        "rule": joined.rule,
        "support": len(joint.vectors) if joined.rule == "features" and joint else 0,
    }
    net = build(card.architecture, arguments, 2)
    if not isinstance(net, TwoModels):
        raise ConfigError(f"{card.architecture} joins nothing.")
    net.second.load_state_dict(nets[1].state_dict())
    if joined.rule == "features" and joint:
        net.trunk.load_state_dict(headless(nets[0], 2).state_dict())
        state = {**net.state_dict(), **joint.state()}
    else:
        net.first.load_state_dict(nets[0].state_dict())
        state = {**net.state_dict(), **joined_state(joined)}
    return card.model_copy(update={"arguments": arguments}), {key: value.cpu() for key, value in state.items()}


def _chosen(joined: Joined, seen: _Unseen) -> Floats:
    """The kept rule's probabilities of unseen patients."""
    if joined.rule == "features" and seen.joint:
        return seen.joint.oof
    a, b = seen.margins
    if joined.rule == "vote":
        return joined.weight * _sigmoid(a) + (1 - joined.weight) * _sigmoid(b)
    x, y, z = joined.coefficients
    return _sigmoid(x * a + y * b + z)


def sentence(joined: Joined) -> str:
    """Return what joining came to, in words."""
    losses = ", ".join(f"{name} {value:.4f}" for name, value in joined.losses.items())
    how = f" (weight {joined.weight:.2f} of the first)" if joined.rule == "vote" else ""
    verdict = "below either model alone" if joined.helps else "which is NOT below the better model alone"
    return f'Joined by "{joined.rule}"{how}, {verdict}. Log loss on unseen patients: {losses}.'


def _about_join(joined: Joined) -> dict[str, Any]:
    return {
        "rule": joined.rule,
        "weight": joined.weight if joined.rule == "vote" else None,
        "coefficients": list(joined.coefficients) if joined.rule == "stack" else None,
        "log_loss": dict(joined.losses),
        "helps": joined.helps,
        "said": sentence(joined),
    }


# both


def _history(
    oof: Floats, labels: Ints, state: State, card: BundleCard, data: Data, spec: TrainSpec, began: float
) -> EpochResult:
    """One epoch's worth of words: loss and accuracy of unseen rows as those of training, and val by the bundle."""
    net = build(card.architecture, card.arguments, card.n_classes)
    net.load_state_dict(dict(state))
    val = table_of([Margin(net)], card, data.source("val"), spec)
    right = float(((oof >= 0.5) == (labels == 1)).mean())
    n = len(data.source("train"))
    return EpochResult(0, log_loss(oof, labels), 0.0, _validation(val), right, n, time.monotonic() - began)


def _validation(val: Table) -> Validation | None:
    from sklearn.metrics import roc_auc_score

    if not len(val.labels):
        return None
    margins = val.values[0][:, 0]
    auc = float(roc_auc_score(val.labels, margins)) if len(set(val.labels.tolist())) == 2 else float("nan")
    right = float(((margins >= 0) == (val.labels == 1)).mean())
    return Validation(log_loss(_sigmoid(margins), val.labels), right, auc)


def _sigmoid(margins: Floats) -> Floats:
    from scipy.special import expit

    return np.asarray(expit(margins))


def _logit(p: Floats) -> Floats:
    from scipy.special import logit

    return np.asarray(logit(np.clip(p, 1e-12, 1 - 1e-12)))

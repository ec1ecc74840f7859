"""Weights to begin with: a safetensors file of the user's own. Nothing is fetched and nothing is unpickled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slideflow_ray import storage
from slideflow_ray.errors import ConfigError
from slideflow_ray.identity import file_sha256
from slideflow_ray.models.bundle import WEIGHTS, forward_digest
from slideflow_ray.train.record import RECORD
from slideflow_ray.train.spec import IMAGENET, RANDOM, SE_RESNET, TrainSpec

if TYPE_CHECKING:
    import torch

FOLDER = "SLIDEFLOW_RAY_WEIGHTS"
"""Where ImageNet weights are looked for: torchvision-resnet50.safetensors, timm-seresnet50.safetensors, ..."""


@dataclass(frozen=True)
class Start:
    """What a training begins with: a state dict or None (random), where it is from, and what to tell the user."""

    state: dict[str, torch.Tensor] | None
    source: str
    note: str = ""


class People(NamedTuple):
    """Whose slides a split has, and what the files are (identities)."""

    patients: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()


NOBODY = People()


class Familiar(NamedTuple):
    """How many training patients the weights' own training has seen, and what people should be told."""

    trained: int
    note: str = ""


def familiar(weights: str, people: Mapping[str, People]) -> Familiar:
    """Return what the weights to begin with have seen of a training's patients, by the record of their own training.

    people : of this training's train, val and test. Weights without a record beside them are strangers to all.
    Raises ConfigError where they were trained on patients (or files) of val, who would be no judges, or trained on or
    chosen by those of test. A pre-training saw no labels: that it saw val's patients is a note.
    """
    record = _record_of(weights)
    theirs = {split: _recorded(record, split) for split in ("train", "val")}
    blind = record.get("settings", {}).get("task") == "pretrain"
    note = ""
    for how, split, mine in (
        ("trained on", "train", "test"),
        ("chosen by", "val", "test"),
        ("trained on", "train", "val"),
    ):
        told = in_common(theirs[split], people.get(mine, NOBODY))
        if not told:
            continue
        said = f"{weights} was {how} {told[0]} of this training's {mine} split ({told[1]})"
        if not blind or mine == "test":
            raise ConfigError(f"{said}.", next_step="Train both on the same split.")
        note = f"{said}, without labels: val judges a little kindly."
    return Familiar(len(theirs["train"].patients & people.get("train", NOBODY).patients), note)


def in_common(one: People, other: People) -> tuple[str, str] | None:
    """Return what two have in common, counted and named: patients, or files if no patient; None for nothing."""
    for what in ("patients", "files"):
        if both := sorted(getattr(one, what) & getattr(other, what)):
            return f"{len(both)} {what}", ", ".join(both[:3])
    return None


def _recorded(record: Mapping[str, Any], split: str) -> People:
    data = record.get("data", {})
    return People(*(frozenset(data.get(what, {}).get(split, ())) for what in ("patients", "slides")))


def _record_of(weights: str) -> dict[str, Any]:
    if weights in (RANDOM, IMAGENET):
        return {}
    path = storage.local_path(weights)
    return storage.read_json((path if path.is_dir() else path.parent) / RECORD) or {}


def find_weights(spec: TrainSpec) -> Start:
    """Return the weights that `spec.weights` names.

    ImageNet's that are not there are no error: the training says so and starts from random. Raises ConfigError
    for a named file that is missing or is not safetensors. A bundle's folder stands for its weights.
    """
    start = _start(spec)
    if spec.machine is None or not (spec.machine.first or spec.machine.second):
        return start
    parts = [f"{name} {forward_digest(path)}" for name, path in spec.machine.given.items()]
    return replace(start, source=", ".join([start.source, *parts]))


def _start(spec: TrainSpec) -> Start:
    if spec.weights == RANDOM:
        return Start(None, RANDOM)
    if spec.weights == IMAGENET:
        name = network_of(spec)
        return _encoder(str(spec.arguments.get("encoder_name", "resnet34"))) if _is_smp(name) else _imagenet(name)
    path = storage.local_path(spec.weights)
    return _file(path / WEIGHTS if path.is_dir() else path, "")


def network_of(spec: TrainSpec) -> str:
    """Return the architecture that weights to begin with are of: of a machine its backbone, of two models the first."""
    key = {"skip-svm": "backbone", "two-models": "first"}.get(spec.architecture)
    return str(spec.arguments.get(key, "torchvision:resnet50")) if key else spec.architecture


def _is_smp(architecture: str) -> bool:
    return architecture.startswith("smp:")


def _imagenet(architecture: str) -> Start:
    if architecture == SE_RESNET:
        return _stem()
    name = f"{architecture.replace(':', '-')}.safetensors"
    folder = os.environ.get(FOLDER)
    if folder and (Path(folder) / name).is_file():
        return _file(Path(folder) / name, f"{IMAGENET} ")
    if architecture == "unet":
        raise ConfigError(
            "There are no ImageNet weights for unet: nobody has trained it on ImageNet.",
            next_step='Use architecture "smp:Unet", arguments = {encoder_name = "resnet18"}: its encoder takes them.',
        )
    where = f"{folder} has no {name}" if folder else f"${FOLDER} names no folder"
    note = (
        f"No ImageNet weights for {architecture} ({where}), and none are fetched: starting from random weights. "
        f"To have them: slideflow-ray convert FILE.pth --architecture {architecture} --as-weights {name}"
    )
    return Start(None, f"{RANDOM} ({IMAGENET} was asked for)", note)


def _encoder(name: str) -> Start:
    """The weights of a ResNet, torchvision's or timm's, which name it alike, for an encoder of smp's.

    Raises ConfigError for an encoder that neither has by smp's names.
    """
    own = name.removeprefix("tu-")
    libraries = ["torchvision"] if own.startswith(("resnet", "resnext")) else []
    libraries = ["timm", *libraries] if own != name else [*libraries, "timm"] if libraries else []
    if not libraries:
        raise ConfigError(
            f"ImageNet weights for smp's encoder {name} have names of their own, and none are looked for.",
            next_step='Take encoder_name = "resnet18", "resnet34", "resnet50" and the like, or "tu-NAME" of timm.',
        )
    starts = [_imagenet(f"{library}:{own}") for library in libraries]
    return next((start for start in starts if start.state is not None), starts[0])


def _stem() -> Start:
    """The stem of ImageNet's ResNet-50, all that fits an SE-ResNet of asymmetric convolutions."""
    from slideflow_ray.models.seresnet import STEM

    found = _imagenet("torchvision:resnet50")
    said = f"There are no ImageNet weights for the blocks of {SE_RESNET}; only its stem can have ResNet-50's."
    if found.state is None:
        return Start(None, found.source, f"{said} {found.note}")
    state = {key: value for key, value in found.state.items() if key.startswith(STEM)}
    note = f"{said} It has them, and the blocks start from random weights."
    return Start(state, found.source.replace(IMAGENET, f"{IMAGENET} stem"), note)


def _file(path: Path, kind: str) -> Start:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ConfigError(f"There are no weights {path}.", next_step='Correct fit.weights, or use "random".')
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ConfigError(
            f"{path} is not a complete safetensors file: {error}.",
            next_step=f"slideflow-ray convert {path} --architecture KEY --as-weights FILE.safetensors",
        ) from error
    return Start(state, f"{kind}sha256:{file_sha256(path)}")

"""Weights to begin with: a safetensors file of the user's own. Nothing is fetched and nothing is unpickled."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from slideflow_ray import storage
from slideflow_ray.errors import ConfigError
from slideflow_ray.identity import file_sha256
from slideflow_ray.models.bundle import WEIGHTS, forward_digest
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
        return _imagenet(network_of(spec))
    path = storage.local_path(spec.weights)
    return _file(path / WEIGHTS if path.is_dir() else path, "")


def network_of(spec: TrainSpec) -> str:
    """Return the architecture that weights to begin with are of: of a machine its backbone, of two models the first."""
    key = {"skip-svm": "backbone", "two-models": "first"}.get(spec.architecture)
    return str(spec.arguments.get(key, "torchvision:resnet50")) if key else spec.architecture


def _imagenet(architecture: str) -> Start:
    if architecture == SE_RESNET:
        return _stem()
    name = f"{architecture.replace(':', '-')}.safetensors"
    folder = os.environ.get(FOLDER)
    if folder and (Path(folder) / name).is_file():
        return _file(Path(folder) / name, f"{IMAGENET} ")
    where = f"{folder} has no {name}" if folder else f"${FOLDER} names no folder"
    note = (
        f"No ImageNet weights for {architecture} ({where}), and none are fetched: starting from random weights. "
        f"To have them: slideflow-ray convert FILE.pth --architecture {architecture} --as-weights {name}"
    )
    return Start(None, f"{RANDOM} ({IMAGENET} was asked for)", note)


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

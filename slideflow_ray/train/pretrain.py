"""Pre-training as the training loop sees it: a network with the head of a method, and a step of two views.

The loop, its checkpoints, its resume and Ray Train are those of every training; what is kept is the network alone,
encoder and decoder, as weights that a training begins with (`fit.weights`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slideflow_ray.errors import ConfigError
from slideflow_ray.models.networks import find_head, replace
from slideflow_ray.models.unet import Unet
from slideflow_ray.train.pretext import Decoded, Told, make_pretext
from slideflow_ray.train.regcon import Health, Weights
from slideflow_ray.train.spec import PretextSpec
from slideflow_ray.train.views import Tone, Views, two_views

Tensor = torch.Tensor
State = dict[str, Tensor]
NET = "net."


class PretextNet(nn.Module):
    """A segmentation network without its head, and the head of a method on it.

    Raises ConfigError for a network that is no U-Net of ours and no encoder with a decoder of smp's.
    """

    def __init__(self, net: nn.Module, spec: PretextSpec, n_classes: int, channels: int = 3) -> None:
        super().__init__()
        if not (isinstance(net, Unet) or hasattr(net, "segmentation_head")):
            raise ConfigError(
                f"{type(net).__name__} decodes nothing; pre-training is for networks that segment.",
                next_step='Use architecture "unet" or "smp:NAME".',
            )
        name, _ = find_head(net, n_classes)
        replace(net, name, nn.Identity())
        self.net = net
        side = 2 * (net.stride if isinstance(net, Unet) else 32)
        net.eval()  # batch norm must not learn from nothing
        with torch.inference_mode():
            found = self.decode(torch.zeros(1, channels, side, side))
        net.train()
        weights = Weights(spec.grey, spec.semantic, spec.consistency, spec.between)
        deep, full = found.deep.shape[1], found.full.shape[1]
        self.head = make_pretext(spec.method, full, deep, spec.regions, weights, spec.negatives)
        if spec.method == "simclr":  # its loss does not reach the decoder
            _keep_decoder(net)

    def decode(self, x: Tensor) -> Decoded:
        """Return the deepest and the decoded features of a view; the latter at the view's own size."""
        if isinstance(self.net, Unet):
            return Decoded(*self.net.decode(x))
        encoder, decoder = self.net.get_submodule("encoder"), self.net.get_submodule("decoder")
        features = encoder(x)
        full = decoder(features)
        if full.shape[2:] != x.shape[2:]:
            full = nn.functional.interpolate(full, x.shape[2:], mode="bilinear")
        return Decoded(features[-1], full)

    def forward(self, one: Tensor, two: Tensor, views: Views) -> Told:
        """Return the loss of two views as the network is shown them, float32 (n, C, T, T) each."""
        parts = [Decoded(*(features.float() for features in self.decode(view))) for view in (one, two)]
        with torch.autocast(one.device.type, enabled=False):  # shares and exponentials need the digits
            found: Told = self.head(views, *parts)
        return found


def _keep_decoder(net: nn.Module) -> None:
    for part in ("up", "join") if isinstance(net, Unet) else ("decoder",):
        for parameter in net.get_submodule(part).parameters():
            parameter.requires_grad_(False)


def shown(views: Views, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> list[Tensor]:
    """Return both views as the network's input: scaled by the mean and deviation of the card."""
    a, b = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    return [((view.to(device) - a) / b).contiguous(memory_format=torch.channels_last) for view in views.shown]


def views_of(pixels: Any, spec: PretextSpec, seed: int) -> Views:
    """Return two views of tiles, uint8 (n, T, T, 3)."""
    images = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255
    tone = Tone(spec.gamma, spec.contrast, spec.noise, spec.blur)
    return two_views(images, seed, tone)


def on_device(views: Views, device: torch.device) -> Views:
    """Return the views with what the losses compare on a device."""
    return views._replace(grey=(views.grey[0].to(device), views.grey[1].to(device)))


def said_of(told: Told) -> dict[str, float]:
    """Return what is written down of a step: the parts of its loss, active regions, entropy, shares of regions."""
    found = dict(told.parts)
    if told.health is not None:
        found |= {key: getattr(told.health, key) for key in ("active", "entropy", "information")}
        found |= {f"share_{k}": share for k, share in enumerate(told.health.shares)}
    return found


def alarm_of(parts: Mapping[str, float]) -> str | None:
    """Return why an epoch's regions have collapsed, in one sentence, or None."""
    if "active" not in parts:
        return None
    shares = tuple(value for key, value in parts.items() if key.startswith("share_"))
    why = Health(parts["active"], parts["entropy"], shares, parts["information"]).alarm
    return f"The regions collapse: {why}. More `between`, fewer regions or a lower lr may help." if why else None


def kept(state: Mapping[str, Tensor]) -> State:
    """Return what a pre-training leaves: the network's weights by their own names, without any head."""
    return {key.removeprefix(NET): value for key, value in state.items() if key.startswith(NET)}


def mean_parts(found: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return the mean of each part over an epoch's steps, each weighed by its tiles."""
    tiles = sum(n for n, _ in found)
    keys = dict.fromkeys(key for _, parts in found for key in parts)
    return {key: math.fsum(n * parts.get(key, 0.0) for n, parts in found) / tiles for key in keys}

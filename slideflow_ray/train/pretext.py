"""What a network is pre-trained to do without labels: USRegCon, and three methods to compare it with.

The three are the ideas of their papers on this project's network and views, not their recipes: one network for both
views (no momentum encoder), no queue, the decoder trained where the idea reaches it. LightlySSL has the losses, but
pins an old parser that other parts of this project's environment need newer, so they are written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from slideflow_ray.train.regcon import (
    NEVER,
    Health,
    Negatives,
    RegionHead,
    Regions,
    Weights,
    health,
    joint_loss,
    pooled,
    semantic_loss,
)
from slideflow_ray.train.views import Views

Tensor = torch.Tensor
Method = Literal["usregcon", "simclr", "pixcontrast", "detcon"]


class Decoded(NamedTuple):
    """What a network makes of a view: deepest features (n, D, h, w) and decoded features (n, C, H, W)."""

    deep: Tensor
    full: Tensor


class Told(NamedTuple):
    """A loss, its parts as numbers, and how the regions stand where there are any."""

    loss: Tensor
    parts: dict[str, float]
    health: Health | None = None


class Pretext(Protocol):
    """A head on a network that is pre-trained; its own parameters are thrown away afterwards."""

    def __call__(self, views: Views, one: Decoded, two: Decoded) -> Told: ...


class UsRegCon(nn.Module):
    """Regions that the network finds itself (`regcon`)."""

    def __init__(
        self, channels: int, regions: int = 8, weights: Weights | None = None, negatives: Negatives = "masked"
    ) -> None:
        super().__init__()
        self.head = RegionHead(channels, regions)
        self.weights = weights or Weights()
        self.negatives: Negatives = negatives

    def forward(self, views: Views, one: Decoded, two: Decoded) -> Told:
        """Return L = alpha L_g + beta L_s + eta L_c."""
        found = joint_loss(self.head, (one.full, two.full), views.grey, views.turn.undo, self.weights, self.negatives)
        numbers = ("within", "between", "semantic", "consistency")
        return Told(found.total, {name: float(getattr(found, name)) for name in numbers}, health(found.regions))


class SimClr(nn.Module):
    """Whole images: the other view of the same image among all views (Chen et al., ICML 2020, eq. 1).

    The decoder sees no loss, so that it stays as it was drawn.
    """

    def __init__(self, deep: int, temperature: float = 0.2, projection: int = 128) -> None:
        super().__init__()
        self.project = _mlp(deep, projection)
        self.temperature = temperature

    def forward(self, views: Views, one: Decoded, two: Decoded) -> Told:
        """Return NT-Xent of the images' mean deep features."""
        a, b = (F.normalize(self.project(part.deep.mean((2, 3))), dim=1) for part in (one, two))
        loss = nt_xent(a, b, self.temperature)
        return Told(loss, {"contrast": float(loss.detach())})


class PixContrast(nn.Module):
    """Pixels: the same place in the other view among other places (Xie et al., CVPR 2021, PixContrast, eq. 2).

    Views show the same window here, so the positive is the very pixel; `places` of each image are drawn.
    """

    def __init__(self, channels: int, places: int = 64, temperature: float = 0.3, projection: int = 64) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1), nn.ReLU(inplace=True), nn.Conv2d(2 * channels, projection, 1)
        )
        self.places, self.temperature = places, temperature

    def forward(self, views: Views, one: Decoded, two: Decoded) -> Told:
        """Return InfoNCE of pixels drawn from the decoded features of both views, laid on each other."""
        a, b = self.project(one.full), views.turn.undo(self.project(two.full))
        n, c, h, w = a.shape
        at = torch.stack([torch.randperm(h * w, device=a.device)[: self.places] for _ in range(n)])
        index = at[:, None].expand(n, c, at.shape[1])
        rows = [F.normalize(part.flatten(2).gather(2, index).transpose(1, 2).reshape(-1, c), dim=1) for part in (a, b)]
        loss = (_cross(rows[0], rows[1], self.temperature) + _cross(rows[1], rows[0], self.temperature)) / 2
        return Told(loss, {"contrast": float(loss.detach())})


class DetCon(nn.Module):
    """Regions that a classical segmentation has found (Henaff et al., ICCV 2021): Felzenszwalb's, on the grey image."""

    def __init__(self, channels: int, scale: float = 100.0, least_px: int = 60, temperature: float = 0.1) -> None:
        super().__init__()
        self.project = _mlp(channels, 128)
        self.scale, self.least_px, self.temperature = scale, least_px, temperature

    def forward(self, views: Views, one: Decoded, two: Decoded) -> Told:
        """Return InfoNCE of mask-pooled features; every other mask of the batch's other view is a negative."""
        masks = self.masks(views.grey[0])
        q = [
            F.normalize(self.project(pooled(masks.assign, full)), dim=-1)
            for full in (one.full, views.turn.undo(two.full))
        ]
        loss = semantic_loss(q[0], q[1], masks.active, masks.active, self.temperature, "all")
        return Told(loss, {"contrast": float(loss.detach())})

    def masks(self, grey: Tensor, most: int = 16) -> Regions:
        """Return the `most` largest segments of each image as regions, with shares of 0 and 1."""
        from skimage.segmentation import felzenszwalb

        found = torch.zeros((len(grey), most, *grey.shape[1:]))
        for image, planes in zip(grey.cpu().numpy(), found, strict=True):
            labels = felzenszwalb(image, scale=self.scale, sigma=0.8, min_size=self.least_px)
            largest = np.argsort(-np.bincount(labels.ravel()), kind="stable")[:most]
            for plane, label in zip(planes, largest, strict=False):
                plane[torch.from_numpy(labels == label)] = 1
        found = found.to(grey.device)
        share = found.mean((2, 3))
        return Regions(found, share, share > 0)


def _mlp(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, 2 * inside), nn.ReLU(inplace=True), nn.Linear(2 * inside, outside))


def nt_xent(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """Return the normalised temperature-scaled cross-entropy of n pairs; rows are of length 1, (n, D) each."""
    n = len(one)
    both = torch.cat([one, two])
    logits = both @ both.T / temperature
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=one.device), NEVER)
    target = torch.arange(2 * n, device=one.device).roll(n)
    return F.cross_entropy(logits, target)


def _cross(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(one @ two.T / temperature, torch.arange(len(one), device=one.device))


def make_pretext(
    method: Method, channels: int, deep: int, regions: int, weights: Weights, negatives: Negatives
) -> nn.Module:
    """Return the head of a method on a network with `channels` decoded and `deep` deepest features."""
    makers: dict[Method, Callable[[], nn.Module]] = {
        "usregcon": lambda: UsRegCon(channels, regions, weights, negatives),
        "simclr": lambda: SimClr(deep),
        "pixcontrast": lambda: PixContrast(channels),
        "detcon": lambda: DetCon(channels),
    }
    return makers[method]()

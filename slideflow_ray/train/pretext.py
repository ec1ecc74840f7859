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
Method = Literal["usregcon", "simclr", "pixpro", "detcon"]


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


class PixPro(nn.Module):
    """Pixels: what a place's likes say of it agrees with the other view (Xie et al., CVPR 2021, PixPro, eqs. 3 to 5).

    Decoded features are pooled to at most `side` x `side` places and projected. Views show the same window here, laid
    on each other, so that at `near` = 0.7 (of a bin's diagonal, as in the paper) a place is compared with itself.
    Where the paper's target is a momentum encoder, one network serves both views; batch norm at the projection's end
    and a target without gradient keep that from collapsing (as in Chen and He's SimSiam, CVPR 2021).
    """

    def __init__(
        self, channels: int, side: int = 16, near: float = 0.7, gamma: float = 2.0, projection: int = 64
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1, bias=False),
            nn.BatchNorm2d(4 * channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * channels, projection, 1, bias=False),
            nn.BatchNorm2d(projection, affine=False),
        )
        self.transform = nn.Linear(projection, projection)
        self.side, self.near, self.gamma = side, near, gamma

    def forward(self, views: Views, one: Decoded, two: Decoded) -> Told:
        """Return minus the mean cosine, summed both ways, of what is propagated in one view and found in the other."""
        a = self.project(_binned(one.full, self.side))
        b = views.turn.undo(self.project(_binned(two.full, self.side)))
        pairs = near_pairs(a.shape[2], a.shape[3], self.near, a.device)
        x, other = (part.flatten(2).transpose(1, 2) for part in (a, b))
        loss = self.agreement(x, other, pairs) + self.agreement(other, x, pairs)
        return Told(loss, {"contrast": float(loss.detach())})

    def agreement(self, x: Tensor, target: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Return -cos(y_i, x'_j), meant over images and pairs of places; features (n, places, C)."""
        i, j = pairs
        y = propagated(x, self.transform(x), self.gamma)
        return -F.cosine_similarity(y[:, i], target.detach()[:, j], dim=2).mean()


def _binned(features: Tensor, side: int) -> Tensor:
    """Return features, (n, C, H, W), as means of at most `side` x `side` bins, which lie alike whichever way turned."""
    h, w = features.shape[2:]
    return F.adaptive_avg_pool2d(features, (min(h, side), min(w, side)))


def propagated(x: Tensor, transformed: Tensor, gamma: float) -> Tensor:
    """Return y_i = sum_j max(cos(x_i, x_j), 0)^gamma g(x_j) of places, (n, places, C)."""
    unit = F.normalize(x, dim=2)
    return (unit @ unit.transpose(1, 2)).clamp(min=0) ** gamma @ transformed


def near_pairs(height: int, width: int, near: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the pairs (i, j) of places of a grid that are nearer than `near` diagonals of a bin, row by row."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    at = torch.cartesian_prod(rows, columns).float()
    i, j = (torch.cdist(at, at) < near * 2**0.5).nonzero(as_tuple=True)
    return i, j


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


def make_pretext(
    method: Method, channels: int, deep: int, regions: int, weights: Weights, negatives: Negatives
) -> nn.Module:
    """Return the head of a method on a network with `channels` decoded and `deep` deepest features."""
    makers: dict[Method, Callable[[], nn.Module]] = {
        "usregcon": lambda: UsRegCon(channels, regions, weights, negatives),
        "simclr": lambda: SimClr(deep),
        "pixpro": lambda: PixPro(channels),
        "detcon": lambda: DetCon(channels),
    }
    return makers[method]()

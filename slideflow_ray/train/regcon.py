"""USRegCon: regions that a network finds by itself, and the losses that teach it to, without a label.

Lin et al., J South Med Univ 2023;43(5):815-824 (doi 10.12122/j.issn.1673-4254.2023.05.18) say the three steps: divide
the decoded image into regions, pool a grey and a semantic representation of each, contrast them. The forms below are
those of METHODS, part 002: assignment as SlotCon's (Wen et al., NeurIPS 2022), pairs as DetCon's (Henaff et al., ICCV
2021). Shapes: n images, K regions, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor
Negatives = Literal["masked", "all"]

NEVER = -1e30
"""The logit of a pair that is none; finite, so that a row without any negative has a gradient of 0 and not NaN."""


class Regions(NamedTuple):
    """How the pixels of each image are shared out.

    assign : (n, K, H, W), for each pixel a share of 1 over the regions
    share : (n, K), each region's part of the image, pi_k = a_k / HW
    active : bool (n, K), regions with a share above rho
    """

    assign: Tensor
    share: Tensor
    active: Tensor


def divide(embeddings: Tensor, prototypes: Tensor, temperature: float = 0.1, least: float = 0.01) -> Regions:
    """Share each pixel out over the prototypes: A_k(p) = softmax_k(<e_p, c_k> / tau_a).

    embeddings : (n, C, H, W); prototypes : (K, C); both are brought to length 1 here
    least : rho, the share above which a region is active
    """
    e, c = F.normalize(embeddings, dim=1), F.normalize(prototypes, dim=1)
    assign = torch.softmax(torch.einsum("nchw,kc->nkhw", e, c) / temperature, dim=1)
    share = assign.mean((2, 3))
    return Regions(assign, share, share > least)


def pooled(assign: Tensor, values: Tensor) -> Tensor:
    """Return the mean of `values`, (n, C, H, W), over each region, (n, K, C), each pixel weighing as much as its share.

    A region without any share has the mean 0 and no gradient.
    """
    area = assign.sum((2, 3)).clamp(min=torch.finfo(assign.dtype).tiny)
    return torch.einsum("nkhw,nchw->nkc", assign, values) / area[..., None]


def greys(assign: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the grey values, image (n, H, W), of each region: (n, K) and (n, K).

    sum_k pi_k (var_k + (mu_k - mean)^2) is the variance of the image: the law of total variance.
    """
    mean = pooled(assign, image[:, None])[..., 0]
    apart = (image[:, None] - mean[..., None, None]) ** 2
    area = assign.sum((2, 3)).clamp(min=torch.finfo(assign.dtype).tiny)
    return mean, (assign * apart).sum((2, 3)) / area


def grey_loss(regions: Regions, image: Tensor, temperature: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return what regions differ inside, relative to the image's variance, and how near their greys are to each other.

    within : mean over images of sum_k pi_k var_k / Var I; 1 for one region that holds everything, whatever the contrast
    between : mean over images of exp(-|mu_k - mu_l| / tau_g) over pairs of active regions; 0 where there is one

    The area-weighted variance between regions would say nothing new: it is Var I minus what is within.
    """
    mean, variance = greys(regions.assign, image)
    whole = image.var((1, 2), unbiased=False).clamp(min=1e-8)
    within = (regions.share * variance).sum(1) / whole
    near = torch.exp(-(mean[:, :, None] - mean[:, None]).abs() / temperature)
    pair = _pairs(regions.active)
    between = (near * pair).sum((1, 2)) / pair.sum((1, 2)).clamp(min=1)
    return within.mean(), between.mean()


def _pairs(active: Tensor) -> Tensor:
    """Return which ordered pairs of different regions are both active, bool (n, K, K)."""
    k = active.shape[1]
    other = ~torch.eye(k, dtype=torch.bool, device=active.device)
    return active[:, :, None] & active[:, None] & other


def semantic_loss(
    one: Tensor,
    two: Tensor,
    active_one: Tensor,
    active_two: Tensor,
    temperature: float = 0.2,
    negatives: Negatives = "masked",
) -> Tensor:
    """Return InfoNCE over regions, symmetrised: the same region in both views attracts, others repel.

    one, two : (n, K, D) of length 1, the regions of both views; active_one, active_two : bool (n, K)
    negatives : "masked" leaves out regions of the same index in other images, which show the same tissue;
        "all" takes them

    0 where no region is active in both views.
    """
    forth = _info_nce(one, two, active_one, active_two, temperature, negatives)
    back = _info_nce(two, one, active_two, active_one, temperature, negatives)
    return (forth + back) / 2


def _info_nce(
    one: Tensor, two: Tensor, active_one: Tensor, active_two: Tensor, temperature: float, negatives: Negatives
) -> Tensor:
    n, k, _ = one.shape
    logits = (one.flatten(0, 1) @ two.flatten(0, 1).T) / temperature
    itself = torch.eye(n * k, dtype=torch.bool, device=one.device)
    index = torch.arange(k, device=one.device).repeat(n)
    candidate = active_two.flatten()[None] & ~itself
    if negatives == "masked":
        candidate = candidate & (index[:, None] != index[None])
    positive = (active_one & active_two).flatten()
    logits = logits.masked_fill(~(candidate | itself), NEVER)
    losses = torch.logsumexp(logits, 1) - logits.diagonal()
    return (losses * positive).sum() / positive.sum().clamp(min=1)


def consistency_loss(one: Tensor, two: Tensor) -> Tensor:
    """Return the cross-entropy of view one's shares under view two's, (n, K, H, W) both, pixel on pixel.

    L_c = -mean_p sum_k sg(A2_k(p)) log A1_k(p): no gradient reaches `two`.
    """
    return -(two.detach() * one.clamp(min=1e-12).log()).sum(1).mean()


class Parts(NamedTuple):
    """The parts of a loss, each a number of its own, and what is said of the regions."""

    total: Tensor
    within: Tensor
    between: Tensor
    semantic: Tensor
    consistency: Tensor
    regions: Regions


@dataclass(frozen=True)
class Weights:
    """How much each part counts: alpha L_g + beta L_s + eta L_c with L_g = within + lambda_b between."""

    grey: float = 1.0
    semantic: float = 1.0
    consistency: float = 0.5
    between: float = 1.0


class RegionHead(nn.Module):
    """What stands on a decoder while it is pre-trained: embedding, prototypes and the projection of regions.

    channels : C of the decoder's features; the projection is C -> 2C -> `projection`
    """

    def __init__(self, channels: int, regions: int = 8, projection: int = 128, embedding: int | None = None) -> None:
        super().__init__()
        size = embedding or channels
        self.embed = nn.Conv2d(channels, size, 1)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(regions, size), dim=1))
        self.project = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.ReLU(inplace=True), nn.Linear(2 * channels, projection)
        )

    def divide(self, features: Tensor, temperature: float = 0.1, least: float = 0.01) -> Regions:
        """Divide images by their decoded features, (n, C, H, W)."""
        return divide(self.embed(features), self.prototypes, temperature, least)

    def describe(self, regions: Regions, features: Tensor) -> Tensor:
        """Return each region's semantic vector q_k = L2norm(MLP(z_k)), (n, K, projection)."""
        vectors: Tensor = F.normalize(self.project(pooled(regions.assign, features)), dim=-1)
        return vectors


def joint_loss(
    head: RegionHead,
    features: tuple[Tensor, Tensor],
    images: tuple[Tensor, Tensor],
    undo: Callable[[Tensor], Tensor] | None = None,
    weights: Weights = Weights(),
    negatives: Negatives = "masked",
) -> Parts:
    """Return L = alpha L_g + beta L_s + eta L_c of two views.

    features : (n, C, H, W) each, decoded from the views as they were shown
    images : (n, H, W) each, in 0..1: the views' grey values with their geometry, but neither jittered nor noisy
    undo : brings view two's planes back onto view one's pixels (`views.Turn.undo`); None where both lie alike
    """
    first, second = (head.divide(f) for f in features)
    within, between = (
        (a + b) / 2 for a, b in zip(grey_loss(first, images[0]), grey_loss(second, images[1]), strict=True)
    )
    q = (head.describe(first, features[0]), head.describe(second, features[1]))
    semantic = semantic_loss(*q, first.active, second.active, negatives=negatives)
    there = undo(second.assign) if undo else second.assign
    consistency = consistency_loss(first.assign, there)
    grey = within + weights.between * between
    total = weights.grey * grey + weights.semantic * semantic + weights.consistency * consistency
    return Parts(total, within.detach(), between.detach(), semantic.detach(), consistency.detach(), first)


@dataclass(frozen=True)
class Health:
    """Whether the regions still divide anything.

    active : mean number of active regions of an image; entropy : mean over pixels in nats; shares : mean of each
    region's share; information : what a pixel's place tells of its region, in nats (the entropy of an image's shares
    less that of its pixels, mean over images)
    """

    active: float
    entropy: float
    shares: tuple[float, ...]
    information: float

    @property
    def alarm(self) -> str | None:
        """Why the partition has collapsed, or None.

        At most two regions are left (of two, one), pixels belong to all alike, or all pixels to the same few alike.
        """
        most = math.log(len(self.shares)) if len(self.shares) > 1 else 1.0
        if self.active <= min(2, len(self.shares) - 1):
            return f"only {self.active:.1f} of {len(self.shares)} regions are active"
        if self.entropy > 0.95 * most:
            return f"pixels belong to all regions alike (entropy {self.entropy:.2f} of {most:.2f})"
        if self.information < 0.05 * most:
            return (
                f"regions divide no image: a pixel's place tells {self.information:.3f} of {most:.2f} nats of its own"
            )
        return None


def health(regions: Regions) -> Health:
    """Return how an image's regions stand; shares of a batch are averaged."""
    with torch.no_grad():
        entropy = _entropy(regions.assign).mean()
        return Health(
            float(regions.active.sum(1).float().mean()),
            float(entropy),
            tuple(regions.share.mean(0).tolist()),
            float(_entropy(regions.share).mean() - entropy),
        )


def _entropy(shares: Tensor) -> Tensor:
    """Return the entropy in nats along axis 1."""
    return -(shares * shares.clamp(min=1e-12).log()).sum(1)

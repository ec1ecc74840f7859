"""Frozen features of all stages of a ResNet, a support vector machine on them, and the joining of two models.

Zhang and Zhang, BMC Nephrology 2023, doi 10.1186/s12882-023-03182-6, as METHODS part 000 completes their abstract. A
machine fitted by scikit-learn becomes arrays of a network here: inference needs no scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor
STAGES = (1, 2, 3, 4)
FUSIONS = ("concat", "add")
BASIS = 256
"""Channels to which each stage is projected before stages are added."""


class Stages(nn.Module):
    """A ResNet's stages (torchvision's or timm's), each pooled by its mean and its maximum.

    Fine granules are sparse and shallow: the maximum and the first stages see them.

    concat : v_s = L2norm([GAP(layer_s) ; GMP(layer_s)]), v = concat_s v_s: 1,920 numbers of a ResNet-18, 7,680 of a -50
    add : as FCN adds scores (Long, Shelhamer and Darrell, CVPR 2015): each stage is projected to BASIS channels by a
    fixed random basis, brought to the first stage's size and added; v = [GAP ; GMP] of the sum, each L2norm: 512
    """

    def __init__(self, backbone: nn.Module, stages: Sequence[int] = STAGES, fusion: str = "concat") -> None:
        super().__init__()
        if not stages or not set(stages) <= set(STAGES) or not hasattr(backbone, "layer4"):
            raise ValueError(f"stages are of 1 to 4 of a ResNet, got {tuple(stages)} of {type(backbone).__name__}")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion is one of {', '.join(FUSIONS)}, got {fusion!r}")
        self.backbone = backbone
        backbone.fc = nn.Identity()
        self.stages = tuple(sorted(set(stages)))
        self.fusion = fusion
        self.widths = tuple(_width(backbone.get_submodule(f"layer{stage}")) for stage in self.stages)
        if fusion == "add":
            generator = torch.Generator().manual_seed(0)
            for stage, width in zip(self.stages, self.widths, strict=True):
                basis = torch.randn(BASIS, width, 1, 1, generator=generator) / width**0.5
                self.register_buffer(f"basis{stage}", basis)

    def forward(self, x: Tensor) -> Tensor:
        """Return v, float32 (n, D), for input (n, 3, H, W)."""
        net = self.backbone
        act = net.relu if hasattr(net, "relu") else net.act1
        x = net.maxpool(act(net.bn1(net.conv1(x))))  # type: ignore[operator]
        found = []
        for stage in STAGES[: self.stages[-1]]:
            x = net.get_submodule(f"layer{stage}")(x)
            if stage in self.stages:
                found.append(x.float())
        if self.fusion == "concat":
            return torch.cat([_pooled(maps) for maps in found], 1)
        bases = (self.get_buffer(f"basis{stage}").float() for stage in self.stages)
        small = [F.conv2d(maps, basis) for maps, basis in zip(found, bases, strict=True)]
        size = small[0].shape[2:]
        return _pooled(sum(F.interpolate(maps, size=size, mode="bilinear") for maps in small), apart=True)

    @property
    def dim(self) -> int:
        """D, the length of v."""
        return 2 * (sum(self.widths) if self.fusion == "concat" else BASIS)


def _pooled(maps: Tensor | int, apart: bool = False) -> Tensor:
    """Mean and maximum of maps (n, C, H, W) side by side, of length 1 together or each; float32 (n, 2 C)."""
    if not isinstance(maps, Tensor):
        raise TypeError("There are no maps.")
    parts = [maps.mean((2, 3)), maps.amax((2, 3))]
    if apart:
        return torch.cat([F.normalize(part, dim=1) for part in parts], 1)
    return F.normalize(torch.cat(parts, 1), dim=1)


def _width(stage: nn.Module) -> int:
    """The channels that leave a stage: those of its last block's last batch norm on the main path."""
    *_, block = stage.children()
    return max(m.num_features for m in block.modules() if isinstance(m, nn.BatchNorm2d))


class Machine(nn.Module):
    """A support vector machine for two classes, its standardisation, and its calibration to probabilities.

    Decision s(v) = sum_i a_i k(u_i, u) + b of standardised u, with k linear or exp(-gamma |u_i - u|^2); Platt's
    p = 1 / (1 + exp(A s + B)) is folded into the head, whose logits are 0 and -(A s + B): their difference is the
    margin. `support` vectors are needed by the RBF kernel only; 0 is the linear one. `components` principal components
    of u are what it sees, all of u for 0.
    """

    mean: Tensor
    scale: Tensor
    gamma: Tensor
    vectors: Tensor
    basis: Tensor

    def __init__(self, dim: int, support: int = 0, components: int = 0) -> None:
        super().__init__()
        self.components = components
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("gamma", torch.tensor(1.0))
        self.register_buffer("vectors", torch.zeros(support, components or dim))
        if components:
            self.register_buffer("basis", torch.zeros(components, dim))
        self.head = nn.Linear(support or components or dim, 2)

    def forward(self, v: Tensor) -> Tensor:
        """Return logits (n, 2) of features (n, D)."""
        u = (v.float() - self.mean) / self.scale
        if self.components:
            u = u @ self.basis.T
        if len(self.vectors):
            # differences written out: by a product of matrices, digits would cancel
            apart = torch.cdist(u, self.vectors, compute_mode="donot_use_mm_for_euclid_dist")
            u = torch.exp(-self.gamma * apart.square())
        logits: Tensor = self.head(u)
        return logits


class SkipSvm(nn.Module):
    """Model B: features of all stages, frozen, and a support vector machine."""

    def __init__(
        self,
        backbone: nn.Module,
        stages: Sequence[int] = STAGES,
        support: int = 0,
        fusion: str = "concat",
        components: int = 0,
    ) -> None:
        super().__init__()
        self.features = Stages(backbone, stages, fusion)
        self.machine = Machine(self.features.dim, support, components)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 2) for input (n, 3, H, W)."""
        logits: Tensor = self.machine(self.features(x))
        return logits


RULES = ("vote", "stack", "features")


class TwoModels(nn.Module):
    """Model C: a fine-tuned network and a SkipSvm, joined by one of three rules.

    vote : p = w p_A + (1 - w) p_B
    stack : logistic regression on the margins of both
    features : a support vector machine on [what A's head is given ; v]
    """

    weight: Tensor

    def __init__(self, first: nn.Module, second: SkipSvm, rule: str, trunk: nn.Module | None, support: int = 0) -> None:
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"rule is one of {', '.join(RULES)}, got {rule!r}")
        self.rule = rule
        self.second = second
        if rule == "features":
            if trunk is None:
                raise ValueError("rule 'features' needs the first network without its head")
            self.trunk = trunk
            with torch.inference_mode():
                more = self.trunk.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
            self.machine = Machine(more + second.features.dim, support)
        else:
            self.first = first
            self.register_buffer("weight", torch.tensor(0.5))
            self.head = nn.Linear(1 if rule == "vote" else 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 2) for input (n, 3, H, W)."""
        if self.rule == "features":
            joined: Tensor = self.machine(torch.cat([self.trunk(x).float(), self.second.features(x)], 1))
            return joined
        a, b = margin_of(self.first(x)), margin_of(self.second(x))
        both = vote(a, b, self.weight)[:, None] if self.rule == "vote" else torch.stack([a, b], 1)
        logits: Tensor = self.head(both.float())
        return logits


def vote(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Return log p/(1-p) of p = w s(a) + (1-w) s(b), s the sigmoid, for margins float64 (n,).

    By logarithms throughout: p itself is 1 in float64 from a margin of 37 on.
    """
    of_a, of_b = weight.double().log(), torch.log1p(-weight.double())

    def log_mean(sign: int) -> Tensor:
        return torch.logaddexp(of_a + F.logsigmoid(sign * a), of_b + F.logsigmoid(sign * b))

    return log_mean(1) - log_mean(-1)


def margin_of(logits: Tensor) -> Tensor:
    """Return the margin of the second of two classes, float64 (n,), of logits (n, 2)."""
    z = logits.double()
    return z[:, 1] - z[:, 0]


def make_skip_svm(
    build: Callable[[str, Mapping[str, Any], int], nn.Module],
    n_classes: int,
    backbone: str = "torchvision:resnet50",
    backbone_arguments: Mapping[str, Any] | None = None,
    **more: Any,
) -> SkipSvm:
    """Return model B as a card describes it; `more` are stages, support, fusion and components of SkipSvm."""
    _two(n_classes)
    return SkipSvm(build(backbone, backbone_arguments or {}, 2), **more)


def make_two_models(
    build: Callable[[str, Mapping[str, Any], int], nn.Module],
    headless: Callable[[nn.Module, int], nn.Module],
    n_classes: int,
    first: str = "torchvision:resnet50",
    first_arguments: Mapping[str, Any] | None = None,
    second: Mapping[str, Any] | None = None,
    rule: str = "vote",
    support: int = 0,
) -> TwoModels:
    """Return model C as a card describes it."""
    _two(n_classes)
    a = build(first, first_arguments or {}, 2)
    b = make_skip_svm(build, 2, **dict(second or {}))
    return TwoModels(a, b, rule, headless(a, 2) if rule == "features" else None, support)


def _two(n_classes: int) -> None:
    if n_classes != 2:
        raise ValueError(f"a support vector machine tells two classes apart, not {n_classes}")

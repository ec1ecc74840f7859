"""The improved SE-ResNet of the glomerulus paper: four asymmetric convolutions and squeeze-and-excitation in a block.

After Sun et al., Chinese Journal of Medical Physics 39 (2022) 1313, whose text allows several readings; a `variant`
is one of them. SE blocks: Hu, Shen and Sun, CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
from torch import nn
from torch.nn import functional as F

Variant = Literal["F", "A", "D", "plain"]

REDUCTION = 16
"""By how much an SE block narrows its channels."""

ASYMMETRIC = ((1, 3), (3, 1), (1, 3), (3, 1))
"""The kernels of a block, (height, width) each."""

STEM = ("conv1.", "bn1.")
"""What the weights of the stem begin with, as torchvision's ResNets have it: all that ImageNet weights exist for."""


class SqueezeExcite(nn.Module):
    """Weigh each channel by s = sigmoid(W2 ReLU(W1 z)), z its mean over the image; without biases, as in BHCNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = max(1, channels // REDUCTION)
        self.fc1 = nn.Linear(channels, inside, bias=False)
        self.fc2 = nn.Linear(inside, channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, (n, c, h, w), each channel times its weight."""
        weight = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return x * weight[:, :, None, None]


class _Residual(nn.Module):
    """ReLU(x + SE(body(x))), with a 1x1 convolution on x where the shape changes."""

    def __init__(self, body: nn.Sequential, channels: int, shortcut: nn.Sequential | None = None) -> None:
        super().__init__()
        self.body = body
        self.se = SqueezeExcite(channels)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        short = x if self.shortcut is None else self.shortcut(x)
        return F.relu(short + self.se(self.body(x)))


class _PreActivated(nn.Module):
    """x + SE(body(x)), the body beginning with BN and ReLU; the shortcut is a bare 1x1 where the shape changes."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for place, kernel in enumerate(ASYMMETRIC):
            first = place == 0
            channels = inside if first else width
            steps += [nn.BatchNorm2d(channels), nn.ReLU(inplace=not first)]
            steps.append(_conv(channels, width, kernel, stride if first else 1))
        self.body = nn.Sequential(*steps)
        self.se = SqueezeExcite(width)
        same = inside == width and stride == 1
        self.shortcut = None if same else _conv(inside, width, (1, 1), stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        short = x if self.shortcut is None else self.shortcut(x)
        return cast(torch.Tensor, short + self.se(self.body(x)))


class SeResNet(nn.Module):
    """A stem, four stages of `depth` blocks, a mean over the image, drop-out, one head.

    variant : "F", blocks that keep 64, 128, 256 or 512 channels, and 1x1 convolutions at the borders of the stages,
    which give 256 to 2048: the one reading that fits all the paper says of it. "A", the code of the paper's reference
    19 (pre-activated, never wider than 512). "D", a bottleneck with the four convolutions in its middle. "plain",
    SE-ResNet-50. Input of 224 px leaves the stem as 64 x 56 x 56; each later stage halves that.

    Raises ValueError for an unknown variant, and a depth that is not four numbers from 1 on.
    """

    def __init__(
        self,
        n_classes: int,
        channels: int = 3,
        variant: Variant = "F",
        depth: Sequence[int] = (3, 4, 6, 3),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if variant not in get_args(Variant):
            raise ValueError(f"variant {variant!r} is none of {', '.join(get_args(Variant))}")
        if len(depth) != 4 or min(depth) < 1:
            raise ValueError(f"depth {list(depth)} is not four numbers from 1 on")
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        stage, self.features = _STAGES[variant]
        widths = [64 * 2**i for i in range(4)]
        inside = [64, *(width * self.features // widths[-1] for width in widths)]
        self.stages = nn.ModuleList(
            stage(a, w, n, i) for i, (a, w, n) in enumerate(zip(inside, widths, depth, strict=False))
        )
        self.norm = nn.BatchNorm2d(self.features) if variant == "A" else None
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.features, n_classes) if n_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, n_classes) for input (n, channels, H, W); features, (n, 2048 or 512), for no classes."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        for stage in self.stages:
            x = stage(x)
        if self.norm is not None:
            x = F.relu(self.norm(x))
        return cast(torch.Tensor, self.head(self.dropout(x.mean((2, 3)))))

    def parts(self) -> list[list[nn.Module]]:
        """Return the stem and the blocks from input to output: 17 with the usual depth.

        A stage's 1x1 convolution that narrows belongs to its first block, the one that widens to its last.
        """
        found: list[list[nn.Module]] = [[self.conv1, self.bn1]]
        for stage in self.stages:
            lone = [m for name, m in stage.named_children() if name in ("reduce", "expand")]
            blocks = [[m] for name, m in stage.named_children() if name not in ("reduce", "expand")]
            for module in lone:
                blocks[0 if module is getattr(stage, "reduce", None) else -1].append(module)
            found += blocks
        if self.norm is not None:
            found[-1].append(self.norm)
        return found


def _conv(inside: int, outside: int, kernel: tuple[int, int], stride: int = 1) -> nn.Conv2d:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Conv2d(inside, outside, kernel, stride, padding=padding, bias=False)


def _chain(channels: Sequence[int], kernels: Sequence[tuple[int, int]], stride_at: int = -1) -> nn.Sequential:
    """Convolutions with BN and ReLU between them; the one at `stride_at` halves the image."""
    steps: list[nn.Module] = []
    for place, ((inside, outside), kernel) in enumerate(zip(pairwise(channels), kernels, strict=True)):
        steps += [nn.ReLU(inplace=True)] if place else []
        steps += [_conv(inside, outside, kernel, 2 if place == stride_at else 1), nn.BatchNorm2d(outside)]
    return nn.Sequential(*steps)


def _pointwise(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(inside, outside, (1, 1), stride), nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


class _StageF(nn.Sequential):
    """Blocks of constant width between a 1x1 that narrows and halves (not in the first stage) and one that widens."""

    reduce: nn.Module
    expand: nn.Module

    def __init__(self, inside: int, width: int, blocks: int, place: int) -> None:
        super().__init__()
        if place:
            self.add_module("reduce", _pointwise(inside, width, 2))
        for i in range(blocks):
            self.add_module(str(i), _Residual(_chain([width] * 5, ASYMMETRIC), width))
        self.add_module("expand", _pointwise(width, 4 * width))


def _stage_a(inside: int, width: int, blocks: int, place: int) -> nn.Sequential:
    strides = [2 if place else 1] + [1] * (blocks - 1)
    return nn.Sequential(*(_PreActivated(width if i else inside, width, s) for i, s in enumerate(strides)))


def _bottlenecks(middle: Sequence[tuple[int, int]], inside: int, width: int, blocks: int, place: int) -> nn.Sequential:
    """Blocks of 1x1, `middle` at `width`, 1x1 to four times that; the first of `middle` halves in the first block."""
    kernels = [(1, 1), *middle, (1, 1)]
    made = []
    for i in range(blocks):
        start = inside if i == 0 else 4 * width
        halves = place > 0 and i == 0
        body = _chain([start, *[width] * (len(middle) + 1), 4 * width], kernels, 1 if halves else -1)
        short = nn.Sequential(_conv(start, 4 * width, (1, 1), 2 if halves else 1), nn.BatchNorm2d(4 * width))
        made.append(_Residual(body, 4 * width, None if i else short))
    return nn.Sequential(*made)


def _stage_d(inside: int, width: int, blocks: int, place: int) -> nn.Sequential:
    return _bottlenecks(ASYMMETRIC, inside, width, blocks, place)


def _stage_plain(inside: int, width: int, blocks: int, place: int) -> nn.Sequential:
    return _bottlenecks([(3, 3)], inside, width, blocks, place)


_STAGES: dict[str, tuple[Callable[[int, int, int, int], nn.Sequential], int]] = {
    "F": (_StageF, 2048),
    "A": (_stage_a, 512),
    "D": (_stage_d, 2048),
    "plain": (_stage_plain, 2048),
}
"""How a stage is made of (channels in, width, blocks, its place), and the channels that reach the head."""

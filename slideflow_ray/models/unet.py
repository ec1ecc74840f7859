"""A U-Net whose outputs depend on a bounded, known neighbourhood: tiles with enough halo give the masks of one piece.

After Ronneberger, Fischer and Brox, U-Net, MICCAI 2015, with padded convolutions and batch norms.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Unet(nn.Module):
    """`levels` poolings, `width` channels at full resolution, twice as many after each pooling; logits per pixel.

    Upsampling is a 2x2 up-convolution, computed as a 1x1 convolution whose channels are laid out as pixels:
    each output depends on one input, so the radius grows by nothing, and bits do not depend on the size
    of the piece. (torch takes another kernel for bilinear upsampling of small pieces, which rounds
    differently: tiles then differ from one piece by 1e-8 in fp32 and 1e-4 in bf16.)
    There is no global pooling, whose reach has no bound.
    """

    def __init__(self, n_classes: int, channels: int = 3, levels: int = 4, width: int = 32) -> None:
        super().__init__()
        if levels < 1 or width < 1:
            raise ValueError(f"levels and width must be at least 1, got {levels} and {width}")
        self.levels = levels
        widths = [width * 2**level for level in range(levels + 1)]
        inside = [channels, *widths]
        self.down = nn.ModuleList(_double(inside[level], widths[level]) for level in range(levels + 1))
        self.up = nn.ModuleList(_up(widths[level + 1], widths[level]) for level in range(levels))
        self.join = nn.ModuleList(_double(2 * widths[level], widths[level]) for level in range(levels))
        self.head = nn.Conv2d(width, n_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (n, n_classes, H, W) for input (n, channels, H, W); H and W are multiples of the stride."""
        logits: torch.Tensor = self.head(self.decode(x)[1])
        return logits

    def decode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the deepest features (n, width * 2**levels, h, w), and the decoded ones (n, width, H, W)."""
        skips: list[torch.Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        deep = x
        for level in reversed(range(self.levels)):
            x = self.join[level](torch.cat([skips[level], self.up[level](x)], 1))
        return deep, x

    @property
    def stride(self) -> int:
        """By how much the network divides its input; an origin off it gives other masks."""
        return int(2**self.levels)

    @property
    def radius(self) -> int:
        """How far from an output pixel an input pixel can matter: 4 levels reach 107 px.

        The longest way goes down to the last level and up again: the reach of an output pixel is
        followed backwards as an interval, for each position of the pixel in the stride.
        """
        return max(max(at - low, high - at) for at in range(self.stride) for low, high in [self._reach(at)])

    def _reach(self, at: int) -> tuple[int, int]:
        low = high = at
        for _ in range(self.levels):  # back through a double convolution and an up-convolution
            low, high = (low - 2) // 2, (high + 2) // 2
        low, high = low - 2, high + 2
        for _ in range(self.levels):  # back through a pooling and a double convolution
            low, high = 2 * low - 2, 2 * high + 3
        return low, high


def _double(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(*_block(inside, outside), *_block(outside, outside))


def _block(inside: int, outside: int) -> list[nn.Module]:
    conv = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]


def _up(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, 4 * outside, 1), nn.PixelShuffle(2))

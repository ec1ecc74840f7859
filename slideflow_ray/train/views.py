"""Two views of an image for pre-training: geometry that can be undone exactly, and changes of tone that cannot.

METHODS part 002: the same window at its own scale, since scale is diagnostic; flips and quarter turns in the second
view; gamma, contrast, noise and blur in both, each drawn anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


@dataclass(frozen=True)
class Turn:
    """A flip and quarter turns of square images, one for each: bool (n,), int64 (n,)."""

    flip: Tensor
    quarters: Tensor

    @classmethod
    def drawn(cls, n: int, generator: torch.Generator) -> Turn:
        """Draw one of the eight for each of n images."""
        flip = torch.randint(0, 2, (n,), generator=generator).bool()
        return cls(flip, torch.randint(0, 4, (n,), generator=generator))

    def apply(self, planes: Tensor) -> Tensor:
        """Flip, then turn each image's planes, (n, ..., T, T)."""
        return torch.stack(
            [torch.rot90(one.flip(-1) if flip else one, k, (-2, -1)) for one, flip, k in self._of(planes)]
        )

    def undo(self, planes: Tensor) -> Tensor:
        """Bring turned planes back: `undo(apply(x))` is x, pixel for pixel."""
        back = [(torch.rot90(one, -k, (-2, -1)), flip) for one, flip, k in self._of(planes)]
        return torch.stack([one.flip(-1) if flip else one for one, flip in back])

    def _of(self, planes: Tensor) -> Iterator[tuple[Tensor, bool, int]]:
        return zip(planes, self.flip.tolist(), self.quarters.tolist(), strict=True)


@dataclass(frozen=True)
class Tone:
    """How far the tone of a view may differ from the image: bounds of gamma and contrast, largest noise and blur (px).

    From METHODS: gamma 0.7 to 1.4, contrast 0.8 to 1.2.
    """

    gamma: tuple[float, float] = (0.7, 1.4)
    contrast: tuple[float, float] = (0.8, 1.2)
    noise: float = 0.05
    blur: float = 1.0


def toned(images: Tensor, tone: Tone, generator: torch.Generator) -> Tensor:
    """Return images, float32 (n, C, T, T) in 0..1, in a tone drawn for each; what leaves 0..1 is cut."""
    n = len(images)

    def drawn(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n, generator=generator)).view(n, 1, 1, 1)

    mean = images.mean((1, 2, 3), keepdim=True)
    changed = (mean + (images.clamp(0, 1) ** drawn(*tone.gamma) - mean) * drawn(*tone.contrast)).clamp(0, 1)
    sigma = drawn(0, tone.blur)
    changed = torch.cat([_blurred(one[None], float(s)) for one, s in zip(changed, sigma.flatten(), strict=True)])
    grain = torch.randn((n, 1, *images.shape[2:]), generator=generator)
    return (changed + drawn(0, tone.noise) * grain).clamp(0, 1)


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (1, C, T, T); the edge is mirrored."""
    reach = int(3 * sigma + 0.5)
    if reach < 1:
        return image
    x = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    channels = image.shape[1]
    wide = F.pad(image, (reach, reach, reach, reach), mode="reflect")
    rows = F.conv2d(wide, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


class Views(NamedTuple):
    """Two views as a network is shown them, their greys without any change of tone, and how view two was turned.

    shown : float32 (n, C, T, T) in 0..1; grey : float32 (n, T, T) in 0..1, lightly denoised
    """

    shown: tuple[Tensor, Tensor]
    grey: tuple[Tensor, Tensor]
    turn: Turn


def two_views(images: Tensor, seed: int, tone: Tone = Tone(), denoise: float = 0.7) -> Views:
    """Return two views of images, float32 (n, C, T, T) in 0..1; equal arguments give equal views."""
    generator = torch.Generator().manual_seed(seed)
    turn = Turn.drawn(len(images), generator)
    clean = torch.cat([_blurred(one[None], denoise) for one in images.mean(1, keepdim=True)])[:, 0]
    shown = (toned(images, tone, generator), turn.apply(toned(images, tone, generator)))
    return Views(shown, (clean, turn.apply(clean)), turn)

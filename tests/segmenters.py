"""Segmentations with known answers: a U-Net that tells colours apart, and phantoms of discs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from slideflow_ray.models.bundle import BundleCard, write_bundle
from slideflow_ray.models.unet import Unet
from slideflow_ray.phantoms import halved, write_pyramid

CLASSES = ("other", "cyan", "magenta")
COLOURS = {"cyan": (40, 200, 200), "magenta": (200, 40, 200)}


def colour_unet(smooth: bool = False) -> Unet:
    """A U-Net whose outputs are those of a threshold: class 1 where red is dark, class 2 where green is.

    smooth : each of its four convolutions takes the mean of 3 x 3 pixels, for pictures with noise.
    """
    net = Unet(3, levels=2, width=4).eval()
    for values in net.parameters():
        nn.init.zeros_(values)
    first = [module for module in net.down[0] if isinstance(module, nn.Conv2d)]
    last = [module for module in net.join[0] if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.fill_(1)
        for conv, gain in zip([*first, *last], (-1, 1, 1, 1), strict=True):
            for channel in range(2):
                if smooth:
                    conv.weight[channel, channel] = gain / 9
                else:
                    conv.weight[channel, channel, 1, 1] = gain
        net.head.weight[1, 0] = net.head.weight[2, 1] = 10
        net.head.bias.copy_(torch.tensor([0.0, -1.0, -1.0]))
    return net


def write_colours(folder: Path, name: str = "discs", mpp: float = 0.5, tile_px: int = 88, smooth: bool = False) -> Path:
    """Write the bundle of `colour_unet`: tiles of 88 px with cores of 40."""
    card = BundleCard(
        name=name,
        task="segment",
        architecture="unet",
        arguments={"levels": 2, "width": 4},
        classes=CLASSES,
        tile_px=tile_px,
        mpp=mpp,
        stride=4,
        radius=23,
        halo=24,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    return write_bundle(folder / name, card, colour_unet(smooth).state_dict())


def disc(size_px0: tuple[int, int], x: float, y: float, r: float) -> np.ndarray:
    """Pixels whose centres lie within r of (x, y), bool (h, w)."""
    xx, yy = np.meshgrid(np.arange(size_px0[0]) + 0.5, np.arange(size_px0[1]) + 0.5)
    return (xx - x) ** 2 + (yy - y) ** 2 <= r**2


def write_discs(
    path: Path, size_px0: tuple[int, int], discs: list[tuple[str, float, float, float]], mpp0: float = 0.5
) -> np.ndarray:
    """Write a lossless slide of discs (colour, x, y, r in px0) on a pale ground; return the true classes (h, w)."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(225, 250, (size_px0[1], size_px0[0], 3)).astype(np.uint8)
    truth = np.zeros(pixels.shape[:2], np.uint8)
    for colour, *place in discs:
        inside = disc(size_px0, *place)
        pixels[inside] = np.array(COLOURS[colour]) + rng.integers(-15, 15, (int(inside.sum()), 3))
        truth[inside] = CLASSES.index(colour)
    write_pyramid(path, halved(pixels, 2), mpp0)
    return truth

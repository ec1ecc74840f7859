"""Random changes of training tiles: what a slide could have shown as well. Never used outside the training split."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import v2

from slideflow_ray.errors import ConfigError


def seed_of(seed: int, epoch: int, what: str) -> int:
    """Return a seed for one use in one epoch, so that an epoch can be run again alone with the same draws."""
    entropy = [seed, epoch, *what.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def augmentation() -> v2.Transform:
    """Return the transform of one tile: flips, quarter turns, brightness, contrast, saturation, hue, slight noise.

    Input and output are uint8, shape (3, T, T). Hue costs six times the rest, so a quarter of the tiles get it.
    It draws from torch's global generator, which `augment` seeds.
    """
    turns = [v2.Lambda(partial(_turn, quarters)) for quarters in range(4)]
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.RandomChoice(turns),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
            v2.RandomApply([v2.ColorJitter(hue=0.04)], p=0.25),
            v2.RandomApply([v2.GaussianNoise(sigma=0.02)], p=0.25),
        ]
    )


def _turn(quarters: int, tile: torch.Tensor) -> torch.Tensor:
    return torch.rot90(tile, quarters, (-2, -1))


def augment(pixels: npt.NDArray[np.uint8], transform: v2.Transform, seed: int) -> npt.NDArray[np.uint8]:
    """Return each tile changed by its own draw; the same `seed` gives the same tiles.

    pixels : uint8, shape (n, T, T, 3), left as they are; returns the same shape and dtype

    Raises ConfigError when the tiles are not square, which quarter turns need.
    """
    if pixels.ndim != 4 or pixels.shape[1] != pixels.shape[2]:
        raise ConfigError(f"Augmentation turns tiles by quarters, so they must be square; got shape {pixels.shape}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tiles = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)
        changed = torch.stack([transform(tile) for tile in tiles])
    out: npt.NDArray[np.uint8] = changed.permute(0, 2, 3, 1).contiguous().numpy()
    return out

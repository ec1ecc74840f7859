"""Random changes of training tiles: what a slide could have shown as well. Never used outside the training split."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from slideflow_ray.errors import ConfigError
from slideflow_ray.train.spec import AugmentSpec

if TYPE_CHECKING:
    # Imported late below: it takes five seconds, and only the processes that augment need it.
    from torchvision.transforms import v2

Pixels = npt.NDArray[np.uint8]

RUIFROK = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Optical density of haematoxylin, eosin and a residual (DAB) in red, green and blue.

Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 23 (2001) 291-299.
"""


def seed_of(seed: int, epoch: int, what: str) -> int:
    """Return a seed for one use in one epoch, so that an epoch can be run again alone with the same draws."""
    entropy = [seed, epoch, *what.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def augmentation(spec: AugmentSpec | None = None) -> v2.Transform | None:
    """Return the transform of one tile that `spec` asks for, None where it changes nothing; mixup is `mix`'s.

    Input and output are uint8, shape (3, T, T). Hue costs six times the rest, so a quarter of the tiles get it;
    so many get noise and stain jitter too. It draws from torch's global generator, which `augment` seeds.
    """
    spec = spec or AugmentSpec()
    if spec.changes_nothing:
        return None
    from torchvision.transforms import v2

    steps = [*_geometry(spec), *_colour(spec)]
    return v2.Compose(steps) if steps else None


def _geometry(spec: AugmentSpec) -> list[Any]:
    from torchvision.transforms import v2

    steps: list[Any] = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if spec.flip else []
    if spec.turn:
        steps.append(v2.RandomChoice([v2.Lambda(partial(_turn, quarters)) for quarters in range(4)]))
    if spec.rotate_deg or spec.shift or spec.zoom:
        shift = (spec.shift / 2, spec.shift / 2) if spec.shift else None  # a share of what is moved, twice as wide
        zoom = (1 - spec.zoom, 1 + spec.zoom) if spec.zoom else None
        move = v2.RandomAffine(spec.rotate_deg, shift, zoom, interpolation=v2.InterpolationMode.BILINEAR)
        steps.append(_Moved(move))
    return steps


def _colour(spec: AugmentSpec) -> list[Any]:
    from torchvision.transforms import v2

    steps: list[Any] = []
    if spec.brightness or spec.contrast or spec.saturation:
        steps.append(v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation))
    if spec.hue:
        steps.append(v2.RandomApply([v2.ColorJitter(hue=spec.hue)], p=0.25))
    if spec.stain:
        steps.append(v2.RandomApply([v2.Lambda(partial(_unless_mask, jitter_stain, spec.stain))], p=0.25))
    if spec.noise:
        noise = spec.noise if isinstance(spec.noise, tuple) else (0.0, spec.noise)
        steps.append(v2.RandomApply([v2.Lambda(partial(_unless_mask, _grain, noise))], p=0.25))
    return steps


def _turn(quarters: int, tile: torch.Tensor) -> torch.Tensor:
    return _like(torch.rot90(tile, quarters, (-2, -1)), tile)


def _like(changed: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """A mask stays a mask, by which torchvision knows it."""
    from torchvision import tv_tensors

    return tv_tensors.wrap(changed, like=tile) if isinstance(tile, tv_tensors.Mask) else changed


class _Moved(torch.nn.Module):
    """Moves a tile, and its mask with it, within its own mirror images: nothing black comes in from outside."""

    def __init__(self, move: v2.Transform) -> None:
        super().__init__()
        self.move = move

    def forward(self, *given: Any) -> Any:
        from torchvision.transforms import v2

        tiles = given[0] if isinstance(given[0], tuple) else given
        side = tiles[0].shape[-1]
        wide = [v2.functional.pad(tile, [side // 2] * 4, padding_mode="reflect") for tile in tiles]
        moved = self.move(*wide)
        moved = moved if isinstance(moved, tuple) else (moved,)
        cut = tuple(v2.functional.center_crop(tile, [side, side]) for tile in moved)
        return cut if len(cut) > 1 else cut[0]


def _unless_mask[By](change: Callable[[By, torch.Tensor], torch.Tensor], by: By, tile: torch.Tensor) -> torch.Tensor:
    """Colours are of tiles, never of masks."""
    from torchvision import tv_tensors

    return tile if isinstance(tile, tv_tensors.Mask) else change(by, tile)


def _grain(between: tuple[float, float], tile: torch.Tensor) -> torch.Tensor:
    least, most = between
    sigma = 255 * (least + (most - least) * float(torch.rand(())))
    return (tile + sigma * torch.randn(tile.shape)).round().clamp(0, 255).to(torch.uint8)


def jitter_stain(sigma: float, tile: torch.Tensor) -> torch.Tensor:
    """Return a tile, uint8 (3, T, T), whose stains are each a little stronger or weaker.

    Optical density is split by Ruifrok's vectors into three strengths c, each of which becomes c (1 + a) + b with a
    and b drawn from N(0, sigma) and N(0, sigma / 10), as HED-light does (Tellez et al. 2019, after their 2018
    paper in IEEE Trans. Med. Imaging 37, 2126).
    """
    vectors = torch.nn.functional.normalize(torch.tensor(RUIFROK), dim=1)
    factor = 1 + sigma * torch.randn(3)
    offset = sigma / 10 * torch.randn(3)
    density = -torch.log(tile.float().clamp(min=1) / 255).reshape(3, -1)
    strength = torch.linalg.solve(vectors.T, density)
    changed = vectors.T @ (strength * factor[:, None] + offset[:, None])
    return (255 * torch.exp(-changed)).round().clamp(0, 255).to(torch.uint8).reshape(tile.shape)


def _check_square(pixels: Pixels) -> None:
    if pixels.ndim != 4 or pixels.shape[1] != pixels.shape[2]:
        raise ConfigError(f"Augmentation turns tiles by quarters, so they must be square; got shape {pixels.shape}.")


def augment(pixels: Pixels, transform: v2.Transform, seed: int) -> Pixels:
    """Return each tile changed by its own draw; the same `seed` gives the same tiles.

    pixels : uint8, shape (n, T, T, 3), left as they are; returns the same shape and dtype

    Raises ConfigError when the tiles are not square, which quarter turns need.
    """
    _check_square(pixels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tiles = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)
        changed = torch.stack([transform(tile) for tile in tiles])
    out: Pixels = changed.permute(0, 2, 3, 1).contiguous().numpy()
    return out


def augment_both(
    pixels: Pixels, masks: npt.NDArray[Any], transform: v2.Transform, seed: int
) -> tuple[Pixels, npt.NDArray[Any]]:
    """Return each tile and its mask, uint8 (n, T, T), moved alike; colours change in the tile alone.

    A mask is never blended: what is turned or zoomed takes the nearest pixel's class. Raises ConfigError when the
    tiles are not square.
    """
    from torchvision import tv_tensors

    _check_square(pixels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tiles = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)
        pairs = [
            transform(tile, tv_tensors.Mask(torch.from_numpy(mask.copy())[None]))
            for tile, mask in zip(tiles, masks, strict=True)
        ]
    changed = torch.stack([tile for tile, _ in pairs]).permute(0, 2, 3, 1).contiguous().numpy()
    return changed, torch.stack([torch.as_tensor(mask)[0] for _, mask in pairs]).numpy()


def mix(pixels: Pixels, kinds: npt.NDArray[Any], alpha: float, seed: int) -> Pixels:
    """Return each tile mixed with another of its kind in the batch: l x + (1 - l) y with l from Beta(alpha, alpha).

    pixels : uint8 (n, T, T, 3); kinds : (n,) or (n, k), equal rows may be mixed (class, and stain). Labels stay as
    they are, for both tiles have the same. A tile that is alone of its kind stays as it is. (Source
    001, "mixup between two random images of the same class".)
    """
    rng = np.random.default_rng(seed)
    share = rng.beta(alpha, alpha, len(pixels)).astype(np.float32)
    partner = np.arange(len(pixels))
    _, kind = np.unique(kinds, axis=0, return_inverse=True)
    for one in range(kind.max(initial=-1) + 1):
        rows = np.flatnonzero(kind.ravel() == one)
        partner[rows] = rng.permutation(rows)
    share = share[:, None, None, None]
    mixed = share * pixels + (1 - share) * pixels[partner]
    return np.rint(mixed).astype(np.uint8)

"""uint8 tiles -> the network's input: the one place that scales pixels, used by train, score and explain.

torch is imported when a tensor is made, so a module that only names this one stays light.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from slideflow_ray import stain as stains
from slideflow_ray.errors import ConfigError
from slideflow_ray.stain import Stained, StainTarget

if TYPE_CHECKING:
    import torch


def to_input(
    pixels: npt.NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return (pixels / 255 - mean) / std, laid out channels_last.

    pixels : uint8, shape (n, T, T, 3); read-only arrays are welcome
    returns : `dtype`, shape (n, 3, T, T), on `device`; computed in float32, then cast

    Raises ConfigError for another dtype or shape.
    """
    return scale(to_tensor(pixels, device), mean, std, dtype=dtype)


def to_tensor(pixels: npt.NDArray[np.uint8], device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the tiles as a uint8 tensor of shape (n, T, T, 3); bytes travel to a GPU before they grow to floats."""
    import torch

    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ConfigError(f"Tiles must be uint8 of shape (n, T, T, 3), got {pixels.dtype} of shape {pixels.shape}.")
    # torch has no read-only tensors and warns of read-only arrays; the copy costs 0.05 ms for 16 tiles
    own = pixels if pixels.flags.writeable and pixels.flags.c_contiguous else pixels.copy(order="C")
    tensor = torch.from_numpy(own)
    device = torch.device(device)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def scale(tiles: torch.Tensor, mean: Sequence[float], std: Sequence[float], *, dtype: torch.dtype) -> torch.Tensor:
    """Return uint8 tiles (n, T, T, 3) as normalised `dtype` input (n, 3, T, T), channels_last in memory."""
    import torch

    n, height, width, channels = tiles.shape
    slope, offset = (1 / (255 * np.asarray(std, np.float64)), -np.asarray(mean, np.float64) / np.asarray(std))
    # One row of constants per row of pixels: a broadcast over the last axis of 3 runs six times slower.
    a = torch.from_numpy(np.tile(slope, width).astype(np.float32)).to(tiles.device)
    b = torch.from_numpy(np.tile(offset, width).astype(np.float32)).to(tiles.device)
    rows = tiles.reshape(n * height, width * channels).float().mul_(a).add_(b).to(dtype)
    return rows.reshape(n, height, width, channels).permute(0, 3, 1, 2)


# stains

SLICE = 16
"""Tiles that are normalised at a time for training."""


def restained(pixels: npt.NDArray[np.uint8], stained: Stained, target: StainTarget) -> npt.NDArray[np.uint8]:
    """Return tiles, uint8 (n, T, T, 3), in the target's colours; for training. Raises StainError."""
    out = np.empty(pixels.shape, np.uint8)
    for start in range(0, len(pixels), SLICE):
        part = slice(start, start + SLICE)
        out[part] = restain(to_tensor(pixels[part]), stained.rows(start, start + SLICE), target).numpy()
    return out


def restain(tiles: torch.Tensor, stained: Stained, target: StainTarget) -> torch.Tensor:
    """Return uint8 tiles (n, T, T, 3) in the target's colours, on their device.

    stained : one fit for all tiles, or one for each; the last one goes for those beyond them, which are padding.

    `stain.normalise` in float32 with tables for logarithm, root and exponential, at most one grey level from it.
    Products and sums are rounded one by one, so every device and any number of tiles gives the same bytes.
    Raises StainError.
    """
    import torch

    rows = torch.tensor([stains.coefficients(fit, target.fit) for fit in stained.fits], dtype=torch.float32)
    rows = torch.cat([rows, rows[-1:].expand(max(0, len(tiles) - len(rows)), -1)])[: len(tiles)].to(tiles.device)
    # on a CPU tile by tile, so that what is in between stays in the cache
    step = 1 if tiles.device.type == "cpu" else max(1, len(tiles))
    parts = (slice(i, i + step) for i in range(0, len(tiles), step))
    found = [_restained(tiles[part], rows[part], target.method) for part in parts]
    return torch.cat(found) if found else tiles


def _restained(tiles: torch.Tensor, rows: torch.Tensor, method: str) -> torch.Tensor:
    import torch

    shape = (len(tiles), tiles.shape[1] * tiles.shape[2])
    k = list(rows.unsqueeze(2).unbind(1))
    planes = [plane.reshape(-1).int() for plane in tiles.reshape(-1, 3).unbind(1)]
    if method == "reinhard":
        out = _by_reinhard(planes, k, shape)
    else:
        out = _by_dyes(planes, k, shape, sparse=method == "vahadane")
    return torch.stack(out, dim=-1).reshape(tiles.shape)


def _by_dyes(
    planes: list[torch.Tensor], k: list[torch.Tensor], shape: tuple[int, int], *, sparse: bool
) -> list[torch.Tensor]:
    density, level = _od_tables(planes[0].device)
    v = [density.index_select(0, plane).reshape(shape) for plane in planes]
    glass, into = k[-6:-3], k[-3:]
    v = [plane.sub_(dark).clamp_(min=1e-6) for plane, dark in zip(v, glass, strict=True)]
    if not sparse:
        return [_level(level, _sum(k[3 * c : 3 * c + 3], v).add_(into[c]), stains.OD_STEPS) for c in range(3)]
    b = [_sum(k[3 * j : 3 * j + 3], v).sub_(stains.CODE_LAM) for j in range(2)]
    both = [b[j].sub(b[1 - j] * k[6]).mul_(k[7]) for j in range(2)]
    alone = [rows.clamp_(min=0) for rows in b]
    h = [alone[j].where(both[1 - j] <= 0, both[j].clamp(min=0)) for j in range(2)]
    return [_level(level, _sum(k[8 + 2 * c : 10 + 2 * c], h).add_(into[c]), stains.OD_STEPS) for c in range(3)]


def _by_reinhard(planes: list[torch.Tensor], k: list[torch.Tensor], shape: tuple[int, int]) -> list[torch.Tensor]:
    light, root, level = _light_tables(planes[0].device)
    there, back = stains.light_matrices()
    v = [light.index_select(0, plane).reshape(shape) for plane in planes]
    f = [_level(root, _sum(row, v), stains.LIGHT_STEPS) for row in there.tolist()]
    f = [_sum(k[3 * c : 3 * c + 3], f).add_(k[9 + c]) for c in range(3)]
    xyz = [(x * x).mul_(x).where(x > 0.2068966, (x - 16 / 116).mul_(1 / 7.787)) for x in f]
    return [_level(level, _sum(row, xyz), stains.LIGHT_STEPS) for row in back.tolist()]


def _sum(factors: Sequence[torch.Tensor | float], planes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Products and sums one by one: a fused one would round otherwise on some devices."""
    total = planes[0] * factors[0]
    for factor, plane in zip(factors[1:], planes[1:], strict=True):
        total += plane * factor
    return total


def _level(table: torch.Tensor, values: torch.Tensor, steps: int) -> torch.Tensor:
    at = values.mul_(steps).round_().clamp_(0, len(table) - 1).int()
    return table.index_select(0, at.reshape(-1)).reshape(values.shape)


@lru_cache(maxsize=8)
def _od_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    density, level = (torch.from_numpy(table.copy()).to(device) for table in stains.od_tables())
    return density, level


@lru_cache(maxsize=8)
def _light_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    light, root, level = (torch.from_numpy(table.copy()).to(device) for table in stains.light_tables())
    return light, root, level

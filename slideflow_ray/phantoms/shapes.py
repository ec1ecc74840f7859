"""Outlines, noise, textures and nuclei, of which every phantom is painted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Ring = npt.NDArray[np.float64]
Random = np.random.Generator


@dataclass(frozen=True)
class Nucleus:
    """A kind of nucleus: semi-axes in um, how irregular, how dark (0-255), and um from one to the next."""

    long_um: tuple[float, float]
    short_um: tuple[float, float]
    irregular: float
    dark: tuple[int, int]
    spacing_um: float


def wavy_ring(rng: Random, radius: npt.NDArray[np.float64], rough: float, points: int = 72) -> Ring:
    """Return a closed wavy outline around (0, 0), float64, shape (points + 1, 2)."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    order = np.arange(2, 9)
    waves = rng.normal(0, rough / order**0.7)[:, None] * np.cos(
        order[:, None] * angle + rng.uniform(0, 2 * np.pi, (7, 1))
    )
    r = np.clip(1 + waves.sum(axis=0), 0.45, 1.3)
    ring = np.column_stack([r * np.cos(angle) * radius[0], r * np.sin(angle) * radius[1]])
    return np.vstack([ring, ring[:1]])


def point_list(ring: Ring) -> list[tuple[float, float]]:
    """Return a ring as Pillow draws it."""
    return [(float(x), float(y)) for x, y in ring]


def smooth_noise(rng: Random, size: tuple[int, int], cell: float) -> Plane:
    """Return smooth noise of mean 0 and standard deviation 1, float32, shape (h, w), that varies over `cell` pixels."""
    w, h = size
    grid = (max(2, round(w / cell) + 2), max(2, round(h / cell) + 2))
    noise = Image.fromarray(rng.normal(size=(grid[1], grid[0])).astype(np.float32))
    field = np.asarray(noise.resize(size, Image.Resampling.BICUBIC))
    return np.asarray((field - field.mean()) / max(float(field.std()), 1e-6), np.float32)


def disk_at(shape: tuple[int, ...], xy: tuple[float, float], radius: float) -> Mask:
    """Return where a disc around (x, y) is, bool, of `shape` (h, w)."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    disk: Mask = (x - xy[0]) ** 2 + (y - xy[1]) ** 2 <= radius**2
    return disk


def tiled_over(texture: Any, size_px0: tuple[int, int]) -> Any:
    """Return a texture repeated over the slide."""
    w, h = size_px0
    times = (-(-h // texture.shape[0]), -(-w // texture.shape[1])) + (1,) * (texture.ndim - 2)
    return np.tile(texture, times)[:h, :w]


def fibre_texture(rng: Random, side: int) -> Plane:
    """Return a seamless texture of wavy fibres, float32, shape (side, side), mean 0 and standard deviation 1."""
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    out = np.zeros((side, side))
    for angle in rng.uniform(0, 0.6 * np.pi, 7):
        along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
        band = np.exp(-((along / 0.014) ** 2) - ((across - 0.05) / 0.06) ** 2)
        out += np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) * band).real
    grain = np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) * np.exp(-(fx**2 + fy**2) / 0.02)).real
    out = out / out.std() + 0.5 * grain / grain.std()
    return np.asarray((out - out.mean()) / out.std(), np.float32)


def draw_nucleus(rng: Random, kind: Nucleus, mpp0: float) -> Pixels:
    """Return one nucleus, uint8, square with an odd side: darkness, with a rim, grains and a soft border."""
    half = int(1.35 * kind.long_um[1] / mpp0) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float64)
    turn = rng.uniform(0, np.pi)
    long, short = rng.uniform(*kind.long_um) / mpp0, rng.uniform(*kind.short_um) / mpp0
    u, v = (x * np.cos(turn) + y * np.sin(turn)) / long, (y * np.cos(turn) - x * np.sin(turn)) / short
    angle = np.arctan2(v, u)
    order, phase = np.arange(2, 6), rng.uniform(0, 2 * np.pi, 4)
    waves = rng.normal(0, kind.irregular / 2, 4)
    border = 1 + sum(a * np.cos(n * angle + p) for a, n, p in zip(waves, order, phase, strict=True))
    inside = np.clip((border - np.hypot(u, v)) / 0.25 + 0.5, 0, 1)
    rim = np.clip(np.hypot(u, v) / border, 0, 1) ** 4
    grains = 1 + 0.10 * rng.normal(size=x.shape)
    dark = rng.uniform(*kind.dark) * (0.85 + 0.2 * rim) * grains
    return np.asarray(np.clip(inside * dark, 0, 255), np.uint8)


def depth_of(mask: Mask) -> Plane:
    """Return each pixel's distance to the border of `mask`."""
    from scipy import ndimage

    depth: Plane = ndimage.distance_transform_edt(mask).astype(np.float32)
    return depth

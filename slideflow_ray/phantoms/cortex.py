"""Kidney cortex: tubules back to back, a little stroma, arteries, and glomeruli among them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
from PIL import Image

from slideflow_ray.phantoms.glomerulus import PAINTS, Glomerulus, paint_glomerulus, stamp, stamps
from slideflow_ray.phantoms.shapes import (
    Pixels,
    Plane,
    Random,
    Ring,
    fibre_texture,
    smooth_noise,
    tiled_over,
    wavy_ring,
)
from slideflow_ray.phantoms.stains import Stain

COARSE: Final = 16
TUBULE_UM: Final = 51.0
"""From the middle of a tubule to the next."""


def paint_cortex(
    rng: Random,
    size_px0: tuple[int, int],
    glomeruli: Sequence[Glomerulus],
    stain: Stain,
    mpp0: float,
    tissue: Plane | None = None,
) -> tuple[Pixels, Pixels]:
    """Return the amounts of nuclear and of the second stain, uint8, each shape (h, w).

    `tissue` (0 to 1, any size) leaves glass where it is below a half; None is tissue everywhere.
    """
    other = np.ascontiguousarray(tiled_over(np.roll(_stroma(stain), rng.integers(0, 512, 2), (0, 1)), size_px0))
    nuclear = np.zeros_like(other)
    _sow(rng, nuclear, mpp0)
    _lay_tubules(rng, nuclear, other, glomeruli, stain, mpp0)
    _lay_arteries(rng, nuclear, other, glomeruli, stain, mpp0)
    for one in glomeruli:
        paint_glomerulus(rng, nuclear, other, one, stain, mpp0)
    return _finished(rng, nuclear, tissue), _finished(rng, other, tissue)


@cache
def _stroma(stain: Stain) -> Pixels:
    texture = fibre_texture(np.random.default_rng(20261125), 512)
    return np.asarray(np.clip(255 * PAINTS[stain].stroma * (0.8 + 0.18 * texture), 0, 255), np.uint8)


def _finished(rng: Random, plane: Pixels, tissue: Plane | None) -> Pixels:
    """Return a plane with the section's varying thickness, and nothing where there is no tissue."""
    size = (plane.shape[1], plane.shape[0])
    small = (max(size[0] // COARSE, 1), max(size[1] // COARSE, 1))
    thick = np.clip(rng.uniform(0.85, 1.15) + 0.12 * smooth_noise(rng, small, 22), 0.6, 1.4)
    factor = np.asarray(Image.fromarray(thick.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    if tissue is not None:
        there = np.asarray(Image.fromarray(tissue).resize(size, Image.Resampling.BICUBIC))
        factor = factor * np.clip(4 * (there - 0.5) + 0.5, 0, 1)
    return np.asarray(np.clip(plane * factor, 0, 255), np.uint8)


def _sow(rng: Random, nuclear: Pixels, mpp0: float) -> None:
    """Sow the nuclei of the stroma everywhere; tubules cover most of them."""
    h, w = nuclear.shape
    crowd = np.clip(0.35 + 0.3 * smooth_noise(rng, (w // COARSE + 1, h // COARSE + 1), 20), 0.1, 0.95)
    step = 11.0 / mpp0
    made = stamps("flat", mpp0)
    for y in np.arange(step / 2, h, step):
        xs = np.arange(step / 2, w, step)
        xs = xs[rng.random(len(xs)) < crowd[int(y) // COARSE, (xs // COARSE).astype(int)]]
        dx, dy = rng.uniform(-0.4, 0.4, (2, len(xs))) * step
        picks = rng.integers(len(made), size=len(xs)).tolist()
        for x, down, pick in zip((xs + dx).astype(int).tolist(), dy.tolist(), picks, strict=True):
            stamp(nuclear, made[pick], x, int(y + down))


# tubules

Stamp = tuple[Pixels, Pixels, Pixels]


def _lay_tubules(
    rng: Random, nuclear: Pixels, other: Pixels, glomeruli: Sequence[Glomerulus], stain: Stain, mpp0: float
) -> None:
    """Lay tubules in a jittered hexagonal order, none into a glomerulus."""
    h, w = nuclear.shape
    made = _tubules(stain, mpp0)
    step = TUBULE_UM / mpp0
    middles = np.array([one.xy_px0 for one in glomeruli]).reshape(-1, 2)
    reach = np.array([max(one.box_px0[2:]) / 2 for one in glomeruli])
    for row, y in enumerate(np.arange(-0.2 * step, h + step, 0.866 * step)):
        for x in np.arange((row % 2) * step / 2 - 0.2 * step, w + step, step):
            place = np.array([x, y]) + rng.uniform(-0.2, 0.2, 2) * step
            pick, skip = int(rng.integers(len(made))), rng.random() < 0.04
            if skip or (len(middles) and (np.hypot(*(middles - place).T) < reach + 4 / mpp0).any()):
                continue
            _press(nuclear, other, made[pick], int(place[0]), int(place[1]))


@cache
def _tubules(stain: Stain, mpp0: float) -> list[Stamp]:
    """Return 160 tubules, the same in every process."""
    rng = np.random.default_rng(20261126)
    return [_tubule(rng, stain, mpp0) for _ in range(160)]


def _press(nuclear: Pixels, other: Pixels, made: Stamp, x: int, y: int) -> None:
    half = made[0].shape[0] // 2
    top, left = y - half, x - half
    rows, cols = slice(max(top, 0), max(top + 2 * half + 1, 0)), slice(max(left, 0), max(left + 2 * half + 1, 0))
    shape = nuclear[rows, cols].shape
    cut = [part[max(-top, 0) :, max(-left, 0) :][: shape[0], : shape[1]] for part in made]
    np.copyto(nuclear[rows, cols], cut[0], where=cut[2] > 0)
    np.copyto(other[rows, cols], cut[1], where=cut[2] > 0)


def _tubule(rng: Random, stain: Stain, mpp0: float) -> Stamp:
    """Return a tubule: nuclear and second stain and where it is, each uint8, square with an odd side."""
    paints = PAINTS[stain]
    proximal = rng.random() < 0.65
    long = rng.uniform(25, 31)
    radius = np.array([long, long * rng.uniform(0.78, 1.0)]) / mpp0
    half = int(1.3 * radius.max()) + 2
    rho, theta, reach = _inside_of(wavy_ring(rng, radius, 0.04, 48), half, rng.uniform(0, np.pi))
    deep_um = (1 - rho) * reach * mpp0
    high = (rng.uniform(12, 17) if proximal else rng.uniform(6, 9)) + 1.5 * np.cos(5 * theta + rng.uniform(0, 6))
    grain = 0.9 + 0.12 * smooth_noise(rng, (2 * half + 1, 2 * half + 1), 4 / mpp0)
    amount = np.where(deep_um < high, paints.cytoplasm * grain * (1.05 if proximal else 0.8), 0.0)
    if proximal:
        amount = np.where(np.abs(deep_um - high + 1.5) < 1.7, paints.brush * 0.8, amount)
    amount = np.maximum(amount, paints.membrane * 0.9 * np.exp(-((deep_um - 0.8) ** 2)))
    blue = np.zeros((2 * half + 1, 2 * half + 1), np.uint8)
    nuclei, step = stamps("tubule", mpp0), 13.0 if proximal else 10.0
    number = int(2 * np.pi * 0.75 * long / step)
    for angle in (np.arange(number) + rng.uniform(-0.25, 0.25, number)) * (2 * np.pi / number):
        at = (1 - (5.5 if proximal else 4.5) / long) * radius.mean()
        x, y = half + at * np.cos(angle), half + at * np.sin(angle)
        if rng.random() < 0.8:
            stamp(blue, nuclei[int(rng.integers(len(nuclei)))], int(x), int(y))
    inside = rho < 1
    amount = np.where(blue > 60, 0.5 * amount, amount)
    return blue * inside, np.clip(255 * amount, 0, 255).astype(np.uint8), inside.astype(np.uint8)


def _inside_of(ring: Ring, half: int, turn: float) -> tuple[Plane, Plane, Plane]:
    """Return 0 to 1 from the middle to the ring, the angle, and the ring's distance in that direction."""
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    theta = np.arctan2(y, x)
    at = np.arctan2(ring[:-1, 1], ring[:-1, 0])
    reach = np.interp((theta + turn).ravel(), at, np.hypot(*ring[:-1].T), period=2 * np.pi).reshape(theta.shape)
    return (np.hypot(x, y) / reach).astype(np.float32), theta, reach.astype(np.float32)


# arteries


def _lay_arteries(
    rng: Random, nuclear: Pixels, other: Pixels, glomeruli: Sequence[Glomerulus], stain: Stain, mpp0: float
) -> None:
    """Lay arteries of 70 to 150 um, about two in a square millimetre, beside the glomeruli."""
    h, w = nuclear.shape
    middles = np.array([one.xy_px0 for one in glomeruli]).reshape(-1, 2)
    reach = np.array([max(one.box_px0[2:]) / 2 for one in glomeruli])
    for _ in range(round(2 * h * w * (mpp0 / 1000) ** 2)):
        place, radius = rng.uniform(0, (w, h)), rng.uniform(35, 75)
        made = _artery(rng, radius, stain, mpp0)
        if not len(middles) or (np.hypot(*(middles - place).T) > reach + 1.2 * radius / mpp0).all():
            _press(nuclear, other, made, int(place[0]), int(place[1]))


def _artery(rng: Random, radius_um: float, stain: Stain, mpp0: float) -> Stamp:
    """Return an artery: a wall of muscle in layers with flat nuclei, around an open lumen."""
    half = int(1.2 * radius_um / mpp0) + 2
    side = 2 * half + 1
    radius = radius_um / mpp0 * np.array([1.0, rng.uniform(0.75, 1.0)])
    rho, theta, _ = _inside_of(wavy_ring(rng, radius, 0.03, 48), half, rng.uniform(0, np.pi))
    inner = rng.uniform(0.45, 0.6) + 0.025 * np.cos(9 * theta)
    layers = 0.85 + 0.15 * np.sin(rho * radius_um / 2.2 + 0.8 * smooth_noise(rng, (side, side), 20 / mpp0))
    paints = PAINTS[stain]
    amount = np.where(rho > inner, paints.muscle * layers, 0.0)
    amount = np.maximum(amount, paints.membrane * 0.8 * np.exp(-(((rho - inner) * radius_um / 1.5) ** 2)))
    blue = np.zeros((side, side), np.uint8)
    nuclei = stamps("flat", mpp0)
    for _ in range(int(radius_um**2 / 55)):
        x, y = rng.integers(0, side, 2).tolist()
        if rho[y, x] > inner[y, x]:
            stamp(blue, nuclei[int(rng.integers(len(nuclei)))], x, y)
    inside = rho < 1
    return blue * inside, np.clip(255 * amount, 0, 255).astype(np.uint8), inside.astype(np.uint8)

"""Glomeruli, normal and diseased, told apart by structure alone.

A capsule, Bowman's space, and a tuft of capillary loops: the level sets of smooth noise.
Every kind draws the same number of nuclei, share of white and amount of stain from the same
distributions and only puts them elsewhere: MsPGN into stalks of matrix with crowded nuclei,
FSG matrix into one segment that sticks to the capsule, CGN cells into Bowman's space.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import numpy as np

from slideflow_ray.phantoms.shapes import (
    Mask,
    Nucleus,
    Pixels,
    Plane,
    Random,
    Ring,
    draw_nucleus,
    smooth_noise,
    wavy_ring,
)
from slideflow_ray.phantoms.stains import Stain

KINDS: Final = ("Normal", "MsPGN", "FSG", "CGN")
"""The classes of source 001: normal, mesangial proliferation, segmental sclerosis, crescent."""
MIXED: Final = "FSG+CGN"
GLOBAL: Final = "GS"
"""A globally sclerosed glomerulus: matrix and little else."""

NUCLEI: Final = {
    "tuft": Nucleus((2.9, 3.9), (2.3, 3.3), 0.05, (130, 225), 0.0),
    "flat": Nucleus((4.2, 6.2), (1.2, 1.9), 0.04, (120, 220), 0.0),
    "tubule": Nucleus((2.9, 3.6), (2.6, 3.4), 0.03, (110, 205), 0.0),
}
SITE_UM: Final = 6.2
"""From one place for a nucleus to the next: crowded nuclei touch."""


@dataclass(frozen=True)
class Paints:
    """How much of the second stain (0 to 1) there is in what, for one stain."""

    cytoplasm: float
    matrix: float
    wall: float
    membrane: float
    stroma: float
    brush: float
    muscle: float


PAINTS: Final[dict[Stain, Paints]] = {
    "he": Paints(cytoplasm=0.40, matrix=0.54, wall=0.60, membrane=0.62, stroma=0.40, brush=0.50, muscle=0.62),
    "pas": Paints(cytoplasm=0.38, matrix=0.53, wall=0.59, membrane=0.72, stroma=0.27, brush=0.60, muscle=0.33),
}


@dataclass(frozen=True)
class Glomerulus:
    """One glomerulus: its kind and its capsule, a closed ring in px0 around `xy_px0`, float64, shape (n, 2)."""

    kind: str
    xy_px0: tuple[float, float]
    ring_px0: Ring

    @property
    def box_px0(self) -> tuple[float, float, float, float]:
        """Left, top, width and height of the capsule."""
        low, high = self.ring_px0.min(axis=0), self.ring_px0.max(axis=0)
        return float(low[0]), float(low[1]), float(high[0] - low[0]), float(high[1] - low[1])

    def reach_px0(self, angle: float) -> float:
        """How far the capsule lies from the centre in one direction (radians, y down)."""
        at, reach = _polar(self.ring_px0 - self.xy_px0)
        return float(np.interp(angle, at, reach, period=2 * np.pi))


def make_glomerulus(rng: Random, kind: str, xy_px0: tuple[float, float], mpp0: float) -> Glomerulus:
    """Return a glomerulus of 150 to 215 um, slightly oval."""
    radius = rng.uniform(75, 107) / mpp0 * (0.8 if kind == GLOBAL else 1.0)
    ring = wavy_ring(rng, radius * rng.uniform(0.93, 1.07, 2), 0.025, 96)
    return Glomerulus(kind, xy_px0, np.asarray(ring + np.array(xy_px0)))


def _polar(ring: Ring) -> tuple[Ring, Ring]:
    return np.arctan2(ring[:-1, 1], ring[:-1, 0]), np.hypot(ring[:-1, 0], ring[:-1, 1])


@dataclass(frozen=True)
class _Ground:
    """The square around a glomerulus: `rho` is 0 at its centre and 1 on the capsule, `theta` the angle."""

    rho: Plane
    theta: Plane
    radius_px: float
    mpp0: float

    def noise(self, rng: Random, cell_um: float) -> Plane:
        side = self.rho.shape[0]
        return smooth_noise(rng, (side, side), cell_um / self.mpp0)

    def away(self, angle: float) -> Plane:
        """The angle from a direction, 0 to pi."""
        return np.abs((self.theta - np.float32(angle) + np.pi) % (2 * np.pi) - np.pi)


@dataclass(frozen=True)
class _Tissue:
    """What is where: masks of one shape. `solid`: how far a pixel lies inside matrix without loops."""

    tuft: Mask
    segment: Mask
    stalk: Mask
    crescent: Mask


def paint_glomerulus(rng: Random, nuclear: Pixels, other: Pixels, one: Glomerulus, stain: Stain, mpp0: float) -> None:
    """Paint one glomerulus over what is there; parts outside of the planes are left out."""
    ground, left, top = _ground(one, mpp0)
    tissue = _arrange(rng, ground, one.kind)
    blue = _nuclei(rng, ground, tissue, one.kind)
    amount = _stain(rng, ground, tissue, stain, blue > 60)
    inside = ground.rho < 1 + 2.2 / mpp0 / ground.radius_px
    for plane, new in ((nuclear, blue), (other, 255 * amount)):
        _paste(plane, new, inside, left, top)


def _paste(plane: Pixels, new: Plane, inside: Mask, left: int, top: int) -> None:
    side = inside.shape[0]
    cut = (slice(max(-top, 0), plane.shape[0] - top), slice(max(-left, 0), plane.shape[1] - left))
    target = plane[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    np.copyto(target, np.clip(new[cut], 0, 255).astype(np.uint8), where=inside[cut])


def _ground(one: Glomerulus, mpp0: float) -> tuple[_Ground, int, int]:
    """Return the square around a glomerulus and where its left top pixel lies."""
    at, reach = _polar(one.ring_px0 - one.xy_px0)
    half = int(reach.max() + 5 / mpp0) + 1
    left, top = round(one.xy_px0[0]) - half, round(one.xy_px0[1]) - half
    x = np.arange(left, left + 2 * half + 1, dtype=np.float32)[None, :] + np.float32(0.5 - one.xy_px0[0])
    y = np.arange(top, top + 2 * half + 1, dtype=np.float32)[:, None] + np.float32(0.5 - one.xy_px0[1])
    theta = np.arctan2(y, x)
    order = np.argsort(at)
    table = np.interp(np.linspace(-np.pi, np.pi, 1024), at[order], reach[order], period=2 * np.pi).astype(np.float32)
    capsule = table[((theta + np.pi) * (1023 / (2 * np.pi))).astype(np.int32)]
    return _Ground(np.hypot(x, y) / capsule, theta, float(reach.mean()), mpp0), left, top


# structure


def _arrange(rng: Random, ground: _Ground, kind: str) -> _Tissue:
    """Say what is tuft, sclerosed segment, mesangial stalk and crescent."""
    rho = ground.rho
    lobes, turn = int(rng.integers(5, 9)), rng.uniform(0, 2 * np.pi)
    gap = rng.uniform(0.07, 0.13) + 0.035 * np.cos(lobes * ground.theta + turn) + 0.012 * ground.noise(rng, 18)
    if rng.random() < 0.4:  # the vascular pole, where the tuft hangs
        gap = gap * np.clip((ground.away(rng.uniform(0, 2 * np.pi)) - 0.12) / 0.15, 0, 1)
    edge = 1 - np.maximum(gap, 0)
    nothing = np.zeros(rho.shape, np.bool_)
    segment, crescent = nothing, nothing
    where = rng.uniform(0, 2 * np.pi)
    if "FSG" in kind:
        segment, edge = _segment(rng, ground, edge, where)
    if "CGN" in kind:
        far = where + np.pi + rng.uniform(-0.5, 0.5)
        crescent, edge = _crescent(rng, ground, edge, far)
    tuft = rho < edge
    if kind == GLOBAL:
        tuft = rho < 0.985
        segment = tuft
    share = rng.uniform(0.40, 0.52) if kind == "MsPGN" else rng.uniform(0.02, 0.08)
    stalk = _stalks(rng, ground, tuft & ~segment, share)
    return _Tissue(tuft, segment & tuft, stalk, crescent)


def _segment(rng: Random, ground: _Ground, edge: Plane, where: float) -> tuple[Mask, Plane]:
    """A solid part of the tuft at one side, and the tuft's new edge: there it sticks to the capsule."""
    away = ground.away(where)
    distance = np.sqrt(np.maximum(ground.rho**2 + 0.8**2 - 1.6 * ground.rho * np.cos(away), 0))
    segment = distance + 0.05 * ground.noise(rng, 22) < rng.uniform(0.66, 0.84)
    stuck = np.clip((rng.uniform(0.5, 0.75) - away) / 0.12, 0, 1)
    return segment, np.asarray(edge + (1.0 - edge) * stuck, np.float32)


def _crescent(rng: Random, ground: _Ground, edge: Plane, where: float) -> tuple[Mask, Plane]:
    """Cells between capsule and tuft along an arc, and the edge of the tuft that they press in."""
    span = rng.uniform(1.0, 1.7)
    taper = np.maximum(np.cos(np.clip(ground.away(where) / span, 0, 1) * np.pi / 2), 0) ** 0.6
    thick = rng.uniform(0.27, 0.38) * taper * (1 + 0.10 * ground.noise(rng, 30))
    crescent = (ground.rho > 1 - thick) & (thick > 0.05) & (ground.rho < 1)
    return crescent, np.minimum(edge, np.where(thick > 0.04, 1 - thick - 0.035, edge))


def _stalks(rng: Random, ground: _Ground, where: Mask, share: float) -> Mask:
    """The mesangium: `share` of the tuft, in branches from the middle."""
    field = ground.noise(rng, 27) - 0.9 * ground.rho
    inside = field[where]
    return where & (field > np.quantile(inside, 1 - share)) if len(inside) else where


# stain


def _stain(rng: Random, ground: _Ground, tissue: _Tissue, stain: Stain, nuclei: Mask) -> Plane:
    """Return the amount of the second stain, float32, of which glass has none."""
    paints = _varied(rng, PAINTS[stain])
    loops = ground.noise(rng, 9.5)
    open_ = tissue.tuft & ~tissue.segment & ~tissue.stalk
    white = rng.uniform(0.27, 0.42)
    threshold = _threshold(white, ground, tissue, loops, open_ & ~nuclei, nuclei)
    lumen = np.clip((loops - threshold) / 0.25 + 0.5, 0, 1)
    wall = np.exp(-(((loops - threshold + 0.25) / 0.28) ** 2))
    amount = np.where(open_, (paints.cytoplasm + (paints.wall - paints.cytoplasm) * wall) * (1 - lumen), 0.0)
    grain = 1 + 0.09 * ground.noise(rng, 3.0) + 0.12 * ground.noise(rng, 14)
    amount = np.where(tissue.stalk | tissue.segment, paints.matrix * grain, amount)
    amount = np.where(tissue.crescent, 1.1 * paints.cytoplasm * grain, amount)
    capsule = np.exp(-(((ground.rho - 1) * ground.radius_px * ground.mpp0 / 1.3) ** 2))
    amount = np.maximum(amount, paints.membrane * capsule)
    if not tissue.segment[ground.rho < 0.9].all():  # one that is sclerosed all over has no space to match
        inside = ground.rho < 1
        _even(rng, amount, inside & ~nuclei, white, float((capsule[inside] > 0.5).mean()), paints)
    amount[nuclei] = 0.4 * paints.cytoplasm
    return np.asarray(amount, np.float32)


def _varied(rng: Random, paints: Paints) -> Paints:
    """Return paints as one glomerulus takes them, so that no amount is that of a kind."""
    names = ("cytoplasm", "matrix", "wall", "membrane")
    factors = rng.uniform((0.75, 0.75, 0.75, 0.75), (1.3, 1.2, 1.35, 1.15)).tolist()
    return replace(paints, **{name: getattr(paints, name) * by for name, by in zip(names, factors, strict=True)})


def _threshold(white: float, ground: _Ground, tissue: _Tissue, loops: Plane, open_: Mask, nuclei: Mask) -> float:
    """Return the level above which a loop is open: what makes the drawn share of the glomerulus white."""
    free = (ground.rho < 1) & ~nuclei
    space = (free & ~tissue.tuft & ~tissue.crescent).sum()
    share = np.clip((white * free.sum() - space) / max(int(open_.sum()), 1), 0.08, 0.75)
    return float(np.quantile(loops[open_], 1 - share)) if open_.any() else 9.0


def _even(rng: Random, amount: Plane, where: Mask, white: float, edge: float, paints: Paints) -> None:
    """Give the amounts a distribution drawn for all kinds alike, in place: their order stays.

    A share `white` has none, a share `edge` is capsule, the others spread evenly from cytoplasm to wall. The capsule
    is among them: over a crescent, stain hides its soft inner side, and over Bowman's space that would be seen.
    """
    found = amount[where] + rng.normal(0, 1e-3, int(where.sum()))
    rank = np.empty(len(found))
    rank[np.argsort(found)] = np.linspace(0, 1, len(found))
    low, high = 0.55 * paints.cytoplasm, 0.5 * (paints.wall + paints.matrix) * 1.15
    amount[where] = np.interp(rank, [white, 1 - edge, 1], [low, high, max(high, paints.membrane)])
    amount[where] *= rank >= white


# nuclei


@cache
def stamps(kind: str, mpp0: float) -> list[Pixels]:
    """Return 48 nuclei of one kind, the same in every process, each uint8 and square."""
    rng = np.random.default_rng([sorted(NUCLEI).index(kind), round(1e4 * mpp0)])
    return [draw_nucleus(rng, NUCLEI[kind], mpp0) for _ in range(48)]


def stamp(plane: Plane | Pixels, made: Pixels, x: int, y: int) -> None:
    """Press a nucleus onto `plane` around (x, y); of two that overlap the darker shows."""
    half = made.shape[0] // 2
    top, left = y - half, x - half
    target = plane[max(top, 0) : max(top + 2 * half + 1, 0), max(left, 0) : max(left + 2 * half + 1, 0)]
    part = made[max(-top, 0) :, max(-left, 0) :][: target.shape[0], : target.shape[1]]
    np.maximum(target, part, out=target, casting="unsafe")


def _nuclei(rng: Random, ground: _Ground, tissue: _Tissue, kind: str) -> Plane:
    """Return the nuclear stain of a glomerulus, float32, 0 to 255."""
    side = ground.rho.shape[0]
    out = np.zeros((side, side), np.float32)
    step = SITE_UM / ground.mpp0
    x, y = np.meshgrid(np.arange(step / 2, side, step), np.arange(step / 2, side, step))
    sites = np.column_stack([x.ravel(), y.ravel()]) + rng.uniform(-0.3, 0.3, (x.size, 2)) * step
    sites = np.clip(sites, 0, side - 1).astype(np.int64)
    wanted = np.zeros((side, side), np.float32)
    wanted[tissue.tuft] = 1.0
    wanted[tissue.stalk] = 7.0 if kind == "MsPGN" else 2.0
    wanted[tissue.segment] = 0.08
    wanted[tissue.crescent] = 7.0
    chance = wanted[sites[:, 1], sites[:, 0]]
    capsule = ground.rho < 1
    area = rng.uniform(0.13, 0.20) * (0.15 if kind == GLOBAL else 1.0) * capsule.sum()
    made = stamps("tuft", ground.mpp0)
    order = rng.choice(len(sites), int((chance > 0).sum()), replace=False, p=chance / chance.sum())
    for some in np.array_split(order, max(1, len(order) // 10)):
        if (out[capsule] > 60).sum() >= area:
            break
        for site in some.tolist():
            stamp(out, made[int(rng.integers(len(made)))], int(sites[site, 0]), int(sites[site, 1]))
    return out

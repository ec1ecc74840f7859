"""Thickness of the basement membrane along its length, from a mask: the number that the diagnosis uses.

Thickness is measured across the membrane, from its endothelial to its podocyte side: twice the distance from its
middle line to its edge. Cuts are seldom perpendicular, which makes membranes look thicker; the harmonic mean times
8 / (3 pi) corrects for it (Jensen, Gundersen and Osterby, J. Microsc. 115 (1979) 19-33). NumPy, SciPy and scikit-image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from slideflow_ray.errors import ConfigError

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

JENSEN = 8 / (3 * math.pi)
"""Of the harmonic mean of apparent thickness, for membranes cut at all angles alike."""


@dataclass(frozen=True)
class Thickness:
    """Thickness along a membrane's middle line.

    nm : float64, shape (n,), thickness at each place; weight_um : the length of middle line that each stands for
    xy_px : float64, shape (n, 2), where it was measured, pixel (0, 0) having its middle at (0.5, 0.5)
    """

    nm: Floats
    weight_um: Floats
    xy_px: Floats

    @property
    def length_um(self) -> float:
        """Length of the middle line that was measured."""
        return float(self.weight_um.sum())

    @property
    def mean_nm(self) -> float:
        """Arithmetic mean, NaN where nothing was measured."""
        return float(np.average(self.nm, weights=self.weight_um)) if len(self.nm) else math.nan

    @property
    def sd_nm(self) -> float:
        """Standard deviation along the length."""
        if not len(self.nm):
            return math.nan
        return math.sqrt(float(np.average((self.nm - self.mean_nm) ** 2, weights=self.weight_um)))

    @property
    def harmonic_nm(self) -> float:
        """Harmonic mean."""
        return float(self.length_um / (self.weight_um / self.nm).sum()) if len(self.nm) else math.nan

    @property
    def corrected_nm(self) -> float:
        """Harmonic mean times 8 / (3 pi): the true thickness where the angles of the cuts are random."""
        return JENSEN * self.harmonic_nm

    def percentiles_nm(self, percents: tuple[float, ...] = (5, 25, 50, 75, 95)) -> tuple[float, ...]:
        """Return percentiles of the thickness by length."""
        if not len(self.nm):
            return (math.nan,) * len(percents)
        order = np.argsort(self.nm)
        share = np.cumsum(self.weight_um[order]) - self.weight_um[order] / 2
        found = np.interp(np.array(percents) / 100 * self.length_um, share, self.nm[order])
        return tuple(float(value) for value in found)


def thickness(
    membrane: Bools,
    nm_per_px: float,
    sides: tuple[Bools, Bools] | None = None,
    least_um: float = 0.3,
    reach_nm: float = 150.0,
) -> Thickness:
    """Measure a membrane along its middle line.

    membrane : bool, shape (h, w); holes and grains in it are filled
    sides : masks of endothelium and podocytes, bool (h, w) each: only where there is endothelium within `reach_nm` of
        one edge, or podocyte within it of the other, is the membrane that of a capillary's wall; None measures all
    least_um : pieces of middle line shorter than this are left out

    Not measured: ends, branches, and what is nearer to the image's edge than half the thickness, where the cut
    membrane shows less than its width. Raises ConfigError.
    """
    if membrane.ndim != 2 or not nm_per_px > 0:
        raise ConfigError(f"A mask has rows and columns and a scale, got {membrane.shape} at {nm_per_px} nm per pixel.")
    from skimage.morphology import skeletonize

    filled = ndimage.binary_fill_holes(membrane)
    if not filled.any():
        return _nothing()
    depth = _depth(filled)
    line: Bools = skeletonize(filled)  # type: ignore[no-untyped-call]
    middle = _pruned(line, depth) & _away_from_rim(depth)
    if sides is not None:
        middle &= _between(filled, depth, sides, reach_nm / nm_per_px)
    middle = _long(middle, least_um * 1000 / nm_per_px)
    rows, cols = np.nonzero(middle)
    ridge = ndimage.maximum_filter(depth, 3)[rows, cols]  # the line lies within a pixel of the ridge
    return Thickness(
        nm=2 * ridge * nm_per_px,
        weight_um=_lengths(middle)[rows, cols] * nm_per_px / 1000,
        xy_px=np.column_stack([cols + 0.5, rows + 0.5]).astype(np.float64),
    )


def _depth(mask: Bools) -> Floats:
    """Return how far each pixel lies inside the mask, in pixels; on the middle line half the width.

    Computed on pixels cut in four: every width is even then, and the deepest of them lies half of one off the middle,
    by which it is too near to the edge, and as much too far, since the transform ends in the first pixel outside.
    """
    fine = np.pad(mask, 1, mode="edge").repeat(2, 0).repeat(2, 1)
    deep = ndimage.distance_transform_edt(fine)[2:-2, 2:-2] / 2
    found: Floats = deep.reshape(mask.shape[0], 2, mask.shape[1], 2).max((1, 3))
    return found


def _nothing() -> Thickness:
    return Thickness(np.empty(0), np.empty(0), np.empty((0, 2)))


NEIGHBOURS = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]])


def _pruned(line: Bools, depth: Floats) -> Bools:
    """Cut branches off: places with three neighbours, and what lies within half the thickness of ends and of these.

    What is left are stretches with an edge on either side. An end in view is where the mask ends, not the membrane.
    """
    count = ndimage.convolve(line.astype(np.int64), NEIGHBOURS, mode="constant")
    forks, ends = line & (count > 2), line & (count == 1)
    keep = line & ~forks
    pieces, n = ndimage.label(keep, structure=np.ones((3, 3)))
    size = ndimage.sum_labels(keep, pieces, np.arange(1, n + 1))
    deepest = ndimage.maximum(depth, pieces, np.arange(1, n + 1))
    has_end = np.isin(np.arange(1, n + 1), np.unique(pieces[ends]))
    spur = has_end & (size < 1.5 * np.atleast_1d(deepest)) & bool(forks.any())
    keep &= ~np.isin(pieces, np.flatnonzero(spur) + 1)
    keep |= forks & (ndimage.convolve(keep.astype(np.int64), NEIGHBOURS, mode="constant") >= 1)
    count = ndimage.convolve(keep.astype(np.int64), NEIGHBOURS, mode="constant")
    return keep & ~_near(keep & (count == 1), depth) & ~_near(keep & (count > 3), depth)


def _near(marks: Bools, depth: Floats) -> Bools:
    """Return what lies nearer to a mark than half the thickness there."""
    near = np.zeros(marks.shape, np.bool_)
    for row, col in np.argwhere(marks):
        reach = int(depth[row, col]) + 1
        top, left = max(0, row - reach), max(0, col - reach)
        window = near[top : row + reach + 1, left : col + reach + 1]
        y, x = np.ogrid[top : top + window.shape[0], left : left + window.shape[1]]
        window |= np.hypot(y - row, x - col) < depth[row, col]
    return near


def _away_from_rim(depth: Floats) -> Bools:
    h, w = depth.shape
    y, x = np.ogrid[:h, :w]
    rim = np.minimum(np.minimum(y, h - 1 - y), np.minimum(x, w - 1 - x)) + 0.5
    away: Bools = rim > depth
    return away


def _between(membrane: Bools, depth: Floats, sides: tuple[Bools, Bools], reach_px: float) -> Bools:
    """Return where one cell or the other lies within reach of the edge."""
    far = [ndimage.distance_transform_edt(~side) if side.any() else np.full(depth.shape, np.inf) for side in sides]
    found: Bools = membrane & ((far[0] - depth < reach_px) | (far[1] - depth < reach_px))
    return found


def _long(line: Bools, least_px: float) -> Bools:
    pieces, n = ndimage.label(line, structure=np.ones((3, 3)))
    if not n:
        return line
    size = ndimage.sum_labels(_lengths(line), pieces, np.arange(1, n + 1))
    found: Bools = np.isin(pieces, np.flatnonzero(np.atleast_1d(size) >= least_px) + 1)
    return found


STEPS = np.array([[math.sqrt(2), 1, math.sqrt(2)], [1, 0, 1], [math.sqrt(2), 1, math.sqrt(2)]]) / 2


def _lengths(line: Bools) -> Floats:
    """Return the length in pixels that each pixel of a line stands for: half the way to each neighbour."""
    found: Floats = ndimage.convolve(line.astype(np.float64), STEPS, mode="constant") * line
    return found


# boundaries


def surface_distances(one: Bools, other: Bools, nm_per_px: float = 1.0) -> Floats:
    """Return how far each boundary pixel of either mask is from the other's boundary, float64 (n,), in nm.

    Empty where neither has a pixel, infinite where one has none. Boundary pixels belong to the mask and touch by an
    edge what does not; the image's rim is no boundary.
    """
    a, b = _boundary(one), _boundary(other)
    if not a.any() and not b.any():
        return np.empty(0)
    if not a.any() or not b.any():
        return np.full(int(a.sum() + b.sum()), math.inf)
    there = ndimage.distance_transform_edt(~b)[a]
    back = ndimage.distance_transform_edt(~a)[b]
    return nm_per_px * np.concatenate([there, back])


def _boundary(mask: Bools) -> Bools:
    return mask & ~ndimage.binary_erosion(mask, border_value=1)


@dataclass(frozen=True)
class Surface:
    """How two masks' boundaries lie: `hd95` and `assd` in nm, infinite where one mask is empty, and `boundary_f`."""

    hd95: float
    assd: float
    boundary_f: float


def surface(one: Bools, other: Bools, tolerance_nm: float, nm_per_px: float = 1.0) -> Surface:
    """Return how far two masks' boundaries are from each other, all of it from one pair of distance transforms.

    hd95 : the 95th percentile of the distances in nm, of both directions together, as MedPy's hd95 takes it
    assd : the mean of both directions' means, in nm
    boundary_f : F1 of boundary pixels within `tolerance_nm` of the other's boundary (Martin et al., PAMI 2004); 0 where
        one mask is empty

    All are NaN where both masks are empty.
    """
    found = surface_distances(one, other, nm_per_px)
    if not len(found):
        return Surface(math.nan, math.nan, math.nan)
    if not np.isfinite(found).all():
        return Surface(math.inf, math.inf, 0.0)
    n = int(_boundary(one).sum())
    there, back = found[:n], found[n:]
    precision, recall = (float((part <= tolerance_nm).mean()) for part in (there, back))
    f = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return Surface(float(np.percentile(found, 95)), float((there.mean() + back.mean()) / 2), f)


def hd95(one: Bools, other: Bools, nm_per_px: float = 1.0) -> float:
    """Return the 95th percentile of the surface distances in nm; NaN where both masks are empty (see `surface`)."""
    return surface(one, other, 0.0, nm_per_px).hd95


def assd(one: Bools, other: Bools, nm_per_px: float = 1.0) -> float:
    """Return the average symmetric surface distance in nm (see `surface`)."""
    return surface(one, other, 0.0, nm_per_px).assd


def boundary_f(one: Bools, other: Bools, tolerance_nm: float, nm_per_px: float = 1.0) -> float:
    """Return F1 of boundary pixels within `tolerance_nm` of the other's boundary (see `surface`)."""
    return surface(one, other, tolerance_nm, nm_per_px).boundary_f

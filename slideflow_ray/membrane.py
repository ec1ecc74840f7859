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

HOLE_UM2 = 0.15**2
"""Area below which a hole in a membrane is filled: gaps in a mask are smaller, and the least that a wall closes around
when it comes back to itself, the lumen of a capillary or a fold of it, is larger."""


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
        return float(np.average(self.nm, weights=self.weight_um)) if self.length_um else math.nan

    @property
    def sd_nm(self) -> float:
        """Standard deviation along the length."""
        if not self.length_um:
            return math.nan
        return math.sqrt(float(np.average((self.nm - self.mean_nm) ** 2, weights=self.weight_um)))

    @property
    def harmonic_nm(self) -> float:
        """Harmonic mean."""
        return float(self.length_um / (self.weight_um / self.nm).sum()) if self.length_um else math.nan

    @property
    def corrected_nm(self) -> float:
        """Harmonic mean times 8 / (3 pi): the true thickness where the angles of the cuts are random."""
        return JENSEN * self.harmonic_nm

    def percentiles_nm(self, percents: tuple[float, ...] = (5, 25, 50, 75, 95)) -> tuple[float, ...]:
        """Return percentiles of the thickness by length."""
        if not self.length_um:
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
    known: Bools | None = None,
) -> Thickness:
    """Measure a membrane along its middle line.

    membrane : bool, shape (h, w); holes in it are filled, if they are smaller than HOLE_UM2. A wall that closes around
        a larger one is measured along all of its way
    sides : masks of endothelium and podocytes, bool (h, w) each: only with one of them on either side is the membrane
        that of a capillary's wall (see `_between`); None measures all
    reach_nm : how far a cell may be from the membrane's edge
    least_um : pieces of middle line shorter than this are left out
    known : bool (h, w), False where nothing is known of a pixel: no edge of the membrane is there, but one of the image

    Not measured: ends, branches, and what is nearer to the image's edge than half the thickness, where the cut
    membrane shows less than its width. Raises ConfigError.
    """
    if membrane.ndim != 2 or not nm_per_px > 0:
        raise ConfigError(f"A mask has rows and columns and a scale, got {membrane.shape} at {nm_per_px} nm per pixel.")
    from skimage.morphology import skeletonize

    known = np.ones(membrane.shape, np.bool_) if known is None else known
    filled = _filled(membrane & known, known, HOLE_UM2 * (1000 / nm_per_px) ** 2)
    if not filled.any() or (filled | ~known).all():  # without an edge there is no thickness
        return _nothing()
    depth = _depth(filled | ~known)
    line: Bools = skeletonize(filled)  # type: ignore[no-untyped-call]
    middle = _pruned(line, depth) & _away_from_rim(depth, known)
    if sides is not None:
        middle = _between(middle, depth, sides, reach_nm / nm_per_px)
    middle = _long(middle, least_um * 1000 / nm_per_px)
    rows, cols = np.nonzero(middle)
    ridge = ndimage.maximum_filter(depth, 3)[rows, cols]  # the line lies within a pixel of the ridge
    return Thickness(
        nm=2 * ridge * nm_per_px,
        weight_um=_lengths(middle)[rows, cols] * nm_per_px / 1000,
        xy_px=np.column_stack([cols + 0.5, rows + 0.5]).astype(np.float64),
    )


def _filled(membrane: Bools, known: Bools, below_px: float) -> Bools:
    """Fill holes of fewer than so many pixels; what reaches the rim, or what is not known, is no hole."""
    parts, n = ndimage.label(~membrane)
    size = np.bincount(parts.ravel(), minlength=n + 1)
    small = size < below_px
    small[[0, *parts[0], *parts[-1], *parts[:, 0], *parts[:, -1]]] = False
    small[np.unique(parts[~known])] = False
    found: Bools = membrane | small[parts]
    return found


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
    """Cut branches off, and what lies within half the thickness of ends and of places where lines meet.

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
    meet = _ways(keep) > 2
    return keep & ~_near(keep & (count == 1), depth) & ~_near(meet, depth)


ROUND = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


def _ways(line: Bools) -> npt.NDArray[np.int64]:
    """Return how many ways lead away from each pixel of a line: neighbours that touch each other are one."""
    wide = np.pad(line, 1)
    rows, cols = np.nonzero(wide)
    around = np.array([wide[rows + y, cols + x] for y, x in ROUND])
    found = np.zeros(wide.shape, np.int64)
    found[rows, cols] = (around & ~np.roll(around, 1, 0)).sum(0)
    return found[1:-1, 1:-1]


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


def _away_from_rim(depth: Floats, known: Bools) -> Bools:
    """Return what is farther from the rim than from its edge, by a pixel: the middle of a cut band is as far from both.

    The rim lies half a pixel before the middle of the first pixel that is not known, or not there.
    """
    rim = ndimage.distance_transform_edt(np.pad(known, 1))[1:-1, 1:-1] - 0.5
    away: Bools = rim > depth + 1
    return away


def _between(line: Bools, depth: Floats, sides: tuple[Bools, Bools], reach_px: float) -> Bools:
    """Return where both cells lie within reach, one on one side of the line and one on the other.

    A cell is within reach whose nearest pixel is no more than half the thickness and the reach away, in any direction:
    with 300 nm and 150 nm it may be missing from 500 nm of the edge, so fenestrae and slits tear no holes. The sides
    are opposite where the ways to both make more than a right angle; so what is bare on both sides at once counts for
    as far as it is thick.
    """
    if not all(side.any() for side in sides):
        return np.zeros_like(line)
    places = np.argwhere(line)
    one, other = (_ways_to(side, places) for side in sides)
    most = depth[line] + reach_px
    close = [np.hypot(*way.T) < most for way in (one, other)]
    found = np.zeros_like(line)
    found[line] = close[0] & close[1] & ((one * other).sum(1) < 0)
    return found


def _ways_to(side: Bools, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the way (rows, cols) from each place to the nearest pixel of a mask."""
    nearest = ndimage.distance_transform_edt(~side, return_distances=False, return_indices=True)
    ways: npt.NDArray[np.int64] = nearest[:, places[:, 0], places[:, 1]].T.astype(np.int64) - places
    return ways


def _long(line: Bools, least_px: float) -> Bools:
    pieces, n = ndimage.label(line, structure=np.ones((3, 3)))
    if not n:
        return line
    size = ndimage.sum_labels(_lengths(line), pieces, np.arange(1, n + 1))
    size = np.atleast_1d(size)
    found: Bools = np.isin(pieces, np.flatnonzero((size >= least_px) & (size > 0)) + 1)  # one pixel has no length
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

"""Masks against annotated ones, slide by slide: Dice, IoU, and how far the boundaries lie from each other, by class.

A slide counts where `detection` counts it: one of its annotations is of the segmentation, and all of that is taken to
be annotated; what no polygon covers is none of its classes. Of a micrograph the strip of scale bar and text is left
out; what was not scored because it is off the tissue was not found. Dice of a class is 2|P and G| / (|P| + |G|) of each
slide, then the mean over slides; slides where the class is neither found nor annotated are left out. Written beside
the stores: overlap.json, and overlap (by slide and class) as Parquet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from slideflow_ray import aggregate
from slideflow_ray.annotations import even_odd, read_annotation
from slideflow_ray.cascade import Cascade, cascades, read_found
from slideflow_ray.cases import Run
from slideflow_ray.cohort import Item
from slideflow_ray.detection import BAND, Truth, truths
from slideflow_ray.errors import AnnotationError
from slideflow_ray.membrane import Surface, surface
from slideflow_ray.metrics import Interval, rate_interval, ratio
from slideflow_ray.results import FITTED, JUDGED, Measure, Overlap, defined
from slideflow_ray.store import SlideStore
from slideflow_ray.tables import Columns

SURFACE_PX = 2**24
"""Pixels of a plane up to which boundaries are compared (4,096 x 4,096): distances take about 30 bytes each."""

TOLERANCE_PX = 2
"""How far, in pixels of the plane, a boundary may lie from the annotated one and be right."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """One class on one slide: pixels that are both found and annotated, found, annotated; and the boundaries.

    surface : None where the plane is too large, or the class is neither found nor annotated.
    """

    both: int
    found: int
    annotated: int
    surface: Surface | None = None

    @property
    def dice(self) -> float:
        """2 |P and G| / (|P| + |G|), NaN where the class is nowhere."""
        return ratio(2 * self.both, self.found + self.annotated)

    @property
    def iou(self) -> float:
        """|P and G| / |P or G|, NaN where the class is nowhere."""
        return ratio(self.both, self.found + self.annotated - self.both)


@dataclass(frozen=True)
class Masks:
    """What a slide's plane and its annotation come to, class by class; `nm` is the side of a pixel."""

    item: Item
    nm: float
    pairs: Mapping[str, Pair]
    too_large: bool = False


# a slide


def compare_planes(
    plane: Any,
    mpp: float,
    shapes: Mapping[str, tuple[int, Any]],
    px0: float,
    kept_px0: Sequence[float] = (0, 0, math.inf, math.inf),
) -> Mapping[str, Pair]:
    """Return for each class how its pixels in a plane and the annotated ones agree.

    plane : uint8 (h, w), an array or what is sliced like one; `mpp` um and `px0` level-0 pixels to its pixel
    shapes : class -> (its value in the plane, what is annotated of it, in px0); where classes overlap the later wins
    kept_px0 : x0, y0, x1, y1 of a micrograph's picture. Pixels whose centre lies outside, in the strip of scale bar and
        text, are left out of plane and annotation alike, and the cut is no boundary; pixels in it that were not scored,
        off the tissue, are not found.
    """
    values = [value for value, _ in shapes.values()]
    top, bottom, left, right = _kept(plane.shape, px0, kept_px0)
    total = np.zeros((len(shapes), 3), np.int64)
    whole = plane.shape[0] * plane.shape[1] <= SURFACE_PX
    kept: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = []
    for row in range(top, bottom, BAND):
        found = np.asarray(plane[row : min(row + BAND, bottom)])[:, left:right]
        truth = _drawn(shapes, (row, left), (found.shape[0], found.shape[1]), px0)
        kept += [(found, truth)] if whole else []
        for i, value in enumerate(values):
            one, other = found == value, truth == value
            total[i] += [np.count_nonzero(one & other), np.count_nonzero(one), np.count_nonzero(other)]
    surfaces: list[Surface | None] = [None] * len(shapes)
    if kept:
        found, truth = (np.concatenate(several) for several in zip(*kept, strict=True))
        surfaces = [_surface(found == value, truth == value, 1000 * mpp) for value in values]
    rows = zip(shapes, total.tolist(), surfaces, strict=True)
    return {name: Pair(both, one, other, far) for name, (both, one, other), far in rows}


def _kept(shape: Sequence[int], px0: float, kept_px0: Sequence[float]) -> tuple[int, int, int, int]:
    """Return top, bottom, left, right of the pixels whose centre lies in a window; bottom and right are the next."""
    x0, y0, x1, y1 = kept_px0
    sides = ((y0, shape[0]), (y1, shape[0]), (x0, shape[1]), (x1, shape[1]))
    top, bottom, left, right = (math.ceil(max(0.0, min(at / px0 - 0.5, length))) for at, length in sides)
    return top, bottom, left, right


def _drawn(
    shapes: Mapping[str, tuple[int, Any]], corner: tuple[int, int], size: tuple[int, int], px0: float
) -> npt.NDArray[np.uint8]:
    truth = np.zeros(size, np.uint8)
    for value, shape in shapes.values():
        if not shape.is_empty:
            truth[even_odd(shape, corner, size, px0)] = value
    return truth


def _surface(found: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_], nm: float) -> Surface | None:
    """Compare the boundaries in the box around both, and a pixel more, which is all that they depend on."""
    either = found | truth
    if not either.any():
        return None
    rows, cols = (np.flatnonzero(either.any(axis)) for axis in (1, 0))
    box = np.s_[max(0, rows[0] - 1) : rows[-1] + 2, max(0, cols[0] - 1) : cols[-1] + 2]
    return surface(found[box], truth[box], TOLERANCE_PX * nm, nm)


def read_masks(run: Run, item: Item, cascade: Cascade) -> Masks | None:
    """Compare a slide's plane with its annotation; None where it is not annotated for the segmentation, or with boxes.

    Raises AnnotationError, StoreError, CorruptStore.
    """
    found = read_found(run.out, item, run.outcomes.get(item.slide_id, {}), cascade)
    if found is None or not found.grid:
        return None
    annotated, others = truths(read_annotation(item.annotation or ""), cascade, run.labels.names)
    if not _is_exhaustive(annotated, others):
        return None
    store = SlideStore(run.out, item.slide_id)
    node, mpp0 = f"planes/{found.grid}/{cascade.node}", float(store.attrs["mpp0"])
    about = store.node_attrs(node)["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    mpp, plane = float(about[0]["scale"][0]), store.open_plane(f"{node}/0")
    shapes = {
        name: (cascade.classes.index(name), shapely.union_all([one.shape for one in annotated if one.found == name]))
        for name in sorted(cascade.found, key=cascade.classes.index)
    }
    kept = store.attrs.get("micrograph", {}).get("keep_px0", (0, 0, math.inf, math.inf))
    pairs = compare_planes(plane, mpp, shapes, mpp / mpp0, kept)
    return Masks(item, 1000 * mpp, pairs, plane.shape[0] * plane.shape[1] > SURFACE_PX)


def _is_exhaustive(annotated: Sequence[Truth], others: Sequence[str]) -> bool:
    """Whether pixels are annotated: outlines, each of one class, and not only things the segmentation does not know."""
    if not annotated:
        return not others
    return all(one.found and not one.is_box for one in annotated)


# the cohort


SLIDE_COLUMNS: Columns = {
    **dict.fromkeys(("slide_id", "patient_id", "split", "model", "name", "class"), "text"),
    **dict.fromkeys(("annotated_px", "found_px", "both_px"), "int"),
    **dict.fromkeys(("nm_per_px", "dice", "iou", "hd95_nm", "assd_nm", "boundary_f", "tolerance_nm"), "float"),
}


@dataclass(frozen=True)
class Compared:
    """What the comparison came to, and the rows of its table."""

    results: tuple[Overlap, ...] = ()
    notes: tuple[str, ...] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)


def overlap(run: Run, record: Mapping[str, Any], *, seed: int = 0, resamples: int = 1000) -> Compared:
    """Compare the planes of every segmentation of a run with the annotations of val and test.

    record : run.json. Raises AnnotationError, one for all files that cannot be read; CorruptStore.
    """
    results: list[Overlap] = []
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    for cascade in cascades(record):
        slides = _slides(run, cascade)
        rows += [row for slide in slides for row in _rows(cascade, slide)]
        if large := sum(slide.too_large for slide in slides):
            notes.append(f"{cascade.name}: {large} planes have more than {SURFACE_PX:,} pixels: no boundary distances.")
        for split in (FITTED, JUDGED):
            mine = [slide for slide in slides if slide.item.split == split]
            draw = {"seed": seed, "resamples": resamples}
            results += [_result(run, cascade, name, split, mine, draw) for name in cascade.found if mine]
    return Compared(tuple(results), tuple(notes), rows)


_Read = tuple[dict[str, Masks], list[AnnotationError]]


def _slides(run: Run, cascade: Cascade) -> list[Masks]:
    """The annotated slides of the cohort, in its order."""
    chosen = [item for item in run.items if item.annotation and cascade.on(item)]
    found, errors = aggregate.over_slides(partial(_read, run=run, cascade=cascade), chosen, _merged, run.scheduler)
    if errors:
        raise AnnotationError("\n".join(error.message for error in errors[:5]), next_step=errors[0].step)
    return [found[item.slide_id] for item in chosen if item.slide_id in found]


def _read(item: Item, run: Run, cascade: Cascade) -> _Read:
    try:
        found = read_masks(run, item, cascade)
    except AnnotationError as error:
        return {}, [error]
    return ({item.slide_id: found} if found else {}), []


def _merged(several: Sequence[_Read]) -> _Read:
    return {k: v for found, _ in several for k, v in found.items()}, [e for _, errors in several for e in errors]


def _result(
    run: Run, cascade: Cascade, name: str, split: str, slides: Sequence[Masks], draw: Mapping[str, int]
) -> Overlap:
    shown = [slide for slide in slides if slide.pairs[name].found or slide.pairs[name].annotated]
    patients = {slide.item.patient for slide in shown}
    far = [slide for slide in shown if (s := slide.pairs[name].surface) and math.isfinite(s.hd95)]
    pixels = {slide.nm for slide in slides}
    return Overlap(
        model=cascade.node,
        name=cascade.name,
        class_name=name,
        split=split,
        slides=len(slides),
        nowhere=len(slides) - len(shown),
        one_sided=sum(not (slide.pairs[name].found and slide.pairs[name].annotated) for slide in shown),
        patients=len(patients),
        lone=len(run.lone & patients),
        tolerance_nm=TOLERANCE_PX * max(pixels) if pixels else None,
        dice=_measure(shown, lambda slide: slide.pairs[name].dice, draw),
        iou=_measure(shown, lambda slide: slide.pairs[name].iou, draw),
        hd95_nm=_measure(far, lambda slide: _far(slide, name).hd95, draw),
        assd_nm=_measure(far, lambda slide: _far(slide, name).assd, draw),
        boundary_f=_measure(
            [slide for slide in shown if slide.pairs[name].surface], lambda slide: _far(slide, name).boundary_f, draw
        ),
    )


def _far(slide: Masks, name: str) -> Surface:
    return slide.pairs[name].surface or Surface(math.nan, math.nan, math.nan)


def _measure(slides: Sequence[Masks], value: Callable[[Masks], float], draw: Mapping[str, int]) -> Measure:
    """The mean over slides, their deviation, and the interval of the mean when patients are resampled."""
    by_patient: dict[str, list[float]] = {}
    for slide in sorted(slides, key=lambda slide: slide.item.patient):
        by_patient.setdefault(slide.item.patient, []).append(value(slide))
    each = [v for several in by_patient.values() for v in several]
    if not each:
        return Measure(mean=None, sd=None, interval=None, slides=0)
    sums, counts = [math.fsum(several) for several in by_patient.values()], [len(s) for s in by_patient.values()]
    interval: Interval | None = rate_interval(sums, counts, **draw)
    sd = float(np.std(each, ddof=1)) if len(each) > 1 else None
    return Measure(mean=math.fsum(each) / len(each), sd=sd, interval=interval, slides=len(each))


def _rows(cascade: Cascade, slide: Masks) -> Iterator[dict[str, Any]]:
    item = slide.item
    for name, pair in slide.pairs.items():
        far = pair.surface
        yield {
            "slide_id": item.slide_id,
            "patient_id": item.patient,
            "split": item.split,
            "model": cascade.node,
            "name": cascade.name,
            "class": name,
            "annotated_px": pair.annotated,
            "found_px": pair.found,
            "both_px": pair.both,
            "nm_per_px": slide.nm,
            "dice": defined(pair.dice),
            "iou": defined(pair.iou),
            "hd95_nm": far.hd95 if far and math.isfinite(far.hd95) else None,
            "assd_nm": far.assd if far and math.isfinite(far.assd) else None,
            "boundary_f": defined(far.boundary_f) if far else None,
            "tolerance_nm": TOLERANCE_PX * slide.nm,
        }

"""Objects against annotated ones: precision, recall and F1 at IoU 0.5, Dice of the plane, and what matches were called.

An annotated polygon is an object where its name means a class that the segmentation finds, or a class of
a model on its objects. Polygons that overlap by half (an outline and a lesion drawn on it) are one, and one that lies
by half or more inside a larger one (a lesion within the outline) is a part of it, not an object. Found and annotated
objects are matched one to one, as many as can be. Annotated slides without a result are in no number, and are named.
Written beside the stores: detection.json, and detection (by slide) and matches (by object) as Parquet.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from slideflow_ray import aggregate
from slideflow_ray.annotations import Region, class_of, classes_of, even_odd, read_annotation
from slideflow_ray.cascade import Cascade, Found, Judge, cascades, read_found
from slideflow_ray.cases import Run
from slideflow_ray.cohort import Item
from slideflow_ray.errors import AnnotationError
from slideflow_ray.metrics import RATES, Confusion, Counts, Interval, kappa_interval, rate_interval, ratio
from slideflow_ray.results import FITTED, JUDGED, Called, Detection, OperatingPoint, defined
from slideflow_ray.store import SlideStore
from slideflow_ray.tables import Columns

IOU = 0.5
"""Found and annotated are the same object at this overlap, area of both over area of either, or more."""

PART = 0.5
"""An annotation is part of a larger one when at least so much of its area lies inside."""

BOX_PX0 = 4
"""A rectangle of a side less than this many px0 is a grain of an outlined mask, not a box that someone drew."""

NAMED = 10
"""Slides that a note names."""

BAND = 2048
"""Rows of a plane that are compared at a time."""

Floats = npt.NDArray[np.float64]
Pairs = npt.NDArray[np.int64]


# annotated objects


@dataclass(frozen=True)
class Truth:
    """An annotated object. `found` is its class to the segmentation, "" for any; `called` its classes to each model.

    is_box : it was drawn as an upright rectangle, so boxes are compared, and its pixels are not known.
    """

    shape: Any
    found: str = ""
    called: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_box: bool = False


def truths(regions: Sequence[Region], cascade: Cascade, names: Mapping[str, str]) -> tuple[list[Truth], list[str]]:
    """Return the annotated objects, and the names of the annotations that are none."""
    drawn: list[Truth] = []
    others: list[str] = []
    for region in regions:
        made = _truth(region, cascade, names)
        if made is None:
            others += [] if region.cut or class_of(region.name, cascade.classes, names) else [region.name]
            continue
        found, called = made
        for part in shapely.get_parts(region.geometry):
            drawn.append(Truth(part, found, called, _is_box(part)))
    return _with_parts(_united(drawn)), others


def _is_box(part: Any) -> bool:
    left, top, right, bottom = part.bounds
    return min(right - left, bottom - top) >= BOX_PX0 and bool(part.equals(shapely.box(left, top, right, bottom)))


def _truth(
    region: Region, cascade: Cascade, names: Mapping[str, str]
) -> tuple[str, Mapping[str, tuple[str, ...]]] | None:
    found = class_of(region.name, cascade.classes, names)
    called = {judge.name: meant for judge in cascade.judges if (meant := classes_of(region.name, judge.classes, names))}
    if found in cascade.found:
        return str(found), called
    if not called or region.cut:
        return None
    return cascade.found[0] if len(cascade.found) == 1 else "", called


def _united(drawn: Sequence[Truth]) -> list[Truth]:
    """One object for polygons that overlap by IOU: the shape of the first that is no box, the classes of all."""
    pairs, _ = overlaps([one.shape for one in drawn], [one.shape for one in drawn], [False] * len(drawn))
    groups = _groups(pairs, len(drawn), len(drawn), shared=True)
    united: dict[int, list[Truth]] = {}
    for one, group in zip(drawn, groups.tolist(), strict=True):
        united.setdefault(group, []).append(one)
    return [_one_of(several) for several in united.values()]


def _with_parts(objects: Sequence[Truth]) -> list[Truth]:
    """One object for an annotation and its parts: its shape, the classes of all; what it is part of may be a part too.

    Of several that hold it, it belongs to the one that holds most of it, then to the largest. Objects of
    different classes to the segmentation are never parts of each other.
    """
    if not objects:
        return []
    shapes = np.array([one.shape for one in objects], object)
    areas = shapely.area(shapes)
    part, holder = shapely.STRtree(shapes).query(shapes, predicate=None)
    share = shapely.area(shapely.intersection(shapes[part], shapes[holder])) / np.maximum(areas[part], 1e-12)
    alike = np.array([objects[i].found in ("", objects[j].found) for i, j in zip(part, holder, strict=True)], bool)
    held = (share >= PART) & (areas[holder] > areas[part]) & alike
    order = np.lexsort((areas[holder], share))
    best = {int(part[k]): int(holder[k]) for k in order if held[k]}  # the last is the best
    groups: dict[int, list[Truth]] = {i: [one] for i, one in enumerate(objects) if i not in best}
    for i in sorted(best):
        whole = best[i]
        while whole in best:
            whole = best[whole]
        groups[whole].append(objects[i])
    return [_one_of(group, group[0]) for group in groups.values()]


def _one_of(several: Sequence[Truth], best: Truth | None = None) -> Truth:
    best = best or next((one for one in several if not one.is_box), several[0])
    called: dict[str, tuple[str, ...]] = {}
    for one in several:
        for name, classes in one.called.items():
            called[name] = tuple(dict.fromkeys((*called.get(name, ()), *classes)))
    return Truth(best.shape, next((one.found for one in several if one.found), ""), called, best.is_box)


# matching


def overlaps(annotated: Sequence[Any], found: Sequence[Any], as_box: Sequence[bool]) -> tuple[Pairs, Floats]:
    """Return the pairs (annotated, found), int64 (n, 2), whose IoU is at least IOU, and it, float64 (n,).

    as_box : for each annotated one whether its box is compared with the other's box.
    """
    if not len(annotated) or not len(found):
        return np.empty((0, 2), np.int64), np.empty(0)
    shapes, others = np.array(annotated, object), np.array(found, object)
    first, second = shapely.STRtree(others).query(shapes, predicate=None)
    boxed = np.asarray(as_box, bool)[first]
    one, other = shapes[first], others[second]
    one[boxed], other[boxed] = (shapely.box(*shapely.bounds(side[boxed]).T) for side in (one, other))
    both = shapely.area(shapely.intersection(one, other))
    iou = both / (shapely.area(one) + shapely.area(other) - both)
    kept = iou >= IOU
    return np.column_stack([first, second])[kept].astype(np.int64), iou[kept]


def _groups(pairs: Pairs, n: int, m: int, *, shared: bool = False) -> npt.NDArray[np.int64]:
    """The connected component of each of n (and then m) things; `shared`: both sides are the same things."""
    columns = pairs[:, 1] + (0 if shared else n)
    size = n if shared else n + m
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], columns)), shape=(size, size))
    return np.asarray(connected_components(links, directed=False)[1], np.int64)


def match(pairs: Pairs, iou: Floats) -> npt.NDArray[np.int64]:
    """Return which of the pairs (annotated, found) are matches, as indices: most matches, of those the highest IoU.

    Above an IoU of 0.5 a pair has no rival among objects that do not overlap; at 0.5, and among annotations that
    do, it may.
    """
    if not len(pairs):
        return np.empty(0, np.int64)
    rows, row = np.unique(pairs[:, 0], return_inverse=True)
    cols, col = np.unique(pairs[:, 1], return_inverse=True)
    group = _groups(np.column_stack([row, col]), len(rows), len(cols))[row]
    order = np.argsort(group, kind="stable")
    kept = [_assigned(part, row, col, iou) for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1)]
    return np.sort(np.concatenate(kept))


def _assigned(part: npt.NDArray[np.int64], row: Any, col: Any, iou: Floats) -> npt.NDArray[np.int64]:
    if len(part) == 1:
        return part
    rows, r = np.unique(row[part], return_inverse=True)
    cols, c = np.unique(col[part], return_inverse=True)
    worth, which = np.zeros((len(rows), len(cols))), np.full((len(rows), len(cols)), -1, np.int64)
    worth[r, c], which[r, c] = len(part) + iou[part], part  # one match more is worth more than any overlap
    chosen = which[linear_sum_assignment(worth, maximize=True)]
    return np.asarray(chosen[chosen >= 0], np.int64)


# a slide


@dataclass(frozen=True, eq=False)
class Slide:
    """One slide: its annotated objects, how many were found, and the matches (annotated, found) with their IoU.

    area_um2 : of pixels found and annotated, found, annotated; None where an annotation is a box.
    called : for each model whether it calls each found object each class, bool (N, C). others : unused names.
    """

    item: Item
    truths: tuple[Truth, ...]
    found: int
    matches: Pairs
    iou: Floats
    area_um2: tuple[float, float, float] | None
    called: Mapping[str, npt.NDArray[np.bool_]]
    others: tuple[str, ...] = ()

    @property
    def counts(self) -> Counts:
        """Matched, missed and spurious objects; there are no true negatives."""
        hits = len(self.matches)
        return Counts(tp=hits, fn=len(self.truths) - hits, fp=self.found - hits)


def read_slide(run: Run, found: Found) -> Slide:
    """Compare a slide's objects with its annotation. Raises AnnotationError, StoreError."""
    item, cascade = found.item, found.cascade
    annotated, others = truths(read_annotation(item.annotation or ""), cascade, run.labels.names)
    shapes = list(found.objects.polygons) if found.objects is not None else []
    pairs, iou = overlaps([one.shape for one in annotated], shapes, [one.is_box for one in annotated])
    if found.objects is not None and len(pairs):
        kinds = [found.objects.classes[i] for i in found.objects.class_index]
        alike = np.array([annotated[t].found in ("", kinds[p]) for t, p in pairs.tolist()], bool)
        pairs, iou = pairs[alike], iou[alike]
    kept = match(pairs, iou)
    ran = [judge for judge in cascade.judges if judge.name in found.margins]
    called = {judge.name: judge.called(found.margins[judge.name]) for judge in ran}
    area = None if any(one.is_box for one in annotated) else areas_um2(run, found, [one.shape for one in annotated])
    return Slide(item, tuple(annotated), len(shapes), pairs[kept], iou[kept], area, called, tuple(others))


def areas_um2(run: Run, found: Found, shapes: Sequence[Any]) -> tuple[float, float, float]:
    """Return the area that is found and annotated, found, and annotated, in um2, pixel by pixel of the plane.

    A pixel is annotated where its centre is. All that the segmentation makes objects of is found; what was not
    scored, off the tissue, is not.
    """
    store, cascade = SlideStore(run.out, found.item.slide_id), found.cascade
    whole = shapely.union_all(list(shapes))
    mpp0 = float(store.attrs["mpp0"])
    if not found.grid:
        return 0.0, 0.0, float(whole.area) * mpp0**2
    node = f"planes/{found.grid}/{cascade.node}"
    mpp = float(
        store.node_attrs(node)["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"][0]
    )
    plane, wanted = store.open_plane(f"{node}/0"), [cascade.classes.index(name) for name in cascade.found]
    total = np.zeros(3, np.int64)
    for row in range(0, plane.shape[0], BAND):
        mask = np.isin(np.asarray(plane[row : row + BAND]), wanted)
        truth = np.zeros(mask.shape, np.bool_)
        if not whole.is_empty:
            truth = even_odd(whole, (row, 0), (mask.shape[0], mask.shape[1]), mpp / mpp0)
        total += [np.count_nonzero(mask & truth), np.count_nonzero(mask), np.count_nonzero(truth)]
    both, one, other = (float(n) * mpp**2 for n in total)
    return both, one, other


# the cohort


_WHO: Columns = {"slide_id": "text", "patient_id": "text", "split": "text", "model": "text", "name": "text"}
SLIDE_COLUMNS: Columns = {
    **_WHO,
    **dict.fromkeys(("annotated", "found", "tp", "fp", "fn"), "int"),
    **dict.fromkeys(("precision", "recall", "f1", "dice"), "float"),
}
MATCH_COLUMNS: Columns = {
    **_WHO,
    "object": "int",
    "annotation": "int",
    "iou": "float",
    "judge": "text",
    "true": "text",
    "called": "text",
}
TABLES: Mapping[str, Columns] = {"detection": SLIDE_COLUMNS, "matches": MATCH_COLUMNS}

Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Detected:
    """What the comparison came to, and the rows of its tables."""

    results: tuple[Detection, ...] = ()
    notes: tuple[str, ...] = ()
    rows: Rows = field(default_factory=dict)


def detect(
    run: Run, record: Mapping[str, Any], points: Sequence[OperatingPoint], *, seed: int = 0, resamples: int = 1000
) -> Detected:
    """Compare the objects of every segmentation of a run with the annotations of val and test.

    record : run.json. points : operating points from validation, for models of several labels.
    Raises AnnotationError, one for all files that cannot be read; CorruptStore.
    """
    results: list[Detection] = []
    notes: list[str] = []
    rows: Rows = {name: [] for name in TABLES}
    for cascade in cascades(record, points):
        read, lost = _slides(run, cascade)
        slides = [slide for slide in read if slide.truths or not slide.others]
        notes += _notes(cascade, read, slides)
        notes += _lost_notes(cascade, lost)
        rows["detection"] += [_slide_row(cascade, slide) for slide in slides]
        rows["matches"] += [row for slide in slides for row in _match_rows(cascade, slide)]
        for split in (FITTED, JUDGED):
            mine = [slide for slide in slides if slide.item.split == split]
            gone = [one for one in lost if one.item.split == split]
            draw = {"seed": seed, "resamples": resamples}
            results += [_result(run, cascade, split, mine, gone, draw)] if mine else []
    return Detected(tuple(results), tuple(notes), rows)


@dataclass(frozen=True)
class Lost:
    """An annotated slide that the run has no result of, with the number of its annotated objects."""

    item: Item
    annotated: int


def _slides(run: Run, cascade: Cascade) -> tuple[list[Slide], list[Lost]]:
    """The annotated slides of the cohort, in its order: those with a result, and those without."""
    chosen = [item for item in run.items if item.annotation and cascade.on(item) and not _packed(run, item)]
    read = partial(_read, run=run, cascade=cascade)
    found, errors = aggregate.over_slides(read, chosen, _merged, run.scheduler)
    if errors:
        more = f"\n... and {len(errors) - 5} more." if len(errors) > 5 else ""
        raise AnnotationError("\n".join(error.message for error in errors[:5]) + more, next_step=errors[0].step)
    every = [found[item.slide_id] for item in chosen if item.slide_id in found]
    return [one for one in every if isinstance(one, Slide)], [one for one in every if isinstance(one, Lost)]


def _packed(run: Run, item: Item) -> bool:
    return bool(run.outcomes.get(item.slide_id, {}).get("pack"))


_Read = tuple[dict[str, Slide | Lost], list[AnnotationError]]


def _read(item: Item, run: Run, cascade: Cascade) -> _Read:
    found = read_found(run.out, item, run.outcomes.get(item.slide_id, {}), cascade)
    try:
        if found is not None:
            return {item.slide_id: read_slide(run, found)}, []
        annotated, others = truths(read_annotation(item.annotation or ""), cascade, run.labels.names)
        return {item.slide_id: Lost(item, len(annotated))} if annotated or not others else {}, []
    except AnnotationError as error:
        return {}, [error]


def _merged(several: Sequence[_Read]) -> _Read:
    return {k: v for found, _ in several for k, v in found.items()}, [e for _, errors in several for e in errors]


def _lost_notes(cascade: Cascade, lost: Sequence[Lost]) -> Iterator[str]:
    """Which annotated slides of val and test have no result, for rates without them may flatter."""
    for split in (FITTED, JUDGED):
        if mine := [one for one in lost if one.item.split == split]:
            n = sum(one.annotated for one in mine)
            names = ", ".join(one.item.slide_id for one in mine[:NAMED])
            more = f" and {len(mine) - NAMED} more" if len(mine) > NAMED else ""
            yield (
                f"{cascade.name}: {len(mine)} annotated slides of {split} with {n} objects have no result "
                f"and are in none of its rates: {names}{more}."
            )


def _notes(cascade: Cascade, read: Sequence[Slide], slides: Sequence[Slide]) -> Iterator[str]:
    """What was left out: slides that are annotated for something else only, names, Dice of boxes."""
    if left := len(read) - len(slides):
        yield f"{cascade.name}: {left} slides are annotated, and with no objects of it, and were left out."
    if not any(slide.item.split == JUDGED for slide in slides):
        yield f"{cascade.name}: no annotated slide in split {JUDGED!r}, so its objects were not compared on test."
    others = Counter(name for slide in read for name in slide.others)
    for name, n in sorted(others.items()):
        what = f"named {name!r}" if name else "without a name"
        yield f"{cascade.name}: {n} annotations {what} are no objects of it and were left out."
    if boxes := sum(slide.area_um2 is None for slide in slides):
        yield f"{cascade.name}: {boxes} slides are annotated with boxes: boxes are compared there, and no Dice."


def _result(
    run: Run, cascade: Cascade, split: str, slides: Sequence[Slide], lost: Sequence[Lost], draw: Mapping[str, int]
) -> Detection:
    by_patient = _by_patient(slides)
    each = [sum((slide.counts for slide in group), Counts()) for group in by_patient]
    total = sum(each, Counts())
    areas = [[slide.area_um2 for slide in group if slide.area_um2] for group in by_patient]
    inside = [math.fsum(2 * both for both, _, _ in group) for group in areas]
    either = [math.fsum(one + other for _, one, other in group) for group in areas]
    patients = {slide.item.patient for slide in slides}
    return Detection(
        model=cascade.node,
        name=cascade.name,
        split=split,
        slides=len(slides),
        slides_missing=len(lost),
        patients=len(patients),
        lone=len(run.lone & patients),
        annotated=total.tp + total.fn,
        found=total.tp + total.fp,
        matched=total.tp,
        precision=defined(ratio(total.tp, total.tp + total.fp)),
        recall=defined(ratio(total.tp, total.tp + total.fn)),
        f1=defined(ratio(2 * total.tp, 2 * total.tp + total.fp + total.fn)),
        precision_interval=_interval(each, lambda c: (c.tp, c.tp + c.fp), draw),
        recall_interval=_interval(each, lambda c: (c.tp, c.tp + c.fn), draw),
        f1_interval=_interval(each, lambda c: (2 * c.tp, 2 * c.tp + c.fp + c.fn), draw),
        dice=defined(ratio(math.fsum(inside), math.fsum(either))),
        dice_interval=rate_interval(inside, either, **draw),
        called=tuple(_called(judge, slides, draw) for judge in cascade.judges),
    )


def _by_patient(slides: Sequence[Slide]) -> list[list[Slide]]:
    groups: dict[str, list[Slide]] = {}
    for slide in sorted(slides, key=lambda slide: slide.item.patient):
        groups.setdefault(slide.item.patient, []).append(slide)
    return list(groups.values())


def _interval(
    each: Sequence[Counts], parts: Callable[[Counts], tuple[int, int]], draw: Mapping[str, int]
) -> Interval | None:
    pairs = [parts(counts) for counts in each]
    return rate_interval([part for part, _ in pairs], [whole for _, whole in pairs], **draw)


# what matched objects were called


@dataclass
class _Tally:
    """What a model called the objects of a patient: truth by row, by class; and what had no partner."""

    table: npt.NDArray[np.int64]
    counts: list[Counts]
    missed: npt.NDArray[np.int64]
    spurious: npt.NDArray[np.int64]
    unknown: int = 0
    several: int = 0


def _called(judge: Judge, slides: Sequence[Slide], draw: Mapping[str, int]) -> Called:
    each = [_tally(judge, group) for group in _by_patient(slides)]
    table = sum((one.table for one in each), np.zeros((len(judge.classes),) * 2, np.int64))
    by_class = [sum((one.counts[c] for one in each), Counts()) for c in range(len(judge.classes))]
    confusion = Confusion(judge.classes, table)
    right, all_ = [int(one.table.trace()) for one in each], [int(one.table.sum()) for one in each]
    classify = judge.task == "classify"
    return Called(
        model=judge.node,
        name=judge.name,
        task=judge.task,
        rule=judge.rule,
        classes=judge.classes,
        counts=tuple(tuple(row) for row in table.tolist()) if classify else None,
        accuracy=defined(confusion.accuracy) if classify else None,
        accuracy_interval=rate_interval(right, all_, **draw) if classify else None,
        balanced_accuracy=defined(confusion.balanced_accuracy) if classify else None,
        kappa=defined(confusion.kappa) if classify else None,
        kappa_interval=kappa_interval([one.table for one in each], **draw) if classify else None,
        by_class={
            name: {rate: defined(getattr(counts, rate)) for rate in RATES} | _plain(counts)
            for name, counts in zip(judge.classes, by_class, strict=True)
        },
        missed=dict(
            zip(judge.classes, sum((one.missed for one in each), np.zeros_like(table[0])).tolist(), strict=True)
        ),
        spurious=dict(
            zip(judge.classes, sum((one.spurious for one in each), np.zeros_like(table[0])).tolist(), strict=True)
        ),
        unknown=sum(one.unknown for one in each),
        several=sum(one.several for one in each),
    )


def _plain(counts: Counts) -> dict[str, float | None]:
    return {"tp": counts.tp, "fn": counts.fn, "fp": counts.fp, "tn": counts.tn}


def _tally(judge: Judge, slides: Sequence[Slide]) -> _Tally:
    k = len(judge.classes)
    tally = _Tally(np.zeros((k, k), np.int64), [Counts()] * k, np.zeros(k, np.int64), np.zeros(k, np.int64))
    for slide in slides:
        if slide.found and judge.name not in slide.called:  # the run does not send this slide to the model
            continue
        called = slide.called.get(judge.name, np.zeros((0, k), np.bool_))
        truth = [_truth_of(judge, one) for one in slide.truths]
        partner = dict(slide.matches.tolist())
        for i, is_so in enumerate(truth):
            if i not in partner:
                tally.missed += is_so
            elif not is_so.any():
                tally.unknown += 1
            else:
                _count(tally, judge, is_so, called[partner[i]])
        spurious = np.setdiff1d(np.arange(slide.found), slide.matches[:, 1])
        tally.spurious += called[spurious].sum(axis=0)
    return tally


def _truth_of(judge: Judge, truth: Truth) -> npt.NDArray[np.bool_]:
    return np.isin(judge.classes, truth.called.get(judge.name, ()))


def _count(tally: _Tally, judge: Judge, truth: npt.NDArray[np.bool_], called: npt.NDArray[np.bool_]) -> None:
    if judge.task == "classify" and truth.sum() > 1:  # no single class would be right
        tally.several += 1
        return
    if judge.task == "classify":
        tally.table[int(truth.argmax()), int(called.argmax())] += 1
    for c, (is_so, said) in enumerate(zip(truth.tolist(), called.tolist(), strict=True)):
        tally.counts[c] = tally.counts[c] + Counts(
            is_so and said, is_so and not said, said and not is_so, not (is_so or said)
        )


# rows


def _who(cascade: Cascade, slide: Slide) -> dict[str, Any]:
    item = slide.item
    who = {"slide_id": item.slide_id, "patient_id": item.patient, "split": item.split}
    return who | {"model": cascade.node, "name": cascade.name}


def _slide_row(cascade: Cascade, slide: Slide) -> dict[str, Any]:
    c = slide.counts
    both, one, other = slide.area_um2 or (0.0, 0.0, 0.0)
    return {
        **_who(cascade, slide),
        "annotated": c.tp + c.fn,
        "found": c.tp + c.fp,
        "tp": c.tp,
        "fp": c.fp,
        "fn": c.fn,
        "precision": defined(ratio(c.tp, c.tp + c.fp)),
        "recall": defined(ratio(c.tp, c.tp + c.fn)),
        "f1": defined(ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)),
        "dice": defined(ratio(2 * both, one + other)),
    }


def _match_rows(cascade: Cascade, slide: Slide) -> Iterator[dict[str, Any]]:
    """Each annotated object with its partner, then what has none; `object` counts as in objects.parquet."""
    who = _who(cascade, slide)
    partner = {t: (p, iou) for (t, p), iou in zip(slide.matches.tolist(), slide.iou.tolist(), strict=True)}
    spurious = sorted(set(range(slide.found)) - {p for p, _ in partner.values()})
    for judge in cascade.judges or (None,):
        texts = judge.text(slide.called[judge.name]) if judge and judge.name in slide.called else [None] * slide.found
        name = judge.name if judge else None
        for i, truth in enumerate(slide.truths):
            p, iou = partner.get(i, (None, None))
            true = "+".join(truth.called.get(name or "", ())) or truth.found
            called = None if p is None else texts[p]
            yield {**who, "object": p, "annotation": i, "iou": iou, "judge": name, "true": true, "called": called}
        for p in spurious:
            yield {**who, "object": p, "annotation": None, "iou": None, "judge": name, "true": None, "called": texts[p]}

"""Lesions by CAMELYON16's rules: detections on heatmaps, FROC, slide AUC, and a forest on twelve features.

The rules are those of the challenge's own evaluation (B. Ehteshami Bejnordi; copies are
public), whose lengths in um stand for pixels of 0.243 um:

- The annotated tumour is drawn at level 5, a pixel by its centre. What is nearer than 75 um / 2
  is added, holes are filled, and what hangs together (corners count) is one lesion.
- A lesion whose major axis (of the ellipse with the same moments) is below 275 um is isolated
  tumour cells: it need not be found, and a hit on it is neither right nor wrong.
- A detection inside a lesion hits it, any other is a false positive, and so is every one on a
  slide without tumour. False positives are counted per slide, of all slides.

Detections come from the heatmap by non-maximum suppression: the highest probability above 0.5 is
a detection, at its tile's centre, and 768 px0 around it (12 cells at stride 64) are put to zero;
and so on. A slide's score is the maximum of its heatmap after a 3 x 3 median, or a random forest
on twelve features, fitted on train and val and judged on test.

Written beside the stores: froc.json; froc, detections, lesions and lesion_slides as Parquet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import ConvexHull

from slideflow_ray import aggregate, storage
from slideflow_ray.aggregate import Part, Scheduler
from slideflow_ray.annotations import even_odd, named, read_annotation, together_px0
from slideflow_ray.cases import Model, Run, parts_of, read_run, truth_of
from slideflow_ray.cohort import Item, check_splits
from slideflow_ray.geometry import scale_of
from slideflow_ray.lease import lease
from slideflow_ray.metrics import (
    FROC_FALSE_POSITIVES,
    Froc,
    Interval,
    auc_interval,
    froc,
    no_interval,
    rank_auc,
    ranked,
)
from slideflow_ray.results import FITTED, JUDGED, defined, with_interval
from slideflow_ray.specs import LabelSpec
from slideflow_ray.store import SlideStore
from slideflow_ray.tables import Columns, write_table

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Plane = npt.NDArray[np.float32]

SCHEMA = 1
TOUCHING = np.ones((3, 3), np.bool_)
"""Pixels hang together at corners too."""

LEFT_OUT = ("test_049", "test_114")
"""Slides of CAMELYON16 that are left out of the FROC."""

FEATURES = (
    "max",
    "p999",
    "mean",
    "area_05",
    "area_09",
    "components",
    "largest_um2",
    "largest_major_um",
    "largest_mean",
    "largest_max",
    "largest_eccentricity",
    "largest_solidity",
)
"""Of the heatmap: highest, 99.9th percentile and mean probability; shares of cells at 0.5 and 0.9; pieces at 0.5,
and of the largest piece: area, major axis, mean and highest probability, eccentricity, solidity."""

FOREST = {"n_estimators": 500, "class_weight": "balanced", "min_samples_leaf": 2}


@dataclass(frozen=True)
class LesionRules:
    """The rules; those of CAMELYON16 unless said otherwise.

    resolution_um : um per px0 by which the lengths below are turned into pixels; level : the mask has one pixel
    per 2**level px0. grow_um : what is nearer than half of it to the tumour belongs to the lesion. itc_um : a
    shorter major axis means isolated tumour cells. above, radius_px0 : detections.
    """

    resolution_um: float = 0.243
    level: int = 5
    grow_um: float = 75.0
    itc_um: float = 275.0
    above: float = 0.5
    radius_px0: float = 768.0

    @property
    def px0(self) -> int:
        """Side of a pixel of the mask in px0."""
        return int(2**self.level)

    @property
    def grow_px(self) -> float:
        """How near, in pixels of the mask; 4.82 at level 5."""
        return self.grow_um / (self.resolution_um * self.px0 * 2)

    @property
    def itc_px(self) -> float:
        """The shortest major axis that counts, in pixels of the mask; 35.36 at level 5."""
        return self.itc_um / (self.resolution_um * self.px0)


OFFICIAL = LesionRules()


# lesions


@dataclass(frozen=True, eq=False)
class Lesions:
    """The evaluation mask of a slide: labels int32 (h, w), 0 outside, at (row, col) `corner` of the whole mask.

    major_px, area_px : of lesion 1, 2, ... in pixels of the mask; itc : whether it is isolated tumour cells.
    """

    corner: tuple[int, int]
    labels: npt.NDArray[np.int32]
    major_px: tuple[float, ...]
    area_px: tuple[int, ...]
    itc: tuple[bool, ...]

    def hit(self, xy_px0: Floats, rules: LesionRules = OFFICIAL) -> Ints:
        """Return the lesion at each point (x, y), int64 (n,); 0 where there is none."""
        cells = np.floor(xy_px0[:, ::-1] / rules.px0).astype(np.int64) - self.corner
        inside = ((cells >= 0) & (cells < self.labels.shape)).all(axis=1)
        found = np.zeros(len(cells), np.int64)
        found[inside] = self.labels[cells[inside, 0], cells[inside, 1]]
        return found


def find_lesions(tumour: Bools, rules: LesionRules = OFFICIAL, corner: tuple[int, int] = (0, 0)) -> Lesions:
    """Return the lesions of a mask of the annotated tumour, bool (h, w), which begins at `corner` of the slide's."""
    if not tumour.any():
        return Lesions(corner, np.zeros(tumour.shape, np.int32), (), (), ())
    grown = ndimage.distance_transform_edt(~tumour) < rules.grow_px
    labels, count = ndimage.label(ndimage.binary_fill_holes(grown), TOUCHING)
    axes = [_axes(np.argwhere(labels[box] == i + 1)) for i, box in enumerate(ndimage.find_objects(labels))]
    area = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    major = tuple(4 * math.sqrt(longer) for longer, _ in axes)
    return Lesions(corner, labels, major, tuple(int(n) for n in area), tuple(m < rules.itc_px for m in major))


def _axes(cells: Ints) -> tuple[float, float]:
    """The variances along the axes of cells (n, 2), the larger first; one cell has none."""
    centred = cells - cells.mean(axis=0)
    low, high = np.linalg.eigvalsh(centred.T @ centred / len(cells))
    return max(0.0, float(high)), max(0.0, float(low))


def tumour_mask(shape: Any, size_px0: tuple[int, int], rules: LesionRules = OFFICIAL) -> tuple[Bools, tuple[int, int]]:
    """Draw an annotated area at the mask's level: bool (h, w), true where a pixel's centre lies inside, and its corner.

    Only the part of the slide around the area is drawn, wide enough for lesions to grow in.
    """
    size = np.ceil(np.asarray(size_px0[::-1]) / rules.px0).astype(int)
    left, top, right, bottom = np.asarray(shape.bounds) / rules.px0
    around = math.ceil(rules.grow_px) + 1
    low = np.clip(np.floor([top, left]).astype(int) - around, 0, size)
    high = np.clip(np.ceil([bottom, right]).astype(int) + around, low, size)
    corner = (int(low[0]), int(low[1]))
    return even_odd(shape, corner, (int(high[0] - low[0]), int(high[1] - low[1])), rules.px0), corner


# detections


@dataclass(frozen=True, eq=False)
class Detections:
    """Where a model sees lesions: points (x, y) in px0, float64 (n, 2), and their probabilities, falling, float32."""

    xy_px0: Floats
    probability: Plane


def detect(heat: Plane, radius: int, above: float = 0.5) -> Ints:
    """Return the cells (row, col) of detections, int64 (n, 2), the highest first; of equals the first by row, then col.

    heat : probabilities, (h, w), NaN where there is none. After each detection the cells from `radius` before it
    up to `radius` - 1 behind it, along both axes, are out.
    """
    free = heat > above  # NaN is not
    cells = np.argwhere(free)
    found = []
    for row, col in cells[np.argsort(-heat[cells[:, 0], cells[:, 1]], kind="stable")]:
        if free[row, col]:
            found.append((row, col))
            free[max(0, row - radius) : row + radius, max(0, col - radius) : col + radius] = False
    return np.array(found, np.int64).reshape(-1, 2)


# features


def heatmap_score(heat: Plane) -> float:
    """Return the highest value of a heatmap, (h, w), NaN where there is no tile, after a 3 x 3 median (0 outside)."""
    return float(ndimage.median_filter(np.nan_to_num(heat), size=3, mode="constant").max(initial=0))


def heatmap_features(heat: Plane, cell_um: float) -> tuple[float, ...]:
    """Return the twelve FEATURES of a heatmap, (h, w), NaN where there is no tile; cells are `cell_um` wide.

    All are 0 where there is no tile, and those of the largest piece (of equals the first) where there is none.
    Solidity is the piece's area over that of the convex hull of its cells' corners.
    """
    p = heat[~np.isnan(heat)].astype(np.float64)
    if not len(p):
        return (0.0,) * len(FEATURES)
    overall = (p.max(), np.percentile(p, 99.9), p.mean(), (p >= np.float32(0.5)).mean(), (p >= np.float32(0.9)).mean())
    labels, count = ndimage.label(heat >= 0.5, TOUCHING)
    return (*(float(v) for v in overall), float(count), *_largest(heat, labels, cell_um))


def _largest(heat: Plane, labels: npt.NDArray[np.int32], cell_um: float) -> tuple[float, ...]:
    sizes = np.bincount(labels.ravel())[1:]
    if not len(sizes):
        return (0.0,) * 6
    cells = np.argwhere(labels == 1 + int(sizes.argmax()))
    p = heat[cells[:, 0], cells[:, 1]].astype(np.float64)
    longer, shorter = _axes(cells)
    corners = (cells[:, None] + np.array([(0, 0), (0, 1), (1, 0), (1, 1)])).reshape(-1, 2)
    return (
        len(cells) * cell_um**2,
        4 * math.sqrt(longer) * cell_um,
        float(p.mean()),
        float(p.max()),
        math.sqrt(1 - shorter / longer) if longer else 0.0,
        len(cells) / float(ConvexHull(corners).volume),  # in the plane, volume is area
    )


def forest_scores(features: Floats, truth: Ints, fitted: Bools, seed: int = 0) -> Floats | None:
    """Return the probability of tumour of every slide by a random forest, float64 (n,); None where none can be fitted.

    features : (n, 12). truth : (n,) 1, 0 or -1. fitted : (n,) bool, the slides it may learn from; those of unknown
    truth are left out. A score of a slide that it learned from flatters, and is NaN.
    """
    from sklearn.ensemble import RandomForestClassifier

    known = fitted & (truth >= 0)
    if len(np.unique(truth[known])) < 2:
        return None
    forest = RandomForestClassifier(random_state=seed, n_jobs=1, **FOREST).fit(features[known], truth[known])
    scores: Floats = forest.predict_proba(features)[:, 1]
    return np.where(known, np.nan, scores)


# one slide


@dataclass(frozen=True)
class Slide:
    """What a slide adds.

    truth : 1, 0 or -1. annotated : whether its lesions are known. detections : rows (x, y, probability, lesion).
    lesions : rows (major axis um, area um2, isolated cells, highest probability of a hit).
    """

    slide_id: str
    truth: int
    annotated: bool
    detections: tuple[tuple[float, float, float, int], ...]
    lesions: tuple[tuple[float, float, bool, float], ...]
    score: float
    features: tuple[float, ...]
    mpp0: float

    @property
    def false_positives(self) -> list[float]:
        """Probabilities of the detections that hit nothing."""
        return [p for *_, p, lesion in self.detections if not lesion]

    @property
    def to_find(self) -> int:
        """Lesions that are not isolated tumour cells."""
        return sum(not itc for _, _, itc, _ in self.lesions)


def read_slide(part: Part, item: Item, model: Model, spec: LabelSpec, rules: LesionRules = OFFICIAL) -> Slide:
    """Return what one slide adds; `part.grid` is empty for one without tiles. Raises AnnotationError, CorruptStore."""
    store = part.store
    about = store.attrs
    lesions, truth = _truth(item, model, spec, (about["size_px0"][0], about["size_px0"][1]), rules)
    found, heat, cell_um = _read_heat(store, part, model.targets[-1], rules)
    hits = lesions.hit(found.xy_px0, rules) if lesions else np.zeros(len(found.xy_px0), np.int64)
    rows = zip(found.xy_px0.tolist(), found.probability.tolist(), hits.tolist(), strict=True)
    return Slide(
        slide_id=item.slide_id,
        truth=truth,
        annotated=lesions is not None,
        detections=tuple((x, y, p, lesion) for (x, y), p, lesion in rows),
        lesions=tuple(_lesion_rows(lesions, found, hits, rules)) if lesions else (),
        score=heatmap_score(heat),
        features=heatmap_features(heat, cell_um),
        mpp0=float(about["mpp0"]),
    )


def _truth(
    item: Item, model: Model, spec: LabelSpec, size_px0: tuple[int, int], rules: LesionRules
) -> tuple[Lesions | None, int]:
    """The slide's lesions, None where they are not known, and whether it is tumour, 1, 0 or -1."""
    c = model.targets[-1]
    truth = truth_of(item, model, c, spec.names)
    none = find_lesions(np.zeros((0, 0), np.bool_), rules)
    if not item.annotation:
        return (none if truth == 0 else None), truth
    regions = named(read_annotation(item.annotation), model.classes, spec.names, item.annotation)
    shape = together_px0([region for region in regions if region.name == model.classes[c]])
    if shape.is_empty:
        return (none if truth < 1 else None), max(truth, 0)
    mask, corner = tumour_mask(shape, size_px0, rules)
    return find_lesions(mask, rules, corner), 1


def _read_heat(store: SlideStore, part: Part, c: int, rules: LesionRules) -> tuple[Detections, Plane, float]:
    """Detections, the heatmap and the width of a cell in um."""
    if not part.grid:
        return Detections(np.empty((0, 2)), np.empty(0, np.float32)), np.empty((0, 0), np.float32), 1.0
    grid = f"grids/{part.grid}"
    about = store.node_attrs(grid)
    tile, mpp0 = about["determines"]["tile"], about["determines"]["mpp0"]
    cell_um = (tile["stride_px"] or tile["tile_px"]) * tile["mpp"]
    rowcol = store.read(f"{grid}/rowcol")
    heat = aggregate.plane(aggregate.probability(part.margins()[:, [c]]), rowcol, tuple(about["shape"]))[0]
    cells = detect(heat, max(1, round(rules.radius_px0 / scale_of(cell_um, mpp0))), rules.above)
    row_of = np.full(heat.shape, -1, np.int64)
    row_of[rowcol[:, 0], rowcol[:, 1]] = np.arange(len(rowcol))
    rows = row_of[cells[:, 0], cells[:, 1]]
    xy, wh = store.read(f"{grid}/xy_px0")[rows], store.read(f"{grid}/wh_px0")[rows]
    return Detections(xy + wh / 2, heat[cells[:, 0], cells[:, 1]]), heat, cell_um


def _lesion_rows(
    lesions: Lesions, found: Detections, hits: Ints, rules: LesionRules
) -> Iterator[tuple[float, float, bool, float]]:
    px_um = rules.px0 * rules.resolution_um
    for i, (major, area, itc) in enumerate(zip(lesions.major_px, lesions.area_px, lesions.itc, strict=True), start=1):
        best = float(found.probability[hits == i].max(initial=0))
        yield major * px_um, area * px_um**2, itc, best


# over the cohort


@dataclass(frozen=True)
class LesionResult:
    """One model on one split. Counts, the FROC, and the slide AUC; None where it is not defined."""

    model: str
    name: str
    class_name: str
    split: str
    slides: int
    tumour_slides: int
    lesions: int
    isolated: int
    detections: int
    froc_score: float | None
    sensitivities: Mapping[str, float]
    auc: float | None
    auc_interval: Interval | None
    auc_forest: float | None
    auc_forest_interval: Interval | None

    @property
    def sentence(self) -> str:
        """The result in one line."""
        score = with_interval(self.froc_score, None)
        areas = f"slide AUC {with_interval(self.auc, self.auc_interval)}"
        if self.auc_forest is not None:
            areas += f", by forest {with_interval(self.auc_forest, self.auc_forest_interval)}"
        what = f"{self.lesions} lesions and {self.detections} detections on {self.slides} slides"
        return f"{self.name}, {self.class_name}, {self.split}, by lesion: FROC {score}, {areas} ({what})"


@dataclass(frozen=True)
class LesionResults:
    """What the evaluation by lesion came to. `notes` say what was left out; `run` is the digest of the run."""

    results: tuple[LesionResult, ...]
    notes: tuple[str, ...]
    rules: LesionRules = OFFICIAL
    run: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        results = [asdict(result) for result in self.results]
        about = {"run": self.run, "rules": asdict(self.rules), "forest": FOREST, "features": FEATURES}
        return {"schema": SCHEMA, **about, "results": results, "notes": list(self.notes)}

    def summary(self) -> str:
        """Return it in lines for a terminal: each result on test, then the notes."""
        return "\n".join([*(r.sentence for r in self.results if r.split == JUDGED), *self.notes])


_WHO: Columns = {"slide_id": "text", "patient_id": "text", "split": "text", "model": "text", "name": "text"}
DETECTION_COLUMNS: Columns = {
    **_WHO,
    "x_px0": "float",
    "y_px0": "float",
    "probability": "float32",
    "hit": "text",
    "lesion": "int",
}
LESION_COLUMNS: Columns = {
    **_WHO,
    "lesion": "int",
    "major_um": "float",
    "area_um2": "float",
    "isolated": "bool",
    "probability": "float32",
}
SLIDE_COLUMNS: Columns = {
    **_WHO,
    "truth": "bool",
    "in_froc": "bool",
    "score": "float32",
    "score_forest": "float32",
    **dict.fromkeys(FEATURES, "float"),
}
FROC_COLUMNS: Columns = {
    "model": "text",
    "name": "text",
    "split": "text",
    "false_positives": "float",
    "sensitivity": "float",
}
TABLES: Mapping[str, Columns] = {
    "detections": DETECTION_COLUMNS,
    "lesions": LESION_COLUMNS,
    "lesion_slides": SLIDE_COLUMNS,
    "froc": FROC_COLUMNS,
}


def camelyon16(
    out: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    scheduler: Scheduler | None = None,
    seed: int = 0,
    rules: LesionRules = OFFICIAL,
) -> LesionResults:
    """Evaluate the lesions and slides of a run by CAMELYON16's rules; write froc.json and its tables.

    names : further names of annotations -> a class of the model. seed : of the forest and the intervals.
    Raises ConfigError (no run), SplitLeakError, AnnotationError, CorruptStore, LeaseError while a run is under way.
    """
    run = read_run(storage.place(out), names, scheduler)
    check_splits(run.items, run.identities)
    found: list[LesionResult] = []
    notes: list[str] = []
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    with lease(run.out):
        for model in run.models:
            if len(model.targets) > 1:
                notes.append(f"{model.name}: lesions need a model of one class against the rest, this has more.")
                continue
            results, said, tables = _evaluate(run, model, seed, rules)
            found += results
            notes += said
            for name in TABLES:
                rows[name] += tables[name]
        evaluation = LesionResults(tuple(found), tuple(notes), rules, run.digest)
        for name, columns in TABLES.items():
            write_table(run.out / f"{name}.parquet", columns, rows[name])
        storage.write_atomic(run.out / "froc.json", storage.to_json(evaluation.to_json()))
    return evaluation


_Rows = dict[str, list[dict[str, Any]]]


def _evaluate(run: Run, model: Model, seed: int, rules: LesionRules) -> tuple[list[LesionResult], list[str], _Rows]:
    items = {item.slide_id: item for item in run.items}
    parts = _heatmaps(run, model)
    read = partial(_read, items=items, model=model, spec=run.labels, rules=rules)
    by_id = aggregate.over_slides(read, parts, _merged, run.scheduler)
    slides = [by_id[slide_id] for slide_id in items if slide_id in by_id]
    splits = np.array([items[slide.slide_id].split or "" for slide in slides])
    truth = np.array([slide.truth for slide in slides], np.int64)
    features = np.array([slide.features for slide in slides]).reshape(-1, len(FEATURES))
    forest = forest_scores(features, truth, np.isin(splits, ["train", FITTED]), seed)
    results: list[LesionResult] = []
    curves: list[dict[str, Any]] = []
    for split in (FITTED, JUDGED):
        mine = np.flatnonzero(splits == split)
        if len(mine):
            chosen = [slides[i] for i in mine]
            scores = forest[mine] if forest is not None and split == JUDGED else None
            curve = _froc([slide for slide in chosen if _in_froc(slide)])
            results.append(_result(model, split, chosen, items, curve, scores, seed))
            curves += _curve_rows(model, split, curve)
    notes = [*_notes(run, model, slides, rules), *_too_few(model, slides, items)]
    if forest is None and len(slides):
        notes.append(f"{model.name}: no forest, since train and val together lack slides with, or without, tumour.")
    tables = {
        "detections": [row for slide in slides for row in _detection_rows(model, slide, items)],
        "lesions": [row for slide in slides for row in _lesion_table(model, slide, items)],
        "lesion_slides": list(_slide_rows(model, slides, items, forest)),
        "froc": curves,
    }
    return results, notes, tables


def _heatmaps(run: Run, model: Model) -> list[Part]:
    """The slides with a regular grid, and those where no tissue was found, with an empty one."""
    parts = [part for part in parts_of(run, model) if not part.pack and _regular(part)]
    there = {part.slide_id for part in parts}
    glass = [
        Part(str(run.out), item.slide_id, "", model.node)
        for item in run.items
        if item.slide_id not in there and run.outcomes.get(item.slide_id, {}).get("outcome") == "no_tissue"
    ]
    return parts + glass


def _regular(part: Part) -> bool:
    return "tile" in part.store.node_attrs(f"grids/{part.grid}")["determines"]


def _read(part: Part, items: Mapping[str, Item], model: Model, spec: LabelSpec, rules: LesionRules) -> dict[str, Slide]:
    return {part.slide_id: read_slide(part, items[part.slide_id], model, spec, rules)}


def _merged(several: Sequence[dict[str, Slide]]) -> dict[str, Slide]:
    return {slide_id: slide for one in several for slide_id, slide in one.items()}


def _in_froc(slide: Slide) -> bool:
    return slide.annotated and slide.slide_id.casefold() not in LEFT_OUT


def _froc(slides: Sequence[Slide]) -> Froc | None:
    missed = np.array([p for slide in slides for p in slide.false_positives], np.float64)
    # isolated cells stay in as 0, which is what the challenge's evaluation does
    found = np.array([0 if itc else p for slide in slides for _, _, itc, p in slide.lesions], np.float64)
    return froc(missed, found, len(slides), sum(slide.to_find for slide in slides))


def _result(
    model: Model,
    split: str,
    slides: Sequence[Slide],
    items: Mapping[str, Item],
    curve: Froc | None,
    forest: Floats | None,
    seed: int,
) -> LesionResult:
    counted = [slide for slide in slides if _in_froc(slide)]
    read = zip(FROC_FALSE_POSITIVES, curve.sensitivities, strict=True) if curve else ()
    plain = _slide_auc(slides, [slide.score for slide in slides], items, seed)
    trees = _slide_auc(slides, forest.tolist(), items, seed) if forest is not None else (None, None)
    return LesionResult(
        model=model.node,
        name=model.name,
        class_name=model.classes[model.targets[-1]],
        split=split,
        slides=len(counted),
        tumour_slides=sum(slide.truth == 1 for slide in counted),
        lesions=sum(slide.to_find for slide in counted),
        isolated=sum(len(slide.lesions) - slide.to_find for slide in counted),
        detections=sum(len(slide.detections) for slide in counted),
        froc_score=curve.score if curve else None,
        sensitivities={f"{at:g}": value for at, value in read},
        auc=plain[0],
        auc_interval=plain[1],
        auc_forest=trees[0],
        auc_forest_interval=trees[1],
    )


def _slide_auc(
    slides: Sequence[Slide], scores: Sequence[float], items: Mapping[str, Item], seed: int
) -> tuple[float | None, Interval | None]:
    """The AUC of slides of known truth, and its interval by resampling patients; both of the scores themselves."""
    sides: tuple[list[Plane], list[Plane]] = ([], [])
    for one in _by_patient(slides, scores, items).values():
        for side, values in zip(sides, one, strict=True):
            side.append(np.array(values, np.float32))
    none = np.empty(0, np.float32)
    area = defined(rank_auc(*(np.concatenate([none, *side]) for side in sides)))
    return area, None if area is None else auc_interval(*ranked(*sides), seed=seed)


def _by_patient(
    slides: Sequence[Slide], scores: Sequence[float], items: Mapping[str, Item]
) -> dict[str, tuple[list[float], list[float]]]:
    """patient -> scores of its tumour slides and of its others, where that is known; patients in order."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for slide, score in sorted(zip(slides, scores, strict=True), key=lambda pair: items[pair[0].slide_id].patient):
        if slide.truth >= 0:
            found.setdefault(items[slide.slide_id].patient, ([], []))[1 - slide.truth].append(score)
    return found


def _notes(run: Run, model: Model, slides: Sequence[Slide], rules: LesionRules) -> Iterator[str]:
    splits = {item.slide_id: item.split for item in run.items}
    test = [slide for slide in slides if splits[slide.slide_id] == JUDGED]
    if not test:
        yield f"{model.name}: no heatmap in split {JUDGED!r}, so no FROC."
        return
    if unscored := sum(item.split == JUDGED for item in run.items) - len(test):
        yield f"{model.name}: {unscored} slides in split {JUDGED!r} have no heatmap and are left out of the FROC."
    if unknown := sum(not slide.annotated for slide in test):
        yield f"{model.name}: {unknown} slides in split {JUDGED!r} have no annotation and are left out of the FROC."
    if left := [slide.slide_id for slide in test if slide.slide_id.casefold() in LEFT_OUT]:
        yield f"{model.name}: {', '.join(left)} left out of the FROC, as is usual for CAMELYON16."
    if not sum(slide.to_find for slide in test if _in_froc(slide)):
        yield f"{model.name}: no lesion in split {JUDGED!r} is larger than isolated tumour cells, so no FROC."
    other = sorted({slide.mpp0 for slide in test if abs(slide.mpp0 / rules.resolution_um - 1) > 0.1})
    if other:
        yield (
            f"{model.name}: the rules take {rules.resolution_um:g} um per px0, and there are slides of "
            f"{', '.join(f'{mpp0:g}' for mpp0 in other[:5])}: their lengths are off by as much."
        )


def _too_few(model: Model, slides: Sequence[Slide], items: Mapping[str, Item]) -> Iterator[str]:
    """Why the slide AUC on test has no interval, as far as the patients are to blame."""
    test = [slide for slide in slides if items[slide.slide_id].split == JUDGED]
    patients = _by_patient(test, [slide.score for slide in test], items)
    sides = [sum(bool(both[i]) for both in patients.values()) for i in (0, 1)]
    if all(sides) and (why := no_interval(len(patients), sides[0], sides[1])):
        yield f"{model.name}: slide AUC in split {JUDGED!r}: {why}."


# rows


def _who(model: Model, slide: Slide, items: Mapping[str, Item]) -> dict[str, Any]:
    item = items[slide.slide_id]
    who = {"slide_id": slide.slide_id, "patient_id": item.patient, "split": item.split}
    return {**who, "model": model.node, "name": model.name}


def _detection_rows(model: Model, slide: Slide, items: Mapping[str, Item]) -> Iterator[dict[str, Any]]:
    for x, y, p, lesion in slide.detections:
        if not slide.annotated:
            hit = "unknown"
        elif lesion:
            hit = "isolated" if slide.lesions[lesion - 1][2] else "lesion"
        else:
            hit = "none"
        row = {"x_px0": x, "y_px0": y, "probability": p, "hit": hit, "lesion": lesion or None}
        yield _who(model, slide, items) | row


def _lesion_table(model: Model, slide: Slide, items: Mapping[str, Item]) -> Iterator[dict[str, Any]]:
    for i, (major, area, itc, p) in enumerate(slide.lesions, start=1):
        row = {"lesion": i, "major_um": major, "area_um2": area, "isolated": itc, "probability": p}
        yield _who(model, slide, items) | row


def _slide_rows(
    model: Model, slides: Sequence[Slide], items: Mapping[str, Item], forest: Floats | None
) -> Iterator[dict[str, Any]]:
    for i, slide in enumerate(slides):
        yield {
            **_who(model, slide, items),
            "truth": bool(slide.truth) if slide.truth >= 0 else None,
            "in_froc": _in_froc(slide),
            "score": slide.score,
            "score_forest": None if forest is None else defined(float(forest[i])),
            **dict(zip(FEATURES, slide.features, strict=True)),
        }


def _curve_rows(model: Model, split: str, curve: Froc | None) -> Iterator[dict[str, Any]]:
    if curve:
        about = {"model": model.node, "name": model.name, "split": split}
        for x, y in zip(curve.false_positives.tolist(), curve.sensitivity.tolist(), strict=True):
            yield {**about, "false_positives": x, "sensitivity": y}

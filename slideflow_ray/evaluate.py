"""Operating points from validation; confusion, AUC and intervals on test, at tile, slide and patient level.

A threshold is chosen on the validation split, stored with its rule, and applied unchanged
to the test split; patients are never in both. Everything is written beside the stores:
operating_points.json, confusion.json, roc.parquet, slides.parquet, patients.parquet. Two
evaluations of the same run write the same bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slideflow_ray import accounting, aggregate
from slideflow_ray.aggregate import Calls, Part, Scheduler, Tiles
from slideflow_ray.annotations import class_of, label_slide
from slideflow_ray.cohort import Item, check_splits
from slideflow_ray.errors import AnnotationError, ConfigError
from slideflow_ray.lease import lease
from slideflow_ray.metrics import (
    RATES,
    Confusion,
    Interval,
    Ints,
    Rule,
    Sparse,
    auc,
    auc_interval,
    average_precision,
    best_f1,
    counts_at,
    fixed_probability,
    fixed_sensitivity,
    fixed_specificity,
    rank_auc,
    rate_interval,
    roc,
    together,
    youden,
)
from slideflow_ray.results import (
    FITTED,
    JUDGED,
    LEVELS,
    Evaluation,
    OperatingPoint,
    Result,
    Table,
    write_evaluation,
)
from slideflow_ray.specs import LabelSpec, RunSpec
from slideflow_ray.tables import Columns, write_table

EXACT_TILES = 20_000_000
"""Up to so many tiles an AUC is computed from the margins themselves: 80 MB for each class."""

Cases = dict[str, tuple[Sparse, Sparse]]
"""patient -> (positives' margins, negatives' margins)."""


@dataclass(frozen=True)
class Model:
    """A scored model, as run.json names it."""

    node: str
    name: str
    task: str
    classes: tuple[str, ...]

    @property
    def targets(self) -> tuple[int, ...]:
        """Classes that are told from the rest: of two only the second, as the first is its mirror."""
        both = self.task == "classify" and len(self.classes) == 2
        return (1,) if both else tuple(range(len(self.classes)))

    @property
    def argmax(self) -> bool:
        """Whether a table by arg max says more than the operating point."""
        return self.task == "classify" and len(self.classes) > 2


@dataclass(frozen=True)
class Run:
    """What run.json says."""

    out: Path
    items: tuple[Item, ...]
    outcomes: Mapping[str, Mapping[str, Any]]
    models: tuple[Model, ...]
    labels: LabelSpec
    profile_digest: str | None
    scheduler: Scheduler


@dataclass(frozen=True)
class Settings:
    """How to evaluate."""

    rule: str
    seed: int
    resamples: int


# evaluate


def evaluate(
    out: str | Path,
    *,
    rule: str = "youden",
    names: Mapping[str, str] | None = None,
    scheduler: Scheduler | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> Evaluation:
    """Evaluate every model of a run and write the tables beside its stores.

    Parameters
    ----------
    out : output folder of a run
    rule : youden, f1, sensitivity=0.95, specificity=0.95 or probability=0.5
    names : further names of annotations and labels -> a class of the model, besides those in run.toml
    scheduler : "threads" or "ray"; as run.toml says, if None
    seed, resamples : of the intervals

    Raises ConfigError (no run, unknown rule), SplitLeakError, AnnotationError (all bad
    files together), CorruptStore, LeaseError while a run is under way.
    """
    rule_of(rule)
    run = read_run(Path(out), names or {}, scheduler)
    check_splits(run.items, _identities(run))
    with lease(run.out):
        done = [_evaluate_model(run, model, Settings(rule, seed, resamples)) for model in run.models]
        evaluation = Evaluation(*(tuple(x for d in done for x in getattr(d.found, key)) for key in _FIELDS))
        if not run.models:
            evaluation = replace(evaluation, notes=("The run had no classifier, so there is nothing to evaluate.",))
        _write(run.out, evaluation, done)
    return evaluation


_FIELDS = ("points", "results", "tables", "notes")


def rule_of(text: str) -> Rule:
    """Return the rule that `text` names. Raises ConfigError."""
    name, _, value = text.partition("=")
    plain: dict[str, Rule] = {"youden": youden, "f1": best_f1}
    with_value = {
        "sensitivity": fixed_sensitivity,
        "specificity": fixed_specificity,
        "probability": fixed_probability,
    }
    try:
        if name in plain and not value:
            return plain[name]
        if name in with_value and 0 < float(value) <= 1:
            return with_value[name](float(value))
    except ValueError:
        pass
    raise ConfigError(
        f"{text!r} is no rule for an operating point.",
        next_step="Use youden, f1, sensitivity=0.95, specificity=0.95 or probability=0.5.",
    )


def read_run(out: Path, names: Mapping[str, str] | None = None, scheduler: Scheduler | None = None) -> Run:
    """Read run.json. Raises ConfigError where there is none, or the run has not ended."""
    record = accounting.read_run(out)
    if not record["finished"]:
        raise ConfigError(f"The run in {out} has not ended.", next_step="Run the same command again: it resumes.")
    spec = RunSpec.parse(record["spec"], f"{out / 'run.json'}, spec")
    return Run(
        out=out,
        items=tuple(Item.parse(row, f"{out / 'run.json'}, items") for row in record["items"]),
        outcomes=record["outcomes"],
        models=tuple(
            Model(m["node"], m["name"], m["task"], tuple(m["classes"]))
            for m in record["models"]
            if m["task"] in ("classify", "multilabel")
        ),
        labels=spec.labels.model_copy(update={"names": {**spec.labels.names, **(names or {})}}),
        profile_digest=record["profile_digest"],
        scheduler=scheduler or spec.dask,
    )


def _identities(run: Run) -> dict[str, str]:
    """slide_id -> what the file is: what the run saw, else what the cohort says."""
    said = {i.slide_id: f"sha256:{i.sha256.lower()}" for i in run.items if i.sha256}
    return said | {slide: o["identity"] for slide, o in run.outcomes.items() if o.get("identity")}


@dataclass(frozen=True)
class _Done:
    """One model's evaluation and the rows of its tables."""

    found: Evaluation
    roc: tuple[dict[str, Any], ...] = ()
    slides: tuple[dict[str, Any], ...] = ()
    patients: tuple[dict[str, Any], ...] = ()


def _evaluate_model(run: Run, model: Model, settings: Settings) -> _Done:
    parts = label_tiles(run, model, _parts(run, model))
    tiles = aggregate.read_tiles(parts, model.targets, run.scheduler)
    items = {item.slide_id: item for item in run.items}
    exact = _margins(run, model, parts, tiles)
    notes = list(_left_out(run, model, parts, tiles))
    if not exact:
        notes.append(f"{model.name}: more than {EXACT_TILES:,} tiles, so the AUC by tile is that of its histograms.")
    points: list[OperatingPoint] = []
    results: list[Result] = []
    curves: list[dict[str, Any]] = []
    for level in LEVELS:
        for c in model.targets:
            cases = {split: cases_of(run, model, tiles, level, c, split) for split in (FITTED, JUDGED)}
            point, why = _fit(run, model, level, c, cases[FITTED], settings)
            points += [point] if point else []
            notes += [why] if why else []
            for split in (FITTED, JUDGED):
                if cases[split]:
                    found_auc = _auc(run, model, tiles, exact, level, c, split, cases[split])
                    results.append(_judge(model, level, c, split, cases[split], found_auc, point, settings))
                    curves += _curve(model, level, c, split, cases[split])
    thresholds = {model.classes.index(p.class_name): p.threshold for p in points if p.level == "tile"}
    calls = aggregate.read_calls(parts, model.classes, thresholds, model.argmax, run.scheduler)
    if not any(r.split == JUDGED for r in results):
        notes.append(f"{model.name}: no labelled slide in split {JUDGED!r}, so nothing was evaluated on test.")
    found = Evaluation(tuple(points), tuple(results), _tables(model, calls, items), tuple(notes))
    slides = tuple(_slide_rows(run, model, tiles, calls, points))
    return _Done(found, tuple(curves), slides, tuple(_patient_rows(run, model, tiles, points)))


def _parts(run: Run, model: Model) -> list[Part]:
    """The committed scores of a model, in the cohort's order."""
    parts = []
    for item in run.items:
        outcome = run.outcomes.get(item.slide_id, {})
        if outcome.get("status") == "done" and outcome.get("tiles"):
            grids = [grid for grid, node in outcome["grids"] if node == model.node]
            patient = item.patient if item.split else ""  # what is in no split adds to no patient's histogram
            parts += [Part(str(run.out), item.slide_id, grid, model.node, patient) for grid in grids]
            row = {"pack": outcome.get("pack", ""), "row": outcome.get("row", -1)}
            whole = [grid for grid, node in outcome.get("packed", ()) if node == model.node]
            parts += [Part(str(run.out), item.slide_id, grid, model.node, patient, **row) for grid in whole]
    return [part for part in parts if part.store.committed(f"scores/{part.grid}/{part.model}")]


# labels


def label_tiles(run: Run, model: Model, parts: Sequence[Part]) -> list[Part]:
    """Return the parts with their labels, which are written to the stores where they are missing.

    Raises AnnotationError, one for all files that cannot be used.
    """
    items = {item.slide_id: item for item in run.items}
    label = partial(_label, items=items, model=model, spec=run.labels)
    tiled = [part for part in parts if not part.pack]
    nodes, errors = aggregate.over_slides(label, tiled, _merge_labels, run.scheduler)
    if errors:
        shown = "\n".join(error.message for error in errors[:5])
        more = f"\n... and {len(errors) - 5} more." if len(errors) > 5 else ""
        raise AnnotationError(shown + more, next_step=errors[0].step)
    labelled = [replace(part, labels=nodes.get(part.slide_id)) for part in parts if not part.pack]
    return labelled + [_whole(part, items[part.slide_id], model, run.labels.names) for part in parts if part.pack]


def _whole(part: Part, item: Item, model: Model, names: Mapping[str, str]) -> Part:
    """An image in one piece has the cohort's label."""
    truth = tuple(truth_of(item, model, c, names) for c in range(len(model.classes)))
    return replace(part, whole=truth if max(truth) >= 0 else None)


_Labelled = tuple[dict[str, str], list[AnnotationError]]


def _merge_labels(several: Sequence[_Labelled]) -> _Labelled:
    return {k: v for nodes, _ in several for k, v in nodes.items()}, [e for _, errors in several for e in errors]


def _label(part: Part, items: Mapping[str, Item], model: Model, spec: LabelSpec) -> _Labelled:
    try:
        node = label_slide(part.store, part.grid, items[part.slide_id], model.classes, spec, model.task)
    except AnnotationError as error:
        return {}, [error]
    return ({part.slide_id: node} if node else {}), []


def truth_of(item: Item, model: Model, index: int, names: Mapping[str, str]) -> int:
    """Return whether a slide is of a class, by the cohort's label: 1, 0, or -1 where that is not known.

    A label that is no class of the model says nothing to a classify model, and "not this
    class" to a multilabel one.
    """
    if item.label is None:
        return -1
    meant = class_of(item.label, model.classes, names)
    if meant is None:
        return 0 if model.task == "multilabel" else -1
    return int(meant == model.classes[index])


# cases


def cases_of(run: Run, model: Model, tiles: Tiles, level: str, c: int, split: str) -> Cases:
    """Return the margins of a split's positives and negatives by patient, at a level; patients in order.

    A slide's margin is that of its highest tile, a patient's that of its highest slide; a
    patient is positive when a slide is, and negative when all its slides are known to be.
    """
    if level == "tile":
        patients = sorted({item.patient for item in run.items if item.split == split})
        known = {p: tiles.histograms[p][c] for p in patients if p in tiles.histograms}
        return {p: sides for p, sides in known.items() if sides[0].total + sides[1].total}
    rows = _patients(run, model, tiles, c, split) if level == "patient" else _slides(run, model, tiles, c, split)
    cases: Cases = {}
    for patient, truth, top in sorted(rows):
        if truth >= 0:
            one, none = Sparse.of([top]), Sparse.empty()
            pos, neg = cases.get(patient, (none, none))
            cases[patient] = (pos + one, neg) if truth else (pos, neg + one)
    return cases


def _slides(run: Run, model: Model, tiles: Tiles, c: int, split: str | None) -> Iterator[tuple[str, int, float]]:
    """(patient, truth, margin) of every scored slide of a split."""
    for item in run.items:
        if item.split == split and item.slide_id in tiles.slides:
            yield item.patient, truth_of(item, model, c, run.labels.names), tiles.slides[item.slide_id].top[c]


def _patients(run: Run, model: Model, tiles: Tiles, c: int, split: str | None) -> Iterator[tuple[str, int, float]]:
    """(patient, truth, margin) of every patient with a scored slide in a split."""
    slides: dict[str, list[tuple[int, float]]] = {}
    for patient, truth, top in _slides(run, model, tiles, c, split):
        slides.setdefault(patient, []).append((truth, top))
    for patient, rows in slides.items():
        truths = {truth for truth, _ in rows}
        yield patient, 1 if 1 in truths else min(truths), max(top for _, top in rows)


def _dense(cases: Cases) -> tuple[Ints, Ints]:
    return together(pos for pos, _ in cases.values()), together(neg for _, neg in cases.values())


# fit and judge


def _fit(
    run: Run, model: Model, level: Any, c: int, cases: Cases, settings: Settings
) -> tuple[OperatingPoint | None, str]:
    """Return the operating point, or None and why there is none."""
    pos, neg = _dense(cases)
    about = f"{model.name}, {level}, {model.classes[c]}: no operating point"
    try:
        threshold = rule_of(settings.rule)(pos, neg)
    except ValueError:
        n, m = int(pos.sum()), int(neg.sum())
        what = f"split {FITTED!r} has {n:,} positive and {m:,} negative labelled {level}s; both are needed"
        return None, f"{about}: {what}."
    if not math.isfinite(threshold):
        return None, f"{about}: the rule {settings.rule} chose an infinite margin."
    counts = counts_at(pos, neg, threshold)
    point = OperatingPoint(
        model=model.node,
        name=model.name,
        level=level,
        class_name=model.classes[c],
        rule=settings.rule,
        split=FITTED,
        threshold=threshold,
        probability=float(aggregate.probability(np.array([threshold], np.float32))[0]),
        positives=int(pos.sum()),
        negatives=int(neg.sum()),
        patients=len(cases),
        sensitivity=_number(counts.sensitivity),
        specificity=_number(counts.specificity),
        profile_digest=run.profile_digest,
    )
    return point, ""


def _margins(run: Run, model: Model, parts: Sequence[Part], tiles: Tiles) -> dict[str, dict[int, aggregate.Sides]]:
    """The margins themselves by split, for an exact AUC; nothing where they are too many to hold."""
    if sum(scores.tiles for scores in tiles.slides.values()) > EXACT_TILES:
        return {}
    of = {item.slide_id: item.split for item in run.items}
    return {
        split: aggregate.read_margins([p for p in parts if of[p.slide_id] == split], model.targets, run.scheduler)
        for split in (FITTED, JUDGED)
    }


def _auc(
    run: Run,
    model: Model,
    tiles: Tiles,
    exact: Mapping[str, Mapping[int, aggregate.Sides]],
    level: str,
    c: int,
    split: str,
    cases: Cases,
) -> float:
    """The AUC of the margins themselves, as scikit-learn's; of tiles by their histograms where those are not held."""
    if level == "tile":
        return rank_auc(*exact[split][c]) if exact else auc(*_dense(cases))
    rows = list((_patients if level == "patient" else _slides)(run, model, tiles, c, split))
    sides = [np.array([top for _, truth, top in rows if truth == side], np.float32) for side in (1, 0)]
    return rank_auc(*sides)


def _judge(
    model: Model,
    level: Any,
    c: int,
    split: str,
    cases: Cases,
    found_auc: float,
    point: OperatingPoint | None,
    settings: Settings,
) -> Result:
    pos, neg = _dense(cases)
    counts = counts_at(pos, neg, point.threshold) if point else None
    draw: dict[str, Any] = {"seed": settings.seed, "resamples": settings.resamples}
    intervals = _rate_intervals(cases, point.threshold, draw) if point else (None, None)
    both = pos.any() and neg.any()
    return Result(
        model=model.node,
        name=model.name,
        level=level,
        class_name=model.classes[c],
        split=split,
        positives=int(pos.sum()),
        negatives=int(neg.sum()),
        patients=len(cases),
        auc=_number(found_auc),
        auc_interval=auc_interval([s[0] for s in cases.values()], [s[1] for s in cases.values()], **draw)
        if both
        else None,
        average_precision=_number(average_precision(pos, neg)) if both else None,
        threshold=point.threshold if point else None,
        counts=asdict(counts) if counts else None,
        rates={name: _number(getattr(counts, name)) for name in RATES} if counts else {},
        sensitivity_interval=intervals[0],
        specificity_interval=intervals[1],
    )


def _rate_intervals(cases: Cases, threshold: float, draw: dict[str, Any]) -> tuple[Interval | None, Interval | None]:
    tp = [pos.at_least(threshold) for pos, _ in cases.values()]
    tn = [neg.total - neg.at_least(threshold) for _, neg in cases.values()]
    sensitivity = rate_interval(tp, [pos.total for pos, _ in cases.values()], **draw)
    return sensitivity, rate_interval(tn, [neg.total for _, neg in cases.values()], **draw)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _tables(model: Model, calls: Calls, items: Mapping[str, Item]) -> tuple[Table, ...]:
    tables = []
    for split in (FITTED, JUDGED):
        mine = [table for slide, table in sorted(calls.confusion.items()) if items[slide].split == split]
        total = sum(mine, Confusion.zeros(model.classes))
        if total.total:
            tables.append(
                Table(
                    model=model.node,
                    name=model.name,
                    level="tile",
                    split=split,
                    classes=model.classes,
                    counts=tuple(tuple(int(n) for n in row) for row in total.counts),
                    accuracy=_number(total.accuracy),
                    balanced_accuracy=_number(total.balanced_accuracy),
                    kappa=_number(total.kappa),
                )
            )
    return tuple(tables)


# what is left out


def _left_out(run: Run, model: Model, parts: Sequence[Part], tiles: Tiles) -> Iterator[str]:
    judged = [item for item in run.items if item.split in (FITTED, JUDGED)]
    if not judged:
        yield f"{model.name}: no slide is in split {FITTED!r} or {JUDGED!r}; say so in the cohort's column `split`."
    missing = Counter(str(item.split) for item in judged if item.slide_id not in tiles.slides)
    for split, n in sorted(missing.items()):
        total = sum(item.split == split for item in judged)
        yield f"{model.name}: {n} of {total} slides in split {split!r} have no scores and are left out."
    splits = {item.slide_id: item.split for item in judged}
    for split in (FITTED, JUDGED):
        mine = [part for part in parts if splits.get(part.slide_id) == split]
        bare = sum(part.labels is None for part in mine)
        unknown = sum(tiles.slides[part.slide_id].unknown for part in mine)
        if bare:
            yield f"{model.name}: {unknown:,} tiles of {bare} slides in split {split!r} are unlabelled and left out."
    strange = sorted(
        {i.label for i in judged if i.label and model.task == "classify" and _strange(i.label, model, run.labels.names)}
    )
    if strange:
        yield f"{model.name}: labels that are no class of the model are left out: {', '.join(strange)}."


def _strange(label: str, model: Model, names: Mapping[str, str]) -> bool:
    return class_of(label, model.classes, names) is None


# tables

_ABOUT: Columns = {"model": "text", "name": "text", "class": "text"}
ROC_COLUMNS: Columns = {
    **_ABOUT,
    "level": "text",
    "split": "text",
    "threshold": "float32",
    "tp": "int",
    "fp": "int",
    "tpr": "float",
    "fpr": "float",
    "precision": "float",
}
SLIDE_COLUMNS: Columns = {
    "slide_id": "text",
    "patient_id": "text",
    "split": "text",
    "label": "text",
    **_ABOUT,
    "truth": "bool",
    "called": "bool",
    "score_max": "float32",
    "score_top10": "float32",
    "area_fraction": "float",
    "tiles": "int",
    "tiles_positive": "int",
    "tiles_negative": "int",
    "tiles_unknown": "int",
    "tp": "int",
    "fn": "int",
    "fp": "int",
    "tn": "int",
}
PATIENT_COLUMNS: Columns = {
    "patient_id": "text",
    "split": "text",
    **_ABOUT,
    "slides": "int",
    "truth": "bool",
    "called": "bool",
    "score_max": "float32",
}


def _curve(model: Model, level: str, c: int, split: str, cases: Cases) -> Iterator[dict[str, Any]]:
    """One row per occupied threshold; nothing where a class is missing."""
    curve = roc(*_dense(cases))
    if not curve.positives or not curve.negatives:
        return
    about = {"model": model.node, "name": model.name, "class": model.classes[c], "level": level, "split": split}
    values = zip(curve.thresholds, curve.tp, curve.fp, curve.tpr, curve.fpr, curve.precision, strict=True)
    for row in values:
        yield {**about, **dict(zip(list(ROC_COLUMNS)[5:], (v.item() for v in row), strict=True))}


def _slide_rows(
    run: Run, model: Model, tiles: Tiles, calls: Calls, points: Sequence[OperatingPoint]
) -> Iterator[dict[str, Any]]:
    frozen = {p.class_name: p.threshold for p in points if p.level == "slide"}
    for item in run.items:
        if item.slide_id not in tiles.slides:
            continue
        scores = tiles.slides[item.slide_id]
        for c in model.targets:
            name, counts = model.classes[c], calls.counts.get(item.slide_id, {}).get(c)
            truth = truth_of(item, model, c, run.labels.names)
            yield {
                "slide_id": item.slide_id,
                "patient_id": item.patient,
                "split": item.split,
                "label": item.label,
                "model": model.node,
                "name": model.name,
                "class": name,
                "truth": bool(truth) if truth >= 0 else None,
                "called": scores.top[c] >= frozen[name] if name in frozen else None,
                "score_max": scores.top[c],
                "score_top10": scores.top10[c],
                "area_fraction": scores.area[c],
                "tiles": scores.tiles,
                "tiles_positive": scores.positives[c],
                "tiles_negative": scores.negatives[c],
                "tiles_unknown": scores.unknown,
                **(asdict(counts) if counts else {}),
            }


def _patient_rows(run: Run, model: Model, tiles: Tiles, points: Sequence[OperatingPoint]) -> Iterator[dict[str, Any]]:
    frozen = {p.class_name: p.threshold for p in points if p.level == "patient"}
    slides = Counter(f"{item.split} {item.patient}" for item in run.items if item.slide_id in tiles.slides)
    for c in model.targets:
        name = model.classes[c]
        for split in (None, "train", FITTED, JUDGED):
            for patient, truth, top in sorted(_patients(run, model, tiles, c, split)):
                yield {
                    "patient_id": patient,
                    "split": split,
                    "model": model.node,
                    "name": model.name,
                    "class": name,
                    "slides": slides[f"{split} {patient}"],
                    "truth": bool(truth) if truth >= 0 else None,
                    "called": top >= frozen[name] if name in frozen else None,
                    "score_max": top,
                }


def _write(out: Path, evaluation: Evaluation, done: Sequence[_Done]) -> None:
    write_table(out / "roc.parquet", ROC_COLUMNS, [row for d in done for row in d.roc])
    write_table(out / "slides.parquet", SLIDE_COLUMNS, [row for d in done for row in d.slides])
    write_table(out / "patients.parquet", PATIENT_COLUMNS, [row for d in done for row in d.patients])
    write_evaluation(out, evaluation)

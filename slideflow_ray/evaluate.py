"""Operating points from validation; confusion, AUC and intervals on test, at tile, slide and patient level.

A threshold is chosen on the validation split, stored with its rule, and applied unchanged
to the test split; patients are never in both. Everything is written beside the stores:
operating_points.json, confusion.json, and the tables roc, pr, reliability, slides, patients
and confusion (by slide) as Parquet. Two evaluations of the same run write the same bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from slideflow_ray import aggregate, answers, cascade, detection, overlap
from slideflow_ray.accounting import read_run as read_record
from slideflow_ray.aggregate import Calls, Part, Scheduler, Sides, SlideScore, Tiles
from slideflow_ray.annotations import class_of, classes_of, unused_names
from slideflow_ray.cases import (
    EXACT_TILES,
    Judged,
    Model,
    Run,
    label_text,
    label_tiles,
    margins_of,
    parts_of,
    read_run,
    slides_judged,
    tiles_judged,
)
from slideflow_ray.cohort import Item, check_splits
from slideflow_ray.detection import Detected, detect
from slideflow_ray.errors import ConfigError
from slideflow_ray.lease import lease
from slideflow_ray.metrics import (
    MIN_PATIENTS,
    RATES,
    Confusion,
    Counts,
    Interval,
    auc_interval,
    kappa_interval,
    rate_interval,
)
from slideflow_ray.results import (
    FITTED,
    JUDGED,
    LEVELS,
    Evaluation,
    Level,
    Matrix,
    OperatingPoint,
    Result,
    Table,
    defined,
    withdraw,
    write_evaluation,
)
from slideflow_ray.rules import fixes_probability, rule_of, written
from slideflow_ray.storage import place
from slideflow_ray.tables import Columns, write_table


@dataclass(frozen=True)
class Settings:
    """How to evaluate."""

    rule: str
    score: SlideScore
    seed: int
    resamples: int

    @property
    def draw(self) -> dict[str, Any]:
        """How intervals are drawn."""
        return {"seed": self.seed, "resamples": self.resamples}


TABLES: Mapping[str, Columns] = {
    "roc": answers.ROC_COLUMNS,
    "pr": answers.PR_COLUMNS,
    "reliability": answers.RELIABILITY_COLUMNS,
    "slides": answers.SLIDE_COLUMNS,
    "patients": answers.PATIENT_COLUMNS,
    "confusion": answers.CONFUSION_COLUMNS,
}
"""The Parquet tables that an evaluation writes."""

Rows = dict[str, list[dict[str, Any]]]


# evaluate


def evaluate(
    out: str | Path,
    *,
    rule: str = "youden",
    names: Mapping[str, str] | None = None,
    scheduler: Scheduler | None = None,
    slide_score: SlideScore = "max",
    labels: str | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> Evaluation:
    """Evaluate every model of a run and write the tables beside its stores, in place of an earlier evaluation's.

    Parameters
    ----------
    out : output folder of a run
    rule : youden, f1, sensitivity=0.95, specificity=0.95, cost=5, cost=5,prevalence=0.1, probability=0.5, or the
        presets 004 (probability=0.8) and 003 (probability=0.5)
    names : further names of annotations and labels -> a class of the model, besides those in run.toml
    scheduler : "threads" or "ray"; as run.toml says, if None
    slide_score : what a slide is judged by: "max", its highest tile; "top10", the mean of the ten highest margins;
        "area", the share of its tiles at a probability of 0.5 or more
    labels : how annotations label tiles, "centre" or "fraction=0.75"; as run.toml says, if None
    seed, resamples : of the intervals

    Raises ConfigError (no run, unknown rule), SplitLeakError, AnnotationError (all bad
    files together), CorruptStore, LeaseError while a run is under way.
    """
    rule_of(rule)
    if slide_score not in get_args(SlideScore):
        raise ConfigError(f"{slide_score!r} is no score of a slide: use {', '.join(get_args(SlideScore))}.")
    run = read_run(place(out), names or {}, scheduler, labels)
    check_splits(run.items, run.identities)
    with lease(run.out):
        settings = Settings(rule, slide_score, seed, resamples)
        done = [_evaluate_model(run, model, settings) for model in run.models]
        points = [point for d in done for point in d.found.points]
        record = read_record(run.out)
        detected = detect(run, record, points, **settings.draw)
        compared = overlap.overlap(run, record, **settings.draw)
        notes = _notes(run, record, [d.found for d in done])
        evaluation = _together([d.found for d in done], detected, compared, run, notes)
        withdraw(run.out)
        if detected.results:
            for name, columns in detection.TABLES.items():
                write_table(run.out / f"{name}.parquet", columns, detected.rows[name])
        if compared.results:
            write_table(run.out / "overlap.parquet", overlap.SLIDE_COLUMNS, compared.rows)
        for name, columns in TABLES.items():
            write_table(run.out / f"{name}.parquet", columns, [row for d in done for row in d.rows[name]])
        write_evaluation(run.out, evaluation)
        cascade.write_tables(run.out, run.scheduler)
    return evaluation


def _notes(run: Run, record: Mapping[str, Any], found: Sequence[Evaluation]) -> tuple[str, ...]:
    """What stands above all: names that occur nowhere, segmentations without objects; then each model's notes.

    Of models on objects that do not exist nothing more is said: all of it would follow from that.
    """
    unused = unused_names(run.items, run.labels.names)
    notes = [unused] if unused else []
    idle: set[str] = set()
    for one in cascade.cascades(record):
        if slides := cascade.without_objects(run.out, run.items, run.outcomes, one):
            notes.append(f"{one.name} found no objects on any of {slides} slides.")
            idle |= {judge.node for judge in one.judges}
    pairs = zip(run.models, found, strict=True)
    return (*notes, *(note for model, its in pairs if model.node not in idle for note in its.notes))


def _together(
    found: Sequence[Evaluation], detected: Detected, compared: overlap.Compared, run: Run, notes: tuple[str, ...]
) -> Evaluation:
    notes = (*notes, *detected.notes, *compared.notes)
    return Evaluation(
        points=tuple(point for one in found for point in one.points),
        results=tuple(result for one in found for result in one.results),
        tables=tuple(table for one in found for table in one.tables),
        detections=detected.results,
        overlaps=compared.results,
        notes=notes if found or detected.results else (*notes, "The run had no classifier to evaluate."),
        labels=label_text(run.labels),
        run=run.digest,
    )


@dataclass(frozen=True)
class _Done:
    """One model's evaluation and the rows of its tables."""

    found: Evaluation
    rows: Rows = field(default_factory=dict)


def _evaluate_model(run: Run, model: Model, settings: Settings) -> _Done:
    parts = label_tiles(run, model, parts_of(run, model))
    tiles = aggregate.read_tiles(parts, model.targets, run.scheduler)
    judged = _judged(run, model, parts, tiles, settings)
    thresholds, notes = _thresholds(model, judged, settings)
    at = {c: threshold for (level, c), threshold in thresholds.items() if level == "tile"}
    calls = aggregate.read_calls(parts, model.classes, at, model.argmax, run.scheduler)
    points, results = _answers(run, model, judged, thresholds, calls, settings)
    notes = [*_left_out(run, model, parts, tiles), *notes, *_missed(run, model, parts)]
    notes += [note for one in judged if one.split == JUDGED for note in _ill_posed(model, one)]
    if not any(r.split == JUDGED for r in results):
        notes.append(f"{model.name}: no labelled slide in split {JUDGED!r}, so nothing was evaluated on test.")
    rows = {
        "roc": [row for one in judged for row in answers.roc_rows(model, one)],
        "pr": [row for one in judged for row in answers.pr_rows(model, one)],
        "reliability": [row for one in judged for row in answers.reliability_rows(model, one)],
        "slides": list(answers.slide_rows(run, model, parts, tiles, calls, points, settings.score)),
        "patients": list(answers.patient_rows(run, model, tiles, points, settings.score)),
        "confusion": list(answers.confusion_rows(run, model, calls)),
    }
    items = {item.slide_id: item for item in run.items}
    return _Done(Evaluation(tuple(points), results, _tables(model, calls, items, settings), tuple(notes)), rows)


def _answers(
    run: Run,
    model: Model,
    judged: Sequence[Judged],
    thresholds: Thresholds,
    calls: Calls,
    settings: Settings,
) -> tuple[list[OperatingPoint], tuple[Result, ...]]:
    """The operating points of validation, and every result at them."""
    frozen = [(one, thresholds.get((one.level, one.index))) for one in judged]
    counts = [None if at is None else _counts(run, one, at, calls) for one, at in frozen]
    points = [
        _point(run, model, one, at, by_patient, settings)
        for (one, at), by_patient in zip(frozen, counts, strict=True)
        if at is not None and by_patient is not None and one.split == FITTED
    ]
    results = tuple(
        _judge(run, model, one, at, by_patient, settings)
        for (one, at), by_patient in zip(frozen, counts, strict=True)
        if one.cases
    )
    return points, results


def evaluate_slides(
    run: Run, model: Model, slides: Tiles, rule: str, seed: int = 0, resamples: int = 1000
) -> Evaluation:
    """Evaluate a model that answers by slide (its margins stand where `slides` has those of the highest tile).

    Levels are slide and patient; the rest is as `evaluate` does it. Raises ConfigError for an unknown rule.
    """
    rule_of(rule)
    settings = Settings(rule, "max", seed, resamples)
    pairs = [(level, c, split) for level in LEVELS[1:] for c in model.targets for split in (FITTED, JUDGED)]
    judged = [slides_judged(run, model, slides, level, c, split, "max") for level, c, split in pairs]
    thresholds, notes = _thresholds(model, judged, settings)
    points, results = _answers(run, model, judged, thresholds, Calls({}, {}), settings)
    notes += [note for one in judged if one.split == JUDGED for note in _ill_posed(model, one)]
    return Evaluation(tuple(points), results, (), tuple(notes))


def _judged(run: Run, model: Model, parts: Sequence[Part], tiles: Tiles, settings: Settings) -> list[Judged]:
    """Every level, class and split, in this order."""
    margins = margins_of(run, model, parts, tiles)
    pairs = [(c, split) for c in model.targets for split in (FITTED, JUDGED)]
    found = [tiles_judged(run, tiles, margins, c, split) for c, split in pairs]
    for level in LEVELS[1:]:
        found += [slides_judged(run, model, tiles, level, c, split, settings.score) for c, split in pairs]
    return found


# fit and judge


Thresholds = Mapping[tuple[Level, int], float]
"""(level, class) -> the threshold that is frozen."""


def _thresholds(model: Model, judged: Sequence[Judged], settings: Settings) -> tuple[Thresholds, list[str]]:
    """Choose a threshold for every level and class on validation; say where there is none, and what to know of it."""
    thresholds: dict[tuple[Level, int], float] = {}
    notes: list[str] = []
    if any(one.level == "tile" and one.sides is None for one in judged):
        notes.append(f"{model.name}: more than {EXACT_TILES:,} tiles, so AUC and curves by tile are of histograms.")
    fitted = [one for one in judged if one.split == FITTED]
    bare = _bare(fitted, settings)
    if bare:
        notes.append(f"{model.name}: no operating points by {' and '.join(bare)}, as no {bare[0]} has a label.")
    for one in fitted:
        if one.level not in bare:
            threshold, why = _fit(model, one, settings)
            notes += [why] if why else []
            if threshold is not None:
                thresholds[one.level, one.index] = threshold
    return thresholds, notes


def _bare(fitted: Sequence[Judged], settings: Settings) -> list[Level]:
    """The levels above tiles without any case to choose a threshold on, where tiles have some: said once for all."""
    known = {one.level for one in fitted if one.cases}
    if fixes_probability(settings.rule) or LEVELS[0] not in known:
        return []
    return [level for level in LEVELS[1:] if level not in known]


def _fit(model: Model, judged: Judged, settings: Settings) -> tuple[float | None, str]:
    """Return the threshold and what is to be said about it, or None and why there is none."""
    pos, neg = judged.dense
    n, m = int(pos.sum()), int(neg.sum())
    about = f"{model.name}, {judged.level}, {model.classes[judged.index]}"
    fixed = fixes_probability(settings.rule)
    if fixed and judged.score == "area":
        return None, f"{about}: no operating point: {settings.rule} fixes a probability, and area is none."
    try:
        threshold = rule_of(settings.rule)(pos, neg)
    except ValueError:
        what = f"split {FITTED!r} has {n:,} positive and {m:,} negative labelled {judged.level}s; both are needed"
        return None, f"{about}: no operating point: {what}."
    if not math.isfinite(threshold):
        return None, f"{about}: no operating point: the rule {settings.rule} chose an infinite margin."
    note = "" if judged.cases else f"{about}: the threshold is fixed by its rule, and no validation has tried it."
    return threshold, note


def _counts(run: Run, judged: Judged, threshold: float, calls: Calls) -> dict[str, Counts]:
    """Each patient's counts at a threshold, of the scores themselves: no bin's edge is needed."""
    if judged.scores is not None:
        return {patient: _called(sides, threshold) for patient, sides in judged.scores.items()}
    found: dict[str, Counts] = dict.fromkeys(judged.cases, Counts())
    for item in run.items:
        if item.split == judged.split and item.patient in found:
            counts = calls.counts.get(item.slide_id, {})
            found[item.patient] += counts.get(judged.index, Counts())
    return found


def _called(sides: Sides, threshold: float) -> Counts:
    truth = np.repeat(np.array([1, 0], np.int8), [len(side) for side in sides])
    return aggregate.called(np.concatenate(sides), truth, threshold)


def _point(
    run: Run, model: Model, judged: Judged, threshold: float, by_patient: Mapping[str, Counts], settings: Settings
) -> OperatingPoint:
    counts = sum(by_patient.values(), Counts())
    probability = float(aggregate.probability(np.array([threshold], np.float32))[0])
    return OperatingPoint(
        model=model.node,
        name=model.name,
        level=judged.level,
        class_name=model.classes[judged.index],
        rule=written(settings.rule),
        split=FITTED if judged.cases else "none",
        threshold=threshold,
        probability=None if judged.score == "area" else probability,
        positives=counts.tp + counts.fn,
        negatives=counts.fp + counts.tn,
        patients=len(judged.cases),
        sensitivity=defined(counts.sensitivity),
        specificity=defined(counts.specificity),
        profile_digest=run.profile_digest,
        score=judged.score,
        lone=len(run.lone & set(judged.cases)),
    )


def _judge(
    run: Run,
    model: Model,
    judged: Judged,
    threshold: float | None,
    by_patient: Mapping[str, Counts] | None,
    settings: Settings,
) -> Result:
    pos, neg = judged.dense
    name = model.classes[judged.index]
    counts = None if by_patient is None else sum(by_patient.values(), Counts())
    intervals = _rate_intervals(by_patient, settings) if by_patient is not None else (None, None)
    both, spread = pos.any() and neg.any(), judged.reliability
    return Result(
        model=model.node,
        name=model.name,
        level=judged.level,
        class_name=name,
        split=judged.split,
        positives=int(pos.sum()),
        negatives=int(neg.sum()),
        patients=len(judged.cases),
        auc=defined(judged.auc),
        auc_interval=auc_interval(*judged.by_patient, **settings.draw) if both else None,
        average_precision=defined(judged.exact.average_precision),
        threshold=threshold,
        counts=asdict(counts) if counts else None,
        rates={rate: defined(getattr(counts, rate)) for rate in RATES} if counts else {},
        sensitivity_interval=intervals[0],
        specificity_interval=intervals[1],
        confusion=Matrix.of(counts.confusion(model.rest(judged.index), name)) if counts else None,
        auc_004=defined(spread.auc_004) if spread else None,
        expected_calibration_error=defined(spread.expected_calibration_error) if spread else None,
        score=judged.score,
        lone=len(run.lone & set(judged.cases)),
        no_interval=judged.no_interval,
        unit=model.unit if judged.level == "tile" else "",
    )


def _rate_intervals(by_patient: Mapping[str, Counts], settings: Settings) -> tuple[Interval | None, Interval | None]:
    """Of sensitivity and of specificity."""
    each = list(by_patient.values())
    sensitivity = rate_interval([c.tp for c in each], [c.tp + c.fn for c in each], **settings.draw)
    return sensitivity, rate_interval([c.tn for c in each], [c.tn + c.fp for c in each], **settings.draw)


def _tables(model: Model, calls: Calls, items: Mapping[str, Item], settings: Settings) -> tuple[Table, ...]:
    tables = []
    for split in (FITTED, JUDGED):
        mine = [table for slide, table in sorted(calls.confusion.items()) if items[slide].split == split]
        total = sum(mine, Confusion.zeros(model.classes))
        if total.total:
            patients: dict[str, list[Confusion]] = {}
            for slide, table in sorted(calls.confusion.items()):
                if items[slide].split == split:
                    patients.setdefault(items[slide].patient, []).append(table)
            each = [sum(patients[name], Confusion.zeros(model.classes)).counts for name in sorted(patients)]
            about = {"model": model.node, "name": model.name, "level": "tile", "split": split, "unit": model.unit}
            tables.append(Table.of(total, **about, kappa_interval=kappa_interval(each, **settings.draw)))
    return tuple(tables)


# what is left out, missed or not defined


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
        bare = sum(part.labels is None and part.whole is None for part in mine)
        unknown = sum(tiles.slides[part.slide_id].unknown for part in mine)
        if bare:
            yield f"{model.name}: {unknown:,} tiles of {bare} slides in split {split!r} are unlabelled and left out."
        elif unknown and mine[0].on_objects:
            yield f"{model.name}: {unknown:,} objects in split {split!r} are annotated with no one class, left out."
        elif unknown:
            yield f"{model.name}: {unknown:,} tiles in split {split!r} are partly in a region, of no class, left out."
    strange = sorted(
        {i.label for i in judged if i.label and model.task == "classify" and _strange(i.label, model, run.labels.names)}
    )
    several = [label for label in strange if len(classes_of(label, model.classes, run.labels.names)) > 1]
    if several:
        n = sum(item.label in several for item in judged)
        yield f"{model.name}: {n} items of several classes have no single truth, left out: {', '.join(several)}."
    if strange := [label for label in strange if label not in several]:
        yield f"{model.name}: labels that are no class of the model are left out: {', '.join(strange)}."


def _strange(label: str, model: Model, names: Mapping[str, str]) -> bool:
    return class_of(label, model.classes, names) is None


def _missed(run: Run, model: Model, parts: Sequence[Part]) -> Iterator[str]:
    """Annotated area outside the tissue masks: no tile there was scored."""
    for c in model.targets:
        if model.task == "classify" and c == 0:
            continue
        name = model.classes[c]
        areas = [(part.slide_id, all_, out) for part in parts for of, all_, out in part.annotated if of == name]
        whole, missed = math.fsum(row[1] for row in areas), math.fsum(row[2] for row in areas)
        if missed:
            worst = max(areas, key=lambda row: (row[2] / row[1], row[0]))
            slides = sum(row[2] > 0 for row in areas)
            yield (
                f"{model.name}: {missed:,.0f} um2 ({missed / whole:.1%}) of the annotated {name} lie outside the "
                f"tissue masks of {slides} slides and were not scored; most of all on {worst[0]}, "
                f"{worst[2] / worst[1]:.1%}."
            )
    outcomes = {i.slide_id: run.outcomes.get(i.slide_id, {}) for i in run.items if i.annotation}
    glass = sorted(s for s, o in outcomes.items() if o.get("outcome") == "no_tissue")
    if glass:
        yield f"{model.name}: no tissue was found on {len(glass)} annotated slides, all is missed: {', '.join(glass)}."


def _ill_posed(model: Model, judged: Judged) -> Iterator[str]:
    """Results whose value is a convention, or that have none."""
    if not judged.cases:
        return
    roc, about = judged.exact, f"{model.name}, {judged.split}, {judged.level}, {model.classes[judged.index]}"
    if not roc.positives:
        yield f"{about}: no positives among {roc.negatives:,}, so AUC, average precision and sensitivity are undefined."
    elif not roc.negatives:
        yield f"{about}: no negatives among {roc.positives:,}, so AUC and specificity are undefined."
    elif judged.no_interval and len(judged.cases) >= MIN_PATIENTS:
        yield f"{about}: {judged.no_interval}, as resampling cannot vary what is of one patient."
    if roc.positives and roc.negatives and len(roc.thresholds) == 1:
        yield f"{about}: all {roc.positives + roc.negatives:,} scores are equal, which makes the AUC 0.5."

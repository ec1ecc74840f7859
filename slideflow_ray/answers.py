"""The tables of an evaluation: their columns, and their rows from what was judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from slideflow_ray.aggregate import Calls, Part, SlideScore, Tiles
from slideflow_ray.cases import Judged, Model, Run, patients_of, slides_of, truth_of
from slideflow_ray.metrics import RATES, RELIABILITY_BINS, Counts
from slideflow_ray.results import FITTED, JUDGED, OperatingPoint, defined
from slideflow_ray.tables import Columns

_ABOUT: Columns = {"model": "text", "name": "text", "class": "text"}
_OF: Columns = {**_ABOUT, "level": "text", "split": "text"}
_AT: Columns = {"threshold": "float32", "tp": "int", "fp": "int"}
ROC_COLUMNS: Columns = {**_OF, **_AT, "tpr": "float", "fpr": "float", "precision": "float"}
PR_COLUMNS: Columns = {**_OF, **_AT, "recall": "float", "precision": "float"}
RELIABILITY_COLUMNS: Columns = {
    **_OF,
    "low": "float",
    "high": "float",
    "cases": "int",
    "positives": "int",
    "mean_probability": "float",
    "observed": "float",
}
SLIDE_COLUMNS: Columns = {
    "slide_id": "text",
    "patient_id": "text",
    "split": "text",
    "label": "text",
    **_ABOUT,
    "truth": "bool",
    "called": "bool",
    "score": "float32",
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
    **dict.fromkeys(RATES, "float"),
    "annotated_um2": "float",
    "missed_um2": "float",
    "missed_share": "float",
    "labels": "text",
}
PATIENT_COLUMNS: Columns = {
    "patient_id": "text",
    "split": "text",
    **_ABOUT,
    "slides": "int",
    "slides_called": "int",
    "slide_without_patient": "bool",
    "truth": "bool",
    "called": "bool",
    "score": "float32",
    "score_max": "float32",
}
CONFUSION_COLUMNS: Columns = {
    "slide_id": "text",
    "patient_id": "text",
    "split": "text",
    "model": "text",
    "name": "text",
    "by": "text",
    "true": "text",
    "called": "text",
    "tiles": "int",
}


def about(model: Model, judged: Judged) -> dict[str, Any]:
    """Return the columns that say which model, class, level and split a row is of."""
    name = model.classes[judged.index]
    return {"model": model.node, "name": model.name, "class": name, "level": judged.level, "split": judged.split}


def roc_rows(model: Model, judged: Judged) -> Iterator[dict[str, Any]]:
    """Yield one row per threshold; nothing where a class is missing."""
    curve, of = judged.curve, about(model, judged)
    if not curve.positives or not curve.negatives:
        return
    for row in zip(curve.thresholds, curve.tp, curve.fp, curve.tpr, curve.fpr, curve.precision, strict=True):
        yield of | dict(zip(list(ROC_COLUMNS)[5:], (value.item() for value in row), strict=True))


def pr_rows(model: Model, judged: Judged) -> Iterator[dict[str, Any]]:
    """Yield one row per threshold: recall and precision; nothing without positives."""
    curve, of = judged.curve, about(model, judged)
    if not curve.positives:
        return
    for row in zip(curve.thresholds, curve.tp, curve.fp, curve.tpr, curve.precision, strict=True):
        yield of | dict(zip(list(PR_COLUMNS)[5:], (value.item() for value in row), strict=True))


def reliability_rows(model: Model, judged: Judged) -> Iterator[dict[str, Any]]:
    """Yield ten rows, one per bin of probability; rates are null in an empty one."""
    spread = judged.reliability
    if spread is None or not spread.total.sum():
        return
    for i in range(RELIABILITY_BINS):
        yield {
            **about(model, judged),
            "low": i / RELIABILITY_BINS,
            "high": (i + 1) / RELIABILITY_BINS,
            "cases": int(spread.total[i]),
            "positives": int(spread.positives[i]),
            "mean_probability": defined(float(spread.mean_probability[i])),
            "observed": defined(float(spread.observed[i])),
        }


def slide_rows(
    run: Run,
    model: Model,
    parts: Sequence[Part],
    tiles: Tiles,
    calls: Calls,
    points: Sequence[OperatingPoint],
    score: SlideScore,
) -> Iterator[dict[str, Any]]:
    """Yield one row per scored slide and class; counts and rates are of its tiles, at the tiles' operating point.

    `labels` is the node of the store that holds its tiles' labels.
    """
    frozen = {p.class_name: p.threshold for p in points if p.level == "slide"}
    labels = {part.slide_id: part.labels for part in parts}
    areas = {part.slide_id: {name: both for name, *both in part.annotated} for part in parts}
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
                "called": scores.score(score)[c] >= frozen[name] if name in frozen else None,
                "score": scores.score(score)[c],
                "score_max": scores.top[c],
                "score_top10": scores.top10[c],
                "area_fraction": scores.area[c],
                "tiles": scores.tiles,
                "tiles_positive": scores.positives[c],
                "tiles_negative": scores.negatives[c],
                "tiles_unknown": scores.unknown,
                **(_counted(counts) if counts else {}),
                **_missed(areas.get(item.slide_id, {}).get(name)),
                "labels": labels.get(item.slide_id),
            }


def _counted(counts: Counts) -> dict[str, Any]:
    return {**asdict(counts), **{rate: defined(getattr(counts, rate)) for rate in RATES}}


def _missed(areas: Sequence[float] | None) -> dict[str, float]:
    if areas is None:
        return {}
    whole, missed = areas
    return {"annotated_um2": whole, "missed_um2": missed, "missed_share": missed / whole}


def patient_rows(
    run: Run, model: Model, tiles: Tiles, points: Sequence[OperatingPoint], score: SlideScore
) -> Iterator[dict[str, Any]]:
    """Yield one row per patient, split and class.

    slides_called : of its slides, at the slides' operating point, or where there is none with a probability of 0.5.
    """
    frozen = {p.class_name: p.threshold for p in points if p.level == "patient"}
    slides = Counter(f"{item.split} {item.patient}" for item in run.items if item.slide_id in tiles.slides)
    at_slides = {p.class_name: p.threshold for p in points if p.level == "slide"}
    for c in model.targets:
        name = model.classes[c]
        for split in (None, "train", FITTED, JUDGED):
            called = Counter(
                patient
                for patient, _, value in slides_of(run, model, tiles, c, split, score if name in at_slides else "max")
                if value >= at_slides.get(name, 0.0)
            )
            highest = {patient: top for patient, _, top in patients_of(run, model, tiles, c, split)}
            for patient, truth, value in sorted(patients_of(run, model, tiles, c, split, score)):
                yield {
                    "patient_id": patient,
                    "split": split,
                    "model": model.node,
                    "name": model.name,
                    "class": name,
                    "slides": slides[f"{split} {patient}"],
                    "slides_called": called[patient],
                    "slide_without_patient": patient in run.lone,
                    "truth": bool(truth) if truth >= 0 else None,
                    "called": value >= frozen[name] if name in frozen else None,
                    "score": value,
                    "score_max": highest[patient],
                }


def confusion_rows(run: Run, model: Model, calls: Calls) -> Iterator[dict[str, Any]]:
    """Yield the cells of every slide's confusion: by arg max, and of each class at its operating point."""
    for item in run.items:
        for by, table in _confusions(model, calls, item.slide_id):
            for i, true in enumerate(table.classes):
                for j, called in enumerate(table.classes):
                    yield {
                        "slide_id": item.slide_id,
                        "patient_id": item.patient,
                        "split": item.split,
                        "model": model.node,
                        "name": model.name,
                        "by": by,
                        "true": true,
                        "called": called,
                        "tiles": int(table.counts[i, j]),
                    }


def _confusions(model: Model, calls: Calls, slide_id: str) -> Iterator[tuple[str, Any]]:
    if slide_id in calls.confusion:
        yield "argmax", calls.confusion[slide_id]
    counts: Mapping[int, Counts] = calls.counts.get(slide_id, {})
    for c, one in counts.items():
        yield f"operating point of {model.classes[c]}", one.confusion(model.rest(c), model.classes[c])

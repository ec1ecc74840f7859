"""What an evaluation comes to: operating points, results and tables, as operating_points.json and confusion.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field

from slideflow_ray import storage
from slideflow_ray.accounting import run_digest
from slideflow_ray.metrics import MIN_PATIENTS, MIN_SIDE, RATES, Confusion, Interval
from slideflow_ray.specs import Spec

SCHEMA = 1
FITTED, JUDGED = "val", "test"
"""Thresholds come from the first split and are judged on the second."""

Level = Literal["tile", "slide", "patient"]
LEVELS: tuple[Level, ...] = ("tile", "slide", "patient")
Score = Literal["margin", "max", "top10", "area"]
"""What is compared with a threshold: a tile's margin, or a slide's score; a patient's is that of its highest slide."""

Shares = tuple[tuple[float | None, ...], ...]


def with_interval(value: float | None, interval: Interval | None) -> str:
    """Return a rate for reading, with its interval where there is one.

    >>> with_interval(0.91234, (0.85, 0.957)), with_interval(None, None)
    ('0.912 (0.850 to 0.957)', 'not defined')
    """
    if value is None:
        return "not defined"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def defined(value: float) -> float | None:
    """Return a number, or None for NaN, which JSON lacks."""
    return None if math.isnan(value) else float(value)


def patients_text(patients: int, lone: int) -> str:
    """Say how many patients, and how many of them are slides whose patient the cohort does not name.

    >>> patients_text(6, 0), patients_text(6, 2)
    ('6 patients', '6 patients (2 of 6 are slides without patient_id)')
    """
    return f"{patients} patients" + (f" ({lone} of {patients} are slides without patient_id)" if lone else "")


class Matrix(Spec):
    """A confusion in full: true classes as rows; counts, shares of each true class, shares of everything.

    Shares are None where there is nothing to divide by.
    """

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    by_true: Shares
    by_total: Shares

    @classmethod
    def of(cls, confusion: Confusion) -> Self:
        """Take a confusion."""
        by_true, by_total = (
            tuple(tuple(defined(float(value)) for value in row) for row in shares)
            for shares in (confusion.by_true(), confusion.by_total())
        )
        counts = tuple(tuple(int(n) for n in row) for row in confusion.counts)
        return cls(classes=confusion.classes, counts=counts, by_true=by_true, by_total=by_total)


class OperatingPoint(Spec):
    """A threshold, frozen: which rule chose it on which data, and what it came to there.

    Positive when the score (`score` says which) >= threshold. `probability` is the threshold's sigmoid, for
    reading only, and None where the score is no margin. `split` is "none" where the rule fixed the threshold
    and there were no data to see it on. `lone` of the patients are slides without patient_id.
    """

    model: str
    name: str
    level: Level
    class_name: str
    rule: str
    split: str
    threshold: float
    probability: float | None
    positives: int
    negatives: int
    patients: int
    sensitivity: float | None
    specificity: float | None
    profile_digest: str | None
    score: Score = "margin"
    lone: int = 0


class Result(Spec):
    """How one class of one model does on one split and level; rates are None where they are not defined.

    `counts`, `confusion` and the rates are at the operating point, and None where there is none.
    Intervals are 95 %, by resampling patients; `lone` of the patients are slides without patient_id, and
    `no_interval` says why there are too few of them, if there are.
    auc : exact; auc_004 : by the trapezoid rule over the thresholds of source 004. The latter and the expected
    calibration error are None where the score is no margin. unit : what a tile is, where it is an object.
    """

    model: str
    name: str
    level: Level
    class_name: str
    split: str
    positives: int
    negatives: int
    patients: int
    auc: float | None
    auc_interval: Interval | None
    average_precision: float | None
    threshold: float | None
    counts: dict[str, int] | None
    rates: dict[str, float | None]
    sensitivity_interval: Interval | None
    specificity_interval: Interval | None
    confusion: Matrix | None = None
    auc_004: float | None = None
    expected_calibration_error: float | None = None
    score: Score = "margin"
    lone: int = 0
    no_interval: str = ""
    unit: str = ""

    @property
    def what(self) -> str:
        """What is counted, one of it: a tile, a slide, a patient, or an object."""
        return self.unit or self.level

    @property
    def patients_text(self) -> str:
        """How many patients, for reading."""
        return patients_text(self.patients, self.lone)

    @property
    def sentence(self) -> str:
        """The result in one line."""
        parts = [f"AUC {with_interval(self.auc, self.auc_interval)}"]
        if self.counts:
            parts.append(f"sensitivity {with_interval(self.rates['sensitivity'], self.sensitivity_interval)}")
            parts.append(f"specificity {with_interval(self.rates['specificity'], self.specificity_interval)}")
        n = f"{self.positives:,} positive and {self.negatives:,} negative {self.what}s of {self.patients_text}"
        return f"{self.name}, {self.class_name}, {self.split}, by {self.what}: {', '.join(parts)} ({n})"


class Table(Spec):
    """A confusion by arg max over the cohort's tiles: true classes as rows.

    by_true, by_total : shares of each true class and of everything. by_class : each class's rates against the rest.
    """

    model: str
    name: str
    level: Level
    split: str
    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    accuracy: float | None
    balanced_accuracy: float | None
    kappa: float | None
    kappa_interval: Interval | None = None
    by_true: Shares = ()
    by_total: Shares = ()
    by_class: Mapping[str, Mapping[str, float | None]] = Field(default_factory=dict)
    macro_f1: float | None = None
    unit: str = ""

    @property
    def what(self) -> str:
        """What is counted, one of it."""
        return self.unit or self.level

    @classmethod
    def of(cls, confusion: Confusion, **about: Any) -> Self:
        """Take a confusion; `about` are the model, name, level, split and what else is known of it."""
        one = [confusion.one_against_rest(index) for index in range(len(confusion.classes))]
        f1 = [counts.f1 for counts in one if not math.isnan(counts.f1)]
        return cls(
            **about,
            **Matrix.of(confusion).model_dump(),
            accuracy=defined(confusion.accuracy),
            balanced_accuracy=defined(confusion.balanced_accuracy),
            kappa=defined(confusion.kappa),
            by_class={
                name: {rate: defined(getattr(counts, rate)) for rate in RATES}
                for name, counts in zip(confusion.classes, one, strict=True)
            },
            macro_f1=math.fsum(f1) / len(f1) if f1 else None,
        )

    @property
    def confusion(self) -> Confusion:
        """The counts as a Confusion."""
        return Confusion(self.classes, np.array(self.counts, np.int64))


class Called(Spec):
    """What a model called the objects that were found and annotated; true classes as rows of `counts`.

    counts, accuracy, kappa : by the largest probability, None for models of several labels. by_class : each class
    against the rest, counts and rates. missed : annotated objects that were not found, by true class; spurious :
    found ones that nobody annotated, by what they were called. unknown : matched, of no annotated class of the
    model; several : matched, of more classes than one, which a model of one class cannot tell.
    """

    model: str
    name: str
    task: str
    rule: str
    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...] | None
    accuracy: float | None
    accuracy_interval: Interval | None
    balanced_accuracy: float | None
    kappa: float | None
    kappa_interval: Interval | None = None
    by_class: Mapping[str, Mapping[str, float | None]]
    missed: Mapping[str, int]
    spurious: Mapping[str, int]
    unknown: int
    several: int


class Detection(Spec):
    """How the objects of one segmentation compare with the annotated ones of a split; None where not defined.

    matched : one to one, at an IoU of 0.5 or more. dice : of pixels, where outlines are annotated. Intervals are
    95 %, by resampling patients; `lone` of the patients are slides without patient_id. slides_missing : annotated,
    without a result, and in none of these numbers.
    """

    model: str
    name: str
    split: str
    slides: int
    slides_missing: int = 0
    patients: int
    lone: int
    annotated: int
    found: int
    matched: int
    precision: float | None
    recall: float | None
    f1: float | None
    precision_interval: Interval | None
    recall_interval: Interval | None
    f1_interval: Interval | None
    dice: float | None
    dice_interval: Interval | None
    called: tuple[Called, ...] = ()

    @property
    def patients_text(self) -> str:
        """How many patients, for reading."""
        return patients_text(self.patients, self.lone)

    @property
    def sentences(self) -> list[str]:
        """The result, a line for the objects and one for each model on them."""
        f1, dice = with_interval(self.f1, self.f1_interval), with_interval(self.dice, self.dice_interval)
        rates = f"precision {with_interval(self.precision, self.precision_interval)}"
        rates += f", recall {with_interval(self.recall, self.recall_interval)}"
        n = f"{self.matched:,} of {self.annotated:,} annotated and {self.found:,} found objects of {self.patients_text}"
        if self.slides_missing:
            n += f"; without {self.slides_missing:,} annotated slides that have no result"
        lines = [f"{self.name}, {self.split}, by object: F1 {f1}, {rates}, Dice {dice} ({n})"]
        for one in self.called:
            if one.counts is not None:
                right = with_interval(one.accuracy, one.accuracy_interval)
                lines.append(f"{one.name}, {self.split}, of matched objects: accuracy {right}")
        return lines


class Measure(Spec):
    """A number's mean over slides, its deviation over them, and the mean's 95 % interval by resampling patients."""

    mean: float | None
    sd: float | None
    interval: Interval | None
    slides: int


class Overlap(Spec):
    """How one class of a segmentation lies on the annotated one; each number is a mean over the slides of a split.

    nowhere : slides where the class is neither found nor annotated, left out. one_sided : where it is only one of
    both, so that Dice is 0 and there is no distance between boundaries. tolerance_nm : of `boundary_f`.
    """

    model: str
    name: str
    class_name: str
    split: str
    slides: int
    nowhere: int
    one_sided: int
    patients: int
    lone: int
    tolerance_nm: float | None
    dice: Measure
    iou: Measure
    hd95_nm: Measure
    assd_nm: Measure
    boundary_f: Measure

    @property
    def patients_text(self) -> str:
        """How many patients, for reading."""
        return patients_text(self.patients, self.lone)

    @property
    def sentence(self) -> str:
        """The result in one line."""
        dice = with_interval(self.dice.mean, self.dice.interval)
        far = (
            "" if self.hd95_nm.mean is None else f", HD95 {self.hd95_nm.mean:,.0f} nm, ASSD {self.assd_nm.mean:,.1f} nm"
        )
        n = f"mean of {self.dice.slides} slides of {self.patients_text}"
        return f"{self.name}, {self.class_name}, {self.split}, by pixel: Dice {dice}{far} ({n})"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to. `notes` say, in sentences, what was left out or could not be computed.

    detections : of the objects of segmentations, where some are annotated; overlaps : of their pixels.
    labels : the rule by which annotations became labels of tiles. run : the digest of the run it is of.
    """

    points: tuple[OperatingPoint, ...] = ()
    results: tuple[Result, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    labels: str = ""
    run: str = ""
    detections: tuple[Detection, ...] = ()
    overlaps: tuple[Overlap, ...] = ()

    def headline(self, model: str) -> Result | None:
        """Return the result that answers first: test, of the highest level that has an AUC, tiles before nothing."""
        found = [r for r in self.results if r.model == model and r.split == JUDGED and r.auc is not None]
        return min(found, key=lambda r: LEVELS.index(r.level), default=None)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "points": [p.model_dump(mode="json") for p in self.points],
            "results": [r.model_dump(mode="json") for r in self.results],
            "argmax": [t.model_dump(mode="json") for t in self.tables],
            "detection": [d.model_dump(mode="json") for d in self.detections],
            "overlap": [o.model_dump(mode="json") for o in self.overlaps],
            "notes": list(self.notes),
            "labels": self.labels,
            "run": self.run,
            "intervals": f"95 %, percentiles of resampled patients; none below {MIN_PATIENTS} patients, or below "
            f"{MIN_SIDE} with positives or with negatives",
        }

    def summary(self) -> str:
        """Return it in lines for a terminal: each result on test, then the notes."""
        judged = [r.sentence for r in self.results if r.split == JUDGED]
        judged += [o.sentence for o in self.overlaps if o.split == JUDGED]
        judged += [line for d in self.detections if d.split == JUDGED for line in d.sentences]
        return "\n".join([*judged, *self.notes]) or "Nothing was evaluated."


def write_evaluation(out: Path, evaluation: Evaluation) -> None:
    """Write operating_points.json, detection.json and overlap.json (where there is any), confusion.json, atomically.

    Equal evaluations make equal bytes.
    """
    found = evaluation.to_json()
    detection = {"schema": SCHEMA, "run": evaluation.run, "detection": found.pop("detection")}
    if evaluation.detections:
        storage.write_atomic(out / DETECTION[0], storage.to_json(detection))
    overlap = {"schema": SCHEMA, "run": evaluation.run, "overlap": found.pop("overlap")}
    if evaluation.overlaps:
        storage.write_atomic(out / OVERLAP[0], storage.to_json(overlap))
    points = {"schema": SCHEMA, "run": evaluation.run, "points": found.pop("points")}
    storage.write_atomic(out / "operating_points.json", storage.to_json(points))
    storage.write_atomic(out / "confusion.json", storage.to_json({"schema": SCHEMA, **found}))


def read_evaluation(out: Path) -> Evaluation | None:
    """Return what `evaluate` wrote, or None where it has not run yet. Raises ConfigError for a foreign file."""
    points = storage.read_json(out / "operating_points.json")
    confusion = storage.read_json(out / "confusion.json")
    detection = storage.read_json(out / DETECTION[0]) or {"detection": []}
    overlap = storage.read_json(out / OVERLAP[0]) or {"overlap": []}
    if points is None or confusion is None:
        return None
    return Evaluation(
        overlaps=tuple(Overlap.parse(o, OVERLAP[0]) for o in overlap["overlap"]),
        detections=tuple(Detection.parse(d, DETECTION[0]) for d in detection["detection"]),
        points=tuple(OperatingPoint.parse(p, "operating_points.json") for p in points["points"]),
        results=tuple(Result.parse(r, "confusion.json") for r in confusion["results"]),
        tables=tuple(Table.parse(t, "confusion.json") for t in confusion["argmax"]),
        notes=tuple(confusion["notes"]),
        labels=confusion.get("labels", ""),
        run=confusion.get("run", ""),
    )


LESIONS = ("froc.json", "froc.parquet", "detections.parquet", "lesions.parquet", "lesion_slides.parquet")
"""What the evaluation by lesion writes."""

DETECTION = ("detection.json", "detection.parquet", "matches.parquet")
"""What the evaluation of annotated objects writes."""

OVERLAP = ("overlap.json", "overlap.parquet")
"""What the evaluation of annotated pixels writes."""

STALE = "evaluated before the run changed: run `slideflow-ray evaluate {out}` again"


def withdraw(out: Path) -> None:
    """Delete an earlier evaluation's files but its tables, so that none of them stands beside those of another."""
    for name in ("operating_points.json", "confusion.json", *LESIONS, *DETECTION, *OVERLAP):
        (out / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Current:
    """What was evaluated of a run as it is now. `stale` says that it is not, "" where nothing is out of date.

    lesions : froc.json.
    """

    evaluation: Evaluation | None
    lesions: dict[str, Any] | None
    stale: str


def read_current(out: Path, record: Mapping[str, Any]) -> Current:
    """Return the evaluations of the run that `record`, run.json, tells of; those of what it was before are left out.

    One that does not say what it is of, as earlier versions wrote it, is taken for an old one.
    """
    now = run_digest(record)
    names = ("confusion.json", "operating_points.json", "froc.json", DETECTION[0], OVERLAP[0])
    files = {name: storage.read_json(out / name) for name in names}
    old = {name for name, found in files.items() if found is not None and found.get("run") != now}
    return Current(
        evaluation=None if old - {"froc.json"} else read_evaluation(out),
        lesions=None if "froc.json" in old else files["froc.json"],
        stale=STALE.format(out=out) if old else "",
    )

"""What an evaluation comes to: operating points, results and tables, as operating_points.json and confusion.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slideflow_ray import storage
from slideflow_ray.metrics import MIN_PATIENTS, Confusion, Interval
from slideflow_ray.specs import Spec

SCHEMA = 1
FITTED, JUDGED = "val", "test"
"""Thresholds come from the first split and are judged on the second."""

Level = Literal["tile", "slide", "patient"]
LEVELS: tuple[Level, ...] = ("tile", "slide", "patient")


def with_interval(value: float | None, interval: Interval | None) -> str:
    """Return a rate for reading, with its interval where there is one.

    >>> with_interval(0.91234, (0.85, 0.957)), with_interval(None, None)
    ('0.912 (0.850 to 0.957)', 'not defined')
    """
    if value is None:
        return "not defined"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


class OperatingPoint(Spec):
    """A threshold, frozen: which rule chose it on which data, and what it came to there.

    Positive when margin >= threshold. `probability` is the threshold's sigmoid, for reading only.
    """

    model: str
    name: str
    level: Level
    class_name: str
    rule: str
    split: str
    threshold: float
    probability: float
    positives: int
    negatives: int
    patients: int
    sensitivity: float | None
    specificity: float | None
    profile_digest: str | None


class Result(Spec):
    """How one class of one model does on one split and level; rates are None where they are not defined.

    `counts` and the rates are at the operating point, and None where there is none.
    Intervals are 95 %, by resampling patients.
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

    @property
    def sentence(self) -> str:
        """The result in one line."""
        parts = [f"AUC {with_interval(self.auc, self.auc_interval)}"]
        if self.counts:
            parts.append(f"sensitivity {with_interval(self.rates['sensitivity'], self.sensitivity_interval)}")
            parts.append(f"specificity {with_interval(self.rates['specificity'], self.specificity_interval)}")
        n = f"{self.positives:,} positive and {self.negatives:,} negative {self.level}s of {self.patients} patients"
        return f"{self.name}, {self.class_name}, {self.split}, by {self.level}: {', '.join(parts)} ({n})"


class Table(Spec):
    """A confusion by arg max over the cohort's tiles: true classes as rows."""

    model: str
    name: str
    level: Level
    split: str
    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    accuracy: float | None
    balanced_accuracy: float | None
    kappa: float | None

    @property
    def confusion(self) -> Confusion:
        """The counts as a Confusion."""
        return Confusion(self.classes, np.array(self.counts, np.int64))


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to. `notes` say, in sentences, what was left out or could not be computed."""

    points: tuple[OperatingPoint, ...] = ()
    results: tuple[Result, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()

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
            "notes": list(self.notes),
            "intervals": f"95 %, percentiles of resampled patients; none below {MIN_PATIENTS} patients",
        }

    def summary(self) -> str:
        """Return it in lines for a terminal: each result on test, then the notes."""
        judged = [r for r in self.results if r.split == JUDGED]
        return "\n".join([*(r.sentence for r in judged), *self.notes]) or "Nothing was evaluated."


def write_evaluation(out: Path, evaluation: Evaluation) -> None:
    """Write operating_points.json and confusion.json, each atomically; equal evaluations make equal bytes."""
    found = evaluation.to_json()
    points = {"schema": SCHEMA, "points": found.pop("points")}
    storage.write_atomic(out / "operating_points.json", storage.to_json(points))
    storage.write_atomic(out / "confusion.json", storage.to_json({"schema": SCHEMA, **found}))


def read_evaluation(out: Path) -> Evaluation | None:
    """Return what `evaluate` wrote, or None where it has not run yet. Raises ConfigError for a foreign file."""
    points = storage.read_json(out / "operating_points.json")
    confusion = storage.read_json(out / "confusion.json")
    if points is None or confusion is None:
        return None
    return Evaluation(
        points=tuple(OperatingPoint.parse(p, "operating_points.json") for p in points["points"]),
        results=tuple(Result.parse(r, "confusion.json") for r in confusion["results"]),
        tables=tuple(Table.parse(t, "confusion.json") for t in confusion["argmax"]),
        notes=tuple(confusion["notes"]),
    )

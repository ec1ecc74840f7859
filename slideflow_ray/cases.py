"""What is judged: a run's models, the committed scores, their labels, and the cases of a level, class and split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from slideflow_ray import accounting, aggregate
from slideflow_ray.aggregate import Part, Scheduler, Sides, SlideScore, Tiles
from slideflow_ray.annotations import class_of, classes_of, label_slide
from slideflow_ray.cohort import Item
from slideflow_ray.errors import AnnotationError, ConfigError
from slideflow_ray.metrics import (
    BINS,
    Ints,
    Reliability,
    Roc,
    Sparse,
    auc,
    exact_roc,
    no_interval,
    rank_auc,
    ranked,
    roc,
    together,
)
from slideflow_ray.results import FITTED, JUDGED, Level, Score
from slideflow_ray.specs import OBJECTS, LabelSpec, RunSpec

EXACT_TILES = 20_000_000
"""Up to so many tiles an AUC is computed from the margins themselves: 80 MB for each class."""

EXACT_CURVE = 1_000_000
"""Up to so many tiles curves and the average precision are of the margins themselves: 20 bytes for each."""

Cases = dict[str, tuple[Sparse, Sparse]]
"""patient -> (positives' scores, negatives' scores)."""


@dataclass(frozen=True)
class Model:
    """A scored model, as run.json names it. `unit` is "object" where it ran on objects, which are its tiles."""

    node: str
    name: str
    task: str
    classes: tuple[str, ...]
    unit: str = ""

    @property
    def targets(self) -> tuple[int, ...]:
        """Classes that are told from the rest: of two only the second, as the first is its mirror."""
        both = self.task == "classify" and len(self.classes) == 2
        return (1,) if both else tuple(range(len(self.classes)))

    @property
    def argmax(self) -> bool:
        """Whether a table by arg max says more than the operating point."""
        return self.task == "classify" and len(self.classes) > 2

    def rest(self, index: int) -> str:
        """Return the name of what is not of a class."""
        both = self.task == "classify" and len(self.classes) == 2
        return self.classes[1 - index] if both else f"not {self.classes[index]}"


@dataclass(frozen=True)
class Run:
    """What run.json says; `digest` is that of `accounting.run_digest`, `known` the classes of all its models."""

    out: Path
    items: tuple[Item, ...]
    outcomes: Mapping[str, Mapping[str, Any]]
    models: tuple[Model, ...]
    labels: LabelSpec
    profile_digest: str | None
    scheduler: Scheduler
    digest: str = ""
    known: tuple[str, ...] = ()

    @cached_property
    def identities(self) -> dict[str, str]:
        """slide_id -> what the file is, as the run saw it."""
        return {slide: o["identity"] for slide, o in self.outcomes.items() if o.get("identity")}

    @cached_property
    def lone(self) -> frozenset[str]:
        """The patients that are slides whose patient the cohort does not name."""
        return frozenset(item.slide_id for item in self.items if not item.patient_id)


# read


def read_run(
    out: Path,
    names: Mapping[str, str] | None = None,
    scheduler: Scheduler | None = None,
    labels: str | None = None,
) -> Run:
    """Read run.json; `labels` is another rule for labels of tiles than the run's: centre, or fraction=0.75.

    Raises ConfigError where there is none, the run has not ended, or a name is mapped to what is no class.
    """
    record = accounting.read_run(out)
    if not record["finished"]:
        raise ConfigError(f"The run in {out} has not ended.", next_step="Run the same command again: it resumes.")
    spec = RunSpec.parse(record["spec"], f"{out / 'run.json'}, spec")
    update: dict[str, Any] = {"names": {**spec.labels.names, **(names or {})}}
    every = [
        Model(m["node"], m["name"], m["task"], tuple(m["classes"]), "object" if m["on"].startswith(OBJECTS) else "")
        for m in record["models"]
    ]
    models = tuple(model for model in every if model.task in ("classify", "multilabel"))
    _check_names(update["names"], [model for model in every if model.classes])
    return Run(
        out=out,
        items=tuple(Item.parse(row, f"{out / 'run.json'}, items") for row in record["items"]),
        outcomes=record["outcomes"],
        models=models,
        labels=spec.labels.model_copy(update=update | (label_rule(labels) if labels else {})),
        profile_digest=record["profile_digest"],
        scheduler=scheduler or spec.dask,
        digest=accounting.run_digest(record),
        known=tuple(dict.fromkeys(name for model in every for name in model.classes)),
    )


def _check_names(names: Mapping[str, str], models: Sequence[Model]) -> None:
    """Raise ConfigError for a name that is mapped to a class of none of the models."""
    for name, meant in names.items():
        if models and not any(class_of(meant, model.classes) for model in models):
            known = "; ".join(f"{model.name} has {', '.join(model.classes)}" for model in models)
            raise ConfigError(
                f"The name {name!r} is mapped to {meant!r}, which is no class of {', '.join(m.name for m in models)}.",
                next_step=f"Map it to a class: {known}.",
            )


def label_rule(text: str) -> dict[str, Any]:
    """Return the settings that `centre` or `fraction=0.75` names. Raises ConfigError.

    >>> label_rule("fraction=0.5")
    {'rule': 'fraction', 'fraction': 0.5}
    """
    rule, equals, value = text.partition("=")
    values: dict[str, Any] = {"rule": rule} | ({"fraction": value} if equals else {})
    if rule == "centre" and equals:
        raise ConfigError(f"{text!r}: centre takes no value.")
    return LabelSpec.parse(values, f"labels {text!r}").model_dump(include=set(values))


def label_text(spec: LabelSpec) -> str:
    """Return a rule for labels as it is recorded."""
    return spec.rule if spec.rule == "centre" else f"fraction={spec.fraction:g}"


def parts_of(run: Run, model: Model) -> list[Part]:
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
    others = tuple(sorted({name.casefold() for name in run.known} - {name.casefold() for name in model.classes}))
    label = partial(_label, items=items, model=model, spec=run.labels, others=others)
    tiled = [part for part in parts if not part.pack]
    found, errors = aggregate.over_slides(label, tiled, _merge_labels, run.scheduler)
    if errors:
        shown = "\n".join(error.message for error in errors[:5])
        more = f"\n... and {len(errors) - 5} more." if len(errors) > 5 else ""
        raise AnnotationError(shown + more, next_step=errors[0].step)
    labelled = [found.get(part.slide_id, part) for part in parts if not part.pack]
    return labelled + [_whole(part, items[part.slide_id], model, run.labels.names) for part in parts if part.pack]


def _whole(part: Part, item: Item, model: Model, names: Mapping[str, str]) -> Part:
    """An image in one piece has the cohort's label."""
    truth = tuple(truth_of(item, model, c, names) for c in range(len(model.classes)))
    return replace(part, whole=truth if max(truth) >= 0 else None)


_Labelled = tuple[dict[str, Part], list[AnnotationError]]


def _merge_labels(several: Sequence[_Labelled]) -> _Labelled:
    return {k: v for found, _ in several for k, v in found.items()}, [e for _, errors in several for e in errors]


def _label(part: Part, items: Mapping[str, Item], model: Model, spec: LabelSpec, others: tuple[str, ...]) -> _Labelled:
    try:
        node = label_slide(part.store, part.grid, items[part.slide_id], model.classes, spec, model.task, others)
    except AnnotationError as error:
        return {}, [error]
    if node is None:
        return {}, []
    areas = part.store.node_attrs(node).get("annotated_um2") or {}
    annotated = tuple((name, float(both[0]), float(both[1])) for name, both in areas.items())
    return {part.slide_id: replace(part, labels=node, annotated=annotated)}, []


def truth_of(item: Item, model: Model, index: int, names: Mapping[str, str]) -> int:
    """Return whether a slide is of a class, by the cohort's label: 1, 0, or -1 where that is not known.

    A label that is no class of the model says nothing to a classify model, and "not this
    class" to a multilabel one. One that names several classes ("FSG+CGN") is all of them to a
    multilabel model, and has no single truth for a classify one.
    """
    if item.label is None:
        return -1
    if model.task == "multilabel":
        return int(model.classes[index] in classes_of(item.label, model.classes, names))
    meant = class_of(item.label, model.classes, names)
    return -1 if meant is None else int(meant == model.classes[index])


# scores of slides and patients


def slides_of(
    run: Run, model: Model, tiles: Tiles, c: int, split: str | None, score: SlideScore = "max"
) -> Iterator[tuple[str, int, float]]:
    """Yield (patient, truth, score) of every scored slide of a split."""
    for item in run.items:
        if item.split == split and item.slide_id in tiles.slides:
            yield item.patient, truth_of(item, model, c, run.labels.names), tiles.slides[item.slide_id].score(score)[c]


def patients_of(
    run: Run, model: Model, tiles: Tiles, c: int, split: str | None, score: SlideScore = "max"
) -> Iterator[tuple[str, int, float]]:
    """Yield (patient, truth, score) of every patient with a scored slide in a split.

    A patient's score is that of its highest slide; a patient is positive when a slide is,
    and negative when all its slides are known to be.
    """
    slides: dict[str, list[tuple[int, float]]] = {}
    for patient, truth, value in slides_of(run, model, tiles, c, split, score):
        slides.setdefault(patient, []).append((truth, value))
    for patient, rows in slides.items():
        truths = {truth for truth, _ in rows}
        yield patient, 1 if 1 in truths else min(truths), max(value for _, value in rows)


# what is judged at once


@dataclass(frozen=True, eq=False)
class Judged:
    """The labelled cases of one level, class and split.

    cases : scores by patient, binned. sides : the scores themselves, float32, positives' and negatives'; None
    where there are too many tiles to hold. scores : the same by patient, of slides and patients; None of tiles.
    reliability : None where the score is no margin.
    """

    level: Level
    index: int
    split: str
    score: Score
    cases: Cases
    sides: Sides | None
    reliability: Reliability | None
    scores: Mapping[str, Sides] | None = None

    @cached_property
    def dense(self) -> tuple[Ints, Ints]:
        """Histograms of positives and negatives."""
        return together(pos for pos, _ in self.cases.values()), together(neg for _, neg in self.cases.values())

    @cached_property
    def exact(self) -> Roc:
        """The ROC of the scores themselves, or of their bins where they are too many."""
        few = self.sides is not None and sum(map(len, self.sides)) <= EXACT_CURVE
        return exact_roc(*self.sides) if self.sides and few else roc(*self.dense)

    @property
    def curve(self) -> Roc:
        """The ROC for tables: exact up to 65,536 thresholds, by bins beyond."""
        return self.exact if len(self.exact.thresholds) <= BINS else roc(*self.dense)

    @property
    def auc(self) -> float:
        """The AUC of the scores themselves, as scikit-learn's; by bins where they are not held."""
        return rank_auc(*self.sides) if self.sides else auc(*self.dense)

    @property
    def by_patient(self) -> tuple[list[Sparse], list[Sparse]]:
        """Each patient's positives and negatives for intervals: scores themselves of slides and patients, else bins."""
        if self.scores is not None:
            return ranked([pos for pos, _ in self.scores.values()], [neg for _, neg in self.scores.values()])
        return [pos for pos, _ in self.cases.values()], [neg for _, neg in self.cases.values()]

    @property
    def no_interval(self) -> str:
        """Why an AUC has no interval, as far as the patients are to blame."""
        sides = [sum(both[i].total > 0 for both in self.cases.values()) for i in (0, 1)]
        return no_interval(len(self.cases), sides[0], sides[1])


Margins = Mapping[str, Mapping[int, Sides]]
"""split -> class -> the margins themselves."""


def margins_of(run: Run, model: Model, parts: Sequence[Part], tiles: Tiles) -> Margins:
    """The margins themselves by split, for an exact AUC; nothing where they are too many to hold."""
    if sum(scores.tiles for scores in tiles.slides.values()) > EXACT_TILES:
        return {}
    of = {item.slide_id: item.split for item in run.items}
    return {
        split: aggregate.read_margins([p for p in parts if of[p.slide_id] == split], model.targets, run.scheduler)
        for split in (FITTED, JUDGED)
    }


def tiles_judged(run: Run, tiles: Tiles, margins: Margins, c: int, split: str) -> Judged:
    """Return the labelled tiles of a split."""
    patients = sorted({item.patient for item in run.items if item.split == split} & set(tiles.histograms))
    known = {p: tiles.histograms[p][c] for p in patients}
    cases = {p: sides for p, sides in known.items() if sides[0].total + sides[1].total}
    spread = sum((tiles.reliability[p][c] for p in cases), Reliability.empty())
    return Judged("tile", c, split, "margin", cases, margins[split][c] if margins else None, spread)


def slides_judged(
    run: Run, model: Model, tiles: Tiles, level: Level, c: int, split: str, score: SlideScore = "max"
) -> Judged:
    """Return the slides, or patients, of a split whose truth is known, by the cohort's label."""
    rows = patients_of if level == "patient" else slides_of
    known = sorted(row for row in rows(run, model, tiles, c, split, score) if row[1] >= 0)
    by_patient: dict[str, tuple[list[float], list[float]]] = {}
    for patient, truth, value in known:
        by_patient.setdefault(patient, ([], []))[1 - truth].append(value)
    scores = {p: (np.array(pos, np.float32), np.array(neg, np.float32)) for p, (pos, neg) in by_patient.items()}
    cases = {patient: (Sparse.of(pos), Sparse.of(neg)) for patient, (pos, neg) in scores.items()}
    none = np.empty(0, np.float32)
    above, below = (np.concatenate([none, *(sides[i] for sides in scores.values())]) for i in (0, 1))
    spread = Reliability.of(aggregate.probability(above), aggregate.probability(below)) if score != "area" else None
    return Judged(level, c, split, score, cases, (above, below), spread, scores)

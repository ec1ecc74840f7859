"""A segmentation and the models on its objects: what a run found and called, as objects.parquet and counts.parquet."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slideflow_ray import accounting, aggregate
from slideflow_ray.aggregate import Scheduler
from slideflow_ray.cohort import Item
from slideflow_ray.counts import SlideCount, count_columns, count_rows, counted
from slideflow_ray.errors import SlideflowError
from slideflow_ray.planes import Objects, check_classes, objects_node, read_objects
from slideflow_ray.results import OperatingPoint, read_current
from slideflow_ray.specs import OBJECTS, CountSpec, ObjectSpec, RunSpec
from slideflow_ray.store import SlideStore
from slideflow_ray.tables import Columns, write_table

SPACE = uuid.UUID("8f1f6f0e-6a55-5b1c-9d6a-2f6d0c7a51a4")
"""The namespace of ids: the same object of the same run has the same id in every table and export."""

TABLES = ("objects.parquet", "counts.parquet")

Floats = npt.NDArray[np.float32]


def stable_id(slide_id: str, grid: str, node: str, key: str) -> str:
    """Return the id of one thing in one slide's results, the same wherever it is named."""
    return str(uuid.uuid5(SPACE, "/".join([slide_id, grid, node, key])))


@dataclass(frozen=True)
class Judge:
    """A model that ran on objects; `name` tells it apart, `thresholds` are its operating points by class."""

    name: str
    node: str
    task: str
    classes: tuple[str, ...]
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def called(self, margins: Floats) -> npt.NDArray[np.bool_]:
        """Return which classes each object is called, bool (N, C), of margins float32 (N, C).

        classify : the largest margin alone. multilabel : every class with margin >= its operating point, or a
        probability of 0.5 where there is none; so none of them, or several.
        """
        if self.task == "multilabel":
            at = np.array([self.thresholds.get(name, 0.0) for name in self.classes], np.float32)
            return np.asarray(margins >= at)
        return np.asarray(np.arange(len(self.classes)) == margins.argmax(axis=1)[:, None])

    def text(self, called: npt.NDArray[np.bool_]) -> list[str]:
        """Return the classes of each row, joined by "+"; "" for none."""
        return ["+".join(name for name, is_so in zip(self.classes, row, strict=True) if is_so) for row in called]

    @property
    def rule(self) -> str:
        """How a class is called, in words."""
        if self.task == "classify":
            return "by the largest probability"
        some = [name for name in self.classes if name in self.thresholds]
        if not some:
            return "each class at a probability of 0.5 or more, as there is no operating point"
        rest = "" if len(some) == len(self.classes) else "; 0.5 where there is none"
        return f"each class at its operating point from validation{rest}"


@dataclass(frozen=True)
class Cascade:
    """A segmentation of a run, `found` the classes that make objects, and the models that ran on its objects."""

    name: str
    node: str
    classes: tuple[str, ...]
    found: tuple[str, ...]
    spec: ObjectSpec
    where: Mapping[str, str]
    judges: tuple[Judge, ...] = ()

    def on(self, item: Item) -> bool:
        """Whether the run sends an item to the segmentation."""
        return all(getattr(item, column) == value for column, value in self.where.items())

    @property
    def keys(self) -> list[str]:
        """What is counted: each class of each model, and those of a segmentation that tells several apart."""
        own = [f"{self.name}_{name}" for name in self.found] if len(self.found) > 1 else []
        return own + [f"{judge.name}_{name}" for judge in self.judges for name in judge.classes]


def cascades(record: Mapping[str, Any], points: Sequence[OperatingPoint] = ()) -> tuple[Cascade, ...]:
    """Return the segmentations of run.json, each with the models on its objects.

    points : operating points of an evaluation of this run; a model keeps those by tile, an object being its tile.
    """
    specs = RunSpec.parse(record["spec"], "run.json, spec").model
    names = Counter(model["name"] for model in record["models"])
    judges: dict[str, list[Judge]] = {}
    for model in record["models"]:
        if model["on"].startswith(OBJECTS) and model["task"] in ("classify", "multilabel"):
            at = {p.class_name: p.threshold for p in points if (p.model, p.level) == (model["node"], "tile")}
            name = model["name"] if names[model["name"]] == 1 else model["node"]
            judge = Judge(name, model["node"], model["task"], tuple(model["classes"]), at)
            judges.setdefault(model["on"].removeprefix(OBJECTS), []).append(judge)
    return tuple(
        Cascade(
            name=model["name"],
            node=model["node"],
            classes=tuple(model["classes"]),
            found=tuple(model["classes"][i] for i in check_classes(spec.objects, model["classes"])),
            spec=spec.objects,
            where=spec.where,
            judges=tuple(judges.get(model["name"], ())),
        )
        for model, spec in zip(record["models"], specs, strict=True)
        if model["task"] == "segment"
    )


# what was found on a slide


@dataclass(frozen=True, eq=False)
class Found:
    """The objects of one segmentation on one slide; `margins` and `grids` of the models on them, by their name."""

    item: Item
    cascade: Cascade
    grid: str
    objects: Objects | None
    margins: Mapping[str, Floats] = field(default_factory=dict)
    grids: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return 0 if self.objects is None else len(self.objects)


def without_objects(
    out: Path, items: Iterable[Item], outcomes: Mapping[str, Mapping[str, Any]], cascade: Cascade
) -> int:
    """Return on how many slides a segmentation ran, where it found no object on any of them; 0 where it found some.

    Raises StoreError, CorruptStore.
    """
    slides = 0
    for item in items:
        found = read_found(out, item, outcomes.get(item.slide_id, {}), cascade)
        if found is not None and len(found):
            return 0
        slides += found is not None
    return slides


def read_found(out: Path, item: Item, outcome: Mapping[str, Any], cascade: Cascade) -> Found | None:
    """Return what a segmentation found on a slide; None where it did not run or the slide is not done.

    A slide without tissue has no object. Raises StoreError, CorruptStore.
    """
    if outcome.get("status") != "done" or outcome.get("pack") or not cascade.on(item):
        return None
    pairs = [(grid, node) for grid, node in outcome["grids"]]
    grid = next((grid for grid, node in pairs if node == cascade.node), "")
    if not grid:
        return Found(item, cascade, "", None) if outcome["laid"] else None
    store = SlideStore(out, item.slide_id)
    laid = store.committed(f"grids/{grid}")
    if laid is not None and laid.outcome == "no_tissue":
        return Found(item, cascade, "", None)
    objects = read_objects(store, objects_node(grid, cascade.node, cascade.spec))
    if not len(objects):
        return Found(item, cascade, grid, None)
    grids = {judge.name: place for judge in cascade.judges for place, node in pairs if node == judge.node}
    of = {judge.name: judge.node for judge in cascade.judges}
    margins = {name: store.read(f"scores/{place}/{of[name]}") for name, place in grids.items()}
    return Found(item, cascade, grid, objects, margins, grids)


def object_columns(of: Sequence[Cascade]) -> Columns:
    """Return the columns of objects.parquet; three for each class of each model on objects."""
    text = ("slide_id", "patient_id", "split", "stain", "section", "scanner", "segmentation")
    columns: dict[str, Any] = dict.fromkeys(text, "text")
    columns |= {"object": "int", "id": "text", **dict.fromkeys(("minx", "miny", "width", "height"), "int")}
    columns |= {"x_px0": "float", "y_px0": "float", "area_um2": "float", "touches_edge": "bool"}
    columns |= {"found": "text", "class": "text", "probability": "float32"}
    for judge in (judge for cascade in of for judge in cascade.judges):
        columns[f"called_{judge.name}"] = "text"
        columns |= {f"{what}_{judge.name}_{name}": "float32" for what in ("prob", "margin") for name in judge.classes}
    return columns


def object_rows(found: Found) -> Iterator[dict[str, Any]]:
    """Yield one row per object, in the order of the store; `class` is what the first model on them called it.

    found : the segmentation's own class. probability : of the class, of several the highest; null without a model.
    """
    if found.objects is None:
        return
    item, objects = found.item, found.objects
    said = _said(found)
    boxes = objects.box_px0.tolist()
    for row, (x, y, w, h) in enumerate(boxes):
        yield {
            "slide_id": item.slide_id,
            "patient_id": item.patient,
            "split": item.split,
            "stain": item.stain,
            "section": item.section,
            "scanner": item.scanner,
            "segmentation": found.cascade.name,
            "object": row,
            "id": stable_id(item.slide_id, found.grid, found.cascade.node, f"object {row}"),
            "minx": x,
            "miny": y,
            "width": w,
            "height": h,
            "x_px0": float(objects.centroid_px0[row, 0]),
            "y_px0": float(objects.centroid_px0[row, 1]),
            "area_um2": float(objects.area_um2[row]),
            "touches_edge": bool(objects.touches_edge[row]),
            "found": objects.classes[objects.class_index[row]],
            **{name: values[row] for name, values in said.items()},
        }


def _said(found: Found) -> dict[str, list[Any]]:
    """What the models on the objects say, by column."""
    columns: dict[str, list[Any]] = {}
    for judge in (judge for judge in found.cascade.judges if judge.name in found.margins):
        margins = found.margins[judge.name]
        probabilities, called = aggregate.probability(margins), judge.called(margins)
        texts = judge.text(called)
        if "class" not in columns:
            columns |= {"class": list(texts), "probability": told(probabilities, called).tolist()}
        columns[f"called_{judge.name}"] = list(texts)
        for c, name in enumerate(judge.classes):
            columns[f"prob_{judge.name}_{name}"] = probabilities[:, c].tolist()
            columns[f"margin_{judge.name}_{name}"] = margins[:, c].tolist()
    return columns


def told(probabilities: Floats, called: npt.NDArray[np.bool_]) -> Floats:
    """Return the probability of what each object is called, float32 (N,): of several classes the highest.

    Where none is called, it is the highest of those that were not.
    """
    some = called | ~called.any(axis=1, keepdims=True)
    return np.asarray(np.where(some, probabilities, -np.inf).max(axis=1), np.float32)


def slide_count(item: Item, cascade: Cascade, found: Found | None, spec: CountSpec) -> SlideCount:
    """Return how many objects there are and what they were called; of a slide without a result that it has none."""
    said = list(_calls(found)) if found is not None else []
    wanted = {name.casefold() for name in spec.global_sclerosis}
    sclerosed = [called for _, name, called in said if name.casefold() in wanted]
    objects = found.objects if found is not None else None
    return SlideCount(
        slide_id=item.slide_id,
        patient_id=item.patient,
        segmentation=cascade.name,
        objects=None if found is None else len(found),
        at_edge=int(objects.touches_edge.sum()) if objects is not None else 0,
        called={key: int(called.sum()) for key, _, called in said},
        sclerosed=int(np.any(sclerosed, axis=0).sum()) if sclerosed else None,
        stain=item.stain,
        section=item.section,
        scanner=item.scanner,
        split=item.split,
        lone=not item.patient_id,
        judged=found is not None and bool(found.margins),
    )


def _calls(found: Found) -> Iterator[tuple[str, str, npt.NDArray[np.bool_]]]:
    """Yield what is counted: key, class, and which objects are of it, bool (N,); nothing of models that did not run."""
    cascade, n = found.cascade, len(found)
    if len(cascade.found) > 1:
        index = found.objects.class_index if found.objects is not None else np.empty(0, np.uint8)
        for name in cascade.found:
            yield f"{cascade.name}_{name}", name, index == cascade.classes.index(name)
    for judge in cascade.judges:
        if judge.name not in found.margins and n:
            continue
        called = judge.called(found.margins[judge.name]) if n else np.zeros((0, len(judge.classes)), np.bool_)
        for c, name in enumerate(judge.classes):
            yield f"{judge.name}_{name}", name, called[:, c]


# the tables of a run


Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Tables:
    """objects.parquet and counts.parquet: their columns and rows; `unread` are slides whose stores are damaged."""

    columns: tuple[Columns, Columns]
    objects: Rows
    counts: Rows
    unread: tuple[str, ...] = ()


def read_tables(out: Path, record: Mapping[str, Any], scheduler: Scheduler = "threads") -> Tables | None:
    """Return the tables of a run's objects, in the cohort's order; None without a segmentation.

    Operating points are those of the run's evaluation, where it is of the run as it is now.
    """
    current = read_current(out, record).evaluation
    of = cascades(record, current.points if current else ())
    if not of:
        return None
    items = [Item.parse(row, "run.json") for row in record["items"]]
    spec = RunSpec.parse(record["spec"], "run.json, spec").counts
    work = [(item, record["outcomes"].get(item.slide_id, {}), cascade) for cascade in of for item in items]
    read = partial(_read, out=out, spec=spec)
    by_key = aggregate.over_slides(read, work, _merged, scheduler)
    slides: list[SlideCount] = []
    objects: Rows = []
    for item, outcome, cascade in work:
        rows, one, _ = by_key[cascade.name, item.slide_id]
        objects += rows
        if one.objects is not None or (cascade.on(item) and not outcome.get("pack")):
            slides.append(one)
    keys = list(dict.fromkeys(key for cascade in of for key in cascade.keys))
    unread = tuple(dict.fromkeys(slide_id for (_, slide_id), (_, _, broken) in by_key.items() if broken))
    counts = list(count_rows(counted(slides), spec))
    return Tables((object_columns(of), count_columns(keys)), objects, counts, unread)


_Read = dict[tuple[str, str], tuple[Rows, SlideCount, bool]]


def _read(work: tuple[Item, Mapping[str, Any], Cascade], out: Path, spec: CountSpec) -> _Read:
    item, outcome, cascade = work
    found, broken = None, False
    try:
        found = read_found(out, item, outcome, cascade)
    except SlideflowError:  # `verify` says what is broken; the slide counts as one without a result
        broken = True
    rows = list(object_rows(found)) if found is not None else []
    return {(cascade.name, item.slide_id): (rows, slide_count(item, cascade, found, spec), broken)}


def _merged(several: Sequence[_Read]) -> _Read:
    return {key: value for one in several for key, value in one.items()}


def write_tables(out: Path, scheduler: Scheduler = "threads") -> None:
    """Write objects.parquet and counts.parquet of a run that has ended, or take them away without a segmentation."""
    tables = read_tables(out, accounting.read_run(out), scheduler)
    for name in TABLES if tables is None else ():
        (out / name).unlink(missing_ok=True)
    if tables is not None:
        for name, columns, rows in zip(TABLES, tables.columns, (tables.objects, tables.counts), strict=True):
            write_table(out / name, columns, rows)

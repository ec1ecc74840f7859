"""The objects of a run in its report: counts by patient, thumbnails by class, how they compare with annotations."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from slideflow_ray.cascade import Cascade, cascades
from slideflow_ray.cohort import Item
from slideflow_ray.errors import SlideflowError
from slideflow_ray.explain import read_explanations
from slideflow_ray.results import JUDGED, Detection, Evaluation
from slideflow_ray.slides import SlideReader, open_slide
from slideflow_ray.store import SlideStore
from slideflow_ray.tables import read_table

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b0a000")
"""Colours of classes (M. Okabe and K. Ito, 2008; the yellow darker), over and over; no class is a background here."""

THUMB_PX = 80
THUMBS = 600
"""Thumbnails of one report, about 2.5 KB each."""
PER_CLASS = 120
LEAST = 12
"""So many of a class are shown however many classes there are."""
PATIENTS = 300
"""Patients whose counts are listed; counts.parquet has them all."""
MARGIN = 0.15
"""Of a box's longer side, around an object that is read from its slide."""

AT_ONCE = 512
"""Tiles of a slide that are read together; of more, those that are shown one by one."""

Rgb = npt.NDArray[np.uint8]
Row = dict[str, Any]


def objects_page(
    out: Path, record: Mapping[str, Any], found: Evaluation, layers: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return what the report shows of each segmentation's objects; nothing where the tables are not there yet.

    layers : nodes of segmentations of layers, whose objects are pieces of no meaning: shown only if a model judges them
    """
    of = [cascade for cascade in cascades(record, found.points) if cascade.judges or cascade.node not in layers]
    try:
        objects, counts = (read_table(out / f"{name}.parquet") if of else [] for name in ("objects", "counts"))
    except FileNotFoundError:
        return []
    adequate = record["spec"].get("counts", {}).get("adequate", 10)
    items = {row["slide_id"]: row for row in record["items"]}
    pages = []
    for cascade in of:
        mine = [row for row in objects if row["segmentation"] == cascade.name]
        budget = _Budget(out, record, cascade, items, THUMBS // len(of))
        pages.append(
            {
                "name": cascade.name,
                "total": len(mine),
                "adequate": adequate,
                "parts": _parts(cascade),
                "sclerosis": _sclerosis(counts, cascade),
                **_patients(counts, cascade),
                "groups": list(_groups(mine, cascade, budget)),
                "detections": [d for d in found.detections if d.model == cascade.node],
                "tables": [t for d in found.detections if d.model == cascade.node for t in _tables(d)],
            }
        )
    return pages


EXPLAINED, MAP_PX = 12, 256
"""Images of each model whose maps are in the report, and the height of their pictures at most."""


def explained_page(out: Path) -> list[dict[str, Any]]:
    """Return what the report shows of each model's explanations: image by image, its maps; nothing without any."""
    pages = []
    for one in read_explanations(out):
        images: dict[tuple[str, int], list[Row]] = {}
        for row in one["maps"]:
            images.setdefault((row["slide_id"], row["row"]), []).append(row)
        shown = [
            {**rows[0], "maps": [{"map": row["map"], "pixels": _map(one["folder"] / row["picture"])} for row in rows]}
            for rows in list(images.values())[:EXPLAINED]
        ]
        folder = one["folder"].relative_to(out)
        pages.append({"model": one["model"], "images": shown, "left": len(images) - len(shown), "folder": str(folder)})
    return pages


def _map(path: Path) -> Rgb:
    with Image.open(path) as image:
        high = min(image.height, MAP_PX)
        size = image.width * high // image.height, high
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))


# counts


def _parts(cascade: Cascade) -> list[dict[str, Any]]:
    """What tells objects apart: each model on them, and the segmentation itself where it has several classes.

    Each with its rule and its classes: their key in counts.parquet, name and colour. One without classes if none does.
    """
    parts = [{"name": j.name, "rule": j.rule, "heads": _heads(j.name, j.classes)} for j in cascade.judges]
    if len(cascade.found) > 1:
        rule = "by the segmentation"
        parts.append({"name": cascade.name, "rule": rule, "heads": _heads(cascade.name, cascade.found)})
    return parts or [{"name": "", "rule": "", "heads": []}]


def _heads(model: str, classes: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"key": f"{model}_{name}", "name": name, "colour": COLOURS[i % len(COLOURS)]} for i, name in enumerate(classes)
    ]


def _sclerosis(counts: Sequence[Row], cascade: Cascade) -> bool:
    """Whether a model tells global sclerosis."""
    return any(row["global_sclerosis"] is not None for row in counts if row["segmentation"] == cascade.name)


def _patients(counts: Sequence[Row], cascade: Cascade) -> dict[str, Any]:
    """Each patient's row, and those of its sections where there are several; patients in the cohort's order."""
    mine = [row for row in counts if row["segmentation"] == cascade.name]
    sections: dict[str, list[Row]] = {}
    for row in mine:
        if row["level"] == "section":
            sections.setdefault(row["patient_id"], []).append(row)
    patients = [row for row in mine if row["level"] == "patient"]
    shown = [{"patient": row, "sections": _beside(row, sections[row["patient_id"]])} for row in patients[:PATIENTS]]
    return {
        "patients": shown,
        "patients_left": max(0, len(patients) - PATIENTS),
        "inadequate": sum(bool(row["inadequate"]) for row in patients),
        "many": sum(bool(row["slides"]) for row in patients),
        "lost": sum(not row["slides"] for row in patients),
    }


def _beside(patient: Row, sections: Sequence[Row]) -> list[Row]:
    """A patient's sections but the one that counts."""
    return [row for row in sections if row["slide_id"] != patient["slide_id"]]


# detection


def _tables(result: Detection) -> Iterator[dict[str, Any]]:
    """What a model called the matched objects of test, with those that have no partner."""
    known = [one for one in result.called if result.matched > one.unknown] if result.split == JUDGED else []
    for one in known:
        yield {
            "called": one,
            "rows": [
                {"name": name, "cells": list(_cells(one.counts[i])), "missed": one.missed[name]}
                for i, name in enumerate(one.classes)
            ]
            if one.counts is not None
            else [],
        }


def _cells(counts: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Each count with its share of the row."""
    total = sum(counts)
    return ((n, n / total if total else 0.0) for n in counts)


# thumbnails


@dataclass
class _Budget:
    """Where pixels come from, and how many thumbnails may still be made."""

    out: Path
    record: Mapping[str, Any]
    cascade: Cascade
    items: Mapping[str, Row]
    thumbs: int

    def pixels(self, rows: Sequence[Row]) -> dict[tuple[str, int], Rgb]:
        """Read objects as squares, slide by slide; what cannot be read is left out."""
        by_slide: dict[str, list[int]] = {}
        for row in rows:
            by_slide.setdefault(row["slide_id"], []).append(row["object"])
        boxes = {(row["slide_id"], row["object"]): _square(row) for row in rows}
        found: dict[tuple[str, int], Rgb] = {}
        for slide_id, numbers in by_slide.items():
            kept = self._kept(slide_id, numbers)
            found |= {(slide_id, n): tile for n, tile in kept.items()}
            if lost := [n for n in numbers if n not in kept]:
                cut = self._cut(slide_id, {n: boxes[slide_id, n] for n in lost})
                found |= {(slide_id, n): pixels for n, pixels in cut.items()}
        return found

    def _kept(self, slide_id: str, numbers: Sequence[int]) -> dict[int, Rgb]:
        """The tiles that a model on the objects was given, where they were kept; their rows are the objects."""
        nodes = [judge.node for judge in self.cascade.judges]
        pairs = self.record["outcomes"].get(slide_id, {}).get("grids", [])
        grid = next((place for node in nodes for place, model in pairs if model == node), None)
        store = SlideStore(self.out, slide_id)
        if grid is None or not store.has(f"grids/{grid}/tiles/zarr.json"):
            return {}
        first, last = min(numbers), max(numbers) + 1
        try:
            if last - first > AT_ONCE:
                return {n: store.read_rows(f"grids/{grid}/tiles", n, n + 1)[0] for n in numbers}
            tiles = store.read_rows(f"grids/{grid}/tiles", first, last)
            return {n: tiles[n - first] for n in numbers}
        except (SlideflowError, OSError, IndexError):
            return {}

    def _cut(self, slide_id: str, boxes: Mapping[int, tuple[int, int, int]]) -> dict[int, Rgb]:
        try:
            item = Item.parse(self.items[slide_id], "run.json")
            with open_slide(item.uri, mpp=item.mpp, modality=item.modality) as reader:
                return {n: _read_square(reader, box) for n, box in boxes.items()}
        except (SlideflowError, OSError):
            return {}


def _square(row: Row) -> tuple[int, int, int]:
    """A square around an object: x, y, side in px0."""
    side = math.ceil(max(row["width"], row["height"]) * (1 + 2 * MARGIN))
    x, y = row["minx"] + row["width"] / 2 - side / 2, row["miny"] + row["height"] / 2 - side / 2
    return round(x), round(y), side


def _read_square(reader: SlideReader, box: tuple[int, int, int]) -> Rgb:
    """A square from the coarsest level that still has a thumbnail's pixels."""
    x, y, side = box
    fine = [i for i, level in enumerate(reader.levels) if side / max(level.downsample) >= THUMB_PX]
    level = max(fine, default=0)
    dx, dy = reader.levels[level].downsample
    size = max(1, round(side / dx)), max(1, round(side / dy))
    return reader.read(level, (round(x / dx), round(y / dy)), size)


def small(pixels: Rgb) -> Rgb:
    """Return pixels at THUMB_PX x THUMB_PX, uint8."""
    return np.asarray(Image.fromarray(pixels).resize((THUMB_PX, THUMB_PX), Image.Resampling.LANCZOS))


def _groups(rows: Sequence[Row], cascade: Cascade, budget: _Budget) -> Iterator[dict[str, Any]]:
    """Objects by class in the model's order, the most certain first; of many the most and the least certain."""
    by_class: dict[str, list[Row]] = {}
    for row in rows:
        by_class.setdefault(row["found"] if row["class"] is None else row["class"], []).append(row)
    order = cascade.judges[0].classes if cascade.judges else cascade.found
    names = sorted(by_class, key=lambda name: (_place(name, order), name))
    limit = max(LEAST, min(PER_CLASS, budget.thumbs // max(1, len(names))))
    for name in names:
        ranked = sorted(by_class[name], key=lambda row: -(row["probability"] or 0.0))
        first, last = _ends(ranked, limit)
        pixels = budget.pixels([*first, *last])
        place = _place(name, order)
        yield {
            "name": name or "none of the classes",
            "colour": COLOURS[place % len(COLOURS)] if place < len(order) else "",
            "total": len(ranked),
            "left": len(ranked) - len(first) - len(last),
            "first": [_thumb(row, pixels) for row in first],
            "last": [_thumb(row, pixels) for row in last],
        }


def _place(name: str, order: Sequence[str]) -> int:
    """Where a class stands; one that is several comes after all single ones, with its first."""
    parts = name.split("+")
    if len(parts) == 1:
        return order.index(name) if name in order else 10**6
    return len(order) + (order.index(parts[0]) if parts[0] in order else 0)


def _ends(ranked: Sequence[Row], limit: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """All, or of too many two thirds from the top and a third from the bottom."""
    if len(ranked) <= limit:
        return ranked, ()
    bottom = limit // 3
    return ranked[: limit - bottom], ranked[len(ranked) - bottom :]


def _thumb(row: Row, pixels: Mapping[tuple[str, int], Rgb]) -> dict[str, Any]:
    key = (row["slide_id"], row["object"])
    return {
        "pixels": small(pixels[key]) if key in pixels else None,
        "slide_id": row["slide_id"],
        "object": row["object"],
        "probability": row["probability"],
        "edge": row["touches_edge"],
    }

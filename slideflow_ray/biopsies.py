"""Thickness of segmented membranes by micrograph and by biopsy, as thickness.parquet; written when a run has ended.

A biopsy is a patient: the places of all its micrographs are taken together, each by the length that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slideflow_ray import accounting
from slideflow_ray.cohort import Item
from slideflow_ray.errors import SlideflowError
from slideflow_ray.membrane import Thickness
from slideflow_ray.results import defined
from slideflow_ray.specs import ModelSpec, RunSpec, ThicknessSpec
from slideflow_ray.store import SlideStore
from slideflow_ray.tables import Columns, write_table
from slideflow_ray.thickness import read_thickness, thickness_node

TABLE = "thickness.parquet"
PERCENTS = (5, 25, 50, 75, 95)
NUMBERS = ("mean_nm", "sd_nm", "harmonic_nm", "corrected_nm", *(f"p{p:02}_nm" for p in PERCENTS))
COLUMNS: Columns = {
    **dict.fromkeys(("level", "patient_id", "split", "slide_id", "model", "name", "of"), "text"),
    **dict.fromkeys(("length_um", *NUMBERS), "float"),
    **dict.fromkeys(("places", "slides", "slides_measured"), "int"),
    "why": "text",
}

PLACES = ("slide_id", "name", "of", "x_px0", "y_px0", "thickness_nm", "length_um")
"""Columns of what is said of each place."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Measured:
    """A model that measures, by its node and name, and how."""

    node: str
    name: str
    spec: ThicknessSpec
    model: ModelSpec

    def on(self, item: Item) -> bool:
        """Whether the run sends an item to the model."""
        return all(getattr(item, column) == value for column, value in self.model.where.items())


def measuring(record: Mapping[str, Any]) -> tuple[Measured, ...]:
    """Return the models of run.json that measure a thickness."""
    specs = RunSpec.parse(record["spec"], "run.json, spec").model
    return tuple(
        Measured(model["node"], model["name"], spec.thickness, spec)
        for model, spec in zip(record["models"], specs, strict=True)
        if spec.thickness is not None
    )


def read_slide(out: Path, item: Item, outcome: Mapping[str, Any], by: Measured) -> tuple[Thickness | None, str]:
    """Return what was measured on a micrograph, or None, and why nothing was. Raises StoreError, CorruptStore."""
    if outcome.get("status") != "done" or outcome.get("pack"):
        return None, "no result"
    grid = next((grid for grid, node in outcome["grids"] if node == by.node), None)
    if grid is None:
        return None, "nothing was scored"
    store, node = SlideStore(out, item.slide_id), thickness_node(grid, by.node, by.spec)
    if store.committed(node) is None:
        return None, "no result"
    if store.node_attrs(node)["too_large"]:
        return None, "the plane is too large"
    found = read_thickness(store, node)
    return (found, "") if len(found.nm) else (None, f"no length of {by.spec.of} to measure")


def read_rows(out: Path, record: Mapping[str, Any]) -> Rows:
    """Return the rows of every micrograph, then of every biopsy, model by model, in the cohort's order."""
    items = [Item.parse(row, "run.json") for row in record["items"]]
    rows: Rows = []
    for by in measuring(record):
        found = [(item, *_tried(out, item, record, by)) for item in items if by.on(item)]
        rows += [_row(by, "slide", [item], [one] if one else [], why) for item, one, why in found]
        patients: dict[str, list[tuple[Item, Thickness | None]]] = {}
        for item, one, _ in found:
            patients.setdefault(item.patient, []).append((item, one))
        for several in patients.values():
            rows.append(_row(by, "patient", [item for item, _ in several], [one for _, one in several if one], ""))
    return rows


def _tried(out: Path, item: Item, record: Mapping[str, Any], by: Measured) -> tuple[Thickness | None, str]:
    try:
        return read_slide(out, item, record["outcomes"].get(item.slide_id, {}), by)
    except SlideflowError as error:  # `verify` says what is broken; the others' numbers must not wait for it
        return None, error.code


def together(several: Sequence[Thickness]) -> Thickness:
    """Return the places of several micrographs as one membrane; their coordinates mean nothing any more."""
    nm, weight = (
        np.concatenate([getattr(one, key) for one in several] or [np.empty(0)]) for key in ("nm", "weight_um")
    )
    return Thickness(nm, weight, np.full((len(nm), 2), math.nan))


def numbers(found: Thickness) -> dict[str, float | None]:
    """Return the columns that sum a membrane up; None where nothing was measured."""
    values = (found.mean_nm, found.sd_nm, found.harmonic_nm, found.corrected_nm, *found.percentiles_nm(PERCENTS))
    return {name: defined(value) for name, value in zip(NUMBERS, values, strict=True)}


def _row(by: Measured, level: str, items: Sequence[Item], several: Sequence[Thickness], why: str) -> dict[str, Any]:
    found = together(several)
    return {
        "level": level,
        "patient_id": items[0].patient,
        "split": items[0].split,
        "slide_id": items[0].slide_id if level == "slide" else None,
        "model": by.node,
        "name": by.name,
        "of": by.spec.of,
        "length_um": found.length_um,
        **numbers(found),
        "places": len(found.nm),
        "slides": len(items),
        "slides_measured": len(several),
        "why": why or None,
    }


def places(out: Path, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every place that was measured, under the names of PLACES. Raises StoreError, CorruptStore."""
    for by in measuring(record):
        for row in record["items"]:
            item = Item.parse(row, "run.json")
            found = read_slide(out, item, record["outcomes"].get(item.slide_id, {}), by)[0] if by.on(item) else None
            for nm, um, (x, y) in zip(found.nm, found.weight_um, found.xy_px, strict=True) if found else ():
                at = {
                    "slide_id": item.slide_id,
                    "name": by.name,
                    "of": by.spec.of,
                    "x_px0": float(x),
                    "y_px0": float(y),
                }
                yield at | {"thickness_nm": float(nm), "length_um": float(um)}


def write_tables(out: Path) -> None:
    """Write thickness.parquet of a run that has ended, or take it away where nothing measures."""
    record = accounting.read_run(out)
    (out / TABLE).unlink(missing_ok=True)
    if measuring(record):
        write_table(out / TABLE, COLUMNS, read_rows(out, record))

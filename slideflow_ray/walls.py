"""Segmented walls in the report: outlines by class, the membrane's thickness along its length, and by biopsy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from slideflow_ray.biopsies import TABLE, Measured, measuring, numbers
from slideflow_ray.membrane import Thickness
from slideflow_ray.planes import Objects
from slideflow_ray.tables import read_table

PLASMA = (
    *("#0d0887", "#46039f", "#7201a8", "#9c179e", "#bd3786"),
    *("#d8576b", "#ed7953", "#fb9f3a", "#fdca26", "#f0f921"),
)
"""Thin to thick: matplotlib's plasma, which reads in the same order with every colour vision."""

BINS = 24
PATIENTS = 300
"""Biopsies that are listed; thickness.parquet has them all."""
OUTLINE_POINTS = 20_000
"""Corners of a picture's outlines; of more, outlines are simplified."""

Row = dict[str, Any]


def walls_page(out: Path, record: Mapping[str, Any], patients: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what the report lists of each model that measures: its biopsies, with what classifiers call them.

    patients : the rows of patients.parquet, none where nothing is evaluated.
    """
    try:
        rows = read_table(out / TABLE)
    except FileNotFoundError:
        return []
    pages = []
    for by in measuring(record):
        mine = [row for row in rows if row["model"] == by.node and row["level"] == "patient"]
        shown = [row | {"called": _called(row, patients)} for row in mine[:PATIENTS]]
        classifiers = any(row["called"] for row in shown)
        pages.append(
            {"name": by.name, "of": by.spec.of, "between": by.spec.between, "rows": shown, "called": classifiers}
            | {"left": len(mine) - len(shown)}
        )
    return pages


def _called(biopsy: Row, patients: Sequence[Row]) -> list[Row]:
    """What each classifier of the run says of a biopsy: how many of its micrographs are positive, the highest score."""
    mine = [row for row in patients if (row["patient_id"], row["split"]) == (biopsy["patient_id"], biopsy["split"])]
    return [
        {"class": row["class"], "of": row["slides"], "positive": row["slides_called"], "score_max": row["score_max"]}
        for row in mine
        if row["slides_called"] is not None
    ]


def wall(found: Thickness, objects: Objects, by: Measured, colours: Sequence[str], nm_per_px: float) -> dict[str, Any]:
    """Return what a micrograph's picture shows: outlines by class, places coloured by thickness, and their histogram.

    colours : of the model's classes; nm_per_px : of the plane, below whose pixel no bar of the histogram is wide.
    """
    named = (by.spec.of, *by.spec.between)
    low, high = _range(found)
    return {
        "name": by.name,
        "of": by.spec.of,
        "outlines": [
            (name, colours[i], outline(objects.polygons[objects.class_index == i]))
            for i, name in enumerate(objects.classes)
            if name in named or (not by.spec.between and i)
        ],
        "places": coloured_places(found, low, high),
        "low": low,
        "high": high,
        "ramp": ", ".join(PLASMA),
        "bars": histogram(found, low, high, max(1, min(BINS, int((high - low) / nm_per_px)))),
        "length_um": found.length_um,
        **numbers(found),
    }


def _range(found: Thickness) -> tuple[float, float]:
    """A round range of nm that holds nearly everything."""
    if not len(found.nm):
        return 0.0, 1.0
    low, high = found.percentiles_nm((1, 99))
    step = 10.0 if high - low < 100 else 50.0
    low, high = step * np.floor(low / step), step * np.ceil(high / step)
    return float(low), float(max(high, low + step))


def outline(polygons: npt.NDArray[Any]) -> str:
    """Return polygons as one SVG path in px0, with half pixels."""
    corners = int(shapely.get_num_coordinates(polygons).sum()) if len(polygons) else 0
    simple = shapely.simplify(polygons, 0.5 * max(1.0, corners / OUTLINE_POINTS)) if corners else polygons
    rings = [
        np.asarray(ring.coords) for shape in simple for part in shapely.get_parts(shape) for ring in _rings_of(part)
    ]
    return "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in ring[:-1]) + "Z" for ring in rings if len(ring) > 3)


def _rings_of(part: Any) -> list[Any]:
    return [part.exterior, *part.interiors]


def coloured_places(found: Thickness, low: float, high: float) -> list[tuple[str, str]]:
    """Return (colour, SVG path of dots) for each step of the ramp; what lies beyond it has the colour of its end."""
    step = np.clip(((found.nm - low) / (high - low) * len(PLASMA)).astype(int), 0, len(PLASMA) - 1)
    return [
        (colour, "".join(f"M{x:.1f} {y:.1f}h0" for x, y in found.xy_px[step == i]))
        for i, colour in enumerate(PLASMA)
        if (step == i).any()
    ]


def histogram(found: Thickness, low: float, high: float, bins: int = BINS) -> list[dict[str, Any]]:
    """Return the bars of a histogram by length, 100 wide and 100 high: x, width, height, colour."""
    inside = np.clip(found.nm, low, np.nextafter(high, low))
    lengths, edges = np.histogram(inside, bins, (low, high), weights=found.weight_um)
    tallest = max(float(lengths.max(initial=0.0)), 1e-9)
    places = (edges[:-1] - low) / (high - low)
    return [
        {"x": 100 * at, "width": 100 / bins, "height": 100 * length / tallest, "colour": PLASMA[int(at * len(PLASMA))]}
        for at, length in zip(places.tolist(), lengths.tolist(), strict=True)
    ]

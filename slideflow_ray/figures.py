"""Curves and distributions of an evaluation as SVG paths in boxes of 100 x 100; drawn by the report's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slideflow_ray.results import JUDGED, LEVELS, OperatingPoint, Result

POINTS = 400
"""A drawn curve keeps at most this many points."""

BINS = 25
"""Steps of a distribution of probabilities."""

Rows = Sequence[Mapping[str, Any]]
"""Rows of roc.parquet: model, class, level, split, threshold, tp, fp, tpr, fpr, precision, by falling threshold."""


def rows_of(curves: Rows, model: str, name: str, level: str) -> list[Mapping[str, Any]]:
    """Return the rows of one class at one level on the split that is judged."""
    wanted = (model, name, level, JUDGED)
    return [row for row in curves if (row["model"], row["class"], row["level"], row["split"]) == wanted]


def roc_figure(
    model: str,
    name: str,
    results: Sequence[Result],
    points: Mapping[tuple[Any, str], OperatingPoint],
    curves: Rows,
) -> dict[str, Any]:
    """Return the ROC of one class on test: per level a path in a box of 100 x 100 and the operating point on it."""
    lines = []
    for level in LEVELS[:2]:
        rows = [(row["fpr"], row["tpr"]) for row in rows_of(curves, model, name, level)]
        result = next((r for r in results if (r.class_name, r.level, r.split) == (name, level, JUDGED)), None)
        if rows and result:
            mark = None
            if (level, name) in points and result.rates["specificity"] is not None:
                mark = (100 - 100 * result.rates["specificity"], 100 - 100 * (result.rates["sensitivity"] or 0))
            lines.append(
                {"level": level, "path": _curve_path(rows), "mark": mark, "auc": result.auc, "what": result.what}
            )
    return {"class_name": name, "lines": lines}


def _curve_path(rows: Sequence[tuple[float, float]]) -> str:
    """Draw from (0, 0) through the thresholds to (1, 1), thinned evenly."""
    points = np.array([(0.0, 0.0), *rows])
    keep = np.unique(np.linspace(0, len(points) - 1, min(len(points), POINTS)).round().astype(int))
    return "M" + "L".join(f"{100 * x:.2f} {100 - 100 * y:.2f}" for x, y in points[keep])


def pr_figure(
    model: str,
    name: str,
    results: Sequence[Result],
    points: Mapping[tuple[Any, str], OperatingPoint],
    curves: Rows,
) -> dict[str, Any]:
    """Return precision against recall of one class on test: per level a path, and the operating point on it.

    `share` is the positives' share of the cases, the precision of a model that tells nothing, in the box.
    """
    lines = []
    for level in LEVELS[:2]:
        rows = [(row["tpr"], row["precision"]) for row in rows_of(curves, model, name, level)]
        result = next((r for r in results if (r.class_name, r.level, r.split) == (name, level, JUDGED)), None)
        if not rows or result is None:
            continue
        mark = None
        if (level, name) in points and result.rates["ppv"] is not None:
            mark = (100 * (result.rates["sensitivity"] or 0), 100 - 100 * result.rates["ppv"])
        share = result.positives / (result.positives + result.negatives)
        area = result.average_precision
        about = {"level": level, "what": result.what}
        lines.append({**about, "path": _steps(rows), "mark": mark, "area": area, "share": 100 - 100 * share})
    return {"class_name": name, "lines": lines}


def _steps(rows: Sequence[tuple[float, float]]) -> str:
    """Draw precision over recall as steps, not as lines between points (J. Davis, M. Goadrich, ICML 2006)."""
    x, y = np.array(rows, np.float64).T
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
    path = [f"M0 {100 - 100 * y[keep[0]]:.2f}"]
    path += [f"V{100 - 100 * y[i]:.2f}H{100 * x[i]:.2f}" for i in keep]
    return "".join(path)


def distribution(model: str, name: str, point: OperatingPoint | None, curves: Rows) -> dict[str, Any] | None:
    """Return the probabilities of positive and negative tiles on test as two stepped outlines; None without both.

    Each side is scaled to the higher of the two shares; the threshold lies at `threshold`.
    """
    rows = rows_of(curves, model, name, "tile")
    if not rows:
        return None
    margins = np.array([row["threshold"] for row in rows], np.float64)
    place = np.clip((_sigmoid(margins) * BINS).astype(int), 0, BINS - 1)
    sides = {}
    for side in ("tp", "fp"):
        counts = np.diff(np.array([row[side] for row in rows]), prepend=0)
        sides[side] = np.bincount(place, counts, minlength=BINS) / max(1, counts.sum())
    highest = max(float(values.max()) for values in sides.values())
    return {
        "class_name": name,
        "positives": _outline(sides["tp"] / highest),
        "negatives": _outline(sides["fp"] / highest),
        "highest": highest,
        "threshold": None if point is None or point.probability is None else 100 * point.probability,
    }


def reliability(name: str, result: Result | None, rows: Rows) -> dict[str, Any] | None:
    """Return what came true against what was said, by tenth, for tiles on test: points, sized by their cases."""
    mine = [r for r in rows if (r["class"], r["level"], r["split"]) == (name, "tile", JUDGED) and r["cases"]]
    if not mine or result is None:
        return None
    most = max(row["cases"] for row in mine)
    points = [
        (100 * row["mean_probability"], 100 - 100 * row["observed"], 1 + 2.4 * (row["cases"] / most) ** 0.5)
        for row in mine
    ]
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y, _ in points)
    return {"class_name": name, "points": points, "path": path, "error": result.expected_calibration_error}


def _outline(heights: np.ndarray[Any, Any]) -> str:
    step = 100 / len(heights)
    path = ["M0 100"]
    path += [f"V{100 - 100 * h:.2f}H{(i + 1) * step:.2f}" for i, h in enumerate(heights.tolist())]
    return "".join([*path, "V100Z"])


def _sigmoid(margins: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-margins)))

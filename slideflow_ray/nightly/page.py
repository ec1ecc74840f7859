"""The page of one night: what came, what failed, and how it compares with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slideflow_ray.nightly.drift import Measure
from slideflow_ray.report import template

if TYPE_CHECKING:
    from slideflow_ray.nightly.night import Night

WIDTH = 200.0
"""Of a drawing of spreads, in its own units."""
WORDS = {
    "done": "scored",
    "failed": "failed",
    "refused": "refused",
    "duplicate": "there twice",
    "waiting": "still being copied",
    "turn": "wait for their turn",
}


def render(night: Night) -> str:
    """Return the page's HTML; every value is escaped."""
    groups = {name: [_row(m) for m in group] for name, group in (("tonight", night.tonight), ("latest", night.latest))}
    return template("night.html.j2").render(night=night, words=WORDS, total=sum(night.source.values()), **groups)


def _row(measure: Measure) -> dict[str, Any]:
    numbers = {name: _said(getattr(measure, name)) for name in ("psi", "chance", "distance", "p")}
    return {**vars(measure), **numbers, "rows": _rows(measure)}


def _said(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}" if value < 0.01 else f"{value:.2f}"


def _rows(measure: Measure) -> list[dict[str, Any]]:
    """Both spreads on one axis, from the smallest to the largest of their ends."""
    if not measure.latest:
        return []
    low, high = (f([*measure.latest, *measure.reference]) for f in (min, max))
    span = (high - low) or 1.0

    def at(values: Sequence[float]) -> list[float]:
        return [round(4 + (value - low) / span * (WIDTH - 8), 2) for value in values]

    spreads = (("new", 7, at(measure.latest)), ("old", 19, at(measure.reference)))
    return [{"kind": kind, "y": y, "at": xs, "width": max(0.8, xs[3] - xs[1])} for kind, y, xs in spreads]

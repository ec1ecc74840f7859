"""How many objects and which lesions: per slide, per section of a patient, per patient. Plain Python on small values.

Serial sections show the same glomeruli again, so nothing is ever added up over slides: a section is counted on
one slide, and a patient on one section; the others stand beside it. It is the one with most objects among those
whose lesions were judged, or with most of all where none were. A slide without a result is counted as missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from scipy.stats import binomtest

from slideflow_ray.specs import CountSpec
from slideflow_ray.tables import Columns

Level = Literal["slide", "section", "patient"]
LEVELS: tuple[Level, ...] = ("slide", "section", "patient")

Key = str
"""What is counted: ``<model>_<class>``, as the columns name it."""


@dataclass(frozen=True)
class SlideCount:
    """What one segmentation found on one slide, and how many objects each model called each class.

    objects : None for a slide without a result. stain, section : None where the cohort does not name them.
    at_edge : objects that the slide's edge cuts; they are counted. judged : a model said of objects what they are.
    lone : the cohort names no patient, so the slide is one.
    """

    slide_id: str
    patient_id: str
    segmentation: str
    objects: int | None
    at_edge: int = 0
    called: Mapping[Key, int] = field(default_factory=dict)
    sclerosed: int | None = None
    stain: str | None = None
    section: str | None = None
    scanner: str | None = None
    split: str | None = None
    lone: bool = False
    judged: bool = False


@dataclass(frozen=True)
class Count:
    """A row of counts: the slide that is counted, and in words what was found on the `others`.

    slides : with results, the counted one among them; missing : those that have none. Where none has one, `of` is
    without a slide and without objects.
    """

    level: Level
    of: SlideCount
    slides: int = 1
    missing: int = 0
    others: str = ""


def counted(slides: Sequence[SlideCount]) -> list[Count]:
    """Return the rows of every slide with a result, then of every section, then of every patient; each in order.

    A section is a patient's slides of one stain and section; where the cohort names no section, each slide is one.
    Sections and patients all of whose slides are without a result have rows too.
    """
    rows = [Count("slide", one) for one in slides if one.objects is not None]
    rows += [_best("section", group) for group in _grouped(slides, _section_of)]
    for group in _grouped(slides, lambda one: (one.segmentation, one.patient_id)):
        first = _best("patient", group)
        beside = [_best("section", part) for part in _grouped(group, _section_of)]
        said = "; ".join(_said(row.of) for row in beside if row.slides and row.of is not first.of)
        rows.append(replace(first, others=said))
    return rows


def _section_of(one: SlideCount) -> tuple[str | None, ...]:
    section = f"section {one.section}" if one.section else f"slide {one.slide_id}"
    return one.segmentation, one.patient_id, one.stain, section


def _grouped(slides: Sequence[SlideCount], key: Any) -> list[list[SlideCount]]:
    groups: dict[Any, list[SlideCount]] = {}
    for one in slides:
        groups.setdefault(key(one), []).append(one)
    return list(groups.values())


def _best(level: Level, group: Sequence[SlideCount]) -> Count:
    """The slide with most objects of those that were judged, or of all where none was; of several the first."""
    good = [one for one in group if one.objects is not None]
    missing = len(group) - len(good)
    if not good:
        return Count(level, _nowhere(level, group[0]), 0, missing)
    best = max(good, key=lambda one: (one.judged, one.objects or 0))
    return Count(level, best, len(good), missing, "; ".join(_said(one) for one in good if one is not best))


def _nowhere(level: Level, one: SlideCount) -> SlideCount:
    """What stands for a group without any result: whose it is, and no slide."""
    if level == "section":
        return replace(one, slide_id="", scanner=None)
    return replace(one, slide_id="", scanner=None, stain=None, section=None)


def _said(one: SlideCount) -> str:
    where = " ".join(part for part in (one.stain, f"section {one.section}" if one.section else "") if part)
    return f"{one.slide_id}{f' ({where})' if where else ''}: {one.objects}"


# shares


Share = tuple[float | None, float | None, float | None]
"""A share and its 95 % interval; None where nothing was counted."""


def share(part: int, whole: int) -> Share:
    """Return part / whole with the interval of E. B. Wilson, JASA 22 (1927) 209-212, objects taken as independent.

    >>> [round(value, 3) for value in share(2, 10)]
    [0.2, 0.057, 0.51]
    >>> share(0, 0)
    (None, None, None)
    """
    if not whole:
        return None, None, None
    interval = binomtest(part, whole).proportion_ci(method="wilson")
    return part / whole, float(interval.low), float(interval.high)


# the table


def count_columns(keys: Sequence[Key]) -> Columns:
    """Return the columns of counts.parquet; for each key a number, a share and its interval."""
    columns: dict[str, Any] = {
        "level": "text",
        "patient_id": "text",
        "slide_without_patient": "bool",
        "split": "text",
        "stain": "text",
        "section": "text",
        "slide_id": "text",
        "scanner": "text",
        "segmentation": "text",
        "objects": "int",
        "at_edge": "int",
        "inadequate": "bool",
        "slides": "int",
        "slides_missing": "int",
        "others": "text",
        **dict(zip(SCLEROSIS, ("int", "float", "float", "float"), strict=True)),
    }
    for key in keys:
        columns |= {f"n_{key}": "int", f"share_{key}": "float", f"low_{key}": "float", f"high_{key}": "float"}
    return columns


SCLEROSIS = ("global_sclerosis", "global_sclerosis_share", "global_sclerosis_low", "global_sclerosis_high")
"""Null where no model has such a class: not labelled is not none."""


def count_rows(counts: Sequence[Count], spec: CountSpec) -> Iterator[dict[str, Any]]:
    """Yield the rows of counts.parquet; classes of models that did not run on a slide are null.

    So is every number of a row without a slide: nothing counted is not none.
    """
    for row in counts:
        one = row.of
        values: dict[str, Any] = {
            "level": row.level,
            "patient_id": one.patient_id,
            "slide_without_patient": one.lone,
            "split": one.split,
            "stain": one.stain,
            "section": one.section,
            "slide_id": one.slide_id or None,
            "scanner": one.scanner,
            "segmentation": one.segmentation,
            "objects": one.objects,
            "at_edge": None if one.objects is None else one.at_edge,
            "inadequate": None if one.objects is None else one.objects < spec.adequate,
            "slides": row.slides,
            "slides_missing": row.missing,
            "others": row.others,
        }
        if one.sclerosed is not None:
            values |= zip(SCLEROSIS, (one.sclerosed, *share(one.sclerosed, one.objects or 0)), strict=True)
        for key, n in one.called.items():
            names = (f"n_{key}", f"share_{key}", f"low_{key}", f"high_{key}")
            values |= zip(names, (n, *share(n, one.objects or 0)), strict=True)
        yield values

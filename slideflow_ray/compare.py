"""Bundles side by side on the same split: what each comes to, how they differ, and what they cost.

All are scored by an ordinary run (which resumes), on the same slides. Intervals and those of differences come from
the same resamples of patients. Written to compare.json beside the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from slideflow_ray import accounting, storage
from slideflow_ray.cases import Run, read_run
from slideflow_ray.cohort import Item, Split, check_splits, read_cohort
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import Listener, silent
from slideflow_ray.labelled import (
    METRICS,
    Floats,
    Rows,
    mcnemar,
    measure,
    percentiles,
    same_rows,
    slide_rows,
    tile_rows,
)
from slideflow_ray.lease import lease
from slideflow_ray.metrics import Interval, resample_weights
from slideflow_ray.models.bundle import WEIGHTS, BundleCard, read_card
from slideflow_ray.models.service import resolve
from slideflow_ray.profile import ComputeProfile
from slideflow_ray.results import defined, with_interval
from slideflow_ray.run import run
from slideflow_ray.specs import ComputeSpec, ExecutorSpec, LabelSpec, RunSpec, Spec, StoreSpec, digest

SCHEMA = 1
Level = Literal["tile", "slide"]
LEVELS: tuple[Level, ...] = ("tile", "slide")

BENCHMARK_S = 1.0
"""A benchmark ends after so many seconds of forward passes, and has at least two."""


class Measured(Spec):
    """The metrics of one bundle at one level; None where one is not defined. Intervals are 95 %, by patient."""

    level: Level
    rows: int
    patients: int
    values: dict[str, float | None]
    intervals: dict[str, Interval | None]


class Contestant(Spec):
    """A bundle that is compared. `label` is its name, with its digest where two have one name.

    forward : its forward digest ("digest" in the file); tiles_per_second : of the forward pass alone on this machine,
    under the run's compute profile.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    label: str
    architecture: str = ""
    path: str
    forward: str = Field(alias="digest")
    node: str
    tile_px: int
    mpp: float | None
    parameters: int
    bytes: int
    tiles_per_second: float | None
    measured: tuple[Measured, ...]

    def at(self, level: Level) -> Measured | None:
        """Return the metrics at a level, None where nothing is labelled there."""
        return next((m for m in self.measured if m.level == level), None)


class Pair(Spec):
    """Two bundles on the same rows: `differences` are the first's value minus the second's.

    level : tile, or slide where the two were given other tiles. only_first, only_second : rows that only one of
    them calls rightly; p : McNemar's, exact.
    """

    first: str
    second: str
    level: Level
    same_tiles: bool
    rows: int
    only_first: int
    only_second: int
    p: float
    differences: dict[str, float | None]
    intervals: dict[str, Interval | None]


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to. `cohort` is the digest of what was judged: files, patients, labels, annotations."""

    split: str
    cohort: str
    probability: float
    bundles: tuple[Contestant, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "schema": SCHEMA,
            "split": self.split,
            "cohort": self.cohort,
            "probability": self.probability,
            "bundles": [b.model_dump(mode="json", by_alias=True) for b in self.bundles],
            "pairs": [p.model_dump(mode="json") for p in self.pairs],
            "notes": list(self.notes),
            "intervals": "95 %, percentiles of resampled patients, the same resamples for all bundles",
        }

    def summary(self) -> str:
        """Return a table for a terminal: a line for each metric, a column for each bundle; then pairs and notes."""
        lines = [line for level in LEVELS for line in _table(self.bundles, level, self.split)]
        table = _architectures(self.bundles, self.split)
        return "\n".join([*lines, *table, *_costs(self.bundles), *map(_pair_text, self.pairs), *self.notes])


def _table(bundles: Sequence[Contestant], level: Level, split: str) -> list[str]:
    found = [b.at(level) for b in bundles]
    if not any(found):
        return []
    heads = [f"by {level}, {split}", *(b.label for b in bundles)]
    rows = [["cases", *(f"{m.rows:,} of {m.patients} patients" if m else "-" for m in found)]]
    for name in METRICS:
        cells = [with_interval(m.values[name], m.intervals[name]) if m else "-" for m in found]
        rows.append([name, *cells])
    return [*columns([heads, *rows]), ""]


def _architectures(bundles: Sequence[Contestant], split: str) -> list[str]:
    """The table of the glomerulus paper: a line for each bundle, what it is, its size and its accuracy."""
    rows = [["bundle", "architecture", "parameters (M)", "file (MB)", f"{split} accuracy"]]
    for b in bundles:
        found = b.at("tile") or b.at("slide")
        accuracy = with_interval(found.values["accuracy"], found.intervals["accuracy"]) if found else "-"
        rows.append([b.label, b.architecture, f"{b.parameters / 1e6:.2f}", f"{b.bytes / 1e6:.1f}", accuracy])
    return [*columns(rows), ""]


def _costs(bundles: Sequence[Contestant]) -> list[str]:
    rows = [["cost", *(b.label for b in bundles)]]
    rows.append(["parameters", *(f"{b.parameters:,}" for b in bundles)])
    rows.append(["megabytes", *(f"{b.bytes / 1e6:.2f}" for b in bundles)])
    if any(b.tiles_per_second for b in bundles):
        rate = [f"{b.tiles_per_second:,.0f}" if b.tiles_per_second else "-" for b in bundles]
        rows.append(["tiles per second (forward pass alone, here)", *rate])
    return [*columns(rows), ""]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table for a terminal, each column as wide as its widest cell."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(n) for cell, n in zip(row, wide, strict=True)).rstrip() for row in rows]


def _pair_text(pair: Pair) -> str:
    where = f"the same {pair.rows:,} tiles" if pair.level == "tile" else f"{pair.rows:,} slides (their tiles differ)"
    gain = pair.differences["auc"]
    auc = "AUC difference not defined" if gain is None else f"AUC difference {_signed(gain, pair.intervals['auc'])}"
    return (
        f"{pair.first} against {pair.second} on {where}: only the first is right on {pair.only_first:,}, only the "
        f"second on {pair.only_second:,}, McNemar p = {pair.p:.3g}; {auc}"
    )


def _signed(value: float, interval: Interval | None) -> str:
    return f"{value:+.4f}" + (f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else " (no interval)")


# compare


@dataclass(frozen=True)
class Settings:
    """How bundles are compared. `probability` is that from which a class is called, of two classes or labels."""

    split: Split = "val"
    probability: float = 0.5
    seed: int = 0
    resamples: int = 1000
    benchmark: bool = True
    executor: ExecutorSpec = field(default_factory=ExecutorSpec)
    compute: ComputeSpec = field(default_factory=ComputeSpec)
    store: StoreSpec = field(default_factory=lambda: StoreSpec(tiles="none"))
    labels: LabelSpec = field(default_factory=LabelSpec)

    @property
    def threshold(self) -> float:
        """The margin of `probability`. Raises ConfigError for one that is not between 0 and 1."""
        if not 0 < self.probability < 1:
            raise ConfigError(f"A probability lies between 0 and 1, got {self.probability}.")
        return math.log(self.probability / (1 - self.probability))


def compare(
    bundles: Sequence[str | Path],
    cohort: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    listen: Listener = silent,
) -> Comparison:
    """Score a split with every bundle and put them side by side; run again to resume.

    Raises ConfigError (bundles of different classes or tasks, no such split, nothing labelled), BundleError,
    AnnotationError, LeaseError, SplitLeakError.
    """
    settings = settings or Settings()
    folders = [resolve(Path(bundle).absolute()) for bundle in bundles]
    _comparable([read_card(folder) for folder in folders])
    items = split_of(cohort, settings.split)
    spec = RunSpec.parse(
        {
            "cohort": str(Path(cohort).absolute()),
            "out": str(Path(out).absolute()),
            "model": [{"path": str(folder)} for folder in folders],
            **{name: getattr(settings, name).model_dump() for name in ("executor", "compute", "store", "labels")},
        },
        "compare",
    )
    threshold = settings.threshold
    result = run(spec, items, listen)
    scored = read_run(Path(spec.out))
    failed = [f"{e.slide_id} {e.status}: {e.code}; no bundle is judged on it." for e in result.ended if e.code]
    with lease(scored.out):
        check_splits(read_cohort(cohort), {e.slide_id: e.identity for e in result.ended if e.identity})
        found = _compared(scored, settings, threshold, failed)
        storage.write_atomic(scored.out / "compare.json", storage.to_json(found.to_json()))
    return found


def split_of(cohort: str | Path, split: str) -> tuple[Item, ...]:
    """Return a cohort's items in a split. Raises ConfigError where there are none."""
    items = tuple(item for item in read_cohort(cohort) if item.split == split)
    if not items:
        raise ConfigError(
            f"{cohort} has no slide in split {split!r}.", next_step="Say so in its column `split`, or give --split."
        )
    return items


def _comparable(cards: Sequence[BundleCard]) -> None:
    if not cards:
        raise ConfigError("Name at least one bundle.", next_step="slideflow-ray compare --help")
    for card in cards:
        if card.task not in ("classify", "multilabel"):
            raise ConfigError(f"{card.name} is of task {card.task!r}; only classifiers are compared.")
        if (card.task, card.classes) != (cards[0].task, cards[0].classes):
            raise ConfigError(
                f"{card.name} is of task {card.task} with classes {', '.join(card.classes)}; "
                f"{cards[0].name} of task {cards[0].task} with {', '.join(cards[0].classes)}.",
                next_step="Compare bundles of the same task and the same classes in the same order.",
            )


def cohort_digest(run: Run, split: str) -> str:
    """Return 12 hex digits of what a split was judged on: files by their bytes, patients, labels, annotations."""
    rows = []
    for item in sorted((i for i in run.items if i.split == split), key=lambda i: i.slide_id):
        identity = run.outcomes.get(item.slide_id, {}).get("identity", "")
        marks = digest(storage.local_path(item.annotation).read_text()) if item.annotation else None
        rows.append([item.slide_id, item.patient, item.label, identity, marks])
    return digest([split, rows])


@dataclass(frozen=True)
class _Side:
    """One bundle's rows and figures while it is compared: value and resamples of each metric by level."""

    contestant: Contestant
    rows: dict[Level, Rows]
    drawn: dict[Level, dict[str, Floats]]


def _compared(run: Run, settings: Settings, threshold: float, failed: Sequence[str]) -> Comparison:
    labelled = [
        {"tile": tile_rows(run, model, settings.split), "slide": slide_rows(run, model, settings.split)}
        for model in run.models
    ]
    patients: dict[str, tuple[str, ...]] = {
        level: tuple(sorted({p for rows in labelled for p in rows[level].patients})) for level in LEVELS
    }
    if not any(patients.values()):
        raise ConfigError(
            f"No slide of split {settings.split!r} has a label or annotation that the bundles know.",
            next_step="Give the cohort a column `label` or `annotation` with the bundles' classes.",
        )
    weights = {level: _weights(len(patients[level]), settings) for level in LEVELS}
    record = accounting.read_run(run.out)
    sides = []
    for place, rows in enumerate(labelled):
        have: dict[Level, Rows] = {level: rows[level] for level in LEVELS if len(rows[level])}
        drawn = {level: measure(have[level], weights[level], patients[level], threshold) for level in have}
        measured = tuple(_measured(level, have[level], drawn[level]) for level in have)
        sides.append(_Side(_contestant(record, place, settings, measured), have, drawn))
    pairs = tuple(_pair(a, b, threshold) for a, b in combinations(sides, 2))
    notes = [*failed, *_notes(sides, pairs, settings)]
    bundles = tuple(side.contestant for side in sides)
    digest_ = cohort_digest(run, settings.split)
    return Comparison(settings.split, digest_, settings.probability, bundles, pairs, tuple(notes))


def _weights(patients: int, settings: Settings) -> Floats:
    """The first row counts each patient once; the others are resamples, the same for all bundles."""
    if not patients:
        return np.ones((1, 0))
    drawn = resample_weights(patients, settings.resamples, settings.seed).astype(np.float64)
    return np.concatenate([np.ones((1, patients)), drawn])


def _measured(level: Level, rows: Rows, drawn: dict[str, Floats]) -> Measured:
    patients = len(rows.patients)
    values = {name: defined(float(v[0])) for name, v in drawn.items()}
    intervals = {name: percentiles(v[1:], patients) for name, v in drawn.items()}
    return Measured(level=level, rows=len(rows), patients=patients, values=values, intervals=intervals)


def _contestant(record: dict[str, Any], place: int, settings: Settings, measured: tuple[Measured, ...]) -> Contestant:
    model = record["models"][place]
    twice = sum(m["name"] == model["name"] for m in record["models"]) > 1
    profile = ComputeProfile.parse(record["profile"], "run.json") if settings.benchmark else None
    return Contestant(
        label=f"{model['name']} {model['digest']}" if twice else model["name"],
        architecture=read_card(model["path"]).architecture,
        path=model["path"],
        forward=model["digest"],
        node=model["node"],
        tile_px=model["tile_px"],
        mpp=model["mpp"],
        parameters=parameters(model["path"]),
        bytes=(Path(model["path"]) / WEIGHTS).stat().st_size,
        tiles_per_second=round(tiles_per_second(model["path"], profile), 1) if profile else None,
        measured=measured,
    )


def parameters(bundle: str | Path) -> int:
    """Return how many parameters a bundle's network has."""
    from slideflow_ray.models.networks import load_network

    return sum(p.numel() for p in load_network(bundle)[1].parameters())


def tiles_per_second(bundle: str | Path, profile: ComputeProfile) -> float:
    """Return the rate of the forward pass alone: fixed random tiles in memory, micro-batches of the profile.

    One scorer (on a CPU one core of it); the best of at least two passes of two micro-batches.
    """
    from slideflow_ray.models.scorer import load_scorer

    scorer = load_scorer(bundle, profile)
    side, n = scorer.card.tile_px, 2 * profile.micro_batch
    pixels = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
    took: list[float] = []
    while len(took) < 2 or sum(took) < BENCHMARK_S:
        began = time.perf_counter()
        scorer.margins(pixels, scorer.card.own_colours)
        took.append(time.perf_counter() - began)
    return n / min(took)


def _pair(one: _Side, other: _Side, threshold: float) -> Pair:
    both = [level for level in LEVELS if level in one.rows and level in other.rows]
    same = "tile" in both and same_rows(one.rows["tile"], other.rows["tile"])
    level: Level = "tile" if same or "slide" not in both else "slide"
    comparable = level in both and same_rows(one.rows[level], other.rows[level])
    counts = mcnemar(one.rows[level], other.rows[level], threshold) if comparable else (0, 0, 1.0)
    drawn = {name: one.drawn[level][name] - other.drawn[level][name] for name in METRICS} if level in both else {}
    patients = len(one.rows[level].patients) if level in both else 0
    return Pair(
        first=one.contestant.label,
        second=other.contestant.label,
        level=level,
        same_tiles=same,
        rows=len(one.rows[level]) if comparable else 0,
        only_first=counts[0],
        only_second=counts[1],
        p=counts[2],
        differences={name: defined(float(drawn[name][0])) if drawn else None for name in METRICS},
        intervals={name: percentiles(drawn[name][1:], patients) if drawn else None for name in METRICS},
    )


def _notes(sides: Sequence[_Side], pairs: Sequence[Pair], settings: Settings) -> list[str]:
    notes = [
        f"{p.first} and {p.second} see other tiles, so they are compared by slide." for p in pairs if not p.same_tiles
    ]
    few = {m.patients for side in sides for m in side.contestant.measured if not any(m.intervals.values())}
    if few:
        notes.append(f"No intervals: {min(few)} patients are too few, or all resamples agree.")
    if any(len(side.rows.get("tile", ())) == 0 for side in sides):
        notes.append("No tile is labelled (no annotation, no slide of the first class), so slides alone are judged.")
    if settings.probability != 0.5:
        notes.append(f"A class is called from a probability of {settings.probability:g}.")
    return notes

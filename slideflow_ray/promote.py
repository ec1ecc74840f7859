"""A candidate takes the place of the bundle in service when it beats it, on the same validation slides.

The one before is kept, every decision is a line of history.jsonl, and `undo` goes back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from slideflow_ray import storage
from slideflow_ray.calibrate import TEMPERATURE, calibrate
from slideflow_ray.cohort import Item
from slideflow_ray.compare import Comparison, Level, Settings, compare, split_of
from slideflow_ray.errors import ConfigError, SplitLeakError
from slideflow_ray.evaluate import evaluate
from slideflow_ray.events import Listener, silent
from slideflow_ray.identity import identity
from slideflow_ray.models.bundle import read_card
from slideflow_ray.models.service import (
    VERSIONS,
    Current,
    Version,
    checked,
    note,
    read_current,
    replace_current,
    resolve,
    version_of,
)
from slideflow_ray.results import FITTED
from slideflow_ray.rules import rule_of

By = Literal["auc", "accuracy", "log_loss", "f1", "balanced_accuracy"]
POINTS = "operating_points.json"
RECORD = "training.json"
SCORED = "scored"


@dataclass(frozen=True)
class Terms:
    """When a candidate takes the place: its gain by `rule` exceeds `margin`; with `interval`, so does the lower
    bound of the gain's interval by patient. `point` is the rule of the operating points that go along. `leaking`
    takes one too that was trained on a split with one patient on both sides (split.mode = "paper")."""

    rule: By = "auc"
    margin: float = 0.0
    interval: bool = False
    point: str = "youden"
    leaking: bool = False

    def __post_init__(self) -> None:
        rule_of(self.point)
        if self.rule not in get_args(By):
            raise ConfigError(f"{self.rule!r} is no rule to promote by: use {', '.join(get_args(By))}.")
        if not 0 <= self.margin < float("inf"):
            raise ConfigError(f"A margin is at least 0, got {self.margin}.")


@dataclass(frozen=True)
class Decision:
    """What came of it: `gain` of the candidate over the one in service (None where there was none), and why."""

    accepted: bool
    why: str
    version: str
    folder: Path | None = None
    gain: float | None = None
    interval: tuple[float, float] | None = None
    comparison: Comparison | None = None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "accepted": self.accepted,
            "why": self.why,
            "version": self.version,
            "folder": str(self.folder) if self.folder else None,
            "gain": self.gain,
            "interval": self.interval,
            "notes": list(self.notes),
            "comparison": self.comparison.to_json() if self.comparison else None,
        }

    def summary(self) -> str:
        """Return it in lines for a terminal."""
        table = [self.comparison.summary()] if self.comparison else []
        return "\n".join([*table, *self.notes, ("Promoted: " if self.accepted else "Refused: ") + self.why])


def promote(
    candidate: str | Path,
    into: str | Path,
    cohort: str | Path,
    terms: Terms | None = None,
    settings: Settings | None = None,
    listen: Listener = silent,
) -> Decision:
    """Compare a candidate with the bundle in service of `into` (models/<name>), and put it there if it is better.

    Both are scored by `compare` below `into`/scored, which resumes. Nothing changes unless all went well.
    Raises ConfigError (other classes, no such split, already in service, another promotion came between),
    SplitLeakError (trained on these slides or patients, or on a leaking split), BundleError.
    """
    terms, settings, model = terms or Terms(), settings or Settings(), _on_disk(into)
    folder = resolve(_on_disk(candidate))
    current = read_current(model)
    new = version_of(folder, model)
    _check_new(folder, model, new, current)
    warned = check_sound(folder, terms)
    items = split_of(cohort, settings.split)
    notes = [*warned, *check_unseen(folder, items, model / SCORED / ".cache" / "identity")]
    bundles = [folder] if current is None else [folder, checked(model, current)]
    notes += [flattered(one, items, model / SCORED / ".cache" / "identity") for one in bundles[1:]]
    out = model / SCORED
    found = compare(bundles, cohort, out, settings, listen)
    decision = replace(_decide(found, terms, new), comparison=found, notes=tuple(filter(None, notes)))
    if decision.accepted:
        extra, more = _extras(out, found, terms)
        decision = replace(decision, notes=(*decision.notes, *more))
        decision = replace(decision, folder=_install(folder, model, new, current, extra))
    note(model, _line(decision, current, found, terms, cohort))
    return decision


def _on_disk(folder: str | Path) -> Path:
    """Return a folder's absolute path. Raises ConfigError for one in an object store."""
    try:
        return storage.local_path(folder).absolute()
    except ConfigError as error:
        step = "Promote into a folder on disk, and copy the model's folder to the bucket: runs resolve it there."
        raise ConfigError(f"{folder}: models are promoted on disk only.", next_step=step) from error


def _check_new(folder: Path, model: Path, new: Version, current: Current | None) -> None:
    card = read_card(folder)
    if current is None:
        return
    there = read_card(checked(model, current))
    if (card.task, card.classes) != (there.task, there.classes):
        raise ConfigError(
            f"{card.name} is of task {card.task} with classes {', '.join(card.classes)}; in service is one of task "
            f"{there.task} with {', '.join(there.classes)}.",
            next_step="Promote it into another name, or train with the same classes in the same order.",
        )
    if new.forward == current.forward:
        raise ConfigError(
            f"{folder} has the weights and forward pass of what is in service ({new.forward}).",
            next_step="There is nothing to promote.",
        )


# what the candidate was trained on


def check_sound(folder: Path, terms: Terms) -> list[str]:
    """Return a note where the bundle's training split leaked and `terms` take it all the same.

    Raises SplitLeakError where they do not: its epoch and settings were chosen on patients that it knew.
    """
    record = storage.read_json(folder / RECORD)
    said = record.get("leaking") if isinstance(record, dict) else None
    if not said:
        return []
    if terms.leaking:
        return [f"{folder.name} was trained on a {said}"]
    raise SplitLeakError(
        f"{folder.name} was trained on a {said}",
        next_step='Train it with split.mode = "patient"; or say --even-if-leaking, if you know that it must be.',
    )


def check_unseen(folder: Path, items: Sequence[Item], cache: Path | None = None) -> list[str]:
    """Return a note where the bundle does not say what it was trained on.

    Raises SplitLeakError where its training record names one of these patients, slides or files.
    """
    record = storage.read_json(folder / RECORD)
    data = record.get("data") if isinstance(record, dict) else None
    seen = _named(data, "slides"), _named(data, "patients")
    if not any(seen):
        return [f"{folder.name} has no record of its training slides ({RECORD}), so it may have seen these."]
    patients = sorted({i.patient for i in items} & seen[1])
    slides = sorted(i.slide_id for i in items if seen[0] and _identities(i, cache) & seen[0])
    if patients or slides:
        what = f"patients {', '.join(patients[:5])}" if patients else f"slides {', '.join(slides[:5])}"
        raise SplitLeakError(
            f"{folder.name} was trained on {len(patients) or len(slides)} of the {what}, which would judge it.",
            next_step="Judge it on patients that it was not trained on: give another --cohort or --split.",
        )
    return []


def flattered(serving: Path, items: Sequence[Item], cache: Path | None = None) -> str:
    """Return a note where what is in service was trained on patients that judge it now, "" where it was not.

    That it knows them raises its figures, so a candidate that beats it all the same is better; one that does not
    may be. Cohorts are split anew, so this is no reason to refuse.
    """
    try:
        check_unseen(serving, items, cache)
    except SplitLeakError as error:
        return f"In service: {error.message} Its figures are too good; a fair judgement needs others."
    return ""


def _named(data: Any, kind: str) -> set[str]:
    train = data.get(kind, {}).get("train", []) if isinstance(data, dict) and isinstance(data.get(kind), dict) else []
    return {str(one) for one in train} if isinstance(train, list) else set()


def _identities(item: Item, cache: Path | None) -> set[str]:
    """By which a record may name a slide: what its file is; where that cannot be read, the run says so later."""
    found = {f"sha256:{item.sha256.lower()}", item.sha256.lower()} if item.sha256 else set()
    with contextlib.suppress(OSError, ValueError):
        one = identity(item.uri, cache)
        found |= {one, one.removeprefix("sha256:")}
    return found


# decide


def _decide(found: Comparison, terms: Terms, new: Version) -> Decision:
    if not found.pairs:
        return Decision(True, f"{new.forward} is the first in service; there was none to beat.", new.name)
    pair, (candidate, serving) = found.pairs[0], found.bundles
    sign = -1 if terms.rule == "log_loss" else 1
    gain, drawn = pair.differences[terms.rule], pair.intervals[terms.rule]
    about = f"{terms.rule} by {pair.level} on {found.split}"
    if gain is None:
        return Decision(False, f"{about} is not defined: both classes are needed.", new.name)
    gain *= sign
    interval = None if drawn is None else (min(sign * v for v in drawn), max(sign * v for v in drawn))
    values = f"{_value(candidate, pair.level, terms)} against {_value(serving, pair.level, terms)}"
    spread = f"{interval[0]:+.4f} to {interval[1]:+.4f} by patient" if interval else "no interval: too few patients"
    least = interval[0] if terms.interval and interval else gain
    accepted = least > terms.margin and not (terms.interval and interval is None)
    verb = "beats" if accepted else "does not beat"
    bound = "the lower bound of the gain" if terms.interval else "the gain"
    why = (
        f"{new.forward} {verb} {serving.forward}: {about} {values}, a gain of {gain:+.4f} ({spread}); "
        f"{bound} must exceed {terms.margin:g}."
    )
    return Decision(accepted, why, new.name, None, gain, interval)


def _value(contestant: Any, level: Level, terms: Terms) -> str:
    measured = contestant.at(level)
    value = measured.values[terms.rule] if measured else None
    return "undefined" if value is None else f"{value:.4f}"


# put it there


def _extras(out: Path, found: Comparison, terms: Terms) -> tuple[dict[str, Any], list[str]]:
    """Operating points and temperature of the candidate, as files beside its card; and what is to be said."""
    if found.split != FITTED:
        return {}, [f"Judged on {found.split!r}: operating points and temperature are fitted on {FITTED!r} only."]
    bundle, notes = found.bundles[0], []
    about = {"schema": 1, "bundle": bundle.forward, "cohort": found.cohort, "split": found.split}
    points = [p.model_dump(mode="json") for p in evaluate(out, rule=terms.point).points if p.model == bundle.node]
    extra: dict[str, Any] = {POINTS: {**about, "points": points}}
    if not points:
        notes.append("No operating point could be fitted: both classes are needed on validation.")
    try:
        fitted = {one.model: one for one in calibrate(out)[0]}
    except ConfigError:  # no labelled tile: slides alone were judged
        fitted = {}
    if bundle.node in fitted:
        extra[TEMPERATURE] = {**about, **fitted[bundle.node].model_dump(mode="json")}
    else:
        notes.append("No temperature was fitted: no tile of validation is labelled.")
    return extra, notes


def _install(folder: Path, model: Path, new: Version, current: Current | None, extra: Mapping[str, Any]) -> Path:
    """Copy the bundle as a whole, then swap current.json; what is there already is only given its new points."""
    goal = model / VERSIONS / new.name
    goal.parent.mkdir(parents=True, exist_ok=True)
    if not goal.exists():
        with tempfile.TemporaryDirectory(prefix=f".{new.name}.", suffix=".partial", dir=goal.parent) as scratch:
            copy = Path(scratch) / "new"
            shutil.copytree(folder, copy)
            _flush(copy)
            with contextlib.suppress(FileExistsError):
                os.rename(copy, goal)
    for name, value in extra.items():
        storage.write_atomic(goal / name, storage.to_json(value))
    version = version_of(goal, model)
    if (version.forward, version.card) != (new.forward, new.card):
        raise ConfigError(f"{folder} changed while it was promoted.", next_step="Promote it again.")
    after = current.follow(version) if current else Current(**version.model_dump())
    replace_current(model, after, current)
    return goal


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _line(
    decision: Decision, current: Current | None, found: Comparison, terms: Terms, cohort: str | Path
) -> dict[str, Any]:
    return {
        "what": "promoted" if decision.accepted else "refused",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "candidate": found.bundles[0].forward,
        "version": decision.version,
        "against": current.forward if current else None,
        "why": decision.why,
        "rule": terms.rule,
        "margin": terms.margin,
        "by_interval": terms.interval,
        "gain": decision.gain,
        "interval": list(decision.interval) if decision.interval else None,
        "cohort": Path(cohort).name,
        "cohort_digest": found.cohort,
        "split": found.split,
    }


def undo(into: str | Path) -> Current:
    """Go back to the version before, and write so into the history. What was in service keeps its folder.

    Raises ConfigError where there is none before, BundleError where it has gone or was changed.
    """
    model = _on_disk(into)
    current = read_current(model)
    if current is None or not current.previous:
        raise ConfigError(f"{model} has no version before this one.", next_step="Promote another bundle instead.")
    before, *rest = current.previous
    checked(model, before)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    back = Current(**{**before.model_dump(), "since": now}, previous=tuple(rest))
    replace_current(model, back, current)
    note(model, {"what": "undone", "when": now, "candidate": current.forward, "against": before.forward})
    return back

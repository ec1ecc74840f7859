"""One night: look, score what is new, aggregate the cohort so far, compare with the reference, account for all.

A night that is interrupted is done again under its own name: what was scored stays scored. Nights
that were missed need nothing: what is new is new since the last night that ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date as Date
from datetime import timedelta
from pathlib import Path
from typing import Any

from slideflow_ray import accounting, storage
from slideflow_ray.cohort import Item, check_unique, read_cohort
from slideflow_ray.errors import ConfigError, SlideflowError, UnexpectedError
from slideflow_ray.evaluate import evaluate
from slideflow_ray.events import Listener, silent
from slideflow_ray.lease import lease
from slideflow_ray.nightly import drift
from slideflow_ray.nightly.alert import raise_alert
from slideflow_ray.nightly.keep import prune
from slideflow_ray.nightly.sources import Listing, list_sources
from slideflow_ray.nightly.spec import NIGHTS, REFERENCE, RESULTS, NightlySpec
from slideflow_ray.nightly.state import Entry, State, Tonight, compare
from slideflow_ray.run import load_models, resolved, run, wanted
from slideflow_ray.specs import RunSpec, digest

TURN = "scored by an earlier bundle or with other settings; its turn comes"


@dataclass(frozen=True)
class Night:
    """What a night came to.

    source : slides that the source holds, by kind (new, changed, renamed, unchanged, duplicate, waiting).
    accounted : the same slides by how they stand now: done, failed, refused, duplicate, waiting, and `turn` for those
    that an earlier bundle has scored. Both add up to the same. others : files that are no slides; unusable : files
    that cannot be taken for one, and why.
    outlying : slides of tonight that lie far outside the reference, and in what.
    ended : slide_id -> status, code and message of those that are not done, and on how many nights in a row.
    """

    name: str
    missed: tuple[str, ...]
    source: Mapping[str, int]
    accounted: Mapping[str, int]
    others: int
    new: tuple[str, ...]
    changed: tuple[str, ...]
    renamed: tuple[str, ...]
    removed: tuple[str, ...]
    rescored: tuple[str, ...]
    unusable: Mapping[str, str]
    waiting: Mapping[str, str]
    duplicates: Mapping[str, str]
    ended: Mapping[str, Mapping[str, Any]]
    models: tuple[tuple[str, str], ...]
    tonight: tuple[drift.Measure, ...] = ()
    latest: tuple[drift.Measure, ...] = ()
    outlying: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pruned: tuple[str, ...] = ()
    report: str = ""

    @property
    def drifted(self) -> tuple[str, ...]:
        """One sentence for each measure that has drifted."""
        groups = (("tonight's slides", self.tonight), ("the latest slides", self.latest))
        return tuple(f"{m.name} of {whose}: {m.why}" for whose, group in groups for m in group if m.drift)

    @property
    def failed(self) -> bool:
        """Whether any slide did not end well."""
        return bool(self.accounted["failed"] or self.accounted["refused"])

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Code and slide_id of the slides that did not end well."""
        return [(str(end["code"]), slide_id) for slide_id, end in self.ended.items()]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "drift": list(self.drifted), "failed": self.failed}

    def summary(self) -> str:
        """Return it in a few lines."""
        added = f"{len(self.new)} new, {len(self.changed)} changed, {len(self.removed)} gone"
        stand = ", ".join(f"{kind} {n}" for kind, n in self.accounted.items() if n)
        lines = [f"{self.name}: {sum(self.source.values())} slides ({added}); {stand or 'none'}"]
        again = [s for s, e in self.ended.items() if e["failures"] > 1]
        lines += [f"failed again: {', '.join(again)}"] if again else []
        lines += [f"drift: {text}" for text in self.drifted]
        lines += [f"unlike the reference: {slide_id}, {why}" for slide_id, why in self.outlying.items()]
        return "\n".join([*lines, *self.notes, *([f"report: {self.report}"] if self.report else [])])


@dataclass
class _Work:
    """What a night works with."""

    spec: NightlySpec
    out: Path
    run: RunSpec
    models: tuple[tuple[str, str], ...]
    how: str
    listen: Listener
    notes: list[str] = field(default_factory=list)


def run_night(spec: NightlySpec, date: Date | None = None, listen: Listener = silent) -> Night:
    """Do the night of `date` (default: today) and write it down below <out>/nights.

    Raises ConfigError, LeaseError while another night goes on, InfrastructureError (run again).
    """
    out = storage.place(spec.out)
    out.mkdir(parents=True, exist_ok=True)
    with lease(out):
        state = State.read(out)
        name = _name(state, date or Date.today())
        work = _work(spec, out, listen)
        listing = list_sources(spec, {**state.waiting, **{uri: entry.seen for uri, entry in state.slides.items()}})
        tonight = compare(spec, state, listing, name)
        chosen, turn = _chosen(spec, state, tonight, work.how)
        ended = _scored(work, [tonight.items[uri] for uri in chosen])
        entries = _remembered(state, tonight, chosen, ended, work.how)
        night = _told(work, name, state, tonight, entries, listing, chosen, turn)
        night = _judged(work, night, tonight, entries)
        state.slides, state.nights = entries, [*state.nights, name]
        state.waiting = {uri: listing.slides[uri].seen for uri, kind in tonight.kinds.items() if kind == "waiting"}
        report = _report(work, name) if chosen else ""
        if not chosen:
            work.notes.append("no slide of the source is scored by the bundles in service, so there is no report")
        pruned = prune(spec, out, state, scored=bool(chosen))
        night = replace(night, pruned=pruned, report=report, notes=tuple(work.notes))
        _write(out, night)
        state.write(out)
        if night.drifted:
            raise_alert(spec.alert, out / NIGHTS / name, name, night.drifted)
    return night


def _name(state: State, date: Date) -> str:
    """The night's name: its date, with a number where that date has had one already."""
    name, n = date.isoformat(), 1
    while name in state.nights:
        n += 1
        name = f"{date.isoformat()}-{n}"
    return name


def _work(spec: NightlySpec, out: Path, listen: Listener) -> _Work:
    """Take the bundles that are in service now, for the whole night."""
    run_spec = resolved(spec.run, listen).model_copy(update={"cohort": "", "out": str(out / RESULTS)})
    models = tuple((card.name, forward) for _, card, forward in load_models(run_spec))
    return _Work(spec, out, run_spec, models, digest([models, wanted(run_spec)]), listen)


def _chosen(spec: NightlySpec, state: State, tonight: Tonight, how: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what is scored, or known to be scored so, tonight; and what waits because the budget is spent.

    New and changed slides always are; of those that other bundles scored the latest that came go first.
    """
    turn = [uri for uri, entry in tonight.entries.items() if entry.status == "done" and entry.how != how]
    turn.sort(key=lambda uri: tonight.entries[uri].since, reverse=True)
    late = frozenset(turn[spec.rescore :] if spec.rescore is not None else ())
    return tuple(uri for uri in tonight.items if uri not in late), tuple(uri for uri in turn if uri in late)


def _scored(work: _Work, items: Sequence[Item]) -> dict[str, accounting.Ended]:
    if not items:
        return {}
    check_unique(items)
    result = run(work.run, items, work.listen)
    return {ended.slide_id: ended for ended in result.ended}


def _remembered(
    state: State, tonight: Tonight, chosen: Sequence[str], ended: Mapping[str, accounting.Ended], how: str
) -> dict[str, Entry]:
    """What is kept of each slide: also of one that waits what was known before."""
    entries = dict(tonight.entries)
    for uri in chosen:
        end, entry = ended[entries[uri].slide_id], entries[uri]
        failures = 0 if end.status == "done" else entry.failures + 1
        done = {"status": end.status, "code": end.code, "message": end.message, "failures": failures}
        entries[uri] = Entry(**{**vars(entry), **done, "how": how if end.status == "done" else ""})
    waiting = {
        uri: state.slides[uri] for uri, kind in tonight.kinds.items() if kind == "waiting" and uri in state.slides
    }
    return entries | waiting


def _told(
    work: _Work,
    name: str,
    state: State,
    tonight: Tonight,
    entries: Mapping[str, Entry],
    listing: Listing,
    chosen: Sequence[str],
    turn: Sequence[str],
) -> Night:
    def ids(kind: str) -> tuple[str, ...]:
        return tuple(entries[uri].slide_id for uri, k in tonight.kinds.items() if k == kind)

    stale = [uri for uri in chosen if tonight.entries[uri].status == "done" and tonight.entries[uri].how != work.how]
    night = Night(
        name=name,
        missed=_missed(state, name),
        source=tonight.counts,
        accounted=_accounted(tonight, entries, chosen, turn),
        others=listing.others,
        new=ids("new"),
        changed=ids("changed"),
        renamed=ids("renamed"),
        removed=tuple(entry.slide_id for entry in tonight.removed.values()),
        rescored=tuple(entries[uri].slide_id for uri in stale if tonight.kinds[uri] != "changed"),
        unusable=listing.unusable,
        waiting={uri: why for uri, why in tonight.why.items() if tonight.kinds[uri] == "waiting"}
        | dict.fromkeys(turn, TURN),
        duplicates={uri: why for uri, why in tonight.why.items() if tonight.kinds[uri] == "duplicate"},
        ended={
            entries[uri].slide_id: {key: vars(entries[uri])[key] for key in ("status", "code", "message", "failures")}
            for uri in chosen
            if entries[uri].status != "done"
        },
        models=work.models,
    )
    if sum(night.accounted.values()) != sum(night.source.values()):
        raise UnexpectedError(f"{night.source} slides of the source, {night.accounted} accounted for.")
    return night


def _accounted(
    tonight: Tonight, entries: Mapping[str, Entry], chosen: Sequence[str], turn: Sequence[str]
) -> dict[str, int]:
    found = Counter(entries[uri].status for uri in chosen)
    statuses = {status: found[status] for status in ("done", "failed", "refused")}
    kinds = tonight.counts
    return {**statuses, "duplicate": kinds["duplicate"], "waiting": kinds["waiting"], "turn": len(turn)}


def _missed(state: State, name: str) -> tuple[str, ...]:
    """The dates between the last night and this one."""
    if not state.nights:
        return ()
    last, now = (Date.fromisoformat(text[:10]) for text in (state.nights[-1], name))
    return tuple((last + timedelta(days=n)).isoformat() for n in range(1, (now - last).days))


# drift


def _judged(work: _Work, night: Night, tonight: Tonight, entries: Mapping[str, Entry]) -> Night:
    """Compare tonight's slides, and the latest ones, with the reference."""
    came = {*night.new, *night.changed}
    if work.spec.reference is None or not came:
        return night  # the same slides would raise the same alarm every night
    old = _measured(work.out / REFERENCE, _reference(work))
    done = [entry for entry in entries.values() if entry.status == "done" and entry.how == work.how]
    latest = [e.slide_id for e in sorted(done, key=lambda e: e.since)][-work.spec.drift.window :]
    came = {e.slide_id for e in done if e.slide_id in came}
    new = _measured(work.out / RESULTS, dict.fromkeys([*came, *latest]))
    judged = drift.compare([new[i] for i in came if i in new], list(old.values()), work.spec.drift) if came else ()
    again = drift.compare([new[i] for i in latest if i in new], list(old.values()), work.spec.drift)
    far = drift.outlying({i: new[i] for i in came if i in new}, list(old.values()), work.spec.drift)
    return replace(night, tonight=judged, latest=() if set(came) == set(latest) else again, outlying=far)


def _reference(work: _Work) -> dict[str, None]:
    """Return the slides of the reference, scored with tonight's bundles; they are scored when either is new."""
    reference = work.spec.reference
    if reference is None:
        return {}
    items = [item for item in read_cohort(reference.cohort) if item.split == reference.split]
    if not items:
        raise ConfigError(f"{reference.cohort} has no slide of split {reference.split!r} to compare with.")
    out = work.out / REFERENCE
    made_of = digest([work.how, [item.written() for item in items]])
    if storage.read_json(out / "made_of.json") != made_of:
        run(work.run.model_copy(update={"out": str(out)}), items, work.listen)
        storage.write_atomic(out / "made_of.json", storage.to_json(made_of))
    ended = accounting.read_run(out)["outcomes"].values()
    if bad := [one["slide_id"] for one in ended if one["status"] != "done"]:
        work.notes.append(f"reference slides that could not be scored: {', '.join(bad)}")
    return dict.fromkeys(one["slide_id"] for one in ended if one["status"] == "done")


def _measured(out: Path, slides: Mapping[str, None]) -> dict[str, dict[str, float]]:
    if not slides:
        return {}
    record = accounting.read_run(out)
    outcomes = record["outcomes"]
    return {s: drift.measures_of(out, outcomes[s], record["models"]) for s in slides if s in outcomes}


# the record


def _report(work: _Work, name: str) -> str:
    """Evaluate the cohort so far where it has labels, and keep its report with the night; return where."""
    from slideflow_ray.report import write_report

    out = work.out / RESULTS
    if not (out / "run.json").exists():
        return ""
    try:
        evaluate(out)
    except SlideflowError as error:
        work.notes.append(f"no evaluation: {error.message}")
    try:
        page = write_report(out)
    except SlideflowError as error:
        work.notes.append(f"no report: {error.message}")
        return ""
    path = work.out / NIGHTS / name / "report.html"
    storage.write_atomic(path, page.read_bytes())
    return str(path)


def _write(out: Path, night: Night) -> None:
    from slideflow_ray.nightly.page import render

    folder = out / NIGHTS / night.name
    storage.write_atomic(folder / "night.html", render(night).encode())
    storage.write_atomic(folder / "night.json", storage.to_json(night.to_json()))

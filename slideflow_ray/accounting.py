"""How every item of a cohort ended: exactly one of done, failed(code), refused(code)."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slideflow_ray import storage
from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError, SlideflowError
from slideflow_ray.lease import held
from slideflow_ray.pipeline import Context
from slideflow_ray.remote import look
from slideflow_ray.specs import OBJECTS, RunSpec, WholeSpec, digest
from slideflow_ray.store import folder_name
from slideflow_ray.texts import safe_row


@dataclass(frozen=True)
class Ended:
    """How an item ended. `status` is done, failed or refused; `outcome` says more about done.

    `why` says what changed where it had results before, `nodes` what is committed of it. `laid` are the slide's
    grids, `grids` the pairs (grid, model) that are scored. An image that is scored in one piece is row `row` of the
    store `pack`, and `packed` are the pairs there.
    """

    slide_id: str
    status: str
    outcome: str = ""
    tiles: int = 0
    identity: str = ""
    laid: tuple[str, ...] = ()
    grids: tuple[tuple[str, str], ...] = ()
    code: str = ""
    message: str = ""
    next_step: str = ""
    pack: str = ""
    row: int = -1
    packed: tuple[tuple[str, str], ...] = ()
    why: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


def failed(slide_id: str, error: SlideflowError) -> Ended:
    """Return the end that an error makes."""
    status = "refused" if error.refused else "failed"
    return Ended(slide_id, status, code=error.code, message=error.message, next_step=error.step)


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `changed` is False when everything was there already; `packs` are the nodes of each pack."""

    ended: tuple[Ended, ...]
    changed: bool
    seconds: float
    packs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Items by status; the three add up to the cohort."""
        found = Counter(item.status for item in self.ended)
        return {status: found[status] for status in ("done", "failed", "refused")}


# failures are results: each is written when it happens, so a killed run keeps what it learned


def _note(out: Path, slide_id: str) -> Path:
    return out / "failures" / f"{folder_name(slide_id)}.json"


def note_failure(out: Path, item: Item, ended: Ended, wanted: str) -> None:
    """Write down that an item failed or was refused, and what its row, its file and the run were then.

    `wanted` is a digest of what the run wanted of its slides (tiles, scales): another run may
    want what a slide can give.
    """
    record = {"ended": asdict(ended), "item": item.written(), "seen": _seen(item), "wanted": wanted}
    storage.write_atomic(_note(out, item.slide_id), storage.to_json(record))


def failed_before(out: Path, items: Sequence[Item], *, refused: bool) -> frozenset[str]:
    """Return the items that failed in an earlier run, those that were `refused` too if wanted."""
    notes = {item.slide_id: storage.read_json(_note(out, item.slide_id)) for item in items}
    wanted = {"failed", "refused"} if refused else {"failed"}
    return frozenset(slide_id for slide_id, note in notes.items() if note and note["ended"]["status"] in wanted)


def forget_failure(out: Path, slide_id: str) -> None:
    """Take the note back: the item is done now."""
    _note(out, slide_id).unlink(missing_ok=True)


def refused_before(out: Path, items: Sequence[Item], wanted: str) -> dict[str, Ended]:
    """Return the items that were refused earlier, where row, file and what is wanted are as they were then."""
    known = {}
    for item in items:
        record = storage.read_json(_note(out, item.slide_id))
        if record and record["ended"]["status"] == "refused" and _as_it_was(item, record, wanted):
            known[item.slide_id] = Ended(**{**record["ended"], "laid": (), "grids": ()})
    return known


def _as_it_was(item: Item, record: dict[str, Any], wanted: str) -> bool:
    same = record["item"] == item.written() and record["seen"] == _seen(item)
    return bool(same and record["wanted"] == wanted)


def _seen(item: Item) -> list[int] | None:
    """Size and modification time: what tells whether a refused file was replaced."""
    try:
        if storage.is_remote(item.uri):
            seen = look(item.uri)
            return [seen.size, int(seen.identity[:12], 16)]
        stat = storage.local_path(item.uri).stat()
    except (OSError, ConfigError):
        return None
    return [stat.st_size, stat.st_mtime_ns]


# the record of a run


def write_run(out: Path, spec: RunSpec, items: Sequence[Item], context: Context, result: RunResult | None) -> None:
    """Write run.json (with a result: how everything ended) and failures.csv."""
    models = [
        {
            "name": model.name,
            "node": model.node,
            "task": model.task,
            "classes": model.classes,
            "tile_px": model.tile.tile_px,
            "mpp": None if isinstance(model.tile, WholeSpec) else model.tile.mpp,
            "on": model.spec.on or ("whole" if model.whole else "tissue"),
            "path": model.spec.path,
            "digest": model.digest,
            "service": model.spec.service,
        }
        for model in context.models
    ]
    record = {
        "spec": spec.model_dump(mode="json"),
        "items": [item.written() for item in items],
        "models": models,
        "profile": context.profile.model_dump(mode="json") if context.profile else None,
        "profile_digest": context.profile.digest() if context.profile else None,
        "finished": result is not None,
        "outcomes": {ended.slide_id: asdict(ended) for ended in result.ended} if result else {},
        "packs": result.packs if result else {},
        "counts": result.counts if result else {},
        "seconds": round(result.seconds, 3) if result else None,
    }
    storage.write_atomic(out / "run.json", storage.to_json(record))
    if result:
        storage.write_atomic(out / "failures.csv", _failures(result).encode())


def _failures(result: RunResult) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide_id", "status", "code", "message", "next_step"])
    for e in result.ended:
        if e.status != "done":
            writer.writerow(safe_row([e.slide_id, e.status, e.code, e.message.splitlines()[0], e.next_step]))
    return text.getvalue()


def read_run(out: Path) -> dict[str, Any]:
    """Return run.json. Raises ConfigError where there is none: no run, or one that got no further than its start."""
    record: dict[str, Any] | None = storage.read_json(out / "run.json")
    if record is not None:
        return record
    if not any((out / name).exists() for name in STARTED):
        step = "Name a folder that `slideflow-ray run --out` has made."
        raise ConfigError(f"{out} is not the output folder of a run: it has no run.json.", next_step=step)
    step = "It is under way: ask again in a while." if held(out) else "Run the same command again: it resumes."
    raise ConfigError(f"A run was started in {out} and has recorded nothing yet.", next_step=step)


def run_digest(record: Mapping[str, Any]) -> str:
    """Return a digest of what an evaluation of a run is of: items, what is scored of them, models, profile, labels.

    A rerun that found nothing to do leaves it as it is. Not in it are the failures' texts, how long the run took, and
    where the slides lie: what a scored file is, its identity says.
    """
    kept = ("status", "tiles", "identity", "grids", "pack", "row", "packed")
    return digest(
        {
            "items": [{k: v for k, v in {"modality": "he", **item}.items() if k != "uri"} for item in record["items"]],
            "outcomes": {slide_id: [o.get(key) for key in kept] for slide_id, o in record["outcomes"].items()},
            "models": [[m["node"], m["name"], m["task"], list(m["classes"])] for m in record["models"]],
            "profile": record["profile_digest"],
            "labels": record["spec"].get("labels"),
        }
    )


STARTED = ("lease.json", "commits", "profiles")
"""What a run writes before run.json."""


def status(out: Path) -> dict[str, Any]:
    """Return how many items have ended how so far, in a run that goes on or is over."""
    record = read_run(out)
    notes = [storage.read_json(_note(out, item["slide_id"])) for item in record["items"]]
    failures = [note["ended"] for note in notes if note]
    by_status = Counter(failure["status"] for failure in failures)
    if record["finished"]:
        done = record["counts"]["done"]
    else:
        done = sum(_is_done(out, item, record) for item in record["items"])
    return {
        "state": "running" if held(out) else "finished" if record["finished"] else "interrupted",
        "slides": len(record["items"]),
        "done": done,
        "failed": by_status["failed"],
        "refused": by_status["refused"],
        "failures": failures,
    }


def _is_done(out: Path, item: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether what the run wants of an item is committed: every model's scores, or a grid without tissue."""
    commits = out / "commits" / folder_name(item["slide_id"])
    models = zip(record["models"], record["spec"]["model"], strict=True)
    wanted = [m["node"] for m, spec in models if all(item[column] == value for column, value in spec["where"].items())]
    if not wanted:
        return False  # no model applies, or tiles only: known when the run ends
    outcomes = {storage.read_json(path)["outcome"] for path in commits.glob("grids/*.json")}
    if "no_objects" in outcomes:
        on_objects = {m["node"] for m in record["models"] if m["on"].startswith(OBJECTS)}
        wanted = [node for node in wanted if node not in on_objects]
    kinds = ("scores", "planes", "features")
    return "no_tissue" in outcomes or all(
        any(path for kind in kinds for path in commits.glob(f"{kind}/*/{node}.json")) for node in wanted
    )

"""Repair: what `verify` names is taken away, unit by unit, so that the same run makes that anew and nothing else.

A unit of rows is one chunk: deleted with its node's commit, it is what is left to do. Any other node (a grid,
a mask, a heatmap, a plane, objects) is written in one piece and is deleted whole. Everything stored is
determined by its inputs, so what comes back has the bytes that were lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slideflow_ray import storage
from slideflow_ray.accounting import read_run
from slideflow_ray.errors import CorruptStore
from slideflow_ray.lease import lease
from slideflow_ray.store import Damage, SlideStore, committed_stores, damages

ROWS = ("scores", "features", "masks", "focus", "outcomes")
"""Kinds of node whose chunks are units of their own; so are a grid's tiles."""
NOTES = ("run.json", "failures/*.json", "profiles/*.json", ".cache/**/*.json")
"""What a run writes beside stores and commits, and writes again where it is gone."""


@dataclass(frozen=True)
class Repaired:
    """What was wrong, one sentence each, and how many units (chunks, nodes, notes) were taken away or restored."""

    wrong: tuple[str, ...]
    units: tuple[str, ...]


def verify(out: str | Path) -> tuple[int, list[str]]:
    """Compare all that is committed below `out` with the disk; return how many nodes, and what is wrong.

    Beyond what commits say: notes that cannot be read, and nodes that a finished run had committed and that are
    committed no more.
    """
    nodes, found = damages(out)
    lost = [f"{slide_id}: {node} is not committed any more." for slide_id, node in _uncommitted(storage.place(out))]
    return nodes, [*(damage.text for damage in found), *(text for _, text in _broken_notes(storage.place(out))), *lost]


def repair(out: str | Path) -> Repaired:
    """Take away what is broken below `out`; the same run then makes it anew.

    Raises LeaseError while a run holds the folder.
    """
    out = storage.place(out)
    with lease(out):
        _, found = damages(out)
        units = [f"{store.slide_id}: {key}" for store in committed_stores(out) for key in store.restore_groups()]
        units += [unit for damage in found if damage.node for unit in _discard(damage)]
        notes = list(_broken_notes(out))
        for path, _ in notes:
            path.unlink(missing_ok=True)
    wrong = [*(damage.text for damage in found), *(text for _, text in notes)]
    return Repaired(tuple(wrong), tuple(dict.fromkeys([*units, *(str(p.relative_to(out)) for p, _ in notes)])))


def _discard(damage: Damage) -> Iterator[str]:
    """Delete the unit that a damage lies in, and take its node's commit back; yield its name."""
    store, node = damage.store, damage.node
    key = damage.key if node.split("/")[0] in ROWS or _is_tiles(node) else ""
    store.discard(node, key)
    yield f"{store.slide_id}: {key or node}"


def _is_tiles(node: str) -> bool:
    return node.startswith("grids/") and node.endswith("/tiles")


def _broken_notes(out: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(path for pattern in NOTES for path in out.glob(pattern)):
        try:
            storage.read_json(path)
        except CorruptStore as error:
            yield path, error.message


def _uncommitted(out: Path) -> Iterator[tuple[str, str]]:
    """What a run has committed of the slides that are done, where the commit is gone."""
    try:
        record: dict[str, Any] = read_run(out)
    except CorruptStore:
        return
    done = {slide_id: e["nodes"] for slide_id, e in record["outcomes"].items() if e["status"] == "done"}
    for folder, nodes in {**done, **record["packs"]}.items():
        store = SlideStore(out, folder)
        yield from ((folder, node) for node in nodes if not store.has_commit(node))

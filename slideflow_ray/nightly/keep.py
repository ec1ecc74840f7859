"""Pruning: folders of old nights, and scores that nothing refers to any more, if the settings say so."""

from __future__ import annotations

import shutil
from pathlib import Path

from slideflow_ray import storage
from slideflow_ray.accounting import read_run
from slideflow_ray.errors import ConfigError
from slideflow_ray.nightly.spec import NIGHTS, RESULTS, NightlySpec
from slideflow_ray.nightly.state import State
from slideflow_ray.store import SlideStore, committed_stores

KINDS = ("scores", "features", "masks", "planes", "objects", "heatmaps")
"""Kinds of node that a model has made."""


def prune(spec: NightlySpec, out: Path, state: State, scored: bool) -> tuple[str, ...]:
    """Delete what the settings let go; return what, by path or node. `scored`: whether tonight had a run."""
    gone = _old_nights(out, spec.keep.nights, state)
    return (*gone, *_superseded(out)) if scored and not spec.keep.superseded else gone


def _old_nights(out: Path, keep: int, state: State) -> tuple[str, ...]:
    if not keep or storage.is_remote(out):
        return ()
    old = [name for name in state.nights[:-keep] if (out / NIGHTS / name).is_dir()]
    for name in old:
        shutil.rmtree(out / NIGHTS / name)
    return tuple(f"{NIGHTS}/{name}" for name in old)


def _superseded(out: Path) -> tuple[str, ...]:
    """Take away results of slides whose latest run has better ones; a slide that waits for its turn keeps its own."""
    try:
        record = read_run(out / RESULTS)
    except ConfigError:
        return ()
    gone = []
    for store in committed_stores(out / RESULTS):
        outcome = record["outcomes"].get(store.slide_id)
        if outcome is None or outcome["status"] != "done":
            continue  # a pack, or a slide that is not of the cohort so far: what it has may be all there is
        kept = {(grid, model) for grid, model in outcome["grids"]}
        gone += [f"{store.slide_id}: {node}" for node in _loose(store, kept)]
    return tuple(gone)


def _loose(store: SlideStore, kept: set[tuple[str, str]]) -> list[str]:
    loose = []
    for kind in KINDS:
        for node in store.nodes(kind):
            _, grid, name = node.split("/", 2)
            if not any(grid == g and name.startswith(model) for g, model in kept):
                store.discard(node)
                loose.append(node)
    return loose

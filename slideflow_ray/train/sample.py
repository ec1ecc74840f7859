"""Which labelled tiles an epoch shows, and how often: thinned by class, balanced, hard ones more often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slideflow_ray.cases import Model, parts_of, read_run
from slideflow_ray.errors import ConfigError
from slideflow_ray.store import SlideStore
from slideflow_ray.train.spec import MineSpec
from slideflow_ray.train.tiles import LabelledChunk

Labels = npt.NDArray[np.int64]
Times = npt.NDArray[np.float64]
Rows = npt.NDArray[np.bool_]


def thin(labels: Labels, rowcol: npt.NDArray[np.int32], classes: Sequence[str], stride: Mapping[str, int]) -> Labels:
    """Return the labels with -1 for tiles that their class's stride leaves out.

    labels : int64 (n,), -1 unknown; rowcol : int32 (n, 2), the tile's cell. Kept are the cells whose row and column
    are both multiples of the class's stride: one tile in stride squared.
    """
    every = np.array([stride.get(name, 1) for name in classes])[labels]
    kept = (rowcol[:, 0] % every == 0) & (rowcol[:, 1] % every == 0)
    return np.where(kept, labels, -1)


def balanced(chunks: Sequence[LabelledChunk], classes: Sequence[str]) -> list[LabelledChunk]:
    """Return the chunks with tiles of rare classes coming so often that each class weighs as much as the largest."""
    weight = np.zeros(len(classes))
    for c in chunks:
        known = c.labels >= 0
        weight += np.bincount(c.labels[known], _times(c)[known], len(classes))
    factor = np.divide(weight.max(initial=0.0), weight, out=np.ones(len(classes)), where=weight > 0)
    return [replace(c, times=_times(c) * factor[c.labels]) for c in chunks]


def _times(c: LabelledChunk) -> Times:
    return np.ones(len(c.labels)) if c.times is None else c.times


@dataclass(frozen=True)
class Mined:
    """The hard tiles of a run: by slide, the boxes (x, y, w, h in px0) that its model has taken for another class."""

    tiles: int
    scored: int
    times: int
    hard: Mapping[str, frozenset[tuple[int, ...]]]

    def times_of(self, slide_id: str, boxes_px0: npt.NDArray[np.int64]) -> Times:
        """Return how often each tile comes, float (n,), for boxes int64 (n, 4)."""
        hard = self.hard.get(slide_id, frozenset())
        return np.array([self.times if tuple(box) in hard else 1 for box in boxes_px0.tolist()], np.float64)


def mine(spec: MineSpec, classes: Sequence[str], labels: Mapping[str, tuple[npt.NDArray[np.int64], Labels]]) -> Mined:
    """Return the hard tiles among `labels` (slide_id -> boxes int64 (n, 4), class indices (n,)) by a run's scores.

    Raises ConfigError where the run has no scores of these classes for any of the tiles: it must have scored the
    training slides with tiles of the same size, scale and place.
    """
    run = read_run(Path(spec.run))
    model = _model(run.models, spec, classes)
    hard: dict[str, frozenset[tuple[int, ...]]] = {}
    scored = 0
    for part in parts_of(run, model):
        if part.slide_id not in labels:
            continue
        margins, own = part.margins(), boxes_px0(part.store, part.grid)
        own = own[part.row : part.row + 1] if part.pack else own
        here = {tuple(box): row for row, box in enumerate(own.tolist())}
        boxes, truth = labels[part.slide_id]
        rows = np.array([here.get(tuple(box), -1) for box in boxes.tolist()], np.int64)
        known = (rows >= 0) & (truth >= 0)
        scored += int(known.sum())
        wrong = known.copy()
        wrong[known] = margins[rows[known]].argmax(axis=1) != truth[known]
        hard[part.slide_id] = frozenset(tuple(box) for box in boxes[wrong].tolist())
    if not scored:
        raise ConfigError(
            f"The run in {spec.run} has scored none of the training tiles, so none can be called hard.",
            next_step="Score the training slides too (the run's cohort), with a bundle of this tile_px and mpp.",
        )
    return Mined(sum(map(len, hard.values())), scored, spec.times, hard)


def _model(models: Sequence[Model], spec: MineSpec, classes: Sequence[str]) -> Model:
    fit = [m for m in models if m.task == "classify" and m.classes == tuple(classes) and spec.model in (None, m.name)]
    if len(fit) == 1:
        return fit[0]
    there = ", ".join(f"{m.name} ({', '.join(m.classes)})" for m in models) or "none"
    raise ConfigError(
        f"{len(fit)} models of the run in {spec.run} tell {', '.join(classes)} apart; its models: {there}.",
        next_step="Name one of them in sample.mine.model.",
    )


def boxes_px0(store: SlideStore, grid: str) -> npt.NDArray[np.int64]:
    """Return a grid's boxes, int64 (n, 4): x, y, width, height in px0."""
    xy, wh = (store.read(f"grids/{grid}/{name}") for name in ("xy_px0", "wh_px0"))
    return np.concatenate([xy.astype(np.int64), wh.astype(np.int64)], axis=1)

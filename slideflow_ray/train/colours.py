"""Stain normalisation of a training: the slides' fits, a target for each stain, tiles in its colours."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError, SlideflowError
from slideflow_ray.packs import Pack
from slideflow_ray.pipeline import Context, fit_stains
from slideflow_ray.stain import Stained, StainFit, StainTarget, nearest_median, stain_numbers, unstated
from slideflow_ray.staining import Fits
from slideflow_ray.train.spec import TrainJob
from slideflow_ray.train.tiles import LabelledChunk

Targets = dict[str, StainTarget]
Chunks = dict[str, list[LabelledChunk]]


def check_stated(job: TrainJob, items: Sequence[Item]) -> None:
    """Raise ConfigError where a training of several stains has slides whose rows do not say theirs."""
    unsaid = [item.slide_id for item in items if not item.says_stain]
    if job.stain is None or not unsaid or len(stain_numbers(items)) < 2:
        return
    error = unstated(f"{', '.join(unsaid[:5])}{', ...' if len(unsaid) > 5 else ''} ({len(unsaid)} slides)")
    raise ConfigError(f"{error.code}: {error.message}", next_step=error.step)


def coloured(job: TrainJob, context: Context, chunks: Chunks) -> tuple[Chunks, Targets | None]:
    """Return the chunks with the fits of their slides and the target of their stain, and the targets for the card.

    A target is the slide or crop that `job.stain_target` names for the stain, or else the one of the train split whose
    fit is nearest the median of them all. Crops whose stains cannot be told are left out.
    Raises ConfigError for a slide whose stains cannot be told, and a stain without a slide in train.
    """
    if job.stain is None:
        return chunks, None
    units = {c.chunk.item.slide_id: c.chunk.item for several in chunks.values() for c in several if c.used.any()}
    fits = _fitted(job, context, list(units.values()))
    candidates = [found for c in chunks["train"] for found in _named(c, fits.get(c.chunk.item.slide_id))]
    targets = _targets(job, candidates)
    every = {
        split: [_one(context, c, fits.get(c.chunk.item.slide_id), targets) for c in several]
        for split, several in chunks.items()
    }
    return every, targets


def _fitted(job: TrainJob, context: Context, units: Sequence[Item | Pack]) -> Mapping[str, Fits]:
    method = job.stain
    if method is None:
        return {}

    def fit(unit: Item | Pack) -> Fits | SlideflowError:
        try:
            return fit_stains(context, unit, (method, job.stain_lam))
        except SlideflowError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip([unit.slide_id for unit in units], pool.map(fit, units), strict=True))
    if bad := [f"{name}: {error}" for name, error in found.items() if isinstance(error, SlideflowError)]:
        text = f"The stains of {len(bad)} slides cannot be told: {'; '.join(bad[:5])}"
        raise ConfigError(text, next_step="Mend or drop these rows, or train without `stain`.")
    return {name: fits for name, fits in found.items() if isinstance(fits, Fits)}


def _named(c: LabelledChunk, fits: Fits | None) -> Iterator[tuple[str, str, StainFit]]:
    """The stain, the slide or crop, and the fit of what a chunk shows: of a slide, or of each crop with a label.

    Crops of the other splits lie in the same packs, without a label here, and are no candidates.
    """
    unit = c.chunk.item
    if fits is None or not c.used.any():
        return
    names = [(row.item.slide_id, i) for i, row in enumerate(unit.rows)] if isinstance(unit, Pack) else []
    known = set((c.start + np.flatnonzero(c.used)).tolist())
    shown = [(name, i) for name, i in names if i in known] or ([] if names else [(unit.slide_id, 0)])
    for name, i in shown:
        if isinstance(fit := fits.rows[i], StainFit):
            yield fits.stain, name, fit


def _targets(job: TrainJob, candidates: Sequence[tuple[str, str, StainFit]]) -> Targets:
    if not candidates or job.stain is None:
        raise ConfigError("No slide of the train split has stains that can be told.")
    targets = {}
    for stain in sorted({stain for stain, _, _ in candidates}):
        mine = {name: fit for other, name, fit in candidates if other == stain}
        wanted = job.stain_target.get(stain)
        if wanted is not None and wanted not in mine:
            raise ConfigError(f"stain_target.{stain} is {wanted!r}, which is no {stain} item of the train split.")
        groups = {fit: name for name, fit in reversed(mine.items())}  # crops of one group share a fit: the first's name
        fit = mine[wanted] if wanted else list(groups)[nearest_median(list(groups))]
        values = {"method": job.stain, "stain": stain, "fit": fit, "lam": job.stain_lam}
        targets[stain] = StainTarget.model_validate({**values, "source": wanted or groups[fit]})
    if unknown := sorted(set(job.stain_target) - set(targets)):
        raise ConfigError(f"stain_target names {', '.join(unknown)}; train has {', '.join(targets)}.")
    return targets


def _one(context: Context, c: LabelledChunk, fits: Fits | None, targets: Targets) -> LabelledChunk:
    if fits is None:
        return c
    if fits.stain not in targets:
        raise ConfigError(f"{c.chunk.item.slide_id} is stained {fits.stain}, of which train has no slide.")
    target = targets[fits.stain]
    if not isinstance(c.chunk.item, Pack):
        return replace(c, colours=(Stained(fits.stain, tuple(f for f in fits.rows if isinstance(f, StainFit))), target))
    start = c.chunk.index * context.store.rows(c.chunk.tile.tile_px)
    rows = fits.rows[start : start + c.chunk.tiles]
    good = np.array([isinstance(fit, StainFit) for fit in rows])
    # a row that is left out has the target's own fit, which nobody sees
    stained = Stained(fits.stain, tuple(fit if isinstance(fit, StainFit) else target.fit for fit in rows))
    keep = good.reshape(-1, *[1] * (c.labels.ndim - 1))
    return replace(c, labels=np.where(keep, c.labels, -1), colours=(stained, target))

"""From a cohort to a bundle: tile the labelled slides, train, keep the best epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slideflow_ray.accounting import RunResult
from slideflow_ray.annotations import slide_labels
from slideflow_ray.cohort import Item, check_splits, read_cohort
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import EpochTrained, Listener, silent
from slideflow_ray.models.bundle import BundleCard, write_bundle
from slideflow_ray.pipeline import Chunk, Context
from slideflow_ray.run import run
from slideflow_ray.specs import ExecutorSpec, LabelSpec, RunSpec, Spec, StoreSpec, TileSpec, TissueSpec
from slideflow_ray.store import SlideStore
from slideflow_ray.train.loop import EpochResult, Trained, TrainSpec, fit
from slideflow_ray.train.tiles import ChunkTiles, LabelledChunk, class_indices

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TrainJob(Spec):
    """Everything a training is told. `out` is the bundle, `work` where the tiles are kept."""

    cohort: str
    out: str
    work: str
    classes: tuple[str, ...]
    tile: TileSpec
    fit: TrainSpec = TrainSpec()
    tissue: TissueSpec = TissueSpec()
    store: StoreSpec = StoreSpec()
    executor: ExecutorSpec = ExecutorSpec()
    labels: LabelSpec = LabelSpec()
    overwrite: bool = False


@dataclass(frozen=True)
class TrainResult:
    """Where the bundle is, and how the training went."""

    bundle: Path
    trained: Trained
    tiles: dict[str, int]

    def summary(self) -> str:
        """Return a few lines for people."""
        best = self.trained.history[self.trained.best_epoch]
        counts = ", ".join(f"{n} {split} tiles" for split, n in self.tiles.items())
        line = f"trained on {counts}; best epoch {best.epoch + 1} of {len(self.trained.history)}"
        if best.val:
            line += f": val loss {best.val.loss:.4f}, accuracy {best.val.accuracy:.3f}, AUC {best.val.auc:.4f}"
        return f"{line}\nBundle: {self.bundle}"


def train(job: TrainJob, listen: Listener = silent) -> TrainResult:
    """Train on the cohort's train split, keep the epoch of lowest loss on val, write the bundle.

    The slides are planned, tiled and read by the same run and pipeline that score them.
    Raises ConfigError (no train slides, a class without tiles, a slide that cannot be
    read), SplitLeakError.
    """
    items = [item for item in read_cohort(job.cohort) if item.split in ("train", "val")]
    if not any(item.split == "train" for item in items):
        raise ConfigError(f"{job.cohort} has no rows with split = train.")
    card = BundleCard.parse(
        {
            "name": Path(job.out).name,
            "task": "classify",
            "architecture": job.fit.architecture,
            "arguments": job.fit.arguments,
            "classes": job.classes,
            "tile_px": job.tile.tile_px,
            "mpp": job.tile.mpp,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "description": f"trained on {Path(job.cohort).name}",
        },
        "the bundle to be written",
    )
    if Path(job.out).exists() and not job.overwrite:
        raise ConfigError(f"{job.out} exists already.", next_step="Choose another --out, or say --overwrite.")
    context, result = _tile(job, items, listen)
    check_splits(items, {ended.slide_id: ended.identity for ended in result.ended})
    sources = {
        split: ChunkTiles(context, _labelled(job, context, [i for i in items if i.split == split], result))
        for split in ("train", "val")
    }
    val = sources["val"] if len(sources["val"]) else None
    trained = fit(card, job.fit, sources["train"], val, lambda result: listen(_event(result, job.fit.epochs)))
    write_bundle(Path(job.out), card, trained.state_dict, overwrite=job.overwrite)
    return TrainResult(Path(job.out), trained, {split: len(source) for split, source in sources.items()})


def _event(result: EpochResult, epochs: int) -> EpochTrained:
    val = result.val
    scores = (val.loss, val.auc) if val else (None, None)
    return EpochTrained(result.epoch + 1, epochs, result.train_loss, *scores)


def _tile(job: TrainJob, items: Sequence[Item], listen: Listener) -> tuple[Context, RunResult]:
    spec = RunSpec(
        cohort=job.cohort,
        out=job.work,
        tile=(job.tile,),
        tissue=job.tissue,
        store=job.store,
        executor=job.executor,
    )
    result = run(spec, items, listen)
    if bad := [ended for ended in result.ended if ended.status != "done"]:
        what = "; ".join(f"{ended.slide_id}: {ended.code} {ended.message}" for ended in bad[:5])
        raise ConfigError(f"{len(bad)} slides cannot be trained on: {what}", next_step="Mend or drop these rows.")
    return Context(job.work, (), job.tissue, job.store, (job.tile,)), result


def _labelled(job: TrainJob, context: Context, items: Sequence[Item], result: RunResult) -> list[LabelledChunk]:
    """The chunks of the items' grids with the class of each tile."""
    by_id = {ended.slide_id: ended for ended in result.ended}
    rows = job.store.rows(job.tile.tile_px)
    found = []
    for item in items:
        for grid in by_id[item.slide_id].laid:
            store = SlideStore(context.out, item.slide_id)
            labels = class_indices(slide_labels(store, grid, item, job.classes, job.labels))
            for start in range(0, len(labels), rows):
                part = labels[start : start + rows]
                found.append(LabelledChunk(Chunk(item, grid, job.tile, start // rows, len(part), ()), part))
    return found

"""From a cohort to a bundle: tile the labelled slides, train, keep the best epoch, write down what was done."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slideflow_ray import storage
from slideflow_ray.accounting import RunResult
from slideflow_ray.annotations import slide_labels, unused_names
from slideflow_ray.cohort import Item, check_splits, read_cohort
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import EpochTrained, Listener, Noted, silent
from slideflow_ray.models.bundle import WEIGHTS, BundleCard, write_bundle
from slideflow_ray.pipeline import Chunk, Context
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec, TileSpec, digest
from slideflow_ray.splits import identities_of, known_identities, lone_note, with_splits
from slideflow_ray.stain import stain_name, stain_numbers
from slideflow_ray.store import SlideStore
from slideflow_ray.train.checkpoint import last_epoch, result_of, save_epoch
from slideflow_ray.train.colours import Targets, check_stated, coloured
from slideflow_ray.train.crew import Crew
from slideflow_ray.train.dense import reach, settled, small_core, tiles_said, with_seam
from slideflow_ray.train.images import (
    LEAKING,
    labelled_images,
    leaking_split,
    leaks,
    left_out,
    more_images,
    write_split,
)
from slideflow_ray.train.loop import EpochResult, Trained, fit
from slideflow_ray.train.masks import areas_of, mask_slide, shown_by
from slideflow_ray.train.pretrain import alarm_of, kept
from slideflow_ray.train.record import RECORD, Diary, beside, data_record, training_record, versions, write_folder
from slideflow_ray.train.sample import Mined, balanced, boxes_px0, mine, thin
from slideflow_ray.train.spec import MACHINES, CrewSpec, TrainJob, TrainSpec
from slideflow_ray.train.tiles import ChunkTiles, LabelledChunk, class_indices
from slideflow_ray.train.weights import NOBODY, People, Start, familiar, find_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Chunks = dict[str, list[LabelledChunk]]


@dataclass(frozen=True)
class TrainResult:
    """Where the bundle is, and how the training went; `changed` is False where it was there already."""

    bundle: Path
    history: tuple[EpochResult, ...]
    best_epoch: int
    tiles: dict[str, int]
    changed: bool = True
    leaking: str = ""

    @property
    def best(self) -> EpochResult:
        """The epoch whose weights were kept."""
        return self.history[self.best_epoch]

    def summary(self) -> str:
        """Return a few lines for people."""
        best = self.best
        counts = ", ".join(f"{n} {split} tiles" for split, n in self.tiles.items())
        line = f"trained on {counts}; best epoch {best.epoch + 1} of {len(self.history)}"
        if best.parts and best.val:  # a pre-training: nothing is known that it could be right about
            line += f": val loss {best.val.loss:.4f}"
        elif best.val:
            dice = best.val.dice
            last = f"AUC {_or_none(best.val.auc)}" if dice is None else f"mean Dice {dice:.4f}"
            line += f": val loss {best.val.loss:.4f}, accuracy {best.val.accuracy:.3f}, {last}"
        line = f"{self.leaking}\n{line}" if self.leaking else line
        what, made = ("weights are", self.bundle / WEIGHTS) if best.parts else ("bundle is", self.bundle)
        begin = what.split()[0].capitalize() if self.changed else f"Nothing to do, the {what} there"
        return f"{line}\n{begin}: {made}"

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints; epochs count from 0, as in training.json. What is not defined is None."""
        best = self.best
        val = best.val.said() if best.val else None
        return {
            "bundle": str(self.bundle),
            "changed": self.changed,
            **({"leaking": self.leaking} if self.leaking else {}),
            "tiles": self.tiles,
            "epochs": len(self.history),
            "best_epoch": best.epoch,
            "train_loss": best.train_loss,
            "val": val and {name: None if value is None or math.isnan(value) else value for name, value in val.items()},
        }


def _or_none(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.4f}"


@dataclass(frozen=True)
class Data:
    """What a training reads: chunks with labels by split, the identities of their slides, and its stain targets.

    held : whom it must not have seen, the cohort's split test, labelled or not
    """

    context: Context
    chunks: Chunks
    identities: Mapping[str, str]
    leaking: str = ""
    targets: Targets | None = None
    held: People = NOBODY

    @property
    def people(self) -> dict[str, People]:
        """Whose slides are trained on, validated on and held back; of the first two those with labels."""
        used = {split: {i for c in several if c.used.any() for i in c.items} for split, several in self.chunks.items()}
        found = {split: _people(items, self.identities) for split, items in used.items()}
        test = found.get("test", NOBODY)
        return found | {"test": People(test.patients | self.held.patients, test.files | self.held.files)}

    def source(self, split: str) -> ChunkTiles:
        """Return a split's tiles."""
        return ChunkTiles(self.context, self.chunks[split])


def _people(items: Iterable[Item], identities: Mapping[str, str]) -> People:
    items = list(items)
    files = known_identities(items, identities)
    return People(
        frozenset(i.patient for i in items), frozenset(files[i.slide_id] for i in items if i.slide_id in files)
    )


def check_weights(job: TrainJob, data: Data, listen: Listener = silent) -> None:
    """Raise ConfigError where the weights to begin with have seen patients that judge (see `weights.familiar`)."""
    if not leaks(job) and (note := familiar(job.fit.weights, data.people).note):
        listen(Noted(note))


def train(job: TrainJob, listen: Listener = silent, data: Data | None = None, **record: Any) -> TrainResult:
    """Train on the cohort's train split, keep the epoch of lowest loss on val, write the bundle.

    The slides are planned, tiled and read by the same run and pipeline that score them. Killed, it goes on from
    its last checkpoint when called again; when the bundle is there already, nothing is done. `data` is
    what `prepare` returned, where several trainings share it; `record` goes into the training's record.

    Raises ConfigError (no train slides, a class without tiles, a slide that cannot be
    read, weights to begin with that have seen patients of val or test), SplitLeakError, NanScore, DiskFull.
    """
    check_out(job)
    job = settled(job)
    start = find_weights(job.fit)
    for note in filter(None, (small_core(job), start.note)):
        listen(Noted(note))
    data = data or prepare(job, listen)
    check_weights(job, data, listen)
    if not len(data.source("val")):
        listen(Noted("No labelled tiles in split val: nothing is validated, and the last epoch's weights are kept."))
    return (
        _on_ray(job, data, start, listen, record)
        if job.crew.kind == "ray" and job.fit.architecture not in MACHINES
        else _inline(job, data, start, listen, record)
    )


def check_out(job: TrainJob) -> None:
    """Raise ConfigError where what is at the job's `out` is no bundle of a training and must stay."""
    if Path(job.out).exists() and not job.overwrite and not (Path(job.out) / RECORD).is_file():
        raise ConfigError(f"{job.out} exists already.", next_step="Choose another --out, or say --overwrite.")


def card_of(job: TrainJob, targets: Targets | None = None) -> BundleCard:
    """Return the card of the bundle that a job writes, with the targets of `prepare`. Raises ConfigError."""
    job = settled(job)
    if job.task == "pretrain":  # never written: a pre-trained network has no classes, and its card no meaning yet
        job = job.model_copy(update={"task": "segment", "classes": ("background", "object"), "tile": _bare(job)})
    return BundleCard.parse(
        {
            "name": Path(job.out).name,
            "task": job.task,
            "architecture": job.fit.architecture,
            "arguments": job.fit.arguments,
            "classes": job.classes,
            **shape_of(job),
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "stain": targets,
            **({"precision": "fp32"} if job.fit.architecture in MACHINES else {}),  # as its machine was fitted
            "licence": job.licence,
            "description": f"trained on {Path(job.cohort).name}" + (f". {LEAKING}" if leaks(job) else ""),
        },
        "the bundle to be written",
    )


def _bare(job: TrainJob) -> TileSpec | None:
    """The tiles of a pre-training with the least halo that a card may state: nothing is put together from them."""
    return job.tile and job.tile.model_copy(update={"halo_px": reach(job)[0]})


def shape_of(job: TrainJob) -> dict[str, Any]:
    """Return what the card says of tiles: their size and scale, or that images come in one piece."""
    tile = job.shape
    scale = {"mpp": tile.mpp} if isinstance(tile, TileSpec) else {"whole": tile.fit}
    return {"tile_px": tile.tile_px, **scale, **(tiles_said(job) if job.task == "segment" else {})}


# one training


@dataclass(frozen=True)
class _Training:
    """One training with a name of its own: that of the bundle and the digest of all that determines the weights."""

    job: TrainJob
    card: BundleCard
    data: Data
    start: Start
    size: int
    record: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """12 hex digits of network, settings, data, workers and software."""
        card = self.card.model_dump(mode="json", exclude={"name", "description", "licence"})
        with_crew = [self.size, self.job.crew.loaders, self.job.crew.kind]
        data = data_record(self.data.chunks, self.data.identities)["digest"]
        fit = self.job.fit.model_dump(mode="json", exclude={"weights": True, "machine": {"first", "second"}})
        return digest([card, fit, self.start.source, data, with_crew, versions()])

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.card.name}-{self.digest}"

    @property
    def folder(self) -> Path:
        """Where checkpoints (of one process), metrics and TensorBoard's files are kept."""
        return Path(self.job.work) / "trainings" / self.name

    def tiles(self) -> dict[str, int]:
        """Tiles of an epoch, by split."""
        return {split: len(self.data.source(split)) for split in self.data.chunks}

    def done(self) -> TrainResult | None:
        """What this very training has left in the bundle's folder already, if it has."""
        found = storage.read_json(Path(self.job.out) / RECORD)
        if found and found.get("digest") == self.digest:
            history = tuple(result_of({"seconds": 0.0, **epoch}) for epoch in found["epochs"])
            last = (found["best_epoch"], found["tiles"], False, self.data.leaking)
            return TrainResult(Path(self.job.out), history, *last)
        if found and not self.job.overwrite:
            raise ConfigError(
                f"{self.job.out} holds the bundle of another training.",
                next_step="Choose another --out, or say --overwrite.",
            )
        return None

    def keep(self, trained: Trained) -> TrainResult:
        """Write the bundle with its record, and drop the checkpoints."""
        settings = self.job.model_dump(mode="json", exclude={"out", "work", "overwrite", "executor", "cohort"})
        settings["crew"] = {key: settings["crew"][key] for key in ("kind", "loaders")} | {"workers": self.size}
        record = training_record(
            trained,
            digest=self.digest,
            cohort=Path(self.job.cohort).name,
            settings=settings,
            weights=self.start.source,
            data=data_record(self.data.chunks, self.data.identities),
            tiles=self.tiles(),
            tiles_by_class=_by_class(self.data.chunks, self.card.classes),
            **({"leaking": self.data.leaking} if self.data.leaking else {}),
            **self.record,
        )
        files = beside(trained, record)
        if self.job.task == "pretrain":
            return self._keep_weights(trained, files)
        card = with_seam(self.card, trained.state_dict, self._example()) if self.card.seam else trained.card
        write_bundle(Path(self.job.out), card, trained.state_dict, overwrite=self.job.overwrite, beside=files)
        for checkpoint in self.folder.glob("epoch-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        result = TrainResult(Path(self.job.out), trained.history, trained.best_epoch, self.tiles())
        return replace(result, leaking=self.data.leaking)

    def _keep_weights(self, trained: Trained, files: Mapping[str, bytes]) -> TrainResult:
        """Write what a pre-training leaves: weights to begin with, without a card, and its record."""
        from safetensors.torch import save

        write_folder(Path(self.job.out), {WEIGHTS: save(kept(trained.state_dict)), **files})
        for checkpoint in self.folder.glob("epoch-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        return TrainResult(Path(self.job.out), trained.history, trained.best_epoch, self.tiles())

    def _example(self) -> Any:
        """A tile to measure seams on: one of val, or of train where that has none."""
        source = self.data.source("val" if len(self.data.source("val")) else "train")
        return next(iter(source.batches(0, 1, 0))).pixels[0]


def _by_class(chunks: Chunks, classes: Sequence[str]) -> dict[str, dict[str, int]]:
    return {
        split: {name: int(sum(_of_class(c, i) for c in several)) for i, name in enumerate(classes)}
        for split, several in chunks.items()
    }


def _of_class(c: LabelledChunk, i: int) -> int:
    return int((c.labels == i).sum() if c.labels.ndim == 1 else (c.labels[:, i] > 0).sum())


def _inline(job: TrainJob, data: Data, start: Start, listen: Listener, record: Mapping[str, Any]) -> TrainResult:
    """Train in this process."""
    training = _Training(job, card_of(job, data.targets), data, start, 1, record)
    if (done := training.done()) is not None:
        return done
    if job.fit.architecture in MACHINES:
        trained, said = _at_once(training, listen)
        return replace(training, record={**record, **said}).keep(trained)
    saved = last_epoch(training.folder)
    diary = Diary(training.folder)
    diary.begin(saved.history if saved else ())
    if saved:
        listen(Noted(f"Going on after epoch {len(saved.history)} of {job.fit.epochs}."))
    try:
        trained = fit(
            training.card,
            job.fit,
            data.source("train"),
            data.source("val") if len(data.source("val")) else None,
            _told(diary, job.fit, listen),
            start=start.state,
            crew=Crew(loaders=job.crew.loaders),
            saved=saved,
            save=lambda progress: _save(training.folder, progress),
        )
    finally:
        diary.close()
    return training.keep(trained)


def _at_once(training: _Training, listen: Listener) -> tuple[Trained, dict[str, Any]]:
    """Fit what has no epochs; the parts of two models are trainings like any other, on the same data."""
    from slideflow_ray.train.machines import fit_skip_svm, fit_two_models

    card, job, data = training.card, training.job, training.data
    if job.fit.architecture == "skip-svm":
        return fit_skip_svm(card, job, data, training.start.state, listen)
    return fit_two_models(card, job, data, lambda part, given: train(part, listen, given).bundle, listen)


def _save(folder: Path, progress: Any) -> None:
    save_epoch(folder, progress)


def _told(diary: Diary, spec: TrainSpec, listen: Listener) -> Any:
    def tell(result: EpochResult) -> None:
        diary.add(result)
        listen(_event(result, spec.epochs))
        if alarm := alarm_of(result.parts):
            listen(Noted(f"Epoch {result.epoch + 1}: {alarm}"))

    return tell


def _on_ray(job: TrainJob, data: Data, start: Start, listen: Listener, record: Mapping[str, Any]) -> TrainResult:
    """Train with Ray Train."""
    from slideflow_ray.train.on_ray import Task, fit_on_ray, joined

    with joined(job.crew, job.fit) as size:
        training = _Training(job, card_of(job, data.targets), data, start, size, record)
        if (done := training.done()) is not None:
            return done
        train_, val = data.source("train"), data.source("val")
        task = Task(training.card, job.fit, train_, val if len(val) else None, start.state, job.crew.loaders)
        diary = Diary(training.folder)
        diary.begin(())
        store = job.crew.storage or str(Path(job.work) / "ray")
        store = store if "://" in store else str(Path(store).absolute())
        try:
            trained = fit_on_ray(task, job.crew, training.name, store, _told(diary, job.fit, listen))
        finally:
            diary.close()
        diary.begin(trained.history)
        return training.keep(trained)


def _event(result: EpochResult, epochs: int) -> EpochTrained:
    val = result.val
    auc = None if result.parts or val is None else val.auc  # a pre-training has no labels
    scores = (val.loss, auc, val.dice) if val else (None, None)
    return EpochTrained(result.epoch + 1, epochs, result.train_loss, *scores)


# what is read


def prepare(job: TrainJob, listen: Listener = silent, splits: Sequence[str] = ("train", "val")) -> Data:
    """Tile the slides of train and val (or of `splits`), label their tiles, choose among them.

    Raises ConfigError, SplitLeakError.
    """
    job = settled(job)
    everyone = split_items(job, listen)
    items = [item for item in everyone if item.split in splits]
    if not any(item.split == "train" for item in items):
        raise ConfigError(
            f"{job.cohort} has no rows with split = train.",
            next_step="slideflow-ray split COHORT.csv --parts 6:2:2 --out SPLIT.csv, or a table [split] in train.toml.",
        )
    if job.sample.enlarge and not leaks(job):
        items += more_images(job, [item for item in items if item.split == "train"], listen)
    check_stated(job, items)
    if unused := unused_names(items, job.labels.names):
        listen(Noted(unused))
    context, result = _tile(job, items, listen)
    identities = {ended.slide_id: ended.identity for ended in result.ended}
    label = labelled_images if job.whole else _labelled
    chunks: Chunks = {split: label(job, context, items, split, result) for split in splits}
    if job.whole and (left := left_out(job, items)):
        listen(Noted(left))
    chunks["train"] = _chosen(job, context, chunks["train"], listen)
    chunks, targets = coloured(job, context, chunks)
    held = _people((item for item in everyone if item.split == "test"), {})
    return Data(context, chunks, identities, LEAKING if leaks(job) else "", targets, held)


def split_items(job: TrainJob, listen: Listener = silent) -> list[Item]:
    """Return the cohort's items, each on its side; a pre-training reads all of a cohort without splits.

    Raises ConfigError, SplitLeakError.
    """
    items = _split(job, listen)
    if job.task == "pretrain" and not any(item.split for item in items):
        return [item.model_copy(update={"split": "train"}) for item in items]
    return items


def _split(job: TrainJob, listen: Listener) -> list[Item]:
    """The cohort with the job's own split, or that of its column; no patient and no file, test's too, on two sides."""
    if leaks(job):
        return leaking_split(job, listen)
    own = job.split.parts is not None or job.split.folds is not None
    items = read_cohort(job.cohort, check=not own)
    identities = identities_of(items)
    if own:
        how = job.split.model_dump(exclude={"mode"})
        everyone = with_splits(items, **how, classes=job.classes, identities=identities)
        write_split(job, everyone)
    else:
        everyone = list(items)
        check_splits(everyone, identities)
    if note := lone_note(everyone):
        listen(Noted(note))
    return everyone


def _tile(job: TrainJob, items: Sequence[Item], listen: Listener) -> tuple[Context, RunResult]:
    spec = RunSpec(
        cohort=job.cohort,
        out=job.work,
        tile=(job.tile,) if job.tile else (),
        whole=(job.whole,) if job.whole else (),
        tissue=job.tissue,
        store=job.store,
        executor=job.executor,
    )
    result = run(spec, items, listen)
    if bad := [ended for ended in result.ended if ended.status != "done"]:
        what = "; ".join(f"{ended.slide_id}: {ended.code} {ended.message}" for ended in bad[:5])
        raise ConfigError(f"{len(bad)} slides cannot be trained on: {what}", next_step="Mend or drop these rows.")
    return Context(job.work, (), job.tissue, job.store, spec.tile, None, spec.whole), result


def _labelled(
    job: TrainJob, context: Context, items: Sequence[Item], split: str, result: RunResult
) -> list[LabelledChunk]:
    """The chunks of the grids of a split's slides with the class of each tile, or its classes."""
    by_id = {ended.slide_id: ended for ended in result.ended}
    stains = stain_numbers(items)
    rows = job.store.rows(job.shape.tile_px)
    found = []
    for item in (item for item in items if item.split == split):
        stain = stains[stain_name(item.stain, item.modality)]
        for grid in by_id[item.slide_id].laid:
            store = SlideStore(context.out, item.slide_id)
            if job.task == "segment":
                found += _masked(job, store, grid, item, stain)
                continue
            if job.task == "pretrain":
                labels: Any = np.zeros(len(store.read(f"grids/{grid}/item")), np.int64)
            else:
                known = slide_labels(store, grid, item, job.classes, job.labels, job.task)
                labels = known if job.task == "multilabel" else class_indices(known)
            if item.split == "train" and job.sample.stride:
                labels = thin(
                    labels.astype(np.int64), store.read(f"grids/{grid}/rowcol"), job.classes, job.sample.stride
                )
            for start in range(0, len(labels), rows):
                part = labels[start : start + rows]
                chunk = Chunk(item, grid, job.shape, start // rows, len(part), ())
                found.append(LabelledChunk(chunk, part, None, stain, start))
    return found


def _masked(job: TrainJob, store: SlideStore, grid: str, item: Item, stain: int) -> list[LabelledChunk]:
    """The chunks of a slide with their masks; empty where nothing is known of it."""
    rows, n = job.store.rows(job.shape.tile_px), len(store.read(f"grids/{grid}/item"))
    node = mask_slide(store, grid, item, job.classes, job.labels, job.store, job.shape.tile_px) if n else None
    if node is None:
        return []
    areas = np.concatenate([areas_of(store.read(node, i), len(job.classes)) for i in range(-(-n // rows))])
    labels = shown_by(areas)
    if item.split == "train" and job.sample.stride:
        labels = thin(labels, store.read(f"grids/{grid}/rowcol"), job.classes, job.sample.stride)
    found = []
    for start in range(0, n, rows):
        here = slice(start, start + rows)
        chunk = Chunk(item, grid, job.shape, start // rows, len(labels[here]), ())
        found.append(LabelledChunk(chunk, labels[here], None, stain, start, node, areas[here]))
    return found


def _chosen(job: TrainJob, context: Context, chunks: list[LabelledChunk], listen: Listener) -> list[LabelledChunk]:
    """Show hard tiles more often, and rare classes as often as the largest."""
    if job.sample.mine is not None:
        chunks = _mined(job, context, chunks, listen)
    return balanced(chunks, job.classes) if job.fit.sampling == "balanced" else chunks


def _mined(job: TrainJob, context: Context, chunks: list[LabelledChunk], listen: Listener) -> list[LabelledChunk]:
    spec = job.sample.mine
    if spec is None:
        return chunks
    boxes: dict[int, Any] = {}
    known: dict[str, list[tuple[Any, Any]]] = {}
    for c in chunks:
        grid = boxes_px0(SlideStore(context.out, c.chunk.item.slide_id), c.chunk.grid)
        boxes[id(c)] = grid[c.start : c.start + c.chunk.tiles]
        for name, rows in c.rows_of.items():
            known.setdefault(name, []).append((boxes[id(c)][rows], c.labels[rows]))
    labels = {
        name: (np.concatenate([box for box, _ in parts]), np.concatenate([truth for _, truth in parts]))
        for name, parts in known.items()
    }
    found = mine(spec, job.classes, labels)
    listen(Noted(f"{found.tiles} of {found.scored} training tiles are hard; they come {found.times} times as often."))
    return [replace(c, times=_times_of(found, c, boxes[id(c)])) for c in chunks]


def _times_of(found: Mined, c: LabelledChunk, boxes: Any) -> Any:
    times = np.ones(len(c.labels))
    for name, rows in c.rows_of.items():
        times[rows] = found.times_of(name, boxes[rows])
    return times


__all__ = ["CrewSpec", "Data", "TrainJob", "TrainResult", "card_of", "prepare", "train"]

"""What pre-training is worth: each method's Dice by share of the labels and seed, trained alike and judged on test.

Source 002's table. A cell is one training: a method's weights (or random ones) to begin with, a share of the labelled
slides of train, a seed. Of one seed all methods are given the same slides, and smaller shares are parts of larger
ones; whatever the share, an epoch shows as many tiles, so that all cells have the same number of steps. Cells that
are done are kept, and not trained again.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, JsonValue, model_validator
from scipy import stats

from slideflow_ray import storage
from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import Listener, Noted, silent
from slideflow_ray.models.bundle import NOT_SCORED, WEIGHTS, BundleCard
from slideflow_ray.models.networks import build
from slideflow_ray.prepare import to_input
from slideflow_ray.processes import pool
from slideflow_ray.specs import Spec, digest
from slideflow_ray.splits import known_identities
from slideflow_ray.train.job import Data, card_of, prepare, split_items, train
from slideflow_ray.train.loop import fit
from slideflow_ray.train.record import data_record, versions
from slideflow_ray.train.spec import IMAGENET, RANDOM, TrainJob, TrainSpec, as_pretraining
from slideflow_ray.train.tiles import ChunkTiles, LabelledChunk
from slideflow_ray.train.weights import People, Start, familiar, find_weights, in_common

Method = Literal["random", "imagenet", "usregcon", "simclr", "pixpro", "detcon"]
METHODS: tuple[Method, ...] = ("random", "usregcon", "simclr", "pixpro", "detcon")

INTERVALS = (
    "95 %, Student's t over paired seeds of fine-tuning; each method was pre-trained once, so they do not hold how "
    "much pre-training itself varies"
)


class TransferSpec(Spec):
    """What is compared. `methods`: "random" and what is set against it; "imagenet" where the user has such
    weights, for the encoder of a network of smp's.

    shares : percent of the labelled slides of train; seeds : trainings of each; at_once : trainings, and pre-trainings,
    at a time, each a process with `threads` of its own. pretrain : settings of [fit] for the pre-training (epochs, lr,
    ...), its table `pretext` without the method; cohort : whose slides it reads, the labelled ones if None.
    """

    methods: tuple[Method, ...] = METHODS
    shares: tuple[Annotated[float, Field(gt=0, le=100)], ...] = (1, 5, 10, 100)
    seeds: Annotated[int, Field(ge=1)] = 5
    at_once: Annotated[int, Field(ge=1)] = 1
    pretrain: dict[str, JsonValue] = Field(default={})
    cohort: str | None = None

    @model_validator(mode="after")
    def _against_random(self) -> TransferSpec:
        if RANDOM not in self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError('methods are different ones, "random" among them')
        return self


@dataclass(frozen=True)
class Cell:
    """One training: what it began with, which share of the labels, the seed; and its Dice on test by class.

    dice : the mean over test slides, None of a class that is nowhere in test and nowhere called; slides : how many it
    was trained on; best : the epoch that was kept.
    """

    method: str
    share: float
    seed: int
    slides: int
    dice: Mapping[str, float | None]
    best: int = 0

    @property
    def mean(self) -> float | None:
        """The mean of the classes' Dice where they have one."""
        return _mean(self.dice.values())

    def above(self, other: Cell) -> float | None:
        """By how much its mean Dice is above another's, over the classes that have one in both."""
        return _mean(_less(dice, other.dice[name]) for name, dice in self.dice.items())


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _deviation(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


@dataclass(frozen=True)
class Gain:
    """What a method adds to random weights: the mean over seeds of the difference of mean Dice, its 95 % interval.

    interval : of Student's t over the seeds, which are paired (the same slides, the same order); None for one seed.
    One pre-training of each method serves all seeds, so that it holds how fine-tuning varies (the slides drawn, the
    head, the order), and not how pre-training would, done again with another seed.
    """

    method: str
    share: float
    mean: float
    interval: tuple[float, float] | None
    each: tuple[float, ...]


@dataclass(frozen=True)
class Table:
    """Every cell, in the order of methods, shares and seeds. `notes` say what was left out."""

    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()

    @property
    def gains(self) -> tuple[Gain, ...]:
        """Of every method but random, by share."""
        base = {(c.share, c.seed): c for c in self.cells if c.method == RANDOM}
        found = []
        for (method, share), cells in self._groups():
            differences = [c.above(base[c.share, c.seed]) for c in cells if method != RANDOM]
            if each := tuple(d for d in differences if d is not None):
                found.append(Gain(method, share, statistics.fmean(each), t_interval(each), each))
        return tuple(found)

    def _groups(self) -> Iterator[tuple[tuple[str, float], list[Cell]]]:
        for key, group in itertools.groupby(self.cells, key=lambda c: (c.method, c.share)):
            yield key, list(group)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each method and share: mean and deviation over seeds of each class and their mean; gain."""
        gains = {(g.method, g.share): g for g in self.gains}
        rows = []
        for (method, share), cells in self._groups():
            row: dict[str, Any] = {"method": method, "labels_percent": share, "slides": cells[0].slides}
            row["seeds"] = len(cells)
            for name in (*cells[0].dice, "mean"):
                values = [c.mean if name == "mean" else c.dice[name] for c in cells]
                row[f"dice_{name}"], row[f"sd_{name}"] = _mean(values), _deviation(values)
            gain = gains.get((method, share))
            row["gain"] = gain.mean if gain else None
            row["gain_low"], row["gain_high"] = gain.interval if gain and gain.interval else (None, None)
            rows.append(row)
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "table": self.rows(),
            "cells": [vars(c) | {"dice": dict(c.dice)} for c in self.cells],
            "gains": [vars(g) for g in self.gains],
            "intervals": INTERVALS,
            "notes": list(self.notes),
        }

    def to_csv(self) -> str:
        """Return the rows as CSV."""
        rows, text = self.rows(), io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def summary(self) -> str:
        """Return the table for a terminal: Dice in percent, mean and deviation over seeds; gain over random weights."""
        rows = self.rows()
        names = [key.removeprefix("dice_") for key in rows[0] if key.startswith("dice_")]
        lines = [f"{'labels':>7} {'method':<12}" + "".join(f"{name:>16}" for name in names) + "   gain over random"]
        for row in sorted(rows, key=lambda row: row["labels_percent"]):
            cells = [_percent(row[f"dice_{name}"], row[f"sd_{name}"]) for name in names]
            line = f"{row['labels_percent']:>6g}% {row['method']:<12}" + "".join(f"{cell:>16}" for cell in cells)
            lines.append(line + _gain(row))
        lines.append(f"Dice in percent, mean and deviation over {rows[0]['seeds']} seeds.")
        lines.append(f"Intervals of the gain: {INTERVALS}.")
        return "\n".join([*lines, *self.notes])


def _percent(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")


def _gain(row: Mapping[str, Any]) -> str:
    if row["gain"] is None:
        return ""
    low, high = row["gain_low"], row["gain_high"]
    return f"   {100 * row['gain']:+.2f}" + ("" if low is None else f" ({100 * low:+.2f} to {100 * high:+.2f})")


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Return Student's interval of the mean of a few values; None for one.

    >>> t_interval([1.0, 2.0, 3.0])
    (-0.4841377118, 4.4841377118)
    """
    if len(values) < 2:
        return None
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return round(mean - reach, 10), round(mean + reach, 10)


# the comparison


def transfer(job: TrainJob, spec: TransferSpec, listen: Listener = silent) -> Table:
    """Pre-train each method once, train every cell, and judge it on the slides of test.

    job : a segmentation's training; its `fit` is every cell's, but for weights and seed. Pre-trained weights and cells
    stay below job.work/transfer: killed, it goes on when called again.
    Raises ConfigError (no segmentation, no labelled slide in val or test, a share without some class, "imagenet" for a
    network that has no such weights, a pre-training on those who judge), NanScore.
    """
    if job.task != "segment":
        raise ConfigError(f'Dice is of segmentations, and the task is "{job.task}".')
    if IMAGENET in spec.methods:  # a network that has none is refused before hours of training
        find_weights(job.fit.model_copy(update={"weights": IMAGENET}))
    data = prepare(job, listen, ("train", "val", "test"))
    if empty := [split for split in ("val", "test") if not len(data.source(split))]:
        raise ConfigError(f"{job.cohort} has no labelled slide in split {' and '.join(empty)}.")
    starts, notes = _starts(job, spec, data, listen)
    work = [
        _Work(job, card_of(job, data.targets), data, start, method, share, seed)
        for (method, start), share, seed in itertools.product(starts.items(), spec.shares, range(spec.seeds))
    ]
    return Table(tuple(_worked_off(work, spec.at_once, listen)), notes)


def _starts(
    job: TrainJob, spec: TransferSpec, data: Data, listen: Listener
) -> tuple[dict[str, Start], tuple[str, ...]]:
    """The weights that each method begins with; one of ImageNet that is not there is left out, and said."""
    found: dict[str, Start] = {}
    notes = []
    jobs = {method: pretraining_of(job, spec, method) for method in spec.methods if method not in (RANDOM, IMAGENET)}
    for pretraining in list(jobs.values())[:1]:  # all read the same cohort
        check_apart(job, pretraining)
    _pretrain(jobs, spec.at_once, listen)
    for method in spec.methods:
        if method in (RANDOM, IMAGENET):
            start = find_weights(job.fit.model_copy(update={"weights": method}))
            if method == IMAGENET and start.state is None:
                notes.append(start.note)
                continue
        else:
            fit_ = job.fit.model_copy(update={"weights": f"{jobs[method].out}/{WEIGHTS}"})
            if note := familiar(fit_.weights, data.people).note:
                notes.append(note)
            start = find_weights(fit_)
        found[method] = start
    return found, tuple(notes)


def _pretrain(jobs: Mapping[Method, TrainJob], at_once: int, listen: Listener) -> None:
    """Pre-train by each method, `at_once` at a time on the same tiles; on Ray one after the other, which it fills."""
    if at_once == 1 or len(jobs) < 2 or any(job.crew.kind == "ray" for job in jobs.values()):
        for method, job in jobs.items():
            listen(Noted(f"Pre-training by {method}"))
            train(job, listen)
        return
    listen(Noted(f"Pre-training by {', '.join(jobs)}, {at_once} at a time"))
    data = prepare(next(iter(jobs.values())), listen)
    with pool(at_once) as several:
        todo = {several.submit(_pretrained, job, data): method for method, job in jobs.items()}
        for done in as_completed(todo):
            for said in done.result():
                listen(Noted(f"{todo[done]}: {said}"))


def _pretrained(job: TrainJob, data: Data) -> list[str]:
    """Pre-train in a process of a pool; return what was noted, such as the alarms."""
    said: list[str] = []
    train(job, lambda event: said.append(event.text) if isinstance(event, Noted) else None, data)
    return said


def check_apart(job: TrainJob, pretraining: TrainJob) -> None:
    """Raise ConfigError where a pre-training would learn from patients or files that judge the labelled cohort.

    Val and test must not be learnt from, and test must not choose the pre-training's epoch either; labelled or not.
    """
    labelled, unlabelled = (
        {split: [i for i in items if i.split == split] for split in ("train", "val", "test")}
        for items in (split_items(job), split_items(pretraining))
    )
    for mine, theirs in (("test", "train"), ("test", "val"), ("val", "train")):
        if told := in_common(_who(labelled[mine]), _who(unlabelled[theirs])):
            raise ConfigError(
                f"The pre-training would read {told[0]} of split {mine} of {job.cohort} from {pretraining.cohort} "
                f"({told[1]}).",
                next_step="Leave their rows out of the unlabelled cohort, or give both cohorts the same split.",
            )


def _who(items: Sequence[Item]) -> People:
    """Patients, and files by their place and by the column sha256."""
    places = {i.uri if storage.is_remote(i.uri) else str(storage.local_path(i.uri).resolve()) for i in items}
    return People(frozenset(i.patient for i in items), frozenset({*places, *known_identities(items).values()}))


def pretraining_of(job: TrainJob, spec: TransferSpec, method: str) -> TrainJob:
    """Return the pre-training of a method: on the training's tiles without their halo, by the training's network."""
    told = dict(spec.pretrain)
    pretext = told.pop("pretext", {})
    own = job.fit.model_dump(mode="json", include={"architecture", "arguments", "threads", "device", "precision"})
    fit_ = {**own, **told, "pretext": {**(pretext if isinstance(pretext, Mapping) else {}), "method": method}}
    tile = job.tile.model_dump(exclude={"halo_px", "stride_px"}) if job.tile else None
    values = {
        "cohort": spec.cohort or job.cohort,
        "out": str(Path(job.work) / "transfer" / method),
        "work": job.work if spec.cohort is None else str(Path(job.work) / "unlabelled"),
        "tile": tile,
        "fit": fit_,
        "overwrite": True,
        **job.model_dump(include={"tissue", "store", "executor", "crew", "split"}),
    }
    return TrainJob.parse(as_pretraining(values), "pretrain")


# a cell


@dataclass(frozen=True)
class _Work:
    """A cell that is to be trained."""

    job: TrainJob
    card: BundleCard
    data: Data
    start: Start
    method: str
    share: float
    seed: int

    @property
    def spec(self) -> TrainSpec:
        """The training's settings, with the cell's seed."""
        return self.job.fit.model_copy(update={"seed": self.seed, "weights": RANDOM})

    @property
    def chunks(self) -> list[LabelledChunk]:
        """The cell's part of train."""
        return shared(self.data.chunks["train"], self.share / 100, self.seed)

    @property
    def path(self) -> Path:
        """Where the cell is kept, under the digest of all that determines it."""
        chunks = {"train": self.chunks, **{split: self.data.chunks[split] for split in ("val", "test")}}
        seen = data_record(chunks, self.data.identities)["digest"]
        card = self.card.model_dump(mode="json", exclude={"name", "description", "licence"})
        name = digest([card, self.spec.model_dump(mode="json"), self.start.source, seen, versions()])
        return Path(self.job.work) / "transfer" / "cells" / f"{self.method}-{self.share:g}-{self.seed}-{name}.json"


def shared(chunks: Sequence[LabelledChunk], share: float, seed: int) -> list[LabelledChunk]:
    """Return the chunks of a share of the slides; their tiles come so much more often, for as many in an epoch.

    Smaller shares of one seed are parts of larger ones; the first slides have all classes between them, if any have.
    """
    used = [c for c in chunks if c.used.any()]
    areas: dict[str, npt.NDArray[np.int64]] = {}
    for c in used:
        area = np.zeros(0, np.int64) if c.areas is None else c.areas[c.used].sum(0)
        slide = c.chunk.item.slide_id
        areas[slide] = areas[slide] + area if slide in areas else area
    names = np.random.default_rng([seed, 7]).permutation(sorted(areas)).tolist()
    order = _covering(names, areas)
    kept = set(order[: max(1, round(share * len(order)))])
    mine = [c for c in used if c.chunk.item.slide_id in kept]
    own, every = (sum(int(c.used.sum()) for c in several) for several in (mine, used))
    return [replace(c, times=np.full(len(c.labels), every / own)) for c in mine]


def _covering(names: Sequence[str], areas: Mapping[str, npt.NDArray[np.int64]]) -> list[str]:
    """Put slides first that bring classes which those before them lack, most at once."""
    left, order = list(names), []
    missing = np.sum(list(areas.values()), axis=0) > 0
    while missing.any():
        best = max(left, key=lambda name: int(((areas[name] > 0) & missing).sum()))
        order.append(best)
        left.remove(best)
        missing = missing & (areas[best] == 0)
    return order + left


def _worked_off(work: Sequence[_Work], at_once: int, listen: Listener) -> list[Cell]:
    paths = {one.path: one for one in work}
    todo = [one for path, one in paths.items() if storage.read_json(path) is None]
    listen(Noted(f"{len(work)} trainings, {len(todo)} of them to do"))
    if at_once == 1 or len(todo) < 2:
        for one in todo:
            listen(Noted(_said(_train(one))))
    else:
        with pool(at_once) as several:
            for done in as_completed([several.submit(_train, one) for one in todo]):
                listen(Noted(_said(done.result())))
    return [Cell(**(storage.read_json(path) or {})) for path in paths]


def _said(cell: Cell) -> str:
    return f"{cell.method}, {cell.share:g} % of the labels, seed {cell.seed}: mean Dice {_number(cell.mean)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _train(work: _Work) -> Cell:
    """Train a cell and judge it on test; keep what it came to."""
    chunks = work.chunks
    data = replace(work.data, chunks={**work.data.chunks, "train": chunks})
    trained = fit(work.card, work.spec, data.source("train"), data.source("val"), start=work.start.state)
    dice = dice_of(work.card, trained.state_dict, data.source("test"), work.spec)
    slides = len({c.chunk.item.slide_id for c in chunks})
    cell = Cell(work.method, work.share, work.seed, slides, dice, trained.best_epoch)
    work.path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(work.path, storage.to_json(vars(cell)))
    return cell


def dice_of(
    card: BundleCard, state: Mapping[str, torch.Tensor], source: ChunkTiles, spec: TrainSpec
) -> dict[str, float | None]:
    """Return the Dice of each class but the first: of each slide by the pixels of its tiles' cores, then the mean.

    Slides where the class is neither found nor annotated are left out; None where that is so of all.
    """
    net = build(card.architecture, card.arguments, card.n_classes, card.channels)
    net.load_state_dict(dict(state))
    net.eval()
    tables: dict[str, npt.NDArray[np.int64]] = {}
    for c in source.chunks:
        table = tables.setdefault(c.chunk.item.slide_id, np.zeros((card.n_classes, 3), np.int64))
        for pixels, masks, *_ in ChunkTiles(source.context, [c]).batches(0, spec.batch_size, 0):
            table += _counted(card, _called(card, net, pixels), masks)
    each = {
        name: [2 * t[i, 0] / t[i, 1:].sum() for t in tables.values() if t[i, 1:].any()]
        for i, name in enumerate(card.classes)
    }
    return {name: float(np.mean(v)) if v else None for name, v in list(each.items())[1:]}


def _called(card: BundleCard, net: torch.nn.Module, pixels: Any) -> npt.NDArray[np.int64]:
    with torch.inference_mode():
        x = to_input(pixels, card.mean, card.std, dtype=torch.float32, device=torch.device("cpu"))
        called: npt.NDArray[np.int64] = net(x).argmax(1).numpy()
    return called


def _counted(card: BundleCard, called: npt.NDArray[np.int64], masks: Any) -> npt.NDArray[np.int64]:
    """Pixels of each class found and annotated, found, annotated: int64 (K, 3)."""
    core = slice(card.halo or 0, masks.shape[1] - (card.halo or 0))
    found, truth = called[:, core, core], masks[:, core, core]
    known = truth != NOT_SCORED
    rows = [((found == i) & known, truth == i) for i in range(card.n_classes)]
    return np.array([[(p & g).sum(), p.sum(), g.sum()] for p, g in rows], np.int64)


def write(table: Table, folder: Path) -> list[Path]:
    """Write the table as transfer.json and transfer.csv and as text; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {"transfer.json": storage.to_json(table.to_json()), "transfer.csv": table.to_csv().encode()}
    text["transfer.txt"] = (table.summary() + "\n").encode()
    for name, content in text.items():
        storage.write_atomic(folder / name, content)
    return [folder / name for name in text]

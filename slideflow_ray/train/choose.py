"""Choosing among trainings, of architectures or of settings, by validation: as `fit.keep` chooses among epochs.

By default by the lowest loss (source 003's rule), or by the highest accuracy (source 001's).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import ray
from pydantic import Field

from slideflow_ray import storage
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import Listener, Noted, silent
from slideflow_ray.execute.cluster import connect
from slideflow_ray.models.bundle import load_weights, read_card, write_bundle
from slideflow_ray.specs import ExecutorSpec, Positive, Spec, digest
from slideflow_ray.train.job import Data, TrainResult, card_of, check_out, check_weights, prepare, train
from slideflow_ray.train.loop import EpochResult, Progress, Validation, fit, rank
from slideflow_ray.train.record import CURVES, METRICS, RECORD, data_record, versions
from slideflow_ray.train.spec import Keep, Percent, TrainJob, TrainSpec
from slideflow_ray.train.weights import find_weights

RULES = {"loss": "lowest validation loss", "accuracy": "highest validation accuracy", "dice": "highest validation Dice"}


class SearchSpec(Spec):
    """The grid of settings that a search tries; a setting without values stays as `fit` says.

    epochs : of each trial, those of `fit` if None. at_once : trials at a time, 0 for one each core or GPU.
    """

    batch_size: tuple[Annotated[int, Field(ge=2)], ...] = ()
    lr: tuple[Positive, ...] = ()
    freeze: tuple[Percent, ...] = ()
    epochs: Annotated[int, Field(ge=1)] | None = None
    at_once: Annotated[int, Field(ge=0)] = 0

    def grid(self) -> list[dict[str, Any]]:
        """Return every combination of the settings, in the order in which they are written."""
        given = {key: getattr(self, key) for key in ("batch_size", "lr", "freeze") if getattr(self, key)}
        return [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]


@dataclass(frozen=True)
class Candidate:
    """One training among others: what set it apart, and the validation of the epoch that it kept."""

    settings: Mapping[str, Any]
    loss: float
    accuracy: float
    auc: float | None
    epoch: int
    dice: float | None = None

    def rank(self, keep: Keep) -> tuple[float, float]:
        """Return what is lowest for the training that `keep` prefers, as among epochs."""
        return rank(Validation(self.loss, self.accuracy, math.nan, self.dice), keep)

    def value(self, keep: Keep) -> float:
        """Return what was compared."""
        found = {"loss": self.loss, "accuracy": self.accuracy, "dice": self.dice}[keep]
        return math.nan if found is None else found

    def to_json(self) -> dict[str, Any]:
        """Return what the record says of it; epochs count from 0 there."""
        found = {"val_loss": self.loss, "val_accuracy": self.accuracy, "val_auc": self.auc, "epoch": self.epoch}
        if self.dice is not None:
            found["val_dice"] = self.dice
        return {**self.settings, **found}


def choose(
    job: TrainJob, architectures: Sequence[str], listen: Listener = silent, **record: Any
) -> tuple[TrainResult, list[Candidate]]:
    """Train each architecture, keep the best by validation (see `fit.keep`) as the job's bundle.

    The others stay as bundles below `job.work`/candidates. The record of the kept one has the
    values of all. Test slides are not read.
    Raises ConfigError where the cohort has no val split, or one architecture is named twice.
    """
    _check_names(architectures)
    check_out(job)
    data = prepare(job, listen)
    _check_val(data, job)
    found: list[Candidate] = []
    results: list[TrainResult] = []
    for name in architectures:
        listen(Noted(f"Training {name}"))
        own = job.fit.arguments if name == job.fit.architecture else {}
        fit_ = job.fit.model_copy(update={"architecture": name, "arguments": own})
        out = candidates(job, [name])[name]
        results.append(train(job.model_copy(update={"fit": fit_, "out": str(out), "overwrite": True}), listen, data))
        found.append(_candidate({"architecture": name}, results[-1].best))
    best = min(found, key=lambda c: c.rank(job.fit.keep))
    rule = RULES[job.fit.keep]
    listen(Noted(f"{rule.capitalize()}: {best.settings['architecture']} ({best.value(job.fit.keep):.4f})"))
    record["choice"] = {"rule": rule, "candidates": [c.to_json() for c in found]}
    return adopt(results[found.index(best)], job, record), found


def candidates(job: TrainJob, architectures: Sequence[str]) -> dict[str, Path]:
    """Return where `choose` leaves the bundle of each architecture."""
    folder, name = Path(job.work) / "candidates", Path(job.out).name
    return {one: folder / f"{name}-{one.replace(':', '-')}" for one in architectures}


def adopt(result: TrainResult, job: TrainJob, record: Mapping[str, Any]) -> TrainResult:
    """Write the bundle of a training once more, under the job's name and with `record` added to its own."""
    card = read_card(result.bundle).model_copy(update={"name": Path(job.out).name})
    files = {name: (result.bundle / name).read_bytes() for name in (METRICS, CURVES)}
    files[RECORD] = storage.to_json({**storage.read_json(result.bundle / RECORD), **record})
    write_bundle(Path(job.out), card, load_weights(result.bundle), overwrite=job.overwrite, beside=files)
    return replace(result, bundle=Path(job.out))


def _check_names(architectures: Sequence[str]) -> None:
    if len(architectures) < 2 or len(set(architectures)) < len(architectures):
        raise ConfigError(f"Name at least two different architectures, not {', '.join(architectures) or 'none'}.")


def _check_val(data: Data, job: TrainJob) -> None:
    if not len(data.source("val")):
        raise ConfigError(f"{job.cohort} has no labelled tiles in split val, so nothing can be chosen by them.")


def _candidate(settings: Mapping[str, Any], best: EpochResult) -> Candidate:
    if best.val is None:
        raise ConfigError("A training without validation cannot be chosen.")
    auc = None if best.val.auc != best.val.auc else best.val.auc
    return Candidate(settings, best.val.loss, best.val.accuracy, auc, best.epoch, best.val.dice)


def search(job: TrainJob, spec: SearchSpec, listen: Listener = silent) -> tuple[TrainResult, list[Candidate]]:
    """Try every combination of `spec` with Ray Tune, then train with the best settings and write that bundle.

    A trial is one process with one torch thread (or a GPU). What was tried is kept below `job.work`/searches:
    the same search again is not repeated. Raises ConfigError for an empty grid or a cohort without a val split.
    """
    grid = spec.grid()
    if len(grid) < 2:
        raise ConfigError("A search needs at least two combinations.", next_step="Give more values in [search].")
    check_out(job)
    data = prepare(job, listen)
    _check_val(data, job)
    check_weights(job, data)
    card = card_of(job, data.targets).model_dump(mode="json", exclude={"name", "description"})
    seen = data_record(data.chunks, data.identities)["digest"]
    name = digest([card, job.fit.model_dump(mode="json"), spec.model_dump(mode="json"), seen, versions()])
    note = Path(job.work) / "searches" / f"{Path(job.out).name}-{name}.json"
    kept = storage.read_json(note)
    if kept is None:
        listen(Noted(f"Trying {len(grid)} combinations"))
        kept = _tuned(job, spec, grid, data)
        storage.write_atomic(note, storage.to_json(kept))
    found = [Candidate(**values) for values in kept]
    best = min(found, key=lambda c: c.rank(job.fit.keep))
    rule = RULES[job.fit.keep]
    listen(Noted(f"{rule.capitalize()} {best.value(job.fit.keep):.4f} with {_said(best.settings)}"))
    record = {"rule": rule, "candidates": [c.to_json() for c in found]}
    fit_ = TrainSpec.parse({**job.fit.model_dump(), **best.settings}, "the settings found")
    return train(job.model_copy(update={"fit": fit_}), listen, data, choice=record), found


def _said(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in settings.items())


def _tuned(job: TrainJob, spec: SearchSpec, grid: Sequence[Mapping[str, Any]], data: Data) -> list[dict[str, Any]]:
    """Run the trials with Ray Tune; return each one's settings and best epoch."""
    from ray import tune

    started = connect(ExecutorSpec(kind="ray", address=job.crew.address))
    try:
        gpu = int(job.fit.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1)  # type: ignore[no-untyped-call]
        trial = tune.with_resources(
            tune.with_parameters(_trial, given=(job, data, spec.epochs)), {"cpu": 0.5, "gpu": gpu}
        )
        tuner = tune.Tuner(
            trial,
            param_space={"settings": tune.grid_search([dict(values) for values in grid])},
            tune_config=tune.TuneConfig(max_concurrent_trials=spec.at_once or None),
            run_config=tune.RunConfig(storage_path=str(Path(job.work).absolute() / "tune"), verbose=0),
        )
        with contextlib.redirect_stdout(sys.stderr):  # Tune prints what it does; ours is for the result
            results = tuner.fit()
        if results.errors:
            raise ConfigError(
                f"{len(results.errors)} of {len(grid)} trials failed: {_first_line(results.errors[0])}",
                next_step="Take the settings that fail out of [search]; Ray's own message stands above.",
            )
        ended = [results[i] for i in range(len(results))]
        by_settings = {str((r.config or {})["settings"]): (r.metrics or {})["best"] for r in ended}
        return [{"settings": dict(values), **by_settings[str(dict(values))]} for values in grid]
    finally:
        if started:
            ray.shutdown()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


def _trial(config: dict[str, Any], given: Any) -> None:
    """One combination, in a process of its own."""
    from ray import tune

    job, data, epochs = given
    more = {"threads": job.fit.threads or 1, "epochs": epochs or job.fit.epochs}
    spec = TrainSpec.parse({**job.fit.model_dump(), **config["settings"], **more}, "a trial")
    best: list[Candidate] = []

    def save(progress: Progress) -> None:
        best.append(_candidate(config["settings"], progress.history[progress.best_epoch]))
        tune.report({"val_loss": best[-1].loss})

    card = card_of(job.model_copy(update={"fit": spec}), data.targets)
    fit(card, spec, data.source("train"), data.source("val"), start=find_weights(spec).state, save=save)
    last = best[-1]
    tune.report({"best": {key: value for key, value in vars(last).items() if key != "settings"}})

"""Three models on repeated folds by patient: means, deviations, intervals, and whether joining two helps.

METHODS part 000: stratified folds by patient, several seeds. In each fold everything is trained, chosen and
calibrated on the other patients; the fold is predicted once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slideflow_ray import storage
from slideflow_ray.cohort import read_cohort
from slideflow_ray.compare import columns
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import Listener, Noted, silent
from slideflow_ray.labelled import Rows, mcnemar, measure, percentiles
from slideflow_ray.metrics import Interval, resample_weights
from slideflow_ray.models.bundle import read_card
from slideflow_ray.models.networks import load_network
from slideflow_ray.results import defined, with_interval
from slideflow_ray.specs import SplitSpec
from slideflow_ray.splits import write_items
from slideflow_ray.train.job import Data, card_of, prepare, train
from slideflow_ray.train.machines import Margin, Table, part_job, table_of, without
from slideflow_ray.train.spec import MachineSpec, TrainJob
from slideflow_ray.train.svm import fold_rows, most_folds
from slideflow_ray.train.weights import People

SHOWN = ("accuracy", "sensitivity", "specificity", "ppv", "npv", "f1", "auc")
NAMES = ("A", "B", "C")
RESAMPLES = 1000
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Repeats:
    """How often everything is trained. `backbone`: B's features are of a frozen network as `fit.weights` says
    ("start"), or of the model A of the same fold ("first"); then C is joined on val, as A has seen the others.
    """

    folds: int = 5
    seeds: int = 3
    backbone: str = "start"


@dataclass(frozen=True)
class Summary:
    """A metric of one model: mean and deviation over folds, its value and interval over all predictions."""

    mean: float | None
    deviation: float | None
    pooled: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Repeated:
    """What repeated folds came to.

    figures : of each model each metric; pairs : of each two models and seed, images that only one calls rightly and
    McNemar's exact p; rules : by which C was joined in each fold; verdict : whether C beats A and B, in words
    """

    about: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, Summary]]
    pairs: tuple[Mapping[str, Any], ...]
    rules: tuple[str, ...]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        figures = {name: {metric: vars(s) for metric, s in several.items()} for name, several in self.figures.items()}
        said = {"pairs": [dict(pair) for pair in self.pairs], "rules": list(self.rules), "verdict": self.verdict}
        return {"schema": 1, **self.about, "figures": figures, **said}

    def summary(self) -> str:
        """Return a table for a terminal: a line for each metric, a column for each model; pairs; the verdict."""
        about = self.about
        rows = [[f"mean ± sd of {about['folds']} folds x {about['seeds']} seeds", *self.figures]]
        rows += [[name, *(_spread(several[name]) for several in self.figures.values())] for name in SHOWN]
        rows.append(["pooled, 95 % by patient", *[""] * len(self.figures)])
        rows += [[name, *(_interval(several[name]) for several in self.figures.values())] for name in SHOWN]
        head = f"{about['images']:,} images of {about['patients']} patients, each predicted by models of other patients"
        return "\n".join([head, *columns(rows), "", *map(_pair_text, self.pairs), self.verdict])


def _spread(found: Summary) -> str:
    if found.mean is None:
        return "-"
    return f"{found.mean:.4f} ± {found.deviation:.4f}" if found.deviation is not None else f"{found.mean:.4f}"


def _interval(found: Summary) -> str:
    return with_interval(found.pooled, found.interval)


def _pair_text(pair: Mapping[str, Any]) -> str:
    one, other = pair["models"]
    return (
        f"{one} against {other}, seed {pair['seed']}: only {one} is right on {pair['only_first']}, only {other} on "
        f"{pair['only_second']}, McNemar p = {pair['p']:.3g}"
    )


# train


def repeat(job: TrainJob, how: Repeats | None = None, listen: Listener = silent) -> Repeated:
    """Train A, B and C in every fold, predict it, and put them side by side; writes `out`/repeated.json.

    job : of architecture "two-models"; the cohort's own split is not used. Run it again to go on. Raises ConfigError.
    """
    how = how or Repeats()
    if job.fit.architecture != "two-models":
        raise ConfigError(f'fit.architecture must be "two-models" here, not {job.fit.architecture!r}.')
    data = prepare(everyone(job), listen)
    rows = table_of([], card_of(job), data.source("train"), job.fit)
    found: dict[str, list[_Fold]] = {name: [] for name in NAMES}
    rules = []
    for seed in range(how.seeds):
        for fold, (_, test) in enumerate(fold_rows(rows.labels, rows.patients, how.folds, seed)):
            listen(Noted(f"Seed {seed + 1} of {how.seeds}, fold {fold + 1} of {how.folds}"))
            away = {rows.patients[i] for i in test}
            bundles = _bundles(job, how, seed, fold, cut(data, rows, away, seed), listen)
            rules.append(str(read_card(bundles["C"]).arguments["rule"]))
            there = only(data, away)
            for name, path in bundles.items():
                card, net = load_network(path)
                found[name].append(_Fold(seed, table_of([Margin(net)], card, there.source("train"), job.fit)))
    result = _summed(found, rules, how, rows)
    storage.write_atomic(Path(job.out) / "repeated.json", storage.to_json(result.to_json()))
    return result


def everyone(job: TrainJob) -> TrainJob:
    """Return the job on a cohort in which every labelled image is in train: folds take the place of its split."""
    items = [item.model_copy(update={"split": "train"}) for item in read_cohort(job.cohort, check=False) if item.label]
    if not items:
        raise ConfigError(f"{job.cohort} has no labels.", next_step="Give it a column `label` with the two classes.")
    path = Path(job.work) / "everyone.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_items(path, items)
    return job.model_copy(update={"cohort": str(path), "split": SplitSpec()})


def cut(data: Data, rows: Table, away: set[str], seed: int) -> Data:
    """Return the data without the patients that are predicted; of the others about a fifth is val."""
    rest = [i for i, patient in enumerate(rows.patients) if patient not in away]
    labels, patients = rows.labels[rest], [rows.patients[i] for i in rest]
    few = most_folds(labels, patients, 10) // 2  # so that val has two patients of each class where it can
    folds = fold_rows(labels, patients, max(2, few), seed)
    val = {patients[i] for i in folds[0][1]}
    kept = only(data, set(patients) - val)
    chunks = {**kept.chunks, "val": only(data, val).chunks["train"]}
    return replace(kept, chunks=chunks, held=People(frozenset(away)))


def only(data: Data, patients: set[str]) -> Data:
    """Return the data of some patients, all in train."""
    known = {item.patient for c in data.chunks["train"] for item in c.items}
    return without(data, known - patients)


def _bundles(job: TrainJob, how: Repeats, seed: int, fold: int, data: Data, listen: Listener) -> dict[str, Path]:
    """Train the three models of a fold; they stay below `work`/repeats."""
    folder = Path(job.work) / "repeats" / f"seed-{seed}-fold-{fold}"
    fit = job.fit.model_copy(update={"seed": job.fit.seed + seed})
    mine = job.model_copy(update={"fit": fit, "work": str(folder), "out": str(folder / "C"), "overwrite": True})
    first, second = part_job(mine, "first"), part_job(mine, "second")
    if how.backbone == "first":
        path = train(first, listen, data).bundle
        with_weights = second.fit.model_copy(update={"weights": str(path)})
        second = second.model_copy(update={"fit": with_weights})
        given = {"first": str(path), "second": str(train(second, listen, data).bundle)}
        machine = (fit.machine or MachineSpec()).model_copy(update=given)
        mine = mine.model_copy(update={"fit": fit.model_copy(update={"machine": machine})})
    joined = train(mine, listen, data).bundle
    return {"A": Path(first.out), "B": Path(second.out), "C": joined}


# figures


@dataclass(frozen=True, eq=False)
class _Fold:
    """A fold's predictions."""

    seed: int
    table: Table


def rows_of(tables: Sequence[Table]) -> Rows:
    """Return predictions of folds as labelled rows."""
    patients = tuple(sorted({p for table in tables for p in table.patients}))
    place = {patient: i for i, patient in enumerate(patients)}
    margins = np.concatenate([table.values[0][:, 0] for table in tables]).astype(np.float32)
    labels = np.concatenate([table.labels for table in tables])
    owner = np.array([place[p] for table in tables for p in table.patients], np.int64)
    keys = tuple((slide, "", 0) for table in tables for slide in table.slide_ids)
    truth = np.stack([1 - labels, labels], 1).astype(np.int8)
    return Rows("classify", patients, owner, keys, truth, np.stack([-margins, margins], 1))


def _summed(found: Mapping[str, Sequence[_Fold]], rules: Sequence[str], how: Repeats, rows: Table) -> Repeated:
    patients = tuple(sorted(set(rows.patients)))
    weights = np.concatenate([np.ones((1, len(patients))), resample_weights(len(patients), RESAMPLES, 0)])
    seeds = {
        name: [rows_of([f.table for f in folds if f.seed == seed]) for seed in range(how.seeds)]
        for name, folds in found.items()
    }
    drawn = {name: _pooled(several, weights, patients) for name, several in seeds.items()}
    each = {name: [_alone(fold.table) for fold in folds] for name, folds in found.items()}
    figures = {
        name: {
            metric: _summary([one[metric] for one in each[name]], drawn[name][metric], len(patients))
            for metric in SHOWN
        }
        for name in found
    }
    pairs = [_pair(one, other, seed, seeds) for one, other in combinations(found, 2) for seed in range(how.seeds)]
    about = {"folds": how.folds, "seeds": how.seeds, "backbone": how.backbone}
    about |= {"images": len(rows.labels), "patients": len(patients)}
    verdict = "\n".join(_verdict(metric, drawn, len(patients)) for metric in ("accuracy", "auc"))
    return Repeated(about, figures, tuple(pairs), tuple(rules), verdict)


def _pooled(several: Sequence[Rows], weights: Floats, patients: Sequence[str]) -> dict[str, Floats]:
    """The mean over seeds of metrics of all predictions of a seed, for all patients and for resampled ones."""
    drawn = [measure(rows, weights, patients) for rows in several]
    return {metric: np.mean([one[metric] for one in drawn], axis=0) for metric in SHOWN}


def _alone(table: Table) -> dict[str, float]:
    rows = rows_of([table])
    found = measure(rows, np.ones((1, len(rows.patients))), rows.patients)
    return {metric: float(values[0]) for metric, values in found.items()}


def _summary(folds: Sequence[float], drawn: Floats, patients: int) -> Summary:
    known = np.array([value for value in folds if not np.isnan(value)])
    mean = float(known.mean()) if len(known) else None
    deviation = float(known.std(ddof=1)) if len(known) > 1 else None
    return Summary(mean, deviation, defined(float(drawn[0])), percentiles(drawn[1:], patients))


def _pair(one: str, other: str, seed: int, seeds: Mapping[str, Sequence[Rows]]) -> dict[str, Any]:
    first, second, p = mcnemar(seeds[one][seed], seeds[other][seed])
    return {"models": [one, other], "seed": seed, "only_first": first, "only_second": second, "p": p}


def _verdict(metric: str, drawn: Mapping[str, Mapping[str, Floats]], patients: int) -> str:
    """Say whether C is above A and B, and by how much above the better of them."""
    values = {name: float(drawn[name][metric][0]) for name in NAMES}
    best = max(("A", "B"), key=lambda name: values[name])
    gain = drawn["C"][metric] - drawn[best][metric]
    interval = percentiles(gain[1:], patients)
    said = f"{gain[0]:+.4f}" + (f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else " (no interval)")
    if not gain[0] > 0:
        return f"C does NOT beat {best} in {metric}: {said}."
    sure = "" if interval and interval[0] > 0 else "; the interval holds 0, so this may be chance"
    return f"C beats A and B in {metric}: {said} over {best}{sure}."

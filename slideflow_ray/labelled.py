"""Labelled margins in memory, tile by tile or slide by slide: what models are compared and calibrated on.

Rates, AUC and loss come with intervals by resampling patients, all from the same draws, so that the difference of
two models has an interval too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slideflow_ray.aggregate import Part
from slideflow_ray.cases import Model, Run, label_tiles, parts_of, truth_of
from slideflow_ray.metrics import MIN_PATIENTS, Interval, Sparse, pairwise_wins

METRICS = (
    "accuracy",
    "balanced_accuracy",
    "sensitivity",
    "specificity",
    "ppv",
    "npv",
    "f1",
    "auc",
    "log_loss",
)
"""What is measured. With several classes all but accuracy and log loss are means over the classes, one against the
rest, as scikit-learn's macro averages; a class without a value is left out of the mean."""

RANKS = 65_536
"""Up to so many distinct margins the resampled AUC is exact; beyond it is of histograms."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Labelled margins of one model: a row for each tile, or each slide.

    patients : whose each row is, str (n,); keys : what the row is, (slide, grid, row), equal between models that
    were given the same tiles; truth : int8 (n, C), 1, 0 or -1 unknown; margins : float32 (n, C).
    """

    task: str
    patients: tuple[str, ...]
    owner: npt.NDArray[np.int64]
    keys: tuple[tuple[str, str, int], ...]
    truth: npt.NDArray[np.int8]
    margins: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def targets(self) -> tuple[int, ...]:
        """Classes that are told from the rest: of two only the second, as the first is its mirror."""
        k = self.truth.shape[1]
        return (1,) if self.task == "classify" and k == 2 else tuple(range(k))

    def called(self, threshold: float = 0.0) -> npt.NDArray[np.int8]:
        """Return what each row is called, int8 (n, C) of 0 and 1.

        The class of the largest margin, or of two classes the second where its margin >= `threshold` (0 is a
        probability of 0.5); every class with margin >= `threshold` for multilabel.
        """
        if self.task == "multilabel":
            return (self.margins >= np.float32(threshold)).astype(np.int8)
        if self.margins.shape[1] == 2:
            second = self.margins[:, 1] >= np.float32(threshold)
            return np.column_stack([~second, second]).astype(np.int8)
        highest: npt.NDArray[np.int8] = np.eye(self.margins.shape[1], dtype=np.int8)[self.margins.argmax(1)]
        return highest

    def right(self, threshold: float = 0.0) -> npt.NDArray[np.bool_]:
        """Return whether each row is called what it is, in all its classes; bool (n,)."""
        known = self.truth >= 0
        same: npt.NDArray[np.bool_] = ((self.called(threshold) == self.truth) | ~known).all(axis=1)
        return same

    def losses(self, temperature: float = 1.0) -> Floats:
        """Return the negative log likelihood of each row in nats, float64 (n,); for multilabel the mean of its labels.

        `temperature` divides the logits, which margins give up to a constant per row: log p = -log(1 + exp(-m)).
        """
        known = self.truth >= 0
        if self.task == "multilabel":
            z = self.margins.astype(np.float64) / temperature
            each = np.where(self.truth == 1, np.logaddexp(0, -z), np.logaddexp(0, z))
            return np.asarray((each * known).sum(1) / known.sum(1))
        z = log_probabilities(self.margins) / temperature
        log_sum = np.logaddexp.reduce(z, axis=1)
        return np.asarray(log_sum - z[np.arange(len(z)), self.truth.argmax(1)])

    def weighted_to(self, patients: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return each row's patient as a place in `patients`, int64 (n,)."""
        place = {patient: i for i, patient in enumerate(patients)}
        return np.array([place[p] for p in self.patients], np.int64)[self.owner]


def log_probabilities(margins: npt.NDArray[np.float32]) -> Floats:
    """Return log p of margins log p/(1-p), float64, same shape: -log(1 + exp(-m)), without overflow."""
    return -np.logaddexp(0.0, -margins.astype(np.float64))


# rows of a run


def tile_rows(run: Run, model: Model, split: str) -> Rows:
    """Return the labelled tiles of a split; all of them are held in memory, 5 bytes for each tile and class.

    Raises AnnotationError.
    """
    of = {item.slide_id: item for item in run.items}
    parts = [part for part in parts_of(run, model) if of[part.slide_id].split == split]
    found = [_tiles(model, part) for part in label_tiles(run, model, parts)]
    keys = [(part.slide_id, part.grid, i) for part, chosen, _, _ in found for i in chosen.tolist()]
    owners = [of[part.slide_id].patient for part, chosen, _, _ in found for _ in chosen]
    return _rows(model, owners, keys, [f[2] for f in found], [f[3] for f in found])


def _tiles(
    model: Model, part: Part
) -> tuple[Part, npt.NDArray[np.int64], npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    margins, truth = part.margins(), part.truth()
    if truth is None:
        truth = np.full(margins.shape, -1, np.int8)
    known = (truth >= 0).any(axis=1) if model.task == "multilabel" else (truth == 1).sum(axis=1) == 1
    chosen = np.flatnonzero(known)
    return part, chosen, truth[chosen], margins[chosen]


def slide_rows(run: Run, model: Model, split: str) -> Rows:
    """Return the slides of a split whose truth the cohort tells; a slide's margin is that of its highest tile.

    Of two classes the first one's margin is the second's mirror: each by its own highest tile would add up to more
    than 1.
    """
    of = {item.slide_id: item for item in run.items}
    top: dict[str, npt.NDArray[np.float32]] = {}
    for part in parts_of(run, model):
        if of[part.slide_id].split == split:
            highest = part.margins().max(axis=0)
            top[part.slide_id] = np.maximum(top.get(part.slide_id, highest), highest)
    if model.task == "classify" and len(model.classes) == 2:
        top = {slide: np.array([-margins[1], margins[1]], np.float32) for slide, margins in top.items()}
    truth = {
        slide: np.array([truth_of(of[slide], model, c, run.labels.names) for c in range(len(model.classes))], np.int8)
        for slide in top
    }
    known = [slide for slide in top if truth[slide].max() >= 0]
    owners = [of[slide].patient for slide in known]
    keys = [(slide, "", 0) for slide in known]
    return _rows(model, owners, keys, [truth[s][None] for s in known], [top[s][None] for s in known])


def _rows(
    model: Model,
    owners: Sequence[str],
    keys: Sequence[tuple[str, str, int]],
    truth: Sequence[npt.NDArray[np.int8]],
    margins: Sequence[npt.NDArray[np.float32]],
) -> Rows:
    patients = tuple(sorted(set(owners)))
    place = {patient: i for i, patient in enumerate(patients)}
    k = len(model.classes)
    return Rows(
        model.task,
        patients,
        np.array([place[p] for p in owners], np.int64),
        tuple(keys),
        np.concatenate([np.empty((0, k), np.int8), *truth]),
        np.concatenate([np.empty((0, k), np.float32), *margins]),
    )


# metrics under weights of patients


def measure(rows: Rows, weights: Floats, patients: Sequence[str], threshold: float = 0.0) -> dict[str, Floats]:
    """Return each of METRICS, float64 (R,), when patients count as often as `weights`, float64 (R, P), says.

    NaN where a metric is not defined. One row of ones gives the metrics themselves.
    """
    owner = rows.weighted_to(patients)
    counts = _counts(rows, owner, len(patients), threshold)
    found = _rates(rows, np.einsum("rp,pkf->rkf", weights, counts))
    found["auc"] = _mean([_auc(rows, owner, len(patients), c, weights) for c in rows.targets])
    total = np.bincount(owner, minlength=len(patients)).astype(np.float64)
    lost = np.bincount(owner, weights=rows.losses(), minlength=len(patients))
    found["log_loss"] = _divided(weights @ lost, weights @ total)
    return {name: found[name] for name in METRICS}


def _counts(rows: Rows, owner: npt.NDArray[np.int64], patients: int, threshold: float) -> Floats:
    """tp, fn, fp, tn of each patient and target, float64 (P, K, 4)."""
    called, truth, out = rows.called(threshold), rows.truth, np.zeros((patients, len(rows.targets), 4))
    for place, c in enumerate(rows.targets):
        kinds = [(1, 1), (1, 0), (0, 1), (0, 0)]
        for i, (is_, said) in enumerate(kinds):
            hit = (truth[:, c] == is_) & (called[:, c] == said)
            out[:, place, i] = np.bincount(owner[hit], minlength=patients)
    return out


def _rates(rows: Rows, counts: Floats) -> dict[str, Floats]:
    tp, fn, fp, tn = (counts[:, :, i] for i in range(4))
    total, single = tp + fn + fp + tn, counts.shape[1] == 1 or rows.task == "multilabel"
    sensitivity, specificity = _divided(tp, tp + fn), _divided(tn, tn + fp)
    # one call per row of several classes: the diagonal is the sum of the true positives
    accuracy = _mean(list(_divided(tp + tn, total).T)) if single else _divided(tp.sum(1), total[:, 0])
    balanced = (sensitivity + specificity) / 2 if single else sensitivity
    each = {
        "balanced_accuracy": balanced,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": _divided(tp, tp + fp),
        "npv": _divided(tn, tn + fn),
        "f1": _divided(2 * tp, 2 * tp + fp + fn),
    }
    return {"accuracy": accuracy} | {name: _mean(list(values.T)) for name, values in each.items()}


def _divided(part: Floats, whole: Floats) -> Floats:
    return np.asarray(np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0))


def _mean(values: Sequence[Floats]) -> Floats:
    """The mean over classes of those that are defined."""
    stacked = np.stack(values)
    defined = ~np.isnan(stacked)
    return _divided(np.where(defined, stacked, 0).sum(0), defined.sum(0).astype(np.float64))


def _auc(rows: Rows, owner: npt.NDArray[np.int64], patients: int, c: int, weights: Floats) -> Floats:
    """Mann and Whitney's pairs won, ties at 1/2, by pairs of patients; then each resample costs P^2 steps."""
    distinct, rank = np.unique(rows.margins[:, c], return_inverse=True)
    bins = rank.astype(np.uint16) if len(distinct) <= RANKS else None
    sides = []
    for side in (1, 0):
        mine = rows.truth[:, c] == side
        sides.append([_binned(rows, c, mine & (owner == p), bins) for p in range(patients)])
    won = np.einsum("rp,rp->r", weights @ pairwise_wins(sides[0], sides[1]), weights)
    totals = [weights @ np.array([h.total for h in side], np.float64) for side in sides]
    return _divided(won, totals[0] * totals[1])


def _binned(rows: Rows, c: int, chosen: npt.NDArray[np.bool_], bins: npt.NDArray[np.uint16] | None) -> Sparse:
    """A patient's margins counted by their rank, which loses nothing, or by their bin."""
    if bins is None:
        return Sparse.of(rows.margins[chosen, c])
    return Sparse.from_dense(np.bincount(bins[chosen], minlength=1).astype(np.int64))


def percentiles(values: Floats, patients: int, level: float = 0.95) -> Interval | None:
    """Return the percentile interval of resampled values; None below MIN_PATIENTS, or where half are not defined.

    None too where all resamples agree, as `metrics.auc_interval` has it.
    """
    defined = values[~np.isnan(values)]
    if patients < MIN_PATIENTS or 2 * len(defined) < len(values):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high)) if low < high else None


def same_rows(one: Rows, other: Rows) -> bool:
    """Return whether two models were given the same labelled tiles."""
    return one.keys == other.keys and bool(np.array_equal(one.truth, other.truth))


def mcnemar(one: Rows, other: Rows, threshold: float = 0.0) -> tuple[int, int, float]:
    """Return how many rows only the first calls rightly, how many only the second, and the exact two-sided p.

    Q. McNemar, Psychometrika 12 (1947) 153-157, by the binomial distribution; 1 where the two never disagree.
    """
    from scipy.stats import binomtest

    a, b = one.right(threshold), other.right(threshold)
    first, second = int(np.count_nonzero(a & ~b)), int(np.count_nonzero(b & ~a))
    p = float(binomtest(min(first, second), first + second).pvalue) if first + second else 1.0
    return first, second, p

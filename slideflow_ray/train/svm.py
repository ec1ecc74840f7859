"""Support vector machines on frozen features, calibrated out of fold; and the joining of two models' predictions.

METHODS part 000. Everything that is chosen (kernel, C, gamma, the rule that joins) is chosen on predictions of patients
that the fitted part has not seen. Fitting is scikit-learn's; what comes out are arrays for `models.skip`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from slideflow_ray.errors import ConfigError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Rule = Literal["vote", "stack", "features"]
RULES: tuple[Rule, ...] = ("vote", "stack", "features")

LINEAR_C = (1e-3, 1e-2, 1e-1, 1.0)
RBF_C = (0.1, 1.0, 10.0, 100.0)
RBF_GAMMA = ("scale", 1e-2, 1e-3, 1e-4)
SHARES = np.arange(0, 1.0001, 0.05)
LEAST = 1e-6
"""Probabilities are kept this far from 0 and 1 where their logarithm is taken."""


@dataclass(frozen=True)
class Fitted:
    """A fitted machine as arrays, and what it says of patients that it has not seen.

    kernel, c, gamma : what the inner folds chose; basis : of principal components, (components, D), None without
    oof : float64, calibrated probability of each training row by machines fitted without its patient; where rows were
    held back, of these; auc : of what the search was judged by, at its best
    """

    kernel: str
    c: float
    gamma: float
    mean: Floats
    scale: Floats
    vectors: Floats
    weight: Floats
    bias: float
    oof: Floats
    basis: Floats | None = None
    auc: float = float("nan")

    def state(self, prefix: str = "machine.") -> dict[str, torch.Tensor]:
        """Return the arrays as the state of a `models.skip.Machine`."""
        zeros = np.zeros_like(self.weight)
        arrays = {
            "mean": self.mean,
            "scale": self.scale,
            "gamma": np.array(self.gamma),
            "vectors": self.vectors,
            "head.weight": np.stack([zeros, self.weight]),
            "head.bias": np.array([0.0, self.bias]),
        }
        if self.basis is not None:
            arrays["basis"] = self.basis
        return {prefix + key: torch.from_numpy(value.astype(np.float32)) for key, value in arrays.items()}


def check_rows(
    labels: Ints, patients: Sequence[str], folds: int, classes: Sequence[str] = ("0", "1"), where: str = ""
) -> None:
    """Raise ConfigError where there are not `folds` patients of each class; `where` says of what, in words."""
    for label, name in enumerate(classes):
        whose = {p for p, y in zip(patients, labels, strict=True) if y == label}
        if len(whose) < folds:
            raise ConfigError(
                f"Class {name} has images of {len(whose)} patients{where}; {folds} folds by patient need {folds}.",
                next_step="Give more patients, or fewer folds (fit.machine.folds).",
            )


@dataclass(frozen=True)
class _Rows:
    """Rows to search on: which of them are fitted together and judged in turn, and which the kept machine is of.

    judged : for each split the places of its judged rows in the answer
    """

    x: Floats
    y: Ints
    patients: tuple[str, ...]
    splits: list[tuple[Ints, Ints]]
    judged: list[Ints]
    kept: slice


Held = tuple[Floats, Ints, Sequence[str]]
"""Features, labels and patients of rows that are held back."""


def fit_machine(
    features: Floats,
    labels: Ints,
    patients: Sequence[str],
    *,
    folds: int = 5,
    seed: int = 0,
    quick: bool = False,
    kernels: Sequence[str] = ("linear", "rbf"),
    components: int = 0,
    crossed: Sequence[Floats] = (),
    held: Held | None = None,
) -> Fitted:
    """Fit a machine: standardise, search kernel, C and gamma by grouped folds, calibrate by Platt out of fold.

    features : (n, D); labels : 0 or 1, (n,); patients : whose each row is
    components : principal components that the machine sees, 0 all features
    crossed : features of all rows by networks that have not seen fold k, for each fold; what is judged is judged on
    these, since features of rows that a network was trained on flatter it
    held : rows of other patients by which all is judged instead of by folds
    quick : only the linear kernel with C = 0.01 and 1, for tests and first looks

    Raises ConfigError where a class has fewer patients than folds, or is missing among the rows held back.
    """
    from sklearn.model_selection import GridSearchCV

    rows = (
        _held(features, labels, patients, held) if held else _crossed(features, labels, patients, folds, seed, crossed)
    )
    grid: list[dict[str, Any]] = []
    if "linear" in kernels:
        grid.append({"svc__kernel": ["linear"], "svc__C": list((1e-2, 1.0) if quick else LINEAR_C)})
    if "rbf" in kernels and not quick:
        grid.append({"svc__kernel": ["rbf"], "svc__C": list(RBF_C), "svc__gamma": list(RBF_GAMMA)})
    found = GridSearchCV(
        _pipeline(components), grid, scoring="roc_auc", cv=rows.splits, refit=False, error_score="raise"
    )
    found.fit(rows.x, rows.y)
    chosen = found.best_params_
    scores = [_fitted(rows, train, components, chosen).decision_function(rows.x[test]) for train, test in rows.splits]
    together, of = np.concatenate(scores), np.concatenate([test for _, test in rows.splits])
    a, b = platt(together, rows.y[of])
    oof = np.empty(len(together))
    oof[np.concatenate(rows.judged)] = 1 / (1 + np.exp(_calibrated(scores, rows, folds, seed)))
    whole = _fitted(rows, np.arange(len(rows.y))[rows.kept], components, chosen)
    return _arrays(whole, a, b, oof, chosen, float(found.best_score_))


def _crossed(
    features: Floats, labels: Ints, patients: Sequence[str], folds: int, seed: int, crossed: Sequence[Floats]
) -> _Rows:
    check_rows(labels, patients, folds)
    plain, n = fold_rows(labels, patients, folds, seed), len(labels)
    blocks = 1 + len(crossed)
    ahead = [n * (k + 1) if crossed else 0 for k in range(folds)]
    splits = [(train + more, test + more) for (train, test), more in zip(plain, ahead, strict=True)]
    x = np.concatenate([features, *crossed]) if crossed else features
    return _Rows(x, np.tile(labels, blocks), tuple(patients) * blocks, splits, [test for _, test in plain], slice(0, n))


def _held(features: Floats, labels: Ints, patients: Sequence[str], held: Held) -> _Rows:
    check_rows(labels, patients, 1)
    check_rows(held[1], held[2], 2)
    n, m = len(labels), len(held[1])
    splits = [(np.arange(n), np.arange(n, n + m))]
    y = np.concatenate([labels, held[1]])
    return _Rows(np.concatenate([features, held[0]]), y, (*patients, *held[2]), splits, [np.arange(m)], slice(0, n))


def _pipeline(components: int = 0, **settings: Any) -> Any:
    from sklearn.decomposition import PCA
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    steps: list[tuple[str, Any]] = [("scale", StandardScaler())]
    steps += [("pca", PCA(components, svd_solver="full"))] if components else []
    steps += [("svc", SVC(class_weight="balanced", cache_size=500))]
    return Pipeline(steps).set_params(**settings)


def _fitted(rows: _Rows, train: Ints, components: int, chosen: Mapping[str, Any]) -> Any:
    return _pipeline(components, **chosen).fit(rows.x[train], rows.y[train])


def fold_rows(labels: Ints, patients: Sequence[str], folds: int, seed: int) -> list[tuple[Ints, Ints]]:
    """Return (train rows, test rows) of each fold: stratified, no patient on both sides."""
    from sklearn.model_selection import StratifiedGroupKFold

    cut = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return list(cut.split(np.zeros((len(labels), 1)), labels, np.asarray(patients)))


def platt(scores: Floats, labels: Ints) -> tuple[float, float]:
    """Return (A, B) of p = 1 / (1 + exp(A s + B)), as scikit-learn's sigmoid calibration fits it (Platt 1999).

    Targets are smoothed as in Platt's paper, so that separable scores give finite values.
    """
    from sklearn.calibration import _SigmoidCalibration

    fitted = _SigmoidCalibration().fit(scores, labels)
    return float(fitted.a_), float(fitted.b_)


def _calibrated(scores: Sequence[Floats], rows: _Rows, folds: int, seed: int) -> Floats:
    """Return A s + B of each judged row, by a calibration that has not seen its fold, split after split."""
    of = np.concatenate([test for _, test in rows.splits])
    together, labels = np.concatenate(scores), rows.y[of]
    number = np.repeat(np.arange(len(scores)), [len(part) for part in scores])
    if len(scores) == 1:  # rows that were held back are calibrated by folds of their own
        patients = [rows.patients[i] for i in of]
        number = np.zeros(len(of), np.int64)
        for k, (_, test) in enumerate(fold_rows(labels, patients, most_folds(labels, patients, folds), seed)):
            number[test] = k
    found = np.empty_like(together)
    for k in np.unique(number):
        others = number != k if number.max() else number == k
        a, b = platt(together[others], labels[others])
        found[number == k] = a * together[number == k] + b
    return found


def most_folds(labels: Ints, patients: Sequence[str], folds: int) -> int:
    """Return how many folds by patient there can be with patients of both classes in each, 2 at least."""
    few = min(len({p for p, y in zip(patients, labels, strict=True) if y == label}) for label in (0, 1))
    return max(2, min(folds, few))


def _arrays(whole: Any, a: float, b: float, oof: Floats, chosen: Mapping[str, Any], auc: float) -> Fitted:
    scale, svc = whole.named_steps["scale"], whole.named_steps["svc"]
    linear = chosen["svc__kernel"] == "linear"
    return Fitted(
        kernel=chosen["svc__kernel"],
        c=float(chosen["svc__C"]),
        gamma=1.0 if linear else float(svc._gamma),  # what "scale" came to
        mean=scale.mean_,
        scale=scale.scale_,
        vectors=np.empty((0, svc.shape_fit_[1])) if linear else svc.support_vectors_,
        weight=-a * (svc.coef_[0] if linear else svc.dual_coef_[0]),
        bias=float(-(a * svc.intercept_[0] + b)),
        oof=oof,
        basis=whole.named_steps["pca"].components_ if "pca" in whole.named_steps else None,
        auc=auc,
    )


# joining two models


@dataclass(frozen=True)
class Joined:
    """How two models are joined, chosen on predictions of unseen patients.

    rule and its log loss; losses of every rule that was tried, "A" and "B" alone among them; weight : of A in "vote";
    coefficients : of margins A and B, and the intercept, in "stack"
    """

    rule: Rule
    losses: dict[str, float]
    weight: float
    coefficients: tuple[float, float, float]

    @property
    def helps(self) -> bool:
        """Whether the joined model has a lower log loss than either alone; if not, that is said."""
        return self.losses[self.rule] < min(self.losses["A"], self.losses["B"])


def log_loss(p: Floats, labels: Ints) -> float:
    """Return the mean negative log likelihood in nats."""
    from sklearn.metrics import log_loss as measured

    return float(measured(labels, np.clip(p, LEAST, 1 - LEAST), labels=[0, 1]))


def join(
    a: Floats,
    b: Floats,
    labels: Ints,
    patients: Sequence[str],
    joint: Floats | None = None,
    *,
    folds: int = 5,
    rules: Sequence[Rule] = RULES,
) -> Joined:
    """Choose how to join probabilities `a` and `b`, float64 (n,) each, of patients that neither model has seen.

    joint : probabilities of a machine on the features of both, out of fold too; None leaves that rule out
    rules : that may be kept

    Each rule is judged by predictions of patients that its own weights were not fitted on either; the weights kept are
    fitted on all. Of equal rules the simpler is kept: vote, stack, features.
    """
    check_rows(labels, patients, 2)
    splits = fold_rows(labels, patients, most_folds(labels, patients, folds), 0)
    voted, stacked = np.empty(len(labels)), np.empty(len(labels))
    for train, test in splits:
        share = _best_share(a[train], b[train], labels[train])
        voted[test] = share * a[test] + (1 - share) * b[test]
        c = _stack(a[train], b[train], labels[train])
        stacked[test] = 1 / (1 + np.exp(-(c[0] * _logit(a[test]) + c[1] * _logit(b[test]) + c[2])))
    losses = {"A": log_loss(a, labels), "B": log_loss(b, labels)}
    losses |= {"vote": log_loss(voted, labels), "stack": log_loss(stacked, labels)}
    if joint is not None:
        losses["features"] = log_loss(joint, labels)
    rule = min((name for name in RULES if name in rules and name in losses), key=lambda name: losses[name])
    return Joined(rule, losses, _best_share(a, b, labels), _stack(a, b, labels))


def _logit(p: Floats) -> Floats:
    q = np.clip(p, LEAST, 1 - LEAST)
    found: Floats = np.log(q / (1 - q))
    return found


def _best_share(a: Floats, b: Floats, labels: Ints) -> float:
    return float(min(SHARES, key=lambda w: (log_loss(w * a + (1 - w) * b, labels), abs(w - 0.5))))


def _stack(a: Floats, b: Floats, labels: Ints) -> tuple[float, float, float]:
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=1000).fit(np.column_stack([_logit(a), _logit(b)]), labels)
    return float(fitted.coef_[0, 0]), float(fitted.coef_[0, 1]), float(fitted.intercept_[0])


def joined_state(joined: Joined) -> dict[str, torch.Tensor]:
    """Return what `models.skip.TwoModels` needs beside its two networks, for the rules "vote" and "stack"."""
    a, b, c = joined.coefficients
    row, bias = ([1.0], 0.0) if joined.rule == "vote" else ([a, b], c)
    return {
        "weight": torch.tensor(joined.weight),
        "head.weight": torch.tensor([[0.0] * len(row), row]),
        "head.bias": torch.tensor([0.0, bias]),
    }


# repeated folds


def repeated_folds(
    labels: Ints, patients: Sequence[str], folds: int = 5, seeds: int = 3
) -> Iterator[tuple[int, int, Ints, Ints]]:
    """Yield (seed, fold, train rows, test rows): stratified, no patient on both sides."""
    for seed in range(seeds):
        for fold, (train, test) in enumerate(fold_rows(labels, patients, folds, seed)):
            yield seed, fold, train, test

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

LINEAR_C = (1e-3, 1e-2, 1e-1, 1.0)
RBF_C = (0.1, 1.0, 10.0, 100.0)
RBF_GAMMA = ("scale", 1e-2, 1e-3, 1e-4)
SHARES = np.arange(0, 1.0001, 0.05)
LEAST = 1e-6
"""Probabilities are kept this far from 0 and 1 where their logarithm is taken."""


@dataclass(frozen=True)
class Fitted:
    """A fitted machine as arrays, and what it says of patients that it has not seen.

    kernel, c, gamma : what the inner folds chose; oof : float64 (n,), calibrated probability of each training row by
    machines fitted without its patient
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
        return {prefix + key: torch.from_numpy(value.astype(np.float32)) for key, value in arrays.items()}


def check_rows(labels: Ints, patients: Sequence[str], folds: int) -> None:
    """Raise ConfigError where there are not `folds` patients of each class."""
    for label in (0, 1):
        whose = {p for p, y in zip(patients, labels, strict=True) if y == label}
        if len(whose) < folds:
            raise ConfigError(
                f"Class {label} has images of {len(whose)} patients; {folds} folds by patient need {folds}.",
                next_step="Give more patients, or fewer folds.",
            )


def fit_machine(
    features: Floats, labels: Ints, patients: Sequence[str], *, folds: int = 5, seed: int = 0, quick: bool = False
) -> Fitted:
    """Fit a machine: standardise, search kernel, C and gamma by grouped folds, calibrate by Platt out of fold.

    features : (n, D); labels : 0 or 1, (n,); patients : whose each row is
    quick : only the linear kernel with C = 0.01 and 1, for tests and first looks

    Raises ConfigError where a class has fewer patients than folds.
    """
    from sklearn.model_selection import GridSearchCV

    check_rows(labels, patients, folds)
    splits = _folds(labels, patients, folds, seed)
    grid = [{"svc__kernel": ["linear"], "svc__C": list((1e-2, 1.0) if quick else LINEAR_C)}]
    if not quick:
        grid.append({"svc__kernel": ["rbf"], "svc__C": list(RBF_C), "svc__gamma": list(RBF_GAMMA)})
    found = GridSearchCV(_pipeline(), grid, scoring="roc_auc", cv=splits, refit=False, error_score="raise")
    found.fit(features, labels)
    chosen = found.best_params_
    scores = np.empty(len(labels))
    for train, test in splits:
        scores[test] = _pipeline(**chosen).fit(features[train], labels[train]).decision_function(features[test])
    a, b = platt(scores, labels)
    whole = _pipeline(**chosen).fit(features, labels)
    return _arrays(whole, a, b, 1 / (1 + np.exp(_crossed(scores, labels, splits))), chosen)


def _pipeline(**settings: Any) -> Any:
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    steps = [("scale", StandardScaler()), ("svc", SVC(class_weight="balanced", cache_size=500))]
    return Pipeline(steps).set_params(**settings)


def _folds(labels: Ints, patients: Sequence[str], folds: int, seed: int) -> list[tuple[Ints, Ints]]:
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


def _crossed(scores: Floats, labels: Ints, splits: Sequence[tuple[Ints, Ints]]) -> Floats:
    """Return A s + B of each row, by a calibration that has not seen its fold."""
    found = np.empty_like(scores)
    for train, test in splits:
        a, b = platt(scores[train], labels[train])
        found[test] = a * scores[test] + b
    return found


def _arrays(whole: Any, a: float, b: float, oof: Floats, chosen: Mapping[str, Any]) -> Fitted:
    scale, svc = whole.named_steps["scale"], whole.named_steps["svc"]
    linear = chosen["svc__kernel"] == "linear"
    return Fitted(
        kernel=chosen["svc__kernel"],
        c=float(chosen["svc__C"]),
        gamma=1.0 if linear else float(svc._gamma),  # what "scale" came to
        mean=scale.mean_,
        scale=scale.scale_,
        vectors=np.empty((0, len(scale.mean_))) if linear else svc.support_vectors_,
        weight=-a * (svc.coef_[0] if linear else svc.dual_coef_[0]),
        bias=float(-(a * svc.intercept_[0] + b)),
        oof=oof,
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
    a: Floats, b: Floats, labels: Ints, patients: Sequence[str], joint: Floats | None = None, *, folds: int = 5
) -> Joined:
    """Choose how to join probabilities `a` and `b`, float64 (n,) each, of patients that neither model has seen.

    joint : probabilities of a machine on the features of both, out of fold too; None leaves that rule out

    Each rule is judged by predictions of patients that its own weights were not fitted on either; the weights kept are
    fitted on all. Of equal rules the simpler is kept: vote, stack, features.
    """
    splits = _folds(labels, patients, folds, 0)
    voted, stacked = np.empty(len(labels)), np.empty(len(labels))
    for train, test in splits:
        share = _best_share(a[train], b[train], labels[train])
        voted[test] = share * a[test] + (1 - share) * b[test]
        c = _stack(a[train], b[train], labels[train])
        stacked[test] = 1 / (1 + np.exp(-(c[0] * _logit(a[test]) + c[1] * _logit(b[test]) + c[2])))
    losses = {"A": log_loss(a, labels), "B": log_loss(b, labels)}
    losses |= {"vote": log_loss(voted, labels), "stack": log_loss(stacked, labels)}
    rules: list[Rule] = ["vote", "stack"]
    if joint is not None:
        losses["features"] = log_loss(joint, labels)
        rules.append("features")
    rule = min(rules, key=lambda name: losses[name])
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
        for fold, (train, test) in enumerate(_folds(labels, patients, folds, seed)):
            yield seed, fold, train, test

"""One temperature for each classifier, fitted on validation: the logits are divided by it, so that probabilities fit.

C. Guo et al., On calibration of modern neural networks, ICML 2017. Margins give the logits up to a constant of each
tile (log p), so scaling them is exact: p' is in proportion to p ** (1 / T), and the call by arg max stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slideflow_ray import storage
from slideflow_ray.aggregate import probability
from slideflow_ray.cases import Model, Run, read_run
from slideflow_ray.errors import ConfigError
from slideflow_ray.labelled import Rows, log_probabilities, tile_rows
from slideflow_ray.lease import lease
from slideflow_ray.metrics import RELIABILITY_BINS, Reliability
from slideflow_ray.results import FITTED, JUDGED, defined
from slideflow_ray.specs import Spec

SCHEMA = 1
TEMPERATURE = "temperature.json"
LOWEST, HIGHEST = 0.01, 100.0
"""Temperatures lie between these."""


class Fit(Spec):
    """How probabilities of one split fit: mean negative log likelihood in nats, expected calibration error, and the
    reliability by tenth: (mean probability, observed share, cases), one class against the rest, classes together."""

    split: str
    tiles: int
    nll: float
    ece: float | None
    reliability: tuple[tuple[float | None, float | None, int], ...]


class Calibration(Spec):
    """A model's temperature and what it changes: (before, after) on the split it was fitted on, and on test."""

    model: str
    name: str
    temperature: float
    fitted: tuple[Fit, Fit]
    test: tuple[Fit, Fit] | None = None
    note: str = ""

    @property
    def sentence(self) -> str:
        """The calibration in one line."""
        sides = [self.fitted, *([self.test] if self.test else [])]
        parts = [
            f"on {a.split} NLL {a.nll:.4f} to {b.nll:.4f}, expected calibration error {_error(a)} to {_error(b)} "
            f"({a.tiles:,} tiles)"
            for a, b in sides
        ]
        said = f"{self.name}: temperature {self.temperature:.4f} fitted on {self.fitted[0].split}; {'; '.join(parts)}"
        return f"{said}. {self.note}".rstrip()


def _error(fit: Fit) -> str:
    return "not defined" if fit.ece is None else f"{fit.ece:.4f}"


def calibrate(out: str | Path, split: str = FITTED) -> tuple[tuple[Calibration, ...], tuple[str, ...]]:
    """Fit a temperature for each classifier of a run, write temperature.json, return them and notes.

    Fitted on `split` alone; test is only looked at. Raises ConfigError (no run, no classifier, nothing labelled in
    `split`, or the split is test), AnnotationError, LeaseError.
    """
    if split == JUDGED:
        raise ConfigError(
            f"A temperature is not fitted on {JUDGED!r}, which only judges.", next_step="Use --split val."
        )
    run = read_run(storage.place(out))
    with lease(run.out):
        found = [(model, fit_model(run, model, split)) for model in run.models]
        done = tuple(one for _, one in found if one)
        notes = tuple(
            f"{m.name}: no labelled tile in split {split!r}, so no temperature." for m, one in found if not one
        )
        if not done:
            raise ConfigError(
                f"{out} has no labelled tile of a classifier in split {split!r}.",
                next_step="Give the cohort's slides of that split an annotation, or a label, and run again.",
            )
        storage.write_atomic(run.out / TEMPERATURE, storage.to_json(_record(done, notes)))
    return done, notes


def _record(done: Sequence[Calibration], notes: Sequence[str]) -> dict[str, Any]:
    return {"schema": SCHEMA, "models": [one.model_dump(mode="json") for one in done], "notes": list(notes)}


def read_calibrations(out: str | Path) -> dict[str, Calibration]:
    """Return what `calibrate` wrote, by the model's node; nothing where it has not run. Raises ConfigError."""
    found = storage.read_json(storage.place(out) / TEMPERATURE)
    parsed = [Calibration.parse(one, TEMPERATURE) for one in found["models"]] if found else []
    return {one.model: one for one in parsed}


def fit_model(run: Run, model: Model, split: str) -> Calibration | None:
    """Return a model's calibration, or None where no tile of `split` is labelled."""
    rows = tile_rows(run, model, split)
    if not len(rows):
        return None
    t = temperature(rows)
    test = tile_rows(run, model, JUDGED)
    return Calibration(
        model=model.node,
        name=model.name,
        temperature=t,
        fitted=(fit_of(rows, 1.0, split), fit_of(rows, t, split)),
        test=(fit_of(test, 1.0, JUDGED), fit_of(test, t, JUDGED)) if len(test) else None,
        note=_note(rows, t),
    )


def _note(rows: Rows, t: float) -> str:
    if bool(rows.right().all()):
        return "No tile of validation is called wrongly, so there is no best temperature: it stays 1."
    at_end = t < LOWEST * 1.01 or t > HIGHEST / 1.01
    return "It lies at the end of what is allowed, so validation has no best temperature." if at_end else ""


def temperature(rows: Rows) -> float:
    """Return the temperature of least mean negative log likelihood, between LOWEST and HIGHEST.

    The loss is convex in 1/T (a log-sum-exp of linear functions), so a bounded search over log T finds its least.
    Where every row is called rightly the loss falls with T without end, and the temperature is 1.
    """
    if bool(rows.right().all()):
        return 1.0
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        return float(rows.losses(math.exp(log_t)).mean())

    found = minimize_scalar(
        loss, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded", options={"xatol": 1e-6}
    )
    return float(math.exp(found.x))


def scaled(margins: npt.NDArray[np.float32], task: str, t: float) -> npt.NDArray[np.float32]:
    """Return margins, float32 (n, C), as they are when the logits are divided by `t`."""
    if task == "multilabel":
        return (margins.astype(np.float64) / t).astype(np.float32)
    z = log_probabilities(margins) / t
    others = [np.logaddexp.reduce(np.delete(z, c, axis=1), axis=1) for c in range(z.shape[1])]
    return np.asarray(z - np.column_stack(others), np.float32)


def fit_of(rows: Rows, t: float, split: str) -> Fit:
    """Return how probabilities fit at a temperature."""
    p = probability(scaled(rows.margins, rows.task, t))
    each = [Reliability.of(p[rows.truth[:, c] == 1, c], p[rows.truth[:, c] == 0, c]) for c in rows.targets]
    errors = [one.expected_calibration_error for one in each if one.total.sum()]
    whole = sum(each, Reliability.empty())
    table = [
        (defined(float(whole.mean_probability[i])), defined(float(whole.observed[i])), int(whole.total[i]))
        for i in range(RELIABILITY_BINS)
    ]
    return Fit(
        split=split,
        tiles=len(rows),
        nll=float(rows.losses(t).mean()),
        ece=math.fsum(errors) / len(errors) if errors else None,
        reliability=tuple(table),
    )

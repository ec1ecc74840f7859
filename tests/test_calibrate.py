"""calibrate.py: the temperature against brute force and a known truth; exact on margins."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scored import cells_of, two_class, write_scored_run
from sklearn.metrics import log_loss, roc_auc_score

from slideflow_ray import cli
from slideflow_ray.aggregate import probability
from slideflow_ray.calibrate import Calibration, calibrate, fit_of, read_calibrations, scaled, temperature
from slideflow_ray.errors import ConfigError
from slideflow_ray.labelled import Rows
from slideflow_ray.report import write_report


def margins_of(z: np.ndarray) -> np.ndarray:
    others = [np.log(np.exp(np.delete(z, c, 1)).sum(1)) for c in range(z.shape[1])]
    return (z - np.column_stack(others)).astype(np.float32)


def rows_of(margins: np.ndarray, truth: np.ndarray, task: str = "classify") -> Rows:
    n = len(margins)
    keys = tuple(("s", "g", i) for i in range(n))
    return Rows(task, ("p",), np.zeros(n, np.int64), keys, truth.astype(np.int8), margins.astype(np.float32))


def drawn(classes: int, true_t: float, n: int = 40_000, seed: int = 0) -> tuple[np.ndarray, Rows]:
    """Logits that are `true_t` times too large: labels are drawn from softmax(z / true_t)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (n, classes))
    p = softmax(z / true_t, axis=1)
    truth = (rng.random(n)[:, None] > p.cumsum(1)).sum(1)
    return z, rows_of(margins_of(z), np.eye(classes, dtype=np.int8)[truth])


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("true_t", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_found(classes, true_t):
    _, rows = drawn(classes, true_t)
    assert temperature(rows) == pytest.approx(true_t, rel=0.03)


@pytest.mark.parametrize("classes", [2, 5])
def test_it_is_that_of_the_logits_by_brute_force(classes):
    z, rows = drawn(classes, 1.7, n=3000)
    truth = rows.truth.argmax(1)

    def nll(t: float) -> float:
        return -log_softmax(z / t, axis=1)[np.arange(len(z)), truth].mean()

    grid = np.geomspace(0.2, 8, 4001)
    best = grid[np.argmin([nll(t) for t in grid])]
    found = temperature(rows)
    assert found == pytest.approx(best, rel=1.5e-3)
    assert found == pytest.approx(minimize_scalar(nll, bracket=(1.0, 2.0)).x, rel=1e-4)
    assert fit_of(rows, found, "val").nll == pytest.approx(nll(found), abs=1e-6)
    assert fit_of(rows, 1.0, "val").nll == pytest.approx(log_loss(truth, softmax(z, axis=1)), abs=1e-6)


def test_scaled_margins_are_those_of_scaled_logits():
    z, rows = drawn(3, 1.0, n=500)
    np.testing.assert_allclose(scaled(rows.margins, "classify", 2.5), margins_of(z / 2.5), atol=2e-6)
    np.testing.assert_allclose(probability(scaled(rows.margins, "classify", 2.5)).sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(scaled(rows.margins, "classify", 4.0).argmax(1), rows.margins.argmax(1))
    far = np.array([[3000.0, -3000.0], [-200.0, 200.0]], np.float32)
    np.testing.assert_allclose(scaled(far, "classify", 2.0), far / 2, rtol=1e-6)


def test_multilabel_divides_each_logit_and_leaves_unknown_labels_out():
    rng = np.random.default_rng(3)
    z = rng.normal(0, 3, (20_000, 3))
    truth = (rng.random(z.shape) < 1 / (1 + np.exp(-z / 2))).astype(np.int8)
    hidden = truth.copy()
    hidden[::3, 1] = -1
    assert temperature(rows_of(z, truth, "multilabel")) == pytest.approx(2, rel=0.03)
    assert temperature(rows_of(z, hidden, "multilabel")) == pytest.approx(2, rel=0.03)


def test_the_auc_of_two_classes_stays():
    _, rows = drawn(2, 2.0, n=2000)
    before, after = (scaled(rows.margins, "classify", t)[:, 1] for t in (1.0, temperature(rows)))
    assert roc_auc_score(rows.truth[:, 1], after) == roc_auc_score(rows.truth[:, 1], before)


def test_expected_calibration_error_falls_and_is_the_literal_one():
    _, rows = drawn(2, 3.0)
    before, after = fit_of(rows, 1.0, "val"), fit_of(rows, temperature(rows), "val")
    assert after.ece < before.ece / 3
    p, y = 1 / (1 + np.exp(-rows.margins[:, 1].astype(float))), rows.truth[:, 1]
    bins = np.clip(np.ceil(p * 10) - 1, 0, 9)
    literal = sum(abs(y[bins == b].mean() - p[bins == b].mean()) * (bins == b).mean() for b in range(10))
    assert before.ece == pytest.approx(literal, abs=1e-6)
    assert sum(n for _, _, n in before.reliability) == len(rows)


@pytest.fixture
def out(tmp_path):
    """Margins are three times too large on validation and on test."""
    rng = np.random.default_rng(0)
    slides = [
        two_class(tmp_path, rng, f"{split}{i}", f"P{split}{i}", split, tumour=i % 2 == 0)
        for split in ("val", "test")
        for i in range(4)
    ]
    return write_scored_run(tmp_path / "out", slides)


def test_a_run_is_calibrated_on_validation_and_shown_on_test(out, capsys):
    (one,), notes = calibrate(out)
    assert notes == ()
    assert one.fitted[1].nll <= one.fitted[0].nll
    assert [one.fitted[0].tiles, one.test[0].tiles] == [4 * len(cells_of(9, 13))] * 2
    assert read_calibrations(out) == {one.model: one}
    with pytest.raises(SystemExit) as end:
        cli.main(["calibrate", str(out), "--json"])
    assert not end.value.code
    assert Calibration.parse(json.loads(capsys.readouterr().out)["models"][0], "test") == one


def test_test_is_only_looked_at(out, tmp_path):
    """Other scores on test leave the temperature as it is."""
    rng = np.random.default_rng(0)
    slides = [two_class(tmp_path, rng, f"val{i}", f"Pval{i}", "val", tumour=i % 2 == 0) for i in range(4)]
    alone, _ = calibrate(write_scored_run(tmp_path / "alone", slides))
    both, _ = calibrate(out)
    assert alone[0].temperature == both[0].temperature
    assert alone[0].test is None
    with pytest.raises(ConfigError, match="only judges"):
        calibrate(out, "test")
    with pytest.raises(ConfigError, match="no labelled tile"):
        calibrate(out, "train")


def test_perfect_validation_has_no_best_temperature(tmp_path):
    rng = np.random.default_rng(0)
    slides = [two_class(tmp_path, rng, f"v{i}", f"P{i}", "val", tumour=i % 2 == 0) for i in range(2)]
    x, y = slides[0].cells[:, 1] * 40 + 40, slides[0].cells[:, 0] * 40 + 40
    inside = (x < 200) & (y < 300)
    for slide, tumour in zip(slides, (True, False), strict=True):
        z = np.where(inside & tumour, 2.0, -2.0)
        slide.margins[:] = np.column_stack([-z, z])
    (one,), _ = calibrate(write_scored_run(tmp_path / "out", slides))
    assert one.temperature == 1
    assert "no best temperature" in one.sentence


def test_the_report_shows_the_temperature(out):
    from slideflow_ray.evaluate import evaluate

    evaluate(out)
    before = write_report(out).read_text()
    (one,), _ = calibrate(out)
    after = write_report(out).read_text()
    assert "Temperature" not in before
    assert f"{one.temperature:.3f}" in after
    assert "Temperature" in after

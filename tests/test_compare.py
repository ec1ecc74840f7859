"""compare.py and labelled.py: the figures are scikit-learn's, the intervals those of literal resampling."""

from __future__ import annotations

import json
from pathlib import Path

import judged
import numpy as np
import pytest
import sklearn.metrics as sk
from scipy.stats import binomtest
from scored import Scored, cells_of, write_scored_run

from slideflow_ray import cli
from slideflow_ray.cases import read_run
from slideflow_ray.cohort import Item
from slideflow_ray.compare import Settings, compare
from slideflow_ray.errors import ConfigError
from slideflow_ray.labelled import METRICS, Rows, mcnemar, measure, percentiles, slide_rows, tile_rows
from slideflow_ray.metrics import resample_weights


def rows_of(task: str, classes: int, n: int = 600, patients: int = 7, seed: int = 0, unknown: float = 0.0) -> Rows:
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, patients, n)
    if task == "multilabel":
        truth = rng.integers(0, 2, (n, classes)).astype(np.int8)
        truth[rng.random(truth.shape) < unknown] = -1
        truth[(truth < 0).all(1), 0] = 1
        margins = (truth * 1.5 + rng.normal(0, 1.5, truth.shape)).astype(np.float32)
    else:
        index = rng.integers(0, classes, n)
        truth = np.eye(classes, dtype=np.int8)[index]
        z = rng.normal(0, 1, (n, classes)) + 1.2 * truth
        others = [np.log(np.exp(np.delete(z, c, 1)).sum(1)) for c in range(classes)]
        margins = (z - np.column_stack(others)).astype(np.float32)
    keys = tuple((f"s{p}", "g", i) for i, p in enumerate(owner))
    return Rows(task, tuple(f"p{i}" for i in range(patients)), owner, keys, truth, margins)


def literal(truth: np.ndarray, margins: np.ndarray, task: str) -> dict[str, float]:
    """scikit-learn on the margins of one model."""
    p = 1 / (1 + np.exp(-margins.astype(float)))
    if task == "multilabel":
        each = [literal_binary(truth[:, c], p[:, c]) for c in range(truth.shape[1])]
        found = {k: np.nanmean([e[k] for e in each]) for k in METRICS}
        known = truth >= 0
        loss = -np.where(truth == 1, np.log(p), np.log1p(-p))
        found["log_loss"] = np.mean([loss[i, known[i]].mean() for i in range(len(truth))])
        return found
    if truth.shape[1] == 2:
        return literal_binary(truth[:, 1], p[:, 1])
    y, called, k = truth.argmax(1), margins.argmax(1), truth.shape[1]
    tables = sk.multilabel_confusion_matrix(y, called, labels=range(k)).astype(float)
    tn, fp, fn = tables[:, 0, 0], tables[:, 0, 1], tables[:, 1, 0]
    more = {"labels": range(k), "average": "macro", "zero_division": np.nan}
    return {
        "accuracy": sk.accuracy_score(y, called),
        "balanced_accuracy": sk.balanced_accuracy_score(y, called),
        "sensitivity": sk.recall_score(y, called, **more),
        "specificity": np.mean(tn / (tn + fp)),
        "ppv": sk.precision_score(y, called, **more),
        "npv": np.mean(tn / (tn + fn)),
        "f1": sk.f1_score(y, called, **more),
        "auc": sk.roc_auc_score(y, p / p.sum(1, keepdims=True), multi_class="ovr", average="macro"),
        "log_loss": sk.log_loss(y, p / p.sum(1, keepdims=True), labels=range(k)),
    }


def literal_binary(truth: np.ndarray, p: np.ndarray) -> dict[str, float]:
    y, p = truth[truth >= 0], p[truth >= 0]
    called = p >= 0.5
    return {
        "accuracy": sk.accuracy_score(y, called),
        "balanced_accuracy": sk.balanced_accuracy_score(y, called),
        "sensitivity": sk.recall_score(y, called, zero_division=np.nan),
        "specificity": sk.recall_score(y, called, pos_label=0, zero_division=np.nan),
        "ppv": sk.precision_score(y, called, zero_division=np.nan),
        "npv": sk.precision_score(y, called, pos_label=0, zero_division=np.nan),
        "f1": sk.f1_score(y, called, zero_division=np.nan),
        "auc": sk.roc_auc_score(y, p),
        "log_loss": sk.log_loss(y, p),
    }


CASES = [("classify", 2, 0.0), ("classify", 4, 0.0), ("multilabel", 3, 0.0), ("multilabel", 3, 0.3)]


@pytest.mark.parametrize(("task", "classes", "unknown"), CASES)
def test_every_metric_is_scikit_learns(task, classes, unknown):
    rows = rows_of(task, classes, unknown=unknown)
    found = measure(rows, np.ones((1, 7)), rows.patients)
    expected = literal(rows.truth, rows.margins, task)
    assert set(found) == set(METRICS)
    for name in METRICS:
        tolerance = 2e-3 if name == "auc" and task == "classify" and classes > 2 else 2e-6
        assert found[name][0] == pytest.approx(expected[name], abs=tolerance), name


@pytest.mark.parametrize(("task", "classes", "unknown"), CASES)
def test_resamples_are_those_of_patients_drawn_with_all_their_tiles(task, classes, unknown):
    """Literally: copy the drawn patients' rows as often as they are drawn, and ask scikit-learn again."""
    rows = rows_of(task, classes, n=300, unknown=unknown)
    weights = resample_weights(7, 6, seed=3)
    found = measure(rows, weights.astype(float), rows.patients)
    for r, weight in enumerate(weights):
        again = np.concatenate([np.flatnonzero(rows.owner == p) for p in range(7) for _ in range(weight[p])])
        expected = literal(rows.truth[again], rows.margins[again], task)
        for name in METRICS:
            tolerance = 5e-3 if name == "auc" and task == "classify" and classes > 2 else 2e-6
            assert found[name][r] == pytest.approx(expected[name], abs=tolerance), (r, name)


def test_a_macro_auc_is_of_each_margin_against_the_rest():
    """The mean of one-against-rest AUCs of the margins themselves, which float32 does not disturb."""
    rows = rows_of("classify", 4)
    each = [sk.roc_auc_score(rows.truth[:, c], rows.margins[:, c]) for c in range(4)]
    assert measure(rows, np.ones((1, 7)), rows.patients)["auc"][0] == pytest.approx(np.mean(each), abs=1e-12)


def test_ties_and_a_class_that_never_occurs():
    rows = rows_of("classify", 3)
    absent = rows.truth[:, 2] == 0
    few = Rows("classify", rows.patients, rows.owner[absent], (), rows.truth[absent], np.round(rows.margins[absent]))
    found = measure(few, np.ones((1, 7)), few.patients)
    called, y = few.margins.argmax(1), few.truth.argmax(1)
    recall = sk.recall_score(y, called, labels=range(3), average="macro", zero_division=np.nan)
    assert found["sensitivity"][0] == pytest.approx(recall)
    each = [sk.roc_auc_score(few.truth[:, c], few.margins[:, c]) for c in range(2)]
    assert found["auc"][0] == pytest.approx(np.mean(each))


def test_the_threshold_of_two_classes_moves_the_call():
    rows = rows_of("classify", 2)
    found = measure(rows, np.ones((1, 7)), rows.patients, threshold=float(np.log(0.8 / 0.2)))
    p = 1 / (1 + np.exp(-rows.margins[:, 1].astype(float)))
    assert found["sensitivity"][0] == pytest.approx(sk.recall_score(rows.truth[:, 1], p >= 0.8))


def test_mcnemar_is_the_binomial_test_of_the_disagreements():
    one, other = rows_of("classify", 3, seed=1), rows_of("classify", 3, seed=1)
    other = Rows(
        *[*one.__dict__.values()][:5],
        (other.margins + np.random.default_rng(0).normal(0, 1, (600, 3))).astype(np.float32),
    )
    right = [r.margins.argmax(1) == r.truth.argmax(1) for r in (one, other)]
    b, c = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
    assert mcnemar(one, other) == (b, c, pytest.approx(binomtest(int(b), int(b + c)).pvalue))
    assert mcnemar(one, one) == (0, 0, 1.0)


def test_intervals_are_percentiles_and_too_few_patients_have_none():
    values = np.random.default_rng(0).normal(size=999)
    assert percentiles(values, 5) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))
    assert percentiles(values, 4) is None
    assert percentiles(np.ones(99), 9) is None
    assert percentiles(np.r_[values[:400], np.full(599, np.nan)], 9) is None


def test_rows_are_the_labelled_tiles_and_slides_of_a_split(tmp_path):
    rng, slides = np.random.default_rng(0), []
    for name, split, label in [("a", "val", "normal"), ("b", "val", None), ("c", "test", "normal")]:
        z = rng.normal(size=12)
        item = Item(slide_id=name, uri=f"{name}.svs", patient_id=f"P{name}", split=split, label=label)
        slides.append(Scored(item, cells_of(3, 4), np.column_stack([-z, z]), (3, 4)))
    run = read_run(write_scored_run(tmp_path / "out", slides))
    tiles, whole = tile_rows(run, run.models[0], "val"), slide_rows(run, run.models[0], "val")
    assert tiles.patients == ("Pa",)
    np.testing.assert_array_equal(tiles.margins, slides[0].margins.astype(np.float32))
    assert [key[0] for key in whole.keys] == ["a"]
    assert whole.margins[0, 1] == slides[0].margins[:, 1].max().astype(np.float32)
    assert whole.margins[0, 0] == -whole.margins[0, 1]  # one probability for each slide, not two maxima
    assert whole.losses()[0] == pytest.approx(np.logaddexp(0, float(whole.margins[0, 1])))
    assert len(tile_rows(run, run.models[0], "train")) == 0


# the whole way


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    judged.write_cohort(folder)
    judged.bundle(folder / "good")
    judged.bundle(folder / "noisy", noise=0.8)
    judged.bundle(folder / "coarse", tile_px=48)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return compare([folder / "good", folder / "noisy", folder / "coarse"], folder / "cohort.csv", folder / "out")


def test_bundles_are_compared_on_their_own_margins(found, folder):
    from slideflow_ray.accounting import read_run as record_of
    from slideflow_ray.store import SlideStore

    run, record = read_run(folder / "out"), record_of(folder / "out")
    for bundle, model in zip(found.bundles, run.models, strict=True):
        parts = [
            SlideStore(folder / "out", s).read(f"scores/{grid}/{node}")
            for s, ended in record["outcomes"].items()
            for grid, node in ended["grids"]
            if node == model.node
        ]
        rows = tile_rows(run, model, "val")
        np.testing.assert_array_equal(rows.margins, np.concatenate(parts))
        expected = literal(rows.truth, rows.margins, "classify")
        for name in METRICS:
            assert bundle.at("tile").values[name] == pytest.approx(expected[name], abs=2e-6), name
        low, high = bundle.at("tile").intervals["auc"]
        assert low <= expected["auc"] <= high
    good, noisy, _ = found.bundles
    assert 0.7 < good.at("tile").values["auc"] < 0.999
    assert noisy.at("tile").values["auc"] < good.at("tile").values["auc"]
    assert good.parameters == sum(p.numel() for p in parameters(folder / "good"))
    assert good.bytes == (folder / "good" / "weights.safetensors").stat().st_size
    assert good.tiles_per_second > 10


def parameters(bundle: Path):
    from slideflow_ray.models.networks import load_network

    return load_network(bundle)[1].parameters()


def test_pairs_on_the_same_tiles_and_pairs_by_slide(found):
    first, second, third = found.pairs
    assert (first.level, first.same_tiles, first.rows) == ("tile", True, 6 * 36)
    assert (second.level, second.same_tiles, second.rows) == ("slide", False, 6)
    assert third.level == "slide"
    good, noisy, _ = (b.at("tile").values for b in found.bundles)
    assert first.differences["auc"] == pytest.approx(good["auc"] - noisy["auc"])
    assert first.only_first - first.only_second == round(216 * (good["accuracy"] - noisy["accuracy"]))
    assert any("see other tiles" in note for note in found.notes)


def test_the_interval_of_a_difference_is_of_the_same_resamples(found, folder):
    """Narrower than the two intervals together, and that of resampling literally."""
    run = read_run(folder / "out")
    a, b = (tile_rows(run, model, "val") for model in run.models[:2])
    drawn = []
    for weight in resample_weights(6, 1000, 0):
        again = np.concatenate([np.flatnonzero(a.owner == p) for p in range(6) for _ in range(weight[p])])
        y = a.truth[again, 1]
        if 0 < y.sum() < len(y):
            drawn.append(sk.roc_auc_score(y, a.margins[again, 1]) - sk.roc_auc_score(y, b.margins[again, 1]))
    assert found.pairs[0].intervals["auc"] == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=1e-9)


def test_it_is_written_beside_and_a_rerun_scores_nothing(found, folder, capsys):
    written = json.loads((folder / "out" / "compare.json").read_text())
    assert written == json.loads(json.dumps(found.to_json()))
    words = [*(str(folder / n) for n in ("good", "noisy", "coarse")), "--cohort", str(folder / "cohort.csv")]
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", *words, "--out", str(folder / "out"), "--no-benchmark", "--json"])
    captured = capsys.readouterr()
    assert not end.value.code
    assert "0 tiles scored" in captured.err
    again = json.loads(captured.out)
    assert again["pairs"] == written["pairs"]
    assert again["bundles"][0]["tiles_per_second"] is None
    text = found.summary()
    assert "by tile, val" in text
    assert "McNemar" in text


def test_what_cannot_be_compared_is_said(folder, tmp_path):
    other = judged.bundle(tmp_path / "three", classes=("normal", "tumor", "dust"))
    cohort = folder / "cohort.csv"
    for bundles, settings, said in [
        ([folder / "good", other], Settings(), "classes"),
        ([folder / "good", folder / "good"], Settings(), "named twice"),
        ([folder / "good"], Settings(split="test"), "no slide in split 'test'"),
        ([folder / "good"], Settings(probability=1.5), "between 0 and 1"),
        ([], Settings(), "at least one bundle"),
    ]:
        with pytest.raises(ConfigError, match=said):
            compare(bundles, cohort, tmp_path / "out", settings)
    assert not (tmp_path / "out" / "slides").exists()

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scored import GRID, NODE, PROFILE, Scored, box, cells_of, two_class, write_features, write_scored_run
from sklearn import metrics as sk

from slideflow_ray.cohort import Item
from slideflow_ray.errors import AnnotationError, ConfigError, SplitLeakError
from slideflow_ray.evaluate import evaluate
from slideflow_ray.metrics import bin_of, edge_of, resample_weights
from slideflow_ray.results import Evaluation, read_evaluation
from slideflow_ray.rules import rule_of
from slideflow_ray.store import SlideStore
from slideflow_ray.tables import read_table

FILES = (
    "operating_points.json",
    "confusion.json",
    "roc.parquet",
    "pr.parquet",
    "reliability.parquet",
    "slides.parquet",
    "patients.parquet",
    "confusion.parquet",
)


def cohort(folder, seed=0):
    """1 training, 3 validation and 8 test slides; the test slides are of 6 patients, two of whom have two."""
    rng = np.random.default_rng(seed)
    slides = [two_class(folder, rng, "t0", "T0", "train", True)]
    slides += [two_class(folder, rng, f"v{i}", f"V{i}", "val", i % 2 == 0) for i in range(3)]
    return slides + [two_class(folder, rng, f"e{i}", f"E{i % 6}", "test", i % 2 == 0) for i in range(8)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run for all tests that only evaluate it."""
    folder = tmp_path_factory.mktemp("run")
    slides = cohort(folder)
    return write_scored_run(folder / "out", slides), slides


def pooled(slides, split):
    """(truth, margin) of all tiles of a split, by the rule that `two_class` states."""
    truth, margins = [], []
    for slide in slides:
        if slide.item.split == split:
            x, y = slide.cells[:, 1] * 40 + 40, slide.cells[:, 0] * 40 + 40
            truth.append((x < 200) & (y < 300) & (slide.item.label == "tumor"))
            margins.append(slide.margins[:, 1].astype(np.float32))
    return np.concatenate(truth), np.concatenate(margins)


def result(found: Evaluation, level="tile", split="test", class_name="tumor"):
    (one,) = [r for r in found.results if (r.level, r.split, r.class_name) == (level, split, class_name)]
    return one


def test_the_threshold_comes_from_validation_and_is_applied_to_test(run):
    out, slides = run
    found = evaluate(out)
    (point,) = [p for p in found.points if p.level == "tile"]
    truth, margins = pooled(slides, "val")
    fpr, tpr, thresholds = sk.roc_curve(truth, edge_of(bin_of(margins)), drop_intermediate=False)
    assert point.threshold == thresholds[np.argmax(tpr - fpr)]
    assert (point.rule, point.split, point.model) == ("youden", "val", NODE)
    assert point.profile_digest == PROFILE.digest()
    assert (point.positives, point.negatives, point.patients) == (truth.sum(), (~truth).sum(), 3)
    truth, margins = pooled(slides, "test")
    tn, fp, fn, tp = sk.confusion_matrix(truth, margins >= np.float32(point.threshold)).ravel()
    judged = result(found)
    assert judged.counts == {"tp": tp, "fn": fn, "fp": fp, "tn": tn}
    assert judged.rates["sensitivity"] == tp / (tp + fn)
    assert judged.rates["specificity"] == tn / (tn + fp)
    assert judged.auc == pytest.approx(sk.roc_auc_score(truth, margins.astype(np.float32)))
    assert judged.threshold == point.threshold


def test_test_data_do_not_move_the_threshold(run, tmp_path):
    out, slides = run
    before = evaluate(out).points
    changed = [Scored(s.item, s.cells, s.margins + (3 if s.item.split == "test" else 0), s.shape) for s in slides]
    assert evaluate(write_scored_run(tmp_path / "other", changed)).points == before


def test_intervals_resample_patients(run):
    out, slides = run
    judged = result(evaluate(out, seed=4, resamples=300))
    (point,) = [p for p in evaluate(out).points if p.level == "tile"]
    patients = sorted({s.item.patient for s in slides if s.item.split == "test"})
    sides = {p: pooled([s for s in slides if s.item.patient == p], "test") for p in patients}
    areas, rates = [], []
    for weights in resample_weights(6, 300, 4):
        truth = np.concatenate([np.tile(sides[p][0], w) for p, w in zip(patients, weights, strict=True)])
        margins = np.concatenate([np.tile(sides[p][1], w) for p, w in zip(patients, weights, strict=True)])
        if truth.any():
            areas.append(sk.roc_auc_score(truth, edge_of(bin_of(margins))))
            rates.append((margins[truth] >= np.float32(point.threshold)).mean())
    assert judged.auc_interval == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])))
    assert judged.sensitivity_interval == pytest.approx(tuple(np.quantile(rates, [0.025, 0.975])))
    assert judged.auc_interval[0] < judged.auc < judged.auc_interval[1]


def test_slides_and_patients_are_judged_by_the_cohorts_label(run):
    out, slides = run
    found = evaluate(out)
    test = [s for s in slides if s.item.split == "test"]
    truth, top = [s.item.label == "tumor" for s in test], [s.margins[:, 1].max() for s in test]
    assert result(found, "slide").auc == pytest.approx(sk.roc_auc_score(truth, edge_of(bin_of(top))))
    by_patient = {}
    for s in test:
        label, best = by_patient.get(s.item.patient, (False, -math.inf))
        by_patient[s.item.patient] = (label or s.item.label == "tumor", max(best, s.margins[:, 1].max()))
    truth, top = zip(*by_patient.values(), strict=True)
    assert result(found, "patient").auc == pytest.approx(sk.roc_auc_score(truth, edge_of(bin_of(top))))
    assert result(found, "patient").patients == 6


def test_the_tables_say_the_same_by_slide(run):
    out, slides = run
    found = evaluate(out)
    rows = read_table(out / "slides.parquet")
    assert [row["slide_id"] for row in rows] == [s.item.slide_id for s in slides]
    for key in ("tp", "fn", "fp", "tn"):
        assert sum(row[key] for row in rows if row["split"] == "test") == result(found).counts[key]
    one, slide = rows[-1], slides[-1]
    assert one["score_max"] == slide.margins[:, 1].astype(np.float32).max()
    assert one["tiles"] == 117 == one["tiles_positive"] + one["tiles_negative"] + one["tiles_unknown"]
    (point,) = [p for p in found.points if p.level == "slide"]
    assert all(row["called"] == (row["score_max"] >= point.threshold) for row in rows)
    patients = read_table(out / "patients.parquet")
    assert [p["slides"] for p in patients if p["split"] == "test"] == [2, 2, 1, 1, 1, 1]
    curve = [r for r in read_table(out / "roc.parquet") if r["level"] == "tile" and r["split"] == "test"]
    assert (curve[-1]["tpr"], curve[-1]["fpr"]) == (1, 1)
    at = next(r for r in curve if r["threshold"] <= result(found).threshold)
    assert at["tp"] >= result(found).counts["tp"]


def test_the_same_run_makes_the_same_bytes(run):
    out, _ = run
    evaluate(out)
    first = {name: (out / name).read_bytes() for name in FILES}
    evaluate(out)
    assert {name: (out / name).read_bytes() for name in FILES} == first
    assert not list(out.glob("*.partial"))
    assert not (out / "lease.json").exists()


def test_what_was_written_is_read_back(run):
    out, _ = run
    found = evaluate(out)
    assert read_evaluation(out) == found
    json.dumps(found.to_json(), allow_nan=False)
    assert "tumor, test, by tile: AUC 0." in found.summary()
    assert found.headline(NODE) == result(found)
    assert read_evaluation(out.parent) is None


def test_labels_are_kept_in_the_stores(run):
    out, _slides = run
    evaluate(out)
    store = SlideStore(out, "e0")
    (node,) = store.nodes(f"labels/{GRID}")
    assert store.read(node)[:, 1].sum() == 4 * 7
    assert store.read(node).dtype == np.int8


# what is missing is said


def test_without_validation_there_is_no_operating_point(tmp_path):
    slides = [s for s in cohort(tmp_path) if s.item.split != "val"]
    found = evaluate(write_scored_run(tmp_path / "out", slides))
    assert found.points == ()
    assert result(found).auc is not None
    assert result(found).counts is None
    assert any("split 'val' has 0 positive and 0 negative labelled tiles" in note for note in found.notes)


def test_validation_of_one_class_is_not_enough(tmp_path):
    slides = [s for s in cohort(tmp_path) if s.item.split != "val" or s.item.label == "normal"]
    found = evaluate(write_scored_run(tmp_path / "out", slides))
    assert found.points == ()
    assert any("0 positive and 117 negative labelled tiles" in note for note in found.notes)


def test_without_labels_nothing_is_evaluated_and_it_is_said(tmp_path):
    slides = []
    for s in cohort(tmp_path):
        item = s.item.model_copy(update={"label": None, "annotation": None})
        slides.append(Scored(item, s.cells, s.margins, s.shape))
    found = evaluate(write_scored_run(tmp_path / "out", slides))
    assert found.points == found.results == ()
    assert any("nothing was evaluated on test" in note for note in found.notes)
    assert len(read_table(tmp_path / "out" / "slides.parquet")) == 12
    assert found.summary()


def test_without_splits_it_asks_for_them(tmp_path):
    slides = [Scored(s.item.model_copy(update={"split": None}), s.cells, s.margins, s.shape) for s in cohort(tmp_path)]
    found = evaluate(write_scored_run(tmp_path / "out", slides))
    assert found.results == ()
    assert "column `split`" in found.notes[0]


def test_slides_in_no_split_are_in_no_count(run, tmp_path):
    out, slides = run
    before = result(evaluate(out))
    rng = np.random.default_rng(9)
    extra = two_class(tmp_path, rng, "x", "E0", None, True)
    after = result(evaluate(write_scored_run(tmp_path / "more", [*slides, extra])))
    assert after.counts == before.counts
    assert after.auc == before.auc


def test_failed_slides_and_slides_without_tissue_are_left_out_and_counted(run, tmp_path):
    _, slides = run
    empty = Scored(
        Item(slide_id="glass", uri="g", split="test", label="normal"), np.empty((0, 2), int), np.empty((0, 2)), (9, 13)
    )
    failed = [Item(slide_id="bad", uri="b", split="test", label="tumor")]
    found = evaluate(write_scored_run(tmp_path / "more", [*slides, empty], failed=failed))
    assert "fake: 2 of 10 slides in split 'test' have no scores and are left out." in found.notes
    assert result(found, "slide").positives == 4


def test_tiles_of_unannotated_positive_slides_are_unknown(run, tmp_path):
    _, slides = run
    weak = [
        Scored(s.item.model_copy(update={"annotation": None}), s.cells, s.margins, s.shape)
        if s.item.slide_id in ("e0", "e2")
        else s
        for s in slides
    ]
    found = evaluate(write_scored_run(tmp_path / "weak", weak))
    assert "fake: 234 tiles of 2 slides in split 'test' are unlabelled and left out." in found.notes
    assert result(found).positives == 2 * 28
    assert result(found, "slide").positives == 4


# what is wrong stops it


def test_a_file_in_two_splits_stops_it(tmp_path):
    rng = np.random.default_rng(0)
    slides = [
        two_class(tmp_path, rng, "a", "A", "val", True, sha256="f" * 64),
        two_class(tmp_path, rng, "b", "B", "test", True, sha256="f" * 64),
    ]
    with pytest.raises(SplitLeakError, match="more than one split"):
        evaluate(write_scored_run(tmp_path / "out", slides))
    assert not (tmp_path / "out" / "confusion.json").exists()


def test_all_bad_annotations_are_named_together(tmp_path):
    out = write_scored_run(tmp_path / "out", cohort(tmp_path))
    write_features(tmp_path / "e0.geojson", [box("Stroma", 0, 0, 10, 10)])
    (tmp_path / "v0.geojson").write_text("{")
    with pytest.raises(AnnotationError, match=r"(?s)v0.geojson.*e0.geojson"):
        evaluate(out)
    (tmp_path / "v0.geojson").unlink()
    write_features(tmp_path / "v0.geojson", [box("tumor", 0, 0, 200, 300)])
    evaluate(out, names={"stroma": "normal"})


def test_names_in_run_toml_are_used_for_annotations_and_labels(tmp_path):
    slides = []
    for s in cohort(tmp_path):
        if s.item.annotation:
            write_features(tmp_path / f"{s.item.slide_id}.geojson", [box("Mets", -5, -5, 200, 300)])
        label = {"tumor": "METS", "normal": "normal"}[s.item.label]
        slides.append(Scored(s.item.model_copy(update={"label": label}), s.cells, s.margins, s.shape))
    found = evaluate(write_scored_run(tmp_path / "out", slides, names={"mets": "tumor"}))
    assert result(found).positives == 4 * 28
    assert result(found, "slide").positives == 4


def test_no_run_an_unfinished_one_and_a_strange_rule_are_configuration(run, tmp_path):
    with pytest.raises(ConfigError, match=r"run\.json"):
        evaluate(tmp_path / "nothing")
    out, _ = run
    for rule in ("youdn", "sensitivity", "sensitivity=x", "probability=1", "youden=1"):
        with pytest.raises(ConfigError, match="no rule"):
            evaluate(out, rule=rule)
    record = json.loads((out / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "finished": False}))
    with pytest.raises(ConfigError, match="has not ended"):
        evaluate(tmp_path)


@pytest.mark.parametrize(
    ("rule", "check"),
    [
        ("sensitivity=0.9", lambda p: p.sensitivity >= 0.9),
        ("specificity=0.95", lambda p: p.specificity >= 0.95),
        ("probability=0.5", lambda p: p.threshold == 0),
        ("f1", lambda p: p.rule == "f1"),
    ],
)
def test_other_rules(run, rule, check):
    out, _ = run
    points = evaluate(out, rule=rule, resamples=10).points
    assert len(points) == 3
    assert all(check(p) for p in points)
    assert callable(rule_of(rule))


# more than two classes


def many(folder, task, split, name, rng):
    """Columns 0-3 are 'a', 4-7 'b', the rest 'c' (background 'a'); scores favour the truth."""
    cells = cells_of(9, 13)
    truth = np.select([cells[:, 1] < 4, cells[:, 1] < 8], [0, 1], 2)
    features = [box("b", 180, -5, 340, 900), box("c", 340, -5, 900, 900)]
    margins = rng.normal(np.eye(3)[truth] * 2 - 1, 1.2)
    annotation = write_features(folder / f"{name}.geojson", features)
    item = Item(slide_id=name, uri=name, split=split, label="b", annotation=annotation)
    return Scored(item, cells, margins, (9, 13)), truth


@pytest.mark.parametrize("task", ["classify", "multilabel"])
def test_every_class_against_the_rest_and_a_table_by_arg_max(tmp_path, task):
    rng = np.random.default_rng(1)
    made = [many(tmp_path, task, split, f"{split}{i}", rng) for split in ("val", "test") for i in range(3)]
    slides = [slide for slide, _ in made]
    found = evaluate(write_scored_run(tmp_path / "out", slides, ("a", "b", "c"), task=task))
    truth = np.concatenate([t for s, t in made if s.item.split == "test"])
    margins = np.concatenate([s.margins for s in slides if s.item.split == "test"]).astype(np.float32)
    for c, name in enumerate("abc"):
        wanted = truth == c
        if task == "multilabel" and name == "a":
            assert result(found, class_name="a").positives == 0
            continue
        assert result(found, class_name=name).auc == pytest.approx(sk.roc_auc_score(wanted, margins[:, c]))
    if task == "classify":
        (table,) = [t for t in found.tables if t.split == "test"]
        assert np.array_equal(table.confusion.counts, sk.confusion_matrix(truth, margins.argmax(axis=1)))
        assert table.kappa == pytest.approx(sk.cohen_kappa_score(truth, margins.argmax(axis=1)))
    else:
        assert found.tables == ()


def test_a_patient_is_positive_when_a_slide_is_and_negative_when_all_are(tmp_path):
    rng = np.random.default_rng(4)
    slides = []
    for patient, labels in {"A": ["normal", "tumor"], "B": ["normal", None], "C": ["normal", "normal"]}.items():
        for i, label in enumerate(labels):
            item = Item(slide_id=f"{patient}{i}", uri="x", patient_id=patient, split="test", label=label)
            slides.append(Scored(item, cells_of(3, 4), rng.normal(0, 1, (12, 2)), (3, 4)))
    found = evaluate(write_scored_run(tmp_path / "out", slides))
    rows = {row["patient_id"]: row for row in read_table(tmp_path / "out" / "patients.parquet")}
    assert {patient: row["truth"] for patient, row in rows.items()} == {"A": True, "B": None, "C": False}
    best = max(slides[0].margins[:, 1].max(), slides[1].margins[:, 1].max())
    assert rows["A"]["score_max"] == pytest.approx(best, rel=1e-6)
    one = result(found, "patient")
    assert (one.positives, one.negatives) == (1, 1)

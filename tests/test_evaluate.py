from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
from scored import GRID, NODE, PROFILE, Scored, box, cells_of, two_class, write_features, write_scored_run
from sklearn import metrics as sk

from slideflow_ray import accounting, cli
from slideflow_ray.annotations import unused_names
from slideflow_ray.cohort import Item
from slideflow_ray.errors import AnnotationError, ConfigError, SplitLeakError
from slideflow_ray.evaluate import evaluate
from slideflow_ray.lease import lease
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


def test_positives_of_one_patient_have_no_interval_and_it_is_said(run, tmp_path):
    _, slides = run
    few = [s for s in slides if s.item.split != "test" or s.item.label == "normal" or s.item.patient == "E0"]
    rng = np.random.default_rng(5)
    few += [two_class(tmp_path, rng, f"x{i}", f"X{i}", "test", False) for i in range(3)]
    found = evaluate(write_scored_run(tmp_path / "few", few))
    one = result(found)
    assert (one.patients, one.auc_interval, one.sensitivity_interval) == (7, None, None)
    assert one.specificity_interval is not None
    assert one.no_interval == "no interval: 1 of 7 patients with positives, 2 are needed"
    assert any("fake, test, tile, tumor: no interval: 1 of 7" in note for note in found.notes)


def test_the_interval_of_slides_is_of_their_scores_themselves(tmp_path):
    rng = np.random.default_rng(6)
    slides = []
    for split, n in (("val", 4), ("test", 40)):
        for i in range(n):
            top = np.float32(3 + (i % 2) * 0.002 + rng.uniform(0, 0.004))  # all in one bin of margins
            item = Item(slide_id=f"{split}{i}", uri="x", split=split, label=("normal", "tumor")[i % 2])
            slides.append(Scored(item, cells_of(1, 2), np.array([[-top, top], [0, 0]]), (1, 2)))
    one = result(evaluate(write_scored_run(tmp_path / "out", slides)), "slide")
    assert one.auc > 0.7
    assert one.auc_interval[0] < one.auc < one.auc_interval[1]


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
    assert not any("is called" in note for note in found.notes)


def test_a_name_that_occurs_nowhere_is_said_with_those_that_do(tmp_path):
    slides = cohort(tmp_path)
    made = write_scored_run(tmp_path / "out", slides)
    found = evaluate(made, names={"Tumr": "tumor", "TUMOR": "tumor"})
    said = "No annotation or label is called 'Tumr', so mapping it says nothing: there are normal, tumor."
    assert found.notes[0] == said
    assert said in found.summary()
    label = Item(slide_id="a", uri="a.svs", label="FSG+CGN")
    assert unused_names([label], {"cgn": "glomerulus", "FSG+CGN": "glomerulus"}) == ""
    assert unused_names([Item(slide_id="a", uri="a.svs")], {"x": "y"}).endswith("there are none.")


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


def test_a_name_that_maps_to_no_class_is_refused(run):
    out, _ = run
    with pytest.raises(ConfigError, match="'nix', which is no class of fake") as error:
        evaluate(out, names={"malignant": "nix"})
    assert "normal, tumor" in error.value.step


def test_a_run_that_was_killed_before_it_recorded_anything_is_no_strange_folder(tmp_path, capsys):
    (tmp_path / "lease.json").write_text("{}")
    os.utime(tmp_path / "lease.json", (0, 0))
    for command in (["status"], ["report"], ["evaluate"], ["verify"], ["export", "--to", "csv"]):
        with pytest.raises(SystemExit) as end:
            cli.main([*command, str(tmp_path)])
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert "was started" in said
        assert "has recorded nothing yet. Next: Run the same command again" in said
    with lease(tmp_path), pytest.raises(ConfigError, match="has recorded nothing yet") as error:
        accounting.status(tmp_path)
    assert "under way" in error.value.step
    with pytest.raises(ConfigError, match=r"is not the output folder .* no run\.json") as error:
        accounting.status(tmp_path / "nix")
    assert "started" not in error.value.step
    assert "--out" in error.value.step


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
        ("probability=0.5", lambda p: p.probability == 0.5),
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


# rules, scores and tables


def test_presets_cost_and_what_is_recorded(run):
    out, slides = run
    points = evaluate(out, rule="004", resamples=10).points
    assert {p.rule for p in points} == {"004 (probability=0.8)"}
    assert {p.threshold for p in points} == {float(np.float32(math.log(4)))}
    assert {round(p.threshold, 6) for p in evaluate(out, rule="003", resamples=10).points} == {0}
    assert {(p.split, p.score) for p in points} == {("val", "margin"), ("val", "max")}
    truth, margins = pooled(slides, "val")
    (point,) = [p for p in evaluate(out, rule="cost=9", resamples=10).points if p.level == "tile"]
    binned = edge_of(bin_of(margins))
    costs = {t: 9 * (truth & (binned < t)).sum() + (~truth & (binned >= t)).sum() for t in np.unique(binned)}
    assert point.threshold == max(t for t, cost in costs.items() if cost == min(costs.values()))
    rarer = evaluate(out, rule="cost=9,prevalence=0.01", resamples=10).points
    assert [p.threshold for p in rarer if p.level == "tile"] > [point.threshold]
    for rule in ("cost", "cost=0", "cost=1,prevalence=2", "cost=1,share=0.1", "cost=1e99", "005", "004=1"):
        with pytest.raises(ConfigError, match="no rule"):
            rule_of(rule)


def test_a_fixed_probability_needs_no_validation_and_says_that_none_has_tried_it(tmp_path):
    slides = [s for s in cohort(tmp_path) if s.item.split != "val"]
    found = evaluate(write_scored_run(tmp_path / "out", slides), rule="004", resamples=10)
    assert {(p.split, p.positives, p.sensitivity) for p in found.points} == {("none", 0, None)}
    assert sum("no validation has tried it" in note for note in found.notes) == 3
    assert result(found).counts is not None


@pytest.mark.parametrize("score", ["max", "top10", "area"])
def test_slides_and_patients_are_judged_by_the_chosen_score(run, score):
    out, slides = run
    found = evaluate(out, slide_score=score, resamples=10)
    by_slide = {
        s.item.slide_id: {
            "max": lambda z: z.max(),
            "top10": lambda z: np.sort(z)[-10:].astype(np.float64).mean(),
            "area": lambda z: (z >= 0).mean(),
        }[score](s.margins[:, 1].astype(np.float32))
        for s in slides
    }
    test = [s for s in slides if s.item.split == "test"]
    truth = [s.item.label == "tumor" for s in test]
    values = np.float32([by_slide[s.item.slide_id] for s in test])
    one = result(found, "slide")
    assert one.auc == pytest.approx(sk.roc_auc_score(truth, values))
    assert one.average_precision == pytest.approx(sk.average_precision_score(truth, values))
    (point,) = [p for p in found.points if p.level == "slide"]
    assert (point.score, one.score, result(found).score) == (score, score, "margin")
    assert (point.probability is None) == (one.auc_004 is None) == (score == "area")
    rows = read_table(out / "slides.parquet")
    assert [row["score"] for row in rows] == pytest.approx([by_slide[row["slide_id"]] for row in rows], rel=1e-6)
    assert all(row["called"] == (row["score"] >= point.threshold) for row in rows)
    tn, fp, fn, tp = sk.confusion_matrix(truth, values >= np.float32(point.threshold)).ravel()
    assert one.counts == {"tp": tp, "fn": fn, "fp": fp, "tn": tn}
    patients = {row["patient_id"]: row for row in read_table(out / "patients.parquet") if row["split"] == "test"}
    assert patients["E0"]["score"] == pytest.approx(max(by_slide["e0"], by_slide["e6"]), rel=1e-6)


def test_a_probability_is_no_rule_for_an_area_and_strange_scores_are_refused(run):
    out, _ = run
    found = evaluate(out, rule="004", slide_score="area", resamples=10)
    assert {p.level for p in found.points} == {"tile"}
    assert sum("fixes a probability, and area is none" in note for note in found.notes) == 2
    with pytest.raises(ConfigError, match="no score of a slide"):
        evaluate(out, slide_score="median")


def test_curves_rates_and_matrices_are_scikit_learns(run):
    out, slides = run
    found = evaluate(out, resamples=10)
    truth, margins = pooled(slides, "test")
    one, called = result(found), margins >= np.float32(result(found).threshold)
    expected = {
        "accuracy": sk.accuracy_score(truth, called),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, called),
        "kappa": sk.cohen_kappa_score(truth, called),
        "ppv": sk.precision_score(truth, called),
        "npv": sk.precision_score(~truth, ~called),
        "f1": sk.f1_score(truth, called),
    }
    assert {name: one.rates[name] for name in expected} == pytest.approx(expected)
    assert one.average_precision == pytest.approx(sk.average_precision_score(truth, margins))
    assert np.array_equal(one.confusion.counts, sk.confusion_matrix(truth, called))
    assert one.confusion.classes == ("normal", "tumor")
    for name, normalize in (("by_true", "true"), ("by_total", "all")):
        wanted = sk.confusion_matrix(truth, called, normalize=normalize)
        assert np.array(getattr(one.confusion, name)) == pytest.approx(wanted)
    record = json.loads((out / "confusion.json").read_text())
    assert record["results"][1]["confusion"]["counts"] == one.model_dump(mode="json")["confusion"]["counts"]
    of = {"level": "tile", "split": "test"}
    rows = [r for r in read_table(out / "pr.parquet") if r.items() >= of.items()]
    precision, recall, _ = sk.precision_recall_curve(truth, margins)
    assert [r["precision"] for r in rows][::-1] == pytest.approx(precision[:-1])
    assert [r["recall"] for r in rows][::-1] == pytest.approx(recall[:-1])
    rows = [r for r in read_table(out / "roc.parquet") if r.items() >= of.items()]
    fpr, tpr, _ = sk.roc_curve(truth, margins, drop_intermediate=False)
    assert [r["fpr"] for r in rows] == pytest.approx(fpr[1:])
    assert [r["tpr"] for r in rows] == pytest.approx(tpr[1:])


def test_calibration_and_the_area_of_004(run):
    from sklearn.calibration import calibration_curve

    out, slides = run
    found = evaluate(out, resamples=10)
    for split in ("val", "test"):
        truth, margins = pooled(slides, split)
        p = (1 / (1 + np.exp(-margins.astype(np.float64)))).astype(np.float32)
        observed, mean = calibration_curve(truth, p, n_bins=10)
        rows = [r for r in read_table(out / "reliability.parquet") if (r["level"], r["split"]) == ("tile", split)]
        full = [r for r in rows if r["cases"]]
        assert [r["observed"] for r in full] == pytest.approx(observed)
        assert [r["mean_probability"] for r in full] == pytest.approx(mean, abs=1e-7)
        assert sum(r["cases"] for r in rows) == len(p)
        error = np.average(np.abs(observed - mean), weights=[r["cases"] for r in full])
        assert result(found, split=split).expected_calibration_error == pytest.approx(error, abs=1e-7)
        at = [1, 0.99, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0]
        area = np.trapezoid([(p[truth] >= t).mean() for t in at], [(p[~truth] >= t).mean() for t in at])
        assert result(found, split=split).auc_004 == pytest.approx(area)


def test_every_slide_has_its_confusion_and_rates(run):
    out, slides = run
    found = evaluate(out, resamples=10)
    rows = read_table(out / "confusion.parquet")
    total = sum(r["tiles"] for r in rows if r["split"] == "test")
    assert total == sum(len(s.cells) for s in slides if s.item.split == "test")
    cells = {(r["true"], r["called"]): 0 for r in rows}
    for r in rows:
        cells[r["true"], r["called"]] += r["tiles"] * (r["split"] == "test")
    counts = result(found).counts
    assert cells["tumor", "tumor"] == counts["tp"]
    assert cells["normal", "tumor"] == counts["fp"]
    row = next(r for r in read_table(out / "slides.parquet") if r["slide_id"] == "e0")
    assert row["sensitivity"] == row["tp"] / (row["tp"] + row["fn"])
    normal = next(r for r in read_table(out / "slides.parquet") if r["slide_id"] == "e1")
    assert normal["sensitivity"] is None
    assert normal["specificity"] == normal["tn"] / 117


def test_slides_without_a_patient_are_their_own_and_it_is_said(tmp_path):
    slides = []
    for s in cohort(tmp_path):
        patient = None if s.item.slide_id in ("e2", "e3") else s.item.patient_id
        slides.append(Scored(s.item.model_copy(update={"patient_id": patient}), s.cells, s.margins, s.shape))
    out = write_scored_run(tmp_path / "out", slides)
    found = evaluate(out, resamples=10)
    assert (result(found).patients, result(found).lone) == (6, 2)
    assert "of 6 patients (2 of 6 are slides without patient_id))" in result(found).sentence
    lone = [r["patient_id"] for r in read_table(out / "patients.parquet") if r["slide_without_patient"]]
    assert lone == ["e2", "e3"]
    assert [p.lone for p in found.points] == [0, 0, 0]


@pytest.mark.parametrize(
    ("keep", "margins", "note", "auc"),
    [
        ("tumor", None, "test, slide, tumor: no negatives among 4", None),
        ("normal", None, "test, tile, tumor: no positives among 468", None),
        ("", 0.0, "test, tile, tumor: all 936 scores are equal, which makes the AUC 0.5", 0.5),
    ],
)
def test_what_is_not_defined_is_none_and_said(tmp_path, keep, margins, note, auc):
    slides = []
    for s in cohort(tmp_path):
        if s.item.split != "test" or keep in s.item.label:
            z = s.margins if margins is None else np.full(s.margins.shape, margins)
            slides.append(Scored(s.item, s.cells, z, s.shape))
    found = evaluate(write_scored_run(tmp_path / "out", slides), resamples=10)
    assert any(note in text for text in found.notes)
    assert result(found, note.split(", ")[1]).auc == auc
    json.dumps(found.to_json(), allow_nan=False)


def test_labels_by_fraction_leave_the_rim_out_and_it_is_recorded(run):
    out, _ = run
    by_centre, found = evaluate(out, resamples=10), evaluate(out, labels="fraction=0.9", resamples=10)
    assert (by_centre.labels, found.labels) == ("centre", "fraction=0.9")
    assert read_evaluation(out) == found
    covered = [
        [(max(0, min(80, 200 - 40 * c)) / 80) * (max(0, min(80, 300 - 40 * r)) / 80) for c in range(13)]
        for r in range(9)
    ]
    assert result(found).positives == 4 * (np.array(covered) >= 0.9).sum()
    assert result(found).negatives < result(by_centre).negatives
    assert any("partly in a region, of no class" in note for note in found.notes)
    for bad in ("fraction=2", "half", "centre=1"):
        with pytest.raises(ConfigError):
            evaluate(out, labels=bad)


def test_annotated_area_outside_the_mask_is_reported(tmp_path):
    mask = np.ones((8, 12), bool)
    mask[:1] = False
    out = write_scored_run(tmp_path / "out", cohort(tmp_path), tissue=mask)
    found = evaluate(out, resamples=10)
    row = {r["slide_id"]: r for r in read_table(out / "slides.parquet")}
    whole, missed = 205 * 305, 205 * 305 - 200 * 250  # the annotation begins at -5, the tissue at y = 50
    assert row["e0"]["annotated_um2"] == pytest.approx(whole / 16)
    assert row["e0"]["missed_um2"] == pytest.approx(missed / 16)
    assert row["e0"]["missed_share"] == pytest.approx(missed / whole)
    assert row["e1"]["annotated_um2"] is None
    assert any(f"({missed / whole:.1%}) of the annotated tumor lie outside" in note for note in found.notes)


def test_an_annotated_slide_without_tissue_is_all_missed(tmp_path):
    annotation = write_features(tmp_path / "glass.geojson", [box("Tumor", 0, 0, 100, 100)])
    item = Item(slide_id="glass", uri="g", split="test", label="tumor", annotation=annotation)
    glass = Scored(item, np.empty((0, 2), int), np.empty((0, 2)), (9, 13))
    found = evaluate(write_scored_run(tmp_path / "out", [*cohort(tmp_path), glass]), resamples=10)
    assert any("no tissue was found on 1 annotated slides, all is missed: glass" in note for note in found.notes)


def test_tables_by_arg_max_have_shares_and_rates(tmp_path):
    rng = np.random.default_rng(8)
    made = [many(tmp_path, "classify", split, f"{split}{i}", rng) for split in ("val", "test") for i in range(2)]
    found = evaluate(write_scored_run(tmp_path / "out", [s for s, _ in made], ("a", "b", "c")), resamples=10)
    truth = np.concatenate([t for s, t in made if s.item.split == "test"])
    called = np.concatenate([s.margins for s, _ in made if s.item.split == "test"]).astype(np.float32).argmax(axis=1)
    (table,) = [t for t in found.tables if t.split == "test"]
    assert np.array(table.by_true) == pytest.approx(sk.confusion_matrix(truth, called, normalize="true"))
    assert np.array(table.by_total) == pytest.approx(sk.confusion_matrix(truth, called, normalize="all"))
    assert table.macro_f1 == pytest.approx(sk.f1_score(truth, called, average="macro"))
    recall = sk.recall_score(truth, called, average=None)
    assert [table.by_class[name]["sensitivity"] for name in "abc"] == pytest.approx(recall)
    rows = [r for r in read_table(tmp_path / "out" / "confusion.parquet") if r["by"] == "argmax"]
    assert sum(r["tiles"] for r in rows if r["split"] == "test") == len(truth)
    assert result(found, class_name="b").confusion.classes == ("not b", "b")

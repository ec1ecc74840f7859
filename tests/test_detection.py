"""Found against annotated objects: matched one to one, counted per slide and patient, pixels by their centres."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import shapely
import sklearn.metrics as sk
from cascaded import SIZE, circle, grid_of_discs, run_cascade, write_cohort, write_kind
from segmenters import disc, write_colours

from slideflow_ray.accounting import read_run as read_record
from slideflow_ray.annotations import Region, labels_of_objects
from slideflow_ray.cascade import Cascade, Judge, cascades
from slideflow_ray.cases import read_run
from slideflow_ray.cohort import read_cohort
from slideflow_ray.detection import detect, match, overlaps, truths
from slideflow_ray.errors import AnnotationError
from slideflow_ray.evaluate import evaluate
from slideflow_ray.metrics import rate_interval
from slideflow_ray.report import write_report
from slideflow_ray.results import DETECTION, read_evaluation
from slideflow_ray.specs import ObjectSpec
from slideflow_ray.store import SlideStore, tree_digest
from slideflow_ray.tables import read_table

N = 6
"""Patients of test, one slide each; the first is drawn with mistakes."""


def box_around(discs, i) -> dict:
    _, x, y, r = discs[i]
    shape = shapely.box(x - r, y - r, x + r, y + r)
    return {"type": "Feature", "geometry": shapely.geometry.mapping(shape), "properties": {"label": "light"}}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """test0: one disc not drawn, one drawn where none is, one drawn too far off, one of the wrong class."""
    folder = tmp_path_factory.mktemp("detection")
    write_kind(folder, "kind")
    write_kind(folder, "both", ("light", "dark"), "multilabel")
    slides, drawn = {}, {}
    for i, split in enumerate(["test"] * N + ["val"] * 2):
        name, discs = f"{split}{i}", grid_of_discs(5 + i, 2)
        slides[name] = (discs, {"patient_id": f"P{i}", "split": split})
        drawn[name] = [circle(d) for d in discs]
    discs = slides["test0"][0]
    drawn["test0"] = [circle(discs[0]), circle(discs[1], "light"), circle(discs[2]), circle(discs[3], shift=30.0)]
    drawn["test0"] += [circle(("cyan", 400.0, 270.0, 20.0)), circle(discs[0], "Tubulus")]
    drawn["test1"][0] = circle(slides["test1"][0][0], "light+dark")
    drawn["test2"] = [box_around(slides["test2"][0], 3), *drawn["test2"][:3], *drawn["test2"][4:]]
    drawn["test3"][1] = circle(slides["test3"][0][1], "magenta")  # the segmentation's own class alone
    slides["empty"] = ([], {"patient_id": "P9", "split": "test"})
    drawn["empty"] = []
    out = run_cascade(
        folder, write_cohort(folder, slides, drawn), "kind", "both", labels={"names": {"tubulus": "other"}}
    )
    evaluate(out, resamples=200)
    return out


def rows(out: Path, name: str, **of) -> list[dict]:
    return [row for row in read_table(out / f"{name}.parquet") if all(row[k] == v for k, v in of.items())]


def test_each_slide_is_compared_with_what_was_drawn(out):
    (row,) = rows(out, "detection", slide_id="test0")
    assert {k: row[k] for k in ("annotated", "found", "tp", "fp", "fn")} == {
        "annotated": 5, "found": 5, "tp": 3, "fp": 2, "fn": 2,
    }  # fmt: skip
    assert (row["precision"], row["recall"], row["f1"]) == (3 / 5, 3 / 5, 6 / 10)
    for row in rows(out, "detection"):
        if row["slide_id"] not in ("test0", "empty"):
            assert (row["fp"], row["fn"], row["f1"]) == (0, 0, 1.0)
    (row,) = rows(out, "detection", slide_id="empty")
    assert (row["annotated"], row["found"], row["f1"], row["dice"]) == (0, 0, None, None)


def test_the_cohort_adds_up_and_its_intervals_draw_patients(out):
    (result,) = [d for d in read_evaluation(out).detections if d.split == "test"]
    mine = sorted(rows(out, "detection", split="test"), key=lambda r: r["patient_id"])
    tp, fp, fn = (np.array([r[k] for r in mine]) for k in ("tp", "fp", "fn"))
    assert (result.slides, result.patients, result.lone) == (N + 1, N + 1, 0)
    assert result.matched == tp.sum()
    assert result.f1 == 2 * tp.sum() / (2 * tp + fp + fn).sum()
    assert result.precision == tp.sum() / (tp + fp).sum()
    assert result.f1_interval == rate_interval(2 * tp, 2 * tp + fp + fn, resamples=200)
    assert result.recall_interval == rate_interval(tp, tp + fn, resamples=200)
    assert result.f1_interval[0] < result.f1 < result.f1_interval[1]
    assert "F1 0.9" in " ".join(result.sentences)


def test_dice_is_of_the_planes_pixels(out):
    """Discs are drawn by pixel centres, and the plane is the discs: against the drawn outlines."""
    by_slide = {r["slide_id"]: r["dice"] for r in rows(out, "detection")}
    store = SlideStore(out, "test0")
    (node,) = store.nodes("planes")
    found = store.read_plane(f"{node}/0") > 0
    discs = grid_of_discs(5, 2)
    truth = np.zeros(found.shape, bool)
    for d in [*discs[:3], ("", discs[3][1] + 30.0, *discs[3][2:]), ("", 400.0, 270.0, 20.0)]:
        truth |= disc(SIZE, *d[1:])
    wanted = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert by_slide["test0"] == pytest.approx(wanted, abs=0.005)  # the outlines have 128 corners
    assert by_slide["test1"] > 0.98
    assert by_slide["test2"] is None  # one is a box


def test_matched_objects_are_called_against_the_annotation(out):
    (result,) = [d for d in read_evaluation(out).detections if d.split == "test"]
    kind, both = result.called
    table = rows(out, "matches", split="test", judge="kind")
    pairs = [(r["true"], r["called"]) for r in table if r["iou"] and r["true"] in ("light", "dark")]
    names = ["light", "dark"]
    np.testing.assert_array_equal(kind.counts, sk.confusion_matrix(*zip(*pairs, strict=True), labels=names))
    assert kind.counts[0][1] == 1  # test0's magenta disc, drawn as light
    assert kind.accuracy == pytest.approx(sk.accuracy_score(*zip(*pairs, strict=True)))
    assert kind.kappa == pytest.approx(sk.cohen_kappa_score(*zip(*pairs, strict=True)))
    assert (kind.unknown, kind.several) == (1, 1)
    assert kind.missed == {"light": 2, "dark": 0}
    assert kind.spurious == {"light": 2, "dark": 0}
    assert both.counts is None
    truth = {n: [] for n in names}
    for r in rows(out, "matches", split="test", judge="both"):
        if r["iou"] and r["true"] != "magenta":
            for n in names:
                truth[n].append((n in r["true"].split("+"), n in r["called"].split("+")))
    for n in names:
        tn, fp, fn, tp = sk.confusion_matrix(*zip(*truth[n], strict=True), labels=[False, True]).ravel()
        assert {k: both.by_class[n][k] for k in ("tp", "fp", "fn", "tn")} == {"tp": tp, "fp": fp, "fn": fn, "tn": tn}


def test_matches_name_rows_of_objects(out):
    objects = {(r["slide_id"], r["object"]): r for r in read_table(out / "objects.parquet")}
    table = rows(out, "matches", judge="kind")
    assert {(r["slide_id"], r["object"]) for r in table if r["object"] is not None} == set(objects)
    for r in table:
        assert (r["iou"] is None) == (r["object"] is None or r["annotation"] is None)
        if r["object"] is not None:
            assert r["called"] == objects[r["slide_id"], r["object"]]["class"]


def test_what_nobody_drew_has_no_label(out):
    """Spurious objects do not count as the first class."""
    found = read_evaluation(out)
    (result,) = [r for r in found.results if (r.name, r.level, r.split) == ("kind", "tile", "test")]
    matched = [r for r in rows(out, "matches", split="test", judge="kind") if r["iou"]]
    known = [r for r in matched if r["true"] in ("light", "dark")]
    assert result.positives + result.negatives == len(known)
    inside = labels_of_objects(
        [Region("a", shapely.box(0, 0, 9, 9)), Region("b", shapely.box(5, 0, 30, 9))],
        np.array([[0, 0], [6, 2], [20, 2], [50, 50]]), np.array([[4, 4]] * 4), ("a", "b"),
    )  # fmt: skip
    assert inside.tolist() == [[1, 0], [-1, -1], [0, 1], [-1, -1]]


def test_evaluating_again_writes_the_same_and_withdraws_what_is_old(out):
    before = tree_digest(out)
    (out / "detection.json").write_text("{}")
    evaluate(out, resamples=200)
    assert tree_digest(out) == before
    assert all((out / name).exists() for name in DETECTION)
    record = json.loads((out / "run.json").read_text())
    record["items"] = [item | {"annotation": None} for item in record["items"]]
    (out / "run.json").write_text(json.dumps(record))
    try:
        found = evaluate(out, resamples=10)
        assert found.detections == ()
        assert any("no annotated slide in split 'test'" in note for note in found.notes)
        assert not any((out / name).exists() for name in DETECTION)
    finally:
        items = {p.stem: str(p) for p in out.parent.glob("*.geojson")}
        record["items"] = [item | {"annotation": items[item["slide_id"]]} for item in record["items"]]
        (out / "run.json").write_text(json.dumps(record))
        evaluate(out, resamples=200)


def test_slides_annotated_for_something_else_and_models_that_did_not_run_do_not_count(tmp_path):
    write_kind(tmp_path, "kind")
    discs = grid_of_discs(4, 1)
    slides = {
        "glomeruli": (discs, {"split": "test", "stain": "PAS"}),
        "tumour": (grid_of_discs(6, 1), {"split": "test", "stain": "PAS"}),
        "other": (grid_of_discs(5, 1), {"split": "test", "stain": "HE"}),
    }
    drawn = {
        "glomeruli": [circle(d) for d in discs], "tumour": [circle(discs[0], "Tumour")],
        "other": [circle(d) for d in slides["other"][0]],
    }  # fmt: skip
    write_colours(tmp_path)
    models = [
        {"path": str(tmp_path / "discs"), "objects": {"min_area_um2": 10.0}},
        {"path": str(tmp_path / "kind"), "on": "objects:discs", "where": {"stain": "PAS"}},
    ]
    cohort = write_cohort(tmp_path, slides, drawn)
    out = run_cascade(tmp_path, cohort, model=models)
    with pytest.raises(AnnotationError, match="'Tumour' is no class"):
        evaluate(out, resamples=10)
    (tmp_path / "tumour.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [
        {"type": "Feature", "geometry": circle(discs[0])["geometry"], "properties": {"label": "vessel"}}
    ]}))  # fmt: skip
    found = evaluate(out, names={"vessel": "other"}, resamples=10)
    (result,) = found.detections
    assert (result.slides, result.annotated, result.found) == (3, 9, 15)  # nothing but background was drawn
    (kind,) = result.called
    assert np.sum(kind.counts) == 4
    assert sum(kind.spurious.values()) == 6
    assert [r["n_kind_dark"] for r in rows(out, "counts", level="slide")] == [1, 1, None]


def test_a_model_on_objects_is_judged_by_object_in_words_too(out):
    found = read_evaluation(out)
    (kind,) = [r for r in found.results if (r.name, r.level, r.split) == ("kind", "tile", "test")]
    assert "by object: AUC" in kind.sentence
    assert "negative objects of" in kind.sentence
    page = write_report(out).read_text()
    assert "by object, AUC" in page
    assert "Highest object" in page
    assert "share of its objects" in page
    assert "objects of the test split" in page
    assert [said for said in SAID if said in page] == []
    (result,) = [d for d in found.detections if d.split == "test"]
    low, high = result.called[0].kappa_interval
    assert low <= result.called[0].kappa <= high
    assert f"{low:.3f} to {high:.3f}" in page


SAID = ("by tile", "Highest tile", "Tiles on test", "tiles of the test split", "share of its tiles")


def test_annotated_slides_without_a_result_are_said(out):
    """A slide whose run failed is in no rate: in the result, on the terminal and in the report."""
    path = out / "run.json"
    kept = path.read_bytes()
    record = json.loads(kept)
    for name in ("test0", "val6"):
        record["outcomes"][name] |= {"status": "failed", "code": "E_READ"}
    try:
        path.write_text(json.dumps(record))
        found = evaluate(out, resamples=10)
        (result,) = [d for d in found.detections if d.split == "test"]
        assert (result.slides, result.slides_missing, result.matched) == (N, 1, result.annotated)
        said = "discs: 1 annotated slides of test with 5 objects have no result and are in none of its rates: test0."
        assert said in found.notes
        assert "; without 1 annotated slides that have no result" in found.summary()
        page = write_report(out).read_text()
        assert "1 more without a result" in page
        assert said in page
    finally:
        path.write_bytes(kept)
        evaluate(out, resamples=200)


def test_what_is_annotated_for_another_model_alone_is_left_out(out):
    """No glomerulus was drawn, so none is spurious."""
    paths = {name: out.parent / f"{name}.geojson" for name in ("test4", "test5")}
    kept = {name: path.read_text() for name, path in paths.items()}
    try:
        for name in paths:
            paths[name].write_text(json.dumps(circle(grid_of_discs(1)[0], "Tumour")))
        run = read_run(out)
        (found,) = cascades(read_record(out))
        detected = detect(run, read_record(out), (), resamples=10)
        (result,) = [d for d in detected.results if d.split == "test"]
        assert result.slides == N - 1
        assert any("2 slides are annotated, and with no objects of it" in note for note in detected.notes)
        assert any("named 'Tumour'" in note for note in detected.notes)
        assert {r["slide_id"] for r in detected.rows["detection"]}.isdisjoint(paths)
        assert found.name == "discs"
    finally:
        for name, text in kept.items():
            paths[name].write_text(text)


def test_a_broken_annotation_is_named(out):
    path = next(out.parent.glob("test1.geojson"))
    kept = path.read_text()
    try:
        path.write_text('{"type": "FeatureCollection", "features": [')
        with pytest.raises(AnnotationError, match=r"test1\.geojson"):
            evaluate(out, resamples=10)
    finally:
        path.write_text(kept)


# matching by hand


def squares(rng, n, size=60) -> list:
    places = rng.uniform(0, size, (n, 2))
    sides = rng.uniform(8, 14, (n, 2))
    return [shapely.box(*p, *(p + s)) for p, s in zip(places, sides, strict=True)]


@pytest.mark.parametrize("seed", range(12))
def test_matching_is_the_best_of_all(seed):
    """Every way to pair them, tried."""
    rng = np.random.default_rng(seed)
    annotated, found = squares(rng, 5, 12), squares(rng, 5, 12)
    pairs, iou = overlaps(annotated, found, [False] * 5)
    slow = {
        (i, j): a.intersection(b).area / a.union(b).area
        for (i, a), (j, b) in itertools.product(enumerate(annotated), enumerate(found))
    }
    slow = {pair: value for pair, value in slow.items() if value >= 0.5}
    assert dict(zip(map(tuple, pairs.tolist()), iou.tolist(), strict=True)) == pytest.approx(slow)
    best = max(
        ([(i, j) for i, j in enumerate(way) if (i, j) in slow] for way in itertools.permutations(range(5))),
        key=lambda way: (len(way), sum(slow[pair] for pair in way)),
    )
    kept = match(pairs, iou)
    assert len(kept) == len(best)
    assert iou[kept].sum() == pytest.approx(sum(slow[pair] for pair in best))
    assert len(set(pairs[kept, 0].tolist())) == len(set(pairs[kept, 1].tolist())) == len(kept)


def test_a_box_is_compared_with_the_box():
    round_one = shapely.Point(50, 50).buffer(20)
    drawn = shapely.box(18, 30, 70, 70)
    assert overlaps([drawn], [round_one], [True])[1].tolist() == pytest.approx([40 / 52], rel=1e-3)
    assert overlaps([drawn], [round_one], [False])[1].tolist() == pytest.approx([round_one.area / drawn.area], rel=1e-3)
    assert not len(overlaps([], [round_one], [])[0])
    assert not len(match(np.empty((0, 2), np.int64), np.empty(0)))


def cascade(found=("glomerulus",), *judges: Judge) -> Cascade:
    return Cascade("seg", "seg-1", ("other", *found), found, ObjectSpec(), {}, judges)


def test_an_outline_and_the_lesion_drawn_on_it_are_one_object():
    one = cascade(("glomerulus",), Judge("kind", "k", "multilabel", ("Normal", "FSG", "CGN")))
    around = shapely.Point(50, 50).buffer(20)
    regions = [
        Region("CGN", shapely.box(30, 30, 70, 70)),
        Region("Glomerulus", around),
        Region("FSG+cgn", shapely.Point(51, 50).buffer(19)),
        Region("Normal", shapely.MultiPolygon([shapely.Point(150, 50).buffer(9), shapely.Point(190, 50).buffer(9)])),
        Region("vessel", shapely.box(0, 0, 5, 5)),
        Region("other", shapely.box(0, 0, 5, 5)),
        Region("crescent", shapely.Point(90, 150).buffer(9)),
    ]
    drawn, others = truths(regions, one, {"crescent": "CGN"})
    assert others == ["vessel"]
    assert [t.called.get("kind", ()) for t in drawn] == [("CGN", "FSG"), ("Normal",), ("Normal",), ("CGN",)]
    assert drawn[0].shape.equals(around)
    assert not drawn[0].is_box
    assert {t.found for t in drawn} == {"glomerulus"}


def test_a_grain_of_an_outlined_mask_is_no_box_that_was_drawn():
    grains = [shapely.box(0, 0, 1, 1), shapely.box(20, 0, 80, 3), shapely.box(0, 40, 4, 44)]
    drawn, _ = truths([Region("glomerulus", grain) for grain in grains], cascade(), {})
    assert [t.is_box for t in drawn] == [False, False, True]


def test_a_lesion_inside_an_outline_is_part_of_that_object():
    """A segment and a cell of it, a crescent that sticks out by less than half, and what lies outside by more."""
    one = cascade(("glomerulus",), Judge("kind", "k", "multilabel", ("Normal", "FSG", "CGN")))
    around, beside = shapely.Point(50, 50).buffer(20), shapely.Point(85, 50).buffer(16)
    regions = [
        Region("FSG", shapely.Point(56, 50).buffer(8)),
        Region("Glomerulus", around),
        Region("Normal", beside),
        Region("CGN", shapely.box(45, 62, 55, 74)),
        Region("FSG", shapely.Point(58, 52).buffer(2)),
        Region("CGN", shapely.box(45, 20, 55, 33)),
    ]
    drawn, _ = truths(regions, one, {"FSG": "glomerulus"})
    assert [t.shape.bounds for t in drawn] == [r.geometry.bounds for r in (regions[1], regions[2], regions[5])]
    assert [t.called.get("kind", ()) for t in drawn] == [("FSG", "CGN"), ("Normal",), ("CGN",)]
    two = cascade(("glomerulus", "tubule"), Judge("kind", "k", "classify", ("Normal", "FSG")))
    nested = [Region("glomerulus", around), Region("tubule", regions[0].geometry), Region("FSG", regions[4].geometry)]
    drawn, _ = truths(nested, two, {})
    assert [(t.found, t.called.get("kind", ())) for t in drawn] == [("glomerulus", ("FSG",)), ("tubule", ())]


def test_with_several_kinds_of_objects_a_lesion_may_lie_on_any():
    two = cascade(("glomerulus", "sclerosed"), Judge("kind", "k", "classify", ("Normal", "FSG")))
    regions = [Region("FSG", shapely.Point(0, 0).buffer(5)), Region("sclerosed", shapely.Point(50, 0).buffer(5))]
    drawn, _ = truths(regions, two, {})
    assert [t.found for t in drawn] == ["", "sclerosed"]


def test_a_segmentation_that_finds_nothing_is_said_first_and_buries_no_note(tmp_path, out):
    write_kind(tmp_path, "kind")
    drawn = [circle(d) for d in grid_of_discs(3, 1)]
    slides = {
        f"{split}{i}": ([], {"split": split, "patient_id": f"{split}{i}"}) for split in ("val", "test") for i in (0, 1)
    }
    cohort = write_cohort(tmp_path, slides, dict.fromkeys(slides, drawn))
    for item in read_cohort(cohort):
        with Path(item.uri).open("ab") as file:  # else all would be one file, in several splits
            file.write(item.slide_id.encode())
    found = evaluate(run_cascade(tmp_path, cohort, "kind"), resamples=10)
    assert found.notes[0] == "discs found no objects on any of 4 slides."
    assert not any(note.startswith("kind") for note in found.notes)
    assert [(d.annotated, d.found) for d in found.detections] == [(6, 0), (6, 0)]
    assert not any("found no objects" in note for note in read_evaluation(out).notes)  # one empty slide of many

"""Objects and counts: once per object, never added up over sections, shares as statsmodels' formula has them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from cascaded import grid_of_discs, run_cascade, write_cohort, write_kind
from segmenters import write_colours

from slideflow_ray import storage
from slideflow_ray.accounting import read_run
from slideflow_ray.cascade import Cascade, Found, Judge, cascades, slide_count, told, write_tables
from slideflow_ray.cohort import Item
from slideflow_ray.counts import SlideCount, count_rows, counted, share
from slideflow_ray.errors import ConfigError
from slideflow_ray.planes import Objects
from slideflow_ray.report import write_report
from slideflow_ray.run import run
from slideflow_ray.specs import CountSpec, ObjectSpec, RunSpec
from slideflow_ray.store import SlideStore, tree_digest
from slideflow_ray.tables import read_table

CUT = ("cyan", 445.0, 270.0, 24.0)
"""A disc that the right edge cuts."""

SLIDES = {
    "a1": (grid_of_discs(12, 3), {"patient_id": "A", "stain": "PAS", "section": "1"}),
    "a2": ([*grid_of_discs(13, 4), CUT], {"patient_id": "A", "stain": "PAS", "section": "2"}),
    "a3": (grid_of_discs(5, 5), {"patient_id": "A", "stain": "HE", "section": "1"}),
    "b1": (grid_of_discs(2), {"patient_id": "B", "stain": "HE"}),
    "b2": (grid_of_discs(4, 1), {"patient_id": "B", "stain": "HE"}),
    "c": ([], {"stain": "PAS"}),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("counts")
    write_kind(folder, "kind")
    write_kind(folder, "both", ("GS", "dark"), "multilabel")
    return run_cascade(folder, write_cohort(folder, SLIDES), "kind", "both")


def rows(out: Path, level: str, **of) -> list[dict]:
    found = [row for row in read_table(out / "counts.parquet") if row["level"] == level]
    return [row for row in found if all(row[key] == value for key, value in of.items())]


# objects


def test_every_object_has_a_row_with_what_was_said_of_it(out):
    table = read_table(out / "objects.parquet")
    assert [row["slide_id"] for row in table] == [name for name, (discs, _) in SLIDES.items() for _ in discs]
    assert len({row["id"] for row in table}) == len(table)
    for row in table:
        discs, about = SLIDES[row["slide_id"]]
        assert (row["patient_id"], row["stain"], row["section"]) == (
            about.get("patient_id", row["slide_id"]), about["stain"], about.get("section"),
        )  # fmt: skip
        near = min(discs, key=lambda d: math.hypot(d[1] - row["x_px0"], d[2] - row["y_px0"]))
        assert row["found"] == near[0]
        assert row["class"] == row["called_kind"] == {"cyan": "light", "magenta": "dark"}[near[0]]
        assert row["touches_edge"] == (near == CUT)
        if near != CUT:
            assert row["area_um2"] == pytest.approx(math.pi * near[3] ** 2 * 0.25, rel=0.03)
            assert row["minx"] <= near[1] - near[3] + 1
            assert row["minx"] + row["width"] >= near[1] + near[3] - 1
        p = np.exp([row["margin_kind_light"], row["margin_kind_dark"]])
        np.testing.assert_allclose([row["prob_kind_light"], row["prob_kind_dark"]], p / (1 + p), rtol=1e-5)
        assert row["probability"] == max(row["prob_kind_light"], row["prob_kind_dark"])
        assert row["called_both"] == ("GS+dark" if near[0] == "magenta" else "GS")


def test_objects_are_numbered_as_in_the_store(out):
    (slide,) = [SlideStore(out, "a2")]
    (node,) = slide.nodes("objects")
    boxes = slide.read(f"{node}/box_px0")
    table = [row for row in read_table(out / "objects.parquet") if row["slide_id"] == "a2"]
    assert [row["object"] for row in table] == list(range(len(boxes)))
    assert [[row[k] for k in ("minx", "miny", "width", "height")] for row in table] == boxes.tolist()


# counts of a run


def test_slides_are_counted_each(out):
    for name, (discs, _) in SLIDES.items():
        (row,) = rows(out, "slide", slide_id=name)
        dark = sum(colour == "magenta" for colour, *_ in discs)
        assert row["objects"] == len(discs)
        assert row["at_edge"] == discs.count(CUT)
        assert row["inadequate"] == (len(discs) < 10)
        assert (row["n_kind_dark"], row["n_kind_light"]) == (dark, len(discs) - dark)
        assert (row["n_discs_magenta"], row["n_discs_cyan"]) == (dark, len(discs) - dark)
        assert row["n_both_dark"] == dark
        assert row["share_kind_dark"] == (dark / len(discs) if discs else None)


def test_a_patient_is_counted_on_one_section(out):
    (a,) = rows(out, "patient", patient_id="A")
    assert (a["slide_id"], a["stain"], a["section"], a["objects"], a["n_kind_dark"]) == ("a2", "PAS", "2", 14, 4)
    assert a["others"] == "a1 (PAS section 1): 12; a3 (HE section 1): 5"
    assert (a["slides"], a["slides_missing"], a["inadequate"]) == (3, 0, False)
    assert [(r["stain"], r["section"], r["objects"]) for r in rows(out, "section", patient_id="A")] == [
        ("PAS", "1", 12), ("PAS", "2", 14), ("HE", "1", 5),
    ]  # fmt: skip
    (b,) = rows(out, "patient", patient_id="B")
    assert (b["objects"], b["others"], b["inadequate"]) == (4, "b1 (HE): 2", True)
    assert len(rows(out, "section", patient_id="B")) == 2  # no section is named: each slide is one
    (c,) = rows(out, "patient", patient_id="c")
    assert (c["objects"], c["share_kind_dark"], c["slide_without_patient"]) == (0, None, True)


def test_global_sclerosis_is_counted_only_where_a_model_tells_it(out, tmp_path):
    (row,) = rows(out, "slide", slide_id="a1")
    assert (row["global_sclerosis"], row["global_sclerosis_share"]) == (12, 1.0)
    folder = tmp_path
    write_kind(folder, "kind")
    other = run_cascade(folder, write_cohort(folder, {"a1": SLIDES["a1"]}), "kind")
    (row,) = rows(other, "slide")
    assert row["global_sclerosis"] is None
    values = read_run(other)["spec"] | {"counts": {"global_sclerosis": ["DARK"], "adequate": 13}}
    run(RunSpec.parse(values, "test"))
    (row,) = rows(other, "slide")
    assert (row["global_sclerosis"], row["inadequate"]) == (3, True)


def test_running_again_and_lost_tables_give_the_same_bytes(out):
    before = tree_digest(out)
    for name in ("objects.parquet", "counts.parquet"):
        (out / name).unlink()
    assert tree_digest(out) != before
    write_tables(out)
    assert tree_digest(out) == before


def test_a_slide_that_cannot_be_read_is_missing_and_the_others_count(tmp_path):
    write_kind(tmp_path, "kind")
    out = run_cascade(tmp_path, write_cohort(tmp_path, {k: SLIDES[k] for k in ("b1", "b2")}), "kind")
    store = SlideStore(out, "b2")
    (node,) = store.nodes("objects")
    (chunk,) = (store.root / node / "box_px0" / "c").rglob("0/0")
    chunk.write_bytes(b"broken")
    write_tables(out)
    (row,) = rows(out, "patient")
    assert (row["slide_id"], row["objects"], row["slides"], row["slides_missing"]) == ("b1", 2, 1, 1)


def test_slides_without_tissue_have_none_and_those_that_failed_are_missing(tmp_path):
    write_kind(tmp_path, "kind")
    slides = {"full": SLIDES["b2"], "blank": ([], {"patient_id": "B"}), "broken": ([], {"patient_id": "B"})}
    slides["lost"] = ([], {"patient_id": "D"})
    cohort = write_cohort(tmp_path, slides)
    cohort.write_text(cohort.read_text().replace("blank.tif,tem", "blank.tif,he"))
    for name in ("broken", "lost"):
        (tmp_path / f"{name}.tif").write_bytes(b"II*\0no" + name.encode())
    write_colours(tmp_path)
    models = [{"path": str(tmp_path / "discs")}, {"path": str(tmp_path / "kind"), "on": "objects:discs"}]
    values = {"cohort": str(cohort), "out": str(tmp_path / "out"), "model": models, "executor": {"workers": 1}}
    ended = {e.slide_id: (e.status, e.outcome) for e in run(RunSpec.parse(values, "test")).ended}
    assert ended["blank"] == ("done", "no_tissue")
    assert ended["broken"][0] != "done"
    (blank,) = rows(tmp_path / "out", "slide", slide_id="blank")
    assert (blank["objects"], blank["n_kind_dark"], blank["inadequate"]) == (0, 0, True)
    patient, lost = rows(tmp_path / "out", "patient")
    assert (patient["slide_id"], patient["objects"], patient["slides"], patient["slides_missing"]) == ("full", 4, 2, 1)
    assert (lost["patient_id"], lost["objects"], lost["slides"], lost["slides_missing"]) == ("D", None, 0, 1)
    page = write_report(tmp_path / "out").read_text()
    assert "1 more without any result" in page
    assert "not counted; 1 slide without a result" in page


def test_every_class_of_global_sclerosis_counts_and_an_object_once():
    """Two names of one model, another model, and a model that did not run, whose classes are not counted."""
    both = Judge("both", "b", "multilabel", ("GS", "dark", "Global sclerosis"))
    other = Judge("other", "o", "classify", ("gs", "rest"))
    absent = Judge("absent", "a", "classify", ("GS", "rest"))
    segmentation = Cascade("discs", "d", ("other", "disc"), ("disc",), ObjectSpec(), {}, (both, other, absent))
    margins = {
        "both": np.array([[1, 1, 1], [1, -1, -1], [-1, 1, 1], [-1, 1, -1]], np.float32),
        "other": np.array([[1, 0], [0, 1], [0, 1], [1, 0]], np.float32),
    }
    item = Item.parse({"slide_id": "s", "uri": "s.tif"}, "test")
    n = np.zeros(4)
    boxes, index = np.ones((4, 4), np.int64), np.ones(4, np.uint8)
    objects = Objects(("other", "disc"), boxes, n[:, None], n, index, n > 0, np.array([None] * 4))
    found = Found(item, segmentation, "g", objects, margins)
    result = slide_count(item, segmentation, found, CountSpec())
    assert (result.sclerosed, result.objects, result.judged) == (4, 4, True)
    assert result.called == {
        "both_GS": 2, "both_dark": 3, "both_Global sclerosis": 2, "other_gs": 2, "other_rest": 2,
    }  # fmt: skip


def test_a_run_without_a_segmentation_has_no_tables(out, tmp_path):
    record = read_run(out)
    models = [m | {"task": "features", "on": "tissue", "classes": []} for m in record["models"]]
    for name in ("objects.parquet", "counts.parquet"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "run.json").write_bytes(storage.to_json(record | {"models": models}))
    write_tables(tmp_path)
    assert not (tmp_path / "counts.parquet").exists()


# the arithmetic


def one(slide: str, n: int, patient: str = "P", **more) -> SlideCount:
    return SlideCount(slide, patient, "glomeruli", n, **more)


def test_serial_sections_are_never_added_up():
    slides = [one(f"s{i}", n, stain=stain, section=section) for i, (stain, section, n) in enumerate(
        [("PAS", "1", 9), ("PAS", "1", 11), ("PAS", "2", 11), ("HE", "1", 7), ("HE", None, 3), ("HE", None, 2)]
    )]  # fmt: skip
    lost = [one(f"l{i}", None, "Q", stain="HE") for i in range(2)]
    found = counted([*slides, one("q", 1, "Q"), *lost])
    assert [r.of.objects for r in found if r.level == "section"] == [11, 11, 7, 3, 2, 1, None, None]
    p, q = [r for r in found if r.level == "patient"]
    assert (p.of.slide_id, p.of.objects, p.slides) == ("s1", 11, 6)  # of equals the first
    assert p.others == "s2 (PAS section 2): 11; s3 (HE section 1): 7; s4 (HE): 3; s5 (HE): 2"
    rescanned = next(r for r in found if r.level == "section")
    assert (rescanned.of.slide_id, rescanned.others) == ("s1", "s0 (PAS section 1): 9")
    assert (q.of.objects, q.missing) == (1, 2)
    assert max(r.of.objects or 0 for r in found) == 11


def test_the_section_that_was_judged_counts_even_with_fewer_objects():
    judged = one("he", 12, stain="HE", judged=True, called={"kind_CGN": 3})
    slides = [one("pas", 20, stain="PAS"), judged, one("he2", 0, stain="HE")]
    (row,) = [r for r in count_rows(counted(slides), CountSpec()) if r["level"] == "patient"]
    assert (row["slide_id"], row["objects"], row["n_kind_CGN"], row["share_kind_CGN"]) == ("he", 12, 3, 0.25)
    assert row["others"] == "pas (PAS): 20; he2 (HE): 0"
    rescans = [one("r1", 9, section="1"), one("r2", 7, section="1", judged=True)]
    assert [r.of.slide_id for r in counted(rescans) if r.level != "slide"] == ["r2", "r2"]


def test_what_has_no_result_is_missing_at_its_section_and_its_patient():
    slides = [
        one("a", 11, stain="HE", section="1"),
        one("a_again", None, stain="HE", section="1"),
        one("b", None, stain="PAS", section="2"),
        one("q", None, "Q", stain="PAS", split="test", lone=True),
    ]
    rows = list(count_rows(counted(slides), CountSpec()))
    assert [(r["level"], r["slide_id"], r["stain"], r["objects"], r["slides"], r["slides_missing"]) for r in rows] == [
        ("slide", "a", "HE", 11, 1, 0),
        ("section", "a", "HE", 11, 1, 1),
        ("section", None, "PAS", None, 0, 1),
        ("section", None, "PAS", None, 0, 1),
        ("patient", "a", "HE", 11, 1, 2),
        ("patient", None, None, None, 0, 1),
    ]
    assert (rows[-1]["patient_id"], rows[-1]["split"], rows[-1]["slide_without_patient"]) == ("Q", "test", True)
    assert (rows[-1]["inadequate"], rows[-1]["at_edge"], rows[-1]["others"]) == (None, None, "")
    assert rows[4]["others"] == ""


def test_two_segmentations_do_not_mix():
    slides = [one("s", 3), SlideCount("s", "P", "tubuli", 70)]
    assert [(r.of.segmentation, r.of.objects) for r in counted(slides) if r.level == "patient"] == [
        ("glomeruli", 3), ("tubuli", 70),
    ]  # fmt: skip


@pytest.mark.parametrize(("k", "n"), [(0, 7), (3, 7), (7, 7), (40, 111)])
def test_intervals_are_wilsons(k, n):
    """His formula, written out."""
    z, p = 1.959963984540054, k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    np.testing.assert_allclose(share(k, n), (p, max(0, middle - half), min(1, middle + half)), atol=1e-12)


def test_adequacy_is_below_ten():
    found = [row["inadequate"] for row in count_rows(counted([one("a", 9), one("b", 10, "Q")]), CountSpec())]
    assert found == [True, False] * 3


# models on objects


def test_multilabel_is_called_at_its_operating_points():
    margins = np.array([[1.0, -1.0], [0.5, 0.5], [-2.0, -3.0]], np.float32)
    plain = Judge("m", "n", "multilabel", ("a", "b"))
    assert plain.text(plain.called(margins)) == ["a", "a+b", ""]
    strict = Judge("m", "n", "multilabel", ("a", "b"), {"a": 1.0, "b": -1.0})
    assert strict.text(strict.called(margins)) == ["a+b", "b", ""]
    assert "operating point" in strict.rule
    argmax = Judge("m", "n", "classify", ("a", "b"), {"a": 5.0})
    assert argmax.text(argmax.called(margins)) == ["a", "a", "a"]
    p = np.array([[0.7, 0.2], [0.6, 0.7], [0.1, 0.05]], np.float32)
    np.testing.assert_array_equal(told(p, plain.called(margins)), np.float32([0.7, 0.7, 0.1]))


def test_models_of_one_name_keep_their_columns_apart(out):
    record = json.loads((out / "run.json").read_text())
    for model in record["models"][1:]:
        model["name"] = "twice"
    (found,) = cascades(record)
    assert len(set(found.keys)) == 6
    assert Item.parse(record["items"][0], "test").patient == "A"
    with pytest.raises(ConfigError, match="adequate"):
        CountSpec.parse({"adequate": -1}, "test")

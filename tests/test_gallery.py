"""The report's objects: every patient's counts, every thumbnail the object it names, bounded however many there are."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cascaded import circle, grid_of_discs, run_cascade, write_cohort, write_kind
from PIL import Image
from test_report import Page

from slideflow_ray import gallery
from slideflow_ray import report as rp
from slideflow_ray.accounting import read_run
from slideflow_ray.cascade import Cascade, Judge
from slideflow_ray.evaluate import evaluate
from slideflow_ray.results import Evaluation
from slideflow_ray.specs import ObjectSpec
from slideflow_ray.tables import read_table

SLIDES = {
    "a1": (grid_of_discs(11, 3), {"patient_id": "A", "stain": "PAS", "section": "1", "split": "test"}),
    "a2": (grid_of_discs(4, 2), {"patient_id": "A", "stain": "HE", "section": "2", "split": "test"}),
    "b<b>": (grid_of_discs(5), {"patient_id": "B", "split": "test"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    write_kind(folder, "kind")
    drawn = {"a1": [circle(d) for d in SLIDES["a1"][0][1:]]}
    run_cascade(folder, write_cohort(folder, SLIDES, drawn), "kind")
    evaluate(folder / "out", resamples=10)
    return folder


@pytest.fixture(scope="module")
def html(folder) -> str:
    return rp.write_report(folder / "out").read_text()


def pages(out: Path) -> dict:
    (page,) = gallery.objects_page(out, read_run(out), Evaluation())
    return page


def drawn(page: dict) -> list[tuple[str, dict]]:
    return [(group["name"], thumb) for group in page["groups"] for thumb in (*group["first"], *group["last"])]


def check_thumbnails(out: Path) -> None:
    """Each is the object that it names: its colour is the table's class."""
    kinds = {(r["slide_id"], r["object"]): r["found"] for r in read_table(out / "objects.parquet")}
    thumbs = drawn(pages(out))
    assert sorted((t["slide_id"], t["object"]) for _, t in thumbs) == sorted(kinds)
    for name, thumb in thumbs:
        assert thumb["pixels"].shape == (gallery.THUMB_PX, gallery.THUMB_PX, 3)
        red, green, _ = thumb["pixels"][36:44, 36:44].mean(axis=(0, 1))
        colour = "cyan" if green > red else "magenta"
        assert kinds[thumb["slide_id"], thumb["object"]] == colour
        assert name == {"cyan": "light", "magenta": "dark"}[colour]
        assert thumb["pixels"][:2, :2].mean() > 200  # there is some of the ground around it


def test_thumbnails_are_the_kept_tiles_of_their_objects(folder, monkeypatch):
    monkeypatch.setattr(gallery, "open_slide", lambda *_, **__: pytest.fail("the tiles were kept"))
    check_thumbnails(folder / "out")
    monkeypatch.setattr(gallery, "AT_ONCE", 1)
    check_thumbnails(folder / "out")


def test_without_kept_tiles_they_come_from_the_slide(folder, tmp_path):
    for name in ("discs", "kind", "cohort.csv", "a1.geojson", *(f"{s}.tif" for s in SLIDES)):
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copy
        copy(folder / name, tmp_path / name)
    out = run_cascade(tmp_path, tmp_path / "cohort.csv", "kind", store={"tiles": "none"})
    check_thumbnails(out)
    (tmp_path / "a2.tif").unlink()
    gone = [t for _, t in drawn(pages(out)) if t["pixels"] is None]
    assert {t["slide_id"] for t in gone} == {"a2"}
    assert len(gone) == 4
    assert Page(rp.write_report(out).read_text()).text.count("no picture") == 4


def test_the_report_counts_a_patient_once(html):
    text = re.sub(r"\s+", " ", Page(html).text)
    assert "20 objects of 2 patients, 1 with fewer than 10" in text
    assert "PAS section 1a1 11" in text
    assert "HE section 2a2 4fewer than 10" in text
    assert "5inadequate" in text
    assert text.count("not labelled") == 3
    assert "10 of 10 annotated and 11 found objects of test are the same" in text
    assert "<b>" not in html.split("Objects: discs")[1].split("kind calls")[0]
    assert "b&lt;b&gt;" in html


def test_every_object_has_a_picture_in_the_page(html):
    assert not {"script", "iframe", "link"} & set(Page(html).tags)
    uris = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" width="80"', html)
    assert len(uris) == 20
    for uri in uris:
        with Image.open(io.BytesIO(base64.b64decode(uri))) as image:
            assert image.size == (80, 80)
    assert html.count("<details") == html.count("</details>") == 3


def test_before_the_tables_are_there_nothing_is_shown(folder, tmp_path):
    out = folder / "out"
    (tmp_path / "run.json").write_bytes((out / "run.json").read_bytes())
    assert gallery.objects_page(tmp_path, read_run(tmp_path), Evaluation()) == []


def test_many_objects_are_bounded_and_the_rest_counted():
    classes = ("Normal", "FSG")
    cascade = Cascade("g", "g-1", ("o", "g"), ("g",), ObjectSpec(), {}, (Judge("k", "k-1", "multilabel", classes),))
    rng = np.random.default_rng(0)
    names = rng.choice(["FSG", "Normal", "FSG+Normal", ""], 3000)
    rows = [
        {"slide_id": "s", "object": i, "class": str(n), "found": "g", "touches_edge": False, "probability": float(p)}
        | {"minx": 0, "miny": 0, "width": 9, "height": 5}
        for i, (n, p) in enumerate(zip(names, rng.random(3000), strict=True))
    ]
    asked = []

    class Budget(gallery._Budget):
        def pixels(self, rows):
            asked.extend(rows)
            return {(r["slide_id"], r["object"]): np.zeros((8, 8, 3), np.uint8) for r in rows}

    groups = list(gallery._groups(rows, cascade, Budget(Path(), {}, cascade, {}, gallery.THUMBS)))
    assert [g["name"] for g in groups] == ["Normal", "FSG", "FSG+Normal", "none of the classes"]
    assert len(asked) == 4 * gallery.PER_CLASS <= gallery.THUMBS
    for group, name in zip(groups, ("Normal", "FSG", "FSG+Normal", ""), strict=True):
        ranked = sorted((r["probability"] for r in rows if r["class"] == name), reverse=True)
        assert [t["probability"] for t in group["first"]] == ranked[:80]
        assert [t["probability"] for t in group["last"]] == ranked[-40:]
        assert group["total"] == len(ranked) == 120 + group["left"]
    assert gallery._square(rows[0])[2] == 12

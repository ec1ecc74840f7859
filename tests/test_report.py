from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import shapely
from PIL import Image
from scored import MPP0, SIDE_PX0, STEP_PX0, Scored, box, cells_of, two_class, write_features, write_scored_run

from slideflow_ray import report as rp
from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError
from slideflow_ray.evaluate import evaluate
from slideflow_ray.lesions import TABLES, camelyon16
from slideflow_ray.phantoms import write_marked_slide
from slideflow_ray.results import LESIONS
from slideflow_ray.tables import read_table

FETCHING = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")


class Page(HTMLParser):
    """Every attribute that could fetch something, and the text in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An evaluated run with a slide that opens, some that are gone, one without tissue and one that failed."""
    folder = tmp_path_factory.mktemp("report")
    write_marked_slide(folder / "real.tif", size_px0=(13 * 40 + 40, 9 * 40 + 40))
    rng = np.random.default_rng(0)
    slides = [two_class(folder, rng, f"v{i}", f"V{i}", "val", i % 2 == 0) for i in range(2)]
    slides += [two_class(folder, rng, f"e{i}", f"E{i}", "test", i % 2 == 0) for i in range(5)]
    real = two_class(folder, rng, "real", "R", "test", True)
    item = real.item.model_copy(update={"uri": str(folder / "real.tif"), "mpp": MPP0})
    slides.append(Scored(item, real.cells, real.margins, real.shape))
    glass = Item(slide_id="<b>glass</b>", uri="g", split="test", label="normal")
    slides.append(Scored(glass, np.empty((0, 2), int), np.empty((0, 2)), (9, 13)))
    failed = [Item(slide_id="<script>alert(1)</script>", uri="b")]
    run = write_scored_run(folder / "out", slides, failed=failed, heatmaps=True)
    evaluate(run)
    return run


@pytest.fixture(scope="module")
def html(out):
    return rp.write_report(out).read_text()


def test_nothing_is_fetched(html):
    page = Page(html)
    assert page.links
    assert all(link.startswith(("data:image/", "#thumb-")) for link in page.links)
    assert not {"script", "iframe", "link", "object", "embed", "form"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_names_and_messages_are_escaped(html):
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<b>glass</b>" not in html
    assert "cut &lt;off&gt;" in html


def test_the_answer_comes_first_then_what_failed(out, html):
    text = Page(html).text
    found = evaluate(out)
    answer = found.headline(found.results[0].model)
    places = [
        text.index(rp.rate(answer.auc)),
        text.index("E_READ"),
        text.index("on the test split\n"),
        text.index("What ran"),
    ]
    assert places == sorted(places)
    assert rp.interval(answer.auc_interval) in text
    assert rp.rate(answer.rates["sensitivity"]) in text
    assert rp.rate(answer.rates["specificity"]) in text
    assert "copy it" in text
    for n in answer.counts.values():
        assert rp.count(n) in text


def test_an_evaluation_of_another_state_of_the_run_is_not_shown(tmp_path):
    rng = np.random.default_rng(0)
    slides = [two_class(tmp_path, rng, f"{s}{i}", f"{s}{i}", s, i == 0) for s in ("val", "test") for i in range(2)]
    run = write_scored_run(tmp_path / "out", slides)
    evaluate(run, resamples=10)
    camelyon16(run)
    shown = Page(rp.write_report(run).read_text()).text
    assert "FROC score" in shown
    assert "evaluated before" not in shown
    write_scored_run(run, slides)  # nothing is new
    assert Page(rp.write_report(run).read_text()).text == shown
    moved = Scored(slides[0].item.model_copy(update={"patient_id": "other"}), *list(vars(slides[0]).values())[1:])
    write_scored_run(run, [moved, *slides[1:]])
    text = Page(rp.write_report(run).read_text()).text
    assert "evaluated before the run changed: run `slideflow-ray evaluate" in text
    assert text.index("evaluated before") < text.index("What ran")
    assert "FROC score" not in text
    assert "on the test split\n" not in text
    evaluate(run, resamples=10)
    text = Page(rp.write_report(run).read_text()).text
    assert "on the test split\n" in text
    assert "evaluated before" not in text
    for name in ("confusion.json", "operating_points.json"):  # as an earlier version wrote them
        old = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps({key: value for key, value in old.items() if key != "run"}))
        assert rp.page(run)["stale"]
        assert not rp.page(run)["evaluated"]


def test_lesions_of_an_earlier_evaluation_are_withdrawn(tmp_path):
    rng = np.random.default_rng(0)
    slides = [two_class(tmp_path, rng, f"test{i}", f"{i}", "test", i == 0) for i in range(2)]
    run = write_scored_run(tmp_path / "out", slides)
    before = {path.name for path in run.iterdir()}
    evaluate(run, resamples=10)
    plain = {path.name for path in run.iterdir()}
    camelyon16(run)
    assert {path.name for path in run.iterdir()} - plain == set(LESIONS)
    assert set(LESIONS) == {"froc.json", *(f"{name}.parquet" for name in TABLES)}
    assert rp.page(run)["lesions"]
    evaluate(run, resamples=10)
    assert {path.name for path in run.iterdir()} == plain > before
    assert rp.page(run)["lesions"] is None


def test_the_same_run_makes_the_same_page(out, html):
    assert rp.write_report(out).read_text() == html


def test_the_page_wears_dark_and_prints(html):
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_no_run_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.json"):
        rp.write_report(tmp_path)


def test_a_run_that_was_not_evaluated_says_so(tmp_path):
    rng = np.random.default_rng(0)
    run = write_scored_run(tmp_path / "out", [two_class(tmp_path, rng, "a", "A", None, False)], heatmaps=True)
    text = Page(rp.write_report(run).read_text()).text
    assert "not evaluated yet" in text
    assert "Pictures" in text


def test_an_evaluation_without_an_answer_says_why(tmp_path):
    rng = np.random.default_rng(0)
    run = write_scored_run(tmp_path / "out", [two_class(tmp_path, rng, "a", "A", "test", False)], heatmaps=True)
    evaluate(run)
    text = Page(rp.write_report(run).read_text()).text
    assert "No figure for the test split" in text
    assert "no operating point: split 'val' has 0 positive" in text


# cards


def cards(out):
    return {card["item"].slide_id: card for card in rp.page(out)["cards"]}


def test_a_slide_that_is_gone_is_said_and_its_heatmap_shown(out, html):
    card = cards(out)["e0"]
    assert card["thumbnail"] is None
    assert "E_NOT_FOUND" in card["missing"][0]
    assert len(card["heatmaps"]) == 1
    assert "No picture, the slide cannot be opened" in html


def test_a_slide_without_tissue_has_no_heatmap(out):
    assert cards(out)["<b>glass</b>"]["heatmaps"] == []


def test_test_slides_come_first_and_the_rest_is_counted(out):
    shown = rp.page(out, cards=3)
    assert [card["item"].split for card in shown["cards"]] == ["test"] * 3
    assert [small["item"].slide_id for small in shown["sheet"]] == ["e3", "e4", "real", "v0", "v1"]
    assert all(small["heatmap"] for small in shown["sheet"])
    assert shown["cards_left"] == 1  # the glass, which has neither picture nor heatmap


def test_every_cell_is_painted_by_how_it_was_called(out):
    """The picture's colours, counted, are the slide's confusion."""
    rows = {row["slide_id"]: row for row in read_table(out / "slides.parquet")}
    for name in ("real", "e0", "e1", "v1"):
        (heatmap,) = cards(out)[name]["heatmaps"]
        verdict, row = heatmap["verdict"], rows[name]
        pixels = np.asarray(picture(verdict["image"]))
        for kind, colour in (("tp", (255, 0, 0)), ("fp", (0, 255, 255)), ("fn", (255, 255, 0))):
            painted = int(((pixels[..., :3] == colour).all(-1) & (pixels[..., 3] > 0)).sum())
            assert painted == verdict[kind] == row[kind]
        assert int((pixels[..., 3] == 0).sum()) == row["tn"] + heatmap_holes(heatmap)


def heatmap_holes(heatmap):
    return int((np.asarray(picture(heatmap["image"]))[..., 3] == 0).sum())


def test_precision_and_recall_end_where_all_is_called(out):
    model = rp.page(out)["models"][0]
    line = next(line for line in model["prs"][0]["lines"] if line["level"] == "tile")
    result = next(r for r in model["results"] if (r.level, r.split) == ("tile", "test"))
    share = result.positives / (result.positives + result.negatives)
    assert line["path"].endswith(f"V{100 - 100 * share:.2f}H100.00")
    assert line["share"] == pytest.approx(100 - 100 * share)
    assert line["mark"] == pytest.approx((100 * result.rates["sensitivity"], 100 - 100 * result.rates["ppv"]))


def test_a_distribution_has_the_tiles_of_each_side(out):
    model = rp.page(out)["models"][0]
    (spread,) = model["distributions"]
    for side in ("positives", "negatives"):
        heights = [100 - float(v) for v in re.findall(r"V([\d.]+)H", spread[side])]
        assert len(heights) == 25
        assert sum(heights) / 100 * spread["highest"] == pytest.approx(1, abs=0.01)
    assert spread["threshold"] == pytest.approx(100 * model["point"].probability) or model["point"].level != "tile"


def picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_the_picture_is_the_slide(out):
    card = cards(out)["real"]
    assert card["missing"] == []
    assert picture(card["thumbnail"]).size == (560, 400)
    assert card["size_px0"] == [560, 400]
    kinds = [outline.kind for outline in card["outlines"]]
    assert kinds == ["truth"]
    assert card["outlines"][0].path == "M-5 -5L200 -5L200 300L-5 300Z"


def test_the_heatmap_lies_where_its_tiles_lie(out):
    (heat,) = cards(out)["real"]["heatmaps"]
    x, y, w, h = heat["box"]
    assert (w / 13, h / 9) == (STEP_PX0, STEP_PX0)
    # the middle of cell (row 2, column 3) is the middle of its tile
    assert (x + 3.5 * STEP_PX0, y + 2.5 * STEP_PX0) == (3 * STEP_PX0 + SIDE_PX0 / 2, 2 * STEP_PX0 + SIDE_PX0 / 2)
    assert picture(heat["image"]).size == (13, 9)


def test_what_is_called_is_drawn_by_margin(out):
    found = evaluate(out)
    (point,) = [p for p in found.points if p.level == "tile"]
    (heat,) = cards(out)["real"]["heatmaps"]
    pixels = np.asarray(picture(heat["image"]))
    assert (pixels[..., 3] == 255).all()
    row = next(r for r in rp.page(out)["slides"] if r["slide_id"] == "real")
    assert heat["share"] == pytest.approx((row["tp"] + row["fp"]) / row["tiles"])
    assert heat["threshold"] == point.probability


# drawing


def test_where_there_is_no_tile_the_heatmap_is_transparent():
    pixels = rp.coloured(np.array([[0, np.nan, 1]], np.float32))
    assert pixels[0, :, 3].tolist() == [255, 0, 255]
    grey = pixels[0, [0, 2], :3].astype(int).sum(axis=1)
    assert grey[0] < grey[1]


def test_edges_enclose_exactly_the_called_cells():
    rng = np.random.default_rng(3)
    cells = rng.random((5, 8)) < 0.4
    segments = set()
    for x, y, kind, end in re.findall(r"M(\d+) (\d+)([HV])(\d+)", rp.edges(cells, (0.0, 0.0), 10.0)):
        x, y, end = int(x) // 10, int(y) // 10, int(end) // 10
        for k in range(x if kind == "H" else y, end):
            segments.add(("H", y, k) if kind == "H" else ("V", k, x))
    padded = np.pad(cells, 1)
    expected = {("H", r, c) for r in range(6) for c in range(8) if padded[r, c + 1] != padded[r + 1, c + 1]}
    expected |= {("V", r, c) for r in range(5) for c in range(9) if padded[r + 1, c] != padded[r + 1, c + 1]}
    assert segments == expected
    assert rp.edges(np.zeros((2, 2), bool), (0, 0), 1) == ""


def test_an_outline_lies_on_its_mask():
    mask = np.zeros((40, 70), bool)
    mask[5:30, 10:60] = True
    path = rp.contour(mask, (4.0, 4.0))
    ring = np.array([[float(v) for v in p.split()] for p in path[1:-1].split("L")])
    shape = shapely.Polygon(ring)
    assert shape.centroid.coords[0] == pytest.approx((35 * 4, 17.5 * 4), abs=1)
    assert shape.area == pytest.approx(mask.sum() * 16, rel=0.02)
    assert rp.contour(np.zeros((3, 3), bool), (1, 1)) == ""


def test_numbers_read_well():
    assert rp.rate(None) == rp.rate(float("nan")) == rp.count(None) == rp.NOTHING
    assert rp.rate(0.12345) == "0.123"
    assert rp.count(1234567) == "1\u202f234\u202f567"
    assert rp.percent(0.4567) == "45.7\u202f%"
    assert rp.interval((0.1, 0.2)) == "0.100 to 0.200"
    assert rp.scale_bar(10_000, 0.25) == (2000.0, "500 µm")


def test_more_classes_get_a_curve_each(tmp_path):
    rng = np.random.default_rng(2)
    slides = []
    for split in ("val", "test"):
        for i in range(2):
            cells = cells_of(9, 13)
            item = Item(slide_id=f"{split}{i}", uri="x", split=split, label="abc"[i + 1])
            slides.append(Scored(item, cells, rng.normal(0, 1, (117, 3)), (9, 13)))
    run = write_scored_run(tmp_path / "out", slides, ("a", "b", "c"), heatmaps=True)
    evaluate(run)
    (model,) = rp.page(run)["models"]
    assert [figure["class_name"] for figure in model["rocs"]] == ["a", "b", "c"]
    assert model["overall"] is None
    assert "No curve: one class is missing" in rp.write_report(run).read_text()


def test_more_classes_are_answered_by_the_table_first(tmp_path):
    rng = np.random.default_rng(2)
    slides = []
    for split in ("val", "test"):
        cells = cells_of(9, 13)
        features = [box("b", 180, -5, 340, 900), box("c", 340, -5, 900, 900)]
        item = Item(slide_id=split, uri="x", split=split, annotation=write_features(tmp_path / split, features))
        slides.append(Scored(item, cells, rng.normal(0, 1, (117, 3)), (9, 13)))
    run = write_scored_run(tmp_path / "out", slides, ("a", "b", "c"), heatmaps=True)
    found = evaluate(run)
    text = Page(rp.write_report(run).read_text()).text
    (table,) = [t for t in found.tables if t.split == "test"]
    areas = [r.auc for r in found.results if r.split == "test" and r.level == "tile"]
    assert text.index(rp.rate(table.balanced_accuracy)) < text.index("What ran")
    assert rp.rate(table.kappa) in text
    assert rp.rate(np.mean(areas)) in text
    assert "called b" in text

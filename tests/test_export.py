"""What is exported lies where it should and says what the stores say, read again by other readers."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import sklearn.metrics as sk
import tifffile
import torch
import zarr
from cascaded import write_kind
from PIL import Image
from scored import Scored, cells_of, two_class, write_scored_run
from segmenters import CLASSES, COLOURS, write_colours, write_discs

from slideflow_ray.accounting import read_run
from slideflow_ray.annotations import read_geojson
from slideflow_ray.cohort import single_slide
from slideflow_ray.collect import collect, with_labels
from slideflow_ray.errors import ConfigError
from slideflow_ray.evaluate import evaluate
from slideflow_ray.export import crop_name, cut, export, image_names
from slideflow_ray.label_files import read_labels
from slideflow_ray.models.bundle import BundleCard, read_card, write_bundle
from slideflow_ray.models.networks import build
from slideflow_ray.phantoms import write_pyramid
from slideflow_ray.planes import objects_node, read_objects
from slideflow_ray.results import read_evaluation
from slideflow_ray.run import run
from slideflow_ray.slides import open_slide
from slideflow_ray.specs import ObjectSpec, RunSpec
from slideflow_ray.store import SlideStore
from slideflow_ray.tables import read_table
from slideflow_ray.train.job import TrainJob, train

TILES = 9 * 13


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """An evaluated run of eight slides with random scores."""
    folder = tmp_path_factory.mktemp("scored")
    rng = np.random.default_rng(0)
    slides = [
        two_class(folder, rng, f"{split}{i}", f"{split}{i}", split, i % 2 == 0)
        for split in ("val", "test")
        for i in range(4)
    ]
    out = write_scored_run(folder / "out", slides, heatmaps=True)
    for slide in slides:
        SlideStore(out, slide.item.slide_id).describe({"uri": "", "mpp0": 0.25, "size_px0": [600, 400]})
    evaluate(out)
    return out


def tables_of(found) -> dict[str, list[dict]]:
    return {path.stem: read_table(path) for path in found.files}


def test_scikit_learn_on_the_exported_margins_says_the_same(scored, tmp_path):
    tables = tables_of(export(scored, "parquet", folder=tmp_path))
    results = json.loads((scored / "confusion.json").read_text())["results"]
    points = json.loads((scored / "operating_points.json").read_text())["points"]
    (point,) = [p for p in points if p["level"] == "tile"]
    judged = next(r for r in results if (r["level"], r["split"]) == ("tile", "test"))
    rows = [row for name, table in tables.items() if name.startswith("test") for row in table if row["label"]]
    truth = np.array([row["label"] == "tumor" for row in rows])
    margins = np.array([row["margin_tumor"] for row in rows], np.float32)
    assert judged["positives"] + judged["negatives"] == len(rows) == 4 * TILES
    assert judged["auc"] == pytest.approx(sk.roc_auc_score(truth, margins))
    called = margins >= np.float32(point["threshold"])
    tn, fp, fn, tp = sk.confusion_matrix(truth, called).ravel()
    assert judged["counts"] == {"tp": tp, "fn": fn, "fp": fp, "tn": tn}
    assert judged["rates"]["kappa"] == pytest.approx(sk.cohen_kappa_score(truth, called))
    curve = [r for r in read_table(scored / "roc.parquet") if (r["level"], r["split"]) == ("tile", "test")]
    fpr, tpr, _ = sk.roc_curve(truth, margins, drop_intermediate=False)
    np.testing.assert_allclose([(0, 0), *((r["fpr"], r["tpr"]) for r in curve)], np.column_stack([fpr, tpr]))
    found = [r for r in read_table(scored / "pr.parquet") if (r["level"], r["split"]) == ("tile", "test")]
    precision, recall, _ = sk.precision_recall_curve(truth, margins)
    wanted = set(zip(recall[:-1].round(12).tolist(), precision[:-1].round(12).tolist(), strict=True))
    assert {(round(r["recall"], 12), round(r["precision"], 12)) for r in found} >= wanted
    assert judged["average_precision"] == pytest.approx(sk.average_precision_score(truth, margins))
    (table,) = [r["confusion"] for r in results if (r["level"], r["split"]) == ("tile", "test")]
    counts = np.array(table["counts"])
    assert counts.sum() == len(rows)
    np.testing.assert_allclose(table["by_true"], sk.confusion_matrix(truth, called, normalize="true"))
    np.testing.assert_allclose(table["by_total"], sk.confusion_matrix(truth, called, normalize="all"))


def test_a_fixed_probability_is_applied_to_the_exported_probabilities_exactly(tmp_path):
    rng = np.random.default_rng(3)
    slides = []
    for split, i in [("val", 0), ("val", 1), *(("test", i) for i in range(6))]:
        one = two_class(tmp_path, rng, f"{split}{i}", f"{split}{i}", split, i % 2 == 0)
        p = one.margins[:, 1].astype(np.float64)
        p[[0, 40, 80]] = [math.log(0.7995 / 0.2005), math.log(4), math.log(0.799999 / 0.200001)]
        p[1:9] = math.log(4)  # of tumour, where there is any
        slides.append(Scored(one.item, one.cells, np.column_stack([-p, p]), one.shape))
    out = write_scored_run(tmp_path / "out", slides)
    found = evaluate(out, rule="004", resamples=10)
    tables = tables_of(export(out, "parquet", folder=tmp_path))
    for split in ("val", "test"):
        rows = [row for name, table in tables.items() if name.startswith(split) for row in table]
        truth = np.array([row["label"] == "tumor" for row in rows])
        called = np.array([row["prob_tumor"] for row in rows], np.float32) >= 0.8
        tn, fp, fn, tp = sk.confusion_matrix(truth, called).ravel()
        (judged,) = [r for r in found.results if (r.level, r.split) == ("tile", split)]
        assert judged.counts == {"tp": tp, "fn": fn, "fp": fp, "tn": tn}
    (point,) = [p for p in found.points if p.level == "tile"]
    assert (point.positives, point.negatives) == (judged_of(found, "val").positives, judged_of(found, "val").negatives)
    assert point.sensitivity == judged_of(found, "val").rates["sensitivity"]
    rows = [r for r in read_table(out / "slides.parquet") if r["split"] == "test"]
    (slide,) = [r for r in found.results if (r.level, r.split) == ("slide", "test")]
    assert slide.counts["tp"] == sum(r["truth"] and r["called"] for r in rows)
    assert slide.counts["fp"] == sum(not r["truth"] and r["called"] for r in rows)


def test_labels_are_those_of_the_evaluation(tmp_path):
    """Whatever other rules, fractions and names have labelled the same tiles before."""
    rng = np.random.default_rng(0)
    slides = [two_class(tmp_path, rng, f"test{i}", f"P{i}", "test", i == 0) for i in range(2)]
    out = write_scored_run(tmp_path / "out", slides)
    found = {}
    for labels in ("fraction=0.1", "fraction=0.9", "fraction=0.6", "centre", "fraction=0.1", "fraction=0.9"):
        evaluate(out, labels=labels, resamples=10)
        evaluation = read_evaluation(out)
        (row,) = [row for row in read_table(out / "slides.parquet") if row["slide_id"] == "test0"]
        table = tables_of(export(out, "parquet", folder=tmp_path))["test0"]
        found[labels] = sum(r["label"] == "tumor" for r in table)
        assert found[labels] == row["tiles_positive"] == evaluation.results[0].positives
        assert sum(r["label"] is None for r in table) == row["tiles_unknown"]
    assert found["centre"] == 28
    assert found["fraction=0.1"] > found["fraction=0.9"]
    evaluate(out, names={"Tumor": "normal"}, resamples=10)
    table = tables_of(export(out, "parquet", folder=tmp_path))["test0"]
    assert {r["label"] for r in table} == {"normal"}


def test_points_of_another_state_of_the_run_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    slides = [two_class(tmp_path, rng, f"{s}{i}", f"{s}{i}", s, i == 0) for s in ("val", "test") for i in range(2)]
    out = write_scored_run(tmp_path / "out", slides)
    evaluate(out, rule="probability=0.999", resamples=10)
    strict = len(json.loads(export(out, "geojson", folder=tmp_path).files[0].read_text())["features"])
    write_scored_run(out, slides[:3])
    found = export(out, "geojson", folder=tmp_path)
    assert any("evaluated before the run changed" in note for note in found.notes)
    assert len(json.loads(found.files[0].read_text())["features"]) > strict  # at a probability of 0.5
    assert {r["label"] for r in tables_of(export(out, "parquet", folder=tmp_path))["val0"]} == {None}
    evaluate(out, resamples=10)
    assert export(out, "geojson", folder=tmp_path).notes == []


def judged_of(found, split):
    return next(r for r in found.results if (r.level, r.split) == ("tile", split))


def test_csv_has_wsinfers_columns_and_the_same_bits(scored, tmp_path):
    tables = tables_of(export(scored, "parquet", folder=tmp_path))
    for path in export(scored, "csv", folder=tmp_path).files:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0])[1:7] == ["minx", "miny", "width", "height", "prob_normal", "prob_tumor"]
        for row, same in zip(rows, tables[path.stem], strict=True):
            for name in ("prob_tumor", "margin_tumor"):
                assert np.float32(row[name]) == np.float32(same[name])
            assert [int(row[name]) for name in ("minx", "width")] == [same["minx"], same["width"]]


def test_parquet_pages_carry_checksums(scored, tmp_path):
    path = export(scored, "parquet", slides=["test1"], folder=tmp_path).files[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"(?i)crc|corrupt|checksum|zstd|couldn't"):
        pq.read_table(path, page_checksum_verification=True)


def test_equal_runs_make_equal_bytes(scored, tmp_path):
    for to in ("geojson", "parquet", "csv", "ome-tiff", "ome-zarr"):
        one, other = (export(scored, to, slides=["test0"], folder=tmp_path / str(i)).files for i in range(2))
        for a, b in zip(one, other, strict=True):
            files = [(p, b / p.relative_to(a)) for p in a.rglob("*") if p.is_file()] if a.is_dir() else [(a, b)]
            assert files
            assert all(p.read_bytes() == q.read_bytes() for p, q in files), to
        assert export(scored, to, slides=["test0"], folder=tmp_path / "0").files == one  # over itself


def test_geojson_holds_the_tiles_called_at_the_operating_point(scored, tmp_path):
    (path,) = export(scored, "geojson", slides=["test0"], folder=tmp_path).files
    features = json.loads(path.read_text())["features"]
    row = next(r for r in read_table(scored / "slides.parquet") if r["slide_id"] == "test0")
    tiles = [f for f in features if f["properties"]["objectType"] == "tile"]
    assert len(tiles) == row["tp"] + row["fp"]
    regions = shapely.union_all([shapely.geometry.shape(f["geometry"]) for f in features if f not in tiles])
    squares = shapely.union_all([shapely.geometry.shape(f["geometry"]) for f in tiles])
    assert regions.equals(squares)
    assert len({f["id"] for f in features}) == len(features)
    assert {f["properties"]["classification"]["name"] for f in features} == {"tumor"}
    again = read_geojson(str(path))
    assert shapely.union_all([region.geometry for region in again]).area == pytest.approx(squares.area)


def test_what_is_not_there_is_said(scored, tmp_path):
    with pytest.raises(ConfigError, match="no slide nobody") as error:
        export(scored, "csv", slides=["nobody"])
    assert "val0" in error.value.step
    with pytest.raises(ConfigError, match="no model other; it has fake"):
        export(scored, "csv", models=["other"])
    with pytest.raises(ConfigError, match=r"nothing in .* to export to crops"):
        export(scored, "crops", folder=tmp_path)
    with pytest.raises(ConfigError, match=r"run\.json"):
        export(tmp_path, "csv")


def test_an_unfinished_run_gives_what_is_committed(tmp_path):
    rng = np.random.default_rng(0)
    items = [single_slide(str(tmp_path / f"{i}.svs"))[0] for i in range(2)]
    slides = [Scored(item, cells_of(3, 4), rng.normal(size=(12, 2)), (3, 4)) for item in items]
    out = write_scored_run(tmp_path / "out", slides)
    record = read_run(out) | {"finished": False, "outcomes": {}, "counts": {}}
    (out / "run.json").write_text(json.dumps(record))
    for path in (out / "commits").glob("1*/scores/*/*.json"):
        path.unlink()
    found = export(out, "parquet")
    assert [path.stem for path in found.files] == ["0"]
    assert "has not ended" in found.notes[0]
    for command in ("status", "report"):
        words = [sys.executable, "-c", "from slideflow_ray.cli import main; main()", command, str(out)]
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr


# places


def test_exports_lie_on_the_tissue_at_all_four_corners(bundles, tmp_path):
    """Dark squares in the corners of a slide that is not square, its second level at an odd ratio."""
    size, side = (1213, 811), 128
    pixels = np.full((size[1], size[0], 3), 238, np.uint8)
    corners = [(0, 0), (size[0] - side, 0), (0, size[1] - side), (size[0] - side, size[1] - side)]
    for x, y in corners:
        pixels[y : y + side, x : x + side] = (120, 40, 130)
    small = np.asarray(Image.fromarray(pixels).resize((size[0] * 3 // 8, size[1] * 3 // 8)))
    write_pyramid(tmp_path / "s.tif", [pixels, small], 0.25)
    write_dark(tmp_path / "dark")
    values = {"cohort": "s", "out": str(tmp_path / "out"), "model": [{"path": str(tmp_path / "dark")}]}
    run(RunSpec.parse(values, "test"), single_slide(str(tmp_path / "s.tif"), modality="tem"))
    out = tmp_path / "out"
    (path,) = export(out, "geojson").files
    whole = shapely.union_all([region.geometry for region in read_geojson(str(path))])
    step = 32 * 0.7 / 0.25
    for x, y in corners:
        assert whole.contains(shapely.Point(x + side / 2, y + side / 2))
        here = whole.intersection(shapely.box(x - step, y - step, x + side + step, y + side + step))
        assert np.abs(np.array(here.bounds) - (x, y, x + side, y + side)).max() <= step
    assert not whole.contains(shapely.Point(size[0] / 2, size[1] / 2))
    (picture,) = export(out, "ome-tiff").files
    with tifffile.TiffFile(picture) as file:
        heat = file.asarray()
        ome = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
    assert heat.shape[0] == 2
    assert ome["Channel"][1]["Name"] == "dark"
    rows, cols = np.nonzero(heat[1] > 0.5)
    plane = ome["Plane"][1]
    x_px0 = (plane["PositionX"] + cols * ome["PhysicalSizeX"]) / 0.25 + 0.5
    y_px0 = (plane["PositionY"] + rows * ome["PhysicalSizeY"]) / 0.25 + 0.5
    for x, y in corners:
        near = np.hypot(x_px0 - x - side / 2, y_px0 - y - side / 2).min()
        assert near < step
    assert shapely.covers(whole, shapely.points(x_px0, y_px0)).all()


def write_dark(folder: Path) -> None:
    """A bundle whose second class is darkness: a mean over the tile and a threshold, in a small CNN's clothes."""
    card = BundleCard(
        name="dark", task="classify", architecture="small-cnn", arguments={"width": 4}, classes=("light", "dark"),
        tile_px=32, mpp=0.7, mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    net = build("small-cnn", {"width": 4}, 2)
    with torch.no_grad():
        for name, values in net.named_parameters():
            values.fill_(1.0 if name.endswith(".1.weight") else 0.0)
        for conv in (m for m in net.modules() if isinstance(m, torch.nn.Conv2d)):
            middle = conv.kernel_size[0] // 2
            conv.weight[0, 0, middle, middle] = 1.0
        net.features[0][0].weight.zero_()[0, 1, 3, 3] = -1.0  # green, in which the squares are dark
        net.head.weight[1, 0] = 20.0
        net.head.bias[1] = -4.0
    write_bundle(folder, card, net.state_dict())


# objects


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> Path:
    """A run of a segmentation, and of a classifier on its objects."""
    folder = tmp_path_factory.mktemp("export-discs")
    write_colours(folder)
    places = [("cyan", 100.0, 90.0, 26.0), ("magenta", 300.0, 200.0, 30.0), ("cyan", 400.0, 290.0, 25.0)]
    write_discs(folder / "s.tif", (451, 300), places)
    torch.manual_seed(0)
    card = BundleCard(
        name="kind", task="classify", architecture="small-cnn", arguments={"width": 4}, classes=("one", "two"),
        tile_px=48, whole="squash", mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    write_bundle(folder / "kind", card, build("small-cnn", {"width": 4}, 2).state_dict())
    models = [{"path": str(folder / "discs")}, {"path": str(folder / "kind"), "on": "objects:discs"}]
    values = {"cohort": "s", "out": str(folder / "out"), "model": models, "executor": {"workers": 1}}
    run(RunSpec.parse(values, "test"), single_slide(str(folder / "s.tif"), modality="tem"))
    return folder / "out"


def found_objects(out: Path):
    record = read_run(out)
    (slide_id,) = record["outcomes"]
    grid, node = record["outcomes"][slide_id]["grids"][0]
    return read_objects(SlideStore(out, slide_id), objects_node(grid, node, ObjectSpec()))


def test_objects_become_detections_with_what_was_said_of_them(discs, tmp_path):
    (path,) = export(discs, "geojson", models=["discs"], folder=tmp_path).files
    features = json.loads(path.read_text())["features"]
    objects = found_objects(discs)
    assert len(features) == len(objects) == 3
    for i, feature in enumerate(features):
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.equals(objects.polygons[i])
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert properties["name"] == CLASSES[objects.class_index[i]]
        measured = properties["measurements"]
        assert measured["area um^2"] == pytest.approx(shape.area * 0.25)
        assert measured["kind: one"] + measured["kind: two"] == pytest.approx(1)
        called = max(("one", "two"), key=lambda name: measured[f"kind: {name}"])
        assert properties["classification"]["name"] == called
        assert measured["probability"] == measured[f"kind: {called}"]
        assert measured["object"] == i
    colours = {tuple(f["properties"]["classification"]["color"]) for f in features}
    assert len(colours) == len({f["properties"]["classification"]["name"] for f in features})


def test_ids_are_those_of_the_table(discs, tmp_path):
    table = {row["id"]: row for row in read_table(discs / "objects.parquet")}
    features = json.loads(export(discs, "geojson", models=["discs"], folder=tmp_path).files[0].read_text())["features"]
    assert {f["id"]: f["properties"]["measurements"]["object"] for f in features} == {
        key: row["object"] for key, row in table.items()
    }
    with export(discs, "crops", folder=tmp_path).files[0].open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == list(table)


def test_geojson_of_a_segmentation_alone_is_of_its_own_classes(discs, tmp_path):
    record = read_run(discs)
    kept = [m["task"] == "segment" for m in record["models"]]
    record["models"] = [m for m, keep in zip(record["models"], kept, strict=True) if keep]
    record["spec"]["model"] = [m for m, keep in zip(record["spec"]["model"], kept, strict=True) if keep]
    original = (discs / "run.json").read_text()
    try:
        (discs / "run.json").write_text(json.dumps(record))
        (path,) = export(discs, "geojson", folder=tmp_path).files
    finally:
        (discs / "run.json").write_text(original)
    found = [f["properties"] for f in json.loads(path.read_text())["features"]]
    assert [p["classification"]["name"] for p in found] == [p["name"] for p in found]
    assert not any("probability" in p["measurements"] for p in found)


def test_crops_are_the_objects_boxes(discs, tmp_path):
    index, *crops = export(discs, "crops", folder=tmp_path).files
    with index.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [path.name for path in crops]
    assert [row["file"] for row in rows] == [f"s-{i:04d}-{row['class']}.jpg" for i, row in enumerate(rows)]
    kinds = found_objects(discs).class_index
    for row, (x, y, w, h), path in zip(rows, found_objects(discs).box_px0.tolist(), crops, strict=True):
        assert [int(row[name]) for name in ("minx", "miny", "width", "height")] == [x, y, w, h]
        with Image.open(path) as image:
            assert image.size == (w, h)
            assert not image.getexif()
            middle = np.asarray(image)[h // 2, w // 2].astype(int)
        assert (middle[0] < 100) == (CLASSES[kinds[int(row["object"])]] == "cyan")
        assert float(row["probability"]) == max(float(row["kind: one"]), float(row["kind: two"]))


def test_an_object_too_large_for_memory_is_cut_from_a_lower_level(discs, monkeypatch):
    with open_slide(str(discs.parent / "s.tif"), modality="tem") as reader:
        whole = cut(reader, (80, 60, 101, 90))
        monkeypatch.setattr("slideflow_ray.export.MAX_CROP_PIXELS", 3000)
        small = cut(reader, (80, 60, 101, 90))
    assert whole.shape == (90, 101, 3)
    assert small.shape == (45, 50, 3)
    assert np.abs(whole[10::20, 10::20].astype(int).mean() - small.mean()) < 12


def test_counts_are_the_tables_as_csv(discs, tmp_path):
    objects, counts = export(discs, "counts", folder=tmp_path).files
    for path in (objects, counts):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        table = read_table(discs / f"{path.stem}.parquet")
        assert list(rows[0]) == list(table[0])
        for row, same in zip(rows, table, strict=True):
            for name, value in same.items():
                if isinstance(value, float):
                    assert float(row[name]) == pytest.approx(value, rel=1e-6)
                else:
                    assert row[name] == ("" if value is None else str(value))
    assert export(discs, "counts", slides=["s"], models=["discs"], folder=tmp_path).files == [objects, counts]
    assert len(counts.read_text().splitlines()) == 4


def test_a_run_of_whole_images_gives_a_label_file_that_is_read_again(tmp_path):
    folder = tmp_path / "images"
    for name, colour in (("a/x_1.png", COLOURS["cyan"]), ("b/x_1.png", COLOURS["magenta"]), ("b/y.png", (240,) * 3)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), colour, np.uint8)).save(folder / name)
    write_kind(tmp_path, "one", ("Normal", "FSG"))
    write_kind(tmp_path, "several", ("CGN", "GS"), "multilabel")
    rows = [f"{n.replace('/', '-')},{folder / n},he" for n in ("a/x_1.png", "b/x_1.png", "b/y.png")]
    (tmp_path / "cohort.csv").write_text("\n".join(["slide_id,uri,modality", *rows]))
    models = [{"path": str(tmp_path / name)} for name in ("one", "several")]
    values = {"cohort": str(tmp_path / "cohort.csv"), "out": str(tmp_path / "out"), "model": models}
    run(RunSpec.parse(values | {"executor": {"workers": 1}}, "test"))
    one, several = export(tmp_path / "out", "labels", keys="chinese").files
    assert "正常肾小球" in one.read_text()
    found = read_labels(one)
    assert found.of == {"a/x_1.png": ("Normal",), "b/x_1.png": ("FSG",), "b/y.png": ("Normal",)}
    found = read_labels(several, {"GS": "GS"})
    assert found.of == {"a/x_1.png": ("CGN",), "b/x_1.png": ("CGN", "GS"), "b/y.png": ("CGN",)}
    (english,) = export(tmp_path / "out", "labels", models=["one"], slides=["b-y.png"]).files
    assert json.loads(english.read_text()) == [{"image_name": "y.png", "Normal": 1, "FSG": 0}]
    export(tmp_path / "out", "labels", keys="chinese")
    again = with_labels(collect(folder, modality="he"), read_labels(one))
    assert {s.name: s.label for s in again.slides} == {"a/x_1.png": "Normal", "b/x_1.png": "FSG", "b/y.png": "Normal"}


def test_names_of_crops_are_harmless():
    assert crop_name("a", 12, "../x=1") == "a-0012-___x_1.jpg"
    assert "/" not in crop_name("a/b", 0, "")
    assert image_names(["/d/e/a.png", "/d/f/a.png"]) == ["e/a.png", "f/a.png"]
    assert image_names(["/d/a.png", "/d/b.png"]) == ["a.png", "b.png"]


def test_planes_open_as_pictures_of_their_own(discs, tmp_path):
    record = read_run(discs)
    (slide_id,) = record["outcomes"]
    grid, node = record["outcomes"][slide_id]["grids"][0]
    wanted = SlideStore(discs, slide_id).read_plane(f"planes/{grid}/{node}/0")
    (folder,) = export(discs, "ome-zarr", models=["discs"], folder=tmp_path).files
    group = zarr.open_group(folder, mode="r")
    assert group.attrs["ome"]["version"] == "0.5"
    np.testing.assert_array_equal(group["0"][:], wanted)
    (picture,) = export(discs, "ome-tiff", models=["discs"], folder=tmp_path).files
    with tifffile.TiffFile(picture) as file:
        np.testing.assert_array_equal(file.asarray(), wanted)
        assert tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]["PhysicalSizeX"] == 0.5


# real slides


@pytest.mark.data
def test_breakhis_end_to_end_adds_up(data, tmp_path):
    cohort = data / "breakhis" / "cohort.csv"
    job = TrainJob.parse(
        {
            "cohort": str(cohort), "out": str(tmp_path / "bundle"), "work": str(tmp_path / "work"),
            "classes": ["benign", "malignant"], "fit": {"epochs": 2}, "tile": {"tile_px": 128, "mpp": 1.0},
        },
        "test",
    )  # fmt: skip
    train(job)
    out = tmp_path / "out"
    values = {"cohort": str(cohort), "out": str(out), "model": [{"path": str(tmp_path / "bundle")}]}
    assert run(RunSpec.parse(values, "test")).counts == {"done": 8, "failed": 0, "refused": 0}
    evaluate(out)
    splits = {item["slide_id"]: item["split"] for item in read_run(out)["items"]}
    rows = [
        row for path in export(out, "parquet").files for row in read_table(path)
        if splits[row["slide_id"]] == "test" and row["label"]
    ]  # fmt: skip
    judged = next(
        r
        for r in json.loads((out / "confusion.json").read_text())["results"]
        if (r["level"], r["split"]) == ("tile", "test")
    )
    truth = np.array([row["label"] == "malignant" for row in rows])
    margins = np.array([row["margin_malignant"] for row in rows], np.float32)
    assert judged["positives"] + judged["negatives"] == len(rows) > 20
    assert judged["auc"] == pytest.approx(sk.roc_auc_score(truth, margins))
    called = margins >= np.float32(judged["threshold"])
    tn, fp, fn, tp = sk.confusion_matrix(truth, called).ravel()
    assert judged["counts"] == {"tp": tp, "fn": fn, "fp": fp, "tn": tn}
    assert judged["rates"]["kappa"] == pytest.approx(sk.cohen_kappa_score(truth, called))
    assert read_card(tmp_path / "bundle").classes == ("benign", "malignant")


def test_models_of_one_name_do_not_overwrite_each_other(scored, tmp_path):
    record = json.loads((scored / "run.json").read_text())
    from slideflow_ray.export import _models

    twice = record | {"models": [record["models"][0] | {"node": n} for n in ("fake-a", "fake-b")]}
    twice["spec"] = record["spec"] | {"model": record["spec"]["model"] * 2}
    assert [model["folder"] for model in _models(twice, [])] == ["fake-a", "fake-b"]
    assert [model["folder"] for model in _models(record, [])] == ["fake"]

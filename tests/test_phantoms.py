"""Phantoms: readable, repeatable, and with the truth they claim."""

from __future__ import annotations

import csv
import doctest
import json
from pathlib import Path

import numpy as np
import openslide
import pytest
import shapely
from colour import aucs, features, phantom_tiles
from shapely.geometry import shape

from slideflow_ray import phantoms
from slideflow_ray.cohort import read_cohort
from slideflow_ray.errors import ConfigError
from slideflow_ray.phantoms import cohort_rows, geojson, read_marks, write_cohort, write_marked_slide, write_slide
from slideflow_ray.slides import open_slide

SMALL = (1280, 960)


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(phantoms.files).failed == doctest.testmod(phantoms.tumour).failed == 0


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    path = tmp_path_factory.mktemp("phantom") / "p.tif"
    return path, write_slide(path, size_px0=(2048, 1536), seed=1, mpp0=0.4)


def test_both_libraries_see_the_same_pyramid(phantom):
    path, _ = phantom
    with open_slide(str(path)) as reader, openslide.OpenSlide(str(path)) as slide:
        assert reader.name == "tiffslide"
        assert reader.mpp0 == 0.4 == float(slide.properties["openslide.mpp-x"])
        assert [level.size for level in reader.levels] == [(2048, 1536), (1024, 768), (512, 384), (256, 192)]
        assert tuple(level.size for level in reader.levels) == slide.level_dimensions
        for level, ds in enumerate((1, 2, 4, 8)):
            theirs = np.asarray(slide.read_region((64 * ds, 32 * ds), level, (150, 90)).convert("RGB"))
            np.testing.assert_array_equal(reader.read(level, (64, 32), (150, 90)), theirs)


def test_it_looks_like_haematoxylin_and_eosin(phantom):
    path, truth = phantom
    with open_slide(str(path)) as reader:
        small = reader.read(2, (0, 0), (512, 384)).astype(int)
    tissue = np.kron(truth.tissue, np.ones((4, 4), bool))[:384, :512]
    pen = np.kron(truth.pen, np.ones((4, 4), bool))[:384, :512]
    glass = small[~tissue & ~pen]
    assert np.median(glass) > 235
    inside = small[tissue]
    assert (inside[:, 1] < np.minimum(inside[:, 0], inside[:, 2])).mean() > 0.9
    assert 0.2 < tissue.mean() < 0.7
    assert truth.pen.any()


def test_tumour_nuclei_are_larger_where_the_annotation_says(phantom):
    from scipy import ndimage

    path, truth = phantom
    with open_slide(str(path)) as reader:
        red = reader.read(0, (0, 0), (2048, 1536))[..., 0]
    x, y = np.meshgrid(np.arange(2048) + 0.5, np.arange(1536) + 0.5)
    inside = np.zeros(x.shape, bool)
    for feature in geojson(truth.tumours)["features"]:
        inside |= shapely.contains_xy(shape(feature["geometry"]), x, y)
    labels, n = ndimage.label(ndimage.median_filter(red, 3) < 120)
    area = np.bincount(labels.ravel())[1:]
    row, col = np.array(ndimage.center_of_mass(labels > 0, labels, np.arange(1, n + 1))).astype(int).T
    nuclei = (area > 60) & (area < 2500)
    here = inside[row, col]
    assert np.median(area[nuclei & here]) > 1.15 * np.median(area[nuclei & ~here])


def test_annotations_are_closed_rings_in_px0_with_a_hole(phantom):
    _, truth = phantom
    found = geojson(truth.tumours, seed=1)
    assert found["type"] == "FeatureCollection"
    assert len(found["features"]) == len(truth.tumours) >= 1
    assert len(found["features"][0]["geometry"]["coordinates"]) == 2
    assert len({feature["id"] for feature in found["features"]}) == len(truth.tumours)
    for feature in found["features"]:
        assert feature["properties"]["classification"]["name"] == "tumor"
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1]
        polygon = shape(feature["geometry"])
        assert polygon.is_valid
        assert polygon.area > 100 * 100
        x0, y0, x1, y1 = polygon.bounds
        assert 0 <= x0 < x1 <= 2048
        assert 0 <= y0 < y1 <= 1536
    json.dumps(found)


def test_a_normal_slide_has_no_tumour(tmp_path):
    truth = write_slide(tmp_path / "n.tif", size_px0=SMALL, seed=5, tumour=False, pen=False)
    assert truth.tumours == ()
    assert not truth.pen.any()
    assert geojson(truth.tumours) == {"type": "FeatureCollection", "features": []}


def test_the_same_seed_makes_the_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_slide(tmp_path / f"{name}.tif", size_px0=SMALL, seed=seed)
    a, b, c = ((tmp_path / f"{name}.tif").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_too_small_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="too small"):
        write_slide(tmp_path / "x.tif", size_px0=(300, 900))
    with pytest.raises(ConfigError, match="9 would do"):
        write_cohort(tmp_path, slides=8)
    with pytest.raises(ConfigError, match="4,096"):
        write_marked_slide(tmp_path / "x.tif", size_px0=(5000, 10))


@pytest.mark.parametrize("slides", [9, 10, 12, 14, 16, 24, 40])
def test_cohorts_have_both_classes_in_every_split(slides):
    rows = cohort_rows(slides)
    assert len(rows) == slides
    patients = {}
    for row in rows:
        patients.setdefault(row["patient_id"], []).append(row)
    for group in patients.values():
        assert len(group) in (1, 2)
        assert len({(row["split"], row["label"]) for row in group}) == 1
    assert any(len(group) == 2 for group in patients.values())
    for split in ("train", "val", "test"):
        assert {row["label"] for row in rows if row["split"] == split} == {"tumor", "normal"}
    test = {row["patient_id"] for row in rows if row["split"] == "test"}
    assert len(test) >= (5 if slides >= 14 else 3)
    assert sum(row["split"] == "train" for row in rows) >= 4


def test_a_cohort_is_whole_and_repeatable(tmp_path):
    paths = [
        write_cohort(tmp_path / name, slides=9, seed=2, size_px0=(640, 512), workers=n)
        for name, n in (("a", 1), ("b", 2))
    ]
    items = read_cohort(paths[0])
    assert len(items) == 9
    for item in items:
        features = json.loads(Path(item.annotation).read_text())["features"]
        assert bool(features) == (item.label == "tumor")
        with open_slide(item.uri) as reader:
            assert (reader.size_px0, reader.mpp0) == ((640, 512), 0.5)
    with paths[0].open() as file:
        assert "mpp" not in next(csv.reader(file))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 19
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len({(tmp_path / "a" / name).read_bytes() for name in files if name.suffix == ".tif"}) == 9


def test_marks(tmp_path):
    levels = write_marked_slide(tmp_path / "m.tif", size_px0=(301, 203), levels=3, tile=64)
    assert [level.shape[1::-1] for level in levels] == [(301, 203), (150, 101), (75, 50)]
    for step, level in zip((1, 2, 4), levels, strict=True):
        x, y = np.meshgrid(np.arange(level.shape[1]) * step, np.arange(level.shape[0]) * step)
        np.testing.assert_array_equal(read_marks(level), np.stack([x, y], axis=2))
    with open_slide(str(tmp_path / "m.tif")) as reader:
        for index, level in enumerate(levels):
            np.testing.assert_array_equal(reader.read(index, (0, 0), reader.levels[index].size), level)


@pytest.mark.parametrize("seed", [0, 1])
def test_tumour_is_no_matter_of_colour(tmp_path, seed):
    """The slides of the demo are drawn from these seeds too; tests/accept judges them at their full size."""
    first = seed * 10_000
    parts = [phantom_tiles(tmp_path, range(first + a, first + b), (2048, 1536), 64) for a, b in ((0, 14), (14, 24))]
    assert all(0.1 < truth.mean() < 0.5 for _, truth in parts)
    found = aucs(*parts)
    assert max(found.values()) <= 0.75, found


def test_the_judge_of_colour_sees_colour():
    rng = np.random.default_rng(0)
    truth = rng.random(400) < 0.3
    tiles = rng.integers(100, 150, (400, 8, 8, 3)) + 4 * truth[:, None, None, None]
    found = features(tiles.astype(np.uint8))
    assert found[:, 6:].sum(axis=1) == pytest.approx(3)
    assert min(aucs((found[:200], truth[:200]), (found[200:], truth[200:])).values()) > 0.9

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import shapely
from scored import GRID, Scored, box, cells_of, write_features, write_store

from slideflow_ray.annotations import (
    Region,
    class_of,
    label_slide,
    labels_by_centre,
    read_geojson,
    rings_px0,
    slide_labels,
)
from slideflow_ray.cohort import Item
from slideflow_ray.errors import AnnotationError
from slideflow_ray.specs import LabelSpec

CLASSES = ("normal", "tumor")
RING = [[10, 20], [110, 20], [110, 60], [10, 60], [10, 20]]
HOLE = [[30, 30], [50, 30], [50, 50], [30, 50], [30, 30]]


def read(tmp_path, value):
    path = tmp_path / "a.geojson"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return read_geojson(str(path))


def feature(geometry, **properties):
    return {"type": "Feature", "geometry": geometry, "properties": properties}


POLYGON = {"type": "Polygon", "coordinates": [RING, HOLE]}


@pytest.mark.parametrize(
    "value",
    [
        {"type": "FeatureCollection", "features": [feature(POLYGON, classification={"name": "Tumor"})]},
        [feature(POLYGON, classification={"name": "Tumor", "color": [1, 2, 3]})],
        feature(POLYGON, classification={"name": " Tumor "}),
        feature({"type": "MultiPolygon", "coordinates": [[RING, HOLE]]}, name="Tumor"),
        feature(POLYGON, classification="Tumor"),
        feature(POLYGON, group="Tumor"),
        feature({"type": "GeometryCollection", "geometries": [POLYGON]}, classification={"names": ["Tumor"]}),
    ],
)
def test_every_common_shape_of_file_is_read(tmp_path, value):
    (region,) = read(tmp_path, value)
    assert region.name == "Tumor"
    assert region.geometry.area == 100 * 40 - 20 * 20


def test_names_may_be_missing_and_points_are_passed_over(tmp_path):
    regions = read(
        tmp_path,
        [feature(POLYGON), {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}, feature(None)],
    )
    assert [region.name for region in regions] == [""]
    assert [r.name for r in read(tmp_path, POLYGON)] == [""]


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = tmp_path / "bom.geojson"
    path.write_text(json.dumps([feature(POLYGON, name="é")]), encoding="utf-8-sig")
    assert read_geojson(str(path))[0].name == "é"


def test_a_ring_that_crosses_itself_is_mended(tmp_path):
    bow = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
    (region,) = read(tmp_path, feature({"type": "Polygon", "coordinates": [bow]}, name="Tumor"))
    assert region.geometry.is_valid
    assert region.geometry.area == 50


def with_ring(ring):
    return [feature(POLYGON), feature({"type": "Polygon", "coordinates": [ring]})]


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ({"positive": []}, "its type is None"),
        ("3", "is not GeoJSON"),
        ([3], "feature 0: is no JSON object"),
        (with_ring(RING[:-1]), r"feature 1: a ring of 4 points that is not closed"),
        (with_ring([*RING[:2], RING[0]]), "not closed"),
        (with_ring([[0, 0], [1e9, 0], [1, 1], [0, 0]]), "1e[+]09 px0 lies outside any slide"),
        ('[{"type": "Polygon", "coordinates": [[[0, 0], [NaN, 0], [1, 1], [0, 0]]]}]', "not a number"),
        (f'[{{"type": "Polygon", "coordinates": [[[0, 0], [1{"0" * 400}, 0], [1, 1], [0, 0]]]}}]', "no list of"),
        (with_ring([[0, 0], ["a", 1], [1, 1], [0, 0]]), "no list of"),
        (with_ring([[0], [1], [2], [0]]), "no list of"),
        (with_ring(None), "no list of"),
        (with_ring([[0, 0], [5, 5], [9, 9], [0, 0]]), "no area"),
        ([feature({"type": "Polygon", "coordinates": []})], "without rings"),
        ([feature({"type": "Polygon"})], "its geometry is 'Polygon'"),
        ([feature({"type": "Circle", "coordinates": []})], "'Circle'"),
        ([feature([1])], "no JSON object"),
        ([feature({"type": "GeometryCollection", "geometries": [{"type": "GeometryCollection"}]})], "plain geometries"),
    ],
)
def test_what_cannot_be_used_is_refused_with_file_and_cause(tmp_path, value, cause):
    with pytest.raises(AnnotationError, match=cause) as error:
        read(tmp_path, value)
    assert "a.geojson" in str(error.value)


def test_a_missing_file_and_a_folder_are_annotation_errors(tmp_path):
    for path in (tmp_path / "none.geojson", tmp_path):
        with pytest.raises(AnnotationError, match="cannot be read"):
            read_geojson(str(path))


@pytest.mark.data
def test_real_files(data):
    found = {region.name for region in read_geojson(str(data / "annotations" / "dsa_1006844.geojson"))}
    assert found == {"TILs", "Tumor", "Other"}
    assert len(read_geojson(str(data / "annotations" / "qupath_cell_detections.geojson"))) == 2
    with pytest.raises(AnnotationError, match="not GeoJSON"):
        read_geojson(str(data / "annotations" / "camelyon16_Tumor_081.json"))


# labels


def tiles(n_rows=5, n_cols=8, step=20, side=30):
    """Tiles whose width is not their height, so a swapped axis shows."""
    xy = np.array([(c * step, r * step) for r in range(n_rows) for c in range(n_cols)], np.int64)
    return xy, np.broadcast_to(np.array([side, side // 3], np.int32), xy.shape)


def regions(*named):
    return tuple(Region(name, shapely.Polygon(ring, [hole] if hole else [])) for name, ring, hole in named)


def test_a_tile_is_of_the_class_whose_region_holds_its_centre():
    xy, wh = tiles()
    labels = labels_by_centre(regions(("TUMOR", RING, HOLE)), xy, wh, CLASSES)
    shape = shapely.Polygon(RING, [HOLE])
    expected = [shape.contains(shapely.Point(x + w / 2, y + h / 2)) for (x, y), (w, h) in zip(xy, wh, strict=True)]
    assert labels.dtype == np.int8
    assert labels[:, 1].tolist() == [int(e) for e in expected]
    assert (labels.sum(axis=1) == 1).all()
    assert 0 < sum(expected) < len(expected)


def test_random_regions_agree_with_shapely_point_by_point():
    rng = np.random.default_rng(0)
    names = ("a", "b", "c")
    shapes = [(names[i % 3], shapely.Point(rng.uniform(0, 900, 2)).buffer(rng.uniform(20, 200))) for i in range(12)]
    found = tuple(Region(n, s) for n, s in shapes)
    xy = rng.integers(0, 1000, (300, 2))
    wh = rng.integers(1, 60, (300, 2))
    centres = xy + wh / 2
    inside = np.array(
        [[any(s.contains(shapely.Point(p)) for n, s in shapes if n == k) for k in names] for p in centres]
    )
    last = [max((k for k in range(3) if row[k]), default=0) for row in inside]
    assert np.array_equal(labels_by_centre(found, xy, wh, names).argmax(axis=1), last)
    assert np.array_equal(labels_by_centre(found, xy, wh, names, exclusive=False), inside)
    unknown = labels_by_centre(found, xy, wh, names, background=None)
    assert np.array_equal((unknown == -1).all(axis=1), ~inside.any(axis=1))


def test_background_may_be_any_class_or_unknown():
    xy, wh = tiles()
    nowhere = regions(("tumor", [[900, 900], [910, 900], [910, 910], [900, 900]], None))
    assert labels_by_centre(nowhere, xy, wh, CLASSES).argmax(axis=1).max() == 0
    assert labels_by_centre(nowhere, xy, wh, CLASSES, background="tumor").argmax(axis=1).min() == 1
    assert (labels_by_centre(nowhere, xy, wh, CLASSES, background=None) == -1).all()
    assert (labels_by_centre((), xy, wh, CLASSES, exclusive=False) == 0).all()


def test_normal_inside_tumour_needs_a_hole_because_the_later_class_wins():
    xy, wh = tiles()
    both = regions(("normal", HOLE, None), ("tumor", RING, None))
    assert np.array_equal(labels_by_centre(both, xy, wh, CLASSES), labels_by_centre(both[1:], xy, wh, CLASSES))


def test_names_are_mapped_and_unknown_ones_named():
    xy, wh = tiles()
    found = regions(("Metastasis", RING, None))
    with pytest.raises(AnnotationError, match=r"x.geojson: .*'Metastasis'.*normal, tumor") as error:
        labels_by_centre(found, xy, wh, CLASSES, where="x.geojson")
    assert '[labels] names = {"Metastasis" = ' in str(error.value)
    labels = labels_by_centre(found, xy, wh, CLASSES, {"metastasis": "tumor"})
    assert labels[:, 1].any()
    with pytest.raises(AnnotationError, match="without a class name"):
        labels_by_centre(regions(("", RING, None)), xy, wh, CLASSES)
    assert class_of("nothing", CLASSES) is None


def test_no_tiles_make_no_labels():
    none = np.empty((0, 2), np.int64)
    assert labels_by_centre(regions(("tumor", RING, None)), none, none, CLASSES).shape == (0, 2)


def test_many_tiles_and_polygons_take_less_than_two_seconds():
    rng = np.random.default_rng(1)
    found = tuple(
        Region(CLASSES[i % 2], shapely.Point(rng.uniform(0, 1e5, 2)).buffer(rng.uniform(200, 5000), quad_segs=100))
        for i in range(1000)
    )
    xy = rng.integers(0, 100_000, (100_000, 2))
    started = time.perf_counter()
    labels = labels_by_centre(found, xy, np.full_like(xy, 224), CLASSES)
    assert time.perf_counter() - started < 2
    assert labels[:, 1].any()


def test_outlines_are_closed_rings_with_their_holes():
    rings = list(rings_px0(regions(("tumor", RING, HOLE))))
    assert [name for name, _ in rings] == ["tumor", "tumor"]
    assert [ring.tolist() for _, ring in rings] == [RING, HOLE]


# in the store


@pytest.fixture
def slide(tmp_path):
    annotation = write_features(tmp_path / "s.geojson", [box("Tumor", -5, -5, 200, 300)])
    item = Item(slide_id="s", uri="s.svs", label="tumor", annotation=annotation)
    store = write_store(tmp_path / "out", Scored(item, cells_of(9, 13), np.zeros((117, 2)), (9, 13)))
    return store, item


def test_labels_are_kept_under_what_determines_them(slide, tmp_path):
    store, item = slide
    node = label_slide(store, GRID, item, CLASSES, LabelSpec())
    assert node.startswith(f"labels/{GRID}/centre-")
    assert store.committed(node)
    assert store.read(node)[:, 1].sum() == 4 * 7
    assert label_slide(store, GRID, item, CLASSES, LabelSpec()) == node
    write_features(tmp_path / "s.geojson", [box("Tumor", -5, -5, 100, 300)])
    other = label_slide(store, GRID, item, CLASSES, LabelSpec())
    assert other != node
    assert store.read(other)[:, 1].sum() == 2 * 7


def test_without_an_annotation_only_the_first_class_is_known(slide):
    store, item = slide
    bare = item.model_copy(update={"annotation": None})
    assert label_slide(store, GRID, bare, CLASSES, LabelSpec()) is None
    assert (slide_labels(store, GRID, bare, CLASSES, LabelSpec()) == -1).all()
    clean = bare.model_copy(update={"label": "Normal"})
    assert slide_labels(store, GRID, clean, CLASSES, LabelSpec()).tolist() == [[1, 0]] * 117
    assert label_slide(store, GRID, clean, CLASSES, LabelSpec(), "multilabel") is None


def test_a_lost_annotation_is_an_annotation_error(slide, tmp_path):
    store, item = slide
    (tmp_path / "s.geojson").unlink()
    with pytest.raises(AnnotationError, match="cannot be read"):
        label_slide(store, GRID, item, CLASSES, LabelSpec())

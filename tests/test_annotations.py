from __future__ import annotations

import json

import numpy as np
import pytest
import shapely
from scored import GRID, MPP0, Scored, box, cells_of, write_features, write_store

from slideflow_ray.annotations import (
    Region,
    class_of,
    label_slide,
    labels_by_centre,
    labels_by_fraction,
    missed_px0,
    read_annotation,
    read_geojson,
    rings_px0,
    shares,
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
    # one map serves a segmentation, to which every kind is a glomerulus, and the classifier of its objects
    names = {"FSG": "glomerulus", "normal": "tumor"}
    assert class_of("FSG", ("background", "glomerulus"), names) == "glomerulus"
    assert class_of("fsg", ("Normal", "FSG"), names) == "FSG"
    assert class_of("normal", ("normal", "tumor"), names) == "tumor"


def test_no_tiles_make_no_labels():
    none = np.empty((0, 2), np.int64)
    assert labels_by_centre(regions(("tumor", RING, None)), none, none, CLASSES).shape == (0, 2)


def test_many_tiles_and_polygons():
    rng = np.random.default_rng(1)
    found = tuple(
        Region(CLASSES[i % 2], shapely.Point(rng.uniform(0, 1e5, 2)).buffer(rng.uniform(200, 5000), quad_segs=100))
        for i in range(1000)
    )
    xy = rng.integers(0, 100_000, (100_000, 2))
    labels = labels_by_centre(found, xy, np.full_like(xy, 224), CLASSES)
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


# ASAP


def asap(tmp_path, *annotations, name="a.xml"):
    """annotations: (group, type, points)."""
    rows = []
    for group, kind, points in annotations:
        corners = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(points))
        about = f'Name="A" Type="{kind}" PartOfGroup="{group}"'
        rows.append(f"<Annotation {about}><Coordinates>{corners}</Coordinates></Annotation>")
    text = f'<?xml version="1.0"?>\n<ASAP_Annotations><Annotations>{"".join(rows)}</Annotations>'
    text += (
        '<AnnotationGroups><Group Name="_0" PartOfGroup="None" Color="#64FE2E"/></AnnotationGroups></ASAP_Annotations>'
    )
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("groups", [("_0", "_2"), ("_1", "_2"), ("metastases", "normal"), ("Tumor", "Exclusion")])
def test_asap_groups_are_tumour_and_what_is_normal_is_cut_out(tmp_path, groups):
    uri = asap(tmp_path, (groups[1], "Spline", HOLE[:-1]), (groups[0], "Polygon", RING[:-1]))
    normal, tumour = read_annotation(uri)
    assert (normal.name, tumour.name, normal.cut, tumour.cut) == ("normal", "tumor", True, False)
    assert tumour.geometry.equals(shapely.Polygon(RING, [HOLE]))
    assert normal.geometry.area == 400
    xy, wh = tiles()
    expected = labels_by_centre(regions(("tumor", RING, HOLE)), xy, wh, CLASSES)
    assert np.array_equal(labels_by_centre((normal, tumour), xy, wh, CLASSES), expected)
    only = labels_by_centre((normal, tumour), xy, wh, ("tumor",), exclusive=False)  # no class for what is normal
    assert np.array_equal(only[:, 0], expected[:, 1])


def test_content_and_not_the_name_says_what_a_file_is(tmp_path):
    uri = asap(tmp_path, ("_0", "Polygon", RING), name="slide.geojson")
    assert read_annotation(uri)[0].geometry.area == 4000
    path = tmp_path / "slide.xml"
    path.write_text("\n " + json.dumps([feature(POLYGON, name="Tumor")]))
    assert read_annotation(str(path))[0].name == "Tumor"
    text = (tmp_path / "slide.geojson").read_text().replace('"1.0"', '"1.0" encoding="UTF-16"')
    path.write_bytes(text.encode("utf-16"))
    assert read_annotation(str(path))[0].name == "tumor"
    path.write_text(text.replace(' encoding="UTF-16"', ""), encoding="utf-8-sig")
    assert read_annotation(str(path))[0].name == "tumor"


def test_asap_of_other_groups_points_and_rectangles(tmp_path):
    found = read_annotation(
        asap(
            tmp_path,
            ("None", "Polygon", RING[:-1]),
            ("Necrosis", "Rectangle", HOLE[:-1]),
            ("_0", "Dot", [(3, 4)]),
            ("_0", "Polygon", [(3, 4), (5, 6)]),
            ("_0", "Polygon", [(3, 4), (5, 6), (7, 8)]),
            ("_2", "Polygon", HOLE[:-1]),
        )
    )
    assert [region.name for region in found] == ["", "normal"]  # the necrosis is all normal
    assert found[0].geometry.area == 4000 - 400


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("<ASAP_Annotations>", "not XML that may be read"),
        ("<Annotations/>", "XML of 'Annotations'; ASAP_Annotations"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><ASAP_Annotations>&b;</ASAP_Annotations>', "not XML that may be read"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><ASAP_Annotations/>', "not XML that may be read"),
        ('<?xml version="1.0" encoding="nonsense"?><ASAP_Annotations/>', "not XML that may be read"),
    ],
)
def test_xml_that_is_not_asaps_or_is_dangerous_is_refused(tmp_path, text, cause):
    path = tmp_path / "bad.xml"
    path.write_text(text)
    with pytest.raises(AnnotationError, match=cause):
        read_annotation(str(path))


def test_bad_coordinates_of_asap_name_the_annotation(tmp_path):
    uri = asap(tmp_path, ("_0", "Polygon", RING), ("_0", "Polygon", [("a", 1), (2, 3), (4, 9)]))
    with pytest.raises(AnnotationError, match="annotation 1: a ring that is no list"):
        read_annotation(uri)
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_annotation(str(tmp_path / "none.xml"))


# fraction


def test_shares_are_those_of_shapely_box_by_box():
    rng = np.random.default_rng(2)
    shape = shapely.union_all([shapely.Point(rng.uniform(0, 900, 2)).buffer(rng.uniform(20, 200)) for _ in range(9)])
    shape = shape.difference(shapely.Point(450, 450).buffer(150))
    xy, wh = rng.integers(0, 1000, (400, 2)), rng.integers(1, 120, (400, 2))
    expected = [
        shape.intersection(shapely.box(x, y, x + w, y + h)).area / (w * h)
        for (x, y), (w, h) in zip(xy.tolist(), wh.tolist(), strict=True)
    ]
    found = shares(shape, xy, wh)
    assert found == pytest.approx(np.array(expected), abs=1e-12)
    assert {0, 1} <= set(np.round(found, 12))
    assert shares(shapely.Polygon(), xy, wh).max() == 0


def test_a_tile_is_of_the_class_that_covers_the_fraction_and_else_of_none():
    """Tumour at x < 100; tiles of 20 px0 have 1, 1, 3/4, 0.7, 1/2, 1/4, 0.2 and nothing of it."""
    tumour = regions(("tumor", [[0, 0], [100, 0], [100, 50], [0, 50], [0, 0]], None))
    xy = np.array([(x, 10) for x in (70, 80, 85, 86, 90, 95, 96, 100)])
    wh = np.full(xy.shape, 20)
    labels = labels_by_fraction(tumour, xy, wh, CLASSES, fraction=0.75)
    assert labels[:, 1].tolist() == [1, 1, 1, -1, -1, 0, 0, 0]
    assert labels[:, 0].tolist() == [0, 0, 0, -1, -1, 1, 1, 1]
    assert labels_by_fraction(tumour, xy, wh, CLASSES, fraction=0.2)[:, 1].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    assert labels_by_fraction(tumour, xy, wh, CLASSES, fraction=1)[:, 1].tolist() == [1, 1, -1, -1, -1, -1, -1, 0]
    many = labels_by_fraction(tumour, xy, wh, CLASSES, fraction=0.75, exclusive=False)
    assert many[:, 1].tolist() == [1, 1, 1, -1, -1, 0, 0, 0]
    assert (many[:, 0] == 0).all()


def test_holes_are_normal_and_of_overlapping_regions_the_later_class_counts():
    tumour = regions(("tumor", RING, HOLE))
    xy, wh = np.array([(30, 30), (60, 25), (25, 30)]), np.array([(20, 20), (10, 10), (20, 20)])
    assert labels_by_fraction(tumour, xy, wh, CLASSES)[:, 1].tolist() == [0, 1, 0]  # 0, 1, 1/4
    both = regions(("normal", RING, None), ("tumor", RING, HOLE))
    assert np.array_equal(labels_by_fraction(both, xy, wh, CLASSES), labels_by_fraction(tumour, xy, wh, CLASSES))
    three = regions(("b", RING, None), ("c", HOLE, None))
    assert labels_by_fraction(three, xy, wh, ("a", "b", "c")).argmax(axis=1).tolist() == [2, 1, 2]  # the last: 3/4


def test_rule_and_fraction_are_in_the_digest(slide):
    store, item = slide
    nodes = {
        rule: label_slide(store, GRID, item, CLASSES, LabelSpec(rule=rule[0], fraction=rule[1]))
        for rule in (("centre", 0.75), ("centre", 0.5), ("fraction", 0.75), ("fraction", 0.5))
    }
    assert len(set(nodes.values())) == 3  # the centre has no fraction
    assert nodes["centre", 0.75] == nodes["centre", 0.5]
    assert nodes["fraction", 0.5].startswith(f"labels/{GRID}/fraction-")
    assert store.node_attrs(nodes["fraction", 0.5])["determines"]["spec"]["fraction"] == 0.5
    # tiles of 80 px0 begin every 40: of x < 200, y < 300 three quarters and more lie inside
    assert store.read(nodes["fraction", 0.75])[:, 1].tolist().count(1) == sum(
        (min(80, 200 - 40 * c) / 80) * (min(80, 300 - 40 * r) / 80) >= 0.75 for r in range(8) for c in range(5)
    )


# what the mask misses


def test_missed_area_is_that_of_shapely_pixel_by_pixel():
    rng = np.random.default_rng(3)
    mask = rng.uniform(size=(20, 30)) < 0.6
    for _ in range(5):
        shape = (
            shapely.Point(rng.uniform(-20, 320, 2)).buffer(rng.uniform(5, 150)).difference(shapely.box(50, 50, 80, 90))
        )
        tissue = shapely.union_all([shapely.box(c * 10, r * 7, c * 10 + 10, r * 7 + 7) for r, c in np.argwhere(mask)])
        assert missed_px0(shape, mask, (10.0, 7.0)) == pytest.approx(shape.difference(tissue).area, abs=1e-6)
    inside = shapely.box(100, 70, 137, 91)
    assert missed_px0(inside, np.ones((20, 30), bool), (10.0, 7.0)) == 0
    assert missed_px0(inside, np.zeros((20, 30), bool), (10.0, 7.0)) == inside.area
    assert missed_px0(shapely.box(-50, -50, -10, -10), mask, (10.0, 7.0)) == 1600


def test_labels_say_the_annotated_and_the_missed_area(tmp_path):
    annotation = write_features(tmp_path / "s.geojson", [box("Tumor", 0, 0, 100, 100)])
    item = Item(slide_id="s", uri="s.svs", label="tumor", annotation=annotation)
    mask = np.ones((4, 6), bool)
    mask[0] = False
    store = write_store(tmp_path / "out", Scored(item, cells_of(9, 13), np.zeros((117, 2)), (9, 13)), tissue=mask)
    node = label_slide(store, GRID, item, CLASSES, LabelSpec())
    um2 = MPP0**2
    assert store.node_attrs(node)["annotated_um2"] == {"tumor": [10_000 * um2, 100 * 50 * um2]}

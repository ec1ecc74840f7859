from __future__ import annotations

import json
import math

import numpy as np
import pytest
import shapely
from scipy import ndimage
from scored import MPP0, SIDE_PX0, STEP_PX0, Scored, box, cells_of, write_features, write_scored_run
from sklearn import metrics as sk

from slideflow_ray import cli
from slideflow_ray.annotations import even_odd
from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError
from slideflow_ray.lesions import (
    FEATURES,
    OFFICIAL,
    LesionRules,
    camelyon16,
    detect,
    find_lesions,
    forest_scores,
    heatmap_features,
    heatmap_score,
    tumour_mask,
)
from slideflow_ray.metrics import FROC_FALSE_POSITIVES, froc, resample_weights
from slideflow_ray.tables import read_table

# the rules once more, literally: every pixel and every threshold by itself


def literal_labels(tumour, resolution=0.243, level=5):
    """Every pixel's distance to every tumour pixel; holes and pieces by walking."""
    reach = 75 / (resolution * 2**level * 2)
    points, pixels = np.argwhere(tumour), np.argwhere(tumour | True)
    nearest = np.array([np.sqrt(((points - pixel) ** 2).sum(axis=1)).min() for pixel in pixels])
    grown = (nearest < reach).reshape(tumour.shape)
    outside = walk(~np.pad(grown, 1), (0, 0), corners=False)[1:-1, 1:-1]
    left, labels, count = ~outside, np.zeros(tumour.shape, int), 0
    for r, c in np.ndindex(tumour.shape):
        if left[r, c]:
            count += 1
            piece = walk(left, (r, c), corners=True)
            labels[piece], left = count, left & ~piece
    return labels


def walk(free, start, corners):
    seen, todo = np.zeros(free.shape, bool), [start]
    steps = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a or b) and (corners or not (a and b))]
    while todo:
        r, c = todo.pop()
        if 0 <= r < free.shape[0] and 0 <= c < free.shape[1] and free[r, c] and not seen[r, c]:
            seen[r, c] = True
            todo += [(r + a, c + b) for a, b in steps]
    return seen


def literal_major(labels, label):
    """Of the ellipse with the same second moments: 4 times the larger standard deviation."""
    rows, cols = np.nonzero(labels == label)
    n, r, c = len(rows), sum(rows) / len(rows), sum(cols) / len(cols)
    rr, cc = sum((rows - r) ** 2) / n, sum((cols - c) ** 2) / n
    rc = sum((rows - r) * (cols - c)) / n
    return 4 * math.sqrt((rr + cc) / 2 + math.sqrt(((rr - cc) / 2) ** 2 + rc**2))


def literal_froc(slides, resolution=0.243, level=5):
    """slides: (mask or None, [(p, x, y)]). Returns (false positives per slide, sensitivity, the score)."""
    false, true, lesions = [], [], 0
    for mask, found in slides:
        if mask is None:
            false += [p for p, _, _ in found]
            continue
        labels = literal_labels(mask, resolution, level)
        itc = [i for i in range(1, labels.max() + 1) if literal_major(labels, i) < 275 / (resolution * 2**level)]
        best = [0.0] * labels.max()
        for p, x, y in found:
            hit = labels[int(y / 2**level), int(x / 2**level)]
            if hit == 0:
                false.append(p)
            elif hit not in itc:
                best[hit - 1] = max(best[hit - 1], p)
        true += best
        lesions += labels.max() - len(itc)
    xs, ys = [], []
    for threshold in sorted(set(false) | set(true))[1:]:
        xs.append(sum(p >= threshold for p in false) / len(slides))
        ys.append(sum(p >= threshold for p in true) / lesions)
    xs, ys = [*xs, 0.0], [*ys, 0.0]
    at = np.interp([0.25, 0.5, 1, 2, 4, 8], xs[::-1], ys[::-1])
    return np.array(xs), np.array(ys), sum(at) / 6


def blobs(rng, shape=(60, 80), n=5):
    """Discs of many sizes, one with a hole, some touching the edge."""
    rows, cols = np.ogrid[: shape[0], : shape[1]]
    mask = np.zeros(shape, bool)
    for _ in range(n):
        r, c, radius = rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), rng.choice([1, 2, 5, 9])
        mask |= (rows - r) ** 2 + (cols - c) ** 2 <= radius**2
    mask[20:34, 40:60] = True
    mask[26:28, 48:50] = False
    return mask


@pytest.mark.parametrize("seed", range(3))
def test_froc_is_that_of_the_rules_taken_literally(seed):
    rng = np.random.default_rng(seed)
    slides, missed, found, count = [], [], [], 0
    for i in range(5):
        mask = blobs(rng) if i % 2 == 0 else None
        n = int(rng.integers(4, 25))
        points = rng.uniform(0, 1, (n, 2)) * (80 * 32 - 1, 60 * 32 - 1)
        if mask is not None:
            inside = np.argwhere(mask)[:, ::-1]
            points[::2] = 32 * (rng.choice(inside, len(points[::2])) + 0.5)
        p = np.round(rng.uniform(0.5, 1, n), 1)  # ties
        slides.append((mask, list(zip(p, points[:, 0], points[:, 1], strict=True))))
        if mask is None:
            missed += list(p)
            continue
        lesions = find_lesions(mask)
        hits = lesions.hit(points)
        missed += list(p[hits == 0])
        found += [0 if itc else p[hits == k].max(initial=0) for k, itc in enumerate(lesions.itc, start=1)]
        count += lesions.itc.count(False)
    curve = froc(np.array(missed), np.array(found), len(slides), count)
    xs, ys, score = literal_froc(slides)
    assert curve.false_positives == pytest.approx(xs)
    assert curve.sensitivity == pytest.approx(ys)
    assert curve.score == pytest.approx(score)
    assert 0 < score < 1


@pytest.mark.parametrize("seed", range(3))
def test_the_mask_is_that_of_the_rules_taken_literally(seed):
    mask = blobs(np.random.default_rng(10 + seed))
    lesions, labels = find_lesions(mask), literal_labels(mask)
    assert np.array_equal(lesions.labels, labels)
    assert lesions.major_px == pytest.approx([literal_major(labels, i + 1) for i in range(labels.max())])
    assert lesions.itc == tuple(major < 35.36 for major in lesions.major_px)
    assert sum(lesions.area_px) == (labels > 0).sum()


def test_the_lengths_are_those_of_the_challenge():
    assert pytest.approx(4.82, abs=0.005) == OFFICIAL.grow_px
    assert pytest.approx(35.36, abs=0.01) == OFFICIAL.itc_px
    assert OFFICIAL.px0 == 32
    one = np.zeros((21, 21), bool)
    one[10, 10] = True
    rows, cols = np.ogrid[:21, :21]
    assert np.array_equal(find_lesions(one).labels > 0, (rows - 10) ** 2 + (cols - 10) ** 2 < 4.82**2)


def test_a_lesion_of_known_length_is_isolated_cells_or_not():
    for length, isolated in ((22, True), (40, False)):  # uniform on a line of n + 8: 4 sd = 1.155 (n + 8) and less
        mask = np.zeros((30, 80), bool)
        mask[14:16, 20 : 20 + length] = True
        lesions = find_lesions(mask)
        assert lesions.itc == (isolated,)
        assert lesions.hit(np.array([[(20 + length / 2) * 32, 15 * 32.0]])).tolist() == [1]


def test_a_ring_is_filled_and_two_near_ones_are_one():
    mask = np.zeros((60, 80), bool)
    mask[10:50, 10:50] = True
    mask[18:42, 18:42] = False
    mask[10:50, 58:70] = True  # 8 pixels away: 2 * 4.82 bridges it
    lesions = find_lesions(mask)
    assert len(lesions.itc) == 1
    points = np.array([[30, 30], [5, 55], [1e6, 1e6], [-1, 5]]) * 32.0
    assert lesions.hit(points).tolist() == [1, 0, 0, 0]


def test_froc_with_a_known_answer():
    """Two lesions, hit at 0.9 and 0.6; false positives at 0.8 and 0.7 on 2 slides. The smallest, 0.6, is dropped."""
    curve = froc(np.array([0.8, 0.7]), np.array([0.9, 0.6]), 2, 2)
    assert curve.false_positives.tolist() == [1.0, 0.5, 0.0, 0.0]
    assert curve.sensitivity.tolist() == [0.5, 0.5, 0.5, 0.0]
    assert curve.sensitivities == (0.5,) * 6
    assert curve.score == 0.5
    missed = froc(np.array([0.8, 0.7]), np.array([0.9, 0.6, 0.0]), 2, 3)  # now 0, of the lesion missed, is dropped
    assert missed.sensitivities[2:] == pytest.approx((2 / 3,) * 4)
    assert len(missed.sensitivities) == len(FROC_FALSE_POSITIVES)


def test_froc_of_nothing_is_none_and_of_no_detection_is_zero():
    none = np.empty(0)
    assert froc(none, none, 0, 0) is None
    assert froc(np.array([0.9]), none, 3, 0) is None
    assert froc(none, np.zeros(4), 3, 4).score == 0


# detections


def literal_detect(heat, radius, above):
    heat, found = np.nan_to_num(heat.copy()), []
    while heat.size and heat.max() > above:
        r, c = next((r, c) for r, c in np.ndindex(heat.shape) if heat[r, c] == heat.max())
        found.append((r, c))
        for i in range(max(0, r - radius), min(heat.shape[0], r + radius)):
            for j in range(max(0, c - radius), min(heat.shape[1], c + radius)):
                heat[i, j] = 0
    return found


@pytest.mark.parametrize("radius", [1, 3, 12])
def test_detections_are_those_of_taking_the_maximum_again_and_again(radius):
    rng = np.random.default_rng(radius)
    heat = np.round(rng.uniform(0, 1, (31, 44)), 1).astype(np.float32)  # ties
    heat[rng.uniform(0, 1, heat.shape) < 0.3] = np.nan
    found = detect(heat, radius)
    assert [tuple(cell) for cell in found] == literal_detect(heat, radius, 0.5)
    assert len(found) > 3


def test_half_is_no_detection_and_nothing_makes_none():
    assert detect(np.full((3, 4), 0.5, np.float32), 1).shape == (0, 2)
    assert detect(np.full((3, 4), np.nan, np.float32), 1).shape == (0, 2)
    assert detect(np.empty((0, 0), np.float32), 1).shape == (0, 2)


# drawing


def test_a_mask_is_true_where_a_pixels_centre_lies_inside():
    rng = np.random.default_rng(3)
    discs = [shapely.Point(rng.uniform(0, 3000, 2)).buffer(rng.uniform(50, 500)) for _ in range(9)]
    shape = shapely.union_all(discs).difference(shapely.Point(1500, 1500).buffer(400))
    mask, (row, col) = tumour_mask(shape, (2900, 2400))
    rows, cols = np.indices(mask.shape)
    x, y = (cols + col + 0.5) * 32, (rows + row + 0.5) * 32
    assert np.array_equal(mask, shapely.contains_xy(shape, x, y))
    assert row + mask.shape[0] <= 75
    assert col + mask.shape[1] <= 91
    small = even_odd(shapely.box(3, 1, 8, 5), (0, 0), (6, 9), 1)
    assert small.sum() == 20
    assert small[1:5, 3:8].all()


def test_drawing_only_a_part_changes_no_lesion():
    rng = np.random.default_rng(4)
    discs = [shapely.Point(rng.uniform(800, 3000, 2)).buffer(rng.uniform(50, 500)) for _ in range(5)]
    shape = shapely.union_all(discs)
    size = (6000, 5000)
    part = find_lesions(*reversed_pair(tumour_mask(shape, size)))
    whole = find_lesions(even_odd(shape, (0, 0), (157, 188), 32))
    points = np.random.default_rng(0).uniform(0, 5000, (5000, 2))
    assert np.array_equal(part.hit(points), whole.hit(points))
    assert part.corner != (0, 0)
    assert part.major_px == pytest.approx(whole.major_px)


def reversed_pair(made):
    mask, corner = made
    return mask, OFFICIAL, corner


# features


def test_features_of_a_heatmap_drawn_by_hand():
    heat = np.full((8, 12), 0.1, np.float32)
    heat[0] = np.nan
    heat[2:4, 1:7] = 0.8  # 2 x 6
    heat[3, 6] = 0.95
    heat[6, 10] = 0.9
    found = dict(zip(FEATURES, heatmap_features(heat, 100.0), strict=True))
    n = 7 * 12
    assert found["max"] == pytest.approx(0.95)
    assert found["p999"] == pytest.approx(np.percentile(heat[1:].astype(np.float64), 99.9))
    assert found["mean"] == pytest.approx((11 * 0.8 + 0.95 + 0.9 + (n - 13) * 0.1) / n, rel=1e-6)
    assert found["area_05"] == 13 / n
    assert found["area_09"] == 2 / n
    assert found["components"] == 2
    assert found["largest_um2"] == 12 * 100**2
    across, along = (2**2 - 1) / 12, (6**2 - 1) / 12  # variances of 2 and of 6 cells in a row
    assert found["largest_major_um"] == pytest.approx(4 * math.sqrt(along) * 100)
    assert found["largest_mean"] == pytest.approx((11 * 0.8 + 0.95) / 12, rel=1e-6)
    assert found["largest_max"] == pytest.approx(0.95)
    assert found["largest_eccentricity"] == pytest.approx(math.sqrt(1 - across / along))
    assert found["largest_solidity"] == pytest.approx(1)


def test_solidity_and_axes_agree_with_shapely_and_moments():
    rng = np.random.default_rng(5)
    heat = ndimage.gaussian_filter(rng.normal(size=(40, 60)), 3)
    heat = np.where(heat > 0.02, 0.9, 0.1).astype(np.float32)
    labels, _ = ndimage.label(heat > 0.5, np.ones((3, 3)))
    largest = 1 + np.bincount(labels.ravel())[1:].argmax()
    cells = np.argwhere(labels == largest)
    hull = shapely.union_all([shapely.box(c, r, c + 1, r + 1) for r, c in cells]).convex_hull
    found = dict(zip(FEATURES, heatmap_features(heat, 2.0), strict=True))
    assert found["largest_solidity"] == pytest.approx(len(cells) / hull.area)
    assert 0.2 < found["largest_solidity"] < 0.95
    assert found["largest_major_um"] == pytest.approx(2 * literal_major(labels, largest))


def test_features_without_tiles_or_pieces_are_zero_and_one_cell_is_no_error():
    assert heatmap_features(np.full((3, 4), np.nan, np.float32), 1) == (0.0,) * 12
    assert heatmap_features(np.full((3, 4), 0.2, np.float32), 1)[5:] == (0.0,) * 7
    one = np.full((3, 4), 0.2, np.float32)
    one[1, 1] = 1
    assert heatmap_features(one, 3.0)[5:] == (1.0, 9.0, 0.0, 1.0, 1.0, 0.0, 1.0)
    assert heatmap_score(one) == pytest.approx(0.2)  # the median takes single cells away
    assert heatmap_score(np.full((5, 5), np.nan, np.float32)) == 0


def test_the_forest_learns_from_train_and_val_only():
    rng = np.random.default_rng(6)
    truth = np.arange(60) % 2
    features = rng.normal(truth[:, None], 0.7, (60, 12))
    fitted = np.arange(60) < 40
    scores = forest_scores(features, truth, fitted)
    assert np.isnan(scores[fitted]).all()
    assert sk.roc_auc_score(truth[40:], scores[40:]) > 0.9
    other = np.where(fitted, truth, 1 - truth)
    assert np.array_equal(forest_scores(features, other, fitted), scores, equal_nan=True)
    assert forest_scores(features, np.zeros(60, int), fitted) is None
    assert forest_scores(features, np.where(fitted, -1, truth), fitted) is None


# a run


def slide_of(folder, name, split, boxes, hot, **more):
    """9 x 13 cells of 40 px0; `boxes` are annotated as tumour, `hot` maps cells to probabilities, the rest is 0.1."""
    p = np.full((9, 13), 0.1)
    for cell, value in hot.items():
        p[cell] = value
    cells = cells_of(9, 13)
    z = np.log(p / (1 - p))[cells[:, 0], cells[:, 1]]
    annotation = write_features(folder / f"{name}.geojson", [box("Tumor", *b) for b in boxes]) if boxes else None
    label = "tumor" if boxes else "normal"
    values = {"patient_id": name, "split": split, "label": label, "annotation": annotation} | more
    return Scored(Item(slide_id=name, uri=f"{name}.svs", **values), cells, np.column_stack([-z, z]), (9, 13))


RULES = LesionRules(level=3, radius_px0=80, grow_um=10, itc_um=20)


@pytest.fixture
def run(tmp_path):
    """Lesions of 80 and 6 px0 (isolated); a hit, a miss, false positives at 0.9 and 0.7."""
    slides = [
        slide_of(tmp_path, "t1", "test", [(60, 60, 140, 140), (300, 60, 306, 66)], {(1, 1): 0.8, (7, 10): 0.9}),
        slide_of(tmp_path, "t2", "test", [(200, 200, 290, 260)], {}),
        slide_of(tmp_path, "n1", "test", [], {(4, 4): 0.7}),
        slide_of(tmp_path, "n2", "test", [], {}),
        slide_of(tmp_path, "test_114", "test", [(60, 60, 140, 140)], {(1, 1): 0.9}),
        slide_of(tmp_path, "weak", "test", [], {(4, 4): 0.99}, label="tumor"),
        slide_of(tmp_path, "v1", "val", [(60, 60, 140, 140)], {(1, 1): 0.8}),
        slide_of(tmp_path, "v2", "val", [], {}),
        slide_of(tmp_path, "a1", "train", [(60, 60, 140, 140)], {(1, 1): 0.9}),
        slide_of(tmp_path, "a2", "train", [], {}),
    ]
    glass = Item(slide_id="glass", uri="g", split="test", label="normal")
    slides.append(Scored(glass, np.empty((0, 2), int), np.empty((0, 2)), (9, 13)))
    return write_scored_run(tmp_path / "out", slides)


def test_a_run_with_a_known_answer(run):
    found = camelyon16(run, rules=RULES)
    (result,) = [r for r in found.results if r.split == "test"]
    # t1, t2, n1, n2, glass; the lesions are t1's and t2's, t1's second is isolated
    assert (result.slides, result.tumour_slides, result.lesions, result.isolated) == (5, 2, 2, 1)
    assert result.detections == 3
    # thresholds 0.7, 0.8, 0.9 (0 dropped) and one above: false positives 2, 1, 1, 0 of 5 slides, hits 1, 1, 0, 0 of 2
    rows = [r for r in read_table(run / "froc.parquet") if r["split"] == "test"]
    assert [r["false_positives"] for r in rows] == pytest.approx([0.4, 0.2, 0.2, 0])
    assert [r["sensitivity"] for r in rows] == [0.5, 0.5, 0, 0]
    assert list(result.sensitivities.values()) == [0.5] * 6
    assert result.froc_score == 0.5
    hits = {(r["slide_id"], r["hit"]): r for r in read_table(run / "detections.parquet")}
    assert hits["t1", "lesion"]["x_px0"] == 1 * STEP_PX0 + SIDE_PX0 / 2
    assert hits["t1", "lesion"]["lesion"] == 1
    assert hits["t1", "none"]["y_px0"] == 7 * STEP_PX0 + SIDE_PX0 / 2
    assert hits["weak", "unknown"]["lesion"] is None
    lesions = {(r["slide_id"], r["lesion"]): r for r in read_table(run / "lesions.parquet")}
    assert lesions["t1", 1]["probability"] == pytest.approx(0.8, rel=1e-6)
    assert lesions["t1", 2]["isolated"]
    assert lesions["t2", 1]["probability"] == 0


def test_slides_are_scored_and_what_is_left_out_is_said(run):
    found = camelyon16(run, rules=RULES)
    rows = {r["slide_id"]: r for r in read_table(run / "lesion_slides.parquet")}
    (result,) = [r for r in found.results if r.split == "test"]
    test = [r for r in rows.values() if r["split"] == "test"]
    truth = [r["truth"] for r in test]
    assert result.auc == pytest.approx(sk.roc_auc_score(truth, [r["score"] for r in test]))
    assert result.auc_forest == pytest.approx(sk.roc_auc_score(truth, [r["score_forest"] for r in test]))
    assert all((r["score_forest"] is None) == (r["split"] != "test") for r in rows.values())
    assert not rows["weak"]["in_froc"]
    assert not rows["test_114"]["in_froc"]
    assert rows["glass"]["max"] == 0
    text = "\n".join(found.notes)
    assert "1 slides in split 'test' have no annotation" in text
    assert "test_114 left out of the FROC" in text
    assert f"0.243 um per px0, and there are slides of {MPP0:g}" not in text  # 3 % off is near enough
    assert "FROC 0.500" in found.summary()


def test_the_interval_of_the_slide_auc_is_of_the_scores_themselves(tmp_path):
    """Forty slides whose probabilities lie above 0.996, where a bin of margins is 0.4 % wide."""
    rng = np.random.default_rng(0)
    slides, truth, top = [], [], []
    for i in range(40):
        p = rng.uniform(0.9990, 0.9999) if i % 2 and i != 5 else rng.uniform(0.9963, 0.9993)
        hot = {(r, c): p for r in range(4) for c in range(4)}
        slides.append(slide_of(tmp_path, f"s{i}", "test", [(60, 60, 140, 140)] if i % 2 else [], hot))
        truth.append(i % 2)
        top.append(p)
    (result,) = camelyon16(write_scored_run(tmp_path / "out", slides)).results
    scores = np.array(top)
    areas = []
    for weights in resample_weights(40):
        chosen = np.repeat(np.argsort([s.item.patient for s in slides]), weights)
        areas.append(sk.roc_auc_score(np.array(truth)[chosen], scores[chosen]))
    assert result.auc == pytest.approx(sk.roc_auc_score(truth, scores))
    assert result.auc_interval == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])))
    assert result.auc_interval[0] < result.auc < result.auc_interval[1]


def test_the_same_run_makes_the_same_bytes_and_json_says_the_rules(run):
    names = ("froc.json", "froc.parquet", "detections.parquet", "lesions.parquet", "lesion_slides.parquet")
    camelyon16(run)
    first = {name: (run / name).read_bytes() for name in names}
    camelyon16(run)
    assert {name: (run / name).read_bytes() for name in names} == first
    record = json.loads(first["froc.json"])
    assert record["rules"] == {
        "resolution_um": 0.243,
        "level": 5,
        "grow_um": 75,
        "itc_um": 275,
        "above": 0.5,
        "radius_px0": 768,
    }
    assert len(record["features"]) == 12
    assert not (run / "lease.json").exists()


def test_without_tumour_or_labels_there_are_notes_and_no_numbers(tmp_path):
    slides = [slide_of(tmp_path, f"n{i}", "test", [], {(4, 4): 0.7}) for i in range(3)]
    found = camelyon16(write_scored_run(tmp_path / "out", slides))
    (result,) = found.results
    assert (result.froc_score, result.auc, result.auc_forest) == (None, None, None)
    assert any("no lesion in split 'test'" in note for note in found.notes)
    assert any("no forest" in note for note in found.notes)
    several = [Scored(s.item, s.cells, np.zeros((len(s.cells), 3)), s.shape) for s in slides]
    more = camelyon16(write_scored_run(tmp_path / "more", several, ("normal", "b", "c")))
    assert more.results == ()
    assert "one class against the rest" in more.notes[0]
    with pytest.raises(ConfigError):
        camelyon16(tmp_path / "none")


def test_the_command_line_writes_it(run, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", str(run), "--camelyon16", "--json", "--slide-score", "top10", "--labels", "fraction=0.5"])
    assert end.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["camelyon16"] == json.loads((run / "froc.json").read_text())
    assert {point["score"] for point in said["points"]} == {"margin", "top10"}
    assert said["labels"] == "fraction=0.5"

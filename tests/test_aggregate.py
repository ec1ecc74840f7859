from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from scored import GRID, MPP0, NODE, SIDE_PX0, STEP_PX0, Scored, cells_of, write_store

from slideflow_ray import aggregate as ag
from slideflow_ray.cohort import Item
from slideflow_ray.errors import StoreError
from slideflow_ray.metrics import Confusion, Counts, histogram, together

CLASSES = ("a", "b", "c")


def some_slides(out, n=5, classes=2, seed=0):
    """Slides of different sizes with gaps in their tissue, margins and labels; returned with their parts."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        shape = (7 + i % 3, 11 - i % 5)
        cells = cells_of(*shape)[rng.random(shape[0] * shape[1]) < 0.8]
        margins = rng.normal(0, 2, (len(cells), classes)).astype(np.float32)
        slide = Scored(Item(slide_id=f"s{i}", uri="x"), cells, margins, shape)
        store = write_store(out, slide)
        labels = (np.arange(classes) == rng.integers(0, classes, len(cells))[:, None]).astype(np.int8)
        labels[rng.random(len(cells)) < 0.2] = -1
        store.write_array(f"labels/{GRID}/set", labels)
        made.append((ag.Part(str(out), f"s{i}", GRID, NODE, f"p{i // 2}", f"labels/{GRID}/set"), slide, labels))
    return made


# the tree


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 300])
def test_every_slide_is_counted_once(n):
    seen: list[int] = []
    lock = threading.Lock()

    def look(number: int) -> int:
        with lock:
            seen.append(number)
        return number

    assert ag.over_slides(look, list(range(n)), sum, partition=2) == n * (n - 1) // 2
    assert sorted(seen) == list(range(n))


def test_an_error_of_one_slide_is_raised(tmp_path):
    parts = [part for part, *_ in some_slides(tmp_path, 2)] + [ag.Part(str(tmp_path), "none", GRID, NODE)]
    with pytest.raises(StoreError, match="none"):
        ag.read_tiles(parts, (1,))


# heatmaps


def test_a_heatmap_has_one_pixel_per_cell_and_nothing_elsewhere(tmp_path):
    ((part, slide, _),) = some_slides(tmp_path, 1)
    assert ag.write_heatmaps(str(tmp_path), [("s0", GRID, NODE)]) == {}
    assert ag.write_heatmaps(str(tmp_path), [("s0", GRID, NODE)]) == {}
    values = ag.read_heatmap(part.store, GRID, NODE)
    assert values.shape == (2, *slide.shape)
    expected = np.full((2, *slide.shape), np.nan)
    for (row, col), margins in zip(slide.cells, slide.margins, strict=True):
        expected[:, row, col] = 1 / (1 + np.exp(-margins.astype(float)))
    assert np.allclose(values, expected, equal_nan=True, atol=1e-7)
    assert part.store.committed(f"heatmaps/{GRID}/{NODE}")
    assert part.store.verify(f"heatmaps/{GRID}/{NODE}") == []


def test_cells_lie_on_the_centres_of_their_tiles_at_every_level(tmp_path):
    ((part, slide, _),) = some_slides(tmp_path, 1)
    levels = ag.multiscales("m", STEP_PX0 * MPP0, (SIDE_PX0 - 1) / 2 * MPP0, 3)["multiscales"][0]["datasets"]
    ag.write_heatmap(part)
    written = part.store.node_attrs(f"heatmaps/{GRID}/{NODE}")["ome"]
    assert written["version"] == "0.5"
    assert written["multiscales"][0]["datasets"][0] == levels[0]
    xy = part.store.read(f"grids/{GRID}/xy_px0")
    for level, factor in ((0, 1), (2, 4)):
        scale, move = levels[level]["coordinateTransformations"]
        for (row, col), (x, y) in zip(slide.cells, xy, strict=True):
            if row % factor or col % factor:
                continue
            where = np.array(scale["scale"][1:]) * (row // factor, col // factor) + move["translation"][1:]
            # the middle of a tile; at level 2 of 4 x 4 tiles. Pixels are named by their middle, hence the half.
            middle = np.array([y, x]) + SIDE_PX0 / 2 + (factor - 1) / 2 * STEP_PX0 - 0.5
            assert np.allclose(where, middle * MPP0)


def test_a_heatmap_is_valid_ome_zarr(tmp_path):
    ((part, _slide, _),) = some_slides(tmp_path, 1)
    ag.write_heatmap(part)
    root = part.store.root / "heatmaps" / GRID / NODE
    group = json.loads((root / "zarr.json").read_text())
    assert group["zarr_format"] == 3
    (scales,) = group["attributes"]["ome"]["multiscales"]
    assert [axis["name"] for axis in scales["axes"]] == ["c", "y", "x"]
    for dataset in scales["datasets"]:
        array = json.loads((root / dataset["path"] / "zarr.json").read_text())
        assert array["dimension_names"] == ["c", "y", "x"]
        assert array["data_type"] == "float32"
        assert len(dataset["coordinateTransformations"][0]["scale"]) == 3


def test_levels_are_means_of_what_is_there():
    rng = np.random.default_rng(2)
    values = rng.random((1, 131, 70)).astype(np.float32)
    values[:, rng.random((131, 70)) < 0.6] = np.nan
    levels = ag.pyramid(values)
    assert [level.shape[1:] for level in levels] == [(131, 70), (66, 35), (33, 18)]
    for row, col in ((0, 0), (65, 34), (20, 7)):
        block = values[0, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
        known = block[~np.isnan(block)].astype(float)
        assert levels[1][0, row, col] == (
            pytest.approx(known.mean()) if len(known) else pytest.approx(np.nan, nan_ok=True)
        )
    assert np.isnan(levels[1]).any()


def test_probabilities_do_not_overflow():
    p = ag.probability(np.array([-np.inf, -1000, 0, 1000, np.inf, np.nan], np.float32))
    assert np.array_equal(p, np.array([0, 0, 0.5, 1, 1, np.nan], np.float32), equal_nan=True)
    assert p.dtype == np.float32


# histograms and scores


def test_histograms_are_those_of_all_margins_together(tmp_path):
    made = some_slides(tmp_path)
    tiles = ag.read_tiles([part for part, *_ in made], (0, 1))
    for c in (0, 1):
        for side, want in ((0, 1), (1, 0)):
            pooled = np.concatenate([s.margins[labels[:, c] == want, c] for _, s, labels in made])
            found = together(classes[c][side] for classes in tiles.histograms.values())
            assert np.array_equal(found, histogram(pooled))
    assert set(tiles.histograms) == {"p0", "p1", "p2"}
    mine = np.concatenate([s.margins[labels[:, 1] == 1, 1] for _, s, labels in made[2:4]])
    assert np.array_equal(tiles.histograms["p1"][1][0].dense(), histogram(mine))


def test_slide_scores(tmp_path):
    ((part, slide, labels),) = some_slides(tmp_path, 1)
    scores = ag.tiles_of(part, (1,)).slides["s0"]
    ordered = np.sort(slide.margins[:, 1])[::-1]
    assert scores.tiles == len(slide.cells)
    assert scores.top[1] == ordered[0]
    assert scores.top10[1] == pytest.approx(ordered[:10].mean(), rel=1e-6)
    assert scores.area[1] == pytest.approx((ag.probability(slide.margins)[:, 1] >= 0.5).mean())
    assert scores.positives == tuple((labels == 1).sum(axis=0))
    assert scores.positives[1] + scores.negatives[1] + scores.unknown == scores.tiles
    assert ag.slide_scores(slide.margins[:3], labels[:3]).top10[0] == pytest.approx(
        slide.margins[:3, 0].mean(), rel=1e-6
    )


def test_without_labels_everything_is_unknown(tmp_path):
    ((part, slide, _),) = some_slides(tmp_path, 1)
    bare = ag.Part(part.out, part.slide_id, GRID, NODE, "p")
    tiles = ag.tiles_of(bare, (0, 1))
    assert tiles.slides["s0"].unknown == len(slide.cells)
    assert tiles.histograms["p"][0][0].total == 0
    assert ag.read_calls([bare], ("a", "b"), {1: 0.0}, True).counts == {}


def test_calls_are_counted_by_slide(tmp_path):
    made = some_slides(tmp_path, 4, classes=3, seed=5)
    calls = ag.read_calls([part for part, *_ in made], CLASSES, {0: 0.5, 2: -1.0}, True)
    for part, slide, labels in made:
        known = labels[:, 0] >= 0
        for c, threshold in ((0, 0.5), (2, -1.0)):
            truth, called = labels[known, c] == 1, slide.margins[known, c] >= threshold
            cells = [(truth & called), (truth & ~called), (~truth & called), (~truth & ~called)]
            assert calls.counts[part.slide_id][c] == Counts(*(cell.sum() for cell in cells))
        table = np.zeros((3, 3), int)
        for row, col in zip(labels[known].argmax(axis=1), slide.margins[known].argmax(axis=1), strict=True):
            table[row, col] += 1
        assert calls.confusion[part.slide_id] == Confusion(CLASSES, table)


@pytest.mark.ray
def test_ray_does_the_same_as_threads(tmp_path, local_ray):
    made = some_slides(tmp_path, 20)
    parts = [part for part, *_ in made]
    threads, ray = (ag.read_tiles(parts, (1,), scheduler) for scheduler in ("threads", "ray"))
    assert threads.slides == ray.slides
    for patient in threads.histograms:
        for one, other in zip(threads.histograms[patient][1], ray.histograms[patient][1], strict=True):
            assert np.array_equal(one.dense(), other.dense())
    work = [(part.slide_id, GRID, NODE) for part in parts]
    assert ag.write_heatmaps(str(tmp_path), work, "ray") == {}
    assert all(part.store.committed(f"heatmaps/{GRID}/{NODE}") for part in parts)
    assert ag.write_heatmaps(str(tmp_path), work, "threads") == {}

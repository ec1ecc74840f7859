"""Training a segmentation: masks drawn from polygons, tiles and masks moved alike, and a U-Net that finds discs."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from segmenters import disc
from torchvision.transforms import v2

from slideflow_ray.accounting import read_run
from slideflow_ray.annotations import Region
from slideflow_ray.errors import AnnotationError, ConfigError
from slideflow_ray.models.bundle import load_weights, read_card
from slideflow_ray.phantoms import halved, write_pyramid
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec
from slideflow_ray.store import SlideStore
from slideflow_ray.train import job as job_module
from slideflow_ray.train.augment import augment_both, augmentation
from slideflow_ray.train.choose import Candidate
from slideflow_ray.train.dense import settled, small_core
from slideflow_ray.train.job import prepare, train
from slideflow_ray.train.loop import EpochResult, Validation, best_of, mask_loss, mean_dice
from slideflow_ray.train.masks import areas_of, draw, shown_by
from slideflow_ray.train.spec import AugmentSpec, TrainJob

CLASSES = ("background", "glomerulus")
SIZE, MPP0 = (500, 380), 0.5


def write_slide(folder: Path, name: str, rng: np.random.Generator, discs: int) -> list[tuple[float, float, float]]:
    """Dark discs on pale ground, and thin dark lines that are no discs; their outlines as GeoJSON."""
    pixels = rng.integers(205, 240, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
    for x in rng.integers(0, SIZE[0] - 3, 4):
        pixels[:, x : x + 3] = 120
    places = [(float(x), float(y), float(r)) for x, y, r in rng.uniform((20, 20, 22), (480, 360, 40), (discs, 3))]
    features = []
    for x, y, r in places:
        inside = disc(SIZE, x, y, r)
        pixels[inside] = rng.integers(90, 140, (int(inside.sum()), 3))
        ring = [list(p) for p in shapely.Point(x, y).buffer(r, quad_segs=32).exterior.coords]
        features.append({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}})
        features[-1]["properties"] = {"classification": {"name": "Glomerulus"}}
    write_pyramid(folder / f"{name}.tif", halved(pixels, 1), MPP0)
    (folder / f"{name}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return places


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("discs"), np.random.default_rng(0)
    rows = []
    for name, split in (("a", "train"), ("b", "train"), ("c", "val"), ("d", "test")):
        write_slide(folder, name, rng, 7)
        rows.append([name, f"{name}.tif", name, split, "", f"{name}.geojson", "tem"])
    with (folder / "cohort.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "uri", "patient_id", "split", "label", "annotation", "modality"])
        writer.writerows(rows)
    return folder / "cohort.csv"


def job_of(cohort: Path, out: Path, **settings) -> TrainJob:
    fit = {"architecture": "unet", "arguments": {"levels": 2, "width": 4}, "epochs": 5, "batch_size": 4, "lr": 1e-2}
    fit |= {"threads": 1, "device": "cpu", "precision": "fp32", "class_weights": "none"}
    fit |= {"augment": {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "noise": 0}}
    values = {
        "cohort": str(cohort),
        "out": str(out / "bundle"),
        "work": str(out / "work"),
        "classes": CLASSES,
        "task": "segment",
        "tile": {"tile_px": 112, "mpp": 1.0, "min_tissue": 0.0},
        "store": {"chunk_rows": 16},
        "executor": {"workers": 1},
        **settings,
        "fit": {**fit, **settings.get("fit", {})},
    }
    return TrainJob.parse(values, "test")


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    return out, train(job_of(cohort, out))


# masks


def test_masks_are_pixel_centres_in_polygons_later_classes_above_and_outside_unknown():
    """Against shapely, centre by centre; boxes beyond the slide, of another scale than the pixels."""
    shapes = {"b": shapely.Point(30, 22).buffer(17), "c": shapely.box(25.2, 10.1, 60.3, 31.7)}
    ring = shapely.difference(shapes["c"], shapely.Point(40, 20).buffer(5))
    regions = [Region("c", ring), Region("b", shapes["b"])]
    xy, wh = np.array([[-7, -4], [23, 9], [200, 200]]), np.full((3, 2), 33, np.int32)
    masks = draw(regions, ("a", "b", "c"), xy, wh, 22, (48, 36))
    for i, (x0, y0) in enumerate(xy):
        for row in range(22):
            for col in range(22):
                x, y = x0 + (col + 0.5) * 1.5, y0 + (row + 0.5) * 1.5
                inside = [shapely.contains_xy(shape, x, y) for shape in (shapes["b"], ring)]
                expected = 2 if inside[1] else 1 if inside[0] else 0
                expected = expected if 0 <= x < 48 and 0 <= y < 36 else 255
                assert masks[i, row, col] == expected
    areas = areas_of(masks, 3)
    assert areas.tolist() == [[int((mask == c).sum()) for c in range(3)] for mask in masks]
    assert shown_by(areas).tolist() == [2, 2, -1]


def test_a_tile_s_mask_lies_on_its_pixels_and_the_edge_is_unknown(cohort, tmp_path):
    data = prepare(job_of(cohort, tmp_path))
    seen = 0
    for pixels, masks, _ in data.source("train").batches(0, 8, 0):
        white = (pixels == 255).all(axis=-1)
        assert (masks[white] == 255).all()
        dark = pixels.mean(axis=-1) < 150
        assert (dark[masks == 1]).mean() > 0.95
        assert (dark[masks == 0]).mean() < 0.06  # the lines
        seen += len(masks)
    assert seen == len(data.source("train"))
    thinned = prepare(job_of(cohort, tmp_path, sample={"stride": {"background": 3}})).source("train")
    assert 0 < len(thinned) < seen
    full = [c.areas[c.used][:, 1] for c in thinned.chunks]
    assert sum(int((a > 0).sum()) for a in full) == sum(
        int((c.areas[:, 1] > 0).sum()) for c in data.source("train").chunks
    )


def test_the_mask_moves_with_its_tile_and_colours_leave_it_alone():
    rng = np.random.default_rng(0)
    masks = (rng.random((6, 8, 8)) > 0.5).repeat(6, 1).repeat(6, 2).astype(np.uint8)
    pixels = np.repeat((masks * 200)[..., None], 3, axis=-1)
    values = dict.fromkeys(AugmentSpec.model_fields, 0)
    moved, own = augment_both(pixels, masks, augmentation(AugmentSpec(**values | {"flip": True, "turn": True})), 1)
    np.testing.assert_array_equal(moved[..., 0], own * 200)
    assert any((own[i] != masks[i]).any() for i in range(6))
    tilt = AugmentSpec(**values | {"flip": True, "turn": True, "rotate_deg": 40, "shift": 0.2, "zoom": 0.2})
    moved, own = augment_both(pixels, masks, augmentation(tilt), 1)
    assert set(np.unique(own)) == {0, 1}
    assert ((moved[..., 0] > 100) == own).mean() > 0.97  # nearest against bilinear: the seams of the squares
    loud = AugmentSpec(**values | {"noise": 0.3, "stain": 0.3, "brightness": 0.5, "hue": 0.3})
    moved, own = augment_both(pixels, masks, augmentation(loud), 1)
    np.testing.assert_array_equal(own, masks)
    assert (moved != pixels).any()
    assert isinstance(augmentation(tilt), v2.Compose)


# loss and dice


def test_the_loss_is_cross_entropy_plus_soft_dice_over_known_pixels():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5), dtype=torch.uint8)
    targets[0, 1, 2] = targets[1, 3, 3] = 255
    weights = torch.tensor([1.0, 2.0, 0.5])
    entropy, n, p_sum, g_sum, both = 0.0, 0, [0.0] * 3, [0.0] * 3, [0.0] * 3
    for i in range(2):
        for y in range(4):
            for x in range(5):
                if (t := int(targets[i, y, x])) == 255:
                    continue
                p = logits[i, :, y, x].softmax(0)
                entropy -= float(weights[t] * p[t].log())
                n += 1
                for c in range(3):
                    p_sum[c] += float(p[c])
                    g_sum[c] += c == t
                    both[c] += float(p[c]) * (c == t)
    dice = sum((2 * both[c] + 1) / (p_sum[c] + g_sum[c] + 1) for c in range(3)) / 3
    assert float(mask_loss(logits, targets, weights)) == pytest.approx(entropy / n + 1 - dice, rel=1e-5)


def test_mean_dice_is_that_of_sets():
    table = np.array([[50, 3, 0], [4, 20, 1], [0, 2, 10]])
    dice = [2 * 20 / (25 + 25), 2 * 10 / (12 + 11)]
    assert mean_dice(table) == pytest.approx(sum(dice) / 2)
    assert mean_dice(np.diag([5, 0])) == 1.0


def test_the_epoch_of_highest_dice_is_kept_where_that_is_asked_for():
    """As overfitted networks go: more of each class is found while the loss rises again."""
    seen = [(0.9, 0.5, 0.6), (0.5, 0.9, 0.7), (0.7, 0.8, 0.8), (0.8, 0.8, 0.8), (0.9, 0.8, 0.75)]
    history = [
        EpochResult(i, 1.0, 0.1, Validation(loss, hit, math.nan, dice)) for i, (loss, hit, dice) in enumerate(seen)
    ]
    assert [best_of(history, keep) for keep in ("loss", "accuracy", "dice")] == [1, 1, 2]
    others = [Candidate({}, loss, hit, None, 3, dice) for loss, hit, dice in seen]
    assert min(others, key=lambda one: one.rank("dice")) is others[2]
    assert others[2].value("dice") == others[2].to_json()["val_dice"] == 0.8


# training


def test_a_tiny_unet_finds_the_discs_and_a_run_takes_its_bundle(trained, cohort):
    out, result = trained
    assert result.best.val.dice > 0.8
    card = read_card(result.bundle)
    assert (card.task, card.stride, card.radius, card.halo, card.seam) == ("segment", 4, 23, 24, None)
    spec = {"cohort": str(cohort), "out": str(out / "run"), "model": [{"path": str(result.bundle)}]}
    run(RunSpec.parse({**spec, "executor": {"workers": 1}}, "test"))
    ended = read_run(out / "run")["outcomes"]["d"]  # the test slide, which training has not seen
    ((grid, node),) = ended["grids"]
    plane = SlideStore(out / "run", "d").read_plane(f"planes/{grid}/{node}/0")
    shapes = json.loads((cohort.parent / "d.geojson").read_text())["features"]
    truth = shapely.union_all([shapely.geometry.shape(f["geometry"]) for f in shapes])
    rows, cols = np.indices(plane.shape)
    inside = shapely.contains_xy(truth, (cols + 0.5) * 2, (rows + 0.5) * 2)
    called = plane == 1
    assert 2 * (inside & called).sum() / (inside.sum() + called.sum()) > 0.8


def test_a_killed_training_goes_on_as_if_nothing_had_been(trained, cohort, tmp_path, monkeypatch):
    out, _ = trained
    work = {"work": str(out / "work"), "fit": {"epochs": 3}}
    straight = train(job_of(cohort, tmp_path / "a", **work))
    real = job_module.save_epoch

    def die_after(root, progress):
        real(root, progress)
        if len(progress.history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(job_module, "save_epoch", die_after)
    again = {**work, "work": str(tmp_path / "work")}
    with pytest.raises(KeyboardInterrupt):
        train(job_of(cohort, tmp_path / "b", **again))
    monkeypatch.setattr(job_module, "save_epoch", real)
    resumed = train(job_of(cohort, tmp_path / "b", **again))
    assert resumed.history == straight.history
    one, other = load_weights(resumed.bundle), load_weights(straight.bundle)
    assert all(torch.equal(one[key], other[key]) for key in one)
    record = json.loads((resumed.bundle / "training.json").read_text())
    assert record["epochs"][-1]["val_dice"] == resumed.history[-1].val.dice


def test_a_halo_smaller_than_the_reach_is_measured(trained, cohort, tmp_path):
    out, _ = trained
    tile = {"tile_px": 112, "mpp": 1.0, "min_tissue": 0.0, "halo_px": 8}
    result = train(job_of(cohort, tmp_path, work=str(out / "work"), tile=tile, fit={"epochs": 1}))
    seam = read_card(result.bundle).seam
    assert seam.halo == 8
    assert 0 < seam.max_probability_difference < 1


# what is refused


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"fit": {"augment": {"mixup": 0.4}}}, "mixup"),
        ({"tile": None, "whole": {"tile_px": 64, "fit": "pad"}}, "needs tiles"),
        ({"task": "classify", "fit": {"keep": "dice"}}, 'Dice is of segmentations, and the task is "classify"'),
    ],
)
def test_what_makes_no_sense_of_a_segmentation_is_said(values, cause):
    with pytest.raises(ConfigError, match=cause):
        job_of(Path("c.csv"), Path("o"), **values)


def test_tiles_that_are_mostly_halo_are_said(tmp_path):
    """Two levels reach 23 px, which is 24 at their stride: 56 px leave 8."""
    made = settled(job_of(Path("c.csv"), tmp_path, tile={"tile_px": 56, "mpp": 1.0}))
    assert "a core of 8 px within a halo of 24 px, so each pixel is computed 49 times" in small_core(made)
    assert small_core(settled(job_of(Path("c.csv"), tmp_path))) is None


def test_tiles_without_a_core_and_names_without_a_class_are_said(trained, cohort, tmp_path):
    with pytest.raises(ConfigError, match="at least 52"):
        train(job_of(cohort, tmp_path, tile={"tile_px": 48, "mpp": 1.0}))
    with pytest.raises(AnnotationError, match="Glomerulus"):
        train(job_of(cohort, tmp_path, classes=("background", "tubule"), work=str(trained[0] / "work")))

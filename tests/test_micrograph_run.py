"""Micrographs through runs and trainings: one mechanism, the same pixels, nothing of what was burnt in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image
from segmenters import colour_unet, write_colours
from test_micrographs import REAL, burnt, expected, keep_of

from slideflow_ray.accounting import read_run
from slideflow_ray.cohort import read_cohort
from slideflow_ray.export import export
from slideflow_ray.models.bundle import BundleCard, read_card, write_bundle
from slideflow_ray.models.networks import build
from slideflow_ray.models.scorer import make_scorer
from slideflow_ray.profile import resolve
from slideflow_ray.run import run
from slideflow_ray.slides import open_slide
from slideflow_ray.specs import ComputeSpec, RunSpec
from slideflow_ray.store import SlideStore
from slideflow_ray.train.job import train
from slideflow_ray.train.spec import TrainJob, as_pretraining

MPP = 0.008
TILE = {"tile_px": 88, "mpp": MPP, "halo_px": 24, "min_tissue": 0.05}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two micrographs with a strip of paper below, their annotations, a segmentation and a classifier of wholes."""
    folder = tmp_path_factory.mktemp("micrographs")
    rows = "slide_id,uri,patient_id,split,modality,nm_per_px,annotation\n"
    for name, split in (("a", "train"), ("b", "val")):
        Image.fromarray(burnt(ord(name))).save(folder / f"{name}.png")
        about = {"objectType": "annotation", "classification": {"name": "cyan"}}
        box = shapely.geometry.mapping(shapely.box(100, 150, 200, 240))
        feature = {"type": "Feature", "geometry": box, "properties": about}
        (folder / f"{name}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
        rows += f"{name},{name}.png,{name},{split},tem,8,{name}.geojson\n"
    (folder / "cohort.csv").write_text(rows)
    write_colours(folder, mpp=MPP)
    scale = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "arguments": {"width": 8}, "tile_px": 64}
    card = BundleCard(name="w", task="classify", architecture="small-cnn", classes=("x", "y"), whole="squash", **scale)
    write_bundle(folder / "w", card, build("small-cnn", {"width": 8}, 2).state_dict())
    return folder


@pytest.fixture(scope="module")
def scored(made, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "out"
    models = [{"path": str(made / name)} for name in ("discs", "w")]
    values = {"cohort": str(made / "cohort.csv"), "out": str(out), "model": models, "executor": {"workers": 1}}
    assert run(RunSpec.parse(values, "test")).counts == {"done": 2, "failed": 0, "refused": 0}
    return out


def seen(made: Path, name: str) -> np.ndarray:
    """What models see of a micrograph, uint8 (h, w), by the slow way."""
    grey = np.asarray(Image.open(made / f"{name}.png"))
    return expected(grey, keep_of(grey))


def segmented(out: Path, slide_id: str) -> tuple[SlideStore, str, np.ndarray]:
    """The store, the grid and the plane of a run's segmentation."""
    ((grid, node),) = read_run(out)["outcomes"][slide_id]["grids"]
    store = SlideStore(out, slide_id)
    return store, grid, store.read_plane(f"planes/{grid}/{node}/0")


def below(store: SlideStore, folder: str) -> list[str]:
    """The nodes in a folder of a store."""
    return [path.name for path in (store.root / folder).iterdir() if path.is_dir()]


def tiles_by_place(store: SlideStore, grid: str) -> dict[tuple[int, int], bytes]:
    places = [(int(x), int(y)) for x, y in store.read(f"grids/{grid}/xy_px0")]
    return {at: tile.tobytes() for at, tile in zip(places, store.read(f"grids/{grid}/tiles"), strict=True)}


def test_a_segmentation_sees_the_picture_and_says_nothing_of_the_strip(made, scored):
    for name in "ab":
        picture = seen(made, name)
        bottom = keep_of(np.asarray(Image.open(made / f"{name}.png"))).stop
        store, grid, plane = segmented(scored, name)
        assert store.attrs["micrograph"]["keep_px0"] == [0, 0, 320, bottom]
        cores = store.read(f"grids/{grid}/xy_px0") + 24
        assert (cores[:, 1] < bottom).all()
        around = np.full((240 + 200, 320 + 200), 255, np.uint8)
        around[100:340, 100:420] = picture
        for (x, y), tile in tiles_by_place(store, grid).items():
            window = around[y + 100 : y + 188, x + 100 : x + 188]
            assert tile == np.repeat(window[..., None], 3, axis=2).tobytes()
        scorer = make_scorer(read_card(made / "discs"), colour_unet(), resolve(ComputeSpec()))
        rgb = np.repeat(around[100 - 24 : 100 + 240 + 24, 100 - 24 : 100 + 320 + 24, None], 3, axis=2)
        want = one_piece(scorer, rgb)
        np.testing.assert_array_equal(plane[:bottom], want[:bottom])
        assert {0, 1} <= set(np.unique(plane[:bottom]))
        assert (plane[bottom:] == 255).all()
        assert plane.shape == (240, 320)


def one_piece(scorer, rgb: np.ndarray) -> np.ndarray:
    """Classes of a picture with its halo of 24 px, by the network at once."""
    import torch

    from slideflow_ray.prepare import to_input

    with torch.inference_mode():
        logits = scorer.network(to_input(rgb[None], (0.5,) * 3, (0.25,) * 3, dtype=scorer.dtype))[0].float().numpy()
    found: np.ndarray = logits[:, 24:-24, 24:-24].argmax(0)
    return found


def test_outlines_lie_in_the_stored_file(made, scored):
    export(scored, "geojson")
    bottom = keep_of(np.asarray(Image.open(made / "a.png"))).stop
    (path,) = (scored / "geojson").rglob("a*.geojson")
    shapes = [shapely.geometry.shape(f["geometry"]) for f in json.loads(path.read_text())["features"]]
    assert shapes
    assert max(shape.bounds[3] for shape in shapes) == bottom  # the dark middle of the phantom reaches down to it
    _, _, plane = segmented(scored, "a")
    assert sum(shape.area for shape in shapes) == pytest.approx((plane == 1).sum(), rel=0.05)


def test_whole_images_are_cropped_for_the_classifier(made, scored):
    (pack,) = {row["pack"] for row in read_run(scored)["outcomes"].values()}
    store = SlideStore(scored, pack)
    (grid,) = below(store, "grids")
    tiles = store.read(f"grids/{grid}/tiles")
    for row, name in enumerate("ab"):
        grey = np.asarray(Image.open(made / f"{name}.png"))
        cropped = Image.fromarray(expected(grey, keep_of(grey))[keep_of(grey)])
        want = np.asarray(cropped.resize((64, 64), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(tiles[row], np.repeat(want[..., None], 3, axis=2))


def test_training_sees_the_run_s_pixels_and_learns_nothing_of_the_strip(made, scored, tmp_path):
    fit = {"architecture": "unet", "arguments": {"levels": 2, "width": 4}, "epochs": 1, "batch_size": 8}
    fit |= {"threads": 1, "device": "cpu", "precision": "fp32", "class_weights": "none"}
    values = {"cohort": str(made / "cohort.csv"), "out": str(tmp_path / "bundle"), "work": str(tmp_path / "work")}
    values |= {"classes": ["other", "cyan"], "task": "segment", "tile": TILE, "fit": fit, "executor": {"workers": 1}}
    train(TrainJob.parse(values, "test"))
    for name in "ab":
        ran, grid, _ = segmented(scored, name)
        store = SlideStore(tmp_path / "work", name)
        (mine,) = below(store, "grids")
        assert tiles_by_place(store, mine) == tiles_by_place(ran, grid)
        bottom = keep_of(np.asarray(Image.open(made / f"{name}.png"))).stop
        (labels,) = below(store, f"labels/{mine}")
        masks, xy = store.read(f"labels/{mine}/{labels}"), store.read(f"grids/{mine}/xy_px0")
        for mask, (x, y) in zip(masks, xy.tolist(), strict=True):
            rows, cols = y + np.arange(88), x + np.arange(88)
            picture = ((rows >= 0) & (rows < bottom))[:, None] & ((cols >= 0) & (cols < 320))[None]
            cyan = ((rows >= 150) & (rows < 240))[:, None] & ((cols >= 100) & (cols < 200))[None]
            np.testing.assert_array_equal(mask, np.where(picture, cyan, 255))


# a real one


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The real micrograph, and beside it its left half, for a training needs a second one."""
    if not REAL.exists():
        pytest.skip("no micrograph at ../shared/data/tem")
    folder = tmp_path_factory.mktemp("real")
    with Image.open(REAL) as image:
        image.crop((0, 0, 1800, 2444)).save(folder / "half.png")
    nm = 2000 / 614
    rows = [f"whole,{REAL.resolve()},p,train,tem,{nm}", f"half,half.png,q,val,tem,{nm}"]
    (folder / "cohort.csv").write_text("slide_id,uri,patient_id,split,modality,nm_per_px\n" + "\n".join(rows) + "\n")
    return folder


def test_the_real_micrograph_goes_through_segmentation(real, tmp_path):
    coarse = 4 * 2 / 614
    write_colours(tmp_path, mpp=coarse)
    values = {"cohort": str(real / "cohort.csv"), "out": str(tmp_path / "out"), "executor": {"workers": 1}}
    values["model"] = [{"path": str(tmp_path / "discs"), "objects": {"min_area_um2": 0.05}}]
    only = [item for item in read_cohort(real / "cohort.csv") if item.slide_id == "whole"]
    assert run(RunSpec.parse(values, "test"), only).counts["done"] == 1
    store, grid, plane = segmented(tmp_path / "out", "whole")
    assert plane.shape == (611, 936)
    assert store.attrs["micrograph"] == {
        "keep_px0": [0, 0, 3744, 2298],
        "window": [22, 239],
        "bar_px": 614,
        "method": 1,
    }
    assert (plane[:574] < 255).all()  # 2298 / 4
    assert (plane[575:] == 255).all()
    assert {0, 1} <= set(np.unique(plane))
    assert (store.read(f"grids/{grid}/xy_px0")[:, 1] + 24 * 4 < 2298).all()


def test_the_real_micrograph_goes_through_pretraining(real, tmp_path):
    values = {"cohort": str(real / "cohort.csv"), "out": str(tmp_path / "pre"), "work": str(tmp_path / "work")}
    fit = {"arguments": {"levels": 2, "width": 4}, "epochs": 1, "batch_size": 8, "threads": 1, "precision": "fp32"}
    values |= {"tile": {"tile_px": 64, "mpp": 8 * 2 / 614, "min_tissue": 0.5}, "fit": fit, "executor": {"workers": 1}}
    train(TrainJob.parse(as_pretraining(values), "test"))
    assert (tmp_path / "pre" / "weights.safetensors").exists()
    store = SlideStore(tmp_path / "work", "whole")
    (grid,) = below(store, "grids")
    xy, tiles = store.read(f"grids/{grid}/xy_px0"), store.read(f"grids/{grid}/tiles")
    assert (xy[:, 1] < 2298 - 256).all()
    item = read_cohort(real / "cohort.csv")[0]
    with open_slide(item.uri, mpp=item.mpp, modality="tem") as reader:
        for (x, y), tile in zip(xy.tolist()[::5], tiles[::5], strict=True):
            square = Image.fromarray(reader.read(0, (x, y), (512, 512)))
            np.testing.assert_array_equal(tile, np.asarray(square.resize((64, 64), Image.Resampling.BILINEAR)))

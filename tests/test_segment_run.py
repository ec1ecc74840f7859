"""Segmentation, objects and models on objects in one run: each object once, tiles as one piece, the same bytes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from PIL import Image
from segmenters import CLASSES, write_colours, write_discs
from test_segment import card as unet_card
from test_segment import network as random_unet
from test_segment import one_piece

from slideflow_ray import cli
from slideflow_ray.accounting import read_run, status
from slideflow_ray.cohort import single_slide
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import ChunkScored, SlideDone, SlidePlanned
from slideflow_ray.models.bundle import BundleCard, load_weights, read_card, write_bundle
from slideflow_ray.models.networks import build
from slideflow_ray.models.scorer import load_scorer, make_scorer
from slideflow_ray.phantoms import write_pyramid
from slideflow_ray.planes import objects_node, read_areas, read_objects
from slideflow_ray.profile import resolve
from slideflow_ray.run import run
from slideflow_ray.specs import ComputeSpec, ObjectSpec, RunSpec
from slideflow_ray.store import SlideStore, tree_digest, verify

SIZE = (701, 503)
DISCS = [
    ("cyan", 100.0, 90.0, 26.0),  # across four cores of 40 px
    ("cyan", 300.0, 200.0, 40.0),  # two that touch
    ("cyan", 372.0, 200.0, 36.0),
    ("magenta", 500.0, 120.0, 30.0),
    ("magenta", 700.0, 300.0, 25.0),  # cut by the right edge
    ("cyan", 250.0, 500.0, 28.0),  # cut by the lower edge
    ("magenta", 642.0, 80.0, 20.0),  # across the border of two blocks of 16 cores (640 px)
]
FOUND = {"split": True, "min_area_um2": 10.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Three slides of discs, a segmentation of discs, a classifier of tiles and one of objects."""
    folder = tmp_path_factory.mktemp("discs")
    write_colours(folder)
    write_discs(folder / "a.tif", SIZE, DISCS)
    rng = np.random.default_rng(1)
    for name, n in (("b", 9), ("c", 12), ("d", 10)):
        places = [(x, y) for x in range(60, 600, 120) for y in range(60, 400, 120)]
        picked = rng.permutation(len(places))[:n]
        colours = rng.choice(CLASSES[1:], n)
        discs = [(c, *map(float, places[i]), float(rng.uniform(15, 45))) for c, i in zip(colours, picked, strict=True)]
        write_discs(folder / f"{name}.tif", (641, 430), discs)
    write_discs(folder / "none.tif", (300, 200), [])
    (folder / "cohort.csv").write_text("slide_id,uri,modality\n" + "".join(f"{s},{s}.tif,tem\n" for s in "abcd"))
    for seed, (name, whole) in enumerate([("tiles", None), ("kinds", "squash"), ("fixed", None)]):
        torch.manual_seed(seed)
        scale = {"whole": whole} if whole else {"mpp": 0.5}
        made_card = BundleCard(
            name=name,
            task="classify",
            architecture="small-cnn",
            arguments={"width": 8},
            classes=("one", "two"),
            tile_px=64,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            **scale,
        )
        write_bundle(folder / name, made_card, build("small-cnn", {"width": 8}, 2).state_dict())
    return folder


def spec(made: Path, out: Path, *models: str | dict, **settings) -> RunSpec:
    known = {
        "discs": {"path": str(made / "discs"), "objects": FOUND},
        "tiles": {"path": str(made / "tiles")},
        "kinds": {"path": str(made / "kinds"), "on": "objects:discs", "margin": 0.1},
        "fixed": {"path": str(made / "fixed"), "on": "objects:discs"},
    }
    values = {
        "cohort": str(made / "cohort.csv"),
        "out": str(out),
        "model": [known[m] if isinstance(m, str) else m for m in models],
        "store": {"chunk_rows": 8},
        "executor": {"kind": "inline", "workers": 1},
        **settings,
    }
    return RunSpec.parse(values, "test")


@pytest.fixture(scope="module")
def reference(made, tmp_path_factory) -> Path:
    """Three models in one run, one worker, undisturbed."""
    out = tmp_path_factory.mktemp("reference") / "out"
    result = run(spec(made, out, "tiles", "discs", "kinds"))
    assert result.counts == {"done": 4, "failed": 0, "refused": 0}
    return out


def grid_of(out: Path, slide_id: str, name: str) -> tuple[str, str]:
    record = read_run(out)
    node = next(m["node"] for m in record["models"] if m["name"] == name)
    (grid,) = [g for g, m in record["outcomes"][slide_id]["grids"] if m == node]
    return grid, node


def objects_of(out: Path, slide_id: str, **found):
    grid, node = grid_of(out, slide_id, "discs")
    store = SlideStore(out, slide_id)
    return read_objects(store, objects_node(grid, node, ObjectSpec.model_validate(found or FOUND)))


# objects


def test_every_object_is_found_once(reference):
    found = objects_of(reference, "a")
    assert len(found) == len(DISCS)
    for colour, x, y, r in DISCS:
        near = np.hypot(*(found.centroid_px0 - (x, y)).T)
        i = int(near.argmin())
        cut = x + r > SIZE[0] or y + r > SIZE[1]
        assert near[i] < (r if cut else 2.5)
        assert found.classes[found.class_index[i]] == colour
        assert bool(found.touches_edge[i]) == cut
        if not cut and x not in (300.0, 372.0):
            assert found.area_um2[i] == pytest.approx(np.pi * r**2 * 0.25, rel=0.02)
            box = found.box_px0[i]
            np.testing.assert_allclose(box, [x - r, y - r, 2 * r, 2 * r], atol=1.01)
            assert found.polygons[i].area * 0.25 == pytest.approx(found.area_um2[i])


def test_without_splitting_what_touches_is_one_object(made, tmp_path):
    out = tmp_path / "out"
    run(spec(made, out, {"path": str(made / "discs")}, cohort=single(made, tmp_path, "a")))
    assert len(objects_of(out, "a", classes=())) == len(DISCS) - 1


def single(made: Path, folder: Path, *names: str) -> str:
    path = folder / "single.csv"
    path.write_text("slide_id,uri,modality\n" + "".join(f"{n},{made / n}.tif,tem\n" for n in names))
    return str(path)


def test_the_plane_is_the_truth_and_the_areas_add_up(made, reference):
    truth = write_discs(reference.parent / "again.tif", SIZE, DISCS)
    grid, node = grid_of(reference, "a", "discs")
    store = SlideStore(reference, "a")
    plane = store.read_plane(f"planes/{grid}/{node}/0")
    np.testing.assert_array_equal(plane, truth)
    areas = read_areas(store, grid, node)
    assert areas == {name: pytest.approx((truth == i).sum() * 0.25) for i, name in enumerate(CLASSES)}
    for level in range(1, 5):
        coarse = store.read_plane(f"planes/{grid}/{node}/{level}")
        np.testing.assert_array_equal(coarse, truth[:: 2**level, :: 2**level])


def test_the_plane_opens_as_ome_zarr_labels(reference):
    grid, node = grid_of(reference, "a", "discs")
    path = SlideStore(reference, "a").root / "planes" / grid / node / "zarr.json"
    ome = json.loads(path.read_text())["attributes"]["ome"]
    (scale,) = ome["multiscales"]
    assert ome["version"] == "0.5"
    assert [d["path"] for d in scale["datasets"]] == ["0", "1", "2", "3", "4"]
    assert scale["datasets"][3]["coordinateTransformations"][0]["scale"] == [4.0, 4.0]
    assert [p["class"] for p in ome["image-label"]["properties"]] == list(CLASSES)


def test_at_a_coarser_scale_objects_lie_where_they_are(made, tmp_path):
    write_colours(tmp_path, "coarse", mpp=1.0)
    out = tmp_path / "out"
    model = {"path": str(tmp_path / "coarse"), "objects": FOUND}
    run(spec(made, out, model, cohort=single(made, tmp_path, "a")))
    grid, node = grid_of(out, "a", "coarse")
    found = read_objects(SlideStore(out, "a"), objects_node(grid, node, ObjectSpec.model_validate(FOUND)))
    assert len(found) == len(DISCS)
    for _, x, y, r in DISCS:
        near = np.hypot(*(found.centroid_px0 - (x, y)).T).min()
        assert near < (r if x + r > SIZE[0] or y + r > SIZE[1] else 3)


def test_an_object_is_read_at_its_own_scale(made, reference):
    """What the object's model saw is what OpenSlide cuts out and Pillow resizes."""
    found = objects_of(reference, "a")
    grid, _ = grid_of(reference, "a", "kinds")
    store = SlideStore(reference, "a")
    xy, wh = store.read(f"grids/{grid}/xy_px0"), store.read(f"grids/{grid}/wh_px0")
    tiles = store.read(f"grids/{grid}/tiles")
    assert len(tiles) == len(found)
    assert len(np.unique(wh[:, 0])) > 3
    with openslide.OpenSlide(made / "a.tif") as slide:
        for i in range(len(found)):
            assert wh[i, 0] == wh[i, 1] == np.ceil(found.box_px0[i, 2:].max() * 1.2)
            if wh[i, 0] >= 128:  # from level 1
                continue
            cut = Image.new("RGB", tuple(wh[i].tolist()), "white")
            part = slide.read_region(tuple(xy[i].tolist()), 0, tuple(wh[i].tolist()))
            cut.paste(part.convert("RGB"), mask=part.getchannel("A"))
            np.testing.assert_array_equal(tiles[i], np.asarray(cut.resize((64, 64), Image.Resampling.BILINEAR)))


def test_a_model_with_a_scale_of_its_own_sees_objects_at_that(made, tmp_path):
    out = tmp_path / "out"
    run(spec(made, out, "discs", "fixed", cohort=single(made, tmp_path, "a")))
    grid, node = grid_of(out, "a", "fixed")
    store = SlideStore(out, "a")
    assert (store.read(f"grids/{grid}/wh_px0") == 64).all()
    boxes = objects_of(out, "a").box_px0
    middle = store.read(f"grids/{grid}/xy_px0") + 32
    assert np.abs(middle - (boxes[:, :2] + boxes[:, 2:] / 2)).max() <= 0.5
    tiles = store.read(f"grids/{grid}/tiles")
    scorer = load_scorer(made / "fixed", resolve(ComputeSpec()))
    np.testing.assert_array_equal(store.read(f"scores/{grid}/{node}"), scorer.margins(tiles))


def test_a_slide_without_objects_is_done(made, tmp_path):
    out = tmp_path / "out"
    result = run(spec(made, out, "discs", "kinds", cohort=single(made, tmp_path, "none")))
    assert result.counts["done"] == 1
    assert len(objects_of(out, "none")) == 0
    assert status(out)["done"] == 1
    assert not run(spec(made, out, "discs", "kinds", cohort=single(made, tmp_path, "none"))).changed


# tiles and one piece


def test_a_run_in_tiles_is_one_piece_bit_for_bit(tmp_path):
    """A network that uses its whole radius, on a slide whose sides are no multiples of anything."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (331, 457, 3)).astype(np.uint8)
    write_pyramid(tmp_path / "s.tif", [pixels], 1.0)
    write_bundle(tmp_path / "net", unet_card(), random_unet().state_dict())
    out = tmp_path / "out"
    values = {"cohort": "s", "out": str(out), "model": [{"path": str(tmp_path / "net")}]}
    run(RunSpec.parse(values, "test"), single_slide(str(tmp_path / "s.tif"), modality="tem"))
    (slide_id,) = read_run(out)["outcomes"]
    record = read_run(out)
    ((grid, node),) = record["outcomes"][slide_id]["grids"]
    plane = SlideStore(out, slide_id).read_plane(f"planes/{grid}/{node}/0")
    scorer = make_scorer(unet_card(), random_unet(), resolve(ComputeSpec.model_validate({})))
    halo, core = 24, 64
    whole = np.full((2 * halo + -(-331 // core) * core, 2 * halo + -(-457 // core) * core, 3), 255, np.uint8)
    whole[halo : halo + 331, halo : halo + 457] = pixels
    want = one_piece(scorer, whole).argmax(0)[:331, :457]
    assert len(np.unique(want)) == 3
    np.testing.assert_array_equal(plane, want)


# one run of three models


def test_one_run_of_three_models_is_three_runs(made, reference, tmp_path):
    out = tmp_path / "out"
    run(spec(made, out, "tiles"))
    run(spec(made, out, "discs"))
    run(spec(made, out, "discs", "kinds"))
    assert stores_digest(out) == stores_digest(reference)


def stores_digest(out: Path) -> dict[str, bytes]:
    roots = [out / "slides", out / "commits"]
    return {str(p.relative_to(out)): p.read_bytes() for r in roots for p in r.rglob("*") if p.is_file()}


@pytest.mark.ray
@pytest.mark.soak  # test_mixed.py has more models, of several modalities
def test_three_models_on_two_pretended_gpus_overlap_and_give_the_same_bytes(made, reference, tmp_path, local_ray):
    events = []
    out = tmp_path / "out"
    executor = {"kind": "ray", "readers_per_gpu": 2}
    run(spec(made, out, "tiles", "discs", "kinds", executor=executor), listen=events.append)
    assert tree_digest(out) == tree_digest(reference)
    scored = [e for e in events if isinstance(e, ChunkScored)]
    names = {m["node"]: m["name"] for m in read_run(out)["models"]}
    assert {names[m] for e in scored for m in e.models} == {"tiles", "discs", "kinds"}
    assert len({e.worker.split(":")[1] for e in scored}) == 2
    overlapping = {
        frozenset((names[one.models[0]], names[other.models[0]]))
        for one, other in itertools.combinations(scored, 2)
        if one.worker != other.worker and one.began < other.ended and other.began < one.ended
    }
    assert {frozenset(("tiles", "discs"))} <= overlapping
    assert any("kinds" in pair and len(pair) == 2 for pair in overlapping)


@pytest.mark.ray
@pytest.mark.soak
def test_models_on_gpus_of_their_own_give_the_same_bytes(made, reference, tmp_path, local_ray):
    out = tmp_path / "out"
    executor = {"kind": "ray", "readers_per_gpu": 2, "models": "apart"}
    events = []
    again = {"path": str(made / "tiles"), "features": True}
    run(spec(made, out, again, "discs", "kinds", executor=executor), listen=events.append)
    mine = {key: value for key, value in stores_digest(out).items() if "/features/" not in key}
    assert mine == stores_digest(reference)
    names = {m["node"]: m["name"] for m in read_run(out)["models"]}
    workers: dict[str, set[str]] = {}
    for e in (e for e in events if isinstance(e, ChunkScored)):
        workers.setdefault(e.worker.split(":")[1], set()).update(names[m] for m in e.models)
    assert sorted(map(sorted, workers.values())) == [["discs"], ["kinds", "tiles"]]


def test_objects_of_one_slide_are_classified_while_others_are_segmented(made, tmp_path):
    events = []
    run(spec(made, tmp_path / "out", "discs", "kinds"), listen=events.append)
    order = [e.slide_id for e in events if isinstance(e, SlideDone)]
    planned = [e.slide_id for e in events if isinstance(e, SlidePlanned)]
    assert sorted(planned) == sorted(2 * list("abcd"))
    assert planned.index("d") > planned.index(order[0]) or events.index(
        next(e for e in events if isinstance(e, SlideDone))
    ) < max(i for i, e in enumerate(events) if isinstance(e, ChunkScored))


def test_running_again_does_nothing(made, reference, tmp_path):
    before = tree_digest(reference)
    result = run(spec(made, reference, "tiles", "discs", "kinds"))
    assert not result.changed
    assert {e.outcome for e in result.ended} == {"unchanged"}
    assert tree_digest(reference) == before
    assert verify(reference)[1] == []


def test_lost_objects_are_derived_again(made, reference, tmp_path):
    """What a kill between the plane and the objects leaves behind."""
    out = tmp_path / "out"
    run(spec(made, out, "tiles", "discs", "kinds"))
    for kind in ("objects", "grids/64px-objects"):
        for path in (out / "commits").rglob("*.json"):
            if kind in str(path):
                path.unlink()
    result = run(spec(made, out, "tiles", "discs", "kinds"))
    assert {e.outcome for e in result.ended} == {"scored"}
    assert tree_digest(out) == tree_digest(reference)


def test_evaluate_and_report_take_a_run_with_a_segmentation(made, reference, capsys):
    for command in ("evaluate", "report"):
        with pytest.raises(SystemExit) as left:
            cli.main([command, str(reference)])
        assert left.value.code == 0
    page = (reference / "report.html").read_text()
    assert "magenta" in page


# what cannot be


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["kinds"], "0 segmentations of that name"),
        (["tiles", {"path": "kinds", "on": "objects:tiles"}], "segmentations: none"),
        (["discs", {"path": "discs", "on": "objects:discs"}], "named twice"),
        ([{"path": "discs", "on": "whole"}], "needs tiles"),
        ([{"path": "discs", "features": True}], "no features"),
        ([{"path": "discs", "objects": {"classes": ["red"]}}], "objects.classes names red"),
        ([{"path": "tiles", "on": "objects"}], 'on = "objects" is unknown'),
        ([{"path": "tiles", "margin": 0.2}], "margin belongs to"),
        (["discs", {"path": "fixed", "on": "objects:discs", "margin": 0.2}], "`margin` means nothing"),
        ([{"path": "tiles", "objects": {"split": True}}], "`objects` and `thickness` mean nothing"),
        ([{"path": "tiles", "where": {"modality": "HE"}}], "where names modality 'HE'"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(models, said, made, tmp_path):
    models = [m if isinstance(m, str) else m | {"path": str(made / m["path"])} for m in models]
    with pytest.raises(ConfigError, match=said):
        run(spec(made, tmp_path / "out", *models))
    assert not (tmp_path / "out" / "slides").exists()


def test_objects_are_not_enlarged_beyond_what_tiles_may_be(made, tmp_path):
    of = read_card(made / "fixed").model_copy(update={"name": "fine", "mpp": 0.1})
    write_bundle(tmp_path / "fine", of, load_weights(made / "fixed"))
    fine = {"path": str(tmp_path / "fine"), "on": "objects:discs"}
    result = run(spec(made, tmp_path / "out", "discs", fine, cohort=single(made, tmp_path, "a")))
    assert [(e.status, e.code) for e in result.ended] == [("refused", "E_BAD_MPP")]


# features


def test_features_are_those_of_the_model_and_come_beside_scores(made, tmp_path):
    folder = tmp_path / "encoder"
    torch.manual_seed(5)
    of = read_card(made / "tiles").model_copy(update={"name": "encoder", "task": "features", "classes": ()})
    write_bundle(folder, of, build("small-cnn", {"width": 8}, 0).state_dict())
    out = tmp_path / "out"
    both = {"path": str(made / "tiles"), "features": True}
    run(spec(made, out, both, {"path": str(folder)}, cohort=single(made, tmp_path, "b")))
    store = SlideStore(out, "b")
    for name, kinds in (("tiles", ["features", "scores"]), ("encoder", ["features"])):
        grid, node = grid_of(out, "b", name)
        tiles = store.read(f"grids/{grid}/tiles")
        scorer = load_scorer(made / "tiles" if name == "tiles" else folder, resolve(ComputeSpec()))
        np.testing.assert_array_equal(store.read(f"features/{grid}/{node}"), scorer.features(tiles))
        assert store.read(f"features/{grid}/{node}").dtype == np.float16
        assert [k for k in ("features", "scores") if store.committed(f"{k}/{grid}/{node}")] == kinds


def test_features_asked_for_later_leave_the_scores_alone(made, reference, tmp_path):
    out = tmp_path / "out"
    run(spec(made, out, "tiles"))
    scores = {p: p.stat().st_mtime_ns for p in (out / "slides").rglob("scores/**/*") if p.is_file()}
    assert scores
    result = run(spec(made, out, {"path": str(made / "tiles"), "features": True}))
    assert result.changed
    assert {p: p.stat().st_mtime_ns for p in scores} == scores
    assert list((out / "commits").rglob("features/*/*.json"))

"""Runs and trainings with stain targets: fits made once, tiles raw, the same bytes whoever works, E_STAIN said."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_stain import RUIFROK, SCANNER_B, amounts, picture, target, unit

from slideflow_ray.accounting import read_run
from slideflow_ray.cohort import Item, read_cohort
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import ChunkScored
from slideflow_ray.models.bundle import forward_digest, load_weights, read_card, write_bundle
from slideflow_ray.models.scorer import load_scorer
from slideflow_ray.packs import pack_items
from slideflow_ray.phantoms import write_pyramid
from slideflow_ray.pipeline import Chunk, Context
from slideflow_ray.prepare import restained
from slideflow_ray.profile import resolve
from slideflow_ray.run import run, settings_of
from slideflow_ray.specs import ComputeSpec, RunSpec, StoreSpec, TissueSpec, WholeSpec
from slideflow_ray.stain import Stained, StainFit, fit_tiles
from slideflow_ray.staining import read_fits
from slideflow_ray.store import SlideStore, tree_digest, verify
from slideflow_ray.train.colours import check_stated, coloured
from slideflow_ray.train.job import prepare, train
from slideflow_ray.train.spec import TrainJob
from slideflow_ray.train.tiles import LabelledChunk

SIDE = 384


def slide(path: Path, seed: int, vectors, strength: float = 1.0) -> None:
    """A slide of 512 px on a side, tissue in the middle."""
    pixels = np.full((512, 512, 3), 245, np.uint8)
    pixels[64 : 64 + SIDE, 64 : 64 + SIDE] = picture(0.1 + amounts(seed, SIDE), unit(vectors), seed, strength)
    write_pyramid(path, [pixels, np.ascontiguousarray(pixels[::2, ::2])], 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Slides a (scanner A) and b (the same in scanner B's colours), c of PAS, glass; crops of three patients."""
    folder = tmp_path_factory.mktemp("stained")
    slide(folder / "a.tif", 1, RUIFROK["he"])
    slide(folder / "b.tif", 1, SCANNER_B["he"], 1.25)
    slide(folder / "c.tif", 2, RUIFROK["pas"])
    grey = np.full((512, 512, 3), 245, np.uint8)
    grey[64:448, 64:448] = (150, 80, 160)
    write_pyramid(folder / "flat.tif", [grey], 0.5)
    write_pyramid(folder / "glass.tif", [np.full((512, 512, 3), 245, np.uint8)], 0.5)
    rows = ["a,a.tif,he,", "b,b.tif,he,H&E", "glass,glass.tif,he,"]
    (folder / "cohort.csv").write_text("\n".join(["slide_id,uri,modality,stain", *rows]) + "\n")
    rows += ["c,c.tif,pas,", "flat,flat.tif,he,"]
    (folder / "with_others.csv").write_text("\n".join(["slide_id,uri,modality,stain", *rows]) + "\n")
    lines = ["slide_id,uri,patient_id,modality,scanner"]
    for i in range(20):
        vectors, patient = ((RUIFROK["he"], "p0"), (SCANNER_B["he"], "p1"), (None, "p2"))[min(i // 9, 2)]
        flat = np.full((96, 96, 3), (150, 80, 160), np.uint8)
        pixels = flat if vectors is None else picture(0.1 + amounts(i, 96), unit(vectors), i)
        Image.fromarray(pixels).save(folder / f"crop{i}.png")
        lines.append(f"crop{i},crop{i}.png,{patient},he,s")
    (folder / "crops.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def stained(bundles, folder) -> dict[str, Path]:
    """The bundle "aligned" with an HE target, and the same for whole images; and both without targets."""
    card, weights = read_card(bundles["aligned"]), load_weights(bundles["aligned"])
    fit = fit_tiles([picture(amounts(7), unit(RUIFROK["he"]), 7, 0.9)], "vahadane")
    whole = {"mpp": None, "whole": "squash"}
    made = {}
    for name, changes in {"tiles": {}, "crops": whole, "raw": {}, "raw-crops": whole}.items():
        stain = {} if name.startswith("raw") else {"stain": {"he": target(fit)}}
        made[name] = write_bundle(folder / name, card.model_copy(update={"name": name, **changes, **stain}), weights)
    return made


def spec(cohort: Path, out: Path, *models: Path, **settings) -> RunSpec:
    values = {"cohort": str(cohort), "out": str(out), "model": [{"path": str(m)} for m in models]}
    return RunSpec.parse({**values, "executor": {"workers": 1}, "store": {"chunk_rows": 16}, **settings}, "test")


@pytest.fixture(scope="module")
def done(folder, stained) -> Path:
    out = folder / "out"
    assert run(spec(folder / "cohort.csv", out, stained["tiles"], stained["raw"])).counts["done"] == 3
    return out


def scores(out: Path, slide_id: str, name: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Tiles as they are stored, margins, and the grid."""
    grid, node = next(pair for pair in read_run(out)["outcomes"][slide_id]["grids"] if pair[1].startswith(f"{name}-"))
    store = SlideStore(out, slide_id)
    return store.read(f"grids/{grid}/tiles"), store.read(f"scores/{grid}/{node}"), grid


def test_scores_are_of_normalised_tiles_and_stored_tiles_are_raw(done, stained):
    card = read_card(stained["tiles"])
    scorer = load_scorer(stained["raw"], resolve(ComputeSpec()))
    for slide_id in ("a", "b"):
        store = SlideStore(done, slide_id)
        [node] = store.nodes("stains")
        fits = read_fits(str(done), slide_id, node)
        assert fits.stain == "he"
        tiles, margins, grid = scores(done, slide_id, "tiles")
        _, raw, raw_grid = scores(done, slide_id, "raw")
        assert raw_grid == grid  # one grid for both models
        assert scorer.margins(tiles).tobytes() == raw.tobytes()
        assert isinstance(fits.rows[0], StainFit)
        colours = restained(tiles, Stained("he", (fits.rows[0],)), card.stain["he"])
        np.testing.assert_array_equal(scorer.margins(colours), margins)
        assert np.abs(margins - raw).max() > 0
    assert SlideStore(done, "glass").nodes("stains") == []
    assert verify(done)[1] == []


def test_the_colours_of_two_scanners_score_more_alike(done):
    apart = [np.abs(scores(done, "a", name)[1] - scores(done, "b", name)[1]).mean() for name in ("raw", "tiles")]
    assert apart[1] < 0.5 * apart[0]


def test_a_rerun_does_nothing_and_a_new_target_scores_anew(folder, stained, done, tmp_path):
    before = tree_digest(done)
    events: list = []
    run(spec(folder / "cohort.csv", done, stained["tiles"], stained["raw"]), listen=events.append)
    assert not [e for e in events if isinstance(e, ChunkScored)]
    assert tree_digest(done) == before
    card = read_card(stained["tiles"])
    other = {"he": target(fit_tiles([picture(amounts(3), unit(SCANNER_B["he"]))], "vahadane"))}
    changed = write_bundle(tmp_path / "tiles", card.model_copy(update={"stain": other}), load_weights(stained["tiles"]))
    assert forward_digest(changed) != forward_digest(stained["tiles"])
    shutil.copytree(done, tmp_path / "out")
    run(spec(folder / "cohort.csv", tmp_path / "out", changed))
    store = SlideStore(tmp_path / "out", "a")
    assert len(store.nodes("stains")) == 1  # the same fit serves
    assert len([n for n in store.nodes("scores") if "/tiles-" in n]) == 2


def test_two_workers_and_a_discarded_fit_give_the_same_bytes(folder, stained, done, tmp_path):
    made = spec(folder / "cohort.csv", tmp_path / "out", stained["tiles"], stained["raw"], executor={"workers": 2})
    run(made)
    assert tree_digest(tmp_path / "out") == tree_digest(done)
    store = SlideStore(tmp_path / "out", "a")
    store.discard(store.nodes("stains")[0])
    run(made)
    assert tree_digest(tmp_path / "out") == tree_digest(done)


@pytest.mark.ray
def test_ray_gives_the_same_bytes(folder, stained, done, tmp_path, local_ray):
    made = spec(
        folder / "cohort.csv",
        tmp_path / "out",
        stained["tiles"],
        stained["raw"],
        executor={"kind": "ray", "workers": 2},
        compute={"device": "cpu"},
    )
    run(made)
    assert tree_digest(tmp_path / "out") == tree_digest(done)


def test_a_stain_without_a_target_and_one_that_cannot_be_told_end_as_e_stain(folder, stained, tmp_path):
    result = run(spec(folder / "with_others.csv", tmp_path / "out", stained["tiles"]))
    ended = {e.slide_id: e for e in result.ended}
    assert {name: e.status for name, e in ended.items() if e.status == "done"} == dict.fromkeys(
        ("a", "b", "glass"), "done"
    )
    assert (ended["c"].code, ended["flat"].code) == ("E_STAIN", "E_STAIN")
    assert "none for the stain 'pas'" in ended["c"].message
    assert ended["flat"].message.startswith("flat: ")
    raw = run(spec(folder / "with_others.csv", tmp_path / "raw", stained["raw"]))
    assert raw.counts["done"] == 5


def test_crops_share_the_fit_of_their_patient_and_those_without_one_fail_alone(folder, stained, tmp_path):
    out = tmp_path / "out"
    result = run(spec(folder / "crops.csv", out, stained["crops"], stained["raw-crops"]))
    ended = {e.slide_id: e for e in result.ended}
    assert [name for name, e in ended.items() if e.status != "done"] == ["crop18", "crop19"]
    assert ended["crop18"].code == "E_STAIN"
    assert "2 images of p2, he" in ended["crop18"].message
    store = SlideStore(out, next(iter(read_run(out)["packs"])))
    [node] = store.nodes("stains")
    fits = read_fits(str(out), store.slide_id, node)
    assert len(set(fits.rows[:9])) == len(set(fits.rows[9:18])) == 1
    assert fits.rows[0] != fits.rows[9]
    scorer = load_scorer(stained["raw-crops"], resolve(ComputeSpec()))
    want = read_card(stained["crops"]).stain["he"]
    for name, i in (("crop3", 3), ("crop17", 17)):
        tile = np.asarray(Image.open(folder / f"{name}.png").resize((64, 64), Image.Resampling.BILINEAR))[None]
        margins = [store.read(f"scores/{grid}/{model}")[i] for grid, model in read_run(out)["outcomes"][name]["packed"]]
        expected = [scorer.margins(restained(tile, Stained("he", (fits.rows[i],)), want))[0], scorer.margins(tile)[0]]
        np.testing.assert_array_equal(margins, expected)
    again = run(spec(folder / "crops.csv", out, stained["raw-crops"]))
    assert again.counts["done"] == 20  # the raw model never minded
    assert verify(out)[1] == []


def test_a_crop_that_leaves_the_cohort_takes_no_fit_with_it(folder, stained, tmp_path):
    rows = (folder / "crops.csv").read_text().splitlines()
    for line in rows[1:19]:
        name = line.split(",")[1]
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "cohort.csv").write_text("\n".join(rows[:19]) + "\n")
    run(spec(tmp_path / "cohort.csv", tmp_path / "out", stained["crops"]))
    before = {p: p.read_bytes() for p in (tmp_path / "out" / "slides").rglob("*") if p.is_file()}
    (tmp_path / "cohort.csv").write_text("\n".join([rows[0], *rows[2:19]]) + "\n")
    events: list = []
    assert (
        run(spec(tmp_path / "cohort.csv", tmp_path / "out", stained["crops"]), listen=events.append).counts["done"]
        == 17
    )
    assert not [e for e in events if isinstance(e, ChunkScored)]
    assert all(path.read_bytes() == data for path, data in before.items())
    moved = [line.replace(",p0,", ",p1,") for line in rows[2:4]]  # other patients: other fits, other scores
    (tmp_path / "cohort.csv").write_text("\n".join([rows[0], *moved, *rows[4:19]]) + "\n")
    run(spec(tmp_path / "cohort.csv", tmp_path / "out", stained["crops"]), listen=events.append)
    assert [e for e in events if isinstance(e, ChunkScored)]


# training


@pytest.fixture(scope="module")
def job(folder) -> dict:
    """Four slides of two scanners with annotations, split by patient."""
    lines = ["slide_id,uri,patient_id,split,annotation,modality"]
    for i, (split, vectors, strength) in enumerate(
        [("train", RUIFROK, 0.8), ("train", RUIFROK, 1.0), ("train", RUIFROK, 1.3), ("val", SCANNER_B, 1.2)]
    ):
        slide(folder / f"t{i}.tif", 10 + i, vectors["he"], strength)
        halves = [("normal", 0, 256), ("tumor", 256, 512)]
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [[[a, 0], [b, 0], [b, 512], [a, 512], [a, 0]]]},
                "properties": {"objectType": "annotation", "classification": {"name": name}},
            }
            for name, a, b in halves
        ]
        (folder / f"t{i}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        lines.append(f"t{i},t{i}.tif,p{i},{split},t{i}.geojson,he")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return {
        "cohort": str(folder / "train.csv"),
        "out": str(folder / "trained"),
        "work": str(folder / "work"),
        "classes": ("normal", "tumor"),
        "tile": {"tile_px": 64, "mpp": 0.5},
        "fit": {"architecture": "small-cnn", "weights": "random", "epochs": 1, "batch_size": 16, "threads": 1},
        "executor": {"workers": 1},
    }


@pytest.fixture(scope="module")
def prepared(job):
    """What a training without normalisation reads, from which those with it differ in `coloured` alone."""
    data = prepare(TrainJob.parse(job, "test"))
    assert data.targets is None
    return data


def test_training_sees_what_scoring_will_see(job, folder, prepared):
    made = TrainJob.parse({**job, "stain": "vahadane"}, "test")
    data = prepare(made)
    assert data.targets is not None
    assert data.targets["he"].source == "t1"  # the middle one of three strengths
    result = train(made, data=data)
    card = read_card(result.bundle)
    assert card.stain == data.targets
    out = folder / "judged"
    run(spec(folder / "train.csv", out, result.bundle, store={"chunk_rows": 256}))
    scorer = load_scorer(result.bundle, resolve(ComputeSpec()))
    raw = replace(scorer, card=card.model_copy(update={"stain": None}))
    for split in ("train", "val"):
        source = data.source(split)
        for c, plain in zip(source.chunks, prepared.source(split).chunks, strict=True):
            seen = source._load(c, np.arange(c.chunk.tiles)).pixels
            _, margins, _ = scores(out, c.chunk.item.slide_id, "trained")
            np.testing.assert_array_equal(raw.margins(seen), margins)
            assert np.abs(seen.astype(int) - source._load(plain, np.arange(c.chunk.tiles)).pixels).mean() > 1


def test_a_target_can_be_named_and_must_be_one_of_train(job, prepared):
    def targets(**values):
        return coloured(TrainJob.parse({**job, **values}, "test"), prepared.context, prepared.chunks)[1]

    named = targets(stain="macenko", stain_target={"he": "t2"})["he"]
    assert (named.source, named.method) == ("t2", "macenko")
    assert targets(stain="vahadane", stain_lam=0.02)["he"].lam == 0.02
    for wrong in ({"he": "t3"}, {"he": "nobody"}, {"he": "t1", "pas": "t1"}):
        with pytest.raises(ConfigError, match="stain_target"):
            targets(stain="macenko", stain_target=wrong)


def test_val_of_a_stain_that_train_has_not_is_refused(job, prepared):
    def as_pas(c):
        return replace(c, chunk=replace(c.chunk, item=c.chunk.item.model_copy(update={"stain": "PAS"})))

    chunks = {"train": prepared.chunks["train"], "val": [as_pas(c) for c in prepared.chunks["val"]]}
    with pytest.raises(ConfigError, match="t3 is stained pas"):
        coloured(TrainJob.parse({**job, "stain": "reinhard"}, "test"), prepared.context, chunks)


def test_slides_whose_stains_cannot_be_told_stop_a_training(job, prepared, folder):
    flat = read_cohort(folder / "with_others.csv")[-1].model_copy(update={"slide_id": "flat"})
    c = prepared.chunks["train"][0]
    chunks = {"train": [replace(c, chunk=replace(c.chunk, item=flat))], "val": []}
    with pytest.raises(ConfigError, match="flat: E_STAIN"):
        coloured(TrainJob.parse({**job, "stain": "vahadane"}, "test"), prepared.context, chunks)


def test_crops_of_a_training_have_the_fit_of_their_group(job, folder, tmp_path):
    """A pack as whole-image training lays it: rows without a fit lose their label, the others take their colours."""
    items = read_cohort(folder / "crops.csv")
    [pack] = pack_items(tmp_path, items).packs
    context = Context(str(tmp_path), (), TissueSpec(), StoreSpec(chunk_rows=16))
    whole = WholeSpec(tile_px=64, fit="squash")
    SlideStore(tmp_path, pack.slide_id).describe({"kind": "pack", "identity": pack.identity})
    labels = np.arange(20) % 2
    chunks = [
        LabelledChunk(Chunk(pack, "g", whole, i, n, ()), labels[16 * i : 16 * i + n], start=16 * i)
        for i, n in ((0, 16), (1, 4))
    ]
    found, targets = coloured(
        TrainJob.parse({**job, "stain": "vahadane", "stain_target": {"he": "crop2"}}, "test"),
        context,
        {"train": chunks, "val": []},
    )
    assert targets is not None
    assert found["train"][0].labels.tolist() == labels[:16].tolist()
    assert found["train"][1].labels.tolist() == [*labels[16:18].tolist(), -1, -1]
    stained, into = found["train"][0].colours
    assert stained.fits[0] == into.fit == targets["he"].fit
    assert len(set(stained.fits[:9])) == len(set(stained.fits[9:])) == 1
    assert stained.fits[0] != stained.fits[9]
    hidden = np.where(np.arange(16) == 2, -1, labels[:16])  # as crops of val are in a pack that they share
    one = [LabelledChunk(chunks[0].chunk, hidden), chunks[1]]
    with pytest.raises(ConfigError, match="no he item of the train split"):
        coloured(
            TrainJob.parse({**job, "stain": "vahadane", "stain_target": {"he": "crop2"}}, "test"),
            context,
            {"train": one, "val": []},
        )


# before and after


def called(*arguments: str) -> tuple[int, str]:
    from typer.testing import CliRunner

    from slideflow_ray.cli import app

    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout


def test_pictures_of_a_run_show_both_and_count_neighbours(folder, stained, done, tmp_path):
    from slideflow_ray.stainview import show_stains

    found = show_stains(done, folder=tmp_path)
    assert "nearest neighbours kept" in found.summary()
    assert [path.name for path in found.files] == ["stain-tiles.png", "stain-tiles-tsne.png", "stain-tiles-tsne.json"]
    for path in found.files[:2]:
        with Image.open(path) as image:
            assert image.size[0] > 900
            assert np.asarray(image.convert("L")).std() > 10
    said = json.loads(found.files[2].read_text())
    assert said == json.loads(json.dumps(found.numbers))
    assert said["values"] == ["a", "b"]
    code, text = called("stain", str(done), "--folder", str(tmp_path / "again"), "--json")
    assert code == 0
    again = [Path(path) for path in json.loads(text)["files"]]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in found.files]
    with pytest.raises(ConfigError, match="'raw' with stain targets"):
        show_stains(done, "raw")


def test_neighbours_are_counted_as_said():
    """Two clouds 50 apart before, in one place after, each row otherwise where it was."""
    from sklearn.manifold import trustworthiness

    from slideflow_ray.stainview import compare_features

    rng = np.random.default_rng(0)
    places = rng.normal(0, 1, (40, 5)).astype(np.float32)
    before = np.concatenate([places, places + 50])
    after = np.concatenate([places, places + 1e-3])
    png, said = compare_features(before, after, "scanner", ["x"] * 40 + ["y"] * 40)
    assert png.startswith(b"\x89PNG")
    apart = [np.linalg.norm(x[:, None] - x[None], axis=2) + np.diag([np.inf] * 80) for x in (before, after)]
    near = [np.argsort(d, axis=1)[:, :10] for d in apart]
    kept = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*near, strict=True)])
    assert said["kept"] == pytest.approx(kept)
    same = [np.mean((n < 40) == (np.arange(80) < 40)[:, None]) for n in near]
    assert (said["before"]["same"], said["after"]["same"]) == pytest.approx(tuple(same))
    assert said["before"]["same"] == 1
    assert said["after"]["same"] < 0.6
    assert said["trustworthiness"] == pytest.approx(trustworthiness(before, after, n_neighbors=10))
    assert compare_features(before, after, "scanner", ["x"] * 80)[1]["kept"] == said["kept"]
    with pytest.raises(ConfigError, match="too few"):
        compare_features(before[:9], after[:9], "scanner", ["x"] * 9)


def test_contexts_still_travel(folder, stained):
    import pickle

    card = read_card(stained["tiles"])
    context = Context("x", (), TissueSpec(), StoreSpec())
    assert pickle.loads(pickle.dumps((card, context))) == (card, context)
    assert read_cohort(folder / "cohort.csv")[1].stain == "H&E"


@pytest.fixture(scope="module")
def both(folder, stained) -> dict[str, Path]:
    """The bundles with a target for HE and one for PAS."""
    tiles = {stain: [picture(amounts(7), unit(RUIFROK[stain]), 7, 0.9)] for stain in ("he", "pas")}
    fits = {stain: target(fit_tiles(several, "vahadane", stain=stain), stain) for stain, several in tiles.items()}
    return {
        name: write_bundle(
            folder / f"both-{name}",
            read_card(stained[name]).model_copy(update={"name": f"both-{name}", "stain": fits}),
            load_weights(stained[name]),
        )
        for name in ("tiles", "crops")
    }


def test_of_several_targets_none_is_taken_for_a_row_that_says_no_stain(folder, stained, both, tmp_path):
    rows = ["slide_id,uri,modality,stain", "a,a.tif,,", "b,b.tif,he,", "c,c.tif,,PAS"]
    cohort, out = folder / "blank.csv", tmp_path / "out"
    cohort.write_text("\n".join(rows) + "\n")
    ended = {e.slide_id: e for e in run(spec(cohort, out, both["tiles"])).ended}
    assert {name: e.status for name, e in ended.items()} == {"a": "failed", "b": "done", "c": "done"}
    assert (ended["a"].code, "says neither stain nor modality" in ended["a"].message) == ("E_STAIN", True)
    assert "column `stain`" in ended["a"].next_step
    again, items = settings_of(out)  # as run.json tells it: what nobody said is still not said
    assert [item.says_stain for item in items] == [False, True, True]
    assert [e.code for e in run(again, items).ended] == ["E_STAIN", "", ""]
    cohort.write_text("\n".join([rows[0], "a,a.tif,,he", *rows[2:]]) + "\n")
    assert run(spec(cohort, out, both["tiles"])).counts["done"] == 3
    assert not list((out / "failures").glob("*.json"))
    (folder / "none.csv").write_text("slide_id,uri\na,a.tif\n")
    assert run(spec(folder / "none.csv", tmp_path / "one", stained["tiles"])).counts["done"] == 1  # one target only


def test_crops_that_say_no_stain_leave_their_pack_to_the_others(folder, both, tmp_path):
    (folder / "blank_crops.csv").write_text(
        "slide_id,uri,patient_id,modality\ncrop0,crop0.png,p0,he\ncrop1,crop1.png,p0,\ncrop2,crop2.png,p0,he\n"
    )
    result = run(spec(folder / "blank_crops.csv", tmp_path / "out", both["crops"]))
    assert [(e.slide_id, e.status, e.code) for e in result.ended] == [
        ("crop0", "done", ""),
        ("crop1", "failed", "E_STAIN"),
        ("crop2", "done", ""),
    ]


def test_a_training_of_several_stains_wants_each_row_to_say_its_own(job):
    said = [Item(slide_id="p", uri="p.tif", stain="PAS"), Item(slide_id="h", uri="h.tif", modality="he")]
    blank = [pickle.loads(pickle.dumps(Item(slide_id=f"s{i}", uri="s.tif"))) for i in range(2)]
    normalising = TrainJob.parse({**job, "stain": "reinhard"}, "test")
    with pytest.raises(ConfigError, match=r"E_STAIN: s0, s1 \(2 slides\)") as caught:
        check_stated(normalising, [*said, *blank])
    assert "column `stain`" in caught.value.step
    check_stated(normalising, said)
    check_stated(normalising, [said[1], *blank])  # all are HE
    check_stated(TrainJob.parse(job, "test"), [*said, *blank])  # nothing is normalised

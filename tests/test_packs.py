"""packs.py and units.py: thousands of crops in a handful of stores, each with an end of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slideflow_ray.accounting import read_run
from slideflow_ray.cohort import Item, read_cohort
from slideflow_ray.errors import BadDimensions
from slideflow_ray.events import ChunkScored
from slideflow_ray.models.bundle import load_weights, read_card, write_bundle
from slideflow_ray.packs import ROWS, broken_rows, pack_items
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec, WholeSpec
from slideflow_ray.store import SlideStore, verify


def write_crops(folder: Path, n: int, first: int = 0) -> None:
    """Crops of several sizes, each of one colour of its own with a brighter corner."""
    folder.mkdir(exist_ok=True)
    for i in range(first, first + n):
        size = (40 + i % 7, 40 + i % 5)
        pixels = np.full((size[1], size[0], 3), [i % 251, (i * 7) % 251, (i * 13) % 251], np.uint8)
        pixels[:5, :9] = 255
        Image.fromarray(pixels).save(folder / f"crop{i:05d}.png")


def write_table(folder: Path, n: int, more: str = "") -> Path:
    rows = [f"c{i},crop{i:05d}.png,p{i // 4},{'mspgn' if i % 2 else 'normal'},pas\n" for i in range(n)]
    path = folder / "cohort.csv"
    path.write_text("slide_id,uri,patient_id,label,modality\n" + "".join(rows) + more)
    return path


@pytest.fixture(scope="module")
def whole(bundles, tmp_path_factory) -> dict[str, Path]:
    """Two bundles of whole images: one squashes, one pads."""
    folder = tmp_path_factory.mktemp("whole")
    card, weights = read_card(bundles["aligned"]), load_weights(bundles["aligned"])
    for fit in ("squash", "pad"):
        own = card.model_copy(update={"name": fit, "mpp": None, "whole": fit, "tile_px": 32})
        write_bundle(folder / fit, own, weights)
    return {fit: folder / fit for fit in ("squash", "pad")}


def spec(cohort: Path, out: Path, *models: Path, **settings) -> RunSpec:
    values = {"cohort": str(cohort), "out": str(out), "model": [{"path": str(m)} for m in models]}
    return RunSpec.parse({**values, "executor": {"workers": 1}, "store": {"chunk_rows": 16}, **settings}, "test")


def score_of(out: Path, slide_id: str) -> float:
    ended = read_run(out)["outcomes"][slide_id]
    grid, model = ended["packed"][0]
    return float(SlideStore(out, ended["pack"]).read(f"scores/{grid}/{model}")[ended["row"], 1])


def test_every_crop_is_scored_as_if_alone(whole, tmp_path):
    write_crops(tmp_path, 40)
    result = run(spec(write_table(tmp_path, 40), tmp_path / "out", whole["squash"]))
    assert result.counts == {"done": 40, "failed": 0, "refused": 0}
    assert len({ended.pack for ended in result.ended}) == 1
    from slideflow_ray.models.scorer import load_scorer
    from slideflow_ray.profile import resolve
    from slideflow_ray.specs import ComputeSpec

    scorer = load_scorer(whole["squash"], resolve(ComputeSpec()))
    for i in (0, 17, 39):
        image = Image.open(tmp_path / f"crop{i:05d}.png").resize((32, 32), Image.Resampling.BILINEAR)
        alone = scorer.margins(np.asarray(image)[None])[0, 1]
        assert score_of(tmp_path / "out", f"c{i}") == alone
    assert verify(tmp_path / "out")[1] == []


def test_padding_keeps_the_shape_of_things(whole, tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    Image.fromarray(wide).save(tmp_path / "crop00000.png")
    run(spec(write_table(tmp_path, 1), tmp_path / "out", whole["pad"]))
    ended = read_run(tmp_path / "out")["outcomes"]["c0"]
    tile = SlideStore(tmp_path / "out", ended["pack"]).read(f"grids/{ended['packed'][0][0]}/tiles")[0]
    assert (tile[:9] == 255).all()
    assert (tile[12:20] == 0).all()
    assert (tile[23:] == 255).all()


def test_a_broken_crop_fails_alone_and_is_tried_again_by_itself(whole, tmp_path):
    write_crops(tmp_path, 20)
    data = (tmp_path / "crop00007.png").read_bytes()
    (tmp_path / "crop00007.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "crop00011.png").unlink()
    made = spec(write_table(tmp_path, 20), tmp_path / "out", whole["squash"])
    result = run(made)
    by_id = {ended.slide_id: ended for ended in result.ended}
    assert sum(ended.status == "done" for ended in result.ended) == 18
    assert by_id["c7"].status != "done"
    assert "crop00007.png" in by_id["c7"].message
    assert by_id["c11"].code == "E_NOT_FOUND"
    assert np.isfinite([score_of(tmp_path / "out", f"c{i}") for i in range(20) if i not in (7, 11)]).all()
    before = {p: p.read_bytes() for p in (tmp_path / "out/slides").rglob("*") if p.is_file()}
    events = []
    again = run(made, listen=events.append)
    assert again.counts == result.counts
    assert sum(event.tiles for event in events if isinstance(event, ChunkScored)) == 1
    assert all(path.read_bytes() == bytes_ for path, bytes_ in before.items())
    (tmp_path / "crop00007.png").write_bytes(data)
    assert run(made).counts["done"] == 19


def test_an_added_crop_changes_no_existing_pack(whole, tmp_path):
    write_crops(tmp_path, 30)
    run(spec(write_table(tmp_path, 20), tmp_path / "out", whole["squash"]))
    before = {p: p.read_bytes() for p in (tmp_path / "out/slides").rglob("*") if p.is_file()}
    events = []
    result = run(spec(write_table(tmp_path, 30), tmp_path / "out", whole["squash"]), listen=events.append)
    assert result.counts["done"] == 30
    assert sum(event.tiles for event in events if isinstance(event, ChunkScored)) == 10
    assert all(path.read_bytes() == data for path, data in before.items())


def test_an_edited_crop_alone_is_scored_again(whole, tmp_path):
    write_crops(tmp_path, 20)
    made = spec(write_table(tmp_path, 20), tmp_path / "out", whole["squash"])
    run(made)
    old = score_of(tmp_path / "out", "c3")
    Image.fromarray(np.full((50, 50, 3), 90, np.uint8)).save(tmp_path / "crop00003.png")
    events = []
    run(made, listen=events.append)
    assert sum(event.tiles for event in events if isinstance(event, ChunkScored)) == 1
    assert score_of(tmp_path / "out", "c3") != old


def test_packs_part_where_models_may(tmp_path):
    write_crops(tmp_path, 4)
    items = [
        Item(slide_id=f"c{i}", uri=str(tmp_path / f"crop{i:05d}.png"), stain="HE" if i < 2 else "PAS") for i in range(4)
    ]
    packed = pack_items(tmp_path / "out", items)
    assert sorted(len(pack.rows) for pack in packed.packs) == [2, 2]
    assert {packed.places["c0"][0], packed.places["c1"][0]} != {packed.places["c2"][0], packed.places["c3"][0]}


def test_a_pack_holds_at_most_1024_and_is_formed_once(tmp_path):
    write_crops(tmp_path, 1)
    for i in range(1, 2500):
        shutil.copy(tmp_path / "crop00000.png", tmp_path / f"crop{i:05d}.png")
    items = read_cohort(write_table(tmp_path, 2500))
    packed = pack_items(tmp_path / "out", items)
    assert sorted(len(pack.rows) for pack in packed.packs) == [2500 - 2 * ROWS, ROWS, ROWS]
    assert pack_items(tmp_path / "out", items).places == packed.places
    fewer = pack_items(tmp_path / "out", items[::2])
    assert all(fewer.places[item.slide_id] == packed.places[item.slide_id] for item in items[::2])
    assert {pack.slide_id for pack in fewer.packs} == {pack.slide_id for pack in packed.packs}


def test_few_files_for_many_crops(whole, tmp_path):
    write_crops(tmp_path, 300)
    run(spec(write_table(tmp_path, 300), tmp_path / "out", whole["squash"], store={}))
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) < 50, [str(p) for p in files]


def test_slides_and_crops_go_through_one_run(whole, bundles, marked, tmp_path):
    write_crops(tmp_path, 5)
    path = write_table(tmp_path, 5, f"slide,{marked / 'c.tif'},,,tem\n")
    models = [{"path": str(bundles["aligned"]), "where": {"modality": "tem"}}]
    models += [{"path": str(whole["squash"]), "where": {"modality": "pas"}}]
    result = run(spec(path, tmp_path / "out", model=models))
    ended = {e.slide_id: e for e in result.ended}
    assert result.counts["done"] == 6
    assert not ended["slide"].pack
    assert ended["slide"].tiles > 1
    assert ended["c0"].pack
    assert json.loads((tmp_path / "out/run.json").read_text())["outcomes"]["c4"]["row"] == 4


def test_crops_are_evaluated_by_their_labels_and_patients(whole, tmp_path):
    from sklearn.metrics import roc_auc_score

    from slideflow_ray.evaluate import evaluate

    write_crops(tmp_path, 80)
    path = write_table(tmp_path, 80)
    head, *rows = path.read_text().splitlines()
    split = [",val" if i // 4 % 2 else ",test" for i in range(80)]
    path.write_text("\n".join([head + ",split", *(row + s for row, s in zip(rows, split, strict=True))]) + "\n")
    names = {"mspgn": "tumor"}
    run(spec(path, tmp_path / "out", whole["squash"], labels={"names": names}))
    found = evaluate(tmp_path / "out")
    (test,) = [r for r in found.results if r.split == "test" and r.level == "slide"]
    tested = [i for i in range(80) if split[i] == ",test"]
    margins = [score_of(tmp_path / "out", f"c{i}") for i in tested]
    assert (test.positives, test.negatives, test.patients) == (20, 20, 10)
    assert test.auc == pytest.approx(roc_auc_score([i % 2 for i in tested], margins))


def test_a_changed_route_sends_an_image_to_its_new_model(whole, tmp_path):
    write_crops(tmp_path, 4)
    cohort = tmp_path / "cohort.csv"

    def routed(*stains: str) -> RunSpec:
        rows = "".join(f"c{i},crop{i:05d}.png,{s}\n" for i, s in enumerate(stains))
        cohort.write_text("slide_id,uri,stain\n" + rows)
        models = [{"path": str(whole[f]), "where": {"stain": s}} for f, s in (("squash", "x"), ("pad", "y"))]
        return spec(cohort, tmp_path / "out", model=models)

    run(routed("x", "x", "x", "x"))
    run(routed("x", "x", "y", "y"))
    names = {m["node"]: m["name"] for m in read_run(tmp_path / "out")["models"]}
    outcomes = read_run(tmp_path / "out")["outcomes"]
    used = [[names[node] for _, node in outcomes[f"c{i}"]["packed"]] for i in range(4)]
    assert used == [["squash"], ["squash"], ["pad"], ["pad"]]


def test_an_image_that_fails_is_tried_again_by_the_next_run(whole, tmp_path):
    write_crops(tmp_path, 3)
    whole_file = (tmp_path / "crop00001.png").read_bytes()
    (tmp_path / "crop00001.png").write_bytes(whole_file[:-40])
    made = spec(write_table(tmp_path, 3), tmp_path / "out", whole["squash"])
    first = {e.slide_id: e for e in run(made).ended}
    assert first["c1"].status == "failed"
    (tmp_path / "crop00001.png").write_bytes(whole_file)
    assert run(made).counts == {"done": 3, "failed": 0, "refused": 0}


def test_an_image_that_comes_back_is_scored_by_the_model_it_missed(whole, tmp_path):
    write_crops(tmp_path, 3)
    out, table = tmp_path / "out", write_table(tmp_path, 3)
    run(spec(table, out, whole["squash"]))
    all_rows = table.read_text()
    table.write_text(all_rows.replace(all_rows.splitlines()[1] + "\n", ""))
    run(spec(table, out, whole["squash"], whole["pad"]))
    table.write_text(all_rows)
    assert run(spec(table, out, whole["squash"], whole["pad"])).counts == {"done": 3, "failed": 0, "refused": 0}
    assert len(read_run(out)["outcomes"]["c0"]["packed"]) == 2


def test_an_image_too_large_for_one_piece_fails_alone(whole, tmp_path, monkeypatch):
    from slideflow_ray import packs

    write_crops(tmp_path, 3)
    Image.fromarray(np.zeros((300, 400, 3), np.uint8)).save(tmp_path / "crop00001.png")
    monkeypatch.setattr(packs, "MAX_PIXELS", 50 * 50)
    items = read_cohort(str(write_table(tmp_path, 3)))
    read = [packs.Row(item, "x") for item in items]
    fit = WholeSpec(tile_px=32, fit="squash")
    assert packs.read_image(read[0], fit).shape == (32, 32, 3)
    with pytest.raises(BadDimensions, match="read in one piece"):
        packs.read_image(read[1], fit)


def test_a_decoder_that_raises_anything_fails_one_image(whole, tmp_path, monkeypatch):
    from slideflow_ray import pipeline
    from slideflow_ray.execute.worker import Reader

    write_crops(tmp_path, 3)
    seen = []

    def read(row, fit):
        seen.append(row.item.slide_id)
        if row.item.slide_id == "c1":
            raise MemoryError
        return np.zeros((fit.tile_px, fit.tile_px, 3), np.uint8)

    monkeypatch.setattr(pipeline, "read_image", read)
    from slideflow_ray.execute import Failed, Task
    from slideflow_ray.pipeline import Context
    from slideflow_ray.profile import resolve
    from slideflow_ray.run import run_models
    from slideflow_ray.specs import ComputeSpec, StoreSpec, TissueSpec

    made = spec(write_table(tmp_path, 3), tmp_path / "out", whole["squash"])
    profile = resolve(ComputeSpec())
    context = Context(made.out, run_models(made, profile), TissueSpec(), StoreSpec(chunk_rows=16), (), profile)
    (pack,) = pack_items(tmp_path / "out", read_cohort(made.cohort)).packs
    reader = Reader(context)
    plan = reader.perform(Task("plan", pack.slide_id, pack))
    (chunk,) = plan.value.todo
    assert not isinstance(reader.read(Task("chunk", pack.slide_id, chunk)), Failed)
    broken = broken_rows(SlideStore(made.out, pack.slide_id), chunk.grid)
    assert seen == ["c0", "c1", "c2"]
    assert {row: why["code"] for row, why in broken.items()} == {1: "E_OUT_OF_MEMORY"}

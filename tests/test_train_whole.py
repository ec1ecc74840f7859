"""Training on whole images: crops packed as a run packs them, one label or several, alone, resumed and chosen."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_stain import amounts, picture, unit

from slideflow_ray import cli
from slideflow_ray.accounting import read_run
from slideflow_ray.cohort import Item
from slideflow_ray.errors import CohortError, ConfigError
from slideflow_ray.evaluate import evaluate
from slideflow_ray.models.bundle import load_weights, read_card
from slideflow_ray.models.networks import build
from slideflow_ray.packs import pack_items
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec, WholeSpec
from slideflow_ray.splits import write_items
from slideflow_ray.stain import RUIFROK, stain_numbers
from slideflow_ray.staining import pack_fits, read_fits
from slideflow_ray.store import SlideStore
from slideflow_ray.train import job as job_module
from slideflow_ray.train.choose import SearchSpec, search
from slideflow_ray.train.enlarge import enlarge
from slideflow_ray.train.images import image_labels, left_out
from slideflow_ray.train.job import prepare, train
from slideflow_ray.train.loop import best_of
from slideflow_ray.train.spec import TrainJob, read_job

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))
import table1

CLASSES = ("Normal", "MsPGN", "FSG", "CGN")
SIDE = 32


def crop(rng: np.random.Generator, marks: set[str]) -> Image.Image:
    """Grey grain; each lesion adds a bar of its own place and direction, so that lesions can be together."""
    pixels = rng.normal(150, 12, (SIDE + int(rng.integers(0, 6)), SIDE, 3))
    if "MsPGN" in marks:
        pixels[:, 2:9] -= 90
    if "FSG" in marks:
        pixels[2:9] += 80
    if "CGN" in marks:
        pixels[-10:-3, ::2] -= 90
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_crops(folder: Path, n: int, mixed: int = 0, stain: str = "") -> Path:
    """`n` crops of each class over nine patients, and `mixed` of FSG and CGN; 5:2:2 by patient."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for label, count in [*((name, n) for name in CLASSES), ("FSG+CGN", mixed)]:
        for i in range(count):
            name, patient = f"{label.replace('+', '-')}{i}", i % 9
            crop(rng, set(label.split("+"))).save(folder / f"{name}.png")
            split = "train" if patient < 5 else "val" if patient < 7 else "test"
            rows.append([name, f"{name}.png", f"p{patient}", split, label, stain or ("he", "pas")[i % 2]])
    with (folder / "cohort.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "uri", "patient_id", "split", "label", "stain"])
        writer.writerows(rows)
    return folder / "cohort.csv"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return write_crops(tmp_path_factory.mktemp("crops"), 18, 9)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    return write_crops(tmp_path_factory.mktemp("few"), 9)


def job_of(cohort: Path, out: Path, **settings) -> TrainJob:
    fit = {"epochs": 3, "lr": 3e-3, "threads": 1, "device": "cpu", "precision": "fp32", "augment": False}
    values = {
        "cohort": str(cohort),
        "out": str(out / "bundle"),
        "work": str(out / "work"),
        "classes": CLASSES,
        "whole": {"tile_px": SIDE, "fit": "squash"},
        "store": {"chunk_rows": 32},
        "executor": {"workers": 1},
        **settings,
        "fit": {"arguments": {"width": 8}, "batch_size": 16, **fit, **settings.get("fit", {})},
    }
    return TrainJob.parse(values, "test")


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    said = []
    return out, train(job_of(cohort, out, fit={"epochs": 8}), listen=said.append), said


def same(a: Path, b: Path) -> bool:
    one, other = load_weights(a), load_weights(b)
    return all(torch.equal(one[key], other[key]) for key in one)


def test_crops_are_learnt_and_the_card_has_no_scale(trained, cohort):
    _, result, said = trained
    card = read_card(result.bundle)
    assert (card.whole, card.mpp, card.tile_px, card.task) == ("squash", None, SIDE, "classify")
    assert result.best.val.accuracy > 0.9
    rows = list(csv.DictReader(cohort.read_text().splitlines()))
    single = {split: [r for r in rows if r["split"] == split and "+" not in r["label"]] for split in ("train", "val")}
    assert result.tiles == {split: len(mine) for split, mine in single.items()}
    record = json.loads((result.bundle / "training.json").read_text())
    for split, mine in single.items():  # nobody of the other side, though they lie in the same packs
        assert record["data"]["slide_ids"][split] == sorted(r["slide_id"] for r in mine)
        assert record["data"]["patients"][split] == sorted({r["patient_id"] for r in mine})
        assert record["tiles_by_class"][split] == Counter(r["label"] for r in mine)
    notes = [getattr(event, "text", "") for event in said]
    assert any("7 of several classes (FSG+CGN)" in note and "multilabel" in note for note in notes)


def test_pixels_and_labels_belong_together_and_test_crops_are_not_there(cohort, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(card, spec, train_, val, *_, **__):
        raise Stopped(train_, val)

    monkeypatch.setattr(job_module, "fit", stop)
    with pytest.raises(Stopped) as caught:
        train(job_of(cohort, tmp_path))
    rows = {r["slide_id"]: r for r in csv.DictReader(cohort.read_text().splitlines())}
    seen = {}
    for split, source in zip(("train", "val"), caught.value.args, strict=True):
        for pixels, labels, stains in source.batches(0, 7, 0):
            for tile, label, stain in zip(pixels, labels, stains, strict=True):
                seen[tile.tobytes()] = (split, CLASSES[label], ("he", "pas")[stain])
    expected = {}
    for row in rows.values():
        if row["split"] != "test" and "+" not in row["label"]:
            image = Image.open(cohort.parent / row["uri"]).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            expected[np.asarray(image).tobytes()] = (row["split"], row["label"], row["stain"])
    assert seen == expected


def test_a_killed_training_goes_on_as_if_nothing_had_been(cohort, tmp_path, monkeypatch):
    straight = train(job_of(cohort, tmp_path / "a"))
    real = job_module.save_epoch

    def die_after(root, progress):
        real(root, progress)
        if len(progress.history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(job_module, "save_epoch", die_after)
    with pytest.raises(KeyboardInterrupt):
        train(job_of(cohort, tmp_path / "b"))
    monkeypatch.setattr(job_module, "save_epoch", real)
    resumed = train(job_of(cohort, tmp_path / "b"))
    assert resumed.history == straight.history
    assert same(resumed.bundle, straight.bundle)
    assert not train(job_of(cohort, tmp_path / "b")).changed


def test_a_run_scores_crops_with_the_bundle_and_evaluates_four_classes(trained, cohort):
    out, result, _ = trained
    spec = {"cohort": str(cohort), "out": str(out / "run"), "model": [{"path": str(result.bundle)}]}
    done = run(RunSpec.parse({**spec, "executor": {"workers": 1}}, "test"))
    assert done.counts == {"done": 81, "failed": 0, "refused": 0}
    found = evaluate(out / "run", resamples=200)
    tests = {r.class_name: r for r in found.results if r.split == "test" and r.level == "tile"}
    assert set(tests) == set(CLASSES)
    rows = [r for r in csv.DictReader(cohort.read_text().splitlines()) if r["split"] == "test"]
    single = [r for r in rows if "+" not in r["label"]]
    margins_of = margins(out / "run")
    for place, (name, one) in enumerate((name, tests[name]) for name in CLASSES):
        truth = [r["label"] == name for r in single]
        scores = [margins_of[r["slide_id"]][place] for r in single]
        assert (one.positives, one.negatives) == (sum(truth), len(truth) - sum(truth))
        assert one.auc == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
        assert one.auc_interval is None or one.auc_interval[0] <= one.auc <= one.auc_interval[1]
    (table,) = (t for t in found.tables if t.split == "test")
    expected = np.zeros((4, 4), int)
    for row in single:
        expected[CLASSES.index(row["label"]), np.argmax(margins_of[row["slide_id"]])] += 1
    assert np.array(table.counts).tolist() == expected.tolist()
    judged = sum("+" in r["label"] for r in csv.DictReader(cohort.read_text().splitlines()) if r["split"] != "train")
    assert any(f"{judged} items of several classes have no single truth" in note for note in found.notes)


def margins(out: Path) -> dict[str, list[float]]:
    """The margins of every crop, from the packs' own stores."""
    found = {}
    for slide_id, ended in read_run(out)["outcomes"].items():
        ((grid, model),) = ended["packed"]
        found[slide_id] = SlideStore(out, ended["pack"]).read(f"scores/{grid}/{model}")[ended["row"]].tolist()
    return found


# several classes at once


def test_labels_of_several_classes_are_read_once_for_all():
    job = job_of(Path("c.csv"), Path("o"), task="multilabel", labels={"names": {"crescent": "CGN"}})
    items = [Item(slide_id=str(i), uri="x", label=label) for i, label in enumerate(["Normal", "fsg + Crescent", "?"])]
    expected = [[1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [-1, -1, -1, -1]]
    assert image_labels(job, [*items, None]).tolist() == expected
    single = job.model_copy(update={"task": "classify"})
    assert image_labels(single, [*items, None]).tolist() == [0, -1, -1, -1]


def test_a_slip_of_the_pen_in_several_labels_is_said():
    """`Crescnt` is no lesion, so it trains as none: that must not happen in silence."""
    job = job_of(Path("c.csv"), Path("o"), task="multilabel", labels={"names": {"crescent": "CGN"}})
    names = ["FSG+Crescnt", "FSG+crescent", "Normal", None]
    items = [Item(slide_id=f"i{i}", uri="u.png", label=name) for i, name in enumerate(names)]
    assert left_out(job, items) == "Labels that name no class are passed over, as none of them: Crescnt."
    assert left_out(job, items[1:]) == ""


def test_a_multilabel_network_finds_both_lesions(cohort, tmp_path):
    result = train(job_of(cohort, tmp_path, task="multilabel", fit={"epochs": 8}))
    assert read_card(result.bundle).task == "multilabel"
    assert result.best.val.accuracy > 0.9
    spec = {"cohort": str(cohort), "out": str(tmp_path / "run"), "model": [{"path": str(result.bundle)}]}
    run(RunSpec.parse({**spec, "executor": {"workers": 1}}, "test"))
    results = evaluate(tmp_path / "run", resamples=50).results
    found = {r.class_name: r for r in results if (r.split, r.level) == ("test", "tile")}
    rows = [r for r in csv.DictReader(cohort.read_text().splitlines()) if r["split"] == "test"]
    for name in CLASSES:
        assert found[name].positives == sum(name in r["label"].split("+") for r in rows)
        assert found[name].auc > 0.95


# more images, and the paper's own split


def test_the_training_split_alone_is_enlarged_and_written_once(few, tmp_path):
    cohort, said = few, []
    job = job_of(cohort, tmp_path, sample={"enlarge": 4}, fit={"epochs": 1})
    result = train(job, listen=said.append)
    rows = list(csv.DictReader(cohort.read_text().splitlines()))
    own = {r["slide_id"]: r for r in rows if r["split"] == "train"}
    single = [r for r in own.values() if "+" not in r["label"]]
    assert result.tiles["train"] == 5 * len(single)
    assert result.tiles["val"] == sum(r["split"] == "val" and "+" not in r["label"] for r in rows)
    record = json.loads((result.bundle / "training.json").read_text())["data"]
    assert set(record["patients"]["train"]) == {r["patient_id"] for r in own.values()}
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "enlarged").rglob("*.png")}
    assert len(written) == 4 * len(own)
    assert {path.stem.split("~")[0] for path in written} == set(own)
    prepare(job)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "enlarged").rglob("*.png")} == written
    assert any(f"{4 * len(own)} synthetic images beside {len(own)}" in getattr(e, "text", "") for e in said)


def test_a_copy_is_what_its_number_says(tmp_path):
    items = []
    for i, (label, stain) in enumerate([("a", "he"), ("a", "he"), ("b", "he"), ("a", "pas")]):
        pixels = np.full((16, 16, 3), 40 + 50 * i, np.uint8)
        pixels[:, :8] += 30
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        items.append(Item(slide_id=str(i), uri=str(tmp_path / f"{i}.png"), label=label, stain=stain, split="train"))
    copies = enlarge(items, 4, tmp_path / "more", WholeSpec(tile_px=16, fit="squash"), 0)
    assert [c.slide_id for c in copies[:5]] == ["0~1", "0~2", "0~3", "0~4", "1~1"]
    read = [np.asarray(Image.open(c.uri)).astype(int) for c in copies]
    own = [np.asarray(Image.open(i.uri)).astype(int) for i in items]
    for place, copy in enumerate(copies):
        i, kind = divmod(place, 4)
        assert (copy.label, copy.stain, copy.split, copy.patient) == (items[i].label, items[i].stain, "train", str(i))
        difference = read[place] - own[i]
        if kind == 0:  # turned: the colours stay, mirrored at the edge
            assert set(np.unique(read[place])) <= set(range(own[i].min(), own[i].max() + 1))
            assert np.abs(difference).max() > 20
        if kind == 1:
            assert 4 < difference.std() < 16
        if kind == 2 and i < 2:  # between the two of class a in HE, never of class b or PAS
            low, high = np.minimum(own[0], own[1]), np.maximum(own[0], own[1])
            assert ((read[place] >= low) & (read[place] <= high)).all()
        if kind == 2 and i >= 2:
            assert set(np.unique(read[place])) <= set(range(own[i].min(), own[i].max() + 1))
    taken = items[0].model_copy(update={"slide_id": "0~1"})
    with pytest.raises(CohortError, match="0~1"):
        enlarge([*items, taken], 1, tmp_path / "other", WholeSpec(tile_px=16, fit="squash"), 0)


def test_without_a_stain_the_modality_tells_what_may_be_mixed(tmp_path):
    """HE and PAS by the column `modality` alone: never mixed, on the fly or beforehand."""
    items = []
    for i, (stain, modality) in enumerate([(None, "he"), (None, "he"), (None, "pas"), ("PAS", "he"), ("H&E", "pas")]):
        Image.fromarray(np.full((16, 16, 3), 30 + 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
        about = {"stain": stain, "modality": modality, "label": "a", "split": "train", "patient_id": f"p{i}"}
        items.append(Item(slide_id=str(i), uri=str(tmp_path / f"{i}.png"), **about))
    assert stain_numbers(items) == {"he": 0, "pas": 1}
    copies = [c for c in enlarge(items, 3, tmp_path / "more", WholeSpec(tile_px=16, fit="squash"), 0) if "~3" in c.uri]
    partners = {0: {1, 4}, 1: {0, 4}, 2: {3}, 3: {2}, 4: {0, 1}}
    for i, copy in enumerate(copies):
        grey = int(np.asarray(Image.open(copy.uri))[0, 0, 0])
        between = [j for j in partners[i] if min(30 + 40 * i, 30 + 40 * j) <= grey <= max(30 + 40 * i, 30 + 40 * j)]
        assert between
        assert copy.original == items[i].uri
    job = job_of(tmp_path / "c.csv", tmp_path, classes=["a", "b"])
    write_items(tmp_path / "c.csv", items)
    chunks = prepare(job).chunks["train"]
    numbers = {row.item.slide_id: c.stain for c in chunks for row in c.chunk.item.rows}
    assert numbers == {"0": 0, "1": 0, "2": 1, "3": 1, "4": 0}


def test_copies_have_the_stains_of_their_originals(tmp_path):
    """The fit of a group is that of its originals, whether these lie in the same pack or not."""
    rng = np.random.default_rng(0)
    items = []
    for i in range(3):
        pixels = picture(amounts(i, 96), unit(RUIFROK["he"]), i)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        items.append(Item(slide_id=str(i), uri=str(tmp_path / f"{i}.png"), patient_id="p", label="a", split="train"))
    copies = enlarge(items, 4, tmp_path / "more", WholeSpec(tile_px=64, fit="squash"), int(rng.integers(9)))

    def fits(name, rows):
        [pack] = pack_items(tmp_path / name, rows).packs
        store = SlideStore(tmp_path / name, pack.slide_id)
        store.describe({"kind": "pack", "identity": pack.identity})
        return store, read_fits(str(tmp_path / name), pack.slide_id, pack_fits(store, pack, ("vahadane", 0.1))).rows

    alone = fits("alone", items)[1]
    assert set(fits("both", [*items, *copies])[1]) == set(alone)
    assert set(fits("copies", copies)[1]) == set(alone)
    plain = [copy.model_copy(update={"original": None}) for copy in copies]
    assert set(fits("plain", plain)[1]) != set(alone)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["paper-final", "ref19"])
def test_the_presets_train_on_small_crops(name, few, tmp_path):
    fit = {"weights": "random", "epochs": 2, "batch_size": 16, "threads": 1, "device": "cpu"}
    own = {"cohort": str(few), "out": str(tmp_path / "b"), "work": str(tmp_path / "w"), "classes": CLASSES}
    whole = {"tile_px": 32, "fit": "squash"}
    values = {**own, "preset": name, "whole": whole, "fit": fit, "executor": {"workers": 1}}
    result = train(read_job(values, "test")[0])
    assert len(result.history) == 2
    assert result.best_epoch == best_of(result.history, "accuracy")
    assert all(math.isfinite(epoch.train_loss) for epoch in result.history)
    assert read_card(result.bundle).arguments["variant"] == {"paper-final": "F", "ref19": "A"}[name]


def test_the_paper_s_split_leaks_and_says_so_everywhere(few, tmp_path):
    cohort = few
    split = {"parts": "6:2:2", "mode": "paper"}
    said = []
    job = job_of(cohort, tmp_path, split=split, sample={"enlarge": 2}, fit={"epochs": 1})
    result = train(job, listen=said.append)
    rows = list(csv.DictReader((tmp_path / "work" / "LEAKING_split.csv").read_text().splitlines()))
    assert len(rows) == 36 * 3
    assert "patient_id" not in rows[0]  # which would refuse the split, as it should
    of = {r["slide_id"]: r["split"] for r in rows}
    assert any(of[f"Normal{i}"] != of[f"Normal{i}~1"] for i in range(9))
    assert 0.57 < sum(s == "train" for s in of.values()) / len(of) < 0.63
    record = json.loads((result.bundle / "training.json").read_text())
    assert set(record["data"]["patients"]["train"]) & set(record["data"]["patients"]["val"])
    assert record["leaking"].startswith("LEAKING")
    assert result.summary().startswith("LEAKING")
    assert "LEAKING" in result.to_json()["leaking"]
    assert "LEAKING" in read_card(result.bundle).description
    assert any("LEAKING" in getattr(e, "text", "") for e in said)
    assert train(job).leaking  # known again
    clean = train(job_of(cohort, tmp_path / "clean", fit={"epochs": 1}))
    assert "leaking" not in json.loads((clean.bundle / "training.json").read_text())
    assert (clean.bundle / "curves.png").stat().st_size != (result.bundle / "curves.png").stat().st_size


def test_table_1_has_parameters_size_and_accuracy_of_each_architecture(few, tmp_path, capsys):
    text = f"""cohort = "{few}"
out = "{tmp_path / "best"}"
work = "{tmp_path / "work"}"
classes = ["Normal", "MsPGN", "FSG", "CGN"]
whole = {{tile_px = 32, fit = "squash"}}
[fit]
architecture = "se-resnet"
arguments = {{depth = [1, 1, 1, 1]}}
epochs = 1
threads = 1
"""
    (tmp_path / "train.toml").write_text(text)
    names = ["small-cnn", "timm:test_resnet", "se-resnet"]
    given = [str(tmp_path / "train.toml"), "--architectures", ",".join(names), "--out", str(tmp_path / "run")]
    assert table1.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("bundle") and "parameters (M)" in line)
    assert "test accuracy" in lines[head]
    found = json.loads((tmp_path / "run" / "compare.json").read_text())["bundles"]
    for name, line, one in zip(names, lines[head + 1 :], found, strict=False):
        weights = load_weights(one["path"])
        arguments = {"depth": [1, 1, 1, 1]} if name == "se-resnet" else {}
        count = sum(p.numel() for p in build(name, arguments, 4).parameters())
        size = sum(w.numel() * w.element_size() for w in weights.values())
        cells = line.split()
        assert cells[1:3] == [name, f"{count / 1e6:.2f}"] == [one["architecture"], f"{one['parameters'] / 1e6:.2f}"]
        assert float(cells[3]) == pytest.approx(size / 1e6, abs=0.1)
        accuracy = next(m for m in one["measured"] if m["level"] == "tile")["values"]["accuracy"]
        assert float(cells[4]) == pytest.approx(accuracy, abs=1e-4)


@pytest.mark.ray
@pytest.mark.soak
def test_settings_are_searched_on_whole_images(local_ray, few, tmp_path):
    spec = SearchSpec(lr=(1e-6, 1e-2), freeze=(0.0, 100.0), epochs=1)
    result, found = search(job_of(few, tmp_path, fit={"epochs": 1}), spec)
    assert [c.settings for c in found] == [{"lr": lr, "freeze": f} for lr in (1e-6, 1e-2) for f in (0.0, 100.0)]
    assert result.best.val.loss == pytest.approx(min(c.loss for c in found), abs=1e-6)


# what is refused


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"whole": None}, "either tile"),
        ({"tile": {"tile_px": 32, "mpp": 1.0}}, "either tile"),
        ({"sample": {"stride": {"FSG": 2}}}, "no neighbours"),
        ({"task": "segment"}, "needs tiles"),
        ({"whole": None, "tile": {"tile_px": 32, "mpp": 1.0}, "sample": {"enlarge": 4}}, "is for whole images"),
        ({"split": {"mode": "paper"}}, "needs parts"),
        ({"task": "multilabel", "fit": {"sampling": "balanced"}}, "one class for each tile"),
    ],
)
def test_what_makes_no_sense_of_whole_images_is_said(values, cause):
    with pytest.raises(ConfigError, match=cause):
        job_of(Path("c.csv"), Path("o"), **values)


def test_an_image_that_cannot_be_read_ends_the_training_and_is_named(cohort, tmp_path):
    shutil.copytree(cohort.parent, tmp_path / "bad")
    (tmp_path / "bad" / "FSG0.png").write_text("no image")
    with pytest.raises(ConfigError, match="FSG0: E_"):
        train(job_of(tmp_path / "bad" / "cohort.csv", tmp_path))


def test_the_command_line_trains_on_whole_images_of_several_classes(few, tmp_path, capsys, monkeypatch):
    jobs = []
    monkeypatch.setattr("slideflow_ray.cli.training._finish_training", lambda job, *_, **__: jobs.append(job))
    given = ["train", "--cohort", str(few), "--out", str(tmp_path / "b"), "--classes", "Normal,FSG", "--tile-px", "48"]
    for more in (["--whole", "pad", "--task", "multilabel"], ["--preset", "paper-final", "--whole", "squash"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*given, *more])
        assert not ended.value.code, capsys.readouterr().err
    assert [(job.whole, job.tile, job.task) for job in jobs] == [
        (WholeSpec(tile_px=48, fit="pad"), None, "multilabel"),
        (WholeSpec(tile_px=48, fit="squash"), None, "classify"),
    ]
    assert jobs[1].fit.architecture == "se-resnet"

"""What pre-training is worth: the cells of the table, which labels they are given, and what they come to."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import stats

from slideflow_ray.errors import ConfigError
from slideflow_ray.evaluate import evaluate
from slideflow_ray.models.bundle import load_weights, read_card
from slideflow_ray.phantoms.tem import CLASSES, write_tem_cohort
from slideflow_ray.results import read_evaluation
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec
from slideflow_ray.train import transfer as module
from slideflow_ray.train.job import card_of, prepare, train
from slideflow_ray.train.spec import TrainJob
from slideflow_ray.train.transfer import Cell, Table, TransferSpec, dice_of, shared, t_interval, transfer, write
from slideflow_ray.train.weights import Start, familiar

FIT = {"architecture": "unet", "arguments": {"levels": 1, "width": 4}, "epochs": 1, "batch_size": 8, "lr": 1e-2}
FIT |= {"threads": 1, "device": "cpu", "precision": "fp32", "class_weights": "none", "augment": False}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainJob:
    folder = tmp_path_factory.mktemp("transfer")
    cohort = write_tem_cohort(folder / "tem", patients=10, images=2, size_px=(96, 80), nm_per_px=24.0)
    values = {
        "cohort": str(cohort),
        "out": str(folder / "bundle"),
        "work": str(folder / "work"),
        "classes": CLASSES,
        "task": "segment",
        "tile": {"tile_px": 72, "mpp": 0.024, "halo_px": 12, "min_tissue": 0.0},
        "tissue": {"rule": "everything"},
        "executor": {"workers": 1},
        "fit": FIT,
    }
    return TrainJob.parse(values, "test")


@pytest.fixture(scope="module")
def data(job):
    return prepare(job, splits=("train", "val", "test"))


SPEC = TransferSpec(methods=("random", "usregcon"), shares=(10, 100), seeds=2, pretrain={"epochs": 1, "batch_size": 8})


@pytest.fixture(scope="module")
def table(job, data) -> Table:
    return transfer(job, SPEC)


def slides(chunks) -> set[str]:
    return {c.chunk.item.slide_id for c in chunks}


# labels


def test_shares_are_nested_have_every_class_and_show_as_many_tiles(data):
    chunks = data.chunks["train"]
    every = len(data.source("train"))
    seen = []
    for seed in range(3):
        parts = [shared(chunks, share, seed) for share in (0.01, 0.25, 0.5, 1.0)]
        assert [len(slides(p)) for p in parts] == [1, 3, 6, 12]
        for small, large in itertools.pairwise(parts):
            assert slides(small) < slides(large)
        for part in parts:
            assert sum(c.areas[c.used].sum(0) for c in part).all()
            shown = sum(float(c.times[c.used].sum()) for c in part)
            assert shown == pytest.approx(every)
        seen.append(tuple(sorted(slides(parts[1]))))
    assert len(set(seen)) > 1
    assert slides(shared(chunks, 0.25, 1)) == slides(shared(chunks, 0.25, 1))


def test_a_class_that_the_first_slide_lacks_comes_with_the_next():
    areas = {"a": np.array([5, 1, 0]), "b": np.array([5, 0, 0]), "c": np.array([1, 0, 2])}
    assert module._covering(["b", "a", "c"], areas) == ["a", "c", "b"]
    assert module._covering(["b", "c"], {"b": np.array([1, 0]), "c": np.array([1, 0])}) == ["b", "c"]


# cells


def test_every_cell_is_there_and_gains_are_paired(table):
    keys = [(c.method, c.share, c.seed) for c in table.cells]
    assert keys == [(m, s, i) for m in ("random", "usregcon") for s in (10, 100) for i in (0, 1)]
    assert {c.slides for c in table.cells if c.share == 10} == {1}
    assert all(set(c.dice) == set(CLASSES[1:]) for c in table.cells)
    (ten, hundred) = table.gains
    by = {(c.method, c.share, c.seed): c.mean for c in table.cells}
    each = [by["usregcon", 10, i] - by["random", 10, i] for i in (0, 1)]
    assert ten.each == pytest.approx(each)
    assert ten.mean == pytest.approx(sum(each) / 2)
    assert (hundred.method, hundred.share) == ("usregcon", 100)


def test_what_is_done_is_not_trained_again_and_the_files_say_it(table, job, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "fit", never)
    again = transfer(job, SPEC)
    assert again == table
    with pytest.raises(AssertionError):
        transfer(job.model_copy(update={"fit": job.fit.model_copy(update={"lr": 0.02})}), SPEC)
    paths = {path.name: path for path in write(again, tmp_path)}
    rows = list(csv.DictReader(paths["transfer.csv"].read_text().splitlines()))
    assert [(r["method"], float(r["labels_percent"])) for r in rows] == [
        ("random", 10), ("random", 100), ("usregcon", 10), ("usregcon", 100),
    ]  # fmt: skip
    found = json.loads(paths["transfer.json"].read_text())
    mean = np.mean([c.dice["membrane"] for c in table.cells if (c.method, c.share) == ("random", 100)])
    assert found["table"][1]["dice_membrane"] == pytest.approx(mean)
    assert f"{100 * mean:.2f} ±" in paths["transfer.txt"].read_text()


def test_seeds_have_student_s_interval():
    values = [0.01, 0.03, -0.005, 0.02, 0.04]
    wanted = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx(wanted)
    assert t_interval([0.3]) is None
    cells = [Cell("random", 5, i, 2, {"a": 0.5, "b": 0.5}) for i in range(5)]
    cells += [Cell("simclr", 5, i, 2, {"a": 0.5 + v, "b": 0.5 + v}) for i, v in enumerate(values)]
    (gain,) = Table(tuple(cells)).gains
    assert "pre-trained once" in Table(tuple(cells)).summary()
    assert "pre-trained once" in Table(tuple(cells)).to_json()["intervals"]
    assert gain.interval == pytest.approx(wanted)
    assert math.isclose(gain.mean, np.mean(values))
    assert f"+1.90 ({100 * wanted[0]:+.2f} to {100 * wanted[1]:+.2f})" in Table(tuple(cells)).summary()


def test_a_class_that_is_nowhere_has_no_dice_and_the_cell_is_kept(job, data, tmp_path, monkeypatch):
    """The last class is in no mask of test and never called: null in the cell, a dash in the table."""
    counted = module._counted

    def without_last(*told):
        return np.r_[counted(*told)[:-1], np.zeros((1, 3), np.int64)]

    monkeypatch.setattr(module, "_counted", without_last)
    job = job.model_copy(update={"work": str(tmp_path)})
    nowhere = CLASSES[-1]
    works = [module._Work(job, card_of(job), data, Start(None, "random"), m, 100, 0) for m in ("random", "simclr")]
    cells = module._worked_off(works, 1, lambda event: None)
    assert json.loads(works[0].path.read_text())["dice"][nowhere] is None
    assert cells[0].mean == pytest.approx(np.mean([v for v in cells[0].dice.values() if v is not None]))
    table = Table(tuple(cells))
    paths = write(table, tmp_path / "table")
    assert json.loads(paths[0].read_text())["table"][0][f"dice_{nowhere}"] is None
    assert f" {'-':>15}" in table.summary()
    assert table.gains[0].mean == 0


def test_gains_are_of_classes_that_both_have():
    one = Cell("random", 5, 0, 2, {"a": 0.5, "b": None})
    two = Cell("simclr", 5, 0, 2, {"a": 0.7, "b": 0.0})
    (gain,) = Table((one, two)).gains
    assert gain.mean == pytest.approx(0.2)
    nothing = Cell("simclr", 5, 0, 2, {"a": None, "b": 0.0})
    assert Table((one, nothing)).gains == ()
    assert "gain" in Table((one, nothing)).summary()


def unlabelled(job, tmp_path, change):
    """The cohort's rows as one to pre-train on: none says a split, and `change` takes the row for another one."""
    here = Path(job.cohort).parent
    rows = list(csv.DictReader(Path(job.cohort).read_text().splitlines()))
    made = [{"slide_id": f"u{r['slide_id']}", "uri": str(here / r["uri"]), "split": r["split"],
             "patient_id": r["patient_id"], "mpp": r.get("mpp") or "0.024"} for r in rows]  # fmt: skip
    kept = [found for row in made if (found := change(row))]
    path = tmp_path / "unlabelled.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, kept[0])
        writer.writeheader()
        writer.writerows(kept)
    return path


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("by", ["patient", "file", "file elsewhere"])
def test_nothing_is_learnt_of_those_who_judge(job, tmp_path, split, by, monkeypatch):
    """An unlabelled cohort without splits names patients of val or test, or their files by another name or place."""
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("trained"))

    def change(row):
        if row["split"] not in ("train", split):
            return None
        row = {key: value for key, value in row.items() if key != "split"}
        if by != "patient":
            row["patient_id"] = f"u{row['patient_id']}"
        if by == "patient":
            row["uri"] = str(other)
        elif by == "file elsewhere":
            link = tmp_path / f"{row['slide_id']}.tif"
            link.symlink_to(row["uri"])
            row["uri"] = str(link)
        return row

    other = tmp_path / "other.tif"
    tifffile.imwrite(other, np.zeros((96, 80), np.uint8))
    spec = SPEC.model_copy(update={"cohort": str(unlabelled(job, tmp_path, change))})
    with pytest.raises(
        ConfigError, match=f"2 patients of split {split}" if by == "patient" else f"4 files of split {split}"
    ):
        transfer(job, spec)


def test_a_copy_of_a_file_of_test_is_found_by_what_the_pretraining_read(job, data, tmp_path):
    record = {"data": {"patients": {"train": ["x"]}, "slides": {"train": sorted(data.people["test"].files)[:1]}}}
    (tmp_path / "training.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="trained on 1 files of this training's test split"):
        familiar(str(tmp_path / "weights.safetensors"), data.people)


def test_dice_is_that_of_an_evaluated_run(job, data, tmp_path):
    result = train(job, data=data)
    card = read_card(result.bundle)
    found = dice_of(card, load_weights(result.bundle), data.source("test"), job.fit)
    spec = {"cohort": job.cohort, "out": str(tmp_path / "out"), "model": [{"path": str(result.bundle)}]}
    spec |= {"tissue": {"rule": "everything"}, "compute": {"precision": "fp32"}, "executor": {"workers": 1}}
    run(RunSpec.parse(spec, "test"))
    evaluate(tmp_path / "out", resamples=50)
    judged = {o.class_name: o.dice.mean for o in read_evaluation(tmp_path / "out").overlaps if o.split == "test"}
    assert found == pytest.approx(judged, abs=2e-3)
    assert max(found.values()) > 0


def test_what_makes_no_table_is_said(job, monkeypatch):
    with pytest.raises(ConfigError, match="random"):
        TransferSpec.parse({"methods": ["usregcon"]}, "test")
    monkeypatch.setattr(module, "prepare", lambda *_: pytest.fail("tiled"))
    with pytest.raises(ConfigError, match="nobody has trained it on ImageNet"):
        transfer(job, SPEC.model_copy(update={"methods": ("random", "simclr", "imagenet")}))
    with pytest.raises(ConfigError, match="segmentations"):
        transfer(job.model_copy(update={"task": "classify"}), SPEC)


def test_pre_trainings_side_by_side_leave_the_bytes_of_one_after_the_other(job, tmp_path):
    spec = SPEC.model_copy(update={"methods": ("random", "usregcon", "simclr"), "shares": (100,), "seeds": 1})
    said: list[str] = []
    found = {}
    for at_once in (1, 2):
        mine = job.model_copy(update={"work": str(tmp_path / str(at_once))})
        transfer(mine, spec.model_copy(update={"at_once": at_once}), lambda e: said.append(getattr(e, "text", "")))
        weights = sorted((tmp_path / str(at_once) / "transfer").glob("*/weights.safetensors"))
        found[at_once] = {path.parent.name: path.read_bytes() for path in weights}
    assert set(found[1]) == {"usregcon", "simclr"}
    assert found[2] == found[1]
    assert "Pre-training by usregcon, simclr, 2 at a time" in said

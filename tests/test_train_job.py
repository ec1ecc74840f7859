"""train/job.py and train/tiles.py: which tiles are trained on, each once, and what is refused."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from slideflow_ray.accounting import read_run
from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError, SplitLeakError
from slideflow_ray.events import EpochTrained
from slideflow_ray.models.bundle import read_card
from slideflow_ray.phantoms import write_cohort
from slideflow_ray.pipeline import Chunk, Context
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec, StoreSpec, TileSpec, TissueSpec
from slideflow_ray.store import SlideStore
from slideflow_ray.train import job as job_module
from slideflow_ray.train import tiles as tiles_module
from slideflow_ray.train.job import train
from slideflow_ray.train.spec import TrainJob
from slideflow_ray.train.tiles import ChunkTiles, LabelledChunk, class_indices

TILE = TileSpec(tile_px=8, mpp=0.5)


@pytest.fixture
def source(tmp_path) -> ChunkTiles:
    """Two slides of 2 and 1 chunks; tile i is all of value i, its label is i % 3 - 1 (-1 is unknown)."""
    context = Context(str(tmp_path), (), TissueSpec(), StoreSpec(chunk_rows=16), (TILE,))
    chunks, first = [], 0
    for name, n in (("a", 27), ("b", 9)):
        store = SlideStore(tmp_path, name)
        store.create_rows("grids/g/tiles", (n, 8, 8, 3), np.uint8, 16, fill=0, sharded=True)
        for index in range(-(-n // 16)):
            values = np.arange(first, first + min(16, n - 16 * index), dtype=np.uint8)
            first += len(values)
            tiles = np.broadcast_to(values[:, None, None, None], (len(values), 8, 8, 3))
            store.write_chunk("grids/g/tiles", index, np.ascontiguousarray(tiles))
            chunk = Chunk(Item(slide_id=name, uri=name), "g", TILE, index, len(values), ())
            chunks.append(LabelledChunk(chunk, values.astype(np.int64) % 3 - 1))
    return ChunkTiles(context, chunks)


def order(source: ChunkTiles, epoch: int, seed: int = 0, batch: int = 5) -> list[int]:
    seen = []
    for pixels, labels, _ in source.batches(epoch, batch, seed):
        values = pixels[:, 0, 0, 0].astype(np.int64)
        np.testing.assert_array_equal(values % 3 - 1, labels)
        seen += values.tolist()
    return seen


@pytest.mark.parametrize("buffer_bytes", [1, 8 * 8 * 3 * 16 * 2, 2**20])
def test_every_labelled_tile_comes_once_and_unknown_ones_never(source, buffer_bytes):
    source.buffer_bytes = buffer_bytes
    known = [i for i in range(36) if i % 3]
    assert len(source) == len(known)
    assert Counter(source.labels().tolist()) == {0: 12, 1: 12}
    assert sorted(order(source, epoch=0)) == known


def test_the_order_is_the_seed_s_and_the_epoch_s(source):
    assert order(source, 0) == order(source, 0)
    assert order(source, 0) != order(source, 1)
    assert order(source, 0, seed=0) != order(source, 0, seed=1)
    assert order(source, 0) != sorted(order(source, 0))


@pytest.mark.parametrize(("buffer_bytes", "times"), [(2 * 36 * 8 * 8 * 3, 1), (2 * 36 * 8 * 8 * 3 - 2, 2)])
def test_what_fits_half_of_the_buffer_is_read_once(source, buffer_bytes, times, monkeypatch):
    read = Counter()

    def counted(context, chunk, *more):
        read[chunk.item.slide_id, chunk.index] += 1
        return real(context, chunk, *more)

    real = tiles_module.read_chunk
    monkeypatch.setattr(tiles_module, "read_chunk", counted)
    source.buffer_bytes = buffer_bytes
    sent = len(pickle.dumps(source))
    assert order(source, 0) != order(source, 1)
    assert read == {("a", 0): times, ("a", 1): times, ("b", 0): times}
    assert len(pickle.dumps(source)) - sent < 100, "pixels are sent along to workers"


def test_slides_are_mixed_within_a_batch(source):
    first_batch = {value >= 27 for value in order(source, 0, batch=24)}
    assert first_batch == {True, False}


def test_class_indices_know_what_is_unknown():
    labels = np.array([[1, 0], [0, 1], [-1, -1], [0, 0]], np.int8)
    assert class_indices(labels).tolist() == [0, 1, -1, -1]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("train"), slides=9, seed=3, size_px0=(1024, 768))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Where the cohort's tiles are cut, once for the tests that may share them."""
    return tmp_path_factory.mktemp("work")


def read_rows(cohort: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(cohort.read_text().splitlines()))


def make(cohort: Path, out: Path, **settings) -> TrainJob:
    values = {
        "cohort": str(cohort),
        "out": str(out / "bundle"),
        "work": str(out / "work"),
        "classes": ("normal", "tumor"),
        "tile": {"tile_px": 32, "mpp": 1.0},
        "fit": {"epochs": 1, "threads": 1},
    }
    return TrainJob.parse({**values, **settings}, "test")


def test_training_sees_the_train_split_judges_on_val_and_never_opens_test(cohort, tmp_path, monkeypatch):
    seen = {"train": set(), "val": set()}

    def read(context, chunk, *more):
        seen[chunk.item.split].add(chunk.item.slide_id)
        return real(context, chunk, *more)

    real = tiles_module.read_chunk
    monkeypatch.setattr(tiles_module, "read_chunk", read)
    events = []
    result = train(make(cohort, tmp_path), listen=events.append)
    lines = [line.split(",") for line in cohort.read_text().splitlines()[1:]]
    by_split = {split: {row[0] for row in lines if split in row} for split in ("train", "val", "test")}
    assert seen == {"train": by_split["train"], "val": by_split["val"]}
    assert not by_split["test"] & {path.stem for path in (tmp_path / "work/slides").iterdir()}
    assert read_card(result.bundle).classes == ("normal", "tumor")
    assert [e.epoch for e in events if isinstance(e, EpochTrained)] == [1]


def test_one_file_in_two_splits_is_refused_before_a_step_is_made(cohort, tmp_path):
    folder = tmp_path / "leak"
    shutil.copytree(cohort.parent, folder)
    lines = (folder / "cohort.csv").read_text().splitlines()
    of = {split: next(line.split(",")[1] for line in lines if f",{split}," in line) for split in ("train", "val")}
    shutil.copy(folder / of["train"], folder / of["val"])
    with pytest.raises(SplitLeakError, match="file sha256"):
        train(make(folder / "cohort.csv", tmp_path))
    assert not (tmp_path / "bundle").exists()


def test_a_slide_that_cannot_be_read_ends_the_training_and_is_named(cohort, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(cohort.parent, folder)
    slide = next(line.split(",")[1] for line in (folder / "cohort.csv").read_text().splitlines() if ",train," in line)
    (folder / slide).write_text("not a slide")
    with pytest.raises(ConfigError, match=f"{Path(slide).stem}: E_NOT_A_SLIDE"):
        train(make(folder / "cohort.csv", tmp_path))


def test_a_cohort_without_a_train_split_is_refused(cohort, tmp_path):
    text = cohort.read_text().replace(",train,", ",test,")
    path = cohort.parent / "no_train.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no rows with split = train"):
        train(make(path, tmp_path))


def test_no_class_named_like_an_annotation_is_refused(cohort, tmp_path):
    with pytest.raises(ValueError, match="tumor"):
        train(make(cohort, tmp_path, classes=("benign", "malignant")))


def test_a_test_slide_that_is_a_training_slide_is_refused_though_it_is_not_read(cohort, tmp_path):
    folder = tmp_path / "leak"
    shutil.copytree(cohort.parent, folder)
    lines = (folder / "cohort.csv").read_text().splitlines()
    of = {split: next(line.split(",")[1] for line in lines if f",{split}," in line) for split in ("train", "test")}
    shutil.copy(folder / of["train"], folder / of["test"])
    with pytest.raises(SplitLeakError, match="file sha256"):
        train(make(folder / "cohort.csv", tmp_path))


def test_a_split_of_the_job_s_own_takes_the_place_of_the_column(cohort, tmp_path, work, monkeypatch):
    monkeypatch.setattr(job_module, "fit", stop)
    with pytest.raises(Stopped) as caught:
        train(make(cohort, tmp_path, work=str(work), split={"folds": 3, "fold": 1}))
    ids = {source: {c.chunk.item.slide_id for c in caught.value.args[source].chunks} for source in (0, 1)}
    rows = {row["slide_id"]: row for row in read_rows(cohort)}
    patients = [{rows[name]["patient_id"] for name in ids[i]} for i in (0, 1)]
    assert patients[0]
    assert patients[1]
    assert not patients[0] & patients[1]
    assert {rows[name]["split"] for name in ids[0]} > {"train"}  # not the column's


class Stopped(Exception):
    pass


def stop(card, spec, train, val, *_, **__):
    raise Stopped(train, val)


def test_strides_thin_the_training_split_alone(cohort, tmp_path, work, monkeypatch):
    monkeypatch.setattr(job_module, "fit", stop)
    counts = {}
    for name, sample in (("all", {}), ("thin", {"stride": {"normal": 3}})):
        with pytest.raises(Stopped) as caught:
            train(make(cohort, tmp_path, work=str(work), sample=sample))
        counts[name] = [Counter(source.labels().tolist()) for source in caught.value.args]
    assert counts["thin"][0][0] < counts["all"][0][0] / 5
    assert counts["thin"][0][1] == counts["all"][0][1]
    assert counts["thin"][1] == counts["all"][1]


def test_what_a_training_leaves_and_that_it_is_not_done_twice(cohort, tmp_path, work):
    job = make(cohort, tmp_path, work=str(work), fit={"epochs": 2, "threads": 1, "sampling": "balanced"})
    result = train(job)
    record = json.loads((result.bundle / "training.json").read_text())
    rows = read_rows(cohort)
    for split in ("train", "val"):
        assert record["data"]["slide_ids"][split] == sorted(r["slide_id"] for r in rows if r["split"] == split)
        assert record["data"]["patients"][split] == sorted({r["patient_id"] for r in rows if r["split"] == split})
    slide = cohort.parent / next(r["uri"] for r in rows if r["split"] == "train")
    assert f"sha256:{hashlib.sha256(slide.read_bytes()).hexdigest()}" in record["data"]["slides"]["train"]
    assert record["settings"]["fit"]["seed"] == 0
    assert torch.__version__.startswith(record["software"]["torch"])
    lines = [json.loads(line) for line in (result.bundle / "metrics.jsonl").read_text().splitlines()]
    assert [line["val_loss"] for line in lines] == [epoch["val_loss"] for epoch in record["epochs"]]
    assert (result.bundle / "curves.png").read_bytes().startswith(b"\x89PNG")
    (folder,) = (work / "trainings").glob(f"bundle-{record['digest']}")
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert not list(folder.glob("epoch-*"))
    by_class = record["tiles_by_class"]["train"]
    assert record["tiles"]["train"] == pytest.approx(2 * max(by_class.values()), abs=1)
    again = train(job)
    assert not again.changed
    assert again.history == result.history
    with pytest.raises(ConfigError, match="another training"):
        train(make(cohort, tmp_path, work=str(work), fit={"epochs": 1, "threads": 1}))


def test_hard_tiles_of_a_run_come_more_often(cohort, tmp_path, work, monkeypatch):
    bundle = train(make(cohort, tmp_path, work=str(work))).bundle
    spec = {"cohort": str(cohort), "out": str(tmp_path / "run"), "model": [{"path": str(bundle)}]}
    run(RunSpec.parse(spec, "test"))
    monkeypatch.setattr(job_module, "fit", stop)
    job = make(
        cohort,
        tmp_path / "b",
        work=str(work),
        sample={"mine": {"run": str(tmp_path / "run"), "times": 5}},
    )
    notes = []
    with pytest.raises(Stopped) as caught:
        train(job, listen=lambda event: notes.append(getattr(event, "text", "")))
    hard = total = 0
    for c in caught.value.args[0].chunks:
        store = SlideStore(tmp_path / "run", c.chunk.item.slide_id)
        ((grid, node),) = read_run(tmp_path / "run")["outcomes"][c.chunk.item.slide_id]["grids"]
        assert grid == c.chunk.grid  # the run's boxes are the training's here, row for row
        margins = store.read(f"scores/{grid}/{node}")[c.chunk.index * 1024 :][: len(c.labels)]
        wrong = (margins.argmax(axis=1) != c.labels) & (c.labels >= 0)
        np.testing.assert_array_equal(c.times[c.labels >= 0], np.where(wrong, 5, 1)[c.labels >= 0])
        hard += int(wrong.sum())
        total += int((c.labels >= 0).sum())
    assert 0 < hard < total
    assert any(note.startswith(f"{hard} of {total} training tiles are hard") for note in notes)
    other = make(cohort, tmp_path / "b", work=str(work), tile={"tile_px": 40, "mpp": 1.0}, sample=job.sample)
    with pytest.raises(ConfigError, match="scored none of the training tiles"):
        train(other)


@pytest.mark.data
def test_on_breakhis_held_out_patients_are_never_read(data, tmp_path, monkeypatch):
    cohort = data / "breakhis" / "cohort.csv"
    rows = read_rows(cohort)
    held_out = {row["slide_id"] for row in rows if row["split"] == "test"}
    assert held_out
    read = []
    real = tiles_module.read_chunk

    def spy(context, chunk, *more):
        read.append(chunk.item)
        return real(context, chunk, *more)

    monkeypatch.setattr(tiles_module, "read_chunk", spy)
    values = {
        "cohort": str(cohort),
        "out": str(tmp_path / "bundle"),
        "work": str(tmp_path / "work"),
        "classes": ("benign", "malignant"),
        "tile": {"tile_px": 64, "mpp": 1.0},
        "fit": {"epochs": 2, "threads": 1, "sampling": "balanced"},
    }
    record = json.loads((train(TrainJob.parse(values, "test")).bundle / "training.json").read_text())
    assert read
    assert not {item.slide_id for item in read} & held_out
    assert not {path.name.removesuffix(".zarr") for path in (tmp_path / "work/slides").iterdir()} & held_out
    patients = {row["patient_id"] for row in rows if row["split"] == "test"}
    assert not patients & {name for several in record["data"]["patients"].values() for name in several}

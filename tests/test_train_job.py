"""train/job.py and train/tiles.py: which tiles are trained on, each once, and what is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError, SplitLeakError
from slideflow_ray.events import EpochTrained
from slideflow_ray.models.bundle import read_card
from slideflow_ray.phantoms import write_cohort
from slideflow_ray.pipeline import Chunk, Context
from slideflow_ray.specs import StoreSpec, TileSpec, TissueSpec
from slideflow_ray.store import SlideStore
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


def test_slides_are_mixed_within_a_batch(source):
    first_batch = {value >= 27 for value in order(source, 0, batch=24)}
    assert first_batch == {True, False}


def test_class_indices_know_what_is_unknown():
    labels = np.array([[1, 0], [0, 1], [-1, -1], [0, 0]], np.int8)
    assert class_indices(labels).tolist() == [0, 1, -1, -1]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("train"), slides=9, seed=3, size_px0=(1024, 768))


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

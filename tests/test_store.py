"""store.py: whole chunks, commits that notice every flipped byte, names that always fit."""

from __future__ import annotations

import numpy as np
import pytest

from slideflow_ray import store as store_module
from slideflow_ray.errors import CorruptStore, StoreError
from slideflow_ray.store import SlideStore, folder_name, stores, tree_digest


@pytest.fixture
def store(tmp_path) -> SlideStore:
    made = SlideStore(tmp_path, "s1")
    made.describe({"uri": "x"})
    return made


def test_rows_come_back_and_chunks_todo_shrinks(store):
    store.create_rows("scores/g/m", (10, 2), np.float32, 4, fill=float("nan"))
    assert store.chunks_todo("scores/g/m") == [0, 1, 2]
    store.write_chunk("scores/g/m", 2, np.full((2, 2), 7, np.float32))
    store.write_chunk("scores/g/m", 0, np.arange(8, dtype=np.float32).reshape(4, 2))
    assert store.chunks_todo("scores/g/m") == [1]
    np.testing.assert_array_equal(store.read("scores/g/m", 0), np.arange(8).reshape(4, 2))
    np.testing.assert_array_equal(store.read("scores/g/m", 2), np.full((2, 2), 7))


def test_a_missing_chunk_is_an_error_and_never_fill_values(store):
    store.create_rows("scores/g/m", (10, 2), np.float32, 4, fill=float("nan"))
    with pytest.raises(CorruptStore, match="cannot be read"):
        store.read("scores/g/m")


def test_a_chunk_equal_to_the_fill_value_is_stored(store):
    store.create_rows("grids/g/tiles", (20, 4, 4, 3), np.uint8, 16, fill=0, sharded=True)
    store.write_chunk("grids/g/tiles", 0, np.zeros((16, 4, 4, 3), np.uint8))
    assert store.chunks_todo("grids/g/tiles") == [1]
    store.write_chunk("grids/g/tiles", 0, np.zeros((16, 4, 4, 3), np.uint8))  # a retry must not delete the key
    assert store.chunks_todo("grids/g/tiles") == [1]


def test_a_wrong_number_of_rows_is_refused(store):
    store.create_rows("scores/g/m", (10, 2), np.float32, 4, fill=float("nan"))
    with pytest.raises(StoreError, match="wants"):
        store.write_chunk("scores/g/m", 2, np.zeros((4, 2), np.float32))


def test_an_empty_array_commits(store):
    store.write_array("grids/g/xy_px0", np.zeros((0, 2), np.int64))
    store.commit("grids/g", "no_tissue")
    assert store.read("grids/g/xy_px0").shape == (0, 2)
    commit = store.committed("grids/g")
    assert commit is not None
    assert commit.outcome == "no_tissue"


@pytest.mark.parametrize("offset", [0, 5, -1])
def test_every_flipped_byte_of_a_committed_node_is_named(store, offset):
    store.write_array("scores/g/m", np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32))
    store.commit("scores/g/m")
    assert store.verify("scores/g/m") == []
    path = store.root / "scores/g/m/c/0/0"
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    assert store.verify("scores/g/m") == ["s1: scores/g/m/c/0/0 has other bytes than were committed."]
    with pytest.raises(CorruptStore):
        store.read("scores/g/m")


def test_a_lost_chunk_is_named(store):
    store.write_array("scores/g/m", np.ones((3, 2), np.float32))
    store.commit("scores/g/m")
    (store.root / "scores/g/m/c/0/0").unlink()
    nodes, wrong = store_module.verify(store.root.parent.parent)
    assert (nodes, wrong) == (1, ["s1: scores/g/m/c/0/0 is lost."])


def test_a_commit_is_created_once_and_refuses_other_bytes(store):
    store.write_array("scores/g/m", np.ones((3, 2), np.float32))
    first = store.commit("scores/g/m")
    assert store.commit("scores/g/m") == first
    store.write_chunk("scores/g/m", 0, np.zeros((3, 2), np.float32))
    with pytest.raises(CorruptStore, match="committed with other bytes"):
        store.commit("scores/g/m")


def test_a_grid_commits_without_its_tiles_which_commit_on_their_own(store):
    store.write_array("grids/g/xy_px0", np.ones((3, 2), np.int64))
    store.create_rows("grids/g/tiles", (3, 4, 4, 3), np.uint8, 16, fill=0, sharded=True)
    assert not any("tiles" in key for key in store.commit("grids/g").keys)
    store.write_chunk("grids/g/tiles", 0, np.ones((3, 4, 4, 3), np.uint8))
    assert any("tiles/c/0" in key for key in store.commit("grids/g/tiles").keys)
    assert store.verify("grids/g") == []


@pytest.mark.parametrize("slide_id", ["a b", "../x", "é" * 120, "🔬", ".hidden", "a/b"])
def test_any_slide_id_gives_a_folder_of_its_own(tmp_path, slide_id):
    store = SlideStore(tmp_path, slide_id)
    store.describe({"uri": "x"})
    assert store.root.parent == tmp_path / "slides"
    assert [s.slide_id for s in stores(tmp_path)] == [slide_id]
    assert folder_name(slide_id) != folder_name(slide_id + "x")


def test_the_tree_digest_sees_results_and_nothing_else(tmp_path, store):
    store.write_array("scores/g/m", np.ones((3, 2), np.float32))
    before = tree_digest(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    assert tree_digest(tmp_path) == before
    store.commit("scores/g/m")
    assert tree_digest(tmp_path) != before

"""changes.py: an edited slide, model or setting is done again exactly where it matters, and the reason is said."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from rich.console import Console

from slideflow_ray import pipeline
from slideflow_ray.accounting import read_run
from slideflow_ray.changes import differences
from slideflow_ray.cohort import Item
from slideflow_ray.errors import BundleError, SourceChanged
from slideflow_ray.events import ChunkScored, Event, Noted, RunFinished, RunStarted, SlidePlanned, WorkersChanged
from slideflow_ray.models.bundle import load_weights, read_card, write_bundle
from slideflow_ray.phantoms import halved, write_marked_slide, write_pyramid
from slideflow_ray.pipeline import Context, OpenSlides, plan_slide
from slideflow_ray.progress import RunProgress
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec, StoreSpec, TileSpec, TissueSpec
from slideflow_ray.store import SlideStore
from tests.segmenters import write_colours, write_discs


@pytest.fixture(scope="module")
def first(marked, bundles, tmp_path_factory) -> Path:
    """A folder with slides, bundles and the results of a run."""
    folder = tmp_path_factory.mktemp("changes")
    shutil.copytree(marked, folder / "slides")
    for name, path in bundles.items():
        shutil.copytree(path, folder / name)
    again(folder)
    return folder


@pytest.fixture
def work(first, tmp_path) -> Path:
    shutil.copytree(first, tmp_path / "work")
    return tmp_path / "work"


def again(folder: Path, names: tuple[str, ...] = ("aligned", "odd"), **settings) -> tuple[dict[str, tuple], list]:
    """Run; return what each slide of run.json says of why, and the chunks that were scored."""
    values = {
        "cohort": str(folder / "slides" / "cohort.csv"),
        "out": str(folder / "out"),
        "model": [{"path": str(folder / name)} for name in names],
        "store": {"chunk_rows": 16},
        "executor": {"workers": 1},
        **settings,
    }
    heard: list = []
    result = run(RunSpec.parse(values, "test"), listen=heard.append)
    assert result.counts == {"done": 3, "failed": 0, "refused": 0}
    chunks = [e for e in heard if isinstance(e, ChunkScored)]
    assert result.changed == bool(chunks)
    return {k: tuple(v["why"]) for k, v in read_run(folder / "out")["outcomes"].items()}, chunks


def test_a_first_run_and_an_unchanged_one_have_nothing_to_say(work):
    assert set(map(tuple, (v["why"] for v in read_run(work / "out")["outcomes"].values()))) == {()}
    # the paths differ from the first run's, the files do not
    assert again(work) == ({"a": (), "b": (), "c": ()}, [])


def test_edited_slides_and_rows_are_scored_again_and_no_others(work):
    write_marked_slide(work / "slides" / "b.tif", size_px0=(1100, 401))
    cohort = work / "slides" / "cohort.csv"
    lines = cohort.read_text().splitlines()
    cohort.write_text("\n".join([f"{lines[0]},mpp", f"{lines[1]},", f"{lines[2]},", f"{lines[3]},0.55"]) + "\n")
    why, chunks = again(work)
    assert why == {"a": (), "b": ("its file changed",), "c": ("mpp of the slide changed from 0.5 to 0.55",)}
    assert {e.slide_id for e in chunks} == {"b", "c"}


def test_other_weights_score_all_slides_again_with_that_model_and_a_further_one_is_no_change(work):
    weights = {name: value + 0.01 * torch.ones_like(value) for name, value in load_weights(work / "odd").items()}
    old, card = [m["digest"] for m in read_run(work / "out")["models"]][1], read_card(work / "odd")
    shutil.rmtree(work / "odd")
    write_bundle(work / "odd", card, weights)
    write_bundle(work / "third", card.model_copy(update={"name": "third"}), weights)
    why, chunks = again(work, ("aligned", "odd", "third"))
    new = [m["digest"] for m in read_run(work / "out")["models"]][1]
    assert old != new
    assert set(why.values()) == {(f"odd changed ({old} -> {new})",)}
    assert {name.rpartition("-")[0] for e in chunks for name in e.models} == {"odd", "third"}
    assert again(work, ("aligned", "odd", "third"))[1] == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stride_px": 40}, "stride_px changed from nothing to 40"),
        ({"compute": {"micro_batch": 8}}, "is computed in another way"),
    ],
)
def test_a_setting_is_named_with_both_values(settings, said, work):
    why, chunks = again(work, **settings)
    assert all(any(said in text for text in texts) for texts in why.values()), why
    assert {e.slide_id for e in chunks} == {"a", "b", "c"}


def test_a_file_that_changed_under_its_old_time_is_found_with_rehash(bundles, marked, tmp_path):
    pixels = (marked / "c.tif").read_bytes()
    (tmp_path / "c.tif").write_bytes(pixels + b"old")
    (tmp_path / "cohort.csv").write_text("slide_id,uri,modality\nc,c.tif,tem\n")
    values = {"cohort": str(tmp_path / "cohort.csv"), "out": str(tmp_path / "out"), "executor": {"workers": 1}}
    spec = RunSpec.parse({**values, "model": [{"path": str(bundles["aligned"])}]}, "test")
    run(spec)
    seen = (tmp_path / "c.tif").stat()
    (tmp_path / "c.tif").write_bytes(pixels + b"new")
    os.utime(tmp_path / "c.tif", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert not run(spec).changed
    result = run(spec, rehash=True)
    assert result.changed
    assert result.ended[0].why == ("its file changed",)


def test_an_edited_crop_is_told_from_new_ones(bundles, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "slides").mkdir()
    card = read_card(bundles["aligned"]).model_copy(update={"name": "whole", "whole": "squash", "mpp": None})
    write_bundle(tmp_path / "whole", card, load_weights(bundles["aligned"]))

    def crop(name: str) -> str:
        Image.fromarray(rng.integers(0, 255, (70, 60, 3), dtype=np.uint8)).save(tmp_path / "slides" / f"{name}.png")
        return f"{name},{name}.png,he\n"

    rows = "".join(map(crop, "abc"))
    (tmp_path / "slides" / "cohort.csv").write_text(f"slide_id,uri,modality\n{rows}")
    assert set(again(tmp_path, ("whole",))[0].values()) == {()}
    rows = rows.replace(crop("b"), "") + crop("d") + "b,b.png,he\n"
    (tmp_path / "slides" / "cohort.csv").write_text(f"slide_id,uri,modality\n{rows.replace('c,c.png,he', '')}")
    values: dict = {"cohort": str(tmp_path / "slides" / "cohort.csv"), "out": str(tmp_path / "out")}
    values["store"] = {"chunk_rows": 16}
    run(RunSpec.parse({**values, "model": [{"path": str(tmp_path / "whole")}], "executor": {"workers": 1}}, "test"))
    why = {k: v["why"] for k, v in read_run(tmp_path / "out")["outcomes"].items()}
    assert why["a"] == why["d"] == []
    assert why["b"] == ["its file changed"]


class Once:
    """A listener that does something at the first event of a kind."""

    def __init__(self, kind: type, work: Callable[[], object]) -> None:
        self._kind, self._work, self._done = kind, work, False

    def __call__(self, event: Event) -> None:
        if isinstance(event, self._kind) and not self._done:
            self._done = True
            self._work()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_slide_that_is_replaced_while_it_is_scored_is_never_scored_as_the_other(in_place, bundles, tmp_path):
    """Pixels of the new file under the identity of the old one would stay for ever."""
    for name, seed in (("s", 0), ("other", 7)):
        pixels = np.random.default_rng(seed).integers(0, 255, (512, 512, 3), np.uint8)
        write_pyramid(tmp_path / f"{name}.tif", halved(pixels, 2), 0.5)
    shutil.copy(tmp_path / "s.tif", tmp_path / "first.tif")
    (tmp_path / "cohort.csv").write_text("slide_id,uri,modality\ns,s.tif,tem\n")

    def replace() -> None:
        if in_place:
            (tmp_path / "s.tif").write_bytes((tmp_path / "other.tif").read_bytes())
        else:
            os.replace(shutil.copy(tmp_path / "other.tif", tmp_path / "new.tif"), tmp_path / "s.tif")

    def score(out: str, listen=lambda event: None):
        values = {"cohort": str(tmp_path / "cohort.csv"), "out": str(tmp_path / out), "executor": {"workers": 1}}
        values |= {"model": [{"path": str(bundles["aligned"])}], "store": {"chunk_rows": 16}}
        return run(RunSpec.parse(values, "test"), listen=listen)

    (ended,) = score("out", Once(SlidePlanned, replace)).ended
    assert (ended.status, ended.code) == ("failed", "E_CHANGED")
    assert score("out").ended[0].status == "done"
    shutil.copy(tmp_path / "first.tif", tmp_path / "s.tif")  # what was planned first is back
    (back,), (fresh,) = score("out").ended, score("fresh").ended
    assert back.grids == fresh.grids
    stores = [SlideStore(tmp_path / out, "s") for out in ("out", "fresh")]
    one, other = (store.read(f"scores/{'/'.join(fresh.grids[0])}") for store in stores)
    np.testing.assert_array_equal(one, other)


def test_a_slide_that_is_replaced_between_opening_and_the_end_of_a_read_gives_no_tiles(tmp_path, monkeypatch):
    """The chunk's first rows are of the old file and its last ones of the new one: none of them is kept."""
    for name, value in (("s", 50), ("other", 200)):  # not compressed, so that each byte has its place in both
        colour = np.full((512, 512, 3), (value - 30, value, value + 30), np.uint8)  # grey would be given a window
        tifffile.imwrite(tmp_path / f"{name}.tif", colour, tile=(64, 64))
    item = Item(slide_id="s", uri=str(tmp_path / "s.tif"), modality="tem", mpp=0.5)
    tile = TileSpec(tile_px=64, mpp=0.5)
    context = Context(str(tmp_path / "out"), (), TissueSpec(), StoreSpec(), (tile,))
    (chunk,) = plan_slide(context, item).todo
    real = pipeline.read_tiles

    def replaced_meanwhile(reader, xy_px0, **how):
        first = real(reader, xy_px0[:32], **how)
        shutil.copy(tmp_path / "other.tif", tmp_path / "s.tif")
        last = real(reader, xy_px0[32:], **how)
        assert (first.mean(), last.mean()) == (50, 200)
        return np.concatenate([first, last])

    slides = OpenSlides()
    monkeypatch.setattr(pipeline, "read_tiles", replaced_meanwhile)
    with pytest.raises(SourceChanged):
        pipeline.read_chunk(context, chunk, slides)
    slides.forget()
    assert not SlideStore(tmp_path / "out", "s").has_chunk(f"grids/{chunk.grid}/tiles", 0, ndim=4)


def test_a_crop_that_is_replaced_after_its_pack_was_formed_fails_alone(bundles, tmp_path):
    rng = np.random.default_rng(0)
    card = read_card(bundles["aligned"]).model_copy(update={"name": "whole", "whole": "squash", "mpp": None})
    write_bundle(tmp_path / "whole", card, load_weights(bundles["aligned"]))
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (70, 60, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "cohort.csv").write_text("slide_id,uri,modality\na,a.png,he\nb,b.png,he\n")
    values = {"cohort": str(tmp_path / "cohort.csv"), "out": str(tmp_path / "out"), "executor": {"workers": 1}}
    spec = RunSpec.parse({**values, "model": [{"path": str(tmp_path / "whole")}]}, "test")
    result = run(spec, listen=Once(RunStarted, lambda: shutil.copy(tmp_path / "c.png", tmp_path / "b.png")))
    assert [(e.slide_id, e.status, e.code) for e in result.ended] == [("a", "done", ""), ("b", "failed", "E_CHANGED")]
    assert run(spec).counts == {"done": 2, "failed": 0, "refused": 0}


def test_weights_that_are_replaced_after_the_run_began_score_nothing(bundles, marked, tmp_path):
    shutil.copytree(bundles["aligned"], tmp_path / "bundle")
    weights = {name: value * 2 for name, value in load_weights(bundles["aligned"]).items()}
    write_bundle(tmp_path / "other", read_card(bundles["aligned"]), weights)
    values = {"cohort": str(marked / "cohort.csv"), "out": str(tmp_path / "out"), "executor": {"workers": 1}}
    spec = RunSpec.parse({**values, "model": [{"path": str(tmp_path / "bundle")}]}, "test")

    def replace() -> None:
        shutil.copy(tmp_path / "other" / "weights.safetensors", tmp_path / "bundle" / "weights.safetensors")

    with pytest.raises(BundleError, match="changed after the run began"):
        run(spec, listen=Once(RunStarted, replace))
    assert not list((tmp_path / "out").glob("slides/*/scores/*/*/c/*"))


def test_objects_by_other_settings_are_said(tmp_path):
    write_discs(tmp_path / "a.tif", (500, 400), [("magenta", 150.0, 150.0, 60.0)])
    write_colours(tmp_path)
    (tmp_path / "cohort.csv").write_text("slide_id,uri,modality\na,a.tif,tem\n")

    def why(**objects) -> list[str]:
        values = {"cohort": str(tmp_path / "cohort.csv"), "out": str(tmp_path / "out"), "executor": {"workers": 1}}
        model = {"path": str(tmp_path / "discs"), "objects": objects}
        run(RunSpec.parse({**values, "model": [model]}, "test"))
        return read_run(tmp_path / "out")["outcomes"]["a"]["why"]

    assert why() == []
    assert why(min_area_um2=50.0) == ["the settings of `objects` changed"]
    assert why(min_area_um2=50.0) == []


def test_each_reason_is_said_once_and_counted():
    text = io.StringIO()
    progress = RunProgress(Console(file=text, width=200))
    for name in "xyz":
        progress(SlidePlanned(name, 10, 1, 1, 10, ("m changed (1 -> 2)",)))
    progress(SlidePlanned("w", 10, 1, 1, 10, ("its file changed",)))
    progress._finish(type("End", (), {"done": 4, "failed": 0, "refused": 0, "seconds": 1.0})())
    lines = text.getvalue().splitlines()
    assert lines[:2] == ["x is scored again: m changed (1 -> 2)", "w is scored again: its file changed"]
    assert "3 slides were scored again: m changed (1 -> 2)" in lines
    assert not any(line.startswith("1 slides") for line in lines)


def test_workers_that_join_and_leave_are_said_and_those_announced_are_not():
    text = io.StringIO()
    progress = RunProgress(Console(file=text, width=200))
    progress(RunStarted(3, ("m",), "ray", 2))
    for workers in (2, 3, 1):
        progress(WorkersChanged(workers))
    _, *lines = text.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["3 workers instead of 2", "1 workers instead of 3"]


def test_what_is_heard_after_a_run_is_no_progress_of_it():
    text = io.StringIO()
    progress = RunProgress(Console(file=text, width=200))
    progress(RunStarted(3, ("m",), "inline", 2))
    progress(RunFinished(3, 0, 0, 1.0))
    progress._said -= 60
    progress(Noted("an epoch of the training that asked for the run"))
    assert text.getvalue().splitlines()[-1] == "an epoch of the training that asked for the run"
    progress(RunStarted(3, ("m",), "inline", 2))
    progress._said -= 60
    progress(Noted("a note"))
    assert "0 of 3 slides" in text.getvalue().splitlines()[-1]


def test_a_changed_file_explains_its_size_and_levels():
    old = {"identity": "sha256:1", "size_px0": [1, 2], "levels": [], "tile": {"tile_px": 64}}
    assert differences(old, {**old, "identity": "sha256:2", "size_px0": [3, 4]}) == ["its file changed"]
    assert differences(old, {**old, "tile": {"tile_px": 48}}) == ["tile_px changed from 64 to 48"]
    assert differences(old, {**old, "rows": 32}) == ["store.chunk_rows changed from nothing to 32"]
    assert differences(old, {**old, "size_px0": [3, 4]}) == ["its size is read otherwise"]
    assert differences(old, old) == []

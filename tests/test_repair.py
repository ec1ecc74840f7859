"""repair.py: what verify names is done anew, and nothing else; then the bytes are those of the undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from slideflow_ray import cli, lease
from slideflow_ray.accounting import read_run
from slideflow_ray.cohort import read_cohort
from slideflow_ray.errors import LeaseError
from slideflow_ray.events import ChunkScored
from slideflow_ray.repair import repair, verify
from slideflow_ray.run import run, settings_of
from slideflow_ray.specs import RunSpec
from slideflow_ray.store import tree_digest
from tests.segmenters import write_colours, write_discs


@pytest.fixture(scope="module")
def reference(bundles, tmp_path_factory) -> Path:
    """A slide with a classifier, a segmentation and its objects, a pack of crops: every kind of node."""
    import numpy as np

    from slideflow_ray.models.bundle import load_weights, read_card, write_bundle

    folder = tmp_path_factory.mktemp("repair")
    rng = np.random.default_rng(0)
    discs = [("magenta", 150.0, 150.0, 60.0), ("cyan", 350.0, 250.0, 50.0)]
    write_discs(folder / "a.tif", (500, 400), discs)
    for name in "xyz":
        Image.fromarray(rng.integers(0, 255, (70, 60, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    write_colours(folder)
    card = read_card(bundles["aligned"])
    whole = card.model_copy(update={"name": "whole", "whole": "squash", "mpp": None})
    write_bundle(folder / "whole", whole, load_weights(bundles["aligned"]))
    rows = "a,a.tif,tem,\n" + "".join(f"{n},{n}.png,he,crops\n" for n in "xyz")
    (folder / "cohort.csv").write_text(f"slide_id,uri,modality,site\n{rows}")
    values = {
        "cohort": str(folder / "cohort.csv"),
        "out": str(folder / "out"),
        "model": [
            {"path": str(bundles["aligned"]), "where": {"modality": "tem"}, "features": True},
            {"path": str(folder / "discs"), "where": {"modality": "tem"}},
            {"path": str(folder / "whole"), "where": {"site": "crops"}},
        ],
        "store": {"chunk_rows": 16},
        "executor": {"workers": 1},
    }
    result = run(RunSpec.parse(values, "test"))
    assert result.counts == {"done": 4, "failed": 0, "refused": 0}, result.ended
    assert verify(folder / "out")[1] == []
    return folder / "out"


@pytest.fixture
def out(reference, tmp_path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "out"))


def flip(path: Path, offset: int = -9) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def changed(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def main(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def again(out: Path) -> list[ChunkScored]:
    spec, items = settings_of(out)
    events = []
    result = run(spec, items, listen=events.append)
    assert result.counts["done"] == 4
    return [e for e in events if isinstance(e, ChunkScored)]


STORE = "slides/a.zarr/"
DAMAGE = {
    "a flipped bit in scores": (STORE + "scores/64*/aligned*/c/1/0", flip),
    "a lost chunk of scores": (STORE + "scores/64*/aligned*/c/0/0", os.unlink),
    "a lost chunk of features": (STORE + "features/64*/aligned*/c/2/0", os.unlink),
    "a flipped bit in tiles": (STORE + "grids/64*/tiles/c/1/0/0/0", flip),
    "a flipped bit in masks": (STORE + "masks/*/*/c/0/0/0", flip),
    "a lost chunk of focus": (STORE + "focus/*/c/0", os.unlink),
    "lost metadata of scores": (STORE + "scores/64*/aligned*/zarr.json", os.unlink),
    "a half-lost grid": (STORE + "grids/64*/rowcol", shutil.rmtree),
    "a grid's metadata": (STORE + "grids/64*/zarr.json", flip),
    "a tissue mask": (STORE + "tissue/*/mask/c/0/0", flip),
    "items": (STORE + "items/*/zarr.json", flip),
    "a heatmap": (STORE + "heatmaps/64*/aligned*/0/c/0/0/0", flip),
    "a plane": (STORE + "planes/*/*/1", shutil.rmtree),
    "objects": (STORE + "objects/*/*/box_px0/c/0/0", os.unlink),
    "a commit": ("commits/a/scores/64*/*.json", lambda p: p.write_text("{")),
    "a commit's word": ("commits/a/grids/64*.json", lambda p: p.write_text(p.read_text().replace("done", "dona"))),
    "a commit's white space": ("commits/a/grids/64*.json", lambda p: p.write_text(p.read_text() + " ")),
    "a commit that is gone": ("commits/a/scores/64*/*.json", os.unlink),
    "the store's metadata": (STORE + "zarr.json", os.unlink),
    "the scale in the store's metadata": (STORE + "zarr.json", lambda p: changed(p, '"mpp0": 0.5', '"mpp0": 0.7')),
    "a group's metadata": (STORE + "scores/zarr.json", os.unlink),
    "a group's attributes": (STORE + "scores/64*/zarr.json", lambda p: flip(p, 2)),
    "a foreign file": (STORE + "scores/64*/aligned*/zarr.json", lambda p: p.with_name("x").write_text("")),
    "a pack's outcomes": ("slides/pack*.zarr/outcomes/*/0.json", lambda p: p.write_text("{")),
    "a pack's scores": ("slides/pack*.zarr/scores/*/*/c/0/0", flip),
    "a whole store": (STORE, shutil.rmtree),
    "the run's record": ("run.json", lambda p: p.write_text("{")),
    "the profile": ("profiles/*.json", lambda p: p.write_text("{")),
}
CHUNKS = {
    "a flipped bit in scores",
    "a lost chunk of scores",
    "a lost chunk of features",
    "a flipped bit in tiles",
    "a flipped bit in masks",
    "a lost chunk of focus",
    "lost metadata of scores",
    "a pack's scores",
    "a pack's outcomes",
    "a foreign file",
}
"""Damages that cost one file of results and one commit."""


def files(out: Path) -> set[Path]:
    return {p.relative_to(out) for p in out.rglob("*") if p.is_file() and p.name != "lease.lock"}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_broken_is_named_and_only_its_unit_is_taken_away(name, out):
    pattern, harm = DAMAGE[name]
    path, before = sorted(out.glob(pattern))[0], files(out)
    harm(path)
    assert verify(out)[1], "the damage is not seen"
    found = repair(out)
    assert bool(found.units) == (name != "a commit that is gone")
    if name not in ("the run's record", "a whole store") and "the store's" not in name:  # those the next run writes
        assert all(line.endswith("is not committed any more.") for line in verify(out)[1])
    gone = before - files(out)
    results, commits = ([p for p in gone if p.parts[0] == kind] for kind in ("slides", "commits"))
    if name in CHUNKS:
        assert len(commits) == 1
        assert results in ([path.relative_to(out)], [])
        assert bool(results) == (name != "a foreign file")
    elif "whole" not in name:  # a node: all of it is in one folder
        assert len({p.parts[2] for p in results}) <= 1
        assert len(commits) <= 1


@pytest.mark.parametrize("third", [0, 1, 2])
def test_the_same_run_makes_it_anew_with_the_same_bytes(third, out, reference):
    spec, items = settings_of(out)
    names = list(DAMAGE)[third::3]
    broken = [(harm, sorted(out.glob(pattern))[0]) for pattern, harm in (DAMAGE[name] for name in names)]
    for harm, path in broken:
        if path.exists():
            harm(path)
    repair(out)
    assert run(spec, items).counts["done"] == 4
    assert verify(out)[1] == []
    assert tree_digest(out) == tree_digest(reference)


def test_only_the_broken_chunks_are_scored_again(out, reference):
    for name in ("a flipped bit in scores", "objects", "a tissue mask", "a pack's scores", "a heatmap"):
        pattern, harm = DAMAGE[name]
        harm(sorted(out.glob(pattern))[0])
    assert len(repair(out).units) == 5
    assert len(again(out)) == 2
    assert tree_digest(out) == tree_digest(reference)


@pytest.mark.parametrize("kind", ["tissue", "items", "focus", "heatmaps", "objects", "planes", "grids/*/tiles.json"])
def test_a_commit_that_is_gone_is_missed_whatever_it_was_of(kind, out, reference):
    (folder,) = out.glob(f"commits/a/{kind.split('/')[0]}")
    for path in sorted(out.glob(f"commits/a/{kind}")):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    wrong = verify(out)[1]
    assert wrong
    assert all(line.startswith(f"a: {folder.name}") and line.endswith("not committed any more.") for line in wrong)


LEFT = {
    "a chunk of scores that was cut short": ("scores/*/*/c/0/0", lambda p: p.write_bytes(b"")),
    "a chunk of focus that was cut short": ("focus/*/c/0", lambda p: p.write_bytes(b"")),
    "tiles with a flipped bit": ("grids/*/tiles/c/0/0/0/0", lambda p: flip(p, len(p.read_bytes()) // 2)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_a_crash_has_damaged_before_its_commit_is_done_anew(name, marked, bundles, tmp_path):
    values = {"cohort": str(marked / "cohort.csv"), "out": str(tmp_path / "out"), "executor": {"workers": 1}}
    values |= {"model": [{"path": str(bundles["aligned"])}], "store": {"chunk_rows": 32}}
    spec = RunSpec.parse(values, "test")
    items = [item for item in read_cohort(marked / "cohort.csv") if item.slide_id == "a"]

    class Crash(Exception):
        pass

    def stop(event: object) -> None:
        if isinstance(event, ChunkScored):
            raise Crash

    with pytest.raises(Crash):
        run(spec, items, listen=stop)
    pattern, harm = LEFT[name]
    (path,) = (tmp_path / "out" / "slides" / "a.zarr").glob(pattern)
    harm(path)
    assert run(spec, items).counts["done"] == 1
    assert verify(tmp_path / "out")[1] == []
    run(spec.model_copy(update={"out": str(tmp_path / "fresh")}), items)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "fresh")


def test_nothing_is_taken_from_what_is_whole(out, reference):
    assert repair(out).units == ()
    assert tree_digest(out) == tree_digest(reference)


def test_only_who_holds_the_lease_may_repair(out, reference):
    flip(sorted(out.glob(DAMAGE["a flipped bit in scores"][0]))[0])
    with lease.lease(out), pytest.raises(LeaseError):
        repair(out)
    assert verify(out)[1]


def test_the_command_repairs_and_runs(out, reference, capsys):
    flip(sorted(out.glob(DAMAGE["a flipped bit in scores"][0]))[0])
    assert main(["verify", str(out)]) == 5
    assert "slideflow-ray repair" in capsys.readouterr().err
    assert main(["repair", str(out), "--run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 4
    assert main(["verify", str(out), "--digest"]) == 0
    assert capsys.readouterr().out.strip() == tree_digest(reference)
    assert read_run(out)["finished"]

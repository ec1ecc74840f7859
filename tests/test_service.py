"""models/service.py: what is in service, swapped whole or not at all, and what a run makes of it."""

from __future__ import annotations

import json
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from slideflow_ray.accounting import read_run
from slideflow_ray.errors import BundleError, ConfigError, CorruptStore
from slideflow_ray.events import VersionChosen
from slideflow_ray.models.bundle import forward_digest, load_weights, read_card, write_bundle
from slideflow_ray.models.service import (
    CURRENT,
    Current,
    history,
    note,
    read_current,
    replace_current,
    resolve,
    version_of,
)
from slideflow_ray.run import plan, run
from slideflow_ray.specs import RunSpec

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def other_bundle(bundles, folder: Path) -> Path:
    """The same network with other weights, under the same name."""
    state = load_weights(bundles["aligned"])
    state["head.weight"] = -state["head.weight"]
    return write_bundle(folder, read_card(bundles["aligned"]), state)


@pytest.fixture
def model(tmp_path, bundles) -> Path:
    """Two versions, the second in service."""
    folder = tmp_path / "models" / "tumour"
    first = folder / "versions" / "one"
    shutil.copytree(bundles["aligned"], first)
    second = other_bundle(bundles, folder / "versions" / "two")
    one = Current(**version_of(first, folder, NOW).model_dump())
    replace_current(folder, one, None)
    replace_current(folder, one.follow(version_of(second, folder, NOW)), one)
    return folder


def test_current_json_says_which_version_and_what_was_before(model):
    said = json.loads((model / CURRENT).read_text())
    assert said["path"] == "versions/two"
    assert said["digest"] == forward_digest(model / "versions" / "two")
    assert said["since"] == "2026-01-02T03:04:05+00:00"
    assert [p["path"] for p in said["previous"]] == ["versions/one"]
    assert resolve(model) == model / "versions" / "two"
    assert resolve(model / "versions" / "one") == model / "versions" / "one"


def test_a_models_folder_can_be_moved_with_its_versions(model, tmp_path):
    moved = tmp_path / "elsewhere"
    model.rename(moved)
    assert resolve(moved) == moved / "versions" / "two"


def test_a_bundle_elsewhere_is_named_by_its_whole_path(model, bundles):
    assert version_of(bundles["aligned"], model).path == str(bundles["aligned"].absolute())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON|not the JSON"),
        ("[]", "(?i)dictionary|current.json"),
        ('{"schema": 1, "digest": "x", "card": "y", "path": "p", "since": ""}', "digest"),
        ('{"schema": 2}', "schema"),
        ("", "not the JSON"),
    ],
)
def test_a_damaged_current_json_is_named(model, text, said):
    (model / CURRENT).write_text(text)
    with pytest.raises(BundleError, match=said) as error:
        resolve(model)
    assert "does not say which version is in service" in str(error.value)


def test_a_missing_current_json_among_versions_is_named(model):
    (model / CURRENT).unlink()
    with pytest.raises(BundleError, match="none is in service"):
        resolve(model)


def test_a_version_that_has_gone_is_named(model):
    shutil.rmtree(model / "versions" / "two")
    with pytest.raises(BundleError, match="not there"):
        resolve(model)


@pytest.mark.parametrize("what", ["weights", "card"])
def test_a_version_changed_in_place_is_refused(model, what):
    folder = model / "versions" / "two"
    if what == "card":
        text = (folder / "bundle.json").read_text()
        (folder / "bundle.json").write_text(text.replace('"mpp": 0.5', '"mpp": 0.6'))
    else:
        shutil.copy(model / "versions" / "one" / "weights.safetensors", folder)
    with pytest.raises(BundleError, match="changed after it was promoted"):
        resolve(model)


def test_of_two_swaps_at_a_time_one_is_refused(model):
    """Both have read the same current.json; threads start together; whoever is second is refused."""
    now = read_current(model)
    new = version_of(model / "versions" / "one", model, NOW)
    start, refused = threading.Barrier(8), []

    def swap() -> None:
        start.wait()
        try:
            replace_current(model, now.follow(new), now)
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=swap) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    assert all("in the meantime" in str(error) for error in refused)
    assert len(read_current(model).previous) == 2


def test_notes_of_many_at_once_are_all_kept(tmp_path):
    threads = [threading.Thread(target=note, args=(tmp_path, {"n": n})) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line["n"] for line in history(tmp_path)) == list(range(12))
    (tmp_path / "history.jsonl").write_text("{")
    with pytest.raises(CorruptStore, match="no JSON"):
        history(tmp_path)


def spec_of(marked: Path, model: Path, out: Path) -> RunSpec:
    values = {"cohort": str(marked / "cohort.csv"), "out": str(out), "model": [{"path": str(model)}]}
    return RunSpec.parse({**values, "executor": {"kind": "inline", "workers": 1}}, "test")


def test_a_run_takes_the_version_in_service_and_one_after_a_promotion_stands_beside_it(marked, model, tmp_path):
    """The same command before and after: nothing of the first run is touched, and run.json says which was used."""
    out, heard = tmp_path / "out", []
    run(spec_of(marked, model, out), listen=heard.append)
    first = read_run(out)["models"][0]
    assert first["service"] == str(model)
    assert first["digest"] == forward_digest(model / "versions" / "two")
    assert first["path"] == str(model / "versions" / "two")
    assert [e.digest for e in heard if isinstance(e, VersionChosen)] == [first["digest"]]
    commits = {p.relative_to(out): p.read_bytes() for p in (out / "commits").rglob("*.json")}

    now = read_current(model)
    replace_current(model, now.follow(version_of(model / "versions" / "one", model, NOW)), now)
    cost = plan(spec_of(marked, model, out))
    assert cost["todo"] == cost["tiles"] > 0
    run(spec_of(marked, model, out))
    second = read_run(out)["models"][0]
    assert second["digest"] == forward_digest(model / "versions" / "one") != first["digest"]
    assert second["node"] != first["node"]
    assert all((out / path).read_bytes() == data for path, data in commits.items())
    assert len(list((out / "commits").rglob("scores/*/*.json"))) == 6


def test_a_promotion_in_the_middle_of_a_run_does_not_mix_two_models(marked, model, tmp_path):
    out = tmp_path / "out"

    def promote_then(event) -> None:
        now = read_current(model)
        if type(event).__name__ == "SlidePlanned" and len(now.previous) == 1:
            replace_current(model, now.follow(version_of(model / "versions" / "one", model, NOW)), now)

    run(spec_of(marked, model, out), listen=promote_then)
    assert resolve(model) == model / "versions" / "one"
    assert read_run(out)["models"][0]["digest"] == forward_digest(model / "versions" / "two")
    assert len({p.name for p in (out / "commits").rglob("scores/*/*.json")}) == 1

"""Choosing among trainings: source 003's rule, the lowest validation loss, with all values written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from slideflow_ray import cli
from slideflow_ray.errors import ConfigError
from slideflow_ray.events import Noted
from slideflow_ray.models.bundle import load_weights, read_card
from slideflow_ray.phantoms import write_cohort
from slideflow_ray.train import choose as choose_module
from slideflow_ray.train.choose import SearchSpec, choose, search
from slideflow_ray.train.job import train
from slideflow_ray.train.spec import TrainJob


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("choose"), slides=9, seed=3, size_px0=(1024, 768))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


def job_of(cohort: Path, out: Path, work: Path, **fit) -> TrainJob:
    values = {
        "cohort": str(cohort),
        "out": str(out),
        "work": str(work),
        "classes": ("normal", "tumor"),
        "tile": {"tile_px": 32, "mpp": 1.0},
        "fit": {"epochs": 1, "threads": 1, "device": "cpu", "precision": "fp32", **fit},
    }
    return TrainJob.parse(values, "test")


def test_the_architecture_of_lowest_validation_loss_is_kept_and_all_are_written_down(cohort, work, tmp_path):
    job = job_of(cohort, tmp_path / "best", work)
    result, found = choose(job, ["small-cnn", "timm:test_resnet"])
    losses = {c.settings["architecture"]: c.loss for c in found}
    folders = {name: work / "candidates" / f"best-{name.replace(':', '-')}" for name in losses}
    for name, folder in folders.items():  # each one's own record says the same
        own = json.loads((folder / "training.json").read_text())
        assert own["epochs"][own["best_epoch"]]["val_loss"] == losses[name]
        assert read_card(folder).architecture == name
    best = min(losses, key=losses.get)
    assert read_card(result.bundle).architecture == best
    record = json.loads((tmp_path / "best" / "training.json").read_text())
    assert record["choice"]["rule"] == "lowest validation loss"
    assert {c["architecture"]: c["val_loss"] for c in record["choice"]["candidates"]} == losses
    assert {c["epoch"] for c in record["choice"]["candidates"]} == {record["best_epoch"]} == {0}
    kept = load_weights(folders[best])
    assert all((kept[key] == value).all() for key, value in load_weights(result.bundle).items())


@pytest.mark.parametrize(
    "start", [lambda job: choose(job, ["small-cnn", "timm:test_resnet"]), lambda job: search(job, SEARCH)]
)
def test_a_place_that_is_taken_is_said_before_anything_is_trained(cohort, work, tmp_path, start, monkeypatch):
    monkeypatch.setattr(choose_module, "prepare", lambda *_: pytest.fail("it began"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="taken exists already"):
        start(job_of(cohort, tmp_path / "taken", work))


SEARCH = SearchSpec(lr=(1e-6, 3e-3), epochs=1)


def tried_here(monkeypatch) -> Callable[..., list[dict[str, Any]]]:
    """Ray Tune's trials one after the other in this process: Tune itself takes minutes for processes to start."""

    def tuned(job, spec, grid, data) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        monkeypatch.setattr(ray, "tune", SimpleNamespace(report=said.append), raising=False)
        kept = []
        for settings in grid:
            choose_module._trial({"settings": settings}, (job, data, spec.epochs))
            kept.append({"settings": dict(settings), **said[-1]["best"]})
        return kept

    return tuned


@pytest.mark.parametrize("by", ["hand", pytest.param("tune", marks=[pytest.mark.soak, pytest.mark.ray])])
def test_a_search_keeps_the_best_of_the_grid_and_is_not_made_twice(
    by, request, cohort, work, tmp_path, monkeypatch, capsys
):
    if by == "tune":
        request.getfixturevalue("local_ray")
    else:
        monkeypatch.setattr(choose_module, "_tuned", tried_here(monkeypatch))
    job = job_of(cohort, tmp_path / f"found-{by}", work)
    result, found = search(job, SEARCH)
    assert [c.settings for c in found] == [{"lr": 1e-6}, {"lr": 3e-3}]
    best = min(found, key=lambda c: c.loss)
    assert found[0].loss != found[1].loss
    assert capsys.readouterr().out == ""  # which is for --json
    assert result.best.val.loss == pytest.approx(best.loss, abs=1e-6)  # the same training once more
    record = json.loads((tmp_path / f"found-{by}" / "training.json").read_text())
    assert [c["lr"] for c in record["choice"]["candidates"]] == [1e-6, 3e-3]
    assert record["settings"]["fit"]["lr"] == best.settings["lr"]
    monkeypatch.setattr(choose_module, "_tuned", lambda *_: pytest.fail("it searched again"))
    assert not search(job, SEARCH)[0].changed


def test_without_validation_nothing_can_be_chosen_and_a_training_says_so(cohort, tmp_path, capsys):
    rows = cohort.read_text().replace(",val,", ",test,")
    alone = cohort.parent / "noval.csv"
    alone.write_text(rows)
    with pytest.raises(ConfigError, match="no labelled tiles in split val"):
        choose(job_of(alone, tmp_path / "none", tmp_path / "work"), ["small-cnn", "timm:test_resnet"])
    said = []
    result = train(job_of(alone, tmp_path / "last", tmp_path / "work"), listen=said.append)
    assert any(isinstance(event, Noted) and "nothing is validated" in event.text for event in said)
    assert result.best.val is None


def test_json_is_json_where_validation_has_one_class(cohort, tmp_path, capsys):
    lines = [line for line in cohort.read_text().splitlines() if ",val," not in line or "tumor" not in line]
    assert sum(",val," in line for line in lines) > 0
    (cohort.parent / "one.csv").write_text("\n".join(lines) + "\n")
    arguments = ["train", "--cohort", str(cohort.parent / "one.csv"), "--out", str(tmp_path / "b"), "--epochs", "1"]
    arguments += ["--classes", "normal,tumor", "--tile-px", "32", "--mpp", "1", "--json"]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert not ended.value.code
    said = capsys.readouterr()
    assert "NaN" not in said.out
    assert json.loads(said.out)["val"]["auc"] is None

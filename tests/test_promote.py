"""promote.py: the better one takes the place, the worse one does not, and nothing is lost either way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import judged
import pytest

from slideflow_ray import cli
from slideflow_ray import promote as promoting
from slideflow_ray.cohort import read_cohort
from slideflow_ray.compare import Settings
from slideflow_ray.errors import BundleError, ConfigError, SplitLeakError
from slideflow_ray.models.bundle import forward_digest
from slideflow_ray.models.service import history, read_current, resolve, version_of
from slideflow_ray.promote import Decision, Terms, check_unseen, flattered, promote, undo
from slideflow_ray.specs import ExecutorSpec
from slideflow_ray.train.images import LEAKING

QUICK = Settings(benchmark=False, resamples=200, executor=ExecutorSpec(workers=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("promote")
    judged.write_cohort(folder)
    judged.bundle(folder / "good")
    judged.bundle(folder / "bad", gain=-1.0)
    judged.bundle(folder / "blunt", noise=0.8)
    return folder


@pytest.fixture(scope="module")
def begun(folder) -> Path:
    """A model with the blunt bundle in service, scored already."""
    model = folder / "models" / "tumour"
    decision = promote(folder / "blunt", model, folder / "cohort.csv", settings=QUICK)
    assert decision.accepted
    return model


@pytest.fixture
def model(begun, tmp_path) -> Path:
    shutil.copytree(begun, tmp_path / "tumour")
    return tmp_path / "tumour"


def everything(model: Path) -> dict[str, bytes]:
    """What is in service and all versions, byte for byte."""
    files = [model / "current.json", *(p for p in (model / "versions").rglob("*") if p.is_file())]
    return {str(p.relative_to(model)): p.read_bytes() for p in files}


def test_the_first_is_taken_with_a_note(begun, folder):
    current = read_current(begun)
    assert current.forward == forward_digest(folder / "blunt")
    assert current.previous == ()
    (line,) = history(begun)
    assert (line["what"], line["against"], line["split"]) == ("promoted", None, "val")
    assert "first in service" in line["why"]
    assert resolve(begun).parent == begun / "versions"


def test_a_better_one_is_taken_and_the_old_one_kept(model, folder):
    before = read_current(model)
    decision = promote(folder / "good", model, folder / "cohort.csv", settings=QUICK)
    assert decision.accepted
    assert decision.gain > 0
    assert decision.interval[0] <= decision.gain <= decision.interval[1]
    now = read_current(model)
    assert now.forward == forward_digest(folder / "good")
    assert now.previous == (before.version,)
    assert forward_digest(model / before.path) == before.forward
    line = history(model)[-1]
    assert (line["candidate"], line["against"]) == (now.forward, before.forward)
    assert line["gain"] == pytest.approx(decision.gain)
    assert line["rule"] == "auc"
    assert line["cohort_digest"] == decision.comparison.cohort


def test_the_new_version_brings_operating_points_and_temperature_from_validation(model, folder):
    decision = promote(folder / "good", model, folder / "cohort.csv", Terms(point="sensitivity=0.9"), QUICK)
    points = json.loads((decision.folder / "operating_points.json").read_text())
    assert points["bundle"] == forward_digest(folder / "good")
    tile = next(p for p in points["points"] if p["level"] == "tile")
    assert (tile["rule"], tile["split"]) == ("sensitivity=0.9", "val")
    assert tile["sensitivity"] >= 0.9
    temperature = json.loads((decision.folder / "temperature.json").read_text())
    assert temperature["bundle"] == forward_digest(folder / "good")
    assert temperature["fitted"][1]["nll"] <= temperature["fitted"][0]["nll"]
    assert {p.name for p in (folder / "good").iterdir()} == {"bundle.json", "weights.safetensors"}


def test_a_worse_one_is_refused_by_every_rule_and_nothing_changes(model, folder):
    before = everything(model)
    decision = promote(folder / "bad", model, folder / "cohort.csv", settings=QUICK)
    assert not decision.accepted
    assert decision.gain < 0
    assert "does not beat" in decision.why
    assert everything(model) == before
    assert history(model)[-1]["what"] == "refused"
    new = version_of(folder / "bad", model)
    for rule in get_args(promoting.By):
        assert not promoting._decide(decision.comparison, Terms(rule=rule), new).accepted, rule


def test_a_better_one_is_taken_by_every_rule(model, folder):
    found = promote(folder / "good", model, folder / "cohort.csv", Terms(rule="log_loss"), QUICK)
    assert found.accepted
    new = version_of(folder / "good", model)
    for rule in get_args(promoting.By):
        one = promoting._decide(found.comparison, Terms(rule=rule), new)
        assert one.accepted, rule
        assert one.interval[0] <= one.gain <= one.interval[1], rule


def test_the_gain_must_exceed_the_margin_and_its_lower_bound_where_asked(model, folder):
    words = (folder / "good", model, folder / "cohort.csv")
    free = promote(*words, settings=QUICK)
    new, low, gain = version_of(folder / "good", model), free.interval[0], free.gain

    def accepted(margin: float, interval: bool = False) -> bool:
        return promoting._decide(free.comparison, Terms(margin=margin, interval=interval), new).accepted

    assert low < gain
    assert not accepted(gain)
    assert accepted(gain - 1e-9)
    between = max(0, (low + gain) / 2)
    assert accepted(between)
    assert not accepted(between, interval=True)
    undo(model)
    refused = promote(*words, Terms(margin=between, interval=True), QUICK)
    assert not refused.accepted
    assert "lower bound" in refused.why


def test_too_few_patients_have_no_interval_to_go_by(folder, tmp_path):
    cohort = judged.write_cohort(tmp_path, patients=4)
    promote(folder / "blunt", tmp_path / "m", cohort, settings=QUICK)
    refused = promote(folder / "good", tmp_path / "m", cohort, Terms(interval=True), QUICK)
    assert not refused.accepted
    assert "too few patients" in refused.why
    assert promote(folder / "good", tmp_path / "m", cohort, settings=QUICK).accepted


def test_it_can_be_undone_once_for_each_promotion(model, folder):
    before = everything(model)
    first = read_current(model)
    promote(folder / "good", model, folder / "cohort.csv", settings=QUICK)
    back = undo(model)
    assert (back.forward, back.path, back.previous) == (first.forward, first.path, ())
    assert history(model)[-1]["what"] == "undone"
    assert {k: v for k, v in everything(model).items() if k in before and k != "current.json"} == {
        k: v for k, v in before.items() if k != "current.json"
    }
    with pytest.raises(ConfigError, match="no version before"):
        undo(model)


def test_undo_leads_away_from_a_version_that_was_damaged(model, folder):
    promote(folder / "good", model, folder / "cohort.csv", settings=QUICK)
    shutil.rmtree(resolve(model))
    with pytest.raises(BundleError, match="--undo"):
        resolve(model)
    undo(model)
    assert forward_digest(resolve(model)) == forward_digest(folder / "blunt")


def test_what_is_in_service_is_no_candidate(model, folder):
    with pytest.raises(ConfigError, match="nothing to promote"):
        promote(folder / "blunt", model, folder / "cohort.csv", settings=QUICK)


def test_other_classes_are_refused_before_anything_is_scored(model, tmp_path, folder):
    other = judged.bundle(tmp_path / "swapped", classes=("tumor", "normal"))
    with pytest.raises(ConfigError, match="in service is one of"):
        promote(other, model, folder / "cohort.csv", settings=QUICK)


def test_a_cohort_without_the_split_is_refused(model, tmp_path, folder):
    cohort = judged.write_cohort(tmp_path, patients=2, splits=("train",))
    with pytest.raises(ConfigError, match="no slide in split 'val'"):
        promote(folder / "good", model, cohort, settings=QUICK)


@pytest.mark.parametrize(
    ("data", "leaks"),
    [
        ({"patients": {"train": ["Pval3", "Px"]}}, True),
        ({"slides": {"train": ["FILE"]}}, True),
        ({"slides": {"train": ["sha256:" + "0" * 64]}, "patients": {"train": ["Px"]}}, False),
        ({"slides": {"val": ["FILE"]}, "patients": {"train": ["Px"], "val": ["Pval3"]}}, False),
    ],
)
def test_one_that_was_trained_on_these_patients_or_files_is_refused(folder, tmp_path, data, leaks):
    from slideflow_ray.identity import identity

    items = read_cohort(folder / "cohort.csv")
    text = json.dumps({"data": data}).replace("FILE", identity(items[2].uri))
    (tmp_path / "training.json").write_text(text)
    if leaks:
        with pytest.raises(SplitLeakError, match="was trained on 1"):
            check_unseen(tmp_path, items)
        assert "Its figures are too good" in flattered(tmp_path, items)
    else:
        assert check_unseen(tmp_path, items) == []
        assert flattered(tmp_path, items) == ""


@pytest.mark.parametrize("text", [None, "{}", '{"data": {"slides": ["x"]}}', "[1]"])
def test_without_a_record_that_is_said(folder, tmp_path, text):
    if text is not None:
        (tmp_path / "training.json").write_text(text)
    (said,) = check_unseen(tmp_path, read_cohort(folder / "cohort.csv"))
    assert "no record of its training" in said


def test_a_copy_that_dies_leaves_what_was_in_service(model, folder, monkeypatch):
    before = everything(model)

    def dies(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(promoting, "_flush", dies)
    with pytest.raises(OSError, match="No space"):
        promote(folder / "good", model, folder / "cohort.csv", settings=QUICK)
    assert everything(model) == before
    assert len(list((model / "versions").iterdir())) == 1


def test_another_promotion_in_between_refuses_this_one(model, folder, monkeypatch):
    real = promoting._extras

    def meanwhile(*words: object):
        monkeypatch.setattr(promoting, "_extras", real)
        promote(folder / "good", model, folder / "cohort.csv", settings=QUICK)
        return real(*words)

    monkeypatch.setattr(promoting, "_extras", meanwhile)
    better = judged.bundle(model.parent / "better", gain=1.1)
    with pytest.raises(ConfigError, match="in the meantime"):
        promote(better, model, folder / "cohort.csv", Terms(rule="log_loss"), QUICK)
    assert read_current(model).forward == forward_digest(folder / "good")


def call(capsys, *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    return int(end.value.code or 0), capsys.readouterr().out


def test_on_the_command_line_a_refusal_ends_with_3_and_its_figures(model, folder, capsys):
    words = ("promote", folder / "bad", "--into", model, "--cohort", folder / "cohort.csv")
    code, out = call(capsys, *words)
    assert code == 3
    assert "Refused: " in out
    assert "a gain of -" in out
    code, out = call(capsys, "promote", folder / "good", "--into", model, "--cohort", folder / "cohort.csv", "--json")
    assert code == 0
    assert json.loads(out)["accepted"] is True
    code, out = call(capsys, "promote", "--undo", "--into", model)
    assert code == 0
    assert "back to" in out
    assert call(capsys, "promote", "--into", model)[0] == 2


def test_terms_are_checked():
    for terms in ({"rule": "luck"}, {"margin": -1.0}, {"point": "luck"}):
        with pytest.raises(ConfigError):
            Terms(**terms)
    assert "Refused" in Decision(False, "worse", "v").summary()


def test_one_that_was_trained_on_a_leaking_split_is_refused_unless_said(folder, model, tmp_path):
    before = everything(model)
    leaking = shutil.copytree(folder / "good", tmp_path / "leaking")
    (leaking / "training.json").write_text(json.dumps({"leaking": LEAKING, "data": {}}))
    with pytest.raises(SplitLeakError, match="trained on a LEAKING split"):
        promote(leaking, model, folder / "cohort.csv", settings=QUICK)
    with pytest.raises(SystemExit) as left:
        cli.main(["promote", str(leaking), "--into", str(model), "--cohort", str(folder / "cohort.csv")])
    assert left.value.code == 2
    assert everything(model) == before
    decision = promote(leaking, model, folder / "cohort.csv", Terms(leaking=True), QUICK)
    assert decision.accepted
    assert any("LEAKING" in note for note in decision.notes)
    assert "LEAKING" in decision.summary()

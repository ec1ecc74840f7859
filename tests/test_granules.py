"""Granules in micrographs: three models as bundles like any other, joined on unseen patients, repeated by patient."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from slideflow_ray.compare import Settings, compare
from slideflow_ray.errors import ConfigError
from slideflow_ray.models.bundle import read_card
from slideflow_ray.models.networks import headless, load_network
from slideflow_ray.phantoms.files import write_csv
from slideflow_ray.phantoms.tem import write_tem_cohort
from slideflow_ray.promote import Terms, promote
from slideflow_ray.slides import open_slide
from slideflow_ray.train.job import train
from slideflow_ray.train.repeat import Repeats, repeat
from slideflow_ray.train.spec import TrainJob, load_train, read_job
from slideflow_ray.train.weights import People, familiar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))
import granules

CLASSES = ("none", "granule")
SIDE = 64
NET = "timm:test_resnet"
TWO = {
    "architecture": "two-models",
    "arguments": {"first": NET, "second": {"backbone": NET}},
    "machine": {"folds": 2, "kernels": ["linear"]},
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("micrographs")
    return write_tem_cohort(folder, patients=20, images=3, size_px=(SIDE, SIDE), nm_per_px=24.0, workers=1)


def job_of(cohort: Path, out: Path, name: str = "c", **settings) -> TrainJob:
    fit = {"epochs": 1, "batch_size": 16, "threads": 1, "device": "cpu", "precision": "fp32", "augment": False}
    values = {
        "cohort": str(cohort),
        "out": str(out / name),
        "work": str(out / "work"),
        "classes": CLASSES,
        "whole": {"tile_px": SIDE, "fit": "squash"},
        "executor": {"workers": 1},
        **settings,
        "fit": {**fit, **settings.get("fit", {})},
    }
    return TrainJob.parse(values, "test")


def record(bundle: Path) -> dict:
    return json.loads((bundle / "training.json").read_text())


@pytest.fixture(scope="module")
def joined(cohort, tmp_path_factory):
    out, said = tmp_path_factory.mktemp("joined"), []
    return out, train(job_of(cohort, out, fit=TWO), said.append), said


def test_one_training_leaves_three_bundles_joined_on_patients_that_nobody_had_seen(joined, cohort):
    out, result, said = joined
    parts = out / "work" / "parts"
    assert [read_card(parts / name).architecture for name in ("c-first", "c-second")] == [NET, "skip-svm"]
    card, told = read_card(result.bundle), record(result.bundle)
    assert (card.architecture, card.precision, card.arguments["rule"]) == ("two-models", "fp32", told["join"]["rule"])
    losses = told["join"]["log_loss"]
    assert losses[told["join"]["rule"]] == min(losses[rule] for rule in ("vote", "stack", "features"))
    everyone = set(told["data"]["patients"]["train"])
    away = [everyone - set(record(parts / f"c-first-{k}")["data"]["patients"]["train"]) for k in range(2)]
    assert away[0] | away[1] == everyone
    assert not away[0] & away[1]
    assert record(parts / "c-second")["machine"]["judged"] == told["join"]["judged"] == "folds"
    assert ("NOT" in told["join"]["said"]) != told["join"]["helps"]
    assert any(told["join"]["said"] == getattr(event, "text", "") for event in said)
    assert not train(job_of(cohort, out, fit=TWO)).changed


def test_the_three_are_run_compared_and_promoted_like_any_other(joined, cohort, tmp_path):
    out, result, _ = joined
    parts = out / "work" / "parts"
    bundles = [parts / "c-first", parts / "c-second", result.bundle]
    settings = Settings(split="val", benchmark=False, resamples=100)
    found = compare(bundles, cohort, tmp_path / "run", settings)
    assert [one.architecture for one in found.bundles] == [NET, "skip-svm", "two-models"]
    assert len(found.pairs) == 3
    assert all(pair.same_tiles for pair in found.pairs)
    at = result.best.val
    c = found.bundles[2].at("tile").values
    assert (c["auc"], c["accuracy"]) == pytest.approx((at.auc, at.accuracy), abs=1e-6)
    assert c["log_loss"] == pytest.approx(at.loss, abs=1e-4)
    decision = promote(result.bundle, tmp_path / "models" / "granule", cohort, Terms(), settings)
    assert decision.accepted
    assert (tmp_path / "models" / "granule" / "current.json").is_file()


def test_a_run_needs_no_scikit_learn(joined, monkeypatch):
    out, result, _ = joined
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"] or ["sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        import sklearn.svm  # noqa: F401
    for path in (result.bundle, out / "work" / "parts" / "c-second"):
        assert load_network(path)[1](torch.zeros(1, 3, SIDE, SIDE)).shape == (1, 2)


def test_features_of_a_backbone_that_knows_the_patients_are_judged_on_val(joined, cohort):
    out, _, _ = joined
    first = str(out / "work" / "parts" / "c-first")
    fit = {"architecture": "skip-svm", "arguments": {"backbone": NET, "components": 4}, "weights": first}
    said = []
    found = train(job_of(cohort, out, "b", fit={**fit, "machine": {"kernels": ["rbf"]}}), said.append)
    told = record(found.bundle)["machine"]
    assert (told["judged"], told["kernel"], told["components"]) == ("val", "rbf", 4)
    assert any("has seen 12 of the training patients" in getattr(event, "text", "") for event in said)
    own, given = (load_network(path)[1].state_dict() for path in (found.bundle, first))
    assert torch.equal(own["features.backbone.layer1.0.conv1.weight"], given["layer1.0.conv1.weight"])
    assert own["machine.basis"].shape[0] == 4
    rows = list(csv.DictReader(cohort.read_text().splitlines()))
    for row in rows:
        row["split"] = {"train": "val", "val": "train"}.get(row["split"], row["split"])
        row["uri"] = str(cohort.parent / row["uri"])
        row["annotation"] = ""
    with (out / "turned.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ConfigError, match="12 patients of this training's val split"):
        train(job_of(out / "turned.csv", out, "e", fit=fit))


@pytest.fixture
def resplit(cohort, tmp_path):
    """Writes the cohort with other splits."""

    def made(change: dict[str, str]) -> Path:
        rows = list(csv.DictReader(cohort.read_text().splitlines()))
        for row in rows:
            row |= {"split": change.get(row["split"], row["split"]), "annotation": ""}
            row["uri"] = str(cohort.parent / row["uri"])
        with (tmp_path / "other.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path / "other.csv"

    return made


def test_every_training_refuses_weights_that_have_seen_who_judges_it(joined, resplit, tmp_path):
    """A plain network begun with a recorded bundle: its patients of train, or those that chose its epoch, are test."""
    first = joined[0] / "work" / "parts" / "c-first"
    swapped = {"train": "val", "val": "train"}
    for change, said in (
        (swapped, "trained on 12 patients of this training's val split"),
        ({"train": "test", "test": "train"}, "trained on 12 patients of this training's test split"),
        ({"val": "test", "test": "val"}, "chosen by 4 patients of this training's test split"),
    ):
        for weights in (first, first / "weights.safetensors"):
            fit = {"architecture": NET, "weights": str(weights)}
            with pytest.raises(ConfigError, match=said):
                train(job_of(resplit(change), tmp_path, "e", fit=fit))
    fit = {"architecture": NET, "weights": str(first)}
    assert train(job_of(resplit({}), tmp_path, "f", fit=fit)).changed


def test_a_pretraining_that_saw_val_is_said_and_one_that_saw_test_refused(tmp_path):
    people = {"train": People(frozenset("ab")), "val": People(frozenset("c")), "test": People(frozenset("d"))}

    def seen(train, val=()):
        data = {"patients": {"train": list(train), "val": list(val)}}
        (tmp_path / "training.json").write_text(json.dumps({"settings": {"task": "pretrain"}, "data": data}))
        return familiar(str(tmp_path), people)

    assert seen("ax", "c") == (1, "")
    assert "trained on 1 patients of this training's val split (c), without labels" in seen("abc").note
    for train_, val in (("ad", ""), ("a", "d")):
        with pytest.raises(ConfigError, match="test split"):
            seen(train_, val)
    assert familiar(str(tmp_path / "elsewhere" / "weights.safetensors"), people) == (0, "")


def test_two_models_begun_with_weights_that_know_the_patients_are_joined_on_val(joined, cohort):
    """Left out of a fold, a patient is not unseen: the weights that every fold begins with have learnt from it."""
    out, _, _ = joined
    fit = {**TWO, "weights": str(out / "work" / "parts" / "c-first")}
    said = []
    told = record(train(job_of(cohort, out, "k", fit=fit), said.append).bundle)
    assert told["join"]["judged"] == "val"
    assert record(out / "work" / "parts" / "k-second")["machine"]["judged"] == "val"
    assert not list((out / "work" / "parts").glob("k-first-*"))
    assert any("has seen 12 of the training patients" in getattr(event, "text", "") for event in said)


def test_two_bundles_are_joined_on_val_by_a_machine_on_the_features_of_both(joined, cohort):
    """The machine's oracle is scikit-learn's own, on features taken from the two networks by hand."""
    out, _, _ = joined
    parts = [out / "work" / "parts" / name for name in ("c-first", "c-second")]
    machine = {"first": str(parts[0]), "second": str(parts[1]), "rules": ["features"], "kernels": ["rbf"]}
    found = train(job_of(cohort, out, "d", fit={**TWO, "machine": machine}))
    told = record(found.bundle)
    assert (told["join"]["judged"], told["join"]["rule"]) == ("val", "features")
    rows = [r for r in csv.DictReader(cohort.read_text().splitlines()) if r["split"] != "test"]
    a, b = (load_network(path)[1] for path in parts)
    card, net = load_network(found.bundle)
    x = torch.cat([seen(cohort, row, card) for row in rows])
    with torch.inference_mode():
        z = net(x).double().numpy()
        both = torch.cat([headless(a, 2)(x), b.features(x)], 1).double().numpy()
    train_rows = [row["split"] == "train" for row in rows]
    how = told["machine"]
    svc = SVC(kernel="rbf", C=how["c"], gamma=how["gamma"], class_weight="balanced")
    plain = make_pipeline(StandardScaler(), svc)
    plain.fit(both[train_rows], [row["label"] == "granule" for row in rows if row["split"] == "train"])
    decision, margin = plain.decision_function(both), z[:, 1] - z[:, 0]
    slope, offset = np.polyfit(decision, margin, 1)
    np.testing.assert_allclose(margin, slope * decision + offset, atol=2e-3)


# repeated folds


@pytest.fixture(scope="module")
def repeated(cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("repeated")
    fit = {**TWO, "machine": {**TWO["machine"], "judged": "val"}}
    return out, repeat(job_of(cohort, out, fit=fit), Repeats(folds=2, seeds=1))


def test_every_fold_is_predicted_once_by_models_of_other_patients(repeated, cohort):
    out, found = repeated
    rows = list(csv.DictReader(cohort.read_text().splitlines()))
    everyone, seen = {row["patient_id"] for row in rows}, []
    for fold in range(2):
        folder = out / "work" / "repeats" / f"seed-0-fold-{fold}"
        used = [record(folder / name)["data"]["patients"] for name in ("C", "parts/C-first", "parts/C-second")]
        assert used[0] == used[1] == used[2]
        assert not set(used[0]["train"]) & set(used[0]["val"])
        seen.append(set(used[0]["train"]) | set(used[0]["val"]))
    assert (everyone - seen[0]) | (everyone - seen[1]) == everyone
    assert seen[0] | seen[1] == everyone
    assert not (everyone - seen[0]) & (everyone - seen[1])
    assert found.about["images"] == len(rows)


def test_folds_are_not_predicted_by_what_begins_with_weights_that_have_seen_them(joined, cohort, tmp_path):
    weights = str(joined[0] / "work" / "parts" / "c-first")
    with pytest.raises(ConfigError, match="of this training's test split"):
        repeat(job_of(cohort, tmp_path, fit={**TWO, "weights": weights}), Repeats(folds=2, seeds=1))


def test_figures_are_scikit_learns(repeated, cohort):
    out, found = repeated
    rows = list(csv.DictReader(cohort.read_text().splitlines()))
    for name, path in {"A": "parts/C-first", "B": "parts/C-second", "C": "C"}.items():
        folds = []
        for fold in range(2):
            folder = out / "work" / "repeats" / f"seed-0-fold-{fold}"
            used = record(folder / "C")["data"]["patients"]
            left = [r for r in rows if r["patient_id"] not in {*used["train"], *used["val"]}]
            folds.append(([r["label"] == "granule" for r in left], predicted(folder / path, cohort, left)))
        truth, p = (np.concatenate([fold[i] for fold in folds]) for i in (0, 1))
        figures = found.figures[name]
        for metric, function in ORACLES.items():
            each = [function(np.array(t), np.array(q)) for t, q in folds]
            assert figures[metric].mean == pytest.approx(np.mean(each), abs=1e-6), (name, metric)
            assert figures[metric].deviation == pytest.approx(np.std(each, ddof=1), abs=1e-6)
            assert figures[metric].pooled == pytest.approx(function(truth, p), abs=1e-6)
            low, high = figures[metric].interval or (0, 1)
            assert low <= figures[metric].pooled <= high
    text = found.summary()
    assert all(word in text for word in ("mean ± sd of 2 folds x 1 seeds", "McNemar", "accuracy", "npv"))
    assert json.loads((out / "c" / "repeated.json").read_text())["verdict"] == found.verdict


def seen(cohort: Path, row: dict, card) -> torch.Tensor:
    """A micrograph as a network is given it: the reader's pixels, scaled by NumPy alone."""
    with open_slide(str(cohort.parent / row["uri"]), mpp=float(row["mpp"]), modality=row["modality"]) as reader:
        pixels = reader.read(0, (0, 0), reader.size_px0).astype(np.float32) / 255
    x = (pixels - np.float32(card.mean)) / np.float32(card.std)
    return torch.from_numpy(x).permute(2, 0, 1)[None].float()


def predicted(bundle: Path, cohort: Path, rows: list[dict]) -> list[float]:
    """Probabilities of granules."""
    card, net = load_network(bundle)
    with torch.inference_mode():
        return [float(net(seen(cohort, row, card)).softmax(1)[0, 1]) for row in rows]


def called(function, **more):
    return lambda truth, p: function(truth, p >= 0.5, zero_division=np.nan, **more)


ORACLES = {
    "accuracy": lambda truth, p: oracle.accuracy_score(truth, p >= 0.5),
    "sensitivity": called(oracle.recall_score),
    "specificity": called(oracle.recall_score, pos_label=False),
    "auc": oracle.roc_auc_score,
}


def test_words_say_when_joining_does_not_help(repeated):
    _, found = repeated
    for metric, line in zip(("accuracy", "auc"), found.verdict.splitlines(), strict=True):
        values = {name: found.figures[name][metric].pooled for name in "ABC"}
        assert line.startswith("C beats A and B" if values["C"] > max(values["A"], values["B"]) else "C does NOT beat")


def test_the_job_reads_the_preset_of_the_paper(cohort, tmp_path, monkeypatch, capsys):
    text = f'preset = "000"\ncohort = "{cohort}"\nout = "o"\nclasses = ["none", "granule"]\n[fit]\nepochs = 3\n'
    (tmp_path / "train.toml").write_text(text)
    job, _ = read_job(load_train(tmp_path / "train.toml"), "test")
    assert (job.fit.architecture, job.fit.epochs, job.whole.tile_px) == ("two-models", 3, 512)
    seen = []
    monkeypatch.setattr(granules, "repeat", lambda job, how, _: seen.append((job, how)) or Said())
    assert granules.main([str(tmp_path / "train.toml"), "--folds", "3", "--seeds", "1", "--backbone", "first"]) == 0
    assert seen == [(job, Repeats(3, 1, "first"))]
    assert capsys.readouterr().out == "table\n"


class Said:
    def summary(self) -> str:
        return "table"


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"classes": ("a", "b", "c"), "fit": {"architecture": "skip-svm"}}, "tells two classes apart"),
        ({"task": "multilabel", "fit": TWO}, "tells two classes apart"),
        ({"fit": {"machine": {}}}, "belongs to skip-svm and two-models"),
        ({"fit": {**TWO, "machine": {"folds": 1}}}, "folds"),
    ],
)
def test_what_makes_no_sense_is_said(values, cause):
    with pytest.raises(ConfigError, match=cause):
        job_of(Path("c.csv"), Path("o"), **values)


def test_too_few_patients_are_said(cohort, tmp_path):
    fit = {"architecture": "skip-svm", "arguments": {"backbone": NET}, "machine": {"folds": 9}}
    with pytest.raises(ConfigError, match="6 patients; 9 folds by patient need 9"):
        train(job_of(cohort, tmp_path, fit=fit))


@pytest.mark.parametrize(
    ("machine", "cause"),
    [({"folds": 9}, "Class none has images of 6 patients in train; 9 folds"), ({"judged": "val"}, "in val; 2 folds")],
)
def test_too_few_patients_to_join_on_are_said_before_anything_is_trained(machine, cause, cohort, tmp_path):
    rows = list(csv.DictReader(cohort.read_text().splitlines()))
    val = sorted({row["patient_id"] for row in rows if row["split"] == "val"})
    kept = [row for row in rows if row["patient_id"] not in val[2:]]
    uris = {row["slide_id"]: str(cohort.parent / row["uri"]) for row in rows}
    short = write_csv(
        tmp_path / "cohort.csv", [{**row, "uri": uris[row["slide_id"]], "annotation": ""} for row in kept]
    )
    fit = {"architecture": "two-models", "arguments": {"second": {"backbone": NET}}, "machine": {"folds": 2, **machine}}
    with pytest.raises(ConfigError, match=cause):
        train(job_of(short, tmp_path, fit=fit))
    assert not (tmp_path / "work" / "parts").exists()

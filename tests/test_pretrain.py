"""Pre-training without labels: the loop of every training, resume, transfer of encoder and decoder."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from slideflow_ray.errors import ConfigError
from slideflow_ray.events import EpochTrained, Noted
from slideflow_ray.phantoms import write_tem_cohort
from slideflow_ray.train.job import card_of, train
from slideflow_ray.train.loop import learning_rate
from slideflow_ray.train.pretrain import PretextNet, alarm_of, kept
from slideflow_ray.train.spec import PretextSpec, TrainJob, TrainSpec, as_pretraining

ARGUMENTS = {"levels": 2, "width": 8}
FIT = {"arguments": ARGUMENTS, "epochs": 3, "batch_size": 4, "threads": 1, "precision": "fp32"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tem")
    return write_tem_cohort(folder, patients=6, images=1, size_px=(128, 128), nm_per_px=20, workers=1)


def job(cohort, tmp_path, name="pre", **fit):
    values = {
        "cohort": str(cohort),
        "out": str(tmp_path / name),
        "work": str(tmp_path / "work"),
        "tile": {"tile_px": 64, "mpp": 0.02},
        "fit": {**FIT, **fit},
    }
    return TrainJob.parse(as_pretraining(values), "test")


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    """A pre-training that ran through: its folder, its result, what it said."""
    folder, events = tmp_path_factory.mktemp("trained"), []
    return folder, train(job(cohort, folder), events.append), events


def test_a_pretraining_leaves_the_network_without_its_heads(trained, cohort):
    tmp_path, result, events = trained
    state = load_file(tmp_path / "pre" / "weights.safetensors")
    assert not any(key.startswith(("head", "net.")) for key in state)
    assert {key.split(".")[0] for key in state} == {"down", "up", "join"}
    assert not (tmp_path / "pre" / "bundle.json").exists()
    record = json.loads((tmp_path / "pre" / "training.json").read_text())
    assert set(record["epochs"][0]["parts"]) >= {"within", "between", "semantic", "consistency", "active", "entropy"}
    shares = [value for key, value in record["epochs"][0]["parts"].items() if key.startswith("share_")]
    assert sum(shares) == pytest.approx(1)
    assert record["data"]["patients"] == {"train": ["p000", "p001"], "val": ["p002", "p003"]}  # of test nothing
    assert len([e for e in events if isinstance(e, EpochTrained)]) == 3
    assert result.changed
    assert not train(job(cohort, tmp_path)).changed


def test_going_on_after_a_kill_gives_the_same_weights(trained, cohort, tmp_path):
    folder, whole, _ = trained

    class Killed(BaseException):
        pass

    def kill(event):
        if isinstance(event, EpochTrained) and event.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        train(job(cohort, tmp_path, "killed"), kill)
    events = []
    train(job(cohort, tmp_path, "killed"), events.append)
    assert any(isinstance(e, Noted) and "Going on after epoch" in e.text for e in events)
    one, two = (load_file(at / "weights.safetensors") for at in (folder / "pre", tmp_path / "killed"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert whole.history[-1].train_loss < whole.history[0].train_loss


def test_a_segmentation_begins_with_encoder_and_decoder(trained, cohort, tmp_path):
    weights = trained[0] / "pre" / "weights.safetensors"
    values = {
        "cohort": str(cohort),
        "out": str(tmp_path / "seg"),
        "work": str(trained[0] / "work"),
        "classes": ["background", "membrane", "endothelium", "podocyte"],
        "task": "segment",
        "tile": {"tile_px": 96, "mpp": 0.02, "halo_px": 24},
        "fit": {**FIT, "architecture": "unet", "weights": str(weights), "epochs": 1, "lr": 1e-12, "weight_decay": 0},
    }
    train(TrainJob.parse(values, "test"))
    before, after = load_file(weights), load_file(tmp_path / "seg" / "weights.safetensors")
    for key in before:
        if "running" not in key and "num_batches" not in key:
            np.testing.assert_allclose(after[key], before[key], atol=1e-6)
    assert {key for key in after if key not in before} == {"head.weight", "head.bias"}


def test_tiles_may_be_smaller_than_the_reach_of_the_network(cohort, tmp_path):
    """Nothing is put together from them: 4 levels reach 107 px."""
    made = job(cohort, tmp_path, arguments={"levels": 4, "width": 4}, epochs=1)
    with pytest.raises(ConfigError, match="no core within a halo of 112 px"):
        card_of(made.model_copy(update={"task": "segment", "classes": ("a", "b")}))
    assert card_of(made).core_px == 64 - 2 * 16


def test_smp_networks_are_decoded_too():
    from slideflow_ray.models.networks import build

    net = build("smp:Unet", {"encoder_name": "resnet18"}, 2)
    made = PretextNet(net, PretextSpec(), 2)
    found = made.decode(torch.zeros(2, 3, 64, 64))
    assert found.deep.shape == (2, 512, 2, 2)
    assert found.full.shape == (2, 16, 64, 64)
    assert {key.split(".")[0] for key in kept(made.state_dict())} == {"encoder", "decoder"}


def test_the_script_and_the_command_say_what_they_did(cohort, tmp_path, capsys):
    settings = tmp_path / "pretrain.toml"
    settings.write_text(
        f'cohort = "{cohort}"\nout = "{tmp_path}/pre"\ncrew = {{kind = "inline"}}\n'
        "[tile]\ntile_px = 64\nmpp = 0.02\n[fit]\nepochs = 1\nbatch_size = 4\narguments = {levels = 2, width = 4}\n"
        '[fit.pretext]\nmethod = "detcon"\n'
    )
    from typer.testing import CliRunner

    from slideflow_ray.cli import app

    done = CliRunner().invoke(app, ["pretrain", str(settings)])
    assert done.exit_code == 0, done.output
    assert "train tiles" in done.output
    assert f"Weights: {tmp_path}/pre/weights.safetensors" in done.output
    assert "AUC" not in done.output  # there is no label to be right about
    assert "accuracy" not in done.output
    again = CliRunner().invoke(app, ["pretrain", str(settings)])
    assert "Nothing to do, the weights are there" in again.output
    assert CliRunner().invoke(app, ["pretrain", str(settings), "--lr", "1"]).exit_code != 0
    script = runpy.run_path(str(Path(__file__).parent.parent / "jobs" / "pretrain.py"))
    assert script["parser"]().parse_args(["pretrain.toml"]).settings == "pretrain.toml"
    settings.write_text(settings.read_text().replace("mpp", "mmp"))
    assert script["main"]([str(settings)]) == 2
    assert "mmp" in capsys.readouterr().err


def test_what_makes_no_sense_is_refused(cohort, tmp_path):
    values = job(cohort, tmp_path).model_dump()
    for change in (
        {"classes": ("a", "b")},
        {"task": "segment"},
        {"whole": {"tile_px": 64, "fit": "pad"}, "tile": None},
    ):
        with pytest.raises(ConfigError):
            TrainJob.parse({**values, **change}, "test")
    with pytest.raises(ConfigError, match="decodes nothing"):
        job(cohort, tmp_path, architecture="small-cnn", arguments={})


def test_the_rate_climbs_and_falls():
    spec = TrainSpec(lr=1, epochs=6, warmup=2)
    assert [round(learning_rate(spec, e), 3) for e in range(6)] == [0, 0.5, 1.0, 0.854, 0.5, 0.146]
    assert learning_rate(spec, 1, 0.5) == 0.75


def test_an_alarm_names_the_collapse():
    parts = {"active": 2.0, "entropy": 0.3, "information": 1.2, **{f"share_{k}": 1 / 8 for k in range(8)}}
    assert "only 2.0 of 8" in alarm_of(parts)
    assert alarm_of({**parts, "active": 5.0}) is None
    assert "divide no image" in alarm_of({**parts, "active": 5.0, "information": 0.05})
    assert alarm_of({"contrast": 1.0}) is None

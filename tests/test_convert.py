"""models/convert.py: foreign weights come in as plain tensors or not at all."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

from slideflow_ray import cli
from slideflow_ray.errors import BundleError, ConfigError
from slideflow_ray.models.bundle import BundleCard, read_card
from slideflow_ray.models.convert import as_weights, card_of, convert, plain_names, read_foreign
from slideflow_ray.models.networks import build, load_network
from slideflow_ray.models.scorer import load_scorer
from slideflow_ray.models.unpickle import state_dict
from slideflow_ray.profile import resolve
from slideflow_ray.specs import ComputeSpec


def card(architecture: str = "small-cnn", classes: int = 2, **more) -> BundleCard:
    values = {
        "name": "foreign",
        "task": "classify",
        "architecture": architecture,
        "classes": tuple(f"c{i}" for i in range(classes)),
        "tile_px": 64,
        "mpp": 0.5,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
    }
    return BundleCard(**(values | more))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build("small-cnn", {}, 2).state_dict()


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def wrapped(state: dict, how: str) -> object:
    renamed = {f"module.{k}": v for k, v in state.items()}
    return {
        "plain": state,
        "module": renamed,
        "checkpoint": {"epoch": 3, "state_dict": renamed, "optimizer": {"lr": 0.1}},
        "lightning": {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 1},
        "compiled": {"model": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
    }[how]


@pytest.mark.parametrize("how", ["plain", "module", "checkpoint", "lightning", "compiled"])
def test_a_state_dict_comes_in_however_it_is_wrapped(state, tmp_path, how):
    save_file(state_dict(wrapped(state, how)), tmp_path / "w.safetensors")
    done = convert(tmp_path / "w.safetensors", card(), tmp_path / "out")
    _, net = load_network(done.path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_safetensors_and_old_pickles_come_in_too(state, tmp_path):
    save_file(dict(state), tmp_path / "w.safetensors")
    old = {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    one = convert(tmp_path / "w.safetensors", card(), tmp_path / "a")
    other = convert(tmp_path / "old.pth", card(), tmp_path / "b")
    assert (one.path / "weights.safetensors").read_bytes() == (other.path / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("architecture", "make"),
    [
        ("torchvision:resnet18", lambda: torchvision.models.resnet18(num_classes=3)),
        ("timm:resnet18", lambda: timm.create_model("resnet18", num_classes=3)),
    ],
)
def test_the_bundle_scores_as_the_network_it_came_from(tmp_path, architecture, make):
    torch.manual_seed(1)
    net = make().eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    done = convert(tmp_path / "w.safetensors", card(architecture, 3), tmp_path / "out")
    scorer = load_scorer(done.path, resolve(ComputeSpec(precision="fp32")))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.inference_mode():
        np.testing.assert_allclose(scorer.logits(pixels), net(x).numpy(), atol=1e-4)


def test_auxiliary_heads_are_left_out_and_said(tmp_path):
    net = torchvision.models.googlenet(num_classes=2, aux_logits=True, init_weights=False)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    done = convert(tmp_path / "w.safetensors", card("torchvision:googlenet"), tmp_path / "out")
    assert "auxiliary heads" in done.summary()


class Evil:
    """What a hostile file does when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def hostile(path: Path, state: dict) -> Path:
    """Write the file that the name of `path` says."""
    evil = Evil(path.with_name("owned"))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    made = {
        "evil-pickle": lambda: path.write_bytes(pickle.dumps({"a": evil})),
        "evil-torch": lambda: torch.save({"state_dict": {"a": torch.zeros(2)}, "x": evil}, path),
        "whole-model": lambda: torch.save(torchvision.models.resnet18(num_classes=2), path),
        "script": lambda: torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path),
        "petabytes": lambda: torch.save({"head.weight": torch.zeros(1).expand(1 << 50)}, path),
        "zip-bomb": lambda: zip_bomb(path),
        "truncated": lambda: path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2]),
        "not-weights": lambda: path.write_bytes(b"GIF89a" * 100),
        "no-tensors": lambda: torch.save({"epoch": 3}, path),
    }
    made[path.stem]()
    return path


def zip_bomb(path: Path) -> None:
    """A weights file whose one storage is 2 GB of zeros packed into a few megabytes."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"K\x04", b"J" + (1 << 29).to_bytes(4, "little"))
            if not name.endswith("data/0"):
                new.writestr(name, data)
                continue
            with new.open(name, "w", force_zip64=True) as file:
                for _ in range(32):
                    file.write(bytes(1 << 26))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("evil-pickle", "wants to run code"),
        ("evil-torch", "wants to run code"),
        ("whole-model", "whole model"),
        ("script", "cannot be opened as weights"),
        ("petabytes", "took more than"),
        ("zip-bomb", "took more than"),
        ("truncated", "cannot be opened as weights"),
        ("not-weights", "weights"),
        ("no-tensors", "no tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_hostile_or_broken_file_ends_in_one_line_and_leaves_nothing(state, tmp_path, what, said):
    path = hostile(tmp_path / f"{what}.pth", state)
    before = set(tmp_path.iterdir())
    with pytest.raises(BundleError, match=said) as error:
        convert(path, card(), tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    assert "state_dict()" in error.value.step
    assert "weights_only" not in str(error.value)
    assert set(tmp_path.iterdir()) == before
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("value", [[torch.zeros(2)], torch.zeros(2), {"state_dict": {"a": 1}}, {}, 3])
def test_what_is_no_state_dict_is_said(value):
    with pytest.raises(ValueError, match="holds"):
        state_dict(value)


def test_it_is_opened_by_another_process(state, tmp_path, monkeypatch):
    """This process never unpickles: torch.load and pickle are not even reached."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("unpickled in this process")

    path = saved(tmp_path / "w.pth", state)
    for name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(name, never)
    assert set(read_foreign(path)) == set(state)


def test_memory_and_time_are_limited(tmp_path):
    path = saved(tmp_path / "big.pth", {"a": torch.zeros(50_000_000)})
    with pytest.raises(BundleError, match="took more than the 100 MB"):
        read_foreign(path, megabytes=100)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {k: v for k, v in s.items() if "features.4" not in k}, "5 missing"),
        (lambda s: s | {"extra.weight": torch.zeros(2)}, r"1 unexpected \(extra.weight\)"),
        (lambda s: s | {"features.0.0.weight": torch.zeros(3, 3)}, r"features.0.0.weight is \(3, 3\) instead of"),
        (lambda s: s | {"head.weight": torch.zeros(7, 128), "head.bias": torch.zeros(7)}, "its head gives 7"),
        (lambda s: s | {"head.bias": torch.full((2,), torch.nan)}, "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(state, tmp_path, change, said):
    save_file(change(dict(state)), tmp_path / "w.safetensors")
    with pytest.raises(BundleError, match=said):
        convert(tmp_path / "w.safetensors", card(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_counts_of_batches_may_be_missing(state, tmp_path):
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "w.safetensors")
    assert convert(tmp_path / "w.safetensors", card(), tmp_path / "out").tensors == len(state)


def test_as_weights_keeps_every_tensor(state, tmp_path):
    more = {f"module.{k}": v for k, v in state.items()} | {"module.fc.weight": torch.ones(1000, 8).half()}
    done = as_weights(saved(tmp_path / "w.pth", {"state_dict": more}), tmp_path / "w.safetensors")
    found = load_file(done.path)
    assert set(found) == {k.removeprefix("module.") for k in more}
    assert found["fc.weight"].dtype == torch.float16
    assert all(torch.equal(found[k.removeprefix("module.")], v) for k, v in more.items())
    with pytest.raises(ConfigError, match="exists already"):
        as_weights(tmp_path / "w.pth", tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="must end in"):
        as_weights(tmp_path / "w.pth", tmp_path / "w.bin")


def test_tied_tensors_come_in_twice(tmp_path):
    one = torch.ones(3, 3)
    done = as_weights(saved(tmp_path / "w.pth", {"a": one, "b": one, "c": one.T}), tmp_path / "w.safetensors")
    assert set(load_file(done.path)) == {"a", "b", "c"}


def test_a_network_that_has_the_prefix_keeps_it():
    state = {"features.0": torch.zeros(1), "features.1": torch.zeros(1)}
    assert plain_names(state, ("features.0", "features.1")) == state
    assert set(plain_names(state, ("0", "1"))) == {"0", "1"}
    assert plain_names(state) == state


def test_on_the_command_line(state, tmp_path, capsys):
    path = saved(tmp_path / "w.pth", state)
    saved_as = tmp_path / "w.safetensors"
    save_file(dict(state), saved_as)
    words = ["convert", str(path), "--architecture", "small-cnn", "--classes", "normal, tumor", "--tile-px", "64"]
    for more, code in ([], 2), (["--mpp", "0.5"], 0), (["--mpp", "0.5", "--arguments", "{"], 2):
        with pytest.raises(SystemExit) as end:
            cli.main([*words, "--out", str(tmp_path / "bundle"), *more])
        assert int(end.value.code or 0) == code, capsys.readouterr().err
    found = read_card(tmp_path / "bundle")
    assert (found.classes, found.mean) == (("normal", "tumor"), (0.485, 0.456, 0.406))
    with pytest.raises(SystemExit):
        cli.main(["convert", str(saved_as), "--as-weights", str(tmp_path / "x.safetensors")])
    assert set(load_file(tmp_path / "x.safetensors")) == set(state)
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text())["description"] == "converted from w.pth"
    with pytest.raises(ConfigError):
        card_of({"name": "x"})

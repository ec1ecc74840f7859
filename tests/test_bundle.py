"""Cards and weights: whole or not at all, readable without torch, never unpickled."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slideflow_ray.errors import BundleError, ConfigError
from slideflow_ray.models import bundle
from slideflow_ray.models.bundle import BundleCard, forward_digest, load_weights, read_card, write_bundle

VALUES: dict[str, Any] = {
    "name": "demo",
    "task": "classify",
    "architecture": "small-cnn",
    "classes": ("normal", "tumor"),
    "tile_px": 64,
    "mpp": 0.5,
    "mean": (0.7, 0.6, 0.7),
    "std": (0.2, 0.25, 0.2),
}


def card(**changes: Any) -> BundleCard:
    return BundleCard.model_validate({**VALUES, **changes})


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"b": torch.full((2, 3), value), "a": torch.arange(4)}


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "x" / "demo", card(licence="CC0"), state())
    assert read_card(folder) == card(licence="CC0")
    back = load_weights(folder)
    assert set(back) == {"a", "b"}
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in state().items())
    assert json.loads((folder / "bundle.json").read_text())["schema"] == 1
    assert [p.name for p in folder.parent.iterdir()] == ["demo"]


def test_a_card_is_read_without_torch(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "demo", card(), state())
    code = (
        "import sys; from slideflow_ray import prepare, profile;"
        "from slideflow_ray.models.bundle import read_card, forward_digest;"
        f"read_card({str(folder)!r}); forward_digest({str(folder)!r}); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'safetensors', 'torchvision')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_equal_bundles_are_equal_bytes(tmp_path: Path) -> None:
    weights = state()
    weights["conv"] = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    one = write_bundle(tmp_path / "one", card(), weights)
    turned = {k: weights[k] for k in reversed(weights)}
    turned["conv"] = turned["conv"].to(memory_format=torch.channels_last)
    two = write_bundle(tmp_path / "two", card(), turned)
    assert (one / "weights.safetensors").read_bytes() == (two / "weights.safetensors").read_bytes()
    assert (one / "bundle.json").read_bytes() == (two / "bundle.json").read_bytes()


def test_tied_weights_can_be_written(tmp_path: Path) -> None:
    tied = torch.rand(3)
    back = load_weights(write_bundle(tmp_path / "demo", card(), {"a": tied, "b": tied}))
    assert torch.equal(back["a"], back["b"])


def test_another_bundle_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "demo", card(), state())
    inode = (folder / "weights.safetensors").stat().st_ino
    write_bundle(folder, card(), state())  # the same again: nothing happens
    assert (folder / "weights.safetensors").stat().st_ino == inode
    with pytest.raises(BundleError, match="another bundle"):
        write_bundle(folder, card(), state(2.0))
    assert load_weights(folder)["b"][0, 0] == 1
    write_bundle(folder, card(), state(2.0), overwrite=True)
    assert load_weights(folder)["b"][0, 0] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(BundleError, match="not a bundle"):
        write_bundle(tmp_path / "thesis", card(), state(), overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_a_write_that_breaks_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, _: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "_write_weights", broken)
    with pytest.raises(OSError, match="No space"):
        write_bundle(tmp_path / "demo", card(), state())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "multilabel"},
        {"architecture": "timm:resnet18"},
        {"arguments": {"width": 16}},
        {"classes": ("a", "b", "c")},
        {"mean": (0.7, 0.6, 0.71)},
        {"std": (0.2, 0.2, 0.2)},
        {"precision": "fp32"},
    ],
)
def test_the_forward_digest_follows_what_changes_margins(tmp_path: Path, changes: dict[str, Any]) -> None:
    before = forward_digest(write_bundle(tmp_path / "one", card(), state()))
    assert len(before) == 12
    assert set(before) <= set("0123456789abcdef")
    assert forward_digest(write_bundle(tmp_path / "two", card(**changes), state())) != before


def test_the_forward_digest_follows_the_weights_and_nothing_else(tmp_path: Path) -> None:
    before = forward_digest(write_bundle(tmp_path / "one", card(), state()))
    assert forward_digest(write_bundle(tmp_path / "two", card(), state(1.0000001))) != before
    other = card(name="b", classes=("x", "y"), licence="MIT", description="d", mpp=1.0, tile_px=32)
    assert forward_digest(write_bundle(tmp_path / "three", other, state())) == before


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle folder"):
        read_card(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        read_card(tmp_path)
    folder = write_bundle(tmp_path / "demo", card(), state())
    (folder / "weights.safetensors").unlink()
    with pytest.raises(BundleError, match=r"has no weights\.safetensors"):
        load_weights(folder)
    (folder / "model.pth").write_bytes(b"")
    with pytest.raises(BundleError, match=r"model\.pth would have to be unpickled"):
        forward_digest(folder)


def test_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    folder = write_bundle(tmp_path / "demo", card(), state())
    (folder / "weights.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(BundleError, match="not a complete safetensors file"):
        load_weights(folder)
    assert not (tmp_path / "exploded").exists()


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "demo", card(), state())
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="not a complete safetensors file"):
        load_weights(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2; this version of slideflow-ray reads schema 1"),
        ({"schema": True}, "schema True"),
        ({"clases": ["a"]}, "unknown key 'clases'; did you mean 'classes'"),
        ({"schema_version": 1}, "unknown key 'schema_version'"),
        ({"architecture": "smal-cnn"}, "did you mean 'small-cnn'"),
        ({"architecture": "hub:resnet"}, "unknown architecture"),
        ({"classes": ["only"]}, "at least 2 classes"),
        ({"classes": ["a", "a"]}, "stand twice: a"),
        ({"arguments": {"pretrained": True}}, "pretrained cannot be given"),
        ({"arguments": {"checkpoint_path": "evil.pth"}}, "checkpoint_path cannot be given"),
        ({"std": [0.2, 0.0, 0.2]}, "std"),
        ({"channels": 4}, "channels"),
        ({"name": "../../etc"}, "name"),
        ({"mpp": -1}, "mpp"),
    ],
)
def test_a_bad_card_says_what_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_bundle(tmp_path / "demo", card(), state())
    edit(folder, **changes)
    with pytest.raises(BundleError, match=message) as caught:
        read_card(folder)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\udcff"])
def test_a_card_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bundle.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleError, match=r"bundle\.json"):
        read_card(tmp_path)


def test_one_class_is_enough_for_multilabel() -> None:
    assert card(task="multilabel", classes=("deposit",)).n_classes == 1


SEGMENT: dict[str, Any] = {
    "task": "segment",
    "architecture": "unet",
    "tile_px": 512,
    "stride": 16,
    "radius": 107,
    "halo": 112,
}


def test_a_segmentation_keeps_the_core_of_its_tiles(tmp_path: Path) -> None:
    of = card(**SEGMENT)
    assert of.core_px == 288
    assert card().core_px == 64
    assert read_card(write_bundle(tmp_path / "demo", of, state())) == of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"halo": None}, "needs stride and halo"),
        ({"stride": None}, "needs stride and halo"),
        ({"halo": 120}, "halo 120 is no multiple of stride 16; nearest: 112 or 128"),
        ({"tile_px": 500}, "core of 276 px is no multiple of stride 16; nearest tile_px: 496 or 512"),
        ({"tile_px": 224}, "leaves no core"),
        ({"halo": 96}, "halo of 96 against a radius of 107 leaves seams: state `seam`"),
        ({"radius": None}, "no known radius leaves seams"),
        ({"seam": {"halo": 96, "max_probability_difference": 0, "argmax_share": 0}}, "measured with a halo of 96"),
        ({"seam": {"halo": 112, "max_probability_difference": 2, "argmax_share": 0}}, "max_probability_difference"),
        ({"classes": ["tuft"]}, "at least 2 classes"),
        ({"classes": [str(i) for i in range(256)]}, "at most 255 classes, got 256"),
        ({"architecture": "small-cnn"}, "small-cnn gives one row per tile, which is not task 'segment'"),
        ({"task": "classify", "architecture": "timm:resnet18"}, "halo, radius, stride belong to task 'segment'"),
        ({"task": "classify"}, "unet gives a class per pixel, which is not task 'classify'"),
        ({"architecture": "smp:"}, "unknown architecture 'smp:'"),
    ],
)
def test_a_segmentation_that_would_have_seams_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BundleCard.parse({**VALUES, **SEGMENT, **changes}, "bundle.json")


def test_a_halo_short_of_the_radius_needs_its_measured_seam() -> None:
    seam = {"halo": 64, "max_probability_difference": 0.02, "argmax_share": 0.001}
    of = card(**{**SEGMENT, "architecture": "smp:Unet", "radius": None, "halo": 64, "seam": seam})
    assert of.seam is not None
    assert of.seam.argmax_share == 0.001


def test_the_forward_digest_leaves_a_segmentations_statements_out(tmp_path: Path) -> None:
    before = forward_digest(write_bundle(tmp_path / "one", card(**SEGMENT), state()))
    other = card(**{**SEGMENT, "tile_px": 768, "halo": 128, "radius": 128, "stride": 32})
    assert forward_digest(write_bundle(tmp_path / "two", other, state())) == before
    deeper = card(**{**SEGMENT, "arguments": {"levels": 3}})
    assert forward_digest(write_bundle(tmp_path / "three", deeper, state())) != before


def test_a_card_says_nothing_of_what_its_task_has_not(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "demo", card(), state())
    assert not {"stride", "radius", "halo", "seam"} & set(json.loads((folder / "bundle.json").read_text()))


def test_an_encoder_has_no_classes() -> None:
    assert card(task="features", classes=()).n_classes == 0
    with pytest.raises(ValueError, match="at most 0 classes, got 2"):
        card(task="features")
    with pytest.raises(ValueError, match="torchvision has no encoders without classes"):
        card(task="features", classes=(), architecture="torchvision:resnet18")
    with pytest.raises(ValueError, match="at least 2 classes, got 0"):
        card(classes=())

"""models/seresnet.py: the glomerulus paper's network has the shapes and counts of METHODS, and freezes by block."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from slideflow_ray.errors import BundleError, ConfigError
from slideflow_ray.models.bundle import BundleCard
from slideflow_ray.models.networks import build, find_head, headless
from slideflow_ray.models.seresnet import ASYMMETRIC, SeResNet, SqueezeExcite
from slideflow_ray.train.freeze import blocks, freeze
from slideflow_ray.train.loop import new_trainer, snapshot
from slideflow_ray.train.spec import TrainSpec, read_job
from slideflow_ray.train.weights import FOLDER, find_weights

NEEDED = {"cohort": "c.csv", "out": "o", "work": "w", "classes": ["normal", "tumor"]}
MILLIONS = {"F": "17.385", "A": "14.945", "D": "29.826", "plain": "26.031"}


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def shapes(net: SeResNet, side: int = 224) -> list[tuple[int, ...]]:
    """What goes into the first stage and comes out of each, for one image of `side` px."""
    found: list[tuple[int, ...]] = []
    net.stages[0].register_forward_pre_hook(lambda _, inputs: found.append(tuple(inputs[0].shape[1:])))
    for stage in net.stages:
        stage.register_forward_hook(lambda *args: found.append(tuple(args[2].shape[1:])))
    with torch.inference_mode():
        net.eval()(torch.zeros(1, 3, side, side))
    return found


@pytest.mark.parametrize("variant", MILLIONS)
def test_the_count_for_four_classes_is_that_of_methods(variant):
    net = build("se-resnet", {"variant": variant}, 4)
    assert f"{count(net) / 1e6:.3f}" == MILLIONS[variant]
    assert len(blocks(net, 4)) == 17
    name, head = find_head(net, 4)  # the narrow layer of the first SE blocks has 4 outputs too
    assert (name, head.in_features) == ("head", 512 if variant == "A" else 2048)


@pytest.mark.parametrize(
    ("architecture", "millions"),
    [("torchvision:resnet50", "23.52"), ("torchvision:vgg16", "134.28"), ("torchvision:inception_v3", "21.79")],
)
def test_the_counts_of_the_other_architectures_of_table_1(architecture, millions):
    with torch.device("meta"):
        assert f"{count(build(architecture, {}, 4)) / 1e6:.2f}" == millions


@pytest.mark.parametrize(
    ("variant", "widths"),
    [("F", (256, 512, 1024, 2048)), ("D", (256, 512, 1024, 2048)), ("A", (64, 128, 256, 512))],
)
def test_the_shapes_at_each_stage(variant, widths):
    net = build("se-resnet", {"variant": variant, "depth": [1, 1, 1, 1]}, 4)
    assert shapes(net) == [(64, 56, 56), *((w, 56 >> i, 56 >> i) for i, w in enumerate(widths))]


def test_the_paper_s_formulas_4_to_7():
    """A block of 64 channels: basic 18 * 64^2, bottleneck 17 * 64^2, improved 12 * 64^2, SE 2 c^2 / 16."""
    torchvision_basic = build("torchvision:resnet18", {}, 4).layer1[0]
    torchvision_bottleneck = build("torchvision:resnet50", {}, 4).layer1[1]

    def weights(module: nn.Module) -> int:
        return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))

    improved = build("se-resnet", {}, 4).stages[0].get_submodule("0")
    assert weights(torchvision_basic) == 18 * 64**2
    assert weights(torchvision_bottleneck) == 17 * 64**2
    assert weights(improved) == 12 * 64**2
    assert pytest.approx(-0.333, abs=5e-4) == 12 / 18 - 1
    assert pytest.approx(-0.294, abs=5e-4) == 12 / 17 - 1
    assert count(SqueezeExcite(64)) == 2 * 64**2 // 16
    kernels = [m.kernel_size for m in improved.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(1, 3), (3, 1), (1, 3), (3, 1)] == list(ASYMMETRIC)


def test_squeeze_and_excitation_is_its_formula():
    torch.manual_seed(0)
    se, u = SqueezeExcite(32), torch.randn(2, 32, 5, 7)
    for n in range(2):
        z = torch.stack([u[n, c].sum() / 35 for c in range(32)])
        s = 1 / (1 + torch.exp(-(se.fc2.weight @ torch.clamp(se.fc1.weight @ z, min=0))))
        expected = torch.stack([s[c] * u[n, c] for c in range(32)])
        torch.testing.assert_close(se(u)[n], expected)


def test_a_residual_block_adds_what_se_lets_through():
    torch.manual_seed(0)
    block = build("se-resnet", {}, 4).eval().stages[0].get_submodule("0")
    x = torch.randn(1, 64, 8, 8)
    y = x
    convolutions = [m for m in block.body if isinstance(m, nn.Conv2d)]
    norms = [m for m in block.body if isinstance(m, nn.BatchNorm2d)]
    for place, (conv, norm) in enumerate(zip(convolutions, norms, strict=True)):
        y = norm(conv(y))
        y = y.clamp(min=0) if place < 3 else y
    torch.testing.assert_close(block(x), (x + block.se(y)).clamp(min=0))


@pytest.mark.parametrize(("percent", "frozen"), [(0, 0), (25, 5), (75, 13), (100, 17)])
def test_freezing_goes_by_the_stem_and_sixteen_blocks_with_their_statistics(percent, frozen):
    net = build("se-resnet", {}, 4).train()
    assert freeze(net, 4, percent) == frozen == math.ceil(17 * percent / 100)
    still = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert ("conv1.weight" in still) == ("bn1.weight" in still) == (not net.bn1.training) == (frozen > 0)
    assert "head.weight" not in still
    # 25 %: the stem, the first stage of three blocks with what widens it, and the second stage's narrowing and a block
    last = {"stages.0.expand.0.weight", "stages.1.reduce.0.weight", "stages.1.0.body.0.weight"}
    assert (last <= still) == (frozen >= 5)
    assert ("stages.1.1.body.0.weight" in still) == (frozen >= 6)
    assert ("stages.3.expand.0.weight" in still) == (not net.stages[3].expand[1].training) == (frozen == 17)
    own = [id(p) for block in blocks(net, 4) for module in block for p in module.parameters()]
    assert sorted(own) == sorted(id(p) for name, p in net.named_parameters() if not name.startswith("head"))


def test_features_come_without_a_head_and_bad_arguments_are_named():
    small = {"depth": [1, 1, 1, 1]}
    net = build("se-resnet", small, 3).eval()
    x = torch.randn(2, 3, 40, 56)
    assert net(x).shape == (2, 3)
    assert headless(net, 3)(x).shape == (2, 2048)
    assert build("se-resnet", small, 0).eval()(x).shape == (2, 2048)
    for bad in ({"variant": "B"}, {"depth": [3, 4, 6]}, {"depth": [0, 1, 1, 1]}, {"width": 3}):
        with pytest.raises(BundleError, match="se-resnet refuses"):
            build("se-resnet", bad, 3)


def test_the_presets_of_the_paper_and_of_its_reference():
    final, again = (read_job({**NEEDED, "preset": name}, "test")[0] for name in ("paper-final", "001"))
    assert final == again
    fit = final.fit
    assert (fit.architecture, fit.arguments, fit.batch_size, fit.lr) == ("se-resnet", {"variant": "F"}, 16, 1e-4)
    assert (fit.optimiser, fit.milestones, fit.gamma, fit.epochs, fit.freeze) == ("adam", (60, 120, 160), 0.2, 200, 0)
    assert (final.whole.tile_px, final.tile) == (224, None)
    more = fit.augment
    assert (fit.class_weights, fit.keep, fit.dropout) == ("none", "accuracy", 0.5)
    assert (more.brightness, more.contrast, more.saturation, more.hue, more.stain) == (0, 0, 0, 0, 0)
    assert (more.noise, more.rotate_deg, more.mixup, more.turn) == ((5 / 255, 15 / 255), 30.0, 0.4, True)
    ref = read_job({**NEEDED, "preset": "ref19"}, "test")[0].fit
    assert (ref.arguments["variant"], ref.optimiser, ref.nesterov, ref.momentum) == ("A", "sgd", True, 0.9)
    assert (ref.lr, ref.gamma, ref.weight_decay, ref.batch_size) == (0.1, 0.2, 1e-4, 128)
    tiles = read_job({**NEEDED, "preset": "001", "tile": {"tile_px": 96, "mpp": 1.0}}, "test")[0]
    assert (tiles.whole, tiles.tile.tile_px) == (None, 96)


def test_imagenet_gives_the_stem_alone_and_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)
    spec = TrainSpec(architecture="se-resnet", arguments={"depth": [1, 1, 1, 1]}, weights="imagenet")
    none = find_weights(spec)
    assert none.state is None
    assert "no ImageNet weights for the blocks of se-resnet" in none.note
    resnet = build("torchvision:resnet50", {}, 4)
    save_file(snapshot(resnet), tmp_path / "torchvision-resnet50.safetensors")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    found = find_weights(spec)
    assert found.source.startswith("imagenet stem sha256:")
    assert set(found.state) == {key for key in resnet.state_dict() if key.split(".")[0] in ("conv1", "bn1")}
    values = {"tile_px": 64, "whole": "squash", "mean": (0.5,) * 3, "std": (0.25,) * 3, "classes": ("a", "b")}
    card = BundleCard(name="x", task="classify", architecture="se-resnet", arguments=spec.arguments, **values)
    counts = torch.ones(2, 2, dtype=torch.int64).numpy()
    net = new_trainer(card, spec, counts, found.state).net
    torch.testing.assert_close(net.conv1.weight, resnet.conv1.weight)
    other = new_trainer(card, spec, counts).net
    torch.testing.assert_close(net.stages[0].expand[0].weight, other.stages[0].expand[0].weight)
    with pytest.raises(ConfigError, match="do not fit se-resnet"):  # a file of another network is not half taken
        new_trainer(card, spec, counts, snapshot(resnet))

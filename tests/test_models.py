"""Networks and scorers: byte-identical margins that are right."""

from __future__ import annotations

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from torch import nn

from slideflow_ray.errors import BundleError, NanScore, OutOfMemory, ProfileError
from slideflow_ray.models.bundle import BundleCard, write_bundle
from slideflow_ray.models.fuse import Fp32Head, fold_batch_norms, with_precision
from slideflow_ray.models.networks import build, describe, find_head, load_network
from slideflow_ray.models.scorer import Scorer, load_scorer, make_scorer, to_margins
from slideflow_ray.prepare import to_input
from slideflow_ray.profile import ComputeProfile, resolve
from slideflow_ray.specs import ComputeSpec

MEAN, STD = (0.7, 0.6, 0.65), (0.2, 0.25, 0.22)
SMALL_VIT = {"img_size": 64, "patch_size": 16}
NETS: dict[str, tuple[dict[str, Any], int]] = {
    "small-cnn": ({}, 64),
    "torchvision:resnet18": ({}, 64),
    "torchvision:vgg11": ({}, 32),
    "torchvision:inception_v3": ({}, 80),
    "timm:vit_tiny_patch16_224": (SMALL_VIT, 64),
}


def profile(precision: str = "fp32", micro_batch: int = 8) -> ComputeProfile:
    spec = ComputeSpec.model_validate({"precision": precision, "device": "cpu", "micro_batch": micro_batch})
    return resolve(spec)


def card(architecture: str, task: str = "classify", n_classes: int = 4, tile_px: int = 0, **more: Any) -> BundleCard:
    arguments, side = NETS.get(architecture, ({}, 64))
    values = {"name": "demo", "task": task, "architecture": architecture, "arguments": arguments, "mpp": 0.5}
    classes = tuple(f"class {i}" for i in range(n_classes))
    values |= {"classes": classes, "tile_px": tile_px or side, "mean": MEAN, "std": STD}
    return BundleCard.model_validate({**values, **more})


def network(of: BundleCard) -> nn.Module:
    """A network with batch norms and a head that are not at their neutral start."""
    return copy.deepcopy(shared_network(of.architecture, of.n_classes))


@lru_cache
def shared_network(architecture: str, n_classes: int) -> nn.Module:
    torch.manual_seed(0)
    net = build(architecture, NETS.get(architecture, ({}, 0))[0], n_classes)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
    return net.eval()


def tiles(n: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    names = ("small-cnn", "torchvision:resnet18", "timm:vit_tiny_patch16_224")
    return {n: write_bundle(folder / n.replace(":", "-"), card(n), network(card(n)).state_dict()) for n in names}


def plain(net: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """The reference: float64 scaling by hand, and the network as its library made it."""
    x = ((pixels / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        return net(torch.from_numpy(x.astype(np.float32))).double().numpy()


# Margins


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_margins_are_one_class_against_the_rest(classes: int) -> None:
    z = np.random.default_rng(0).normal(0, 6, (50, classes)).astype(np.float32)
    got = to_margins(torch.from_numpy(z), "classify").numpy()
    want = [[r[c] - logsumexp(np.delete(r, c)) for c in range(classes)] for r in z.astype(np.float64)]
    np.testing.assert_allclose(got, np.array(want), rtol=2e-7)
    np.testing.assert_allclose(1 / (1 + np.exp(-got.astype(np.float64))), np.exp(log_softmax(z, axis=1)), rtol=1e-5)
    assert (got.argmax(1) == z.argmax(1)).all()
    assert got.dtype == np.float32


def test_margins_do_not_see_an_offset_per_tile_and_do_not_overflow() -> None:
    z = torch.tensor([[1.0, 2.0, 3.0]])
    moved = to_margins(z + torch.tensor([[100.0], [-100.0], [1e6]]), "classify")
    torch.testing.assert_close(moved, to_margins(z, "classify").expand(3, 3), atol=1e-5, rtol=0)
    assert torch.isfinite(to_margins(torch.tensor([[1e30, -1e30]]), "classify")).all()


def test_margins_of_labels_are_the_logits() -> None:
    z = torch.randn(5, 1)
    assert torch.equal(to_margins(z, "multilabel"), z)


@pytest.mark.parametrize(("name", "task"), [*((name, "classify") for name in NETS), ("small-cnn", "multilabel")])
def test_fp32_margins_match_a_plain_forward(name: str, task: str) -> None:
    of = card(name, task)
    net, pixels = shared_network(name, 4), tiles(5, of.tile_px)
    z = plain(net, pixels)
    want = (
        z if task == "multilabel" else np.stack([z[:, c] - logsumexp(np.delete(z, c, 1), axis=1) for c in range(4)], 1)
    )
    got = make_scorer(of, net, profile("fp32")).margins(pixels)
    assert got.shape == (5, 4)
    np.testing.assert_allclose(1 / (1 + np.exp(-got)), 1 / (1 + np.exp(-want)), atol=1e-4)
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_bf16_probabilities_stay_within_two_hundredths(name: str) -> None:
    of = card(name)
    net, pixels = shared_network(name, 4), tiles(5, of.tile_px)
    got = make_scorer(of, net, profile("bf16")).margins(pixels)
    want = np.exp(log_softmax(plain(net, pixels), axis=1))
    assert np.abs(1 / (1 + np.exp(-got)) - want).max() <= 0.02


def test_logits_are_the_networks_own() -> None:
    of = card("small-cnn")
    net, pixels = network(of), tiles(11, 64)
    np.testing.assert_allclose(make_scorer(of, net, profile()).logits(pixels), plain(net, pixels), atol=1e-5)


# The same bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["small-cnn", "torchvision:resnet18", "timm:vit_tiny_patch16_224"])
def test_a_tile_has_the_same_bytes_whatever_stands_beside_it(
    bundles: dict[str, Path], name: str, precision: str
) -> None:
    scorer = load_scorer(bundles[name], profile(precision))
    pixels = tiles(19, 64)
    want = scorer.margins(pixels)
    assert len(np.unique(want)) > 19
    order = np.random.default_rng(1).permutation(19)
    assert scorer.margins(pixels[order]).tobytes() == want[order].tobytes()
    assert scorer.margins(pixels[7:8]).tobytes() == want[7:8].tobytes()  # padded
    among = np.concatenate([np.full_like(pixels[:3], 255), pixels[5:9], np.zeros_like(pixels[:6])])
    assert scorer.margins(among)[3:7].tobytes() == want[5:9].tobytes()


def test_two_threads_at_once_give_the_same_bytes(bundles: dict[str, Path]) -> None:
    scorer = load_scorer(bundles["torchvision:resnet18"], profile("bf16"))
    parts = [tiles(16, 64, seed) for seed in range(6)]
    want = [scorer.margins(part).tobytes() for part in parts]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda part: scorer.margins(part).tobytes(), parts)) == want


def test_another_process_gives_the_same_bytes(bundles: dict[str, Path], tmp_path: Path) -> None:
    folder, settings = bundles["small-cnn"], profile("bf16")
    pixels = tiles(9, 64)
    np.save(tmp_path / "pixels.npy", pixels)
    code = (
        "import sys, numpy as np\n"
        "from slideflow_ray.models.scorer import load_scorer\n"
        "from slideflow_ray.profile import ComputeProfile\n"
        "scorer = load_scorer(sys.argv[1], ComputeProfile.model_validate_json(sys.argv[2]))\n"
        "np.save(sys.argv[4], scorer.margins(np.load(sys.argv[3], mmap_mode='r')))\n"
    )
    files = [str(tmp_path / "pixels.npy"), str(tmp_path / "margins.npy")]
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(folder), settings.model_dump_json(), *files], check=True
    )
    assert np.load(files[1]).tobytes() == load_scorer(folder, settings).margins(pixels).tobytes()


def test_a_scorer_computes_with_one_thread_wherever_it_is_called(bundles: dict[str, Path]) -> None:
    scorer = load_scorer(bundles["small-cnn"], profile())

    def threads() -> tuple[int, bytes]:
        torch.set_num_threads(2)
        found = scorer.margins(tiles(3, 64)).tobytes()
        return torch.get_num_threads(), found

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(threads).result() == (1, scorer.margins(tiles(3, 64)).tobytes())


# Input


def test_read_only_and_strided_tiles_are_scored_and_left_alone(bundles: dict[str, Path]) -> None:
    scorer = load_scorer(bundles["small-cnn"], profile())
    pixels = tiles(16, 64)
    want, kept = scorer.margins(pixels), pixels.copy()
    pixels.flags.writeable = False
    assert scorer.margins(pixels).tobytes() == want.tobytes()
    strided = np.ascontiguousarray(pixels.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    assert scorer.margins(strided).tobytes() == want.tobytes()
    assert (pixels == kept).all()


def test_no_tiles_give_no_margins(bundles: dict[str, Path]) -> None:
    got = load_scorer(bundles["small-cnn"], profile()).margins(tiles(0, 64))
    assert (got.shape, got.dtype) == ((0, 4), np.float32)


@pytest.mark.parametrize(
    "wrong", [tiles(2, 32), tiles(2, 64)[..., :1], tiles(2, 64)[0], tiles(2, 64).astype(np.float32)]
)
def test_tiles_of_another_size_are_refused(bundles: dict[str, Path], wrong: np.ndarray) -> None:
    with pytest.raises(BundleError, match=r"scores uint8 tiles of shape \(n, 64, 64, 3\)"):
        load_scorer(bundles["small-cnn"], profile()).margins(wrong)


def test_a_margin_that_is_not_finite_is_an_error_that_names_its_rows(bundles: dict[str, Path]) -> None:
    good = load_scorer(bundles["small-cnn"], profile())

    def nan_where_dark(x: torch.Tensor) -> torch.Tensor:
        z = good.network(x)
        return torch.where(x.mean((1, 2, 3), keepdim=False)[:, None] < -2, torch.nan, z)

    pixels = tiles(20, 64)
    pixels[[3, 17]] = 0
    with pytest.raises(NanScore, match=r"2 of 20 tiles .* \(rows 3, 17\)"):
        Scorer(good.card, good.profile, nan_where_dark, good.dtype).margins(pixels)


def test_broken_weights_are_found_when_scoring(tmp_path: Path) -> None:
    of = card("torchvision:resnet18")
    state = network(of).state_dict()
    state["fc.bias"][1] = torch.nan
    scorer = load_scorer(write_bundle(tmp_path / "demo", of, state), profile())
    with pytest.raises(NanScore, match="3 of 3 tiles"):
        scorer.margins(tiles(3, 64))


def test_running_out_of_memory_is_named(bundles: dict[str, Path]) -> None:
    good = load_scorer(bundles["small-cnn"], profile())

    def huge(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(2**50, dtype=torch.uint8)

    with pytest.raises(OutOfMemory, match="micro-batches of 8 tiles of 64 px"):
        Scorer(good.card, good.profile, huge, good.dtype).margins(tiles(1, 64))
    with pytest.raises(ZeroDivisionError):
        Scorer(good.card, good.profile, lambda x: x / (1 // 0), good.dtype).margins(tiles(1, 64))


def test_another_machines_profile_is_refused(bundles: dict[str, Path]) -> None:
    with pytest.raises(ProfileError, match="isa"):
        load_scorer(bundles["small-cnn"], profile().model_copy(update={"isa": "NEON"}))


# Precision


@pytest.mark.parametrize(("name", "head"), [("small-cnn", "head"), ("torchvision:resnet18", "fc")])
def test_the_head_computes_in_fp32_behind_a_bf16_trunk(name: str, head: str) -> None:
    of = card(name)
    net = with_precision(network(of), 4, torch.bfloat16)
    wrapped = net.get_submodule(head)
    assert isinstance(wrapped, Fp32Head)
    kinds = {p.dtype for key, p in net.named_parameters() if not key.startswith(head)}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in wrapped.parameters()} == {torch.float32}
    assert net(torch.rand(2, 3, 64, 64).bfloat16()).dtype == torch.float32


def test_a_bf16_trunk_keeps_as_many_distinct_margins_as_tiles() -> None:
    of = card("torchvision:resnet18", n_classes=2)
    got = make_scorer(of, network(of), profile("bf16")).margins(tiles(48, 64))
    assert len(np.unique(got[:, 0])) == 48


def test_a_card_may_insist_on_fp32() -> None:
    of = card("small-cnn", precision="fp32")
    assert make_scorer(of, network(of), profile("bf16")).dtype == torch.float32


# Folding


@pytest.mark.parametrize(
    ("name", "left"),
    [("torchvision:resnet18", 0), ("timm:resnet18", 0), ("timm:efficientnet_b0", 0), ("torchvision:densenet121", 62)],
)
def test_batch_norms_fold_into_their_convolutions(name: str, left: int) -> None:
    net = network(card(name))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        want, folded = net(x), fold_batch_norms(net, x)
        torch.testing.assert_close(folded(x), want, atol=1e-4, rtol=1e-3)
    count = sum(isinstance(m, nn.BatchNorm2d) and bool(list(m.parameters())) for m in folded.modules())
    assert count == left
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) > left  # the given network is as it was


def test_a_network_that_cannot_be_folded_stays_as_it_is() -> None:
    class Peeking(nn.Module):
        """Uses the convolution's output beside its norm, so that folding would change the answer."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.head((self.norm(y) + y).mean((2, 3)))

    torch.manual_seed(0)
    net = Peeking().eval()
    net.norm.running_mean += 3
    x = torch.randn(2, 3, 16, 16)
    folded = fold_batch_norms(net, x)
    assert folded is not net
    torch.testing.assert_close(folded(x), net(x))
    assert isinstance(folded.get_submodule("norm"), nn.BatchNorm2d)


def test_a_norm_used_twice_is_not_folded_and_the_others_are() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.shared, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)
            self.c, self.own = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.shared(self.a(x)) - self.shared(self.b(x))
            return self.head(self.own(self.c(y)).mean((2, 3)))

    net, x = Shared().eval(), torch.randn(2, 3, 16, 16)
    folded = fold_batch_norms(net, x)
    torch.testing.assert_close(folded(x), net(x))
    assert isinstance(folded.get_submodule("shared"), nn.BatchNorm2d)
    assert isinstance(folded.get_submodule("own"), nn.Identity)


# Building and loading


def test_small_cnn_is_small() -> None:
    assert describe("small-cnn") == "small-cnn: 282,274 parameters, head head (128 features to 2 classes)"
    assert "width" not in describe("small-cnn", {"width": 8})
    assert build("small-cnn", {"width": 8}, 2)(torch.zeros(1, 3, 256, 256)).shape == (1, 2)


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("torchvision:resnet18", "fc"),
        ("torchvision:inception_v3", "fc"),
        ("torchvision:squeezenet1_1", "classifier.1"),
        ("timm:vit_tiny_patch16_224", "head"),
    ],
)
def test_heads_are_found(architecture: str, head: str) -> None:
    assert find_head(build(architecture, {}, 7), 7)[0] == head


def test_inception_with_auxiliary_head_gives_logits_in_evaluation() -> None:
    net = build("torchvision:inception_v3", {"aux_logits": True}, 3)
    assert find_head(net, 3)[0] == "fc"
    with torch.inference_mode():
        assert net.eval()(torch.zeros(1, 3, 80, 80)).shape == (1, 3)


@pytest.mark.parametrize(
    ("architecture", "hint"),
    [
        ("small-cn", "small-cnn"),
        ("torchvision:resnet19", "torchvision:resnet18"),
        ("timm:vit_tiny_patch16_225", "timm:vit_tiny_patch16_224"),
        ("timm:hf-hub:someone/model", "Unknown architecture"),
        ("timm:local-dir:/tmp/x", "Unknown architecture"),
        ("timm:resnet18.hf-hub:someone/model", "Unknown architecture"),
        ("torchvision:fasterrcnn_resnet50_fpn", "Unknown architecture"),
    ],
)
def test_unknown_architectures_are_refused_with_their_neighbours(architecture: str, hint: str) -> None:
    with pytest.raises(BundleError, match=hint):
        build(architecture, {}, 2)


def test_an_unknown_pretrained_tag_is_refused() -> None:
    with pytest.raises(BundleError, match="no_such_tag"):
        build("timm:resnet18.no_such_tag", {}, 2)


@pytest.mark.parametrize("arguments", [{"colour": 1}, {"pretrained": True}, {"checkpoint_path": "x"}])
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=next(iter(arguments))):
        build("timm:resnet18", arguments, 2)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    of = card("small-cnn")
    state = network(of).state_dict()
    state["extra.weight"] = torch.zeros(1)
    del state["features.0.0.weight"]
    state["features.1.0.weight"] = torch.zeros(1, 2)
    folder = write_bundle(tmp_path / "demo", of, state)
    with pytest.raises(BundleError) as caught:
        load_network(folder)
    for part in (
        "1 missing (features.0.0.weight)",
        "1 unexpected (extra.weight)",
        "is (1, 2) instead of (64, 32, 3, 3)",
    ):
        assert part in str(caught.value)


def test_another_number_of_classes_than_the_head_is_named(tmp_path: Path) -> None:
    state = network(card("small-cnn", n_classes=4)).state_dict()
    folder = write_bundle(tmp_path / "demo", card("small-cnn", n_classes=3), state)
    with pytest.raises(BundleError, match=r"names 3 classes \(class 0, class 1, class 2\), and its head gives 4"):
        load_network(folder)


def test_a_network_for_another_tile_size_is_refused_when_loaded(tmp_path: Path) -> None:
    of = card("timm:vit_tiny_patch16_224", tile_px=96)
    with pytest.raises(BundleError, match="does not take tiles of 96 px"):
        make_scorer(of, network(of), profile())


def test_training_and_scoring_prepare_alike() -> None:
    pixels = tiles(3, 32)
    x = to_input(pixels, MEAN, STD, dtype=torch.float32)
    want = ((pixels / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(x.numpy(), want, atol=1e-6)

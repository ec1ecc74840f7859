"""Segmentation: tiles with enough halo give the masks of one piece, the same bytes each time; and features."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn

from slideflow_ray.errors import BundleError, NanScore
from slideflow_ray.models.bundle import BundleCard, SeamError, read_card, write_bundle
from slideflow_ray.models.fuse import Fp32Head, fold_batch_norms, with_precision
from slideflow_ray.models.networks import build, feature_dim, find_head, headless, load_network
from slideflow_ray.models.scorer import Scorer, load_scorer, make_scorer, tiles_per_pass
from slideflow_ray.models.seam import measure_seam, receptive_radius, total_stride
from slideflow_ray.models.unet import Unet
from slideflow_ray.prepare import to_input
from slideflow_ray.profile import ComputeProfile, resolve
from slideflow_ray.specs import ComputeSpec

MEAN, STD = (0.7, 0.6, 0.65), (0.2, 0.25, 0.22)
LEVELS, HALO, TILE = 2, 24, 112
"""A U-Net of 2 levels: stride 4, radius 23, core 64."""
RESNET = {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [32, 16, 8]}
"""An smp network that is quick: stride 8, radius 71."""


def profile(precision: str = "fp32", micro_batch: int = 3) -> ComputeProfile:
    spec = ComputeSpec.model_validate({"precision": precision, "device": "cpu", "micro_batch": micro_batch})
    return resolve(spec)


def card(**changes: Any) -> BundleCard:
    values: dict[str, Any] = {"name": "glomeruli", "task": "segment", "architecture": "unet", "mpp": 1.0}
    values |= {"classes": ("other", "tuft", "capsule"), "mean": MEAN, "std": STD, "tile_px": TILE}
    values |= {"arguments": {"levels": LEVELS, "width": 8}, "stride": 4, "radius": 23, "halo": HALO}
    return BundleCard.model_validate({**values, **changes})


def smp_card(**changes: Any) -> BundleCard:
    seam = {"halo": 16, "max_probability_difference": 0.1, "argmax_share": 0.01}
    more = {"architecture": "smp:Unet", "arguments": RESNET, "stride": 8, "radius": 71, "halo": 16, "tile_px": 96}
    return card(**{**more, "seam": seam, **changes})


@lru_cache
def network(architecture: str = "unet", levels: int = LEVELS, width: int = 8) -> nn.Module:
    """A network with batch norms that are not at their neutral start, and a head that uses every class."""
    torch.manual_seed(1)
    net = build(architecture, RESNET if architecture == "smp:Unet" else {"levels": levels, "width": width}, 3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.3, 1)
            module.weight.data.uniform_(0.8, 1.5)
    head = find_head(net.eval(), 3)[1]
    with torch.no_grad():  # logits of mean 0 and deviation 1, so that every class comes up
        z = net(to_input(image(128, 128)[None], MEAN, STD, dtype=torch.float32))
        deviation = z.std((0, 2, 3))
        head.weight /= deviation[:, None, None, None]
        head.bias.copy_((head.bias - z.mean((0, 2, 3))) / deviation)
    return net


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    return ((coarse + rng.integers(0, 256, (height, width, 3))) // 2).astype(np.uint8)


def tiles(n: int, side: int = TILE) -> np.ndarray:
    return np.stack([image(side, side, seed) for seed in range(n)])


def laid_out(pixels: np.ndarray, core: int, halo: int) -> np.ndarray:
    """The image on white: whole cores, a halo around, as a slide is read beyond its edge."""
    height, width = (-(-side // core) * core + 2 * halo for side in pixels.shape[:2])
    whole = np.full((height, width, 3), 255, np.uint8)
    whole[halo : halo + len(pixels), halo : halo + pixels.shape[1]] = pixels
    return whole


def in_tiles(scorer: Scorer, whole: np.ndarray, off: int = 0) -> np.ndarray:
    """The plane of an image laid out on white, put together from the tiles' cores; `off` moves the origins."""
    of = scorer.card
    rows, cols = ((side - 2 * of.halo) // of.core_px for side in whole.shape[:2])
    whole = np.pad(whole, ((off, of.core_px), (off, of.core_px), (0, 0)), constant_values=255)
    at = [(r * of.core_px, c * of.core_px) for r in range(rows + bool(off)) for c in range(cols + bool(off))]
    masks = scorer.masks(np.stack([whole[r : r + of.tile_px, c : c + of.tile_px] for r, c in at]))
    plane = np.block(
        [[masks[r * (cols + bool(off)) + c] for c in range(cols + bool(off))] for r in range(rows + bool(off))]
    )
    return plane[off : off + rows * of.core_px, off : off + cols * of.core_px]


def one_piece(scorer: Scorer, whole: np.ndarray) -> np.ndarray:
    """The same network on the whole image at once: float logits (C, H, W) without the halo."""
    of = scorer.card
    with torch.inference_mode():
        logits = scorer.network(to_input(whole[None], MEAN, STD, dtype=scorer.dtype))[0].float().numpy()
    return logits[:, of.halo : whole.shape[0] - of.halo, of.halo : whole.shape[1] - of.halo]


# Tiles against one piece


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("levels", "tile", "halo"), [(2, 112, 24), (3, 168, 56), (4, 320, 112)])
def test_tiles_with_enough_halo_are_one_piece_bit_for_bit(levels: int, tile: int, halo: int, precision: str) -> None:
    net = network(levels=levels)
    of = card(arguments={"levels": levels, "width": 8}, stride=net.stride, radius=net.radius, halo=halo, tile_px=tile)
    scorer = make_scorer(of, net, profile(precision, micro_batch=16))
    whole = laid_out(image(2 * of.core_px - 7, 3 * of.core_px - 31), of.core_px, halo)
    want = one_piece(scorer, whole)
    plane = in_tiles(scorer, whole)
    assert (plane == want.argmax(0)).all()
    assert len(np.unique(plane)) == 3
    inner = slice(halo, halo + of.core_px)
    for row, col in ((0, 0), (1, 1), (1, 2)):
        window = (slice(row * of.core_px, row * of.core_px + tile), slice(col * of.core_px, col * of.core_px + tile))
        got = scorer.logits(whole[window][None])[0][:, inner, inner]
        place = np.s_[:, row * of.core_px : (row + 1) * of.core_px, col * of.core_px : (col + 1) * of.core_px]
        assert got.tobytes() == np.ascontiguousarray(want[place]).tobytes()


def test_a_halo_short_of_the_radius_and_an_origin_off_the_stride_show() -> None:
    whole = laid_out(image(121, 180), 64, HALO)
    full = make_scorer(card(), network(), profile())
    want = one_piece(full, whole).argmax(0)
    assert (in_tiles(full, whole, off=4) == want).all()  # a multiple of the stride
    assert (in_tiles(full, whole, off=2) != want).any()
    seam = SeamError(halo=0, max_probability_difference=1, argmax_share=1)
    bare = make_scorer(card(halo=0, tile_px=64, seam=seam), network(), profile())
    assert (in_tiles(bare, whole[HALO:-HALO, HALO:-HALO]) != want).any()


def test_masks_are_the_classes_of_a_plain_forward_in_the_core() -> None:
    pixels = tiles(4)
    x = ((pixels / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        z = network()(torch.from_numpy(x.astype(np.float32))).numpy()[:, :, HALO:-HALO, HALO:-HALO]
    got = make_scorer(card(), network(), profile()).masks(pixels)
    assert (got.shape, got.dtype) == ((4, 64, 64), np.uint8)
    clear = np.diff(np.sort(z, axis=1)[:, -2:], axis=1)[:, 0] > 1e-4  # rounding may decide between equals
    assert clear.mean() > 0.99
    assert (got == z.argmax(1))[clear].all()
    bf16 = make_scorer(card(), network(), profile("bf16")).masks(pixels)
    assert (bf16 == z.argmax(1)).mean() > 0.97


# The same bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("of", [card(), smp_card()], ids=["unet", "smp"])
def test_a_tile_has_the_same_mask_whatever_stands_beside_it(of: BundleCard, precision: str) -> None:
    scorer = make_scorer(of, network(of.architecture), profile(precision))
    pixels = tiles(7, of.tile_px)
    want, logits = scorer.masks(pixels), scorer.logits(pixels)
    order = np.random.default_rng(1).permutation(7)
    assert scorer.masks(pixels[order]).tobytes() == want[order].tobytes()
    assert scorer.logits(pixels[order]).tobytes() == logits[order].tobytes()
    assert scorer.masks(pixels[4:5]).tobytes() == want[4:5].tobytes()  # padded
    parts = [pixels[i : i + 3] for i in (0, 2, 4, 1)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(scorer.masks, parts))
    assert [f.tobytes() for f in found] == [want[i : i + 3].tobytes() for i in (0, 2, 4, 1)]


def test_a_loaded_bundle_gives_the_same_masks(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "glomeruli", card(), network().state_dict())
    assert read_card(folder) == card()
    want = make_scorer(card(), network(), profile("bf16")).masks(tiles(2))
    assert load_scorer(folder, profile("bf16")).masks(tiles(2)).tobytes() == want.tobytes()


@pytest.mark.parametrize(("tile", "on_a_cpu", "on_a_gpu"), [(112, 8, 256), (256, 8, 256), (512, 4, 64), (4096, 1, 1)])
def test_large_tiles_go_through_in_small_numbers(tile: int, on_a_cpu: int, on_a_gpu: int) -> None:
    of, here = card(tile_px=tile), profile(micro_batch=16)
    assert tiles_per_pass(of, here) == on_a_cpu
    assert tiles_per_pass(of, here.model_copy(update={"device": "cuda", "micro_batch": 256})) == on_a_gpu
    assert tiles_per_pass(classifier("small-cnn", tile_px=tile), here) == 16


def test_no_tiles_give_no_masks() -> None:
    got = make_scorer(card(), network(), profile()).masks(tiles(1)[:0])
    assert (got.shape, got.dtype) == ((0, 64, 64), np.uint8)


def test_logits_that_are_not_finite_are_an_error() -> None:
    good = make_scorer(card(), network(), profile())

    def broken(x: torch.Tensor) -> torch.Tensor:
        z = good.network(x).clone()
        z[x.mean((1, 2, 3)) < -2, 1, HALO, HALO] = torch.inf  # in the core's first pixel
        z[:, 1, HALO - 1, HALO - 1] = torch.nan  # in the halo, which another tile answers for
        return z

    pixels = tiles(5)
    scorer = Scorer(good.card, good.profile, broken, good.dtype)
    assert scorer.masks(pixels).tobytes() == good.masks(pixels).tobytes()
    pixels[[1, 4]] = 0
    with pytest.raises(NanScore, match=r"2 of 5 tiles a logit .* \(rows 1, 4\)"):
        scorer.masks(pixels)


# Networks


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_the_radius_is_as_far_as_a_nan_travels(levels: int) -> None:
    class Foreign(nn.Module):
        """Hides that the network is ours, so that it is probed."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Module()
            self.inner = Unet(2, levels=levels, width=2)
            self.encoder.output_stride = self.inner.stride

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    net = Unet(2, levels=levels, width=2)
    assert (net.stride, net.radius) == (2**levels, {1: 9, 2: 23, 3: 51, 4: 107}[levels])
    assert receptive_radius(Foreign(), limit=160) == receptive_radius(net) == net.radius
    assert receptive_radius(Foreign(), limit=net.radius - 1) is None


def test_smp_networks_have_a_stride_and_perhaps_a_radius() -> None:
    net = network("smp:Unet")
    assert (total_stride(net), receptive_radius(net, limit=128)) == (8, 71)
    attentive = build("smp:Unet", {**RESNET, "decoder_channels": [32, 16, 16], "decoder_attention_type": "scse"}, 3)
    assert receptive_radius(attentive, limit=128) is None
    assert attentive.training


def test_the_seam_is_measured_and_vanishes_with_enough_halo() -> None:
    net = network("smp:Unet")
    pixels = image(70, 90)
    near = measure_seam(net, 96, 16, mean=MEAN, std=STD, pixels=pixels)
    assert 0 < near.argmax_share < 0.2
    assert measure_seam(net, 160, 72, mean=MEAN, std=STD, pixels=pixels).max_probability_difference < 1e-6
    whole = laid_out(pixels, 64, 16)
    scorer = make_scorer(smp_card(), net, profile())
    one = softmax(one_piece(scorer, whole), axis=0)
    assert near.argmax_share == pytest.approx((in_tiles(scorer, whole) != one.argmax(0)).mean(), abs=1e-4)
    corner = softmax(scorer.logits(whole[None, :96, :96])[0], axis=0)[:, 16:80, 16:80]
    assert near.max_probability_difference >= np.abs(corner - one[:, :64, :64]).max() - 1e-5
    exact = measure_seam(network(), TILE, HALO, mean=MEAN, std=STD)
    assert exact == SeamError(halo=HALO, max_probability_difference=0, argmax_share=0)


@pytest.mark.parametrize(("tile", "halo"), [(112, 22), (110, 24), (48, 24)])
def test_a_seam_off_the_stride_is_not_measured(tile: int, halo: int) -> None:
    with pytest.raises(BundleError, match="do not fit a stride of 4"):
        measure_seam(network(), tile, halo, mean=MEAN, std=STD)


@pytest.mark.parametrize("architecture", ["unet", "smp:Unet"])
def test_norms_fold_and_the_last_convolution_stays_fp32(architecture: str) -> None:
    net = network(architecture)
    x = torch.randn(1, 3, 64, 64)
    folded = fold_batch_norms(net, x)
    left = [name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(name.startswith(("encoder.layer3", "encoder.layer4")) for name in left)  # the depth leaves them out
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), net(x), atol=1e-4, rtol=1e-3)
    name, head = find_head(net, 3)
    assert name == ("head" if architecture == "unet" else "segmentation_head.0")
    assert isinstance(head, nn.Conv2d)
    cast = with_precision(folded, 3, torch.bfloat16)
    assert isinstance(cast.get_submodule(name), Fp32Head)
    assert cast(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("architecture", "arguments", "message"),
    [
        ("smp:Unett", {}, "Did you mean smp:Unet"),
        ("smp:Unet", {"encoder_name": "tu-hf-hub:someone/net"}, "would be fetched"),
        ("smp:Unet", {"encoder_name": "resnet-18"}, "refuses its arguments"),
        ("smp:Unet", {"encoder_weights": "imagenet"}, "cannot be given"),
        ("unet", {"levels": 0}, "at least 1"),
        ("unet", {"depth": 3}, "refuses its arguments"),
    ],
)
def test_networks_that_cannot_be_built_say_why(architecture: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        build(architecture, arguments, 3)


def test_a_card_that_says_less_than_its_network_is_refused() -> None:
    with pytest.raises(BundleError, match="says radius 20; its network reaches 23 px"):
        make_scorer(card(radius=20), network(), profile())
    with pytest.raises(BundleError, match="says stride 2; unet has a stride of 4"):
        make_scorer(card(stride=2), network(), profile())


# Features


@pytest.mark.parametrize(
    ("architecture", "width"), [("small-cnn", 128), ("torchvision:resnet18", 512), ("torchvision:squeezenet1_1", 512)]
)
def test_features_are_what_the_head_is_given(architecture: str, width: int) -> None:
    of = classifier(architecture)
    torch.manual_seed(0)
    net = build(architecture, {}, 2).eval()
    scorer = make_scorer(of, net, profile())
    pixels = tiles(5, 64)
    got = scorer.features(pixels)
    assert (got.shape, got.dtype) == ((5, width), np.float16)
    assert feature_dim(of) == width
    order = [3, 0, 4, 1, 2]
    assert scorer.features(pixels[order]).tobytes() == got[order].tobytes()
    assert scorer.features(pixels[2:3]).tobytes() == got[2:3].tobytes()
    head = find_head(net, 2)[1]
    if isinstance(head, nn.Linear):
        z = got.astype(np.float64) @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
        np.testing.assert_allclose(scorer.logits(pixels), z, atol=5e-3)


def classifier(architecture: str, **changes: Any) -> BundleCard:
    values: dict[str, Any] = {"name": "demo", "task": "classify", "architecture": architecture, "classes": ("a", "b")}
    return BundleCard.model_validate({**values, "tile_px": 64, "mpp": 0.5, "mean": MEAN, "std": STD, **changes})


def test_network_and_encoder_share_their_weights() -> None:
    net = build("torchvision:resnet18", {}, 2)
    encoder = headless(net, 2)
    own = {p.data_ptr() for p in net.parameters()}
    assert {p.data_ptr() for p in encoder.parameters()} < own
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 2)
    assert encoder(torch.zeros(2, 3, 64, 64)).shape == (2, 512)


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [("small-cnn", {}), ("timm:vit_tiny_patch16_224", {"img_size": 64}), ("timm:resnet18", {})],
)
def test_an_encoder_without_classes_is_a_bundle(architecture: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    of = classifier(architecture, task="features", classes=(), arguments=arguments)
    net = build(architecture, arguments, 0).eval()
    folder = write_bundle(tmp_path / "encoder", of, net.state_dict())
    assert load_network(folder)[0] == of
    scorer = load_scorer(folder, profile())
    pixels = tiles(4, 64)
    with torch.no_grad():
        want = net(to_input(pixels, MEAN, STD, dtype=torch.float32)).numpy()
    got = scorer.features(pixels)
    assert got.shape == (4, feature_dim(of))
    np.testing.assert_allclose(got.astype(np.float64), want, atol=2e-3, rtol=2e-3)
    assert len(np.unique(got, axis=0)) == 4
    with pytest.raises(BundleError, match="task 'features', which gives no margins"):
        scorer.margins(pixels)


def test_features_beyond_float16_are_an_error() -> None:
    net = build("small-cnn", {}, 2).eval()
    scorer = make_scorer(classifier("small-cnn"), net, profile())
    assert scorer.encoder is not None
    encoder = scorer.encoder
    huge = Scorer(scorer.card, scorer.profile, scorer.network, scorer.dtype, lambda x: encoder(x) + 1e5)
    with pytest.raises(NanScore, match="4 of 4 tiles a feature"):
        huge.features(tiles(4, 64))


def test_each_task_gives_its_own() -> None:
    segmenter = make_scorer(card(), network(), profile())
    for ask in (segmenter.margins, segmenter.features):
        with pytest.raises(BundleError, match="of task 'segment', which gives no"):
            ask(tiles(1))
    with pytest.raises(BundleError, match="gives masks, not features"):
        feature_dim(card())
    with pytest.raises(BundleError, match="which gives no masks"):
        make_scorer(classifier("small-cnn"), build("small-cnn", {}, 2), profile()).masks(tiles(1, 64))

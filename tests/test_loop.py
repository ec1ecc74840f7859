"""The training loop: it learns, it keeps its best epoch, and it gives the same weights again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torchvision.models.googlenet import GoogLeNetOutputs
from torchvision.models.inception import InceptionOutputs

from slideflow_ray.errors import BundleError, ConfigError, NanScore
from slideflow_ray.models.bundle import BundleCard, write_bundle
from slideflow_ray.models.networks import build
from slideflow_ray.models.scorer import load_scorer, to_margins
from slideflow_ray.prepare import to_input
from slideflow_ray.profile import resolve
from slideflow_ray.specs import ComputeSpec
from slideflow_ray.train import loop, tiles
from slideflow_ray.train.augment import augment, augmentation, seed_of
from slideflow_ray.train.loop import EpochResult, Validation, fit, learning_rate, validate
from slideflow_ray.train.spec import TrainSpec

MEAN, STD = (0.6, 0.6, 0.6), (0.15, 0.15, 0.15)


@dataclass
class Tiles:
    """A source in memory, shuffled by epoch and seed."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def labels(self) -> np.ndarray:
        return self.y

    def batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = np.random.default_rng([seed, epoch]).permutation(len(self.y))
        for i in range(0, len(order), batch_size):
            yield self.x[order[i : i + batch_size]], self.y[order[i : i + batch_size]]


@dataclass
class Unlabelled:
    """The least a source must be."""

    tiles: Tiles

    def __len__(self) -> int:
        return len(self.tiles)

    def batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self.tiles.batches(epoch, batch_size, seed)


def textures(n: int, seed: int, side: int = 32) -> Tiles:
    """Fine or coarse grain of one mean colour: no single pixel tells the classes apart."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = np.empty((n, side, side, 3), np.uint8)
    for i, label in enumerate(y):
        k = 4 if label else 1
        grain = rng.normal(150, 25, (side // k, side // k, 1)).repeat(k, 0).repeat(k, 1)
        x[i] = (grain + rng.normal(0, 15, (side, side, 3))).clip(0, 255)
    x.flags.writeable = False  # as a store's arrays may be
    return Tiles(x, y)


def card(task: str = "classify", classes: tuple[str, ...] = ("fine", "coarse"), **more: Any) -> BundleCard:
    values = {"name": "texture", "task": task, "architecture": "small-cnn", "arguments": {"width": 16}, "tile_px": 32}
    values |= {"classes": classes, "mpp": 0.5, "mean": MEAN, "std": STD}
    return BundleCard.model_validate({**values, **more})


def spec(**more: Any) -> TrainSpec:
    values = {"arguments": {"width": 16}, "epochs": 2, "batch_size": 16, "device": "cpu"}
    values |= {"threads": 1, "augment": False}
    return TrainSpec.model_validate({**values, **more})


@pytest.fixture(scope="module")
def train() -> Tiles:
    return textures(96, 1)


@pytest.fixture(scope="module")
def val() -> Tiles:
    return textures(32, 2)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_it_learns_textures(val: Tiles) -> None:
    heard: list[EpochResult] = []
    trained = fit(card(), spec(epochs=4, lr=3e-3, augment=True), textures(192, 1), val, heard.append)
    assert tuple(heard) == trained.history
    assert [h.epoch for h in heard] == [0, 1, 2, 3]
    last = trained.history[-1]
    assert last.val is not None
    assert last.val.auc > 0.95
    assert last.val.accuracy > 0.9
    assert last.train_loss < trained.history[0].train_loss
    assert trained.state_dict["features.0.1.num_batches_tracked"] == 12 * (trained.best_epoch + 1)  # batch norms learnt


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(train: Tiles, val: Tiles, precision: str) -> None:
    how = spec(precision=precision, arguments={"width": 16, "dropout": 0.3}, augment=True)
    of = card(arguments=how.arguments)
    torch.manual_seed(11)
    first = fit(of, how, train, val)
    torch.manual_seed(12)
    assert same(first.state_dict, fit(of, how, train, val).state_dict)
    assert first.history == fit(of, how, train, val).history
    assert not same(first.state_dict, fit(of, how.model_copy(update={"seed": 1}), train, val).state_dict)


def test_training_leaves_torchs_generator_and_threads_as_they_were(train: Tiles) -> None:
    torch.manual_seed(5)
    torch.set_num_threads(1)
    before = torch.get_rng_state()
    fit(card(), spec(epochs=1, threads=2), train)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 1


def test_the_epoch_of_lowest_validation_loss_is_kept(train: Tiles, val: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_losses(*losses: float) -> loop.Trained:
        left = iter(losses)
        monkeypatch.setattr(loop, "validate", lambda *_: Validation(next(left), 0.5, 0.5))
        return fit(card(), spec(epochs=len(losses), schedule="none"), train, val)

    kept = with_losses(3.0, 1.0, 2.0)
    assert kept.best_epoch == 1
    assert len(kept.history) == 3
    assert same(kept.state_dict, with_losses(3.0, 1.0).state_dict)
    assert not same(kept.state_dict, with_losses(3.0, 2.0, 1.0).state_dict)


def test_without_validation_the_last_epoch_is_kept(train: Tiles) -> None:
    two = fit(card(), spec(schedule="none"), train)
    assert two.best_epoch == 1
    assert two.history[1].val is None
    assert not same(two.state_dict, fit(card(), spec(schedule="none", epochs=1), train).state_dict)


def test_an_epoch_repeated_after_a_fault_gives_the_same_weights(train: Tiles, val: Tiles) -> None:
    how = spec(epochs=3, optimiser="rmsprop", augment=True, arguments={"width": 16, "dropout": 0.3})
    of = card(arguments=how.arguments)
    whole = fit(of, how, train)
    counts = loop.count_labels(of, train, how)
    with loop.reproducible(how.seed, how.threads):
        first = loop.new_trainer(of, how, counts)
        loop.run_epoch(first, train, val, 0)
        net, optimiser = loop.snapshot(first.net), first.optimiser.state_dict()
        second = loop.new_trainer(of, how.model_copy(update={"seed": 0}), counts, start=net)
        second.optimiser.load_state_dict(optimiser)
        torch.manual_seed(999)
        for epoch in (1, 2):
            loop.run_epoch(second, train, None, epoch)
    assert same(loop.snapshot(second.net), whole.state_dict)


def test_a_bundle_of_the_trained_weights_gives_the_trained_margins(train: Tiles, val: Tiles, tmp_path: Path) -> None:
    trained = fit(card(), spec(), train)
    folder = write_bundle(tmp_path / "texture", trained.card, trained.state_dict)
    profile = resolve(ComputeSpec(device="cpu", precision="fp32"))
    got = load_scorer(folder, profile).margins(val.x)
    net = build("small-cnn", {"width": 16}, 2)
    net.load_state_dict(trained.state_dict)
    with torch.inference_mode():
        want = to_margins(net.eval()(to_input(val.x, MEAN, STD, dtype=torch.float32)), "classify")
    np.testing.assert_allclose(got, want.numpy(), atol=1e-4)


def test_validation_counts_as_scikit_learn_does(val: Tiles) -> None:
    of, how = card(), spec(class_weights="none", precision="fp32")
    trainer = loop.new_trainer(of, how, loop.count_labels(of, val, how))
    got = validate(trainer, val)
    with torch.inference_mode():
        z = trainer.net.eval()(to_input(val.x, MEAN, STD, dtype=torch.float32))
    p = z.double().softmax(1).numpy()
    assert got.loss == pytest.approx(-np.log(p[np.arange(32), val.y]).mean(), rel=1e-5)
    assert got.accuracy == pytest.approx((p.argmax(1) == val.y).mean())
    assert got.auc == pytest.approx(roc_auc_score(val.y, p[:, 1]))
    assert trainer.net.training is False


def test_several_labels_per_tile_and_unknown_ones(train: Tiles, val: Tiles) -> None:
    def labelled(source: Tiles) -> Tiles:
        bright = source.x.mean((1, 2, 3)) > np.median(source.x.mean((1, 2, 3)))
        y = np.stack([source.y, bright], 1).astype(np.float64)
        y[::5, 1] = np.nan
        y[1::5, 1] = -1
        return Tiles(source.x, y)

    trained = fit(card("multilabel"), spec(epochs=3, lr=3e-3), labelled(train), labelled(val))
    losses = [h.train_loss for h in trained.history]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert trained.history[-1].val is not None
    assert trained.history[-1].val.auc > 0.6


def test_unknown_labels_do_not_enter_the_loss() -> None:
    of, how = card("multilabel"), spec(class_weights="none")
    trainer = loop.new_trainer(of, how, np.ones((2, 2), np.int64))
    z = torch.tensor([[2.0, 9.0], [-1.0, 3.0]])
    got = loop.loss(trainer, z, torch.tensor([[1.0, torch.nan], [0.0, -1.0]]))
    assert float(got) == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2)


def test_balanced_weights_are_scikit_learns() -> None:
    y = np.array([0] * 7 + [1] * 2 + [2])
    of = card(classes=("a", "b", "c"))
    counts = loop.count_labels(of, Tiles(np.zeros((10, 32, 32, 3), np.uint8), y), spec())
    trainer = loop.new_trainer(of, spec(), counts)
    assert trainer.weights is not None
    np.testing.assert_allclose(trainer.weights, compute_class_weight("balanced", classes=np.arange(3), y=y), rtol=1e-6)
    z = torch.zeros(10, 3)
    assert float(loop.loss(trainer, z, torch.from_numpy(y))) == pytest.approx(math.log(3))


# What is refused


def test_a_class_without_tiles_is_refused_before_training(train: Tiles) -> None:
    only_fine = Tiles(train.x, np.zeros_like(train.y))
    with pytest.raises(ConfigError, match="no tiles of coarse"):
        fit(card(), spec(), only_fine)
    with pytest.raises(ConfigError, match="no tiles of coarse"):
        fit(card(), spec(), Unlabelled(only_fine))
    no_positive = Tiles(train.x, np.stack([train.y, -np.ones_like(train.y)], 1))
    with pytest.raises(ConfigError, match="no tiles of coarse"):
        fit(card("multilabel"), spec(), no_positive)


def test_labels_of_no_class_and_other_shapes_are_refused(train: Tiles) -> None:
    with pytest.raises(ConfigError, match=r"\[2\] are no classes"):
        fit(card(), spec(), Tiles(train.x, train.y + 1))
    with pytest.raises(ConfigError, match="needs labels"):
        fit(card("multilabel"), spec(), train)
    with pytest.raises(ConfigError, match="no tiles of"):
        fit(card(), spec(), Unlabelled(Tiles(train.x[:0], train.y[:0])))


def test_a_source_without_labels_is_counted_by_reading_it(train: Tiles) -> None:
    counted = loop.count_labels(card(), Unlabelled(train), spec())
    assert counted.tolist() == [[48, 48], [48, 48]] == loop.count_labels(card(), train, spec()).tolist()


def test_card_and_spec_must_name_one_network(train: Tiles) -> None:
    with pytest.raises(ConfigError, match="the training"):
        fit(card(arguments={"width": 8}), spec(), train)


def test_a_loss_that_is_no_number_stops_the_training(train: Tiles) -> None:
    with pytest.raises(NanScore, match="training loss of epoch"):
        fit(card(), spec(optimiser="sgd", lr=1e20), train)


def test_a_gpu_that_is_not_there_is_refused(train: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU"):
        fit(card(), spec(device="cuda"), train)


# Starting weights


def test_a_start_with_another_head_keeps_the_trunk(train: Tiles) -> None:
    three = card(classes=("a", "b", "c"))
    start = loop.snapshot(build("small-cnn", {"width": 16}, 2))
    net = loop.new_trainer(three, spec(), np.ones((2, 3), np.int64), start).net.state_dict()
    assert torch.equal(net["features.0.0.weight"], start["features.0.0.weight"])
    assert net["head.weight"].shape == (3, 64)
    with pytest.raises(ConfigError, match=r"features\.0\.0\.weight"):
        loop.new_trainer(three, spec(), np.ones((2, 3), np.int64), {"head.weight": start["head.weight"]})


# Rates


def rates_of(scheduler: Any, optimiser: torch.optim.Optimizer, n: int) -> list[float]:
    rates = []
    for _ in range(n):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return rates


def test_rates_are_torchs() -> None:
    def sgd() -> torch.optim.SGD:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)

    optimiser = sgd()
    multistep = torch.optim.lr_scheduler.MultiStepLR(optimiser, [2, 5], gamma=0.1)
    how = spec(lr=0.5, epochs=8, schedule="multistep", milestones=(5, 2))
    np.testing.assert_allclose([learning_rate(how, e, 0.7) for e in range(8)], rates_of(multistep, optimiser, 8))
    optimiser = sgd()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=8)
    how = spec(lr=0.5, epochs=8, schedule="cosine")
    np.testing.assert_allclose([learning_rate(how, e) for e in range(8)], rates_of(cosine, optimiser, 8))
    optimiser = sgd()
    onecycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.5, total_steps=2000, cycle_momentum=False)
    how = spec(lr=0.5, epochs=10, schedule="onecycle")
    got = [learning_rate(how, i // 200, (i % 200) / 200) for i in range(2000)]
    np.testing.assert_allclose(got, rates_of(onecycle, optimiser, 2000), atol=1e-3)
    assert {learning_rate(spec(schedule="none", lr=0.5), e, 0.5) for e in range(2)} == {0.5}


@pytest.mark.parametrize("optimiser", ["sgd", "rmsprop", "adam", "adamw"])
def test_every_optimiser_takes_its_settings(optimiser: str) -> None:
    how = spec(optimiser=optimiser, lr=0.25, weight_decay=0.125)
    made = loop.new_trainer(card(), how, np.ones((2, 2), np.int64)).optimiser
    assert type(made).__name__.lower() == optimiser
    group = made.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)
    assert group.get("momentum", 0.9) == (0 if optimiser == "rmsprop" else 0.9)


def test_auxiliary_logits_count_three_tenths() -> None:
    z, aux1, aux2 = (torch.full((2, 2), float(i)) for i in range(3))
    for outputs, want in [
        (z, [(1.0, z)]),
        (InceptionOutputs(z, aux1), [(1.0, z), (0.3, aux1)]),
        (InceptionOutputs(z, None), [(1.0, z)]),
        (GoogLeNetOutputs(z, aux2, aux1), [(1.0, z), (0.3, aux2), (0.3, aux1)]),
    ]:
        got = list(loop._outputs(outputs))
        assert [(share, id(part)) for share, part in got] == [(share, id(part)) for share, part in want]


def test_no_logits_are_refused(train: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_outputs", lambda _: iter(()))
    with pytest.raises(BundleError, match="no logits"):
        fit(card(), spec(), train)


# Augmentation


def test_augmentation_is_seeded_and_leaves_its_input() -> None:
    pixels = textures(6, 3).x
    kept, before = pixels.copy(), torch.get_rng_state()
    one = augment(pixels, augmentation(), 1)
    assert (one.shape, one.dtype) == (pixels.shape, np.uint8)
    assert (one == augment(pixels, augmentation(), 1)).all()
    assert (one != augment(pixels, augmentation(), 2)).any()
    assert (pixels == kept).all()
    assert torch.equal(torch.get_rng_state(), before)


def test_tiles_are_changed_each_by_its_own_draw() -> None:
    pixels = np.repeat(textures(1, 3).x, 12, axis=0)
    assert len({tile.tobytes() for tile in augment(pixels, augmentation(), 0)}) == 12


def test_only_training_tiles_are_augmented(train: Tiles, val: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(tiles, "augment", lambda x, *_: (seen.append(len(x)), x)[1])
    fit(card(), spec(epochs=1, augment=True), train, val)
    assert sum(seen) == len(train)
    seen.clear()
    fit(card(), spec(epochs=1), train, val)
    assert not seen


def test_tiles_that_are_not_square_cannot_be_turned() -> None:
    with pytest.raises(ConfigError, match="square"):
        augment(np.zeros((1, 4, 6, 3), np.uint8), augmentation(), 0)


def test_seeds_of_epochs_and_uses_differ() -> None:
    assert len({seed_of(s, e, w) for s in range(3) for e in range(3) for w in ("weights", "dropout")}) == 18

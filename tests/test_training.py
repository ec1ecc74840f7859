"""What a training is made of: presets, freezing, augmentation, sampling, shares, checkpoints, weights to begin with."""

from __future__ import annotations

import errno
import json
import math
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_loop import card, same, spec, textures
from torch import nn
from torchvision.transforms import v2

from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError, CorruptStore, DiskFull, NanScore
from slideflow_ray.models.networks import build, find_head
from slideflow_ray.pipeline import Chunk, Context
from slideflow_ray.specs import StoreSpec, TileSpec, TissueSpec
from slideflow_ray.store import SlideStore
from slideflow_ray.train import checkpoint, loop
from slideflow_ray.train.augment import augment, augmentation, jitter_stain, mix
from slideflow_ray.train.crew import Crew
from slideflow_ray.train.freeze import blocks, freeze
from slideflow_ray.train.loop import EpochResult, Progress, Validation, fit
from slideflow_ray.train.sample import balanced, thin
from slideflow_ray.train.spec import PRESETS, AugmentSpec, SampleSpec, TrainJob, TrainSpec, load_train, read_job
from slideflow_ray.train.tiles import ChunkTiles, LabelledChunk, Prepared
from slideflow_ray.train.weights import FOLDER, find_weights

TILE = TileSpec(tile_px=8, mpp=0.5)
NEEDED = {"cohort": "c.csv", "out": "o", "work": "w", "classes": ["normal", "tumor"]}


# settings


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_job_and_what_the_user_says_wins(name):
    job, _ = read_job({**NEEDED, "preset": name, "fit": {"epochs": 7}}, "test")
    assert job.fit.epochs == 7
    assert job.fit.lr == PRESETS[name]["fit"]["lr"] == (0.1 if name == "ref19" else 1e-4)
    assert job.fit.augment.flip
    build(job.fit.architecture, job.fit.arguments, 2)


def test_the_preset_of_004_is_what_methods_says():
    job, _ = read_job({**NEEDED, "preset": "004"}, "test")
    fit_ = job.fit
    assert (fit_.optimiser, fit_.lr, fit_.decay, fit_.epochs, fit_.batch_size) == ("rmsprop", 1e-4, 0.99, 1, 256)
    assert (job.tile.tile_px, job.labels.rule, job.labels.fraction) == (299, "fraction", 0.75)
    assert job.sample == SampleSpec(stride={"normal": 10, "tumor": 4})
    other, _ = read_job({**NEEDED, "classes": ["benign", "malignant"], "preset": "004"}, "test")
    assert other.sample.stride == {}


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"preset": "005"}, "no preset '005'"),
        ({"fit": {"nesterov": True}}, "nesterov"),
        ({"fit": {"milestones": [3]}}, "multistep"),
        ({"fit": {"schedule": "multistep"}}, "milestones"),
        ({"fit": {"batch": 3}}, "fit.batch"),
        ({"sample": {"stride": {"tumour": 2}}}, "tumour"),
        ({"fit": {"freeze": 101}}, "freeze"),
    ],
)
def test_settings_that_make_no_sense_are_named(values, cause):
    with pytest.raises(ConfigError, match=cause):
        read_job({**NEEDED, "tile": {"tile_px": 32, "mpp": 1.0}, **values}, "train.toml")


def test_paths_in_train_toml_are_relative_to_it(tmp_path):
    text = 'cohort = "c.csv"\nout = "models/b"\n[fit]\nweights = "w.safetensors"\n'
    text += '[sample.mine]\nrun = "out"\n[crew]\nstorage = "kept"\n'
    (tmp_path / "train.toml").write_text(text)
    values = load_train(tmp_path / "train.toml")
    assert values["cohort"] == str(tmp_path / "c.csv")
    assert values["work"] == str(tmp_path / "models/b.work")
    assert values["fit"]["weights"] == str(tmp_path / "w.safetensors")
    assert values["sample"]["mine"]["run"] == str(tmp_path / "out")
    assert values["crew"]["storage"] == str(tmp_path / "kept")
    (tmp_path / "bad.toml").write_text("[fit")
    for name in ("bad.toml", "none.toml"):
        with pytest.raises(ConfigError, match=name):
            load_train(tmp_path / name)


# freezing


@pytest.mark.parametrize(
    ("architecture", "n"), [("torchvision:resnet50", 17), ("small-cnn", 5), ("torchvision:vgg16", 15)]
)
def test_blocks_are_the_network_without_its_head_in_order(architecture, n):
    net = build(architecture, {}, 3)
    found = blocks(net, 3)
    assert len(found) == n
    own = [id(p) for block in found for module in block for p in module.parameters()]
    head = {id(p) for p in find_head(net, 3)[1].parameters()}
    assert own == [id(p) for p in net.parameters() if id(p) not in head]


@pytest.mark.parametrize(("percent", "frozen"), [(0, 0), (25, 5), (75, 13), (100, 17), (50.001, 9)])
def test_a_percentage_freezes_the_first_blocks_of_resnet50(percent, frozen):
    """Source 001: of the stem and 16 blocks the first ceil(17 p)."""
    net = build("torchvision:resnet50", {}, 4).train()
    assert freeze(net, 4, percent) == frozen == math.ceil(17 * percent / 100)
    assert net.fc.weight.requires_grad
    assert net.conv1.weight.requires_grad == (frozen == 0)
    assert net.bn1.training == (frozen == 0)
    assert net.layer4[2].bn3.training == (frozen < 17)


def test_frozen_weights_and_statistics_stay_and_the_others_learn():
    train = textures(48, 1)
    start = loop.snapshot(build("small-cnn", {"width": 16}, 2))
    trained = fit(card(), spec(freeze=60, epochs=1, optimiser="adamw"), train, start=start).state_dict
    changed = {
        key.split(".")[1] for key in trained if key.startswith("features") and not same_tensor(trained, start, key)
    }
    assert changed == {"3", "4"}
    assert not same_tensor(trained, start, "head.weight")


def same_tensor(a, b, key):
    return torch.equal(a[key], b[key])


def test_first_the_head_learns_alone_at_its_own_rate():
    train = textures(48, 1)
    start = loop.snapshot(build("small-cnn", {"width": 16}, 2))
    how = spec(head_epochs=1, head_lr=0.5, epochs=2, lr=1e-3, schedule="none")
    states = []
    trained = fit(card(), how, train, start=start, save=lambda progress: states.append(progress.net))
    assert [h.lr for h in trained.history] == [0.5, 1e-3]
    assert all(same_tensor(states[0], start, key) for key in start if key.startswith("features"))
    assert not same_tensor(states[1], start, "features.0.0.weight")


def test_dropout_drops_while_training_only_and_changes_no_name():
    how = spec(dropout=0.9)
    trainer = loop.new_trainer(card(), how, np.ones((2, 2), np.int64))
    assert trainer.net.state_dict().keys() == build("small-cnn", {"width": 16}, 2).state_dict().keys()
    x = torch.rand(4, 3, 32, 32)
    torch.manual_seed(0)
    with torch.no_grad():
        trainer.net.train()
        a, b = trainer.net(x), trainer.net(x)
        assert not torch.equal(a, b)
        trainer.net.eval()
        assert torch.equal(trainer.net(x), trainer.net(x))


# steps


def test_gradients_are_clipped_to_the_norm(monkeypatch):
    seen = []
    real = torch.optim.AdamW.step

    def step(self, *more):
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        seen.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))))
        return real(self, *more)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    fit(card(), spec(epochs=1, clip=1e-3, precision="fp32"), textures(48, 1))
    assert seen
    assert max(seen) <= 1.001e-3


def test_a_loss_on_validation_that_is_no_number_ends_the_training():
    how = spec(
        epochs=1, optimiser="sgd", lr=1e30, schedule="none", clip=None, momentum=0.0, batch_size=16, precision="fp32"
    )
    with pytest.raises(NanScore, match=r"validation loss is (nan|inf)"):
        fit(card(), how, textures(16, 1), textures(16, 2))


def test_training_ends_when_the_loss_on_validation_falls_no_more(monkeypatch):
    left = iter([3.0, 1.0, 2.0, 1.5, 0.5])
    monkeypatch.setattr(loop, "validate", lambda *_: Validation(next(left), 0.5, 0.5))
    trained = fit(card(), spec(epochs=5, patience=2), textures(32, 1), textures(16, 2))
    assert len(trained.history) == 4
    assert trained.best_epoch == 1


def test_the_most_accurate_epoch_may_be_kept_of_equals_that_of_lower_loss(monkeypatch):
    values = [(1.0, 0.5), (3.0, 0.75), (2.0, 0.75), (2.0, 0.75), (0.5, math.nan), (0.1, 0.7)]
    left = iter([Validation(loss, accuracy, 0.5) for loss, accuracy in values])
    monkeypatch.setattr(loop, "validate", lambda *_: next(left))
    trained = fit(card(), spec(epochs=6, keep="accuracy"), textures(32, 1), textures(16, 2))
    assert trained.best_epoch == 2
    assert loop.best_of(trained.history) == 5
    assert [loop.best_of(trained.history[: n + 1], "accuracy") for n in range(6)] == [0, 1, 2, 2, 2, 2]
    assert loop.is_over(spec(epochs=9, keep="accuracy", patience=3), list(trained.history))
    assert not loop.is_over(spec(epochs=9, patience=3), list(trained.history))


def test_noise_may_have_a_least_and_a_most(monkeypatch):
    tile = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    both = AugmentSpec.model_validate({**OFF, "noise": [5 / 255, 15 / 255]})
    found = []
    for seed in range(200):
        torch.manual_seed(seed)
        found.append(float(augmentation(both)(tile).float().std()))
    noisy = np.array([sigma for sigma in found if sigma > 0])
    assert 25 < len(noisy) < 75  # a quarter of the tiles
    assert (noisy.min(), noisy.max()) == pytest.approx((5, 15), abs=0.8)
    assert AugmentSpec.model_validate({**OFF, "noise": [0, 0]}).changes_nothing
    with pytest.raises(ValueError, match="smallest standard deviation"):
        AugmentSpec.model_validate({"noise": [0.1, 0.05]})


# augmentation


def test_no_augmentation_changes_nothing():
    off = TrainSpec.model_validate({"augment": False}).augment
    assert off.changes_nothing
    assert augmentation(off) is None
    assert TrainSpec.model_validate({"augment": True}).augment == AugmentSpec()


@pytest.mark.parametrize("name", ["flip", "turn"])
def test_flips_and_turns_only_move_pixels(name):
    pixels = textures(16, 3).x
    changed = augment(pixels, augmentation(AugmentSpec.model_validate({**OFF, name: True})), 0)
    assert (changed != pixels).any()
    np.testing.assert_array_equal(np.sort(changed.reshape(16, -1)), np.sort(pixels.reshape(16, -1)))


OFF = dict.fromkeys(AugmentSpec.model_fields, 0)


@pytest.mark.parametrize(
    "values", [{"rotate_deg": 30}, {"shift": 0.2}, {"zoom": 0.2}, {"noise": 0.1}, {"stain": 0.2}, {"hue": 0.2}]
)
def test_every_change_changes_something_and_nothing_black_comes_in(values):
    pixels = np.full((24, 16, 16, 3), (220, 120, 180), np.uint8)
    pixels[:, 4:9, 3:7] = (120, 60, 150)
    changed = augment(pixels, augmentation(AugmentSpec.model_validate({**OFF, **values})), 0)
    assert (changed != pixels).any()
    assert changed.min() > 5


def test_a_tile_moved_by_nothing_is_itself():
    tile = torch.from_numpy(textures(1, 3).x[0].copy()).permute(2, 0, 1)
    from slideflow_ray.train.augment import _Moved

    assert torch.equal(_Moved(v2.RandomAffine(0))(tile), tile)


def test_stain_jitter_of_nothing_is_the_tile_and_of_something_keeps_white():
    tile = torch.randint(1, 256, (3, 8, 8), dtype=torch.uint8)
    assert (jitter_stain(0.0, tile).int() - tile.int()).abs().max() <= 1
    torch.manual_seed(0)
    white = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    assert (jitter_stain(0.05, white).int() - 255).abs().max() <= 6
    assert (jitter_stain(0.3, tile) != tile).any()


def test_mixup_stays_within_class_and_stain_and_between_the_two_tiles():
    value = np.array([10, 20, 110, 120, 200, 30], np.uint8)
    pixels = np.broadcast_to(value[:, None, None, None], (6, 4, 4, 3)).copy()
    kinds = np.array([[0, 0], [0, 0], [1, 0], [1, 0], [1, 1], [0, 0]])
    seen = [mix(pixels, kinds, 0.4, seed)[:, 0, 0, 0] for seed in range(200)]
    assert {int(row[4]) for row in seen} == {200}  # alone of its kind
    firsts = np.array(seen)
    assert firsts[:, :2].min() >= 10
    assert firsts[:, [0, 1, 5]].max() <= 30
    assert (firsts[:, 2:4].min(), firsts[:, 2:4].max()) == (110, 120)
    assert len(set(firsts[:, 0].tolist())) > 5
    assert (mix(pixels, kinds, 0.4, 3) == mix(pixels, kinds, 0.4, 3)).all()


# sampling


def test_strides_keep_every_nth_row_and_column_of_a_class():
    rowcol = np.array([(r, c) for r in range(8) for c in range(8)], np.int32)
    labels = np.where(rowcol[:, 0] < 4, 0, 1)
    labels[-1] = -1
    kept = thin(labels, rowcol, ("normal", "tumor"), {"normal": 4})
    assert Counter(kept.tolist()) == {0: 2, 1: 31, -1: 31}
    assert {tuple(x) for x in rowcol[kept == 0].tolist()} == {(0, 0), (0, 4)}


def chunk(name: str, labels: list[int], index: int = 0) -> LabelledChunk:
    item = Item(slide_id=name, uri=name)
    return LabelledChunk(Chunk(item, "g", TILE, index, len(labels), ()), np.array(labels, np.int64))


def test_balanced_sampling_shows_each_class_as_often():
    chunks = balanced([chunk("a", [0] * 70 + [1] * 10), chunk("b", [1] * 5 + [-1] * 3)], ("normal", "tumor"))
    shown: Counter[int] = Counter()
    for epoch in range(60):
        for c in chunks:
            shown.update(c.labels[c.rows(epoch, seed=0)].tolist())
    assert set(shown) == {0, 1}
    assert shown[0] == 70 * 60
    assert shown[1] / shown[0] == pytest.approx(1, abs=0.02)


@pytest.fixture
def stored(tmp_path) -> ChunkTiles:
    """Five slides of one chunk each, of 3 to 30 tiles; every tile is all of one value of its own."""
    context = Context(str(tmp_path), (), TissueSpec(), StoreSpec(chunk_rows=32), (TILE,))
    chunks, first = [], 0
    for name, n in zip("abcde", (30, 3, 12, 7, 9), strict=True):
        store = SlideStore(tmp_path, name)
        store.create_rows("grids/g/tiles", (n, 8, 8, 3), np.uint8, 32, fill=0, sharded=True)
        values = np.arange(first, first + n, dtype=np.uint8)
        first += n
        store.write_chunk(
            "grids/g/tiles", 0, np.ascontiguousarray(np.broadcast_to(values[:, None, None, None], (n, 8, 8, 3)))
        )
        chunks.append(chunk(name, [0, 1] * (n // 2) + [0] * (n % 2)))
    return ChunkTiles(context, chunks)


def values_of(source, epoch: int, batch: int = 4) -> list[list[int]]:
    return [b.pixels[:, 0, 0, 0].tolist() for b in source.batches(epoch, batch, 0)]


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_workers_together_see_every_tile_and_take_as_many_steps(stored, of):
    plain = [values_of(stored.share(i, of, even=False), 1) for i in range(of)]
    assert sorted(v for part in plain for b in part for v in b) == list(range(61))
    even = [values_of(stored.share(i, of, even=True), 1) for i in range(of)]
    assert len({tuple(map(len, part)) for part in even}) == 1  # as many batches, of the same sizes
    assert {v for part in even for b in part for v in b} == set(range(61))
    for mine, whole in zip(plain, even, strict=True):
        assert {v for b in mine for v in b} == {v for b in whole for v in b}  # no chunk is read by two


def test_more_workers_than_chunks_share_the_tiles_and_nobody_waits(stored):
    even = [values_of(stored.share(i, 8, even=True), 1) for i in range(8)]
    assert len({tuple(map(len, part)) for part in even}) == 1
    assert {v for part in even for b in part for v in b} == set(range(61))
    with pytest.raises(ConfigError, match="70 workers cannot share fewer than 70 tiles"):
        values_of(stored.share(0, 70, even=True), 0)


def test_shares_of_shares_are_shares(stored):
    nested = [values_of(stored.share(r, 2, even=True).share(i, 2, even=True), 0) for r in range(2) for i in range(2)]
    assert sorted({v for part in nested for b in part for v in b}) == list(range(61))


def test_shares_are_dealt_anew_in_each_epoch(stored):
    first = [{v for b in values_of(stored.share(0, 2, even=False), e) for v in b} for e in range(6)]
    assert len({frozenset(s) for s in first}) > 1


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(0, 3))
def test_an_epoch_is_the_same_whenever_it_is_asked_for(batch, epoch):
    source = textures(20, 1)
    how = spec(augment=True, seed=3)
    first = list(Prepared(source, how).batches(epoch, batch))
    again = list(Prepared(source, how).batches(epoch, batch))
    assert all((a == b).all() for (a, _), (b, _) in zip(first, again, strict=True))


def test_loader_processes_give_every_tile(stored):
    crew = Crew(loaders=2)
    how = spec(batch_size=4)
    for epoch in (0, 1):
        got = [v for pixels, _ in crew.batches(stored, how, epoch) for v in pixels[:, 0, 0, 0].tolist()]
        assert set(got) == set(range(61))
        want = [
            batch[0][:, 0, 0, 0].tolist()
            for i in range(2)
            for batch in Prepared(stored.share(i, 2, even=True), how, i).batches(epoch, 4)
        ]
        assert Counter(got) == Counter(v for b in want for v in b)


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ConfigError, match="multiple of 3"):
        Crew(0, 3).share_of(32)
    assert Crew(1, 4).share_of(32) == 8


# checkpoints


def some_progress(optimiser: str = "adamw", epochs: int = 1) -> Progress:
    kept: list[Progress] = []
    how = spec(epochs=epochs, optimiser=optimiser)
    fit(card(), how, textures(32, 1), textures(16, 2), save=kept.append)
    return kept[-1]


@pytest.mark.parametrize("optimiser", ["sgd", "rmsprop", "adam", "adamw"])
def test_a_training_that_goes_on_ends_as_one_that_ran_through(tmp_path, optimiser):
    train, val = textures(48, 1), textures(16, 2)
    how = spec(epochs=3, optimiser=optimiser, augment={"mixup": 0.4}, dropout=0.3, patience=3)
    whole = fit(card(), how, train, val)

    class Killed(Exception):
        pass

    def save(progress):
        checkpoint.save_epoch(tmp_path, progress)
        if len(progress.history) == 1:
            raise Killed

    with pytest.raises(Killed):
        fit(card(), how, train, val, save=save)
    saved = checkpoint.last_epoch(tmp_path)
    assert saved is not None
    rest = fit(card(), how, train, val, saved=saved, save=save)
    assert rest.history == whole.history
    assert same(rest.state_dict, whole.state_dict)
    over = checkpoint.last_epoch(tmp_path)
    assert same(fit(card(), how, train, val, saved=over).state_dict, whole.state_dict)  # nothing left to do
    assert len(list(tmp_path.glob("epoch-*"))) == checkpoint.KEEP


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    one = some_progress()
    two = Progress((*one.history, EpochResult(1, 0.5, 0.1, None)), 0, one.best, one.net, one.optimiser)
    for progress in (one, two):
        checkpoint.save_epoch(tmp_path, progress)
    newest = tmp_path / "epoch-00002"
    path = newest / checkpoint.NETWORK
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptStore):
        checkpoint.read_checkpoint(newest)
    found = checkpoint.last_epoch(tmp_path)
    assert found is not None
    assert len(found.history) == 1
    assert checkpoint.last_epoch(tmp_path / "nothing") is None


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(tmp_path):
    """The limit on a file's size stands for the full disk: the system refuses the bytes in the middle of writing."""
    progress = some_progress()
    checkpoint.save_epoch(tmp_path, progress)
    code = f"""
import resource, signal, sys
from pathlib import Path
from slideflow_ray.errors import DiskFull
from slideflow_ray.train import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
root = Path({str(tmp_path)!r})
saved = checkpoint.last_epoch(root)
more = type(saved)((*saved.history, saved.history[0]), 0, saved.best, saved.net, saved.optimiser)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    checkpoint.save_epoch(root, more)
except DiskFull as error:
    print(error.code, error.message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("E_DISK No space left"), done.stderr[-2000:]
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-00001"]
    assert same(checkpoint.last_epoch(tmp_path).net, progress.net)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_what_the_system_says_of_a_full_disk_is_understood():
    assert checkpoint._no_space(OSError(errno.ENOSPC, "x"))
    assert not checkpoint._no_space(OSError(errno.EACCES, "x"))
    assert not checkpoint._no_space(ValueError("x"))
    assert issubclass(DiskFull, OSError)


def test_results_come_back_from_json_as_they_were():
    for result in (
        EpochResult(3, 0.25, 1e-3, Validation(0.5, 0.75, math.nan), 0.5, 12, 1.5),
        EpochResult(0, 0.1, 0.2, None),
    ):
        text = json.dumps(checkpoint.result_json(result), allow_nan=False)
        back = checkpoint.result_of(json.loads(text))
        assert str(back) == str(result)


# weights to begin with


def test_named_weights_are_read_and_missing_ones_are_said(tmp_path, monkeypatch):
    state = build("small-cnn", {}, 2).state_dict()
    path = tmp_path / "small-cnn.safetensors"
    save_file(state, path)
    found = find_weights(TrainSpec(weights=str(path)))
    assert same(found.state, state)
    assert found.source.startswith("sha256:")
    monkeypatch.delenv(FOLDER, raising=False)
    nothing = find_weights(TrainSpec(weights="imagenet"))
    assert nothing.state is None
    assert "starting from random" in nothing.note
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert same(find_weights(TrainSpec(weights="imagenet")).state, state)
    with pytest.raises(ConfigError, match="no weights"):
        find_weights(TrainSpec(weights=str(tmp_path / "none.safetensors")))
    (tmp_path / "bad.pth").write_bytes(b"PK\x03\x04 not safetensors")
    with pytest.raises(ConfigError, match="convert") as caught:
        find_weights(TrainSpec(weights=str(tmp_path / "bad.pth")))
    assert "slideflow-ray convert" in caught.value.step


def test_weights_of_another_shape_are_refused_by_name():
    start = loop.snapshot(build("small-cnn", {"width": 8}, 2))
    with pytest.raises(ConfigError, match=r"features\.0\.0\.weight is \(8, 3, 7, 7\) instead of \(16, 3, 7, 7\)"):
        fit(card(), spec(), textures(16, 1), start=start)


def test_weights_of_a_larger_network_are_refused():
    """ResNet-34's names are all of ResNet-18's and more."""
    start = {
        **loop.snapshot(build("small-cnn", {"width": 16}, 2)),
        "features.9.0.weight": torch.zeros(3),
        "aux1.fc.bias": torch.zeros(3),  # which is no matter
    }
    with pytest.raises(ConfigError, match=r"1 of its tensors belong to another network \(features\.9\.0\.weight\)"):
        fit(card(), spec(), textures(16, 1), start=start)


def test_auxiliary_heads_of_other_classes_are_new_too():
    """ImageNet's Inception has 1,000 classes in both of its heads."""

    class Two(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.trunk, self.aux, self.fc = nn.Linear(4, 4), nn.Linear(4, n), nn.Linear(4, n)

    net, start = Two(2), Two(1000).state_dict()
    loop._begin_with(net, start, card())
    assert torch.equal(net.trunk.weight, start["trunk.weight"])
    assert net.aux.weight.shape == (2, 4)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18"])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_an_encoder_of_smp_begins_with_a_resnet_s_weights(tmp_path, monkeypatch, encoder, library):
    """Made on the spot, by the names of torchvision and timm: the encoder has them, the decoder is as it was drawn."""
    save_file(build(f"{library}:resnet18", {}, 1000).state_dict(), tmp_path / f"{library}-resnet18.safetensors")
    given = load_file(tmp_path / f"{library}-resnet18.safetensors")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    told = {"architecture": "smp:Unet", "arguments": {"encoder_name": encoder}}
    found = find_weights(TrainSpec(weights="imagenet", **told))
    assert found.source.startswith("imagenet sha256:")
    net = build("smp:Unet", {"encoder_name": encoder}, 4)
    drawn = loop.snapshot(net)
    loop._begin_with(net, found.state, card().model_copy(update={"classes": tuple("abcd")}))
    after, inside = net.state_dict(), "encoder.model." if encoder.startswith("tu-") else "encoder."
    own = [key for key in after if key.startswith("encoder.")]
    assert len(own) == len(given) - 2  # but for the classifier
    assert all(torch.equal(after[key], given[key.removeprefix(inside)]) for key in own)
    assert all(torch.equal(after[key], drawn[key]) for key in after if not key.startswith("encoder."))
    assert not torch.equal(after[own[0]], drawn[own[0]])


def test_networks_without_imagenet_weights_name_one_that_has_them(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(ConfigError, match="nobody has trained it on ImageNet") as caught:
        find_weights(TrainSpec(architecture="unet", weights="imagenet"))
    assert "smp:Unet" in caught.value.step
    smp = {"architecture": "smp:Unet", "weights": "imagenet"}
    with pytest.raises(ConfigError, match="vgg11"):
        find_weights(TrainSpec(arguments={"encoder_name": "vgg11"}, **smp))
    nothing = find_weights(TrainSpec(**smp))
    assert nothing.state is None
    assert "--as-weights torchvision-resnet34.safetensors" in nothing.note
    start = build("torchvision:resnet34", {}, 1000).state_dict()
    net = build("smp:Unet", {"encoder_name": "resnet18"}, 2)
    with pytest.raises(ConfigError, match="belong to another network"):
        loop._begin_with(net, start, card())


def test_a_job_needs_its_classes():
    with pytest.raises(ConfigError, match="classes"):
        TrainJob.parse({"cohort": "c", "out": "o", "work": "w", "tile": {"tile_px": 32, "mpp": 1.0}}, "x")


def test_this_file_leaves_no_partial_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".epoch-x.partial").mkdir()
    assert checkpoint.last_epoch(tmp_path) is None
    assert not list(tmp_path.iterdir())

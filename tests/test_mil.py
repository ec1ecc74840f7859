"""Slide classifiers on stored features: the formula, the needle in the haystack, the way from a run to an answer."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from sklearn.metrics import roc_auc_score

from slideflow_ray.accounting import read_run
from slideflow_ray.cohort import Item
from slideflow_ray.errors import BundleError, ConfigError, NanScore
from slideflow_ray.mil import _apply, apply_mil
from slideflow_ray.models.bundle import BundleCard, load_weights, write_bundle
from slideflow_ray.models.mil import Mil, MilCard, load_mil
from slideflow_ray.models.networks import build
from slideflow_ray.phantoms import write_cohort
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec
from slideflow_ray.store import SlideStore, tree_digest
from slideflow_ray.tables import read_table
from slideflow_ray.train.mil import Bag, MilSpec, _fit, train_mil
from slideflow_ray.train.record import write_folder

D = 12


def card(pooling: str = "attention", **more) -> MilCard:
    values = {"name": "m", "classes": ("normal", "tumor"), "pooling": pooling, "encoder": "e", "node": "e-1"}
    return MilCard.model_validate({**values, "features": D, "hidden": 16, **more})


@dataclass
class Made:
    """A bag in memory."""

    item: Item
    features: np.ndarray
    label: int

    def read(self) -> np.ndarray:
        return self.features


def haystack(n: int, seed: int, tiles: int = 120, needles: int = 3) -> list[Made]:
    """Half the bags hold a few tiles that differ in one feature, which the mean over the bag all but hides."""
    rng = np.random.default_rng(seed)
    bags = []
    for i in range(n):
        x = rng.normal(0, 1, (tiles + i % 7, D))
        if i % 2:
            x[:needles, 2] += 5
        bags.append(Made(Item(slide_id=f"{seed}-{i}", uri="x"), x.astype(np.float16), i % 2))
    return bags


def test_attention_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    net = Mil(card()).eval()
    with torch.no_grad():
        net.mean += 0.3
        net.std *= 2.0
    x = np.random.default_rng(0).normal(size=(7, D))
    w = {key: value.double().numpy() for key, value in net.state_dict().items()}
    h = (x - w["mean"]) / w["std"]
    gate = np.tanh(h @ w["v.weight"].T + w["v.bias"]) / (1 + np.exp(-(h @ w["u.weight"].T + w["u.bias"])))
    e = np.exp(gate @ w["w.weight"][0] + w["w.bias"])
    a = e / e.sum()
    logits, attention = net(torch.from_numpy(x))
    np.testing.assert_allclose(attention.detach(), a, rtol=1e-5)
    np.testing.assert_allclose(logits.detach(), w["head.weight"] @ (a @ h) + w["head.bias"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["attention", "mean", "max"])
def test_the_order_of_tiles_means_nothing(pooling):
    net = Mil(card(pooling)).eval()
    x = torch.randn(9, D)
    order = torch.randperm(9)
    with torch.inference_mode():
        (a, first), (b, second) = net(x), net(x[order])
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(first[order], second)
    assert float(first.sum()) == pytest.approx(1, abs=1e-5)


def scores_of(pooling: str, seed: int = 0) -> tuple[float, Mil]:
    spec = MilSpec(pooling=pooling, hidden=16, epochs=40, batch=4, lr=3e-3, seed=seed, patience=15)
    state, _, _ = _fit(card(pooling), spec, haystack(40, 1), haystack(20, 2), lambda event: None)
    net = Mil(card(pooling))
    net.load_state_dict(state)
    test = haystack(40, 3)
    with torch.inference_mode():
        logits = np.stack([net.eval()(torch.from_numpy(bag.features))[0].numpy() for bag in test])
    return roc_auc_score([bag.label for bag in test], logits[:, 1] - logits[:, 0]), net


def test_attention_finds_the_needle_that_the_mean_cannot_see():
    found, net = scores_of("attention")
    hidden, _ = scores_of("mean")
    assert found > 0.95
    assert hidden < found - 0.1
    ranks = []
    for bag in haystack(20, 4)[1::2]:
        with torch.inference_mode():
            attention = net(torch.from_numpy(bag.features))[1].numpy()
        ranks.append(attention[:3].min() > np.quantile(attention[3:], 0.95))
    assert np.mean(ranks) > 0.9


def test_the_same_seed_gives_the_same_weights_and_a_broken_loss_is_said():
    spec = MilSpec(hidden=16, epochs=3, batch=4, max_tiles=50, dropout=0.2)
    of = card(dropout=0.2)
    one, two = (_fit(of, spec, haystack(12, 1), haystack(6, 2), lambda event: None) for _ in range(2))
    assert all(torch.equal(one[0][key], two[0][key]) for key in one[0])
    assert one[1:] == two[1:]
    broken = haystack(12, 1)
    broken[3].features[0, 0] = np.nan
    with pytest.raises(NanScore):
        _fit(of, spec, broken, [], lambda event: None)
    with pytest.raises(NanScore, match="validation loss of epoch 0"):
        _fit(of, spec, haystack(12, 1), broken, lambda event: None)


def test_a_slide_whose_answer_is_not_finite_leaves_nothing_behind(tmp_path):
    store = SlideStore(tmp_path, "s")
    store.write_array("features/g/e-1", np.full((3, D), np.nan, np.float16), {})
    bag = Bag(Item(slide_id="s", uri="x"), str(tmp_path), ("features/g/e-1",))
    with pytest.raises(NanScore, match="gives s values"):
        _apply(Mil(card()).eval(), bag, "m-1")
    assert not store.committed("attention/g/m-1")


def test_a_bundle_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    write_folder(tmp_path / "b", {"mil.json": b"old"})
    plain = os.rename

    def full(source, target):
        if Path(source).name == "new":
            raise OSError("no space left")
        plain(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="no space"):
        write_folder(tmp_path / "b", {"mil.json": b"new"})
    assert (tmp_path / "b/mil.json").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


# from a run to an answer


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """A run of two random encoders on phantoms, features kept of one."""
    folder = tmp_path_factory.mktemp("mil")
    cohort = write_cohort(folder / "cohort", slides=9, seed=1, size_px0=(1280, 960))
    for name, seed in (("encoder", 0), ("other", 1)):
        torch.manual_seed(seed)
        of = BundleCard(
            name=name,
            task="features",
            architecture="small-cnn",
            arguments={"width": 8},
            tile_px=64,
            mpp=1.0,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        )
        write_bundle(folder / name, of, build("small-cnn", {"width": 8}, 0).state_dict())
    spec = {"cohort": str(cohort), "out": str(folder / "out"), "model": [{"path": str(folder / "encoder")}]}
    run(RunSpec.parse({**spec, "compute": {"device": "cpu"}}, "test"))
    return folder


def test_from_features_to_slides_and_attention_that_lies_on_the_tiles(scored):
    out = scored / "out"
    trained = train_mil(out, scored / "abmil", ("normal", "tumor"), MilSpec(epochs=4, hidden=16))
    assert trained.bags == {"train": 4, "val": 2}
    record = json.loads((trained.bundle / "training.json").read_text())
    rows = {item["slide_id"]: item for item in read_run(out)["items"]}
    assert {rows[name]["split"] for name in record["data"]["slide_ids"]["train"]} == {"train"}
    found = apply_mil(out, trained.bundle)
    assert set(found.margins) == set(rows)
    assert found.without == ()
    of, net = load_mil(trained.bundle)
    name = next(iter(rows))
    ((grid, node),) = read_run(out)["outcomes"][name]["grids"]
    assert node == of.node
    store = SlideStore(out, name)
    features = store.read(f"features/{grid}/{node}")
    with torch.inference_mode():
        logits, attention = net(torch.from_numpy(features))
    kept = store.read(f"attention/{grid}/{found.node}")
    np.testing.assert_allclose(kept, attention.numpy() * len(features), rtol=1e-5)
    level = np.asarray(zarr.open_array(store.root / f"heatmaps/{grid}/attention-{found.node}/0", mode="r"))[0]
    cells = store.read(f"grids/{grid}/rowcol")
    np.testing.assert_array_equal(level[cells[:, 0], cells[:, 1]], kept)
    assert np.isfinite(level).sum() == len(cells)
    table = {row["slide_id"]: row for row in read_table(found.table)}
    p = torch.softmax(logits, 0)
    assert table[name]["prob_tumor"] == pytest.approx(float(p[1]), abs=1e-5)
    (slide,) = [r for r in found.evaluation.results if r.level == "slide" and r.split == "test"]
    test = [row for row in table.values() if row["split"] == "test"]
    want = roc_auc_score([row["label"] == "tumor" for row in test], [row["margin_tumor"] for row in test])
    assert slide.auc == pytest.approx(want)
    before = tree_digest(out)
    again = apply_mil(out, trained.bundle)
    assert again.node == found.node
    assert tree_digest(out) == before


def test_a_training_done_again_gives_the_same_bytes_and_never_loses_a_bundle(scored, tmp_path):
    spec = MilSpec(epochs=2, hidden=8, pooling="max")
    one = train_mil(scored / "out", tmp_path / "one", ("normal", "tumor"), spec).bundle
    two = train_mil(scored / "out", tmp_path / "two", ("normal", "tumor"), spec).bundle
    assert (one / "weights.safetensors").read_bytes() == (two / "weights.safetensors").read_bytes()
    with pytest.raises(BundleError, match="exists already"):
        train_mil(scored / "out", one, ("normal", "tumor"), spec)
    train_mil(scored / "out", one, ("normal", "tumor"), spec, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x").write_text("kept")
    with pytest.raises(BundleError, match="no slide classifier"):
        train_mil(scored / "out", tmp_path / "mine", ("normal", "tumor"), spec, overwrite=True)
    assert (tmp_path / "mine/x").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "one", "two"]


def test_what_cannot_be_trained_or_applied_is_said(scored, tmp_path):
    with pytest.raises(ConfigError, match="No training slide with features has the label benign, malignant"):
        train_mil(scored / "out", tmp_path / "x", ("benign", "malignant"))
    with pytest.raises(ConfigError, match="features are kept of encoder"):
        train_mil(scored / "out", tmp_path / "x", ("normal", "tumor"), encoder="nobody")
    spec = {"cohort": str(scored / "cohort/cohort.csv"), "out": str(tmp_path / "other")}
    run(RunSpec.parse({**spec, "model": [{"path": str(scored / "other")}], "compute": {"device": "cpu"}}, "test"))
    bundle = train_mil(scored / "out", tmp_path / "m", ("normal", "tumor"), MilSpec(epochs=1)).bundle
    with pytest.raises(BundleError, match="reads features of encoder-"):
        apply_mil(tmp_path / "other", bundle)
    with pytest.raises(BundleError, match="no slide classifier"):
        apply_mil(scored / "out", scored / "encoder")
    state = load_weights(bundle)
    (bundle / "mil.json").write_text((bundle / "mil.json").read_text().replace('"hidden": 128', '"hidden": 64'))
    assert state["v.weight"].shape[0] == 128
    with pytest.raises(BundleError, match="do not fit"):
        load_mil(bundle)

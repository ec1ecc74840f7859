"""Explanations against slow references, on planted truth, and beside a finished run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from slideflow_ray import cli
from slideflow_ray.errors import ConfigError
from slideflow_ray.explain import Asked, default_methods, explain, layers_of, maps_of, overlay, read_explanations
from slideflow_ray.models.bundle import BundleCard, write_bundle
from slideflow_ray.models.networks import build
from slideflow_ray.prepare import to_input
from slideflow_ray.report import write_report
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec

SIDE = 60
SPOT = (44, 18)
"""x, y of the dark disc."""


def card_of(architecture: str = "small-cnn", arguments: dict | None = None, **more) -> BundleCard:
    shape = {"tile_px": SIDE, "whole": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), **more}
    values = {"architecture": architecture, "arguments": arguments or {}, "classes": ("none", "spot")}
    return BundleCard.parse({"schema": 1, "name": "m", "task": "classify", **values, **shape}, "test")


class Dark(nn.Module):
    """The margin grows with the darkest disc."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 9, stride=2, padding=4, bias=False)
        self.deep = nn.Conv2d(1, 1, 3, stride=2, padding=1, bias=False)
        with torch.no_grad():
            self.conv.weight.fill_(-1 / 243)
            self.deep.weight.fill_(1 / 9)
        self.head = nn.Linear(1, 2)

    def forward(self, x):
        maps = F.relu(self.deep(F.relu(self.conv(x))))
        z = maps.amax((2, 3))
        return torch.cat([torch.zeros_like(z), 5 * z], 1)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    rng = np.random.default_rng(0)
    grey = rng.normal(150, 6, (SIDE, SIDE))
    y, x = np.mgrid[:SIDE, :SIDE]
    grey[np.hypot(x - SPOT[0], y - SPOT[1]) < 5] = 40
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, 2)


@pytest.mark.parametrize("method", ["grad-cam", "saliency", "occlusion"])
def test_the_hottest_place_is_the_spot(pixels, method):
    found = dict(maps_of(card_of(), Dark().eval(), pixels, 1, [method], Asked(window_px=12, stride_px=3)))
    assert set(found) == ({"grad-cam conv", "grad-cam deep"} if method == "grad-cam" else {method})
    for values in found.values():
        assert values.shape == (SIDE, SIDE)
        assert values.dtype == np.float32
        y, x = np.unravel_index(values.argmax(), values.shape)
        assert np.hypot(x - SPOT[0], y - SPOT[1]) < 7
        spot = values[SPOT[1] - 4 : SPOT[1] + 5, SPOT[0] - 4 : SPOT[0] + 5].mean()
        assert spot > 3 * np.abs(values).mean()


def test_the_other_class_is_the_mirror(pixels):
    net = Dark().eval()
    (one,), (other,) = (
        [values for _, values in maps_of(card_of(), net, pixels, c, ["occlusion"], Asked(stride_px=10))] for c in (0, 1)
    )
    np.testing.assert_allclose(one, -other, atol=1e-5)


def test_grad_cam_is_the_formula(pixels):
    torch.manual_seed(0)
    net = build("torchvision:resnet18", {}, 2).eval()
    card = card_of()
    found = dict(maps_of(card, net, pixels, 1, ["grad-cam"]))
    assert list(found) == ["grad-cam layer3", "grad-cam layer4"]
    x = to_input(pixels[None], card.mean, card.std, dtype=torch.float32)
    kept = {}
    net.layer3.register_forward_hook(lambda _m, _i, out: kept.update(a=out))
    z = net(x)[0].double()
    (gradient,) = torch.autograd.grad(z[1] - z[0], kept["a"])
    cam = (gradient.mean((2, 3), keepdim=True) * kept["a"]).sum(1, keepdim=True).clamp(min=0)
    expected = F.interpolate(cam, (SIDE, SIDE), mode="bilinear")[0, 0].detach().numpy()
    np.testing.assert_allclose(found["grad-cam layer3"], expected, rtol=1e-4, atol=1e-6)


def test_occlusion_is_what_is_lost_under_each_window(pixels):
    net, card = Dark().eval(), card_of()
    ((_, found),) = maps_of(card, net, pixels, 1, ["occlusion"], Asked(window_px=20, stride_px=10))
    x = to_input(pixels[None], card.mean, card.std, dtype=torch.float32)
    lost, times = np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE))

    def margin(x) -> float:
        with torch.inference_mode():
            z = net(x)[0]
        return float(z[1] - z[0])

    for top in range(0, SIDE - 19, 10):
        for left in range(0, SIDE - 19, 10):
            hidden = x.clone()
            hidden[:, :, top : top + 20, left : left + 20] = x.mean((2, 3), keepdim=True)
            window = (slice(top, top + 20), slice(left, left + 20))
            lost[window] += margin(x) - margin(hidden)
            times[window] += 1
    np.testing.assert_allclose(found, lost / times, atol=1e-5)


def test_what_suits_a_network():
    assert default_methods(card_of("small-cnn")) == ("grad-cam",)
    assert default_methods(card_of("skip-svm")) == ("occlusion",)
    x = torch.zeros(1, 3, 96, 96)
    two = {"first": "torchvision:resnet18", "second": {"backbone": "torchvision:resnet18"}}
    for rule, part in (("vote", "first"), ("features", "trunk")):
        net = build("two-models", {**two, "rule": rule}, 2).eval()
        assert [name for name, _ in layers_of(net, x)] == [f"{part}.layer3", f"{part}.layer4"]
    net = build("small-cnn", {"width": 8}, 2).eval()
    assert len(layers_of(net, x)) == 2
    assert layers_of(net, x, ["features.0"])[0][1] is net.features[0]
    with pytest.raises(ConfigError, match="no layer 'layer9'"):
        layers_of(net, x, ["layer9"])


def test_red_is_gain_and_blue_is_loss():
    pixels = np.full((4, 4, 3), 100, np.uint8)
    values = np.zeros((4, 4), np.float32)
    values[0, 0], values[3, 3] = 2.0, -2.0
    found = overlay(pixels, values).astype(int)
    assert found[0, 0, 0] > found[0, 0, 2] + 50
    assert found[3, 3, 2] > found[3, 3, 0] + 50
    assert (found[1, 1] == 100).all()
    assert (overlay(pixels, np.zeros((4, 4), np.float32)) == 100).all()


# beside a run


@pytest.fixture(scope="module")
def ran(tmp_path_factory, pixels):
    """Whole images and a slide of tiles, scored by two bundles of one random network."""
    folder = tmp_path_factory.mktemp("explained")
    blank = np.full_like(pixels, 150)
    for name, image in (("a", pixels), ("b", blank), ("c", np.flip(pixels, 1))):
        Image.fromarray(image).save(folder / f"{name}.png")
    Image.fromarray(np.tile(blank, (3, 4, 1))).save(folder / "slide.png")
    with (folder / "cohort.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "uri", "patient_id", "split", "label", "mpp", "modality"])
        writer.writerows([n, f"{n}.png", n, "test", "spot", "", "pas"] for n in "abc")
        writer.writerow(["slide", "slide.png", "s", "test", "", "1.0", "he"])
    torch.manual_seed(1)
    state = build("small-cnn", {"width": 8}, 2).state_dict()
    write_bundle(folder / "whole", card_of(arguments={"width": 8}, name="whole"), state)
    write_bundle(folder / "tiles", card_of(arguments={"width": 8}, whole=None, mpp=1.0, name="tiles"), state)
    routes = {"whole": {"modality": "pas"}, "tiles": {"modality": "he"}}
    models = [{"path": str(folder / name), "where": where} for name, where in routes.items()]
    spec = {"cohort": str(folder / "cohort.csv"), "out": str(folder / "out"), "model": models}
    more = {"executor": {"workers": 1}, "tissue": {"rule": "everything"}, "store": {"tiles": "none"}}
    run(RunSpec.parse({**spec, **more}, "test"))
    return folder / "out"


def test_a_run_is_explained_and_the_report_shows_it(ran, pixels, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", str(ran), "--model", "whole", "--top", "2", "--method", "occlusion", "--json"])
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert len(told["maps"]) == 2
    assert told["maps"][0]["probability"] >= told["maps"][1]["probability"]
    folder = Path(told["index"]).parent
    with pytest.raises(SystemExit):
        cli.main(["explain", str(ran), "--model", "whole", "--item", "a", "--method", "saliency", "--json"])
    (one,) = json.loads(capsys.readouterr().out)["maps"]
    assert (one["slide_id"], one["class"], one["label"], one["map"]) == ("a", "spot", "spot", "saliency")
    picture = np.asarray(Image.open(folder / one["picture"]))
    np.testing.assert_array_equal(picture[:, :SIDE], pixels)
    values = np.load(folder / one["array"])
    np.testing.assert_array_equal(picture[:, SIDE:], overlay(pixels, values))
    y, x = np.unravel_index(values.argmax(), values.shape)
    assert one["hottest_px"] == [x, y]
    page = write_report(ran).read_text()
    assert "Where whole looks" in page
    assert page.count(">saliency</figcaption>") == 1


def test_a_slide_is_explained_at_its_highest_tile(ran):
    found = explain(ran, Asked(model="tiles", methods=("saliency",)))
    assert [(m["slide_id"], m["class"]) for m in found.maps] == [("slide", "spot")]
    assert 0 <= found.maps[0]["row"] < 12
    assert np.load(found.index.parent / found.maps[0]["array"]).shape == (SIDE, SIDE)
    assert {one["model"] for one in read_explanations(ran)} >= {"tiles"}


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        (Asked(), "Say which model"),
        (Asked(model="other"), "no classifier other"),
        (Asked(model="whole", items=("zz",)), "no scores of zz"),
        (Asked(model="whole", class_name="x"), "no class 'x'"),
        (Asked(model="whole", layers=("zz",)), "no layer 'zz'"),
    ],
)
def test_what_is_not_there_is_said(ran, asked, cause):
    with pytest.raises(ConfigError, match=cause):
        explain(ran, asked)


def test_another_bundle_than_the_one_that_scored_is_refused(ran):
    torch.manual_seed(2)
    path = ran.parent / "whole"
    kept = (path / "weights.safetensors").read_bytes()
    write_bundle(
        path,
        card_of(arguments={"width": 8}, name="whole"),
        build("small-cnn", {"width": 8}, 2).state_dict(),
        overwrite=True,
    )
    try:
        with pytest.raises(ConfigError, match="not the bundle any more"):
            explain(ran, Asked(model="whole"))
    finally:
        (path / "weights.safetensors").write_bytes(kept)

"""Methods of pre-training without labels: their losses as their papers write them, and what each teaches."""

import math

import numpy as np
import pytest
import torch

from slideflow_ray.models.unet import Unet
from slideflow_ray.train.pretext import Decoded, DetCon, PixContrast, make_pretext, nt_xent
from slideflow_ray.train.regcon import Weights
from slideflow_ray.train.views import two_views


def test_nt_xent_is_as_written():
    g = torch.Generator().manual_seed(0)
    one, two = (torch.nn.functional.normalize(torch.randn(3, 4, generator=g).double(), dim=1) for _ in "12")
    z = torch.cat([one, two]).numpy()
    total = 0.0
    for i in range(6):
        j = (i + 3) % 6
        rest = sum(math.exp(z[i] @ z[k] / 0.5) for k in range(6) if k != i)
        total -= math.log(math.exp(z[i] @ z[j] / 0.5) / rest)
    assert float(nt_xent(one, two, 0.5)) == pytest.approx(total / 6)


@pytest.fixture
def images():
    x = torch.zeros(3, 3, 32, 32)
    g = torch.Generator().manual_seed(2)
    for i, image in enumerate(x):
        image[:, : 10 + 4 * i] = 0.3
        image[:, 10 + 4 * i :, 8:] = 0.8
    return (x + 0.02 * torch.randn(x.shape, generator=g)).clamp(0, 1)


@pytest.mark.parametrize("method", ["usregcon", "simclr", "pixcontrast", "detcon"])
def test_each_method_learns_something_and_teaches_what_it_says(method, images):
    torch.manual_seed(0)
    net = Unet(4, levels=2, width=8)
    head = make_pretext(method, 8, 32, 6, Weights(), "masked")
    optimiser = torch.optim.Adam([*net.parameters(), *head.parameters()], 3e-3)
    losses = []
    for step in range(30):
        views = two_views(images, step % 3)
        one, two = (Decoded(*net.decode(shown)) for shown in views.shown)
        optimiser.zero_grad()
        torch.manual_seed(step)
        told = head(views, one, two)
        told.loss.backward()
        if step == 0:
            decoder = [p.grad for name, p in net.named_parameters() if name.startswith(("up.", "join."))]
            assert all(g is None for g in decoder) is (method == "simclr")
            assert net.down[0][0].weight.grad.any()
            assert net.head.weight.grad is None
        optimiser.step()
        losses.append(float(told.loss.detach()))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert (told.health is not None) is (method == "usregcon")


def test_pixels_meet_their_own_place_after_the_turn():
    """Features that say where a pixel is in view one: only laid back do they meet; then the loss is nearly none."""
    torch.manual_seed(0)
    head = PixContrast(2, places=40, temperature=0.01)
    head.project = torch.nn.Identity()
    place = torch.linspace(0, math.pi / 2, 256).view(1, 1, 16, 16).expand(2, 1, 16, 16)
    full = torch.cat([place.cos(), place.sin()], 1)
    for seed in range(4):
        views = two_views(torch.rand(2, 1, 16, 16), seed)
        turned = views.turn.apply(full)
        deep = torch.zeros(2, 1, 1, 1)
        good = head(views, Decoded(deep, full[:1].repeat(2, 1, 1, 1)), Decoded(deep, turned))
        bad = head(views, Decoded(deep, full), Decoded(deep, full.roll((5, 7), (2, 3))))
        assert float(good.loss) < float(bad.loss)


def test_regions_of_the_turned_view_are_laid_back():
    """Where view two is view one, turned, its regions agree with view one's as they do with themselves."""
    torch.manual_seed(0)
    head = make_pretext("usregcon", 4, 8, 5, Weights(), "masked")
    full = torch.randn(3, 4, 16, 16)
    for seed in range(3):
        views = two_views(torch.rand(3, 1, 16, 16), seed)
        assert not torch.equal(views.turn.apply(full), full)
        deep = torch.zeros(3, 8, 1, 1)
        told = head(views, Decoded(deep, full), Decoded(deep, views.turn.apply(full)))
        assert told.parts["consistency"] == pytest.approx(told.health.entropy, rel=1e-4)


def test_masks_are_segments_of_the_grey_image(images):
    masks = DetCon(4, scale=50, least_px=20).masks(images.mean(1))
    assert set(masks.assign.unique().tolist()) == {0, 1}
    assert masks.assign.sum(1).max() == 1
    assert 2 <= masks.active[0].sum() <= 16
    edge = masks.assign[0].argmax(0)
    assert edge[2, 16] != edge[28, 20]  # both sides of the step

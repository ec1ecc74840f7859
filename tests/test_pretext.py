"""Methods of pre-training without labels: their losses as their papers write them, and what each teaches."""

import math

import numpy as np
import pytest
import torch

from slideflow_ray.models.unet import Unet
from slideflow_ray.train.pretext import Decoded, DetCon, PixPro, make_pretext, near_pairs, nt_xent
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


@pytest.mark.parametrize("method", ["usregcon", "simclr", "pixpro", "detcon"])
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


@pytest.fixture
def pixpro():
    """A head in evaluation, on features that it leaves as they are: what it adds can be written out."""
    torch.manual_seed(0)
    head = PixPro(3, side=4, near=1.1, projection=3).double()
    head.project = torch.nn.Identity()
    return head


def cosine(a, b):
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def propagated_slowly(x, g, gamma):
    """y_i = sum_j max(cos(x_i, x_j), 0)^gamma g(x_j), x (C, h, w)."""
    places = [(r, c) for r in range(x.shape[1]) for c in range(x.shape[2])]
    return {i: sum(max(cosine(x[:, *i], x[:, *j]), 0) ** gamma * g(x[:, *j]) for j in places) for i in places}


def pixpro_slowly(one, two, g, near, gamma=2):
    """The loss of one image's binned features, (C, h, w) each, already laid on each other."""
    total, pairs = 0.0, 0
    y, other = (propagated_slowly(x, g, gamma) for x in (one, two))
    for i in y:
        for j in y:
            if math.dist(i, j) / math.sqrt(2) < near:
                total -= cosine(y[i], two[:, *j]) + cosine(other[i], one[:, *j])
                pairs += 1
    return total / pairs


@pytest.mark.parametrize("near", [0.7, 1.1])
def test_pixpro_is_as_written(pixpro, near):
    """Against loops: 8 x 8 features in bins of 2, view two turned; within 1.1 diagonals lie the neighbours too."""
    pixpro.near = near
    full = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    weight, bias = (p.detach().numpy() for p in pixpro.transform.parameters())
    bins = full.view(2, 2, 3, 4, 2, 4, 2).mean((4, 6)).numpy()
    each = [pixpro_slowly(*bins[:, i], lambda x: weight @ x + bias, near) for i in range(2)]
    deep = torch.zeros(2, 1, 1, 1)
    for seed in range(4):
        views = two_views(torch.rand(2, 1, 8, 8), seed)
        told = pixpro(views, Decoded(deep, full[0]), Decoded(deep, views.turn.apply(full[1])))
        assert float(told.loss.detach()) == pytest.approx(np.mean(each), rel=1e-6)


def test_places_nearer_than_seven_tenths_of_a_diagonal_are_the_place_itself():
    i, j = near_pairs(3, 4, 0.7, torch.device("cpu"))
    assert i.tolist() == j.tolist() == list(range(12))


def test_the_target_of_pixpro_gets_no_gradient(pixpro):
    x, target = (torch.randn(1, 16, 3, dtype=torch.float64, requires_grad=True) for _ in "12")
    pixpro.agreement(x, target, near_pairs(4, 4, 0.7, torch.device("cpu"))).backward()
    assert x.grad.any()
    assert target.grad is None


def test_pixpro_learns_without_collapsing(images):
    """Forty steps: the loss nears -2, and what is projected still differs from place to place."""
    torch.manual_seed(0)
    net, head = Unet(4, levels=2, width=8), PixPro(8)
    optimiser = torch.optim.Adam([*net.parameters(), *head.parameters()], 3e-3)
    losses, spreads = [], []
    for step in range(40):
        views = two_views(images, step)
        one, two = (Decoded(*net.decode(shown)) for shown in views.shown)
        optimiser.zero_grad()
        told = head(views, one, two)
        told.loss.backward()
        optimiser.step()
        losses.append(float(told.loss.detach()))
        unit = torch.nn.functional.normalize(one.full.detach(), dim=1)
        spreads.append(float(unit.std((0, 2, 3)).mean()))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    assert spreads[-1] > 0.5 * spreads[0]


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

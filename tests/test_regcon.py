"""The equations of USRegCon, one by one, against loops that spell them out."""

import math

import numpy as np
import pytest
import torch

from slideflow_ray.train.regcon import (
    RegionHead,
    Regions,
    Weights,
    consistency_loss,
    divide,
    grey_loss,
    greys,
    health,
    joint_loss,
    pooled,
    semantic_loss,
)

N, K, C, H, W = 3, 4, 5, 6, 7
LEAST = 0.23


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(3)


@pytest.fixture
def assign(rng):
    return torch.softmax(2 * torch.randn(N, K, H, W, generator=rng, dtype=torch.float64), 1)


@pytest.fixture
def image(rng):
    return torch.rand(N, H, W, generator=rng, dtype=torch.float64)


def regions_of(assign, least=0.01):
    share = assign.mean((2, 3))
    return Regions(assign, share, share > least)


def test_pixels_are_shared_out_by_cosine_and_temperature(rng):
    e, c = torch.randn(N, C, H, W, generator=rng).double(), torch.randn(K, C, generator=rng).double()
    found = divide(e, c, temperature=0.07, least=0.2)
    for n in range(N):
        shares = np.zeros(K)
        for y in range(H):
            for x in range(W):
                p = e[n, :, y, x].numpy()
                cosine = [p @ q / np.linalg.norm(p) / np.linalg.norm(q) for q in c.numpy()]
                raised = np.exp(np.array(cosine) / 0.07)
                np.testing.assert_allclose(found.assign[n, :, y, x], raised / raised.sum(), rtol=1e-9)
                shares += raised / raised.sum() / (H * W)
        np.testing.assert_allclose(found.share[n], shares, rtol=1e-9)
        assert found.active[n].tolist() == [s > 0.2 for s in shares]


def test_region_pooling_is_a_mean_weighed_by_shares(assign, rng):
    values = torch.randn(N, C, H, W, generator=rng).double()
    found = pooled(assign, values)
    for n in range(N):
        for k in range(K):
            a = assign[n, k].numpy().ravel()
            np.testing.assert_allclose(found[n, k], values[n].numpy().reshape(C, -1) @ a / a.sum(), rtol=1e-9)


def test_a_region_without_a_pixel_is_pooled_to_nothing_and_sends_no_gradient():
    assign = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    assign[:, 0] = 1
    values = torch.ones(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    found = pooled(assign, values)
    found.sum().backward()
    assert found[0, :, 0].tolist() == [1, 0]
    assert torch.isfinite(values.grad).all()


def test_law_of_total_variance(assign, image):
    mean, variance = greys(assign, image)
    share = assign.mean((2, 3))
    whole = image.mean((1, 2))
    total = (share * (variance + (mean - whole[:, None]) ** 2)).sum(1)
    np.testing.assert_allclose(total, image.var((1, 2), unbiased=False), rtol=1e-9)


def test_grey_loss_is_as_written(assign, image):
    regions = regions_of(assign, least=LEAST)
    assert regions.active.sum(1).min() >= 2
    assert not regions.active.all()
    within, between = grey_loss(regions, image, temperature=0.1)
    inside, apart = [], []
    for n in range(N):
        grey = image[n].numpy()
        mu, var, pi = [], [], []
        for k in range(K):
            a = assign[n, k].numpy()
            mu.append((a * grey).sum() / a.sum())
            var.append((a * (grey - mu[k]) ** 2).sum() / a.sum())
            pi.append(a.sum() / (H * W))
        inside.append(sum(p * v for p, v in zip(pi, var, strict=True)) / grey.var())
        active = [k for k in range(K) if pi[k] > LEAST]
        pairs = [math.exp(-abs(mu[k] - mu[j]) / 0.1) for k in active for j in active if k != j]
        apart.append(sum(pairs) / (len(active) * (len(active) - 1)))
    np.testing.assert_allclose(within, np.mean(inside), rtol=1e-9)
    np.testing.assert_allclose(between, np.mean(apart), rtol=1e-9)


def test_one_giant_region_costs_one_whatever_the_contrast(image):
    giant = torch.zeros(N, K, H, W, dtype=torch.float64)
    giant[:, 2] = 1
    for contrast in (1.0, 0.1):
        within, between = grey_loss(regions_of(giant), contrast * image)
        np.testing.assert_allclose(within, 1, rtol=1e-6)
        assert between == 0


@pytest.mark.parametrize("negatives", ["masked", "all"])
def test_semantic_loss_is_as_written(negatives, rng):
    one, two = (torch.nn.functional.normalize(torch.randn(N, K, C, generator=rng).double(), dim=-1) for _ in "12")
    on_one = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1]]).bool()
    on_two = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()

    def literal(q, r, on_q, on_r):
        terms = []
        for i in range(N):
            for k in range(K):
                if not (on_q[i, k] and on_r[i, k]):
                    continue
                pull = math.exp(float(q[i, k] @ r[i, k]) / 0.2)
                push = 0.0
                for j in range(N):
                    for m in range(K):
                        if not on_r[j, m] or (j, m) == (i, k) or (negatives == "masked" and m == k):
                            continue
                        push += math.exp(float(q[i, k] @ r[j, m]) / 0.2)
                terms.append(-math.log(pull / (pull + push)))
        return sum(terms) / len(terms)

    expected = (literal(one, two, on_one, on_two) + literal(two, one, on_two, on_one)) / 2
    np.testing.assert_allclose(semantic_loss(one, two, on_one, on_two, 0.2, negatives), expected, rtol=1e-9)


def test_no_common_region_is_no_loss_and_no_nan(rng):
    q = torch.randn(2, 2, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    loss = semantic_loss(q, q, torch.tensor([[1, 0], [1, 0]]).bool(), torch.tensor([[0, 1], [0, 1]]).bool())
    loss.backward()
    assert loss == 0
    assert not q.grad.any()


def test_masked_negatives_send_no_gradient(rng):
    """Regions of the same index in other images neither attract nor repel."""
    one = torch.nn.functional.normalize(torch.randn(2, 2, 3, generator=rng).double(), dim=-1)
    two = torch.nn.functional.normalize(torch.randn(2, 2, 3, generator=rng).double(), dim=-1).requires_grad_()
    on = torch.tensor([[True, False], [False, False]])
    also = torch.tensor([[True, False], [True, False]])  # the other image's region 0: same index
    semantic_loss(one, two, on, also).backward()
    assert not two.grad[1, 0].any()
    two.grad = None
    semantic_loss(one, two, on, also, negatives="all").backward()
    assert two.grad[1, 0].any()


def test_consistency_teaches_the_first_view_only(assign, rng):
    one = torch.softmax(torch.randn(N, K, H, W, generator=rng, dtype=torch.float64), 1).requires_grad_()
    two = assign.clone().requires_grad_()
    loss = consistency_loss(one, two)
    literal = -sum(
        float((two[n, k, y, x] * one[n, k, y, x].log()).detach())
        for n in range(N)
        for k in range(K)
        for y in range(H)
        for x in range(W)
    ) / (N * H * W)
    np.testing.assert_allclose(float(loss.detach()), literal, rtol=1e-9)
    loss.backward()
    assert one.grad is not None
    assert two.grad is None


@pytest.mark.parametrize(
    ("weights", "moves"),
    [
        (Weights(1, 0, 0), {"embed": True, "prototypes": True, "project": False}),
        (Weights(0, 1, 0), {"embed": True, "prototypes": True, "project": True}),
        (Weights(0, 0, 1), {"embed": True, "prototypes": True, "project": False}),
    ],
)
def test_each_loss_teaches_what_it_should(weights, moves, image, rng):
    torch.manual_seed(0)
    head = RegionHead(C, K).double()
    features = tuple(torch.randn(N, C, H, W, generator=rng).double().requires_grad_() for _ in "12")
    joint_loss(head, features, (image, image), weights=weights).total.backward()
    for name, expected in moves.items():
        grads = [p.grad for key, p in head.named_parameters() if key.startswith(name)]
        assert any(g is not None and bool(g.any()) for g in grads) is expected, name
    assert features[0].grad.any()
    assert bool(features[1].grad is not None and features[1].grad.any()) is (weights.consistency == 0)


def test_joint_loss_adds_its_parts_up(image, rng):
    torch.manual_seed(0)
    head = RegionHead(C, K).double()
    features = tuple(torch.randn(N, C, H, W, generator=rng).double() for _ in "12")
    parts = joint_loss(head, features, (image, image), weights=Weights(2, 3, 0.5, 0.7))
    expected = 2 * (parts.within + 0.7 * parts.between) + 3 * parts.semantic + 0.5 * parts.consistency
    np.testing.assert_allclose(parts.total.detach(), expected, rtol=1e-9)


def test_collapse_is_told():
    even = torch.full((1, 8, 4, 4), 1 / 8)
    assert "all regions alike" in health(regions_of(even)).alarm
    one = torch.zeros(1, 8, 4, 4)
    one[:, 0] = 1
    assert "only 1.0 of 8" in health(regions_of(one)).alarm
    quarters = torch.zeros(1, 8, 4, 4)
    for k in range(4):
        quarters[:, k, k] = 1
    assert health(regions_of(quarters)).alarm is None


def test_regions_that_lie_alike_over_all_places_are_told():
    """Three active regions, sure enough of themselves, but every pixel has the same shares."""
    alike = torch.tensor([0.6, 0.2, 0.2, 0, 0, 0, 0, 0]).view(1, 8, 1, 1).expand(2, 8, 4, 4)
    found = health(regions_of(alike))
    assert found.active == 3
    assert found.information == pytest.approx(0, abs=1e-6)
    assert "divide no image" in found.alarm


def test_what_a_place_tells_of_its_region_is_mutual_information(rng):
    shares = torch.rand(1, 3, 4, 4, generator=rng).softmax(1)
    joint = shares[0].flatten(1).numpy().astype(np.float64) / 16  # of region and place
    expected = sum(p * np.log(p / (row.sum() * (1 / 16))) for row in joint for p in row)
    assert health(regions_of(shares)).information == pytest.approx(expected, rel=1e-4)


def test_two_regions_are_enough_where_two_were_asked_for():
    halves = torch.zeros(1, 2, 4, 4)
    halves[:, 0, :2], halves[:, 1, 2:] = 1, 1
    assert health(regions_of(halves)).alarm is None

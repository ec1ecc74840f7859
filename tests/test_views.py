"""Views of pre-training: what is turned comes back, tone changes, greys do not."""

import pytest
import torch

from slideflow_ray.train.views import Tone, Turn, toned, two_views


def test_every_turn_is_undone_pixel_for_pixel():
    planes = torch.arange(8 * 2 * 5 * 5, dtype=torch.float32).view(8, 2, 5, 5)
    turn = Turn(torch.tensor([False, True] * 4), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    turned = turn.apply(planes)
    assert torch.equal(turn.undo(turned), planes)
    assert len({tuple(one[0].flatten().sub(one[0].min()).tolist()) for one in turned}) == 8  # eight different ones
    assert torch.equal(turned[3, 0], torch.rot90(planes[3, 0].flip(-1), 1))


def test_views_repeat_and_differ():
    images = torch.rand(4, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    one, again, other = two_views(images, 5), two_views(images, 5), two_views(images, 6)
    assert torch.equal(one.shown[1], again.shown[1])
    assert not torch.equal(one.shown[0], other.shown[0])
    assert not torch.equal(one.shown[0], one.turn.undo(one.shown[1]))
    assert torch.equal(one.turn.undo(one.grey[1]), one.grey[0])
    assert torch.equal(one.grey[0], other.grey[0])  # no tone in them
    for shown in one.shown:
        assert shown.min() >= 0
        assert shown.max() <= 1


def test_tone_stays_within_its_bounds():
    ramp = torch.linspace(0.2, 0.8, 64).view(1, 1, 1, 64).expand(200, 1, 64, 64)
    made = toned(ramp, Tone(noise=0, blur=0, contrast=(1, 1)), torch.Generator().manual_seed(0))
    gamma = (made[:, 0, 0, 10].log() / ramp[0, 0, 0, 10].log()).sort().values
    assert gamma[0] == pytest.approx(0.7, abs=0.05)
    assert gamma[-1] == pytest.approx(1.4, abs=0.05)
    flat = toned(ramp, Tone(noise=0, blur=0, gamma=(1, 1)), torch.Generator().manual_seed(0))
    stretch = (flat[:, 0, 0].std(1) / ramp[0, 0, 0].std()).sort().values
    assert stretch[0] == pytest.approx(0.8, abs=0.03)
    assert stretch[-1] == pytest.approx(1.2, abs=0.03)

"""Scaling pixels: right, in the layout that convolutions like, and cheap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slideflow_ray.errors import ConfigError
from slideflow_ray.prepare import to_input

MEAN, STD = (0.1, 0.5, 0.9), (0.5, 0.25, 0.125)


def tiles(n: int = 3, height: int = 5, width: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def test_every_channel_has_its_own_scale_and_axes_stay_apart() -> None:
    pixels = tiles()
    x = to_input(pixels, MEAN, STD, dtype=torch.float32)
    assert x.shape == (3, 3, 5, 7)
    for c in range(3):
        np.testing.assert_allclose(x[:, c].numpy(), (pixels[..., c] / 255 - MEAN[c]) / STD[c], atol=2e-6)


def test_the_layout_is_channels_last_and_the_dtype_as_asked() -> None:
    x = to_input(tiles(), MEAN, STD, dtype=torch.bfloat16)
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x, to_input(tiles(), MEAN, STD, dtype=torch.float32).bfloat16(), atol=0, rtol=0)


def test_read_only_and_strided_tiles_give_the_same_without_a_warning() -> None:
    pixels = tiles()
    want = to_input(pixels, MEAN, STD, dtype=torch.float32)
    strided = np.repeat(pixels, 2, axis=2)[:, :, ::2]
    pixels.flags.writeable = False
    assert torch.equal(to_input(pixels, MEAN, STD, dtype=torch.float32), want)
    assert torch.equal(to_input(strided, MEAN, STD, dtype=torch.float32), want)


def test_the_tiles_are_not_changed() -> None:
    pixels = tiles()
    to_input(pixels, MEAN, STD, dtype=torch.float32).zero_()
    assert (pixels == tiles()).all()


@pytest.mark.parametrize("wrong", [tiles().astype(np.float32), tiles()[0], tiles()[..., :1]])
def test_other_shapes_and_dtypes_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"uint8 of shape \(n, T, T, 3\)"):
        to_input(wrong, MEAN, STD, dtype=torch.float32)

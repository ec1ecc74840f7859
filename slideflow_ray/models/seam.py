"""What a segmentation network's tiles may do at their seams: its stride, its radius, its measured seam error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slideflow_ray.errors import BundleError
from slideflow_ray.models.bundle import SeamError
from slideflow_ray.models.unet import Unet
from slideflow_ray.prepare import to_input

Pixels = npt.NDArray[np.uint8]


def total_stride(net: nn.Module) -> int:
    """Return by how much a segmentation network divides its input in all.

    Ours know it, and smp's encoders do; raises BundleError for another network.
    """
    if isinstance(net, Unet):
        return net.stride
    stride = getattr(getattr(net, "encoder", None), "output_stride", None)
    if not isinstance(stride, int):
        raise BundleError(f"{type(net).__name__} does not tell its stride.")
    return stride


def receptive_radius(net: nn.Module, limit: int = 1024) -> int | None:
    """Return how far from an output pixel an input pixel can matter, in px; None where it is more than `limit`.

    Ours compute it. Others are probed: a column (then a row) of NaN goes into an input of zeros, once for each
    position in the stride, and what comes out NaN depends on it, whatever the weights are. Global pooling,
    as in squeeze-and-excitation or attention, has no bound and gives None.
    """
    if isinstance(net, Unet):
        return net.radius
    was_training = net.training
    net.eval()
    try:
        for within in (limit // 8, limit // 4, limit // 2, limit):  # a small input tells of a small radius
            if (radius := _probe(net, within)) is not None:
                return radius
    finally:
        net.train(was_training)
    return None


def _probe(net: nn.Module, limit: int) -> int | None:
    stride, radius = total_stride(net), 0
    half = -(-limit // stride) * stride + stride
    for axis in (2, 3):
        for at in range(half, half + stride):
            radius = max(radius, _reach(net, half, at, stride, axis))
            if radius > limit:
                return None
    return radius


def _reach(net: nn.Module, half: int, at: int, stride: int, axis: int) -> int:
    """Return how far the outputs that depend on line `at` of `axis` (2 rows, 3 columns) are from it."""
    size = [1, 3, 2 * stride, 2 * stride]
    size[axis] = 2 * half
    x = torch.zeros(size, dtype=next(net.parameters()).dtype, device=next(net.parameters()).device)
    x.select(axis, at).fill_(torch.nan)
    with torch.inference_mode():
        hit = torch.isnan(net(x)).any(1)[0].any(3 - axis)  # over classes, then over the other axis
    found = torch.nonzero(hit).flatten()
    return int((found - at).abs().max()) if len(found) else 0


def measure_seam(
    net: nn.Module,
    tile_px: int,
    halo: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    pixels: Pixels | None = None,
) -> SeamError:
    """Compare masks made in tiles with those of one piece, in fp32 on the network's device.

    pixels : uint8, shape (H, W, 3), an image such as the network is for; None takes a generated one of 2 x 2
    cores, which tells less. It is laid out on white, `halo` wide, as at a slide's edge.
    returns : what goes on the card as `seam`; zeros where the halo covers the radius

    Raises BundleError when tile_px - 2 * halo is not a positive multiple of the stride, or halo no multiple.
    """
    stride, core = total_stride(net), tile_px - 2 * halo
    if core <= 0 or core % stride or halo % stride:
        raise BundleError(
            f"Tiles of {tile_px} px with a halo of {halo} do not fit a stride of {stride}.",
            next_step="Use a halo and a core (tile_px - 2 * halo) that are multiples of the stride.",
        )
    whole = _on_white(_blobs(2 * core) if pixels is None else pixels, core, halo)
    was_training = net.training
    net.eval()
    try:
        one = _probabilities(net, whole, mean, std)
        worst, other, count = 0.0, 0, 0
        for row, col in _cells(whole, core, halo):
            tile = _probabilities(net, whole[row : row + tile_px, col : col + tile_px], mean, std)
            inside = tile[:, halo : halo + core, halo : halo + core]
            piece = one[:, row + halo : row + halo + core, col + halo : col + halo + core]
            worst = max(worst, float((inside - piece).abs().max()))
            other += int((inside.argmax(0) != piece.argmax(0)).sum())
            count += core * core
    finally:
        net.train(was_training)
    return SeamError(halo=halo, max_probability_difference=min(worst, 1.0), argmax_share=other / count)


def _on_white(pixels: Pixels, core: int, halo: int) -> Pixels:
    """Return the image enlarged with white to whole cores, and `halo` more on each side."""
    height, width = (-(-side // core) * core + 2 * halo for side in pixels.shape[:2])
    whole = np.full((height, width, 3), 255, np.uint8)
    whole[halo : halo + pixels.shape[0], halo : halo + pixels.shape[1]] = pixels
    return whole


def _cells(whole: Pixels, core: int, halo: int) -> Iterator[tuple[int, int]]:
    for row in range(0, whole.shape[0] - 2 * halo, core):
        for col in range(0, whole.shape[1] - 2 * halo, core):
            yield row, col


def _blobs(side: int) -> Pixels:
    """Return a coloured cloud: random numbers on grids of 4 to 64 px, enlarged smoothly and added up."""
    generator = torch.Generator().manual_seed(0)
    cloud = torch.zeros(1, 3, side, side)
    for cell in (4, 16, 64):
        noise = torch.randn(1, 3, side // cell + 2, side // cell + 2, generator=generator)
        cloud += nn.functional.interpolate(noise, size=(side, side), mode="bicubic", align_corners=False)
    pixels: Pixels = (170 + 35 * cloud[0]).clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return pixels


def _probabilities(net: nn.Module, pixels: Pixels, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    device = next(net.parameters()).device
    with torch.inference_mode():
        logits: torch.Tensor = net(to_input(pixels[None], mean, std, dtype=torch.float32, device=device))
    return logits[0].softmax(0).cpu()

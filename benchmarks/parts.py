"""What the parts of a run cost beside the network: laying out, labelling, scaling pixels, finding objects.

Each figure is a share or a ratio within this run, so that a busy machine changes both sides::

    python benchmarks/parts.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import shapely
import torch
from torchvision.models import resnet18

from slideflow_ray.annotations import Region, labels_by_centre
from slideflow_ray.geometry import Level
from slideflow_ray.grid import make_grid
from slideflow_ray.objects import find_objects
from slideflow_ray.prepare import to_input
from slideflow_ray.specs import TileSpec
from slideflow_ray.tissue import TissueMask


def best(work: Callable[[], object], times: int = 5) -> float:
    """Seconds of the quickest of a few calls."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def main() -> None:
    """Print each part beside the forward pass of a ResNet-18 on 16 tiles of 224 px."""
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (16, 224, 224, 3), dtype=np.uint8)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    net = resnet18(weights=None).eval()
    x = to_input(tiles, mean, std, dtype=torch.float32)
    with torch.inference_mode():
        forward = best(lambda: net(x))
    scaling = best(lambda: to_input(tiles, mean, std, dtype=torch.bfloat16))
    print(f"scaling pixels: {scaling / forward:.3f} of a ResNet-18's forward pass (target 0.05)")

    size = (200_000, 100_000)
    levels = (Level(size, (1.0, 1.0)), Level((50_000, 25_000), (4.0, 4.0)))
    tissue = TissueMask(np.ones((3125, 6250), bool), (32.0, 32.0), "he")
    spec = TileSpec(tile_px=256, mpp=0.5)
    layout = best(lambda: make_grid(size, 0.25, levels, spec, tissue))
    count = len(make_grid(size, 0.25, levels, spec, tissue))
    print(f"laying out {count:,} tiles: {layout / (count * forward / 16):.5f} of their forward passes (target 0.001)")

    regions = tuple(
        Region(("a", "b")[i % 2], shapely.Point(rng.uniform(0, 1e5, 2)).buffer(rng.uniform(200, 5000), quad_segs=100))
        for i in range(1000)
    )
    xy = rng.integers(0, 100_000, (100_000, 2))
    labels = best(lambda: labels_by_centre(regions, xy, np.full_like(xy, 224), ("a", "b")), 2)
    share = labels / (len(xy) * forward / 16)
    print(f"labelling {len(xy):,} tiles by 1,000 polygons: {share:.5f} of their forward passes (target 0.005)")

    planes = [(rng.random((side, side)) < 0.45).astype(np.uint8) for side in (120, 240)]
    small, large = (best(lambda p=p: find_objects(p, 1, px0_per_px=(1.0, 1.0), fill_holes=True), 2) for p in planes)
    print(f"objects of four times the area: {large / small:.1f} times as long (target below 8)")


if __name__ == "__main__":
    main()

"""What stain normalisation costs: a slide's fit, and 256 tiles of 224 px against the forward of ResNet-18.

    python benchmarks/stain.py [--tiles 256]

One torch thread, as a scorer has on a CPU; the tiles are noise of two dyes, for the cost does not depend on them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from slideflow_ray.focus import SAMPLE, SAMPLE_PX
from slideflow_ray.models.bundle import BundleCard
from slideflow_ray.models.networks import build
from slideflow_ray.models.scorer import make_scorer
from slideflow_ray.prepare import restained
from slideflow_ray.profile import resolve
from slideflow_ray.specs import ComputeSpec
from slideflow_ray.stain import METHODS, RUIFROK, Stained, StainTarget, fit_tiles


def tiles(n: int, side: int) -> np.ndarray:
    """Tiles of two dyes, uint8 (n, side, side, 3)."""
    rng = np.random.default_rng(0)
    vectors = np.array(RUIFROK["he"])
    amounts = rng.gamma(0.7, 0.5, (n, side, side, 2)).astype(np.float32)
    return (255 * np.exp(-amounts @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)))).astype(np.uint8)


def best(call: Callable[[], object], times: int = 3) -> float:
    """Return the CPU seconds of the fastest of some calls: other work on the machine does not count."""
    took = []
    for _ in range(times):
        began = time.process_time()
        call()
        took.append(time.process_time() - began)
    return min(took)


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=256)
    n = parser.parse_args().tiles
    torch.set_num_threads(1)
    sample, pixels = list(tiles(SAMPLE, SAMPLE_PX)), tiles(n, 224)
    card = BundleCard(
        name="resnet18",
        task="classify",
        architecture="torchvision:resnet18",
        classes=("a", "b"),
        tile_px=224,
        mpp=0.5,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    net = build("torchvision:resnet18", {}, 2)
    for precision in ("fp32", "bf16"):
        scorer = make_scorer(card, net, resolve(ComputeSpec(precision=precision, device="cpu")))
        print(f"forward of {n} tiles, ResNet-18 {precision}: {best(lambda s=scorer: s.margins(pixels), 2):.2f} s")
    for method in METHODS:
        fit = fit_tiles(sample, method)
        target = StainTarget(method=method, stain="he", fit=fit)
        seconds = best(lambda m=method: fit_tiles(sample, m)), best(lambda f=fit, t=target: apply(pixels, f, t))
        print(f"{method}: fit of a slide {seconds[0]:.2f} s, application to {n} tiles {seconds[1]:.2f} s")


def apply(pixels: np.ndarray, fit, target: StainTarget) -> np.ndarray:
    """Return the tiles in the target's colours."""
    return restained(pixels, Stained("he", (fit,)), target)


if __name__ == "__main__":
    main()

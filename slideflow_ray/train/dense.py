"""What a segmentation's card and tiles need of its network: stride, radius, halo, and the measured seam."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slideflow_ray.errors import ConfigError
from slideflow_ray.models.bundle import BundleCard, SeamError
from slideflow_ray.models.networks import build
from slideflow_ray.models.seam import measure_seam, total_stride
from slideflow_ray.models.unet import Unet
from slideflow_ray.specs import digest
from slideflow_ray.train.spec import TrainJob


def settled(job: TrainJob) -> TrainJob:
    """Return the job with the halo of its tiles, which belongs to the grid; other tasks stay as they are.

    Without `tile.halo_px` the halo is the network's radius, rounded up to its stride, for masks without seams; of a
    network without a bound a quarter of the tile. Raises ConfigError where that leaves no core.
    """
    if job.task != "segment" or job.tile is None or job.tile.halo_px:
        return job
    stride, radius = reach(job)
    tile_px = job.tile.tile_px
    halo = -(-radius // stride) * stride if radius is not None else tile_px // 4 // stride * stride
    if tile_px - 2 * halo < stride:
        raise ConfigError(
            f"Tiles of {tile_px} px have no core within a halo of {halo} px, the reach of {job.fit.architecture}.",
            next_step=f"Use tile_px of at least {2 * halo + stride}, or a smaller tile.halo_px with measured seams.",
        )
    return job.model_copy(update={"tile": job.tile.model_copy(update={"halo_px": halo})})


def small_core(job: TrainJob) -> str | None:
    """Return what to say of a settled job whose tiles are mostly halo, None of others."""
    if job.task != "segment" or job.tile is None or 2 * job.tile.core_px >= job.tile.tile_px:
        return None
    tile_px, core, halo = job.tile.tile_px, job.tile.core_px, job.tile.halo_px
    times = round((tile_px / core) ** 2)
    return (
        f"Tiles of {tile_px} px have a core of {core} px within a halo of {halo} px, so each pixel is computed "
        f"{times} times. A tile_px of {4 * halo} or more costs less, or a smaller tile.halo_px, with measured seams."
    )


def reach(job: TrainJob) -> tuple[int, int | None]:
    """Return the network's total stride and its radius in px; None where no bound is known. Raises BundleError."""
    return _reach(job.fit.architecture, digest(job.fit.arguments), _Arguments(job.fit.arguments))


class _Arguments:
    """Arguments of a constructor, all equal to the cache, whose key has their digest."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Arguments)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=8)
def _reach(architecture: str, known_as: str, arguments: _Arguments) -> tuple[int, int | None]:
    with torch.device("meta"):  # sizes alone: no weight is drawn
        net = build(architecture, arguments.values, 2)
    return total_stride(net), net.radius if isinstance(net, Unet) else None


def tiles_said(job: TrainJob) -> dict[str, Any]:
    """Return what the card of a segmentation says of its tiles.

    Where the halo is smaller than the radius the seam is 1, the worst there can be, until it is measured.
    """
    stride, radius = reach(job)
    halo = job.tile.halo_px if job.tile else 0
    exact = radius is not None and halo >= radius
    seam = None if exact else SeamError(halo=halo, max_probability_difference=1.0, argmax_share=1.0)
    return {"stride": stride, "radius": radius, "halo": halo, "seam": seam}


def with_seam(card: BundleCard, state: Mapping[str, torch.Tensor], pixels: npt.NDArray[np.uint8]) -> BundleCard:
    """Return the card with its seam measured on an image, uint8 (H, W, 3); one that has none stays as it is."""
    if card.seam is None or card.halo is None:
        return card
    net = build(card.architecture, card.arguments, card.n_classes, card.channels)
    net.load_state_dict(dict(state))
    seam = measure_seam(net.eval(), card.tile_px, card.halo, mean=card.mean, std=card.std, pixels=pixels)
    return card.model_copy(update={"seam": seam})

"""A bundle made ready on this machine: tiles in, margins out, the same bytes each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slideflow_ray import profile as profiles
from slideflow_ray.errors import BundleError, NanScore, OutOfMemory
from slideflow_ray.models.bundle import BundleCard
from slideflow_ray.models.fuse import fold_batch_norms, with_precision
from slideflow_ray.models.networks import load_network
from slideflow_ray.prepare import scale, to_tensor
from slideflow_ray.profile import ComputeProfile

Pixels = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.float32]


def pin_threads(threads: int = 1) -> None:
    """Give the calling thread `threads` torch threads; each thread that scores needs it, for the number is its own."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def to_margins(logits: torch.Tensor, task: Literal["classify", "multilabel"]) -> torch.Tensor:
    """Return log p/(1-p) of each class against the rest, float32, shape (n, C).

    classify: z_c minus the logsumexp of the other logits, so the sigmoid of a margin is the softmax
    probability and the argmax is unchanged; multilabel: z_c. Computed in float64, rounded once.
    """
    if task == "multilabel":
        return logits.float()
    z = logits.double()
    others = z.unsqueeze(1).repeat(1, z.shape[1], 1)
    others.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return (z - others.logsumexp(2)).float()


@dataclass(frozen=True)
class Scorer:
    """A network with its card and profile. Safe to call from several threads at once."""

    card: BundleCard
    profile: ComputeProfile
    network: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype

    def margins(self, pixels: Pixels) -> Scores:
        """Return the margins of tiles; a tile's margins do not depend on its neighbours in `pixels`.

        pixels : uint8, shape (n, tile_px, tile_px, 3), read-only or not
        returns : float32, shape (n, n_classes)

        Raises BundleError when the tiles are of another size, NanScore when a margin is not finite,
        OutOfMemory when a micro-batch does not fit.
        """
        found = self._forward(pixels, lambda logits: to_margins(logits, self.card.task))
        _check_finite(found, self.card)
        return found

    def logits(self, pixels: Pixels) -> Scores:
        """Return the raw logits, float32, shape (n, n_classes): for temperature, never for histograms."""
        return self._forward(pixels, lambda logits: logits)

    def _forward(self, pixels: Pixels, finish: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
        self._check_size(pixels)
        if self.profile.device == "cpu":
            pin_threads(self.profile.threads)
        batch = self.profile.micro_batch
        with torch.inference_mode(), _memory(self):
            rows = [finish(self._micro_batch(pixels[i : i + batch])) for i in range(0, len(pixels), batch)]
            # one wait for the device, after every micro-batch is queued
            return torch.cat([*rows, torch.empty(0, self.card.n_classes, device=self.profile.device)]).cpu().numpy()

    def _micro_batch(self, pixels: Pixels) -> torch.Tensor:
        """Return the logits of at most `micro_batch` tiles: sums depend on the batch's shape, so it never changes."""
        n, batch = len(pixels), self.profile.micro_batch
        if n < batch:
            pixels = np.concatenate([pixels, np.zeros((batch - n, *pixels.shape[1:]), np.uint8)])
        tiles = to_tensor(pixels, self.profile.device)
        x = scale(tiles, self.card.mean, self.card.std, dtype=self.dtype)
        return self.network(x)[:n].float()

    def _check_size(self, pixels: Pixels) -> None:
        side = self.card.tile_px
        if pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3) or pixels.dtype != np.uint8:
            raise BundleError(
                f"{self.card.name} scores uint8 tiles of shape (n, {side}, {side}, 3), "
                f"got {pixels.dtype} of shape {pixels.shape}.",
                next_step="Read the tiles on the bundle's own grid (its tile_px and mpp).",
            )


def load_scorer(folder: str | Path, profile: ComputeProfile) -> Scorer:
    """Return the bundle ready to score under `profile`, warmed up with one micro-batch.

    Raises BundleError when the bundle is incomplete or does not fit its card, ProfileError when
    this machine cannot compute under the profile.
    """
    profiles.check(profile)
    card, net = load_network(folder)
    return make_scorer(card, net, profile)


def make_scorer(card: BundleCard, net: nn.Module, profile: ComputeProfile) -> Scorer:
    """Return a scorer of a network in memory; `net` itself is left as it is but for its evaluation mode."""
    if profile.device == "cpu":
        pin_threads(profile.threads)
    else:
        settle_gpu()
    dtype = torch.bfloat16 if (profile.precision, card.precision) == ("bf16", "auto") else torch.float32
    ready = with_precision(_folded(card, net), card.n_classes, dtype).to(profile.device)
    network: Callable[[torch.Tensor], torch.Tensor] = ready
    if profile.compiled:
        network = torch.compile(ready, dynamic=False)
    scorer = Scorer(card, profile, network, dtype)
    scorer.logits(np.zeros((1, card.tile_px, card.tile_px, 3), np.uint8))  # compiles, and fills oneDNN's caches
    return scorer


def _folded(card: BundleCard, net: nn.Module) -> nn.Module:
    """Return a folded copy; the probe is noise, and tells whether network and tile size go together."""
    side = card.tile_px
    probe = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        folded = fold_batch_norms(net, probe.to(memory_format=torch.channels_last))
        with torch.inference_mode():
            shape = tuple(folded(probe[:1]).shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise BundleError(f"{card.architecture} does not take tiles of {side} px: {error}.") from error
    if shape != (1, card.n_classes):
        raise BundleError(f"{card.architecture} gives an output of shape {shape}, not (1, {card.n_classes}).")
    return folded


def settle_gpu() -> None:
    """Make convolutions and products on the GPU repeatable, and fp32 mean fp32."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def _memory(scorer: Scorer) -> Iterator[None]:
    """Turn torch's ways of running out of memory, a RuntimeError on the CPU, into ours."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            size, side = scorer.profile.micro_batch, scorer.card.tile_px
            text = f"{scorer.card.name} with micro-batches of {size} tiles of {side} px: {error}".rstrip(". ") + "."
            raise OutOfMemory(text) from error
        raise


def _check_finite(margins: Scores, card: BundleCard) -> None:
    rows = np.flatnonzero(~np.isfinite(margins).all(axis=1))
    if len(rows):
        few = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise NanScore(
            f"{card.name} gave {len(rows)} of {len(margins)} tiles a margin that is not finite (rows {few})."
        )

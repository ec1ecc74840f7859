"""A bundle made ready on this machine: tiles in, margins, masks or features out, the same bytes each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slideflow_ray import profile as profiles
from slideflow_ray.errors import BundleError, NanScore, OutOfMemory, StainError
from slideflow_ray.models.bundle import NOT_SCORED, BundleCard, Task
from slideflow_ray.models.fuse import fold_batch_norms, with_precision
from slideflow_ray.models.networks import headless, load_network
from slideflow_ray.models.seam import total_stride
from slideflow_ray.models.unet import Unet
from slideflow_ray.prepare import restain, scale, to_tensor
from slideflow_ray.profile import ComputeProfile
from slideflow_ray.stain import Stained, target_of

Pixels = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.float32]
Masks = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float16]
Network = Callable[[torch.Tensor], torch.Tensor]
Colouring = Callable[[torch.Tensor, int], torch.Tensor]

MICRO_BATCH_SIDE = 256
"""A profile's micro-batch counts tiles of this side; activations of larger tiles for segmentation would not fit."""

SEGMENT_TILES = {"cpu": 8, "cuda": 256}
"""The most tiles of a segmentation at once.

With one thread torch gives fp32 1x1 convolutions of 16 tiles or more to oneDNN and fewer to its own
product, and the two round differently (1e-6): with 8, tiles have the bits of one piece.
"""


def pin_threads(threads: int = 1) -> None:
    """Give the calling thread `threads` torch threads; each thread that scores needs it, for the number is its own."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def tiles_per_pass(card: BundleCard, profile: ComputeProfile) -> int:
    """Return the tiles of one forward pass: the profile's, or fewer of a segmentation's larger tiles.

    A network that keeps the resolution keeps activations in proportion to the pixels, so their number is bounded.
    """
    if card.task != "segment":
        return profile.micro_batch
    fit = profile.micro_batch * MICRO_BATCH_SIDE**2 // card.tile_px**2
    return max(1, min(fit, profile.micro_batch, SEGMENT_TILES[profile.device]))


def to_margins(logits: torch.Tensor, task: Task) -> torch.Tensor:
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
    """A network with its card and profile. Safe to call from several threads at once.

    `encoder` is the network without its head, where the task has features.

    A bundle with stain targets needs to know how the tiles are stained (`stained`), and raises StainError where it is
    not told or has no target; to other bundles it means nothing.
    """

    card: BundleCard
    profile: ComputeProfile
    network: Network
    dtype: torch.dtype
    encoder: Network | None = None

    def margins(self, pixels: Pixels, stained: Stained | None = None) -> Scores:
        """Return the margins of tiles; a tile's margins do not depend on its neighbours in `pixels`.

        pixels : uint8, shape (n, tile_px, tile_px, 3), read-only or not
        returns : float32, shape (n, n_classes)

        Raises BundleError when the tiles are of another size or the task gives no margins, NanScore when a
        margin is not finite, OutOfMemory when a micro-batch does not fit.
        """
        if self.card.task not in ("classify", "multilabel"):
            raise self._gives_no("margins")
        found: Scores = self._forward(pixels, self.network, lambda logits: to_margins(logits, self.card.task), stained)
        self._check_finite(np.isfinite(found).all(axis=1), "margin")
        return found

    def masks(self, pixels: Pixels, stained: Stained | None = None) -> Masks:
        """Return the class of each pixel of the tiles' cores; a tile's mask does not depend on its neighbours.

        pixels : uint8, shape (n, tile_px, tile_px, 3), halo included
        returns : uint8, shape (n, core_px, core_px), the first class of the largest logit; never 255

        Raises as `margins`.
        """
        if self.card.task != "segment":
            raise self._gives_no("masks")
        found: Masks = self._forward(pixels, self.network, self._classes, stained)
        self._check_finite((found != NOT_SCORED).all(axis=(1, 2)), "logit")
        return found

    def _classes(self, logits: torch.Tensor) -> torch.Tensor:
        first, last = self.card.halo or 0, self.card.tile_px - (self.card.halo or 0)
        core = logits[:, :, first:last, first:last]
        classes = core.argmax(1).to(torch.uint8)
        return classes.masked_fill_(~core.isfinite().all(1), NOT_SCORED)

    def features(self, pixels: Pixels, stained: Stained | None = None) -> Features:
        """Return what the head is given for each tile, or an encoder's output.

        pixels : uint8, shape (n, tile_px, tile_px, 3)
        returns : float16, shape (n, D); D is `models.networks.feature_dim(card)`

        Raises as `margins`; NanScore too for a feature beyond float16 (65,504).
        """
        if self.encoder is None:
            raise self._gives_no("features")
        found: Features = self._forward(pixels, self.encoder, lambda rows: rows.to(torch.float16), stained)
        if found.ndim != 2:
            raise BundleError(
                f"{self.card.architecture} gives features of shape {found.shape[1:]} per tile, not a row."
            )
        self._check_finite(np.isfinite(found).all(axis=1), "feature")
        return found

    def logits(self, pixels: Pixels, stained: Stained | None = None) -> Scores:
        """Return what the network gives, float32, shape (n, n_classes) or (n, n_classes, tile_px, tile_px).

        For temperature and for looking at a network, never for histograms. Raises as `margins`.
        """
        found: Scores = self._forward(pixels, self.network, lambda logits: logits, stained)
        return found

    def _forward(
        self,
        pixels: Pixels,
        network: Network,
        finish: Callable[[torch.Tensor], torch.Tensor],
        stained: Stained | None,
    ) -> npt.NDArray[Any]:
        self._check_size(pixels)
        colour = self._colouring(stained, len(pixels))
        if self.profile.device == "cpu":
            pin_threads(self.profile.threads)
        batch, n = tiles_per_pass(self.card, self.profile), len(pixels)
        with torch.inference_mode(), _memory(self):
            # no tiles at all still pass once, for the shape of nothing
            starts = range(0, max(n, 1), batch)
            rows = [finish(self._micro_batch(network, pixels[i : i + batch], batch, colour, i)) for i in starts]
            # one wait for the device, after every micro-batch is queued
            return torch.cat(rows).cpu().numpy()

    def _colouring(self, stained: Stained | None, n: int) -> Colouring:
        """Return what brings the tiles from a row on into the target's colours."""
        if self.card.stain is None:
            return lambda tiles, start: tiles
        if stained is None:
            raise StainError(f"{self.card.name} scores normalised tiles, and was not told how these are stained.")
        target = target_of(self.card.stain, stained.stain, self.card.name)
        if len(stained.fits) not in (1, n):
            raise StainError(f"{n} tiles need one fit or {n}, got {len(stained.fits)}.")
        return lambda tiles, start: restain(tiles, stained.rows(start, start + len(tiles)), target)

    def _micro_batch(self, network: Network, pixels: Pixels, batch: int, colour: Colouring, start: int) -> torch.Tensor:
        """Return the outputs of at most `batch` tiles: sums depend on the batch's shape, so it never changes."""
        n = len(pixels)
        if n < batch:
            pixels = np.concatenate([pixels, np.zeros((batch - n, *pixels.shape[1:]), np.uint8)])
        tiles = to_tensor(pixels, self.profile.device)
        x = scale(colour(tiles, start), self.card.mean, self.card.std, dtype=self.dtype)
        return network(x)[:n].float()

    def _check_finite(self, finite: npt.NDArray[np.bool_], what: str) -> None:
        rows = np.flatnonzero(~finite)
        if len(rows):
            few = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
            name, n = self.card.name, len(finite)
            raise NanScore(f"{name} gave {len(rows)} of {n} tiles a {what} that is not finite (rows {few}).")

    def _gives_no(self, what: str) -> BundleError:
        return BundleError(
            f"{self.card.name} is of task {self.card.task!r}, which gives no {what}.",
            next_step="Ask for what the bundle's task gives, or use another bundle.",
        )

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
    _check_statement(card, net)
    ready = with_precision(_folded(card, net), card.n_classes, dtype).to(profile.device)
    compiled: Callable[[nn.Module], Network] = partial(torch.compile, dynamic=False) if profile.compiled else _as_it_is
    encoder = None if card.task == "segment" else compiled(headless(ready, card.n_classes))
    network = encoder if encoder is not None and card.task == "features" else compiled(ready)
    scorer = Scorer(card, profile, network, dtype, encoder)
    blank = np.zeros((1, card.tile_px, card.tile_px, 3), np.uint8)
    scorer.logits(blank, card.own_colours)  # compiles, and fills oneDNN's caches
    return scorer


def _as_it_is(net: nn.Module) -> Network:
    return net


def _check_statement(card: BundleCard, net: nn.Module) -> None:
    """Raise BundleError where a card says less than the network has: its tiles would have seams that nobody expects."""
    if card.task != "segment" or card.stride is None:
        return
    stride = total_stride(net)
    if card.stride % stride:
        raise BundleError(f"{card.name} says stride {card.stride}; {card.architecture} has a stride of {stride}.")
    if isinstance(net, Unet) and card.radius is not None and card.radius < net.radius:
        raise BundleError(f"{card.name} says radius {card.radius}; its network reaches {net.radius} px.")


def _folded(card: BundleCard, net: nn.Module) -> nn.Module:
    """Return a folded copy; the probe is noise, and tells whether network and tile size go together."""
    side = card.tile_px
    probe = torch.randn(1 if card.task == "segment" else 2, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        folded = fold_batch_norms(net, probe.to(memory_format=torch.channels_last))
        with torch.inference_mode():
            shape = tuple(folded(probe[:1]).shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise BundleError(f"{card.architecture} does not take tiles of {side} px: {error}.") from error
    wanted = (1, card.n_classes, side, side) if card.task == "segment" else (1, card.n_classes or shape[-1])
    if shape != wanted:
        raise BundleError(f"{card.architecture} gives an output of shape {shape}, not {wanted}.")
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
            size, side = tiles_per_pass(scorer.card, scorer.profile), scorer.card.tile_px
            text = f"{scorer.card.name} with micro-batches of {size} tiles of {side} px: {error}".rstrip(". ") + "."
            raise OutOfMemory(text) from error
        raise

"""Who trains together: one process alone, or several that average their gradients (torch.distributed)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from slideflow_ray.errors import ConfigError
from slideflow_ray.pipeline import Pixels
from slideflow_ray.train.spec import TrainSpec
from slideflow_ray.train.tiles import Labels, Prepared, SharedSource, TileSource


@dataclass(eq=False)
class Crew:
    """One of `size` workers, the `rank`th; `loaders` processes read and augment for it (0: it does so itself).

    With one worker all of this is nothing. With several, a process group must be there already, as Ray Train
    makes one. The batch of a step is shared out evenly; each worker reads chunks of its own.
    """

    rank: int = 0
    size: int = 1
    loaders: int = 0
    _loader: Any = None

    def share_of(self, batch_size: int) -> int:
        """Return this worker's part of a batch. Raises ConfigError when it cannot be shared out evenly, two each."""
        if batch_size % self.size or batch_size < 2 * self.size:
            raise ConfigError(
                f"A batch of {batch_size} cannot be shared out evenly by {self.size} workers with two tiles each.",
                next_step=f"Use a batch_size that is a multiple of {self.size} and at least {2 * self.size}.",
            )
        return batch_size // self.size

    def stream(self, what: str) -> str:
        """Return a name for random draws that differs between workers."""
        return f"{what} of {self.rank}" if self.rank else what

    def mine(self, source: TileSource, *, even: bool = False) -> TileSource:
        """Return this worker's share of a source."""
        if self.size == 1:
            return source
        if not isinstance(source, SharedSource):
            raise ConfigError(f"{type(source).__name__} cannot be shared by {self.size} workers.")
        return source.share(self.rank, self.size, even=even)

    def batches(self, source: TileSource, spec: TrainSpec, epoch: int) -> Iterator[tuple[Pixels, Labels]]:
        """Yield this worker's augmented batches of an epoch; every worker gets as many."""
        size = self.share_of(spec.batch_size)
        if not self.loaders:
            return Prepared(self.mine(source, even=True), spec, self.rank).batches(epoch, size)
        if self._loader is None or self._loader[0] is not source:
            stream = _Stream(self.mine(source, even=True), spec, size, epoch, self.rank * self.loaders)
            loader = DataLoader(
                stream,
                batch_size=None,
                num_workers=self.loaders,
                multiprocessing_context="spawn",
                persistent_workers=True,
                prefetch_factor=2,
                in_order=True,
            )
            self._loader = (source, loader)
        return iter(self._loader[1])

    def wrap(self, net: nn.Module) -> nn.Module:
        """Return the network with gradients averaged over the workers, all of which then have rank 0's weights."""
        if self.size == 1 or not any(p.requires_grad for p in net.parameters()):
            return net
        return DistributedDataParallel(net)

    def total(self, sums: npt.NDArray[np.float64]) -> tuple[float, ...]:
        """Return sums over all workers, added in the order of their ranks."""
        return tuple(float(x) for x in np.sum(self.gather(sums), axis=0))

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's value, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def agree(self, net: nn.Module) -> None:
        """Give all workers rank 0's buffers: batch norm statistics are of each worker's own tiles."""
        if self.size > 1:
            for buffer in net.buffers():
                distributed.broadcast(buffer, src=0)


ALONE = Crew()


class _Stream(IterableDataset[tuple[Pixels, Labels]]):
    """What a loader process does: read, mix and augment its share of an epoch; each pass is the next epoch."""

    def __init__(self, source: TileSource, spec: TrainSpec, batch_size: int, epoch: int, first: int) -> None:
        if not isinstance(source, SharedSource):
            raise ConfigError(f"{type(source).__name__} cannot be shared by loader processes.")
        self.source, self.spec, self.batch_size, self.epoch, self.first = source, spec, batch_size, epoch, first

    def __iter__(self) -> Iterator[tuple[Pixels, Labels]]:
        torch.set_num_threads(1)
        info = get_worker_info()
        if info is None:
            raise RuntimeError("a stream is read by loader processes only")
        share = self.source.share(info.id, info.num_workers, even=True)
        epoch, self.epoch = self.epoch, self.epoch + 1
        return Prepared(share, self.spec, self.first + info.id).batches(epoch, self.batch_size)

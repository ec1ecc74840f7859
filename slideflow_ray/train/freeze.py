"""Freezing a network's first blocks, and drop-out before its head; the names of the weights stay as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from slideflow_ray.models.networks import find_head
from slideflow_ray.models.seresnet import SeResNet

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks(net: nn.Module, n_classes: int) -> list[list[nn.Module]]:
    """Return the network's blocks from input to output without its head, each as the modules that make it up.

    A block is a module of its own kind (a bottleneck, an Inception module, a transformer layer), or of plain layers
    (the stem, all of VGG) a convolution or linear layer with the norms behind it. ResNet-50 has 17: its stem and
    16 bottlenecks. A network of ours that knows its blocks is asked for them.
    """
    if isinstance(net, SeResNet):
        return net.parts()
    head = find_head(net, n_classes)[1] if n_classes else None
    found: list[list[nn.Module]] = []
    plain: list[nn.Module] = []
    for module in _walk(net, 0):
        if module is head or not _weighs(module):
            continue
        if not _is_layer(module) or (_mixes(module) and any(map(_mixes, plain))):
            found += [plain] if plain else []
            plain = []
        if _is_layer(module):
            plain.append(module)
        else:
            found.append([module])
    return found + ([plain] if plain else [])


def _walk(module: nn.Module, depth: int) -> Iterator[nn.Module]:
    """Yield what a network is made of: lists are opened, and up to the second level what holds lists of blocks."""
    if _is_list_of_blocks(module) or (
        not isinstance(module, _LISTS) and depth < 2 and (not depth or _holds_blocks(module))
    ):
        for child in module.children():
            yield from _walk(child, depth + 1)
    else:
        yield module


def _is_list_of_blocks(module: nn.Module) -> bool:
    if not isinstance(module, _LISTS):
        return False
    children = list(module.children())
    return any(not _is_layer(child) for child in children) or sum(map(_mixes, children)) > 1


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear)


def _holds_blocks(module: nn.Module) -> bool:
    return any(_is_list_of_blocks(child) for child in module.children())


def _is_layer(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _weighs(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def freeze(net: nn.Module, n_classes: int, percent: float) -> int:
    """Freeze the first ceil(n * percent / 100) of n blocks, free the others, and return how many are frozen.

    Frozen weights take no gradient, and frozen batch norms use and keep their statistics (call this after
    `net.train()`, which would set them learning again). The head is never frozen. What belongs to no module
    but the network itself (a class token, positions) is frozen with the first block.
    """
    parts = blocks(net, n_classes)
    n = min(len(parts), math.ceil(round(len(parts) * percent / 100, 9)))
    for parameter in net.parameters(recurse=False):
        parameter.requires_grad_(n == 0)
    for i, part in enumerate(parts):
        for module in part:
            module.requires_grad_(i >= n)
            if i < n:
                module.eval()
    return n


def drop_before_head(net: nn.Module, n_classes: int, share: float) -> None:
    """Drop `share` of what the head is given while training; the names of the weights stay as they are."""
    if share:
        head = find_head(net, n_classes)[1]
        head.register_forward_pre_hook(
            lambda module, inputs: (F.dropout(inputs[0], share, module.training), *inputs[1:])
        )


def trainable(net: nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that take a gradient."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]

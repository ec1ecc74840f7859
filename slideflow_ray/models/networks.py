"""Architectures by name: ours, torchvision's, timm's and smp's. Nothing here downloads or unpickles weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from slideflow_ray.errors import BundleError
from slideflow_ray.models.bundle import OURS, OURS_TO_SET, BundleCard, load_weights, read_card
from slideflow_ray.models.seresnet import SeResNet
from slideflow_ray.models.skip import make_skip_svm, make_two_models
from slideflow_ray.models.unet import Unet


class SmallCnn(nn.Module):
    """A fast network for tiles of 64 to 256 px: a strided stem, five 3x3 blocks, a mean over the tile, one head.

    `width` channels leave the stem, four times as many reach the head (0.28 million parameters at 32).
    The stem divides the side by four before any width is spent, which is where the speed comes from.
    """

    def __init__(self, n_classes: int, channels: int = 3, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(channels, width, kernel=7, stride=4),
            _block(width, 2 * width, stride=2),
            _block(2 * width, 2 * width),
            _block(2 * width, 4 * width, stride=2),
            _block(4 * width, 4 * width),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * width, n_classes) if n_classes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (n, n_classes) for input of shape (n, channels, T, T); features for no classes."""
        return cast(torch.Tensor, self.head(self.dropout(self.features(x).mean((2, 3)))))


AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
"""Heads that only served the training of Inception networks."""


def _block(inside: int, outside: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


def build(architecture: str, arguments: Mapping[str, Any], n_classes: int, channels: int = 3) -> nn.Module:
    """Return the network with random weights and a head of `n_classes` (none for 0), in training mode.

    Raises BundleError for an unknown architecture (naming its neighbours) and for arguments that
    its constructor refuses.
    """
    if bad := sorted(set(arguments) & OURS_TO_SET):
        raise BundleError(f"{architecture}: {', '.join(bad)} cannot be given as arguments.")
    make = _maker(architecture, n_classes, channels)
    try:
        return make(**arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "none"
        raise BundleError(f"{architecture} refuses its arguments ({given}): {error}.") from error


def _maker(architecture: str, n_classes: int, channels: int) -> Callable[..., nn.Module]:
    library, _, name = architecture.partition(":")
    if architecture == "small-cnn":
        return lambda **more: SmallCnn(n_classes, channels, **more)
    if architecture == "se-resnet":
        return lambda **more: SeResNet(n_classes, channels, **more)
    if architecture == "unet":
        return lambda **more: Unet(n_classes, channels, **more)
    if architecture == "skip-svm":
        return lambda **more: make_skip_svm(build, n_classes, **more)
    if architecture == "two-models":
        return lambda **more: make_two_models(build, headless, n_classes, **more)
    if library == "torchvision" and name:
        return _torchvision(name, n_classes, channels)
    if library == "timm" and name:
        return _timm(name, n_classes, channels)
    if library == "smp" and name:
        return _smp(name, n_classes, channels)
    raise _unknown(architecture, [*OURS, "torchvision:NAME", "timm:NAME", "smp:NAME"])


def _torchvision(name: str, n_classes: int, channels: int) -> Callable[..., nn.Module]:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise _unknown(f"torchvision:{name}", [f"torchvision:{known}" for known in names])
    if channels != 3:
        raise BundleError(f"torchvision:{name} takes 3 channels, not {channels}; timm's architectures take any.")
    # Inception's own initialisation draws truncated normals for a minute; its auxiliary head only serves training.
    defaults = {"aux_logits": False, "init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return lambda **more: models.get_model(name, weights=None, num_classes=n_classes, **{**defaults, **more})


def _timm(name: str, n_classes: int, channels: int) -> Callable[..., nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm warns of its own old import paths
        import timm

    # Only names that timm itself knows: `hf-hub:` and `local-dir:` would fetch or unpickle.
    if not timm.is_model(name.partition(".")[0]) or ":" in name or "/" in name:
        raise _unknown(f"timm:{name}", [f"timm:{known}" for known in timm.list_models()])
    return lambda **more: timm.create_model(name, pretrained=False, num_classes=n_classes, in_chans=channels, **more)


def _smp(name: str, n_classes: int, channels: int) -> Callable[..., nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports timm, see above
        import segmentation_models_pytorch as smp

    known = {kind.__name__: kind for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if name not in known:
        raise _unknown(f"smp:{name}", [f"smp:{one}" for one in known])

    def make(**more: Any) -> nn.Module:
        encoder = more.get("encoder_name", "")
        if not isinstance(encoder, str) or ":" in encoder or "/" in encoder:
            raise ValueError(f"encoder_name {encoder!r} would be fetched")
        net: nn.Module = known[name](encoder_weights=None, in_channels=channels, classes=n_classes, **more)
        return net

    return make


def _unknown(architecture: str, known: Iterable[str]) -> BundleError:
    near = get_close_matches(architecture, list(known), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return BundleError(f"Unknown architecture {architecture!r}.{hint}", next_step="Correct the card's architecture.")


def describe(architecture: str, arguments: Mapping[str, Any] | None = None, n_classes: int = 2) -> str:
    """Return one line about an architecture: its parameters and its head.

    >>> describe("small-cnn")
    'small-cnn: 282,274 parameters, head head (128 features to 2 classes)'
    """
    net = build(architecture, arguments or {}, n_classes)
    parameters = sum(p.numel() for p in net.parameters())
    name, head = find_head(net, n_classes)
    inside = head.in_features if isinstance(head, nn.Linear) else cast(nn.Conv2d, head).in_channels
    return f"{architecture}: {parameters:,} parameters, head {name} ({inside} features to {n_classes} classes)"


def find_head(net: nn.Module, n_classes: int) -> tuple[str, nn.Module]:
    """Return the classifier's dotted name and module: the last Linear (or 1x1 Conv2d) that gives `n_classes`.

    Constructors register the classifier last and auxiliary ones before it, in torchvision, timm and smp
    alike; smp's segmentation head is the one that may be a larger convolution.
    Raises BundleError when there is none.
    """
    within = next((name for name, _ in net.named_children() if name == "segmentation_head"), "")
    heads = [(name, module) for name, module in net.named_modules() if _gives(module, n_classes, within, name)]
    if not heads:
        raise BundleError(f"{type(net).__name__} has no linear layer with {n_classes} outputs.")
    return heads[-1]


def _gives(module: nn.Module, n_classes: int, within: str, name: str) -> bool:
    if within and not name.startswith(f"{within}."):
        return False
    if isinstance(module, nn.Linear):
        return module.out_features == n_classes
    pointwise = isinstance(module, nn.Conv2d) and (bool(within) or module.kernel_size == (1, 1))
    return pointwise and cast(nn.Conv2d, module).out_channels == n_classes


def headless(net: nn.Module, n_classes: int) -> nn.Module:
    """Return a network that gives what `net`'s head is given; both share their weights in memory.

    Without classes that is `net` itself. Raises BundleError when there is no head.
    """
    if n_classes == 0:
        return net
    name, head = find_head(net, n_classes)
    if head is net:
        return nn.Identity()
    shared = {id(tensor): tensor for tensor in [*net.parameters(), *net.buffers()]}
    copied = copy.deepcopy(net, shared)
    replace(copied, name, nn.Identity())
    return copied


def replace(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the dotted `name` stands in `net`."""
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, module)


def feature_dim(card: BundleCard) -> int:
    """Return D, the features that a bundle of this card gives per tile; builds the network, without its weights.

    Raises BundleError for a segmentation, and for a network whose head is not given one row per tile.
    """
    if card.task == "segment":
        raise BundleError(f"{card.name} is a segmentation, which gives masks, not features.")
    net = headless(build(card.architecture, card.arguments, card.n_classes, card.channels).eval(), card.n_classes)
    with torch.inference_mode():
        shape: tuple[int, ...] = tuple(net(torch.zeros(1, card.channels, card.tile_px, card.tile_px)).shape)
    if len(shape) != 2:
        raise BundleError(f"{card.architecture} gives features of shape {shape}, not one row per tile.")
    return shape[1]


def load_network(folder: str | Path) -> tuple[BundleCard, nn.Module]:
    """Return a bundle's card and its network with weights, in fp32 on the CPU, in evaluation mode.

    Raises BundleError when something is missing, unknown, or does not fit.
    """
    card = read_card(folder)
    net = build(card.architecture, card.arguments, card.n_classes, card.channels)
    fit_weights(net, load_weights(folder), card, str(folder))
    return card, net.eval()


def fit_weights(net: nn.Module, state: Mapping[str, torch.Tensor], card: BundleCard, where: str) -> None:
    """Load `state` into `net`, or raise BundleError listing a few keys that miss, are too many, or differ in shape."""
    own = net.state_dict()
    _check_head(net, state, card, where)
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    faults = [_few("missing", missing), _few("unexpected", unexpected), _few("of another shape", shapes)]
    if any(faults):
        raise BundleError(
            f"The weights of {where} do not fit {card.architecture}: {'; '.join(filter(None, faults))}.",
            next_step="Correct architecture and arguments in bundle.json, or take the weights they belong to.",
        )
    net.load_state_dict(dict(state))


def _check_head(net: nn.Module, state: Mapping[str, torch.Tensor], card: BundleCard, where: str) -> None:
    if card.n_classes == 0:
        return
    name, _ = find_head(net, card.n_classes)
    weight = state.get(f"{name}.weight")
    if weight is not None and len(weight) != card.n_classes:
        raise BundleError(
            f"{where} names {card.n_classes} classes ({', '.join(card.classes)}), and its head gives {len(weight)}.",
            next_step="Name in bundle.json as many classes as the network was trained with, in its order.",
        )


def _few(what: str, keys: list[str], n: int = 3) -> str:
    more = f" and {len(keys) - n} more" if len(keys) > n else ""
    return f"{len(keys)} {what} ({', '.join(keys[:n])}{more})" if keys else ""

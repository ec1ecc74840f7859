"""Slide classifiers on stored features of tiles: gated attention, mean and max pooling; and their bundle.

A bundle of this kind is a folder of its own: mil.json (the card), weights.safetensors, training.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import torch
from pydantic import ConfigDict, Field
from torch import nn

from slideflow_ray.errors import BundleError, ConfigError
from slideflow_ray.models.bundle import WEIGHTS, load_weights
from slideflow_ray.specs import Spec
from slideflow_ray.texts import read_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

CARD = "mil.json"
Pooling = Literal["attention", "mean", "max"]


class MilCard(Spec):
    """What a slide classifier says of itself.

    encoder : the name of the bundle whose features it reads; node : that bundle's node in a store, which carries the
    digests of its weights and of the compute profile; features : D. hidden : the attention's inner size, or the
    layer behind the mean or maximum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=100_000)]
    pooling: Pooling
    encoder: str
    node: str
    features: Annotated[int, Field(ge=1)]
    hidden: Annotated[int, Field(ge=1)] = 128
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def to_json(self) -> str:
        """Return the text of mil.json."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False) + "\n"


class Mil(nn.Module):
    """A bag of features to logits and attention.

    attention : a_i = softmax_i(w (tanh(V h_i) * sigmoid(U h_i))), z = sum a_i h_i, logits = W z
        (Ilse, Tomczak and Welling, ICML 2018, arXiv 1802.04712, equations 8 and 9)
    mean, max : a layer with ReLU behind the mean, or the maximum over tiles, of the features; all tiles weigh alike
    """

    def __init__(self, card: MilCard) -> None:
        super().__init__()
        d, k = card.features, len(card.classes)
        self.pooling = card.pooling
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("std", torch.ones(d))
        self.dropout = nn.Dropout(card.dropout)
        if card.pooling == "attention":
            self.v, self.u = nn.Linear(d, card.hidden), nn.Linear(d, card.hidden)
            self.w = nn.Linear(card.hidden, 1)
            self.head: nn.Module = nn.Linear(d, k)
        else:
            self.head = nn.Sequential(nn.Linear(d, card.hidden), nn.ReLU(), nn.Linear(card.hidden, k))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (K,) and attention (n,), which adds up to 1, of features, float (n, D) with n at least 1."""
        h = (features.float() - cast(torch.Tensor, self.mean)) / cast(torch.Tensor, self.std)
        n = len(h)
        if self.pooling == "attention":
            inner = torch.tanh(self.v(h)) * torch.sigmoid(self.u(h))
            attention = torch.softmax(self.w(self.dropout(inner))[:, 0], dim=0)
            pooled = attention @ h
        else:
            attention = torch.full((n,), 1 / n)
            pooled = h.mean(0) if self.pooling == "mean" else h.max(0).values
        return self.head(self.dropout(pooled)), attention


def read_mil_card(folder: str | Path) -> MilCard:
    """Read a slide classifier's card. Raises BundleError where there is none, or it is damaged or unknown."""
    path = Path(folder) / CARD
    try:
        return MilCard.parse(json.loads(read_bytes(path)), str(path))
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder} is no slide classifier: it has no {CARD}.",
            next_step="Train one: slideflow-ray mil train OUT --classes normal,tumor --out BUNDLE",
        ) from error
    except ConfigError as error:
        raise BundleError(error.message, next_step=f"Correct {CARD}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable JSON: {error}.") from error


def load_mil(folder: str | Path) -> tuple[MilCard, Mil]:
    """Return a slide classifier's card and network, in evaluation mode. Raises BundleError."""
    card = read_mil_card(folder)
    net = Mil(card)
    try:
        net.load_state_dict(load_weights(folder))
    except RuntimeError as error:
        raise BundleError(
            f"The weights of {folder} do not fit its {CARD}: {str(error).splitlines()[-1].strip()}"
        ) from error
    return card, net.eval()


def mil_files(card: MilCard, state: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """Return the card and the weights as the files of a bundle."""
    from safetensors.torch import save

    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in sorted(state.items())}
    return {CARD: card.to_json().encode(), WEIGHTS: save(tensors)}

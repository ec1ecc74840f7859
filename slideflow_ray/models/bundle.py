"""A bundle is a folder: bundle.json (the card) and weights.safetensors. Cards are read without torch.

Nothing here unpickles: weights are safetensors or they are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from slideflow_ray.errors import BundleError, ConfigError
from slideflow_ray.remote import at_hand
from slideflow_ray.specs import Fraction, Positive, Spec, digest
from slideflow_ray.stain import VERSION, Stained, StainTarget
from slideflow_ray.texts import read_bytes

if TYPE_CHECKING:
    import torch

SCHEMA = 1
CARD = "bundle.json"
WEIGHTS = "weights.safetensors"
OURS = ("small-cnn", "se-resnet", "unet", "skip-svm", "two-models")
"""Architectures of our own, by the name that a card gives them."""

Task = Literal["classify", "multilabel", "segment", "features"]
"""What a bundle gives. "features" is an encoder without classes; classify and multilabel give features too."""

NOT_SCORED = 255
"""The value of a mask where no model has looked; classes are 0 to 254."""

OURS_TO_SET = frozenset(
    [
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "scriptable",
        "exportable",
        "no_jit",
        "weights",
        "weights_backbone",
        "progress",
        "num_classes",
        "in_chans",
        "n_classes",
        "channels",
        "encoder_weights",
        "in_channels",
        "classes",
        "activation",
        "aux_params",
    ]
)
"""Arguments that a card may not give: they would download or unpickle, or they follow from the card."""

CLASSES = {"classify": (2, 100_000), "multilabel": (1, 100_000), "segment": (2, NOT_SCORED), "features": (0, 0)}
"""The fewest and most classes of each task."""

MAX_HEADER_BYTES = 2**22
"""Of weights.safetensors: about 100 bytes a tensor, and the largest encoders have a few thousand."""

Channel = Annotated[float, Field(allow_inf_nan=False)]


class SeamError(Spec):
    """How far masks computed in tiles are from those of one piece; a measurement, no exception.

    halo : px on each side of the tiles that were compared; max_probability_difference : of any class at
    any pixel; argmax_share : pixels whose class differs, 0..1. Made by `models.seam.measure_seam`.
    """

    halo: Annotated[int, Field(ge=0)]
    max_probability_difference: Fraction
    argmax_share: Fraction


class BundleCard(Spec):
    """What a bundle says of itself. The bundle owns tile size and scale, so nobody types them twice.

    `mpp` is the tiles' um per pixel. A bundle of whole images (crops, micrographs, slices) has `whole`
    instead: the image becomes tile_px x tile_px by squashing it, or by padding it to a square with white.
    `mean` and `std` are those of red, green and blue scaled to 0..1, as training used them.
    `precision` "auto" follows the compute profile; "fp32" is for a network that bf16 harms.
    `arguments` go to the architecture's constructor.
    `stain` has a target for each stain ("he", "pas", as the cohort's column `stain` or `modality` says): tiles come
    to the network in its colours, and a slide of another stain is refused. None leaves colours as they are.

    For task "segment", in px of the tile: `stride`, by which the network divides its input in all (its grid
    of pixels repeats so often); `radius`, how far from an output pixel an input pixel can matter (None
    where there is no bound); `halo`, what a tile carries on each side beside its core. Tiles whose
    origins are multiples of the stride and whose halo is at least the radius give the masks of one
    piece; for others the measured `seam` must be stated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    task: Task
    architecture: str
    arguments: dict[str, JsonValue] = Field(default={})
    classes: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()
    tile_px: Annotated[int, Field(ge=8, le=4096)]
    mpp: Annotated[float, Field(gt=0, le=1000)] | None = None
    whole: Literal["squash", "pad"] | None = None
    stride: Annotated[int, Field(ge=1)] | None = None
    radius: Annotated[int, Field(ge=0)] | None = None
    halo: Annotated[int, Field(ge=0)] | None = None
    seam: SeamError | None = None
    channels: Literal[3] = 3
    mean: tuple[Channel, Channel, Channel]
    std: tuple[Positive, Positive, Positive]
    stain: dict[str, StainTarget] | None = None
    precision: Literal["auto", "fp32"] = "auto"
    licence: Annotated[str, Field(max_length=10_000)] = "unknown"
    description: Annotated[str, Field(max_length=100_000)] = ""

    @field_validator("architecture")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        library, _, name = value.partition(":")
        if value in OURS or (library in ("torchvision", "timm", "smp") and re.fullmatch(r"[\w.+-]{1,200}", name)):
            return value
        near = get_close_matches(value, OURS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = f"Use {', '.join(OURS)}, torchvision:NAME, timm:NAME or smp:NAME"
        raise ValueError(f"unknown architecture {value!r}{hint} {known}")

    @field_validator("classes")
    @classmethod
    def _printable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if bad := [name for name in value if not name.isprintable()]:
            raise ValueError(f"the class {bad[0]!r} is not printable")
        return value

    @field_validator("arguments")
    @classmethod
    def _harmless(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if bad := sorted(set(value) & OURS_TO_SET):
            raise ValueError(f"{', '.join(bad)} cannot be given: weights and sizes come from the bundle itself")
        return value

    @field_validator("stain")
    @classmethod
    def _targets_of_their_stains(cls, value: dict[str, StainTarget] | None) -> dict[str, StainTarget] | None:
        if value is not None and not value:
            raise ValueError("no target for any stain; leave `stain` out, or give one")
        if wrong := [name for name, target in (value or {}).items() if target.stain != name]:
            raise ValueError(f"the target of {wrong[0]!r} is for {(value or {})[wrong[0]].stain!r}")
        return value

    @model_validator(mode="after")
    def _has_a_scale(self) -> BundleCard:
        if self.mpp is None and self.whole is None:
            raise ValueError("give mpp (um per pixel of the tiles), or whole for images that are scored in one piece")
        return self

    @model_validator(mode="after")
    def _classes_fit_the_task(self) -> BundleCard:
        least, most = CLASSES[self.task]
        if not least <= len(self.classes) <= most:
            bound = f"at least {least}" if len(self.classes) < least else f"at most {most}"
            raise ValueError(f"task {self.task!r} needs {bound} classes, got {len(self.classes)}")
        if len(set(self.classes)) < len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise ValueError(f"classes stand twice: {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _architecture_fits_the_task(self) -> BundleCard:
        dense = self.architecture == "unet" or self.architecture.startswith("smp:")
        if dense != (self.task == "segment"):
            gives = "a class per pixel" if dense else "one row per tile"
            raise ValueError(f"{self.architecture} gives {gives}, which is not task {self.task!r}")
        if self.task == "features" and self.architecture.startswith("torchvision:"):
            raise ValueError('torchvision has no encoders without classes; use timm:NAME, or task "classify"')
        return self

    @model_validator(mode="after")
    def _tiles_fit_the_network(self) -> BundleCard:
        said = {name for name in ("stride", "radius", "halo", "seam") if getattr(self, name) is not None}
        if self.task != "segment":
            if said:
                raise ValueError(f"{', '.join(sorted(said))} belong to task 'segment', not {self.task!r}")
            return self
        if self.stride is None or self.halo is None:
            raise ValueError("task 'segment' needs stride and halo (and radius, where the network has one)")
        _check_core(self.tile_px, self.halo, self.stride)
        _check_seam(self.halo, self.radius, self.seam)
        return self

    @model_serializer(mode="wrap")
    def _without_no_stain(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `stain` out where there is none: digests of cards are what they were before there was the key."""
        values: dict[str, Any] = plain(self)
        return values if self.stain else {key: value for key, value in values.items() if key != "stain"}

    @property
    def n_classes(self) -> int:
        """The columns of a row of margins, or the classes of a pixel; 0 for an encoder."""
        return len(self.classes)

    @property
    def core_px(self) -> int:
        """The side of what a tile's mask keeps: the tile without its halo."""
        return self.tile_px - 2 * (self.halo or 0)

    @property
    def own_colours(self) -> Stained | None:
        """How tiles are stained that have a target's colours already; None without targets."""
        return next((Stained(name, (target.fit,)) for name, target in (self.stain or {}).items()), None)

    def to_json(self) -> str:
        """Return the text of bundle.json."""
        values = self.model_dump(mode="json", by_alias=True)
        said = {key: value for key, value in values.items() if value is not None}
        if self.stain:
            said["stain"] = {
                name: target.model_dump(mode="json", exclude_none=True) for name, target in self.stain.items()
            }
        return json.dumps(said, indent=2, ensure_ascii=False) + "\n"


def _check_core(tile_px: int, halo: int, stride: int) -> None:
    if halo % stride:
        raise ValueError(f"halo {halo} is no multiple of stride {stride}; nearest: {_nearest(halo, stride)}")
    core = tile_px - 2 * halo
    if core <= 0:
        raise ValueError(f"tile_px {tile_px} with a halo of {halo} on each side leaves no core")
    if core % stride:
        near = _nearest(core, stride, 2 * halo)
        raise ValueError(f"the core of {core} px is no multiple of stride {stride}; nearest tile_px: {near}")


def _nearest(value: int, stride: int, more: int = 0) -> str:
    below = value // stride * stride
    return " or ".join(str(n + more) for n in (below, below + stride) if n + more > 0)


def _check_seam(halo: int, radius: int | None, seam: SeamError | None) -> None:
    if seam is not None and seam.halo != halo:
        raise ValueError(f"the seam was measured with a halo of {seam.halo}, the card says {halo}; measure it again")
    if seam is None and (radius is None or halo < radius):
        against = "no known radius" if radius is None else f"a radius of {radius}"
        raise ValueError(
            f"a halo of {halo} against {against} leaves seams: state `seam`, as models.seam.measure_seam "
            "measures it, or use a halo of at least the radius"
        )


def read_card(folder: str | Path) -> BundleCard:
    """Read and check a bundle's card, without torch and without the weights.

    Raises BundleError when the folder or card is missing, is not JSON, is of another
    schema, or has an unknown or bad key.
    """
    path = at_hand(str(folder)) / CARD
    return _parse_card(_read_json(path), path)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise BundleError(f"There is no bundle folder {path.parent}.")
    try:
        values = json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise BundleError(f"{path.parent} has no {CARD}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(values, dict):
        raise BundleError(f"{path} holds a {type(values).__name__}, not a JSON object.")
    return values


def _parse_card(values: dict[str, Any], path: Path) -> BundleCard:
    schema = values.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise BundleError(
            f"{path} has schema {schema!r}; this version of slideflow-ray reads schema {SCHEMA}.",
            next_step="Use the version of slideflow-ray that wrote it, or write the bundle again.",
        )
    known = {field.alias or name for name, field in BundleCard.model_fields.items()}
    for key in sorted(set(values) - known):
        near = get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; the keys are {', '.join(sorted(known))}."
        raise BundleError(f"{path} has an unknown key {key!r}{hint}", next_step="Correct bundle.json.")
    try:
        return BundleCard.parse(values, str(path))
    except ConfigError as error:
        raise BundleError(error.message, next_step="Correct bundle.json.") from error


def weights_path(folder: str | Path) -> Path:
    """Return the path of the weights, or raise BundleError when the file is missing."""
    path = at_hand(str(folder)) / WEIGHTS
    if path.is_file():
        return path
    suffixes = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}
    foreign = [p.name for p in path.parent.glob("*") if p.suffix in suffixes]
    hint = f" ({', '.join(sorted(foreign))} would have to be unpickled, which we never do)" if foreign else ""
    raise BundleError(f"{path.parent} has no {WEIGHTS}{hint}.")


def load_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Read the state dict (tensors on the CPU). Raises BundleError when it is missing or is not safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = weights_path(folder)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER_BYTES:
        raise BundleError(f"{path} is not a complete safetensors file: its header claims {header:,} bytes.")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise BundleError(
            f"{path} is not a complete safetensors file: {error}.",
            next_step="Copy the bundle again from its source.",
        ) from error


def forward_digest(folder: str | Path) -> str:
    """Return 12 hex digits of what changes margins: the weights' bytes and the card's part in the forward pass.

    Targets of stain normalisation are in it where there are some, with the version of what is made of them.
    Names, licence and description are outside, so renaming a class keeps its scores. `tile_px`, `mpp` and
    `halo` are outside too: they shape the grid, whose own digest stands beside this one in every node's
    name. `stride`, `radius` and `seam` are statements about the network that change nothing.
    """
    card = read_card(folder)
    with weights_path(folder).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    said = {"task", "architecture", "arguments", "channels", "mean", "std", "precision"}
    colours = {"stain": [VERSION, seen_targets(card)]} if card.stain else {}
    seen = card.model_dump(mode="json", include=said) | colours
    return digest({**seen, "n_classes": card.n_classes, "weights": weights})


def seen_targets(card: BundleCard) -> dict[str, Any]:
    """Return what of a card's targets changes pixels: all but whose colours they are."""
    return {name: t.model_dump(mode="json", exclude={"source"}) for name, t in sorted((card.stain or {}).items())}


def write_bundle(
    folder: str | Path,
    card: BundleCard,
    state: Mapping[str, torch.Tensor],
    *,
    overwrite: bool = False,
    beside: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a bundle as a whole or not at all, and return its folder. Equal input gives equal bytes.

    `beside` are further files (the training's record, ...) by name. Writing the same bundle again changes nothing
    but these. Raises BundleError when another bundle, or
    anything else, stands there, unless told to `overwrite` (which replaces bundles only).
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        (new / CARD).write_text(card.to_json(), encoding="utf-8")
        _write_weights(new / WEIGHTS, state)
        for name, data in (beside or {}).items():
            (new / name).write_bytes(data)
        if folder.exists():
            if _same_bundle(folder, new):
                for name in beside or {}:
                    os.replace(new / name, folder / name)
                return folder
            _refuse_to_lose(folder, overwrite)
            os.rename(folder, Path(scratch) / "old")
        try:
            os.rename(new, folder)
        except OSError:
            if (Path(scratch) / "old").exists():
                os.rename(Path(scratch) / "old", folder)
            raise
    return folder


def _write_weights(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    # No metadata: safetensors keeps it in a hash map, whose order would differ from write to write.
    # A clone each: tied tensors are refused by safetensors, channels_last ones have no plain bytes.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in sorted(state.items())}
    save_file(tensors, path)
    path.chmod(0o644)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _same_bundle(old: Path, new: Path) -> bool:
    return all((old / name).is_file() and _sha256(old / name) == _sha256(new / name) for name in (CARD, WEIGHTS))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_to_lose(folder: Path, overwrite: bool) -> None:
    if not (folder / CARD).is_file():
        raise BundleError(f"{folder} exists and is not a bundle.", next_step="Choose another folder for the bundle.")
    if not overwrite:
        raise BundleError(
            f"{folder} already holds another bundle.",
            next_step="Choose another folder or name, or say that it may be overwritten.",
        )

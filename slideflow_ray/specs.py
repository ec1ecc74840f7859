"""Frozen settings, each with a digest of what determines results; unknown keys are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from slideflow_ray.errors import ConfigError
from slideflow_ray.texts import read_toml

CHUNK_BYTES = 64 * 2**20
"""A chunk's raw pixels stay below this, so that a worker holds a few of them without thinking."""

Modality = Literal["he", "pas", "silver", "ihc", "tem", "mri"]
Precision = Literal["auto", "bf16", "fp32"]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def digest(value: object) -> str:
    """Return 12 hex digits of the SHA-256 of `value`'s canonical JSON.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Spec(BaseModel):
    """A frozen value whose unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest(self) -> str:
        """Return 12 hex digits that change exactly when a setting does."""
        return digest(self.model_dump(mode="json"))

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """Return the spec, or raise ConfigError naming each bad key and `where` it stands."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc'])) or '(all)'}: {_said(e)}" for e in error.errors()]
            raise ConfigError(f"{where}: " + "; ".join(lines) + ".") from error


def _said(error: Mapping[str, Any]) -> str:
    return "there is no such setting" if error["type"] == "extra_forbidden" else str(error["msg"])


class TissueSpec(Spec):
    """How tissue is found on a thumbnail; `mpp` is the thumbnail's um per pixel."""

    rule: Literal["auto", "he", "everything"] = "auto"
    mpp: Positive = 8.0
    min_area_um2: Annotated[float, Field(ge=0)] = 4000.0
    max_hole_um2: Annotated[float, Field(ge=0)] = 4000.0


class TileSpec(Spec):
    """Regular tiles of `tile_px` x `tile_px` pixels at `mpp` um per pixel, on tissue.

    A tile is kept when at least `min_tissue` of its core is tissue, and any of it is. The core
    is the tile without a border of `halo_px`, which a segmenting network needs to see.
    """

    tile_px: Annotated[int, Field(ge=8, le=4096)]
    mpp: Positive
    stride_px: Annotated[int, Field(ge=1, le=2**20)] | None = None
    halo_px: Annotated[int, Field(ge=0)] = 0
    min_tissue: Fraction = 0.05

    @model_validator(mode="after")
    def _has_a_core(self) -> Self:
        if self.core_px < 1:
            raise ValueError(f"a halo of {self.halo_px} px leaves nothing of a tile of {self.tile_px} px")
        return self

    @property
    def core_px(self) -> int:
        """The side of a tile without its halo."""
        return self.tile_px - 2 * self.halo_px

    @property
    def step_px(self) -> int:
        """Pixels from one tile to the next, at `mpp`."""
        return self.stride_px or self.core_px


class WholeSpec(Spec):
    """Images in one piece, each made `tile_px` x `tile_px`: squashed, or padded to a square with white first."""

    tile_px: Annotated[int, Field(ge=8, le=4096)]
    fit: Literal["squash", "pad"]


class ObjectSpec(Spec):
    """How the objects of a segmentation are found in its plane.

    `classes` are those that make objects; all but the first, the background, if empty. Objects below
    `min_area_um2` are left out. `split` cuts objects that touch at narrow necks, never into
    pieces whose centres are nearer than `min_distance_um`.
    """

    classes: tuple[str, ...] = ()
    min_area_um2: Annotated[float, Field(ge=0)] = 0.0
    fill_holes: bool = True
    split: bool = False
    min_distance_um: Annotated[float, Field(ge=0)] = 0.0


class ThicknessSpec(Spec):
    """Whose thickness is measured along its length, in a segmentation's plane.

    of : the class; between : the classes on its two sides, as a basement membrane lies between endothelium and
    podocytes: it is measured only where one is within `reach_nm` of its edge and the other is so on the opposite side;
    everywhere, if empty. Pieces of its middle line shorter than `least_um` are left out.
    """

    of: str
    between: tuple[str, ...] = ()
    least_um: Annotated[float, Field(ge=0)] = 0.3
    reach_nm: Positive = 150.0

    @field_validator("between")
    @classmethod
    def _two_sides(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(names) not in (0, 2):
            raise ValueError("between needs two classes, one for each side, or none")
        return names


class BoxSpec(Spec):
    """A square around each object that the segmentation `of` has found, read as `tile_px` x `tile_px` pixels.

    With `mpp` None each object is read at its own scale: the square is as long as the longer side of its
    box, and `margin` of that more on each side. With `mpp` all squares are of tile_px at that
    scale, around the middle of the box.
    """

    tile_px: Annotated[int, Field(ge=8, le=4096)]
    of: str
    margin: Annotated[float, Field(ge=0, le=4)] = 0.0
    mpp: Positive | None = None


class StoreSpec(Spec):
    """What is kept: `tiles` raw and lossless, or none. `chunk_rows` = 0 derives the chunk from the tile's size."""

    tiles: Literal["lossless", "none"] = "lossless"
    chunk_rows: Annotated[int, Field(ge=0)] = 0

    def rows(self, tile_px: int) -> int:
        """Return B, the tiles of one chunk: a power of two, raw pixels at most 64 MB, 16 to 1,024.

        >>> StoreSpec().rows(224), StoreSpec().rows(256), StoreSpec().rows(512)
        (256, 256, 64)
        """
        if self.chunk_rows:
            return self.chunk_rows
        fit = CHUNK_BYTES // (tile_px * tile_px * 3)
        return int(min(1024, max(16, 1 << (max(1, fit).bit_length() - 1))))


class ComputeSpec(Spec):
    """What a user asks of the computation; the compute profile is what it becomes on a machine."""

    precision: Precision = "auto"
    micro_batch: Annotated[int, Field(ge=0)] = 0
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"


ROUTES = ("modality", "stain", "scanner", "site", "sequence")
"""Columns of the cohort by which `where` sends items to models."""


OBJECTS = "objects:"


class ModelSpec(Spec):
    """One bundle of the run and where it applies.

    `on`: "tissue" (tiles), "whole" (the image in one piece) or "objects:<model>" (each object that the
    segmentation of that name finds in this run, with `margin` of its side around it); the bundle says, if None.
    `features`: keep features too (encoders give nothing else). `objects`: how a segmentation's
    objects are found. `thickness`: of which of its classes the thickness is measured. `service`: the model's folder
    (models/<name>) whose version in service `path` is; a run writes it down, nobody needs to give it.
    """

    path: str
    where: dict[str, str] = {}
    on: str | None = None
    margin: Annotated[float, Field(ge=0, le=4)] = 0.0
    features: bool = False
    objects: ObjectSpec = ObjectSpec()
    thickness: ThicknessSpec | None = None
    service: str | None = None

    @property
    def segmentation(self) -> str | None:
        """The name of the segmentation on whose objects the model runs, if it does."""
        return self.on.removeprefix(OBJECTS) if self.on and self.on.startswith(OBJECTS) else None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.on not in (None, "tissue", "whole") and not self.segmentation:
            raise ValueError(f'on = "{self.on}" is unknown; use "tissue", "whole" or "objects:<model>"')
        if self.margin and not self.segmentation:
            raise ValueError('margin belongs to on = "objects:<model>"')
        unknown = set(self.where) - set(ROUTES)
        if unknown:
            raise ValueError(f"where has unknown columns {sorted(unknown)}")
        if (modality := self.where.get("modality")) not in (None, *get_args(Modality)):
            raise ValueError(f"where names modality {modality!r}; it is one of {', '.join(get_args(Modality))}")
        return self


class ExecutorSpec(Spec):
    """Where the run is worked off. `workers` = 0 takes every core (or GPU) the executor may use.

    `models`: all of them on each GPU ("together"), or each on GPUs of its own where they do not fit
    together ("apart"); a chunk is read once either way.
    gpu_share : share of a GPU for each scorer: at 0.5 two scorers share one. It is a number to Ray, not a fence: what
    the models of all of them take together must fit the GPU's memory.
    On GPUs, a run that wants more `workers` than there are starts with what is there and takes in nodes that join.
    task_deadline_s : a plan, a read or a derivation that takes longer counts as hung: its worker is replaced and the
    task tried again, alone. Scoring has no deadline. silence_s : a worker that is stopped, or does not answer,
    for so long is replaced. 0 is for ever.
    """

    kind: Literal["inline", "ray"] = "inline"
    address: str | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    readers_per_gpu: Annotated[int, Field(ge=1)] = 4
    gpu_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    models: Literal["together", "apart"] = "together"
    task_deadline_s: Annotated[float, Field(ge=0)] = 1800.0
    silence_s: Annotated[float, Field(ge=0)] = 120.0


class LabelSpec(Spec):
    """How annotations become labels per tile; `names` maps an annotation's class name to a class of the model.

    rule : "centre", a tile is of the class its centre lies in; or "fraction", of the class that covers at least
    `fraction` of it, and of none where no class does.
    """

    rule: Literal["centre", "fraction"] = "centre"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.75
    names: dict[str, str] = {}


def parts_of(text: str) -> tuple[float, float, float]:
    """Return the weights of train, val and test. Raises ConfigError.

    >>> parts_of("6:2:2"), parts_of("70/15/15")
    ((6.0, 2.0, 2.0), (70.0, 15.0, 15.0))
    """
    try:
        weights = tuple(float(part) for part in text.replace("/", ":").split(":"))
    except ValueError:
        weights = ()
    if len(weights) != 3 or min(weights, default=-1) < 0 or not 0 < sum(weights) < float("inf"):
        raise ConfigError(f"{text!r} is not three numbers for train, val and test, as 6:2:2 or 70/15/15.")
    return weights


class SplitSpec(Spec):
    """How a cohort is split by patient, in place of its column `split`; with neither key, that column holds.

    parts : shares of train, val and test, as 6:2:2 or 70/15/15.
    folds : number of folds: `fold` is test, the next one is val, the rest train.
    mode : "paper" splits by image in a training, copies of one image and images of one patient apart: the mistake of
        source 001, for its reproduction only. It leaks, and all that comes of it says so.
    """

    parts: str | None = None
    folds: Annotated[int, Field(ge=3)] | None = None
    fold: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    stratify: Literal["label", "none"] = "label"
    mode: Literal["patient", "paper"] = "patient"

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.mode == "paper" and self.parts is None:
            raise ValueError('mode = "paper" needs parts, as 6:2:2')
        if self.parts is not None:
            parts_of(self.parts)
        if self.parts is not None and self.folds is not None:
            raise ValueError("give parts or folds, not both")
        if self.fold and self.fold >= (self.folds or 1):
            raise ValueError(f"fold {self.fold} of {self.folds or 'no'} folds; they count from 0")
        return self


class CountSpec(Spec):
    """How objects are counted: fewer than `adequate` on the slide that counts are flagged `inadequate`.

    global_sclerosis : names of the class, compared without case; it is reported only where a model has one of them.
    """

    adequate: Annotated[int, Field(ge=0)] = 10
    global_sclerosis: tuple[str, ...] = ("GS", "global sclerosis", "globally sclerotic", "球性硬化")


class RunSpec(Spec):
    """Everything a run is told (run.toml).

    Each bundle brings its own tiles; `tile` names further ones to lay and store without a
    model, and `whole` images to store in one piece, as training does.
    """

    cohort: str
    out: str
    model: tuple[ModelSpec, ...] = ()
    tile: tuple[TileSpec, ...] = ()
    whole: tuple[WholeSpec, ...] = ()
    stride_px: Annotated[int, Field(ge=1, le=2**20)] | None = None
    min_tissue: Fraction = 0.05
    tissue: TissueSpec = TissueSpec()
    store: StoreSpec = StoreSpec()
    compute: ComputeSpec = ComputeSpec()
    executor: ExecutorSpec = ExecutorSpec()
    labels: LabelSpec = LabelSpec()
    counts: CountSpec = CountSpec()
    dask: Literal["threads", "ray"] = "threads"

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if not self.model and not self.tile and not self.whole:
            raise ValueError("name at least one [[model]] (or a [[tile]] to store tiles without scoring)")
        return self


def read_settings(path: Path) -> dict[str, Any]:
    """Return what a TOML file holds. Raises ConfigError when it is missing or is not TOML."""
    try:
        return read_toml(path)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no {path}.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def load_run(path: Path) -> RunSpec:
    """Read run.toml; relative paths in it are relative to the file.

    Raises ConfigError when the file is missing, is not TOML, or has an unknown or bad key.
    """
    values = read_settings(path)
    here = folder_of(path)
    for key in ("cohort", "out"):
        if isinstance(values.get(key), str):
            values[key] = relative_to(here, values[key])
    if isinstance(values.get("model"), dict):
        raise ConfigError(f"{path}: write [[model]], with two brackets each side, for there may be several.")
    for model in values.get("model", []):
        if isinstance(model, dict) and isinstance(model.get("path"), str):
            model["path"] = relative_to(here, model["path"])
    return RunSpec.parse(values, str(path))


def folder_of(path: str | Path) -> str:
    """Return the folder that holds a file: absolute, or the uri's part before its last name."""
    text = str(path)
    return text.rpartition("/")[0] if "://" in text else str(Path(text).resolve().parent)


def relative_to(folder: str | Path, uri: str) -> str:
    """Return `uri` unchanged if it is absolute or has a scheme, else as a path below `folder`."""
    if "://" in uri or Path(uri).is_absolute():
        return uri
    return f"{folder}/{uri}" if "://" in str(folder) else str(Path(folder) / uri)


def given_run(settings: str | None, cohort: str | None, models: Sequence[str], out: str | None) -> RunSpec:
    """Return what a job script was told: run.toml, or a cohort, bundles and an output folder. Raises ConfigError."""
    said = [name for name, value in (("cohort", cohort), ("model", models), ("out", out)) if value]
    if settings:
        if said:
            beside = ", ".join(f"--{name}" for name in said)
            raise ConfigError(f"{settings} says everything; {beside} beside it would be ignored.")
        return load_run(Path(settings))
    if len(said) < 3:
        raise ConfigError("Give run.toml, or --cohort, --model and --out.")
    here = Path.cwd()
    places = {"cohort": relative_to(here, str(cohort)), "out": relative_to(here, str(out))}
    return RunSpec.parse({**places, "model": [{"path": relative_to(here, path)} for path in models]}, "arguments")


def worked_off(spec: RunSpec, told: str | None = None, workers: int = 0, *, default: str = "inline") -> RunSpec:
    """Return the run with the executor that it is told, else the one its settings name, else `default`.

    workers : 0 leaves their number as the settings say.
    """
    named = spec.executor.kind if "kind" in spec.executor.model_fields_set else default
    values = {**spec.executor.model_dump(), "kind": told or named, "workers": workers or spec.executor.workers}
    return spec.model_copy(update={"executor": ExecutorSpec.parse(values, "executor")})

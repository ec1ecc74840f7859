"""What a training is told (train.toml), and the presets of published trainings. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from slideflow_ray.errors import ConfigError
from slideflow_ray.specs import (
    ExecutorSpec,
    LabelSpec,
    Positive,
    Precision,
    Spec,
    SplitSpec,
    StoreSpec,
    TileSpec,
    TissueSpec,
    WholeSpec,
    read_settings,
    relative_to,
)
from slideflow_ray.stain import LAM, Method

Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Keep = Literal["loss", "accuracy", "dice"]
Percent = Annotated[float, Field(ge=0, le=100)]

RANDOM, IMAGENET = "random", "imagenet"

SE_RESNET = "se-resnet"
MACHINES = ("skip-svm", "two-models")
"""Architectures that are fitted at once, not epoch by epoch."""


class AugmentSpec(Spec):
    """How training tiles are changed; each tile draws anew, in every epoch. 0 or false leaves a change out.

    flip, turn : mirror, and turn by quarters
    rotate_deg, shift, zoom : free rotation by up to so many degrees, shift by up to a share of the side, scale by
        1 - zoom to 1 + zoom; what comes in from outside is the tile mirrored at its edge
    brightness, contrast, saturation, hue : as torchvision's ColorJitter takes them
    stain : standard deviation of haematoxylin's, eosin's and the residual's strength (Tellez et al., Med. Image Anal.
        58 (2019) 101544: "HED-light" is 0.05)
    noise : largest standard deviation of Gaussian noise, as a share of 255; or the smallest and the largest
    mixup : a of Beta(a, a), by which a tile is mixed with another of its class and stain (METHODS of 001: 0.4)
    """

    flip: bool = True
    turn: bool = True
    rotate_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    zoom: Share = 0.0
    brightness: NotNegative = 0.2
    contrast: NotNegative = 0.2
    saturation: NotNegative = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.04
    stain: NotNegative = 0.0
    noise: NotNegative | tuple[NotNegative, NotNegative] = 0.02
    mixup: NotNegative = 0.0

    @field_validator("noise")
    @classmethod
    def _rising(cls, value: float | tuple[float, float]) -> float | tuple[float, float]:
        if isinstance(value, tuple) and not value[0] <= value[1]:
            raise ValueError("give the smallest standard deviation of noise first")
        return value if not isinstance(value, tuple) or value[1] else 0.0

    @property
    def changes_nothing(self) -> bool:
        """Whether tiles stay as they are."""
        return not any(self.model_dump().values())


NO_AUGMENTATION = AugmentSpec.model_validate(dict.fromkeys(AugmentSpec.model_fields, 0))


class PretextSpec(Spec):
    """What a network learns without labels (METHODS part 002), and how the two views of a tile may differ in tone.

    method : "usregcon" (regions found by the network), or to compare with "simclr" (whole tiles), "pixpro"
        (pixels), "detcon" (regions of a classical segmentation)
    regions : K, prototypes; grey, semantic, consistency : alpha, beta and eta of the joint loss; between : lambda_b
    negatives : whether regions of one index in different tiles repel each other ("all") or not ("masked")
    gamma, contrast : bounds; noise : largest deviation, as a share of 255; blur : largest sigma in px
    """

    method: Literal["usregcon", "simclr", "pixpro", "detcon"] = "usregcon"
    regions: Annotated[int, Field(ge=2, le=256)] = 8
    grey: NotNegative = 1.0
    semantic: NotNegative = 1.0
    consistency: NotNegative = 0.5
    between: NotNegative = 1.0
    negatives: Literal["masked", "all"] = "masked"
    gamma: tuple[Positive, Positive] = (0.7, 1.4)
    contrast: tuple[Positive, Positive] = (0.8, 1.2)
    noise: NotNegative = 0.05
    blur: NotNegative = 1.0


class MachineSpec(Spec):
    """How a support vector machine is fitted on frozen features, and two models are joined (METHODS part 000).

    kernels : which are searched; folds : by patient, for the search, calibration and joining
    Of "two-models" besides
    rules : of joining; judged : predictions by which one is chosen, of "folds" (the first network is trained once more
    for each fold, without its patients) or of "val" (whose patients chose the first network's epoch: a little kind)
    first, second : bundles that are there already; None trains them here. Bundles are judged on val, and so is what
    begins with weights that have seen the training patients
    """

    kernels: Annotated[tuple[Literal["linear", "rbf"], ...], Field(min_length=1)] = ("linear", "rbf")
    folds: Annotated[int, Field(ge=2, le=20)] = 5
    rules: Annotated[tuple[Literal["vote", "stack", "features"], ...], Field(min_length=1)] = (
        "vote",
        "stack",
        "features",
    )
    judged: Literal["folds", "val"] = "folds"
    first: str | None = None
    second: str | None = None

    @property
    def given(self) -> dict[str, str]:
        """The bundles that are there already, by name."""
        both = {"first": self.first, "second": self.second}
        return {name: path for name, path in both.items() if path}


class TrainSpec(Spec):
    """How a network is trained.

    `batch_size` is of all workers together. `weights`: "random"; "imagenet", which are looked for below
    $SLIDEFLOW_RAY_WEIGHTS and never fetched; or a safetensors file (of a training of ours: one that has seen nobody of
    val or test). The encoder of a network of smp begins with a ResNet's. `freeze` percent of the network's blocks,
    from the first on, keep their weights and batch norm statistics; in the first `head_epochs` all of them do and the
    head learns at `head_lr`. `sampling` "balanced" shows each class as often as the largest, by
    repeating tiles. `keep`: the epoch of lowest validation "loss" is kept, or of highest validation
    "accuracy", or "dice" for a segmentation (few pixels that are surely wrong raise the loss of a network that
    finds more of each class), of equals the one of lower loss. `patience`: epochs without a better one after which
    training ends. `clip` bounds the gradient's norm. `device` "auto" takes a GPU where there is one;
    `threads` 0 leaves torch's choice. `precision` "auto" is bf16 autocast where the hardware has bf16 (ResNet-18
    trains 2.3 to 3.6 times as fast on such a CPU), else fp32; weights and optimiser stay in fp32 either way.
    `warmup`: epochs in which the rate climbs from 0 in a straight line. `pretext`: what is learnt without labels, for
    task "pretrain". `machine`: how "skip-svm" and "two-models" are fitted; `weights` are those of the first's frozen
    backbone (a bundle of a ResNet will do), and of the second's first network.
    """

    architecture: str = "small-cnn"
    arguments: dict[str, JsonValue] = Field(default={})
    weights: str = RANDOM
    freeze: Percent = 0.0
    head_epochs: Annotated[int, Field(ge=0)] = 0
    head_lr: Positive = 1e-3
    dropout: Share = 0.0
    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=2)] = 32
    lr: Positive = 1e-3
    optimiser: Literal["sgd", "rmsprop", "adam", "adamw"] = "adamw"
    momentum: Share = 0.9
    nesterov: bool = False
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    weight_decay: NotNegative = 1e-4
    schedule: Literal["none", "cosine", "multistep", "onecycle"] = "cosine"
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    class_weights: Literal["balanced", "none"] = "balanced"
    sampling: Literal["natural", "balanced"] = "natural"
    augment: AugmentSpec = AugmentSpec()
    keep: Keep = "loss"
    patience: Annotated[int, Field(ge=1)] | None = None
    clip: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "auto"
    warmup: Annotated[int, Field(ge=0)] = 0
    pretext: PretextSpec | None = None
    machine: MachineSpec | None = None

    @field_validator("augment", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return AugmentSpec() if value else NO_AUGMENTATION
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainSpec:
        if self.nesterov and (self.optimiser != "sgd" or not self.momentum):
            raise ValueError('nesterov belongs to optimiser = "sgd" with momentum')
        if self.milestones and self.schedule != "multistep":
            raise ValueError('milestones belong to schedule = "multistep"')
        if self.machine and self.architecture not in MACHINES:
            raise ValueError(f"[fit.machine] belongs to {' and '.join(MACHINES)}, not {self.architecture}")
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError('schedule = "multistep" needs milestones')
        return self


class MineSpec(Spec):
    """Hard tiles of the training split, by the scores of a run: false positives and negatives come `times` as often.

    run : the run's output folder; model : which of its models, where it has several. A tile is hard when the
    model's most probable class is not its own.
    """

    run: str
    model: str | None = None
    times: Annotated[int, Field(ge=2, le=100)] = 4


class SampleSpec(Spec):
    """Which tiles of the training split are shown.

    stride : for a class, every how manyeth row and column of tiles is used (1: all), {"normal": 10, "tumor": 4}
    in 004. Validation is never thinned.
    enlarge : so many synthetic images beside each whole image of the training split, written once (001: 4); by default
    images are changed anew in every epoch, as `fit.augment` says.
    """

    stride: dict[str, Annotated[int, Field(ge=1)]] = Field(default={})
    mine: MineSpec | None = None
    enlarge: Annotated[int, Field(ge=0, le=20)] = 0


class CrewSpec(Spec):
    """Who trains. "inline" is this process; "ray" is Ray Train, data-parallel, each worker reading its own chunks.

    workers : 0 takes one for each GPU of the cluster, else one for each core but one. storage : where checkpoints
    are kept, a folder or s3://BUCKET/PATH that every node sees; `work` if None. max_failures : restarts after lost
    workers. loaders : processes that read and augment for each worker; 0 does it in the worker itself.
    """

    kind: Literal["inline", "ray"] = "inline"
    workers: Annotated[int, Field(ge=0)] = 0
    address: str | None = None
    cpus_per_worker: Positive = 1.0
    storage: str | None = None
    max_failures: Annotated[int, Field(ge=0)] = 3
    loaders: Annotated[int, Field(ge=0)] = 0


class TrainJob(Spec):
    """Everything a training is told. `out` is the bundle, `work` where tiles and checkpoints are kept.

    Either `tile` (tiles of slides, labelled by annotations) or `whole` (images in one piece, labelled by the cohort's
    column `label`). task "multilabel": several classes may apply at once, and a label may name them joined by "+";
    "segment": a class for each pixel, by the annotations' polygons.
    Labels for training are of tiles that a class covers by three quarters (004); a lower `labels.fraction` takes
    in less homogeneous tiles at the border.

    stain : the method by which tiles are normalised, in training and by the bundle ever after. stain_target : whose
    colours they take, a slide of the train split for each stain ({he = "slide-7"}); by default the one whose fit is
    nearest the median. stain_lam : the L1 weight of Vahadane's fits, 0.1 or 0.02.
    """

    cohort: str
    out: str
    work: str
    classes: tuple[str, ...] = ()
    task: Literal["classify", "multilabel", "segment", "pretrain"] = "classify"
    tile: TileSpec | None = None
    whole: WholeSpec | None = None
    fit: TrainSpec = TrainSpec()
    tissue: TissueSpec = TissueSpec()
    store: StoreSpec = StoreSpec()
    executor: ExecutorSpec = ExecutorSpec()
    crew: CrewSpec = CrewSpec()
    labels: LabelSpec = LabelSpec(rule="fraction")
    split: SplitSpec = SplitSpec()
    sample: SampleSpec = SampleSpec()
    stain: Method | None = None
    stain_target: dict[str, str] = Field(default={})
    stain_lam: Annotated[float, Field(gt=0, le=1)] = LAM
    licence: str = "unknown"
    overwrite: bool = False

    @property
    def shape(self) -> TileSpec | WholeSpec:
        """What the network is given: tiles, or whole images."""
        found = self.tile or self.whole
        if found is None:
            raise ConfigError("Give tile, or whole for images in one piece.")
        return found

    @model_validator(mode="after")
    def _tiles_or_whole_images(self) -> TrainJob:
        if (self.tile is None) == (self.whole is None):
            raise ValueError("give either tile (tile_px, mpp) or whole (tile_px, fit) for images in one piece")
        if self.whole and self.sample.stride:
            raise ValueError("sample.stride thins the tiles of slides; whole images have no neighbours")
        if self.tile and self.sample.enlarge:
            raise ValueError("sample.enlarge is for whole images; tiles of slides are changed in every epoch")
        if self.tile and self.split.mode == "paper":
            raise ValueError('split.mode = "paper" is for whole images')
        if self.whole and self.task == "segment":
            raise ValueError('task = "segment" needs tiles, not whole images')
        if self.task not in ("segment", "pretrain") and self.fit.keep == "dice":
            raise ValueError(f'Dice is of segmentations, and the task is "{self.task}"; keep = "loss" or "accuracy"')
        if self.task == "segment" and self.fit.augment.mixup:
            raise ValueError("mixup mixes whole tiles, and a pixel of two tiles has no single class")
        if self.task == "multilabel" and (self.fit.sampling == "balanced" or self.sample.stride or self.sample.mine):
            raise ValueError('sampling = "balanced", sample.stride and sample.mine need one class for each tile')
        return self

    @model_validator(mode="after")
    def _labels_or_none(self) -> TrainJob:
        if (self.task == "pretrain") != (self.fit.pretext is not None):
            raise ValueError('task = "pretrain" and [fit.pretext] belong together')
        if self.task != "pretrain":
            if not self.classes:
                raise ValueError("give classes, the background first")
            return self
        if self.classes or self.sample != SampleSpec() or self.tile is None or self.fit.sampling == "balanced":
            raise ValueError("pre-training reads tiles without labels: no classes, sample, whole or balanced sampling")
        if self.fit.architecture != "unet" and not self.fit.architecture.startswith("smp:"):
            raise ValueError(f'{self.fit.architecture} decodes nothing; pre-training is for "unet" or "smp:NAME"')
        if self.fit.keep != "loss":
            raise ValueError(f'pre-training has no {self.fit.keep}; keep = "loss"')
        if not self.fit.augment.changes_nothing:
            raise ValueError("pre-training draws its own views; set fit.augment = false")
        return self

    @model_validator(mode="after")
    def _machines_tell_two_apart(self) -> TrainJob:
        if self.fit.architecture in MACHINES and (self.task != "classify" or len(self.classes) != 2):
            raise ValueError(f"{self.fit.architecture} tells two classes apart; give two, the background first")
        return self

    @model_validator(mode="after")
    def _strides_are_of_classes(self) -> TrainJob:
        if unknown := sorted(set(self.sample.stride) - set(self.classes)):
            raise ValueError(f"sample.stride names {', '.join(unknown)}; the classes are {', '.join(self.classes)}")
        return self


_FLIPS: dict[str, Any] = {"flip": True, "turn": True}
_NO_COLOUR: dict[str, Any] = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
# METHODS part 001, "Choices to fill the gaps"; colours are the stain normalisation's.
_GLOMERULI: dict[str, Any] = {
    "architecture": SE_RESNET,
    "schedule": "multistep",
    "milestones": [60, 120, 160],
    "gamma": 0.2,
    "epochs": 200,
    "class_weights": "none",
    "keep": "accuracy",
    "augment": {**_NO_COLOUR, **_FLIPS, "rotate_deg": 30.0, "noise": [5 / 255, 15 / 255], "mixup": 0.4},
}
PRESETS: dict[str, dict[str, Any]] = {
    # MathWorks' example: one epoch of RMSprop on sparse 299 px blocks of the finest level; its helper jitters
    # contrast, hue, saturation and brightness, and L2 is MATLAB's default.
    "004": {
        "tile": {"tile_px": 299, "mpp": 0.25, "min_tissue": 0.0},
        "labels": {"rule": "fraction", "fraction": 0.75},
        "sample": {"stride": {"normal": 10, "tumor": 4}},
        "fit": {
            "architecture": "torchvision:inception_v3",
            "weights": IMAGENET,
            "optimiser": "rmsprop",
            "lr": 1e-4,
            "decay": 0.99,
            "momentum": 0.0,
            "weight_decay": 1e-4,
            "schedule": "none",
            "epochs": 1,
            "batch_size": 256,
            "augment": {**_FLIPS, "brightness": 0.35, "contrast": 0.5, "saturation": 0.2, "hue": 0.05, "noise": 0.0},
        },
    },
    # The glomerulus paper's final choice (batch 16, 1e-4, nothing frozen), on crops of one glomerulus in one piece;
    # the optimiser is METHODS', gamma that of the paper's reference 19.
    "paper-final": {
        "whole": {"tile_px": 224, "fit": "squash"},
        "fit": {
            **_GLOMERULI,
            "arguments": {"variant": "F"},
            "weights": IMAGENET,
            "optimiser": "adam",
            "lr": 1e-4,
            "batch_size": 16,
            "dropout": 0.5,
        },
    },
    # What reference 19 of that paper did with its own network, whose schedule the paper took (BHCNet's cifar.py).
    "ref19": {
        "whole": {"tile_px": 224, "fit": "squash"},
        "fit": {
            **_GLOMERULI,
            "arguments": {"variant": "A"},
            "optimiser": "sgd",
            "momentum": 0.9,
            "nesterov": True,
            "lr": 0.1,
            "weight_decay": 1e-4,
            "batch_size": 128,
        },
    },
    # Granules, as METHODS completes the abstract: model A's training, and C of A and B. 224 px is "paper-like".
    "000": {
        "whole": {"tile_px": 512, "fit": "pad"},
        "fit": {
            "architecture": "two-models",
            "arguments": {"first": "torchvision:resnet50", "second": {"backbone": "torchvision:resnet50"}},
            "machine": {},
            "weights": IMAGENET,
            "optimiser": "adamw",
            "lr": 1e-4,
            "weight_decay": 1e-4,
            "schedule": "cosine",
            "epochs": 50,
            "patience": 10,
            "batch_size": 32,
            "augment": {**_FLIPS, "brightness": 0.2, "contrast": 0.2, "saturation": 0.0, "hue": 0.0, "noise": 0.02},
        },
    },
    # The tuber paper, as METHODS completes it: the head alone for one epoch at 1e-3, then Adam at 1e-4.
    "003": {
        "tile": {"tile_px": 299, "mpp": 1.0},
        "fit": {
            "architecture": "torchvision:inception_v3",
            "weights": IMAGENET,
            "optimiser": "adam",
            "lr": 1e-4,
            "weight_decay": 0.0,
            "schedule": "none",
            "head_epochs": 1,
            "head_lr": 1e-3,
            "epochs": 50,
            "patience": 8,
            "batch_size": 32,
            "dropout": 0.5,
            "augment": {
                **dict.fromkeys(AugmentSpec.model_fields, 0),
                "flip": True,
                "rotate_deg": 15.0,
                "shift": 0.1,
                "zoom": 0.1,
            },
        },
    },
}
"""Settings of the published trainings by their source's number or name; what a user sets besides wins."""

ALIASES = {"001": "paper-final"}


def with_preset(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `values` on top of the preset that its key "preset" names. Raises ConfigError for an unknown one."""
    given = dict(values)
    name = given.pop("preset", None)
    if name is None:
        return given
    name = ALIASES.get(name, name)
    if name not in PRESETS:
        raise ConfigError(f"{where}: there is no preset {name!r}; there are {', '.join([*PRESETS, *ALIASES])}.")
    base = dict(PRESETS[name])
    for shape, other in (("tile", "whole"), ("whole", "tile")):
        if given.get(shape):
            base.pop(other, None)  # the user's own kind of tiles takes the place of the paper's
        elif shape in given:
            del given[shape]
    if stride := base.get("sample", {}).get("stride"):
        # Strides are of classes by name: those that the user's classes lack say nothing.
        own = {key: value for key, value in stride.items() if key in given.get("classes", ())}
        base["sample"] = {"stride": own}
    return _merged(base, given)


def _merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in given.items():
        below = out.get(key)
        out[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


PATHS = ("cohort", "out", "work")


def load_train(path: Path) -> dict[str, Any]:
    """Read train.toml as values for `TrainJob`; relative paths in it are relative to the file.

    Raises ConfigError when the file is missing or is not TOML.
    """
    values = read_settings(path)
    here = path.resolve().parent
    for key in PATHS:
        if isinstance(values.get(key), str):
            values[key] = relative_to(here, values[key])
    fit = values.get("fit")
    machine = fit.get("machine") if isinstance(fit, dict) else None
    for key in ("first", "second"):
        if isinstance(machine, dict) and isinstance(machine.get(key), str):
            machine[key] = relative_to(here, machine[key])
    if isinstance(fit, dict) and isinstance(fit.get("weights"), str) and fit["weights"] not in (RANDOM, IMAGENET):
        fit["weights"] = relative_to(here, fit["weights"])
    crew = values.get("crew")
    if isinstance(crew, dict) and isinstance(crew.get("storage"), str):
        crew["storage"] = relative_to(here, crew["storage"])
    mine = values.get("sample", {}).get("mine") if isinstance(values.get("sample"), dict) else None
    if isinstance(mine, dict) and isinstance(mine.get("run"), str):
        mine["run"] = relative_to(here, mine["run"])
    if "out" in values:
        values.setdefault("work", f"{values['out']}.work")
    return values


def as_pretraining(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values for a `TrainJob` that learns without labels: what METHODS part 002 says, unless they say else."""
    told = values.get("fit", {})
    if not isinstance(told, Mapping):  # what is no table is named where all is parsed
        return {**values, "task": "pretrain"}
    base = {"schedule": "cosine", "warmup": 5, "lr": 1e-3, "weight_decay": 1e-4, "epochs": 100, "augment": False}
    fit = {"architecture": "unet", "pretext": {}, **base, **told}
    if "warmup" not in told and isinstance(fit["epochs"], int):
        fit["warmup"] = min(fit["warmup"], max(0, fit["epochs"] - 1))
    return {**values, "task": "pretrain", "fit": fit}


def load_pretrain(path: Path) -> dict[str, Any]:
    """Read pretrain.toml as values for a `TrainJob` that learns without labels. Raises ConfigError as `load_train`."""
    return as_pretraining(load_train(path))


def for_cluster(values: Mapping[str, Any], workers: int = 0, *, overwrite: bool = False) -> dict[str, Any]:
    """Return values for a `TrainJob` that Ray trains and tiles, with what a job script is told (workers 0: nothing).

    >>> for_cluster({"crew": {"kind": "inline", "storage": "s3://b"}}, 2)
    {'crew': {'kind': 'ray', 'storage': 's3://b', 'workers': 2}, 'executor': {'kind': 'ray'}}
    """
    found = {**values, **({"overwrite": True} if overwrite else {})}
    crew, executor = found.get("crew", {}), found.get("executor", {})
    if isinstance(crew, Mapping):  # what is no table is named where all is parsed
        found["crew"] = {**crew, "kind": "ray"} | ({"workers": workers} if workers else {})
    if isinstance(executor, Mapping):
        found["executor"] = {"kind": "ray", **executor}
    return found


def read_job(values: Mapping[str, Any], where: str) -> tuple[TrainJob, dict[str, Any] | None]:
    """Return the job of `values`, which may name a preset, and its table [search] if it has one.

    Raises ConfigError naming each bad key.
    """
    given = with_preset(values, where)
    grid = given.pop("search", None)
    return TrainJob.parse(given, where), grid

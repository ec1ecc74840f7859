"""Commands that train: on tiles, and on the slides of a run."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slideflow_ray.cli.common import ExecutorName, Json, OutArgument
from slideflow_ray.errors import ConfigError

if TYPE_CHECKING:
    from slideflow_ray.events import Listener
    from slideflow_ray.train.spec import TrainJob

commands = typer.Typer()


class WholeName(StrEnum):
    """How an image becomes a square."""

    squash = "squash"
    pad = "pad"


class TaskName(StrEnum):
    """What a network gives."""

    classify = "classify"
    multilabel = "multilabel"
    segment = "segment"


@commands.command()
def train(
    context: typer.Context,
    target: Annotated[Path | None, typer.Argument(help="train.toml; or give --cohort, --out and --classes.")] = None,
    cohort: Annotated[Path | None, typer.Option(help="cohort.csv with split, and label or annotation.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The bundle to write (a folder).")] = None,
    classes: Annotated[str | None, typer.Option(help="Class names, the background first: normal,tumor")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Of a published training: 000, 004, 003, paper-final (001), ref19.")
    ] = None,
    tile_px: Annotated[int, typer.Option(min=8, help="Tile size in pixels at --mpp.")] = 224,
    mpp: Annotated[float, typer.Option(help="um per pixel of the tiles.")] = 0.5,
    whole: Annotated[
        WholeName | None, typer.Option(help="Images in one piece, squashed or padded to --tile-px.")
    ] = None,
    task: Annotated[TaskName, typer.Option(help="multilabel: labels name several classes as A+B.")] = TaskName.classify,
    architecture: Annotated[
        str, typer.Option(help="small-cnn, se-resnet, unet, skip-svm, two-models, torchvision:NAME, timm:..., smp:...")
    ] = "small-cnn",
    weights: Annotated[str, typer.Option(help="random, imagenet, FILE.safetensors, or a bundle.")] = "random",
    freeze: Annotated[float, typer.Option(min=0, max=100, help="Percent of the blocks that keep their weights.")] = 0,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch_size: Annotated[int, typer.Option(min=2, help="Tiles of a step, of all workers together.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    executor: Annotated[ExecutorName, typer.Option(help="inline: this process; ray: Ray Train.")] = ExecutorName.inline,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else a local Ray.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="With ray; 0: one each GPU, else one each core but one.")] = 0,
    storage: Annotated[str | None, typer.Option(help="Where Ray Train keeps checkpoints: folder or s3://...")] = None,
    architectures: Annotated[
        str | None, typer.Option(help="A,B,C: train each and keep the one of lowest validation loss.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Try the combinations of [search] in train.toml with Ray Tune first.")
    ] = False,
    work: Annotated[Path | None, typer.Option(help="Where tiles and checkpoints are kept; default OUT.work.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle at --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train a classifier or a segmentation on the train split, keep the epoch that is best on val, write a bundle.

    Run again after an interruption: it goes on from its last checkpoint.
    """
    from slideflow_ray.progress import to_stderr
    from slideflow_ray.train.spec import load_train, read_job

    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    fit = {"architecture": architecture, "weights": weights, "freeze": freeze, "epochs": epochs}
    fit |= {"batch_size": batch_size, "lr": lr, "seed": seed}
    if preset or target:  # what is not typed stays as the preset or the file says
        fit = {key: value for key, value in fit.items() if key in given}
    crew = {"kind": executor.value, "address": address, "workers": workers, "storage": storage}
    tile: dict[str, Any] = {"tile_px": tile_px, "fit": whole.value} if whole else {"tile_px": tile_px, "mpp": mpp}
    if preset and not whole:  # as the preset says, tiles or whole images
        tile = {key: value for key, value in tile.items() if key in given}
    if target is not None:
        if beside := sorted(given - {"target", "architectures", "search", "overwrite", "as_json"}):
            options = ", ".join(f"--{name.replace('_', '-')}" for name in beside)
            raise ConfigError(f"{target} says everything; {options} beside it would be ignored.")
        values = load_train(target)
    else:
        if cohort is None or out is None or classes is None:
            raise ConfigError("Give train.toml, or --cohort, --out and --classes.", next_step="slideflow-ray train -h")
        values = {
            "cohort": str(cohort.absolute()),
            "out": str(out.absolute()),
            "work": str((work or out.with_name(out.name + ".work")).absolute()),
            "classes": [name.strip() for name in classes.split(",")],
            "whole" if whole else "tile": tile,
            "task": task.value,
            "fit": fit,
            "crew": crew,
            **({"preset": preset} if preset else {}),
        }
    job, grid = read_job({**values, **({"overwrite": True} if overwrite else {})}, str(target or "options"))
    _finish_training(job, grid if search else None, architectures, to_stderr(), search=search, as_json=as_json)


def _finish_training(
    job: TrainJob, grid: Any, architectures: str | None, listen: Listener, *, search: bool, as_json: bool
) -> None:
    from slideflow_ray.train.job import train as train_

    found: list[Any] = []
    if search and architectures:
        raise ConfigError("--search and --architectures are two trainings; give one of them.")
    if search and grid is None:
        raise ConfigError("--search needs a table [search] in train.toml: batch_size, lr, freeze.")
    if search or architectures:
        from slideflow_ray.train.choose import SearchSpec, choose
        from slideflow_ray.train.choose import search as search_

        if architectures:
            result, found = choose(job, [name.strip() for name in architectures.split(",")], listen)
        else:
            result, found = search_(job, SearchSpec.parse(grid, "[search]"), listen)
    else:
        result = train_(job, listen)
    if as_json:
        typer.echo(json.dumps({**result.to_json(), "candidates": [c.to_json() for c in found]}))
        return
    for candidate in found:
        said = ", ".join(f"{key} {value}" for key, value in candidate.settings.items())
        typer.echo(f"{said}: val loss {candidate.loss:.4f}, accuracy {candidate.accuracy:.3f}")
    typer.echo(result.summary())


class MethodName(StrEnum):
    """What is learnt without labels."""

    usregcon = "usregcon"
    simclr = "simclr"
    pixpro = "pixpro"
    detcon = "detcon"


@commands.command()
def pretrain(
    context: typer.Context,
    target: Annotated[Path | None, typer.Argument(help="pretrain.toml; or give --cohort and --out.")] = None,
    cohort: Annotated[Path | None, typer.Option(help="cohort.csv; labels are not read, split test is not.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for weights and record.")] = None,
    method: Annotated[MethodName, typer.Option(help="usregcon, or one to compare it with.")] = MethodName.usregcon,
    architecture: Annotated[str, typer.Option(help="unet or smp:NAME.")] = "unet",
    tile_px: Annotated[int, typer.Option(min=32, help="Tile size in pixels at --mpp.")] = 256,
    mpp: Annotated[float, typer.Option(help="um per pixel of the tiles: 0.008 is 8 nm.")] = 0.008,
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=2, help="Tiles of a step, of all workers together.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    executor: Annotated[ExecutorName, typer.Option(help="inline: this process; ray: Ray Train.")] = ExecutorName.inline,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else a local Ray.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="With ray; 0: one each GPU, else one each core but one.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    as_json: Json = False,
) -> None:
    """Pre-train a segmentation network on tiles without labels; `train` begins with its weights.

    Run again after an interruption: it goes on from its last checkpoint. Then: fit.weights = "OUT/weights.safetensors".
    """
    from slideflow_ray.progress import to_stderr
    from slideflow_ray.train.job import train as train_
    from slideflow_ray.train.spec import as_pretraining, load_pretrain, read_job

    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    if target is not None:
        if beside := sorted(given - {"target", "overwrite", "as_json"}):
            options = ", ".join(f"--{name.replace('_', '-')}" for name in beside)
            raise ConfigError(f"{target} says everything; {options} beside it would be ignored.")
        values = load_pretrain(target)
    else:
        if cohort is None or out is None:
            raise ConfigError("Give pretrain.toml, or --cohort and --out.", next_step="slideflow-ray pretrain -h")
        fit = {"architecture": architecture, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
        values = as_pretraining(
            {
                "cohort": str(cohort.absolute()),
                "out": str(out.absolute()),
                "work": str(out.with_name(out.name + ".work").absolute()),
                "tile": {"tile_px": tile_px, "mpp": mpp},
                "fit": {**fit, "pretext": {"method": method.value}},
                "crew": {"kind": executor.value, "address": address, "workers": workers},
            }
        )
    job, _ = read_job({**values, **({"overwrite": True} if overwrite else {})}, str(target or "options"))
    result = train_(job, to_stderr())
    typer.echo(json.dumps(result.to_json()) if as_json else result.summary())


mil = typer.Typer(help="Slide classifiers on stored features, from slide labels alone.", no_args_is_help=True)


commands.add_typer(mil, name="mil", context_settings={"help_option_names": ["-h", "--help"]})


class PoolingName(StrEnum):
    """How tiles become a slide."""

    attention = "attention"
    mean = "mean"
    max = "max"


@mil.command("train")
def mil_train(
    out: Annotated[Path, typer.Argument(help="Output folder of a run that keeps features.")],
    bundle: Annotated[Path, typer.Option("--out", "-o", help="The slide classifier to write (a folder).")],
    classes: Annotated[str, typer.Option(help="Labels of slides, the background first: normal,tumor")],
    encoder: Annotated[str | None, typer.Option(help="Whose features, where several models keep them.")] = None,
    pooling: Annotated[PoolingName, typer.Option(help="attention (ABMIL), mean or max.")] = PoolingName.attention,
    epochs: Annotated[int, typer.Option(min=1, help="At most.")] = 100,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    max_tiles: Annotated[int, typer.Option(min=1, help="Tiles drawn of a slide in an epoch, at most.")] = 1000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the slide classifier at --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train a slide classifier on a run's features: train split, best epoch on val, test untouched."""
    from slideflow_ray.progress import to_stderr
    from slideflow_ray.train.mil import MilSpec, train_mil

    values = {"pooling": pooling.value, "epochs": epochs, "lr": lr, "max_tiles": max_tiles, "seed": seed}
    names = tuple(name.strip() for name in classes.split(","))
    spec = MilSpec.parse(values, "options")
    done = train_mil(out, bundle, names, spec, encoder=encoder, overwrite=overwrite, listen=to_stderr())
    best = {"bundle": str(done.bundle), "slides": done.bags, **done.history[done.best_epoch]}
    typer.echo(json.dumps(best) if as_json else done.summary())


@mil.command("apply")
def mil_apply(
    out: OutArgument,
    model: Annotated[Path, typer.Option("--model", "-m", help="A slide classifier.")],
    rule: Annotated[str, typer.Option(help="Of the operating points, as in evaluate.")] = "youden",
    as_json: Json = False,
) -> None:
    """Score a run's slides, keep the attention of each tile as rows and a heatmap, evaluate by slide and patient."""
    from slideflow_ray.mil import apply_mil

    found = apply_mil(out, model, rule=rule)
    typer.echo(json.dumps(found.to_json()) if as_json else found.summary())

"""Commands about bundles: which is better, which is in service, where one comes from."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slideflow_ray.cli.common import ExecutorName, Json, Out, PrecisionName, SplitName
from slideflow_ray.errors import ConfigError
from slideflow_ray.exits import EXIT_FAILURES

if TYPE_CHECKING:
    from slideflow_ray.compare import Settings as CompareSettings

commands = typer.Typer()


class PromoteRule(StrEnum):
    """What a candidate must be better by."""

    auc = "auc"
    accuracy = "accuracy"
    log_loss = "log_loss"
    f1 = "f1"
    balanced_accuracy = "balanced_accuracy"


@commands.command()
def compare(
    bundle: Annotated[list[Path], typer.Argument(help="Bundles, or models' folders (models/NAME).")],
    cohort: Annotated[Path, typer.Option(help="cohort.csv with split, and label or annotation.")],
    out: Out,
    split: Annotated[SplitName, typer.Option(help="The slides to judge on.")] = SplitName.val,
    probability: Annotated[float, typer.Option(help="Called from this probability, of two classes or labels.")] = 0.5,
    executor: Annotated[ExecutorName, typer.Option(help="inline, or ray.")] = ExecutorName.inline,
    workers: Annotated[int, typer.Option(min=0, help="0: one for each core or GPU.")] = 0,
    precision: Annotated[PrecisionName, typer.Option(help="auto, bf16 or fp32.")] = PrecisionName.auto,
    benchmark: Annotated[bool, typer.Option(help="Measure tiles per second of the forward pass.")] = True,
    as_json: Json = False,
) -> None:
    """Score a split with several bundles and put them side by side, with intervals by patient."""
    from slideflow_ray.compare import compare as compare_
    from slideflow_ray.progress import to_stderr

    values = {"probability": probability, "benchmark": benchmark}
    settings = _settings(split, executor, workers, precision, **values)
    found = compare_(bundle, cohort, out, settings, to_stderr())
    typer.echo(json.dumps(found.to_json()) if as_json else found.summary())


def _settings(
    split: SplitName, executor: ExecutorName, workers: int, precision: PrecisionName, **more: Any
) -> CompareSettings:
    from slideflow_ray.compare import Settings
    from slideflow_ray.specs import ComputeSpec, ExecutorSpec

    kind = ExecutorSpec(kind=executor.value, workers=workers)
    return Settings(split=split.value, executor=kind, compute=ComputeSpec(precision=precision.value), **more)


@commands.command()
def promote(
    into: Annotated[Path, typer.Option(help="The model's folder, models/NAME.")],
    candidate: Annotated[Path | None, typer.Argument(help="The bundle that wants to be in service.")] = None,
    cohort: Annotated[Path | None, typer.Option(help="cohort.csv; its validation slides decide.")] = None,
    rule: Annotated[PromoteRule, typer.Option(help="What it must be better by.")] = PromoteRule.auc,
    margin: Annotated[float, typer.Option(min=0, help="By more than this.")] = 0.0,
    interval: Annotated[
        bool, typer.Option("--interval", help="The lower bound of the gain's interval must exceed --margin.")
    ] = False,
    point: Annotated[str, typer.Option(help="Rule of the operating points that go along.")] = "youden",
    split: Annotated[SplitName, typer.Option(help="The slides to judge on.")] = SplitName.val,
    leaking: Annotated[
        bool, typer.Option("--even-if-leaking", help="Take one that was trained on a leaking split too.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Go back to the version before.")] = False,
    executor: Annotated[ExecutorName, typer.Option(help="inline, or ray.")] = ExecutorName.inline,
    workers: Annotated[int, typer.Option(min=0, help="0: one for each core or GPU.")] = 0,
    precision: Annotated[PrecisionName, typer.Option(help="auto, bf16 or fp32.")] = PrecisionName.auto,
    as_json: Json = False,
) -> None:
    """Put a bundle in service if it beats the one there on the same validation slides; 3 if it does not."""
    from slideflow_ray.progress import to_stderr
    from slideflow_ray.promote import Terms
    from slideflow_ray.promote import promote as promote_
    from slideflow_ray.promote import undo as undo_

    if undo:
        if candidate is not None:
            raise ConfigError("--undo goes back to the version before; it takes no candidate.")
        back = undo_(into)
        text = f"{into}: back to {back.forward} ({back.path})"
        typer.echo(json.dumps(back.model_dump(mode="json", by_alias=True)) if as_json else text)
        return
    if candidate is None or cohort is None:
        raise ConfigError("Name a candidate and --cohort, or say --undo.", next_step="slideflow-ray promote --help")
    terms = Terms(rule.value, margin, interval, point, leaking)
    settings = _settings(split, executor, workers, precision, benchmark=False)
    decision = promote_(candidate, into, cohort, terms, settings, to_stderr())
    typer.echo(json.dumps(decision.to_json()) if as_json else decision.summary())
    if not decision.accepted:
        raise typer.Exit(EXIT_FAILURES)


_MEAN, _STD = "0.485,0.456,0.406", "0.229,0.224,0.225"


@commands.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A state dict: .pth, .pt, .bin or .safetensors.")],
    architecture: Annotated[str | None, typer.Option(help="small-cnn, torchvision:NAME or timm:NAME.")] = None,
    classes: Annotated[str | None, typer.Option(help="Class names in the network's order: normal,tumor")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The bundle to write (a folder).")] = None,
    task: Annotated[str, typer.Option(help="classify, multilabel or features.")] = "classify",
    tile_px: Annotated[int, typer.Option(min=8, help="Tile size in pixels at --mpp.")] = 224,
    mpp: Annotated[float | None, typer.Option(help="um per pixel of the tiles.")] = None,
    whole: Annotated[str | None, typer.Option(help="Instead of --mpp, for images in one piece: squash or pad.")] = None,
    mean: Annotated[str, typer.Option(help="Of red, green and blue, 0 to 1; default: ImageNet's.")] = _MEAN,
    std: Annotated[str, typer.Option(help="Of red, green and blue; default: ImageNet's.")] = _STD,
    arguments: Annotated[str, typer.Option(help="The architecture's own, as JSON.")] = "{}",
    licence: Annotated[str, typer.Option(help="Of the weights.")] = "unknown",
    as_weights: Annotated[
        Path | None, typer.Option(help="Write only FILE.safetensors with all tensors, for train --weights.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle at --out.")] = False,
) -> None:
    """Make a bundle of a foreign weights file, opened in a limited process of its own."""
    from slideflow_ray.models.convert import as_weights as as_weights_
    from slideflow_ray.models.convert import card_of
    from slideflow_ray.models.convert import convert as convert_

    if as_weights is not None:
        typer.echo(as_weights_(file, as_weights).summary())
        return
    if architecture is None or out is None or (classes is None and task != "features"):
        raise ConfigError("--architecture, --classes and --out are needed.", next_step="slideflow-ray convert --help")
    values = {
        "name": out.absolute().name,
        "task": task,
        "architecture": architecture,
        "arguments": _json(arguments, "--arguments"),
        "classes": tuple(name.strip() for name in (classes or "").split(",") if name.strip()),
        "tile_px": tile_px,
        "mpp": mpp,
        "whole": whole,
        "mean": tuple(mean.split(",")),
        "std": tuple(std.split(",")),
        "licence": licence,
        "description": f"converted from {file.name}",
    }
    typer.echo(convert_(file, card_of({"schema": 1, **values}), out, overwrite=overwrite).summary())


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is not JSON: {error}.") from error

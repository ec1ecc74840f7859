"""Commands that make answers of what a run has stored."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slideflow_ray.cli.common import DaskName, Json, OutArgument, pairs

if TYPE_CHECKING:
    from slideflow_ray.aggregate import Scheduler
    from slideflow_ray.lesions import LesionResults

commands = typer.Typer()


class SlideScoreName(StrEnum):
    """What a slide is judged by."""

    max = "max"
    top10 = "top10"
    area = "area"


@commands.command()
def evaluate(
    out: OutArgument,
    rule: Annotated[
        str,
        typer.Option(
            help="youden, f1, sensitivity=0.95, specificity=0.95, cost=5 (missing one costs 5 false alarms), "
            "cost=5,prevalence=0.1, probability=0.5, or a preset: 004 (probability=0.8), 003 (probability=0.5)."
        ),
    ] = "youden",
    slide_score: Annotated[
        SlideScoreName,
        typer.Option(help="A slide's score: its highest tile, the mean of ten, or the share of tiles at 0.5 or more."),
    ] = SlideScoreName.max,
    labels: Annotated[
        str | None, typer.Option(help="How annotations label tiles: centre, or fraction=0.75; default: the run's.")
    ] = None,
    camelyon16: Annotated[
        bool, typer.Option("--camelyon16", help="Score lesions by CAMELYON16's rules too: FROC, slide AUC, forest.")
    ] = False,
    name: Annotated[
        list[str] | None, typer.Option(help="ANNOTATION=CLASS, for annotations with other names; may be repeated.")
    ] = None,
    dask: Annotated[DaskName | None, typer.Option(help="Scheduler of the aggregation; default: the run's.")] = None,
    as_json: Json = False,
) -> None:
    """Fix operating points on validation, apply them to test, write confusion, ROC, PR, calibration."""
    from slideflow_ray.evaluate import evaluate as evaluate_

    names = pairs(name, "ANNOTATION=CLASS")
    scheduler: Scheduler | None = ("ray" if dask is DaskName.ray else "threads") if dask else None
    found = evaluate_(out, rule=rule, names=names, scheduler=scheduler, slide_score=slide_score.value, labels=labels)
    lesions = _camelyon16(out, names, scheduler) if camelyon16 else None
    if as_json:
        typer.echo(json.dumps(found.to_json() | ({"camelyon16": lesions.to_json()} if lesions else {})))
    else:
        typer.echo("\n".join([found.summary(), *([lesions.summary()] if lesions else [])]))


def _camelyon16(out: Path, names: dict[str, str], scheduler: Scheduler | None) -> LesionResults:
    from slideflow_ray.lesions import camelyon16

    return camelyon16(out, names=names, scheduler=scheduler)


@commands.command()
def report(out: OutArgument) -> None:
    """Write report.html, one file that opens offline; print where it is."""
    from slideflow_ray.report import write_report

    typer.echo(write_report(out))


class ExportName(StrEnum):
    """What results are written as."""

    geojson = "geojson"
    parquet = "parquet"
    csv = "csv"
    ome_zarr = "ome-zarr"
    ome_tiff = "ome-tiff"
    crops = "crops"
    counts = "counts"
    labels = "labels"
    thickness = "thickness"


class KeysName(StrEnum):
    """Language of the classes in a label file."""

    english = "english"
    chinese = "chinese"


@commands.command()
def export(
    out: OutArgument,
    to: Annotated[ExportName, typer.Option(help="QuPath's GeoJSON, tables, pictures, a JPEG for each object.")],
    slide: Annotated[list[str] | None, typer.Option(help="Only this slide_id; may be repeated.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only this model's name; may be repeated.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to; default: the run's own folder.")] = None,
    keys: Annotated[KeysName, typer.Option(help="Names of the classes in label files.")] = KeysName.english,
    as_json: Json = False,
) -> None:
    """Write results as files that QuPath, R, pandas and viewers open."""
    from slideflow_ray.export import export as export_

    found = export_(out, to.value, slides=slide or (), models=model or (), folder=folder, keys=keys.value)
    for note in found.notes:
        typer.echo(note, err=True)
    typer.echo(json.dumps(found.to_json()) if as_json else "\n".join(map(str, found.files)))


@commands.command()
def calibrate(
    out: OutArgument,
    split: Annotated[str, typer.Option(help="The split that the temperature is fitted on.")] = "val",
    as_json: Json = False,
) -> None:
    """Fit one temperature for each classifier of a run on validation; show calibration before and after."""
    from slideflow_ray.calibrate import calibrate as calibrate_

    found, notes = calibrate_(out, split)
    if as_json:
        typer.echo(json.dumps({"models": [one.model_dump(mode="json") for one in found], "notes": notes}))
    else:
        typer.echo("\n".join([*(one.sentence for one in found), *notes]))


@commands.command()
def stain(
    out: OutArgument,
    model: Annotated[str | None, typer.Option(help="The model's name; default: the first with stain targets.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to; default: the run's own folder.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of t-SNE.")] = 0,
    as_json: Json = False,
) -> None:
    """Draw tiles before and after stain normalisation, and t-SNE of their features with what becomes of neighbours."""
    from slideflow_ray.stainview import show_stains

    found = show_stains(out, model, folder, seed)
    typer.echo(json.dumps(found.to_json()) if as_json else found.summary())


class MapName(StrEnum):
    """How a map is made."""

    grad_cam = "grad-cam"
    saliency = "saliency"
    occlusion = "occlusion"


@commands.command()
def explain(
    out: OutArgument,
    model: Annotated[str | None, typer.Option(help="The model's name, where the run has several.")] = None,
    item: Annotated[
        list[str] | None, typer.Option(help="Only this slide_id; may be repeated. Default: the most probable ones.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="So many items, the most probable first.")] = 8,
    class_: Annotated[str | None, typer.Option("--class", help="Whose score is explained.")] = None,
    method: Annotated[
        list[MapName] | None, typer.Option(help="May be repeated. Default: what suits the network.")
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="Of Grad-CAM; may be repeated. Default: the last two resolutions.")
    ] = None,
    window_px: Annotated[int, typer.Option(min=2, help="Side of the occlusion's window.")] = 40,
    stride_px: Annotated[int, typer.Option(min=1, help="Step of the occlusion's window.")] = 20,
    as_json: Json = False,
) -> None:
    """Draw what a classifier's scores depend on: Grad-CAM, saliency or occlusion maps, as PNG and arrays."""
    from slideflow_ray.explain import METHODS, Asked
    from slideflow_ray.explain import explain as explain_
    from slideflow_ray.progress import to_stderr

    methods = tuple(known for known in METHODS if known in {one.value for one in method or ()})
    asked = Asked(model, tuple(item or ()), top, class_, methods, tuple(layer or ()), window_px, stride_px)
    found = explain_(out, asked, to_stderr())
    typer.echo(json.dumps(found.to_json()) if as_json else found.summary())

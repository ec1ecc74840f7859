"""The command line: one thin command per stage.

Progress and errors go to standard error, data to standard output (``--json`` for
machines). Exit codes: 0 all done, 2 configuration (nothing started), 3 finished with
failures, 4 infrastructure (run again to resume), 5 verification mismatch, 70 bug,
130 interrupted (run again to resume).
"""

from __future__ import annotations

import json
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from slideflow_ray.errors import ConfigError, CorruptStore, InfrastructureError, SlideflowError
from slideflow_ray.storage import place

if TYPE_CHECKING:
    from slideflow_ray.accounting import RunResult
    from slideflow_ray.aggregate import Scheduler
    from slideflow_ray.compare import Settings as CompareSettings
    from slideflow_ray.events import Listener
    from slideflow_ray.lesions import LesionResults
    from slideflow_ray.specs import RunSpec
    from slideflow_ray.train.spec import TrainJob

app = typer.Typer(
    name="slideflow-ray",
    help="Distributed batch inference on large pathology slides.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXIT_OK, EXIT_CONFIG, EXIT_FAILURES, EXIT_INFRA, EXIT_VERIFY, EXIT_BUG, EXIT_INTERRUPTED = 0, 2, 3, 4, 5, 70, 130


class ExecutorName(StrEnum):
    """Where a run is worked off."""

    inline = "inline"
    ray = "ray"


class PrecisionName(StrEnum):
    """How the network computes."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class TilesName(StrEnum):
    """What becomes of the pixels."""

    lossless = "lossless"
    none = "none"


class SlideScoreName(StrEnum):
    """What a slide is judged by."""

    max = "max"
    top10 = "top10"
    area = "area"


class DaskName(StrEnum):
    """What works off the aggregation."""

    threads = "threads"
    ray = "ray"


def _place(text: str) -> Path:
    """A folder, or a place in an object store."""
    return place(text)


Out = Annotated[Path, typer.Option("--out", "-o", parser=_place, metavar="PATH", help="Output folder, or s3://.")]
OutArgument = Annotated[Path, typer.Argument(parser=_place, metavar="OUT", help="Output folder of a run, or s3://.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def run(
    context: typer.Context,
    target: Annotated[str | None, typer.Argument(help="run.toml, or one slide.")] = None,
    cohort: Annotated[str | None, typer.Option(help="cohort.csv (columns slide_id and uri at least).")] = None,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="Bundle; may be repeated.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", parser=_place, metavar="PATH", help="Output folder, or s3://.")
    ] = None,
    executor: Annotated[ExecutorName, typer.Option(help="inline, or ray.")] = ExecutorName.inline,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else a local Ray.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="0: one for each core or GPU.")] = 0,
    precision: Annotated[
        PrecisionName, typer.Option(help="auto: bf16 where the hardware has it.")
    ] = PrecisionName.auto,
    micro_batch: Annotated[int, typer.Option(min=0, help="0: 16 on a CPU, 256 on a GPU.")] = 0,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the network.")] = False,
    tiles: Annotated[TilesName, typer.Option(help="Keep raw tiles lossless, or none.")] = TilesName.lossless,
    stride_px: Annotated[int | None, typer.Option(min=1, help="From tile to tile; default: the tile's size.")] = None,
    min_tissue: Annotated[float, typer.Option(min=0, max=1, help="Least tissue of a tile.")] = 0.05,
    mpp: Annotated[float | None, typer.Option(help="um per pixel of the one slide, if its file does not say.")] = None,
    modality: Annotated[str, typer.Option(help="he, pas, silver, ihc, tem or mri: of the one slide.")] = "he",
    dask: Annotated[DaskName, typer.Option(help="Scheduler of the aggregation.")] = DaskName.threads,
    retry: Annotated[bool, typer.Option("--retry", help="Try refused slides again.")] = False,
    rehash: Annotated[bool, typer.Option("--rehash", help="Read also files of unchanged size and time again.")] = False,
    as_json: Json = False,
) -> None:
    """Score slides; run again to resume. TARGET is run.toml or a slide, or give --cohort."""
    from slideflow_ray.cohort import single_slide
    from slideflow_ray.progress import to_stderr
    from slideflow_ray.run import run as run_

    settings = {
        "stride_px": stride_px,
        "min_tissue": min_tissue,
        "store": {"tiles": tiles.value},
        "compute": {"precision": precision.value, "micro_batch": micro_batch, "compile": compile},
        "executor": {"kind": executor.value, "address": address, "workers": workers},
        "dask": dask.value,
    }
    items = None
    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    if target is not None and target.endswith(".toml"):
        if beside := sorted(given - {"target", "retry", "rehash", "as_json"}):
            options = ", ".join(f"--{name.replace('_', '-')}" for name in beside)
            raise ConfigError(f"{target} says everything; {options} beside it would be ignored.")
        spec = _toml(Path(target))
    else:
        if (target is None) == (cohort is None):
            raise ConfigError("Give run.toml, or one slide, or --cohort.", next_step="slideflow-ray run --help")
        if address and executor is not ExecutorName.ray:
            raise ConfigError("--address needs --executor ray.")
        if cohort is not None and mpp is not None:
            raise ConfigError("--mpp is for one slide; a cohort has a column mpp.")
        if target is not None:
            items = single_slide(target, mpp, modality)
        spec = _spec(str(cohort or ""), model, out, settings)
    _finish_run(run_(spec, items, listen=to_stderr(), retry=retry, rehash=rehash), spec, as_json)


def _toml(path: Path) -> RunSpec:
    from slideflow_ray.specs import load_run

    return load_run(path)


def _spec(cohort: str, model: list[str] | None, out: Path | None, settings: dict[str, Any]) -> RunSpec:
    from slideflow_ray.specs import RunSpec

    if not model or out is None:
        raise ConfigError("--model and --out are needed.", next_step="slideflow-ray run --help")
    models = [{"path": str(place(path).absolute())} for path in model]
    values = {"cohort": cohort, "out": str(out.absolute()), "model": models, **settings}
    return RunSpec.parse(values, "options")


def _finish_run(result: RunResult, spec: RunSpec, as_json: bool) -> None:
    counts = result.counts
    if as_json:
        typer.echo(json.dumps({"out": spec.out, **counts, "changed": result.changed}))
    elif not result.changed and counts["done"] == len(result.ended):
        typer.echo(f"Nothing to do: {counts['done']} slides were done already in {spec.out}")
    else:
        typer.echo(f"done {counts['done']}, failed {counts['failed']}, refused {counts['refused']}: {spec.out}")
    if counts["failed"] or counts["refused"]:
        for ended in result.ended:
            if ended.status != "done":
                typer.echo(f"  {ended.slide_id}: {ended.code} {ended.message} Next: {ended.next_step}", err=True)
        raise typer.Exit(EXIT_FAILURES)


@app.command()
def plan(
    cohort: Annotated[str, typer.Option(help="cohort.csv.")],
    model: Annotated[list[str], typer.Option("--model", "-m", help="Bundle; may be repeated.")],
    out: Out,
    tiles: Annotated[TilesName, typer.Option(help="Keep raw tiles lossless, or none.")] = TilesName.lossless,
    as_json: Json = False,
) -> None:
    """Lay the grids and say what a run will cost in tiles and bytes; nothing is scored."""
    from slideflow_ray.run import plan as plan_

    spec = _spec(str(cohort), model, out, {"store": {"tiles": tiles.value}})
    cost = plan_(spec)
    if as_json:
        typer.echo(json.dumps(cost))
    else:
        for slide in cost["slides"]:
            typer.echo("{slide_id}: {tiles} tiles, {todo} to score {note}".format(**slide).rstrip())
        typer.echo("{tiles} tiles, {todo} to score, about {gigabytes:.2f} GB to store".format(**cost))
    if any(slide["note"] for slide in cost["slides"]):
        raise typer.Exit(EXIT_FAILURES)


@app.command()
def status(out: OutArgument, as_json: Json = False) -> None:
    """Say how the slides of an output folder ended, and what is committed so far."""
    from slideflow_ray.accounting import status as status_

    found = status_(out)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo("{state}; done {done}, failed {failed}, refused {refused}".format(**found))
    for failure in found["failures"]:
        typer.echo("  {slide_id}: {code} {message} Next: {next_step}".format(**failure))


@app.command()
def verify(
    out: OutArgument,
    digest: Annotated[bool, typer.Option("--digest", help="Print one hash over stores, commits and tables.")] = False,
) -> None:
    """Compare everything committed with what is on disk; exit code 5 when anything differs."""
    from slideflow_ray.repair import verify as verify_
    from slideflow_ray.store import tree_digest

    nodes, wrong = verify_(out)
    for line in wrong:
        typer.echo(line, err=True)
    if wrong:
        said = f"{len(wrong)} of what was committed in {out} is not as it was."
        raise CorruptStore(said, next_step=f"Run `slideflow-ray repair {out}`: only what is broken is done anew.")
    typer.echo(f"{nodes} nodes are as committed", err=digest)
    if digest:
        typer.echo(tree_digest(out))


@app.command()
def repair(
    out: OutArgument,
    run: Annotated[bool, typer.Option("--run", help="Then run again as run.json says, so that all is whole.")] = False,
    as_json: Json = False,
) -> None:
    """Take away what `verify` names, chunk by chunk and node by node; the same run makes it anew, and nothing else."""
    from slideflow_ray.progress import to_stderr
    from slideflow_ray.repair import repair as repair_
    from slideflow_ray.run import run as run_
    from slideflow_ray.run import settings_of

    settings = settings_of(out) if run else None
    found = repair_(out)
    for line in found.wrong:
        typer.echo(line, err=True)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "wrong": found.wrong, "units": found.units}), err=run)
    else:
        again = f"; run the same command again, or `slideflow-ray repair {out} --run`" if found.units else ""
        typer.echo(f"{len(found.units)} units to be done anew{'' if run else again}", err=run)
    if settings is not None:
        _finish_run(run_(*settings, listen=to_stderr()), settings[0], as_json)


@app.command()
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

    pairs = [text.partition("=") for text in name or []]
    if bad := [key for key, equals, value in pairs if not (key and equals and value)]:
        raise ConfigError(f"--name {bad[0]} is not ANNOTATION=CLASS.", next_step="slideflow-ray evaluate --help")
    names = {key: value for key, _, value in pairs}
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


@app.command()
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


@app.command()
def export(
    out: OutArgument,
    to: Annotated[ExportName, typer.Option(help="QuPath's GeoJSON, tables, pictures, or a JPEG for each object.")],
    slide: Annotated[list[str] | None, typer.Option(help="Only this slide_id; may be repeated.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only this model's name; may be repeated.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to; default: the run's own folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write results as files that QuPath, R, pandas and viewers open."""
    from slideflow_ray.export import export as export_

    found = export_(out, to.value, slides=slide or (), models=model or (), folder=folder)
    for note in found.notes:
        typer.echo(note, err=True)
    typer.echo(json.dumps(found.to_json()) if as_json else "\n".join(map(str, found.files)))


@app.command()
def train(
    context: typer.Context,
    target: Annotated[Path | None, typer.Argument(help="train.toml; or give --cohort, --out and --classes.")] = None,
    cohort: Annotated[Path | None, typer.Option(help="cohort.csv with split, and label or annotation.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The bundle to write (a folder).")] = None,
    classes: Annotated[str | None, typer.Option(help="Class names, the background first: normal,tumor")] = None,
    preset: Annotated[str | None, typer.Option(help="Settings of a published training: 004, 001 or 003.")] = None,
    tile_px: Annotated[int, typer.Option(min=8, help="Tile size in pixels at --mpp.")] = 224,
    mpp: Annotated[float, typer.Option(help="um per pixel of the tiles.")] = 0.5,
    architecture: Annotated[str, typer.Option(help="small-cnn, torchvision:NAME or timm:NAME.")] = "small-cnn",
    weights: Annotated[str, typer.Option(help="random, imagenet, or FILE.safetensors.")] = "random",
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
    """Train a tile classifier on the train split, keep the epoch that is best on val, write a bundle.

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
    tile = {"tile_px": tile_px, "mpp": mpp}
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
            "tile": {key: value for key, value in tile.items() if not preset or key in given},
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


@app.command()
def cohort(
    folder: Annotated[Path, typer.Argument(help="Folder of slides; folders below it too.")],
    patient_pattern: Annotated[
        str | None, typer.Option(help="Regular expression on the path; its first group is the patient.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("cohort.csv"),
    expect: Annotated[Path | None, typer.Option(help="CSV of the slides that should be there.")] = None,
    split: Annotated[str | None, typer.Option(help="Parts for train:val:test by patient, as 6:2:2.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the split.")] = 0,
    modality: Annotated[str | None, typer.Option(help="he, pas, silver, ihc, tem or mri, of all slides.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a cohort.csv of the slides below a folder; say what is double, unreadable or missing."""
    from slideflow_ray.collect import check_out, collect, describe, write_cohort_csv

    check_out(out, force=force)
    found = collect(folder, pattern=patient_pattern, expect=expect, split=split, seed=seed, modality=modality)
    for line in describe(found):
        typer.echo(line, err=True)
    write_cohort_csv(out, found, modality=modality, force=force)
    typer.echo(json.dumps({"out": str(out), **found.summary()}) if as_json else f"{len(found.slides)} slides: {out}")
    if not found.complete:
        raise typer.Exit(EXIT_FAILURES)


class StratifyName(StrEnum):
    """What a split keeps the shares of."""

    label = "label"
    none = "none"


@app.command()
def split(
    cohort: Annotated[Path, typer.Argument(help="cohort.csv.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; with --folds OUT_fold0.csv and so on.")],
    parts: Annotated[str | None, typer.Option(help="Parts for train:val:test, as 6:2:2 or 70/15/15.")] = None,
    folds: Annotated[int | None, typer.Option(help="In place of parts: fold i is test, the next val.")] = None,
    stratify: Annotated[StratifyName, typer.Option(help="label: each split gets its share.")] = StratifyName.label,
    classes: Annotated[str, typer.Option(help="Labels from harmless to severe: normal,tumor")] = "",
    seed: Annotated[int, typer.Option(help="Draws the split.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Split a cohort by patient, each class by its share; say how many slides and patients are where."""
    from slideflow_ray.splits import describe, split_cohort, summary

    order = tuple(name.strip() for name in classes.split(",") if name.strip())
    how = {"parts": parts, "folds": folds, "stratify": stratify.value, "seed": seed}
    done = split_cohort(cohort, out, how, classes=order, force=force)
    if as_json:
        typer.echo(json.dumps([{"out": str(path), **summary(items)} for path, items in done]))
        return
    for path, items in done:
        typer.echo("\n".join([str(path), *(f"  {line}" for line in describe(items))]))


_MEAN, _STD = "0.485,0.456,0.406", "0.229,0.224,0.225"


class PromoteRule(StrEnum):
    """What a candidate must be better by."""

    auc = "auc"
    accuracy = "accuracy"
    log_loss = "log_loss"
    f1 = "f1"
    balanced_accuracy = "balanced_accuracy"


class SplitName(StrEnum):
    """A split of the cohort."""

    val = "val"
    test = "test"


@app.command()
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


@app.command()
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
    terms = Terms(rule.value, margin, interval, point)
    settings = _settings(split, executor, workers, precision, benchmark=False)
    decision = promote_(candidate, into, cohort, terms, settings, to_stderr())
    typer.echo(json.dumps(decision.to_json()) if as_json else decision.summary())
    if not decision.accepted:
        raise typer.Exit(EXIT_FAILURES)


@app.command()
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


@app.command()
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


mil = typer.Typer(help="Slide classifiers on stored features, from slide labels alone.", no_args_is_help=True)
app.add_typer(mil, name="mil", context_settings={"help_option_names": ["-h", "--help"]})


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


@app.command()
def phantoms(
    folder: Annotated[Path, typer.Argument(help="Where to write slides, annotations and cohort.csv.")],
    slides: Annotated[int, typer.Option(min=3)] = 12,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a cohort of generated H&E slides with their truth; print where its cohort.csv is."""
    from slideflow_ray.phantoms import write_cohort

    typer.echo(write_cohort(folder, slides=slides, seed=seed))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything the demo makes.")] = Path("demo-out"),
    executor: Annotated[ExecutorName, typer.Option(help="inline, or ray.")] = ExecutorName.ray,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make phantom slides, train on them, score them, evaluate, write the report."""
    from slideflow_ray.demo import demo as demo_

    typer.echo(demo_(out.absolute(), executor=executor.value, seed=seed))


@app.command()
def doctor(
    privacy: Annotated[Path | None, typer.Option(help="Search this result tree for words instead.")] = None,
    string: Annotated[list[str] | None, typer.Option(help="A word to look for; may be repeated.")] = None,
    strings: Annotated[Path | None, typer.Option(help="A text file of words, one a line.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine can do; or, with --privacy, whether results hold given words (exit code 5 if so)."""
    if privacy is not None:
        _search(privacy, string or [], strings, as_json)
        return
    if string or strings:
        raise ConfigError("--string and --strings need --privacy OUT.")
    from slideflow_ray.doctor import examine

    for name, value in examine().items():
        typer.echo(f"{name:14} {value}")


def _search(tree: Path, words: list[str], file: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from slideflow_ray.privacy import read_words, search

    found = search(tree, read_words(words, file))
    if as_json:
        typer.echo(json.dumps([asdict(leak) for leak in found]))
    else:
        for leak in found:
            typer.echo(f"{leak.path} ({leak.part}): {leak.word}")
        typer.echo(f"{len(found)} places hold a word" if found else "no word was found")
    if found:
        raise typer.Exit(EXIT_VERIFY)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with one of the documented codes."""
    try:
        _leave(app(arguments, standalone_mode=False) or EXIT_OK)
    except SlideflowError as error:
        typer.echo(str(error), err=True)
        sys.exit(_code(error))
    except typer.Exit as end:
        _leave(end.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _leave(EXIT_INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - whatever nobody planned for ends with its own code
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # the command line's own usage errors
            error.show()
            sys.exit(EXIT_CONFIG)
        traceback.print_exc()
        typer.echo("E_BUG: this should not happen. Next: please report it with the lines above.", err=True)
        sys.exit(EXIT_BUG)


def _leave(code: int) -> NoReturn:
    if code == EXIT_INTERRUPTED:
        typer.echo("Interrupted; run the same command again to resume.", err=True)
    sys.exit(code)


def _code(error: SlideflowError) -> int:
    if isinstance(error, CorruptStore):
        return EXIT_VERIFY
    if isinstance(error, InfrastructureError):
        return EXIT_INFRA
    return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILURES


if __name__ == "__main__":
    main()

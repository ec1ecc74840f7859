"""Commands that score slides and look after what a run has stored."""

from __future__ import annotations

import json
from datetime import date as Date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slideflow_ray.cli.common import DaskName, ExecutorName, Json, Out, OutArgument, PrecisionName, TilesName
from slideflow_ray.errors import ConfigError, CorruptStore
from slideflow_ray.exits import EXIT_DRIFT, EXIT_FAILURES
from slideflow_ray.observe import say_failures
from slideflow_ray.storage import place

if TYPE_CHECKING:
    from slideflow_ray.accounting import RunResult
    from slideflow_ray.specs import RunSpec

commands = typer.Typer()


@commands.command()
def run(
    context: typer.Context,
    target: Annotated[str | None, typer.Argument(help="run.toml, or one slide.")] = None,
    cohort: Annotated[str | None, typer.Option(help="cohort.csv (columns slide_id and uri at least).")] = None,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="Bundle; may be repeated.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", parser=place, metavar="PATH", help="Output folder, or s3://.")
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
    modality: Annotated[str | None, typer.Option(help="he, pas, silver, ihc, tem or mri: of the one slide.")] = None,
    dask: Annotated[DaskName, typer.Option(help="Scheduler of the aggregation.")] = DaskName.threads,
    retry: Annotated[bool, typer.Option("--retry", help="Try refused slides again.")] = False,
    rehash: Annotated[bool, typer.Option("--rehash", help="Read also files of unchanged size and time again.")] = False,
    log: Annotated[
        Path | None, typer.Option(help="A file for one JSON line an event; default: SLIDEFLOW_RAY_LOG.")
    ] = None,
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
        if beside := sorted(given - {"target", "retry", "rehash", "log", "as_json"}):
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
    _finish_run(run_(spec, items, listen=to_stderr(), retry=retry, rehash=rehash, log=log), spec, as_json)


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
    failures = [ended for ended in result.ended if ended.status != "done"]
    for ended in failures:
        typer.echo(f"  {ended.slide_id}: {ended.code} {ended.message} Next: {ended.next_step}", err=True)
    if code := say_failures((ended.code, ended.slide_id) for ended in failures):
        raise typer.Exit(code)


@commands.command()
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


@commands.command()
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


@commands.command()
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


@commands.command()
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


@commands.command()
def nightly(
    settings: Annotated[Path, typer.Argument(help="nightly.toml.", metavar="NIGHTLY.TOML")],
    date: Annotated[str | None, typer.Option(help="The night's date, as 2026-11-21; default: today.")] = None,
    executor: Annotated[ExecutorName | None, typer.Option(help="inline, or ray; default: as the file says.")] = None,
    as_json: Json = False,
) -> None:
    """Score what is new or changed since the last night, aggregate the cohort so far, look for drift (exit code 6)."""
    from slideflow_ray.nightly.night import run_night
    from slideflow_ray.nightly.spec import load_nightly
    from slideflow_ray.progress import to_stderr

    spec = load_nightly(settings, executor.value if executor else None)
    night = run_night(spec, _date(date), to_stderr())
    typer.echo(json.dumps(night.to_json()) if as_json else night.summary())
    code = say_failures(night.failures)
    if night.drifted or code:
        raise typer.Exit(EXIT_DRIFT if night.drifted else code)


def _date(text: str | None) -> Date | None:
    try:
        return Date.fromisoformat(text) if text else None
    except ValueError as error:
        raise ConfigError(f"--date {text!r} is not a date as 2026-11-21.") from error

"""Commands that write cohorts."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from slideflow_ray.cli.common import Json, pairs
from slideflow_ray.exits import EXIT_FAILURES

commands = typer.Typer()


@commands.command()
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
    labels: Annotated[
        Path | None, typer.Option(help="JSON or CSV with image_name and 0 or 1 for each class, as labelling writes it.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="KEY=CLASS, for other keys of --labels; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a cohort.csv of the slides below a folder; say what is double, unreadable or missing."""
    from slideflow_ray.collect import check_out, collect, describe, with_labels, write_cohort_csv
    from slideflow_ray.label_files import read_labels

    check_out(out, force=force)
    labelled = read_labels(labels, pairs(name, "KEY=CLASS")) if labels else None
    found = collect(folder, pattern=patient_pattern, expect=expect, split=split, seed=seed, modality=modality)
    found = with_labels(found, labelled) if labelled else found
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


@commands.command()
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

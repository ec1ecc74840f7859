"""Commands for trying things out and looking around."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from slideflow_ray.cli.common import ExecutorName, Json
from slideflow_ray.errors import ConfigError
from slideflow_ray.exits import EXIT_VERIFY

commands = typer.Typer()


@commands.command()
def phantoms(
    folder: Annotated[Path, typer.Argument(help="Where to write slides, annotations and cohort.csv.")],
    slides: Annotated[int, typer.Option(min=3)] = 12,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a cohort of generated H&E slides with their truth; print where its cohort.csv is."""
    from slideflow_ray.phantoms import write_cohort

    typer.echo(write_cohort(folder, slides=slides, seed=seed))


@commands.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything the demo makes.")] = Path("demo-out"),
    executor: Annotated[ExecutorName, typer.Option(help="inline, or ray.")] = ExecutorName.ray,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make phantom slides, train on them, score them, evaluate, write the report."""
    from slideflow_ray.demo import demo as demo_

    typer.echo(demo_(out.absolute(), executor=executor.value, seed=seed))


@commands.command()
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

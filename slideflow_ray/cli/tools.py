"""Commands for trying things out and looking around."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from slideflow_ray.cli.common import ExecutorName, Json
from slideflow_ray.errors import ConfigError
from slideflow_ray.exits import EXIT_VERIFY

commands = typer.Typer()


class PhantomKind(StrEnum):
    """What the phantoms show."""

    tumour = "tumour"
    kidney = "kidney"
    glomeruli = "glomeruli"
    tem = "tem"


class ScannerName(StrEnum):
    """Whose colours kidney phantoms have: one scanner's, or both by turns."""

    A = "A"
    B = "B"
    AB = "AB"


@commands.command()
def phantoms(
    folder: Annotated[Path, typer.Argument(help="Where to write slides, annotations and cohort.csv.")],
    kind: Annotated[
        PhantomKind,
        typer.Option(help="H&E slides with tumour, HE and PAS slides of kidney, crops of glomeruli, or micrographs."),
    ] = PhantomKind.tumour,
    slides: Annotated[int, typer.Option(min=3, help="Of tumour.")] = 12,
    patients: Annotated[int, typer.Option(min=3, help="Of kidney, glomeruli and tem.")] = 10,
    scanner: Annotated[ScannerName, typer.Option(help="Of kidney and glomeruli.")] = ScannerName.A,
    kinds: Annotated[
        str | None, typer.Option(help="Of kidney and glomeruli, by turns: Normal,FSG+CGN,GS; default: the four alone.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a cohort of generated images with their truth; print where its cohort.csv is."""
    from slideflow_ray.phantoms import write_cohort, write_glomeruli, write_kidney_cohort, write_tem_cohort
    from slideflow_ray.phantoms.glomerulus import KINDS

    shown = KINDS if kinds is None else tuple(name.strip() for name in kinds.split(","))
    if kind == PhantomKind.kidney:
        path = write_kidney_cohort(folder, patients=patients, scanner=scanner.value, kinds=shown, seed=seed)
    elif kind == PhantomKind.glomeruli:
        path = write_glomeruli(folder, patients=patients, scanner=scanner.value, kinds=shown, seed=seed)
    elif kinds is not None:
        raise ConfigError("--kinds needs --kind kidney or glomeruli.")
    elif kind == PhantomKind.tem:
        path = write_tem_cohort(folder, patients=patients, seed=seed)
    else:
        path = write_cohort(folder, slides=slides, seed=seed)
    typer.echo(path)


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
    image: Annotated[str | None, typer.Argument(help="A micrograph: say what is found of it instead.")] = None,
    mpp: Annotated[float | None, typer.Option(help="Its um per pixel, where the file does not say.")] = None,
    privacy: Annotated[Path | None, typer.Option(help="Search this result tree for words instead.")] = None,
    string: Annotated[list[str] | None, typer.Option(help="A word to look for; may be repeated.")] = None,
    strings: Annotated[Path | None, typer.Option(help="A text file of words, one a line.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine can do; of a micrograph its scale bar, scale and window; or search results for words.

    With --privacy the exit code is 5 where results hold one of the words.
    """
    if privacy is not None:
        _search(privacy, string or [], strings, as_json)
        return
    if string or strings:
        raise ConfigError("--string and --strings need --privacy OUT.")
    from slideflow_ray.doctor import examine, look

    found = examine() if image is None else look(image, mpp)
    for name, value in found.items():
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

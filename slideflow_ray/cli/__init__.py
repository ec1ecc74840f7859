"""The command line: one thin command per stage.

Progress and errors go to standard error, data to standard output (``--json`` for
machines). Exit codes: 0 all done, 2 configuration (nothing started), 3 finished with
failures, 4 infrastructure (run again to resume), 5 verification mismatch, 6 drift, 70 bug,
130 interrupted (run again to resume).
"""

from __future__ import annotations

import sys
import traceback
from typing import NoReturn

import typer

from slideflow_ray.cli import answers, bundles, clusters, cohorts, scoring, tools, training
from slideflow_ray.errors import SlideflowError
from slideflow_ray.exits import EXIT_BUG, EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK, code_of

app = typer.Typer(
    name="slideflow-ray",
    help="Distributed batch inference on large pathology slides.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _group in (cohorts, scoring, clusters, answers, training, bundles, tools):  # in this order in --help
    app.add_typer(_group.commands)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with one of the documented codes."""
    try:
        _leave(app(arguments, standalone_mode=False) or EXIT_OK)
    except SlideflowError as error:
        typer.echo(str(error), err=True)
        sys.exit(code_of(error))
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

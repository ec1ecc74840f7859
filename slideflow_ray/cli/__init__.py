"""The command line: one thin command per stage.

Progress and errors go to standard error, data to standard output (``--json`` for
machines). Exit codes: 0 all done, 2 configuration (nothing started), 3 finished with
failures, 4 infrastructure (run again to resume), 5 verification mismatch, 6 drift, 70 bug,
130 interrupted (run again to resume).
"""

from __future__ import annotations

import sys

import typer

from slideflow_ray.cli import answers, bundles, clusters, cohorts, scoring, tools, training
from slideflow_ray.exits import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK, ending

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
    sys.exit(ending(lambda: _called(arguments)))


def _called(arguments: list[str] | None) -> int:
    try:
        code = int(app(arguments, standalone_mode=False) or EXIT_OK)
    except typer.Exit as end:
        code = end.exit_code
    except typer.Abort as end:
        raise KeyboardInterrupt from end
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # the command line's own usage errors
            error.show()
            return EXIT_CONFIG
        raise
    if code == EXIT_INTERRUPTED:  # Typer swallows the interrupt and returns its number
        raise KeyboardInterrupt
    return code

"""Commands that work on a Ray cluster from a machine that is no part of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slideflow_ray.cli.common import Json
from slideflow_ray.errors import ConfigError
from slideflow_ray.exits import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from slideflow_ray.submit.cluster import Cluster
    from slideflow_ray.submit.follow import Client, Submitted
    from slideflow_ray.submit.parcel import Parcel

commands = typer.Typer()

Profile = Annotated[
    str | None, typer.Option(help="Cluster by name, from ~/.config/slideflow-ray/profiles.toml; or NAME@FILE.")
]
Address = Annotated[str | None, typer.Option(help="Job server, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS.")]
AllowOpen = Annotated[bool, typer.Option("--allow-open", help="Talk to a cluster without authentication.")]

ALIASES = {"run": "score", "train": "retrain"}


@commands.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(help="run.toml; or score, tile, evaluate, nightly, retrain, pretrain and arguments."),
    ] = None,
    cohort: Annotated[str | None, typer.Option(help="cohort.csv; sent along if it is here.")] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Bundle on the cluster; sent along if relative.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Output folder on the cluster, or s3://.")] = None,
    profile: Profile = None,
    address: Address = None,
    slides: Annotated[
        str | None, typer.Option(help="Where on the cluster lies what lies beside cohort.csv here.")
    ] = None,
    gpus: Annotated[float, typer.Option(min=0, help="Refuse a cluster with fewer GPUs.")] = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Submit and return; print the job's id.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Run again though the same has finished.")] = False,
    preflight: Annotated[bool, typer.Option(help="Let the job look at uris, bundles and OUT first.")] = True,
    allow_open: AllowOpen = False,
    any_version: Annotated[bool, typer.Option("--any-version", help="Do not mind other versions there.")] = False,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Refuse to upload more.")] = 200,
    python: Annotated[str | None, typer.Option(help="Interpreter on the head; default: python.")] = None,
    as_json: Json = False,
) -> None:
    """Run a job on a Ray cluster and follow it; the same again finds it, or resumes it. Slides are never sent.

    The exit code is the job's. Ctrl-C leaves the job alone.
    """
    from slideflow_ray.submit import cluster as clusters

    cluster = clusters.find_cluster(profile, address, allow_open=allow_open)
    cluster = replace(cluster, python=python or cluster.python, slides=slides or cluster.slides)
    options = {"cohort": cohort, "model": model, "out": out}
    parcel = _parcel(target, list(context.args), {k: v for k, v in options.items() if v}, cluster)
    about = clusters.look(cluster, any_version=any_version, gpus=gpus)
    _say(about.summary())
    _say(clusters.warn_of(cluster))

    from slideflow_ray.submit import follow

    follow.check_size(parcel, max_upload_mb * 2**20)
    client = follow.Client(cluster)
    done = follow.submit(client, parcel, check=preflight, again=again, any_version=any_version)
    _say(_beginning(done, parcel))
    if as_json or detach:
        said = {"job": done.job, "state": done.state, "attempt": done.attempt, "out": parcel.out}
        typer.echo(json.dumps(said) if as_json else done.job)
    if not detach and done.state != "finished":
        _follow(client, done.job)


def _say(text: str) -> None:
    if text:
        typer.echo(text, err=True)


def _beginning(done: Submitted, parcel: Parcel) -> str:
    if done.state == "finished":
        return f"{done.job} has finished already: {parcel.out}. Next: --again runs it again, and scores what is new."
    if done.state == "running":
        return f"{done.job} runs already."
    from slideflow_ray.submit.parcel import KINDS

    more = f", attempt {done.attempt}" if done.attempt > 1 else ""
    if more and not KINDS[parcel.kind].repeats:
        more += ": it resumes"
    return f"{done.job} submitted{more}; {parcel.size / 2**20:.1f} MB sent"


def _parcel(target: str | None, more: list[str], options: dict[str, Any], cluster: Cluster) -> Parcel:
    from slideflow_ray.submit import parcel

    kind = ALIASES.get(target or "", target or "score")
    if kind.endswith(".toml") or kind.startswith("-"):  # settings, or an option of the script's own
        kind, more = "score", [kind, *more]
    if kind not in parcel.KINDS:
        known = ", ".join(parcel.KINDS)
        raise ConfigError(f"{kind!r} is neither a run.toml nor a job; the jobs are {known}.")
    places = parcel.Places(cluster.out, cluster.slides)
    if not parcel.KINDS[kind].settings:
        if not more or options:
            raise ConfigError(f"Give the output folder of a run: slideflow-ray submit {kind} OUT.")
        return parcel.pack_arguments(kind, more[0], _understood(kind, more), places)
    if more and more[0].endswith(".toml"):
        if options:
            raise ConfigError(f"{more[0]} says everything; --{', --'.join(options)} beside it would be ignored.")
        return parcel.pack_settings(kind, more[0], _understood(kind, more), places)
    if len(options) < 3 or kind not in ("score", "tile"):
        what = "run.toml, or --cohort, --model and --out" if kind in ("score", "tile") else f"a .toml file: {kind}.toml"
        raise ConfigError(f"Give {what}.", next_step="slideflow-ray submit --help")
    values = {"cohort": options["cohort"], "out": options["out"], "model": [{"path": p} for p in options["model"]]}
    return parcel.pack_settings(kind, values, _understood(kind, ["settings.toml", *more]), places)


def _understood(kind: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments after the first, which the job's own parser must understand (else it ends with 2)."""
    import runpy

    from slideflow_ray.submit import parcel

    if len(arguments) > 1:
        script = parcel.jobs_folder() / parcel.KINDS[kind].script
        runpy.run_path(str(script))["parser"]().parse_args(list(arguments))
    return list(arguments[1:])


def _follow(client: Client, job: str) -> None:
    from slideflow_ray.submit import follow

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        code = follow.follow(client, job, write)
    except KeyboardInterrupt:
        _say(f"\nLeft alone: {job} goes on. Follow it: slideflow-ray jobs logs {job} --follow")
        _say(f"Stop it: slideflow-ray jobs stop {job}")
        sys.exit(EXIT_INTERRUPTED)
    _say(follow.ended(client.known(job), code))
    if code:
        sys.exit(code)  # 130 of a job that was stopped is no interrupt of this command


# jobs that were submitted

jobs = typer.Typer(help="Look after jobs that were submitted to a cluster.", no_args_is_help=True)
commands.add_typer(jobs, name="jobs", context_settings={"help_option_names": ["-h", "--help"]})

Job = Annotated[str, typer.Argument(metavar="JOB", help="The id that `submit` has said.")]


def _client(profile: str | None, address: str | None, allow_open: bool) -> Client:
    from slideflow_ray.submit.cluster import enter, find_cluster

    cluster = find_cluster(profile, address, allow_open=allow_open)
    enter(cluster)

    from slideflow_ray.submit.follow import Client

    return Client(cluster)


def _about(job: Any) -> dict[str, Any]:
    from slideflow_ray.submit.follow import exit_code

    ended = job.status.is_terminal()
    return {
        "job": job.submission_id,
        "status": str(job.status),
        "exit_code": exit_code(job) if ended else None,
        "out": (job.metadata or {}).get("out", ""),
        "message": "" if ended and exit_code(job) == 0 else (job.message or "").partition("\n")[0],
    }


@jobs.command("list")
def list_jobs(
    profile: Profile = None, address: Address = None, allow_open: AllowOpen = False, as_json: Json = False
) -> None:
    """List the jobs that were submitted with this package, the latest last."""
    from slideflow_ray.submit.follow import ours

    found = [_about(job) for job in ours(_client(profile, address, allow_open))]
    if as_json:
        typer.echo(json.dumps(found))
        return
    for job in found:
        typer.echo("{job} {status} {out}".format(**job))


@jobs.command("status")
def job_status(
    job: Job, profile: Profile = None, address: Address = None, allow_open: AllowOpen = False, as_json: Json = False
) -> None:
    """Say how a job stands; the slides are counted by `slideflow-ray status OUT`."""
    found = _about(_client(profile, address, allow_open).known(job))
    code = "" if found["exit_code"] is None else f", exit code {found['exit_code']}"
    typer.echo(json.dumps(found) if as_json else f"{job}: {found['status']}{code} {found['message']}".rstrip())


@jobs.command("logs")
def job_logs(
    job: Job,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends; exit with its exit code.")] = False,
    profile: Profile = None,
    address: Address = None,
    allow_open: AllowOpen = False,
) -> None:
    """Print what a job has said so far, or follow it."""
    client = _client(profile, address, allow_open)
    client.known(job)
    if follow:
        _follow(client, job)
    else:
        typer.echo(client.get_job_logs(job), nl=False)


@jobs.command("stop")
def job_stop(job: Job, profile: Profile = None, address: Address = None, allow_open: AllowOpen = False) -> None:
    """Stop a job; submitting the same again resumes it."""
    client = _client(profile, address, allow_open)
    client.known(job)
    typer.echo(f"{job} is being stopped" if client.stop_job(job) else f"{job} has ended already")


@jobs.command("report")
def job_report(
    job: Job,
    to: Annotated[Path, typer.Option("--to", help="File to write, or a folder.")] = Path("report.html"),
    profile: Profile = None,
    address: Address = None,
    allow_open: AllowOpen = False,
) -> None:
    """Fetch the report of a job that has ended; print where it is."""
    from slideflow_ray.storage import write_atomic
    from slideflow_ray.submit.follow import report

    to = to / "report.html" if to.is_dir() else to
    write_atomic(to, report(_client(profile, address, allow_open), job))
    typer.echo(to)

"""The first step of a submitted job, on the cluster: look at what is named, then be the job's script.

It is sent along as a file of its own, since a cluster may lack the package, or have another version of it. What it
finds wrong it says in one line each, and the job ends with exit code 2 before anything is started.

    python probe.py jobs/score.py settings.toml
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOLD = "job.json"
NODES = 16
"""So many machines are tried; a cluster's are alike."""
NODE_S = 60.0
"""How long a node may take to try."""
SAMPLE = 20
JOB = "SLIDEFLOW_RAY_JOB"
"""Names the environment variable with the job's submission id."""


def main(arguments: Sequence[str]) -> int:
    """Check, run the script with its arguments, return its exit code."""
    here = Path(__file__).resolve().parent
    told = json.loads((here / TOLD).read_text())
    if wrong := versions(told):
        return refuse(wrong)
    session = join()
    if told["check"]:
        began = time.monotonic()
        wrong, seen = look(told)
        if wrong:
            return refuse(wrong)
        say(f"preflight: {seen} in {time.monotonic() - began:.1f} s")
    for source, target in told["copies"]:
        copy(here / source, target)
    code = perform(arguments)
    if told["report"] and code in (0, 3):  # else what lies there is an earlier job's
        hand_out(told["out"], session)
    return code


def say(text: str) -> None:
    """Say something of the job itself."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def refuse(wrong: Sequence[str]) -> int:
    """Say what is wrong; return the exit code of a configuration that nothing was started with."""
    for line in wrong:
        say(f"E_CONFIG: {line}")
    return 2


def versions(told: dict[str, Any]) -> list[str]:
    """Return what differs between who submitted and the cluster."""
    wrong = []
    try:
        import slideflow_ray  # noqa: F401 - whether it is there
    except ImportError as error:
        step = "Next: install slideflow-ray on every node, or give --python the interpreter that has it."
        return [f"{sys.executable} on the cluster cannot import slideflow_ray: {error}. {step}"]
    from importlib.metadata import version

    found = {"package": version("slideflow-ray"), "python": platform.python_version()}
    named = {"package": "slideflow-ray", "python": "Python"}
    for key, name in named.items():
        if _minor(told[key], key) != _minor(found[key], key) and not told.get("any_version"):
            wrong.append(
                f"The cluster has {name} {found[key]}, who submitted has {told[key]}. "
                "Next: install the same on both sides, or pass --any-version."
            )
    return wrong


def _minor(text: str, key: str) -> str:
    return text if key == "package" else ".".join(text.split(".")[:2])


def join() -> str:
    """Join the job's cluster, which the script then finds joined; return the folder of its session on this node."""
    import ray

    address = os.environ.get("RAY_ADDRESS", "auto")
    context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    return str(getattr(context, "address_info", {}).get("session_dir", ""))


# what a node can see


def look(told: dict[str, Any]) -> tuple[list[str], str]:
    """Return what is wrong, one line each, and a line on what was tried; nothing is left behind."""
    from slideflow_ray import storage

    out = storage.place(told["mark"])
    mark = out / f".preflight-{os.getpid()}"
    made = [] if storage.is_remote(out) else [folder for folder in (out, *out.parents) if not folder.exists()]
    if cause := attempt(lambda: _write(mark)):
        return [f"{out} cannot be written from the cluster: {cause}. {NEXT_OUT}"], ""
    try:
        uris = list(told["uris"])
        wrong = [line for path in told["cohorts"] if (line := _sampled(path, uris))]
        needed = [str(mark), *told["read"]]
        found = everywhere([*needed, *uris])
    finally:
        mark.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's by now
            for folder in made:
                folder.rmdir()
    for node, causes in found.items():
        wrong += [_said(node, path, causes[path], mark) for path in (*needed, "") if path in causes]
        lost = {uri: causes[uri] for uri in uris if uri in causes}
        if lost and 2 * len(lost) < len(uris):  # some slide always fails, and a run goes on without it
            say(f"preflight: {_few(node, lost, len(uris))}; the others go on.")
        elif lost:
            wrong.append(f"{_few(node, lost, len(uris))}. {NEXT_READ}")
    seen = f"{len(found)} machine{'s' * (len(found) > 1)}"
    files = len(told["read"]) + len(uris)
    return wrong, f"looked at {files} files, folders and bundles, and wrote {out}, on {seen}"


NEXT_OUT = "Next: give an `out` that every node sees and may write, or s3://..."
NEXT_READ = "Next: put it where every node sees it under this name (a shared folder, s3://...); slides are not sent."
NEXT_NODE = "Next: look at this node, or pass --no-preflight."


def _write(mark: Path) -> None:
    from slideflow_ray import storage

    mark.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(mark, b"slideflow-ray looks whether it may write here\n")


def _sampled(path: str, uris: list[str]) -> str:
    """Add some of the uris of a cohort on the cluster; return what is wrong with it."""
    from slideflow_ray.cohort import read_cohort

    found: list[str] = []
    if cause := attempt(lambda: found.extend(item.uri for item in read_cohort(path))):
        return f"The cohort {path} cannot be used on the cluster: {cause}. {NEXT_READ}"
    uris += found[:: -(-len(found) // SAMPLE)][:SAMPLE]
    return ""


def everywhere(paths: Sequence[str]) -> dict[str, dict[str, str]]:
    """Try to read `paths` on each node; return for each what it cannot read, and why (by "": why it said nothing)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    here = ray.get_runtime_context().get_node_id()
    own = next((node["NodeManagerHostname"] for node in nodes if node["NodeID"] == here), "the head")
    task = ray.remote(num_cpus=0, max_retries=0)(unreadable)
    asked = {}
    for name, node in _others(nodes, own).items():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[task.options(scheduling_strategy=there).remote(list(paths))] = name
    found = {own: unreadable(paths)}  # without a worker, which takes seconds to start
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_S) if asked else ([], [])
    found |= {asked[ref]: {"": f"no answer in {NODE_S:g} s"} for ref in late}
    for ref in ready:
        try:
            found[asked[ref]] = ray.get(ref)
        except ray.exceptions.RayError as error:
            found[asked[ref]] = {"": _first(error)}
    return found


def _others(nodes: Sequence[dict[str, Any]], own: str) -> dict[str, str]:
    """A node of each machine but our own, by its name; nodes of one machine see the same files."""
    found = {node["NodeManagerHostname"]: node["NodeID"] for node in nodes}
    return {name: found[name] for name in sorted(found)[:NODES] if name != own}


def _said(node: str, path: str, cause: str, mark: Path) -> str:
    if not path:
        return f"{node}: {cause}. {NEXT_NODE}"
    if path == str(mark):
        return f"{node} does not see what another node writes to {mark.parent}: {cause}. {NEXT_OUT}"
    return f"{node} cannot read {path}: {cause}. {NEXT_READ}"


def _few(node: str, lost: dict[str, str], of: int) -> str:
    uri, cause = next(iter(lost.items()))
    return f"{node} cannot read {len(lost)} of {of} files that the cohort names, as {uri}: {cause}"


def unreadable(paths: Sequence[str]) -> dict[str, str]:
    """Return those of some files and folders that cannot be read from here, with the cause."""
    tried = {path: attempt(lambda path=path: _read(path)) for path in paths}  # type: ignore[misc]
    return {path: cause for path, cause in tried.items() if cause}


def _read(uri: str) -> None:
    """Read a byte, or list a folder. Raises what stands in the way."""
    from slideflow_ray import storage

    if storage.is_remote(uri):
        from slideflow_ray.remote import look as look_at

        look_at(uri)
        return
    path = storage.local_path(uri)
    if path.is_dir():
        next(path.iterdir(), None)
    else:
        with path.open("rb") as file:
            file.read(1)


def attempt(work: Callable[[], object]) -> str:
    """Do some work; return "" or why it failed, in one line."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - whatever stands in the way is what is looked for
        return _first(error)
    return ""


def _first(error: BaseException) -> str:
    text = getattr(error, "message", "") or getattr(error, "strerror", "") or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0][:300].rstrip(". ")


# the job


def copy(source: Path, target: str) -> None:
    """Put a bundle that was sent along where all nodes see it; its name says what it holds, so once is enough."""
    from slideflow_ray import storage

    for file in sorted(
        source.iterdir(), key=lambda file: file.name == "bundle.json"
    ):  # the card last: then all is there
        storage.create(storage.place(f"{target}/{file.name}"), file.read_bytes())


def perform(arguments: Sequence[str]) -> int:
    """Be the script. Stopping the job interrupts it; Ray's own answer to SIGTERM is a dump of the stack."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.argv = list(arguments)
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt:  # while the script still imports; later it says so itself
        say("Stopped before it began.")
        return 130
    return 0


def hand_out(out: str, session: str) -> None:
    """Leave the report where the job server finds it (`slideflow-ray jobs report`)."""
    from slideflow_ray import storage

    report, logs = storage.place(out) / "report.html", Path(session) / "logs"
    if job := os.environ.get(JOB):
        with contextlib.suppress(OSError):  # a convenience: the report stands in `out` either way
            (logs / f"report-{job}.html").write_bytes(report.read_bytes())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

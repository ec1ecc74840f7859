"""How every item ends, run after run: quarantine, failures, wrong checksums, NaN; and two runs on one folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slideflow_ray import cli
from slideflow_ray.accounting import read_run, status
from slideflow_ray.errors import LeaseError
from slideflow_ray.events import ChunkScored
from slideflow_ray.execute import inline
from slideflow_ray.models.bundle import load_weights, read_card, write_bundle
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec
from slideflow_ray.store import tree_digest, verify
from slideflow_ray.testing import MARK, end_marked

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def reference(marked, bundles, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    run(spec_of(marked / "cohort.csv", out, bundles["aligned"]))
    return out


def values_of(cohort: Path, out: Path, *bundles: Path, **executor: object) -> dict:
    """What run.toml says, as a dict; `executor` is laid over two inline workers."""
    return {
        "cohort": str(cohort),
        "out": str(out),
        "model": [{"path": str(bundle)} for bundle in bundles],
        "store": {"chunk_rows": 32},
        "executor": {"kind": "inline", "workers": 2, **executor},
        "compute": {"device": "cpu"},
    }


def spec_of(cohort: Path, out: Path, *bundles: Path) -> RunSpec:
    return RunSpec.parse(values_of(cohort, out, *bundles), "test")


def write_toml(values: dict, path: Path) -> Path:
    """The same as a file; TOML writes these scalars as JSON does."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if isinstance(value, str)]
    for model in values["model"]:
        lines += ["[[model]]", *(f"{k} = {json.dumps(v)}" for k, v in model.items() if k != "where")]
        lines += ["[model.where]", *(f"{k} = {json.dumps(v)}" for k, v in model.get("where", {}).items())]
    for key in ("store", "executor", "compute"):
        lines += [f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in values[key].items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def same_scores(out: Path, reference: Path) -> None:
    """The same files of scores, byte for byte; the stores tell different places of the slides."""
    found = [{p.relative_to(o): p.read_bytes() for p in o.glob("slides/*/scores/*/*/c/*/0")} for o in (out, reference)]
    assert found[0] == found[1] != {}


def command(capsys, *words: object) -> tuple[int, str, str]:
    """Run the command line here; return its exit code and what it said."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def adds_up(out: Path, **counts: int) -> None:
    """The record, the outcomes, failures.csv and `status` tell the same, and together they are the cohort."""
    record, now = read_run(out), status(out)
    wanted = {"done": 0, "failed": 0, "refused": 0, **counts}
    assert record["counts"] == wanted
    assert {key: now[key] for key in wanted} == wanted
    assert (now["state"], now["slides"]) == ("finished", sum(wanted.values()))
    assert sum(wanted.values()) == len(record["items"]) == len(record["outcomes"])
    ended = [outcome["status"] for outcome in record["outcomes"].values()]
    assert {key: ended.count(key) for key in wanted} == wanted
    lines = (out / "failures.csv").read_text().splitlines()[1:]
    assert len(lines) == len(now["failures"]) == wanted["failed"] + wanted["refused"]


def test_who_is_quarantined_waits_for_retry_and_who_failed_does_not(marked, bundles, reference, tmp_path, capsys):
    folder, out = tmp_path / "cohort", tmp_path / "out"
    shutil.copytree(marked, folder)
    (folder / "c.tif").rename(folder / "elsewhere.tif")
    values = values_of(folder / "cohort.csv", out, bundles["aligned"], workers=1)
    toml = write_toml(values, tmp_path / "run.toml")
    original = inline.ReaderProcess.give

    def give(self, task):
        original(self, task)
        if task.slide_id == "b" and task.stage == "chunk":
            self.process.kill()

    inline.ReaderProcess.give = give
    try:
        first = run(RunSpec.parse(values, "test"))
    finally:
        inline.ReaderProcess.give = original
    assert {e.slide_id: (e.status, e.code) for e in first.ended} == {
        "a": ("done", ""),
        "b": ("refused", "E_QUARANTINE"),
        "c": ("failed", "E_NOT_FOUND"),
    }
    adds_up(out, done=1, failed=1, refused=1)

    (folder / "elsewhere.tif").rename(folder / "c.tif")
    written = (out / "failures/b.json").stat().st_mtime_ns
    code, _, said = command(capsys, "run", toml)
    assert code == 3
    adds_up(out, done=2, refused=1)
    assert (out / "failures/b.json").stat().st_mtime_ns == written  # nobody has tried it
    assert "b: E_QUARANTINE b killed its worker 2 times while alone" in said
    assert "run with --retry" in said

    code, said, _ = command(capsys, "run", toml, "--retry", "--json")
    assert code == 0
    assert json.loads(said)["done"] == 3
    adds_up(out, done=3)
    same_scores(out, reference)


def test_a_wrong_checksum_in_the_cohort_is_found_before_anything_is_scored(
    marked, bundles, reference, tmp_path, capsys
):
    out = tmp_path / "out"
    sums = {name: hashlib.sha256((marked / f"{name}.tif").read_bytes()).hexdigest() for name in "abc"}

    def cohort(**given: str) -> Path:
        rows = "".join(f"{name},{marked / name}.tif,tem,{given[name]}\n" for name in "abc")
        (tmp_path / "cohort.csv").write_text(f"slide_id,uri,modality,sha256\n{rows}")
        return tmp_path / "cohort.csv"

    events = []
    values = values_of(cohort(a=sums["a"], b=sums["c"], c=sums["c"].upper()), out, bundles["aligned"])
    run(RunSpec.parse(values, "test"), listen=events.append)
    outcome = read_run(out)["outcomes"]["b"]
    assert (outcome["status"], outcome["code"]) == ("failed", "E_READ")
    assert sums["b"] in outcome["message"]
    assert sums["c"] in outcome["message"]
    assert {e.slide_id for e in events if isinstance(e, ChunkScored)} == {"a", "c"}
    assert not (out / "slides/b.zarr").exists()
    adds_up(out, done=2, failed=1)

    cohort(**sums)
    assert command(capsys, "run", write_toml(values, tmp_path / "run.toml"))[0] == 0
    adds_up(out, done=3)
    same_scores(out, reference)


@pytest.fixture(scope="module")
def nan_bundle(bundles, tmp_path_factory) -> Path:
    """A network one of whose weights is not a number."""
    folder = tmp_path_factory.mktemp("nan") / "nan"
    weights = load_weights(bundles["aligned"])
    name = next(name for name, value in weights.items() if value.is_floating_point() and value.ndim > 1)
    weights = {key: value.clone() for key, value in weights.items()}
    weights[name].view(-1)[0] = float("nan")
    write_bundle(folder, read_card(bundles["aligned"]).model_copy(update={"name": "nan"}), weights)
    return folder


@pytest.mark.parametrize("kind", ["inline", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.soak])])
def test_a_model_that_gives_nan_fails_its_slides_and_leaves_no_hole(
    kind, marked, bundles, nan_bundle, reference, tmp_path, capsys, request
):
    if kind == "ray":
        request.getfixturevalue("local_ray")
    out, cohort = tmp_path / "out", tmp_path / "cohort.csv"
    rows = "".join(f"{name},{marked / name}.tif,tem,{stain}\n" for name, stain in zip("abc", "xyx", strict=True))
    cohort.write_text(f"slide_id,uri,modality,stain\n{rows}")
    values = values_of(cohort, out, bundles["aligned"], nan_bundle, kind=kind)
    values["model"][1]["where"] = {"stain": "y"}
    if kind == "ray":  # it is there: asking a worker for it takes longer than the run
        shutil.copytree(reference / "profiles", out / "profiles")
    code, _, said = command(capsys, "run", write_toml(values, tmp_path / "run.toml"))
    assert code == 3
    assert "b: E_NAN_SCORE nan gave " in said
    adds_up(out, done=2, failed=1)
    assert {k: v["code"] for k, v in read_run(out)["outcomes"].items()} == {"a": "", "b": "E_NAN_SCORE", "c": ""}
    assert verify(out)[1] == []
    assert not list(out.glob("commits/b/scores/*/nan-*"))
    assert not list(out.glob("slides/b.zarr/scores/*/nan-*/c"))


@pytest.fixture
def going_on(marked, bundles, tmp_path):
    """A run in a process of its own that stands still in the middle of slide b, the others done, until it is freed."""
    strikes, out = tmp_path / "strikes", tmp_path / "out"
    strikes.mkdir()
    values = values_of(marked / "cohort.csv", out, bundles["aligned"], task_deadline_s=300)
    (tmp_path / "spec.json").write_text(json.dumps(values))
    env = {**os.environ, MARK: str(strikes), "PYTHONPATH": str(ROOT)}
    env |= {"DRIVE_FAULT": "a later read that hangs", "DRIVE_FOLDER": str(strikes)}
    drive = [sys.executable, "-m", "tests.drive", str(tmp_path / "spec.json")]
    process = subprocess.Popen(drive, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    yield process, values, out, strikes
    end_marked(str(strikes))
    process.communicate()


def until(process: subprocess.Popen[bytes], said) -> None:
    """Wait until `said()` holds, while the process lives."""
    deadline = time.monotonic() + 60
    while not said():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pid_in(struck: Path) -> int:
    """The process that was struck; 0 before."""
    return int(struck.read_text() or 0) if struck.exists() else 0


def test_status_tells_of_a_run_that_goes_on_and_a_second_run_is_kept_out(going_on, reference, tmp_path, capsys):
    process, values, out, strikes = going_on
    struck = strikes / "strike-0"
    until(process, lambda: (out / "run.json").exists() and status(out)["done"] == 2 and pid_in(struck))
    counts = {"slides": 3, "done": 2, "failed": 0, "refused": 0, "failures": []}
    assert status(out) == {"state": "running", **counts}
    assert json.loads(command(capsys, "status", out, "--json")[1]) == {"state": "running", **counts}

    before = tree_digest(out)
    with pytest.raises(LeaseError, match=f"in use by process {process.pid} on "):
        run(RunSpec.parse(values, "test"))
    code, said, why = command(capsys, "run", write_toml(values, tmp_path / "run.toml"))
    assert (code, said) == (4, "")
    assert f"E_LEASE: {out} is in use by process {process.pid} on " in why
    assert "Wait for the other run" in why
    assert tree_digest(out) == before
    assert status(out)["state"] == "running"

    os.kill(pid_in(struck), signal.SIGKILL)  # the reader that hangs: its task is done anew, and no other reader's
    assert process.wait(timeout=60) == 0
    adds_up(out, done=3)
    assert command(capsys, "status", out)[1] == "finished; done 3, failed 0, refused 0\n"
    assert tree_digest(out) == tree_digest(reference)

"""The fault table over both executors: nothing lost, the same bytes, and every failure with its cause."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slideflow_ray.accounting import read_run
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec
from slideflow_ray.store import tree_digest
from slideflow_ray.testing import FAULTS, MARK, end_marked

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = {
    "inline": [
        "killed inside a later write of a chunk's tiles",
        "stopped while reading",
        "a read that hangs",
    ],
    "ray": ["killed while scoring in the middle", "stopped while reading"],
}
"""What `make test` runs; `pytest -m soak` runs all."""


def rows(executor: str) -> list:
    return [pytest.param(name, marks=[] if name in SAMPLE[executor] else [pytest.mark.soak]) for name in FAULTS]


def values(marked: Path, bundles: dict[str, Path], out: Path, **executor: object) -> dict:
    return {
        "cohort": str(marked / "cohort.csv"),
        "out": str(out),
        "model": [{"path": str(bundles["aligned"])}],
        "store": {"chunk_rows": 32},
        "executor": {"kind": "inline", "workers": 2, "task_deadline_s": 4, "silence_s": 2, **executor},
        "compute": {"device": "cpu"},
    }


@pytest.fixture(scope="module")
def reference(marked, bundles, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    run(RunSpec.parse(values(marked, bundles, out), "test"))
    return out


@pytest.fixture
def strikes(tmp_path):
    """A folder that counts strikes and marks the processes of the runs that have it, which end with the test."""
    folder = tmp_path / "strikes"
    folder.mkdir()
    yield folder
    end_marked(str(folder))


def drive(spec: dict, fault: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "spec.json").write_text(json.dumps(spec))
    env = {**os.environ, MARK: str(folder), "PYTHONPATH": str(ROOT)}
    env |= {"DRIVE_FAULT": fault, "DRIVE_FOLDER": str(folder)} if fault else {}
    command = [sys.executable, "-m", "tests.drive", str(folder / "spec.json")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=env)


def strays(out: Path) -> list[Path]:
    return [p for p in out.rglob("*") if p.name.endswith((".partial", ".tmp")) or p.name == "lease.json"]


def gives_up(ended: subprocess.CompletedProcess[str], executor: str) -> None:
    """A run that no run can end says why, with code 4."""
    assert ended.returncode == 4, ended.stderr[-3000:]
    said = {
        "inline": "killed its process, now and in the run before: SIGKILL",
        "ray": "died 8 times without doing a task; giving up. The last time: ",
    }
    assert said[executor] in ended.stderr
    assert "run the same command again" in ended.stderr or "the next run" in ended.stderr


def as_the_table_says(name: str, spec: dict, strikes: Path, reference: Path) -> None:
    executor, out = spec["executor"]["kind"], Path(spec["out"])
    fault = FAULTS[name]
    ends = fault.ends_on(executor)
    ended = drive(spec, name, strikes)
    assert list(strikes.glob("strike-*")), ended.stderr[-3000:] + ended.stdout[-2000:]
    assert len(list(strikes.glob("pass-*"))) == fault.after
    if ends in ("resumes", "dies, then gives up"):
        assert ended.returncode == -9
    if ends == "dies, then gives up":
        ended = drive(spec, name, strikes)
    if ends.endswith("gives up"):
        gives_up(ended, executor)
    if ends in ("resumes", "gives up", "dies, then gives up"):
        ended = drive(spec, "", strikes)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert strays(out) == []
    outcomes = read_run(out)["outcomes"]
    if ends.startswith("E_"):
        assert {k: v["code"] for k, v in outcomes.items()} == {"a": "", "b": ends, "c": ""}
        assert f"b,{outcomes['b']['status']},{ends}," in (out / "failures.csv").read_text()
        drive(spec, "", strikes)
        assert (outcomes["b"]["status"] == "refused") == (read_run(out)["outcomes"]["b"]["status"] == "refused")
    else:
        assert {v["status"] for v in outcomes.values()} == {"done"}
        assert tree_digest(out) == tree_digest(reference)


@pytest.mark.parametrize("name", rows("inline"))
def test_inline_every_fault_ends_as_the_table_says(name, marked, bundles, reference, strikes, tmp_path):
    as_the_table_says(name, values(marked, bundles, tmp_path / "out"), strikes, reference)


@pytest.mark.ray
@pytest.mark.parametrize("name", rows("ray"))
def test_under_ray_every_fault_ends_as_the_table_says(name, marked, bundles, reference, strikes, tmp_path, local_ray):
    import ray

    address = ray.get_runtime_context().gcs_address
    spec = values(marked, bundles, tmp_path / "out", kind="ray", address=address)
    shutil.copytree(reference / "profiles", tmp_path / "out/profiles")  # asking a worker for it takes five seconds
    as_the_table_says(name, spec, strikes, reference)

"""The fault table over both executors: nothing lost, the same bytes, and every failure with its cause."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slideflow_ray.accounting import read_run
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec
from slideflow_ray.store import tree_digest
from slideflow_ray.testing import FAULTS

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = [
    "killed inside a chunk's write",
    "stopped while reading",
    "a read that hangs",
]
"""What `make test` runs; `pytest -m soak` runs all."""


def values(marked: Path, bundles: dict[str, Path], out: Path, kind: str = "inline") -> dict:
    executor = {"kind": kind, "workers": 2, "task_deadline_s": 4, "silence_s": 2}
    return {
        "cohort": str(marked / "cohort.csv"),
        "out": str(out),
        "model": [{"path": str(bundles["aligned"])}],
        "store": {"chunk_rows": 32},
        "executor": executor,
        "compute": {"device": "cpu"},
    }


@pytest.fixture(scope="module")
def reference(marked, bundles, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    run(RunSpec.parse(values(marked, bundles, out), "test"))
    return out


def drive(spec: dict, fault: str, folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "tests.drive", str(folder / "spec.json"), fault, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def strays(out: Path) -> list[Path]:
    return [p for p in out.rglob("*") if p.name.endswith(".partial") or p.name == "lease.json"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SAMPLE else [pytest.mark.soak]) for n in FAULTS])
def test_inline_every_fault_ends_as_the_table_says(name, marked, bundles, reference, tmp_path):
    fault, out = FAULTS[name], tmp_path / "out"
    spec = values(marked, bundles, out)
    ended = drive(spec, name, tmp_path / "strikes")
    assert list((tmp_path / "strikes").glob("strike-*")), ended.stderr[-3000:] + ended.stdout[-2000:]
    if fault.ends == "gives up":
        assert ended.returncode == -9
        ended = drive(spec, name, tmp_path / "strikes")
        assert ended.returncode == 4
        assert "killed its process, now and in the run before: SIGKILL" in ended.stderr
    if fault.ends in ("resumes", "gives up"):
        assert ended.returncode in (-9, 4)
        ended = drive(spec, "none", tmp_path / "strikes")
    assert ended.returncode == 0, ended.stderr
    assert strays(out) == []
    outcomes = read_run(out)["outcomes"]
    if fault.ends.startswith("E_"):
        assert {k: v["code"] for k, v in outcomes.items()} == {"a": "", "b": fault.ends, "c": ""}
        assert f"b,{outcomes['b']['status']},{fault.ends}," in (out / "failures.csv").read_text()
        ended = drive({**spec, "out": str(out)}, "none", tmp_path / "strikes")
        assert (outcomes["b"]["status"] == "refused") == (read_run(out)["outcomes"]["b"]["status"] == "refused")
    else:
        assert {v["status"] for v in outcomes.values()} == {"done"}
        assert tree_digest(out) == tree_digest(reference)

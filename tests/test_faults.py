"""The fault table over both executors: nothing lost, the same bytes, and every failure with its cause."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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
    "ray": ["killed while scoring in the middle"],
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
    if fault.act not in ("hang", "stop"):  # a busy machine must not meet deadlines that this row is not about
        spec["executor"] |= {"task_deadline_s": 120, "silence_s": 60}
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


# nodes


@pytest.fixture(scope="module")
def many(marked, bundles, tmp_path_factory) -> dict:
    """What run.toml says of thirty slides in small chunks, and an undisturbed run of it."""
    folder = tmp_path_factory.mktemp("many")
    rows = "".join(f"{name}{i},{marked / name}.tif,tem\n" for i in range(10) for name in "abc")
    (folder / "cohort.csv").write_text(f"slide_id,uri,modality\n{rows}")
    spec = values(folder, bundles, folder / "out", task_deadline_s=300, silence_s=60) | {"store": {"chunk_rows": 8}}
    run(RunSpec.parse(spec, "test"))
    return spec


@pytest.fixture
def cluster(strikes, monkeypatch, ray_env):
    """A Ray of two nodes of one core each, with ports and processes of its own."""
    from ray.cluster_utils import Cluster

    short = Path(tempfile.mkdtemp(prefix="nodes"))  # the names of sockets are short
    monkeypatch.setenv(MARK, str(strikes))
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    worker = made.add_node(num_cpus=1)
    yield made.gcs_address, _pids(made.head_node), _pids(worker)
    end_marked(str(strikes))
    made.shutdown()
    shutil.rmtree(short, ignore_errors=True)


def _pids(node) -> list[int]:
    """The processes of a node's own, the GCS among the head's; its workers die with its raylet."""
    return [info.process.pid for name in ("gcs_server", "raylet") for info in node.all_processes.get(name, [])]


def struck(spec: dict, address: str, out: Path, strikes: Path, victims: list[int]) -> tuple[int, str, float]:
    """Start a run on a cluster, kill these processes when some slides are done; return how, and how soon, it ended."""
    told = {**spec, "out": str(out), "executor": {**spec["executor"], "kind": "ray", "address": address}}
    (strikes / "spec.json").write_text(json.dumps(told))
    command = [sys.executable, "-m", "tests.drive", str(strikes / "spec.json")]
    env = {**os.environ, MARK: str(strikes), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while len(list(out.glob("commits/*/scores"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    said = process.communicate(timeout=240)[0]
    return process.returncode, said, time.monotonic() - began


@pytest.mark.soak
@pytest.mark.ray
def test_a_node_that_is_lost_costs_its_work_and_nothing_else(many, cluster, strikes, tmp_path):
    address, _, worker = cluster
    code, said, _ = struck(many, address, tmp_path / "out", strikes, worker)
    assert code == 0, said
    assert "WorkerDied" in said
    assert "E_QUARANTINE" not in said
    assert strays(tmp_path / "out") == []
    assert tree_digest(tmp_path / "out") == tree_digest(Path(many["out"]))


@pytest.mark.soak
@pytest.mark.ray
def test_a_head_that_is_lost_ends_the_driver_soon_and_the_run_goes_on_elsewhere(many, cluster, strikes, tmp_path):
    address, head, _ = cluster
    code, said, seconds = struck(many, address, tmp_path / "out", strikes, head)
    assert code == 4, said
    assert seconds < 90
    assert "E_INFRA: " in said
    assert "is gone" in said
    assert "run the same command again: it resumes" in said
    again = drive({**many, "out": str(tmp_path / "out")}, "", strikes)
    assert again.returncode == 0, again.stderr
    assert strays(tmp_path / "out") == []
    assert tree_digest(tmp_path / "out") == tree_digest(Path(many["out"]))

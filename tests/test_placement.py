"""Where the workers of a run stand: shares of a GPU, more workers than places, nodes that come and go."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import pytest

from slideflow_ray.cohort import Item
from slideflow_ray.errors import InfrastructureError, ProfileError
from slideflow_ray.events import ChunkScored, RunStarted
from slideflow_ray.execute import Lost, Staffed, Task
from slideflow_ray.execute.on_ray import START_TIMEOUT_S, RayPool, Worker, _reader_share
from slideflow_ray.execute.parts import Parts
from slideflow_ray.pipeline import Chunk
from slideflow_ray.run import run
from slideflow_ray.specs import ExecutorSpec, RunSpec, TileSpec
from slideflow_ray.store import SlideStore, tree_digest
from slideflow_ray.testing import MARK, end_marked

ROOT = Path(__file__).resolve().parent.parent


# arithmetic


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


@pytest.mark.parametrize(
    ("nodes", "share", "readers", "each"),
    [
        ([node(16), node(4, 2)], 1.0, 4, 0.4),  # the head's sixteen are of no use to a GPU elsewhere
        ([node(12, 2)], 1.0, 4, 1.0),
        ([node(12, 2), node(4, 1)], 1.0, 4, 0.8),  # the scarcest
        ([node(12, 2), node(1, 1, alive=False)], 1.0, 4, 1.0),
        ([node(2, 2)], 0.5, 1, 0.25),
        ([node(8)], 1.0, 4, 1.0),
    ],
)
def test_a_scorer_and_its_readers_fit_on_each_node(nodes, share, readers, each):
    assert _reader_share(nodes, share, readers) == each


# a pool of stand-ins


class Remote:
    """What an actor's method is to the pool: it counts calls and returns a name for the answer."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def remote(self, *arguments: object) -> str:
        self.calls.append(arguments)
        return f"answer {len(self.calls)}"


class Actor:
    def __init__(self) -> None:
        self.read, self.score, self.perform = Remote(), Remote(), Remote()


def bare_pool(**spec: object) -> RayPool:
    pool = RayPool.__new__(RayPool)
    pool.spec, pool.gpus, pool.workers = ExecutorSpec(kind="ray", **spec), 2, 2
    pool._parts, pool._workers, pool._given_up, pool._told = Parts(), [], 0, 2
    pool._waiting = deque()
    return pool


def chunk(*models: str) -> Task:
    item = Item(slide_id="a", uri="/a.svs")
    return Task("chunk", "a", Chunk(item, "g", TileSpec(tile_px=64, mpp=0.5), 0, 10, models))


def test_apart_a_chunk_is_read_once_for_all_its_scorers():
    pool = bare_pool(models="apart")
    shares = [frozenset([name]) for name in ("m", "n")]
    pool._parts = Parts(shares)
    workers = [Worker(str(i), i, actors=[Actor(), Actor(), Actor()], models=share) for i, share in enumerate(shares)]
    task = chunk("m", "n")
    parts = pool._parts.split(task)
    assert [part.payload.models for part in parts] == [("m",), ("n",)]
    for worker, part in zip(workers, parts, strict=True):
        pool._send(worker, part)
    reads = [actor.read.calls for worker in workers for actor in worker.actors if actor.read.calls]
    assert reads == [[(parts[0],)]]
    assert [worker.actors[0].score.calls[0][1] for worker in workers] == ["answer 1", "answer 1"]


@pytest.fixture
def killed(monkeypatch) -> list:
    found: list = []
    monkeypatch.setattr("slideflow_ray.execute.on_ray.ray.kill", found.append)
    monkeypatch.setattr("slideflow_ray.execute.on_ray.is_gone", lambda node: False)
    return found


def test_a_worker_that_computes_otherwise_gets_no_work_and_keeps_its_place(killed):
    pool = bare_pool()
    fit, other = Worker("fit", 0, node="n0"), Worker("other", 1, actors=["actor"], node="n1", loading=["due"])
    pool._workers = [fit, other]
    (lost,) = pool._unfit(other, ProfileError("another GPU"))
    assert isinstance(lost, Lost)
    assert lost.blameless
    assert "another GPU" in lost.cause
    assert killed == []
    assert pool._place_for(chunk("m")) is fit
    assert pool._staffed() == [Staffed(1)]
    assert pool._staffed() == []
    fit.loading = ["due"]
    assert pool._place_for(chunk("m")) is None
    with pytest.raises(ProfileError):
        pool._unfit(fit, ProfileError("this one too"))


def test_one_without_a_place_waits_as_long_as_another_works(killed, monkeypatch):
    monkeypatch.setattr("slideflow_ray.execute.on_ray.ray.wait", lambda refs, **_: ([], refs))
    pool = bare_pool()
    up, placeless = Worker("up", 0, node="n0"), Worker("placeless", 1, loading=["due"])
    pool._workers = [up, placeless]
    assert pool._settle(placeless, START_TIMEOUT_S + 1) == []
    assert pool._workers == [up, placeless]
    assert pool.room == pool.limit  # only of the one that is up
    hung = Worker("hung", 2, node="n0", loading=["due"])  # it has a place, and does not answer
    pool._workers.append(hung)
    (lost,) = pool._settle(hung, START_TIMEOUT_S + 1)
    assert lost.cause == "it did not come up"
    assert pool._workers == [up, placeless]
    pool._workers = [placeless]
    with pytest.raises(InfrastructureError, match="no node has a free GPU"):
        pool._settle(placeless, 1)


# runs


def values(folder: Path, bundles: dict[str, Path], out: Path, **executor: object) -> dict:
    return {
        "cohort": str(folder / "cohort.csv"),
        "out": str(out),
        "model": [{"path": str(bundles["aligned"])}],
        "executor": executor,
        "store": {"chunk_rows": 8},
    }


@pytest.mark.ray
@pytest.mark.soak
def test_shares_of_a_gpu_and_fewer_places_than_workers(marked, bundles, tmp_path, local_ray):
    run(RunSpec.parse(values(marked, bundles, tmp_path / "inline"), "test"))
    from ray.util import placement_group_table

    events, groups = [], []

    def listen(event: object) -> None:
        events.append(event)
        if isinstance(event, ChunkScored) and not groups:
            mine = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
            groups.extend((g["state"], g["bundles"][0]["GPU"]) for g in mine)

    shared = values(marked, bundles, tmp_path / "out", kind="ray", readers_per_gpu=1, gpu_share=0.5, workers=5)
    run(RunSpec.parse(shared, "test"), listen=listen)
    assert next(e.workers for e in events if isinstance(e, RunStarted)) == 4
    assert sorted(groups) == 4 * [("CREATED", 0.5)] + [("PENDING", 0.5)]  # two on each of two GPUs, one waits
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "inline")


@pytest.fixture
def cluster(tmp_path, monkeypatch, ray_env):
    """A Ray of one node of one core, with ports and processes of its own."""
    from ray.cluster_utils import Cluster

    short = Path(tempfile.mkdtemp(prefix="nodes"))  # the names of sockets are short
    monkeypatch.setenv(MARK, str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    end_marked(str(tmp_path))
    made.shutdown()
    shutil.rmtree(short, ignore_errors=True)


def wait_for(log: Path, what: str, process: subprocess.Popen, times: int = 1) -> str:
    deadline = time.monotonic() + 150
    while len(re.findall(what, said := log.read_text())) < times:
        assert process.poll() is None, said[-3000:]
        assert time.monotonic() < deadline, said[-3000:]
        time.sleep(0.05)
    return said


@pytest.mark.soak
@pytest.mark.ray
def test_a_node_that_joins_is_used_and_one_that_goes_loses_nothing(marked, bundles, cluster, tmp_path):
    rows = "".join(f"{name}{i},{marked / name}.tif,tem\n" for i in range(30) for name in "abc")
    (tmp_path / "cohort.csv").write_text(f"slide_id,uri,modality\n{rows}")
    run(RunSpec.parse(values(tmp_path, bundles, tmp_path / "inline"), "test"))
    told = values(tmp_path, bundles, tmp_path / "out", kind="ray", address=cluster.gcs_address)
    (tmp_path / "spec.json").write_text(json.dumps(told))
    command = [sys.executable, "-u", "-m", "tests.drive", str(tmp_path / "spec.json")]
    env = {**os.environ, MARK: str(tmp_path), "PYTHONPATH": str(ROOT)}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
    wait_for(log, r"ChunkScored\(", process, 3)
    assert "RunStarted(slides=90, models=('aligned',), executor='ray', workers=1)" in log.read_text()
    joined = cluster.add_node(num_cpus=1)
    wait_for(log, r"WorkersChanged\(workers=2\)", process)
    said = wait_for(log, r"ChunkScored\(", process, len(re.findall(r"ChunkScored\(", log.read_text())) + 40)
    assert len(set(re.findall(r"worker='([^']+)'", said))) >= 2
    for info in joined.all_processes["raylet"]:
        os.kill(info.process.pid, signal.SIGKILL)
    assert process.wait(timeout=240) == 0, log.read_text()[-3000:]
    said = log.read_text()
    assert "WorkerDied(" in said
    assert "E_QUARANTINE" not in said
    assert re.findall(r"WorkersChanged\(workers=(\d+)\)", said)[:2] == ["2", "1"]
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "inline")


@pytest.mark.parametrize("kind", ["rows", "plane"])
def test_a_worker_of_a_lost_node_that_still_creates_an_array_harms_nobody(kind, tmp_path, monkeypatch):
    """A node counts as lost before the last of its workers has ended: its slide is planned by two for a moment."""
    store = SlideStore(tmp_path, "a")

    def create() -> None:
        if kind == "rows":
            store.create_rows("focus/g", (10,), "float32", 5, fill=float("nan"))
        else:
            store.create_plane("planes/g", (8, 8), 4, 8, fill=255)

    create()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(SlideStore, "has", lambda self, key: False)  # both looked before either had made it
    create()
    assert before
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# the schedule simulator


def test_the_simulated_schedule_takes_as_long_as_the_work_allows():
    spec = importlib.util.spec_from_file_location("schedule", ROOT / "benchmarks/schedule.py")
    schedule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schedule)
    times = {"plan": [0.5], "read": [0.25], "forward": [2.0], "derive": [0.0]}
    found = schedule.one(4, 50, 8, times)
    bound_h = found["chunks"] * 2.0 / 4 / 3600  # forward passes alone, evenly spread
    assert bound_h <= found["hours"] < 1.05 * bound_h
    assert found["busy"] == pytest.approx(bound_h / found["hours"])
    assert found["of_work"] < 0.01
    slow_readers = schedule.one(4, 50, 8, {**times, "read": [16.0]})
    bound_h = found["chunks"] * 16.0 / (4 * schedule.READERS) / 3600
    assert bound_h <= slow_readers["hours"] < 1.15 * bound_h


def test_what_a_cluster_has_is_asked_of_ray():
    for path in (ROOT / "slideflow_ray/execute").glob("*.py"):
        assert path.name == "inline.py" or "cpu_count" not in path.read_text()

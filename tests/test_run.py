"""run.py and the executors: the same bytes whoever works, however often it dies, and nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from slideflow_ray.accounting import read_run, status
from slideflow_ray.errors import BundleError, CohortError, ConfigError, ProfileError
from slideflow_ray.events import ChunkScored, SlideDone, SlidePlanned, WorkerDied
from slideflow_ray.models.bundle import load_weights, read_card, write_bundle
from slideflow_ray.run import plan, run
from slideflow_ray.specs import RunSpec
from slideflow_ray.store import SlideStore, tree_digest, verify

ROWS = 16


def spec(marked: Path, bundles, out: Path, *names: str, cohort="cohort.csv", **settings) -> RunSpec:
    values = {
        "cohort": str(marked / cohort),
        "out": str(out),
        "model": [{"path": str(bundles[name])} for name in names or ("aligned", "odd")],
        "store": {"chunk_rows": ROWS},
        "executor": {"kind": "inline", "workers": 1},
        **settings,
    }
    return RunSpec.parse(values, "test")


@pytest.fixture(scope="session")
def reference(marked, bundles, tmp_path_factory) -> Path:
    """One inline worker, undisturbed, one model after the other in one run."""
    out = tmp_path_factory.mktemp("reference") / "out"
    result = run(spec(marked, bundles, out))
    assert result.counts == {"done": 3, "failed": 0, "refused": 0}
    return out


def test_every_tile_is_scored_and_committed(reference):
    record = read_run(reference)
    assert [m["name"] for m in record["models"]] == ["aligned", "odd"]
    for slide_id, ended in record["outcomes"].items():
        assert len(ended["grids"]) == 2
        for grid, model in ended["grids"]:
            scores = SlideStore(reference, slide_id).read(f"scores/{grid}/{model}")
            assert np.isfinite(scores).all()
            assert len(np.unique(scores[:, 1])) > len(scores) // 2
            np.testing.assert_array_equal(scores[:, 0], -scores[:, 1])
    nodes, wrong = verify(reference)
    assert nodes > 20
    assert wrong == []


@pytest.mark.parametrize("workers", [2, 4])
def test_inline_gives_the_same_bytes_with_any_number_of_workers(workers, marked, bundles, reference, tmp_path):
    run(spec(marked, bundles, tmp_path / "out", executor={"kind": "inline", "workers": workers}))
    assert tree_digest(tmp_path / "out") == tree_digest(reference)


@pytest.mark.ray
@pytest.mark.parametrize(
    "workers", [pytest.param(1, marks=pytest.mark.soak), 2, pytest.param(4, marks=pytest.mark.soak)]
)
def test_ray_on_cores_gives_the_same_bytes(workers, marked, bundles, reference, tmp_path, local_ray):
    made = spec(
        marked, bundles, tmp_path / "out", executor={"kind": "ray", "workers": workers}, compute={"device": "cpu"}
    )
    run(made)
    assert tree_digest(tmp_path / "out") == tree_digest(reference)


@pytest.mark.ray
def test_ray_with_scorers_pinned_to_pretended_gpus_gives_the_same_bytes(
    marked, bundles, reference, tmp_path, local_ray
):
    workers = []
    out = tmp_path / "out"
    executor = {"kind": "ray", "readers_per_gpu": 2}
    run(spec(marked, bundles, out, executor=executor), listen=lambda e: workers.append(getattr(e, "workers", None)))
    assert workers[0] == 2
    assert tree_digest(out) == tree_digest(reference)


def test_one_run_of_two_bundles_is_two_runs_of_one(marked, bundles, reference, tmp_path):
    out = tmp_path / "out"
    run(spec(marked, bundles, out, "odd"))
    run(spec(marked, bundles, out, "aligned"))
    assert tree_digest(out) == tree_digest(reference)


def test_running_again_does_nothing_and_says_so(marked, bundles, reference, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    events = []
    before = {path: path.stat().st_mtime_ns for path in (out / "slides").rglob("*")}
    result = run(spec(marked, bundles, out), listen=events.append)
    assert not result.changed
    assert [e.outcome for e in events if isinstance(e, SlideDone)] == ["unchanged"] * 3
    assert not any(isinstance(e, ChunkScored) for e in events)
    assert {path: path.stat().st_mtime_ns for path in (out / "slides").rglob("*")} == before


def test_without_kept_tiles_the_scores_are_the_same(marked, bundles, reference, tmp_path):
    out = tmp_path / "out"
    run(spec(marked, bundles, out, store={"tiles": "none", "chunk_rows": ROWS}))
    assert not list(out.rglob("tiles"))
    for kept in sorted((reference / "slides").rglob("scores")):
        for path in (p for p in kept.rglob("*") if p.is_file()):
            assert (out / path.relative_to(reference)).read_bytes() == path.read_bytes()


def test_a_lost_chunk_of_an_unfinished_run_is_all_that_is_done_again(marked, bundles, reference, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    (scores,) = (out / "commits/a/scores").glob("64px*/*.json")
    node = scores.relative_to(out / "commits/a").with_suffix("")
    scores.unlink()
    (out / "slides/a.zarr" / node / "c/1/0").unlink()
    events = []
    assert run(spec(marked, bundles, out), listen=events.append).changed
    assert [(e.slide_id, e.chunk) for e in events if isinstance(e, ChunkScored)] == [("a", 1)]
    assert tree_digest(out) == tree_digest(reference)


def test_a_bad_slide_ends_alone_and_refused_is_not_tried_again(marked, bundles, tmp_path):
    made = spec(marked, bundles, tmp_path / "out", "aligned", cohort="with_a_bad_one.csv")
    result = run(made)
    assert result.counts == {"done": 3, "failed": 0, "refused": 1}
    ended = result.ended[3]
    assert (ended.slide_id, ended.code, ended.status) == ("d", "E_NOT_A_SLIDE", "refused")
    assert "d.svs" in ended.message
    assert "d,refused,E_NOT_A_SLIDE" in (tmp_path / "out/failures.csv").read_text()
    events = []
    assert run(made, listen=events.append).counts == result.counts
    assert status(tmp_path / "out")["failures"][0]["code"] == "E_NOT_A_SLIDE"


def test_a_replaced_file_is_tried_again(marked, bundles, tmp_path):
    folder = tmp_path / "cohort"
    shutil.copytree(marked, folder)
    made = spec(folder, bundles, tmp_path / "out", "aligned", cohort="with_a_bad_one.csv")
    assert run(made).counts["refused"] == 1
    shutil.copy(folder / "c.tif", folder / "d.svs")
    assert run(made).counts == {"done": 4, "failed": 0, "refused": 0}
    assert status(tmp_path / "out")["failures"] == []


def test_a_lost_store_is_noticed_and_its_slide_fails_with_a_way_out(marked, bundles, reference, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    shutil.rmtree(out / "slides/a.zarr")
    assert any("a: " in line and "is lost" in line for line in verify(out)[1])
    result = run(spec(marked, bundles, out))
    assert result.counts == {"done": 2, "failed": 1, "refused": 0}
    assert result.ended[0].code == "E_CHECKSUM"
    shutil.rmtree(out / "commits/a")  # what the next step says
    shutil.rmtree(out / "slides/a.zarr", ignore_errors=True)
    assert run(spec(marked, bundles, out)).counts["done"] == 3
    assert tree_digest(out) == tree_digest(reference)


def test_scores_that_cannot_be_read_fail_their_slide_and_no_other(marked, bundles, reference, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    path = next((out / "slides/b.zarr/scores").rglob("c/0/0"))
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    shutil.rmtree(out / "commits/b/heatmaps")
    result = run(spec(marked, bundles, out))
    assert {e.slide_id: e.code for e in result.ended if e.status != "done"} == {"b": "E_CHECKSUM"}
    assert read_run(out)["finished"]


def test_a_refusal_holds_for_what_was_wanted_and_not_for_another_model(marked, bundles, tmp_path):
    card = read_card(bundles["aligned"])
    fine = card.model_copy(update={"name": "fine", "mpp": 0.25})
    write_bundle(tmp_path / "fine", fine, load_weights(bundles["aligned"]))
    out = tmp_path / "out"
    first = run(spec(marked, {**bundles, "fine": tmp_path / "fine"}, out, "fine"))
    assert {e.code for e in first.ended} == {"E_BAD_MPP"}
    assert run(spec(marked, bundles, out, "aligned")).counts["done"] == 3


def test_a_failure_of_another_cohort_is_not_counted(marked, bundles, tmp_path):
    out = tmp_path / "out"
    run(spec(marked, bundles, out, "aligned", cohort="with_a_bad_one.csv"))
    run(spec(marked, bundles, out, "aligned"))
    assert status(out)["refused"] == 0


def test_a_slide_named_like_a_half_written_file_is_a_slide(marked, bundles, tmp_path):
    shutil.copy(marked / "c.tif", tmp_path / "x.partial.tif")
    (tmp_path / "cohort.csv").write_text("slide_id,uri,modality\nx.partial,x.partial.tif,tem\n")
    for changed in (True, False):
        assert run(spec(tmp_path, bundles, tmp_path / "out", "aligned")).changed == changed


def test_two_slides_that_would_share_a_store_are_refused(marked, bundles, tmp_path):
    rows = f"a/b,{marked}/a.tif,tem\na_b-c14cddc033f6,{marked}/b.tif,tem\n"
    (tmp_path / "cohort.csv").write_text(f"slide_id,uri,modality\n{rows}")
    with pytest.raises(CohortError, match="same folder"):
        run(spec(tmp_path, bundles, tmp_path / "out", "aligned"))
    assert not (tmp_path / "out").exists()


def test_an_idle_reader_that_dies_is_nobody_s_fault(marked, bundles, reference, tmp_path):
    from slideflow_ray.execute import inline

    original, killed = inline.InlinePool.load, []

    def load(self, context):
        original(self, context)
        victim = self._readers[0].process
        victim.kill()
        victim.join()
        killed.append(victim.pid)

    inline.InlinePool.load = load
    try:
        result = run(spec(marked, bundles, tmp_path / "out"))
    finally:
        inline.InlinePool.load = original
    assert killed
    assert result.counts["done"] == 3
    assert tree_digest(tmp_path / "out") == tree_digest(reference)


def test_configuration_errors_come_before_anything_is_written(marked, bundles, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BundleError, match=r"bundle\.json"):
        run(spec(marked, {"aligned": tmp_path}, out, "aligned"))
    with pytest.raises(ConfigError, match="There is no cohort"):
        run(spec(tmp_path, bundles, out))
    with pytest.raises(ConfigError, match="named twice"):
        run(spec(marked, bundles, out, "aligned", "aligned"))
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(ConfigError, match="cannot be an output folder"):
        run(spec(marked, bundles, out))


def test_a_machine_that_cannot_match_the_profile_is_refused(marked, bundles, tmp_path):
    out = tmp_path / "out"
    made = spec(marked, bundles, out, "aligned")
    plan(made)
    (profile,) = (out / "profiles").glob("*.json")
    profile.write_text(profile.read_text().replace('"isa": "', '"isa": "another '))
    with pytest.raises(ProfileError, match="isa"):
        run(made)


def test_another_precision_makes_results_beside_the_old(marked, bundles, tmp_path):
    out = tmp_path / "out"
    first = run(spec(marked, bundles, out, "aligned", compute={"precision": "bf16"}))
    second = run(spec(marked, bundles, out, "aligned", compute={"precision": "fp32"}))
    assert first.ended[0].laid == second.ended[0].laid
    assert first.ended[0].grids != second.ended[0].grids
    assert verify(out)[1] == []


def test_the_plan_says_what_a_run_costs_and_the_run_keeps_to_it(marked, bundles, reference, tmp_path):
    made = spec(marked, bundles, tmp_path / "out", cohort="with_a_bad_one.csv")
    cost = plan(made)
    assert cost["tiles"] == cost["todo"] == sum(e["tiles"] for e in read_run(reference)["outcomes"].values())
    assert "E_NOT_A_SLIDE" in cost["slides"][3]["note"]
    assert run(made).counts["done"] == 3
    assert plan(made)["todo"] == 0


COMMAND = [sys.executable, "-m", "slideflow_ray.cli", "run"]


def start(made: RunSpec, *options: str) -> subprocess.Popen[bytes]:
    toml = Path(made.out).with_suffix(".toml")
    models = "".join(f'[[model]]\npath = "{m.path}"\n' for m in made.model)
    text = f'cohort = "{made.cohort}"\nout = "{made.out}"\n{models}[store]\nchunk_rows = {ROWS}\n'
    toml.write_text(text + f'[executor]\nkind = "{made.executor.kind}"\nworkers = {made.executor.workers}\n')
    return subprocess.Popen([*COMMAND, str(toml), *options], stderr=subprocess.PIPE, start_new_session=True)


def wait_for_chunks(out: Path, n: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until `n` chunks of scores are written."""
    deadline = time.monotonic() + 60
    while len(list(out.glob("slides/*/scores/*/*/c/*/0"))) < n:
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [pytest.param(1, marks=pytest.mark.soak), 12])
def test_a_killed_run_resumes_at_the_chunk_and_ends_with_the_same_bytes(chunks, marked, bundles, reference, tmp_path):
    out = tmp_path / "out"
    made = spec(marked, bundles, out, executor={"kind": "inline", "workers": 2})
    process = start(made)
    wait_for_chunks(out, chunks, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    there = len(list(out.glob("slides/*/scores/*/*/c/*/0")))
    assert (out / "lease.json").exists()
    assert status(out)["state"] == "interrupted"
    events = []
    result = run(made, listen=events.append)
    total = len(list(out.glob("slides/*/scores/*/*/c/*/0")))
    assert result.counts["done"] == 3
    assert chunks <= there < total
    scored = sum(isinstance(e, ChunkScored) for e in events)
    assert scored <= total - there  # one task may write two models' chunks
    assert tree_digest(out) == tree_digest(reference)
    assert not list(out.rglob("*.partial"))


@pytest.mark.slow
def test_a_reader_that_is_killed_is_replaced_and_nothing_is_lost(marked, bundles, reference, tmp_path):
    from slideflow_ray.execute import inline

    out = tmp_path / "out"
    events = []
    started = []
    original = inline.ReaderProcess.give

    def give(self, task):
        original(self, task)
        if task.stage == "chunk" and len(started) < 3 and task.slide_id not in started:
            started.append(task.slide_id)
            self.process.kill()

    inline.ReaderProcess.give = give
    try:
        result = run(spec(marked, bundles, out, executor={"kind": "inline", "workers": 2}), listen=events.append)
    finally:
        inline.ReaderProcess.give = original
    assert sum(isinstance(e, WorkerDied) for e in events) == 3
    assert result.counts["done"] == 3
    assert tree_digest(out) == tree_digest(reference)


@pytest.mark.ray
@pytest.mark.parametrize("moment", [pytest.param(SlidePlanned, marks=pytest.mark.soak), ChunkScored])
def test_an_actor_that_is_killed_is_replaced_and_nothing_is_lost(
    moment, marked, bundles, reference, tmp_path, local_ray
):
    import psutil

    out = tmp_path / "out"
    events = []

    def listen(event):
        events.append(event)
        if isinstance(event, moment) and sum(isinstance(e, moment) for e in events) == 1:
            victims = [p for p in psutil.process_iter(["cmdline"]) if "Fused" in " ".join(p.info["cmdline"] or [])]
            mine = [p for p in victims if any(q.pid == os.getpid() for q in p.parents())]
            mine[0].kill()

    made = spec(marked, bundles, out, executor={"kind": "ray", "workers": 2}, compute={"device": "cpu"})
    result = run(made, listen=listen)
    assert any(isinstance(e, WorkerDied) for e in events)
    assert result.counts["done"] == 3
    assert tree_digest(out) == tree_digest(reference)


def test_interrupting_ends_with_130_and_a_word_about_resuming(marked, bundles, tmp_path):
    out = tmp_path / "out"
    process = start(spec(marked, bundles, out))
    wait_for_chunks(out, 1, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    if process.returncode != 0:  # the run may have been over already
        assert process.returncode == 130
        assert b"Interrupted; run the same command again to resume." in said
        assert b"Traceback" not in said
        assert not (out / "lease.json").exists()

"""jobs/ and `slideflow-ray submit`, for real: heads that the tests start with token authentication (tests/head.py).

What kills nodes and heads is marked `soak`: it takes minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from head import RAY, ROOT, Head, started_head, status_of

from slideflow_ray.errors import InfrastructureError
from slideflow_ray.repair import verify
from slideflow_ray.submit.cluster import Cluster, look

LAST = ["failures by code (1 slides):", "     1 x E_NOT_A_SLIDE: d"]
"""What a job over a cohort with one bad slide says at its end, and Ray's job page as its message."""
JOBS = ("tile", "score", "evaluate", "retrain", "pretrain", "nightly")


@pytest.fixture(scope="module")
def token(ray_env) -> Path:
    return Path(ray_env["RAY_AUTH_TOKEN_PATH"])


@pytest.fixture(scope="module")
def head(token) -> Iterator[Head]:
    """One head for this file."""
    with started_head(token) as found:
        yield found


def client_env(head: Head, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, **head.env, "RAY_API_SERVER_ADDRESS": head.address, **more}


def command(head: Head, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`slideflow-ray ARGUMENTS` on a machine that knows the head's address and token."""
    call = [sys.executable, "-m", "slideflow_ray.cli", *arguments]
    return subprocess.run(call, env=client_env(head, **more), capture_output=True, text=True, timeout=400)


def submit(head: Head, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return command(head, "submit", *arguments, "--python", sys.executable, **more)


def run_toml(folder: Path, cohort: Path, bundle: Path, chunk_rows: int = 0) -> Path:
    """A user's folder: run.toml, the cohort and a bundle beside it; results go to folder/out."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        line.replace(",", f",{cohort.parent}/", 1) if i else line
        for i, line in enumerate(cohort.read_text().splitlines())
    ]
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    shutil.copytree(bundle, folder / "bundle", dirs_exist_ok=True)
    text = f'cohort = "cohort.csv"\nout = "{folder}/out"\nstore = {{ chunk_rows = {chunk_rows} }}\n'
    (folder / "run.toml").write_text(text + '[[model]]\npath = "bundle"\n')
    return folder / "run.toml"


# the scripts by themselves


def main_of(name: str) -> Callable[[list[str]], int]:
    found: Callable[[list[str]], int] = runpy.run_path(str(ROOT / "jobs" / f"{name}.py"))["main"]
    return found


@pytest.mark.parametrize("name", JOBS)
def test_a_job_says_how_it_is_submitted_and_how_it_ends(name):
    text = (ROOT / "jobs" / f"{name}.py").read_text()
    assert f"    ray job submit --working-dir . -- python jobs/{name}.py " in text
    assert "Exit codes: 0" in text
    assert main_of(name)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_cannot_begin_ends_with_2(name, tmp_path, capfd):
    assert main_of(name)([str(tmp_path / "there-is-none.toml")]) == 2
    assert capfd.readouterr().err.startswith("E_CONFIG: ")


@pytest.mark.parametrize("name", ["retrain", "pretrain"])
@pytest.mark.parametrize("bad", ["crew = 3", 'fit = "x"', 'executor = "ray"', 'fit = {epochs = "x"}'])
def test_a_table_that_is_none_is_named(name, bad, tmp_path, capfd):
    (tmp_path / "t.toml").write_text(f'cohort = "c.csv"\nout = "o"\nclasses = ["a", "b"]\n{bad}\n')
    assert main_of(name)([str(tmp_path / "t.toml")]) == 2
    assert f"t.toml: {bad.split()[0]}" in capfd.readouterr().err


def test_jobs_in_a_notebook(marked, bundles, tmp_path, capsys):
    settings = run_toml(tmp_path / "a", marked / "with_a_bad_one.csv", bundles["aligned"])
    with settings.open("a") as file:
        file.write('[executor]\nkind = "inline"\n')
    assert main_of("tile")([str(settings)]) == 3  # one of them is no slide
    said = capsys.readouterr()
    assert "'done': 3, 'failed': 0, 'refused': 1" in said.out
    assert said.err.splitlines()[-2:] == LAST
    tiles = ages(tmp_path / "a" / "out", "tiles")
    assert tiles
    assert main_of("score")([str(settings)]) == 3
    assert capsys.readouterr().err.splitlines()[-2:] == LAST
    assert ages(tmp_path / "a" / "out", "tiles") == tiles  # what was stored was read, and nothing laid anew
    assert main_of("evaluate")([str(tmp_path / "a" / "out"), "--rule", "f1"]) == 0
    assert (tmp_path / "a" / "out" / "report.html").exists()


# a real head


@pytest.mark.ray
def test_a_head_with_a_token_turns_away_who_has_none(head, token, marked, bundles, tmp_path):
    url = f"{head.address}/api/jobs/"
    assert [status_of(url), status_of(url, "0" * 64), status_of(url, token.read_text())] == [401, 403, 200]
    settings = run_toml(tmp_path, marked / "cohort.csv", bundles["aligned"])
    (tmp_path / "wrong").write_text("0" * 64)
    (tmp_path / "wrong").chmod(0o600)
    began = time.monotonic()
    wrong = submit(head, str(settings), RAY_AUTH_TOKEN_PATH=str(tmp_path / "wrong"))
    none = submit(head, str(settings), RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path))
    assert time.monotonic() - began < 20
    assert (wrong.returncode, none.returncode) == (2, 2)
    assert re.fullmatch(r"E_CONFIG: .* refuses the token \(HTTP 403\)\. Next: .*\n", wrong.stderr)
    assert re.fullmatch(r"E_CONFIG: .* asks for a token, and none is configured\. Next: .*\n", none.stderr)


@pytest.mark.ray
@pytest.mark.slow
def test_the_same_cohort_by_ray_job_submit_and_by_our_own(head, marked, bundles, tmp_path):
    """Both at a time, since each waits for processes to start most of the while."""
    places = [
        "--cohort",
        str(marked / "cohort.csv"),
        "--model",
        str(bundles["aligned"]),
        "--out",
        str(tmp_path / "plain"),
    ]
    plain = subprocess.Popen(
        ray_job_submit(head, "jobs/score.py", *places, "--workers", "1"),
        env=client_env(head),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    settings = run_toml(tmp_path / "ours", marked / "cohort.csv", bundles["aligned"])
    done = submit(head, str(settings))
    said = plain.communicate(timeout=240)[0]
    assert plain.returncode == 0, said
    assert "'done': 3" in said
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preflight: " in done.stdout
    assert "'done': 3" in done.stdout
    for out in (tmp_path / "plain", tmp_path / "ours" / "out"):
        record = json.loads((out / "run.json").read_text())
        assert record["spec"]["executor"]["kind"] == "ray"
        assert record["counts"] == {"done": 3, "failed": 0, "refused": 0}
        assert (out / "report.html").exists()
    assert scores(tmp_path / "plain") == scores(tmp_path / "ours" / "out")

    (job,) = re.findall(r"(sfr-score-\w+) submitted", done.stderr)
    fetched = command(head, "jobs", "report", job, "--to", str(tmp_path / "fetched.html"))
    assert fetched.returncode == 0, fetched.stderr
    assert (tmp_path / "fetched.html").read_bytes() == (tmp_path / "ours" / "out" / "report.html").read_bytes()
    again = submit(head, str(settings))
    assert (again.returncode, again.stdout) == (0, "")
    assert f"{job} has finished already" in again.stderr


def ray_job_submit(head: Head, *arguments: str) -> list[str]:
    """`ray job submit --working-dir . -- python ...` as the docstrings say it; `.` is the checkout."""
    options = [
        "--address",
        head.address,
        "--working-dir",
        ".",
        "--runtime-env-json",
        json.dumps({"excludes": [".git"]}),
    ]
    return [str(RAY), "job", "submit", *options, "--", sys.executable, *arguments]


def scores(out: Path) -> dict[str, bytes]:
    """Every shard of scores, by slide, grid and model."""
    return {str(path.relative_to(out)): path.read_bytes() for path in shards(out)}


def ages(out: Path, node: str) -> dict[Path, int]:
    """When each file with rows of a node (tiles, scores) was written."""
    found = (path for path in (out / "slides").rglob("*") if f"/{node}/" in str(path) and "/c/" in str(path))
    return {path: path.stat().st_mtime_ns for path in found if path.is_file()}


def shards(out: Path) -> list[Path]:
    """Files that hold scored chunks, those half written left out."""
    found = (out / "slides").glob("*/scores/*/*/c/**/*")
    return sorted(path for path in found if path.is_file() and not path.name.endswith(".partial"))


# the rest takes minutes: make soak


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """Slides of a few thousand tiles, so that there is time to kill something."""
    from slideflow_ray.phantoms import write_marked_slide

    folder = tmp_path_factory.mktemp("larger")
    for i in range(4):
        write_marked_slide(folder / f"s{i}.tif", size_px0=(4001 - i, 3901 + i))
    (folder / "cohort.csv").write_text("slide_id,uri,modality\n" + "".join(f"s{i},s{i}.tif,tem\n" for i in range(4)))
    return folder


@pytest.fixture(scope="module")
def reference(larger, bundles, tmp_path_factory) -> dict[str, bytes]:
    """The scores of the same run, undisturbed and inline."""
    folder = tmp_path_factory.mktemp("reference")
    settings = run_toml(folder, larger / "cohort.csv", bundles["aligned"], chunk_rows=32)
    with settings.open("a") as file:
        file.write('[executor]\nkind = "inline"\n')
    from slideflow_ray.run import run
    from slideflow_ray.specs import load_run

    run(load_run(settings))
    return scores(folder / "out")


def check_whole(out: Path, reference: dict[str, bytes]) -> None:
    """The scores are the same bytes, and all that was committed is as it was."""
    assert scores(out) == reference
    nodes, wrong = verify(out)
    assert nodes
    assert wrong == []


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def nodes_of(head: Head, token: Path) -> int:
    """Nodes that the head knows of; 0 while it is too busy to say."""
    with contextlib.suppress(InfrastructureError):
        return look(Cluster(head.address, token.read_text())).nodes
    return 0


@contextlib.contextmanager
def background(head: Head, log: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`slideflow-ray ARGUMENTS` in the background; it is gone with the block."""
    with log.open("w") as file:
        call = [sys.executable, "-m", "slideflow_ray.cli", *arguments]
        process = subprocess.Popen(call, env=client_env(head), stdout=file, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.soak
@pytest.mark.ray
def test_killing_a_worker_node_loses_nothing(token, larger, bundles, reference, tmp_path):
    settings = run_toml(tmp_path, larger / "cohort.csv", bundles["aligned"], chunk_rows=32)
    log = tmp_path / "log"
    with started_head(token, cpus=1) as head:
        node = head.add_node(cpus=1)
        wait_for(lambda: nodes_of(head, token) == 2)
        with background(head, log, "submit", str(settings), "--python", sys.executable) as job:
            wait_for(lambda: len(shards(tmp_path / "out")) > 8 or job.poll() is not None)
            node.end()
            done = len(shards(tmp_path / "out"))
            assert job.wait(timeout=400) == 0, log.read_text()
    assert "2 workers" in log.read_text()
    assert 8 < done < len(shards(tmp_path / "out"))
    assert "'done': 4, 'failed': 0, 'refused': 0" in (tmp_path / "log").read_text()
    check_whole(tmp_path / "out", reference)


@pytest.mark.soak
@pytest.mark.ray
def test_killing_the_head_and_submitting_to_a_new_one_resumes_at_the_chunk(token, larger, bundles, reference, tmp_path):
    settings = run_toml(tmp_path, larger / "cohort.csv", bundles["aligned"], chunk_rows=32)
    log = tmp_path / "log"
    with started_head(token) as head:
        with background(head, log, "submit", str(settings), "--python", sys.executable) as job:
            wait_for(lambda: len(shards(tmp_path / "out")) > 8 or job.poll() is not None)
            head.end()
            before = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "out")}
            began = time.monotonic()
            assert job.wait(timeout=120) == 4, log.read_text()
        assert "has not answered for" in log.read_text()
        assert time.monotonic() - began < 90
    with started_head(token) as head:
        done = submit(head, str(settings))
        assert done.returncode == 0, done.stdout + done.stderr
    after = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "out")}
    assert {path: after[path] for path in before} == before  # none of them was scored again
    assert 8 < len(before) < len(after)
    print(f"{len(before)} chunks before the head was killed, {len(after) - len(before)} after")
    check_whole(tmp_path / "out", reference)


@pytest.mark.soak
@pytest.mark.ray
def test_a_job_that_is_stopped_is_resumed_by_submitting_it_again(head, larger, bundles, reference, tmp_path):
    settings = run_toml(tmp_path, larger / "cohort.csv", bundles["aligned"], chunk_rows=32)
    job = submit(head, str(settings), "--detach").stdout.strip()
    follow = ("jobs", "logs", "--follow", job)
    with (
        background(head, tmp_path / "left", *follow) as leaver,
        background(head, tmp_path / "log", *follow) as follower,
    ):
        wait_for(lambda: "aligned" in (tmp_path / "left").read_text())
        leaver.send_signal(signal.SIGINT)
        assert leaver.wait(timeout=30) == 130
        assert f"jobs logs {job} --follow" in (tmp_path / "left").read_text()
        assert command(head, "jobs", "status", job).stdout.startswith(f"{job}: RUNNING")
        assert command(head, "jobs", "stop", job).returncode == 0
        assert follower.wait(timeout=60) == 130
    assert command(head, "jobs", "status", job).stdout.startswith(f"{job}: STOPPED, exit code 130")
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "out")}
    again = submit(head, str(settings))
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{job}-2 submitted, attempt 2: it resumes" in again.stderr
    after = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "out")}
    assert {path: after[path] for path in before} == before
    check_whole(tmp_path / "out", reference)
    listed = json.loads(command(head, "jobs", "list", "--json").stdout)
    mine = {found["job"]: found["status"] for found in listed if found["job"].startswith(job)}
    assert mine == {job: "STOPPED", f"{job}-2": "SUCCEEDED"}


@pytest.mark.soak
@pytest.mark.ray
def test_what_the_cluster_cannot_see_is_said_before_anything_is_scored(head, marked, bundles, tmp_path):
    settings = run_toml(tmp_path, marked / "cohort.csv", bundles["aligned"])
    text = (tmp_path / "cohort.csv").read_text()
    (tmp_path / "cohort.csv").write_text(re.sub(r"[bc]\.tif", "not-there.tif", text))
    done = submit(head, str(settings))
    assert done.returncode == 2
    (line,) = [line for line in done.stdout.splitlines() if "E_CONFIG" in line]
    assert "not-there.tif: No such file or directory. Next: " in line
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.soak
@pytest.mark.ray
def test_a_run_with_failures_ends_with_3_and_is_tried_again(head, token, marked, bundles, tmp_path):
    settings = run_toml(tmp_path, marked / "with_a_bad_one.csv", bundles["aligned"])
    first = submit(head, str(settings))
    assert first.returncode == 3
    assert first.stdout.splitlines()[-2:] == LAST
    url, key = f"{head.address}/api/jobs/", {"Authorization": f"Bearer {token.read_text()}"}
    (job,) = re.findall(r"(sfr-score-\w+) submitted", first.stderr)
    with urllib.request.urlopen(urllib.request.Request(url + job, headers=key)) as answer:
        assert "\n".join(LAST) in json.load(answer)["message"]
    again = submit(head, str(settings))
    assert again.returncode == 3
    assert "attempt 2: it resumes" in again.stderr


@pytest.mark.soak
@pytest.mark.ray
def test_every_other_job_is_submitted(head, marked, bundles, tmp_path):
    from slideflow_ray.phantoms import write_cohort
    from slideflow_ray.phantoms.tem import write_tem_cohort

    settings = run_toml(tmp_path / "a", marked / "cohort.csv", bundles["aligned"])
    micrographs = write_tem_cohort(tmp_path / "tem", patients=5, images=1, size_px=(128, 128), nm_per_px=20, workers=1)
    (tmp_path / "scans").mkdir()
    shutil.copy(marked / "a.tif", tmp_path / "scans")
    fit = "epochs = 1\nbatch_size = 4\n"
    (tmp_path / "night.toml").write_text(
        f'out = "{tmp_path}/night"\nwatch = "{tmp_path}/scans"\nsettle_s = 0\n'
        f'[[model]]\npath = "{bundles["aligned"]}"\n'
    )
    (tmp_path / "pre.toml").write_text(
        f'cohort = "{micrographs}"\nout = "{tmp_path}/pre"\ntile = {{tile_px = 64, mpp = 0.02}}\n'
        f"[fit]\n{fit}arguments = {{levels = 2, width = 4}}\n"
    )
    slides = write_cohort(tmp_path / "slides", slides=9, size_px0=(1024, 768), workers=1)
    train = (
        f'cohort = "{slides}"\nout = "{tmp_path}/bundle"\nclasses = ["normal", "tumor"]\n'
        f'tile = {{tile_px = 64, mpp = 1.0}}\n[fit]\narchitecture = "small-cnn"\n{fit}'
    )
    (tmp_path / "train.toml").write_text(train)
    (tmp_path / "bad.toml").write_text(train.replace('"tumor"]', '"granule"]'))  # the annotations have another class
    for arguments, made in (
        (("evaluate", str(tmp_path / "nothing")), 2),
        (("tile", str(settings)), "a/out/run.json"),
        (("score", str(settings)), "a/out/report.html"),
        (("evaluate", str(tmp_path / "a" / "out"), "--rule", "f1"), "a/out/operating_points.json"),
        (("nightly", str(tmp_path / "night.toml"), "--date", "2026-11-21"), "night/nights/2026-11-21/night.html"),
        (("pretrain", str(tmp_path / "pre.toml")), "pre/weights.safetensors"),
        (("retrain", str(tmp_path / "bad.toml")), 3),
        (("retrain", str(tmp_path / "train.toml")), "bundle/bundle.json"),
    ):
        done = submit(head, *arguments)
        assert done.returncode == (made if isinstance(made, int) else 0), done.stdout + done.stderr
        assert isinstance(made, int) or (tmp_path / made).exists()
    assert not (tmp_path / "nothing").exists()  # a first look leaves nothing behind


@pytest.mark.soak
@pytest.mark.ray
def test_an_open_cluster_is_refused_unless_told(marked, bundles, tmp_path, token):
    settings = run_toml(tmp_path, marked / "cohort.csv", bundles["aligned"])
    with started_head(None) as head:
        refused = submit(head, str(settings), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        assert refused.returncode == 2
        assert re.fullmatch(r"E_CONFIG: .* it has no authentication\. Next: .*\n", refused.stderr)
        told = submit(head, str(settings), "--allow-open")
        assert told.returncode == 0, told.stdout + told.stderr
        assert "WITHOUT authentication" in told.stderr


@pytest.mark.soak
@pytest.mark.ray
def test_slides_and_results_in_a_bucket_that_the_laptop_does_not_see(token, marked, bundles, tmp_path, monkeypatch):
    from object_store import BUCKET, object_store

    from slideflow_ray import bucket, storage

    with object_store() as (url, _):
        there = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
        there |= {"AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true", "SLIDEFLOW_RAY_CACHE": str(tmp_path / "cache")}
        for name in "abc":
            put(f"{url}/{BUCKET}/slides/{name}.tif", (marked / f"{name}.tif").read_bytes())
        shutil.copytree(bundles["aligned"], tmp_path / "aligned")
        (tmp_path / "cohort.csv").write_text("slide_id,uri,modality\na,a.tif,tem\nb,b.tif,tem\nc,c.tif,tem\n")
        profile = f'[lab]\naddress = "http://127.0.0.1:1"\nout = "s3://{BUCKET}"\nslides = "s3://{BUCKET}/slides"\n'
        (tmp_path / "profiles.toml").write_text(profile)
        with started_head(token, **there) as head:
            call = [sys.executable, "-m", "slideflow_ray.cli", "submit", "--cohort", "cohort.csv", "--model", "aligned"]
            call += ["--out", "run", "--profile", "lab@profiles.toml", "--address", head.address]
            env = client_env(head)
            done = subprocess.run(
                [*call, "--python", sys.executable], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert "'done': 3" in done.stdout
            (job,) = re.findall(r"(sfr-score-\w+) submitted", done.stderr)
            fetched = command(head, "jobs", "report", job, "--to", str(tmp_path / "report.html"))
            assert fetched.returncode == 0, fetched.stderr
        for name, value in there.items():
            monkeypatch.setenv(name, value)
        bucket.opened.cache_clear()
        written = storage.place(f"s3://{BUCKET}/run/report.html").read_bytes()
        bucket.opened.cache_clear()
    assert (tmp_path / "report.html").read_bytes() == written


def put(url: str, data: bytes) -> None:
    headers = {"Content-Type": "application/octet-stream"}  # else the server waits for a form
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method="PUT"), timeout=30):
        pass

"""jobs/: submitted for real, to a head that the test starts with token authentication."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
RAY = Path(sys.executable).with_name("ray")


def free_ports(n: int) -> list[int]:
    """Ports that are free now, outside Ray's range of worker ports (10002 to 19999)."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@pytest.fixture(scope="module")
def head(ray_env) -> Iterator[str]:
    """A head of this test alone on 127.0.0.1; the address of its job server."""
    folder = Path(tempfile.mkdtemp(prefix="sfr-", dir="/tmp"))  # short: Ray puts sockets below it
    gcs, dashboard, agent, client = free_ports(4)
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += ["--object-store-memory=200000000", "--disable-usage-stats", "--include-dashboard=true"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **ray_env}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_until_up(address, Path(ray_env["RAY_AUTH_TOKEN_PATH"]).read_text(), process, folder / "log")
        yield address
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything it started, by recorded process ids: never `ray stop`."""
    family = psutil.Process(process.pid).children(recursive=True)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.kill()
    process.wait(timeout=20)
    psutil.wait_procs(family, timeout=20)


def status_of(url: str, token: str = "") -> int:
    """The HTTP status of a GET; 0 while nobody listens."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (urllib.error.URLError, ConnectionError):
        return 0


def wait_until_up(address: str, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while status_of(f"{address}/api/jobs/", token) != 200:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def submit(head: str, ray_env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "jobs", Path(folder) / "jobs")
        command = [str(RAY), "job", "submit", "--address", head, "--working-dir", folder, "--", *arguments]
        env = {**os.environ, **ray_env}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.ray
@pytest.mark.slow
def test_score_runs_under_ray_job_submit(head, ray_env, marked, bundles, tmp_path):
    out = tmp_path / "out"
    job = [sys.executable, "jobs/score.py", "--cohort", str(marked / "cohort.csv")]
    job += ["--model", str(bundles["aligned"]), "--out", str(out), "--workers", "2"]
    done = submit(head, ray_env, *job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'done': 3" in done.stdout
    record = json.loads((out / "run.json").read_text())
    assert record["spec"]["executor"]["kind"] == "ray"
    assert record["counts"] == {"done": 3, "failed": 0, "refused": 0}
    assert (out / "report.html").exists()


@pytest.mark.ray
def test_a_head_with_a_token_turns_away_who_has_none(head, ray_env):
    url = f"{head}/api/jobs/"
    assert status_of(url) in (401, 403)
    assert status_of(url, "0" * 64) in (401, 403)
    assert status_of(url, Path(ray_env["RAY_AUTH_TOKEN_PATH"]).read_text()) == 200

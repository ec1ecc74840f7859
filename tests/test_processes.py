"""Processes that are forked from a server: they see this process's environment and folder as of their own start."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading

import psutil

from slideflow_ray import processes


def tell(pipe, name: str) -> None:
    pipe.send((os.environ.get(name), os.environ.get("GONE"), os.getcwd(), threading.active_count(), os.getppid()))


def told_by_a_new_one(name: str) -> tuple:
    ours, theirs = multiprocessing.Pipe()
    made = processes.start(tell, theirs, name)
    theirs.close()
    assert ours.poll(60)
    found = ours.recv()
    made.join(30)
    assert made.exitcode == 0
    return found


def test_a_process_has_the_environment_and_folder_of_now(monkeypatch, tmp_path):
    monkeypatch.setenv("GONE", "there")
    monkeypatch.setenv("SAID", "first")
    first = told_by_a_new_one("SAID")
    assert first[:2] == ("first", "there")
    monkeypatch.setenv("SAID", "second")
    monkeypatch.delenv("GONE")
    monkeypatch.chdir(tmp_path)
    second = told_by_a_new_one("SAID")
    assert second[:3] == ("second", None, str(tmp_path))
    assert second[3] == 1  # none of our threads came along
    assert second[4] == first[4] != os.getpid()  # both are the server's


POOLED = """
import os, time
from slideflow_ray.processes import pool
if __name__ == "__main__":
    with pool(2) as several:
        busy = several.submit(time.sleep, 600)
        print(several.submit(os.getpid).result(), *several._processes, flush=True)
        busy.result()
"""


def test_a_pool_ends_with_the_process_that_made_it(tmp_path):
    """Killed, so that it says nothing to its pool: one is busy, the other waits for work."""
    (tmp_path / "pooled.py").write_text(POOLED)
    made = subprocess.Popen([sys.executable, str(tmp_path / "pooled.py")], stdout=subprocess.PIPE, text=True)
    with made:
        pids = {int(pid) for pid in made.stdout.readline().split()}
        assert len(pids) == 2
        made.kill()
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=30)
    assert not alive

"""Processes that are forked from a server: they see this process's environment and folder as of their own start."""

from __future__ import annotations

import multiprocessing
import os
import threading

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

"""Processes of this machine. On Linux they are forked from a server that has loaded what readers need.

Starting an interpreter and loading NumPy, SciPy and zarr takes seconds of a core for each process; a fork of one that
has them takes milliseconds. The server is a process of its own that runs nothing else: no thread of ours, no GPU and no
open slide is ever forked. Elsewhere processes are spawned.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

PRELOADED = ["slideflow_ray.execute.inline", "slideflow_ray.slides.image", "slideflow_ray.slides.tiff"]


@cache
def context() -> BaseContext:
    """Return the context that starts processes."""
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def start(target: Callable[..., object], *args: Any) -> BaseProcess:
    """Start a daemon that calls `target` in the environment that this process has now."""
    made: BaseProcess = context().Process(target=_call, args=(dict(os.environ), target, args), daemon=True)  # type: ignore[attr-defined]
    made.start()
    return made


def pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of processes that end with this one, also where it is killed: else they would wait for ever."""
    return ProcessPoolExecutor(workers, mp_context=context(), initializer=_end_with_parent)


def _end_with_parent() -> None:
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _call(environment: dict[str, str], target: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.environ.clear()  # the server has the one of its own start
    os.environ.update(environment)
    target(*args)

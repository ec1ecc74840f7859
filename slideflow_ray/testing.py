"""Shipped helpers for tests: what every SlideReader promises, and a table of faults with what must come of each."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from slideflow_ray import pipeline, store
from slideflow_ray.errors import ReadError
from slideflow_ray.execute import worker
from slideflow_ray.geometry import level_downsample
from slideflow_ray.graph import RunGraph
from slideflow_ray.slides.base import SlideReader


class SlideReaderTests:
    """What a SlideReader promises, whatever stands behind it.

    Inherit from it in a pytest module and give the subclass a fixture `reader` that
    returns an open reader, a new one for each test, of a slide that is not all white.
    """

    def test_says_what_it_is(self, reader: SlideReader) -> None:
        assert reader.name
        assert reader.uri
        assert all(isinstance(side, int) and side > 0 for side in reader.size_px0)
        assert 0 < reader.mpp0 < 1e5
        assert reader.mpp_source in ("cohort", "file", "objective")

    def test_levels_form_one_pyramid(self, reader: SlideReader) -> None:
        assert reader.levels[0].size == reader.size_px0
        assert reader.levels[0].downsample == (1.0, 1.0)
        for finer, coarser in zip(reader.levels, reader.levels[1:], strict=False):
            assert coarser.size[0] <= finer.size[0]
            assert coarser.size[1] <= finer.size[1]
            assert coarser.downsample == level_downsample(reader.size_px0, coarser.size)
            assert abs(coarser.downsample[0] / coarser.downsample[1] - 1) < 0.05

    def test_a_box_has_its_size_and_type(self, reader: SlideReader) -> None:
        for level in range(len(reader.levels)):
            pixels = reader.read(level, (1, 2), (13, 7))
            assert pixels.shape == (7, 13, 3)
            assert pixels.dtype == np.uint8

    def test_a_box_does_not_depend_on_its_neighbourhood(self, reader: SlideReader) -> None:
        for index, level in enumerate(reader.levels):
            w, h = level.size
            whole = reader.read(index, (0, 0), (min(w, 700), min(h, 600)))
            for x, y in ((0, 0), (3, 5), (whole.shape[1] // 2, whole.shape[0] // 3)):
                part = whole[y : y + 61, x : x + 97]
                alone = reader.read(index, (x, y), (part.shape[1], part.shape[0]))
                np.testing.assert_array_equal(alone, part, err_msg=f"level {index}, x {x}, y {y}")

    def test_white_beyond_every_edge(self, reader: SlideReader) -> None:
        for index, level in enumerate(reader.levels):
            w, h = level.size
            inside = reader.read(index, (0, 0), (5, 4))
            corner = reader.read(index, (-3, -2), (8, 6))
            assert (corner[:2] == 255).all()
            assert (corner[:, :3] == 255).all()
            np.testing.assert_array_equal(corner[2:, 3:], inside[:4, :5])
            last = reader.read(index, (w - 5, h - 4), (5, 4))
            end = reader.read(index, (w - 5, h - 4), (9, 6))
            np.testing.assert_array_equal(end[:4, :5], last)
            assert (end[4:] == 255).all()
            assert (end[:, 5:] == 255).all()

    def test_white_far_outside(self, reader: SlideReader) -> None:
        w, h = reader.size_px0
        for xy in ((w, 0), (0, h), (-50, 0), (w + 1000, h + 1000)):
            assert (reader.read(0, xy, (20, 10)) == 255).all()

    def test_a_box_may_be_read_again_and_changed(self, reader: SlideReader) -> None:
        first = reader.read(0, (0, 0), (9, 9))
        kept = first.copy()
        first[:] = 7  # a reader that hands out its own buffer would now be spoilt
        np.testing.assert_array_equal(reader.read(0, (0, 0), (9, 9)), kept)

    def test_an_empty_box_is_empty(self, reader: SlideReader) -> None:
        assert reader.read(0, (3, 3), (0, 5)).shape == (5, 0, 3)

    def test_a_closed_reader_says_so(self, reader: SlideReader) -> None:
        with reader as same:
            assert same is reader
        with pytest.raises(ReadError, match=re.escape(reader.uri)):
            reader.read(0, (0, 0), (8, 8))

    def test_is_never_pickled(self, reader: SlideReader) -> None:
        with pytest.raises(TypeError, match="inside the worker"):
            pickle.dumps(reader)


# processes

MARK = "SLIDEFLOW_RAY_TEST"
"""Names the environment variable by which the processes of a test's run are found, whoever became their parent."""


def marked(mark: str) -> list[psutil.Process]:
    """Return the processes, but for this one, in whose environment MARK is `mark`: a run and all that it started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def end_marked(mark: str, within_s: float = 30.0) -> None:
    """Kill the processes with that mark, until there are none. Raises TimeoutError."""
    deadline = time.monotonic() + within_s
    while left := marked(mark):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(left)} processes of {mark} cannot be ended.")
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=2)


# faults


@dataclass(frozen=True)
class Fault:
    """A fault: what happens (kill, stop, hang, memory), where, how often at most, and what must come of it.

    where : a name of `POINTS`. slide : whose task meets it, "" any. times : how often it strikes at most, after :
    how many such calls pass unharmed before, both counted over all processes. ends : "same bytes" of this run,
    "resumes" (the driver dies; the same run again has the same bytes), "gives up" (with code 4), "dies, then gives
    up" (the driver dies, and the same run again gives up), or the code in which `slide` ends while the others are
    done. on_ray : how it ends there, where that is different: models are in the driver inline, and in actors there.
    """

    act: str
    where: str
    ends: str
    slide: str = ""
    times: int = 1
    after: int = 0
    on_ray: str = ""

    def ends_on(self, executor: str) -> str:
        """Return how it ends under an executor."""
        return (self.on_ray if executor == "ray" else "") or self.ends


FAULTS = {
    "killed inside the first plan": Fault("kill", "plan", "same bytes"),
    "killed inside a later plan": Fault("kill", "plan", "same bytes", slide="c", after=3),
    "killed before a plan's commit": Fault("kill", "plan's commit", "same bytes", slide="b", after=1),
    "killed while reading": Fault("kill", "read", "same bytes"),
    "killed while reading a second chunk": Fault("kill", "read", "same bytes", slide="b", after=1),
    "killed inside the first write of a chunk's tiles": Fault("kill", "tiles' write", "same bytes"),
    "killed inside a later write of a chunk's tiles": Fault("kill", "tiles' write", "same bytes", slide="b", after=1),
    "killed inside a chunk's first write of scores": Fault("kill", "scores' write", "resumes", on_ray="same bytes"),
    "killed inside a chunk's later write of scores": Fault(
        "kill", "scores' write", "resumes", slide="b", after=2, on_ray="same bytes"
    ),
    "killed while scoring": Fault("kill", "score", "resumes", on_ray="same bytes"),
    "killed while scoring in the middle": Fault("kill", "score", "resumes", slide="a", after=3, on_ray="same bytes"),
    "killed inside derive": Fault("kill", "derive", "same bytes"),
    "killed inside the last derive": Fault("kill", "derive", "same bytes", after=2),
    "killed between chunk and commit": Fault("kill", "scores' commit", "same bytes"),
    "killed between the last chunk and its commit": Fault("kill", "scores' commit", "same bytes", after=2),
    "killed between heatmap and commit": Fault("kill", "heatmap's commit", "resumes", after=1),
    "driver killed at the first event": Fault("kill", "driver", "resumes"),
    "driver killed between two events": Fault("kill", "driver", "resumes", after=9),
    "stopped while reading": Fault("stop", "read", "same bytes"),
    "stopped inside a later plan": Fault("stop", "plan", "same bytes", slide="c", after=3),
    "a read that hangs": Fault("hang", "read", "same bytes"),
    "a later read that hangs": Fault("hang", "read", "same bytes", slide="b", after=1),
    "a read that always hangs": Fault("hang", "read", "E_QUARANTINE", slide="b", times=99),
    "a slide that kills its reader": Fault("kill", "read", "E_QUARANTINE", slide="b", times=99),
    "no memory once (simulated)": Fault("memory", "score", "same bytes"),
    "no memory on the GPU once (simulated)": Fault("gpu memory", "score", "same bytes", after=4),
    "never enough memory (simulated)": Fault("memory", "score", "E_OUT_OF_MEMORY", slide="b", times=99),
    "a model that kills who loads it": Fault("kill", "load", "dies, then gives up", times=99, on_ray="gives up"),
    "a model that once kills who loads it": Fault("kill", "load", "resumes", on_ray="same bytes"),
}
"""Faults and what must come of them, for both executors. Memory is not really used up: that it is, is simulated."""


def install(name: str, folder: Path) -> None:
    """Put a fault of `FAULTS` into this process; `folder` counts how often it has struck, in all processes.

    The package has no hook for this: its functions are replaced by such as strike first.
    """
    fault = FAULTS[name]
    owner, function, slide_of = POINTS[fault.where]
    original = getattr(owner, function)

    def struck(*arguments: Any, **options: Any) -> Any:
        slide = slide_of(*arguments)
        if slide is not None and fault.slide in ("", slide) and _strikes(fault, folder):
            _ACTS[fault.act]()
        return original(*arguments, **options)

    setattr(owner, function, struck)


def _strikes(fault: Fault, folder: Path) -> bool:
    """Return whether this call is struck: neither one of the first that pass, nor beyond the last."""
    return not _claim(folder, "pass", fault.after) and _claim(folder, "strike", fault.times)


def _claim(folder: Path, what: str, times: int) -> bool:
    """Take one of so many turns; whoever creates the file has it, and its process id is in it."""
    for i in range(times):
        with contextlib.suppress(FileExistsError), (folder / f"{what}-{i}").open("x") as file:
            file.write(str(os.getpid()))
            return True
    return False


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _no_memory() -> None:
    raise MemoryError("simulated")


def _no_gpu_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory (simulated)")


_ACTS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(3600),
    "memory": _no_memory,
    "gpu memory": _no_gpu_memory,
}


def _of_chunk(context: Any, chunk: Any, *rest: Any) -> str:
    return str(chunk.item.slide_id)


def _of_plan(context: Any, plan: Any) -> str:
    return str(plan.item.slide_id)


def _of_group(store: Any, *rest: Any) -> str:
    return str(store.slide_id)


def _of_commit(folder: str) -> Callable[..., str | None]:
    """Whose commit it is, of nodes in `folder`."""
    return lambda store, node, *rest: str(store.slide_id) if node.split("/")[0] == folder else None


def _of_chunk_file(kind: str) -> Callable[..., str | None]:
    """Whose chunk a file is of which zarr has written *.partial and not yet renamed it; None for any other file."""
    pattern = re.compile(rf"/slides/([^/]+)\.zarr/{kind}/c/")

    def slide_of(partial: Path, target: Any) -> str | None:
        found = pattern.search(str(target))
        return found[1] if found else None

    return slide_of


def _any(*arguments: Any) -> str:
    return ""


POINTS: dict[str, tuple[Any, str, Callable[..., str | None]]] = {
    "plan": (store.SlideStore, "make_group", _of_group),
    "plan's commit": (store.SlideStore, "commit", _of_commit("grids")),
    "read": (pipeline, "read_chunk", _of_chunk),
    "tiles' write": (Path, "replace", _of_chunk_file("grids/[^/]+/tiles")),
    "score": (pipeline, "score_chunk", _of_chunk),
    "scores' write": (Path, "replace", _of_chunk_file("scores/[^/]+/[^/]+")),
    "derive": (pipeline, "derive", _of_plan),
    "scores' commit": (store.SlideStore, "commit", _of_commit("scores")),
    "heatmap's commit": (store.SlideStore, "commit", _of_commit("heatmaps")),
    "driver": (RunGraph, "told", _any),
    "load": (worker.ModelScorer, "load", _any),
}
"""Where a fault may strike: an owner, its function, and whose slide a call is about, None where it does not count."""

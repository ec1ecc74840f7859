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


# faults


@dataclass(frozen=True)
class Fault:
    """A fault: what happens (kill, stop, hang, memory, nan) where, how often at most, and what must come of it.

    where : a name of `POINTS`. slide : whose task meets it, "" any. ends : "same bytes" of this run, "resumes" (the
    driver dies; the same run again has the same bytes), "gives up" (with code 4), or the code in which `slide` ends
    while the others are done.
    """

    act: str
    where: str
    ends: str
    slide: str = ""
    times: int = 1


FAULTS = {
    "killed inside a chunk's write": Fault("kill", "chunk's write", "same bytes"),
    "killed between chunk and commit": Fault("kill", "commit", "same bytes"),
    "killed inside a plan": Fault("kill", "plan", "same bytes"),
    "killed while reading": Fault("kill", "read", "same bytes"),
    "killed inside derive": Fault("kill", "derive", "same bytes"),
    "killed while scoring": Fault("kill", "score", "resumes"),
    "driver killed between two events": Fault("kill", "driver", "resumes"),
    "stopped while reading": Fault("stop", "read", "same bytes"),
    "a read that hangs": Fault("hang", "read", "same bytes"),
    "a read that always hangs": Fault("hang", "read", "E_QUARANTINE", slide="b", times=99),
    "a slide that kills its reader": Fault("kill", "read", "E_QUARANTINE", slide="b", times=99),
    "no memory once": Fault("memory", "score", "same bytes"),
    "no memory on the GPU once": Fault("gpu memory", "score", "same bytes"),
    "never enough memory": Fault("memory", "score", "E_OUT_OF_MEMORY", slide="b", times=99),
    "a model that returns NaN": Fault("nan", "score", "E_NAN_SCORE", slide="b", times=99),
    "a model that kills who loads it": Fault("kill", "load", "gives up", times=99),
}
"""Faults and what must come of them, for both executors."""


def install(name: str, folder: Path) -> None:
    """Put a fault of `FAULTS` into this process; `folder` counts how often it has struck, in all processes.

    The package has no hook for this: its functions are replaced by such as strike first.
    """
    fault = FAULTS[name]
    owner, function, slide_of = POINTS[fault.where]
    original = getattr(owner, function)

    def struck(*arguments: Any, **options: Any) -> Any:
        if fault.slide in ("", slide_of(*arguments)) and _claim(folder, fault.times):
            _ACTS[fault.act]()
        return original(*arguments, **options)

    setattr(owner, function, struck)


def _claim(folder: Path, times: int) -> bool:
    """Take one of so many strikes; whoever creates the file has it."""
    for i in range(times):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(folder / f"strike-{i}", os.O_CREAT | os.O_EXCL))
            return True
    return False


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _no_memory() -> None:
    raise MemoryError("simulated")


def _no_gpu_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory (simulated)")


def _nan() -> None:
    from slideflow_ray.errors import NanScore

    raise NanScore("simulated")


_ACTS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(3600),
    "memory": _no_memory,
    "gpu memory": _no_gpu_memory,
    "nan": _nan,
}


def _of_chunk(context: Any, chunk: Any, *rest: Any) -> str:
    return str(chunk.item.slide_id)


def _nobody(*arguments: Any) -> str:
    return ""


POINTS: dict[str, tuple[Any, str, Callable[..., str]]] = {
    "plan": (store.SlideStore, "make_group", _nobody),
    "read": (pipeline, "read_chunk", _of_chunk),
    "score": (pipeline, "score_chunk", _of_chunk),
    "derive": (pipeline, "derive", _nobody),
    "commit": (store.SlideStore, "commit", _nobody),
    "chunk's write": (Path, "replace", _nobody),  # zarr has written *.partial and not yet renamed it
    "driver": (RunGraph, "told", _nobody),
    "load": (worker.ModelScorer, "load", _nobody),
}
"""Where a fault may strike: an owner and its function, and whose slide a call is about."""

"""Hostile and broken files end in their code, soon, in little memory, and kill nothing (a sample; accept runs all)."""

from __future__ import annotations

import pytest
from corpus import CASES, Worker, check

EVERY = 6
"""One case in so many is opened by `make test`; those below always."""

ALWAYS = (
    "slide-loop-0",
    "slide-bomb-jpeg-65500x65500",
    "slide-zarr-v2-pickle",
    "run-deep-key",
    "bundle-weights-pickle",
)
SECONDS, MB = 10, 300


def sample():
    large = ("mb", "gb", "million", "bomb", "huge", "many")
    return [c for i, c in enumerate(CASES) if c.name in ALWAYS or (i % EVERY == 0 and not c.name.endswith(large))]


def test_the_corpus_is_large_and_every_name_stands_once():
    assert len(CASES) >= 150
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_sample_ends_in_its_codes(tmp_path):
    worker, wrong, slowest, largest = Worker(), [], 0.0, 0.0
    try:
        for number, case in enumerate(sample()):
            got = check(worker, case, tmp_path / str(number))
            slowest, largest = max(slowest, got.seconds), max(largest, got.mb)
            if got.code != case.code or got.seconds > SECONDS or got.mb > MB:
                wrong.append(f"{case.name}: {got} instead of {case.code}")
    finally:
        worker.close()
    print(f"slowest {slowest:.2f} s, largest {largest:.0f} MB above the idle worker")
    assert not wrong, "\n".join(wrong)
    assert worker.deaths == 0


def test_a_worker_that_dies_is_replaced_and_seen(tmp_path, monkeypatch):
    worker = Worker(deadline=20)
    try:
        assert worker.open("slide", tmp_path / "missing").code == "E_NOT_FOUND"
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(BrokenPipeError):
            worker.open("slide", tmp_path / "missing")
        worker.close()
        assert worker.open("slide", tmp_path / "missing").code == "E_NOT_FOUND"
    finally:
        worker.close()

"""Hostile and broken files end in their code, soon, in little memory, and kill nothing (a sample; accept runs all)."""

from __future__ import annotations

import struct

import pytest
from corpus import CASES, OK, Worker, base, check
from hypothesis import given, settings
from hypothesis import strategies as st

from slideflow_ray import errors

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


@pytest.fixture(scope="module")
def worker():
    one = Worker()
    yield one
    one.close()


def test_a_sample_ends_in_its_codes(worker, tmp_path):
    wrong, slowest, largest = [], 0.0, 0.0
    for number, case in enumerate(sample()):
        got = check(worker, case, tmp_path / str(number))
        slowest, largest = max(slowest, got.seconds), max(largest, got.mb)
        if got.code != case.code or got.seconds > SECONDS or got.mb > MB:
            wrong.append(f"{case.name}: {got} instead of {case.code}")
    print(f"slowest {slowest:.2f} s, largest {largest:.0f} MB above the idle worker")
    assert not wrong, "\n".join(wrong)
    assert worker.deaths == 0


def test_a_worker_that_is_closed_is_replaced(worker, tmp_path):
    assert worker.open("slide", tmp_path / "missing").code == "E_NOT_FOUND"
    worker.close()
    assert worker.open("slide", tmp_path / "missing").code == "E_NOT_FOUND"


SOUND = base()
FIRST = struct.unpack_from("<I", SOUND, 4)[0]
SLIDE_CODES = {
    kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SlideError)
}
VALUES = st.sampled_from([0, 1, 255, 2**16 - 1, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, (len(SOUND) - FIRST) // 2 - 2), VALUES), min_size=1, max_size=3))
def test_any_header_is_read_or_refused_by_one_of_our_errors(worker, tmp_path_factory, changes):
    data = bytearray(SOUND)
    for at, value in changes:
        struct.pack_into("<I", data, FIRST + 2 * at, value)
    path = tmp_path_factory.mktemp("header") / "a.tif"
    path.write_bytes(data)
    got = worker.open("slide", path)
    assert got.code in SLIDE_CODES | {OK}, got
    assert got.seconds < SECONDS
    assert got.mb < MB

"""Slides and results in an object store: the same answers as on disk, whatever the network does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from object_store import BUCKET, Faults, object_store

from slideflow_ray import bucket, storage
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec
from slideflow_ray.store import stores, verify

SECRET = "wJalrXUtnFEMI-SECRET"


@pytest.fixture(scope="module")
def server():
    with object_store() as (url, faults):
        yield url, faults


@pytest.fixture
def faults(server, monkeypatch, tmp_path) -> Faults:
    url, found = server
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "SLIDEFLOW_RAY_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    bucket.opened.cache_clear()
    storage._zarr_store.cache_clear()
    found.every, found.counts, found.before = 0, {}, lambda environ: None
    yield found
    found.every, found.before = 0, lambda environ: None


def uploaded(folder: Path, name: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write_atomic(
                storage.place(f"s3://{BUCKET}/{name}/{path.relative_to(folder).as_posix()}"), path.read_bytes()
            )
    return f"s3://{BUCKET}/{name}"


def arrays(out: str) -> dict[str, bytes]:
    """Every array of a run by slide and node, as dtype, shape and bytes."""
    found = {}
    for store in stores(out):
        group = zarr.open_group(storage.zarr_store(store.root), mode="r")
        for name, member in group.members(max_depth=None):
            if isinstance(member, zarr.Array):
                values = np.asarray(member[...])
                found[f"{store.slide_id}/{name}"] = f"{values.dtype} {values.shape}".encode() + values.tobytes()
    return found


def run_of(cohort: str, bundle: str, out: str) -> dict[str, int]:
    values = {"cohort": cohort, "out": out, "model": [{"path": bundle}], "executor": {"workers": 2}}
    return run(RunSpec.parse(values, "test")).counts


def test_slides_and_results_in_an_object_store_are_those_on_disk(faults, marked, bundles, tmp_path):
    here = run_of(str(marked / "with_a_bad_one.csv"), str(bundles["aligned"]), str(tmp_path / "out"))
    cohort = uploaded(marked, "slides")
    bundle = uploaded(bundles["aligned"], "bundles/aligned")
    faults.every = 5
    out = f"s3://{BUCKET}/results/night 1"
    there = run_of(f"{cohort}/with_a_bad_one.csv", bundle, out)
    assert here == there == {"done": 3, "failed": 0, "refused": 1}
    assert sum(faults.counts.values()) > 50
    assert {"503", "reset", "429", "short"} <= set(faults.counts)
    local, remote = arrays(str(tmp_path / "out")), arrays(out)
    assert sorted(local) == sorted(remote)
    assert [name for name in local if local[name] != remote[name]] == []
    assert verify(out)[1] == []
    again = run(RunSpec.parse(json.loads((storage.place(out) / "run.json").read_text())["spec"], "test"))
    assert not again.changed
    everything = b"".join(path.read_bytes() for path in storage.place(out).rglob("*") if path.is_file())
    assert SECRET.encode() not in everything

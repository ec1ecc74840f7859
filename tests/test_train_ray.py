"""Ray Train: the same training whoever dies, and a training of several workers that is one training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from slideflow_ray.errors import ConfigError
from slideflow_ray.events import EpochTrained
from slideflow_ray.models.bundle import load_weights
from slideflow_ray.phantoms import write_cohort
from slideflow_ray.train.job import train
from slideflow_ray.train.spec import TrainJob


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("ray_train"), slides=9, seed=3, size_px0=(1024, 768))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Tiles are the same for all trainings, so they are cut once."""
    return tmp_path_factory.mktemp("work")


def job(cohort: Path, out: Path, work: Path, kind: str, **fit) -> TrainJob:
    values = {
        "cohort": str(cohort),
        "out": str(out),
        "work": str(work),
        "classes": ("normal", "tumor"),
        "tile": {"tile_px": 32, "mpp": 1.0},
        "fit": {"epochs": 5, "batch_size": 16, "threads": 1, "device": "cpu", **fit},
        "crew": {"kind": kind, "workers": 2, "storage": str(out.parent / f"{out.name}-checkpoints")},
        "store": {"chunk_rows": 16},
    }
    return TrainJob.parse(values, "test")


def same(a: Path, b: Path) -> bool:
    one, two = load_weights(a), load_weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def epochs(bundle: Path) -> list[dict]:
    return json.loads((bundle / "training.json").read_text())["epochs"]


def by_torch_alone(told: TrainJob, folder: Path) -> Path:
    """The epochs (JSON, weights beside) of an undisturbed training by two processes without Ray."""
    (folder / "job.json").write_text(told.model_dump_json())
    script, out = Path(__file__).parent / "crew_of_two.py", folder / "two.json"
    command = [sys.executable, str(script), str(folder / "job.json")]
    two = [subprocess.Popen([*command, rank, str(folder / "meeting"), str(out)]) for rank in "01"]
    assert [process.wait(timeout=300) for process in two] == [0, 0]
    return out


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.soak  # Ray Train waits minutes before it gives a worker up
def test_a_worker_that_is_killed_changes_nothing(local_ray, cohort, work, tmp_path):
    killed = []

    def kill_after_the_first_epoch(event) -> None:
        if isinstance(event, EpochTrained) and not killed:
            workers = [
                p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or ())
            ]
            mine = [p for p in workers if psutil.Process() in p.parents()]
            killed.append(mine[-1].pid)
            os.kill(mine[-1].pid, signal.SIGKILL)

    disturbed = train(job(cohort, tmp_path / "b", work, "ray", epochs=3), kill_after_the_first_epoch).bundle
    assert killed
    want = by_torch_alone(job(cohort, tmp_path / "a", work, "ray", epochs=3), tmp_path)
    assert epochs(disturbed) == json.loads(want.read_text())
    assert len(epochs(disturbed)) == 3
    state = load_file(want.with_suffix(".safetensors"))
    assert all(torch.equal(state[key], value) for key, value in load_weights(disturbed).items())
    history = [json.loads(line) for line in (disturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in history] == list(range(3))
    # All tiles are shown to one of the two in each epoch; the shorter share begins again.
    shown = json.loads((disturbed / "training.json").read_text())["tiles"]["train"]
    assert all(shown <= line["tiles"] < shown + 2 * 16 for line in history)
    before = (disturbed / "weights.safetensors").stat().st_mtime_ns
    assert not train(job(cohort, tmp_path / "b", work, "ray", epochs=3)).changed
    assert (disturbed / "weights.safetensors").stat().st_mtime_ns == before


@pytest.mark.ray
def test_a_batch_that_the_workers_cannot_share_is_refused_before_they_start(local_ray, cohort, work, tmp_path):
    with pytest.raises(ConfigError, match="shared out evenly"):
        train(job(cohort, tmp_path / "o", work, "ray", batch_size=17))


@pytest.mark.soak
def test_a_driver_that_is_killed_goes_on_where_it_was(cohort, work, tmp_path):
    """One process: killed by the system in its second epoch, started again, against one that ran through."""
    undisturbed = train(job(cohort, tmp_path / "a", work, "inline", epochs=4)).bundle
    text = job(cohort, tmp_path / "b", work, "inline", epochs=4).model_dump_json()
    code = f"""
import json, sys
from slideflow_ray.train.job import train
from slideflow_ray.train.spec import TrainJob
if __name__ == "__main__":
    train(TrainJob.model_validate_json({text!r}), lambda event: print(type(event).__name__, flush=True))
"""
    path = tmp_path / "driver.py"
    path.write_text(code)
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "EpochTrained":
            break
    time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "b").exists()
    notes = []
    again = train(
        job(cohort, tmp_path / "b", work, "inline", epochs=4), lambda event: notes.append(getattr(event, "text", ""))
    )
    assert any(note.startswith("Going on after epoch") for note in notes)
    assert same(undisturbed, again.bundle)
    assert epochs(undisturbed) == epochs(again.bundle)
    assert np.isfinite([e["train_loss"] for e in epochs(again.bundle)]).all()

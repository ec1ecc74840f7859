"""jobs/retrain.py on Ray Train: the driver is killed in its second epoch, and the same line goes on where it was.

Not part of the tests (several starts of Ray Train); `make accept` runs it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from slideflow_ray.phantoms import write_cohort

ROOT = Path(__file__).resolve().parent.parent.parent
TOML = """
cohort = "cohort/cohort.csv"
out = "{out}"
work = "work"
classes = ["normal", "tumor"]
tile = {{tile_px = 32, mpp = 1.0}}
store = {{chunk_rows = 16}}
executor = {{kind = "inline"}}

[fit]
epochs = {epochs}
batch_size = 16
device = "cpu"

[crew]
storage = "checkpoints"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("faults")
    write_cohort(made / "cohort", slides=9, seed=3, size_px0=(1024, 768))
    return made


def start(folder: Path, name: str, epochs: int = 8) -> subprocess.Popen[str]:
    text = TOML.format(out=name, epochs=epochs)
    (folder / f"{name}.toml").write_text(text)
    command = [sys.executable, str(ROOT / "jobs" / "retrain.py"), str(folder / f"{name}.toml"), "--workers", "2"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def heard(process: subprocess.Popen[str], word: str) -> list[str]:
    """Lines of standard error up to the one that begins with `word`."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(word):
            return lines
    pytest.fail(f"it ended without {word!r}:\n{''.join(lines)[-3000:]}")


def finish(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    text = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=600) == 0, text[-3000:]
    return text


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """What a machine that goes down does: the driver and its local Ray are gone at once."""
    gone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in gone:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(gone, timeout=30)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


def test_a_driver_that_is_killed_goes_on_and_ends_as_one_that_was_not(folder):
    finish(start(folder, "whole"))
    process = start(folder, "killed")
    heard(process, "epoch 1 of 8")
    kill_with_children(process)
    assert not (folder / "killed").exists()
    again = start(folder, "killed")
    text = finish(again)
    epochs = [line for line in text.splitlines() if line.startswith("epoch ")]
    assert epochs
    assert not epochs[0].startswith("epoch 1 of")  # it did not begin again
    whole, killed = (json.loads((folder / name / "training.json").read_text()) for name in ("whole", "killed"))
    assert whole["epochs"] == killed["epochs"]
    weights = [(folder / name / "weights.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    lines = [json.loads(line) for line in (folder / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(8))

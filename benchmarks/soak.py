"""Kill readers, actors and drivers at random instants, run again until done, and compare with the undisturbed run.

    python benchmarks/soak.py --kills 200 --minutes 120 --executor inline

A cohort of 50 small phantoms is run once undisturbed. Then it is run over and over, killed at instants drawn from a
seed: one worker, the driver with all its children, or (under Ray, each run's own) the head: its raylet or its GCS.
Each time it ends by itself, its digest, its strays and its counts are checked, and it begins anew in another folder,
until so many kills have struck. A run's processes carry a mark in their environment: whatever outlives its run is
found by it, ended and, where the run ended by itself, a failure of the soak.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from slideflow_ray.accounting import read_run
from slideflow_ray.models.bundle import BundleCard, write_bundle
from slideflow_ray.models.networks import build
from slideflow_ray.phantoms import write_marked_slide
from slideflow_ray.repair import verify
from slideflow_ray.store import tree_digest
from slideflow_ray.testing import MARK, end_marked, marked

ENDED_BY_RAY = "Failed to connect to GCS within 60 seconds"
"""What Ray says when it ends a process whose head died inside of `ray.init`, before there is a run: with code 1."""
KINDS = ("worker", "driver", "head")


def prepare(folder: Path, slides: int) -> Path:
    """Write slides, a bundle and the beginning of run.toml; return the folder."""
    rng = random.Random(0)
    for i in range(slides):
        write_marked_slide(folder / f"s{i}.tif", size_px0=(rng.randrange(200, 700), rng.randrange(200, 700)))
    rows = "".join(f"s{i},s{i}.tif,tem\n" for i in range(slides))
    (folder / "cohort.csv").write_text(f"slide_id,uri,modality\n{rows}")
    torch.manual_seed(0)
    told = {"task": "classify", "architecture": "small-cnn", "classes": ("normal", "tumor")}
    norm = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    card = BundleCard.parse({"name": "soak", **told, "tile_px": 64, "mpp": 0.5, **norm}, "soak")
    write_bundle(folder / "bundle", card, build("small-cnn", {}, 2).state_dict())
    return folder


def start(folder: Path, out: Path, executor: str, retry: bool = False) -> subprocess.Popen[bytes]:
    """Start a run in a process group of its own, with its mark and, for Ray, a folder for sessions of its own."""
    toml = folder / "run.toml"
    text = f'cohort = "{folder}/cohort.csv"\nout = "{out}"\n[[model]]\npath = "{folder}/bundle"\n'
    text += f'[store]\nchunk_rows = 16\n[compute]\ndevice = "cpu"\n[executor]\nkind = "{executor}"\nworkers = 2\n'
    toml.write_text(text)
    command = [sys.executable, "-m", "slideflow_ray.cli", "run", str(toml), *(["--retry"] if retry else [])]
    env = {**os.environ, MARK: str(folder), "RAY_TMPDIR": str(folder / "ray"), "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("RAY_ADDRESS", None)
    (folder / "ray").mkdir(exist_ok=True)
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)


def bury(folder: Path) -> None:
    """End what is left of a killed run, and its Ray's session."""
    end_marked(str(folder))
    shutil.rmtree(folder / "ray", ignore_errors=True)


def ended_alone(folder: Path) -> None:
    """Exit unless all that a run started is gone a while after it has ended by itself."""
    deadline = time.monotonic() + 60  # a worker that was being started when its raylet was killed takes half a minute
    while left := marked(str(folder)):
        if time.monotonic() > deadline:
            names = [" ".join(process.cmdline())[:80] for process in left if process.is_running()]
            end_marked(str(folder))
            raise SystemExit(f"a run left processes behind: {names}")
        time.sleep(0.2)


def called(folder: Path, *names: str) -> list[psutil.Process]:
    """Return those of a run's processes whose command line has one of these names."""
    found = []
    for child in marked(str(folder)):
        with contextlib.suppress(psutil.Error):
            line = " ".join(child.cmdline())
            if any(name in line for name in names):
                found.append(child)
    return found


def victims(folder: Path, who: str, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes one of which is to be killed; of a driver there is one."""
    if who == "driver":
        return [psutil.Process(process.pid)]
    return called(folder, "spawn_main", "ray::Fused") if who == "worker" else called(folder, "/raylet/", "/gcs_server")


def strike(folder: Path, process: subprocess.Popen[bytes], rng: random.Random, who: str, within_s: float) -> bool:
    """Kill a worker, the head or the driver some time after there is one; return whether the run still went on."""
    moment = 0.0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            if moment == 0.0 and victims(folder, who, process):
                moment = time.monotonic() + rng.uniform(0, within_s)
            if moment and time.monotonic() > moment and (found := victims(folder, who, process)):
                rng.choice(found).kill()
                return True
        time.sleep(0.02)
    return False


def disturbed(folder: Path, out: Path, executor: str, rng: random.Random, within_s: float, left: int) -> dict[str, int]:
    """Run until it ends by itself with all done, killed at most `left` times; return the kills."""
    kills = dict.fromkeys(KINDS, 0)
    process = start(folder, out, executor)
    while True:
        who = rng.choices(KINDS, (0.5, 0.35, 0.15 if executor == "ray" else 0))[0]
        if sum(kills.values()) < left and strike(folder, process, rng, who, within_s):
            kills[who] += 1
            if who == "driver":
                process.wait()
                bury(folder)
                process = start(folder, out, executor)
            continue
        code = process.wait()
        said = (folder / "log.txt").read_text()[-3000:]
        if code not in (0, 3, 4) and not (code == 1 and ENDED_BY_RAY in said):
            raise SystemExit(f"a run ended with {code}: {said}")
        ended_alone(folder)
        if code == 0:
            return kills
        process = start(folder, out, executor, retry=code == 3)  # kills that met a slide twice while it was alone


def check(out: Path, digest: str) -> None:
    """Exit unless a folder holds the undisturbed run's bytes, all slides done, and nothing else."""
    record = read_run(out)
    strays = [p for p in out.rglob("*") if p.name.endswith((".partial", ".tmp")) or p.name == "lease.json"]
    said = [f"counts {record['counts']}"] if record["counts"]["done"] != len(record["items"]) else []
    said += [f"stray {path}" for path in strays] + verify(out)[1]
    said += [] if tree_digest(out) == digest else ["another digest"]
    if said:
        raise SystemExit(f"{out}: " + "; ".join(said))


def main() -> None:
    """Soak, and say how many kills were survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--slides", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--executor", choices=["inline", "ray"], default="inline")
    options = parser.parse_args()
    rng, end = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    total = dict.fromkeys(KINDS, 0)
    runs = 0
    with tempfile.TemporaryDirectory(prefix="soak") as name:
        folder = prepare(Path(name), options.slides)
        began = time.monotonic()
        if start(folder, folder / "reference", options.executor).wait():
            raise SystemExit((folder / "log.txt").read_text()[-3000:])
        whole_s, digest = time.monotonic() - began, tree_digest(folder / "reference")
        print(f"undisturbed: {whole_s:.1f} s, {digest}", flush=True)
        while sum(total.values()) < options.kills and time.monotonic() < end:
            left = min(options.kills - sum(total.values()), 25)
            kills = disturbed(folder, folder / "out", options.executor, rng, whole_s / 4, left)
            check(folder / "out", digest)
            shutil.rmtree(folder / "out")
            total = {who: total[who] + kills[who] for who in total}
            runs += 1
            print(f"{runs} cohorts done, same digest; killed {total}", flush=True)
    print(f"survived {sum(total.values())} kills ({total}) with {options.executor}: one digest, nothing left over")


if __name__ == "__main__":
    main()

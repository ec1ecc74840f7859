"""Kill readers, actors and drivers at random instants, run again until done, and compare with the undisturbed run.

    python benchmarks/soak.py --kills 200 --minutes 120 --executor inline

A cohort of 50 small phantoms is run once undisturbed. Then it is run over and over, killed at instants drawn from a
seed: the driver with all its children, or one child. Each time it ends by itself, its digest, its strays and its
counts are checked, and it begins anew in another folder, until so many kills have struck.
"""

from __future__ import annotations

import argparse
import contextlib
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


def prepare(folder: Path, slides: int, executor: str) -> Path:
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


def start(folder: Path, out: Path, executor: str) -> subprocess.Popen[bytes]:
    """Start a run in a process group of its own."""
    toml = folder / "run.toml"
    text = f'cohort = "{folder}/cohort.csv"\nout = "{out}"\n[[model]]\npath = "{folder}/bundle"\n'
    text += f'[store]\nchunk_rows = 16\n[compute]\ndevice = "cpu"\n[executor]\nkind = "{executor}"\nworkers = 2\n'
    toml.write_text(text)
    command = [sys.executable, "-m", "slideflow_ray.cli", "run", str(toml)]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return a run's own children, all generations."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return those of a run's children that work: readers, or actors."""
    found = []
    for child in family(process):
        with contextlib.suppress(psutil.Error):
            line = " ".join(child.cmdline())
            if "spawn_main" in line or "ray::Fused" in line:
                found.append(child)
    return found


def kill(process: subprocess.Popen[bytes], rng: random.Random) -> str:
    """Kill one worker, or the driver with all that it started; return which, "" where nothing was left to kill."""
    victims = workers(process)
    if process.poll() is not None:
        return ""
    if victims and rng.random() < 0.5:
        with contextlib.suppress(psutil.Error):
            rng.choice(victims).kill()
        return "worker"
    orphans = family(process)
    process.kill()
    for child in orphans:
        with contextlib.suppress(psutil.Error):
            child.kill()
    process.wait()
    return "driver"


def disturbed(folder: Path, out: Path, executor: str, rng: random.Random, whole_s: float, left: int) -> dict[str, int]:
    """Run until it ends by itself, killed at most `left` times; return the kills."""
    kills = {"worker": 0, "driver": 0}
    process = start(folder, out, executor)
    while True:
        wait_s = rng.uniform(0, whole_s / 4) if sum(kills.values()) < left else None
        try:
            code = process.wait(wait_s)
        except subprocess.TimeoutExpired:
            if (who := kill(process, rng)) != "":
                kills[who] += 1
            if who == "driver":
                process = start(folder, out, executor)
            continue
        if code == 0:
            return kills
        if code not in (3, 4):
            raise SystemExit(f"a run ended with {code}: {(folder / 'log.txt').read_text()[-3000:]}")
        process = start(folder, out, executor)


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
    total = {"worker": 0, "driver": 0}
    runs = 0
    with tempfile.TemporaryDirectory(prefix="soak") as name:
        folder = prepare(Path(name), options.slides, options.executor)
        began = time.monotonic()
        if start(folder, folder / "reference", options.executor).wait():
            raise SystemExit((folder / "log.txt").read_text()[-3000:])
        whole_s, digest = time.monotonic() - began, tree_digest(folder / "reference")
        print(f"undisturbed: {whole_s:.1f} s, {digest}", flush=True)
        while sum(total.values()) < options.kills and time.monotonic() < end:
            left = min(options.kills - sum(total.values()), 25)
            kills = disturbed(folder, folder / "out", options.executor, rng, whole_s, left)
            check(folder / "out", digest)
            shutil.rmtree(folder / "out")
            total = {who: total[who] + kills[who] for who in total}
            runs += 1
            print(f"{runs} cohorts done, same digest; killed {total}", flush=True)
    print(f"survived {sum(total.values())} kills ({total}) with {options.executor}: one digest, nothing left over")


if __name__ == "__main__":
    main()

"""Training by one worker and by two, against the bare step on tensors in memory; and memory against the cohort's size.

    python benchmarks/train.py [--architecture torchvision:resnet18] [--tile-px 128] [--steps 30]

Each figure is of processes of its own with one torch thread each; two train together by torch.distributed, as Ray
Train has them do. "bare" are the same forward, backward and optimiser steps on one batch that stays in memory. The loop
reads stored tiles, with and without augmentation. The last part reads a cohort of one and of eight times as many
chunks through a buffer of 64 MB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32
WARM = 3


def make_store(folder: Path, tile_px: int, slides: int, tiles: int) -> None:
    """Stores of random stored tiles, labelled in turn: reading and decoding are real, the pixels mean nothing."""
    from slideflow_ray.store import SlideStore

    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (tiles, tile_px // 4, tile_px // 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    for i in range(slides):
        store = SlideStore(folder, f"s{i}")
        store.create_rows("grids/g/tiles", (tiles, tile_px, tile_px, 3), np.uint8, tiles, fill=0, sharded=True)
        store.write_chunk("grids/g/tiles", 0, np.roll(base, i, axis=0))


def source(folder: Path, tile_px: int, slides: int, tiles: int, times: int, buffer_bytes: int) -> Any:
    from slideflow_ray.cohort import Item
    from slideflow_ray.pipeline import Chunk, Context
    from slideflow_ray.specs import StoreSpec, TileSpec, TissueSpec
    from slideflow_ray.train.tiles import ChunkTiles, LabelledChunk

    tile = TileSpec(tile_px=tile_px, mpp=1.0)
    context = Context(str(folder), (), TissueSpec(), StoreSpec(chunk_rows=tiles), (tile,))
    labels = np.arange(tiles, dtype=np.int64) % 2
    chunks = [
        LabelledChunk(Chunk(Item(slide_id=f"s{i}", uri="x"), "g", tile, 0, tiles, ()), labels)
        for _ in range(times)
        for i in range(slides)
    ]
    return ChunkTiles(context, chunks, buffer_bytes)


def worker(told: dict[str, Any]) -> dict[str, float]:
    """Train for some steps and return tiles per second of this worker, and its peak memory in MB."""
    import torch
    from torch import distributed

    from slideflow_ray.models.bundle import BundleCard
    from slideflow_ray.train import loop
    from slideflow_ray.train.crew import Crew
    from slideflow_ray.train.spec import TrainSpec

    size, rank = told["size"], told["rank"]
    if size > 1:
        distributed.init_process_group("gloo", init_method=f"file://{told['meeting']}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    crew = Crew(rank, size)
    values = {"architecture": told["architecture"], "batch_size": BATCH * size, "augment": told["augment"]}
    spec = TrainSpec.model_validate({**values, "device": "cpu", "threads": 1, "epochs": 1000})
    card = BundleCard(
        name="bench",
        task="classify",
        architecture=told["architecture"],
        classes=("normal", "tumor"),
        tile_px=told["tile_px"],
        mpp=1.0,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    trainer = loop.new_trainer(card, spec, np.ones((2, 2), np.int64), crew=crew)
    trainer.net.train()
    net = crew.wrap(trainer.net)
    if told["what"] == "bare":
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 255, (BATCH, told["tile_px"], told["tile_px"], 3), np.uint8)
        batches = iter(lambda: (pixels, np.arange(BATCH) % 2), None)
    else:
        tiles = source(
            Path(told["folder"]), told["tile_px"], told["slides"], told["tiles"], told["times"], told["buffer"]
        )
        batches = (batch for epoch in range(1000) for batch in crew.batches(tiles, spec, epoch))
    for _ in range(WARM):
        loop._step(trainer, net, *next(batches))
    began = time.perf_counter()
    for _ in range(told["steps"]):
        loop._step(trainer, net, *next(batches))
    rate = told["steps"] * BATCH / (time.perf_counter() - began)
    if size > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    return {"rate": rate, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure(**told: Any) -> dict[str, float]:
    """Run the workers of one figure, each in a process of its own; return their rates added, and the largest peak."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker"]
        texts = [json.dumps({**told, "rank": i, "meeting": f"{folder}/meeting"}) for i in range(told["size"])]
        running = [subprocess.Popen([*command, text], stdout=subprocess.PIPE, text=True) for text in texts]
        found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    return {"rate": sum(one["rate"] for one in found), "peak_mb": max(one["peak_mb"] for one in found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="torchvision:resnet18")
    parser.add_argument("--tile-px", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(worker(json.loads(given.worker))))
        return
    with tempfile.TemporaryDirectory() as name:
        slides, tiles = 8, 256
        make_store(Path(name), given.tile_px, slides, tiles)
        told = {"architecture": given.architecture, "tile_px": given.tile_px, "steps": given.steps, "folder": name}
        told |= {"slides": slides, "tiles": tiles, "times": 1, "buffer": 64 * 2**20}
        for size in (1, 2):
            bare = measure(**told, what="bare", augment=False, size=size)
            plain = measure(**told, what="loop", augment=False, size=size)
            full = measure(**told, what="loop", augment=True, size=size)
            again = measure(**told, what="bare", augment=False, size=size)
            base = (bare["rate"] + again["rate"]) / 2
            print(
                f"{size} worker{'s' if size > 1 else ''}: bare {bare['rate']:.0f} and {again['rate']:.0f} tiles/s; "
                f"loop {plain['rate']:.0f} ({plain['rate'] / base:.2f}), "
                f"augmented {full['rate']:.0f} ({full['rate'] / base:.2f})"
            )
        for times in (1, 8):
            found = measure(
                **{**told, "times": times, "steps": 8 * slides * tiles // BATCH // 4},
                what="loop",
                augment=False,
                size=1,
            )
            print(f"cohort of {times * slides * tiles:,} tiles: peak {found['peak_mb']:.0f} MB")


if __name__ == "__main__":
    main()

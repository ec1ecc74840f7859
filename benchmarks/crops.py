"""Thousands of crops through one run: files per 1,000 crops, and what a crop costs beside decoding and scoring it.

    python benchmarks/crops.py [--crops 13000] [--side 160]

Generated JPEGs of one size, a small network on whole images at 96 px. The cost beside decoding is the run's wall time
times its workers, less that of decoding and resizing the same files, and of the bare forward pass, in one process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from slideflow_ray.run import run
from slideflow_ray.specs import ComputeSpec, RunSpec

TILE_PX = 96


def write_crops(folder: Path, n: int, side: int) -> Path:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (side // 4, side // 4, 3), np.uint8)
    lines = ["slide_id,uri,patient_id,modality"]
    for i in range(n):
        tint = np.roll(base, i % (side // 4), axis=0) ^ np.uint8(i % 251)
        Image.fromarray(tint).resize((side, side)).save(folder / f"{i:05d}.jpg", quality=85)
        lines.append(f"crop{i:05d},{i:05d}.jpg,p{i // 50},pas")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    return folder / "cohort.csv"


def make_bundle(folder: Path) -> Path:
    import torch

    from slideflow_ray.models.bundle import BundleCard, write_bundle
    from slideflow_ray.models.networks import build

    torch.manual_seed(0)
    card = BundleCard(
        name="crops",
        task="classify",
        architecture="small-cnn",
        classes=("normal", "mspgn", "fsg", "cgn"),
        tile_px=TILE_PX,
        whole="squash",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    return write_bundle(folder / "bundle", card, build("small-cnn", {}, 4).state_dict())


def decode_seconds(files: list[Path]) -> tuple[float, np.ndarray]:
    """Seconds to decode and resize files with Pillow alone, and the tiles."""
    began = time.perf_counter()
    tiles = [
        np.asarray(Image.open(f).convert("RGB").resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR)) for f in files
    ]
    return time.perf_counter() - began, np.stack(tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=13_000)
    parser.add_argument("--side", type=int, default=160)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cohort, bundle, out = write_crops(folder, given.crops, given.side), make_bundle(folder), folder / "out"
        values = {"cohort": str(cohort), "out": str(out), "model": [{"path": str(bundle)}]}
        spec = RunSpec.parse({**values, "executor": {"workers": given.workers}}, "benchmark")
        began = time.perf_counter()
        result = run(spec)
        first = time.perf_counter() - began
        began = time.perf_counter()
        again = run(spec)
        second = time.perf_counter() - began
        files = sum(p.is_file() for p in out.rglob("*"))
        sample = sorted(folder.glob("*.jpg"))[:2000]
        decode, tiles = decode_seconds(sample)
        from slideflow_ray.models.scorer import load_scorer, pin_threads
        from slideflow_ray.profile import resolve

        pin_threads()
        scorer = load_scorer(bundle, resolve(ComputeSpec()))
        began = time.perf_counter()
        scorer.margins(tiles)
        forward = time.perf_counter() - began
        n = given.crops
        per_crop = 1e3 * first * given.workers / n
        beside = per_crop - 1e3 * (decode + forward) / len(sample)
        figures = {
            "crops": n,
            "done": result.counts["done"],
            "seconds": round(first, 1),
            "seconds when run again": round(second, 1),
            "changed when run again": again.changed,
            "files": files,
            "files per 1,000 crops": round(1000 * files / n, 1),
            "core-ms per crop": round(per_crop, 2),
            "of which decoding": round(1e3 * decode / len(sample), 2),
            "of which forward": round(1e3 * forward / len(sample), 2),
            "beside both (start-up included)": round(beside, 2),
        }
        print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

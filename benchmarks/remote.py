"""A remote slide by blocks against one copy: seconds and bytes, by how much of it is tissue; ratios within one run.

    python benchmarks/remote.py [--latency 0.03] [--mb-per-s 50] [--side 9216] [--block 262144] [--repeats 3]

A web server of its own process on 127.0.0.1 (ETags and ranges, as a bucket has them; moto reads the whole object for
every part of it), with a pause before each answer and a bandwidth for each connection. Both ways read
the overview and every tile of the tissue, from an empty cache, as one reader of a run does. `share` is what
`sparse.share` says of the tiles before they are read. A row with mpp 2 is a model that reads a coarser level.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from slideflow_ray import blocks, sparse
from slideflow_ray.grid import Grid, make_grid
from slideflow_ray.phantoms import halved, write_pyramid
from slideflow_ray.remote import fetched, look
from slideflow_ray.slides import SlideReader, open_slide, read_tiles
from slideflow_ray.specs import TileSpec
from slideflow_ray.tissue import LEVEL0_PX, TissueMask, thumbnail, thumbnail_size

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from web_server import own_process

MASK = 96
CASES = ((0.05, 0.5), (0.3, 0.5), (0.8, 0.5), (0.3, 1.0), (0.8, 1.0), (0.8, 2.0))


def tissue_of(part: float) -> npt.NDArray[np.bool_]:
    """Two pieces side by side that cover `part` of a slide."""
    mask = np.zeros((MASK, MASK), np.bool_)
    height = min(MASK - 2, round(MASK * (2 * part) ** 0.5))
    width = round(part * MASK * MASK / height / 2)
    for left in (1, MASK // 2 + 1):
        mask[1 : 1 + height, left : left + width] = True
    return mask


def write_slide(path: Path, side: int, mask: npt.NDArray[np.bool_]) -> None:
    """Glass with the noise of a sensor, and tissue with structure at the scale of nuclei, as JPEG."""
    rng = np.random.default_rng(0)
    patch = ndimage.gaussian_filter(rng.normal(size=(1024, 1024, 3)), (2, 2, 0))
    tissue = np.clip(170 + patch / patch.std() * (35, 45, 25), 0, 255).astype(np.uint8)
    glass = np.clip(240 + rng.normal(size=(1024, 1024, 3)) * 2, 0, 255).astype(np.uint8)
    times = -(-side // 1024)
    pixels = np.tile(glass, (times, times, 1))[:side, :side]
    where = np.kron(mask, np.ones((side // MASK, side // MASK), np.bool_))
    pixels[where] = np.tile(tissue, (times, times, 1))[:side, :side][where]
    write_pyramid(path, halved(pixels, 6), 0.5, quality=80)


def read_all(reader: SlideReader, grid: Grid, mpp: float) -> int:
    """Read the overview and every tile, chunk by chunk; return their sum, which both ways share."""
    overview = thumbnail(reader, thumbnail_size(reader, 8.0), level0_px=LEVEL0_PX)
    chunks = range(0, len(grid), 256)
    tiles = (read_tiles(reader, grid.xy_px0[i : i + 256], tile_px=224, mpp=mpp) for i in chunks)
    return int(overview.sum()) + sum(int(part.sum(dtype=np.int64)) for part in tiles)


def by_blocks(uri: str) -> SlideReader:
    return open_slide(uri, modality="he", source=blocks.Blocks(look(uri)))


def by_copy(uri: str) -> SlideReader:
    return open_slide(uri, modality="he", source=fetched(look(uri)))


def timed(open_it: Callable[[str], SlideReader], uri: str, grid: Grid, mpp: float) -> tuple[float, int]:
    shutil.rmtree(os.environ["SLIDEFLOW_RAY_CACHE"], ignore_errors=True)
    began = time.perf_counter()
    with open_it(uri) as reader:
        total = read_all(reader, grid, mpp)
    return time.perf_counter() - began, total


def measure(uri: str, part: float, mpp: float, count: Any, repeats: int) -> None:
    mask = tissue_of(part)
    with by_copy(uri) as reader:
        spec = TileSpec(tile_px=224, mpp=mpp, min_tissue=0.5)
        per_px = (reader.size_px0[0] / MASK, reader.size_px0[1] / MASK)
        grid = make_grid(reader.size_px0, reader.mpp0, reader.levels, spec, TissueMask(mask, per_px, "drawn"))
    size = look(uri).size
    with by_blocks(uri) as reader:
        share = sparse.share(reader, [(grid, spec)], size)  # type: ignore[arg-type]
    seconds: dict[str, list[float]] = {"blocks": [], "copy": []}
    cost: dict[str, tuple[int, int]] = {}
    sums = set()
    for _ in range(repeats):
        for name, way in (("blocks", by_blocks), ("copy", by_copy)):
            count[0] = count[1] = 0
            took, total = timed(way, uri, grid, mpp)
            seconds[name].append(took)
            cost[name] = (count[0], count[1])
            sums.add(total)
    if len(sums) != 1:
        raise SystemExit("The two ways gave different pixels.")
    a, b = (statistics.median(seconds[name]) for name in ("blocks", "copy"))
    print(
        f"{part:4.0%} tissue, {mpp:g} um/px: {len(grid):5} tiles, file {size / 1e6:5.1f} MB, share {share:4.2f} | "
        f"{cost['blocks'][0]:4} requests, {cost['blocks'][1] / 1e6:5.1f} MB ({cost['blocks'][1] / size:4.2f}) | "
        f"blocks {a:5.2f} s, copy {b:5.2f} s, ratio {a / b:4.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before each answer")
    parser.add_argument("--mb-per-s", type=float, default=50.0, help="of one connection")
    parser.add_argument("--side", type=int, default=9216)
    parser.add_argument("--block", type=int, default=blocks.BLOCK)
    parser.add_argument("--repeats", type=int, default=3)
    told = parser.parse_args()
    blocks.BLOCK = sparse.BLOCK = told.block
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(SLIDEFLOW_RAY_ALLOW="http", SLIDEFLOW_RAY_CACHE=f"{folder}/cache")
        slides = Path(folder) / "slides"
        for part in dict.fromkeys(part for part, _ in CASES):
            write_slide(slides / f"{round(100 * part)}.tif", told.side, tissue_of(part))
        with own_process(slides, told.latency, told.mb_per_s * 1e6) as (url, count):
            for part, mpp in CASES:
                measure(f"{url}/{round(100 * part)}.tif", part, mpp, count, told.repeats)


if __name__ == "__main__":
    main()

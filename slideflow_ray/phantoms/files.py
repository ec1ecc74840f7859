"""Phantoms as files: pyramids, and a slide that betrays every swapped axis."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from slideflow_ray.errors import ConfigError
from slideflow_ray.phantoms.shapes import Pixels
from slideflow_ray.processes import pool

Split = Literal["train", "val", "test"]


def halved(rgb: Pixels, levels: int) -> list[Pixels]:
    """Return `levels` pictures, each half the one before (mean of 2 x 2, sides rounded down)."""
    out = [rgb]
    while len(out) < levels and min(out[-1].shape[:2]) >= 2:
        h, w = (side // 2 * 2 for side in out[-1].shape[:2])
        out.append(np.asarray(Image.fromarray(np.ascontiguousarray(out[-1][:h, :w])).reduce(2)))
    return out


def write_pyramid(path: Path, levels: list[Pixels], mpp0: float, *, quality: int = 0, tile: int = 256) -> None:
    """Write a tiled TIFF pyramid that tiffslide and OpenSlide read as generic TIFF.

    `quality` 1 to 100 is JPEG, 0 is lossless (deflate). No time stamps: the same pixels
    make the same bytes.
    """
    import tifffile

    path.parent.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"compression": "zlib"}
    if quality:  # with colour at half the resolution, small nuclei would be paler than large ones
        how = {"compression": "jpeg", "compressionargs": {"level": quality}, "subsampling": (1, 1)}
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            per_cm = 1e4 / (mpp0 * 2**number)
            file.write(
                level,
                photometric="rgb",
                tile=(tile, tile),
                subfiletype=1 if number else 0,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
                software=False,
                maxworkers=1,
                **how,
            )


def in_processes[Job, Made](make: Callable[[Job], Made], jobs: Sequence[Job], workers: int = 0) -> list[Made]:
    """Return what `make` makes of each job, in `workers` processes (0: one per core of this process; 1: this one)."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        return [make(job) for job in jobs]
    with pool(workers) as several:
        return list(several.map(make, jobs, chunksize=-(-len(jobs) // (8 * workers))))


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows of the same keys with their header; return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


# a slide that betrays every swapped axis


def write_marked_slide(
    path: str | Path,
    *,
    size_px0: tuple[int, int] = (1501, 2203),
    mpp0: float = 0.5,
    levels: int = 3,
    tile: int = 128,
) -> list[Pixels]:
    """Write a lossless pyramid of odd sides in which every pixel says where it stands; return its levels.

    Red and green are the low bytes of x and y in px0, blue holds the high four bits of
    each (sides up to 4,096 px); pixel (i, j) of level k carries the mark of px0
    (i * 2^k, j * 2^k). No two pixels of a level are alike, so neither are two tiles.
    """
    w, h = size_px0
    if max(w, h) > 4096:
        raise ConfigError(f"Marks reach to 4,096 px, not to {max(w, h):,}.")
    x, y = np.meshgrid(np.arange(w), np.arange(h))
    marks = np.stack([x & 255, y & 255, (x >> 8) << 4 | y >> 8], axis=2).astype(np.uint8)
    out = [marks]
    while len(out) < levels:
        step = 2 ** len(out)
        out.append(np.ascontiguousarray(marks[: h // step * step : step, : w // step * step : step]))
    write_pyramid(Path(path), out, mpp0, tile=tile)
    return out


def read_marks(pixels: Pixels) -> npt.NDArray[np.int64]:
    """Return the px0 position (x, y) that each marked pixel carries, int64, shape (..., 2).

    >>> read_marks(np.array([[[1, 2, 0x34]]], np.uint8)).tolist()
    [[[769, 1026]]]
    """
    red, green, blue = (pixels[..., channel].astype(np.int64) for channel in range(3))
    return np.stack([red | (blue >> 4) << 8, green | (blue & 15) << 8], axis=-1)

"""Slides that OpenSlide reads: DICOM, MIRAX, Hamamatsu, Ventana, Leica, Philips, and what tiffslide cannot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import openslide

from slideflow_ray.errors import NotASlide, ReadError
from slideflow_ray.geometry import Level
from slideflow_ray.slides.base import (
    WHITE,
    Box,
    Opened,
    Pixels,
    check_size,
    checked_mpp,
    describe,
    file_size,
    inside,
    on_white,
    pyramid,
)

BLOCK = 1024
"""Level pixels per side of what is read at once where OpenSlide has to interpolate."""

SEARCH = 64
"""How many pixels before a block are tried for a start that needs no interpolation."""


class OpenSlideReader(Opened):
    """A SlideReader over OpenSlide.

    OpenSlide takes a box's corner in px0 and divides by the level's downsample. Where
    that is a whole number the level box is hit exactly. Where it is not (a level of
    277 x 370 px of a slide of 2220 x 2967 is 8.0167), OpenSlide shifts the level by a
    fraction of a pixel and interpolates; then boxes are cut from fixed blocks, so a
    pixel's value does not depend on the box it was asked for in. The shift is below
    half a px0.
    """

    name = "openslide"

    def __init__(self, uri: str, path: Path, mpp: float | None, modality: str | None = None) -> None:
        self.uri = uri
        self._path = _one_of_series(path) if path.is_dir() else path
        self._closed = False
        self._slide = openslide.OpenSlide(str(self._path))
        try:
            self._open(mpp, modality)
        except BaseException:
            self.close()
            raise

    def _open(self, mpp: float | None, modality: str | None) -> None:
        found = self._slide.properties
        self.size_px0: tuple[int, int] = self._slide.dimensions
        check_size(self.uri, self.size_px0, file_size(self._path))
        ends = (found.get(openslide.PROPERTY_NAME_MPP_X), found.get(openslide.PROPERTY_NAME_MPP_Y))
        power = found.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
        self.mpp0, self.mpp_source = checked_mpp(self.uri, mpp, ends, objective=power, modality=modality)
        kept = pyramid(self._slide.level_dimensions)
        self.levels: tuple[Level, ...] = tuple(kept.values())
        self._index = tuple(kept)
        self._downsample = tuple(float(self._slide.level_downsamples[index]) for index in kept)

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """Return a box of a level; see SlideReader.read."""
        out: Pixels = np.full((size[1], size[0], 3), WHITE, np.uint8)
        box = inside(self.levels[level].size, xy, size)
        if box[2] <= box[0] or box[3] <= box[1]:
            return out
        target = out[box[1] - xy[1] : box[3] - xy[1], box[0] - xy[0] : box[2] - xy[0]]
        try:
            if self._closed:
                raise ValueError("the slide is closed")
            if self._downsample[level].is_integer():
                target[:] = self._region(level, (box[0], box[1]), (box[2] - box[0], box[3] - box[1]))
            else:
                self._from_blocks(target, level, box)
        except MemoryError:
            raise
        except Exception as error:
            self._reopen()
            text = f"{describe(self.uri, level, xy, size)}: {type(error).__name__}: {error}."
            raise ReadError(text) from error
        return out

    def _region(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """Return a box inside the level; the only place where OpenSlide's px0 corner is computed."""
        x, y = (round(v * self._downsample[level]) for v in xy)
        return on_white(np.asarray(self._slide.read_region((x, y), self._index[level], size)))

    def _from_blocks(self, out: Pixels, level: int, box: Box) -> None:
        w, h = self.levels[level].size
        for top in range(box[1] // BLOCK * BLOCK, box[3], BLOCK):
            for left in range(box[0] // BLOCK * BLOCK, box[2], BLOCK):
                x, y = (quiet_start(start, self._downsample[level]) for start in (left, top))
                right, bottom = min(left + BLOCK, w), min(top + BLOCK, h)
                block = self._region(level, (x, y), (right - x, bottom - y))
                x0, y0, x1, y1 = max(left, box[0]), max(top, box[1]), min(right, box[2]), min(bottom, box[3])
                out[y0 - box[1] : y1 - box[1], x0 - box[0] : x1 - box[0]] = block[y0 - y : y1 - y, x0 - x : x1 - x]

    def _reopen(self) -> None:
        """Replace the handle: after one error OpenSlide fails on good tiles too."""
        if not self._closed:
            self._slide.close()
            self._slide = openslide.OpenSlide(str(self._path))

    def close(self) -> None:
        """Close the file; reading afterwards raises ReadError."""
        if not self._closed:
            self._closed = True
            self._slide.close()


def dicom_series(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the DICOM slides among `paths`, by series, the largest file first; what OpenSlide cannot open is left out.

    OpenSlide opens a series (its levels, label and overview) by any one of its files.
    """
    series: dict[str, list[Path]] = {}
    for path in sorted(paths, key=lambda p: (-p.stat().st_size, p.name)):
        try:
            with openslide.OpenSlide(str(path)) as slide:
                series.setdefault(slide.properties.get("dicom.SeriesInstanceUID", path.name), []).append(path)
        except openslide.OpenSlideError:
            continue
    return series


def _one_of_series(folder: Path) -> Path:
    """Return a file of the one series in `folder`. Raises NotASlide where there is none or there are several."""
    series = dicom_series(path for path in folder.iterdir() if path.is_file())
    if len(series) != 1:
        raise NotASlide(f"{folder} holds {len(series)} DICOM series of slides; name a file of the one that is meant.")
    return next(iter(series.values()))[0]


def quiet_start(start: int, downsample: float) -> int:
    """Return the level pixel, at most SEARCH before `start`, whose rounded px0 corner is off by least.

    >>> quiet_start(0, 8.0167), quiet_start(1024, 2.0), quiet_start(1024, 2.5)
    (0, 1024, 1024)
    """
    tries = np.arange(start, max(-1, start - SEARCH), -1)
    exact = tries * downsample
    return int(tries[np.argmin(np.abs(np.rint(exact) - exact))])

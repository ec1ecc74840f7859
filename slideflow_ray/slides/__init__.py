"""Slides: anything with pixels and a scale, opened by the library that reads it best.

Each library is loaded when the first slide that needs it is opened.
"""

from __future__ import annotations

from pathlib import Path

from slideflow_ray.errors import NotASlide, SlideError
from slideflow_ray.slides.base import SlideReader, check_file
from slideflow_ray.slides.tiles import read_tiles
from slideflow_ray.storage import local_path

__all__ = ["SlideReader", "open_slide", "read_tiles"]


def open_slide(uri: str, *, mpp: float | None = None) -> SlideReader:
    """Open a slide from a path or a file:// uri; tiffslide first, OpenSlide for what it cannot read.

    `mpp`, um per pixel of level 0, overrides what the file says. Raises ConfigError
    (another scheme), SlideNotFound, NotASlide, TruncatedSlide, BadDimensions, NoMpp
    and BadMpp.
    """
    path = local_path(uri)
    why = ""
    if check_file(path):
        try:
            return _tiff(uri, path, mpp)
        except (SlideError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever tiffslide stumbles over, OpenSlide may read
            why = f"tiffslide: {error}; "
    return _openslide(uri, path, mpp, why)


def _tiff(uri: str, path: Path, mpp: float | None) -> SlideReader:
    from slideflow_ray.slides.tiff import TiffReader

    return TiffReader(uri, path, mpp)


def _openslide(uri: str, path: Path, mpp: float | None, why: str) -> SlideReader:
    from slideflow_ray.slides.openslide import OpenSlideReader

    try:
        return OpenSlideReader(uri, path, mpp)
    except (SlideError, MemoryError):
        raise
    except Exception as error:
        raise NotASlide(f"{uri} is not a slide that can be read ({why}openslide: {error}).") from error

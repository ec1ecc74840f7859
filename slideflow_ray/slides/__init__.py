"""Slides: anything with pixels and a scale, opened by the library that reads it best.

What a file is, its first bytes say, not its suffix. Each library is loaded when the
first slide that needs it is opened.

====================================  ==========================================
content                               tried in this order
====================================  ==========================================
folder with OME-Zarr's metadata, zip  omezarr (0.4 and 0.5)
folder of one DICOM series            openslide
TIFF                                  tiffslide, openslide, image
PNG, JPEG                             image (MIRAX, whose .mrxs is a JPEG: openslide)
MRC, DM3, DM4                         electron, always as a micrograph
anything else                         openslide
====================================  ==========================================

With modality "tem" what was opened is read as a micrograph (`micrograph`): grey, through a window, without what was
burnt in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from slideflow_ray.blocks import Blocks
from slideflow_ray.errors import BadMpp, NoMpp, NotASlide, SlideError
from slideflow_ray.remote import at_hand
from slideflow_ray.slides.base import SlideReader, check_bytes, check_file
from slideflow_ray.slides.tiles import read_tiles

__all__ = ["SlideReader", "is_dicom", "is_zarr", "open_slide", "read_tiles"]

Opener = Callable[[str, Any, float | None, str | None], SlideReader]

ZARR_METADATA = ("zarr.json", ".zgroup", ".zattrs")


def open_slide(
    uri: str, *, mpp: float | None = None, modality: str | None = None, source: Path | Blocks | None = None
) -> SlideReader:
    """Open a slide from a path or a uri (file://, s3://, gs://; of a remote one the copy in the cache).

    `mpp`, um per pixel of level 0, overrides what the file says; `modality` says which
    scales are credible; `source` is where its bytes are at hand, if that is known: a
    path, or blocks (for TIFF alone). Raises ConfigError (another scheme), SlideNotFound, NotASlide,
    TruncatedSlide, BadDimensions, NoMpp and BadMpp.
    """
    source = at_hand(uri) if source is None else source
    if modality == "tem" or (isinstance(source, Path) and source.is_file() and check_file(source) in ("dm", "mrc")):
        return _micrograph(uri, source, mpp)
    return _opened(uri, source, mpp, modality)


def _opened(uri: str, source: Path | Blocks, mpp: float | None, modality: str | None) -> SlideReader:
    causes, cause = [], None
    for name, opener in _of_blocks(source) if isinstance(source, Blocks) else _openers(source, modality):
        try:
            return opener(uri, source, mpp, modality)
        except (SlideError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever one library stumbles over, the next may read
            causes.append(f"{name}: {error}".rstrip(". "))
            cause = error
    raise NotASlide(f"{uri} is not a slide that can be read ({'; '.join(causes)}).") from cause


def _micrograph(uri: str, source: Path | Blocks, mpp: float | None) -> SlideReader:
    """Open a micrograph; where nothing says its scale, look for its scale bar, so that the error can name it."""
    from slideflow_ray.slides.micrograph import Micrograph, no_scale

    said = _said(source) if mpp is None else None
    try:
        return Micrograph(_opened(uri, source, mpp or said, "tem"), source, "file" if said else None)
    except (NoMpp, BadMpp) as error:
        if mpp is not None:
            raise
        with Micrograph(_opened(uri, source, 1.0, "tem"), source) as reader:
            raise no_scale(reader, error) from error


def _said(source: Path | Blocks) -> float | None:
    """Return um per pixel as a microscope's own software writes it into a TIFF."""
    if isinstance(source, Blocks) or not source.is_file() or check_file(source) != "tiff":
        return None
    from slideflow_ray.slides.image import microscope_mpp

    return microscope_mpp(source)


def _of_blocks(file: Blocks) -> list[tuple[str, Opener]]:
    """The same of an object that is read block by block."""
    from slideflow_ray.slides.image import is_deep

    plain = cast(BinaryIO, file)
    file.seek(0)
    kind = check_bytes(file.seen.uri, plain, file.size)
    file.seek(0)  # tifffile takes what stands here for the file's beginning
    found: list[tuple[str, Opener]] = [("tiffslide", _tiff)] if kind == "tiff" and not is_deep(plain) else []
    file.seek(0)
    return found


def _openers(path: Path, modality: str | None) -> list[tuple[str, Opener]]:
    """Return the readers that may open a path, the best first. Raises what `check_file` does."""
    if path.is_dir() and is_zarr(path):
        return [("zarr", _omezarr)]
    if path.is_dir() and _of_dicom(path):
        return [("openslide", _openslide)]
    kind = check_file(path)
    if kind == "tiff":
        from slideflow_ray.slides.image import is_deep

        if modality == "tem":
            plain = [("tiffslide", _tiff)] * (not is_deep(path))
            return [*plain, ("pieces", _deep), ("tifffile", _image)]
        if is_deep(path):
            return [("tifffile", _image)]
        return [("tiffslide", _tiff), ("openslide", _openslide), ("tifffile", _image)]
    if kind in ("dm", "mrc"):
        return [(kind, _electron)]
    if kind == "zip":
        return [("zarr", _omezarr)]
    if kind in ("png", "jpeg") and not (path.with_suffix("") / "Slidedat.ini").exists():
        return [("image", _image)]
    return [("openslide", _openslide)]


def is_zarr(folder: Path) -> bool:
    """Return whether a folder is the root of a Zarr group."""
    return any((folder / name).is_file() for name in ZARR_METADATA)


def is_dicom(path: Path) -> bool:
    """Return whether a file begins as DICOM files do."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _of_dicom(folder: Path) -> bool:
    """Return whether a folder holds DICOM files and, hidden ones apart, nothing else."""
    seen = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return bool(seen) and all(path.is_file() and is_dicom(path) for path in seen)


def _tiff(uri: str, source: Path | Blocks, mpp: float | None, modality: str | None) -> SlideReader:
    from slideflow_ray.slides.tiff import TiffReader

    return TiffReader(uri, source, mpp, modality)


def _deep(uri: str, path: Path, mpp: float | None, modality: str | None) -> SlideReader:
    from slideflow_ray.slides.deep import DeepReader
    from slideflow_ray.slides.image import tiff_resolution

    return DeepReader(uri, path, mpp, tiff_resolution(path))


def _electron(uri: str, path: Path, mpp: float | None, modality: str | None) -> SlideReader:
    from slideflow_ray.slides.electron import ElectronReader

    return ElectronReader(uri, path, mpp, check_file(path))


def _openslide(uri: str, path: Path, mpp: float | None, modality: str | None) -> SlideReader:
    from slideflow_ray.slides.openslide import OpenSlideReader

    return OpenSlideReader(uri, path, mpp, modality)


def _omezarr(uri: str, path: Path, mpp: float | None, modality: str | None) -> SlideReader:
    from slideflow_ray.slides.omezarr import OmeZarrReader

    return OmeZarrReader(uri, path, mpp, modality)


def _image(uri: str, path: Path, mpp: float | None, modality: str | None) -> SlideReader:
    from slideflow_ray.slides.image import ImageReader

    return ImageReader(uri, path, mpp, modality)

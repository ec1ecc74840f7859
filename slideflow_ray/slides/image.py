"""Plain PNG, JPEG and TIFF images of 8 or 16 bit as slides of one level.

The picture is decoded whole, at the first read, so its size is checked in the header
before. 16-bit pixels become 8-bit through one linear window over all channels, from
the 0.5th to the 99.5th percentile (`ImageReader.window`): what a camera's 12 bits in a
16-bit file need, and it depends on nothing but the file. Alpha is laid on white. The
orientation that EXIF asks for is ignored: coordinates are those of the stored pixels.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from slideflow_ray.errors import BadDimensions, NotASlide, ReadError
from slideflow_ray.geometry import Level
from slideflow_ray.slides.base import (
    WHITE,
    Box,
    Kind,
    Opened,
    Pixels,
    check_file,
    check_size,
    checked_mpp,
    describe,
    inside,
    ome_mpp,
    on_white,
    um_of,
)
from slideflow_ray.slides.codestream import check_pieces, jpeg_size

MAX_IMAGE_PIXELS = 89_000_000
"""9,400 x 9,400: 270 MB as RGB. Pillow warns of a decompression bomb from 89.5 million pixels on."""

RESOLUTION_UNITS: Mapping[int, float] = {2: 25400.0, 3: 1e4, 4: 1e3, 5: 1.0}
"""um per unit of TIFF's ResolutionUnit: inch, cm, and what some write besides, mm and um."""

WINDOW = (0.5, 99.5)
"""Percentiles of 16-bit pixels that become 0 and 255."""

MAX_HEAD_BYTES = 2**24
"""Of what stands before a JPEG's size: colour profiles and previews, of 64 kB each."""

Raw = npt.NDArray[Any]


class ImageReader(Opened):
    """A SlideReader over one plain image."""

    name = "image"

    def __init__(self, uri: str, path: Path, mpp: float | None, modality: str | None = None) -> None:
        self.uri = uri
        self._path = path
        self._kind = check_file(path)
        self._pixels: Pixels | None = None
        self._raw: Raw | None = None
        self._window: tuple[float, float] | None = None
        self._closed = False
        self.size_px0, found = _header(uri, path, self._kind)
        check_size(uri, self.size_px0, path.stat().st_size)
        self.mpp0, self.mpp_source = checked_mpp(uri, mpp, found, modality=modality)
        self.levels: tuple[Level, ...] = (Level(self.size_px0, (1.0, 1.0)),)

    @property
    def window(self) -> tuple[float, float] | None:
        """The 16-bit values that became 0 and 255, or None for an image of 8 bit. Raises ReadError."""
        self.read(0, (0, 0), self.size_px0)
        return self._window

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """Return a box of the image; see SlideReader.read."""
        out: Pixels = np.full((size[1], size[0], 3), WHITE, np.uint8)
        box = inside(self.levels[level].size, xy, size)
        if box[2] <= box[0] or box[3] <= box[1]:
            return out
        try:
            whole = self._decoded()
        except MemoryError:
            raise
        except Exception as error:  # codecs raise anything; the cause goes into ours
            text = f"{describe(self.uri, level, xy, size)}: {type(error).__name__}: {error}."
            raise ReadError(text) from error
        out[box[1] - xy[1] : box[3] - xy[1], box[0] - xy[0] : box[2] - xy[0]] = whole[box[1] : box[3], box[0] : box[2]]
        return out

    def _decoded(self) -> Pixels:
        if self._closed:
            raise ValueError("the slide is closed")
        if self._pixels is None:
            self._pixels, self._window = eight_bit(self._as_stored())
        return self._pixels

    def _as_stored(self) -> Raw:
        raw = _tiff_pixels(self._path) if self._kind == "tiff" else _pillow_pixels(self._path, self._kind)
        if raw.shape[1::-1] != self.size_px0:
            raise ValueError(f"it decodes to {raw.shape[1]} x {raw.shape[0]} pixels")
        return raw

    def stored(self, level: int, box: Box) -> Raw:
        """Return the values of a box (x0, y0, x1, y1) as they are stored, (h, w) or (h, w, 1 to 4), 8 or 16 bit."""
        if self._closed:
            raise ValueError("the slide is closed")
        if self._raw is None:
            self._raw = self._as_stored()
        return self._raw[box[1] : box[3], box[0] : box[2]]

    def close(self) -> None:
        """Let the pixels go; reading afterwards raises ReadError."""
        self._closed = True
        self._pixels = self._raw = None


def eight_bit(raw: Raw) -> tuple[Pixels, tuple[float, float] | None]:
    """Return RGB pixels, uint8 (h, w, 3), of uint8 or uint16 ones, (h, w) or (h, w, 1 to 4), and their window.

    Two and four channels end in alpha, which the window leaves alone.
    """
    raw = raw[..., None] if raw.ndim == 2 else raw
    colour = raw.shape[2] - (raw.shape[2] in (2, 4))
    pixels, alpha, window = raw[..., :colour], raw[..., colour:], None
    if raw.dtype == np.uint16:
        low, high = (float(v) for v in _percentiles(pixels))
        window = (low, max(high, low + 1))
        table = np.clip((np.arange(65536) - window[0]) / (window[1] - window[0]), 0, 1)
        pixels, alpha = np.rint(table * 255).astype(np.uint8)[pixels], (alpha >> 8).astype(np.uint8)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3)) if colour == 1 else pixels
    if alpha.shape[2]:
        pixels = on_white(np.concatenate([pixels, alpha], axis=2))
    return np.ascontiguousarray(pixels, np.uint8), window


def _percentiles(pixels: Raw) -> tuple[int, int]:
    """Return the values at WINDOW's percentiles: the smallest below or at which that share of the pixels lies."""
    below = np.cumsum(np.bincount(pixels.ravel(), minlength=65536))
    low, high = (int(np.searchsorted(below, below[-1] * share / 100)) for share in WINDOW)
    return low, high


# headers


def is_deep(path: Path | BinaryIO) -> bool:
    """Return whether a TIFF has 16 bits a channel: the libraries for slides cut off the lower eight without a word."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            return int(file.pages.first.bitspersample) == 16
    except (tifffile.TiffFileError, ValueError, OSError, AttributeError, IndexError, struct.error):
        return False


def _header(uri: str, path: Path, kind: Kind) -> tuple[tuple[int, int], tuple[object, object]]:
    """Return an image's size and its um per pixel along x and y (None where it does not say); decodes nothing."""
    if kind == "tiff":
        return _tiff_header(uri, path)
    size = _png_size(path) if kind == "png" else _jpeg_size(path)
    if size is None:
        raise NotASlide(f"{uri} begins as a {kind.upper()} file, but has no header.")
    check_size(uri, size, path.stat().st_size)
    _check_plain(uri, size)
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        dpi = image.info.get("dpi")
    if not isinstance(dpi, tuple) or not all(value > 0 for value in dpi):
        return size, (None, None)
    return size, (25400 / float(dpi[0]), 25400 / float(dpi[1]))


def _check_plain(uri: str, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_IMAGE_PIXELS:
        raise BadDimensions(
            f"{uri} is a plain image of {size[0]:,} x {size[1]:,} pixels; at most {MAX_IMAGE_PIXELS:,} are decoded.",
            next_step="Convert it to a tiled, pyramidal TIFF (vips tiffsave --tile --pyramid), or drop its row.",
        )


def _png_size(path: Path) -> tuple[int, int] | None:
    with path.open("rb") as file:
        head = file.read(24)
    return struct.unpack(">II", head[16:24]) if len(head) == 24 and head[12:16] == b"IHDR" else None


def _jpeg_size(path: Path) -> tuple[int, int] | None:
    """Return the size that a JPEG's frame header says, which stands behind its metadata."""
    with path.open("rb") as file:
        return jpeg_size(file.read(MAX_HEAD_BYTES))


def _tiff_header(uri: str, path: Path) -> tuple[tuple[int, int], tuple[object, object]]:
    import tifffile

    with tifffile.TiffFile(path) as file:
        series, page = file.series[0], _first(file)
        size = (int(page.imagewidth), int(page.imagelength))
        check_size(uri, size, path.stat().st_size)
        _check_plain(uri, size)
        if len(series.pages) > 1 or page.imagedepth > 1:
            raise NotASlide(f"{uri} is a stack of {len(series.pages)} pages; one image would do.")
        if _is_foreign(page):
            raise NotASlide(
                f"{uri} has its colours as {page.photometric.name}; grey, RGB or a palette would do.",
                next_step="Convert it to RGB (vips colourspace IN OUT srgb), or drop its row.",
            )
        if page.dtype not in (np.bool_, np.uint8, np.uint16) or page.samplesperpixel > 4:
            raise NotASlide(
                f"{uri} has {page.samplesperpixel} channels of {page.dtype}; 1 to 4 of 8 or 16 bit would do."
            )
        return size, _resolution(page)


def tiff_resolution(path: Path) -> tuple[float | None, float | None]:
    """Return um per pixel along x and y by the resolution tags of a TIFF's first page; None where it has none."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        return _resolution(_first(file))


def _resolution(page: Any, units: Mapping[int, float] = RESOLUTION_UNITS) -> tuple[float | None, float | None]:
    unit = units.get(int(page.tags.valueof("ResolutionUnit", 2)))
    ends = [page.tags.valueof(name) for name in ("XResolution", "YResolution")]
    if unit is None or any(not end or not end[0] for end in ends):
        return None, None
    return unit * ends[0][1] / ends[0][0], unit * ends[1][1] / ends[1][0]


def microscope_mpp(path: Path) -> float | None:
    """Return um per pixel as the software of a microscope writes it into a TIFF, or None.

    FEI and Thermo Fisher, Zeiss, OME, Olympus SIS (iTEM), Gatan's exports, and ImageJ's unit with its resolution.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            return next((mpp for mpp in _microscopes(file) if mpp is not None and mpp > 0), None)
    except (tifffile.TiffFileError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
        return None


def _microscopes(file: Any) -> Iterator[float | None]:
    """What each kind of software says; tags of Gatan's as DigitalMicrograph exports them: unit 65003, scale 65009."""
    fei = file.fei_metadata or {}
    widths = [fei[part].get("PixelWidth") for part in ("Scan", "EScan") if isinstance(fei.get(part), dict)]
    yield from (float(width) * 1e6 for width in widths if width)
    zeiss = file.sem_metadata or {}
    for key in ("ap_pixel_size", "ap_image_pixel_size"):
        yield _length(*zeiss[key][1:3]) if len(zeiss.get(key, ())) > 2 else None
    yield float((file.sis_metadata or {}).get("pixelsizex") or 0) * 1e6
    yield (ome_mpp(file.ome_metadata or "") or (None,))[0]
    tags = _first(file).tags
    yield _length(tags.valueof(65009), tags.valueof(65003))
    unit = (file.imagej_metadata or {}).get("unit")
    per_unit = _resolution(_first(file), dict.fromkeys(range(6), 1.0))[0]
    yield _length(per_unit, str(unit).replace("\\u00B5", "u")) if unit and per_unit else None


def _length(value: Any, unit: Any) -> float | None:
    """Return a length with its unit in um; None where the unit is none."""
    if value is None or unit is None:
        return None
    text = unit.decode("utf-16-le" if b"\0" in unit else "latin-1") if isinstance(unit, bytes) else str(unit)
    um = um_of(text.strip("\0 "))
    return None if um is None else float(value) * um


def _is_foreign(page: Any) -> bool:
    """Whether the channels are no grey, RGB or palette: CMYK, Lab, and YCbCr but for JPEG, which its codec converts."""
    name, jpeg = page.photometric.name, int(page.compression) in (6, 7)
    return name not in ("MINISWHITE", "MINISBLACK", "RGB", "PALETTE") and not (name == "YCBCR" and jpeg)


# pixels


def read_labels(uri: str, path: Path) -> Raw:
    """Return a plain PNG or TIFF as it is stored, (h, w): palette indices, 16-bit values, the largest of the colours.

    Alpha is left out. Raises NotASlide (another format), BadDimensions.
    """
    kind = check_file(path)
    if kind not in ("png", "tiff"):
        raise NotASlide(f"{uri} is neither PNG nor TIFF.")
    _header(uri, path, kind)
    if kind == "tiff":
        raw = _tiff_pixels(path, indices=True)
    else:
        with Image.open(path, formats=("PNG",)) as image:
            raw = np.asarray(image)
    if raw.ndim == 2:
        return raw
    largest: Raw = raw[..., : raw.shape[2] - (raw.shape[2] in (2, 4))].max(axis=2)
    return largest


def _first(file: Any) -> Any:
    return file.pages[0]


def _pillow_pixels(path: Path, kind: Kind) -> Raw:
    """Return PNG or JPEG pixels: 16 bit by imagecodecs (Pillow cuts colour to 8), the rest by Pillow."""
    if kind == "png" and (data := path.read_bytes())[24:25] == b"\x10":
        import imagecodecs

        return np.asarray(imagecodecs.png_decode(data))
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        clear = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        return np.asarray(image.convert("RGBA" if clear else "RGB"))


def _tiff_pixels(path: Path, *, indices: bool = False) -> Raw:
    """Return the first page's pixels, (h, w) or (h, w, channels); inverted greys and palettes are resolved.

    With `indices` a palette's indices stay.
    """
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = _first(file)
        tiled = page.is_tiled
        check_pieces(path, page, (page.tilewidth, page.tilelength) if tiled else (page.imagewidth, page.imagelength))
        raw = np.asarray(page.asarray())
        if raw.dtype == np.bool_:
            raw = raw.astype(np.uint8) * 255
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE and not indices:
            palette: Raw = np.moveaxis(np.asarray(page.colormap), 0, -1) >> 8
            return palette.astype(np.uint8)[raw]
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            raw = np.iinfo(raw.dtype).max - raw
        if page.samplesperpixel > 1 and int(page.planarconfig) == 2:
            raw = np.moveaxis(raw, 0, -1)
        if raw.ndim == 3 and not _ends_in_alpha(page):
            raw = raw[..., : 3 if raw.shape[2] >= 3 else 1]
    return raw


def _ends_in_alpha(page: Any) -> bool:
    """Whether the channel after the colours is said to be alpha (1 associated, 2 not); else it means nothing to us."""
    return any(int(extra) in (1, 2) for extra in page.extrasamples[:1])

"""What a slide reader is, and the checks that every reader's slide passes before a pixel is read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NoReturn, Protocol, Self

import numpy as np
import numpy.typing as npt

from slideflow_ray.errors import BadDimensions, BadMpp, NoMpp, NotASlide, ReadError, SlideNotFound
from slideflow_ray.geometry import Level, level_downsample
from slideflow_ray.slides.ifd import check_directories

Pixels = npt.NDArray[np.uint8]
Stored = npt.NDArray[Any]
Box = tuple[int, int, int, int]

WHITE = 255
"""What lies beyond the edge of a slide, and where a tile was never scanned."""

FILE_MPP = (0.01, 32.0)
"""um per pixel that a header may claim of an unknown modality: 72, 150, 300 and 600 dpi are 353, 169, 85, 42."""

GIVEN_MPP = (1e-5, 2e4)
"""um per pixel that a user may state where the modality is not known: electron micrographs to MRI."""

LIGHT_MPP = (0.05, 32.0)
"""Light microscopy: an oil objective of 100x makes 0.05 or more, overviews of a whole slide up to 30."""

MODALITY_MPP = {
    **dict.fromkeys(("he", "pas", "silver", "ihc"), LIGHT_MPP),
    "tem": (1e-5, 1.0),  # 0.01 nm to survey pictures at 100x
    "mri": (50.0, 2e4),  # 0.05 mm (ex vivo) to 20 mm
}
"""um per pixel that is credible, whoever says so, by modality."""

OBJECTIVE_UM = 10.0
"""um per pixel times objective power: scanners called 20x make about 0.5, those called 40x about 0.25."""

POWERS = (1.0, 150.0)

UM_OF = {
    **dict.fromkeys(("angstrom", "\u00c5"), 1e-4),
    **dict.fromkeys(("picometer", "pm"), 1e-6),
    **dict.fromkeys(("nanometer", "nm"), 1e-3),
    **dict.fromkeys(("micrometer", "micron", "um"), 1.0),
    **dict.fromkeys(("millimeter", "mm"), 1e3),
    **dict.fromkeys(("centimeter", "cm"), 1e4),
    **dict.fromkeys(("meter", "m"), 1e6),
    **dict.fromkeys(("inch", "in"), 25400.0),
}
"""um per unit of length, by the names that OME-Zarr and OME-XML use."""

MppSource = Literal["cohort", "file", "objective"]
"""Who said what a pixel measures: the user, the file, or (a guess) the objective that the file names."""

Kind = Literal["tiff", "zip", "png", "jpeg", "dm", "mrc", "other"]
MAGIC: dict[bytes, Kind] = {
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "tiff"),
    b"PK\3\4": "zip",
    b"\x89PNG": "png",
    b"\xff\xd8\xff": "jpeg",
}

MAX_SIDE_PX = 1_000_000
MAX_PIXELS = 4 * 10**11
MAX_PIXELS_PER_BYTE = 10**5
"""A whole-mount slide at 0.1 um/px is below the first two; an empty tile table of 1,024 px tiles below the third."""


class SlideReader(Protocol):
    """An open slide: its size, scale and levels, and the pixels of any box of a level.

    Opened where it is used (readers are never pickled) and closed afterwards.
    """

    name: str
    uri: str
    size_px0: tuple[int, int]
    mpp0: float
    mpp_source: MppSource
    levels: tuple[Level, ...]

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """Return the pixels of a box, uint8, shape (height, width, 3), RGB.

        `xy` is the box's upper left corner and `size` its (width, height), both in
        pixels of that level. What lies outside the level or was never scanned is
        white. Raises ReadError naming slide, level and box.
        """
        ...

    def close(self) -> None:
        """Close the file; reading afterwards raises ReadError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Unsupported(Exception):
    """This file is for another reader (or for none)."""


class Opened:
    """What readers share: a context manager that closes, and no pickling."""

    def close(self) -> None:
        """Close the file."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a slide is opened inside the worker that reads it; send its uri instead")


def check_file(path: Path) -> Kind:
    """Return what a file's first bytes say it is, after refusing what no library could read.

    Raises SlideNotFound, NotASlide (a folder, an empty file, a git-LFS pointer), and what
    `check_directories` does of a TIFF: TruncatedSlide, BadDimensions.
    """
    if not path.exists():
        raise SlideNotFound(f"There is no {path}.")
    if path.is_dir():
        raise NotASlide(f"{path} is a folder, neither an OME-Zarr nor of one DICOM series only; name a file in it.")
    if not path.is_file():
        raise NotASlide(f"{path} is neither a file nor a folder.")
    try:
        file = path.open("rb")
    except OSError as error:
        raise ReadError(f"{path} cannot be opened: {error}.") from error
    with file:
        return check_bytes(str(path), file, path.stat().st_size)


def check_bytes(name: str, file: BinaryIO, size: int) -> Kind:
    """Return what the first bytes of an open file of `size` bytes say it is. Raises as `check_file` does."""
    head = file.read(256)
    if size == 0:
        raise NotASlide(f"{name} is empty.")
    if head.startswith(b"version https://git-lfs"):
        raise NotASlide(
            f"{name} is a git-LFS pointer, not the slide itself.", next_step="Run `git lfs pull` and run again."
        )
    kind: Kind = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), "other")
    kind = _electron(head) if kind == "other" else kind
    if kind == "tiff":
        check_directories(name, file, size)
    return kind


def _electron(head: bytes) -> Kind:
    """Return "dm" for DM3 and DM4 (version and byte order stand first), "mrc" for MRC2014, else "other"."""
    if (head[:4], head[8:12][:3]) == (b"\0\0\0\3", b"\0\0\0") or (head[:4], head[12:15]) == (b"\0\0\0\4", b"\0\0\0"):
        return "dm"
    return "mrc" if head[208:212] == b"MAP " else "other"


def check_size(uri: str, size_px0: tuple[int, int], file_bytes: int) -> None:
    """Raise BadDimensions where a header claims a size that no scanner makes, or that its file cannot hold."""
    w, h = size_px0
    if w < 1 or h < 1 or max(w, h) > MAX_SIDE_PX or w * h > min(MAX_PIXELS, file_bytes * MAX_PIXELS_PER_BYTE):
        raise BadDimensions(f"{uri} claims {w:,} x {h:,} pixels in a file of {file_bytes:,} bytes.")


def checked_mpp(
    uri: str,
    given: float | None,
    found: tuple[object, object],
    *,
    objective: object = None,
    modality: str | None = None,
) -> tuple[float, MppSource]:
    """Return um per pixel of level 0, and who says so.

    In this order: the `given` one; the mean of what the file says for x and y; 10 over
    the power of the `objective` that the file names, which is a guess. Raises NoMpp, or
    BadMpp for what cannot be true: not positive, outside what the modality allows
    (MODALITY_MPP; the 72 dpi default tag is 352.8 um/px), x and y more than 5 % apart.
    """
    if given is not None:
        return _credible(uri, "the given mpp", float(given), modality, GIVEN_MPP), "cohort"
    if found[0] is not None and found[1] is not None:
        x, y = (_credible(uri, "the file's mpp", _number(uri, value), modality, FILE_MPP) for value in found)
        if abs(x - y) > 0.05 * min(x, y):
            raise BadMpp(f"{uri} says {x:g} um per pixel along x but {y:g} along y.")
        return (x if x == y else (x + y) / 2), "file"
    power = _power(objective)
    if power is None:
        raise NoMpp(f"{uri} does not say how many um a pixel has.")
    return _credible(uri, f"the guess from its {power:g}x", OBJECTIVE_UM / power, modality, FILE_MPP), "objective"


def _power(objective: object) -> float | None:
    """Return the power that a header names ("20", 40, "20x"), or None where it names none."""
    try:
        power = float(str(objective).strip().rstrip("xX"))
    except ValueError:
        return None
    return power if POWERS[0] <= power <= POWERS[1] else None


def _number(uri: str, value: object) -> float:
    try:
        return float(str(value)) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise BadMpp(f"{uri} says {value!r} um per pixel.") from error


def _credible(uri: str, what: str, mpp: float, modality: str | None, otherwise: tuple[float, float]) -> float:
    low, high = MODALITY_MPP.get(modality or "", otherwise)
    if not math.isfinite(mpp) or not low <= mpp <= high:
        hint = " (a default tag of 72 dpi)" if abs(mpp - 25400 / 72) < 0.5 else ""
        whose = f" for modality {modality!r}" if modality in MODALITY_MPP else ""
        raise BadMpp(f"{uri}: {what} is {mpp:g}{hint}; between {low:g} and {high:g} um per pixel would do{whose}.")
    return mpp


def um_of(unit: str) -> float | None:
    """Return how many um one `unit` is (OME's names and symbols), or None for what is no length.

    >>> um_of("nanometer"), um_of("\u00b5m"), um_of("pixel")
    (0.001, 1.0, None)
    """
    return UM_OF.get(unit.strip().replace("\u00b5", "u").replace("\u03bc", "u"))


def ome_mpp(xml: str) -> tuple[float, float] | None:
    """Return um per pixel along x and y by OME-XML's first image, or None.

    The attributes are taken from the text of one tag, so no XML parser meets a stranger's file.
    """
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", xml)
    found = dict(re.findall(r'\b(PhysicalSize[XY](?:Unit)?)="([^"]*)"', pixels[0])) if pixels else {}
    if not {"PhysicalSizeX", "PhysicalSizeY"} <= set(found):
        return None
    units = [um_of(found.get(f"PhysicalSize{axis}Unit", "um")) for axis in "XY"]
    try:
        x, y = (float(found[f"PhysicalSize{a}"]) * (u or math.nan) for a, u in zip("XY", units, strict=True))
    except ValueError:
        return None
    return x, y


def pyramid(sizes: Sequence[tuple[int, int]]) -> dict[int, Level]:
    """Return the levels that belong to level 0's pyramid, by their index in `sizes`.

    A level belongs when it is smaller than the one before and one factor explains both
    of its sides to within a pixel (writers round up or down): a label or macro image,
    or a level of another scene, does not.
    """
    size_px0 = sizes[0]
    levels = {0: Level(size_px0, (1.0, 1.0))}
    last = size_px0
    for index, size in enumerate(sizes[1:], start=1):
        smaller = min(size) >= 1 and size[0] <= last[0] and size[1] <= last[1] and size != last
        if smaller and same_shape(size_px0, size):
            levels[index] = Level(size, level_downsample(size_px0, size))
            last = size
    return levels


def same_shape(size_px0: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return whether one factor explains both sides of `size`, each rounded up or down by a pixel at most."""
    lows = [whole / (part + 1) for whole, part in zip(size_px0, size, strict=True)]
    highs = [whole / max(part - 1, 0.5) for whole, part in zip(size_px0, size, strict=True)]
    return max(lows) <= min(highs)


def inside(size: tuple[int, int], xy: tuple[int, int], box: tuple[int, int]) -> Box:
    """Return the part (x0, y0, x1, y1) of a box inside a level of `size`; empty where x1 <= x0 or y1 <= y0."""
    return max(xy[0], 0), max(xy[1], 0), min(xy[0] + box[0], size[0]), min(xy[1] + box[1], size[1])


def on_white(rgba: Pixels) -> Pixels:
    """Return RGB pixels of straight-alpha RGBA ones laid on white.

    >>> on_white(np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)).tolist()
    [[[10, 20, 30], [255, 255, 255]]]
    """
    if bool((rgba[..., 3] == WHITE).all()):
        return rgba[..., :3]
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + WHITE * (255 - alpha) + 127) // 255).astype(np.uint8)


def luma(pixels: Stored) -> Stored:
    """Return grey, (h, w), of the same dtype; alpha is left out.

    >>> luma(np.array([[[7, 7, 7], [255, 0, 0]]], np.uint8)).tolist()
    [[7, 76]]
    """
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] < 3:
        return pixels[..., 0]
    red, green, blue = (pixels[..., i] for i in range(3))
    if np.array_equal(red, green) and np.array_equal(green, blue):
        return red
    wide = np.int64 if pixels.dtype.kind in "iu" else np.float64
    mixed = red.astype(wide) * 19595 + green.astype(wide) * 38470 + blue.astype(wide) * 7471
    grey: Stored = ((mixed + 0x8000) // 65536 if wide is np.int64 else mixed / 65536).astype(pixels.dtype)
    return grey


def kept_px0(reader: SlideReader) -> Box:
    """Return what of a slide is picture, (x0, y0, x1, y1) in px0: all, but for a micrograph with burnt-in furniture."""
    x0, y0, x1, y1 = about_micrograph(reader).get("micrograph", {}).get("keep_px0", (0, 0, *reader.size_px0))
    return x0, y0, x1, y1


def is_micrograph(reader: SlideReader) -> bool:
    """Return whether a slide is read as a micrograph: one of modality "tem" whose pixels are grey."""
    return bool(getattr(reader, "is_grey", False))


def about_micrograph(reader: SlideReader) -> dict[str, Any]:
    """Return what a store says of a micrograph, under "micrograph"; nothing of other slides."""
    return {"micrograph": reader.about} if is_micrograph(reader) else {}  # type: ignore[attr-defined]


def on_level(box_px0: Box, level: Level) -> Box:
    """Return the whole pixels of a level that lie in a box (x0, y0, x1, y1) of px0, never fewer than one each way."""
    (dx, dy), (w, h) = level.downsample, level.size
    x0, y0 = math.ceil(box_px0[0] / dx), math.ceil(box_px0[1] / dy)
    return x0, y0, max(x0 + 1, min(w, int(box_px0[2] / dx))), max(y0 + 1, min(h, int(box_px0[3] / dy)))


def describe(uri: str, level: int, xy: tuple[int, int], size: tuple[int, int]) -> str:
    """Return the words by which an error names a box."""
    return f"{uri}, level {level}, x {xy[0]}, y {xy[1]}, {size[0]} x {size[1]} pixels"


def file_size(path: Path) -> int:
    """Return the bytes of a file, or of all files beside a slide that is a folder of them (MIRAX)."""
    folder = path.with_suffix("")
    if folder != path and folder.is_dir():
        return path.stat().st_size + sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
    return path.stat().st_size

"""The formats of electron microscopes: MRC and Gatan's DM3 and DM4, one image each, mapped into memory.

The values are not pixels to look at: `micrograph` puts a window over them. Rows stand as IMOD and Bio-Formats (QuPath)
show them, which for MRC, whose origin is the lower left corner, is the other way round than they are stored.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from slideflow_ray.errors import NotASlide, ReadError, TruncatedSlide
from slideflow_ray.geometry import Level
from slideflow_ray.slides.base import Box, Opened, Pixels, Stored, check_size, checked_mpp, um_of

DM_TYPES: Final = {1: "<i2", 2: "<f4", 6: "u1", 7: "<i4", 9: "i1", 10: "<u2", 11: "<u4", 12: "<f8"}
"""Real numbers, by Gatan's `DataType`; 3 and 13 are complex, 23 is the colour of a preview."""

DM_COMPLEX: Final = (3, 5, 13)
DM_COLOUR: Final = 23
MRC_TYPES: Final = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
"""By `mode`, MRC2014; 3 and 4 are complex, 101 packs two pixels into a byte."""

ANGSTROM: Final = 1e-4


@dataclass(frozen=True)
class _Found:
    """Where an image's values are: dtype, offset, (height, width), and um per pixel along x and y."""

    dtype: str
    offset: int
    shape: tuple[int, int]
    mpp: tuple[float | None, float | None]
    from_below: bool = False


class ElectronReader(Opened):
    """A SlideReader over MRC, DM3 or DM4; its values are read with `stored`."""

    def __init__(self, uri: str, path: Path, mpp: float | None, kind: str) -> None:
        self.name, self.uri = kind, uri
        found = _mrc(uri, path) if kind == "mrc" else _dm(uri, path)
        h, w = found.shape
        size = path.stat().st_size
        check_size(uri, (w, h), size)
        need = found.offset + w * h * np.dtype(found.dtype).itemsize
        if need > size:
            raise TruncatedSlide(f"{uri} has {size:,} bytes, but its {w:,} x {h:,} pixels reach to byte {need:,}.")
        self.size_px0 = (w, h)
        self.mpp0, self.mpp_source = checked_mpp(uri, mpp, found.mpp, modality="tem")
        self.levels: tuple[Level, ...] = (Level(self.size_px0, (1.0, 1.0)),)
        values = np.memmap(path, np.dtype(found.dtype), "r", found.offset, found.shape)
        self._values: Stored | None = values[::-1] if found.from_below else values

    def stored(self, level: int, box: Box) -> Stored:
        """Return the values of a box (x0, y0, x1, y1), (h, w), in this machine's byte order."""
        if self._values is None:
            raise ValueError("the slide is closed")
        values = self._values[box[1] : box[3], box[0] : box[2]]
        native: Stored = np.array(values, values.dtype.newbyteorder("="))
        return native

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """Raise ReadError: without a window there are no pixels."""
        raise ReadError(f"{self.uri} is read as a micrograph alone.")

    def close(self) -> None:
        """Let the file go; reading afterwards raises ReadError."""
        self._values = None


# MRC


def _mrc(uri: str, path: Path) -> _Found:
    """Read the header by mrcfile. Raises NotASlide."""
    import mrcfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are compared above
            with mrcfile.open(path, permissive=True, header_only=True) as file:
                header, voxel = file.header, file.voxel_size
                nx, ny, nz, mode, extra = (int(header[k]) for k in ("nx", "ny", "nz", "mode", "nsymbt"))
                order = header["mode"].dtype.byteorder
                mpp = [float(voxel[axis]) * ANGSTROM or None for axis in "xy"]
    except (ValueError, OSError, TypeError) as error:
        raise NotASlide(f"{uri} is no MRC file that mrcfile reads: {error}.") from error
    if mode not in MRC_TYPES:
        what = "complex numbers" if mode in (3, 4) else f"mode {mode}"
        raise NotASlide(f"{uri} holds {what}; an image of whole or real numbers would do.", next_step=REAL)
    _check_plane(uri, (nz,))
    if min(nx, ny) < 1 or extra < 0:
        raise NotASlide(f"{uri} says that it has {nx} x {ny} pixels.")
    return _Found(f"{order}{MRC_TYPES[mode]}", 1024 + extra, (ny, nx), (mpp[0], mpp[1]), from_below=True)


REAL: Final = "Export the micrograph itself as TIFF of 16 bit (not its Fourier transform), or drop its row."


def _check_plane(uri: str, deeper: tuple[int, ...]) -> None:
    if any(n != 1 for n in deeper):
        n = int(np.prod(deeper))
        raise NotASlide(f"{uri} is a stack of {n} planes; one image would do.", next_step="Export one plane of it.")


# DM3, DM4


def _dm(uri: str, path: Path) -> _Found:
    """Read the tags by ncempy; the image is the first that is no preview. Raises NotASlide, TruncatedSlide."""
    fields = _dm_tags(uri, path)
    numbers = sorted({int(name.split(".")[2]) for name in fields if name.startswith(".ImageList.")})
    kinds = {n: fields.get(f".ImageList.{n}.ImageData.DataType") for n in numbers}
    images = [n for n, kind in kinds.items() if kind is not None and kind != DM_COLOUR]
    if not images:
        raise NotASlide(f"{uri} holds no image.")
    data = f".ImageList.{images[0]}.ImageData"
    kind = int(kinds[images[0]] or 0)
    if kind not in DM_TYPES:
        what = "complex numbers" if kind in DM_COMPLEX else f"values of Gatan's type {kind}"
        raise NotASlide(f"{uri} holds {what}; an image of whole or real numbers would do.", next_step=REAL)
    sides = [int(fields[key]) for i in range(1, 5) if (key := f"{data}.Dimensions.{i}") in fields]
    offset = fields.get(f"{data}.Data.arrayOffset")
    if len(sides) < 2 or min(sides) < 1 or offset is None:
        raise NotASlide(f"{uri} holds no image of two sides, but {' x '.join(map(str, sides)) or 'nothing'}.")
    _check_plane(uri, tuple(sides[2:]))
    mpp = [_dm_mpp(fields, f"{data}.Calibrations.Dimension.{i}") for i in (1, 2)]
    return _Found(DM_TYPES[kind], int(offset), (sides[1], sides[0]), (mpp[0], mpp[1]))


def _dm_tags(uri: str, path: Path) -> Mapping[str, Any]:
    read = _ncempy().fileDM
    try:
        with np.errstate(over="ignore"), path.open("rb") as file:  # it counts tags in 8 bit
            fields: dict[str, Any] = dict(read(file).allTags)
    except (ValueError, OSError, IndexError, KeyError, TypeError, AssertionError, OverflowError) as error:
        raise TruncatedSlide(f"{uri} begins as a DM file, but its tags cannot be read: {error}.") from error
    return fields


def _dm_mpp(fields: Mapping[str, Any], where: str) -> float | None:
    """Return um per pixel of one side; None where it has no unit of length, as diffraction has (1/nm)."""
    unit = um_of(str(fields.get(f"{where}.Units", "")).strip("\0"))
    scale = float(fields.get(f"{where}.Scale", 0))
    return unit * scale if unit is not None and scale > 0 else None


def _ncempy() -> ModuleType:
    """Return ncempy.io.dm alone: that file is MIT, and the rest of the package, GPL, takes seconds to load."""
    name = "slideflow_ray._ncempy_dm"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec("ncempy")
    if spec is None or not spec.submodule_search_locations:
        raise NotASlide("DM3 and DM4 files are read by ncempy, which is not here.", next_step=INSTALL)
    file = Path(spec.submodule_search_locations[0]) / "io" / "dm.py"
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise NotASlide(f"{file} cannot be loaded.", next_step=INSTALL)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    sys.modules[name] = module
    return module


INSTALL: Final = "Install it (pip install 'slideflow-ray[dm]'), or export the images as TIFF of 16 bit."

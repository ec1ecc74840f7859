"""OME-Zarr 0.4 (zarr v2) and 0.5 (zarr v3), as a folder or a zip: 8-bit RGB or grey pyramids.

The specification: https://ngff.openmicroscopy.org/0.5/ (axes, multiscales and
coordinateTransformations). Chunks that a writer left out are the array's fill value,
as Zarr says, not "never scanned".
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from slideflow_ray.errors import BadDimensions, NotASlide, ReadError, SlideflowError, TruncatedSlide
from slideflow_ray.geometry import Level
from slideflow_ray.slides.base import (
    MAX_PIXELS_PER_BYTE,
    WHITE,
    Opened,
    Pixels,
    check_size,
    checked_mpp,
    describe,
    inside,
    pyramid,
    um_of,
)
from slideflow_ray.slides.guarded import CODECS, GuardedFolder, GuardedZip, check_entries, check_zip

MAX_CHUNK_BYTES = 2**26
"""The largest piece that one read may have to decode."""

MIN_CHUNK_BYTES = 256
"""16 x 16 grey pixels: of smaller ones a tile would need thousands."""

MAX_LEVELS = 100
MAX_AXES = 5
Guarded = GuardedFolder | GuardedZip

CHANNELS = (1, 3)


class OmeZarrReader(Opened):
    """A SlideReader over the first multiscale image of an OME-Zarr.

    Axes may stand in any order; time and depth must have one plane.
    """

    name = "omezarr"

    def __init__(self, uri: str, path: Path, mpp: float | None, modality: str | None = None) -> None:
        self.uri = uri
        self._closed = False
        self._store, prefix = _open_store(uri, path)
        try:
            self._open(path, prefix, mpp, modality)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, prefix: str, mpp: float | None, modality: str | None) -> None:
        group, image = _image_of(self.uri, self._store, prefix)
        if len(image["axes"]) > MAX_AXES or len(image["datasets"]) > MAX_LEVELS:
            said = f"{len(image['axes']):,} axes and {len(image['datasets']):,} levels"
            raise NotASlide(f"{self.uri} has {said}; up to {MAX_AXES} and {MAX_LEVELS} would do.")
        axes = [str(axis["name"]) for axis in image["axes"]]
        if sorted(set(axes) - {"t", "c", "z"}) != ["x", "y"] or len(set(axes)) != len(axes):
            raise NotASlide(f"{self.uri} has the axes {', '.join(axes)}; y and x, and t, c, z at most, would do.")
        self._axes = axes
        arrays = [_array(self.uri, group, dataset["path"], axes) for dataset in image["datasets"]]
        for array in arrays:
            self._store.limits.add(array.path, math.prod(array.chunks), _codecs(array))
        sizes = [(int(a.shape[axes.index("x")]), int(a.shape[axes.index("y")])) for a in arrays]
        self.size_px0: tuple[int, int] = sizes[0]
        check_size(self.uri, sizes[0], _bytes(path, math.prod(sizes[0]) // MAX_PIXELS_PER_BYTE + 1))
        self.mpp0, self.mpp_source = checked_mpp(self.uri, mpp, _scale(image), modality=modality)
        kept = pyramid(sizes)
        self.levels: tuple[Level, ...] = tuple(kept.values())
        self._arrays = tuple(arrays[index] for index in kept)

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """Return a box of a level; see SlideReader.read."""
        out: Pixels = np.full((size[1], size[0], 3), WHITE, np.uint8)
        box = inside(self.levels[level].size, xy, size)
        if box[2] <= box[0] or box[3] <= box[1]:
            return out
        where: dict[str, slice | int] = {
            "x": slice(box[0], box[2]),
            "y": slice(box[1], box[3]),
            "c": slice(None),
            "t": 0,
            "z": 0,
        }
        try:
            if self._closed:
                raise ValueError("the slide is closed")
            found = np.asarray(self._arrays[level][tuple(where[axis] for axis in self._axes)])
        except (SlideflowError, MemoryError):
            raise
        except Exception as error:  # codecs raise anything; the cause goes into ours
            text = f"{describe(self.uri, level, xy, size)}: {type(error).__name__}: {error}."
            raise ReadError(text) from error
        kept = [axis for axis in self._axes if axis in "yxc"]
        pixels = found.transpose([kept.index(axis) for axis in "yxc" if axis in kept])
        pixels = pixels if "c" in kept else pixels[..., None]
        out[box[1] - xy[1] : box[3] - xy[1], box[0] - xy[0] : box[2] - xy[0]] = pixels
        return out

    def close(self) -> None:
        """Close the store; reading afterwards raises ReadError."""
        if not self._closed:
            self._closed = True
            self._store.close()


def _open_store(uri: str, path: Path) -> tuple[Guarded, str]:
    """Return the store of a folder or a zip, and the path of the OME-Zarr's root inside it."""
    if path.is_dir():
        return GuardedFolder(path), ""
    check_zip(uri, path)
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except zipfile.BadZipFile as error:
        raise TruncatedSlide(
            f"{uri} begins as a zip file, but its directory at the end is missing: {error}."
        ) from error
    check_entries(uri, entries)
    names = ("zarr.json", ".zgroup", ".zattrs")
    roots = [e.filename.rpartition("/")[0] for e in entries if e.filename.rpartition("/")[2] in names]
    if not roots:
        raise NotASlide(f"{uri} is a zip file without an OME-Zarr in it.")
    return GuardedZip(path), min(roots, key=len)


def _image_of(uri: str, store: Guarded, prefix: str) -> tuple[zarr.Group, Mapping[str, Any]]:
    """Return the group of the first image and its multiscale metadata; bioformats2raw's root has it in group 0."""
    for place in (prefix, f"{prefix}/0".lstrip("/")):
        try:
            group = zarr.open_group(store, path=place, mode="r", use_consolidated=False)
        except (FileNotFoundError, zarr.errors.NodeTypeValidationError):
            continue
        attributes = group.attrs.asdict()
        ome: Any = attributes.get("ome", attributes)
        images = ome.get("multiscales") if isinstance(ome, Mapping) else None
        if isinstance(images, Sequence) and images:
            return group, images[0]
    raise NotASlide(f"{uri} is a Zarr without OME's `multiscales`, so it has no image to read.")


def _array(uri: str, group: zarr.Group, name: object, axes: list[str]) -> zarr.Array[Any]:
    if not isinstance(name, str) or not name.isprintable() or {"", ".", ".."} & set(re.split(r"[/\\\\]", name)):
        raise NotASlide(f"{uri}: {name!r} is no path below the image's own folder.")
    array = group[name]
    if not isinstance(array, zarr.Array) or array.ndim != len(axes):
        raise NotASlide(f"{uri}: {name} is not an array of {len(axes)} axes.")
    shape = dict(zip(axes, array.shape, strict=True))
    if array.dtype != np.uint8 or shape.get("c", 1) not in CHANNELS:
        raise NotASlide(
            f"{uri}: {name} has {shape.get('c', 1)} channels of {array.dtype}; 8-bit RGB or grey (1 or 3) would do."
        )
    if stacks := [f"{shape[axis]} along {axis}" for axis in ("t", "z") if shape.get(axis, 1) != 1]:
        raise NotASlide(f"{uri}: {name} is a stack ({', '.join(stacks)}); one plane would do.")
    if strange := _codecs(array) - CODECS:
        raise NotASlide(f"{uri}: {name} needs {', '.join(sorted(strange))} to be decoded; none of these is used here.")
    if not min(MIN_CHUNK_BYTES, math.prod(array.shape)) <= math.prod(array.chunks) <= MAX_CHUNK_BYTES:
        raise BadDimensions(f"{uri}: {name} has chunks of {' x '.join(map(str, array.chunks))} pixels.")
    return array


def _codecs(array: zarr.Array[Any]) -> set[str]:
    """Return the names of all codecs between an array's files and its pixels, inside shards too."""

    def names(codecs: Any) -> set[str]:
        found: set[str] = set()
        for codec in codecs or ():
            found.add(str(codec.get("name", codec.get("id"))).removeprefix("numcodecs."))
            inside = codec.get("configuration")
            if isinstance(inside, Mapping):
                found |= names(inside.get("codecs")) | names(inside.get("index_codecs"))
        return found

    said: Any = array.metadata.to_dict()
    old = [codec for codec in (said.get("compressor"), *(said.get("filters") or ())) if codec]
    return names(said.get("codecs")) | names(old)


def _scale(image: Mapping[str, Any]) -> tuple[object, object]:
    """Return um per pixel of level 0 along x and y: the dataset's scale times the image's, in the axes' units."""
    axes = image["axes"]
    scale = np.ones(len(axes))
    found = False
    for step in (
        *image["datasets"][0].get("coordinateTransformations", ()),
        *image.get("coordinateTransformations", ()),
    ):
        if step.get("type") == "scale" and "scale" in step:
            scale, found = scale * np.asarray(step["scale"], np.float64), True
    ends = []
    for name in "xy":
        index = next(i for i, axis in enumerate(axes) if axis["name"] == name)
        unit = um_of(str(axes[index].get("unit", "")))
        ends.append(float(scale[index]) * unit if found and unit else None)
    return ends[0], ends[1]


def _bytes(path: Path, enough: int) -> int:
    """Return the bytes of a file, or of a folder's files as far as they are needed to reach `enough`."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for file in path.rglob("*"):
        total += file.stat().st_size if file.is_file() else 0
        if total >= enough:
            break
    return total

"""DM3 and DM4 files as Gatan's DigitalMicrograph writes them, by the published description of their tags.

B. Schaffer's and C. Boothroyd's pages on the DM3 and DM4 format: all sizes big-endian, all values little-endian; a
group is sorted, open, number of tags; a tag is 21 (data) or 20 (group), length of the name, name, in DM4 the bytes
that follow, then `%%%%` and what kind of data it is.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

CODES = {"int16": 2, "int32": 3, "uint16": 4, "uint32": 5, "float32": 6, "float64": 7, "int8": 9, "uint8": 10}
TYPES = {"int16": 1, "float32": 2, "complex64": 3, "uint8": 6, "int32": 7, "int8": 9, "uint16": 10, "uint32": 11}
TYPES |= {"float64": 12, "rgb": 23}


class Tags:
    """Writes the tags of one version."""

    def __init__(self, version: int) -> None:
        self.version, self.size = version, ">I" if version == 3 else ">Q"

    def group(self, *tags: bytes) -> bytes:
        return b"\0\0" + struct.pack(self.size, len(tags)) + b"".join(tags)

    def tag(self, kind: int, name: str, body: bytes) -> bytes:
        length = struct.pack(self.size, len(body)) if self.version == 4 else b""
        return struct.pack(">BH", kind, len(name)) + name.encode() + length + body

    def folder(self, name: str, *tags: bytes) -> bytes:
        return self.tag(20, name, self.group(*tags))

    def data(self, name: str, info: list[int], values: bytes) -> bytes:
        numbers = [len(info), *info]
        return self.tag(21, name, b"%%%%" + b"".join(struct.pack(self.size, n) for n in numbers) + values)

    def number(self, name: str, value: float, code: int = 5) -> bytes:
        return self.data(name, [code], struct.pack({5: "<I", 6: "<f"}[code], value))

    def text(self, name: str, value: str) -> bytes:
        return self.data(name, [20, 4, len(value)], value.encode("utf-16-le"))

    def image(self, values: np.ndarray, scale: float, unit: str, kind: str | None = None) -> bytes:
        """One entry of ImageList."""
        sides = values.shape[::-1]
        code = CODES.get(str(values.dtype), 6)
        many = values.size * (2 if values.dtype.kind == "c" else 1)
        about = [self.folder("", self.number("Scale", scale, 6), self.text("Units", unit)) for _ in sides]
        return self.folder(
            "",
            self.folder(
                "ImageData",
                self.folder("Calibrations", self.folder("Dimension", *about)),
                self.data("Data", [20, code, many], values.astype(values.dtype.newbyteorder("<")).tobytes()),
                self.number("DataType", TYPES[kind or str(values.dtype)]),
                self.folder("Dimensions", *(self.number("", side) for side in sides)),
                self.number("PixelDepth", values.itemsize),
            ),
        )


def write_dm(path: Path, values: np.ndarray, scale: float = 8.0, unit: str = "nm", version: int = 3) -> Path:
    """Write a preview in colours, then the image."""
    tags = Tags(version)
    preview = tags.image(np.zeros((4, 5), np.uint32), 1.0, "", "rgb")
    root = tags.group(tags.folder("ImageList", preview, tags.image(values, scale, unit)))
    head = struct.pack(">I", version) + struct.pack(tags.size, len(root)) + struct.pack(">I", 1)
    path.write_bytes(head + root + b"\0" * 8)
    return path

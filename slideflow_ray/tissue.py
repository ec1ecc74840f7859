"""Thumbnail -> bool mask of tissue; one rule per modality, pure NumPy and SciPy.

The H&E rule works on optical density after white balance, where the stains and the
inks of pens have directions: eosin and haematoxylin absorb green most, blue ink red,
green ink red and blue, black ink and scanner frames everything alike. It began as
NCRF's rule (saturation above Otsu, not all of R, G, B above Otsu, none below 50);
Otsu alone cuts pale tissue off where a slide is nearly all tissue and finds noise
where it is nearly all glass, so the threshold is held between two fixed densities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from slideflow_ray.geometry import best_level, scale_of
from slideflow_ray.slides.base import Pixels, SlideReader
from slideflow_ray.specs import TissueSpec

Plane = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

BLOCK_PX: Final = 4096
"""Level pixels per side of what is read at once for the thumbnail: 50 MB."""

CHROMA: Final = (0.016, 0.022)
"""Densities between which the threshold of tissue lies: 9 and 12 grey levels of colour on white glass."""

GREY_DENSITY: Final = (0.08, 0.16)
"""The same for silver stains, whose tissue is grey."""

PEN_REACH_UM: Final = 24.0
"""How far the blurred border of a pen stroke or a black frame reaches."""

INKS: Final = {"he": ("blue", "green", "black"), "pas": ("blue", "green", "black"), "ihc": ("green", "black")}
"""The pens looked for, by modality: blue ink looks like an IHC counterstain, black ink like silver."""

EVERYTHING: Final = ("tem", "mri")
"""Modalities whose pictures have no glass."""

NOISE: Final = 1e-6
"""Areas below this, in mask pixels, are rounding."""


@dataclass(frozen=True)
class TissueMask:
    """Where tissue is. mask : bool, shape (h, w), over the whole slide; each pixel covers `px0_per_px` (x, y) px0."""

    mask: Mask
    px0_per_px: tuple[float, float]
    rule: str


def find_tissue(reader: SlideReader, spec: TissueSpec, modality: str) -> TissueMask:
    """Return the tissue of a slide at about `spec.mpp`, by `spec.rule`.

    Rule "auto" is "everything" for tem and mri, "he" for the rest. Pieces smaller than
    `min_area_um2` are dropped and holes smaller than `max_hole_um2` filled. Raises
    ReadError.
    """
    rule = spec.rule if spec.rule != "auto" else ("everything" if modality in EVERYTHING else "he")
    w, h = thumbnail_size(reader, spec.mpp)
    px0_per_px = (reader.size_px0[0] / w, reader.size_px0[1] / h)
    if rule == "everything":
        return TissueMask(np.ones((h, w), np.bool_), px0_per_px, rule)
    um_per_px = reader.mpp0 * (px0_per_px[0] + px0_per_px[1]) / 2
    mask = stained(thumbnail(reader, (w, h)), um_per_px, modality)
    return TissueMask(cleaned(mask, um_per_px, spec.min_area_um2, spec.max_hole_um2), px0_per_px, rule)


def thumbnail_size(reader: SlideReader, mpp: float) -> tuple[int, int]:
    """Return (width, height) of the slide at about `mpp` um per pixel, never larger than level 0."""
    scale = max(1.0, scale_of(mpp, reader.mpp0))
    w, h = (max(1, round(length / scale)) for length in reader.size_px0)
    return w, h


def thumbnail(reader: SlideReader, size: tuple[int, int]) -> Pixels:
    """Return the whole slide as uint8, shape (height, width, 3), each pixel the mean of its area.

    Built from the coarsest level that is fine enough, in blocks, so memory stays small
    however large the slide is.
    """
    w, h = size
    scale = min(reader.size_px0[0] / w, reader.size_px0[1] / h)
    index = best_level(reader.levels, scale)
    level = reader.levels[index].size
    per_px = (level[0] / w, level[1] / h)
    out: Pixels = np.empty((h, w, 3), np.uint8)
    for x0, x1 in _spans(w, per_px[0]):
        for y0, y1 in _spans(h, per_px[1]):
            left, top = int(x0 * per_px[0]), int(y0 * per_px[1])
            right, bottom = (
                min(-int(-v // 1), n) for v, n in zip((x1 * per_px[0], y1 * per_px[1]), level, strict=True)
            )
            image = Image.fromarray(reader.read(index, (left, top), (right - left, bottom - top)))
            area = (x0 * per_px[0] - left, y0 * per_px[1] - top, x1 * per_px[0] - left, y1 * per_px[1] - top)
            area = (area[0], area[1], min(area[2], right - left), min(area[3], bottom - top))
            out[y0:y1, x0:x1] = np.asarray(image.resize((x1 - x0, y1 - y0), Image.Resampling.BOX, box=area))
    return out


def _spans(length: int, per_px: float) -> Iterator[tuple[int, int]]:
    step = max(1, int(BLOCK_PX / per_px))
    return ((start, min(start + step, length)) for start in range(0, length, step))


def stained(rgb: Pixels, um_per_px: float, modality: str) -> Mask:
    """Return where a thumbnail is stained, bool, shape (h, w): neither glass, nor pen, nor a black frame."""
    density = optical_density(rgb, white_point(rgb))
    if modality == "silver":
        signal, limits = density.min(axis=2), GREY_DENSITY
    else:
        signal, limits = density.max(axis=2) - density.min(axis=2), CHROMA
    signal = ndimage.gaussian_filter(signal, 0.7)
    unwanted = pen(rgb, density, INKS.get(modality, ())) | (rgb.max(axis=2) < 40)
    reach = max(1, round(PEN_REACH_UM / um_per_px))
    unwanted = ndimage.binary_dilation(unwanted, _disk(1), iterations=reach)
    return (signal > threshold(signal, limits)) & ~unwanted


def white_point(rgb: Pixels) -> npt.NDArray[np.float32]:
    """Return the colour of glass, float32, shape (3,): of bright pixels that are not pink; (245, 245, 245) if none.

    Pale tissue is pink: its green is below both red and blue, which the tint of glass
    and lamps is not.
    """
    low, high = rgb.min(axis=2), rgb.max(axis=2)
    pink = np.minimum(rgb[..., 0], rgb[..., 2]).astype(np.int16) - rgb[..., 1]
    glass = rgb[(low >= 180) & (high - low <= 40) & (pink <= 4)]
    if len(glass) < max(16, 0.002 * low.size):
        return np.full(3, 245, np.float32)
    bright = glass[glass.min(axis=1) >= np.percentile(glass.min(axis=1), 50)]
    white: npt.NDArray[np.float32] = np.median(bright, axis=0).astype(np.float32)
    return white


def optical_density(rgb: Pixels, white: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return log10 of white over pixel, float32, the shape of `rgb`; 0 on glass, never negative."""
    table = -np.log10(np.arange(1, 257, dtype=np.float32)[:, None] / (white + 1))
    density = np.stack([table[rgb[..., channel], channel] for channel in range(3)], axis=2)
    positive: npt.NDArray[np.float32] = np.maximum(density, 0, out=density)
    return positive


def threshold(signal: Plane, limits: tuple[float, float]) -> float:
    """Return Otsu's threshold, held between `limits`."""
    return min(max(otsu(signal), limits[0]), limits[1])


def otsu(values: Plane, bins: int = 256) -> float:
    """Return the value that splits `values` into two classes of the largest between-class variance.

    N. Otsu, IEEE Trans. SMC 9 (1979) 62-66. The threshold is the upper edge of the lower
    class's last bin; constant values return themselves.
    """
    counts, edges = np.histogram(values, bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts, dtype=np.float64)
    sum_below = np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sum_below / below - (sum_below[-1] - sum_below) / above
    between = np.where((below > 0) & (above > 0), below * above * gap**2, -1.0)
    return float(edges[int(np.argmax(between)) + 1])


def pen(rgb: Pixels, density: npt.NDArray[np.float32], inks: tuple[str, ...]) -> Mask:
    """Return where marker strokes are, bool, shape (h, w): strong ink, and the weak ink that touches it.

    Strong ink lies at density 0.35 or more in a direction that no stain of H&E or PAS has.
    """
    red, green, blue = (density[..., channel] for channel in range(3))
    found: Mask = np.zeros(rgb.shape[:2], np.bool_)
    if "blue" in inks:
        weak = (red > 1.15 * green) & (red - blue > 0.06) & (red > green + 0.03)
        found |= _touching((red > 0.35) & (red > 1.35 * green) & (red > 1.5 * blue), weak)
    if "green" in inks:
        weak = (red > green + 0.04) & (blue > green)
        found |= _touching((red > 0.35) & (red > 1.35 * green) & (blue > 1.15 * green), weak)
    if "black" in inks:
        grey = density.max(axis=2) - density.min(axis=2) < 0.25 * density.max(axis=2)
        found |= _touching(grey & (density.min(axis=2) > 0.5), grey & (density.min(axis=2) > 0.15))
    return found


def _touching(strong: Mask, weak: Mask) -> Mask:
    if not strong.any():
        return strong
    grown: Mask = ndimage.binary_propagation(strong, _disk(1.5), mask=weak | strong)
    return grown


def _disk(radius: float) -> Mask:
    reach = int(radius)
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    disk: Mask = x * x + y * y <= radius * radius
    return disk


def cleaned(mask: Mask, um_per_px: float, min_area_um2: float, max_hole_um2: float) -> Mask:
    """Return `mask` without pieces below `min_area_um2`, its holes below `max_hole_um2` filled.

    Pieces touch by their sides or corners, holes by their sides. An opening that reaches
    the edge of the slide is no hole.
    """
    area = um_per_px * um_per_px
    mask = mask | _small(~mask, max_hole_um2 / area, np.ones((3, 3), np.bool_) & _disk(1), holes=True)
    small = _small(mask, min_area_um2 / area, np.ones((3, 3), np.bool_), holes=False)
    return mask & ~small


def _small(mask: Mask, below_px: float, touch: Mask, *, holes: bool) -> Mask:
    """Return the pieces of `mask` with fewer than `below_px` pixels; as holes, only those off the border."""
    labels, n = ndimage.label(mask, touch)
    small = np.bincount(labels.ravel(), minlength=n + 1) < below_px
    small[0] = False
    if holes:
        for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
            small[side] = False
    picked: Mask = small[labels]
    return picked


def fraction_in(
    tissue: TissueMask, xy_px0: npt.NDArray[np.int64], wh_px0: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    """Return the part of each box that is tissue, float32, shape (n,), 0 to 1.

    `xy_px0` : int64, shape (n, 2), corners; `wh_px0` : int32, shape (n, 2), (width, height).
    Exact: inside a mask pixel the integral image is bilinear, so boxes may begin and end
    between pixels. What lies beyond the slide is no tissue.
    """
    integral = np.zeros((tissue.mask.shape[0] + 1, tissue.mask.shape[1] + 1), np.float64)
    np.cumsum(np.cumsum(tissue.mask, axis=0, dtype=np.float64), axis=1, out=integral[1:, 1:])
    scale = np.asarray(tissue.px0_per_px)
    start, end = xy_px0 / scale, (xy_px0 + wh_px0) / scale
    area = (
        _at(integral, end[:, 0], end[:, 1])
        - _at(integral, start[:, 0], end[:, 1])
        - _at(integral, end[:, 0], start[:, 1])
        + _at(integral, start[:, 0], start[:, 1])
    )
    area[area < NOISE] = 0
    whole = np.prod(end - start, axis=1)
    return np.minimum(area / whole, 1).astype(np.float32)


def _at(
    integral: npt.NDArray[np.float64], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the integral image at fractional points, held at its borders."""
    h, w = integral.shape
    x, y = np.clip(x, 0, w - 1), np.clip(y, 0, h - 1)
    col = np.minimum(x.astype(np.int64), w - 2)
    row = np.minimum(y.astype(np.int64), h - 2)
    fx, fy = x - col, y - row
    upper = integral[row, col] * (1 - fx) + integral[row, col + 1] * fx
    lower = integral[row + 1, col] * (1 - fx) + integral[row + 1, col + 1] * fx
    value: npt.NDArray[np.float64] = upper * (1 - fy) + lower * fy
    return value

"""Thumbnail -> bool mask of tissue; one rule per modality, pure NumPy and SciPy.

The rules of stained slides work on optical density after white balance, where the
stains and the inks of pens have directions: eosin and haematoxylin absorb green most,
blue ink red, green ink red and blue, red ink green and blue alike, black ink and
scanner frames everything alike. They began as NCRF's rule (saturation above Otsu, not
all of R, G, B above Otsu, none below 50); Otsu alone cuts pale tissue off where a slide
is nearly all tissue and finds noise where it is nearly all glass, so the threshold is
held between two fixed densities. A micrograph has no glass: everything is tissue but
the rows that its reader leaves out (scale bar, text), or, of a coloured one, labels at its upper or lower edge.

Copies of one slide with the same level 0 get the same mask, whatever their pyramids,
up to LEVEL0_PX pixels: the thumbnail is then averaged from level 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from slideflow_ray.errors import MaskError, SlideError
from slideflow_ray.geometry import best_level, scale_of
from slideflow_ray.identity import identity
from slideflow_ray.slides.base import Pixels, SlideReader, is_micrograph, kept_px0, same_shape
from slideflow_ray.specs import TissueSpec

Plane = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

METHOD: Final = 2
"""Part of every tissue mask's digest: a change of the rules below makes new masks and new grids."""

LEVEL0_PX: Final = 2**26
"""Slides of at most so many pixels (8,192 x 8,192) have their thumbnail averaged from level 0, in about 0.3 s.

Larger ones are averaged from the coarsest level that is fine enough; there copies with
other pyramids may differ in pixels at the border of their masks.
"""

MICROGRAPH_PX: Final = 1024
"""The longer side of a micrograph's mask: its scale says nothing about the size of its labels."""

MASK_SHAPE: Final = 0.01
"""How far the aspect of a user's mask may be from the slide's, rounding to whole pixels aside."""

BLOCK_PX: Final = 4096
"""Level pixels per side of what is read at once for the thumbnail: 50 MB."""

CHROMA: Final = (0.016, 0.022)
"""Densities between which the threshold of tissue lies: 9 and 12 grey levels of colour on white glass."""

GREY_DENSITY: Final = (0.08, 0.16)
"""The same for silver stains, whose tissue is grey."""

PEN_REACH_UM: Final = 24.0
"""How far the blurred border of a pen stroke or a black frame reaches."""

INKS: Final = {
    "he": ("blue", "green", "black", "red"),
    "pas": ("blue", "green", "black", "red"),
    "ihc": ("green", "black"),
    "silver": ("blue",),
}
"""The pens looked for: blue ink looks like an IHC counterstain, red like AEC, black like silver, green like its
counterstain."""

RULES: Final = {"tem": "micrograph", "mri": "everything"}
"""What rule "auto" is; other modalities are stained slides, and the rule has their name."""

NOISE: Final = 1e-6
"""Areas below this, in mask pixels, are rounding."""


@dataclass(frozen=True)
class TissueMask:
    """Where tissue is. mask : bool, shape (h, w), over the whole slide; each pixel covers `px0_per_px` (x, y) px0.

    `reason` says why there is no tissue; it is empty where there is some.
    """

    mask: Mask
    px0_per_px: tuple[float, float]
    rule: str
    reason: str = ""


def find_tissue(reader: SlideReader, spec: TissueSpec, modality: str, mask: str | None = None) -> TissueMask:
    """Return the tissue of a slide at about `spec.mpp`, by `spec.rule`, or the user's own `mask` (a uri).

    Rule "auto" is "micrograph" for tem, "everything" for mri and the stain's own for the
    rest. Pieces smaller than `min_area_um2` are dropped and holes smaller than
    `max_hole_um2` filled, but not in a user's mask. Raises ReadError, MaskError.
    """
    if mask is not None:
        return user_mask(mask, reader.size_px0)
    rule = spec.rule if spec.rule != "auto" else RULES.get(modality, modality)
    w, h = micrograph_size(reader) if rule == "micrograph" else thumbnail_size(reader, spec.mpp)
    px0_per_px = (reader.size_px0[0] / w, reader.size_px0[1] / h)
    if rule == "everything" or (rule == "micrograph" and is_micrograph(reader)):
        return TissueMask(_picture(reader, (h, w)), px0_per_px, rule)
    picture = thumbnail(reader, (w, h), level0_px=LEVEL0_PX)
    if rule == "micrograph":
        return TissueMask(~burnt_in(picture), px0_per_px, rule)
    um_per_px = reader.mpp0 * (px0_per_px[0] + px0_per_px[1]) / 2
    found, reason = _stained(picture, um_per_px, rule)
    tissue = cleaned(found, um_per_px, spec.min_area_um2, spec.max_hole_um2)
    if tissue.any():
        return TissueMask(tissue, px0_per_px, rule)
    reason = reason or f"every stained piece is smaller than {spec.min_area_um2:g} um2"
    return TissueMask(tissue, px0_per_px, rule, reason)


def _picture(reader: SlideReader, shape: tuple[int, int]) -> Mask:
    """Return which pixels of a mask have their centre in what the reader says is picture, bool, `shape` (h, w)."""
    (w0, h0), (x0, y0, x1, y1) = reader.size_px0, kept_px0(reader)
    rows, cols = ((np.arange(n) + 0.5) * length / n for n, length in zip(shape, (h0, w0), strict=True))
    found: Mask = ((rows >= y0) & (rows < y1))[:, None] & ((cols >= x0) & (cols < x1))[None]
    return found


def mask_identity(uri: str, cache: Path | None = None) -> str:
    """Return the identity of a user's mask, by its content. Raises MaskError where there is none."""
    try:
        return identity(uri, cache)
    except (SlideError, OSError) as error:
        raise MaskError(f"There is no mask {uri}: {error}") from error


def user_mask(uri: str, size_px0: tuple[int, int]) -> TissueMask:
    """Return a mask drawn by the user: a PNG or TIFF of any size over the whole slide, tissue where it is not zero.

    Raises MaskError: no such file, not an image, of another aspect than the slide.
    """
    from slideflow_ray.remote import at_hand
    from slideflow_ray.slides.image import read_labels

    try:
        found = read_labels(uri, at_hand(uri)) > 0
    except MemoryError:
        raise
    except Exception as error:
        cause = error.message if isinstance(error, SlideError) else f"{type(error).__name__}: {error}."
        raise MaskError(f"The mask {uri} cannot be read: {cause}") from error
    h, w = found.shape
    px0_per_px = (size_px0[0] / w, size_px0[1] / h)
    if not same_shape(size_px0, (w, h)) and abs(px0_per_px[0] / px0_per_px[1] - 1) > MASK_SHAPE:
        raise MaskError(
            f"The mask {uri} has {w} x {h} pixels, which is not the shape of {size_px0[0]} x {size_px0[1]}."
        )
    return TissueMask(found, px0_per_px, "user", "" if found.any() else "the user's mask is all zero")


def micrograph_size(reader: SlideReader) -> tuple[int, int]:
    """Return (width, height) of a micrograph's mask: MICROGRAPH_PX along the longer side, never above level 0."""
    factor = min(1.0, MICROGRAPH_PX / max(reader.size_px0))
    w, h = (max(1, round(length * factor)) for length in reader.size_px0)
    return w, h


def thumbnail_size(reader: SlideReader, mpp: float) -> tuple[int, int]:
    """Return (width, height) of the slide at about `mpp` um per pixel, never larger than level 0."""
    scale = max(1.0, scale_of(mpp, reader.mpp0))
    w, h = (max(1, round(length / scale)) for length in reader.size_px0)
    return w, h


def thumbnail(reader: SlideReader, size: tuple[int, int], *, level0_px: int = 0) -> Pixels:
    """Return the whole slide as uint8, shape (height, width, 3), each pixel the mean of its area.

    Built from the coarsest level that is fine enough, or from level 0 where that has at
    most `level0_px` pixels; in blocks, so memory stays small however large the slide is.
    """
    w, h = size
    scale = min(reader.size_px0[0] / w, reader.size_px0[1] / h)
    small = reader.size_px0[0] * reader.size_px0[1] <= level0_px
    index = 0 if small else best_level(reader.levels, scale)
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
    return _stained(rgb, um_per_px, modality)[0]


def _stained(rgb: Pixels, um_per_px: float, modality: str) -> tuple[Mask, str]:
    """Return where a thumbnail is stained, and, where nothing is, why."""
    density = optical_density(rgb, white_point(rgb))
    colour = _above(density.max(axis=2) - density.min(axis=2), CHROMA)
    if modality == "silver":
        colour |= _above(density.min(axis=2), GREY_DENSITY)
    unwanted = pen(rgb, density, INKS.get(modality, ())) | (rgb.max(axis=2) < 40)
    reach = max(1, round(PEN_REACH_UM / um_per_px))
    found = colour & ~ndimage.binary_dilation(unwanted, _disk(1), iterations=reach)
    if found.any():
        return found, ""
    return found, "what is stained is pen or a black area" if colour.any() else "no pixel is stained"


def _above(signal: Plane, limits: tuple[float, float]) -> Mask:
    signal = ndimage.gaussian_filter(signal, 0.7)
    above: Mask = signal > threshold(signal, limits)
    return above


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
    if "red" in inks:
        pure = (red < 0.3 * green) & (green > red + 0.1) & (blue > 0.6 * green)
        found |= _touching((red < 0.15 * green) & (green > 0.65) & (blue > 0.75 * green), pure)  # blood absorbs red too
    if "black" in inks:
        grey = density.max(axis=2) - density.min(axis=2) < 0.25 * density.max(axis=2)
        found |= _touching(grey & (density.min(axis=2) > 0.5), grey & (density.min(axis=2) > 0.15))
    return found


LABEL_BAND: Final = 0.15
"""Burnt-in labels lie wholly in this part of the picture, at its top or bottom."""

LABEL_FILL: Final = 0.9
"""The least part of its bounding box that a label's paper covers, its letters filled; an ellipse covers 0.79."""


def burnt_in(rgb: Pixels) -> Mask:
    """Return where a micrograph carries burnt-in labels, bool, shape (h, w): strips and boxes of pure white or black.

    A strip is the rows at the edge of the picture that are paper from side to side; a box
    is a rectangle of paper at least four times as wide as high, in the upper or lower
    LABEL_BAND; what is written on them are gaps and holes. Letters and scale bars drawn on
    the tissue itself are not looked for.
    """
    h, w = rgb.shape[:2]
    found: Mask = np.zeros((h, w), np.bool_)
    for paper in (rgb.min(axis=2) >= 245, rgb.max(axis=2) <= 10):
        strips = _strip(paper) | _strip(paper[::-1])[::-1]
        found[strips] = True
        labels, _ = ndimage.label(paper & ~strips[:, None])
        for index, box in enumerate(ndimage.find_objects(labels), start=1):
            if box is not None and _is_label(labels[box] == index, box, (h, w)):
                rows, cols = (slice(max(0, side.start - 2), side.stop + 2) for side in box)  # their soft border
                found[rows, cols] = True
    return found


def _is_label(paper: Mask, box: tuple[slice, ...], shape: tuple[int, int]) -> bool:
    height, width = paper.shape
    low, high = LABEL_BAND * shape[0], (1 - LABEL_BAND) * shape[0]
    if height < max(4, 0.01 * shape[0]) or width < 4 * height or not (box[0].stop <= low or box[0].start >= high):
        return False
    beside = np.pad(paper, ((0, 0), (height, height)))  # letters that touch the paper's edge are gaps, not holes
    whole = ndimage.binary_closing(beside, np.ones((1, height), np.bool_))[:, height:-height]
    return float(ndimage.binary_fill_holes(whole).mean()) >= LABEL_FILL


def _strip(paper: Mask) -> npt.NDArray[np.bool_]:
    """Return which rows, bool, shape (h,), are a strip at the lower edge, two rows of soft border included."""
    h, w = paper.shape
    reach = max(3, w // 40)  # letters are gaps
    beside = np.pad(paper, ((0, 0), (reach, reach)), constant_values=True)
    closed = ndimage.binary_closing(beside, np.ones((1, reach), np.bool_))[:, reach:-reach]
    other = np.flatnonzero(closed.mean(axis=1) < LABEL_FILL)
    start = int(other[-1]) + 1 if len(other) else h
    rows: npt.NDArray[np.bool_] = np.zeros(h, np.bool_)
    if max(4, 0.01 * h) <= h - start <= LABEL_BAND * h:
        rows[max(0, start - 2) :] = True
    return rows


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

"""How sharp tiles and slides are: the variance of the Laplacian, over the variance of the tile itself.

J. L. Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy: a comparative
study", ICPR 2000, use the variance of the Laplacian; dividing by the tile's own variance
(as the normalised variance of F. C. A. Groen et al., Cytometry 6 (1985) 81-91, divides by
the mean) takes the contrast of the stain out. The quotient is the mean of the Laplacian's
squared gain over the tile's power spectrum, so a blur, which takes power from where that
gain is high, lowers it. Noise is sharp too: score tissue, not glass.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from slideflow_ray.slides import SlideReader, read_tiles
from slideflow_ray.slides.base import Pixels
from slideflow_ray.tissue import TissueMask

NOISE: Final = 25.0
"""Added to a tile's variance (grey levels squared), so that the noise of an empty tile does not count as sharp."""

SAMPLE: Final = 16
SAMPLE_PX: Final = 256
SAMPLE_MPP: Final = 0.5
"""A slide's focus is the median over so many tiles on tissue, of this size and scale.

Where level 0 is coarser, or more than ten times finer (a micrograph), the scale is level 0's.
"""


def focus(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Return the focus score of each tile, float32, shape (n,); higher is sharper.

    `pixels` : uint8, shape (n, T, T, 3), T at least 3; the green channel counts, in which haematoxylin and
    eosin are both dark. 0 for a constant tile; at most 64, the Laplacian's largest squared gain.
    Scores compare tiles of one scale. Whole numbers throughout, so every machine gives the same.
    """
    out = np.zeros(len(pixels), np.float32)
    for row, tile in enumerate(pixels):  # tile by tile: it stays in the cache
        green = tile[..., 1].astype(np.int16)
        laplacian = green[:-2, 1:-1] + green[2:, 1:-1] + green[1:-1, :-2] + green[1:-1, 2:] - 4 * green[1:-1, 1:-1]
        out[row] = _variance(laplacian) / (_variance(green) + NOISE)
    return out


def _variance(values: npt.NDArray[np.int16]) -> float:
    """Return the variance of small whole numbers; the sums are exact."""
    wide = values.ravel().astype(np.int32)
    mean = int(wide.sum(dtype=np.int64)) / wide.size
    return int(np.einsum("i,i->", wide, wide, dtype=np.int64, casting="safe")) / wide.size - mean**2


STAINED: Final = 0.15
"""Optical density above which a pixel counts as stained (M. Macenko et al., ISBI 2009)."""


def slide_focus(reader: SlideReader, tissue: TissueMask) -> float | None:
    """Return the median focus of the tiles of `sample`, or None where there is no tissue. Raises ReadError."""
    tiles = sample(reader, tissue)
    return float(np.median(focus(tiles))) if len(tiles) else None


def stain_density(tiles: Pixels) -> tuple[float, float, float] | None:
    """Return the mean optical density, -log10((v + 1) / 256), of stained pixels: (red, green, blue), None of none."""
    density = -np.log10((np.arange(256) + 1) / 256)[tiles]
    stained = density[density.mean(axis=-1) > STAINED]
    if not len(stained):
        return None
    red, green, blue = stained.mean(axis=0).tolist()
    return red, green, blue


def sample(reader: SlideReader, tissue: TissueMask) -> Pixels:
    """Return up to SAMPLE tiles spread evenly over the tissue, uint8 (n, SAMPLE_PX, SAMPLE_PX, 3).

    Which tiles depends on the mask alone. Raises ReadError.
    """
    rows, cols = np.nonzero(tissue.mask)
    if not len(rows):
        return np.empty((0, SAMPLE_PX, SAMPLE_PX, 3), np.uint8)
    mpp = SAMPLE_MPP if SAMPLE_MPP / 10 <= reader.mpp0 < SAMPLE_MPP else reader.mpp0
    side = SAMPLE_PX * mpp / reader.mpp0
    picked = np.unique(((np.arange(SAMPLE) + 0.5) * len(rows) / SAMPLE).astype(np.int64))
    centres = (np.column_stack([cols[picked], rows[picked]]) + 0.5) * np.asarray(tissue.px0_per_px)
    limit = np.maximum(np.asarray(reader.size_px0) - side, 0)
    xy_px0 = np.rint(np.clip(centres - side / 2, 0, limit)).astype(np.int64)
    return read_tiles(reader, np.unique(xy_px0, axis=0), tile_px=SAMPLE_PX, mpp=mpp)

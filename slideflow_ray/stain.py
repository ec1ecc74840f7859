"""Stain normalisation: what dyes a slide has, and its pixels in the colours of a target. Pure NumPy.

Vahadane (A. Vahadane et al., IEEE Trans. Med. Imaging 35 (2016) 1962-1971): optical density V = W H with two
non-negative stain vectors W and non-negative concentrations H, L1 on H; an exact solver for two stains takes the place
of a dictionary library. Macenko (M. Macenko et al., ISBI 2009): the extreme angles in the plane of the two largest
principal components. Reinhard (E. Reinhard et al., IEEE Comput. Graph. Appl. 21 (2001) 34-41): mean and standard
deviation of each channel, here of CIELAB (D65) as torchstain and tiatoolbox have it, not of the paper's l-alpha-beta.

A fit is made once for each slide; with it, a normalised pixel is a function of the pixel alone. `normalise` is the
reference; `prepare.restain` is the same on tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from slideflow_ray.errors import StainError
from slideflow_ray.specs import Spec

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

Method = Literal["vahadane", "macenko", "reinhard"]
METHODS: Final = get_args(Method)

VERSION: Final = 3
"""Of fits and of what is made of them: a change below gives new fits, and bundles with targets new digests."""

RUIFROK: Final = {"he": ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11)), "pas": ((0.65, 0.70, 0.29), (0.175, 0.972, 0.154))}
"""Where the search for the vectors begins: haematoxylin, and eosin or Schiff's magenta (Ruifrok, Johnston 2001)."""

LAM: Final = 0.1
"""L1 weight of Vahadane's fit, per pixel: that of StainTools, torchvahadane, tiatoolbox; 0.02 is nearer the truth."""

CODE_LAM: Final = 0.01
"""L1 weight of the concentrations once Vahadane's vectors are known, as in StainTools: 0.1 would bleach pale tissue."""

ROUNDS: Final = 50
TISSUE_L: Final = 80.0
"""CIELAB lightness below which a pixel counts as tissue; StainTools' 0.8. Black is none (torchvahadane)."""

MIN_TISSUE: Final = 0.01
MIN_PIXELS: Final = 100
MIN_ANGLE_DEG: Final = 5.0
MIN_DYE: Final = 0.02
"""The least 99th percentile of a dye's concentration: 5 grey levels. What is less is not there, and not multiplied."""

GLASS: Final = 200
"""The least value of empty glass in each channel."""

GLASS_CHROMA: Final = 30
"""By how much its channels differ at most."""

GLASS_PINK: Final = 8
"""By how much its green lies below red and blue at most, as that of pale eosin and magenta does by more."""

GLASS_SPREAD: Final = 6
"""Grey levels about its mode within which glass lies: noise, and uneven light between tiles."""

TILE_PIXELS: Final = 16384
"""Pixels of tissue that count of one tile, evenly spread over it."""

BETA: Final = 0.15
ALPHA: Final = 1.0
"""Macenko's least optical density, and the percentile of angles that counts as extreme."""

DIGITS: Final = 6
"""Fits are rounded to so many decimals: far below a grey level, and machines agree on them."""

Three = tuple[float, float, float]
Dyes = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
Amount = Annotated[float, Field(gt=0)]
Level = Annotated[float, Field(ge=GLASS, le=255)]


class StainFit(Spec):
    """What a slide's staining is, by one method.

    matrix : (3, 2), unit columns of optical density in red, green, blue: haematoxylin first. p99 : the 99th
    percentile of each dye's concentration. white : what empty glass looks like to the scanner, from which optical
    density is measured; None is 255 in every channel. mean, std : of CIELAB, by Reinhard, which has no dyes.
    """

    method: Method
    matrix: Dyes | None = None
    p99: tuple[Amount, Amount] | None = None
    white: tuple[Level, Level, Level] | None = None
    mean: Three | None = None
    std: tuple[Amount, Amount, Amount] | None = None

    @model_validator(mode="after")
    def _whole(self) -> StainFit:
        said = {name for name in ("matrix", "p99", "mean", "std") if getattr(self, name) is not None}
        wanted = {"mean", "std"} if self.method == "reinhard" else {"matrix", "p99"}
        if said != wanted or (self.method == "reinhard" and self.white):
            raise ValueError(f"a fit by {self.method} has {' and '.join(sorted(wanted))}, and nothing else")
        return self


class StainTarget(Spec):
    """What slides of one stain are made to look like; part of a bundle. `lam` is the L1 weight of Vahadane's fits.

    source : the slide or crop whose fit it is, for the record.
    """

    method: Method
    stain: str
    fit: StainFit
    lam: Annotated[float, Field(gt=0, le=1)] = LAM
    source: str = ""

    @model_validator(mode="after")
    def _one_method(self) -> StainTarget:
        if self.fit.method != self.method:
            raise ValueError(f"the target is of {self.method}, its fit of {self.fit.method}")
        return self


@dataclass(frozen=True)
class Stained:
    """How tiles are stained: the name of their stain, and a fit for all of them or one for each."""

    stain: str
    fits: tuple[StainFit, ...]

    def rows(self, start: int, stop: int) -> Stained:
        """Return that of some of the tiles."""
        return self if len(self.fits) == 1 else Stained(self.stain, self.fits[start:stop])


def stain_name(stain: str | None, modality: str) -> str:
    """Return the key of an item's target: its column `stain`, its modality where that is empty.

    >>> stain_name("H&E", "he"), stain_name(None, "pas"), stain_name(" PAS", "he")
    ('he', 'pas', 'pas')
    """
    return (stain or modality).strip().lower().replace("&", "")


def stain_numbers(items: Iterable[Any]) -> dict[str, int]:
    """Return a number for each stain of a cohort's items, by `stain_name`: what may be mixed has the same."""
    return {name: i for i, name in enumerate(sorted({stain_name(item.stain, item.modality) for item in items}))}


def target_of(targets: Mapping[str, StainTarget], stain: str, who: str) -> StainTarget:
    """Return the target for a stain. Raises StainError where there is none: HE is never made to look like PAS."""
    if stain in targets:
        return targets[stain]
    raise StainError(
        f"{who} has targets for {', '.join(sorted(targets))}, and none for the stain {stain!r}.",
        next_step="Correct the column `stain` (or `modality`), or route these rows to another model with `where`.",
    )


def unstated(who: str) -> StainError:
    """Return the error of slides whose rows say no stain, where there are several: none is taken for HE in silence."""
    return StainError(
        f"{who}: the cohort says neither stain nor modality, and there is more than one stain to choose from.",
        next_step="Fill the column `stain` (he, pas, ...) of these rows and run again.",
    )


# optical density


_OD: Final[Floats] = np.maximum(-np.log(np.maximum(np.arange(256), 1) / 255), 1e-6)
_LINEAR: Final[Floats] = np.array(
    [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.arange(256) / 255]
)
_XYZ: Final[Floats] = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
)
_WHITE: Final[Floats] = np.array([0.95047, 1.0, 1.08883])
_LAB: Final[Floats] = np.array([[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]])
_LAB_AT: Final[Floats] = np.array([-16.0, 0.0, 0.0])


def od(pixels: Pixels, white: Three | None = None) -> Floats:
    """Return the optical density max(-ln(max(v, 1) / white), 1e-6), float64, the shape of `pixels`."""
    found: Floats = np.maximum(_OD[pixels] - _dark(white), 1e-6)
    return found


def _dark(white: Three | None) -> Floats:
    """The optical density of glass against full light, (3,)."""
    found: Floats = -np.log(np.asarray(white or (255, 255, 255)) / 255)
    return found


def glass(tiles: Sequence[Pixels]) -> Three | None:
    """Return what a scanner makes of empty glass: the median of what tiles, uint8 (..., 3), show of it.

    Nothing is brighter than glass, so tiles count whose glass is about as bright as the brightest. None, which means
    255, where no tile shows any, or it is white. Without it, a scanner's tinge would be taken for dye; with pale
    tissue in its place, that dye would be taken off everywhere.
    """
    found = np.array([seen for seen in (_glass_of(tile) for tile in tiles) if seen is not None])
    if not len(found):
        return None
    brightest = found[found.sum(axis=1).argmax()]
    near = found[(np.abs(found - brightest) <= GLASS_SPREAD).all(axis=1)]
    red, green, blue = np.median(near, axis=0).tolist()
    return None if red == green == blue == 255 else (red, green, blue)


def _glass_of(tile: Pixels) -> Floats | None:
    """Each channel's mode, (3,), over pixels that are bright, nearly grey and not pink, where that is glass.

    Glass is a sharp peak, 1 % of the tile at least, and little is brighter: JPEG's overshoot beside edges, for which a
    high percentile would be too bright. Pale tissue is broad instead: much of it is brighter than its mode, and much
    a little darker.
    """
    flat = tile.reshape(-1, 3).astype(np.int16)
    flat = flat[flat.min(axis=1) >= GLASS - 2 * GLASS_SPREAD]
    low, high = flat.min(axis=1), flat.max(axis=1)
    pink = np.minimum(flat[:, 0], flat[:, 2]) - flat[:, 1]
    bright = flat[(low >= GLASS) & (high - low <= GLASS_CHROMA) & (pink <= GLASS_PINK)]
    if not len(bright):
        return None
    mode = np.array([255 - int(np.bincount(bright[:, c], minlength=256)[::-1].argmax()) for c in range(3)])
    over, under = (flat - mode).max(axis=1), (mode - flat).max(axis=1)
    peak = np.count_nonzero((over <= GLASS_SPREAD) & (under <= GLASS_SPREAD))
    beyond = np.count_nonzero(over > GLASS_SPREAD)
    below = np.count_nonzero((over <= GLASS_SPREAD) & (under > GLASS_SPREAD) & (under <= 2 * GLASS_SPREAD))
    if peak < max(MIN_PIXELS, MIN_TISSUE * tile[..., 0].size) or max(2 * beyond, below) > peak / 2:
        return None
    return mode.astype(np.float64)


def tissue(pixels: Pixels) -> Mask:
    """Return which pixels, uint8 (..., 3), count as tissue: lightness below TISSUE_L, and not black."""
    y = _LINEAR[pixels] @ _XYZ[1]
    found: Mask = (y < ((TISSUE_L + 16) / 116) ** 3) & (pixels.max(axis=-1) > 0)
    return found


def to_lab(pixels: Pixels) -> Floats:
    """Return CIELAB under D65 of sRGB, float64, the shape of `pixels`."""
    t = _LINEAR[pixels] @ (_XYZ / _WHITE[:, None]).T
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    found: Floats = f @ _LAB.T + _LAB_AT
    return found


# fits


def fit_vahadane(pixels: Pixels, lam: float = LAM, stain: str = "he") -> StainFit:
    """Return the stains of an image, uint8 (..., 3), by sparse non-negative factorisation. Raises StainError."""
    return fit_tiles([pixels], "vahadane", lam, stain)


def fit_macenko(pixels: Pixels, stain: str = "he") -> StainFit:
    """Return the stains of an image, uint8 (..., 3), by extreme angles. Raises StainError."""
    return fit_tiles([pixels], "macenko", LAM, stain)


def fit_reinhard(pixels: Pixels, stain: str = "he") -> StainFit:
    """Return mean and standard deviation of the tissue in an image, uint8 (..., 3). Raises StainError."""
    return fit_tiles([pixels], "reinhard", LAM, stain)


def fit_tiles(tiles: Sequence[Pixels], method: Method, lam: float = LAM, stain: str = "he") -> StainFit:
    """Return one fit for tiles of a slide (or crops that were stained together), each uint8 (..., 3).

    The matrix is the median of the tiles' own, so that a fold or a pen stroke on one of them does not count, its
    columns made unit again; the 99th percentiles are of all their tissue together. Tiles with less than 1 % tissue
    are left out. Raises StainError when all tiles together have less, when the two vectors lie within 5 degrees of
    each other, when one of the dyes is not there, or when a number is not finite.
    """
    found = [_tissue_of(tile) for tile in tiles]
    seen, there = sum(tile[..., 0].size for tile in tiles), sum(n for _, n in found)
    if there < max(MIN_PIXELS, MIN_TISSUE * seen):
        share = f"{there / seen:.2%}" if seen else "nothing"
        raise StainError(f"Of {seen:,} pixels {share} is tissue, too little to tell its stains.")
    if method == "reinhard":
        return _fit_colours(np.concatenate([rgb for rgb, _ in found]))
    least, white = MIN_TISSUE * seen / max(1, len(tiles)), glass(tiles)
    good = [od(rgb, white) for rgb, n in found if len(rgb) >= MIN_PIXELS and n >= least]
    solve = _macenko if method == "macenko" else lambda v: _vahadane(v, lam, stain)
    fit = _fit_dyes(good or [od(np.concatenate([rgb for rgb, _ in found]), white)], method, solve)
    return fit.model_copy(update={"white": white})


def _tissue_of(tile: Pixels) -> tuple[Pixels, int]:
    """The tissue of a tile, uint8 (n, 3), thinned to TILE_PIXELS; and how much there is."""
    flat = tile.reshape(-1, 3)
    rgb = flat[tissue(flat)]
    return rgb[:: -(-len(rgb) // TILE_PIXELS) or 1], len(rgb)


def _fit_dyes(tiles: Sequence[Floats], method: Method, solve: Any) -> StainFit:
    several = [w for w in (solve(v) for v in tiles) if w is not None and np.isfinite(w).all()]
    if not several:
        raise StainError(
            f"{method.capitalize()}'s stain vectors are not defined: too few dark pixels, or too few colours."
        )
    matrix = np.median(several, axis=0)
    matrix = matrix / np.linalg.norm(matrix, axis=0)
    _check_apart(matrix)
    amounts = concentrations(np.concatenate(tiles), matrix, method)
    p99 = np.percentile(amounts, 99, axis=0)
    if not (np.isfinite(p99).all() and p99.min() >= MIN_DYE):
        raise StainError(f"One of two dyes is hardly there: concentrations {p99[0]:.3f} and {p99[1]:.3f}.")
    return StainFit(method=method, matrix=_rounded(matrix), p99=_rounded(p99))


def _check_apart(matrix: Floats) -> None:
    cosine = float(np.clip(matrix[:, 0] @ matrix[:, 1], -1, 1))
    angle = float(np.degrees(np.arccos(cosine))) if np.isfinite(matrix).all() else 0.0
    if not MIN_ANGLE_DEG <= angle <= 180 - MIN_ANGLE_DEG:
        raise StainError(f"The two stain vectors are {angle:.1f} degrees apart, so they are one.")


def _fit_colours(rgb: Pixels) -> StainFit:
    lab = to_lab(rgb)
    mean, std = lab.mean(axis=0), lab.std(axis=0)
    if std.min() < 1e-3:
        raise StainError("The tissue is all of one colour, so it has no spread to bring to another's.")
    return StainFit(method="reinhard", mean=_rounded(mean), std=_rounded(std))


def _rounded(values: Floats) -> Any:
    return np.round(values, DIGITS).tolist()


def _macenko(v: Floats) -> Floats | None:
    """Return the stain vectors, (3, 2), of optical densities (n, 3)."""
    dense = v[(v >= BETA).all(axis=1)]
    if len(dense) < MIN_PIXELS:
        return None
    plane = np.linalg.eigh(np.cov(dense.T))[1][:, 1:3]
    angles = np.arctan2(*(dense @ plane).T[::-1])
    ends = np.percentile(angles, [ALPHA, 100 - ALPHA])
    return _haematoxylin_first(plane @ np.stack([np.cos(ends), np.sin(ends)]))


def _vahadane(v: Floats, lam: float, stain: str) -> Floats | None:
    """Return W, (3, 2), that minimises |V - W H|^2 / 2 + lam |H|_1 with W, H >= 0 and |w| <= 1, of V (n, 3).

    Each round solves H exactly, pixel by pixel, then improves each column of W in its turn (J. Mairal et al.,
    JMLR 11 (2010) 19-60, algorithm 2). Sums of products instead of matrix products, which differ between machines.
    """
    w = np.array(RUIFROK.get(stain, RUIFROK["he"])).T
    w = w / np.linalg.norm(w, axis=0)
    planes = np.ascontiguousarray(v.T)
    for _ in range(ROUNDS):
        h = _sparse(planes, w, lam)
        a = np.array([[np.sum(x * y) for y in h] for x in h])
        b = np.array([[np.sum(plane * x) for x in h] for plane in planes])
        for j in range(2):
            if a[j, j] > 0:
                w[:, j] = np.maximum(0, w[:, j] + (b[:, j] - w @ a[:, j]) / a[j, j])
            w[:, j] /= max(float(np.linalg.norm(w[:, j])), 1.0)
    length = np.linalg.norm(w, axis=0)
    return _haematoxylin_first(w / length) if length.min() > 0 else None


def _haematoxylin_first(w: Floats) -> Floats:
    """Haematoxylin absorbs red; eosin and magenta hardly do."""
    return w if w[0, 0] > w[0, 1] else w[:, ::-1]


def _sparse(planes: Floats, w: Floats, lam: float) -> Floats:
    """Return H >= 0, (2, n), that minimises |v - W h|^2 / 2 + lam |h|_1 for each column v of `planes`, (3, n).

    Where both would be positive, the solution is that of the normal equations; else one is 0, and the other,
    of unit-length vectors the one with the larger product with v, is max(b / G, 0).
    """
    g = w.T @ w
    b = [sum(w[c, j] * planes[c] for c in range(3)) - lam for j in range(2)]
    scale = 1 / (g[0, 0] * g[1, 1] - g[0, 1] ** 2) if _apart(g) else np.inf
    alone = [np.maximum(b[j], 0) / max(g[j, j], 1e-12) for j in range(2)]
    if not np.isfinite(scale):
        return np.stack([alone[0], np.zeros_like(alone[0])])
    both = [(g[1 - j, 1 - j] * b[j] - g[0, 1] * b[1 - j]) * scale for j in range(2)]
    first = alone[0] * alone[0] * g[0, 0] >= alone[1] * alone[1] * g[1, 1]
    positive = (both[0] > 0) & (both[1] > 0)
    return np.stack(
        [
            np.where(positive, both[0], np.where(first, alone[0], 0)),
            np.where(positive, both[1], np.where(first, 0, alone[1])),
        ]
    )


def _apart(g: Floats) -> bool:
    return bool(g[0, 0] * g[1, 1] - g[0, 1] ** 2 > 1e-9)


def concentrations(v: Floats, matrix: Floats, method: Method) -> Floats:
    """Return how much of each dye there is, float64 (..., 2), in optical densities v (..., 3).

    By Vahadane non-negative and sparse with weight CODE_LAM; by Macenko least squares, which may be negative.
    """
    if method == "macenko":
        least: Floats = v @ np.linalg.pinv(matrix).T
        return least
    sparse: Floats = _sparse(v.reshape(-1, 3).T, matrix, CODE_LAM).T
    return sparse.reshape(*v.shape[:-1], 2)


# pixels


def normalise(pixels: Pixels, fit: StainFit, target: StainTarget | StainFit) -> Pixels:
    """Return pixels, uint8 (..., 3), in the colours of the target, rounded and held within 0 and 255.

    The concentrations stay, scaled so that their 99th percentiles are the target's; the vectors become the
    target's, and glass its glass. By Reinhard the colours are shifted and stretched.
    Raises StainError for fits of two methods.
    """
    into = target.fit if isinstance(target, StainTarget) else target
    _check_methods(fit, into)
    if fit.method == "reinhard":
        lab = (to_lab(pixels) - np.asarray(fit.mean)) / np.asarray(fit.std) * np.asarray(into.std) + np.asarray(
            into.mean
        )
        return _from_lab(lab)
    amounts = concentrations(od(pixels, fit.white), np.asarray(fit.matrix), fit.method)
    scaled = amounts * (np.asarray(into.p99) / np.asarray(fit.p99))
    return _levels(255 * np.exp(-(scaled @ np.asarray(into.matrix).T + _dark(into.white))))


def _check_methods(fit: StainFit, into: StainFit) -> None:
    if fit.method != into.method:
        raise StainError(f"The slide's fit is of {fit.method}, the target's of {into.method}.")


def _from_lab(lab: Floats) -> Pixels:
    f = (lab - _LAB_AT) @ np.linalg.inv(_LAB).T
    xyz = np.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787) * _WHITE
    rgb = np.clip(xyz @ np.linalg.inv(_XYZ).T, 0, 1)
    return _levels(255 * _encoded(rgb))


def _encoded(linear: Floats) -> Floats:
    found: Floats = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return found


def _levels(values: Floats) -> Pixels:
    found: Pixels = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return found


# what a machine without logarithms needs


OD_STEPS: Final = 8192
"""Entries of the table from optical density to grey levels for each unit; it ends where white ends and black begins."""

LIGHT_STEPS: Final = 65536
"""Entries of the tables of Reinhard's way to CIELAB and back, over 0 to 1."""


@lru_cache(maxsize=1)
def od_tables() -> tuple[npt.NDArray[np.float32], Pixels]:
    """Return optical density by grey level, float32 (256,), and grey level by optical density times OD_STEPS."""
    last = int(np.ceil(np.log(1024) * OD_STEPS))
    return _OD.astype(np.float32), _levels(255 * np.exp(-np.arange(last + 1) / OD_STEPS))


@lru_cache(maxsize=1)
def light_tables() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Pixels]:
    """Return linear light by grey level, CIELAB's f by light times LIGHT_STEPS, and grey level by the same."""
    t = np.arange(LIGHT_STEPS + 1) / LIGHT_STEPS
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return _LINEAR.astype(np.float32), f.astype(np.float32), _levels(255 * _encoded(t))


@lru_cache(maxsize=4096)
def coefficients(fit: StainFit, into: StainFit) -> tuple[float, ...]:
    """Return the numbers by which a pixel of `fit` becomes one of `into`, for `prepare.restain`.

    Vahadane: the 6 products with the slide's vectors, how alike these are (2), and the 6 of the target's vectors;
    Macenko: a 3 x 3 matrix of optical densities; after either the densities of the slide's glass and the target's, 3
    each. Reinhard: a matrix of CIELAB's f, and 3 offsets. Row by row.
    Raises StainError for fits of two methods.
    """
    _check_methods(fit, into)
    if fit.method == "reinhard":
        stretch = np.diag(np.asarray(into.std) / np.asarray(fit.std))
        back = np.linalg.inv(_LAB)
        shift = back @ (np.asarray(into.mean) - _LAB_AT - stretch @ (np.asarray(fit.mean) - _LAB_AT))
        return (*(back @ stretch @ _LAB).ravel().tolist(), *shift.tolist())
    matrix = np.asarray(fit.matrix)
    out = np.asarray(into.matrix) * (np.asarray(into.p99) / np.asarray(fit.p99))
    glasses = (*_dark(fit.white).tolist(), *_dark(into.white).tolist())
    if fit.method == "macenko":
        return (*(out @ np.linalg.pinv(matrix)).ravel().tolist(), *glasses)
    matrix = matrix / np.linalg.norm(matrix, axis=0)  # rounding
    alike = float(matrix[:, 0] @ matrix[:, 1])
    return (*matrix.T.ravel().tolist(), alike, 1 / (1 - alike**2), *out.ravel().tolist(), *glasses)


def light_matrices() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return from linear RGB to XYZ over white, and back, float32 (3, 3)."""
    there = _XYZ / _WHITE[:, None]
    return there.astype(np.float32), np.linalg.inv(there).astype(np.float32)


def nearest_median(fits: Sequence[StainFit]) -> int:
    """Return which fit is nearest the median of all, each number measured in its own spread; the first of equals.

    Glass does not count: it is the scanner's, and of one scanner differs by noise alone.
    """
    rows = np.array([_numbers(fit) for fit in fits])
    off = np.abs(rows - np.median(rows, axis=0))
    spread = np.median(off, axis=0)
    return int(np.argmin((off / np.where(spread > 0, spread, 1)).sum(axis=1).round(9)))


def _numbers(fit: StainFit) -> list[float]:
    dyes = [number for row in fit.matrix or () for number in row]
    return [*dyes, *(fit.p99 or ()), *(fit.mean or ()), *(fit.std or ())]

"""H&E phantoms with tumour and their truth.

A phantom is painted as two planes, the amounts of haematoxylin and eosin, which
a table turns into colours by Beer-Lambert's law with the stain vectors of Ruifrok and
Johnston (Anal. Quant. Cytol. Histol. 23 (2001) 291-299), varied per slide. Tumour is a
matter of nuclei, not of colour: larger, irregular, crowded ones, thinned out here and
there, against lymphoid aggregates (crowded but small) and glands (larger, but even).
The same seed makes the same bytes.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from slideflow_ray.errors import ConfigError
from slideflow_ray.phantoms.files import halved, in_processes, write_csv, write_pyramid
from slideflow_ray.phantoms.shapes import (
    Mask,
    Nucleus,
    Pixels,
    Plane,
    Random,
    Ring,
    depth_of,
    disk_at,
    draw_nucleus,
    fibre_texture,
    point_list,
    smooth_noise,
    tiled_over,
    wavy_ring,
)

COARSE: Final = 16
"""px0 per pixel of the plan, on which tissue, tumour and densities are laid out."""

HAEMATOXYLIN: Final = (0.65, 0.70, 0.29)
EOSIN: Final = (0.07, 0.99, 0.11)

INK: Final = {"blue": (0.25, 0.45, 0.85), "green": (0.25, 0.72, 0.40), "black": (0.16, 0.16, 0.17)}
"""What a marker lets through of red, green and blue."""

LEVELS: Final = 4
"""Pyramid levels, each half the size of the one before."""

SPLITS: Final = ("train", "val", "test")


@dataclass(frozen=True)
class Tumour:
    """One tumour region: its closed outline and, maybe, a closed hole, float64, shape (n, 2), (x, y) in px0."""

    outline: Ring
    hole: Ring | None = None


@dataclass(frozen=True)
class Truth:
    """What is where on a phantom. Masks are bool, shape (h, w), one pixel for each `px0_per_px` px0."""

    tissue: Mask
    pen: Mask
    tumours: tuple[Tumour, ...]
    px0_per_px: tuple[float, float]


@dataclass(frozen=True)
class _Plan:
    """The layout of a slide at COARSE: what nuclei are sown where (0 to 1), and how much eosin there is."""

    tissue: Plane
    fat: Plane
    eosin: Plane
    blur: Plane
    thick: Plane
    dye: Plane
    weave: Plane
    sown: dict[str, Plane]
    tumours: tuple[Tumour, ...]


NUCLEI: Final = {
    "stroma": Nucleus((4.0, 6.5), (1.3, 2.0), 0.04, (85, 212), 17.0),
    "gland": Nucleus((2.8, 4.4), (2.3, 3.7), 0.04, (85, 212), 9.5),
    "lymph": Nucleus((2.6, 3.3), (2.5, 3.1), 0.04, (85, 212), 7.5),
    "tumour": Nucleus((5.0, 8.4), (4.1, 7.0), 0.16, (85, 212), 17.6),
}


# one slide


def write_slide(
    path: str | Path,
    *,
    size_px0: tuple[int, int] = (4096, 3072),
    mpp0: float = 0.5,
    seed: int = 0,
    tumour: bool = True,
    pen: bool = True,
    quality: int = 85,
) -> Truth:
    """Write one H&E phantom as a tiled JPEG pyramid (levels 1, 2, 4, 8), and return its truth.

    `size_px0` is (width, height) of level 0 and `mpp0` its um per pixel, which goes into
    the resolution tags. Raises ConfigError when the slide is smaller than 512 px.
    """
    if min(size_px0) < 512 or not mpp0 > 0:
        raise ConfigError(f"A phantom of {size_px0[0]} x {size_px0[1]} px at {mpp0} um is too small; 512 px would do.")
    rng = np.random.default_rng([seed, 20261121])
    plan = _plan(rng, size_px0, mpp0, tumour)
    rgb = _paint(rng, plan, size_px0, mpp0)
    stroke = _draw_pen(rng, rgb, plan, mpp0) if pen else np.zeros(plan.tissue.shape, np.bool_)
    _sprinkle_dust(rng, rgb, mpp0)
    write_pyramid(Path(path), halved(rgb, LEVELS), mpp0, quality=quality)
    scale = (size_px0[0] / plan.tissue.shape[1], size_px0[1] / plan.tissue.shape[0])
    return Truth((plan.tissue > 0.5) | (plan.fat > 0.5), stroke, plan.tumours, scale)


def _plan(rng: Random, size_px0: tuple[int, int], mpp0: float, tumour: bool) -> _Plan:
    """Lay out one or two pieces of tissue, their fat, tumour, lymphoid aggregates and glands."""
    w, h = (-(-length // COARSE) for length in size_px0)
    tissue = _pieces(rng, (w, h))
    cell = 130.0 / (mpp0 * COARSE)
    fat = (smooth_noise(rng, (w, h), 3.0 * cell) > 1.9) & tissue
    tumours = _tumours(rng, tissue & ~fat, size_px0) if tumour else ()
    inside = _filled(tumours, (w, h))
    solid = tissue & ~fat
    lymph = _aggregates(rng, solid & ~inside, (w, h), cell)
    cells = np.clip(0.52 + 0.24 * smooth_noise(rng, (w, h), 1.2 * cell), 0.3, 1) * solid * (1 - lymph)
    spread = np.clip(0.55 + 0.25 * smooth_noise(rng, (w, h), 2 * cell), 0.15, 1)
    sown = {
        "stroma": spread * solid * (1 - 0.75 * cells) * (1 - lymph),
        "gland": cells * np.where(inside, 0.04, 0.96),
        "lymph": np.maximum(lymph, 0.04 * solid),
        "tumour": cells * np.where(inside, 0.96, 0.04),
    }
    thick = np.clip(1 + 0.2 * smooth_noise(rng, (w, h), 1.5 * cell), 0.5, 1.5)
    dye = np.clip(1 + 0.25 * smooth_noise(rng, (w, h), 1.2 * cell), 0.5, 1.5)
    weave = np.clip(1.2 + 0.7 * smooth_noise(rng, (w, h), 1.2 * cell), 0.2, 2.6)
    eosin = np.clip(0.58 + 0.13 * smooth_noise(rng, (w, h), 1.5 * cell), 0.25, 1) - 0.06 * (cells + lymph)
    blur = np.clip(0.07 + 0.04 * smooth_noise(rng, (w, h), 2 * cell) + 0.05 * (cells + lymph), 0, 1)
    kept = {name: np.asarray(field, np.float32) for name, field in sown.items()}
    return _Plan(
        tissue.astype(np.float32) * ~fat,
        fat.astype(np.float32),
        np.asarray(eosin, np.float32),
        np.asarray(blur, np.float32),
        np.asarray(thick, np.float32),
        np.asarray(dye, np.float32),
        np.asarray(weave, np.float32),
        kept,
        tumours,
    )


def _pieces(rng: Random, size: tuple[int, int]) -> Mask:
    """Return one or two lopsided pieces of tissue, away from the edge of the slide."""
    w, h = size
    centre = np.array([w * rng.uniform(0.42, 0.47), h * rng.uniform(0.46, 0.54)])
    image = Image.new("1", size)
    draw = ImageDraw.Draw(image)
    draw.polygon(point_list(_inside(centre + wavy_ring(rng, 0.38 * np.array([w, h]), 0.12), size)), fill=1)
    if rng.random() < 0.6:
        second = np.array([w * 0.87, h * rng.uniform(0.25, 0.75)])
        draw.polygon(point_list(_inside(second + wavy_ring(rng, np.array([0.08 * w, 0.17 * h]), 0.12), size)), fill=1)
    return np.asarray(image)


def _inside(ring: Ring, size: tuple[int, int]) -> Ring:
    """Return `ring` with its points drawn in to 3 % from the edge of the slide."""
    return np.clip(ring, 0.03 * np.array(size), 0.97 * np.array(size))


def _tumours(rng: Random, tissue: Mask, size_px0: tuple[int, int]) -> tuple[Tumour, ...]:
    """Return up to three tumours deep in the tissue, apart from each other; the first has a hole."""
    free = tissue.copy()
    found: list[Tumour] = []
    for number in range(int(rng.integers(3, 6))):
        depth = depth_of(free)
        reach = float(depth.max())
        if reach < 5:
            break
        places = np.argwhere((depth >= 0.1 * reach) & (depth <= 0.6 * reach))
        row, col = places[int(rng.integers(len(places)))]
        radius = reach * rng.uniform(0.7, 0.9)
        centre = np.array([col + 0.5, row + 0.5]) * COARSE
        outline = _within(tissue, centre, wavy_ring(rng, np.full(2, radius * COARSE), 0.13, 48))
        inner = min(0.3 * radius * COARSE, 0.5 * float(np.hypot(*(outline - centre).T).min()))
        hole = centre + wavy_ring(rng, np.full(2, inner), 0.08, 24) if number == 0 else None
        found.append(Tumour(*(_in_slide(ring, size_px0) if ring is not None else None for ring in (outline, hole))))  # type: ignore[arg-type]
        free &= ~disk_at(free.shape, (float(col), float(row)), 1.45 * radius)
    return tuple(found)


def _within(tissue: Mask, centre: Ring, ring: Ring) -> Ring:
    """Return `ring` around `centre` in px0, each of its points drawn in to the first border of tissue on its way."""
    steps = np.linspace(0, 1, 65)[:, None, None]
    way = np.clip(((centre + steps * ring) // COARSE).astype(np.int64), 0, np.array(tissue.shape[::-1]) - 1)
    on = np.logical_and.accumulate(tissue[way[..., 1], way[..., 0]], axis=0)
    return np.asarray(centre + ring * np.maximum(on.sum(axis=0) - 1, 1)[:, None] / 64)


def _in_slide(ring: Ring, size_px0: tuple[int, int]) -> Ring:
    return np.round(np.clip(ring, 0, size_px0), 1)


def _filled(tumours: tuple[Tumour, ...], size: tuple[int, int]) -> Mask:
    """Return where tumour is on the plan, bool, shape (h, w)."""
    image = Image.new("1", size)
    draw = ImageDraw.Draw(image)
    for tumour in tumours:
        draw.polygon(point_list(tumour.outline / COARSE), fill=1)
        if tumour.hole is not None:
            draw.polygon(point_list(tumour.hole / COARSE), fill=0)
    return np.asarray(image)


def _aggregates(rng: Random, where: Mask, size: tuple[int, int], cell: float) -> Plane:
    """Return soft round spots of lymphoid tissue, float32, shape (h, w), 0 to 1."""
    out = np.zeros((size[1], size[0]), np.float32)
    places = np.argwhere(where)
    y, x = np.ogrid[: size[1], : size[0]]
    area_mm2 = len(places) * (0.13 / cell) ** 2
    for _ in range(max(1, round(rng.uniform(1.5, 4) * area_mm2)) if len(places) else 0):
        row, col = places[int(rng.integers(len(places)))]
        radius = cell * rng.uniform(0.7, 1.9)
        distance = np.hypot(x - col, (y - row) * rng.uniform(0.8, 1.25))
        np.maximum(out, np.clip(2.2 * (1.15 - distance / radius), 0, 1), out=out)
    return out * where


# paint


def _paint(rng: Random, plan: _Plan, size_px0: tuple[int, int], mpp0: float) -> Pixels:
    """Return the slide's pixels, uint8, shape (h, w, 3)."""
    tissue = np.clip(2.5 * (_large(_soft(plan.tissue), size_px0) - 0.3), 0, 1)
    fibres = tiled_over(fibre_texture(rng, 512), size_px0)
    weave = _large(plan.weave, size_px0) * fibres
    eosin = (255 * _large(plan.eosin, size_px0) * tissue * (0.74 + 0.26 * weave)).clip(0, 255).astype(np.uint8)
    haem = (255 * _large(plan.blur, size_px0) * tissue * (0.8 + 0.35 * weave)).clip(0, 255).astype(np.uint8)
    _add_fat(rng, eosin, plan.fat, mpp0)
    for kind, field in plan.sown.items():
        _sow(rng, haem, NUCLEI[kind], field, mpp0)
    thick = _large(plan.thick, size_px0)
    eosin = np.minimum(eosin * thick, 255).astype(np.uint8)
    haem = np.minimum(haem * (thick * _large(plan.dye, size_px0)), 255).astype(np.uint8)
    colours = _colours(rng)
    rgb = colours[haem.astype(np.uint16) * 256 + eosin]
    noise = tiled_over(rng.integers(-3, 4, (509, 509, 3)).astype(np.int16), size_px0)
    return np.asarray(np.clip(rgb.astype(np.int16) + noise, 0, 255), np.uint8)


def _large(plane: Plane, size_px0: tuple[int, int]) -> Plane:
    """Return a plane of the plan at px0."""
    return np.asarray(Image.fromarray(plane).resize(size_px0, Image.Resampling.BILINEAR))


def _soft(plane: Plane) -> Plane:
    """Return `plane` with its borders blurred over about two pixels."""
    padded = np.pad(plane, 1)
    return np.asarray(
        sum(padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx] for dy, dx in _AROUND) / 9,
        np.float32,
    )


_AROUND: Final = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))


def _add_fat(rng: Random, eosin: Pixels, fat: Plane, mpp0: float) -> None:
    """Draw fat cells, thin pale rings around nothing, where the plan has fat."""
    h, w = eosin.shape
    places = _sites(rng, fat, 56.0 / mpp0, (w, h))
    if not len(places):
        return
    image = Image.new("L", (w, h))
    draw = ImageDraw.Draw(image)
    radii = rng.uniform(25, 36, (len(places), 2)) / mpp0
    for (x, y), (rx, ry) in zip(places, radii, strict=True):
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=14, outline=95, width=max(1, round(2.5 / mpp0)))
    np.maximum(eosin, np.asarray(image), out=eosin)


def _sites(rng: Random, field: Plane, spacing_px: float, size_px0: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Return points (x, y) in px0, int64, shape (n, 2), about `spacing_px` apart, kept with the field's probability."""
    w, h = size_px0
    x, y = np.meshgrid(np.arange(spacing_px / 2, w, spacing_px), np.arange(spacing_px / 2, h, spacing_px))
    points = np.column_stack([x.ravel(), y.ravel()])
    points += rng.uniform(-0.42, 0.42, points.shape) * spacing_px
    points = points[(points >= 0).all(axis=1) & (points < (w, h)).all(axis=1)]
    cell = (points // COARSE).astype(np.int64)
    chance = field[np.minimum(cell[:, 1], field.shape[0] - 1), np.minimum(cell[:, 0], field.shape[1] - 1)]
    return np.asarray(points[rng.random(len(points)) < chance], np.int64)


def _sow(rng: Random, haem: Pixels, kind: Nucleus, field: Plane, mpp0: float) -> None:
    """Stamp nuclei of one kind where `field` allows them; of two that overlap the darker shows."""
    h, w = haem.shape
    stamps = [draw_nucleus(rng, kind, mpp0) for _ in range(60)]
    half = stamps[0].shape[0] // 2
    sites = _sites(rng, field, kind.spacing_um / mpp0, (w, h))
    picks = rng.integers(len(stamps), size=len(sites))
    for (x, y), pick in zip(sites.tolist(), picks.tolist(), strict=True):
        top, left = y - half, x - half
        target = haem[max(top, 0) : top + 2 * half + 1, max(left, 0) : left + 2 * half + 1]
        stamp = stamps[pick][max(-top, 0) :, max(-left, 0) :][: target.shape[0], : target.shape[1]]
        np.maximum(target, stamp, out=target)


def _colours(rng: Random) -> Pixels:
    """Return a table, uint8, shape (65536, 3): the colour of haematoxylin * 256 + eosin on this slide."""
    stains = np.array([HAEMATOXYLIN, EOSIN]) * rng.uniform(0.89, 1.11, (2, 3))
    strength = np.array([1.05, 0.46]) * rng.uniform(0.82, 1.2, 2)
    white = rng.uniform(240, 247) + rng.uniform(-2, 2, 3)
    amount = np.stack(np.divmod(np.arange(65536), 256), axis=1) / 255 * strength
    return np.asarray(np.rint(white * 10 ** -(amount @ stains)), np.uint8)


def _draw_pen(rng: Random, rgb: Pixels, plan: _Plan, mpp0: float) -> Mask:
    """Draw a marker stroke on the glass of one corner; return where it is on the plan."""
    h, w = rgb.shape[:2]
    right, low = bool(rng.integers(2)), bool(rng.integers(2))
    x = w * (0.55 + 0.37 * rng.random(5)) if right else w * (0.08 + 0.37 * rng.random(5))
    y = np.linspace(0.02, 0.10, 5) * h
    y = h - y if low else y
    line = [(float(a), float(b)) for a, b in zip(np.sort(x), y, strict=True)]
    image = Image.new("L", (w, h))
    ImageDraw.Draw(image).line(line, fill=255, width=round(45 / mpp0), joint="curve")
    stroke = np.asarray(image) > 0
    ink = np.array(INK[str(rng.choice(sorted(INK)))]) * rng.uniform(0.85, 1.1)
    rows, cols = np.flatnonzero(stroke.any(axis=1)), np.flatnonzero(stroke.any(axis=0))
    box = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
    rgb[box] = np.where(stroke[box][..., None], (rgb[box] * ink).astype(np.uint8), rgb[box])
    coarse = np.asarray(image.resize(plan.tissue.shape[::-1], Image.Resampling.BOX))
    return coarse > 127


def _sprinkle_dust(rng: Random, rgb: Pixels, mpp0: float) -> None:
    """Draw grey specks, each far smaller than a piece of tissue."""
    h, w = rgb.shape[:2]
    for _ in range(18):
        radius = max(1, round(rng.uniform(2, 9) / mpp0))
        x, y = int(rng.integers(radius, w - radius)), int(rng.integers(radius, h - radius))
        spot = rgb[y - radius : y + radius + 1, x - radius : x + radius + 1]
        disk = disk_at(spot.shape, (radius, radius), radius * rng.uniform(0.7, 1.0))
        spot[disk] = (spot[disk] * rng.uniform(0.35, 0.7)).astype(np.uint8)


def geojson(tumours: tuple[Tumour, ...], seed: int = 0) -> dict[str, Any]:
    """Return a FeatureCollection as QuPath writes it, class "tumor", rings closed, (x, y) in px0."""
    return {"type": "FeatureCollection", "features": [_feature(t, seed, i) for i, t in enumerate(tumours)]}


def _feature(tumour: Tumour, seed: int, number: int) -> dict[str, Any]:
    rings = [tumour.outline] if tumour.hole is None else [tumour.outline, tumour.hole]
    return {
        "type": "Feature",
        "id": str(uuid.UUID(int=(seed << 16) + number, version=4)),
        "geometry": {"type": "Polygon", "coordinates": [ring.tolist() for ring in rings]},
        "properties": {"objectType": "annotation", "classification": {"name": "tumor", "color": [200, 0, 0]}},
    }


# a cohort


def write_cohort(
    folder: str | Path,
    *,
    slides: int = 12,
    seed: int = 0,
    size_px0: tuple[int, int] = (4096, 3072),
    mpp0: float = 0.5,
    workers: int = 0,
) -> Path:
    """Write phantoms with annotations and a cohort.csv split by patient; return the cohort's path.

    Every split has tumour and normal patients, of one or two slides each. `workers`
    processes write (0: one per core this process may use; 1: this process itself).
    Raises ConfigError for fewer than 9 slides.
    """
    folder = Path(folder)
    rows = cohort_rows(slides)
    jobs = [(str(folder), row, seed * 10_000 + n, size_px0, mpp0) for n, row in enumerate(rows)]
    in_processes(_write_row, jobs, workers)
    return write_csv(folder / "cohort.csv", rows)


def cohort_rows(slides: int) -> list[dict[str, str]]:
    """Return the rows of a cohort: patients alternate between tumour and normal inside each split.

    A fifth of the slides are second slides of a patient. From 14 slides on there are at
    least 5 test patients.

    >>> [row["split"] for row in cohort_rows(9)]
    ['train', 'train', 'train', 'train', 'val', 'val', 'test', 'test', 'test']
    """
    if slides < 9:
        raise ConfigError(f"A cohort of {slides} phantoms cannot fill three splits with both classes; 9 would do.")
    seconds = slides // 5
    patients = slides - seconds
    test = 3 if slides < 14 else max(5, round(0.3 * patients))
    val = 2 if slides < 14 else max(2, round(0.25 * patients))
    sizes = {"train": patients - val - test, "val": val, "test": test}
    extra = {"train": (seconds + 1) // 2, "val": 0, "test": seconds // 2}
    rows: list[dict[str, str]] = []
    patient = 0
    for split in SPLITS:
        for place in range(sizes[split]):
            patient += 1
            for _ in range(2 if place < extra[split] else 1):
                rows.append(_row(len(rows) + 1, patient, split, tumour=place % 2 == 0))
    return rows


def _row(number: int, patient: int, split: str, *, tumour: bool) -> dict[str, str]:
    name = f"phantom_{number:02d}"
    return {
        "slide_id": name,
        "uri": f"slides/{name}.tif",
        "patient_id": f"P{patient:02d}",
        "split": split,
        "label": "tumor" if tumour else "normal",
        "annotation": f"annotations/{name}.geojson",
    }


def _write_row(job: tuple[str, dict[str, str], int, tuple[int, int], float]) -> None:
    folder, row, seed, size_px0, mpp0 = job
    path = Path(folder, row["uri"])
    truth = write_slide(path, size_px0=size_px0, mpp0=mpp0, seed=seed, tumour=row["label"] == "tumor")
    notes = Path(folder, row["annotation"])
    notes.parent.mkdir(parents=True, exist_ok=True)
    notes.write_text(json.dumps(geojson(truth.tumours, seed)) + "\n")

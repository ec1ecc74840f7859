"""Kidney biopsies with their truth: slides with glomeruli of known kind, and crops of single ones.

Serial sections of a patient hold the same glomeruli. With the same seed scanner A and scanner B
see the same tissue in other colours.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw

from slideflow_ray.errors import ConfigError
from slideflow_ray.phantoms.cortex import COARSE, paint_cortex
from slideflow_ray.phantoms.files import Split, halved, in_processes, write_csv, write_pyramid
from slideflow_ray.phantoms.glomerulus import GLOBAL, KINDS, MIXED, Glomerulus, make_glomerulus
from slideflow_ray.phantoms.shapes import Mask, Pixels, Plane, Random, Ring, point_list, tiled_over, wavy_ring
from slideflow_ray.phantoms.stains import STAINS, Stain, colour_table

LEVELS: Final = 4
COLOURS: Final = {
    "Normal": (60, 160, 60),
    "MsPGN": (60, 90, 220),
    "FSG": (220, 140, 0),
    "CGN": (210, 30, 30),
    MIXED: (150, 60, 160),
    GLOBAL: (90, 90, 90),
}
DENSITY_PER_MM2: Final = 5.5
"""Glomeruli in a square millimetre of cortex."""


@dataclass(frozen=True)
class Layout:
    """A biopsy: its outline in px0 (closed ring, float64) and its glomeruli, for all of its sections."""

    size_px0: tuple[int, int]
    mpp0: float
    outline: Ring
    glomeruli: tuple[Glomerulus, ...]

    @property
    def seen(self) -> tuple[Glomerulus, ...]:
        """The glomeruli as the slide shows them: cut where the slide ends."""
        end = np.array(self.size_px0, np.float64)
        return tuple(
            Glomerulus(one.kind, one.xy_px0, np.round(np.clip(one.ring_px0, 0, end), 1)) for one in self.glomeruli
        )


# where what is


def lay_out(
    rng: Random,
    size_px0: tuple[int, int],
    mpp0: float,
    *,
    mixed: float = 0.0,
    sclerosed: float = 0.0,
    kinds: Sequence[str] = KINDS,
) -> Layout:
    """Lay out a biopsy that the slide's right edge cuts, with one glomerulus cut too and two that touch.

    Kinds are drawn evenly from `kinds`; `mixed` and `sclerosed` are the shares of glomeruli with
    two lesions (FSG+CGN) and of globally sclerosed ones (GS).
    """
    size = np.array(size_px0, np.float64)
    outline = np.array([0.56, 0.5]) * size + wavy_ring(rng, np.array([0.5, 0.44]) * size, 0.05, 96)
    outline = np.clip(outline, (0.04 * size[0], 0.05 * size[1]), (size[0] + 64, 0.95 * size[1]))
    inside = _mask(outline, size_px0) > 0.5
    number = max(4, round(DENSITY_PER_MM2 * inside.sum() * (COARSE * mpp0 / 1000) ** 2))
    placed: list[Glomerulus] = []
    for name in _names(rng, number, kinds, mixed, sclerosed):
        for _ in range(200):
            one = make_glomerulus(rng, name, _place(rng, placed, size, mpp0), mpp0)
            if len(placed) == 2:
                one = _beside(rng, placed[1], one)
            if _fits(one, placed, inside, 0 if len(placed) == 2 else 8 / mpp0, cut=not placed):
                placed.append(one)
                break
    return Layout(size_px0, mpp0, outline, tuple(placed))


def _names(rng: Random, number: int, kinds: Sequence[str], mixed: float, sclerosed: float) -> list[str]:
    """Return the kinds of `number` glomeruli, as evenly as they go, in random order."""
    others = [MIXED] * round(mixed * number) + [GLOBAL] * round(sclerosed * number)
    first = int(rng.integers(len(kinds)))
    names = others + [kinds[(first + i) % len(kinds)] for i in range(number - len(others))]
    return [names[i] for i in rng.permutation(number).tolist()]


def _place(rng: Random, placed: Sequence[Glomerulus], size: Ring, mpp0: float) -> tuple[float, float]:
    """Return a centre: the first on the right edge of the slide, the others anywhere."""
    if not placed:
        return float(size[0] - rng.uniform(15, 60) / mpp0), float(size[1] * rng.uniform(0.35, 0.65))
    return float(size[0] * rng.uniform(0.05, 0.97)), float(size[1] * rng.uniform(0.05, 0.95))


def _beside(rng: Random, one: Glomerulus, other: Glomerulus) -> Glomerulus:
    """Return `other` so moved that its capsule touches that of `one`."""
    angle = rng.uniform(-np.pi, np.pi)
    far = one.reach_px0(angle) + other.reach_px0(angle + np.pi) + 1
    xy = (one.xy_px0[0] + far * np.cos(angle), one.xy_px0[1] + far * np.sin(angle))
    return Glomerulus(other.kind, xy, np.asarray(other.ring_px0 - other.xy_px0 + np.array(xy)))


def _fits(one: Glomerulus, placed: Sequence[Glomerulus], inside: Mask, apart_px0: float, *, cut: bool) -> bool:
    """Whether a glomerulus lies in the tissue (or, cut, where the slide ends) and apart from all others."""
    at = np.floor(one.ring_px0 / COARSE).astype(np.int64)
    if cut:
        at = at[at[:, 0] < inside.shape[1]]
    if (at < 0).any() or (at >= inside.shape[::-1]).any() or not inside[at[:, 1], at[:, 0]].all():
        return False
    return all(_gap(one, other) >= apart_px0 for other in placed)


def _gap(one: Glomerulus, other: Glomerulus) -> float:
    """The px0 between two capsules, below 0 where they overlap."""
    x, y = np.subtract(other.xy_px0, one.xy_px0)
    angle = np.arctan2(y, x) + np.linspace(-0.6, 0.6, 13)
    rings = [_ring_at(one, angle), _ring_at(other, angle + np.pi)]
    along = np.array([np.cos(angle[6]), np.sin(angle[6])])
    return float((rings[1] @ along).min() - (rings[0] @ along).max())


def _ring_at(one: Glomerulus, angles: Ring) -> Ring:
    """Return the capsule in some directions, float64, shape (n, 2), in px0."""
    reach = np.array([one.reach_px0(angle) for angle in angles])
    return np.asarray(np.array(one.xy_px0) + reach[:, None] * np.column_stack([np.cos(angles), np.sin(angles)]))


def _mask(outline: Ring, size_px0: tuple[int, int]) -> Plane:
    """Return where tissue is, float32, one pixel for each COARSE px0."""
    image = Image.new("L", (-(-size_px0[0] // COARSE), -(-size_px0[1] // COARSE)))
    ImageDraw.Draw(image).polygon(point_list(outline / COARSE), fill=255)
    return np.asarray(np.asarray(image, np.float32) / np.float32(255), np.float32)


# pictures


def write_kidney_slide(
    path: str | Path, layout: Layout, *, stain: Stain = "he", scanner: str = "A", seed: int = 0, quality: int = 85
) -> tuple[Glomerulus, ...]:
    """Write one section of a biopsy as a tiled JPEG pyramid (levels 1, 2, 4, 8); return the glomeruli it shows.

    `seed` draws the section: its textures, thickness and colours. Raises ConfigError for an
    unknown stain or scanner.
    """
    table = colour_table(np.random.default_rng([seed, 7]), scanner, stain)
    rng = np.random.default_rng([seed, 20261122])
    planes = paint_cortex(
        rng, layout.size_px0, layout.glomeruli, stain, layout.mpp0, _mask(layout.outline, layout.size_px0)
    )
    write_pyramid(Path(path), halved(_coloured(rng, *planes, table), LEVELS), layout.mpp0, quality=quality)
    return layout.seen


def _coloured(rng: Random, nuclear: Pixels, other: Pixels, table: Pixels) -> Pixels:
    """Return the pixels of two planes of stain, with the camera's noise, uint8, shape (h, w, 3)."""
    rgb = table[nuclear.astype(np.uint16) * 256 + other]
    noise = tiled_over(rng.integers(-3, 4, (509, 509, 3)).astype(np.int16), nuclear.shape[::-1])
    return np.asarray(np.clip(rgb + noise, 0, 255), np.uint8)


def glomerulus_picture(
    kind: str, *, stain: Stain = "he", scanner: str = "A", seed: int = 0, slide: int = 0, side_px: int = 224
) -> Pixels:
    """Return one glomerulus with a tenth of its box around it, uint8, shape (side_px, side_px, 3).

    `slide` draws the colours of the slide that it comes from, `seed` all else. It is painted at
    0.5 um per pixel and then resized, as a model on objects sees it.
    """
    rng = np.random.default_rng([seed, 20261123])
    one = make_glomerulus(rng, kind, (0.0, 0.0), 0.5)
    side = int(np.ceil(1.2 * max(one.box_px0[2:])))
    left, top, w, h = one.box_px0
    shift = (side / 2 - left - w / 2 + rng.uniform(-8, 8), side / 2 - top - h / 2 + rng.uniform(-8, 8))
    one = Glomerulus(kind, shift, np.asarray(one.ring_px0 + np.array(shift)))
    table = colour_table(np.random.default_rng([slide, 7]), scanner, stain)
    rgb = _coloured(rng, *paint_cortex(rng, (side, side), [one], stain, 0.5), table)
    return np.asarray(Image.fromarray(rgb).resize((side_px, side_px), Image.Resampling.BILINEAR))


def kidney_geojson(glomeruli: Sequence[Glomerulus], seed: int = 0) -> dict[str, Any]:
    """Return a FeatureCollection as QuPath writes it, one polygon per glomerulus, its kind as the class."""
    return {"type": "FeatureCollection", "features": [_feature(one, seed, i) for i, one in enumerate(glomeruli)]}


def _feature(one: Glomerulus, seed: int, number: int) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": str(uuid.UUID(int=(seed << 16) + number, version=4)),
        "geometry": {"type": "Polygon", "coordinates": [np.round(one.ring_px0, 1).tolist()]},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": one.kind, "color": list(COLOURS[one.kind])},
        },
    }


# cohorts


def _check_kinds(kinds: Sequence[str]) -> None:
    """Raise ConfigError for what is no kind of glomerulus."""
    if not kinds or set(kinds) - set(COLOURS):
        raise ConfigError(f"{', '.join(kinds) or 'Nothing'}: the kinds of glomeruli are {', '.join(COLOURS)}.")


def kidney_splits(patients: int) -> list[Split]:
    """Return the split of each patient, 6:2:2.

    >>> kidney_splits(5)
    ['train', 'train', 'train', 'val', 'test']

    Raises ConfigError for fewer than 3 patients.
    """
    if patients < 3:
        raise ConfigError(f"{patients} patients cannot fill three splits; 3 would do, 10 make 6:2:2.")
    few = max(1, round(0.2 * patients))
    sizes: dict[Split, int] = {"train": patients - 2 * few, "val": few, "test": few}
    return [split for split, size in sizes.items() for _ in range(size)]


def write_kidney_cohort(
    folder: str | Path,
    *,
    patients: int = 10,
    slides_per_patient: int = 2,
    seed: int = 0,
    size_px0: tuple[int, int] = (6000, 4000),
    mpp0: float = 0.5,
    scanner: str = "A",
    mixed: float = 0.0,
    sclerosed: float = 0.0,
    kinds: Sequence[str] = KINDS,
    splits: Sequence[Split] = ("train", "val", "test"),
    workers: int = 0,
) -> Path:
    """Write serial sections of biopsies, HE and PAS in turn, with annotations; return the path of cohort.csv.

    Glomeruli are evenly of `kinds`, besides the shares of `mixed` and `sclerosed` ones.
    `scanner` is "A", "B", or "AB" for patients in turn. `counts.csv` beside the cohort says how
    many glomeruli of each kind a slide shows. Split 6:2:2 by patient; the patients of other splits than `splits`
    are left out, and the others stay as they are. `workers` processes write (0: one per core; 1: this one).
    """
    _check_kinds(kinds)
    folder = Path(folder)
    jobs = [
        _Slide(folder, _slide_row(patient, split, section, scanner), seed, size_px0, mpp0, mixed, sclerosed, kinds)
        for patient, split in enumerate(kidney_splits(patients))
        if split in splits
        for section in range(slides_per_patient)
    ]
    counts = in_processes(_write_section, jobs, workers)
    write_csv(folder / "counts.csv", [{**_about(job.row), **count} for job, count in zip(jobs, counts, strict=True)])
    return write_csv(folder / "cohort.csv", [job.row for job in jobs])


@dataclass(frozen=True)
class _Slide:
    """One slide to write, and how."""

    folder: Path
    row: dict[str, str]
    seed: int
    size_px0: tuple[int, int]
    mpp0: float
    mixed: float
    sclerosed: float
    kinds: Sequence[str] = KINDS


def _slide_row(patient: int, split: str, section: int, scanner: str) -> dict[str, str]:
    stain = STAINS[section % len(STAINS)]
    name = f"kidney_{patient + 1:03d}_{section + 1}_{stain}"
    return {
        "slide_id": name,
        "uri": f"slides/{name}.tif",
        "patient_id": f"K{patient + 1:03d}",
        "split": split,
        "stain": stain,
        "modality": stain,
        "scanner": scanner[patient % len(scanner)],
        "section": str(section + 1),
        "annotation": f"annotations/{name}.geojson",
    }


def _about(row: Mapping[str, str]) -> dict[str, str]:
    return {key: row[key] for key in ("slide_id", "patient_id", "stain", "section")}


def _write_section(job: _Slide) -> dict[str, int]:
    """Write one slide and its annotation; return how many glomeruli of each kind it shows."""
    patient, section = int(job.row["patient_id"][1:]), int(job.row["section"])
    rng = np.random.default_rng([job.seed, patient, 20261124])
    layout = lay_out(rng, job.size_px0, job.mpp0, mixed=job.mixed, sclerosed=job.sclerosed, kinds=job.kinds)
    seed = (job.seed * 1000 + patient) * 100 + section
    seen = write_kidney_slide(
        job.folder / job.row["uri"], layout, stain=_stain(job.row), scanner=job.row["scanner"], seed=seed
    )
    notes = job.folder / job.row["annotation"]
    notes.parent.mkdir(parents=True, exist_ok=True)
    notes.write_text(json.dumps(kidney_geojson(seen, seed)) + "\n")
    kinds = Counter(one.kind for one in seen)
    return {"glomeruli": len(seen), **{kind: kinds[kind] for kind in COLOURS}}


def _stain(row: Mapping[str, str]) -> Stain:
    return "he" if row["stain"] == "he" else "pas"


def write_glomeruli(
    folder: str | Path,
    *,
    patients: int = 20,
    per_patient: int = 32,
    seed: int = 0,
    scanner: str = "A",
    kinds: Sequence[str] = KINDS,
    side_px: int = 224,
    workers: int = 0,
) -> Path:
    """Write crops of single glomeruli, PNG, half HE and half PAS; return the path of cohort.csv.

    `label` is the kind; kinds come in turn, so every patient has all of them. `scanner` is "A", "B", or "AB" for
    patients in turn. Split 6:2:2 by patient.
    """
    _check_kinds(kinds)
    folder = Path(folder)
    jobs = [
        (folder, _crop_row(patient, split, number, scanner, kinds), seed, side_px)
        for patient, split in enumerate(kidney_splits(patients))
        for number in range(per_patient)
    ]
    in_processes(_write_crop, jobs, workers)
    return write_csv(folder / "cohort.csv", [row for _, row, _, _ in jobs])


def _crop_row(patient: int, split: str, number: int, scanner: str, kinds: Sequence[str]) -> dict[str, str]:
    stain = STAINS[number % len(STAINS)]
    name = f"K{patient + 1:03d}_{number + 1:03d}"
    return {
        "slide_id": name,
        "uri": f"crops/{name}.png",
        "patient_id": f"K{patient + 1:03d}",
        "split": split,
        "label": kinds[number // len(STAINS) % len(kinds)],
        "stain": stain,
        "modality": stain,
        "scanner": scanner[patient % len(scanner)],
    }


def _write_crop(job: tuple[Path, dict[str, str], int, int]) -> None:
    folder, row, seed, side_px = job
    patient, number = (int(part) for part in row["slide_id"][1:].split("_"))
    slide = (seed * 1000 + patient) * 100
    pixels = glomerulus_picture(
        row["label"],
        stain=_stain(row),
        scanner=row["scanner"],
        seed=slide * 1000 + number,
        slide=slide + STAINS.index(_stain(row)) + 1,
        side_px=side_px,
    )
    path = folder / row["uri"]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)

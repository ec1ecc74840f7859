"""Phantom electron micrographs of glomerular capillary walls, with masks, thickness and granules as truth.

A wall runs across the image: basement membrane, endothelium with fenestrae towards the lumen, foot processes of
podocytes towards the urinary space; beside it cytoplasm, nuclei, red cells, dirt. No micrograph of a
patient was used: what is learnt here says nothing about tissue.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import cKDTree

from slideflow_ray.objects import rings
from slideflow_ray.phantoms.files import Split, in_processes, write_csv

CLASSES = ("background", "membrane", "endothelium", "podocyte")
GRANULE, NO_GRANULE = "granule", "none"

Plane = npt.NDArray[np.float64]
Mask = npt.NDArray[np.uint8]
Rng = np.random.Generator

# Greys, 0 dark to 1 bright, as in published micrographs: cytoplasm of both cells alike, so that grey tells nothing.
LUMEN, URINARY, MEMBRANE, CYTOPLASM, NUCLEUS, RED_CELL = 0.80, 0.84, 0.52, 0.44, 0.40, 0.22
GRANULE_UM = (0.06, 0.16)
"""Radius of a granule."""


@dataclass(frozen=True)
class Micrograph:
    """A phantom and its truth.

    pixels : uint8, shape (h, w); mask : uint8, shape (h, w), indices of CLASSES
    thickness_nm : the membrane's thickness along its middle line, one value for each pixel of it that is in view
    granules_px : centre (x, y) and radius of each granule, float64, shape (n, 3)
    """

    pixels: Mask
    mask: Mask
    nm_per_px: float
    thickness_nm: Plane
    granules_px: Plane

    @property
    def label(self) -> str:
        """Whether there is a granule."""
        return GRANULE if len(self.granules_px) else NO_GRANULE


@dataclass(frozen=True)
class Microscope:
    """How grey values come out: brightness and contrast around the middle, gamma, noise (sd) and blur (px)."""

    brightness: float = 0.0
    contrast: float = 1.0
    gamma: float = 1.0
    noise: float = 0.05
    blur: float = 0.6


MICROSCOPES = (Microscope(), Microscope(0.06, 0.7, 1.25, 0.06, 0.9), Microscope(-0.05, 1.1, 0.8, 0.04, 0.5))


@dataclass(frozen=True)
class _Wall:
    """Signed distance to the wall's middle (um, podocytes above 0), way along it (um), and what depends on the way."""

    away: Plane
    along: Plane
    thickness: Plane


def draw_micrograph(
    seed: int | tuple[int, ...],
    size_px: tuple[int, int] = (512, 512),
    nm_per_px: float = 8.0,
    granules: int = 0,
    thickness_nm: float = 350.0,
    contrast: float = 1.0,
    microscope: Microscope = MICROSCOPES[0],
    apart: float = 0.0,
) -> Micrograph:
    """Draw a capillary wall; equal arguments give equal pixels.

    size_px : (width, height); granules : how many lie at the membrane; thickness_nm : the membrane's mean
    contrast : how dark granules are, from 0 (as the membrane) to 1
    apart : by how much podocytes are darker than endothelium, of greys from 0 to 1; not at all, as tissue is, at 0
    """
    rng = np.random.default_rng(seed)
    um = nm_per_px / 1000
    wall, mean = _wall(rng, size_px, um, thickness_nm / 1000)
    mask = np.zeros(wall.away.shape, np.uint8)
    grey = np.where(wall.away > 0, URINARY, LUMEN)
    grey = grey + np.where(wall.away > 0, 0.02, 0.05) * _rough(rng, size_px, 0.05 / um)
    _cells(rng, grey, mask, wall, um)
    for layer in (ENDOTHELIUM, PODOCYTES):
        _line(rng, grey, mask, wall, um, layer)
    grey[mask == PODOCYTES.index] -= apart
    inside = np.abs(wall.away) < wall.thickness / 2
    grey[inside] = MEMBRANE + 0.03 * _rough(rng, size_px, 0.03 / um)[inside]
    mask[inside] = 1
    found = _granules(rng, grey, wall, um, granules, contrast)
    _dirt(rng, grey, wall, um)
    return Micrograph(_exposed(rng, grey, microscope), mask, nm_per_px, mean, found)


def _wall(rng: Rng, size_px: tuple[int, int], um: float, thickness: float) -> tuple[_Wall, Plane]:
    """Lay the wall; return it, and its thickness in nm at each pixel of its middle line in view."""
    width, height = size_px
    longest = 1.5 * float(np.hypot(width, height)) * um
    angle = rng.uniform(0, 2 * np.pi)
    way = np.arange(-longest / 2, longest / 2, um / 2)
    shape = sum(a * np.sin(2 * np.pi * way / period + rng.uniform(0, 7)) for a, period in _waves(rng, longest))
    turned = np.stack([np.cos(angle) * way - np.sin(angle) * shape, np.sin(angle) * way + np.cos(angle) * shape])
    middle = np.array([width, height]) * um / 2 + rng.uniform(-0.15, 0.15, 2) * min(width, height) * um
    line = turned.T + middle
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    profile = thickness * (1 + 0.12 * _noise_1d(rng, along, 0.8) + 0.06 * _noise_1d(rng, along, 0.25))
    away, way_along = _nearest(line, along, size_px, um)
    wall = _Wall(away, way_along, np.interp(way_along, along, profile))
    view = ((line >= 0) & (line < np.array([width, height]) * um)).all(1)
    return wall, 1000 * profile[view]


def _nearest(line: Plane, along: Plane, size_px: tuple[int, int], um: float) -> tuple[Plane, Plane]:
    """Return for each pixel its signed distance to the line and the way along it, both (h, w) in um.

    Sought every 25 nm and interpolated between, as both are smooth but far from the line.
    """
    width, height = size_px
    cell = max(1, int(0.025 / um))
    y, x = np.mgrid[: height // cell + 2, : width // cell + 2]
    places = (np.stack([x.ravel(), y.ravel()], 1) + 0.5) * cell * um
    distance, nearest = cKDTree(line).query(places)
    step, off = np.gradient(line, axis=0)[nearest], places - line[nearest]
    left = step[:, 0] * off[:, 1] - step[:, 1] * off[:, 0] < 0
    planes = (np.where(left, -distance, distance), along[nearest])
    rows, cols = ((np.arange(n) + 0.5) / cell - 0.5 for n in (height, width))
    return tuple(_interpolated(plane.reshape(x.shape), rows, cols) for plane in planes)  # type: ignore[return-value]


def _interpolated(plane: Plane, rows: Plane, cols: Plane) -> Plane:
    """Return `plane` at fractional rows and columns, linearly."""
    at = np.clip(rows, 0, plane.shape[0] - 1)
    low = np.minimum(at.astype(int), plane.shape[0] - 2)
    part = (at - low)[:, None]
    tall = plane[low] * (1 - part) + plane[low + 1] * part
    at = np.clip(cols, 0, plane.shape[1] - 1)
    low = np.minimum(at.astype(int), plane.shape[1] - 2)
    part = (at - low)[None]
    wide: Plane = tall[:, low] * (1 - part) + tall[:, low + 1] * part
    return wide


def _waves(rng: Rng, longest: float) -> list[tuple[float, float]]:
    """Amplitude and period (um) of the wall's waves: slopes stay below 1, so that its sides do not meet."""
    periods = rng.uniform(3.0, 7.0, 2)
    return [(float(rng.uniform(0.03, 0.07)) * float(p), float(p)) for p in periods if p < 4 * longest]


def _noise_1d(rng: Rng, along: Plane, cell: float) -> Plane:
    """Smooth noise along a line, about -1 to 1, with values drawn every `cell` um."""
    knots = np.arange(along[0], along[-1] + 2 * cell, cell)
    values: Plane = np.interp(along, knots, rng.uniform(-1, 1, len(knots)))
    smooth: Plane = ndimage.gaussian_filter1d(values, max(1.0, 0.2 * cell / max(1e-6, along[1] - along[0])))
    return smooth


def _rough(rng: Rng, size_px: tuple[int, int], cell_px: float) -> Plane:
    """Noise with a grain of about `cell_px`, mean 0 and deviation 1."""
    width, height = size_px
    factor = max(1, int(cell_px / 2))
    small = rng.standard_normal((height // factor + 3, width // factor + 3))
    soft = ndimage.gaussian_filter(small, max(0.5, cell_px / factor / 2))
    plane = ndimage.zoom(soft, factor, order=1)[:height, :width] if factor > 1 else soft[:height, :width]
    return (plane - plane.mean()) / max(1e-9, float(plane.std()))


def _cytoplasm(rng: Rng, shape: tuple[int, ...], um: float) -> Plane:
    size = (shape[1], shape[0])
    return CYTOPLASM + 0.05 * _rough(rng, size, 0.06 / um) + 0.05 * _rough(rng, size, 0.3 / um)


def _spans(rng: Rng, end: float, least: float, most: float, gap: tuple[float, float]) -> Iterator[tuple[float, float]]:
    """Stretches of a line with gaps between them."""
    at = -float(rng.uniform(0, most))
    while at < end:
        size = float(rng.uniform(least, most))
        yield at, at + size
        at += size + float(rng.uniform(*gap))


@dataclass(frozen=True)
class _Layer:
    """Cells on one side of the membrane: class and side, how long and high its pieces are, gaps and corners (um)."""

    index: int
    side: int
    long: tuple[float, float]
    gap: tuple[float, float]
    high: tuple[float, float]
    corner: int


ENDOTHELIUM = _Layer(2, -1, (0.25, 1.0), (0.05, 0.09), (0.09, 0.2), 6)
"""A thin layer towards the lumen, with fenestrae."""
PODOCYTES = _Layer(3, 1, (0.25, 0.6), (0.03, 0.05), (0.2, 0.4), 4)
"""Foot processes, as wide as they are high, with slits between them."""


def _line(rng: Rng, grey: Plane, mask: Mask, wall: _Wall, um: float, layer: _Layer) -> None:
    """Line one side of the membrane with cells."""
    height = np.zeros_like(wall.away)
    for start, stop in _spans(rng, float(wall.along.max()), *layer.long, layer.gap):
        middle, half = (start + stop) / 2, (stop - start) / 2
        near = np.abs(wall.along - middle) < half
        dome = np.sqrt(np.clip(1 - ((wall.along[near] - middle) / half) ** layer.corner, 0, 1))
        height[near] = float(rng.uniform(*layer.high)) * dome
    away = layer.side * wall.away - wall.thickness / 2
    inside = (away >= 0) & (away < height)
    grey[inside] = _cytoplasm(rng, grey.shape, um)[inside]
    grey[inside & (away > height - 1.5 * um)] -= 0.12
    mask[inside] = layer.index


def _cells(rng: Rng, grey: Plane, mask: Mask, wall: _Wall, um: float) -> None:
    """Far from the wall: a podocyte's body on its side, an endothelial cell's or a red cell on the other."""
    body = wall.away - wall.thickness / 2 - 0.9 - 0.15 * _rough(rng, grey.shape[::-1], 0.8 / um)
    if rng.random() < 0.7:
        inside = body > 0
        grey[inside] = _cytoplasm(rng, grey.shape, um)[inside]
        mask[inside] = 3
        _nucleus(rng, grey, body - 0.5, um)
    other = -wall.away - wall.thickness / 2 - 0.8 - 0.15 * _rough(rng, grey.shape[::-1], 0.8 / um)
    chance = rng.random()
    if chance < 0.3:
        inside = other > 0
        grey[inside] = _cytoplasm(rng, grey.shape, um)[inside]
        mask[inside] = 2
        _nucleus(rng, grey, other - 0.5, um)
    elif chance < 0.65:
        inside = other > 0.1
        grey[inside] = RED_CELL + 0.01 * _rough(rng, grey.shape[::-1], 0.1 / um)[inside]


def _nucleus(rng: Rng, grey: Plane, depth: Plane, um: float) -> None:
    inside = depth > 0
    grey[inside] = (NUCLEUS + 0.09 * _rough(rng, grey.shape[::-1], 0.4 / um))[inside]
    grey[inside & (depth < 2 * um)] -= 0.1


def _granules(rng: Rng, grey: Plane, wall: _Wall, um: float, count: int, contrast: float) -> Plane:
    """Dark, soft-edged grains at the membrane: in it, or at either side of it."""
    found: list[tuple[float, float, float]] = []
    near = np.argwhere(np.abs(wall.away) < wall.thickness / 2 + 0.02)
    near = near[(near > 0.1 / um).all(1) & (near < np.array(grey.shape) - 0.1 / um).all(1)]
    for _ in range(count if len(near) else 0):
        row, col = near[rng.integers(len(near))]
        radius = float(rng.uniform(*GRANULE_UM)) / um
        _spot(rng, grey, (int(row), int(col)), radius, MEMBRANE - (MEMBRANE - 0.24) * contrast, 0.15)
        found.append((col + 0.5, row + 0.5, radius))
    return np.array(found, np.float64).reshape(-1, 3)


def _spot(rng: Rng, grey: Plane, at: tuple[int, int], radius: float, dark: float, ragged: float) -> None:
    """Draw a grain whose outline departs from a circle by about `ragged` of its radius."""
    reach = int(radius * (1 + 2 * ragged)) + 3
    top, left = max(0, at[0] - reach), max(0, at[1] - reach)
    window = grey[top : at[0] + reach + 1, left : at[1] + reach + 1]
    y, x = np.mgrid[top : top + window.shape[0], left : left + window.shape[1]]
    angle = np.arctan2(y - at[0], x - at[1])
    phases = rng.uniform(0, 7, 2)
    edge = radius * (1 + ragged * (np.sin(2 * angle + phases[0]) + np.sin(3 * angle + phases[1])) / 1.5)
    weight = np.clip((edge - np.hypot(y - at[0], x - at[1])) / 1.5 + 0.5, 0, 1)
    tone = dark + 0.03 * rng.standard_normal(window.shape)
    window[:] = window * (1 - weight) + tone * weight


def _dirt(rng: Rng, grey: Plane, wall: _Wall, um: float) -> None:
    """Stain precipitate and lysosomes: as dark as granules, in every image, but away from the membrane."""
    far = np.argwhere(np.abs(wall.away) > wall.thickness / 2 + 0.35)
    area = grey.size * um * um
    for _ in range(rng.poisson(0.12 * area) if len(far) else 0):
        row, col = far[rng.integers(len(far))]
        _spot(rng, grey, (int(row), int(col)), float(rng.uniform(*GRANULE_UM)) / um, 0.24, 0.15)


def _exposed(rng: Rng, grey: Plane, microscope: Microscope) -> Mask:
    """What the camera gives: blur, uneven light, contrast, noise."""
    soft = ndimage.gaussian_filter(grey, microscope.blur) if microscope.blur else grey
    h, w = soft.shape
    tilt = rng.uniform(-0.04, 0.04, 2)
    light = tilt[0] * np.linspace(-1, 1, h)[:, None] + tilt[1] * np.linspace(-1, 1, w)[None]
    drift = rng.normal(0, 0.02)
    tone = 0.5 + microscope.contrast * (soft + light - 0.5) + microscope.brightness + drift
    tone = np.clip(tone, 0, 1) ** microscope.gamma + microscope.noise * rng.standard_normal(soft.shape)
    pixels: Mask = np.rint(255 * np.clip(tone, 0, 1)).astype(np.uint8)
    return pixels


# on disk


def geojson(mask: Mask, classes: tuple[str, ...] = CLASSES) -> dict[str, Any]:
    """Return the mask's regions as QuPath's GeoJSON: a polygon for each component, with holes, in pixels."""
    features = []
    for index, name in enumerate(classes[1:], 1):
        labels, _ = ndimage.label(mask == index)
        for number, window in enumerate(ndimage.find_objects(labels), 1):
            if window is None:
                continue
            piece = labels[window] == number
            offset = np.array([window[1].start, window[0].start])
            coordinates = [[*(ring + offset).tolist(), (ring[0] + offset).tolist()] for ring in rings(piece)]
            features.append(
                {
                    "type": "Feature",
                    "geometry": {"type": "Polygon", "coordinates": coordinates},
                    "properties": {"objectType": "annotation", "classification": {"name": name}},
                }
            )
    return {"type": "FeatureCollection", "features": features}


def write_tem_cohort(
    folder: str | Path,
    patients: int = 20,
    images: int = 4,
    size_px: tuple[int, int] = (512, 512),
    nm_per_px: float = 8.0,
    seed: int = 0,
    contrast: tuple[float, float] = (0.7, 1.0),
    workers: int = 0,
    apart: float = 0.0,
) -> Path:
    """Write micrographs with their truth; return cohort.csv.

    Half of the patients have granules (in every image of theirs, in varying number), split 6:2:2 by patient, each
    patient with a membrane of its own thickness and one of three microscopes. contrast : the range that the granules'
    contrast is drawn from, image by image; apart : see `draw_micrograph`. Beside each image lie its mask as GeoJSON
    and NAME.truth.json: mean and harmonic mean thickness in nm, granules and their contrast.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        _Job(folder, seed, patient, number, _split(patient, patients), size_px, nm_per_px, contrast, apart)
        for patient in range(patients)
        for number in range(images)
    ]
    return write_csv(folder / "cohort.csv", in_processes(_write, jobs, workers))


@dataclass(frozen=True)
class _Job:
    folder: Path
    seed: int
    patient: int
    number: int
    split: Split
    size_px: tuple[int, int]
    nm_per_px: float
    contrast: tuple[float, float]
    apart: float


def _split(patient: int, patients: int) -> Split:
    """6:2:2 in blocks of ten; fewer patients keep one of each side."""
    place = patient // 2 % 5 if patients >= 10 else min(patient // 2, 2) + 2  # pairs: with granules and without
    splits: tuple[Split, ...] = ("train", "train", "train", "val", "test")
    return splits[place]


def _write(job: _Job) -> dict[str, Any]:
    """Draw and write one micrograph of a patient; return its row of the cohort."""
    patient = np.random.default_rng([job.seed, job.patient, 7])
    thickness = float(patient.uniform(260, 480))
    rng = np.random.default_rng([job.seed, job.patient, job.number, 7])
    scope = job.patient // 2 % len(MICROSCOPES)
    count = 1 + int(rng.poisson(1.5)) if job.patient % 2 else 0
    at = (job.seed, job.patient, job.number)
    contrast = float(rng.uniform(*job.contrast))
    drawn = draw_micrograph(at, job.size_px, job.nm_per_px, count, thickness, contrast, MICROSCOPES[scope], job.apart)
    name = f"tem-{job.patient:03}-{job.number:02}"
    _write_files(job.folder / name, drawn, contrast)
    return {
        "slide_id": name,
        "uri": f"{name}.tif",
        "patient_id": f"p{job.patient:03}",
        "split": job.split,
        "label": drawn.label,
        "annotation": f"{name}.geojson",
        "mpp": drawn.nm_per_px / 1000,
        "modality": "tem",
        "scanner": f"microscope-{scope}",
    }


def _write_files(path: Path, drawn: Micrograph, contrast: float) -> None:
    import tifffile

    per_cm = 1e7 / drawn.nm_per_px
    how: dict[str, Any] = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path.with_suffix(".tif"), drawn.pixels, software=False, metadata=None, **how)
    path.with_suffix(".geojson").write_text(json.dumps(geojson(drawn.mask)), encoding="utf-8")
    truth = {
        "thickness_nm": float(drawn.thickness_nm.mean()) if drawn.thickness_nm.size else None,
        "harmonic_nm": float(1 / (1 / drawn.thickness_nm).mean()) if drawn.thickness_nm.size else None,
        "granules_px": drawn.granules_px.round(2).tolist(),
        "contrast": round(contrast, 3) if len(drawn.granules_px) else None,
    }
    path.with_suffix(".truth.json").write_text(json.dumps(truth) + "\n", encoding="utf-8")

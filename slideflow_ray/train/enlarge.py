"""Synthetic images beside the originals, written once: turned, noisy, and mixed with one of their class and stain.

Source 001 enlarged 2,658 crops to 13,471, about four synthetic images for each (METHODS); it did so before it split
them. Here the training split alone is enlarged, unless that very mistake is to be reproduced.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from slideflow_ray import storage
from slideflow_ray.cohort import Item, check_unique
from slideflow_ray.identity import identity
from slideflow_ray.packs import Row, read_image
from slideflow_ray.specs import WholeSpec, digest
from slideflow_ray.stain import stain_name
from slideflow_ray.store import folder_name
from slideflow_ray.train.augment import seed_of

METHOD = 1
"""Part of the digest of enlarged images: changed when the rules below make others."""

KINDS = ("rotation", "noise", "mixup", "rotation and noise")
"""What the first, second, third and fourth copy of an image are, and then again."""

TILT_DEG = 30.0
SIGMA = (5.0, 15.0)
ALPHA = 0.4

Pixels = npt.NDArray[np.uint8]


def enlarge(items: Sequence[Item], times: int, folder: Path, whole: WholeSpec, seed: int) -> list[Item]:
    """Write `times` images for each labelled one below `folder`; return their rows of the cohort, not the originals'.

    A copy is a PNG of `whole.tile_px`, has its original's patient, label, stain and split, names its file in the column
    `original`, and is called ORIGINAL~1, ORIGINAL~2, ... Mixing is with another image of the same label, split and
    stain (which the modality tells where the column `stain` is empty). The same images,
    settings and seed give the same bytes, which are written once. Raises SlideError for an image that cannot be read,
    CohortError where a name is taken.
    """
    items = [item for item in items if item.label]
    known = {item.slide_id: identity(item.uri) for item in items}
    rows = [[i.slide_id, known[i.slide_id], *_kind(i)] for i in items]
    place = folder / digest([METHOD, rows, times, whole.model_dump(), seed])
    alike: dict[tuple[str | None, ...], list[Item]] = {}
    for item in items:
        alike.setdefault(_kind(item), []).append(item)
    copies: list[Item] = []
    for item in items:
        for k in range(times):
            path = place / f"{folder_name(item.slide_id)}~{k + 1}.png"
            if not path.exists():
                _write(path, _copy(item, k, alike[_kind(item)], known, whole, seed))
            copies.append(_row(item, k, path))
    check_unique([*items, *copies])
    return copies


def _kind(item: Item) -> tuple[str | None, ...]:
    return item.label, stain_name(item.stain, item.modality), item.split


def _row(item: Item, k: int, path: Path) -> Item:
    changed = {"slide_id": f"{item.slide_id}~{k + 1}", "uri": str(path.absolute()), "patient_id": item.patient}
    return item.model_copy(update={**changed, "original": item.uri, "sha256": None, "annotation": None, "mask": None})


def _copy(item: Item, k: int, alike: Sequence[Item], known: Mapping[str, str], whole: WholeSpec, seed: int) -> Pixels:
    rng = np.random.default_rng(seed_of(seed, k, item.slide_id))
    pixels = read_image(Row(item, known[item.slide_id]), whole)
    kind = KINDS[k % len(KINDS)]
    others = [other for other in alike if other.slide_id != item.slide_id]
    if kind == "mixup" and others:
        other = others[int(rng.integers(len(others)))]
        both = np.stack([pixels, read_image(Row(other, known[other.slide_id]), whole)])
        return mixed(both, rng)
    if "rotation" in kind or kind == "mixup":  # one that is alone of its kind is turned
        pixels = turned(pixels, rng)
    return grainy(pixels, rng) if "noise" in kind else pixels


def turned(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Return an image turned by a quarter, half or three quarters and up to 30 degrees more, mirrored at its edge."""
    angle = 90.0 * int(rng.integers(1, 4)) + float(rng.uniform(-TILT_DEG, TILT_DEG))
    out: Pixels = ndimage.rotate(pixels, angle, axes=(1, 0), reshape=False, order=1, mode="mirror")
    return out


def grainy(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Return an image with Gaussian noise of a standard deviation from 5 to 15 (of 255)."""
    noise = rng.normal(0, rng.uniform(*SIGMA), pixels.shape)
    return np.rint(pixels + noise).clip(0, 255).astype(np.uint8)


def mixed(both: Pixels, rng: np.random.Generator) -> Pixels:
    """Return l x + (1 - l) y of two images, uint8 (2, T, T, 3), with l from Beta(0.4, 0.4)."""
    share = rng.beta(ALPHA, ALPHA)
    out: Pixels = np.rint(share * both[0] + (1 - share) * both[1]).astype(np.uint8)
    return out


def _write(path: Path, pixels: Pixels) -> None:
    text = io.BytesIO()
    Image.fromarray(pixels).save(text, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(path, text.getvalue())

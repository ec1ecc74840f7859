"""The stains of slides and packs: fitted once, from tiles of tissue spread over the slide, kept as nodes.

A fit belongs to a slide (or to crops of one patient, stain and scanner, which were stained together), not to a model:
models of any tile size share it, and the stored tiles stay raw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from slideflow_ray.cohort import Item
from slideflow_ray.errors import SlideflowError, StainError
from slideflow_ray.focus import SAMPLE, SAMPLE_MPP, SAMPLE_PX, sample
from slideflow_ray.layout import pixels_of
from slideflow_ray.packs import GONE, Pack, Row, read_image
from slideflow_ray.slides import SlideReader
from slideflow_ray.specs import WholeSpec, digest
from slideflow_ray.stain import VERSION, Method, StainFit, fit_tiles, stain_name
from slideflow_ray.store import SlideStore
from slideflow_ray.tissue import TissueMask

CROP = WholeSpec(tile_px=256, fit="squash")
"""How crops are read for a fit, whatever the models on them want."""

FitError = dict[str, Any]
Want = tuple[Method, float]
"""A method, and the L1 weight that only Vahadane's has."""


def determines(stain: str, method: Method, lam: float) -> dict[str, Any]:
    """Return what determines a fit besides the pixels."""
    weight = {"lam": lam} if method == "vahadane" else {}
    return {"stain": stain, "method": method, **weight, "fit": VERSION, "sample": [SAMPLE, SAMPLE_PX, SAMPLE_MPP]}


def slide_fits(
    store: SlideStore,
    item: Item,
    want: tuple[Method, float],
    about: Mapping[str, Any],
    tissue: tuple[str, TissueMask],
    reader: SlideReader,
) -> str:
    """Fit a slide's stains on up to 16 tiles of its tissue, or find them fitted; return their node.

    Raises StainError (too little tissue, one dye), ReadError.
    """
    method, lam = want
    stain = stain_name(item.stain, item.modality)
    of = {**pixels_of(about), "tissue": tissue[0], **determines(stain, method, lam)}
    node = f"stains/{method}-{digest(of)}"
    if store.committed(node):
        return node
    tiles = sample(reader, tissue[1])
    try:
        fit = fit_tiles(list(tiles), method, lam, stain)
    except StainError as error:
        raise StainError(f"{item.slide_id}: {error.message}") from error
    _keep(store, node, {"determines": of, "stain": stain, "fits": [_json(fit)], "of": [0]})
    return node


def pack_fits(store: SlideStore, pack: Pack, want: tuple[Method, float]) -> str:
    """Fit the stains of a pack, one fit for the images of one patient, stain and scanner; return the fits' node.

    An image without a patient is a group of its own. Of each group up to 16 images are read, evenly spread; those
    that cannot be are left out. Of a synthetic copy its original is read: noise and mixing are no stain of the slide.
    A group whose stains cannot be told has the error in place of a fit.
    """
    method, lam = want
    stain = stain_name(pack.example.stain, pack.example.modality)
    groups = _groups(pack.rows)
    of = {"identity": pack.identity, "groups": groups, **determines(stain, method, lam)}
    node = f"stains/{method}-{digest(of)}"
    if any(row.item.original for row in pack.rows):
        of["originals"] = True
        node = f"stains/{method}-{digest(of)}"
    if -1 in groups:
        node = _earlier(store, of) or node
    if store.committed(node):
        return node
    fits = [_fit_group([pack.rows[i] for i, g in enumerate(groups) if g == k], want, stain) for k in _numbers(groups)]
    _keep(store, node, {"determines": of, "stain": stain, "fits": fits, "of": groups})
    return node


def _earlier(store: SlideStore, of: Mapping[str, Any]) -> str | None:
    """The fits of the same groups when those images that are gone were there: the others keep what they have."""
    for node in store.nodes("stains"):
        before = store.node_attrs(node)["determines"]
        pairs = {(old, new) for old, new in zip(before["groups"], of["groups"], strict=True) if new >= 0}
        alike = all(old >= 0 for old, _ in pairs) and all(len({p[i] for p in pairs}) == len(pairs) for i in (0, 1))
        if alike and {**before, "groups": 0} == {**of, "groups": 0}:
            return node
    return None


def _numbers(groups: Sequence[int]) -> range:
    return range(max(groups, default=-1) + 1)


def _groups(rows: Sequence[Row]) -> list[int]:
    """The number of each row's group, by first appearance; -1 for images that are gone."""
    numbers: dict[tuple[str | None, ...], int] = {}
    found = []
    for row in rows:
        item = row.item
        key = (item.patient, stain_name(item.stain, item.modality), item.scanner)
        found.append(-1 if item.uri == GONE else numbers.setdefault(key, len(numbers)))
    return found


def _originals(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the original in place of a copy's file; each original once."""
    if not any(row.item.original for row in rows):
        return list(rows)
    files = {row.item.original or row.item.uri: row for row in rows}
    return [Row(row.item.model_copy(update={"uri": uri}), row.identity) for uri, row in files.items()]


def _fit_group(rows: Sequence[Row], want: tuple[Method, float], stain: str) -> dict[str, Any]:
    rows = _originals(rows)
    picked = np.unique(((np.arange(SAMPLE) + 0.5) * len(rows) / SAMPLE).astype(np.int64))
    tiles, last = [], None
    for i in picked.tolist():
        try:
            tiles.append(read_image(rows[i], CROP))
        except (SlideflowError, OSError) as error:
            last = error
    try:
        if not tiles:
            raise StainError(f"None of its images can be read: {last}")
        return _json(fit_tiles(tiles, want[0], want[1], stain))
    except StainError as error:
        about = rows[0].item
        whose = f"{len(rows)} images of {about.patient_id}" if about.patient_id else about.slide_id
        message = f"{whose}, {stain}: {error.message}"
        return {"status": "failed", "code": error.code, "message": message, "next_step": error.step}


def _json(fit: StainFit) -> dict[str, Any]:
    return fit.model_dump(mode="json", exclude_none=True)


def _keep(store: SlideStore, node: str, attributes: Mapping[str, Any]) -> None:
    store.make_group(node, attributes)
    store.commit(node)


@dataclass(frozen=True)
class Fits:
    """What a committed node holds: the stain, and for a slide one fit; for a pack one a row, or why there is none."""

    stain: str
    rows: tuple[StainFit | FitError | None, ...]

    @property
    def broken(self) -> dict[int, FitError]:
        """Why rows have no fit."""
        return {row: fit for row, fit in enumerate(self.rows) if isinstance(fit, dict)}


@lru_cache(maxsize=256)
def read_fits(out: str, slide_id: str, node: str) -> Fits:
    """Return what a node of fits holds. Raises StoreError, CorruptStore."""
    about = SlideStore(out, slide_id).node_attrs(node)
    fits = [fit if "code" in fit else StainFit.parse(fit, node) for fit in about["fits"]]
    return Fits(about["stain"], tuple(fits[i] if i >= 0 else None for i in about["of"]))

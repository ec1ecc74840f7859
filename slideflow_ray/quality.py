"""Quality figures of what a run has looked at: tissue, and how sharp its tiles are; read from the stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slideflow_ray.errors import SlideflowError
from slideflow_ray.store import SlideStore

BLURRED = 0.5
"""A tile counts as blurred below this share of the cohort's median focus at the same scale."""


@dataclass(frozen=True)
class Quality:
    """One slide on one grid.

    tissue_mm2, tissue_share : area of the tissue, and its share of the slide. focus : the slide's own, at a scale
    that all slides share. stain : mean optical density of what is stained, in red, green and blue.
    tile_focus : 5th percentile, median and 95th percentile of its tiles'. blurred : share of its tiles
    below BLURRED of the cohort's median; reason : why nothing is left, if nothing is.
    """

    slide_id: str
    grid: str
    tiles: int
    tissue_mm2: float
    tissue_share: float
    focus: float | None
    stain: tuple[float, float, float] | None
    tile_focus: tuple[float, float, float] | None
    blurred: float | None
    reason: str


def read_quality(out: Path, outcomes: Mapping[str, Mapping[str, Any]], limit: int = 2000) -> list[Quality]:
    """Return the quality of the first `limit` slides that are done, by regular grid, but for what is unreadable."""
    found: list[tuple[Quality, npt.NDArray[np.float32]]] = []
    for slide_id, outcome in list(outcomes.items())[:limit]:
        if outcome["status"] == "done":
            store = SlideStore(out, slide_id)
            for grid in outcome["laid"]:
                try:
                    found += _of(store, grid)
                except (SlideflowError, OSError, KeyError):
                    continue
    return _compared(found)


def _of(store: SlideStore, grid: str) -> list[tuple[Quality, npt.NDArray[np.float32]]]:
    about = store.node_attrs(f"grids/{grid}")
    node = about["determines"].get("tissue")
    if node is None:
        return []  # images in one piece, and objects
    tissue, mask = store.node_attrs(f"{node}/mask"), store.read(f"{node}/mask")
    mpp0 = float(about["determines"]["mpp0"])
    px_mm2 = tissue["px0_per_px"][0] * tissue["px0_per_px"][1] * (mpp0 / 1000) ** 2
    sharp = store.read(f"focus/{grid}") if store.committed(f"focus/{grid}") else np.empty(0, np.float32)
    tiles = len(store.read(f"grids/{grid}/item"))
    five = np.percentile(sharp, [5, 50, 95]) if len(sharp) else None
    row = Quality(
        slide_id=store.slide_id,
        grid=grid,
        tiles=tiles,
        tissue_mm2=float(mask.sum()) * px_mm2,
        tissue_share=float(mask.mean()),
        focus=tissue["focus"],
        stain=None if tissue.get("stain") is None else tuple(tissue["stain"]),
        tile_focus=None if five is None else (float(five[0]), float(five[1]), float(five[2])),
        blurred=None,
        reason=about.get("reason", ""),
    )
    return [(row, sharp)]


def _compared(found: Sequence[tuple[Quality, npt.NDArray[np.float32]]]) -> list[Quality]:
    """Say how many tiles are blurred, against those of all slides at the same scale."""
    by_scale: dict[str, list[npt.NDArray[np.float32]]] = {}
    for row, sharp in found:
        by_scale.setdefault(_scale(row.grid), []).append(sharp)
    medians = {scale: float(np.median(np.concatenate(s))) for scale, s in by_scale.items() if sum(map(len, s))}
    rows = []
    for row, sharp in found:
        bound = BLURRED * medians.get(_scale(row.grid), 0.0)
        share = float((sharp < bound).mean()) if len(sharp) else None
        rows.append(Quality(**{**vars(row), "blurred": share}))
    return rows


def _scale(grid: str) -> str:
    """The tile's size and scale, without what determines the grid of one slide."""
    return grid.rpartition("-")[0]

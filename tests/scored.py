"""Runs with known scores, made without a slide or a network: stores, commits and run.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slideflow_ray.accounting import Ended, RunResult, write_run
from slideflow_ray.aggregate import write_heatmaps
from slideflow_ray.cohort import Item
from slideflow_ray.pipeline import Context, RunModel
from slideflow_ray.profile import ComputeProfile
from slideflow_ray.specs import LabelSpec, ModelSpec, RunSpec, StoreSpec, TileSpec, TissueSpec
from slideflow_ray.store import SlideStore

GRID = "40px-0.5um-aaaaaaaaaaaa"
NODE = "fake-bbbbbbbbbbbb"
TILE = TileSpec(tile_px=40, mpp=0.5, stride_px=20)
MPP0 = 0.25
STEP_PX0, SIDE_PX0 = 40, 80
PROFILE = ComputeProfile(torch="0", device="cpu", isa="none", precision="fp32", micro_batch=16)


@dataclass(frozen=True)
class Scored:
    """A slide: its item, the cells that have tiles, int (n, 2), and their margins, float32 (n, C)."""

    item: Item
    cells: np.ndarray
    margins: np.ndarray
    shape: tuple[int, int]


def cells_of(rows: int, cols: int) -> np.ndarray:
    return np.argwhere(np.ones((rows, cols), bool))


def box(name: str | None, x0: float, y0: float, x1: float, y1: float) -> dict:
    """A QuPath feature."""
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}


def write_features(path: Path, features: Sequence[dict]) -> str:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return str(path)


TISSUE = "tissue/he-cccccccccccc"
MASK_PX0 = 50


def write_store(out: Path, slide: Scored, tissue: np.ndarray | None = None) -> SlideStore:
    """`tissue` is a mask, bool (h, w), of MASK_PX0 px0 a pixel."""
    store = SlideStore(out, slide.item.slide_id)
    size = [STEP_PX0 * slide.shape[1] + 40, STEP_PX0 * slide.shape[0] + 40]
    store.describe({"uri": slide.item.uri, "size_px0": size, "mpp0": MPP0, "levels": [], "reader": "none"})
    xy = slide.cells[:, ::-1].astype(np.int64) * STEP_PX0
    determines: dict = {"tile": TILE.model_dump(), "mpp0": MPP0}
    if tissue is not None:
        determines["tissue"] = TISSUE
        store.write_array(f"{TISSUE}/mask", tissue, {"px0_per_px": [MASK_PX0, MASK_PX0]})
        store.commit(TISSUE)
    store.make_group(f"grids/{GRID}", {"determines": determines, "shape": list(slide.shape)})
    n = len(xy)
    arrays = {
        "xy_px0": xy,
        "wh_px0": np.full((n, 2), SIDE_PX0, np.int32),
        "rowcol": slide.cells.astype(np.int32),
        "tissue": np.ones(n, np.float32),
        "item": np.zeros(n, np.int32),
    }
    for name, values in arrays.items():
        store.write_array(f"grids/{GRID}/{name}", values)
    store.commit(f"grids/{GRID}")
    if n:
        store.write_array(f"scores/{GRID}/{NODE}", slide.margins.astype(np.float32))
        store.commit(f"scores/{GRID}/{NODE}")
    return store


def write_scored_run(
    out: Path,
    slides: Sequence[Scored],
    classes: tuple[str, ...] = ("normal", "tumor"),
    *,
    task: str = "classify",
    failed: Sequence[Item] = (),
    names: dict[str, str] | None = None,
    heatmaps: bool = False,
    tissue: np.ndarray | None = None,
) -> Path:
    model = RunModel("fake", NODE, ModelSpec(path="/bundles/fake"), TILE, task, classes, ())
    spec = RunSpec(cohort="cohort.csv", out=str(out), model=(model.spec,), labels=LabelSpec(names=names or {}))
    ended = []
    for slide in slides:
        write_store(out, slide, tissue)
        grids = ((GRID, NODE),) if len(slide.cells) else ()
        outcome = "scored" if grids else "no_tissue"
        ended.append(Ended(slide.item.slide_id, "done", outcome, len(slide.cells), "", (GRID,), ((GRID, NODE),)))
    ended += [Ended(i.slide_id, "failed", code="E_READ", message="cut <off>", next_step="copy it") for i in failed]
    if heatmaps:
        write_heatmaps(str(out), [(s.item.slide_id, GRID, NODE) for s in slides if len(s.cells)])
    context = Context(str(out), (model,), TissueSpec(), StoreSpec(tiles="none"), (), PROFILE)
    items = [slide.item for slide in slides] + list(failed)
    write_run(out, spec, items, context, RunResult(tuple(ended), True, 1.0))
    return out


def two_class(
    folder: Path, rng: np.random.Generator, name: str, patient: str, split: str | None, tumour: bool, **more: object
) -> Scored:
    """A slide of 9 x 13 cells; a tumour is annotated at x < 200, y < 300, and cells in it score higher."""
    cells = cells_of(9, 13)
    x, y = cells[:, 1] * STEP_PX0 + SIDE_PX0 / 2, cells[:, 0] * STEP_PX0 + SIDE_PX0 / 2
    inside = (x < 200) & (y < 300) & tumour
    z = rng.normal(np.where(inside, 1.2, -1.2), 1.5)
    annotation = write_features(folder / f"{name}.geojson", [box("Tumor", -5, -5, 200, 300)]) if tumour else None
    item = Item(
        slide_id=name,
        uri=f"{name}.svs",
        patient_id=patient,
        split=split,
        label="tumor" if tumour else "normal",
        annotation=annotation,
        **more,
    )
    return Scored(item, cells, np.column_stack([-z, z]), (9, 13))

"""1,000 slides of 20,000 tiles, evaluated and reported: seconds and peak memory.

Writes what a run leaves (stores with grids and scores, annotations, run.json), then runs ``evaluate`` and
``report`` in a process of their own::

    python benchmarks/evaluate.py --slides 1000 --tiles 20000 --folder /tmp/evaluate

Scores and regions are random numbers: the figures are about time and memory, not about slides.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from slideflow_ray.accounting import Ended, RunResult, write_run
from slideflow_ray.cohort import Item
from slideflow_ray.evaluate import evaluate
from slideflow_ray.pipeline import Context, Result, RunModel
from slideflow_ray.profile import resolve
from slideflow_ray.report import write_report
from slideflow_ray.specs import ComputeSpec, ModelSpec, RunSpec, StoreSpec, TileSpec, TissueSpec
from slideflow_ray.store import SlideStore

GRID, NODE = "256px-0.5um-aaaaaaaaaaaa", "model-bbbbbbbbbbbb"
TILE = TileSpec(tile_px=256, mpp=0.5)
CLASSES = ("normal", "tumor")


def write(folder: Path, slides: int, tiles: int) -> None:
    """Write the output folder of a run: every other slide has a tumour, two slides to a patient."""
    rng = np.random.default_rng(0)
    cols = 200
    cells = np.stack(np.divmod(np.arange(tiles), cols), axis=1).astype(np.int32)
    region = [[0, 0], [20000, 0], [20000, 8000], [0, 8000], [0, 0]]
    inside = (cells[:, 1] * 256 + 128 < 20000) & (cells[:, 0] * 256 + 128 < 8000)
    tumour = {"type": "Polygon", "coordinates": [region]}
    feature = {"type": "Feature", "geometry": tumour, "properties": {"classification": {"name": "tumor"}}}
    annotation = folder / "tumor.geojson"
    folder.mkdir(parents=True)
    annotation.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    items, ended = [], []
    for i in range(slides):
        sick = i % 2 == 0
        item = Item(
            slide_id=f"slide_{i:05d}",
            uri=f"slide_{i:05d}.svs",
            patient_id=f"patient_{i // 2:05d}",
            split=("train", "val", "test")[i // 2 % 3],
            label="tumor" if sick else "normal",
            annotation=str(annotation) if sick else None,
        )
        store = SlideStore(folder / "out", item.slide_id)
        size = [256 * cols, 256 * int(cells[-1, 0] + 1)]
        store.describe({"uri": item.uri, "identity": "none", "size_px0": size, "mpp0": 0.5, "levels": []})
        determines = {"tile": TILE.model_dump(), "mpp0": 0.5, "size_px0": size}
        store.make_group(f"grids/{GRID}", {"determines": determines, "shape": [int(cells[-1, 0] + 1), cols]})
        arrays = {
            "xy_px0": cells[:, ::-1].astype(np.int64) * 256,
            "wh_px0": np.full((tiles, 2), 256, np.int32),
            "rowcol": cells,
            "tissue": np.ones(tiles, np.float32),
            "item": np.zeros(tiles, np.int32),
        }
        for name, values in arrays.items():
            store.write_array(f"grids/{GRID}/{name}", values)
        store.commit(f"grids/{GRID}")
        z = rng.normal(np.where(inside & sick, 1.5, -1.5), 2).astype(np.float32)
        store.write_array(f"scores/{GRID}/{NODE}", np.column_stack([-z, z]))
        store.commit(f"scores/{GRID}/{NODE}")
        items.append(item)
        ended.append(Ended(item.slide_id, "done", "scored", tiles, "", (GRID,), ((GRID, NODE),)))
    model = RunModel("random", NODE, ModelSpec(path="none"), TILE, "classify", CLASSES, (Result("scores", (2,), "f4"),))
    spec = RunSpec(cohort="cohort.csv", out=str(folder / "out"), model=(model.spec,))
    context = Context(spec.out, (model,), TissueSpec(), StoreSpec(tiles="none"), (), resolve(ComputeSpec()))
    write_run(folder / "out", spec, items, context, RunResult(tuple(ended), True, 0.0))


def read(folder: Path) -> dict[str, object]:
    """Evaluate and report; return what it took, with the answer as proof of work."""
    started = time.perf_counter()
    found = evaluate(folder / "out")
    evaluated = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    page = write_report(folder / "out")
    headline = next(r for r in found.results if r.split == "test" and r.level == "tile")
    return {
        "auc": headline.auc,
        "auc_interval": headline.auc_interval,
        "tiles_on_test": headline.positives + headline.negatives,
        "evaluate_s": round(evaluated, 1),
        "evaluate_peak_mb": peak,
        "report_s": round(time.perf_counter() - started - evaluated, 1),
        "report_mb": round(page.stat().st_size / 1e6, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    """Write, read in a fresh process, print JSON, tidy up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=1000)
    parser.add_argument("--tiles", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/slideflow-evaluate"))
    parser.add_argument("--step", choices=["all", "write", "read"], default="all")
    given = parser.parse_args()
    if given.step == "read":
        print(json.dumps(read(given.folder)))
        return
    shutil.rmtree(given.folder, ignore_errors=True)
    write(given.folder, given.slides, given.tiles)
    if given.step == "all":
        same = [sys.executable, __file__, "--folder", str(given.folder), "--step", "read"]
        subprocess.run(same, check=True)
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()

"""The demo at its full size: what it reaches, how long it trains, and what colour alone would reach on its tiles.

Not part of the tests; `make accept` runs it, and writes its figures to accept/005-phantoms.json.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from colour import aucs, features
from walked import note

from slideflow_ray.accounting import read_run
from slideflow_ray.annotations import slide_labels
from slideflow_ray.cohort import Item, read_cohort
from slideflow_ray.demo import EPOCHS, MIN_TISSUE, MPP, SLIDES, TILE_PX
from slideflow_ray.evaluate import evaluate
from slideflow_ray.phantoms import write_cohort
from slideflow_ray.run import run
from slideflow_ray.specs import LabelSpec, RunSpec
from slideflow_ray.store import SlideStore
from slideflow_ray.train.job import TrainJob, train

CLASSES = ("normal", "tumor")
FIGURES = "005-phantoms.json"


def tiles(out: Path, items: list[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Colour features and truth, by the tile's centre, of the tiles that the run stored."""
    found = []
    for item in items:
        (pair,) = read_run(out)["outcomes"][item.slide_id]["grids"]
        store = SlideStore(out, item.slide_id)
        truth = slide_labels(store, pair[0], item, CLASSES, LabelSpec())[:, 1] == 1
        found.append((features(store.read(f"grids/{pair[0]}/tiles")), truth))
    return np.concatenate([f for f, _ in found]), np.concatenate([t for _, t in found])


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_training_learns_what_colour_cannot_tell(tmp_path, seed):
    cohort = write_cohort(tmp_path / "cohort", slides=SLIDES, seed=seed)
    job = {
        "cohort": str(cohort),
        "out": str(tmp_path / "bundle"),
        "work": str(tmp_path / "train"),
        "classes": CLASSES,
        "tile": {"tile_px": TILE_PX, "mpp": MPP, "min_tissue": MIN_TISSUE},
        "labels": {"rule": "fraction", "fraction": 0.75},
        "fit": {"epochs": EPOCHS, "seed": seed, "threads": 2},
    }
    began = time.perf_counter()
    trained = train(TrainJob.parse(job, "accept"))
    seconds = time.perf_counter() - began
    spec = {
        "cohort": str(cohort),
        "out": str(tmp_path / "out"),
        "model": [{"path": str(trained.bundle)}],
        "min_tissue": MIN_TISSUE,
    }
    run(RunSpec.parse(spec, "accept"))
    auc = {r.level: r.auc for r in evaluate(tmp_path / "out").results if r.split == "test"}
    items = read_cohort(cohort)
    train_tiles, test_tiles = (
        tiles(tmp_path / "out", [item for item in items if item.split == split]) for split in ("train", "test")
    )
    colour = aucs(train_tiles, test_tiles)
    note(
        seed, {"test AUC": auc, "seconds of training": round(seconds, 1), "tiles": trained.tiles, "colour AUC": colour}
    )
    assert auc["tile"] >= 0.98
    assert auc["slide"] >= 0.9
    assert seconds < 180
    assert max(colour.values()) <= 0.75, colour

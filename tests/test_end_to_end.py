"""From phantom slides to the report, through Ray; and scikit-learn on the stored margins as the judge."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr

from slideflow_ray.accounting import read_run
from slideflow_ray.annotations import slide_labels
from slideflow_ray.cohort import Item, read_cohort
from slideflow_ray.evaluate import evaluate
from slideflow_ray.layout import read_grid
from slideflow_ray.phantoms import write_cohort
from slideflow_ray.report import write_report
from slideflow_ray.results import Evaluation
from slideflow_ray.run import run
from slideflow_ray.specs import LabelSpec, RunSpec
from slideflow_ray.store import SlideStore, tree_digest
from slideflow_ray.train.job import TrainJob, train

CLASSES = ("normal", "tumor")


@dataclass(frozen=True)
class Whole:
    """A cohort that went the whole way."""

    out: Path
    items: tuple[Item, ...]
    evaluation: Evaluation
    trained: str

    def rows(self, item: Item) -> tuple[np.ndarray, np.ndarray]:
        """The slide's margins of tumor, and its labels 0, 1 or -1."""
        (pair,) = read_run(self.out)["outcomes"][item.slide_id]["grids"]
        store = SlideStore(self.out, item.slide_id)
        labels = slide_labels(store, pair[0], item, CLASSES, LabelSpec())
        return store.read(f"scores/{pair[0]}/{pair[1]}")[:, 1], labels[:, 1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, local_ray) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    cohort = write_cohort(folder / "cohort", slides=9, seed=1, size_px0=(2560, 1792))
    job = {
        "cohort": str(cohort),
        "out": str(folder / "bundle"),
        "work": str(folder / "work"),
        "classes": CLASSES,
        "tile": {"tile_px": 64, "mpp": 1.0},
        "fit": {"epochs": 3},
    }
    trained = train(TrainJob.parse(job, "test"))
    values = {
        "cohort": str(cohort),
        "out": str(folder / "out"),
        "model": [{"path": str(folder / "bundle")}],
        "executor": {"kind": "ray", "workers": 2},
        "compute": {"device": "cpu"},
        "dask": "ray",
    }
    result = run(RunSpec.parse(values, "test"))
    assert result.counts == {"done": 9, "failed": 0, "refused": 0}
    evaluation = evaluate(folder / "out")
    return Whole(folder / "out", read_cohort(cohort), evaluation, trained.summary())


@pytest.mark.ray
def test_the_network_has_learnt(whole):
    (found,) = [r for r in whole.evaluation.results if r.split == "test" and r.level == "tile"]
    assert found.auc is not None
    assert found.auc > 0.75
    assert "best epoch" in whole.trained


@pytest.mark.ray
@pytest.mark.parametrize("split", ["val", "test"])
def test_scikit_learn_on_the_stored_margins_agrees(whole, split):
    from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

    rows = [whole.rows(item) for item in whole.items if item.split == split]
    margins, labels = (np.concatenate(part) for part in zip(*rows, strict=True))
    margins, labels = margins[labels >= 0], labels[labels >= 0]
    (found,) = [r for r in whole.evaluation.results if r.split == split and r.level == "tile"]
    assert (found.positives, found.negatives) == ((labels == 1).sum(), (labels == 0).sum())
    assert found.auc == pytest.approx(roc_auc_score(labels, margins), abs=1e-12)
    (tn, fp), (fn, tp) = confusion_matrix(labels, margins >= np.float32(found.threshold))
    assert found.counts == {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
    if split == "val":  # Youden on validation is the best that scikit-learn's curve knows
        fpr, tpr, _ = roc_curve(labels, margins)
        mine = found.rates["sensitivity"] + found.rates["specificity"] - 1
        assert mine == pytest.approx((tpr - fpr).max(), abs=2e-3)


@pytest.mark.ray
def test_the_operating_point_of_validation_is_applied_unchanged_to_test(whole):
    points = json.loads((whole.out / "operating_points.json").read_text())["points"]
    (point,) = [p for p in points if p["level"] == "tile"]
    assert (point["split"], point["rule"]) == ("val", "youden")
    assert point["profile_digest"] == read_run(whole.out)["profile_digest"]
    for found in whole.evaluation.results:
        if found.level == "tile":
            assert found.threshold == point["threshold"]


@pytest.mark.ray
def test_the_heatmap_lies_on_its_tiles_to_the_far_corner(whole):
    item = whole.items[0]
    (pair,) = read_run(whole.out)["outcomes"][item.slide_id]["grids"]
    store = SlideStore(whole.out, item.slide_id)
    grid = read_grid(store, pair[0])
    group = zarr.open_group(store.root / f"heatmaps/{pair[0]}/{pair[1]}", mode="r")
    (image,) = group.attrs["ome"]["multiscales"]
    assert [axis["name"] for axis in image["axes"]] == ["c", "y", "x"]
    for dataset in image["datasets"]:
        level = np.asarray(group[dataset["path"]][1])
        scale, shift = (t[t["type"]] for t in dataset["coordinateTransformations"])
        y, x = np.nonzero(np.isfinite(level))
        centres_um = np.stack([x * scale[2] + shift[2], y * scale[1] + shift[1]], axis=1)
        tiles_um = (grid.xy_px0 + (grid.wh_px0 - 1) / 2) * store.attrs["mpp0"]
        nearest = np.abs(centres_um[:, None] - tiles_um[None]).max(axis=2).min(axis=1)
        assert nearest.max() <= scale[1] / 2 + 0.5, dataset["path"]
    first = np.asarray(group["0"][1])
    expected = np.full(grid.shape, np.nan, np.float32)
    expected[grid.rowcol[:, 0], grid.rowcol[:, 1]] = 1 / (1 + np.exp(-whole.rows(item)[0]))
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    far = grid.rowcol[np.argmax(grid.rowcol.sum(axis=1))]
    assert np.isfinite(first[far[0], far[1]])


@pytest.mark.ray
def test_the_report_is_one_file_that_needs_nothing_else(whole):
    page = write_report(whole.out)
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert "<script src" not in text
    for item in whole.items:
        assert item.slide_id in text


@pytest.mark.ray
def test_dask_on_threads_and_on_ray_write_the_same_bytes(whole):
    before = tree_digest(whole.out)
    evaluate(whole.out, scheduler="threads")
    assert tree_digest(whole.out) == before
    evaluate(whole.out, scheduler="ray")
    assert tree_digest(whole.out) == before

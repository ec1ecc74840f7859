"""Granules in phantom micrographs of unseen patients: a network, a machine on frozen features, and both joined.

1,200 micrographs of 50 patients, 128 x 128 px of 16 nm, by three microscopes; half of the patients have granules at the
membrane, and all have dirt as dark as these away from it. There are no ImageNet weights here, so model B's frozen
ResNet-18 is random, or model A's own: both are shown. Everything is trained and chosen on the patients of train and
val. Not part of the tests; `make accept` runs it, and writes its figures to accept/009-granules.json.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from walked import cli, note, stage

from slideflow_ray.phantoms.tem import write_tem_cohort

ROOT = Path(__file__).resolve().parent.parent.parent
FIGURES = "009-granules.json"
SIDE, NEAR_PX = 128, 8
NET = "torchvision:resnet18"
TOML = f"""cohort = "{{cohort}}"
out = "{{out}}"
work = "work"
classes = ["none", "granule"]
whole = {{{{tile_px = {SIDE}, fit = "squash"}}}}
executor = {{{{workers = 1}}}}
overwrite = true
[fit]
architecture = "{{architecture}}"
threads = 2
{{more}}
"""
A = f"""arguments = {{first = "{NET}", second = {{backbone = "{NET}"}}}}
epochs = 12
lr = 1e-3
schedule = "onecycle"
augment = {{saturation = 0, hue = 0}}
[fit.machine]
judged = "val"
"""


def write(folder: Path, name: str, cohort: Path, architecture: str, more: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(TOML.format(cohort=cohort, out=name, architecture=architecture, more=more))
    return path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("micrographs")
    return write_tem_cohort(folder, patients=50, images=24, size_px=(SIDE, SIDE), nm_per_px=16.0, workers=2)


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory) -> tuple[Path, dict[str, Path], dict[str, float]]:
    """A, B and C from one command; then B on A's frozen features, and C of A and that."""
    folder = tmp_path_factory.mktemp("trained")
    parts = folder / "work" / "parts"
    seconds = {"A, B, C": cli(folder, "train", str(write(folder, "C", cohort, "two-models", A)))[1]}
    second = f'arguments = {{backbone = "{NET}"}}\nweights = "{parts / "C-first"}"\n'
    seconds["B on A"] = cli(folder, "train", str(write(folder, "B-on-A", cohort, "skip-svm", second)))[1]
    given = A + f'first = "{parts / "C-first"}"\nsecond = "{folder / "B-on-A"}"\n'
    seconds["C on A"] = cli(folder, "train", str(write(folder, "C-on-A", cohort, "two-models", given)))[1]
    bundles = {"A": parts / "C-first", "B": parts / "C-second", "C": folder / "C"}
    return folder, bundles | {"B on A": folder / "B-on-A", "C on A": folder / "C-on-A"}, seconds


@pytest.fixture(scope="module")
def compared(trained, cohort) -> tuple[Path, dict]:
    """The five bundles on the patients of test."""
    folder, bundles, seconds = trained
    paths = [str(path) for path in bundles.values()]
    said, took = cli(folder, "compare", *paths, "--cohort", str(cohort), "--out", "run", "--split", "test", "--json")
    return folder / "run", {**json.loads(said), "seconds": {**seconds, "compare": took}}


def test_granules_of_unseen_patients_are_told(trained, compared):
    _, bundles, _ = trained
    _, found = compared
    figures = {}
    for name, one in zip(bundles, found["bundles"], strict=True):
        tile = next(m for m in one["measured"] if m["level"] == "tile")
        record = json.loads((Path(one["path"]) / "training.json").read_text())
        best = record["epochs"][record["best_epoch"]]
        shown = ("accuracy", "sensitivity", "specificity", "ppv", "npv", "f1", "auc")
        values = {key: round(tile["values"][key], 4) for key in shown}
        interval = tile["intervals"]["auc"] and [round(v, 4) for v in tile["intervals"]["auc"]]
        figures[name] = {"test": values, "auc 95 % by patient": interval, "val auc": round(best["val_auc"], 4)}
        figures[name] |= {"images": tile["rows"], "patients": tile["patients"]}
        figures[name] |= {key: record[key] for key in ("machine", "join") if key in record}
    names = {one["label"]: name for name, one in zip(bundles, found["bundles"], strict=True)}
    pairs = [
        {"pair": [names[p["first"]], names[p["second"]]], "mcnemar p": p["p"], "auc gain": p["differences"]["auc"]}
        | {"auc gain 95 %": p["intervals"]["auc"]}
        for p in found["pairs"]
    ]
    note(FIGURES, "test", {"models": figures, "pairs": pairs, "seconds": found["seconds"]})
    assert figures["C"]["test"]["auc"] >= 0.95


def hits(folder: Path, maps: list[dict], cohort: Path) -> dict[str, dict]:
    """Of each kind of map how often the hottest pixel lies at a granule, and how often a random one would."""
    found: dict[str, list[tuple[bool, float]]] = {}
    for one in maps:
        truth = json.loads((cohort.parent / f"{one['slide_id']}.truth.json").read_text())["granules_px"]
        y, x = np.mgrid[:SIDE, :SIDE]
        inside = np.any([np.hypot(x + 0.5 - gx, y + 0.5 - gy) < r + NEAR_PX for gx, gy, r in truth], axis=0)
        assert np.load(folder / one["array"]).shape == inside.shape
        left, top = one["hottest_px"]
        found.setdefault(one["map"], []).append((bool(inside[top, left]), float(inside.mean())))
    return {
        kind: {"images": len(rows), "at a granule": round(float(np.mean([hit for hit, _ in rows])), 3)}
        | {"by chance": round(float(np.mean([chance for _, chance in rows])), 3)}
        for kind, rows in found.items()
    }


def test_maps_are_hot_at_granules(trained, compared, cohort):
    run, _ = compared
    _, bundles, _ = trained
    rows = list(csv.DictReader(cohort.read_text().splitlines()))
    test = [r["slide_id"] for r in rows if (r["split"], r["label"]) == ("test", "granule")][::3]
    items = [f"--item={slide}" for slide in test]
    found = {}
    for name, more in {"A": ["--method=grad-cam"], "B": [], "B on A": []}.items():
        window = ["--window-px=24", "--stride-px=12"]
        said, _ = cli(run.parent, "explain", "run", "--model", bundles[name].name, *items, *more, *window, "--json")
        told = json.loads(said)
        found[name] = hits(Path(run.parent / told["index"]).parent, told["maps"], cohort)
    note(FIGURES, "maps", found)
    looked, hidden = found["A"]["grad-cam layer3"], found["B on A"]["occlusion"]
    assert looked["at a granule"] > 3 * looked["by chance"]
    assert hidden["at a granule"] > hidden["by chance"]


@pytest.mark.soak  # three times the training: pytest -m soak tests/accept/test_granules.py
def test_folds_by_patient_side_by_side(cohort, tmp_path):
    """Three folds, one seed: figures of all patients, each predicted by models of the others."""
    path = write(tmp_path, "folds", cohort, "two-models", A)
    said, seconds = stage(tmp_path, str(ROOT / "jobs" / "granules.py"), str(path), "--folds", "3", "--seeds", "1")
    found = json.loads((tmp_path / "folds" / "repeated.json").read_text())
    note(FIGURES, "three folds", {"table": said.splitlines(), "rules": found["rules"], "seconds": seconds})
    assert found["figures"]["C"]["auc"]["mean"] >= 0.95

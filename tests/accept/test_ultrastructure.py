"""Ultrastructure from phantoms: walls of unseen patients segmented, their membranes measured, pre-training's worth.

A U-Net trained on all labels, judged on the patients of test, with the thickness of the membrane against the truth;
k-means on grey values, which must fail; and source 002's table at 128 px. Not part of the tests; `make accept` runs
it, and writes its figures to accept/009-ultrastructure.json.
"""

from __future__ import annotations

import csv
import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from sklearn.cluster import KMeans
from walked import cli, note, stage, toml

from slideflow_ray.cohort import read_cohort
from slideflow_ray.phantoms.files import write_csv
from slideflow_ray.phantoms.tem import CLASSES, MICROSCOPES, draw_micrograph, write_tem_cohort
from slideflow_ray.tables import read_table

ROOT = Path(__file__).resolve().parent.parent.parent
FIGURES = "009-ultrastructure.json"
NM = 16.0
LIGHT = {"brightness": 0.15, "contrast": 0.15, "saturation": 0, "hue": 0, "noise": 0.01}
WALL = {"of": "membrane", "between": ["endothelium", "podocyte"]}
GOALS = {"membrane": 0.90, "endothelium": 0.80, "podocyte": 0.80}


# all labels


def training(cohort: Path, tile_px: int, halo_px: int, **fit) -> dict:
    """A segmentation's training, a U-Net on tiles at 16 nm per pixel.

    Four levels: a cell's body is told from that of another kind by the side of the wall it lies on, and three levels
    (0.8 um) do not see the wall from inside it.
    """
    fit = {"architecture": "unet", "class_weights": "none", "augment": LIGHT, "threads": 1, "device": "cpu", **fit}
    return {
        "cohort": str(cohort),
        "out": "walls",
        "work": "work",
        "task": "segment",
        "classes": list(CLASSES),
        "tile": {"tile_px": tile_px, "mpp": NM / 1000, "halo_px": halo_px, "min_tissue": 0.0},
        "tissue": {"rule": "everything"},
        "fit": fit,
    }


@pytest.fixture(scope="module")
def micrographs(tmp_path_factory) -> Path:
    """Three micrographs of 4 x 4 um of each of 30 patients; test has six, and five are the fewest for an interval.

    Granules are as dark as they come, which is the hardest for the membrane that they lie in.
    """
    drawn = {"patients": 30, "images": 3, "size_px": (256, 256), "nm_per_px": NM, "contrast": (1.0, 1.0)}
    return write_tem_cohort(tmp_path_factory.mktemp("tem"), **drawn)


def test_walls_of_unseen_patients_are_segmented_and_their_membranes_measured(micrographs):
    folder = micrographs.parent
    fit = {"arguments": {"levels": 4, "width": 8}, "epochs": 90, "batch_size": 4, "lr": 4e-3, "warmup": 1}
    fit["class_weights"] = "balanced"  # without, the thin endothelium was found after 60 epochs, at a Dice of 0.51
    (folder / "train.toml").write_text(toml(training(micrographs, 288, 16, **fit)))
    run = {"cohort": str(micrographs), "out": "out", "tissue": {"rule": "everything"}}
    run["model"] = [{"path": "walls", "thickness": WALL}]
    (folder / "run.toml").write_text(toml(run))
    _, trained = cli(folder, "train", "train.toml")
    _, ran = cli(folder, "run", "run.toml")
    for command in ("evaluate", "report"):
        cli(folder, command, "out")
    found = json.loads((folder / "out" / "overlap.json").read_text())["overlap"]
    test = {o["class_name"]: o for o in found if o["split"] == "test"}
    keys = ("mean", "sd", "interval", "slides")
    measures = ("dice", "iou", "hd95_nm", "assd_nm", "boundary_f")
    figures = {name: {m: {k: o[m][k] for k in keys} for m in measures} for name, o in test.items()}
    thickness = thickness_errors(folder)
    note(FIGURES, "walls of test", {"classes": figures, "thickness": thickness, "training_s": trained, "run_s": ran})
    for name, goal in GOALS.items():
        assert test[name]["dice"]["mean"] >= goal, figures[name]["dice"]
    assert abs(thickness["mean_error_percent"]) <= 5
    assert thickness["mean_absolute_error_percent"] <= 5


def thickness_errors(folder: Path) -> dict:
    """Measured against drawn, in percent, by micrograph of test; the drawn mean is along the whole line in view."""
    split = {item.slide_id: item.split for item in read_cohort(folder / "cohort.csv")}
    rows = [r for r in read_table(folder / "out" / "thickness.parquet") if r["level"] == "slide"]
    rows = [r for r in rows if split[r["slide_id"]] == "test"]
    truth = {r["slide_id"]: json.loads((folder / f"{r['slide_id']}.truth.json").read_text()) for r in rows}
    measured = [r for r in rows if r["mean_nm"] is not None]
    error = [100 * (r["mean_nm"] / truth[r["slide_id"]]["thickness_nm"] - 1) for r in measured]
    harmonic = [100 * (r["harmonic_nm"] / truth[r["slide_id"]]["harmonic_nm"] - 1) for r in measured]
    return {
        "micrographs": len(rows),
        "measured": len(measured),
        "mean_error_percent": round(float(np.mean(error)), 2),
        "mean_absolute_error_percent": round(float(np.mean(np.abs(error))), 2),
        "largest_error_percent": round(float(np.max(np.abs(error))), 2),
        "mean_error_of_harmonic_percent": round(float(np.mean(harmonic)), 2),
    }


# grey values alone


def drawn(split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pixels and masks of micrographs of 12 patients, and of 12 others for test."""
    first = {"train": 0, "test": 100}[split]
    found = []
    for patient in range(first, first + 12):
        at = np.random.default_rng([9, patient])
        for number in range(2):
            how = {"thickness_nm": float(at.uniform(260, 480)), "microscope": MICROSCOPES[patient % 3]}
            one = draw_micrograph((9, patient, number), (256, 256), NM, granules=number, **how)
            found.append((ndimage.gaussian_filter(one.pixels.astype(float), 1.0), one.mask))
    return found


def dice(called: np.ndarray, mask: np.ndarray) -> list[float]:
    both = [(called == c) & (mask == c) for c in (1, 2, 3)]
    sizes = [(called == c).sum() + (mask == c).sum() for c in (1, 2, 3)]
    return [2 * b.sum() / n if n else np.nan for b, n in zip(both, sizes, strict=True)]


@pytest.mark.parametrize("clusters", [4, 8])
def test_grey_values_alone_stay_at_or_below_0_6(clusters):
    """K-means of grey values, smoothed and brought to the image's own mean and deviation; the assignment of clusters to
    classes that is best on train, each class having one cluster at least where that is best."""
    train, test = drawn("train"), drawn("test")

    def values(pixels: np.ndarray) -> np.ndarray:
        return ((pixels - pixels.mean()) / pixels.std()).reshape(-1, 1)

    some = np.concatenate([values(pixels)[::17] for pixels, _ in train])
    means = KMeans(clusters, n_init=4, random_state=0).fit(some)
    order = np.argsort(means.cluster_centers_.ravel())
    rank = np.empty(clusters, int)
    rank[order] = np.arange(clusters)
    labels = {id(mask): rank[means.predict(values(pixels))].reshape(mask.shape) for pixels, mask in [*train, *test]}
    best = max(assignments(clusters, train, labels), key=lambda a: score(a, train, labels))
    found = np.nanmean([dice(np.array(best)[labels[id(mask)]], mask) for _, mask in test], axis=0)
    note(
        FIGURES,
        f"grey values alone, {clusters} clusters",
        {"dice": dict(zip(CLASSES[1:], found.tolist(), strict=True))},
    )
    assert found.mean() <= 0.6, found


def assignments(clusters: int, train: list, labels: dict) -> list[tuple[int, ...]]:
    """With four clusters every one; with more the majority's, and those with each class given one cluster."""
    if clusters == 4:
        return list({p for c in np.ndindex(4, 4, 4, 4) for p in [tuple(c)]})
    table = np.zeros((clusters, 4), int)
    for _, mask in train:
        np.add.at(table, (labels[id(mask)].ravel(), mask.ravel()), 1)
    majority = table.argmax(1)
    found = [tuple(majority.tolist())]
    for three in permutations(range(clusters), 3):
        other = majority.copy()
        other[list(three)] = (1, 2, 3)
        found.append(tuple(other.tolist()))
    return found


def score(assignment: tuple[int, ...], train: list, labels: dict) -> float:
    return float(np.nanmean([dice(np.array(assignment)[labels[id(m)]], m) for _, m in train[::4]]))


# the table of source 002


SHARES, SEEDS = [1, 5, 10, 100], 5
METHODS = ["random", "usregcon", "simclr", "pixpro", "detcon"]
UNLABELLED = 210
"""Micrographs of 512 px of other patients; the 2,016 tiles of train are pre-trained on. 96 images have labels.

The source's lab had 60 unlabelled images for each labelled one. After 150 steps on 200 images pre-training
gave nothing: -0.07 on five seeds, by a script, with cells of 200 steps, in which endothelium is found or not by chance.
"""


def unlabelled(folder: Path) -> Path:
    """Write micrographs to pre-train on, whose patients have names of their own."""
    cohort = write_tem_cohort(folder, patients=UNLABELLED, images=1, size_px=(512, 512), nm_per_px=NM, seed=14)
    rows = [row | {"patient_id": f"u{row['patient_id']}"} for row in csv.DictReader(cohort.open(newline=""))]
    return write_csv(cohort, rows)


def test_the_table_of_source_002_at_128_px(tmp_path):
    """One micrograph of 128 px each of 160 patients, 96 of them labelled for training; five seeds.

    The recipe was chosen on another cohort (seeds 11 and 12): cells of 384 steps of 4 end before a network tells the
    sides of a wall apart, and after pre-training at lr 1e-3 they came out worse than from random weights.
    """
    cohort = write_tem_cohort(tmp_path / "tem", patients=160, images=1, size_px=(128, 128), nm_per_px=NM, seed=13)
    fit = {"arguments": {"levels": 4, "width": 8}, "epochs": 18, "batch_size": 2, "lr": 4e-3, "warmup": 1}
    fit["class_weights"] = "balanced"  # else, in so few steps, some seeds find no endothelium at all
    fit["keep"] = "dice"
    settings = training(cohort, 160, 16, **fit)
    told = {"methods": METHODS, "shares": SHARES, "seeds": SEEDS, "at_once": 2}
    told["cohort"] = str(unlabelled(tmp_path / "unlabelled"))
    told["pretrain"] = {"epochs": 4, "batch_size": 16, "lr": 4e-3, "warmup": 1, "threads": 1}
    (tmp_path / "train.toml").write_text(toml(settings | {"transfer": told}))
    _, seconds = stage(tmp_path, str(ROOT / "jobs" / "ultrastructure.py"), "train.toml", "--out", "table")
    found = json.loads((tmp_path / "table" / "transfer.json").read_text())
    text = (tmp_path / "table" / "transfer.txt").read_text().splitlines()
    how = {"fit": fit, "pretrain": told["pretrain"], "unlabelled micrographs of 512 px": UNLABELLED}
    note(FIGURES, "table of source 002", {"text": text, "gains": found["gains"], "seconds": seconds, **how})
    assert len(found["cells"]) == len(METHODS) * len(SHARES) * SEEDS
    (gain,) = [g for g in found["gains"] if (g["method"], g["share"]) == ("usregcon", 5)]
    assert len(gain["each"]) == SEEDS
    assert gain["interval"][0] < gain["mean"] < gain["interval"][1]
    assert seconds <= 3600
    assert gain["mean"] > 0, gain

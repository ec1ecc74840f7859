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
import torch
from safetensors.torch import load_file
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from walked import cli, note, stage, toml

from slideflow_ray.cohort import read_cohort
from slideflow_ray.models.unet import Unet
from slideflow_ray.phantoms.files import write_csv
from slideflow_ray.phantoms.tem import CLASSES, MICROSCOPES, draw_micrograph, write_tem_cohort
from slideflow_ray.prepare import to_input
from slideflow_ray.tables import read_table
from slideflow_ray.train.job import IMAGENET_MEAN, IMAGENET_STD

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

The source's lab had 60 unlabelled images for each labelled one.
"""
APART = 0.12
"""By how much podocytes are darker, of greys from 0 to 1: more than their texture (0.07 sd) and noise (0.05)."""


def table_of(
    folder: Path, methods: list[str], shares: list[int], seed: int, apart: float = 0.0, **pretext: str
) -> tuple[dict, dict]:
    """The table by its job, and what to note of it: one micrograph of 128 px of each of 160 patients, 96 for training.

    The recipe was chosen on another cohort (seeds 11 and 12): cells of 384 steps of 4 end before a network tells the
    sides of a wall apart, and after pre-training at lr 1e-3 they came out worse than from random weights.
    """
    drawn = {"images": 1, "nm_per_px": NM, "apart": apart}
    cohort = write_tem_cohort(folder / "tem", patients=160, size_px=(128, 128), seed=seed, **drawn)
    others = write_tem_cohort(folder / "unlabelled", patients=UNLABELLED, size_px=(512, 512), seed=seed + 1, **drawn)
    rows = csv.DictReader(others.read_text().splitlines())
    write_csv(others, [row | {"patient_id": f"u{row['patient_id']}"} for row in rows])  # their names are their own
    fit = {"arguments": {"levels": 4, "width": 8}, "epochs": 18, "batch_size": 2, "lr": 4e-3, "warmup": 1}
    fit["class_weights"] = "balanced"  # else, in so few steps, some seeds find no endothelium at all
    fit["keep"] = "dice"
    settings = training(cohort, 160, 16, **fit)
    told = {"methods": methods, "shares": shares, "seeds": SEEDS, "at_once": 2, "cohort": str(others)}
    told["pretrain"] = {"epochs": 4, "batch_size": 16, "lr": 4e-3, "warmup": 1, "threads": 1}
    if pretext:
        told["pretrain"]["pretext"] = pretext
    (folder / "labels.toml").write_text(toml(settings))
    (folder / "train.toml").write_text(toml(settings | {"transfer": told}))
    _, seconds = stage(folder, str(ROOT / "jobs" / "ultrastructure.py"), "train.toml", "--out", "table")
    found = json.loads((folder / "table" / "transfer.json").read_text())
    text = (folder / "table" / "transfer.txt").read_text().splitlines()
    how = {"fit": fit, "pretrain": told["pretrain"], "unlabelled micrographs of 512 px": UNLABELLED}
    return found, {"text": text, "gains": found["gains"], "seconds": seconds, **how}


def gain_of(found: dict, method: str, share: float) -> dict:
    return next(g for g in found["gains"] if (g["method"], g["share"]) == (method, share))


def test_the_table_of_source_002_at_128_px(tmp_path):
    """Stated, with its interval, within an hour; why the gain is what it is, by `probes`."""
    found, said = table_of(tmp_path, METHODS, SHARES, seed=13)
    note(FIGURES, "table of source 002", said)
    gain = gain_of(found, "usregcon", 5)
    assert len(found["cells"]) == len(METHODS) * len(SHARES) * SEEDS
    assert len(gain["each"]) == SEEDS
    assert gain["interval"][0] < gain["mean"] < gain["interval"][1]
    assert said["seconds"] <= 3600
    cli(tmp_path, "train", "labels.toml")
    pretrained = {name: tmp_path / "work" / "transfer" / name for name in METHODS[1:]}
    known = probes({**pretrained, "all labels": tmp_path / "walls"})
    note(FIGURES, "pixels told by features", known)
    cells = {name: dice["endothelium"] + dice["podocyte"] for name, dice in known.items()}
    assert cells.pop("all labels") > 1.5 * max(cells.values()), cells  # of what tells cells apart none knows much


AT_5 = ["random", "usregcon"], [5]


@pytest.mark.soak  # eleven minutes: pytest -m soak tests/accept/test_ultrastructure.py
def test_pre_training_where_regions_of_one_kind_repel_each_other(tmp_path):
    """The same but for negatives: masked, the semantic loss is soon 0.1, as the prototypes tell regions apart."""
    found, said = table_of(tmp_path, *AT_5, seed=15, negatives="all")
    note(FIGURES, "5 % of the labels, all negatives", said)
    assert len(gain_of(found, "usregcon", 5)["each"]) == SEEDS


@pytest.mark.soak  # eleven minutes: pytest -m soak tests/accept/test_ultrastructure.py
def test_pre_training_where_grey_tells_the_cells_apart(tmp_path):
    """The same but for podocytes, which are darker than endothelium: what a network can find without labels."""
    found, said = table_of(tmp_path, *AT_5, seed=15, apart=APART)
    note(FIGURES, f"5 % of the labels, podocytes darker by {APART}", said)
    assert len(gain_of(found, "usregcon", 5)["each"]) == SEEDS


def probes(networks: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Dice of each class where a linear classifier tells pixels by decoded features, on micrographs of other patients.

    Beside pre-trained networks, one trained with labels and a random one: the grey value, sharp and blurred.
    """
    greys, masks = (np.stack(each) for each in zip(*(probed(patient) for patient in range(36)), strict=True))
    features = {"greys": np.stack([ndimage.gaussian_filter(greys, (0, s, s)) for s in (0, 1, 2, 4, 8)], 1)}
    for name, folder in {"random": None, **networks}.items():
        torch.manual_seed(0)
        net = Unet(len(CLASSES), levels=4, width=8)
        if folder is not None:
            net.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
        x = to_input(
            (255 * np.stack([greys] * 3, -1)).astype(np.uint8), IMAGENET_MEAN, IMAGENET_STD, dtype=torch.float32
        )
        with torch.inference_mode():
            features[name] = (net.train() if folder is None else net.eval()).decode(x)[1].numpy()
    found = {}
    for name, planes in features.items():
        rows = planes.transpose(0, 2, 3, 1)
        seen, other = rows[:24].reshape(-1, rows.shape[-1])[::37], rows[24:].reshape(-1, rows.shape[-1])
        line = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
        line.fit(seen, masks[:24].ravel()[::37])
        values = dice(line.predict(other), masks[24:].ravel())
        found[name] = {one: round(float(value), 3) for one, value in zip(CLASSES[1:], values, strict=True)}
    return found


def probed(patient: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey values in 0..1 by the tool's window, and the mask, of a patient that is in no cohort."""
    at = np.random.default_rng([9, patient])
    how = {"thickness_nm": float(at.uniform(260, 480)), "microscope": MICROSCOPES[patient % 3], "granules": patient % 2}
    one = draw_micrograph((9, patient, 5), (128, 128), NM, **how)
    low, high = np.percentile(one.pixels, [0.5, 99.5])
    return np.clip((one.pixels - low) / (high - low), 0, 1), one.mask

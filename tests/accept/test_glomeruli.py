"""Glomeruli from phantoms to counts per biopsy: found on slides, told apart, in the colours of two scanners.

One cohort: slides of ten patients, and as many crops as source 001 had, of 55, both split 6:2:2 by patient; all that is
trained is trained in the colours of scanner A, and judged on the patients of test, in the colours of A and, the same
tissue, of B. Besides: what colour alone reaches on the crops, which a network must beat by structure, and the four
networks of source 001 side by side. Not part of the tests; `make accept` runs it, and writes its figures to
accept/008-glomeruli.json.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from glomeruli import KINDS, accuracy, counts, detection, only, write_kind, write_run, write_segmentation
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from walked import cli, note, stage

from slideflow_ray.cohort import Item, read_cohort
from slideflow_ray.phantoms import write_glomeruli, write_kidney_cohort

ROOT = Path(__file__).resolve().parent.parent.parent
FIGURES = "008-glomeruli.json"
MILLIONS = {"se-resnet": 17.385, "torchvision:resnet50": 23.52, "torchvision:vgg16": 134.28}
MILLIONS["torchvision:inception_v3"] = 21.79
"""METHODS of 001, for four classes."""
SEED = 8
"""Of the slides: not one on which the normaliser was mended (6) or the classifier found too weak (7)."""
PATIENTS, CROPS = 55, 48
"""Patients with crops, and crops of each: 2,640, where source 001 had 2,658."""


# colour alone


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    """Crops, half of them HE and half PAS, by scanner A."""
    return write_glomeruli(tmp_path_factory.mktemp("crops"), patients=PATIENTS, per_patient=CROPS)


def colours(path: str) -> np.ndarray:
    pixels = np.asarray(Image.open(path)).reshape(-1, 3)
    shares = [np.histogram(pixels[:, c], bins=16, range=(0, 256))[0] / len(pixels) for c in range(3)]
    return np.concatenate([pixels.mean(0), pixels.std(0), *shares])


def colour_alone(items: list[Item]) -> dict[str, float]:
    """Accuracy of a logistic regression fitted on the patients of train and tried on those of test, by stain."""
    seen, labels = np.array([colours(i.uri) for i in items]), np.array([i.label for i in items])
    split, stain = np.array([i.split for i in items]), np.array([i.stain for i in items])
    found = {}
    for name, mine in (("both", stain != ""), ("he", stain == "he"), ("pas", stain == "pas")):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        model.fit(seen[mine & (split == "train")], labels[mine & (split == "train")])
        test = mine & (split == "test")
        found[name] = round(float(model.score(seen[test], labels[test])), 4)
    return found


@pytest.mark.parametrize("scanner", ["A", "B"])
def test_colour_alone_stays_at_or_below_a_half(scanner, tmp_path, crops):
    cohort = crops if scanner == "A" else write_glomeruli(tmp_path, patients=PATIENTS, per_patient=CROPS, scanner="B")
    items = read_cohort(cohort)
    found = colour_alone(items)
    note(FIGURES, f"colour alone, scanner {scanner}", {"accuracy": found, "crops": len(items)})
    assert max(found.values()) <= 0.5, found


# slides


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A folder, and the cohorts by scanner: all patients in A, those of test in B."""
    folder = tmp_path_factory.mktemp("slides")
    cohorts = {
        "A": write_kidney_cohort(folder / "A", patients=10, seed=SEED),
        "B": write_kidney_cohort(folder / "B", patients=10, seed=SEED, scanner="B", splits=["test"]),
    }
    return folder, cohorts


@pytest.fixture(scope="module")
def trained(slides, crops) -> dict[str, float]:
    """Train the segmentation on slides, and a classifier on crops twice; return the seconds of each."""
    folder, cohorts = slides
    paths = trainings(folder, cohorts["A"], strangers(crops, cohorts["A"]))
    return {name: cli(folder, "train", str(path))[1] for name, path in paths.items()}


def strangers(crops: Path, slides: Path) -> Path:
    """Write the crops without the patients whose slides are judged: both cohorts name their patients alike."""
    judged = {item.patient_id for item in read_cohort(slides) if item.split == "test"}
    head, *rows = crops.read_text().splitlines()
    place = head.split(",").index("patient_id")
    path = crops.with_name("strangers.csv")
    path.write_text("\n".join([head, *(row for row in rows if row.split(",")[place] not in judged)]) + "\n")
    assert {item.split for item in read_cohort(path)} == {"train", "val", "test"}
    return path


def trainings(folder: Path, slides: Path, crops: Path) -> dict[str, Path]:
    """Write the settings of all trainings. Tiles of slides overlap by less than in the run, for fewer of them."""
    tile = {"tile_px": 256, "mpp": 2.0, "stride_px": 224}
    light = {"brightness": 0.15, "contrast": 0.15, "saturation": 0, "hue": 0, "noise": 0.01}
    unet = {"epochs": 5, "batch_size": 8, "lr": 4e-3, "augment": light}
    moved = light | {"rotate_deg": 180, "zoom": 0.1, "shift": 0.05}  # boxes that were found are not quite those drawn
    small = {"arguments": {"width": 24}, "epochs": 16, "lr": 2e-3, "augment": moved}
    return {
        "glomeruli": write_segmentation(folder, slides, tile, **unet),
        "normalised": write_kind(folder, crops, "normalised", "vahadane", 96, **small),
        "raw": write_kind(folder, crops, "raw", None, 96, **small),
    }


@pytest.mark.parametrize("scanner", ["A", "B"])
def test_glomeruli_of_unseen_patients_are_found_told_apart_and_counted(scanner, slides, trained):
    folder, cohorts = slides
    cohort = only(cohorts[scanner], "test")
    name = f"run_{scanner}"
    _, seconds = cli(folder, "run", str(write_run(folder, cohort, name, ["normalised", "raw"])))
    names = [f"--name={kind}=glomerulus" for kind in KINDS]
    for command in (["evaluate", name, *names], ["report", name]):
        cli(folder, *command)
    found = detection(folder / name)
    accuracies = {kind: accuracy(found, kind) for kind in ("normalised", "raw")}
    rows = counts(folder / name, cohort.parent / "counts.csv")
    off = max(abs(there - counted) for _, _, counted, there in rows)
    told = {key: found[key] for key in ("slides", "annotated", "found", "matched", "precision", "recall", "f1", "dice")}
    confusion = {one["name"]: one["counts"] for one in found["called"]}
    more = {"accuracy": accuracies, "confusion": confusion, "counts": rows, "counts off by at most": off}
    times = {"seconds of training": trained, "seconds of the run": seconds}
    note(FIGURES, f"slides of test, scanner {scanner}", told | more | times)
    assert found["f1"] >= 0.95
    assert off <= 1
    assert {level for level, *_ in rows} == {"slide", "section", "patient"}
    assert accuracies["normalised"] >= 0.95
    assert scanner == "A" or accuracies["raw"] <= accuracies["normalised"] - 0.05


# the four networks of source 001


def test_the_four_networks_of_the_source_side_by_side(tmp_path):
    """Trained for one epoch on 48 crops: parameters and sizes mean something, accuracies do not."""
    crops = write_glomeruli(tmp_path / "crops", patients=5, per_patient=16, side_px=96)
    path = write_kind(tmp_path, crops, "table1", None, 96, epochs=1, batch_size=16, lr=1e-4)
    said, seconds = stage(tmp_path, str(ROOT / "jobs" / "table1.py"), str(path), "--out", "scored")
    lines = said.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("bundle") and "parameters (M)" in line)
    table = lines[head : head + 1 + len(MILLIONS)]
    millions = {line.split()[1]: float(line.split()[2]) for line in table[1:]}
    remark = "One epoch on 48 crops: the accuracies mean nothing, the parameters and sizes do."
    note(FIGURES, "Table 1 of source 001", {"table": table, "remark": remark, "seconds": seconds})
    assert millions == {name: pytest.approx(value, abs=0.006) for name, value in MILLIONS.items()}

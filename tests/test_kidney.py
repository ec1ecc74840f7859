"""Kidney phantoms: the truth they claim, glomeruli told apart by structure and not by colour."""

from __future__ import annotations

import csv
import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import shapely
from shapely.geometry import shape

from slideflow_ray import cli
from slideflow_ray.cohort import read_cohort
from slideflow_ray.errors import ConfigError
from slideflow_ray.phantoms import kidney, write_glomeruli, write_kidney_cohort
from slideflow_ray.slides import open_slide

SIZE = (2200, 1500)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Three patients, an HE and a PAS section of each."""
    folder = tmp_path_factory.mktemp("kidney")
    return write_kidney_cohort(folder, patients=3, seed=5, size_px0=SIZE, mixed=0.2, sclerosed=0.2, workers=2)


def polygons(folder, row) -> list[tuple[str, shapely.Polygon]]:
    features = json.loads((folder / row["annotation"]).read_text())["features"]
    return [(f["properties"]["classification"]["name"], shape(f["geometry"])) for f in features]


def rows_of(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_cohort_is_one_that_is_read_and_split_by_patient(cohort):
    items = read_cohort(cohort)
    assert [(i.patient_id, i.stain, i.modality, i.section, i.split) for i in items] == [
        (patient, stain, stain, section, split)
        for patient, split in (("K001", "train"), ("K002", "val"), ("K003", "test"))
        for stain, section in (("he", "1"), ("pas", "2"))
    ]
    splits = Counter(kidney.kidney_splits(20))
    assert splits == {"train": 12, "val": 4, "test": 4}
    with pytest.raises(ConfigError, match="3 would do"):
        kidney.kidney_splits(2)


def test_counts_are_those_of_the_polygons_and_sections_hold_the_same_glomeruli(cohort):
    folder = cohort.parent
    counts = {row["slide_id"]: row for row in rows_of(folder / "counts.csv")}
    of_patient = {}
    for row in rows_of(cohort):
        kinds = Counter(name for name, _ in polygons(folder, row))
        said = counts[row["slide_id"]]
        assert {k: int(said[k]) for k in kidney.COLOURS if int(said[k])} == kinds
        assert int(said["glomeruli"]) == kinds.total() >= 4
        assert of_patient.setdefault(row["patient_id"], kinds) == kinds


def test_polygons_are_valid_one_is_cut_by_the_slide_and_two_touch(cohort):
    for row in rows_of(cohort):
        found = [polygon for _, polygon in polygons(cohort.parent, row)]
        assert all(polygon.is_valid for polygon in found)
        assert all(shapely.box(0, 0, *SIZE).covers(polygon) for polygon in found)
        assert sum(polygon.bounds[2] == SIZE[0] for polygon in found) >= 1
        gaps = [a.distance(b) for i, a in enumerate(found) for b in found[:i]]
        assert min(gaps) < 8
        overlaps = [a.intersection(b).area / a.area for i, a in enumerate(found) for b in found[:i]]
        assert max(overlaps) < 0.02
        for polygon in found:
            left, _, right, _ = polygon.bounds
            assert right == SIZE[0] or 110 < (right - left) * 0.5 < 250


def test_a_glomerulus_lies_where_its_polygon_says(cohort):
    """Along the capsule runs the membrane, darkest in green on PAS, and inside of it lies Bowman's space."""
    row = next(r for r in rows_of(cohort) if r["stain"] == "pas")
    with open_slide(str(cohort.parent / row["uri"])) as reader:
        green = reader.read(0, (0, 0), SIZE)[..., 1].astype(float)
    for kind, polygon in polygons(cohort.parent, row):
        if polygon.bounds[2] == SIZE[0] or kind != "Normal":
            continue
        means = [green_along(green, polygon.buffer(offset)) for offset in (-12, 0, 14)]
        assert means[1] < min(means[0], means[2]) - 15


def green_along(green, ring) -> float:
    points = [ring.exterior.interpolate(t, normalized=True) for t in np.linspace(0, 1, 200)]
    return float(np.mean([green[int(p.y), int(p.x)] for p in points]))


def test_the_same_seed_makes_the_same_bytes_and_the_other_scanner_the_same_tissue(tmp_path):
    one = write_kidney_cohort(tmp_path / "a", patients=3, slides_per_patient=1, size_px0=(1300, 900), workers=1)
    two = write_kidney_cohort(tmp_path / "b", patients=3, slides_per_patient=1, size_px0=(1300, 900), workers=2)
    files = sorted(p.relative_to(one.parent) for p in one.parent.rglob("*") if p.is_file())
    assert all((one.parent / f).read_bytes() == (two.parent / f).read_bytes() for f in files)
    shape = {"patients": 3, "slides_per_patient": 1, "size_px0": (1300, 900), "workers": 1}
    other = write_kidney_cohort(tmp_path / "c", scanner="B", splits=["test"], **shape)
    row, (twin,) = rows_of(one)[2], rows_of(other)
    assert row["split"] == twin["split"] == "test"
    assert (row["scanner"], twin["scanner"]) == ("A", "B")
    assert (one.parent / row["annotation"]).read_bytes() == (other.parent / twin["annotation"]).read_bytes()
    pixels = []
    for path, r in ((one, row), (other, twin)):
        with open_slide(str(path.parent / r["uri"])) as reader:
            pixels.append(reader.read(0, (0, 0), (1300, 900)).astype(float))
    assert np.corrcoef(pixels[0][..., 1].ravel(), pixels[1][..., 1].ravel())[0, 1] > 0.9
    assert np.abs(pixels[0].mean((0, 1)) - pixels[1].mean((0, 1))).max() > 15


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Eight patients of twenty-four glomeruli at a third of the usual size."""
    return write_glomeruli(tmp_path_factory.mktemp("crops"), patients=8, per_patient=24, seed=2, side_px=96, workers=1)


def test_every_patient_has_every_kind_on_both_stains(crops):
    items = read_cohort(crops)
    found = Counter((i.patient_id, i.label, i.stain) for i in items)
    assert set(found.values()) == {3}
    assert len(found) == 8 * 4 * 2


def test_colour_alone_does_not_tell_the_kinds_apart(crops):
    """Logistic regression on means, deviations and histograms of the channels, on unseen patients."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    items = read_cohort(crops)
    seen = np.array([colours(i.uri) for i in items])
    labels = np.array([i.label for i in items])
    test = np.array([i.patient_id in ("K006", "K007", "K008") for i in items])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)).fit(seen[~test], labels[~test])
    assert model.score(seen[test], labels[test]) <= 0.5


def colours(path: str) -> np.ndarray:
    from PIL import Image

    pixels = np.asarray(Image.open(path)).reshape(-1, 3)
    shares = [np.histogram(pixels[:, c], bins=16, range=(0, 256))[0] / len(pixels) for c in range(3)]
    return np.concatenate([pixels.mean(0), pixels.std(0), *shares])


def code_of(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code or 0


def test_the_command_line_chooses_the_kinds(tmp_path, capsys, monkeypatch):
    made = partial(write_glomeruli, per_patient=6, side_px=32, workers=1)
    monkeypatch.setattr("slideflow_ray.phantoms.write_glomeruli", made)
    given = ["--kind", "glomeruli", "--patients", "3", "--kinds", "Normal, FSG+CGN,GS"]
    assert code_of(["phantoms", str(tmp_path / "crops"), *given]) == 0
    labels = Counter(row["label"] for row in rows_of(tmp_path / "crops" / "cohort.csv"))
    assert labels == {"Normal": 6, "FSG+CGN": 6, "GS": 6}
    sections = partial(write_kidney_cohort, slides_per_patient=1, size_px0=(1400, 1000), workers=1)
    monkeypatch.setattr("slideflow_ray.phantoms.write_kidney_cohort", sections)
    assert code_of(["phantoms", str(tmp_path / "k"), "--kind", "kidney", "--patients", "3", "--kinds", "GS"]) == 0
    for row in rows_of(tmp_path / "k" / "cohort.csv"):
        assert {name for name, _ in polygons(tmp_path / "k", row)} == {"GS"}
    capsys.readouterr()
    assert code_of(["phantoms", str(tmp_path / "no"), "--kind", "kidney", "--kinds", "Norml"]) == 2
    assert "FSG+CGN, GS" in capsys.readouterr().err
    assert code_of(["phantoms", str(tmp_path / "no"), "--kinds", "GS"]) == 2

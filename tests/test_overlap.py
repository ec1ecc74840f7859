"""Masks against annotated ones: pixel by pixel against scikit-learn, boundaries against the whole image's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shapely
import sklearn.metrics as sk
from cascaded import SIZE, circle, grid_of_discs, run_cascade, write_cohort
from segmenters import CLASSES, disc

from slideflow_ray import overlap as overlap_module
from slideflow_ray.annotations import Region
from slideflow_ray.evaluate import evaluate
from slideflow_ray.membrane import assd, boundary_f, hd95
from slideflow_ray.metrics import rate_interval
from slideflow_ray.overlap import compare_planes
from slideflow_ray.report import write_report
from slideflow_ray.results import OVERLAP, read_evaluation
from slideflow_ray.store import SlideStore
from slideflow_ray.tables import read_table
from slideflow_ray.train.masks import draw
from slideflow_ray.train.transfer import _counted

N = 6
NM = 500.0


def wrong(d, i):
    """A disc as it is drawn by hand: a little off, by slide."""
    colour, x, y, r = d
    return (colour, x + 2 * (i % 3), y - i % 2, r + i % 4)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Cyan everywhere, magenta in every second slide; test1 has none annotated; one is annotated for others only."""
    folder = tmp_path_factory.mktemp("overlap")
    slides, drawn = {}, {}
    for i, split in enumerate(["test"] * N + ["val"]):
        name = f"{split}{i}"
        slides[name] = (grid_of_discs(5 + i, i % 2), {"patient_id": f"P{i // 2}x{i % 5}", "split": split})
        drawn[name] = [circle(wrong(d, i), d[0]) for d in slides[name][0] if not (i == 1 and d[0] == "magenta")]
    slides["other"] = (grid_of_discs(3), {"patient_id": "P9", "split": "test"})
    drawn["other"] = [circle(slides["other"][0][0], "tubulus")]
    out = run_cascade(folder, write_cohort(folder, slides, drawn))
    evaluate(out, resamples=200)
    return out


def planes(out: Path, i: int) -> tuple[np.ndarray, np.ndarray]:
    """The plane and what was drawn, by pixel centres."""
    store = SlideStore(out, f"test{i}")
    found = store.read_plane(f"{store.nodes('planes')[0]}/0")
    truth = np.zeros(found.shape, np.uint8)
    for d in grid_of_discs(5 + i, i % 2):
        if not (i == 1 and d[0] == "magenta"):
            truth[disc(SIZE, *wrong(d, i)[1:])] = CLASSES.index(d[0])
    return found, truth


def test_each_slide_is_scikit_learn_s_f1_and_jaccard_of_pixels(out):
    rows = {(r["slide_id"], r["class"]): r for r in read_table(out / "overlap.parquet")}
    assert {slide for slide, _ in rows} == {*(f"test{i}" for i in range(N)), "val6"}
    for i in range(N):
        found, truth = planes(out, i)
        for value, name in enumerate(CLASSES[1:], 1):
            row, one, other = rows[f"test{i}", name], found == value, truth == value
            if not one.any() and not other.any():
                assert (row["dice"], row["iou"], row["hd95_nm"]) == (None, None, None)
                continue
            assert row["dice"] == pytest.approx(sk.f1_score(other.ravel(), one.ravel()), abs=0.01)  # 128 corners
            assert row["iou"] == pytest.approx(sk.jaccard_score(other.ravel(), one.ravel()), abs=0.01)
            if other.any():
                assert row["hd95_nm"] == pytest.approx(hd95(one, other, NM), abs=NM)
                assert row["assd_nm"] == pytest.approx(assd(one, other, NM), rel=0.1, abs=50)
                assert row["boundary_f"] == pytest.approx(boundary_f(one, other, 2 * NM, NM), abs=0.05)
            else:
                assert (row["dice"], row["hd95_nm"], row["boundary_f"]) == (0.0, None, 0.0)
            assert row["tolerance_nm"] == 2 * NM


def test_the_cohort_is_the_mean_over_slides_with_patients_resampled(out):
    for name in CLASSES[1:]:
        (result,) = [o for o in read_evaluation(out).overlaps if (o.split, o.class_name) == ("test", name)]
        rows = [r for r in read_table(out / "overlap.parquet") if (r["split"], r["class"]) == ("test", name)]
        dice = [r["dice"] for r in rows if r["dice"] is not None]
        assert result.dice.mean == pytest.approx(np.mean(dice))
        assert result.dice.sd == pytest.approx(np.std(dice, ddof=1))
        assert (result.slides, result.nowhere, result.one_sided) == (N, N - len(dice), int(name == "magenta"))
        patients = sorted({r["patient_id"] for r in rows if r["dice"] is not None})
        each = [[r["dice"] for r in rows if r["patient_id"] == p and r["dice"] is not None] for p in patients]
        wanted = rate_interval([sum(e) for e in each], [len(e) for e in each], resamples=200)
        assert result.dice.interval == (None if wanted is None else pytest.approx(wanted))
        assert result.patients == len(patients)
        distances = [r["hd95_nm"] for r in rows if r["hd95_nm"] is not None]
        assert result.hd95_nm.mean == pytest.approx(np.mean(distances))
        assert result.hd95_nm.slides == len(distances)
        assert f"{name}, test, by pixel: Dice {np.mean(dice):.3f}" in result.sentence


def test_bands_add_up_and_boundaries_of_large_planes_are_left_out(monkeypatch):
    rng = np.random.default_rng(0)
    plane = rng.integers(0, 3, (90, 70)).astype(np.uint8)
    shape = circle(("cyan", 40.0, 30.0, 21.0))["geometry"]
    shapes = {"b": (1, shapely.geometry.shape(shape)), "c": (2, shapely.box(10, 10, 50.2, 40.7))}
    whole = compare_planes(plane, 0.008, shapes, 0.5)
    monkeypatch.setattr(overlap_module, "BAND", 7)
    assert compare_planes(plane, 0.008, shapes, 0.5) == whole
    assert whole["c"].annotated == (70 - 20) * round(30.7 * 2)  # cut at the plane's edge
    assert whole["b"].surface.hd95 > 0
    monkeypatch.setattr(overlap_module, "SURFACE_PX", 90 * 70 - 1)
    large = compare_planes(plane, 0.008, shapes, 0.5)
    assert (large["b"].both, large["b"].surface) == (whole["b"].both, None)


def test_the_strip_is_left_out_and_what_is_off_the_tissue_is_not_found(monkeypatch):
    rng = np.random.default_rng(1)
    plane = rng.integers(0, 2, (90, 70)).astype(np.uint8)
    plane[:6], plane[70:], plane[30:40] = 255, 255, 255
    shapes = {"b": (1, shapely.box(5, 0, 30, 45))}
    found = compare_planes(plane, 0.008, shapes, 0.5, (0, 3, 35, 35))["b"]
    truth = np.zeros(plane.shape, bool)
    truth[:, 10:60] = True
    window = np.s_[6:70]
    one, other = plane[window] == 1, truth[window]
    assert (found.found, found.annotated) == (one.sum(), other.sum())
    assert found.dice == pytest.approx(sk.f1_score(other.ravel(), one.ravel()))
    assert (found.surface.hd95, found.surface.assd) == (hd95(one, other, 8.0), assd(one, other, 8.0))
    monkeypatch.setattr(overlap_module, "BAND", 7)
    assert compare_planes(plane, 0.008, shapes, 0.5, (0, 3, 35, 35))["b"] == found


def test_the_strip_counts_as_in_training():
    """The truth of training's tiles has 255 where the strip is, which `dice_of` leaves out; by halves of rows too."""
    rng = np.random.default_rng(2)
    for px0, kept in ((0.5, (0, 0, 32, 21)), (2.0, (0, 5, 128, 93)), (0.8, (0, 3, 51.2, 37))):
        plane = rng.integers(0, 2, (64, 64)).astype(np.uint8)
        shape = shapely.box(4 * px0, 0, 40 * px0, 64 * px0)
        xy, wh = np.array([[0, 0]]), np.array([[64 * px0, 64 * px0]])
        truth = draw([Region("b", shape)], ("a", "b"), xy, wh, 64, (10**6, 10**6), kept)
        scored = np.where(truth[0] == 255, 255, plane)  # as a run leaves the plane
        card = SimpleNamespace(halo=0, n_classes=2)
        both, found, annotated = _counted(card, plane[None], truth)[1].tolist()
        pair = compare_planes(scored, 0.008, {"b": (1, shape)}, px0, kept)["b"]
        assert (pair.both, pair.found, pair.annotated) == (both, found, annotated)


def test_the_report_has_it_and_another_evaluation_takes_it_away(out):
    page = write_report(out).read_text()
    assert "Compared pixel by pixel" in page
    assert "HD95" in page
    before = {name: (out / name).read_bytes() for name in OVERLAP}
    evaluate(out, resamples=200)
    assert {name: (out / name).read_bytes() for name in OVERLAP} == before

"""From kidney phantoms to a report, small: segment, cascade, counts. At full size: tests/accept/test_glomeruli.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from glomeruli import KINDS, accuracy, counts, detection, only, write_kind, write_run, write_segmentation

from slideflow_ray import cli
from slideflow_ray.phantoms import write_glomeruli, write_kidney_cohort
from slideflow_ray.tables import read_table


def command(*given: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(given))
    assert not ended.value.code, given


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, Path]:
    """The results of a run on the slides of two patients, and counts.csv; what ran was trained on three others."""
    folder = tmp_path_factory.mktemp("glomeruli")
    shape = {"patients": 5, "size_px0": (1800, 1300), "mpp0": 1.0, "seed": 1, "workers": 2}
    cohort = write_kidney_cohort(folder / "slides", **shape)
    crops = write_glomeruli(folder / "crops", patients=5, per_patient=24, side_px=64, workers=2)
    fixed = {"threads": 1, "device": "cpu", "precision": "fp32"}
    fixed["augment"] = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "noise": 0}
    unet = {"arguments": {"levels": 2, "width": 6}, "epochs": 6, "batch_size": 8, "lr": 1e-2}
    small = {"arguments": {"width": 16}, "epochs": 25, "batch_size": 16, "lr": 4e-3}
    command("train", str(write_segmentation(folder, cohort, {"tile_px": 112, "mpp": 4.0}, **unet, **fixed)))
    command("train", str(write_kind(folder, crops, "kinds", "vahadane", 64, **small, **fixed)))
    command("run", str(write_run(folder, only(cohort, "val", "test"), "results", ["kinds"])))
    names = [f"--name={kind}=glomerulus" for kind in KINDS]  # the segmentation's; kinds has its own
    command("evaluate", str(folder / "results"), *names)
    command("report", str(folder / "results"))
    return folder / "results", folder / "slides" / "counts.csv"


@pytest.mark.slow
def test_glomeruli_are_found_told_apart_and_counted(results):
    out, truth = results
    found = detection(out)
    assert (found["slides"], found["patients"]) == (2, 1)
    assert found["f1"] > 0.8
    assert found["dice"] > 0.7
    assert accuracy(found, "kinds") > 0.45  # 0.25 by chance
    rows = counts(out, truth)
    assert [level for level, *_ in rows] == ["slide"] * 4 + ["section"] * 4 + ["patient"] * 2
    assert max(abs(counted - there) for *_, counted, there in rows) <= 2
    for row in read_table(out / "counts.parquet"):
        assert sum(row[f"n_kinds_{kind}"] for kind in KINDS) == row["objects"]


def test_the_report_shows_the_kinds_and_says_once_what_is_missing(results):
    out = results[0]
    page = (out / "report.html").read_text()
    assert "Objects: glomeruli" in page
    assert page.count("data:image/jpeg") >= sum(r["objects"] for r in read_table(out / "counts.parquet")[:4])
    notes = json.loads((out / "confusion.json").read_text())["notes"]
    said = [note for note in notes if note.startswith("kinds") and "operating point" in note]
    assert said == ["kinds: no operating points by slide and patient, as no slide has a label."]

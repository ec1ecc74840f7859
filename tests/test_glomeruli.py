"""From kidney phantoms to a report, small: segment, cascade, counts. At full size: tests/accept/test_glomeruli.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from glomeruli import KINDS, accuracy, counts, detection, write_kind, write_run, write_segmentation

from slideflow_ray import cli
from slideflow_ray.phantoms import write_glomeruli, write_kidney_cohort
from slideflow_ray.tables import read_table


def command(*given: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(given))
    assert not ended.value.code, given


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The results of a run on the slides of five patients, all of it trained here, in scanner A's colours."""
    folder = tmp_path_factory.mktemp("glomeruli")
    shape = {"patients": 5, "size_px0": (1800, 1300), "mpp0": 1.0, "seed": 1, "workers": 1}
    cohort = write_kidney_cohort(folder / "slides", **shape)
    crops = write_glomeruli(folder / "crops", patients=5, per_patient=24, side_px=64, workers=1)
    fixed = {"threads": 1, "device": "cpu", "precision": "fp32"}
    plain = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "noise": 0}
    unet = {"arguments": {"levels": 2, "width": 6}, "epochs": 6, "batch_size": 8, "lr": 1e-2, "augment": plain}
    command("train", str(write_segmentation(folder, cohort, 112, 4.0, **unet, **fixed)))
    small = {"arguments": {"width": 16}, "epochs": 25, "batch_size": 16, "lr": 4e-3, "augment": plain}
    command("train", str(write_kind(folder, crops, "kinds", "vahadane", 64, **small, **fixed)))
    command("run", str(write_run(folder, cohort, "results", ["kinds"])))
    command("evaluate", str(folder / "results"), *(f"--name={kind}=glomerulus" for kind in KINDS))
    command("report", str(folder / "results"))
    return folder


@pytest.mark.slow
def test_glomeruli_are_found_told_apart_and_counted(results):
    found = detection(results / "results")
    print(found)
    assert found["f1"] > 0.8
    assert accuracy(found, "kinds") > 0.5

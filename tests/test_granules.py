"""Granules in micrographs: three models as bundles like any other, joined on unseen patients, repeated by patient."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from slideflow_ray.errors import ConfigError
from slideflow_ray.models.bundle import load_weights, read_card
from slideflow_ray.models.networks import load_network
from slideflow_ray.phantoms.tem import write_tem_cohort
from slideflow_ray.train.job import prepare, train
from slideflow_ray.train.spec import TrainJob

CLASSES = ("none", "granule")
SIDE = 64
FIRST = {"depth": [1, 1, 1, 1], "widths": [8, 16, 24, 32]}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("micrographs")
    return write_tem_cohort(folder, patients=20, images=3, size_px=(SIDE, SIDE), nm_per_px=24.0, workers=1)


def job_of(cohort: Path, out: Path, name: str = "c", **settings) -> TrainJob:
    fit = {"epochs": 1, "batch_size": 16, "threads": 1, "device": "cpu", "precision": "fp32", "augment": False}
    values = {
        "cohort": str(cohort),
        "out": str(out / name),
        "work": str(out / "work"),
        "classes": CLASSES,
        "whole": {"tile_px": SIDE, "fit": "squash"},
        "executor": {"workers": 1},
        **settings,
        "fit": {**fit, **settings.get("fit", {})},
    }
    return TrainJob.parse(values, "test")


TWO = {
    "architecture": "two-models",
    "arguments": {"first": "torchvision:resnet18", "second": {"backbone": "torchvision:resnet18"}},
    "machine": {"folds": 2, "kernels": ["linear"]},
}


@pytest.fixture(scope="module")
def joined(cohort, tmp_path_factory):
    out, said = tmp_path_factory.mktemp("joined"), []
    return out, train(job_of(cohort, out, fit=TWO), said.append), said


def test_one_training_leaves_three_bundles(joined):
    out, result, said = joined
    print(json.loads((result.bundle / "training.json").read_text())["join"])
    print(sorted(p.name for p in (out / "work" / "parts").iterdir()))
    print(result.summary())
    assert read_card(result.bundle).architecture == "two-models"

"""Glomeruli at full size: what colour alone reaches on their crops, which a network must beat by structure.

Not part of the tests; `make accept` runs it, and writes its figures to accept/008-glomeruli.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from slideflow_ray.cohort import read_cohort
from slideflow_ray.phantoms import write_glomeruli

FIGURES = Path(__file__).resolve().parent.parent.parent / "accept" / "008-glomeruli.json"


def note(name: str, figures: dict) -> None:
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    FIGURES.parent.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(known | {name: figures}, indent=1) + "\n")


def colours(path: str) -> np.ndarray:
    pixels = np.asarray(Image.open(path)).reshape(-1, 3)
    shares = [np.histogram(pixels[:, c], bins=16, range=(0, 256))[0] / len(pixels) for c in range(3)]
    return np.concatenate([pixels.mean(0), pixels.std(0), *shares])


@pytest.mark.parametrize("scanner", ["A", "B"])
def test_colour_alone_stays_at_or_below_a_half(scanner, tmp_path):
    """Logistic regression over both stains, fitted on the patients of train and tried on those of test."""
    items = read_cohort(write_glomeruli(tmp_path, patients=25, per_patient=48, scanner=scanner))
    seen, labels = np.array([colours(i.uri) for i in items]), np.array([i.label for i in items])
    split = np.array([i.split for i in items])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    model.fit(seen[split == "train"], labels[split == "train"])
    accuracy = model.score(seen[split == "test"], labels[split == "test"])
    note(f"colour alone, scanner {scanner}", {"accuracy": round(float(accuracy), 4), "crops": len(items)})
    assert accuracy <= 0.5

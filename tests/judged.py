"""A small cohort that networks can be judged on: tiles of two brightnesses, six patients, and networks that see it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch

from slideflow_ray.models.bundle import BundleCard, write_bundle
from slideflow_ray.models.networks import build
from slideflow_ray.phantoms import write_pyramid

SIDE, TILES = 32, 6
CLASSES = ("normal", "tumor")


def write_cohort(folder: Path, patients: int = 6, splits: tuple[str, ...] = ("val",)) -> Path:
    """A slide of 6 x 6 tiles for each patient; half of it is tumour where the patient's number is even."""
    rng, rows = np.random.default_rng(7), []
    for split in splits:
        for number in range(patients):
            name, tumour = f"{split}{number}", number % 2 == 0
            pixels = rng.integers(60, 196, (SIDE * TILES, SIDE * TILES, 3))
            # each tile has its own brightness, a little more in tumour: an AUC between 0.5 and 1
            shift = np.kron(rng.normal(0, 12, (TILES, TILES)), np.ones((SIDE, SIDE)))[..., None]
            shift[:, : SIDE * TILES // 2] += 16 * tumour
            pixels = np.clip(pixels + shift, 0, 255).astype(np.uint8)
            write_pyramid(folder / f"{name}.tif", [pixels], 0.5, tile=64)
            half, whole = SIDE * TILES // 2, SIDE * TILES
            ring = [[-1, -1], [half, -1], [half, whole + 1], [-1, whole + 1], [-1, -1]]
            feature = {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "annotation", "classification": {"name": "tumor"}},
            }
            marks = {"type": "FeatureCollection", "features": [feature] if tumour else []}
            (folder / f"{name}.geojson").write_text(json.dumps(marks))
            rows.append([name, f"{name}.tif", f"P{name}", split, CLASSES[tumour], f"{name}.geojson", "tem"])
    path = folder / "cohort.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "uri", "patient_id", "split", "label", "annotation", "modality"])
        writer.writerows(rows)
    return path


def bundle(
    folder: Path, *, gain: float = 1.0, noise: float = 0.0, tile_px: int = SIDE, classes: tuple[str, ...] = CLASSES
) -> Path:
    """A network that measures brightness, by hand. `gain` scales its logits (below 0 it is wrong).

    `noise` towards 1 has it look at less: at single pixels, their red less their green times `noise`.
    """
    net = build("small-cnn", {"width": 4}, len(classes)).eval()
    state = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    for key, value in state.items():
        if key.endswith("running_var") or (key.endswith("1.weight") and value.ndim == 1):
            value.fill_(1)
        elif value.ndim == 4:
            value[0, 0, value.shape[2] // 2, value.shape[3] // 2] = 1
    stem = state["features.0.0.weight"]
    if noise:
        stem[0, 1, 3, 3] = -noise
    else:
        stem[0] = 1 / (3 * 49)
    state["features.0.1.bias"][0] = 1  # nothing is below 0, so no ReLU cuts
    net.load_state_dict(state)
    with torch.inference_mode():
        grey = torch.tensor([127.5, 143.5]).reshape(2, 1, 1, 1).expand(2, 3, tile_px, tile_px) / 255
        dark, light = net.features(grey).mean((2, 3))[:, 0].tolist()
    slope = 2 * gain * (1 - noise) / (light - dark)
    state["head.weight"][1, 0], state["head.bias"][1] = slope, -slope * (dark + light) / 2 - gain
    card = BundleCard(
        name=folder.name,
        task="classify",
        architecture="small-cnn",
        arguments={"width": 4},
        classes=classes,
        tile_px=tile_px,
        mpp=0.5,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        precision="fp32",
    )
    return write_bundle(folder, card, state)

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
    """A network that measures brightness: `gain` scales its logits (negative: it is wrong), `noise` spoils it."""
    torch.manual_seed(0)
    net = build("small-cnn", {"width": 4}, len(classes)).eval()
    shift = torch.linspace(-40, 60, 64)
    noise_ = torch.randint(60, 196, (64, 3, tile_px, tile_px)).float()
    with torch.inference_mode():
        features = net.features((noise_ + shift[:, None, None, None]) / 127.5 - 1).mean((2, 3)).double()
        base = torch.cat([features, torch.ones(64, 1)], 1)
        wanted = base.T @ (shift.double() / 10 - 0.8)
        weights = torch.linalg.solve(base.T @ base + 1e-4 * torch.eye(base.shape[1]).double(), wanted)
    weights = weights.clone()
    state = net.state_dict()
    weights[:-1] += noise * torch.randn(len(weights) - 1).double()
    head = torch.zeros(len(classes), len(weights)).double()
    head[1] = gain * weights
    state["head.weight"], state["head.bias"] = head[:, :-1].float(), head[:, -1].float()
    card = BundleCard(
        name=folder.name,
        task="classify",
        architecture="small-cnn",
        arguments={"width": 4},
        classes=classes,
        tile_px=tile_px,
        mpp=0.5,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        precision="fp32",
    )
    return write_bundle(folder, card, state)

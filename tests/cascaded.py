"""A cascade with known answers: discs are found by their colour, and each is called light or dark by its own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import shapely
import torch
from segmenters import write_colours, write_discs

from slideflow_ray.models.bundle import BundleCard, write_bundle
from slideflow_ray.models.networks import build
from slideflow_ray.run import run
from slideflow_ray.specs import RunSpec

SIZE = (451, 300)
KIND = {"cyan": "light", "magenta": "dark"}
"""What each colour is called by the second model."""

Disc = tuple[str, float, float, float]


def write_kind(folder: Path, name: str, classes: tuple[str, ...] = ("light", "dark"), task: str = "classify") -> Path:
    """Write a model of objects whose second class is a dark green channel: magenta is, cyan is not."""
    card = BundleCard(
        name=name, task=task, architecture="small-cnn", arguments={"width": 4}, classes=classes,
        tile_px=32, whole="squash", mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    net = build("small-cnn", {"width": 4}, len(classes))
    with torch.no_grad():
        for key, values in net.named_parameters():
            values.fill_(1.0 if key.endswith(".1.weight") else 0.0)
        for conv in (m for m in net.modules() if isinstance(m, torch.nn.Conv2d)):
            middle = conv.kernel_size[0] // 2
            conv.weight[0, 0, middle, middle] = 1.0
        net.features[0][0].weight.zero_()[0, 1, 3, 3] = -1.0
        net.head.weight[1, 0] = 20.0
        net.head.bias[1] = -4.0
        if task == "multilabel":
            net.head.bias[0] = 1.0  # the first is always called
    return write_bundle(folder / name, card, net.state_dict())


def grid_of_discs(n: int, dark: int = 0) -> list[Disc]:
    """Return n discs that do not touch, the first `dark` of them magenta."""
    places = [(x, y) for y in (45.0, 120.0, 195.0) for x in (50.0, 130.0, 210.0, 290.0, 370.0)]
    return [("magenta" if i < dark else "cyan", *places[i], 22.0 + i % 4) for i in range(n)]


def circle(disc: Disc, name: str | None = None, shift: float = 0.0) -> dict:
    """A QuPath feature around a disc."""
    colour, x, y, r = disc
    ring = shapely.Point(x + shift, y).buffer(r, quad_segs=32)
    properties = {"objectType": "annotation", "classification": {"name": name or KIND[colour]}}
    return {"type": "Feature", "geometry": shapely.geometry.mapping(ring), "properties": properties}


def write_cohort(
    folder: Path, slides: dict[str, tuple[list[Disc], dict[str, str]]], annotated: dict[str, list[dict]] | None = None
) -> Path:
    """Write slides of discs, name -> (discs, columns of the cohort), and annotations of some."""
    columns = ["slide_id", "uri", "modality", "patient_id", "split", "stain", "section", "annotation"]
    for name, (discs, _) in slides.items():
        write_discs(folder / f"{name}.tif", SIZE, discs)
        if annotated and name in annotated:
            features = {"type": "FeatureCollection", "features": annotated[name]}
            (folder / f"{name}.geojson").write_text(json.dumps(features))
    with (folder / "cohort.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for name, (_, more) in slides.items():
            row = {"slide_id": name, "uri": f"{name}.tif", "modality": "tem", **more}
            if annotated and name in annotated:
                row["annotation"] = f"{name}.geojson"
            writer.writerow(row)
    return folder / "cohort.csv"


def run_cascade(folder: Path, cohort: Path, *kinds: str, **settings) -> Path:
    """Run the segmentation of discs and the named models on its objects; return the output folder."""
    if not (folder / "discs").exists():
        write_colours(folder)
    models = [{"path": str(folder / "discs"), "objects": {"min_area_um2": 10.0}}]
    models += [{"path": str(folder / kind), "on": "objects:discs", "margin": 0.1} for kind in kinds]
    values = {"cohort": str(cohort), "out": str(folder / "out"), "model": models, "executor": {"workers": 1}}
    result = run(RunSpec.parse(values | settings, "test"))
    assert result.counts["done"] == len(result.ended)
    return folder / "out"

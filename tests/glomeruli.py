"""The path from kidney phantoms to counts and a report as a user walks it: settings in files, one command a stage."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from walked import toml

from slideflow_ray.tables import read_table

KINDS = ["Normal", "MsPGN", "FSG", "CGN"]


def only(cohort: Path, *splits: str) -> Path:
    """Write a cohort of some splits beside the whole one."""
    head, *rows = cohort.read_text().splitlines()
    place = head.split(",").index("split")
    path = cohort.with_name(f"{'_'.join(splits)}.csv")
    path.write_text("\n".join([head, *(row for row in rows if row.split(",")[place] in splits)]) + "\n")
    return path


def write_segmentation(folder: Path, cohort: Path, tile: Mapping[str, Any], **fit: Any) -> Path:
    """Write glomeruli.toml, a training of a small U-Net; every kind is a glomerulus."""
    network = {"architecture": "unet", "arguments": {"levels": 3, "width": 8}, "class_weights": "none"}
    values = {
        "cohort": str(cohort),
        "out": "glomeruli",
        "classes": ["background", "glomerulus"],
        "task": "segment",
        "stain": "vahadane",
        "tile": tile,
        "labels": {"names": dict.fromkeys(KINDS, "glomerulus")},
        "fit": network | fit,
    }
    path = folder / "glomeruli.toml"
    path.write_text(toml(values))
    return path


def write_kind(folder: Path, cohort: Path, name: str, stain: str | None, side_px: int, **fit: Any) -> Path:
    """Write NAME.toml, a training of a small network on crops of glomeruli, with or without stain normalisation."""
    values = {
        "cohort": str(cohort),
        "out": name,
        "classes": KINDS,
        "whole": {"tile_px": side_px, "fit": "squash"},
        "fit": {"architecture": "small-cnn", **fit},
        **({"stain": stain} if stain else {}),
    }
    path = folder / f"{name}.toml"
    path.write_text(toml(values))
    return path


def write_run(folder: Path, cohort: Path, name: str, kinds: Sequence[str]) -> Path:
    """Write NAME.toml, a run of the segmentation and of models of kinds on its objects; its results go to NAME."""
    found = {"path": "glomeruli", "objects": {"split": True, "min_area_um2": 5000}}
    judges = [{"path": kind, "on": "objects:glomeruli", "margin": 0.1} for kind in kinds]
    values = {"cohort": str(cohort), "out": name, "model": [found, *judges]}
    path = folder / f"{name}.toml"
    path.write_text(toml(values))
    return path


def detection(out: Path) -> dict[str, Any]:
    """What detection.json says of test."""
    (found,) = [d for d in json.loads((out / "detection.json").read_text())["detection"] if d["split"] == "test"]
    return found


def accuracy(found: Mapping[str, Any], name: str) -> float:
    """The accuracy of a model over the matched objects."""
    (called,) = [one for one in found["called"] if one["name"] == name]
    return float(called["accuracy"])


def counts(out: Path, truth: Path) -> list[tuple[str, str, int, int]]:
    """Level, who, objects counted and glomeruli there, for each row of counts.parquet; `truth` is counts.csv."""
    with truth.open(newline="") as file:
        there = {row["slide_id"]: int(row["glomeruli"]) for row in csv.DictReader(file)}
    rows = read_table(out / "counts.parquet")
    return [(r["level"], r["slide_id"], r["objects"], there[r["slide_id"]]) for r in rows]

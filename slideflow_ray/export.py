"""Results as files that other tools open: QuPath's GeoJSON, Parquet, CSV, OME-Zarr, OME-TIFF, crops.

Everything is in px0 (level-0 pixels), as QuPath and WSInfer have it, and comes from the stores alone but for
crops, which are read from the slide. What is written depends on nothing but the run: equal runs, equal bytes.
Layout: ``<folder>/<what>/<model>/<slide>...``, the folder being the run's own unless told otherwise.
"""

from __future__ import annotations

import csv
import io
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely
from PIL import Image

from slideflow_ray import accounting, aggregate, storage
from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError
from slideflow_ray.planes import Objects, objects_node, read_objects
from slideflow_ray.results import Evaluation, OperatingPoint, read_current
from slideflow_ray.slides import open_slide
from slideflow_ray.specs import OBJECTS, ObjectSpec
from slideflow_ray.store import SlideStore, folder_name
from slideflow_ray.tables import Columns, read_table, write_table
from slideflow_ray.texts import safe_cell, safe_row

To = Literal["geojson", "parquet", "csv", "ome-zarr", "ome-tiff", "crops"]

SPACE = uuid.UUID("8f1f6f0e-6a55-5b1c-9d6a-2f6d0c7a51a4")
"""The namespace of ids: the same object of the same run has the same id in every export."""

COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
"""Colours of classes, the background aside (M. Okabe and K. Ito, 2008), over and over."""

JPEG_QUALITY = 92


@dataclass(frozen=True)
class Scored:
    """One model's results on one grid of one slide. `item` of the cohort, `model` of run.json with its settings.

    `point` are its operating points by tile, by class; `labels` the node that holds its tiles' labels, if any.
    """

    store: SlideStore
    item: Item
    grid: str
    model: Mapping[str, Any]
    point: Mapping[str, OperatingPoint]
    labels: str = ""

    @property
    def node(self) -> str:
        """The model's name in the store."""
        return str(self.model["node"])

    @property
    def classes(self) -> list[str]:
        """The model's classes."""
        return list(self.model["classes"])

    def margins(self) -> npt.NDArray[np.float32]:
        """The margins of the grid's rows, (N, C)."""
        return self.store.read(f"scores/{self.grid}/{self.node}")

    def boxes(self) -> npt.NDArray[np.int64]:
        """The grid's boxes, (N, 4): x, y, width, height in px0."""
        xy, wh = (self.store.read(f"grids/{self.grid}/{name}") for name in ("xy_px0", "wh_px0"))
        return np.hstack([xy, wh.astype(np.int64)])

    def called(self, margins: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Return the class each row is called, -1 for none: at the operating point, else at a probability of 0.5.

        With two classes only the second is called. Where several are, the one furthest above its threshold.
        """
        over = np.full(margins.shape, -np.inf, np.float64)
        for c, name in list(enumerate(self.classes))[1 if self.model["task"] == "classify" else 0 :]:
            threshold = self.point[name].threshold if name in self.point else 0.0
            over[:, c] = np.where(margins[:, c] >= np.float32(threshold), margins[:, c] - threshold, -np.inf)
        return np.where(np.isfinite(over).any(axis=1), over.argmax(axis=1), -1)

    def objects(self) -> Objects:
        """A segmentation's objects."""
        spec = ObjectSpec.model_validate(self.model["spec"]["objects"])
        return read_objects(self.store, objects_node(self.grid, self.node, spec))


@dataclass
class Exported:
    """What an export has written. `notes` say what was left out."""

    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"files": [str(path) for path in self.files], "notes": self.notes}


def export(
    out: str | Path,
    to: To,
    *,
    slides: Sequence[str] = (),
    models: Sequence[str] = (),
    folder: str | Path | None = None,
) -> Exported:
    """Write what a run has found, by slide and model; files that are there are replaced as a whole.

    slides, models : ids of the cohort and names of bundles, all if empty. folder : where to, the run's own if None.
    A run that has not ended gives what is committed, and a note says so.

    Raises ConfigError (no run, an unknown slide or model, nothing to export), CorruptStore, SlideError (crops).
    """
    out = storage.place(out)
    record = accounting.read_run(out)
    _check_known(record, slides, models)
    writer = WRITERS[to]
    found = Exported()
    if not record["finished"]:
        found.notes.append("The run has not ended: this is what was committed so far.")
    current = read_current(out, record)
    if current.evaluation is None and current.stale:
        found.notes.append(f"Operating points and labels are left out, as they were {current.stale}.")
    goal = storage.place(folder) if folder else out
    for scored in _scored(out, record, slides, models, current.evaluation):
        found.files += writer(scored, goal)
    if to in ("parquet", "csv"):
        found.files += _images(out, record, slides, models, to, goal)
    if not found.files:
        raise ConfigError(f"There is nothing in {out} to export to {to}.", next_step=NEEDS[to])
    return found


NEEDS = {
    "geojson": "GeoJSON needs scored tiles, or a segmentation.",
    "parquet": "Tables need scored tiles or images.",
    "csv": "Tables need scored tiles or images.",
    "ome-zarr": "Pictures need heatmaps of scored tiles, or a segmentation.",
    "ome-tiff": "Pictures need heatmaps of scored tiles, or a segmentation.",
    "crops": "Crops need the objects of a segmentation.",
}


def _check_known(record: Mapping[str, Any], slides: Sequence[str], models: Sequence[str]) -> None:
    known = [item["slide_id"] for item in record["items"]]
    if lost := [slide for slide in slides if slide not in known]:
        some = ", ".join(known[:5]) + (f" and {len(known) - 5:,} more" if len(known) > 5 else "")
        raise ConfigError(f"The run has no slide {', '.join(lost)}.", next_step=f"Name one of its slides: {some}.")
    names = [model["name"] for model in record["models"]]
    if lost := [name for name in models if name not in names]:
        raise ConfigError(
            f"The run has no model {', '.join(lost)}; it has {', '.join(names) or 'none'}.",
            next_step="Leave --model out for all of them, or name one as the run does.",
        )


def _models(record: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The run's models with their settings, and the folder of each: its name, or its node where names repeat."""
    all_names = [model["name"] for model in record["models"]]
    return [
        {**model, "spec": spec, "folder": model["name"] if all_names.count(model["name"]) == 1 else model["node"]}
        for model, spec in zip(record["models"], record["spec"]["model"], strict=True)
        if not names or model["name"] in names
    ]


def _scored(
    out: Path, record: Mapping[str, Any], slides: Sequence[str], models: Sequence[str], evaluation: Evaluation | None
) -> Iterator[Scored]:
    """Every committed result of the run's models, in the cohort's order; those of other settings are left out."""
    points = evaluation.points if evaluation else ()
    rows = read_table(out / "slides.parquet") if evaluation else []
    labels = {(row["slide_id"], row["model"]): row["labels"] or "" for row in rows}
    for row in record["items"]:
        item = Item.parse(row, "run.json")
        if slides and item.slide_id not in slides:
            continue
        store = SlideStore(out, item.slide_id)
        laid = record["outcomes"].get(item.slide_id, {}).get("laid")
        for model in _models(record, models):
            kind = "masks" if model["task"] == "segment" else "scores"
            for node in store.nodes(kind):
                grid = node.split("/")[1]
                if node.endswith(f"/{model['node']}") and (laid is None or grid in laid):
                    mine = {p.class_name: p for p in points if (p.model, p.level) == (model["node"], "tile")}
                    yield Scored(store, item, grid, model, mine, labels.get((item.slide_id, model["node"]), ""))


def _target(scored: Scored, folder: Path, what: str, ending: str) -> Path:
    path = folder / what / str(scored.model["folder"]) / f"{folder_name(scored.item.slide_id)}{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# tables

CORNERS = ("minx", "miny", "width", "height")
"""WSInfer's names of a tile's place, in px0."""


def _columns(classes: Sequence[str]) -> Columns:
    corners: Columns = dict.fromkeys(CORNERS, "int")
    scores: Columns = {f"{what}_{name}": "float32" for what in ("prob", "margin") for name in classes}
    return {"slide_id": "text", **corners, **scores, "label": "text"}


def _table(scored: Scored) -> dict[str, Any]:
    margins, boxes = scored.margins(), scored.boxes()
    probabilities = aggregate.probability(margins)
    values: dict[str, Any] = {"slide_id": [scored.item.slide_id] * len(margins)}
    values |= {name: boxes[:, i] for i, name in enumerate(CORNERS)}
    values |= {f"prob_{name}": probabilities[:, c] for c, name in enumerate(scored.classes)}
    values |= {f"margin_{name}": margins[:, c] for c, name in enumerate(scored.classes)}
    return values | {"label": _labels(scored, len(margins))}


def _labels(scored: Scored, n: int) -> list[str | None]:
    """The class each tile was labelled when it was evaluated, None where there is none, or may be several."""
    of_grid = scored.labels.startswith(f"labels/{scored.grid}/")
    if not of_grid or scored.model["task"] != "classify":
        return [None] * n
    labels = scored.store.read(scored.labels)
    known = (labels == 1).any(axis=1)
    which = zip(labels.argmax(axis=1).tolist(), known.tolist(), strict=True)
    return [scored.classes[c] if is_known else None for c, is_known in which]


def _parquet(scored: Scored, folder: Path) -> list[Path]:
    if scored.model["task"] == "segment":
        return []
    path = _target(scored, folder, "tiles", ".parquet")
    write_table(path, _columns(scored.classes), _table(scored))
    return [path]


def _csv(scored: Scored, folder: Path) -> list[Path]:
    if scored.model["task"] == "segment":
        return []
    path = _target(scored, folder, "tiles", ".csv")
    _write_csv(path, list(_columns(scored.classes)), _table(scored))
    return [path]


def _write_csv(path: Path, columns: Sequence[str], values: Mapping[str, Sequence[Any]]) -> None:
    """Floats are written so that reading them as float32 gives the same bits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(safe_row(columns))
    writer.writerows(zip(*(_plain(values[name]) for name in columns), strict=True))
    storage.write_atomic(path, text.getvalue().encode())


def _plain(values: Any) -> list[Any]:
    if isinstance(values, np.ndarray):
        return [str(v) for v in values] if values.dtype == np.float32 else values.tolist()
    return ["" if value is None else safe_cell(value) for value in values]


def _images(
    out: Path, record: Mapping[str, Any], slides: Sequence[str], models: Sequence[str], to: To, folder: Path
) -> list[Path]:
    """Images in one piece: one table for each model, a row an image."""
    written = []
    for model in _models(record, models):
        rows = list(_image_rows(out, record, slides, model))
        if not rows:
            continue
        columns = {name: kind for name, kind in _columns(model["classes"]).items() if name not in CORNERS}
        path = folder / "tiles" / model["folder"] / f"images.{to}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if to == "parquet":
            write_table(path, columns, rows)
        else:
            table: dict[str, Any] = {name: [row[name] for row in rows] for name in columns}
            floats = {name: np.array(v, np.float32) for name, v in table.items() if columns[name] == "float32"}
            _write_csv(path, list(columns), table | floats)
        written.append(path)
    return written


def _image_rows(
    out: Path, record: Mapping[str, Any], slides: Sequence[str], model: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    labels = {item["slide_id"]: item["label"] for item in record["items"]}
    for slide_id, outcome in record["outcomes"].items():
        if outcome["status"] != "done" or (slides and slide_id not in slides):
            continue
        for grid, node in outcome.get("packed", ()):
            if node == model["node"] and model["task"] in ("classify", "multilabel"):
                row = int(outcome["row"])
                margins = SlideStore(out, outcome["pack"]).read_rows(f"scores/{grid}/{node}", row, row + 1)
                values: dict[str, Any] = {"slide_id": slide_id, "label": labels[slide_id]}
                for what, found in (("margin", margins[0]), ("prob", aggregate.probability(margins)[0])):
                    values |= {f"{what}_{name}": float(v) for name, v in zip(model["classes"], found, strict=True)}
                yield values


# GeoJSON


def _geojson(scored: Scored, folder: Path) -> list[Path]:
    path = _target(scored, folder, "geojson", ".geojson")
    features = list(_objects(scored) if scored.model["task"] == "segment" else _regions(scored))
    collection = {"type": "FeatureCollection", "features": features}
    storage.write_atomic(path, json.dumps(collection, separators=(",", ":"), ensure_ascii=False).encode())
    return [path]


def _regions(scored: Scored) -> Iterator[dict[str, Any]]:
    """The area called each class as annotations, merged; then the tiles called, with their probabilities."""
    margins, boxes = scored.margins(), scored.boxes()
    called, probabilities = scored.called(margins), aggregate.probability(margins)
    squares = shapely.box(boxes[:, 0], boxes[:, 1], boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3])
    for c in sorted(set(called.tolist()) - {-1}):
        whole = shapely.union_all(squares[called == c])
        for i, part in enumerate(shapely.get_parts(whole)):
            yield _feature(scored, f"region {c} {i}", part, c, "annotation", {"area um^2": _um2(scored, part.area)})
    for row in np.flatnonzero(called >= 0).tolist():
        values = {f"probability {name}": float(probabilities[row, k]) for k, name in enumerate(scored.classes)}
        yield _feature(scored, f"tile {row}", squares[row], int(called[row]), "tile", values)


def _objects(scored: Scored) -> Iterator[dict[str, Any]]:
    """A segmentation's objects as detections, with what the models say that ran on them."""
    found = scored.objects()
    said = _said_of_objects(scored, len(found))
    for row in range(len(found)):
        values = {"area um^2": float(found.area_um2[row]), "touches edge": int(found.touches_edge[row])}
        values |= {name: float(column[row]) for name, column in said.items()}
        yield _feature(scored, f"object {row}", found.polygons[row], int(found.class_index[row]), "detection", values)


def _said_of_objects(scored: Scored, n: int) -> dict[str, npt.NDArray[np.float32]]:
    out, record = scored.store.root.parent.parent, accounting.read_run(scored.store.root.parent.parent)
    said: dict[str, npt.NDArray[np.float32]] = {}
    for other in _scored(out, record, [scored.item.slide_id], [], None):
        if other.model["on"] == f"{OBJECTS}{scored.model['name']}" and other.model["task"] != "features":
            values = aggregate.probability(other.margins())
            if len(values) == n:
                said |= {f"{other.model['name']}: {name}": values[:, c] for c, name in enumerate(other.classes)}
    return said


def _feature(
    scored: Scored, key: str, shape: Any, c: int, kind: str, measurements: Mapping[str, float]
) -> dict[str, Any]:
    name = scored.classes[c]
    return {
        "type": "Feature",
        "id": stable_id(scored, key),
        "geometry": shapely.geometry.mapping(shape),
        "properties": {
            "objectType": kind,
            "name": name,
            "classification": {"name": name, "color": list(COLOURS[(c - 1) % len(COLOURS)])},
            "measurements": dict(measurements),
        },
    }


def stable_id(scored: Scored, key: str) -> str:
    """Return the id of one thing in one slide's results, the same in every export of them."""
    return str(uuid.uuid5(SPACE, "/".join([scored.item.slide_id, scored.grid, scored.node, key])))


def _um2(scored: Scored, area_px0: float) -> float:
    return float(area_px0 * float(scored.store.attrs["mpp0"]) ** 2)


# pictures


def _pictures(scored: Scored) -> Iterator[tuple[str, str]]:
    """(what, node) of the pictures that are committed."""
    for what, folder in (("heatmap", "heatmaps"), ("classes", "planes")):
        node = f"{folder}/{scored.grid}/{scored.node}"
        if scored.store.committed(node):
            yield what, node


def _ome_zarr(scored: Scored, folder: Path) -> list[Path]:
    """A node is a group of its own already: a copy of its folder is an OME-Zarr 0.5 image (or labels)."""
    written = []
    for what, node in _pictures(scored):
        path = _target(scored, folder, "ome-zarr", f".{what}.ome.zarr")
        storage.copy_tree(scored.store.root / node, path)
        written.append(path)
    return written


def _ome_tiff(scored: Scored, folder: Path) -> list[Path]:
    """A heatmap is float32 probabilities (c, y, x), a plane uint8 classes (y, x); where they lie is in the OME-XML."""
    import tifffile

    written = []
    for what, node in _pictures(scored):
        path = _target(scored, folder, "ome-tiff", f".{what}.ome.tif")
        (scale,) = scored.store.node_attrs(node)["ome"]["multiscales"]
        step, first = scale["datasets"][0]["coordinateTransformations"]
        pixels = scored.store.read_plane(f"{node}/0") if what == "classes" else scored.store.read(f"{node}/0")
        planes = 1 if what == "classes" else len(pixels)
        about: dict[str, Any] = {
            "axes": "YX" if what == "classes" else "CYX",
            "Name": f"{scored.item.slide_id} {scored.model['name']} {what}",
            "PhysicalSizeX": step["scale"][-1],
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": step["scale"][-2],
            "PhysicalSizeYUnit": "µm",
            "UUID": stable_id(scored, what),
            "Plane": {
                "PositionX": [first["translation"][-1]] * planes,
                "PositionXUnit": ["µm"] * planes,
                "PositionY": [first["translation"][-2]] * planes,
                "PositionYUnit": ["µm"] * planes,
            },
        }
        if what == "heatmap":
            about["Channel"] = {"Name": scored.classes}
        centimetre = (1e4 / step["scale"][-1], 1e4 / step["scale"][-2])
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer, ome=True, bigtiff=pixels.nbytes > 2**31) as file:
            file.write(
                pixels,
                photometric="minisblack",
                compression="zlib",
                resolution=centimetre,
                resolutionunit="CENTIMETER",
                metadata=about,
                software="slideflow-ray",
            )
        storage.write_atomic(path, buffer.getvalue())
        written.append(path)
    return written


# crops


def _crops(scored: Scored, folder: Path) -> list[Path]:
    """Each object as a JPEG at level 0, cut by its box; index.csv says which is which."""
    if scored.model["task"] != "segment":
        return []
    found = scored.objects()
    said = _said_of_objects(scored, len(found))
    place = _target(scored, folder, "crops", "")
    place.mkdir(exist_ok=True)
    rows = []
    with open_slide(scored.item.uri, mpp=scored.item.mpp, modality=scored.item.modality) as reader:
        for row, (x, y, w, h) in enumerate(found.box_px0.tolist()):
            name = f"{stable_id(scored, f'object {row}')}.jpg"
            buffer = io.BytesIO()
            Image.fromarray(reader.read(0, (x, y), (w, h))).save(buffer, "JPEG", quality=JPEG_QUALITY)
            storage.write_atomic(place / name, buffer.getvalue())
            about = [scored.item.slide_id, name, x, y, w, h, found.classes[found.class_index[row]]]
            rows.append([*about, float(found.area_um2[row]), *(str(column[row]) for column in said.values())])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide_id", "file", "minx", "miny", "width", "height", "class", "area_um2", *safe_row(said)])
    writer.writerows(safe_row(row) for row in rows)
    storage.write_atomic(place / "index.csv", text.getvalue().encode())
    return [place / "index.csv", *(place / row[1] for row in rows)]


WRITERS: dict[str, Callable[[Scored, Path], list[Path]]] = {
    "geojson": _geojson,
    "parquet": _parquet,
    "csv": _csv,
    "ome-zarr": _ome_zarr,
    "ome-tiff": _ome_tiff,
    "crops": _crops,
}

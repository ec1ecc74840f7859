"""Results as files that other tools open: QuPath's GeoJSON, Parquet, CSV, OME-Zarr, OME-TIFF, crops, counts, labels.

Everything is in px0 (level-0 pixels), as QuPath and WSInfer have it, and comes from the stores alone but for
crops, which are read from the slide. What is written depends on nothing but the run: equal runs, equal bytes.
Layout: ``<folder>/<what>/<model>/<slide>...``, the folder being the run's own unless told otherwise.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely
from PIL import Image

from slideflow_ray import accounting, aggregate, cascade, storage
from slideflow_ray.biopsies import COLUMNS, PLACES, measuring, places
from slideflow_ray.biopsies import TABLE as THICKNESS
from slideflow_ray.cascade import Cascade, Found, Judge, cascades, told
from slideflow_ray.cohort import Item
from slideflow_ray.errors import ConfigError
from slideflow_ray.label_files import Keys, label_lines
from slideflow_ray.planes import Objects, objects_node, read_objects
from slideflow_ray.results import Evaluation, OperatingPoint, read_current
from slideflow_ray.slides import SlideReader, open_slide
from slideflow_ray.specs import ObjectSpec
from slideflow_ray.store import SlideStore, folder_name
from slideflow_ray.tables import Columns, read_table, write_table
from slideflow_ray.texts import safe_cell, safe_row

To = Literal["geojson", "parquet", "csv", "ome-zarr", "ome-tiff", "crops", "counts", "labels", "thickness"]

COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
"""Colours of classes, the background aside (M. Okabe and K. Ito, 2008), over and over."""

JPEG_QUALITY = 92


@dataclass(frozen=True)
class Scored:
    """One model's results on one grid of one slide. `item` of the cohort, `model` of run.json with its settings.

    `point` are its operating points by tile, by class; `labels` the node that holds its tiles' labels, if any.
    `cascade` are the models on its objects, of a segmentation.
    """

    store: SlideStore
    item: Item
    grid: str
    model: Mapping[str, Any]
    point: Mapping[str, OperatingPoint]
    labels: str = ""
    cascade: Cascade | None = None

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
    keys: Keys = "english",
) -> Exported:
    """Write what a run has found, by slide and model; files that are there are replaced as a whole.

    slides, models : ids of the cohort and names of bundles, all if empty. folder : where to, the run's own if None.
    keys : of label files, "english" or "chinese".
    A run that has not ended gives what is committed, and a note says so.

    Raises ConfigError (no run, an unknown slide or model, nothing to export), CorruptStore, SlideError (crops).
    """
    out = storage.place(out)
    record = accounting.read_run(out)
    _check_known(record, slides, models)
    found = Exported()
    if not record["finished"]:
        found.notes.append("The run has not ended: this is what was committed so far.")
    current = read_current(out, record)
    if current.evaluation is None and current.stale:
        found.notes.append(f"Operating points and labels are left out, as they were {current.stale}.")
    goal = storage.place(folder) if folder else out
    if to in WRITERS:
        for scored in _scored(out, record, slides, models, current.evaluation):
            found.files += WRITERS[to](scored, goal)
    if to == "counts":
        found.files += _counts(out, record, slides, models, goal)
    if to == "thickness":
        found.files += _thickness(out, record, slides, models, goal)
    if to == "labels":
        found.files += _label_files(out, record, slides, models, current.evaluation, keys, goal)
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
    "counts": "Counts need a segmentation, and a run that has ended.",
    "thickness": "Thickness needs a segmentation with `thickness` in run.toml, and a run that has ended.",
    "labels": "Label files need images in one piece that were scored.",
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
    of_objects = {one.node: one for one in cascades(record, points)}
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
                    label = labels.get((item.slide_id, model["node"]), "")
                    yield Scored(store, item, grid, model, mine, label, of_objects.get(model["node"]))


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
    """A segmentation's objects as detections: each of the class it was called, with all that the models said."""
    found = _found(scored)
    objects = scored.objects()
    said, (classes, colours, probability) = _said(found), _called(scored, found, objects)
    for row in range(len(objects)):
        values = {"object": row, "area um^2": float(objects.area_um2[row])}
        values |= {"touches edge": int(objects.touches_edge[row])}
        values |= {} if probability is None else {"probability": float(probability[row])}
        values |= {name: float(column[row]) for name, column in said.items()}
        feature = _feature(scored, f"object {row}", objects.polygons[row], 0, "detection", values)
        feature["properties"]["name"] = objects.classes[objects.class_index[row]]
        feature["properties"]["classification"] = {"name": classes[row], "color": list(colours[row])}
        yield feature


def _found(scored: Scored) -> Found:
    """What is committed of the models on a segmentation's objects, of a run that goes on too."""
    of = scored.cascade
    if of is None:
        raise ConfigError(f"{scored.model['name']} is no segmentation, so it has no objects.")
    objects = scored.objects()
    margins, grids = {}, {}
    for judge in of.judges:
        for node in scored.store.nodes("scores"):
            if node.endswith(f"/{judge.node}") and len(values := scored.store.read(node)) == len(objects):
                margins[judge.name], grids[judge.name] = values, node.split("/")[1]
    return Found(scored.item, of, scored.grid, objects, margins, grids)


def _judges(found: Found) -> list[tuple[Judge, npt.NDArray[np.float32]]]:
    return [(judge, found.margins[judge.name]) for judge in found.cascade.judges if judge.name in found.margins]


def _said(found: Found) -> dict[str, npt.NDArray[np.float32]]:
    """The probability of each class of each model on the objects."""
    probabilities = [(judge, aggregate.probability(margins)) for judge, margins in _judges(found)]
    return {f"{judge.name}: {name}": p[:, c] for judge, p in probabilities for c, name in enumerate(judge.classes)}


def _called(
    scored: Scored, found: Found, objects: Objects
) -> tuple[list[str], list[tuple[int, int, int]], npt.NDArray[np.float32] | None]:
    """What the first model called each object, its colour and probability; the segmentation's class without one."""
    own = [(scored.classes[c], COLOURS[(c - 1) % len(COLOURS)]) for c in objects.class_index.tolist()]
    for judge, margins in _judges(found)[:1]:
        called = judge.called(margins)
        first = called.argmax(axis=1).tolist()
        texts = [text or name for text, (name, _) in zip(judge.text(called), own, strict=True)]
        some = called.any(axis=1).tolist()
        colours = [COLOURS[c % len(COLOURS)] if so else o for c, so, (_, o) in zip(first, some, own, strict=True)]
        return texts, colours, told(aggregate.probability(margins), called)
    return [name for name, _ in own], [colour for _, colour in own], None


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
    return cascade.stable_id(scored.item.slide_id, scored.grid, scored.node, key)


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
    """Each object as a JPEG, cut by its box at level 0 (a huge one below); index.csv says which is which.

    A file's name is the slide, the object's number as in objects.parquet, and its class. It holds pixels alone.
    """
    if scored.model["task"] != "segment":
        return []
    found, objects = _found(scored), scored.objects()
    classes, _, probability = _called(scored, found, objects)
    said = _said(found)
    place = _target(scored, folder, "crops", "")
    place.mkdir(exist_ok=True)
    rows = []
    with open_slide(scored.item.uri, mpp=scored.item.mpp, modality=scored.item.modality) as reader:
        for row, box in enumerate(objects.box_px0.tolist()):
            name = crop_name(scored.item.slide_id, row, classes[row])
            buffer = io.BytesIO()
            Image.fromarray(cut(reader, box)).save(buffer, "JPEG", quality=JPEG_QUALITY)
            storage.write_atomic(place / name, buffer.getvalue())
            about = [scored.item.slide_id, name, row, stable_id(scored, f"object {row}"), *box, classes[row]]
            about += ["" if probability is None else str(probability[row]), float(objects.area_um2[row])]
            rows.append([*about, *(str(column[row]) for column in said.values())])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*CROP_COLUMNS, *safe_row(said)])
    writer.writerows(safe_row(row) for row in rows)
    storage.write_atomic(place / "index.csv", text.getvalue().encode())
    return [place / "index.csv", *(place / row[1] for row in rows)]


CROP_COLUMNS = ("slide_id", "file", "object", "id", *CORNERS, "class", "probability", "area_um2")

MAX_CROP_PIXELS = 2**26
"""A larger object is cut from the finest level where it is smaller."""


def crop_name(slide_id: str, row: int, name: str) -> str:
    """Return the file name of one object: any slide and class, in characters that every file system takes.

    >>> crop_name("case 7/PAS", 3, "FSG+CGN")
    'case_7_PAS-ab2c00defbf7-0003-FSG_CGN.jpg'
    """
    kind = "".join(c if c.isalnum() else "_" for c in name)[:40] or "object"
    return f"{folder_name(slide_id)}-{row:04d}-{kind}.jpg"


def cut(reader: SlideReader, box_px0: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Return the pixels of a box (x, y, w, h) in px0, uint8 (h, w, 3), of level 0 unless it is huge.

    Raises ReadError.
    """
    x, y, w, h = box_px0
    for index, level in enumerate(reader.levels):
        dx, dy = level.downsample
        size = max(1, round(w / dx)), max(1, round(h / dy))
        if size[0] * size[1] <= MAX_CROP_PIXELS or index == len(reader.levels) - 1:
            break
    return reader.read(index, (round(x / dx), round(y / dy)), size)


# counts


def _counts(
    out: Path, record: Mapping[str, Any], slides: Sequence[str], models: Sequence[str], folder: Path
) -> list[Path]:
    """The tables of objects and counts as CSV, as they stand in Parquet beside the stores."""
    tables = cascade.read_tables(out, record) if record["finished"] else None
    if tables is None:
        return []
    written = []
    for name, columns, rows in zip(("objects", "counts"), tables.columns, (tables.objects, tables.counts), strict=True):
        kept = [row for row in rows if (not slides or row["slide_id"] in slides)]
        kept = [row for row in kept if not models or row["segmentation"] in models]
        values = {column: [_as(kind, row.get(column)) for row in kept] for column, kind in columns.items()}
        path = folder / "counts" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_csv(path, list(columns), values)
        written.append(path)
    return written


def _thickness(
    out: Path, record: Mapping[str, Any], slides: Sequence[str], models: Sequence[str], folder: Path
) -> list[Path]:
    """Thickness by micrograph and biopsy, and every place that was measured, as CSV."""
    if not measuring(record) or not (out / THICKNESS).is_file():
        return []
    names, tables = [], (read_table(out / THICKNESS), list(places(out, record)))
    for name, columns, rows in zip(("thickness", "places"), (list(COLUMNS), list(PLACES)), tables, strict=True):
        kept = [row for row in rows if not slides or row["slide_id"] in slides]
        kept = [row for row in kept if not models or row["name"] in models]
        path = folder / "thickness" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_csv(path, columns, {column: [row[column] for row in kept] for column in columns})
        names.append(path)
    return names


def _as(kind: str, value: Any) -> Any:
    """A float32 in the digits that give the same bits again."""
    return str(np.float32(value)) if kind == "float32" and value is not None else value


# labels


def _label_files(
    out: Path,
    record: Mapping[str, Any],
    slides: Sequence[str],
    models: Sequence[str],
    evaluation: Evaluation | None,
    keys: Keys,
    folder: Path,
) -> list[Path]:
    """What images in one piece were called, as the label files of source 001; an image's name is its path."""
    uris = {item["slide_id"]: item["uri"] for item in record["items"]}
    written = []
    for model in _models(record, models):
        rows = list(_image_rows(out, record, slides, model))
        if not rows:
            continue
        names = image_names([uris[row["slide_id"]] for row in rows])
        at = {p.class_name: p.threshold for p in (evaluation.points if evaluation else ()) if p.model == model["node"]}
        judge = Judge(model["name"], model["node"], model["task"], tuple(model["classes"]), at)
        margins = np.array([[row[f"margin_{name}"] for name in judge.classes] for row in rows], np.float32)
        called = [[c for c, so in zip(judge.classes, row, strict=True) if so] for row in judge.called(margins)]
        path = folder / "labels" / str(model["folder"]) / "labels.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = label_lines(list(zip(names, called, strict=True)), judge.classes, keys)
        storage.write_atomic(path, lines.encode())
        written.append(path)
    return written


def image_names(uris: Sequence[str]) -> list[str]:
    """Return each image's path below the folder that holds all of them.

    >>> image_names(["/data/he/a.png", "/data/pas/a.png"]), image_names(["s3://b/x.png"])
    (['he/a.png', 'pas/a.png'], ['x.png'])
    """
    folders = [uri.rpartition("/")[0].split("/") for uri in uris]
    common = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)))
    return ["/".join(uri.split("/")[common:]) for uri in uris]


WRITERS: dict[str, Callable[[Scored, Path], list[Path]]] = {
    "geojson": _geojson,
    "parquet": _parquet,
    "csv": _csv,
    "ome-zarr": _ome_zarr,
    "ome-tiff": _ome_tiff,
    "crops": _crops,
}

"""One self-contained HTML: the answer first, then what failed, what ran, curves, tables and slides.

Slides, outlines and heatmaps are drawn in one frame, px0, so they cannot lie out of
register. Nothing is fetched: pictures are data URIs, and every text is escaped.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from slideflow_ray import accounting, aggregate, storage
from slideflow_ray.annotations import class_of, read_annotation, rings_px0
from slideflow_ray.biopsies import measuring, read_slide
from slideflow_ray.calibrate import read_calibrations
from slideflow_ray.cohort import Item
from slideflow_ray.errors import SlideflowError, as_slideflow_error
from slideflow_ray.figures import Rows, distribution, pr_figure, reliability, roc_figure
from slideflow_ray.gallery import explained_page, objects_page
from slideflow_ray.metrics import Confusion, Interval
from slideflow_ray.packs import UNSCALED
from slideflow_ray.planes import objects_node, read_areas, read_objects
from slideflow_ray.quality import BLURRED, read_quality
from slideflow_ray.results import FITTED, JUDGED, Evaluation, Overlap, Result, Table, read_current
from slideflow_ray.slides import open_slide
from slideflow_ray.specs import OBJECTS, ObjectSpec
from slideflow_ray.store import SlideStore
from slideflow_ray.tables import read_table
from slideflow_ray.thickness import thickness_node
from slideflow_ray.tissue import thumbnail
from slideflow_ray.walls import wall, walls_page

CARDS = 24
"""Slides that are shown with all their pictures; each adds about 150 KB."""

SHEET = 400
"""Further slides that are shown small, with their heatmap; each adds about 8 KB."""

SMALL_PX = 170

ROWS = 2000
"""Slides that the table lists; slides.parquet has them all."""

THUMBNAIL_PX = 800
COLOURS = "cividis"
"""A map that reads the same with every colour vision and in grey (Nunez et al., PLoS ONE 13 (2018) e0199239)."""

TEMPLATES = Path(__file__).parent / "templates"
NOTHING = "\N{EN DASH}"
"""What stands where a number is not defined."""

Rgb = npt.NDArray[np.uint8]


def write_report(out: str | Path, cards: int = CARDS) -> Path:
    """Write <out>/report.html from what run and evaluate have written; return its path.

    Raises ConfigError where there is no run, CorruptStore for a damaged table.
    """
    out = storage.place(out)
    path = out / "report.html"
    storage.write_atomic(path, render(page(out, cards)).encode())
    return path


def render(values: Mapping[str, Any]) -> str:
    """Return the page's HTML; every value is escaped."""
    return template("report.html.j2").render(values)


def template(name: str) -> Template:
    """Return a page's template, which escapes what it is given and knows our filters."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "rate": rate,
        "interval": interval,
        "count": count,
        "percent": percent,
        "whole": whole,
        "far": far,
        "area": area,
    }
    environment.filters["jpeg"] = lambda pixels: data_uri(pixels, "jpeg")
    return environment.get_template(name)


# numbers


def rate(value: float | None) -> str:
    """Return a rate with three decimals, or a dash where it is not defined."""
    return NOTHING if value is None or math.isnan(value) else f"{value:.3f}"


def interval(value: Interval | None) -> str:
    """Return an interval for reading, or nothing."""
    return f"{value[0]:.3f} to {value[1]:.3f}" if value else ""


def count(value: int | None) -> str:
    """Return a count with thin spaces, or a dash."""
    return NOTHING if value is None else f"{value:,}".replace(",", "\u202f")


def whole(value: float | None) -> str:
    """Return a share in whole percent, or a dash."""
    return NOTHING if value is None or math.isnan(value) else f"{100 * value:.0f}\u202f%"


def percent(value: float | None) -> str:
    """Return a share in percent with one decimal, or a dash."""
    return NOTHING if value is None or math.isnan(value) else f"{100 * value:.1f}\u202f%"


def far(nm: float | None) -> str:
    """Return a length given in nm, in nm or from 10 um on in um; or a dash."""
    if nm is None or math.isnan(nm):
        return NOTHING
    return f"{nm / 1000:,.3g}\u202fµm" if nm >= 10_000 else f"{nm:,.3g}\u202fnm" if nm < 100 else f"{nm:,.0f}\u202fnm"


def area(mm2: float) -> str:
    """Return an area given in mm2, small ones in um2.

    >>> area(2.5), area(0.00002)
    ('2.5 mm²', '20 µm²')
    """
    return f"{mm2:.3g} mm²" if mm2 == 0 or mm2 >= 0.001 else f"{1e6 * mm2:.3g} µm²"


# the page


def page(out: Path, cards: int = CARDS) -> dict[str, Any]:
    """Return what the template shows."""
    record = accounting.read_run(out)
    current = read_current(out, record)
    found = current.evaluation
    tables = {name: _table(out / f"{name}.parquet") if found else [] for name in ("slides", "roc", "reliability")}
    items = [Item.parse(row, "run.json") for row in record["items"]]
    done, temperatures = _chosen(items, record), read_calibrations(out)
    measured = {by.node for by in measuring(record)}
    sheet = [small for item in done[cards : cards + SHEET] if (small := _small(out, item, record))]
    return {
        "title": Path(record["spec"]["cohort"]).stem,
        "counts": record["counts"],
        "total": len(items),
        "in_one_piece": any(o.get("pack") for o in record["outcomes"].values()),
        "finished": record["finished"],
        "failures": [o for o in record["outcomes"].values() if o["status"] != "done"],
        "no_tissue": [s for s, o in record["outcomes"].items() if o.get("outcome") == "no_tissue"],
        "evaluated": found is not None,
        "notes": found.notes if found else (),
        "models": [
            _model(m, found or Evaluation(), tables)
            | {"temperature": temperatures.get(m["node"]), "layers": m["node"] in measured}
            | {"overlaps": _overlaps(m, found, measured)}
            for m in record["models"]
        ],
        "settings": _settings(record),
        "tiles_are": _tiles_are(record),
        "slides": sorted(tables["slides"], key=lambda row: _ORDER[row["split"]])[:ROWS],
        "slides_left": max(0, len(tables["slides"]) - ROWS),
        "probability": _probability,
        "stale": current.stale,
        "lesions": current.lesions,
        "objects": objects_page(out, record, found or Evaluation(), measured),
        "explained": explained_page(out),
        "overlaps": found.overlaps if found else (),
        "walls": walls_page(out, record, _table(out / "patients.parquet") if found else []),
        "quality": read_quality(out, record["outcomes"], ROWS),
        "blurred": BLURRED,
        "cards": [card(out, item, record, found or Evaluation()) for item in done[:cards]],
        "sheet": sheet,
        "cards_left": max(0, len(done) - cards) - len(sheet),
        "ramp": ramp(),
    }


def _table(path: Path) -> list[dict[str, Any]]:
    try:
        return read_table(path)
    except FileNotFoundError:
        return []


def _probability(margin: float | None) -> float | None:
    return None if margin is None else float(aggregate.probability(np.array([margin], np.float32))[0])


_ORDER = {JUDGED: 0, FITTED: 1, "train": 2, None: 3}


def _chosen(items: Sequence[Item], record: Mapping[str, Any]) -> list[Item]:
    """The slides in the order in which pictures show them: test first, as that is what the answer is about."""
    done = [i for i in items if record["outcomes"].get(i.slide_id, {}).get("status") == "done"]
    return sorted(done, key=lambda item: _ORDER[item.split])


def _settings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    spec, profile = record["spec"], record["profile"] or {}
    rows = [("Cohort", str(spec["cohort"])), ("Results", str(spec["out"]))]
    for model in record["models"]:
        what = f"{model['task']}: {', '.join(model['classes'])}" if model["classes"] else model["task"]
        rows.append((f"Model {model['name']}", f"{what}; {model['path']}"))
        rows.append(("Reads", f"{_reads(model)}; node {model['node']}"))
    tissue = spec["tissue"]
    rows.append(
        ("Tissue", f"rule {tissue['rule']} at {tissue['mpp']:g} um per px; tiles with >= {spec['min_tissue']:.0%}")
    )
    if profile:
        precision = f"{profile['precision']}, micro-batch {profile['micro_batch']}, threads {profile['threads']}"
        rows.append(("Computed on", f"{profile['device']} ({profile['isa']}), torch {profile['torch']}, {precision}"))
        rows.append(("Compute profile", str(record["profile_digest"])))
    rows.append(("Executor", f"{spec['executor']['kind']}, aggregation on {spec['dask']}"))
    if record["seconds"] is not None:
        rows.append(("Last run took", f"{record['seconds']:,.1f} s"))
    return rows


def _reads(model: Mapping[str, Any]) -> str:
    """What a model is given, in words."""
    scale = f"{model['tile_px']} px" + (f" at {model['mpp']:g} um per px" if model["mpp"] else "")
    if model["on"] == "whole":
        return f"images in one piece, as {scale}"
    if model["on"].startswith(OBJECTS):
        return f"each object of {model['on'].removeprefix(OBJECTS)}, as {scale}"
    return f"tiles of {scale}"


# a model


def _model(model: Mapping[str, Any], found: Evaluation, tables: Mapping[str, Rows]) -> dict[str, Any]:
    curves = tables["roc"]
    calibration = [row for row in tables["reliability"] if row["model"] == model["node"]]
    by_tile = {r.class_name: r for r in results_of(found, model) if (r.level, r.split) == ("tile", JUDGED)}
    results = results_of(found, model)
    points = {(p.level, p.class_name): p for p in found.points if p.model == model["node"]}
    headline = found.headline(model["node"])
    names = list(dict.fromkeys(r.class_name for r in results))
    return {
        "name": model["name"],
        "task": model["task"],
        "detection": next((d for d in found.detections if (d.model, d.split) == (model["node"], JUDGED)), None),
        "unit": "object" if model["on"].startswith(OBJECTS) and headline and headline.level == "tile" else "",
        "headline": headline,
        "point": points.get((headline.level, headline.class_name)) if headline else None,
        "overall": _overall(model["node"], results, found.tables),
        "results": [r for r in results if r.split == JUDGED] + [r for r in results if r.split == FITTED],
        "points": list(points.values()),
        "rocs": [roc_figure(model["node"], name, results, points, curves) for name in names],
        "prs": [pr_figure(model["node"], name, results, points, curves) for name in names],
        "reliabilities": [d for name in names if (d := reliability(name, by_tile.get(name), calibration))],
        "distributions": [
            {**drawn, "what": "object" if model["on"].startswith(OBJECTS) else "tile"}
            for name in names
            if (drawn := distribution(model["node"], name, points.get(("tile", name)), curves))
        ],
        "confusions": list(_confusions(model, results, found.tables)),
    }


def _tiles_are(record: Mapping[str, Any]) -> str:
    """What a row of scores is of: tiles, objects, or either."""
    kinds = {m["on"].startswith(OBJECTS) for m in record["models"] if m["task"] in ("classify", "multilabel")}
    return "object" if kinds == {True} else "tile or object" if len(kinds) > 1 else "tile"


def _overlaps(model: Mapping[str, Any], found: Evaluation | None, measured: Collection[str]) -> list[Overlap]:
    """What answers first for a segmentation of layers, whose objects mean little: each class's pixels on test."""
    mine = model["node"] in measured
    return [o for o in found.overlaps if (o.model, o.split) == (model["node"], JUDGED)] if found and mine else []


def results_of(found: Evaluation, model: Mapping[str, Any]) -> list[Result]:
    """Return the results of one model."""
    return [r for r in found.results if r.model == model["node"]]


def _overall(node: str, results: Sequence[Result], tables: Sequence[Table]) -> dict[str, Any] | None:
    """What answers first for more than two classes: the table by arg max, and the mean of the classes' AUC."""
    table = next((t for t in tables if t.model == node and t.split == JUDGED), None)
    if table is None:
        return None
    areas = [r.auc for r in results if r.split == JUDGED and r.level == table.level and r.auc is not None]
    mean = math.fsum(areas) / len(areas) if areas else None
    return {"table": table, "total": table.confusion.total, "auc": mean}


def _confusions(
    model: Mapping[str, Any], results: Sequence[Result], tables: Sequence[Table]
) -> Iterator[dict[str, Any]]:
    """Tables on test: of arg max, and of each class at its operating point, where there are few."""
    for table in tables:
        if table.model == model["node"] and table.split == JUDGED:
            about = {
                "caption": f"{table.what.capitalize()}s on test, by arg max",
                "kappa_interval": table.kappa_interval,
            }
            yield {**_shown(table.confusion), **about}
    few = [r for r in results if r.split == JUDGED and r.counts and r.level != "patient"]
    for r in few if len({r.class_name for r in few}) == 1 else ():
        counts = r.counts or {}
        rest = next((name for name in model["classes"] if name != r.class_name), f"not {r.class_name}")
        matrix = np.array([[counts["tn"], counts["fp"]], [counts["fn"], counts["tp"]]], np.int64)
        names = (rest, r.class_name) if len(model["classes"]) <= 2 else (f"not {r.class_name}", r.class_name)
        yield {
            **_shown(Confusion(names, matrix)),
            "caption": f"{r.what.capitalize()}s on test, at the operating point",
        }


def _shown(confusion: Confusion) -> dict[str, Any]:
    return {
        "classes": confusion.classes,
        "counts": confusion.counts.tolist(),
        "shares": confusion.by_true().tolist(),
        "of_all": (confusion.counts / max(1, confusion.total)).tolist(),
        "total": confusion.total,
        "accuracy": confusion.accuracy,
        "kappa": confusion.kappa,
        "kappa_interval": None,
    }


# a slide


@dataclass(frozen=True)
class Outline:
    """A path in px0 and what it means: 'tissue', 'truth' (of the class told from the rest) or 'other'.

    colour : of the class in the masks of a segmentation, "" where no segmentation knows it
    """

    kind: str
    path: str
    colour: str = ""


def card(out: Path, item: Item, record: Mapping[str, Any], found: Evaluation) -> dict[str, Any]:
    """Return what a slide's card shows; what cannot be shown is said in `missing`."""
    store = SlideStore(out, item.slide_id)
    outcome = record["outcomes"][item.slide_id]
    shown: dict[str, Any] = {"item": item, "tiles": outcome["tiles"], "missing": [], "outlines": [], "heatmaps": []}
    shown |= {"planes": [], "walls": [], "scores": list(_whole_scores(out, outcome, record))}
    if not outcome["laid"]:
        return shown | {"thumbnail": _thumbnail(item, shown["missing"], UNSCALED)}
    try:
        about = store.attrs
        shown |= {"size_px0": about["size_px0"], "mpp0": about["mpp0"]}
        shown["scale_bar"] = scale_bar(about["size_px0"][0], about["mpp0"])
        shown["outlines"] = list(_tissue(store))
        for grid, node in outcome["grids"]:
            if store.committed(f"heatmaps/{grid}/{node}"):
                shown["heatmaps"].append(_heatmap(store, grid, node, record, found))
            if store.committed(f"planes/{grid}/{node}"):
                shown["planes"].append(_plane(store, grid, node, record))
                shown["walls"] += _walls(out, item, (grid, node), record)
    except (SlideflowError, OSError, KeyError) as error:
        shown["missing"].append(f"Its results cannot be read: {_cause(error)}")
    shown["thumbnail"] = _thumbnail(item, shown["missing"])
    shown["outlines"] += _truth(item, record, shown["missing"])
    return shown


def _cause(error: BaseException) -> str:
    known = as_slideflow_error(error, "report")
    return f"{known.code}: {known.message}"


def _small(out: Path, item: Item, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """A slide at the size of a stamp, with the heatmap of its first model beside it; None where neither is there."""
    outcome = record["outcomes"][item.slide_id]
    store = SlideStore(out, item.slide_id)
    shown: dict[str, Any] = {"item": item, "heatmap": None, "size_px0": None}
    shown["thumbnail"] = _thumbnail(item, [], None if outcome["laid"] else UNSCALED, SMALL_PX)
    try:
        shown["size_px0"] = store.attrs["size_px0"] if outcome["laid"] else None
        mapped = [pair for pair in outcome["grids"] if store.committed(f"heatmaps/{pair[0]}/{pair[1]}")]
        if mapped:
            grid, node = mapped[0]
            model = next(m for m in record["models"] if m["node"] == node)
            values = aggregate.read_heatmap(store, grid, node)
            shown["heatmap"] = data_uri(coloured(_stamp(values[_told(values, model)])), "png")
            shown["box"] = _box(store, grid, node, values.shape[1:])
    except (SlideflowError, OSError, KeyError):
        shown["heatmap"] = None
    return shown if shown["thumbnail"] or shown["heatmap"] else None


def _stamp(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    step = max(1, max(values.shape) // SMALL_PX)
    return values[::step, ::step]


def _thumbnail(
    item: Item, missing: list[str], unscaled: float | None = None, longest: int = THUMBNAIL_PX
) -> str | None:
    """The slide as a JPEG data URI; None, and why, where it cannot be opened any more."""
    try:
        unscaled = UNSCALED if item.modality == "tem" else unscaled  # as it is stored, with its scale bar
        with open_slide(item.uri, mpp=item.mpp or unscaled) as reader:
            factor = min(1.0, longest / max(reader.size_px0))
            size = (max(1, round(reader.size_px0[0] * factor)), max(1, round(reader.size_px0[1] * factor)))
            return data_uri(thumbnail(reader, size), "jpeg")
    except (SlideflowError, OSError) as error:
        missing.append(f"No picture, the slide cannot be opened: {_cause(error)}")
        return None


def _truth(item: Item, record: Mapping[str, Any], missing: list[str]) -> Iterator[Outline]:
    if not item.annotation:
        return
    try:
        regions = read_annotation(item.annotation)
    except SlideflowError as error:
        missing.append(_cause(error))
        return
    names = record["spec"]["labels"]["names"]
    backgrounds = {model["classes"][0] for model in record["models"] if model["task"] == "classify"}
    for name, ring in rings_px0(regions):
        model = next((m for m in record["models"] if class_of(name, m["classes"], names)), None)
        known = class_of(name, model["classes"], names) if model else None
        colour = _class_colour(model["classes"].index(known)) if model and model["task"] == "segment" else ""
        yield Outline("other" if known in backgrounds else "truth", svg_path(ring), colour)


def _tissue(store: SlideStore) -> Iterator[Outline]:
    for node in store.nodes("tissue")[-1:]:
        mask = store.read(f"{node}/mask")
        px0_per_px = store.node_attrs(f"{node}/mask")["px0_per_px"]
        if not mask.all():
            yield Outline("tissue", contour(mask, px0_per_px))


def _heatmap(store: SlideStore, grid: str, node: str, record: Mapping[str, Any], found: Evaluation) -> dict[str, Any]:
    """One class's heatmap with its place in px0, and the operating point by tile that belongs to it."""
    model = next(m for m in record["models"] if m["node"] == node)
    values, cells = aggregate.read_heatmap(store, grid, node), store.read(f"grids/{grid}/rowcol")
    c = _told(values, model)
    left, top, width, _ = box = _box(store, grid, node, values.shape[1:])
    scale, name = width / values.shape[2], model["classes"][c]
    point = next((p for p in found.points if (p.model, p.level, p.class_name) == (node, "tile", name)), None)
    rows, cols = values.shape[1:]
    called = np.zeros((rows, cols), np.bool_)
    if point:  # by margin: probabilities near 1 are equal where margins are not
        margins = store.read(f"scores/{grid}/{node}")[:, c]
        called[cells[:, 0], cells[:, 1]] = margins >= np.float32(point.threshold)
    return {
        "name": model["name"],
        "class_name": name,
        "image": data_uri(coloured(values[c]), "png"),
        "box": box,
        "threshold": point.probability if point else None,
        "called": edges(called, (left, top), scale),
        "share": float(called.sum() / len(cells)),
        "verdict": _verdict(store, (grid, found.labels), model, c, cells, called) if point else None,
    }


VERDICTS = {"tp": (255, 0, 0, 150), "fp": (0, 255, 255, 150), "fn": (255, 255, 0, 150)}
"""Red, cyan and yellow, as source 004 paints true positives, false positives and false negatives; the rest is clear."""


def _verdict(
    store: SlideStore,
    labelled: tuple[str, str],
    model: Mapping[str, Any],
    c: int,
    cells: npt.NDArray[np.int32],
    called: npt.NDArray[np.bool_],
) -> dict[str, Any] | None:
    """Paint each labelled cell by how it was called; None where nothing is labelled. `labelled`: grid and rule."""
    grid, rule = labelled
    labels = [
        node
        for node in store.nodes(f"labels/{grid}")
        if node.startswith(f"labels/{grid}/{rule.partition('=')[0]}")
        and store.node_attrs(node)["determines"]["classes"] == list(model["classes"])
    ]
    if not labels:
        return None
    truth = np.full(called.shape, -1, np.int8)
    truth[cells[:, 0], cells[:, 1]] = store.read(labels[-1])[:, c]
    kinds = {"tp": called & (truth == 1), "fp": called & (truth == 0), "fn": ~called & (truth == 1)}
    pixels = np.zeros((*called.shape, 4), np.uint8)
    for kind, where in kinds.items():
        pixels[where] = VERDICTS[kind]
    return {"image": data_uri(pixels, "png"), **{kind: int(where.sum()) for kind, where in kinds.items()}}


def _box(store: SlideStore, grid: str, node: str, shape: Sequence[int]) -> tuple[float, float, float, float]:
    """Return where a heatmap of `shape` (rows, cols) lies in px0: x, y, width, height."""
    scale, first = _placed(store.node_attrs(f"heatmaps/{grid}/{node}"), store.attrs["mpp0"])
    return first - scale / 2, first - scale / 2, shape[1] * scale, shape[0] * scale


def _whole_scores(out: Path, outcome: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What each model says of an image in one piece: probability by class."""
    models = {m["node"]: m for m in record["models"]}
    for grid, node in outcome.get("packed", ()):
        store = SlideStore(out, outcome["pack"])
        if not store.committed(f"scores/{grid}/{node}"):
            continue
        row = outcome["row"]
        values = aggregate.probability(store.read_rows(f"scores/{grid}/{node}", row, row + 1))[0]
        yield {
            "name": models[node]["name"],
            "classes": list(zip(models[node]["classes"], values.tolist(), strict=True)),
        }


CLASS_COLOURS = ("#f0f0ec", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
"""The background, then colours that every colour vision tells apart (M. Okabe and K. Ito, 2008), over and over."""


def _plane(store: SlideStore, grid: str, node: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A segmentation as a picture with its place in px0, the area of each class, and its objects."""
    i, model = next((i, m) for i, m in enumerate(record["models"]) if m["node"] == node)
    spec = ObjectSpec.model_validate(record["spec"]["model"][i]["objects"])
    at = f"planes/{grid}/{node}"
    datasets = store.node_attrs(at)["ome"]["multiscales"][0]["datasets"]
    planes = (store.open_plane(f"{at}/{d['path']}") for d in datasets)
    level = next((n for n, p in enumerate(planes) if max(p.shape) <= 2 * THUMBNAIL_PX), len(datasets) - 1)
    values = store.read_plane(f"{at}/{level}")
    step = max(1, math.ceil(max(values.shape) / (2 * THUMBNAIL_PX)))
    values = values[::step, ::step]
    px0 = step * datasets[level]["coordinateTransformations"][0]["scale"][0] / store.attrs["mpp0"]
    colours = [_class_colour(c) for c in range(len(model["classes"]))]
    palette = np.zeros((256, 4), np.uint8)
    palette[: len(colours)] = [[*bytes.fromhex(colour[1:]), 255] for colour in colours]
    objects = read_objects(store, objects_node(grid, node, spec))
    areas, counts = read_areas(store, grid, node), np.bincount(objects.class_index, minlength=len(colours))
    rows = zip(
        model["classes"], colours, (areas[name] / 1e6 for name in model["classes"]), counts.tolist(), strict=True
    )
    return {
        "name": model["name"],
        "image": data_uri(palette[values], "png"),
        "box": (0, 0, values.shape[1] * px0, values.shape[0] * px0),
        "classes": list(rows),
    }


def _walls(out: Path, item: Item, place: tuple[str, str], record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What is measured in a segmentation of the slide, `place` being its grid and node; nothing without thickness."""
    grid, node = place
    for by in (by for by in measuring(record) if by.node == node):
        found, _ = read_slide(out, item, record["outcomes"][item.slide_id], by)
        objects = read_objects(SlideStore(out, item.slide_id), objects_node(grid, node, by.model.objects))
        colours = [_class_colour(c) for c in range(len(objects.classes))]
        if found is not None:
            store = SlideStore(out, item.slide_id)
            pixel = store.node_attrs(thickness_node(grid, node, by.spec))["nm_per_px"]
            yield wall(found, objects, by, colours, pixel)


def _class_colour(index: int) -> str:
    return CLASS_COLOURS[0] if index == 0 else CLASS_COLOURS[1 + (index - 1) % (len(CLASS_COLOURS) - 1)]


def _told(values: npt.NDArray[np.float32], model: Mapping[str, Any]) -> int:
    """The class that is shown: the second of two, else that with the most tiles, the background aside."""
    first = 1 if model["task"] == "classify" else 0
    return first + int(np.argmax((values[first:] >= 0.5).sum(axis=(1, 2))))


def _placed(attributes: Mapping[str, Any], mpp0: float) -> tuple[float, float]:
    """Return px0 per cell, and where in px0 the middle of the first cell lies, from the OME-Zarr metadata."""
    scale, translation = attributes["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    return scale["scale"][-1] / mpp0, translation["translation"][-1] / mpp0 + 0.5


# drawing


def ramp(stops: int = 12) -> str:
    """Return the colour map as a CSS gradient."""
    colours = colormaps[COLOURS](np.linspace(0, 1, stops), bytes=True)
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b, _ in colours.tolist())


def coloured(values: npt.NDArray[np.float32]) -> Rgb:
    """Return probabilities, (h, w), as RGBA pixels, uint8 (h, w, 4); transparent where there is no tile."""
    pixels: Rgb = colormaps[COLOURS](np.nan_to_num(values), bytes=True)
    pixels[..., 3] = np.where(np.isnan(values), 0, 255)
    return pixels


def data_uri(pixels: Rgb, kind: str) -> str:
    """Return pixels as a data URI, 'png' or 'jpeg'."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 82} if kind == "jpeg" else {"optimize": True}
    Image.fromarray(pixels).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def svg_path(ring: npt.NDArray[np.float64]) -> str:
    """Return a closed ring, (n, 2) in px0, as an SVG path in whole px0."""
    return "M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in ring[:-1]) + "Z"


def contour(mask: npt.NDArray[np.bool_], px0_per_px: Sequence[float], longest: int = 500) -> str:
    """Return the outline of a mask, (h, w), as an SVG path in px0; drawn from at most `longest` pixels a side."""
    step = max(1, math.ceil(max(mask.shape) / longest))
    padded = np.pad(mask[::step, ::step], 1).astype(np.float32)
    drawn = Figure().add_subplot().contour(padded, levels=[0.5]) if padded.any() else None
    lines = drawn.allsegs[0] if drawn is not None else []
    # Undo the padding; a pixel's middle lies half a pixel from its corner.
    factor = step * np.asarray(px0_per_px, np.float64)
    return "".join(svg_path((line - 0.5) * factor) for line in lines if len(line) > 3)


def edges(cells: npt.NDArray[np.bool_], origin: tuple[float, float], size: float) -> str:
    """Return the border between true and false cells, (rows, cols), as an SVG path; each run of edges is one line."""
    padded = np.pad(cells, 1)
    down, across = padded[1:, 1:-1] != padded[:-1, 1:-1], padded[1:-1, 1:] != padded[1:-1, :-1]
    lines = [
        f"M{_at(c0, origin[0], size)} {_at(r, origin[1], size)}H{_at(c1, origin[0], size)}" for r, c0, c1 in _runs(down)
    ]
    lines += [
        f"M{_at(c, origin[0], size)} {_at(r0, origin[1], size)}V{_at(r1, origin[1], size)}"
        for c, r0, r1 in _runs(across.T)
    ]
    return "".join(lines)


def _at(index: int, origin: float, size: float) -> str:
    return f"{origin + index * size:.0f}"


def _runs(marks: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int, int]]:
    """Yield (row, first, end) of each run of true along the rows."""
    steps = np.diff(np.pad(marks, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
    for (row, first), (_, end) in zip(starts.tolist(), ends.tolist(), strict=True):
        yield row, first, end


def scale_bar(width_px0: int, mpp0: float) -> tuple[float, str]:
    """Return a round length of about a fifth of the slide, in px0 and as text.

    >>> scale_bar(10_000, 0.5)
    (2000.0, '1 mm')
    """
    target = width_px0 * mpp0 / 5
    decade = 10.0 ** math.floor(math.log10(target))
    um = max(step * decade for step in (1, 2, 5) if step * decade <= target)
    return um / mpp0, f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"

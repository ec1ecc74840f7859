"""GeoJSON, as QuPath writes it -> regions in px0, and labels per tile.

A file holds a FeatureCollection, a list of features, one feature or one bare geometry;
only polygons and multipolygons (with holes) are used. A region's name is
``properties.classification.name``, else ``properties.name``, ``label`` or ``group``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from shapely.errors import GEOSException

from slideflow_ray import storage
from slideflow_ray.cohort import Item
from slideflow_ray.errors import AnnotationError
from slideflow_ray.identity import file_sha256
from slideflow_ray.specs import LabelSpec, digest
from slideflow_ray.store import SlideStore

MAX_PX0 = 1e7
"""Ten times the widest slide that can be opened: beyond it a coordinate is a mistake."""

MAX_BYTES = 2**30
AREAS = ("Polygon", "MultiPolygon")
OTHERS = ("Point", "MultiPoint", "LineString", "MultiLineString")
"""Geometries that have no inside, and so label no tile."""

Points = npt.NDArray[np.float64]
Say = Callable[[str], AnnotationError]


@dataclass(frozen=True)
class Region:
    """An annotated area: its class name, "" where the file gives none, and its polygons in px0."""

    name: str
    geometry: shapely.Polygon | shapely.MultiPolygon


def read_geojson(uri: str) -> tuple[Region, ...]:
    """Return the areas of a GeoJSON file; points and lines are passed over.

    A ring that crosses itself is mended as GEOS does (``make_valid``, structure), and an
    unclosed ring refused. Raises AnnotationError with the file, the feature and the cause;
    ConfigError for a scheme that is not allowed.
    """
    value = _load(uri)
    regions = []
    for number, feature in enumerate(_features(uri, value)):

        def say(cause: str, number: int = number) -> AnnotationError:
            return AnnotationError(f"{uri}, feature {number}: {cause}.")

        if not isinstance(feature, dict):
            raise say("is no JSON object")
        geometry = feature.get("geometry") if feature.get("type") == "Feature" else feature
        if geometry is not None and (shape := _area(geometry, say)) is not None:
            regions.append(Region(_name(feature.get("properties")), shape))
    return tuple(regions)


def _load(uri: str) -> Any:
    path = storage.local_path(uri)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise AnnotationError(f"{uri} has {path.stat().st_size:,} bytes; up to {MAX_BYTES:,} are read.")
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=lambda text: math.nan)
    except OSError as error:
        raise AnnotationError(f"{uri} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{uri} is not JSON: {error}.") from error


def _features(uri: str, value: Any) -> Sequence[Any]:
    if isinstance(value, list):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "FeatureCollection" and isinstance(value.get("features"), list):
        return list(value["features"])
    if kind in ("Feature", "GeometryCollection", *AREAS, *OTHERS):
        return [value]
    raise AnnotationError(f"{uri} is not GeoJSON: its type is {kind!r}, not FeatureCollection, Feature or Polygon.")


def _name(properties: Any) -> str:
    """The class name, as QuPath (classification.name), the Digital Slide Archive (label, group) and others give it."""
    if not isinstance(properties, dict):
        return ""
    classification = properties.get("classification")
    if isinstance(classification, dict):
        classification = classification.get("name") or ": ".join(map(str, classification.get("names") or ()))
    candidates = (classification, *(properties.get(key) for key in ("name", "label", "group")))
    return next((name.strip() for name in candidates if isinstance(name, str) and name.strip()), "")


def _area(geometry: Any, say: Say) -> shapely.Polygon | shapely.MultiPolygon | None:
    if not isinstance(geometry, dict):
        raise say("its geometry is no JSON object")
    kind = geometry.get("type")
    if kind in OTHERS:
        return None
    if kind == "GeometryCollection":
        return _collected(geometry.get("geometries"), say)
    coordinates = geometry.get("coordinates")
    if kind not in AREAS or not isinstance(coordinates, list):
        raise say(f"its geometry is {kind!r}; Polygon or MultiPolygon with coordinates would do")
    polygons = [coordinates] if kind == "Polygon" else coordinates
    shape = _mended([_polygon(polygon, say) for polygon in polygons], say)
    if shape.is_empty:
        raise say("its polygon has no area")
    return shape


def _collected(parts: Any, say: Say) -> shapely.Polygon | shapely.MultiPolygon | None:
    if not isinstance(parts, list) or any(isinstance(p, dict) and p.get("type") == "GeometryCollection" for p in parts):
        raise say("a GeometryCollection must list plain geometries")
    areas = [area for part in parts if (area := _area(part, say)) is not None]
    return _polygonal(shapely.union_all(areas)) if areas else None


def _polygon(rings: Any, say: Say) -> shapely.Polygon:
    if not isinstance(rings, list) or not rings:
        raise say("a polygon without rings")
    shell, *holes = (_ring(ring, say) for ring in rings)
    return shapely.Polygon(shell, holes)


def _ring(ring: Any, say: Say) -> Points:
    try:
        points = np.asarray([point[:2] for point in ring], np.float64)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise say("a ring that is no list of [x, y] numbers") from error
    if points.ndim != 2 or points.shape[1:] != (2,):
        raise say("a ring that is no list of [x, y] numbers")
    if not np.isfinite(points).all():
        raise say("a coordinate is not a number")
    if np.abs(points).max() > MAX_PX0:
        raise say(f"the coordinate {points.flat[int(np.abs(points).argmax())]:g} px0 lies outside any slide")
    if len(points) < 4 or not np.array_equal(points[0], points[-1]):
        raise say(f"a ring of {len(points)} points that is not closed (the last point must repeat the first)")
    return points


def _mended(polygons: list[shapely.Polygon], say: Say) -> shapely.Polygon | shapely.MultiPolygon:
    try:
        shape = polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)
        if shape.is_valid:
            return shape
        return _polygonal(shapely.make_valid(shape, method="structure", keep_collapsed=False))
    except (GEOSException, ValueError, IndexError) as error:
        raise say(f"a polygon that cannot be mended: {error}") from error


def _polygonal(shape: Any) -> shapely.Polygon | shapely.MultiPolygon:
    """Keep the areas of what GEOS returned."""
    if isinstance(shape, shapely.Polygon | shapely.MultiPolygon):
        return shape
    parts = [part for part in shapely.get_parts(shape) if isinstance(part, shapely.Polygon)]
    return shapely.MultiPolygon(parts)


# names


def class_of(name: str, classes: Sequence[str], names: Mapping[str, str] | None = None) -> str | None:
    """Return the model's class that `name` means, compared without case; `names` maps other names first.

    None where it means no class.

    >>> class_of("Tumour", ("normal", "tumor"), {"tumour": "tumor"})
    'tumor'
    """
    known = {item.casefold(): item for item in classes}
    mapped = {key.casefold(): value for key, value in (names or {}).items()}
    return known.get(mapped.get(name.casefold(), name).casefold())


def named(
    regions: Sequence[Region], classes: Sequence[str], names: Mapping[str, str] | None = None, where: str = ""
) -> tuple[Region, ...]:
    """Return the regions under the model's class names.

    Raises AnnotationError for a name that means no class of the model, with the setting that maps it.
    """
    found = []
    for region in regions:
        meant = class_of(region.name, classes, names)
        if meant is None:
            what = f"the annotation class {region.name!r}" if region.name else "an annotation without a class name"
            raise AnnotationError(
                f"{where or 'annotation'}: {what} is no class of the model ({', '.join(classes)}).",
                next_step=f"Correct the annotation, or map the name in run.toml: "
                f'[labels] names = {{{json.dumps(region.name, ensure_ascii=False)} = "{classes[-1]}"}}.',
            )
        found.append(Region(meant, region.geometry))
    return tuple(found)


# labels


def labels_by_centre(
    regions: Sequence[Region],
    xy_px0: npt.NDArray[np.int64],
    wh_px0: npt.NDArray[Any],
    classes: Sequence[str],
    names: Mapping[str, str] | None = None,
    background: str | None = "",
    *,
    exclusive: bool = True,
    where: str = "",
) -> npt.NDArray[np.int8]:
    """Return labels per tile, int8 (N, K): 1 for the class whose region holds the tile's centre, 0 for the others.

    xy_px0, wh_px0 : (N, 2), upper left corners and (width, height) of the tiles.
    background : class of the tiles in no region ("" is the first class); None leaves them unknown, -1 throughout.
    exclusive : one class per tile (classify): where regions overlap, the class that stands later in `classes`
        wins. False (multilabel): every class whose region holds the centre, and none outside all regions.

    A centre exactly on an outline counts as outside. Raises AnnotationError for a name that means no class.
    """
    regions = named(regions, classes, names, where)
    inside = _inside(regions, xy_px0 + np.asarray(wh_px0, np.float64) / 2, classes)
    if not exclusive:
        return inside.astype(np.int8)
    some = inside.any(axis=1)
    winner = len(classes) - 1 - np.argmax(inside[:, ::-1], axis=1)
    if background is not None:
        winner[~some] = list(classes).index(background or classes[0])
    labels: npt.NDArray[np.int8] = (np.arange(len(classes)) == winner[:, None]).astype(np.int8)
    if background is None:
        labels[~some] = -1
    return labels


def _inside(regions: Sequence[Region], centres: Points, classes: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return which class's regions hold each centre, bool (N, K)."""
    out = np.zeros((len(centres), len(classes)), np.bool_)
    if not len(centres) or not regions:
        return out
    # Parts of a multipolygon have tighter boxes than the whole.
    parts, owner = shapely.get_parts([r.geometry for r in regions], return_index=True)
    column = np.array([list(classes).index(r.name) for r in regions])[owner]
    shapely.prepare(parts)
    by_x = np.argsort(centres[:, 0], kind="stable")
    left, bottom, right, top = shapely.bounds(parts).T
    first = np.searchsorted(centres[by_x, 0], left)
    last = np.searchsorted(centres[by_x, 0], right, side="right")
    for i, part in enumerate(parts):
        rows = by_x[first[i] : last[i]]
        rows = rows[(centres[rows, 1] >= bottom[i]) & (centres[rows, 1] <= top[i])]
        if len(rows):
            out[rows, column[i]] |= shapely.contains_xy(part, centres[rows])
    return out


def slide_labels(
    store: SlideStore, grid: str, item: Item, classes: Sequence[str], spec: LabelSpec, task: str = "classify"
) -> npt.NDArray[np.int8]:
    """Return a slide's labels by tile, int8 (N, K), -1 where nothing is known; kept in the store as `label_slide` says.

    Raises AnnotationError.
    """
    node = label_slide(store, grid, item, classes, spec, task)
    if node is None:
        return np.full((len(store.read(f"grids/{grid}/item")), len(classes)), -1, np.int8)
    return store.read(node)


def label_slide(
    store: SlideStore, grid: str, item: Item, classes: Sequence[str], spec: LabelSpec, task: str = "classify"
) -> str | None:
    """Write a slide's labels by tile, if they are not there yet; return their node, None where nothing is known.

    With an annotation, tiles in no region are of the first class (classify) or of none
    (multilabel). Without one, a slide whose label is the first class of a classify model
    has nothing else in it, so all its tiles are of that class; of other slides without an
    annotation nothing is known. Raises AnnotationError.
    """
    exclusive = task == "classify"
    clean = exclusive and class_of(item.label or "", classes, spec.names) == classes[0]
    if not item.annotation and not clean:
        return None
    determines = {
        "annotation": _sha256(item.annotation) if item.annotation else None,
        "spec": spec.model_dump(mode="json"),
        "classes": list(classes),
        "exclusive": exclusive,
    }
    node = f"labels/{grid}/{spec.rule}-{digest(determines)}"
    if not store.committed(node):
        regions = read_geojson(item.annotation) if item.annotation else ()
        xy_px0, wh_px0 = (store.read(f"grids/{grid}/{name}") for name in ("xy_px0", "wh_px0"))
        where = item.annotation or ""
        labels = labels_by_centre(regions, xy_px0, wh_px0, classes, spec.names, exclusive=exclusive, where=where)
        store.write_array(node, labels, {"determines": determines})
        store.commit(node)
    return node


def _sha256(uri: str) -> str:
    try:
        return file_sha256(storage.local_path(uri))
    except OSError as error:
        raise AnnotationError(f"{uri} cannot be read: {error.strerror or error}.") from error


# drawing


def rings_px0(regions: Sequence[Region]) -> Iterator[tuple[str, Points]]:
    """Yield (name, ring) for every outline, holes too; rings are float64 (n, 2), (x, y) in px0, closed."""
    for region in regions:
        for part in shapely.get_parts(region.geometry):
            for ring in (part.exterior, *part.interiors):
                yield region.name, np.asarray(ring.coords, np.float64)[:, :2]

"""GeoJSON, as QuPath writes it, and ASAP's XML -> regions in px0, labels per tile, and what the mask misses.

Which of the two a file is, its content says. GeoJSON holds a FeatureCollection, a list of
features, one feature or one bare geometry; only polygons and multipolygons (with holes)
are used. A region's name is ``properties.classification.name``, else ``properties.name``,
``label`` or ``group``.

ASAP's XML names groups: ``_0`` and ``_1`` are tumour and ``_2`` is normal inside it
(CAMELYON16), ``metastases`` is tumour and ``normal`` is normal (CAMELYON17); other groups
keep their names. What is normal is cut out of everything else in the file.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from defusedxml import DefusedXmlException, ElementTree
from shapely.errors import GEOSException

from slideflow_ray.cohort import Item
from slideflow_ray.errors import AnnotationError, SlideError, SlideflowError
from slideflow_ray.identity import file_sha256
from slideflow_ray.remote import at_hand
from slideflow_ray.specs import LabelSpec, digest
from slideflow_ray.store import SlideStore
from slideflow_ray.texts import read_bytes

MAX_PX0 = 1e7
"""Ten times the widest slide that can be opened: beyond it a coordinate is a mistake."""

MAX_BYTES = 2**30
MAX_DEPTH = 50

NAMED = 12
"""Names that a note lists of those that occur."""
"""Of XML; ASAP's has five levels."""

METHOD = 3
"""Part of the digest of labels: changed when the rules below make other labels, or say more about them."""

ASAP_GROUPS = {
    "_0": "tumor",
    "_1": "tumor",
    "_2": "normal",
    "tumor": "tumor",
    "metastases": "tumor",
    "exclusion": "normal",
    "normal": "normal",
}
"""What the groups of CAMELYON16 and 17 are, in lower case."""

ASAP_CUTS = "normal"
"""The name of the areas that are cut out of all others of an ASAP file."""

ASAP_AREAS = ("polygon", "spline", "rectangle")
"""Types of annotation that have an inside; a spline is taken as the polygon of its points, as ASAP's masks are."""

ROUNDING = 1e-9
"""A share of a tile that is short by less is not short."""

AREAS = ("Polygon", "MultiPolygon")
OTHERS = ("Point", "MultiPoint", "LineString", "MultiLineString")
"""Geometries that have no inside, and so label no tile."""

Points = npt.NDArray[np.float64]
Say = Callable[[str], AnnotationError]


@dataclass(frozen=True)
class Region:
    """An annotated area: its class name, "" where the file gives none, and its polygons in px0.

    cut : it has been cut out of the other regions, so it labels nothing where the model has no class for it.
    """

    name: str
    geometry: shapely.Polygon | shapely.MultiPolygon
    cut: bool = False


def read_annotation(uri: str) -> tuple[Region, ...]:
    """Return the areas of a GeoJSON or ASAP XML file, whichever it is by its content.

    Raises AnnotationError, ConfigError for a scheme that is not allowed.
    """
    content = _bytes(uri)
    head = content[:64].replace(b"\0", b"").removeprefix(b"\xef\xbb\xbf").lstrip(b"\xff\xfe \t\r\n")
    return _asap(uri, content) if head.startswith(b"<") else read_geojson(uri)


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


def _bytes(uri: str) -> bytes:
    try:
        return read_bytes(at_hand(uri), MAX_BYTES)
    except ValueError as error:
        cause = error.message if isinstance(error, SlideError) else f"{uri} cannot be read: {error}."
        raise AnnotationError(cause) from error
    except OSError as error:
        raise AnnotationError(f"{uri} cannot be read: {error.strerror or error}.") from error


def _load(uri: str) -> Any:
    try:
        return json.loads(_bytes(uri).decode("utf-8-sig"), parse_constant=lambda text: math.nan)
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


# ASAP


def _asap(uri: str, content: bytes) -> tuple[Region, ...]:
    """Return the areas of an ASAP file, in its order; points, and areas of fewer than three points, are passed over."""
    try:
        root = _xml(content)
    except (SyntaxError, ValueError, LookupError, DefusedXmlException) as error:
        raise AnnotationError(f"{uri} is not XML that may be read: {error}.") from error
    if root.tag != "ASAP_Annotations":
        raise AnnotationError(f"{uri} is XML of {root.tag!r}; ASAP_Annotations, or GeoJSON, would do.")
    found = []
    for number, annotation in enumerate(root.iter("Annotation")):

        def say(cause: str, number: int = number) -> AnnotationError:
            return AnnotationError(f"{uri}, annotation {number}: {cause}.")

        if annotation.get("Type", "").lower() in ASAP_AREAS:
            shape = _asap_area(annotation, say)
            group = (annotation.get("PartOfGroup") or "").strip()
            name = "" if group == "None" else ASAP_GROUPS.get(group.casefold(), group)
            found += [Region(name, shape)] if shape is not None else []
    return _cut(found)


def _xml(content: bytes) -> Any:
    """Return the root of an XML text without DTD and of bounded depth. Raises what defusedxml does, and ValueError."""
    depth, root = 0, None
    for event, element in ElementTree.iterparse(io.BytesIO(content), events=("start", "end"), forbid_dtd=True):
        root = element if root is None else root
        depth += 1 if event == "start" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"its elements are more than {MAX_DEPTH} deep")
    return root


def _asap_area(annotation: Any, say: Say) -> shapely.Polygon | shapely.MultiPolygon | None:
    corners = [(corner.get("X"), corner.get("Y")) for corner in annotation.iter("Coordinate")]
    if len(corners) < 3:
        return None
    shape = _mended([shapely.Polygon(_ring([*corners, corners[0]], say))], say)
    return None if shape.is_empty else shape


def _cut(regions: Sequence[Region]) -> tuple[Region, ...]:
    """Take what is normal out of everything else."""
    cuts = shapely.union_all([region.geometry for region in regions if region.name == ASAP_CUTS])
    kept = []
    for region in regions:
        if region.name == ASAP_CUTS:
            kept.append(Region(region.name, region.geometry, cut=True))
        elif not (left := _polygonal(shapely.difference(region.geometry, cuts))).is_empty:
            kept.append(Region(region.name, left))
    return tuple(kept)


# names


def class_of(name: str, classes: Sequence[str], names: Mapping[str, str] | None = None) -> str | None:
    """Return the model's class that `name` means, compared without case; `names` maps other names first.

    None where it means no class. What is mapped to a class of another model means what it says to this one.

    >>> names = {"tumour": "tumor", "CGN": "glomerulus"}
    >>> class_of("Tumour", ("normal", "tumor"), names), class_of("CGN", ("Normal", "CGN"), names)
    ('tumor', 'CGN')
    """
    known = {item.casefold(): item for item in classes}
    mapped = {key.casefold(): value for key, value in (names or {}).items()}
    own = name.casefold()
    return known.get(mapped.get(own, name).casefold(), known.get(own))


def classes_of(label: str, classes: Sequence[str], names: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the model's classes that a label means, which may name several joined by "+"; in the model's order.

    A name that means no class of the model adds nothing.

    >>> classes_of("CGN + fsg", ("Normal", "FSG", "CGN")), classes_of("other", ("Normal", "FSG"))
    (('FSG', 'CGN'), ())
    """
    whole = class_of(label, classes, names)
    meant = {whole} if whole else {class_of(part.strip(), classes, names) for part in label.split("+")}
    return tuple(name for name in classes if name in meant)


def unused_names(items: Iterable[Item], names: Mapping[str, str]) -> str:
    """Return what to say of `names` that occur in no annotation and no label of a cohort, "" where all occur.

    Files that cannot be read say nothing here: whoever needs them raises AnnotationError.
    """
    known: dict[str, str] = {}
    left = {name.strip().casefold(): name for name in names}
    for item in items:
        if not left:
            return ""
        here = {part.strip() for text in (item.label or "", *_names_in(item)) for part in (text, *text.split("+"))}
        known |= {name.casefold(): name for name in sorted(here - {""})}
        left = {key: name for key, name in left.items() if key not in known}
    if not left:
        return ""
    there = [known[key] for key in sorted(known)]
    more = f" and {len(there) - NAMED} more" if len(there) > NAMED else ""
    occur = f"there are {', '.join(there[:NAMED])}{more}" if there else "there are none"
    which = ", ".join(repr(name) for name in left.values())
    return f"No annotation or label is called {which}, so mapping it says nothing: {occur}."


def _names_in(item: Item) -> list[str]:
    try:
        return [region.name for region in _regions(item)]
    except SlideflowError:
        return []


def named(
    regions: Sequence[Region], classes: Sequence[str], names: Mapping[str, str] | None = None, where: str = ""
) -> tuple[Region, ...]:
    """Return the regions under the model's class names.

    Raises AnnotationError for a name that means no class of the model, with the setting that maps it.
    """
    found = []
    for region in regions:
        meant = class_of(region.name, classes, names)
        if meant is None and region.cut:
            continue
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


def labels_of_objects(
    regions: Sequence[Region],
    xy_px0: npt.NDArray[np.int64],
    wh_px0: npt.NDArray[Any],
    classes: Sequence[str],
    *,
    exclusive: bool = True,
) -> npt.NDArray[np.int8]:
    """Return labels of boxes around objects, int8 (N, K), by the regions that hold their centres; -1 in no region.

    Nothing is known of an object that nobody drew. With `exclusive` neither of one in regions of several classes.
    """
    inside = _inside(regions, xy_px0 + np.asarray(wh_px0, np.float64) / 2, classes)
    known = inside.sum(axis=1) == 1 if exclusive else inside.any(axis=1)
    return np.where(known[:, None], inside, -1).astype(np.int8)


def labels_by_fraction(
    regions: Sequence[Region],
    xy_px0: npt.NDArray[np.int64],
    wh_px0: npt.NDArray[Any],
    classes: Sequence[str],
    names: Mapping[str, str] | None = None,
    fraction: float = 0.75,
    *,
    exclusive: bool = True,
    where: str = "",
) -> npt.NDArray[np.int8]:
    """Return labels per tile, int8 (N, K), by the share of its area that lies in each class: exact, by the polygons.

    exclusive : 1 for the class that covers at least `fraction` of the tile (of several the later), -1 throughout
        where none does. What no region covers is of the first class, and of overlapping regions the class counts
        that stands later in `classes`. False (multilabel): for each class by itself 1 where the share inside is at
        least `fraction`, 0 where the share outside is, -1 between.

    Raises AnnotationError for a name that means no class.
    """
    regions = named(regions, classes, names, where)
    shapes = [shapely.union_all([r.geometry for r in regions if r.name == name]) for name in classes]
    least = fraction - ROUNDING
    if not exclusive:
        share = np.column_stack([shares(shape, xy_px0, wh_px0) for shape in shapes])
        return np.where(share >= least, 1, np.where(1 - share >= least, 0, -1)).astype(np.int8)
    for i in range(len(shapes) - 1):
        shapes[i] = shapely.difference(shapes[i], shapely.union_all(shapes[i + 1 :]))
    share = np.column_stack([shares(shape, xy_px0, wh_px0) for shape in shapes])
    share[:, 0] = 1 - share[:, 1:].sum(axis=1)
    enough = share >= least
    winner = len(classes) - 1 - np.argmax(enough[:, ::-1], axis=1)
    labels: npt.NDArray[np.int8] = (np.arange(len(classes)) == winner[:, None]).astype(np.int8)
    labels[~enough.any(axis=1)] = -1
    return labels


def shares(shape: Any, xy_px0: npt.NDArray[Any], wh_px0: npt.NDArray[Any]) -> Points:
    """Return the share of each box that lies in `shape`, float64 (N,); xy_px0, wh_px0 : (N, 2), corners and sizes."""
    low, size = np.asarray(xy_px0, np.float64), np.asarray(wh_px0, np.float64)
    share = np.zeros(len(low))
    if shape.is_empty or not len(low):
        return share
    boxes: Any = shapely.box(*low.T, *(low + size).T)
    parts = shapely.get_parts(shape)
    shapely.prepare(parts)
    part, box = shapely.STRtree(boxes).query(parts, predicate="intersects")
    area = size[box].prod(axis=1)
    rim = ~shapely.contains_properly(parts[part], boxes[box])
    area[rim] = shapely.area(shapely.intersection(parts[part[rim]], boxes[box[rim]]))
    np.add.at(share, box, area)
    out: Points = np.minimum(share / size.prod(axis=1), 1.0)
    return out


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
    store: SlideStore,
    grid: str,
    item: Item,
    classes: Sequence[str],
    spec: LabelSpec,
    task: str = "classify",
    others: Collection[str] = (),
) -> str | None:
    """Write a slide's labels by tile, if they are not there yet; return their node, None where nothing is known.

    With an annotation, tiles in no region are of the first class (classify) or of none
    (multilabel); objects in no region are unknown. Without one, a slide whose label is the first class of a
    classify model has nothing else in it, so all its tiles are of that class; of other slides without an
    annotation nothing is known. `others` are classes of other models, whose regions are passed over; of an object
    several classes may be named, joined by "+", and then it has no single one. Raises AnnotationError.
    """
    exclusive = task == "classify"
    clean = exclusive and class_of(item.label or "", classes, spec.names) == classes[0]
    if not item.annotation and not clean:
        return None
    determines = {
        "annotation": _sha256(item.annotation) if item.annotation else None,
        "spec": spec.model_dump(mode="json", exclude={"fraction"} if spec.rule == "centre" else None),
        "classes": list(classes),
        "exclusive": exclusive,
        "method": METHOD,
    }
    on_objects = "boxes" in store.node_attrs(f"grids/{grid}").get("determines", {})
    determines |= {"others": sorted(others)} if others else {}
    determines |= {"outside": "unknown"} if on_objects else {}
    node = f"labels/{grid}/{spec.rule}-{digest(determines)}"
    if not store.committed(node):
        mine = [region for region in _regions(item) if not _of_others(region, classes, spec.names, others)]
        apart = [one for region in mine for one in _apart(region, classes, spec.names)]
        regions = named(apart, classes, spec.names, item.annotation or "")
        xy_px0, wh_px0 = (store.read(f"grids/{grid}/{name}") for name in ("xy_px0", "wh_px0"))
        if on_objects:
            labels = labels_of_objects(regions, xy_px0, wh_px0, classes, exclusive=exclusive)
        elif spec.rule == "centre":
            labels = labels_by_centre(regions, xy_px0, wh_px0, classes, exclusive=exclusive)
        else:
            labels = labels_by_fraction(regions, xy_px0, wh_px0, classes, fraction=spec.fraction, exclusive=exclusive)
        attributes = {"determines": determines, "annotated_um2": _annotated(store, grid, regions, classes)}
        store.write_array(node, labels, attributes)
        store.commit(node)
    return node


def _of_others(region: Region, classes: Sequence[str], names: Mapping[str, str], others: Collection[str]) -> bool:
    """Whether a region is of another model's class and of none of this one's."""
    return not classes_of(region.name, classes, names) and bool(classes_of(region.name, tuple(others), names))


def _apart(region: Region, classes: Sequence[str], names: Mapping[str, str]) -> list[Region]:
    """A region once under each of its class names; under its own where they are none of the model's."""
    meant = classes_of(region.name, classes, names)
    return [Region(name, region.geometry, region.cut) for name in meant] if len(meant) > 1 else [region]


def _regions(item: Item) -> tuple[Region, ...]:
    return read_annotation(item.annotation) if item.annotation else ()


# what the tissue mask misses


def _annotated(
    store: SlideStore, grid: str, regions: Sequence[Region], classes: Sequence[str]
) -> dict[str, list[float]] | None:
    """Annotated area by class, all of it and what lies outside the tissue mask, um2; None for a grid without a mask."""
    about = store.node_attrs(f"grids/{grid}").get("determines", {})
    if "tissue" not in about or not regions:
        return None
    tissue = f"{about['tissue']}/mask"
    px0_per_px = store.node_attrs(tissue)["px0_per_px"]
    mask, um2 = store.read(tissue), float(about["mpp0"]) ** 2
    found = {}
    for name in classes:
        if mine := [region.geometry for region in regions if region.name == name]:
            shape = shapely.union_all(mine)
            found[name] = [shape.area * um2, missed_px0(shape, mask, (px0_per_px[0], px0_per_px[1])) * um2]
    return found


def missed_px0(shape: Any, mask: npt.NDArray[np.bool_], px0_per_px: tuple[float, float]) -> float:
    """Return the area of `shape` outside a tissue mask, in px0 squared, exactly; what lies beyond the slide is outside.

    mask : bool (h, w) over the slide; each pixel covers `px0_per_px` (x, y) px0.
    """
    x, y = px0_per_px
    left, top, right, bottom = shape.bounds
    rows = slice(max(0, math.floor(top / y)), max(0, math.ceil(bottom / y)))
    cols = slice(max(0, math.floor(left / x)), max(0, math.ceil(right / x)))
    window = mask[rows, cols].astype(np.int8)
    row, first, last = _runs(window)
    low = np.column_stack([(first + cols.start) * x, (row + rows.start) * y])
    size = np.column_stack([(last - first) * x, np.full(len(row), y)])
    inside = math.fsum(shares(shape, low, size) * size.prod(axis=1))
    missed = float(shape.area) - inside
    return missed if missed > ROUNDING * shape.area else 0.0


def _runs(window: npt.NDArray[np.int8]) -> tuple[npt.NDArray[np.int64], ...]:
    """Return row, first and one past the last column of every run of ones."""
    edges = np.diff(window, axis=1, prepend=0, append=0)
    row, first = np.nonzero(edges == 1)
    return row, first, np.nonzero(edges == -1)[1]


def _sha256(uri: str) -> str:
    try:
        return file_sha256(at_hand(uri))
    except OSError as error:
        raise AnnotationError(f"{uri} cannot be read: {error.strerror or error}.") from error


# drawing


def together_px0(regions: Sequence[Region]) -> Any:
    """Return the union of regions, a shapely geometry; empty without regions."""
    return shapely.union_all([region.geometry for region in regions])


def even_odd(shape: Any, corner: tuple[float, float], size: tuple[int, int], px0: float) -> npt.NDArray[np.bool_]:
    """Return a valid polygon or multipolygon as pixels, bool `size` (h, w): true where a pixel's centre is inside.

    Pixels are `px0` wide and high, and the first is (row, col) `corner` of the slide's. Each row is crossed by the
    outlines an even number of times, and what lies between an odd crossing and the next is inside.
    """
    flips = np.zeros((size[0], size[1] + 1), np.uint8)
    points, ring = shapely.get_coordinates(shapely.get_rings(shapely.get_parts(shape)), return_index=True)
    points = points / px0 - 0.5 - np.array(corner[::-1])  # the centre of the first pixel is (0, 0)
    one, other = points[:-1][ring[:-1] == ring[1:]], points[1:][ring[:-1] == ring[1:]]
    rows = np.ceil(np.column_stack([one[:, 1], other[:, 1]])).clip(0, size[0]).astype(np.int64)
    first, count = rows.min(axis=1), np.abs(rows[:, 0] - rows[:, 1])
    edge = np.repeat(np.arange(len(one)), count)
    row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    (x0, y0), (x1, y1) = one[edge].T, other[edge].T
    col = np.ceil(x0 + (row - y0) / (y1 - y0) * (x1 - x0)).clip(0, size[1]).astype(np.int64)
    np.add.at(flips, (row, col), 1)
    inside: npt.NDArray[np.bool_] = np.bitwise_xor.accumulate(flips & 1, axis=1)[:, :-1].astype(np.bool_)
    return inside


def rings_px0(regions: Sequence[Region]) -> Iterator[tuple[str, Points]]:
    """Yield (name, ring) for every outline, holes too; rings are float64 (n, 2), (x, y) in px0, closed."""
    for region in regions:
        for part in shapely.get_parts(region.geometry):
            for ring in (part.exterior, *part.interiors):
                yield region.name, np.asarray(ring.coords, np.float64)[:, :2]

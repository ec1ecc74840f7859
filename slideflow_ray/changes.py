"""Why a slide is scored again: what differs from what was done on it before, in words.

The store is asked, not a log: a model's earlier results lie beside the new ones, under grids
that say what determined them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slideflow_ray.errors import StoreError
from slideflow_ray.store import SlideStore

if TYPE_CHECKING:
    from slideflow_ray.pipeline import RunModel

FILE = "its file changed"
OF_FILE = ("size_px0", "levels", "mpp0", "reader")
"""What a changed file may change too, and is not said besides."""
SAID = {
    "reader": "another library reads it",
    "size_px0": "its size is read otherwise",
    "levels": "its levels are read otherwise",
    "method": "this version finds tissue in another way",
    "pixels": "this version reads tiles in another way",
    "objects": "its segmentation or the settings of `objects` changed",
    "mask": "its mask changed",
    "stains": "the stains of its images are told otherwise",
}
"""Sentences for what has no value that a user would know."""
NAMES = {"rows": "store.chunk_rows", "mpp0": "mpp of the slide"}


def why_anew(store: SlideStore, model: RunModel, grid: str) -> tuple[str, ...]:
    """Return what differs from the model's earlier results on this slide; nothing where it has none.

    Where there are several, those count from which the fewest things differ.
    """
    kind = model.results[0].kind
    before = [tuple(node.split("/")[1:]) for node in store.nodes(kind)]
    mine = [(old, node) for old, node in before if node.rpartition("-")[0] == model.name]
    if (grid, model.node) in mine:
        return _of_objects(store, model, grid)
    if not mine:
        return ()
    found = [tuple(_differences(store, model, grid, f"{kind}/{old}/{node}")) for old, node in mine]
    return min(found, key=len)


def _of_objects(store: SlideStore, model: RunModel, grid: str) -> tuple[str, ...]:
    """Of a segmentation whose masks are there: whether its objects were found by other settings."""
    before = [node.rpartition("/")[2] for node in store.nodes(f"objects/{grid}")]
    mine = [name for name in before if name.rpartition("-")[0] == model.node]
    wanted = f"{model.node}-{model.spec.objects.digest()}"
    return ("the settings of `objects` changed",) if mine and wanted not in mine and model.task == "segment" else ()


def _differences(store: SlideStore, model: RunModel, grid: str, earlier: str) -> Iterator[str]:
    _, old_grid, node = earlier.split("/")
    if old_grid != grid:
        yield from _of_grids(store, old_grid, grid)
    if node != model.node:
        about = _attributes(store, earlier)
        if about.get("digest") != model.digest:
            yield f"{model.name} changed ({about.get('digest', 'another')} -> {model.digest})"
        else:
            yield f"{model.name} is computed in another way (device, precision or library)"


def _of_grids(store: SlideStore, old: str, new: str) -> list[str]:
    one, other = (dict(_attributes(store, f"grids/{grid}").get("determines", {})) for grid in (old, new))
    masks = [str(grid.pop("tissue", "")) for grid in (one, other)]
    said = differences(one, other)
    if FILE not in said and masks[0] != masks[1] and all(masks):
        said += differences(*(_attributes(store, f"{mask}/mask").get("determines", {}) for mask in masks))
    return list(dict.fromkeys(said))


def _attributes(store: SlideStore, node: str) -> dict[str, Any]:
    """A node's attributes; what cannot be read says nothing."""
    try:
        return store.node_attrs(node)
    except StoreError:
        return {}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each setting in which two records of what determines a node differ.

    >>> differences({"rows": 64, "tile": {"mpp": 0.5}}, {"rows": 64, "tile": {"mpp": 0.25}})
    ['mpp changed from 0.5 to 0.25']
    """
    one, other = dict(_flat(old)), dict(_flat(new))
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    if "identity" in keys:
        keys = [key for key in keys if key not in OF_FILE]
    return [_sentence(key, one.get(key), other.get(key)) for key in keys]


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield key, value


def _sentence(key: str, old: object, new: object) -> str:
    if key == "identity":
        return FILE
    return SAID.get(key) or f"{NAMES.get(key, key)} changed from {_said(old)} to {_said(new)}"


def _said(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "nothing"
    return "nothing" if value in (None, "") else str(value)

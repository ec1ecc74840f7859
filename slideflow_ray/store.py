"""SlideStore: one zarr group per slide; nodes named by digest, rows in whole shards, commits.

Layout (docs: DESIGN section 4)::

    <out>/slides/<slide>.zarr/        one zarr v3 group per slide
        tissue/<d>/mask               bool (h, w)
        items/<d>                     the item's row, as attributes
        grids/<g>/xy_px0 ...          the table of boxes
        grids/<g>/tiles               uint8 (N, T, T, 3), shard = chunk of the run
        labels/<g>/<labelset>         int8 (N, K)
        scores/<g>/<m>                float32 (N, C) margins
        heatmaps/<g>/<m>              OME-Zarr 0.5
        stains/<method>-<d>           fits of its stains, as attributes
    <out>/commits/<slide>/<node>.json what must be there, byte for byte

A node is written once by one writer and never overwritten: its name ends in 12 hex
digits of everything that determines it. Done means committed.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.array_spec import ArrayConfigParams
from zarr.errors import ContainsArrayError

from slideflow_ray import storage
from slideflow_ray.errors import CorruptStore, StoreError
from slideflow_ray.identity import file_sha256
from slideflow_ray.specs import digest

SCHEMA = 1
INNER_ROWS = 16
"""Tiles of one inner chunk: what a viewer decodes to show one tile."""
_CONFIG: ArrayConfigParams = {"write_empty_chunks": True, "read_missing_chunks": False}
_COMPRESSORS = (ZstdCodec(level=1), Crc32cCodec())
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")

OUTCOMES = ("done", "no_tissue", "no_objects")
REPAIR = "Run `slideflow-ray repair OUT`, then the same run again: what is broken is done anew, and nothing else."

Array = npt.NDArray[Any]
AnyZarrArray = zarr.Array[Any]


def folder_name(slide_id: str) -> str:
    """Return a file name for any slide_id: itself where that is harmless, else a readable stem and a digest.

    >>> folder_name("tumor_001"), folder_name("a/b").startswith("a_b-")
    ('tumor_001', True)
    """
    if _PLAIN.fullmatch(slide_id):
        return slide_id
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", slide_id)[:60]
    return f"{stem}-{hashlib.sha256(slide_id.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Commit:
    """What a committed node holds: `outcome` and, per key, its length in bytes and SHA-256."""

    node: str
    outcome: str
    keys: Mapping[str, tuple[int, str]]


@dataclass(frozen=True)
class Damage:
    """What is not as it was committed: one `key` of a `node`, or with key "" the commit itself; `text` says how."""

    store: SlideStore
    node: str
    key: str
    text: str


class SlideStore:
    """The results of one slide below `out`."""

    def __init__(self, out: str | Path, slide_id: str) -> None:
        self.slide_id = slide_id
        self.root = storage.place(out) / "slides" / f"{folder_name(slide_id)}.zarr"
        self.commits = storage.place(out) / "commits" / folder_name(slide_id)

    @property
    def _zarr(self) -> Any:
        """What zarr opens: the folder, or a store over the bucket."""
        return storage.zarr_store(self.root)

    # groups and attributes

    def describe(self, attributes: Mapping[str, Any]) -> None:
        """Write what the slide is (schema, slide_id, uri, identity, size_px0, mpp0, levels, reader), and its checksum.

        It may change from run to run, so it is not committed; the checksum is what `verify` compares.
        """
        wanted = {"schema": SCHEMA, "slide_id": self.slide_id, **attributes}
        wanted["checksum"] = digest(wanted)
        try:
            group = zarr.open_group(self._zarr, mode="a")
        except ValueError as error:  # what is there is no zarr metadata
            raise CorruptStore(f"{self.root / 'zarr.json'} cannot be read: {error}.") from error
        if dict(group.attrs) != wanted:
            group.attrs.put(wanted)

    @property
    def attrs(self) -> dict[str, Any]:
        """What `describe` wrote. Raises StoreError for a foreign schema or a missing store."""
        try:
            attributes = dict(zarr.open_group(self._zarr, mode="r").attrs)
        except FileNotFoundError as error:
            raise StoreError(f"There is no store for {self.slide_id!r} at {self.root}.") from error
        if attributes.get("schema") != SCHEMA:
            raise StoreError(f"{self.root} has schema {attributes.get('schema')}; this version reads {SCHEMA}.")
        return attributes

    def make_group(self, node: str, attributes: Mapping[str, Any] | None = None) -> None:
        """Create the group `node` and those above it, with attributes."""
        group = zarr.open_group(self._zarr, mode="a").require_group(node)
        if attributes and dict(group.attrs) != dict(attributes):
            group.attrs.put(dict(attributes))

    def node_attrs(self, node: str) -> dict[str, Any]:
        """Return the attributes of a group or an array. Raises StoreError, or CorruptStore when it was committed."""
        try:
            return dict(zarr.open(self._zarr, path=node, mode="r").attrs)
        except FileNotFoundError as error:
            raise self._missing(node) from error

    def _missing(self, node: str) -> StoreError:
        above = ["/".join(node.split("/")[:n]) for n in range(1, node.count("/") + 2)]
        if any(self._commit_path(part).exists() for part in above):
            return CorruptStore(
                f"{self.slide_id}: {node} is committed and is gone.",
                next_step=REPAIR,
            )
        return StoreError(f"{self.slide_id}: there is no node {node}.")

    # arrays

    def create_rows(
        self,
        node: str,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        chunk_rows: int,
        *,
        fill: float | bool,
        sharded: bool = False,
        attributes: Mapping[str, Any] | None = None,
        dimension_names: tuple[str, ...] | None = None,
    ) -> None:
        """Create an array with rows first whose chunk (or shard) is `chunk_rows` rows; do nothing if it exists."""
        if self.has(f"{node}/zarr.json"):
            return
        if parent := node.rpartition("/")[0]:
            self.make_group(parent)
        whole = (chunk_rows, *shape[1:])
        with contextlib.suppress(ContainsArrayError):  # a worker that counts as lost with its node may still be at it
            zarr.create_array(
                self._zarr,
                name=node,
                shape=shape,
                dtype=dtype,
                chunks=(min(INNER_ROWS, chunk_rows), *shape[1:]) if sharded else whole,
                shards=whole if sharded else None,
                compressors=_COMPRESSORS,
                fill_value=fill,
                attributes=dict(attributes or {}),
                dimension_names=dimension_names,
                config=_CONFIG,
            )

    def write_array(self, node: str, values: Array, attributes: Mapping[str, Any] | None = None) -> None:
        """Create and write a small array in one chunk."""
        rows = max(1, values.shape[0])
        fill = float("nan") if values.dtype.kind == "f" else False if values.dtype.kind == "b" else 0
        self.create_rows(node, values.shape, values.dtype, rows, fill=fill, attributes=attributes)
        self.write_chunk(node, 0, values)

    def create_plane(self, node: str, shape: tuple[int, int], chunk: int, shard: int, *, fill: int) -> None:
        """Create a plane, uint8 (h, w), of square chunks in square shards; do nothing if it exists.

        Unlike rows, a shard that is not written stays absent: it is all `fill`.
        """
        if self.has(f"{node}/zarr.json"):
            return
        with contextlib.suppress(ContainsArrayError):  # as above
            zarr.create_array(
                self._zarr,
                name=node,
                shape=shape,
                dtype=np.uint8,
                chunks=(chunk, chunk),
                shards=(shard, shard),
                compressors=_COMPRESSORS,
                fill_value=fill,
                dimension_names=("y", "x"),
            )

    def open_plane(self, node: str) -> AnyZarrArray:
        """Return a plane as an array that is read where it is sliced."""
        return zarr.open_array(self._zarr, path=node, mode="r")

    def write_block(self, node: str, yx: tuple[int, int], block: Array) -> None:
        """Write one whole shard of a plane, beginning at (y, x)."""
        array = zarr.open_array(self._zarr, path=node, mode="r+")
        array[yx[0] : yx[0] + block.shape[0], yx[1] : yx[1] + block.shape[1]] = block

    def read_plane(self, node: str, yx: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None) -> Array:
        """Return a window of a plane, (h, w) from (y, x) on; all of it without `size`."""
        array = self.open_plane(node)
        h, w = size or (array.shape[0] - yx[0], array.shape[1] - yx[1])
        return np.asarray(array[yx[0] : yx[0] + h, yx[1] : yx[1] + w])

    def read_rows(self, node: str, start: int, stop: int) -> Array:
        """Return the rows from `start` up to `stop`. Raises CorruptStore, StoreError."""
        return self._read(node, lambda b: slice(start, stop))

    def write_chunk(self, node: str, chunk: int, rows: Array) -> None:
        """Write one whole chunk (or shard): the rows from chunk * B on. One writer per chunk."""
        array = self._open(node, "r+")
        start = chunk * self._rows_of(array)
        stop = min(start + self._rows_of(array), array.shape[0])
        if rows.shape != (stop - start, *array.shape[1:]):
            raise StoreError(f"{node} chunk {chunk} wants {(stop - start, *array.shape[1:])}, got {rows.shape}.")
        if stop > start:
            array[start:stop] = rows

    def read(self, node: str, chunk: int | None = None) -> Array:
        """Return the whole array, or the rows of one chunk.

        Raises CorruptStore when a chunk is missing or its checksum is wrong.
        """
        return self._read(node, lambda b: slice(None) if chunk is None else slice(chunk * b, (chunk + 1) * b))

    def _read(self, node: str, rows: Callable[[int], slice]) -> Array:
        try:
            array = self._open(node, "r")
            return np.asarray(array[rows(self._rows_of(array))])
        except FileNotFoundError as error:
            raise self._missing(node) from error
        except (ValueError, RuntimeError, zarr.errors.ChunkNotFoundError) as error:
            raise CorruptStore(f"{self.slide_id}: {node} cannot be read: {error}") from error

    def chunks_todo(self, node: str) -> list[int]:
        """Return the chunks of `node` that have no key yet, which is what is left to do.

        A chunk that an earlier run has left is read once, before it counts: one that a crash of the machine has cut
        short, or that was damaged since, is deleted and done anew.
        """
        array = self._open(node, "r")
        tail = "/0" * (array.ndim - 1)
        todo = []
        for i in range(-(-array.shape[0] // self._rows_of(array))):
            key = f"{node}/c/{i}{tail}"
            if not self.has(key):
                todo.append(i)
            elif not self._decodes(node, i):
                (self.root / key).unlink(missing_ok=True)
                todo.append(i)
        return todo

    def _decodes(self, node: str, chunk: int) -> bool:
        try:
            self.read(node, chunk)
        except CorruptStore:
            return False
        return True

    def has_chunk(self, node: str, chunk: int, ndim: int) -> bool:
        """Return whether the chunk is written (a key that exists is complete)."""
        return self.has(f"{node}/c/{chunk}{'/0' * (ndim - 1)}")

    def has(self, key: str) -> bool:
        """Return whether a key of the store exists."""
        return (self.root / key).exists()

    def nodes(self, folder: str) -> list[str]:
        """Return the committed nodes below `folder`, such as 'grids' or 'scores/<g>', sorted."""
        top = self.commits / folder
        return sorted(str(p.relative_to(self.commits).with_suffix("")) for p in top.rglob("*.json"))

    def _open(self, node: str, mode: Any) -> AnyZarrArray:
        return zarr.open_array(self._zarr, path=node, mode=mode, config=_CONFIG)

    @staticmethod
    def _rows_of(array: AnyZarrArray) -> int:
        return int((array.shards or array.chunks)[0])

    # commits

    def commit(self, node: str, outcome: str = "done") -> Commit:
        """Record that `node` is complete: every key below it with its length and checksum. Created once, last."""
        made = Commit(node, outcome, dict(self._keys(node)))
        if not storage.create(self._commit_path(node), _record(made)):
            there = self.committed(node)
            if there != made:
                raise CorruptStore(f"{self.slide_id}: {node} is committed with other bytes.")
        return made

    def committed(self, node: str) -> Commit | None:
        """Return the commit of `node`, or None while it is not complete."""
        path = self._commit_path(node)
        record = storage.read_json(path)
        if record is None:
            return None
        try:
            keys = {key: (int(length), str(sha)) for key, (length, sha) in record["keys"].items()}
            found = Commit(record["node"], record["outcome"], keys)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptStore(f"{path} is not the commit that was written: {error!r}.") from error
        if found.node != node or found.outcome not in OUTCOMES:
            raise CorruptStore(f"{path} is not the commit that was written.")
        return found

    def has_commit(self, node: str) -> bool:
        """Return whether there is a commit of `node`, readable or not."""
        return self._commit_path(node).exists()

    def verify(self, node: str) -> list[str]:
        """Return what differs from the commit of `node`, one sentence each; nothing when all is well."""
        return [damage.text for damage in self.damage(node)]

    def damage(self, node: str) -> list[Damage]:
        """Return what differs from the commit of `node`: keys lost, changed or foreign; or the commit itself."""
        try:
            commit = self.committed(node)
        except CorruptStore as error:
            return [Damage(self, node, "", error.message)]
        if commit is None:
            return [Damage(self, node, "", f"{self.slide_id}: {node} is not committed.")]
        if self._commit_path(node).read_bytes() != _record(commit):
            return [Damage(self, node, "", f"{self._commit_path(node)} has other bytes than were written.")]
        found = {key: self._wrong(key, *of) for key, of in commit.keys.items()}
        found |= dict.fromkeys(self._paths(node) - set(commit.keys), "is in a committed node, and not in its commit")
        return [Damage(self, node, k, f"{self.slide_id}: {k} {why}.") for k, why in sorted(found.items()) if why]

    def _wrong(self, key: str, length: int, sha: str) -> str:
        path = self.root / key
        if not path.exists():
            return "is lost"
        same = path.stat().st_size == length and file_sha256(path) == sha
        return "" if same else "has other bytes than were committed"

    def discard(self, node: str, key: str = "") -> None:
        """Take the commit of `node` back, and delete that key of it, without `key` all that it holds."""
        self._commit_path(node).unlink(missing_ok=True)
        for path in [self.root / (key or name) for name in ([key] if key else self._paths(node))]:
            path.unlink(missing_ok=True)

    def restore_groups(self) -> list[str]:
        """Write anew the metadata of the groups above committed nodes that are gone or broken; return their keys.

        They hold nothing but that they are groups, so no commit names them; what the slide is (the root) the
        next run writes.
        """
        broken = self.broken_groups()
        for key in broken:
            (self.root / key).unlink(missing_ok=True)
        zarr.open_group(self._zarr, mode="a")
        for key in broken:
            if group := key.rpartition("/")[0]:
                self.make_group(group)
        return broken

    def broken_groups(self) -> list[str]:
        """Return the keys of group metadata above nodes that are gone or not what was written, sorted."""
        there = [path.relative_to(self.root).parts[:-2] for path in self.root.rglob("zarr.json") if path.is_file()]
        nodes = [*there, *(tuple(node.split("/")[:-1]) for node in self.nodes(""))]
        above = {parts[:n] for parts in nodes for n in range(len(parts) + 1) if n <= _groups_above(parts)}
        keys = ("/".join([*parts, "zarr.json"]) for parts in above)
        return sorted(key for key in keys if not self._is_group(key))

    def _is_group(self, key: str) -> bool:
        """Whether a group's metadata are: those of the root name the slide, those of others nothing."""
        try:
            found = storage.read_json(self.root / key) or {}
            attributes = found.pop("attributes")
        except (CorruptStore, KeyError, AttributeError, TypeError):
            return False
        if found != {"zarr_format": 3, "node_type": "group"}:
            return False
        if key != "zarr.json":
            return bool(attributes == {})
        if not isinstance(attributes, dict) or attributes.get("schema") != SCHEMA:
            return False
        said = attributes.pop("checksum", None)
        return said == digest(attributes) and folder_name(str(attributes.get("slide_id"))) == self.commits.name

    def _keys(self, node: str) -> Iterator[tuple[str, tuple[int, str]]]:
        for key in sorted(self._paths(node)):
            yield key, ((self.root / key).stat().st_size, file_sha256(self.root / key))

    def _paths(self, node: str) -> set[str]:
        """The keys of a node that are there."""
        found = [path for path in (self.root / node).rglob("*") if path.is_file()]
        mine = (p for p in found if not p.name.endswith(".partial") and not self._is_other_node(node, p))
        return {path.relative_to(self.root).as_posix() for path in mine}

    def _is_other_node(self, node: str, path: Path) -> bool:
        """A grid's tiles are a node of their own, with a commit of their own."""
        inside = path.relative_to(self.root / node).as_posix()
        return node.startswith("grids/") and node.count("/") == 1 and inside.startswith("tiles/")

    def _commit_path(self, node: str) -> Path:
        return self.commits / f"{node}.json"


def stores(out: str | Path) -> list[SlideStore]:
    """Return the stores below `out`, by slide_id."""
    found = []
    for folder in sorted((storage.place(out) / "slides").glob("*.zarr")):
        slide_id = zarr.open_group(storage.zarr_store(folder), mode="r").attrs.get("slide_id")
        if slide_id is not None:
            found.append(SlideStore(out, str(slide_id)))
    return found


def _groups_above(parts: tuple[str, ...]) -> int:
    """How many plain groups stand above a node: kind and grid; of a grid and what has no grid only the kind."""
    if not parts or parts[0] == "outcomes":  # which are no zarr
        return 0
    return 1 if parts[0] in ("grids", "items", "tissue", "stains") else 2


def _record(commit: Commit) -> bytes:
    """What a commit's file holds: the same bytes for the same commit."""
    return storage.to_json({"schema": SCHEMA, "node": commit.node, "outcome": commit.outcome, "keys": commit.keys})


def committed_stores(out: str | Path) -> list[SlideStore]:
    """Return the stores of which something is committed below `out`, also where they themselves are gone."""
    return [SlideStore(out, path.name) for path in sorted((storage.place(out) / "commits").glob("*")) if path.is_dir()]


def damages(out: str | Path) -> tuple[int, list[Damage]]:
    """Compare every committed node below `out` with the disk; return how many nodes, and what is wrong.

    Commits are what is walked, so a store that is gone altogether is noticed too.
    """
    nodes, found = 0, []
    for store in committed_stores(out):
        for node in store.nodes(""):
            nodes += 1
            found += store.damage(node)
        for key in store.broken_groups():
            found.append(Damage(store, "", key, f"{store.slide_id}: {key} is not the group that was written."))
    return nodes, found


def verify(out: str | Path) -> tuple[int, list[str]]:
    """Return how many nodes below `out` are committed, and one sentence for each key that is not as it was."""
    nodes, found = damages(out)
    return nodes, [damage.text for damage in found]


def tree_digest(out: str | Path) -> str:
    """Return one SHA-256 over stores, commits and tables, which two equal runs share.

    Left out are run.json, reports and what only this machine needs (lease, cache).
    """
    out = storage.place(out)
    roots = [out / "slides", out / "commits"]
    tables = [p for p in out.glob("*") if p.suffix in {".parquet", ".csv"} or p.name in _TABLES]
    files = sorted([p for root in roots for p in root.rglob("*") if p.is_file()] + tables)
    lines = "".join(f"{file_sha256(p)}  {p.relative_to(out).as_posix()}\n" for p in files)
    return hashlib.sha256(lines.encode()).hexdigest()


_TABLES = {"operating_points.json", "confusion.json", "froc.json", "detection.json", "overlap.json"}

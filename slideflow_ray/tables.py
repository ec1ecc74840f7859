"""Parquet tables beside the stores: same rows, same bytes; pages carry checksums, which reading verifies."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from slideflow_ray import storage
from slideflow_ray.errors import CorruptStore

Kind = Literal["text", "int", "float", "float32", "bool"]
Columns = Mapping[str, Kind]
_TYPES = {"text": pa.string(), "int": pa.int64(), "float": pa.float64(), "float32": pa.float32(), "bool": pa.bool_()}


def write_table(path: Path, columns: Columns, data: Mapping[str, Sequence[Any]] | Iterable[Mapping[str, Any]]) -> None:
    """Write rows (or whole columns) atomically as Parquet; None is null. Equal data makes equal bytes."""
    schema = pa.schema([pa.field(name, _TYPES[kind]) for name, kind in columns.items()])
    if isinstance(data, Mapping):
        table = pa.table({name: pa.array(data[name], schema.field(name).type) for name in columns}, schema)
    else:
        table = pa.Table.from_pylist(list(data), schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    storage.write_atomic(path, buffer.getvalue())


def read_table(path: Path) -> list[dict[str, Any]]:
    """Return a table's rows. Raises FileNotFoundError, CorruptStore when a page's checksum is wrong."""
    try:
        source = pa.BufferReader(path.read_bytes()) if storage.is_remote(path) else path
        rows: list[dict[str, Any]] = pq.read_table(source, page_checksum_verification=True).to_pylist()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise CorruptStore(
            f"{path} cannot be read: {error}", next_step="Evaluate again; it is written anew."
        ) from error
    return rows


def texts(path: Path) -> list[str]:
    """Return every text of a Parquet file: names and metadata of file and columns, and the values of text columns."""
    try:
        file = pq.ParquetFile(path)
        schema, table = file.schema_arrow, file.read()
    except (pa.ArrowException, OSError) as error:
        raise CorruptStore(f"{path} cannot be read: {error}") from error
    found = [str(file.metadata.metadata), str(schema.metadata), *(f"{f.name} {f.metadata}" for f in schema)]
    for name in schema.names:
        column = table.column(name)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            found += [text for text in column.unique().to_pylist() if text]
    return found

"""Codes and ids as Parquet.

Columns: ``id``, ``photo_id`` (string), ``person_id`` (string, null), one ``layer_LL`` a stored layer
(fixed-size list of D float32, so that a layer can be read without the others), and, where the
gallery has them, ``embedding`` (fixed-size list of float32, unit length).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gallery_index.errors import GalleryCorruptError


def layer_column(layer: int) -> str:
    return f"layer_{layer:02d}"


def write_table(
    file: BinaryIO,
    ids: Sequence[str],
    photo_ids: Sequence[str],
    person_ids: Sequence[str | None],
    codes: np.ndarray,
    embeddings: np.ndarray | None,
) -> None:
    """Write n rows; codes (n, L, D) float32, embeddings (n, E) float32 or None."""
    columns: dict[str, pa.Array] = {
        "id": pa.array(ids, pa.string()),
        "photo_id": pa.array(photo_ids, pa.string()),
        "person_id": pa.array(person_ids, pa.string()),
    }
    for layer in range(codes.shape[1]):
        columns[layer_column(layer)] = _vectors(codes[:, layer])
    if embeddings is not None:
        columns["embedding"] = _vectors(embeddings)
    # Codes hardly compress (measured on W: zstd saves 8 %, after byte-stream split 16 %); a dictionary adds 6 %.
    pq.write_table(
        pa.table(columns), file, compression="none", use_dictionary=False, write_statistics=False, store_schema=False
    )


def read_table(content: bytes, columns: list[str] | None, where: str) -> pa.Table:
    """Parse a Parquet file (some columns of it).

    Raises:
        GalleryCorruptError: not Parquet, or a column is missing.
    """
    try:
        # One thread: a thread of Arrow's pool that lets go of Python's bytes while the interpreter ends aborts the
        # process (exit status 134 in 3 of 20 runs with torch loaded; https://github.com/apache/arrow/issues/34314).
        file = pq.ParquetFile(pa.BufferReader(content))
        missing = set(columns or ()) - set(file.schema_arrow.names)
        if missing:
            raise GalleryCorruptError(f"{where} has no column {', '.join(sorted(missing))}")
        return file.read(columns=columns, use_threads=False)
    except pa.ArrowException as error:
        raise GalleryCorruptError(f"{where}: {error}") from error


def vectors_of(table: pa.Table, column: str, width: int, where: str) -> np.ndarray:
    """A list column as (n, width) float32."""
    if column not in table.column_names:
        raise GalleryCorruptError(f"{where} has no column {column}")
    flat = pc.list_flatten(table[column]).combine_chunks()
    if flat.type != pa.float32() or flat.null_count or len(flat) != len(table) * width:
        raise GalleryCorruptError(f"{where}: column {column} is not {width} float32 a row")
    return flat.to_numpy().reshape(len(table), width)


def _vectors(values: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

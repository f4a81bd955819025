"""Codes and ids as Parquet.

Columns: ``id``, ``photo_id`` (string), ``person_id`` (string, null), ``digest`` (uint64, of all the rest of the row),
one ``layer_LL`` a stored layer (fixed-size list of D float32, so that a layer can be read without the others), and,
where the gallery has them, ``embedding`` (fixed-size list of float32, unit length).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gallery_index.errors import GalleryCorruptError
from gallery_index.storage import Folder

ID_COLUMNS = ["id", "photo_id", "person_id"]


class Rows(NamedTuple):
    """Rows as they are stored: codes (n, L, D) float32, digests (n,) uint64, embeddings (n, E) float32 or None."""

    ids: list[str]
    photo_ids: list[str]
    person_ids: list[str | None]
    digests: np.ndarray
    codes: np.ndarray
    embeddings: np.ndarray | None

    def take(self, index: np.ndarray | slice) -> Rows:
        """Some of the rows, by a slice, or by positions."""
        places = range(len(self.ids))[index] if isinstance(index, slice) else index.tolist()
        names = ([values[i] for i in places] for values in self[:3])
        return Rows(*names, *(None if values is None else values[index] for values in self[3:]))

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """All rows, in order."""
        if len(parts) == 1:
            return parts[0]
        names = ([value for part in parts for value in part[i]] for i in range(3))
        arrays = (None if parts[0][i] is None else np.concatenate([p[i] for p in parts]) for i in (3, 4, 5))
        return Rows(*names, *arrays)


def row_digests(
    ids: Sequence[str],
    photo_ids: Sequence[str],
    person_ids: Sequence[str | None],
    codes: np.ndarray,
    embeddings: np.ndarray | None,
) -> np.ndarray:
    """(n,) uint64: the first eight bytes of SHA-256 over all of a row, by which changes are told."""
    found = np.empty(len(ids), np.uint64)
    for row, names in enumerate(zip(ids, photo_ids, person_ids, strict=True)):
        digest = hashlib.sha256("\0".join(name or "" for name in names).encode())
        digest.update(np.ascontiguousarray(codes[row]))
        if embeddings is not None:
            digest.update(np.ascontiguousarray(embeddings[row]))
        found[row] = int.from_bytes(digest.digest()[:8], "little")
    return found


def layer_column(layer: int) -> str:
    return f"layer_{layer:02d}"


def write_table(file: BinaryIO, rows: Rows) -> None:
    """Write n rows."""
    columns: dict[str, pa.Array] = {
        "id": pa.array(rows.ids, pa.string()),
        "photo_id": pa.array(rows.photo_ids, pa.string()),
        "person_id": pa.array(rows.person_ids, pa.string()),
        "digest": pa.array(rows.digests),
    }
    for layer in range(rows.codes.shape[1]):
        columns[layer_column(layer)] = _vectors(rows.codes[:, layer])
    if rows.embeddings is not None:
        columns["embedding"] = _vectors(rows.embeddings)
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


def read_rows(content: bytes, layers: int, dim: int, width: int | None, where: str) -> Rows:
    """Parse all of a Parquet file; L = ``layers``, D = ``dim``, E = ``width``.

    Raises:
        GalleryCorruptError: not Parquet, or not these columns.
    """
    table = read_table(content, None, where)
    missing = set(ID_COLUMNS) - set(table.column_names)
    if missing:
        raise GalleryCorruptError(f"{where} has no column {', '.join(sorted(missing))}")
    codes = np.empty((len(table), layers, dim), np.float32)
    for layer in range(layers):
        codes[:, layer] = vectors_of(table, layer_column(layer), dim, where)
    embeddings = None if width is None else vectors_of(table, "embedding", width, where)
    names = [table[name].to_pylist() for name in ID_COLUMNS]
    if "digest" in table.column_names:
        digests = table["digest"].to_numpy()
    else:  # written by version 1
        digests = row_digests(*names, codes, embeddings)
    return Rows(*names, digests, codes, embeddings)


def read_columns(folder: Folder, name: str, columns: list[str]) -> pa.Table:
    """Some columns of a Parquet file, without reading the others, and so without checking its sha256.

    Raises:
        GalleryCorruptError: not there, not Parquet, or a column is missing.
    """
    where = f"{folder.url}: {name}"

    def look() -> tuple[set[str], pa.Table]:
        with folder.files.open(folder.checked(name)) as source:
            file = pq.ParquetFile(source)
            return set(columns) - set(file.schema_arrow.names), file.read(columns=columns, use_threads=False)

    try:
        missing, table = folder.files.again(look)
        if missing:
            raise GalleryCorruptError(f"{where} has no column {', '.join(sorted(missing))}")
        return table
    except FileNotFoundError:
        raise GalleryCorruptError(f"{where} is missing") from None
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

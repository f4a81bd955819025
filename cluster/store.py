"""Committed Parquet parts on any fsspec store: the record of what is done.

Layout: `URL/STAGE/NAME.parquet`, where NAME is `part_key` of the item keys that the part holds. A part is committed by
create-if-absent of its final name and never changed afterwards (but for `PartStore.replace_part`). Temporary files are
called `.NAME.RANDOM.tmp`; a leading dot keeps them out of Arrow's, Spark's and our own listings. So does that of
`STAGE/.index`, which says what keys the parts hold, so that a run over millions of items need not open each part
(`save_index`). It is a copy only: a part's name stands for the same keys for ever, so what it says of a part that is
there is true; parts that it does not know are opened, and without it all are.

What each back end promises about create-if-absent: see `cluster.files`.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import SchemaVersionError, StoreError, UnsafeStoreError
from cluster.files import Files
from cluster.keys import KeyIndex, hash_key, pack, part_key, unpack
from cluster.retries import PERMANENT, http_status, is_transient, with_retries

T = TypeVar("T")

VERSION_FIELD = b"cluster.schema_version"
STAGE_FIELD = b"cluster.stage"
SUFFIX = ".parquet"
INDEX, DIGEST = ".index", ".digest"
_INDEX_PAYS = 64  # parts that may have to be opened before the saved index is written anew

_INDEX_SCHEMA = pa.schema(
    {"high": pa.uint64(), "low": pa.uint64(), "name": pa.dictionary(pa.int32(), pa.string())}
)

log = logging.getLogger("cluster")

_NAME = re.compile(r"[0-9a-f]{32}")
_STAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TEMP = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{32}\.tmp")
_STATUS_WORDS = {400: "bad request", 401: "permission denied", 403: "permission denied", 404: "no such file"}

class PartStore:
    """Parts of any number of stages below one URL. Picklable; safe to use from several threads.

    Args:
        url: local path or fsspec URL of the folder (created by the first write). A relative path is made absolute.
        storage_options: keyword arguments of the fsspec file system.
        allow_unsafe: accept a back end that does not promise create-if-absent (see `cluster.files`).
        schema_version: version of the row schemas, written into every part. A part with a higher one is refused.

    Raises:
        UnsafeStoreError: the back end promises nothing and `allow_unsafe` is false.
        BadUrlError: the URL's protocol is unknown or its package is not installed.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, Any] | None = None,
        allow_unsafe: bool = False,
        schema_version: int = 1,
    ):
        self.storage_options = dict(storage_options or {})
        self.allow_unsafe = allow_unsafe
        self.schema_version = schema_version
        # One attempt: whoever writes parts tries again himself, and may do so elsewhere.
        self._files = Files(
            url, self.storage_options, temporary=".{stem}.{random}.tmp", attempts=1, allow_unsafe=allow_unsafe
        )
        self._fs, self._local, self.url = self._files.fs, self._files.local, self._files.url
        if not (self._files.safe or allow_unsafe):
            raise UnsafeStoreError(self.url, "this store does not promise create-if-absent")

    def __reduce__(self):
        return _open, (self.url, self.storage_options, self.allow_unsafe, self.schema_version)

    def __repr__(self) -> str:
        return f"PartStore({self.url!r})"

    @property
    def shared(self) -> bool:
        """Whether other processes see the same parts (false for `memory`)."""
        return not self._files.memory

    # Paths and listings ----------------------------------------------------------------------------------------

    def _dir(self, stage: str) -> str:
        if not _STAGE.fullmatch(stage):
            raise StoreError(self.url, f"not a stage name: {stage!r}")
        return self._files.path(stage)

    def path(self, stage: str, name: str) -> str:
        """Path of a part inside the file system (no protocol)."""
        if not _NAME.fullmatch(name):
            raise StoreError(self.url, f"not a part name: {name!r}")
        return f"{self._dir(stage)}/{name}{SUFFIX}"

    def stages(self) -> list[str]:
        """Names of the stages that have a folder, sorted."""
        found = self._patient(lambda: self._do(self._files.root, self._files.list))
        return [name for name, is_dir in found if is_dir and _STAGE.fullmatch(name)]

    def parts(self, stage: str) -> list[str]:
        """Names of the committed parts of a stage, sorted (32 hex digits each); empty where the stage has none."""
        folder = self._dir(stage)
        found = self._patient(lambda: self._do(folder, lambda: self._files.list(stage)))
        names = (name.removesuffix(SUFFIX) for name, is_dir in found if not is_dir and name.endswith(SUFFIX))
        return [name for name in names if _NAME.fullmatch(name)]

    def has_part(self, stage: str, name: str) -> bool:
        """Whether a part is committed.

        Raises:
            StoreError: the store does not say.
        """
        return self._do(self.path(stage, name), lambda: self._files.has(f"{stage}/{name}{SUFFIX}"))

    def _do(self, path: str, action: Callable[[], T]) -> T:
        """What `action` gives, which touches `path`; StoreError for all that it may raise."""
        try:
            return action()
        except StoreError:
            raise
        except Exception as error:
            raise self._error(path, error) from error

    def _patient(self, action: Callable[[], T]) -> T:
        """What `action` reads; on a store behind a network again where a fault may pass."""
        return action() if self._local or self._files.memory else with_retries(action)

    # Writing ---------------------------------------------------------------------------------------------------

    def write_part(
        self, stage: str, key: str | None, table: pa.Table, metadata: Mapping[str, str] | None = None
    ) -> bool:
        """Write and commit one part.

        Args:
            stage: the stage's name.
            key: `part_key` of the keys in `table`, or None to have it computed.
            table: the rows; a column `key` (string, no nulls) names each row's item, at least one row.
            metadata: further key-value pairs for the Parquet footer.

        Returns:
            True if this call committed the part, False if it existed already (then nothing is changed: the same
            item keys name the same work).

        Raises:
            StoreError: not writable, disk full, a wrong key, or a transient fault (`transient`).
        """
        if "key" not in table.column_names or not pa.types.is_string(table.schema.field("key").type):
            raise StoreError(self._dir(stage), "a part needs a string column 'key'")
        column = table["key"]
        if table.num_rows == 0 or column.null_count:
            raise StoreError(self._dir(stage), "a part needs at least one row and no null key")
        name = part_key(pc.unique(column).to_pylist())
        if key is not None and key != name:
            raise StoreError(self._dir(stage), f"the part's name {key!r} is not that of the keys it holds, {name}")
        fields = {k.encode(): v.encode() for k, v in (metadata or {}).items()}
        fields |= {VERSION_FIELD: str(self.schema_version).encode(), STAGE_FIELD: stage.encode()}
        return self._commit(stage, name, table.replace_schema_metadata({**(table.schema.metadata or {}), **fields}))

    def _commit(self, stage: str, name: str, table: pa.Table) -> bool:
        sink = pa.BufferOutputStream()
        self._do(self.path(stage, name), lambda: _to_parquet(table, sink))
        data, file = sink.getvalue().to_pybytes(), f"{stage}/{name}{SUFFIX}"
        return self._do(self.path(stage, name), lambda: self._files.create(file, data))

    def replace_part(self, stage: str, name: str, table: pa.Table) -> str | None:
        """Take rows out of a committed part for good: the one exception to "a part is never changed".

        What is to stay is committed under a new name, then the part is deleted. At any moment of death every row that
        is to stay is in a part: in the old one, in both (whose rows for an item are the same, so that it does not
        matter which counts), or in the new one. Done again, it comes to the same end.

        Only for a store that nobody reads or writes meanwhile: a driver's plan would name a part that is gone.

        Args:
            table: the rows that stay, some or all of the part's, perhaps with other values; none to delete the part.

        Returns:
            name of the new part: a hash of the old name and of the rows; None where none stay.

        Raises:
            SchemaVersionError, StoreError: as for `read_part` and `write_part`.
        """
        old = self.path(stage, name)
        new = None
        if table.num_rows:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table.combine_chunks())
            new = hash_key("replaced", stage, name, sink.getvalue().to_pybytes())
            self._commit(stage, new, table.replace_schema_metadata(self._footer(old)))
        # The saved tables have something of the rows that go.
        for file in (INDEX, DIGEST, f"{name}{SUFFIX}"):
            self._do(f"{self._dir(stage)}/{file}", lambda file=file: self._files.remove(f"{stage}/{file}"))
        return new

    def _footer(self, path: str) -> dict[bytes, bytes]:
        """What a part's writer put into its footer."""

        def read() -> dict[bytes, bytes]:
            with self._fs.open(path, "rb") as source:
                return pq.read_schema(source).metadata or {}

        return self._do(path, read)

    def collect_garbage(self, older_than: float = 24 * 3600.0) -> list[str]:
        """Remove temporary files of writers that died.

        Args:
            older_than: age in seconds below which a temporary file may still be in use, and stays.

        Returns:
            Paths of the removed files.
        """
        removed = []
        for stage in self.stages():
            folder = self._dir(stage)
            for name, is_dir in self._do(folder, lambda stage=stage: self._files.list(stage)):
                if is_dir or not _TEMP.fullmatch(name):
                    continue
                path = f"{folder}/{name}"
                try:
                    age = time.time() - (os.stat(path).st_mtime if self._local else self._fs.modified(path).timestamp())
                    if age >= older_than:
                        self._fs.rm_file(path)
                        removed.append(path)
                except FileNotFoundError:
                    continue  # its writer, or another collector, was quicker
                except Exception as error:
                    raise self._error(path, error) from error
        return removed

    # Reading ---------------------------------------------------------------------------------------------------

    def read_part(
        self, stage: str, name: str, columns: Sequence[str] | None = None, later: pa.Schema | None = None
    ) -> pa.Table:
        """Read one part, all rows, all or some columns.

        Args:
            later: columns of these are null where the part, of an older version of its stage, does not have them.

        Raises:
            SchemaVersionError: the part's schema version is newer than the store's.
            StoreError: missing, unreadable, torn, or without one of `columns`.
        """
        path = self.path(stage, name)
        return self._patient(lambda: self._read_part(path, columns, later))

    def _read_part(self, path: str, columns: Sequence[str] | None, later: pa.Schema | None) -> pa.Table:
        try:
            with self._fs.open(path, "rb") if not self._local else open(path, "rb") as source:
                file = pq.ParquetFile(source, pre_buffer=not self._local)
                schema = file.schema_arrow
                self._check_version(path, schema.metadata or {})
                absent = [c for c in columns or () if c not in schema.names]
                unknown = [c for c in absent if later is None or c not in later.names]
                if unknown:
                    raise StoreError(path, f"the part has no column {', '.join(unknown)}")
                read = None if columns is None else [c for c in columns if c not in absent]
                table = file.read(columns=read, use_threads=False)
                for column in absent:
                    table = table.append_column(column, pa.nulls(len(table), later.field(column).type))
                if absent:
                    table = table.select(list(columns))
        except StoreError:
            raise
        except (pa.ArrowInvalid, OSError) as error:
            found = self._error(path, error)
            if not self._local and not found.transient and isinstance(error, pa.ArrowInvalid) and self._whole(path):
                raise StoreError(path, f"read incompletely ({error})", transient=True) from error
            raise found from error
        except Exception as error:
            raise self._error(path, error) from error
        return table.replace_schema_metadata(None)

    def _whole(self, path: str) -> bool:
        """Whether a part that came in pieces, and was unreadable, is readable as a whole: then pieces were cut
        short."""
        try:
            data = self._fs.cat_file(path)
            self._fs.invalidate_cache(os.path.dirname(path))
            if len(data) != self._fs.info(path)["size"]:
                return True
            pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
            return True
        except pa.ArrowInvalid:
            return False
        except Exception as error:
            raise self._error(path, error) from error

    def _check_version(self, path: str, metadata: Mapping[bytes, bytes]) -> None:
        try:
            version = int(metadata[VERSION_FIELD])
        except (KeyError, ValueError):
            raise StoreError(path, "not a part: it names no schema version") from None
        if version > self.schema_version:
            raise SchemaVersionError(
                path, f"written with schema version {version}, this program reads up to {self.schema_version}"
            )

    def each_part(
        self,
        stage: str,
        columns: Sequence[str],
        names: Sequence[str] | None = None,
        later: pa.Schema | None = None,
    ) -> Iterator[pa.Table]:
        """Go through a stage part by part as they are, so that a key that two parts hold comes twice (see `scan`).

        Some parts are read ahead by threads.

        Args:
            columns: to read.
            names: of the parts; None for all.
            later: as for `read_part`.

        Raises:
            StoreError: as for `read_part`.
        """
        names = self.parts(stage) if names is None else names
        if len(names) < 2:
            yield from (self.read_part(stage, name, columns, later) for name in names)
            return
        threads = 4 if self._local else 16
        with ThreadPoolExecutor(threads) as pool:
            ahead: deque = deque()
            for name in names:
                ahead.append(pool.submit(self.read_part, stage, name, columns, later))
                if len(ahead) >= 4 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def key_index(self, stage: str) -> KeyIndex:
        """Where each finished item is: from the saved index, and the key columns of the parts that it does not know.

        Raises:
            StoreError: an unreadable part, or one whose keys are not 32 hex digits.
        """
        names = self.parts(stage)
        place = {name: code for code, name in enumerate(names)}
        keys, codes = [], []
        if len(names) > 1:
            saved_names, packed, saved = self._saved_index(stage)
            known = np.array([place.get(name, -1) for name in saved_names], np.int32)
            saved = known[saved]
            here = saved >= 0
            keys.append(packed[here])
            codes.append(saved[here])
            for code in known[known >= 0].tolist():
                place.pop(names[code])
        for name, table in zip(place, self.each_part(stage, ["key"], list(place)), strict=True):
            try:
                keys.append(pack(pc.unique(table["key"])))
            except ValueError as error:
                raise StoreError(self.path(stage, name), str(error)) from error
            codes.append(np.full(len(keys[-1]), place[name], np.int32))
        if not keys:
            return KeyIndex(np.empty((0, 2), np.uint64), np.empty(0, np.int32), names)
        return KeyIndex(np.concatenate(keys), np.concatenate(codes), names, unsaved=len(place))

    def _saved_index(self, stage: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Names of parts, packed keys, and for each key its part's position; empty where there is none or it is bad."""
        file = self.open_table(stage, INDEX, _INDEX_SCHEMA)
        if file is not None:
            try:
                table = file.read(use_threads=False)
                table.validate(full=True)
                names = table.unify_dictionaries()["name"].combine_chunks()
                key = np.stack([table[half].to_numpy() for half in ("high", "low")], axis=1)
                return names.dictionary.to_pylist(), key, names.indices.to_numpy()
            except Exception as error:  # Arrow's are many
                self.tell_damaged(stage, INDEX, error)
        return [], np.empty((0, 2), np.uint64), np.empty(0, np.int32)

    def open_table(self, stage: str, name: str, schema: pa.Schema) -> pq.ParquetFile | None:
        """One of the tables about all parts (`INDEX`, `DIGEST`).

        Args:
            schema: columns, in any order, that it has to have, without nulls or with.

        Returns:
            the file, whose columns are not read yet and may turn out damaged (`tell_damaged`); None where there is
            none, it cannot be opened, or it has other columns.
        """
        try:
            if self._local:
                data = pa.memory_map(f"{self._dir(stage)}/{name}")
            else:
                data = pa.BufferReader(self._files.read(f"{stage}/{name}"))
            file = pq.ParquetFile(data, page_checksum_verification=True)
        except FileNotFoundError:
            return None
        except Exception as error:
            self.tell_damaged(stage, name, error)
            return None
        if {field.name: field.type for field in file.schema_arrow} == {field.name: field.type for field in schema}:
            return file
        self.tell_damaged(stage, name, "it has other columns")
        return None

    def tell_damaged(self, stage: str, name: str, why: Exception | str) -> None:
        """Say that one of these tables cannot be read, so that parts that it knows are opened instead."""
        log.warning("%s/%s cannot be read, parts are opened instead: %s", self._dir(stage), name, why)

    def save_table(self, stage: str, name: str, tables: Iterable[pa.Table], compression: str = "zstd") -> None:
        """Write one of these tables, whole or not at all; it comes in pieces of one schema, at least one, each of which
        becomes one row group.

        Raises:
            StoreError: not writable.
        """
        path = f"{self._dir(stage)}/{name}"

        def write(sink) -> None:
            writer = None
            try:
                for table in tables:
                    words = [f.name for f in table.schema if not pa.types.is_uint64(f.type) and f.name != "key"]
                    writer = writer or pq.ParquetWriter(
                        sink, table.schema, compression=compression, use_dictionary=words, write_page_checksum=True
                    )
                    writer.write_table(table, row_group_size=max(1, len(table)))
            finally:
                if writer is not None:
                    writer.close()

        self._do(path, lambda: self._files.write(f"{stage}/{name}", write))

    def extend_index(self, stage: str, names: list[str], packed: np.ndarray, codes: np.ndarray) -> bool:
        """Add parts that have just been committed to the saved index, if it is worth while, without opening any.

        Args:
            stage: the stage's name.
            names: of the parts.
            packed, codes: the keys that they hold, and for each key its part's position in `names`.

        Returns:
            Whether it was written.
        """
        if len(names) < _INDEX_PAYS:
            return False
        saved_names, saved, saved_codes = self._saved_index(stage)
        names = [*saved_names, *names]
        order = sorted(range(len(names)), key=names.__getitem__)
        place = np.empty(len(names), np.int32)
        place[order] = np.arange(len(names))
        codes = place[np.concatenate([saved_codes, codes + len(saved_names)])]
        index = KeyIndex(np.concatenate([saved, packed]), codes, [names[i] for i in order], unsaved=len(names))
        return self.save_index(stage, index)

    def save_index(self, stage: str, index: KeyIndex) -> bool:
        """Save what `key_index` gave, if it is worth while: it had to open many parts.

        Two drivers may overwrite each other's; what gets lost is found again by opening parts.

        Returns:
            Whether it was written.
        """
        if index.unsaved < _INDEX_PAYS:
            return False
        name = pa.DictionaryArray.from_arrays(pa.array(index.codes), pa.array(index.names, pa.string()))
        table = pa.table({"high": index.high, "low": index.low, "name": name})
        self.save_table(stage, INDEX, [table], compression="none")
        return True

    def index(self, stage: str) -> pa.Table:
        """`key_index` as a table.

        Returns:
            Table with `key` (string, distinct) and `part` (dictionary of strings): the part whose rows count for the
            key, which is the lexicographically smallest of those that hold it.
        """
        index = self.key_index(stage)
        part = pa.DictionaryArray.from_arrays(pa.array(index.codes), pa.array(index.names, pa.string()))
        return pa.table({"key": pa.array(unpack(index.packed), pa.string()), "part": part})

    def done_keys(self, stage: str) -> set[str]:
        """Keys of the items that have committed rows at this stage. Reads only the key column of every part."""
        return set(unpack(self.key_index(stage).packed))

    def scan(
        self,
        stage: str,
        keys: Iterable[str] | None = None,
        columns: Sequence[str] | None = None,
        parts: Iterable[str] | None = None,
        later: pa.Schema | None = None,
    ) -> Iterator[pa.Table]:
        """Go through a stage part by part, with exactly one set of rows for each item key.

        Two drivers at once may have committed two parts that hold the same key; the rows of the lexicographically
        smallest part name count.

        Args:
            stage: the stage's name.
            keys: only rows of these keys; None for all.
            columns: only these columns (`key` is always read, and comes back only if asked for).
            parts: names of the parts to look in; None for all.
            later: as for `read_part`.

        Yields:
            One table for each part that has rows to give.
        """
        wanted = None if keys is None else set(keys)
        seen: set[str] = set()
        for name in sorted(set(parts)) if parts is not None else self.parts(stage):
            if wanted is not None and len(seen) == len(wanted):
                return
            read = None if columns is None else list(dict.fromkeys(["key", *columns]))
            table = self.read_part(stage, name, read, later)
            distinct = pc.unique(table["key"]).to_pylist()
            new = [k for k in distinct if k not in seen and (wanted is None or k in wanted)]
            if not new:
                continue
            seen.update(new)
            if len(new) < len(distinct):
                table = table.filter(pc.is_in(table["key"], value_set=pa.array(new, pa.string())))
            yield table if columns is None else table.select(list(columns))

    def read_rows(
        self,
        stage: str,
        keys: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        parts: Iterable[str] | None = None,
        schema: pa.Schema | None = None,
        later: pa.Schema | None = None,
    ) -> pa.Table:
        """Rows of a stage as one table, exactly one set for each item key (see `scan`).

        Args:
            stage, columns, parts, later: as for `scan`.
            keys: the items wanted. Rows come in the order of `keys`, rows of one item in the order they were written;
                a key with no rows is left out. With None: all items, in the order of part names.
            schema: schema to give an empty answer (else a table without columns).

        Raises:
            StoreError: as for `read_part`.
        """
        wanted = None if keys is None else list(dict.fromkeys(keys))
        if wanted is not None and parts is None:
            index = self.key_index(stage)
            try:
                codes = np.unique(index.find(pack(wanted)))
            except ValueError as error:
                raise StoreError(self._dir(stage), str(error)) from error
            parts = [index.names[code] for code in codes.tolist() if code >= 0]
        read = columns if columns is None or wanted is None else list(dict.fromkeys(["key", *columns]))
        tables = list(self.scan(stage, wanted, read, parts, later))
        if not tables:
            empty = schema if schema is not None else pa.schema([])
            return empty.empty_table().select([c for c in columns or empty.names if c in empty.names])
        table = pa.concat_tables(tables, promote_options="default")
        if wanted is not None:
            order = pc.index_in(table["key"], value_set=pa.array(wanted, pa.string())).to_numpy()
            if np.any(np.diff(order) < 0):
                table = table.take(pa.array(np.argsort(order, kind="stable")))
        return table if columns is None else table.select(list(columns))

    # Errors ----------------------------------------------------------------------------------------------------

    def _error(self, path: str, error: Exception) -> StoreError:
        path = path if self._local else self._fs.unstrip_protocol(path)
        if is_transient(error, not self._local):
            return StoreError(path, f"{type(error).__name__}: {error}", transient=True)
        status, code = http_status(error)
        if status is not None:
            return StoreError(path, f"{_STATUS_WORDS.get(status, 'refused')} ({code or status}: {error})")
        if isinstance(error, OSError) and error.errno in PERMANENT:
            return StoreError(path, PERMANENT[error.errno])
        if isinstance(error, FileNotFoundError):
            return StoreError(path, "no such file")
        if isinstance(error, PermissionError):
            return StoreError(path, "permission denied")
        if isinstance(error, pa.ArrowInvalid):
            return StoreError(path, f"not a readable Parquet file ({error})")
        return StoreError(path, f"{type(error).__name__}: {error}")


def _open(url: str, storage_options: dict, allow_unsafe: bool, schema_version: int) -> PartStore:
    return PartStore(url, storage_options=storage_options, allow_unsafe=allow_unsafe, schema_version=schema_version)


def _to_parquet(table: pa.Table, sink) -> None:
    # Dictionaries pay for repeated words, not for keys, pictures and vectors.
    words = [f.name for f in table.schema if pa.types.is_string(f.type) and f.name != "key"]
    pq.write_table(table, sink, compression="zstd", compression_level=1, use_dictionary=words)

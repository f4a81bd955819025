"""What SRC holds, as tables: any number of photos, few of them in memory at a time.

A listing is gone through several times (what has changed, the plan, the source rows), and SRC may be slow, or change
meanwhile. So it is read once, into a file without a name on the local disk (TMPDIR), from which the tables come. In
memory stay 8 bytes a photo (its id), and what could not be used.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import hash_key
from pipelines.archive.entry import SourceRow
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import content_digest
from pipelines.archive.source import list_photos
from pipelines.run.schemas import ERROR, OK, SOURCE, SOURCE_SCHEMA

ROWS = 8192  # in one table


class ProtectError(ValueError):
    """Something about a run as a whole. `str()` is `CODE: words`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


def source_key(row: SourceRow) -> str:
    """Key of a photo at the source: where it is, and which version of it.

    The version is the content where it is known, else size and modification time (or etag).
    """
    version = (row.size, row.modified) if row.content is None else ("content", row.content)
    fields = (row.path, row.url, *version, row.person_id, row.error)
    return hash_key(SOURCE, *("" if value is None else value for value in fields))


def source_table(photos: Sequence[SourceRow]) -> pa.Table:
    """Rows of the source table (``run.schemas.SOURCE_SCHEMA``)."""
    return pa.Table.from_pylist(
        [
            {
                "key": source_key(row),
                "photo_id": row.photo_id,
                "path": row.path,
                "url": row.url,
                "size": row.size,
                "modified": row.modified,
                "content": row.content,
                "person_id": row.person_id,
                "status": ERROR if row.error else OK,
                "reason": row.error,
            }
            for row in photos
        ],
        SOURCE_SCHEMA,
    )


def packed_ids(ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> np.ndarray:
    """Ids of photos as uint64 (n,): they are 16 hex digits."""
    text = ids if isinstance(ids, list) else ids.to_pylist()
    return np.frombuffer(bytes.fromhex("".join(text)), ">u8").astype(np.uint64)


class _Spool:
    """Source rows in a file without a name."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="scol-listing-")
        self._writer = pq.ParquetWriter(self._file, SOURCE_SCHEMA, compression="zstd", compression_level=1)
        self._ids: list[np.ndarray] = []
        self.ids = np.empty(0, np.uint64)

    def add(self, photos: Sequence[SourceRow]) -> None:
        if photos:
            table = source_table(photos)
            self._writer.write_table(table)
            self._ids.append(packed_ids(table["photo_id"]))

    def end(self) -> None:
        self._writer.close()
        self.ids = np.concatenate(self._ids) if self._ids else self.ids
        self._ids = []

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        file = pq.ParquetFile(self._file)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=None if columns is None else list(columns), use_threads=False)


def _rows(table: pa.Table) -> Iterator[SourceRow]:
    for row in table.to_pylist():
        names = ("path", "url", "size", "modified", "person_id", "reason", "content")
        yield SourceRow(*(row[name] for name in names))


class Listing:
    """The photos of a run, in the order of paths, with those that cannot be used (status `error`).

    Iterating gives tables of `SOURCE_SCHEMA`, as often as wanted.

    Attributes:
        ids: uint64 (n,), the photos' ids, which are 16 hex digits.
        all_ids: the same with those that ``--limit`` leaves out.
        skipped: entries left alone, by code.
        failed: paths of entries that cannot be used; they may be folders.
    """

    def __init__(self, everything: _Spool, chosen: _Spool, skipped: dict[str, int], failed: list[str]) -> None:
        self._everything, self._chosen = everything, chosen
        self.skipped, self.failed = skipped, failed

    def __iter__(self) -> Iterator[pa.Table]:
        return self._chosen.tables()

    def __len__(self) -> int:
        return len(self._chosen.ids)

    @property
    def ids(self) -> np.ndarray:
        return self._chosen.ids

    @property
    def all_ids(self) -> np.ndarray:
        return self._everything.ids

    @property
    def total(self) -> int:
        """Photos, also those that ``--limit`` leaves out."""
        return len(self._everything.ids)

    def all_paths(self) -> Iterator[pa.Array]:
        """Paths of all photos, in pieces."""
        for table in self._everything.tables(["path"]):
            yield table["path"].combine_chunks()

    def rows(self) -> Iterator[SourceRow]:
        """The photos one by one."""
        for table in self:
            yield from _rows(table)

    @property
    def photos(self) -> list[SourceRow]:
        """All of them in memory: for listings that are known to be small."""
        return list(self.rows())


def list_source(
    src: str,
    *,
    out: str | None = None,
    people_from: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    verify_content: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Listing:
    """List SRC; with ``limit`` a random sample of so many photos, the same for the same seed, in order of paths.

    Args:
        verify_content: read every photo of the sample and set its row's `content`.
        stop: asked now and then; where it says true, the listing ends as by Ctrl-C (KeyboardInterrupt).

    Raises:
        SourceError: see ``archive.source.list_photos``.
        ProtectError: EMPTY, no photo there.
        OSError: no room for the listing in TMPDIR.
    """
    return spooled(
        list_photos(src, people_from=people_from, out=out), src, limit, seed, verify_content, stop
    )


def spooled(
    entries: Iterable[SourceRow],
    src: str,
    limit: int | None = None,
    seed: int = 0,
    verify_content: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Listing:
    """``list_source`` of entries that come from anywhere."""
    everything, skipped, failed = _Spool(), Counter(), []
    waiting: list[SourceRow] = []

    def write(spool: _Spool, content: bool) -> None:
        spool.add(with_content(waiting, stop) if content else waiting)
        waiting.clear()

    for row in entries:
        if stop():
            raise KeyboardInterrupt
        if row.skipped:
            skipped[row.code] += 1
            continue
        if row.error is not None:
            failed.append(row.path)
        waiting.append(row)
        if len(waiting) == ROWS:
            write(everything, verify_content and limit is None)
    write(everything, verify_content and limit is None)
    everything.end()
    count = len(everything.ids)
    if not count:
        others = f" ({sum(skipped.values())} other files)" if skipped else ""
        raise ProtectError("EMPTY", f"no photo at {src}{others}")
    if limit is None or (limit >= count and not verify_content):
        return Listing(everything, everything, dict(skipped), failed)

    chosen, first = _Spool(), 0
    places = np.sort(np.array(random.Random(seed).sample(range(count), min(limit, count)), np.int64))
    for table in everything.tables():
        here = places[(places >= first) & (places < first + table.num_rows)] - first
        first += table.num_rows
        waiting.extend(_rows(table.take(pa.array(here))))
        if len(waiting) >= ROWS:
            write(chosen, verify_content)
    write(chosen, verify_content)
    chosen.end()
    return Listing(everything, chosen, dict(skipped), failed)


def with_content(photos: Sequence[SourceRow], stop: Callable[[], bool], readers: int = 16) -> list[SourceRow]:
    """The rows with `content` set; a photo that cannot be read gets `error`. Every file is read once."""

    def hashed(row: SourceRow) -> SourceRow:
        if row.error is not None:
            return row
        try:
            return replace(row, content=content_digest(row.url))
        except SourceError as error:
            return replace(row, error=str(error))

    out: list[SourceRow] = []
    with ThreadPoolExecutor(readers) as pool:
        for first in range(0, len(photos), 256):  # `map` would queue all of them at once
            if stop():
                raise KeyboardInterrupt
            out.extend(pool.map(hashed, photos[first : first + 256]))
    return out

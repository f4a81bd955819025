"""Light columns of a stage's rows, kept in one file, so that what is asked every night need not open every part.

`STAGE/.digest` holds some columns of the rows of all parts known, with the parts' names. Like the saved index it cannot
lie: a part never changes, so a row is true if its part is in the listing, and is dropped if it is not. Parts that it
does not know are opened. It can be deleted at any time; two drivers may overwrite each other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.retries import with_retries
from cluster.store import DIGEST, PartStore

_PAYS = 64  # parts that may have to be opened before the file is written anew
_PART = "cluster.part"
_ROWS = 65536  # in a piece


def scan_digest(
    store: PartStore, stage: str, columns: Sequence[str], light: pa.Schema, save: bool = False
) -> Iterator[pa.Table]:
    """Go through some columns of all rows of a stage, in pieces; a key that two parts hold comes twice.

    Args:
        store, stage: whose.
        columns: wanted, of `light`.
        light: columns that the file keeps, `key` among them; with others than before it is made anew. Null where a part
            of an older version of the stage does not have them.
        save: write the file anew if many parts have to be opened. Only for who may write to the store, while nobody
            takes rows out of it (`PartStore.replace_part`), which would come back.

    Raises:
        StoreError: unreadable parts, or the file cannot be written.
    """
    for table in _scan(store, stage, columns, light, save):
        yield table.select(list(columns))


def read_digest(
    store: PartStore, stage: str, columns: Sequence[str], light: pa.Schema, save: bool = False
) -> pa.Table:
    """The same as one table, with one set of rows for each item key (see `PartStore.scan`).

    Returns:
        Table with `columns`, rows in the order of part names and within a part as they were written; without columns
        where the stage has no part.
    """
    tables = list(_scan(store, stage, list(dict.fromkeys(["key", *columns])), light, save))
    if not tables:
        return pa.table({})
    return _one_part_each(pa.concat_tables(tables)).select(list(columns))


def _scan(store: PartStore, stage: str, columns: Sequence[str], light: pa.Schema, save: bool) -> Iterator[pa.Table]:
    """As `scan_digest`, with the parts' names."""
    names = store.parts(stage)
    saved = _Saved(store, stage, light)
    new = saved.unknown(names)
    if save and len(new) >= _PAYS:
        with_retries(lambda: store.save_table(stage, DIGEST, _pieces(saved, light.names, names)))
        saved = _Saved(store, stage, light)
    yield from _pieces(saved, columns, names)
    if save and saved.damaged:
        # What is left is of use, but each run would open the parts of the rest again.
        saved.groups = []
        with_retries(lambda: store.save_table(stage, DIGEST, _pieces(saved, light.names, names)))


class _Saved:
    """The saved file. Each of its row groups holds the rows of some parts, all of them (`PartStore.save_table`).

    Attributes:
        groups: for each row group its position and the names of its parts.
        damaged: whether columns could not be read.
    """

    def __init__(self, store: PartStore, stage: str, light: pa.Schema) -> None:
        self.store, self.stage, self.light = store, stage, light
        self.damaged, self.groups = False, []
        self.file = store.open_table(stage, DIGEST, light.append(pa.field(_PART, pa.string())))
        for group in range(self.file.num_row_groups if self.file is not None else 0):
            table = self.read(group, [_PART])
            if table is not None:
                self.groups.append((group, pc.unique(table[_PART]).to_pylist()))

    def unknown(self, names: list[str]) -> list[str]:
        """Those of the parts that the file does not have."""
        known = {name for _, some in self.groups for name in some}
        return [name for name in names if name not in known]

    def read(self, group: int, columns: list[str]) -> pa.Table | None:
        """Columns of a row group; None, which is told, where they are damaged."""
        try:
            return self.file.read_row_group(group, columns, use_threads=False).select(columns)
        except Exception as error:  # Arrow's are many
            self.store.tell_damaged(self.stage, DIGEST, error)
            self.damaged = True
            return None


def _pieces(saved: _Saved, columns: Sequence[str], names: list[str]) -> Iterator[pa.Table]:
    columns = [*columns, _PART]
    there, new = pa.array(names, pa.string()), saved.unknown(names)
    for group, parts in saved.groups:
        table = saved.read(group, columns)
        if table is None:
            new += sorted({*names} & {*parts})
        else:
            yield table.filter(pc.is_in(table[_PART], value_set=there))
    some, rows = [], 0
    for name, table in zip(new, saved.store.each_part(saved.stage, columns[:-1], new, saved.light), strict=True):
        some.append(table.select(columns[:-1]).append_column(_PART, pa.array([name] * len(table), pa.string())))
        rows += len(table)
        if rows >= _ROWS:
            yield pa.concat_tables(some).combine_chunks()
            some, rows = [], 0
    if some:
        yield pa.concat_tables(some).combine_chunks()


def _one_part_each(table: pa.Table) -> pa.Table:
    """In the order of part names; of a key that is in several parts the rows of the smallest name."""
    part = table[_PART].combine_chunks().dictionary_encode()
    order = np.argsort(np.argsort(part.dictionary.to_pylist(), kind="stable"), kind="stable")
    rank = order[part.indices.to_numpy()]
    rows = pa.table({"key": table["key"], "rank": rank})
    least = rows.group_by("key").aggregate([("rank", "min")])
    place = pc.index_in(table["key"], value_set=least["key"].combine_chunks())
    keep = least["rank_min"].to_numpy()[place.to_numpy()] == rank
    table, rank = table.filter(pa.array(keep)), rank[keep]
    return table if np.all(rank[1:] >= rank[:-1]) else table.take(pa.array(np.argsort(rank, kind="stable")))

"""Light columns of a stage's rows, kept in one file, so that what is asked every night need not open every part.

`STAGE/.digest` holds some columns of the rows of all parts known, with the parts' names. Like the saved index it cannot lie: a
part never changes, so a row is true if its part is in the listing, and is dropped if it is not. Parts that it does not
know are opened. It can be deleted at any time; two drivers may overwrite each other's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.store import DIGEST, PartStore

log = logging.getLogger("cluster")

_PAYS = 64  # parts that may have to be opened before the file is written anew
_PART = "cluster.part"


def read_digest(
    store: PartStore, stage: str, columns: Sequence[str], light: Sequence[str], save: bool = False
) -> pa.Table:
    """Some columns of all rows of a stage, one set of rows for each item key (see `PartStore.scan`).

    Args:
        store, stage: whose.
        columns: wanted, of `light`.
        light: columns that the file keeps, `key` among them; with others than before it is made anew.
        save: write the file anew if many parts had to be opened. Only for who may write to the store, while nobody
            takes rows out of it (`PartStore.replace_part`), which would come back.

    Returns:
        Table with `columns`, rows in the order of part names and within a part as they were written; without columns
        where the stage has no part.

    Raises:
        StoreError: unreadable parts, or the file cannot be written.
    """
    names = store.parts(stage)
    saved = store.read_table(stage, DIGEST)
    if saved is not None and set(saved.column_names) != {_PART, *light}:
        saved = None
    tables, known = [], set()
    if saved is not None:
        saved = saved.filter(pc.is_in(saved[_PART].cast(pa.string()), value_set=pa.array(names, pa.string())))
        tables.append(saved)
        known = set(pc.unique(saved[_PART].cast(pa.string())).to_pylist())
    new = [name for name in names if name not in known]
    for name, table in zip(new, store.read_parts(stage, new, list(light)), strict=True):
        tables.append(table.append_column(_PART, pa.array([name] * len(table), pa.string()).dictionary_encode()))
    if not tables:
        return pa.table({})
    table = pa.concat_tables([t.select([*light, _PART]) for t in tables], promote_options="permissive")
    table = table.unify_dictionaries().combine_chunks()
    if save and len(new) >= _PAYS:
        store.save_table(stage, DIGEST, table)
    return _one_part_each(table).select(list(columns))


def _one_part_each(table: pa.Table) -> pa.Table:
    """In the order of part names; of a key that is in several parts the rows of the smallest name."""
    part = table[_PART].combine_chunks()
    order = np.argsort(np.argsort(part.dictionary.to_pylist(), kind="stable"), kind="stable")
    rank = order[part.indices.to_numpy()]
    rows = pa.table({"key": table["key"], "rank": rank})
    least = rows.group_by("key").aggregate([("rank", "min")])
    place = pc.index_in(table["key"], value_set=least["key"].combine_chunks())
    keep = least["rank_min"].to_numpy()[place.to_numpy()] == rank
    table, rank = table.filter(pa.array(keep)), rank[keep]
    return table if np.all(rank[1:] >= rank[:-1]) else table.take(pa.array(np.argsort(rank, kind="stable")))

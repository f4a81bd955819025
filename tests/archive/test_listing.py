"""Listings of any length: few rows in memory, the same tables as often as wanted."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from pipelines.archive import listing
from pipelines.archive.entry import SourceRow
from pipelines.archive.listing import ProtectError, packed_ids, source_table, spooled
from pipelines.bench.listing import entries


def test_a_listing_gives_its_rows_again_and_again(monkeypatch):
    monkeypatch.setattr(listing, "ROWS", 7)
    rows = list(entries(40))
    rows[3] = SourceRow("000000/bad.jpg", "/x", error="UNREADABLE: no")
    mixed = [*rows[:20], SourceRow("notes.txt", "/n", error="NOT_A_PHOTO: no"), *rows[20:]]
    found = spooled(iter(mixed), "/archive")
    assert [len(table) for table in found] == [7] * 5 + [5]
    assert list(found.rows()) == found.photos == rows
    assert pa.concat_tables(found) == source_table(rows)
    assert (len(found), found.total, found.skipped, found.failed) == (40, 40, {"NOT_A_PHOTO": 1}, ["000000/bad.jpg"])
    assert [f"{i:016x}" for i in found.ids.tolist()] == [row.photo_id for row in rows]
    assert [path for piece in found.all_paths() for path in piece.to_pylist()] == [row.path for row in rows]


def test_a_sample_has_all_ids_beside_its_own(monkeypatch):
    monkeypatch.setattr(listing, "ROWS", 7)
    rows = list(entries(40))
    found = spooled(iter(rows), "/archive", limit=11, seed=3)
    assert (len(found), found.total) == (11, 40) and np.array_equal(found.all_ids, spooled(rows, "/archive").ids)
    paths = [row.path for row in found.rows()]
    assert paths == sorted(paths) and set(paths) < {row.path for row in rows}
    assert paths == [row.path for row in spooled(iter(rows), "/archive", limit=11, seed=3).rows()]
    assert paths != [row.path for row in spooled(iter(rows), "/archive", limit=11, seed=4).rows()]
    assert np.array_equal(packed_ids([row.photo_id for row in found.rows()]), found.ids)
    with pytest.raises(ProtectError, match="EMPTY"):
        spooled(iter([]), "/archive")


def test_rows_do_not_pile_up_in_memory(monkeypatch):
    monkeypatch.setattr(listing, "ROWS", 500)

    def grown(photos: int) -> int:
        tracemalloc.start()
        found = spooled(entries(photos), "/archive")
        for _ in found:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    grown(500)
    few, many = grown(1000), grown(8000)
    assert many - few < 7000 * 60, "8 bytes a photo stay, and what describes the pieces; a row takes some 500"

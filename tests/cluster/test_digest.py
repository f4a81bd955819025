"""The light columns of a stage's rows, kept in one file."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import PartStore, StoreError, hash_key
from cluster.digest import read_digest
from cluster.store import DIGEST

LIGHT = pa.schema([("key", pa.string()), ("n", pa.int64()), ("word", pa.string())])


def part(numbers):
    """Two rows an item."""
    rows = [{"key": hash_key(n), "n": n, "word": f"w{n}", "heavy": b"x" * 10} for n in numbers for _ in range(2)]
    return pa.Table.from_pylist(rows)


def fill(store, count, start=0):
    for n in range(start, start + count):
        store.write_part("s", None, part([2 * n, 2 * n + 1]))


def read(store, **more):
    return read_digest(store, "s", ["key", "n"], LIGHT, **more)


def opened(store, monkeypatch):
    """Names of the parts that are opened from now on."""
    names, read_part = [], store.read_part
    monkeypatch.setattr(store, "read_part", lambda stage, name, *a: names.append(name) or read_part(stage, name, *a))
    return names


@pytest.mark.parametrize("url", ["local", "memory"])
def test_rows_are_those_of_a_scan_and_parts_are_opened_once(tmp_path, monkeypatch, url):
    store = PartStore(tmp_path if url == "local" else f"memory://{tmp_path}")
    assert read(store).num_columns == 0
    fill(store, 70)
    expected = pa.concat_tables(store.scan("s", None, ["key", "n"]))
    names = opened(store, monkeypatch)
    assert read(store) == expected and len(names) == 70
    assert read(store, save=True) == expected and len(names) == 140  # the first call was not to save anything
    assert read(store, save=True) == expected and len(names) == 140
    fill(store, 3, start=70)
    assert read(store).num_rows == expected.num_rows + 12 and len(names) == 143
    read_digest(store, "s", ["n"], LIGHT.remove(2))  # other columns are kept: all are opened
    assert len(names) == 143 + 73


def test_of_a_key_in_two_parts_the_rows_of_one_count(tmp_path):
    store = PartStore(tmp_path)
    fill(store, 70)
    store.write_part("s", None, part([0, 3, 500]))
    for _ in range(2):
        found = read(store, save=True)
        assert found == pa.concat_tables(store.scan("s", None, ["key", "n"]))
        assert sorted(found["n"].to_pylist()) == sorted(2 * [*range(140), 500])


def test_rows_of_parts_that_are_gone_or_replaced_are_dropped(tmp_path):
    store = PartStore(tmp_path)
    fill(store, 70)
    read(store, save=True)
    store._fs.rm_file(store.path("s", store.parts("s")[0]))
    assert read(store).num_rows == 4 * 69
    assert (tmp_path / "s" / DIGEST).exists()
    name = store.parts("s")[0]
    table = store.read_part("s", name)
    store.replace_part("s", name, table.slice(0, 2))
    assert not (tmp_path / "s" / DIGEST).exists() and read(store).num_rows == 4 * 69 - 2


def test_a_torn_file_is_made_anew_and_one_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    store = PartStore(tmp_path)
    fill(store, 70)
    whole = read(store, save=True)
    path = tmp_path / "s" / DIGEST
    path.write_bytes(path.read_bytes()[:100])
    assert read(store, save=True) == whole and read(store) == whole
    path.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="disk"):
        read(store, save=True)
    assert sorted(p.name for p in (tmp_path / "s").iterdir() if p.name.startswith(".")) == []


def test_columns_that_older_parts_lack_are_null(tmp_path):
    """A stage's newer version has a column more; parts of the older one stay in the store."""
    store = PartStore(tmp_path)
    fill(store, 40)
    later = LIGHT.append(pa.field("score", pa.float32()))
    rows = [{"key": hash_key(n), "n": n, "word": "w", "score": 0.5} for n in range(80, 120)]
    for row in rows:
        store.write_part("s", None, pa.Table.from_pylist([row], later))
    for _ in range(2):
        found = read_digest(store, "s", ["n", "score"], later, save=True)
        scores = dict(zip(found["n"].to_pylist(), found["score"].to_pylist(), strict=True))
        assert scores == {n: None for n in range(80)} | {n: 0.5 for n in range(80, 120)}
    assert (tmp_path / "s" / DIGEST).exists()
    with pytest.raises(StoreError, match="no column other"):
        store.read_part("s", store.parts("s")[0], ["n", "other"], later)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("column", ["key", "n", "word", "cluster.part"])
def test_damaged_columns_under_a_good_footer_are_told_and_made_anew(tmp_path, monkeypatch, caplog, column, save):
    monkeypatch.setattr("cluster.digest._ROWS", 64)  # several row groups, of which one is damaged
    store = PartStore(tmp_path)
    fill(store, 70)
    whole = read_digest(store, "s", ["key", "n", "word"], LIGHT, save=True)
    path = tmp_path / "s" / DIGEST
    data, file = bytearray(path.read_bytes()), pq.ParquetFile(path)
    group = file.metadata.row_group(1)
    assert file.num_row_groups > 2
    found = next(group.column(i) for i in range(4) if group.column(i).path_in_schema == column)
    start = found.dictionary_page_offset or found.data_page_offset
    data[start : start + found.total_compressed_size] = b"\x55" * found.total_compressed_size
    path.write_bytes(data)
    names = opened(store, monkeypatch)
    assert read_digest(store, "s", ["key", "n", "word"], LIGHT, save=save) == whole
    assert DIGEST in caplog.text and "parts are opened instead" in caplog.text and 0 < len(set(names)) <= 70
    names.clear(), caplog.clear()
    assert read_digest(store, "s", ["key", "n", "word"], LIGHT, save=save) == whole
    assert (names == [] and not caplog.text) if save else names, "with `save` it has been made anew"


def test_columns_of_another_type_are_not_believed(tmp_path):
    store = PartStore(tmp_path)
    fill(store, 70)
    whole = read(store, save=True)
    path = tmp_path / "s" / DIGEST
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "n", table["n"].cast(pa.string())), path)
    assert read(store) == whole

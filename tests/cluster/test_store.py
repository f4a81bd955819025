import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import PartStore, SchemaVersionError, StoreError, UnsafeStoreError, hash_key, part_key
from cluster.files import Files
from cluster.keys import pack
from cluster.store import INDEX
from tests.helpers.arithmetic import race

A, B, C = (hash_key(name) for name in "ABC")
ROOT = Path(__file__).parents[2]


def rows(keys, values):
    return pa.table({"key": keys, "value": values, "status": ["ok"] * len(keys)})


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return PartStore(tmp_path / "m" if request.param == "local" else f"memory://{tmp_path}")


def test_keys_do_not_depend_on_order_but_on_every_field():
    assert part_key([A, B]) == part_key([B, A, A])
    assert part_key([A]) != part_key([A, B])
    assert hash_key("ab", "c") != hash_key("a", "bc")
    assert hash_key("a", 1) == hash_key("a", "1")
    assert len(hash_key()) == 32


def test_write_then_read_back(store):
    table = pa.table(
        {
            "key": [A, A, B],
            "code": pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2)),
            "picture": pa.array([b"\x00\xff", None, b""], pa.binary()),
        }
    )
    assert store.write_part("invert", part_key([A, B]), table)
    assert store.read_rows("invert") == table
    assert store.read_rows("invert", [B, A], ["picture"])["picture"].to_pylist() == [b"", b"\x00\xff", None]
    assert store.done_keys("invert") == {A, B}
    assert store.stages() == ["invert"]
    assert store.read_rows("invert", [C]).num_rows == 0
    assert store.read_rows("later", schema=table.schema) == table.slice(0, 0)
    assert store.done_keys("later") == set()


def test_a_part_is_never_changed(store):
    assert store.write_part("s", None, rows([A, B], [1, 2])) is True
    assert store.write_part("s", None, rows([B, A], [3, 4])) is False
    assert store.read_rows("s", [A, B], ["value"])["value"].to_pylist() == [1, 2]


def test_of_two_parts_with_one_key_the_smallest_name_counts(store):
    groups = [[A], [A, B], [A, B, C]]
    for number, keys in enumerate(groups):
        store.write_part("s", None, rows(keys, [number] * len(keys)))
    names = sorted(part_key(keys) for keys in groups)
    order = [[part_key(keys) for keys in groups].index(name) for name in names]
    first = {key: next(number for number in order if key in groups[number]) for key in (A, B, C)}
    table = store.read_rows("s")
    assert dict(zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True)) == first
    assert table.num_rows == 3
    index = {row["key"]: row["part"] for row in store.index("s").to_pylist()}
    assert index == {key: part_key(groups[number]) for key, number in first.items()}


@pytest.mark.parametrize(
    "table, key",
    [
        (rows([A], [1]), part_key([B])),
        (rows([], []).cast(pa.schema([("key", pa.string()), ("value", pa.int64()), ("status", pa.string())])), None),
        (pa.table({"key": pa.array([A, None])}), None),
        (pa.table({"value": [1]}), None),
        (pa.table({"key": [1]}), None),
    ],
)
def test_a_part_must_hold_the_keys_it_is_named_by(store, table, key):
    with pytest.raises(StoreError):
        store.write_part("s", key, table)
    assert store.parts("s") == []


@pytest.mark.parametrize("stage", ["", "..", "a/b", ".hidden", "a" * 65])
def test_a_stage_name_cannot_leave_the_store(store, stage):
    with pytest.raises(StoreError):
        store.write_part(stage, None, rows([A], [1]))


def test_torn_temporary_files_are_ignored_and_collected(tmp_path):
    store = PartStore(tmp_path)
    store.write_part("s", None, rows([A], [1]))
    name = part_key([B])
    stale = tmp_path / "s" / f".{name}.{'0' * 32}.tmp"
    fresh = tmp_path / "s" / f".{name}.{'1' * 32}.tmp"
    for path in (stale, fresh):
        path.write_bytes(b"PAR1 torn")
    (tmp_path / "s" / "notes.txt").write_text("not ours")
    os.utime(stale, (0, 0))
    assert store.done_keys("s") == {A}
    assert store.read_rows("s").num_rows == 1
    assert store.collect_garbage(older_than=3600) == [str(stale)]
    assert not stale.exists() and fresh.exists() and (tmp_path / "s" / "notes.txt").exists()
    assert store.write_part("s", name, rows([B], [2]))


def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch):
    store = PartStore(tmp_path)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="disk full") as caught:
        store.write_part("s", None, rows([A], [1]))
    assert not caught.value.transient and str(tmp_path / "s") in caught.value.path
    assert list((tmp_path / "s").iterdir()) == []
    monkeypatch.undo()
    assert store.write_part("s", None, rows([A], [1]))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_told_by_the_real_system_call(tmp_path, monkeypatch):
    (tmp_path / "s").mkdir()
    temp = str(tmp_path / "s" / "full")
    os.symlink("/dev/full", temp)
    monkeypatch.setattr(Files, "_temporary", lambda self, path: temp)
    monkeypatch.setattr("builtins.open", lambda path, mode: os.fdopen(os.open(path, os.O_WRONLY), "wb"))
    with pytest.raises(StoreError, match="disk full"):
        PartStore(tmp_path).write_part("s", None, rows([A], [1]))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError) as caught:
        PartStore(tmp_path / "file").write_part("s", None, rows([A], [1]))
    assert str(tmp_path / "file") in caught.value.path and not caught.value.transient


def test_a_file_system_without_hard_links_is_refused(tmp_path, monkeypatch):
    def no_links(a, b):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(UnsafeStoreError):
        PartStore(tmp_path).write_part("s", None, rows([A], [1]))
    assert os.listdir(tmp_path / "s") == []
    unsafe = PartStore(tmp_path, allow_unsafe=True)
    assert unsafe.write_part("s", None, rows([A], [1])) is True
    assert unsafe.write_part("s", None, rows([A], [2])) is False
    assert unsafe.read_rows("s")["value"].to_pylist() == [1]


def test_a_repeated_link_request_counts_as_won(tmp_path, monkeypatch):
    """As on NFS, where the answer to the request that succeeded may get lost."""
    link = os.link

    def twice(a, b):
        link(a, b)
        raise FileExistsError

    monkeypatch.setattr(os, "link", twice)
    assert PartStore(tmp_path).write_part("s", None, rows([A], [1])) is True


def test_a_back_end_that_promises_nothing_is_refused(tmp_path):
    url = f"dir::file://{tmp_path}"
    with pytest.raises(UnsafeStoreError):
        PartStore(url, storage_options={"dir": {"path": str(tmp_path)}})
    store = PartStore(url, storage_options={"dir": {"path": str(tmp_path)}}, allow_unsafe=True)
    assert store.write_part("s", None, rows([A], [1])) is True
    assert store.write_part("s", None, rows([A], [2])) is False
    assert store.read_rows("s")["value"].to_pylist() == [1]


def test_an_unknown_protocol_is_a_store_error():
    with pytest.raises(StoreError, match="cannot open"):
        PartStore("nosuch://x")


def test_a_newer_schema_is_refused_and_an_older_one_read(tmp_path):
    PartStore(tmp_path, schema_version=2).write_part("s", None, rows([A], [1]))
    with pytest.raises(SchemaVersionError, match="version 2"):
        PartStore(tmp_path, schema_version=1).done_keys("s")
    assert PartStore(tmp_path, schema_version=3).done_keys("s") == {A}


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 1000])
def test_a_damaged_part_is_named(tmp_path, content):
    (tmp_path / "s").mkdir()
    path = tmp_path / "s" / f"{part_key([A])}.parquet"
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        PartStore(tmp_path).done_keys("s")
    assert caught.value.path == str(path)


def test_a_foreign_parquet_file_is_refused(tmp_path):
    (tmp_path / "s").mkdir()
    pq.write_table(rows([A], [1]), tmp_path / "s" / f"{part_key([A])}.parquet")
    with pytest.raises(StoreError, match="schema version"):
        PartStore(tmp_path).done_keys("s")


def test_a_missing_column_is_named(store):
    store.write_part("s", None, rows([A], [1]))
    with pytest.raises(StoreError, match="nonesuch"):
        store.read_rows("s", columns=["nonesuch"])


def test_a_store_and_its_errors_can_be_pickled(store, tmp_path):
    store.write_part("s", None, rows([A], [1]))
    assert pickle.loads(pickle.dumps(store)).done_keys("s") == {A}
    error = pickle.loads(pickle.dumps(SchemaVersionError("p", "m", transient=True)))
    assert (type(error), error.path, error.message, error.transient) == (SchemaVersionError, "p", "m", True)


def test_a_relative_path_means_the_same_after_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = PartStore("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pickle.loads(pickle.dumps(store)).write_part("s", None, rows([A], [1]))
    assert (tmp_path / "run" / "s" / f"{part_key([A])}.parquet").exists()


def test_of_racing_writers_exactly_one_wins_each_part(tmp_path):
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    barrier, results = context.Barrier(4), context.Queue()
    writers = [context.Process(target=race, args=(tmp_path, n, barrier, results)) for n in range(4)]
    for writer in writers:
        writer.start()
    won = dict(results.get(timeout=60) for _ in writers)
    for writer in writers:
        writer.join()
    table = PartStore(tmp_path).read_rows("s", [hash_key(turn) for turn in range(20)])
    for turn, number in enumerate(table["value"].to_pylist()):
        assert [n for n in won if won[n][turn]] == [number]
    assert all(not name.startswith(".") for name in os.listdir(tmp_path / "s"))


def test_a_writer_killed_before_it_commits_leaves_no_part(tmp_path):
    code = f"""
        import os, signal, pyarrow as pa
        from cluster import PartStore
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        os.link = die
        PartStore({str(tmp_path)!r}).write_part("s", None, pa.table({{"key": [{A!r}]}}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, timeout=60)
    assert done.returncode == -9
    store = PartStore(tmp_path)
    assert len(os.listdir(tmp_path / "s")) == 1 and store.parts("s") == []
    assert store.write_part("s", None, rows([A], [1]))
    assert len(store.collect_garbage(older_than=0)) == 1


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_rows_taken_out_of_a_part_are_gone_and_the_others_are_kept(tmp_path, kind):
    store = PartStore(tmp_path / "m" if kind == "local" else f"memory://{tmp_path.name}/m")
    a, b, c = map(hash_key, "abc")
    table = pa.table({"key": [a, b, b, c], "value": ["secret", "one", "two", "three"]})
    store.write_part("s", None, table, {"cluster.stage_version": "7"})
    (old,) = store.parts("s")
    rest = store.read_part("s", old).slice(1)
    new = store.replace_part("s", old, rest)
    assert store.parts("s") == [new] and new != old
    assert store.read_part("s", new) == rest and store.done_keys("s") == {b, c}
    with store._fs.open(store.path("s", new)) as file:
        data = file.read()
    assert b"secret" not in pq.read_table(pa.BufferReader(data)).to_string().encode()
    assert pq.read_schema(pa.BufferReader(data)).metadata[b"cluster.stage_version"] == b"7"

    # Killed between commit and deletion: both parts are there, every item is read once, and the second try ends it.
    store._fs.pipe_file(store.path("s", old), data)
    assert store.read_rows("s", [b, c])["value"].to_pylist() == ["one", "two", "three"]
    assert store.replace_part("s", old, rest) == new and store.parts("s") == [new]

    # Values may change without a change of keys; the name is another all the same.
    changed = rest.set_column(1, "value", pa.array(["", "two", "three"]))
    third = store.replace_part("s", new, changed)
    assert third not in (old, new) and store.read_part("s", third) == changed and store.parts("s") == [third]
    assert store.replace_part("s", third, changed.slice(0, 0)) is None and store.parts("s") == []


def test_a_saved_index_spares_opening_parts_and_is_never_believed_against_them(tmp_path, monkeypatch):
    store = PartStore(tmp_path)
    keys = [hash_key(n) for n in range(200)]
    for key in keys[:100]:
        store.write_part("s", None, rows([key], [1]))
    whole = store.index("s")
    assert not store.save_index("s", PartStore(tmp_path / "none").key_index("s"))  # nothing to save
    assert store.save_index("s", store.key_index("s"))
    opened = []
    read = PartStore.read_part
    monkeypatch.setattr(PartStore, "read_part", lambda self, *args: opened.append(args[1]) or read(self, *args))
    assert store.index("s") == whole and opened == []
    assert not store.save_index("s", store.key_index("s"))  # nothing new

    # parts that came since, one of them with keys that another has, and parts that went
    for key in keys[100:110]:
        store.write_part("s", None, rows([key], [1]))
    store.write_part("s", None, rows(keys[50:52], [2, 2]))
    os.unlink(store.path("s", part_key(keys[:1])))
    fresh = store.index("s")
    assert len(set(opened)) == 11
    monkeypatch.setattr(PartStore, "_saved_index", lambda self, stage: ([], pack([]), np.empty(0, np.int32)))
    assert store.index("s") == fresh and set(fresh["key"].to_pylist()) == set(keys[1:110])
    monkeypatch.undo()

    # extended without opening parts, as by a run that has just written them
    extended = {part_key([key]): key for key in keys[110:190]}
    for key in extended.values():
        store.write_part("s", None, rows([key], [1]))
    assert store.extend_index("s", list(extended), pack(list(extended.values())), np.arange(80, dtype=np.int32))
    monkeypatch.setattr(PartStore, "read_part", lambda self, *args: opened.append(args[1]) or read(self, *args))
    opened.clear()
    assert store.done_keys("s") == set(keys[1:190]) and len(set(opened)) == 11

    # a damaged one is left aside
    (tmp_path / "s" / INDEX).write_bytes(b"PAR1")
    assert store.done_keys("s") == set(keys[1:190])
    assert store.parts("s") == PartStore(tmp_path).parts("s") and len(store.parts("s")) == 190


def damaged(path, kind):
    """A Parquet file with a footer that can be read, and something wrong before it."""
    data = bytearray(path.read_bytes())
    if kind in ("data", "bit"):
        end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        some = slice(4, end) if kind == "data" else slice(end // 2, end // 2 + 1)
        data[some] = bytes(byte ^ 0x55 for byte in data[some])
        path.write_bytes(data)
    else:
        table = pq.read_table(path, memory_map=False)
        last = table.column_names[-1]
        wrong = table.drop([last]) if kind == "missing" else table.set_column(0, "high", table[0].cast(pa.string()))
        pq.write_table(wrong, path)


@pytest.mark.parametrize("kind", ["data", "bit", "missing", "type"])
def test_a_damaged_index_with_a_good_footer_is_told_and_made_anew(tmp_path, caplog, kind):
    store = PartStore(tmp_path)
    keys = [hash_key(n) for n in range(70)]
    for key in keys:
        store.write_part("s", None, rows([key], [1]))
    whole = store.index("s")
    assert store.save_index("s", store.key_index("s")) and store.key_index("s").unsaved == 0
    damaged(tmp_path / "s" / INDEX, kind)
    index = store.key_index("s")
    assert index.unsaved == 70 and store.index("s") == whole, "all parts are opened"
    assert "parts are opened instead" in caplog.text and INDEX in caplog.text
    assert store.save_index("s", index) and store.key_index("s").unsaved == 0
    caplog.clear()
    damaged(tmp_path / "s" / INDEX, kind)
    more = {part_key([key]): key for key in map(hash_key, range(70, 140))}
    for key in more.values():
        store.write_part("s", None, rows([key], [1]))
    assert store.extend_index("s", list(more), pack(list(more.values())), np.arange(70, dtype=np.int32))
    assert caplog.text and store.key_index("s").unsaved == 70 and len(store.done_keys("s")) == 140

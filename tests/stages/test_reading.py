"""Photos read ahead: in threads, within bounds, each error at its own photo."""

from __future__ import annotations

import threading
import time

import pyarrow as pa
import pytest
from ray import cloudpickle

from cluster import PartStore, Stage, hash_key
from cluster.worker import Input, Shard, Worker
from pipelines.archive.paths import SourceError
from pipelines.bench.arithmetic import failed_parts
from pipelines.stages import reading
from pipelines.stages.reading import Reader


@pytest.fixture
def calls(monkeypatch):
    """Reading takes a twentieth of a second, as from a store. Records which URLs were read, and how many at a time."""
    found, lock, at_once = [], threading.Lock(), [0, 0]

    def read(url, max_bytes):
        with lock:
            found.append(url)
            at_once[0] += 1
            at_once[1] = max(at_once)
        time.sleep(0.05)
        with lock:
            at_once[0] -= 1
        if "bad" in url:
            raise SourceError("NOT_FOUND", url)
        return url.encode()

    monkeypatch.setattr(reading, "read_bytes", read)
    found_at_once = at_once
    return found, found_at_once


def test_photos_are_read_while_others_are_worked_on(calls):
    found, at_once = calls
    urls = [f"u{n}" for n in range(40)]
    reader = Reader(100)
    reader.ahead([(url, 10) for url in urls])
    begin = time.monotonic()
    assert [reader.read(url) for url in urls] == [url.encode() for url in urls]
    assert time.monotonic() - begin < 40 * 0.05 and 4 < at_once[1] <= 16
    assert sorted(found) == sorted(urls), "each once"


def read_in_the_end(found: list[str], count: int) -> list[str]:
    """What has been read when it is `count`, and none has followed for a while."""
    end = time.monotonic() + 30
    while len(found) < count and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)
    return list(found)


def test_no_more_is_held_than_allowed(calls):
    found, _ = calls
    reader = Reader(100, photos=5, in_memory=1000)
    reader.ahead([(f"u{n}", 10) for n in range(20)])
    assert len(read_in_the_end(found, 5)) == 5
    reader.read("u0")
    assert len(read_in_the_end(found, 6)) == 6
    reader.ahead([("large", 5000), ("small", 10)])
    assert read_in_the_end(found, 7)[6:] == ["large"], "one is always read, however large"
    assert reader.read("large") == b"large"
    assert read_in_the_end(found, 8)[7:] == ["small"]


def test_an_error_comes_with_its_photo_and_unannounced_ones_are_read_at_once(calls):
    found, _ = calls
    reader = Reader(100)
    reader.ahead([("a", None), ("bad", None), ("a", None)])
    assert reader.read("a") == b"a" and reader.read("a") == b"a"
    with pytest.raises(SourceError, match="NOT_FOUND"):
        reader.read("bad")
    assert reader.read("other") == b"other"
    with pytest.raises(SourceError):
        reader.read("bad")  # as after a batch that failed, when its photos are tried one by one


def make_listener():
    heard = []

    def run(table):
        return pa.table({"key": table["key"], "status": ["ok"] * len(table), "reason": [",".join(heard)] * len(table)})

    run.ahead = lambda table: heard.append(str(len(table)))
    return run


def test_a_worker_tells_an_operator_of_the_whole_shard_first(tmp_path):
    store = PartStore(tmp_path)
    keys = [hash_key(n) for n in range(5)]
    store.write_part("source", None, pa.table({"key": keys, "status": ["ok"] * 5, "reason": pa.nulls(5, pa.string())}))
    schema = pa.schema([(name, pa.string()) for name in ("key", "status", "reason")])
    stage = Stage("s", "1", schema, make_listener, failed_parts, batch_items=2)
    worker = Worker(store, cloudpickle.dumps({0: stage}), 30.0)
    worker.start([0])
    new = [hash_key("s", key) for key in keys]
    worker.run(Shard(0, new, [Input("source", keys, store.parts("source"), None)]))
    assert set(store.read_rows("s")["reason"].to_pylist()) == {"5"}

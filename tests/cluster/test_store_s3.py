"""Parts on S3, over real HTTP: who wins a race, and what is done about a server that fails."""

import errno
import pickle
import threading
import time

import fsspec
import pyarrow as pa
import pytest

from cluster import PartStore, StoreError, hash_key, part_key
from cluster.retries import is_transient, with_retries
from tests.helpers.s3_server import Fault

A, B, C = (hash_key(name) for name in "ABC")


def rows(keys, values):
    return pa.table({"key": keys, "value": values, "status": ["ok"] * len(keys)})


@pytest.fixture
def store(s3):
    return PartStore(f"{s3.root}/m")


@pytest.fixture
def pauses(monkeypatch):
    """Pauses of our own, in seconds, which are not waited for. (s3fs waits by asyncio.)"""
    found = []
    monkeypatch.setattr("cluster.retries.time.sleep", found.append)
    return found


def test_parts_and_index_on_s3(store):
    assert store.shared and store.parts("s") == [] and store.stages() == []
    assert store.write_part("s", None, rows([A, B], [1, 2])) is True
    assert store.write_part("s", None, rows([A, B], [3, 4])) is False, "never changed"
    assert store.write_part("s", None, rows([C], [5]))
    assert store.stages() == ["s"] and len(store.parts("s")) == 2
    again = pickle.loads(pickle.dumps(store))
    assert again.read_rows("s", [C, A], ["value"])["value"].to_pylist() == [5, 1]
    assert again.done_keys("s") == {A, B, C}
    with pytest.raises(StoreError, match="no such file") as caught:
        store.read_part("s", part_key([hash_key("nobody")]))
    assert not caught.value.transient
    # one of many parts taken out for good, as by a purge
    (old,) = (name for name in store.parts("s") if name == part_key([A, B]))
    store.replace_part("s", old, store.read_part("s", old).slice(1))
    assert store.done_keys("s") == {B, C} and old not in store.parts("s")
    # the saved index: a copy, whose parts need not be opened
    for n in range(70):
        store.write_part("t", None, rows([hash_key(n)], [n]))
    assert store.save_index("t", store.key_index("t"))
    assert store.key_index("t").unsaved == 0 and len(store.done_keys("t")) == 70
    assert store.collect_garbage() == []


def test_a_store_takes_its_endpoint_as_options(s3, monkeypatch):
    monkeypatch.setattr(fsspec.config, "conf", {})
    for name in s3.environment:
        monkeypatch.delenv(name, raising=False)
    store = PartStore(f"{s3.root}/options", storage_options=s3.storage_options)
    assert store.write_part("s", None, rows([A], [1]))
    assert pickle.loads(pickle.dumps(store)).done_keys("s") == {A}


def test_of_racing_writers_exactly_one_wins_each_part(s3):
    won = []

    def race(number, barrier):
        store = PartStore(f"{s3.root}/race", storage_options=s3.storage_options | {"asynchronous": False})
        for turn in range(10):
            barrier.wait(60)
            if store.write_part("s", None, rows([hash_key(turn)], [number])):
                won.append((turn, number))

    barrier = threading.Barrier(3)
    writers = [threading.Thread(target=race, args=(number, barrier)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    values = PartStore(f"{s3.root}/race").read_rows("s", [hash_key(turn) for turn in range(10)])["value"].to_pylist()
    assert sorted(won) == list(enumerate(values))


def test_a_put_whose_answer_was_lost_counts_as_ours(s3, store):
    with s3.failing(Fault("lost", "PUT")) as (fault,):
        assert store.write_part("s", None, rows([A], [1])) is True
    assert fault.seen == 1 and sum(method == "PUT" for method, _ in s3.requests) == 2, "s3fs put it again and got 412"
    with s3.failing(Fault("lost", "PUT")):
        assert store.write_part("s", None, rows([A], [2])) is False, "here it was another's"
    assert store.read_rows("s")["value"].to_pylist() == [1]


def test_a_server_that_falls_silent_stops_nobody_for_ever(s3, store):
    """On a connection in use, before it would have told a client that waits for `100 Continue` to go on."""
    store.write_part("s", None, rows([B], [1]))
    with s3.failing(Fault("mute", "PUT", times=2)) as (fault,):
        assert store.write_part("s", None, rows([A], [1])) is True
    assert fault.seen == 2


def test_a_multipart_put_whose_last_answer_was_lost_counts_as_ours(s3, store, monkeypatch):
    put = store._fs._pipe_file
    monkeypatch.setattr(
        store._fs, "_pipe_file", lambda path, data, **more: put(path, data, chunksize=5 * 2**20, **more)
    )
    monkeypatch.setattr(store._fs, "pipe_file", fsspec.asyn.sync_wrapper(store._fs._pipe_file, obj=store._fs))
    data = pa.array([bytes(11 * 2**20)], pa.binary())
    monkeypatch.setattr("cluster.store._to_parquet", lambda table, sink: sink.write(data[0].as_buffer()))
    with s3.failing(Fault("lost", "POST", "uploadId=")) as (fault,):
        assert store.write_part("s", None, rows([A], [1])) is True
    assert fault.seen == 1 and store._fs.info(store.path("s", part_key([A])))["size"] == 11 * 2**20


def test_a_server_that_does_not_name_the_condition_still_means_exists(s3, store, monkeypatch):
    store.write_part("s", None, rows([A], [1]))

    def refused(path, data, **options):
        error = OSError(errno.EINVAL, "precondition failed")
        error.__cause__ = Answer(412, "PreconditionFailed")
        raise error

    monkeypatch.setattr(store._fs, "pipe_file", refused)
    assert store.write_part("s", None, rows([A], [2])) is False


class Answer(Exception):
    """As botocore's ClientError."""

    def __init__(self, status, code):
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


TRANSIENT = ["internal", "slow_down", "unavailable", "throttled", "bad_gateway", "reset", "timeout", "lost"]


@pytest.mark.parametrize("kind", [*TRANSIENT, "conflict", "incomplete"])
def test_a_transient_fault_while_writing_is_survived(s3, store, pauses, kind):
    more = 2 if kind in ("timeout", "lost") else 6  # s3fs itself tries five times after these and after SlowDown
    with s3.failing(Fault(kind, "PUT", times=more, seconds=2.5)) as (fault,):
        assert with_retries(lambda: store.write_part("s", None, rows([A], [1]))) is True
    assert fault.seen >= (1 if kind == "lost" else more), "after an answer was lost, the next put is the second"
    assert store.read_rows("s")["value"].to_pylist() == [1]


@pytest.mark.parametrize("kind", ["internal", "slow_down", "bad_gateway", "reset", "timeout", "cut", "short"])
def test_a_transient_fault_while_reading_is_survived(s3, store, pauses, kind):
    keys = [hash_key(n) for n in range(300)]
    table = rows(keys, list(range(300)))
    store.write_part("s", None, table)
    name = part_key(keys)
    more = 1 if kind in ("timeout", "short") else 6
    with s3.failing(Fault(kind, "GET", f"{name}.parquet", times=more, seconds=2.5)) as (fault,):
        assert with_retries(lambda: store.read_part("s", name)) == table
    assert fault.seen == more


@pytest.mark.parametrize("kind", ["internal", "slow_down", "reset", "cut"])
def test_a_transient_fault_while_listing_is_survived(s3, store, pauses, kind):
    store.write_part("s", None, rows([A], [1]))
    with s3.failing(Fault(kind, "GET", "list-type=2", times=6)) as (fault,):
        assert with_retries(lambda: store.parts("s")) == [part_key([A])]
    assert fault.seen == 6


@pytest.mark.parametrize("kind", ["denied", "bad_request", "not_implemented"])
@pytest.mark.parametrize("action", ["write", "read", "list"])
def test_a_permanent_fault_is_not_tried_again(s3, store, pauses, kind, action):
    store.write_part("s", None, rows([A], [1]))
    fresh = PartStore(store.url)
    actions = {
        "write": lambda: fresh.write_part("s", None, rows([B], [1])),
        "read": lambda: fresh.read_part("s", part_key([A])),
        "list": lambda: fresh.parts("s"),
    }
    with s3.failing(Fault(kind, times=None)) as (fault,), pytest.raises(StoreError) as caught:
        with_retries(actions[action])
    assert not caught.value.transient and pauses == [] and 1 <= fault.seen <= 3
    assert store.url in caught.value.path
    if kind == "denied":
        assert "permission denied" in str(caught.value)


def test_a_store_that_stays_down_is_told_after_growing_pauses(s3, store, pauses):
    with s3.failing(Fault("unavailable", "PUT", times=None)) as (fault,), pytest.raises(StoreError) as caught:
        with_retries(lambda: store.write_part("s", None, rows([A], [1])))
    assert caught.value.transient and len(pauses) == 6 and fault.seen == 7
    assert all(b > 1 / 3 * 2 * a for a, b in zip(pauses, pauses[1:], strict=False)) and 5 < sum(pauses) < 25


def test_a_part_that_is_really_damaged_is_no_transient_fault(s3, store, pauses):
    store.write_part("s", None, rows([A], [1]))
    store._fs.pipe_file(store.path("s", part_key([A])), b"PAR1 something else")
    with pytest.raises(StoreError, match="not a readable Parquet file") as caught:
        with_retries(lambda: store.read_part("s", part_key([A])))
    assert not caught.value.transient and pauses == []


def test_which_errors_may_pass():
    def answered(status, code="", kind=OSError(errno.EINVAL, "s3fs says so")):
        kind.__cause__ = Answer(status, code)
        return kind

    for status in (408, 409, 429, 500, 502, 503, 504):
        assert is_transient(answered(status))
    assert is_transient(answered(400, "IncompleteBody")) and is_transient(answered(400, "BadDigest"))
    for status, code in ((400, "InvalidArgument"), (401, ""), (403, "AccessDenied"), (404, ""), (412, ""), (501, "")):
        assert not is_transient(answered(status, code))
    for error in (ConnectionResetError(), TimeoutError(), OSError(errno.EIO, ""), OSError("no number")):
        assert is_transient(error) and is_transient(error, remote=False)
    for code in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EINVAL, errno.ENOENT):
        assert not is_transient(OSError(code, ""))

    class HTTPClientError(Exception):  # a client's own type, of which nothing is known
        pass

    class NoCredentialsError(Exception):
        pass

    assert is_transient(HTTPClientError()) and not is_transient(HTTPClientError(), remote=False)
    assert not is_transient(NoCredentialsError())
    assert not any(is_transient(kind()) for kind in (ValueError, KeyError, TypeError, pa.ArrowInvalid))


def test_pauses_grow_and_vary(monkeypatch):
    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    for _ in range(2):
        with pytest.raises(OSError, match="no answer"):
            with_retries(lambda: (_ for _ in ()).throw(OSError("no answer")), transient=is_transient)
    assert len(found) == 12 and found[:6] != found[6:]

"""The worker without Ray: reading, joining, checking, retrying."""

import errno
import faulthandler
import mmap
import os
import signal
import sys
import time

import pyarrow as pa
import pytest
from ray import cloudpickle

from cluster import ContractError, ItemTimeout, PartStore, Stage, StoreError, hash_key
from cluster.retries import ATTEMPTS, with_retries
from cluster.worker import (
    Input,
    Shard,
    Worker,
    checked,
    forget_peak_memory,
    one_line,
    outcome,
    peak_memory,
    read_input,
    time_limit,
)
from tests.helpers.arithmetic import COMMON, PARTS, failed_parts, make_square

X, Y = hash_key("x"), hash_key("y")
ROWS = pa.table(
    {
        "key": ["a", "b", "b"],
        "status": ["ok"] * 3,
        "reason": pa.nulls(3, pa.string()),
        "row": [0, 0, 1],
        "value": [5, 6, 7],
    }
)


def stage(**settings):
    return Stage("s", "1", PARTS, make_square, failed_parts, **settings)


def shard(*inputs, columns=None):
    return Shard(0, [X, Y], [Input(name, keys, parts, columns) for name, keys, parts in inputs])


def test_transient_faults_are_retried_and_others_are_not(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    faults = [StoreError("p", "busy", transient=True)] * (ATTEMPTS - 1)

    def action():
        if faults:
            raise faults.pop()
        return "done"

    assert with_retries(action) == "done"
    assert len(pauses) == ATTEMPTS - 1 and pauses[-1] > pauses[0]
    faults[:] = [StoreError("p", "busy", transient=True)] * ATTEMPTS
    with pytest.raises(StoreError, match="busy"):
        with_retries(action)
    faults[:] = [StoreError("p", "disk full")]
    pauses.clear()
    with pytest.raises(StoreError, match="disk full"):
        with_retries(action)
    assert pauses == []


def test_a_worker_survives_a_store_that_fails_now_and_then(tmp_path, monkeypatch):
    """Two input/output errors of the real system calls' kind, one while reading and one while committing."""
    monkeypatch.setattr("cluster.retries.time.sleep", lambda seconds: None)
    store = PartStore(tmp_path)
    store.write_part("before", None, ROWS)
    worker = Worker(store, cloudpickle.dumps({0: stage()}), 1.0)
    worker.start([0])
    link, read, faults = os.link, PartStore.read_part, ["link", "read"]

    def bad_link(a, b):
        if "link" in faults:
            faults.remove("link")
            raise OSError(errno.EIO, "Input/output error")
        link(a, b)

    def bad_read(self, *args):
        if "read" in faults:
            faults.remove("read")
            raise StoreError("p", "timed out", transient=True)
        return read(self, *args)

    monkeypatch.setattr(os, "link", bad_link)
    monkeypatch.setattr(PartStore, "read_part", bad_read)
    result = worker.run(shard(("before", ["b", "a"], store.parts("before"))))
    assert result.committed and result.statuses == {"ok": 3} and faults == []
    rows = store.read_rows("s", [X, Y])
    assert rows["key"].to_pylist() == [X, X, Y]
    assert rows["value"].to_pylist() == [36, 49, 25]


def test_joined_columns_match_by_item_and_row(tmp_path):
    store = PartStore(tmp_path)
    store.write_part("before", None, ROWS)
    first = pa.table({"key": ["p", "q", "q"], "row": [0, 1, 0], "name": ["p0", "q1", "q0"], "other": [1, 2, 3]})
    store.write_part("first", None, first)
    inputs = [("before", ["b", "a"], store.parts("before")), ("first", ["q", "p"], store.parts("first"))]
    rows = read_input(store, stage(joins={"first": ["name"]}, row_id="row"), shard(*inputs))
    assert rows["key"].to_pylist() == [X, X, Y]
    assert rows["value"].to_pylist() == [6, 7, 5]
    assert rows["first.name"].to_pylist() == ["q0", "q1", "p0"]
    assert "first.other" not in rows.column_names
    with pytest.raises(ContractError, match="several rows of first"):
        read_input(store, stage(joins={"first": ["name"]}), shard(*inputs))


def test_a_row_that_nothing_matches_is_an_error(tmp_path):
    store = PartStore(tmp_path)
    store.write_part("before", None, ROWS)
    store.write_part("first", None, pa.table({"key": ["p", "q"], "row": [0, 0], "name": ["p0", "q0"]}))
    inputs = [("before", ["b", "a"], store.parts("before")), ("first", ["q", "p"], store.parts("first"))]
    with pytest.raises(ContractError, match="first has no row"):
        read_input(store, stage(joins={"first": ["name"]}, row_id="row"), shard(*inputs))
    with pytest.raises(StoreError, match="no rows of before for item c"):
        read_input(store, stage(), shard(("before", ["b", "c"], store.parts("before"))))


@pytest.mark.parametrize(
    "answer, words",
    [
        (None, "NoneType"),
        (ROWS.drop_columns(["value"]), "no column value"),
        (ROWS.set_column(4, "value", pa.array(["x", "y", "z"])), "do not fit"),
        (ROWS.slice(1), "no row for the item"),
        (ROWS.set_column(0, "key", pa.array(["a", "b", "c"])), "not given"),
        (ROWS.set_column(1, "status", pa.nulls(3, pa.string())), "without status"),
    ],
)
def test_answers_that_break_the_contract_are_refused(answer, words):
    with pytest.raises(ContractError, match=words):
        checked(stage(), ROWS, answer)


def test_an_answer_is_brought_into_the_schema():
    answer = ROWS.append_column("more", pa.array([1, 2, 3])).set_column(4, "value", pa.array([1.0, 2.0, 3.0]))
    answer = answer.select(["value", "more", "key", "row", "reason", "status"])
    assert checked(stage(), ROWS, answer).schema == pa.schema([*COMMON, ("row", pa.int64()), ("value", pa.int64())])


def test_a_time_limit_ends_with_its_block():
    with pytest.raises(ItemTimeout):
        with time_limit(0.05, None):
            time.sleep(5)
    with time_limit(0.2, 5.0):
        pass
    time.sleep(0.3)


class Modes:
    """A context manager that takes a while to be entered and left, as PyTorch's modes do on a slow machine."""

    def __init__(self):
        self.on = False

    def __enter__(self):
        self.wait()
        self.on = True
        self.wait()

    def __exit__(self, *error):
        self.wait()
        self.on = False

    def wait(self):
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            pass


@pytest.mark.parametrize("soft", [0.01, 0.15, 0.25, 0.35, 0.45])
def test_a_time_limit_lets_context_managers_be_entered_and_left(soft):
    modes, begin = Modes(), time.monotonic()
    with pytest.raises(ItemTimeout):
        with time_limit(soft, None):
            while True:
                with modes:
                    modes.wait()
    assert not modes.on and time.monotonic() - begin < 10


def test_no_alarm_is_left_behind_by_a_time_limit():
    """An alarm at every instruction of its end, each of which would have been an `ItemTimeout`: the timer, the handler
    and the watchdog are gone nevertheless."""
    alarms = []

    def trace(frame, event, argument):
        if frame.f_code.co_filename.endswith(("cluster/worker.py", "contextlib.py", "signal.py")):
            frame.f_trace_opcodes = True
            if event == "opcode" and signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
                alarms.append(frame.f_code.co_name)
                sys.settrace(trace)
                signal.raise_signal(signal.SIGALRM)
        return trace

    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    try:
        with time_limit(60, 0.5):
            sys.settrace(trace)
        sys.settrace(None)
        assert len(alarms) > 10
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        time.sleep(0.8)  # the watchdog would end this process
    finally:
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.cancel_dump_traceback_later()


def test_what_a_stage_made_of_its_items():
    reasons = ["EXCEPTION: OSError: early", None, None, None, None]
    rows = pa.table({"key": ["early", "a", "a", "b", "c"], "reason": pa.array(reasons, pa.string())})

    def made(**by_key):
        early = ("early", "error", "EXCEPTION: OSError: early")
        made = [early, *((key, "error" if reason else "ok", reason) for key, rs in by_key.items() for reason in rs)]
        keys, statuses, reasons = zip(*made, strict=True)
        table = pa.table({"key": keys, "status": statuses, "reason": pa.array(reasons, pa.string())})
        return outcome(rows, table)

    broken = "EXCEPTION: ImportError: libx: no such file"
    assert made(a=[broken, broken], b=[broken], c=["CORRUPT: x"]) == (False, {"ImportError": 2}, broken)
    assert made(a=[broken, None], b=[broken], c=[broken]) == (True, {"ImportError": 3}, broken)
    assert made(a=["EXCEPTION: KeyError: 1"], b=[broken], c=["EXCEPTIONAL: x"])[:2] == (
        False,
        {"KeyError": 1, "ImportError": 1},
    )
    assert made() == (False, {}, ""), "what an earlier stage gave up says nothing about this one"
    assert outcome(rows.drop_columns(["reason"]), ROWS) == (True, {}, "")


def test_messages_are_cut_to_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert len(one_line(ValueError("x" * 1000))) == 300


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is told by Linux's proc only")
def test_peak_memory_is_of_the_block_alone():
    def block(size: int) -> mmap.mmap:  # from the system, not from what this process has freed before
        made = mmap.mmap(-1, size)
        made.write(b"x" * mmap.PAGESIZE * (size // mmap.PAGESIZE))
        return made

    block(200 << 20).close()
    forget_peak_memory()
    before = peak_memory()
    held = block(100 << 20)
    after = peak_memory()
    assert 80 << 20 < after - before and len(held) == 100 << 20
    held.close()
    forget_peak_memory()
    assert peak_memory() < after - (80 << 20)

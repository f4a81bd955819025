"""The chaos campaign: a short one over the arithmetic chain, and that it would see what it looks for."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from cluster import PartStore, hash_key
from pipelines.bench.chaos import Kill, Tally, committed, compare, executions, stored_twice

ROOT = Path(__file__).parents[2]
A, B = hash_key("a"), hash_key("b")


@pytest.mark.parametrize(("kills", "items"), [(4, 100), pytest.param(20, 300, marks=pytest.mark.long)])
def test_kills_lose_double_and_change_nothing(tmp_path, kills, items):
    out = tmp_path / "chaos.json"
    command = [sys.executable, "-m", "pipelines.bench.chaos", "--stages", "arithmetic", "--items", str(items)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.Popen(
        [*command, "--kills", str(kills), "--seed", "3", "--out", out], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        words, _ = done.communicate(timeout=900)
    finally:
        if done.poll() is None:
            os.killpg(done.pid, signal.SIGKILL)
    assert done.returncode == 0, words[-5000:]
    found = json.loads(out.read_text())
    assert found["kills"] == kills
    assert (found["rows_lost"], found["rows_doubled"], found["outputs_different"]) == (0, 0, 0)
    assert found["finished_redone"] == 0 and found["seconds_redone"] >= 0
    assert len(found["campaigns"]["arithmetic"]["kills_by_kind"]) >= min(4, kills // 2)


def test_lost_doubled_and_different_rows_are_counted():
    rows = {("s", n): [{"value": float("nan"), "seconds": 1.0, "more": [{"seconds": n, "x": n}]}] for n in range(5)}
    other = copy.deepcopy(rows)
    other["s", 0][0] |= {"seconds": 2.0, "more": [{"seconds": 9, "x": 0}]}  # times may differ
    tally = Tally()
    compare(rows, other, tally)
    assert tally.good
    del other["s", 1]
    other["s", 2] *= 3
    other["s", 3][0]["more"][0]["x"] = 4
    other["s", 9] = [{}]
    compare(rows, other, tally)
    assert (tally.rows_lost, tally.rows_doubled, tally.outputs_different) == (1, 3, 1) and not tally.good


def test_rows_in_two_parts_are_seen_beside_what_readers_get(tmp_path):
    store = PartStore(tmp_path)
    store.write_part("s", None, pa.table({"key": [A]}))
    assert stored_twice(store) == 0
    store.write_part("s", None, pa.table({"key": [A, B, B]}))
    assert stored_twice(store) == 1 and store.read_rows("s").num_rows == 3
    when = committed(store)
    assert when.keys() == {("s", A), ("s", B)} and when["s", A] <= when["s", B]


def test_work_done_more_than_once_is_measured(tmp_path):
    def call(time, keys, end=None):
        lines = [json.dumps({"stage": "s", "time": time, "begin": keys})]
        return lines if end is None else [*lines, json.dumps({"stage": "s", "time": end, "end": True})]

    # the first process was killed in the middle of its second call, and of a line; the second did that call again
    (tmp_path / "11.jsonl").write_text("\n".join([*call(10.0, [A], 11.0), *call(12.0, [B, A]), '{"stage']))
    (tmp_path / "12.jsonl").write_text("\n".join(call(20.0, [B], 21.0)) + "\n")
    found = executions(tmp_path, [Kill(9.0, "actor", {11}), Kill(14.0, "actor", {11}), Kill(13.0, "actor", {12})])
    assert sorted((e.begin, e.seconds) for e in found["s", B]) == [(12.0, 1.0), (20.0, 1.0)]
    assert sorted((e.begin, e.seconds) for e in found["s", A]) == [(10.0, 1.0), (12.0, 1.0)]

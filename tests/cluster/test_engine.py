"""Runs of the engine on a real local Ray, on stages that compute with numbers."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from cluster import (
    BrokenStageError,
    ContractError,
    Engine,
    EngineError,
    PartStore,
    Pool,
    Resources,
    RunInterrupted,
    Stage,
)
from tests.helpers.arithmetic import (
    PARTS,
    VERSIONS,
    chain,
    expected_total,
    failed_parts,
    make_square,
    source_table,
    stages,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run(store, modes, *, log=None, versions=VERSIONS, settings=None, **split_settings):
    source = source_table(modes)
    keys = chain(source, versions)
    engine = Engine(store, stages(log, **split_settings), hard_margin=0.5, **(settings or {}))
    return engine.run(source, keys), source, keys


def assert_complete(store, source, keys):
    """Every item has its rows in every stage and no more, with the right values where it is ok.

    Returns the reasons of those that are not.
    """
    assert store.read_rows("source", source["key"].to_pylist()) == source
    counts = {key: 0 for key in keys["split"]}
    for key in store.read_rows("split", columns=["key"])["key"].to_pylist():
        if key in counts:  # the store may hold rows that are no longer wanted
            counts[key] += 1
    values = store.read_rows("square", keys["square"])
    assert list(dict.fromkeys(values["key"].to_pylist())) == keys["square"]
    totals = store.read_rows("total", keys["total"])
    assert totals["key"].to_pylist() == keys["total"]
    for n, row in enumerate(totals.to_pylist()):
        if row["status"] == "ok":
            assert (row["n"], row["total"]) == (n, expected_total(n))
            assert counts[keys["split"][n]] == n % 3 + 1
        else:
            assert counts[keys["split"][n]] == 1
    return {n: row["reason"] for n, row in enumerate(totals.to_pylist()) if row["status"] != "ok"}


def done(summary):
    return {name: stage.done for name, stage in summary.stages.items()}


def test_a_run_a_second_run_and_a_resumed_one(tmp_path):
    path, log = tmp_path / "m", tmp_path / "log"
    store = PartStore(path)
    summary, source, keys = run(store, ["ok"] * 10, log=str(log), settings={"shard_items": 5}, last_pool="sums")
    assert assert_complete(store, source, keys) == {}
    assert done(summary) == {"source": 10, "split": 10, "square": 10, "total": 10}
    assert summary.stages["split"].statuses == {"ok": sum(n % 3 + 1 for n in range(10))}
    assert summary.restarts == 0

    before = sorted((p.name, p.stat().st_mtime_ns) for p in path.rglob("*.parquet"))
    summary, _, _ = run(store, ["ok"] * 10, log=str(log))
    assert [(s.kept, s.done) for s in summary.stages.values()] == [(10, 0)] * 4
    assert sorted((p.name, p.stat().st_mtime_ns) for p in path.rglob("*.parquet")) == before
    assert len(log.read_text().split()) == 10

    # Two parts get lost, one of them in the middle of the chain; two items are new; shards are cut otherwise.
    for stage, item in (("split", 0), ("total", 9)):
        parts = {row["key"]: row["part"] for row in store.index(stage).to_pylist()}
        (path / stage / f"{parts[keys[stage][item]]}.parquet").unlink()
    log.unlink()
    summary, source, keys = run(store, ["ok"] * 12, log=str(log), settings={"shard_items": 3})
    assert assert_complete(store, source, keys) == {}
    assert sorted(map(int, log.read_text().split())) == [0, 1, 2, 3, 4, 10, 11]
    assert done(summary) == {"source": 2, "split": 7, "square": 2, "total": 7}

    # One stage gets a new version: it is redone with what depends on it, and nothing else.
    log.unlink()
    summary, source, keys = run(store, ["ok"] * 12, log=str(log), versions={**VERSIONS, "square": "2"})
    assert assert_complete(store, source, keys) == {}
    assert done(summary) == {"source": 0, "split": 0, "square": 12, "total": 12}
    assert not log.exists()


BAD = {
    "raise": "EXCEPTION: ValueError: item is bad xxx",
    "quit": "EXCEPTION: SystemExit: 1",
    "lose": "CONTRACT: the operator returned no row for the item",
    "invent": "CONTRACT: the operator returned rows of items that it was not given",
}


def test_bad_items_cost_only_themselves(tmp_path, caplog):
    """Each among three good ones in a batch; the row says what happened, the log says where."""
    store = PartStore(tmp_path)
    modes = [mode for bad in BAD for mode in (bad, "ok", "ok", "ok")]
    events = []
    with caplog.at_level(logging.WARNING, "cluster"):
        summary, source, keys = run(store, modes, settings={"progress": events.append, "shard_items": 8})
    reasons = assert_complete(store, source, keys)
    assert sorted(reasons) == [0, 4, 8, 12]
    for number, start in zip(reasons, BAD.values(), strict=True):
        assert reasons[number].startswith(start) and len(reasons[number]) < 350
    assert summary.stages["split"].failed == 4
    assert summary.stages["split"].reasons == {"EXCEPTION": 2, "CONTRACT": 2}
    assert summary.stages["total"].failed == 0
    assert summary.stages["total"].statuses == {"ok": 12, "error": 4}
    assert summary.restarts == 0
    assert [event.done for event in events if event.stage == "total"] == [0, 8, 16]
    assert {event.total for event in events} == {16}
    assert "in misbehave" in caplog.text and keys["split"][0] in caplog.text


def test_a_stage_that_fails_at_every_item_ends_the_run(tmp_path):
    store = PartStore(tmp_path / "m")
    settings = {"shard_items": 4, "stop_after_errors": 20}
    with pytest.raises(BrokenStageError) as caught:
        run(store, ["lose"] * 8 + ["bad"] * 192, settings=settings)
    error = caught.value
    assert (error.stage, error.reason) == ("split", "EXCEPTION: ValueError: bad item") and 20 <= error.count < 40
    assert "stage split: the first 2" in str(error) and str(error).endswith(error.reason)
    kept = store.read_rows("split")  # what is finished is kept
    assert error.count <= kept["reason"].to_pylist().count(error.reason) < 100

    # The same run goes on from there, and stops again; without the setting it comes to its end.
    with pytest.raises(BrokenStageError):
        run(store, ["lose"] * 8 + ["bad"] * 192, settings=settings)
    summary, _, _ = run(store, ["lose"] * 8 + ["bad"] * 192)
    assert summary.stages["total"].done + summary.stages["total"].kept == 200


def test_items_that_are_bad_for_other_reasons_do_not_end_a_run(tmp_path):
    settings = {"shard_items": 4, "stop_after_errors": 8, "pools": {"default": Pool(actors=1)}}
    for number, modes in enumerate((["lose"] * 40, ["bad"] * 4 + ["ok"] + ["bad"] * 40, ["bad", "quit"] * 20)):
        summary, source, keys = run(PartStore(tmp_path / str(number)), modes, settings=settings)
        assert summary.stages["total"].statuses["error"] == len(modes) - modes.count("ok")


def test_slow_items_are_stopped_at_their_limit(tmp_path):
    """One that sleeps, one that swallows exceptions, and one that no signal reaches."""
    store = PartStore(tmp_path)
    modes = ["ok", "sleep", "ok", "stubborn", "ok", "hang", "ok", "ok"]
    summary, source, keys = run(store, modes, item_seconds=0.4, batch_items=2, settings={"shard_items": 2})
    assert assert_complete(store, source, keys) == {
        1: "TIMEOUT: more than 0.4 s",
        3: "TIMEOUT: more than 0.4 s",
        5: "TIMEOUT: more than 1.3 s, and the process could not be interrupted",
    }
    assert summary.restarts == 2


def test_items_that_kill_their_workers_fail_alone(tmp_path):
    """Three that do so every time, and one whose worker is killed from outside, once."""
    store = PartStore(tmp_path / "m")
    modes = ["ok"] * 20
    modes[2], modes[6], modes[10] = "exit", "segfault", "unfit"
    modes[15] = f"kill_once:{tmp_path / 'killed'}"
    settings = {"item_deaths": 1, "shard_items": 4, "pools": {"default": Pool(actors=2)}}
    summary, source, keys = run(store, modes, settings=settings)
    reason = "WORKER_DIED: the process ended with this item in hand, 2 times"
    reasons = assert_complete(store, source, keys)
    assert {n: words.split("; its log ends: ")[0] for n, words in reasons.items()} == {2: reason, 6: reason, 10: reason}
    assert "Segmentation fault" in reasons[6] and "WorkerUnfit" in reasons[10]
    assert (tmp_path / "killed").exists()
    # A worker may die so soon after a call that the driver never hears of its end: then that call's items are tried
    # alone, and the shard that was queued behind it dies once more, or (item 15) not at all.
    assert 7 <= summary.restarts <= 11
    assert 3 * 4 + 3 <= summary.stages["split"].retried <= 7 * 4 + 3
    assert len(store.parts("split")) >= 14  # of each killer's shard every item has a part of its own


def test_a_worker_that_is_told_to_end_does_not_blame_its_item(tmp_path):
    """As a node tells its workers when it is preempted."""
    modes = ["ok"] * 6
    modes[2] = f"term_once:{tmp_path / 'told'}"
    summary, source, keys = run(PartStore(tmp_path / "m"), modes)
    assert assert_complete(PartStore(tmp_path / "m"), source, keys) == {}
    assert (tmp_path / "told").exists() and summary.restarts == 1


def test_a_stage_that_cannot_be_loaded_ends_the_run(tmp_path):
    store = PartStore(tmp_path)

    def raises():
        raise FileNotFoundError("weights.bin")

    def dies():
        os._exit(9)

    with pytest.raises(EngineError, match="weights.bin"):
        run(store, ["ok"] * 3, factory=raises)
    with pytest.raises(EngineError, match="die while loading"):
        run(store, ["ok"] * 3, factory=dies)
    assert store.done_keys("split") == set()


def test_error_rows_that_fail_end_the_run(tmp_path):
    def error_rows(rows, reason):
        raise KeyError("oops")

    with pytest.raises(ContractError, match="error_rows failed: KeyError"):
        run(PartStore(tmp_path), ["raise"], error_rows=error_rows)


def test_a_store_that_fails_for_good_ends_the_run_and_says_where(tmp_path):
    store = PartStore(tmp_path)
    (tmp_path / "split").write_text("in the way")
    with pytest.raises(Exception, match="not a directory") as caught:
        run(store, ["ok"] * 3)
    assert str(tmp_path / "split") in caught.value.path


def test_what_a_stage_reads_joins_and_asks_for(tmp_path):
    """Order of rows, columns given, threads of the worker, imports through the driver's path."""
    columns = [("env", pa.string()), ("seen", pa.string()), ("value", pa.int64())]
    schema = pa.schema([("key", pa.string()), ("status", pa.string()), ("reason", pa.string()), *columns])

    def factory():
        def operator(rows):
            env = f"{os.environ['OMP_NUM_THREADS']} {os.environ['EXTRA']}"
            out = rows.select(["key", "status", "reason", "value"])
            out = out.append_column("env", pa.array([env] * len(rows)))
            return out.append_column("seen", pa.array([" ".join(rows.column_names)] * len(rows)))

        return operator

    store = PartStore(tmp_path)
    split = stages()[0]
    last = Stage(
        "look", "1", schema, factory, failed_parts, columns=["value", "status", "reason"], pool="look",
        joins={"source": ["mode"], "split": ["value"]}, row_id="row", resources=Resources(threads=3), batch_items=5,
    )  # fmt: skip
    square = Stage("square", "1", PARTS, make_square, failed_parts)
    source = source_table(["ok"] * 5)
    keys = chain(source, {"split": "1", "square": "1", "look": "1"})
    Engine(store, [split, square, last], pools={"look": Pool(env={"EXTRA": "x"})}).run(source, keys)
    rows = store.read_rows("look", keys["look"])
    assert set(rows["env"].to_pylist()) == {"3 x"}
    assert set(rows["seen"].to_pylist()) == {"key status reason row value source.mode split.value"} or set(
        rows["seen"].to_pylist()
    ) == {"key value status reason row source.mode split.value"}
    assert rows["value"].to_pylist() == [(10 * n + i) ** 2 for n in range(5) for i in range(n % 3 + 1)]


def test_two_drivers_at_once_on_one_store(tmp_path):
    store, log = PartStore(tmp_path / "m"), tmp_path / "log"
    results = {}
    half = Resources(num_cpus=0.4)  # so that the pools of both have room at the same time

    def drive(name, shard_items):
        settings = {"shard_items": shard_items, "pools": {"default": Pool(resources=half)}}
        results[name] = run(store, ["slow:0.05"] * 24, log=str(log), settings=settings)

    drivers = [threading.Thread(target=drive, args=args) for args in (("a", 4), ("b", 3))]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert sorted(results) == ["a", "b"]
    _, source, keys = results["a"]
    assert assert_complete(store, source, keys) == {}
    assert store.read_rows("split").num_rows == sum(n % 3 + 1 for n in range(24))
    assert len(log.read_text().split()) > 24  # they did work on the same items


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def drive(path, log, address=None):
    here = Path(__file__).parents[1] / "helpers"
    command = [sys.executable, here / "drive.py", path, log, "30", "slow:0.4", *([address] if address else [])]
    return subprocess.Popen(
        command, cwd=here.parents[1], env={**os.environ, "PYTHONPATH": str(here.parents[1])}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    """In a terminal the signal reaches every process of the group. The driver has a local Ray of its own here."""
    store, log = PartStore(tmp_path / "m"), tmp_path / "log"
    driver = drive(tmp_path / "m", log)
    try:
        # A square is begun when the driver has heard of its split: it knows of two at least, more may be on their way.
        wait_for(lambda: len(store.parts("square")) >= 2 or driver.poll() is not None)
        os.killpg(driver.pid, signal.SIGINT)
        out, err = driver.communicate(timeout=240)
    finally:
        driver.kill()
    assert driver.returncode == 130, err
    told = json.loads(out)["stages"]["split"]["done"]  # nothing else on standard output
    kept = store.done_keys("split")
    assert 4 <= told <= len(kept) < 30
    before = log.read_text().split()
    summary, source, keys = run(store, ["slow:0.4"] * 30, log=str(log), settings={"shard_items": 7})
    assert assert_complete(store, source, keys) == {}
    assert summary.stages["split"].kept == len(kept)
    assert len(log.read_text().split()) - len(before) == 30 - len(kept)


def test_a_driver_that_is_killed_is_resumed_by_another(tmp_path, ray_cluster):
    """It had joined the cluster by its address."""
    import ray

    store, log = PartStore(tmp_path / "m"), tmp_path / "log"
    driver = drive(tmp_path / "m", log, ray.get_runtime_context().gcs_address)
    try:
        wait_for(lambda: len(store.parts("split")) >= 3 or driver.poll() is not None)
        driver.send_signal(signal.SIGKILL)
        _, err = driver.communicate(timeout=240)
    finally:
        driver.kill()
    assert driver.returncode == -signal.SIGKILL, err
    assert 3 <= len(store.parts("split")) < 15
    summary, source, keys = run(store, ["slow:0.4"] * 30, log=str(log), settings={"shard_items": 7})
    assert assert_complete(store, source, keys) == {}
    assert summary.stages["split"].kept >= 6
    assert store.read_rows("split").num_rows == sum(n % 3 + 1 for n in range(30))


def test_a_run_stops_when_it_is_asked_to_and_goes_on_later(tmp_path):
    store, told = PartStore(tmp_path / "m"), []
    source = source_table(["slow:0.3"] * 12)
    keys = chain(source, VERSIONS)
    asked = threading.Event()

    def listen(progress):
        told.append(progress)
        if progress.stage == "split" and progress.items:
            asked.set()

    engine = Engine(store, stages(), shard_items=1, progress=listen, stop=asked.is_set)
    with pytest.raises(RunInterrupted) as caught:
        engine.run(source, keys)
    first = caught.value.summary.stages["split"].done
    assert 0 < first < 12 and len(store.done_keys("split")) >= first
    shard = next(p for p in told if p.items)
    assert shard.shard.bytes > 0 and shard.workers["default"][1] >= 1 and 0 < shard.queued < 12
    assert set(store.index("split")["key"].to_pylist()) >= {keys["split"][i] for p in told for i in p.items}
    summary, source, keys = run(store, ["slow:0.3"] * 12)
    assert assert_complete(store, source, keys) == {} and summary.stages["split"].kept >= first


def test_pools_follow_the_cluster_and_their_items(tmp_path):
    """A rule that gives more workers later, as when nodes come; and no more workers than items that are left."""
    store, asked, seen = PartStore(tmp_path), [], []

    def rule(nodes):
        asked.append(nodes)
        return {"default": Pool(actors=1 if len(asked) == 1 else 3, resources=Resources(num_cpus=0))}

    def progress(event):
        if event.workers:
            seen.append(event.workers["default"])
        if len(seen) == 4:  # a node that was not there when the run began
            ray.nodes = lambda: [*before(), {**before()[0], "NodeID": "0" * 56}]

    import ray

    before = ray.nodes
    try:
        settings = {"pools": rule, "progress": progress, "shard_items": 1}
        summary, source, keys = run(store, ["slow:0.3"] * 40, settings=settings)
    finally:
        ray.nodes = before
    assert assert_complete(store, source, keys) == {}
    assert len(asked) == 2 and sum(node.get("CPU", 0) for node in asked[0]) == 2
    wanted = [wanted for _, wanted in seen]
    assert wanted[0] == 1 and max(wanted) == 3
    assert summary.restarts == 0


def test_shards_become_smaller_towards_the_end(tmp_path):
    store = PartStore(tmp_path)
    _, source, keys = run(store, ["ok"] * 60, settings={"pools": {"default": Pool(actors=2)}})
    assert assert_complete(store, source, keys) == {}
    sizes = [len(store.read_part("split", name, ["key"])["key"].unique()) for name in store.parts("split")]
    assert sum(sizes) == 60 and max(sizes) == 8 and sizes.count(1) >= 2

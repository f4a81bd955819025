"""What the benches share, and that the jobs that they run are changed as they say."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pipelines.bench import chaos_work, harness
from pipelines.bench.memory import MemoryWatch
from pipelines.bench.night import faceless
from pipelines.config.load import load_config
from pipelines.config.names import STAGES
from pipelines.jobs import chain
from pipelines.run import folder
from pipelines.stages.declaration import Setting


def parse(*words: str):
    return harness.parse(
        "one", "What it is.", words, people=(8, "of LFW"), sizes=([250, 1000], ""), share=(0.5, ""),
        only={"action": "append", "choices": ("a", "b")}, shard_items=(64, ""),
    )  # fmt: skip


def test_options():
    found = parse()
    assert (found.people, found.sizes, found.share, found.only, found.shard_items) == (8, [250, 1000], 0.5, None, 64)
    assert found.out == Path("build/bench/one.json")
    found = parse("--people", "3", "--sizes", "1", "2", "--only", "b", "--shard-items", "5", "--json", "x.json")
    assert (found.people, found.sizes, found.only, found.shard_items) == (3, [1, 2], ["b"], 5)
    assert found.out == Path("x.json")
    with pytest.raises(SystemExit) as stopped:
        parse("--people", "many")
    assert stopped.value.code == 2


def test_the_record_names_the_machine_and_is_read_again(tmp_path):
    out = tmp_path / "bench/one.json"
    assert harness.recorded(out) == {}
    harness.record(out, {"rows": [1.5, float("nan")], "machine": "an older one"})
    assert harness.recorded(out)["rows"] == [1.5, None] and harness.recorded(out)["machine"]["cores"] >= 1


def test_turns_begin_with_one_that_does_not_count():
    done, now = [], [0.0]

    def work(name: str, seconds: float) -> None:
        done.append(name)
        now[0] += seconds if len(done) > 2 else 100

    times = harness.take_turns({"a": partial(work, "a", 1), "b": partial(work, "b", 2)}, 3, lambda: now[0])
    assert done == ["a", "b"] * 4 and times == {"a": [1, 1, 1], "b": [2, 2, 2]}



def test_a_process_apart_answers():
    found = harness.apart(json.dumps, {"a": [1, "b"]})
    assert json.loads(found) == {"a": [1, "b"]}
    with pytest.raises(subprocess.CalledProcessError):
        harness.apart(json.loads, "rubbish")


def test_a_watched_job_answers_and_its_memory_is_seen():
    code = "import time; x = bytearray(200 * 2**20); x[::4096] = b'x' * len(x[::4096]); time.sleep(2); print(42)"
    answer, peak = harness.watched([sys.executable, "-c", code])
    assert answer == 42 and 200 * 2**20 < peak < 2**31
    with pytest.raises(RuntimeError, match="status 3"):
        harness.watched([sys.executable, "-c", "raise SystemExit(3)"])
    with MemoryWatch(counts=lambda command: False) as none:
        pass
    assert none.peak == 0


def test_runs_get_the_stages_of_a_bench(monkeypatch):
    def made():
        return chain.make_stages(Setting(load_config("quick"), dict.fromkeys(STAGES, "0" * 16), gallery="", out="/out"))

    with harness.stages_changed(partial(faceless, out="/out", size=7)):
        inside = made()
    assert {stage.factory.func.__name__ for stage in inside} == {"_operator"}
    assert "_operator" not in {getattr(stage.factory, "func", stage.factory).__name__ for stage in made()}
    with harness.stages_changed(chaos_work.watched):
        assert [stage.factory.func for stage in made()] == [chaos_work._watched_factory] * len(inside)


def test_the_campaigns_real_job_is_watched(tmp_path, monkeypatch):
    """`scol protect` itself is not run here; what it would run with is."""
    seen = {}

    def protect(src, out, config, say):
        stages = chain.make_stages(Setting(config, dict.fromkeys(STAGES, "0" * 16), gallery="", out=out))
        seen["stages"], seen["store"] = stages, folder.Run(str(tmp_path / "out.run")).store
        return {"error": 0}

    monkeypatch.setattr("pipelines.jobs.protect.protect", protect)
    assert chaos_work.run_real("/src", str(tmp_path / "out"), []) == 0
    assert isinstance(seen["store"], chaos_work.WatchedStore)
    assert all(stage.factory.func is chaos_work._watched_factory for stage in seen["stages"])

"""Signs of life, requests to stop, and what `scol status` and `scol cancel` make of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from cluster import Progress
from cluster.worker import ShardResult
from pipelines.cli.main import main
from pipelines.run import presence
from pipelines.run.folder import Run
from pipelines.run.observe import Observer
from pipelines.run.presence import BusyError, Presence, drivers, is_alive, request_cancel, wait_for_end
from pipelines.run.schemas import SOURCE
from pipelines.stages.rows import to_table


def wait(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path: Path) -> Run:
    return Run(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run")


def test_a_request_stops_those_that_live_and_nobody_later(run: Run) -> None:
    assert request_cancel(run) == [] and run.names("drivers") == []
    with pytest.raises(KeyboardInterrupt):
        with Presence(run, "protect", lambda: {"stages": {"a": 1}}, every=0.05) as first:
            found = drivers(run)
            assert [d["id"] for d in found] == [first.id] and all(d["alive"] and d["sure"] for d in found)
            wait(lambda: drivers(run)[-1]["beats"] > found[-1]["beats"])
            asked = request_cancel(run)
            assert [d["id"] for d in asked] == [first.id]
            wait(first.stopped)
            raise KeyboardInterrupt  # as the engine does
    assert [(d["id"], d["state"], d["alive"]) for d in drivers(run)] == [(first.id, "cancelled", False)]
    assert request_cancel(run) == []
    run.write(f"drivers/{first.id}.cancel", b"")  # one that came too late
    with Presence(run, "gallery build", every=0.05) as third:
        time.sleep(0.3)
        assert not third.stopped()
        assert run.names("drivers") == [f"{third.id}.json"], "what is over is cleared away"
        request_cancel(run)
        wait(third.stopped)
    assert [d["state"] for d in drivers(run)] == ["finished"], "it was through already"


@pytest.mark.parametrize("second", ["protect", "gallery build", "purge"])
@pytest.mark.parametrize("first", ["protect", "gallery build", "purge"])
def test_a_second_driver_is_refused_and_told(run: Run, first: str, second: str) -> None:
    with Presence(run, first, every=5) as here:
        with pytest.raises(BusyError) as caught, Presence(run, second):
            raise AssertionError
        told = str(caught.value)
        assert f"{first} (process {os.getpid()} on {socket.gethostname()}, since 20" in told and "is at work" in told
        assert "\n" not in told and (f"stop it by `scol cancel {run.url}`" in told) == (first != "purge")
        assert run.names("drivers") == [f"{here.id}.json"], "who is refused leaves nothing"
    with Presence(run, second, every=5):
        pass


@pytest.mark.parametrize("elsewhere", [False, True])
def test_of_drivers_that_come_together_exactly_one_goes_on(run: Run, elsewhere: bool, monkeypatch) -> None:
    """All of this machine, or each of another one."""
    monkeypatch.setattr(presence, "_LOOK", 0.01)
    for turn in range(3 if elsewhere else 10):
        start, done, admitted, refused = threading.Barrier(4), threading.Barrier(4), [], []

        def drive(number: int, start=start, done=done, admitted=admitted, refused=refused) -> None:
            here = Presence(run, "protect", every=0.1)
            if elsewhere:
                here._about["machine"] = f"machine {number}"
                here._about["started"] = f"20{number}0"  # their clocks are years apart
            start.wait(60)
            try:
                with here:
                    admitted.append(number)
                    done.wait(60)
            except BusyError:
                refused.append(number)
                done.wait(60)

        threads = [threading.Thread(target=drive, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert (len(admitted), len(refused)) == (1, 3), turn


class Foreign:
    """A driver of another machine, whose clock is wrong: its record, and its signs while the block lasts."""

    def __init__(self, run: Run, clock: float, **about) -> None:
        self.run, self.clock, self.over = run, clock, threading.Event()
        self.about = {"id": "f" * 16, "kind": "protect", "host": "far", "pid": 1, "born": "1", "machine": "another"}
        self.about |= {"started": "2001-01-01T00:00:00+00:00", "state": "running", "admitted": True} | about
        self.beats = 0
        self.beat()

    def beat(self) -> None:
        self.beats += 1
        self.run.write_json(
            f"drivers/{self.about['id']}.json", self.about | {"beat": time.time() + self.clock, "beats": self.beats}
        )

    def live(self) -> None:
        while not self.over.wait(0.2):
            self.beat()

    def __enter__(self) -> Foreign:
        self.thread = threading.Thread(target=self.live)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.over.set()
        self.thread.join()


CLOCKS = [-3600, 0, 3600]


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("kind", ["protect", "purge"])
def test_a_driver_of_another_machine_lives_whatever_its_clock_says(run: Run, kind: str, clock: int) -> None:
    with Foreign(run, clock), pytest.raises(BusyError, match="on far, since .* is at work"), Presence(run, kind):
        raise AssertionError
    assert run.names("drivers") == ["f" * 16 + ".json"]


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("kind", ["protect", "purge"])
def test_a_dead_driver_of_another_machine_blocks_for_a_while(
    run: Run, kind: str, clock: int, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(presence, "SILENT", 1.5)
    Foreign(run, clock)
    begin = time.monotonic()
    with Presence(run, kind) as here:
        assert time.monotonic() - begin >= 1.5 and run.names("drivers") == [f"{here.id}.json"]
    assert "on far" in caplog.text and "waiting up to 2 s" in caplog.text


def test_status_says_what_it_does_not_know(run: Run) -> None:
    for clock, alive, told in (
        (0, True, "if its clock agrees"),
        (-3600, False, "seems to have ended"),
        (3600, False, "seems"),
    ):
        Foreign(run, clock)
        (entry,) = drivers(run)
        assert (entry["alive"], entry["sure"]) == (alive, False) and told in presence.words(entry)


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_driver_of_another_machine_is_cancelled_whatever_its_clock_says(run: Run, clock: int) -> None:
    with Foreign(run, clock) as far:
        (asked,) = request_cancel(run)
        assert asked["alive"] and run.has(f"drivers/{'f' * 16}.cancel")
        assert wait_for_end(run, {asked["id"]}, 1.0) == {asked["id"]}
        far.about["state"] = "cancelled"
        assert wait_for_end(run, {asked["id"]}, 60.0) == set()


def test_a_cancel_finds_nobody_where_another_machine_died(run: Run, monkeypatch) -> None:
    monkeypatch.setattr(presence, "BEAT", 0.3)
    Foreign(run, -3600)
    assert request_cancel(run) == [] and not run.has(f"drivers/{'f' * 16}.cancel")


def test_a_driver_that_was_taken_for_dead_or_seen_late_stops(run: Run) -> None:
    with Presence(run, "protect", every=0.05) as here:
        with Foreign(run, 0, kind="purge"):  # one that looked before this one could be seen
            wait(here.stopped)
        assert "purge (process 1 on far" in here.why
    with Presence(run, "protect", every=0.05) as here:
        with Foreign(run, 0, started="2999-01-01T00:00:00+00:00"):  # this one goes on, the other has to stop
            time.sleep(1.5)
            assert not here.stopped()
    with Presence(run, "protect", every=30) as here:
        run.remove(f"drivers/{here.id}.json")
        here._listen()
        assert here.stopped() and "taken it for dead" in here.why


def test_a_purge_is_alone(run: Run) -> None:
    with Presence(run, "protect", every=5):
        with pytest.raises(BusyError, match="protect .* is at work"), Presence(run, "purge"):
            raise AssertionError
        assert len(drivers(run)) == 1
    with Presence(run, "purge", every=5):
        assert request_cancel(run) == [], "a purge goes to its end"
        with pytest.raises(BusyError, match="purge"), Presence(run, "protect"):
            raise AssertionError


def test_a_killed_driver_is_told_from_a_living_one(tmp_path: Path) -> None:
    code = f"""
import time
from pipelines.run.folder import Run
from pipelines.run.presence import Presence
with Presence(Run({str(tmp_path / "run")!r}), "protect", every=0.1):
    time.sleep(120)
"""
    run = Run(str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        wait(lambda: drivers(run), 120)
        (entry,) = drivers(run)
        assert entry["alive"] and entry["pid"] == process.pid
        with pytest.raises(BusyError), Presence(run, "purge"):
            raise AssertionError
        os.kill(process.pid, signal.SIGSTOP)  # it says nothing any more, but may go on
        assert is_alive(entry, entry["beat"] + 1e6)
        process.kill()
        process.wait()
    finally:
        process.kill()
    (entry,) = drivers(run)
    assert not entry["alive"] and "killed?" in presence.words(entry)
    # Seen from another machine only the time counts.
    foreign = entry | {"machine": "elsewhere"}
    assert is_alive(foreign, entry["beat"] + 30) and not is_alive(foreign, entry["beat"] + 100)
    with Presence(run, "purge"):
        assert [d["kind"] for d in drivers(run)] == ["purge"]


def test_a_store_that_fails_for_a_moment_does_not_end_a_run(tmp_path: Path, caplog) -> None:
    run = Run(str(tmp_path / "run"))
    calls: list[int] = []

    def tell() -> dict:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the store is away")
        return {"calls": len(calls)}

    with Presence(run, "protect", tell, every=0.02):
        wait(lambda: len(calls) > 3)
    assert drivers(run)[0]["state"] == "finished" and "the store is away" in caplog.text


def test_observer_tells_pace_and_errors(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    observer = Observer(run)
    for stage in (SOURCE, "align", "tune"):
        observer(Progress(stage, 2, 10, {}, 0.0))
    base = {"key": "k", "photo_id": "p", "status": "error"}
    rows = [
        base | {"face_id": "p-00", "reason": "TIMEOUT: x", "failed_stage": "tune"},
        base | {"face_id": "p-01", "reason": "GEOMETRY: x", "failed_stage": "align"},
        base | {"face_id": "p-02", "status": "ok"},
    ]
    run.store.write_part("tune", None, to_table("tune", rows))
    (part,) = run.store.parts("tune")
    time.sleep(0.1)
    shard = ShardResult(part, True, {"error": 2, "ok": 1})
    observer(Progress("tune", 4, 10, {"error": 2, "ok": 1}, 1.0, 0, 1, 5, {"generator": (1, 2)}, 3, (7, 8), shard))
    observer.work()
    told = observer.tell()
    tune = told["stages"]["tune"]
    assert (tune["total"], tune["kept"], tune["done"], tune["queued"], tune["retried"]) == (10, 2, 4, 5, 1)
    assert 0 < tune["rate"] <= 2 / 0.1 and tune["seconds_left"] == pytest.approx(6 / tune["rate"])
    assert told["stages"]["align"]["rate"] is None and told["stages"]["align"]["seconds_left"] is None
    assert told["workers"] == {"generator": [1, 2]} and told["restarts"] == 3
    assert [row["face_id"] for row in told["last_errors"]] == ["p-00"], "the other one was told at align"


def test_status_and_cancel_from_another_process(tmp_path: Path) -> None:
    """A run in one process; `status` sees it at work with its pace, `cancel` stops it."""
    (tmp_path / "photos").mkdir()
    for i in range(80):  # no faces: only the stage align works
        Image.new("RGB", (900, 1200), (3 * i, 120, 60)).save(tmp_path / f"photos/{i:02d}.jpg")
    (tmp_path / "photos/00.jpg").write_bytes(b"broken")
    command = [sys.executable, "-m", "pipelines.cli.main", "protect", str(tmp_path / "photos")]
    command += ["--out", str(tmp_path / "out")]
    command += ["--set", "gallery.synthetic=50", "--set", "engine.shard_photos=1", "--set", "engine.workers=1"]
    url = str(tmp_path / "out.run")
    scol = CliRunner()
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def live() -> dict:
        assert process.poll() is None, process.stdout.read()
        found = drivers(Run(url))
        return found[-1].get("stages", {}).get("align", {}) if found else {}

    try:
        wait(lambda: live().get("rate"), 240)
        shown = scol.invoke(main, ["status", url])
        assert shown.exit_code == 0 and f"process {process.pid}" in shown.output and "is at work" in shown.output
        assert "/min" in shown.output and "workers  " in shown.output and "generator" in shown.output, shown.output
        wait(lambda: live() and drivers(Run(url))[-1]["last_errors"], 60)
        assert "last error  align" in scol.invoke(main, ["status", url]).output
        asked = scol.invoke(main, ["cancel", url, "--wait", "120"])
        assert asked.exit_code == 0 and "stopped; " in asked.output, asked.output
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and "`scol cancel` asked for it" in output, output
    run = Run(url)
    assert run.read_json("summary.json")["interrupted"] and drivers(run)[-1]["state"] == "cancelled"
    assert 0 < len(run.store.done_keys("align")) < 80
    found = json.loads(scol.invoke(main, ["status", url, "--json"]).output)
    assert found["drivers"][-1]["state"] == "cancelled" and found["pending"] > 0
    assert "cancelled" in scol.invoke(main, ["status", url]).output
    late = scol.invoke(main, ["cancel", url])
    assert late.exit_code == 1 and "nobody is at work" in late.stderr

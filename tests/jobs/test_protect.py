"""The driver's own parts: progress, layout of the pools, the final table, time limits of photos."""

from __future__ import annotations

import io

import pytest

from cluster import Progress
from pipelines.config.load import load_config
from pipelines.config.names import STAGES
from pipelines.jobs.progress import Reporter
from pipelines.jobs.protect import exit_status, table_of
from pipelines.run.schemas import SOURCE
from pipelines.run.text import duration
from pipelines.stages.pools import layout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(stage: str, done: int, total: int = 10, failed: int = 0) -> Progress:
    return Progress(stage, done, total, {"error": failed, "ok": done - failed}, 0.0)


def start(reporter: Reporter, kept: int = 0) -> None:
    for stage in (SOURCE, *STAGES):
        reporter(progress(stage, kept))


def test_progress_in_a_log_is_plain_lines_with_rate_and_time_left() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream, every=0.0)
    start(reporter, kept=2)
    assert stream.getvalue() == ""
    reporter.begin -= 60
    reporter(progress("tune", 6))
    reporter(progress("publish", 4, failed=1))
    reporter.close()
    first, second = stream.getvalue().splitlines()
    assert first == "2/10 photos, 1 min 0 s so far, align 2, invert 2, fuse 2, tune 6, attack 2, strengthen 2"
    # 2 of 8 in a minute; those that an earlier run had done do not count for the rate
    assert second.startswith("4/10 photos, 2.0 photos/min, 3 min 0 s left") and second.endswith(", 1 failed")
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_progress_on_a_terminal_rewrites_one_line() -> None:
    stream = Terminal()
    reporter = Reporter(stream)
    start(reporter)
    for done in range(1, 11):
        reporter(progress("publish", done))
    reporter.close()
    lines = stream.getvalue().split("\r\x1b[2K")
    assert 2 <= len(lines) <= 4, "at most one every 0.2 s, and the last"
    assert lines[-1].startswith("10/10 photos") and stream.getvalue().count("\n") == 1


def test_progress_in_a_log_is_not_said_too_often() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream, every=3600.0)
    reporter.last = reporter.begin
    start(reporter)
    for done in range(1, 10):
        reporter(progress("publish", done))
    assert stream.getvalue() == ""
    reporter(progress("publish", 10))
    assert stream.getvalue().startswith("10/10 photos")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


GIB = 2**30


@pytest.mark.parametrize(
    ("nodes", "sets", "actors", "threads", "gpus"),
    [
        ([{"CPU": 2, "memory": 16 * GIB}], [], 2, 1, 0),
        ([{"CPU": 16, "memory": 9 * GIB}], [], 4, 4, 0),  # memory for four
        ([{"CPU": 16, "memory": 64 * GIB}], ["engine.workers=2"], 2, 8, 0),
        ([{"CPU": 16, "memory": 64 * GIB}], ["engine.workers=2", "engine.threads=3"], 2, 3, 0),
        ([{"CPU": 16, "memory": 64 * GIB, "GPU": 2}], [], 2, 4, 1),
        ([{"CPU": 16, "memory": 64 * GIB, "GPU": 1}], ["engine.workers=4"], 4, 4, 0.25),
        ([{"CPU": 16, "memory": 64 * GIB, "GPU": 2}], ["engine.device=cpu"], 16, 1, 0),
        ([{"CPU": 8, "memory": 24 * GIB}, {"CPU": 8, "memory": 24 * GIB}], [], 16, 1, 0),
        ([{"CPU": 1, "memory": GIB}], [], 1, 1, 0),
    ],
)
def test_generators_get_the_machine(nodes, sets, actors, threads, gpus) -> None:
    pools = layout(load_config(sets=sets), nodes)
    generator = pools["generator"]
    assert (generator.actors, generator.resources.threads, generator.resources.num_gpus) == (actors, threads, gpus)
    reserved = sum(pool.actors * pool.resources.num_cpus for pool in pools.values())
    assert 0 < reserved <= sum(node["CPU"] for node in nodes), "all pools fit at the same time"
    assert pools["gallery"].actors == 1


def result(**more) -> dict:
    base = {
        "photos": 3,
        "faces": 2,
        "published": 2,
        "ok": 1,
        "weak": 1,
        "weak_share": 0.5,
        "strengthened": None,
        "no_face": 0,
        "error": 1,
        "pending": 0,
        "jod": 9.236,
        "face_psnr": 33.456,
        "face_ssim": None,
        "flip": 0.0321,
        "spread": {"jod": {"p5": 8.714}},
        "judge": "faceres",
        "ism": 0.25,
        "seconds_per_face": 41.04,
        "seconds": 99.0,
    }
    return base | more


def test_table_has_a_line_for_everything_that_counts() -> None:
    rows = {line[:28].strip(): line[28:].strip() for line in table_of(result()).splitlines()}
    assert rows["photos"] == "3" and rows["photos protected"] == "2" and rows["of them weak"] == "1"
    assert rows["failed"] == "1" and rows["PSNR of the face, dB"] == "33.46" and rows["SSIM of the face"] == "-"
    assert rows["JOD of the face (10: equal)"] == "9.24" and rows["5 % of the faces below"] == "8.71"
    assert rows["FLIP of the face"] == "0.032"
    older = table_of(result(jod=None, spread={"jod": None})).splitlines()
    older = {line[:28].strip(): line[28:].strip() for line in older}
    assert older["JOD of the face (10: equal)"] == older["5 % of the faces below"] == "-"
    assert rows["faces weak, %"] == "50.0" and "faces strengthened" not in rows
    again = {"judged": 2, "less": 1, "share": 0.625, "faces": 1, "rounds": 3, "ended": {"passed": 1, "rounds": 1}}
    rows = {line[:28].strip(): line[28:].strip() for line in table_of(result(strengthened=again)).splitlines()}
    assert (rows["faces strengthened"], rows["in rounds"]) == ("1", "3")
    assert (rows["share of a change kept"], rows["faces with less than all"]) == ("0.62", "1")
    assert rows["ISM by faceres"] == "0.250" and rows["seconds a face (all stages)"] == "41.0"


def test_only_failures_and_unfinished_work_fail_the_command() -> None:
    assert exit_status(result(error=0)) == 0, "weak photos are warned of"
    assert exit_status(result()) == 1 and exit_status(result(error=0, pending=1)) == 1

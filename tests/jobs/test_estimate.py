"""`scol plan`: faces by a sample, seconds a face timed now or taken from an earlier run."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pipelines.cli.main import main
from pipelines.config.load import load_config
from pipelines.config.names import NO_LOOP
from pipelines.config.sections import Config
from pipelines.jobs import estimate
from pipelines.networks.load import Networks
from pipelines.run.folder import Run, RunError

SETS = ["tune.steps=2", "refine.steps=3", "attack.steps=2", "engine.workers=2", "engine.threads=1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory, draw_photo):
    """Photos with 1, 2 and no faces, one that cannot be decoded, and a file that is no photo."""
    folder = tmp_path_factory.mktemp("photos")
    for name, pixels in (("one", draw_photo([1])), ("two", draw_photo([2, 3], 560)), ("none", draw_photo([]))):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff rubbish")
    (folder / "notes.txt").write_text("no photo")
    return folder


@pytest.fixture
def earlier(tmp_path):
    """A run's folder with what `plan` reads of it."""

    def make(**summary) -> str:
        run = Run(str(tmp_path / "out.run"))
        run.write("summary.json", json.dumps(summary).encode())
        return run.url

    return make


def planned(photos, *words: str) -> dict:
    sets = [word for setting in SETS for word in ("--set", setting)]
    shown = CliRunner().invoke(main, ["plan", str(photos), "--profile", "quick", *sets, *words])
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout)


def test_figures_of_a_machine_that_is_timed_now(photos):
    threads = torch.get_num_threads()
    found = planned(photos, "--json")
    assert torch.get_num_threads() == threads
    assert (found["photos"], found["unusable"], found["skipped"]) == (4, 0, {"NOT_A_PHOTO": 1})
    assert (found["sampled"], found["sample_unreadable"]) == (4, 1)
    assert found["faces"] == 3 and found["faces_standard_error"] == 0, "every photo was looked at"
    assert found["bytes"] == sum(path.stat().st_size for path in photos.iterdir() if path.suffix != ".txt")
    assert found["seconds_per_face"] > 0 and found["workers"] == 2 and found["peak_bytes"] > 2**20
    assert found["seconds"] == pytest.approx(3 * found["seconds_per_face"] / 2, abs=0.06)
    assert "timed now with 1 thread(s)" in found["basis"]


def test_times_of_an_earlier_run(photos, earlier):
    run = earlier(seconds_per_face=20.0, faces=7)
    found = planned(photos, "--json", "--run", run)
    assert (found["seconds_per_face"], found["seconds"], found["peak_bytes"]) == (20.0, 30.0, None)
    assert found["basis"] == f"7 faces of {run}"
    assert found["words"]["time"] == "about 30 s" and found["words"]["memory"] == "not measured"


def test_a_sample_stands_for_all(photos, earlier):
    run = earlier(seconds_per_face=1.0, faces=1)
    config = load_config("quick", sets=SETS)
    found = [estimate.plan(str(photos), config, run_url=run, sample=2, seed=seed) for seed in range(6)]
    assert {plan["sampled"] for plan in found} == {2}
    for plan in found:  # of n faces in the k of 2 that could be read, 4 photos have k / 2 * 4 * n / k
        assert plan["faces"] in (0, 2, 4, 6) and plan["sample_unreadable"] in (0, 1)
    assert len({plan["faces"] for plan in found}) > 1, "the seed chooses"
    assert any(plan["faces_standard_error"] > 0 for plan in found)


def test_a_run_without_faces_is_an_error(photos, earlier):
    run = earlier(seconds_per_face=None, faces=0)
    with pytest.raises(RunError, match="no finished face"):
        estimate.plan(str(photos), load_config("quick"), run_url=run)
    shown = CliRunner().invoke(main, ["plan", str(photos), "--run", run])
    assert shown.exit_code == 2 and len(shown.stderr.splitlines()) == 1 and "no finished face" in shown.stderr


def test_seconds_are_those_of_the_steps_of_the_configuration(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])

    def call(steps: int) -> None:
        calls.append(steps)
        now[0] += 100 if len(calls) == 1 else 5 + 2 * steps  # the first loads and warms up

    assert estimate._seconds(call, 50, torch.device("cpu")) == 5 + 2 * 50
    assert estimate._seconds(call, 0, torch.device("cpu")) == 0.0 and calls == [1, 1, 4]


def test_every_operator_of_the_configuration_is_timed():
    def made(sets: tuple[str, ...]) -> tuple[Config, Networks]:
        config = load_config("quick", sets=sets)
        return config, Networks(config, torch.device("cpu"))

    def steps(*sets: str) -> list[int]:
        return [steps for _, steps in estimate._operators(*made(sets))]

    base = ["tune.steps=5", "invert.refine_steps=4"]
    assert steps(*base, "attack.enabled=true", "attack.steps=3", "refine.steps=6") == [5, 6, 4, 3]
    assert steps(*base, "attack.enabled=false", "refine.identity=[]") == [5, 4]


def test_what_the_closed_loop_may_add_is_told():
    def words(*sets: str, run: str | None = None) -> str:
        return estimate._more_words(load_config("standard", sets=sets), run)

    both = words("strengthen.rounds=2", "strengthen.steps=30", "strengthen.looks=4")
    assert both == (
        ", and more for the closed loop (up to 7 looks at a face, 2 round(s) of 30 steps for those that it sends back)"
    )
    assert (
        words("strengthen.rounds=0", "strengthen.looks=3") == ", and more for the closed loop (up to 4 looks at a face)"
    )
    assert words(*NO_LOOP) == "" == words(run="earlier"), "times of a run have it in them"

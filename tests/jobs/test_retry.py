"""Failed rows get another key, and only these; a second failure can be opened again."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner

from pipelines.archive.listing import list_source, source_table
from pipelines.cli.main import main
from pipelines.config.load import load_config
from pipelines.config.names import STAGES
from pipelines.jobs import retry as retry_job
from pipelines.jobs.renewal import renewal
from pipelines.run import attempts
from pipelines.run.folder import Run, RunError
from pipelines.run.keys import chain, derive, stage_rules
from pipelines.run.schemas import PLAN_SCHEMA
from pipelines.stages.rows import to_table

WEIGHTS = {stage: f"{stage}:1" for stage in STAGES}
NAMES = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")


class Job:
    """Plans a run of four photos as `execute` does, and writes what its stages would."""

    def __init__(self, folder: Path) -> None:
        self.src, self.out, self.run = folder / "photos", folder / "out", Run(str(folder / "run"))
        self.src.mkdir()
        self.out.mkdir()
        for name in NAMES:
            (self.src / name).write_bytes(name.encode())

    def plan(self) -> dict[str, list[str]]:
        source = source_table(list_source(str(self.src)).photos)
        opened = attempts.opened(self.run)
        rules = stage_rules(load_config(sets=["strengthen.rounds=1"]), WEIGHTS, str(self.out), opened)
        rules["publish"] = chain(rules["publish"], renewal(self.run, str(self.out), opened.get("publish", ())))
        keys = derive(rules, source["key"].to_pylist())
        self.ids = source["photo_id"].to_pylist()
        columns = [source["photo_id"], source["path"], source["key"], *(keys[s] for s in STAGES)]
        self.run.write_plan(pa.table(columns, PLAN_SCHEMA))
        return keys

    def work(self, keys: dict[str, list[str]], failures: dict[str, tuple[str, str]]) -> int:
        """Rows of what is missing. failures: name -> stage, reason. Returns how many rows were made."""
        made = 0
        for stage in STAGES:
            done = self.run.store.done_keys(stage)
            for i, name in enumerate(NAMES):
                if keys[stage][i] in done:
                    continue
                row = {"key": keys[stage][i], "photo_id": self.ids[i], "face_id": f"{self.ids[i]}-00", "status": "ok"}
                where, reason = failures.get(name, (None, None))
                if where is not None and STAGES.index(where) <= STAGES.index(stage):
                    row |= {"status": "error", "reason": f"{reason}: words", "failed_stage": where, "action": "none"}
                elif stage == "publish":
                    (self.out / name).write_bytes(b"12345")
                    row |= {"path": name, "action": "protected", "out_bytes": 5}
                self.run.store.write_part(stage, None, to_table(stage, [row]))
                made += 1
        return made


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path)
    failures = {"b.jpg": ("tune", "TIMEOUT"), "c.jpg": ("publish", "CHANGED"), "d.jpg": ("align", "CORRUPT")}
    assert job.work(job.plan(), failures) == 28
    return job


def differences(old: dict, new: dict) -> dict[str, list[str]]:
    """By stage, names of the photos whose keys are others."""
    found = {
        stage: [name for name, a, b in zip(NAMES, old[stage], new[stage], strict=True) if a != b] for stage in STAGES
    }
    return {stage: names for stage, names in found.items() if names}


def test_what_failed_is_made_again_from_its_stage_on(job: Job) -> None:
    before = job.plan()
    assert job.work(before, {}) == 0, "failed rows are kept unless somebody asks"
    assert retry_job.retry(job.run).photos == {"align": 1, "tune": 1, "publish": 1}
    after = job.plan()
    assert differences(before, after) == {
        "align": ["d.jpg"],
        "invert": ["d.jpg"],
        "fuse": ["d.jpg"],
        "tune": ["b.jpg", "d.jpg"],
        "attack": ["b.jpg", "d.jpg"],
        "strengthen": ["b.jpg", "d.jpg"],
        "publish": ["b.jpg", "c.jpg", "d.jpg"],
    }
    # c.jpg fails again in the same way: it can be opened again, and its next attempt is then the one that counts.
    assert job.work(after, {"c.jpg": ("publish", "CHANGED")}) == 12
    assert differences(after, job.plan()) == {}
    assert retry_job.retry(job.run).photos == {"publish": 1}
    third = job.plan()
    assert differences(after, third) == {"publish": ["c.jpg"]} and job.work(third, {}) == 1
    assert differences(third, job.plan()) == {} and retry_job.retry(job.run).photos == {}


def test_only_what_was_asked_for(job: Job) -> None:
    before = job.plan()
    assert retry_job.retry(job.run, ["TIMEOUT"]).photos == {"tune": 1}
    assert differences(before, job.plan()) == {
        stage: ["b.jpg"] for stage in ("tune", "attack", "strengthen", "publish")
    }
    assert retry_job.retry(job.run, ["CORRUPT"], stage="tune").photos == {}
    with pytest.raises(RunError, match="no failed row has the reason TIMEUOT; there are: C"):
        retry_job.retry(job.run, ["TIMEUOT"])
    with pytest.raises(RunError, match="no stage"):
        retry_job.retry(job.run, stage="tuning")


def test_a_lost_output_and_a_retry_do_not_hide_each_other(job: Job) -> None:
    """c.jpg succeeds at its second attempt, is lost, is published a third time, and fails then."""
    retry_job.retry(job.run, ["CHANGED"])
    job.work(job.plan(), {})
    (job.out / "c.jpg").unlink()
    keys = job.plan()
    assert job.work(keys, {"c.jpg": ("publish", "CHANGED")}) == 1 and differences(keys, job.plan()) == {}
    assert retry_job.retry(job.run, ["CHANGED"]).photos == {"publish": 1}
    again = job.plan()
    assert differences(keys, again) == {"publish": ["c.jpg"]} and job.work(again, {}) == 1
    assert differences(again, job.plan()) == {}


def test_other_versions_of_the_photo_and_of_the_settings_are_not_concerned(job: Job) -> None:
    retry_job.retry(job.run, ["TIMEOUT"])
    source = source_table(list_source(str(job.src)).photos)
    opened, config = attempts.opened(job.run), load_config(sets=["tune.steps=1"])
    source = source["key"].to_pylist()
    assert derive(stage_rules(config, WEIGHTS, "o", opened), source) == derive(
        stage_rules(config, WEIGHTS, "o"), source
    )


def test_a_face_that_only_follows_another_one(job: Job) -> None:
    """Of a photo of two faces one failed at tune; asked by NOT_PUBLISHED it is taken up there, not at publish."""
    keys = job.plan()
    i = NAMES.index("b.jpg")
    rows = [
        {"key": attempts.again(keys["publish"][i]), "photo_id": job.ids[i], "face_id": f"{job.ids[i]}-{n:02d}"}
        | {"status": "error", "reason": reason, "failed_stage": where}
        for n, (where, reason) in enumerate([("tune", "TIMEOUT: x"), ("publish", "NOT_PUBLISHED: x")])
    ]
    job.run.store.write_part("publish", None, to_table("publish", rows))
    plan = job.run.plan().to_pylist()
    plan[i]["publish"] = rows[0]["key"]
    job.run.write_plan(pa.Table.from_pylist(plan, PLAN_SCHEMA))
    assert retry_job.retry(job.run, ["NOT_PUBLISHED"]).photos == {"tune": 1}


def test_the_command(job: Job) -> None:
    scol = CliRunner()
    shown = scol.invoke(main, ["retry", job.run.url, "--reason", "TIMEOUT"])
    assert shown.exit_code == 0 and shown.output == "1 photo(s) will be made again from tune on\n"
    found = json.loads(scol.invoke(main, ["retry", job.run.url, "--stage", "align", "--json"]).output)
    assert found == {"photos": {"align": 1}, "at_source": 0}
    wrong = scol.invoke(main, ["retry", job.run.url, "--reason", "NONE"])
    assert wrong.exit_code == 2 and "there are: C" in wrong.stderr
    assert scol.invoke(main, ["retry", str(job.src)]).exit_code == 2

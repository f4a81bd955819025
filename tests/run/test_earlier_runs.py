"""A run that an earlier version made goes on: what is finished counts, but for stages whose results have changed since.

`data/run_of_8f165d5.tar.gz` holds three photos (a generated person, a plain one, a broken one) and the finished run
that commit 8f165d5 made of them. Keys name absolute places, so it is unpacked where it was made.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines.cli.main import main
from pipelines.run.summary import summary
from pipelines.run.tables import read_stage

PLACE = Path("/tmp/scol-run-of-8f165d5")
SETTINGS = ("gallery.synthetic=12", "tune.steps=1", "refine.steps=1", "attack.steps=1", "invert.refine_steps=1")


@pytest.fixture
def place() -> Iterator[Path]:
    shutil.rmtree(PLACE, ignore_errors=True)
    with tarfile.open(Path(__file__).parent / "data" / "run_of_8f165d5.tar.gz") as archive:
        archive.extractall(PLACE.parent, filter="data")
    yield PLACE
    shutil.rmtree(PLACE, ignore_errors=True)


def protect() -> dict:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    command = ["protect", f"{PLACE}/photos", "--out", f"{PLACE}/out", "--profile", "quick", *sets, "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1, result.output  # the broken photo
    return json.loads(result.stdout)


def parts() -> set[str]:
    return {str(path.relative_to(PLACE)) for path in (PLACE / "out.run" / "manifests").rglob("*.parquet")}


def done(result: dict) -> dict[str, int]:
    return {name: stage["done"] for name, stage in result["engine"]["stages"].items()}


def test_its_rows_are_read_without_what_is_younger(place: Path) -> None:
    """Columns that are younger than its rows are null, beside older ones too; a stage that it did not have has no
    rows."""
    rows = read_stage(f"{PLACE}/out.run", "publish", ["path", "jod", "distorted"]).to_pylist()
    assert len(rows) == 3 and all(row["jod"] is None for row in rows)
    found = summary(f"{PLACE}/out.run")
    assert (found["photos"], found["faces"], found["published"], found["error"]) == (3, 1, 1, 1)
    assert found["psnr"] > 10 and (found["jod"], found["face_ssim"], found["spread"]["jod"]) == (None, None, None)
    assert found["strengthened"] is None


def test_it_goes_on_and_redoes_what_has_changed_alone(place: Path) -> None:
    before, output = parts(), (place / "out" / "person.jpg").read_bytes()
    result = protect()
    # Refinement, closed loop and paste-back have changed since, and with them what follows.
    stages = done(result)
    kept = {name: stages.pop(name) for name in ("source", "align", "invert", "fuse")}
    assert not any(kept.values()), "rows of the stages before the refinement count still"
    assert set(stages) == {"tune", "attack", "strengthen", "publish"} and all(stages.values())
    made = {path.split("/")[2] for path in parts() - before}
    assert before < parts() and made == set(stages), "and stay where they are, so that going back finds all of them"
    assert (result["photos"], result["faces"], result["published"], result["error"]) == (3, 1, 1, 1)
    assert 0 < result["jod"] <= 10 and result["face_ssim"] <= 1 and result["strengthened"]["judged"] == 1
    mine = (place / "out" / "person.jpg").read_bytes()
    assert mine != output

    there = parts()
    assert not any(done(protect()).values()) and parts() == there

    # Publishing again needs rows of `align` that an earlier version wrote, without its later columns.
    (place / "out" / "person.jpg").unlink()
    again = done(protect())
    assert again.pop("publish") == 1 and not any(again.values())
    assert (place / "out" / "person.jpg").read_bytes() == mine

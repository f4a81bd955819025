"""A run that an earlier version made goes on: nothing that is finished is made again.

`data/run_of_8f165d5.tar.gz` holds three photos (a generated person, a plain one, a broken one) and the finished run that commit 8f165d5
made of them. Keys name absolute places, so it is unpacked where it was made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines.cli.main import main
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


def test_it_goes_on_without_redoing_a_face(place: Path) -> None:
    before, output = parts(), (place / "out" / "person.jpg").read_bytes()
    result = protect()
    assert parts() == before, "photos were done anew"
    assert {name: stage["done"] for name, stage in result["engine"]["stages"].items()} == dict.fromkeys(
        ("source", "align", "invert", "fuse", "tune", "attack", "publish"), 0
    )
    assert (result["photos"], result["faces"], result["published"], result["error"]) == (3, 1, 1, 1)
    # Columns that are younger than its rows are null, beside older ones too.
    assert result["psnr"] > 10 and (result["jod"], result["face_ssim"], result["spread"]["jod"]) == (None, None, None)
    old = read_stage(f"{PLACE}/out.run", "publish", ["path", "jod", "distorted"]).to_pylist()
    assert len(old) == 3 and all(row["jod"] is None for row in old)

    # Publishing again needs rows of `align` that an earlier version wrote, without its later columns.
    (place / "out" / "person.jpg").unlink()
    result = protect()
    done = {name: stage["done"] for name, stage in result["engine"]["stages"].items()}
    assert done.pop("publish") == 1 and not any(done.values())
    assert 0 < result["jod"] < 10 and result["spread"]["jod"]["n"] == 1 and result["face_ssim"] < 1
    again = (place / "out" / "person.jpg").read_bytes()
    assert hashlib.sha256(again).digest() == hashlib.sha256(output).digest()

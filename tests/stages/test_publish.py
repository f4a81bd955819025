"""What is published is the photo that the faces were looked for in, or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.archive.listing import list_source, source_table
from pipelines.config.load import load_config
from pipelines.stages.declaration import Setting, load
from pipelines.stages.publish import stage
from pipelines.stages.rows import error_rows

SETTINGS = ["engine.device=cpu", "publish.distortions=half", "strengthen.rounds=0"]


def published(aligned: pa.Table, source: pa.Table, out: Path, *sets: str) -> list[dict]:
    """What ``publish`` says of the rows of ``align``, whose crops stand for protected faces."""
    config = load_config("quick", sets=[*SETTINGS, *sets])
    weights = dict.fromkeys(("publish",), "w")
    wanted = stage(Setting(config, weights, out=str(out)))
    assert {"content", "crop", "width", "height"} <= set(wanted.joins["align"])
    rows = aligned.select(["key", "photo_id", "face_id", "status", "reason", "failed_stage", "seed"])
    rows = rows.append_column("protected", aligned["crop"])
    for name in wanted.joins["align"]:
        rows = rows.append_column(f"align.{name}", aligned[name])
    for name in ("url", "path"):
        rows = rows.append_column(f"source.{name}", pa.array([source[name][0].as_py()] * len(rows)))
    return load("publish", config, "w", str(out))(rows).to_pylist()


@pytest.fixture
def photo(draw_photo, tmp_path: Path):
    """A photo, its source row and the rows of ``align``; a BMP, so that another of the same size has as many bytes."""

    def make(*people: int):
        path = tmp_path / "photos" / "a.bmp"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw_photo(list(people)) if people else np.full((340, 420, 3), 90, np.uint8)).save(path)
        source = source_table(list_source(str(path.parent)).photos)
        return path, source, load("align", load_config("quick", sets=SETTINGS), "w")(source)

    return make


def replace(path: Path, pixels: np.ndarray) -> None:
    """Another photo of the same number of bytes and modification time takes a photo's place."""
    before = path.stat()
    Image.fromarray(pixels).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def test_a_photo_that_stays_is_published(photo, tmp_path: Path) -> None:
    path, source, aligned = photo(100)
    (row,) = published(aligned, source, tmp_path / "out")
    assert row["action"] == "protected" and (tmp_path / "out" / "a.bmp").exists()
    path, source, aligned = photo()
    (row,) = published(aligned, source, tmp_path / "out")
    assert (row["status"], row["action"]) == ("no_face", "copied")
    assert (tmp_path / "out" / "a.bmp").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("people", [(100,), ()])
def test_a_photo_replaced_under_way_is_not_published(photo, draw_photo, tmp_path: Path, people) -> None:
    """Neither with another face's change, nor, where the photo before it had no face, unprotected."""
    path, source, aligned = photo(*people)
    replace(path, draw_photo([101]))
    (row,) = published(aligned, source, tmp_path / "out")
    assert (row["status"], row["failed_stage"], row["action"]) == ("error", "publish", "none")
    assert row["reason"].startswith("CHANGED: ")
    assert not (tmp_path / "out" / "a.bmp").exists()


def test_a_failed_photo_replaced_under_way_is_not_copied(photo, draw_photo, tmp_path: Path) -> None:
    path, source, aligned = photo(100)
    broken = error_rows("tune", 0, aligned, "EXCEPTION: it broke")
    broken = aligned.set_column(aligned.schema.get_field_index("status"), "status", broken["status"])
    (row,) = published(broken, source, tmp_path / "out", "publish.on_fail=copy")
    assert row["action"] == "copied" and (tmp_path / "out" / "a.bmp").exists()
    replace(path, draw_photo([101]))
    (row,) = published(broken, source, tmp_path / "other", "publish.on_fail=copy")
    assert row["action"] == "none" and "could not be copied either (CHANGED: " in row["reason"]
    assert not (tmp_path / "other" / "a.bmp").exists()


def test_rows_of_before_the_digest_are_published(photo, tmp_path: Path) -> None:
    """Runs that began when ``align`` kept no digest go on; the size of the picture is what is compared then."""
    path, source, aligned = photo(100)
    place = aligned.schema.get_field_index("content")
    older = aligned.set_column(place, "content", pa.nulls(len(aligned), pa.string()))
    (row,) = published(older, source, tmp_path / "out")
    assert row["action"] == "protected"
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(path)
    (row,) = published(older, source, tmp_path / "out")
    assert row["reason"].startswith("CHANGED: ")

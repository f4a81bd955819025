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
from pipelines.config.names import NO_LOOP
from pipelines.stages.crops import decode_png, encode_png, to_tensor
from pipelines.stages.declaration import Setting, load
from pipelines.stages.publish import stage
from pipelines.stages.rows import error_rows
from scol_ops.metrics import to_uint8
from scol_ops.visibility import face_window, jod

SETTINGS = [
    "engine.device=cpu",
    "publish.distortions=half",
    "publish.min_jod=0",
    "mask.scale=1",
    "mask.features=1",
    *NO_LOOP,
]


def published(
    aligned: pa.Table, source: pa.Table, out: Path, *sets: str, protected: pa.Array | None = None
) -> list[dict]:
    """What ``publish`` says of the rows of ``align``, whose crops stand for protected faces unless others are given."""
    config = load_config("quick", sets=[*SETTINGS, *sets])
    weights = dict.fromkeys(("publish",), "w")
    wanted = stage(Setting(config, weights, out=str(out)))
    assert {"content", "crop", "width", "height"} <= set(wanted.joins["align"])
    rows = aligned.select(["key", "photo_id", "face_id", "status", "reason", "failed_stage", "seed"])
    rows = rows.append_column("protected", aligned["crop"] if protected is None else protected)
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


def striped(aligned: pa.Table, levels: int) -> pa.Array:
    """The crops of the rows of ``align``, with stripes of a few levels all over."""
    found = []
    for crop in aligned["crop"].to_pylist():
        pixels = to_uint8(decode_png(crop)[0])
        stripes = (np.arange(len(pixels)) // 8 % 2 * 2 - 1)[:, None, None] * levels
        found.append(encode_png(to_tensor((pixels.astype(int) + stripes).clip(0, 255).astype(np.uint8))))
    return pa.array(found, pa.binary())


def test_a_face_is_measured_as_it_is_seen(photo, tmp_path: Path) -> None:
    """JOD of the face's window in the photo and the file, by the columns' own definition; the more shows, the lower."""
    path, source, aligned = photo(100)
    rows = [published(aligned, source, tmp_path / "out", protected=striped(aligned, n))[0] for n in (2, 6, 18)]
    for row in rows:
        assert row["status"] in ("ok", "weak") and row["action"] == "protected"
    jods = [row["jod"] for row in rows]
    assert 9.99 > jods[0] > jods[1] > jods[2] > 0 and all(row["jod_4k"] > row["jod"] - 0.5 for row in rows)
    assert rows[0]["face_ssim"] > rows[1]["face_ssim"] > rows[2]["face_ssim"] > 0
    before, after = (np.array(Image.open(p)) for p in (path, tmp_path / "out" / "a.bmp"))
    left, top, right, bottom = face_window(aligned["quad"][0].as_py(), before.shape[1], before.shape[0])
    window = [np.ascontiguousarray(p[top:bottom, left:right]) for p in (before, after)]
    assert rows[2]["jod"] == pytest.approx(jod(*window))
    assert rows[2]["jod_4k"] == pytest.approx(jod(*window, "standard_4k"))
    assert rows[2]["jod"] < jod(before, after) - 0.3  # what lies beside the face does not flatter it


def test_a_face_that_shows_its_change_is_weak(photo, tmp_path: Path) -> None:
    _, source, aligned = photo(100)
    face = {"protected": striped(aligned, 12)}
    bars = ("publish.max_ism=1", "publish.max_ism_distorted=1")  # the identity passes
    (free,) = published(aligned, source, tmp_path / "out", *bars, **face)
    assert free["status"] == "ok" and 2 < free["jod"] < 9.9
    (well,) = published(aligned, source, tmp_path / "out", *bars, f"publish.min_jod={free['jod'] - 0.01}", **face)
    assert well["status"] == "ok"
    (weak,) = published(aligned, source, tmp_path / "out", *bars, "publish.min_jod=9.9", "publish.min_psnr=90", **face)
    assert (weak["status"], weak["failed_stage"], weak["action"]) == ("weak", "publish", "protected")
    assert weak["reason"] == f"WEAK_LOOK: JOD {free['jod']:.2f} of the face window, below 9.9"
    (quality,) = published(aligned, source, tmp_path / "out", *bars, "publish.min_psnr=90", **face)
    assert quality["reason"].startswith("WEAK_QUALITY: ")
    (known,) = published(aligned, source, tmp_path / "out", "publish.max_ism=-1", "publish.min_jod=9.9", **face)
    assert known["reason"].startswith("WEAK_IDENTITY: ")


def test_a_bar_of_the_look_that_is_off_is_in_no_key() -> None:
    """Photos of runs from before the setting are not published anew."""
    assert "min_jod" not in load_config("standard", sets=["publish.min_jod=0"]).canonical("publish")
    bars = [load_config("standard", sets=[f"publish.min_jod={bar}"]).canonical("publish") for bar in (0, 9, 9.5)]
    assert len(set(bars)) == 3
    loops = [load_config("standard", sets=[f"publish.min_jod={bar}"]).canonical("strengthen") for bar in (0, 9)]
    assert loops[0] != loops[1] and "min_jod" not in loops[0], "the loop goes by it"

"""The demo's archive: a real archive's variety, drawn repeatably; and what the demo says of a run."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps, JpegImagePlugin

from pipelines.config.names import STAGES
from pipelines.jobs import demo
from pipelines.photos.codec import decode
from pipelines.photos.photo import PhotoError
from pipelines.run.folder import Run
from pipelines.run.schemas import PLAN_SCHEMA, SCHEMAS, SOURCE
from scol_ops.detection import FaceDetector
from scol_ops.models.embedded import load_recogniser

GOOD = [photo for photo in demo.ARCHIVE if photo.failure is None]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    paths = demo.make_archive(folder)
    assert paths == [folder / photo.path for photo in demo.ARCHIVE]
    return folder


@pytest.fixture(scope="module")
def found(archive):
    """Each good photo's pixels as the pipeline reads them, and its faces."""
    pixels = {photo.path: decode((archive / photo.path).read_bytes()).pixels for photo in GOOD}
    return {path: (p, FaceDetector().detect([p])[0]) for path, p in pixels.items()}


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file()}


def test_files(archive):
    assert set(digests(archive)) == {photo.path for photo in demo.ARCHIVE}
    for photo in GOOD:
        with Image.open(archive / photo.path) as image:
            assert image.format == ("PNG" if photo.path.endswith(".png") else "JPEG")
            assert ImageOps.exif_transpose(image).size == photo.size, photo.path
            assert image.info["icc_profile"], photo.path
            if image.format == "JPEG":
                assert image.getexif()[0x0112] == (6 if "sideways" in photo.path else 1)
                assert image.getexif().get_ifd(0x8769)[0x9003].startswith("2024:06:")
    with Image.open(archive / "team/dan.jpg") as image:
        assert image.info["progressive"] and JpegImagePlugin.get_sampling(image) == 0
    with Image.open(archive / "team/ben.jpg") as image:
        assert JpegImagePlugin.get_sampling(image) == 1
    with Image.open(archive / "office/wall.jpg") as image:
        assert JpegImagePlugin.get_sampling(image) == 2


def test_the_broken_file_fails_as_the_archive_says(archive):
    broken = [photo for photo in demo.ARCHIVE if photo.failure]
    assert len(broken) == 1
    with pytest.raises(PhotoError) as error:
        decode((archive / broken[0].path).read_bytes())
    assert error.value.code == broken[0].failure


def test_repeatable(archive):
    before = {p: p.stat().st_mtime_ns for p in archive.rglob("*.*")}
    content = digests(archive)
    (archive / "team/ada.jpg").write_bytes(b"spoilt")
    demo.make_archive(archive)
    changed = [p for p, modified in before.items() if p.stat().st_mtime_ns != modified]
    # Drawn anew, and the same: what had the right content was left alone, times included.
    assert changed == [archive / "team/ada.jpg"] and digests(archive) == content
    drawn = demo.draw_person(demo._PEOPLE["ada"], 1)
    assert np.array_equal(demo.draw_person.__wrapped__(demo._PEOPLE["ada"], 1), drawn)
    assert not np.array_equal(drawn, demo.draw_person(demo._PEOPLE["ada"]))


def test_detector_finds_the_faces(found):
    counts = {path: len(faces) for path, (_, faces) in found.items()}
    assert counts == {photo.path: len(photo.faces) for photo in GOOD}
    box = found["office/wall.jpg"][1][0].box
    assert 150 < box[2] - box[0] < 260


def test_people(found):
    """A recogniser takes the two photos of a person for one person, and others for others."""
    judge = load_recogniser("mobilefacenet")

    def embed(path: str) -> torch.Tensor:
        pixels, faces = found[path]
        photo = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        landmarks, boxes = (torch.from_numpy(np.stack([getattr(f, n) for f in faces])) for n in ("landmarks", "box"))
        return judge.embed_photo(photo, landmarks, boxes)[0]

    ada, again, ben, evening = map(embed, ("team/ada.jpg", "holidays/2023/ada at the lake.jpg", "team/ben.jpg",
                                           "holidays/2023/ben, evening.jpg"))
    assert min(ada @ again, ben @ evening) > judge.threshold > max(ada @ ben, ada @ evening, again @ ben)


# ---- what the demo says ----------------------------------------------------------------------------------------------


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def finished_run(folder: Path, reasons: dict[str, str | None], leave_out: str = "") -> Run:
    """A run over the demo's archive with these failures."""
    run = Run(str(folder))
    plan, rows = [], {stage: [] for stage in STAGES}
    for i, photo in enumerate(demo.ARCHIVE):
        photo_id, reason = f"{i:016x}", reasons.get(photo.path)
        plan.append({"photo_id": photo_id, "path": photo.path, **{s: f"{i:030x}{n:02x}"
                                                                 for n, s in enumerate((SOURCE, *STAGES))}})
        for n, stage in enumerate(STAGES):
            if stage == "publish" and photo.path == leave_out:
                continue
            for face in (None,) if reason or not photo.faces else range(len(photo.faces)):
                row = dict.fromkeys(SCHEMAS[stage].names) | {
                    "key": plan[-1][stage], "photo_id": photo_id, "status": "ok", "face_id": None}
                if reason:
                    row |= {"status": "error", "reason": reason, "failed_stage": "align"}
                elif face is None:
                    row["status"] = "no_face"
                else:
                    row["face_id"] = f"{photo_id}-{face:02d}"
                    row |= {"align": {"crop": png(100)}, "attack": {"protected": png(110)},
                            "publish": {"psnr": 33.0}}.get(stage, {})
                if stage == "publish":
                    row["path"] = photo.path
                rows[stage].append(row)
    run.write_plan(pa.Table.from_pylist(plan, PLAN_SCHEMA))
    for stage, items in rows.items():
        run.store.write_part(stage, None, pa.Table.from_pylist(items, SCHEMAS[stage]))
    return run


BROKEN = {"scans/broken.jpg": "TRUNCATED: the file ends too early"}


def test_outcome_as_expected(tmp_path):
    assert demo.check_outcome(finished_run(tmp_path, BROKEN)) == []


@pytest.mark.parametrize("reasons, leave_out, words", [
    ({}, "", "scans/broken.jpg: did not fail"),
    ({"scans/broken.jpg": "EMPTY: no bytes"}, "", "another reason than TRUNCATED"),
    (BROKEN | {"team/ada.jpg": "TIMEOUT: 600 s"}, "", "team/ada.jpg: failed: TIMEOUT"),
    (BROKEN, "team/dan.jpg", "team/dan.jpg: not done"),
])  # fmt: skip
def test_outcome_not_as_expected(tmp_path, reasons, leave_out, words):
    problems = demo.check_outcome(finished_run(tmp_path, reasons, leave_out))
    assert len(problems) == 1 and words in problems[0]


def test_contact_sheet(tmp_path):
    run = finished_run(tmp_path / "run", BROKEN)
    assert demo.contact_sheet(run, tmp_path / "sheet" / "faces.png", faces=4, side=40) == 4
    with Image.open(tmp_path / "sheet" / "faces.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (3 * 46 + 6, 104 + 4 * 46, 3)
    middle = 6 + 20
    for column in range(4):
        x = 104 + column * 46 + 20
        assert [int(sheet[middle + row * 46, x, 0]) for row in range(3)] == [100, 110, 100]
    # A face whose crop reaches beyond its photo comes last.
    table = run.store.read_rows("align")
    inside = [0.0, 0, 0, 99, 99, 99, 99, 0]
    rows = [row | {"width": 100, "height": 100, "quad": inside if row["face_id"] else None}
            for row in table.to_pylist()]
    first = next(row for row in rows if row["face_id"])
    first |= {"quad": [-40.0, 0, -40, 99, 59, 99, 59, 0], "crop": png(50)}
    for part in run.store.parts("align"):
        Path(run.store.path("align", part)).unlink()
    run.store.write_part("align", None, pa.Table.from_pylist(rows, SCHEMAS["align"]))
    count = sum(len(photo.faces) for photo in GOOD)
    assert demo.contact_sheet(run, tmp_path / "all.png", faces=99, side=40) == count
    with Image.open(tmp_path / "all.png") as image:
        columns = np.asarray(image)[middle, [104 + i * 46 + 20 for i in range(count)], 0]
    assert np.flatnonzero(columns == 50).tolist() == [count - 1]
    none = finished_run(tmp_path / "none", {photo.path: "EMPTY: no bytes" for photo in demo.ARCHIVE})
    assert demo.contact_sheet(none, tmp_path / "none.png") == 0 and not (tmp_path / "none.png").exists()
